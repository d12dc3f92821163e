"""The generation engine of a model in training, kept from one use to the next."""

import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..reflection import GenerationEngine, Sampling, TransformersEngine
from ..reflection.engines import make_engine
from .config import SRDConfig

logger = logging.getLogger(__name__)


class KeptEngine:
    """One engine for all answers of a model in training: those of steps and those of evaluations.

    The engine "transformers" uses the model itself. Any other engine has its own copy of the weights. It gets new ones
    while it runs (`update_weights`), or is closed and made again if it cannot take them.

    Args:
        args: the training's config, with `generation_engine` and `generation_options`.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, args: SRDConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._name, self._options, self._tokenizer = args.generation_engine, args.generation_options or {}, tokenizer
        self._engine: GenerationEngine | None = None
        self._length = self._begun_with = self._batch_size = self._step = 0
        self._takes_weights = True

    def reserve(self, length: int) -> None:
        """Announce how long a prompt and its answer can be, so that the engine need not restart for longer ones.

        Args:
            length: the most tokens of both together.
        """
        self._length = max(self._length, length)

    def of(
        self, model: Any, step: int, sampling: Sampling, batch_size: int, length: int, behind: int | None = None
    ) -> GenerationEngine:
        """The engine, with the weights of the model.

        Args:
            model: the whole model, without wrappers; the same at each call, except for its weights.
            step: number of the training step.
            sampling: how to generate.
            batch_size: prompts that are answered together. An engine that takes new weights keeps its first batch size.
            length: tokens of the longest prompt and its answer together.
            behind: how many steps old the weights may be. None: they must be the current ones.

        Returns:
            The engine, until the next call.
        """
        self.reserve(length)
        if self._engine is not None and not self._serves(model, batch_size):
            self.close()
        if self._lacks(step, behind):
            self._update(model)
            self._step = step
        if self._engine is None:
            self._engine = make_engine(
                self._name,
                model,
                self._tokenizer,
                length=self._length,
                sampling=sampling,
                batch_size=batch_size,
                **self._options,
            )
            self._begun_with, self._batch_size, self._step = self._length, batch_size, step
            if isinstance(self._engine, TransformersEngine):
                self._name = "transformers"  # the choice of "auto"
        return self._engine

    @property
    def _has_own_weights(self) -> bool:
        return self._engine is not None and not isinstance(self._engine, TransformersEngine)

    def _serves(self, model: Any, batch_size: int) -> bool:
        """Whether the engine can be used for this request, apart from its weights."""
        if isinstance(self._engine, TransformersEngine):
            return self._engine.model is model and self._batch_size == batch_size
        any_size = hasattr(self._engine, "update_weights")
        return self._begun_with >= self._length and (any_size or self._batch_size == batch_size)

    def _lacks(self, step: int, behind: int | None) -> bool:
        return self._has_own_weights and (behind is None or step - self._step > behind)

    def _update(self, model: Any) -> None:
        """Give the engine the model's weights, or close it."""
        if self._takes_weights:
            try:
                update = getattr(self._engine, "update_weights", None)
                if update is not None:
                    update(model)
                    return
                reason = "it has no update_weights"
            except UserError as e:
                reason = str(e)
            self._takes_weights = False
            logger.warning("engine %s has to restart for new weights each time: %s", self._name, reason)
        self.close()

    def lag(self, step: int) -> int:
        """How many steps old the engine's weights are.

        Args:
            step: number of the training step.

        Returns:
            The number of steps; 0 if it uses the model's own weights.
        """
        return step - self._step if self._has_own_weights else 0

    def rest(self) -> None:
        """Let the engine free what memory it can until it is used again."""
        sleep = getattr(self._engine, "sleep", None)
        if sleep is not None:
            sleep()

    def close(self) -> None:
        """Close the engine. The next call of `of` makes a new one."""
        close, self._engine = getattr(self._engine, "close", None), None
        if close is not None:
            close()
