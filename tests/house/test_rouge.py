"""ROUGE-L: value for value that of the rouge-score package, in one process or several, and of every script."""

import json
import random
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import regex
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from srd_fast import rouge
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.errors import UserError
from srd_fast.reflection import Reflected, RougeL
from srd_fast.reflection.signals import rouge_l


class UnicodeTokenizer(Tokenizer):
    """For rouge-score: what "unicode" calls tokens."""

    def tokenize(self, text: str) -> list[str]:
        return rouge.unicode_tokens(text)


OTHER_SCRIPT = regex.compile(r"(?V1)[\p{L}--[\p{Latin}\p{Common}\p{Inherited}]]")
STEMMED = DefaultTokenizer(use_stemmer=True)
PLAIN = RougeScorer(["rougeL"], use_stemmer=True)
UNICODE = RougeScorer(["rougeL"], tokenizer=UnicodeTokenizer())


def loses_most(references: Sequence[str]) -> bool:
    """Whether rouge-score's tokenizer leaves nothing of the references, or too little of one of them."""
    nothing = not any(STEMMED.tokenize(r) for r in references) and any(r.strip() for r in references)
    return nothing or any(map(loses_most_of, references))


def loses_most_of(reference: str) -> bool:
    """Whether it loses most letters, or a fifth of the words as words of other scripts."""
    letters = [c for c in unicodedata.normalize("NFC", reference) if c.isalpha()]
    lost = [c for c in letters if not c.isascii()]
    words = [w for w in rouge.unicode_tokens(reference) if w[0].isalnum()]
    foreign = [w for w in words if any(OTHER_SCRIPT.fullmatch(c) for c in w)]
    return 2 * len(lost) > len(letters) or (not reference.isascii() and 5 * len(foreign) > len(words))


def expected_score(mode: str, prediction: str, references: Sequence[str]) -> float:
    """By rouge-score's own code."""
    unreadable = mode in ("auto", "by_sample") and loses_most(references)
    theirs = UNICODE if mode == "unicode" or unreadable else PLAIN
    return max(theirs.score(r, prediction)["rougeL"].fmeasure for r in references)


def real_texts(folder: Path | None) -> list[tuple[str, list[str]]]:
    """(text, references) of real rows where there are any, else of the quickstart rows."""
    if folder is None:
        rows: list[dict[str, Any]] = [dict(row) for row in make_quickstart_rows(1000, seed=9)]
    else:
        names = ("sinst_3-6_valid.jsonl", "llms_from_scratch_train.jsonl")
        rows = [json.loads(line) for name in names for line in (folder / name).read_text("utf-8").splitlines()]
    return [(" ".join(r["output"].split()[:60]), r.get("references") or [r["output"]]) for r in rows]


def perturbed(text: str, draw: random.Random) -> str:
    words = text.split()
    kept = [w.upper() if draw.random() < 0.2 else w for w in words if draw.random() < 0.7]
    if draw.random() < 0.3:
        draw.shuffle(kept)
    return " ".join(kept)


def make_pairs(folder: Path | None, count: int) -> tuple[list[str], list[list[str]]]:
    """Predictions, and one to five references of each: real ones, changed ones and those of other rows."""
    texts, draw = real_texts(folder), random.Random(0)
    predictions, all_references = [], []
    for n in range(count):
        text, references = texts[n % len(texts)]
        other = draw.choice(texts)[0]
        references = [" ".join(r.split()[:60]) for r in references[: draw.randint(1, 3)]]
        if draw.random() < 0.3:
            references = [*references, other, perturbed(text, draw)]
        all_references.append(references)
        predictions.append(other if n % 4 == 0 else perturbed(text, draw))
    return predictions, all_references


# Equal to rouge-score


