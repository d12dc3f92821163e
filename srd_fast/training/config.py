"""`SRDConfig`: the training arguments of selective reflection distillation, and its presets."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments

from ..curriculum import per_stage
from ..data import check_chat_template_kwargs, check_train_on
from ..errors import UserError
from ..losses import Projected, Sampled, TopK, check_rest, get_divergence
from ..losses.options import RANGE
from ..models import check_spread
from ..selection import SAMPLE_POLICIES, check_rows_have_signal, make_position_policy
from ..suggest import unknown_name
from ..teacher.stores import CACHE_KINDS, keeps_head

# SE-KD (arXiv 2602.01395): KL at temperature 1 on the fifth of each response that the student is least sure of.
_SE_KD: dict[str, Any] = {
    "divergence": "forward_kl",
    "temperature": 1.0,
    "sft_weight": 0.0,
    "position_selection": "topk_student_entropy",
    "position_ratio": 0.2,
}
# Stages that are runs of their own, as in the code of both papers' authors.
_STAGES_ALONE: dict[str, Any] = {
    "epochs_per_stage": 8,
    "learning_rate": 1e-4,
    "min_learning_rate": 1e-7,
    "restart_learning_rate": True,
    "reset_optimizer": True,
    "temperature_scaling": "official",
    "per_device_train_batch_size": 16,
}
# `paper`: arXiv 2508.06135. `official`: what the authors' code does, where it differs. POCL: arXiv 2506.05695, which
# drops no sample. SE-KD3X: with classes, samples.
TRAINING_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "temperature_start": 1.0,
        "temperature_end": 2.0,
        "sft_weight_start": 0.3,
        "sft_weight_end": 0.1,
        "epochs_per_stage": 8,
    },
    "official": {
        **_STAGES_ALONE,
        "temperature": [1.0, 1.5, 2.0],
        "sft_weight": [0.2, 0.1, 0.0],
    },
    "POCL": {
        **_STAGES_ALONE,
        "temperature": [1.0, 1.33, 1.67, 2.0],
        "sft_weight": [0.3, 0.2, 0.1, 0.0],
    },
    "SE-KD": _SE_KD,
    "SE-KD3X": {
        **_SE_KD,
        "class_sampling": 64,
        "sample_selection": "topk_student_entropy",
        "sample_ratio": 0.2,
    },
}
# Ends of the names of metrics of which less is better; TrainingArguments knows "loss" alone.
_LESS_IS_BETTER = ("loss", "kl", "entropy", "divergence", "perplexity")


def check_cache_kind(kind: str, divergence: str, names: tuple[str, str] = ("teacher_cache_kind", "divergence")) -> None:
    """Refuse an unknown kind of teacher cache, or one that cannot give this divergence.

    Args:
        kind: of the cache.
        divergence: name of the divergence.
        names: what the two are called in the user's input, for the message.

    Raises:
        UserError: the kind is unknown, or cannot give the divergence.
    """
    rows = CACHE_KINDS.get(kind).rows
    if rows is TopK:
        check_rest(divergence, f"{names[0]} {kind!r}")
    if rows in (Sampled, Projected) and divergence != "forward_kl":
        raise UserError(
            f"{names[0]} {kind!r} gives forward_kl alone, and {names[1]} is {divergence!r}; use hidden or topk"
        )


def with_preset(preset: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a preset, replaced by the given ones. A given start or end removes the preset's list of stages."""
    base = dict(TRAINING_PRESETS[preset])
    for name in ("temperature", "sft_weight"):
        if f"{name}_start" in fields or f"{name}_end" in fields:
            base.pop(name, None)
    return {**base, **fields}


