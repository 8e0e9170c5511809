"""What a checkpoint says of itself, and whether its files are what it says: one thing, or none.

The manifest names run, step, ranks, the run's record and the checksum of every file, and carries a checksum over all of that.
Every shard carries a stamp: its own name, its run and step, and the checksum of the manifest's head. Whatever is exchanged
for a piece of another checkpoint is found. These sums are no signature: files are read as data only, never as a pickle that
may run code, and are refused if they are a stranger's.
"""

import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import xxhash
from pydantic import Field

from unlearn_ds.cluster import distributed
from unlearn_ds.layout import CHECKPOINT_MANIFEST as MANIFEST
from unlearn_ds.layout import CHECKPOINTS, STATE
from unlearn_ds.stored import ABSENT, Positive, Record, StoredError, read_dict

PIECE = 4 << 20  # bytes, written, read and summed at once
STAMP = "unlearn_ds"  # the key of a shard's stamp among DeepSpeed's
_ROOT = 0


class CheckpointError(ValueError):
    """A checkpoint is damaged, cannot be written, or belongs to another run."""


@dataclass(frozen=True)
class Origin:
    """The run that a checkpoint belongs to."""

    run: str  # the run's id, the same in all of its checkpoints and its run.json
    plan_fingerprint: str
    record: dict[str, Any]  # what the run's run.json holds


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, by its manifest."""

    path: Path
    step: int  # updates done
    world_size: int
    plan_fingerprint: str
    files: dict[str, str] = field(default_factory=dict)  # name below path -> checksum
    run: str | None = None  # this and the next two: None in checkpoints of older versions
    record: dict[str, Any] | None = None
    head: str | None = None  # checksum of the manifest without the files

    def stamp(self, name: str) -> dict[str, Any] | None:
        """What the shard `name`, below `path`, must carry."""
        return None if self.head is None else _stamp(self.run, self.step, self.head, name)


def _stamp(run: str | None, step: int, head: str, name: str) -> dict[str, Any]:
    return {"run": run, "step": step, "head": head, "file": name}


def _sum_of(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint that is being written."""

    head: dict[str, Any]

    @classmethod
    def of(cls, origin: Origin, step: int) -> "Manifest":
        """Every rank calls this and gets the same."""
        head = {
            "step": step,
            "world_size": distributed.world_size(),
            "plan_fingerprint": origin.plan_fingerprint,
            "run": origin.run,
            "save": distributed.on_main(lambda: secrets.token_hex(8)),  # tells two saves of one step apart
            "record": json.loads(json.dumps(origin.record)),
        }
        return cls(head)

    def stamp(self, name: str) -> dict[str, Any]:
        """What the shard `name` carries."""
        return _stamp(self.head["run"], self.head["step"], _sum_of(self.head), name)

    def text(self, files: dict[str, str]) -> str:
        """The manifest's content, once all files are written."""
        content = self.head | {"files": files}
        return json.dumps(content | {"digest": _sum_of(content)}, indent=1)


def folder(run_dir: Path) -> Path:
    return run_dir / CHECKPOINTS


def published(run_dir: Path) -> list[Path]:
    """Folders of checkpoints under their final names, whatever they hold."""
    if not folder(run_dir).exists():
        return []
    return sorted(path for path in folder(run_dir).iterdir() if path.name.startswith("step_"))


class ManifestFile(Record):
    """What a manifest says."""

    step: Positive  # updates done
    world_size: Positive
    plan_fingerprint: str
    files: Annotated[dict[str, str], Field(min_length=1)]  # name below the folder -> checksum
    run: str = ABSENT  # this and what follows: absent in checkpoints of older versions
    save: str = ABSENT
    record: dict[str, Any] = ABSENT
    digest: str = ABSENT


def _read(path: Path) -> Checkpoint:
    """The checkpoint in a folder by its manifest. Raises `CheckpointError` if that is none, or is not as it was written."""
    content = read_dict(path / MANIFEST, ManifestFile)
    bound = {"run", "record", "save", "digest"} & content.keys()
    found = Checkpoint(path, *(content[name] for name in ("step", "world_size", "plan_fingerprint", "files")))
    if not bound:
        return found  # of an older version
    digest = content.pop("digest", None)
    if len(bound) < 4 or _sum_of(content) != digest:
        raise CheckpointError(f"checkpoint {path} is damaged ({MANIFEST} is not what was written)")
    head = {name: value for name, value in content.items() if name != "files"}
    return replace(found, run=content["run"], record=content["record"], head=_sum_of(head))


def read_checkpoints(run_dir: Path) -> tuple[list[Checkpoint], list[str]]:
    """Checkpoints with a readable manifest, newest first, and what is wrong with the others."""
    good, bad = [], []
    for path in published(run_dir):
        try:
            good.append(_read(path))
        except StoredError as error:
            bad.append(f"checkpoint passed over: {error}")
        except CheckpointError as error:
            bad.append(f"{error}: passed over")
    return sorted(good, key=lambda checkpoint: -checkpoint.step), bad


