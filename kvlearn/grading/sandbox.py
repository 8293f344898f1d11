"""One kernel, watched: its time, its memory and what it prints are limited, and nothing of it stays behind.

The limits are against mistakes, not against malice: the code runs as the user who grades, with that user's
files and network.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import nbformat
import psutil
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

from kvlearn.grading import launcher
from kvlearn.grading.folders import MARK
from kvlearn.grading.score import MIME

# Environment variables that code in a kernel may read: where things are, the language, threads, devices.
# All others are removed: one may hold tokens and passwords, which an error message would carry into a report.
ALLOWED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|TZ|LANG|LANGUAGE|LC_\w+|LD_LIBRARY_PATH|LD_PRELOAD|DYLD_\w+|VIRTUAL_ENV|CONDA_PREFIX"
    r"|XDG_\w+_(HOME|DIR)|PYTHON(PATH|HOME|HASHSEED|UTF8|IOENCODING|WARNINGS|DONTWRITEBYTECODE|PYCACHEPREFIX)"
    r"|(OMP|GOMP|KMP|MKL|OPENBLAS|VECLIB|NUMEXPR|CUDA|NVIDIA|NCCL|GLOO|TORCH|PYTORCH|TORCHINDUCTOR|TRITON)_\w+"
    r"|MPLBACKEND|MPLCONFIGDIR|CC|CXX|JUPYTER_PREFER_ENV_PATH|JUPYTER_PLATFORM_DIRS|KVLEARN_\w+"
)
SECRET = re.compile(r"(?i)token|secret|passw|credential|(^|_)(api|access|auth|private)_?key")


PATIENCE = 20.0  # how many times longer than its limit code may take on a machine that is busy with others


@dataclass(frozen=True)
class Limits:
    """The limits of one exercise. Times in seconds, sizes in bytes."""

    seconds: float = 60.0  # its answer and its check together
    setup: float = 120.0  # a set-up cell; the first import of torch can be slow
    grace: float = 3.0  # from the interrupt to the kill
    memory: int = 3 * 2**30  # of the whole process tree
    output: int = 2**20  # kept of what one cell prints
    total: float = 900.0  # seconds for a whole notebook


class TimedOut(Exception):
    """The code was interrupted at its limit; the kernel lives."""


class KernelLost(Exception):
    """The kernel died or had to be killed; the message says why."""


class OverTime(KernelLost):
    """It did not even stop when interrupted."""


class NoKernel(Exception):
    """The kernel did not even start; the message says why."""


class _Client(NotebookClient):
    """nbclient that drops prints beyond a limit as they arrive, but never a score."""

    room = 0

    def output(self, outs: Any, msg: Any, display_id: Any, cell_index: int) -> Any:
        data = msg["content"].get("data", {})
        if MIME not in data:
            self.room -= len(msg["content"].get("text", "")) + sum(len(str(value)) for value in data.values())
            if self.room < 0:
                return None
        return super().output(outs, msg, display_id, cell_index)


class Sandbox:
    """A kernel of the running interpreter in an empty directory: ``async with Sandbox(limits) as box``.

    ``environment`` holds variables that the kernel has beside those of this process that are ``ALLOWED``. The
    kernel ends with the process that started it, however that ends.
    """

    def __init__(self, limits: Limits, environment: Mapping[str, str] | None = None) -> None:
        self.limits = limits
        self.environment = dict(environment or {})
        self._deadline = self._latest = float("inf")
        self._interrupted = False
        self.waited = 0.0  # seconds in which the kernel was ready to run and had no processor
        self._end: KernelLost | None = None
        self._tree: ProcessTree | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        # Sockets in our own folder cannot be taken by others, as ports are, but their path may be too long.
        for transport in ("ipc", "tcp"):
            try:
                await self._start(transport)
                break
            except BaseException as error:
                await self.__aexit__()
                if not isinstance(error, Exception):
                    raise
                if transport == "tcp":
                    raise NoKernel(f"no kernel starts here: {error}") from error
        return self

    async def _start(self, transport: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvlearn-", ignore_cleanup_errors=True)
        home = Path(self._folder.name)
        # Without kernel directories the only "python3" left is ipykernel in the interpreter that runs us.
        specs = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
        self._manager = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=specs,
            transport=transport,
            connection_file=str(home / "kernel.json"),
        )
        spec = self._manager.kernel_spec
        assert spec is not None
        mark = uuid.uuid4().hex
        watched = [str(os.getpid()), str(home), f"{MARK}={mark}", str(self.limits.memory)]
        spec.argv = [sys.executable, "-I", "-S", launcher.__file__, *watched, *spec.argv]
        self._client = _Client(
            nbformat.v4.new_notebook(),
            km=self._manager,
            allow_errors=True,
            timeout=None,
            iopub_timeout=30,
            store_widget_state=False,
        )
        self._client.log.setLevel("CRITICAL")
        for name in ("work", "ipython", "tmp"):
            (home / name).mkdir()
        environment = (
            allowed(os.environ)
            | self.environment
            | {
                "IPYTHONDIR": str(home / "ipython"),  # the user's own start-up files stay out
                "TMPDIR": str(home / "tmp"),
                "PYDEVD_DISABLE_FILE_VALIDATION": "1",
                MARK: mark,
            }
        )
        await self._client.async_start_new_kernel(
            cwd=str(home / "work"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._tree = ProcessTree(self._provisioner.pid, mark)
        await self._client.async_start_new_kernel_client()
        self._watcher = asyncio.create_task(self._watch())

    @property
    def _provisioner(self) -> Any:
        return self._manager.provisioner

    async def __aexit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        if self._tree is not None:
            self._tree.kill()
        if self._manager.has_kernel:
            await self._manager.shutdown_kernel(now=True)
        if self._client.kc is not None:
            self._client.kc.stop_channels()
        self._folder.cleanup()

    def now(self) -> float:
        """The kernel's own clock, in seconds: it stops while the kernel waits for a processor, so that
        limits, and with them grades, do not depend on how many kernels share the machine. (A limit is reached
        after ``PATIENCE`` times its seconds in any case.)"""
        return time.monotonic() - self.waited

    async def _watch(self) -> None:
        """Interrupt at the deadline, kill after the grace, kill what holds too much memory."""
        assert self._tree is not None
        while True:
            await asyncio.sleep(0.1)
            self.waited = self._tree.waited()
            late = max(self.now() - self._deadline, time.monotonic() - self._latest)
            if self._tree.resident(self.limits.memory) > self.limits.memory:
                self._end = KernelLost(f"it used more than {self.limits.memory / 2**30:.1f} GiB of memory")
            elif late > self.limits.grace:
                self._end = OverTime()
            elif late > 0 and not self._interrupted:
                self._interrupted = True
                with suppress(RuntimeError):  # it has just died of itself
                    await self._manager.interrupt_kernel()
            if self._end is not None:
                self._tree.kill()
                if self._client.task_poll_for_reply is not None:
                    self._client.task_poll_for_reply.cancel()
                return

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        if self._end is not None:
            raise self._end
        self._interrupted = False
        self._deadline = self.now() + seconds
        self._latest = time.monotonic() + PATIENCE * seconds
        try:
            yield
        finally:
            self._deadline = self._latest = float("inf")

    async def run(self, source: str, seconds: float) -> list[dict[str, Any]]:
        """Run a cell and return its outputs.

        ``TimedOut`` if it had to be interrupted after ``seconds``, ``KernelLost`` if the kernel is gone.
        """
        cell = nbformat.v4.new_code_cell(source)
        self._client.nb.cells = [cell]
        self._client.room = self.limits.output
        with self._within(seconds):
            try:
                await self._client.async_execute_cell(cell, 0)
            except DeadKernelError:
                await self._explain()
            if (
                await self._provisioner.poll() is not None
            ):  # its launcher; the kernel itself lives a second more
                await self._explain()
        if self._interrupted:
            raise TimedOut
        outputs: list[dict[str, Any]] = cell.outputs
        return outputs

    async def ask(self, expression: str, kind: str, seconds: float) -> Any:
        """An expression's value, displayed as MIME type ``kind``; None if it has no such display."""
        assert self._client.kc is not None
        with self._within(seconds):
            try:
                request = self._client.kc.execute(
                    "", silent=True, store_history=False, user_expressions={"value": expression}
                )
                reply = await self._client.async_wait_for_reply(request)
            except DeadKernelError:
                await self._explain()
        try:
            assert reply is not None
            return reply["content"]["user_expressions"]["value"]["data"][kind]
        except (AssertionError, TypeError, KeyError):
            return None

    async def _explain(self) -> NoReturn:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # nbclient takes our own cancellation for a dead kernel
            raise asyncio.CancelledError
        if self._end is None:
            code = await self._provisioner.poll()
            how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
            self._end = KernelLost(f"it ended the process {how}")
        raise self._end


