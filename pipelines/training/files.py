"""Names of files that finished runs, checkpoints and models have.  Does not import torch: verbs find models fast."""

from pipelines.core import storage

MANIFEST = "manifest.json"
JOB_FILE = "job.yaml"


def is_complete(url: str) -> bool:
    """Return True if a model was uploaded there completely."""
    return storage.exists(storage.join(url, MANIFEST))
