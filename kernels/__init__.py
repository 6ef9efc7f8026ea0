"""qexp_kernels: the arithmetic of quantization as fused, differentiable operators.

Each folder is one operator: its schema and gradient (`__init__.py`), the PyTorch code that defines it
(`reference.py`), and the same numbers from C++ (`op.cpp`) and CUDA (`op.cu`). Importing compiles nothing; without
`load()` the references run.
"""

from .batch_norm import batch_norm
from .dorefa import dorefa_weight, dorefa_weight_and_peak
from .errors import KernelError
from .fake_quantize import fake_quantize, quantize
from .fixed_point import fixed_point_conv2d, fixed_point_linear
from .fused_conv import fused_conv
from .gemmlowp import gemmlowp, gemmlowp_codes
from .hysteresis import hysteresis
from .level_grid import level_grid
from .loader import Loaded, compiled, load
from .lsq import lsq
from .pact import mpact, pact
from .regrid import regrid
from .rescale import rescale
from .round_to import round_to
from .tensor_stats import Stats, tensor_stats
from .winograd import winograd_conv2d

__all__ = [
    "KernelError",
    "Loaded",
    "Stats",
    "batch_norm",
    "compiled",
    "dorefa_weight",
    "dorefa_weight_and_peak",
    "fake_quantize",
    "fixed_point_conv2d",
    "fixed_point_linear",
    "fused_conv",
    "gemmlowp",
    "gemmlowp_codes",
    "hysteresis",
    "level_grid",
    "load",
    "lsq",
    "mpact",
    "pact",
    "quantize",
    "regrid",
    "rescale",
    "round_to",
    "tensor_stats",
    "winograd_conv2d",
]
