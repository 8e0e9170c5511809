"""What a run will take, before it is started: `unlearn-ds plan run.yaml --nodes 16 --gpus_per_node 8 --gpu h100`.

Reads the run's options, the model's config and the prepared corpora; loads no weights and needs no GPU. Says per GPU what takes
how much memory and whether it fits, what would make it fit, what goes over the network, and time and GPU-hours by nodes.
The times are estimates from published rates and stated efficiencies.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from unlearn_ds.caches import explained
from unlearn_ds.cluster.distributed import choose_accelerator
from unlearn_ds.config import RunConfig
from unlearn_ds.cost import estimate as cost
from unlearn_ds.durable import replacing
from unlearn_ds.markup import tell
from unlearn_ds.options import AUTO, OptionError, check_choices, parse, with_flag_of_first


@dataclass(frozen=True)
class PlanConfig:
    """The options of `unlearn-ds plan`."""

    run: str
    """YAML file with the options of `unlearn-ds train`; may stand first, without its flag"""
    nodes: int = 1
    """nodes of the run"""
    gpus_per_node: int = 8
    """GPUs, and so ranks, of a node"""
    gpu: Literal["h100", "h200", "a100", "a100_40"] = "h100"
    """kind of GPU"""
    compute_efficiency: float = cost.Rates.compute
    """share of the GPU's published FLOP/s that a training step reaches"""
    link_efficiency: float = cost.Rates.link
    """share of the published rate of the links inside a node"""
    network_gb_per_s: float | None = None
    """network of a GPU, in GB/s one way (default: one 400 Gb/s card a GPU for h100 and h200, 200 Gb/s for a100)"""
    network_efficiency: float = cost.Rates.network
    """share of that rate"""
    json: str | None = None
    """also write everything to this file"""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("nodes", "gpus_per_node", "compute_efficiency", "link_efficiency", "network_efficiency"):
            if getattr(self, name) <= 0:
                raise OptionError(f"--{name} {getattr(self, name)}: must be above 0")
        if self.network_gb_per_s is not None and self.network_gb_per_s <= 0:
            raise OptionError(f"--network_gb_per_s {self.network_gb_per_s}: must be above 0")

    @property
    def card(self) -> cost.Gpu:
        published = cost.GPUS[self.gpu]
        if self.network_gb_per_s is None:
            return published
        return dataclasses.replace(published, network=self.network_gb_per_s * 1e9)

    @property
    def rates(self) -> cost.Rates:
        return cost.Rates(self.compute_efficiency, self.link_efficiency, self.network_efficiency)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = with_flag_of_first(sys.argv[1:] if argv is None else argv, "--run")
    try:
        choose_accelerator(os.environ)
        config = parse(PlanConfig, words, "unlearn-ds plan", __doc__)
        report = plan_run(config, parse(RunConfig, ["--config", config.run], "unlearn-ds plan"))
        print(as_text(config, report))
        if config.json:
            with replacing(Path(config.json)) as partial:
                partial.write_text(json.dumps(report, indent=1), encoding="utf-8")
    except (ValueError, OSError) as error:
        tell(f"unlearn-ds plan: error: {explained(error)}")
        return 2
    return 0


