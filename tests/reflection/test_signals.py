"""Difficulty signals besides ROUGE-L and cross-entropy: text metrics, and functions of the user's own."""

import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import Sampling, reflect
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.errors import UserError
from srd_fast.reflection import Reflected, difficulty_names, get_difficulty, register_difficulty

pytestmark = pytest.mark.usefixtures("own_registries")


def scores(name: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    nothing: Any = None
    rows = Dataset.from_dict({"references": references})
    return list(get_difficulty(name).function(Reflected(rows, answers, nothing, nothing)))


# Text metrics


def test_exact_match_takes_no_notice_of_case_and_whitespace() -> None:
    answers = ["Paris", " paris\n", "Paris.", "GROSSE  Straße", "a b", "b", "", ""]
    references = [["Paris"], ["Lyon", "PARIS"], ["Paris"], ["große STRASSE"], ["ab"], ["a", "c"], ["a"], []]
    assert scores("exact_match", answers, references) == [1, 1, 0, 1, 0, 0, 0, 0]


ANSWERS = [
    "the cat sat on the mat",
    "a dog",
    "",
    "the mat sat on a cat today",
    "The cat sat.",
    "12 apples are left",
    "same same",
]
REFERENCES = [
    ["the cat sat on the mat"],
    ["the cat sat on the mat", "a dogs", "two dogs ran"],
    ["something"],
    ["the cat sat on the mat yesterday", "the mat sat on a chair"],
    ["zebra"],
    ["12 apples are left", "11 pears"],
    [],
]


@pytest.mark.parametrize(("name", "theirs"), [("chrf", sacrebleu.sentence_chrf), ("bleu", sacrebleu.sentence_bleu)])
def test_metrics_are_sacrebleus_of_the_best_reference(name: str, theirs: Any) -> None:
    expected = [
        max((theirs(a, [r]).score / 100 for r in references), default=0) for a, references in zip(ANSWERS, REFERENCES)
    ]
    found = scores(name, ANSWERS, REFERENCES)
    assert found == pytest.approx(expected, abs=1e-12)
    assert found[0] == found[5] == 1
    assert found[2] == found[6] == 0
    assert 0.2 < found[3] < 0.9
    assert all(0 <= f <= 1 for f in found)
    assert get_difficulty(name).higher_is_easier


@pytest.mark.parametrize("name", ["chrf", "bleu"])
def test_without_sacrebleu_the_way_out_is_said_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=rf"'{name}' needs the sacrebleu package: pip install 'srd-fast\[metrics\]'"):
        get_difficulty(name)
    assert name in difficulty_names()
    assert get_difficulty("exact_match").higher_is_easier


# Functions of one's own

BREVITY = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Length:
    value: int

def brevity(reflected):
    return [-Length(len(text)).value for text in reflected.generations]

brevity.higher_is_easier = True

def silent(reflected):
    return [0.0]

def yes(reflected):
    return [0.0]

