"""Flattened batches: the collator, attention within samples, and models that take them or say why not."""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from tiny import IGNORE, VOCAB, assert_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from srd_fast.data import DistillationCollator
from srd_fast.losses import distillation_loss
from srd_fast.models import enable_flattening, find_head, flattening, hidden_states, varlen

SAMPLES = [*tiny.tiny_samples(5), {"input_ids": [7], "labels": [7]}, *tiny.tiny_samples(1, seed=9)]
PADDED = DistillationCollator(0)(SAMPLES)
FLAT = DistillationCollator(0, flatten=True)(SAMPLES)
OWN = PADDED["attention_mask"].bool()
# Not in tiny.py: what each config adds to the sizes that all share.
MORE: dict[str, dict[str, Any]] = {
    "Gemma3Text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Mistral": {"sliding_window": 4},
    "Qwen3": {"head_dim": 8},
    "GPTNeoX": {},
    "Mixtral": {"num_local_experts": 4},
    "Gemma2": {"head_dim": 8, "sliding_window": 4},
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_scaling": None},
    "Mamba": {},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Bloom": {"n_head": 2, "n_layer": 2},
    "Mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2},
    "MiniMax": {},
    "Llama4Text": {"attention_chunk_size": 4, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32},
    "StableLm": {},
    "GPTNeo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
}
TAKEN = (
    "llama",
    "gpt2",
    "phi",
    "cohere",
    "granite",
    "qwen2",
    "opt",
    "Gemma3Text",
    "Mistral",
    "Qwen3",
    "Mixtral",
    "GPTNeoX",
)
REFUSED = {
    "Gemma2": "its attention",  # says the class of some versions of transformers, the forward pass of others
    "GptOss": "more than scaled_dot_product_attention",
    "Mamba": "mix tokens outside of attention",
    "Lfm2": "mix tokens outside of attention",
    "Bloom": "no position_ids",
    "Mpt": "no position_ids",
    "MiniMax": "linear_attention",
    "Llama4Text": "chunked_attention",
    "StableLm": "does not get the keywords",
    "GPTNeo": "cannot be set",
}


def make(name: str, **config: Any) -> PreTrainedModel:
    """A random model of two layers in eval mode."""
    if name not in MORE:
        return tiny.tiny_model(name, **config)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    made = getattr(transformers, f"{name}Config")(**{**sizes, **MORE[name], **config})
    model = AutoModelForCausalLM.from_config(made)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3) if parameter.dim() > 1 else parameter.add_(noise * 0.1)
    return model.eval()


def enabled(name: str, **config: Any) -> PreTrainedModel:
    model = make(name, **config)
    assert enable_flattening(model) is None
    assert model.config._attn_implementation == "srd_varlen"
    return model


