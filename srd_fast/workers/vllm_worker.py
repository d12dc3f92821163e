"""The process that runs vLLM: `python -m srd_fast.workers.vllm_worker FD`. Only `vllm.py` starts it.

Requests are lines of JSON on standard input, answers lines of JSON on the file descriptor FD. What vLLM prints goes to
the log. The first request names the model and options. Later ones have prompts or samples, bring other weights, or let
the engine sleep until the next one. When standard input ends, the process ends too, whatever it is doing, so a killed
parent leaves no engine behind.
"""

import importlib.util
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any


class Engine:
    """vLLM's engine, with the state of its weights and whether it sleeps.

    Args:
        llm: a `vllm.LLM`.
        folder: the folder of its weights: a model's, or that of an adapter beside a model that does not change.
        adapter: vLLM's object for the adapter, or None.
    """

    def __init__(self, llm: Any, folder: str, adapter: Any = None) -> None:
        self.llm, self.folder, self.adapter = llm, folder, adapter
        self._level = 0  # of its sleep
        if adapter is not None:
            self._add()  # so that vLLM's objections come now

    def answer(self, request: dict[str, Any]) -> Any:
        """Carry out a request, after waking up if necessary."""
        if "sleep" in request:
            return self._sleep()
        if "weights" in request:
            return self._take(request["weights"])
        self._wake()
        if "states" in request:
            return _states(self.llm, request)
        if "samples" in request:
            return _score(self.llm, self.adapter, request)
        return _generate(self.llm, self.adapter, request)

    def _sleep(self) -> None:
        """Free the device. Weights are loaded from their folder again; those under an adapter stay on the host."""
        if not self._level:
            self._level = 2 if self.adapter is None else 1
            self.llm.sleep(level=self._level)

    def _wake(self) -> None:
        level, self._level = self._level, 0
        if level == 2:
            self.llm.wake_up(tags=["weights"])
            self._load()
            self.llm.wake_up(tags=["kv_cache"])
        elif level:
            self.llm.wake_up()

    def _take(self, folder: str) -> None:
        """Use the weights of another folder from now on. The prefix cache is emptied before each answer anyway."""
        self.folder, comes_with_waking = folder, self._level == 2
        self._wake()
        if self.adapter is not None:
            number = self.adapter.lora_int_id
            self.llm.llm_engine.remove_lora(number)
            self.adapter = _lora_request(number + 1, folder)
            self._add()
        elif not comes_with_waking:
            self._load()

    def _add(self) -> None:
        self.llm.llm_engine.add_lora(self.adapter)
        of_parts = self.llm.collective_rpc("layers_left_out", args=(self.adapter.lora_int_id,))
        left_out = set.intersection(*map(set, of_parts))
        if left_out:
            raise ValueError(f"it leaves {len(left_out)} layers of the adapter out, {min(left_out)} among them")

    def _load(self) -> None:
        try:
            self.llm.collective_rpc("take_weights", args=(self.folder,))
        except Exception as e:  # of this version, or of one of its ways of loading
            raise ValueError(f"it does not take weights while it runs: {type(e).__name__}: {e}") from e


def _lora_request(number: int, folder: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"student-{number}", number, folder)  # vLLM knows adapters by both


def _start(request: dict[str, Any]) -> Engine:
    """Make the engine from the first request."""
    _check_torchvision()
    from vllm import LLM
    from vllm.platforms import current_platform

    options = {"seed": 0, "enable_prefix_caching": True, "skip_tokenizer_init": True, **request["options"]}
    options.setdefault("worker_extension_cls", "srd_fast.workers.vllm_weights.TakesWeights")
    model, adapter = request["model"], None
    described = Path(model, "adapter_config.json")
    if described.is_file():
        lora = json.loads(described.read_text(encoding="utf-8"))
        adapter = _lora_request(1, model)
        model = lora["base_model_name_or_path"]
        options = {"enable_lora": True, "max_lora_rank": _lora_rank(lora["r"]), **options}
    if request.get("logits_processors"):
        options["logits_processors"] = request["logits_processors"]
    if current_platform.is_cpu():
        options.setdefault("enforce_eager", True)
    config = _text_config(model)
    longest = getattr(config, "max_position_embeddings", None) or request["length"]
    if request["length"] > longest:
        raise ValueError(
            f"prompt and generation take {request['length']} tokens and the model has {longest} positions: lower "
            "max_new_tokens or max_prompt_length"
        )
    if request["length"]:
        options.setdefault("max_model_len", request["length"])
    if current_platform.is_cpu() and "kv_cache_memory_bytes" not in options:
        options["kv_cache_memory_bytes"] = _cache_bytes(config, options, request["memory"])
    return Engine(LLM(model, **options), request["model"], adapter)


