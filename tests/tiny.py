"""Shared by the tests: models and a tokenizer that need no download, and the loss as a textbook writes it.

The models are a few layers of random weights, large enough that logits spread over several units: with the usual
initialisation they would all be near 0, where a forgotten bias, softcap or scale hardly shows.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

IGNORE = -100
VOCAB = 300
EOS = "<|endoftext|>"
# What each name adds to a plain head is in brackets.
ARCHITECTURES = (
    "llama",  # tied
    "llama_untied",
    "gpt2",  # learned positions, dropout
    "gemma2",  # softcap
    "phi",  # bias
    "gptj",  # bias
    "cohere",  # factor on the logits
    "granite",  # divisor of the logits
    "qwen2",
    "opt",
)
DIVERGENCES = ("forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "jsd", "tvd")
ROW_FIRST = ("csd", "csd_ts", "csd_us", "csd_uu", "adaptive_kl")

_TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nName three colours.\n\n### Response:\nRed, green and blue.",
    "The quick brown fox jumps over the lazy dog, 12345 times, while naïve cafés stay open.",
)
_CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(text: Iterable[str] = _TEXT, vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few lines; eos and pad are one token, id 0; with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _config(architecture: str, layers: int, width: int, vocab: int) -> PreTrainedConfig:
    sizes: dict[str, Any] = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    grouped = {**sizes, "num_key_value_heads": 1, "intermediate_size": 2 * width}
    of_gpt = {"vocab_size": vocab, "n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": 64}
    of_gpt |= {"bos_token_id": 0, "eos_token_id": 0}
    if architecture == "llama":
        return LlamaConfig(**grouped, tie_word_embeddings=True)
    if architecture == "llama_untied":
        return LlamaConfig(**grouped, tie_word_embeddings=False)
    if architecture == "gpt2":
        return GPT2Config(**of_gpt)
    if architecture == "gptj":
        return GPTJConfig(**of_gpt, rotary_dim=4)
    if architecture == "gemma2":
        return Gemma2Config(**grouped, head_dim=width // 2, final_logit_softcapping=4.0, sliding_window=4)
    if architecture == "phi":
        return PhiConfig(**{**grouped, "num_key_value_heads": 2})
    if architecture == "cohere":
        return CohereConfig(**grouped, logit_scale=0.25)
    if architecture == "granite":
        return GraniteConfig(**grouped, logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.7)
    if architecture == "qwen2":
        return Qwen2Config(**grouped, tie_word_embeddings=True)
    if architecture == "gemma3_vision":  # a text tower beside one for images
        text = Gemma3TextConfig(**grouped, head_dim=width // 2, sliding_window=4)
        sight = SiglipVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                   image_size=8, patch_size=4)  # fmt: skip
        return Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4, image_token_index=vocab - 1)
    if architecture == "opt":
        return OPTConfig(**sizes, ffn_dim=2 * width, word_embed_proj_dim=width)
    raise ValueError(architecture)


def tiny_model(
    architecture: str = "llama", seed: int = 0, layers: int = 2, width: int = 16, vocab: int = VOCAB, **config: Any
) -> PreTrainedModel:
    """A causal language model in float32 and eval mode; dropout is 0 unless `config` says otherwise."""
    made = _config(architecture, layers, width, vocab)
    for name in [n for n in vars(made) if n.endswith(("dropout", "_pdrop", "layerdrop"))]:
        setattr(made, name, 0.0)
    for name, value in config.items():
        setattr(made, name, value)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.3)
            else:
                parameter.add_(noise * 0.1)
        head = model.get_output_embeddings()
        if head.bias is not None:
            head.bias.copy_(torch.randn(head.bias.shape, generator=generator))
    return model.eval()


def tiny_run(teacher: Any) -> dict[str, Any]:
    """A config of a run on a few of the quickstart's rows, whose student has two of its teacher's layers."""
    return {
        "teacher": str(teacher),
        "max_rows": 16,
        "validation": 4,
        "dtype": "float32",
        "init_student": {"layers": 2, "warmup_steps": 0},
        "evaluate": {"max_new_tokens": 2},
    }


def tiny_samples(count: int, seed: int = 0, vocab: int = VOCAB, longest: int = 12) -> list[dict[str, Any]]:
    """Tokenised samples of uneven lengths; one label inside each third response has no loss."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    samples = []
    for i in range(count):
        prompt, response = number(2, 6), number(2, longest)
        ids = torch.randint(1, vocab, (prompt + response,), generator=generator).tolist()
        labels = [IGNORE] * prompt + ids[prompt:]
        if i % 3 == 2:
            labels[prompt] = IGNORE
        samples.append({"sample_id": f"s{i:02d}", "input_ids": ids, "labels": labels})
    return samples


