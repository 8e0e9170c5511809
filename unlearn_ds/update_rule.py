"""How the gradient of an update is made: all of it at once, or its terms apart, some of them from moved weights.

A rule is a tuple of passes over the sequences of an update. The plan lays out the rows of each (`data/plan.py`), the loop goes
through them (`run/update.py`), and what stands under `then` is done to the partitions of ZeRO-3 (`engine/shards.py`).
"""

from dataclasses import dataclass

SHIFT, BACK, SET_ASIDE, RECTIFY = "shift", "back", "set_aside", "rectify"  # methods of `engine.shards.Shards`
ALONE, WITH_RETAIN = "alone", "with_retain"  # values of --gru: what the optimizer gets


@dataclass(frozen=True)
class Pass:
    """A forward and backward over those sequences of an update that have one of `roles`; gradients add up until `then`."""

    roles: tuple[str, ...]
    then: tuple[str, ...] = ()
    counted: bool = True  # False: the same sequences were seen before, and the losses of that pass are the update's


@dataclass(frozen=True)
class UpdateRule:
    """SAM for forgetting (arXiv 2502.05374) and GRU (arXiv 2503.09117), each alone or both; neither: the plain gradient.

    With f the gradient of the forget term and r that of the retain term at the weights w:

    SAM: f is taken at `w + sam_rho f / ||f||` in the place of w, r stays.
    GRU: where `<f, r> < 0`, `f <- f - <f, r> / <r, r> r`; the optimizer gets f (`alone`) or f + r (`with_retain`).
    """

    sam_rho: float | None = None
    gru: str | None = None

    @property
    def passes(self) -> tuple[Pass, ...]:
        """In the order in which they run; one without sequences, as without a retain term, has nothing to run."""
        if self == PLAIN:
            return (Pass(("forget", "retain")),)
        forgotten = (SET_ASIDE,) if self.gru else ()
        moved = (Pass(("forget",), (SHIFT,)), Pass(("forget",), (BACK, *forgotten), counted=False))
        here = (Pass(("forget",), forgotten),)
        return (*(moved if self.sam_rho else here), Pass(("retain",), (RECTIFY,) if self.gru else ()))


PLAIN = UpdateRule()
