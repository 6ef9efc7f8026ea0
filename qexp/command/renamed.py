"""Former names of choices, and former choices that are now an option of another choice."""

from __future__ import annotations

_PLACED = ("toynet", "resnet20", "mobilenetv2")

RENAMED: dict[str, dict[str, str]] = {  # group -> former name -> name
    "quant": {
        **{f"{net}_{method}": f"placed/{net}/{method}" for net in _PLACED for method in ("dorefa", "pact", "mpact")},
        "toynet_mpact_integer_bn": "placed/toynet/mpact_integer_bn",
        **{f"aciq_{rung}": f"ladder/aciq/{rung}" for rung in ("naive", "clip", "alloc", "bias", "full")},
        "aciq_source": "sources/cnn_quantization",
        "fixed_point_source": "sources/imagenet_cnn_quantization",
        **{f"playground_{levels}": f"sources/playground/{levels}" for levels in ("minmax", "log", "tanh")},
        "pact_in_step": "sources/quantized_resnet/pact_in_step",
        "pact_fixed": "sources/pact_quantization/fixed_clips",
    },
    "bits": {
        **{f"toynet_{name}": f"placed/toynet/{name}" for name in ("cfg1", "cfg1s", "cfg2", "cfg3")},
        **{f"mobilenetv2_{name}": f"placed/mobilenetv2/{name}" for name in ("cfg1", "cfg1s")},
        **{f"{net}_uniform{n}": f"placed/{net}/uniform{n}" for net in ("resnet20", "mobilenetv2") for n in (4, 6, 8)},
    },
    "model": {"squeezenet_v0": "squeezenet1_0", "squeezenet_v1": "squeezenet1_1"},
}

OPTIONS: dict[str, dict[str, str]] = {  # group -> former name -> what to type
    "quant": {
        "aciq_exact": "quant=aciq quant.input.range.alpha=exact",
        "aciq_gauss": "quant=aciq quant.input.range.prior=gauss",
        "lsq_channel": "quant=lsq quant.weight.granularity=channel",
        "lsq_plus_channel": "quant=lsq_plus quant.weight.granularity=channel",
        "minmax_avg": "quant=minmax +quant.input.range.over=batches",
        "moving_average": "quant=minmax quant.input.range._target_=qexp.ranges.MovingAverage",
    }
}


def answer(group: str, names: list[str]) -> str | None:
    """Returns what to type instead of former names; None where no name is a former one.

    >>> answer("quant", ["toynet_pact", "lsq"])
    'write quant=placed/toynet/pact,lsq'
    >>> answer("quant", ["lsq_channel"])
    'write quant=lsq quant.weight.granularity=channel'
    """
    option = next((OPTIONS[group][name] for name in names if name in OPTIONS.get(group, {})), None)
    if option is not None:
        return f"write {option}"
    known = RENAMED.get(group, {})
    if not any(name in known for name in names):
        return None
    return f"write {group}={','.join(known.get(name, name) for name in names)}"
