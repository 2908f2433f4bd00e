"""Every job file that ships is a job, says all that it needs to, and survives being written out."""

from pathlib import Path

import pytest

from jobs import schema

FOLDER = Path(__file__).parents[2] / "jobs"
SHIPPED = sorted(FOLDER.rglob("*.yaml"))


def test_jobs_are_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_job_loads_and_reads_back_equal(path: Path, tmp_path: Path) -> None:
    job = schema.load(path)
    resolved = tmp_path / "job.yaml"
    resolved.write_text(schema.dump(job))
    assert schema.load(resolved) == job
    assert schema.dump(schema.load(resolved)) == schema.dump(job)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_job_opens_with_what_to_expect_and_is_named_after_its_file(path: Path) -> None:
    assert path.read_text().startswith("# ")
    assert schema.load(path).name == path.stem


def test_the_numbers_of_a_job_are_checked() -> None:
    for override in ("workers=0", "seed=-1", "name=../up", "train={}", "nmae=a", "workers=true"):
        with pytest.raises(ValueError, match=r"^[^\n]+$(?!\n)"):
            schema.load(SHIPPED[0], [override])


def test_a_stage_cannot_be_named_out_of_its_folder() -> None:
    with pytest.raises(ValueError, match="train"):
        schema.load(SHIPPED[0], ["train={../up: {}}"])
