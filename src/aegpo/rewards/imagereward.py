"""ImageReward (arXiv 2304.05977): how people would rate a picture, by a BLIP (arXiv 2201.12086) taught on ratings."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from aegpo.rewards import Metadata, Reward
from aegpo.rewards.pictures import cropped
from aegpo.rewards.weights import BATCH, Source, device
from aegpo.types import Judgement

WEIGHTS, REST = "RE-N-Y/ImageReward", "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of what the network says, over the authors' data
TOKENS = 35
ADDED = "[DEC]", "[ENC]"  # BLIP's, to BERT's vocabulary
HEAD = 64  # the width of an attention head, in the image encoder as in the text encoder
RENAMED = {  # the image encoder's names: transformers' names; the text encoder's are the same
    r"^cls_token": "embeddings.class_embedding",
    r"^pos_embed": "embeddings.position_embedding",
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^norm": "post_layernorm",
    r"^blocks\.": "encoder.layers.",
    r"\.norm([12])": r".layer_norm\1",
    r"\.attn\.qkv": ".self_attn.qkv",
    r"\.attn\.proj": ".self_attn.projection",
}


def load(folder: str | None = None) -> Reward:
    """The reward: about 0 on average and of a deviation of about 1 over the authors' data, mostly -2.3 to 2.

    As in the authors' `ImageReward.score`. Their weights, `ImageReward.pt` of `THUDM/ImageReward`, are a pickle, which
    is not read here; `RE-N-Y/ImageReward` is another's copy of them as safetensors.

    Args:
        folder: that holds the weights as safetensors, by the authors' names, and the tokenizer of
            `google-bert/bert-base-uncased`; by default the Hub's.

    Raises:
        ValueError: the files cannot be had or do not fit.
    """
    network = Network(Source("imagereward", WEIGHTS, REST, folder))

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        starts = range(0, len(images), BATCH)
        said = [network(images[at : at + BATCH], prompts[at : at + BATCH]) for at in starts]
        return Judgement((np.concatenate([np.zeros(0, np.float32), *said]) - MEAN) / STD)

    return Reward("imagereward", judge)


class Network:
    """Image encoder, text encoder that looks at the image, and a head without activations on its first token.

    Its sizes are those of the weights.

    Raises:
        ValueError: the files cannot be had or do not fit.
    """

    def __init__(self, source: Source):
        parts = _parts(source.tensors())
        with source.reading(source.weights):
            vision, text = _vision_config(parts["visual_encoder"]), _text_config(parts["text_encoder"])
            text.encoder_hidden_size = vision.hidden_size
            self.head = _head(parts["mlp"])
        self.vision = source.model(BlipVisionModel, vision, _renamed(parts["visual_encoder"]))
        self.text = source.model(BlipTextModel, text, parts["text_encoder"], add_pooling_layer=False)
        self.tokenizer = source.tokenizer(BertTokenizer, text.vocab_size, ADDED)

    @torch.no_grad()
    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """What it says of uint8 images (n, H, W, 3) with n prompts, of whose tokens it reads TOKENS: float32 (n,)."""
        pixels = cropped(images, self.vision.config.image_size, round).to(device())
        seen = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        tokens = tokens.to(device())
        state = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state[:, 0]
        for weight, bias in self.head:
            state = linear(state, weight, bias)
        return state[:, 0].cpu().numpy()


def _parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights by the part they belong to and their name in it; the rest of BLIP is of no use here."""
    parts: dict[str, dict[str, Tensor]] = {"visual_encoder": {}, "text_encoder": {}, "mlp": {}}
    for name, tensor in tensors.items():
        if found := re.match(r"(?:.*?\.)?(visual_encoder|text_encoder|mlp)\.(.+)", name):
            parts[found[1]][found[2]] = tensor
    return parts


def _vision_config(tensors: dict[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_count(tensors, "blocks"),
        num_attention_heads=width // HEAD,
        image_size=patch * round((tensors["pos_embed"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(tensors: dict[str, Tensor]) -> BlipTextConfig:
    tokens, width = tensors["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=len(tensors["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_count(tensors, "encoder.layer"),
        num_attention_heads=width // HEAD,
        max_position_embeddings=len(tensors["embeddings.position_embeddings.weight"]),
    )


def _count(tensors: dict[str, Tensor], blocks: str) -> int:
    return len({found[1] for name in tensors if (found := re.match(rf"{re.escape(blocks)}\.(\d+)\.", name))})


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in RENAMED.items():
            name = re.sub(old, new, name)
        renamed[name] = tensor
    return renamed


def _head(tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The linear layers in order, each a weight and a bias; between them the original has dropouts only."""
    places = sorted(int(name.split(".")[1]) for name in tensors if name.endswith(".weight"))
    layers = [(tensors[f"layers.{at}.weight"], tensors[f"layers.{at}.bias"]) for at in places]
    if not layers or len(layers[-1][0]) != 1:
        raise ValueError("there is no head (mlp) that ends in one number")
    return [(weight.float().to(device()), bias.float().to(device())) for weight, bias in layers]
