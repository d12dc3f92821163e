"""Models taken apart into body and head, pruned students that live on their own, and tokenizers that must agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import ARCHITECTURES, assert_same
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from srd_fast import UserError
from srd_fast.models import (
    check_head,
    check_tokenizers,
    find_head,
    hidden_states,
    load_config,
    load_model,
    load_tokenizer,
    prune_depth,
    unwrap,
)
from srd_fast.models.layer_choice import layers_to_keep

BATCH = tiny.collate(tiny.tiny_samples(4))


def inputs() -> dict[str, Tensor]:
    return {name: BATCH[name] for name in ("input_ids", "attention_mask")}


def rebuilt_logits(model: nn.Module) -> Tensor:
    head = find_head(model)
    hidden = hidden_states(model, inputs())
    logits = head.project(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


# The head.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_head_times_hidden_states_is_the_models_own_logits(architecture: str) -> None:
    model = tiny.tiny_model(architecture)
    assert_same(rebuilt_logits(model), model(**inputs()).logits, 1e-5)
    check_head(model, "student")


@pytest.mark.parametrize(
    ("architecture", "bias", "softcap", "scale"),
    [
        ("llama", False, None, 1.0),
        ("llama_untied", False, None, 1.0),
        ("gemma2", False, 4.0, 1.0),
        ("phi", True, None, 1.0),
        ("gptj", True, None, 1.0),
        ("cohere", False, None, 0.25),
        ("granite", False, None, 1 / 3),
    ],
)
def test_what_the_head_is_made_of(architecture: str, bias: bool, softcap: float | None, scale: float) -> None:
    model = tiny.tiny_model(architecture)
    head = find_head(model)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.bias is not None) == bias
    assert head.softcap == softcap
    assert head.scale == pytest.approx(scale)


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("gpt2", True), ("llama_untied", False)])
def test_a_tied_head_is_the_embedding(architecture: str, tied: bool) -> None:
    model = tiny.tiny_model(architecture)
    assert (find_head(model).weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_head_is_checked_in_any_dtype(architecture: str, dtype: torch.dtype) -> None:
    check_head(tiny.tiny_model(architecture, width=32).to(dtype), "teacher")


@pytest.mark.parametrize("training", [True, False])
def test_checking_leaves_the_model_as_it_was(training: bool) -> None:
    model = tiny.tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5).train(training)
    check_head(model, "student")
    assert model.training == training
    assert all(p.grad is None for p in model.parameters())
    assert model.transformer.h[0].mlp.training == training


def with_changed_logits(model: PreTrainedModel, change: Any) -> PreTrainedModel:
    """A model of a class of its own whose forward changes its logits after the head."""
    own = type(model)

    class Changed(own):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
            out = super().forward(*args, **kwargs)
            out.logits = change(out.logits)
            return out

    model.__class__ = Changed
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z * 1.01,
        lambda z: z / 8,
        lambda z: 2 * torch.tanh(z / 2),
        lambda z: torch.log_softmax(z, -1),
        lambda z: z.roll(1, -1),
        lambda z: z.index_fill(-1, torch.tensor([7]), -1e4),
    ],
    ids=["scaled a little", "scaled", "capped", "normalised", "permuted", "a class ruled out"],
)
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_unknown_changes_of_the_logits_are_refused(change: Any, name: str) -> None:
    model = with_changed_logits(tiny.tiny_model("llama"), change)
    with pytest.raises(UserError) as caught:
        check_head(model, name)
    message = str(caught.value)
    assert f"{name} Changed" in message
    assert "differ from its own logits" in message
    assert "distillation_loss_from_logits" in message
    assert not model.training


def test_a_changed_scale_is_told() -> None:
    model = with_changed_logits(tiny.tiny_model("llama"), lambda z: z / 8)
    with pytest.raises(UserError, match=r"best single factor between them: 0\.125"):
        check_head(model, "teacher")


def test_a_config_that_promises_a_softcap_the_model_does_not_have_is_refused() -> None:
    model = tiny.tiny_model("llama", final_logit_softcapping=2.0)
    assert find_head(model).softcap == 2.0
    with pytest.raises(UserError, match="differ from its own logits"):
        check_head(model, "student")


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UserError, match="LlamaModel has no language-model head"):
        find_head(tiny.tiny_model("llama").model)
    with pytest.raises(UserError, match="Linear has no language-model head"):
        find_head(nn.Linear(2, 2))


def test_the_head_is_found_under_adapters() -> None:
    peft = pytest.importorskip("peft")
    plain = tiny.tiny_model("llama")
    weight = plain.get_output_embeddings().weight
    model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert unwrap(model) is plain
    assert unwrap(plain) is plain
    assert find_head(model).weight is weight
    check_head(model, "student")
    with model.disable_adapter(), torch.no_grad():
        without = hidden_states(model, inputs())
    assert (hidden_states(model, inputs()) - without).abs().max() > 1e-3  # the adapters take part


@pytest.mark.parametrize("fresh", [True, False])
def test_adapters_on_the_head_are_refused(fresh: bool) -> None:
    """The head's weight alone would leave them out; at first they add nothing, so the logits agree."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=fresh)
    model = peft.get_peft_model(tiny.tiny_model("llama_untied"), config)
    with pytest.raises(UserError, match="adapter"):
        check_head(model, "student")