def _described(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


class StageSettings(NamedTuple):
    """What each stage of a curriculum trains with: one value a stage, from the first to the last.

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


@dataclass
class SRDConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the fields of distillation.

    A run is one pass over the curriculum's sequence of samples, so `num_train_epochs` is always 1: set
    `epochs_per_stage` instead. Temperature and weight of the cross-entropy go linearly over the stages from `*_start`
    to `*_end`, unless `temperature` or `sft_weight` give one number, or one a stage.

    The fields listed here are those of distillation, and those of `TrainingArguments` that have another default.

    Raises:
        UserError: a value is out of range. The message names the field. It is a ValueError.
    """

    # Here a loss that is not finite ends the run, and looking for one waits for the device twice a batch.
    logging_nan_inf_filter: bool = _described(False, "Replace losses that are not finite in the logs.")
    torch_compile: Any = _described(
        None, "Compile the layers of the student and of a live teacher: true, false, or null: on a GPU, for long runs."
    )
    learning_rate: float = _described(1e-4, "Peak learning rate of each stage's cosine.")
    logging_steps: float = _described(10, "Steps between training logs.")
    divergence: str = _described("skew_reverse_kl", "Name of the divergence; see divergence_names().")
    skew: float = _described(0.1, "Skew of the skew divergences, 0 to 1.")
    beta: float = _described(0.5, "Beta of the JSD, 0 (forward KL) to 1 (reverse KL).")
    temperature_start: float = _described(1.0, "Temperature of the first stage.")
    temperature_end: float = _described(2.0, "Temperature of the last stage.")
    temperature: Any = _described(None, "One temperature, or one a stage; replaces temperature_start and _end.")
    standardize_logits: bool = _described(
        False, "Let the divergence be of logits less their row's mean, over its deviation (arXiv 2403.01427)."
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
        512, "Tokens; longer prompts lose the end of their input text, longer chats their oldest turns first."
    )
    max_response_length: int = _described(512, "Tokens, with the one that ends the response; longer ones are cut.")
    chat_template_kwargs: dict[str, Any] | None = _described(
        None,
        "Variables of the chat template (enable_thinking, ...); strftime_now: the date it gets, or 2025-01-01.",
    )
    parse_special_tokens: bool | None = _described(
        None, "Whether special tokens in the data's text are parsed; null: in prompt/completion rows alone."
    )
    train_on: str = _described("last", "Which answers of a conversation have loss: last or all.")
    backend: str = _described("auto", "Loss backend.")
    memory_budget: int | None = _described(None, "Bytes that the loss may allocate beyond its inputs and gradients.")
    logits_dtype: str | None = _described(
        None, "Of the loss's logits: None for that of the training (bf16, fp16), or 'float32', unrounded."
    )
    keep_student_dtype: bool = _described(
        False, "Train bfloat16 or float16 weights as they are; otherwise they become float32 first."
    )
    shared_vocabulary: bool = _described(
        False, "Let student and teacher each have tokens of its own; the divergence is over those that both have."
    )
    max_tokens_per_batch: int = _described(
        0, "Tokens of a micro-batch, padding included, into which each step's samples are divided; 0: as they come."
    )
    teacher_cache: str | None = _described(None, "Folder of the teacher's rows; filled first where it lacks any.")
    teacher_cache_kind: str = _described("hidden", "What the cache holds of a row; see cache_kind_names().")
    teacher_cache_k: int = _described(64, "Classes, or draws, a row of a compact cache.")
    teacher_offload: bool = _described(False, "Keep a live teacher's body in the host's memory between steps.")
    teacher_device_map: Any = _described(
        None, "Where the parts of a teacher given by name go: 'auto', or a device, 'cpu' or 'disk' for each module."
    )
    teacher_tp_plan: str | None = _described(None, "'auto': each layer of such a teacher is split over all processes.")
    padding_free: Any = _described(
        "auto", "Batches without padding: true, false, or 'auto' where the models' attention is known to take them."
    )
    length_buckets: int = _described(0, "Batches whose samples are sorted by length together; 0: as shuffled.")

    position_selection: str = _described("all", "Which tokens of a response have loss; see position_policy_names().")
    position_ratio: float = _described(0.2, "Share of each response's tokens that a position policy chooses.")
    position_steps: int = _described(4000, "Steps over which position_selection 'curriculum' goes to the hardest.")
    class_sampling: int = _described(0, "Classes to draw from the teacher for each token (forward KL); 0: all of them.")
    sample_selection: str = _described("all", "Which samples are trained on; see sample_policy_names().")
    sample_ratio: float = _described(0.2, "Share of each stage's samples that a sample policy chooses.")

    def __post_init__(self) -> None:
        self.num_train_epochs = 1.0
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(_LESS_IS_BETTER):
            self.greater_is_better = False
        get_divergence(self.divergence)
        for name in ("temperature", "temperature_start", "temperature_end"):
            self._check_numbers(name, least=RANGE[0], most=RANGE[1])
        for name in ("sft_weight", "sft_weight_start", "sft_weight_end", "skew", "beta"):
            self._check_numbers(name, least=0.0, most=1.0)
        for name in ("epochs_per_stage", "stage_learning_rates", "learning_rate"):
            self._check_numbers(name, above=0.0)
        self._check_numbers("min_learning_rate", least=0.0)
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in ("max_prompt_length", "max_response_length", "teacher_cache_k", *sizes):
            self._check_numbers(name, least=1)
        self.chat_template_kwargs = check_chat_template_kwargs(self.chat_template_kwargs) or None
        check_train_on(self.train_on)
        for name in ("length_buckets", "max_tokens_per_batch"):
            self._check_numbers(name, least=0)
        if self.logits_dtype not in (None, "float32"):
            raise UserError(f"logits_dtype must be 'float32', or null for the training's, got {self.logits_dtype!r}")
        for name in ("position_ratio", "sample_ratio"):
            self._check_numbers(name, above=0.0, most=1.0)
        self._check_numbers("position_steps", least=1)
        self._check_numbers("class_sampling", least=0)
        make_position_policy(self.position_selection, self.position_ratio, self.position_steps)
        SAMPLE_POLICIES.check(self.sample_selection)
        if self.class_sampling:
            if self.divergence != "forward_kl":
                raise UserError(
                    f"class_sampling is {self.class_sampling}, which estimates forward_kl alone, and divergence is "
                    f"{self.divergence!r}; set it to 0 or the divergence to forward_kl"
                )
            if self.teacher_cache is not None and not keeps_head(self.teacher_cache_kind):
                raise UserError(
                    f"class_sampling draws from the teacher's whole distribution, and teacher_cache_kind "
                    f"{self.teacher_cache_kind!r} does not hold it; use hidden, or teacher_cache_kind='sampled' alone"
                )
        if self.standardize_logits not in (True, False):
            raise UserError(f"standardize_logits must be true or false, got {self.standardize_logits!r}")
        few = self.class_sampling or (self.teacher_cache is not None and not keeps_head(self.teacher_cache_kind))
        if self.standardize_logits and few:
            what = "class_sampling" if self.class_sampling else f"teacher_cache_kind {self.teacher_cache_kind!r}"
            raise UserError(
                f"standardize_logits is true, but {what} gives few of a row's logits; set it to false, or use hidden"
            )
        if self.temperature_scaling not in (True, False, "official"):
            raise UserError(f"temperature_scaling must be true, false or 'official', got {self.temperature_scaling!r}")
        if self.torch_compile not in (True, False, None):
            raise UserError(f"torch_compile must be true, false or null, got {self.torch_compile!r}")
        if self.padding_free not in (True, False, "auto"):
            raise UserError(f"padding_free must be true, false or 'auto', got {self.padding_free!r}")
        check_spread(self.teacher_device_map, self.teacher_tp_plan)
        if self.teacher_offload and (self.teacher_device_map or self.teacher_tp_plan):
            given = "teacher_device_map" if self.teacher_device_map else "teacher_tp_plan"
            raise UserError(f"teacher_offload is true, but {given} says where the teacher is; set it to false")
        if self.teacher_cache is not None:
            check_cache_kind(self.teacher_cache_kind, self.divergence)
            check_rows_have_signal(self.position_selection, self.teacher_cache_kind)
        if self.label_smoothing_factor:
            raise UserError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, which the distillation loss does not have; "
                "set it to 0 (the teacher's probabilities are soft labels already)"
            )
        if self.auto_find_batch_size:
            raise UserError("auto_find_batch_size would change the curriculum's steps in mid-run; set it to false")
        super().__post_init__()
        if self.dataloader_pin_memory and self.device.type == "cuda":
            self.accelerator_config.non_blocking = True  # type: ignore[union-attr]

    def _check_numbers(
        self, name: str, above: float | None = None, least: float | None = None, most: float | None = None
    ) -> None:
        value = getattr(self, name)
        for x in value if isinstance(value, (list, tuple)) else [value]:
            if x is None and value is None:
                continue
            fine = isinstance(x, (int, float)) and not isinstance(x, bool) and x == x and abs(x) != float("inf")
            if fine and above is not None:
                fine = x > above
            if fine and least is not None:
                fine = x >= least
            if fine and most is not None:
                fine = x <= most
            if not fine:
                low = f"above {above:g}" if above is not None else f"at least {least:g}"
                raise UserError(
                    f"{name} must be {low}{f' and at most {most:g}' if most is not None else ''}, got {x!r}"
                )

    def of_stages(self, count: int) -> StageSettings:
        """What each stage of a curriculum trains with.

        Args:
            count: of stages, at least 1.

        Returns:
            One value a stage of each setting.

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
            preset: "paper" (arXiv 2508.06135), "official" (the authors' code), "POCL" (arXiv 2506.05695), "SE-KD" or
                "SE-KD3X" (arXiv 2602.01395).
            **fields: fields of SRDConfig, used instead of the preset's.

        Returns:
            The config.

        Raises:
            UserError: the preset is unknown, or a field is out of range.
        """
        if preset not in TRAINING_PRESETS:
            raise UserError(unknown_name("preset", preset, TRAINING_PRESETS))
        return cls(**with_preset(preset, fields))
