"""Losses of other libraries, as their users run them: providers, see `providers.py`."""

import subprocess
import sys
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from .problem import IGNORE, Loss, Problem, Step

TRIED_HERE = "--tried-here"
TRY = """import sys, torch
from benchmarks.problem import LOSSES, Problem, Shape
from benchmarks.providers import PROVIDERS
p = Problem.make(Shape(256, 4096, 256, 256), torch.bfloat16, "cuda", LOSSES["skew_reverse_kl + CE"])
PROVIDERS[sys.argv[1]](p)()
torch.cuda.synchronize()"""
CE_ONLY, QUACK = "cut-cross-entropy (CE alone)", "quack (CE alone)"
LIGER_CE, LIGER_CUTE = "liger-kernel scaled (CE alone)", "liger-cute-kernels (CE alone)"


def liger(p: Problem) -> Step:
    """liger-kernel's chunked JSD under torch.compile, its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    soft = (1 - p.loss.sft_weight) * p.loss.temperature**2
    loss = LigerFusedLinearJSDLoss(p.loss.sft_weight, soft, p.loss.beta, temperature=p.loss.temperature)

    def step() -> None:
        loss(p.h_S, p.w_S, p.h_T, p.w_T, p.labels).backward()

    return step


def _on_gpu(p: Problem, cross_entropy: bool = False) -> None:
    """What all of the others' kernels ask for. cross_entropy: the labels' cross-entropy is what they compute."""
    if p.h_S.device.type != "cuda":
        raise NotImplementedError("its kernels need a GPU")
    if cross_entropy and not p.loss.sft_weight:
        raise NotImplementedError("it has the cross-entropy alone")
    if not cross_entropy and p.loss.sft_weight:
        raise NotImplementedError("its loss has no cross-entropy")


def _on_hopper(p: Problem) -> None:
    _on_gpu(p, cross_entropy=True)
    if (found := torch.cuda.get_device_capability(p.h_S.device)) != (9, 0) or p.h_S.dtype != torch.bfloat16:
        raise NotImplementedError(f"its kernel is for bfloat16 on sm_90, not {p.h_S.dtype} on sm_{found[0]}{found[1]}")


def liger_fused(p: Problem, implementation: str = "nvidia-triton") -> Step:
    """liger-kernel's fused linear JSD: its Triton kernel over chunks of logits, on a GPU alone.

    It takes its own kernel in CuTe DSL instead on Hopper, where nvidia-cutlass-dsl is installed; here both are named.
    """
    _on_gpu(p)
    if implementation == "nvidia-cutedsl":
        import cutlass.cute  # noqa: F401 - liger-kernel does not say that it is missing
    from liger_kernel.backends.dispatch import ImplNotAvailableError, resolve_impl
    from liger_kernel.ops import LigerFusedLinearJSDFunction

    try:
        resolve_impl("jsd_loss_and_grad", implementation, p.h_S.device)
    except ImplNotAvailableError as error:
        raise NotImplementedError(str(error)) from None
    t, beta = p.loss.temperature, p.loss.beta
    inputs = p.h_S, p.w_S, p.h_T, p.w_T, p.labels

    def step() -> None:
        value = LigerFusedLinearJSDFunction.apply(*inputs, beta, IGNORE, t, None, implementation, None)
        (value * t * t).backward()

    return step


def liger_fused_cute(p: Problem) -> Step:
    """The same with its kernel in CuTe DSL (CUTLASS)."""
    return liger_fused(p, "nvidia-cutedsl")


def liger_fused_kl(p: Problem) -> Step:
    """liger-kernel's fused linear KL divergence. It takes the teacher's probabilities, which are made in full here."""
    _on_gpu(p)
    if p.loss.divergence != "forward_kl":
        raise NotImplementedError(f"it has the forward KL alone, not {p.loss.divergence}")
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    t = p.loss.temperature
    loss = LigerFusedLinearKLDivLoss(ignore_index=IGNORE, temperature=t)

    def step() -> None:
        with torch.no_grad():
            probabilities = functional.softmax(p.h_T @ p.w_T.t() / t, dim=-1)
        (loss(p.h_S, p.w_S, probabilities, p.labels) * t * t).backward()

    return step


def _mean(values: Tensor, labels: Tensor) -> Tensor:
    return values.sum() / (labels != IGNORE).sum()


def liger_scaled_ce(p: Problem) -> Step:
    """liger-kernel's fused linear scaled cross-entropy, in CuTe DSL for Hopper: the cross-entropy part alone."""
    _on_hopper(p)
    import cutlass.cute  # noqa: F401
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    def step() -> None:
        _mean(Function.apply(p.h_S, p.w_S, p.labels, 1.0, IGNORE), p.labels).backward()

    return step


