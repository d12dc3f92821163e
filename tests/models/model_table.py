"""What works with which architecture, tried on tiny random models, as the table in docs/models.md.

`PYTHONPATH=tests:tests/models python -m model_table` tries all of them and writes the table (minutes);
`... python -m model_table gemma3 lfm2` renews those rows alone.
"""

import copy
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from architectures import NAMES, make_architecture

from srd_fast import SRDConfig, SRDTrainer, UserError, reflect
from srd_fast.models import load_model, save_student
from srd_fast.reflection import Sampling
from srd_fast.training.student import prune_and_warm_up

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
COLUMNS = ("without padding", "padded", "reflect", "cache", "prune", "LoRA", "save, load")
YES = "yes"
_ROWS = [{"instruction": f"Name colour {i}.", "output": "Red and green."} for i in range(4)]
# What differs from machine to machine: numbers of a difference, and a path.
_VARYING = re.compile(
    r",? by \d[\d.e+-]*( \(torch\.\w+\)| of the largest logit| of their size)?| ?\(best single factor[^)]*\)|'/[^']*'"
)


def _words(action: Callable[[], Any]) -> str:
    """ "yes", or the words of the refusal."""
    try:
        action()
    except UserError as e:
        return " ".join(_VARYING.sub("", str(e)).split())
    return YES


def try_architecture(name: str) -> dict[str, str]:
    """Everything that a run does, each with an untouched model. Values by column: "yes", or why not.

    Args:
        name: one of `architectures.NAMES`.
    """
    tokenizer = tiny.tiny_tokenizer()
    teacher, student = make_architecture(name, seed=1), make_architecture(name, seed=2)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        teacher.save_pretrained(folder / "teacher")
        tokenizer.save_pretrained(folder / "teacher")

        def trained(peft_config: Any = None, **fields: Any) -> SRDTrainer:
            args = SRDConfig(
                output_dir=str(folder / "trainer"),
                max_steps=1,
                per_device_train_batch_size=2,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                **fields,
            )
            models = copy.deepcopy(student), copy.deepcopy(teacher)
            options = {"processing_class": tokenizer, "peft_config": peft_config}
            trainer = SRDTrainer(*models, args, tiny.tiny_samples(4), **options)
            trainer.train()
            return trainer

        def save(trainer: SRDTrainer, place: str) -> None:
            save_student(trainer.model, tokenizer, folder / place)  # compares
            load_model(str(folder / place))

        def with_adapters() -> None:
            from peft import LoraConfig

            # peft takes no adapter in Mamba's last layer.
            places = {"target_modules": "all-linear", "exclude_modules": r".*out_proj"}
            linear = LoraConfig(r=4, task_type="CAUSAL_LM", **places)
            save(trained(linear, padding_free=False, learning_rate=0.02), "adapters")

        def answered() -> None:
            sampling = Sampling(max_new_tokens=2)
            reflect(copy.deepcopy(student), _ROWS, tokenizer, engine="transformers", sampling=sampling, progress=False)

        def pruned() -> None:
            prune_and_warm_up(str(folder / "teacher"), folder / "pruned", layers=3)
            load_model(str(folder / "pruned"))

        padded: list[SRDTrainer] = []
        actions: dict[str, Callable[[], Any]] = {
            "without padding": lambda: trained(padding_free=True),
            "padded": lambda: padded.append(trained(padding_free=False)),
            "reflect": answered,
            "cache": lambda: trained(padding_free=False, teacher_cache=str(folder / "cache")),
            "prune": pruned,
            "LoRA": with_adapters,
            "save, load": lambda: (
                save(padded[0], "saved") if padded else save_student(student, tokenizer, folder / "s")
            ),
        }
        assert tuple(actions) == COLUMNS
        return {column: _words(action) for column, action in actions.items()}


def read_table() -> dict[str, dict[str, str]]:
    """The committed table: by architecture and column."""
    text = PAGE.read_text(encoding="utf-8")
    words = {number: said for number, said in re.findall(r"^(\d+)\. (.*)$", text, re.M)}
    table = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith("`") and len(cells) == len(COLUMNS) + 1:
            said = [YES if cell == YES else words[cell.removeprefix("no, ")] for cell in cells[1:]]
            table[cells[0].strip("`")] = dict(zip(COLUMNS, said))
    return table


_BEGIN, _END = "<!-- table -->", "<!-- end of the table -->"


def write_table(table: Mapping[str, Mapping[str, str]]) -> None:
    """Write the table into its page; each reason for a "no" is listed once below it."""
    reasons: dict[str, int] = {}

    def cell(said: str) -> str:
        return YES if said == YES else f"no, {reasons.setdefault(said, len(reasons) + 1)}"

    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| `{name}` | " + " | ".join(cell(row[c]) for c in COLUMNS) + " |" for name, row in table.items()]
    lines += ["", *(f"{number}. {said}" for said, number in reasons.items())]
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    PAGE.write_text("\n".join([before + _BEGIN, "", *lines, "", _END + after]), encoding="utf-8")


def main(names: list[str]) -> None:
    """Try the architectures and write their rows."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    table = read_table()
    for name in names or NAMES:
        try:
            table[name] = try_architecture(name)
        except Exception as e:  # a fault: the row stays out, and the test of the table fails
            table.pop(name, None)
            print(name, "FAILS", type(e).__name__, e, flush=True)
            continue
        print(name, {c: said for c, said in table[name].items() if said != YES} or YES, flush=True)
        write_table({n: table[n] for n in NAMES if n in table})


if __name__ == "__main__":
    main(sys.argv[1:])
