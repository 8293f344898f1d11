"""The course in JupyterLab: saving that leaves unchanged notebooks alone, trust, alt text.

Installing kvlearn enables this extension of the Jupyter server (``server.json``), and one of JupyterLab's page
(``labextension/``) that gives figures their alt text.
"""

from typing import Any

from kvlearn.jupyter import saving, trust


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "kvlearn.jupyter"}]


def _load_jupyter_server_extension(server: Any) -> None:
    contents = server.contents_manager
    if hasattr(contents, "_get_os_path"):  # notebooks are files
        keeper = saving.Keeper()
        contents.register_pre_save_hook(keeper.before)
        contents.register_post_save_hook(keeper.after)
    trust.sign_committed(contents.notary, server.log)
