"""Checkpoints: the trained weights and their Adam moments in pieces, and a manifest that is written last.

    step-000100/
      rank-0000-00.safetensors  pieces of parameters in fp32, named as in pipelines/training/fragments.py
      job.yaml                  the resolved job
      manifest.json             cursor, updates, data, model, and size, SHA-256 and pieces of each file

A folder without a valid manifest is not a checkpoint. A piece stores its position in its parameter. It does not depend
on the number of workers or on the ZeRO stage, so every layout loads every checkpoint without a conversion. DeepSpeed's
own checkpoints would need a conversion (its universal format) and are pickles. Frozen weights are not saved, because
they follow from the plan. Random states and the learning rate are not saved, because they follow from seed and step.

Cost: 12 bytes per trained parameter. Training pauses while each worker copies its share in memory. A background thread
then uploads the copy and computes the checksums. To load, a worker reads every file that holds a piece of its share in
full; with an unchanged number of workers, each file is read once. The checksum is computed from the same bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.core import failures, storage
from pipelines.core.failures import Failure
from pipelines.training.files import JOB_FILE, MANIFEST
from pipelines.training.fragments import Fragment

BroadcastValue = TypeVar("BroadcastValue")

MAX_FILE_BYTES = 512 * 2**20
"""Largest size of a file of several pieces. A larger piece has a file of its own."""

CONCURRENT_READS = 4
"""Files that a worker reads and checks at the same time. Each is in memory as a whole."""

Piece = tuple[str, str, int, int]
"""Name of the parameter, name of the state, first element, number of elements."""


class RefusedError(ValueError):
    """A restore that needs a decision of the user, because it would not continue the stored run."""


class DamagedError(Exception):
    """A checkpoint that is incomplete or corrupt; the message gives the reason."""


@dataclass(frozen=True)
class FileEntry:
    """Entry of one file in the manifest. The pieces have the order of the file."""

    bytes: int
    sha256: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint.

    Args:
        cursor: number of finished global batches.
        updates: number of weight updates; smaller than the cursor if updates were skipped.
        workers: number of workers that wrote the checkpoint.
        loss: mean over the steps since the previous checkpoint.
        data: fingerprint of each set of shards.
        model: configuration of the model, and names and shapes of its trained parameters.
        files: entries by file name.
    """

    cursor: int
    updates: int
    workers: int
    loss: float
    data: dict[str, str]
    model: dict[str, Any]
    files: dict[str, FileEntry]

    def to_json(self) -> str:
        """Serialize the manifest with its own SHA-256, because a text with a flipped digit can still be JSON."""
        # from_json hashes the parsed fields again, so hash exactly what json.dumps writes for them.
        text = json.dumps(asdict(self))
        return json.dumps({"sha256": _compute_sha256(text.encode()), "manifest": json.loads(text)})

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        """Parse the output of `to_json`.

        Raises:
            DamagedError: the text is not a manifest, or its SHA-256 does not match.
        """
        try:
            document = json.loads(text)
            fields = document["manifest"]
            if document["sha256"] != _compute_sha256(json.dumps(fields).encode()):
                raise DamagedError(f"{MANIFEST} does not match its checksum")
            # JSON has no tuples: pieces come back as lists.
            files = {
                name: FileEntry(entry["bytes"], entry["sha256"], [tuple(piece) for piece in entry["pieces"]])
                for name, entry in fields.pop("files").items()
            }
            return cls(**fields, files=files)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DamagedError(f"{MANIFEST} cannot be read: {error}") from None


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint with a valid manifest. Its files are checked when they are loaded."""

    url: str
    manifest: Manifest


def format_step_name(cursor: int) -> str:
    """Return the folder name of the checkpoint after so many global batches."""
    return f"step-{cursor:06d}"


def exists(folder: str) -> bool:
    """Return True if a stage has a checkpoint, intact or not."""
    return bool(_list_steps(folder))


def list_newest_first(folder: str) -> Iterator[SavedCheckpoint | str]:
    """Yield the checkpoints of a stage, newest first; for a folder without a valid manifest, yield the reason."""
    for step in sorted(_list_steps(folder), key=_sort_key, reverse=True):
        try:
            yield read_checkpoint(storage.join(folder, step))
        except DamagedError as error:
            yield str(error)


def read_checkpoint(url: str) -> SavedCheckpoint:
    """Read the manifest of the checkpoint at a URL.

    Raises:
        DamagedError: the manifest is missing, invalid, or belongs to another step.
    """
    path = storage.join(url, MANIFEST)
    if not storage.exists(path):
        raise DamagedError(f"{url}: no {MANIFEST}: its writing was interrupted")
    try:
        manifest = Manifest.from_json(storage.read(path))
    except DamagedError as error:
        raise DamagedError(f"{url}: {error}") from None
    # A copied manifest is valid, but does not describe the files of this folder.
    if not url.endswith(format_step_name(manifest.cursor)):
        raise DamagedError(f"{url}: {MANIFEST} is that of {format_step_name(manifest.cursor)}")
    return SavedCheckpoint(url, manifest)


class Upload:
    """Upload of this rank's part of a checkpoint, in a background thread.

    The constructor copies the fragments to CPU memory. Training waits for this copy and for nothing else.
    """

    def __init__(self, url: str, rank: int, pieces: Iterable[Fragment]) -> None:
        self.url = url
        self.rank = rank
        # copy=True also for tensors on the CPU: training changes them while the upload runs.
        copies = [
            ((fragment.name, state, fragment.start, fragment.length), tensor.detach().to("cpu", copy=True))
            for fragment in pieces
            for state, tensor in fragment.states.items()
        ]
        pool = ThreadPoolExecutor(1)
        self._future = pool.submit(self._store, copies)
        # The thread ends after this one task.
        pool.shutdown(wait=False)

    @property
    def is_done(self) -> bool:
        """True if the upload has ended, also with an error."""
        return self._future.done()

    def result(self) -> dict[str, FileEntry]:
        """Wait for the upload and return the entries of this rank's files. Raises the error of the storage."""
        return self._future.result()

    def error(self) -> Failure | None:
        """Wait for the upload and return its error, or None if it succeeded."""
        error = self._future.exception()
        if error is None:
            return None
        failure = failures.classify_error(error)
        return replace(failure, text=f"rank {self.rank}: {failure.text}")

    def _store(self, copies: list[tuple[Piece, Tensor]]) -> dict[str, FileEntry]:
        entries = {}
        for number, group in enumerate(_group_by_size(copies)):
            name = f"rank-{self.rank:04d}-{number:02d}.safetensors"
            data = safetensors.torch.save({_tensor_key(piece): tensor for piece, tensor in group})
            storage.write(storage.join(self.url, name), data)
            entries[name] = FileEntry(len(data), _compute_sha256(data), [piece for piece, _ in group])
        return entries


