"""Modes of a run: on whose answers the student is trained, and with which loss. One table has all about them.

kd                  the data's answers              the distillation loss
sft                 the data's answers              cross-entropy; there is no teacher
seqkd               the teacher's, made once        cross-entropy (Kim and Rush, arXiv 1606.07947)
offline_on_policy   the student's reflections       the distillation loss, reverse KL unless another is asked for
on_policy           data's, or fresh ones of the    the distillation loss, JSD unless another is asked for (GKD,
                    student for a share of steps    arXiv 2306.13649)
distillm            the same, by a share that grows the distillation loss, skew reverse KL (DistiLLM,
                    with the validation loss        arXiv 2402.03898)
self                data's, or fresh ones of the    the distillation loss, JSD unless another is asked for, to the
                    student for a share of steps,   student's own start, which reads more (OPSD, arXiv 2601.18734)
                    or own_answers: its reflections
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from transformers import IntervalStrategy

from ..data import PRIVILEGED, WHOLE_COLUMN, check_privileged_column
from ..errors import Faults, UserError
from ..reflection import get_difficulties
from ..registry import Registry
from ..suggest import unknown_name
from ..training.config import ADAPTIVE, SRDConfig

if TYPE_CHECKING:
    from .config import RunConfig

DATA, TEACHER, STUDENT = "data", "teacher", "student"
KD, SFT, SELF = "kd", "sft", "self"
LIVE, PRUNE = "live", "prune"


@dataclass(frozen=True)
class Mode:
    """What a mode changes in a run.

    Args:
        answers: whose answers are trained on: those of the "data", or those that the "teacher" or the starting
            "student" gave once before training.
        teacher: whether the loss has a teacher. Without one it is the cross-entropy, and there is no cache.
        fresh: whether the student gives fresh answers during training; None: `lmbda` decides.
        itself: whether the teacher is the starting student, which reads privileged text.
        fields: values of the section `distill`, unless it has its own.
    """

    answers: str = DATA
    teacher: bool = True
    fresh: bool | None = False
    itself: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def makes_answers(self) -> bool:
        """Whether answers are made before training, to replace the data's."""
        return self.answers != DATA


MODES = Registry(
    "mode",
    {
        KD: Mode(),
        SFT: Mode(teacher=False, fields={"sft_weight": 1.0}),
        "seqkd": Mode(answers=TEACHER, teacher=False, fields={"sft_weight": 1.0}),
        "offline_on_policy": Mode(answers=STUDENT, fields={"divergence": "reverse_kl", "sft_weight": 0.0}),
        "on_policy": Mode(fresh=True, fields={"divergence": "jsd", "sft_weight": 0.0, "lmbda": 0.5}),
        "distillm": Mode(
            fresh=True,
            fields={
                "divergence": "skew_reverse_kl", "skew": 0.1, "sft_weight": 0.0,
                "lmbda": ADAPTIVE, "replay_buffer": 1000,
            },
        ),
        SELF: Mode(fresh=None, itself=True, fields={"divergence": "jsd", "sft_weight": 0.0}),
    },
)  # fmt: skip


def mode_of(config: "RunConfig") -> Mode:
    """What a run's mode changes in it, with `own_answers` taken into account.

    Args:
        config: the run's config.
    """
    mode = MODES.get(config.mode)
    return replace(mode, answers=STUDENT) if config.own_answers and mode.itself else mode


def mode_fields(mode: Mode, given: Mapping[str, Any]) -> dict[str, Any]:
    """The section `distill` with the mode's values added.

    If the section has a start or end of the cross-entropy's weight, the mode's weight is left out.

    Args:
        mode: the run's mode.
        given: the section.
    """
    own = dict(mode.fields)
    if {"sft_weight_start", "sft_weight_end"} & set(given):
        own.pop("sft_weight", None)
    return {**own, **given}


