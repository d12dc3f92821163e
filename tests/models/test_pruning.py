"""Students cut out of teachers whose layers are of several kinds: what is cut is what its folder gives back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import make_architecture
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from srd_fast import UserError
from srd_fast.models import load_model, prune_depth, save_student
from srd_fast.models.pruning import _find_layers, _layers

IDS = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(1))
# A case of what a configuration may say of its layers: an architecture, what is added, the layers kept, what it says
# of them then.
CASES: dict[str, tuple[str, dict[str, Any], list[int], dict[str, Any]]] = {
    "the first ones are dense": (
        "deepseek_v3",
        {"first_k_dense_replace": 3},
        [0, 1, 6, 7],
        {"first_k_dense_replace": 2},
    ),
    "no dense one is kept": ("glm4_moe", {}, [2, 4, 7], {"first_k_dense_replace": 0}),
    "every second one is sparse": (
        "qwen3_moe",
        {},
        [0, 3, 4, 5],
        {"decoder_sparse_step": 1, "mlp_only_layers": [0, 2]},
    ),
    "dense ones are listed": (
        "qwen2_moe",
        {"decoder_sparse_step": 1, "mlp_only_layers": [1, 6]},
        [0, 1, 5, 6],
        {"mlp_only_layers": [1, 3]},
    ),
    "numbers of sparse ones, flags and kinds": (
        "llama4_text",
        {"no_rope_layers": [1, 1, 0, 1, 1, 0, 1, 1]},
        [0, 1, 2, 6, 7],
        {"moe_layers": [1, 4], "no_rope_layers": [1, 1, 0, 1, 1]},
    ),
    "a range of sparse ones": (
        "ernie4_5_moe",
        {"moe_layer_start_index": 2, "moe_layer_end_index": 5},
        [0, 1, 4, 7],
        {"moe_layer_start_index": 2, "moe_layer_end_index": 2},
    ),
    "numbers of attention layers": ("bamba", {"attn_layer_indices": [2, 5]}, [0, 1, 5, 6], {"attn_layer_indices": [2]}),
    "a period that fits the kept ones": (
        "jamba",
        {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
        [2, 3, 6, 7],
        {"attn_layer_period": 2, "attn_layer_offset": 0},
    ),
    "a pattern that repeats": (
        "recurrent_gemma",
        {"block_types": ["recurrent", "recurrent", "attention"]},
        [1, 2, 3, 5],
        {"block_types": ["recurrent", "attention", "recurrent", "attention"]},
    ),
    "a list of kinds": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 4]]},
        [0, 2, 3, 5],
        {"attention_layers": ["global", "global", "local", "local"]},
    ),
    "shared keys and a table of inputs for each layer": (
        "gemma3n_text",
        {"activation_sparsity_pattern": [0.0] * 7 + [0.5]},
        [1, 4, 5, 6, 7],
        {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0, 0.5]},
    ),
    "settings for single layers": (
        "gemma4_text",
        {"global_head_dim": 16},
        [0, 4, 5, 6, 7],
        {"num_kv_shared_layers": 2},
    ),
    "a tower that sees": ("gemma3", {}, [0, 5, 7], {}),
    "two attentions in each": ("longcat_flash", {"num_layers": 6}, [0, 4, 5], {"num_layers": 3}),
}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


def without_layers(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """The whole model, in which the layers that are not kept give back what they get."""

    def skip(module: Any, args: Any, options: dict[str, Any], out: Any) -> Any:
        hidden = args[0] if args else options["hidden_states"]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    for i, layer in enumerate(_layers(model, _find_layers(model))):
        if i not in kept:
            layer.register_forward_hook(skip, with_kwargs=True)
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_pruned_model_is_the_teacher_without_those_layers(case: str, tmp_path: Path) -> None:
    name, more, kept, said = CASES[case]
    teacher = make_architecture(name, layers=8, **more)
    student = copy.deepcopy(teacher)
    assert prune_depth(student, kept) == kept
    expected = logits(without_layers(teacher, kept))
    assert expected.std() > 0.1
    assert torch.equal(logits(student), expected)
    config = student.config.get_text_config()
    assert {n: getattr(config, n) for n in said} == said

    save_student(student, tiny.tiny_tokenizer(), tmp_path)
    assert torch.equal(logits(load_model(str(tmp_path))), expected)


@pytest.mark.parametrize(
    ("name", "layers", "reason", "way_out"),
    [
        ("diffllama", 4, "layer 5 self_attn has lambda_init 0.66", "layers [0, 1, 2, 3] would do"),
        ("gemma4_text", 4, "layer 0 self_attn has store_full_length_kv False", "layers [4, 5, 6, 7] would do"),
        ("zamba2", [0, 1], "adapter_list.1 would be there in only one of", "layers [1, 3] would do"),
        ("modernbert_decoder", [2, 4], "layer 2 attn_norm is LayerNorm in the teacher and would be Identity", "[0, 7]"),
        ("gpt2", [1, 2], "layer 1 attn has scaling", "layers [0, 1] would do"),
    ],
)
def test_layers_that_no_configuration_describes_are_refused(
    name: str, layers: int | list[int], reason: str, way_out: str
) -> None:
    more = {"scale_attn_by_inverse_layer_idx": True} if name == "gpt2" else {}
    model = make_architecture(name, layers=4 if name == "zamba2" else 8, **more)
    before = logits(model)
    with pytest.raises(UserError) as caught:
        prune_depth(model, layers)
    assert reason in str(caught.value)
    assert way_out in str(caught.value)
    assert torch.equal(logits(model), before)  # as it was


def test_the_way_out_of_a_refusal_works() -> None:
    model = make_architecture("zamba2", layers=4)
    with pytest.raises(UserError, match=r"layers \[1, 2, 3\] would do"):
        prune_depth(model, 3)
    expected = logits(without_layers(copy.deepcopy(model), [1, 2, 3]))
    assert prune_depth(model, [1, 2, 3]) == [1, 2, 3]
    assert torch.equal(logits(model), expected)


def test_gradients_modes_and_generation_settings_stay() -> None:
    model = make_architecture("gemma2", layers=4).train().requires_grad_(False)
    model.generation_config.max_new_tokens = 7
    embedding = model.get_input_embeddings().weight
    prune_depth(model, [0, 2])
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.generation_config.max_new_tokens == 7
    assert model.get_input_embeddings().weight is embedding


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_a_folder_whose_weights_do_not_match_is_refused(damage: str, tmp_path: Path) -> None:
    model = tiny.tiny_model("llama", layers=3)
    model.save_pretrained(tmp_path)
    model.config.num_hidden_layers = 4 if damage == "missing" else 2
    model.config.save_pretrained(tmp_path)
    layer = 3 if damage == "missing" else 2
    with pytest.raises(UserError, match=rf"{damage} weights \(model\.layers\.{layer}\..* and 6 more\)"):
        load_model(str(tmp_path))


def test_heads_that_are_missing_are_refused(tmp_path: Path) -> None:
    """A body alone, saved where a language model is looked for."""
    tiny.tiny_model("llama_untied").base_model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"missing weights \(lm_head\.weight\)"):
        load_model(str(tmp_path))


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(str(tmp_path))), logits(model))


@pytest.mark.parametrize("change", ["a value", "a flag"])
def test_a_folder_that_gives_another_student_is_noticed(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.tiny_model("granite")
    save = type(model).save_pretrained

    def spoilt(self: Any, folder: Any, **options: Any) -> None:
        other = copy.deepcopy(self)
        if change == "a flag":
            other.config.residual_multiplier = 0.9
        else:
            other.model.norm.weight.data[3] += 1
        save(other, folder, **options)

    monkeypatch.setattr(type(model), "save_pretrained", spoilt)
    said = "model.norm.weight has other values" if change == "a value" else "their logits differ by"
    with pytest.raises(UserError, match=said):
        save_student(model, tiny.tiny_tokenizer(), tmp_path)


def test_without_memory_for_a_copy_names_and_shapes_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "srd_fast.models.saved_student.psutil.virtual_memory", lambda: type("", (), {"available": 1000})()
    )
    model = tiny.tiny_model("llama", layers=3)
    save_student(model, tiny.tiny_tokenizer(), tmp_path)
    tiny.tiny_model("llama", layers=3, width=32).save_pretrained(tmp_path)
    from srd_fast.models import check_saved

    with pytest.raises(UserError, match=r"torch\.float32 \(300, 16\) and torch\.float32 \(300, 32\)"):
        check_saved(model, tmp_path)


def test_a_student_trained_in_bfloat16_is_saved_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate runs a trained model in bfloat16: what is compared is the model, not how it was trained."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    for state in (AcceleratorState, PartialState):  # a process has one of each; a trainer before may have left its own
        monkeypatch.setattr(state, "_shared_state", {})

    torch.manual_seed(0)
    model = tiny.tiny_model("llama", layers=3, width=64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that rounding shows
    ids = torch.arange(12).view(2, 6)
    exact = model(input_ids=ids).logits
    wrapped = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert (wrapped(input_ids=ids).logits - exact).abs().max() > 1e-3 * exact.abs().max()
    save_student(wrapped, tiny.tiny_tokenizer(), tmp_path)
    assert torch.equal(load_model(str(tmp_path), torch.float32)(input_ids=ids).logits, exact)
    assert "forward" in vars(wrapped)


def test_a_whole_vision_checkpoint_is_loaded_and_saved(tmp_path: Path) -> None:
    """Qwen's classes of text alone would leave its tower out."""
    model = make_architecture("qwen2_5_vl")
    model.save_pretrained(tmp_path / "whole")
    loaded = load_model(str(tmp_path / "whole"))
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    prune_depth(loaded, 2)
    save_student(loaded, tiny.tiny_tokenizer(), tmp_path / "pruned")
    assert torch.equal(logits(load_model(str(tmp_path / "pruned"))), logits(loaded))
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
