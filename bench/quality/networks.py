"""The networks of the study, for grey images of 28 × 28 or 8 × 8; small, so that a grid of trials fits a few cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlur.demo import residual_cnn


class Recipe(NamedTuple):
    """How a network is made and trained: AdamW, one-cycle learning rate, batches of 64."""

    make: Callable[[int], nn.Module]
    lr: float
    epochs: dict[str, int]


class ViT(nn.Module):
    """A vision transformer with pre-norm blocks and mean pooling, over 16 patches of 7 × 7 or of 2 × 2."""

    def __init__(self, size: int, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        patch = 7 if size >= 28 else 2
        self.cut = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, functional.gelu, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]


def cnn(size: int, width: int = 24) -> nn.Module:
    """Two residual stages with batch norm; the first convolution takes images of 28 × 28 down to 7 × 7."""
    return residual_cnn(width=width, stem=(5, 4, 1) if size >= 28 else (3, 1, 1))


def mlp(size: int, width: int = 256) -> nn.Module:
    """Two hidden layers, no normalisation."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size * size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


NETWORKS = {
    "cnn": Recipe(cnn, 5e-3, {"mnist": 20, "digits": 40}),
    "vit": Recipe(ViT, 2e-3, {"mnist": 30, "digits": 60}),
    "mlp": Recipe(mlp, 2e-3, {"mnist": 20, "digits": 60}),
}
