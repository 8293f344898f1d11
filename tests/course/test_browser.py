"""The course as a reader meets it: the real JupyterLab in headless Chromium."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import CHROMIUM, Notebook, Server, chromium, find, serve
from playwright.sync_api import Browser, Page, expect

from kvlearn.grading import release

ROOT = Path(__file__).resolve().parents[2]
UNIT = "01_full_attention"
FIRST = "u01-1"
# The text of an output but for the sliders' own read-outs.
WITHOUT_SLIDERS = """(area) => {
  const copy = area.cloneNode(true);
  copy.querySelectorAll(".widget-slider").forEach((slider) => slider.remove());
  return copy.textContent;
}"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("CI") != "true",
        reason="no Chromium on this machine (Debian: apt install chromium)",
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "CI runs the browser tests: install chromium first (.ci/run does)"
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("course")
    with serve(folder, tmp_path_factory.mktemp("home")) as server:
        yield server


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    yield page
    page.close()


@pytest.fixture
def exercise(server: Server, request: pytest.FixtureRequest) -> str:
    """The unsolved notebook as it is generated, in a file of this test's own: never the learner's."""
    name = f"{request.node.name}.ipynb"
    (server.folder / name).write_bytes(release.generate(UNIT, ROOT / "solutions")[f"{UNIT}.ipynb"])
    return name


@pytest.fixture(scope="module")
def answer() -> str:
    """Our answer to the first exercise, from the solution notebook."""
    cells = json.loads((ROOT / "solutions" / UNIT / f"{UNIT}.ipynb").read_text("utf-8"))["cells"]
    (index,) = find(cells, FIRST, solution=True)
    return "".join(cells[index]["source"])


def test_an_answer_takes_the_score_from_not_attempted_to_full(
    page: Page, server: Server, exercise: str, answer: str
) -> None:
    notebook = Notebook(page, server, exercise)
    expect(page.locator(".Toastify__toast")).to_have_count(0)  # no news, no question
    notebook.run_all()
    write, check = notebook.find(FIRST, solution=True), notebook.find(FIRST, grade=True)
    assert notebook.score(check) | {"score": 0, "status": "not attempted"} == notebook.score(check)

    notebook.write(write, answer)
    notebook.run(write)
    notebook.run(check)
    score = notebook.score(check)
    assert score["status"] == "passed"
    assert score["score"] == score["max_score"] > 0


def test_a_reader_who_has_only_the_page_solves_an_exercise(
    page: Page, server: Server, exercise: str, answer: str
) -> None:
    page.goto(server.address(exercise))
    page.get_by_text(
        "| Idle"
    ).wait_for()  # the status bar; the notebook's own sign is idle without a kernel too
    page.locator(".jp-Notebook .jp-MarkdownCell").first.click()  # the menu acts on what has the focus
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator(".lm-Menu-item:not(.lm-mod-disabled)").filter(has_text="Run All Cells").first.click()
    table = page.locator(".kvlearn-score").first
    expect(table).to_contain_text("not attempted")

    page.locator(".jp-CodeCell .cm-content").filter(has_text="raise NotImplementedError()").first.click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(answer)  # typing key by key would indent twice
    page.keyboard.press("Control+Enter")
    page.locator(".jp-CodeCell").filter(has=page.locator(".kvlearn-score")).first.locator(
        ".cm-content"
    ).click()
    page.keyboard.press("Control+Enter")
    expect(table).to_contain_text("passed")
    expect(table).not_to_contain_text("not attempted")


def test_the_score_reads_well_in_the_dark_theme(page: Page, server: Server, exercise: str) -> None:
    notebook = Notebook(page, server, exercise)
    notebook.run_all()
    check = notebook.find(FIRST, grade=True)
    for theme in ("Light", "Dark"):
        notebook.theme(theme)
        contrast, text = notebook.contrast(check)
        assert contrast >= 4.5, f"{text!r} has a contrast of {contrast:.1f} on {theme}"


def test_moving_the_calculators_slider_changes_its_result(page: Page, server: Server) -> None:
    shutil.copy(ROOT / "notebooks/00_start_here.ipynb", server.folder)
    notebook = Notebook(page, server, "00_start_here.ipynb")
    notebook.run_all()
    handle = page.locator(".widget-slider .noUi-handle").first
    calculator = page.locator(".jp-Cell-outputArea").filter(has=handle)
    before = calculator.evaluate(WITHOUT_SLIDERS)
    handle.focus()
    handle.press("ArrowRight")
    changed = f"([area, before]) => ({WITHOUT_SLIDERS})(area) !== before"
    page.wait_for_function(changed, arg=[calculator.element_handle(), before])
