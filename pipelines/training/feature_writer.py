"""Writer of stored features: a frozen image tower encodes the images of a set on Ray Data, each once.

    rows in:   number of a shard
    rows out:  number of the shard, its images, and those that cannot be used
    resources: an actor per GPU, or per CPU without GPUs

Images are encoded one by one. In fp32 the last bits of a feature depend on the other images of a batch (relative
difference 1e-7 on CPUs); alone, they do not depend on anything but the image. A file appears when its shard is done, so
an interrupted run continues with the missing ones.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import ray.data
import torch
from tqdm import tqdm

from pipelines.core import cluster, interrupts, storage
from pipelines.data.features import (
    IMAGE_DIGEST_BYTES,
    FeatureFormat,
    compute_digest,
    name_file,
    read_format,
    write_format,
)
from pipelines.data.preview import read_stored
from pipelines.data.shard_index import Shards, StoredSample
from pipelines.data.shard_writer import BAR_FORMAT
from redux.image import load_pixels
from redux.model import FEATURE_FIELDS, ReduxModel, normalize_pixels

FEATURE_SETTINGS = ("vmtc", "reduction", *FEATURE_FIELDS)
"""Settings of a model on which its features depend."""

TOWER_SETTINGS = ("model_type", "image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
"""Settings of a tower that the shapes of its weights do not tell."""

CHUNK_SAMPLES = 64
"""Samples that are read together."""


def compute_tower_digest(model: ReduxModel) -> str:
    """Compute the SHA-256 of everything on which features depend, besides pixels: weights and settings of the tower.

    The weights must be whole, see `deepspeed.zero.GatheredParameters`.
    """
    settings = [model.config.to_dict()[name] for name in FEATURE_SETTINGS]
    settings += [getattr(model.config.vision_config, name, None) for name in TOWER_SETTINGS]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, weight in sorted(model.vision_tower.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(to_bytes(weight))
    return digest.hexdigest()


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor of any precision."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def describe_format(model: ReduxModel, **pixels: Any) -> FeatureFormat:
    """Describe the features of a model.

    Args:
        model: the model, in the precision of the features.
        pixels: image_aspect_ratio and image_backend.
    """
    config = model.config
    size = config.vision_config.image_size
    features = compute_image_features(model, np.zeros((3, size, size), np.uint8))
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[features.dtype]
    return FeatureFormat(
        tower=compute_tower_digest(model),
        precision=precision,  # type: ignore[arg-type]
        tokens=features.shape[0],
        width=features.shape[1],
        image_size=size,
        **pixels,
    )


@torch.no_grad()
def compute_image_features(model: ReduxModel, pixels: np.ndarray) -> torch.Tensor:
    """Compute the features of one image, as training computes them from its pixels: (tokens, width)."""
    weight = next(model.vision_tower.parameters())
    images = torch.from_numpy(np.ascontiguousarray(pixels)).to(weight.device)[None]
    features, _ = model.encode_images(normalize_pixels(images).to(weight.dtype))
    return features[0]


def write_features(source: str, out: str, model: ReduxModel, format: FeatureFormat) -> tuple[int, int]:
    """Write the features of a set. Continues after an interruption.

    Args:
        source: folder or URL of the set.
        out: folder or URL of the features.
        model: model whose tower encodes; its language model is not used.
        format: result of `describe_format`.

    Returns:
        Number of images, and of those that cannot be used.

    Raises:
        ValueError: `out` has features of another set, or by another tower or other pixels; or `source` is not a set.
    """
    # The format comes first, so that a second start with other settings is refused.
    shards = Shards(source)
    fingerprint = shards.fingerprint
    stored_format = read_format(out)
    if stored_format and stored_format[:2] != (format, fingerprint):
        raise ValueError(
            f"{out}: contains features of another set, tower or form of images, allowed: an empty folder; delete it, "
            "or name another"
        )
    write_format(out, format, fingerprint, is_finished=bool(stored_format and stored_format[2]))
    storage.remove_partial(out)
    # A file is there if its shard is done, since files are written atomically.
    sizes = shards.shard_sizes
    file_names = set(storage.list_files(out))
    missing = [{"shard": number} for number in range(len(sizes)) if name_file(number) not in file_names]
    num_images = int(np.count_nonzero(shards.image_sizes))
    unusable = 0
    skipped = int(sizes.sum()) - sum(int(sizes[item["shard"]]) for item in missing)
    with tqdm(desc="features", total=int(sizes.sum()), initial=skipped, unit="sample", bar_format=BAR_FORMAT) as bar:
        for block in _encode_shards(missing, shards, out, model, format):
            # A signal's exception may be swallowed in a library.
            interrupts.raise_if_interrupted()
            unusable += int(block["unusable"][0])
            bar.update(int(sizes[int(block["shard"][0])]))
    write_format(out, format, fingerprint, is_finished=True)
    return num_images, unusable


def _encode_shards(
    missing: list[dict[str, int]], shards: Shards, out: str, model: ReduxModel, format: FeatureFormat
) -> Iterable[Mapping[str, Any]]:
    if not missing:
        return []
    # The weights are stored once for all actors, and stay there as long as this process holds them.
    get_model = share_tower(model)
    actors = min(cluster.count_model_processes(), len(missing))
    return (
        ray.data.from_items(missing, override_num_blocks=len(missing))
        .map_batches(
            FeatureEncoder,
            fn_constructor_args=(shards, out, get_model, format),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=1 if cluster.count_gpus() else None,
        )
        .iter_batches(batch_size=None)
    )


def share_tower(model: ReduxModel) -> Callable[[], ReduxModel]:
    """Store the tower of a model in Ray. Returns a function by which any worker gets a model with this tower."""
    return partial(_build_model, ray.put((model.config, model.vision_tower)))


def _build_model(shared: Any) -> ReduxModel:
    """Build a model around a shared tower. Its other parts have no weights."""
    config, tower = ray.get(shared)
    with torch.device("meta"):
        model = ReduxModel(config)
    model.vision_tower = tower
    return model


class FeatureEncoder:
    """Actor that writes the features of a shard."""

    def __init__(self, shards: Shards, out: str, get_model: Callable[[], ReduxModel], format: FeatureFormat) -> None:
        self.shards, self.out, self.format = shards, out, format
        self.model = get_model().eval()
        self.model.vision_tower.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, list[int]]:
        shard = int(rows["shard"][0])
        stops = np.cumsum(self.shards.shard_sizes)
        start, stop = int(stops[shard - 1]) if shard else 0, int(stops[shard])
        numbers = start + np.flatnonzero(self.shards.image_sizes[start:stop])
        # All features of a shard are in memory, because an object store has no appends.
        records = []
        for start in range(0, len(numbers), CHUNK_SAMPLES):
            chunk = numbers[start : start + CHUNK_SAMPLES].tolist()
            samples = read_stored(self.shards, chunk)
            rows_of_index = self.shards.read_rows(chunk)
            records += [self._encode(row["sha256"], sample) for row, sample in zip(rows_of_index, samples, strict=True)]
        storage.write(storage.join(self.out, name_file(shard)), b"".join(records))
        unusable = sum(not any(record[:IMAGE_DIGEST_BYTES]) for record in records)
        return {"shard": [shard], "images": [len(records)], "unusable": [unusable]}

    def _encode(self, sample_digest: bytes, sample: StoredSample | str) -> bytes:
        """Encode a sample as a record; zeros if it is damaged, or its image cannot be used."""
        form = self.format
        if isinstance(sample, str):
            return bytes(form.record_bytes)
        try:
            pixels = load_pixels(sample.image, form.image_size, form.image_aspect_ratio, form.image_backend)
        except ValueError:
            return bytes(form.record_bytes)
        features = to_bytes(compute_image_features(self.model, pixels))
        return compute_digest(sample_digest, features) + features
