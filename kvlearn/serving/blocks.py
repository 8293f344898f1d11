"""Blocks: the memory of many users' caches, divided into blocks of ``page`` tokens.

    block table    of a request: its tokens 0 … page-1 are in block 7, page … 2·page-1 in block 3, …
    free list      blocks whose content nobody needs
    prefix cache   full blocks by content:  key_i = hash(salt, key_{i-1}, tokens of block i)
    LRU            cached blocks that are in no table, the least recently used first: evicted when the free
                   list is empty

A block has a reference count, the number of tables that it is in. A block with more than one reference is
copied before it is written to (copy-on-write), and a cached one leaves the cache before it is written to.

Tenants share prefixes if they have the same salt. A tenant with a quota owns that many blocks, in use or
cached: it evicts only its own, and no other evicts them. A block is cleared before a tenant gets it that did
not have it before.

Sources: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(2023), sections 4.1 to 4.4 (tables, reference counts, copy-on-write); Zheng et al., "SGLang" (2023), section
3 (prefixes stay cached after a request, LRU).
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvlearn import validate

HashFunction = Callable[[bytes], bytes]
DROPPED = -1  # in a table: the tokens of this block are no longer needed


def sha256(content: bytes) -> bytes:
    """The hash of the prefix cache: 32 bytes."""
    return hashlib.sha256(content).digest()


class OutOfBlocks(RuntimeError):
    """A request for blocks was refused; nothing has changed."""


@dataclass(frozen=True)
class Tenant:
    """Who pays for a request: shares prefixes with tenants of equal ``salt``; owns up to ``quota`` blocks."""

    name: str
    salt: bytes = b""
    quota: int | None = None


@dataclass(eq=False, slots=True)
class Entry:
    """The content of a cached block: these tokens, after the content of ``parent``."""

    key: bytes
    salt: bytes
    parent: "Entry | None"
    tokens: tuple[int, ...]
    block: int

    def holds(self, salt: bytes, parent: "Entry | None", tokens: tuple[int, ...]) -> bool:
        """Whether it is this content. Equal hashes are not enough."""
        if self.salt != salt or self.tokens != tokens or not same_content(self.parent, parent):
            return False
        self.parent = parent  # the same object the next time
        return True


def same_content(a: Entry | None, b: Entry | None) -> bool:
    """Whether two prefixes are equal.

    Mostly they are one object; a window's start may be evicted and computed again while later blocks stay.
    """
    while a is not b:
        if a is None or b is None or a.salt != b.salt or a.tokens != b.tokens:
            return False
        a, b = a.parent, b.parent
    return True


@dataclass(eq=False, slots=True)
class BlockTable:
    """The blocks of one sequence in order, and the tokens in them.

    ``entries`` are those of the first full blocks, as far as they are cached. ``room`` counts the tokens that
    may be written before the next call of ``reserve``.
    """

    tenant: Tenant
    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    room: int = 0

    @property
    def length(self) -> int:
        """Tokens in the blocks."""
        return len(self.tokens)


@dataclass
class Counts:
    """Counts of a pool's operations so far."""

    hits: int = 0  # tokens found in cached blocks
    computed: int = 0  # tokens written
    allocated: int = 0  # blocks, as all that follow
    evicted: int = 0
    copied: int = 0
    cleared: int = 0
    collisions: int = 0


