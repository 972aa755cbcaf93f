"""What an image encoder sees of pictures: torchvision's and transformers' steps, by Pillow."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's (arXiv 2103.00020)
BLACK = (0, 0, 0)


def cropped(images: Iterable[np.ndarray], size: int, half: Callable[[float], int] = int) -> Tensor:
    """The square in the middle, once the shorter edge is brought to `size`.

    Args:
        images: uint8 (H, W, 3) each, maybe of several sizes.
        size: of the square.
        half: how half a leftover becomes whole pixels: cut off as transformers does, or `round` as torchvision does.

    Returns:
        Normalised by CLIP's mean and deviation, float32 (n, 3, size, size).
    """

    def crop(picture: Image.Image) -> Image.Image:
        short = min(picture.size)
        width, height = (int(size * edge / short) for edge in picture.size)
        left, top = half((width - size) / 2), half((height - size) / 2)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + size, top + size))

    return _normalised(images, size, crop)


def letterboxed(images: Iterable[np.ndarray], size: int) -> Tensor:
    """The whole picture, its longer edge brought to `size`, between two black bars; else as `cropped`."""

    def fit(picture: Image.Image) -> Image.Image:
        long = max(picture.size)
        width, height = (round(edge * size / long) for edge in picture.size)
        framed = Image.new("RGB", (size, size), BLACK)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        framed.paste(resized, ((size - width) // 2, (size - height) // 2))
        return framed

    return _normalised(images, size, fit)


def _normalised(images: Iterable[np.ndarray], size: int, fit: Callable[[Image.Image], Image.Image]) -> Tensor:
    squares = [np.asarray(fit(Image.fromarray(image))) for image in images]
    values = torch.from_numpy(np.array(squares, np.uint8).reshape(-1, size, size, 3)).permute(0, 3, 1, 2) / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
