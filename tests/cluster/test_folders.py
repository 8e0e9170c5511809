"""Real runs and one folder: two at once, a killed owner, a lost one, an overwrite, links, caches that two need."""

import json
import shutil
import signal
import stat

import pytest

from tests.support.cluster import largest_difference, make_tiny_run, metrics, weights
from unlearn_ds.layout import DONE_FILE, foreign
from unlearn_ds.ownership import OWNER_FILE

EVALUATE = "unlearn_ds.evaluation.evaluate"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("folders"))
    yield run
    run.server.stop()


def assert_as_of_one_process(tiny, run_dir):
    assert metrics(run_dir) == metrics(tiny.baseline_of_one)
    assert largest_difference(weights(run_dir), weights(tiny.baseline_of_one)) == 0.0


def evaluation(tiny, output_dir):
    options = {
        "model_name_or_path": tiny.folder / "model",
        "data_dir": tiny.folder / "data",
        "seq_len": 48,
        "bf16": False,
        "num_threads": 1,
        "output_dir": output_dir,
    }
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


@pytest.mark.fault(
    "a second run, or `evaluate`, in the folder of a run under way",
    "`RUN is in use by COMMAND (process N of USER on HOST, since WHEN)`, code 2",
    "the first ends as if nothing had been",
)
def test_while_a_run_has_its_folder_no_other_gets_it(tiny, tmp_path):
    """Each way to start a second one is refused with the name of the first, which ends as if nothing had been."""
    out = tmp_path / "run"
    first = tiny.server.start(tiny.arguments(out), num_ranks=1)
    first.wait_for(lambda: len(metrics(out)) >= 3, "updates")
    first.kill(0, signal.SIGSTOP)
    others = [tiny.server.start(tiny.arguments(out), num_ranks=1)]
    others += [tiny.server.start(tiny.arguments(out, **{how: True})) for how in ("auto_resume", "overwrite_output_dir")]
    others += [tiny.server.start(evaluation(tiny, out), module=EVALUATE, num_ranks=1)]
    for other in others:
        assert set(other.wait()) == {2}, other.output()
        said = other.output()
        assert said.count(f"error: {out} is in use by `") == 1
        assert f"(process {first.pids[0]} of " in said
        assert "choose another --output_dir" in said
    first.kill(0, signal.SIGCONT)
    assert first.wait() == [0], first.output()
    assert_as_of_one_process(tiny, out)
    assert not list(out.rglob(".*"))


@pytest.mark.fault(
    "two runs that start at once in one folder",
    "the same, from one of them",
    "one trains",
)
def test_of_two_that_start_at_once_one_trains(tiny, tmp_path):
    runs = [tiny.server.start(tiny.arguments(tmp_path / "run", auto_resume=True), num_ranks=1) for _ in range(2)]
    assert sorted(run.wait()[0] for run in runs) == [0, 2]
    assert_as_of_one_process(tiny, tmp_path / "run")


@pytest.mark.fault(
    "`kill -9` of what holds a folder",
    "`RUN was left by COMMAND (process N of USER on HOST), which is dead: taken over`",
    "the next start has it at once",
)
def test_what_a_killed_run_held_is_taken_over_at_once(tiny, tmp_path):
    out = tmp_path / "run"
    run = tiny.server.start(tiny.arguments(out, auto_resume=True))
    run.wait_for(lambda: len(metrics(out)) >= 5, "updates")
    for rank in (1, 0):
        run.kill(rank)
    run.wait()
    assert (out / OWNER_FILE).exists()
    again = tiny.server.run(tiny.arguments(out, auto_resume=True), UNLEARN_DS_STALE_OWNER_S="3600")
    assert f"{out} was left by `" in again.output()
    tiny.assert_same_as_uninterrupted(out)


def test_a_requeued_run_waits_for_a_host_that_may_be_dead(tiny, tmp_path):
    out = tmp_path / "run"
    run = tiny.server.start(tiny.arguments(out, auto_resume=True), num_ranks=1)
    run.wait_for(lambda: len(metrics(out)) >= 5, "updates")
    run.kill(0)
    run.wait()
    content = json.loads((out / OWNER_FILE).read_text())
    (out / OWNER_FILE).write_text(json.dumps(content | {"host": "node7"}))
    again = tiny.server.run(tiny.arguments(out, auto_resume=True), num_ranks=1, UNLEARN_DS_STALE_OWNER_S="2")
    assert again.output().count(f"unlearn-ds: waiting for {out}, in use by `") == 1
    assert "on node7" in again.output()
    assert_as_of_one_process(tiny, out)


@pytest.mark.fault(
    "a run whose owner file is deleted or taken over",
    "`RUN/.owner.json was removed, so another process may work there`, at the next update, code 2",
    "resumes: same",
)
def test_a_run_whose_folder_is_taken_stops_and_writes_no_more(tiny, tmp_path):
    out = tmp_path / "run"
    run = tiny.server.start(tiny.arguments(out, save_steps=3), UNLEARN_DS_STALE_OWNER_S="1.2")
    run.wait_for((out / "checkpoints" / "step_3").exists, "a checkpoint")
    (out / OWNER_FILE).unlink()
    assert run.wait() == [2, 2], run.output()
    assert f"unlearn-ds train: error: {out / OWNER_FILE} was removed, so another process may work there" in run.output()
    assert not (out / "model").exists()
    tiny.server.run(tiny.arguments(out, resume=True))
    tiny.assert_same_as_uninterrupted(out)


