"""How good a model is on held-out rows: ROUGE-L of its answers, cross-entropy, divergence to the teacher."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import (
    IGNORE_INDEX,
    DataFunction,
    DistillationCollator,
    Tokenisation,
    batches_by_length,
    check_token_ids,
    prepare_dataset,
    read_columns,
)
from ..errors import UserError
from ..losses import token_cross_entropy
from ..models import (
    check_head,
    check_positions,
    check_same_kind,
    decoder_start,
    embeddings_of,
    entry_device,
    is_dispatched,
    is_encoder_decoder,
    is_sharded,
    load_model,
)
from ..reflection import Sampling, open_engine, stopping_at
from ..sharing import ALONE, Sharing
from ..teacher import HiddenRows, LiveTeacher, RowsOfSamples, TeacherCache, TeacherRows, TeacherSource, labels_with_loss
from ..teacher.live import moved
from .answer_metrics import ROUGE_L, AnswerMetrics, AnswerScores, get_metrics
from .answering import Prompts
from .measure import TokenDivergences, measure_tokens


def evaluate(
    model: PreTrainedModel | str,
    dataset: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher: PreTrainedModel | TeacherSource | None = None,
    states: TeacherCache | None = None,
    engine: str = "transformers",
    sampling: Sampling | None = None,
    seeds: Sequence[int] = (),
    metrics: Sequence[str] = (),
    batch_size: int = 32,
    template: str = "alpaca",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    parse_special_tokens: bool | None = None,
    columns: Mapping[str, str] | None = None,
    data_function: str | DataFunction | None = None,
    train_on: str = "last",
    rouge_tokenizer: str = "auto",
    num_examples: int = 5,
    per_row: bool = False,
    sharing: Sharing = ALONE,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a model on rows of any format of `srd_fast.data`, or on tokenised samples.

    Args:
        model: a language model, or a folder or hub id to load one from, in float32 on the CPU.
        dataset: the rows.
        tokenizer: the model's.
        teacher: gives `kl`, the mean of KL(teacher, model) at T = 1 over the tokens of the responses. A model, a
            `TeacherCache` that holds the samples, or another object with the methods of `TeacherSource`.
        states: a cache of kind "hidden" that was filled by `model` itself, so that the samples need no forward pass.
            Not together with `teacher`.
        engine: what generates the answers, a name from `engine_names()`, or "auto": vllm where it is installed and
            starts, else transformers.
        sampling: how answers are generated. Default: greedy, at most 128 new tokens.
        seeds: generate once for each seed, at `sampling.temperature`, which must be above 0. ROUGE-L and the other
            metrics of answers are then means over the seeds.
        metrics: further metrics of the answers: "bleu" and "chrf", of all answers together, by sacrebleu;
            "exact_match", "numeric_match" (the final number, as in GSM8K) and "execution", means over the rows; or
            `FILE.py:NAME` or `package.module:NAME` for a function of your own, as `reflect` takes it as a signal.
        batch_size: samples of a forward pass, at least 1.
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
            the references of all of `dataset`.
        num_examples: how many answers `examples` has.
        per_row: return each row's answer and values too, as `rows`.
        sharing: the processes that make this call together, each for some of the batches. The first gets the results,
            bit for bit those of a single process; the others get an empty dictionary.
        progress: show a progress bar.

    Returns:
        A dict: rouge_l, 0 to 1, the best over a sample's references, mean over samples; rouge_l_std, its standard
        deviation over seeds, or None with fewer than two; each of `metrics`, mean over seeds;
        cross_entropy in nats per token; kl in nats per token, or None; num_samples; num_tokens; and examples, each with
        sample_id, prompt, reference and generation. With `per_row` also rows, a dict of columns with one value a row:
        sample_id; generation, of the last seed; rouge_l, mean over seeds; cross_entropy and kl, sums over the row's
        tokens in nats, kl None without a teacher; num_tokens; and each of `metrics` that scores single answers, mean
        over seeds, None where it says nothing.

    Raises:
        UserError: `states` and `teacher` are both given, `seeds` are given at temperature 0, a metric is unknown or its
            package missing, or the rows, the model or the engine cannot be used.
    """
    sampling = sampling or Sampling()
    if states is not None and teacher is not None:
        raise UserError("states are those of a model that is evaluated without a teacher; leave one of the two out")
    if seeds and sampling.temperature <= 0:
        raise UserError("evaluation seeds need a sampling temperature above 0 (the paper's is 1.0)")
    get_metrics((ROUGE_L, *metrics))
    model = load_model(model, quantised=True) if isinstance(model, str) else model
    own = LiveTeacher(model, freeze=False) if is_dispatched(model) or is_sharded(model) else None
    if own is None:
        check_head(model, "model")
    if isinstance(teacher, (torch.nn.Module, TeacherCache)):
        check_same_kind(model, teacher)
    watched = [m for m in (model, teacher) if isinstance(m, torch.nn.Module)]
    modes = [m.training for m in watched]
    if own is not None and teacher is not None:
        raise UserError(
            f"the model {type(model).__name__} is spread out (device_map, shards), and so measured alone: leave out "
            "the teacher"
        )
    source: Any = teacher
    if isinstance(teacher, torch.nn.Module):
        spread = is_dispatched(teacher) or is_sharded(teacher)
        source = LiveTeacher(teacher, entry_device(model) if spread else None, freeze=False)
    if isinstance(source, TeacherCache):
        source = source.for_student(model)
    tokenisation = Tokenisation(
        tokenizer,
        template,
        chat_template_kwargs=chat_template_kwargs,
        parse_special_tokens=parse_special_tokens,
        encoder_decoder=is_encoder_decoder(model),
        train_on=train_on,
    )
    samples = prepare_dataset(dataset, tokenisation, columns=columns, data_function=data_function).dataset
    check_token_ids(samples, {n: embeddings_of(m) for n, m in (("model", model), ("teacher", teacher)) if m in watched})
    scored = AnswerMetrics((ROUGE_L, *metrics), samples, tokenizer, rouge_tokenizer, batch_size)
    prompts = Prompts(samples, tokenizer, batch_size)
    sampling = stopping_at(sampling, prompts.reader.stop_ids)
    input_ids = list(samples["input_ids"])
    lengths, ids, way_out = [*map(len, input_ids)], samples["sample_id"], "lower max_new_tokens, or shorten them"
    of_prompts = [*map(len, prompts.ids)]
    check_positions(lengths, of_prompts, ids, {"model": model}, way_out, sampling.max_new_tokens)
    check_positions(lengths, of_prompts, ids, {"teacher": teacher}, way_out)
    generations: list[str] = []
    of_seeds: list[AnswerScores] = []
    with open_engine(
        engine, model, tokenizer, length=prompts.longest(sampling), sampling=sampling, batch_size=batch_size
    ) as runner:
        for seed in seeds or (sampling.seed,):
            generations = prompts.answered(runner, replace(sampling, seed=seed), sharing, progress)
            if not sharing.rank:
                of_seeds.append(scored(generations, model))

    collate = DistillationCollator(decoder_start=decoder_start(model))
    read = {name: list(samples[name]) for name in read_columns(samples.column_names)}
    of_batches: dict[int, Tensor] = {}
    of_rows: dict[int, list[float]] = {}
    model.eval()
    device = entry_device(model) if own is None else own.device
    for number, indices in enumerate(batches_by_length([len(x) for x in input_ids], batch_size)):
        if number % sharing.world != sharing.rank:
            continue
        some = [{name: column[i] for name, column in read.items()} for i in indices]
        if states is not None:
            measured = _measure_states(states, some, device)
        else:
            batch: dict[str, Any] = {k: v.to(device) for k, v in collate(some).items()}
            if isinstance(source, RowsOfSamples):
                batch["teacher"] = moved(source.collate(some), device)
            if own is None:
                measured = measure_tokens(model, source, batch)
            else:
                measured = _measure_rows(own.rows(batch, 1.0), labels_with_loss(batch))
        of_batches[number] = torch.stack([x.cpu().double() for x in measured.summed()])
        of_rows.update(zip(indices, _by_sample(measured, some)))
    for module, mode in zip(watched, modes):
        module.train(mode)
    found = {number: x for of_process in sharing.gather(of_batches) for number, x in of_process.items()}
    measured_rows = {i: x for of_process in sharing.gather(of_rows) for i, x in of_process.items()}
    if sharing.rank:
        return {}
    totals = torch.zeros(3, dtype=torch.float64)
    for number in sorted(found):  # in this order, so that the sum is that of one process to the bit
        totals += found[number]
    kl, cross_entropy, tokens = totals.tolist()
    means = {name: [x.means[name] for x in of_seeds] for name in scored.metrics}
    examples = [
        {"sample_id": i, "prompt": p, "reference": (r or [""])[0], "generation": g}
        for i, p, r, g in zip(samples["sample_id"], samples["prompt"], scored.references, generations)
    ]
    sums = list(zip(*(measured_rows[i] for i in range(len(samples)))))
    rows = {
        "sample_id": list(samples["sample_id"]),
        "generation": generations,
        "cross_entropy": list(sums[1]),
        "kl": None if source is None else list(sums[0]),
        "num_tokens": [int(x) for x in sums[2]],
        **{name: _means_of_rows(of_seed.rows[name] for of_seed in of_seeds) for name in of_seeds[0].rows},
    }
    return {
        "rouge_l": statistics.fmean(means[ROUGE_L]),
        "rouge_l_std": statistics.stdev(means[ROUGE_L]) if len(of_seeds) > 1 else None,
        **{name: statistics.fmean(values) for name, values in means.items() if name != ROUGE_L},
        "cross_entropy": cross_entropy / tokens,
        "kl": kl / tokens if source is not None else None,
        "num_samples": len(samples),
        "num_tokens": int(tokens),
        "examples": examples[:num_examples],
        **({"rows": rows} if per_row else {}),
    }


