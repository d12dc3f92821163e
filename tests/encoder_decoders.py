"""Tiny encoder-decoder models and their tokenizers, and what a textbook computes from the models' own logits."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    LEDConfig,
    LongT5Config,
    M2M100Config,
    MarianConfig,
    MBart50Tokenizer,
    MBartConfig,
    MT5Config,
    PegasusConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5GemmaConfig,
    T5GemmaModuleConfig,
    T5Tokenizer,
    UMT5Config,
)

VOCAB = 300
# What each name adds is in brackets.
NAMES = (
    "t5",  # tied head behind a factor
    "t5_untied",  # as T5 v1.1: gated, a head of its own
    "mt5",  # gated, tied, no factor
    "bart",  # bias beside the head, learned positions
    "mbart",  # the same, norms first, codes of languages
)
RELATIVES = ("umt5", "longt5", "pegasus", "led", "marian", "m2m_100", "t5gemma")


def _config(name: str, layers: tuple[int, int], width: int, vocab: int) -> PreTrainedConfig:
    encoder, decoder = layers
    of_t5: dict[str, Any] = {"vocab_size": vocab, "d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_heads": 2}
    of_t5 |= {"num_layers": encoder, "num_decoder_layers": decoder, "decoder_start_token_id": 0}
    gated = {**of_t5, "feed_forward_proj": "gated-gelu"}
    of_bart: dict[str, Any] = {"vocab_size": vocab, "d_model": width, "max_position_embeddings": 64}
    of_bart |= {"encoder_layers": encoder, "encoder_attention_heads": 2, "encoder_ffn_dim": 2 * width}
    of_bart |= {"decoder_layers": decoder, "decoder_attention_heads": 2, "decoder_ffn_dim": 2 * width}
    of_bart |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    if name == "t5":
        return T5Config(**of_t5)
    if name == "t5_untied":
        return T5Config(**gated, tie_word_embeddings=False)
    if name == "mt5":
        return MT5Config(**gated)
    if name == "umt5":
        return UMT5Config(**of_t5)
    if name == "longt5":
        return LongT5Config(**of_t5, local_radius=3)
    if name == "led":
        del of_bart["max_position_embeddings"]
        positions = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
        return LEDConfig(**of_bart, **positions, attention_window=4)
    if name == "t5gemma":
        stack: dict[str, Any] = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": 2 * width}
        stack |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 12}
        stack |= {"query_pre_attn_scalar": 8, "max_position_embeddings": 64, "final_logit_softcapping": 4.0}
        stack |= {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": 1}
        kinds = ["sliding_attention", "full_attention"] * max(layers)
        parts = [
            T5GemmaModuleConfig(**stack, num_hidden_layers=n, layer_types=kinds[:n], cross_attention_hidden_size=width)
            for n in layers
        ]
        return T5GemmaConfig(
            encoder=parts[0], decoder=parts[1], dropout_rate=0.0, vocab_size=vocab, decoder_start_token_id=2
        )
    kind: Any = {"bart": BartConfig, "mbart": MBartConfig, "pegasus": PegasusConfig, "marian": MarianConfig}
    kind["m2m_100"] = M2M100Config
    return kind[name](**of_bart)


def tiny_model(
    name: str = "t5",
    seed: int = 0,
    layers: tuple[int, int] = (2, 2),
    width: int = 16,
    vocab: int = VOCAB,
    **config: Any,
) -> PreTrainedModel:
    """An encoder-decoder model in float32 and eval mode; dropout is 0 unless `config` says otherwise.

    layers: of the encoder and of the decoder.
    """
    made = _config(name, layers, width, vocab)
    for field in [n for n in vars(made) if n in ("dropout", "dropout_rate") or n.endswith(("_dropout", "layerdrop"))]:
        setattr(made, field, 0.0)
    for field, value in config.items():
        setattr(made, field, value)
    generator = torch.Generator().manual_seed(seed)
    model: Any = AutoModelForSeq2SeqLM.from_config(made)
    if name == "t5_untied":  # transformers ties the heads of all that it makes, not those of checkpoints with two
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):  # Marian computes its positions
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.3)
            else:
                parameter.add_(noise * 0.1)
        if getattr(model, "final_logits_bias", None) is not None:
            model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape, generator=generator))
    return model.eval()


_TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nName three colours.\n\n### Input:\n### Response:\nRed, green and blue.",
    "The quick brown fox jumps over the lazy dog, 12345 times.",
)


def tiny_tokenizer(name: str = "t5", text: Iterable[str] = _TEXT) -> PreTrainedTokenizerBase:
    """What models of this family have: T5's ends texts in </s>, BART's encloses them, mBART-50's knows languages."""
    if name == "bart":
        return _enclosing(text)
    specials = ["<s>", "<pad>", "</s>", "<unk>"] if name == "mbart" else ["<pad>", "</s>", "<unk>"]
    letters = sorted(set("".join(text)) - {" ", "\n"})
    pieces = [*((s, 0.0) for s in specials), ("▁", -2.0), ("▁the", -1.0), *((c, -3.0) for c in letters)]
    pieces += [(f"▁{n}", -5.0) for n in range(100, 340 - len(pieces))]  # with codes of languages below VOCAB
    if name == "mbart":
        return MBart50Tokenizer(vocab=pieces, src_lang="en_XX", tgt_lang="ro_RO")
    return T5Tokenizer(vocab=pieces, extra_ids=60)


def _enclosing(text: Iterable[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(text, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def split(sample: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The ids of a sample's prompt and of its response."""
    ids, labels = list(sample["input_ids"]), list(sample["labels"])
    start = next(i for i, y in enumerate(labels) if y != tiny.IGNORE)
    return ids[:start], ids[start:]


def tiny_samples(count: int, seed: int = 0, longest: int = 9) -> list[dict[str, Any]]:
    """Tokenised samples of uneven lengths, with loss on every token of each response, whose last is BART's </s>.

    mBART's own loss begins the decoder with the last label, which is then the token that the decoder starts with.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        prompt, response = torch.randint(2, longest, (2,), generator=generator).tolist()
        ids = [*torch.randint(5, VOCAB, (prompt + response - 1,), generator=generator).tolist(), 2]
        samples.append({"sample_id": f"s{i:02d}", "input_ids": ids, "labels": [tiny.IGNORE] * prompt + ids[prompt:]})
    return samples


def own_logits(model: nn.Module, samples: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """The model's own logits where it has a label, from prompts and labels alone, and these labels: [N, V], [N]."""
    prompts, responses = zip(*map(split, samples))

    def padded(rows: Sequence[list[int]], filler: int) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

    labels = padded(responses, tiny.IGNORE)
    logits = model(
        input_ids=padded(prompts, 1), attention_mask=padded([[1] * len(p) for p in prompts], 0), labels=labels
    ).logits
    return logits[labels != tiny.IGNORE], labels[labels != tiny.IGNORE]


def plain_means(student: nn.Module, teacher: nn.Module, samples: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """KL(teacher, student) and cross-entropy per token, a sample at a time."""
    kl, cross_entropy, tokens = 0.0, 0.0, 0
    for sample in samples:
        with torch.no_grad():
            z_S, labels = own_logits(student, [sample])
            z_T, _ = own_logits(teacher, [sample])
        p, q = z_T.double().softmax(-1), z_S.double().softmax(-1)
        kl += (p * (p.log() - q.log())).sum().item()
        cross_entropy -= sum(math.log(row[y]) for row, y in zip(q, labels.tolist()))
        tokens += len(labels)
    return kl / tokens, cross_entropy / tokens
