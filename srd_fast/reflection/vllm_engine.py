"""Generation by vLLM in separate processes."""

import copy
import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..errors import UserError
from ..models import (
    is_encoder_decoder,
    load_config,
    mend_generation_config,
    resolve_model,
    save_adapter,
    save_base,
    why_not_plain_lora,
)
from ..workers.vllm import check_installed, check_sizes, check_sleep_mode, vllm_pool, vllm_version
from .sampling import Sampling, end_ids, until_end

logger = logging.getLogger(__name__)

# vLLM loads this in its own process.
_NGRAMS = "srd_fast.reflection.vllm_ngrams:NoRepeatNgrams"


class VLLMEngine:
    """vLLM's engine in `data_parallel_size` processes, which end with `close()`.

    Each call of `generate` is computed by one process, with an empty prefix cache. So its result depends only on its
    prompts, and repeated work gives the same result. Threads may make as many calls at once as there are processes. A
    process that dies is started again once per call, with the same weights as the others.

    Args:
        student: a folder or hub id (of a model, or of a LoRA adapter), or a loaded model, which is written to a
            temporary folder first. If the model has a plain LoRA adapter that vLLM supports, only the adapter is passed
            on later, beside base weights that stay loaded; other adapters are merged into a copy.
        tokenizer: used only for the end-of-sequence id.
        batch_size: not used; vLLM's own limit is the option `max_num_seqs`.
        tensor_parallel_size: GPUs for one copy of the model.
        data_parallel_size: copies of the model. On a CPU they share its cores.
        dtype: dtype of the weights. Default: that of the loaded model, else float32.
        shard_size: prompts that `reflect` passes in one call.
        log: file for what vLLM prints. Default: one in the temporary folder.
        start_seconds: how long a start may take, in seconds.
        options: further keyword arguments of `vllm.LLM`: gpu_memory_utilization, max_model_len, max_num_seqs,
            kv_cache_memory_bytes, enforce_eager, enable_prefix_caching, enable_sleep_mode, enable_lora (False: merge
            adapters), ...
    """

    def __init__(
        self,
        student: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        *,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        dtype: torch.dtype | str | None = None,
        shard_size: int = 512,
        log: str | Path | None = None,
        start_seconds: float = 900.0,
        **options: Any,
    ) -> None:
        check_sizes(
            tensor_parallel_size=tensor_parallel_size, data_parallel_size=data_parallel_size, shard_size=shard_size
        )
        if is_encoder_decoder(load_config(student) if isinstance(student, str) else student):
            raise UserError(
                "engine 'vllm' runs causal language models, and the student has an encoder: use transformers"
            )
        check_installed()
        check_sleep_mode(options)
        self.parallel, self.shard_size = data_parallel_size, shard_size
        self._folder = Path(tempfile.mkdtemp(prefix="srd-fast-vllm-"))
        self._starting = threading.Lock()
        self._versions, self._adapted = 0, None
        if isinstance(student, str):
            self._weights = resolve_model(student)
            generation_config = _generation_config(self._weights)
        else:
            if _takes_adapter(student, options):
                self._adapted = student
                mend_generation_config(student, "student")
                save_base(student, self._folder / "base")
            self._weights, generation_config = self._write(student), student.generation_config
            dtype = dtype or student.dtype
        self.ends = end_ids(tokenizer, generation_config)
        options = {
            "dtype": str(dtype or "float32").removeprefix("torch."),
            "tensor_parallel_size": tensor_parallel_size,
            **options,
        }
        self.settings = {**options, "vllm": vllm_version()}
        self._sleeps = bool(options.get("enable_sleep_mode"))
        self._length, self._ngrams = 0, False
        log = self._folder / "vllm.log" if log is None else Path(log)
        self._pool = vllm_pool(options, self._needs, data_parallel_size, log, start_seconds)

    def reserve(self, length: int, sampling: Sampling) -> None:
        """Announce the most tokens of prompt and generation together, and the sampling, before the first call."""
        self._length, self._ngrams = max(self._length, length), sampling.no_repeat_ngram_size > 0

    def start(self) -> None:
        """Start every process that is not running.

        Raises:
            UserError: a process cannot start. The message has vLLM's error.
        """
        try:
            self._start()
        except UserError:
            self.close()
            raise

    def _start(self) -> None:
        with self._starting:
            try:
                self._pool.start()
            except UserError as e:
                if self._adapted is None:
                    raise
                logger.warning("vLLM does not take the student's adapter as one, so it is merged: %s", e)
                student, self._adapted = self._adapted, None
                self._weights = self._write(student)
                self._pool.start()

    def _needs(self) -> dict[str, Any]:
        """What a process needs besides vLLM's options."""
        processors = [_NGRAMS] if self._ngrams else []
        return {"model": self._weights, "length": self._length, "logits_processors": processors}

    def update_weights(self, student: PreTrainedModel) -> None:
        """Use other weights from now on: every running process loads them, and others start with them.

        Args:
            student: a model of the same shapes. If the engine uses the adapter separately, only the adapter is read.

        Raises:
            UserError: this version of vLLM, or the way in which it loaded the model, does not allow it. The engine
                cannot be used afterwards.
        """
        before, self._weights = self._weights, self._write(student)
        self._pool.ask_all({"weights": self._weights})
        if self._folder in Path(before).parents:
            shutil.rmtree(before, ignore_errors=True)

    def sleep(self) -> None:
        """Free the GPU's memory until the next call, if `enable_sleep_mode` is set."""
        if self._sleeps:
            self._pool.ask_all({"sleep": True})

    def _write(self, student: PreTrainedModel) -> str:
        """Write the weights of a loaded model, or only its adapter, to a folder from which vLLM can load them."""
        self._versions += 1
        folder = self._folder / f"weights-{self._versions}"
        with _without_bars(), torch.no_grad(), torch.autocast(student.device.type, enabled=False):
            if self._adapted is None:
                _save(student, folder)
            else:
                save_adapter(student, folder, self._folder / "base")
        return str(folder)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        """Yield all generations when all are done. Sampled text depends only on the seed and the prompt."""
        if not len(prompts):
            return
        seeds = [sampling.seed_of([p]) for p in prompts] if sampling.temperature > 0 else None
        request = {"prompts": [list(p) for p in prompts], "seeds": seeds, "sampling": asdict(sampling)}
        ends = {*self.ends, *sampling.stop_ids}
        self._start()
        generations = self._pool.ask({**request, "ends": sorted(ends)})
        for i, generated in enumerate(generations):
            yield i, until_end(generated, ends)

    def token_log_probs(self, samples: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        """Yield for each sample the log-probability, in nats, of every token but the first, given those before it."""
        if not len(samples):
            return
        self._start()
        yield from enumerate(self._pool.ask({"samples": [list(s) for s in samples]}))

    def close(self) -> None:
        """End the processes. When this returns, their memory is free, including a GPU's."""
        self._pool.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _generation_config(source: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return None


@contextmanager
def _without_bars() -> Iterator[None]:
    """Let transformers write files without progress bars, because it may do so at every step."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _takes_adapter(student: Any, options: dict[str, Any]) -> bool:
    """Whether a loaded model has an adapter that vLLM may use separately."""
    if not hasattr(student, "merge_and_unload") or not options.get("enable_lora", True):
        return False
    reason = why_not_plain_lora(student)
    if reason is not None:
        logger.info("the student's adapter is merged for vLLM, because %s", reason)
    return reason is None


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Write a loaded model. Adapters are merged into a copy first."""
    inner: Any = model
    if hasattr(inner, "merge_and_unload"):
        inner = copy.deepcopy(inner).merge_and_unload()
    mend_generation_config(inner, "student")
    inner.save_pretrained(folder)
