"""Figures of the benchmarks: everything named, the same bytes twice, a reason for what is left out. Values made up."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import panels, plot, problem, providers, rows

SHAPES = ["smollm2 N=1024 V=49152 D=576/960", "gemma3 N=1024 V=262144 D=640/1152"]
IGNORED = "srd-fast, 70 % ignored"
LOSSES = ("skew_reverse_kl + CE", "jsd + CE", "forward_kl, T = 1")
TRAINERS = ("srd-fast", "plain loop", "trl GKDTrainer")
METHODS = (
    "full KD",
    "SE-KD",
    "SE-KD3X",
    "SE-KD3X, 64 draws stored",
    "SRD",
    "SRD + SE-KD",
    "random 75 %, random stages",
)


def loss_providers(loss: problem.Loss) -> list[str]:
    """Who would have figures of a loss."""
    left_out = {"torchtune"} if loss.temperature == 2 else set()
    ce_alone = {name for name in providers.PROVIDERS if name.endswith("(CE alone)")}
    fused = {name for name in providers.PROVIDERS if name.startswith("liger-kernel fused")}
    left_out |= {"trl chunked", "trl gkd", *fused} if loss.sft_weight else ce_alone
    left_out |= {"liger-kernel"} if loss.divergence == "skew_reverse_kl" else set()
    return [*(p for p in providers.PROVIDERS if p not in left_out), IGNORED]


def loss_rows() -> list[rows.Row]:
    """Two shapes, two dtypes, and losses that every provider has one of."""
    found = []
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16"):
            for case in LOSSES:
                figures = {}
                for i, name in enumerate(loss_providers(problem.LOSSES[case])):
                    seconds = 0.3 if name == "se-kd" else 1 + 0.7 * i
                    figures[name] = rows.spread("seconds", [seconds * (0.9 + 0.05 * k) for k in range(7)])
                    figures[name] |= {} if name in ("gemms", IGNORED) else {"extra_peak_bytes": 3e7 * 2.3**i}
                    if name not in (*providers.NOT_THE_LOSS, IGNORED):
                        figures[name] |= {"gradient_error": 1e-7 * 3**i * (1000 if dtype == "bfloat16" else 1)}
                found += rows.make_rows("loss", figures, case=case, shape=shape, dtype=dtype)
    return found


def limit_rows() -> list[rows.Row]:
    """Three limits; the first provider ends at the end of the search, the last one has none."""
    found = []
    for shape in (x.split(" ", 2)[0] + " " + x.split(" ", 2)[2] for x in SHAPES):
        for gib in (4, 6, 8):
            names = ("srd-fast", "plain", "plain, compiled", "liger-kernel", "trl chunked", "torchtune")
            figures = {
                name: {"largest_rows": min(8192, gib * 2048 // 4**i), "searched_to": 8192}
                for i, name in enumerate(names)
            }
            figures["trl gkd"] = {"largest_rows": 0, "searched_to": 8192}
            found += rows.make_rows("limits", figures, case=f"{gib} GiB", shape=shape)
    return found


def scale_rows() -> list[rows.Row]:
    """What grows, of two providers; one peak is not known, and none of samples."""
    sizes = {"N": 1024, "V": 32768, "D": 256, "samples": 200}
    fixed = {"N": "V=49152 D=576/960", "V": "N=512 D=576/960", "D": "N=512 V=49152", "samples": "random student"}
    found = []
    for case, size in sizes.items():
        figures = {}
        for slow, name in ((1, "srd-fast"), (4, "plain")):
            figures[name] = {f"seconds@{size * k}": slow * (0.2 + 0.51 * k) for k in (1, 2, 4, 8)}
            if case != "samples":
                figures[name] |= {f"extra_peak_bytes@{size * k}": 5e7 * slow * k for k in (1, 2, 4)}
                figures[name] |= {f"extra_peak_bytes@{size * 8}": float("nan")}
            figures[name]["r_squared"] = 0.99987
        found += rows.make_rows("scale", figures, case=case, shape=f"skew_reverse_kl + CE, {fixed[case]}")
    return found


def train_rows() -> list[rows.Row]:
    """Three variants."""
    found = []
    for case in ("kernel", "kernel, packing", "kernel, packing, cache"):
        figures = {name: {"step_seconds": 2.0 + i, "peak_bytes": 3e9 * (1 + i)} for i, name in enumerate(TRAINERS)}
        found += rows.make_rows("train", figures, case=case, shape="smollm2-135m-instruct to 15 layers")
    return found


def other_rows() -> list[rows.Row]:
    """Reflection on few and on many rows; evidence."""
    found = []
    for number in (64, 847):
        figures = {name: {"tokens_per_second": number / 8} for name in ("script", "transformers, 64", "vllm, 2")}
        found += rows.make_rows("reflect", figures, shape=f"smollm2-135m-instruct, {number} rows")
    evidence = {}
    for i, name in enumerate(METHODS):
        means = {"kl": 0.8 + 0.03 * i, "cross_entropy": 2.4 + 0.02 * i, "rouge_l": 0.3 - 0.01 * i}
        evidence[name] = means | {f"{k}_sd": 0.02 * v for k, v in means.items()}
        for reference in ("full", "random") if i else ():
            apart = f"kl_vs_{reference}"
            evidence[name] |= {apart: 0.03 * i, f"{apart}_low": 0.02 * i, f"{apart}_high": 0.05 * i}
    return found + rows.make_rows("evidence", evidence, case="100 steps, equal passes", shape="train, 15 layers")


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results and every figure of them."""
    folder = tmp_path_factory.mktemp("benchmarks")
    measured = loss_rows() + limit_rows() + train_rows()
    on_gpu = [replace(r, benchmark=f"{r.benchmark}_gpu") for r in measured]
    rows.write(measured + on_gpu + scale_rows() + other_rows(), folder / "results")
    plot.draw(folder / "results", folder)
    return folder


