"""Difficulty signals: one number a sample that says how hard it is for the student."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data import IGNORE_INDEX, DistillationCollator, batches_by_length, pad_id
from ..errors import UserError
from ..losses import token_cross_entropy
from ..models import find_head, hidden_states
from ..suggest import unknown_name
from .rouge import RougeL

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reflected:
    """What a signal may look at: tokenised samples, the student's answer to each, and the student itself.

    dataset: columns sample_id, prompt, references, input_ids, labels. generations: one text a sample, in its order.
    """

    dataset: Dataset
    generations: Sequence[str]
    student: nn.Module
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 32
    rouge_tokenizer: str = "auto"
    score_eos: bool = True
    progress: bool = True


@dataclass(frozen=True)
class Difficulty:
    """A registered signal."""

    name: str
    function: Callable[[Reflected], Sequence[float]]
    higher_is_easier: bool


def rouge_l(reflected: Reflected) -> list[float]:
    """ROUGE-L F-measure of each answer against its references, 0..1."""
    scorer = RougeL(reflected.rouge_tokenizer)
    scores = [scorer.score(g, r or [""]) for g, r in zip(reflected.generations, reflected.dataset["references"])]
    if scorer.emptied:
        way = "scored with the Unicode tokenizer" if reflected.rouge_tokenizer == "auto" else "scored 0"
        logger.warning("ROUGE's tokenizer leaves nothing of %d of %d references: %s", scorer.emptied, len(scores), way)
    return scores


@torch.no_grad()
def cross_entropy(reflected: Reflected) -> list[float]:
    """Mean token cross-entropy of each reference under the student, nats per token."""
    model, rows = reflected.student, reflected.dataset
    collate, head = DistillationCollator(pad_id(reflected.tokenizer)), find_head(model)
    assert head.weight is not None
    input_ids, labels = list(rows["input_ids"]), list(rows["labels"])
    result = [float("nan")] * len(rows)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(rows), desc="cross-entropy", unit="sample", disable=not reflected.progress)
    for indices in batches_by_length([len(x) for x in input_ids], reflected.batch_size):
        batch = collate([{"input_ids": input_ids[i], "labels": labels[i]} for i in indices])
        batch = {k: v.to(head.weight.device) for k, v in batch.items()}
        hidden = hidden_states(model, batch)[:, :-1]
        target = batch["labels"][:, 1:]
        if not reflected.score_eos:
            last = (batch["attention_mask"].sum(1) - 2).clamp(min=0)[:, None]
            is_eos = target.gather(1, last) == reflected.tokenizer.eos_token_id
            target = target.scatter(1, last, torch.where(is_eos, IGNORE_INDEX, target.gather(1, last)))
        kept = target != IGNORE_INDEX
        losses = token_cross_entropy(hidden[kept], head, target[kept])
        for i, of_sample in zip(indices, losses.split(kept.sum(1).tolist())):
            result[i] = float(of_sample.mean()) if len(of_sample) else float("nan")
        bar.update(len(indices))
    bar.close()
    model.train(was_training)
    return result


_REGISTRY = {
    "rouge_l": Difficulty("rouge_l", rouge_l, higher_is_easier=True),
    "cross_entropy": Difficulty("cross_entropy", cross_entropy, higher_is_easier=False),
}


def difficulty_names() -> list[str]:
    """Names that `signals=` takes."""
    return sorted(_REGISTRY)


def get_difficulty(name: str) -> Difficulty:
    """Look a signal up. Raises UserError with the list of names for an unknown one."""
    if name not in _REGISTRY:
        raise UserError(unknown_name("difficulty signal", name, _REGISTRY))
    return _REGISTRY[name]


def register_difficulty(
    name: str,
    function: Callable[[Reflected], Sequence[float]],
    *,
    higher_is_easier: bool,
    replace: bool = False,
) -> None:
    """Add a signal: `function(reflected)` returns one number a sample, in order; non-finite marks it as unscored.

    Example:
        >>> register_difficulty("brevity", lambda r: [-len(g) for g in r.generations],
        ...     higher_is_easier=True, replace=True)
        >>> get_difficulty("brevity").higher_is_easier
        True
    """
    if name in _REGISTRY and not replace:
        raise UserError(f"difficulty signal {name!r} exists already; pass replace=True or take another name")
    _REGISTRY[name] = Difficulty(name, function, higher_is_easier)
