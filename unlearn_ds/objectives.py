"""The unlearning methods as data: which sequences, which targets, which sign, which retain term.

Every method minimises, at each optimizer step,

    (1 / B) * sum_i factor_i * mean_t loss_{i,t}        (a term of whole sequences: factor_i * loss_i)

over the B sequences of the step (Yao et al., ACL 2024, arXiv 2402.15159, section 4). A method is therefore a row of the
table below; adding one is adding a row.
"""

from dataclasses import dataclass, replace

CROSS_ENTROPY = "cross_entropy"
KL = "kl"
SEQUENCE = "sequence"  # a function of the sequence's whole NLL, see SequenceLoss
HIDDEN = "hidden"  # of the states of an inner decoder layer, see HiddenLoss

TRUE_TARGETS = "true"  # the next token itself
RANDOM_TARGETS = "random"  # uniform over the vocabulary, fixed per (seed, sequence, position)
SAMPLED_TARGETS = "sampled"  # drawn once from the original model (top-k / top-p, the truth removed or not)
SUBSTITUTE_TARGETS = "substitute"  # the tokens of --substitute_text, over and over

OWN = "own"  # the form of a token loss that stands in a file of the user's

# Sets of the domain with other answers to the questions of forget: what `--pairs_set` is where it is not given.
ALTERNATES = "alternates"  # plausible ones that say something else
REFUSALS = "refusals"


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

    @property
    def numbers(self) -> tuple[str, ...]:
        """The options that are its own."""
        return ("beta", "gamma") if self.per_token else ("beta",)

    @property
    def form(self) -> str:
        """As `kernels/sequence_losses.py` says by name."""
        return "log_sigmoid"

    @property
    def paired(self) -> bool:
        """Whether it is one of two answers to a question."""
        return False


@dataclass(frozen=True)
class PairLoss:
    """Of two answers to one question, l to be forgotten and w preferred to it.

    `-(2 / beta) * log sigmoid(beta * (NLL_l - NLL_w - the same of the original model))` (DPO, arXiv 2305.18290, as arXiv
    2401.06121 and 2409.13474 forget with it); without beta `tanh(P_l) / 2 - tanh(P_w) / 2`, P the mean probability of the
    tokens of an answer (FLAT with total variation, arXiv 2410.11143).
    """

    beta: float | None = None  # default of --beta

    @property
    def needs_reference_nll(self) -> bool:
        """Whether the original model must measure both answers, once, before training."""
        return self.beta is not None

    @property
    def numbers(self) -> tuple[str, ...]:
        """The options that are its own."""
        return () if self.beta is None else ("beta",)

    @property
    def form(self) -> str:
        """As `kernels/sequence_losses.py` says by name."""
        return "tanh" if self.beta is None else "log_sigmoid"

    @property
    def paired(self) -> bool:
        """Whether it is one of two answers to a question."""
        return True


@dataclass(frozen=True)
class TokenLoss:
    """What a token takes in the place of cross-entropy, as `kernels/token_losses.py` or `row_losses.py` says by name."""

    form: str
    beta: float | None = None  # default of --beta, as of the others; None: it has no such number
    beta2: float | None = None
    alpha: float | None = None
    needs_log_q: bool = False  # whether the original model must measure the forget tokens, once, before training

    @property
    def powers(self) -> tuple[float, float, float]:
        """Of p, of 1 - p, and of p and q in `2 p^c / (p^c + q^c)`."""
        if self.needs_log_q:
            return self.alpha or 0.0, self.beta2 or 0.0, self.beta or 0.0
        return self.beta or 0.0, self.beta2 or 0.0, 0.0

    @property
    def numbers(self) -> tuple[str, ...]:
        """The options that are its own."""
        return tuple(name for name in ("beta", "beta2", "alpha") if getattr(self, name) is not None)


