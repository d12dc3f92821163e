"""SRD training of SmolLM2-135M-Instruct -> 15 layers, step by step beside the loop that everyone writes first.

    python -m benchmarks.train --data TRAIN.jsonl                              # 100 steps, float32
    python -m benchmarks.train --data TRAIN.jsonl --dtype bfloat16
    python -m benchmarks.train --data TRAIN.jsonl --variant kernel --steps 30  # breakdown: kernel, packing, cache
    python -m benchmarks.train --data TRAIN.jsonl --teacher-ratio 20 --steps 10
    python -m benchmarks.train --data TRAIN.jsonl --memory                     # peaks, each in a process of its own
    python -m benchmarks.train --data TRAIN.jsonl --twin                       # the loop beside itself: rounding
    python -m benchmarks.train --data TRAIN.jsonl --trl --steps 13             # and TRL's trainers; also with --memory

The loop: batches padded to their longest sample, teacher and student on all positions, both logits in full, the
divergence in float32 on the rows with loss (as in the published code of SRD and DistiLLM), AdamW. SRD-Fast runs through
`SRDTrainer` with the same start, samples, order, schedule and optimizer. The two take turns, a step each, so that a
machine's changing speed meets both; printed are both losses of every step, the medians of their seconds, and how far
the weights are apart at the end.

Whole runs are extrapolated from these steps: SRD has 8 (N1 + (N1 + N2) + (N1 + N2 + N3)) sample passes over three
subsets of the kept 75 %, plain distillation 20 N; the cache is built once, and timed whole (or, with --teacher-ratio,
on 64 samples).

How far apart rounding alone drives two runs says --twin: a second plain loop with the samples of each batch in reverse
order, which changes nothing but the order of sums over them. With --trl the loss is what TRL's trainers have too, the
forward KL at temperature 1 without cross-entropy, and they take their turns after the loop; `loops.py` says how.

Variants, each with what is before it: `kernel`, the chunked loss on rows with loss; `packing`, batches without padding;
`cache`, teacher rows from disk; `lora`, as `cache` with adapters and a frozen head on both sides.
"""

import argparse
import copy
import importlib.util
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from srd_fast import SRDConfig, SRDTrainer
from srd_fast.curriculum import CurriculumPlan
from srd_fast.data import Tokenisation, prepare_dataset, read_rows
from srd_fast.data.quickstart import make_quickstart_splits
from srd_fast.models import load_model, load_tokenizer, prune_depth
from srd_fast.teacher import TeacherCache, build_teacher_cache

from .command_line import command_line
from .loops import LOOPS, PLAIN, REVERSED, PlainLoop
from .rows import make_rows, set_threads, spread, write

MODEL = "smollm2-135m-instruct"
OURS = "srd-fast"
FILLING = f"{OURS}, filling the cache"
EPOCHS, STAGES, KEEP, PLAIN_EPOCHS, BATCH = 8, 3, 0.75, 20, 16


