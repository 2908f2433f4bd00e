"""Package a folder for a cluster: code and settings, without data, results and secrets.

No rule finds every secret. Files with names that keys often have are left out, a file that holds a key of a common form
is refused, and .rayignore can list more.

Ray could package a folder itself, but it knows no secrets, follows every link, and reads all files before it finds that
they are too large. Here each file is selected by its name and counted before any is read. The result is one archive,
with the same bytes for the same files, which Ray uploads unchanged and only once.
"""

import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from ray._private.runtime_env.packaging import get_excludes_from_ignore_files as ignored_in

MAX_PACKAGE_BYTES = 100 * 2**20
"""Bytes that Ray's dashboard takes in one upload: ray._private.ray_constants.DASHBOARD_CLIENT_MAX_SIZE."""

SECRET = re.compile(
    r"""
      .*\.(pem|key|p12|pfx|jks|keystore|kdbx|gpg|asc|ppk|ovpn|pkcs\d*|der|tfstate|tfvars|pat)(\..*)?
    | id_(rsa|dsa|ecdsa|ed25519).*
    | (.*[._])?(netrc|pypirc|kubeconfig|htpasswd|s3cfg)(\..*)?
    | (.*\.)?env(\..*)?(?<!\.py)
    | (private|ssh|aws|gcloud|rclone|boto|kaggle|docker-?config)(\.(conf|cfg|json))?
    | .*-[0-9a-f]{12}\.json | .*service.?account.*\.json  # as Google calls them
    | .*(secret|credential|passw(or)?d|(access|api|private|deploy|ssh|root|aws|gcp)[._-]?keys?).*(?<!\.py)
    | (?!special_tokens_map)(.*[._-])?(tokens?|keys?|auth)([._-].*)?(?<!\.py)
    """,
    re.VERBOSE,
)
"""Names, in lower case, of files and folders that are or may be keys; code may be called so."""

KEY_TEXT = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY|\bA[KS]IA[0-9A-Z]{16}\b|\bhf_\w{34}\b|\bghp_\w{36}\b")
"""Forms of keys: of TLS, SSH and Google, of AWS, of the Hugging Face hub, of GitHub."""

EXCLUDED_DIRS = (
    ".*",  # .git and the caches of tools; what is secret of them, such as .env, .aws, .ssh and .kube, too
    *("__pycache__", "*.py[co]", "*.egg-info", "node_modules", "*cache"),
    *("*.safetensors", "*.gguf", "*.ckpt", "*.pt", "*.pth", "*.tar", "*.tar.gz", "*.tgz", "*.zip", "*.parquet"),
)
"""Names of files that programs generate, of weights and of data."""

EXCLUDED_TOP_DIRS = (
    "data",
    "datasets",
    "checkpoints",
    "runs",
    "outputs",
    "wandb",
    "mlruns",
    "build",
    "dist",
    "venv",
    "env",
)
"""The same of folders at the top alone: further down, code may be called so."""

ELSEWHERE = "submitted"
"""Folder in the package for a job file that the rest of it does not hold."""

QUIET = logging.getLogger(__name__)
"""For Ray, which would tell of every .gitignore it finds."""

Unwanted = Callable[[Path], bool]


def write_package(folder: Path, job: Path, target: Path) -> str:
    """Write the package of a folder, with the job file; links and files in .gitignore and .rayignore are left out.

    Args:
        folder: folder to package.
        job: the job file, inside or outside the folder.
        target: archive to write.

    Returns:
        Path of the job file inside the package.

    Raises:
        ValueError: the folder is too large, must not be copied as a whole, or a file in it holds a key.
    """
    folder, job = folder.resolve(), job.resolve()
    if folder in (Path.home().resolve(), Path(folder.anchor)):
        raise ValueError(f"{folder}: this folder would be uploaded, allowed: one of code and job files alone")
    chosen = {path.relative_to(folder).as_posix(): path for path in list_files(folder)}
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
            content = path.read_bytes()
            if KEY_TEXT.search(content):
                raise ValueError(f"{path}: got a file with a key in it, allowed: none; a .rayignore has it stay here")
            # without its own time, so that the same content is the same package
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def list_files(folder: Path) -> Iterator[Path]:
    """List the files of a folder that may be packaged, at any depth."""

    def made_here(path: Path) -> bool:
        return path.parent == folder and path.name.lower() in EXCLUDED_TOP_DIRS and path.is_dir()

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
    return path.is_symlink() or bool(SECRET.fullmatch(name)) or any(fnmatch(name, pattern) for pattern in EXCLUDED_DIRS)


def _check_size(folder: Path, chosen: dict[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in chosen.items()}
    if (total := sum(sizes.values())) >= MAX_PACKAGE_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        told = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
        raise ValueError(
            f"{folder}: got {total / 2**20:.0f} MiB to upload, allowed: less than "
            f"{MAX_PACKAGE_BYTES >> 20}; a .rayignore can name "
            f"what is to stay, largest are {told}"
        )
