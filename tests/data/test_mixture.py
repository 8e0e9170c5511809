"""Retain data from several sets: shares, and what is refused."""

import numpy as np
import pytest

from tests.run.test_masked_methods import write_items
from tests.support.runs import VOCAB_SIZE
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import CorpusError
from unlearn_ds.data.sources import make_plan, make_sources, open_run_corpora
from unlearn_ds.data.summary import save_step_picture
from unlearn_ds.options import OptionError


def config(data, **options):
    given = {"output_dir": "-", "target_model_name_or_path": "-", "seq_len": 64, "global_batch_size": 12}
    return RunConfig("ascent_plus_descent", data_dir=str(data), **given | options)


def plan_of(run, world_size):
    sources = make_sources(run, open_run_corpora(run, VOCAB_SIZE, None), VOCAB_SIZE, ())
    return make_plan(run, sources, world_size)


def test_an_update_is_mixed_by_the_shares_at_any_world_size(tmp_path):
    write_items(tmp_path)
    run = config(tmp_path, retain_sets=("retain:2", "more:1"), retain_ratio=2.0)
    plans = [plan_of(run, world_size) for world_size in (1, 3)]
    assert plans[0].fingerprint == plans[1].fingerprint
    for index in range(plans[0].num_steps):
        one, other = (plan.step(index) for plan in plans)
        assert one.sequence.tolist() == other.sequence.tolist()
    first = plans[0].step(0)
    assert [source.name for source in plans[0].sources] == ["forget", "retain", "more"]
    assert np.allclose(first.num_sequences_by_source, np.array([1, 4 / 3, 2 / 3]) * 4, atol=1)
    assert plans[0].fingerprint != plan_of(config(tmp_path, retain_sets=("retain", "more")), 1).fingerprint
    save_step_picture(tmp_path / "update.png", plans[0], first)
    assert (tmp_path / "update.png").read_bytes().startswith(b"\x89PNG")


def test_the_average_is_part_of_what_a_run_is(tmp_path):
    write_items(tmp_path)
    one, other = (plan_of(config(tmp_path, average=average), 1) for average in ("sequence", "token"))
    assert one.fingerprint != other.fingerprint
    for plan in (one, other):
        weights, kept = plan.token_weights(step := plan.step(0))
        count = step.num_sequences_by_source
        assert (weights * step.num_targets).sum() == pytest.approx((count[1] - count[0]) / step.num_sequences)
        with_kept = step.num_kept > 0
        assert (kept * step.num_kept).sum() == pytest.approx(with_kept.sum() / step.num_sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retain_sets": ("retain", "retain:2")}, "the set retain is named twice"),
        ({"retain_sets": ("retain:0",)}, "--retain_sets retain:0: a share is a number above 0"),
        ({"retain_sets": ("retain:much",)}, "a share is a number above 0"),
        ({"retain_sets": ("retain:inf",)}, "a share is a number above 0"),
        ({"retain_sets": ("../x",)}, "must be a plain name"),
        ({"retain_sets": ("forget",)}, "what is to be forgotten cannot be kept"),
        ({"retain_sets": ("retain",), "general": True}, "both choose retain data"),
        ({"average": "tokens"}, "--average tokens"),
    ],
)
def test_a_bad_mixture_is_named(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        _ = config(tmp_path, **options).retain_mixture


def test_a_mixture_is_for_methods_with_a_retain_term():
    with pytest.raises(OptionError, match="--retain_sets is for methods that pair forget with retain"):
        RunConfig("gradient_ascent", "-", target_model_name_or_path="-", retain_sets=("retain",))


def test_a_set_that_was_not_prepared_says_how(tmp_path):
    write_items(tmp_path)
    with pytest.raises(OptionError, match="make it with `unlearn-ds prepare --domain github --set other=FILE`"):
        open_run_corpora(config(tmp_path, retain_sets=("retain", "other")), VOCAB_SIZE, None)


def test_a_corpus_without_a_target_is_named(tmp_path):
    from unlearn_ds.data.corpus import Corpus, CorpusWriter
    from unlearn_ds.data.sequences import SequenceIndex

    with CorpusWriter(tmp_path / "none", 100, form="qa") as writer:
        writer.add(range(1, 20), [1] + [0] * 18, 0)  # its first token is predicted from nothing
    with pytest.raises(CorpusError, match="none: no token of 1 sequences of --seq_len 16 is a target"):
        SequenceIndex([Corpus(tmp_path / "none")], 16)
    with CorpusWriter(tmp_path / "some", 100, form="spans") as writer:
        writer.add(range(1, 41), [0] * 20 + [1] + [0] * 19, 0)
    index = SequenceIndex([Corpus(tmp_path / "some")], 16)
    assert (len(index), index.num_without_targets) == (1, 2)
    assert index.spans(np.array([0])) == (16, 16)
