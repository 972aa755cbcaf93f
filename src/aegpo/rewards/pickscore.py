"""PickScore (arXiv 2305.01569): which picture people would pick, by a CLIP ViT-H/14 taught on their picks."""

from collections.abc import Sequence

import numpy as np

from aegpo.rewards import Metadata, Reward
from aegpo.rewards.clip import load_clip
from aegpo.rewards.weights import Source
from aegpo.types import Judgement

WEIGHTS, REST = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def load(folder: str | None = None) -> Reward:
    """The reward: exp(logit scale) cos, mostly 15 to 25. Flow-GRPO (arXiv 2505.05470) trains on it divided by 26.

    A difference d of two pictures' scores says that the higher is picked with probability 1 / (1 + exp(-d)).

    Args:
        folder: that holds the weights of `yuvalkirstain/PickScore_v1`, and config and tokenizer of
            `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`; by default the Hub's.

    Raises:
        ValueError: the files cannot be had or do not fit.
    """
    clip = load_clip(Source("pickscore", WEIGHTS, REST, folder))
    scale = clip.model.logit_scale.exp().item()

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        return Judgement(scale * clip.cosine(images, prompts))

    return Reward("pickscore", judge, (-scale, scale))
