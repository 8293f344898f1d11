"""The course as a reader meets it: the real JupyterLab in headless Chromium."""

import json
import os
import shutil
import subprocess
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
    page.set_default_timeout(300_000)
    expect.set_options(timeout=300_000)
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


def test_an_answer_takes_the_score_from_not_attempted_to_full_and_it_reads_well_in_both_themes(
    page: Page, server: Server, exercise: str, answer: str
) -> None:
    notebook = Notebook(page, server, exercise)
    expect(page.locator(".Toastify__toast")).to_have_count(0)  # no news, no question
    notebook.run_all()
    write, check = notebook.find(FIRST, solution=True), notebook.find(FIRST, grade=True)
    assert notebook.score(check) | {"score": 0, "status": "not attempted"} == notebook.score(check)
    reads_well(notebook, check)

    notebook.write(write, answer)
    notebook.run(write)
    notebook.run(check)
    score = notebook.score(check)
    assert score["status"] == "passed"
    assert score["score"] == score["max_score"] > 0

    reads_well(notebook, check)


def reads_well(notebook: Notebook, check: int) -> None:
    for theme in ("Light", "Dark"):
        notebook.theme(theme)
        contrast, text = notebook.contrast(check)
        assert contrast >= 4.5, f"{text!r} has a contrast of {contrast:.1f} on {theme}"


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


CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OPENED = ["notebooks/00_start_here.ipynb", "exercises/01_full_attention/01_full_attention.ipynb"]
# The faults of an open notebook in a narrow window: each output that is cut off, each image that is.
CUT_OFF = """() => {
  const scrolls = (node) => ["auto", "scroll"].includes(getComputedStyle(node).overflowX);
  const areas = [...panel.node.querySelectorAll(".jp-OutputArea-output, .jp-MarkdownOutput")];
  const wide = areas.filter((area) => area.scrollWidth > area.clientWidth + 1 && !scrolls(area));
  const images = areas.flatMap((area) => [...area.querySelectorAll("img")].filter(
    (image) => image.clientWidth > area.clientWidth + 1));
  return [...wide.map((area) => area.textContent.slice(0, 60)), ...images.map((image) => image.alt)];
}"""


@pytest.fixture
def checkout(server: Server) -> Iterator[Path]:
    """A git repository inside the server's folder with the notebooks of `OPENED`, committed."""
    folder = server.folder / "checkout"
    for name in OPENED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".gitignore").write_text(".ipynb_checkpoints/\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", "notebooks")
    yield folder
    shutil.rmtree(folder)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", OPENED)
def test_opening_a_committed_notebook_leaves_git_clean(
    page: Page, server: Server, checkout: Path, name: str
) -> None:
    with page.expect_response(lambda response: response.request.method == "PUT" and name in response.url):
        notebook = Notebook(page, server, f"checkout/{name}")  # JupyterLab saves it, nobody asked for that
    for _ in range(2):
        page.evaluate("() => panel.context.save()")
    assert git(checkout, "status", "--porcelain") == ""

    text = "A sentence of the reader's."
    page.evaluate("(text) => panel.content.model.cells.get(0).sharedModel.setSource(text)", text)
    page.evaluate("() => panel.context.save()")
    assert page.locator(".jp-Dialog").count() == 0, "JupyterLab believes that somebody else wrote the file"
    saved, before = json.loads((checkout / name).read_text()), json.loads((ROOT / name).read_text())
    assert "".join(saved["cells"][0]["source"]) == text
    assert saved["cells"][1:] == before["cells"][1:]
    assert saved["metadata"] == before["metadata"]
    assert len(notebook.cells()) == len(saved["cells"])


def test_every_figure_has_alt_text_and_narrow_windows_cut_nothing_off(page: Page, server: Server) -> None:
    """In one page, all chapters one after the other; the first of them with figures in a wider window too."""
    shutil.copytree(ROOT / "notebooks/pictures", server.folder / "pictures", dirs_exist_ok=True)
    for chapter, width in [*((chapter, 420) for chapter in CHAPTERS), (CHAPTERS[1], 800)]:
        notebook = json.loads(chapter.read_text("utf-8"))
        if width == 420:  # another notebook to Jupyter, which does not trust it
            notebook["metadata"]["title"] = "changed"
        name = f"{width}-{chapter.name}"
        (server.folder / name).write_text(json.dumps(notebook))
        figures = [
            output["metadata"]["image/png"]["alt"]
            for cell in notebook["cells"]
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        page.set_viewport_size({"width": width, "height": 900})
        Notebook(page, server, name, beside=chapter != CHAPTERS[0])
        images = page.evaluate("() => [...panel.node.querySelectorAll('img')].map((image) => image.alt)")
        assert all(images), f"{name}: {images.count('')} images have no alt text"
        assert set(figures) <= set(images), name
        # Until the file browser is out of the way, and the notebook before this one.
        page.wait_for_function("(width) => panel.node.clientWidth > width", arg=0.7 * width - 60)
        assert page.evaluate(CUT_OFF) == [], name


def test_the_calculator_is_its_table_before_it_is_run(page: Page, server: Server) -> None:
    for title in (None, "changed"):  # trusted, if it is as committed; and not trusted
        chapter = json.loads((ROOT / "notebooks/00_start_here.ipynb").read_text("utf-8"))
        if title:
            chapter["metadata"]["title"] = title
        (server.folder / "calculator.ipynb").write_text(json.dumps(chapter))
        notebook = Notebook(page, server, "calculator.ipynb")
        (index,) = [i for i, cell in enumerate(notebook.cells()) if cell["source"].endswith("calculator()")]
        shown = notebook.element(index).inner_text()
        assert "users that fit on 80 GB" in shown
        assert "VBox" not in shown
        assert "Error" not in shown


def test_the_courses_own_notebooks_are_trusted(page: Page, server: Server) -> None:
    name = "notebooks/00_start_here.ipynb"
    if git(ROOT, "status", "--porcelain", "--", name):
        pytest.skip("this notebook is being worked on")
    shutil.copy(ROOT / name, server.folder / "trusted.ipynb")
    Notebook(page, server, "trusted.ipynb")
    trusted = "() => [...panel.content.model.cells].every((cell) => cell.type !== 'code' || cell.trusted)"
    assert page.evaluate(trusted)


NBGRADER = "Nbgrader"


def test_a_learner_sees_nothing_of_nbgrader(page: Page, server: Server, exercise: str) -> None:
    Notebook(page, server, exercise)
    assert page.get_by_role("menuitem", name=NBGRADER).count() == 0
    assert page.get_by_text("Validate", exact=True).count() == 0
    assert (
        page.evaluate("() => window.jupyterapp.commands.listCommands()").count("nbgrader:open-formgrader")
        == 0
    )


def test_a_teacher_sees_nbgrader(page: Page, tmp_path: Path) -> None:
    folder, home = tmp_path / "course", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    with serve(folder, home, teach=True) as server:
        page.goto(f"{server.url}lab?token={server.token}")
        expect(page.get_by_role("menuitem", name=NBGRADER)).to_have_count(1)
