"""Which layers are made alike: what one of them launches on a device, all of them launch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Final

import torch
from torch import Tensor

_ALIGNED: Final = 16  # bytes; kernels are compiled otherwise for what begins elsewhere
_VALUES: Final = (int, float, str, bytes, type, torch.dtype, torch.device, FunctionType, BuiltinFunctionType)


def one_of_each(layers: Sequence[object]) -> list[int]:
    """Places of the first and the last layer, and of the first one of each kind between them.

    Two are of one kind if they are objects of the same types with the same values, and tensors of the same dtype,
    shape, strides and alignment, all the way down. What cannot be looked into is alike only if it is the same object.
    """
    if not layers:
        return []
    kinds: dict[Hashable, int] = {}
    for place, layer in enumerate(layers[1:-1], start=1):
        kinds.setdefault(_structure(layer, {}), place)
    return sorted({0, *kinds.values(), len(layers) - 1})


def _structure(value: object, seen: dict[int, int]) -> Hashable:
    """``seen``: objects on the way here, which may lead back to themselves."""
    if value is None or isinstance(value, _VALUES):
        return type(value), value
    if isinstance(value, Tensor):
        kind = (Tensor, value.device, value.dtype, value.shape, value.layout)
        has_address = value.layout == torch.strided and not value.is_meta
        return (*kind, value.stride(), value.data_ptr() % _ALIGNED) if has_address else kind
    if id(value) in seen:
        return "seen", seen[id(value)]
    seen[id(value)] = len(seen)
    return type(value), *((name, _structure(part, seen)) for name, part in _parts(value))


def _parts(value: object) -> Iterator[tuple[object, object]]:
    if isinstance(value, partial):
        yield from enumerate((value.func, value.args, value.keywords))
    elif isinstance(value, MethodType):
        yield from enumerate((value.__func__, value.__self__))
    elif isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple, range)):
        yield from enumerate(value)
    else:
        names = [*getattr(value, "__dict__", ()), *_slots(type(value))]
        if not names:  # something of C++'s
            yield "id", id(value)
        yield from ((name, getattr(value, name)) for name in names if hasattr(value, name))


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots
