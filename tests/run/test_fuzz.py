"""Bad data, bad configs, bad arguments: each is used, or refused in one line; never a traceback, a hang or a NaN.

SRD_FAST_FUZZ=N multiplies the examples; `pytest -m long tests/run/test_fuzz.py` runs over 20,000 and prints how many.
"""

import gzip
import io
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import srd_fast
from transformers import PreTrainedTokenizerFast

from srd_fast.data import IGNORE_INDEX, PreparedData, Tokenisation, first_label, prepare_dataset, read_source
from srd_fast.errors import FaultsError, UserError
from srd_fast.losses import distillation_loss, divergence_names
from srd_fast.run.config import RunConfig, load_run_config

TIMES = int(os.environ.get("SRD_FAST_FUZZ", "1"))
SECONDS = 20.0  # of processor time for one input; each takes far less, ten megabytes and busy cores included
# By kind of input: examples of a usual run, and times as many of a slow one. Over 25,000 there.
USUAL = {"lines": 100, "arrays": 20, "gzip": 30, "parquet": 50, "config": 80, "overrides": 50, "loss": 100}
SLOW_TIMES = 65
Check = Callable[[Any], None]


def fuzz(strategy: st.SearchStrategy[Any], check: Check, count: int, random: bool = False) -> int:
    """Check `count` examples, each within its time. Returns how many there were."""
    done = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=not random,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example: Any) -> None:
        nonlocal done
        done += 1
        started = time.process_time()
        check(example)
        assert time.process_time() - started < SECONDS

    run()
    return done


def told(error: UserError, words: str = "") -> str:
    """The message, one line for each fault, which can be written. words: a pattern that each has."""
    for message in [fault.text for fault in error.faults] if isinstance(error, FaultsError) else [str(error)]:
        assert re.search(words, message)
        assert message.strip()
        assert len(message.splitlines()) == 1
        assert len(message.encode()) < 4000
    return str(error)


# Rows

ODD_TEXTS = [
    "", " ", "\0", "a\0b", "\ud800", "x\udfff", "\u2028", "\x85", "\ufeff", "\r\n", "<|endoftext|>", "{input}", "{{",
    "%s",
    "a" * 5000, " " * 5000, "漢" * 2000, "\u0301" * 2000, "😀", "NaN", "null", "\x1b[31m", "\x7f", "\u202e",
]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=20), st.text(st.characters(), max_size=8))
NUMBERS = st.one_of(
    st.integers(-3, 420),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 10**4299]),
    st.floats(),
    st.sampled_from([float("nan"), float("inf"), 1e308, -0.0]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES, lambda below: st.lists(below, max_size=4) | st.dictionaries(TEXTS, below, max_size=3), max_leaves=8
)
GOOD: list[dict[str, Any]] = [
    {"instruction": "Say hi.", "input": "", "output": "Hi."},
    {"prompt": "Say hi.", "completion": "Hi."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"input_ids": [5, 6, 0], "labels": [-100, 6, 0]},
]
TURNS = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": st.sampled_from(["user", "assistant", "tool"]) | LEAVES, "content": LEAVES}
    )
    | VALUES,
    max_size=4,
)
TOKENS = st.lists(st.one_of(st.integers(-101, 401), st.just(IGNORE_INDEX), NUMBERS), max_size=5)
COLUMNS = sorted({c for row in GOOD for c in row} | {"references", "tests", "text", ""})
ANY_ROW = st.dictionaries(st.sampled_from(COLUMNS) | TEXTS, VALUES, max_size=4)


@st.composite
def bad_rows(draw: st.DrawFn) -> dict[str, Any]:
    """A row of some format in which some columns are wrong, missing or too many; sometimes a good one."""
    row = dict(draw(st.sampled_from(GOOD)))
    for column in draw(st.lists(st.sampled_from([*row, "references", "tests", "sample_id", "x"]), max_size=3)):
        kind = {"messages": TURNS, "input_ids": TOKENS, "labels": TOKENS}.get(column, st.lists(TEXTS, max_size=3))
        if column == "sample_id" and draw(st.integers(0, 4)):
            continue
        if draw(st.booleans()):
            row[column] = draw(VALUES | kind)
        else:
            row.pop(column, None)
    return row


