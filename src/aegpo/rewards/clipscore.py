"""CLIPScore (arXiv 2104.08718): how well a picture fits its prompt, to CLIP ViT-L/14."""

from collections.abc import Sequence

import numpy as np

from aegpo.rewards import Metadata, Reward
from aegpo.rewards.clip import load_clip
from aegpo.rewards.weights import Source
from aegpo.types import Judgement

HUB = "openai/clip-vit-large-patch14"


def load(folder: str | None = None) -> Reward:
    """The reward: max(100 cos, 0), in [0, 100], mostly 15 to 35.

    This is how torchmetrics has it and papers on text-to-image models report it. The paper itself takes ViT-B/32,
    2.5 max(cos, 0), and prompts that begin with "A photo depicts".

    Args:
        folder: that holds the files of `openai/clip-vit-large-patch14`; by default the Hub's.

    Raises:
        ValueError: the files cannot be had or do not fit.
    """
    clip = load_clip(Source("clipscore", HUB, HUB, folder))

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        return Judgement((100 * clip.cosine(images, prompts)).clip(0))

    return Reward("clipscore", judge, (0.0, 100.0))