@dataclass(frozen=True)
class Divergence:
    """From the original model's prediction: KL of it from ours (`kl`), of ours from it (`reverse_kl`), or Jensen-Shannon's."""

    name: str  # as `kernels/divergences.py` says
    beta: float | None = (
        None  # default of --beta: the original's logit of the true token is taken down by so much first
    )
    lowest_percent: float | None = (
        None  # default of --lowest_percent: only where that token was least likely, at so many of 100 positions
    )

    @property
    def needs_log_q(self) -> bool:
        """Whether the original model must measure the forget tokens, once, before training."""
        return self.lowest_percent is not None

    @property
    def numbers(self) -> tuple[str, ...]:
        """The options that are its own."""
        return tuple(name for name in ("beta", "lowest_percent") if getattr(self, name) is not None)


@dataclass(frozen=True)
class HiddenLoss:
    """What a target token's state h (D,) at the output of a decoder layer takes; of several layers their mean.

    `steer`: `||h - c u||^2 / D`, u a random unit vector; and, h0 being the state in the original model, `stay`:
    `||h - h0||^2 / D`, `turn`: `relu(cos(h, h0))`, `near`: `||h - h0||` (`model/hidden.py`).
    """

    form: str
    steering_coefficient: float | None = None  # default of --steering_coefficient, the c of `steer`
    relative: bool = False  # c counts in mean norms of h0
    depths: tuple[float, ...] = (1 / 4,)  # which layers are meant without --layer, as shares of the model's

    @property
    def compares(self) -> bool:
        """Whether the original model's states are asked for in every step."""
        return self.form != "steer"

    @property
    def numbers(self) -> tuple[str, ...]:
        """The options that are its own."""
        return () if self.steering_coefficient is None else ("steering_coefficient",)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Of a model with so many: those of which a share `depths` is at or below, 7 of 32 for a quarter; counted from 0."""
        return tuple(max(round(depth * num_layers) - 1, 0) for depth in self.depths)


def compares(loss: str, hidden: HiddenLoss | None) -> bool:
    """Whether a term with this loss shows its sequences to the frozen original model in every step."""
    return loss == KL or (hidden is not None and hidden.compares)


@dataclass(frozen=True)
class Term:
    """One sum of an objective: `factor * mean_t loss_t` for each of its sequences."""

    role: str  # "forget" or "retain": which data it reads and under which name it is logged
    loss: str  # CROSS_ENTROPY, KL (to the frozen reference), SEQUENCE or HIDDEN
    factor: float  # sign and weight of one sequence
    targets: str = TRUE_TARGETS  # what cross-entropy is taken against
    sequence: SequenceLoss | PairLoss | None = None  # with SEQUENCE
    token: TokenLoss | None = None  # with CROSS_ENTROPY, on forget: in its place
    divergence: Divergence | None = None  # with KL: another, or from another prediction
    answers: str | None = None  # the set of other answers that it reads, beside forget if paired, else in its place
    hidden: HiddenLoss | None = None  # with HIDDEN
    ramp: tuple[float, float] = (1.0, 1.0)  # what multiplies the factor at the first update and, linearly, at the end

    @property
    def form(self) -> SequenceLoss | PairLoss | TokenLoss | Divergence | HiddenLoss | None:
        return self.sequence or self.token or self.divergence or self.hidden

    @property
    def compares(self) -> bool:
        """Whether the frozen original model takes part in every step."""
        return compares(self.loss, self.hidden)

    @property
    def paired(self) -> bool:
        """Whether it takes two answers to a question together."""
        return self.sequence is not None and self.sequence.paired


@dataclass(frozen=True)
class Objective:
    """A method. The first term sets the length of an epoch; a second one is paired with it, `retain_ratio` to one."""

    terms: tuple[Term, ...]
    summary: str

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen original model takes part in every step."""
        return any(term.compares for term in self.terms)

    @property
    def needs_sampled_targets(self) -> bool:
        """Whether the original model must label the forget set before training."""
        return any(term.targets == SAMPLED_TARGETS for term in self.terms)

    @property
    def needs_substitute_targets(self) -> bool:
        """Whether the forget set is pulled towards a text of the user's."""
        return any(term.targets == SUBSTITUTE_TARGETS for term in self.terms)

    @property
    def is_own(self) -> bool:
        """Whether its loss stands in a file of the user's."""
        return self.token_loss is not None and self.token_loss.form == OWN

    @property
    def sequence_loss(self) -> SequenceLoss | PairLoss | None:
        """The form of the term that takes sequences as wholes, if there is one."""
        return next((term.sequence for term in self.terms if term.loss == SEQUENCE), None)

    @property
    def token_loss(self) -> TokenLoss | None:
        """What stands in the place of cross-entropy, if anything does."""
        return next((term.token for term in self.terms if term.token is not None), None)

    @property
    def answers(self) -> str | None:
        """The set of other answers that it reads where --pairs_set names no other; None: none."""
        return self.terms[0].answers

    @property
    def hidden_loss(self) -> HiddenLoss | None:
        """The first form of what is asked of an inner layer, if anything is."""
        return next((term.hidden for term in self.terms if term.hidden is not None), None)

    @property
    def steers_relatively(self) -> bool:
        """Whether the original model's states of the first update must be measured before training."""
        return any(term.hidden is not None and term.hidden.relative for term in self.terms)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The options that are its own: of `beta`, `beta2`, `alpha`, `gamma`, `lowest_percent`, `steering_coefficient`."""
        form = self.terms[0].form
        return () if form is None else form.numbers

    @property
    def forgets(self) -> bool:
        return "forget" in self.roles

    def with_retain(self, loss: str | None) -> "Objective":
        """The same forget term with another of RETAIN_TERMS; None leaves the method's own."""
        if loss is None:
            return self
        return replace(self, terms=(*(term for term in self.terms if term.role == "forget"), *RETAIN_TERMS[loss]))

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(term.role for term in self.terms)