ROWS = st.one_of(bad_rows(), bad_rows(), st.sampled_from(GOOD), ANY_ROW)
BAD_LINES = [
    b"[", b"{", b"[]", b"{}", b"null", b"1", b'"text"', b"{'a': 1}", b'{"a": 1}}', b'{"a": 1} {"a": 2}', b'{"a"\0: 1}',
    b'{"instruction": "a\0b", "output": "x"}', b'{"instruction": "a", "output": "\xff"}', b"\xef\xbb\xbf{}", b"\xa0",
    b'{"instruction": "a", "instruction": 2, "output": "x"}', b'{"prompt": NaN, "completion": -Infinity}', b"\x1f\x8b",
    b'{"input_ids": [1, ' + b"9" * 5000 + b'], "labels": [-100, 1]}', b'{"sample_id": "\\ud800"}', b"\x1c", b"\x0b",
    b'{"instruction": ' * 50_000, b"[" * 50_000, b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", b"\xc2\x85",
    b'{"instruction": "a", "output": "x", "input": ' + b"[" * 400 + b"]" * 400 + b"}", b"  ", b"\t",
    b'{"instruction": "\\ud800\\udc00", "output": "\\udc00"}',
]  # fmt: skip


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """One line of a file, without its end: a row, a part of one, or something else."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from(BAD_LINES))
    if kind == 1:
        return draw(st.binary(max_size=30))
    value = draw(VALUES if kind == 2 else ROWS)
    # As escapes, or as they are, but for halves of surrogate pairs, which UTF-8 cannot hold.
    text = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return text[: draw(st.integers(0, len(text)))] if kind == 3 else text


@st.composite
def line_files(draw: st.DrawFn) -> bytes:
    """A json-lines file."""
    end = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r", b"\n\n"]))
    content = end.join(draw(st.lists(lines(), max_size=8))) + draw(st.sampled_from([b"", end, b"\0", b"\n \n"]))
    content = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\n"])) + content
    return content


@st.composite
def array_files(draw: st.DrawFn) -> bytes:
    """A file that holds a json array, whole or damaged."""
    content = json.dumps(draw(st.lists(ROWS | VALUES, max_size=6)), indent=draw(st.sampled_from([None, 1]))).encode()
    damage = draw(st.integers(0, 5))
    if damage == 0:
        return content[: draw(st.integers(0, len(content)))]
    return content + draw(st.binary(max_size=6)) if damage == 1 else content


@st.composite
def gzip_files(draw: st.DrawFn) -> bytes:
    """A gzipped file, whole, cut off, with wrong bytes, or with more behind it."""
    content = gzip.compress(draw(line_files()), 1)
    damage = draw(st.integers(0, 4))
    if damage == 0:
        return content[: draw(st.integers(0, len(content)))]
    if damage == 1:
        place = draw(st.integers(0, len(content) - 1))
        return content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place + 1 :]
    return content + draw(st.binary(max_size=6)) if damage == 2 else content


ARROW_TYPES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (pa.string(), st.text(max_size=8)),
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.float64(), st.floats()),
    (pa.bool_(), st.booleans()),
    (pa.binary(), st.binary(max_size=8)),
    (pa.timestamp("ns"), st.integers(-(2**63), 2**63 - 1)),
    (pa.date32(), st.integers(-(2**31), 2**31 - 1)),
    (pa.list_(pa.string()), st.lists(st.none() | st.text(max_size=5), max_size=3)),
    (pa.list_(pa.int64()), st.lists(st.none() | st.integers(-101, 401), max_size=4)),
    (pa.list_(pa.list_(pa.int8())), st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=2)),
    (
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        st.lists(
            st.none() | st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=5)}), max_size=3
        ),
    ),
    (pa.map_(pa.string(), pa.int32()), st.lists(st.tuples(st.text(max_size=3), st.integers(0, 9)), max_size=2)),
    (pa.null(), st.none()),
]


@st.composite
def parquet_files(draw: st.DrawFn) -> bytes:
    """A parquet file with columns of any types, whole or damaged."""
    count = draw(st.integers(0, 4))
    columns = dict(draw(st.sampled_from(GOOD)))
    arrays = {name: pa.array([value] * count) for name, value in columns.items()}
    for name in draw(st.lists(st.sampled_from([*columns, "references", "tests", "sample_id"]), max_size=2)):
        kind, values = draw(st.sampled_from(ARROW_TYPES))
        arrays[name] = pa.array(draw(st.lists(st.none() | values, min_size=count, max_size=count)), type=kind)
    file = io.BytesIO()
    pq.write_table(pa.table(arrays), file)
    content = file.getvalue()
    damage = draw(st.integers(0, 5))
    if damage == 0:
        return content[: draw(st.integers(0, len(content)))]
    if damage == 1:
        place = draw(st.integers(0, len(content) - 1))
        return content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place + 1 :]
    return draw(st.binary(max_size=40)) if damage == 2 else content


def line_numbers(content: bytes) -> list[int]:
    """Of the lines that are not blank."""
    split = content.removeprefix(b"\xef\xbb\xbf").split(b"\n" if b"\n" in content else b"\r")
    return [number for number, line in enumerate(split, 1) if line.strip()]


def check_prepared(prepared: PreparedData, places: list[str], vocabulary: int) -> None:
    """Every place is used or rejected, in order and with a reason, and what is used can be trained on."""
    assert len(prepared.dataset) + len(prepared.rejected) == len(places)
    where = [place.split(" (")[0] for place, _ in prepared.rejected]
    assert len(set(where)) == len(where)
    assert where == [place for place in places if place in set(where)]
    for place, reason in prepared.rejected:
        assert reason
        assert len(place.splitlines()) == len(reason.splitlines()) == 1
        assert len((place + reason).encode()) < 4000
    ids = prepared.dataset["sample_id"]
    assert len(set(ids)) == len(ids)
    for sample in prepared.dataset:
        assert len(sample["input_ids"]) == len(sample["labels"])
        assert 0 < first_label(sample["labels"]) < len(sample["labels"])
        assert all(0 <= i < vocabulary for i in sample["input_ids"])
        assert all(x == IGNORE_INDEX or 0 <= x < vocabulary for x in sample["labels"])


@pytest.fixture(scope="module")
def checks(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Check]:
    """By kind of input: what must hold for an example."""
    tokenisation = Tokenisation(tiny_tokenizer, max_prompt_length=200, max_response_length=40)
    folder = tmp_path_factory.mktemp("fuzz")

    def check_file(name: str, content: bytes, places: list[str] | None) -> None:
        path = folder / name
        path.write_bytes(content)
        try:
            rows = read_source(path)
        except UserError as e:
            told(e, re.escape(name))
            return
        places = [row.where for row in rows] if places is None else places
        assert [row.where for row in rows] == places
        try:
            prepared = prepare_dataset(rows, tokenisation)
        except UserError as e:
            told(e, "of [0-9]+ rows is usable|sample_id|data has the columns")
            return
        check_prepared(prepared, places, len(tiny_tokenizer))

    def check_lines(content: bytes) -> None:
        is_array = content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        places = None if is_array else [f"line {number}" for number in line_numbers(content)]
        check_file("x.jsonl", content, places)

    return {
        "lines": check_lines,
        "arrays": lambda content: check_file("x.json", content, None),
        "gzip": lambda content: check_file("x.jsonl.gz", content, None),
        "parquet": lambda content: check_file("x.parquet", content, None),
        "config": lambda example: check_config(folder / "config.yaml", *example),
        "overrides": lambda example: check_config(None, b"", example),
        "loss": check_loss,
    }


# Configs

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{this}: &{this} [{', '.join([f'*{last}'] * 9)}]\n" for last, this in zip("abcdefgh", "bcdefghi")
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{this}: &{this} {{<<: [{', '.join([f'*{last}'] * 9)}]}}\n" for last, this in zip("abcdefgh", "bcdefghi")
)
BAD_CONFIGS = [
    BOMB, BOMB.replace("a:", "distill:", 1), MERGE_BOMB, "distill: &a {x: *a}", "distill: &a [*a]", "&a [*a]",
    "!!python/object:os.system {}", "teacher: !!python/object/apply:os.system [ls]", "teacher: !!python/name:os.system",
    "a: " + "[" * 3000, "[" * 90_000, "{" * 90_000, "- " * 40_000, "? " * 40_000, "a:\n" * 30_000, "\t" * 50_000,
    "\n".join(" " * i + "a:" for i in range(400)), "teacher: " + "x" * 90_000, "x" * 10_000_000, "x: 1\n" * 20_000,
    "output_dir: 2024-13-45", "output_dir: 2024-01-01", "seed: " + "9" * 5000, "seed: 0x" + "f" * 5000, "seed: -.inf",
    "seed: 1:" + ":".join(["59"] * 2000), "? 0x" + "f" * 5000 + "\n: 1", "max_rows: 0b" + "1" * 9000, "1e5: 2",
    "seed: !!int abc", "seed: !!float abc", "seed: !!bool abc", "seed: !!timestamp abc", "seed: !!null abc",
    "? [a]\n: b",
    "teacher: !!binary '&'", "teacher: !!binary YQ==", "distill: !!set {a, b}", "distill: !!omap [a: 1]", "<<: 1",
    "<<: {}",
    "distill: {<<: [1]}", "seed: 1\nseed: 2", "{seed: 1, seed: 1}",
    'teacher: "\\0"', 'teacher: "\\ud800"', '"\\ud800": 1',
    '"a\\nb": 1', "curate: {signals: {'a\\nb': x}}", 'curate: {signals: {"a\\nb": x}}', "preset: [paper]",
    "preset: {a: 1}",
    "preset: paper\ndistill: [1]", "max_bad_rows: true", "max_bad_rows: 1.5", "max_bad_rows: .nan", "max_bad_rows: -1",
    "preset: 0x" + "f" * 5000, "null: 1", "true: 1", "no: no", "--- 1\n--- 2", "%YAML 9.9\n---\na: 1",
    "%TAG ! a b\n---\na: 1",
    "*a", "a: *a", "&a", "!", "!!", "!<", "|", ">", "'", '"', "@", "`", "...", "---", "a: b: c", "a:\n\t- b",
    "reflect: {engine: 1}",
    "distill: {1: 2}", "lora: {[a]: 1}", "lora: &a {b: &c [*c]}",
    "data: " + "x/" * 5000, "validation: 2001-01-01 00:00:00",
]  # fmt: skip
KEYS = sorted(RunConfig.model_fields)
SECTION_KEYS = sorted(
    key
    for field in RunConfig.model_fields.values()
    for key in getattr(field.annotation, "model_fields", {"learning_rate": 0, "divergence": 0, "save_strategy": 0})
)
CONFIG_VALUES = st.one_of(
    VALUES, st.sampled_from(["1e-4", "1e999", "no", "paper", "knee", 0.5, 1, [1, 2], {"rouge_l": 1}]),
    st.dictionaries(st.sampled_from(SECTION_KEYS) | TEXTS, VALUES, max_size=4),
)  # fmt: skip
CONFIGS = st.dictionaries(st.sampled_from(KEYS) | st.sampled_from(KEYS) | TEXTS, CONFIG_VALUES, max_size=4)
YAML_TEXTS = st.text(st.sampled_from(list("ab01.:-?,[]{}#&*!|>'\"%@ \n\n\t~<=\\")), max_size=40)
SMALL_CONFIGS = [text for text in BAD_CONFIGS if len(text) < 3000]


@st.composite
def config_bytes(draw: st.DrawFn) -> bytes:
    """A config file: YAML or nearly."""
    kind = draw(st.integers(0, 11))
    if kind == 0:
        return draw(st.binary(max_size=40))
    if kind == 1:
        return draw(st.sampled_from(SMALL_CONFIGS)).encode()
    if kind <= 3:
        return draw(YAML_TEXTS).encode()
    text = (yaml.safe_dump if kind <= 6 else json.dumps)(draw(CONFIGS))
    encoding = draw(st.sampled_from(["utf-8"] * 5 + ["utf-8-sig", "utf-16"]))
    content = text.encode(encoding, "surrogatepass")
    return content[: draw(st.integers(0, len(content)))] if kind == 7 else content


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """Overrides as a shell gives them: no NUL, and what is not UTF-8 as halves of surrogate pairs."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        key = draw(
            st.sampled_from(KEYS) | st.sampled_from(["curate.keep", "distill.a.b", "a.b.c", ".", ".a", "a..b"]) | TEXTS
        )
        value = draw(CONFIG_VALUES.map(json.dumps) | YAML_TEXTS | TEXTS | st.sampled_from(SMALL_CONFIGS))
        found.append(key + draw(st.sampled_from(["=", "=", "=", "", "=="])) + value)
    return found


