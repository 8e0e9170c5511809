"""The loss on CPU against plain PyTorch: time, interleaved in one process, and peak memory, each in a process of its own.

Every line is a forward and a backward of signed, weighted cross-entropy or of KL to a reference, in fp32:

    ours                    unlearn_ds, `chunked`
    naive                   whole logits
    torch_linear_ce         torch's own chunked op, unweighted sum: what it was made for
    torch_linear_ce_none    the same with reduction="none", the only way it can weight tokens
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn_ds.bench.record import Run, peak_memory, time_interleaved, write_json
from unlearn_ds.kernels import linear_cross_entropy, linear_kl

_TOLERANCE = 1e-4  # of gradients against whole logits, in relative norm


class Inputs(NamedTuple):
    """Leaves and constants of one shape."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    token_weight: Tensor  # (N,)
    ref_hidden: Tensor  # (N, D)


def make_inputs(num_rows: int, hidden_size: int, vocab_size: int) -> Inputs:
    """Random numbers with logits of a real model's size (peak about 20)."""
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(num_rows, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * (2.3 / hidden_size**0.5)
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(vocab_size, (num_rows,), generator=generator),
        torch.randn(num_rows, generator=generator),
        hidden.detach() + 0.05 * torch.randn(num_rows, hidden_size, generator=generator),
    )


def ours_cross_entropy(x: Inputs, workspace_bytes: int) -> Tensor:
    options = {"workspace_bytes": workspace_bytes, "impl": "chunked"}
    return linear_cross_entropy(x.hidden, x.weight, x.targets, x.token_weight, **options)[0]


def naive_cross_entropy(x: Inputs, workspace_bytes: int) -> Tensor:
    logits = F.linear(x.hidden, x.weight)
    return (x.token_weight * F.cross_entropy(logits, x.targets, reduction="none")).sum()


def torch_linear_ce(x: Inputs, workspace_bytes: int) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="sum", options=options)


def torch_linear_ce_none(x: Inputs, workspace_bytes: int) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    losses = F.linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="none", options=options)
    return (x.token_weight * losses).sum()


def ours_kl(x: Inputs, workspace_bytes: int) -> Tensor:
    options = {"workspace_bytes": workspace_bytes, "impl": "chunked"}
    return linear_kl(x.hidden, x.weight, x.ref_hidden, x.weight, x.token_weight, **options)[0]


def naive_kl(x: Inputs, workspace_bytes: int) -> Tensor:
    with torch.no_grad():
        log_ref = F.linear(x.ref_hidden, x.weight).log_softmax(-1)
    log_p = F.linear(x.hidden, x.weight).log_softmax(-1)
    return (x.token_weight * F.kl_div(log_p, log_ref, reduction="none", log_target=True).sum(-1)).sum()


Loss = Callable[[Inputs, int], Tensor]
OPS: dict[str, dict[str, Loss]] = {
    "cross_entropy": {
        "ours": ours_cross_entropy,
        "naive": naive_cross_entropy,
        "torch_linear_ce": torch_linear_ce,
        "torch_linear_ce_none": torch_linear_ce_none,
    },
    "kl": {"ours": ours_kl, "naive": naive_kl},
}
NUM_PRODUCTS = {"cross_entropy": 3, "kl": 4}
_UNWEIGHTED = ("torch_linear_ce",)


def gradients(loss: Loss, inputs: Inputs, workspace_bytes: int) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(loss(inputs, workspace_bytes), [inputs.hidden, inputs.weight])


def prepare(op: str, impl: str, shape: tuple[int, int, int], workspace_bytes: int) -> Run:
    """Inputs ready and the libraries warm; the returned call is what is measured."""
    loss = OPS[op][impl]
    gradients(loss, make_inputs(64, 32, 128), workspace_bytes)
    return partial(gradients, loss, make_inputs(*shape), workspace_bytes)


def products(inputs: Inputs, count: int) -> None:
    """The bare matrix products of a loss: logits, dX, dW, and for KL the reference's logits."""
    x, weight = inputs.hidden.detach(), inputs.weight.detach()
    z = x @ weight.T
    if count == 4:
        torch.mm(inputs.ref_hidden, weight.T, out=z)
    z @ weight
    z.T @ x


