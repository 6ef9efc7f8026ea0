"""On a GPU, a training step queues its work and never waits for a result.

No GPU is needed: a step on fake tensors, which have shapes but no values, raises wherever it reads a value back.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qexp.errors import QexpError
from tests.quantizers.test_contract import RECIPES
from tests.quantizers.test_golden import tensor

WAITS = (DataDependentOutputException, DynamicOutputShapeException)


def fake(module: torch.nn.Module, device: str) -> None:
    """Replaces every parameter and buffer by a fake one on a device, in place."""
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, value in tensors.items():
                if value is None:
                    continue
                made = torch.empty(value.shape, dtype=value.dtype, device=device)
                tensors[name] = torch.nn.Parameter(made, value.requires_grad) if tensors is owner._parameters else made


def step(quantizer: torch.nn.Module, shape: torch.Size) -> None:
    """Runs a forward and a backward pass and what follows an optimizer step."""
    x = torch.empty(shape, requires_grad=True)
    y = quantizer(x)
    y.backward(torch.empty(y.shape))
    if callable(after := getattr(quantizer, "on_optimizer_step", None)):
        with torch.no_grad():
            after(x.detach())


class Copies(TorchDispatchMode):
    """Counts the tensors that travel between the processor and the device; a copy to the device waits for it too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor)]
        if isinstance(out, torch.Tensor) and given and given[0].device != out.device:
            self.found.append(str(func))
        return out


def prepared(fitted, name: str) -> torch.nn.Module:
    site, spec = RECIPES[name]
    for bits in (4, 2, 1, 8):
        try:
            quantizer = fitted(spec, bits, tensor(site), site).train()
            if callable(start := getattr(quantizer, "on_training_start", None)):
                start(tensor(site), 100)
            return quantizer
        except QexpError:
            continue
    raise AssertionError(f"{name}: no width fits")


def test_fake_tensors_show_a_wait():
    with FakeTensorMode(), pytest.raises(WAITS):
        torch.ones(3).sum().item()
    with FakeTensorMode(), pytest.raises(WAITS):
        torch.ones(3)[torch.ones(3) > 0]


def test_a_number_that_is_sent_to_the_device_is_found():
    with FakeTensorMode(), Copies() as copies:
        torch.full((3,), 0.5, device="cuda")
        assert copies.found == []
        torch.tensor(0.5, device="cuda")
        assert len(copies.found) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_step_reads_no_value_back(name, fitted):
    quantizer = prepared(fitted, name)
    with FakeTensorMode():
        fake(quantizer, "cpu")
        step(quantizer, tensor(RECIPES[name][0]).shape)


@pytest.mark.parametrize("name", RECIPES)
def test_a_forward_pass_copies_nothing_to_or_from_the_device(name, fitted):
    quantizer = prepared(fitted, name)
    with FakeTensorMode():
        fake(quantizer, "cuda")
        x = torch.empty(tensor(RECIPES[name][0]).shape, device="cuda")
        with torch.no_grad(), Copies() as copies:
            quantizer(x)
    assert copies.found == []