def drawn_providers(folder: Path, name: str) -> set[str]:
    """Whose rows a figure draws."""
    metrics = {"time": "seconds", "memory": "extra_peak_bytes", "error": "gradient_error"}
    benchmark, _, metric = name.rpartition("_") if name.endswith(tuple(metrics)) else (name, "", "")
    found = rows.read(folder / "results" / f"{benchmark}.csv")
    return {r.provider for r in found if r.metric.startswith(metrics.get(metric, ""))}


UNITS = {
    "loss_time": ["time / time of gemms"],
    "loss_memory": ["peak (MiB)"],
    "loss_error": ["relative error (no unit)"],
    "limits": ["largest N (rows)", ">0<", ">≥ 8,192<"],
    "scale": ["time (seconds)", "peak memory (MiB)", "N (rows)", "V (classes)", "D (width)", "samples", "0.9999"],
    "train": ["time / time of plain loop", "peak memory / peak memory of plain loop"],
    "reflect": ["tokens per second", "847 rows"],
    "evidence": ["(nats per token)", "ROUGE-L", "(0 to 1)", "that of full KD", "left of 0 is better"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(plot.DRAWINGS))
def test_names_every_provider_and_unit(figures: Path, name: str) -> None:
    svg, today = (figures / f"{name}.svg").read_text(encoding="utf-8"), rows.make_rows("x", {"x": {"x": 0.0}})[0]
    expected = [*drawn_providers(figures, name), *UNITS[name.replace("_gpu", "")], today.date, today.device]
    assert [text for text in expected if text not in svg] == []


@pytest.mark.slow
def test_same_rows_same_bytes(figures: Path, tmp_path: Path) -> None:
    plot.draw(figures / "results", tmp_path)
    for name in plot.DRAWINGS:
        assert (tmp_path / f"{name}.svg").read_bytes() == (figures / f"{name}.svg").read_bytes(), name


def test_says_why_figures_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows.write(rows.make_rows("loss", {"srd-fast": {"extra_peak_bytes": 1e8}}, case="jsd"), tmp_path)
    rows.write(rows.make_rows("train", {"srd-fast": {"step_seconds": 1.0}}, case="cache"), tmp_path)
    plot.draw(tmp_path, tmp_path)
    printed = capsys.readouterr().out
    assert [p.name for p in tmp_path.glob("*.svg")] == ["loss_memory.svg"]
    assert "loss_time.svg left out: no seconds in loss.csv" in printed
    assert "train.svg left out: nothing to compare with" in printed
    for name in ("limits", "scale", "reflect", "evidence"):
        assert f"{name}.svg left out: no rows in {name}.csv" in printed


def test_a_bar_is_divided_by_its_own_machine(tmp_path: Path) -> None:
    found = [r for r in loss_rows() if r.case == "jsd + CE" and r.dtype == "float32" and r.shape == SHAPES[0]]
    slower = [replace(r, device="another CPU", value=r.value * (3 if r.provider == "gemms" else 9)) for r in found]
    rows.write(found + slower, tmp_path)
    drawn = plot.rows_of(tmp_path, "loss", "seconds")
    of = {}
    for part in (p for same in panels.by_dtype(drawn) for p in panels.by_shape(same)):
        of[part[0].device] = panels.spans(part, "seconds", base="gemms")
        assert panels.title_of(part, drawn).endswith(part[0].machine)
    here, there = of[found[0].device], of["another CPU"]
    assert there["jsd + CE", "plain"] == pytest.approx([3 * x for x in here["jsd + CE", "plain"]])
    assert here["jsd + CE", "gemms"][0] == there["jsd + CE", "gemms"][0] == 1


def test_each_machine_shows_its_own_most_rows_of_a_reflection(tmp_path: Path) -> None:
    found = [r for r in other_rows() if r.benchmark == "reflect"]
    fewer = [replace(r, device="another CPU") for r in found if "64 rows" in r.shape]
    rows.write(found + fewer, tmp_path / "results")
    plot.draw(tmp_path / "results", tmp_path)
    svg = (tmp_path / "reflect.svg").read_text(encoding="utf-8")
    assert "847 rows" in svg
    assert "64 rows" in svg