def _compute_sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _group_by_size(copies: list[tuple[Piece, Tensor]]) -> Iterator[list[tuple[Piece, Tensor]]]:
    """Yield the pieces in groups of at most MAX_FILE_BYTES. Empties `copies`, so that written groups are freed."""
    group: list[tuple[Piece, Tensor]] = []
    size = 0
    while copies:
        piece, tensor = copies.pop(0)
        if group and size + tensor.nbytes > MAX_FILE_BYTES:
            yield group
            group, size = [], 0
        group.append((piece, tensor))
        size += tensor.nbytes
    if group:
        yield group


def _tensor_key(piece: Piece) -> str:
    parameter, state, start, _ = piece
    return f"{state}/{parameter}/{start}"


def commit(url: str, manifest: Manifest, job: str) -> None:
    """Turn uploaded parts into a checkpoint: remove leftovers of an interrupted write, then write the manifest last.

    Args:
        url: folder of the checkpoint.
        manifest: contents, including all files that the ranks uploaded.
        job: text of the resolved job.
    """
    # An interrupted write by more ranks leaves files that this manifest does not name.
    for name in set(storage.list_files(url)) - manifest.files.keys():
        storage.remove(storage.join(url, name))
    # The manifest comes last. Until it is written, the folder is not a checkpoint.
    storage.write(storage.join(url, JOB_FILE), job.encode())
    storage.write(storage.join(url, MANIFEST), manifest.to_json().encode())


def prune(folder: str, cursor: int, last: int, best: int) -> None:
    """Remove old checkpoints, and folders without a manifest, up to the newest checkpoint.

    Folders with a larger cursor stay and do not count as kept: they are being written or were skipped as damaged.

    Args:
        folder: checkpoints of the stage.
        cursor: cursor of the newest checkpoint.
        last: number of newest checkpoints that are kept.
        best: number of checkpoints with the lowest loss that are kept besides these.
    """
    # The newest checkpoint stays in any case, even if its manifest cannot be read just now.
    newest = _sort_key(format_step_name(cursor))
    steps = [step for step in _list_steps(folder) if _sort_key(step) <= newest]
    checkpoints = [
        saved
        for saved in list_newest_first(folder)
        if isinstance(saved, SavedCheckpoint) and saved.manifest.cursor <= cursor
    ]
    retained = [*checkpoints[:last], *sorted(checkpoints, key=lambda saved: saved.manifest.loss)[:best]]
    for step in {*steps} - {format_step_name(saved.manifest.cursor) for saved in retained} - {format_step_name(cursor)}:
        _remove(storage.join(folder, step))


