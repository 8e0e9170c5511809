"""The only calls to `deepspeed.initialize`: a training engine and a frozen one.

The engine's contract with the rest: one `micro_step` is one forward and one backward through the same graph on every rank;
one `update` is any number of them, then one optimizer step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import get_scheduler

from unlearn_ds.config import RunConfig
from unlearn_ds.engine.shards import Shards
from unlearn_ds.engine.sign import SignUpdate
from unlearn_ds.engine.tf32 import EXACT, fp32_products, keep_rotary_exact, training_precision
from unlearn_ds.marks import BACKWARD, FORWARD, OPTIMIZER
from unlearn_ds.model.fixed_tensors import fixed_tensors_kept
from unlearn_ds.model.loss_head import HeadCall, PackedCausalLM
from unlearn_ds.update_rule import UpdateRule


@dataclass(frozen=True)
class UpdateResult:
    """What one optimizer step did."""

    applied: bool  # False: a gradient was not finite, nothing changed
    grad_norm: float  # before clipping; NaN when not applied


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into matrices, which decay, and vectors (biases, norms), which do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def dimensions(parameter: nn.Parameter) -> int:
        return len(getattr(parameter, "ds_shape", parameter.shape))

    decayed = [p for p in trainable if dimensions(p) >= 2]
    rest = [p for p in trainable if dimensions(p) < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(config: RunConfig, model: nn.Module, offloaded: bool) -> torch.optim.Optimizer:
    """AdamW (torch's fused one, or DeepSpeed's CPU one when the optimizer state is offloaded), or a sign update."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optim != "adamw":
        return SignUpdate(
            groups, lr=config.learning_rate, beta=config.adam_beta1 if config.optim == "sign_adam" else 0.0
        )
    options = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        full = config.optimizer_states == "fp32"
        return DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=full, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def moments(optim: str) -> int:
    """How many numbers --optim keeps of a parameter, beside the parameter itself."""
    return {"adamw": 2, "sign_adam": 1, "sign_sgd": 0}[optim]


def warmup_steps(config: RunConfig, num_steps: int) -> int:
    """Updates of warm-up, as transformers counts them: ceil(ratio * updates)."""
    return config.warmup_steps or -int(-(config.warmup_ratio * num_steps) // 1)


def changes_nothing(config: RunConfig, num_steps: int) -> bool:
    """Whether no update has a learning rate: the first one of transformers' warm-up has 0, and it may be the only one."""
    return num_steps == 1 and warmup_steps(config, num_steps) > 0 and config.lr_scheduler_type != "constant"


class TrainingEngine:
    """A causal LM under ZeRO with its optimizer and schedule."""

    def __init__(self, model: PackedCausalLM, config: RunConfig, ds_config: dict[str, Any], num_steps: int) -> None:
        offloaded = "offload_optimizer" in ds_config["zero_optimization"]

        def scheduler(optimizer: torch.optim.Optimizer) -> Any:
            return get_scheduler(
                config.lr_scheduler_type,
                optimizer,
                num_warmup_steps=warmup_steps(config, num_steps),
                num_training_steps=num_steps,
            )

        with fixed_tensors_kept(model):
            self.engine, _, _, self.scheduler = deepspeed.initialize(
                model=model,
                optimizer=make_optimizer(config, model, offloaded),
                lr_scheduler=scheduler,
                config=ds_config,
            )
        self.world_size = dist.get_world_size()
        self.device = self.engine.device
        self.notes: dict[str, Tensor] = {}  # what the rule of the last update has to tell, on the device
        self._precision = training_precision(config.tf32, next(model.parameters()).dtype)
        if self._precision != EXACT:
            keep_rotary_exact(model)

    @property
    def learning_rate(self) -> float:
        """The rate that the next update uses."""
        return float(self.scheduler.get_last_lr()[0])

    def micro_step(self, rows: Any, call: HeadCall) -> tuple[Tensor, ...]:
        """One forward and backward; returns the head's answer, detached and still on the device."""
        with fp32_products(self._precision):
            with record_function(FORWARD):
                answer = self.engine(rows, call)
            with record_function(BACKWARD):
                # DeepSpeed averages gradients over ranks; the weights in the call already sum over the whole step.
                self.engine.backward(answer[0] * self.world_size, scale_wrt_gas=False)
        return tuple(tensor.detach() for tensor in answer)

    def shards(self, rule: UpdateRule) -> Shards:
        """What puts the gradient of an update together; not needed by the plain rule."""
        return Shards(self.engine.optimizer, rule)

    def update(self) -> UpdateResult:
        """Step the optimizer and the schedule on the gradients accumulated since the last call."""
        with record_function(OPTIMIZER):
            self.engine.step()
        applied = self.engine.was_step_applied()
        norm = self.engine.get_global_grad_norm()
        self._clear_gradients()
        return UpdateResult(applied, float(norm) if applied and norm is not None else float("nan"))

    def _clear_gradients(self) -> None:
        """A parameter that the next step does not touch must not be updated with this step's gradient.

        DeepSpeed 0.19.8 never zeroes the flat buffer of ZeRO-3; it overwrites what it reduces and leaves the rest.
        """
        buffer = getattr(self.engine.optimizer, "grad_partitions_flat_buffer", None)
        if buffer is not None:
            buffer.zero_()

    def at_rest(self) -> None:
        """Give back what was fetched ahead for a forward that does not come; parameters can be gathered from then on.

        DeepSpeed 0.19.8 refuses to gather or to partition a parameter that is still in flight.
        """
        if hasattr(self.engine.optimizer, "empty_partition_cache"):
            self.engine.optimizer.empty_partition_cache()

    @torch.no_grad()
    def ask(
        self, rows: Any, call: HeadCall | None = None, pick: Tensor | None = None, layers: tuple[int, ...] = ()
    ) -> Any:
        """Forward only, between steps: statistics, samples, the model's own logits, or hidden states at `pick`: the final ones,
        or those of decoder `layers`."""
        was_training = self.engine.module.training
        self.engine.eval()
        answer = self.engine(rows, call, pick, layers)
        if pick is not None:  # the head was fetched ahead and not used
            self.at_rest()
        self.engine.train(was_training)
        return answer


class FrozenEngine:
    """A causal LM under the same sharding, without gradients or optimizer."""

    def __init__(self, model: PackedCausalLM, ds_config: dict[str, Any]) -> None:
        model.requires_grad_(False)
        model.eval()
        with fixed_tensors_kept(model):
            self.engine = deepspeed.initialize(model=model, config=ds_config)[0]
        self.engine.eval()
        self.device = self.engine.device

    @torch.no_grad()
    def ask(self, rows: Any, call: HeadCall | None = None) -> Any:
        """Statistics, samples, or the model's own logits."""
        return self.engine(rows, call)

    @torch.no_grad()
    def hidden_states(self, rows: Any, pick: Tensor, layers: tuple[int, ...] = ()) -> Tensor:
        """Hidden states (len(pick), D) of the positions `pick`: the final ones, or side by side those of decoder `layers`."""
        return self.engine(rows, None, pick, layers)

    @property
    def head(self) -> nn.Module:
        return self.engine.module.head


Ask = Callable[..., Any]
