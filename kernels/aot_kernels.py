"""The kernels that `aot.py` compiles: every choice of their launchers that affects the machine code."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_class_blocks, triton_rows, triton_sums
from .divergences import FORMULAS, RowFirst

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

# For each argument its type, and whether it is a multiple of 16 (for a pointer, of 16 bytes).
Types = dict[str, tuple[str, bool]]
NUMBERS: Types = dict.fromkeys(
    (
        "temperature", "cross_entropy_coefficient", "divergence_coefficient", "skew", "beta", "student_softcap",
        "teacher_softcap",
    ),
    ("fp32", False),
)  # fmt: skip


def compile_kernel(kernel: Any, types: Types, fixed: dict[str, Any], target: GPUTarget, options: dict[str, Any]) -> Any:
    """Compile a `triton.jit` function. types: for each run-time argument its type, and whether 16 divides it."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types[name][0] for name in names}
    divisible = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in fixed and types[name][1]
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()}, divisible)
    return triton.compile(source, target=target, options=options)


def _name(configuration: Any, first: str, named: int) -> str:
    """`first`, followed by the fields after the first `named` ones that do not have their default."""
    changed = [
        f.name if getattr(configuration, f.name) is True else f"{f.name}={getattr(configuration, f.name)}"
        for f in dataclasses.fields(configuration)[named:]
        if getattr(configuration, f.name) != f.default
    ]
    return " ".join([first, *changed])


def _loss(divergence: str | None, temperature: int) -> str:
    if divergence is None:
        return "cross_entropy"
    return f"{divergence} {'T=other' if temperature == 0 else f'T={temperature}'}"


def _of_divergence(divergence: str | None, target: GPUTarget) -> dict[str, Any]:
    """Compile-time arguments of kernels with a divergence."""
    formula = FORMULAS[divergence or "forward_kl"]
    log2 = triton_sums.approximate_log2 if target.backend == "cuda" else triton_sums.exact_log2
    return {**triton_sums.formula_options(formula), "LOG2": log2, "SIDE": triton_sums.SIDES[formula.one_read]}


@dataclass(frozen=True)
class Configuration:
    """What decides the code of `row_kernel`: see `triton_rows.distillation_rows_triton`.

    divergence: None for only the cross-entropy. temperature: 1, 2, or 0 for any other. gradient: its dtype, or None
    without gradient. classes: V. even_classes: whether V is a multiple of 16. aligned_rows: whether strides and
    readable columns are multiples of 16.
    """

    divergence: str | None = "skew_reverse_kl"
    temperature: int = 2
    logits: str = "bf16"
    gradient: str | None = "bf16"
    cross_entropy: bool = True
    padded: bool = False
    student_softcap: bool = False
    teacher_softcap: bool = False
    weights: bool = False
    classes: int = 152064
    even_classes: bool = True
    aligned_rows: bool = True

    def __str__(self) -> str:
        return _name(self, f"{_loss(self.divergence, self.temperature)} {self.logits}->{self.gradient or 'none'}", 4)

    @property
    def reads(self) -> int:
        """How often each logit must be read."""
        formula = None if self.divergence is None else FORMULAS[self.divergence]
        before = 1 if formula is None or formula.one_read else 2
        # D is computed with the gradient, or in an additional read if there is none.
        return before + (self.gradient is not None or (formula is not None and formula.row_first is not None))

    @property
    def looks(self) -> int:
        """Number of loops over only the teacher, which search where its head begins; each look runs one of them."""
        first = None if self.divergence is None else FORMULAS[self.divergence].row_first
        return int(first is not None and first.head)

    @property
    def byte_limit(self) -> int:
        """Bytes of global memory that a student's logit, its teacher's and its gradient need in all loops."""
        both = BYTES[self.logits] * (1 if self.divergence is None else 2)
        return self.reads * both + self.looks * BYTES[self.logits] + (BYTES[self.gradient] if self.gradient else 0)

    def options(self, target: GPUTarget) -> dict[str, Any]:
        """The launcher's block of classes and compile options."""
        return triton_rows.launch_options(self.classes, target.warp_size, target.arch == 90)

    def compile(self, target: GPUTarget) -> Any:
        """The `triton.compiler.CompiledKernel`."""
        options = self.options(target)
        fixed = {
            **_of_divergence(self.divergence, target),
            "TEACHER": self.divergence is not None,
            "T_KIND": self.temperature,
            "PADDED": self.padded,
            "STUDENT_SOFTCAP": self.student_softcap,
            "TEACHER_SOFTCAP": self.teacher_softcap,
            "WEIGHTS": self.weights,
            "CROSS_ENTROPY": self.cross_entropy,
            "GRADIENT": self.gradient is not None,
            "WIDTH": 16 // min(BYTES[self.logits], BYTES[self.gradient or self.logits]),
            "BLOCK": options.pop("BLOCK"),
        }
        rows = self.aligned_rows
        types = {
            **NUMBERS,
            **dict.fromkeys(("student_ptr", "teacher_ptr"), (f"*{self.logits}", True)),
            "gradient_ptr": (f"*{self.gradient or self.logits}", True),
            "labels_ptr": ("*i64", True),
            **dict.fromkeys(("weights_ptr", "divergence_ptr", "cross_entropy_ptr", "entropy_ptr"), ("*fp32", True)),
            **dict.fromkeys(("student_stride", "teacher_stride", "gradient_stride"), ("i32", rows)),
            **dict.fromkeys(("student_readable", "teacher_readable"), ("i32", rows)),
            **dict.fromkeys(("V", "K"), ("i32", self.even_classes)),
        }
        return compile_kernel(triton_rows.row_kernel, types, fixed, target, options)


