"""``kvlearn bench NAME``: what is measured with the instruments of ``kvlearn.measure``.

A benchmark is a module of this package with a function ``parts(device, small)`` and a line in ``BENCHMARKS``.
``common`` has what they share. (The benchmarks of earlier chapters are in kvlearn/measure/bench.)
"""

BENCHMARKS = {
    "models": "models rebuilt from kvlearn's parts beside transformers': decode, mixtures, loading",
    "serving": "many users: blocks, hit rates, continuous batching, time to the first token, the leak",
}
