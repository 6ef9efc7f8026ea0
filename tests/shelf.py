"""The recipes every task must run, and how each is cut short for a test."""

from pathlib import Path

CONF = Path(__file__).parents[1] / "conf"
NETWORKS = {"toynet", "resnet20", "mobilenetv2"}  # recipes that name the layers of one network
METHODS = [p.stem for p in sorted((CONF / "quant").glob("[!_]*.yaml")) if p.stem.split("_")[0] not in NETWORKS]

QUICK = ("quant.passes.reconstruct.batch=4", "quant.passes.reconstruct.iterations=3")
OWN = {  # widths that a method is made for, and learned rounding cut short
    "bwn": ("bits=w1a8",),
    "bwn_lsq": ("bits=w1a2",),
    "hysteresis": ("bits=w1a4",),
    "one_bit": ("bits=w1a2",),
    **dict.fromkeys(("xnor", "xnor_plus", "irnet", "recu", "adabin", "reactnet"), ("bits=w1a1",)),
    "adaround": QUICK,
    "brecq": (
        *QUICK,
        "quant.passes.reconstruct.step_iterations=3",
        "quant.passes.reconstruct.loss=mse",
    ),  # its own weights the error by class scores, one an image
    "qdrop": QUICK,
    "mrecg": QUICK,
}
