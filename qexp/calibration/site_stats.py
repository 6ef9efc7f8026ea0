"""What calibration saw: statistics of each tensor that may carry a quantizer, by layer and site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qexp.numerics.granularity import PerChannel
from qexp.statistics.collectors import Collector, merged, synced
from qexp.statistics.stats import TensorStats, look, together


@dataclass
class SiteStats:
    """What was seen of one activation: of the whole tensor, with a histogram, of each channel, and what collectors hold, by their names."""

    tensor: TensorStats = field(default_factory=TensorStats)
    channel: TensorStats = field(default_factory=lambda: TensorStats(PerChannel(1), 0))
    extra: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def update(self, x: Tensor, collectors: Sequence[Collector] = ()) -> None:
        """Adds a batch `[N, C, ...]`; the sums of the whole tensor are those of its channels, taken together."""
        x = x.detach().float()
        if x.ndim < 2:
            x = x.reshape(len(x) if x.ndim else 1, -1)
        if not x.numel():
            return
        seen = look(x, PerChannel(1))
        self.tensor.add(together(seen, 2), x, 1, tuple(x.shape))
        self.channel.add(seen, x, 1, tuple(x.shape))
        for c in collectors:
            self.extra[c.name] = merged(c, self.extra.get(c.name), c.first(x))


class Calibration(Mapping[tuple[str, str], SiteStats]):
    """Statistics by (layer, site); sites that carry the same tensor share one entry."""

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
                site.extra[c.name] = synced(c, site.extra[c.name])
