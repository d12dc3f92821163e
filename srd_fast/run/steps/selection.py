"""From a starting student to a plan: init-student, reflect, curate."""

import dataclasses
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ...curriculum import RANKED, SHUFFLED, CurriculumPlan, Signal, curate
from ...files import content_digest, remove
from ...models import fingerprint, load_model, quantisation_of
from ...reflection import Sampling, get_difficulties, reflect
from ...reflection.attempts import JUDGE
from ...reflection.shards import merge_shards, shard_file, shard_files, write_shard
from ...reflection.signals import column_of, signal_files
from ...selection import ALL, select_samples
from ...sharing import ALONE, Sharing
from ...teacher import LiveTeacher, TeacherCache
from ...training.config import SRDConfig
from ...training.student import prune_and_warm_up
from ..config import RunConfig
from ..modes import reflects
from .cache import scoring_teacher, warm_up_cache
from .run import PRUNE, Run, write_parquet


def student_inputs(config: RunConfig) -> Any:
    """What the starting student depends on: how it is cut and warmed up, or the model that is given."""
    if config.student == PRUNE:
        # Without what is not given, so that students of configs from before a field stay valid.
        return [config.init_student.model_dump(exclude_none=True), config.dtype, config.seed]
    return fingerprint(config.student)


def init_student(run: Run) -> None:
    """Cut the student out of the teacher and warm it up. Nothing to do if a student is given."""
    if run.config.student != PRUNE:
        return
    c = run.config.init_student
    prune_and_warm_up(
        run.config.teacher,
        run.folder / "start",
        layers=c.layers,
        encoder_layers=c.encoder_layers,
        rows=run.data("train") if c.warmup_steps else None,
        warmup_steps=c.warmup_steps,
        learning_rate=c.warmup_learning_rate,
        batch_size=c.warmup_batch_size,
        dtype=run.dtype,
        device=run.device,
        seed=run.config.seed,
        source=run.group.everywhere(warm_up_cache, run)
        or (LiveTeacher(run.teacher, run.device) if run.teacher_spread else None),
    )


PARTS = "reflections.parts"


def reflect_step(run: Run) -> None:
    """Let the starting student answer the training prompts. An interrupted step resumes where it was.

    If the run folder has scores of shards, they are joined instead.
    """
    target, files = run.folder / "reflections.parquet", shard_files(run.folder)
    ids = list(run.data("train")["sample_id"])
    if files:
        scores = merge_shards(files, ids, _made_from(run))
    else:
        run.check_teacher()
        scores = reflect_together(run, run.start, run.folder / PARTS)
    write_parquet(scores, target)
    remove(run.folder / PARTS)


def reflect_shard(run: Run, shard: str) -> Path:
    """Run `reflect_step` for one shard "k/n" of the samples, and return the file of its scores."""
    run.check_teacher()
    target, parts = shard_file(run.folder, shard), shard_parts(run.folder, shard)
    teacher = scoring_teacher(run, alone=True) if looks_at_teacher(run.config) else None
    write_shard(reflect_with(run, run.start, parts, shard, teacher=teacher), target, _made_from(run))
    remove(parts)
    return target


def shard_parts(folder: Path, shard: str) -> Path:
    """The folder, in a run folder, for the finished parts of an unfinished shard."""
    return folder / shard_file(folder, shard).stem.replace("reflections", PARTS)


def _made_from(run: Run) -> str:
    """What the scores of a shard depend on: settings and data, and the student's files on this machine."""
    return ":".join([run.fingerprints["reflect"], fingerprint(run.start), *run.rouge_stamp])


def reflect_together(
    run: Run, model: str, parts: Path, samples: Dataset | None = None, seed: int | None = None
) -> Dataset:
    """Run `reflect_with` in all processes of a group, which share the work.

    An engine that spreads over devices or machines by itself runs only in the first process.
    """
    c, teacher = run.config.reflect, None
    scored = samples is None and looks_at_teacher(run.config)
    sizes = [c.engine_options.get(name, 1) for name in ("tensor_parallel_size", "data_parallel_size")]
    if c.engine == "ray" or sizes != [1, 1]:
        teacher = run.group.everywhere(scoring_teacher, run) if scored else None
        return reflect_with(run, model, parts, samples=samples, seed=seed, teacher=teacher)
    return run.group.everywhere(_reflect_share, run, model, parts, samples, seed)


def _reflect_share(run: Run, model: str, parts: Path, samples: Dataset | None, seed: int | None) -> Dataset:
    teacher = scoring_teacher(run) if samples is None and looks_at_teacher(run.config) else None
    return reflect_with(run, model, parts, sharing=run.group, samples=samples, seed=seed, teacher=teacher)


