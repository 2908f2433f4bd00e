"""What of a folder travels to a cluster: code and settings; no data, nothing that was made, nothing secret.

Ray would pack a folder too, but it knows of no secrets, follows links wherever they lead, and reads all there is before
it finds that too much. Here every file is chosen by its name and counted before one is read, and what was chosen is
one archive, the same bytes for the same files, which Ray uploads as it is and only once.
"""

import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from ray._private.runtime_env.packaging import get_excludes_from_ignore_files as ignored_in

LIMIT = 100 * 2**20
"""Bytes that Ray's dashboard takes in one upload: ray._private.ray_constants.DASHBOARD_CLIENT_MAX_SIZE."""

SECRET = (
    ".*",  # .env, .aws, .ssh, .netrc, .kube, and of what is not secret .git and the caches of tools
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.gpg", "*.ppk", "*.ovpn"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "netrc", "_netrc", "*.env", "*.tfstate*", "*.tfvars"),
    *("credentials*", "*credentials.json", "*service*account*.json", "secret", "secrets", "secret.*", "secrets.*"),
    *("kubeconfig*", "*.kubeconfig", "*.token", "token", "*_token", "token.txt", "*_token.txt", "*.htpasswd"),
)
"""Names, in lower case, of files and folders that are or may be keys."""

MADE = (
    *("__pycache__", "*.py[co]", "*.egg-info", "node_modules", "*cache"),
    *("*.safetensors", "*.gguf", "*.ckpt", "*.pt", "*.pth", "*.tar", "*.tar.gz", "*.tgz", "*.zip", "*.parquet"),
)
"""Names of what programs leave behind, of weights and of data."""

MADE_HERE = ("data", "datasets", "checkpoints", "runs", "outputs", "wandb", "mlruns", "build", "dist", "venv", "env")
"""The same of folders at the top alone: further down, code may be called so."""

ELSEWHERE = "submitted"
"""Folder in the package for a job file that the rest of it does not hold."""

QUIET = logging.getLogger(__name__)
"""For Ray, which would tell of every .gitignore it finds."""

Unwanted = Callable[[Path], bool]


def pack(folder: Path, job: Path, target: Path) -> str:
    """Write the package of a folder to `target`, with the job file in any case; returns the file's place in it.

    What .gitignore and .rayignore name stays here, and so do links.
    ValueError where the folder is too large, or none to give away whole.
    """
    folder, job = folder.resolve(), job.resolve()
    if folder in (Path.home().resolve(), Path(folder.anchor)):
        raise ValueError(f"{folder}: this folder would be uploaded, allowed: one of code and job files alone")
    chosen = {path.relative_to(folder).as_posix(): path for path in files(folder)}
    own = job.relative_to(folder).as_posix() if job.is_relative_to(folder) else f"{ELSEWHERE}/{job.name}"
    chosen[own] = job
    _check_size(folder, chosen)
    try:
        _write(target, chosen)
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be uploaded: {error.strerror}") from None
    return own


def _write(target: Path, chosen: dict[str, Path]) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(chosen.items()):
            # without its own time, so that the same content is the same package
            archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)


def files(folder: Path) -> Iterator[Path]:
    """The files of a folder that may travel, at any depth."""

    def made_here(path: Path) -> bool:
        return path.parent == folder and path.name.lower() in MADE_HERE and path.is_dir()

    yield from _walk(folder, [_unwanted, made_here])


def _walk(folder: Path, unwanted: Sequence[Unwanted]) -> Iterator[Path]:
    unwanted = [*unwanted, *ignored_in(folder, include_gitignore=True, logger=QUIET)]
    for path in sorted(folder.iterdir()):
        if any(no(path) for no in unwanted):
            continue
        if path.is_dir():
            yield from _walk(path, unwanted)
        elif path.is_file():
            yield path


def _unwanted(path: Path) -> bool:
    name = path.name.lower()
    return path.is_symlink() or any(fnmatch(name, pattern) for pattern in (*SECRET, *MADE))


def _check_size(folder: Path, chosen: dict[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in chosen.items()}
    if (total := sum(sizes.values())) >= LIMIT:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        told = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
        raise ValueError(
            f"{folder}: got {total / 2**20:.0f} MiB to upload, allowed: less than {LIMIT >> 20}; a .rayignore can name "
            f"what is to stay, largest are {told}"
        )
