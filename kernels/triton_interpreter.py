"""Triton 3.6's interpreter beside numpy 2.4 and later, which no longer makes a number of an array of one dimension.

The interpreter keeps a scalar as an array of one element and takes `int()` of it wherever a kernel's loop wants a bound. Triton
3.7 squeezes the array first; with triton 3.6 as the oldest no more, this file goes.
"""

from importlib import metadata
from typing import Any


def settle() -> None:
    """Make kernels run in the interpreter of this process whatever numpy is installed; nothing to do from triton 3.7 on."""
    if tuple(int(part) for part in metadata.version("triton").split(".")[:2]) >= (3, 7):
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    if getattr(patch_tensor, "settled", False):
        return

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    patch_tensor_and_index.settled = True
    interpreter._patch_lang_tensor = patch_tensor_and_index