def reflect_with(
    run: Run,
    model: str,
    parts: Path,
    shard: str | None = None,
    sharing: Sharing = ALONE,
    samples: Dataset | None = None,
    seed: int | None = None,
    teacher: TeacherCache | PreTrainedModel | str | None = None,
) -> Dataset:
    """Let a model answer the training prompts and score its answers, with the settings of the section `reflect`.

    Args:
        run: the run.
        model: folder or hub id.
        parts: the folder for finished parts.
        shard: "k/n" for a share of the rows.
        sharing: the processes that do it together.
        samples: answer only these, without scoring. Default: the training rows.
        seed: seed of the draws. Default: the run's.
        teacher: for signals that compare with one.

    Returns:
        The answers, and their scores.
    """
    c = run.config.reflect
    sampled = [f.name for f in dataclasses.fields(Sampling) if f.name not in ("seed", "stop_ids")]
    return reflect(
        run.teacher if model == run.config.teacher and (run.teacher_spread or quantisation_of(model)) else model,
        run.data("train") if samples is None else samples,
        run.tokenizer,
        engine=c.engine,
        engine_options=c.engine_options,
        sampling=Sampling(
            **{name: getattr(c, name) for name in sampled}, seed=run.config.seed if seed is None else seed
        ),
        signals=c.signals if samples is None else (),
        attempts=c.attempts if samples is None else 1,
        judge=c.judge if samples is None else JUDGE,
        cross_entropy_by=c.cross_entropy_by,
        batch_size=c.batch_size,
        rouge_tokenizer=run.rouge_tokenizer,
        score_eos=c.score_eos,
        test_seconds=c.test_seconds,
        test_memory_mb=c.test_memory_mb,
        dtype=run.dtype,
        device=run.device,
        shard=shard,
        parts_folder=parts,
        sharing=sharing,
        keep_ids=True,
        progress=run.group.rank == 0,
        teacher=teacher,
    )


def looks_at_teacher(config: RunConfig) -> bool:
    """Whether a signal of the run compares with the teacher."""
    return any(signal.needs_teacher for signal in get_difficulties(config.reflect.signals).values())


def reflect_inputs(config: RunConfig) -> Any:
    """What reflections depend on, besides the student: the settings, and the code of the user's own signals."""
    c = config.reflect
    own = [content_digest(file) for file in signal_files([*c.signals, *([c.judge] if c.attempts > 1 else [])])]
    # Without attempts if there is only one, so that reflections from before this field stay valid.
    given = c.model_dump(exclude={"attempts", "judge"} if c.attempts == 1 else None)
    return [given, config.dtype, config.seed if c.temperature > 0 else None, own]


def sample_policy(config: RunConfig) -> tuple[str, float]:
    """Sample policy and ratio in the section `distill`. The plan already follows them."""
    given = config.distill
    name = given.get("sample_selection", SRDConfig.sample_selection)
    return str(name), given.get("sample_ratio", SRDConfig.sample_ratio)


def curate_inputs(config: RunConfig) -> Any:
    """What the plan depends on, besides the scores."""
    policy, ratio = sample_policy(config)
    samples = None if policy == ALL else [policy, ratio, config.dtype]
    c = config.curate
    # Without fields that have their defaults, so that plans from before these fields stay valid.
    plain: dict[str, Any] = {"order": RANKED, "band": {}, "weight_by": None}
    given = c.model_dump(exclude={name for name, value in plain.items() if getattr(c, name) == value})
    return [given, config.seed if c.method == "random" or c.order == SHUFFLED else None, samples]


def curate_step(run: Run) -> None:
    """Make plan.json from the scores."""
    c = run.config.curate
    made = get_difficulties(run.config.reflect.signals)
    weights = {column_of(name): weight for name, weight in (c.signals or dict.fromkeys(made, 1.0)).items()}
    if c.order in made:
        weights.setdefault(c.order, 0.0)
    ranks = {name: Signal(made[name].higher_is_easier, weight) for name, weight in weights.items()}
    if not reflects(run.config):
        ids = list(run.data("train")["sample_id"])
        CurriculumPlan([ids, *([] for _ in range(1, c.stages))], method="none", stages=c.stages).save(
            run.folder / "plan.json"
        )
        return
    plan = curate(
        run.folder / "reflections.parquet",
        keep=c.keep,
        stages=c.stages,
        rrf_k=c.rrf_k,
        signals=ranks,
        order=c.order,
        method=c.method,
        seed=run.config.seed,
        floor_subsets=c.floor_subsets,
        band={column_of(name): limits for name, limits in c.band.items()},
        weight_by=None if c.weight_by is None else column_of(c.weight_by),
    )
    policy, ratio = sample_policy(run.config)
    if policy != ALL:
        student = load_model(run.start, run.dtype, run.device)
        plan = select_samples(plan, run.data("train"), student, run.tokenizer, policy, ratio)
    plan.save(run.folder / "plan.json")
