"""`SRDTrainer`: selective reflection distillation as a `transformers.Trainer`.

The curriculum is one sequence of samples for the whole run, so a run is a single epoch for the Trainer: checkpoints,
resuming, gradient accumulation, mixed precision, several ranks, LoRA and logging work as they always do.

One file, because it is one class: what a training does, from its arguments to its logs, reads from top to bottom.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import DynamoBackend
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PredictionOutput

from ..curriculum import CurriculumPlan
from ..data import (
    WEIGHT,
    DataFunction,
    DistillationCollator,
    Tokenisation,
    check_privileged_column,
    check_token_ids,
    prepare_dataset,
    prompt_lengths,
    read_columns,
    teachers_samples,
)
from ..errors import UserError
from ..losses import DistillationOutput, Head, LossOptions, StudentRows, check_vocabularies
from ..models import (
    body_output,
    call_through,
    check_head,
    classes_of,
    decoder_start,
    embeddings_of,
    gathered,
    hidden_states,
    is_encoder_decoder,
    is_sharded,
    mend_generation_config,
    router_loss,
    through_head,
    try_hub,
    try_saving,
)
from ..selection import BatchSelection, Signals, items_of, select_samples
from ..teacher import (
    LiveTeacher,
    NoTeacher,
    OwnTeacher,
    PrivilegedTeacher,
    RowsOfSamples,
    StepCollator,
    TeacherElsewhere,
    TeacherSource,
    distillation_loss_of_rows,
    from_cache,
    labels_with_loss,
    rows_with_loss,
)
from .answer_fields import check_can_answer
from .answer_metrics import get_metrics
from .answering import EvaluationAnswers, check_generation
from .arguments import check_packages
from .batching import (
    TokenBatches,
    casts_kept,
    check_fit,
    check_lengths,
    check_max_steps,
    evaluation_batches,
    index_stream,
    make_curriculum,
    micro_batches,
    warn_of_cut,
    with_weights,
)
from .best import BestStep
from .callbacks import FollowStudent, StepHooks
from .checkpoints import last_whole_checkpoint
from .config import SRDConfig
from .health import BadStep, DivergenceTrend, StepCheck, not_finite, skips_on_the_device
from .kept_engine import KeptEngine
from .measure import check_best_metric, measure_batch, peak_memory_mb
from .on_policy import OWN, FreshAnswers, WithSamples, check_answering
from .pair import is_self, ready_pair, widen_trained_weights
from .placing import StudentPlace, check_fsdp, check_not_divided
from .prediction import ComputeMetrics, EvaluationSets, Predictions, check_include, named_sets, own_metrics
from .preparation import (
    Layout,
    batch_layout,
    compile_models,
    compiles,
    freeze_what_text_never_reaches,
    layout_of,
    teacher_source,
)
from .progress import ProgressLine
from .replay import logged_losses

logger = logging.getLogger(__name__)

R = TypeVar("R")

# Parts of the loss in the logs; the last only if the student's config asks for that loss.
_LOGGED = ("divergence", "cross_entropy", "entropy", "router_loss")


def _tokens(batch: Mapping[str, Tensor], padding: bool) -> Tensor:
    """How many input tokens a batch has. Without a mask there is no padding."""
    if padding or "attention_mask" not in batch:
        return torch.tensor(batch["input_ids"].numel())
    return batch["attention_mask"].sum()


def _check_arguments(
    args: SRDConfig,
    eval_dataset: Any,
    columns: Mapping[str, str] | None,
    compute_metrics: ComputeMetrics | None,
    own_optimizer: bool,
    teacher_model: object,
) -> None:
    """Refuse arguments that are missing or do not go together, before anything is loaded."""
    if not isinstance(args, SRDConfig):
        raise UserError(f"args must be an SRDConfig, got {type(args).__name__}")
    check_packages(args, optimizer_given=own_optimizer)
    check_include(args.include_for_metrics, compute_metrics)
    if compute_metrics is None:
        check_best_metric(
            args.metric_for_best_model,
            list(eval_dataset) if named_sets(eval_dataset) else (),
            get_metrics(args.answer_metrics) if args.eval_generate else None,
            teacher=teacher_model is not None or args.teacher_cache is not None,
        )
    if args.push_to_hub and args.process_index == 0:
        try_hub(args.hub_token)
    check_privileged_column(columns or {}, args.privileged_template)


def _use_one_gpu(args: SRDConfig) -> None:
    if args.n_gpu > 1:
        logger.warning(
            "%d GPUs are visible to one process; using the first. For all: torchrun --nproc-per-node %d, or "
            "accelerate launch, before -m srd_fast run CONFIG or your script", args.n_gpu, args.n_gpu,
        )  # fmt: skip
        args._n_gpu = 1


class SRDTrainer(Trainer):
    """A `transformers.Trainer` that distils `teacher_model` into `model` along a curriculum.

    Args:
        model: the student, a causal language model or an encoder-decoder model, in the dtype to train in (float32, also
            with bf16=True). A folder or hub id is loaded in float32.
        teacher_model: a model of the same kind with the same tokenizer, or any object with the methods of
            `TeacherSource`. It is never trained. A folder or hub id is loaded only when needed: with
            `args.teacher_cache` only to fill the cache, so that the teacher takes no memory while the student trains.
            "self": the starting student, or with `self_ema_decay` a moving average of the student. It reads more than
            the student (`privileged_template`). Weights that are not trained are in memory only once.
            None: read an existing cache; or, with `sft_weight` 1 and no cache, train only on the cross-entropy.
        args: an SRDConfig.
        train_dataset: rows of any format of `srd_fast.data`, or tokenised samples.
        curriculum: which samples are trained on and in which stage. Default: all of them, in one stage.
        eval_dataset: rows for validation, in any of these formats, or a dictionary of several, by name. Evaluation
            gives KL(teacher, student) and cross-entropy.
        processing_class: the student's tokenizer. It must be given.
        teacher_tokenizer: compared with the student's. Default: the one saved where the teacher was loaded from.
        peft_config: a PEFT configuration; the student becomes a PEFT model with it.
        callbacks: `transformers.TrainerCallback`s, called in addition to the Trainer's own.
        optimizers: an optimizer and a learning rate scheduler. If either is None, the Trainer makes the optimizer that
            `args` describe, or the curriculum sets the learning rate.
        data_collator: makes a batch of a list of tokenised samples. Default: `DistillationCollator`, which pads them,
            or joins them without padding where the models allow it.
        columns: which column of the data is which of a row format's, such as {"instruction": "question", "output":
            "answer"}.
        data_function: makes the rows from a row, or, if its parameter is called `path`, from a file. A function, or
            `FILE.py:FUNCTION`.
        compute_metrics: computes further metrics from a `transformers.EvalPrediction` of all validation rows, in every
            process. It has no logits: `predictions` [rows, tokens] int64 are the student's likeliest classes for the
            tokens with loss, and `label_ids` the right classes at the same places, so nothing has to be shifted. Both
            are padded with -100. With `include_for_metrics=["inputs", "loss"]` it also has the rows' token ids and each
            token's cross-entropy.

    Raises:
        UserError: an argument is missing or wrong, the student's head is not understood, the tokenizers differ, or the
            curriculum does not fit the data.
    """

    args: SRDConfig

    def __init__(
        self,
        model: nn.Module | str,
        teacher_model: nn.Module | TeacherSource | str | None,
        args: SRDConfig,
        train_dataset: Any,
        curriculum: CurriculumPlan | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        data_collator: Callable[..., Any] | None = None,
        columns: Mapping[str, str] | None = None,
        data_function: str | DataFunction | None = None,
        compute_metrics: ComputeMetrics | None = None,
    ) -> None:
        if processing_class is None:
            raise UserError("processing_class is missing: pass the student's tokenizer")
        _check_arguments(
            args,
            eval_dataset,
            columns,
            compute_metrics,
            own_optimizer=optimizers[0] is not None,
            teacher_model=teacher_model,
        )
        model, teacher_model = ready_pair(model, teacher_model, args, processing_class, teacher_tokenizer, peft_config)
        self._tokenisation = Tokenisation(
            processing_class,
            args.template,
            args.max_prompt_length,
            args.max_response_length,
            args.chat_template_kwargs,
            args.parse_special_tokens,
            is_encoder_decoder(model),
            args.train_on,
            args.privileged_template,
            args.max_privileged_length,
        )
        self._made = partial(
            prepare_dataset, tokenisation=self._tokenisation, columns=columns, data_function=data_function
        )
        train = self._made(train_dataset, name="train_dataset").dataset
        held_out: EvaluationSets = None
        if named_sets(eval_dataset):
            held_out = {k: self._made(rows, name=f"eval_dataset {k!r}").dataset for k, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            held_out = self._made(eval_dataset, name="eval_dataset").dataset
        evaluation = concatenate_datasets([*held_out.values()]) if isinstance(held_out, dict) else held_out
        _use_one_gpu(args)
        check_fsdp(args)
        check_not_divided(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=cast(Any, held_out),
            processing_class=processing_class,
            compute_metrics=cast(Any, compute_metrics),
            data_collator=data_collator or DistillationCollator(decoder_start=decoder_start(model)),
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # accelerate would compile the model's own call, but the trainer only calls the model's body.
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        # num_items_in_batch counts the labels that are predicted, over accumulation steps and ranks.
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, True
        self._parameters: int | None = None
        self._place = StudentPlace(args, self.accelerator)
        # The samples as the teacher sees them.
        privileged = args.privileged_template is not None
        self._taught = teachers_samples(train) if privileged else train
        held_out_taught = teachers_samples(evaluation) if privileged and evaluation is not None else evaluation
        self._prepare_student(model, [x for x in (train, evaluation) if x is not None], optimizers[0] is not None)
        self._choose_samples(model, curriculum, train)
        check_fit(train, evaluation, self.curriculum, {"student": model})
        reads = {"teacher": model if is_self(teacher_model) else teacher_model}
        check_fit(self._taught, held_out_taught, self.curriculum, reads, privileged)
        self._take_teacher(model, teacher_model, held_out_taught)
        layout = self._make_batches(model, train)
        self._answers: FreshAnswers | None = None
        self._evaluation_answers: EvaluationAnswers | None = None
        self._student_engine = KeptEngine(args, processing_class)
        self._prepare_answers(model, train, held_out, layout)
        for theirs in (PrinterCallback, ProgressCallback):
            self.remove_callback(theirs)
        self.add_callback(ProgressLine())
        self._hooks = StepHooks(self.curriculum, args.reset_optimizer)
        self.add_callback(self._hooks)
        self.add_callback(BestStep(args.early_stopping_patience))
        if isinstance(self._source, OwnTeacher):
            self.add_callback(FollowStudent(self._source))
        self._loss_options = LossOptions(
            divergence="forward_kl" if self._without_teacher else args.divergence,
            skew=args.skew,
            beta=args.beta,
            temperature_scaling=args.scales_with_temperature,
            standardize_logits=args.standardize_logits,
            ignore_index=None,  # a batch knows its rows with loss
            backend=args.backend,
            memory_budget=args.memory_budget,
            logits_dtype=args.logits,
        )
        self._router_loss = router_loss(model)
        self._sums: Tensor | None = None
        self._tokens = 0
        self._step_loss: Any = 0.0
        self._check = StepCheck(args.device)
        self._trend = DivergenceTrend()
        self.selection = BatchSelection(args, self._classes)
        self._keeps_best = args.load_best_model_at_end
        self._started = time.monotonic()

    def _prepare_student(self, model: nn.Module, given: list[Dataset], own_optimizer: bool) -> None:
        """Make the student ready to be trained, and see that it has an embedding for each token of its samples."""
        predicts = self.compute_metrics is not None and not self.args.prediction_loss_only
        self._place.choose_head(model, own_optimizer=own_optimizer, predicts=predicts)
        with gathered(model):
            check_head(model, "student")
            freeze_what_text_never_reaches(model)
        widen_trained_weights(model, self.args)
        for samples in given:
            check_token_ids(samples, {"student": embeddings_of(model)})
        self._classes = classes_of(model, "student")

    def _choose_samples(self, model: nn.Module, given: CurriculumPlan | None, train: Dataset) -> None:
        """Choose which samples are trained on, in which order; see that a step of them can be made."""
        args, tokenizer = self.args, self._tokenisation.tokenizer
        plan = given or CurriculumPlan(subsets=[list(train["sample_id"])], method="none")
        with gathered(model), self.accelerator.autocast():
            plan = select_samples(plan, train, model, tokenizer, args.sample_selection, args.sample_ratio)
        self.curriculum = make_curriculum(plan, train, args)
        self.train_dataset = cast(Any, with_weights(plan, train))
        check_max_steps(self.curriculum, args)
        warn_of_cut(self.curriculum, args)
        if args.max_tokens_per_batch:
            self._place.check_micro_batches(model)
            check_lengths(args.max_tokens_per_batch, self.curriculum, train, is_encoder_decoder(model))

    def _take_teacher(
        self, model: nn.Module, teacher_model: nn.Module | TeacherSource | str | None, held_out_taught: Dataset | None
    ) -> None:
        """Open what gives the teacher's rows, and see that it has one for each token and class."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sharded(model)
        if is_self(teacher_model) and sharded:
            raise UserError(
                "teacher_model is 'self', but the student's weights lie in shards: pass the folder of the starting "
                "student as teacher_model instead, or train it whole"
            )
        with gathered(model):
            teacher = teacher_source(teacher_model, model, self.args, self.curriculum, self._taught, held_out_taught)
        self.teacher, self._without_teacher = teacher, isinstance(teacher, NoTeacher)
        check_vocabularies(self._classes, teacher.num_classes)
        for samples in (self._taught, *([] if held_out_taught is None else [held_out_taught])):
            if isinstance(teacher, LiveTeacher):
                check_token_ids(samples, {"teacher": embeddings_of(teacher.model)})
            elif isinstance(teacher, TeacherElsewhere):
                check_token_ids(samples, {"teacher": teacher.num_embeddings})
        if self.args.class_sampling and self._classes > teacher.num_classes:
            raise UserError(
                f"class_sampling: the student has {self._classes} classes and the teacher {teacher.num_classes};"
                " it needs a teacher with all of the student's classes, set it to 0"
            )

    def _make_batches(self, model: nn.Module, train: Dataset) -> Layout:
        """Choose the layout of batches, compile the models for it if that is wanted, and set the collator."""
        with gathered(model):
            if isinstance(self.data_collator, DistillationCollator):
                layout = batch_layout(model, self.teacher, self.args)
                self.data_collator.flatten, self.data_collator.share_prefix = layout.flattened, layout.share_prefix
            else:
                layout = layout_of(self.data_collator, train[0], model, self.teacher)
            if compiles(self.args, self.curriculum.total_steps):
                compile_models(model, self.teacher, self.args, self.accelerator.autocast, layout.flattened)
        # The source itself, which reads samples as the teacher sees them.
        self._source = self.teacher
        if self.args.privileged_template is not None:
            self.teacher = PrivilegedTeacher(self._source, self.data_collator)
        rows = self.teacher if isinstance(self.teacher, RowsOfSamples) else None
        self._collate = StepCollator(self.data_collator, rows)
        self.data_collator = self._batches_of(layout, rows)
        return layout

    def _prepare_answers(self, model: nn.Module, train: Dataset, held_out: EvaluationSets, layout: Layout) -> None:
        """Prepare the student's answers in evaluations, and fresh ones in steps, where they are asked for."""
        args, tokenizer = self.args, self._tokenisation.tokenizer
        check_can_answer(args, self._place.why_silent(model))
        if args.eval_generate:
            sets = [*held_out.values()] if isinstance(held_out, dict) else [held_out] if held_out else []
            check_generation(args, model, sets)
            autocast = self.accelerator.autocast
            self._evaluation_answers = EvaluationAnswers(args, tokenizer, autocast, self._student_engine, sets)
        if args.answers_anew:
            check_answering(args, model, self._source, self._classes, self.curriculum, train, self._taught)
            fresh = self.teacher.at_work() if isinstance(self.teacher, PrivilegedTeacher) else None
            self._answers = FreshAnswers(
                args,
                tokenizer,
                train,
                self.curriculum.total_steps,
                self._batches_of(layout, fresh),
                max(prompt_lengths(self._taught)),
                self._student_engine,
                self._classes,
            )
            self.data_collator = WithSamples(self.data_collator)

    def _batches_of(self, layout: Layout, rows: RowsOfSamples | None) -> StepCollator | TokenBatches:
        """Make the collator of a step, which divides batches if asked to, and adds the rows of a cache."""
        collate = StepCollator(self._collate.collate, rows, ahead=rows is not None)
        if not self.args.max_tokens_per_batch:
            return collate
        return TokenBatches(
            collate, self.args.max_tokens_per_batch, layout.flattened, is_encoder_decoder(cast(Any, self.model))
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return index_stream(self.curriculum, self._taught, from_cache(self._source))

    def _set_signature_columns_if_needed(self) -> None:
        columns = cast(Any, self.train_dataset).column_names
        self._signature_columns = [*read_columns(columns), WEIGHT]  # type: ignore[assignment]

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        """Keep the columns that a step reads, as arrays, which are five times as fast as lists."""
        return super()._remove_unused_columns(dataset, description).with_format("numpy")

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.args.include_num_input_tokens_seen == "no":
            return
        seen = [_tokens(part, self.args.include_num_input_tokens_seen == "all") for part in micro_batches(inputs)]
        of_ranks = self.accelerator.gather(torch.stack(seen).sum().to(self.args.device))
        self.state.num_input_tokens_seen += int(of_ranks.sum())

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the scheduler that follows the curriculum's learning rate.

        Args:
            num_training_steps: not used; the curriculum knows its steps.
            optimizer: what the scheduler is for. Default: the trainer's optimizer.

        Returns:
            The scheduler.
        """
        if self.lr_scheduler is None:
            base = self.args.learning_rate
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,  # type: ignore[arg-type]
                lambda step: self.curriculum.learning_rate(step) / base,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward pass of a batch, in micro-batches where `max_tokens_per_batch` divides it.

        Args:
            model: the student, wrapped for training.
            inputs: a batch of the data collator.
            num_items_in_batch: tokens with loss in the whole optimizer step.

        Returns:
            Scalar, the loss of the batch.
        """
        parts = micro_batches(inputs)
        if len(parts) == 1:
            return super().training_step(model, parts[0], num_items_in_batch)
        losses = []
        with casts_kept():
            for i, part in enumerate(parts):
                # Gradients go to the other ranks after the last micro-batch, summed over all of them.
                with self.accelerator.no_sync(model) if i < len(parts) - 1 else nullcontext():
                    losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Distillation loss of a micro-batch.

        Args:
            model: the student, wrapped for training.
            inputs: a batch of the data collator.
            return_outputs: return a tuple of the loss and {"loss": loss}.
            num_items_in_batch: tokens with loss in the whole optimizer step, the loss's denominator. Default: the
                labels of this micro-batch.

        Returns:
            Scalar, the loss; with `return_outputs` the tuple.
        """
        step = self.state.global_step
        temperature, labels_N = self.curriculum.temperature(step), labels_with_loss(inputs)
        rows = self.teacher.rows(inputs, temperature)
        student = self._place.inner(model)
        # The student must not imitate its own answer.
        sft_weight = 0.0 if inputs.get(OWN) else self.curriculum.sft_weight(step)
        options = replace(self._loss_options, temperature=temperature, sft_weight=sft_weight)

        def of_rows(head: Head, student_ND: Tensor) -> tuple[Tensor, DistillationOutput]:
            seen = self.selection(student_ND, head, rows, labels_N, inputs, step, temperature)
            # By default, a head in shards would count the labels of all ranks.
            own = None if head.shard is None else max(1, len(seen.labels_K))
            items = own if num_items_in_batch is None else num_items_in_batch
            rows_K = StudentRows(seen.student_KD, head, seen.labels_K, options, seen.weights_K, items, seen.logits_KV)
            out = distillation_loss_of_rows(rows_K, seen.rows)
            return out.loss, out

        def forward(batch: Mapping[str, Any]) -> tuple[Tensor, DistillationOutput, Tensor | None]:
            # The loss is inside too: like the body, it takes the dtype of its products from autocast.
            with self.accelerator.autocast():
                body = body_output(student, batch)
                loss, out = through_head(student, of_rows, rows_with_loss(body.last_hidden_state, batch))
                if self._router_loss is None:
                    return loss, out, None
                balance = self._router_loss(body.router_logits, batch)
            # It is a mean over tokens, so each micro-batch counts by its share of the tokens.
            balance = balance * (len(labels_N) / out.num_items)
            return loss + balance, out, balance

        loss, out, balance = call_through(model, student, forward, inputs)
        self._count(out, len(labels_N), balance)
        self._step_loss = self._step_loss + loss.detach()
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients of the ranks
        return (loss, {"loss": loss}) if return_outputs else loss

    def _place_student(self) -> None:
        """Wrap and shard the student as for a step, before anything runs it outside of training."""
        if self.model_wrapped is self.model and not self.is_in_train:
            self.model = self.model_wrapped = self._place.placed(cast(nn.Module, self.model))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count the operations of a batch as `transformers.Trainer` does, with the model's parameters counted once.

        Args:
            inputs: a batch of the data collator.

        Returns:
            Floating-point operations.
        """
        if self._parameters is None:
            self._parameters = cast(Any, self.model).num_parameters(exclude_embeddings=True)
        return 6 * sum(part["input_ids"].numel() for part in micro_batches(inputs)) * self._parameters

    @torch.no_grad()
    def positions_of(self, sample: dict[str, Any]) -> tuple[list[float], list[bool]]:
        """The current student's entropy at each position of a sample, and whether the position would be selected.

        Args:
            sample: a tokenised sample, with input_ids and labels.

        Returns:
            For every position with loss, the student's entropy in nats, and whether `position_selection` would choose
            it.
        """
        self._place_student()
        student = self._place.inner(self.model_wrapped)
        batch = self._prepare_inputs(self._collate([sample]))

        def look(head: Head, student_ND: Tensor) -> tuple[list[float], list[bool]]:
            labels_N = labels_with_loss(batch)
            signals = Signals(student_ND, head, labels_N, lambda: self.teacher.rows(batch, 1.0), 1.0)
            indices = set(self.selection.chosen(signals, batch, self.state.global_step).indices_K.tolist())
            return signals("student_entropy").tolist(), [i in indices for i in range(len(labels_N))]

        was_training = student.training
        student.eval()
        with self.accelerator.autocast():
            found = self._place.call(
                self.model_wrapped,
                lambda x: through_head(student, look, rows_with_loss(hidden_states(student, x), x)),
                batch,
            )
        student.train(was_training)
        return found

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._raise_if_bad(self._check.look(wait=True))
        self._show_weights()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self.selection.save(folder)
        if self._answers is not None:
            self._answers.save(folder)
        if isinstance(self._source, OwnTeacher) and self.args.should_save:
            self._source.save(folder)
        super()._save_checkpoint(model, trial)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Take the batches of an optimizer step, with fresh answers if the step trains on them.

        Args:
            epoch_iterator: the loader's iterator.
            num_batches: number of batches of the step.
            device: where the count of tokens goes.

        Returns:
            The batches, and how many tokens with loss they have over all ranks.
        """
        if self.control.should_training_stop:
            return [], None  # the training had already ended when it was interrupted
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._answers is None or not batches:
            return batches, items
        student = self._place.inner(self.model_wrapped)
        with self.accelerator.autocast(), torch.no_grad():
            made = self._answers.in_place_of(
                batches, self.state.global_step, self._validation_losses(), student, self._source
            )
        return made, items if made is batches else self._get_num_items_in_batch(made, device)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save every step that is the best so far, whatever `save_steps` says, so that it can be loaded in the end."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self._keeps_best:
            self.control.should_save = True
        return is_best

    def _validation_losses(self) -> list[float]:
        sets = list(cast(Any, self.eval_dataset)) if named_sets(self.eval_dataset) else []
        return logged_losses(self.state.log_history, self.state.global_step, sets)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        policy = self.selection.policy
        counts = [part["loss_counts"] for batch in batch_samples for part in micro_batches(batch)]
        items = sum(sum(of_part) if policy is None else items_of(policy, of_part) for of_part in counts)
        # Passed on as a tensor of as many labels, on the device, so that the base class sums over ranks.
        counted = {"labels": None, "shift_labels": torch.zeros(items, device=device)}
        return super()._get_num_items_in_batch([counted], device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Check loss and gradient once before each optimizer step, so that a step that is not finite changes nothing.

        A fused optimizer skips such a step on the device: the host does not wait, and learns of it soon after. With any
        other optimizer the host waits.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, self._step_loss = self._step_loss, 0.0
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        # In fp16 the scaler checks the gradients itself, and skips a step now and then.
        whole = 0.0 if self.args.fp16 or norm is None else getattr(norm, "full_tensor", lambda: norm)()
        flag = self._check.add(self.state.global_step, loss, whole)
        skips = not self.args.fp16 and whole is norm and isinstance(norm, Tensor) and skips_on_the_device(optimizer)
        if skips:
            optimizer.found_inf = flag
        self._raise_if_bad(self._check.look(wait=not skips))
        return norm

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say which weights a checkpoint lacks, without those that it has under the name to which they are tied."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(
            SimpleNamespace(missing_keys=missing, unexpected_keys=load_result.unexpected_keys)
        )

    def _show_weights(self) -> None:
        """Let a schedule-free optimizer put its averaged weights into the model. The next step takes them out again."""
        show = getattr(self.optimizer, "eval", None)
        if show is not None:
            show()

    def _raise_if_bad(self, bad: BadStep | None) -> None:
        if bad is None:
            return
        curriculum, train, size = self.curriculum, cast(Any, self.train_dataset), self.curriculum.batch_size
        ids = [train[i]["sample_id"] for i in islice(curriculum.indices(), bad.step * size, (bad.step + 1) * size)]
        place = f"stage {curriculum.stage_of(bad.step) + 1}, temperature {curriculum.temperature(bad.step):g}"
        place += f", learning rate {curriculum.learning_rate(bad.step):.3g}"
        what, value = ("norm of the gradient", bad.gradient_norm) if math.isfinite(bad.loss) else ("loss", bad.loss)
        checkpoint = last_whole_checkpoint(Path(str(self.args.output_dir)))
        raise not_finite(f"the {what} is {value}", bad.step, place, ids, checkpoint)

    def _count(self, out: DistillationOutput, tokens: int, balance: Tensor | None) -> None:
        parts = (out.divergence, out.cross_entropy, out.entropy, *([] if balance is None else [balance]))
        values = torch.stack(parts).detach()
        self._sums = values if self._sums is None else self._sums + values
        self._tokens += tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the curriculum's stage, temperature and weight, and the parts of the loss, to the training logs.

        Args:
            logs: what the Trainer logs.
            start_time: when training started, in seconds.
        """
        self._raise_if_bad(self._check.look(wait=True))
        if "loss" in logs and self._sums is not None:
            step = max(0, self.state.global_step - 1)
            seconds, steps = self._hooks.take()
            sums = torch.cat((self._sums.float(), self._sums.new_tensor([self._tokens]).float()))
            *totals, tokens = self.accelerator.reduce(sums, "sum").tolist()
            logs |= {name: total / steps for name, total in zip(_LOGGED, totals)}
            logs |= {
                "stage": self.curriculum.stage_of(step) + 1,
                "temperature": self.curriculum.temperature(step),
                "sft_weight": self.curriculum.sft_weight(step),
                "tokens_per_second": tokens / seconds,
                "memory_mb": peak_memory_mb(self.args.device),
                "seconds": time.monotonic() - self._started,
            }
            self._sums, self._tokens = None, 0
            if self._without_teacher:
                del logs["divergence"]
            else:
                self._trend.add(logs["stage"], logs["divergence"])  # type: ignore[arg-type]
            if self.selection.policy is not None:
                logs |= self.selection.selected.take()
            if self._answers is not None:
                logs |= self._answers.take(
                    self._validation_losses(), lambda x: cast(Tensor, self.accelerator.reduce(x, "sum"))
                )
                logs["sft_weight"] *= 1 - logs["own_answers"]  # these steps have no cross-entropy
        super().log(logs, start_time)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train the student.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest whole one in `args.output_dir`. True
                without such a checkpoint starts from the beginning.
            trial: the trial of a hyperparameter search, as in `transformers.Trainer`.
            ignore_keys_for_eval: passed on to `transformers.Trainer`.

        Returns:
            A `transformers` TrainOutput: the number of steps, the mean loss and metrics.

        Raises:
            UserError: the student could not be saved after training. This is found out before the first step.
            NotFiniteError: loss or gradient became NaN or infinite. It is a UserError that names step, stage and
                samples.
        """
        student = self.accelerator.unwrap_model(self.model)
        mend_generation_config(student, "student")
        if self.args.should_save:
            saved_in = None if self.args.save_strategy == "no" else Path(str(self.args.output_dir))
            try_saving(student, cast(Any, self.processing_class), saved_in)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(Path(str(self.args.output_dir)))
            if resume_from_checkpoint is None:
                logger.warning("no checkpoint in %s yet: starting from the beginning", self.args.output_dir)
        if resume_from_checkpoint:
            self._place.check_checkpoint(Path(resume_from_checkpoint))
            self.selection.load(Path(resume_from_checkpoint))
            if self._answers is not None:
                self._answers.load(Path(resume_from_checkpoint))
            if isinstance(self._source, OwnTeacher):
                self._source.load(Path(resume_from_checkpoint))
        if self._place.in_shards:
            self._place_student()  # else the Trainer would make the optimizer from other groups of weights
        self.selection.begin()
        self._sums, self._tokens, self._step_loss = None, 0, 0.0
        self._check = StepCheck(self.args.device)
        self._hooks.take()
        try:
            result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._student_engine.close()
            if self._answers is not None:
                self._answers.close()
            optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            if hasattr(optimizer, "found_inf"):
                del optimizer.found_inf
        self._raise_if_bad(self._check.look(wait=True))
        self._show_weights()
        self._trend.end()
        return result

    def save_student(self, folder: str | Path) -> None:
        """Save the student as a complete model, adapters merged, with its tokenizer, and check the saved folder.

        If several processes train, all must call this together. The first one writes, and gathers a sharded student in
        the memory of its host. The others wait.

        Args:
            folder: where it goes.

        Raises:
            UserError: the adapters cannot be merged, or the folder gives another model. All processes raise it.
        """
        self._place.save(self.model_wrapped, cast(Any, self.processing_class), Path(folder))

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Evaluate within the training loop. `eval_on_start` is for its start: where a resumed training goes on, one
        evaluation more would move what depends on their number."""
        if skip_scheduler and self.state.global_step:
            return {}
        return cast(dict[str, float], super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the student on the validation rows. Values are means over tokens, in nats.

        Args:
            eval_dataset: rows of any format of `srd_fast.data`, a dictionary of several, or the name of one of several.
                Default: the trainer's `eval_dataset`.
            ignore_keys: not used.
            metric_key_prefix: the names of the metrics begin with it and "_"; with several data sets, followed by the
                set's name and "_".

        Returns:
            `eval_loss`: `eval_kl`, or without a teacher the cross-entropy, so that `metric_for_best_model="loss"` picks
            the student closest to its teacher; `eval_kl`: KL(teacher, student) at T = 1, only with a teacher;
            `eval_cross_entropy`; the metrics of `compute_metrics`; and with `eval_generate` the scores of the student's
            answers, `eval_rouge_l`, `eval_exact_match` or other `eval_metrics`, means over rows from 0 to 1, and
            `eval_generation_seconds`.

        Raises:
            UserError: there are no validation rows.
        """
        self._raise_if_bad(self._check.look(wait=True))
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        known: Any = self.eval_dataset
        if isinstance(rows, str) and isinstance(known, dict) and rows in known:
            rows = known[rows]
        if rows is None:
            raise UserError("eval_dataset is missing: pass it to SRDTrainer or to evaluate()")
        if named_sets(rows):
            metrics: dict[str, float] = {}
            for name, of_set in cast(dict[str, Any], rows).items():
                metrics |= self.evaluate(of_set, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        dataset = self._made(rows, name="eval_dataset").dataset
        wanted = self.compute_metrics is not None and not self.args.prediction_loss_only
        metrics = self._measured(dataset, self.teacher, self._collate, metric_key_prefix, wanted)[0]
        if self._evaluation_answers is not None:
            student = self._place.inner(self.model_wrapped)
            try:
                found = self._evaluation_answers.measure(dataset, student, self.state.global_step)
            finally:
                if not self.is_in_train:
                    self._student_engine.close()
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Let the student predict each token of the responses from the tokens before it.

        Args:
            test_dataset: rows of any format of `srd_fast.data`.
            ignore_keys: not used.
            metric_key_prefix: the names of the metrics begin with it and "_".

        Returns:
            `predictions` [rows, tokens] int64: the likeliest class for each token with loss; `label_ids`: the right
            classes, in the same shape; both padded with -100; and `metrics`, as in `evaluate`. A teacher cache has no
            rows of these samples, and neither has a teacher that reads more than the student: then `test_loss` is the
            cross-entropy, and there is no KL.

        Raises:
            UserError: the rows cannot be used.
        """
        plain = self._tokenisation.without_privileged()
        dataset = self._made(test_dataset, name="test_dataset", tokenisation=plain).dataset
        check_token_ids(dataset, {"student": embeddings_of(self.accelerator.unwrap_model(self.model))})
        stored = isinstance(self.teacher, RowsOfSamples)
        collate = StepCollator(self._collate.collate, None)
        metrics, found = self._measured(dataset, None if stored else self.teacher, collate, metric_key_prefix, True)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(cast(Any, found).predictions, cast(Any, found).label_ids, metrics)

    @torch.no_grad()
    def _measured(
        self, dataset: Dataset, teacher: TeacherSource | None, collate: StepCollator, prefix: str, predicted: bool
    ) -> tuple[dict[str, float], EvalPrediction | None]:
        """Metrics of the student on tokenised samples, and its predictions if they are wanted."""
        self._place_student()
        student = self._place.inner(self.model_wrapped)
        was_training, totals = student.training, torch.zeros(3, dtype=torch.float64, device=self.args.device)
        teacher = None if self._without_teacher else teacher
        student.eval()
        self._show_weights()
        predictions = Predictions("inputs" in self.args.include_for_metrics) if predicted else None
        try:
            for inputs, samples in evaluation_batches(dataset, self.args, collate):
                with self.accelerator.autocast():
                    batch = self._prepare_inputs(inputs)
                    look = None if predictions is None else predictions.of_batch(batch, samples)
                    measured = self._place.call(
                        self.model_wrapped, partial(measure_batch, student, teacher, look=look), batch
                    )
                totals += torch.stack([measured.kl, measured.cross_entropy, measured.num_tokens]).double()
        finally:
            student.train(was_training)
        kl, cross_entropy, tokens = self.accelerator.reduce(totals, "sum").tolist()
        if teacher is None:
            values = {"loss": cross_entropy / tokens, "cross_entropy": cross_entropy / tokens}
        else:
            values = {"loss": kl / tokens, "kl": kl / tokens, "cross_entropy": cross_entropy / tokens}
        metrics = {f"{prefix}_{name}": value for name, value in values.items()}
        if predictions is None:
            return metrics, None
        found = predictions.gathered(len(dataset), self.args.world_size)
        if self.compute_metrics is not None:
            metrics |= own_metrics(self.compute_metrics, found, self.args.include_for_metrics, prefix)
        return metrics, found
