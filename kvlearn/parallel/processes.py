"""Start processes that work together, from a notebook or a test, and end all of them when one fails.

``torchrun`` does this on the command line. Here the processes are children of the notebook's kernel: each
imports ``function`` by name, meets the others through a file, and gives back what the function returns. They
are forked from a server that has imported kvlearn and computed nothing, so that only the first run pays for
the import. Functions of the notebook itself run in copies of the kernel (``copied``).
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any, cast

import torch
import torch.distributed as dist

from kvlearn import validate
from kvlearn.parallel.ring import PeerLost

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PRELOADED = ["kvlearn.parallel.decoder", "kvlearn.parallel.demo"]


class RankFailed(RuntimeError):
    """A rank of a run has failed; the message names it and says how."""


def launch(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    seconds: float = 20.0,
    limit: float = float("inf"),
    copied: bool = False,
) -> list[Any]:
    """``function(*args)`` in ``world`` processes that form the default gloo group; the results by rank.

    ``function`` must be importable (not defined in a notebook), ``args`` picklable. A rank that does not
    answer another for ``seconds`` ends the run, and so does one that dies: RankFailed names the first cause,
    after all processes have ended. ``seconds`` also bounds the start; the whole run may take ``limit``
    seconds. The environment of the processes is that of the first run. Raises ValueError for a function of a
    notebook.

    ``copied``: the processes are forked from this one and have all that it has, so that ``function`` and
    ``args`` may be anything, also of a notebook. They run on one thread, must not use a GPU that this process
    has used, and have been tried on Linux alone.
    """
    world = validate.positive("world", world)
    if not copied and function.__module__ == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
        raise ValueError(
            f"function: expected one that other processes can import, got {function.__name__} of a notebook"
        )
    context: Any = multiprocessing.get_context("fork" if copied else METHOD)
    if not copied:
        context.set_forkserver_preload(PRELOADED)
    processes: list[Any] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                pipes.append(ours)
                rest = (Path(folder), rank, world, seconds, function, args)
                process = context.Process(
                    target=_work, args=(theirs, *rest), daemon=True, name=f"rank {rank}"
                )
                with theirs, warnings.catch_warnings():  # closed before the next is copied: its end must show
                    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of a fork
                    process.start()
                processes.append(process)
            return _collect(pipes, processes, time.monotonic() + limit)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for ours in pipes:
                ours.close()


def _collect(pipes: Sequence[Connection], processes: Sequence[Any], latest: float) -> list[Any]:
    """The results of all ranks, or RankFailed after every rank has had a second to say why.

    ``latest`` is the time by which there must be an answer.
    """
    results: dict[int, Any] = {}
    failures: dict[int, tuple[int, str]] = {}  # rank -> (how near to the cause: less is nearer, message)
    open_pipes: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    end = None
    while open_pipes and (end is None or time.monotonic() < end):
        for ready in cast(list[Connection], wait(list(open_pipes), timeout=0.2)):
            rank = open_pipes.pop(ready)
            try:
                kind, value = pickle.loads(ready.recv_bytes())
            except EOFError:  # no word: it was killed, or ended itself
                processes[rank].join(5)
                failures[rank] = 0, f"ended with exit code {processes[rank].exitcode}"
                continue
            if kind == "result":
                results[rank] = value
            else:
                failures[rank] = {"error": 1, "lost": 2}[kind], value
        if failures and end is None:
            end = time.monotonic() + 1.0
        if not failures and open_pipes and time.monotonic() > latest:
            late = ", ".join(f"rank {rank}" for rank in open_pipes.values())
            raise RankFailed(f"{late}: no result within the time")
    if not failures:
        return [results[rank] for rank in range(len(pipes))]
    rank, (distance, message) = min(failures.items(), key=lambda item: item[1][0])
    silent = ", ".join(f"rank {other}" for other in open_pipes.values())
    if distance == 2 and silent:  # all others only say that they have waited in vain
        raise RankFailed(f"{silent}: no answer within the time; rank {rank}: {message}")
    raise RankFailed(f"rank {rank}: {message}")


def _work(
    pipe: Connection,
    folder: Path,
    rank: int,
    world: int,
    seconds: float,
    function: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    def say(kind: str, value: Any) -> None:
        pipe.send_bytes(pickle.dumps((kind, value)))  # a tensor by value: this process ends at once

    end_with_parent()
    torch.set_num_threads(1)
    try:
        start(rank, world, seconds, f"file://{folder / 'meet'}")
        result = function(*args)
        dist.barrier()
        say("result", result)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        lost = isinstance(error, PeerLost) or os.path.join("torch", "distributed") in where
        told = str(error) if isinstance(error, PeerLost) else traceback.format_exception_only(error)
        say("lost" if lost else "error", "".join(told).strip())
    pipe.close()
    os._exit(0)  # the group's threads may wait for a rank that is gone


def start(rank: int, world: int, seconds: float, init_method: str = "env://") -> None:
    """Form the default gloo group; a rank that does not come within ``seconds`` is named.

    Raises PeerLost.
    """
    timeout = timedelta(seconds=seconds)
    try:
        dist.init_process_group("gloo", init_method, timeout=timeout, rank=rank, world_size=world)
        dist.monitored_barrier(timeout=timeout, wait_all_ranks=True)
    except RuntimeError as error:
        raise PeerLost(f"not all of {world} ranks came within {seconds:g} s: {error}") from error


def end_with_parent() -> None:
    """Let this process end when the one that launched it ends, however that ends."""
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
