"""The unlearning methods as data: which sequences, which targets, which sign, which retain term.

Every method minimises, at each optimizer step,

    (1 / B) * sum_i factor_i * mean_t loss_{i,t}

over the B sequences of the step (Yao et al., ACL 2024, arXiv 2402.15159, section 4). A method is therefore a row of the
table below; adding one is adding a row.
"""

from dataclasses import dataclass

CROSS_ENTROPY = "cross_entropy"
KL = "kl"

TRUE_TARGETS = "true"  # the next token itself
RANDOM_TARGETS = "random"  # uniform over the vocabulary, fixed per (seed, sequence, position)
SAMPLED_TARGETS = "sampled"  # drawn once from the original model (top-k / top-p, the truth removed or not)


@dataclass(frozen=True)
class Term:
    """One sum of an objective: `factor * mean_t loss_t` for each of its sequences."""

    role: str  # "forget" or "retain": which data it reads and under which name it is logged
    loss: str  # CROSS_ENTROPY or KL (to the frozen reference)
    factor: float  # sign and weight of one sequence
    targets: str = TRUE_TARGETS  # what cross-entropy is taken against


@dataclass(frozen=True)
class Objective:
    """A method. The first term sets the length of an epoch; a second one is paired with it, `retain_ratio` to one."""

    terms: tuple[Term, ...]
    summary: str

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen original model takes part in every step."""
        return any(term.loss == KL for term in self.terms)

    @property
    def needs_sampled_targets(self) -> bool:
        """Whether the original model must label the forget set before training."""
        return any(term.targets == SAMPLED_TARGETS for term in self.terms)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(term.role for term in self.terms)


_ASCENT = Term("forget", CROSS_ENTROPY, -1.0)

OBJECTIVES = {
    "gradient_ascent": Objective((_ASCENT,), "raise the loss of the forget set"),
    "random_label": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, RANDOM_TARGETS),), "fit the forget set to labels drawn at random"
    ),
    "adversarial": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, SAMPLED_TARGETS),),
        "fit the forget set to the original model's own best wrong guesses",
    ),
    "ascent_plus_descent": Objective(
        (_ASCENT, Term("retain", CROSS_ENTROPY, +1.0)), "raise the loss of forget, lower that of retain"
    ),
    "ascent_plus_kl_divergence": Objective(
        (_ASCENT, Term("retain", KL, +1.0)), "raise the loss of forget, stay close to the original model on retain"
    ),
    "finetune": Objective((Term("retain", CROSS_ENTROPY, +1.0),), "go on training the target model on retain"),
    "retrain": Objective((Term("retain", CROSS_ENTROPY, +1.0),), "train --model_name_or_path on retain"),
}
