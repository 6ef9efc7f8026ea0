"""Calibration statistics of each tensor that may carry a quantizer, by layer and site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qexp.numerics.granularity import PerChannel
from qexp.statistics.collectors import Collector, DifferentShapes, merged, synced
from qexp.statistics.stats import TensorStats, look, together


@dataclass
class SiteStats:
    """Statistics of one activation: of the whole tensor (with a histogram), of each channel, and of each collector, by name.

    All calls of a layer add to one summary. Where the calls have different numbers of channels, there is no summary per channel:
    `channel` is empty. The value of a collector that cannot merge calls of different shapes is an empty tensor.
    """

    tensor: TensorStats = field(default_factory=TensorStats)
    channel: TensorStats = field(default_factory=lambda: TensorStats(PerChannel(1), 0))
    extra: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def update(self, x: Tensor, collectors: Sequence[Collector] = (), axis: int = 1) -> None:
        """Adds a batch `[N, C, ...]`, or a batch with its channels along `axis`; sums over the tensor are added up from its channels."""
        x = x.detach().float()
        if x.ndim < 2:
            x = x.reshape(len(x) if x.ndim else 1, -1)
        if not x.numel():
            return
        x = x.movedim(axis, 1)
        for c in collectors:
            self.extra[c.name] = self._collected(c, x)
        seen = look(x, PerChannel(1))
        alike = self.tensor.empty or (not self.channel.empty and len(self.channel.count) == x.shape[1])
        self.tensor.add(together(seen, 2), x, 1, tuple(x.shape))
        if alike:
            self.channel.add(seen, x, 1, tuple(x.shape))
        else:
            self.channel = TensorStats(self.channel.granularity, self.channel.bins)

    def _collected(self, collector: Collector, x: Tensor) -> Tensor:
        """Returns the value of a collector after adding a batch; an empty tensor where it cannot merge these shapes."""
        held = self.extra.get(collector.name)
        if held is not None and not held.numel():
            return held
        try:
            return merged(collector, held, collector.first(x))
        except DifferentShapes:
            return torch.empty(0)


class Calibration(Mapping[tuple[str, str], SiteStats]):
    """Maps (layer, site) to statistics; sites that carry the same tensor share one entry."""

    def __init__(
        self, stats: dict[tuple[str, str], SiteStats], aliases: dict[tuple[str, str], tuple[str, str]]
    ) -> None:
        self.stats, self.aliases = stats, aliases

    def __getitem__(self, key: tuple[str, str]) -> SiteStats:
        return self.stats[self.aliases.get(key, key)]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter([*self.stats, *self.aliases])

    def __len__(self) -> int:
        return len(self.stats) + len(self.aliases)

    def sync(self, collectors: Sequence[Collector] = ()) -> None:
        """Merges the statistics of all ranks."""
        for site in self.stats.values():
            site.tensor.sync()
            site.channel.sync()
            for c in collectors:
                if site.extra[c.name].numel():
                    site.extra[c.name] = synced(c, site.extra[c.name])
