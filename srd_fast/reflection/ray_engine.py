"""Generation on the machines of a Ray cluster, in actors with their own engines, to which this process gives work."""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import EngineDiedError, UserError, first_line
from ..models import mend_generation_config, resolve_model
from ..workers import Pool
from .engines import AUTO, ENGINES, make_engine
from .sampling import Sampling


class RayEngine:
    """An engine in each of several actors of a Ray cluster, which end with `close()`.

    Each call of `generate` is computed by one actor, so with parts of the same size the answers are those of its engine
    without Ray. Threads may make as many calls at once as there are actors. If an actor dies, with or without its
    machine, it is started again once per call, wherever the cluster has room.

    Args:
        student: a folder that every machine sees, or a hub id; or a loaded model, which is written to a temporary
            folder first, for clusters of one machine.
        tokenizer: the student's; it is sent to the actors.
        batch_size: batch size of the engine in each actor.
        engine: the actors' engine, a name from `engine_names()`.
        actors: how many actors there are.
        num_gpus: GPUs of each actor; may be fractional. Default: one if the cluster has GPUs, for "vllm" as many as its
            tensor_parallel_size.
        num_cpus: cores of each actor.
        address: the cluster's address. Default: that of $RAY_ADDRESS or of this machine, else a new cluster that ends
            with this process.
        dtype: dtype of the weights. Default: that of the loaded model, else float32.
        shard_size: prompts of one call. Default: that of the actors' engine.
        start_seconds: how long the start of all actors may take, in seconds.
        options: further keyword arguments of the actors' engine.

    Raises:
        UserError: Ray is not installed, or an argument is wrong.
    """

    def __init__(
        self,
        student: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        *,
        engine: str = "transformers",
        actors: int = 1,
        num_gpus: float | None = None,
        num_cpus: float = 1,
        address: str | None = None,
        dtype: torch.dtype | None = None,
        shard_size: int | None = None,
        start_seconds: float = 900.0,
        **options: Any,
    ) -> None:
        if not isinstance(actors, int) or actors < 1:
            raise UserError(f"actors must be a whole number of at least 1, got {actors!r}")
        ENGINES.check(engine)
        if engine in ("ray", AUTO):
            raise UserError(f"engine {engine!r} cannot run in Ray's actors: name another one, such as vllm")
        if importlib.util.find_spec("ray") is None:
            raise UserError("engine 'ray' needs Ray: pip install 'srd-fast[ray]'")
        self._folder = Path(tempfile.mkdtemp(prefix="srd-fast-ray-"))
        if isinstance(student, str):
            source = resolve_model(student)
        else:
            dtype, source = dtype or student.dtype, str(self._folder)
            mend_generation_config(student, "student")
            student.save_pretrained(source)
        self.parallel = actors
        self.shard_size = shard_size or (512 if engine == "vllm" else 4 * batch_size)
        self.settings = {"engine_of_actors": engine, "batch_size": batch_size, **options}
        self._engine, self._address, self._start_seconds = engine, address, start_seconds
        self._needs = {"num_gpus": num_gpus, "num_cpus": num_cpus}
        self._options = {"dtype": dtype or torch.float32, "batch_size": batch_size, **options}
        self._source, self._tokenizer = source, tokenizer
        self._length, self._sampling = 0, Sampling()
        self._pool, self._began = Pool(self._new, actors, "one of Ray's actors"), False
        if engine == "vllm":
            self.token_log_probs = self._token_log_probs

    def reserve(self, length: int, sampling: Sampling) -> None:
        """Announce the most tokens of prompt and generation together, and the sampling, before the first call."""
        self._length, self._sampling = max(self._length, length), sampling

    def start(self) -> None:
        """Join or start the cluster, and start every actor.

        Raises:
            UserError: there is no cluster, it lacks room, or an engine does not start. The message says why.
        """
        try:
            self._pool.start()
        except UserError:
            self.close()
            raise

    def _join(self) -> None:
        import ray

        try:
            if not ray.is_initialized():
                ray.init(address=self._address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
                self._began = True
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise UserError(f"Ray's cluster at {self._address!r} cannot be used: {first_line(e)}") from e

    def _new(self, index: int) -> "_RemoteActor":
        """Start an actor without waiting for it."""
        import ray

        self._join()
        gpus = self._needs["num_gpus"]
        if gpus is None:
            gpus = self._options.get("tensor_parallel_size", 1) if ray.cluster_resources().get("GPU") else 0
        made = ray.remote(_Actor).options(num_gpus=gpus, num_cpus=self._needs["num_cpus"], max_restarts=0)
        actor = made.remote(self._engine, self._source, self._tokenizer, self._length, self._sampling, self._options)
        return _RemoteActor(actor, self._start_seconds, self._too_late)

    def _too_late(self) -> str:
        """A message with the likely reason why the actors have not started."""
        import ray

        has = {n: x for n, x in ray.cluster_resources().items() if n in ("CPU", "GPU")} if self._began else ""
        return (
            f"Ray has not started {self.parallel} actors in {self._start_seconds:.0f} s: each needs {self._needs}"
            f"{f', the cluster has {has}' if has else ''}; lower actors, or raise start_seconds"
        )

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        """Yield all generations when all are done."""
        if not len(prompts):
            return
        self.start()
        yield from self._pool.ask("generate", [list(p) for p in prompts], sampling)

    def _token_log_probs(self, samples: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        """Yield for each sample the log-probability, in nats, of every token but the first, given those before it."""
        if not len(samples):
            return
        self.start()
        yield from self._pool.ask("token_log_probs", [list(s) for s in samples])

    def close(self) -> None:
        """End the actors, and the cluster if it was started here."""
        import ray

        self._pool.close()
        if self._began:
            ray.shutdown()
            self._began = False
        shutil.rmtree(self._folder, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The cause inside an error of Ray, in one line."""
    cause = getattr(error, "cause", None) or error
    return first_line(cause) if isinstance(cause, BaseException) else str(cause)


class _RemoteActor:
    """An actor, seen from this process.

    Args:
        actor: Ray's handle of an `_Actor`.
        start_seconds: how long its start may take, in seconds.
        too_late: makes the message for a start that takes longer.
    """

    def __init__(self, actor: Any, start_seconds: float, too_late: Callable[[], str]) -> None:
        self._actor, self._start_seconds, self._too_late = actor, start_seconds, too_late

    def ready(self) -> None:
        """Wait until its engine has started."""
        import ray

        try:
            ray.get(self._actor.ready.remote(), timeout=self._start_seconds)
        except ray.exceptions.GetTimeoutError as e:
            raise UserError(self._too_late()) from e
        except ray.exceptions.RayError as e:
            raise UserError(f"an engine does not start in Ray's actor: {_reason(e)}") from e

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the actor, and return its result."""
        import ray

        try:
            return ray.get(getattr(self._actor, method).remote(*arguments))
        except ray.exceptions.RayTaskError as e:
            raise UserError(f"an engine in Ray's actor failed: {_reason(e)}") from e
        except ray.exceptions.RayActorError as e:
            raise EngineDiedError(f"an actor of Ray died: {_reason(e)}") from e

    def end(self) -> None:
        """Kill the actor."""
        import ray

        ray.kill(self._actor)


class _Actor:
    """What runs on a machine of the cluster."""

    def __init__(self, name: str, source: str, tokenizer: Any, length: int, sampling: Sampling, options: Any) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        given = {n: x for n, x in options.items() if n != "dtype"}
        self.engine: Any = make_engine(
            name, source, tokenizer, length=length, sampling=sampling, dtype=options["dtype"], device=device, **given
        )

    def ready(self) -> None:
        """Start the engine, if it has a method for that."""
        start = getattr(self.engine, "start", None)
        if callable(start):
            start()

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[tuple[int, list[int]]]:
        """All generations."""
        return list(self.engine.generate(prompts, sampling))

    def token_log_probs(self, samples: list[list[int]]) -> list[tuple[int, list[float]]]:
        """All log-probabilities."""
        return list(self.engine.token_log_probs(samples))
