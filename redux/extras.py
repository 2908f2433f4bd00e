"""The command that installs an optional part of this package, for errors that ask for one."""

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote, urlsplit

PACKAGE = "redux-vlm"


def write_install_command(extra: str) -> str:
    """Write the pip command that adds an extra of pyproject.toml; it works from any folder where pip tells the source.

    The package is on no index, so its name alone would not be found: it is installed from its folder.
    """
    folder = _read_source()
    if folder is None:
        return f'pip install -e ".[{extra}]" in a clone of the repository'
    return f"pip install -e {shlex.quote(f'{folder}[{extra}]')}"


def _read_source() -> str | None:
    """The folder from which pip installed the package, None where it does not tell one."""
    try:
        source = json.loads(distribution(PACKAGE).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return None
    url = urlsplit(source.get("url", ""))
    return unquote(url.path) if url.scheme == "file" and "dir_info" in source else None
