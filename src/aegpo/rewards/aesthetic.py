"""LAION's aesthetic predictor V2, sac+logos+ava1-l14-linearMSE: how people would rate a picture for its beauty."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from aegpo.rewards import Metadata, Reward
from aegpo.rewards.clip import load_clip
from aegpo.rewards.weights import Source, device
from aegpo.types import Judgement

CLIP, HEAD = "openai/clip-vit-large-patch14", "ttj/sac-logos-ava1-l14-linearMSE"
WIDTHS = 1024, 128, 64, 16, 1  # of what the head's layers give
PLACES = 0, 2, 4, 6, 7  # of these layers among the original's; the others are dropouts, for training only


def load(folder: str | None = None, head: str | None = None) -> Reward:
    """The reward: a rating, mostly 1 to 10; the prompt plays no part in it.

    As in `christophschuhmann/improved-aesthetic-predictor`, but all in float32: CLIP's embedding of the picture,
    brought to length 1, through linear layers without activations. Its weights, `sac+logos+ava1-l14-linearMSE.pth`,
    are a pickle, which is not read here; `ttj/sac-logos-ava1-l14-linearMSE` is another's copy of them as safetensors.

    Args:
        folder: that holds the files of `openai/clip-vit-large-patch14`, as for `clipscore`; by default the Hub's.
        head: a folder that holds the weights of the layers, by the original's names, as its only .safetensors; other
            weights may stand beside them, as in `shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE`. By
            default the Hub's.

    Raises:
        ValueError: the files cannot be had or do not fit.
    """
    clip = load_clip(Source("aesthetic", CLIP, CLIP, folder))
    layers = _layers(Source("aesthetic: head", HEAD, HEAD, head), clip.model.config.projection_dim)

    @torch.no_grad()
    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        state = clip.seen(list(images))
        for weight, bias in layers:
            state = linear(state, weight, bias)
        return Judgement(state[:, 0].cpu().numpy())

    return Reward("aesthetic", judge)


def _layers(source: Source, width: int) -> list[tuple[Tensor, Tensor]]:
    """The head's layers in order, each a weight and a bias, for embeddings of that width."""
    tensors = {name: tensor for name, tensor in source.tensors().items() if name.startswith("layers.")}
    due: dict[str, tuple[int, ...]] = {}
    for place, (given, gives) in zip(PLACES, pairwise([width, *WIDTHS]), strict=True):
        due |= {f"layers.{place}.weight": (gives, given), f"layers.{place}.bias": (gives,)}
    source.check(tensors, due)
    parts = [tensors[name].float().to(device()) for name in due]
    return list(zip(parts[::2], parts[1::2], strict=True))
