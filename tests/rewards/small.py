"""Small scorers with random weights in transformers' own classes, saved as a user would have them; no network hub."""

import shutil
import string

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

SIZE = 32  # of what CLIP's image encoder sees
PLACES = 12  # for tokens
LETTERS = ["!", *string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
TOKENS = [*LETTERS, "<|startoftext|>", "<|endoftext|>"]  # CLIP's end is its last token too
CONFIG = {
    "text_config": {
        **{"vocab_size": len(TOKENS), "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "max_position_embeddings": PLACES, "hidden_act": "gelu", "attention_dropout": 0.5},
        **{"bos_token_id": len(TOKENS) - 2, "eos_token_id": len(TOKENS) - 1, "pad_token_id": len(TOKENS) - 1},
    },
    "vision_config": {
        **{"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": SIZE, "patch_size": 8, "hidden_act": "gelu", "attention_dropout": 0.5},
    },
    "projection_dim": 16,
}
PROMPTS = ["a red ring", "blue", "a red ring", "so long a prompt that no model has so many places for its tokens"]


def clip_folder(folder, seed=0):
    """A folder that `clipscore`, `pickscore` and `hpsv21` take: weights, config and tokenizer of a CLIP."""
    config = CLIPConfig(**CONFIG)
    shaken(CLIPModel(config), seed).save_pretrained(folder)
    spelling_tokenizer().save_pretrained(folder)
    return str(folder)


def on_the_hub(cache, repository, files):
    """Put files into a cache of the Hub's, as if they had been had from there."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for file in files:
        name = "model.safetensors" if file.suffix == ".safetensors" else file.name
        shutil.copy(file, place / "snapshots" / ("0" * 40) / name)


def spelling_tokenizer():
    """CLIP's tokenizer without merges: a token a letter, and another at a word's end."""
    return CLIPTokenizer(vocab={token: place for place, token in enumerate(TOKENS)}, merges=[])


def spelled(prompt, places=PLACES):
    """The same by hand, as open_clip fills up: with 0."""
    words = prompt.lower().split()
    letters = [LETTERS.index(letter) for word in words for letter in [*word[:-1], word[-1] + "</w>"]]
    ids = [len(TOKENS) - 2, *letters[: places - 2], len(TOKENS) - 1]
    return ids + [0] * (places - len(ids))


def shaken(module, seed=0):
    """The module with every parameter drawn anew, so that none is 0, 1 or like another; for evaluation."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim > 1:
                summed = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
                parameter.copy_(1.4 * noise / summed**0.5)
            else:
                parameter.copy_(0.3 * noise + (parameter.ndim == 1 and name.endswith("weight")))
    return module.eval()


def pictures(count, height=SIZE, width=SIZE, seed=0):
    """Noise that has large and small features, uint8 (count, height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 200, (count, height // 8 + 1, width // 8 + 1, 3))
    fine = np.random.default_rng(seed + 1).integers(0, 56, (count, height, width, 3))
    return (coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width] + fine).astype(np.uint8)
