"""SAWB: the clip from two moments, against hand-computed values and against the best clip of a search."""

import pytest
import torch

from qexp.quantizers.sawb import SAWB

WEIGHTS = torch.tensor([-1.0, -0.2, 0.1, 0.6])  # E[w^2] = 0.3525, E|w| = 0.475


@pytest.mark.parametrize(
    ("bits", "clip"),
    # c1 sqrt(0.3525) - c2 0.475 is 0.8720, 1.1845, 1.4484, 1.6786; none may exceed max|w| = 1
    [(2, 0.8720), (3, 1.0), (4, 1.0), (5, 1.0)],
)
def test_the_outermost_level_is_the_clip(bits, clip):
    out = SAWB(bits, (4,))(WEIGHTS)
    assert out[0].item() == pytest.approx(-clip, abs=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_on_normal_weights_the_clip_is_close_to_the_best_one(bits):
    weights = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    steps = 2**bits - 1

    def error(clip: float) -> float:
        code = ((weights.clamp(-clip, clip) + clip) * steps / (2 * clip)).round()
        return float((weights - (2 * code / steps - 1) * clip).square().mean())

    best = min(error(clip / 100) for clip in range(80, 400, 2))
    ours = float((SAWB(bits, (200_000,))(weights) - weights).square().mean())
    assert best * 0.999 <= ours < best * 1.05
