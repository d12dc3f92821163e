"""A teacher that is spread out teaches as one that is in one place: device_map, offload to the CPU or disk, quantised.

accelerate's hooks do on a CPU what they do between GPUs: weights that are elsewhere are on `meta` between two passes.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload, dispatch_model
from test_quantised import in_int8
from test_trainer import config
from torch import nn
from transformers import PreTrainedModel

from srd_fast import SRDConfig, SRDTrainer, UserError, evaluate
from srd_fast.data import DistillationCollator
from srd_fast.models import decoder_start, find_head, hidden_states, load_model, model_digest
from srd_fast.reflection import Sampling
from srd_fast.run.config import load_run_config
from srd_fast.run.steps.settings import training_config
from srd_fast.teacher import HiddenRows, LiveTeacher, RemoteTeacher, Roles, build_teacher_cache, serve_teacher
from srd_fast.teacher import live as live_teacher

SAMPLES = tiny.tiny_samples(12)
pytestmark = pytest.mark.usefixtures("own_folder")
# On a machine with GPUs these would be numbers of GPUs.
PARTLY_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
HEAD_WITH_THE_EMBEDDINGS = {**PARTLY_ON_DISK, "model.embed_tokens": "disk"}
Maker = Callable[[], PreTrainedModel]


def llama() -> PreTrainedModel:
    return tiny.tiny_model("llama_untied", seed=1, width=32)


def tied() -> PreTrainedModel:
    return tiny.tiny_model("gemma2", seed=1, width=32)


def with_adapter() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(
        llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()


def saved(model: PreTrainedModel) -> str:
    """The folder that a model was saved in, with a tokenizer."""
    folder = Path("models") / type(model).__name__
    model.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def dispatched(model: Any, device_map: dict[str, str]) -> Any:
    return dispatch_model(model, device_map, main_device="cpu", offload_dir="offloaded")


KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "offloaded to the CPU": (llama, lambda: cpu_offload(llama(), torch.device("cpu"))),
    "offloaded to disk": (llama, lambda: disk_offload(llama(), "offloaded", torch.device("cpu"))),
    "dispatched": (llama, lambda: dispatched(llama(), PARTLY_ON_DISK)),
    "by a map": (llama, lambda: load_model(saved(llama()), device_map=PARTLY_ON_DISK)),
    "by a map, tied, softcap": (tied, lambda: load_model(saved(tied()), device_map=HEAD_WITH_THE_EMBEDDINGS)),
    "automatic": (llama, lambda: load_model(saved(llama()), device_map="auto")),
    "bias": (lambda: tiny.tiny_model("phi", seed=1), lambda: cpu_offload(tiny.tiny_model("phi", seed=1))),
    "adapter": (with_adapter, lambda: cpu_offload(with_adapter(), torch.device("cpu"))),
    "quantised": (lambda: in_int8(llama()), lambda: dispatched(in_int8(llama()), PARTLY_ON_DISK)),
    "encoder and decoder": (
        lambda: encoder_decoders.tiny_model("t5", seed=1),
        lambda: cpu_offload(encoder_decoders.tiny_model("t5", seed=1), torch.device("cpu")),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_the_model_in_one_place_gives(kind: str) -> None:
    """To the bit: hidden states, head, digest, and the bytes of a cache. It stays where it is."""
    make, spread_out = KINDS[kind]
    whole, model = make(), spread_out()
    expected_digest = model_digest(whole)
    assert model_digest(model) == expected_digest
    build_teacher_cache(whole, SAMPLES, "whole", progress=False)
    build_teacher_cache(model, SAMPLES, "spread", progress=False)
    files = sorted(path.name for path in Path("whole").iterdir())
    assert [(Path("spread") / name).read_bytes() for name in files] == [(Path("whole") / n).read_bytes() for n in files]
    on_meta = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    live = LiveTeacher(model)
    batch = DistillationCollator(decoder_start=decoder_start(whole))(SAMPLES)
    with torch.no_grad():
        assert torch.equal(live.hidden_states(batch), hidden_states(whole, batch))
    rows = live.rows(batch, 2.0)
    assert isinstance(rows, HiddenRows)
    assert all(torch.equal(rows.head.tensors()[name], x) for name, x in find_head(whole).tensors().items())
    assert [name for name, p in model.named_parameters() if p.device.type == "meta"] == on_meta
    assert on_meta or kind == "automatic"
    assert model_digest(model) == expected_digest


def test_hidden_states_and_head_go_to_the_students_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model is has nothing to do with it. Without a GPU the other device is one without numbers."""
    monkeypatch.setattr(live_teacher, "check_head", lambda *_: None)  # it looks at numbers
    live = LiveTeacher(dispatched(llama(), PARTLY_ON_DISK), "meta")
    assert (live.device.type, live.entry.type) == ("meta", "cpu")
    states = live.hidden_states(tiny.collate(SAMPLES[:3]))
    assert states.device.type == live.head.tensors()["weight"].device.type == "meta"
    assert states.shape[::2] == (3, 32)