def check_config(path: Path | None, content: bytes, given_overrides: list[str]) -> None:
    """A config that can be written and read again, or one line."""
    if path is not None:
        path.write_bytes(content)
    try:
        config = load_run_config(path, given_overrides)
    except UserError as e:
        told(e, "config|override|preset")
        return
    assert isinstance(config, RunConfig)
    text = yaml.safe_dump(config.model_dump(), sort_keys=False).encode()
    assert len(text) < 1_000_000


# Losses

BAD_NUMBERS: list[Any] = [
    0, -1, 1, 2, 0.0, -0.0, 1e-3, 1.5, 1e-300, 1e-30, 1e30,
    1e300, 10**30, 10**400, float("nan"), float("inf"), True, False,
    None, "2", "", b"2", [], [1.0], {}, 1j, torch.tensor(2.0), torch.ones(3), "mean", "eager", "compiled", -100, 2**40,
    torch.float32, torch.int8, torch.tensor(0), torch.tensor(5), torch.tensor(True), float,
]  # fmt: skip
OPTIONS = (
    "divergence", "temperature", "skew", "beta", "sft_weight", "temperature_scaling", "student_softcap",
    "teacher_softcap", "student_scale", "teacher_scale", "num_items", "reduction", "ignore_index", "backend",
    "memory_budget",
    "logits_dtype",
)  # fmt: skip
TENSORS = (
    "student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "labels", "student_bias", "teacher_bias",
    "token_weights", "student_logits",
)  # fmt: skip
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8,
    torch.uint8, torch.bool,
    torch.complex64,
]  # fmt: skip
CHANGES: list[Callable[[Any], Any]] = [
    lambda x: x[:-1], lambda x: x[..., :-1], lambda x: x[None], lambda x: x[..., None], lambda x: x.flatten(),
    lambda x: x[:0],
    lambda x: x.t() if x.dim() == 2 else x, lambda x: x.sum(), lambda x: -x, lambda x: x * 10**6, lambda x: x * 0,
    lambda x: x.expand(2, *x.shape), lambda x: x.flip(0), lambda x: x.to("meta"), lambda x: x.to_sparse(),
    lambda x: x.tolist(),
    lambda x: x.numpy(), lambda x: None, lambda x: 3, lambda x: "text",
]  # fmt: skip


