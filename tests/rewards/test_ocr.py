"""OCR accuracy on texts that Pillow writes, and edit distances worked out by hand."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from aegpo import rewards

FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
TEXTS = ["Hello World", "OPEN", "2024", "Sale 50% off", "Room 101", "Happy Birthday!", "Don't panic", "10:30", "it"]


@pytest.fixture(scope="module")
def reward():
    return rewards.load("ocr")


def written(text, height=96, width=224, at=None, size=24):
    """The text, dark on light, at its place or in the middle, uint8 (height, width, 3)."""
    picture = Image.new("RGB", (width, height), (240, 220, 180))
    pen, font = ImageDraw.Draw(picture), ImageFont.truetype(FONT, size)
    where = at or (width / 2, height / 2)
    pen.text(where, text, (40, 20, 90), font, anchor="la" if at else "mm")
    return np.asarray(picture)


def judged(reward, images, texts):
    return reward.judge(np.array(images), [f'a sign that says "{text}"' for text in texts], [{}] * len(texts))


def test_what_is_written_scores_high_and_what_is_not_scores_low(reward):
    random = np.random.default_rng(0)
    free = [written(text, 160, 224, tuple(random.integers(0, [20, 130]).tolist())) for text in TEXTS]
    said = judged(reward, free, TEXTS)
    assert said.score.dtype == np.float32
    assert said.score.mean() >= 0.95
    assert (said.passed == (said.score == 1)).all()
    others = judged(reward, free, [*TEXTS[4:], *TEXTS[:4]])
    assert others.score.mean() <= 0.2
    assert not others.passed.any()


def test_a_picture_that_is_one_line(reward):
    lines = [written(text, 36, 210) for text in TEXTS]
    assert judged(reward, lines, TEXTS).score.mean() >= 0.95


def test_empty_pictures_score_0(reward):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    empty = [np.zeros_like(noise), np.full_like(noise, 255), noise]
    said = judged(reward, empty, ["OPEN", "it", "2024"])
    assert said.score.tolist() == [0, 0, 0]
    assert said.passed.tolist() == [False, False, False]


@pytest.mark.parametrize(
    ("due", "score"),
    [
        ("COFFEE shop", 1),
        ("coffee\nSHOP ", 1),
        ("fee", 1),  # it stands in it
        ("coffee shops", 10 / 11),  # one letter is missing
        ("toffee ship", 8 / 10),  # two others
        ("shop coffee", 2 / 10),  # the four letters of one word taken away and put back
        ("cafe shop", 1 - 3 / 8),  # coffee: o for a, two letters too many
        ("tea", 0),  # seven letters too many at the least, and three are all that count
        ("x" * 40, 0),  # all 40 are other letters
        ("coffeeshop" + "x" * 30, 1 / 4),  # 30 of 40 are missing
    ],
)
def test_edit_distances_by_hand(reward, due, score):
    picture = written("Coffee Shop")
    said = reward.judge(picture[None], ["a sign"], [{"text": due}])
    assert said.score == pytest.approx([score], abs=1e-6)
    assert said.passed.tolist() == [score == 1]


def test_lines_are_joined_from_the_top_down(reward):
    picture = written("Grand", at=(60, 10)) + written("Opening", at=(30, 50)) - written("")
    assert judged(reward, [picture] * 2, ["Grand Opening", "Opening Grand"]).passed.tolist() == [True, False]


@pytest.mark.parametrize(
    ("prompt", "metadata", "passes"),
    [
        ('a "OPEN" sign', {}, True),
        ("a “OPEN” sign", {}, True),
        ('a " " sign, "OPEN", "SHUT"', {}, True),
        ('a sign, "SHUT", "OPEN"', {}, False),
        ('a "SHUT" sign', {"text": "OPEN"}, True),
        ('a "OPEN" sign', {"text": "SHUT"}, False),
        ('a "OPEN" sign', {"task": "SHUT"}, True),
    ],
)
def test_the_text_that_is_due(reward, prompt, metadata, passes):
    assert reward.judge(written("OPEN")[None], [prompt], [metadata]).passed.tolist() == [passes]


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [
        ("a sign that says OPEN", {}),
        ('a 12" record', {}),
        ('a " " sign', {}),
        ('a "OPEN" sign', {"text": " "}),
        ('a "OPEN" sign', {"text": 7}),
    ],
)
def test_a_prompt_without_a_text(reward, prompt, metadata):
    with pytest.raises(ValueError, match=r"^reward: ocr: no text is due in .*; it should stand there in") as raised:
        reward.judge(written("OPEN")[None], [prompt], [metadata])
    assert repr(prompt) in str(raised.value)


def test_a_score_is_the_same_in_any_company(reward):
    pictures = [written(text) for text in ("Coffee", "Shop", "", "Open", "Coffee Shop")]
    texts = ["Toffee", "Ship", "Shop", "Open", "Coffee"]
    together = judged(reward, pictures, texts).score
    assert len(set(together.tolist())) == 4
    assert (judged(reward, pictures[::-1], texts[::-1]).score[::-1] == together).all()
    alone = [judged(reward, [picture], [text]).score[0] for picture, text in zip(pictures, texts, strict=True)]
    assert alone == together.tolist()
    assert judged(reward, np.zeros((0, 64, 64, 3), np.uint8), []).score.shape == (0,)


def test_nothing_is_printed_or_fetched():
    code = """
import socket
import numpy as np
from aegpo import rewards

socket.socket.connect = None
reward = rewards.load("ocr")
print(reward(np.full((1, 64, 64, 3), 255, np.uint8), ["a"], [{"text": "a"}]).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[0.0]\n", "")


def test_without_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ValueError, match=r"^reward: ocr needs rapidocr, .*: pip install 'aegpo\[ocr\]'$"):
        rewards.load("ocr")
