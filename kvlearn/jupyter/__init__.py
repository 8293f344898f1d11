"""The course in JupyterLab: unchanged notebooks stay as they are, ours are trusted, figures have alt text.

Installing kvlearn enables this extension of the Jupyter server (``server.json``) and one of JupyterLab's page
(``labextension/``), and adds a template to nbconvert (``nbconvert/``). The installed files are copies:
install again after a change (``pip install --no-deps -e .``).
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
