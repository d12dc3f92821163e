"""What does the host do in a step of `SRDTrainer`? A student of many layers and tiny widths, on one thread of a CPU.

    python -m benchmarks.host_step                                  # uncompiled, bfloat16
    python -m benchmarks.host_step --compiled --dtype float32       # the layers compiled, as long runs on a GPU are

A fast GPU has done such a step's kernels before its host has queued them, so what counts is Python, PyTorch's dispatch
and autograd. A CPU's arithmetic is in the figures too: little in float32, more in bfloat16, whose smallest products are
slow. Milliseconds are those that the thread of the steps ran, so that other programs disturb them less. Samples are of
one length, which makes attention one call, as on a GPU; rows of the teacher are as wide as Qwen2.5 1.5B's. Operations
are PyTorch's own (`aten::`), those inside of others included. Printed alone: compare two versions on one machine, in
turns.
"""

import argparse
import random
import tempfile
import time
from collections import defaultdict
from typing import Any

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, TrainerCallback

from srd_fast import SRDConfig, SRDTrainer
from srd_fast.data import TOKENISED_FEATURES

from .pairs import random_model, tokenizer
from .rows import spread

VOCABULARY, TEACHER_WIDTH, WARM_UP, PROFILED = 320, 1536, 10, 3


class HostWatch(TrainerCallback):
    """Milliseconds of this thread in each part of each step after the first ones; the last are profiled instead."""

    def __init__(self, steps: int) -> None:
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.last, self.on, self.began = WARM_UP + steps, False, 0.0
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def call(self, part: str, function: Any, *args: Any, **options: Any) -> Any:
        """Call a function as a part of the step."""
        began = time.thread_time()
        result = function(*args, **options)
        if self.on:
            self.parts[part].append(1e3 * (time.thread_time() - began))
        return result

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends a step and begins the next one."""
        now = time.thread_time()
        if self.on:
            self.parts["whole step"].append(1e3 * (now - self.began))
        self.began, self.on = now, WARM_UP <= state.global_step < self.last
        if state.global_step == self.last:
            self.profile.start()
        if state.global_step == self.last + PROFILED:
            self.profile.stop()

    @property
    def operations(self) -> float:
        """Of a step."""
        return sum(e.count for e in self.profile.key_averages() if e.key.startswith("aten::")) / PROFILED


class WatchedTrainer(SRDTrainer):
    """Tells its watch of the parts of its steps."""

    def __init__(self, watch: HostWatch, *args: Any, **options: Any) -> None:
        super().__init__(*args, callbacks=[watch], **options)
        self.watch = watch

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """As always."""
        return self.watch.call("batch", super().get_batch_samples, *args, **options)

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        """As always."""
        return self.watch.call("forward and loss", super().compute_loss, *args, **options)

    def training_step(self, *args: Any, **options: Any) -> Any:
        """As always."""
        return self.watch.call("forward, loss, backward", super().training_step, *args, **options)

    def _clip_grad_norm(self, *args: Any, **options: Any) -> Any:
        return self.watch.call("clipping", super()._clip_grad_norm, *args, **options)

    def _get_grad_norm(self, *args: Any, **options: Any) -> Any:
        return self.watch.call("check", super()._get_grad_norm, *args, **options)


def model(layers: int, width: int) -> Any:
    """Qwen2 of random weights."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return random_model(config, torch.float32, "cpu")


def measure(args: argparse.Namespace, folder: str) -> HostWatch:
    """Train."""
    draw, steps = random.Random(0), WARM_UP + args.steps + PROFILED + 1
    rows = []
    for i in range(4 * args.batch):
        ids = [draw.randrange(2, VOCABULARY) for _ in range(args.tokens)]
        prompt = args.tokens // 4
        row = {"sample_id": str(i), "prompt": "", "references": [""], "tests": []}
        rows.append({**row, "input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    config = SRDConfig(
        output_dir=f"{folder}/out", use_cpu=True, bf16=args.dtype == "bfloat16", padding_free=True,
        teacher_cache=f"{folder}/cache", torch_compile=args.compiled, optim="adamw_torch_fused",
        per_device_train_batch_size=args.batch, epochs_per_stage=-(-steps // 4), max_steps=steps,
        logging_steps=10 * steps, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    watch, student = HostWatch(args.steps), model(args.layers, args.width)
    samples = Dataset.from_list(rows, features=TOKENISED_FEATURES)
    trainer = WatchedTrainer(watch, student, model(1, TEACHER_WIDTH), config, samples, processing_class=tokenizer())
    trainer.train()
    return watch


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8, help="of a sample, the first quarter its prompt")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        watch = measure(args, folder)
    print("| part | ms | 20 % | 80 % |\n|---|--:|--:|--:|")
    for part, found in watch.parts.items():
        print(f"| {part} | {' | '.join(f'{x:.2f}' for x in spread('ms', found).values())} |")
    print(f"\n{watch.operations:,.0f} operations a step")


if __name__ == "__main__":
    main()
