"""A real JupyterLab in a real browser, for the tests that see the course as a reader does.

The server has a home and settings of its own, listens on loopback only, and ends with everything it started.
Its app is exposed to the page (`window.jupyterapp`): a test can ask the model what the page does not show.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Browser, ElementHandle, Page, sync_playwright

from kvlearn.jupyter import settings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCORE = "application/vnd.kvlearn.score.v1+json"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS: dict[str, Any] = {
    "lab/user-settings/@jupyterlab/docmanager-extension/plugin.jupyterlab-settings": {"autosaveInterval": 3},
    # Every cell stays in the page, scrolled to or not.
    "lab/user-settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}

READY = """async (path) => {
  const app = window.jupyterapp;
  await app.restored;
  const panel = await app.commands.execute('docmanager:open', {path, factory: 'Notebook'});
  await panel.context.ready;
  await panel.sessionContext.ready;
  window.panel = panel;
}"""
IDLE = """() => panel.sessionContext.session?.kernel?.status === 'idle'
  && panel.content.widgets.length === panel.content.model.cells.length"""
CELLS = "() => panel.content.model.toJSON().cells"
RAN = "([i, before]) => ![null, before].includes(panel.content.model.cells.get(i).executionCount)"
RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
THEME = "(theme) => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"


@dataclass
class Server:
    folder: Path
    url: str
    token: str

    def address(self, path: str) -> str:
        return f"{self.url}lab/tree/{path}?token={self.token}&reset"


def find(cells: list[dict[str, Any]], exercise: str, **nbgrader: bool) -> list[int]:
    """The indices of the cells that belong to an exercise (`u01-1`) and have these nbgrader flags."""
    metadata = [cell["metadata"].get("nbgrader", {"grade_id": ""}) for cell in cells]
    return [
        index
        for index, mine in enumerate(metadata)
        if mine["grade_id"].startswith(f"{exercise}-") and nbgrader.items() <= mine.items()
    ]


@contextmanager
def serve(folder: Path, home: Path, *, teach: bool = False) -> Iterator[Server]:
    """JupyterLab over `folder`, at home in the empty folder `home`, as learners or as teachers start it."""
    config, runtime = home / "config", home / "runtime"
    settings.write(config)
    for name, content in SETTINGS.items():
        (config / name).parent.mkdir(parents=True, exist_ok=True)
        (config / name).write_text(json.dumps(content))
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("JUPYTER", "IPYTHON", "XDG_"))
    }
    places = {"HOME": home, "JUPYTER_CONFIG_DIR": config, "JUPYTER_RUNTIME_DIR": runtime}
    places |= {"JUPYTER_DATA_DIR": home / "data", "IPYTHONDIR": home}
    if teach:
        places["JUPYTER_CONFIG_PATH"] = config / "teach"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += [
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.expose_app_in_browser=True",
    ]
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=kept | {key: str(value) for key, value in places.items()},
            stdout=log,
            stderr=log,
        )
    try:
        yield _wait_for(process, runtime, home / "server.log")
    finally:
        if process.poll() is None:
            server = psutil.Process(process.pid)
            started = [server, *server.children(recursive=True)]  # the kernels too
            server.terminate()
            for survivor in psutil.wait_procs(started, timeout=30)[1]:
                survivor.kill()


def _wait_for(process: subprocess.Popen[bytes], runtime: Path, log: Path) -> Server:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        for file in runtime.glob("jpserver-*.json"):
            info = json.loads(file.read_text() or "{}")
            if info:
                return Server(Path(info["root_dir"]), info["url"], info["token"])
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-4000:]}")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Notebook:
    """One notebook, open in a page; ``beside`` others that were opened there before, which are closed."""

    def __init__(self, page: Page, server: Server, path: str, *, beside: bool = False) -> None:
        self.page = page
        if beside:
            page.evaluate("() => panel.dispose()")
        else:
            page.goto(server.address(path))
        page.wait_for_function("() => window.jupyterapp !== undefined")
        page.evaluate(READY, path)
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        self.page.wait_for_function(IDLE)

    def cells(self) -> list[dict[str, Any]]:
        return self.page.evaluate(CELLS)

    def find(self, exercise: str, **nbgrader: bool) -> int:
        """The index of an exercise's one cell with these nbgrader flags: `find("u01-1", grade=True)`."""
        (found,) = find(self.cells(), exercise, **nbgrader)
        return found

    def score(self, index: int) -> dict[str, Any]:
        """The result of the check in this cell, from the part of its output for machines."""
        (result,) = [output for output in self.cells()[index]["outputs"] if SCORE in output.get("data", {})]
        return result["data"][SCORE]

    def element(self, index: int) -> ElementHandle:
        element = self.page.evaluate_handle("(i) => panel.content.widgets[i].node", index).as_element()
        assert element is not None
        return element

    def run_all(self) -> None:
        """Run every cell, and wait until the last has answered."""
        assert self.page.evaluate(RUN_ALL), "a cell raised"
        self.wait_until_idle()

    def write(self, index: int, text: str) -> None:
        editor = self.element(index).query_selector(".cm-content")
        assert editor is not None
        editor.fill(text)

    def run(self, index: int) -> None:
        """Control+Enter in the cell, and wait for its new number."""
        before = self.cells()[index]["execution_count"]
        editor = self.element(index).query_selector(".cm-content")
        assert editor is not None
        editor.press("Control+Enter")
        self.page.wait_for_function(RAN, arg=[index, before])
        self.wait_until_idle()

    def theme(self, name: str) -> None:
        """`Light` or `Dark`, and wait until the page wears it."""
        self.page.evaluate(THEME, f"JupyterLab {name}")
        light = str(name == "Light").lower()
        self.page.wait_for_selector(f"body[data-jp-theme-light='{light}']", state="attached")

    def contrast(self, index: int) -> tuple[float, str]:
        """The worst contrast of text in a cell's outputs, and that text; WCAG asks for 4.5."""
        outputs = self.element(index).query_selector_all(".jp-OutputArea-output")
        return min((tuple(output.evaluate(CONTRAST)) for output in outputs), default=(0.0, "no output"))
