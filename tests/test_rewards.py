import numpy as np
import pytest

from aegpo import rewards, world
from aegpo.types import Judgement

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


def own(tmp_path, body):
    path = tmp_path / "my_reward.py"
    path.write_text(f"import numpy as np\n{body}\n")
    return f"{path}:score"


def test_a_function_of_images_and_prompts(tmp_path):
    reward = rewards.load(
        own(tmp_path, "def score(images, prompts): return [len(p) + i.mean() for i, p in zip(images, prompts)]")
    )
    judged = reward.judge(IMAGES, ["a", "bcd"], [{}, {}])
    assert judged.score.tolist() == pytest.approx([1 + 23.5, 3 + 71.5])
    assert judged.score.dtype == np.float32
    assert judged.passed is None


def test_a_function_that_wants_the_metadata(tmp_path):
    reward = rewards.load(own(tmp_path, "def score(images, prompts, metadata): return [row['x'] for row in metadata]"))
    assert reward.judge(IMAGES, ["a", "b"], [{"x": 2}, {"x": -1}]).score.tolist() == [2, -1]


def test_a_function_of_a_module_by_dotted_path():
    reward = rewards.load("aegpo.world.verifier:verify")  # answers with scores and passes: two rows, not n numbers
    with pytest.raises(ValueError, match=r"verify returned shape \(2, 3\) for 3 images"):
        reward.judge(np.zeros((3, 32, 32, 3), np.uint8), ["a ring"] * 3, [{}] * 3)


def test_a_third_argument_with_a_default_is_not_metadata(tmp_path):
    reward = rewards.load(own(tmp_path, "def score(images, prompts, bonus=7, **rest): return [bonus] * len(images)"))
    assert reward.judge(IMAGES, ["a", "b"], [{}, {}]).score.tolist() == [7, 7]


def test_a_module_beside_the_file_and_a_dataclass_in_it(tmp_path):
    (tmp_path / "beside_this_reward.py").write_text("VALUE = 3\n")
    body = """from __future__ import annotations
from dataclasses import dataclass
from beside_this_reward import VALUE

@dataclass
class Scale:
    by: float

def score(images, prompts):
    return [Scale(VALUE).by] * len(images)
"""
    (tmp_path / "scaled.py").write_text(body)
    assert rewards.load(f"{tmp_path}/scaled.py:score").judge(IMAGES, ["a", "b"], [{}, {}]).score.tolist() == [3, 3]


def test_a_file_named_as_a_module_does_not_stand_in_its_place(tmp_path):
    (tmp_path / "colorsys.py").write_text("def score(images, prompts): return [4.0] * len(images)\n")
    reward = rewards.load(f"{tmp_path}/colorsys.py:score")
    assert reward.judge(IMAGES, ["a", "b"], [{}, {}]).score.tolist() == [4, 4]
    import colorsys

    assert colorsys.rgb_to_hsv(1, 0, 0) == (0, 1, 1)


def test_the_world_reward_is_the_verifier():
    row = world.held_out()[0]
    picture = np.full((1, 32, 32, 3), 240, np.uint8)
    judged = rewards.load("world").judge(picture, [row["prompt"]], [row])
    assert judged.score.tolist() == [0.0]
    assert judged.passed is not None
    assert judged.passed.tolist() == [False]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def score(images, prompts): return [1.0]", r"returned shape \(1,\) for 2 images"),
        ("def score(images, prompts): return np.ones((2, 1))", r"returned shape \(2, 1\)"),
        ("def score(images, prompts): return ['good', 'bad']", "returned something that is not numbers"),
        ("def score(images, prompts): return None", r"returned shape \(\) for 2 images"),
        ("def score(images, prompts): return [int('x')] * 2", "line 2: ValueError: invalid literal for int"),
        ("def score(images, prompts): raise SystemExit('bye')", "line 2: SystemExit: bye"),
    ],
)
def test_an_answer_that_is_no_answer(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        rewards.load(own(tmp_path, body)).judge(IMAGES, ["a", "b"], [{}, {}])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pickscore2", "reward: 'pickscore2' is unknown; known are aesthetic, clipscore, .*; did you mean pickscore?"),
        ("imagereword=models/ir", "'imagereword=models/ir' is unknown; .*; did you mean imagereward?"),
        ("beauty", "reward: 'beauty' is unknown; known are .*, and your own as 'my_reward.py:score'$"),
        ("hpsv21=", "has nothing after the ="),
        ("world=7", "reward: world=7 takes nothing after the =$"),
        ("hpsv21=models/none", "reward: hpsv21=models/none cannot be used: there is no such folder"),
        ("missing.py:score", "file missing.py does not exist"),
        (":score", "names no file or module"),
        ("no_such_module_at_all:score", "cannot be imported"),
        ("numpy:no_such_function", "has no function or class 'no_such_function'"),
        ("numpy:pi", "has no function or class 'pi'"),
    ],
)
def test_unknown_rewards(name, message):
    with pytest.raises(ValueError, match=message):
        rewards.load(name)


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("aesthetic", "openai/clip-vit-large-patch14"),
        ("clipscore", "openai/clip-vit-large-patch14"),
        ("hpsv21", "RE-N-Y/hpsv21"),
        ("imagereward", "RE-N-Y/ImageReward"),
        ("pickscore", "yuvalkirstain/PickScore_v1"),
    ],
)
def test_a_scorer_that_the_hub_does_not_give(name, repository, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    with pytest.raises(
        ValueError, match=f"^reward: {name} needs {repository} of the Hub, which .*={'FOLDER'}$"
    ) as raised:
        rewards.load(name)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_python(tmp_path):
    with pytest.raises(ValueError, match="is not valid Python: line 2"):
        rewards.load(own(tmp_path, "def score(:"))


def test_a_video_is_judged_by_the_mean_of_evenly_spaced_frames(tmp_path):
    (tmp_path / "own.py").write_text(
        "def score(images, prompts):\n    return images[:, 0, 0, 0] + 100.0 * len(prompts)\n"
    )
    judge = rewards.load(f"{tmp_path / 'own.py'}:score")
    video = np.zeros((2, 15, 4, 4, 3), np.uint8)
    video[0, :, 0, 0, 0] = np.arange(15)
    video[1, :, 0, 0, 0] = 100 + np.arange(15)
    score = judge.judge(
        video, ["a", "b"], [{}, {}]
    ).score  # frames 0, 2, ..., 14 of each: 16 pictures, each with its prompt
    assert score.tolist() == [7 + 1600, 107 + 1600]
    assert judge.judge(video[:, :3], ["a", "b"], [{}, {}]).score.tolist() == [1 + 600, 101 + 600]


def test_a_video_passes_where_all_its_frames_do():
    verdicts = {0: False, 1: True}
    judge = rewards.on_frames(
        lambda images, prompts, metadata: Judgement(
            images[:, 0, 0, 0].astype(np.float32), np.array([verdicts[v] for v in images[:, 0, 0, 0]])
        )
    )
    video = np.ones((2, 3, 4, 4, 3), np.uint8)
    video[1, 1] = 0
    assert judge(video, ["a", "b"], [{}, {}]).passed.tolist() == [True, False]