def remove_incomplete(folder: str) -> None:
    """Remove folders without a manifest, which an interrupted write left. No rank may be writing a checkpoint."""
    for step in _list_steps(folder):
        if not storage.exists(storage.join(folder, step, MANIFEST)):
            _remove(storage.join(folder, step))


def _remove(url: str) -> None:
    # The manifest goes first: after an interruption the rest is no longer a checkpoint.
    storage.remove(storage.join(url, MANIFEST))
    storage.remove_folder(url)


def _list_steps(folder: str) -> list[str]:
    return [name for name in storage.list_folders(folder) if name.startswith("step-")]


def _sort_key(step: str) -> tuple[int, str]:
    """Sort names of checkpoints by cursor, also beyond six digits."""
    return len(step), step


def load_fragments(saved: SavedCheckpoint, fragments: Sequence[Fragment]) -> list[dict[str, Tensor]]:
    """Load the states of fragments from a checkpoint and check them. Does not write into the fragments.

    Args:
        saved: checkpoint of any layout.
        fragments: fragments whose states are loaded; their tensors give the shapes.

    Returns:
        For each fragment, its states by name: fp32 tensors of shape (length,).

    Raises:
        DamagedError: a file is missing, has another size or checksum, or a part of a fragment is not stored.
    """
    result = [
        {state: torch.empty(fragment.length, dtype=torch.float32) for state in fragment.states}
        for fragment in fragments
    ]
    overlaps = _OverlapFinder(fragments)

    def copy_file(file: str) -> list[tuple[int, str, int]]:
        """Copy the file's pieces into the result. Returns (index of fragment, state, elements) of each copy."""
        copied = []
        for piece, tensor in _read_checked(saved, file):
            _, state, piece_start, _ = piece
            for index, start, stop in overlaps.find(piece):
                # `start` and `stop` count elements of the parameter. Both tensors hold a section of it.
                offset = fragments[index].start
                target = result[index][state][start - offset : stop - offset]
                target.copy_(tensor[start - piece_start : stop - piece_start])
                copied.append((index, state, stop - start))
        return copied

    # Read only the files that hold a part of a fragment.
    files = [name for name, entry in saved.manifest.files.items() if any(map(overlaps.find, entry.pieces))]
    remaining = [dict.fromkeys(fragment.states, fragment.length) for fragment in fragments]
    with ThreadPoolExecutor(CONCURRENT_READS) as pool:
        # Count here and not in the threads: two of them may copy into one fragment.
        for copied in pool.map(copy_file, files):
            for index, state, count in copied:
                remaining[index][state] -= count
    # Pieces of a checkpoint do not overlap, so a fragment is complete if none of its elements remain.
    for fragment, counts in zip(fragments, remaining, strict=True):
        if any(counts.values()):
            raise DamagedError(f"{saved.url}: {fragment.name} is missing or incomplete")
    return result


class _OverlapFinder:
    """Search for the fragments that share elements with a stored piece."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self._fragments = fragments
        self._indices: dict[tuple[str, str], list[int]] = {}
        """Indices of the fragments by parameter and state."""
        for index, fragment in enumerate(fragments):
            for state in fragment.states:
                self._indices.setdefault((fragment.name, state), []).append(index)

    def find(self, piece: Piece) -> list[tuple[int, int, int]]:
        """Return (index of the fragment, first common element, element after the last one) of each overlap."""
        parameter, state, piece_start, length = piece
        result = []
        for index in self._indices.get((parameter, state), []):
            fragment = self._fragments[index]
            start, stop = max(piece_start, fragment.start), min(piece_start + length, fragment.stop)
            if start < stop:
                result.append((index, start, stop))
        return result


def load_weights(saved: SavedCheckpoint, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Load whole trained weights in fp32, by name of the parameter."""
    fragments = [Fragment(name, 0, {"weight": torch.empty(shape.numel())}) for name, shape in shapes.items()]
    loaded = load_fragments(saved, fragments)
    return {name: states["weight"].view(shape) for (name, shape), states in zip(shapes.items(), loaded, strict=True)}