def test_real_pairs_have_the_values_of_the_rouge_score_package(data_folder: Path | None) -> None:
    predictions, references = make_pairs(data_folder, 2000)
    expected = [expected_score("rouge", p, r) for p, r in zip(predictions, references)]
    assert RougeL("rouge").score_all(predictions, references) == expected
    assert 0.2 < sum(expected) / 2000 < 0.9
    assert len({round(e, 6) for e in expected}) > 50


WORDS = """the The THE a running runs Runner ponies dying skies flies generalizations relational 12 3.5 1,000 2nd don't
    e-mail naïve İstanbul \u212aelvin straße 巴黎 это ... ' _ x\u0301"""
TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(WORDS.split()), max_size=12).map(" ".join),
    st.text("ab \n-1", max_size=40),
    st.text(st.characters(categories=("Lu", "Ll", "Nd", "Zs", "Cs", "Po")), max_size=30),
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(rouge.MODES), TEXTS, st.lists(TEXTS, min_size=1, max_size=4))
@example("rouge", "", ["a"])
@example("rouge", "a", [""])
@example("rouge", "a a a b", ["a b a a"])
@example("auto", "+ +", ["+ -", "\n"])
@example("unicode", "", [""])
def test_any_text_has_the_value_of_the_rouge_score_package(mode: str, prediction: str, references: list[str]) -> None:
    assert RougeL(mode).score(prediction, references) == expected_score(mode, prediction, references)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_words_and_stems_are_those_of_the_rouge_score_package(text: str) -> None:
    assert [rouge._stem(word) for word in rouge.rouge_words(text)] == STEMMED.tokenize(text)


def test_a_stem_is_never_empty() -> None:
    words = ["".join(letters).encode() for letters in product("siedyngatl", repeat=4)]
    assert all(map(rouge._stem, words))


def test_long_texts_have_the_value_of_the_rouge_score_package() -> None:
    """Longer than the 64 bits of a machine word, in which the common subsequence is found."""
    draw = random.Random(1)
    for length in (63, 64, 65, 130, 400):
        text, other = ([f"w{draw.randrange(40)}" for _ in range(length)] for _ in range(2))
        prediction, references = " ".join(text), [" ".join(other), " ".join(text[::2])]
        assert RougeL("rouge").score(prediction, references) == expected_score("rouge", prediction, references)