def implementations(model: nn.Module) -> set[str]:
    return {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of the tokens [sum of lengths, D], and gradients of a sum over them that weights each."""
    model.zero_grad(set_to_none=True)
    hidden = hidden_states(model, batch)
    rows = hidden[batch["attention_mask"].bool()] if "attention_mask" in batch else hidden[0]
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).to(rows)
    (rows * weights).sum().backward()
    return rows.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_run(model: nn.Module, reference: nn.Module, tolerance: float) -> None:
    expected, expected_gradients = gradients(reference, PADDED)
    found, found_gradients = gradients(model, FLAT)
    assert_same(found, expected, tolerance, "hidden states")
    assert found_gradients.keys() == expected_gradients.keys()
    assert found_gradients
    largest = max(g.abs().max() for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        error = (found_gradients[name] - gradient).abs().max()
        # Gradients that are zero but for rounding (a bias of keys) are held to the largest of all.
        assert error <= tolerance * max(gradient.abs().max(), 0.01 * largest), name


# The collator


def test_a_flattened_batch_is_the_samples_in_a_row() -> None:
    samples = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8], "labels": [8]},
        {"input_ids": [9, 3, 2, 1], "labels": [9, -100, 2, -100]},
    ]
    batch = DistillationCollator(0, flatten=True)(samples)
    assert {n: x.tolist() for n, x in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 3, 2, 1]],
        "position_ids": [[0, 1, 2, 0, 0, 1, 2, 3]],
        "labels": [[-100, 6, 7, -100, -100, -100, 2, -100]],
        "cu_seq_lens": [0, 3, 4, 8],
    }
    assert batch["cu_seq_lens"].dtype == torch.int32
    assert {batch[n].dtype for n in ("input_ids", "position_ids", "labels")} == {torch.int64}


def test_both_kinds_of_batch_predict_the_same_labels() -> None:
    for labels in (PADDED["labels"], FLAT["labels"]):
        assert (labels[:, 1:] != IGNORE).sum() == sum(x != IGNORE for s in SAMPLES for x in s["labels"][1:])
    shifted = FLAT["labels"][0, 1:]
    borders = FLAT["cu_seq_lens"][1:-1].long() - 1
    assert (shifted[borders] == IGNORE).all()


# Models that take flattened batches


@pytest.mark.parametrize("name", TAKEN)
def test_flattened_is_padded(name: str) -> None:
    reference = make(name)
    model = copy.deepcopy(reference)
    assert enable_flattening(model) is None
    assert_same_run(model, reference, 1e-5)
    assert implementations(reference) == {"sdpa"}


@pytest.mark.parametrize(
    ("name", "tolerance"), [("gpt2", 1e-12), ("phi", 1e-12), ("llama", 1e-6), ("Gemma3Text", 1e-6)]
)
def test_flattened_is_padded_in_float64(name: str, tolerance: float) -> None:
    """RMS norms work in float32 whatever the model's dtype."""
    reference = make(name).double()
    model = copy.deepcopy(reference)
    assert enable_flattening(model) is None
    assert_same_run(model, reference, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_take_flattened_batches(dtype: torch.dtype) -> None:
    reference = make("llama").to(dtype)
    model = copy.deepcopy(reference)
    assert enable_flattening(model) is None
    with torch.no_grad():
        assert_same(hidden_states(model, FLAT)[0], hidden_states(reference, PADDED)[OWN], 0.03)


def test_autocast() -> None:
    model = enabled("Gemma3Text")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_same(hidden_states(model, FLAT)[0], hidden_states(model, PADDED)[OWN], 0.05)


@pytest.mark.parametrize("name", ["Gemma3Text", "Mistral"])
def test_windows_are_heeded(name: str) -> None:
    """Without them the hidden states are others, so that the tests above could fail."""
    narrow, wide = enabled(name), enabled(name, sliding_window=64)
    wide.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        difference = (hidden_states(narrow, FLAT) - hidden_states(wide, FLAT)).abs()[0]
    positions = FLAT["position_ids"][0]
    assert difference[positions < 4].max() < 1e-5
    assert difference[positions >= 4].amax(-1).min() > 1e-3


def test_samples_do_not_see_each_other() -> None:
    model = enabled("llama")
    other = {**FLAT, "input_ids": FLAT["input_ids"].clone()}
    start, end = FLAT["cu_seq_lens"][2:4].tolist()
    other["input_ids"][0, start:end] = 11
    with torch.no_grad():
        same = (hidden_states(model, FLAT) == hidden_states(model, other)).all(-1)[0]
    assert not same[start:end].any()
    assert same[:start].all()
    assert same[end:].all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "Gemma3Text"])
@pytest.mark.parametrize("samples", [SAMPLES[:1], SAMPLES[5:6], SAMPLES[5:6] * 3, SAMPLES[:1] * 4 + SAMPLES[1:2]])
@torch.no_grad()
def test_one_sample_one_token_and_equal_lengths(name: str, samples: list[dict[str, Any]]) -> None:
    model = enabled(name)
    found = hidden_states(model, DistillationCollator(0, flatten=True)(samples))[0]
    alone = [hidden_states(model, DistillationCollator(0)([s])) for s in samples]
    assert_same(found, torch.cat(alone, 1)[0], 1e-5)


