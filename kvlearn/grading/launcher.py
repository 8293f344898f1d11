"""A kernel's parent: starts it within limits, waits for it and ends as it ended.

Between grader and kernel it takes what code does to its parent (``os.kill(os.getppid(), signal.SIGTERM)``).
It also watches the grader: when that is gone, however it ended, it ends the kernel with all its children and
removes their folder. A script of the standard library alone, so that it starts at once:
``python -I -S launcher.py GRADER FOLDER MARK MEMORY COMMAND…``, where GRADER is the process id of the grader
and MARK is NAME=VALUE of a variable in the kernel's environment, which its children inherit.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # of prctl(2)
LOOK = 0.5  # seconds between two looks at the grader


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


def die_with_parent() -> None:
    """Have the system kill this process when its parent ends, where the system can (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(Exception):  # a Python without ctypes
            import ctypes

            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def outlive_nothing(grader: int, folder: str, mark: str, child: int) -> None:
    """Wait until the grader is gone; then end the kernel and its children, remove their folder, and end."""
    while os.getppid() == grader:
        time.sleep(LOOK)
    for _ in range(20):
        found = [child, *marked(mark)]
        alive = [pid for pid in dict.fromkeys(found) if end(pid)]
        if alive in ([], [child]):  # a child that ended stays until it is waited for
            break
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def marked(mark: str) -> list[int]:
    """The processes, other than this one, whose environment holds ``mark``; none where there is no /proc."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    environment = file.read()
            except OSError:  # it has just ended, or belongs to somebody else
                continue
            if mark.encode() in environment.split(b"\0"):
                found.append(int(name))
    return found


def end(pid: int) -> bool:
    """Kill a process; False if there is none."""
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return False
    return True


def main(grader: int, folder: str, mark: str, memory: int, command: list[str]) -> int:
    confine(memory)
    # Interrupts go to the whole group and are meant for the kernel, which would inherit SIG_IGN.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    # ipykernel ends itself when this parent is gone, unless it is in a loop that holds Python's lock.
    environment = os.environ | {"JPY_PARENT_PID": str(os.getpid())}
    kernel = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)  # noqa: PLW1509  no thread yet
    watch = threading.Thread(target=outlive_nothing, args=(grader, folder, mark, kernel.pid), daemon=True)
    watch.start()
    code = kernel.wait()
    if os.getppid() != grader:
        watch.join()  # it ends this process
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5:]))
