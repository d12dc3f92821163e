"""Which cells `benchmarks.train_gpu` measures, in which order, and which batch a search tries next.

A cell is one side at one batch of one pair.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .rows import Row

LENGTHS = (256, 1024)
STEP, LARGEST = "a step", "largest batch"
OPTIMIZER = "adamw_torch_fused"  # of all sides

CACHE, LIVE = "srd-fast, cache", "srd-fast, live teacher"
CACHE_COMPILED, LIVE_COMPILED = f"{CACHE}, compiled", f"{LIVE}, compiled"
LORA, LORA_COMPILED = f"{CACHE}, LoRA", f"{CACHE}, LoRA, compiled"
MICRO = f"{CACHE}, micro-batches of 16,384 tokens"
GKD, GKD_LIGER, DISTILLATION = "trl GKDTrainer", "trl GKDTrainer, liger-kernel", "trl DistillationTrainer"
PLAIN, PLAIN_COMPILED = "plain loop", "plain loop, compiled"
# The most telling first.
SIDES = (
    CACHE, GKD, CACHE_COMPILED, LIVE, LIVE_COMPILED, PLAIN, GKD_LIGER, LORA, LORA_COMPILED, MICRO, DISTILLATION,
    PLAIN_COMPILED,
)  # fmt: skip

SMALL, LARGE, GEMMA, TINY = "qwen2.5-1.5b-0.5b", "qwen2.5-7b-1.5b", "gemma3-4b-1b", "tiny"
PAIRS = (SMALL, LARGE, GEMMA, TINY)
BATCHES = (4, 8, 16, 32)


@dataclass(frozen=True)
class Cell:
    """One side at one batch of one pair; batch 0: the search for the largest that fits."""

    pair: str
    batch: int
    side: str

    @property
    def case(self) -> str:
        """Of its rows."""
        return STEP if self.batch else LARGEST

    @property
    def shape(self) -> str:
        """Of its rows."""
        batch = f", batch {self.batch}" if self.batch else ""
        return f"{self.pair}{batch}, samples of {LENGTHS[0]} to {LENGTHS[1]} tokens"

    def __str__(self) -> str:
        return f"{self.pair}, {f'batch {self.batch}' if self.batch else LARGEST}, {self.side}"


def cell_of(row: Row) -> Cell | None:
    """The cell that a row is of; None for rows of another kind."""
    if row.case not in (STEP, LARGEST):
        return None
    found = re.match(r"(.*?)(?:, batch (\d+))?, samples of", row.shape)
    return Cell(found[1], int(found[2] or 0), row.provider) if found else None


# What one would want to know with minutes of a GPU. The rest of the table follows, block by block.
FIRST = (
    Cell(SMALL, 16, CACHE),
    Cell(SMALL, 16, CACHE_COMPILED),
    *(Cell(SMALL, 8, side) for side in (GKD, CACHE, LIVE, CACHE_COMPILED, LIVE_COMPILED)),
    Cell(LARGE, 8, CACHE),
    *(Cell(SMALL, 4, side) for side in (GKD, CACHE, PLAIN, CACHE_COMPILED)),
    *(Cell(SMALL, 0, side) for side in (GKD, CACHE)),
    Cell(LARGE, 8, CACHE_COMPILED),
    Cell(LARGE, 8, LIVE),
    Cell(GEMMA, 8, CACHE),
    Cell(GEMMA, 8, GKD),
)
BLOCKS = (
    (SMALL, 8), (SMALL, 16), (LARGE, 8), (SMALL, 4), (GEMMA, 8), (SMALL, 0), (LARGE, 4), (LARGE, 16), (LARGE, 0),
    (GEMMA, 4), (GEMMA, 16), (GEMMA, 0), (SMALL, 32), (LARGE, 32), (GEMMA, 32),
)  # fmt: skip


def order(pairs: Sequence[str], batches: Sequence[int], sides: Sequence[str]) -> Iterator[Cell]:
    """Cells of these pairs, batches (0: the search) and sides, the most telling first, each once."""
    # What BLOCKS does not have, such as a batch of one's own, comes last.
    blocks = dict.fromkeys([*BLOCKS, *((pair, batch) for batch in batches for pair in pairs)])
    places = {name: i for i, name in enumerate(SIDES)}
    by_place = sorted(sides, key=lambda name: places.get(name, len(places)))
    every = dict.fromkeys([*FIRST, *(Cell(pair, batch, side) for pair, batch in blocks for side in by_place)])
    return (c for c in every if c.pair in pairs and c.batch in batches and c.side in sides)


def next_batch(fits: Mapping[int, bool], most: int, start: int = 4) -> int | None:
    """What to try for the largest batch: doubled while all fit, then bisected to an eighth; None where it is known.

    fits: of the batches tried. most: where doubling ends.
    """
    too_large = min((n for n, fine in fits.items() if not fine), default=None)
    largest = max((n for n, fine in fits.items() if fine and (too_large is None or n < too_large)), default=0)
    if too_large is None:
        return None if largest >= most else min(most, 2 * largest or start)
    return None if too_large - largest <= max(1, largest // 8) else (largest + too_large) // 2
