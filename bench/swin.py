"""A hierarchical transformer with shifted windows, of the size of Swin-T: 28 M parameters, images of 224 px."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WINDOW = 7


class Attention(nn.Module):
    """Attention inside windows of 7 × 7, with a learned bias for every relative position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn((2 * WINDOW - 1) ** 2, heads) * 0.02)
        places = torch.stack(torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None, :] + WINDOW - 1
        self.register_buffer("index", apart[0] * (2 * WINDOW - 1) + apart[1])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: (batch, windows, 49, width); mask: (windows, 49, 49), 0 or −∞, for windows cut by the shift."""
        batch, windows, places, width = x.shape
        q, k, v = self.mix(x).view(batch, windows, places, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        bias = self.bias[self.index].permute(2, 0, 1)
        bias = bias.expand(1, windows, -1, -1, -1) if mask is None else (bias + mask[:, None])[None]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.out(y.transpose(2, 3).reshape(batch, windows, places, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Window attention and an MLP, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, side: int, shift: int) -> None:
        super().__init__()
        self.side, self.shift = side, shift if side > WINDOW else 0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.register_buffer("mask", _shifted_mask(side, self.shift) if self.shift else None)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, side, side, width)."""
        batch, side, count = x.shape[0], self.side, self.side // WINDOW
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = y.view(batch, count, WINDOW, count, WINDOW, -1).transpose(2, 3).reshape(batch, count**2, WINDOW**2, -1)
        y = self.attention(y, self.mask)
        y = y.view(batch, count, count, WINDOW, WINDOW, -1).transpose(2, 3).reshape(batch, side, side, -1)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Merge(nn.Module):
    """Four neighbours become one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, side, side, width) → (batch, side/2, side/2, 2·width)."""
        batch, side, _, width = x.shape
        y = x.view(batch, side // 2, 2, side // 2, 2, width).transpose(2, 3).reshape(batch, side // 2, side // 2, -1)
        return self.reduce(self.norm(y))  # type: ignore[no-any-return]


class Swin(nn.Module):
    """Stages of 2, 2, 6 and 2 blocks, width 96 doubling, heads 3 doubling."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        width, side = 96, 56
        self.cut = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)
        layers: list[nn.Module] = []
        for number, depth in enumerate((2, 2, 6, 2)):
            if number:
                layers.append(Merge(width))
                width, side = 2 * width, side // 2
            layers += [Block(width, 3 * 2**number, side, WINDOW // 2 * (i % 2)) for i in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 3, 224, 224)."""
        y = self.layers(self.norm(self.cut(x).permute(0, 2, 3, 1)))
        return self.head(self.last(y).mean((1, 2)))  # type: ignore[no-any-return]


def _shifted_mask(side: int, shift: int) -> Tensor:
    """−∞ between places of one window that were not neighbours before the shift."""
    region = torch.zeros(side, side)
    for number, rows in enumerate((slice(0, -WINDOW), slice(-WINDOW, -shift), slice(-shift, None))):
        for other, columns in enumerate((slice(0, -WINDOW), slice(-WINDOW, -shift), slice(-shift, None))):
            region[rows, columns] = 3 * number + other
    count = side // WINDOW
    each = region.view(count, WINDOW, count, WINDOW).transpose(1, 2).reshape(count**2, WINDOW**2)
    return torch.zeros(count**2, WINDOW**2, WINDOW**2).masked_fill(each[:, :, None] != each[:, None, :], -torch.inf)
