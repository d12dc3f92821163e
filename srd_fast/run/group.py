"""One command in several processes, started together by torchrun, accelerate launch or the like.

The first process carries out the command. The others wait for its orders, so that nothing is decided twice. Except
during training, each process works as if it were alone: the environment variables from which libraries learn of the
other processes are hidden.

Each other process has a connection to the first, which the system closes when a process ends, however it ends. So a
dead process is noticed at once, even by processes that would wait for it forever inside a library.
"""

import os
import pickle
import queue
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError, first_line
from ..sharing import Sharing
from .stopping import Stopped, stop_now

if TYPE_CHECKING:
    from .steps import Run

T = TypeVar("T")

# Environment variables from which libraries learn of the other processes, and of a launcher's settings for training.
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
_PREFIXES = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
_VALUE, _FAILED, _END = "value", "failed", "end"
# Seconds to wait for a better reason from another process, if several processes notice that something is wrong.
_GRACE = 3.0
# Seconds for an orderly exit. A process that waits inside a library for a dead one cannot exit in an orderly way.
_LEAVING = 10.0


class Group(Sharing):
    """The processes of one command, seen from one of them. Without arguments, a group of a single process.

    status: the exit status that another process decided on, or None.

    Args:
        rank: number of this process, from 0.
        world: the number of processes.
        local_rank: this process's number on its machine, from 0. It decides the device.
        peers: in the first process, the connections to the others by rank; in another, the connection to the first.
        hidden: environment variables that are set only while all train together.
        store: torch's store, through which the processes met. It is kept because this process may host it.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        local_rank: int = 0,
        peers: Sequence[Connection] = (),
        hidden: dict[str, str] | None = None,
        store: Any = None,
    ) -> None:
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self.status: int | None = None
        self._peers, self._hidden, self._store = list(peers), hidden or {}, store
        self._inboxes: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in peers]
        self._sending, self._first_word = threading.Lock(), threading.Lock()
        self._ended, self._left = threading.Event(), threading.Event()
        self._flags: Any = None
        if peers:
            threading.Thread(target=self._listen, daemon=True).start()

    def share(self, value: T) -> T:
        """Return the first process's value in every process."""
        if self.rank:
            received: T = self._inboxes[0].get()
            return received
        self._send(_VALUE, value)
        return value

    def gather(self, mine: T) -> list[T]:
        """Return the values of all processes, by rank, in the first process, and an empty list in the others."""
        if self.rank:
            self._send(_VALUE, mine)
            return []
        return [mine, *(inbox.get() for inbox in self._inboxes)]

    def meet(self) -> None:
        """Wait until all processes have called this."""
        self.gather(None)
        self.share(None)

    def everywhere(self, do: Callable[..., T], run: "Run", *arguments: Any) -> T:
        """Let all processes do something together, each with its own `Run`. Only the first may call this.

        Args:
            do: a module's function, called with the run and the arguments.
            run: this process's run.
            *arguments: the same for all processes.

        Returns:
            What it returned in this process, once all have done it.
        """
        self.share((do, arguments))
        result = do(run, *arguments)
        self.gather(None)
        return result

    def orders(self) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
        """In the other processes: yield what the first one orders, until it is finished."""
        while (order := self.share(None)) is not None:
            yield order
            self.gather(None)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Show the group to libraries in the block. torch.distributed is started in the first block and stays."""
        if self.world == 1:
            yield
            return
        from accelerate.state import AcceleratorState

        os.environ.update(self._hidden)
        try:
            yield
        finally:
            _hide()
            AcceleratorState._reset_state(reset_partial_state=True)

    def any_of(self, number: int) -> int:
        """The largest of the processes' numbers. To be called within `training`."""
        if self.world == 1:
            return number
        import torch
        from torch import distributed

        if self._flags is None:
            self._flags = distributed.new_group(backend="gloo")
        given = torch.tensor(number)
        distributed.all_reduce(given, distributed.ReduceOp.MAX, group=self._flags)
        return int(given)

    def close(self) -> None:
        """Let the other processes end: their last order was carried out."""
        if self._first_word.acquire(blocking=False) and self.rank == 0:
            self._send(_VALUE, None)
        if self._hidden:
            from torch import distributed

            if distributed.is_initialized():
                distributed.destroy_process_group()

    def leave(self) -> None:
        """Record that this process is ending by itself, so that `_listen` does not end it."""
        self._left.set()

    def fail(self, error: BaseException) -> None:
        """End all processes because of an error in this one. Only in the first process this returns, to report it.

        Raises:
            SystemExit: the error follows from one in another process, or this is not the first process.
        """
        self.leave()
        expected = isinstance(error, UserError)
        with suppress(Stopped):
            self._ended.wait(0.0 if expected else _GRACE)
        status = 2 if expected else error.status if isinstance(error, Stopped) else 1
        if self.status is None and self.rank:
            text = str(error)
            if not isinstance(error, (UserError, Stopped)):
                traceback.print_exception(error)
                text = f"{type(error).__name__}: {first_line(error)}"
            self._send(_FAILED, (" ".join(text.split()), status))
            with suppress(Stopped):
                self._ended.wait(_LEAVING)
        elif self.status is None and self._first_word.acquire(blocking=False):
            self._send(_END, status)
            return
        raise SystemExit(status if self.status is None else self.status)

    def _send(self, kind: str, content: Any) -> None:
        # Not with the connection's own pickler, with which torch would send tensors through shared memory.
        message = pickle.dumps((kind, content))
        with self._sending:
            for peer in self._peers:
                with suppress(OSError):  # `_listen` notices that the peer is gone
                    peer.send_bytes(message)

    def _listen(self) -> None:
        """Run in a thread: put received values into the inboxes, and leave when another process fails or is gone."""
        places = {peer: place for place, peer in enumerate(self._peers)}
        while places:
            for peer in wait(list(places)):
                assert isinstance(peer, Connection)
                other = 0 if self.rank else places[peer] + 1
                try:
                    kind, content = pickle.loads(peer.recv_bytes())
                except (EOFError, OSError):
                    del places[peer]
                    gone = f"process {other} of {self.world} is gone (killed?)"
                    self._leave(f"{gone}; what is finished is kept, and the same command goes on from there", 1)
                    continue
                if kind == _VALUE:
                    self._inboxes[places[peer]].put(content)
                elif kind == _FAILED:
                    # If this process has the same error, its own message, without a process number, is better.
                    self._ended.wait(1.0)
                    self._leave(f"process {other} of {self.world}: {content[0]}", content[1])
                else:
                    self._leave(None, content)

    def _leave(self, reason: str | None, status: int) -> None:
        """End this process, and the others if it is the first. Only the first call prints the reason."""
        if not self._first_word.acquire(blocking=False):
            return
        self.status = status
        if reason is not None and self.rank <= 1:  # of those that lose the first process, one says so
            print(f"error: {reason}", file=sys.stderr, flush=True)
        if self.rank == 0:
            self._send(_END, status)
        self._ended.set()
        if not self._left.is_set():
            stop_now()
            if not self._left.wait(_LEAVING):
                os._exit(status)