def reflects(config: "RunConfig") -> bool:
    """Whether a run needs the starting student's answers. Only fine-tuning on all samples does not."""
    curate = config.curate
    return config.mode != SFT or curate.method != "none" or bool(curate.band) or curate.weight_by is not None


def fine_tuning(config: "RunConfig", model: str, output: str | None = None) -> "RunConfig":
    """The config that fine-tunes another run's teacher or starting student on its data, before that run.

    Args:
        config: the other run's config.
        model: "teacher" or "student".
        output: the run folder. Default: beside the other's.

    Returns:
        A config of mode sft without a curriculum.

    Raises:
        UserError: there is no such model, or the student does not exist before the run.
    """
    if model not in (TEACHER, STUDENT):
        raise UserError(unknown_name("model", model, (TEACHER, STUDENT)))
    source = config.teacher if model == TEACHER else config.student
    if source == PRUNE:
        raise UserError(
            f"config: student is {PRUNE!r}, so there is none before the run: cut it with srd-fast init-student and "
            "give its folder, or fine-tune the teacher"
        )
    of_modes = {"sft_weight", "sft_weight_start", "sft_weight_end"}
    of_modes |= {"lmbda", "seq_kd", "replay_buffer", "self_ema_decay", "standardize_logits"}
    of_modes |= {"generation_temperature", "sync_every"}
    if not config.distill.get("eval_generate"):
        of_modes |= {"max_new_tokens", "generation_engine", "generation_options"}
    return config.model_copy(
        update={
            "mode": SFT,
            "preset": None,  # its values are in the sections already
            "controls": [],
            "teacher": source,
            "student": source,
            "output_dir": output or f"{config.output_dir}-{model}-sft",
            "curate": config.curate.model_copy(
                update={"method": "none", "stages": 1, "reflect_again": False, "band": {}, "weight_by": None}
            ),
            "distill": {k: v for k, v in config.distill.items() if k not in of_modes},
            "answers_per_prompt": 1,
            "answers_again": False,
            "own_answers": False,
            "privileged_template": None,
            "max_privileged_length": SRDConfig.max_privileged_length,
            "columns": {name: column for name, column in config.columns.items() if name != PRIVILEGED},
            "cache": config.cache.model_copy(
                update={"engine": "transformers", "engine_options": {}, "log_sum_exp": False}
            ),
        }
    )


def privileged_template(config: "RunConfig") -> str | None:
    """The template of what only the teacher of a run reads; None if it reads the same as the student."""
    return (config.privileged_template or WHOLE_COLUMN) if mode_of(config).itself else None


def answers_anew(config: "RunConfig") -> bool:
    """Whether any training step of a run is on fresh answers."""
    fields = mode_fields(mode_of(config), config.distill)
    return bool(fields.get("lmbda")) or fields.get("seq_kd") is True


def shares_weights(config: "RunConfig") -> bool:
    """Whether a run's live teacher uses the weights of the student that is trained."""
    moves = config.distill.get("self_ema_decay") is not None
    return mode_of(config).itself and not has_cache(config) and (moves or config.lora is not None)


def has_cache(config: "RunConfig") -> bool:
    """Whether a run stores its teacher's rows.

    It does not if every step is on fresh answers, which are not known before, or if the teacher is the student itself,
    which is in memory anyway.

    Args:
        config: the run's config.
    """
    mode = mode_of(config)
    fields = mode_fields(mode, config.distill)
    always_fresh = fields.get("lmbda") == 1 or fields.get("seq_kd") is True
    beside = mode.itself and (answers_anew(config) or fields.get("self_ema_decay") is not None)
    return mode.teacher and config.cache.kind != LIVE and not always_fresh and not beside