def test_what_is_forgotten_changes_no_value(data_folder: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, references = make_pairs(data_folder, 300)
    expected = RougeL().score_all(predictions, references)
    monkeypatch.setattr(rouge, "MAX_WORDS", 20)
    scorer = RougeL()
    known = []
    for prediction, texts, value in zip(predictions, references, expected):
        assert scorer.score(prediction, texts) == value
        assert scorer.score("cats running", ["the cat runs"]) == 0.8
        known.append(len(scorer._rouge.numbers))
    assert any(b < a for a, b in pairwise(known))
    assert max(known) < 20 + 7 * 60


# Scripts that rouge-score's tokenizer does not know


def test_auto_is_rouge_for_latin_text(data_folder: Path | None) -> None:
    auto, plain = RougeL("auto"), RougeL("rouge")
    for text, references in real_texts(data_folder)[:100]:
        assert auto.score(text, references) == plain.score(text, references)


OTHER_SCRIPTS = [
    ("巴黎是法国的首都", ["法国的首都是巴黎"]),
    ("это красная машина", ["Это КРАСНАЯ книга"]),
    ("{ } ( ) ;", ["{ ( ) ; }"]),
    ("สวัสดีครับ", ["สวัสดี"]),
]


@pytest.mark.parametrize(("prediction", "references"), OTHER_SCRIPTS)
def test_text_that_rouges_tokenizer_empties_scores_all_the_same(prediction: str, references: list[str]) -> None:
    auto, plain = RougeL(), RougeL("rouge")
    assert 0 < auto.score(prediction, references) < 1
    assert auto.score(references[0], references) == 1
    assert plain.score(prediction, references) == 0
    assert (auto.emptied, plain.emptied) == (2, 1)
    assert RougeL("unicode").score(prediction, references) == auto.score(prediction, references)


def test_unicode_counts_characters_of_scripts_without_spaces() -> None:
    # The longest common subsequence of the two is 法国的首都, 5 of 8 characters each.
    assert RougeL().score("巴黎是法国的首都", ["法国的首都是巴黎"]) == pytest.approx(5 / 8)
    assert RougeL("unicode").score("The cat sat", ["the dog sat"]) == pytest.approx(2 / 3)


def test_a_latin_reference_beside_another_hides_neither() -> None:
    scorer = RougeL()
    assert scorer.score("Paris", ["巴黎", "Paris"]) == 1
    assert scorer.score("巴黎", ["巴黎", "Paris"]) == 1
    assert scorer.score("错误 5", ["答案 5", "the answer is five and it is right"]) == pytest.approx(1 / 3)
    assert scorer.score("Paris", ["Paris", "London"]) == 1


# One choice for a data set

# A right answer that differs in one word or number, and a wrong one that shares a number or a Latin word.
IN_OTHER_SCRIPTS = {
    "Chinese": ("长江全长6300公里，流经11个省。", "长江全长6397公里，流经11个省。", "这家店有11个员工，卖鞋。"),
    "Russian": ("Пушкин родился в Москве в 1799 году", "Пушкин родился в Москве в 1800 году", "Мой кот любит 1799"),
    "Arabic": ("تأسست الجامعة عام 1908 في القاهرة", "تأسست الجامعة عام 1909 في القاهرة", "أحب القهوة 1908"),
    "Japanese": ("富士山の高さは3776メートルです。", "富士山の高さは3775メートルです。", "猫が3776匹いる"),
    "Greek": ("Η Python γράφτηκε από τον Γκουίντο", "Η Python γράφτηκε από τον Γιώργο", "Δεν ξέρω, Python"),
    "Thai": ("กรุงเทพเป็นเมืองหลวง 50 เขต", "กรุงเทพเป็นเมืองหลวง 51 เขต", "ฉันชอบแมว 50"),
    "Vietnamese": ("Hà Nội là thủ đô của Việt Nam", "Hà Nội là thành phố của Việt Nam", "Tôi thích ăn phở"),
}


@pytest.mark.parametrize("language", IN_OTHER_SCRIPTS)
def test_answers_are_judged_by_their_words_and_not_by_a_number_they_share(
    language: str, caplog: pytest.LogCaptureFixture
) -> None:
    reference, nearly, wrong = IN_OTHER_SCRIPTS[language]
    exact, close, far = RougeL().score_all([reference, nearly, wrong], [[reference]] * 3)
    assert exact == 1
    assert close >= 0.75
    assert far < 0.5
    assert [close, far] == RougeL("unicode").score_all([nearly, wrong], [[reference]] * 2)
    assert caplog.text.count("would lose") == 1
    if language != "Vietnamese":  # three of ten letters are lost: many for a data set, few for one sample
        assert RougeL().score(wrong, [reference]) == far


def test_the_choice_is_made_for_all_references_together() -> None:
    answers = ["Python 3", "кот спит", "42"]
    references = [["Python 3"], ["кот спит дома"], ["сорок два: 42"]]
    assert rouge.choose_tokenizer("auto", references) == "unicode"
    assert rouge.choose_tokenizer("auto", references[:1]) == "by_sample"
    assert RougeL().score_all(answers, references) == RougeL("unicode").score_all(answers, references)
    assert [rouge.choose_tokenizer(mode, references) for mode in rouge.MODES[1:]] == list(rouge.MODES[1:])


ENGLISH = [
    ["The café in Malmö opens at 9."],
    ["Beyoncé"],  # one letter of seven
    ["A naïve façade, as Dvořák said, in a long English text about nothing in particular."],
    ["It costs 5 €, or about 20 złoty, and tastes of pâté."],
]


def test_english_with_accents_keeps_the_values_of_the_rouge_score_package(caplog: pytest.LogCaptureFixture) -> None:
    answers = ["the cafe in malmo", "Beyonce", "a naive façade in text", "costs 5 zloty"]
    expected = [expected_score("rouge", a, r) for a, r in zip(answers, ENGLISH)]
    assert RougeL().score_all(answers, ENGLISH) == expected
    assert any(0 < e < 1 for e in expected)
    assert not caplog.records


def test_a_few_samples_of_another_script_leave_english_as_it_is() -> None:
    """Each is read by the tokenizer that fits it: the Chinese one not by its number alone."""
    references = [*ENGLISH * 5, ["北京有2154条街道"]]
    answers = ["the café opens at 9"] * 20 + ["上海有2154万人口"]
    *english, chinese = RougeL().score_all(answers, references)
    assert english == RougeL("rouge").score_all(answers[:-1], references[:-1])
    assert RougeL("rouge").score(answers[-1], references[-1]) == 1
    assert chinese == RougeL("unicode").score(answers[-1], references[-1]) < 0.5


WORDS_OF_SCRIPTS = [
    ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
    ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
    ("עִבְרִית", ["עִבְרִית"]),
    ("العَرَبِيَّة", ["العَرَبِيَّة"]),
    ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
    ("ភាសា", ["ភា", "សា"]),
    ("ພາສາລາວ", ["ພ", "າ", "ສ", "າ", "ລ", "າ", "ວ"]),
    ("မြန်မာ", ["မြ", "န်", "မာ"]),
    ("한국어 문장", ["한국어", "문장"]),
    ("AIは3つ。", ["ai", "は", "3", "つ", "。"]),
    ("テスト", ["テ", "ス", "ト"]),
    ("snake_case(x)", ["snake", "_", "case", "(", "x", ")"]),
]


@pytest.mark.parametrize(("text", "tokens"), WORDS_OF_SCRIPTS)
def test_a_mark_stays_with_its_letter(text: str, tokens: list[str]) -> None:
    found = rouge.unicode_tokens(text)
    assert found == [unicodedata.normalize("NFKC", token) for token in tokens]
    assert len(found) == len(tokens)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("café naïve", unicodedata.normalize("NFD", "café naïve")),
        ("2024年ABC", "２０２４年ＡＢＣ"),
        ("ﬁle", "file"),
        ("می‌خواهم", "میخواهم"),  # a zero-width non-joiner inside a word
        ("ガギグ", "ｶﾞｷﾞｸﾞ"),
        ("co­operate", "cooperate"),
        ("Straße İ", "STRASSE i̇"),
        ("한글", unicodedata.normalize("NFD", "한글")),
    ],
)
def test_every_encoding_of_a_text_has_the_same_tokens(text: str, same: str) -> None:
    assert rouge.unicode_tokens(text) == rouge.unicode_tokens(same)
    assert len(rouge.unicode_tokens(text)) <= 4