class InTurn(TrainerCallback):
    """After every step of the trainer, the same step of each loop; seconds and losses of all."""

    def __init__(self, loops: dict[str, PlainLoop], steps: int, batch: int = BATCH) -> None:
        self.loops, self.steps, self.batch, self.order = loops, steps, batch, None
        self.seconds: dict[str, list[float]] = {name: [] for name in (OURS, *loops)}
        self.losses: dict[str, list[float]] = {name: [] for name in (OURS, *loops)}
        self.tokens: list[tuple[int, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock of the first step."""
        self.order = self.loops[PLAIN].trainer.curriculum.indices()
        self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The trainer logs within its step: its seconds count up to here."""
        if "loss" not in (logs or {}):
            return
        trainer = self.loops[PLAIN].trainer
        self.seconds[OURS].append(time.perf_counter() - self._began)
        self.losses[OURS].append(trainer.last_loss)
        assert self.order is not None
        samples = [trainer.train_dataset[next(self.order)] for _ in range(self.batch)]
        for name, loop in self.loops.items():
            began = time.perf_counter()
            self.losses[name].append(loop.step(state.global_step - 1, samples))
            self.seconds[name].append(time.perf_counter() - began)
        lengths = [len(s["input_ids"]) for s in samples]
        self.tokens.append((sum(lengths), max(lengths) * self.batch))
        if state.global_step % 10 == 0 or state.global_step == self.steps:
            last = (f"{name} {self.losses[name][-1]:.6f} in {x[-1]:.2f} s" for name, x in self.seconds.items())
            print(f"step {state.global_step}: loss of {', '.join(last)}", flush=True)
        self._began = time.perf_counter()


class Trainer(SRDTrainer):
    """Keeps the loss of the last step as it was computed."""

    last_loss = 0.0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As always."""
        loss = super().compute_loss(*args, **kwargs)
        self.last_loss = loss.item()
        return loss


def read_samples(path: Path | None, tokenizer: Any, count: int | None) -> Any:
    """Tokenised rows of a file, else of the quickstart's data; the first `count`."""
    rows = read_rows(path) if path else make_quickstart_splits(512, 1, 0)[0]
    return prepare_dataset(rows[:count], Tokenisation(tokenizer, "alpaca", 512, 256)).dataset


def larger_teacher(ratio: float) -> LlamaForCausalLM:
    """A random teacher whose forward pass costs `ratio` times that of the 15-layer student."""
    student = 15 * (576 * (576 + 192 * 2 + 576) + 3 * 576 * 1536) + 576 * 49152
    D, F = 2048, 5632
    layer, head = D * (D + 512 * 2 + D) + 3 * D * F, D * 49152
    layers = round((ratio * student - head) / layer)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=D, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    print(f"teacher of {layers} layers, {sum(p.numel() for p in model.parameters()) / 1e9:.2f} G parameters")
    return model


def load_teacher(args: argparse.Namespace) -> nn.Module:
    """The pair's teacher, or a larger random one."""
    if args.teacher_ratio:
        return larger_teacher(args.teacher_ratio)
    return load_model(MODEL, getattr(torch, args.dtype))


def make_trainer(args: argparse.Namespace, samples: Any, tokenizer: Any, folder: Path) -> tuple[Trainer, Any, float]:
    """A trainer of the variant, its live teacher or None, and the seconds that the whole cache takes."""
    student = load_model(MODEL)
    prune_depth(student, 15)
    subset = int(len(samples) * KEEP) // STAGES
    ids = samples.shuffle(seed=1)["sample_id"][: subset * STAGES]
    plan = CurriculumPlan([list(ids[k * subset : (k + 1) * subset]) for k in range(STAGES)], method="random")
    config = SRDConfig(
        output_dir=str(folder / "out"),
        divergence="forward_kl",
        learning_rate=args.learning_rate,
        epochs_per_stage=EPOCHS,
        per_device_train_batch_size=BATCH,
        bf16=args.dtype == "bfloat16",
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        max_steps=args.steps,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        padding_free=args.variant != "kernel",
        memory_budget=args.memory_budget,
        **({"temperature": 1.0, "sft_weight": 0.0} if args.trl else {}),
    )
    cache = args.cache or folder / "cache"
    teacher: Any = None if (cache / "index.json").exists() else load_teacher(args)
    build_seconds, adapters = 0.0, None
    if args.variant == "lora":
        from peft import LoraConfig

        adapters = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    source = teacher
    if args.variant in ("cache", "lora"):
        kept = set(ids)
        rows = samples.select([i for i, s in enumerate(samples["sample_id"]) if s in kept])
        whole = sum(map(len, rows["input_ids"]))
        if args.teacher_ratio:
            rows = rows.select(sorted(range(len(rows)), key=lambda i: hash(rows[i]["sample_id"]))[:64])
        began = time.perf_counter()
        if teacher is not None:
            build_teacher_cache(teacher, rows, cache, progress=False)
        share = sum(map(len, rows["input_ids"])) / whole
        build_seconds = (time.perf_counter() - began) / share
        print(f"cache: {build_seconds:.1f} s{f', extrapolated from {share:.0%} of the tokens' if share < 1 else ''}")
        if args.teacher_ratio:  # the steps take what the cache holds
            plan = CurriculumPlan([list(rows["sample_id"])], method="random")
            config.max_steps = min(args.steps, EPOCHS * len(rows) // BATCH)
        source = TeacherCache(cache)
    trainer = Trainer(
        student, source, config, samples, curriculum=plan, processing_class=tokenizer, peft_config=adapters
    )
    return trainer, teacher, build_seconds


def run_memory(args: argparse.Namespace, samples: Any, tokenizer: Any, folder: Path) -> None:
    """One side alone, a few steps: the peak of this process."""
    trainer, teacher, _ = make_trainer(args, samples, tokenizer, folder)
    if args.side == OURS:
        trainer.train()
    elif args.side in LOOPS:
        loop = LOOPS[args.side](trainer.model, teacher, trainer, getattr(torch, args.dtype))
        order = trainer.curriculum.indices()
        for number in range(args.steps):
            loop.step(number, [samples[next(order)] for _ in range(BATCH)])
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def peaks(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Peak resident bytes of the loops, of filling the cache, and of training from it, each in a process of its own."""
    found = {}
    sides = {**dict.fromkeys(others(args), "kernel"), FILLING: args.variant, OURS: args.variant}
    with tempfile.TemporaryDirectory() as cache:
        for side, variant in sides.items():
            command = [sys.executable, "-m", "benchmarks.train", "--memory-of", side, "--variant", variant]
            command += ["--steps", str(args.steps), "--dtype", args.dtype, "--cache", cache]
            command += ["--rows", str(args.rows)] if args.rows else []
            command += ["--data", str(args.data)] if args.data else []
            command += ["--trl"] if args.trl else []
            command += [] if args.memory_budget is None else ["--memory-budget", str(args.memory_budget)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peak = json.loads(done.stdout.splitlines()[-1])["peak"]
            found[side] = {"peak_bytes": peak}
            print(f"{side}: {peak / 1e6:.0f} MB", flush=True)
    return found


def others(args: argparse.Namespace) -> list[str]:
    """Who trains beside us."""
    found = [PLAIN, *([REVERSED] if args.twin else [])]
    if args.trl and importlib.util.find_spec("trl") is None:
        print("TRL left out: it is not installed")
    elif args.trl:
        found += [name for name in LOOPS if name.startswith("trl")]
    return found


def worst_loss(one: list[float], other: list[float]) -> float:
    """The largest relative difference of two columns of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other))


def weights_apart(one: nn.Module, other: nn.Module) -> float:
    """The largest distance of two matrices of the same name, relative to the second's norm."""
    pairs = zip(one.parameters(), other.parameters())
    return max(((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in pairs)


def run_times(args: argparse.Namespace, samples: Any, tokenizer: Any, folder: Path) -> dict[str, dict[str, float]]:
    """All in turn, and whole runs from their medians."""
    trainer, teacher, build_seconds = make_trainer(args, samples, tokenizer, folder)
    dtype = getattr(torch, args.dtype)
    loops = {name: LOOPS[name](copy.deepcopy(trainer.model), teacher, trainer, dtype) for name in others(args)}
    turns = InTurn(loops, args.steps)
    trainer.add_callback(turns)
    trainer.train()
    skip = min(2, args.steps - 1)
    steps = sum(stage.steps for stage in trainer.curriculum.stages)
    if args.teacher_ratio:
        subset = int(len(samples) * KEEP) // STAGES
        steps = -(-EPOCHS * subset * 6 // BATCH)
    plain_steps = PLAIN_EPOCHS * len(samples) / BATCH
    real, padded = (sum(x) for x in zip(*turns.tokens))
    print(f"tokens {real}, with padding {padded}: {real / padded:.2f}")
    figures = {}
    models = {OURS: trainer.model, **{name: loop.student for name, loop in loops.items()}}
    for name, seconds in turns.seconds.items():
        median = statistics.median(seconds[skip:])
        cache = {"cache_seconds": build_seconds} if name == OURS else {}
        figures[name] = {
            **spread("step_seconds", seconds[skip:]),
            **cache,
            "whole_seconds": steps * median + sum(cache.values()),
        }
        if name != PLAIN:
            figures[name]["loss_difference"] = worst_loss(turns.losses[name], turns.losses[PLAIN])
            figures[name]["weight_difference"] = weights_apart(models[name], loops[PLAIN].student)
    plain, ours = figures[PLAIN], figures[OURS]
    distillation = plain_steps * plain["step_seconds"]
    for name, f in figures.items():
        line = f"{name}: a step {f['step_seconds']:.2f} s, {f['step_seconds'] / plain['step_seconds']:.3f}x"
        apart = (
            f"; losses {f['loss_difference']:.1e}, weights {f['weight_difference']:.1e} apart" if name != PLAIN else ""
        )
        print(line + apart)
    of_srd, of_plain = ours["whole_seconds"] / plain["whole_seconds"], ours["whole_seconds"] / distillation
    print(f"whole SRD, cache included: {of_srd:.3f}x of the loop's, {of_plain:.3f}x of plain distillation")
    return {**figures, f"{PLAIN}, plain distillation": {"whole_seconds": distillation}}


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, data=True)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--variant", default="cache", choices=["kernel", "packing", "cache", "lora"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--twin", action="store_true", help="a second plain loop, batches in reverse, beside the first")
    parser.add_argument("--trl", action="store_true", help="beside TRL's trainers too: forward KL at temperature 1")
    parser.add_argument("--teacher-ratio", type=float, help="a random teacher of that many times the student's compute")
    parser.add_argument("--memory-budget", type=int, help="bytes of the loss's chunk; default: SRDConfig's")
    parser.add_argument("--memory", action="store_true", help="peaks instead of times")
    parser.add_argument("--memory-of", dest="side", choices=[*LOOPS, FILLING, OURS], help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    set_threads()
    if args.memory:
        args.steps = min(args.steps, 12)
        figures = peaks(args)
    else:
        tokenizer = load_tokenizer(MODEL)
        folder = Path(tempfile.mkdtemp(prefix="srd-fast-"))
        try:
            samples = read_samples(args.data, tokenizer, args.rows)
            if args.side:
                run_memory(args, samples, tokenizer, folder)
                return
            figures = run_times(args, samples, tokenizer, folder)
        finally:
            shutil.rmtree(folder)
    case = args.variant + (", KL alone" if args.trl else "") + (", memory" if args.memory else "")
    case += f", teacher of {args.teacher_ratio:g} times the compute" if args.teacher_ratio else ""
    case += f", learning rate {args.learning_rate:g}" if not args.memory else ""
    data = f"{args.rows or 'all'} {'real' if args.data else 'quickstart'} rows".removeprefix("all ")
    shape = f"{MODEL} -> 15 layers, {data}, {args.steps} steps of {BATCH}"
    packages = {name: name.split()[0].strip(",") for name in figures if name.startswith((OURS, "trl"))}
    write(make_rows("train", figures, case=case, shape=shape, dtype=args.dtype, packages=packages), args.results)


if __name__ == "__main__":
    main()
