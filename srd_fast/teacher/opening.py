"""Open a teacher cache for a training, after filling in what it lacks."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig

from ..errors import DamagedFileError, UserError
from ..models import check_same_kind, find_head, fingerprint, load_model, model_digest
from ..suggest import unknown_name
from .build import build_teacher_cache, dtype_name, revision_of
from .cache import TeacherCache, common_classes
from .folder import drop_from_index
from .index import compare_meta, contents, read_index, read_meta, sample_key, verify_files
from .log_sum_exp import drop_orphans, keep_log_sum_exps
from .mirror import at_addresses
from .ranks import Ranks
from .stores import make_store
from .vllm_teacher import VLLMTeacher, check_vllm_options, source_by_vllm

_ENGINES = ("transformers", "vllm")


@at_addresses
def open_teacher_cache(
    folder: str | Path,
    teacher: nn.Module | VLLMTeacher | str | None,
    samples: Sequence[Mapping[str, Any]],
    *,
    kind: str = "hidden",
    k: int = 64,
    temperatures: Sequence[float] = (1.0,),
    student: nn.Module | None = None,
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    log_sum_exp: bool = False,
    repair: bool = False,
    progress: bool = True,
    device_map: str | Mapping[str, Any] | None = None,
    tp_plan: Literal["auto"] | None = None,
    group: dist.ProcessGroup | None = None,
    engine: Literal["transformers", "vllm"] = "transformers",
    engine_options: Mapping[str, Any] | None = None,
) -> "TeacherCache":
    """Open the cache in a folder. It is checked against its teacher, and first filled with missing samples.

    Args:
        folder: where the cache is, or will be: a folder, or an address that fsspec knows, such as "s3://bucket/cache".
            An address is copied to the folder of converted weights ($SRD_FAST_CACHE), and new files are uploaded.
        teacher: a model; one that vLLM runs; a folder or hub id, which is loaded in `dtype` only if the cache has to be
            filled; or None to read the cache as it is.
        samples: tokenised samples that the cache must hold, with input_ids and labels (-100 where there is no loss).
        kind: what is stored of a row, a name from `srd_fast.cache_kind_names()`: "hidden" (hidden states), "topk" (the
            likeliest classes), "sampled" (drawn classes), "projected" (the student's head, averaged), or your own.
        k: classes, or draws, of a row with "topk" or "sampled"; at least 1 and below the number of classes.
        temperatures: the temperatures for which a compact kind has rows, or at which log-sum-exps are stored, each
            above 0. Evaluation needs 1.
        student: the model that will be trained. "projected" needs it, and its head must not change. Log-sum-exps are
            over the classes that it shares with the teacher; without it, over all of the teacher's.
        template: prompt template of the samples, compared with the cache's. None: not compared.
        dtype: the dtype in which a teacher given by name is loaded.
        device: where the teacher runs when it fills the cache.
        log_sum_exp: for kind "hidden": store the log-sum-exp of each row's logits at each temperature, 4 bytes, which
            saves the loss a pass over the teacher's head. They can be added to an existing cache, without its teacher.
            Stored ones are always used.
        repair: make damaged files again instead of refusing the cache.
        progress: show a progress bar.
        device_map: where the parts of a teacher given by name go, see `srd_fast.models.load_model`.
        tp_plan: "auto": each layer of a teacher given by name is split over all processes.
        group: processes that open, check and fill the cache together. All of them call this, with the same arguments.
            Default: only this process.
        engine: what runs a teacher given by name when the cache is filled. Rows of two engines differ by rounding, so
            only one engine may fill a cache.
        engine_options: keywords of `VLLMTeacher`, for the engine "vllm".

    Returns:
        The cache, open for reading.

    Raises:
        UserError: a file is damaged; the cache was made with another teacher, dtype, template, kind or options; samples
            are missing and there is no teacher; or it cannot be filled. The message says which.
    """
    folder, ranks = Path(folder), Ranks(group)
    check_engine(engine, engine_options, spread=device_map is not None or tp_plan is not None)
    named, by_vllm = isinstance(teacher, str), engine == "vllm"
    source = teacher.source if isinstance(teacher, VLLMTeacher) else None
    if isinstance(teacher, str):
        source = source_by_vllm(teacher, engine_options) if by_vllm else fingerprint(teacher)
    cache: TeacherCache | None = None

    def said() -> tuple[dict[str, str], dict[str, Any]]:
        """Index and meta.json; both empty for a folder that is filled from nothing."""
        try:
            index = read_index(folder)
            return index, read_meta(folder, index) if index else {}
        except DamagedFileError:
            if not repair:
                raise
            return {}, {}

    index, meta = ranks.first(said)
    if index:
        if isinstance(teacher, str) and meta.get("source") is None:
            teacher, source = load_model(teacher, dtype, device, True, device_map, tp_plan), None
        wanted: dict[str, Any] = {"kind": kind, "template": template, "source": source}
        if isinstance(teacher, nn.Module):
            wanted |= {
                "dtype": dtype_name(teacher),
                "teacher": model_digest(teacher),
                "revision": revision_of(teacher),
            }
        elif isinstance(teacher, VLLMTeacher):
            wanted |= {"dtype": dtype_name(teacher), "revision": revision_of(teacher)}
        elif named:
            wanted["dtype"] = str(dtype).removeprefix("torch.")
        with ranks.together():
            compare_meta(folder, meta, wanted)
            if student is not None:
                check_same_kind(student, PretrainedConfig(is_encoder_decoder=meta.get("encoder_decoder", False)))
            classes = common_classes(meta["num_classes"], student)
            store = make_store(kind, classes, k, temperatures, student, log_sum_exp)
            compare_meta(folder, meta, {"options": store.options})
            damaged = verify_files(folder, {name: index[name] for name in ranks.share(sorted(index))})
            if damaged and not repair:
                raise damaged[0][1]
        if not ranks.any(bool(damaged)):
            cache = TeacherCache(folder, store, verify=False)
    if not ranks.any(cache is None or cache.missing(samples) > 0):
        assert cache is not None
        if cache.head is not None:
            cache = keep_log_sum_exps(cache, samples, cache.head, device, progress, ranks)
        return cache if student is None else cache.for_student(student)
    if teacher is None:
        raise UserError(f"teacher_cache {str(folder)!r} lacks samples of this data; pass the teacher, to fill it")
    started: VLLMTeacher | None = None
    model: nn.Module | VLLMTeacher
    if isinstance(teacher, str) and by_vllm:
        model = started = VLLMTeacher(teacher, dtype, device, **(engine_options or {}))
    else:
        model = load_model(teacher, dtype, device, True, device_map, tp_plan) if isinstance(teacher, str) else teacher
    try:
        head = model.head.weight if isinstance(model, VLLMTeacher) else find_head(model, "teacher").weight
        assert head is not None
        cache = build_teacher_cache(
            model,
            samples,
            folder,
            kind=kind,
            store=make_store(kind, common_classes(head.shape[0], student), k, temperatures, student, log_sum_exp),
            template=template,
            source=source,
            device=device,
            progress=progress,
            group=group,
        )
    finally:
        if started is not None:
            started.close()
    return cache if student is None else cache.for_student(student)


def drop_other_rows(folder: str | Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Delete files of a cache that have rows of other samples than these, to make room.

    Processes that share the folder may all do so at once. A file with rows of both is deleted too; opening the cache
    makes the missing rows again.

    Args:
        folder: the cache's folder.
        samples: tokenised samples whose rows are still needed.
    """
    folder, wanted = Path(folder), {sample_key(s["input_ids"], s["labels"]) for s in samples}

    def is_wanted(path: Path) -> bool:
        try:
            return all(key in wanted for key, _ in contents(path))
        except (OSError, SafetensorError):  # another process has deleted it, or it is damaged
            return False

    gone = [path for path in folder.glob("rows-*.safetensors") if not is_wanted(path)]
    if gone:
        with suppress(DamagedFileError):  # opening the cache makes a damaged index again
            drop_from_index(folder, {path.name for path in gone})
            drop_orphans(folder)
        for path in gone:
            path.unlink(missing_ok=True)


def check_engine(engine: str, options: Mapping[str, Any] | None, spread: bool = False) -> None:
    """Refuse an engine, or options of it, that cannot fill a cache.

    Args:
        engine: "transformers" or "vllm".
        options: the engine's options.
        spread: whether there is a device_map or tp_plan.

    Raises:
        UserError: the engine is unknown, or an option does not fit it.
    """
    if engine not in _ENGINES:
        raise UserError(unknown_name("engine of a teacher cache", str(engine), _ENGINES))
    if engine == "vllm":
        check_vllm_options(options or {})
        if spread:
            raise UserError(
                "engine 'vllm' spreads a teacher by its own options (tensor_parallel_size, data_parallel_size): leave "
                "device_map and tp_plan out"
            )
    elif options:
        raise UserError(f"engine_options {sorted(options)} are for the engine 'vllm', and the engine is {engine!r}")
