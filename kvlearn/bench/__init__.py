"""``kvlearn bench NAME``: measurements with the instruments of ``kvlearn.measure``.

A benchmark is a module of this package with a function ``parts(device, small)`` and a line in ``BENCHMARKS``.
``common`` has what benchmarks share, ``command`` is the command line. Nothing here imports torch: the command
refuses a wrong name at once.
"""

BENCHMARKS = {
    "full": "full attention: what the cache saves, and how close decode and prefill come to the roofline",
    "shared": "shared and compressed heads: bytes stored and read, both paths of a latent, conversion",
    "window": "windows, patterns, sparse attention: growth of time and memory, steps of decode, bytes",
    "linear": "states in place of caches: exponents, steps, bytes, 100K tokens of decode, others' Mamba",
    "hardware": "one layer of every mechanism at real shapes: bytes, decode, prefill, the batch that fits",
    "models": "models rebuilt from kvlearn's parts beside transformers': decode, mixtures, loading",
    "ring": "blockwise layers at 64K tokens, and a ring of processes: memory, work and bytes per rank",
    "serving": "many users: blocks, hit rates, continuous batching, time to the first token, the leak",
    "decode": "the decode kernel against the floor, torch and its own stages; its PyTorch form on a CPU",
    "decode_tune": "tilings and splits of the decode kernel: the best beside the present (needs a GPU)",
    "gpu": "all that a GPU is wanted for, in 500 s: correctness, tilings, the decode grid, hardware rows",
}
BY_NAME_ONLY = ("decode_tune", "gpu")  # `kvlearn bench all` leaves these out
RESUMED = ("hardware",)  # a later run keeps the rows of parts that are finished