def trained(given: Any, **fields: Any) -> list[float]:
    trainer = SRDTrainer(
        tiny.tiny_model("llama", seed=3),
        given,
        config(**fields),
        SAMPLES,
        eval_dataset=SAMPLES[:4],
        processing_class=tiny.tiny_tokenizer(),
        teacher_tokenizer=tiny.tiny_tokenizer(),
    )
    trainer.train()
    return [e["divergence"] for e in trainer.state.log_history if "divergence" in e] + [trainer.evaluate()["eval_kl"]]


@pytest.mark.slow
def test_a_student_learns_the_same_beside_it() -> None:
    folder = saved(llama())
    expected, spread = trained(folder), {"teacher_device_map": PARTLY_ON_DISK}
    assert trained(folder, **spread) == expected
    assert trained(dispatched(llama(), PARTLY_ON_DISK)) == expected
    assert trained(folder, **spread, padding_free=True) == pytest.approx(expected, rel=1e-5)
    assert trained(folder, **spread, teacher_cache="cache") == pytest.approx(expected, rel=1e-5)


def test_it_is_evaluated_and_evaluates() -> None:
    options: dict[str, Any] = {
        "tokenizer": tiny.tiny_tokenizer(),
        "sampling": Sampling(max_new_tokens=3),
        "progress": False,
    }
    student = tiny.tiny_model("llama", seed=3)
    for given in ({"model": llama()}, {"model": student, "teacher": llama()}):
        spread = {**given, ("teacher" if "teacher" in given else "model"): dispatched(llama(), PARTLY_ON_DISK)}
        assert evaluate(dataset=SAMPLES[:4], **spread, **options) == evaluate(dataset=SAMPLES[:4], **given, **options)
    with pytest.raises(UserError, match=r"LlamaForCausalLM is spread out.*leave out the teacher"):
        evaluate(dispatched(llama(), PARTLY_ON_DISK), SAMPLES, teacher=student, **options)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"teacher_device_map": "gpus"}, "device_map must be one of auto.*got 'gpus'"),
        ({"teacher_device_map": {"model": 0, "lm_head": "nowhere"}}, "device_map must be.*got 'nowhere'"),
        ({"teacher_device_map": "auto", "teacher_offload": True}, "teacher_offload is true, but teacher_device_map"),
        ({"teacher_tp_plan": "colwise"}, "tp_plan must be 'auto'.*got 'colwise'"),
        ({"teacher_tp_plan": "auto", "teacher_device_map": "auto"}, "take one of them"),
    ],
)
def test_places_that_cannot_be_are_refused_first(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SRDConfig(output_dir="out", use_cpu=True, **fields)


def test_what_cannot_be_done_with_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="a teacher with a device_map cannot be moved"):
        LiveTeacher(dispatched(llama(), PARTLY_ON_DISK), offload=True)
    with pytest.raises(UserError, match=r"the teacher's head is quantised \(int8\)"):
        LiveTeacher(dispatched(in_int8(llama(), head=True), PARTLY_ON_DISK))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="there is one process; start several with torchrun"):
        load_model(saved(llama()), tp_plan="auto")


