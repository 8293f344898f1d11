"""Jupyter's settings of the course's own environment: ``python -m kvlearn.jupyter.settings [FOLDER]``.

Learners see no news from Jupyter and none of nbgrader's menus, buttons and panels, which are a teacher's.
``make teach`` adds ``FOLDER/teach`` to ``JUPYTER_CONFIG_PATH``: there they are on.
"""

import json
import sys
from pathlib import Path
from typing import Any

SERVER = ("formgrader", "validate_assignment", "assignment_list", "course_list")


def files(*, teach: bool) -> dict[str, Any]:
    """The contents of each file of a folder of Jupyter settings, by its path."""
    news = {} if teach else {"@jupyterlab/apputils-extension:announcements": True}
    servers = {f"nbgrader.server_extensions.{name}": teach for name in SERVER}
    return {
        "labconfig/page_config.json": {"disabledExtensions": {**news, "@jupyter/nbgrader": not teach}},
        # Read in the order of their names: this one after nbgrader's own nbgrader.json.
        "jupyter_server_config.d/nbgrader_kvlearn.json": {"ServerApp": {"jpserver_extensions": servers}},
    }


def write(folder: Path) -> None:
    """Write learners' settings into ``folder``, an environment's etc/jupyter, and teachers' into teach/."""
    for root, teach in ((folder, False), (folder / "teach", True)):
        for name, content in files(teach=teach).items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(sys.prefix) / "etc" / "jupyter")
