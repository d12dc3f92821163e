"""The teacher cache of a run: what it must hold, and how it is filled."""

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import PreTrainedModel

from ...data import teachers_samples, template_key
from ...errors import Faults, UserError
from ...files import remove
from ...models import load_model, model_without_weights, quantisation_of
from ...teacher import StaleCacheError, TeacherCache, open_teacher_cache
from ...teacher.opening import check_engine, drop_other_rows
from ...teacher.vllm_teacher import spreads
from ...training.config import SRDConfig, check_cache_kind
from ...workers.vllm import check_installed
from ..config import RunConfig
from ..modes import LIVE, has_cache, mode_of
from .run import Run
from .settings import training_config

logger = logging.getLogger(__name__)

CACHE = "teacher_cache"


def check_cache(config: RunConfig, args: SRDConfig, faults: Faults | None = None) -> None:
    """Refuse a kind of teacher cache that does not fit the rest of the config.

    Args:
        config: the run's config.
        args: the training's config.
        faults: receives what is wrong. Default: it is raised.

    Raises:
        FaultsError: something is wrong, and `faults` is not given.
    """
    given = Faults() if faults is None else faults
    kind = config.cache.kind
    if kind != LIVE:
        names = ("config: cache.kind", "distill.divergence")
        given.check(("cache.kind", "distill.divergence", "preset"), check_cache_kind, kind, args.divergence, names)
    given.check(("cache.kind", "lora"), _check_projected, config)
    given.check(("cache.kind", "cache.log_sum_exp", "mode"), _check_log_sum_exp, config)
    engine = ("cache.engine", "cache.engine_options", "cache.kind", "teacher_device_map", "mode")
    given.check(engine, _check_engine, config)
    if faults is None:
        given.tell()


def _check_projected(config: RunConfig) -> None:
    if config.cache.kind == "projected" and config.lora is None:
        raise UserError("config: cache.kind 'projected' needs a student whose head is frozen: set lora, or use hidden")


def _check_engine(config: RunConfig) -> None:
    c = config.cache
    if c.engine != "transformers" and c.kind != LIVE and not has_cache(config):
        raise UserError(f"config: cache.engine is {c.engine!r}, and {_without_cache(config)}; leave it out")
    try:
        check_engine(c.engine, c.engine_options, spread=config.teacher_device_map is not None)
    except UserError as e:
        raise UserError(f"config: cache: {e}") from e
    if c.engine == "vllm":
        if c.kind == LIVE:
            raise UserError("config: cache.engine 'vllm' fills a cache, and cache.kind is 'live': name another kind")
        check_installed()


def _without_cache(config: RunConfig) -> str:
    return f"a run of mode {config.mode!r} with these settings keeps none of its teacher's rows"


def _check_log_sum_exp(config: RunConfig) -> None:
    kind = config.cache.kind
    if config.cache.log_sum_exp and kind != LIVE and not has_cache(config):
        raise UserError(f"config: cache.log_sum_exp is true, and {_without_cache(config)}; set it to false")
    if config.cache.log_sum_exp and kind != "hidden":
        raise UserError(
            f"config: cache.log_sum_exp is true, and cache.kind is {kind!r}: only hidden keeps it; set it to false"
        )


def cache_inputs(config: RunConfig) -> Any:
    """What the cache depends on, besides the plan."""
    c = config.cache
    by_vllm = ["vllm", c.engine_options] if c.engine == "vllm" else []
    if c.log_sum_exp:
        return [c.kind, config.dtype, "log_sum_exp", cache_temperatures(config, training_config(config)), *by_vllm]
    if c.kind in (LIVE, "hidden"):
        return [c.kind, config.dtype, *by_vllm]  # the kept samples, and reflect_again, are part of the plan
    return [c.kind, config.dtype, c.k, cache_temperatures(config, training_config(config)), *by_vllm]


def cache_temperatures(config: RunConfig, args: SRDConfig) -> list[float]:
    """Temperatures for which a cache is filled: that of evaluation, then that of each stage."""
    return [1.0, *args.of_stages(config.curate.stages).temperatures]


def cache_teacher(run: Run) -> None:
    """Run the teacher once over the kept samples and the validation samples. Nothing to do for a live teacher."""
    run.group.everywhere(open_cache, run)


