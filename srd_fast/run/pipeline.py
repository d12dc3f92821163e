"""The steps of a run. A step is done again only if what it depends on has changed.

A step's fingerprint covers its part of the config and the fingerprints of the steps before it. `steps.json` in the run
folder has the fingerprint and a digest of every output. A step is skipped if both still match.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
import yaml

from ..curriculum import CurriculumPlan
from ..errors import UserError, first_line
from ..files import content_digest, disk_trouble, in_use, remove, write_text
from ..losses import expect_logits, is_out_of_memory
from ..reflection.shards import parse_shard
from . import steps
from .config import RunConfig, read_run_config
from .group import Group
from .ledger import Ledger, News, Step
from .modes import has_cache, mode_of, reflects
from .places import check_places

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
        in_run=lambda c: mode_of(c).makes_answers,
    ),
    Step(
        "cache",
        lambda c: ["teacher_cache/index.json"] if has_cache(c) else [],
        steps.cache_inputs,
        ("answers",),
        steps.cache_teacher,
        ("teacher_cache",),
        in_run=lambda c: mode_of(c).teacher,
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
    Step(
        "controls",
        steps.control_outputs,
        lambda c: c.controls,
        ("evaluate",),
        lambda run: _train_controls(run),
        (steps.CONTROLS,),
        in_run=lambda c: bool(c.controls),
    ),
    Step(
        "report",
        lambda c: ["report.html", *(["report.json"] if c.controls else [])],
        lambda c: None,
        ("controls",),
        steps.report,
    ),
)
# Steps whose results may be taken from another run, if they depend on the same.
_BEGINNING = ("prepare", "init-student", "reflect")


def steps_of(config: RunConfig) -> tuple[Step, ...]:
    """The steps of a run, in their order. Where the run lacks a step, later ones depend on the steps before it."""
    missing: dict[str, tuple[str, ...]] = {}
    found = []
    for step in STEPS:
        after = tuple(x for name in step.after for x in missing.get(name, (name,)))
        if step.in_run(config):
            found.append(replace(step, after=after))
        else:
            missing[step.name] = after
    return tuple(found)


# The steps of a run with the defaults.
STEP_NAMES = tuple(step.name for step in steps_of(RunConfig()))


def _hash(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def fingerprints(config: RunConfig) -> dict[str, str]:
    """The fingerprint of every step with this config."""
    found: dict[str, str] = {}
    for step in steps_of(config):
        found[step.name] = _hash([step.name, step.depends(config), [found[a] for a in step.after]])
    return found


def load_checked(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config. If some of it is wrong, check all the rest too, and report everything together.

    Args:
        path: a YAML file, a folder with config.yaml in it, or None for the defaults.
        overrides: texts such as "distill.skew=0.2".

    Returns:
        The config. Checks that need more than reading it are made by `execute`.

    Raises:
        FaultsError: the config is wrong. There is a line for each fault.
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
        config: the run's config.
        only: the one step to run. The steps before it must be done, except init-student.
        force: do `only` again even if nothing has changed.
        say: prints a message about a step.
        shard: "k/n" with only="reflect": do only that share of the samples, and write its scores to a file of its own.
        group: the processes that do it together; this must be the first, the others call `serve`. Default: only this.
        checks: further checks of the config before anything is done. Their errors are reported with the rest.

    Returns:
        The run folder.

    Raises:
        UserError: the input is wrong, or `only` needs a step that is not done. Everything that is wrong with the config
            is in one FaultsError.
    """
    folder = Path(config.output_dir)
    with _explained(folder):
        steps.check_inputs(config, also=(_check_places, *checks))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"output_dir {config.output_dir!r} cannot be made: {e}") from e
    with _explained(folder), ExitStack() as held:
        # Several shards may run in one folder at the same time, but nothing else may.
        held.enter_context(in_use(folder, "output_dir", shared=shard is not None))
        if shard is not None:
            held.enter_context(in_use(folder, "output_dir", ".lock-{}-of-{}".format(*parse_shard(shard))))
        _execute(config, folder, only, force, say, shard, group or Group())
    return folder


def _check_places(config: RunConfig) -> None:
    check_places(config, {Path(x).parts[0] for step in STEPS for x in (*step.outputs(config), *step.caches)})


def serve(group: Group) -> None:
    """Do what the first process of a group orders, until it is finished.

    Args:
        group: the group, in a process other than the first.

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
    """Turn an error from a lack of memory, or from the disk of a run's folder, into one line."""
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
    """Do what `execute` does in a folder that this process has locked."""
    steps.check_group(config, group, shard)
    wanted, ledger = fingerprints(config), Ledger(folder)
    run = steps.Run(config, folder, wanted, ledger.entries, group, say)
    group.share((config, folder, wanted, {}))
    todo = steps_of(config)
    if only is not None and only not in {step.name for step in todo}:
        raise UserError(
            f"config: this run, of mode {config.mode!r}, has no step {only!r}: srd-fast run CONFIG does all it has"
        )
    _do(run, ledger, only, force, shard)


