"""Shared by all tests: no network, one thread, a tokenizer and a teacher made in code, real rows if there are any."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

with suppress(ImportError):  # torch.compile fails where pip was looked for and distutils came before setuptools
    import setuptools  # noqa: F401

import pytest
import tiny
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast.data import ROW_FORMATS
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.losses.divergences import DIVERGENCES
from srd_fast.reflection.engines import ENGINES
from srd_fast.reflection.signals import DIFFICULTIES
from srd_fast.selection import POSITION_POLICIES, SAMPLE_POLICIES
from srd_fast.showing import show_as
from srd_fast.teacher import CACHE_KINDS

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def loud() -> None:
    """What a command with --quiet or --json set for its process does not reach the next test."""
    show_as("auto")
    logging.getLogger("srd_fast").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens: every text survives, pad = eos, with a chat template. Shared: do not change it."""
    lines = [f"{row['instruction']} {row['input']} {row['output']}" for row in make_quickstart_rows(60, seed=5)]
    return tiny.tiny_tokenizer(lines, vocab_size=400)


@pytest.fixture(scope="session")
def make_tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[int], PreTrainedModel]:
    """layers -> a fresh random model for the tiny tokenizer, with room for whole prompts, in float32 and eval mode."""

    def make(layers: int) -> PreTrainedModel:
        size = {"width": 32, "vocab": len(tiny_tokenizer), "max_position_embeddings": 1024}
        return tiny.tiny_model("llama_untied", layers=layers, **size)

    return make


@pytest.fixture
def tiny_model(make_tiny_model: Callable[[int], PreTrainedModel]) -> PreTrainedModel:
    """A fresh random model of two layers."""
    return make_tiny_model(2)


@pytest.fixture(scope="session")
def tiny_teacher_folder(
    make_tiny_model: Callable[[int], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A random model of four layers and its tokenizer, as save_pretrained writes them. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    make_tiny_model(4).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path | None:
    """Real instruction data: $SRD_FAST_TEST_DATA, or shared/data beside the checkout; None where there is none."""
    given = os.environ.get("SRD_FAST_TEST_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """The Trainer collects garbage at each start; what the imports left need not be searched every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def own_registries() -> Iterator[None]:
    """What the test registers is gone after it."""
    with ExitStack() as stack:
        for registry in (
            DIVERGENCES,
            DIFFICULTIES,
            ENGINES,
            POSITION_POLICIES,
            SAMPLE_POLICIES,
            CACHE_KINDS,
            ROW_FORMATS,
        ):
            stack.enter_context(registry.restored())
        yield


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is an empty one."""
    monkeypatch.chdir(tmp_path)
