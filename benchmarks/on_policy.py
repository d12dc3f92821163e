"""Steps on fresh answers of the student, SmolLM2-135M-Instruct -> 15 layers, beside TRL's GKDTrainer.

    python -m benchmarks.on_policy --data TRAIN.jsonl                       # 16 steps a side, float32
    python -m benchmarks.on_policy --data TRAIN.jsonl --dtype bfloat16
    python -m benchmarks.on_policy --steps 3 --batch 4 --new-tokens 16      # to try it out, on the quickstart's rows

Every step (`lmbda` 1) samples an answer to each prompt at temperature 1 and trains on them: JSD with beta 0.5, a live
teacher. Ours runs through `SRDTrainer` with the engine transformers, and with vLLM's where it is installed, whose
weights are the student's of this step (`sync_every` 1) or of one of the last eight. TRL's generates with transformers.
Each of our sides takes turns with TRL's, a step each, from the same start and with the same prompts in the same order,
so that a machine's changing speed meets both; answers are drawn by each side, so their lengths differ. Printed are
medians of a step and of its generation (and the mean, as not every step hands weights over), beside TRL's step. The
first two steps, in which vLLM starts, count as the start.
"""

import argparse
import copy
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from srd_fast import SRDConfig, SRDTrainer
from srd_fast.models import load_model, load_tokenizer, prune_depth
from srd_fast.workers.vllm import is_installed, vllm_version

from .command_line import command_line
from .loops import GKDOnPolicy
from .rows import make_rows, set_threads, spread, write
from .train import MODEL, OURS, read_samples

TRL = "trl GKDTrainer"
SIDES: dict[str, dict[str, Any]] = {
    f"{OURS}, transformers": {"generation_engine": "transformers"},
    f"{OURS}, vllm": {"generation_engine": "vllm", "sync_every": 1},
    f"{OURS}, vllm, sync_every 8": {"generation_engine": "vllm", "sync_every": 8},
}
# Steps that are not timed.
STARTS = 2


class InTurn(TrainerCallback):
    """After every step of the trainer, one of TRL's on the same prompts."""

    def __init__(self, loop: GKDOnPolicy, batch: int) -> None:
        self.loop, self.batch = loop, batch
        self.order = loop.trainer.curriculum.indices()
        self.figures: dict[str, list[dict[str, float]]] = {OURS: [], TRL: []}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock of the first step."""
        self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The trainer logs within its step: its seconds count up to here."""
        if "loss" not in (logs or {}):
            return
        seconds, rows = time.perf_counter() - self._began, self.loop.trainer.train_dataset
        names = ("generation_seconds", "answer_tokens", "weights_lag")
        self.figures[OURS].append({"step_seconds": seconds, **{name: logs[name] for name in names}})
        samples = [rows[next(self.order)] for _ in range(self.batch)]  # type: ignore[index]
        began = time.perf_counter()
        self.loop.step(state.global_step - 1, samples)
        theirs = {"step_seconds": time.perf_counter() - began, "generation_seconds": self.loop.generation_seconds}
        self.figures[TRL].append({**theirs, "answer_tokens": self.loop.answer_tokens / self.batch, "weights_lag": 0.0})
        last = ((name, of_side[-1]) for name, of_side in self.figures.items())
        said = (f"{name} {x['generation_seconds']:.2f} of {x['step_seconds']:.2f} s" for name, x in last)
        print(f"step {state.global_step}: {', '.join(said)}", flush=True)
        self._began = time.perf_counter()


def run_side(
    args: argparse.Namespace, side: str, student: nn.Module, teacher: nn.Module, samples: Any, folder: Path
) -> dict[str, list[dict[str, float]]]:
    """Figures of each step of a side, and of TRL's beside it."""
    given = dict(SIDES[side])
    if given["generation_engine"] == "vllm":
        given["generation_options"] = {"dtype": args.dtype, "max_num_seqs": args.batch}
    config = SRDConfig(
        output_dir=str(folder / "out"), divergence="jsd", beta=0.5, temperature=1.0, sft_weight=0.0, lmbda=1.0,
        max_new_tokens=args.new_tokens, learning_rate=args.learning_rate, epochs_per_stage=8,
        per_device_train_batch_size=args.batch, max_steps=args.steps, bf16=args.dtype == "bfloat16", use_cpu=True,
        report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **given,
    )  # fmt: skip
    # Each side has models of its own: the trainer may switch their attention.
    (ours, of_ours), (theirs, of_theirs) = (copy.deepcopy((student, teacher)) for _ in range(2))
    trainer = SRDTrainer(ours, of_ours, config, samples, processing_class=load_tokenizer(MODEL))
    loop = GKDOnPolicy(theirs, of_theirs, trainer, getattr(torch, args.dtype), args.new_tokens)
    turns = InTurn(loop, args.batch)
    trainer.add_callback(turns)
    trainer.train()
    return turns.figures


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians of a side's steps behind the start, and how much longer the start took."""
    timed = steps[min(STARTS, len(steps) - 1) :]
    found: dict[str, float] = {}
    for metric in ("step_seconds", "generation_seconds"):
        found |= spread(metric, [x[metric] for x in timed])
    begun = sum(x["step_seconds"] for x in steps[: len(steps) - len(timed)])
    found["start_seconds"] = max(0.0, begun - (len(steps) - len(timed)) * found["step_seconds"])
    found["mean_generation_seconds"] = statistics.mean(x["generation_seconds"] for x in timed)
    found["answer_tokens"] = statistics.mean(x["answer_tokens"] for x in timed)
    found["weights_lag"] = max(x["weights_lag"] for x in timed)
    return found


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, data=True)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    args = parser.parse_args()
    set_threads()
    teacher = load_model(MODEL, getattr(torch, args.dtype))
    student = load_model(MODEL)
    prune_depth(student, 15)
    samples = read_samples(args.data, load_tokenizer(MODEL), args.rows)
    for side in args.sides:
        if SIDES[side]["generation_engine"] == "vllm" and not is_installed():
            print(f"{side}: left out, vLLM is not installed")
            continue
        folder = Path(tempfile.mkdtemp(prefix="srd-fast-"))
        try:
            steps = run_side(args, side, student, teacher, samples, folder)
        finally:
            shutil.rmtree(folder)
        figures = {name: summary(of_side) for name, of_side in ((side, steps[OURS]), (TRL, steps[TRL]))}
        step = figures[TRL]["step_seconds"]
        for name, f in figures.items():
            print(
                f"{name}: a step {f['step_seconds']:.2f} s, {f['step_seconds'] / step:.2f}x; its generation "
                f"{f['generation_seconds']:.2f} s, {f['generation_seconds'] / step:.2f}x (mean "
                f"{f['mean_generation_seconds']:.2f} s); {f['answer_tokens']:.0f} tokens an answer; start "
                f"{f['start_seconds']:.1f} s",
                flush=True,
            )
        packages = {side: vllm_version().split()[0] if "vllm" in side else "transformers", TRL: "trl"}
        case = f"{side}: batches of {args.batch}, {args.new_tokens} new tokens"
        shape = f"{MODEL} -> 15 layers, {'real' if args.data else 'quickstart'} rows"
        rows = make_rows("on_policy", figures, case=case, shape=shape, dtype=args.dtype, packages=packages)
        write(rows, args.results)


if __name__ == "__main__":
    main()
