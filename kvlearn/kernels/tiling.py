"""How a decode step is cut: into tiles that fit the shared memory, and into splits that fill the machine.

The numbers come from what the compiler reports (``python -m kvlearn.kernels.compiled``): no spilled register,
16-byte loads of all but one-byte numbers, about 64 KiB on their way to each program. Untried on a GPU;
``kvlearn bench decode_tune`` tries them and others there.
"""

import functools
from dataclasses import dataclass, replace

from kvlearn import validate

KIB = 1024
WALK = 2  # stages more, for a load that waits for another one: of the number of its page
START = 4  # tiles' worth of time that a program takes to begin, and to hand over its partial result
TILE_BYTES = 32 * KIB  # of K and V in one tile: two of them on their way hide the memory's latency


@dataclass(frozen=True)
class Tiling:
    """What one program holds: ``block_h`` query heads against ``block_n`` keys at a time.

    ``num_warps`` of 32 threads share a program; while it computes on one tile, others are on their way.
    """

    block_h: int
    block_n: int
    num_warps: int
    num_stages: int

    def walks(self, page: int | None) -> bool:
        """Whether the keys of one tile may lie in several pages, each to be looked up in the table."""
        return page is not None and page % self.block_n != 0

    def shared_bytes(self, row_bytes: int, query_bytes: int, page: int | None) -> int:
        """Shared memory of a program, nearly: tiles of ``row_bytes`` a key, and queries that lie there too.

        From 64 rows on the tensor cores of a Hopper GPU read tiles and queries in place, one tile longer.
        """
        tiles = self.num_stages - (self.block_h < 64) - WALK * self.walks(page)
        return max(tiles, 1) * self.block_n * row_bytes + self.block_h * query_bytes


def choose_tiling(
    group: int, row_bytes: int, itemsize: int, page: int | None, limit: int, fp32: bool = False
) -> Tiling:
    """A tiling for ``group`` query heads a KV head and ``row_bytes`` of K and V together for a key.

    ``itemsize``: bytes of a number in the cache. ``page``: slots of a page, or None. ``limit``: bytes of
    shared memory that a program may have. ``fp32``: of the queries; exact products know no tensor cores.
    """
    block_h = 16 if group <= 16 or fp32 else 32 if group <= 32 else 64
    block_n = min(max(TILE_BYTES // row_bytes, 16), 128 if itemsize > 1 else 64)  # converting takes registers
    block_n = 1 << (block_n.bit_length() - 1)
    if page is not None and page >= 32:
        while page % block_n and block_n > 32:
            block_n //= 2  # a tile within one page looks into the table once
    wide = block_h > 16 or itemsize != 2 or block_n == 128 or fp32
    tiling = Tiling(block_h, block_n, 8 if wide else 4, 3)
    if tiling.walks(page):  # more threads a tile: each holds fewer of its addresses
        tiling = replace(tiling, block_n=min(block_n, 64), num_warps=8, num_stages=3 + WALK)
    while tiling.shared_bytes(row_bytes, 0, page) > limit:
        if tiling.block_n > 16:
            tiling = replace(tiling, block_n=tiling.block_n // 2)
        else:
            tiling = replace(tiling, num_stages=tiling.num_stages - 1)
    return tiling


# For latent attention, best first. With 64 heads and more it is arithmetic that counts, and 64 rows are what
# the tensor cores of a Hopper GPU want at least.
LATENT_TILINGS = (
    Tiling(block_h=64, block_n=64, num_warps=8, num_stages=2),
    Tiling(block_h=64, block_n=32, num_warps=8, num_stages=2),
    Tiling(block_h=16, block_n=32, num_warps=4, num_stages=3),
    Tiling(block_h=16, block_n=32, num_warps=4, num_stages=2),
    Tiling(block_h=16, block_n=16, num_warps=4, num_stages=2),
)


def choose_latent_tiling(
    n_heads: int,
    row_bytes: int,
    query_bytes: int,
    page: int | None,
    limit: int,
    capability: int,
    fp32: bool = False,
) -> Tiling:
    """A tiling for ``n_heads`` that share one latent row of ``row_bytes``; a query has ``query_bytes``."""
    if fp32:
        return Tiling(block_h=16, block_n=16, num_warps=8, num_stages=2)
    for tiling in LATENT_TILINGS:
        walks = tiling.walks(page)
        # 64 rows leave no registers for keys of which each lies in a page of its own.
        if tiling.block_h > 16 and (n_heads <= 32 or walks):
            continue
        # Blackwell's tensor cores keep results in a memory of their own, and more copies of the tiles.
        if capability >= 100 and tiling == LATENT_TILINGS[0]:
            continue
        if walks:
            tiling = replace(tiling, num_stages=tiling.num_stages + WALK)
        if tiling.shared_bytes(row_bytes, query_bytes, page) <= limit:
            break
    return tiling


@functools.lru_cache(4096)  # asked at every step of every layer
def choose_splits(programs: int, tiles: int, multiprocessors: int, per_multiprocessor: int = 2) -> int:
    """Into how many pieces to cut every row's context, so that all multiprocessors read all the time.

    ``programs``: pairs of a row and a KV head (times blocks of heads). ``tiles`` of the longest row. The
    machine runs ``multiprocessors`` · ``per_multiprocessor`` programs at a time, in waves. A split takes the
    time of its tiles, whole ones, and that of ``START`` more; the fewest splits of the shortest time

        waves · (tiles of a split + START)

    are taken, of those that fill one wave and one more.
    """
    for name, value in (("programs", programs), ("multiprocessors", multiprocessors)):
        validate.positive(name, value)
    slots = multiprocessors * validate.positive("per_multiprocessor", per_multiprocessor)
    most = max(min(validate.at_least("tiles", tiles, 0), slots // programs + 1), 1)

    def time(splits: int) -> int:
        return -(-programs * splits // slots) * (-(-tiles // splits) + START)

    return min(range(1, most + 1), key=time)