@torch.no_grad()
def test_hidden_states_heed_the_mask() -> None:
    model = tiny.tiny_model("llama")
    whole = hidden_states(model, inputs())
    for row, mask in enumerate(BATCH["attention_mask"].bool()):
        alone = hidden_states(
            model, {"input_ids": BATCH["input_ids"][row, mask][None], "attention_mask": torch.ones(1, int(mask.sum()))}
        )
        assert_same(whole[row, mask], alone[0], 1e-5)


# Depth pruning.


@pytest.mark.parametrize(
    ("total", "keep", "kept"),
    [
        (30, 15, [*range(6), *range(21, 30)]),
        (30, 8, [0, 1, 2, *range(25, 30)]),
        (4, 4, [0, 1, 2, 3]),
        (4, 3, [0, 2, 3]),
        (4, 2, [0, 3]),
        (4, 1, [3]),
        (1, 1, [0]),
    ],
)
def test_first_and_last_layers_are_kept(total: int, keep: int, kept: list[int]) -> None:
    assert layers_to_keep(total, keep) == kept


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layers", [2, [1, 2, 4]])
def test_a_pruned_model_saves_reloads_and_generates(architecture: str, layers: int | list[int], tmp_path: Path) -> None:
    model = tiny.tiny_model(architecture, layers=5)
    before = {n: p.clone() for n, p in model.named_parameters()}
    kept = prune_depth(model, layers)
    assert kept == ([0, 4] if layers == 2 else [1, 2, 4])
    assert model.config.num_hidden_layers == len(kept)
    stacks = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    assert [len(s) for s in stacks] == [len(kept)]

    found = dict(model.named_parameters())
    for name, value in found.items():
        parts = [str(kept[int(x)]) if x.isdigit() else x for x in name.split(".")]
        assert torch.equal(value, before[".".join(parts)]), name

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == len(kept)
    with torch.no_grad():
        assert_same(again(**inputs()).logits, model(**inputs()).logits, 1e-6)
    check_head(again, "student")
    prompt = {name: x[2:3, :4] for name, x in inputs().items()}
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    cached = model.generate(**prompt, **options)
    assert cached.shape == (1, 9)
    assert torch.equal(cached, model.generate(**prompt, **options, use_cache=False))
    assert torch.equal(cached, again.generate(**prompt, **options))


def test_lists_in_the_config_follow_the_layers(tmp_path: Path) -> None:
    model = tiny.tiny_model("gemma2", layers=5)
    kinds = list(model.config.layer_types)
    assert len(set(kinds)) == 2
    prune_depth(model, [0, 2, 3])
    assert model.config.layer_types == [kinds[0], kinds[2], kinds[3]]
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["layer_types"] == [kinds[0], kinds[2], kinds[3]]
    assert saved["num_hidden_layers"] == 3


def test_lists_that_only_happen_to_be_as_long_stay() -> None:
    model = tiny.tiny_model("llama", layers=3, eos_token_id=[0, 5, 6])
    prune_depth(model, 2)
    assert model.config.eos_token_id == [0, 5, 6]


def test_all_layers_is_the_same_model() -> None:
    model = tiny.tiny_model("llama", layers=3)
    with torch.no_grad():
        before = model(**inputs()).logits
        assert prune_depth(model, 3) == [0, 1, 2]
        assert torch.equal(model(**inputs()).logits, before)


