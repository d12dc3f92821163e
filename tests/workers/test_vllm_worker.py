"""What vLLM's process calls of vLLM, with one that only notes it: sleep needs a GPU, and new weights have an order."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from srd_fast.errors import UserError
from srd_fast.workers.vllm import check_sleep_mode
from srd_fast.workers.vllm_worker import Engine


class Noting:
    """Stands for `vllm.LLM`, its `llm_engine` too."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.llm_engine = self
        self.reloads = True
        self.left_out: list[list[str]] = [[]]

    def collective_rpc(self, name: str, args: tuple[Any]) -> Any:
        if name == "layers_left_out":
            assert self.calls[-1][2] == args[0], "asked of another adapter"
            return self.left_out
        if not self.reloads:
            raise NotImplementedError("Model reloading with `bitsandbytes` format")
        self.calls.append((name, *args))

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(("wake_up", tags))

    def add_lora(self, adapter: Any) -> None:
        self.calls.append(("add", *adapter))

    def remove_lora(self, number: int) -> None:
        self.calls.append(("remove", number))

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def generate(self, prompts: list[Any], params: Any, use_tqdm: bool, lora_request: Any) -> list[Any]:
        self.calls.append(("generate", lora_request))
        return [SimpleNamespace(prompt_logprobs=[None])]


class LoRARequest(NamedTuple):
    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Noting:
    for name, attributes in (
        ("vllm", {"SamplingParams": dict}), ("vllm.lora", {}), ("vllm.lora.request", {"LoRARequest": LoRARequest})
    ):  # fmt: skip
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return Noting()


ASK = {"samples": [[1]]}
ANSWER = ["reset", ("generate", None)]
AWAKE = [("wake_up", ["weights"]), ("take_weights", "new"), ("wake_up", ["kv_cache"])]


def test_a_sleeping_engine_wakes_with_the_weights_of_its_folder(llm: Noting) -> None:
    engine = Engine(llm, "old")
    assert engine.answer(ASK) == [[]]
    engine.answer({"weights": "new"})
    engine.answer(ASK)
    for _ in range(2):
        engine.answer({"sleep": True})
    engine.answer(ASK)
    engine.answer(ASK)
    assert llm.calls == [*ANSWER, ("take_weights", "new"), *ANSWER, ("sleep", 2), *AWAKE, *ANSWER, *ANSWER]


def test_weights_that_come_to_a_sleeping_engine_are_loaded_once(llm: Noting) -> None:
    engine = Engine(llm, "old")
    engine.answer({"sleep": True})
    engine.answer({"weights": "new"})
    engine.answer(ASK)
    assert llm.calls == [("sleep", 2), *AWAKE, *ANSWER]


def test_under_an_adapter_the_weights_stay_and_versions_follow_each_other(llm: Noting) -> None:
    engine = Engine(llm, "a", LoRARequest("student-1", 1, "a"))
    engine.answer({"weights": "b"})
    engine.answer({"sleep": True})
    engine.answer({"weights": "c"})
    engine.answer(ASK)
    second, third = ("student-2", 2, "b"), ("student-3", 3, "c")
    assert llm.calls == [
        ("add", "student-1", 1, "a"), ("remove", 1), ("add", *second), ("sleep", 1), ("wake_up", None), ("remove", 2),
        ("add", *third), "reset", ("generate", third),
    ]  # fmt: skip


def test_an_adapter_that_is_read_in_part_is_refused(llm: Noting) -> None:
    """Of several processes each has some of the layers."""
    llm.left_out = [["layers.0", "layers.1"], ["layers.2", "layers.3"]]
    engine = Engine(llm, "a", LoRARequest("student-1", 1, "a"))
    llm.left_out[1].append("layers.1")
    with pytest.raises(ValueError, match=r"leaves 1 layers of the adapter out, layers\.1 among them"):
        engine.answer({"weights": "b"})


def test_an_engine_that_takes_no_weights_says_so(llm: Noting) -> None:
    engine, llm.reloads = Engine(llm, "old"), False
    with pytest.raises(ValueError, match=r"does not take weights while it runs: NotImplementedError: .*bitsandbytes"):
        engine.answer({"weights": "new"})


def test_sleep_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_sleep_mode({"enable_sleep_mode": False})
    with pytest.raises(UserError, match="enable_sleep_mode is true, but vLLM's engine can sleep only on a GPU"):
        check_sleep_mode({"enable_sleep_mode": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_sleep_mode({"enable_sleep_mode": True})
