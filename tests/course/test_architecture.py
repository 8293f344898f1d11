"""The house keeps its shape: imports go one way, the library asks for little, no file names one machine."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hops import BARS, chain, trace

from kvlearn.attention import REGISTRY
from kvlearn.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kvlearn"
# A room may import those before it; rooms on one step do not know each other.
STEPS = [
    {"validate", "extras", "files", "html", "jupyter"},
    {"attention"},
    {"kernels"},
    {"model", "teaching"},
    {"parallel", "serving"},
    {"measure"},
    {"bench", "study"},
    {"verdict"},
    {"plots"},
    {"grading"},
    {"workbench", "glossary", "integrations"},
    {"cli"},
]
STEP = {room: step for step, rooms in enumerate(STEPS) for room in rooms}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, *, lazy: bool) -> Iterator[str]:
    """Dotted names that a file imports; `lazy` counts the imports inside functions as well."""
    package = path.relative_to(ROOT).parent.parts
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes.extend(ast.iter_child_nodes(node))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_one_way() -> None:
    wrong = []
    for path in SOURCES:
        room = room_of(path)
        if room in {"__init__", "__main__"}:
            continue  # the top package may import every layer
        assert room in STEP, f"kvlearn/{room} has no place in the order of rooms"
        for name in imports(path, lazy=True):
            top, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if top != "kvlearn" or other in {room, "", "__version__"}:
                continue
            if other not in STEP:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}: import it from its own room")
            elif STEP[other] >= STEP[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}, of a later room")
    assert not wrong


def test_units_use_the_front_of_grading_and_no_room_knows_a_unit() -> None:
    names = {path: list(imports(path, lazy=True)) for path in ROOT.glob("solutions/*/*.py")}
    assert names
    for path, imported in names.items():
        for name in imported:
            assert not re.match(r"kvlearn\.grading\.\w+\.", name), f"{path.relative_to(ROOT)} imports {name}"
    for path in SOURCES:
        for name in imports(path, lazy=True):
            assert not name.startswith(("kvlearn_units", "solutions")), f"{path.name} imports {name}"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_library_imports_only_what_it_requires() -> None:
    """So `bench` runs wherever torch does; grading touches notebooks, a test below sees to its front."""
    required = {re.split(r"\W", line)[0] for line in PROJECT["dependencies"]}
    assert required == {"torch", "numpy", "jaxtyping", "psutil", "rich", "safetensors", "typer"}
    allowed = required | {"kvlearn"} | sys.stdlib_module_names
    extras = {"plots": {"matplotlib"}, "kernels": {"triton"}, "teaching": {"triton"}}
    extras["integrations"] = {"transformers"}
    for path in SOURCES:
        room = room_of(path)
        foreign = {name.split(".")[0] for name in imports(path, lazy=False)} - allowed
        foreign -= extras.get(room, set())
        assert not foreign or room == "grading", f"{path.relative_to(ROOT)} imports {foreign}"


def test_what_only_a_part_needs_is_in_the_extra_that_errors_name() -> None:
    extras = PROJECT["optional-dependencies"]
    brought = {extra: {re.split(r"[^\w-]", line)[0] for line in lines} for extra, lines in extras.items()}
    for package, extra in EXTRAS.items():
        assert package in brought[extra] or package == "IPython"  # ipykernel brings it
    assert "kvlearn[kernels,plots,study]" in extras["lab"]
    assert "kvlearn[hf]" in extras["test"]


def test_the_library_works_without_the_extras_and_names_what_is_missing() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({[*EXTRAS, "einops", "pytest"]}))  # imports raise ImportError
import importlib, torch
import kvlearn.cli, kvlearn.attention, kvlearn.bench, kvlearn.parallel, kvlearn.serving, kvlearn.study
from kvlearn.kernels import decode_attention
from kvlearn.measure.doctor import software
from kvlearn.model import Decoder, ModelConfig, from_transformers
software()
decoder = Decoder(ModelConfig(d_model=32, n_layers=2, n_heads=2, layers=["gqa", "mamba2"]))
assert decoder.generate(torch.zeros(1, 3, dtype=torch.long), 2).shape == (1, 5)
cache, lengths = torch.ones(1, 1, 4, 16), torch.tensor([3], dtype=torch.int32)
step = decode_attention(torch.ones(1, 2, 16), cache, cache, lengths)
assert step.allclose(torch.ones(1))
import pathlib, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "config.json").write_text('{{"model_type": "llama"}}')
for name, call in {{
    "plots": lambda: importlib.import_module("kvlearn.plots"),
    "study": lambda: kvlearn.study.text.corpus(),
    "hf": lambda: from_transformers(folder),
    "kernels": lambda: importlib.import_module("kvlearn.kernels.stages").STAGES["v0"].decode,
    "lab": lambda: kvlearn.measure.calculator(),
}}.items():
    try:
        call()
    except (ImportError, RuntimeError) as error:
        assert f"pip install 'kvlearn[{{name}}]'" in str(error), error
    else:
        raise AssertionError(name)
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_command_line_starts_without_notebook_packages() -> None:
    code = """
