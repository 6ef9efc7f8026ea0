"""INQ: the published vector, thresholds, ties, and weights that stay frozen to the bit."""

import copy

import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.layers.swap import swap
from qexp.quantizers.power_of_two import INQ, nearest_exponent
from qexp.statistics.stats import TensorStats

W = torch.tensor([0.9, -0.31, 0.12, 0.02, 0.01, 0.2, -0.05])


def fitted(w: torch.Tensor, bits: int = 4, **options) -> INQ:
    q = INQ(bits, tuple(w.shape), **options)
    q.fit(TensorStats.of(w))
    return q


@pytest.mark.parametrize("underflow, fifth", [("source", 0.0), ("paper", 0.015625)])
def test_values_as_published(underflow, fifth):
    q = fitted(W, underflow=underflow)
    assert q(W).tolist() == [1, -0.25, 0.125, 0.015625, fifth, 0.25, -0.0625]
    assert q.n1.item() == 0 and q.levels == 15


@pytest.mark.parametrize("underflow, share", [("source", 0.75), ("paper", 0.5)])
def test_the_least_level_begins_where_the_rule_says(underflow, share):
    q, least = fitted(torch.tensor([1.0]), underflow=underflow), 2.0**-6
    edge = torch.tensor(share * least)
    assert q(edge).item() == least and q(torch.nextafter(edge, torch.tensor(0.0))).item() == 0


def test_exponents_are_exact_at_every_midpoint():
    for e in range(-60, 60):
        edge = torch.tensor(0.75 * 2.0**e)
        assert nearest_exponent(edge).item() == e
        assert nearest_exponent(torch.nextafter(edge, torch.tensor(0.0))).item() == e - 1


@pytest.mark.parametrize("exponents, bits, levels", [("source", 4, 15), ("paper", 4, 9), ("paper", 5, 17), (3, 4, 7)])
def test_the_number_of_exponents(exponents, bits, levels):
    w = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    q = fitted(w, bits, exponents=exponents)
    assert q.levels == levels == len(q(torch.cat([w, w * 1e-3])).unique())


def test_gradient_is_one_below_the_last_midpoint():
    x = torch.tensor([0.1, -1.4999, 1.5, -2.0], requires_grad=True)
    q = fitted(W)
    q(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_all_zero_and_tiny_tensors_are_zero():
    for w in (torch.zeros(5), torch.full((5,), 1e-41)):
        assert fitted(w)(w).tolist() == [0] * 5


@pytest.mark.parametrize(
    "options",
    [
        {"exponents": 8},
        {"exponents": "all"},
        {"underflow": "never"},
        {"fractions": [0.5]},
        {"fractions": [0.6, 0.3, 1]},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(QexpError, match="INQ"):
        INQ(4, (3,), **options)


def test_wide_weights_are_refused():
    with pytest.raises(QexpError, match=r"bits=8; allowed are 2\.\.7"):
        INQ(8)


class Training:
    """A linear layer with INQ weights, trained by SGD with momentum and weight decay, which are notified of each step."""

    def __init__(self, steps: int, fractions=(0.3, 0.6, 1.0)) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(10, 10)
        self.q = fitted(self.layer.weight.data, fractions=fractions)
        swap(self.layer, {"weight": self.q})
        self.optimizer = torch.optim.SGD(self.layer.parameters(), 0.5, momentum=0.9, weight_decay=0.1)
        self.total = steps
        self.layer.before_training(steps)

    def step(self) -> None:
        self.optimizer.zero_grad()
        x = torch.randn(8, 10)
        (self.layer(x) - x.flip(1)).square().mean().backward()
        self.optimizer.step()
        self.layer.after_optimizer_step()


def test_the_largest_are_frozen_first_and_stay_to_the_bit():
    t = Training(12)
    assert int(t.q.frozen.sum()) == 30
    start = t.layer.weight.detach().clone()
    assert torch.equal(t.q.dequantize(t.q.codes(start))[t.q.frozen], start[t.q.frozen])
    assert start[t.q.frozen].abs().min() >= start[~t.q.frozen].abs().max() / 1.5, "rounding alone can swap neighbours"
    for _ in range(3):
        t.step()
    now = t.layer.weight.detach()
    assert torch.equal(now[t.q.frozen], start[t.q.frozen]), "neither momentum nor weight decay moves them"
    assert not torch.equal(now[~t.q.frozen], start[~t.q.frozen])
    assert torch.equal(t.layer.quantized_weight(), now), "what is not frozen is still computed with in float"


def test_the_fractions_follow_the_steps_and_all_end_on_levels():
    t, counts, first = Training(12), [], None
    n1 = t.q.n1.clone()
    for _ in range(12):
        t.step()
        counts.append(int(t.q.frozen.sum()))
        first = t.layer.weight.detach().clone() if counts[-1] == 60 and first is None else first
    assert counts == [30] * 3 + [60] * 4 + [100] * 5
    weight = t.layer.weight.detach()
    assert torch.equal(t.q(weight), weight) and torch.equal(t.q.n1, n1), "n1 stays as the first step set it"
    assert len(weight.unique()) <= t.q.levels


def test_an_interrupted_training_goes_on_to_the_same_weights():
    whole, part = Training(12), Training(12)
    torch.manual_seed(1)
    for _ in range(12):
        whole.step()
    torch.manual_seed(1)
    for _ in range(5):
        part.step()
    state, momentum = copy.deepcopy(part.layer.state_dict()), copy.deepcopy(part.optimizer.state_dict())
    random = torch.get_rng_state()
    resumed = Training(12)
    resumed.layer.load_state_dict(state)
    resumed.optimizer.load_state_dict(momentum)
    resumed.layer.before_training(12)
    torch.set_rng_state(random)
    for _ in range(7):
        resumed.step()
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_training_on_digits_ends_with_powers_of_two(run, tmp_path):
    metrics = run("quant=inq", "bits=w4a8", "schedule=qat", "schedule.epochs=1", "bn=keep")
    assert metrics["status"] == "ok", metrics["error"]
    checkpoint = next((tmp_path / "runs").rglob("last.ckpt"))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    frozen = {k: v for k, v in state.items() if k.endswith("weight_quantizer.frozen")}
    assert len(frozen) == 5 and all(bool(v.all()) for v in frozen.values())
    weight = state["model.conv2.weight"]
    assert torch.equal(torch.frexp(weight[weight != 0].abs()).mantissa.unique(), torch.tensor([0.5]))
