"""Attention computed from its parts, each a module that a recipe can address: products of matrices, multiples, a softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.models.operations import Affine, MatMul

OPTIONS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")  # of torch's module
LOWEST = -100.0  # in place of minus infinity, which no scale holds: its share is e^-100 of another's


class Attention(nn.Module):
    """What `F.scaled_dot_product_attention` computes: `softmax(q k^T scale + mask) v`, in parts that can carry quantizers.

    Attributes:
        scale: Factor of the scores; None takes one over the root of the features.
        mask: What is added to the scores, or where they count (bool); None counts all of them.
        causal: Whether an entry counts those before it alone.
        dropout: Probability with which a share is left out; torch's function takes 0 in evaluation mode.
        grouped: Whether several heads of queries share one of keys and values.
    """

    def __init__(
        self,
        scale: float | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        grouped: bool = False,
    ) -> None:
        super().__init__()
        self.scores, self.scaled, self.masked = MatMul(), Affine(), Affine()
        self.softmax, self.values = nn.Softmax(-1), MatMul()
        vars(self).update(scale=scale, mask=mask, causal=causal, dropout=dropout, grouped=grouped)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.grouped or q.shape[-3] == k.shape[-3]:
            return self.values(self.shares(q, k), v)
        # The rows of the queries that share a head's keys become rows of one matrix, so that no tensor is repeated.
        heads = k.shape[-3]
        together = q.reshape(*q.shape[:-3], heads, -1, q.shape[-1])
        shares = self.shares(together, k, q.shape[-2])
        return self.values(shares, v).reshape(*q.shape[:-1], v.shape[-1])

    def shares(self, q: Tensor, k: Tensor, queries: int | None = None) -> Tensor:
        """Returns the share of each key for each query; `queries` is their number where the rows of several heads lie together."""
        self.scaled.factor = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = self.scaled(self.scores(q, k.transpose(-2, -1)))
        mask = self.mask
        if self.causal:
            rows = queries or q.shape[-2]
            mask = torch.ones(rows, k.shape[-2], dtype=torch.bool, device=q.device).tril()
        if mask is not None and queries is not None:
            mask = _for_groups(mask, q.shape[-2] // queries)
        if mask is not None:
            vars(self.masked)["summand"] = summand(mask).to(q.dtype)
            scores = self.masked(scores)
        shares = self.softmax(scores)
        return F.dropout(shares, self.dropout, True) if self.dropout else shares


def _for_groups(mask: Tensor, groups: int) -> Tensor:
    """Returns a mask for the rows of several heads of queries that lie together, `[..., heads, groups * queries, keys]`."""
    if mask.ndim < 3 or mask.shape[-3] == 1:
        return mask.repeat(*[1] * (mask.ndim - 2), groups, 1)
    return mask.reshape(*mask.shape[:-3], mask.shape[-3] // groups, -1, mask.shape[-1])


def summand(mask: Tensor) -> Tensor:
    """Returns what a mask adds to scores, in finite numbers."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, LOWEST)
    return mask.detach().clamp_min(LOWEST)


class MultiheadAttention(nn.MultiheadAttention):
    """torch's module for attention of a tensor to itself, computed from its parts; only `in_parts` makes one.

    The projection of queries, keys and values is the layer `in_proj`. Its parameters are those of this module, so the keys of the
    state dict stay as they are.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        said = dict(zip(OPTIONS, args)) | kwargs
        if not has_parts(self, query, key, value, said):
            return super().forward(query, key, value, *args, **kwargs)
        self._follow(said)
        turned = not self.batch_first
        x = query.transpose(0, 1) if turned else query
        n, tokens, heads = x.shape[0], x.shape[1], self.num_heads
        q, k, v = self.in_proj(x).reshape(n, tokens, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        shares = self.attention.shares(q, k)
        y = self.attention.values(shares, v).transpose(1, 2).reshape(n, tokens, self.embed_dim)
        y = self.out_proj(y)
        y = y.transpose(0, 1) if turned else y
        if not said.get("need_weights", True):
            return y, None
        return y, shares.mean(1) if said.get("average_attn_weights", True) else shares

    def _follow(self, said: dict[str, Any]) -> None:
        """Gives the parts this module's parameters (loading may replace them) and the options of a call."""
        own = {"weight": self.in_proj_weight, "bias": self.in_proj_bias}
        # A pass may have added a bias of the projection's own.
        vars(self.in_proj).update((k, v) for k, v in own.items() if k not in self.in_proj._parameters)
        mask = said.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:  # True leaves out here
            mask = ~mask
        vars(self.attention).update(mask=mask, dropout=self.dropout if self.training else 0.0)


def has_parts(layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, said: dict[str, Any]) -> bool:
    """Whether the parts compute a call of torch's module: attention of one batch to itself, with one mask for all images."""
    plain = layer._qkv_same_embed_dim and layer.bias_k is None and layer.bias_v is None and not layer.add_zero_attn
    mask = said.get("attn_mask")
    alike = said.get("key_padding_mask") is None and (mask is None or mask.ndim == 2)
    return plain and alike and query is key and key is value and query.ndim == 3 and not query.is_nested


def in_parts(layer: nn.MultiheadAttention) -> None:
    """Makes torch's attention one of this module, in place; parameters and their names stay."""
    layer.__class__ = MultiheadAttention
    with torch.device("meta"):
        projection = nn.Linear(layer.embed_dim, 3 * layer.embed_dim)
    projection._parameters.clear()
    vars(projection).update(weight=layer.in_proj_weight, bias=layer.in_proj_bias)
    layer.in_proj, layer.attention = projection.train(layer.training), Attention().train(layer.training)


def whole(layer: MultiheadAttention) -> None:
    """Makes attention in parts torch's module again, in place."""
    del layer.in_proj, layer.attention
    layer.__class__ = nn.MultiheadAttention
