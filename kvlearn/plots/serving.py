"""The picture of chapter 09: the same requests in reserved memory and in blocks."""

from collections import Counter
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from kvlearn import validate
from kvlearn.plots.picture import COLOURS, VIOLET, Picture, drawing
from kvlearn.serving import BlockTable
from kvlearn.serving.blocks import DROPPED, blocks_for

OWNERS = (COLOURS["full"], COLOURS["compressed"], COLOURS["sliding"], COLOURS["sparse"], VIOLET)


def memory_map(tables: Mapping[str, BlockTable], *, page: int, max_len: int) -> Picture:
    """Memory of ``len(tables) · max_len`` slots, reserved per request and divided into blocks of ``page``.

    Left, each request has ``max_len`` slots of its own. Right, blocks stand in the order of their numbers;
    a block in several tables is drawn once, with how many they are. A table's name starts with a letter that
    no other has: it stands in the blocks. Raises ValueError for more tables than colours, or a sequence that
    is longer than ``max_len``, or a block that is not in this memory.
    """
    validate.positive("len(tables)", len(tables))
    validate.at_most("len(tables)", len(tables), len(OWNERS), "the colours")
    for name, table in tables.items():
        validate.at_most(f"length of {name!r}", table.length, max_len, "max_len")
    columns = blocks_for(max_len, page)
    n_blocks = columns * len(tables)
    counts = Counter(block for table in tables.values() for block in table.blocks if block != DROPPED)
    validate.at_most("a block of a table", max(counts, default=0), n_blocks - 1, "the memory that is drawn")
    colours = dict(zip(tables, OWNERS, strict=False))
    filled = sum(table.length for table in tables.values())
    owners: dict[int, tuple[str, float]] = {}  # by block: whose it is, and how much of it is filled
    with drawing(1, 2, size=(9.6, 0.42 * len(tables) + 1.5)) as (figure, (left, right)):
        for row, (name, table) in enumerate(tables.items()):
            for column in range(columns):
                share = min(max(table.length / page - column, 0.0), 1.0)
                block = table.blocks[column] if share else DROPPED
                colour = COLOURS["shared"] if counts[block] > 1 else colours[name]
                _draw_block(left, column, row, share, colour, "")
                if block != DROPPED:
                    owners.setdefault(block, (name, share))
        for block in range(n_blocks):
            name, share = owners.get(block, ("", 0.0))
            shared = counts[block] > 1
            colour = COLOURS["shared"] if shared else colours.get(name, "none")
            text = f"{counts[block]}×" if shared else name[:1]
            _draw_block(right, block % columns, block // columns, share, colour, text)
        for panel in (left, right):
            panel.set(xlim=(-0.1, columns + 0.1), ylim=(len(tables) + 0.1, -0.1), xticks=[])
            panel.grid(False)
            panel.spines[:].set_visible(False)
            panel.tick_params(length=0)
        left.set_yticks([row + 0.5 for row in range(len(tables))], tables)
        right.set_yticks([])
        left.set_title(f"{max_len:,} slots reserved for each", fontsize=10)
        right.set_title(f"the same memory in blocks of {page}", fontsize=10)
        left.set_xlabel(f"{filled:,} of {n_blocks * page:,} slots have a token")
        right.set_xlabel(f"{len(counts)} of {n_blocks} blocks are in use")
        handles = [
            Patch(color=COLOURS["shared"], label="the same tokens in several requests"),
            *(Patch(color=colour, label=f"{name} alone") for name, colour in colours.items()),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3))
    in_several = [block for block, count in counts.items() if count > 1]
    told = ", ".join(f"{name} {table.length}" for name, table in tables.items())
    alt = (
        f"Memory of {n_blocks * page:,} slots for requests of different lengths, in tokens: {told}. "
        f"Left, {max_len:,} slots are reserved for each, and {filled:,} are filled. Right, blocks of {page}: "
        f"{len(counts)} of {n_blocks} are in use, {len(in_several)} of them by several requests."
    )
    data = {"filled": filled, "slots": n_blocks * page, "blocks": dict(counts), "n_blocks": n_blocks}
    return Picture(figure, alt, data)


def _draw_block(panel: Axes, x: int, y: int, share: float, colour: str, text: str) -> None:
    """A block's outline, the part of it that holds tokens, and a short text."""
    if share:
        panel.add_patch(Rectangle((x, y + 0.06), share, 0.88, fc=colour, ec="none"))
    panel.add_patch(Rectangle((x, y + 0.06), 1, 0.88, fc="none", ec="#8a8a8a", lw=0.6))
    if text:
        ink = "black" if colour == COLOURS["shared"] else "white"
        panel.text(x + share / 2, y + 0.5, text, ha="center", va="center", fontsize=7, color=ink)
