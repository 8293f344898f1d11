"""11.6: decode through a page table, held against attention to the same keys laid out in a row."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.units.triton_decode.kernels import BLOCK, NAN, READY_MADE, attend, run

EXERCISE = Exercise(
    id="11.6",
    slug="pages",
    title="Walk the page table",
    answers=("paged_attention",),
    forbidden=READY_MADE,
    hints=(
        "A key's number splits into two: `n // PAGE` says which of the sequence's pages it is on, `n % PAGE` "
        "which slot of that page.",
        "The table translates: `page = tl.load(TABLE + b * max_pages + n // PAGE, mask=live, other=0)`, one "
        "entry for each key of the tile. A tile may span several pages, and pages may span several tiles.",
        "The pool has the shape (blocks, G, PAGE, D). One page further is G · PAGE · D numbers, one KV head "
        "further PAGE · D, one slot further D: `((page * G + g) * PAGE + n % PAGE) * D`.",
        "Mask the *table's* load with `n < length` too: entries behind the last page may hold anything, and"
        " a pointer made from one of them points anywhere.",
    ),
)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def draw(
    t: Trial,
    lengths: list[int],
    page: int,
    *,
    shuffled: bool = True,
    behind: float | None = None,
    stray: int = 0,
    width: int = 32,
) -> Inputs:
    """q (B, G, D), pools (blocks, G, page, D), table (B, width), lengths (B,).

    ``behind`` fills the slots of a row's last page that hold no keys; ``stray`` stands in the table behind
    it.
    """
    B, G, D = len(lengths), 2, t.pick(8, 32)
    needed = [-(-length // page) for length in lengths]
    blocks = sum(needed) + 2
    k, v = t.randn(blocks, G, page, D), t.randn(blocks, G, page, D)
    order = torch.randperm(blocks, generator=t.generator) if shuffled else torch.arange(blocks)
    table = torch.full((B, width), stray, dtype=torch.int32)
    for b, (length, n) in enumerate(zip(lengths, needed, strict=True)):
        table[b, :n] = order[sum(needed[:b]) : sum(needed[: b + 1])]
        if behind is not None and length % page:
            k[table[b, n - 1], :, length % page :] = v[table[b, n - 1], :, length % page :] = behind
    return 2 * t.randn(B, G, D), k, v, table, torch.tensor(lengths, dtype=torch.int32)


def in_a_row(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    rows = []
    for b, length in enumerate(lengths.tolist()):
        pages = table[b, : -(-length // k.shape[2])].tolist()
        for g in range(k.shape[1]):
            keys, values = (torch.cat([pool[page, g] for page in pages])[:length] for pool in (k, v))
            rows.append(attend(q[b, g], keys, values))
    return torch.stack(rows).view_as(q)


def same(t: Trial, paged_attention: Answer, inputs: Inputs) -> None:
    t.close(run(paged_attention, *inputs), in_a_row(*inputs))


@EXERCISE.requirement(1, "one sequence, its pages in order", rounds=1)
def in_order(t: Trial, paged_attention: Answer) -> None:
    """attention to the keys of its pages, (B, G, D), with pages of 16, as large as a tile"""
    same(t, paged_attention, draw(t, [2 * BLOCK], BLOCK, shuffled=False))


@EXERCISE.requirement(2, "pages in any order, two sequences", rounds=2)
def any_order(t: Trial, paged_attention: Answer) -> None:
    """the same where a sequence's pages are scattered over the pool, each row with a table of its own; inputs
    unchanged"""
    same(t, paged_attention, draw(t, [2 * BLOCK, BLOCK], BLOCK))
    t.unchanged()


@EXERCISE.requirement(1, "pages smaller and larger than a tile", rounds=2)
def other_sizes(t: Trial, paged_attention: Answer) -> None:
    """the same with pages of 4, 6 or 32 keys: a tile spans several pages, or a page several tiles"""
    page = 32 if t.round == 1 else t.pick(4, 6)
    same(t, paged_attention, draw(t, [24, 12] if page < BLOCK else [64, 32], page))


@EXERCISE.requirement(1, "a last page that is not full", rounds=2)
def partial_page(t: Trial, paged_attention: Answer) -> None:
    """slots without a key have no weight, whatever stands in them"""
    page, behind = ((BLOCK, 50.0), (8, NAN))[t.round]
    same(t, paged_attention, draw(t, [t.integer(BLOCK + 1, BLOCK + 7), 2 * BLOCK], page, behind=behind))


@EXERCISE.requirement(1, "entries behind the last page", rounds=2)
def stray_entries(t: Trial, paged_attention: Answer) -> None:
    """the table's entries behind a row's last page may hold anything, −1 or a billion, and nobody follows
    them; nothing is read behind the table's own end"""
    stray, width = (t.pick(-1, 10**9), 32) if t.round == 0 else (0, 5)
    same(t, paged_attention, draw(t, [t.integer(2, 6), t.integer(18, 20)], 4, stray=stray, width=width))
