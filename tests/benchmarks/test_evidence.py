"""The grid of whole runs: its order, its cells' configs, its arithmetic, and a small one from beginning to end."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srd_fast.curriculum import CurriculumPlan
from srd_fast.run.steps.settings import training_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are no part of the installed package
from benchmarks import evidence_table, tables  # noqa: E402
from benchmarks.evidence import with_wrong_answers  # noqa: E402
from benchmarks.evidence_cell import BATCH, config_of, epochs_of  # noqa: E402
from benchmarks.evidence_grid import (  # noqa: E402
    CELLS,
    DATA,
    DROP,
    EQUAL,
    FIRST,
    FULL,
    LAYERS,
    LEARNABLE,
    MAIN,
    MODES,
    OF_MODES,
    RANDOM,
    REFLECTING,
    SECONDS,
    SRD,
    TEACHERS,
    Setting,
    cells,
)
from benchmarks.rows import RESULTS, read  # noqa: E402

sys.path.remove(str(ROOT))

# Settings that have no part in a step.
OF_LOOKING = re.compile("eval_|save_|load_best|metric_for|greater_is|per_device_eval|output_dir|do_eval")
SETTINGS = [Setting(d, n, t) for d in DATA for n in LAYERS for t in TEACHERS]


def test_the_most_telling_cells_come_first_and_all_come_once() -> None:
    grid = cells(SETTINGS, list(CELLS), [0, 1, 2, 3, 4], list(EQUAL))
    assert [(c.setting, c.name, c.seed) for c in grid[:12]] == [(MAIN, n, s) for s in (0, 1, 2) for n in FIRST]
    assert len(set(grid)) == len(grid)
    seeds = Counter((c.setting, c.name) for c in grid if c.equal == "passes")
    assert seeds == {(s, n): 5 if n in FIRST else 3 for s in SETTINGS for n in CELLS}
    timed = {c.name for c in grid if c.equal == SECONDS}
    assert timed == set(REFLECTING) >= {SRD, DROP, LEARNABLE}
    assert not timed & {FULL, RANDOM, "full KD, reverse_kl", "SE-KD"}
    few = cells(SETTINGS[:1], [SRD], [4], ["passes"])
    assert [(c.name, c.seed) for c in few] == [(SRD, 4)]
    assert len({c.slug for c in grid if c.setting == MAIN}) == sum(c.setting == MAIN for c in grid)


def task(folder: Path, *overrides: str) -> dict[str, Any]:
    return {
        "teacher": "smollm2-135m-instruct", "data": "rows.jsonl", "validation": ["dev.jsonl"], "folder": str(folder),
        "seed": 3, "device": "cpu", "layers": 8, "warmup_steps": 5, "new_tokens": 16, "learning_rate": 4e-4,
        "overrides": list(overrides), "metrics": [], "best": None,
    }  # fmt: skip


def test_cells_differ_by_what_their_names_say(tmp_path: Path) -> None:
    configs = {name: config_of(task(tmp_path, *overrides)) for name, overrides in CELLS.items()}
    assert len({c.model_dump_json() for c in configs.values()}) == len(configs)
    usual = configs[SRD]
    assert (usual.curate.keep, usual.curate.stages, usual.seed, usual.reflect.max_new_tokens) == (0.75, 3, 3, 16)
    assert usual.distill["temperature_end"] == configs[FULL].distill["temperature_end"] == 2.0
    for name in (FULL, RANDOM, DROP, LEARNABLE, "curriculum only", "hard to easy"):
        assert configs[name].distill == usual.distill, name
    # All that rank by the usual signals share one base.
    sampled = {name for name in CELLS if "offline_on_policy" in name}
    assert {n for n, c in configs.items() if c.reflect != usual.reflect} == {LEARNABLE, *sampled}
    assert {configs[name].reflect.temperature for name in sampled} == {1}
    assert {c.mode for c in configs.values()} == {"kd", *MODES}
    for mode in MODES:
        assert configs[mode].mode == configs[f"SRD, {mode}"].mode == mode
        assert (configs[mode].curate.method, configs[f"SRD, {mode}"].curate) == ("none", usual.curate)
    losses = {name: training_config(configs[name]) for name in (FULL, *MODES) if name not in ("sft", "seqkd")}
    assert {name: x.divergence for name, x in losses.items()} == {
        FULL: "forward_kl", "offline_on_policy": "reverse_kl", "on_policy": "jsd", "distillm": "skew_reverse_kl",
    }  # fmt: skip
    assert [x.temperature_end for x in losses.values()] == [2, 1, 1, 1]
    longest = {name: c.distill.get("max_new_tokens") for name, c in configs.items()}
    fresh = {"on_policy", "SRD, on_policy", "distillm", "SRD, distillm"}
    assert {name for name, n in longest.items() if n} == fresh
    assert longest["on_policy"] == 16
    assert configs["SRD, schedule off"].distill["temperature_end"] == 1
    assert configs["hard to easy"].curate.signals == {"rouge_l": -1, "cross_entropy": -1}


@pytest.mark.parametrize("steps", [6, 7, 160])
def test_stages_have_the_same_steps_whatever_they_keep(steps: int) -> None:
    lengths = []
    for sizes in ([10, 10, 11], [50, 0, 0], [7, 90, 3]):
        subsets = [[f"{k}-{i}" for i in range(size)] for k, size in enumerate(sizes)]
        seen = np.cumsum(sizes)
        lengths.append([e * n / BATCH for e, n in zip(epochs_of(CurriculumPlan(subsets), steps), seen)])
    assert lengths[1:] == [pytest.approx(lengths[0])] * 2
    assert sum(lengths[0]) == pytest.approx(steps)
    assert lengths[0] == pytest.approx([steps / 6, steps / 3, steps / 2], abs=0.7)
    assert epochs_of(CurriculumPlan([["a"] * 32]), steps) == [steps * BATCH / 32]


def test_a_share_of_the_rows_gets_answers_of_others() -> None:
    rows = [{"instruction": str(i), "output": str(i)} for i in range(50)]
    made = with_wrong_answers(rows, 0.1)
    changed = [i for i, (a, b) in enumerate(zip(rows, made)) if a != b]
    assert len(changed) == 5
    assert sorted(made[i]["output"] for i in changed) == sorted(str(i) for i in changed)
    assert with_wrong_answers(rows, 0.1) == made
    assert rows[changed[0]]["output"] == str(changed[0])


@pytest.mark.parametrize("name", [SRD, "SRD, reflecting again"])
def test_the_best_checkpoint_is_looked_for_in_the_same_training(name: str, tmp_path: Path) -> None:
    given = task(tmp_path, *CELLS[name])
    plain, best = (training_config(config_of({**given, "best": x, "steps": 160})) for x in (None, "rouge_l"))
    assert plain.eval_strategy == "no"
    assert (best.eval_steps, best.eval_temperature, best.metric_for_best_model) == (20, 1.0, "rouge_l")
    assert (best.answer_limit, best.answer_metrics, best.greater_is_better) == (16, ("rouge_l",), True)
    assert best.save_only_model == (name == SRD)
    assert best.load_best_model_at_end
    ours, theirs = ({k: v for k, v in x.to_dict().items() if not OF_LOOKING.match(k)} for x in (best, plain))
    assert ours == theirs
    small = training_config(config_of({**given, "best": "rouge_l", "steps": 6}))
    assert small.eval_steps == 1


def test_a_row_of_which_a_metric_says_nothing_has_no_weight() -> None:
    rows = {"numeric_match": [1.0, None, 0.0, 1.0] * 10}
    lines = [line(name, 0, 1.0, numeric_match=2 / 3) for name in (FULL, SRD)]
    for x in lines:
        x["rows"] = {**x["rows"], **rows}
    found = {(r.provider, r.metric): r.value for r in evidence_table.rows_of(lines)}
    assert found[SRD, "numeric_match"] == 2 / 3
    assert found[SRD, "numeric_match_vs_full"] == 0
    assert "| final number |" in tables.evidence(evidence_table.rows_of(lines))


def test_students_of_the_best_checkpoint_are_rows_of_their_own() -> None:
    options = json.dumps({"best": "rouge_l"})
    lines = [line(FULL, 0, 1.0), line(FULL, 0, 1.0, options=options, best_step=120)]
    rows = evidence_table.rows_of(lines)
    cases = {r.case: r.value for r in rows if r.metric == "best_step"}
    assert cases == {"160 steps, equal passes, best checkpoint by rouge_l": 120}
    assert len({r.case for r in rows}) == 2


def line(cell: str, seed: int, kl: float, **changed: Any) -> dict[str, Any]:
    """Of a seed that moves all cells by its number; rows differ by 3, and their weights too."""
    noise = np.random.default_rng(7).normal(0, 3, 40)
    tokens = np.random.default_rng(8).integers(1, 20, 40)
    sums = (tokens * (kl + 0.4 * seed + noise)).tolist()
    mean = sum(sums) / int(tokens.sum())
    return {
        "data": "d", "layers": 15, "teacher": "as it is", "cell": cell, "seed": seed, "equal": "passes", "steps": 160,
        "options": "{}", "device": "a CPU", "threads": 2, "torch": "2", "version": "0.1", "date": "2026-01-01",
        "kl": mean, "cross_entropy": mean, "rouge_l": 0.3, "start_kl": 5.0, "start_rouge_l": 0.1,
        "sampled_rouge_l@dev": 0.2 + 0.01 * kl + 0.001 * seed, "step_seconds": 2.0,
        "rows": {"kl": sums, "cross_entropy": sums, "rouge_l": [0.3] * 40, "num_tokens": tokens.tolist()},
        **changed,
    }  # fmt: skip


def test_differences_are_of_seeds_and_rows_in_pairs() -> None:
    """Seeds move KL by 0.4 and rows by 3, and a difference of 0.1 is seen all the same."""
    lines = [line(FULL, s, 1.0) for s in (0, 1, 2)] + [line(SRD, s, 1.1 + 0.001 * s) for s in (1, 2, 3)]
    found = {(r.provider, r.metric): r.value for r in evidence_table.rows_of(lines)}
    assert found[SRD, "seeds"] == 3
    assert found[SRD, "seeds_vs_full"] == 2
    assert found[SRD, "kl_vs_full"] == pytest.approx(0.1015)
    low, high = (found[SRD, f"kl_vs_full_{end}"] for end in ("low", "high"))
    assert 0 < low < 0.1015 < high < 0.2
    assert found[FULL, "kl_sd"] == pytest.approx(0.4)
    assert found[SRD, "sampled_rouge_l@dev_vs_full"] == pytest.approx(0.001, abs=1e-4)
    assert (FULL, "kl_vs_full") not in found
    [said] = [x for x in tables.evidence_differences(evidence_table.rows_of(lines)).splitlines() if "| SRD |" in x]
    assert re.search(r"\| SRD \| \+0\.10\d \[\+0\.\d+, \+0\.\d+\] \|", said)
    assert "| none [+0.0, +0.0] |" in said
    # A single seed on both sides, of several: there is a difference, and no interval that would leave seeds out.
    one = {(r.provider, r.metric): r.value for r in evidence_table.rows_of([*lines[:3], lines[3]])}
    assert one[SRD, "kl_vs_full"] == pytest.approx(0.101, abs=0.005)
    assert (SRD, "kl_vs_full_low") not in one


def test_one_seed_has_no_interval_of_what_no_row_is_known_of_and_seconds_stand_beside_passes() -> None:
    lines = [line(RANDOM, 0, 1.0), line(SRD, 0, 1.5, equal=SECONDS)]
    rows = evidence_table.rows_of(lines)
    found = {(r.case, r.provider, r.metric): r.value for r in rows}
    case = "160 steps, equal seconds"
    assert found[case, SRD, "kl_vs_random"] == pytest.approx(0.5)
    assert (case, SRD, "kl_vs_random_low") in found
    assert (case, SRD, "sampled_rouge_l@dev_vs_random_low") not in found
    assert {r.case for r in rows} == {case, "160 steps, equal passes"}


def test_a_last_line_that_a_kill_cut_off_is_no_line(tmp_path: Path) -> None:
    file = tmp_path / "evidence.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\n{"a":')
    assert [x["a"] for x in evidence_table.read_lines(file)] == [1, 2]
    assert evidence_table.read_lines(tmp_path / "none") == []


def test_the_table_made_again_keeps_rows_of_other_machines(tmp_path: Path) -> None:
    """Rows of which there are no lines here."""
    for name in ("evidence.jsonl", "evidence.csv"):
        shutil.copy(RESULTS / name, tmp_path)
    of_lines = {row.device for row in evidence_table.rows_of(evidence_table.read_lines(tmp_path / "evidence.jsonl"))}
    others = [row for row in read(tmp_path / "evidence.csv") if row.device not in of_lines]
    evidence_table.write_all(tmp_path)
    assert others
    assert [row for row in read(tmp_path / "evidence.csv") if row.device not in of_lines] == others


@pytest.mark.long
def test_a_small_grid_ends_with_its_table_and_is_not_done_again(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.evidence", "--results", str(tmp_path), "--sets", "quickstart",
        "--layers", "2", "--teacher", str(tiny_teacher_folder), "--teachers", "as it is", "--equal", "passes",
        "--cells", FULL, SRD, LEARNABLE, "--seeds", "0", "--rows", "32", "--steps", "6", "--validation-rows", "12",
        "--warmup-steps", "0", "--new-tokens", "2", "--sampling-seeds", "10", "--parallel", "2",
        "--set", "dtype=float32",
    ]  # fmt: skip
    for number in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "3 of 3 cells, 0 tasks failed" in done.stdout, done.stdout
        assert ("base-0: done" in done.stdout) == (number == 0)
    lines = evidence_table.read_lines(tmp_path / "evidence.jsonl")
    assert not any("best_step" in x for x in lines)
    assert Counter(x["cell"] for x in lines) == {FULL: 1, SRD: 1, LEARNABLE: 1}
    assert all(len(x["rows"]["kl"]) == 12 and x["trained_steps"] == 6 for x in lines)
    folder = tmp_path / "runs" / "quickstart_2_as_it_is"
    assert (folder / "SRD-0" / "reflections.parquet").is_symlink()
    assert not (folder / "learnable-0" / "reflections.parquet").is_symlink()
    assert (folder / "learnable-0" / "start").resolve() == (folder / "base-0" / "start").resolve()
    assert "| SRD | 1 |" in (tmp_path / "evidence.md").read_text()
    assert (tmp_path / "evidence.svg").stat().st_size > 5000
    assert json.loads((folder / "SRD-0" / "steps.json").read_text()).keys() > {"prepare", "distill", "report"}
    modes = [*command, "--cells", *OF_MODES]
    done = subprocess.run(modes, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert f"{len(OF_MODES)} of {len(OF_MODES)} cells, 0 tasks failed" in done.stdout, done.stdout + done.stderr
    found = {x["cell"]: x for x in evidence_table.read_lines(tmp_path / "evidence.jsonl")}
    assert all(x["trained_steps"] == 6 and x["train_seconds"] > 0 for x in found.values())
    assert "reflect_seconds" not in found["sft"]
    assert {name for name, x in found.items() if "cache_bytes" not in x} == {
        name for name in OF_MODES if "sft" in name or "seqkd" in name
    }
    # A cell that was cut off has a cache of its own already.
    lines = [x for x in evidence_table.read_lines(tmp_path / "evidence.jsonl") if x["cell"] != "offline_on_policy"]
    (tmp_path / "evidence.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert not (folder / "offline_on_policy-0" / "teacher_cache").is_symlink()
    again = [*command, "--cells", "offline_on_policy"]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert "1 of 1 cells, 0 tasks failed" in done.stdout, done.stdout + done.stderr
    best = [*command, "--best", "rouge_l", "--cells", SRD, "SRD, reflecting again"]
    done = subprocess.run(best, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert "2 of 2 cells, 0 tasks failed" in done.stdout, done.stdout + done.stderr
    assert "base-0: done" not in done.stdout
    for x in evidence_table.read_lines(tmp_path / "evidence.jsonl")[-2:]:
        assert x["best_step"] in range(1, 7)
        assert json.loads(x["options"])["best"] == "rouge_l"
    assert not [*folder.glob("*/checkpoints")]
    assert "6 steps, equal passes, best checkpoint by rouge_l" in (tmp_path / "evidence.md").read_text()
    # A base of other settings is no beginning of a cell.
    other = [*command, "--warmup-steps", "1", "--cells", FULL]
    done = subprocess.run(other, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert "0 of 1 cells, 1 tasks failed" in done.stdout, done.stdout + done.stderr
    assert "base-0 was made with other settings than this cell has" in done.stdout
