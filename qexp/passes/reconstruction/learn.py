"""The optimization of one unit: roundings, activation steps, or both, against the float network's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.passes.reconstruction.rounding import Annealing, SoftRounding, regularizer
from qexp.passes.reconstruction.store import Samples
from qexp.quantizers.base import Quantizer
from qexp.system.within import hooked

CHECK = 50  # iterations between reads of the loss: each read waits for the device
PATIENCE = 10  # reads without progress after which learning of steps alone ends


@dataclass(frozen=True)
class Options:
    """How a unit is learned.

    Attributes:
        iterations: Most steps of Adam.
        batch: Samples per step.
        lr: Learning rate of the rounding variables.
        strength: Factor of the regularizer (lambda).
        warmup: Share of the iterations without it.
        beta: Its exponent at the start and the end.
        step_lr: Learning rate of activation steps, falling to zero on a cosine; 0 leaves them.
        exponent: Exponent of the error (2: squared).
        drop_prob: Probability that an element of an activation is quantized.
    """

    iterations: int
    batch: int = 32
    lr: float = 1e-2
    strength: float = 0.01
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    step_lr: float = 0.0
    exponent: float = 2.0
    drop_prob: float = 1.0


@dataclass(frozen=True)
class Task:
    """The target of one unit.

    Attributes:
        name: Name of the unit, for messages.
        run: The unit: input to output.
        x: Inputs from the quantized network.
        x_float: Inputs from the float network, where the two are mixed.
        y: The float network's outputs.
        importance: Weight of each output value; None weights all equally.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    x: Samples
    y: Samples
    x_float: Samples | None = None
    importance: Samples | None = None


def distance(y: Tensor, target: Tensor, exponent: float = 2.0, importance: Tensor | None = None) -> Tensor:
    """Returns the mean over samples and positions of the errors summed over channels (dimension 1), a scalar."""
    error = (y - target).square() if exponent == 2 else (y - target).abs().pow(exponent)
    return (error if importance is None else error * importance).sum(1).mean()


@torch.no_grad()
def total(task: Task, options: Options, device: torch.device) -> float:
    """Returns the unit's current error over all samples, with everything quantized that is quantized in the end."""
    error = 0.0
    for i in range(0, len(task.x), options.batch):
        part = slice(i, i + options.batch)
        y = task.run(task.x[part].to(device))
        weights = None if task.importance is None else task.importance[part].to(device)
        error += float(distance(y, task.y[part].to(device), options.exponent, weights)) * len(y)
    return error / len(task.x)


def batches(n: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields batches of indices without end: each epoch in a new order, without an incomplete last batch."""
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: n - n % batch].split(batch)


def mixed(quantized: Tensor, floating: Tensor, prob: float, generator: torch.Generator) -> Tensor:
    """Returns the quantized value with probability `prob` (to 1/65536) and the float one otherwise, element by element."""
    n, layout = quantized.numel(), torch.empty_like(quantized).stride()
    draws = torch.empty((n + 3) // 4, dtype=torch.int64, device=quantized.device)  # four elements per random number
    draws.random_(-(2**63), None, generator=generator)
    taken = draws.view(torch.int16)[:n].as_strided(quantized.shape, layout) < round(prob * 65536) - 32768
    # exact at the weights 0 and 1, and several times as fast as torch.where
    return torch.lerp(floating, quantized, taken.to(quantized.dtype))


@contextmanager
def dropping(quantizers: list[Quantizer], prob: float, generator: torch.Generator) -> Iterator[None]:
    """Context manager: each quantizer leaves elements float with probability `1 - prob`; at 1 it changes and draws nothing."""
    dropped = quantizers if prob < 1 else []
    with hooked(q.register_forward_hook(lambda _, args, y: mixed(y, args[0], prob, generator)) for q in dropped):
        yield


def learn(
    task: Task,
    roundings: list[SoftRounding],
    steps: list[nn.Parameter],
    activations: list[Quantizer],
    options: Options,
    generator: torch.Generator,
    tick: Callable[[int, float], None],
) -> int:
    """Learns in place and returns the number of iterations.

    It ends early when nothing can change any more: every rounding is at 0 or 1 (where its gradient vanishes), or, with steps alone,
    the error has stopped falling.

    Args:
        task: The unit.
        roundings: Its rounding variables.
        steps: Its learned activation steps.
        activations: Its quantizers on activations.
        options: How.
        generator: Of the random numbers.
        tick: Called with the number of iterations done since the last call and the error.

    Raises:
        QexpError: The error is not finite.
    """
    anneal = Annealing(options.iterations, options.warmup, *options.beta)
    groups = [{"params": [r.v for r in roundings], "lr": options.lr}, {"params": steps, "lr": options.step_lr}]
    used = [dict(g) for g in groups if g["params"]]
    optimizer = torch.optim.Adam([dict(g) for g in used], fused=True)
    device = used[0]["params"][0].device
    noise = torch.Generator(device).manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    falling = {True: lambda k: 0.5 + 0.5 * math.cos(math.pi * k / options.iterations), False: lambda _: 1.0}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [falling[g["params"] is steps] for g in used])
    order, prob = batches(len(task.x), options.batch, generator), options.drop_prob
    best, idle, seen = float("inf"), 0, torch.zeros((), device=device)
    with torch.enable_grad(), dropping(activations, prob, noise):
        for step in range(options.iterations):
            index = next(order)
            x = task.x[index].to(device)
            if task.x_float is not None and prob < 1:
                x = mixed(x, task.x_float[index].to(device), prob, noise)
            weights = None if task.importance is None else task.importance[index].to(device)
            error = distance(task.run(x), task.y[index].to(device), options.exponent, weights)
            loss = error
            if roundings and anneal.active(step):
                beta = anneal.beta(step)
                loss = error + options.strength * sum(regularizer(r.h(), beta) for r in roundings)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            for quantizer in activations:
                quantizer.on_optimizer_step(None)
            seen += error.detach()
            if (step + 1) % CHECK and step + 1 < options.iterations:
                continue
            since = step % CHECK + 1
            mean, seen = float(seen) / since, torch.zeros((), device=device)
            tick(since, mean)
            if not mean < float("inf"):
                raise QexpError(
                    f"{task.name}: the reconstruction error is {mean} after {step + 1} iterations; lower lr or step_lr, "
                    "or look at the calibration images and the float network"
                )
            idle = 0 if mean < 0.999 * best else idle + 1
            best = min(best, mean)
            settled = roundings and anneal.active(step) and not any(r.undecided() for r in roundings)
            if (settled and not steps) or (not roundings and idle >= PATIENCE):
                return step + 1
    return options.iterations
