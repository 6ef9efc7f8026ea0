"""Sharpness-aware training: takes the gradient where the loss is worst in a small ball around the quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.system import ranks
from qexp.system.within import hooked

VARIANTS = ("qsam", "asam")


class SharpnessAware:
    """Makes two passes per step: `eps = rho g / |g|` from the first, the gradients of the second at `w_q + eps`.

    g is the gradient of the loss with respect to the quantized weights of all layers, and |g| one norm over all of them. `asam`:
    `eps = rho t^2 g / |t g|` with `t = |w_q| + eta`, element by element. Gradients of the second pass reach the float weights through the
    quantizers. Batch norms count the first pass alone, and both passes draw the same random numbers.

    Args:
        rho: Radius of the ball; 0 is the same as no SAM.
        places: Returns the modules of a network whose results are the quantized weights.
        variant: `qsam` or `asam`.
        eta: The constant of `asam`.

    Source: Liu, Cai, Zhuang 2021, "Sharpness-aware quantization" (arXiv 2111.12273), equations 6-9; `asam`: Kwon et al. 2021 (arXiv
    2102.11600).
    Differs from the paper: only weights are moved, not batch norms; weights are standardised only where the method does so.
    """

    def __init__(
        self, rho: float, places: Callable[[nn.Module], Sequence[nn.Module]], variant: str = "qsam", eta: float = 0.01
    ) -> None:
        if isinstance(rho, bool) or not (isinstance(rho, int | float) and rho >= 0):
            raise QexpError(
                f"schedule.sam.rho={rho!r} is not allowed; use a number of at least 0, such as 0.4 (or sam: null)"
            )
        if variant not in VARIANTS:
            raise QexpError(f"schedule.sam.variant={variant!r} is not allowed; use {', '.join(VARIANTS)}")
        if not eta > 0:
            raise QexpError(f"schedule.sam.eta={eta} is not allowed; use a number above 0, such as 0.01")
        self.rho, self.places, self.variant, self.eta = float(rho), places, variant, float(eta)

    def loss(self, model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
        """Returns the loss of the second pass, which can be differentiated; `loss()` runs the model once."""
        places = list(self.places(model))
        if not places:
            raise QexpError(
                "schedule.sam: no weight is quantized, so there is nothing to move; choose schedule.sam=null"
            )
        random = torch.get_rng_state()
        on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        with _watched(places) as seen:
            first = loss()
        weights = [seen[id(place)] for place in places if id(place) in seen]
        moves = self.moves(torch.autograd.grad(first, weights), [w.detach() for w in weights])
        torch.set_rng_state(random)
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)
        with _moved([p for p in places if id(p) in seen], moves), _norms_kept(model):
            return loss()

    @torch.no_grad()
    def moves(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Returns eps of each tensor."""
        grads = [ranks.mean(g) for g in grads]
        if self.variant == "asam":
            sizes = [w.abs() + self.eta for w in weights]
            norm = _norm([t * g for t, g in zip(sizes, grads)])
            return [self.rho * t.square() * g / norm for t, g in zip(sizes, grads)]
        norm = _norm(grads)
        return [self.rho * g / norm for g in grads]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.float().square().sum() for t in tensors]).sum().sqrt() + 1e-12


@contextmanager
def _watched(places: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Yields a dictionary that receives, inside the block, the result of each module, by the module's id."""
    seen: dict[int, Tensor] = {}

    def keep(module: nn.Module, _: object, y: Tensor) -> Tensor:
        return seen.setdefault(id(module), y)  # a layer called again computes with the same tensor

    with hooked(place.register_forward_hook(keep) for place in places):
        yield seen


@contextmanager
def _moved(places: Sequence[nn.Module], moves: Sequence[Tensor]) -> Iterator[None]:
    """Adds, inside the block, a move to the result of each module."""
    with hooked(p.register_forward_hook(lambda _, __, y, eps=eps: y + eps) for p, eps in zip(places, moves)):
        yield


@contextmanager
def _norms_kept(model: nn.Module) -> Iterator[None]:
    """Keeps the running statistics of batch norms unchanged inside the block."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m, name, m._buffers[name]) for m in norms for name in names if m._buffers.get(name) is not None]
    # put back as another tensor, since the backward pass needs the one it saw, unchanged
    for norm, name, kept in before:
        norm._buffers[name] = kept.clone()
    try:
        yield
    finally:
        for norm, name, kept in before:
            norm._buffers[name] = kept
