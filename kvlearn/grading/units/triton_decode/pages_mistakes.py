"""11.6: the mistakes that people make with page tables, as short PyTorch emulations."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlearn.grading.units.triton_decode.kernels import BLOCK
from kvlearn.grading.units.triton_decode.pages import EXERCISE

__all__ = ["EXERCISE"]

# (table, b, g, n, page, G) -> the number of the (page, head, slot) in the flattened pool, for the keys n
Walk = Callable[[Tensor, int, int, Tensor, int, int], Tensor]


def entry(table: Tensor, row: int, index: Tensor) -> Tensor:
    """Entries of the table, which is one piece of memory: behind a row stands the next."""
    at = row * table.shape[1] + index
    if int(at.max()) >= table.numel():
        raise IndexError("a read behind the table")
    return table.flatten()[at].long()


def right(table: Tensor, b: int, g: int, n: Tensor, page: int, G: int) -> Tensor:
    return (entry(table, b, n // page) * G + g) * page + n % page


def through(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, walk: Walk, ends: Tensor | None = None
) -> Tensor:
    """Attention to the keys where ``walk`` finds them, up to ``ends`` (the lengths) in each row."""
    _, G, page, D = k.shape
    keys, values, rows = k.reshape(-1, D), v.reshape(-1, D), []
    for b, end in enumerate((lengths if ends is None else ends).tolist()):
        for g in range(G):
            at = walk(table, b, g, torch.arange(end, device=q.device), page, G)
            if int(at.max()) >= len(keys) or int(at.min()) < 0:
                raise IndexError("a read behind the pool")
            scores = keys[at] @ q[b, g] * D**-0.5
            weights = (scores - scores.max()).exp()
            rows.append(weights @ values[at] / weights.sum())
    return torch.stack(rows).view_as(q)


@EXERCISE.misconception("page and slot swapped")
def swapped(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """n % PAGE was taken for the page and n // PAGE for the slot. Neighbouring keys stand on the *same*
    page: the page is n // PAGE, which changes rarely, the slot is n % PAGE."""
    return through(
        q,
        k,
        v,
        table,
        lengths,
        lambda t, b, g, n, page, G: (entry(t, b, n % page) * G + g) * page + n // page,
    )


@EXERCISE.misconception("logical pages taken for physical ones")
def untranslated(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """n // PAGE counts the pages of the *sequence*. Where its page number 3 stands in the pool is what the
    table says; only a sequence that was there first has them in order. Look it up."""
    return through(q, k, v, table, lengths, lambda t, b, g, n, page, G: (n // page * G + g) * page + n % page)


@EXERCISE.misconception("every sequence reads the first one's table")
def first_row(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """The row of the table is missing, so all sequences walk through the pages of the first: one reads
    another's context, and that is a leak, not only a wrong number. Entry j of row b stands at b ·
    max_pages + j."""
    return through(q, k, v, table, lengths, lambda t, b, g, n, page, G: right(t, 0, g, n, page, G))


@EXERCISE.misconception("the table's rows one entry apart")
def row_stride(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """The table was read at `TABLE + b + …`. It is (B, max_pages): from one sequence's row to the next it is
    max_pages entries."""

    def walk(table: Tensor, b: int, g: int, n: Tensor, page: int, G: int) -> Tensor:
        return (entry(table, 0, n // page + b) * G + g) * page + n % page

    return through(q, k, v, table, lengths, walk)


@EXERCISE.misconception("one page for the whole tile")
def one_page(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """The page was looked up once for the tile, at its first key. That is right as long as a page is a
    whole number of tiles; with smaller pages a tile spans several, and every key needs its own entry:
    load a tile of entries, `TABLE + b * max_pages + n // PAGE`."""

    def walk(table: Tensor, b: int, g: int, n: Tensor, page: int, G: int) -> Tensor:
        return (entry(table, b, n // BLOCK * BLOCK // page) * G + g) * page + n % page

    return through(q, k, v, table, lengths, walk)


@EXERCISE.misconception("the last page counts whole")
def whole_page(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Every slot of the last page has a weight, also those that hold no key yet (or an earlier owner's). The
    mask is `n < length`; pages are how memory is handed out, not how long a sequence is."""
    page = k.shape[2]
    ends = torch.minimum((lengths + page - 1) // page * page, (lengths + BLOCK - 1) // BLOCK * BLOCK)
    return through(q, k, v, table, lengths, right, ends)


@EXERCISE.misconception("a page has one head's size")
def page_stride(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """The stride from page to page was taken as PAGE · D. A page of this pool holds all KV heads, (G,
    PAGE, D), so the next one is G · PAGE · D numbers further."""

    def walk(table: Tensor, b: int, g: int, n: Tensor, page: int, G: int) -> Tensor:
        return (entry(table, b, n // page) + g) * page + n % page

    return through(q, k, v, table, lengths, walk)


@EXERCISE.misconception("the KV head is missing")
def first_head(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Every program reads the keys of KV head 0. Inside a page the heads stand one after the other, PAGE · D
    numbers apart: add `g * PAGE * D`."""
    return through(q, k, v, table, lengths, lambda t, b, g, n, page, G: right(t, b, 0, n, page, G))


@EXERCISE.misconception("slots before heads")
def transposed(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """The pool was read as (blocks, PAGE, G, D): one slot further G · D, one head further D. Here a head's
    keys stand together, (blocks, G, PAGE, D), so that a tile is one long stretch of memory."""

    def walk(table: Tensor, b: int, g: int, n: Tensor, page: int, G: int) -> Tensor:
        return (entry(table, b, n // page) * page + n % page) * G + g

    return through(q, k, v, table, lengths, walk)


@EXERCISE.misconception("the page in the tile looked up by its index")
def tile_index(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """The place in the tile, 0 to 15, went into the division in place of the key's number, so every tile
    reads the first pages again. A key's number is `n = start + tl.arange(0, BLOCK)`."""

    def walk(table: Tensor, b: int, g: int, n: Tensor, page: int, G: int) -> Tensor:
        return right(table, b, g, n % BLOCK, page, G)

    return through(q, k, v, table, lengths, walk)


@EXERCISE.misconception("one key too many")
def too_many(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """The mask is n <= length. Keys are numbered from 0, so key number `length` is the first one that is not
    there."""
    ends = torch.minimum(lengths + 1, (lengths + BLOCK - 1) // BLOCK * BLOCK)
    return through(q, k, v, table, lengths, right, ends)


@EXERCISE.misconception("the whole last tile counts")
def whole_tile(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Every key of the last tile has a weight, though the sequence ends inside it: what the table says
    behind the last page is followed too. The mask is `n < length`."""
    return through(q, k, v, table, lengths, right, (lengths + BLOCK - 1) // BLOCK * BLOCK)
