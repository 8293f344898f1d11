"""A process and all that descends from it: how much memory it holds, how to limit it, how to end it."""

import contextlib
import sys
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

    def confine(self, memory: int) -> None:
        """Make the kernel of the system refuse more than ``memory`` bytes of private data a process.

        Python then raises MemoryError and lives. Only Linux can do this from outside; elsewhere whoever calls
        ``resident`` is alone in watching. RLIMIT_AS would count what torch reserves and never touches.
        """
        if sys.platform == "linux":
            import resource

            resource.prlimit(self.root.pid, resource.RLIMIT_DATA, (memory, memory))
            resource.prlimit(self.root.pid, resource.RLIMIT_FSIZE, (2**30, 2**30))
            resource.prlimit(self.root.pid, resource.RLIMIT_CORE, (0, 0))

    def kill(self) -> None:
        """End every member, and go on until no new one appears."""
        for _ in range(20):
            members = [p for p in {*self.members(), *self._marked()} if p.status() != psutil.STATUS_ZOMBIE]
            if not members:
                return
            for process in members:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(members, timeout=0.2)

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark:
                    yield process


def _memory(process: psutil.Process, kind: str) -> int:
    with contextlib.suppress(psutil.Error, OSError):
        if kind == "pss":
            full = process.memory_full_info()
            return getattr(full, "pss", full.uss)  # macOS has no pss
        return process.memory_info().rss
    return 0
