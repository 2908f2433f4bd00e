"""Checkpoints: the trained weights and their Adam moments in pieces, and a manifest that was written last.

    step-000100/
      rank-0000-00.safetensors  pieces of parameters, fp32, as pipelines/training/fragments.py names them
      job.yaml                  the job as resolved
      manifest.json             cursor, updates, data, model, and each file's size, SHA-256 and pieces

A directory without a valid manifest does not exist.  Pieces know their place in the parameter and nothing of the number
of workers or the ZeRO stage, so any other layout loads them without a conversion; DeepSpeed's own checkpoints would
have to be converted (its universal form), and are pickles.  What stays frozen is not saved: it follows from the plan.
Neither are random states and the learning rate: they follow from seed and step.

Cost: 12 bytes a trained parameter.  Training stands still while each worker copies its share in memory; upload and
checksums happen in a thread beside it.  Loading reads whole the files that hold a piece of the worker's share, which at
the same number of workers is each file once; the checksum is computed of the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.core import failures, storage
from pipelines.core.failures import Failure
from pipelines.training.fragments import Fragment

MANIFEST = "manifest.json"
JOB = "job.yaml"
FILE_BYTES = 512 * 2**20
"""Of a file, at most; a larger piece has one of its own."""

READERS = 4
"""Files that a worker reads and checks side by side; each is in memory whole."""

Piece = tuple[str, str, int, int]
"""Name of the parameter, state, first element, length."""


class RefusedError(ValueError):
    """The user must decide: going on from what is there would not be going on."""


class DamagedError(Exception):
    """A checkpoint that cannot be trusted, and why."""


@dataclass(frozen=True)
class File:
    """What the manifest says of a file.  pieces: in the file's order."""

    bytes: int
    sha256: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    cursor: global batches done.  updates: of the weights, fewer where batches were passed over.
    workers: that wrote it.  loss: mean of the steps since the checkpoint before.
    data: fingerprint of each set.  model: the configuration.
    """

    cursor: int
    updates: int
    workers: int
    loss: float
    data: dict[str, str]
    model: dict[str, Any]
    files: dict[str, File]

    def to_json(self) -> str:
        """With a checksum of its own, as it has those of the files: a digit may be wrong and the text still be JSON."""
        text = json.dumps(asdict(self))
        return json.dumps({"sha256": _sha256(text.encode()), "manifest": json.loads(text)})

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        """Raises `DamagedError` for what `to_json` did not write."""
        try:
            whole = json.loads(text)
            fields = whole["manifest"]
            if whole["sha256"] != _sha256(json.dumps(fields).encode()):
                raise DamagedError(f"{MANIFEST} has another checksum than it says")
            files = {
                name: File(file["bytes"], file["sha256"], [tuple(piece) for piece in file["pieces"]])
                for name, file in fields.pop("files").items()
            }
            return cls(**fields, files=files)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DamagedError(f"{MANIFEST} cannot be read: {error}") from None


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose manifest is whole; whether its files are, shows when they are read."""

    url: str
    manifest: Manifest


def name(cursor: int) -> str:
    """Of the checkpoint after so many global batches."""
    return f"step-{cursor:06d}"


def candidates(folder: str) -> Iterator[Saved | str]:
    """The checkpoints of a stage, newest first; in place of one without a valid manifest, why it has none."""
    for one in sorted(_steps(folder), key=_age, reverse=True):
        try:
            yield read(storage.join(folder, one))
        except DamagedError as error:
            yield str(error)


def read(url: str) -> Saved:
    """The checkpoint at a URL.  Raises `DamagedError` where its manifest is missing or no manifest."""
    path = storage.join(url, MANIFEST)
    if not storage.exists(path):
        raise DamagedError(f"{url}: no {MANIFEST}: its writing was interrupted")
    try:
        manifest = Manifest.from_json(storage.read(path))
    except DamagedError as error:
        raise DamagedError(f"{url}: {error}") from None
    if not url.endswith(name(manifest.cursor)):
        raise DamagedError(f"{url}: {MANIFEST} is that of {name(manifest.cursor)}")
    return Saved(url, manifest)


