"""Compiled decoder layers: what they give, how many graphs they take, and what stays as it was."""

import copy
import inspect
import logging
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import SRDConfig, SRDTrainer
from srd_fast.data import DistillationCollator
from srd_fast.models import compilation, compile_layers, enable_flattening, hidden_states, uncompile_layers, varlen

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(name: str = "llama", flattened: bool = True, layers: int = 3, **config: Any) -> PreTrainedModel:
    """A random model of three layers in training mode; windows of 4 tokens in mistral's."""
    if name == "mistral":
        model = tiny.tiny_model("llama", layers=layers).config.to_dict()
        made = AutoModelForCausalLM.from_config(_mistral(model))
        made.load_state_dict(tiny.tiny_model("llama", layers=layers).state_dict())
        model = made
    else:
        model = tiny.tiny_model(name, layers=layers, **config)
    if flattened:
        assert enable_flattening(model) is None
    return model.train()


def _mistral(sizes: dict[str, Any]) -> Any:
    from transformers import MistralConfig

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("intermediate_size", "max_position_embeddings", "tie_word_embeddings")
    return MistralConfig(**{n: sizes[n] for n in names}, head_dim=8, sliding_window=4, pad_token_id=0)


def batch(seed: int, flattened: bool, count: int = 4) -> dict[str, Tensor]:
    return DistillationCollator(0, flattened)(tiny.tiny_samples(count, seed=seed))


