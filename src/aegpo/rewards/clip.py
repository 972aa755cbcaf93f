"""A CLIP (arXiv 2103.00020): what it sees of pictures and reads of prompts, of which four of the scorers are made."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from aegpo.rewards.pictures import cropped
from aegpo.rewards.weights import BATCH, Source, device

Renaming = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Pixels = Callable[[Sequence[np.ndarray], int], Tensor]

_in_use: "WeakValueDictionary[tuple[Any, ...], Clip]" = WeakValueDictionary()


def load_clip(source: Source, renamed: Renaming = dict, pixels: Pixels = cropped) -> "Clip":
    """The CLIP of these files, as in `Clip`; all who ask for the same share one, which is freed with the last of them.

    Raises:
        ValueError: the files cannot be had or do not fit.
    """
    key = (source.place, renamed, pixels)
    clip = _in_use.get(key)
    if clip is None:
        clip = _in_use[key] = Clip(source, renamed, pixels)
    return clip


class Clip:
    """A CLIP with its tokenizer.

    Args:
        source: of the files.
        renamed: of the weights, to the names that transformers has for them.
        pixels: images and a size -> what the image encoder sees.

    Raises:
        ValueError: the files cannot be had or do not fit.
    """

    def __init__(self, source: Source, renamed: Renaming = dict, pixels: Pixels = cropped):
        tensors = source.tensors()
        config = source.config(CLIPConfig)
        with source.reading(source.weights):
            tensors = renamed(tensors)
        self.model = source.model(CLIPModel, config, tensors)
        self.tokenizer = source.tokenizer(CLIPTokenizer, config.text_config.vocab_size)
        self.pixels = pixels

    @torch.no_grad()
    def cosine(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Each image's cosine similarity with its prompt.

        Args:
            images: uint8 (n, H, W, 3).
            prompts: n; of a long one, the tokens that the model has places for.

        Returns:
            float32 (n,), in [-1, 1].
        """
        if not len(images):
            return np.zeros(0, np.float32)
        different = sorted(set(prompts))
        rows = torch.tensor([different.index(prompt) for prompt in prompts], device=device())
        return (self.seen(list(images)) * self.read(different)[rows]).sum(1).cpu().numpy()

    @torch.no_grad()
    def seen(self, images: Sequence[np.ndarray]) -> Tensor:
        """The directions of images, uint8 (H, W, 3) each, maybe of several sizes: float32 (n, width), of length 1."""
        return self._batched(self._seen, images)

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> Tensor:
        """The directions of prompts, as `seen`."""
        return self._batched(self._read, prompts)

    def _batched(self, directions: Callable[[Any], Tensor], what: Sequence[Any]) -> Tensor:
        parts = [directions(what[at : at + BATCH]) for at in range(0, len(what), BATCH)]
        return torch.cat([torch.zeros(0, self.model.config.projection_dim, device=device()), *parts])

    def _seen(self, images: Sequence[np.ndarray]) -> Tensor:
        values = self.pixels(images, self.model.config.vision_config.image_size).to(device())
        return normalize(self.model.visual_projection(self.model.vision_model(pixel_values=values).pooler_output))

    def _read(self, prompts: Sequence[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        output = self.model.text_model(**tokens.to(device())).pooler_output
        return normalize(self.model.text_projection(output))
