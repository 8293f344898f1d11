"""Where a measurement comes from: date, commit, machine, versions. Never a host name, a user or a path."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from kvlearn.measure.roofline import read_bandwidth

PACKAGES = ("kvlearn", "torch", "triton", "numpy", "transformers")


def collect_provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The record that goes with every measurement taken on ``device``.

    ``machine`` is a slug of the device's model, ``read_bandwidth_measured`` its bytes/s, ``memory`` the
    computer's in bytes. Commit and dirty come from git, else from KVLEARN_COMMIT and
    KVLEARN_DIRTY, else they are null.
    """
    device = torch.device(device)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **commit(),
        "machine": machine(device),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "read_bandwidth_measured": round(read_bandwidth(device)),
        "gpu": gpu(),
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}},
    }


def checkout() -> Path | None:
    """The folder of the repository that this package runs from; None where it is an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    project = root / "pyproject.toml"
    return root if project.is_file() and 'name = "kvlearn"' in project.read_text(encoding="utf-8") else None


def commit(root: Path | None = None) -> dict[str, Any]:
    """``{"commit", "dirty"}`` of the repository at ``root`` (default: the one this package runs from).

    Dirty are changes and new files, but not files that git ignores nor those in results/: recording a
    measurement must not make the next one look unclean.
    """
    root = root or checkout()
    if root is not None and (root / ".git").exists():
        head = _git(root, "rev-parse", "HEAD")
        status = _git(root, "status", "--porcelain", "--untracked-files=all", "--", ".", ":(exclude)results")
        if head is not None and status is not None:
            return {"commit": head.strip(), "dirty": bool(status.strip())}
    dirty = os.environ.get("KVLEARN_DIRTY", "").strip().lower()
    return {
        "commit": os.environ.get("KVLEARN_COMMIT", "").strip() or None,
        "dirty": None if not dirty else dirty not in ("0", "false", "no"),
    }


def machine(device: torch.device | str = "cpu") -> str:
    """A short slug of the device's model: ``amd-epyc-9554-2-cores``, ``nvidia-h200``."""
    device = torch.device(device)
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    return f"{slug(cpu_model())}-{cores()}-cores"


def slug(text: str) -> str:
    """Lower case, letters and digits with single dashes between; trade marks and filler words left out."""
    text = re.sub(r"\((r|tm|c)\)|@.*|\b(cpu|processor|with .*|\d+-core)\b", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "unknown"


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        told = _run("sysctl", "-n", "machdep.cpu.brand_string")
        if told is not None and told.strip():
            return told.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu() -> dict[str, Any] | None:
    """Name and bytes of the first CUDA device, and how many there are; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "memory": properties.total_memory, "count": torch.cuda.device_count()}


def installed(package: str) -> str | None:
    """The installed version of a package; None without one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    return _run("git", "-C", str(root), *arguments)


def _run(*command: str) -> str | None:
    """The output of a command; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