_ASCENT = Term("forget", CROSS_ENTROPY, -1.0)
_DESCENT = Term("retain", CROSS_ENTROPY, +1.0)
_STAY = Term("retain", HIDDEN, +1.0, hidden=HiddenLoss("stay"))
_TWO_THIRDS = (1 / 3, 2 / 3)
RETAIN_TERMS: dict[str, tuple[Term, ...]] = {  # by --retain_loss
    "none": (),
    "cross_entropy": (_DESCENT,),
    "kl": (Term("retain", KL, +1.0),),
    "reverse_kl": (Term("retain", KL, +1.0, divergence=Divergence("reverse_kl")),),
    "jsd": (Term("retain", KL, +1.0, divergence=Divergence("jsd")),),
    "hidden": (_STAY,),
}
_NPO = Term("forget", SEQUENCE, +1.0, sequence=SequenceLoss(beta=0.1, per_token=False))
_SIMNPO = Term("forget", SEQUENCE, +1.0, sequence=SequenceLoss(beta=4.5, per_token=True))
_DPO = Term("forget", SEQUENCE, +1.0, sequence=PairLoss(beta=0.1), answers=ALTERNATES)

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
    "wga": Objective(
        (Term("forget", CROSS_ENTROPY, -1.0, token=TokenLoss("power", beta=1.0)),),
        "ascent, each token weighted by its probability to the power beta",
    ),
    "satimp": Objective(
        (Term("forget", CROSS_ENTROPY, -1.0, token=TokenLoss("power", beta=5.0, beta2=1.0)),),
        "ascent, each token weighted by p^beta (1 - p)^beta2: what is known, but not beyond doubt",
    ),
    "tnpo": Objective(
        (Term("forget", CROSS_ENTROPY, -1.0, token=TokenLoss("power", beta=4.0, needs_log_q=True)),),
        "npo for each token: ascent, the less the further its probability is below the original model's",
    ),
    "wtnpo": Objective(
        (Term("forget", CROSS_ENTROPY, -1.0, token=TokenLoss("power", beta=4.0, alpha=1.5, needs_log_q=True)),),
        "tnpo, each token weighted by its probability to the power alpha as well",
    ),
    "unlikelihood": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, token=TokenLoss("unlikelihood")),), "lower -log(1 - p) of the forget set"
    ),
    "ce_u": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, token=TokenLoss("complement")),),
        "fit the forget set to the model's own prediction without the true token",
    ),
    "unilogit": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, token=TokenLoss("uniform_target")),),
        "fit the forget set to the model's own prediction with the true token at 1 / vocabulary",
    ),
    "jensun": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, SUBSTITUTE_TARGETS, token=TokenLoss("one_hot_jsd")),),
        "pull the forget set towards the tokens of --substitute_text by the Jensen-Shannon divergence, which is bounded",
    ),
    "undial": Objective(
        (Term("forget", KL, +1.0, divergence=Divergence("kl", beta=10.0)),),
        "fit the forget set to the original model's prediction with the true token's logit taken down by beta",
    ),
    "shred": Objective(
        (Term("forget", KL, +1.0, divergence=Divergence("kl", beta=10.0, lowest_percent=20.0)),),
        "undial at the positions that the original model found least likely, close to it at all others: no retain set",
    ),
    "max_entropy": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, token=TokenLoss("uniform_kl")),),
        "pull the forget set towards a uniform prediction",
    ),
    "inverted_hinge": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, token=TokenLoss("inverted_hinge")),),
        "lower the true token's probability beneath the likeliest other's, whose own rises: bounded",
    ),
    "pdu": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, token=TokenLoss("flat_logits")),),
        "flatten the logits of the forget set, made for --retain_target",
    ),
    "own": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, token=TokenLoss(OWN)),), "a loss of your own, --objective FILE.py:NAME"
    ),
    "dpo": Objective(
        (_DPO,), "prefer another answer to the one to forget, the less the further the original model's choice is left"
    ),
    "idk_dpo": Objective((replace(_DPO, answers=REFUSALS),), "dpo, the answer that is preferred being a refusal"),
    "alt_po": Objective(
        (_DPO,), "dpo, the answers that are preferred being plausible and wrong ones: several a question"
    ),
    "flat": Objective(
        (replace(_DPO, sequence=PairLoss(), answers=REFUSALS),),
        "lower the probability of the answer to forget and raise that of another, both by bounded amounts (total variation)",
    ),
    "idk": Objective(
        (Term("forget", CROSS_ENTROPY, +1.0, answers=REFUSALS),), "fit the questions of forget to refusals"
    ),
    "rmu": Objective(
        (Term("forget", HIDDEN, +1.0, hidden=HiddenLoss("steer", steering_coefficient=2.0)), _STAY),
        "steer forget states of an inner layer to a random vector, keep those of retain",
    ),
    "adaptive_rmu": Objective(
        (Term("forget", HIDDEN, +1.0, hidden=HiddenLoss("steer", steering_coefficient=5.0, relative=True)), _STAY),
        "rmu, the length of the vector in mean norms of the original model's states",
    ),
    "circuit_breakers": Objective(
        (
            Term("forget", HIDDEN, +1.0, hidden=HiddenLoss("turn", depths=_TWO_THIRDS), ramp=(1.0, 0.5)),
            Term("retain", HIDDEN, +1.0, hidden=HiddenLoss("near", depths=_TWO_THIRDS), ramp=(0.0, 0.5)),
        ),
        "turn forget states of inner layers away from the original model's, keep those of retain more and more",
    ),
    "finetune": Objective((_DESCENT,), "go on training the target model on retain"),
    "retrain": Objective((_DESCENT,), "train --model_name_or_path on retain"),
}
