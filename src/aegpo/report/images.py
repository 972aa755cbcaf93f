"""Grids of pictures with prompt and score, and reading them back."""

import io
import json
import math
from base64 import b64encode
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from aegpo import disk
from aegpo.report.records import inside

if TYPE_CHECKING:
    import numpy as np

SMALL, LARGE = 128, 256  # pictures are shown about this large at least, and this large at most
MARGIN, LINE_HEIGHT, PROMPT_LINES, MAX_COLUMNS = 12, 15, 3, 8
LONGEST_PROMPT = 500  # characters: far more than three lines hold
PAPER, INK, FAINT, EDGE, GREEN, RED = "#ffffff", "#24292e", "#6a737d", "#e4e2dc", "#1a7f4b", "#c2413a"
FRAMES_A_SECOND = 16  # of a video, as Wan draws them
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sample:
    """One picture of a grid, as a `data:` address; `passed` is None where no verifier says pass or fail."""

    prompt: str
    score: float
    passed: bool | None
    picture: str


def save_picture(path: Path, picture: "np.ndarray") -> None:
    """Writes a picture, uint8 (H, W, 3), or a video (frames, H, W, 3) as an animation, in the format of the name."""
    first, *others = [Image.fromarray(frame) for frame in (picture if picture.ndim == 4 else picture[None])]
    if others:
        first.save(path, save_all=True, append_images=others, duration=1000 // FRAMES_A_SECOND, loop=0)
    else:
        first.save(path)


def save_grid(
    path: Path,
    images: "np.ndarray",
    prompts: Sequence[str],
    scores: Sequence[float],
    passed: Sequence[bool | None] | None = None,
) -> None:
    """Writes a grid of pictures, each with its prompt and score below it, and a JSON file of the same name beside it.

    Small pictures are enlarged by a whole factor to about 128 pixels, pixel for pixel; large ones are shrunk to 256.
    The JSON file has `prompts`, `scores`, `passed` (true, false or null) and `boxes`: left, top, right and bottom of
    each picture in the grid.

    Args:
        path: The PNG file; its folder is made if need be.
        images: (n, H, W, 3) uint8.
        prompts: n prompts.
        scores: n scores.
        passed: n verdicts, drawn as a green tick or a red cross; None where there are none.
    """
    assert images.dtype == "uint8" and images.ndim == 4 and images.shape[0] > 0 and images.shape[3] == 3
    verdicts = (
        [None] * len(images) if passed is None else [None if verdict is None else bool(verdict) for verdict in passed]
    )
    pictures = [_resized(Image.fromarray(image)) for image in images]
    boxes = _boxes(len(pictures), *pictures[0].size)
    grid = Image.new("RGB", _canvas_size(boxes), PAPER)
    for picture, box, prompt, score, verdict in zip(pictures, boxes, prompts, scores, verdicts, strict=True):
        grid.paste(picture, box)
        draw = ImageDraw.Draw(grid)
        draw.rectangle((box[0] - 1, box[1] - 1, box[2], box[3]), outline=EDGE)
        _draw_caption(draw, box, prompt, float(score), verdict)
    record = {"prompts": list(prompts), "scores": [float(s) for s in scores], "passed": verdicts, "boxes": boxes}
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, _encoded(grid, "PNG"))
    disk.write(path.with_suffix(".json"), json.dumps(record, ensure_ascii=False, indent=1).encode())


def sample_names(folder: Path) -> list[str]:
    """The grids of a run, oldest first, as names such as `samples/step-000010`; empty where there are none."""
    return sorted(f"samples/{path.stem}" for path in inside(folder, "samples").glob("step-*.json"))


def read_samples(folder: Path, name: str) -> list[Sample]:
    """Cuts a grid of the run back into its pictures. `name` is one of `sample_names`."""
    record = json.loads(inside(folder, f"{name}.json").read_text(encoding="utf-8"))
    with Image.open(inside(folder, f"{name}.png")) as grid:
        pictures = [_data_address(grid.crop(box)) for box in record["boxes"]]
    columns = record["prompts"], record["scores"], record["passed"], pictures
    return [Sample(*fields) for fields in zip(*columns, strict=True)]


def _resized(picture: Image.Image) -> Image.Image:
    longest = max(picture.size)
    if longest > LARGE:
        size = [max(1, round(side * LARGE / longest)) for side in picture.size]
        return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    factor = max(1, round(SMALL / longest))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _boxes(count: int, width: int, height: int) -> list[Box]:
    columns = min(math.ceil(math.sqrt(count)), MAX_COLUMNS)
    across, down = max(width, SMALL) + MARGIN, height + (PROMPT_LINES + 1) * LINE_HEIGHT + 2 * MARGIN
    corners = [(MARGIN + index % columns * across, MARGIN + index // columns * down) for index in range(count)]
    return [(left, top, left + width, top + height) for left, top in corners]


def _canvas_size(boxes: list[Box]) -> tuple[int, int]:
    right = max(max(box[2], box[0] + SMALL) for box in boxes)
    return right + MARGIN, boxes[-1][3] + (PROMPT_LINES + 1) * LINE_HEIGHT + 2 * MARGIN


def _draw_caption(draw: ImageDraw.ImageDraw, box: Box, prompt: str, score: float, verdict: bool | None) -> None:
    left, top = box[0], box[3] + 5
    small, plain = ImageFont.load_default(11), ImageFont.load_default(12)
    if verdict is not None:
        _draw_verdict(draw, left + 1, top + 2, verdict)
    draw.text((left if verdict is None else left + 16, top), f"{score:.2f}", fill=INK, font=plain)
    for number, line in enumerate(_wrapped(prompt, small, max(box[2] - left, SMALL)), start=1):
        draw.text((left, top + number * LINE_HEIGHT), line, fill=FAINT, font=small)


def _draw_verdict(draw: ImageDraw.ImageDraw, left: int, top: int, passed: bool) -> None:
    if passed:
        draw.line([(left, top + 5), (left + 3, top + 8), (left + 10, top)], fill=GREEN, width=2)
    else:
        draw.line([(left, top), (left + 9, top + 9)], fill=RED, width=2)
        draw.line([(left, top + 9), (left + 9, top)], fill=RED, width=2)


def _wrapped(text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int) -> list[str]:
    lines = list(_broken(text[:LONGEST_PROMPT], font, width))
    if len(lines) <= PROMPT_LINES:
        return lines
    return [*lines[: PROMPT_LINES - 1], lines[PROMPT_LINES - 1][:-1].rstrip() + "..."]


def _broken(text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        if font.getlength(f"{line} {word}".strip()) <= width:
            line = f"{line} {word}".strip()
            continue
        if line:
            yield line
        while font.getlength(word) > width:  # a word longer than a line is cut where the line ends
            too_long = bisect_right(range(len(word)), width, key=lambda end: font.getlength(word[:end]))
            yield word[: too_long - 1]
            word = word[too_long - 1 :]
        line = word
    if line:
        yield line


def _data_address(picture: Image.Image) -> str:
    kind = "PNG" if max(picture.size) < LARGE else "JPEG"  # an enlarged picture has few pixels of its own
    return f"data:image/{kind.lower()};base64,{b64encode(_encoded(picture, kind)).decode()}"


def _encoded(picture: Image.Image, file_format: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, quality=90, optimize=True)
    return file.getvalue()
