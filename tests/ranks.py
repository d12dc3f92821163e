"""Processes that know each other as torchrun's do, each running a test's file as its program (gloo, on the CPU)."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

_SHOWN = 3000


def free_ports(count: int) -> list[str]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [str(s.getsockname()[1]) for s in sockets]


class Ranks:
    """Processes that have begun; what they say goes to FOLDER/rankN.txt. As a context they are killed at its end.

    Args:
        file: the program, `python FILE FOLDER WORDS` with RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR
            and MASTER_PORT set.
        folder: of their results.
        world: how many.
        words: further arguments.
        environment: further variables.
    """

    def __init__(self, file: str, folder: Path, world: int, *words: str, **environment: str) -> None:
        self.folder, self.world = folder, world
        given = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "PYTHONPATH": os.pathsep.join(sys.path)}
        given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0], "OMP_NUM_THREADS": "1"}
        given |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, str(Path(file).resolve()), str(folder), *words]
        self.processes = []
        for rank in map(str, range(world)):
            with (folder / f"rank{rank}.txt").open("w") as output:
                env = {**os.environ, **given, **environment, "RANK": rank, "LOCAL_RANK": rank}
                self.processes.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()

    def statuses(self, seconds: float = 300) -> list[int]:
        """How each of them ended."""
        return [process.wait(timeout=seconds) for process in self.processes]

    def said(self) -> str:
        """The end of what each of them said."""
        return "\n".join((self.folder / f"rank{r}.txt").read_text()[-_SHOWN:] for r in range(self.world))

    def end(self, seconds: float = 300) -> None:
        """Wait until all have ended well."""
        assert self.statuses(seconds) == [0] * self.world, self.said()

    def results(self, seconds: float = 300) -> list[Any]:
        """What each of them left in FOLDER/rankN.pt."""
        self.end(seconds)
        return [torch.load(self.folder / f"rank{r}.pt", weights_only=False) for r in range(self.world)]
