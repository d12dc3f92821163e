"""How cost grows: seconds of the loss with rows, classes and width, its memory, and seconds of a run with samples.

    python -m benchmarks.scale
    python -m benchmarks.scale --what N V --repeats 3

For N, V and D: forward and backward of the default loss, sizes in turn, medians; extra peak memory of each size in a
process of its own; R^2 of the least-squares line through the medians. For samples: `prepare_dataset`, reflections that
are given, ROUGE-L, curation, cache and training of a small random model on n, 2n, 5n and 10n samples, each once after
a smaller run that warms up.
"""

import contextlib
import io
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch

from .command_line import command_line
from .loss import peak_in_fresh_process, timed
from .problem import LOSSES, Problem, Shape
from .providers import PROVIDERS
from .rows import make_rows, set_threads, spread, write

LOSS = LOSSES["skew_reverse_kl + CE"]
BASE = Shape(512, 49152, 576, 960)
GROWS = {
    "N": [replace(BASE, N=n) for n in (256, 512, 1024, 2048, 4096)],
    "V": [replace(BASE, V=v) for v in (32768, 65536, 131072, 196608, 262144)],
    "D": [replace(BASE, D_S=d, D_T=d) for d in (256, 512, 1024, 1536, 2048)],
}
SIZE = {"N": lambda s: s.N, "V": lambda s: s.V, "D": lambda s: s.D_S}
SAMPLES = (200, 400, 1000, 2000)


def r_squared(sizes: list[float], seconds: list[float]) -> float:
    """Of the line through the points that fits best."""
    x, y = np.array(sizes), np.array(seconds)
    rest = y - np.polyval(np.polyfit(x, y, 1), x)
    return float(1 - (rest**2).sum() / ((y - y.mean()) ** 2).sum())


def grow_loss(what: str, dtype: str, repeats: int, memory: bool) -> dict[str, float]:
    """Figures of every size."""
    shapes = GROWS[what]
    problems = [Problem.make(shape, getattr(torch, dtype), "cpu", LOSS) for shape in shapes]
    steps = [PROVIDERS["srd-fast"](p) for p in problems]
    turns: list[list[float]] = [[] for _ in shapes]
    for repeat in range(repeats + 1):
        for p, step, seconds in zip(problems, steps, turns):
            taken = timed(step, p, None)
            p.clear_gradients()
            if repeat:  # the first run compiles
                seconds.append(taken)
    found: dict[str, float] = {}
    medians = [spread("seconds", seconds)["seconds"] for seconds in turns]
    for shape, seconds in zip(shapes, medians):
        found[f"seconds@{SIZE[what](shape)}"] = seconds
        if memory:
            peak = peak_in_fresh_process("srd-fast", shape, dtype, LOSS)
            found[f"extra_peak_bytes@{SIZE[what](shape)}"] = float("nan") if peak is None else peak
    return found | {"r_squared": r_squared([SIZE[what](s) for s in shapes], medians)}


def run_samples(count: int) -> float:
    """Seconds of a run without its generation: rows to trained student."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from srd_fast import SRDConfig, SRDTrainer, curate
    from srd_fast.data import Tokenisation, prepare_dataset
    from srd_fast.data.quickstart import make_quickstart_rows
    from srd_fast.models import load_tokenizer
    from srd_fast.rouge import RougeL

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    rows = make_quickstart_rows(count, seed=0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    teacher, student = (
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=n, tie_word_embeddings=True, **sizes))
        for n in (4, 2)
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        samples = prepare_dataset(rows, Tokenisation(tokenizer, "alpaca", 512, 256)).dataset
        answers = [row["output"][::-1] for row in rows]
        scores = samples.select_columns(["sample_id"]).add_column(
            "rouge_l", RougeL("auto").score_all(answers, samples["references"])
        )
        scores = scores.add_column("cross_entropy", np.random.default_rng(0).random(len(scores)).tolist())
        args = SRDConfig(
            output_dir=f"{folder}/out", teacher_cache=f"{folder}/cache", epochs_per_stage=1, use_cpu=True, report_to=[],
            per_device_train_batch_size=8, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        plan = curate(scores, keep=0.75, stages=3)
        SRDTrainer(student, teacher, args, samples, curriculum=plan, processing_class=tokenizer).train()
        return time.perf_counter() - began


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--what", nargs="+", default=[*GROWS, "samples"], choices=[*GROWS, "samples"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES))
    parser.add_argument("--no-memory", action="store_true", help="leave out the runs in fresh processes")
    args = parser.parse_args()
    set_threads()
    for what in args.what:
        if what == "samples":
            run_samples(64)
            seconds = [run_samples(n) for n in args.samples]
            found = {f"seconds@{n}": s for n, s in zip(args.samples, seconds)}
            found["r_squared"] = r_squared(list(args.samples), seconds)
            shape = "run without generation, random 2-layer student, quickstart rows"
        else:
            found = grow_loss(what, args.dtype, args.repeats, not args.no_memory)
            fixed = {"N": BASE.N, "V": BASE.V, "D": f"{BASE.D_S}/{BASE.D_T}"}
            shape = f"{LOSS}, " + " ".join(f"{k}={v}" for k, v in fixed.items() if k != what)
        print(f"{what}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
        packages = {"srd-fast": "srd-fast"}
        rows = make_rows("scale", {"srd-fast": found}, case=what, shape=shape, dtype=args.dtype, packages=packages)
        write(rows, args.results)


if __name__ == "__main__":
    main()
