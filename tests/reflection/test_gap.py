"""The signals that compare with the teacher: to the values of full logits, from a model, its folder or its cache."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import curate, open_teacher_cache, reflect
from srd_fast.curriculum import CURATION_PRESETS
from srd_fast.data import Tokenisation, prepare_dataset
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.errors import UserError
from srd_fast.reflection import Reflected, get_difficulty
from srd_fast.sharing import Sharing
from srd_fast.teacher import LiveTeacher

SIGNALS = ["cross_entropy", "teacher_cross_entropy", "gap"]
OPTIONS: dict[str, Any] = {
    "engine": "transformers", "max_new_tokens": 2, "batch_size": 4, "progress": False, "signals": SIGNALS,
}  # fmt: skip


def mean_loss(model: PreTrainedModel, sample: dict[str, Any], score_eos: bool = True) -> float:
    """From all logits, in the model's dtype."""
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1].log_softmax(-1)
    losses = [-log_p[i, y].item() for i, y in enumerate(sample["labels"][1:]) if y != -100]
    losses = losses if score_eos else losses[:-1]
    return sum(losses) / len(losses)


def planted(teacher: PreTrainedModel, student: PreTrainedModel, count: int = 12) -> list[dict[str, Any]]:
    """Samples whose answers the teacher makes ("t"), the student ("s"), or nobody ("n")."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(count):
        prompt = torch.randint(1, tiny.VOCAB, (3 + i % 4,), generator=generator)
        length, who = 4 + i % 3, "tsn"[i % 3]
        if who == "n":
            ids = torch.cat([prompt, torch.randint(1, tiny.VOCAB, (length,), generator=generator)])
        else:
            ids, model = prompt, teacher if who == "t" else student
            for _ in range(length):
                with torch.no_grad():
                    ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
        labels = [-100] * len(prompt) + ids[len(prompt) :].tolist()
        sample = {"sample_id": f"{who}{i:02d}", "input_ids": ids.tolist(), "labels": labels}
        samples.append({**sample, "prompt": "", "references": ["x"]})
    return samples


@pytest.mark.parametrize(
    "architecture", ["llama_untied", "gemma2", *(pytest.param(a, marks=pytest.mark.slow) for a in ("cohere", "phi"))]
)
def test_the_gap_ranks_what_the_teacher_knows_and_the_student_does_not(architecture: str) -> None:
    tokenizer = tiny.tiny_tokenizer()
    teacher, student = (tiny.tiny_model(architecture, seed=s, layers=n).double() for s, n in ((1, 3), (2, 2)))
    samples = planted(teacher, student)
    scores = reflect(student, samples, tokenizer, teacher=teacher, **OPTIONS)
    exact = 1e-6 if architecture == "gemma2" else 1e-10  # whose softmax of attention is always in float32
    for sample, row in zip(samples, scores, strict=True):
        ours, theirs = mean_loss(student, sample), mean_loss(teacher, sample)
        assert row["cross_entropy"] == pytest.approx(ours, abs=exact)
        assert row["teacher_cross_entropy"] == pytest.approx(theirs, abs=exact)
        assert row["gap"] == pytest.approx(ours - theirs, abs=exact)
    plan = curate(scores, **{**CURATION_PRESETS["learnable"], "keep": 2 / 3}, seed=1)
    assert {row["sample_id"][0] for row in plan.dropped} == {"s"}
    ranked = curate(scores, keep=1.0, signals={"gap": 1.0})
    assert [i[0] for i in ranked.kept] == ["t"] * 4 + ["n"] * 4 + ["s"] * 4


@pytest.fixture
def texts(tiny_tokenizer: PreTrainedTokenizerFast) -> Dataset:
    return prepare_dataset(make_quickstart_rows(10, seed=1), Tokenisation(tiny_tokenizer)).dataset


@pytest.mark.parametrize("score_eos", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_model_its_folder_and_its_cache_say_the_same(
    score_eos: bool,
    texts: Dataset,
    tiny_model: PreTrainedModel,
    make_tiny_model: Callable[[int], PreTrainedModel],
    tiny_teacher_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_tiny_model(4)
    expected = [mean_loss(model, sample, score_eos) for sample in texts]
    cache = open_teacher_cache(tmp_path / "cache", str(tiny_teacher_folder), texts, progress=False)
    found = {
        name: reflect(tiny_model, texts, tiny_tokenizer, teacher=given, score_eos=score_eos, **OPTIONS)
        for name, given in {"model": model, "folder": str(tiny_teacher_folder)}.items()
    }
    monkeypatch.setattr(LiveTeacher, "rows", None)  # a cache runs nobody
    found["cache"] = reflect(tiny_model, texts, tiny_tokenizer, teacher=cache, score_eos=score_eos, **OPTIONS)
    for scores in found.values():
        assert scores["teacher_cross_entropy"][:] == pytest.approx(expected, rel=1e-5)
        ours = [mean_loss(tiny_model, sample, score_eos) for sample in texts]
        assert scores["gap"][:] == pytest.approx([a - b for a, b in zip(ours, expected)], abs=1e-4)


def test_each_model_is_run_once_however_many_signals_ask(
    texts: Dataset, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[str] = []

    class Counted(LiveTeacher):
        def rows(self, batch: Any, temperature: float) -> Any:
            seen.append("rows")
            return super().rows(batch, temperature)

    reflect(tiny_model, texts, tiny_tokenizer, teacher=Counted(tiny_model), **OPTIONS)
    assert len(seen) == math.ceil(len(texts) / 4)
    gaps = reflect(tiny_model, texts, tiny_tokenizer, teacher=tiny_model, **{**OPTIONS, "signals": ["gap"]})["gap"]
    assert gaps[:] == pytest.approx([0.0] * len(texts), abs=1e-5)


class _Half(Sharing):
    """One of two processes; the first is given what the other found."""

    def __init__(self, rank: int, others: list[Any]) -> None:
        self.rank, self.world, self.others = rank, 2, others

    def gather(self, mine: Any) -> list[Any]:
        if self.rank:
            self.others.append(mine)
            return []
        return [mine, self.others.pop(0)]


def test_processes_share_the_samples(
    texts: Dataset, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    teacher = LiveTeacher(tiny.tiny_model("llama_untied", seed=9, vocab=len(tiny_tokenizer)), freeze=False)
    others: list[Any] = []

    def gap_in(*given: Any) -> list[float]:
        reflected = Reflected(texts, [], tiny_model, tiny_tokenizer, 2, progress=False, teacher=teacher, **dict(given))
        return list(get_difficulty("gap").function(reflected))

    alone = gap_in()
    assert all(map(math.isnan, gap_in(("sharing", _Half(1, others)))))
    assert [*map(len, others)] == [4, 4]
    assert gap_in(("sharing", _Half(0, others))) == alone


@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_of_models_with_an_encoder(name: str) -> None:
    tokenizer = encoder_decoders.tiny_tokenizer(name)
    student, teacher = (encoder_decoders.tiny_model(name, seed=s) for s in (0, 1))
    rows = [{"instruction": f"Say {n}", "output": f"{n} {n * n}"} for n in range(5)]
    options = {**OPTIONS, "template": "{instruction}"}
    scores = reflect(student, rows, tokenizer, teacher=teacher, **options)
    swapped = reflect(teacher, rows, tokenizer, teacher=student, **options)
    assert scores["teacher_cross_entropy"][:] == pytest.approx(swapped["cross_entropy"][:], rel=1e-5)
    assert scores["gap"][:] == pytest.approx([-x for x in swapped["gap"]], abs=1e-5)
    assert max(map(abs, scores["gap"])) > 0.01


def test_a_teacher_that_cannot_be_compared_is_refused_before_any_answer(
    texts: Dataset, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def refused(teacher: Any) -> str:
        with pytest.raises(UserError) as e:
            reflect(tiny_model, texts, tiny_tokenizer, teacher=teacher, **{**OPTIONS, "engine": "transformers"})
        return str(e.value)

    said = "signal 'teacher_cross_entropy' compares with a teacher: pass reflect(teacher=...)"
    assert said in refused(None)
    assert "the teacher has embeddings for 20 tokens" in refused(tiny.tiny_model("llama", vocab=20))
    assert "take two models of one kind" in refused(encoder_decoders.tiny_model("t5"))
    compact = open_teacher_cache(tmp_path / "c", tiny_model, texts, kind="topk", k=4, progress=False)
    assert "this source gives TopK: give a cache of kind 'hidden'" in refused(compact)
    empty = open_teacher_cache(tmp_path / "e", tiny_model, texts.select([0]), progress=False)
    assert "does not hold sample" in refused(empty)