def test_a_cache_that_another_run_computes_is_waited_for(tiny, tmp_path):
    options = {"unlearn_method": "adversarial", "cache_dir": tmp_path / "cache", "max_steps": 2, "save_steps": 0}
    first = tiny.server.start(tiny.arguments(tmp_path / "first", **options), num_ranks=1)
    first.wait_for(lambda: any((tmp_path / "cache").glob(".labels-*.rank0.partial")), "labels under way")
    first.kill(0, signal.SIGSTOP)
    second = tiny.server.start(tiny.arguments(tmp_path / "second", **options))
    second.wait_for(lambda: "unlearn-ds: waiting for " in second.output(), "a word of whom it waits for")
    assert f"(process {first.pids[0]} of " in second.output()
    first.kill(0, signal.SIGCONT)
    assert first.wait() == [0], first.output()
    assert second.wait() == [0, 0], second.output()
    assert "drawing labels" not in second.output()
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".bin", ".json"]


def everything(tiny, out, **changes):
    """A run that writes whatever a run can, its evaluation and its report."""
    options = {"do_eval": True, "profile_steps": "2:2", "save_steps": 20, "overwrite_output_dir": True, "max_steps": 20}
    tiny.server.run(tiny.arguments(out, **options | changes), num_ranks=1)


def test_an_overwrite_knows_all_that_a_run_writes_and_removes_nothing_else(tiny, tmp_path):
    out = tmp_path / "run"
    everything(tiny, out)
    more = [*evaluation(tiny, out), "--generate", "2", "--generate_tokens", "4", "--quantize", "int8", "--relearn", "1"]
    more[more.index("--model_name_or_path") + 1] = str(out / "model")
    evaluated = tiny.server.start(more, module=EVALUATE, num_ranks=1)
    assert evaluated.wait() == [0], evaluated.output()
    report = tiny.server.start([str(out)], module="unlearn_ds.evaluation.report", num_ranks=1)
    assert report.wait() == [0], report.output()
    (out / DONE_FILE).write_text("{}")
    (out / "stacks").mkdir()
    (out / "stacks" / "rank_0.txt").write_text("")
    assert foreign(out) == []
    before = sorted(path.relative_to(out) for path in out.rglob("*"))
    assert len(before) > 30

    def refused(arguments, message):
        run = tiny.server.start(arguments, num_ranks=1)
        assert run.wait() == [2], run.output()
        assert message in run.output()
        assert sorted(path.relative_to(out) for path in out.rglob("*")) == before

    overwriting = tiny.arguments(out, overwrite_output_dir=True, max_steps=1, save_steps=0)
    # What is read is read first: a model that is not there, corpora of another vocabulary.
    refused([*overwriting, "--target_model_name_or_path", str(tmp_path / "none")], "cannot read the model")
    for name in ("run.yaml", "model/mine.gguf", "checkpoints/inner/run.json", "notes/a.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("seed: 1\n")
        before = sorted(path.relative_to(out) for path in out.rglob("*"))
        config = ["--config", str(out / name)] if name == "run.yaml" else []
        refused([*overwriting, *config], "in it is nothing that a run writes: not cleared")
        shutil.rmtree((out / name).parent) if name.startswith(("checkpoints/", "notes/")) else (out / name).unlink()
        before = sorted(path.relative_to(out) for path in out.rglob("*"))
    tiny.server.run(overwriting, num_ranks=1)
    assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "model", "run.json"]


def test_links_are_followed_once_or_replaced_never_emptied(tiny, tmp_path):
    """The output folder leads to scratch; in it the model and a checkpoint are links to what others keep."""
    scratch, kept = tmp_path / "scratch", tmp_path / "kept"
    kept.mkdir()
    (kept / "config.json").write_text("{}")
    out = tmp_path / "run"
    out.symlink_to(scratch)  # which is not there yet
    everything(tiny, out)
    assert not scratch.is_symlink()
    shutil.rmtree(scratch / "model")
    (scratch / "model").symlink_to(kept)
    (scratch / ".model.partial").symlink_to(kept)
    shutil.move(scratch / "checkpoints", tmp_path / "checkpoints")
    (scratch / "checkpoints").symlink_to(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / ".step_9.partial").symlink_to(kept)
    options = {"resume": True, "save_steps": 20, "max_steps": 20}
    tiny.server.run(tiny.arguments(out, **options), num_ranks=1)
    assert not (scratch / "model").is_symlink()
    assert len(weights(scratch)) > 0
    assert out.is_symlink()
    for name in ("model", "tables", "checkpoints"):
        if not (scratch / name).is_symlink():
            shutil.rmtree(scratch / name)
            (scratch / name).symlink_to(tmp_path / "gone" if name == "tables" else kept)
    everything(tiny, out)
    assert out.is_symlink()
    assert not any(path.is_symlink() for path in scratch.iterdir())
    assert [path.name for path in kept.iterdir()] == ["config.json"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_20"]
    everything(tiny, out, overwrite_output_dir=False, resume=True)


def test_all_that_a_run_writes_has_the_same_modes(tiny, tmp_path):
    everything(tiny, tmp_path / "run")
    modes = {}
    for path in (tmp_path / "run").rglob("*"):
        modes.setdefault((path.is_dir(), stat.S_IMODE(path.stat().st_mode)), []).append(path)
    assert len(modes) == 2, modes
