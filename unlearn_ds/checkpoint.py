"""Resumable state: complete or absent, verified before use, resumable at another world size.

A checkpoint is written to a hidden folder beside its final place, described by a manifest with a digest per file, flushed, and
only then renamed to `checkpoints/step_N`. Ranks share the work of hashing, so the folder must be on a file system all see.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn_ds import distributed
from unlearn_ds.engine import TrainingEngine

MANIFEST = "checkpoint.json"
_STATE = "state"
_UNIVERSAL = "universal"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int  # updates done
    world_size: int
    plan_fingerprint: str


class CheckpointError(ValueError):
    """A checkpoint is damaged or belongs to another run."""


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save(engine: TrainingEngine, run_dir: Path, step: int, plan_fingerprint: str, keep: int | None) -> Path:
    """Write `checkpoints/step_N` and then drop all but the newest `keep`. Every rank calls this."""
    final = folder(run_dir) / f"step_{step}"
    partial = folder(run_dir) / f".step_{step}.partial"
    distributed.on_main(lambda: _fresh(partial))
    engine.engine.save_checkpoint(str(partial), tag=_STATE, client_state={"step": step})
    distributed.barrier()
    digests = _digests(partial)

    def publish() -> None:
        manifest = {
            "step": step,
            "world_size": distributed.world_size(),
            "plan_fingerprint": plan_fingerprint,
            "files": digests,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _flush(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush(final.parent)
        for old in complete_checkpoints(run_dir)[keep:] if keep else []:
            shutil.rmtree(old.path)

    distributed.on_main(publish)
    return final


def _fresh(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()


def _flush(path: Path) -> None:
    """Force a folder's files, or the folder entry itself, to disk."""
    for entry in [path, *(p for p in path.rglob("*") if p.is_file())]:
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32] if hasattr(hashlib, "file_digest") else _slow(file)


def _slow(file: Any) -> str:
    """Python 3.10 has no hashlib.file_digest."""
    digest = hashlib.blake2b()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()[:32]


def _digests(path: Path) -> dict[str, str]:
    """Digest of every file below `path`, each computed by one rank, known to all."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST and _UNIVERSAL not in p.parts)
    own = files[distributed.rank() :: distributed.world_size()]
    mine = {str(p.relative_to(path)): _file_digest(p) for p in own}
    return {name: digest for part in distributed.gather_objects(mine) for name, digest in sorted(part.items())}


def complete_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Checkpoints that were published, newest first."""
    found = []
    for manifest in folder(run_dir).glob(f"step_*/{MANIFEST}"):
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            found.append(
                Checkpoint(manifest.parent, content["step"], content["world_size"], content["plan_fingerprint"])
            )
        except (OSError, ValueError, KeyError):
            distributed.say(f"checkpoint {manifest.parent} has no readable {MANIFEST}: passed over")
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def newest_intact(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose files match their digests; damaged ones are named and passed over. All ranks call this."""
    for checkpoint in distributed.on_main(lambda: complete_checkpoints(run_dir)):
        expected = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))["files"]
        actual = _digests(checkpoint.path)
        damaged = sorted(name for name in expected if actual.get(name) != expected[name])
        if not damaged:
            return checkpoint
        distributed.say(f"checkpoint {checkpoint.path} is damaged ({damaged[0]}): passed over")
    return None


def prepare_resume(checkpoint: Checkpoint, ds_config: dict[str, Any]) -> None:
    """Before the engine exists: if the world size differs, convert to DeepSpeed's universal format on rank 0."""
    if checkpoint.world_size == distributed.world_size():
        return
    if ds_config["zero_optimization"]["stage"] != 3:
        raise CheckpointError(
            f"{checkpoint.path} was written by {checkpoint.world_size} ranks and this run has "
            f"{distributed.world_size()}: only ZeRO-3 checkpoints change their world size. Start as many ranks, or use "
            "--deepspeed zero3"
        )
    distributed.say(
        f"{checkpoint.path} was written by {checkpoint.world_size} ranks, this run has {distributed.world_size()}: "
        "converting it to a universal checkpoint"
    )
    distributed.on_main(lambda: _convert(checkpoint.path))
    ds_config["checkpoint"] = ds_config.get("checkpoint", {}) | {"load_universal": True}


def _convert(path: Path) -> None:
    import argparse

    from deepspeed.checkpoint import ds_to_universal

    target = path / _UNIVERSAL
    if target.exists():
        shutil.rmtree(target)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(path / _STATE),
            output_folder=str(target),
            num_extract_workers=2,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def load(engine: TrainingEngine, checkpoint: Checkpoint, plan_fingerprint: str) -> int:
    """Restore the engine and return the number of updates done. Every rank calls this.

    Raises `CheckpointError` if the checkpoint belongs to other data or options.
    """
    if checkpoint.plan_fingerprint != plan_fingerprint:
        raise CheckpointError(
            f"{checkpoint.path} belongs to a run over other data or with other data options (seed, seq_len, batch size, "
            "method, epochs): resume with the same ones, or start afresh in another --output_dir"
        )
    universal = checkpoint.world_size != distributed.world_size()
    tag = _UNIVERSAL if universal else _STATE
    loaded, client_state = engine.engine.load_checkpoint(str(checkpoint.path), tag=tag)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed could not load {checkpoint.path}")
    return int(client_state["step"])
