"""Bytes a token and error of each kind of teacher cache, on real hidden states.

    python -m benchmarks.stores [--data ROWS.jsonl] [--student DIR] [--rows 1024]

Teacher: SmolLM2-135M-Instruct. Every store is filled from its hidden states of the same rows and read back; its loss
(forward KL) and the gradient on the student's hidden states are compared with those of the full vocabulary in float32.
Errors are relative: of the mean loss, and of the gradient's l2 norm over all rows. `sampled` is unbiased, so its error
is noise, which training averages over steps.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from srd_fast.data import DistillationCollator, Tokenisation, prepare_dataset, read_rows
from srd_fast.data.quickstart import make_quickstart_splits
from srd_fast.losses import Head, LossOptions, StudentRows
from srd_fast.models import find_head, hidden_states, load_model, load_tokenizer, prune_depth
from srd_fast.teacher import LiveTeacher, TeacherRows, distillation_loss_of_rows, labels_with_loss, rows_with_loss
from srd_fast.teacher.index import sample_key
from srd_fast.teacher.stores import make_store

from .command_line import command_line
from .rows import make_rows, write

MODEL = "smollm2-135m-instruct"


def loss_and_gradient(h_ND: Tensor, head: Head, rows: TeacherRows, labels_N: Tensor, t: float) -> tuple[float, Tensor]:
    """Mean forward KL at T, and its gradient on the hidden states."""
    leaf = h_ND.clone().requires_grad_()
    options = LossOptions("forward_kl", t, sft_weight=0.0, ignore_index=None)
    out = distillation_loss_of_rows(StudentRows(leaf, head, labels_N, options), rows)
    out.loss.backward()
    assert leaf.grad is not None
    return out.divergence.item(), leaf.grad


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("SRD_FAST_DATA"), help="default: quickstart's rows")
    parser.add_argument("--student", help="a trained student; default: the teacher's 15 layers as they are")
    parser.add_argument("--rows", type=int, default=1024)
    args = parser.parse_args()
    tokenizer, teacher = load_tokenizer(MODEL), load_model(MODEL)
    student = load_model(args.student or MODEL)
    if not args.student:
        prune_depth(student, 15)
    texts = read_rows(args.data) if args.data else make_quickstart_splits(256, 1, 0)[0]
    samples = prepare_dataset(texts, Tokenisation(tokenizer, "alpaca", 512, 256)).dataset
    chosen, count = [], 0
    while count < args.rows:
        chosen.append(samples[len(chosen)])
        count += sum(x != -100 for x in chosen[-1]["labels"])
    hidden, student_hidden, labels = [], [], []
    live = LiveTeacher(teacher)
    with torch.no_grad():
        for s in chosen:
            batch = DistillationCollator(0)([s])
            hidden.append(live.rows(batch, 1.0).hidden_ND)
            student_hidden.append(rows_with_loss(hidden_states(student, batch), batch))
            labels.append(labels_with_loss(batch))
    keys, counts = [sample_key(s["input_ids"], s["labels"]) for s in chosen], [len(x) for x in labels]
    h_T, h_S, labels_N = torch.cat(hidden).clone(), torch.cat(student_hidden), torch.cat(labels)
    parts = find_head(student)
    assert parts.weight is not None
    head, classes = Head(parts.weight.detach()), parts.weight.shape[0]
    print(f"{len(labels_N)} rows, V = {classes}")
    print("| store | bytes a token | T | loss | its error | gradient's error |\n|---|---|---|---|---|---|")
    kinds = [("hidden", 0), ("projected", 0)]
    kinds += [("topk", 16), ("topk", 64), ("topk", 256), ("sampled", 64), ("sampled", 256)]
    shape = f"{len(labels_N)} rows of text, V = {classes}"
    shape += f", student {Path(args.student).name}" if args.student else ""
    for t in (1.0, 2.0):
        figures: dict[str, dict[str, float]] = {}
        exact, exact_gradient = None, None
        for kind, k in kinds:
            store = make_store(kind, classes, k or 64, (t,), student)
            rows = store.decode(store.encode(h_T, live.head, keys, counts), live.head, t)
            value, gradient = loss_and_gradient(h_S, head, rows, labels_N, t)
            if exact is None or exact_gradient is None:
                exact, exact_gradient = value, gradient
            error = ((gradient - exact_gradient).norm() / exact_gradient.norm()).item()
            size = store.bytes_per_row(live.head, torch.bfloat16)
            name, of_loss = f"{kind} {k}" if k else kind, abs(value - exact) / exact
            print(f"| {name} | {size} | {t:g} | {value:.4f} | {of_loss:.1e} | {error:.1e} |", flush=True)
            figures[name] = {"bytes_per_token": size, "loss": value, "loss_error": of_loss, "gradient_error": error}
        packages = dict.fromkeys(figures, "srd-fast")
        write(make_rows("stores", figures, case=f"T = {t:g}", shape=shape, packages=packages), args.results)


if __name__ == "__main__":
    main()
