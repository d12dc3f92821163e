"""`SRDConfig`: the training arguments of selective reflection distillation."""

from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments

from ..curriculum import per_stage
from ..data import check_chat_template_kwargs, check_privileged_template, check_train_on
from ..errors import Faults, UserError
from ..losses import Projected, Sampled, TopK, check_rest, get_divergence
from ..losses.backends import check_backend
from ..losses.options import RANGE
from ..models import check_spread
from ..selection import SAMPLE_POLICIES, check_rows_have_signal, make_position_policy
from ..suggest import unknown_name
from ..teacher.itself import check_decay
from ..teacher.stores import CACHE_KINDS, keeps_head
from .answer_fields import check_answers, less_is_better
from .answer_metrics import DEFAULT_METRICS
from .arguments import CHOICES, RANGES, REFUSED, check_fits, check_processes, faults_of_transformers
from .best import check_saves
from .presets import TRAINING_PRESETS, with_preset
from .replay import ADAPTIVE


def check_cache_kind(kind: str, divergence: str, names: tuple[str, str] = ("teacher_cache_kind", "divergence")) -> None:
    """Refuse an unknown kind of teacher cache, or one with which this divergence cannot be computed.

    Args:
        kind: the kind of cache.
        divergence: name of the divergence.
        names: what the two are called in the user's input, for the message.

    Raises:
        UserError: the kind is unknown, or has too little for the divergence.
    """
    rows = CACHE_KINDS.get(kind).rows
    if rows is TopK:
        check_rest(divergence, f"{names[0]} {kind!r}")
    if rows in (Sampled, Projected) and divergence != "forward_kl":
        raise UserError(
            f"{names[0]} {kind!r} gives only forward_kl, and {names[1]} is {divergence!r}; use hidden or topk"
        )


