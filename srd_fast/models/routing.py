"""The loss that balances a mixture's experts, if a model's own configuration asks for it."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from .heads import unwrap

_NAME = "load_balancing_loss_func"
_WAY_OUT = "set output_router_logits=False in its config to train without the balancing loss"


class RouterLoss:
    """The balancing loss of a mixture of experts (Switch Transformers, arXiv 2101.03961), as the model computes it.

    It calls the function in the model's module of transformers, with the numbers of the model's config.

    Args:
        model: a causal language model with routers.

    Raises:
        UserError: the config asks for the loss, but the model's function for it is missing or not known here.
    """

    def __init__(self, model: nn.Module) -> None:
        inner: Any = unwrap(model)
        self.name = type(inner).__name__
        config = inner.config.get_text_config()
        modules = (sys.modules.get(c.__module__) for c in type(inner).__mro__)
        function = next((f for f in (getattr(m, _NAME, None) for m in modules) if f is not None), None)
        known = function is not None and [*inspect.signature(function).parameters][-1:] == ["attention_mask"]
        self.experts = getattr(inner, "num_experts", None) or getattr(config, "num_experts", None)
        self.per_token = getattr(inner, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
        self.coefficient = float(coefficient_of(model))
        if not known or self.experts is None or self.per_token is None:
            raise UserError(
                f"student {self.name}: its config has output_router_logits=True, and its balancing loss is not known "
                f"here; {_WAY_OUT}"
            )
        self.function: Callable[..., Tensor] = function  # type: ignore[assignment]

    def __call__(self, router_logits: Any, batch: Mapping[str, Any]) -> Tensor:
        """Compute the loss of a batch, with its coefficient.

        Args:
            router_logits: a tuple with the logits [tokens, experts] of each layer with a router.
            batch: a padded batch with attention_mask [B, L], or a flattened one, in which every token counts.

        Returns:
            Scalar.

        Raises:
            UserError: the model returned no router logits.
        """
        if not router_logits:
            raise UserError(f"student {self.name}: its layers gave no logits of their routers; {_WAY_OUT}")
        mask = None if "cu_seq_lens" in batch else batch["attention_mask"]
        return self.coefficient * self.function(tuple(router_logits), self.experts, self.per_token, mask)


def coefficient_of(model: nn.Module) -> float:
    """The weight of a model's balancing loss; 0 if its config does not ask for one."""
    inner: Any = unwrap(model)
    config: Any = getattr(inner, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not any(getattr(c, "output_router_logits", False) for c in (config, text)):
        return 0.0
    own = getattr(inner, "router_aux_loss_coef", None)
    return float((getattr(text, "router_aux_loss_coef", 0.0) if own is None else own) or 0.0)


def router_loss(model: nn.Module) -> RouterLoss | None:
    """The balancing loss that a model's config asks for.

    Args:
        model: a causal language model.

    Returns:
        The loss, or None.

    Raises:
        UserError: the config asks for a loss that is not known here.
    """
    return RouterLoss(model) if coefficient_of(model) else None