@dataclass(frozen=True)
class BlockConfiguration:
    """What decides the code of a pass over a block of classes: see `triton_class_blocks.TritonClassBlocks`.

    work: "read", "look", "gather", "weigh" or "write". divergence: None without a teacher, or past its classes.
    student, teacher, gradient: dtypes. teacher None with a divergence: the teacher's sum is known, so `read` leaves its
    logits out, and `write` adds to D. softcap: of both sides. classes: number of classes of the block. Others as in
    `Configuration`.
    """

    work: str = "read"
    divergence: str | None = "reverse_kl"
    temperature: int = 2
    student: str = "bf16"
    teacher: str | None = "bf16"
    gradient: str = "bf16"
    cross_entropy: bool = True
    softcap: bool = False
    weights: bool = False
    classes: int = 4096
    aligned_rows: bool = True

    def __str__(self) -> str:
        dtypes = self.student + (f"+{self.teacher}" if self.divergence and self.teacher else "")
        written = f"->{self.gradient}" if self.work == "write" else ""
        known = " teacher's sum known" if self.divergence and self.teacher is None else ""
        first = f"{self.work} {_loss(self.divergence, self.temperature)} {dtypes}{written}{known}"
        return _name(self, first, 6)

    @property
    def _teacher_read(self) -> str | None:
        """The dtype of the teacher's logits, where the kernel reads them."""
        if self.divergence is None or (self.work == "read" and self.teacher is None):
            return None
        return self.teacher or self.student

    @property
    def _first(self) -> RowFirst | None:
        return None if self.divergence is None else FORMULAS[self.divergence].row_first

    @property
    def reads(self) -> int:
        """How often each logit must be read."""
        return 1

    @property
    def looks(self) -> int:
        """Number of loops over only the teacher, in addition to `reads`."""
        return 0

    @property
    def byte_limit(self) -> int:
        """Bytes of global memory that a student's logit, its teacher's and its gradient need."""
        read = (BYTES[self.student] if self.work != "look" else 0) + (
            BYTES[self._teacher_read] if self._teacher_read else 0
        )
        return read + (BYTES[self.gradient] if self.work == "write" else 0)

    def options(self, target: GPUTarget) -> dict[str, Any]:
        """The launcher's block of classes and compile options."""
        return triton_class_blocks.launch_options(self.classes, target.warp_size)

    def compile(self, target: GPUTarget) -> Any:
        """The `triton.compiler.CompiledKernel`."""
        options, teacher, writes = self.options(target), self._teacher_read, self.work == "write"
        kernel = getattr(triton_class_blocks, f"{'weigh' if self.work == 'gather' else self.work}_kernel")
        widths = [BYTES[x] for x in (self.student, teacher, self.gradient if writes else None) if x]
        fixed = {
            **_of_divergence(self.divergence, target),
            "COMMON": self.divergence is not None,
            "GATHER": self.work == "gather",
            "TEACHER": teacher is not None,
            "VALUES": self.teacher is None or (self.divergence is not None and self._first is not None),
            "T_KIND": self.temperature,
            "STUDENT_SOFTCAP": self.softcap,
            "TEACHER_SOFTCAP": self.softcap,
            "WEIGHTS": self.weights,
            "CROSS_ENTROPY": self.cross_entropy,
            "WIDTH": 16 // min(widths),
            "BLOCK": options.pop("BLOCK"),
        }
        rows = self.aligned_rows
        types = {
            **NUMBERS,
            **dict.fromkeys(("state_ptr", "weights_ptr"), ("*fp32", True)),
            "labels_ptr": ("*i64", True),
            "student_ptr": (f"*{self.student}", rows),
            "teacher_ptr": (f"*{teacher or self.student}", rows),
            "gradient_ptr": (f"*{self.gradient}", rows),
            **dict.fromkeys(("first_row", "N", "first"), ("i32", False)),
            **dict.fromkeys(("student_stride", "teacher_stride", "gradient_stride", "classes"), ("i32", rows)),
        }
        fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        return compile_kernel(kernel, types, fixed, target, options)


