"""From a starting student to a plan: init-student, reflect, curate."""

from typing import Any

from datasets import Dataset

from ..curation import Signal, curate
from ..models import fingerprint, load_model
from ..reflection import Sampling, get_difficulty, reflect
from ..student import prune_and_warm_up
from .run import PRUNE, Run, write_parquet


def student_inputs(config: Any) -> Any:
    """What the starting student depends on: how it is cut and warmed up, or the model that is given."""
    if config.student == PRUNE:
        return [config.init_student.model_dump(), config.dtype, config.seed]
    return fingerprint(config.student)


def init_student(run: Run) -> None:
    """Cut the student out of the teacher and warm it up; nothing to do for a student that is given."""
    if run.config.student != PRUNE:
        return
    c = run.config.init_student
    prune_and_warm_up(
        run.config.teacher,
        run.folder / "start",
        layers=c.layers,
        rows=run.data("train") if c.warmup_steps else None,
        warmup_steps=c.warmup_steps,
        learning_rate=c.warmup_learning_rate,
        batch_size=c.warmup_batch_size,
        dtype=run.dtype,
        device=run.device,
        seed=run.config.seed,
    )


def reflect_step(run: Run) -> None:
    """The starting student answers the training prompts. Interrupted, it goes on where it was."""
    c = run.config.reflect
    partial = run.folder / f"reflections.partial-{run.fingerprints['reflect'][:12]}.jsonl"
    for old in run.folder.glob("reflections.partial-*.jsonl"):
        if old != partial:
            old.unlink()
    scores = reflect(
        load_model(run.start, run.dtype, run.device),
        run.data("train"),
        run.tokenizer,
        engine=c.engine,
        sampling=Sampling(
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            no_repeat_ngram_size=c.no_repeat_ngram_size,
            seed=run.config.seed,
        ),
        signals=c.signals,
        batch_size=c.batch_size,
        rouge_tokenizer=c.rouge_tokenizer,
        score_eos=c.score_eos,
        partial_file=partial,
    )
    write_parquet(scores, run.folder / "reflections.parquet")
    partial.unlink(missing_ok=True)


def curate_step(run: Run) -> None:
    """Scores to plan.json."""
    c = run.config.curate
    scores = Dataset.from_parquet(str(run.folder / "reflections.parquet"), keep_in_memory=True)
    weights = c.signals or dict.fromkeys(run.config.reflect.signals, 1.0)
    plan = curate(
        scores,
        keep=c.keep,
        stages=c.stages,
        rrf_k=c.rrf_k,
        signals={n: Signal(get_difficulty(n).higher_is_easier, w) for n, w in weights.items()},
        method=c.method,
        seed=run.config.seed,
        floor_subsets=c.floor_subsets,
    )
    plan.save(run.folder / "plan.json")