@st.composite
def loss_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `distillation_loss`, one to three of which are odd."""
    rows, width, wider, classes = (draw(st.integers(1, 5)) for _ in range(4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    found: dict[str, Any] = {
        "student_hidden": normal(rows, width),
        "student_weight": normal(classes, width),
        "teacher_hidden": normal(rows, wider),
        "teacher_weight": normal(classes, wider),
        "labels": torch.randint(classes, (rows,), generator=generator),
        "divergence": draw(st.sampled_from(divergence_names())),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    extra = {
        "student_bias": (classes,),
        "teacher_bias": (classes,),
        "token_weights": (rows,),
        "student_logits": (rows, classes),
    }
    for name in draw(st.lists(st.sampled_from([*OPTIONS, *TENSORS, *TENSORS]), min_size=1, max_size=3, unique=True)):
        if name in OPTIONS:
            found[name] = draw(st.sampled_from(BAD_NUMBERS))
            continue
        tensor = found[name] if name in found else normal(*extra[name])
        if draw(st.booleans()):
            found[name] = tensor.to(draw(st.sampled_from(DTYPES)))
        else:
            found[name] = draw(st.sampled_from(CHANGES))(tensor)
    return found


def check_loss(arguments: dict[str, Any]) -> None:
    """A finite loss, or an error that names the argument."""
    try:
        out = distillation_loss(**arguments)
    except UserError as e:
        told(e)
        return
    assert out.loss.isfinite().all()


KINDS: dict[str, st.SearchStrategy[Any]] = {
    "lines": line_files(),
    "arrays": array_files(),
    "gzip": gzip_files(),
    "parquet": parquet_files(),
    "config": st.tuples(config_bytes(), st.just([]) | overrides()),
    "overrides": overrides(),
    "loss": loss_arguments(),
}


# What is no dense tensor and what float32 cannot hold raises other errors there, or gives NaN: remove when it does not.


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_used_or_refused(kind: str, checks: dict[str, Check]) -> None:
    fuzz(KINDS[kind], checks[kind], USUAL[kind] * TIMES)


def count_all(kinds: list[str], checks: dict[str, Check], capsys: pytest.CaptureFixture[str]) -> int:
    """Slowly check many examples of each kind, and print how many."""
    started = time.monotonic()
    done = {kind: fuzz(KINDS[kind], checks[kind], USUAL[kind] * TIMES * SLOW_TIMES, random=True) for kind in kinds}
    with capsys.disabled():
        print(f"\n{sum(done.values())} bad inputs in {time.monotonic() - started:.0f} s: {done}")
    return sum(done.values())


@pytest.mark.long
def test_twenty_thousand_bad_files_and_configs(checks: dict[str, Check], capsys: pytest.CaptureFixture[str]) -> None:
    assert count_all([kind for kind in KINDS if kind != "loss"], checks, capsys) >= 20_000


@pytest.mark.long
def test_thousands_of_bad_loss_arguments(checks: dict[str, Check], capsys: pytest.CaptureFixture[str]) -> None:
    assert count_all(["loss"], checks, capsys) >= 5_000


@pytest.mark.parametrize("text", BAD_CONFIGS, ids=lambda text: ascii(text[:30]))
def test_bad_configs_are_one_line(text: str, tmp_path: Path) -> None:
    started = time.process_time()
    check_config(tmp_path / "config.yaml", text.encode(), [])
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("key", [*KEYS, "zzz"])
def test_odd_overrides_are_one_line(key: str) -> None:
    for value in (
        "[[]]",
        "{a: {}}",
        "",
        "null",
        "-1",
        "1e400",
        "0x" + "f" * 4000,
        "2024-13-45",
        ".nan",
        "~",
        "&a [*a]",
    ):
        check_config(None, b"", [f"{key}={value}"])
        check_config(None, b"", [f"{key}.{key}={value}"])
    check_config(None, b"", [f"{key}{'.a' * 5000}=1"])


# Files made by hand


GOOD_LINE = b'{"instruction": "Say hi.", "output": "Hi."}'
HUGE = b"a" * 10_000_000
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "folder": ("", b"", "is a folder"),
    "nothing": ("x.jsonl", b"", "is empty"),
    "nothing gzipped": ("x.jsonl.gz", gzip.compress(b""), "is empty"),
    "only a byte order mark": ("x.jsonl", b"\xef\xbb\xbf", "is empty"),
    "UTF-16": ("x.jsonl", GOOD_LINE.decode().encode("utf-16"), "is UTF-16 or UTF-32"),
    "UTF-16 without a mark": (
        "x.jsonl",
        GOOD_LINE.decode().encode("utf-16-le"),
        "none of 1 rows is usable; first: line 1",
    ),
    "ten megabytes of a character": ("x.jsonl", HUGE, "none of 1 rows is usable; first: line 1: not valid JSON"),
    "ten megabytes of brackets": ("x.json", b"[" * 10_000_000, "nested too deeply"),
    "ten megabytes of braces": ("x.jsonl", b'{"a":' * 2_000_000, "line 1: not usable JSON: nested too deeply"),
    "ten megabytes of NULs": ("x.jsonl", bytes(10_000_000), "none of 1 rows is usable"),
    "a column name of ten megabytes": ("x.jsonl", b'{"' + HUGE + b'": 1}', "data has the columns"),
    "gzip cut off": ("x.jsonl.gz", gzip.compress(GOOD_LINE * 99)[:-9], "cannot be read"),
    "gzip with garbage behind": ("x.jsonl.gz", gzip.compress(GOOD_LINE) + b"garbage", "cannot be read"),
    "gzip without its name": ("x.jsonl", gzip.compress(GOOD_LINE), "rows is usable; first: line 1: not UTF-8"),
    "parquet of nothing": ("x.parquet", b"", "is not readable parquet"),
    "parquet cut off": ("x.parquet", b"PAR1" + b"\xff" * 99, "is not readable parquet"),
    "one id twice": (
        "x.jsonl",
        b'{"instruction": "a", "output": "b", "sample_id": 7}\n\n{"instruction": "c", "output": "d", "sample_id": "7"}',
        "sample_id '7' is used by 2 rows; it must be unique: line 1, line 3",
    ),
    "one id missing": (
        "x.jsonl",
        b'{"instruction": "a", "output": "b", "sample_id": 7}\n\n' + GOOD_LINE,
        "line 3 has no sample_id while others have one",
    ),
}


@pytest.mark.parametrize(("name", "content", "complaint"), BAD_FILES.values(), ids=BAD_FILES)
def test_damaged_files(
    name: str, content: bytes, complaint: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    if name:
        (tmp_path / name).write_bytes(content)
    started = time.process_time()
    with pytest.raises(UserError) as error:
        prepare_dataset(read_source(tmp_path / name), Tokenisation(tiny_tokenizer))
    assert complaint in told(error.value)
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize(
    "name", ["x" * 5000 + ".jsonl", "~nobody-at-all/x.jsonl", "a\0b.jsonl", "\ud800.jsonl", "/dev/zero"]
)
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(UserError) as error:
        read_source(name)
    told(error.value)


@pytest.mark.parametrize("letter", ["a", " ", "\0", "漢", "ab "])
@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_ten_megabytes_of_one_character(letter: str, column: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {
        "instruction": "Say hi.",
        "input": "x",
        "output": "Hi.",
        column: letter * (10_000_000 // len(letter.encode())),
    }
    started = time.process_time()
    prepared = prepare_dataset([row], Tokenisation(tiny_tokenizer, max_prompt_length=300, max_response_length=40))
    assert time.process_time() - started < SECONDS
    check_prepared(prepared, ["row 1"], len(tiny_tokenizer))
    assert len(prepared.dataset[0]["input_ids"]) <= 340


# At the command line


@pytest.fixture(scope="module")
def run_config_file(tiny_teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with which the step prepare works."""
    path = tmp_path_factory.mktemp("cli") / "config.yaml"
    limits = {"max_prompt_length": 400, "max_response_length": 64, "validation": 1, "curate": {"stages": 1}}
    limits["init_student"] = {"layers": 2}
    path.write_text(yaml.safe_dump({"teacher": str(tiny_teacher_folder), **limits}))
    return path


