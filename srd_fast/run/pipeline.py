"""The steps of a run. A step is done again only when what it was made from has changed.

A step's fingerprint covers its part of the config and the fingerprints of the steps before it. `steps.json` in the run
folder keeps it with a digest of every output. A step is skipped if both still match.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
import yaml

from ..errors import UserError, first_line
from ..files import content_digest, disk_trouble, in_use, remove, write_text
from ..losses import expect_logits, is_out_of_memory
from ..reflection.shards import parse_shard
from . import steps
from .config import RunConfig, read_run_config
from .group import Group
from .modes import MODES, has_cache, reflects

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Args:
        name: of the step.
        outputs: what it makes, as paths in the run folder.
        depends: the part of the config that it depends on.
        after: steps that come before it.
        run: does it.
        caches: paths from which an interrupted step goes on; --force deletes them.
        in_run: whether a run has the step. Otherwise those after it come after the steps before it.
    """

    name: str
    outputs: Callable[[RunConfig], list[str]]
    depends: Callable[[RunConfig], Any]
    after: tuple[str, ...]
    run: Callable[["steps.Run"], None]
    caches: tuple[str, ...] = ()
    in_run: Callable[[RunConfig], bool] = lambda c: True


class News(str):
    """A line about a step of a run.

    Args:
        text: the line.
        step: name of the step.
        state: "skipped", "started" or "done".
        seconds: that it took, or None.
    """

    def __new__(cls, text: str, step: str, state: str, seconds: float | None = None) -> "News":
        made = super().__new__(cls, text)
        made.step, made.state, made.seconds = step, state, seconds
        return made

    step: str
    state: str
    seconds: float | None


STEPS = (
    Step("prepare", lambda c: ["data"], steps.prepare_inputs, (), steps.prepare),
    Step(
        "init-student",
        lambda c: ["start"] if c.student == steps.PRUNE else [],
        steps.student_inputs,
        ("prepare",),
        steps.init_student,
    ),
    Step(
        "reflect",
        lambda c: ["reflections.parquet"],
        steps.reflect_inputs,
        ("init-student",),
        steps.reflect_step,
        (steps.PARTS,),
        in_run=reflects,
    ),
    Step(
        "curate",
        lambda c: ["plan.json"],
        steps.curate_inputs,
        ("reflect",),
        steps.curate_step,
    ),
    Step(
        "answers",
        lambda c: [steps.ANSWERS],
        steps.answer_inputs,
        ("curate",),
        steps.answer_step,
        (steps.PARTS,),
        in_run=lambda c: MODES.get(c.mode).makes_answers,
    ),
    Step(
        "cache",
        lambda c: ["teacher_cache/index.json"] if has_cache(c) else [],
        steps.cache_inputs,
        ("answers",),
        steps.cache_teacher,
        ("teacher_cache",),
        in_run=lambda c: MODES.get(c.mode).teacher,
    ),
    Step(
        "distill",
        lambda c: ["student", "metrics.jsonl"],
        steps.distill_inputs,
        ("cache",),
        steps.distill,
        ("checkpoints",),
    ),
    Step(
        "evaluate",
        lambda c: ["summary.json"],
        steps.evaluate_inputs,
        ("distill",),
        steps.evaluate_step,
        ("evaluation.json",),
    ),
    Step("report", lambda c: ["report.html"], lambda c: None, ("evaluate",), steps.report),
)


def steps_of(config: RunConfig) -> tuple[Step, ...]:
    """The steps that a run has, in their order, each after those before it that there are."""
    missing: dict[str, tuple[str, ...]] = {}
    found = []
    for step in STEPS:
        after = tuple(x for name in step.after for x in missing.get(name, (name,)))
        if step.in_run(config):
            found.append(replace(step, after=after))
        else:
            missing[step.name] = after
    return tuple(found)


# Of a run with the defaults.
STEP_NAMES = tuple(step.name for step in steps_of(RunConfig()))


