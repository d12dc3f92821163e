"""The package as it is installed: names, wheel, examples in docstrings, and which module may import which."""

import ast
import doctest
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import srd_fast

ROOT = Path(__file__).resolve().parents[2]

# From the lowest to the highest; a room imports from its own floor and from those below it.
FLOORS = (
    ("errors", "suggest", "registry", "files", "own_code", "sharing", "showing"),
    ("rouge", "workers"),
    ("kernels",),
    ("losses",),
    ("models",),
    ("data",),
    ("teacher",),
    ("reflection", "curriculum"),
    ("selection",),
    ("training",),
    ("integrations",),
    ("report",),
    ("run",),
    ("memory",),
    ("cli",),
    ("__main__",),
)
KERNELS = sorted(ROOT.glob("kernels/**/*.py"))
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def sources() -> dict[str, Path]:
    """Module name -> its file, the package's own __init__ left out. `srd_fast/kernels` is a link to `kernels`."""
    found = [p for p in ROOT.glob("srd_fast/**/*.py") if "kernels" not in p.parts[len(ROOT.parts) :]]
    files = {p: ("srd_fast", *p.relative_to(ROOT / "srd_fast").with_suffix("").parts) for p in found}
    files |= {p: ("srd_fast", "kernels", *p.relative_to(ROOT / "kernels").with_suffix("").parts) for p in KERNELS}
    named = {".".join(n for n in parts if n != "__init__"): p for p, parts in files.items()}
    named.pop("srd_fast")
    return named


