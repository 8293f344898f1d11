"""Packages that only a part of kvlearn needs, each installed by an extra: ``pip install 'kvlearn[plots]'``.

attention, kernels' PyTorch form, model, parallel, serving and measure need none of them.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

EXTRAS = {
    "triton": "kernels",
    "matplotlib": "plots",
    "sympy": "study",
    "tqdm": "study",
    "transformers": "hf",
    "ipywidgets": "lab",
    "IPython": "lab",
    "nbclient": "lab",
    "nbformat": "lab",
}


def require(package: str, why: str) -> None:
    """Raise ModuleNotFoundError that names the extra which brings ``package``, where it is not installed.

    ``why`` begins the message: what it was that needs the package.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{why} needs {package}, which is not installed: pip install 'kvlearn[{EXTRAS[package]}]'",
            name=package,
        )


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm's bar for a terminal or a notebook, with tqdm's own options."""
    require("tqdm", "the progress of a run")
    from tqdm.auto import tqdm

    return tqdm(iterable, **options)