def test_the_loss_is_the_same() -> None:
    """Also with a sample whose one label has loss, and one of a single token, which has none."""
    samples = [{"input_ids": [5, 6], "labels": [IGNORE, 6]}, {"input_ids": [8], "labels": [8]}, *SAMPLES[:2]]
    student, teacher = enabled("llama"), enabled("llama", seed=3)
    losses = []
    for flatten in (False, True):
        batch = DistillationCollator(0, flatten)(samples)
        out = distillation_loss(
            hidden_states(student, batch)[:, :-1],
            find_head(student).weight,
            hidden_states(teacher, batch)[:, :-1],
            find_head(teacher).weight,
            batch["labels"][:, 1:],
        )
        assert out.num_items == sum(x != IGNORE for s in samples for x in s["labels"][1:])
        losses.append(out.loss)
    assert_same(losses[1], losses[0], 1e-5)


def test_dropout_is_applied_in_training() -> None:
    model = enabled("gpt2", attn_pdrop=0.5).train()
    with torch.no_grad():
        one, two = hidden_states(model, FLAT), hidden_states(model, FLAT)
        model.eval()
        assert torch.equal(hidden_states(model, FLAT), hidden_states(model, FLAT))
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "Gemma3Text", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    reference = make(name).train()
    model = copy.deepcopy(reference)
    assert enable_flattening(model) is None
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    assert_same_run(model, reference, 1e-5)


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    reference = peft.get_peft_model(make("llama"), config)
    model = copy.deepcopy(reference)
    assert enable_flattening(model) is None
    assert implementations(model) == {"srd_varlen"}
    assert_same_run(model, reference, 1e-5)
    with torch.no_grad():
        hidden = hidden_states(model, FLAT)
        with model.disable_adapter():
            assert (hidden_states(model, FLAT) - hidden).abs().max() > 1e-3


# All else stays as it was


