"""Generation by vLLM in processes of its own."""

import copy
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..models import is_encoder_decoder, load_config, mend_generation_config, resolve_model
from ..workers.vllm import check_installed, check_sizes, vllm_pool, vllm_version
from .engines import Sampling, end_ids, until_end

# Loaded by vLLM, in its process.
_NGRAMS = "srd_fast.reflection.vllm_ngrams:NoRepeatNgrams"


class VLLMEngine:
    """vLLM's engine in `data_parallel_size` processes, which end with `close()`.

    One process computes a call of `generate`, alone and with an empty prefix cache. What it gives therefore depends
    only on its prompts, and repeated work gives the same. Threads may make as many calls at once as there are
    processes. A process that dies is started again once for a call.

    Args:
        student: a folder or hub id (of a model, or of a LoRA adapter), or a loaded model, which is written to a
            temporary folder first.
        tokenizer: used only for the end-of-sequence id.
        batch_size: not used; vLLM's own limit is the option `max_num_seqs`.
        tensor_parallel_size: GPUs for one copy of the model.
        data_parallel_size: copies of the model. On a CPU they share its cores.
        dtype: of the weights. Default: that of the loaded model, else float32.
        shard_size: prompts that `reflect` gives in one call.
        log: file for what vLLM prints. Default: one in the temporary folder.
        start_seconds: how long a start may take, in seconds.
        options: further keyword arguments of `vllm.LLM`: gpu_memory_utilization, max_model_len, max_num_seqs,
            kv_cache_memory_bytes, enforce_eager, enable_prefix_caching, ...
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
        self.parallel, self.shard_size = data_parallel_size, shard_size
        self._folder = Path(tempfile.mkdtemp(prefix="srd-fast-vllm-"))
        if isinstance(student, str):
            model, generation_config = resolve_model(student), _generation_config(resolve_model(student))
        else:
            model, generation_config = _save(student, self._folder / "model"), student.generation_config
            dtype = dtype or student.dtype
        self.ends = end_ids(tokenizer, generation_config)
        options = {
            "dtype": str(dtype or "float32").removeprefix("torch."),
            "tensor_parallel_size": tensor_parallel_size,
            **options,
        }
        self.settings = {**options, "vllm": vllm_version()}
        self._length, self._ngrams = 0, False
        log = self._folder / "vllm.log" if log is None else Path(log)
        self._pool = vllm_pool(model, options, self._needs, data_parallel_size, log, start_seconds)

    def reserve(self, length: int, sampling: Sampling) -> None:
        """Say before the first call how many tokens prompt and generation have at most, and how they are sampled."""
        self._length, self._ngrams = max(self._length, length), sampling.no_repeat_ngram_size > 0

    def start(self) -> None:
        """Start every process that is not running.

        Raises:
            UserError: a process cannot start. The message has vLLM's own words.
        """
        try:
            self._pool.start()
        except UserError:
            self.close()
            raise

    def _needs(self) -> dict[str, Any]:
        """What a process is told beside its options."""
        return {"length": self._length, "logits_processors": [_NGRAMS] if self._ngrams else []}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        """Yield all generations when all are done. Sampled text depends only on the seed and the prompt."""
        if not len(prompts):
            return
        seeds = [sampling.seed_of([p]) for p in prompts] if sampling.temperature > 0 else None
        request = {"prompts": [list(p) for p in prompts], "seeds": seeds, "sampling": asdict(sampling)}
        ends = {*self.ends, *sampling.stop_ids}
        generations = self._pool.ask({**request, "ends": sorted(ends)})
        for i, generated in enumerate(generations):
            yield i, until_end(generated, ends)

    def token_log_probs(self, samples: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        """Yield for each sample the log-probability, in nats, of every token but the first, given those before it."""
        if not len(samples):
            return
        yield from enumerate(self._pool.ask({"samples": [list(s) for s in samples]}))

    def close(self) -> None:
        """End the processes. When this returns, their memory is free, on a GPU too."""
        self._pool.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _generation_config(source: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return None


def _save(model: PreTrainedModel, folder: Path) -> str:
    """Write a loaded model where vLLM can load it. Adapters are merged into a copy first."""
    inner: Any = model
    if hasattr(inner, "merge_and_unload"):
        inner = copy.deepcopy(inner).merge_and_unload()
    mend_generation_config(inner, "student")
    inner.save_pretrained(folder)
    return str(folder)
