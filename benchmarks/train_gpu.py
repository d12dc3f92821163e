"""A training step at the sizes of real pairs: `SRDTrainer` beside the plain loop and TRL's trainers, on a GPU.

    python -m benchmarks.train_gpu                               # Qwen2.5 1.5B -> 0.5B and Gemma 3 1B -> 270M, with TRL
    python -m benchmarks.train_gpu --pairs gemma3 --batch 2

Weights and tokens are random: neither changes what a step costs. Students in float32 under autocast to bfloat16,
teachers in bfloat16; 4 samples of 256 to 1,024 tokens a step, the first quarter of each a prompt; forward KL at
temperature 1, AdamW. SRD-Fast runs twice, with the teacher beside the student and with its hidden states from the
cache, each in turn with the others, a step each. Peaks are what PyTorch's allocator has given out in a process that
does nothing else: weights, optimizer, activations, loss.
"""

import argparse
import copy
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from srd_fast import SRDConfig
from srd_fast.curation import CurriculumPlan
from srd_fast.data import TOKENISED_FEATURES
from srd_fast.teacher import TeacherCache, build_teacher_cache

from .loops import LOOPS, PLAIN
from .rows import RESULTS, make_rows, set_threads, spread, write
from .train import OURS, InTurn, Trainer, others, worst_loss

LENGTHS = (256, 1024)
SKIPPED = 2


def _config(
    kind: Callable[..., Any], V: int, D: int, F: int, layers: int, heads: int, keys: int, **options: Any
) -> Any:
    return kind(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=keys, tie_word_embeddings=True, max_position_embeddings=4096, **options,
    )  # fmt: skip


# Teacher and student, sizes as in their config.json.
PAIRS = {
    "qwen2.5": (
        _config(Qwen2Config, 151936, 1536, 8960, 28, 12, 2),
        _config(Qwen2Config, 151936, 896, 4864, 24, 14, 2),
    ),
    "gemma3": (
        _config(Gemma3TextConfig, 262144, 1152, 6912, 26, 4, 1, head_dim=256, sliding_window=512),
        _config(Gemma3TextConfig, 262144, 640, 2048, 18, 4, 1, head_dim=256, sliding_window=512),
    ),
    "tiny": (_config(LlamaConfig, 512, 64, 128, 2, 4, 2), _config(LlamaConfig, 512, 32, 64, 2, 4, 2)),
}


def samples(vocabulary: int, count: int) -> Any:
    """Random tokens, of lengths that are spread evenly."""
    from datasets import Dataset

    g = torch.Generator().manual_seed(0)
    rows = []
    for i, length in enumerate(torch.randint(LENGTHS[0], LENGTHS[1] + 1, (count,), generator=g).tolist()):
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
    """Weights drawn on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def make_trainer(args: argparse.Namespace, pair: str, cached: bool, folder: Path) -> tuple[Trainer, nn.Module]:
    """A trainer of the pair, and the teacher that others use."""
    teacher_config, student_config = PAIRS[pair]
    rows = samples(student_config.vocab_size, args.batch * args.steps)
    teacher = random_model(teacher_config, torch.bfloat16, args.device).eval()
    source: Any = teacher
    if cached:
        build_teacher_cache(teacher, rows, folder / "cache", progress=False)
        source = TeacherCache(folder / "cache")
    config = SRDConfig(
        output_dir=str(folder / "out"),
        divergence="forward_kl",
        temperature=1.0,
        sft_weight=0.0,
        epochs_per_stage=1,
        per_device_train_batch_size=args.batch,
        learning_rate=1e-5,
        bf16=True,
        use_cpu=args.device == "cpu",
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    plan = CurriculumPlan([list(rows["sample_id"])], method="random")
    student = random_model(student_config, torch.float32, args.device)
    return Trainer(student, source, config, rows, curriculum=plan, processing_class=tokenizer()), teacher


def name_of(cached: bool) -> str:
    """Ours, by where the teacher's rows come from."""
    return f"{OURS}, {'cache' if cached else 'live teacher'}"


def run_times(args: argparse.Namespace, pair: str, cached: bool, folder: Path) -> dict[str, dict[str, float]]:
    """All in turn."""
    trainer, teacher = make_trainer(args, pair, cached, folder)
    make = {name: LOOPS[name] for name in others(args)}
    loops = {name: f(copy.deepcopy(trainer.model), teacher, trainer, torch.bfloat16) for name, f in make.items()}
    turns = InTurn(loops, args.steps, args.batch)
    trainer.add_callback(turns)
    trainer.train()
    figures = {}
    for name, seconds in turns.seconds.items():
        f = spread("step_seconds", seconds[min(SKIPPED, args.steps - 1) :])
        f["loss_difference"] = worst_loss(turns.losses[name], turns.losses[PLAIN])
        figures[name_of(cached) if name == OURS else name] = f
    return figures


def run_memory(args: argparse.Namespace, pair: str, side: str, folder: Path) -> int:
    """Peak of three steps of one side in this process."""
    args.steps = 3
    cached = side == name_of(True)
    trainer, teacher = make_trainer(args, pair, cached, folder)
    if cached:
        teacher.to("cpu")
    loop = None if side.startswith(OURS) else LOOPS[side](trainer.model, teacher, trainer, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    if loop is None:
        del teacher
        trainer.train()
    else:
        order = trainer.curriculum.indices()
        for number in range(args.steps):
            loop.step(number, [trainer.train_dataset[next(order)] for _ in range(args.batch)])
    return torch.cuda.max_memory_allocated()


def free_gpu() -> None:
    """What a finished run left to the allocator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak(args: argparse.Namespace, pair: str, side: str) -> float | None:
    """`run_memory` in a fresh process; None where memory ran out."""
    command = [sys.executable, "-m", "benchmarks.train_gpu", "--batch", str(args.batch)]
    command += ["--peak", json.dumps([pair, side])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{pair}, {side}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return None
    return float(done.stdout.split()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=["qwen2.5", "gemma3"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.trl, args.twin = True, False
    set_threads()
    if args.peak:
        with tempfile.TemporaryDirectory() as folder:
            print(run_memory(args, *json.loads(args.peak), Path(folder)))
        return
    for pair in args.pairs:
        # Before this process takes any of the memory.
        sides = [name_of(False), name_of(True), *others(args)] if args.device == "cuda" else []
        peaks = {side: peak(args, pair, side) for side in sides}
        for cached in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                figures = run_times(args, pair, cached, Path(folder))
            free_gpu()
            for name, f in figures.items():
                if (most := peaks.get(name)) is not None:
                    f["peak_bytes"] = most
                relative = f["step_seconds"] / figures[PLAIN]["step_seconds"]
                line = f"{pair}, {name}: a step {f['step_seconds']:.3f} s, {relative:.2f}x"
                print(f"{line}, peak {f.get('peak_bytes', float('nan')) / 2**30:.2f} GiB", flush=True)
            shape = (
                f"{pair}, V = {PAIRS[pair][1].vocab_size}, {args.batch} samples of {LENGTHS[0]} to {LENGTHS[1]} tokens"
            )
            packages = {n: n.split(",")[0].split()[0] for n in figures if n.startswith((OURS, "trl"))}
            options = {"case": name_of(cached), "shape": shape, "dtype": "bfloat16", "device": args.device}
            write(make_rows("train_gpu", figures, packages=packages, **options), args.results)


if __name__ == "__main__":
    main()
