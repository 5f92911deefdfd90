"""The models that are measured, and batches for them.

Only cost counts here, but what the steps compute is checked first (`gate`), and a convolutional net with random weights
is no ground for that: it is so rough that rounding decides where a displaced gradient points (in bfloat16 the alignment
of a random ResNet-18 had a cosine of 0.59 to 0.67 with the one in float64). The small models are therefore trained for
some steps, as any model is that somebody wants to forget something.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from swin import Swin
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """A residual block of two 3 × 3 convolutions."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.short = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.short(x))


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 for 32 × 32 images: 11.17 M parameters in 62 tensors."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    before = 64
    for number, width in enumerate((64, 128, 256, 512)):
        layers += [Block(before, width, 2 if number else 1), Block(width, width, 1)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


class ViT(nn.Module):
    """A vision transformer with pre-norm blocks and mean pooling."""

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, classes: int = 10) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, functional.gelu, batch_first=True, norm_first=True, bias=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]


class Language(nn.Module):
    """A decoder that predicts the next token; its embedding is also its output layer."""

    def __init__(self, words: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.position = nn.Parameter(torch.randn(1, length, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, functional.gelu, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[:, : tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return functional.linear(self.norm(x), self.embedding.weight)


def mlp() -> nn.Module:
    """Two layers over 32 × 32 images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 512), nn.ReLU(), nn.Linear(512, 10))


def wide_mlp() -> nn.Module:
    """52 M parameters and hardly any activations: 13 layers, most of them 2048 wide, none with more than an eighth."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(3 * 32 * 32, 2048), nn.ReLU()]
    for _ in range(11):
        layers += [nn.Linear(2048, 2048), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(2048, 10))


def images(size: int) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """A maker of batches of images, ten patterns under noise, and their labels."""

    def batch(items: int, seed: int) -> tuple[Tensor, Tensor]:
        patterns = torch.randn(10, 3, size, size, generator=torch.Generator().manual_seed(10))
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 10, (items,), generator=generator)
        return patterns[labels] + 2 * torch.randn(items, 3, size, size, generator=generator), labels

    return batch


def tokens(words: int, length: int) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """A maker of batches of random token sequences and the tokens that follow them."""

    def batch(items: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(0, words, (items, length + 1), generator=generator)
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()

    return batch


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Any]]] = {
    "resnet18": (resnet18, images(32)),
    "vit": (lambda: ViT(32, 4, 256, 6, 4), images(32)),
    "mlp": (mlp, images(32)),
    "wide_mlp": (wide_mlp, images(32)),
    "swin_t": (Swin, images(224)),
    "vit_s": (lambda: ViT(224, 16, 384, 12, 6), images(224)),
    "lm_100m": (lambda: Language(16_384, 256, 768, 12, 12), tokens(16_384, 64)),
    "lm_124m": (lambda: Language(50_257, 1024, 768, 12, 12), tokens(50_257, 512)),
    "lm_1b": (lambda: Language(50_257, 1024, 2048, 20, 16), tokens(50_257, 512)),
}
"""name: how it is made, and how a batch (items, seed) for it is."""
TRAINED = {"resnet18": 25, "vit": 25, "mlp": 5}
"""Steps. After 25 the last has hardly a gradient left, and rounding decides what displacement adds to it."""


@cache
def model(name: str) -> nn.Module:
    """The model of that name; the small ones know the ten patterns. Copy it before it is changed."""
    make, batch = MODELS[name]
    torch.manual_seed(0)
    made = make().train()
    optimizer = torch.optim.SGD(made.parameters(), 0.02, momentum=0.9)
    for step in range(TRAINED.get(name, 0)):
        inputs, labels = batch(32, 1000 + step)
        optimizer.zero_grad()
        functional.cross_entropy(made(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()
    return made
