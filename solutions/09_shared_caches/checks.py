"""Unit 09: requirements and hints of the exercises on shared caches."""

import functools
import hashlib
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlearn import workbench
from kvlearn.attention.core import causal_attention, merge_heads, split_heads
from kvlearn.grading import (
    Answer,
    CheckContext,
    Difference,
    Exercise,
    Raised,
    Stop,
    describe,
    judge,
    plain_number,
    shorten,
)


def plain(value: Any) -> Any:
    """Tensors, arrays, tuples and numbers of any library as lists and numbers of Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(each) for each in value]
    number = plain_number(value)
    return value if number is None else number


def same(t: CheckContext, got: Any, want: Any, what: str) -> bool:
    """Equal as plain Python objects; noted as text, so that two wrong answers are told apart."""
    seen = plain(got)
    good = seen == plain(want)
    return t.note(
        shorten(repr(seen), 400), None if good else Difference(what, shorten(f"{want}", 120), brief(seen))
    )


def brief(value: Any) -> str:
    if isinstance(value, list | dict | set | str | int | float):
        return shorten(repr(value), 120)
    return describe(value)


def without_error(t: CheckContext, call: Callable[[], Any], what: str) -> Any:
    """The result of ``call``, or the end of this round."""
    try:
        return call()
    except Raised as error:
        t.note(type(error.error).__name__, Difference(what, "no exception", error.what))
        raise Stop from None


def blocks_of(n_tokens: int, page: int) -> int:
    """Counted one by one."""
    return len(range(0, n_tokens, page))


def drawn_tables(t: CheckContext, lengths: Sequence[int], page: int, spare: int = 0) -> list[list[int]]:
    """Tables of different blocks in a drawn order, with ``spare`` more than these tokens need."""
    wanted = [blocks_of(n, page) + spare for n in lengths]
    blocks = t.random.sample(range(sum(wanted) + 4), sum(wanted))
    return [[blocks.pop() for _ in range(n)] for n in wanted]


# 09.1: slots, compared with loops over tokens

tables = Exercise(
    id="09.1",
    slug="tables",
    title="Page tables for ragged rows",
    answers=("blocks_needed", "slot_mapping", "write", "read"),
    hints=(
        "With page = 4, in which block of its table is position 7, and at which place? And where is the "
        "first new token of a sequence that has 8 tokens already?",
        "`blocks_needed`: blocks before and blocks afterwards, each rounded up; the difference is what is "
        "needed. Empty places are those of all blocks minus all tokens.",
        "`slot_mapping`, in pseudocode: for each sequence: for each position from its length to its length "
        "+ new: block = table[position // page]; slot = block · page + position % page.",
        "`write`: a negative index counts from the end in PyTorch, so the row of slot −1 would go to the "
        "last place of the last block. Select the rows whose slot is not negative before you write.",
        "`read`: `pages[blocks]` is (P, G, page, D). The heads have to come to the front before blocks and "
        "places are joined: `.transpose(0, 1).flatten(1, 2)`; then cut at the length.",
    ),
)


def library_needed(lengths: Sequence[int], new: Sequence[int], page: int) -> tuple[list[int], int]:
    further, empty = [], 0
    for old, more in zip(lengths, new, strict=True):
        further.append(blocks_of(old + more, page) - blocks_of(old, page))
        empty += page * blocks_of(old + more, page) - old - more
    return further, empty


def library_slots(
    tables: Sequence[Sequence[int]], lengths: Sequence[int], new: Sequence[int], page: int
) -> Tensor:
    places = [[(block, place) for block in table for place in range(page)] for table in tables]
    found = [row[n : n + more] for row, n, more in zip(places, lengths, new, strict=True)]
    return torch.tensor([block * page + place for row in found for block, place in row], dtype=torch.long)


def library_write(pages: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    pages, page = pages.clone(), pages.shape[2]
    for slot, row in zip(slots.tolist(), rows, strict=True):
        if slot >= 0:
            pages[slot // page, :, slot % page] = row
    return pages


def library_read(pages: Tensor, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
    n_heads, page, width = pages.shape[1:]
    out = pages.new_zeros(len(tables), n_heads, max(lengths), width)
    for row, (table, n) in enumerate(zip(tables, lengths, strict=True)):
        for i in range(blocks_of(n, page)):
            stop = min(n, (i + 1) * page)
            out[row, :, i * page : stop] = pages[table[i], :, : stop - i * page]
    return out


@tables.requirement(1, "blocks_needed")
def tables_needed(t: CheckContext, blocks_needed: Answer, *others: Answer) -> None:
    """blocks rounded up, before and afterwards; all empty places of the step's end"""
    page = t.pick(3, 4, 5)
    rows = [(2 * page, page), (page + 1, 2 * page), (3 * page - 1, 1), (0, 2), (page, 0)]
    rows += [(t.integer(1, 40), t.integer(1, 20)) for _ in range(3)]
    t.random.shuffle(rows)
    lengths, new = map(list, zip(*rows, strict=True))
    got = t.parts(blocks_needed(lengths, new, page), 2, "a pair (further, empty)")
    want = library_needed(lengths, new, page)
    same(t, got[0], want[0], "further blocks:")
    same(t, got[1], want[1], "empty places:")


def slots_are(t: CheckContext, slot_mapping: Answer, lengths: list[int], new: list[int], page: int) -> None:
    drawn = drawn_tables(t, [n + more for n, more in zip(lengths, new, strict=True)], page, spare=1)
    t.close(slot_mapping(drawn, lengths, new, page), library_slots(drawn, lengths, new, page))


@tables.requirement(1, "slots in decode")
def tables_decode(t: CheckContext, blocks_needed: Answer, slot_mapping: Answer, *others: Answer) -> None:
    """one new token of each sequence, behind its cached ones, in its own block"""
    page = t.pick(3, 4, 5)
    lengths = [2 * page, 3 * page - 1, t.integer(1, page - 1), t.integer(page + 1, 30)]
    slots_are(t, slot_mapping, lengths, [1] * 4, page)


@tables.requirement(1, "slots of ragged rows")
def tables_ragged(t: CheckContext, blocks_needed: Answer, slot_mapping: Answer, *others: Answer) -> None:
    """chunks, single tokens and none, one sequence after the other; a chunk goes on from block to block"""
    page = t.pick(3, 4, 5)
    lengths = [page + 1, 0, t.integer(1, 20), 2 * page]
    slots_are(t, slot_mapping, lengths, [2 * page + 1, page + 2, 0, 1], page)


def drawn_pages(t: CheckContext, drawn: Sequence[Sequence[int]], page: int) -> Tensor:
    """Pages full of numbers, also where no table is."""
    n_blocks = max([0, *(block for table in drawn for block in table)]) + 2
    G, D = t.pick((2, 5), (3, 6), (6, 7))
    return t.randn(n_blocks, G, page, D)


@tables.requirement(1, "write")
def tables_write(t: CheckContext, blocks_needed: Answer, slot_mapping: Answer, write: Answer, _: Any) -> None:
    """each row in its slot, all heads; everything else and the input as it was"""
    page = t.pick(3, 4, 5)
    pages = drawn_pages(t, [[6]], page)
    slots = torch.tensor([*t.random.sample(range(1, pages.shape[0] * page), 6), 0])
    rows = t.randn(7, pages.shape[1], pages.shape[3])
    t.close(write(pages, slots, rows), library_write(pages, slots, rows))
    t.unchanged()


@tables.requirement(1, "write: padding")
def tables_padding(
    t: CheckContext, blocks_needed: Answer, slot_mapping: Answer, write: Answer, _: Any
) -> None:
    """the rows of slot −1 are written nowhere"""
    page = t.pick(3, 4, 5)
    pages = drawn_pages(t, [[6]], page)
    slots = torch.tensor([-1, *t.random.sample(range(1, (pages.shape[0] - 1) * page), 4), -1])
    rows = t.randn(6, pages.shape[1], pages.shape[3])
    t.close(write(pages, slots, rows), library_write(pages, slots, rows))


@tables.requirement(1, "read: one sequence")
def tables_read_one(t: CheckContext, *answers: Answer) -> None:
    """its tokens in the order of its table, heads in front"""
    page = t.pick(3, 4, 5)
    lengths = [2 * page + 1 if t.round == 0 else t.integer(page + 1, 30)]
    drawn = drawn_tables(t, lengths, page)
    pages = drawn_pages(t, drawn, page)
    t.close(answers[3](pages, drawn, lengths), library_read(pages, drawn, lengths))


@tables.requirement(2, "read: ragged rows")
def tables_read(t: CheckContext, *answers: Answer) -> None:
    """as long as the longest, 0 past the length of each; reserved blocks and an empty sequence too"""
    page = t.pick(3, 4, 5)
    lengths = [t.integer(1, page - 1), 3 * page + 1, 2 * page, 0 if t.round else page + 2]
    drawn = drawn_tables(t, lengths, page, spare=1)
    pages = drawn_pages(t, drawn, page)
    t.close(answers[3](pages, drawn, lengths), library_read(pages, drawn, lengths))


# 09.2: copy-on-write, compared with sequences that share nothing

