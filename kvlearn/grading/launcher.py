"""A kernel's parent: starts it within limits, waits for it and ends as it ended.

Between grader and kernel it takes what code does to its parent (``os.kill(os.getppid(), signal.SIGTERM)``).
A script of the standard library alone, so that it starts at once:
``python -I -S launcher.py MEMORY COMMAND…``.
"""

import os
import signal
import subprocess
import sys


def confine(memory: int) -> None:
    """Make the system refuse more than ``memory`` bytes of private data to this process and its children.

    Python then raises MemoryError and lives. Other systems than Linux do not count mapped memory here: there
    only watching resident memory limits it. RLIMIT_AS would count what torch reserves and never touches.
    """
    if sys.platform == "linux":
        import resource

        limits = {resource.RLIMIT_DATA: memory, resource.RLIMIT_FSIZE: 2**30, resource.RLIMIT_CORE: 0}
        for kind, limit in limits.items():
            _, hard = resource.getrlimit(kind)
            least = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (least, least))


def main(memory: int, command: list[str]) -> int:
    confine(memory)
    # Interrupts go to the whole group and are meant for the kernel, which would inherit SIG_IGN.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    # ipykernel ends itself when this parent is gone.
    code = subprocess.Popen(command, env=os.environ | {"JPY_PARENT_PID": str(os.getpid())}).wait()
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