def collate(samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad at the end by hand: input_ids with 0, attention_mask with 0, labels with -100."""
    rows = list(samples)
    length = max(len(r["input_ids"]) for r in rows)

    def padded(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([v + [filler] * (length - len(v)) for v in values])

    return {
        "input_ids": padded([list(r["input_ids"]) for r in rows], 0),
        "attention_mask": padded([[1] * len(r["input_ids"]) for r in rows], 0),
        "labels": padded([list(r["labels"]) for r in rows], IGNORE),
    }


def plain_divergence(
    name: str, teacher_logits: Tensor, student_logits: Tensor, temperature: float, skew: float, beta: float
) -> Tensor:
    """D(p, q) of each row as the papers define it, from probabilities, for autograd to differentiate."""
    log_p = torch.log_softmax(teacher_logits / temperature, -1)
    log_q = torch.log_softmax(student_logits / temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return (p * (log_p - log_q)).sum(-1)
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return (q * (log_q - log_p)).sum(-1)
    if name == "skew_forward_kl":
        return (p * (log_p - (skew * p + (1 - skew) * q).log())).sum(-1)
    if name == "skew_reverse_kl":
        return (q * (log_q - ((1 - skew) * p + skew * q).log())).sum(-1)
    if name == "jsd":
        log_m = (beta * p + (1 - beta) * q).log()
        return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
    if name == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    return plain_row_first(name, log_p, log_q)


def plain_row_first(name: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D of each row for the divergences of `ROW_FIRST`, their weights without a gradient; the head from a sort."""
    p, q, d = log_p.exp(), log_q.exp(), (log_q - log_p).clamp(-1e15, 1e15)
    if name == "adaptive_kl":
        share = plain_head_share(p, q)
        return share * (p * (log_p - log_q)).sum(-1) + (1 - share) * (q * (log_q - log_p)).sum(-1)
    u = ((log_p > -1e29) & (log_q > -1e29)).to(p.dtype)
    u = u / u.sum(-1, keepdim=True)
    w_1, w_2 = {"csd": (q, q), "csd_ts": (p, q), "csd_us": (u, q), "csd_uu": (u, u)}[name]
    w_1, w_2 = w_1.detach(), w_2.detach()
    return 0.25 * ((w_1 + w_2) * (d - (w_1 * d).sum(-1, keepdim=True)).square()).sum(-1)


def plain_head_share(p: Tensor, q: Tensor) -> Tensor:
    """Share of sum |p - q| that the likeliest classes of p have, those that add up to a half at most, or the first."""
    values, order = p.detach().sort(-1, descending=True)
    # Classes that are equally likely go together.
    last = torch.searchsorted(-values, -values, right=True) - 1
    tail = (values.cumsum(-1).gather(-1, last) > 0.5) & (values < values[..., :1])
    gap = (p - q).detach().abs().gather(-1, order)
    total = gap.sum(-1)
    return torch.where(
        total > 0, (gap * ~tail).sum(-1) / total.clamp(min=1e-300 if p.dtype == torch.float64 else 1e-37), 0.5
    )


def plain_cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """-log q(label) of each row at temperature 1."""
    return -torch.log_softmax(student_logits, -1).gather(-1, labels[..., None]).squeeze(-1)


def plain_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    divergence: str,
    temperature: float,
    sft_weight: float,
    skew: float = 0.1,
    beta: float = 0.5,
    temperature_scaling: bool = True,
    standardize_logits: bool = False,
) -> Tensor:
    """a*CE + (1-a)*T^2*D of each row [N]; D over the classes that both have."""
    common = min(student_logits.shape[-1], teacher_logits.shape[-1])
    z_T, z_S = teacher_logits[..., :common], student_logits[..., :common]
    if standardize_logits:
        z_T, z_S = ((z - z.mean(-1, keepdim=True)) / z.std(-1, correction=0, keepdim=True) for z in (z_T, z_S))
    d = plain_divergence(divergence, z_T, z_S, temperature, skew, beta)
    scale = temperature**2 if temperature_scaling else 1.0
    return sft_weight * plain_cross_entropy(student_logits, labels) + (1 - sft_weight) * scale * d


def rounding(count: int, dtype: torch.dtype = torch.float32) -> float:
    """How far apart two orders of summation may put one result, relative to its terms.

    Rounding errors fall either way, so `count` of them one after another leave each result within 6 sqrt(count) units
    of rounding, but for a chance of 3e-8 (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, with lambda = 6). Another
    processor, or another shape of the batch, is another order.

    Args:
        count: n for a sum of n terms in `dtype`; 1 for a product that sums in float32 and is rounded to `dtype` once.
    """
    return 2 * 6 * math.sqrt(count) * torch.finfo(dtype).eps / 2


def forward_rounding(model: PreTrainedModel, length: int) -> float:
    """`rounding` of the last hidden states: a sum for every parameter of the body, and two in each layer's attention.

    Norms keep the states' size, so that errors add up from layer to layer and do not grow.

    Args:
        length: tokens of the longest sample.
    """
    layers = model.config.num_hidden_layers
    sums = [p.shape[-1] for p in model.base_model.parameters()] + 2 * layers * [length]
    dtype = next(model.parameters()).dtype
    return rounding(sum(sums) if dtype == torch.float32 else len(sums), dtype)


def assert_same(actual: Tensor | None, expected: Tensor | None, tolerance: float, what: str = "tensor") -> None:
    """Equal within `tolerance` of the largest expected entry, which must not be 0: nothing passes against a zero."""
    assert actual is not None, f"{what} is None"
    assert expected is not None, f"expected {what} is None"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    largest = expected.detach().double().abs().max().item()
    assert largest > 1e-9, f"expected {what} is zero: this test could not fail"
    error = (actual.detach().double() - expected.detach().double()).abs().max().item()
    assert error <= tolerance * largest, f"{what}: differs by {error:.2e} where the largest is {largest:.2e}"