def liger_cute(p: Problem) -> Step:
    """liger-cute-kernels' tensor-parallel cross-entropy (CUTLASS and NVSHMEM) in a group of one GPU. It has no
    distillation loss."""
    _on_hopper(p)
    import liger_cute_kernels  # noqa: F401
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyTPFunction as Function
    from liger_kernel.ops.configure import FusedLinearCrossEntropyConfig, configure
    from liger_kernel.ops.cute.fused_linear_scaled_cross_entropy_tp import is_available
    from torch import distributed

    if not is_available():
        raise NotImplementedError("liger-cute-kernels cannot load its library here")
    if reason := _dies(LIGER_CUTE):
        raise NotImplementedError(reason)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    capacity = FusedLinearCrossEntropyConfig(len(p.h_S), p.h_S.shape[1], len(p.w_S))
    if not configure(bootstrap_group=distributed.group.WORLD, device=p.h_S.device, flsce=capacity):
        raise NotImplementedError("liger-cute-kernels does not know this GPU")

    def step() -> None:
        values = Function.apply(p.h_S, p.w_S, p.labels, distributed.group.WORLD, 1.0, IGNORE)
        _mean(values, p.labels).backward()

    return step


@cache
def _dies(name: str) -> str:
    """Why a provider ends the process that runs it, tried on a small problem in another process; "" if it does not."""
    if TRIED_HERE in sys.argv:
        return ""
    done = subprocess.run([sys.executable, "-c", TRY, name, TRIED_HERE], capture_output=True, text=True, check=False)
    said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
    return f"exit status {done.returncode}: {said}" if done.returncode else ""


def quack(p: Problem) -> Step:
    """quack-kernels' chunked linear cross-entropy at its own chunk, CuTe DSL: the cross-entropy part alone."""
    _on_gpu(p, cross_entropy=True)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def step() -> None:
        chunked_linear_cross_entropy(p.h_S, p.w_S, p.labels, ignore_index=IGNORE).backward()

    return step


def trl_chunked(p: Problem) -> Step:
    """The chunked loss of TRL's DistillationTrainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    if p.loss.sft_weight:
        raise NotImplementedError("its loss has no cross-entropy")
    beta, t = p.loss.beta, p.loss.temperature

    def step() -> None:
        mask = (p.labels != IGNORE)[None]
        value, *_ = _chunked_divergence_loss(p.h_S[None], p.h_T[None], p.w_S, p.w_T, mask, beta, temperature=t)
        (value * t * t).backward()

    return step


def trl_gkd(p: Problem) -> Step:
    """The loss of TRL's GKDTrainer, on full logits."""
    from trl.experimental.gkd import GKDTrainer

    if p.loss.sft_weight:
        raise NotImplementedError("its loss has no cross-entropy")
    beta, t = p.loss.beta, p.loss.temperature
    # As its compute_loss calls it: logits and labels of a batch, reduced over the labels that are not ignored.

    def step() -> None:
        z_S, z_T = p.logits()
        value = GKDTrainer.generalized_jsd_loss(z_S[None], z_T[None], p.labels[None], beta, t)
        (value * t * t).backward()

    return step


def torchtune(p: Problem) -> Step:
    """torchtune's chunked forward KL, at its eight chunks, on full logits."""
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss

    if p.loss != Loss("forward_kl", 0.0, 1.0):
        raise NotImplementedError("it has the forward KL at temperature 1 alone, without cross-entropy")
    loss = ForwardKLWithChunkedOutputLoss()

    def step() -> None:
        z_S, z_T = (z[None].chunk(loss.num_output_chunks, dim=1) for z in p.logits())
        loss(list(z_S), list(z_T), p.labels[None]).backward()

    return step


def cce(p: Problem) -> Step:
    """cut-cross-entropy, its kernels on a GPU, its torch.compile path elsewhere: the cross-entropy part alone."""
    from cut_cross_entropy import linear_cross_entropy

    if not p.loss.sft_weight:
        raise NotImplementedError("it has the cross-entropy alone")
    implementation = "cce" if p.h_S.is_cuda else "torch_compile"

    def step() -> None:
        linear_cross_entropy(p.h_S, p.w_S, p.labels, impl=implementation).backward()

    return step
