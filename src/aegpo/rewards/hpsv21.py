"""HPS v2.1 (arXiv 2306.09341): which picture people prefer, by a CLIP ViT-H/14 taught on HPD v2."""

import re
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from aegpo.rewards import Metadata, Reward
from aegpo.rewards.clip import load_clip
from aegpo.rewards.pictures import letterboxed
from aegpo.rewards.weights import Source
from aegpo.types import Judgement

WEIGHTS, REST = "RE-N-Y/hpsv21", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
RENAMED = {  # open_clip's names: transformers' names, by the beginning
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
    "transformer.resblocks": "text_model.encoder.layers",
}
IN_A_BLOCK = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def load(folder: str | None = None) -> Reward:
    """The reward: cos, in [-1, 1], mostly 0.2 to 0.35.

    As in the authors' `hpsv2.score`, but in float32: a picture that is not square is seen whole, between black bars.
    Their weights, `HPS_v2.1_compressed.pt` of `xswu/HPSv2`, are a pickle, which is not read here; `RE-N-Y/hpsv21` is
    another's copy of them as safetensors.

    Args:
        folder: that holds the weights as safetensors, by open_clip's names or by transformers', and config and
            tokenizer of `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`; by default the Hub's.

    Raises:
        ValueError: the files cannot be had or do not fit.
    """
    clip = load_clip(Source("hpsv21", WEIGHTS, REST, folder), from_open_clip, letterboxed)

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        return Judgement(clip.cosine(images, prompts))

    return Reward("hpsv21", judge, (-1.0, 1.0))


def from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip CLIP's weights by transformers' names, which they may have already.

    The names may have something in front, such as `model.` or `module.`, that is the same for all.
    """
    first = next((name for name in tensors if name.endswith("visual.conv1.weight")), None)
    if first is None:
        return tensors
    prefix = first.removesuffix("visual.conv1.weight")
    renamed = {}
    for name, tensor in tensors.items():
        renamed |= _renamed(name.removeprefix(prefix), tensor)
    return renamed


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name in TRANSPOSED:
        return {TRANSPOSED[name]: tensor.T.contiguous()}
    begins = next((begins for begins in RENAMED if re.match(rf"{re.escape(begins)}(\.|$)", name)), "")
    name = RENAMED.get(begins, "") + name.removeprefix(begins)
    for old, new in IN_A_BLOCK.items():
        name = name.replace(old, new)
    if ".in_proj_" not in name:
        return {name: tensor}
    parts = zip("qkv", tensor.chunk(3), strict=True)  # which share their memory; a model copies them
    return {name.replace("in_proj_", f"{part}_proj."): rows for part, rows in parts}
