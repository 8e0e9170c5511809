"""CUDA tensors without memory, on a machine without a GPU: shapes, dtypes and devices are real, values are not.

Must be set up in a process of its own, before the first backward in it.
"""

import tempfile
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
# A torch that was built without CUDA asks for this as soon as autograd meets a tensor that says it is on a GPU.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
constexpr auto kCuda = c10::DeviceType::CUDA;
struct OneFakeDevice : c10::impl::NoOpDeviceGuardImpl<kCuda> {
  c10::Device getDevice() const override { return c10::Device(kCuda, 0); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, OneFakeDevice);
}
"""


def pretend_one_device() -> None:
    """Let autograd record what is done to fake CUDA tensors, on a card of as many multiprocessors as an H100 has."""
    torch.cuda.get_device_properties = lambda _device: SimpleNamespace(multi_processor_count=132)
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    from torch.utils.cpp_extension import load_inline

    with tempfile.TemporaryDirectory() as folder:
        load_inline("fake_cuda_guard", _GUARD, is_python_module=False, build_directory=folder, no_implicit_headers=True)


class Traffic(TorchDispatchMode):
    """Counts what would make the host wait for the device: copies between them, and values or shapes read back.

    A product of tensors on both sides is an error of the fake tensors themselves.
    """

    _READS = frozenset(("nonzero", "_local_scalar_dense", "equal", "is_nonzero", "masked_select", "_unique2"))

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if name in self._READS:
            self.counts[name] += 1
        result = func(*args, **(kwargs or {}))
        source = args[1] if name == "copy_" else args[0] if args else None
        if name in ("_to_copy", "copy_") and result.device.type != source.device.type:
            self.counts[f"{source.device.type} to {result.device.type}"] += 1
        return result


def _call(node: Any, gradients: list[Tensor | None]) -> Any:
    if callable(node):
        return node(*gradients)
    shapes = node._input_metadata  # written in Python: gets zeros for what has no gradient
    return node.apply(
        *(
            torch.zeros(like.shape, dtype=like.dtype, device=like.device) if gradient is None else gradient
            for gradient, like in zip(gradients, shapes, strict=True)
        )
    )


@torch.no_grad()
def backward(loss: Tensor) -> int:
    """Call every node of the graph behind a scalar, as autograd's engine would, which wants a real device; returns how many.

    The gradients of leaves lie in their `.grad` as usual.
    """
    order, seen = [], set()
    stack = [(loss.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions]
    arrived: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    called = 0
    for node in reversed(order):
        inputs = arrived.pop(node, None)
        if inputs is None:
            continue
        results = _call(node, [inputs.get(index) for index in range(len(node._input_metadata))])
        called += 1
        results = results if isinstance(results, tuple) else (results,)
        for (following, index), gradient in zip(node.next_functions, results):
            if following is not None and gradient is not None:
                like = following._input_metadata[index]  # the engine undoes broadcasts, and casts, between nodes
                gradient = gradient.sum_to_size(like.shape).to(like.dtype)
                slots = arrived.setdefault(following, {})
                slots[index] = slots[index] + gradient if index in slots else gradient
    return called
