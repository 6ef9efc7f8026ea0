"""Which quantizer, with how many bits, on each tensor of each layer: the recipe resolved into a plan, and the plan applied."""

from qexp.recipe.plan import Entry, Plan, apply
from qexp.recipe.resolve import Recipe, resolve

__all__ = ["Entry", "Plan", "Recipe", "apply", "resolve"]