def open_cache(
    run: Run, student: nn.Module | None = None, whole: bool = False, beside: Dataset | None = None
) -> TeacherCache | None:
    """Open the run's cache and complete it. Missing and damaged parts are made; a cache of another teacher is replaced.

    All processes of a group must call this together, and share the work.

    Args:
        run: the run.
        student: the starting student, if it is loaded already. Compact kinds need its head, and log-sum-exps its number
            of classes.
        whole: include all training samples, kept or not, before there is a plan.
        beside: further samples to include. Rows of earlier further samples are deleted first.

    Returns:
        The cache, or None if the run has none.
    """
    c = run.config.cache
    if not has_cache(run.config):
        return None
    if student is None and (c.kind != "hidden" or c.log_sum_exp):
        shape = model_without_weights(run.start) if c.kind == "hidden" else None
        student = load_model(run.start, torch.float32) if shape is None else shape
    wanted = [*_held(run, whole), *([] if beside is None else [beside])]
    if beside is not None:
        _drop_others(run, wanted)
    return _filled(run, wanted, student)


def drop_rows_beside(run: Run) -> None:
    """Delete the rows of `open_cache`'s further samples, so that the cache is again as its step has left it."""
    if has_cache(run.config):
        _drop_others(run, _held(run))


def _held(run: Run, whole: bool = False) -> list[Dataset]:
    """The samples that the cache holds: the training samples, then the validation samples."""
    train = run.trained_on
    # Dropped samples may return, or belong to a control.
    if not whole and not run.config.curate.reflect_again and not run.config.controls:
        kept = set(run.plan.kept)
        train = train.select([i for i, sample_id in enumerate(train["sample_id"]) if sample_id in kept])
    return [train, run.data("validation")]


def _drop_others(run: Run, samples: Sequence[Dataset]) -> None:
    drop_other_rows(run.folder / CACHE, chain.from_iterable(map(teachers_samples, samples)))


def warm_up_cache(run: Run) -> TeacherCache | None:
    """Open the cache for the warm-up of a pruned student, so that the teacher sees each sample only once in the run.

    The pruned student has all of the teacher's classes.

    Returns:
        The cache. None if the warm-up must run the teacher itself: for compact kinds, which need the finished student,
        and if the warm-up uses so few samples that filling the cache for all of them before curation would take longer.
    """
    c, train = run.config.init_student, run.data("train")
    held = has_cache(run.config) and run.config.cache.kind == "hidden" and not mode_of(run.config).makes_answers
    if not held or c.warmup_steps * c.warmup_batch_size < len(train):
        return None
    return _filled(run, [train, run.data("validation")])


def scoring_teacher(run: Run, alone: bool = False) -> TeacherCache | PreTrainedModel | str:
    """The teacher for signals, which need it for all training samples.

    A cache of hidden states is filled for them now, so that the teacher sees each sample only once in the run. If the
    run replaces the data's answers, the teacher runs once more.

    Args:
        run: the run.
        alone: whether this process works without the others, which may not see this folder.
    """
    own = mode_of(run.config).makes_answers
    if not alone and not own and run.config.cache.kind == "hidden":
        cache = open_cache(run, whole=True)
        if cache is not None:
            return cache
    return run.teacher if run.teacher_spread or quantisation_of(run.config.teacher) else run.config.teacher


def validation_cache(run: Run) -> TeacherCache | None:
    """The cache, if it has everything of the validation samples that a live teacher would give; else None."""
    return open_cache(run) if has_cache(run.config) and run.config.cache.kind == "hidden" else None


def _filled(run: Run, samples: Sequence[Dataset], student: nn.Module | None = None) -> TeacherCache:
    c, folder = run.config.cache, run.folder / CACHE

    def opened() -> TeacherCache:
        return open_teacher_cache(
            folder,
            run.config.teacher,
            concatenate_datasets([teachers_samples(some) for some in samples]),
            kind=c.kind,
            k=c.k,
            temperatures=cache_temperatures(run.config, run.args),
            student=student,
            log_sum_exp=c.log_sum_exp,
            template=template_key(run.config.template, run.config.chat_template_kwargs),
            dtype=run.dtype,
            device=run.device,
            repair=True,
            progress=run.group.rank == 0,
            engine=c.engine,
            engine_options=c.engine_options,
            **run.teacher_spread,
        )

    # An engine that spreads over devices uses those of all processes; the others then find the cache filled.
    first_alone = spreads(c.engine_options)
    if first_alone and run.group.rank:
        run.group.meet()
        return opened().to(run.device)
    try:
        cache = opened()
    except StaleCacheError as e:
        if not first_alone:
            run.group.meet()  # until all have opened it, and none writes into it
        if run.group.rank == 0:
            logger.warning("%s: making it again", str(e).partition(";")[0])
            remove(folder)
        if not first_alone:
            run.group.meet()
        cache = opened()
    if first_alone:
        run.group.meet()
    return cache.to(run.device)
