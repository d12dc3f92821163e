"""A quantised teacher teaches, live and through a cache, with its head in floating point; no student is quantised."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_trainer import config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from srd_fast import SRDTrainer, UserError, evaluate
from srd_fast.models import load_model, model_digest, quantisation_of
from srd_fast.teacher import LiveTeacher, build_teacher_cache, open_teacher_cache

SAMPLES = tiny.tiny_samples(12)
pytestmark = pytest.mark.usefixtures("own_folder")


class Int8Linear(nn.Module):
    """A layer as quantisers make it: whole numbers and a factor for each row."""

    def __init__(self, full: nn.Linear) -> None:
        super().__init__()
        scale = full.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((full.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class Quantiser:
    """What `from_pretrained` leaves on a quantised model."""

    is_trainable = False


def in_int8(model: PreTrainedModel, head: bool = False) -> PreTrainedModel:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (head or "lm_head" not in name):
            model.set_submodule(name, Int8Linear(module))
    model.hf_quantizer = Quantiser()
    return model.eval()


def teacher(**options: Any) -> PreTrainedModel:
    return in_int8(tiny.tiny_model("llama_untied", seed=1, width=32), **options)


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


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_its_divergence_is_that_of_its_own_logits(kind: str, tmp_path: Path) -> None:
    quantised = teacher()
    student = tiny.tiny_model("llama", seed=3)
    expected = plain_kl(student, quantised)
    full = plain_kl(student, tiny.tiny_model("llama_untied", seed=1, width=32))
    assert abs(expected - full) > 1e-4
    fields: dict[str, Any] = {"divergence": "forward_kl", "temperature": 1.0, "per_device_train_batch_size": 12}
    if kind == "topk":
        fields |= {"teacher_cache": str(tmp_path), "teacher_cache_kind": "topk", "teacher_cache_k": 299}
    assert trained(quantised, **fields)[0] == pytest.approx(expected, rel=1e-4)


def plain_kl(student: nn.Module, model: nn.Module) -> float:
    with torch.no_grad():
        sums, count = 0.0, 0
        for s in SAMPLES:
            ids = torch.tensor([s["input_ids"]])
            rows = [i for i, label in enumerate(s["labels"][1:]) if label != -100]
            log_p, log_q = (m(ids).logits[0, rows].double().log_softmax(-1) for m in (model, student))
            sums += (log_p.exp() * (log_p - log_q)).sum().item()
            count += len(rows)
    return sums / count


def test_a_cache_keeps_its_rows_and_knows_it_again(tmp_path: Path) -> None:
    live = trained(teacher())
    assert trained(teacher(), teacher_cache=str(tmp_path)) == pytest.approx(live, rel=1e-5)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert trained(teacher(), teacher_cache=str(tmp_path)) == pytest.approx(live, rel=1e-5)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    with pytest.raises(UserError, match="teacher"):
        trained(tiny.tiny_model("llama_untied", seed=1, width=32), teacher_cache=str(tmp_path))


def test_its_digest_follows_its_numbers() -> None:
    one, same, other = teacher(), teacher(), teacher()
    other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert model_digest(one) == model_digest(same) != model_digest(other)


def test_evaluation_takes_it() -> None:
    found = evaluate(tiny.tiny_model("llama", seed=3), SAMPLES, tiny.tiny_tokenizer(), teacher=teacher())
    assert found["kl"] == pytest.approx(plain_kl(tiny.tiny_model("llama", seed=3), teacher()), rel=1e-4)


def test_what_would_not_be_its_own_head_or_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the teacher's head is quantised \(int8\).*modules_to_not_convert"):
        LiveTeacher(teacher(head=True))
    with pytest.raises(UserError, match="teacher's head is quantised"):
        build_teacher_cache(teacher(head=True), SAMPLES, tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="teacher_offload is true"):
        LiveTeacher(teacher(), offload=True)
    with pytest.raises(UserError, match="quantised and on cpu, from where it cannot be moved to meta"):
        LiveTeacher(teacher(), "meta")


# As transformers loads it


def full_model() -> PreTrainedModel:
    return tiny.tiny_model("llama_untied", seed=1, width=32, max_position_embeddings=512)


def in_torchao(target: Path, kind: str) -> None:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    from transformers import TorchAoConfig

    _by_transformers(target, TorchAoConfig(getattr(ao, kind)()))


def in_bitsandbytes(target: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    _by_transformers(target, BitsAndBytesConfig(**{f"load_in_{kind}": True}, bnb_4bit_compute_dtype=torch.float32))


def _by_transformers(target: Path, made: Any) -> None:
    full_model().save_pretrained(target / "full")
    model = AutoModelForCausalLM.from_pretrained(
        target / "full", quantization_config=made, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(target)


def in_compressed_tensors(target: Path, kind: str) -> None:
    """Whole numbers or float8 for each layer's rows; transformers does not make such files, but reads them."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is missing: pip install compressed-tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel"}
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    model, made = full_model(), QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    apply_quantization_config(model, made)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            w = module.weight.detach()
            scale, _ = calculate_qparams(w.amin(1), w.amax(1), module.quantization_scheme.weights)
            module.weight_scale.data = scale.view_as(module.weight_scale)
    packer = ModelCompressor(quantization_config=made)
    packer.compress_model(model)
    model.save_pretrained(target)
    packer.update_config(str(target))


