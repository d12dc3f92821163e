"""Heads with a scale or a softcap of their own, and models that see later tokens: known from a few tokens' numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers
from tiny import assert_same
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import Sampling, UserError, build_teacher_cache, evaluate, reflect
from srd_fast.data import Tokenisation, prepare_dataset
from srd_fast.models import check_head, find_head, hidden_states

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 0}
SIZES |= {"pad_token_id": 0, "max_position_embeddings": 512}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
GRIFFIN = {"lru_width": 16, "attention_window_size": 4, "block_types": ["recurrent", "attention"]}
XLSTM = {"vocab_size": 300, "hidden_size": 32, "embedding_dim": 32, "num_hidden_layers": 2, "num_blocks": 2}
XLSTM |= {"num_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
BART = {"vocab_size": 300, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "decoder_attention_heads": 2}
BART |= {"encoder_attention_heads": 2, "decoder_ffn_dim": 32, "encoder_ffn_dim": 32, "pad_token_id": 0}


def made(name: str, options: dict[str, Any], model_class: Any = AutoModelForCausalLM, spread: float = 0.3) -> Any:
    """A tiny model of an architecture, with logits that spread over several units."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}Config")(**options)
    make = model_class.from_config if model_class is AutoModelForCausalLM else model_class
    model = make(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


CHANGED_LOGITS = [
    ("FalconH1", {**SIZES, **MAMBA, "mamba_chunk_size": 8, "lm_head_multiplier": 0.5}, 0.5, None),
    ("RecurrentGemma", {**SIZES, **GRIFFIN, "logits_soft_cap": 2.0}, 1.0, 2.0),
    ("xLSTM", {**XLSTM, "output_logit_soft_cap": 2.0}, 1.0, 2.0),
    ("HyperCLOVAX", {**SIZES, "logits_scaling": 3.0}, 3.0, None),  # a factor, where Granite's is a divisor
    ("GraniteMoe", {**SIZES, "logits_scaling": 4.0, "num_local_experts": 2}, 0.25, None),
    ("NanoChat", {**SIZES, "final_logit_softcapping": 2.0}, 1.0, 2.0),
]


@pytest.mark.parametrize(("name", "options", "scale", "softcap"), CHANGED_LOGITS, ids=[c[0] for c in CHANGED_LOGITS])
@torch.no_grad()
def test_scales_and_softcaps_of_logits_are_known(
    name: str, options: dict[str, Any], scale: float, softcap: float | None
) -> None:
    model = made(name, options)
    head = find_head(model)
    assert (head.scale, head.softcap) == (scale, softcap)
    check_head(model, "student")
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    own = model(**batch, use_cache=False).logits
    logits = head.project(hidden_states(model, batch)[0])
    if softcap is not None:
        assert (logits - own[0]).abs().max() > 0.01
        logits = softcap * torch.tanh(logits / softcap)
    assert_same(logits, own[0], 1e-4)


def test_a_scale_that_is_no_number_is_left_to_the_numbers() -> None:
    options = {"vocab_size": 300, "d_model": 16, "n_heads": 2, "n_layers": 1, "logit_scale": "inv_sqrt_d_model"}
    model = made("Mpt", options)
    assert find_head(model).scale == 1.0
    check_head(model, "teacher")


@pytest.mark.parametrize("name", ["FalconH1", "RecurrentGemma"])
def test_they_are_scored_as_their_own_logits_say(name: str) -> None:
    """Cross-entropy from reflecting and evaluating, and the KL, against loops over full logits."""
    case = next(c for c in CHANGED_LOGITS if c[0] == name)
    student, teacher, tokenizer = made(name, case[1]), made(name, case[1], spread=0.2), tiny.tiny_tokenizer()
    rows = [{"instruction": f"name {i}", "output": "red and blue" * (1 + i)} for i in range(3)]
    samples = prepare_dataset(rows, Tokenisation(tokenizer, "{instruction}")).dataset
    losses, divergences = [], []
    for sample in samples:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"][1:])
        kept = labels != tiny.IGNORE
        with torch.no_grad():
            log_q, log_p = (torch.log_softmax(m(ids).logits[0, :-1][kept].double(), -1) for m in (student, teacher))
        losses.append(-log_q.gather(1, labels[kept, None]).squeeze(1))
        divergences.append((log_p.exp() * (log_p - log_q)).sum(1))
    options: dict[str, Any] = {"template": "{instruction}", "sampling": Sampling(max_new_tokens=2), "progress": False}
    scores = reflect(student, rows, tokenizer, engine="transformers", **options)
    assert list(scores["cross_entropy"]) == pytest.approx([x.mean().item() for x in losses], rel=1e-4)
    found = evaluate(student, rows, tokenizer, teacher=teacher, **options)
    assert found["cross_entropy"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert found["kl"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
    assert found["kl"] > 0.01


# Causality


def bert(**options: Any) -> PreTrainedModel:
    return made("Bert", {**SIZES, **options})


class LooksAhead(transformers.LlamaModel):
    """Each hidden state has a little of the next one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + 0.01 * out.last_hidden_state.roll(-1, 1)
        return out


def looking_ahead() -> PreTrainedModel:
    model = tiny.tiny_model("llama")
    model.model.__class__ = LooksAhead
    return model


SEE_LATER_TOKENS: dict[str, Callable[[], Any]] = {
    "BERT": bert,
    "BERT as it is initialised": lambda: made("Bert", SIZES, spread=0.02),
    "XLNet": lambda: made("XLNet", {"vocab_size": 300, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}),
    "one token ahead": looking_ahead,
}


@pytest.mark.parametrize("kind", SEE_LATER_TOKENS)
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_models_that_see_later_tokens_are_refused(kind: str, name: str) -> None:
    model = SEE_LATER_TOKENS[kind]().train()
    with pytest.raises(UserError, match=rf"{name} \w+ is not causal: the hidden states of earlier tokens change"):
        check_head(model, name)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_of_such_families_pass(dtype: torch.dtype) -> None:
    check_head(made("Bart", BART).to(dtype), "student")  # BartForCausalLM
    check_head(made("Mixtral", {**SIZES, "num_local_experts": 4}).to(dtype), "student")


def test_a_decoder_whose_head_is_more_than_a_product_is_refused_by_its_logits() -> None:
    with pytest.raises(UserError, match=r"BertLMHeadModel: its hidden states times its head differ .*logits_soft_cap"):
        check_head(bert(is_decoder=True), "student")


def test_a_model_that_wants_more_than_tokens_is_refused() -> None:
    model = tiny.tiny_model("llama")

    def with_picture(*, picture: Any, **_: Any) -> None:
        raise AssertionError(picture)

    model.model.forward = with_picture
    with pytest.raises(UserError, match=r"LlamaForCausalLM: cannot rebuild its logits .*'picture'"):
        check_head(model, "teacher")


# At the first touch


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [{"instruction": "name", "output": "red"}, {"instruction": "say", "output": "blue"}]


@pytest.fixture
def strange() -> nn.Module:
    """A model whose logits are not its head's."""
    model = tiny.tiny_model("llama", max_position_embeddings=512)
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * own(x)
    return model


@pytest.mark.parametrize("make", [bert, None], ids=["not causal", "another head"])
def test_nothing_is_computed_with_a_model_that_is_not_understood(
    make: Callable[[], Any] | None,
    strange: Any,
    rows: list[dict[str, Any]],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = strange if make is None else make()
    sound = tiny.tiny_model("llama", seed=1, max_position_embeddings=512)
    for one in (model, sound):
        monkeypatch.setattr(one, "generate", lambda **_: pytest.fail("an answer is generated"))
    said = "its head differ" if make is None else "is not causal"
    with pytest.raises(UserError, match=f"student .*{said}"):
        reflect(model, rows, tiny_tokenizer, engine="transformers", progress=False)
    with pytest.raises(UserError, match=f"model .*{said}"):
        evaluate(model, rows, tiny_tokenizer, progress=False)
    with pytest.raises(UserError, match=f"teacher .*{said}"):
        evaluate(sound, rows, tiny_tokenizer, teacher=model, progress=False)
    samples = prepare_dataset(rows, Tokenisation(tiny_tokenizer)).dataset
    with pytest.raises(UserError, match=f"teacher .*{said}"):
        build_teacher_cache(model, samples, tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()


def test_the_change_of_a_state_is_measured_beside_its_size() -> None:
    from srd_fast.models.heads import _change

    one = torch.ones(3, 8)
    one[:, 0] = 1e4  # as some models have it; a change of the others must show all the same
    other = one.clone()
    assert _change(one, other) == 0
    other[1] *= 1.5
    assert _change(one, other) == pytest.approx(0.5)
    small: Tensor = one.clone()
    small[2, 1:] += 500
    assert _change(one, small) > 0.3