def check(op: str, workspace_bytes: int) -> dict[str, str | None]:
    """Compare every implementation with whole logits on a small shape; the reason why one is wrong, or None."""
    inputs = make_inputs(200, 64, 1000)
    expected = gradients(OPS[op]["naive"], inputs, workspace_bytes)
    plain = inputs._replace(token_weight=torch.ones(200))
    unweighted = gradients(OPS[op]["naive"], plain, workspace_bytes)
    found = {}
    for impl, loss in OPS[op].items():
        got = gradients(loss, inputs, workspace_bytes)
        truth = unweighted if impl in _UNWEIGHTED else expected
        worst = max(((g - t).norm() / t.norm()).item() for g, t in zip(got, truth))
        found[impl] = None if worst <= _TOLERANCE else f"gradients off by {worst:.2g} in relative norm"
    return found


def bench(op: str, shape: tuple[int, int, int], workspace_bytes: int, repeats: int) -> list[dict[str, Any]]:
    """One result per implementation that is right, and the bare products."""
    wrong = check(op, workspace_bytes)
    inputs = make_inputs(*shape)
    runs: dict[str, Run] = {
        impl: partial(gradients, loss, inputs, workspace_bytes) for impl, loss in OPS[op].items() if wrong[impl] is None
    }
    times = (
        time_interleaved(runs | {"products": partial(products, inputs, NUM_PRODUCTS[op])}, repeats) if repeats else {}
    )
    del inputs
    floor = times.get("products", {}).get("median_ms")
    num_rows, hidden_size, vocab_size = shape
    results = []
    for impl in [*runs, *(["products"] if repeats else [])]:
        row: dict[str, Any] = {
            "name": op,
            "shape": {"N": num_rows, "D": hidden_size, "V": vocab_size},
            "dtype": "float32",
            "impl": impl,
            "weighted": impl not in _UNWEIGHTED,
            **times.get(impl, {}),
        }
        if floor:
            row["percent_of_products"] = round(100 * floor / row["median_ms"], 1)
        if impl in runs:
            row["peak_mem_bytes"] = peak_memory(prepare, op, impl, shape, workspace_bytes)
            row["logits_bytes"] = 4 * num_rows * vocab_size
            row["gradient_bytes"] = 4 * hidden_size * (num_rows + vocab_size)
            row["workspace_bytes"] = workspace_bytes if impl == "ours" else None
        results.append(row)
    results += [{"name": op, "impl": impl, "refused": reason} for impl, reason in wrong.items() if reason is not None]
    return results


def show(results: list[dict[str, Any]]) -> str:
    """A table for the terminal; memory is what is added to the inputs."""
    lines = [f"{'op':<15}{'impl':<22}{'median ms':>11}{'% of products':>15}{'peak MiB':>10}"]
    for row in results:
        if "refused" in row:
            lines.append(f"{row['name']:<15}{row['impl']:<22}  not timed: {row['refused']}")
            continue
        time_ms = f"{row['median_ms']:.1f}" if "median_ms" in row else "-"
        share = f"{row['percent_of_products']:.1f}" if "percent_of_products" in row else "-"
        memory = f"{row['peak_mem_bytes'] / 2**20:.0f}" if "peak_mem_bytes" in row else "-"
        lines.append(f"{row['name']:<15}{row['impl']:<22}{time_ms:>11}{share:>15}{memory:>10}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `unlearn-ds bench loss`."""
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--rows", type=int, default=4096, help="N, tokens with a loss (default: 4096)")
    parser.add_argument("--hidden_size", type=int, default=512, help="D (default: 512)")
    parser.add_argument("--vocab_size", type=int, default=64000, help="V (default: 64000)")
    parser.add_argument("--workspace_mib", type=int, default=1024, help="what ours may use for logits (default: 1024)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; 0 measures memory alone (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS), help="what to measure (default: all)")


def main(args: argparse.Namespace) -> int:
    """Run, print the table, write the JSON."""
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = (args.rows, args.hidden_size, args.vocab_size)
    results = [row for op in args.ops for row in bench(op, shape, args.workspace_mib << 20, args.repeats)]
    print(f"N={shape[0]} D={shape[1]} V={shape[2]} fp32, forward and backward, {torch.get_num_threads()} threads")
    print(show(results))
    if args.json:
        write_json(args.json, results)
    return 1 if any("refused" in row for row in results) else 0
