"""Training with the real vLLM engine, on the CPU: one engine for all steps, and the student that transformers gives.

A process of its own, for vLLM's packages: see `tests/reflection/test_vllm.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerFast

from srd_fast import SRDConfig, SRDTrainer
from srd_fast.workers import vllm

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not vllm.is_installed(), reason="vLLM is missing: see CONTRIBUTING, 'vLLM on a CPU'"),
    pytest.mark.usefixtures("quick_collection", "own_folder"),
]
ROWS, HELD_OUT = tiny.tiny_samples(8, longest=6), tiny.tiny_samples(5, seed=9, longest=9)


def trained(engine: str, tokenizer: PreTrainedTokenizerFast, adapters: bool, **options: Any) -> SRDTrainer:
    """A student trained on its own greedy answers, evaluated by others on the way."""
    args = SRDConfig(
        "out", optim="sgd", use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
        learning_rate=5.0 if adapters else 0.5, per_device_train_batch_size=4, epochs_per_stage=2,
        restart_learning_rate=False,
        lmbda=1.0, max_new_tokens=6, generation_temperature=0.0, generation_engine=engine, generation_options=options,
        eval_generate=True, eval_strategy="steps", eval_steps=2, eval_max_new_tokens=8, eval_metrics=["answers.py:odd"],
    )  # fmt: skip
    given: dict[str, Any] = {}
    if adapters:
        peft = pytest.importorskip("peft")
        places = ["q_proj", "down_proj"]
        given["peft_config"] = peft.LoraConfig(r=8, target_modules=places, init_lora_weights=False)
    size: dict[str, Any] = {"width": 64, "vocab": len(tokenizer)}
    trainer = SRDTrainer(
        tiny.tiny_model("llama", 1, **size),
        tiny.tiny_model("llama", 2, layers=3, **size),
        args,
        ROWS,
        eval_dataset=HELD_OUT,
        processing_class=tokenizer,
        **given,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("adapters", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_student_is_the_one_that_transformers_answers_for(
    adapters: bool, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Any token of any answer changes it.
    metric = "def odd(r): return [sum(map(ord, g)) % 97 / 97 for g in r.generations]\nodd.higher_is_easier = True\n"
    Path("answers.py").write_text(metric)
    torch.manual_seed(0)
    theirs = trained("transformers", tiny_tokenizer, adapters)
    starts: list[dict[str, Any]] = []
    real = vllm.VLLMProcess.send

    def watched(self: vllm.VLLMProcess, request: dict[str, Any]) -> None:
        starts.extend([request] if "model" in request else [])
        real(self, request)

    monkeypatch.setattr(vllm.VLLMProcess, "send", watched)
    torch.manual_seed(0)
    ours = trained("vllm", tiny_tokenizer, adapters, kv_cache_memory_bytes=64 << 20)
    assert len(starts) == 1
    for name in ("loss", "eval_odd", "eval_loss", "answer_tokens"):
        expected, found = ([x[name] for x in t.state.log_history if name in x] for t in (theirs, ours))
        assert found == expected
        assert len(set(expected)) > 1 or name == "answer_tokens", f"{name} says nothing"
    for name, weight in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], weight), name
    assert [x["weights_lag"] for x in ours.state.log_history if "weights_lag" in x] == 4 * [0]
