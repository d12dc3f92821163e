"""Every ```python block of README runs as it is written, on tiny models and a few rows that stand ready for it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import CurriculumPlan
from srd_fast.data.quickstart import make_quickstart_rows

README = Path(__file__).resolve().parents[2] / "README.md"
Names = dict[str, Any]


class Block(NamedTuple):
    """Code of README, the heading above it, and the line of the file where it begins."""

    heading: str
    line: int
    code: str


def blocks(text: str) -> list[Block]:
    """All blocks that call themselves Python. Comments in other blocks are no headings."""
    found, heading = [], ""
    for part in re.finditer(
        r"^#+ (?P<heading>[^\n]+)$|^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", text, re.M | re.S
    ):
        if part["heading"]:
            heading = part["heading"]
        elif part["language"].lower().startswith("py"):
            found.append(Block(heading, text.count("\n", 0, part.start("code")), part["code"]))
    return found


BLOCKS = blocks(README.read_text(encoding="utf-8"))


class Surroundings(NamedTuple):
    """What a reader has at hand when the block begins, and what README says is there when it ends."""

    before: Callable[[], Names]
    after: Callable[[Names, str], None]


@pytest.fixture
def surroundings(
    make_tiny_model: Callable[[int], PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> dict[str, Surroundings]:
    """Heading -> surroundings of the block below it."""
    rows = make_quickstart_rows(16, seed=3)

    def from_python() -> Names:
        data = {"tokenizer": tiny_tokenizer, "dataset": rows[:12], "dev": rows[12:]}
        return {"student": make_tiny_model(1), "teacher": make_tiny_model(2), **data}

    def trained(names: Names, printed: str) -> None:
        plan = CurriculumPlan.load("plan.json")
        assert [len(x) for x in plan.subsets] == [3, 3, 3]
        # The preset's 8 passes over 3, 6 and 9 samples, 8 samples a step.
        assert names["trainer"].state.global_step == 8 * (3 + 6 + 9) / 8
        for figure in ("rouge_l", "cross_entropy", "kl"):
            assert re.search(rf"'{figure}': \d", printed), printed

    def with_a_teacher_in_a_folder() -> Names:
        make_tiny_model(2).save_pretrained("DIR_OR_HUB_ID")
        tiny_tokenizer.save_pretrained("DIR_OR_HUB_ID")
        return {"student": make_tiny_model(1), "dataset": rows[:12], "tokenizer": tiny_tokenizer}

    def trained_from_the_cache(names: Names, printed: str) -> None:
        assert list(Path("teacher_cache").rglob("*.safetensors"))
        assert names["trainer"].state.global_step > 0

    def hidden_states() -> Names:
        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), requires_grad=True)

        labels = torch.tensor([[1, 2, tiny.IGNORE, 3], [tiny.IGNORE, 0, 4, 5]])
        student = {"student_hidden": noise(2, 4, 8), "student_weight": noise(30, 8)}
        return {**student, "teacher_hidden": noise(2, 4, 12), "teacher_weight": noise(30, 12), "labels": labels}

    def differentiated(names: Names, printed: str) -> None:
        out = names["out"]
        assert names["student_hidden"].grad.abs().sum() > 0
        assert names["student_weight"].grad.abs().sum() > 0
        assert not any(x.requires_grad for x in (out.divergence, out.cross_entropy, out.entropy))
        assert out.num_items == 6

    return {
        "From Python": Surroundings(from_python, trained),
        "The teacher, once": Surroundings(with_a_teacher_in_a_folder, trained_from_the_cache),
        "The loss alone": Surroundings(hidden_states, differentiated),
    }


def test_no_block_is_left_out(surroundings: dict[str, Surroundings]) -> None:
    assert sorted(b.heading for b in BLOCKS) == sorted(surroundings)


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("block", BLOCKS, ids=[b.heading for b in BLOCKS])
def test_a_block_runs(block: Block, surroundings: dict[str, Surroundings], capsys: pytest.CaptureFixture[str]) -> None:
    if block.heading not in surroundings:
        pytest.fail(f"nothing stands ready for the block under {block.heading!r}: add its surroundings")
    before, after = surroundings[block.heading]
    names = before()
    # The empty lines make a traceback name README's own lines.
    exec(compile("\n" * block.line + block.code, str(README), "exec"), names)
    after(names, capsys.readouterr().out)


def test_blocks_are_found_with_their_headings_and_lines() -> None:
    text = "# A\n```bash\n# no heading\n```\n## B\ntext\n```python\nx = 1\n```\n```py\ny = 2\n```\n"
    assert blocks(text) == [Block("B", 7, "x = 1\n"), Block("B", 10, "y = 2\n")]
