"""Sentences of the pattern language: how they are read, and the published ones.

    local(128) | strided(128)                                                   Sparse Transformer
    local(512) | global(2)                                                      Longformer
    local(128, block=64) | global(64) | random(3, skip_first=1, skip_last=1)    BigBird

Words are those of words.py, joined by ``|``; options may be named.
"""

import ast
from dataclasses import fields
from functools import reduce
from operator import or_
from typing import Any

from kvlearn import validate
from kvlearn.attention.sparse.pattern import Pattern
from kvlearn.attention.sparse.words import Fixed, Global, Local, Random, Strided

WORDS: dict[str, type[Pattern]] = {
    kind.__name__.lower(): kind for kind in (Local, Strided, Fixed, Global, Random)
}


def parse(sentence: str | Pattern) -> Pattern:
    """The pattern that a sentence says, as ``str`` writes it; a pattern is given back as it is.

    Raises ValueError that names the word that is not understood.
    """
    if isinstance(sentence, Pattern):
        return sentence
    return reduce(or_, map(_word, validate.instance("pattern", sentence, str).split("|")))


def _word(text: str) -> Pattern:
    name, _, options = text.strip().partition("(")
    kind = WORDS[validate.one_of("pattern", name, WORDS)]
    known = ", ".join(f.name for f in fields(kind))  # type: ignore[arg-type]
    not_understood = f"pattern: {text.strip()!r} is not understood; {name} takes {known}"
    try:
        given, named = _options(options)
    except (SyntaxError, ValueError) as error:
        raise ValueError(not_understood) from error
    try:
        return kind(*given, **named)
    except TypeError as error:
        raise ValueError(f"{not_understood}: {error}") from error


def _options(text: str) -> tuple[list[Any], dict[str, Any]]:
    """What stands behind a word's opening bracket, up to the closing one: literals, and named literals."""
    call = ast.parse(f"word({text}", mode="eval").body
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise ValueError("expected one pair of brackets")
    given = [ast.literal_eval(value) for value in call.args]
    return given, {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}


def sparse_transformer(stride: int) -> Pattern:
    """The last ``stride`` tokens, and every ``stride``-th before: O(N · (stride + N / stride)).

    With a stride near √N that is O(N√N). Source: Child et al., "Sparse Transformers" (2019), section 4.3
    (strided).
    """
    return Local(stride) | Strided(stride)


def sparse_transformer_fixed(block: int, summary: int) -> Pattern:
    """A token's own block, and the last ``summary`` tokens of each before: as many as above, if block ≈ √N.

    Source: Child et al., "Sparse Transformers" (2019), section 4.3 (fixed).
    """
    return Fixed(block, summary)


def longformer(window: int, n_global: int) -> Pattern:
    """A window and some global tokens: O(N · (window + n_global)).

    ``window`` counts the tokens behind and the query's own; the paper's encoder looks as far ahead again.
    Source: Beltagy et al., "Longformer" (2020), section 3.1.
    """
    return Local(window) | Global(n_global)


def bigbird(block: int, n_random: int, *, n_window: int = 1, n_global: int = 1, seed: int = 0) -> Pattern:
    """A window, global and random tokens, in blocks: O(N · block · (n_window + n_global + n_random)).

    A query block sees itself, ``n_window`` blocks before it, the first ``n_global`` and ``n_random`` drawn
    from the rest. Source: Zaheer et al., "Big Bird" (2020), section 2 and appendix D (blocks).
    """
    near, wide = Local((n_window + 1) * block, block), Global(n_global * block)
    return near | wide | Random(n_random, block, n_global, n_window, seed)
