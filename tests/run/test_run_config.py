"""A run's configuration: what is misspelt, of the wrong type or out of range is told in one line, before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from srd_fast.curriculum import CURATION_PRESETS
from srd_fast.errors import UserError
from srd_fast.reflection.reflect import REFLECTION_PRESETS
from srd_fast.run.config import RunConfig, load_run_config
from srd_fast.run.pipeline import fingerprints
from srd_fast.run.steps.run import has_fast_bfloat16
from srd_fast.training.presets import TRAINING_PRESETS


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def load(text: str, *overrides: str) -> RunConfig:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_run_config(path, list(overrides))

    return load


def refused(config: Any, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        config(text, *overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "given", "nearest"),
    [
        ("techer: x", "key 'techer'", "teacher"),
        ("curat: {keep: 0.5}", "key 'curat'", "curate"),
        ("curate: {kepe: 0.5}", "key in curate 'kepe'", "keep"),
        ("reflect: {bach_size: 4}", "key in reflect 'bach_size'", "batch_size"),
        ("evaluate: {sedes: [1]}", "key in evaluate 'sedes'", "seeds"),
        ("init_student: {layer: 4}", "key in init_student 'layer'", "layers"),
        ("distill: {leraning_rate: 0.1}", "key 'leraning_rate'", "learning_rate"),
        ("distill: {temprature_end: 2}", "key 'temprature_end'", "temperature_end"),
    ],
)
def test_a_misspelt_key_gets_the_nearest_right_one(text: str, given: str, nearest: str, config: Any) -> None:
    message = refused(config, text)
    assert f"unknown {given}; did you mean {nearest!r}?" in message
    key, _, value = text.partition(": ")
    if value.startswith("{"):
        name, _, inner = value[1:-1].partition(": ")
        assert refused(config, "", f"{key}.{name}={inner}") == message


def test_an_unknown_key_comes_with_the_known_ones(config: Any) -> None:
    assert (
        "Known: band, floor_subsets, keep, method, order, reflect_again, rrf_k, signals, stages, weight_by"
        in refused(config, "curate: {zzz: 1}")
    )


@pytest.mark.parametrize(
    "key",
    ["output_dir", "seed", "template", "max_prompt_length", "teacher_cache", "teacher_cache_kind"],
)
def test_what_the_run_sets_is_not_for_distill(key: str, config: Any) -> None:
    assert f"{key} is set at the top level of the config, or by the run itself" in refused(
        config, "", f"distill.{key}=1"
    )


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("curate.keep=0", "curate.keep"),
        ("curate.keep=1.2", "curate.keep"),
        ("curate.keep=.nan", "curate.keep"),
        ("curate.keep=much", "curate.keep"),
        ("curate.stages=0", "curate.stages"),
        ("curate.stages=2.5", "curate.stages"),
        ("curate.rrf_k=0", "curate.rrf_k"),
        ("curate.rrf_k=.nan", "curate.rrf_k"),
        ("curate.method=easy", "curate.method"),
        ("curate.signals=[rouge_l]", "curate.signals"),
        ("curate.signals={rouge_l: many}", "curate.signals.rouge_l"),
        ("curate=5", "curate"),
        ("reflect.batch_size=0", "reflect.batch_size"),
        ("reflect.max_new_tokens=-1", "reflect.max_new_tokens"),
        ("reflect.temperature=-0.5", "reflect.temperature"),
        ("reflect.temperature=.nan", "reflect.temperature"),
        ("reflect.temperature=.inf", "reflect.temperature"),
        ("reflect.signals=rouge_l", "reflect.signals"),
        ("reflect.rouge_tokenizer=latin", "reflect.rouge_tokenizer"),
        ("reflect.score_eos=perhaps", "reflect.score_eos"),
        ("cache.kind=top", "cache.kind"),
        ("cache.kind=[]", "cache.kind"),
        ("cache.k=0", "cache.k"),
        ("cache.k=1.5", "cache.k"),
        ("evaluate.seeds=[a]", "evaluate.seeds.0"),
        ("evaluate.temperature=0", "evaluate.temperature"),
        ("evaluate.temperature=.inf", "evaluate.temperature"),
        ("init_student.layers=half", "init_student.layers"),
        ("init_student.warmup_steps=-1", "init_student.warmup_steps"),
        ("init_student.warmup_learning_rate=0", "init_student.warmup_learning_rate"),
        ("max_rows=0", "max_rows"),
        ("max_bad_rows=-1", "max_bad_rows"),
        ("max_bad_rows=0.0", "max_bad_rows"),
        ("max_bad_rows=1.0", "max_bad_rows"),
        ("max_bad_rows=true", "max_bad_rows"),
        ("max_bad_rows=few", "max_bad_rows"),
        ("curate.stages=99999999999", "curate.stages"),
        ("distill.learning_rate=.nan", "distill.learning_rate"),
        ("max_prompt_length=0", "max_prompt_length"),
        ("validation=-5", "validation"),
        ("validation=[1]", "validation"),
        ("seed=-1", "seed"),
        ("seed=a", "seed"),
        ("seed=99999999999", "seed"),
        ("dtype=float8", "dtype"),
        ("teacher=5", "teacher"),
        ("distill=fast", "distill"),
    ],
)
def test_wrong_types_and_ranges_name_the_key_and_the_value(override: str, where: str, config: Any) -> None:
    message = refused(config, "", override)
    assert message.startswith(f"config: {where}: ")
    value = yaml.safe_load(override.partition("=")[2])
    last = value if not isinstance(value, (list, dict)) or where.endswith("signals") else None
    if last is not None:
        assert message.endswith(f", got {last!r}")


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("seed=7", None, "seed", 7),
        ("teacher=some/model", None, "teacher", "some/model"),
        ("validation=12", None, "validation", 12),
        ("validation=rows.jsonl", None, "validation", "rows.jsonl"),
        ("max_rows=null", None, "max_rows", None),
        ("curate.keep=0.5", "curate", "keep", 0.5),
        ("curate.keep=5e-1", "curate", "keep", 0.5),
        ("curate.rrf_k=1e2", "curate", "rrf_k", 100.0),
        ("curate.signals={rouge_l: 2, cross_entropy: 1e-1}", "curate", "signals", {"rouge_l": 2, "cross_entropy": 0.1}),
        ("curate.floor_subsets=true", "curate", "floor_subsets", True),
        ("cache.kind=live", "cache", "kind", "live"),
        ("cache.k=128", "cache", "k", 128),
        ("evaluate.seeds=[10, 20]", "evaluate", "seeds", [10, 20]),
        ("evaluate.seeds=[]", "evaluate", "seeds", []),
        ("init_student.layers=[0, 1, 3]", "init_student", "layers", [0, 1, 3]),
        ("init_student.layers=6", "init_student", "layers", 6),
        ("init_student.warmup_learning_rate=1E-4", "init_student", "warmup_learning_rate", 1e-4),
    ],
)
def test_overrides_are_values(override: str, section: str | None, key: str, value: Any, config: Any) -> None:
    found = config("seed: 1\ncurate: {stages: 2}\n", override)
    assert getattr(getattr(found, section) if section else found, key) == value
    assert found.curate.stages == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E-5", 2e-5),
        ("-1e-3", -1e-3),
        (".5e-3", 5e-4),
        ("1.0e-4", 1e-4),
        ("[1e-4, 2e-4]", [1e-4, 2e-4]),
    ],
)
def test_numbers_without_a_dot_are_numbers_in_file_and_override(text: str, value: Any, config: Any) -> None:
    assert config(f"distill: {{stage_learning_rates: {text}}}").distill == {"stage_learning_rates": value}
    assert config("", f"distill.stage_learning_rates={text}").distill == {"stage_learning_rates": value}


@pytest.mark.parametrize("name", ["2024-experiment", "7even", "1e", "e5", "0e/1e"])
def test_names_that_begin_like_numbers_stay_names(name: str, config: Any) -> None:
    assert config("", f"output_dir={name}").output_dir == name


def test_no_is_a_strategy_although_yaml_takes_it_for_false(config: Any) -> None:
    assert config("distill: {save_strategy: no}", "distill.eval_strategy=no").distill == {
        "save_strategy": "no",
        "eval_strategy": "no",
    }


def test_the_last_override_wins_over_the_file(config: Any) -> None:
    text = "curate: {keep: 0.1, stages: 2}\ndistill: {skew: 0.3}\n"
    found = config(text, "curate.keep=0.2", "curate.keep=0.3", "distill.divergence=jsd")
    assert (found.curate.keep, found.curate.stages) == (0.3, 2)
    assert found.distill == {"skew": 0.3, "divergence": "jsd"}


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("keep", "override 'keep' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
        ("seed.x=3", "'seed' is not a section"),
        ("seed=[1", "the value is not valid YAML"),
    ],
)
def test_wrong_overrides(override: str, complaint: str, config: Any) -> None:
    assert complaint in refused(config, "seed: 1", override)


@pytest.mark.parametrize("preset", ["paper", "official", "learnable"])
def test_a_preset_lies_under_explicit_keys(preset: str, config: Any) -> None:
    plain = config(f"preset: {preset}")
    assert plain.distill == TRAINING_PRESETS[preset]
    for section, presets in ((plain.curate, CURATION_PRESETS), (plain.reflect, REFLECTION_PRESETS)):
        assert {k: getattr(section, k) for k in presets[preset]} == presets[preset]
    text = f"preset: {preset}\ncurate: {{keep: 0.5}}\ndistill: {{epochs_per_stage: 1, skew: 0.2}}\n"
    found = config(text, "reflect.max_new_tokens=9")
    assert (found.curate.keep, found.curate.stages) == (0.5, 3)
    assert found.reflect.max_new_tokens == 9
    assert found.distill == {**TRAINING_PRESETS[preset], "epochs_per_stage": 1, "skew": 0.2}
    assert config("", f"preset={preset}") == plain


def test_a_given_end_displaces_the_presets_list(config: Any) -> None:
    found = config("preset: official\ndistill: {sft_weight_end: 0.05}\n").distill
    assert "sft_weight" not in found
    assert (found["sft_weight_end"], found["temperature"]) == (0.05, [1.0, 1.5, 2.0])


def test_presets_are_the_papers_numbers(config: Any) -> None:
    paper, official = config("preset: paper"), config("preset: official")
    assert (paper.curate.keep, paper.curate.stages, paper.curate.rrf_k) == (0.75, 3, 60)
    assert not paper.curate.floor_subsets
    assert official.curate.floor_subsets
    assert (paper.distill["temperature_start"], paper.distill["temperature_end"]) == (1.0, 2.0)
    assert (paper.distill["sft_weight_start"], paper.distill["sft_weight_end"]) == (0.3, 0.1)
    assert paper.distill["epochs_per_stage"] == official.distill["epochs_per_stage"] == 8
    assert official.distill["temperature"] == [1.0, 1.5, 2.0]
    assert official.distill["sft_weight"] == pytest.approx([1 - 0.8, 1 - 0.9, 1 - 1.0])
    quarters = config("preset: POCL")
    assert (quarters.curate.keep, quarters.curate.stages, quarters.curate.floor_subsets) == (1.0, 4, False)
    assert quarters.distill["temperature"] == [1.0, 1.33, 1.67, 2.0]
    assert quarters.distill["sft_weight"] == pytest.approx([1 - 0.7, 1 - 0.8, 1 - 0.9, 1 - 1.0])
    assert quarters.distill["epochs_per_stage"] == 8
    assert (official.reflect.temperature, official.reflect.no_repeat_ngram_size) == (0.01, 6)
    assert (official.reflect.max_new_tokens, official.reflect.score_eos) == (256, False)


def test_a_colon_without_a_space_is_told(config: Any) -> None:
    assert refused(config, "", "lora={r:4}").endswith("YAML has a space after a colon: 'r: 4'")
    assert refused(config, "lora: {r:4}").endswith("YAML has a space after a colon: 'r: 4'")
    assert config("", "lora={r: 4}").lora == {"r": 4}


@pytest.mark.parametrize("preset", [None, *TRAINING_PRESETS])
@pytest.mark.parametrize("mode", ["kd", "sft", "offline_on_policy", "on_policy"])
def test_another_mode_or_preset_of_a_written_config_has_its_own_values(
    preset: str | None, mode: str, tmp_path: Path
) -> None:
    """A run folder as CONFIG is what the run was asked for, not what its mode and preset made of that."""
    asked = [f"mode={mode}", f"preset={preset or 'null'}", "distill.weight_decay=0.01", "curate.rrf_k=7"]
    first, file = load_run_config(None, asked), tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(first.model_dump(), sort_keys=False))
    assert load_run_config(file) == first
    assert fingerprints(load_run_config(file)) == fingerprints(first)
    for more in (
        ["mode=kd"],
        ["mode=on_policy", "preset=official"],
        ["preset=null"],
        ["distill.sft_weight_start=0.2", "distill.sft_weight_end=0.2"],
        ["distill.temperature=1.25", "preset=paper"],
    ):
        assert load_run_config(file, more) == load_run_config(None, [*asked, *more]), more


@pytest.mark.parametrize("given", ["distill.sft_weight_start=0.3", "distill.temperature_end=2.0", "curate.keep=0.75"])
@pytest.mark.parametrize("mode", ["kd", "sft", "on_policy"])
def test_what_was_given_as_the_preset_has_it_stays_in_the_run(given: str, mode: str, tmp_path: Path) -> None:
    first, file = load_run_config(None, [f"mode={mode}", "preset=paper", given]), tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(first.model_dump()))
    assert load_run_config(file) == first


def test_an_unknown_preset_is_named_with_the_nearest(config: Any) -> None:
    assert (
        "unknown preset 'papr'; did you mean 'paper'? Known: POCL, SE-KD, SE-KD3X, learnable, official, paper"
        in refused(config, "preset: papr")
    )


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n"])
def test_an_empty_file_is_all_defaults(text: str, config: Any) -> None:
    assert config(text) == RunConfig() == load_run_config(None)


def test_an_empty_section_is_its_defaults(config: Any) -> None:
    text = "curate:\n  # keep: 0.5\ndistill:\n"
    assert config(text) == RunConfig()
    assert config(text, "curate.keep=0.5", "preset=paper").curate.keep == 0.5


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("7", 7), ("0.25", 0.25), ("1e-3", 0.001), ("null", None)])
def test_bad_rows_are_a_count_a_share_or_without_limit(text: str, value: Any, config: Any) -> None:
    for found in (config(f"max_bad_rows: {text}"), config("", f"max_bad_rows={text}")):
        assert found.max_bad_rows == value
        assert type(found.max_bad_rows) is type(value)
        assert config(yaml.safe_dump(found.model_dump())) == found
    assert config("").max_bad_rows == 0.1


def test_an_alias_is_a_copy(config: Any) -> None:
    text = "reflect: &same {batch_size: 4, max_new_tokens: 9}\nevaluate: *same\n"
    found = config(text, "reflect.batch_size=5")
    assert (found.reflect.batch_size, found.evaluate.batch_size) == (5, 4)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed: 1\nseed: 2", "the section at line 1 has the key 'seed' twice"),
        ("seed: 1\ncurate:\n  keep: 0.5\n  keep: 0.6", "the section at line 3 has the key 'keep' twice"),
        ("output_dir: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        ("distill: &a {x: *a}", "line 1 has an alias of itself within it"),
        ("seed: 0x" + "f" * 5000, "seed: must be a number of at most 18 digits, got a int of thousands of digits"),
        ('teacher: "a\\0"', "teacher: holds a NUL or half of a surrogate pair"),
        ("preset: [paper]", "config: preset: input should be a valid string"),
        ("a" * 100_001, "is larger than 100000 bytes"),
        ("a: " + "[" * 2000, "nested too deeply"),
    ],
    ids=lambda text: text[:30],
)
def test_odd_yaml_is_named(text: str, complaint: str, config: Any) -> None:
    assert complaint in refused(config, text)


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "list"), ("just words", "str"), ("5", "int")])
def test_a_file_must_hold_keys(text: str, kind: str, config: Any) -> None:
    assert f"must hold `key: value` lines, got {kind}" in refused(config, text)


@pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "curate:\n\tkeep: 1", "a: 'open\nb: 1\n", "\x00"])
def test_broken_yaml_is_one_line(text: str, config: Any) -> None:
    message = refused(config, text)
    assert "config.yaml' is not valid YAML" in message


@pytest.mark.parametrize("text", ["1: x", "distill: {1: x}", "curate: {null: 3}"])
def test_keys_are_text(text: str, config: Any) -> None:
    assert refused(config, text).startswith("config")


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config '.*nowhere\.yaml' cannot be read"):
        load_run_config(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match=r"cannot be read: .*config\.yaml"):
        load_run_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"teacher: caf\xe9")
    with pytest.raises(UserError, match="cannot be read"):
        load_run_config(tmp_path / "latin.yaml")


def test_a_folder_stands_for_the_config_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    assert load_run_config(tmp_path).seed == 7
    assert load_run_config(str(tmp_path), ["seed=8"]).seed == 8


def test_a_written_config_reads_back_equal(config: Any) -> None:
    first = config("preset: official\nvalidation: 7\n", "curate.signals={rouge_l: 1}", "init_student.layers=[0, 2]")
    assert config(yaml.safe_dump(first.model_dump(), sort_keys=False)) == first


@pytest.mark.parametrize(
    ("amx", "avx512", "vendor", "fast"),
    [
        (True, True, "GenuineIntel", True),
        (False, True, "GenuineIntel", False),
        (False, True, "AuthenticAMD", True),
        (False, True, None, True),
        (False, False, "AuthenticAMD", False),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_is_faster_with_it(
    amx: bool, avx512: bool, vendor: str | None, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    if vendor is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: a CPU\n")
    assert has_fast_bfloat16(torch.device("cpu"), tmp_path / "cpuinfo") == fast
