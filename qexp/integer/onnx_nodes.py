"""The ONNX nodes of each type of operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qexp.integer import onnx_moves, onnx_products, onnx_weighted
from qexp.integer.moves import Concat, Flatten, Pad, Permute, Reshape, Slice, StridedPad
from qexp.integer.onnx_graph import Graph
from qexp.integer.op import Op
from qexp.integer.products import Affine, MatMul, Multiply, Resample
from qexp.integer.program import Add, Conv, Linear, Lookup, MaxPool, SumPool

FORMS: dict[type[Op], Callable[[Graph, Any], str]] = {
    Conv: onnx_weighted.weighted,
    Linear: onnx_weighted.weighted,
    SumPool: onnx_weighted.average,
    Add: onnx_products.add,
    Multiply: onnx_products.multiply,
    MatMul: onnx_products.matmul,
    Affine: onnx_products.affine,
    Lookup: onnx_products.lookup,
    Resample: onnx_products.resample,
    MaxPool: onnx_moves.max_pool,
    Concat: onnx_moves.concat,
    Flatten: onnx_moves.flatten,
    Reshape: onnx_moves.reshape,
    Permute: onnx_moves.permute,
    Slice: onnx_moves.cut,
    Pad: onnx_moves.pad,
    StridedPad: onnx_moves.strided_pad,
}
