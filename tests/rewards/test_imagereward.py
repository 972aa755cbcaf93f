"""ImageReward against the original's arithmetic, written again in plain torch under the original's names."""

import shutil
from math import sqrt

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertTokenizer

from aegpo import rewards
from aegpo.rewards.pictures import MEAN, STD
from tests.rewards.small import on_the_hub, pictures, shaken

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "ring", "above"]
PROMPTS = ["a red ring", "blue", "a ring above a dog", "red " * 60]
VISION, TEXT = 128, 192  # two and three heads


class Attention(nn.Module):
    """BERT's, over its own states or over an image's, with the sum and norm that follow."""

    def __init__(self, over):
        super().__init__()
        parts = {"query": nn.Linear(TEXT, TEXT), "key": nn.Linear(over, TEXT), "value": nn.Linear(over, TEXT)}
        self.self = nn.ModuleDict(parts)
        self.output = nn.ModuleDict({"dense": nn.Linear(TEXT, TEXT), "LayerNorm": nn.LayerNorm(TEXT, 1e-12)})

    def forward(self, x, over, mask):
        heads = [
            self.self[part](of).unflatten(2, (3, 64)) for part, of in (("query", x), ("key", over), ("value", over))
        ]
        query, key, value = (part.transpose(1, 2) for part in heads)
        weights = (query @ key.mT / sqrt(64) + mask).softmax(-1)
        mixed = self.output["dense"]((weights @ value).transpose(1, 2).flatten(2))
        return self.output["LayerNorm"](mixed + x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.crossattention = Attention(TEXT), Attention(VISION)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(TEXT, 300)})
        self.output = nn.ModuleDict({"dense": nn.Linear(300, TEXT), "LayerNorm": nn.LayerNorm(TEXT, 1e-12)})

    def forward(self, x, image, mask):
        x = self.crossattention(self.attention(x, x, mask), image, 0)
        inner = nn.functional.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](self.output["dense"](inner) + x)


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        embeddings = {
            "word_embeddings": nn.Embedding(len(WORDS) + 2, TEXT),
            "position_embeddings": nn.Embedding(40, TEXT),
            "LayerNorm": nn.LayerNorm(TEXT, 1e-12),
        }
        self.embeddings = nn.ModuleDict(embeddings)
        self.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(2))})

    def forward(self, ids, attended, image):
        parts = self.embeddings
        x = parts["LayerNorm"](parts["word_embeddings"](ids) + parts["position_embeddings"].weight[: ids.shape[1]])
        mask = (1.0 - attended[:, None, None]) * -10000.0
        for layer in self.encoder["layer"]:
            x = layer(x, image, mask)
        return x


class VisionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(VISION, 1e-6), nn.LayerNorm(VISION, 1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(VISION, 3 * VISION), "proj": nn.Linear(VISION, VISION)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(VISION, 200), "fc2": nn.Linear(200, VISION)})

    def forward(self, x):
        query, key, value = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        mixed = (query @ key.mT * 64**-0.5).softmax(-1) @ value
        x = x + self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, VISION))
        self.pos_embed = nn.Parameter(torch.zeros(1, 10, VISION))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, VISION, 16, 16)})
        self.blocks = nn.ModuleList(VisionBlock() for _ in range(3))
        self.norm = nn.LayerNorm(VISION, 1e-6)

    def forward(self, x):
        patches = self.patch_embed["proj"](x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(TEXT, 32), nn.Dropout(0.2), nn.Linear(32, 16), nn.Dropout(0.2), nn.Linear(16, 8)),
            *(nn.Dropout(0.1), nn.Linear(8, 4), nn.Linear(4, 1)),
        )

    def forward(self, x):
        return self.layers(x)


