"""One tokenizer of ROUGE-L for a whole data set, in whatever parts it is scored."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import Sampling, UserError, evaluate, reflect, register_engine
from srd_fast.reflection import RougeL, get_difficulty
from srd_fast.rouge import choose_tokenizer
from srd_fast.run.config import load_run_config
from srd_fast.run.pipeline import execute

pytestmark = pytest.mark.usefixtures("own_registries")

REFERENCES = ["Python 3", "北京是首都，有2154条街", "Rust", "кот спит дома", "the red café", "東京は首都です"]
ANSWERS = ["Python 2", "上海不是，有2154万人", "Go", "кот не спит дома", "the café", "東京は大きい"]
ROWS: list[dict[str, Any]] = [{"instruction": f"q{i}", "output": r} for i, r in enumerate(REFERENCES)]
OF_ANY_SCRIPT = RougeL("unicode").score_all(ANSWERS, [[r] for r in REFERENCES])


class Told:
    """An engine that knows the answer to each question."""

    def __init__(self, student: Any, tokenizer: PreTrainedTokenizerFast, **_: Any) -> None:
        self.tokenizer = tokenizer

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        for i, prompt in enumerate(prompts):
            question = self.tokenizer.decode(prompt)
            number = next(n for n in range(len(ANSWERS)) if f"q{n}\n" in question)
            yield i, self.tokenizer(ANSWERS[number]).input_ids


@pytest.fixture
def options() -> dict[str, Any]:
    register_engine("told", Told)
    return {"engine": "told", "progress": False}


def test_shards_are_scored_as_the_whole(
    options: dict[str, Any], tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    options["signals"] = ["rouge_l"]
    whole = reflect(tiny_model, ROWS, tiny_tokenizer, **options)
    assert list(whole["generation"]) == ANSWERS
    assert list(whole["rouge_l"]) == OF_ANY_SCRIPT
    by_id = dict(zip(whole["sample_id"], whole["rouge_l"]))
    for k in range(1, 7):
        shard = reflect(tiny_model, ROWS, tiny_tokenizer, shard=f"{k}/6", **options)
        assert dict(zip(shard["sample_id"], shard["rouge_l"])) == {i: by_id[i] for i in shard["sample_id"]}
    plain = reflect(tiny_model, ROWS, tiny_tokenizer, rouge_tokenizer="rouge", **options)
    assert plain["rouge_l"][1] == 1  # by its number alone
    assert plain["rouge_l"][3] == 0


def test_evaluation_chooses_by_its_rows(
    options: dict[str, Any],
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = evaluate(tiny_model, ROWS, tiny_tokenizer, **options)
    assert found["rouge_l"] == pytest.approx(sum(OF_ANY_SCRIPT) / len(ROWS))
    assert caplog.text.count("ROUGE-L reads words of any script") == 1
    caplog.clear()
    english = [ROWS[0], ROWS[2], ROWS[4]]
    found = evaluate(tiny_model, english, tiny_tokenizer, **options)
    assert found["rouge_l"] == RougeL("rouge").score_all(ANSWERS[::2], [[r] for r in REFERENCES[::2]])[0] / 3 + 0.8 / 3
    assert not caplog.records


def test_two_encodings_of_a_text_match_exactly() -> None:
    class Given:
        generations = ("caf\u00e9 ２", "cafe", "STRASSE")
        dataset = {"references": [["cafe\u0301  2"], ["café"], ["straße"]]}  # noqa: RUF012

    assert get_difficulty("exact_match").function(Given) == [1.0, 0.0, 1.0]  # type: ignore[arg-type]


# A run


@pytest.fixture
def config_file(
    make_tiny_model: Any, tiny_teacher_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    """Mostly Chinese rows for training, English ones to evaluate on, and a student with values for sampling."""
    make_tiny_model(2).save_pretrained(tmp_path / "brought")
    tiny_tokenizer.save_pretrained(tmp_path / "brought")
    (tmp_path / "brought" / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 0}')
    for name, texts in (("train", ["北京有{}条街", "это {} и кот"] * 6), ("held_out", ["{} red books", "a green {}"])):
        rows = [{"instruction": f"say {i}", "output": text.format(i)} for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "teacher": str(tiny_teacher_folder),
        "student": str(tmp_path / "brought"),
        "output_dir": str(tmp_path / "run"),
        "data": str(tmp_path / "train.jsonl"),
        "validation": str(tmp_path / "held_out.jsonl"),
        "template": "{instruction}:",
        "dtype": "float32",
        "reflect": {"engine": "transformers", "max_new_tokens": 3},
        "evaluate": {"max_new_tokens": 3},
        "curate": {"stages": 2},
        "distill": {"epochs_per_stage": 0.2, "eval_strategy": "no", "save_strategy": "no"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_run_makes_one_choice_and_saves_its_student(
    config_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    made = RougeL.__init__
    monkeypatch.setattr(RougeL, "__init__", lambda self, mode="auto": (used.append(mode), made(self, mode))[1])
    folder = execute(load_run_config(config_file, []), say=lambda _: None)
    assert used == ["unicode"] * 4  # reflections, then three models, on rows of which rouge-score's would lose nothing
    assert caplog.text.count("ROUGE-L reads words of any script") == 1
    found = json.loads((folder / "student" / "generation_config.json").read_text())
    assert (found["temperature"], found["do_sample"], found["eos_token_id"]) == (0.7, True, 0)
    assert "it is mended: do_sample=True, because of temperature=0.7" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("final_logit_softcapping", 1.0, "teacher LlamaForCausalLM: its hidden states times its head differ"),
        ("logit_scale", 3.0, "teacher LlamaForCausalLM: its hidden states times its head differ"),
    ],
)
def test_a_teacher_that_is_not_understood_is_found_before_reflecting(
    key: str, value: float, said: str, config_file: Path, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for file in tiny_teacher_folder.iterdir():
        (teacher / file.name).write_bytes(file.read_bytes())
    told = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**told, key: value}))
    config = load_run_config(config_file, [f"teacher={teacher}"])
    with pytest.raises(UserError, match=said):
        execute(config, say=lambda _: None)
    assert not list((tmp_path / "run").glob("reflections*"))


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Нет, Kubernetes", "Да, Kubernetes"),
        ("海港是 Washington", "首都是 Washington"),
        ("いいえ、iPhone 15", "はい、iPhone 15"),
        ("خطأ: TensorFlow", "صح: TensorFlow"),
        ("删除 pandas DataFrame 或 numpy array 文件", "使用 pandas DataFrame 和 numpy array 排序"),
    ],
)
def test_a_latin_word_is_not_the_whole_answer_in_english_data(answer: str, reference: str) -> None:
    english = ["The quick brown fox jumps over the lazy dog."] * 30
    scorer = RougeL(choose_tokenizer("auto", [[x] for x in [*english, reference]]))
    *others, score = scorer.score_all([*english, answer], [[x] for x in [*english, reference]])
    assert others == [1.0] * 30
    assert score < 0.8
    assert scorer.score(reference, [reference, "an English reference"]) == 1
    assert scorer.score(answer, [reference, "this English reference is a good deal longer than that one"]) < 0.8


def test_a_sign_of_another_script_leaves_english_as_it_was() -> None:
    text = "the value of π is nearly three and the value of e is nearly that too"
    assert RougeL("by_sample").score("the value of e", [text]) == RougeL("rouge").score("the value of e", [text])
