"""The parts of ``kvlearn bench shared``: grouped heads, the naive and the absorbed path of a latent."""
