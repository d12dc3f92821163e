"""Code on README and the pages of docs/ runs as it is written, on tiny models and a few rows that stand ready for it.

Python blocks run as they are. Of a shell block, `srd-fast` lines are read as the command would read them; README's run.
docs/extending.md and docs/data.md have tests of their own (test_extending.py, tests/data).
"""

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import typer
import yaml
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import CurriculumPlan
from srd_fast.cli import app
from srd_fast.data import Tokenisation, prepare_dataset
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.run.config import load_run_config

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = (
    README,
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("index", "run", "modes", "training", "teacher", "loss", "from_trl", "from_official", "from_top_k")
    ),
)
Names = dict[str, Any]


class Block(NamedTuple):
    """Code of a page, the heading above it, and the line of the file where it begins."""

    page: str
    heading: str
    line: int
    code: str

    @property
    def name(self) -> str:
        return f"{self.page}: {self.heading}"


def blocks(text: str, language: str, page: str = "") -> list[Block]:
    """All blocks whose language begins with these letters. Comments in other blocks are no headings."""
    found, heading = [], ""
    for part in re.finditer(
        r"^#+ (?P<heading>[^\n]+)$|^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", text, re.M | re.S
    ):
        if part["heading"]:
            heading = part["heading"]
        elif part["language"].lower().startswith(language):
            found.append(Block(page, heading, text.count("\n", 0, part.start("code")), part["code"]))
    return found


BLOCKS = [b for page in PAGES for b in blocks(page.read_text(encoding="utf-8"), "py", page.stem)]
# A line that goes on is one; a comment is none.
COMMANDS = [
    (block.page, line)
    for page in PAGES
    for block in blocks(page.read_text(encoding="utf-8"), "bash", page.stem)
    for lines in block.code.replace("\\\n", " ").splitlines()
    for line in lines.split(" && ")
    if "srd-fast " in line
]


class Surroundings(NamedTuple):
    """What a reader has at hand when the block begins, and what the page says is there when it ends."""

    before: Callable[[], Names]
    after: Callable[[Names, str], None]