@pytest.mark.parametrize("name", ["llama", "gpt2", "Gemma3Text", "Mistral", "granite"])
@torch.no_grad()
def test_padded_batches_and_generation_stay_bit_for_bit(name: str) -> None:
    reference = make(name)
    model = copy.deepcopy(reference)
    assert enable_flattening(model) is None
    prompts = {n: PADDED[n] for n in ("input_ids", "attention_mask")}
    left = {n: x.flip(1) for n, x in prompts.items()}
    for batch in (prompts, left, {"input_ids": PADDED["input_ids"]}):
        assert torch.equal(model(**batch).logits, reference(**batch).logits)
    packed = {n: FLAT[n] for n in ("input_ids", "position_ids")}
    assert torch.equal(model(**packed, use_cache=False).logits, reference(**packed, use_cache=False).logits)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
        options |= {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
        assert torch.equal(model.generate(**left, **options), reference.generate(**left, **options))


def test_a_forward_with_the_keywords_alone_is_right() -> None:
    """The mask that transformers makes of position_ids is heeded where nobody said that none is needed."""
    model = enabled("Gemma3Text")
    keywords = {"position_ids": FLAT["position_ids"], "cu_seq_lens_q": FLAT["cu_seq_lens"], "use_cache": False}
    with torch.no_grad():
        found = model.base_model(FLAT["input_ids"], **keywords).last_hidden_state
        assert_same(found, hidden_states(model, FLAT), 1e-5)


def test_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of booleans is the band of a sample."""
    model, seen = enabled("Gemma3Text"), []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        seen.append((q.shape[2], None if mask is None else tuple(mask.shape[-2:])))
        return sdpa(module, q, k, v, mask, **options)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "sdpa", watched)
    monkeypatch.setitem(type(varlen.ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping, "sdpa", never)
    hidden_states(model, FLAT)
    lengths = FLAT["cu_seq_lens"].diff().tolist()
    assert seen == [*((n, (n, n) if n > 4 else None) for n in lengths), *((n, None) for n in lengths)]


def test_the_name_is_not_saved(tmp_path: Path) -> None:
    enabled("llama").save_pretrained(tmp_path)
    assert "srd_varlen" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = make("gpt2", resid_pdrop=0.5, attn_pdrop=0.5).train(training)
    model.transformer.h[0].eval()
    before = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    assert enable_flattening(model) is None
    assert enable_flattening(model) is None
    assert [m.training for m in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_model_that_is_not_trained() -> None:
    model = make("llama").requires_grad_(False)
    assert enable_flattening(model) is None
    assert not hidden_states(model, FLAT).requires_grad


def test_a_model_chosen_to_be_eager_takes_them_too() -> None:
    model = make("llama")
    model.set_attn_implementation("eager")
    assert enable_flattening(model) is None


# Models that do not


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_need_more_are_refused(name: str) -> None:
    model = make(name)
    before, batch = implementations(model), {n: PADDED[n] for n in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**batch).logits
        assert REFUSED[name] in str(enable_flattening(model))
        assert implementations(model) == before
        assert torch.equal(model(**batch).logits, expected)


def with_layer(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """The model with something done to what its first layer gives."""
    model.model.layers[0].register_forward_hook(lambda m, args, out: change(out))
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h + 0.1 * nn.functional.pad(h, (0, 0, 1, -1)),
        lambda h: h.cumsum(1),
        lambda h: h + 0.1 * torch.linspace(0, 1, h.shape[1])[:, None],
    ],
    ids=["the token before", "a recurrence", "positions of its own"],
)
def test_tokens_mixed_outside_of_attention_are_noticed(change: Callable[[Tensor], Tensor]) -> None:
    reason = enable_flattening(with_layer(make("llama"), change))
    assert reason is not None
    assert "hidden states in flattened batches come out different" in reason


def test_wrong_gradients_are_noticed() -> None:
    def leaking(h: Tensor) -> Tensor:
        before = nn.functional.pad(h, (0, 0, 1, -1))
        return h + before - before.detach()

    reason = enable_flattening(with_layer(make("llama"), leaking))
    assert reason is not None
    assert "gradients in flattened batches come out different" in reason


def test_padded_batches_that_change_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded batches are compared with what they gave before."""

    def attention(*args: Any, scaling: float, **options: Any) -> Any:
        padded = options.get("cu_seq_lens_q") is None
        return varlen.varlen_attention(*args, scaling=scaling * 1.1 if padded else scaling, **options)

    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "srd_varlen", attention)
    model = make("llama")
    assert "hidden states in padded batches come out different" in str(enable_flattening(model))
    assert implementations(model) == {"sdpa"}


def test_masks_of_its_own_are_refused() -> None:
    model = make("llama")

    def mask(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        length = args[0].shape[1]
        options["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        return args, options

    model.model.layers[1].register_forward_pre_hook(mask, with_kwargs=True)
    assert enable_flattening(model) == "it makes masks of its own"


def without_keywords(model: PreTrainedModel) -> PreTrainedModel:
    own = type(model.model)

    class Strict(own):  # type: ignore[misc, valid-type]
        def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, use_cache: Any = None):
            return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache)

    model.model.__class__ = Strict
    return model


def test_a_forward_without_keywords_is_refused() -> None:
    assert enable_flattening(without_keywords(make("llama"))) == "its forward takes no keywords for its attention"


