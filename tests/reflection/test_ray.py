"""Reflection by the actors of a Ray cluster: on one machine, with the answers of their engine without Ray."""

import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from srd_fast import reflect
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.errors import UserError
from srd_fast.reflection import Sampling
from srd_fast.reflection.ray_engine import RayEngine

ROWS = make_quickstart_rows(24, seed=3)
SAMPLING = Sampling(max_new_tokens=24)


def reflections(student: Any, tokenizer: PreTrainedTokenizerFast, engine: str, **options: Any) -> dict[str, list[Any]]:
    made = reflect(
        student, ROWS, tokenizer, engine=engine, engine_options=options, sampling=SAMPLING, batch_size=2, progress=False
    )
    return made.to_dict()


def test_without_ray_one_line_says_what_to_install(
    tiny_teacher_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    real = importlib.util.find_spec
    with (
        mock.patch("importlib.util.find_spec", lambda name, *a: None if name == "ray" else real(name, *a)),
        pytest.raises(UserError, match=r"engine 'ray' needs Ray: pip install 'srd-fast\[ray\]'"),
    ):
        reflections(str(tiny_teacher_folder), tiny_tokenizer, "ray")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actors": 0}, "actors must be a whole number of at least 1, got 0"),
        ({"actors": 1.5}, r"actors must be a whole number of at least 1, got 1\.5"),
        ({"engine": "vlm"}, "unknown engine 'vlm'; did you mean 'vllm'"),
        ({"engine": "ray"}, "engine 'ray' cannot run in Ray's actors: name another one"),
        ({"engine": "auto"}, "engine 'auto' cannot run in Ray's actors: name another one"),
    ],
)
def test_bad_options_get_one_line(
    options: dict[str, Any], message: str, tiny_teacher_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=message):
        RayEngine(str(tiny_teacher_folder), tiny_tokenizer, **options)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster of two cores on this machine."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def is_actor(process: psutil.Process) -> bool:
    return "ray::_Actor" in " ".join(process.info["cmdline"] or [])


@pytest.mark.ray
def test_two_actors_one_killed_give_the_reflections_of_no_actor(
    cluster: Any, tiny_teacher_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = reflections(str(tiny_teacher_folder), tiny_tokenizer, "transformers")
    assert len(set(wanted["generation"])) > 12
    killed: list[str] = []
    asked = RayEngine.generate

    def generate(self: RayEngine, prompts: Any, sampling: Sampling) -> Any:
        self.start()
        with lock:
            if not killed:
                one = next(p for p in psutil.process_iter(["name", "cmdline"]) if is_actor(p))
                killed.append(one.name())
                one.kill()
        return asked(self, prompts, sampling)

    lock = threading.Lock()
    with mock.patch.object(RayEngine, "generate", generate):
        found = reflections(str(tiny_teacher_folder), tiny_tokenizer, "ray", actors=2)
    assert killed
    assert "one of Ray's actors died and is started again" in caplog.text
    assert found == wanted
