"""What image encoders see, against transformers' own image processor and against torchvision's rules by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from aegpo.rewards.pictures import MEAN, STD, cropped, letterboxed
from tests.rewards.small import pictures


def pixels(normalised):
    """The uint8 values behind what an encoder sees, (n, H, W, 3)."""
    values = (normalised.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)) * 255
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().numpy().astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width"), [(224, 224), (512, 512), (64, 64), (300, 451), (451, 300), (231, 224), (100, 37)]
)
def test_cropped_is_transformers_own(height, width):
    images = pictures(2, height, width)
    theirs = CLIPImageProcessorPil()(list(images), return_tensors="pt").pixel_values
    torch.testing.assert_close(cropped(images, 224), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("extra", "top"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4)])
def test_cropped_by_rounding_begins_where_torchvision_begins(extra, top):
    """Its CenterCrop begins at int(round(extra / 2.0)), and Python rounds halves to the even."""
    images = pictures(1, 32 + extra, 32)
    assert (pixels(cropped(images, 32, round)) == images[:, top : top + 32]).all()
    assert (pixels(cropped(images.swapaxes(1, 2), 32, round)) == images[:, top : top + 32].swapaxes(1, 2)).all()


@pytest.mark.parametrize(("height", "width", "fitted"), [(64, 32, (32, 16)), (48, 20, (32, 13)), (30, 60, (16, 32))])
def test_letterboxed_is_the_whole_picture_between_black_bars(height, width, fitted):
    (image,) = images = pictures(1, height, width)
    whole = np.asarray(Image.fromarray(image).resize(fitted[::-1], Image.Resampling.BICUBIC))
    around = [((32 - edge) // 2, 32 - edge - (32 - edge) // 2) for edge in fitted]
    assert (pixels(letterboxed(images, 32))[0] == np.pad(whole, [*around, (0, 0)])).all()


def test_a_square_is_the_same_either_way():
    images = pictures(2, 100, 100)
    assert torch.equal(letterboxed(images, 64), cropped(images, 64))