class Upload:
    """This rank's part of a checkpoint, on its way to storage in a thread of its own.

    Constructing it copies the pieces, which is all that training waits for.
    """

    def __init__(self, url: str, rank: int, pieces: Iterable[Fragment]) -> None:
        self.url, self.rank = url, rank
        copies = [
            ((one.name, state, one.start, one.length), tensor.detach().to("cpu", copy=True))
            for one in pieces
            for state, tensor in one.states.items()
        ]
        pool = ThreadPoolExecutor(1)
        self._future = pool.submit(self._store, copies)
        pool.shutdown(wait=False)

    @property
    def done(self) -> bool:
        return self._future.done()

    @property
    def failed(self) -> bool:
        """Once done: whether storage did not take it."""
        return self._future.exception() is not None

    def result(self) -> dict[str, File]:
        """This rank's files, when they are stored.  Raises what storage raised."""
        return self._future.result()

    def error(self) -> Failure | None:
        """Wait; returns what went wrong, None if nothing did."""
        error = self._future.exception()
        if error is None:
            return None
        failure = failures.classify_error(error)
        return replace(failure, text=f"rank {self.rank}: {failure.text}")

    def _store(self, copies: list[tuple[Piece, Tensor]]) -> dict[str, File]:
        files = {}
        for number, part in enumerate(_packed(copies)):
            file = f"rank-{self.rank:04d}-{number:02d}.safetensors"
            data = safetensors.torch.save({_key(piece): tensor for piece, tensor in part})
            storage.write(storage.join(self.url, file), data)
            files[file] = File(len(data), _sha256(data), [piece for piece, _ in part])
        return files


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _packed(copies: list[tuple[Piece, Tensor]]) -> Iterator[list[tuple[Piece, Tensor]]]:
    """Pieces in groups of at most FILE_BYTES; what was yielded is let go."""
    part: list[tuple[Piece, Tensor]] = []
    size = 0
    while copies:
        piece, tensor = copies.pop(0)
        if part and size + tensor.nbytes > FILE_BYTES:
            yield part
            part, size = [], 0
        part.append((piece, tensor))
        size += tensor.nbytes
    if part:
        yield part


def _key(piece: Piece) -> str:
    return "{1}/{0}/{2}".format(*piece)


def commit(url: str, manifest: Manifest, job: str) -> None:
    """Make the uploaded parts a checkpoint; what else an interrupted writing left there is removed."""
    for file in set(storage.list_files(url)) - manifest.files.keys():
        storage.remove(storage.join(url, file))
    storage.write(storage.join(url, JOB), job.encode())
    storage.write(storage.join(url, MANIFEST), manifest.to_json().encode())


def prune(folder: str, cursor: int, last: int, best: int) -> None:
    """Of the checkpoints up to `cursor`, the newest, keep the newest `last` and the `best` of lowest loss.

    Others before it go, with or without a manifest; that goes first, so that what is half removed does not exist.  What
    is newer is being written, or was passed over as damaged: neither is touched, nor counts as one that is kept.
    """
    newest = _age(name(cursor))
    steps = [one for one in _steps(folder) if _age(one) <= newest]
    saved = [one for one in candidates(folder) if isinstance(one, Saved) and one.manifest.cursor <= cursor]
    kept = [*saved[:last], *sorted(saved, key=lambda one: one.manifest.loss)[:best]]
    for step in {*steps} - {name(one.manifest.cursor) for one in kept} - {name(cursor)}:
        _remove(storage.join(folder, step))


def clear(folder: str) -> None:
    """Remove what an interrupted writing left: checkpoints without any manifest.  Nobody may be writing one."""
    for step in _steps(folder):
        if not storage.exists(storage.join(folder, step, MANIFEST)):
            _remove(storage.join(folder, step))


def _remove(url: str) -> None:
    storage.remove(storage.join(url, MANIFEST))
    storage.remove_folder(url)


def _steps(folder: str) -> list[str]:
    return [one for one in storage.list_folders(folder) if one.startswith("step-")]


def _age(step: str) -> tuple[int, str]:
    """Sorts names of checkpoints by their cursor."""
    return len(step), step


