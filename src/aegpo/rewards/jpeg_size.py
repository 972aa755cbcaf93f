"""The size of a picture as JPEG, DDPO's incompressibility (arXiv 2305.13301)."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image

from aegpo.rewards import Metadata, Reward
from aegpo.types import Judgement

QUALITY = 95


def load() -> Reward:
    """The reward: kilobytes, of 1000 bytes, of the picture as Pillow writes it as JPEG of quality 95.

    DDPO's compressibility is this with the weight -1. The prompt plays no part in it.
    """

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        return Judgement(np.array([_size(image) / 1000 for image in images], np.float32))

    return Reward("jpeg_size", judge, (0.0, np.inf))


def _size(image: np.ndarray) -> int:
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=QUALITY)
    return file.tell()