SOME_LINES = [b'{"instruction": "Say %d.", "output": "%d"}' % (i, i) for i in range(9)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            b"\n".join([*SOME_LINES, b"{", b"[]"]),
            "2 of 11 rows rejected, more than max_bad_rows=0.1; mend them, or raise",
        ),
        (b'{"instruction": "\\ud800", "output": "x"}', "none of 1 rows is usable; first: line 1"),
        (b'{"a":' * 99_999, "line 1: not usable JSON: nested too deeply"),
        ("[1]".encode("utf-16"), "is UTF-16 or UTF-32"),
        (b"\x00" * 99, "line 1: not valid JSON"),
    ],
)
def test_bad_data_at_the_command_line(content: bytes, complaint: str, run_config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    data, folder = f"data={tmp_path / 'x.jsonl'}", f"output_dir={tmp_path / 'run'}"
    assert complaint in srd_fast("prepare", run_config_file, data, folder).error()


@pytest.mark.parametrize(
    "override",
    ["data=" + "x" * 5000 + ".jsonl", "data=~nobody-at-all/x.jsonl", "data=/dev/zero", 'data="\\0"', 'data="\\ud800"',
     "max_bad_rows=1.0", "max_bad_rows=yes", "preset=[paper]", "seed=2024-13-45", "distill=&a [*a]",
     "validation=/dev/zero"],
)  # fmt: skip
def test_bad_overrides_at_the_command_line(override: str, run_config_file: Path, tmp_path: Path) -> None:
    srd_fast("prepare", run_config_file, f"output_dir={tmp_path / 'run'}", "data=quickstart", override).error()


@pytest.mark.parametrize("content", [BOMB, MERGE_BOMB, "a: " + "[" * 3000, "\0", "x: 2024-13-45"])
def test_bad_configs_at_the_command_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    srd_fast("run", tmp_path / "config.yaml").error()


def test_what_is_rejected_below_the_limit_is_listed_with_its_lines(run_config_file: Path, tmp_path: Path) -> None:
    bad = [
        b"{",
        b'{"prompt": "a", "completion": "b"}',
        b'{"instruction": "\xff", "output": "b"}',
        b'{"instruction": "a"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\r\n".join([SOME_LINES[0], b"", *bad, *SOME_LINES[1:]]))
    data, folder = f"data={tmp_path / 'x.jsonl'}", tmp_path / "run"
    for limit in ("3", "0.2"):
        message = srd_fast("prepare", run_config_file, data, f"output_dir={folder}", f"max_bad_rows={limit}").error()
        assert f"data: 4 of 13 rows rejected, more than max_bad_rows={limit}" in message
        assert "first: line 3: not valid JSON (" in message
        assert "; line 4 (" in message
        assert "; line 5: not UTF-8" in message
    for limit in ("4", "0.31", "null"):
        result = srd_fast("prepare", run_config_file, data, f"output_dir={folder}", f"max_bad_rows={limit}")
        assert result.status == 0, result
    listed = json.loads((folder / "data" / "rejected.json").read_text())
    assert [(row["where"].split(" (")[0], row["reason"].split(" (")[0]) for row in listed] == [
        ("line 3", "not valid JSON"),
        ("line 4", "no value in instruction, output; the columns of this row are ['completion', 'prompt']"),
        ("line 5", "not UTF-8: byte 17 is 0xff; save the file in UTF-8"),
        ("line 6", "no value in output"),
    ]
    used = sum(pq.read_metadata(folder / "data" / f"{part}.parquet").num_rows for part in ("train", "validation"))
    assert used == 9
