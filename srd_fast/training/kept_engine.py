"""The engine that a model in training answers with, kept from one time to the next."""

import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..reflection.engines import GenerationEngine, Sampling, TransformersEngine, make_engine
from .config import SRDConfig

logger = logging.getLogger(__name__)


class KeptEngine:
    """One engine for all that a model is to answer while it is trained: in steps, and in evaluations.

    The engine transformers uses the model as it is. Any other has weights of its own, and gets the model's where it
    runs (`update_weights`); one that cannot take them is ended and made anew.

    Args:
        args: of the training: `generation_engine` and `generation_options`.
        tokenizer: of the model.
    """

    def __init__(self, args: SRDConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._name, self._options, self._tokenizer = args.generation_engine, args.generation_options or {}, tokenizer
        self._engine: Any = None
        self._length = self._begun_with = self._batch_size = self._step = 0
        self._takes_weights = True

    def reserve(self, length: int) -> None:
        """Say beforehand how long a prompt and its answer get, so that the engine need not begin again for longer ones.

        Args:
            length: tokens of both together, at most.
        """
        self._length = max(self._length, length)

    def of(
        self, model: Any, step: int, sampling: Sampling, batch_size: int, length: int, behind: int | None = None
    ) -> GenerationEngine:
        """The engine, with the weights of the model.

        Args:
            model: whole, without wrappers; the same at each call, but for its weights.
            step: of the training.
            sampling: of the answers.
            batch_size: prompts that are answered together. An engine that takes weights keeps the first.
            length: tokens of the longest prompt and its answer together.
            behind: of how many steps before this one the weights may be. None: they are those of this moment.

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
                self._name = "transformers"  # what auto has taken
        return self._engine

    @property
    def _has_own_weights(self) -> bool:
        return self._engine is not None and not isinstance(self._engine, TransformersEngine)

    def _serves(self, model: Any, batch_size: int) -> bool:
        """Whether the engine fits what is asked, whatever weights it has."""
        if not self._has_own_weights:
            return self._engine.model is model and self._batch_size == batch_size
        any_size = hasattr(self._engine, "update_weights")
        return self._begun_with >= self._length and (any_size or self._batch_size == batch_size)

    def _lacks(self, step: int, behind: int | None) -> bool:
        return self._has_own_weights and (behind is None or step - self._step > behind)

    def _update(self, model: Any) -> None:
        """Give the engine the model's weights, or end it."""
        if self._takes_weights:
            try:
                if hasattr(self._engine, "update_weights"):
                    self._engine.update_weights(model)
                    return
                reason = "it has no update_weights"
            except UserError as e:
                reason = str(e)
            self._takes_weights = False
            logger.warning("engine %s begins anew whenever it is to have new weights: %s", self._name, reason)
        self.close()

    def lag(self, step: int) -> int:
        """How many steps its weights are behind.

        Args:
            step: of the training.

        Returns:
            0 where it has none of its own.
        """
        return step - self._step if self._has_own_weights else 0

    def rest(self) -> None:
        """Let the engine give back what memory it can until it is asked again."""
        if hasattr(self._engine, "sleep"):
            self._engine.sleep()

    def close(self) -> None:
        """End the engine. The next call makes it anew."""
        engine, self._engine = self._engine, None
        if hasattr(engine, "close"):
            engine.close()
