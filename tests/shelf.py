"""The recipes every task must run, and how each is cut short for a test."""

from functools import cache

from hydra import compose, initialize_config_dir
from hydra.utils import get_class

from qexp.command.folders import CONF
from qexp.command.listing import offered
from qexp.command.root import register

ALL = offered([CONF], "quant")
METHODS = [name for name in ALL if not name.startswith("placed/")]  # those name the layers of one network

QUICK = ("quant.passes.reconstruct.batch=4", "quant.passes.reconstruct.iterations=3")
MORE = {"brecq": ("quant.passes.reconstruct.step_iterations=3", "quant.passes.reconstruct.loss=mse")}
"""BRECQ's own loss weights the error by class scores, one per image, which not every task has."""


@cache
def own(method: str, bits: int = 4) -> tuple[str, ...]:
    """Returns what a recipe is run with: the widths nearest to `bits` that its quantizers are made for, learned rounding cut short."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        quant = compose("config", overrides=[f"quant={method}"]).quant
    widths = []
    for key, site in (("layer_wbit", "weight"), ("layer_abit", "input")):
        spec = quant.get(site)
        low, high = get_class(spec["_target_"]).bits_allowed if spec and "_target_" in spec else (bits, bits)
        widths.append(f"{key}={min(max(bits, low), high)}")
    quick = QUICK if "reconstruct" in (quant.get("passes") or {}) else ()
    return (*widths, *quick, *MORE.get(method, ()))
