"""Resumable state: complete or absent, verified before use, resumable at another world size.

A checkpoint is written to a hidden folder beside its final place, every rank its own shards; each file's checksum is taken
while it is written. Only when all ranks succeeded is the folder described by a manifest (`manifest.py`) and renamed to
`checkpoints/step_N`.
The folder must be on a file system that all ranks see.
"""

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from unlearn_ds.cluster import distributed
from unlearn_ds.durable import (
    bring_all_back,
    discard,
    flush,
    fresh_folder,
    publish_folder,
    remove,
    remove_folder,
    start_writing_back,
)
from unlearn_ds.engine.engine import TrainingEngine
from unlearn_ds.engine.manifest import (
    MANIFEST,
    PIECE,
    STAMP,
    Checkpoint,
    CheckpointError,
    Manifest,
    Origin,
    as_data,
    complete_checkpoints,
    folder,
    newest_one,
    read_shard,
)
from unlearn_ds.layout import STATE, UNIVERSAL

CONVERSION_TIMEOUT_S = 6 * 3600.0


class _SummedFile:
    """A file that is summed and sent to disk while it is written. An error waits for `finish`: torch's writer would hide it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb", buffering=0)
        self._sum = xxhash.xxh3_64()
        self._written = 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE):
            self._write_piece(view[start : start + PIECE])
        return len(view)

    def _write_piece(self, piece: memoryview) -> None:
        self._sum.update(piece)
        left = piece
        while left and self._error is None:
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                self._error = error
        # Left to itself Linux begins with `finish`, and the disk stands idle until then. In a thread of its own this would be
        # slower: it and the writing would wait for each other.
        if len(piece) == PIECE and self._error is None:
            start_writing_back(self._file, self._written, len(piece))
        self._written += len(piece)

    def flush(self) -> None:
        """Nothing is buffered."""

    def finish(self) -> str:
        """Force to disk and return the checksum; raises the `OSError` of an earlier write."""
        self._file.close()
        if self._error is not None:
            raise self._error
        flush(self._path)
        return self._sum.hexdigest()


@contextlib.contextmanager
def _without_torch_s_own_sums() -> Iterator[None]:
    """torch sums every tensor on its way into the file; the whole file is summed here."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Writer(CheckpointEngine):
    """Takes DeepSpeed's files: sums and flushes them, and keeps a failure to itself until all ranks can hear of it.

    An exception from inside `save_checkpoint` would leave the other ranks waiting in one of its barriers.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        super().__init__()
        self.root = root
        self._manifest = manifest
        self.checksums: dict[str, str] = {}
        self.failure = distributed.KeptFailure()

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if self.failure.reason is not None:
            return
        with self.failure.keep(), _without_torch_s_own_sums():
            name = str(Path(path).relative_to(self.root))
            file = _SummedFile(Path(path))
            torch.save(state_dict | {STAMP: self._manifest.stamp(name)}, file)
            self.checksums[name] = file.finish()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self.failure.keep():
            Path(path).mkdir(parents=True, exist_ok=True)

    def load(self, path: str, map_location: Any = None) -> Any:
        raise AssertionError("this engine only writes")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


@contextlib.contextmanager
def _writing_through(engine: Any, writer: _Writer) -> Iterator[None]:
    """DeepSpeed's engine writes through `writer`, and leaves out its recovery script (an unguarded copy on rank 0)."""
    before = engine.checkpoint_engine
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script


def save(engine: TrainingEngine, run_dir: Path, step: int, origin: Origin, keep: int | None, **state: float) -> Path:
    """Write `checkpoints/step_N` and then drop all but the newest `keep`. Every rank calls this.

    state: numbers, the same on every rank, that come back with the step.

    Raises `CheckpointError` on every rank if any could not write; the checkpoints that were there before stay.
    """
    started = time.monotonic()
    final = folder(run_dir) / f"step_{step}"
    partial = folder(run_dir) / f".step_{step}.partial"
    try:
        distributed.on_main(lambda: fresh_folder(fresh_folder(partial) / STATE))
    except OSError as error:
        raise _not_saved(run_dir, step, str(error)) from error
    manifest = Manifest.of(origin, step)
    writer = _Writer(partial, manifest)
    with _writing_through(engine.engine, writer):
        engine.engine.save_checkpoint(str(partial), tag=STATE, client_state={"step": step} | state, save_latest=False)
    why = writer.failure.everywhere()
    written = distributed.gather_objects(writer.checksums)
    checksums = {name: checksum for part in written for name, checksum in sorted(part.items())}

    def publish() -> None:
        if why:
            discard(partial)
            raise _not_saved(run_dir, step, why)
        try:
            (partial / MANIFEST).write_text(manifest.text(checksums), encoding="utf-8")
            for path in (partial / MANIFEST, partial / STATE, partial):
                flush(path)
            publish_folder(partial, final)
            # One of a later step was passed over when the run was gone on with: it takes no good one's place.
            done = [found for found in complete_checkpoints(run_dir) if found.step <= step]
            for old in done[keep:] if keep else []:
                remove_folder(old.path)
        except OSError as error:
            raise _not_saved(run_dir, step, str(error)) from error

    distributed.on_main(publish)
    size = sum(path.stat().st_size for path in (final / STATE).iterdir()) if distributed.is_main() else 0
    distributed.say(f"saved {final} ({size / 2**30:.2f} GiB in {time.monotonic() - started:.1f} s)")
    return final