import sys
names = ["IPython", "ipykernel", "ipywidgets", "jupyter_client", "jupyterlab", "nbclient", "nbconvert",
         "nbformat", "nbgrader", "playwright", "pytest", "transformers"]
sys.modules.update(dict.fromkeys(names))  # importing any of these raises ImportError
import kvlearn.grading, kvlearn.cli
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr


# In pieces, so that this file does not find itself.
HOSTS = [
    "pypi" + ".org",
    "python" + "hosted",
    "download.py" + "torch",
    "npm" + "js.",
    "ana" + "conda.",
    "deb" + "ian.org",
]
FOLDERS = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "/Us" + "ers/", "/tm" + "p/v", "/opt" + "/"]


def tracked() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_names_a_registry_or_a_machine() -> None:
    # A folder starts a word; `and/or/` or a URL's own path is none.
    pattern = re.compile(
        "|".join([*map(re.escape, HOSTS), *(rf"(?<![\w.:/])/?{re.escape(f)}" for f in FOLDERS)])
    )
    for path in tracked():
        text = path.read_bytes().decode(errors="ignore") if path.name != "LICENSE" else ""
        found = pattern.search(text)
        assert found is None, f"{path.relative_to(ROOT)} holds {found.group()!r}" if found else ""


@pytest.mark.parametrize("name", sorted(BARS))
def test_a_reader_of_a_mechanism_opens_few_files(name: str) -> None:
    assert len(trace(name).files) <= BARS[name], sorted(trace(name).files)
    chain_in_this_file = [kind for kind in chain(name) if kind != "Mechanism"]
    assert len(chain_in_this_file) <= 2


def test_a_mechanism_file_holds_its_forward_its_naive_form_and_its_cache() -> None:
    """Inherited, if at all, from another class of the same file."""
    shared_caches = {"base", "recurrent"}  # the plain KV cache, the state
    for name, kind in REGISTRY.items():
        for method in ("forward", "naive", "new_cache", "cache_bytes", "read_bytes"):
            assert getattr(kind, method).__module__ == kind.__module__, f"{name}.{method}"
        cache = type(kind.tiny().new_cache(1, 4)).__module__
        # A sparse pattern's cache follows from the pattern, and is in the same file.
        home = {kind.__module__, *(f"kvlearn.attention.{room}" for room in shared_caches)}
        allowed = home | {
            "mhc": {"kvlearn.attention.mla"},
            "mhc_transformer": {"kvlearn.attention.mla"},
            "released": {"kvlearn.attention.window"},
            "sparse": {"kvlearn.attention.patterns"},
        }.get(name, set())
        assert cache in allowed, f"{name}: its cache is in {cache}"