def step(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states and gradients of their squares."""
    model.zero_grad(set_to_none=True)
    hidden = hidden_states(model, inputs)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    hidden[mask].square().mean().backward()
    return hidden[mask].detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(
    model: nn.Module, reference: nn.Module, inputs: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    (found, gradients), (expected, wanted) = step(model, inputs), step(reference, inputs)
    assert_same(found, expected, tolerance, "hidden states")
    assert gradients.keys() == wanted.keys()
    largest = max(g.abs().max() for g in wanted.values())
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).abs().max() <= tolerance * max(gradient.abs().max(), 0.01 * largest), name


def compiled_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(type(m), "compiled_from")]


# Graphs


@pytest.mark.parametrize("flattened", [True, False])
@pytest.mark.parametrize("name", ["llama", *(pytest.param(x, marks=pytest.mark.long) for x in ("gpt2", "mistral"))])
def test_one_graph_serves_all_layers_and_lengths(name: str, flattened: bool) -> None:
    model = make(name, flattened)
    reference = copy.deepcopy(model)
    counter = CompileCounter()
    assert compile_layers(model, flattened=flattened, backend=counter) is None
    assert len(compiled_layers(model)) == 3
    # Training and evaluation, and of padded batches those with a mask and those that need none, unless for windows.
    graphs = 2 if flattened or name == "mistral" else 4
    assert counter.frame_count == graphs
    shapes = set()
    for seed in range(10):
        inputs = batch(seed, flattened, count=3 + seed % 4)
        shapes.add(inputs["input_ids"].shape)
        assert_same_step(model.train(), reference.train(), inputs)
        with torch.no_grad():
            assert_same(hidden_states(model.eval(), inputs), hidden_states(reference.eval(), inputs), 1e-5)
    assert len(shapes) > 5
    assert counter.frame_count == graphs


@pytest.mark.slow
def test_layers_of_two_kinds_are_two_graphs() -> None:
    """Sliding and full attention: the first has a window."""
    model = make("qwen2", layers=4, use_sliding_window=True, sliding_window=4)
    model.config.layer_types = ["sliding_attention", "full_attention"] * 2
    for kind, layer in zip(model.config.layer_types, model.model.layers):
        layer.attention_type = layer.self_attn.layer_type = kind
        layer.self_attn.sliding_window = 4 if kind == "sliding_attention" else None
    model.model.has_sliding_layers = True
    reference = copy.deepcopy(model)
    counter = CompileCounter()
    assert compile_layers(model, flattened=True, backend=counter) is None
    for seed in range(5):
        assert_same_step(model, reference, batch(seed, True))
    assert counter.frame_count == 4


@pytest.mark.slow
def test_student_and_teacher_do_not_use_up_each_others_graphs() -> None:
    """Autocast and training, evaluation without gradients, a teacher in inference mode: all of one class."""
    student, teacher = make(), make(layers=2, width=24).eval().requires_grad_(False)
    counter = CompileCounter()

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    assert compile_layers(student, autocast, flattened=True, backend=counter) is None
    assert counter.frame_count == 2
    assert compile_layers(teacher, flattened=True, backend=counter) is None
    assert counter.frame_count == 3
    for seed in range(4):
        inputs = batch(seed, True)
        with torch.inference_mode():
            hidden_states(teacher, inputs)
        with autocast():
            hidden_states(student.train(), inputs).square().mean().backward()
        with torch.no_grad(), autocast():
            hidden_states(student.eval(), inputs)
    assert counter.frame_count == 3


def test_with_a_kernel_a_layer_is_one_graph_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel for GPUs, with a plain one in its place: no break, no guard on lengths."""
    if varlen._KERNEL is None:
        pytest.skip("this torch's flash attention has no windows")
    calls: list[tuple[list[int], int]] = []
    graphs: list[torch.fx.GraphModule] = []

    def attend(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, longest: int, *_: Any, **o: Any
    ) -> Any:
        lengths = starts.diff().tolist()
        calls.append((lengths, longest))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = varlen._attend_by_length(q, k, v, lengths, None, o["scale"], 0.0)[0]
        states = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
        return out, torch.empty(q.shape[1], len(out)), *states, torch.empty(0)

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = make().eval().requires_grad_(False)
    reference = copy.deepcopy(model)
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", attend, "CPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(varlen, "_has_kernel", lambda q, v, dropout: varlen._is_ampere_or_newer(q.device))
    try:
        assert compile_layers(model, flattened=True, backend=keep) is None
        calls.clear()
        batches = [batch(seed, True) for seed in range(6)]
        with torch.inference_mode():
            for inputs in batches:
                lengths = inputs["cu_seq_lens"].diff().tolist()
                inputs["sample_lengths"] = lengths  # type: ignore[assignment]
                assert_same(hidden_states(model, inputs), hidden_states(reference, inputs), 1e-5)
                assert calls[-1] == (lengths, max(lengths))
    finally:
        library._destroy()
    assert len(graphs) == 1
    assert sum("flash_attention" in str(node.target) for node in graphs[0].graph.nodes) == 1


# Ways to run


@pytest.mark.long
@pytest.mark.parametrize("flattened", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_stays_outside(flattened: bool, reentrant: bool) -> None:
    model = make(flattened=flattened)
    reference = copy.deepcopy(model)
    counter = CompileCounter()
    assert compile_layers(model, flattened=flattened, backend=counter) is None
    before = counter.frame_count
    for each in (model, reference):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        each.enable_input_require_grads()
    for seed in range(4):
        assert_same_step(model, reference, batch(seed, flattened))
    assert counter.frame_count <= before + 2 * (1 if flattened else 2)


@pytest.mark.parametrize("flattened", [True, pytest.param(False, marks=pytest.mark.long)])
def test_lora(flattened: bool) -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make(flattened=flattened), options)
    reference, names = copy.deepcopy(model), set(model.state_dict())
    counter = CompileCounter()
    assert compile_layers(model, flattened=flattened, backend=counter) is None
    assert set(model.state_dict()) == names
    graphs = counter.frame_count
    for seed in range(6):
        assert_same_step(model, reference, batch(seed, flattened))
    assert counter.frame_count == graphs
    merged, expected = model.merge_and_unload(), reference.merge_and_unload()
    with torch.no_grad():
        inputs = batch(0, flattened)
        assert_same(hidden_states(merged, inputs), hidden_states(expected, inputs), 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("flattened", [True, False])
def test_dropout_is_drawn_anew_in_each_pass(flattened: bool) -> None:
    model = make("gpt2", flattened, attn_pdrop=0.3, resid_pdrop=0.1)
    assert compile_layers(model, flattened=flattened, backend="eager") is None
    inputs = batch(0, flattened)
    with torch.no_grad():
        one, two = hidden_states(model, inputs), hidden_states(model, inputs)
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_operation_has_the_gradients_of_its_parts(window: int, dropout: float) -> None:
    """Dropout: backward draws what forward drew, and leaves the random numbers where they were."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, 11, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    starts = torch.tensor([0, 4, 8, 11], dtype=torch.int32)
    torch.manual_seed(1)
    expected = varlen._attend_by_length(*inputs, [4, 4, 3], window or None, 0.5, dropout)
    torch.manual_seed(1)
    apart = torch.empty(0, dtype=torch.int32)
    found, _ = varlen._attend_in_samples(*inputs, starts, window, 0.5, dropout, apart)
    assert torch.equal(found, expected)
    weights = torch.cos(torch.arange(found.numel())).view_as(found)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs)):
        assert_same(a, b, 1e-12)
    torch.library.opcheck(varlen._attend_in_samples, (*inputs, starts, window, 0.5, 0.0, apart))


def test_generation_runs_uncompiled() -> None:
    """A cache is numbered by layer: compiled, each layer would take a graph of its own."""
    model = make().eval()
    reference = copy.deepcopy(model)
    counter = CompileCounter()
    assert compile_layers(model, flattened=True, backend=counter) is None
    graphs, prompt = counter.frame_count, torch.arange(5, 11).view(2, 3)
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **options), reference.generate(prompt, **options))
    assert counter.frame_count == graphs


def test_what_watches_operations_sees_them() -> None:
    """A dispatch mode of the user's, which a compiler would take the layers from."""
    model = make()
    expected, _ = step(model, batch(0, True))
    assert compile_layers(model, flattened=True, backend="eager") is None
    with Watching() as watch:
        found, _ = step(model, batch(0, True))
    assert torch.equal(found, expected)
    assert watch.names.count("silu") == 3


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# What stays as it was


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = make("gpt2", attn_pdrop=0.1)
    model.transformer.h[0].eval()
    reference, modes = copy.deepcopy(model), [m.training for m in model.modules()]
    names, state = [n for n, _ in model.named_modules()], torch.get_rng_state()
    assert compile_layers(model, flattened=True, backend="eager") is None
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [n for n, _ in model.named_modules()] == names
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {n: x.shape for n, x in model.state_dict().items()} == {
        n: x.shape for n, x in reference.state_dict().items()
    }
    assert {type(m).__name__ for m in model.modules()} == {type(m).__name__ for m in reference.modules()}
    model.save_pretrained(tmp_path / "compiled")
    reference.save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "compiled" / file.name).read_bytes(), file.name


def test_copies_and_pickles_are_uncompiled() -> None:
    model = make()
    assert compile_layers(model, flattened=True, backend="eager") is None
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert len(compiled_layers(model)) == 3
    for other in copies:
        assert not compiled_layers(other)
        assert_same_step(model, other, batch(0, True))


@pytest.mark.long
def test_it_can_be_taken_back_and_done_again() -> None:
    model = make()
    for _ in range(2):
        assert compile_layers(model, flattened=True, backend="eager") is None
        assert len(compiled_layers(model)) == 3
    uncompile_layers(model)
    assert not compiled_layers(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in copy.deepcopy(model).modules()}


# What does not compile


def broken(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    raise RuntimeError("no compiler here\nat all")


def slightly_wrong(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    return lambda *args: tuple(x * 1.01 if torch.is_floating_point(x) else x for x in graph(*args))


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.01


def wrong_backward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    return lambda *args: tuple(WrongBackward.apply(x) if torch.is_floating_point(x) else x for x in graph(*args))


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        (broken, "LlamaDecoderLayer: .*no compiler here"),
        (slightly_wrong, "LlamaDecoderLayer: its hidden states come out different by"),
        (wrong_backward, "LlamaDecoderLayer: its gradients come out different by"),
    ],
)
def test_layers_that_do_not_compile_stay_as_they_are(backend: Callable[..., Any], said: str) -> None:
    model = make()
    reference = copy.deepcopy(model)
    reason = compile_layers(model, flattened=True, backend=backend)
    assert reason is not None
    assert "\n" not in reason
    assert re.search(said, reason), reason
    assert not compiled_layers(model)
    assert_same_step(model, reference, batch(0, True), 1e-12)


def test_a_class_that_does_not_compile_leaves_the_others_compiled() -> None:
    model = make()

    class Odd(type(model.model.layers[1])):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            torch._dynamo.graph_break()
            return super().forward(hidden_states, *args, **kwargs)

    model.model.layers[1].__class__ = Odd
    reason = compile_layers(model, flattened=True, backend="eager")
    assert reason is not None
    assert reason.startswith("Odd: ")
    assert len(compiled_layers(model)) == 2
    assert type(model.model.layers[1]) is Odd


def test_a_model_without_known_layers_is_said() -> None:
    model = make(flattened=False)
    for layer in model.model.layers:
        plain = type("Plain", (nn.Module,), {"forward": inspect.unwrap(type(layer).forward)})
        layer.__class__ = plain
    assert "no layers that transformers could checkpoint" in str(compile_layers(model, flattened=False))


@pytest.mark.long
def test_a_failure_in_a_later_way_to_run_is_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a run that ends: a graph more than allowed, for instance."""
    model = make()
    reference = copy.deepcopy(model)
    monkeypatch.setattr(compilation, "_MOST_GRAPHS", 2)
    with torch._dynamo.config.patch(recompile_limit=2):
        assert compile_layers(model, flattened=True, backend="eager") is None
        with caplog.at_level(logging.WARNING, logger="srd_fast"), torch.autocast("cpu", torch.bfloat16):
            for seed in range(3):
                assert_same_step(model, reference, batch(seed, True), 1e-5)
    assert [r.getMessage().split(":")[0] for r in caplog.records if r.name.startswith("srd_fast")] == [
        "LlamaDecoderLayer runs uncompiled from here on"
    ]


# Training


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


def trainer(tokenizer: PreTrainedTokenizerFast, folder: Path, backend: str | None, **fields: Any) -> SRDTrainer:
    """Ten steps of four samples of uneven lengths, evaluated in between; compiled unless `backend` is None."""
    usual: dict[str, Any] = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    usual |= {"per_device_train_batch_size": 4, "epochs_per_stage": 1, "logging_steps": 1, "learning_rate": 1e-3}
    usual |= {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no"}
    if backend is not None:
        usual |= {"torch_compile": True, "torch_compile_backend": backend}
    adapters = fields.pop("adapters", None)
    return SRDTrainer(
        model=tiny.tiny_model("llama", layers=3),
        teacher_model=tiny.tiny_model("llama_untied", seed=1, width=24),
        args=SRDConfig(**{**usual, **fields}),
        train_dataset=tiny.tiny_samples(40),
        eval_dataset=tiny.tiny_samples(6, seed=9),
        processing_class=tokenizer,
        peft_config=adapters,
    )


def curve(run: SRDTrainer) -> list[float]:
    """Training losses, norms of gradients and losses of evaluation, in the order of the log."""
    names = ("loss", "grad_norm", "eval_loss")
    return [entry[n] for entry in run.state.log_history for n in names if n in entry]


def assert_same_curve(found: SRDTrainer, expected: SRDTrainer, tolerance: float = 1e-4) -> None:
    assert len(curve(expected)) == 23
    assert curve(found) == pytest.approx(curve(expected), rel=tolerance)


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, id="-".join(fields) or "plain", marks=() if by_default else pytest.mark.long)
        for by_default, fields in (
            (False, {}),
            (False, {"padding_free": False}),
            (False, {"gradient_checkpointing": True}),
            (False, {"gradient_checkpointing": True, "padding_free": False}),
            (False, {"adapters": LORA}),
            (True, {"adapters": LORA, "gradient_checkpointing": True}),
            (False, {"bf16": True}),
        )
    ],
)
def test_training_follows_the_uncompiled_curve(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = []
    for backend in (None, "eager"):
        options = dict(fields)
        if "adapters" in options:
            options["adapters"] = pytest.importorskip("peft").LoraConfig(**options["adapters"])
        torch.manual_seed(0)
        runs.append(trainer(tokenizer, tmp_path, backend, **options))
        assert len(compiled_layers(runs[-1].model)) == (3 if backend else 0)
        assert len(compiled_layers(runs[-1].teacher.model)) == (2 if backend else 0)
        with caplog.at_level(logging.WARNING, logger="srd_fast"):
            runs[-1].train()
        # Nothing else has been compiled, as accelerate would.
        assert runs[-1].model_wrapped is runs[-1].model
    assert not [r for r in caplog.records if "compiled" in r.getMessage()]
    assert_same_curve(runs[1], runs[0], 0.02 if "bf16" in fields else 1e-4)


@pytest.mark.slow
def test_a_compiled_run_resumes(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """From a checkpoint of its own, and of an uncompiled run: the files are the same."""
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer(tokenizer, tmp_path / "whole", "eager", **saving)
    whole.train()
    for backend in ("eager", None):
        again = trainer(tokenizer, tmp_path / "again", backend)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
        assert_same_curve(again, whole)
        for (name, a), b in zip(again.model.named_parameters(), whole.model.parameters()):
            assert_same(a, b, 1e-4, name)


@pytest.mark.slow
def test_what_does_not_compile_is_one_warning(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = torch.compile

    def failing(function: Any, **options: Any) -> Any:
        return compiled(function, **{**options, "backend": broken})

    monkeypatch.setattr(torch, "compile", failing)
    with caplog.at_level(logging.WARNING, logger="srd_fast"):
        run = trainer(tokenizer, tmp_path, "eager", max_steps=2)
        run.teacher.compile(flattened=True, backend="eager")
        run.train()
    said = [r.getMessage() for r in caplog.records if "compiled" in r.getMessage()]
    assert said == [
        f"layers of the {name} are not compiled: LlamaDecoderLayer: no compiler here" for name in ("student", "teacher")
    ]
    assert not compiled_layers(run.model)
    assert len(curve(run)) == 5


class Count(TorchDispatchMode):
    """Counts operations; those of compiled code that call PyTorch, too."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_training_with_the_real_compiler(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    runs = [trainer(tokenizer, tmp_path, backend) for backend in (None, "inductor")]
    counts = []
    for run in runs:
        run.train()
        inputs = batch(0, True)
        with Count() as count:
            hidden_states(run.model, inputs).square().mean().backward()
        counts.append(count.count)
    assert len(compiled_layers(runs[1].model)) == 3
    assert_same_curve(runs[1], runs[0])
    assert counts[1] < 0.5 * counts[0], counts


@pytest.mark.gpu
@pytest.mark.parametrize("flattened", [True, False])
def test_on_a_gpu(flattened: bool) -> None:
    """bfloat16 autocast, in which torch's kernel attends: compiled by inductor, no layer left out."""
    model = make(flattened=False).cuda()
    if flattened:
        assert enable_flattening(model) is None
    reference = copy.deepcopy(model)

    def autocast() -> Any:
        return torch.autocast("cuda", torch.bfloat16)

    assert compile_layers(model, autocast, flattened=flattened) is None
    for seed in range(4):
        inputs = {n: x.cuda() for n, x in batch(seed, flattened).items()}
        with autocast():
            assert_same(hidden_states(model, inputs), hidden_states(reference, inputs), 0.05)