def _not_saved(run_dir: Path, step: int, why: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint of step {step} could not be written ({why}); {newest_one(run_dir)}")


def remove_remains(run_dir: Path) -> None:
    """Delete what a run that was killed while saving or deleting left behind; an older state that it had moved comes back."""
    bring_all_back(folder(run_dir))
    for path in (*folder(run_dir).glob(".step_*.partial"), *folder(run_dir).glob(".step_*.doomed")):
        remove(path)


def prepare_resume(checkpoint: Checkpoint, ds_config: dict[str, Any]) -> None:
    """Before the engine exists: if the world size differs, convert to DeepSpeed's universal format on rank 0."""
    if checkpoint.world_size == distributed.world_size():
        return
    if ds_config["zero_optimization"]["stage"] != 3:
        raise CheckpointError(
            f"{checkpoint.path} was written by {checkpoint.world_size} ranks and this run has "
            f"{distributed.world_size()}: only ZeRO-3 checkpoints change their world size. Resume with {checkpoint.world_size} "
            "ranks; a run that begins with --deepspeed zero3 can be resumed with any number"
        )
    distributed.say(
        f"{checkpoint.path} was written by {checkpoint.world_size} ranks, this run has {distributed.world_size()}: "
        "converting it to a universal checkpoint"
    )
    distributed.on_main(lambda: _convert(checkpoint.path), timeout_s=CONVERSION_TIMEOUT_S)
    ds_config["checkpoint"] = ds_config.get("checkpoint", {}) | {"load_universal": True}


def _convert(path: Path) -> None:
    import argparse

    from deepspeed.checkpoint import ds_to_universal

    partial = fresh_folder(path / f".{UNIVERSAL}.partial")
    with contextlib.redirect_stdout(io.StringIO()), as_data():
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(path / STATE),
                output_folder=str(partial),
                # One worker: the converter's pool would fork a process whose group and threads are up.
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    publish_folder(partial, path / UNIVERSAL)


def load(engine: TrainingEngine, checkpoint: Checkpoint, plan_fingerprint: str) -> dict[str, Any]:
    """Restore the engine; the number of updates done as `step`, and what else `save` was given. Every rank calls this.

    Weights, moments and the place in the schedule are the checkpoint's; learning rate, decay and clipping stay the engine's
    own. Raises `CheckpointError` if the checkpoint belongs to other data, options or parameters.
    """
    if checkpoint.plan_fingerprint != plan_fingerprint:
        raise CheckpointError(
            f"{checkpoint.path} belongs to a run over other data or with other data options (seed, seq_len, batch size, "
            "method): resume with the same ones, or start afresh in another --output_dir"
        )
    universal = checkpoint.world_size != distributed.world_size()
    distributed.on_main(lambda: _check_parameters(engine, checkpoint, grouped=not universal))
    tag = UNIVERSAL if universal else STATE
    with as_data(), _own_options(engine):
        loaded, client_state = engine.engine.load_checkpoint(str(checkpoint.path), tag=tag)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed could not load {checkpoint.path}")
    if universal:
        # DeepSpeed 0.19.8 gives all parameters one step counter between them, which then advances once per group and update.
        for state in engine.engine.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
        distributed.barrier()
        distributed.on_main(lambda: remove_folder(checkpoint.path / UNIVERSAL))  # as large as the checkpoint itself
    return client_state


@contextlib.contextmanager
def _own_options(engine: TrainingEngine) -> Iterator[None]:
    """After the block the optimizer and the schedule have the options that they had before it.

    torch and DeepSpeed bring back the saved ones; DeepSpeed 0.19.8 on another number of ranks gives all groups the saved ones
    of the first. The clipping norm comes back at stages 1 and 2 only.
    """
    zero, scheduler = engine.engine.optimizer, engine.scheduler
    groups = [
        {name: value for name, value in group.items() if name != "params"} for group in zero.optimizer.param_groups
    ]
    base_rates, clip_grad = list(scheduler.base_lrs), zero.clip_grad
    yield
    zero.clip_grad, scheduler.base_lrs = clip_grad, base_rates
    rates = [rate * factor(scheduler.last_epoch) for rate, factor in zip(base_rates, scheduler.lr_lambdas)]
    scheduler._last_lr = rates
    for group, own, rate in zip(zero.optimizer.param_groups, groups, rates):
        group |= own | {"lr": rate}


def _check_parameters(engine: TrainingEngine, checkpoint: Checkpoint, grouped: bool) -> None:
    """Raise `CheckpointError` unless the checkpoint holds the state of the parameters that the engine trains.

    grouped: cut into the same groups, too, as only DeepSpeed's universal format need not be.
    """
    model_states = min(name for name in checkpoint.files if name.endswith("_model_states.pt"))
    saved, own = read_shard(checkpoint.path / model_states)["param_shapes"], engine.engine._get_zero_param_shapes()

    def listed(groups: list[dict[str, torch.Size]]) -> list[set[tuple[str, tuple[int, ...]]]]:
        sets = [{(name, tuple(shape)) for name, shape in group.items()} for group in groups]
        return sets if grouped else [set().union(*sets)]

    if listed(saved) == listed(own):
        return
    kept, asked = (set().union(*({(n, tuple(s)) for n, s in g.items()} for g in groups)) for groups in (saved, own))
    name, shape = min(kept ^ asked, default=("the way in which it is cut into groups", ()))
    raise CheckpointError(
        f"{checkpoint.path} holds the state of other parameters than this run trains (first: {name} {list(shape) or ''}): "
        "give the model, --trainable, --lora_* and --deepspeed options of the run, or start afresh in another --output_dir"
    )
