"""The benchmark of steps on fresh answers, on tiny models: both sides train, each on its own answers."""

import argparse
import sys
from pathlib import Path

import pytest
import tiny

pytest.importorskip("trl")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import on_policy  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_collection", "own_folder")]


def test_two_sides_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(on_policy, "load_tokenizer", lambda _: tiny.tiny_tokenizer())
    args = argparse.Namespace(dtype="float32", steps=4, batch=4, new_tokens=5, learning_rate=0.1)
    student, teacher = tiny.tiny_model("llama", 1), tiny.tiny_model("llama", 2, layers=3)
    side = "srd-fast, transformers"
    found = on_policy.run_side(args, side, student, teacher, tiny.tiny_samples(8, longest=6), tmp_path)
    assert found.keys() == {on_policy.OURS, on_policy.TRL}
    for steps in found.values():
        assert len(steps) == 4
        assert all(0 < x["generation_seconds"] < x["step_seconds"] for x in steps)
        assert all(1 <= x["answer_tokens"] <= 5 for x in steps), "no answers of the student's"
    summary = on_policy.summary([
        {"step_seconds": s, "generation_seconds": g, "answer_tokens": t, "weights_lag": lag}
        for s, g, t, lag in [(30.0, 25.0, 9, 0), (2.0, 1.0, 9, 1), (2.0, 1.0, 3, 7), (4.0, 3.0, 5, 0), (2.0, 2.0, 4, 3)]
    ])  # fmt: skip
    assert (summary["step_seconds"], summary["generation_seconds"], summary["mean_generation_seconds"]) == (2, 2, 2)
    assert (summary["answer_tokens"], summary["weights_lag"], summary["start_seconds"]) == (4, 7, 28)
