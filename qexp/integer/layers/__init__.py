"""Conversion of each type of layer to integers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from qexp.integer.layers.activations import hardtanh, relu, relu6, table
from qexp.integer.layers.affine import affine
from qexp.integer.layers.calls import expand_call, passed_call, reshape_as_call, to_call, unbind_call
from qexp.integer.layers.joins import add, concat, matmul, multiply, passed, stack, subtract
from qexp.integer.layers.lengths import length, unit_length
from qexp.integer.layers.moves import (
    channel_shuffle,
    flatten,
    index,
    pad,
    permute,
    pixel_shuffle,
    pixel_unshuffle,
    reshape,
    roll,
    split,
    squeeze,
    strided_pad,
    transpose,
    unflatten,
)
from qexp.integer.layers.normalize import group_norm, instance_norm, layer_norm
from qexp.integer.layers.norms import batch_norm
from qexp.integer.layers.pools import adaptive_pool, average_pool, max_pool, mean, total
from qexp.integer.layers.quotients import divide
from qexp.integer.layers.resample import upsample
from qexp.integer.layers.softmax import softmax
from qexp.integer.layers.weighted import weighted
from qexp.models import modules, operations
from qexp.models.activations import Maxout, RPReLU

TABLES = (
    *(
        nn.Sigmoid,
        nn.Hardsigmoid,
        nn.LogSigmoid,
        nn.SiLU,
        nn.Hardswish,
        nn.GELU,
        nn.Mish,
        nn.Tanh,
        nn.Tanhshrink,
        operations.Elementwise,
    ),
    *(
        nn.LeakyReLU,
        nn.PReLU,
        RPReLU,
        Maxout,
        nn.ELU,
        nn.CELU,
        nn.SELU,
        nn.Softplus,
        nn.Softsign,
        nn.Softshrink,
        nn.Hardshrink,
        nn.Threshold,
    ),
)
LAYERS: dict[type[nn.Module], Callable] = {
    **dict.fromkeys(TABLES, table),
    nn.Conv1d: weighted,
    nn.Conv2d: weighted,
    nn.ConvTranspose2d: weighted,
    nn.Linear: weighted,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d), batch_norm),
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: group_norm,
    nn.InstanceNorm2d: instance_norm,
    nn.ReLU: relu,
    nn.ReLU6: relu6,
    nn.Hardtanh: hardtanh,
    nn.MaxPool2d: max_pool,
    nn.AvgPool2d: average_pool,
    nn.AdaptiveAvgPool2d: adaptive_pool,
    nn.Upsample: upsample,
    nn.PixelShuffle: pixel_shuffle,
    nn.PixelUnshuffle: pixel_unshuffle,
    nn.ChannelShuffle: channel_shuffle,
    **dict.fromkeys((nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d), pad),
    operations.Length: length,
    operations.UnitLength: unit_length,
    nn.Softmax: softmax,
    nn.Flatten: flatten,
    nn.Unflatten: unflatten,
    nn.Identity: passed,
    nn.Dropout: passed,
    nn.Dropout1d: passed,
    nn.Dropout2d: passed,
    nn.AlphaDropout: passed,
    modules.Add: add,
    operations.Subtract: subtract,
    operations.Multiply: multiply,
    operations.Divide: divide,
    operations.MatMul: matmul,
    operations.Affine: affine,
    operations.Mean: mean,
    operations.Sum: total,
    operations.Stack: stack,
    operations.Permute: permute,
    operations.Transpose: transpose,
    operations.Reshape: reshape,
    operations.Split: split,
    operations.Index: index,
    operations.Squeeze: squeeze,
    operations.Pad: pad,
    operations.Roll: roll,
    modules.Concat: concat,
    modules.StridedPad: strided_pad,
}

# those that find the dimensions of a tensor themselves, wherever its images lie
MOVING = {nn.Flatten, operations.Permute, operations.Transpose, operations.Reshape, operations.Split, operations.Index}
MOVING |= {operations.Roll, operations.Squeeze, nn.Identity, nn.Dropout, nn.Unflatten}
# those that treat the entries of all dimensions alike, or of all but the last ones or the one that they name
ANYWHERE = {*TABLES} - {nn.PReLU, RPReLU, Maxout}  # whose slopes lie along dimension 1
ANYWHERE |= {
    nn.BatchNorm1d,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Linear,
    nn.LayerNorm,
    nn.Softmax,
    modules.Add,
    modules.Concat,
}
ANYWHERE |= {
    getattr(operations, name)
    for name in ("Add", "Subtract", "Multiply", "Divide", "Affine", "MatMul", "Mean", "Sum", "UnitLength")
}

# functions and methods that no layer computes, by name
FUNCTIONS: dict[str, Callable] = {"dropout": passed_call, "contiguous": passed_call, "unbind": unbind_call}
FUNCTIONS |= dict.fromkeys(("expand", "expand_as"), expand_call)
FUNCTIONS |= dict.fromkeys(("view_as", "reshape_as"), reshape_as_call)
FUNCTIONS |= dict.fromkeys(("to", "float", "double", "type_as"), to_call)
