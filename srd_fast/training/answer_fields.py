"""Fields of `SRDConfig` about answers that are generated during training: which of them go together."""

from typing import TYPE_CHECKING

from transformers import IntervalStrategy

from ..errors import Faults, UserError
from ..reflection.engines import ENGINES, check_engine_options
from ..workers.vllm import INSTALL, check_sleep_mode, is_installed
from .answer_metrics import get_metrics
from .replay import ADAPTIVE

if TYPE_CHECKING:
    from .config import SRDConfig

# Ends of the names of metrics of which less is better; TrainingArguments knows "loss" alone.
_LESS_IS_BETTER = ("loss", "kl", "entropy", "divergence", "perplexity")
# Fields about the answers of evaluations; about fresh answers; about both.
_OF_EVALUATIONS = ("eval_metrics", "eval_generate_rows", "eval_max_new_tokens", "eval_temperature")
_OF_FRESH = ("generation_temperature", "sync_every")
_OF_BOTH = ("max_new_tokens", "generation_engine", "generation_options")


def check_answers(args: "SRDConfig", faults: Faults) -> None:
    """Find fields that would do nothing, or that need another field.

    Args:
        args: the config before `TrainingArguments.__post_init__`.
        faults: receives what is wrong.
    """
    faults.check(("lmbda", "eval_strategy"), _check_share, args)
    faults.check(("generation_engine", "lmbda", "seq_kd", "eval_generate"), _check_engine, args)
    faults.check("generation_options", check_engine_options, args.generation_options)
    faults.check(("generation_options", "generation_engine", "lmbda", "seq_kd", "eval_generate"), _check_sleep, args)
    faults.check(("max_privileged_length", "privileged_template"), _check_privileged_length, args)
    faults.check(("replay_buffer", "lmbda"), _check_buffer, args)
    faults.check("eval_metrics", _check_metrics, args)
    for name in _OF_EVALUATIONS:
        faults.check((name, "eval_generate"), _check_asked_for, args, name)
    for name in (*_OF_FRESH, *_OF_BOTH):
        faults.check((name, "lmbda", "seq_kd", "eval_generate"), _check_something_answers, args, name)
    faults.check(("sync_every", "generation_engine"), _check_sync, args)
    faults.check(("seq_kd", "lmbda"), _check_other_steps, args)
    faults.check(
        ("eval_generate", "lmbda", "seq_kd", "fsdp", "fsdp_config", "deepspeed", "generation_engine"),
        _check_shards,
        args,
    )
    faults.check(("early_stopping_patience", "metric_for_best_model", "eval_strategy"), _check_patience, args)


def less_is_better(args: "SRDConfig") -> bool:
    """Whether a lower value of `metric_for_best_model` is better: for a distance, or a metric of answers that says so.

    Args:
        args: the config, with or without such a metric.
    """
    metric = str(args.metric_for_best_model or "")
    try:
        of_answers = get_metrics(args.answer_metrics) if args.eval_generate else {}
    except UserError:
        of_answers = {}  # another check reports it
    # If there are several evaluation sets, the set's name comes before the metric's.
    ends = [name for name in of_answers if metric == name or metric.endswith(f"_{name}")]
    if ends:
        return not of_answers[max(ends, key=len)].higher_is_better
    return metric.endswith(_LESS_IS_BETTER)


def _is_given(args: "SRDConfig", name: str) -> bool:
    """Whether a field has another value than its default, which is the class's attribute."""
    return bool(getattr(args, name) != getattr(type(args), name))


def _never_evaluates(args: "SRDConfig") -> bool:
    return args.eval_strategy in ("no", IntervalStrategy.NO)


def _check_share(args: "SRDConfig") -> None:
    if isinstance(args.lmbda, str) and args.lmbda != ADAPTIVE:
        raise UserError(f"lmbda must be from 0 to 1, or {ADAPTIVE!r}, got {args.lmbda!r}")
    if args.lmbda == ADAPTIVE and _never_evaluates(args):
        raise UserError("lmbda is 'adaptive', which looks at the validation loss; set eval_strategy to 'steps'")


def _check_engine(args: "SRDConfig") -> None:
    ENGINES.check(args.generation_engine)
    if args.generation_engine == "vllm" and (args.answers_anew or args.eval_generate) and not is_installed():
        raise UserError(f"generation_engine is 'vllm', which needs the package vllm: {INSTALL}; or use 'transformers'")


