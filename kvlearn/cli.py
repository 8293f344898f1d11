"""The command ``kvlearn``: a thin door to the rooms that do the work.

Every command imports what it needs when it runs, so that ``kvlearn bench`` works where JupyterLab and its
friends are not installed.
"""

import typer

app = typer.Typer(
    name="kvlearn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The command line of the course: look at this machine, grade exercises, measure, train.",
)
