"""Checks of the files in cluster/: Ray validates its cluster files, hadolint the Dockerfile.

The tests contact no cloud and build no image.
"""

import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CLUSTERS = sorted((ROOT / "cluster").glob("*.yaml"))
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

Tree = dict[str, Any]


def load_config(path: Path) -> Tree:
    """Load the file with Ray's defaults."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(yaml.safe_load(path.read_text()))


def test_both_clouds_have_a_file() -> None:
    assert {path.stem for path in CLUSTERS} == {"aws", "gcp"}


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_ray_accepts_the_file(path: Path) -> None:
    from ray.autoscaler._private.util import validate_config

    config = load_config(path)
    validate_config(config)
    config["docker"]["imagine"] = config["docker"]["image"]
    with pytest.raises(jsonschema.ValidationError, match="imagine"):
        validate_config(config)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_the_head_is_on_demand_and_runs_no_task_and_workers_are_spot(path: Path) -> None:
    config = load_config(path)
    head, worker = (config["available_node_types"][name] for name in (config["head_node_type"], "worker"))
    assert (head["resources"]["CPU"], head["max_workers"]) == (0, 0)
    assert 1 <= worker["min_workers"] < worker["max_workers"] <= config["max_workers"]
    spot = [
        re.search(r"spot|preemptible", str(node_type["node_config"]), re.IGNORECASE) for node_type in (head, worker)
    ]
    assert [bool(found) for found in spot] == [False, True]
    [start] = [line for line in config["head_start_ray_commands"] if "--head" in line]
    assert "--num-cpus=0" in start


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_no_machine_has_a_public_address_or_an_open_port(path: Path) -> None:
    config = load_config(path)
    assert not re.search(r"0\.0\.0\.0|::/0", yaml.safe_dump(config))
    assert config["provider"]["use_internal_ips"]
    assert config["auth"]["ssh_proxy_command"]
    assert config["auth"]["ssh_proxy_use_node_id"]
    for node_type in config["available_node_types"].values():
        node = node_type["node_config"]
        if config["provider"]["type"] == "aws":
            assert node["SecurityGroupIds"], "Ray's default group opens port 22 to everyone"
        else:
            assert node["networkInterfaces"], "Ray's default interface has a public address"
            assert all("accessConfigs" not in interface for interface in node["networkInterfaces"])
    [start] = [line for line in config["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_submitting_requires_the_token_and_the_file_has_no_key(path: Path) -> None:
    config = load_config(path)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert not re.search(r"AKIA|PRIVATE KEY|secret|password", path.read_text(), re.IGNORECASE)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_machines_install_nothing_beyond_the_image(path: Path) -> None:
    """Ray's defaults for these clouds would install another Ray."""
    config = load_config(path)
    commands = [line for name, lines in config.items() if name.endswith("_commands") for line in lines]
    assert commands
    assert not [line for line in commands if "pip" in line]


# --- the image --------------------------------------------------------------------------------------------------------


def read_instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, each as one line."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name]


def read_default_argument(name: str) -> str:
    """Return the default of a build argument."""
    [default] = [
        rest.partition("=")[2] for kind, rest in read_instructions() if kind == "ARG" and rest.startswith(f"{name}=")
    ]
    return default


def test_the_image_has_existing_extras_and_all_their_requirements() -> None:
    extras, available = read_default_argument("EXTRAS").split(","), PROJECT["project"]["optional-dependencies"]
    assert {"cluster", "fast", "instructions", "lora", "pretrained", "s3", "serve"} == set(extras) <= available.keys()
    [listing] = [rest for kind, rest in read_instructions() if kind == "RUN" and "python -c" in rest]
    arguments = shlex.split(listing)
    program = arguments[arguments.index("-c") + 1]

    def run(names: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, "pyproject.toml", names], cwd=ROOT, capture_output=True, text=True
        )

    requirements = run(read_default_argument("EXTRAS")).stdout.splitlines()
    assert requirements == [
        *PROJECT["project"]["dependencies"],
        *(requirement for name in extras for requirement in available[name]),
    ]
    assert run("s3,nothing").returncode


def test_the_image_has_the_torch_version_of_the_project() -> None:
    [step] = [rest for kind, rest in read_instructions() if kind == "RUN" and "TORCH_INDEX" in rest]
    pattern = re.search(r"grep -o '([^']+)'", step)
    assert pattern
    found = re.findall(pattern[1], (ROOT / "pyproject.toml").read_text())
    assert len(found) == 1
    assert found[0] in PROJECT["project"]["dependencies"]


def test_the_image_has_a_fixed_base_version_and_the_user_of_pods() -> None:
    from jobs.cluster import manifest

    assert re.fullmatch(r"python:3\.(11|12)\.\d+-slim-\w+", read_default_argument("BASE"))
    users = [rest for kind, rest in read_instructions() if kind == "USER"]
    assert users == [f"{manifest.USER}:{manifest.USER}"]
    assert [rest for kind, rest in read_instructions() if kind == "RUN" and f"useradd --uid {manifest.USER} " in rest]


def test_only_files_of_the_project_are_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    project = PROJECT["project"]
    packages = {name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed = {"pyproject.toml", project["readme"], *project["license-files"], *packages}
    assert {line[1:] for line in lines if line.startswith("!")} == needed


def test_hadolint_reports_nothing() -> None:
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") and not hadolint:
        pytest.skip("its wheel exists only for Linux on x86-64")
    assert hadolint, "the extra `test` installs it"
    process = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert process.returncode == 0, f"\n{process.stdout}{process.stderr}"
