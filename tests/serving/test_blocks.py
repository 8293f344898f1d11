"""The block pool: random operations of several tenants, with the content of every block compared."""

import os
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvlearn.serving import BlockPool, BlockTable, OutOfBlocks, Tenant, blocks_for, sha256
from kvlearn.serving.blocks import DROPPED

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
N_BLOCKS, PAGE = 9, 3
SALTED = (Tenant("a", b"1"), Tenant("b", b"2"))
PAYING = (Tenant("a", b"1", 5), Tenant("b", b"2", 4))
TOGETHER = (Tenant("a"), Tenant("b"))


def four_hashes(content: bytes) -> bytes:
    """Collides all the time."""
    return bytes([sum(content) % 4])


def one_hash(content: bytes) -> bytes:
    return b"same"


def stamps(table: BlockTable, tokens: list[int]) -> torch.Tensor:
    """The inputs of a token's cached numbers: itself, all tokens before it, and whose they are.

    A number that is no stamp of another sequence, up to chance.
    """
    salt = float(int.from_bytes(table.tenant.salt, "little") + 1)
    numbers = []
    for token in tokens:
        before = numbers[-1] if numbers else salt
        numbers.append((before * 31 + token + 1) % 1_000_003)
    return torch.tensor(numbers, dtype=torch.float64)