class Original(nn.Module):
    def __init__(self):
        super().__init__()
        unused = {"vision_proj": nn.Linear(VISION, 8), "text_proj": nn.Linear(TEXT, 8)}
        self.blip = nn.ModuleDict({"visual_encoder": Vision(), "text_encoder": Bert(), **unused})
        self.mlp = Head()

    @torch.no_grad()
    def score(self, image, prompt):
        """Of a picture of the size that the encoder sees, (48, 48, 3); a prompt fills 35 places, and no more."""
        values = (torch.from_numpy(image) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        seen = self.blip["visual_encoder"](values.permute(2, 0, 1)[None])
        ids = [WORDS.index(word) if word in WORDS else 1 for word in prompt.split()][:33]
        ids = [2, *ids, 3]
        attended = torch.tensor([[1.0] * len(ids) + [0.0] * (35 - len(ids))])
        state = self.blip["text_encoder"](torch.tensor([ids + [0] * (35 - len(ids))]), attended, seen)
        return (self.mlp(state[:, 0]).item() - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def original():
    return shaken(Original(), seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, original):
    folder = tmp_path_factory.mktemp("imagereward")
    BertTokenizer(vocab={word: place for place, word in enumerate(WORDS)}).save_pretrained(folder)
    save_file(original.state_dict(), folder / "ImageReward.safetensors")
    return folder


def score(folder, images, prompts):
    return rewards.load(f"imagereward={folder}").judge(images, prompts, [{}] * len(prompts)).score


def test_it_says_what_the_original_says(folder, original):
    images = pictures(4, 48, 48)
    due = [original.score(image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    said = score(folder, images, PROMPTS)
    assert said.dtype == np.float32
    assert np.ptp(due) > 0.1
    assert said == pytest.approx(due, abs=1e-5, rel=1e-5)


def test_the_hubs_files_say_what_those_of_a_folder_say(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    on_the_hub(tmp_path, "RE-N-Y/ImageReward", folder.glob("*.safetensors"))
    on_the_hub(tmp_path, "google-bert/bert-base-uncased", folder.glob("*.json"))
    said = rewards.load("imagereward").judge(pictures(4, 48, 48), PROMPTS, [{}] * 4).score
    assert (said == score(folder, pictures(4, 48, 48), PROMPTS)).all()


def test_names_may_have_something_in_front(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "ImageReward.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, copy / "ImageReward.safetensors")
    assert (score(copy, pictures(4, 48, 48), PROMPTS) == score(folder, pictures(4, 48, 48), PROMPTS)).all()


def test_a_picture_is_cropped_as_torchvision_does(folder):
    tall = pictures(2, 51, 48)
    assert score(folder, tall, PROMPTS[:2]) == pytest.approx(score(folder, tall[:, 2:50], PROMPTS[:2]), abs=1e-5)


def test_a_score_is_the_same_in_any_company(folder):
    images, prompts = pictures(35, 48, 48), [PROMPTS[i % 4] for i in range(35)]
    together = score(folder, images, prompts)
    assert len(set(together.tolist())) > 20
    order = np.random.default_rng(0).permutation(35)
    assert score(folder, images[order], [prompts[i] for i in order]) == pytest.approx(together[order], abs=1e-4)
    alone = [score(folder, images[i : i + 1], prompts[i : i + 1])[0] for i in (0, 31, 32, 34)]
    assert alone == pytest.approx(together[[0, 31, 32, 34]], abs=1e-4)


def test_no_pictures_have_no_scores(folder):
    assert score(folder, pictures(0), []).shape == (0,)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias", "layer.1.crossattention.self.key.bias"),
        ("blip.visual_encoder.blocks.1.attn.proj.bias", "encoder.layers.1.self_attn.projection.bias"),
        ("blip.visual_encoder.pos_embed", "cannot be used: it has no 'pos_embed'"),
        ("mlp.layers.7.weight", "no head"),
        ("mlp.layers.6.bias", "it has no 'layers.6.bias'"),
    ],
)
def test_weights_that_are_incomplete(folder, tmp_path, gone, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "ImageReward.safetensors")
    del tensors[gone]
    save_file(tensors, copy / "ImageReward.safetensors")
    with pytest.raises(ValueError, match=message):
        rewards.load(f"imagereward={copy}")


def test_a_tokenizer_of_another_vocabulary(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    BertTokenizer(vocab={word: place for place, word in enumerate(WORDS[:-1])}).save_pretrained(copy)
    with pytest.raises(ValueError, match="knows 11 tokens, and the weights know 12"):
        rewards.load(f"imagereward={copy}")