def _hash(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


class Ledger:
    """`steps.json`: for each finished step its fingerprint, the digests of its outputs, and its seconds."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "steps.json"
        self.entries: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                self.entries = {
                    name: {
                        "fingerprint": e["fingerprint"],
                        "outputs": dict(e["outputs"]),
                        "seconds": float(e["seconds"]),
                    }
                    for name, e in content.items()
                }
            except (ValueError, KeyError, TypeError, AttributeError):
                logger.warning("%s is damaged: every step is done again", self.path)

    def is_valid(self, step: Step, fingerprint: str, config: RunConfig, folder: Path) -> bool:
        """Whether the step was done with the same inputs, and its outputs are unchanged."""
        entry = self.entries.get(step.name)
        if entry is None or entry.get("fingerprint") != fingerprint:
            return False
        return all(entry["outputs"].get(o) == content_digest(folder / o) is not None for o in step.outputs(config))

    def record(self, step: Step, fingerprint: str, config: RunConfig, folder: Path, seconds: float) -> None:
        """Write down a finished step, atomically."""
        outputs = {o: content_digest(folder / o) for o in step.outputs(config)}
        self.entries[step.name] = {"fingerprint": fingerprint, "outputs": outputs, "seconds": seconds}
        write_text(self.path, json.dumps(self.entries, indent=1))


def fingerprints(config: RunConfig) -> dict[str, str]:
    """The fingerprint of every step with this config."""
    found: dict[str, str] = {}
    for step in steps_of(config):
        found[step.name] = _hash([step.name, step.depends(config), [found[a] for a in step.after]])
    return found


def load_checked(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config; where some of it is wrong, check all the rest before that is told.

    Args:
        path: a YAML file, or None for the defaults.
        overrides: texts such as "distill.skew=0.2".

    Returns:
        The config. What needs more than reading it is checked by `execute`.

    Raises:
        FaultsError: with a line for each fault of the config.
        UserError: the file cannot be read.
    """
    config, faults = read_run_config(path, list(overrides))
    if faults.found:
        steps.check_inputs(config, faults)
    return config


def execute(
    config: RunConfig,
    only: str | None = None,
    force: bool = False,
    say: Callable[[News], None] = print,
    shard: str | None = None,
    group: Group | None = None,
    checks: steps.Checks = (),
) -> Path:
    """Run every step that is not done, or one step.

    Args:
        config: of the run.
        only: the one step to run. The steps before it must be done, except init-student.
        force: do `only` again even if nothing has changed.
        say: prints a line; it knows which step is where.
        shard: "k/n" with only="reflect": do that share of the samples, and leave its scores beside those of the others.
        group: the processes that do it together, of which this is the first. The others `serve` it. Default: this one.
        checks: of the config, besides the run's own, before anything is done; what they raise is told with the rest.

    Returns:
        The run folder.

    Raises:
        UserError: the input is wrong, or `only` needs a step that is not done. All that is wrong with the config is
            one FaultsError.
    """
    folder = Path(config.output_dir)
    with _explained(folder):
        steps.check_inputs(config, also=checks)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"output_dir {config.output_dir!r} cannot be made: {e}") from e
    with _explained(folder), ExitStack() as held:
        # Shards of one folder may run beside each other, but beside nothing else.
        held.enter_context(in_use(folder, "output_dir", shared=shard is not None))
        if shard is not None:
            held.enter_context(in_use(folder, "output_dir", ".lock-{}-of-{}".format(*parse_shard(shard))))
        _execute(config, folder, only, force, say, shard, group or Group())
    return folder


def serve(group: Group) -> None:
    """Do what the first process of a group orders, until it wants nothing more.

    Args:
        group: as one of the others sees it.

    Raises:
        UserError: the input is wrong for this process.
    """
    begun = group.share(None)
    if begun is None:
        return
    transformers.utils.logging.disable_progress_bar()
    run = steps.Run(*begun, group=group)
    with _explained(run.folder):
        for do, arguments in group.orders():
            with expect_logits(run.expected_logits()):
                do(run, *arguments)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Make one line of an error that comes from too little memory or from the disk of a run's folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if is_out_of_memory(e):
            raise UserError(
                f"out of memory: {first_line(e)}; what is finished is kept. srd-fast memory CONFIG --limit SIZE says "
                "which batch, accumulation and memory_budget fit"
            ) from e
        trouble = disk_trouble(e, folder)
        if trouble is None:
            raise
        raise UserError(f"{trouble}; what is finished is kept, and the same command goes on from there") from e


def _execute(
    config: RunConfig,
    folder: Path,
    only: str | None,
    force: bool,
    say: Callable[[News], None],
    shard: str | None,
    group: Group,
) -> None:
    """Run `execute` in a folder that this process holds."""
    steps.check_group(config, group, shard)
    wanted = fingerprints(config)
    write_text(folder / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
    ledger = Ledger(folder)
    run = steps.Run(config, folder, wanted, ledger.entries, group)
    group.share((config, folder, wanted, {}))
    todo = steps_of(config)
    if only is not None and only not in {step.name for step in todo}:
        raise UserError(
            f"config: this run, of mode {config.mode!r}, has no step {only!r}: srd-fast run CONFIG does all it has"
        )
    needed = {step.name for step in todo} if only is None else {only, *_before(only, todo)}
    for number, step in enumerate(todo, 1):
        if step.name not in needed:
            continue
        place = f"[{number}/{len(todo)}] {step.name}"
        valid = ledger.is_valid(step, wanted[step.name], config, folder)
        if only is not None and step.name != only:
            # init-student's verb takes no config: it is a part of the step after it.
            part_of = next((s.name for s in todo if step.name == "init-student" and step.name in s.after), step.name)
            if not valid and part_of != only:
                raise UserError(f"step {only!r} needs {part_of!r} done first: srd-fast {part_of} CONFIG")
            if valid or part_of != only:
                continue
        if shard is not None and step.name == only:
            if force:
                remove(steps.shard_parts(folder, shard))
            with expect_logits(run.expected_logits()):
                done = steps.reflect_shard(run, shard)
            say(News(f"{place}, shard {shard}: {done}", step.name, "done"))
            continue
        if force and only == step.name:
            for cache in step.caches:
                remove(folder / cache)
        elif valid:
            say(News(f"{place}: unchanged, skipped", step.name, "skipped"))
            continue
        say(News(f"{place} ...", step.name, "started"))
        started = time.monotonic()
        with expect_logits(run.expected_logits()):
            step.run(run)
        seconds = time.monotonic() - started
        ledger.record(step, wanted[step.name], config, folder, seconds)
        say(News(f"{place}: done in {seconds:.0f} s", step.name, "done", round(seconds, 3)))


def _before(name: str, among: Iterable[Step]) -> set[str]:
    by_name = {step.name: step for step in among}
    needed: set[str] = set()
    todo: Iterable[str] = by_name[name].after
    while todo:
        needed.update(todo)
        todo = [a for n in todo for a in by_name[n].after]
    return needed