@pytest.mark.parametrize("layers", [0, -1, 6, [], [0, 5], [-1, 2], [1, 1]])
def test_layers_that_there_are_not_are_refused(layers: int | list[int]) -> None:
    model = tiny.tiny_model("llama", layers=5)
    with pytest.raises(UserError, match="layers must be"):
        prune_depth(model, layers)
    assert model.config.num_hidden_layers == len(model.model.layers) == 5


def test_a_model_whose_layers_cannot_be_found_is_refused() -> None:
    model = tiny.tiny_model("llama", layers=3)
    model.model.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(UserError, match=r"cannot prune LlamaForCausalLM.*one list of 3 layers.*'layers', 'more'"):
        prune_depth(model, 2)


# Tokenizers.


def rebuilt(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedTokenizerFast:
    """The same tokenizer with parts of its model replaced."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"] |= changes
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tiny.EOS, pad_token=tiny.EOS)


def test_equal_tokenizers_pass() -> None:
    check_tokenizers(tiny.tiny_tokenizer(), tiny.tiny_tokenizer())


def test_different_vocabularies_are_refused_with_an_example() -> None:
    tokenizer, other = tiny.tiny_tokenizer(), tiny.tiny_tokenizer(["zebra zebra zebra"], vocab_size=262)
    with pytest.raises(UserError) as caught:
        check_tokenizers(tokenizer, other)
    assert f"{len(tokenizer)} and {len(other)} tokens" in str(caught.value)
    more = tiny.tiny_tokenizer()
    more.add_tokens(["<extra>"])
    with pytest.raises(UserError, match="'<extra>' is None and 300"):
        check_tokenizers(tokenizer, more)


def test_the_same_tokens_in_another_order_are_refused() -> None:
    tokenizer = tiny.tiny_tokenizer()
    ids = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    swapped = {**ids, "x": ids["y"], "y": ids["x"]}
    with pytest.raises(UserError, match=f"'x' is {ids['x']} and {ids['y']}"):
        check_tokenizers(tokenizer, rebuilt(tokenizer, vocab=swapped))


@pytest.mark.parametrize("merges", [[], [["e", "l"], ["H", "e"]], [["H", "e"]]], ids=["none", "reversed", "fewer"])
def test_the_same_vocabulary_with_other_merges_is_refused(merges: list[list[str]]) -> None:
    base = tiny.tiny_tokenizer([], vocab_size=257)
    ids = json.loads(base.backend_tokenizer.to_str())["model"]["vocab"]
    vocab = {**ids, "He": 257, "el": 258}
    tokenizer = rebuilt(base, vocab=vocab, merges=[["H", "e"], ["e", "l"]])
    other = rebuilt(base, vocab=vocab, merges=merges)
    assert other.get_vocab() == tokenizer.get_vocab()
    text = "Hello, elk"
    assert other(text).input_ids != tokenizer(text).input_ids
    with pytest.raises(UserError, match="share a vocabulary but cut text differently"):
        check_tokenizers(tokenizer, other)


# Loading.


def test_a_saved_model_loads_in_eval_mode_and_dtype(tmp_path: Path) -> None:
    tiny.tiny_model("llama").save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.bfloat16)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    check_tokenizers(load_tokenizer(str(tmp_path)), tiny.tiny_tokenizer())


class _Marker:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "run"))


@pytest.mark.parametrize("evil", [False, True])
def test_pickled_weights_are_not_read(evil: bool, tmp_path: Path) -> None:
    model = tiny.tiny_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    content: Any = {"x": _Marker(tmp_path / "marker")} if evil else model.state_dict()
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights in safetensors, and pickled ones \(.bin\) are not read"):
        load_model(str(tmp_path))
    assert not (tmp_path / "marker").exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.tiny_model("llama").save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Evil: pass\n")
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    of_its_own = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    path.write_text(json.dumps({**content, "auto_map": of_its_own}))
    assert load_model(str(tmp_path)).config.model_type == "llama"  # transformers has that one itself
    path.write_text(json.dumps({**content, "auto_map": of_its_own, "model_type": "evil"}))
    for load in (load_model, load_config):
        with pytest.raises(UserError, match="needs Python code of its own, which is never run"):
            load(str(tmp_path))
    assert not (tmp_path / "marker").exists()
    assert "trust_remote_code" not in "".join(capsys.readouterr())


def test_folders_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        load_model(str(tmp_path / "absent"))
    tiny.tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tiny.tiny_model("llama").save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tiny.tiny_tokenizer().backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path))
