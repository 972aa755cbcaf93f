"""Cosine similarity of pictures and prompts under a CLIP (arXiv 2103.00020): what three of the scorers are made of."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from aegpo.rewards.pictures import cropped
from aegpo.rewards.weights import BATCH, Source, device


class Clip:
    """A CLIP with its tokenizer.

    Args:
        source: of the files.
        renamed: of the weights, to the names that transformers has for them.
        pixels: images and a size -> what the image encoder sees.

    Raises:
        ValueError: the files cannot be had or do not fit.
    """

    def __init__(
        self,
        source: Source,
        renamed: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
        pixels: Callable[[Iterable[np.ndarray], int], Tensor] = cropped,
    ):
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
        seen = [self.seen(images[at : at + BATCH]) for at in range(0, len(images), BATCH)]
        read = [self.read(different[at : at + BATCH]) for at in range(0, len(different), BATCH)]
        return (torch.cat(seen) * torch.cat(read)[rows]).sum(1).cpu().numpy()

    @torch.no_grad()
    def seen(self, images: Iterable[np.ndarray]) -> Tensor:
        """The directions of images, uint8 (H, W, 3) each, maybe of several sizes: float32 (n, width), of length 1."""
        values = self.pixels(images, self.model.config.vision_config.image_size).to(device())
        return normalize(self.model.visual_projection(self.model.vision_model(pixel_values=values).pooler_output))

    @torch.no_grad()
    def read(self, prompts: list[str]) -> Tensor:
        """The directions of prompts: float32 (n, width), of length 1."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        output = self.model.text_model(**tokens.to(device())).pooler_output
        return normalize(self.model.text_projection(output))
