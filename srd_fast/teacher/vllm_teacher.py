"""A teacher that vLLM runs, for models that do not run or fit anywhere else.

vLLM returns the states after the final norm, one for each token (its task "token_embed", without the normalisation of
embeddings), which are the head's inputs. Its extraction of hidden states from layers returns those before that norm.
Only the head is read from the model's files.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..data import IGNORE_INDEX
from ..errors import UserError
from ..models import fingerprint, head_of_files, load_config, resolve_model
from ..workers.vllm import check_installed, check_sizes, vllm_pool
from .elsewhere import TeacherElsewhere
from .index import json_text

# Options that hidden states need, and that cannot be chosen.
_FIXED: dict[str, Any] = {
    "runner": "pooling",
    "convert": "embed",
    "pooler_config": {"task": "token_embed", "use_activation": False},
    "enable_prefix_caching": False,  # a cached token has no hidden state
    "skip_tokenizer_init": False,
}
# Options about places and sizes of work. All others may change what is computed.
_PLACES = {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend"}
_PLACES |= {"gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "swap_space", "block_size", "seed"}
_PLACES |= {"max_num_seqs", "max_num_batched_tokens", "max_model_len", "enforce_eager", "compilation_config"}
_PLACES |= {"tokenizer", "tokenizer_mode", "log", "start_seconds", "disable_log_stats", "download_dir"}
# The most tokens of a request, whose hidden states are all in vLLM's memory at the same time.
_REQUEST_TOKENS = 32_768
# Number of equal tokens at the beginning of the first request's two samples, and how much their states may differ.
_ALIKE, _TOLERANCE = 4, 5e-2


def source_by_vllm(source: str, options: Mapping[str, Any] | None) -> str:
    """What identifies the teacher: `fingerprint`, and those of vLLM's options that may change its results."""
    changing = {name: value for name, value in (options or {}).items() if name not in _PLACES}
    return fingerprint(source) + (f":{json_text(changing)}" if changing else "")


def check_vllm_options(options: Mapping[str, Any]) -> None:
    """Refuse options of vLLM that a teacher cannot have.

    Raises:
        UserError: there is such an option. The message names it.
    """
    for name in options:
        if name in _FIXED or name in ("model", "dtype"):
            kept = f"it must be {_FIXED[name]!r}" if name in _FIXED else "it is an argument of its own"
            raise UserError(f"engine_options holds {name!r}, but for hidden states {kept}; leave it out")
    sizes = ("tensor_parallel_size", "data_parallel_size")
    check_sizes(**{name: options[name] for name in sizes if name in options})


def spreads(options: Mapping[str, Any]) -> bool:
    """Whether vLLM uses more than one device with these options."""
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    return any(options.get(name, 1) != 1 for name in sizes)