def complete_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Checkpoints that were published and have a readable manifest, newest first."""
    return read_checkpoints(run_dir)[0]


def newest_one(run_dir: Path) -> str:
    """Which checkpoint a run would go on from, as the end of a message."""
    good = complete_checkpoints(run_dir)
    return f"the newest checkpoint is {good[0].path}" if good else "there is no earlier checkpoint"


def newest_intact(run_dir: Path, run: str | None = None) -> Checkpoint | None:
    """The newest checkpoint that is one thing and whose files are as they were written; None if there are no checkpoints.

    run: the id of the run that is gone on with, if it is known. Others are named and passed over; all ranks call this and
    share the reading. Raises `CheckpointError` rather than let a run start afresh over checkpoints of which none is intact.
    """
    good, bad = distributed.on_main(lambda: read_checkpoints(run_dir))
    for line in bad:
        distributed.say(line)
    for checkpoint in good:
        flaw = distributed.on_main(lambda c=checkpoint: _flaw(c, run)) or _damaged(checkpoint)
        if flaw is None:
            return checkpoint
        distributed.say(f"checkpoint {checkpoint.path} {flaw}: passed over")
    if good or bad:
        raise CheckpointError(
            f"every checkpoint in {folder(run_dir)} is damaged or not this run's: bring one back, or start afresh with "
            "--overwrite_output_dir"
        )
    return None


def _flaw(checkpoint: Checkpoint, run: str | None) -> str | None:
    """What is wrong with a checkpoint as a whole, without reading its shards."""
    path = checkpoint.path
    if path.name != f"step_{checkpoint.step}":
        return f"is of step {checkpoint.step} by its manifest, and was renamed"
    if None not in (run, checkpoint.run) and run != checkpoint.run:
        return f"is of another run (its id is {checkpoint.run}, this run's is {run})"
    there = {f"{STATE}/{file.name}" for file in (path / STATE).glob("*.pt")}
    if missing := checkpoint.files.keys() - there:
        return f"is damaged ({Path(min(missing)).name} is missing)"
    if not there or (extra := there - checkpoint.files.keys()):
        return f"is damaged ({Path(min(extra)).name if there else 'its state'} is not in {MANIFEST})"
    ours = {_ROOT, os.geteuid(), _owner_of_new_files(path.parent)}
    for part in (path, path / MANIFEST, path / STATE, *(path / name for name in checkpoint.files)):
        if (owner := part.stat().st_uid) not in ours:
            return (
                f"is refused: {part} belongs to user {owner}, neither to you nor to root. Resume only what you trust: a copy "
                "of it is yours"
            )
    return None


def _owner_of_new_files(path: Path) -> int:
    """Who owns what this process writes there: on a network's file system it may be another user than the process has."""
    try:
        with tempfile.TemporaryFile(dir=path) as probe:
            return os.fstat(probe.fileno()).st_uid
    except OSError:  # a folder that is read, and cannot be written to
        return os.geteuid()


def _damaged(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the shards of a checkpoint, the same on all ranks, which share the reading."""
    names = sorted(checkpoint.files)
    mine = names[distributed.rank() :: distributed.world_size()]
    damage = [what for name in mine if (what := _damage(checkpoint, name))]
    found = [what for part in distributed.gather_objects(damage) for what in part]
    return f"is damaged ({found[0]})" if found else None


def _damage(checkpoint: Checkpoint, name: str) -> str | None:
    path = checkpoint.path / name
    try:
        if checksum(path) != checkpoint.files[name]:
            return f"{path.name} is not what was written"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    try:
        stamp = read_shard(path).get(STAMP)
    except Exception as error:  # a file made to harm can bring anything about; whatever it is, the file is refused
        return f"{path.name} cannot be read as data: {type(error).__name__}"
    if stamp == checkpoint.stamp(name):
        return None
    of = (
        f"{stamp['file']} of step {stamp['step']}"
        if isinstance(stamp, dict) and {"file", "step"} <= stamp.keys()
        else ""
    )
    return f"{path.name} is of another checkpoint{of and f': it is {of}'}"


def checksum(path: Path) -> str:
    """XXH3 of 64 bits: against torn writes and flipped bits, ten times as fast as a disk."""
    found = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(PIECE):
            found.update(chunk)
    return found.hexdigest()


def read_shard(path: Path) -> dict[str, Any]:
    """The content of a shard, its tensors left on the disk until they are used."""
    with as_data():
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


@contextlib.contextmanager
def as_data() -> Iterator[None]:
    """Within, every `torch.load` reads tensors and plain values, and of classes those that DeepSpeed writes into a checkpoint.

    DeepSpeed 0.19.8 asks for `weights_only=False` throughout, by which a pickle may run anything; torch's own variable
    overrules that.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in forced}
    os.environ.update(forced)
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
