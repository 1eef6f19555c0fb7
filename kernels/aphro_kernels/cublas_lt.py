"""A product by that algorithm of cuBLAS which a table names (tuned.py), where the library's own choice is slower.

Nothing is added to the library: the same kernels, asked for through ``cublasLtMatmul`` of the very file that torch has
loaded. What the library refuses, it chooses itself, as in ``torch.nn.functional.linear``.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p, sizeof
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

_LOG: Final = logging.getLogger(__name__)
# numbers of cublasLt.h (CUDA 12 and 13)
_CUDA_TYPES: Final = {torch.bfloat16: 14, torch.float16: 2}
_FLOAT32: Final = 0
_COMPUTE_FLOAT32: Final = 68
_TRANSPOSE_FIRST: Final = 3  # attributes of a product
_EPILOGUE: Final = 7
_BIAS_POINTER: Final = 8
_IS_TRANSPOSED: Final = 1
_ADD_BIAS: Final = 4
WORKSPACE_BYTES: Final = 2**24  # that an algorithm may want


class RawAlgorithm(ctypes.Structure):
    """``cublasLtMatmulAlgo_t``"""

    _fields_ = (("data", c_uint64 * 8),)


class Found(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``"""

    _fields_ = (
        ("algorithm", RawAlgorithm),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@dataclass(frozen=True, slots=True)
class LtAlgorithm:
    """What identifies an algorithm from one start to the next: its attributes, as cublasLt.h numbers them."""

    number: int
    tile: int
    stages: int
    cluster: int
    swizzle: int = 0
    option: int = 0


ATTRIBUTES: Final[dict[str, tuple[int, Any]]] = {
    "tile": (1, c_uint32),
    "swizzle": (4, c_uint32),
    "option": (5, c_uint32),
    "stages": (6, c_uint32),
    "cluster": (8, c_uint16),
}


def lt_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class LtProduct:
    """``x W^T + bias`` for one shape: ``x`` [rows, K], ``weight`` [N, K] -> [rows, N]; sums in float32.

    All contiguous, 16 bit, of one dtype, on the device that was current when this was built.
    """

    def __init__(self, num_rows: int, n: int, k: int, dtype: torch.dtype, *, has_bias: bool) -> None:
        self.num_rows, self.n, self.k, self.has_bias = num_rows, n, k, has_bias
        self.kind = _CUDA_TYPES[dtype]
        self.algorithm: RawAlgorithm | None = None
        self.workspace_bytes = 0
        self._scales = c_float(1.0), c_float(0.0)
        # the library's matrices stand in columns: out^T [n, rows] = (W^T)^T x^T
        self.desc = c_void_p()
        call("cublasLtMatmulDescCreate", byref(self.desc), c_int(_COMPUTE_FLOAT32), c_int(_FLOAT32))
        self._set(_TRANSPOSE_FIRST, c_int32(_IS_TRANSPOSED))
        if has_bias:
            self._set(_EPILOGUE, c_int32(_ADD_BIAS))
        sides = ((k, n), (k, num_rows), (n, num_rows))
        self.weight_layout, self.x_layout, self.out_layout = (_layout(self.kind, *side) for side in sides)

    def _set(self, attribute: int, value: Any) -> None:
        call("cublasLtMatmulDescSetAttribute", self.desc, c_int(attribute), byref(value), c_size_t(sizeof(value)))

    def choose(self, wanted: LtAlgorithm) -> bool:
        """False: the library has none such for this shape, or one that needs too large a workspace."""
        self.algorithm, self.workspace_bytes = None, 0
        if (raw := self.raw(wanted)) is None:
            return False
        found = Found()
        checked = status("cublasLtMatmulAlgoCheck", _handle(), self.desc, *self.layouts, byref(raw), byref(found))
        if checked or found.status or found.workspace_bytes > WORKSPACE_BYTES:
            return False
        self.algorithm, self.workspace_bytes = raw, found.workspace_bytes
        return True

    def raw(self, wanted: LtAlgorithm) -> RawAlgorithm | None:
        """Not yet asked whether this shape can be had so; None: the library knows no such algorithm."""
        raw = RawAlgorithm()
        kinds = (c_int(self.kind),) * 4
        started = ("cublasLtMatmulAlgoInit", _handle(), c_int(_COMPUTE_FLOAT32), c_int(_FLOAT32), *kinds)
        if status(*started, c_int(wanted.number), byref(raw)):
            return None
        for name, (attribute, kind) in ATTRIBUTES.items():
            value = kind(getattr(wanted, name))
            set_one = ("cublasLtMatmulAlgoConfigSetAttribute", byref(raw), c_int(attribute), byref(value))
            if status(*set_one, c_size_t(sizeof(value))):
                return None
        return raw

    @property
    def layouts(self) -> tuple[c_void_p, c_void_p, c_void_p, c_void_p]:
        return self.weight_layout, self.x_layout, self.out_layout, self.out_layout

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        out: Tensor | None = None,
        *,
        workspace: Tensor,
    ) -> Tensor:
        """``workspace``: any bytes; calls that share it must follow each other on one stream."""
        assert self.algorithm is not None
        assert workspace.nbytes >= self.workspace_bytes
        assert x.shape == (self.num_rows, self.k)
        assert weight.shape == (self.n, self.k)
        assert x.is_contiguous()
        assert weight.is_contiguous()
        out = x.new_empty(self.num_rows, self.n) if out is None else out
        assert out.is_contiguous()
        assert self.has_bias == (bias is not None)
        if bias is not None:
            self._set(_BIAS_POINTER, c_void_p(bias.data_ptr()))
        one, zero = self._scales
        first = (c_void_p(weight.data_ptr()), self.weight_layout, c_void_p(x.data_ptr()), self.x_layout)
        result = (c_void_p(out.data_ptr()), self.out_layout)
        stream = c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
        sums = (_handle(), self.desc, byref(one), *first, byref(zero), *result, *result)
        room = (c_void_p(workspace.data_ptr()), c_size_t(workspace.nbytes))
        call("cublasLtMatmul", *sums, byref(self.algorithm), *room, stream)
        return out


