"""Settings of the quantizers, their widths, and the integer program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qexp.errors import QexpError
from qexp.numerics.widths import width
from qexp.run.settings.checks import (
    Spec,
    choice,
    mapping,
    none_or,
    refusal,
    specification,
    text,
    whole,
)
from qexp.system.objects import TARGET

SITES = ("input", "weight", "bias", "output", "grad_output", "compute")


@dataclass(frozen=True)
class Method:
    """The quantizers: the default of each site, edits by named rules, and the method's own passes."""

    name: str
    sites: Mapping[str, Spec | None]
    rules: Mapping[str, Any] = field(default_factory=dict)
    passes: Mapping[str, Spec] = field(default_factory=dict)
    requantize: str | None = None  # rounding of the integer program between layers; None rounds with integers
    pixels: str | None = (
        None  # exact | nearest: images arrive as the pixels they are stored as; None takes them normalised
    )

    @classmethod
    def of(cls, node: Any) -> Method:
        """Returns the method that a `quant` node describes."""
        node = mapping(node, "quant")
        for site in SITES:
            if node.get(site) is not None and not isinstance(node[site], Mapping):
                raise QexpError(
                    f"quant.{site}={node[site]!r} is not allowed; use null (float) or a mapping with {TARGET}; a width alone is "
                    f"quant.{site}.bits, layer_wbit or layer_abit"
                )
            _check_parts(node.get(site), f"quant.{site}", site)
        for name, rule in mapping(node.get("rules") or {}, "quant.rules").items():
            for site, spec in rule.items() if isinstance(rule, Mapping) else ():
                _check_parts(spec, f"quant.rules.{name}.{site}", site)
        return cls(
            name=text(node.get("name"), "quant.name"),
            sites={site: node.get(site) for site in SITES},
            rules=mapping(node.get("rules") or {}, "quant.rules"),
            requantize=none_or(text, node.get("requantize"), "quant.requantize"),
            pixels=none_or(choice, node.get("pixels"), "quant.pixels", ("exact", "nearest")),
            passes={k: v for k, v in mapping(node.get("passes") or {}, "quant.passes").items() if v},
        )


def _check_parts(spec: Any, key: str, site: str) -> None:
    """Raises if a quantizer's width is not allowed, or if an option that must be a specification or a word has another value."""
    if not isinstance(spec, Mapping):
        return
    if site != "compute":
        width(spec.get("bits"), f"{key}.bits", site)
    if isinstance(spec.get("range"), Mapping):  # some methods also take a number or a word
        specification(spec["range"], f"{key}.range")
    for name in ("granularity", "rounding"):
        if spec.get(name) is not None and not isinstance(spec[name], str | Mapping):
            raise refusal(
                f"{key}.{name}", spec[name], "a word, such as tensor, channel" if name[0] == "g" else "a word"
            )


@dataclass(frozen=True)
class Widths:
    """Bit widths: a number, a list with one entry per group of the model, or `{pattern: bits}`; 32 is float."""

    weights: Any = 8
    inputs: Any = 8
    ends: int | None = 8  # bits of the first and last layer; None treats them like the rest
    plan: Path | None = None  # a `layers.csv` that names widths for layers

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> Widths:
        """Returns the widths that a configuration asks for."""
        return cls(
            weights=_widths(cfg.get("layer_wbit", 8), "layer_wbit"),
            inputs=_widths(cfg.get("layer_abit", 8), "layer_abit"),
            ends=none_or(whole, cfg.get("ends_bit"), "ends_bit", 1, 32),
            plan=None if cfg.get("plan") is None else Path(text(cfg["plan"], "plan")),
        )

    @property
    def are_float(self) -> bool:
        """Whether every tensor stays in float."""
        return (
            self.weights in (None, 32) and self.inputs in (None, 32) and self.ends in (None, 32) and self.plan is None
        )


def _widths(value: Any, key: str) -> Any:
    """Returns widths after a check of each; whether lists and patterns fit is known once there is a network."""
    if isinstance(value, Mapping):
        each = {f"{key}[{pattern}]": bits for pattern, bits in value.items()}
    elif isinstance(value, list | tuple):
        each = {f"{key}[{i}]": bits for i, bits in enumerate(value) if bits != "..." or i != len(value) - 1}
    else:
        each = {key: value}
    for where, bits in each.items():
        width(bits, where)
    return value


@dataclass(frozen=True)
class Integers:
    """Settings of the network's integer program: rounding, proof, accumulators and export."""

    rounding: str = (
        "float"  # float | integer: the evaluated network rounds with real scales, or like its integer program
    )
    evaluate: str = (
        "float"  # float | codes: products of the evaluated network in float32, or on integer codes where that is exact
    )
    verify: int = 0  # number of images that the program is proved on
    accumulator: Sequence[int] = ()  # accumulator widths whose accuracy is measured
    export: str | None = None  # the form in which a finished run is exported