cow = Exercise(
    id="09.2",
    slug="cow",
    title="Copy-on-write",
    answers=("fork_table", "write_plan", "append"),
    hints=(
        "A parent has 6 tokens in two blocks of 4 and is forked. Which of the two blocks will the next "
        "token change, and whom would that hurt? Does it matter which of the two sequences writes first?",
        "Which entries of the table are written to? From the block of position `length` to that of position "
        "`length + n − 1`. Only those can need a copy.",
        "In pseudocode: for each such entry that is in the table: if its block is shared: replace it; kept = "
        "tokens before `length` that lie in it (0 if there are none). Entries past the end of the table: new "
        "blocks.",
        "`append`: count what you need before you change anything. Then for each replaced entry: take a free "
        "block, copy the kept tokens, one reference less for the old block, one for the new. Then the new "
        "blocks, then the rows.",
        "When the first of two sequences has its copy, the other is alone with the old block, and may write "
        "into it as it is. That follows from the references by itself, if you count the old block down.",
    ),
)


def library_fork(table: Sequence[int], length: int, page: int) -> list[int]:
    return [block for i, block in enumerate(table) if i * page < length]


def library_plan(
    table: Sequence[int], length: int, n: int, page: int, references: Any
) -> tuple[list[tuple[int, int]], int]:
    written = sorted({position // page for position in range(length, length + n)})
    inside = [i for i in written if i < len(table)]
    replace = [
        (i, sum(position // page == i for position in range(length)))
        for i in inside
        if references[table[i]] > 1
    ]
    return replace, len(written) - len(inside)


def plan_is(
    t: CheckContext, write_plan: Answer, table: list[int], length: int, n: int, page: int, shared: set[int]
) -> None:
    """The plan where the blocks of these entries are shared."""
    references = [t.integer(2, 3) for _ in range(40)]
    for i, block in enumerate(table):
        references[block] = 2 + t.round % 2 if i in shared else 1
    got = t.parts(write_plan(table, length, n, page, references), 2, "a pair (replace, n_new)")
    want = library_plan(table, length, n, page, references)
    replace = sorted(map(tuple, got[0])) if isinstance(got[0], list | tuple) else got[0]
    same(t, replace, want[0], "entries to replace:")
    same(t, got[1], want[1], "new blocks:")


@cow.requirement(1, "fork_table", rounds=4)
def cow_fork(t: CheckContext, fork_table: Answer, *others: Answer) -> None:
    """all blocks with tokens, the last one too if it is partly full; no reserved ones"""
    page = t.pick(3, 4, 5, 6)
    length = (2 * page, 2 * page + 1, 3 * page - 1, 0)[t.round]
    table = t.random.sample(range(40), blocks_of(length, page) + 2)
    same(t, fork_table(table, length, page), library_fork(table, length, page), "the table:")


@cow.requirement(1, "write_plan: nothing shared", rounds=4)
def cow_alone(t: CheckContext, fork_table: Answer, write_plan: Answer, append: Answer) -> None:
    """nothing is replaced; new blocks only for what does not fit into the table"""
    page = t.pick(3, 4, 5, 6)
    length, n, spare = ((2 * page, 1, 0), (page + 1, page - 1, 0), (page + 1, 2 * page, 0), (4, 2, 2))[
        t.round
    ]
    table = t.random.sample(range(40), blocks_of(length, page) + spare)
    plan_is(t, write_plan, table, length, n, page, set())


@cow.requirement(1, "write_plan: a shared prefix", rounds=4)
def cow_prefix(t: CheckContext, fork_table: Answer, write_plan: Answer, append: Answer) -> None:
    """only the block that is written to, with the tokens that are in it; full blocks before it stay shared"""
    page = t.pick(3, 4, 5, 6)
    length = (2 * page + 1, 3 * page - 1, 2 * page, 3 * page - 1)[t.round]
    n = (1, 3, 2, 1)[t.round]
    table = t.random.sample(range(40), blocks_of(length, page))
    plan_is(t, write_plan, table, length, n, page, set(range(len(table))))


@cow.requirement(1, "write_plan: shared blocks past the last token", rounds=2)
def cow_reserved(t: CheckContext, fork_table: Answer, write_plan: Answer, append: Answer) -> None:
    """replaced where they are written to, with nothing kept; others stay"""
    page = t.pick(3, 4, 5)
    length = page + 1 if t.round else 2 * page
    table = t.random.sample(range(40), 5)
    plan_is(t, write_plan, table, length, page, page, set(range(5)))


class Given(list[int]):
    """A list that an answer is handed itself and no copy of it, so that a change is seen."""


class Family:
    """Sequences that share blocks through ``append``, and what each of them must hold."""

    def __init__(self, t: CheckContext, append: Answer, n_blocks: int, page: int) -> None:
        self.t, self.append, self.page = t, append, page
        self.pages = t.randn(n_blocks, page, 3)
        self.references, self.free = [0] * n_blocks, list(range(n_blocks))
        t.random.shuffle(self.free)
        self.tables: dict[str, list[int]] = {"a": []}
        self.rows: dict[str, Tensor] = {"a": t.randn(0, 3)}
        self.changed = False  # a list of an input

    def write(self, name: str, n: int) -> None:
        new, before = self.t.randn(n, 3), (self.tables[name], self.references, self.free)
        given = [Given(part) if isinstance(part, list | tuple) else part for part in before]
        got = self.append(self.pages, given[0], len(self.rows[name]), new, *given[1:])
        for part, was in zip(given, before, strict=True):
            self.changed |= isinstance(part, Given) and part != list(was)
        parts = self.t.parts(got, 4, "(pages, table, references, free)")
        self.pages, self.tables[name], self.references, self.free = parts
        self.rows[name] = torch.cat((self.rows[name], new))

    def fork(self, name: str, new: str) -> None:
        self.tables[new] = library_fork(self.tables[name], len(self.rows[name]), self.page)
        self.rows[new] = self.rows[name].clone()
        for block in self.tables[new]:
            self.references[block] += 1

    def contents(self) -> None:
        """Every sequence reads its own rows."""
        for name, table in self.tables.items():
            n = len(self.rows[name])
            if not self.t.true(len(table) >= blocks_of(n, self.page), "a block for all tokens", "too few"):
                raise Stop
            held = [self.pages[table[i // self.page], i % self.page] for i in range(n)]
            self.t.close(torch.stack(held), self.rows[name], f"the tokens of {name}:")

    def counts(self) -> None:
        """References are those of the tables, and nothing free is used."""
        used = [block for table in self.tables.values() for block in table]
        want = [used.count(block) for block in range(len(self.references))]
        order = [*dict.fromkeys(used), *(b for b in range(len(want)) if b not in used)]
        same(
            self.t,
            [self.references[b] for b in order],
            [want[b] for b in order],
            "references, used blocks first:",
        )
        same(self.t, len(self.free), want.count(0), "free blocks:")
        self.t.true(not set(self.free) & set(used), "no used block in the free list", "one is there")


@cow.requirement(2, "append: parent and fork")
def cow_append(t: CheckContext, fork_table: Answer, write_plan: Answer, append: Answer) -> None:
    """each reads the common tokens and its own; the inputs stay as they were"""
    page = t.pick(3, 4, 5)
    family = Family(t, append, 16, page)
    family.write("a", 2 * page + 2)
    family.fork("a", "b")
    for name, n in (("b", 1), ("a", page + 1), ("b", 2)) if t.round else (("a", 1), ("b", page), ("a", 2)):
        family.write(name, n)
        family.contents()
    t.unchanged()
    t.true(not family.changed, "lists as they were before", "a list of the input changed")


@cow.requirement(1, "append: references and free blocks")
def cow_counts(t: CheckContext, fork_table: Answer, write_plan: Answer, append: Answer) -> None:
    """counted down for the block that was left, 1 for each new one; the last sharer needs no copy"""
    page = t.pick(3, 4, 5)
    family = Family(t, append, 16, page)
    family.write("a", page + 2)
    family.fork("a", "b")
    family.fork("b", "c")
    for name in ("b", "c", "a"):
        family.write(name, 1)
        family.counts()


@cow.requirement(1, "append: out of blocks", rounds=2)
def cow_full(t: CheckContext, fork_table: Answer, write_plan: Answer, append: Answer) -> None:
    """MemoryError if replaced and new blocks together are more than the free ones; exactly enough
    is enough"""
    page = t.pick(3, 4)
    family = Family(t, append, 4, page)
    family.write("a", page + 1)
    family.fork("a", "b")
    rows = t.randn(2 * page, 3)
    state = (family.pages, family.tables["b"], page + 1, rows, family.references, family.free)
    t.raises(MemoryError, lambda: append(*state), "if three blocks are needed and two are free")
    alone = (family.pages, [], 0, rows, family.references, family.free[:1])
    t.raises(MemoryError, lambda: append(*alone), "if two blocks are needed and one is free")
    family.write("b", page)
    family.contents()


# 09.3: accounts, compared with sets of owners

accounts = Exercise(
    id="09.3",
    slug="counts",
    title="Reference counts with cancellation",
    answers=("Accounts",),
    hints=(
        "Two sequences share a block, and the one that took it first is cancelled. Who has to notice that "
        "the block is still in use, and how?",
        "`BlockTables` keeps three things: a count for each block, the free blocks, and a table for each "
        "open name. Each call changes them together or not at all: look first, change afterwards.",
        "`cancel`, in pseudocode: take the table out (nothing if there is none); for each of its blocks: one "
        "reference less; if that was the last one, the block is free and goes into the result.",
        "`replace`: with a count of 1 nothing happens. Otherwise `take` gives the new block, with count 1, "
        "or refuses; after that the old one loses one reference. It cannot become free by that.",
        "`share` checks everything before it counts anything: each block has a count above 0, and table and "
        "blocks together hold no block twice.",
    ),
)


class LibraryAccounts:
    """The owners of each block as a list of names."""

    def __init__(self, n_blocks: int) -> None:
        self.owners: list[list[Any]] = [[] for _ in range(n_blocks)]
        self.tables: dict[Any, list[int]] = {}

    def open(self, name: Any) -> None:
        if name in self.tables:
            raise ValueError(f"name: expected one that is not open, got {name!r}")
        self.tables[name] = []

    def _take(self, name: Any, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.owners[block].append(name)

    def _free(self) -> list[int]:
        return [block for block, owners in enumerate(self.owners) if not owners]

    def grow(self, name: Any, n: int) -> None:
        free, table = self._free(), self.tables[name]
        if len(free) < n:
            raise MemoryError(f"n: expected at most {len(free)}, got {n}")
        self._take(name, free[:n])
        table += free[:n]

    def share(self, name: Any, blocks: Sequence[int]) -> None:
        together = self.tables[name] + list(blocks)
        if len(set(together)) < len(together) or not all(self.owners[block] for block in blocks):
            raise ValueError("blocks: expected blocks in use, each once and none that is in the table")
        self._take(name, blocks)
        self.tables[name] = together

    def replace(self, name: Any, i: int) -> tuple[int, int]:
        old = self.tables[name][i]
        if self.owners[old] == [name]:
            return old, old
        free = self._free()
        if not free:
            raise MemoryError("no block is free")
        self.owners[old].remove(name)
        self._take(name, free[:1])
        self.tables[name][i] = free[0]
        return old, free[0]

    def cancel(self, name: Any) -> list[int]:
        table = self.tables.pop(name, [])
        for block in table:
            self.owners[block].remove(name)
        return [block for block in table if not self.owners[block]]

    def blocks(self, name: Any) -> list[int]:
        return list(self.tables[name])

    def count(self, block: int) -> int:
        return len(self.owners[block])

    def n_free(self) -> int:
        return len(self._free())


class Twins:
    """The same calls to the learner's accounts and to the library's; numbers of blocks may differ."""

    def __init__(self, t: CheckContext, Accounts: Answer, n_blocks: int) -> None:
        self.t, self.theirs, self.ours = t, Accounts(n_blocks), LibraryAccounts(n_blocks)

    def call(self, method: str, *args: Any) -> None:
        """A call that succeeds."""
        getattr(self.theirs, method)(*args)
        getattr(self.ours, method)(*args)

    def share(self, name: str, other: str, n: int | None = None) -> None:
        """The first n blocks of another."""
        self.theirs.share(name, list(self.theirs.blocks(other))[:n])
        self.ours.share(name, self.ours.blocks(other)[:n])

    def replace(self, name: str, i: int) -> None:
        before = list(self.theirs.blocks(name))
        got = self.t.parts(self.theirs.replace(name, i), 2, "a pair (old, new)")
        want = self.ours.replace(name, i)
        now = list(self.theirs.blocks(name))
        pattern = [got[0] == before[i], got[1] == now[i], got[0] == got[1]]
        same(
            self.t,
            pattern,
            [True, True, want[0] == want[1]],
            "old was there, new is there, they are the same:",
        )

    def cancel(self, name: str) -> None:
        before = list(self.theirs.blocks(name)) if name in self.ours.tables else []
        got = without_error(self.t, lambda: self.theirs.cancel(name), f"the end of {name}:")
        want = self.ours.cancel(name)
        if not isinstance(got, list | tuple | set):
            self.t.note(got, Difference("cancel:", "a list", describe(got)))
            raise Stop
        same(self.t, len(got), len(want), f"blocks freed by the end of {name}:")
        self.t.true(set(got) <= set(before), "blocks of the sequence", "other blocks")

    def agree(self) -> None:
        """Tables with the same pattern of common blocks, counts, free blocks."""
        same(self.t, self.pattern(self.theirs), self.pattern(self.ours), "the tables, blocks renumbered:")
        counts = [[[each.count(b) for b in each.blocks(n)] for n in self.ours.tables] for each in self.both]
        same(self.t, counts[0], counts[1], "references in each table:")
        same(self.t, self.theirs.n_free(), self.ours.n_free(), "free blocks:")

    @property
    def both(self) -> tuple[Any, LibraryAccounts]:
        return self.theirs, self.ours

    def pattern(self, accounts: Any) -> list[list[int]]:
        numbers: dict[int, int] = {}
        return [
            [numbers.setdefault(b, len(numbers)) for b in accounts.blocks(name)] for name in self.ours.tables
        ]


@accounts.requirement(1, "grow and cancel")
def accounts_alone(t: CheckContext, Accounts: Answer) -> None:
    """different blocks for each, counted once; all free again at the end"""
    n = t.integer(9, 14)
    twins = Twins(t, Accounts, n)
    for name in "abc":
        twins.call("open", name)
    for name, more in (("a", 2), ("b", 3), ("a", n - 7), ("c", 1)):
        twins.call("grow", name, more)
        twins.agree()
    for name in t.random.sample("abc", 3):
        twins.cancel(name)
    twins.agree()
    twins.call("open", "d")
    twins.call("grow", "d", n)
    twins.agree()


@accounts.requirement(1, "share, and cancel in any order")
def accounts_share(t: CheckContext, Accounts: Answer) -> None:
    """a block is free when its last user has gone, even if its first has gone before"""
    twins = Twins(t, Accounts, 12)
    twins.call("open", "a")
    twins.call("grow", "a", 4)
    for name, n in (("b", None), ("c", 2)):
        twins.call("open", name)
        twins.call("grow", name, 1)
        twins.share(name, "a", n)
        twins.call("grow", name, 1)
        twins.agree()
    order = ("abc", "bac", "cba")[t.round]
    for name in order:
        twins.cancel(name)
        twins.agree()


@accounts.requirement(1, "cancelled twice", rounds=2)
def accounts_twice(t: CheckContext, Accounts: Answer) -> None:
    """a second cancel, or one of a name that was never open, does nothing; the name may be used again"""
    twins = Twins(t, Accounts, 8)
    twins.call("open", "a")
    twins.call("grow", "a", 3)
    twins.call("open", "b")
    twins.share("b", "a")
    for name in ("a", "a", "z"):
        twins.cancel(name)
        twins.agree()
    without_error(t, lambda: twins.theirs.open("a"), "the name used again:")
    twins.ours.open("a")
    twins.agree()
    twins.call("grow", "a", 2)
    twins.agree()


@accounts.requirement(1, "replace")
def accounts_replace(t: CheckContext, Accounts: Answer) -> None:
    """a shared entry gets a free block, the old one loses a reference; an own entry stays"""
    twins = Twins(t, Accounts, 9)
    twins.call("open", "a")
    twins.call("grow", "a", 3)
    for name in "bc":
        twins.call("open", name)
        twins.share(name, "a")
    i = t.integer(0, 2)
    for name in ("b", "b", "a", "c"):
        twins.replace(name, i)
        twins.agree()
    for name in t.random.sample("abc", 3):
        twins.cancel(name)
    twins.agree()


@accounts.requirement(1, "grow: too many", rounds=2)
def accounts_grow(t: CheckContext, Accounts: Answer) -> None:
    """MemoryError, and the sequence gets none; the free ones can still be had"""
    twins = Twins(t, Accounts, 6)
    twins.call("open", "a")
    twins.call("grow", "a", 4)
    t.raises(MemoryError, lambda: twins.theirs.grow("a", 3), "if 3 blocks are wanted and 2 are free")
    twins.agree()
    twins.call("grow", "a", 2)
    twins.agree()


@accounts.requirement(2, "share and replace: refused", rounds=3)
def accounts_refused(t: CheckContext, Accounts: Answer) -> None:
    """ValueError for a free block and for one that is there or comes twice; MemoryError for a replacement
    without a free block; nothing has changed"""
    twins = Twins(t, Accounts, 5)
    twins.call("open", "a")
    twins.call("grow", "a", 3)
    twins.call("open", "b")
    twins.share("b", "a", 2)
    mine = list(twins.theirs.blocks("a"))
    if t.round == 0:
        unused = next(block for block in range(5) if block not in mine)
        t.raises(ValueError, lambda: twins.theirs.share("b", [mine[2], unused]), "for a free block")
    elif t.round == 1:
        t.raises(ValueError, lambda: twins.theirs.share("b", [mine[2], mine[0]]), "for a block twice")
        twins.call("open", "c")
        t.raises(ValueError, lambda: twins.theirs.share("c", [mine[1], mine[1]]), "for a block twice")
    else:
        twins.call("grow", "a", 2)
        t.raises(MemoryError, lambda: twins.theirs.replace("b", 0), "if no block is free")
    twins.agree()


@accounts.requirement(1, "a long day")
def accounts_random(t: CheckContext, Accounts: Answer) -> None:
    """40 drawn calls: tables, counts and free blocks after each; all free at the end"""
    twins, n = Twins(t, Accounts, 24), 0
    for _ in range(40):
        names = list(twins.ours.tables)
        name, act = t.random.choice([*names, ""]), t.random.random()
        if not name or len(names) < 3:
            name, n = f"r{n}", n + 1
            twins.call("open", name)
            if names and act < 0.6:
                twins.share(name, t.random.choice(names))
        elif act < 0.4 and twins.ours.n_free() >= 3:
            twins.call("grow", name, t.integer(1, 3))
        elif act < 0.7 and twins.ours.blocks(name) and twins.ours.n_free():
            twins.replace(name, t.integer(0, len(twins.ours.blocks(name)) - 1))
        else:
            twins.cancel(name)
        twins.agree()
    for name in list(twins.ours.tables):
        twins.cancel(name)
    twins.agree()


# 09.4: a prefix cache, compared with whole prefixes as keys

prefix = Exercise(
    id="09.4",
    slug="prefix",
    title="A hash that isolates tenants",
    answers=("block_keys", "PrefixCache"),
    hints=(
        "Two prompts have the same second block and different first ones. Are the keys and values of that "
        "second block the same? What does that say about its name?",
        "In pseudocode: parent = nothing; for each full block: parent = hash(salt, parent, tokens of the "
        "block); this is its key. A key stands for everything before it, so nothing has to be hashed twice.",
        "If salt and parent are written one after the other, a tenant may choose a salt that ends like a "
        "parent's key. Write their lengths in front. And give each token a fixed number of bytes.",
        "What the cache keeps with a key: the salt, the tokens (all from the start of the prompt, or the own "
        "ones and the entry of the block before), and the block. A hit is one only if salt and tokens agree.",
        "`find` walks through the keys of the prompt without its last token and ends at the first that is "
        "missing or has other content. `forget` removes the entries of these blocks.",
    ),
)


def sha(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def same_bytes(content: bytes) -> bytes:
    """The worst hash function."""
    return b"\0" * 32


class FirstBlockOnly:
    """A hash that is good for what it is given first after ``calls`` was set to 0, and constant for all else.

    Equal bytes have equal hashes, so that an answer may hash a prompt again.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.known: dict[bytes, bytes] = {}

    def __call__(self, content: bytes) -> bytes:
        self.calls += 1
        return self.known.setdefault(content, sha(content) if self.calls == 1 else b"\1" * 32)


class LibraryPrefix:
    """Whole prefixes as keys: no hash, so no collision."""

    def __init__(self, page: int, hash_function: Callable[[bytes], bytes]) -> None:
        self.page = page
        self.held: dict[tuple[bytes, tuple[int, ...]], int] = {}

    def add(self, tokens: Sequence[int], salt: bytes, blocks: Sequence[int]) -> None:
        for i in range(len(tokens) // self.page):
            self.held.setdefault((salt, tuple(tokens[: (i + 1) * self.page])), blocks[i])

    def find(self, tokens: Sequence[int], salt: bytes) -> list[int]:
        found: list[int] = []
        while (end := (len(found) + 1) * self.page) < len(tokens):
            if (salt, tuple(tokens[:end])) not in self.held:
                break
            found.append(self.held[salt, tuple(tokens[:end])])
        return found

    def forget(self, blocks: Iterable[int]) -> None:
        gone = set(blocks)
        self.held = {key: block for key, block in self.held.items() if block not in gone}


def drawn_tokens(t: CheckContext, n: int) -> list[int]:
    return [t.integer(0, 2**31 - 1) for _ in range(n)]


def keys_of(t: CheckContext, block_keys: Answer, tokens: list[int], page: int, salt: bytes) -> list[Any]:
    """One key for each full block, or the end of this round."""
    got = block_keys(tokens, page, salt, sha)
    keys = list(got) if isinstance(got, list | tuple) else []
    good = len(keys) == len(tokens) // page and all(isinstance(key, bytes) for key in keys)
    if not good:
        kinds = " and ".join(sorted({type(key).__name__ for key in keys})) or describe(got)
        difference = Difference("", f"{len(tokens) // page} keys of bytes", f"{len(keys)} keys of {kinds}")
        t.note(f"{len(keys)} keys", difference)
        raise Stop
    return keys


@prefix.requirement(1, "keys: a chain")
def prefix_chain(t: CheckContext, block_keys: Answer, PrefixCache: Answer) -> None:
    """equal as long as all tokens so far are equal; another token changes its block's key and all later
    ones; a block that comes again has another key"""
    page = t.pick(3, 4, 5)
    tokens = drawn_tokens(t, 4 * page + 2)
    tokens[3 * page : 4 * page] = tokens[page : 2 * page]
    keys = keys_of(t, block_keys, tokens, page, b"s")
    i = t.integer(page, 2 * page - 1)
    other = [*tokens[:i], (tokens[i] + 1) % 2**31, *tokens[i + 1 :]]
    changed = keys_of(t, block_keys, other, page, b"s")
    alike = [a == b for a, b in zip(keys, changed, strict=True)]
    same(t, alike, [True, False, False, False], "keys that stay the same:")
    t.true(len(set(keys)) == 4, "four different keys", "a key comes twice")


@prefix.requirement(1, "keys: full blocks only", rounds=4)
def prefix_full(t: CheckContext, block_keys: Answer, PrefixCache: Answer) -> None:
    """none for the rest, none for a prompt that is shorter than a block"""
    page = t.pick(3, 4, 5, 6)
    n = (2 * page, 3 * page - 1, page - 1, 2 * page + 1)[t.round]
    got = block_keys(drawn_tokens(t, n), page, b"s", sha)
    same(t, len(got), n // page, "keys:")


@prefix.requirement(1, "keys: unambiguous", rounds=1)
def prefix_clear(t: CheckContext, block_keys: Answer, PrefixCache: Answer) -> None:
    """other tokens or another salt, another key; also for a salt that contains the key of a block, and for
    tokens above 255"""
    first, second = drawn_tokens(t, 3), drawn_tokens(t, 3)
    one = keys_of(t, block_keys, first, 3, b"tenant")[0]
    two = keys_of(t, block_keys, first + second, 3, b"tenant")[1]
    salts = {"the key": one, "salt + key": b"tenant" + one, "key + salt": one + b"tenant"}
    for what, salt in salts.items():
        got = keys_of(t, block_keys, second, 3, salt)[0]
        t.true(got != two, "different keys", f"with the salt {what}, a first block has a second one's key")
    got = keys_of(t, block_keys, first, 3, b"second")[0]
    t.true(got != one, "different keys for different salts", "another salt, the same key")
    separator_is_no_content(t, block_keys, first, second)
    small = t.integer(0, 200)
    pairs = [([1, 23], [12, 3]), ([small, 7], [small + 256, 7]), ([small, 7], [small + 65536, 7])]
    for a, b in pairs:
        keys = [keys_of(t, block_keys, tokens, 2, b"")[0] for tokens in (a, b)]
        t.true(keys[0] != keys[1], "different keys", f"the same key for {a} and {b}")


def separator_is_no_content(t: CheckContext, block_keys: Answer, first: list[int], second: list[int]) -> None:
    """Where salt and parent are told apart by bytes between them: a hash whose keys hold these bytes, and a
    salt that holds them too, must not give a first block what a second one has."""
    contents: list[bytes] = []

    def noted(content: bytes) -> bytes:
        contents.append(content)
        return sha(content)

    salt = b"tenant"
    key = block_keys(first + second, 3, salt, noted)[0]
    if len(contents) != 2 or not isinstance(key, bytes):
        return
    at_salt, at_key = contents[1].find(salt), contents[1].find(key)
    salt_first = at_salt < at_key
    ends = (at_salt + len(salt), at_key) if salt_first else (at_key + len(key), at_salt)
    separator = contents[1][slice(*ends)]
    if min(at_salt, at_key) < 0 or not 0 < len(separator) < 16:
        return

    def marked(content: bytes) -> bytes:
        start = sha(content)[len(separator) :]
        return start + separator if salt_first else separator + start

    one, two = block_keys(first + second, 3, salt, marked)
    start = one[: -len(separator)] if salt_first else one[len(separator) :]
    other = salt + separator + start if salt_first else start + separator + salt
    got = block_keys(second, 3, other, marked)[0]
    came = f"a salt that contains the separator {separator!r} gives a first block a second one's key"
    t.true(got != two, "different keys", came)


@prefix.requirement(1, "keys: each token hashed once", rounds=1)
def prefix_cost(t: CheckContext, block_keys: Answer, PrefixCache: Answer) -> None:
    """one call of the hash function per block; bytes in proportion to the tokens"""
    sizes = []

    def counted(content: bytes) -> bytes:
        sizes.append(len(content))
        return sha(content)

    block_keys(drawn_tokens(t, 128 * 8), 8, b"salt", counted)
    t.number(len(sizes), 128, "calls:")
    most = 64 * 1024 + 200 * 128
    difference = Difference("", f"at most {most:,} bytes for 1,024 tokens", f"{sum(sizes):,}")
    t.note("too many" if sum(sizes) > most else "few", difference if sum(sizes) > most else None)


def drawn_blocks(t: CheckContext, n: int) -> list[int]:
    return t.random.sample(range(100, 200), n)


@prefix.requirement(1, "find: the longest cached prefix", rounds=4)
def prefix_find(t: CheckContext, block_keys: Answer, PrefixCache: Answer) -> None:
    """full blocks as far as the prompts agree, never the block of the last token; what is cached stays"""
    page = t.pick(3, 4, 5, 6)
    theirs, ours = PrefixCache(page, sha), LibraryPrefix(page, sha)
    tokens = drawn_tokens(t, 4 * page + 1)
    blocks = drawn_blocks(t, 5)
    other = tokens[: 2 * page] + drawn_tokens(t, page)
    for cache in (theirs, ours):
        cache.add(tokens, b"s", blocks)
        cache.add(other, b"s", [1, 2, 3])
    again = tokens[: 4 * page] if t.round else tokens
    for prompt in (again, tokens[: 2 * page + 1], [*other, 5], tokens[: page - 1], tokens[: 3 * page]):
        same(t, theirs.find(prompt, b"s"), ours.find(prompt, b"s"), "blocks found:")


@prefix.requirement(1, "tenants")
def prefix_tenants(t: CheckContext, block_keys: Answer, PrefixCache: Answer) -> None:
    """each salt finds its own blocks, and no other finds them, whatever the hash function"""
    page = t.pick(3, 4, 5)
    tokens = drawn_tokens(t, 3 * page)
    for hash_function in (sha, same_bytes):
        cache, blocks = PrefixCache(page, hash_function), drawn_blocks(t, 3)
        cache.add(tokens, b"one", blocks)
        same(t, cache.find([*tokens, 1], b"two"), [], "blocks found by another tenant:")
        if hash_function is sha:
            cache.add(tokens, b"two", [5, 6, 7])
            same(t, cache.find([*tokens, 1], b"one"), blocks, "blocks found by the tenant itself:")
            same(t, cache.find([*tokens, 1], b"two"), [5, 6, 7], "blocks of the second tenant:")


@prefix.requirement(1, "collisions")
def prefix_collisions(t: CheckContext, block_keys: Answer, PrefixCache: Answer) -> None:
    """with a hash that is always the same, or the same for all later blocks: no block with other tokens, nor
    with other tokens before it"""
    page = t.pick(3, 4, 5)
    first, other, middle = (drawn_tokens(t, page) for _ in range(3))
    cache = PrefixCache(page, same_bytes)
    cache.add(first + middle, b"s", [7, 8])
    safe(t, cache.find([*other, *middle, 1], b"s"), [])
    safe(t, cache.find([*first, *other, 1], b"s"), [7])
    bad = FirstBlockOnly()
    cache = PrefixCache(page, bad)
    for tokens, blocks in ((first + middle, [7, 8]), (other, [5])):
        bad.calls = 0
        cache.add(tokens, b"s", blocks)
    bad.calls = 0
    safe(t, cache.find([*other, *middle, 1], b"s"), [5])
    bad.calls = 0
    same(t, cache.find([*first, 1], b"s"), [7], "the first block of the first prompt:")


def safe(t: CheckContext, got: Any, right: list[int]) -> None:
    """Nothing but blocks with the prompt's content, in order."""
    found = plain(got)
    good = isinstance(found, list) and found == right[: len(found)]
    t.note(
        shorten(repr(found)), None if good else Difference("blocks found:", f"at most {right}", brief(found))
    )


@prefix.requirement(1, "forget")
def prefix_forget(t: CheckContext, block_keys: Answer, PrefixCache: Answer) -> None:
    """a forgotten block is never found; those before it are; the same content may be added in a new block"""
    page = t.pick(3, 4, 5)
    tokens, blocks = drawn_tokens(t, 4 * page + 1), drawn_blocks(t, 4)
    cache = PrefixCache(page, sha)
    cache.add(tokens, b"s", blocks)
    cache.add(tokens, b"r", [1, 2, 3, 4])
    cache.forget([blocks[2], 99])
    same(t, cache.find(tokens, b"s"), blocks[:2], "blocks found:")
    same(t, cache.find(tokens, b"r"), [1, 2, 3, 4], "blocks of another tenant:")
    cache.add(tokens, b"s", [blocks[0], blocks[1], 50, 51])
    got = cache.find(tokens, b"s")
    found = list(got)[:3] if isinstance(got, list | tuple) else got
    same(t, found, [*blocks[:2], 50], "the first three blocks after they were added again:")


# 09.5: logs with a secret, and servers to attack

leak = Exercise(
    id="09.5",
    slug="leak",
    title="Find the leak in a log",
    answers=("from_hits", "from_times", "closing"),
    hints=(
        "Look at the log of the demonstration. Which guess has more cached tokens than the others? And why "
        "have other guesses as many at the end?",
        "`from_hits`: when a guess is asked for the first time, only the victim can have put it there. From "
        "then on the attacker's own question is in the cache.",
        "`from_times`: which summary of seven times does not care about one that is a hundred times too "
        "long, nor about one that is nearly 0? The mean and the minimum do.",
        "`closing`, in pseudocode: for each server: for each seed: ask each candidate once; is the one with "
        "the most cached tokens the secret? Is the fastest one? Count both. Closed if neither is right "
        "much more often than 1 in 8.",
        "Chance is 12.5 of 100 trials and varies by about 3.3; an open server has at least 40. So 27 "
        "of 100 is a good border. A server that reports nothing can still be read by its times, and one "
        "with equal times by its report.",
    ),
)


def drawn_guesses(t: CheckContext, n: int) -> list[str]:
    return [f"{number:04d}" for number in t.random.sample(range(10_000), n)]


@leak.requirement(1, "hits: each guess once")
def leak_once(t: CheckContext, from_hits: Answer, *others: Answer) -> None:
    """the guess with the most cached tokens"""
    guesses, known = drawn_guesses(t, 7), 4 * t.integer(2, 4)
    secret = guesses[t.integer(2, 5)]
    log = [(guess, known + (8 if guess == secret else 0)) for guess in guesses]
    log[-1] = (guesses[-1], known - 4)  # the end of the known text was evicted for a moment
    same(t, from_hits(log), secret, "the secret:")


@leak.requirement(1, "hits: guesses that come again")
def leak_again(t: CheckContext, from_hits: Answer, *others: Answer) -> None:
    """only the first question about a guess tells something; later ones find the attacker's own"""
    a, b, c, d, e, secret = drawn_guesses(t, 6)
    known = 4 * t.integer(2, 4)
    full = known + 4 * t.integer(3, 6)
    log = [(a, known), (a, full), (b, known), (c, known)]
    later = [(b, full), *[(c, full)] * 5, (d, known), (e, known - 4)]
    t.random.shuffle(later)
    log += [*later, (secret, full), (b, full)]
    log += [(a, known)]  # evicted meanwhile
    same(t, from_hits(log), secret, "the secret:")


@leak.requirement(2, "times, with delays and wrong clocks")
def leak_times(t: CheckContext, from_hits: Answer, from_times: Answer, closing: Answer) -> None:
    """the guess that is usually fastest, though some of its answers were held up, and others show almost 0"""
    names = drawn_guesses(t, 8)
    scale = t.pick(1e-3, 2e-3, 5e-4)
    secret = names[0]
    times = {
        secret: [400, 10, 10, 10, 10, 10, 380],
        names[1]: [24, 24, 0.1, 24, 24, 24, 24],
        names[2]: [19, 19, 25, 19, 19, 19, 19],
        names[3]: [20] * 7,
        names[4]: [15, 30, 30, 30, 30, 30, 30],
        names[5]: [30, 30, 30, 30, 30, 30, 14],
        names[6]: [40] * 7,
        names[7]: [22, 22, 22, 300, 22, 22, 22],
    }
    order = t.random.sample(names, 8)
    log = [(name, scale * (times[name][i] + t.random.uniform(0, 0.05))) for i in range(7) for name in order]
    same(t, from_times(log), secret, "the secret:")


CLOSED = {"salts", "alone", "silent and equal"}


class Imitation:
    """Servers of one kind: what is found of a question, and what is seen of that.

    ``seeds`` are those it was asked for, ``again`` the guesses that a server was asked a second time.
    """

    def __init__(self, kind: str, base: str) -> None:
        self.kind, self.base = kind, base
        self.seeds, self.again = set[Any](), list[str]()

    def __repr__(self) -> str:
        return "new_server"

    def __call__(self, seed: int) -> tuple[list[str], Callable[[str], Any], str]:
        kind, rng = self.kind, random.Random(f"{self.base} {self.kind} {seed}")
        self.seeds.add(seed)
        candidates = [f"{n:04d}" for n in rng.sample(range(10_000), 8)]
        secret = rng.choice(candidates)
        asked: set[str] = set()

        def ask(guess: str) -> tuple[int, float]:
            if guess in asked:
                self.again.append(guess)
            there = guess in asked if kind in ("salts", "alone") else guess in asked or guess == secret
            found = 32 if there else 8
            if kind == "alone":
                found = 0
            asked.add(guess)
            seconds = 1e-3 * (40 - found) + 1e-3 * rng.random()
            if "equal" in kind:
                seconds = 0.1
            if kind == "jitter":
                seconds += 0.048 * rng.random()
            return 0 if "silent" in kind or kind == "jitter" else found, seconds

        return candidates, ask, secret


def closed_are(t: CheckContext, closing: Answer, kinds: Sequence[str]) -> None:
    shuffled = t.random.sample(kinds, len(kinds))
    names = {f"server {letter}": kind for letter, kind in zip("ABCDEFGH", shuffled, strict=False)}
    base = str(t.integer(0, 10**9))
    servers = {name: Imitation(kind, base) for name, kind in names.items()}
    got = closing(dict(servers))
    if not isinstance(got, set | frozenset | list | tuple):
        t.note(got, Difference("", "a set of names", describe(got)))
        raise Stop
    # In the order of the kinds, so that what is noted does not depend on the letters.
    found = [kind for kind in kinds if any(names.get(name) == kind for name in got)]
    want = [kind for kind in kinds if kind in CLOSED]
    names_of = {kind: name for name, kind in names.items()}
    good = found == want and len(set(got)) == len(want)
    came, seen = ", ".join(sorted(map(str, got))) or "none", repr(found)
    n_seeds = min(len(server.seeds) for server in servers.values())
    if n_seeds < 20 and not good:
        came += f"; a server was attacked with {n_seeds} different seeds only"
        seen += ", few seeds"
    elif any(server.again for server in servers.values()) and not good:
        came += "; one server was asked the same guess again, and found the first question"
        seen += ", asked again"
    difference = Difference("closed:", ", ".join(sorted(names_of[kind] for kind in want)), came)
    t.note(shorten(seen), None if good else difference)


@leak.requirement(1, "closing: salts and open servers", rounds=1)
def leak_salts(t: CheckContext, from_hits: Answer, from_times: Answer, closing: Answer) -> None:
    """closed where an attack is right about once in eight trials; open where it is always right"""
    closed_are(t, closing, ("plain", "salts", "cleared", "alone"))


@leak.requirement(2, "closing: one number is enough", rounds=1)
def leak_channels(t: CheckContext, from_hits: Answer, from_times: Answer, closing: Answer) -> None:
    """a server without report is open by its times, one with equal times by its report; without both it is
    closed"""
    closed_are(t, closing, ("silent", "equal", "silent and equal", "salts"))


@leak.requirement(1, "closing: attacks that are right sometimes", rounds=1)
def leak_jitter(t: CheckContext, from_hits: Answer, from_times: Answer, closing: Answer) -> None:
    """open as well, if they are right much more often than once in eight trials"""
    closed_are(t, closing, ("jitter", "silent and equal", "salts"))


# 09.6: quotas, compared with a simulation block by block

quotas = Exercise(
    id="09.6",
    slug="quotas",
    title="Plan quotas",
    answers=("needs", "plan", "victims"),
    hints=(
        "A tenant takes 3 blocks, releases 2 and takes 4. How many does it need at a time? Is that the sum, "
        "the last number, or something between?",
        "`plan`, in pseudocode: everybody gets the minimum; as long as blocks are left and somebody wants "
        "more: one block to the smallest quota among those who want more.",
        "`min(names, key=quota.get)` returns the first of several smallest ones. A dict keeps its order.",
        "`victims`: after the tenant has taken n, its blocks in use, its cached ones and the n new ones "
        "together may be at most its quota. What is too many has to go, from its own cached ones.",
        "If what is too many is more than its own cached blocks, the request is refused: None, and not an "
        "empty list. An empty list means that nothing has to be evicted.",
    ),
)


def library_plan_quotas(
    capacity: int, minimum: Mapping[str, int], demand: Mapping[str, int]
) -> dict[str, int]:
    given = dict(minimum)
    left = capacity - sum(given.values())
    while left:
        order = sorted((q, i, name) for i, (name, q) in enumerate(given.items()) if q < demand[name])
        if not order:
            break
        given[order[0][2]] += 1
        left -= 1
    return given


@quotas.requirement(1, "needs")
def quotas_needs(t: CheckContext, needs: Answer, plan: Answer, victims: Answer) -> None:
    """the most blocks that a tenant holds at a time"""
    trace: list[tuple[str, int]] = []
    now, most = dict.fromkeys("abc", 0), dict.fromkeys("abc", 0)
    names = [*"abc", *t.random.choices("abc", k=24)]
    for name in names:
        change = t.integer(1, 9)
        if now[name] > 4 and t.random.random() < 0.5:
            change = -t.integer(1, now[name])
        now[name] += change
        most[name] = max(most[name], now[name])
        trace.append((name, change))
    for name in "abc":  # at the end all is released, and a little taken again
        trace += [(name, -now[name]), (name, 1)]
    got = needs(trace)
    same(t, sorted(got.items()) if isinstance(got, Mapping) else got, sorted(most.items()), "quotas:")


def plan_matches(
    t: CheckContext, plan: Answer, capacity: int, minimum: dict[str, int], demand: dict[str, int]
) -> None:
    got = without_error(t, lambda: plan(capacity, minimum, demand), "a plan that is possible:")
    want = library_plan_quotas(capacity, minimum, demand)
    same(t, sorted(got.items()) if isinstance(got, Mapping) else got, sorted(want.items()), "quotas:")


@quotas.requirement(2, "plan: the rest to the smallest")
def quotas_fair(t: CheckContext, needs: Answer, plan: Answer, victims: Answer) -> None:
    """all minimums, then block by block to the smallest quota below its demand; of equal ones to the first"""
    a, b = t.integer(20, 25), t.integer(2, 4)
    minimum = {"c": b, "d": a, "a": b + 1, "b": b, "e": b}
    demand = {"c": 50, "d": 60, "a": 40, "b": b + 3, "e": 45}
    rest = 3 * t.integer(8, 11) + 2 + t.round % 2  # c, a and e are equal; once there is one block more
    plan_matches(t, plan, sum(minimum.values()) + rest, minimum, demand)


@quotas.requirement(1, "plan: small demands")
def quotas_small(t: CheckContext, needs: Answer, plan: Answer, victims: Answer) -> None:
    """nobody gets more than it demands, except its minimum; what nobody demands stays"""
    minimum = {"a": t.integer(6, 9), "b": 1, "c": 2}
    demand = {"a": 3, "b": t.integer(4, 6), "c": t.integer(7, 9)}
    plan_matches(t, plan, 60, minimum, demand)


@quotas.requirement(1, "plan: too little memory")
def quotas_refused(t: CheckContext, needs: Answer, plan: Answer, victims: Answer) -> None:
    """ValueError if the minimums do not fit; exactly enough is enough"""
    minimum = {"a": t.integer(2, 4), "b": t.integer(6, 9)}
    demand = {"a": 20, "b": 20}
    total = sum(minimum.values())
    t.raises(ValueError, lambda: plan(total - 1, minimum, demand), "if the minimums do not fit")
    plan_matches(t, plan, total, minimum, demand)


def drawn_cached(t: CheckContext, counts: Mapping[str, int]) -> list[tuple[int, str]]:
    names = [name for name, n in counts.items() for _ in range(n)]
    t.random.shuffle(names)
    return list(zip(t.random.sample(range(100), len(names)), names, strict=True))


@quotas.requirement(2, "victims: own blocks, oldest first")
def quotas_victims(t: CheckContext, needs: Answer, plan: Answer, victims: Answer) -> None:
    """only the tenant's own cached blocks, as many as are too many; no block of others"""
    others, mine, used = t.integer(3, 6), t.integer(5, 7), t.integer(1, 5)
    cached = [(200, "b"), *drawn_cached(t, {"a": mine, "b": others})]
    evicted = t.integer(1, 2)
    n = evicted + t.integer(1, 2)
    limits = {"a": used + mine + n - evicted, "b": 30}
    own = [block for block, owner in cached if owner == "a"]
    got = victims("a", n, {"a": used, "b": 4}, limits, cached)
    same(t, got, own[:evicted], "evicted:")


@quotas.requirement(1, "victims: nothing, all or refused")
def quotas_edges(t: CheckContext, needs: Answer, plan: Answer, victims: Answer) -> None:
    """an empty list while the quota has room, all own cached blocks if need be, None if that is too few"""
    mine, used, n = t.integer(2, 4), t.integer(1, 5), t.integer(6, 9)
    cached = drawn_cached(t, {"a": mine, "b": 8})
    own = [block for block, owner in cached if owner == "a"]
    for limit, want in ((used + mine + n, []), (used + n, own), (used + n - 1, None)):
        got = victims("a", n, {"a": used, "b": 4}, {"a": limit, "b": 40}, cached)
        same(t, got, want, "evicted:")


# 09.7: the manager serves the base model


class Server:
    """The base model over blocks: prefill in one piece per prompt, then a token per step for everyone."""

    def __init__(self, manager: Any, n_blocks: int, page: int, parts: Any) -> None:
        self.model, self.manager, self.page, self.parts = workbench.base_model(), manager, page, parts
        mixers = [block.mixer for block in self.model.blocks]
        # Keys and values of all heads side by side: (n_blocks, 2G, page, D) for each layer.
        self.pages = [torch.zeros(n_blocks, 2 * m.n_kv_heads, page, m.head_dim) for m in mixers]
        self.computed, self.most, self.seconds = 0, 0, list[float]()

    @torch.no_grad()
    def forward(self, work: Mapping[str, Sequence[int]]) -> Tensor:
        """New tokens by sequence -> logits after the last of each, (sequences, 256)."""
        began, manager, names = time.perf_counter(), self.manager, list(work)
        for name in names:
            for old, new, kept in manager.reserve(name, len(work[name])):
                for pages in self.pages:
                    pages[new, :, :kept] = pages[old, :, :kept]
        tables = [list(manager.table(name)) for name in names]
        lengths, n_new = [int(manager.length(name)) for name in names], [len(work[name]) for name in names]
        slots = self.parts.slot_mapping(tables, lengths, n_new, self.page)
        ends = [length + n for length, n in zip(lengths, n_new, strict=True)]
        spans = [torch.arange(length, end) for length, end in zip(lengths, ends, strict=True)]
        positions = torch.cat(spans)[None]
        self.most = max(self.most, len({block for table in tables for block in table}))

        x = self.model.embed(torch.tensor([[token for name in names for token in work[name]]]))
        for i, block in enumerate(self.model.blocks):
            m, h = block.mixer, block.mixer_norm(x)
            q = m.rope(split_heads(m.q_proj(h), m.n_heads), positions)  # (1, H, N, D)
            k = m.rope(split_heads(m.k_proj(h), m.n_kv_heads), positions)
            v = split_heads(m.v_proj(h), m.n_kv_heads)
            rows = torch.cat((k, v), dim=1)[0].transpose(0, 1)  # (N, 2G, D)
            self.pages[i] = self.parts.write(self.pages[i], slots, rows)
            past = self.parts.read(self.pages[i], tables, ends)  # (sequences, 2G, S, D)
            heads, start = torch.empty_like(q), 0
            for row, (end, span) in enumerate(zip(ends, spans, strict=True)):
                keys, values = past[row : row + 1, :, :end].chunk(2, dim=1)
                new = slice(start, start + len(span))
                heads[:, :, new] = causal_attention(q[:, :, new], keys, values, span[None])
                start += len(span)
            x = x + m.o_proj(merge_heads(heads))
            x = x + block.mlp(block.mlp_norm(x))
        for name in names:
            manager.commit(name, list(work[name]))
        self.computed += sum(n_new)
        last = torch.tensor(n_new).cumsum(0) - 1
        logits = self.model.logits(self.model.norm(x[0, last]))
        self.seconds.append(time.perf_counter() - began)
        return logits

    def serve(self, prompts: Mapping[str, Sequence[int]], n_new: int) -> dict[str, list[int]]:
        """Greedy continuations of all prompts, with ``n_new`` tokens each."""
        text = {name: list(prompt) for name, prompt in prompts.items()}
        for name, prompt in prompts.items():
            found = self.manager.start(name, prompt)
            text[name].append(int(self.forward({name: prompt[found:]}).argmax()))
        for _ in range(n_new - 1):
            logits = self.forward({name: tokens[-1:] for name, tokens in text.items()})
            for tokens, token in zip(text.values(), logits.argmax(-1).tolist(), strict=True):
                tokens.append(token)
        return text


@torch.no_grad()
def alone(prompt: Sequence[int], n_new: int) -> tuple[list[int], Tensor]:
    """The text and the first logits by kvlearn's decoder, with a cache of its own."""
    model, tokens = workbench.base_model(), list(prompt)
    cache = model.new_cache(1, len(prompt) + n_new)
    logits = first = model(torch.tensor([tokens]), cache)[0, -1]
    for i in range(n_new):
        tokens.append(int(logits.argmax()))
        if i + 1 < n_new:
            logits = model(torch.tensor([tokens[-1:]]), cache)[0, -1]
    return tokens, first


@functools.cache
def expected(prompt: tuple[int, ...], n_new: int) -> tuple[list[int], Tensor]:
    """The same, computed once: the checks ask for the same few prompts in every round and diagnosis."""
    return alone(prompt, n_new)


PREFIX = "# Functions for lists of numbers, each with a docstring.\n\n\ndef "
ENDINGS = (
    "mean(values):\n",
    "median(values):\n",
    "is_sorted(values):\n",
    "product(values):\n",
    "last(values, n):\n",
    "count(values, x):\n",
    "unique(values):\n",
    "maximum(values):\n",
)
PROMPTS = {f"user {i + 1}": list((PREFIX + ending).encode()) for i, ending in enumerate(ENDINGS)}
PAGE, N_BLOCKS, N_NEW = 8, 160, 24
N_SHORT = 3  # tokens that are written in a check, at most


@dataclass(frozen=True)
class Serving:
    """How the parts of this unit serve the base model: what ``compare`` shows."""

    parts: Mapping[str, tuple[str, Any]]

    @property
    def shown(self) -> list[Any]:
        return [Server]

    def compare(self, exercise: Exercise, notebook: Mapping[str, Any], n_new: int) -> workbench.Comparison:
        """Eight prompts with a common start: caches apart by kvlearn's decoder, and the learner's blocks."""
        own = notebook.get("BlockManager")
        solved = judge(exercise, [own], name=False).status == "passed"
        why = "" if solved else f"{exercise.id} does not have all its points yet"
        mine = workbench.Part("BlockManager", exercise.id, own, exercise.right[0], why)
        parts = workbench.choose(exercise, notebook)
        chosen = workbench.namespace(parts)
        mixers = [block.mixer for block in workbench.base_model().blocks]
        token_bytes = sum(2 * 4 * m.n_kv_heads * m.head_dim for m in mixers)

        began = time.perf_counter()
        want = {name: alone(prompt, N_NEW)[0] for name, prompt in PROMPTS.items()}
        before = time.perf_counter() - began
        server = Server(mine.chosen(N_BLOCKS, PAGE, chosen), N_BLOCKS, PAGE, chosen)
        began = time.perf_counter()
        try:
            got = server.serve(PROMPTS, N_NEW)
            written, same_text = written_by(got), "yes" if got == want else "no"
        except Exception as error:
            written = same_text = f"{type(error).__name__}: {shorten(str(error), 120)}"
        after = time.perf_counter() - began
        stored = sum(len(prompt) + N_NEW for prompt in PROMPTS.values()) * token_bytes
        n_prompt = sum(map(len, PROMPTS.values()))
        n_decode = len(PROMPTS) * (N_NEW - 1)
        rows = [
            ("text of the first user", written_by(want), written),
            ("identical text for all eight", "yes", same_text),
            ("bytes of keys and values", f"{stored:,}", f"{server.most * PAGE * token_bytes:,}"),
            ("blocks in use at most", "–", f"{server.most}"),
            ("prompt tokens computed", f"{n_prompt:,}", f"{server.computed - n_decode:,}"),
            ("seconds in all", f"{before:.2f}", f"{after:.2f}"),
        ]
        used = [(part, "yes" if part.is_theirs else "–") for part in (mine, *parts)]
        steps = server.seconds[len(PROMPTS) :]
        times = {
            "kvlearn's decoder, per token": dict.fromkeys(range(1, N_NEW), before / 8 / N_NEW),
            "your manager, per token": {i + 1: seconds / 8 for i, seconds in enumerate(steps)},
        }
        columns = ("kvlearn's decoder, a cache for each", "your block manager")
        caption = "Eight prompts with a common start, served by the base model"
        return workbench.Comparison(exercise.id, used, rows, times, columns, caption)


def written_by(texts: Mapping[str, Sequence[int]]) -> str:
    """The model's text for the first user."""
    name = next(iter(PROMPTS))
    return bytes(texts[name][len(PROMPTS[name]) :]).decode(errors="replace")


SERVING = Serving(
    parts={
        "slot_mapping": ("09.1", library_slots),
        "write": ("09.1", library_write),
        "read": ("09.1", library_read),
        "fork_table": ("09.2", library_fork),
        "write_plan": ("09.2", library_plan),
        "Accounts": ("09.3", LibraryAccounts),
        "PrefixCache": ("09.4", LibraryPrefix),
    }
)

model = Exercise(
    id="09.7",
    slug="model",
    title="Your model",
    answers=("BlockManager",),
    may_use_kvlearn=True,
    wiring=SERVING,
    hints=(
        "Which of the four parts knows how many sequences use a block? Which knows what is in it? When a "
        "block becomes free, which of them has to be told?",
        "`start`: find, open, share. The found tokens are written already: remember them. `reserve`: ask "
        "`plan`, look whether there are enough free blocks for both of its answers, then replace and grow.",
        "`plan` says which entries to replace and how many tokens to keep of each; `accounts.replace` gives "
        "the pair (old, new) of an entry. Together they are the list that `reserve` returns.",
        "`commit`: the tokens of the sequence grow, then PrefixCache.add with *all* its tokens, its salt and "
        "its table. Keep the salt of each sequence; a fork has its parent's.",
        "`stop`: accounts.cancel returns the blocks that became free, and PrefixCache.forget wants exactly "
        "these. A block that another sequence still uses stays in the cache.",
    ),
)


def drawn_prompt(t: CheckContext, n: int) -> list[int]:
    return [t.integer(32, 126) for _ in range(n)]


def write_all(manager: Any, name: str, tokens: Sequence[int]) -> None:
    manager.reserve(name, len(tokens))
    manager.commit(name, list(tokens))


def opened(manager: Any, name: str, prompt: Sequence[int], salt: bytes = b"") -> int:
    """Start a prompt and write what was not found."""
    found = int(manager.start(name, list(prompt), salt))
    write_all(manager, name, prompt[found:])
    return found


def blocks_used(t: CheckContext, manager: Any, n_blocks: int, want: int, when: str) -> None:
    t.number(manager.n_free(), n_blocks - want, f"free blocks {when}:")


@model.requirement(1, "one sequence")
def model_one(t: CheckContext, BlockManager: Answer) -> None:
    """nothing found; a block for each page of tokens, taken when it is reserved; all free at the end"""
    page = t.pick(3, 4, 5)
    manager = BlockManager(12, page, workbench.library(SERVING))
    prompt = drawn_prompt(t, 2 * page + 1)
    t.number(manager.start("a", prompt), 0, "tokens found:")
    blocks_used(t, manager, 12, 0, "after start")
    write_all(manager, "a", prompt)
    blocks_used(t, manager, 12, 3, "after the prompt")
    for token in drawn_prompt(t, page):
        write_all(manager, "a", [token])
    t.number(manager.length("a"), 3 * page + 1, "tokens:")
    t.number(len(manager.table("a")), 4, "blocks in the table:")
    manager.stop("a")
    manager.stop("a")
    blocks_used(t, manager, 12, 0, "after stop, called twice")


@model.requirement(1, "eight prompts with a common start")
def model_eight(t: CheckContext, BlockManager: Answer) -> None:
    """the common full blocks are stored once; of each further prompt only the rest is computed"""
    page = t.pick(3, 4, 5)
    manager = BlockManager(60, page, workbench.library(SERVING))
    start = drawn_prompt(t, 5 * page + 1)
    found = [opened(manager, f"u{i}", [*start, i, *drawn_prompt(t, page)]) for i in range(8)]
    same(t, found, [0] + 7 * [5 * page], "tokens found:")
    lengths = [int(manager.length(f"u{i}")) for i in range(8)]
    same(t, lengths, 8 * [6 * page + 2], "tokens of each:")
    blocks_used(t, manager, 60, 5 + 8 * 2, "with eight prompts")
    manager.stop("u0")
    t.number(opened(manager, "next", [*start, 9]), 5 * page, "tokens found after the first has gone:")
    for name in [*(f"u{i}" for i in range(8)), "next"]:
        manager.stop(name)
    blocks_used(t, manager, 60, 0, "after all have stopped")
    opened(manager, "other", drawn_prompt(t, 20 * page))
    t.number(manager.start("again", [*start, 9]), 0, "tokens found in blocks that others have now:")


@model.requirement(1, "tenants", rounds=2)
def model_tenants(t: CheckContext, BlockManager: Answer) -> None:
    """a prompt is found by prompts of its own salt only, and so is what was generated behind it"""
    page = t.pick(3, 4)
    manager = BlockManager(40, page, workbench.library(SERVING))
    prompt = drawn_prompt(t, 2 * page + 1)
    opened(manager, "a", prompt, b"one")
    more = drawn_prompt(t, 2 * page)
    for token in more:
        write_all(manager, "a", [token])
    longer = [*prompt, *more, 1]
    t.number(opened(manager, "b", longer, b"two"), 0, "tokens found by another tenant:")
    t.number(opened(manager, "c", longer, b"one"), 4 * page, "tokens found by the tenant itself:")


@model.requirement(1, "forks")
def model_fork(t: CheckContext, BlockManager: Answer) -> None:
    """a fork shares all blocks; the block that is written to is replaced, and the copy named; a fork's prompt
    is found by its parent's salt"""
    page = t.pick(3, 4, 5)
    manager = BlockManager(30, page, workbench.library(SERVING))
    prompt = drawn_prompt(t, 2 * page + 2)
    opened(manager, "a", prompt, b"one")
    manager.fork("a", "b")
    blocks_used(t, manager, 30, 3, "after fork")
    before = list(manager.table("a"))
    copies = [tuple(copy) for copy in manager.reserve("b", 1)]
    now = list(manager.table("b"))
    same(t, len(copies), 1, "copies before the fork writes:")
    blocks_used(t, manager, 30, 4, "after the fork has reserved a token")
    same(t, before[2] in now, False, "the fork still has the block that it shared:")
    same(t, copies, [(before[2], now[2], 2)], "(old, new, kept):")
    manager.commit("b", [1])
    same(t, list(manager.table("a")) == before, True, "the parent's table stays:")
    same(t, manager.reserve("a", 1), [], "copies for the parent, which is alone now:")
    manager.commit("a", [2])
    same(t, [int(manager.length(name)) for name in "ab"], 2 * [2 * page + 3], "tokens:")
    write_all(manager, "b", (2 * page - 1) * [3])
    longer = [*prompt, 1, *(2 * page - 1) * [3], 4]
    t.number(manager.start("c", longer, b"one"), 4 * page, "tokens found:")
    for name in "abc":
        manager.stop(name)
    blocks_used(t, manager, 30, 0, "after all have stopped")


@model.requirement(1, "out of blocks", rounds=2)
def model_full(t: CheckContext, BlockManager: Answer) -> None:
    """MemoryError from reserve, with nothing changed, if copies and new blocks together are too many"""
    page = t.pick(3, 4)
    manager = BlockManager(5, page, workbench.library(SERVING))
    opened(manager, "a", drawn_prompt(t, 2 * page + 1))
    manager.fork("a", "b")
    before = list(manager.table("b"))
    t.raises(MemoryError, lambda: manager.reserve("b", 2 * page), "if 3 blocks are needed and 2 are free")
    same(t, list(manager.table("b")) == before, True, "the table stays:")
    blocks_used(t, manager, 5, 3, "after the refusal")
    manager.reserve("b", page)
    blocks_used(t, manager, 5, 5, "after a copy and one more")
    manager.stop("b")
    blocks_used(t, manager, 5, 3, "after the fork has stopped")


def serves_the_same(t: CheckContext, BlockManager: Answer, parts: Any, n_prompts: int, n_new: int) -> None:
    """The logits after the prompts and the text by the model, a fork included."""
    page = t.pick(6, 8, 9)  # the first prompt has 77 tokens: its last block is partly full
    prompts = dict(list(PROMPTS.items())[:n_prompts])
    n_blocks = 100
    server = Server(BlockManager(n_blocks, page, parts), n_blocks, page, parts)
    first = next(iter(prompts))
    server.manager.start("early", prompts[first])
    logits = server.forward({"early": prompts[first]})[0]
    good = t.close(logits, expected(tuple(prompts[first]), N_SHORT)[1], "the first logits:", 1e-3)
    server.manager.fork("early", "other")
    got = server.forward({"early": [40], "other": [41]})
    for row, token in enumerate((40, 41)):
        want = expected((*prompts[first], token), 1)[1]
        good &= t.close(got[row], want, f"logits of {('the parent', 'the fork')[row]}:", 1e-3)
    second = list(prompts)[1]
    found = int(server.manager.start("late", prompts[second]))
    logits = server.forward({"late": prompts[second][found:]})[0]
    want = expected(tuple(prompts[second]), N_SHORT)[1]
    good &= t.close(logits, want, "logits of a prompt with a known start:", 1e-3)
    if not good:
        raise Stop  # the texts need not be written to know that they are wrong
    for name in ("early", "other", "late"):
        server.manager.stop(name)
    texts = server.serve(prompts, n_new)
    for name, prompt in prompts.items():
        text = expected(tuple(prompt), N_SHORT)[0][: len(prompt) + n_new]
        t.true(texts[name] == text, f"the same text for {name}", "another text")


@model.requirement(2, "the same text", rounds=1)
def model_text(t: CheckContext, BlockManager: Answer) -> None:
    """with kvlearn's parts: the logits of a prompt, of a fork, and the text of four prompts at a time"""
    serves_the_same(t, BlockManager, workbench.library(SERVING), 4, N_SHORT)


@model.requirement(1, "your slots and plans", rounds=1, reads_answers=True)
def model_yours_pages(t: CheckContext, BlockManager: Answer) -> None:
    """09.1 and 09.2 are solved; with them the same text"""
    parts = workbench.theirs(model, t.notebook, "slot_mapping", "write", "read", "fork_table", "write_plan")
    serves_the_same(t, BlockManager, parts, 2, 2)


@model.requirement(1, "all your parts: eight prompts", rounds=1, reads_answers=True)
def model_yours_all(t: CheckContext, BlockManager: Answer) -> None:
    """09.3 and 09.4 are solved too; eight prompts, the same text, the common blocks stored once"""
    parts = workbench.theirs(model, t.notebook, *SERVING.parts)
    serves_the_same(t, BlockManager, parts, 8, 2)
    manager = BlockManager(100, 8, parts)
    for name, prompt in PROMPTS.items():
        opened(manager, name, prompt)
    common = {tuple(prompt[:end]) for prompt in PROMPTS.values() for end in range(8, len(prompt), 8)}
    n_last = len(PROMPTS)  # each has the block of its last token for itself
    blocks_used(t, manager, 100, len(common) + n_last, "with eight prompts")


EXERCISES = (tables, cow, accounts, prefix, leak, quotas, model)
