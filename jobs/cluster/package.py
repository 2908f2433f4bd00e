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

from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

MAX_PACKAGE_BYTES = 100 * 2**20
"""Limit of an upload to Ray's dashboard: ray._private.ray_constants.DASHBOARD_CLIENT_MAX_SIZE in Ray 2.60."""

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
"""Names, in lower case, of files and folders that may hold keys; Python files may have such names."""

KEY_TEXT = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY|\bA[KS]IA[0-9A-Z]{16}\b|\bhf_\w{34}\b|\bghp_\w{36}\b")
"""Texts of keys: of TLS, SSH and Google, of AWS, of the Hugging Face Hub, of GitHub."""

EXCLUDED_DIRS = (
    ".*",  # .git, caches of tools, and secrets such as .env, .aws, .ssh and .kube
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
"""Names of such folders at the top; further down, code may have these names."""

OUTSIDE_FOLDER = "submitted"
"""Folder in the package for a job file from outside the packaged folder."""

SILENT_LOGGER = logging.getLogger(__name__)
"""Logger for Ray, which logs every .gitignore that it reads."""

PathPredicate = Callable[[Path], bool]
"""Function that is true for a path to exclude."""


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
    # Such a folder holds private files that pass the rules below.
    if folder in (Path.home().resolve(), Path(folder.anchor)):
        raise ValueError(f"{folder}: this folder would be uploaded, allowed: a folder with code and job files alone")
    paths = {path.relative_to(folder).as_posix(): path for path in list_files(folder)}
    job_name = job.relative_to(folder).as_posix() if job.is_relative_to(folder) else f"{OUTSIDE_FOLDER}/{job.name}"
    paths[job_name] = job
    _check_size(folder, paths)
    try:
        _write_archive(target, paths)
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be uploaded: {error.strerror}") from None
    return job_name


def _write_archive(target: Path, paths: dict[str, Path]) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(paths.items()):
            # All of it in memory is fine: the size of the package was checked.
            content = path.read_bytes()
            if KEY_TEXT.search(content):
                raise ValueError(f"{path}: got a file with a key in it, allowed: none; a .rayignore can exclude it")
            # Without the time of the file, so that the same content gives the same package.
            try:
                archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
            except UnicodeEncodeError:
                raise ValueError(
                    f"{path}: got a name that is not UTF-8, allowed: UTF-8; a .rayignore can exclude it"
                ) from None


def list_files(folder: Path) -> Iterator[Path]:
    """List the files of a folder that may be packaged, at any depth."""

    def is_excluded_at_top(path: Path) -> bool:
        return path.parent == folder and path.name.lower() in EXCLUDED_TOP_DIRS and path.is_dir()

    yield from _walk(folder, [_is_excluded, is_excluded_at_top])


def _walk(folder: Path, predicates: Sequence[PathPredicate]) -> Iterator[Path]:
    """Yield the files below a folder that no predicate excludes; ignore files of a folder hold for all below it."""
    predicates = [*predicates, *get_excludes_from_ignore_files(folder, include_gitignore=True, logger=SILENT_LOGGER)]
    for path in sorted(folder.iterdir()):
        if any(is_excluded(path) for is_excluded in predicates):
            continue
        if path.is_dir():
            yield from _walk(path, predicates)
        elif path.is_file():
            yield path


def _is_excluded(path: Path) -> bool:
    """Return True if a path is excluded at any depth: a link, a possible secret, or a generated file."""
    name = path.name.lower()
    return path.is_symlink() or bool(SECRET.fullmatch(name)) or any(fnmatch(name, pattern) for pattern in EXCLUDED_DIRS)


def _check_size(folder: Path, paths: dict[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    if (total := sum(sizes.values())) >= MAX_PACKAGE_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        listing = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
        raise ValueError(
            f"{folder}: got {total / 2**20:.0f} MiB to upload, allowed: less than "
            f"{MAX_PACKAGE_BYTES >> 20}; a .rayignore can exclude files, the largest are {listing}"
        )
