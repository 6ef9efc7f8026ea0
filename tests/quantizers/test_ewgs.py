"""EWGS: published vectors, closed-form gradients, delta from a Hessian that is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qexp.callbacks.curvature import Curvature
from qexp.errors import QexpError
from qexp.layers.swap import swap
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.ewgs import EWGSInput, EWGSWeight
from qexp.quantizers.uniform import Uniform
from qexp.statistics.stats import TensorStats


def near(got: Tensor, *expected: float) -> None:
    assert got.detach().flatten().tolist() == pytest.approx(expected, abs=2e-6, rel=2e-6)


def made(kind, bits: int, low: float, high: float, **options):
    q = kind(bits, (5,), **options)
    q.fit(TensorStats.of(torch.tensor([0.0, 1.0])))
    with torch.no_grad():
        q.low.fill_(low)
        q.high.fill_(high)
    return q


def test_the_rounding_vector():
    x = torch.tensor([0, 0.1, 0.2, 0.34, 0.49, 0.6, 0.9, 1]).requires_grad_()
    g = torch.tensor([1, 1, -1, 0.5, -2, 1, -0.5, 2])
    q = made(EWGSInput, 2, 0, 1, delta=0.2)
    y = q(x)
    (y * g).sum().backward()
    near(y, 0, 0, 1 / 3, 1 / 3, 1 / 3, 2 / 3, 1, 1)
    near(x.grad, 1, 1.02, -1.026667, 0.5006667, -1.937333, 0.9866667, -0.51, 2)


def test_the_weight_vector():
    w = torch.tensor([-0.9, -0.3, 0.05, 0.45, 1.1]).requires_grad_()
    g = torch.tensor([1, -1, 0.5, 1, -2])
    q = made(EWGSWeight, 2, -0.6, 0.6, delta=0.5)
    with torch.no_grad():
        q.c.fill_(1)
    near(q.unit(w), 0, 0.25, 0.5416667, 0.875, 1)
    y = q(w)
    (y * g).sum().backward()
    near(y, -1, -1 / 3, 1 / 3, 1, 1)
    near(w.grad, 0, -1.736111, 0.78125, 1.5625, 0)
    near(q.high.grad, -1.356337)
    near(q.low.grad, 0.7486979)
    near(q.c.grad, -1 + 1 / 3 + 0.5 / 3 + 1 - 2)


def test_without_delta_it_is_straight_through():
    x = torch.linspace(-0.2, 1.2, 15).requires_grad_()
    made(EWGSInput, 3, 0, 1, delta=0.0)(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([float(0 <= v <= 1) for v in x.tolist()])


def test_limits_of_an_input_get_what_its_levels_carry():
    x, g = torch.tensor([-0.5, 0.3, 0.7, 2.0]), torch.tensor([1.0, 2.0, -1.0, 0.5])
    q = made(EWGSInput, 1, 0, 1, delta=0.0)
    (q(x) * g).sum().backward()
    # du = sum g x_q - inside g x_n; dl = sum g (1 - x_q) + inside g (x_n - 1); codes 0, 0, 1, 1
    near(q.high.grad, (-1 + 0.5) - (2 * 0.3 - 0.7))
    near(q.low.grad, (1 + 2) + (2 * (0.3 - 1) - (0.7 - 1)))


def test_starts():
    q = EWGSInput(2, (6,))
    q.fit(TensorStats.of(torch.tensor([0, 0.2, 0.5, 0, 1.1, 0.3])))
    near(q.high, 2.057968)
    w = torch.randn(4, 3, 3, 3)
    q = EWGSWeight(4, tuple(w.shape))
    q.fit(TensorStats.of(w))
    near(q.high, 3 * float(w.std()))
    near(q.low, -3 * float(w.std()))
    assert (q(w) - w)[w.abs() < q.high.item()].abs().max() <= q.scale.item() / 2 + 1e-6, "the size is kept"


def test_one_bit_is_a_sign_with_a_learned_threshold():
    q = made(EWGSWeight, 1, -0.2, 0.6)
    w = torch.tensor([-0.1, 0.1, 0.19, 0.21, 0.5])
    assert q.codes(w).tolist() == [0, 0, 0, 1, 1]


def test_delta_is_cut_where_gradients_would_turn_round():
    q = EWGSInput(1, (1,), delta="hessian")
    assert float(q.delta) == 0 and q.set_delta(5.0) == pytest.approx(1.9)
    other = EWGSInput(1, (1,), delta="hessian")
    other.load_state_dict(q.state_dict())
    assert other._delta == pytest.approx(1.9)


def test_limits_stay_apart():
    q = made(EWGSInput, 2, 0, 1)
    with torch.no_grad():
        q.high.fill_(-1)
    assert float(q.must_stay_positive()) < 0
    q.on_optimizer_step(None)
    assert float(q.must_stay_positive()) > 0


def test_delta_follows_from_trace_and_gradient():
    g = torch.tensor([0.1, -0.2, 0.05, 0.3, -0.15, 0])
    assert max(0.0, 3 / 6 / (3 * float(g.std()))) == pytest.approx(0.9221389, abs=1e-6)


def test_the_hessian_of_a_linear_layer_is_found():
    """The loss mean((X w - t)^2) has the Hessian 2 X'X / n in the quantized weight, for every weight."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 1, bias=False)
    weight = EWGSWeight(4, (1, 3), delta="hessian")
    other = Uniform(8, (1, 3))
    x, t = torch.randn(64, 3), torch.randn(64, 1)
    swap(layer, {"weight": weight, "input": other})
    weight.fit(TensorStats.of(layer.weight))
    other.fit(TensorStats.of(x))
    model = nn.Sequential(layer)
    curvature = Curvature(vectors=400, tolerance=0.0)

    def loss(y: Tensor) -> Tensor:
        return (y - t).square().mean()

    found = curvature.measure(model, loss, x)["0 (weight)"]
    w = weight(layer.weight).detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(x @ w.T), w)
    exact = float(2 * x.square().sum() / 64 / 3 / (3 * g.std()))
    assert found == pytest.approx(exact, rel=0.05)
    assert layer.input_quantizer is other, "other methods' quantizers are back"
    curvature._seen = [{"0 (weight)": found}, {"0 (weight)": 3 * found}]
    curvature.put(model)
    assert float(weight.delta) == pytest.approx(min(2 * found, 0.95 * 30), rel=1e-5)


def test_delta_is_measured_while_training(run, tmp_path):
    metrics = run(
        "schedule=qat", "quant=ewgs", "bits=w2a2", "callbacks=ewgs", "callbacks.curvature.every=1", "study=s",
        "callbacks.curvature.vectors=2", "quant.weight.delta=hessian", "quant.input.delta=hessian",
        "trainer.limit_train_batches=2", "schedule.epochs=2",
    )  # fmt: skip
    assert metrics["status"] == "ok", metrics["error"]
    folder = tmp_path / "runs" / "s" / metrics["point"]
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    deltas = [float(v) for k, v in state.items() if k.endswith("quantizer.delta")]
    assert len(deltas) > 3 and all(d >= 0 for d in deltas) and max(deltas) > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: EWGSWeight(9, (4,)),
        lambda: EWGSWeight(2, (4,), delta="auto"),
        lambda: EWGSInput(2, (4,), delta=-1.0),
        lambda: EWGSInput(2, (4,), rounding="floor"),
        lambda: EWGSWeight(2, (4, 1), granularity=PerChannel(0)),
        lambda: Curvature(every=0),
    ],
)
def test_what_is_not_allowed_is_refused(make):
    with pytest.raises(QexpError, match="allowed"):
        make()