class Estimator:
    """A run's model, data and options, ready to be costed at any number of nodes and with other options."""

    def __init__(self, config: PlanConfig, run: RunConfig) -> None:
        from unlearn_ds.cost.fit import Uncountable, model_facts, with_activations
        from unlearn_ds.cost.flops import run_flops
        from unlearn_ds.data.plan import last_layer
        from unlearn_ds.data.sources import make_sources, open_run_corpora, with_layers
        from unlearn_ds.engine.ds_config import load_for
        from unlearn_ds.methods import hidden_layers
        from unlearn_ds.model.blank import blank_model
        from unlearn_ds.model.configs import ModelOptions, load_config
        from unlearn_ds.model.layers import decoder_layers, num_elements
        from unlearn_ds.model.size import size_of
        from unlearn_ds.model.trained import trained_by

        if run.bf16 == AUTO:
            run = dataclasses.replace(run, bf16=True)  # every kind of GPU that is known here computes in it
        self.config, self.run = config, run
        options = ModelOptions(run.start_model, run.bf16, run.attn, run.random_init, run.trust_remote_code, run.loading)
        model_config = load_config(options)
        trusted = {"trust_remote_code": run.trust_remote_code}
        blank = blank_model(model_config, **trusted)
        self.size = size_of(blank)
        corpora = open_run_corpora(run, model_config.vocab_size, None)
        layers = hidden_layers(run, len(decoder_layers(blank)))
        self.sources = with_layers(make_sources(run, corpora, model_config.vocab_size, ()), layers)
        self.last = last_layer(self.sources)
        trained = trained_by(run, model_config, self.last, **trusted)
        self.model = with_activations(run, model_facts(self.size, num_elements(blank), trained), model_config)
        self.flops = run_flops(run, model_config, trained, self.last)
        if self.flops is None:
            raise Uncountable(f"{run.start_model}: its matrix products cannot be counted, so no time can be estimated")
        self.ds_file = load_for(run)

    def setting(self, nodes: int, run: RunConfig, ds_file: dict[str, Any]) -> cost.Setting:
        """What memory depends on, on that many nodes."""
        from unlearn_ds.cost.fit import setting_of

        per_node = self.config.gpus_per_node
        return setting_of(run, ds_file, self.size, nodes * per_node, per_node, self.last)

    def memory(self, nodes: int, **changes: Any) -> dict[str, float]:
        """Component -> bytes on a GPU, with some of the run's options changed."""
        ds_file = changes.pop("ds_file", self.ds_file)
        run = self.settled(nodes, dataclasses.replace(self.run, **changes), ds_file)
        setting = self.setting(nodes, run, ds_file)
        return cost.memory(self.model, setting, run.per_device_train_batch_size, run.activation_checkpointing)

    def settled(self, nodes: int, run: RunConfig, ds_file: dict[str, Any]) -> RunConfig:
        """The options with what a run on that many nodes would put in the place of `auto`."""
        from unlearn_ds.cost.fit import asked_to_choose, choose_values, update_rows
        from unlearn_ds.data.sources import make_plan

        if not asked_to_choose(run):
            return run
        setting = self.setting(nodes, run, ds_file)
        rows_of_updates = update_rows(make_plan(run, self.sources, setting.world_size))
        free = self.config.card.memory - cost.OTHER_BYTES
        values, _ = choose_values(run, self.model, setting, rows_of_updates, free, "cuda")
        return dataclasses.replace(run, **values)

    def fits(self, parts: dict[str, float]) -> bool:
        return sum(parts.values()) <= self.config.card.memory

    def at(self, nodes: int) -> dict[str, Any]:
        """Everything about the run on that many nodes."""
        from unlearn_ds.data.sources import make_plan

        per_node, card, rates = self.config.gpus_per_node, self.config.card, self.config.rates
        world = nodes * per_node
        run = self.settled(nodes, self.run, self.ds_file)
        setting = self.setting(nodes, run, self.ds_file)
        plan = make_plan(run, self.sources, world)
        work = cost.average_work(plan, self.flops)
        parts = self.memory(nodes)
        reference = run.method.needs_reference and run.reference == "live"
        sent = cost.traffic(
            self.model, setting.zero, bf16=run.bf16, reference=reference, nodes=nodes, per_node=per_node
        )
        if not reference:
            work = dataclasses.replace(work, reference_flops=0.0)
        time = cost.step_time(
            self.model,
            work,
            sent,
            card,
            rates,
            nodes=nodes,
            per_node=per_node,
            checkpointing=run.activation_checkpointing,
            bf16=run.bf16,
            state_width=2 if setting.small_states else 4,
            moments=setting.moments,
        )
        hours = plan.num_steps * time.total / 3600
        return {
            "nodes": nodes,
            "ranks": world,
            "checkpointing": run.activation_checkpointing,
            "rows": run.per_device_train_batch_size,
            "memory_bytes": parts,
            "memory_total_bytes": sum(parts.values()),
            "fits": self.fits(parts),
            "updates": plan.num_steps,
            "sequences_per_update": plan.global_batch_size,
            "micro_steps": work.micro_steps,
            "received_bytes_per_update": work.micro_steps * (sent.gather + sent.gather_in_node + sent.reduce)
            + sent.once,
            "seconds": asdict(time),
            "hours": hours,
            "gpu_hours": hours * world,
            "tokens_per_s": float(plan.step(0).num_tokens / time.total),
            "checkpoint_bytes": (1 + setting.moments)
            * (2 if setting.small_states else 4)
            * self.model.trainable,  # master weights and moments
        }


def plan_run(config: PlanConfig, run: RunConfig) -> dict[str, Any]:
    """Cost a run: what report.json of `--json` holds. Raises `ValueError` for a model or data that cannot be read."""
    estimator = Estimator(config, run)
    counts = [2**i for i in range(config.nodes.bit_length()) if 2**i < config.nodes]
    curve = [estimator.at(nodes) for nodes in [*counts, config.nodes, 2 * config.nodes]]
    here = next(point for point in curve if point["nodes"] == config.nodes)
    return {
        "run": asdict(run),
        "gpu": asdict(config.card) | {"name": config.gpu},
        "rates": asdict(config.rates),
        "parameters": estimator.model.parameters,
        "trainable": estimator.model.trainable,
        "checkpointing": here["checkpointing"],
        "rows": here["rows"],
        "here": here,
        "curve": curve,
        "advice": [] if here["fits"] else advice(estimator, config.nodes),
    }


