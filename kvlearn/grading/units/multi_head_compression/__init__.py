"""Exercises of chapter 03, one file each: keys and values of all heads squeezed into one latent."""
