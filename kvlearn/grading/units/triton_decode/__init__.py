"""Exercises of chapter 11, one file each: the parts of a decode kernel, written in Triton."""
