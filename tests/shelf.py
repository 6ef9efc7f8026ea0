"""The recipes every task must run, at widths that their quantizers take, and how some are cut short for a test."""

from functools import cache

from hydra import compose, initialize_config_dir
from hydra.utils import get_class

from qexp.command.folders import CONF
from qexp.command.listing import offered
from qexp.command.root import register

ALL = offered([CONF], "quant")
METHODS = [name for name in ALL if not name.startswith("placed/")]  # those name the layers of one network

QUICK = ("quant.passes.reconstruct.batch=4", "quant.passes.reconstruct.iterations=3")
SHORT = {  # learned rounding
    "adaround": QUICK,
    "brecq": (
        *QUICK,
        "quant.passes.reconstruct.step_iterations=3",
        "quant.passes.reconstruct.loss=mse",
    ),  # its own weights the error by class scores, one an image
    "mrecg": QUICK,
    "qdrop": QUICK,
}


@cache
def own(name: str, bits: int = 4) -> tuple[str, ...]:
    """Returns the overrides of a recipe: widths nearest to `bits` that its quantizers take (a binary one has one bit), and shorter passes.

    A new file of `conf/quant` needs no line here.
    """
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        quant = compose("config", [f"quant={name}"]).quant
    words = []
    for key, site in (("layer_wbit", "weight"), ("layer_abit", "input")):
        target = (quant.get(site) or {}).get("_target_")
        low, high = get_class(target).bits_allowed if target else (bits, bits)
        words.append(f"{key}={min(max(bits, low), high)}")
    return (*words, *SHORT.get(name, ()))
