"""Which samples are trained on: those with the highest value under the starting student."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from ..curriculum import CurriculumPlan
from ..data import DistillationCollator, batches_by_length
from ..errors import UserError
from ..losses import Head, token_values
from ..models import call_through, decoder_start, hidden_states, through_head
from ..registry import Registry
from ..teacher import labels_with_loss, rows_with_loss
from .positions import ALL, rows_of_samples, share_of

# (student, samples, tokenizer) -> a value of each sample.
SamplePolicy = Callable[[nn.Module, Dataset, Any], Sequence[float]]


@torch.no_grad()
def sample_means(
    student: nn.Module, samples: Dataset, tokenizer: Any, signal: str, batch_size: int = 32
) -> list[float]:
    """Mean of a student's signal over the positions of each sample; NaN for a sample without any."""
    collate = DistillationCollator(decoder_start=decoder_start(student))
    found = [math.nan] * len(samples)
    was_training, device = student.training, next(student.parameters()).device

    def measure(batch: dict[str, Any]) -> Tensor:
        def of_rows(head: Head, hidden_ND: Tensor) -> Tensor:
            values = token_values(hidden_ND, head, labels_with_loss(batch))
            return values.entropy if signal == "student_entropy" else values.cross_entropy

        return through_head(student, of_rows, rows_with_loss(hidden_states(student, batch), batch))

    student.eval()
    for indices in batches_by_length([len(x) for x in samples["input_ids"]], batch_size):
        some = samples[indices]
        batch = collate([{"input_ids": x, "labels": y} for x, y in zip(some["input_ids"], some["labels"])])
        batch = {k: v.to(device) for k, v in batch.items()}
        chosen = call_through(student, student, measure, batch)
        for i, of_sample in zip(indices, chosen.split(rows_of_samples(batch).tolist())):
            found[i] = float(of_sample.mean())
    student.train(was_training)
    return found


SAMPLE_POLICIES: Registry[SamplePolicy] = Registry(
    "sample_selection",
    {f"topk_{name}": partial(sample_means, signal=name) for name in ("student_entropy", "student_cross_entropy")},
    reserved=[ALL],
)


def sample_policy_names() -> list[str]:
    """Names that `sample_selection=` takes.

    Returns:
        All names, in alphabetical order.
    """
    return SAMPLE_POLICIES.names()


def register_sample_policy(name: str, values: SamplePolicy, *, replace: bool = False) -> None:
    """Add a policy under `name`, usable at once as `SRDConfig(sample_selection=name)`.

    Args:
        name: a new name; an existing one only with `replace=True`.
        values: `values(student, samples, tokenizer)` -> one number a sample, in order. Of each stage's samples those
            with the highest stay, as many as sample_ratio says; NaN is the lowest. `student` is the starting one;
            `samples` has the columns sample_id, input_ids and labels.
        replace: whether a name that is taken is taken over.

    Raises:
        UserError: for a name that is taken, or is no text.
    """
    SAMPLE_POLICIES.register(name, values, replace=replace)


def select_samples(
    plan: CurriculumPlan, samples: Dataset, student: nn.Module, tokenizer: Any, policy: str, ratio: float
) -> CurriculumPlan:
    """The plan with ceil(ratio n) samples of each subset: those that a policy values highest.

    Args:
        student: the starting student.
        policy: from `sample_policy_names()`; "all" gives the plan back.
        ratio: in (0, 1].

    Raises:
        UserError: for an unknown policy, and for a plan or a policy that does not go with the samples.
    """
    if policy == ALL:
        return plan
    values_of = SAMPLE_POLICIES.get(policy)
    kept = set(plan.kept)
    if missing := sorted(kept.difference(samples["sample_id"])):
        raise UserError(
            f"the plan keeps {len(missing)} samples that the data does not have, the first is {missing[0]!r}: curate "
            "again with this data"
        )
    some = samples.select([i for i, sample_id in enumerate(samples["sample_id"]) if sample_id in kept])
    values = [float(v) for v in values_of(student, some, tokenizer)]
    if len(values) != len(some):
        raise UserError(f"sample_selection {policy!r} gave {len(values)} values for {len(some)} samples")
    value = dict(zip(some["sample_id"], values))
    subsets, dropped = [], list(plan.dropped)
    for subset in plan.subsets:
        count = int(share_of(torch.tensor(len(subset)), ratio))
        ranked = sorted(subset, key=lambda i: (-value[i] if value[i] == value[i] else math.inf, i))
        chosen = set(ranked[:count])
        subsets.append([i for i in subset if i in chosen])
        words = f"{policy.removeprefix('topk_').replace('_', ' ')} %.3f, beyond the {count} highest of its subset"
        dropped += [{"sample_id": i, "reason": words % value[i]} for i in ranked[count:]]
    return plan.with_subsets(subsets, dropped)