AnyConfiguration = Configuration | BlockConfiguration


def configurations(quick: bool = False) -> list[Configuration]:
    """All configurations of whole rows that the launcher can choose.

    quick: three divergences in bf16 at one temperature.
    """
    default = Configuration()
    if quick:
        return [dataclasses.replace(default, divergence=d) for d in ("forward_kl", "reverse_kl", "skew_reverse_kl")]
    every = [
        dataclasses.replace(default, divergence=d, temperature=t, logits=dtype, gradient=dtype)
        for d in FORMULAS
        for t in (1, 2, 0)
        for dtype in ("bf16", "fp32")
    ]
    changes: list[dict[str, Any]] = [
        {"padded": True},
        {"student_softcap": True, "teacher_softcap": True},
        {"weights": True},
        {"cross_entropy": False},
        {"gradient": None},
        {"logits": "fp16", "gradient": "fp16"},
        {"logits": "fp32", "gradient": "bf16"},
        {"padded": True, "student_softcap": True, "teacher_softcap": True, "weights": True, "temperature": 0},
        {"divergence": None, "temperature": 1},
        {"divergence": None, "temperature": 1, "gradient": None},
        {"even_classes": False, "classes": 151669},
        {"even_classes": False, "classes": 151669, "aligned_rows": False},
        *({"classes": classes} for classes in (256, 512, 1024, 2048)),
    ]
    return every + [dataclasses.replace(default, **change) for change in changes]


def block_configurations(quick: bool = False) -> list[BlockConfiguration]:
    """Passes over blocks of classes: all divergences with the usual settings, and unusual settings with one of them.

    quick: the kernels with the most sums, one that reads and one that writes.
    """
    known: dict[str, Any] = {"divergence": "forward_kl", "teacher": None}
    if quick:
        return [BlockConfiguration(), BlockConfiguration("write", **known)]
    hardest = {"softcap": True, "temperature": 0}
    in_fp32 = {"student": "fp32", "teacher": "fp32", "gradient": "fp32"}
    changes: list[dict[str, Any]] = [
        *({"divergence": d} for d in ("forward_kl", "reverse_kl", "jsd")),
        known,
        {"divergence": None},
        *({"work": "weigh", "divergence": d} for d, f in FORMULAS.items() if not f.one_read),
        *({"work": "gather", "divergence": d} for d, f in FORMULAS.items() if f.row_first),
        *({"work": "look", "divergence": d} for d, f in FORMULAS.items() if f.row_first and f.row_first.head),
        *({"work": "write", "divergence": d} for d in FORMULAS),
        {"work": "write", **known},
        {"work": "write", "divergence": None},
        # One warp serves all widths up to the second.
        *({"classes": classes} for classes in (512, 2048, 8192, 16384, 32768)),
        {"work": "write", "classes": 2048},
        {"temperature": 1},
        {"work": "write", "divergence": "forward_kl", "temperature": 1},
        hardest,
        {"work": "weigh", "divergence": "jsd", **hardest},
        {"work": "write", "divergence": "jsd", "weights": True, **hardest},
        in_fp32,
        {"work": "write", "divergence": "jsd", **in_fp32},
        {"work": "write", "teacher": "fp32"},
        {"work": "write", "aligned_rows": False},
    ]
    return [BlockConfiguration(**change) for change in changes]