def _check_sleep(args: "SRDConfig") -> None:
    if args.generation_engine == "vllm" and (args.answers_anew or args.eval_generate):
        try:
            check_sleep_mode(args.generation_options or {})
        except UserError as e:
            raise UserError(f"generation_options: {e}") from None


def _check_buffer(args: "SRDConfig") -> None:
    if args.replay_buffer and not args.lmbda:
        raise UserError(
            f"replay_buffer is {args.replay_buffer}, but lmbda is 0, so that nothing comes into it; set one of them"
        )


def _check_privileged_length(args: "SRDConfig") -> None:
    if args.privileged_template is None and _is_given(args, "max_privileged_length"):
        raise UserError(
            f"max_privileged_length is {args.max_privileged_length}, and without a privileged_template the teacher "
            "reads what the student reads; leave it out, or set privileged_template"
        )


def _check_metrics(args: "SRDConfig") -> None:
    given = args.eval_metrics
    if given is not None and (not isinstance(given, (list, tuple)) or not given):
        raise UserError(f"eval_metrics must be a list of metrics, such as [rouge_l], got {given!r}")
    get_metrics(args.answer_metrics)


def _check_asked_for(args: "SRDConfig", name: str) -> None:
    if not args.eval_generate and _is_given(args, name):
        raise UserError(
            f"{name} is {getattr(args, name)!r}, but eval_generate is false, and nothing is answered; set it to true"
        )


def _check_something_answers(args: "SRDConfig", name: str) -> None:
    evaluates = name in _OF_BOTH and args.eval_generate
    if _is_given(args, name) and not args.answers_anew and not evaluates:
        others = " or eval_generate" if name in _OF_BOTH else ""
        raise UserError(
            f"{name} is {getattr(args, name)!r}, but nothing is answered while the student is trained; leave it out, "
            f"or set lmbda, seq_kd{others}"
        )


def _check_sync(args: "SRDConfig") -> None:
    if args.answers_anew and args.sync_every != 1 and args.generation_engine == "transformers":
        raise UserError(
            f"sync_every is {args.sync_every}, and generation_engine 'transformers' answers with the student's weights "
            "themselves; leave it out"
        )


def _check_other_steps(args: "SRDConfig") -> None:
    if args.seq_kd and args.lmbda == 1:
        raise UserError("seq_kd is true, but lmbda is 1 and leaves it no step; set lmbda below 1, or seq_kd to false")


def why_silent(args: "SRDConfig", deepspeed: bool, fsdp_version: int | None, in_shards: bool) -> str | None:
    """Why a student cannot answer prompts while it trains.

    Args:
        args: the training's config.
        deepspeed: whether DeepSpeed trains it.
        fsdp_version: version of the FSDP that shards it, or None.
        in_shards: whether its weights are in shards, by FSDP or from loading.

    Returns:
        The reason; None if it can.
    """
    if deepspeed or fsdp_version == 1:
        return f"it cannot answer while it trains by {'DeepSpeed' if deepspeed else 'FSDP1'}"
    if in_shards and args.generation_engine != "transformers":
        return f"generation_engine {args.generation_engine!r} does not read a student in shards, as 'transformers' does"
    return None


def check_can_answer(args: "SRDConfig", reason: str | None) -> None:
    """Refuse a training whose student is to answer prompts but cannot.

    Args:
        args: the training's config.
        reason: the result of `why_silent`.

    Raises:
        UserError: there is a reason, and a field asks for answers.
    """
    asked = [f"{n} is {getattr(args, n)!r}" for n in ("eval_generate", "lmbda", "seq_kd") if getattr(args, n)]
    if asked and reason is not None:
        raise UserError(
            f"{' and '.join(asked)}, but {reason}; train the student whole or by FSDP2, or make its answers before "
            "training (mode offline_on_policy) and after it (srd_fast.evaluate)"
        )


def _check_shards(args: "SRDConfig") -> None:
    given = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    is_first = str(given.get("version", given.get("fsdp_version"))) == "1"
    reason = why_silent(args, bool(args.deepspeed), 1 if args.fsdp and is_first else None, bool(args.fsdp))
    check_can_answer(args, reason)


def _check_patience(args: "SRDConfig") -> None:
    if not args.early_stopping_patience:
        return
    said = f"early_stopping_patience is {args.early_stopping_patience}, but"
    # With load_best_model_at_end and no metric, transformers takes the loss.
    if args.metric_for_best_model is None and not args.load_best_model_at_end:
        raise UserError(f"{said} there is no metric_for_best_model to look at; set it, for example to kl")
    if _never_evaluates(args):
        raise UserError(f"{said} eval_strategy is 'no'; set it to 'steps'")
