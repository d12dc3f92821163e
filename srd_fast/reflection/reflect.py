"""`reflect`: generations and difficulty scores of every sample."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Answers, DataFunction, Tokenisation, check_token_ids, prepare_dataset, prompt_lengths, token_counts
from ..errors import UserError
from ..models import (
    check_head,
    check_positions,
    embeddings_of,
    fingerprint,
    is_encoder_decoder,
    load_config,
    load_model,
    model_digest,
)
from ..rouge import choose_tokenizer
from ..sharing import ALONE, Sharing
from ..showing import progress_bar
from ..suggest import unknown_name
from ..teacher.source import TeacherSource
from .attempts import JUDGE, check_attempts
from .engines import (
    AUTO,
    ENGINES,
    GenerationEngine,
    check_engine_options,
    engine_settings,
    open_engine,
)
from .gap import check_teacher, check_teacher_given, teacher_source
from .parts import compute_parts, cut, part_name, read_part, write_part
from .sampling import Sampling, stopping_at
from .shards import samples_of_shard
from .signals import Reflected, check_rows, get_difficulties, get_difficulty

logger = logging.getLogger(__name__)

# Reflection settings of the authors' code; `paper` leaves them open. `learnable` ranks only by the gap; its other
# signals, which cost little more, are for the report.
REFLECTION_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"max_new_tokens": 256},
    "learnable": {"signals": ["rouge_l", "cross_entropy", "teacher_cross_entropy", "gap"]},
    "official": {"max_new_tokens": 256, "temperature": 0.01, "no_repeat_ngram_size": 6, "score_eos": False},
}
CROSS_ENTROPY_BY = ("student", "engine")
# From this share of equal answers on, they cannot rank samples; but not with fewer answers than the second number.
_ALIKE, _LEAST_ANSWERS = 0.9, 8


def reflect(
    student: PreTrainedModel | str,
    dataset: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    engine: str = AUTO,
    engine_options: Mapping[str, Any] | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
    signals: Sequence[str] = ("rouge_l", "cross_entropy"),
    attempts: int = 1,
    judge: str = JUDGE,
    cross_entropy_by: str = "student",
    batch_size: int = 32,
    template: str = "alpaca",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    parse_special_tokens: bool | None = None,
    columns: Mapping[str, str] | None = None,
    data_function: str | DataFunction | None = None,
    train_on: str = "last",
    rouge_tokenizer: str = "auto",
    score_eos: bool = True,
    test_seconds: float = 5.0,
    test_memory_mb: int = 512,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shard: str | None = None,
    parts_folder: str | Path | None = None,
    sharing: Sharing = ALONE,
    keep_ids: bool = False,
    progress: bool = True,
    teacher: PreTrainedModel | TeacherSource | str | None = None,
) -> Dataset:
    """Let the student answer every prompt, and score how hard each sample is for it.

    Args:
        student: a causal language model, or a folder or hub id to load one from, in `dtype` on `device`.
        dataset: rows of any format of `srd_fast.data`, or tokenised samples.
        tokenizer: the student's.
        engine: what generates the answers, a name from `engine_names()`, or "auto": vllm where it is installed and
            starts, else transformers.
        engine_options: further keyword arguments of the engine, such as those of `VLLMEngine`.
        sampling: how answers are generated. Default: greedy, at most 128 new tokens.
        max_new_tokens: the longest answer, at least 1, instead of `sampling`'s.
        signals: names from `difficulty_names()`, or `FILE.py:NAME` or `package.module:NAME` for a function of your own.
        attempts: number of answers to each prompt, for the signal "pass_rate"; if above 1, they are sampled, with the
            seeds from `sampling.seed` on. The other signals use only the first answer.
        judge: the signal that says which attempts pass, by the value 1: "exact_match", "numeric_match" (the final
            number, as in GSM8K), "execution" (all tests), or a function of your own.
        cross_entropy_by: "student" computes it from hidden states through the fused loss, without logits. "engine"
            takes the engine's log-probabilities (vLLM's `prompt_logprobs`).
        batch_size: samples of a forward pass or a generation, at least 1.
        template: prompt template of rows that are not tokenised yet: "alpaca", "chat", or text with {instruction} and
            {input}.
        chat_template_kwargs: variables for the chat template, such as enable_thinking or date_string; see `SRDConfig`.
        parse_special_tokens: whether special tokens in the data's text are parsed; see `SRDConfig`.
        columns: which column of the data is which of a row format's, such as {"instruction": "question", "output":
            "answer"}.
        data_function: makes the rows from a row, or, if its parameter is called `path`, from a file. A function, or
            `FILE.py:FUNCTION`.
        train_on: which answers of a conversation have loss, "last" or "all". With "all", the first one is answered and
            scored.
        rouge_tokenizer: how ROUGE-L cuts text into words, a name that `srd_fast.rouge.RougeL` takes. "auto" chooses by
            the references of all of `dataset`, even if only a shard is scored.
        score_eos: include the end-of-sequence token in the cross-entropy.
        test_seconds: time limit of each test of the signal "execution", in seconds.
        test_memory_mb: memory limit of each such test, in MiB.
        dtype: the dtype in which a student given by name is loaded.
        device: where a student given by name is loaded.
        shard: "k/n" for one of n shares of the samples, chosen by a hash of their ids.
            `srd_fast.reflection.merge_shards` joins the scores of all.
        parts_folder: the folder for finished parts of the generations. An interrupted call continues from them, with
            the same result as without interruption.
        sharing: the processes that make this call together, each for some of the parts. The first gets the scores, bit
            for bit those of a single process; the others get a data set without rows.
        keep_ids: add the column generated_ids, the token ids of each answer without its end token, and for several
            attempts attempt_ids. An answer of `max_new_tokens` ids was cut.
        progress: show a progress bar.
        teacher: the teacher for the signals "teacher_cross_entropy" and "gap": a model with the student's tokenizer; a
            folder or hub id to load one from, in `dtype` on `device`, after the answers are generated; or a cache of
            kind "hidden" that holds the samples (`open_teacher_cache`), so that no teacher runs.

    Returns:
        A data set in the order of the samples, with the columns sample_id, generation, for several attempts the list
        attempts, one column for each signal (rouge_l and pass_rate from 0 to 1, cross-entropies and gap in nats per
        token; NaN if a sample cannot be scored), and reason (why it cannot, or None).

    Raises:
        UserError: an argument is wrong, the rows or the student cannot be used, or the shard has no sample.
    """
    sampling = sampling or Sampling()
    if max_new_tokens is not None:
        sampling = replace(sampling, max_new_tokens=max_new_tokens)
    functions, judging = list(get_difficulties(signals).values()), get_difficulty(judge)
    check_teacher_given(teacher, functions)
    check_attempts(attempts, sampling.temperature, [signal.name for signal in functions], judging)
    ENGINES.check(engine)
    check_engine_options(engine_options)
    if cross_entropy_by not in CROSS_ENTROPY_BY:
        raise UserError(unknown_name("cross_entropy_by", cross_entropy_by, CROSS_ENTROPY_BY))
    tokenisation = Tokenisation(
        tokenizer,
        template,
        chat_template_kwargs=chat_template_kwargs,
        parse_special_tokens=parse_special_tokens,
        encoder_decoder=is_encoder_decoder(load_config(student) if isinstance(student, str) else student),
        train_on=train_on,
    )
    samples = prepare_dataset(dataset, tokenisation, columns=columns, data_function=data_function).dataset
    judged = [judging.name] if attempts > 1 else []
    check_rows([*(signal.name for signal in functions), *judged], samples, "the samples")
    rouge_tokenizer = choose_tokenizer(rouge_tokenizer, samples["references"])  # the same for all shards
    if shard is not None:
        samples = samples.select(samples_of_shard(samples["sample_id"], shard))
        if not len(samples):
            raise UserError(f"shard {shard} has no sample; take fewer shards")

    ids, answers = list(samples["sample_id"]), Answers(samples, tokenizer)
    sampling = stopping_at(sampling, answers.stop_ids)
    prompts, counts = prompt_lengths(samples), token_counts(samples)
    length = max(prompts) + sampling.max_new_tokens
    way_out = "lower max_new_tokens, or shorten them"
    check_positions(counts, prompts, ids, {"student": student}, way_out, sampling.max_new_tokens)
    check_teacher(teacher, student, samples)
    if cross_entropy_by == "engine":
        length = max(length, 1 + max(counts))
    with open_engine(
        engine, student, tokenizer, length=length, sampling=sampling, dtype=dtype, device=device,
        batch_size=batch_size, **(engine_options or {}),
    ) as runner:  # fmt: skip
        if cross_entropy_by == "engine" and not hasattr(runner, "token_log_probs"):
            name = type(runner).__name__
            raise UserError(f"cross_entropy_by='engine' needs an engine with token_log_probs, not {name}")
        model = getattr(runner, "model", None) if isinstance(student, str) else student
        if model is None:  # on the host, because an engine may fill the device's memory
            model = load_model(student, dtype)  # type: ignore[arg-type]
        check_head(model, "student")
        check_token_ids(samples, {"student": embeddings_of(model)})
        made_by: dict[str, Any] = {}
        if parts_folder is not None:
            given = [fingerprint(student), str(dtype)] if isinstance(student, str) else model_digest(student)
            made_by = {"student": given, **engine_settings(runner, sampling)}
            if not hasattr(runner, "settings"):
                made_by["options"] = {"batch_size": batch_size, **(engine_options or {})}
        generated = [
            _generate(runner, samples, replace(sampling, seed=seed), parts_folder, made_by, sharing, progress)
            for seed in range(sampling.seed, sampling.seed + attempts)
        ]
        log_probs = _log_probs(runner, samples, sharing, progress) if cross_entropy_by == "engine" else None
    if isinstance(student, str):
        model = model.to(device)  # type: ignore[arg-type]
    texts = [[answers.text(i, ids_of) for i, ids_of in enumerate(of_attempt)] for of_attempt in generated]
    generations = texts[0]
    if sharing.rank == 0:
        warn_of_answers_alike(generations)
    reflected = Reflected(
        dataset=samples,
        generations=generations,
        student=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        rouge_tokenizer=rouge_tokenizer,
        score_eos=score_eos,
        progress=progress,
        log_probs=log_probs,
        test_seconds=test_seconds,
        test_memory_mb=test_memory_mb,
        sharing=sharing,
        teacher=teacher_source(teacher, dtype, device),
        attempts=texts,
        judge=judging,
    )
    if sharing.rank:
        for signal in functions:
            if signal.shared:
                signal.function(reflected)
        return Dataset.from_dict({"sample_id": []})
    found: dict[str, list[Any]] = {"sample_id": ids, "generation": generations}
    if keep_ids:
        found["generated_ids"] = generated[0]
    if attempts > 1:
        found["attempts"] = list(map(list, zip(*texts)))
        found |= {"attempt_ids": list(map(list, zip(*generated)))} if keep_ids else {}
    reasons: list[str | None] = [
        None if any(r.strip() for r in references) else "empty reference" for references in samples["references"]
    ]
    for signal in functions:
        values = [float(v) for v in signal.function(reflected)]
        if len(values) != len(ids):
            raise UserError(f"difficulty signal {signal.name!r} gave {len(values)} values for {len(ids)} samples")
        for row, value in enumerate(values):
            if reasons[row] is None and not math.isfinite(value):
                reasons[row] = f"{signal.name} is {value}, not a finite number"
        found[signal.name] = values
    for signal in functions:
        found[signal.name] = [v if r is None else math.nan for v, r in zip(found[signal.name], reasons)]
    unscored = sum(r is not None for r in reasons)
    if unscored:
        logger.warning("%d of %d samples cannot be scored; curate lists them with the reason", unscored, len(ids))
    return Dataset.from_dict({**found, "reason": reasons})


def _generate(
    engine: GenerationEngine,
    samples: Dataset,
    sampling: Sampling,
    folder: str | Path | None,
    made_by: Mapping[str, Any],
    sharing: Sharing,
    progress: bool,
) -> list[list[int]]:
    """Generated ids of every sample. Parts in the folder with the same `made_by` are read, not made again.

    If several processes share the work, the first one gets all results.
    """
    ids, lengths = list(samples["sample_id"]), prompt_lengths(samples)
    parts = cut(lengths, getattr(engine, "shard_size", 256), ids)

    def prompts(indices: Sequence[int]) -> list[list[int]]:
        return [row[: lengths[i]] for row, i in zip(samples[list(indices)]["input_ids"], indices)]

    paths: list[Path] = []
    made_by = {**made_by, "seed": sampling.seed}  # which another attempt has another of
    found: dict[int, list[list[int]]] = {}
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(parts):
            names = [ids[i] for i in part]
            paths.append(Path(folder) / part_name(made_by, names, prompts(part)))
            whole = read_part(paths[-1], names)
            if whole is not None:
                found[number] = whole
    if found and sharing.rank == 0:
        logger.warning("%d of %d generations were there already", sum(len(parts[n]) for n in found), len(ids))
    # The first process's list counts: others may read the folder when some have begun to write.
    todo = sharing.share([n for n in range(len(parts)) if n not in found])[sharing.rank :: sharing.world]
    generated: list[list[int]] = [[] for _ in ids]
    there = 0 if sharing.rank else sum(len(parts[n]) for n in found)
    total = there + sum(len(parts[n]) for n in todo)
    with progress_bar(what="generate", total=total, unit="sample", shown=progress and bool(todo)) as bar:
        tokens, started = 0, bar.format_dict["elapsed"] or 0.0
        bar.update(there)
        work = [parts[n] for n in todo]
        for position, answers in compute_parts(
            lambda given: engine.generate(given, sampling), work, prompts, getattr(engine, "parallel", 1)
        ):
            number = todo[position]
            if paths:
                write_part(paths[number], [ids[i] for i in parts[number]], answers)
            found[number] = answers
            tokens += sum(map(len, answers))
            bar.update(len(answers))
            bar.set_postfix_str(f"{tokens / max(1e-9, bar.format_dict['elapsed'] - started):.0f} tokens/s")
    for of_process in sharing.gather(found):
        for number, answers in of_process.items():
            for i, answer in zip(parts[number], answers):
                generated[i] = list(answer)
    return generated


def _log_probs(engine: Any, samples: Dataset, sharing: Sharing, progress: bool) -> list[list[float]]:
    """The engine's log-probability of every token of every sample, except the first token."""
    lengths = [len(row) for row in samples["input_ids"]]
    parts = cut(lengths, getattr(engine, "shard_size", 256), list(samples["sample_id"]))[sharing.rank :: sharing.world]
    found: list[list[float]] = [[] for _ in lengths]
    mine: dict[int, list[float]] = {}
    with progress_bar(what="cross-entropy", total=sum(map(len, parts)), unit="sample", shown=progress) as bar:
        for number, values in compute_parts(
            engine.token_log_probs, parts, lambda some: samples[list(some)]["input_ids"], getattr(engine, "parallel", 1)
        ):
            mine.update(zip(parts[number], values))
            bar.update(len(values))
    for of_process in sharing.gather(mine):
        for i, of_sample in of_process.items():
            found[i] = of_sample
    return found


def warn_of_answers_alike(answers: Sequence[str]) -> None:
    """Warn if nearly all of a student's answers are empty, or the same."""
    if len(answers) < _LEAST_ANSWERS:
        return
    text, count = Counter(answers).most_common(1)[0]
    if count >= _ALIKE * len(answers):
        what = "empty" if not text else f"the same: {text[:60]!r}"
        logger.warning(
            "%d of %d of the student's answers are %s. They rank nothing; check that the student was warmed up, that "
            "its template is the one it was trained with, and max_new_tokens", count, len(answers), what,
        )  # fmt: skip
