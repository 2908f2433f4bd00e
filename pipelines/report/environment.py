"""Record of where and with what a run was computed: date, code, machine, versions.

environment.jsonl   one line for each launch of the command on the run folder:
    {"at": unix seconds, "steps": steps left, "commit", "is_modified", "cpu", "cpus", "gpus": {type: count}, "nodes",
     "system", "versions": {package: version}}

Resources are those of the Ray cluster, also of machines without this process; `cpu` is the processor of this one.
"""

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.core import jsonl

ENVIRONMENT_FILE = "environment.jsonl"
PACKAGES = ("redux-vlm", "torch", "ray", "transformers", "deepspeed")
REPOSITORY = Path(__file__).parents[2]
GIT_TIMEOUT_S = 10
GPUS_TITLE = "GPUs"
CPUS_TITLE = "CPUs"


def record_environment(run: Path, steps: Sequence[str]) -> None:
    """Append the environment of this launch; Ray must be connected.

    Args:
        run: run folder.
        steps: steps that this launch works on.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    resources = ray.cluster_resources()
    entry = {
        "at": time.time(),
        "steps": list(steps),
        **read_commit(REPOSITORY),
        "cpu": read_processor(),
        "cpus": resources.get("CPU", 0),
        "gpus": _count_gpus(nodes),
        "nodes": len(nodes),
        "system": platform.platform(),
        "versions": read_versions(),
    }
    jsonl.drop_partial_line(run / ENVIRONMENT_FILE)
    jsonl.append(run / ENVIRONMENT_FILE, [entry])


def _count_gpus(nodes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Count the GPUs of a Ray cluster by their type, such as "H100"; "GPU" if Ray does not know it."""
    prefix = "accelerator_type:"
    counts: dict[str, float] = {}
    for node in nodes:
        if gpus := node["Resources"].get("GPU", 0):
            names = [name.removeprefix(prefix) for name in node["Resources"] if name.startswith(prefix)]
            name = names[0] if names else "GPU"
            counts[name] = counts.get(name, 0) + gpus
    return counts


def read_commit(repository: Path) -> dict[str, Any]:
    """Read the commit of a git checkout, and if files differ from it; {} for an installed package."""
    if not (repository / ".git").exists():
        return {}
    try:
        commit = _run_git(repository, "rev-parse", "HEAD").strip()
        return {
            "commit": commit,
            "is_modified": bool(_run_git(repository, "status", "--porcelain", "--untracked-files=no").strip()),
        }
    except (OSError, subprocess.SubprocessError):
        return {}  # No git, or a checkout of another user


def _run_git(repository: Path, *words: str) -> str:
    command = ["git", "-C", str(repository), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S).stdout


def read_processor() -> str:
    """Read the name of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def read_versions() -> dict[str, str]:
    """Read the versions of Python and of the main packages."""
    return {"python": platform.python_version()} | {package: _read_version(package) for package in PACKAGES}


def _read_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe_environment(run: Path) -> dict[str, str]:
    """Describe the environments of all launches of a run by title; several values are separated by semicolons.

    A run without a record has {}.
    """
    entries = jsonl.read(run / ENVIRONMENT_FILE)
    if not entries:
        return {}
    rows = [_describe_entry(entry) for entry in entries]
    titles = dict.fromkeys(title for row in rows for title in row)
    described = {title: "; ".join(dict.fromkeys(row[title] for row in rows if row.get(title))) for title in titles}
    described["started"] = rows[0]["started"]
    if len(rows) > 1:
        described["launches"] = str(len(rows))
    return {title: text for title, text in described.items() if text}


def _describe_entry(entry: dict[str, Any]) -> dict[str, str]:
    commit = str(entry.get("commit", ""))
    gpus = entry.get("gpus") or {}
    nodes = entry.get("nodes", 1)
    return {
        "started": format_time(entry["at"]),
        "commit": commit + (" with changes" if commit and entry.get("is_modified") else ""),
        GPUS_TITLE: ", ".join(f"{count:g} × {name}" for name, count in gpus.items()),
        CPUS_TITLE: f"{entry.get('cpus', 0):g} CPUs, {entry.get('cpu', '')}",
        "machines": str(nodes) if nodes != 1 else "",
        "system": str(entry.get("system", "")),
        "versions": ", ".join(f"{name} {version}" for name, version in (entry.get("versions") or {}).items()),
    }


def format_time(seconds: float) -> str:
    """Format a time in seconds since 1970.

    >>> format_time(0)
    '1970-01-01 00:00 UTC'
    """
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
