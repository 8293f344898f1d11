"""A process and all that descends from it: how much memory it holds, how to end it."""

import contextlib
from collections.abc import Iterator

import psutil

MARK = "KVLEARN_SANDBOX"


class ProcessTree:
    """The process ``pid`` and every descendant ever seen, also those that left for another parent.

    ``mark`` is the value of the variable ``MARK`` in the environment that the process was started with:
    children inherit it, so that one that detached itself between two looks is still found.
    """

    def __init__(self, pid: int, mark: str) -> None:
        self.root = psutil.Process(pid)
        self.mark = mark
        self._seen = {self.root}

    def members(self) -> list[psutil.Process]:
        """All that are running now."""
        for process in [p for p in self._seen if p.is_running()]:
            with contextlib.suppress(psutil.Error):
                self._seen.update(process.children(recursive=True))
        self._seen = {p for p in self._seen if p.is_running()}
        return list(self._seen)

    def resident(self, enough: int) -> int:
        """Bytes of memory held; shared pages count once as soon as the plain sum exceeds ``enough``."""
        members = self.members()
        total = sum(_memory(process, "rss") for process in members)
        return total if total <= enough else sum(_memory(process, "pss") for process in members)

    def kill(self) -> None:
        """End every member, and go on until no new one appears; the root last, so that it reaps the
        others."""
        for _ in range(20):
            members = [p for p in {*self.members(), *self._marked()} if _runs(p)]
            if not members:
                return
            members = [p for p in members if p != self.root] or members
            for process in members:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(members, timeout=0.2)

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark:
                    yield process


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _memory(process: psutil.Process, kind: str) -> int:
    with contextlib.suppress(psutil.Error, OSError):
        if kind == "pss":
            full = process.memory_full_info()
            return getattr(full, "pss", full.uss)  # macOS has no pss
        return process.memory_info().rss
    return 0
