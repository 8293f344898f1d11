"""``python -m kvlearn`` is the same as the command ``kvlearn``."""

from kvlearn.cli import app

app(prog_name="kvlearn")
