"""A teacher on its own ranks: students send it samples, and it returns the hidden states of their rows with loss.

A request is sent when its batch is collated, which the Trainer does one step ahead, so that the teacher works during
the student's step. Messages between two ranks arrive in order.
"""

import atexit
import io
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data import DistillationCollator
from ..errors import UserError, first_line
from ..losses import Head
from ..models import decoder_start, embeddings_of, is_encoder_decoder, is_sharded
from .elsewhere import TeacherElsewhere
from .live import LiveTeacher
from .roles import Roles
from .source import rows_with_loss

logger = logging.getLogger(__name__)

_REQUEST, _ANSWER = 1, 2  # tags of messages


class _Line:
    """Messages between this rank and others: a length, a few values, and the bytes of "hidden" if it is among them."""

    def __init__(self, link: dist.ProcessGroupGloo) -> None:
        self.link: Any = link  # torch's stubs leave these methods out

    def send(self, content: Mapping[str, Any], to: int, tag: int) -> None:
        hidden_ND = content.get("hidden")
        head = content if hidden_ND is None else {**content, "hidden": hidden_ND[:0], "rows": len(hidden_ND)}
        file = io.BytesIO()
        torch.save(dict(head), file)
        data = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        self.link.send([torch.tensor([len(data)])], to, tag).wait()
        self.link.send([data], to, tag).wait()
        if hidden_ND is not None and hidden_ND.numel():
            self.link.send([hidden_ND.contiguous().view(torch.uint8)], to, tag).wait()

    def receive(self, tag: int, source: int | None = None) -> tuple[dict[str, Any], int]:
        """Receive a message, and return it with its sender's rank. source: only from this rank; None: from any."""
        length = torch.zeros(1, dtype=torch.int64)
        if source is None:
            work = self.link.recv_anysource([length], tag)
            work.wait()
            source = work._source_rank()
        else:
            self.link.recv([length], source, tag).wait()
        data = torch.empty(int(length), dtype=torch.uint8)
        self.link.recv([data], source, tag).wait()
        content = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
        if "rows" in content:
            # A GPU copies from page-locked memory without waiting.
            like, rows = content["hidden"], content.pop("rows")
            hidden_ND = torch.empty(rows, like.shape[1], dtype=like.dtype, pin_memory=torch.cuda.is_initialized())
            if hidden_ND.numel():
                self.link.recv([hidden_ND.view(torch.uint8)], source, tag).wait()
            content["hidden"] = hidden_ND
        return content, source


class RemoteTeacher(TeacherElsewhere):
    """A student's side of a teacher on other ranks: `SRDTrainer` takes it as `teacher_model`.

    The teacher's head is sent once, and is whole on each student. Hidden states are sent in the teacher's dtype, 2 D_T
    bytes a row in bfloat16, through gloo, over the hosts' network. If several processes run whole teachers, each serves
    a part of the students.

    Args:
        roles: the result of `split_ranks`.

    Raises:
        UserError: this rank runs the teacher, or the teacher could not be opened.
    """

    where = "on other ranks"

    def __init__(self, roles: Roles) -> None:
        if roles.teaches:
            raise UserError(f"rank {roles.rank} runs the teacher: call serve_teacher there, not RemoteTeacher")
        self._line = _Line(roles.link)
        # One thread sends, which may have to wait until the teacher is free, and one receives, in the same order.
        self._writer = ThreadPoolExecutor(1, "srd-fast-requests")
        self._reader = ThreadPoolExecutor(1, "srd-fast-rows")
        self._teacher = roles.students
        self._teacher += roles.rank % self._receive()["teachers"]
        said = self._receive()
        self.head = Head(said["weight"], said["bias"], said["softcap"], said["scale"])
        self.num_classes = said["weight"].shape[0]
        self.num_embeddings = said["embeddings"]
        self.is_encoder_decoder = said["encoder_decoder"]
        self._is_open = True
        atexit.register(self.close)

    def _receive(self) -> dict[str, Any]:
        try:
            found, _ = self._line.receive(_ANSWER, self._teacher)
        except RuntimeError as e:
            raise UserError(f"the teacher on rank {self._teacher} has ended: {first_line(e)}; see what it said") from e
        if "error" in found:
            raise UserError(f"the teacher on rank {self._teacher}: {found['error']}")
        return found

    def _begin(self, samples: Sequence[Mapping[str, Any]], rows: dict[str, Tensor]) -> Future[None]:
        ids, labels = ([torch.as_tensor(np.asarray(s[name])) for s in samples] for name in ("input_ids", "labels"))
        request = {"input_ids": ids, "labels": labels}
        self._writer.submit(self._line.send, request, self._teacher, _REQUEST)
        return self._reader.submit(lambda: rows.update(self._receive()))

    def close(self) -> None:
        """Let the teacher end once all its students have called this. It is also called when the process ends."""
        if self._is_open:
            self._is_open = False
            atexit.unregister(self.close)
            self._writer.shutdown()
            self._reader.shutdown()  # waits for what was asked ahead, and is not needed any more
            with suppress(RuntimeError):  # where the teacher has ended before
                self._line.send({"end": True}, self._teacher, _REQUEST)


