"""`reflect`: generations and difficulty scores of every sample."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Tokenisation, first_label, prepare_dataset
from ..errors import UserError
from ..models import load_model
from .engines import Sampling, make_engine
from .signals import Reflected, get_difficulty

logger = logging.getLogger(__name__)

# Reflection settings of the authors' code; `paper` leaves them open.
REFLECTION_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"max_new_tokens": 256},
    "official": {"max_new_tokens": 256, "temperature": 0.01, "no_repeat_ngram_size": 6, "score_eos": False},
}


def reflect(
    student: PreTrainedModel | str,
    dataset: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    engine: str = "transformers",
    sampling: Sampling | None = None,
    signals: Sequence[str] = ("rouge_l", "cross_entropy"),
    batch_size: int = 32,
    template: str = "alpaca",
    rouge_tokenizer: str = "auto",
    score_eos: bool = True,
    progress: bool = True,
    partial_file: str | Path | None = None,
) -> Dataset:
    """Let the student answer every prompt and score how hard each sample is for it.

    Args:
        student: a causal language model, or a folder or hub id to load one from (float32).
        dataset: rows of any format of `srd_fast.data`, or tokenised samples.
        engine: a name from `engine_names()`.
        sampling: default greedy, at most 128 new tokens.
        signals: names from `difficulty_names()`.
        template: prompt template of rows that are not tokenised yet.
        rouge_tokenizer: "auto", "rouge" or "unicode"; see `RougeL`.
        score_eos: count the end-of-sequence token in the cross-entropy.
        partial_file: generations are appended here as they finish, and those already there are not made again.

    Returns:
        Dataset in the order of the samples: sample_id, generation, one column a signal (rouge_l in 0..1, cross_entropy
        in nats per token; NaN where it cannot be scored), and reason (why not, or None).
    """
    functions = [get_difficulty(name) for name in signals]
    samples = prepare_dataset(dataset, Tokenisation(tokenizer, template)).dataset
    model = load_model(student) if isinstance(student, str) else student
    ids = list(samples["sample_id"])
    done = _read_partial(partial_file, set(ids))
    todo = [i for i, sample_id in enumerate(ids) if sample_id not in done]
    if done:
        logger.warning("%d of %d generations were there already", len(done), len(ids))
    prompts = [x[: first_label(y)] for x, y in zip(samples["input_ids"], samples["labels"])]
    runner = make_engine(engine, model, tokenizer, batch_size=batch_size, progress=progress)
    out = open(partial_file, "a", encoding="utf-8") if partial_file is not None else None  # noqa: SIM115
    try:
        for position, generated in runner.generate([prompts[i] for i in todo], sampling or Sampling()):
            text = str(tokenizer.decode(generated, skip_special_tokens=True)).strip()
            done[ids[todo[position]]] = text
            if out is not None:
                out.write(json.dumps({"sample_id": ids[todo[position]], "generation": text}) + "\n")
                out.flush()
    finally:
        if out is not None:
            out.close()
    missing = [i for i in ids if i not in done]
    if missing:
        raise UserError(f"engine {engine!r} gave no generation for {len(missing)} samples, the first is {missing[0]!r}")

    generations = [done[i] for i in ids]
    reflected = Reflected(
        samples, generations, model, tokenizer, batch_size, rouge_tokenizer, score_eos, progress=progress
    )
    columns: dict[str, list[Any]] = {"sample_id": ids, "generation": generations}
    reasons: list[str | None] = [
        None if any(r.strip() for r in references) else "empty reference" for references in samples["references"]
    ]
    for signal in functions:
        values = [float(v) for v in signal.function(reflected)]
        if len(values) != len(ids):
            raise UserError(f"difficulty signal {signal.name!r} gave {len(values)} values for {len(ids)} samples")
        for row, value in enumerate(values):
            if reasons[row] is None and not math.isfinite(value):
                reasons[row] = f"{signal.name} is {value}, not a finite number"
        columns[signal.name] = values
    for signal in functions:
        columns[signal.name] = [v if r is None else math.nan for v, r in zip(columns[signal.name], reasons)]
    unscored = sum(r is not None for r in reasons)
    if unscored:
        logger.warning("%d of %d samples cannot be scored; curate lists them with the reason", unscored, len(ids))
    return Dataset.from_dict({**columns, "reason": reasons})


def _read_partial(path: str | Path | None, known: set[str]) -> dict[str, str]:
    """Generations of an interrupted run; a line cut off by a crash is left out and removed."""
    if path is None or not Path(path).is_file():
        return {}
    done, good = {}, []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            if row["sample_id"] in known:
                done[row["sample_id"]] = row["generation"]
                good.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    Path(path).write_text("".join(f"{line}\n" for line in good), encoding="utf-8")
    return done