yes.higher_is_easier = "yes"
words = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with mine.py in it and a package on the path."""
    (tmp_path / "mine.py").write_text(BREVITY)
    (tmp_path / "lib" / "srd_own" / "deep").mkdir(parents=True)
    (tmp_path / "lib" / "srd_own" / "__init__.py").write_text("")
    (tmp_path / "lib" / "srd_own" / "deep" / "signals.py").write_text(BREVITY.replace("= True", "= False"))
    (tmp_path / "lib" / "srd_own" / "deep" / "broken.py").write_text("import srd_absent.part\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    return tmp_path


def test_a_function_of_a_file_and_of_a_module(folder: Path) -> None:
    for name, easier in [
        ("mine.py:brevity", True),
        ("./mine.py:brevity", True),
        (f"{folder}/mine.py:brevity", True),
        ("srd_own.deep.signals:brevity", False),
    ]:
        signal = get_difficulty(name)
        assert (signal.name, signal.higher_is_easier) == ("brevity", easier)
        assert scores(name, ["a", "four"], [["x"], ["y"]]) == [-1, -4]
    assert "brevity" not in difficulty_names()


def test_a_file_is_run_once_until_it_changes(folder: Path) -> None:
    file = folder / "counted.py"
    code = "open('runs', 'a').write('x')\ndef f(r): return [VALUE]\nf.higher_is_easier = False\n"
    for value, runs in [("1", "x"), ("2", "xx")]:
        file.write_text(code.replace("VALUE", value))
        os.utime(file, ns=(int(value), int(value)))
        for _ in range(3):
            assert scores("counted.py:f", ["a"], [["b"]]) == [int(value)]
        assert (folder / "runs").read_text() == runs
    assert not list(folder.glob("__pycache__"))


def test_a_file_hides_no_module_and_its_functions_can_be_pickled(folder: Path) -> None:
    (folder / "json.py").write_text("def f(r): return [1.0]\nf.higher_is_easier = True\n")
    function = get_difficulty("json.py:f").function
    assert sys.modules["json"].__name__ == "json"
    assert "json.py" not in (sys.modules["json"].__file__ or "")
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.py:f", "signal 'absent.py:f': file 'absent.py' does not exist"),
        ("mine:brevity", "there is no module 'mine'; install it"),
        ("srd_owm.signals:f", "there is no module 'srd_owm'; install it, put its folder on PYTHONPATH, or write path/"),
        ("srd_own.dep.signals:f", "there is no module 'srd_own.dep'"),
        ("mine.py:brevty", "unknown function 'brevty'; did you mean 'brevity'.*Known: Length, brevity, silent, yes"),
        ("mine.py:words", "signal 'mine.py:words' is not a function but of type int"),
        ("mine.py:silent", "direction: write silent.higher_is_easier = True below the function, or False if"),
        ("mine.py:yes", "does not say its direction"),
        ("srd_own.deep.broken:f", "importing srd_own.deep.broken failed with ModuleNotFoundError: No module"),
        ("raises.py:f", "importing raises.py failed with ZeroDivisionError: one line$"),
        ("wrong.py:f", r"importing wrong.py failed with SyntaxError: .*\(wrong.py, line 1\)"),
        ("mine.py:", "must be package.module:function or path/to/file.py:function"),
        (":f", "must be package.module:function or path/to/file.py:function"),
        ("taken.py:rouge_l", "the name 'rouge_l' is taken; rename the function"),
        ("taken.py:reason", "the name 'reason' is taken"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(name: str, message: str, folder: Path) -> None:
    (folder / "raises.py").write_text("raise ZeroDivisionError('one line\\nand more')\n")
    (folder / "wrong.py").write_text("def f(:\n")
    (folder / "taken.py").write_text("def rouge_l(r): ...\ndef reason(r): ...\nrouge_l.higher_is_easier = True\n")
    with pytest.raises(UserError, match=message) as caught:
        get_difficulty(name)
    assert "\n" not in str(caught.value)


def test_a_registered_name_with_a_colon_is_found() -> None:
    register_difficulty("a:b", lambda r: [1.0], higher_is_easier=False)
    assert get_difficulty("a:b").name == "a:b"


def test_reflect_makes_a_column_of_each(
    folder: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [dict(row) for row in make_quickstart_rows(3, seed=2)]
    signals = ["mine.py:brevity", "exact_match", "chrf", "bleu"]
    options: dict[str, Any] = {"engine": "transformers", "sampling": Sampling(max_new_tokens=4), "progress": False}
    found = reflect(tiny_model, rows, tiny_tokenizer, signals=signals, **options)
    assert found.column_names == ["sample_id", "generation", "brevity", "exact_match", "chrf", "bleu", "reason"]
    assert list(found["brevity"]) == [-len(text) for text in found["generation"]]
    assert list(found["reason"]) == [None] * 3
