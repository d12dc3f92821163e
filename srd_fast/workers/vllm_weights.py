"""Additional methods of vLLM's workers, which run in each process that has a part of the model."""

from typing import Any


class TakesWeights:
    """Added to the class of vLLM's workers (`worker_extension_cls`)."""

    def take_weights(self: Any, folder: str) -> None:
        """Replace the weights in place by those of a folder, of the same shapes.

        On a CPU, a head uses a packed copy of its weight. Reloading packs it again, except for a head that is tied to
        the embedding, which would continue with the old weights.

        Args:
            folder: a folder with weights in safetensors.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
        from vllm.platforms import current_platform

        self.reload_weights(weights_path=folder)
        if current_platform.is_cpu():
            for layer in self.model_runner.get_model().modules():
                method = getattr(layer, "quant_method", None)
                if isinstance(method, UnquantizedEmbeddingMethod):
                    method.process_weights_after_loading(layer)

    def layers_left_out(self: Any, adapter: int) -> list[str]:
        """Layers of an adapter that this part of the model does not have. vLLM silently ignores them.

        Args:
            adapter: its number, once it is loaded.

        Returns:
            Their names.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        return sorted(set(manager.get_adapter(adapter).loras) - set(manager.modules))