def advice(estimator: Estimator, nodes: int) -> list[str]:
    """Changes that each make the run fit, from the cheapest in speed on; or what together comes closest."""
    from unlearn_ds.engine.ds_config import load_for

    run = estimator.run
    changes: list[tuple[str, dict[str, Any]]] = []
    if run.method.needs_reference and run.reference == "live":
        changes.append(("--reference cache", {"reference": "cache"}))
    if run.loss_workspace_mib == AUTO or run.loss_workspace_mib > 256:
        changes.append(("--loss_workspace_mib 256", {"loss_workspace_mib": 256.0}))
    changes += [
        (f"--activation_checkpointing {choice}", {"activation_checkpointing": choice})
        for choice in ("full", "offloaded")
        if run.activation_checkpointing not in (choice, "auto")
    ]
    if run.per_device_train_batch_size not in (1, "auto"):
        changes.append(("--per_device_train_batch_size 1", {"per_device_train_batch_size": 1}))
    without = len(changes)
    with suppress(OptionError):  # not every optimizer, or rule of updates, goes with it
        offloaded = load_for(dataclasses.replace(run, deepspeed="zero3_offload"))
        changes.append(("--deepspeed zero3_offload", {"ds_file": offloaded}))
    found = [words for words, change in changes if estimator.fits(estimator.memory(nodes, **change))]
    together: dict[str, Any] = {}
    named: dict[str, str] = {}
    for words, change in changes[:without]:
        together |= change
        named[words.split()[0]] = words
        if not found and estimator.fits(estimator.memory(nodes, **together)):
            found.append(" ".join(named.values()))
            break
    more = next((n for n in (nodes * 2**i for i in range(1, 8)) if estimator.fits(estimator.memory(n))), None)
    if more:
        found.append(f"{more} nodes")
    return found or ["nothing tried fits: a smaller model, shorter --seq_len, or --lora_r 16"]


def as_text(config: PlanConfig, report: dict[str, Any]) -> str:
    """The report for a terminal."""
    here, card, rates = report["here"], config.card, config.rates
    room = card.memory
    lines = [
        f"{report['parameters']:,} parameters, {report['trainable']:,} trained; {config.nodes} node(s) x "
        f"{config.gpus_per_node} {config.gpu}; activation checkpointing: {report['checkpointing']}, "
        f"{report['rows']} row(s) a micro-step",
        "",
        f"memory of a GPU, of {room / cost.GIB:.1f} GiB",
    ]
    for name, size in sorted(here["memory_bytes"].items(), key=lambda item: -item[1]):
        lines.append(f"  {name:<32}{size / cost.GIB:9.2f} GiB {size / room:6.1%}")
    verdict = "fits" if here["fits"] else "DOES NOT FIT"
    lines.append(f"  {'total':<32}{here['memory_total_bytes'] / cost.GIB:9.2f} GiB {verdict}")
    if report["advice"]:
        lines += ["", "any of these makes it fit:", *(f"  {words}" for words in report["advice"])]
    seconds = here["seconds"]
    lines += [
        "",
        f"an update: {here['sequences_per_update']} sequences in {here['micro_steps']:.1f} micro-steps; a GPU receives "
        f"{here['received_bytes_per_update'] / cost.GIB:.1f} GiB",
        f"  arithmetic {seconds['compute']:.3f} s, communication {seconds['communication']:.3f} s, optimizer "
        f"{seconds['optimizer']:.3f} s; together {seconds['total']:.3f} s where the shorter of the first two hides",
        f"the run: {here['updates']} updates; a checkpoint is {here['checkpoint_bytes'] / cost.GIB:.1f} GiB",
        "",
        f"{'nodes':>6}{'GPUs':>6}{'GiB/GPU':>9}{'fits':>6}{'s/update':>10}{'exposed':>9}{'tokens/s':>11}{'hours':>8}{'GPU-h':>9}",
    ]
    for point in report["curve"]:
        time = point["seconds"]
        exposed = 1 - (time["compute"] + time["optimizer"]) / time["total"]
        lines.append(
            f"{point['nodes']:>6}{point['ranks']:>6}{point['memory_total_bytes'] / cost.GIB:>9.1f}"
            f"{'yes' if point['fits'] else 'no':>6}{time['total']:>10.3f}{max(0.0, exposed):>9.1%}"
            f"{point['tokens_per_s']:>11,.0f}{point['hours']:>8.2f}{point['gpu_hours']:>9.1f}"
        )
    lines += [
        "",
        f"assumed, not measured: {rates.compute:.0%} of {card.flops / 1e12:.0f} TFLOP/s; {rates.link:.0%} of "
        f"{card.link / 1e9:.0f} GB/s inside a node and {rates.network:.0%} of {card.network / 1e9:.0f} GB/s a GPU between "
        "nodes. Loading, evaluation and checkpoints come on top.",
    ]
    if report["run"]["global_batch_size"] is None:
        lines.append(
            "note: without --global_batch_size the sequences of an update, and so the result, change with the GPUs."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
