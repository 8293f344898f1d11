"""The parts of ``kvlearn bench linear``: exponents, layers, others' Mamba, steps, bytes, long texts."""