@contextmanager
def joined() -> Iterator[Group]:
    """Join the processes that a launcher started together with this one. An error in the block ends all of them.

    Raises:
        UserError: the processes do not find each other.
    """
    group = _join()
    try:
        yield group
    except BaseException as error:
        group.fail(error)
        raise
    else:
        group.close()
    finally:
        group.leave()


def _join() -> Group:
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Group()
    from torch import distributed

    try:
        store, rank, world = next(distributed.rendezvous("env://"))
        peers = _meet(store, rank, world)
    except (ValueError, OSError, RuntimeError) as e:  # torch's errors of its store are RuntimeErrors
        raise UserError(
            f"the processes do not find each other: {first_line(e)}; start them with torchrun or accelerate launch"
        ) from e
    local = int(os.environ.get("LOCAL_RANK", rank))
    return Group(rank, world, local, peers, _hide(), store)


def _meet(store: Any, rank: int, world: int) -> list[Connection]:
    """Make the connections: in the first process to the others, by rank; in another process to the first.

    Received data is unpickled, so a process that connects must know a secret that is only in this group's store.
    """
    if rank:
        port, key = store.get("srd_fast").decode().split()
        connection = Client((os.environ["MASTER_ADDR"], int(port)), authkey=key.encode())
        connection.send(rank)
        return [connection]
    key = secrets.token_hex(32)
    with Listener(("", 0), backlog=world, authkey=key.encode()) as listener:
        store.set("srd_fast", f"{listener.address[1]} {key}")
        found = [listener.accept() for _ in range(1, world)]
    return [connection for _, connection in sorted((c.recv(), c) for c in found)]


def _hide() -> dict[str, str]:
    names = [n for n in os.environ if n in _NAMES or n.startswith(_PREFIXES)]
    return {name: os.environ.pop(name) for name in names}