def serve_teacher(model: nn.Module, roles: Roles, device: torch.device | str | None = None) -> int:
    """Run a teacher for the students on other ranks, until all of them have closed their `RemoteTeacher`.

    All teacher ranks call this: each with a whole model, or all with their shards of one model.

    Args:
        model: a language model, spread out or not, as in `LiveTeacher`.
        roles: the result of `split_ranks`.
        device: where it runs. Default: where it is.

    Returns:
        How many batches it has run.

    Raises:
        UserError: this rank trains, a student has ended, or the teacher cannot be used; then the students fail too.
    """
    if not roles.teaches:
        raise UserError(f"rank {roles.rank} trains: make a RemoteTeacher there, and do not call serve_teacher")
    line, mine, sharded = _Line(roles.link), roles.rank - roles.students, is_sharded(model)
    teams, leads = (1 if sharded else roles.teachers), not sharded or mine == 0
    students = [s for s in range(roles.students) if s % teams == mine] if leads else []
    if mine == 0:
        for student in range(roles.students):
            line.send({"teachers": teams}, student, _ANSWER)
    try:
        live = LiveTeacher(model, device)
        collate = DistillationCollator(0, decoder_start=decoder_start(model))
        first = _introduction(live)
    except UserError as e:
        for student in students:
            line.send({"error": str(e)}, student, _ANSWER)
        raise
    for student in students:
        line.send(first, student, _ANSWER)
    left, batches = len(students), 0
    while True:
        request, student = _next(line, left) if leads else ({}, -1)
        left -= request.pop("ended", 0)
        if sharded:  # the other teacher ranks must run the same batches
            shared = [request]
            dist.broadcast_object_list(shared, 0)
            request = shared[0]
        if not request:
            return batches
        try:
            found = _answer(live, collate, request)
        except Exception as e:
            found = {"error": first_line(e)}
            raise
        finally:
            if leads:
                line.send(found, student, _ANSWER)
        batches += 1


def _next(line: _Line, left: int) -> tuple[dict[str, Any], int]:
    """The next request for rows, and its student; an empty request if none of the `left` students has any more."""
    ended = 0
    while ended < left:
        try:
            request, student = line.receive(_REQUEST)
        except RuntimeError as e:  # gloo's, where a connection is closed
            raise UserError(f"a student has ended without closing its RemoteTeacher: {first_line(e)}") from e
        if "end" not in request:
            return {**request, "ended": ended}, student
        ended += 1
    return {}, -1


def _introduction(live: LiveTeacher) -> dict[str, Any]:
    head = {name: x.cpu() for name, x in live.head.tensors().items()}
    return {
        "weight": head["weight"],
        "bias": head.get("bias"),
        "softcap": live.head.softcap,
        "scale": live.head.scale,
        "embeddings": embeddings_of(live.model),
        "encoder_decoder": is_encoder_decoder(live.model),
    }


def _answer(live: LiveTeacher, collate: DistillationCollator, request: Mapping[str, list[Tensor]]) -> dict[str, Any]:
    """Hidden states of the rows with loss of a request's samples, one sample after the other."""
    rows = zip(request["input_ids"], request["labels"])
    batch = collate([{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in rows])
    states_BLD = live.hidden_states(batch)
    with torch.no_grad():
        return {"hidden": rows_with_loss(states_BLD, batch["labels"].to(states_BLD.device)).cpu()}
