"""The folder of a run: claimed when it starts, and the checkpoint there that it goes on from."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from unlearn_ds import ownership
from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.sources import RunRecord, parse_record, read_record
from unlearn_ds.durable import remove, remove_litter
from unlearn_ds.engine import checkpoint, manifest
from unlearn_ds.layout import PROFILE, RUN_FILE, foreign
from unlearn_ds.measures.folder import mend
from unlearn_ds.options import AUTO, OptionError
from unlearn_ds.ownership import OWNER_FILE

_READ_OPTIONS = (
    "target_model_name_or_path model_name_or_path tokenizer_name_or_path data_dir cache_dir deepspeed objective"
)


@contextmanager
def own_run_dir(config: RunConfig) -> Iterator[None]:
    """Make the output folder and hold it while the block runs. Every rank calls this; nothing is removed yet.

    Raises `FolderInUse` while another process works there, and `OptionError` for a folder that this run may not write to: one
    that an earlier run left full, unless it goes on with it or may clear it (`clear_run_dir`).
    """
    run_dir = config.run_dir
    distributed.on_main(lambda: _check_no_file(run_dir))
    remedy = "one run a folder: wait for it, stop it, or choose another --output_dir"
    with distributed.owned(run_dir / OWNER_FILE, remedy):
        distributed.on_main(lambda: claim_run_dir(config, run_dir))
        yield


def _check_no_file(run_dir: Path) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise OptionError(f"--output_dir {run_dir}: is a file")


def claim_run_dir(config: RunConfig, run_dir: Path) -> None:
    """Mend what a killed run left in the folder, which is this run's own, and refuse what this run may not do to it."""
    mend(run_dir)
    remove_litter(run_dir / PROFILE)
    checkpoint.remove_remains(run_dir)
    if config.resume and not manifest.published(run_dir):
        raise OptionError(f"--resume: no complete checkpoint in {manifest.folder(run_dir)}")
    if config.resume or config.auto_resume or not _content(run_dir):
        return
    if not config.overwrite_output_dir:
        raise OptionError(
            f"--output_dir {run_dir} is not empty: --overwrite_output_dir clears it, --resume goes on from its newest "
            "checkpoint"
        )
    if not (run_dir / RUN_FILE).exists():
        raise OptionError(
            f"--overwrite_output_dir: {run_dir} holds no {RUN_FILE}, so it is not an earlier run's: not cleared"
        )
    for name in _READ_OPTIONS.split():
        given = getattr(config, name)
        if given and Path(given).resolve().is_relative_to(run_dir.resolve()):
            raise OptionError(
                f"--overwrite_output_dir would clear {run_dir}, and --{name} {given} lies in it: not cleared"
            )
    if others := foreign(run_dir):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise OptionError(
            f"--overwrite_output_dir would clear {run_dir}, and {others[0]}{more} in it is nothing that a run writes: not "
            "cleared; move it away, or choose another --output_dir"
        )


def clear_run_dir(config: RunConfig) -> None:
    """With --overwrite_output_dir: remove what an earlier run wrote, run.json last. All that this run reads has been read."""
    if config.overwrite_output_dir:
        ownership.check()
        for path in sorted(_content(config.run_dir), key=lambda path: path.name == RUN_FILE):
            remove(path)


def _content(run_dir: Path) -> list[Path]:
    """What lies in a run's folder beside the owner file."""
    return sorted(path for path in run_dir.iterdir() if OWNER_FILE not in path.name)


def find_checkpoint(config: RunConfig, before: RunRecord) -> tuple[manifest.Checkpoint | None, RunRecord]:
    """The checkpoint that the run goes on from, if it resumes, and the run's record as that checkpoint holds it.

    before: what the folder says of the run. Every rank calls this. Raises `CheckpointError` rather than start afresh over
    checkpoints of which none is intact.
    """
    if not (config.resume or config.auto_resume):
        return None, before
    found = manifest.newest_intact(config.run_dir, before.run)
    if found is None or found.record is not None:
        return found, before if found is None else _record_in(found)
    distributed.say(
        f"note: {found.path} was written by an older version: that its files belong together and to this run cannot be checked"
        + ("" if before.options else ", nor, without run.json, that model and options are the run's")
    )
    return found, before


def _record_in(found: manifest.Checkpoint) -> RunRecord:
    return parse_record(found.record, f"{found.path / manifest.MANIFEST}: record")


def earlier_record(config: RunConfig) -> RunRecord:
    """What is known of the run that `config` goes on with: its run.json, else what its newest checkpoint holds of it; empty
    for a new run, and where there is no checkpoint. Raises `ValueError` if run.json is damaged."""
    if not (config.resume or config.auto_resume) or not manifest.published(config.run_dir):
        return RunRecord({})
    if (config.run_dir / "run.json").exists():
        return read_record(config.run_dir)
    found = next((c for c in manifest.complete_checkpoints(config.run_dir) if c.record is not None), None)
    if found is None:
        return RunRecord({})
    distributed.say(f"note: {config.run_dir / 'run.json'} is gone: {found.path} says what the run is")
    return _record_in(found)


def with_earlier_choices(config: RunConfig, before: RunRecord, world_size: int) -> RunConfig:
    """The options of a run that is gone on with, `auto` replaced by what it came to at the start, on as many ranks.

    Rows and workspace decide in which order floats are summed, and memory may be free in other amounts today.
    """
    again = {name: value for name, value in before.chosen.items() if getattr(config, name, None) == AUTO}
    if before.world_size != world_size:
        return config
    try:
        return dataclasses.replace(config, **again)
    except ValueError as error:
        raise OptionError(f"{config.run_dir / 'run.json'}: chosen: {error}") from error


def note_other_threads(record: RunRecord, device: torch.device) -> None:
    """Say that a run on CPUs goes on with another number of threads a rank: they sum in another order."""
    before, now = record.num_threads, torch.get_num_threads()
    if device.type == "cpu" and before not in (None, now):
        distributed.say(
            f"note: this run began with {before} CPU threads a rank and goes on with {now}: its figures will equal those of an "
            f"uninterrupted run up to rounding, not bit for bit (--num_threads {before} does that)"
        )


def warn_of_another_length(record: RunRecord, num_steps: int) -> None:
    """Say that a run goes on for another number of updates than it was started for: its learning rates change with it."""
    before = record.num_steps
    if before not in (None, num_steps):
        distributed.say(
            f"warning: this run was started for {before} updates and goes on for {num_steps} (--max_steps, "
            f"--num_train_epochs): from here its learning rate follows a schedule of {num_steps}, so it will not end as a run "
            f"of {num_steps} from the start would"
        )
