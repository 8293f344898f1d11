"""Tiles and splits of a decode step: tiles fit the shared memory, splits occupy the whole GPU.

The tilings follow the compiler's report (``python -m kvlearn.kernels.compiled``): no spilled register,
16-byte loads of all but one-byte numbers, about 64 KiB in flight per program. Not measured on a GPU yet;
``kvlearn bench decode_tune`` measures them and others.
"""

from dataclasses import dataclass, replace

from kvlearn import validate

KIB = 1024
WALK = 2  # additional stages where a load waits for another load, of its page's number
TILE_BYTES = 32 * KIB  # of K and V in one tile; two tiles in flight hide the memory's latency


@dataclass(frozen=True)
class Tiling:
    """The tile of one program: ``block_h`` query heads and ``block_n`` keys at a time.

    A program has ``num_warps`` of 32 threads; while it computes on one tile, it loads the next ones.
    """

    block_h: int
    block_n: int
    num_warps: int
    num_stages: int

    def walks(self, page: int | None) -> bool:
        """Whether the keys of one tile may lie in several pages, so that each needs a lookup in the table."""
        return page is not None and page % self.block_n != 0

    def shared_bytes(self, row_bytes: int, query_bytes: int, page: int | None) -> int:
        """Shared memory of a program, approximately: tiles of ``row_bytes`` per key, and the queries.

        From 64 rows on, a Hopper GPU's tensor cores read tiles and queries there, so one more tile is kept.
        """
        tiles = self.num_stages - (self.block_h < 64) - WALK * self.walks(page)
        return max(tiles, 1) * self.block_n * row_bytes + self.block_h * query_bytes


def choose_tiling(
    group: int, row_bytes: int, itemsize: int, page: int | None, limit: int, fp32: bool = False
) -> Tiling:
    """A tiling for ``group`` query heads per KV head and ``row_bytes`` of K and V together per key.

    ``itemsize``: bytes per number in the cache. ``page``: slots per page, or None. ``limit``: bytes of shared
    memory per program. ``fp32``: whether the queries are; exact products do not use tensor cores.
    """
    block_h = 16 if group <= 16 or fp32 else 32 if group <= 32 else 64
    block_n = min(max(TILE_BYTES // row_bytes, 16), 128 if itemsize > 1 else 64)  # converting takes registers
    block_n = 1 << (block_n.bit_length() - 1)
    if page is not None and page >= 32:
        while page % block_n and block_n > 32:
            block_n //= 2  # a tile within one page needs one lookup
    wide = block_h > 16 or itemsize != 2 or block_n == 128 or fp32
    tiling = Tiling(block_h, block_n, 8 if wide else 4, 3)
    if tiling.walks(page):  # more threads per tile: each holds fewer addresses
        tiling = replace(tiling, block_n=min(block_n, 64), num_warps=8, num_stages=3 + WALK)
    while tiling.shared_bytes(row_bytes, 0, page) > limit:
        if tiling.block_n > 16:
            tiling = replace(tiling, block_n=tiling.block_n // 2)
        else:
            tiling = replace(tiling, num_stages=tiling.num_stages - 1)
    return tiling


# For latent attention, best first. From 64 heads on arithmetic is the limit, and a Hopper GPU's warpgroup
# instructions need at least 64 rows.
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
    """A tiling for ``n_heads`` that share latents of ``row_bytes`` each; a query takes ``query_bytes``."""
    if fp32:
        return Tiling(block_h=16, block_n=16, num_warps=8, num_stages=2)
    for tiling in LATENT_TILINGS:
        walks = tiling.walks(page)
        # With 64 rows no registers are left for keys that lie in different pages.
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


def choose_splits(programs: int, tiles: int, multiprocessors: int, per_multiprocessor: int = 2) -> int:
    """The number of splits of every row's context that keeps all multiprocessors reading.

    ``programs``: pairs of a row and a KV head (times blocks of heads). ``tiles`` of the longest row. The GPU
    runs ``multiprocessors`` · ``per_multiprocessor`` programs at a time. Of the numbers of splits that it
    runs all at once, the result is the smallest with the fewest tiles per split, rounded up. One split more
    would take a second wave: no fewer tiles in all, and every start twice.
    """
    programs, tiles = validate.positive("programs", programs), validate.at_least("tiles", tiles, 0)
    multiprocessors = validate.positive("multiprocessors", multiprocessors)
    slots = multiprocessors * validate.positive("per_multiprocessor", per_multiprocessor)
    most = max(min(tiles, slots // programs), 1)
    tiles_per_split = max(-(-tiles // most), 1)
    return max(-(-tiles // tiles_per_split), 1)
