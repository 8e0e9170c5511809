"""The unlearning methods as data: which sequences, which targets, which sign, which retain term.

Every method minimises, at each optimizer step,

    (1 / B) * sum_i factor_i * mean_t loss_{i,t}        (a term of whole sequences: factor_i * loss_i)

over the B sequences of the step (Yao et al., ACL 2024, arXiv 2402.15159, section 4). A method is therefore a row of the
table below; adding one is adding a row.
"""

from dataclasses import dataclass

CROSS_ENTROPY = "cross_entropy"
KL = "kl"
SEQUENCE = "sequence"  # a function of the sequence's whole NLL, see SequenceLoss

TRUE_TARGETS = "true"  # the next token itself
RANDOM_TARGETS = "random"  # uniform over the vocabulary, fixed per (seed, sequence, position)
SAMPLED_TARGETS = "sampled"  # drawn once from the original model (top-k / top-p, the truth removed or not)


@dataclass(frozen=True)
class SequenceLoss:
    """`-(2 / beta) * log sigmoid(beta * (NLL_i - NLL_i of the original model))` (NPO, arXiv 2404.05868), or, per token and
    without a reference, `-(2 / beta) * log sigmoid(beta * NLL_i / length_i - gamma)` (SimNPO, arXiv 2410.07163).
    """

    beta: float  # default of --beta
    per_token: bool
    gamma: float = 0.0  # default of --gamma; of the per-token form

    @property
    def needs_reference_nll(self) -> bool:
        """Whether the original model must measure the forget set, once, before training."""
        return not self.per_token


@dataclass(frozen=True)
class Term:
    """One sum of an objective: `factor * mean_t loss_t` for each of its sequences."""

    role: str  # "forget" or "retain": which data it reads and under which name it is logged
    loss: str  # CROSS_ENTROPY, KL (to the frozen reference) or SEQUENCE
    factor: float  # sign and weight of one sequence
    targets: str = TRUE_TARGETS  # what cross-entropy is taken against
    sequence: SequenceLoss | None = None  # with SEQUENCE


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
    def sequence_loss(self) -> SequenceLoss | None:
        """The form of the term that takes sequences as wholes, if there is one."""
        return next((term.sequence for term in self.terms if term.loss == SEQUENCE), None)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(term.role for term in self.terms)


_ASCENT = Term("forget", CROSS_ENTROPY, -1.0)
_DESCENT = Term("retain", CROSS_ENTROPY, +1.0)
_NPO = Term("forget", SEQUENCE, +1.0, sequence=SequenceLoss(beta=0.1, per_token=False))
_SIMNPO = Term("forget", SEQUENCE, +1.0, sequence=SequenceLoss(beta=4.5, per_token=True))

OBJECTIVES = {
    "gradient_ascent": Objective((_ASCENT,), "raise the loss of the forget set"),
    "random_label": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, RANDOM_TARGETS),), "fit the forget set to labels drawn at random"
    ),
    "adversarial": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, SAMPLED_TARGETS),),
        "fit the forget set to the original model's own best wrong guesses",
    ),
    "ascent_plus_descent": Objective((_ASCENT, _DESCENT), "raise the loss of forget, lower that of retain"),
    "ascent_plus_kl_divergence": Objective(
        (_ASCENT, Term("retain", KL, +1.0)), "raise the loss of forget, stay close to the original model on retain"
    ),
    "npo": Objective(
        (_NPO,), "raise the loss of the forget set above the original model's, the less the further it is"
    ),
    "npo_plus_descent": Objective((_NPO, _DESCENT), "npo on forget, lower the loss of retain"),
    "simnpo": Objective((_SIMNPO,), "raise the loss per token of the forget set, the less the higher it is"),
    "simnpo_plus_descent": Objective((_SIMNPO, _DESCENT), "simnpo on forget, lower the loss of retain"),
    "finetune": Objective((_DESCENT,), "go on training the target model on retain"),
    "retrain": Objective((_DESCENT,), "train --model_name_or_path on retain"),
}