def load(saved: Saved, wanted: Sequence[Fragment]) -> list[dict[str, Tensor]]:
    """For each fragment its states as the checkpoint has them, checked but not yet put in place.

    Raises `DamagedError` where a file is missing, has another size or checksum, or holds not all of a fragment.
    """
    result = [{state: torch.empty(one.length, dtype=torch.float32) for state in one.states} for one in wanted]
    missing = [dict.fromkeys(one.states, one.length) for one in wanted]
    places: dict[tuple[str, str], list[int]] = {}
    for number, one in enumerate(wanted):
        for state in one.states:
            places.setdefault((one.name, state), []).append(number)

    def take(file: str) -> None:
        for (parameter, state, start, length), tensor in _checked(saved, file):
            for number in places.get((parameter, state), []):
                one = wanted[number]
                first, stop = max(start, one.start), min(start + length, one.stop)
                if first < stop:
                    result[number][state][first - one.start : stop - one.start] = tensor[first - start : stop - start]
                    missing[number][state] -= stop - first

    def touches(pieces: list[Piece]) -> bool:
        return any(
            start < wanted[number].stop and wanted[number].start < start + length
            for parameter, state, start, length in pieces
            for number in places.get((parameter, state), [])
        )

    needed = [file for file, about in saved.manifest.files.items() if touches(about.pieces)]
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(take, needed))
    for one, left in zip(wanted, missing, strict=True):
        if any(left.values()):
            raise DamagedError(f"{saved.url}: {one.name} is not there, or not all of it")
    return result


def weights(saved: Saved, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The trained weights whole, fp32, by name."""
    wanted = [Fragment(one, 0, {"weight": torch.empty(shape.numel())}) for one, shape in shapes.items()]
    loaded = load(saved, wanted)
    return {one: states["weight"].view(shape) for (one, shape), states in zip(shapes.items(), loaded, strict=True)}


def _checked(saved: Saved, file: str) -> Iterator[tuple[Piece, Tensor]]:
    url, about = storage.join(saved.url, file), saved.manifest.files[file]
    if not storage.exists(url):
        raise DamagedError(f"{url}: not there")
    data = storage.read(url)  # a store that does not answer, or not to us, is no damage
    if len(data) != about.bytes:
        raise DamagedError(f"{url}: {len(data)} bytes, its manifest says {about.bytes}")
    if _sha256(data) != about.sha256:
        raise DamagedError(f"{url}: its bytes have another checksum than its manifest says")
    tensors = safetensors.torch.load(data)
    for piece in about.pieces:
        yield piece, tensors[_key(piece)]


def agree(url: str, manifest: Manifest, changed: bool, data: dict[str, str], model: dict[str, Any]) -> None:
    """RefusedError where a checkpoint was made with other data or another model.

    `changed` knowingly, that is allowed, but not other shapes of what is trained.
    """
    before, now = {"data": manifest.data, "model": manifest.model}, {"data": data, "model": model}
    for key, old, new in differences(before, now):
        reshaped = key.startswith("model.trained.") and None not in (old, new)
        if reshaped or not changed:
            raise RefusedError(
                f"{url}: it was written with {key} = {_shown(old)}, not {_shown(new)}; give the job another name"
                + ("" if reshaped else ", or go on all the same by --allow-changes")
            )


def differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, value before, value now) of each value that is not the same in two trees of dictionaries."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif before != now:
        yield path, before, now


def _shown(value: Any) -> str:
    return repr(value)[:80]


def restore(folder: str, wanted: Sequence[Fragment], check: Any) -> tuple[Manifest | None, list[str]]:
    """Load the newest whole checkpoint into `wanted`; returns its manifest, and why newer ones were passed over.

    check: called with (url, manifest) of one before it is used, to raise ValueError if it must not be.
    Every rank calls it with its own fragments, and all get the same checkpoint.
    Raises RefusedError where there are checkpoints and none can be loaded: a start from nothing must be wanted.
    """
    rank, passed, unloaded = dist.get_rank(), list[str](), ""
    found = candidates(folder) if rank == 0 else iter(())
    while True:
        [one] = _from_first([next(found, None) if rank == 0 else None])
        if one is None and unloaded:
            raise RefusedError(
                f"{folder}: none of its checkpoints can be loaded; {unloaded}; remove them to begin anew"
            )
        if one is None:
            return None, passed
        if isinstance(one, str):
            passed.append(one)
            continue
        check(one.url, one.manifest)
        states, why = None, ""
        try:
            states = load(one, wanted)
        except DamagedError as error:
            why = str(error)
        whys: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(whys, why)
        if any(whys):
            passed.append(next(filter(None, whys)))
            unloaded = unloaded or passed[-1]
            continue
        assert states is not None
        for fragment, loaded in zip(wanted, states, strict=True):
            for state, tensor in loaded.items():
                fragment.states[state].data.copy_(tensor)
        return one.manifest, passed


def _from_first(values: list[Any]) -> list[Any]:
    dist.broadcast_object_list(values, src=0)
    return values