@cache
def lt_product(
    num_rows: int, n: int, k: int, dtype: torch.dtype, has_bias: bool, device: int, wanted: LtAlgorithm
) -> LtProduct | None:
    """None: the library refuses the algorithm, which the log says once."""
    with torch.cuda.device(device):
        product = LtProduct(num_rows, n, k, dtype, has_bias=has_bias)
        is_taken = product.choose(wanted)
    if not is_taken:
        _LOG.warning("cuBLAS refuses %s for %d rows of %d x %d, and chooses itself", wanted, num_rows, n, k)
        return None
    return product


@cache
def library_version() -> int:
    """Of the cuBLAS that torch has loaded, the major number; 0: there is none that can be asked."""
    return int(_library().cublasLtGetVersion()) // 10000 if _library() is not None else 0


@cache
def _library() -> Any:
    """The loaded file again: it is looked up by its name, which has CUDA's major version."""
    if torch.version.cuda is None:
        return None
    name = f"libcublasLt.so.{torch.version.cuda.split('.')[0]}"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        _LOG.warning("%s: products of decode steps take the algorithms that cuBLAS chooses itself", error)
        return None
    library.cublasLtGetVersion.restype = c_size_t
    return library


def status(function: str, *arguments: Any) -> int:
    return int(getattr(_library(), function)(*arguments))


def call(function: str, *arguments: Any) -> None:
    if failed := status(function, *arguments):
        raise RuntimeError(f"{function}: cuBLAS status {failed}")


def _handle() -> c_void_p:
    return _handle_of(torch.cuda.current_device())


@cache
def _handle_of(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        call("cublasLtCreate", byref(handle))
    return handle


def _layout(kind: int, rows: int, columns: int) -> c_void_p:
    layout = c_void_p()
    sizes = (c_uint64(rows), c_uint64(columns), c_int64(rows))
    call("cublasLtMatrixLayoutCreate", byref(layout), c_int(kind), *sizes)
    return layout
