"""The embedded world's judge: exact rules over connected components, no learned part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
from scipy import ndimage

from aegpo.world.scenes import BACKGROUND, COLORS, RELATION_WORDS, SHAPES, Request, coverage, parse, related

MIN_AREA = 12  # pixels; smaller specks are dirt, not objects
MAX_SIDE = 16  # pixels; what is larger is a background, not an object
MIN_IOU = 0.72  # overlap with the ideal shape below which a blob has no name
MAX_COLOR_DISTANCE = 70.0  # Euclidean, 8-bit RGB
MAX_OBJECTS = 4  # that a prompt may ask for
_PALETTE = np.array(list(COLORS.values()), np.float32)


@dataclass(frozen=True)
class Found:
    """One object seen in a picture, at the centre of its box; what no rule recognises is None."""

    shape: str | None
    color: str | None
    x: float
    y: float


def detect(image: np.ndarray) -> list[Found]:
    """Every object of one uint8 (H, W, 3) picture of the world; specks below 12 pixels are overlooked.

    A shape is named only where it is seen whole: not cut off by the border, and no larger than an object can be.
    """
    ink = np.linalg.norm(image.astype(np.float32) - np.array(BACKGROUND, np.float32), axis=-1)
    labelled: Any = ndimage.label(ink > 45)
    blobs, count = labelled
    found = []
    for label, window in enumerate(ndimage.find_objects(blobs, count), start=1):
        strength = np.where(blobs[window] == label, ink[window], 0)
        cover = np.minimum(strength / np.quantile(strength[strength > 0], 0.8), 1)  # how much of each pixel it covers
        if cover.sum() < MIN_AREA:
            continue
        rows, columns = np.nonzero(cover >= 0.5)
        top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
        y, x = window[0].start, window[1].start
        at_border = min(y + top, x + left) == 0 or y + bottom == len(image) or x + right == len(image[0])
        found.append(
            Found(
                None if at_border else _name_shape(cover[top:bottom, left:right]),
                _name_color(image[window][cover >= 0.8].astype(np.float32)),
                x=float(x + (left + right) / 2),
                y=float(y + (top + bottom) / 2),
            )
        )
    return found


def _name_color(core: np.ndarray) -> str | None:
    distance = np.linalg.norm(np.median(core, axis=0) - _PALETTE, axis=-1)
    nearest = int(distance.argmin())
    votes = np.linalg.norm(core[:, None] - _PALETTE, axis=-1).argmin(1) == nearest
    return list(COLORS)[nearest] if distance[nearest] <= MAX_COLOR_DISTANCE and votes.mean() >= 0.75 else None


def _name_shape(cover: np.ndarray) -> str | None:
    height, width = cover.shape
    if not 3 / 4 <= height / width <= 4 / 3 or max(height, width) > MAX_SIDE:
        return None
    ideal = _templates(height, width)
    overlap = np.minimum(ideal, cover).sum((1, 2)) / np.maximum(ideal, cover).sum((1, 2))
    best = int(overlap.argmax())
    return SHAPES[best] if overlap[best] >= MIN_IOU else None


@lru_cache(maxsize=1024)
def _templates(height: int, width: int, supersample: int = 8) -> np.ndarray:
    """Each shape drawn into a box, as coverage in [0, 1]; (shapes, height, width)."""
    y = (2 * np.arange(height * supersample) + 1) / (height * supersample) - 1
    x = (2 * np.arange(width * supersample) + 1) / (width * supersample) - 1
    masks = np.stack([coverage(shape, x[None], y[:, None]) for shape in SHAPES])
    return masks.reshape(len(SHAPES), height, supersample, width, supersample).mean((2, 4))


def score(found: list[Found], request: Request) -> float:
    """How far the objects grant the request, in [0, 1]; exactly 1 when they grant it and show nothing else.

    Each requested object is paired with at most one found object (the best pairing counts): 1 for the right shape when
    no colour is asked for, else half for the shape and half for the colour. The sum is divided by the larger of the two
    counts, so missing and surplus objects cost alike. A relation is worth the last 30 %.
    """
    wanted = request.objects
    if not found:
        return 0.0
    found = found[:7]  # a picture so crowded has failed; bounds the pairings below
    slots: list[Found | None] = [*found, *[None] * (len(wanted) - len(found))]
    best = 0.0
    for pairing in permutations(slots, len(wanted)):
        pairs = list(zip(wanted, pairing, strict=True))
        value = sum(_match(want, have) for want, have in pairs) / max(len(wanted), len(found))
        if request.relation:
            first, second = pairing[0], pairing[1]
            stands = (
                first is not None
                and second is not None
                and first.shape == wanted[0][0]
                and second.shape == wanted[1][0]
                and related((first.x, first.y), (second.x, second.y), request.relation)
            )
            value = 0.7 * value + 0.3 * stands
        best = max(best, value)
    return best


def _match(want: tuple[str, str | None], have: Found | None) -> float:
    if have is None:
        return 0.0
    shape, color = want
    if color is None:
        return float(have.shape == shape)
    return 0.5 * (have.shape == shape) + 0.5 * (have.color == color)


def requested(prompt: str, metadata: Mapping[str, Any]) -> Request:
    """What a prompt asks for: by its metadata, if it has `objects`, else by its words.

    Raises:
        ValueError: neither says it.
    """
    if "objects" not in metadata:
        return parse(prompt)
    try:
        request = Request(tuple((shape, color) for shape, color in metadata["objects"]), metadata.get("relation"))
    except (TypeError, ValueError):
        raise ValueError(f"prompt {prompt!r}: objects must be a list of [shape, colour or null]") from None
    if not 1 <= len(request.objects) <= MAX_OBJECTS:
        raise ValueError(f"prompt {prompt!r}: objects must be one to {MAX_OBJECTS}, not {len(request.objects)}")
    for shape, color in request.objects:
        if shape not in SHAPES or color not in (None, *COLORS):
            raise ValueError(f"prompt {prompt!r}: this world knows no object {[shape, color]!r}")
    if request.relation not in (None, *RELATION_WORDS) or (request.relation and len(request.objects) < 2):
        raise ValueError(
            f"prompt {prompt!r}: relation {request.relation!r} is not of two objects, {', '.join(RELATION_WORDS)}"
        )
    return request


def verify(
    images: np.ndarray, prompts: Sequence[str] | None, metadata: Sequence[Mapping[str, Any]] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Judge pictures of the world.

    Args:
        images: uint8 (n, H, W, 3).
        prompts: n prompts; read by `scenes.parse` where the metadata does not say what was asked.
        metadata: n mappings with `objects` and `relation`, as in the world's prompt files.

    Returns:
        The graded scores, float32 (n,) in [0, 1], and the strict passes, bool (n,): everything right and nothing else.

    Raises:
        ValueError: a prompt asks for nothing this world knows.
    """
    texts = prompts or [""] * len(images)
    rows = metadata or [{}] * len(images)
    requests = [requested(text, row) for text, row in zip(texts, rows, strict=True)]
    scores = np.array(
        [score(detect(image), request) for image, request in zip(images, requests, strict=True)], "float32"
    )
    return scores, scores > 1 - 1e-6
