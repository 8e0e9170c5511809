"""Sign updates: every weight moves by the learning rate, and the gradient only says which way (signSGD, arXiv 1802.04434).

Against relearning and rounding they are reported to end in flatter minima than AdamW (arXiv 2510.00761).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SignUpdate(torch.optim.Optimizer):
    """`w <- (1 - lr decay) w - lr sign(d)`; a weight whose d is 0 moves by its decay alone.

    beta 0: d is the gradient (signSGD), and there is no state. Else d is `m <- beta m + (1 - beta) g`, Adam's first moment:
    its bias correction and its denominator are above 0, so that the sign of Adam's direction is the sign of m, and a second
    moment need not be kept.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, beta: float) -> None:
        super().__init__(groups, {"lr": lr, "beta": beta, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """The gradients are used up: they are DeepSpeed's copies of its own."""
        assert closure is None, "ZeRO has no closures"
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self._step_on(weights, weights.grad, **{key: group[key] for key in ("lr", "beta", "weight_decay")})

    def _step_on(self, weights: Tensor, gradient: Tensor, lr: float, beta: float, weight_decay: float) -> None:
        state = self.state[weights]
        if beta:
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(weights)
            gradient.copy_(state["exp_avg"].lerp_(gradient, 1 - beta))
        state["step"] = state.get("step", torch.zeros((), device="cpu")) + 1
        # DeepSpeed 0.19.8 takes a checkpoint to another number of ranks by these names alone. One number stands for all.
        for name in ("exp_avg_sq",) if beta else ("exp_avg", "exp_avg_sq"):
            state[name] = weights.new_zeros(1).expand(weights.shape)
        weights.mul_(1 - lr * weight_decay).add_(gradient.sign_(), alpha=-lr)