def test_blank_and_no_references_score_zero_and_are_not_counted_as_emptied() -> None:
    scorer = RougeL()
    assert scorer.score("a", [""]) == scorer.score("a", ["  \n"]) == scorer.score("a", []) == 0
    assert scorer.emptied == 0


@pytest.mark.parametrize(("mode", "words"), [("by_sample", "as words of any script"), ("rouge", "by those few")])
def test_emptied_references_are_counted_in_a_warning(mode: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    references = Dataset.from_dict({"references": [["海"], ["sea"], ["+ -"], ["one"]]})
    assert RougeL("auto").score_all(["x"], [["a b"]]) == [0]
    assert not caplog.records
    nothing: Any = None
    scores = rouge_l(Reflected(references, ["海", "sea", "+", "two"], nothing, nothing, rouge_tokenizer=mode))
    assert f"loses most letters of the references of 2 of 4 samples: they are scored {words}" in caplog.text
    assert scores == ([1, 1, pytest.approx(2 / 3), 0] if mode == "by_sample" else [0, 1, 0, 0])


def test_an_unknown_rouge_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="unknown ROUGE tokenizer 'unicod'; did you mean 'unicode'"):
        RougeL("unicod")


# Many samples, and processes


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that were started."""
    started: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    return started


@pytest.mark.parametrize("mode", rouge.MODES)
def test_score_all_is_score_of_each_in_any_number_of_processes(
    mode: str, data_folder: Path | None, children: list[subprocess.Popen[bytes]]
) -> None:
    predictions, references = make_pairs(data_folder, 46)  # 50 in all: chunks of unequal length
    for n, (prediction, texts) in enumerate(OTHER_SCRIPTS):
        predictions.insert(11 * n, prediction)
        references.insert(11 * n, texts)
    single = RougeL(rouge.choose_tokenizer(mode, references))
    expected = [single.score(p, r) for p, r in zip(predictions, references)]
    assert single.emptied == (0 if mode == "unicode" else 4)
    for workers in (None, 1, 3):
        scorer = RougeL(mode)
        assert scorer.score_all(predictions, references, workers) == expected
        assert scorer.emptied == single.emptied
        assert len(children) == (2 if workers == 3 else 0)
    assert all(child.returncode == 0 for child in children)


def test_there_are_no_more_processes_than_samples(children: list[subprocess.Popen[bytes]]) -> None:
    assert RougeL().score_all(["a", "b"], [["a"], ["c"]], workers=9) == [1, 0]
    assert len(children) == 1
    assert RougeL().score_all([], [], workers=9) == []
    assert len(children) == 1


@pytest.mark.parametrize(
    ("cpus", "samples", "started"), [(2, 199, 0), (2, 200, 1), (2, 900, 1), (3, 900, 2), (1, 900, 0)]
)
def test_processes_are_started_when_each_has_enough_to_do(
    cpus: int,
    samples: int,
    started: int,
    children: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert rouge.PAIRS_PER_PROCESS >= 10_000
    monkeypatch.setattr(rouge, "PAIRS_PER_PROCESS", 100)
    monkeypatch.setattr(rouge, "_cpus", lambda: cpus)
    references = [[f"word{i % 7}"] for i in range(samples)]
    assert RougeL().score_all(["word3"] * samples, references) == [float(i % 7 == 3) for i in range(samples)]
    assert len(children) == started


def test_a_script_without_a_guard_is_run_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\nfrom srd_fast.rouge import RougeL\n"
        "print(RougeL().score_all(['a', 'b b', 'c'], [['a'], ['b'], ['d']], workers=3))\n"
    )
    told = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout == f"started\n{[1.0, 2 / 3, 0.0]}\n"


@pytest.mark.parametrize(
    ("executable", "child"),
    [
        ("/nowhere/python", ""),
        (sys.executable, "raise SystemExit(1)"),
        (sys.executable, "import sys; sys.stdin.buffer.read()"),
        (sys.executable, "import sys; sys.stdin.buffer.read(); print('no pickle')"),
    ],
)
def test_processes_that_fail_cost_no_scores(
    executable: str, child: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None can be started, or it dies before it has read or answered."""
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(rouge, "_CHILD", child)
    scorer = RougeL("by_sample")
    assert scorer.score_all(["海", "b"] * 20_000, [["海"], ["b"]] * 20_000, workers=2) == [1.0] * 40_000
    assert scorer.emptied == 20_000
    assert "ROUGE-L in 2 processes failed" in caplog.text


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(UserError, match="references for each prediction: 1 and 2 were given"):
        RougeL().score_all(["a"], [["a"], ["b"]])
    with pytest.raises(UserError, match="workers must be at least 1, not 0"):
        RougeL().score_all(["a"], [["a"]], workers=0)


def test_the_module_does_without_torch() -> None:
    code = "import sys, srd_fast.rouge; sys.exit('torch' in sys.modules or 'rouge_score' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
