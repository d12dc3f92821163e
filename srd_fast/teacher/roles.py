"""Divide the processes of one launcher: the first ones train students, the last ones run a teacher.

Each side becomes a separate world, as if it had been started alone, so that accelerate, FSDP, DeepSpeed and tensor
parallelism see only their own processes. The two sides communicate through an additional group.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import UserError

_PATIENCE = timedelta(days=30)  # how long a side may be busy; the death of a process is noticed at once
# Environment variables that tell a process that it is one of many.
_OF_MANY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")


@dataclass(frozen=True)
class Roles:
    """The role of this process among those that a launcher started.

    Attributes:
        rank: the rank of this process among all.
        students: how many processes train. They have the ranks from 0 on.
        teachers: how many processes run the teacher. They have the ranks after the students'.
        link: a gloo group of all processes, outside of `torch.distributed`, for messages from rank to rank.
        device: this process's device.
    """

    rank: int
    students: int
    teachers: int
    link: dist.ProcessGroupGloo
    device: torch.device

    @property
    def teaches(self) -> bool:
        """Whether this process runs the teacher."""
        return self.rank >= self.students


def split_ranks(teacher_ranks: int = 1) -> Roles:
    """Divide the processes that `torchrun` or `accelerate launch` has started into students and teachers.

    All processes must call this first in the program, before `torch.distributed` is initialised. Afterwards, the
    environment of each process looks as if only the processes of its own side had been started.

    Args:
        teacher_ranks: how many processes, the last ones, run the teacher; at least 1, and at most all but one.

    Returns:
        The role of this process.

    Raises:
        UserError: there are too few processes, or `torch.distributed` is in use already.
    """
    env = os.environ
    world, rank = int(env.get("WORLD_SIZE", "1")), int(env.get("RANK", "0"))
    if not 1 <= teacher_ranks < world:
        raise UserError(
            f"teacher_ranks is {teacher_ranks}, and {world} processes were started: it must be at least 1 and leave "
            "one for a student; start more with torchrun --nproc-per-node"
        )
    if dist.is_initialized():
        raise UserError("split_ranks comes too late: torch.distributed is in use; call it first in the program")
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself serves the store
    store = dist.TCPStore(host, port, world, rank == 0 and not served, _PATIENCE, wait_for_workers=False)
    meeting = dist.PrefixStore(f"srd-fast-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    link = dist.ProcessGroupGloo(meeting, rank, world, _PATIENCE)
    students = world - teacher_ranks
    roles = Roles(rank, students, teacher_ranks, link, _device(env))
    first = students if roles.teaches else 0
    side = "teachers" if roles.teaches else "students"
    if rank == first:
        near = host if rank == 0 or env.get("GROUP_RANK", "0") == "0" else socket.getfqdn()
        meeting.set(side, f"{near} {_free_port()}")
    env["MASTER_ADDR"], env["MASTER_PORT"] = meeting.get(side).decode().split()
    env.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    size = teacher_ranks if roles.teaches else students
    if size == 1:
        for name in _OF_MANY:
            env.pop(name, None)
    else:
        env["RANK"], env["WORLD_SIZE"] = str(rank - first), str(size)
    return roles


def _device(env: Mapping[str, str]) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, int(env.get("LOCAL_RANK", 0)))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])
