"""Conversion of each type of layer to integers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from qexp.integer.layers.activations import relu, relu6, table
from qexp.integer.layers.calls import flatten_call, passed_call, relu6_call, relu_call, view_call
from qexp.integer.layers.joins import add, concat, flatten, passed, strided_pad
from qexp.integer.layers.norms import batch_norm
from qexp.integer.layers.pools import adaptive_pool, average_pool, max_pool
from qexp.integer.layers.weighted import weighted
from qexp.models import modules

LAYERS: dict[type[nn.Module], Callable] = {
    nn.Conv2d: weighted,
    nn.Linear: weighted,
    nn.BatchNorm2d: batch_norm,
    nn.ReLU: relu,
    nn.ReLU6: relu6,
    nn.MaxPool2d: max_pool,
    nn.AvgPool2d: average_pool,
    nn.AdaptiveAvgPool2d: adaptive_pool,
    nn.Flatten: flatten,
    nn.Identity: passed,
    nn.Dropout: passed,
    nn.Dropout1d: passed,
    nn.Dropout2d: passed,
    nn.AlphaDropout: passed,
    nn.PReLU: table,
    nn.SiLU: table,
    nn.Hardswish: table,
    nn.Sigmoid: table,
    nn.Tanh: table,
    nn.GELU: table,
    modules.Add: add,
    modules.Concat: concat,
    modules.StridedPad: strided_pad,
}


# functions and methods by name: torch.relu, F.relu and Tensor.relu are the same
FUNCTIONS: dict[str, Callable] = {
    "flatten": flatten_call,
    "view": view_call,
    "reshape": view_call,
    "contiguous": passed_call,
    "dropout": passed_call,
    "relu": relu_call,
    "relu_": relu_call,
    "relu6": relu6_call,
}
