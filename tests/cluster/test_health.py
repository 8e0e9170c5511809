"""Before step 1: what ranks have in common."""

import pytest
import torch

from unlearn_ds.cluster import distributed, health


def test_facts_name_device_precision_and_versions():
    facts = health.rank_facts(torch.device("cpu"), torch.float32)
    assert facts["torch"] == torch.__version__
    assert facts["dtype"] == "torch.float32"
    health.compare_ranks(facts)  # one rank agrees with itself
    assert health.time_all_reduce(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("versions", "last"),
    [
        (["2.13", "2.13", "2.12"], "rank 2 on host has torch 2.12, the others have 2.13"),
        (["2.13"] * 6 + ["2.12"] * 5, "and 1 more ranks differ in torch"),
        (["2.13"] * 2, None),
    ],
)
def test_ranks_that_differ_are_named(versions, last):
    found = health.differences([("host", {"torch": version}) for version in versions])
    assert (found[-1] if found else None) == last


def test_the_gpu_of_a_rank_is_its_own_or_the_only_one_that_it_sees():
    assert [distributed.gpu_of(local_rank, 4) for local_rank in range(4)] == [0, 1, 2, 3]
    assert distributed.gpu_of(3, 1) == 0
    with pytest.raises(ValueError, match="rank 4 of this machine has no GPU: 4 are visible, start one rank for each"):
        distributed.gpu_of(4, 4)
