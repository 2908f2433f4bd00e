"""The command that installs an optional part of this package, for errors that ask for one."""

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote, urlsplit

PACKAGE = "redux-vlm"


def write_install_command(extra: str) -> str:
    """Write the pip command that adds an extra of pyproject.toml.

    The package is on no index, so pip must install it from its folder. If pip recorded the folder, the command works
    from anywhere.
    """
    folder = _read_source()
    if folder is None:
        return f'pip install -e ".[{extra}]" in a clone of the repository'
    return f"pip install -e {shlex.quote(f'{folder}[{extra}]')}"


def _read_source() -> str | None:
    """Read the folder from which pip installed the package; None if pip recorded none."""
    try:
        source = json.loads(distribution(PACKAGE).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return None
    # PEP 610: dir_info is there only if the package was installed from a folder.
    url = urlsplit(source.get("url", ""))
    return unquote(url.path) if url.scheme == "file" and "dir_info" in source else None
