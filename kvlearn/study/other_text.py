"""Text of another kind than the corpus, to see what a model forgot that it is trained on the corpus alone.

Converting a model does damage everywhere, and training on the corpus mends it there first. Its cost
elsewhere shows on text that neither training saw: the Python source of networkx, by other authors (torch
installs it), and English, the paragraphs in its docstrings. networkx 3.6.1 is BSD-licensed.
"""

import ast
from functools import cache

from jaxtyping import UInt8
from torch import Tensor

from kvlearn.study.text import SEPARATOR, as_tokens, source_files

NETWORKX_VERSION = "3.6.1"
CHECKSUM = "557ebc9d2b09a99a976fc19cf7609cafa1742f54cbfdf97276785b0630e52d88"


@cache
def other_texts() -> dict[str, UInt8[Tensor, "_"]]:
    """ "networkx", all of its source as it is, and "prose", the paragraphs of English in it; as bytes.

    Raises RuntimeError where the installed networkx is another version or its files have been changed.
    """
    files = source_files("networkx", NETWORKX_VERSION, CHECKSUM).values()
    prose = dict.fromkeys(paragraph for text in files for paragraph in paragraphs(text.decode()))
    return {
        "networkx": as_tokens(b"".join(SEPARATOR + text for text in files)),
        "prose": as_tokens("\n\n".join(prose).encode()),
    }


def paragraphs(source: str) -> list[str]:
    """The running text in the docstrings of ``source``: at least two lines and 120 characters, no example,
    table, list or heading."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found += (ast.get_docstring(node) or "").split("\n\n")
    return [text for text in found if _is_prose(text)]


def _is_prose(text: str) -> bool:
    lines = text.splitlines()
    indented = any(line.startswith((" ", ".")) for line in lines)
    return len(lines) > 1 and len(text) >= 120 and not indented and ">>>" not in text and "---" not in text