def _described(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


class StageSettings(NamedTuple):
    """Settings of each stage of a curriculum: one value a stage, from the first to the last.

    Attributes:
        epochs: passes over the stage's samples.
        temperatures: T of the divergence.
        sft_weights: weight of the cross-entropy.
        learning_rates: peak learning rate.
    """

    epochs: list[float]
    temperatures: list[float]
    sft_weights: list[float]
    learning_rates: list[float]


def _default_of(name: str) -> Any:
    of_field = next(f for f in fields(SRDConfig) if f.name == name)
    return of_field.default if of_field.default_factory is MISSING else of_field.default_factory()


def _is_whole(name: str) -> bool:
    kind = next((f.type for f in fields(SRDConfig) if f.name == name), None)
    return kind is int or kind == int | None


@dataclass
class SRDConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the fields of distillation.

    A training is one pass over the curriculum's sequence of samples, so `num_train_epochs` is always 1: set
    `epochs_per_stage` instead. `max_steps` ends a run early, in the middle of its schedule. Temperature and weight of
    the cross-entropy go linearly over the stages from `*_start` to `*_end`, unless `temperature` or `sft_weight` give
    one number, or one a stage.

    The fields listed here are those of distillation, and those of `TrainingArguments` that have another default.

    Raises:
        FaultsError: values are out of range, or have no meaning here: one line for each, with the field and the way
            out. It is a UserError, and a ValueError.
    """

    # Here a loss that is not finite ends the training. transformers' filter would wait for the device twice a batch.
    logging_nan_inf_filter: bool = _described(False, "Replace losses that are not finite in the logs.")
    torch_compile: Any = _described(
        None, "Compile the layers of the student and of a live teacher: true, false, or null: on a GPU, for long runs."
    )
    num_train_epochs: float = _described(1.0, "Always 1, a pass over the curriculum; see epochs_per_stage.")
    lr_scheduler_type: Any = _described("cosine", "Always cosine: from learning_rate to min_learning_rate.")
    learning_rate: float = _described(1e-4, "Peak learning rate of each stage's cosine.")
    logging_steps: float = _described(10, "Steps between training logs.")
    divergence: str = _described("skew_reverse_kl", "Name of the divergence; see divergence_names().")
    skew: float = _described(0.1, "Skew of the skew divergences, 0 to 1.")
    beta: float = _described(0.5, "Beta of the JSD, 0 (forward KL) to 1 (reverse KL).")
    temperature_start: float = _described(1.0, "Temperature of the first stage.")
    temperature_end: float = _described(2.0, "Temperature of the last stage.")
    temperature: Any = _described(None, "One temperature, or one a stage; replaces temperature_start and _end.")
    standardize_logits: bool = _described(
        False, "Standardise each row of logits before the divergence: (z - mean) / deviation (arXiv 2403.01427)."
    )
    temperature_scaling: Any = _described(
        True, "Multiply the divergence by T^2: true, false, or 'official' (as the authors' code, by divergence)."
    )
    sft_weight_start: float = _described(0.3, "Weight of the cross-entropy in the first stage.")
    sft_weight_end: float = _described(0.1, "Weight of the cross-entropy in the last stage.")
    sft_weight: Any = _described(None, "One weight, or one a stage; replaces sft_weight_start and _end.")
    epochs_per_stage: Any = _described(8, "Passes over each stage's samples: one number, or one a stage.")
    stage_learning_rates: Any = _described(None, "Peak learning rate of each stage; default learning_rate.")
    min_learning_rate: float = _described(1e-7, "Where each cosine ends.")
    restart_learning_rate: bool = _described(True, "A cosine for each stage instead of one over the run.")
    reset_optimizer: bool = _described(True, "Drop the optimizer's state at the start of each later stage.")
    template: str = _described("alpaca", "Prompt template: alpaca, chat, or text with {instruction} and {input}.")
    max_prompt_length: int = _described(
        512, "In tokens; longer prompts lose the end of their input text, longer chats their oldest turns first."
    )
    max_response_length: int = _described(512, "In tokens, including the end token; longer responses are cut.")
    chat_template_kwargs: dict[str, Any] | None = _described(
        None,
        "Variables of the chat template (enable_thinking, ...); strftime_now: the date it gets, default 2025-01-01.",
    )
    parse_special_tokens: bool | None = _described(
        None, "Whether special tokens in the data's text are parsed; null: only in prompt/completion rows."
    )
    train_on: str = _described("last", "Which answers of a conversation have loss: last or all.")
    privileged_template: str | None = _described(
        None, "What only the teacher reads: text with any of {prompt}, {response} and {privileged}; null: nothing."
    )
    max_privileged_length: int = _described(2048, "Most tokens of the teacher's prompt; longer rows are rejected.")
    backend: str = _described("auto", "Loss backend.")
    memory_budget: int | None = _described(None, "Bytes that the loss may allocate beyond its inputs and gradients.")
    logits_dtype: str | None = _described(
        None, "Dtype of the loss's logits: null for that of the training (bf16, fp16), or 'float32', unrounded."
    )
    keep_student_dtype: bool = _described(
        False, "Train bfloat16 or float16 weights in that dtype; otherwise they are converted to float32 first."
    )
    shared_vocabulary: bool = _described(
        False, "Allow tokens that only student or teacher has; the divergence is over those that both have."
    )
    max_tokens_per_batch: int = _described(
        0, "Divide each step's samples into micro-batches of at most so many tokens, with padding; 0: do not."
    )
    teacher_cache: str | None = _described(None, "Folder of the teacher's rows; missing rows are computed first.")
    teacher_cache_kind: str = _described("hidden", "What the cache stores for each token; see cache_kind_names().")
    teacher_cache_k: int = _described(64, "Classes, or draws, for each token of a compact cache.")
    teacher_offload: bool = _described(False, "Keep a live teacher's body in the host's memory between steps.")
    teacher_device_map: Any = _described(
        None, "Where the parts of a teacher given by name go: 'auto', or a device, 'cpu' or 'disk' for each module."
    )
    self_ema_decay: float | None = _described(
        None, "The teacher 'self' follows the student with this decay, 0 to below 1; null: it stays as at the start."
    )
    teacher_tp_plan: str | None = _described(None, "'auto': split each layer of such a teacher over all processes.")
    head_in_shards: Any = _described(
        "auto", "Keep head and embedding of a student in FSDP2 sharded: true, false, or 'auto': within one node."
    )
    padding_free: Any = _described(
        "auto", "Batches without padding: true, false, or 'auto': if the models' attention is known to allow it."
    )
    length_buckets: int = _described(0, "Number of batches whose samples are sorted by length together; 0: shuffled.")

    position_selection: str = _described("all", "Which tokens of a response have loss; see position_policy_names().")
    position_ratio: float = _described(0.2, "Share of each response's tokens that a position policy chooses.")
    position_steps: int = _described(4000, "Steps until position_selection 'curriculum' takes the hardest tokens.")
    class_sampling: int = _described(0, "Classes to draw from the teacher for each token (forward KL); 0: all of them.")
    sample_selection: str = _described("all", "Which samples are trained on; see sample_policy_names().")
    sample_ratio: float = _described(0.2, "Share of each stage's samples that a sample policy chooses.")

    lmbda: Any = _described(
        0.0, "Share of steps that train on fresh answers of the current student, 0 to 1, or 'adaptive' (DistiLLM)."
    )
    seq_kd: bool = _described(False, "Train all other steps on fresh answers of the teacher.")
    max_new_tokens: int = _described(128, "Longest fresh answer.")
    generation_temperature: float = _described(1.0, "Temperature at which fresh answers are sampled; 0: greedy.")
    generation_engine: str = _described(
        "transformers", "Engine for fresh answers and those of evaluations; see engine_names()."
    )
    generation_options: dict[str, Any] | None = _described(None, "Keywords of that engine.")
    sync_every: int = _described(1, "Steps after which an engine with its own weights gets the student's current ones.")
    replay_buffer: int = _described(0, "How many of the student's answers are kept to train on them again; 0: none.")

    eval_generate: bool = _described(False, "Let evaluations answer the validation prompts too, and score the answers.")
    eval_metrics: list[str] | None = _described(
        None,
        "Metrics of these answers: rouge_l, exact_match, numeric_match, execution, bleu, chrf, FILE.py:FUNCTION; "
        "default: the first two.",
    )
    eval_generate_rows: int | None = _described(None, "How many validation rows are answered; null: all.")
    eval_max_new_tokens: int | None = _described(None, "Most tokens of such an answer; null: max_new_tokens.")
    eval_temperature: float = _described(0.0, "Temperature of these answers; 0: greedy. The paper samples at 1.")
    early_stopping_patience: int = _described(
        0, "Evaluations without a better metric_for_best_model after which training ends; 0: never end early."
    )

    def __post_init__(self) -> None:
        if self.greater_is_better is None and less_is_better(self):
            self.greater_is_better = False
        if self.disable_tqdm is None:
            self.disable_tqdm = False  # transformers would decide by its log level
        faults = Faults()
        known = partial(hasattr, self)  # older versions of transformers lack some of these fields
        for name in filter(known, REFUSED):
            faults.check(name, check_fits, self, name)
        for name, (least, most) in RANGES.items():
            if known(name):
                faults.check(name, self._check_numbers, name, None, least, most)
        faults.check("divergence", get_divergence, self.divergence)
        for name in ("temperature", "temperature_start", "temperature_end"):
            faults.check(name, self._check_numbers, name, None, *RANGE)
        for name in ("sft_weight", "sft_weight_start", "sft_weight_end", "skew", "beta"):
            faults.check(name, self._check_numbers, name, None, 0.0, 1.0)
        for name in ("epochs_per_stage", "stage_learning_rates", "learning_rate"):
            faults.check(name, self._check_numbers, name, 0.0)
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        lengths = ("max_prompt_length", "max_response_length", "max_privileged_length")
        for name in (*lengths, "teacher_cache_k", "position_steps", *sizes):
            faults.check(name, self._check_numbers, name, None, 1)
        for name in ("min_learning_rate", "length_buckets", "max_tokens_per_batch", "class_sampling"):
            faults.check(name, self._check_numbers, name, None, 0)
        for name in ("position_ratio", "sample_ratio"):
            faults.check(name, self._check_numbers, name, 0.0, None, 1.0)
        kwargs = faults.check("chat_template_kwargs", check_chat_template_kwargs, self.chat_template_kwargs)
        self.chat_template_kwargs = kwargs or None
        faults.check("train_on", check_train_on, self.train_on)
        faults.check("privileged_template", check_privileged_template, self.privileged_template)
        faults.check("self_ema_decay", check_decay, self.self_ema_decay, self.keep_student_dtype)
        faults.check("sample_selection", SAMPLE_POLICIES.check, self.sample_selection)
        faults.check("backend", check_backend, self.backend)
        faults.check("memory_budget", self._check_numbers, "memory_budget", 0)
        for name, accepted in CHOICES.items():
            if known(name):
                faults.check(name, self._check_choice, name, accepted)
        position = ("position_selection", "position_ratio", "position_steps")
        faults.check(position, make_position_policy, *(getattr(self, name) for name in position))
        faults.check(("class_sampling", "divergence", "teacher_cache_kind"), self._check_class_sampling)
        faults.check(("standardize_logits", "class_sampling", "teacher_cache_kind"), self._check_standardising)
        faults.check(("teacher_device_map", "teacher_tp_plan", "teacher_offload"), self._check_teachers_place)
        if self.teacher_cache is not None:
            kind = self.teacher_cache_kind
            faults.check(("teacher_cache_kind", "divergence"), check_cache_kind, kind, self.divergence)
            seen = ("position_selection", "teacher_cache_kind")
            faults.check(seen, check_rows_have_signal, self.position_selection, kind)
        for name in ("max_new_tokens", "sync_every", "eval_max_new_tokens", "eval_generate_rows"):
            faults.check(name, self._check_numbers, name, None, 1)
        for name in ("generation_temperature", "replay_buffer", "eval_temperature", "early_stopping_patience"):
            faults.check(name, self._check_numbers, name, None, 0)
        if self.lmbda != ADAPTIVE and not isinstance(self.lmbda, str):
            faults.check("lmbda", self._check_numbers, "lmbda", None, 0.0, 1.0)
        check_answers(self, faults)
        faults.check("load_best_model_at_end", check_saves, self)
        given = {name: getattr(self, name) for name in faults.wrong}
        for name in given:  # so that transformers checks the other fields
            setattr(self, name, _default_of(name))
        try:
            super().__post_init__()
        except Exception as e:  # of many kinds
            for fault in faults_of_transformers(self, e):
                faults.add(*fault)
        else:
            faults.check(("accelerator_config", "parallelism_config"), check_processes, self)
        for name, value in given.items():
            setattr(self, name, value)
        faults.tell()
        if self.dataloader_pin_memory and self.device.type == "cuda":
            self.accelerator_config.non_blocking = True  # type: ignore[union-attr]

    def _check_choice(self, name: str, accepted: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value not in accepted:
            words = [{None: "null", True: "true", False: "false"}.get(x, repr(x)) for x in accepted]
            raise UserError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, got {value!r}")

    def _check_class_sampling(self) -> None:
        if not self.class_sampling:
            return
        if self.divergence != "forward_kl":
            raise UserError(
                f"class_sampling is {self.class_sampling}, which estimates only forward_kl, and divergence is "
                f"{self.divergence!r}; set it to 0 or the divergence to forward_kl"
            )
        if self.teacher_cache is not None and not keeps_head(self.teacher_cache_kind):
            raise UserError(
                f"class_sampling draws from the teacher's whole distribution, and teacher_cache_kind "
                f"{self.teacher_cache_kind!r} does not hold it; use hidden, or teacher_cache_kind='sampled' alone"
            )

    def _check_standardising(self) -> None:
        few = self.class_sampling or (self.teacher_cache is not None and not keeps_head(self.teacher_cache_kind))
        if self.standardize_logits and few:
            what = "class_sampling" if self.class_sampling else f"teacher_cache_kind {self.teacher_cache_kind!r}"
            raise UserError(
                f"standardize_logits is true, but {what} gives few of a row's logits; set it to false, or use hidden"
            )

    def _check_teachers_place(self) -> None:
        check_spread(self.teacher_device_map, self.teacher_tp_plan)
        if self.teacher_offload and (self.teacher_device_map or self.teacher_tp_plan):
            given = "teacher_device_map" if self.teacher_device_map else "teacher_tp_plan"
            raise UserError(f"teacher_offload is true, but {given} says where the teacher is; set it to false")

    @property
    def answer_metrics(self) -> tuple[str, ...]:
        """Names of the metrics of generated answers."""
        return DEFAULT_METRICS if self.eval_metrics is None else tuple(self.eval_metrics)

    @property
    def answer_limit(self) -> int:
        """The most tokens of an answer in an evaluation."""
        return self.max_new_tokens if self.eval_max_new_tokens is None else self.eval_max_new_tokens

    @property
    def answers_anew(self) -> bool:
        """Whether any step trains on fresh answers."""
        return bool(self.lmbda) or self.seq_kd

    @property
    def only_cross_entropy(self) -> bool:
        """Whether the loss has no divergence in any stage, and so needs no teacher."""
        given = (self.sft_weight_start, self.sft_weight_end) if self.sft_weight is None else self.sft_weight
        return all(x == 1.0 for x in (given if isinstance(given, (list, tuple)) else [given]))

    def _check_numbers(
        self, name: str, above: float | None = None, least: float | None = None, most: float | None = None
    ) -> None:
        value: Any = getattr(self, name, None)
        whole = _is_whole(name)
        for x in value if isinstance(value, (list, tuple)) else [value]:
            if x is None and value is None:
                continue
            fine = isinstance(x, (int, float)) and not isinstance(x, bool) and x == x and abs(x) != float("inf")
            fine = fine and (not whole or x == int(x)) and (above is None or x > above)
            if not fine or (least is not None and x < least) or (most is not None and x > most):
                low = f"above {above:g}" if above is not None else f"at least {least:g}"
                high = f" and at most {most:g}" if most is not None else ""
                raise UserError(f"{name} must be {'a whole number, ' * whole}{low}{high}, got {x!r}")

    def of_stages(self, count: int) -> StageSettings:
        """The settings of each stage of a curriculum.

        Args:
            count: number of stages, at least 1.

        Returns:
            For each setting one value a stage.

        Raises:
            UserError: a setting is a list of another length.
        """
        rates = self.stage_learning_rates or self.learning_rate
        return StageSettings(
            epochs=per_stage("epochs_per_stage", self.epochs_per_stage, 0.0, 0.0, count),
            temperatures=per_stage(
                "temperature", self.temperature, self.temperature_start, self.temperature_end, count
            ),
            sft_weights=per_stage("sft_weight", self.sft_weight, self.sft_weight_start, self.sft_weight_end, count),
            learning_rates=per_stage("stage_learning_rates", rates, 0.0, 0.0, count),
        )

    @property
    def logits(self) -> torch.dtype | None:
        """`logits_dtype` as the loss takes it."""
        return None if self.logits_dtype is None else torch.float32

    @property
    def scales_with_temperature(self) -> bool:
        """Whether this divergence is multiplied by T^2."""
        if self.temperature_scaling == "official":
            return get_divergence(self.divergence).official_t_squared
        return bool(self.temperature_scaling)

    @classmethod
    def from_preset(cls, preset: str, **fields: Any) -> "SRDConfig":
        """Make a config from a preset, as in `SRDConfig.from_preset("paper", output_dir=DIR)`.

        Args:
            preset: "paper" (arXiv 2508.06135), "official" (the authors' code), "learnable" (the defaults), "POCL"
                (arXiv 2506.05695), "SE-KD" or "SE-KD3X" (arXiv 2602.01395).
            **fields: fields of SRDConfig, used instead of the preset's.

        Returns:
            The config.

        Raises:
            UserError: the preset is unknown, or a field is out of range.
        """
        if preset not in TRAINING_PRESETS:
            raise UserError(unknown_name("preset", preset, TRAINING_PRESETS))
        return cls(**with_preset(preset, fields))