class Pool(RuleBasedStateMachine):
    """Tables that are opened, continued, forked, trimmed, dropped from and closed in any order."""

    tables: Bundle[BlockTable] = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[BlockTable] = []

    @initialize(
        tenants=st.sampled_from([SALTED, PAYING, TOGETHER]),
        hash_function=st.sampled_from([sha256, four_hashes, one_hash]),
        share=st.sampled_from([True, True, True, False]),
    )
    def start(self, tenants: tuple[Tenant, ...], hash_function: Any, share: bool) -> None:
        data = torch.zeros(N_BLOCKS, PAGE, dtype=torch.float64)
        options = {"data": data, "share": share, "hash_function": hash_function}
        self.pool = BlockPool(N_BLOCKS, PAGE, tenants, **options)

    @property
    def data(self) -> torch.Tensor:
        assert self.pool.data is not None
        return self.pool.data

    def state(self, *names: str) -> Any:
        """Everything that belongs to these tenants, to compare before and after."""
        pool = self.pool
        tables = [
            (t.blocks.copy(), t.tokens.copy(), len(t.entries)) for t in self.open if t.tenant.name in names
        ]
        blocks = [
            (block, pool.references[block], entry and entry.tokens, self.data[block].tolist())
            for block, entry in enumerate(pool.entries)
            if pool.owners[block] in names and (entry or pool.references[block])
        ]
        return tables, blocks

    def write(self, table: BlockTable, new: list[int]) -> None:
        """As the engine does: reserve, write the numbers, commit."""
        before, everything, free = table.length, self.state("a", "b"), self.pool.free.copy()
        kept = set(table.blocks)
        try:
            self.pool.reserve(table, len(new))
        except OutOfBlocks:
            assert self.state("a", "b") == everything
            assert self.pool.free == free
            return
        last, filled = divmod(before, PAGE)
        if filled:  # where it is a copy, all of it is the table's own
            self.marks[table.blocks[last]] = table.tenant.salt
        for block in set(table.blocks) - kept:  # no number of others in a new block
            salts = {t.salt for t in self.pool.tenants.values() if t.name == table.tenant.name}
            assert self.wrote(block) <= salts
        numbers = stamps(table, table.tokens + new)
        for position in range(before, before + len(new)):
            block = table.blocks[position // PAGE]
            assert self.pool.references[block] == 1
            assert self.pool.entries[block] is None
            self.data[block, position % PAGE] = numbers[position]
            self.marks[block] = table.tenant.salt
        self.pool.commit(table, new)

    @property
    def marks(self) -> dict[int, bytes]:
        """The salt of the tenant that wrote to a block last."""
        return self.__dict__.setdefault("_marks", {})

    def wrote(self, block: int) -> set[bytes]:
        return {self.marks[block]} if bool(self.data[block].any()) and block in self.marks else set()

    def others_are_untouched(self, table: BlockTable, operation: Any) -> None:
        """Under quotas nothing that one tenant does changes what another holds or has cached."""
        other = "b" if table.tenant.name == "a" else "a"
        before = self.state(other)
        operation()
        if self.pool.has_quotas:
            assert self.state(other) == before

    @rule(
        target=tables, name=st.sampled_from("ab"), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9)
    )
    def submit(self, name: str, tokens: list[int]) -> BlockTable:
        table = self.pool.open(name)
        self.open.append(table)

        def prefill() -> None:
            found = self.pool.match(table, tokens)
            assert found < len(tokens)
            assert table.tokens == tokens[:found]
            self.write(table, tokens[found:])

        self.others_are_untouched(table, prefill)
        return table

    @rule(table=tables, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def extend(self, table: BlockTable, tokens: list[int]) -> None:
        self.others_are_untouched(table, lambda: self.write(table, tokens))

    @rule(table=tables, n_tokens=st.integers(1, 5))
    def reserve_and_be_interrupted(self, table: BlockTable, n_tokens: int) -> None:
        before = table.tokens.copy()
        try:
            self.pool.reserve(table, n_tokens)
        except OutOfBlocks:
            return
        assert table.tokens == before

    @rule(target=tables, table=tables, tokens=st.lists(st.integers(0, 1), max_size=3))
    def fork(self, table: BlockTable, tokens: list[int]) -> BlockTable:
        other = self.pool.fork(table)
        self.open.append(other)
        if tokens:
            self.others_are_untouched(table, lambda: self.write(other, tokens))
        return other

    @rule(table=tables, share=st.floats(0, 1), tokens=st.lists(st.integers(0, 1), max_size=3))
    def trim(self, table: BlockTable, share: float, tokens: list[int]) -> None:
        length = int(table.length * share)
        if DROPPED in table.blocks[: blocks_for(length, PAGE)][-1:]:
            with pytest.raises(ValueError, match="length: expected tokens that are still in the cache"):
                self.pool.trim(table, length)
        else:
            self.others_are_untouched(table, lambda: self.pool.trim(table, length))
            assert table.length == length
            if tokens:
                self.others_are_untouched(table, lambda: self.write(table, tokens))

    @rule(table=tables, share=st.floats(0, 1))
    def drop(self, table: BlockTable, share: float) -> None:
        self.others_are_untouched(table, lambda: self.pool.drop(table, int(table.length * share)))

    @rule(table=consumes(tables))
    def close(self, table: BlockTable) -> None:
        self.others_are_untouched(table, lambda: self.pool.close(table))
        self.open.remove(table)

    @precondition(lambda self: self.open)
    @rule()
    def close_all(self) -> None:
        for table in self.open:
            self.pool.close(table)
        self.pool.audit(self.open)
        assert self.pool.in_use == 0
        assert sum(self.pool.references) == 0

    @invariant()
    def every_account_is_right(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.audit(self.open)
        assert len(self.pool.index) == 0 or self.pool.share

    @invariant()
    def every_table_reads_its_own_tokens(self) -> None:
        for table in self.open:
            numbers = stamps(table, table.tokens)
            for position in range(table.length):
                block = table.blocks[position // PAGE]
                if block != DROPPED:
                    assert self.data[block, position % PAGE] == numbers[position]

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for table in self.open:
            self.pool.close(table)
        self.pool.audit([])
        assert self.pool.in_use == 0


TestPool = Pool.TestCase
TestPool.settings = settings(
    max_examples=400 if THOROUGH else 40, stateful_step_count=60 if THOROUGH else 30, deadline=None
)


def pool(*tenants: Tenant, n_blocks: int = 8, page: int = 4, **options: Any) -> BlockPool:
    return BlockPool(n_blocks, page, tenants or (Tenant("default"),), **options)


def fill(blocks: BlockPool, tokens: list[int], tenant: str = "default") -> BlockTable:
    """A table that holds ``tokens``; how many were found cached is its length before the last write."""
    table = blocks.open(tenant)
    blocks.match(table, tokens)
    new = tokens[table.length :]
    blocks.reserve(table, len(new))
    blocks.commit(table, new)
    return table


def test_a_prefix_is_shared_by_whole_blocks_and_the_last_token_is_always_computed() -> None:
    blocks = pool()
    first = fill(blocks, list(range(8)))
    for tokens, found in (
        (list(range(12)), 8),
        (list(range(8)), 4),  # the last token's logits are wanted
        ([*range(7), 9, 9], 4),
        ([9, *range(1, 8)], 0),
    ):
        table = blocks.open("default")
        assert blocks.match(table, tokens) == found
        assert table.blocks == first.blocks[: found // 4]
        blocks.close(table)


def test_the_least_recently_used_prefix_is_evicted_and_its_end_before_its_start() -> None:
    blocks = pool(n_blocks=4)
    blocks.close(fill(blocks, [1] * 8))
    blocks.close(fill(blocks, [2] * 8))
    blocks.close(fill(blocks, [1] * 9))  # found: used again
    table = blocks.open("default")
    blocks.reserve(table, 8)
    assert blocks.counts.evicted == 2  # one for the ninth token of [1] · 9, one now
    blocks.close(table)
    found = {}
    for token in (1, 2):
        table = blocks.open("default")
        found[token] = blocks.match(table, [token] * 9)
        blocks.close(table)
    assert found == {1: 8, 2: 0}


def test_content_that_two_requests_computed_at_once_is_kept_once() -> None:
    blocks = pool()
    tables = [blocks.open("default") for _ in range(2)]
    for table in tables:
        assert blocks.match(table, [1] * 9) == 0
        blocks.reserve(table, 9)
    for table in tables:
        blocks.commit(table, [1] * 9)
    assert tables[0].blocks[:2] == tables[1].blocks[:2]
    assert blocks.in_use == 4
    blocks.audit(tables)


def test_a_prefix_whose_start_was_evicted_is_cached_again_when_it_is_computed_again() -> None:
    """A window releases the start of a text before the rest, so that it is evicted first."""
    blocks = pool(n_blocks=4)
    table = fill(blocks, [1] * 9)
    blocks.drop(table, 4)
    other = blocks.open("default")
    blocks.reserve(other, 8)
    assert blocks.counts.evicted == 1
    blocks.close(other)
    blocks.close(table)
    assert fill(blocks, [1] * 9).length == 9
    assert blocks.counts.collisions == 0
    assert blocks.match(blocks.open("default"), [1] * 9) == 8


def test_tenants_share_with_equal_salts_only() -> None:
    for b_salt, found in ((b"", 8), (b"b", 0)):
        blocks = pool(Tenant("a"), Tenant("b", b_salt))
        fill(blocks, [1] * 9, "a")
        assert blocks.match(blocks.open("b"), [1] * 9) == found


def test_no_salt_continues_another() -> None:
    """Where a key's parts are only joined, salt "x" and parent "y" are salt "xy" and no parent."""
    hashed: list[bytes] = []

    def recording(content: bytes) -> bytes:
        hashed.append(content)
        return sha256(content)

    parent = fill(pool(Tenant("a", b"x")), [1] * 8, "a").entries[0].key
    blocks = pool(Tenant("a", b"x"), Tenant("b", b"x" + parent), hash_function=recording)
    fill(blocks, [1] * 8, "a")
    fill(blocks, [1] * 8, "b")
    assert len(set(hashed)) == 4  # two blocks of each


def test_a_collision_serves_no_other_content() -> None:
    blocks = pool(hash_function=one_hash)
    fill(blocks, [1] * 9)
    table = fill(blocks, [2] * 9)
    assert table.entries == []
    assert blocks.counts.collisions == 2  # the second block of the first, the first of the second
    assert blocks.counts.hits == 0
    assert blocks.match(blocks.open("default"), [1] * 9) == 4


def test_a_block_is_cleared_before_another_tenant_gets_it() -> None:
    data = torch.zeros(2, 3)
    blocks = pool(Tenant("a", b"a"), Tenant("b", b"b"), n_blocks=2, data=data)
    table = fill(blocks, [1] * 3, "a")
    data[table.blocks[0]] = 7
    blocks.close(table)
    again = blocks.open("a")
    blocks.reserve(again, 4)
    assert data.max() == 7  # the same tenant's
    blocks.close(again)
    blocks.reserve(blocks.open("b"), 8)
    assert data.max() == 0
    assert blocks.counts.cleared == 1


def test_a_quota_is_kept_whatever_another_tenant_asks() -> None:
    blocks = pool(Tenant("a", b"a", 3), Tenant("b", b"b", 5))
    blocks.close(fill(blocks, [1] * 9, "a"))
    for token in range(20):
        blocks.close(fill(blocks, [token] * 19, "b"))
    assert blocks.match(blocks.open("a"), [1] * 9) == 8
    with pytest.raises(OutOfBlocks, match="tenant 'a': expected at most 1 more blocks of 3, got a need of 3"):
        blocks.reserve(blocks.open("a"), 12)


def test_without_quotas_one_tenant_evicts_another() -> None:
    blocks = pool(Tenant("a", b"a"), Tenant("b", b"b"))
    blocks.close(fill(blocks, [1] * 9, "a"))
    for token in range(20):
        blocks.close(fill(blocks, [token] * 19, "b"))
    assert blocks.match(blocks.open("a"), [1] * 9) == 0


def test_a_fork_copies_the_block_that_it_writes_to_and_no_other() -> None:
    data = torch.arange(8.0)[:, None].repeat(1, 3)
    blocks = pool(data=data)
    table = fill(blocks, [1] * 6)
    other = blocks.fork(table)
    assert blocks.in_use == 2
    blocks.reserve(other, 1)
    assert other.blocks[0] == table.blocks[0]
    assert other.blocks[1] != table.blocks[1]
    assert torch.equal(data[other.blocks[1]], data[table.blocks[1]])
    blocks.reserve(table, 1)  # the only one now: no copy
    assert blocks.counts.copied == 1


def test_a_trimmed_table_takes_its_block_out_of_the_cache_before_it_writes() -> None:
    blocks = pool()
    table = fill(blocks, [1] * 8)
    blocks.trim(table, 6)
    blocks.reserve(table, 2)
    blocks.commit(table, [2, 2])
    assert blocks.match(blocks.open("default"), [1] * 9) == 4
    assert blocks.match(blocks.open("default"), [1] * 6 + [2] * 3) == 8
    blocks_before = table.blocks.copy()
    with pytest.raises(ValueError, match="length: expected at most 8"):
        blocks.trim(table, 9)
    assert table.blocks == blocks_before


def test_only_reserved_tokens_are_committed() -> None:
    """A fork that writes without a copy changes its parent; a trimmed block is found by what was in it."""
    blocks = pool()
    table = fill(blocks, [1] * 6)
    fork = blocks.fork(table)
    blocks.trim(fork, 3)
    for other in (fork, blocks.open("default")):
        before = other.tokens.copy()
        with pytest.raises(ValueError, match=r"len\(tokens\): expected at most 0 \(the room .* got 1"):
            blocks.commit(other, [2])
        assert other.tokens == before
    blocks.audit([table, fork])
    blocks.reserve(fork, 1)
    blocks.commit(fork, [2])
    assert blocks.match(blocks.open("default"), [1] * 5) == 4
    with pytest.raises(ValueError, match="n_tokens: expected at least 0, got -1"):
        blocks.reserve(fork, -1)


@pytest.mark.parametrize(
    ("tenants", "message"),
    [
        ((), "tenants: expected at least one"),
        ((Tenant("a"), Tenant("a")), "tenants: expected at least one, with different names"),
        ((Tenant("a", b"a", 5), Tenant("b", b"b", 4)), "quota: expected at most 8 .* got 9"),
        ((Tenant("a", b"a", 5), Tenant("b", b"b")), "quota: expected one of every tenant or of none"),
        ((Tenant("a", b"", 5), Tenant("b", b"", 3)), "salt: expected a different one of every tenant"),
        ((Tenant("a", b"", 0),), "quota: expected at least 1"),
    ],
)
def test_tenants_that_cannot_be_kept_apart_are_refused(tenants: tuple[Tenant, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockPool(8, 4, tenants)


def test_a_salt_that_is_no_bytes_is_refused() -> None:
    with pytest.raises(TypeError, match="salt: expected bytes, got str"):
        pool(Tenant("a", "text"))  # type: ignore[arg-type]


def test_a_name_that_is_no_tenant_is_refused() -> None:
    with pytest.raises(ValueError, match="tenant: expected one of 'default'; got 'eve'"):
        pool().open("eve")