class BlockPool:
    """All blocks, who holds them, and which content is cached in them.

    ``data``, where it is given, is (n_blocks, numbers): a row holds all layers' numbers of one block. Without
    it a pool only keeps account. ``share=False`` caches no prefix. ``hash_function`` maps bytes to bytes;
    contents are compared too, so a bad one costs hits and never serves other tokens' data.

    Raises ValueError for quotas that exceed the pool, that some tenants lack, or whose tenant shares its salt
    with another: a block that both use would count against one of them.
    """

    def __init__(
        self,
        n_blocks: int,
        page: int,
        tenants: Sequence[Tenant] = (Tenant("default"),),
        *,
        data: Tensor | None = None,
        share: bool = True,
        hash_function: HashFunction = sha256,
    ) -> None:
        self.n_blocks, self.page = validate.positive("n_blocks", n_blocks), validate.positive("page", page)
        self.tenants = check_tenants(tenants, n_blocks)
        validate.instance("share", share, bool)
        validate.function("hash_function", hash_function)
        self.data, self.share, self.hash_function = data, share, hash_function
        if data is not None:
            validate.tensor("data", data, (n_blocks, "numbers"))
        self.free = list(range(n_blocks - 1, -1, -1))  # a stack: block 0 is given first
        self.references = [0] * n_blocks
        self.owners: list[str | None] = [None] * n_blocks  # whose numbers are in it, in use or left over
        self.entries: list[Entry | None] = [None] * n_blocks  # of cached blocks
        self.index: dict[bytes, Entry] = {}
        self.owned = dict.fromkeys(self.tenants, 0)  # blocks in use or cached
        self.has_quotas = any(tenant.quota is not None for tenant in tenants)
        names = self.tenants if self.has_quotas else [""]
        self.unused: dict[str, OrderedDict[int, None]] = {name: OrderedDict() for name in names}  # the LRU
        self.counts = Counts()

    # Methods for a scheduler

    def open(self, tenant: str) -> BlockTable:
        """An empty table."""
        return BlockTable(self.tenants[validate.one_of("tenant", tenant, self.tenants)])

    def match(self, table: BlockTable, tokens: Sequence[int]) -> int:
        """Continue ``table`` by cached blocks that hold the next of ``tokens``; how many tokens they hold.

        ``tokens`` is the whole sequence. Its last token is never taken from the cache: its logits are wanted.
        """
        before, page = table.length, self.page
        if table.length != page * len(table.entries) or len(table.blocks) > len(table.entries):
            return 0  # in the middle of a block, or after one that is not cached
        while table.length + page < len(tokens):
            content = tuple(tokens[table.length : table.length + page])
            entry = self.index.get(self._key(table, content))
            parent = table.entries[-1] if table.entries else None
            if entry is None or not entry.holds(table.tenant.salt, parent, content):
                break
            self._take(entry.block)
            table.blocks.append(entry.block)
            table.entries.append(entry)
            table.tokens.extend(content)
        self.counts.hits += table.length - before
        return table.length - before

    def reserve(self, table: BlockTable, n_tokens: int) -> None:
        """Make sure that ``n_tokens`` more can be written after those in ``table``, all of them or none.

        Raises OutOfBlocks, and then nothing has changed.
        """
        n_tokens = validate.at_least("n_tokens", n_tokens, 0)
        last, filled = divmod(table.length, self.page)
        wanted = blocks_for(table.length + n_tokens, self.page) - len(table.blocks)
        shared = filled > 0 and self.references[table.blocks[last]] > 1
        new = self._allocate(table.tenant, max(wanted, 0) + shared)
        if shared:
            copy = new.pop()
            if self.data is not None:
                self.data[copy] = self.data[table.blocks[last]]
            self._release(table.blocks[last])
            table.blocks[last] = copy
            self.counts.copied += 1
        elif filled:
            self._uncache(table.blocks[last])
        table.blocks += new
        table.room = self.page * len(table.blocks) - table.length

    def commit(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Count ``tokens`` as written, and cache the blocks that they fill.

        Content that another request has cached meanwhile is kept once. Raises ValueError if there are more
        than were reserved: nothing is for a fork and for a table that was trimmed.
        """
        page = self.page
        validate.at_most("len(tokens)", len(tokens), table.room, "the room that was reserved")
        table.tokens.extend(tokens)
        table.room -= len(tokens)
        self.counts.computed += len(tokens)
        while self.share and (i := len(table.entries)) < table.length // page:
            content, block = tuple(table.tokens[i * page : (i + 1) * page]), table.blocks[i]
            if block == DROPPED:
                break
            key, parent = self._key(table, content), table.entries[-1] if table.entries else None
            entry = self.index.get(key)
            if entry is None:
                entry = self.index[key] = Entry(key, table.tenant.salt, parent, content, block)
                self.entries[block] = entry
            elif not entry.holds(table.tenant.salt, parent, content):
                self.counts.collisions += 1  # neither this block is cached nor any after it
                break
            elif entry.block != block:
                self._take(entry.block)
                self._release(block)
                table.blocks[i] = entry.block
            table.entries.append(entry)

    def fork(self, table: BlockTable) -> BlockTable:
        """A second table of the same tokens. It shares every block until one of the two writes to it."""
        blocks = table.blocks[: blocks_for(table.length, self.page)]
        for block in blocks:
            if block != DROPPED:
                self._take(block)
        return BlockTable(table.tenant, blocks, table.tokens.copy(), table.entries.copy())

    def trim(self, table: BlockTable, length: int) -> None:
        """Remove the tokens past ``length``.

        Raises ValueError if there are fewer, or if the last token that stays was dropped. A window that has
        dropped blocks may also miss tokens before it: only its owner knows how far it looks back.
        """
        length = validate.at_least("length", length, 0)
        keep = blocks_for(length, self.page)
        validate.at_most("length", length, table.length, "the tokens in the table")
        if DROPPED in table.blocks[max(keep - 1, 0) : keep]:
            raise ValueError(f"length: expected tokens that are still in the cache, got {length}")
        self._release_all(table.blocks[keep:])
        del table.blocks[keep:], table.tokens[length:], table.entries[length // self.page :]
        table.room = 0

    def drop(self, table: BlockTable, position: int) -> None:
        """Release the blocks of tokens before ``position``, as a window does; their places stay in it."""
        for i in range(min(position // self.page, table.length // self.page)):
            if table.blocks[i] != DROPPED:
                self._release(table.blocks[i])
                table.blocks[i] = DROPPED

    def close(self, table: BlockTable) -> None:
        """Release everything that ``table`` holds; cached blocks stay cached until they are evicted."""
        self._release_all(table.blocks)
        table.blocks, table.tokens, table.entries, table.room = [], [], [], 0

    def available(self, tenant: str) -> int:
        """Blocks that ``tenant`` could get now, those included that would be evicted for it."""
        quota = self.tenants[tenant].quota
        room = len(self.free) if quota is None else min(len(self.free), quota - self.owned[tenant])
        return room + len(self._lru(tenant))

    def limit(self, tenant: str) -> int:
        """The most blocks that ``tenant`` can ever hold."""
        return self.tenants[tenant].quota or self.n_blocks

    @property
    def in_use(self) -> int:
        """Blocks in at least one table."""
        return self.n_blocks - len(self.free) - sum(map(len, self.unused.values()))

    # The prefix cache

    def _key(self, table: BlockTable, content: tuple[int, ...]) -> bytes:
        salt = table.tenant.salt
        parent = table.entries[-1].key if table.entries else b""
        # The lengths keep salt and parent apart: no tenant's salt can continue another's.
        start = len(salt).to_bytes(8, "little") + salt + len(parent).to_bytes(8, "little") + parent
        return self.hash_function(start + array("q", content).tobytes())

    def _uncache(self, block: int) -> None:
        entry = self.entries[block]
        if entry is not None:
            del self.index[entry.key]
            self.entries[block] = None

    # Reference counts, the free list, the LRU

    def _lru(self, tenant: str) -> OrderedDict[int, None]:
        return self.unused[tenant if self.has_quotas else ""]

    def _take(self, block: int) -> None:
        if not self.references[block]:
            owner = self.owners[block]
            assert owner is not None
            del self._lru(owner)[block]
        self.references[block] += 1

    def _release(self, block: int) -> None:
        self.references[block] -= 1
        if self.references[block]:
            return
        owner = self.owners[block]
        assert owner is not None
        if self.entries[block] is not None:
            self._lru(owner)[block] = None
        else:
            self.free.append(block)
            self.owned[owner] -= 1

    def _release_all(self, blocks: Iterable[int]) -> None:
        """The last block first, so that it is evicted before those that it follows."""
        for block in reversed(list(blocks)):
            if block != DROPPED:
                self._release(block)

    def _allocate(self, tenant: Tenant, n: int) -> list[int]:
        name = tenant.name
        if n > self.available(name):
            raise OutOfBlocks(
                f"tenant {name!r}: expected at most {self.available(name)} more blocks "
                f"of {self.limit(name)}, got a need of {n}"
            )
        blocks = []
        for _ in range(n):
            if self.free and (tenant.quota is None or self.owned[name] < tenant.quota):
                block = self.free.pop()
            else:
                block = self._evict(name)
            self.references[block] = 1
            self.owned[name] += 1
            blocks.append(block)
        others = [block for block in blocks if self.owners[block] not in (None, name)]
        if others:
            self.counts.cleared += len(others)
            if self.data is not None:
                self.data[others] = 0
        for block in blocks:
            self.owners[block] = name
        self.counts.allocated += n
        return blocks

    def _evict(self, tenant: str) -> int:
        block, _ = self._lru(tenant).popitem(last=False)
        self._uncache(block)
        owner = self.owners[block]
        assert owner is not None
        self.owned[owner] -= 1
        self.counts.evicted += 1
        return block

    def audit(self, tables: Iterable[BlockTable]) -> None:
        """Raise AssertionError if any account is wrong, where ``tables`` are all that are open."""
        held = [0] * self.n_blocks
        for table in tables:
            live = [block for block in table.blocks if block != DROPPED]
            assert len(set(live)) == len(live), "a block is twice in one table"
            needed = blocks_for(table.length + table.room, self.page)
            assert len(table.blocks) >= needed, "tokens without a block"
            for block in live:
                held[block] += 1
            for i, (block, entry) in enumerate(zip(table.blocks, table.entries, strict=False)):
                assert block == DROPPED or entry.block == block, "a table's block holds other content"
                content = tuple(table.tokens[i * self.page : (i + 1) * self.page])
                assert entry.holds(table.tenant.salt, table.entries[i - 1] if i else None, content)
        assert held == self.references, "a reference count is wrong"
        unused = [block for lru in self.unused.values() for block in lru]
        in_use = [block for block, count in enumerate(held) if count]
        everywhere = sorted(self.free + unused + in_use)
        assert everywhere == list(range(self.n_blocks)), "a block is lost, or in two places"
        for entry in self.index.values():
            assert self.entries[entry.block] is entry, "a cached block holds other content"
        assert sum(entry is not None for entry in self.entries) == len(self.index)
        assert all(self.entries[block] is not None for block in unused), "an uncached block is in the LRU"
        assert all(self.entries[block] is None for block in self.free), "a cached block is in the free list"
        owned = dict.fromkeys(self.tenants, 0)
        for block in in_use + unused:
            owned[self.owners[block] or ""] += 1
        assert owned == self.owned, "blocks are counted against the wrong tenant"
        for name, tenant in self.tenants.items():
            assert tenant.quota is None or self.owned[name] <= tenant.quota, "a quota is exceeded"


def blocks_for(n_tokens: int, page: int) -> int:
    """Blocks that hold ``n_tokens``: the last one may be partly empty."""
    return -(-validate.at_least("n_tokens", n_tokens, 0) // validate.positive("page", page))


def check_tenants(tenants: Sequence[Tenant], n_blocks: int) -> dict[str, Tenant]:
    """Tenants by name, if names differ and quotas are all given, fit the pool, and can be kept."""
    for tenant in validate.instance("tenants", tenants, (list, tuple)):
        validate.instance("name", validate.instance("tenants", tenant, Tenant).name, str)
        validate.instance("salt", tenant.salt, bytes)
    by_name = {tenant.name: tenant for tenant in tenants}
    if not tenants or len(by_name) < len(tenants):
        names = [tenant.name for tenant in tenants]
        raise ValueError(f"tenants: expected at least one, with different names, got {names}")
    quotas = [validate.positive("quota", t.quota) for t in tenants if t.quota is not None]
    if quotas:
        if len(quotas) < len(tenants):
            raise ValueError("quota: expected one of every tenant or of none")
        validate.at_most("quota", sum(quotas), n_blocks, "the pool's blocks, for all tenants together")
        if len({tenant.salt for tenant in tenants}) < len(tenants):
            raise ValueError("salt: expected a different one of every tenant, since they have quotas")
    return by_name
