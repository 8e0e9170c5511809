"""What counts as forgotten and as kept: options of every command that gives a verdict."""

from dataclasses import dataclass

from unlearn_ds.options import OptionError


@dataclass(frozen=True)
class Thresholds:
    """What counts as forgotten and as kept."""

    ppl_tolerance: float = 0.25
    """forgotten: forget perplexity between the yardstick's / (1 + this) and the yardstick's x (1 + this)"""
    auc_tolerance: float = 0.1
    """forgotten: AUC of the Min-40% attack within this of the yardstick's"""
    max_ppl_increase: float = 0.1
    """kept: perplexity on retain, and on general, at most x (1 + this) that of the worse of original and retrained"""

    def __post_init__(self) -> None:
        for name, value in self.limits().items():
            if not value > 0:
                raise OptionError(f"--{name} {value}: must be above 0")

    def limits(self) -> dict[str, float]:
        """The thresholds alone, also of a class that adds options of its own."""
        return {name: getattr(self, name) for name in Thresholds.__dataclass_fields__}