@pytest.fixture
def surroundings(
    make_tiny_model: Callable[[int], PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> dict[str, Surroundings]:
    """Page and heading -> surroundings of the block below it."""
    rows = make_quickstart_rows(16, seed=3)

    def from_python() -> Names:
        data = {"tokenizer": tiny_tokenizer, "dataset": rows[:12], "dev": rows[12:]}
        return {"student": make_tiny_model(1), "teacher": make_tiny_model(2), **data}

    def trained(names: Names, printed: str) -> None:
        assert [len(x) for x in names["plan"].subsets] == [3, 3, 3]
        # The preset's 8 passes over 3, 6 and 9 samples, 8 samples a step.
        assert names["trainer"].state.global_step == 8 * (3 + 6 + 9) / 8
        for figure in ("rouge_l", "cross_entropy", "kl"):
            assert re.search(rf"'{figure}': \d", printed), printed

    def trained_and_saved(names: Names, printed: str) -> None:
        trained(names, printed)
        assert CurriculumPlan.load("plan.json") == names["plan"]

    def kept_the_best(names: Names, printed: str) -> None:
        history = names["trainer"].state.log_history
        found = {x["step"]: x["eval_rouge_l"] for x in history if "eval_rouge_l" in x}
        best = max(found, key=lambda step: found[step])
        assert f"{best} {found[best]}\n" in printed

    def with_a_teacher_in_a_folder() -> Names:
        make_tiny_model(2).save_pretrained("DIR_OR_HUB_ID")
        tiny_tokenizer.save_pretrained("DIR_OR_HUB_ID")
        return {"student": make_tiny_model(1), "dataset": rows[:12], "tokenizer": tiny_tokenizer}

    def trained_from_the_cache(names: Names, printed: str) -> None:
        assert list(Path("teacher_cache").rglob("*.safetensors"))
        assert names["trainer"].state.global_step > 0

    def from_trl() -> Names:
        talks = [
            {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]}
            for r in rows
        ]
        models = {"model": make_tiny_model(1), "teacher_model": make_tiny_model(2)}
        return {**models, "train_dataset": talks, "tokenizer": tiny_tokenizer}

    def with_trl() -> Names:
        pytest.importorskip("trl", reason="trl is missing: pip install 'srd-fast[trl]'")
        names = from_trl()
        for number, talk in enumerate(names["train_dataset"]):
            talk["sample_id"] = f"r{number}"
        return {**names, "train_dataset": Dataset.from_list(names["train_dataset"])}

    def with_a_trainer() -> Names:
        names = with_trl()
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig("out", per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True)
        given = {"model": names["model"], "args": args, "processing_class": tiny_tokenizer}
        return {**names, "trainer": SFTTrainer(train_dataset=names["train_dataset"], **given)}

    def told_of_three_stages(names: Names, printed: str) -> None:
        assert names["trainer"].state.global_step == names["schedule"].total_steps == 1 + 2 + 3
        for line in ("1 1.0 0.3", "2 1.5 ", "3 2.0 0.1"):
            assert f"\n{line}" in f"\n{printed}"

    def with_lightning() -> Names:
        pytest.importorskip("lightning", reason="lightning is missing: pip install lightning")
        names = in_a_loop()
        names["loader"] = DataLoader(names["loader"], batch_size=None)
        return {**names, "before": names["student"].get_output_embeddings().weight.detach().clone()}

    def trained_by_lightning(names: Names, printed: str) -> None:
        assert names["trainer"].global_step == 4
        assert not torch.equal(names["student"].get_output_embeddings().weight, names["before"])
        logged = names["trainer"].logged_metrics
        assert logged["divergence"] > 0
        assert logged["cross_entropy"] > 0

    def with_their_answers() -> Names:
        # Their prompt is the template's, stripped; the answers stand in another order than the rows.
        tokenisation = Tokenisation(tiny_tokenizer)
        samples = prepare_dataset(rows, tokenisation).dataset
        lines = [
            json.dumps({"prompt": prompt.strip(), "LLM_output": references[0], "lm_loss": float(i)})
            for i, (prompt, references) in enumerate(zip(samples["prompt"], samples["references"]))
        ]
        Path("answers.jsonl").write_text("\n".join(reversed(lines)), encoding="utf-8")
        return {"dataset": rows, "tokenizer": tiny_tokenizer}

    def planned(names: Names, printed: str) -> None:
        assert CurriculumPlan.load("plan.json") == names["plan"]
        # All answers are right, so the losses order them: the easiest come first, the last quarter is dropped.
        ids = list(names["scores"]["sample_id"])
        assert [list(subset) for subset in names["plan"].subsets] == [ids[0:4], ids[4:8], ids[8:12]]

    def with_top_k() -> Names:
        teacher, lines = make_tiny_model(2), []
        for sample in tiny.tiny_samples(4):
            with torch.no_grad():
                log_p = teacher(torch.tensor([sample["input_ids"]])).logits[0, :-1].log_softmax(-1).topk(40)
            kept = {"token_ids": log_p.indices.tolist(), "top_values": log_p.values.tolist()}
            lines.append({"input_ids": sample["input_ids"], "labels": sample["labels"], **kept})
        Dataset.from_list(lines).to_parquet("logits.parquet")
        return {"student": make_tiny_model(1), "tokenizer": tiny_tokenizer}

    def two_steps(names: Names, printed: str) -> None:
        assert names["trainer"].state.global_step == 2

    def hidden_states() -> Names:
        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), requires_grad=True)

        labels = torch.tensor([[1, 2, tiny.IGNORE, 3], [tiny.IGNORE, 0, 4, 5]])
        student, teacher = noise(30, 8), noise(30, 12)
        heads = {"student_weight": student, "teacher_weight": teacher, "student_head": student, "teacher_head": teacher}
        return {"student_hidden": noise(2, 4, 8), "teacher_hidden": noise(2, 4, 12), "labels": labels, **heads}

    def differentiated(names: Names, printed: str) -> None:
        out = names["out"]
        assert names["student_hidden"].grad.abs().sum() > 0
        assert names["student_weight"].grad.abs().sum() > 0
        assert not any(x.requires_grad for x in (out.divergence, out.cross_entropy, out.entropy))

    def three_numbers(names: Names, printed: str) -> None:
        assert len(printed.split()) == 3

    def in_a_loop() -> Names:
        models = {"student": make_tiny_model(1), "teacher": make_tiny_model(2)}
        optimizer = torch.optim.SGD(models["student"].parameters(), lr=0.1)
        batch = tiny.collate(tiny.tiny_samples(4))
        return {**models, "optimizer": optimizer, "loader": [batch, batch]}

    def went_down(names: Names, printed: str) -> None:
        again = names["model_distillation_loss"](
            names["student"], names["teacher"], names["batch"],
            divergence="forward_kl", temperature=2.0, sft_weight=0.1,
        )  # fmt: skip
        assert again.loss < names["out"].loss

    return {
        "README: From Python": Surroundings(from_python, trained),
        "README: The loss alone": Surroundings(hidden_states, differentiated),
        "README: From TRL": Surroundings(from_trl, two_steps),
        "index: In Python": Surroundings(dict, three_numbers),
        "training: Training from Python": Surroundings(from_python, trained_and_saved),
        "training: The best student by its answers": Surroundings(from_python, kept_the_best),
        "teacher: The teacher, once": Surroundings(with_a_teacher_in_a_folder, trained_from_the_cache),
        "loss: The loss alone": Surroundings(hidden_states, differentiated),
        "loss: A loop of your own": Surroundings(in_a_loop, went_down),
        "loss: Lightning": Surroundings(with_lightning, trained_by_lightning),
        "from_top_k: From DistillKit's and axolotl's top-k files": Surroundings(with_top_k, trained_from_the_cache),
        "from_official: Your reflections": Surroundings(with_their_answers, planned),
        "from_trl: The same trainer": Surroundings(with_trl, two_steps),
        "from_trl: A curriculum for a trainer": Surroundings(with_a_trainer, told_of_three_stages),
        "from_trl: SRDTrainer": Surroundings(from_trl, two_steps),
    }


