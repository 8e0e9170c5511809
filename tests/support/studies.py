"""What a study's journal tells of its trials."""

from pathlib import Path
from typing import Any


def trials(folder: Path) -> list[Any]:
    """Optuna's trials, in their order."""
    import optuna

    journal = optuna.storages.journal.JournalFileBackend(str(folder / "study.jsonl"))
    return optuna.load_study(storage=optuna.storages.JournalStorage(journal), study_name="unlearn-ds").trials


def states(folder: Path) -> list[tuple[str, int | None]]:
    """(state, number of the trial that it is done again for) of each trial."""
    return [(trial.state.name, trial.user_attrs.get("again")) for trial in trials(folder)]


def assert_whole_but(folder: Path, lost: int, num_trials: int) -> None:
    """All trials of the study are done, once, the lost one again with the same settings; nobody holds any."""
    found = trials(folder)
    done = [trial for trial in found if trial.state.name in ("COMPLETE", "PRUNED")]
    assert len(done) == num_trials
    assert [trial.number for trial in found if trial not in done] == [lost]
    assert found[lost].state.name == "FAIL"
    (again,) = [trial for trial in done if "again" in trial.user_attrs]
    assert again.user_attrs["again"] == lost
    assert again.params == found[lost].params
    settings = [tuple(sorted(trial.params.items())) for trial in done]
    assert len(set(settings)) == num_trials, "a trial was done twice"
    assert not [path.name for path in folder.iterdir() if "owner" in path.name]