def test_a_layer_that_asks_for_sdpa_by_name_is_refused() -> None:
    model = make("llama")

    class Asking(type(model.model.layers[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.self_attn.config._attn_implementation in ("eager", "sdpa"):
                return super().forward(*args, **kwargs)
            return args[0]

    model.model.layers[0].__class__ = Asking
    assert "by its name" in str(enable_flattening(model))


def test_other_implementations_are_refused() -> None:
    model = make("llama")
    model.set_attn_implementation("flex_attention")
    assert enable_flattening(model) == "its attention implementation is flex_attention"


# The attention function


def tensors(lengths: list[int], heads: int = 4, groups: int = 2, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, sum(lengths), width) for n in (heads, heads // groups, heads // groups)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    return q, k, v


def layer(groups: int = 2) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    return module


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scaling: float, window: int | None) -> Tensor:
    """softmax(q k' scaling) v with a whole mask: [1, L, heads, D]."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(len(sample))
    behind = at[:, None] - at
    seen = (sample[:, None] == sample) & (behind >= 0) & (behind < (window or len(at)))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scaling).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [3, 3, 3, 9], [7, 1, 4, 4, 2]])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 9, 100])
@pytest.mark.parametrize("kernel", [False, True])
def test_attention_is_softmax_within_samples(
    lengths: list[int], window: int | None, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def like_torch(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        starts_q,
        starts_k,
        max_q,
        max_k,
        dropout,
        is_causal,
        mask,
        *,
        scale,
        window_size_left,
        window_size_right,
    ):
        assert torch.equal(starts_q, starts_k)
        assert max_q == max_k == max(lengths)
        assert (dropout, mask, window_size_right) == (0, False, 0)
        assert is_causal == (window_size_left == -1)
        left = None if window_size_left == -1 else window_size_left + 1
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return plain(q, k, v, starts_q.diff().tolist(), scale, left)

    monkeypatch.setattr(varlen, "_has_kernel", lambda *a: kernel)
    monkeypatch.setattr(varlen, "_KERNEL", like_torch)
    q, k, v = tensors(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    mask = None if window is None else torch.empty(1, 1, 1, window, dtype=torch.int64)
    found, _ = varlen.varlen_attention(layer(), q, k, v, mask, scaling=0.7, cu_seq_lens_q=starts)
    expected = plain(q, k, v, lengths, 0.7, window)
    assert_same(found, expected, 1e-12)
    weights = torch.cos(torch.arange(found.numel())).view_as(found)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (found, expected))):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"softcap": 5.0}, "softcap"),
        ({"s_aux": torch.ones(4)}, "s_aux"),
        ({"position_bias": torch.ones(1)}, "position_bias"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_attention_refuses_what_it_cannot_do(options: dict[str, Any], said: str) -> None:
    q, k, v = tensors([3, 2])
    starts = torch.tensor([0, 3, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=said):
        varlen.varlen_attention(layer(), q, k, v, None, cu_seq_lens_q=starts, **options)
    bidirectional = layer()
    bidirectional.is_causal = False
    with pytest.raises(ValueError, match="not causal"):
        varlen.varlen_attention(bidirectional, q, k, v, None, cu_seq_lens_q=starts)
    with pytest.raises(ValueError, match="flattened batch"):
        varlen.varlen_attention(layer(), q, k[:, :, 1:], v[:, :, 1:], None, cu_seq_lens_q=starts)


def test_masks_beyond_windows_are_refused() -> None:
    config = make("Mistral").config
    with varlen.flattened_forward():
        assert varlen.varlen_mask(local_size=None, config=config) is None
        window = varlen.varlen_mask(local_size=4, config=config)
        assert window is not None
        assert window.shape == (1, 1, 1, 4)
        for options in ({"local_size": 3}, {"use_vmap": True}, {"allow_is_bidirectional_skip": True}):
            with pytest.raises(ValueError, match="its mask is"):
                varlen.varlen_mask(config=config, **options)
        config.attention_chunk_size = 4
        with pytest.raises(ValueError, match="no sliding window"):
            varlen.varlen_mask(local_size=4, config=config)


def test_flash_attention_gets_its_own_keywords() -> None:
    starts = FLAT["cu_seq_lens"]
    flash = varlen.varlen_keywords(starts, torch.device("cpu"), "flash_attention_2")
    assert set(flash) == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert flash["max_length_q"] == flash["max_length_k"] == OWN.sum(1).max()
    own = varlen.varlen_keywords(starts, torch.device("cpu"), "srd_varlen")
    assert own.keys() - flash.keys() == {"sample_lengths", "starts_on_host"}
    assert own["sample_lengths"] == OWN.sum(1).tolist()


def test_flash_attention_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its kernels, which hold the same contract."""
    flash = importlib.import_module("transformers.integrations.flash_attention")
    calls = []

    def stand_in(
        q: Tensor, k: Tensor, v: Tensor, mask: Any, softmax_scale: float, cu_seq_lens_q: Any = None, **options: Any
    ) -> Tensor:
        """[B, L, heads, D], as transformers' _flash_attention_forward."""
        lengths = [q.shape[1]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
        calls.append(lengths)
        assert mask is None or cu_seq_lens_q is None
        samples = [[x[i : i + 1].transpose(1, 2) for x in (q, k, v)] for i in range(len(q))]
        return torch.cat([plain(*sample, lengths, softmax_scale, None) for sample in samples])

    monkeypatch.setattr(flash, "_flash_attention_forward", stand_in)
    model = make("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    assert enable_flattening(model) is None
    assert implementations(model) == {"flash_attention_2"}
    assert calls.count([7, 1, 12]) == 2


def test_starts_of_another_dtype() -> None:
    model = enabled("llama")
    with torch.no_grad():
        expected = hidden_states(model, FLAT)
        assert torch.equal(hidden_states(model, {**FLAT, "cu_seq_lens": FLAT["cu_seq_lens"].long()}), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "Gemma3Text", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = make(name).to("cuda", dtype)
    model = copy.deepcopy(reference)
    assert enable_flattening(model) is None
    padded, flat = ({n: x.cuda() for n, x in batch.items()} for batch in (PADDED, FLAT))
    calls = []
    kernel = varlen._attend_in_kernel
    monkeypatch.setattr(varlen, "_attend_in_kernel", lambda *a: calls.append(1) or kernel(*a))
    expected, expected_gradients = gradients(reference, padded)
    found, found_gradients = gradients(model, flat)
    tolerance = 1e-2 if dtype == torch.float32 else 0.1
    assert_same(found, expected, tolerance)
    for gradient_name, gradient in expected_gradients.items():
        assert (found_gradients[gradient_name] - gradient).norm() <= tolerance * max(gradient.norm(), 1e-2), (
            gradient_name
        )
    assert bool(calls) == (dtype == torch.bfloat16 and varlen._KERNEL is not None)


def test_the_check_is_held_by_its_samples() -> None:
    """Several lengths, one of a single token, and not the longest first: each border can show a leak."""
    padded, flat = flattening.probe_batches(VOCAB, torch.device("cpu"))
    lengths = flat["cu_seq_lens"].diff().tolist()
    assert len(set(lengths)) == 3
    assert 1 in lengths
    assert torch.equal(padded["input_ids"][padded["attention_mask"].bool()], flat["input_ids"][0])


# Nothing waits for a device


class Watch(TorchDispatchMode):
    """Names of the operations that bring data from a device to the host, or are of a size that only data tells."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        if name in self.WAITING or name.startswith("unique") or ("copy" in name and len(devices) > 1):
            self.waiting.append(name)
        return out


NEVER_WAITING = ("llama", "qwen2", "gpt2", "Gemma3Text", "Mistral")


@pytest.mark.parametrize("name", NEVER_WAITING)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_flattened_step_never_waits(name: str, checkpointing: bool) -> None:
    model = enabled(name).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lengths = FLAT["cu_seq_lens"].diff().tolist()
    for sample_lengths in ({"sample_lengths": lengths}, {}):
        with Watch() as watch:
            hidden_states(model, {**FLAT, **sample_lengths}).square().mean().backward()
        assert watch.all > 100
        assert watch.waiting == []


@pytest.mark.parametrize("name", NEVER_WAITING)
def test_a_flattened_step_needs_no_value_of_the_device(name: str) -> None:
    """On a device without values, where each look at one is an error: the lengths come from the host."""
    model = enabled(name).to("meta").train()
    batch = {n: x.to("meta") for n, x in FLAT.items()}
    hidden_states(model, {**batch, "sample_lengths": FLAT["cu_seq_lens"].diff().tolist()}).square().mean().backward()
    with pytest.raises((RuntimeError, NotImplementedError)):
        hidden_states(model, batch)


def test_the_watch_sees_what_waits() -> None:
    with Watch() as watch:
        torch.ones(2).nonzero()
        torch.ones(1).item()
        torch.ones(1).to("meta")
    assert watch.waiting == ["nonzero", "_local_scalar_dense", "_to_copy"]
