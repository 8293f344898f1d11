"""The memory map shows the tables that it was given."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from kvlearn import plots
from kvlearn.plots import COLOURS
from kvlearn.serving import BlockPool, BlockTable

PAGE, MAX_LEN = 4, 24


def tables(**own: int) -> dict[str, BlockTable]:
    """Requests that start with the same eight tokens and go on with so many of their own."""
    pool, found = BlockPool(12, PAGE), {}
    for name, n in own.items():
        tokens = [0] * 8 + [ord(name[0])] * n
        found[name] = pool.open("default")
        pool.match(found[name], tokens)
        pool.reserve(found[name], len(tokens) - found[name].length)
        pool.commit(found[name], tokens[found[name].length :])
    return found


def filled(panel: object, colour: str) -> list[tuple[float, float]]:
    """Places and shares of the drawn blocks of one colour."""
    patches = [patch for patch in panel.patches if isinstance(patch, Rectangle)]  # type: ignore[attr-defined]
    of_colour = [p for p in patches if p.get_facecolor()[3] and to_hex(p.get_facecolor()) == colour.lower()]
    return [(patch.get_y() // 1 * 6 + patch.get_x(), patch.get_width()) for patch in of_colour]


def test_a_shared_block_is_drawn_once_and_a_partly_filled_one_as_far_as_it_is() -> None:
    picture = plots.memory_map(tables(ann=3, bob=6), page=PAGE, max_len=MAX_LEN)
    left, right = picture.figure.axes
    assert filled(right, COLOURS["shared"]) == [(0, 1.0), (1, 1.0)]
    assert filled(right, COLOURS["full"]) == [(2, 0.75)]
    assert filled(right, COLOURS["compressed"]) == [(3, 1.0), (4, 0.5)]
    assert filled(left, COLOURS["shared"]) == [(0, 1.0), (1, 1.0), (6, 1.0), (7, 1.0)]
    assert {text.get_text() for text in right.texts} == {"2×", "a", "b"}
    assert picture.data == {
        "filled": 25,
        "slots": 48,
        "blocks": {0: 2, 1: 2, 2: 1, 3: 1, 4: 1},
        "n_blocks": 12,
    }
    assert picture.png().startswith(b"\x89PNG")
    assert "ann 11, bob 14" in picture.alt
    assert "5 of 12 are in use, 2 of them by several requests" in picture.alt


def test_too_many_tables_and_too_long_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="length of 'ann': expected at most 8"):
        plots.memory_map(tables(ann=3), page=PAGE, max_len=8)
    with pytest.raises(ValueError, match=r"len\(tables\): expected at most 5"):
        plots.memory_map(dict.fromkeys("abcdef", tables(a=1)["a"]), page=PAGE, max_len=MAX_LEN)
