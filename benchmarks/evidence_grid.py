"""What `benchmarks.evidence` trains: data sets, pairs of models, cells, and which of them come first."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

PAPER = ["preset=paper"]
# Plain distillation's loss: the divergence alone, at temperature 1.
PLAIN_LOSS = ["distill.temperature_start=1", "distill.temperature_end=1", "distill.sft_weight_start=0",
              "distill.sft_weight_end=0"]  # fmt: skip
# Of a training that goes on from a whole checkpoint at each stage's border.
WHOLE = ["distill.save_strategy=steps", "distill.save_only_model=false", "distill.save_total_limit=2"]
NO_DROP, BY_CHANCE, ALL_ROWS = "curate.keep=1", "curate.method=random", "curate.method=none"

FULL, SRD, RANDOM, DROP = "full KD", "SRD", "random 75 %, random stages", "hardest 25 % dropped, random stages"
LEARNABLE = "learnable"
FIRST = (FULL, SRD, RANDOM, DROP)
# Other modes of a run, each with the loss of its paper, and with what their names do not say. DistiLLM's share of own
# answers hangs on the validation loss.
_AT_1 = ["distill.temperature_start=1", "distill.temperature_end=1"]
_SAMPLED = [*_AT_1, "reflect.temperature=1"]
MODES: dict[str, list[str]] = {
    "sft": [],
    "seqkd": [],
    "offline_on_policy": _SAMPLED,
    "on_policy": _AT_1,
    "distillm": [*_AT_1, "distill.eval_strategy=steps", "distill.eval_steps=10"],
}
# Cells with which all others are compared, and what the figures of the difference are called.
REFERENCES = {FULL: "full", RANDOM: "random"}

# Overrides of the run's config. All have three stages with as many steps each, and the paper's schedule of temperature
# and weight, where nothing else is said: they differ by their rows and the order of these. Modes have their own loss.
CELLS: dict[str, list[str]] = {
    FULL: [*PAPER, ALL_ROWS],
    SRD: PAPER,
    RANDOM: [*PAPER, BY_CHANCE],
    DROP: [*PAPER, "curate.order=shuffled"],
    LEARNABLE: [*PAPER, "reflect.signals=[rouge_l, cross_entropy, teacher_cross_entropy, gap]",
                "curate.signals={gap: 1}", "curate.order=shuffled"],
    "full KD, schedule off": [*PAPER, ALL_ROWS, *PLAIN_LOSS],
    "SRD, schedule off": [*PAPER, *PLAIN_LOSS],
    "random 75 %, schedule off": [*PAPER, BY_CHANCE, *PLAIN_LOSS],
    "curriculum only": [*PAPER, NO_DROP],
    "hard to easy": [*PAPER, NO_DROP, "curate.signals={rouge_l: -1, cross_entropy: -1}"],
    "all rows, random stages": [*PAPER, NO_DROP, "curate.order=shuffled"],
    "SRD, keep 0.5": [*PAPER, "curate.keep=0.5"],
    "SRD, keep 0.9": [*PAPER, "curate.keep=0.9"],
    "SRD, keep knee": [*PAPER, "curate.keep=knee"],
    "SRD, ROUGE-L alone": [*PAPER, "curate.signals={rouge_l: 1}"],
    "SRD, cross-entropy alone": [*PAPER, "curate.signals={cross_entropy: 1}"],
    "SRD, reflecting again": [*PAPER, "curate.reflect_again=true", *WHOLE],
    **{
        f"{name}, {divergence}": [*overrides, f"distill.divergence={divergence}"]
        for divergence in ("reverse_kl", "skew_forward_kl", "skew_reverse_kl")
        for name, overrides in (("full KD", [*PAPER, ALL_ROWS]), ("SRD", PAPER), ("random 75 %", [*PAPER, BY_CHANCE]))
    },
    **{
        name: [*overrides, f"mode={mode}", *more]
        for mode, more in MODES.items()
        for name, overrides in ((mode, [*PAPER, ALL_ROWS]), (f"SRD, {mode}", PAPER))
    },
    "SRD, offline_on_policy, answers again": [
        *PAPER, "mode=offline_on_policy", "answers_again=true", *_SAMPLED, *WHOLE,
    ],
    "SE-KD": ["preset=SE-KD"],
    "SE-KD3X": ["preset=SE-KD3X"],
    "SRD + SE-KD": [*PAPER, "distill.position_selection=topk_student_entropy", "distill.position_ratio=0.2"],
}  # fmt: skip
OF_MODES = [name for name, x in CELLS.items() if any(o.startswith("mode=") for o in x)]
# Those whose rows hang on the reflections. At equal seconds these count against their training. Modes have no cells of
# equal seconds: not every step of theirs takes the same.
REFLECTING = [
    name for name, x in CELLS.items() if x[:1] == PAPER and not {ALL_ROWS, BY_CHANCE} & set(x) and name not in OF_MODES
]


@dataclass(frozen=True)
class DataSet:
    """Rows of a data set.

    Args:
        train: name of a json lines file; empty for rows that the project makes.
        validation: names of such files; the first is evaluated on in the run, on all of them answers are sampled.
        new_tokens: longest answer.
        held_out: without a validation file, how many of the last training rows are one.
        metrics: of the answers, besides ROUGE-L, as `evaluate.metrics` takes them.
        wrong: share of the training rows that get another row's answer.
    """

    train: str
    validation: tuple[str, ...]
    new_tokens: int
    held_out: int = 0
    metrics: tuple[str, ...] = ()
    wrong: float = 0.0


# Of rows that the project makes.
QUICKSTART_ROWS = 192
_SMALL = ("llms_from_scratch_train", ("llms_from_scratch_dev",), 64)
DATA = {
    "llms_from_scratch": DataSet(*_SMALL),
    "dolly": DataSet("dolly_open_qa_train", ("dolly_valid", "self_inst_valid", "sinst_3-6_valid"), 128),
    "gsm8k": DataSet("gsm8k_train", (), 256, held_out=300, metrics=("numeric_match",)),
    "quickstart": DataSet("", (), 32, held_out=64),
    "llms_from_scratch, a tenth wrong": DataSet(*_SMALL, wrong=0.1),
}
AS_IT_IS, FINE_TUNED = "as it is", "fine-tuned"
TEACHERS = (AS_IT_IS, FINE_TUNED)
LAYERS = (15, 8)
PASSES, SECONDS = "passes", "seconds"
EQUAL = (PASSES, SECONDS)


class Setting(NamedTuple):
    """Between whose students differences are formed."""

    data: str
    layers: int
    teacher: str


class Cell(NamedTuple):
    """One training. equal: what it has as much of as full KD, sample passes or seconds."""

    setting: Setting
    name: str
    seed: int
    equal: str = PASSES

    @property
    def slug(self) -> str:
        """A name for files."""
        name = "".join(c if c.isalnum() else "_" for c in self.name)
        return f"{name}-{self.seed}" + (f"-{SECONDS}" if self.equal == SECONDS else "")


MAIN = Setting("llms_from_scratch", 15, AS_IT_IS)


def cells(settings: list[Setting], names: list[str], seeds: list[int], equal: list[str]) -> list[Cell]:
    """All cells of a grid, the most telling first: seed after seed, so that what there is can be compared at any time.

    Args:
        settings: wanted.
        names: of the cells wanted.
        seeds: wanted. The first three come first; those beyond are of the first four cells alone.
        equal: wanted.
    """

    def block(where: list[Setting], of: list[str], some: list[int], equal: str = PASSES) -> Iterator[Cell]:
        for setting, seed, name in product(where, some, of):
            yield Cell(setting, name, seed, equal)

    main = [s for s in settings if s == MAIN] or settings[:1]
    others = [s for s in settings if s not in main]
    early, late = seeds[:3], seeds[3:]
    first = [n for n in names if n in FIRST]
    second = [n for n in names if n in (LEARNABLE, "full KD, schedule off", "SRD, schedule off", "curriculum only")]
    found = [
        *block(main, first, early),
        *block(main, second, early),
        *block(others, [n for n in names if n in (*FIRST, LEARNABLE)], early),
        *block(main, [n for n in names if n in (SRD, DROP, LEARNABLE)], early, SECONDS),
        *block([*main, *others], first, late),
        *block(main, [n for n in names if n in OF_MODES], early),
        *block(main, names, early),
        *block(others, [n for n in names if n in (SRD, DROP, LEARNABLE)], early, SECONDS),
        *block(others, names, early),
        *block([*main, *others], [n for n in names if n in REFLECTING], early, SECONDS),
    ]
    return [c for c in dict.fromkeys(found) if c.equal in equal]
