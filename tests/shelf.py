"""The recipes every task must run, and how each is cut short for a test."""

from qexp.command.folders import CONF
from qexp.command.listing import offered

ALL = offered([CONF], "quant")
METHODS = [name for name in ALL if not name.startswith("placed/")]  # those name the layers of one network

QUICK = ("quant.passes.reconstruct.batch=4", "quant.passes.reconstruct.iterations=3")
OWN = {  # widths that a method is made for, and learned rounding cut short
    "bwn": ("bits=w1a8",),
    "bwn_lsq": ("bits=w1a2",),
    "hysteresis": ("bits=w1a4",),
    "one_bit": ("bits=w1a2",),
    "xnor": ("bits=w1a1",),
    "adaround": QUICK,
    "brecq": (
        *QUICK,
        "quant.passes.reconstruct.step_iterations=3",
        "quant.passes.reconstruct.loss=mse",
    ),  # its own weights the error by class scores, one an image
    "qdrop": QUICK,
}