def test_in_a_runs_config_the_places_stand_at_the_top() -> None:
    given = load_run_config(None, ["teacher_device_map={model: 0, lm_head: cpu}"])
    assert training_config(given).teacher_device_map == {"model": 0, "lm_head": "cpu"}
    with pytest.raises(UserError, match="teacher_device_map is set at the top level"):
        load_run_config(None, ["distill.teacher_device_map=auto"])


# On other ranks: two threads stand for two processes


@pytest.fixture
def roles() -> tuple[Roles, Roles]:
    store = dist.HashStore()
    cpu, wait = torch.device("cpu"), timedelta(seconds=60)
    with ThreadPoolExecutor(2) as pool:
        links = list(pool.map(lambda rank: dist.ProcessGroupGloo(store, rank, 2, wait), range(2)))
    return Roles(0, 1, 1, links[0], cpu), Roles(1, 1, 1, links[1], cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_asked_for_ahead(
    dtype: torch.dtype, roles: tuple[Roles, Roles], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collator does not wait for the teacher; batches come in order, in the teacher's dtype."""
    may_run, run = threading.Event(), LiveTeacher.hidden_states

    def waiting(self: LiveTeacher, batch: Any) -> torch.Tensor:
        assert may_run.wait(60)
        return run(self, batch)

    monkeypatch.setattr(LiveTeacher, "hidden_states", waiting)
    model = llama().to(dtype)
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve_teacher, model, roles[1])
        source = RemoteTeacher(roles[0])
        coming = [source.collate_ahead(some) for some in (SAMPLES[:3], SAMPLES[3:4], SAMPLES[4:])]
        may_run.set()
        found = [source.rows({"teacher": rows.to("cpu")}, 1.0) for rows in coming]
        source.close()
        assert served.result() == 3
    for rows, some in zip(found, (SAMPLES[:3], SAMPLES[3:4], SAMPLES[4:])):
        batch = tiny.collate(some)
        expected = LiveTeacher(model).rows(batch, 1.0)
        assert isinstance(rows, HiddenRows)
        assert isinstance(expected, HiddenRows)
        assert torch.equal(rows.hidden_ND, expected.hidden_ND)
        assert rows.hidden_ND.dtype == dtype
        assert torch.equal(rows.head.tensors()["weight"], find_head(model).tensors()["weight"])


def test_a_student_is_told_why_its_teacher_is_refused(roles: tuple[Roles, Roles]) -> None:
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve_teacher, in_int8(llama(), head=True), roles[1])
        with pytest.raises(UserError, match="the teacher on rank 1: the teacher's head is quantised"):
            RemoteTeacher(roles[0])
        with pytest.raises(UserError, match="head is quantised"):
            served.result()


def test_a_student_is_told_what_its_teacher_could_not_run(roles: tuple[Roles, Roles]) -> None:
    unknown = {"input_ids": [5, tiny.VOCAB + 7], "labels": [-100, tiny.VOCAB + 7]}
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve_teacher, llama(), roles[1])
        with pytest.raises(UserError, match="the teacher on rank 1: index"):
            RemoteTeacher(roles[0]).collate([unknown])
        with pytest.raises(IndexError):
            served.result()


def test_the_wrong_side_is_told(roles: tuple[Roles, Roles]) -> None:
    with pytest.raises(UserError, match="rank 0 trains"):
        serve_teacher(nn.Linear(1, 1), roles[0])
    with pytest.raises(UserError, match="rank 1 runs the teacher"):
        RemoteTeacher(roles[1])
