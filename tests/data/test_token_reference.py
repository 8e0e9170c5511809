"""What the original model said of a token stands beside that token in a micro-batch, for the forget rows that ask for it."""

import numpy as np
import pytest

from tests.support.runs import VOCAB_SIZE, write_corpora
from unlearn_ds.config import RunConfig
from unlearn_ds.data.batch import StepBuilder, plan_layout
from unlearn_ds.data.labels import SubstituteTargets
from unlearn_ds.data.sources import make_plan, make_sources, open_run_corpora, with_reference_log_prob


@pytest.mark.parametrize("scattered", [False, True])
def test_log_q_is_that_of_the_target(tmp_path, monkeypatch, scattered):
    write_corpora(tmp_path)
    config = RunConfig(
        "tnpo",
        "o",
        target_model_name_or_path="m",
        data_dir=str(tmp_path),
        seq_len=24,
        global_batch_size=8,
        retain_loss="cross_entropy",
    )
    sources = make_sources(config, open_run_corpora(config, VOCAB_SIZE, None), VOCAB_SIZE, ())
    tokens = np.array(sources[0].sequences.corpora[0].tokens)
    plan = make_plan(config, with_reference_log_prob(sources, tokens.astype(np.float32)), 1)
    builder = StepBuilder(plan, plan.step(0), plan_layout(plan, fixed_shapes=False))
    if scattered:  # the same positions, one by one
        where = builder._where
        monkeypatch.setattr(builder, "_where", lambda i: where(i) + np.arange(builder._count[i]))
    num_forget = 0
    for micro_step in range(plan.step(0).num_micro_steps):
        batch = builder.build(0, micro_step)
        takes = batch.ce_takes
        # The "log-probability" of a token here is its own id.
        assert batch.ce_log_q[takes].tolist() == batch.ce_targets[takes].tolist()
        assert not batch.ce_log_q[~takes].any()
        num_forget += int(takes.sum())
    assert num_forget > 0


def test_substitutes_begin_anew_in_every_sequence():
    targets = SubstituteTargets([5, 6, 7])
    true, zeros = np.zeros(8, dtype=np.int64), np.zeros(8, dtype=np.int64)
    sequences = np.array([3, 3, 3, 3, 3, 9, 9, 9])
    assert targets(true, sequences, zeros, zeros).tolist() == [5, 6, 7, 5, 6, 5, 6, 7]