def _check_torchvision() -> None:
    if importlib.util.find_spec("torchvision") is not None:
        try:
            import torchvision  # noqa: F401
        except Exception as e:
            raise RuntimeError(
                f"torchvision does not fit the installed torch ({e}); nothing here needs it: "
                "pip uninstall -y torchvision torchaudio torchcodec"
            ) from e


def _text_config(model: str) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    return config.get_text_config()


def _lora_rank(rank: int) -> int:
    """The smallest rank that vLLM supports and that is large enough."""
    return next(r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= rank)


def _cache_bytes(config: Any, options: dict[str, Any], most: int) -> int:
    """Bytes for the key-value cache on a CPU: what a full batch of the longest samples needs, but at most `most`."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_token = 2 * config.num_hidden_layers * heads * width * (4 if options["dtype"] == "float32" else 2)
    length = options.get("max_model_len") or config.max_position_embeddings
    one = of_token * (length + 256)
    return max(one, min(one * options.get("max_num_seqs", 256), most))


def _generate(llm: Any, adapter: Any, request: dict[str, Any]) -> list[list[int]]:
    from vllm import SamplingParams

    s, ends = request["sampling"], request["ends"]
    extra = {"no_repeat_ngram_size": s["no_repeat_ngram_size"]} if s["no_repeat_ngram_size"] else None
    common = {
        "max_tokens": s["max_new_tokens"],
        "temperature": s["temperature"],
        "repetition_penalty": s["repetition_penalty"],
        "stop_token_ids": ends,
        "detokenize": False,
        "extra_args": extra,
    }
    if s["temperature"] > 0:
        common |= {"top_p": s["top_p"], "top_k": s["top_k"], "min_p": s["min_p"]}
    params = [SamplingParams(**common, seed=seed) for seed in request["seeds"] or [None] * len(request["prompts"])]
    return [list(o.outputs[0].token_ids) for o in _run(llm, adapter, request["prompts"], params)]


def _score(llm: Any, adapter: Any, request: dict[str, Any]) -> list[list[float]]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = _run(llm, adapter, request["samples"], params)
    return [
        [of_token[token].logprob for token, of_token in zip(sample[1:], o.prompt_logprobs[1:])]
        for sample, o in zip(request["samples"], outputs)
    ]


def _states(llm: Any, request: dict[str, Any]) -> None:
    """Write the states of some rows of each sample, after the final norm, to a file."""
    import torch
    from safetensors.torch import save_file
    from vllm import PoolingParams

    params = PoolingParams(task="token_embed", use_activation=False)
    given = [{"prompt_token_ids": p} for p in request["states"]]
    outputs = llm.encode(given, params, pooling_task="token_embed", use_tqdm=False)
    rows = [o.outputs.data[torch.tensor(of_sample)] for o, of_sample in zip(outputs, request["rows"])]
    save_file({"hidden": torch.cat(rows).cpu()}, request["file"])


def _run(llm: Any, adapter: Any, prompts: list[list[int]], params: Any) -> Any:
    """Generate with an empty prefix cache, so that repeated work gives the same result."""
    llm.reset_prefix_cache()
    given = [{"prompt_token_ids": p} for p in prompts]
    return llm.generate(given, params, use_tqdm=False, lora_request=adapter)


def _read(requests: "queue.Queue[dict[str, Any]]") -> None:
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Answer requests until standard input ends."""
    if os.environ.get("SRD_FAST_CORES"):
        os.sched_setaffinity(0, [int(x) for x in os.environ["SRD_FAST_CORES"].split(",")])
    out = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    engine: Engine | None = None
    while True:
        request = requests.get()
        answer: dict[str, Any] = {"result": None}
        try:
            if engine is None:
                engine = _start(request)
            else:
                answer = {"result": engine.answer(request)}
        except ValueError as e:
            answer = {"error": str(e)}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