def _do(
    run: "steps.Run", ledger: Ledger, only: str | None = None, force: bool = False, shard: str | None = None
) -> None:
    """Do every step of a run that is not done, or one step."""
    config, folder, wanted, todo = run.config, run.folder, run.fingerprints, steps_of(run.config)
    write_text(folder / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
    needed = {step.name for step in todo} if only is None else {only, *_before(only, todo)}
    rows_checked = False
    for number, step in enumerate(todo, 1):
        if step.name not in needed:
            continue
        place = f"[{number}/{len(todo)}] {step.name}"
        valid = ledger.is_valid(step, wanted[step.name], config, folder)
        if only is not None and step.name != only:
            # The command init-student takes no config, so this step runs as a part of the step after it.
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
            run.say(News(f"{place}, shard {shard}: {done}", step.name, "done"))
            continue
        if force and only == step.name:
            for cache in step.caches:
                remove(folder / cache)
        elif valid:
            ledger.confirm(step, folder)
            run.say(News(f"{place}: unchanged, skipped", step.name, "skipped"))
            continue
        for output in step.outputs(config):
            if (folder / output).is_symlink():  # to the run from which this one began
                (folder / output).unlink()
        if step.name != "prepare" and not rows_checked:
            steps.check_rows_of_run(run)
            rows_checked = True
        run.say(News(f"{place} ...", step.name, "started"))
        started = time.monotonic()
        with expect_logits(run.expected_logits()):
            step.run(run)
        seconds = time.monotonic() - started
        ledger.record(step, wanted[step.name], config, folder, seconds)
        run.say(News(f"{place}: done in {seconds:.0f} s", step.name, "done", round(seconds, 3)))


def begin_from(source: Path, config: RunConfig) -> None:
    """Let a run begin with results of another run: data, starting student, reflections and the teacher's cache.

    They are links to the other run's files. Results that depend on something else are not taken. The cache is always
    shared, since it knows samples by their content; if it is of another teacher or kind, the run makes its own.

    Args:
        source: the other run's folder.
        config: the run's config.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    theirs, ours, wanted = Ledger(source), Ledger(folder), fingerprints(config)
    ours.begin()
    for step in steps_of(config):
        entry = theirs.entries.get(step.name)
        if step.name not in _BEGINNING or entry is None or entry["fingerprint"] != wanted[step.name]:
            continue
        if ours.entries.get(step.name, {}).get("outputs") != entry["outputs"]:
            for output in step.outputs(config):
                _link(source, folder, output)
            ours.adopt(step, entry)
    # With answers_again, each run deletes rows from its cache, so it needs its own.
    shares = has_cache(config) and not config.answers_again
    if shares and not os.path.lexists(folder / "teacher_cache") and (source / "teacher_cache").is_dir():
        _link(source, folder, "teacher_cache")
    steps.adopt_evaluations(source, folder)


def _link(source: Path, folder: Path, name: str) -> None:
    """Make a relative link, which stays valid if both folders are moved together."""
    remove(folder / name)
    (folder / name).symlink_to(os.path.relpath((source / name).resolve(), folder.resolve()))


def _train_controls(run: "steps.Run") -> None:
    """Do a run for each control, in a folder of its own, with this run's starting student and cache."""
    main = (run.config, run.folder, run.fingerprints, run.ledger)
    say, plan = run.say, CurriculumPlan.load(run.folder / "plan.json")
    cached = run.ledger["cache"]["outputs"] if has_cache(run.config) else {}
    if cached:  # if it was filled before there were controls, it lacks the dropped samples
        steps.cache_teacher(run)
    for name in run.config.controls:
        config = steps.control_config(main[0], name, plan)
        folder = Path(config.output_dir)
        begin_from(main[1], config)
        with in_use(folder, "output_dir"):
            ledger = Ledger(folder)
            run.group.everywhere(steps.Run.turn_to, run, config, folder, fingerprints(config), ledger.entries)
            run.say = _said_of(name, say)
            _do(run, ledger)
    run.group.everywhere(steps.Run.turn_to, run, *main)
    run.say = say
    # The controls may have added rows, of answers on which the run does not train.
    cached.update({name: content_digest(run.folder / name) for name in cached})


def _said_of(control: str, say: Callable[[News], None]) -> Callable[[News], None]:
    return lambda news: say(News(f"{control}: {news}", f"controls.{control}.{news.step}", news.state, news.seconds))


def _before(name: str, among: Iterable[Step]) -> set[str]:
    by_name = {step.name: step for step in among}
    needed: set[str] = set()
    todo: Iterable[str] = by_name[name].after
    while todo:
        needed.update(todo)
        todo = [a for n in todo for a in by_name[n].after]
    return needed
