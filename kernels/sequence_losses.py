"""What the loss of a sequence, or of a pair of sequences, is a function of, and that function; each with its derivative.

Legend: M rows, S sequences or pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_SIGMOID = "log_sigmoid"  # -(2/beta) log sigmoid(beta (scale x - shift)), x the summed NLL
TANH = "tanh"  # (1/2) tanh(beta (scale x - shift)), x the summed probability of the targets
SEQUENCE_FORMS = (LOG_SIGMOID, TANH)


def summands(
    form: str,
    nll: Tensor,  # (M,)
    counted: Tensor,  # (M,) bool: the others add nothing
    signs: Tensor | None,  # (M,) +1 or -1; None: +1 throughout
) -> tuple[Tensor, Tensor | None]:  # (M,) each
    """What each row adds to x, and the derivative of that by the row's NLL; None: 1 throughout."""
    if form == LOG_SIGMOID:
        return nll if signs is None else nll * signs, signs
    p = torch.where(counted, (-nll).exp(), 0)
    p = p if signs is None else p * signs
    return p, -p


def sequence_losses(
    form: str,
    x: Tensor,  # (S,) fp64, summed over each sequence
    scale: Tensor,  # (S,)
    shift: Tensor,  # (S,)
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The losses and their derivatives by x, both (S,) fp64."""
    margin = beta * (scale.double() * x - shift.double())
    if form == LOG_SIGMOID:
        return -2 / beta * F.logsigmoid(margin), -2 * scale.double() * torch.sigmoid(-margin)
    bent = torch.tanh(margin)
    return bent / 2, beta / 2 * scale.double() * (1 - bent.square())