def test_no_block_is_left_out(surroundings: dict[str, Surroundings]) -> None:
    assert sorted(b.name for b in BLOCKS) == sorted(surroundings)


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("block", BLOCKS, ids=[b.name for b in BLOCKS])
def test_a_block_runs(block: Block, surroundings: dict[str, Surroundings], capsys: pytest.CaptureFixture[str]) -> None:
    if block.name not in surroundings:
        pytest.fail(f"nothing stands ready for the block under {block.name!r}: add its surroundings")
    before, after = surroundings[block.name]
    names = before()
    # The empty lines make a traceback name the page's own lines.
    exec(compile("\n" * block.line + block.code, f"{block.page}.md", "exec"), names)
    after(names, capsys.readouterr().out)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line[:60] for _, line in COMMANDS])
def test_a_command_is_one(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its verb, options and keys are known. CONFIG, and what `init` writes, stand for a file of the reader's."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(line[line.index("srd-fast ") :], comments=True)[1:]
    readers = ("CONFIG", "mine/config.yaml")
    words = [str(ROOT / "examples" / "quickstart.yaml") if word in readers else word for word in words]
    verb = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    given = verb.make_context(words[0], words[1:]).params
    if given.get("config") is not None:
        load_run_config(given["config"], given["overrides"] or [])


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_your_own_models_and_data(
    make_tiny_model: Callable[[int], PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """README's lines as a shell runs them; a whole run of the second."""
    lines = [line for page, line in COMMANDS if page == "README" and "DIR_OR_HUB_ID" in line]
    first, own = lines
    make_tiny_model(2).save_pretrained("DIR_OR_HUB_ID")
    tiny_tokenizer.save_pretrained("DIR_OR_HUB_ID")
    rows = make_quickstart_rows(32, seed=3)
    for name, some in (("train", rows[:24]), ("dev", rows[24:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    Path("examples").symlink_to(ROOT / "examples")
    for line in (first, own):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert load_run_config("mine/config.yaml").data == "train.jsonl"
    assert Path("runs/mine/report.html").stat().st_size > 10_000
    assert yaml.safe_load(Path("runs/mine/config.yaml").read_text())["template"] == "Q: {instruction}\nA: "


def test_blocks_are_found_with_their_headings_and_lines() -> None:
    text = "# A\n```bash\n# no heading\n```\n## B\ntext\n```python\nx = 1\n```\n```py\ny = 2\n```\n"
    assert blocks(text, "py", "p") == [Block("p", "B", 7, "x = 1\n"), Block("p", "B", 10, "y = 2\n")]


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem)
def test_code_is_no_wider_than_a_page(page: Path) -> None:
    """What 1,200 pixels hold, here and on GitHub; the rest of a line would have to be scrolled to."""
    code = re.findall(r"^```\w*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    assert [line for block in code for line in block.splitlines() if len(line) > 110] == []


def test_the_front_page_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
