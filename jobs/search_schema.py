"""Schema of a search file; read without torch and Ray."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from jobs import document, study
from jobs.schema import Name
from pipelines.search.space import Values
from pipelines.search.trials import SearchSettings


@dataclass(frozen=True, kw_only=True)
class Search(SearchSettings):
    """Content of a search file.

    Args:
        name: name of the search and of its folder.
        job: content of a job file without name.
        shared: names of the first stages of the job, in order, that are trained once for all trials. Sets that the job
            makes are always shared.
        fidelity: values that replace those of the job in a trial, by dotted path, to make trials cheaper.
        text: number of text tokens in the prompt for which flops, kv_bytes and focus_bytes are computed. The prompt
            also has one image.
    """

    name: Name
    job: dict[str, Any]
    shared: tuple[Name, ...] = ()
    fidelity: Values = field(default_factory=dict)
    text: Annotated[int, Ge(1)] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if "name" in self.job:
            raise ValueError("job: got a name, allowed: none, because each trial has its own")
        for section in ("space", "fidelity"):
            if reserved := {"name", "seed"} & getattr(self, section).keys():
                raise ValueError(
                    f"{section}: got {min(reserved)}, allowed: other keys, because all trials have the same seed"
                )
        study.check_shared_stages(self.shared, self.job)


def read(path: Path, overrides: Sequence[str] = ()) -> Search:
    """Read the search of a YAML file after overrides; ValueError if it or its job is wrong."""
    search = document.read(path, overrides, Search)
    # Without torch the jobs of trials cannot be forecast, but a wrong key is found.
    job = study.build_job(search.job, search.fidelity, search.name, f"{path}: job")
    study.check_templates(search.shared, job.train, str(path))
    return search
