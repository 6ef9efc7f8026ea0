"""Activation correction: its vector, every batch, and the flag that no hardware can do it."""

import copy
import pickle

import pytest
import torch

from qexp.errors import QexpError
from qexp.layers.swap import bake
from qexp.passes.activation_correction import ActivationCorrection, restore_mean
from qexp.passes.base import PassContext
from tests.passes.test_weight_correction import network


def test_activation_vector():
    """V2.3-a: 2-bit half range, s = 0.3."""
    x = torch.tensor([-0.5, 0.2, 0.9, 1.4, -0.1, 0.35]).reshape(6, 1)
    quantized = torch.tensor([0, 0.3, 0.9, 0.9, 0, 0.3]).reshape(6, 1)
    found = restore_mean(x, quantized).flatten().tolist()
    assert found == pytest.approx([0, 0.4125, 1.0125, 1.0125, 0, 0.4125], abs=1e-6)


def test_activations_are_restored_in_every_batch_and_flagged():
    net, _, context = network()
    ActivationCorrection().on_fitted(net, context)
    assert context.findings["hardware"].startswith("not_mappable")
    x = torch.randn(4, 3, 8, 8)
    for twin in (copy.deepcopy(net[0]), pickle.loads(pickle.dumps(net[0]))):
        assert torch.equal(twin(x), net[0](x))
    seen = {}
    net[0].output_quantizer.register_forward_hook(lambda q, args, y: seen.update(x=args[0], y=y))
    net(torch.randn(4, 3, 8, 8))
    positive = (seen["y"] > 0).float().mean((0, 2, 3)) > 0.2
    torch.testing.assert_close(
        seen["y"].mean((0, 2, 3))[positive], seen["x"].relu().mean((0, 2, 3))[positive], atol=0.1, rtol=0.1
    )


def test_no_output_before_a_relu_is_an_error():
    net, structure, _ = network()
    bake(net[0])
    with pytest.raises(QexpError, match="no quantized output"):
        ActivationCorrection().on_fitted(net, PassContext(structure, [], {}))
