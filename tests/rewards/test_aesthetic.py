"""The aesthetic predictor against the original's MLP and transformers' CLIP."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from aegpo import rewards
from tests.rewards.small import CONFIG, SIZE, clip_folder, on_the_hub, pictures, shaken

WIDTH = CONFIG["projection_dim"]


class Original(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(WIDTH, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)),
            *(nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
        )

    @torch.no_grad()
    def score(self, clip, image):
        sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
        values = CLIPImageProcessorPil(**sizes)(image, return_tensors="pt")
        embedding = clip.get_image_features(**values).pooler_output[0]
        return self.layers(embedding / embedding.norm()).item()


@pytest.fixture(scope="module")
def original():
    return shaken(Original(), seed=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def head(tmp_path_factory, original):
    head = tmp_path_factory.mktemp("head")
    save_file(original.state_dict(), head / "model.safetensors")
    return head


def score(images, name="aesthetic", **settings):
    return rewards.load(name, **settings).judge(images, ["a"] * len(images), [{}] * len(images)).score


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (40, 57), (57, 40)])
def test_it_says_what_the_original_says(shape, folder, head, original):
    images = pictures(3, *shape)
    clip = CLIPModel.from_pretrained(folder).eval()
    due = [original.score(clip, image) for image in images]
    said = score(images, f"aesthetic={folder}", head=str(head))
    assert said.dtype == np.float32
    assert np.ptp(due) > 0.1
    assert said == pytest.approx(due, abs=1e-5)


def test_the_embedding_has_length_1_and_nothing_stands_between_the_layers(folder, tmp_path):
    """Layers that hand the embedding on and end in its third number, 4 times, and 5 more: by 4 cos and 5."""
    tensors = {}
    for place, (rows, columns) in {0: (1024, WIDTH), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        tensors[f"layers.{place}.weight"], tensors[f"layers.{place}.bias"] = torch.eye(rows, columns), torch.zeros(rows)
    tensors["layers.7.weight"] = 4 * torch.eye(16)[2:3]
    tensors["layers.7.bias"] += 5
    save_file(tensors, tmp_path / "head.safetensors")
    third = (score(pictures(40), folder=folder, head=str(tmp_path)) - 5) / 4
    with torch.no_grad():
        values = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)(list(pictures(40)), return_tensors="pt")
        seen = CLIPModel.from_pretrained(folder).eval().get_image_features(**values).pooler_output
    assert third.min() < 0 < third.max()
    assert third == pytest.approx((seen[:, 2] / seen.norm(dim=1)).numpy(), abs=1e-5)


def test_the_hubs_files_say_what_those_of_folders_say(folder, head, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    on_the_hub(tmp_path, "openai/clip-vit-large-patch14", Path(folder).iterdir())
    on_the_hub(tmp_path, "ttj/sac-logos-ava1-l14-linearMSE", head.iterdir())
    assert (score(pictures(4)) == score(pictures(4), folder=folder, head=str(head))).all()


def test_the_head_may_stand_beside_a_clips_weights(folder, head, tmp_path):
    together = load_file(f"{folder}/model.safetensors") | load_file(head / "model.safetensors")
    save_file(together, tmp_path / "model.safetensors")
    said = score(pictures(4), folder=folder, head=str(tmp_path))
    assert (said == score(pictures(4), folder=folder, head=str(head))).all()


def test_half_precision_is_computed_in_single(folder, head, tmp_path):
    for name, kind in (("half", torch.half), ("single", torch.float)):
        (tmp_path / name).mkdir()
        halves = {place: tensor.half().to(kind) for place, tensor in load_file(head / "model.safetensors").items()}
        save_file(halves, tmp_path / name / "model.safetensors")
    half, single = (score(pictures(4), folder=folder, head=str(tmp_path / name)) for name in ("half", "single"))
    assert (half == single).all()


def test_a_score_is_the_same_in_any_company(folder, head):
    reward, images = rewards.load(f"aesthetic={folder}", head=str(head)), pictures(67)
    together = reward(images, ["a"] * 67, [{}] * 67)
    assert len(set(together.tolist())) > 20
    assert (reward(images, ["b"] * 67, [{"text": "b"}] * 67) == together).all()
    order = np.random.default_rng(0).permutation(67)
    assert reward(images[order], ["a"] * 67, [{}] * 67) == pytest.approx(together[order], abs=1e-4)
    alone = [reward(images[i : i + 1], ["a"], [{}])[0] for i in (0, 31, 32, 66)]
    assert alone == pytest.approx(together[[0, 31, 32, 66]], abs=1e-4)
    assert reward(images[:0], [], []).shape == (0,)


def changed(head, tmp_path, change):
    copy = shutil.copytree(head, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("layers.6.bias"), "1 of them are .* the first layers.6.bias"),
        (lambda tensors: tensors.update({"layers.9.bias": torch.zeros(1)}), "1 of them are .* the first layers.9.bias"),
        (
            lambda tensors: tensors.update({"layers.0.weight": torch.zeros(1024, 768)}),
            "1 of them are .* the first layers.0.weight",
        ),
        (dict.clear, "10 of them are .* the first layers.0.bias"),
    ],
)
def test_a_head_that_does_not_fit(change, message, folder, head, tmp_path):
    copy = changed(head, tmp_path, change)
    with pytest.raises(ValueError, match=f"^reward: aesthetic: head: the weights of {copy} do not fit: {message}"):
        rewards.load(f"aesthetic={folder}", head=str(copy))


def test_folders_that_are_not_there(folder, head):
    with pytest.raises(ValueError, match=r"^reward: aesthetic=none cannot be used: there is no such folder$"):
        rewards.load("aesthetic=none", head=str(head))
    with pytest.raises(ValueError, match=r"^reward: aesthetic: head=none cannot be used: there is no such folder$"):
        rewards.load(f"aesthetic={folder}", head="none")
