"""Who takes part in `benchmarks.train_gpu`. Another side is one `register` in a file of yours:

python -m benchmarks.train_gpu --import my_side.py --sides mine

from benchmarks.sides import Side, register

def train(setup, watch):
    from benchmarks.training import loop_steps         # imported late: listing the sides should take no seconds
    return loop_steps(setup, watch, MyLoop)            # a class as in loops.py

register(Side("mine", "my-package", train))
"""

import importlib.util
import runpy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plan

if TYPE_CHECKING:
    from .training import Setup, Trained
    from .watch import StepWatch

MICRO_TOKENS = 16384


@dataclass(frozen=True)
class Side:
    """One who trains. package: whose version its rows have. cached: whether it reads a teacher cache.

    train: calls `watch.begin` before its first step and `watch.step_done` after each. Raises NotImplementedError where
    this version of the package cannot.
    needs: why it cannot take part on a device ("cpu", "cuda"), or None.
    """

    name: str
    package: str
    train: "Callable[[Setup, StepWatch], Trained]"
    cached: bool = False
    needs: Callable[[str], str | None] = lambda device: None


SIDES: dict[str, Side] = {}


def register(side: Side) -> None:
    """Let a side take part under its name."""
    SIDES[side.name] = side


def import_files(paths: Iterable[Path]) -> None:
    """Run files that register sides."""
    for path in paths:
        runpy.run_path(str(path))


def _without(package: str, device: str, gpu: bool = False) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return "it needs a GPU" if gpu and device == "cpu" else None


def _register_ours(name: str, needs: Callable[[str], str | None] = lambda device: None, **options: Any) -> None:
    def train(s: "Setup", watch: "StepWatch") -> "Trained":
        from .training import srd_steps

        return srd_steps(s, watch, **options)

    register(Side(name, "srd-fast", train, name.startswith(plan.CACHE), needs))


def _register_loop(name: str, package: str, needs: Callable[[str], str | None] = lambda device: None) -> None:
    def train(s: "Setup", watch: "StepWatch") -> "Trained":
        from .loops import GPU_LOOPS, LOOPS
        from .training import loop_steps

        return loop_steps(s, watch, {**LOOPS, **GPU_LOOPS}[name])

    register(Side(name, package, train, needs=needs))


_TRL, _PEFT = partial(_without, "trl"), partial(_without, "peft")
_register_ours(plan.CACHE)
_register_ours(plan.CACHE_COMPILED, torch_compile=True)
_register_ours(plan.LIVE)
_register_ours(plan.LIVE_COMPILED, torch_compile=True)
_register_ours(plan.LORA, _PEFT, lora=True)
_register_ours(plan.LORA_COMPILED, _PEFT, lora=True, torch_compile=True)
_register_ours(plan.MICRO, max_tokens_per_batch=MICRO_TOKENS)
_register_loop(plan.PLAIN, "torch")
_register_loop(plan.PLAIN_COMPILED, "torch")
_register_loop(plan.GKD, "trl", _TRL)
_register_loop(plan.GKD_LIGER, "trl", lambda device: _TRL(device) or _without("liger_kernel", device, gpu=True))
_register_loop(plan.DISTILLATION, "trl", _TRL)
