"""Grading in containers: each notebook in one of its own, without network, read-only, within limits.

An answer in it has no network, no files but its own notebook and the image's, and no capabilities; memory,
processes and processors are limited. It can still forge its own marks, since checks and answers share a
process; the reports of others and the teacher's files and accounts are out of its reach. The container runs
``kvlearn grade`` on the notebook and writes the report to stdout, which is read as something that others
wrote.
"""

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from kvlearn.grading import submission
from kvlearn.grading.grader import Grader, one_line
from kvlearn.grading.report import Result
from kvlearn.grading.sandbox import Limits, NoKernel
from kvlearn.grading.submission import Submission, Task

ENGINES = ("podman", "docker")
START = 120.0  # seconds for the container itself, beside the notebook's own limit
PROCESSES = 256
MOST = 2**22  # bytes of a report
GIB = 2**30
PATH = (
    "/kvlearn/.venv/bin:/usr/local/bin:/usr/bin:/bin"  # in the image of the course's Dockerfile, or in others
)


def engine() -> str:
    """The path of podman or docker, whichever is installed; empty if neither is."""
    return next(filter(None, map(shutil.which, ENGINES)), "")


def command(
    engine: str, image: str, name: str, folder: Path, unit: str, solutions: Path, limits: Limits
) -> list[str]:
    """The command line that grades ``folder``/UNIT.ipynb in a new container called ``name``."""
    memory = limits.memory + GIB  # the kernel's own limit comes first, and its message says so
    return [
        *(engine, "run", "--rm", "--name", name, "--pull", "never"),
        *("--network", "none"),
        *("--read-only", "--tmpfs", "/tmp:rw,exec,nosuid,nodev,size=1g,mode=1777"),
        *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--user", f"{os.getuid() or 65534}:{os.getgid() or 65534}"),
        *("--memory", str(memory), "--memory-swap", str(memory), "--shm-size", "256m"),
        *("--pids-limit", str(PROCESSES), "--cpus", "1", "--ulimit", "core=0"),
        *(
            "--volume",
            f"{folder}:/submission:ro",
            "--volume",
            f"{solutions}:/solutions:ro",
            "--workdir",
            "/tmp",
        ),
        *("--env", "KVLEARN_SOLUTIONS=/solutions", "--env", f"PATH={PATH}"),
        *(
            "--env",
            "HOME=/tmp",
            "--env",
            "USER=kvlearn",
            "--env",
            "OMP_NUM_THREADS=1",
            "--env",
            "KVLEARN_WORK=/dev/null",
        ),
        image,
        *("kvlearn", "grade", f"/submission/{unit}.ipynb", "--json", "-j", "1"),
        *("--timeout", f"{limits.seconds:g}"),
    ]


class ContainerGrader(Grader):
    """A grader whose kernels run in containers of ``image``, which holds this version of kvlearn."""

    def __init__(self, image: str, **options: Any) -> None:
        super().__init__(**options)
        self.image = image

    async def run(self, submitted: Submission, tasks: list[Task], kernels: asyncio.Semaphore) -> list[Result]:
        """The results of a notebook's exercises, in order. NoKernel if the container gives no report."""
        async with kernels:
            content = json.dumps(submission.submitted(submitted.file, self.solutions)).encode()
            with tempfile.TemporaryDirectory(prefix="kvlearn-") as folder:
                os.chmod(folder, 0o755)  # the container's user is another one if we are root
                Path(folder, f"{submitted.unit}.ipynb").write_bytes(content)
                output, complaint = await self._contain(Path(folder), submitted.unit)
        results = results_in(output, tasks)
        if results is None:
            said = one_line(complaint[-2000:].decode("utf-8", "replace"))
            raise NoKernel(f"the container gave no report in order{f': {said}' if said else ''}")
        for result in results:
            self._tell(result)
        return results

    async def _contain(self, folder: Path, unit: str) -> tuple[bytes, bytes]:
        """The container's stdout and stderr; the container is removed afterwards in every case."""
        name = f"kvlearn-{uuid.uuid4().hex}"
        runs = engine()
        process = await asyncio.create_subprocess_exec(
            *command(runs, self.image, name, folder, unit, self.solutions, self.limits),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.timeout(self.limits.total + START):
                both = await asyncio.gather(_some(process.stdout), _some(process.stderr))
                await process.wait()
                return both
        except TimeoutError:
            raise NoKernel("the container did not end in time") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                removal = await asyncio.create_subprocess_exec(
                    *(runs, "rm", "--force", name),
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                )
                await removal.wait()


async def _some(stream: asyncio.StreamReader) -> bytes:
    """All of a stream is taken, its first ``MOST`` bytes are kept."""
    kept = bytearray()
    while piece := await stream.read(2**16):
        kept += piece[: MOST - len(kept)]
    return bytes(kept)


def results_in(output: bytes, tasks: list[Task]) -> list[Result] | None:
    """The results in what ``kvlearn grade --json`` wrote; None if they are not those of the tasks."""
    try:
        (report,) = json.loads(output)
        found = [Result(**each) for each in report["exercises"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if len(found) != len(tasks):
        return None
    if not all(result.is_of(task.id, task.points) for result, task in zip(found, tasks, strict=True)):
        return None
    return [
        Result(each.id, float(each.score), task.points, each.status, one_line(each.message))
        for each, task in zip(found, tasks, strict=True)
    ]
