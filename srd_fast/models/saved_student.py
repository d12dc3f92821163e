"""Save a student, and check that loading its folder gives the same student."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from .adapters import merge_adapters, probe_logits
from .flattening import TOLERANCE, row_error
from .loading import load_model


def save_student(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a student with its tokenizer, adapters merged, then load it and compare.

    Args:
        model: a causal language model, or a PEFT model, which must not be used afterwards.
        tokenizer: the student's tokenizer.
        folder: where it goes.

    Raises:
        UserError: the adapters cannot be merged, or the loaded model differs.
    """
    student = merge_adapters(model)
    student.config.use_cache = True
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_saved(student, folder)


def check_saved(model: PreTrainedModel, folder: Path) -> None:
    """Load a saved model again and compare: tensors bit for bit, and logits of a few tokens.

    If there is no memory for a second copy, only names, shapes and dtypes are compared, from the headers of the files.

    Args:
        model: the model in memory.
        folder: where it was saved.

    Raises:
        UserError: the two differ.
    """
    state = model.state_dict()
    size = sum(x.numel() * x.element_size() for x in {x.data_ptr(): x for x in state.values()}.values())
    whole = psutil.virtual_memory().available > 1.5 * size
    again = load_model(str(folder), model.dtype, "cpu" if whole else "meta")
    found = again.state_dict()
    if differing := state.keys() ^ found.keys():
        raise _another(folder, f"{min(differing)} is in one of them only")
    for name, x in state.items():
        y = found[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            raise _another(folder, f"{name} is {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}")
        if whole and not torch.equal(x.cpu(), y):
            raise _another(folder, f"{name} has other values")
    if not whole:
        return
    with _forward_of_its_class(model):
        expected = probe_logits(model).cpu()
    difference = row_error(probe_logits(again).flatten(0, -2), expected.flatten(0, -2))
    # On a GPU float32 may be TF32, with the mantissa of float16.
    rounding = torch.float16 if model.device.type == "cuda" and model.dtype == torch.float32 else model.dtype
    if not difference <= TOLERANCE[rounding][0]:
        raise _another(folder, f"their logits differ by {difference:.1e}")


@contextmanager
def _forward_of_its_class(model: nn.Module) -> Iterator[None]:
    """Use the class's forward, not one set on the model itself: accelerate's would still run in bfloat16."""
    own = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if own is not None:
            vars(model)["forward"] = own


def _another(folder: Path, what: Any) -> UserError:
    return UserError(
        f"the student saved in {str(folder)!r} is not the one in memory: {what}; please report it, with the versions "
        "of transformers and srd-fast"
    )
