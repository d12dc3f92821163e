"""Teacher and student at the sizes of published pairs, with random weights, and random samples to train them on."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from srd_fast.data import TOKENISED_FEATURES

from .plan import LENGTHS


@dataclass(frozen=True)
class Pair:
    """Configurations of a teacher and a student."""

    teacher: Any
    student: Any

    @property
    def classes(self) -> int:
        """V of the student: what both have in common. Teachers' heads are padded further."""
        return min(self.teacher.vocab_size, self.student.vocab_size)


def _config(
    kind: Callable[..., Any], V: int, D: int, F: int, layers: int, heads: int, keys: int, **options: Any
) -> Any:
    return kind(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=keys, max_position_embeddings=4096, **{"tie_word_embeddings": True, **options},
    )  # fmt: skip


_QWEN_15 = _config(Qwen2Config, 151936, 1536, 8960, 28, 12, 2)
# Sizes as in their config.json; Gemma 3 4B's is that of its text part.
PAIRS = {
    "qwen2.5-1.5b-0.5b": Pair(_QWEN_15, _config(Qwen2Config, 151936, 896, 4864, 24, 14, 2)),
    "qwen2.5-7b-1.5b": Pair(
        _config(Qwen2Config, 152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False),
        _QWEN_15,
    ),
    "gemma3-4b-1b": Pair(
        _config(Gemma3TextConfig, 262208, 2560, 10240, 34, 8, 4, head_dim=256, sliding_window=1024),
        _config(Gemma3TextConfig, 262144, 1152, 6912, 26, 4, 1, head_dim=256, sliding_window=512),
    ),
    "tiny": Pair(_config(LlamaConfig, 520, 64, 128, 2, 4, 2), _config(LlamaConfig, 512, 32, 64, 2, 4, 2)),
}


def samples(vocabulary: int, count: int) -> Dataset:
    """Random tokens of evenly spread lengths, the first quarter a prompt. More samples begin with the same ones."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        length = int(torch.randint(LENGTHS[0], LENGTHS[1] + 1, (), generator=g))
        ids, prompt = torch.randint(2, vocabulary, (length,), generator=g).tolist(), length // 4
        labels = [-100] * prompt + ids[prompt:]
        rows.append(
            {"sample_id": str(i), "prompt": "", "references": [""], "input_ids": ids, "labels": labels, "tests": []}
        )
    return Dataset.from_list(rows, features=TOKENISED_FEATURES)


def tokenizer() -> PreTrainedTokenizerFast:
    """Of no words: the trainers ask for its padding."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>", unk_token="<unk>")


def random_model(config: Any, dtype: torch.dtype, device: str) -> nn.Module:
    """Weights drawn on the device, the same for the same configuration."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def cut_head(model: Any, classes: int) -> None:
    """Leave the model's head the first classes. Losses on logits need as many of a teacher as of its student."""
    head = model.get_output_embeddings()
    weight = head.weight.detach()[:classes]
    head = nn.Linear(weight.shape[1], classes, bias=False, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    model.set_output_embeddings(head)
    model.config.vocab_size = classes
