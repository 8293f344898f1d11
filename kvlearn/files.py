"""Files: written whole or not at all, and JSON that is read with an error which names the file."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(name: str, path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends.

    ``path`` holds what it held before, or all that the block wrote: the content is on the disk (fsync) before
    it gets the name, so that a crash of the machine cannot leave half of it. Each call has a temporary name
    of its own, so two processes may write to one path: the last to end wins.

    If the block fails, the temporary file is removed. A disk or folder that refuses gives OSError with
    ``name`` (of the argument), the path and the reason.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        flush(partial)
        os.replace(partial, target)
        with suppress(OSError):  # the file is there; some file systems cannot flush a folder
            flush(target.parent)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f"{name}: could not write {target}: {reason}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(where: str, path: Path) -> Any:
    """The content of a JSON file. Raises ValueError that begins with ``where``."""
    return parse_json(where, path.read_bytes())


def parse_json(where: str, text: str | bytes) -> Any:
    """The content of a JSON text in UTF-8. Raises ValueError that begins with ``where``."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        reason = "its brackets are nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{where}: expected JSON: {reason}")