def check_mode(config: "RunConfig", args: SRDConfig, faults: Faults) -> None:
    """Find settings that do not fit the mode of a config.

    Args:
        config: the run's config.
        args: the training's config, with the mode's values.
        faults: receives what is wrong: the key, its value and the way out.
    """
    weights = ("distill.sft_weight", "distill.sft_weight_start", "distill.sft_weight_end")
    faults.check(("mode", *weights), _check_weights, config, args)
    faults.check(("mode", "distill.standardize_logits"), _check_logits, config, args)
    faults.check(("mode", "distill.lmbda"), _check_share, config, args)
    faults.check(("mode", "distill.seq_kd"), _check_teacher_answers, config, args)
    faults.check(("distill.eval_generate", "distill.eval_strategy"), _check_evaluates, args)
    faults.check(("mode", "answers_per_prompt", "reflect.temperature"), _check_several, config)
    faults.check(("mode", "own_answers", "distill.lmbda"), _check_own, config, args)
    faults.check(("mode", "own_answers", "answers_again", "curate.stages"), _check_again, config)
    faults.check(("mode", "curate.reflect_again"), _check_ranked_once, config)
    faults.check(("mode", "teacher", "student"), _check_itself, config)
    faults.check(("mode", "privileged_template"), _check_privileged, config)
    faults.check(("mode", "privileged_template", "columns"), _check_column, config)
    faults.check(("mode", "distill.self_ema_decay", "cache.kind"), _check_average, config, args)
    places = ("distill.teacher_offload", "teacher_device_map")
    faults.check(("mode", "lora", "distill.self_ema_decay", *places), _check_place, config, args)


def _check_weights(config: "RunConfig", args: SRDConfig) -> None:
    if not mode_of(config).teacher and not args.only_cross_entropy:
        given = (args.sft_weight_start, args.sft_weight_end) if args.sft_weight is None else args.sft_weight
        raise UserError(
            f"config: mode {config.mode!r} trains only on the cross-entropy, and the sft_weight of its stages is "
            f"{given}; leave it out of distill, or use mode kd"
        )


def _check_share(config: "RunConfig", args: SRDConfig) -> None:
    mode = mode_of(config)
    if mode.fresh is not None and mode.fresh != bool(args.lmbda):
        others = "use mode on_policy, distillm or self, or leave it out"
        way = "set it above 0, or use mode kd" if mode.fresh else others
        raise UserError(f"config: distill.lmbda is {args.lmbda!r} in mode {config.mode!r}; {way}")


def _check_logits(config: "RunConfig", args: SRDConfig) -> None:
    if args.standardize_logits and not mode_of(config).teacher:
        raise UserError(
            f"config: distill.standardize_logits is true, and mode {config.mode!r} has no divergence that it would "
            "change; leave it out, or use mode kd"
        )


def _check_teacher_answers(config: "RunConfig", args: SRDConfig) -> None:
    mode = mode_of(config)
    if args.seq_kd and (mode.makes_answers or not mode.teacher):
        why = "trains on answers made beforehand" if mode.makes_answers else "has no teacher that could answer"
        raise UserError(
            f"config: distill.seq_kd is true, and mode {config.mode!r} {why}; leave it out, or use mode on_policy"
        )


def _check_evaluates(args: SRDConfig) -> None:
    if args.eval_generate and args.eval_strategy == IntervalStrategy.NO:
        raise UserError(
            "config: distill.eval_generate is true, and distill.eval_strategy is 'no', so that nothing is evaluated "
            "while the student is trained; set it to 'steps', or leave both out: evaluate.metrics are of the finished "
            "student"
        )


def _check_several(config: "RunConfig") -> None:
    several = config.answers_per_prompt
    if several != 1 and not mode_of(config).makes_answers:
        raise UserError(
            f"config: answers_per_prompt is {several}, and mode {config.mode!r} does not train on answers made "
            "beforehand; set it to 1, or the mode to offline_on_policy or seqkd"
        )
    if several > 1 and not config.reflect.temperature:
        raise UserError(
            f"config: answers_per_prompt is {several}, and reflect.temperature is 0, with which all of them would be "
            "the same; set it to 1, or answers_per_prompt to 1"
        )


