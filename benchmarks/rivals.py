"""Is the gradient right? The smallest examples on which implementations of the same loss part.

    python -m benchmarks.rivals

Each example has a few rows and classes in float32; the exact gradient of the student's hidden states comes from plain
PyTorch in float64. A figure is the norm of the difference over the norm, or over 1e-6 where that is smaller; `nan`
stands for a gradient with a NaN, `inf` for an error. What the definition is, where libraries may differ in good faith:

    temperature          softmaxes at T = 4, the loss times T^2
    padded teacher       the teacher's head has 5 classes more than the student's, as in Qwen2.5 7B and 0.5B: the
                         divergence is over the common classes
    padded student       the same with the student's
    ignored labels       half of the labels are ignored: the mean is over the others
    no label             all labels are ignored: no loss, no gradient
    large logits         a spread of 100 nats: probabilities underflow in float32, their logarithms do not
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from .command_line import command_line
from .problem import IGNORE, LOSSES, Loss, Problem, Shape, plain_loss
from .providers import NOT_THE_LOSS, PACKAGES, PROVIDERS, why_not
from .rows import make_rows, write

LEAST_NORM = 1e-6
SMALL = Shape(6, 11, 8, 12)


def _larger(loss: Loss, scale: float) -> Problem:
    p = Problem.make(SMALL, torch.float32, "cpu", loss)
    return replace(p, h_S=(p.h_S.detach() * scale).requires_grad_(), h_T=p.h_T * scale)


def _padded(loss: Loss, student: int, teacher: int) -> Problem:
    p = Problem.make(replace(SMALL, V=SMALL.V + max(student, teacher)), torch.float32, "cpu", loss)
    w_S, w_T = p.w_S.detach()[: SMALL.V + student], p.w_T[: SMALL.V + teacher]
    return replace(p, w_S=w_S.clone().requires_grad_(), w_T=w_T.clone(), labels=p.labels % SMALL.V)


EXAMPLES: dict[str, Callable[[Loss], Problem]] = {
    "temperature": lambda loss: Problem.make(SMALL, torch.float32, "cpu", replace(loss, temperature=4.0)),
    "padded teacher": lambda loss: _padded(loss, 0, 5),
    "padded student": lambda loss: _padded(loss, 5, 0),
    "ignored labels": lambda loss: Problem.make(SMALL, torch.float32, "cpu", loss).with_ignored(0.5),
    "no label": lambda loss: Problem.make(SMALL, torch.float32, "cpu", loss).with_ignored(1.0),
    "large logits": lambda loss: _larger(loss, 30.0),
}


def exact_gradient(p: Problem) -> torch.Tensor:
    """Of the student's hidden states, in float64, by definition; zero where no label counts."""
    h_S, w_S, h_T, w_T = (x.detach().double() for x in (p.h_S, p.w_S, p.h_T, p.w_T))
    if bool((p.labels == IGNORE).all()):
        return torch.zeros_like(h_S)
    common = min(len(w_S), len(w_T))
    h_S.requires_grad_()
    plain_loss(p.loss, h_S @ w_S[:common].t(), h_T @ w_T[:common].t(), p.labels).backward()
    assert h_S.grad is not None
    return h_S.grad


def error_of(name: str, p: Problem) -> tuple[float, str]:
    """Relative error of a provider's gradient, and the exception's text where it raises one.

    Raises NotImplementedError and ImportError where it does not take part.
    """
    step = PROVIDERS[name](p)
    try:
        step()
    except NotImplementedError:
        raise
    except Exception as error:  # whatever a library does with an input that it does not take
        return float("inf"), " ".join(str(error).split())[:120]
    exact = exact_gradient(p)
    if p.h_S.grad is None:
        return float("inf"), "no gradient"
    return ((p.h_S.grad.double() - exact).norm() / exact.norm().clamp(min=LEAST_NORM)).item(), ""


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--losses", nargs="+", default=["jsd", "forward_kl", "forward_kl, T = 1"], choices=list(LOSSES))
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS))
    args = parser.parse_args()
    names = args.providers or [n for n in PROVIDERS if n not in NOT_THE_LOSS]
    for loss_name in args.losses:
        figures: dict[str, dict[str, float]] = {}
        left_out: dict[str, str] = {}
        for name in names:
            for example, make in EXAMPLES.items():
                try:
                    error, text = error_of(name, make(LOSSES[loss_name]))
                except (ImportError, NotImplementedError) as reason:
                    left_out[name] = why_not(reason)
                    print(f"{loss_name}, {example}, {name} left out: {left_out[name]}")
                    continue
                figures.setdefault(name, {})[f"gradient_error, {example}"] = error
                print(f"{loss_name}, {example}, {name}: {error:.1e} {text}", flush=True)
        # Who lacks the loss lacks it in every example; who fails one of them has figures of the others.
        left_out = {name: reason for name, reason in left_out.items() if name not in figures}
        shape = "6 rows, 11 classes"
        write(
            make_rows("rivals", figures, case=loss_name, shape=shape, packages=PACKAGES, left_out=left_out),
            args.results,
        )


if __name__ == "__main__":
    main()
