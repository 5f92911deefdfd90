"""Lists of parameter shapes that stand for models."""

from __future__ import annotations

import torch

Shapes = list[tuple[int, ...]]


def resnet18() -> Shapes:
    """ResNet-18's 62 parameters, for 32 × 32 images and 10 classes."""
    shapes: Shapes = [(64, 3, 3, 3), (64,), (64,)]
    before = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            inputs = before if block == 0 else width
            shapes += [(width, inputs, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and inputs != width:
                shapes += [(width, inputs, 1, 1), (width,), (width,)]
        before = width
    return [*shapes, (10, 512), (10,)]


def language_1b() -> Shapes:
    """The 201 tensors, 1.10e9 elements, of a decoder of 22 layers with grouped attention and gated MLPs."""
    width, inner, shared, words = 2048, 5632, 256, 32_000
    square, narrow = (width, width), (shared, width)
    layer: Shapes = [square, narrow, narrow, square, (inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(words, width), *22 * layer, (width,), (words, width)]


def numel(shapes: Shapes) -> int:
    """How many elements they have together."""
    return sum(torch.Size(shape).numel() for shape in shapes)
