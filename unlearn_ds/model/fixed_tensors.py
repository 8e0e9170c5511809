"""What a model computes once, when it is built, and no file holds: rotary frequencies, embedding scales, tables of positions.

Under ZeRO-3 a model is built inside `deepspeed.zero.Init`, which makes the constructors of tensors (`torch.tensor`, `zeros`, in
some versions of transformers `arange` too) return the dtype of the run: in bf16 rotary frequencies lose up to 0.6 %, and the
angle of position 4095 is wrong by radians. Such tensors are taken from a model that was built outside of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_OWN_FIELDS = frozenset(vars(nn.Module()))  # parameters, buffers, children, hooks
_Place = tuple[str, str, tuple[Any, ...]]  # path of a module, name of its field, keys into lists and dicts in it


def fixed_tensors(model: nn.Module) -> dict[_Place, Tensor]:
    """Every non-persistent buffer of `model`, and every tensor that a module holds as a plain field, alone or in a list,
    tuple or dict. What has no memory is left out.
    """
    found: dict[_Place, Tensor] = {}
    for path, module in model.named_modules():
        fields = {name: value for name, value in vars(module).items() if name not in _OWN_FIELDS}
        fields |= {name: module._buffers[name] for name in sorted(module._non_persistent_buffers_set)}
        for name, value in fields.items():
            found |= {(path, name, keys): tensor for keys, tensor in _tensors(value) if not tensor.is_meta}
    return found


def restore(model: nn.Module, fixed: dict[_Place, Tensor]) -> None:
    """Give `model` the `fixed_tensors` of another of the same class and config, each on the device that its own is on.

    Raises `AssertionError` if it has no tensor at one of the places.
    """
    copies: dict[tuple[int, Any], Tensor] = {}  # what is one tensor in the other model stays one

    def replace(own: Tensor, place: _Place) -> Tensor:
        key = id(fixed[place]), own.device
        if key not in copies:
            copies[key] = fixed[place].to(own.device, copy=True)
        return copies[key]

    by_field: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
    for path, name, keys in fixed:
        by_field.setdefault((path, name), []).append(keys)
    for (path, name), all_keys in by_field.items():
        module = model.get_submodule(path)
        fields = module._buffers if name in module._buffers else vars(module)
        assert name in fields, f"{type(module).__name__} has no {name!r}: it was built otherwise"
        for keys in all_keys:
            fields[name] = _replaced(fields[name], keys, lambda own, place=(path, name, keys): replace(own, place))


@contextmanager
def fixed_tensors_kept(model: nn.Module) -> Iterator[None]:
    """A context that may move the model to another device, and may not change what its fixed tensors hold, nor their dtype."""
    before = fixed_tensors(model)
    yield
    restore(model, before)


def _tensors(value: Any) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """(keys that lead to it, tensor) of all tensors in `value`, parameters left out."""
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield (), value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in items:
        for keys, tensor in _tensors(part):
            yield (key, *keys), tensor


def _replaced(value: Any, keys: tuple[Any, ...], replace: Callable[[Tensor], Tensor]) -> Any:
    """`value` with the tensor to which `keys` lead replaced; a list or dict is changed, a tuple made anew."""
    if not keys:
        assert isinstance(value, Tensor), f"a {type(value).__name__} where another model of this class has a tensor"
        return replace(value)
    first, *rest = keys
    new = _replaced(value[first], tuple(rest), replace)
    if isinstance(value, tuple):
        parts = [new if index == first else part for index, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    value[first] = new
    return value