class ProcessTree:
    """The process ``pid`` and every descendant ever seen, also those that left for another parent.

    ``mark`` is the value of the variable ``MARK`` in its environment: children inherit it, so that one that
    detached itself between two looks is still found.
    """

    def __init__(self, pid: int, mark: str) -> None:
        self.root = psutil.Process(pid)
        self.mark = mark
        self._first: psutil.Process | None = None  # the kernel, the first child of its launcher
        self._waited = 0.0
        self._seen = {self.root}

    def members(self) -> list[psutil.Process]:
        """All that are running now."""
        for process in [p for p in self._seen if p.is_running()]:
            with suppress(psutil.Error):
                self._seen.update(process.children(recursive=True))
        self._seen = {p for p in self._seen if p.is_running()}
        return list(self._seen)

    def waited(self) -> float:
        """Seconds in which the kernel was ready to run and had no processor; 0 where the system, other than
        Linux, does not say."""
        with suppress(psutil.Error, OSError, IndexError, ValueError):
            self._first = self._first or self.root.children()[0]
            nanoseconds = int(Path(f"/proc/{self._first.pid}/schedstat").read_text().split()[1])
            self._waited = max(self._waited, nanoseconds / 1e9)
        return self._waited

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
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(members, timeout=0.2)

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark:
                    yield process


def allowed(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that learners' code may see."""
    return {
        name: value
        for name, value in environment.items()
        if ALLOWED.fullmatch(name) and not SECRET.search(name)
    }


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _memory(process: psutil.Process, kind: str) -> int:
    with suppress(psutil.Error, OSError):
        if kind == "pss":
            full = process.memory_full_info()
            return int(getattr(full, "pss", full.uss))  # macOS has no pss
        return int(process.memory_info().rss)
    return 0
