"""What the dtype of the heads' products does to training: validation KL and cross-entropy, seed by seed.

    python -m benchmarks.precision --data TRAIN.jsonl --validation DEV.jsonl

SmolLM2-135M-Instruct -> 15 of its layers, forward KL, learning rate 4e-4, batches of 16, through `SRDTrainer` with
bf16=True and the teacher's hidden states in a cache. Sides: the heads' products in bfloat16, as `SRDTrainer` has them;
with unrounded logits (`logits_dtype="float32"`); and the student's products in float32, which no setting gives.

A processor without bfloat16 takes seven times as long with it as with float32. There, or with --emulate, the products
of linear layers and heads are of float32 copies of their bfloat16 factors, and rounded once: what hardware with float32
sums gives. Rows are written as they come, and what is there is not run again.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from srd_fast import SRDConfig, SRDTrainer
from srd_fast.data import Tokenisation, prepare_dataset, read_rows
from srd_fast.losses import distillation
from srd_fast.models import load_model, load_tokenizer, prune_depth
from srd_fast.run.steps.run import has_fast_bfloat16

from .command_line import command_line
from .rows import make_rows, read, set_threads, write

TEACHER = "smollm2-135m-instruct"
SIDES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "bfloat16, float32 logits": {"logits_dtype": "float32"},
    "float32": {},
}


class _Linear(torch.autograd.Function):
    """x @ w.T + b of bfloat16 factors with float32 sums, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        x, w = x.bfloat16(), w.bfloat16()
        ctx.save_for_backward(x, w)
        out = x.float() @ w.float().t()
        return (out if b is None else out + b.bfloat16().float()).bfloat16()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        g = grads[0].bfloat16().float()
        g_ND, x_ND = g.flatten(0, -2), x.float().flatten(0, -2)
        d_x = (g @ w.float()).bfloat16() if ctx.needs_input_grad[0] else None
        d_w = (g_ND.t() @ x_ND).bfloat16() if ctx.needs_input_grad[1] else None
        return d_x, d_w, g_ND.sum(0) if ctx.needs_input_grad[2] else None


def _widened(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(product)
    def call(*factors: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
        if not any(x.dtype == torch.bfloat16 for x in factors):
            return product(*factors, out=out, **options)
        found = product(*(x.float() for x in factors), **options)
        return found.bfloat16() if out is None else out.copy_(found)

    return call


def emulated() -> ExitStack:
    """Within, products of bfloat16 factors run in float32 and are rounded once."""
    stack, linear = ExitStack(), nn.functional.linear

    def of_layers(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        narrow = torch.is_autocast_enabled("cpu") or w.dtype == torch.bfloat16
        return _Linear.apply(x, w, b) if narrow else linear(x, w, b)

    stack.enter_context(mock.patch.object(nn.functional, "linear", of_layers))
    for name in ("mm", "addmm"):
        stack.enter_context(mock.patch.object(torch, name, _widened(getattr(torch, name))))
    return stack


def run(args: argparse.Namespace, side: str, seed: int, folder: Path) -> dict[str, float]:
    """Validation figures of one training."""
    tokenizer = load_tokenizer(TEACHER)
    tokenisation = Tokenisation(tokenizer, "alpaca", 512, 512)
    train, validation = (
        prepare_dataset(read_rows(path), tokenisation, path.name).dataset for path in (args.data, args.validation)
    )
    student = load_model(TEACHER, torch.float32)
    prune_depth(student, args.layers)
    config = SRDConfig(
        output_dir=str(folder / "out"),
        divergence="forward_kl",
        temperature=1.0,
        sft_weight=0.0,
        learning_rate=4e-4,
        epochs_per_stage=(args.steps + 1) * args.batch / len(train),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        bf16=True,
        use_cpu=args.device == "cpu",
        report_to=[],
        save_strategy="no",
        logging_steps=args.steps,
        teacher_cache=str(args.cache),
        seed=seed,
        **SIDES[side],
    )
    trainer = SRDTrainer(student, TEACHER, config, train, eval_dataset=validation, processing_class=tokenizer)
    found = {f"start_{k}": v for k, v in _figures(trainer).items()}
    with ExitStack() as stack:
        if side == "float32":
            stack.enter_context(mock.patch.object(distillation, "_autocast_dtype", return_value=None))
        trainer.train()
    # Measured alike, whatever it was trained in.
    return {**found, **_figures(trainer)}


def _figures(trainer: SRDTrainer) -> dict[str, float]:
    metrics = trainer.evaluate()
    return {"kl": metrics["eval_kl"], "cross_entropy": metrics["eval_cross_entropy"]}


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--emulate", action="store_true", help="also where bfloat16 is fast")
    parser.add_argument("--cache", type=Path, default=Path("runs/precision-cache"), help="kept for the next call")
    args = parser.parse_args()
    set_threads()
    emulate = args.emulate or not has_fast_bfloat16(torch.device(args.device))
    shape = f"{args.layers} layers, {args.steps} steps of {args.batch}"
    options: dict[str, Any] = {"shape": shape, "dtype": "bfloat16, emulated" if emulate else "bfloat16"}
    for seed in args.seeds:
        for side in args.sides:
            empty = make_rows("precision", {side: {"kl": 0.0}}, case=f"seed {seed}", device=args.device, **options)
            group = [r for r in read(args.results / "precision.csv") if r.group == empty[0].group]
            if any(r.provider == side for r in group):
                continue
            with tempfile.TemporaryDirectory() as folder, emulated() if emulate else ExitStack():
                figures = {side: run(args, side, seed, Path(folder))}
            print(json.dumps({"seed": seed, "side": side, **figures[side]}), flush=True)
            made = make_rows(
                "precision", figures, case=f"seed {seed}", device=args.device, packages={side: "srd-fast"}, **options
            )
            write([*group, *made], args.results)


if __name__ == "__main__":
    main()
