"""Tests of the Ray session: messages about missing resources, and quick errors for addresses without a cluster."""

import socket
import threading
from pathlib import Path

import pytest
import ray
from ray._private import utils as ray_utils
from ray.util.placement_group import placement_group, remove_placement_group

from pipelines.core import cluster
from tests.waiting import wait_until


@pytest.mark.usefixtures("ray_cluster")
def test_what_workers_wait_for_is_said() -> None:
    assert cluster.describe_shortage() == ""
    group = placement_group([{"CPU": 2}] * 2)
    try:
        wait_until(lambda: "waiting for 4 CPUs: Ray has 2, of which 2 are free" in cluster.describe_shortage())
    finally:
        remove_placement_group(group)
    wait_until(lambda: cluster.describe_shortage() == "")


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (None, "RAY_ADDRESS: got auto, and no Ray was started on this machine, allowed: HOST:PORT"),
        ("127.0.0.1:1", "RAY_ADDRESS: nothing answers at 127.0.0.1:1"),
    ],
)
def test_auto_names_a_ray_that_answers(monkeypatch: pytest.MonkeyPatch, known: str | None, message: str) -> None:
    monkeypatch.setattr(ray_utils, "read_ray_address", lambda: known)
    with pytest.raises(ValueError, match=message), cluster._cluster_settings("auto"):
        pass


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_another_server_is_refused(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            call, _ = server.accept()  # the check that a server listens
            call.close()
            for _ in range(2):  # the checks of TLS and of the protocol
                call, _ = server.accept()
                with call:
                    call.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with (
            pytest.raises(ValueError, match=f"RAY_ADDRESS: the server at {address} is not the head of a Ray cluster"),
            cluster._cluster_settings(address),
        ):
            pass


@pytest.mark.usefixtures("ray_cluster")
def test_a_running_ray_is_accepted() -> None:
    with cluster._cluster_settings(ray.get_runtime_context().gcs_address) as settings:
        assert settings


def test_ray_leaves_a_tmpdir_that_is_too_long_for_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert not cluster._find_short_folder()
    long = tmp_path / ("x" * 60)
    monkeypatch.setenv("TMPDIR", str(long))
    assert cluster._find_short_folder() == {"RAY_TMPDIR": "/tmp"}
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(ValueError, match=r"RAY_TMPDIR: got .*, allowed: a path that is \d+ bytes shorter"):
        cluster._find_short_folder()


@pytest.mark.parametrize("failures", [2, 3])
def test_a_start_that_times_out_is_tried_again(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    starts, stops = [], []

    def start(**settings: object) -> None:
        starts.append(settings)
        if len(starts) <= failures:
            raise Exception("The current node timed out during startup. It could be overloaded.")

    monkeypatch.setattr(cluster.ray, "init", start)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: stops.append(None))
    if failures == cluster.MAX_START_ATTEMPTS:
        with pytest.raises(TimeoutError, match="may be overloaded"):
            cluster._connect()
    else:
        cluster._connect()
        assert (len(starts), len(stops)) == (failures + 1, failures)
