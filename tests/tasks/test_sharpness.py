"""Sharpness-aware training: published vectors, what the second pass sees and leaves alone, rho = 0 is plain training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.tasks.sharpness import SharpnessAware


def test_moves_are_the_published_ones():
    g = [torch.tensor([0.3, -0.4]), torch.tensor([0, 1.2])]
    w = [torch.tensor([0.5, -0.25]), torch.tensor([1.0, -1.0])]
    first, second = SharpnessAware(0.4, list).moves(g, w)
    assert first.tolist() == pytest.approx([0.09230769, -0.1230769])
    assert second.tolist() == pytest.approx([0, 0.3692308])
    assert (w[0] + first).tolist() == pytest.approx([0.5923077, -0.3730769])
    assert (w[1] + second).tolist() == pytest.approx([1, -0.6307692])
    first, second = SharpnessAware(0.4, list, "asam", 0.01).moves(g, w)
    assert first.tolist() == pytest.approx([0.02545761, -0.008821913])
    assert second.tolist() == pytest.approx([0, 0.3993743])


class Weighted(nn.Module):
    """A linear layer whose weight passes through a module, a batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.place = nn.Parameter(torch.randn(3, 4)), nn.Identity()
        self.norm, self.dropout = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x):
        return self.norm(self.dropout(nn.functional.linear(x, self.place(self.weight))))


def step(sam: SharpnessAware | None) -> tuple[Weighted, torch.Tensor]:
    model, x = Weighted(), torch.linspace(-1, 1, 32).reshape(8, 4)

    def loss():
        return model(x).exp().square().mean()

    torch.manual_seed(1)
    value = loss() if sam is None else sam.loss(model, loss)
    value.backward()
    return model, value


def test_a_ball_without_radius_is_plain_training_bit_for_bit():
    (plain, value), (model, same) = step(None), step(SharpnessAware(0.0, lambda m: [m.place]))
    assert torch.equal(value, same) and torch.equal(plain.weight.grad, model.weight.grad)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert int(model.norm.num_batches_tracked) == 1


def test_the_second_pass_is_worse_and_the_weights_stay():
    (plain, value), (model, worse) = step(None), step(SharpnessAware(0.5, lambda m: [m.place]))
    assert float(worse.detach()) > float(value.detach()), "the same dropout, other weights"
    assert torch.equal(plain.weight, model.weight) and not torch.equal(plain.weight.grad, model.weight.grad)
    assert torch.equal(plain.norm.running_mean, model.norm.running_mean), "batch norms count the first pass alone"
    assert not model.place._forward_hooks


def test_the_gradient_is_that_at_the_moved_weights():
    rho, (plain, _) = 0.5, step(None)
    model, _ = step(SharpnessAware(rho, lambda m: [m.place]))
    moved = Weighted()
    with torch.no_grad():
        moved.weight.add_(rho * plain.weight.grad / plain.weight.grad.norm())
    torch.manual_seed(1)
    moved(torch.linspace(-1, 1, 32).reshape(8, 4)).exp().square().mean().backward()
    assert torch.allclose(moved.weight.grad, model.weight.grad, atol=1e-5)


def test_a_network_without_quantized_weights_is_refused():
    with pytest.raises(QexpError, match="no weight is quantized"):
        step(SharpnessAware(0.1, lambda _: []))


@pytest.mark.parametrize(
    "options", [{"rho": -1.0}, {"rho": True}, {"rho": 1.0, "variant": "sam"}, {"rho": 1.0, "eta": 0}]
)
def test_what_is_not_allowed_is_refused(options):
    with pytest.raises(QexpError, match=r"schedule.sam.* is not allowed"):
        SharpnessAware(places=list, **options)


def test_a_run_with_a_radius_trains_otherwise_and_one_without_trains_the_same(run, tmp_path):
    few = ("quant=lsq", "bits=w2a2", "trainer.limit_train_batches=3", "schedule.epochs=1", "study=s")

    def weights(metrics):
        assert metrics["status"] == "ok", metrics["error"]
        folder = tmp_path / "runs" / "s" / metrics["point"]
        return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["model.conv2.weight"]

    plain, none = run("schedule=qat", *few), run("schedule=sam", *few, "schedule.sam.rho=0")
    sharp = run("schedule=sam", *few, "schedule.sam.variant=asam")
    assert torch.equal(weights(plain), weights(none)) and not torch.equal(weights(plain), weights(sharp))
    assert sharp["quant"] == "lsq + sharpness-aware" and plain["quant"] == "lsq"