def in_fp8(target: Path, kind: str) -> None:
    """Float8 and a factor for each block of 16 x 16, which transformers makes full again where no GPU is."""
    full_model().save_pretrained(target)
    file = target / "model.safetensors"
    weights = load_file(file)
    for name in [n for n in weights if n.endswith("_proj.weight")]:
        blocks = weights[name].unflatten(1, (-1, 16)).unflatten(0, (-1, 16))  # [rows, 16, columns, 16]
        factors = blocks.abs().amax((1, 3)) / 448
        weights[name] = (blocks / factors[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = factors
    save_file(weights, file, {"format": "pt"})
    told = json.loads((target / "config.json").read_text())
    told["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [16, 16],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    (target / "config.json").write_text(json.dumps(told))


# What makes the folder, with what, and the name that transformers has for it.
WAYS = [
    (in_torchao, "Int8WeightOnlyConfig", "torchao"),
    (in_torchao, "Float8WeightOnlyConfig", "torchao"),
    (in_bitsandbytes, "8bit", "bitsandbytes"),
    (in_bitsandbytes, "4bit", "bitsandbytes"),
    (in_compressed_tensors, "int", "compressed-tensors"),
    (in_compressed_tensors, "float", "compressed-tensors"),
    (in_fp8, "", "fp8"),
]


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("make", "kind", "name"), WAYS)
def test_every_way_that_runs_on_a_cpu(make: Callable[[Path, str], None], kind: str, name: str, tmp_path: Path) -> None:
    """Rows live and in a cache are its own logits'; a model that somebody else loaded is the same teacher."""
    source = tmp_path / "quantised"
    make(source, kind)
    assert quantisation_of(str(source)) == name
    model = load_model(str(source), quantised=True)
    cache = open_teacher_cache(tmp_path / "cache", str(source), SAMPLES, progress=False)
    found = cache.rows({"teacher": cache.collate(SAMPLES)}, 1.0)
    with torch.no_grad():
        rows = [
            model(torch.tensor([s["input_ids"]])).logits[0, [i for i, x in enumerate(s["labels"][1:]) if x != -100]]
            for s in SAMPLES
        ]
    logits_NV = torch.cat(rows)
    # LLM.int8() rounds activations too, and which of their columns it spares depends on the batch.
    most = 0.1 if kind == "8bit" else 1e-3
    assert relative(found.head.project(found.hidden_ND), logits_NV) < most
    own = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_map="cpu")
    live = LiveTeacher(own)
    ids = torch.tensor([SAMPLES[0]["input_ids"]])
    states_BLD = live.hidden_states({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert relative(live.head.project(states_BLD[0]), model(ids).logits[0]) < most
    assert relative(model(ids).logits, full_model()(ids).logits) > 1e-2, "nothing is quantised"
    assert cache.meta["teacher"] == model_digest(own) == model_digest(model)
    with pytest.raises(UserError, match=rf"is quantised \({name}\): it can teach"):
        load_model(str(source))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a model in torchao's int8, which needs no GPU."""
    in_torchao(tmp_path / "int8", "Int8WeightOnlyConfig")
    full_model().save_pretrained(tmp_path / "full")
    for name in ("full", "int8"):
        tiny.tiny_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def test_a_folder_teaches_and_is_no_student(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(folder / "int8")
    assert (quantisation_of(path), quantisation_of(str(folder / "full"))) == ("torchao", None)
    live = trained(path)
    assert "is quantised (torchao)" in caplog.text
    assert trained(path, teacher_cache=str(folder / "cache")) == pytest.approx(live, rel=1e-5)
    assert trained(path, teacher_device_map="auto") == pytest.approx(live, rel=1e-5)
    assert live != pytest.approx(trained(str(folder / "full")), rel=1e-5)
    with pytest.raises(UserError, match=r"is quantised \(torchao\): it can teach, but a student is trained"):
        load_model(path)


@pytest.mark.parametrize("student", ["full", "int8", "prune"])
def test_a_run_takes_it_as_teacher_alone(student: str, folder: Path) -> None:
    from test_cli import srd_fast

    rows = "".join(f'{{"instruction": "name {i}", "output": "red {i}"}}\n' for i in range(12))
    (folder / "rows.jsonl").write_text(rows)
    given = student if student == "prune" else folder / student
    (folder / "config.yaml").write_text(
        f"{{teacher: {folder}/int8, student: {given}, data: {folder}/rows.jsonl, validation: 4, dtype: float32, "
        f"output_dir: {folder}/run, max_prompt_length: 400, max_response_length: 16, curate: {{stages: 1}}, "
        "init_student: {layers: 1}, reflect: {engine: transformers, max_new_tokens: 3}, evaluate: {max_new_tokens: 3}, "
        "distill: {epochs_per_stage: 1, per_device_train_batch_size: 4}}"
    )
    result = srd_fast("run", folder / "config.yaml")
    if student == "full":
        assert result.status == 0, result
    else:
        assert "is quantised (torchao); it needs full weights" in result.error()
        assert not (folder / "run" / "data").exists()
