"""What Ray has no room for is said, and a Ray that has ended is not waited for."""

import pytest
from ray._private import utils as ray_utils
from ray.util.placement_group import placement_group, remove_placement_group

from pipelines import cluster
from tests.pipelines.faults import until


@pytest.mark.usefixtures("ray_cluster")
def test_what_workers_wait_for_is_said() -> None:
    assert cluster.describe_shortage() == ""
    group = placement_group([{"CPU": 2}] * 2)
    try:
        until(lambda: "waiting for 4 CPUs: Ray has 2, of which 2 are free" in cluster.describe_shortage())
    finally:
        remove_placement_group(group)
    until(lambda: cluster.describe_shortage() == "")


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (None, "RAY_ADDRESS: got auto, and no Ray was started on this machine, allowed: HOST:PORT"),
        ("127.0.0.1:1", "RAY_ADDRESS: nothing answers at 127.0.0.1:1"),
    ],
)
def test_auto_names_a_ray_that_answers(monkeypatch: pytest.MonkeyPatch, known: str | None, message: str) -> None:
    monkeypatch.setattr(ray_utils, "read_ray_address", lambda: known)
    with pytest.raises(ValueError, match=message), cluster._named("auto"):
        pass
