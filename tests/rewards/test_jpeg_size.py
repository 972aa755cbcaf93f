import numpy as np
import pytest
from PIL import Image

from aegpo import rewards
from tests.rewards.small import pictures


def size(images):
    return rewards.load("jpeg_size").judge(images, ["a"] * len(images), [{}] * len(images))


def test_it_is_the_kilobytes_of_a_file_of_quality_95(tmp_path):
    images = np.concatenate([pictures(2, 60, 97), np.random.default_rng(0).integers(0, 256, (1, 60, 97, 3), np.uint8)])
    due = []
    for image in images:
        Image.fromarray(image).save(tmp_path / "picture.jpg", quality=95)
        due.append((tmp_path / "picture.jpg").stat().st_size / 1000)
    said = size(images)
    assert said.score == pytest.approx(due, rel=1e-6)
    assert said.score.dtype == np.float32
    assert said.passed is None
    assert due[2] > due[0] > 2


def test_sixteen_by_sixteen_grey_pixels_are_four_bytes():
    """Of brightness four blocks and of colour two, half as fine, none with anything to say: 4 (2 + 4) + 2 (2 + 2) bits.

    These are what Huffman's standard tables have for "as before" (2, 2) and for "nothing else" (4, 2).
    """
    sizes = [size(np.full((1, 16 * rows, 32, 3), 128, np.uint8)).score[0] for rows in (1, 2, 8)]
    assert sizes[1] - sizes[0] == pytest.approx(0.008, abs=1e-6)
    assert sizes[2] - sizes[0] == pytest.approx(0.056, abs=1e-6)


def test_no_pictures_have_no_sizes():
    assert size(pictures(0)).score.shape == (0,)
    assert rewards.load("jpeg_size").range == (0, np.inf)