def _check_own(config: "RunConfig", args: SRDConfig) -> None:
    if not config.own_answers:
        return
    if not mode_of(config).itself:
        raise UserError(
            f"config: own_answers is true, which is for mode self, and mode is {config.mode!r}; set it to false, or "
            "the mode to offline_on_policy, which trains on them"
        )
    if args.lmbda:
        raise UserError(
            f"config: own_answers is true, and distill.lmbda is {args.lmbda!r}: the answers are made beforehand or in "
            "steps; set one of the two"
        )


def _check_again(config: "RunConfig") -> None:
    if not config.answers_again:
        return
    if mode_of(config).answers != STUDENT:
        raise UserError(
            f"config: answers_again is true, and mode {config.mode!r} does not train on answers that its student made "
            "beforehand; set it to false, or the mode to offline_on_policy (self: own_answers to true); on_policy "
            "answers anew in single steps"
        )
    if config.curate.stages == 1:
        raise UserError(
            "config: answers_again is true, and curate.stages is 1, so there is no border at which the student could "
            "answer again; set curate.stages to 2 or more, or answers_again to false"
        )


def check_signals(config: "RunConfig") -> None:
    """Refuse signals that compare with a teacher in a mode without one, or whose teacher is the student itself.

    Raises:
        UserError: there is such a signal.
    """
    mode = mode_of(config)
    if (mode.teacher and not mode.itself) or mode.answers == TEACHER or not reflects(config):
        return
    why = "has the student's start for one" if mode.itself else "has none"
    for signal in get_difficulties(config.reflect.signals).values():
        if signal.needs_teacher:
            raise UserError(
                f"config: reflect.signals has {signal.name!r}, which compares with a teacher, and mode "
                f"{config.mode!r} {why}; leave it out, or use mode kd"
            )


def _check_ranked_once(config: "RunConfig") -> None:
    if mode_of(config).makes_answers and config.curate.reflect_again:
        raise UserError(
            f"config: curate.reflect_again changes which prompts are trained on, and mode {config.mode!r} has made "
            "their answers by then; set it to false"
        )


def _check_itself(config: "RunConfig") -> None:
    if mode_of(config).itself and config.teacher != config.student:
        raise UserError(
            f"config: mode {config.mode!r} has the starting student as its teacher, and teacher is {config.teacher!r} "
            f"and student {config.student!r}: give both the same model, or use mode kd"
        )


def _check_privileged(config: "RunConfig") -> None:
    if config.privileged_template is not None and not mode_of(config).itself:
        raise UserError(
            f"config: privileged_template is {config.privileged_template!r}, and in mode {config.mode!r} the teacher "
            "reads what the student reads; leave it out, or use mode self"
        )


def _check_column(config: "RunConfig") -> None:
    try:
        check_privileged_column(config.columns, privileged_template(config))
    except UserError as e:
        raise UserError(f"config: {e}") from e


def _check_average(config: "RunConfig", args: SRDConfig) -> None:
    if args.self_ema_decay is None:
        return
    told = f"config: distill.self_ema_decay is {args.self_ema_decay}"
    if not mode_of(config).itself:
        raise UserError(f"{told}, and in mode {config.mode!r} the teacher is not the student; leave it out")
    if config.cache.kind != LIVE:
        raise UserError(
            f"{told}, with which the teacher changes at every step, and cache.kind is {config.cache.kind!r}; set it to "
            f"{LIVE!r}"
        )


def _check_place(config: "RunConfig", args: SRDConfig) -> None:
    given = "distill.teacher_offload" if args.teacher_offload else "teacher_device_map"
    if shares_weights(config) and (args.teacher_offload or config.teacher_device_map is not None):
        raise UserError(
            f"config: {given} is given, and the teacher, which shares the weights of the student, is where that is; "
            "leave it out"
        )