def _means_of_rows(of_seeds: Iterable[Sequence[float]]) -> list[float | None]:
    """Each row's mean over seeds; None if it has no values."""
    means = [statistics.fmean(row) for row in zip(*of_seeds)]
    return [x if math.isfinite(x) else None for x in means]


def _by_sample(measured: TokenDivergences, samples: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """KL, cross-entropy and tokens of each sample of a batch, in float64."""
    counts = [sum(y != IGNORE_INDEX for y in s["labels"][1:]) for s in samples]
    columns = [x.double().cpu().split(counts) for x in (measured.kl_N, measured.cross_entropy_N)]
    return [[kl.sum().item(), entropy.sum().item(), n] for kl, entropy, n in zip(*columns, counts)]


@torch.no_grad()
def _measure_states(
    cache: TeacherCache, samples: Sequence[Mapping[str, Any]], device: torch.device
) -> TokenDivergences:
    """Run `measure_tokens` without a teacher, from the hidden states of a cache that the model filled."""
    rows = cache.rows({"teacher": moved(cache.collate(samples), device)}, 1.0)
    labels_N = torch.tensor([y for s in samples for y in s["labels"][1:] if y != IGNORE_INDEX], device=device)
    return _measure_rows(rows, labels_N, cache.meta["kind"])


@torch.no_grad()
def _measure_rows(rows: TeacherRows, labels_N: Tensor, kind: str = "hidden") -> TokenDivergences:
    if not isinstance(rows, HiddenRows):
        raise UserError(f"states must be a cache of kind 'hidden', got {kind!r}")
    losses_N = token_cross_entropy(rows.hidden_ND, rows.head, labels_N)
    return TokenDivergences(torch.zeros_like(losses_N), losses_N)
