"""The parts of ``kvlearn bench shared``: grouped heads, the two roads of a latent."""
