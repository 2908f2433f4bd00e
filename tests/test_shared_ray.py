"""The Ray that tests share."""

from typing import Any


def test_workers_draw_different_ids(ray_cluster: Any) -> None:
    """Forks of a process whose generator of IDs was seeded would draw the same ones."""

    class Worker:
        def draw_id(self) -> str:
            from ray._raylet import TaskID

            return TaskID.for_fake_task(ray_cluster.JobID.from_int(1)).hex()

    workers = [ray_cluster.remote(Worker).options(num_cpus=0).remote() for _ in range(2)]
    first, second = ray_cluster.get([worker.draw_id.remote() for worker in workers])
    assert first != second
