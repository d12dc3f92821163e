"""The common base of teachers that run in other processes: rows are requested, and only the head is in this process."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..errors import UserError
from ..losses import Head
from .cache import ComingRows
from .source import HiddenRows, TeacherRows

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T", bound="TeacherElsewhere")


class TeacherElsewhere(ABC):
    """A teacher that other processes run. They send the hidden states of rows with loss.

    Attributes:
        where: where it runs, for messages.
        head: the teacher's head.
        num_classes: V_T, the number of classes of the head.
        num_embeddings: token ids must be below it.
        is_encoder_decoder: whether the teacher is an encoder-decoder model.
    """

    where: ClassVar[str]
    head: Head
    num_classes: int
    num_embeddings: int
    is_encoder_decoder: bool

    @abstractmethod
    def _begin(self, samples: Sequence[Mapping[str, Any]], rows: dict[str, Tensor]) -> "Future[None]":
        """Request the rows of samples. When the future is done, `rows` has them under "hidden", on the CPU."""

    def to(self: T, device: torch.device | str) -> T:
        """Move the teacher's head.

        Args:
            device: where the student trains.

        Returns:
            The source itself.
        """
        self.head = self.head.on(device)
        return self

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Request the rows of a batch's samples, and wait for them.

        Args:
            samples: tokenised, with input_ids and labels.

        Returns:
            Tensors on the CPU by name, for `rows`.

        Raises:
            UserError: a worker process of the data loader asks.
        """
        return self.collate_ahead(samples).to("cpu")

    def collate_ahead(self, samples: Sequence[Mapping[str, Any]]) -> ComingRows:
        """Request the rows of a batch's samples without waiting for them.

        Args:
            samples: tokenised, with input_ids and labels.

        Returns:
            An object whose `to(device)` waits for the rows and returns them.

        Raises:
            UserError: a worker process of the data loader asks.
        """
        if get_worker_info() is not None:
            raise UserError(f"dataloader_num_workers must be 0 with a teacher {self.where}: workers cannot ask it")
        rows: dict[str, Tensor] = {}
        return ComingRows(rows, self._begin(samples, rows))

    def rows(self, batch: Mapping[str, Any], temperature: float) -> TeacherRows:
        """Return the rows that came with a batch. They do not depend on the temperature.

        Args:
            batch: with what `collate` returned under "teacher".
            temperature: not used.

        Returns:
            Hidden states and the head.
        """
        return HiddenRows(batch["teacher"]["hidden"], self.head)