def _read_checked(saved: SavedCheckpoint, file: str) -> Iterator[tuple[Piece, Tensor]]:
    """Read one file, compare it with its entry in the manifest, and yield its pieces."""
    url, entry = storage.join(saved.url, file), saved.manifest.files[file]
    if not storage.exists(url):
        raise DamagedError(f"{url} is missing")
    # An unreachable store or a rejected credential raises OSError or ValueError here. That is not damage.
    data = storage.read(url)
    if len(data) != entry.bytes:
        raise DamagedError(f"{url}: {len(data)} bytes, its manifest says {entry.bytes}")
    if _compute_sha256(data) != entry.sha256:
        raise DamagedError(f"{url}: its checksum differs from that in its manifest")
    tensors = safetensors.torch.load(data)
    for piece in entry.pieces:
        yield piece, tensors[_tensor_key(piece)]


def check_compatible(
    url: str, manifest: Manifest, allow_changes: bool, data: dict[str, str], model: dict[str, Any]
) -> None:
    """Compare a checkpoint with the data and the model of the stage.

    Args:
        url: address of the checkpoint, for the message.
        manifest: its manifest.
        allow_changes: accept differences, except in shapes of trained parameters.
        data: fingerprint of each set of the stage.
        model: description of the model, as `engine.describe_model` returns it.

    Raises:
        RefusedError: the checkpoint was written with other data or another model.
    """
    before, now = {"data": manifest.data, "model": manifest.model}, {"data": data, "model": model}
    for key, old, new in find_differences(before, now):
        # A parameter of another shape cannot be loaded. An added or removed one can be missing.
        is_reshaped = key.startswith("model.trained.") and None not in (old, new)
        if is_reshaped or not allow_changes:
            raise RefusedError(
                f"{url}: it was written with {key} = {_shorten_repr(old)}, not {_shorten_repr(new)}; "
                "give the job another name" + ("" if is_reshaped else ", or continue with --allow-changes")
            )


def find_differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted path, value before, value now) for each difference between two trees of dictionaries."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from find_differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif before != now:
        yield path, before, now


def _shorten_repr(value: Any) -> str:
    return repr(value)[:80]


def restore_newest(
    folder: str, fragments: Sequence[Fragment], check: Callable[[str, Manifest], None]
) -> tuple[Manifest | None, list[str]]:
    """Load the newest intact checkpoint into the fragments. A collective: all ranks load the same checkpoint.

    Args:
        folder: checkpoints of the stage.
        fragments: fragments of this rank; their tensors are overwritten.
        check: called with (url, manifest) before a checkpoint is loaded; raises ValueError to refuse it.

    Returns:
        Manifest of the loaded checkpoint, or None if there is none; and the reasons for which newer checkpoints were
        skipped.

    Raises:
        RefusedError: there are checkpoints, but none can be loaded. A start from step 0 then needs the user's consent.
    """
    rank, skipped, first_error = dist.get_rank(), list[str](), ""
    # Rank 0 alone lists the storage, so that all ranks see the same candidates in the same order.
    candidates = list_newest_first(folder) if rank == 0 else iter(())

    # Each iteration tries one candidate. It ends on all ranks in the same way, because it has collectives.
    while (candidate := broadcast_from_rank_0(lambda: next(candidates, None))) is not None:
        # A folder without a valid manifest comes as the reason.
        if isinstance(candidate, str):
            skipped.append(candidate)
            continue
        check(candidate.url, candidate.manifest)

        # Load into new tensors: another rank may find damage, and then no rank may keep what it loaded.
        states, error = _load_on_all_ranks(candidate, fragments)
        if error:
            skipped.append(error)
            first_error = first_error or error
            continue

        # Every rank has its whole share. Write it into the live tensors.
        for fragment, loaded in zip(fragments, states, strict=True):
            for state, tensor in loaded.items():
                fragment.states[state].data.copy_(tensor)
        return candidate.manifest, skipped

    if first_error:
        raise RefusedError(
            f"{folder}: none of its checkpoints can be loaded; {first_error}; remove them to start from step 0"
        )
    return None, skipped


def _load_on_all_ranks(saved: SavedCheckpoint, fragments: Sequence[Fragment]) -> tuple[list[dict[str, Tensor]], str]:
    """Load the fragments of this rank. A collective.

    Returns:
        The states as from `load_fragments`, and the error of the first rank that found damage, or "" if none did.
    """
    states, local_error = list[dict[str, Tensor]](), ""
    try:
        states = load_fragments(saved, fragments)
    except DamagedError as error:
        local_error = str(error)
    errors: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(errors, local_error)
    return states, next(filter(None, errors), "")


def broadcast_from_rank_0(compute: Callable[[], BroadcastValue]) -> BroadcastValue:
    """Call a function on rank 0 alone, and return its result on all ranks. A collective."""
    values: list[Any] = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]