class VLLMTeacher(TeacherElsewhere):
    """A teacher run by vLLM in `data_parallel_size` processes, which start with the first samples and end with `close`.

    It fills caches (`open_teacher_cache`, `build_teacher_cache`), and `SRDTrainer` takes it as `teacher_model`: then
    the rows of a batch are requested when it is collated, one step ahead. Hidden states differ from those of
    transformers only by rounding: on average by 1e-5 (relative) in float32, by a few percent in bfloat16.

    Args:
        source: folder or hub id, with a tokenizer and weights in safetensors. The body may be quantised, the head not.
        dtype: dtype of weights and hidden states.
        device: where the head goes.
        tensor_parallel_size: GPUs for one copy of the model.
        data_parallel_size: copies of the model. On a CPU they share its cores.
        log: file for what vLLM prints. Default: one in a temporary folder.
        start_seconds: how long a start may take, in seconds.
        options: further keyword arguments of `vllm.LLM`: gpu_memory_utilization (default 0.8, which leaves room for the
            head), quantization, max_num_batched_tokens, ...

    Raises:
        UserError: vLLM is missing, an option is not one for hidden states, or the head cannot be read.
    """

    where = "in vLLM"

    def __init__(
        self,
        source: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        log: str | Path | None = None,
        start_seconds: float = 1800.0,
        **options: Any,
    ) -> None:
        check_installed()
        sizes = {"tensor_parallel_size": tensor_parallel_size, "data_parallel_size": data_parallel_size}
        check_vllm_options({**options, **sizes})
        self.dtype, self.parallel, self.spreads = dtype, data_parallel_size, spreads({**options, **sizes})
        self.source = source_by_vllm(source, options)
        self.revision: str | None = getattr(load_config(source), "_commit_hash", None)
        self.head, self.num_embeddings = head_of_files(source, dtype, device)
        assert self.head.weight is not None
        self.num_classes = self.head.weight.shape[0]
        self.is_encoder_decoder = False
        given = {
            "gpu_memory_utilization": 0.8,
            **options,
            **_FIXED,
            "dtype": str(dtype).removeprefix("torch."),
            "tensor_parallel_size": tensor_parallel_size,
            "hf_overrides": {**options.get("hf_overrides", {}), "head_dtype": "model"},
        }
        self._folder = Path(tempfile.mkdtemp(prefix="srd-fast-vllm-"))
        self._length, self._is_tried, self._count = 0, False, 0
        log = self._folder / "vllm.log" if log is None else Path(log)
        model = resolve_model(source)
        self._pool = vllm_pool(
            given, lambda: {"model": model, "length": self._length}, data_parallel_size, log, start_seconds
        )
        self._reader = ThreadPoolExecutor(1, "srd-fast-rows")

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        assert self.head.weight is not None
        return self.head.weight.device

    def reserve(self, length: int) -> None:
        """Announce how many tokens the samples have at most, before the first ones. Default: the model's limit.

        Args:
            length: tokens of the longest sample.
        """
        self._length = max(self._length, length)

    def hidden_rows(self, samples: Sequence[Mapping[str, Any]]) -> Tensor:
        """Run the teacher.

        Args:
            samples: tokenised, with input_ids and labels.

        Returns:
            [N, D_T] on the CPU: the states of the rows with loss, one sample after the other.

        Raises:
            UserError: vLLM cannot start, refuses a sample, or its states do not fit the head.
            EngineDiedError: vLLM has died twice.
        """
        self._try()
        parts: list[Tensor] = []
        request: list[tuple[list[int], list[int]]] = []
        tokens = 0
        for sample in samples:
            ids = [int(x) for x in sample["input_ids"]]
            rows = [i for i, label in enumerate(sample["labels"][1:]) if label != IGNORE_INDEX]
            if not rows:
                continue
            if request and tokens + len(ids) > _REQUEST_TOKENS:
                parts.append(self._ask(request))
                request, tokens = [], 0
            request.append((ids, rows))
            tokens += len(ids)
        if request:
            parts.append(self._ask(request))
        assert self.head.weight is not None
        return torch.cat(parts) if parts else torch.empty(0, self.head.weight.shape[1], dtype=self.dtype)

    def _ask(self, request: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """The states of some rows of each sample."""
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".safetensors") as file:
            self._pool.ask({"states": [ids for ids, _ in request], "rows": [x for _, x in request], "file": file.name})
            found_ND = load_file(file.name)["hidden"]
        assert self.head.weight is not None
        if found_ND.shape != (sum(len(rows) for _, rows in request), self.head.weight.shape[1]):
            raise UserError(
                f"vLLM: it gives states of {tuple(found_ND.shape)}, and the head is {self.head.weight.shape}"
            )
        return found_ND.to(self.dtype)

    def _try(self) -> None:
        """Try the model once on a few tokens: its states must be finite and causal."""
        if self._is_tried:
            return
        ids = [i * 7919 % self.num_embeddings for i in range(1, 13)]
        length = min(8, self._length or 8)
        alike = min(_ALIKE, length - 1)
        two = [ids[:length], [*ids[:alike], *ids[len(ids) - length + alike :]]]
        one_LD, other_LD = self._ask([(x, list(range(length))) for x in two]).float().split(length)
        if not (one_LD.isfinite().all() and other_LD.isfinite().all()):
            raise UserError(f"vLLM: hidden states of a few tokens in {self.dtype} are not finite; try another dtype")
        if alike:
            change = (one_LD[:alike] - other_LD[:alike]).abs().mean(1) / one_LD[:alike].abs().mean(1).clamp(min=1e-6)
            if not change.max() <= _TOLERANCE:
                raise UserError(
                    "vLLM: the teacher is not causal there: hidden states of earlier tokens change with a later token, "
                    f"by {change.max():.1e} of their size; fill the cache with the engine transformers"
                )
        self._is_tried = True

    def _begin(self, samples: Sequence[Mapping[str, Any]], rows: dict[str, Tensor]) -> Future[None]:
        return self._reader.submit(lambda: rows.update(hidden=self.hidden_rows(samples)))

    def close(self) -> None:
        """End the processes. When this returns, their memory is free, including a GPU's."""
        self._reader.shutdown()
        self._pool.close()
        shutil.rmtree(self._folder, ignore_errors=True)