def imported(module: str, path: Path) -> set[str]:
    """Full names of what a module imports, relative imports resolved, those inside functions included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def rooms(names: set[str]) -> set[str]:
    return {n.split(".")[1] for n in names if n.startswith("srd_fast.")}


def test_every_module_has_its_floor() -> None:
    assert {name.split(".")[1] for name in sources()} == set(FLOOR_OF)


@pytest.mark.parametrize("module", sources())
def test_imports_go_down(module: str) -> None:
    own = FLOOR_OF[module.split(".")[1]]
    above = {room for room in rooms(imported(module, sources()[module])) if FLOOR_OF.get(room, 99) > own}
    assert not above, f"{module} imports from {above}, which stand above it"


def test_kernels_know_nothing_of_the_rest() -> None:
    for module, path in sources().items():
        if module.split(".")[1] == "kernels":
            assert rooms(imported(module, path)) <= {"kernels"}


@pytest.mark.parametrize("module", sources())
def test_what_one_system_alone_has_is_imported_where_it_is_used(module: str) -> None:
    """A module of Unix at a module's top would end every import elsewhere; inside a try or a function it does not."""
    of_unix = {"crypt", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
    for node in ast.parse(sources()[module].read_text(encoding="utf-8")).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not of_unix.intersection(names)


def test_the_import_checker_sees_every_way_to_import(tmp_path: Path) -> None:
    text = "import srd_fast.a\nfrom . import b\nfrom .c import x\nfrom .. import d\nfrom srd_fast.e.f import y\n"
    path = tmp_path / "m.py"
    path.write_text(text + "def g():\n    from ..h import z\n")
    expected = {"srd_fast.a", "srd_fast.p.b", "srd_fast.p.c.x", "srd_fast.d", "srd_fast.e.f.y", "srd_fast.h.z"}
    assert imported("srd_fast.p.m", path) == expected
    assert rooms(expected) == {"a", "p", "d", "e", "h"}


# Names


@pytest.mark.parametrize("name", srd_fast.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(srd_fast, name)
    assert found.__doc__
    assert found.__module__.startswith("srd_fast.")
    assert name in dir(srd_fast)


def test_the_contract_names_are_public() -> None:
    wanted = {"distillation_loss", "DistillationLoss", "reflect", "curate", "SRDConfig", "SRDTrainer", "evaluate"}
    wanted |= {"distillation_loss_from_logits", "register_divergence", "register_difficulty", "UserError"}
    for kind in ("divergence", "difficulty", "engine", "position_policy", "sample_policy", "cache_kind"):
        wanted |= {f"register_{kind}", f"{kind}_names"}
    assert wanted <= set(srd_fast.__all__)
    assert srd_fast.__all__ == sorted(srd_fast.__all__)


def test_every_error_has_the_common_base() -> None:
    """Being stopped is no error: who catches all errors, to go on, must not catch Ctrl-C."""
    named = {m: importlib.import_module(m) for m in IMPORTABLE}
    found = {x for module in named.values() for x in vars(module).values() if isinstance(x, type)}
    own = {x for x in found if issubclass(x, BaseException) and x.__module__.startswith("srd_fast.")}
    assert {x.__name__ for x in own if not issubclass(x, srd_fast.SRDFastError)} == {"Stopped"}
    assert {x.__name__ for x in own} - {"Stopped"} <= set(srd_fast.__all__)
    assert issubclass(srd_fast.UserError, ValueError)
    assert not issubclass(importlib.import_module("srd_fast.run.stopping").Stopped, Exception)


def test_the_version_is_the_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert srd_fast.__version__ == importlib.metadata.version("srd-fast")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert srd_fast.__version__ == "0+unknown"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'srd_fast' has no attribute 'distil'"):
        srd_fast.distil  # noqa: B018
    assert not hasattr(srd_fast, "kernel")


def outside(code: str, folder: Path) -> str:
    """What python prints for `code`, run in another folder than the checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_other_package_is_shadowed(tmp_path: Path) -> None:
    code = """
import importlib.util, sys, srd_fast.kernels
print(srd_fast.kernels.distillation_rows.__module__)
for name in ("kernels", "benchmarks", "tests", "examples"):
    spec = importlib.util.find_spec(name)
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    print(*(p for p in places if p))
"""
    first, *places = outside(code, tmp_path).splitlines()
    assert first == "srd_fast.kernels.rows"
    assert not any(str(ROOT) in place for place in places)


def test_the_command_line_starts_without_torch(tmp_path: Path) -> None:
    code = """
import sys
import srd_fast, srd_fast.cli
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(srd_fast.UserError.__name__)
assert srd_fast.__version__ and srd_fast.DamagedFileError
assert "torch" not in sys.modules
"""
    assert outside(code, tmp_path) == "UserError"


def test_the_installed_command_helps_and_refuses(tmp_path: Path) -> None:
    command = shutil.which("srd-fast", path=str(Path(sys.executable).parent))
    assert command, "there is no srd-fast beside python: install the package"
    told = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    for verb in ("init-student", "reflect", "curate", "distill", "evaluate", "report", "run", "memory"):
        assert f"\n  {verb} " in told.stdout
    (tmp_path / "config.yaml").write_text("curate: {keep: 2}\n")
    wrong = [command, "run", "config.yaml"]
    refused = subprocess.run(wrong, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: config: curate.keep: ")
    assert refused.stderr.count("\n") == 1


# Docstrings


def test_kernels_are_part_of_the_package() -> None:
    assert {"srd_fast.kernels", "srd_fast.kernels.rows"} <= set(sources())
    assert importlib.util.find_spec("srd_fast.kernels.rows") is not None


# Loaded by vLLM itself, and made of TRL's classes.
NEEDS = {"srd_fast.reflection.vllm_ngrams": "vllm", "srd_fast.integrations.trl": "trl"}
IMPORTABLE = sorted(m for m in sources() if m not in NEEDS or importlib.util.find_spec(NEEDS[m]))


@pytest.mark.parametrize("module", IMPORTABLE)
@pytest.mark.usefixtures("own_registries")
def test_examples_in_docstrings_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


@pytest.mark.parametrize("module", sources())
def test_a_file_is_read_in_one_sitting(module: str) -> None:
    """400 lines, or a head that says why it is one idea."""
    text = sources()[module].read_text(encoding="utf-8")
    assert text.count("\n") <= 400 or "One file, because" in (ast.get_docstring(ast.parse(text)) or "")


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [t for m in IMPORTABLE for t in finder.find(importlib.import_module(m)) if t.examples]
    assert len(found) >= 2


@pytest.mark.parametrize("module", IMPORTABLE)
def test_every_module_says_what_it_is_for(module: str) -> None:
    assert importlib.import_module(module).__doc__


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    for needed, least in (("setuptools", 77), ("pip", 1)):
        found = importlib.metadata.version(needed) if importlib.util.find_spec(needed) is not None else "0"
        if int(found.partition(".")[0]) < least:
            pytest.skip(f"building a wheel without isolation needs {needed} {least} or later, found {found}")
    copy = tmp_path_factory.mktemp("source") / "srd-fast"
    for name in ("srd_fast", "kernels", "examples"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    target = copy.parent / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", target, copy]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(target.glob("srd_fast-*.whl")))


def test_the_wheel_holds_all_modules_and_the_template(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    expected = {
        m.replace(".", "/") + (f"/{p.name}" if p.name == "__init__.py" else ".py") for m, p in sources().items()
    }
    expected |= {"srd_fast/__init__.py", "srd_fast/py.typed", "srd_fast/examples/quickstart.yaml"}
    expected |= {f"srd_fast/report/{p.name}" for p in (ROOT / "srd_fast" / "report").glob("*.*") if p.suffix != ".py"}
    assert {"srd_fast/kernels/rows.py", "srd_fast/report/template.html", "srd_fast/py.typed"} <= expected
    assert expected <= names
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"srd_fast"}


def test_the_wheel_brings_command_and_licence(wheel: zipfile.ZipFile) -> None:
    texts = {n.split("/", 1)[1]: n for n in wheel.namelist() if ".dist-info/" in n}
    assert "srd-fast = srd_fast.cli:main" in wheel.read(texts["entry_points.txt"]).decode()
    assert "licenses/LICENSE" in texts


TYPES = """
from srd_fast import SRDConfig, UserError, curate, distillation_loss
from srd_fast.kernels import RowDivergence, RowValues, distillation_rows
from srd_fast.losses import LossOptions

reveal_type(SRDConfig.temperature_start)
reveal_type(UserError)
reveal_type(curate)
reveal_type(distillation_loss)
reveal_type(RowDivergence)
reveal_type(RowValues)
reveal_type(distillation_rows)
reveal_type(LossOptions().coefficients)
"""


# Other packages are not looked into: that takes a type checker a minute and more.
MYPY = """
[mypy]
ignore_missing_imports = True
[mypy-torch.*,transformers.*,datasets.*,numpy.*,pyarrow.*,pydantic.*,accelerate.*,peft.*,triton.*,nltk.*]
follow_imports = skip
follow_imports_for_stubs = True
"""


@pytest.mark.slow
def test_the_wheels_types_are_seen_from_outside(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """A type checker that knows nothing of this checkout."""
    pytest.importorskip("mypy")
    wheel.extractall(tmp_path / "site")
    (tmp_path / "user.py").write_text(TYPES, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(MYPY, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--follow-imports=silent"]
    environment = {**os.environ, "MYPYPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [*command, "user.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    revealed = [line.partition("Revealed type is ")[2] for line in done.stdout.splitlines() if "Revealed" in line]
    assert done.returncode == 0, done.stdout
    assert len(revealed) == TYPES.count("reveal_type")
    assert revealed[0] == '"float"'
    assert not [r for r in revealed if r == '"Any"']
    for name, line in zip(("RowDivergence", "RowValues", "RowCoefficients"), (revealed[4], revealed[5], revealed[7])):
        assert re.search(rf"srd_fast\.kernels\.\w+\.{name}\b", line), line
