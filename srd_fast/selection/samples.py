"""Which samples are trained on: those with the highest mean of a signal under the starting student."""

import math
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ..curriculum import CurriculumPlan
from ..data import DistillationCollator, batches_by_length, pad_id
from ..errors import UserError
from ..losses import token_values
from ..models import find_head, hidden_states
from ..suggest import unknown_name
from ..teacher import labels_with_loss, rows_with_loss
from .positions import ALL, rows_of_samples, share_of

_SAMPLES = ("topk_student_entropy", "topk_student_cross_entropy")


def sample_policies() -> list[str]:
    """Names that `sample_selection` takes."""
    return [ALL, *_SAMPLES]


def check_sample_policy(name: str) -> None:
    """UserError with the list of names for an unknown one."""
    if name not in sample_policies():
        raise UserError(unknown_name("sample_selection", name, sample_policies()))


@torch.no_grad()
def sample_means(
    student: nn.Module, samples: Dataset, tokenizer: Any, signal: str, batch_size: int = 32
) -> list[float]:
    """Mean of a student's signal over the positions of each sample; NaN for a sample without any."""
    collate, head = DistillationCollator(pad_id(tokenizer)), find_head(student)
    assert head.weight is not None
    found = [math.nan] * len(samples)
    was_training = student.training
    student.eval()
    for indices in batches_by_length([len(x) for x in samples["input_ids"]], batch_size):
        some = samples[indices]
        batch = collate([{"input_ids": x, "labels": y} for x, y in zip(some["input_ids"], some["labels"])])
        batch = {k: v.to(head.weight.device) for k, v in batch.items()}
        labels_N = labels_with_loss(batch)
        values = token_values(rows_with_loss(hidden_states(student, batch), batch), head, labels_N)
        chosen = values.entropy if signal == "student_entropy" else values.cross_entropy
        for i, of_sample in zip(indices, chosen.split(rows_of_samples(batch).tolist())):
            found[i] = float(of_sample.mean())
    student.train(was_training)
    return found


def select_samples(
    plan: CurriculumPlan, samples: Dataset, student: nn.Module, tokenizer: Any, policy: str, ratio: float
) -> CurriculumPlan:
    """The plan with ceil(ratio n) samples of each subset: those with the highest mean signal under `student`.

    Args:
        policy: from `sample_policies()`; "all" gives the plan back.
    """
    check_sample_policy(policy)
    if policy == ALL:
        return plan
    kept = set(plan.kept)
    if missing := sorted(kept.difference(samples["sample_id"])):
        raise UserError(
            f"the plan keeps {len(missing)} samples that the data does not have, the first is {missing[0]!r}: curate "
            "again with this data"
        )
    some = samples.select([i for i, sample_id in enumerate(samples["sample_id"]) if sample_id in kept])
    signal = policy.removeprefix("topk_")
    value = dict(zip(some["sample_id"], sample_means(student, some, tokenizer, signal)))
    subsets, dropped = [], list(plan.dropped)
    for subset in plan.subsets:
        count = int(share_of(torch.tensor(len(subset)), ratio))
        ranked = sorted(subset, key=lambda i: (-value[i] if value[i] == value[i] else math.inf, i))
        chosen = set(ranked[:count])
        subsets.append([i for i in subset if i in chosen])
        words = f"{signal.replace('_', ' ')} %.3f, beyond the {count} highest of its subset"
        dropped += [{"sample_id": i, "reason": words % value[i]} for i in ranked[count:]]
    return plan.with_subsets(subsets, dropped)
