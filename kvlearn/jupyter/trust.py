"""The course's own notebooks are trusted, so that JupyterLab shows their saved outputs as they are.

Only what git has committed, unchanged, is signed: its authors' code runs on this machine anyway. A file that
came from elsewhere stays untrusted until its reader trusts it.
"""

import subprocess
from logging import Logger
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def committed(root: Path = ROOT) -> list[Path]:
    """The notebooks below ``root`` that are as git's HEAD has them; none where this is no checkout."""
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel").strip()).resolve() != root.resolve():
            return []  # installed somewhere inside another repository
        tracked = _git(root, "ls-files", "-z", "--", "*.ipynb").split("\0")
        changed = set(_git(root, "diff", "--name-only", "-z", "HEAD", "--", "*.ipynb").split("\0"))
    except (OSError, subprocess.CalledProcessError):
        return []
    return [root / name for name in tracked if name and name not in changed]


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def sign_committed(notary: Any, log: Logger, root: Path = ROOT) -> None:
    """Sign these notebooks with Jupyter's ``notary``; one that cannot be read is left out."""
    import nbformat

    for path in committed(root):
        try:
            notary.sign(nbformat.reads(path.read_text(encoding="utf-8"), as_version=4))
        except Exception as error:
            log.warning("kvlearn: %s is not trusted: %s", path, error)
