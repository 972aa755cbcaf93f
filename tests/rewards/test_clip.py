"""The scorers that are CLIPs, against transformers' model and processor, and against open_clip's arithmetic."""

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from aegpo import rewards
from aegpo.rewards.pictures import MEAN, STD
from tests.rewards.small import (
    CONFIG,
    PLACES,
    PROMPTS,
    SIZE,
    clip_folder,
    on_the_hub,
    pictures,
    shaken,
    spelled,
    spelling_tokenizer,
)

CLIPS = ["clipscore", "hpsv21", "pickscore"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


def score(name, images, prompts):
    return rewards.load(name).judge(images, prompts, [{}] * len(prompts)).score


@torch.no_grad()
def cosines(folder, images, prompts):
    """By transformers alone: image and text features of each pair, and the angle between them."""
    model = CLIPModel.from_pretrained(folder).eval()
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        seen = model.get_image_features(**CLIPImageProcessorPil(**sizes)(image, return_tensors="pt")).pooler_output[0]
        ids = torch.tensor([spelled(prompt)])
        read = model.get_text_features(input_ids=ids).pooler_output[0]
        found.append(float(seen @ read / (seen.norm() * read.norm())))
    return np.array(found)


def test_tokens_are_those_by_hand():
    for prompt in PROMPTS:
        ids = spelling_tokenizer()(prompt, truncation=True, max_length=PLACES).input_ids
        assert ids == spelled(prompt)[: len(ids)]
    assert len(PROMPTS[-1]) > PLACES


def test_each_is_its_formula_of_the_cosine(folder):
    images = pictures(4, 40, 57)
    cosine = cosines(folder, images, PROMPTS)
    assert cosine.min() < 0 < cosine.max()
    scale = load_file(f"{folder}/model.safetensors")["logit_scale"].exp().item()
    assert score(f"clipscore={folder}", images, PROMPTS) == pytest.approx(100 * cosine.clip(0), abs=1e-4)
    assert score(f"pickscore={folder}", images, PROMPTS) == pytest.approx(scale * cosine, abs=1e-5)
    square = images[:, :, :40]
    cosine = cosines(folder, square, PROMPTS)
    assert score(f"hpsv21={folder}", square, PROMPTS) == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize("name", CLIPS)
def test_a_score_is_the_same_in_any_company(name, folder):
    images, prompts = pictures(67), [f"{'a' * (i % 9)} ring" for i in range(67)]
    reward = rewards.load(f"{name}={folder}")
    together = reward.judge(images, prompts, [{}] * 67)
    assert together.score.dtype == np.float32
    assert together.passed is None
    assert len(set(together.score.tolist())) > 20
    order = np.random.default_rng(0).permutation(67)
    shuffled = reward.judge(images[order], [prompts[i] for i in order], [{}] * 67).score
    assert shuffled == pytest.approx(together.score[order], abs=1e-4)
    alone = [reward.judge(images[i : i + 1], prompts[i : i + 1], [{}]).score[0] for i in (0, 31, 32, 66)]
    assert alone == pytest.approx(together.score[[0, 31, 32, 66]], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "weights", "rest"),
    [
        ("hpsv21", "RE-N-Y/hpsv21", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("pickscore", "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("clipscore", "openai/clip-vit-large-patch14", None),
    ],
)
def test_the_hubs_files_say_what_those_of_a_folder_say(name, weights, rest, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = {file.name: file for file in Path(folder).iterdir()}
    heavy = files.pop("model.safetensors")
    on_the_hub(tmp_path, weights, [heavy] if rest else [heavy, *files.values()])
    if rest:
        on_the_hub(tmp_path, rest, files.values())
    assert (score(name, pictures(4), PROMPTS) == score(f"{name}={folder}", pictures(4), PROMPTS)).all()


@pytest.mark.parametrize("name", CLIPS)
def test_no_pictures_have_no_scores(name, folder):
    said = score(f"{name}={folder}", pictures(0), [])
    assert (said.shape, said.dtype) == ((0,), np.float32)


def test_a_scorer_is_read_once_and_computes_without_gradients(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    reward = rewards.load(f"pickscore={copy}")
    shutil.rmtree(copy)
    first, second = (reward.judge(pictures(4), PROMPTS, [{}] * 4).score for _ in range(2))
    assert (first == second).all()


def test_a_video_is_its_frames_mean(folder):
    video = pictures(6).reshape(2, 3, SIZE, SIZE, 3)
    frames = score(f"pickscore={folder}", video.reshape(6, SIZE, SIZE, 3), ["red"] * 3 + ["blue"] * 3)
    assert score(f"pickscore={folder}", video, ["red", "blue"]) == pytest.approx(frames.reshape(2, 3).mean(1), abs=1e-5)


def test_half_precision_is_computed_in_single(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    halves = {name: tensor.half() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file({name: tensor.float() for name, tensor in halves.items()}, copy / "model.safetensors")
    single = score(f"hpsv21={copy}", pictures(4), PROMPTS)
    save_file(halves, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(CONFIG | {"dtype": "float16"}))
    assert (score(f"hpsv21={copy}", pictures(4), PROMPTS) == single).all()


# ---------------------------------------------------------------- hpsv21: open_clip, written again in plain torch


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(2))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width, output):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(17, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(width, 2)
        self.proj = nn.Parameter(torch.zeros(width, output))

    def forward(self, x):
        patches = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, width, output):
        super().__init__()
        self.visual = Visual(32, output)
        self.token_embedding = nn.Embedding(CONFIG["text_config"]["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.zeros(PLACES, width))
        self.transformer = Blocks(width, 2)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, output))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def read(self, ids):
        later = torch.full((PLACES, PLACES), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, later))
        return x[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection

    @torch.no_grad()
    def hps(self, images, prompts):
        values = (torch.from_numpy(images) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        seen, read = self.visual(values.permute(0, 3, 1, 2)), self.read(torch.tensor([*map(spelled, prompts)]))
        return torch.diagonal(nn.functional.normalize(seen) @ nn.functional.normalize(read).T).numpy()


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_open_clips_weights_say_what_open_clip_says(prefix, tmp_path):
    original = shaken(OpenClip(24, 16), seed=3)
    CLIPConfig(**CONFIG).save_pretrained(tmp_path)
    spelling_tokenizer().save_pretrained(tmp_path)
    weights = {prefix + name: tensor for name, tensor in original.state_dict().items()}
    save_file(weights, tmp_path / "HPS_v2.1_compressed.safetensors")
    said = score(f"hpsv21={tmp_path}", pictures(4), PROMPTS)
    assert np.ptp(said) > 0.1
    assert said == pytest.approx(original.hps(pictures(4), PROMPTS), abs=1e-5)


def test_hpsv21_sees_a_wide_picture_whole(folder):
    wide = pictures(1, 16, 32)
    framed = np.zeros((1, 32, 32, 3), np.uint8)
    framed[:, 8:24] = wide
    assert score(f"hpsv21={folder}", wide, ["red"]) == pytest.approx(
        score(f"hpsv21={folder}", framed, ["red"]), abs=1e-6
    )


# ---------------------------------------------------------------- what a user gets wrong


def changed(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy)
    return copy


def without(name):
    def change(copy):
        tensors = load_file(copy / "model.safetensors")
        del tensors[name]
        save_file(tensors, copy / "model.safetensors")

    return change


def with_one_more(copy):
    save_file(load_file(copy / "model.safetensors") | {"more": torch.zeros(1)}, copy / "model.safetensors")


def without_words(copy):
    for path in copy.glob("*okeni*"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("text_model.final_layer_norm.bias"), "do not fit: 1 of them .* text_model.final_layer_norm.bias"),
        (with_one_more, "do not fit: 1 of them are missing, too many or of another shape, the first more"),
        (without_words, "the tokenizer of .* knows .* tokens, and the weights know 55"),
        (lambda copy: (copy / "config.json").unlink(), "cannot be used: it has no config.json"),
        (lambda copy: (copy / "model.safetensors").rename(copy / "model.pt"), "as one .safetensors, and holds 0"),
        (lambda copy: shutil.copy(copy / "model.safetensors", copy / "b.safetensors"), "and holds 2"),
        (lambda copy: (copy / "model.safetensors").write_bytes(b"no weights"), "cannot be used: Error"),
        (lambda copy: (copy / "config.json").write_text("{}"), "do not fit: "),
        (shutil.rmtree, "there is no such folder"),
    ],
)
@pytest.mark.parametrize("name", CLIPS)
def test_a_folder_that_will_not_do(name, change, message, folder, tmp_path):
    copy = changed(folder, tmp_path, change)
    with pytest.raises(ValueError, match=f"^reward: {name}") as raised:
        rewards.load(f"{name}={copy}")
    assert raised.match(message)
    assert str(copy) in str(raised.value)
    assert "\n" not in str(raised.value)
