"""Unit 09 takes right answers of every style, gives points for half of one, and serves the base model."""

import hashlib
import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from answers import earned, full_marks, right, stub, unit_module
from torch import Tensor

from kvlearn import workbench
from kvlearn.grading import check, find_exercise

pytestmark = pytest.mark.answers

CHECKS = unit_module("09_shared_caches", "checks")
MODEL = find_exercise("09.7")
METHODS = ("grow", "share", "replace", "cancel")  # what 09.3 asks for


def ours(exercise: str) -> tuple[Any, ...]:
    return right(find_exercise(exercise))


# 09.1


def test_slots_may_be_computed_without_a_loop_and_blocks_gathered_at_once() -> None:
    def blocks_needed(lengths: Any, new: Any, page: int) -> Any:
        old, after = np.array(lengths), np.array(lengths) + np.array(new)
        blocks = np.ceil(after / page).astype(int)
        return blocks - np.ceil(old / page).astype(int), (blocks * page - after).sum()

    def slot_mapping(tables: Any, lengths: Any, new: Any, page: int) -> Tensor:
        n = torch.tensor(new)
        rows = torch.repeat_interleave(torch.arange(len(new)), n)
        place = torch.arange(len(rows)) - (n.cumsum(0) - n)[rows] + torch.tensor(lengths)[rows]
        table = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.long)
        for row, blocks in enumerate(tables):
            table[row, : len(blocks)] = torch.tensor(blocks)
        return table[rows, place // page] * page + place % page

    def write(pages: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        flat = pages.transpose(1, 2).flatten(0, 1).clone()
        flat = torch.cat((flat, flat[:1]))  # slot -1 goes to a row that is cut off
        flat[slots] = rows
        return flat[:-1].unflatten(0, (pages.shape[0], pages.shape[2])).transpose(1, 2)

    def read(pages: Tensor, tables: Any, lengths: Any) -> Tensor:
        page, S = pages.shape[2], max(lengths)
        table = torch.zeros(len(tables), -(-S // page), dtype=torch.long)
        for row, blocks in enumerate(tables):
            some = blocks[: table.shape[1]]
            table[row, : len(some)] = torch.tensor(some, dtype=torch.long)
        out = pages[table].permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, :S]
        return out * (torch.arange(S) < torch.tensor(lengths)[:, None])[:, None, :, None]

    assert full_marks("09.1", blocks_needed, slot_mapping, write, read)
    parts = [CHECKS.library_needed, CHECKS.library_slots, CHECKS.library_write, CHECKS.library_read]
    assert full_marks("09.1", *parts)


def test_a_part_of_the_page_tables_earns_its_part() -> None:
    needed, slots, write, read = ours("09.1")
    assert earned(check("09.1", needed, stub, stub, stub)) == [1, 0, 0, 0, 0, 0, 0]
    assert earned(check("09.1", stub, slots, write, stub)) == [0, 1, 1, 1, 1, 0, 0]
    assert earned(check("09.1", stub, stub, stub, read)) == [0, 0, 0, 0, 0, 1, 2]


# 09.2


def test_a_copy_may_be_planned_token_by_token() -> None:
    def append(
        pages: Tensor, table: list[int], length: int, rows: Tensor, references: list[int], free: list[int]
    ) -> Any:
        page, pages, table, references = pages.shape[1], pages.clone(), [*table], [*references]
        queue = sorted(free)
        for i, row in enumerate(rows, start=length):
            at, place = divmod(i, page)
            if at == len(table) or references[table[at]] > 1:
                if not queue:
                    raise MemoryError
                block = queue.pop(0)
                references[block] += 1
                if at == len(table):
                    table.append(block)
                else:
                    pages[block] = pages[table[at]]
                    references[table[at]] -= 1
                    table[at] = block
            pages[table[at], place] = row
        return pages, tuple(table), references, queue

    plan = CHECKS.library_plan
    assert full_marks(
        "09.2", CHECKS.library_fork, lambda *a: [list(map(list, plan(*a)[0])), plan(*a)[1]], append
    )
    fork, write_plan, _ = ours("09.2")
    assert earned(check("09.2", fork, write_plan, stub)) == [1, 1, 1, 1, 0, 0, 0]
    assert earned(check("09.2", stub, stub, append)) == [0, 0, 0, 0, 2, 1, 1]


# 09.3


def test_accounts_may_be_owners_of_blocks() -> None:
    assert full_marks("09.3", CHECKS.LibraryAccounts)


def test_accounts_may_count_in_a_counter_and_free_from_a_heap() -> None:
    class Accounts:
        def __init__(self, n_blocks: int) -> None:
            self.n, self.uses, self.heap = n_blocks, Counter[int](), list(range(n_blocks))
            self.tables: dict[str, Any] = {}

        def open(self, name: str) -> None:
            if name in self.tables:
                raise ValueError
            self.tables[name] = np.zeros(0, dtype=int)

        def grow(self, name: str, n: int) -> None:
            if n > len(self.heap):
                raise MemoryError
            self.add(name, [heapq.heappop(self.heap) for _ in range(n)])

        def add(self, name: str, blocks: Iterable[int]) -> None:
            self.uses.update(blocks)
            self.tables[name] = np.append(self.tables[name], np.array(list(blocks), dtype=int))

        def share(self, name: str, blocks: Sequence[int]) -> None:
            after = Counter([*self.tables[name].tolist(), *blocks])
            if any(n > 1 for n in after.values()) or not all(self.uses[b] for b in blocks):
                raise ValueError
            self.add(name, blocks)

        def replace(self, name: str, i: int) -> Any:
            old = self.tables[name][i]
            if self.uses[old] > 1:
                if not self.heap:
                    raise MemoryError
                self.uses[old] -= 1
                self.tables[name][i] = heapq.heappop(self.heap)
                self.uses[self.tables[name][i]] = 1
            return np.array([old, self.tables[name][i]]).tolist()

        def cancel(self, name: str) -> set[int]:
            table = self.tables.pop(name, np.zeros(0, dtype=int)).tolist()
            self.uses.subtract(table)
            freed = {block for block in table if not self.uses[block]}
            for block in freed:
                heapq.heappush(self.heap, block)
            return freed

        def blocks(self, name: str) -> Any:
            return self.tables[name].tolist()

        def count(self, block: int) -> int:
            return self.uses[block]

        def n_free(self) -> int:
            return len(self.heap)

    assert full_marks("09.3", Accounts)

    class WithoutSharing(Accounts):
        def share(self, name: str, blocks: Sequence[int]) -> None:
            raise NotImplementedError

    assert earned(check("09.3", WithoutSharing)) == [1, 0, 0, 0, 1, 0, 0]


def test_methods_on_the_given_tables_earn_points_one_by_one() -> None:
    (accounts,) = ours("09.3")
    (given,) = accounts.__bases__
    assert earned(check("09.3", type("Given", (given,), dict.fromkeys(METHODS, stub)))) == [0] * 7
    assert earned(check("09.3", type("NoCancel", (accounts,), {"cancel": stub}))) == [0, 0, 0, 0, 1, 2, 0]
    half = type("GrowAndCancel", (accounts,), {"share": stub, "replace": stub})
    assert earned(check("09.3", half)) == [1, 0, 0, 0, 1, 0, 0]


# 09.4


def test_keys_may_be_text_and_the_cache_a_tree_without_any_hash() -> None:
    def block_keys(tokens: list[int], page: int, salt: bytes, hash_function: Callable[[bytes], bytes]) -> Any:
        keys: list[bytes] = []
        for i in range(len(tokens) // page):
            content = (salt, keys[-1] if keys else None, tokens[i * page : (i + 1) * page])
            keys.append(hash_function(repr(content).encode()))
        return tuple(keys)

    class Tree:
        def __init__(self, page: int, hash_function: Any) -> None:
            self.page = page
            self.roots: dict[bytes, Any] = defaultdict(dict)

        def pieces(self, tokens: list[int]) -> list[tuple[int, ...]]:
            n = len(tokens) // self.page
            return [tuple(tokens[i * self.page : (i + 1) * self.page]) for i in range(n)]

        def add(self, tokens: list[int], salt: bytes, blocks: Sequence[int]) -> None:
            node = self.roots[salt]
            for piece, block in zip(self.pieces(tokens), blocks, strict=False):
                node = node.setdefault(piece, [block, {}])[1]

        def find(self, tokens: list[int], salt: bytes) -> list[int]:
            node, found = self.roots[salt], []
            for piece in self.pieces(tokens[:-1]):
                if piece not in node:
                    break
                block, node = node[piece]
                found.append(block)
            return found

        def forget(self, blocks: Iterable[int]) -> None:
            gone = set(blocks)

            def cut(node: dict[Any, Any]) -> dict[Any, Any]:
                """Without these blocks and all that come after them."""
                return {k: [b, cut(later)] for k, (b, later) in node.items() if b not in gone}

            self.roots = defaultdict(dict, {salt: cut(root) for salt, root in self.roots.items()})

    assert full_marks("09.4", block_keys, Tree)
    assert full_marks("09.4", block_keys, CHECKS.LibraryPrefix)
    assert earned(check("09.4", stub, Tree)) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert earned(check("09.4", block_keys, stub)) == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_cache_may_look_for_what_is_cached_before_it_adds_the_rest() -> None:
    """It hashes a prompt twice, and keeps the newer of two contents with one key."""
    block_keys, given = ours("09.4")[0], ours("09.4")[1].__bases__[0]

    class FindsFirst(given):  # type: ignore[misc, valid-type]
        def add(self, tokens: list[int], salt: bytes, blocks: Sequence[int]) -> None:
            known = len(self.find([*tokens, 0], salt))
            for i, key in enumerate(block_keys(tokens, self.page, salt, self.hash_function)):
                if i >= known:
                    self.entries[key] = ((salt, tokens[: (i + 1) * self.page]), blocks[i])

        def find(self, tokens: list[int], salt: bytes) -> list[int]:
            found: list[int] = []
            for i, key in enumerate(block_keys(tokens[:-1], self.page, salt, self.hash_function)):
                content, block = self.entries.get(key, (None, -1))
                if content != (salt, tokens[: (i + 1) * self.page]):
                    break
                found.append(block)
            return found

        def forget(self, blocks: Iterable[int]) -> None:
            self.entries = {k: e for k, e in self.entries.items() if e[1] not in blocks}

    assert full_marks("09.4", block_keys, FindsFirst)


# 09.5


def test_a_leak_may_be_found_in_other_ways() -> None:
    def from_hits(log: list[tuple[str, int]]) -> str:
        seen: set[str] = set()
        best = ("", -1)
        for guess, cached in log:
            if guess not in seen and cached > best[1]:
                best = (guess, cached)
            seen.add(guess)
        return best[0]

    def from_times(log: list[tuple[str, float]]) -> str:
        rows = defaultdict(list)
        for guess, seconds in log:
            rows[guess].append(seconds)
        return min((sorted(row)[len(row) // 2], guess) for guess, row in rows.items())[1]

    def closing(servers: Any) -> list[str]:
        names = []
        for name, new_server in servers.items():
            wins = np.zeros(2)
            for trial in range(60):
                candidates, ask, secret = new_server(1000 + trial)
                seen = np.array([ask(guess) for guess in candidates])
                wins += [candidates[seen[:, 0].argmax()] == secret, candidates[seen[:, 1].argmin()] == secret]
            if wins.max() <= 19:
                names.append(name)
        return names

    assert full_marks("09.5", from_hits, from_times, closing)
    assert earned(check("09.5", from_hits, stub, stub)) == [1, 1, 0, 0, 0, 0]
    assert earned(check("09.5", stub, stub, set)) == [0] * 6


# 09.6


def test_quotas_may_come_from_a_heap() -> None:
    def plan(capacity: int, minimum: dict[str, int], demand: dict[str, int]) -> dict[str, Any]:
        rest = capacity - sum(minimum.values())
        if rest < 0:
            raise ValueError
        quota = {name: np.int64(n) for name, n in minimum.items()}
        heap = [(n, i, name) for i, (name, n) in enumerate(minimum.items()) if n < demand[name]]
        heapq.heapify(heap)
        while rest and heap:
            n, i, name = heapq.heappop(heap)
            quota[name], rest = quota[name] + 1, rest - 1
            if n + 1 < demand[name]:
                heapq.heappush(heap, (n + 1, i, name))
        return quota

    needs, _, victims = ours("09.6")
    assert full_marks("09.6", needs, plan, lambda *a: None if victims(*a) is None else tuple(victims(*a)))
    assert earned(check("09.6", needs, stub, stub)) == [1, 0, 0, 0, 0, 0]
    assert earned(check("09.6", stub, plan, stub)) == [0, 2, 1, 1, 0, 0]


# 09.7


class OwnManager:
    """Does everything itself: no part is used."""

    def __init__(self, n_blocks: int, page: int, parts: Any) -> None:
        self.n, self.page = n_blocks, page
        self.sequences: dict[str, tuple[bytes, list[int], list[int]]] = {}

    def start(self, name: str, prompt: Sequence[int], salt: bytes = b"") -> int:
        best: list[int] = []
        for other, tokens, blocks in self.sequences.values():
            same = 0
            while same < min(len(tokens), len(prompt) - 1) and tokens[same] == prompt[same]:
                same += 1
            if other == salt and same // self.page > len(best):
                best = blocks[: same // self.page]
        n = len(best) * self.page
        self.sequences[name] = (salt, list(prompt[:n]), list(best))
        return n

    def used(self) -> Counter[int]:
        return Counter(block for _, _, blocks in self.sequences.values() for block in blocks)

    def reserve(self, name: str, n: int) -> list[tuple[int, int, int]]:
        _, tokens, blocks = self.sequences[name]
        used = self.used()
        free = [block for block in range(self.n) if not used[block]]
        end = -(-(len(tokens) + n) // self.page)
        shared = [i for i in range(len(tokens) // self.page, min(end, len(blocks))) if used[blocks[i]] > 1]
        if len(shared) + max(end - len(blocks), 0) > len(free):
            raise MemoryError
        copies = []
        for i in shared:
            copies.append((blocks[i], free[0], max(len(tokens) - i * self.page, 0)))
            blocks[i] = free.pop(0)
        while len(blocks) < end:
            blocks.append(free.pop(0))
        return copies

    def commit(self, name: str, tokens: Sequence[int]) -> None:
        self.sequences[name][1].extend(tokens)

    def fork(self, name: str, new: str) -> None:
        salt, tokens, blocks = self.sequences[name]
        self.sequences[new] = (salt, list(tokens), blocks[: -(-len(tokens) // self.page)])

    def stop(self, name: str) -> None:
        self.sequences.pop(name, None)

    def table(self, name: str) -> list[int]:
        return self.sequences[name][2]

    def length(self, name: str) -> int:
        return len(self.sequences[name][1])

    def n_free(self) -> int:
        return self.n - len(self.used())


def solved() -> dict[str, Any]:
    """The names of a notebook in which everything is solved."""
    names: dict[str, Any] = {}
    for number in range(1, 8):
        exercise = find_exercise(f"09.{number}")
        names |= dict(zip(exercise.answers, right(exercise), strict=True))
    return names


def test_a_manager_may_do_everything_itself() -> None:
    assert full_marks("09.7", OwnManager)


def test_a_manager_without_forks_earns_points_for_the_rest() -> None:
    (manager,) = ours("09.7")
    score = check("09.7", type("NoForks", (manager,), {"fork": stub}), notebook=solved())
    assert earned(score) == [1, 1, 1, 0, 0, 0, 0, 0]


def test_points_for_parts_depend_on_the_parts() -> None:
    names = solved()
    score = check("09.7", names["BlockManager"], notebook=names)
    assert score.status == "passed", score.to_text()
    names["PrefixCache"] = stub
    assert earned(check("09.7", names["BlockManager"], notebook=names)) == [1, 1, 1, 1, 1, 2, 1, 0]
    names["read"] = stub
    assert earned(check("09.7", names["BlockManager"], notebook=names)) == [1, 1, 1, 1, 1, 2, 0, 0]


def test_a_plan_may_treat_the_references_as_an_array() -> None:
    """In 09.7 it gets them as in 09.2: a list with a number for each block."""
    fork_table, _, append = ours("09.2")

    def by_array(table: list[int], length: int, n: int, page: int, references: Any) -> Any:
        first, end = length // page, -(-(length + n) // page)
        shared = np.array(references)[np.array(table, dtype=int)[first:end]] > 1
        return [(int(i), max(length - int(i) * page, 0)) for i in np.flatnonzero(shared) + first], max(
            end - len(table), 0
        )

    assert full_marks("09.2", fork_table, by_array, append)
    names = solved() | {"write_plan": by_array}
    assert check("09.7", names["BlockManager"], notebook=names).status == "passed"


def test_the_comparison_shows_the_same_text_in_fewer_bytes() -> None:
    shown = workbench.compare("09.7", solved())
    rows = {what: values for what, *values in shown.rows}
    assert rows["identical text for all eight"] == ["yes", "yes"]
    before, after = (int(text.replace(",", "")) for text in rows["bytes of keys and values"])
    assert after < 0.7 * before
    before, after = (int(text.replace(",", "")) for text in rows["prompt tokens computed"])
    assert after < 0.5 * before
    assert all(part.is_theirs for part, _ in shown.parts)
    assert "picture" not in repr(shown)
    assert workbench.compare("09.7", {}).parts[0][0].chosen is MODEL.right[0]


@pytest.mark.parametrize("exercise", ["09.1", "09.2", "09.3", "09.4", "09.6"])
def test_a_wrong_answer_is_graded_at_once(exercise: str) -> None:
    found = find_exercise(exercise)
    wrong = found.misconceptions[0].answers
    check(exercise, *wrong)  # the first one makes all candidates
    start = time.process_time()
    check(exercise, *wrong)
    assert time.process_time() - start < 1.5


def test_the_longest_digest_is_no_salt_of_another_chain() -> None:
    """Salts as long as a key, as an attacker would choose them."""
    (block_keys, _), seen = ours("09.4"), set()
    digest = hashlib.sha256(b"").digest()
    for salt in (b"", digest, 2 * digest):
        seen |= set(block_keys([1, 2, 3, 4], 2, salt, lambda content: hashlib.sha256(content).digest()))
    assert len(seen) == 6
