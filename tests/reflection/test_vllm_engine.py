"""What lies in the folders that vLLM's processes are told of, and when: without vLLM, whose pool only notes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from srd_fast import Sampling
from srd_fast.errors import UserError
from srd_fast.models import load_model
from srd_fast.reflection import vllm_engine
from srd_fast.reflection.vllm_engine import VLLMEngine

peft = pytest.importorskip("peft")
IDS = torch.arange(1, 25).view(2, 12)
GREEDY = Sampling(max_new_tokens=2)


class Noting:
    """Stands for the pool of processes. `refusals`: how often they do not start."""

    def __init__(self, options: Any, needs: Callable[[], dict[str, Any]]) -> None:
        self.options, self.needs, self.told, self.refusals = options, needs, list[Any](), 0
        self.is_running = False

    def start(self) -> None:
        if self.refusals:
            self.refusals -= 1
            raise UserError("vLLM does not start: LoRA rank 16 is greater than max_lora_rank 8.")
        if not self.is_running:
            self.told.append(self.needs()["model"])
        self.is_running = True

    def ask(self, request: dict[str, Any]) -> Any:
        return [[] for _ in request["prompts"]]

    def ask_all(self, request: dict[str, Any]) -> None:
        if self.is_running:
            self.told.append(request)

    def close(self) -> None:
        self.is_running = False


@pytest.fixture(autouse=True)
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Noting]:
    made: list[Noting] = []

    def pool(options: Any, needs: Any, *_: Any) -> Noting:
        made.append(Noting(options, needs))
        return made[-1]

    monkeypatch.setattr(vllm_engine, "vllm_pool", pool)
    monkeypatch.setattr(vllm_engine, "check_installed", lambda: None)
    return made


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapted(**config: Any) -> Any:
    given: dict[str, Any] = {"r": 16, "target_modules": ["q_proj"], "init_lora_weights": False, **config}
    return peft.get_peft_model(tiny.tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM", **given))


def trained(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    return model


def answer(engine: VLLMEngine) -> None:
    assert dict(engine.generate([[1, 2]], GREEDY)) == {0: []}


@pytest.mark.parametrize("adapter", [None, {}, {"use_dora": True}, {"enable_lora": False}])
def test_each_version_lies_in_a_folder_of_its_own_and_the_one_before_goes(
    adapter: dict[str, Any] | None,
    pools: list[Noting],
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"enable_lora": False} if adapter == {"enable_lora": False} else {}
    model: Any = tiny.tiny_model() if adapter is None else adapted(**({} if options else adapter))
    engine = VLLMEngine(model, tiny_tokenizer, **options)
    (pool,) = pools
    capsys.readouterr()
    engine.update_weights(trained(model))
    assert pool.told == [], "nothing runs yet"
    seen = []
    for _ in range(3):
        answer(engine)
        folder = Path(pool.needs()["model"])
        seen.append(folder)
        assert pool.told[-1] in (str(folder), {"weights": str(folder)})
        assert (folder / "adapter_config.json").is_file() == (adapter == {})
        tiny.assert_same(logits(load_model(str(folder))), logits(model), 1e-5, "logits")
        engine.update_weights(trained(model))
    assert len(set(seen)) == 3
    assert "Writing" not in capsys.readouterr().err, "a bar for each version"
    assert not any(folder.exists() for folder in seen)
    assert sorted(x.name for x in engine._folder.iterdir()) == (["base"] if adapter == {} else []) + ["weights-5"]
    engine.close()
    assert not engine._folder.exists()


def test_weights_are_written_in_their_own_dtype_under_autocast(
    pools: list[Noting], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = adapted(use_dora=True)
    with torch.autocast("cpu", torch.bfloat16):
        engine = VLLMEngine(model, tiny_tokenizer)
    tiny.assert_same(logits(load_model(pools[0].needs()["model"])), logits(model), 1e-5, "logits")
    engine.close()


def test_an_adapter_that_is_refused_is_merged_from_then_on(
    pools: list[Noting], tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted()
    engine = VLLMEngine(model, tiny_tokenizer)
    pools[0].refusals = 1
    answer(engine)
    assert "so it is merged: vLLM does not start: LoRA rank 16 is greater" in caplog.text
    engine.update_weights(trained(model))
    for told in (pools[0].told[1]["weights"], pools[0].needs()["model"]):
        assert not Path(told, "adapter_config.json").exists()
        tiny.assert_same(logits(load_model(told)), logits(model), 1e-5, "logits")
    engine.close()
    other = VLLMEngine(tiny.tiny_model(), tiny_tokenizer)
    pools[1].refusals = 1
    with pytest.raises(UserError, match="vLLM does not start"):
        answer(other)
    other.close()


def test_a_folder_of_the_users_stays(
    pools: list[Noting], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny.tiny_model()
    model.save_pretrained(tmp_path / "model")
    engine = VLLMEngine(str(tmp_path / "model"), tiny_tokenizer)
    answer(engine)
    engine.update_weights(model)
    engine.close()
    assert (tmp_path / "model" / "config.json").is_file()
    assert pools[0].told == [str(tmp_path / "model"), {"weights": str(engine._folder / "weights-1")}]


def test_only_one_that_may_sleep_is_told_to(
    pools: list[Noting], tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for options, told in (({}, []), ({"enable_sleep_mode": True}, [{"sleep": True}])):
        engine = VLLMEngine(tiny.tiny_model(), tiny_tokenizer, **options)
        answer(engine)
        engine.sleep()
        assert pools[-1].told[1:] == told
        engine.close()
    assert pools[-1].options["enable_sleep_mode"] is True
