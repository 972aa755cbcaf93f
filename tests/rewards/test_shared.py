"""One network in memory, where several rewards use the same."""

import gc
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import CLIPModel

from aegpo import rewards
from aegpo.rewards.clip import load_clip
from aegpo.rewards.hpsv21 import from_open_clip
from aegpo.rewards.weights import Source
from tests.rewards.small import PROMPTS, clip_folder, on_the_hub, pictures, shaken
from tests.rewards.test_aesthetic import Original


@pytest.fixture
def folder(tmp_path):
    return clip_folder(tmp_path / "clip")


@pytest.fixture
def head(tmp_path):
    (tmp_path / "head").mkdir()
    save_file(shaken(Original()).state_dict(), tmp_path / "head" / "model.safetensors")
    return str(tmp_path / "head")


def test_it_is_the_same_object(folder, tmp_path):
    source = Source("clipscore", "user/one", "user/one", folder)
    one = load_clip(source)
    assert load_clip(Source("pickscore", "user/other", "user/rest", folder)).model is one.model
    assert load_clip(replace(source, folder=clip_folder(tmp_path / "other"))).model is not one.model
    assert load_clip(source, from_open_clip).model is not one.model
    assert Source("a", "user/one", "user/rest").place != Source("a", "user/other", "user/rest").place


def networks():
    """The CLIPs that are in memory."""
    gc.collect()
    return [weakref.ref(thing) for thing in gc.get_objects() if type(thing) is CLIPModel]


def test_rewards_of_the_same_files_share_a_network(folder, head, monkeypatch):
    before = len(networks())
    first = rewards.load(f"pickscore={folder}")
    assert len(networks()) == before + 1
    others = [
        rewards.load(f"pickscore={folder}"),
        rewards.load(f"clipscore={folder}/../clip"),
        rewards.load(f"aesthetic={folder}", head=head),
    ]
    monkeypatch.chdir(Path(folder).parent)
    others.append(rewards.load("clipscore=clip"))
    assert len(networks()) == before + 1
    said = others[0](pictures(4), PROMPTS, [{}] * 4)
    assert (first(pictures(4), PROMPTS, [{}] * 4) == said).all()


def test_other_files_and_other_ways_of_seeing_are_not_shared(folder, tmp_path):
    before = len(networks())
    other = clip_folder(tmp_path / "other", seed=1)
    names = [f"clipscore={folder}", f"clipscore={other}", f"hpsv21={folder}"]
    loaded = [rewards.load(name) for name in names]
    assert len(networks()) == before + 3
    first, second, _ = (reward(pictures(4), PROMPTS, [{}] * 4) for reward in loaded)
    assert (first != second).any()


def test_a_network_is_freed_once_nobody_uses_it(folder, tmp_path):
    before = len(networks())
    one, other = rewards.load(f"clipscore={folder}"), rewards.load(f"pickscore={folder}")
    shutil.rmtree(folder)
    one(pictures(1), ["red"], [{}])
    del one
    assert len(networks()) == before + 1
    other(pictures(1), ["red"], [{}])
    del other
    assert len(networks()) == before
    with pytest.raises(ValueError, match="there is no such folder"):
        rewards.load(f"clipscore={folder}")


def test_those_of_the_hub_are_shared_too(folder, head, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    on_the_hub(tmp_path / "cache", "openai/clip-vit-large-patch14", Path(folder).iterdir())
    before = len(networks())
    kept = [rewards.load("clipscore"), rewards.load("aesthetic", head=head)]
    assert len(networks()) == before + 1
    kept.append(rewards.load(f"clipscore={folder}"))
    assert len(networks()) == before + 2
    assert os.listdir(tmp_path / "cache") == ["models--openai--clip-vit-large-patch14"]
