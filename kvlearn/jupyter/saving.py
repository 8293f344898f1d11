"""A notebook that nobody changed stays on disk as it is, byte for byte.

JupyterLab saves an open notebook after two minutes, with the kernel's ``language_info``, new widget ids and
its own formatting, even if no cell was run. In a git checkout such a file counts as changed, and ``git pull``
stops. The two hooks of :class:`Keeper` compare what is to be saved with what is stored. Source, outputs, a
cell's type, attachments, tags and other metadata count; what Jupyter writes by itself does not:

- of the notebook: ``language_info``, ``kernelspec``, ``widgets``, ``signature``, ``orig_nbformat``
- of a cell: whether it is trusted, folded or scrolled, when it ran, and its number
- of an output: its number, a widget's id, and how the text of a stream is divided
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Json = dict[str, Any]

NOTEBOOK_NOISE = {"language_info", "kernelspec", "widgets", "signature", "orig_nbformat"}
CELL_NOISE = {"trusted", "collapsed", "scrolled", "execution", "ExecuteTime"}
HIDDEN = {"source_hidden", "outputs_hidden"}  # below "jupyter" in a cell's metadata
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def merge(saved: Json, stored: Json) -> Json | None:
    """The notebook to write for ``saved`` over ``stored``, both as JSON; None where nothing really changed.

    After a real change, all of it is ``saved``'s, except that cells which did not change keep their stored
    metadata and outputs, and the notebook keeps its stored ``language_info`` and, for the same kernel,
    ``kernelspec``. Neither argument is changed.
    """
    before, now = stored.get("cells", []), saved.get("cells", [])
    with_ids = all("id" in cell for cell in before)  # older formats get random ones each time they are opened
    same = [
        _content(old) == _content(new) and (not with_ids or old["id"] == new.get("id"))
        for old, new in zip(before, now, strict=False)
    ]
    changed = len(before) != len(now) or not all(same)
    if not changed and _metadata(saved) == _metadata(stored):
        return None
    metadata = dict(saved.get("metadata", {}))
    kept = stored.get("metadata", {})
    if "language_info" in kept:
        metadata["language_info"] = kept["language_info"]
    if metadata.get("kernelspec", {}).get("name") == kept.get("kernelspec", {}).get("name"):
        metadata |= {key: value for key, value in kept.items() if key == "kernelspec"}
    if "widgets" not in metadata:  # the saved state belongs to the new ids
        by_id = {old.get("id"): old for old in before if with_ids}
        now = [_keep(new, by_id.get(new.get("id"))) for new in now]
    return saved | {"metadata": metadata, "cells": now}


def _keep(new: Json, old: Json | None) -> Json:
    """``new`` with the metadata and outputs of ``old`` if these mean the same."""
    if old is None or _content(old) != _content(new):
        return new
    kept = {"metadata": _with_trust(old.get("metadata", {}), new)}
    if "outputs" in old:
        kept["outputs"] = old["outputs"]
    return new | kept


def with_trust(stored: Json, saved: Json) -> Json:
    """``stored`` with each cell trusted as in ``saved``, so that the server signs what is trusted."""
    cells = [
        old | {"metadata": _with_trust(old.get("metadata", {}), new)}
        for old, new in zip(stored["cells"], saved["cells"], strict=True)
    ]
    return stored | {"cells": cells}


def _with_trust(metadata: Json, new: Json) -> Json:
    trust = {key: value for key, value in new.get("metadata", {}).items() if key == "trusted"}
    return {key: value for key, value in metadata.items() if key != "trusted"} | trust


def _metadata(notebook: Json) -> Json:
    return {key: value for key, value in notebook.get("metadata", {}).items() if key not in NOTEBOOK_NOISE}


def _content(cell: Json) -> Json:
    """The content of a cell, in one form."""
    metadata = {key: value for key, value in cell.get("metadata", {}).items() if key not in CELL_NOISE}
    if "jupyter" in metadata:
        metadata["jupyter"] = {k: v for k, v in metadata["jupyter"].items() if k not in HIDDEN}
        if not metadata["jupyter"]:
            del metadata["jupyter"]
    return {
        "type": cell["cell_type"],
        "source": _text(cell.get("source", "")),
        "metadata": metadata,
        "attachments": cell.get("attachments") or {},
        "outputs": _outputs(cell.get("outputs", [])),
    }


def _outputs(outputs: Iterable[Json]) -> list[Json]:
    found: list[Json] = []
    for output in outputs:
        one = {key: value for key, value in output.items() if key not in {"execution_count", "transient"}}
        if one["output_type"] == "stream":
            one["text"] = _text(one.get("text", ""))
            last = found[-1] if found else {}
            if last.get("output_type") == "stream" and last["name"] == one["name"]:
                found[-1] = last | {"text": last["text"] + one["text"]}
                continue
        if "data" in one:
            one["data"] = {kind: _data(kind, value) for kind, value in one["data"].items()}
            one["metadata"] = one.get("metadata") or {}
        found.append(one)
    return found


def _data(kind: str, value: Any) -> Any:
    if kind == WIDGET_VIEW and isinstance(value, dict):
        return {key: part for key, part in value.items() if key != "model_id"}
    if kind.endswith("json"):
        return value
    text = _text(value)
    return "".join(text.split()) if kind.startswith("image/") and kind != "image/svg+xml" else text


def _text(value: Any) -> str:
    """Notebook files hold a text as one string or as a list of its lines."""
    return "".join(value) if isinstance(value, list) else str(value)


@dataclass
class _Save:
    """Saves of one file that have begun and not ended."""

    stored: bytes  # before the first of them
    unchanged: bool  # the last of them
    running: int
    begun: float


class Keeper:
    """The hooks of a contents manager that keeps notebooks as files.

    JupyterLab's own save and one by its reader may overlap, and the server writes in a thread: until the last
    of them has ended, the file on disk may be half written.
    """

    LONGEST = 60.0  # seconds: a save that is older has failed

    def __init__(self) -> None:
        self._saves: dict[Path, _Save] = {}

    def before(self, *, model: Json, path: str, contents_manager: Any, **_: Any) -> None:
        """Put what is to be written into ``model``, and remember a file that is to stay as it is."""
        file = Path(contents_manager._get_os_path(path.strip("/")))
        if model.get("type") != "notebook" or not model.get("content"):
            return
        save = self._saves.get(file)
        if save is None or time.monotonic() - save.begun > self.LONGEST:
            if not file.is_file():
                return
            save = _Save(file.read_bytes(), False, 0, 0.0)
        try:
            stored = json.loads(save.stored)
            if stored["nbformat"] != model["content"]["nbformat"]:
                return
        except (ValueError, KeyError, TypeError):  # whatever is saved is better than a broken file
            return
        merged = merge(model["content"], stored)
        model["content"] = with_trust(stored, model["content"]) if merged is None else merged
        self._saves[file] = replace(
            save, unchanged=merged is None, running=save.running + 1, begun=time.monotonic()
        )

    def after(self, *, os_path: str, model: Json, contents_manager: Any, **_: Any) -> None:
        """Give a file that did not change its own bytes back, where the writer formats them otherwise."""
        file = Path(os_path)
        save = self._saves.get(file)
        if save is None:
            return
        save.running -= 1
        if save.running:
            return
        del self._saves[file]
        if not save.unchanged or file.read_bytes() == save.stored:
            return
        written = file.stat()
        file.write_bytes(save.stored)
        # JupyterLab asks who changed a file that is newer than its own save.
        os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
