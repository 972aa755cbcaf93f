"""Golden pairs: pictures of which everybody knows the better one, to see whether a reward does."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aegpo.rewards import Reward
from aegpo.world import scenes

SIDE = 256  # pixels of a drawn picture
WORDS = "MARKET", "harbour", "1984", "open late", "No. 57", "Wednesday"
SCENES = "a red circle", "a blue square", "two green rings", "a yellow cross", "a red square above a blue circle"


@dataclass(frozen=True)
class Pair:
    """Two pictures for one prompt, uint8 (H, W, 3) each."""

    prompt: str
    good: np.ndarray
    bad: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)


def drawn_pairs(name: str) -> list[Pair]:
    """Pairs that are drawn for a shipped reward, each far apart; raises ValueError for one that there are none for."""
    match name.partition("=")[0]:
        case "world":
            return _scenes(scale=1)
        case "clipscore" | "hpsv21" | "imagereward" | "pickscore" | "vlm":
            return _scenes(scale=SIDE // 32)
        case "ocr":
            pictures = [_written(words) for words in WORDS]
            return [Pair(f'a sign that reads "{words}"', pictures[i], pictures[i - 1]) for i, words in enumerate(WORDS)]
        case "aesthetic":
            return [Pair("a landscape", _landscape(seed), _noise(seed)) for seed in range(4)]
        case "jpeg_size":
            return [Pair("a picture", _noise(seed), _landscape(seed)) for seed in range(4)]
        case other:
            raise ValueError(f"reward-check: no pairs are drawn for {other}; give some of yours as --pairs FILE.jsonl")


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from a .jsonl: `prompt`, the image files `good` and `bad`, beside it or absolute, and any metadata.

    Raises:
        ValueError: the file or one of its pictures cannot be read; which line it is.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--pairs: {path} cannot be read: {error}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = dict(json.loads(line))
            prompt, good, bad = (row.pop(key) for key in ("prompt", "good", "bad"))
            if not all(isinstance(text, str) for text in (prompt, good, bad)):
                raise TypeError("all three are texts")
            good, bad = (np.asarray(Image.open(path.parent / file).convert("RGB")) for file in (good, bad))
            pairs.append(Pair(prompt, good, bad, row))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            said = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            due = "" if isinstance(error, OSError) else "; a line holds prompt, good and bad"
            raise ValueError(f"--pairs: {path}, line {number}: {said}{due}") from None
    if not pairs:
        raise ValueError(f"--pairs: {path} holds no pairs")
    return pairs


def judge_pairs(reward: Reward, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """The scores of each pair's good and bad picture; a pair is judged together, as a group of two, if sizes allow."""
    scores = []
    for pair in pairs:
        alike = pair.good.shape == pair.bad.shape
        if not alike and reward.groupwise:
            raise ValueError(
                f"reward-check: {reward.name} compares, so both pictures for {pair.prompt!r} must be of one size"
            )
        calls = [np.stack([pair.good, pair.bad])] if alike else [pair.good[None], pair.bad[None]]
        said = [reward(call, [pair.prompt] * len(call), [pair.metadata] * len(call)) for call in calls]
        good, bad = np.concatenate(said).tolist()
        scores.append((good, bad))
    return scores


def _scenes(scale: int) -> list[Pair]:
    """Each prompt's own scene, and for a worse one the next prompt's."""
    rng = np.random.default_rng(0)
    pictures = [scenes.draw(scenes.arrange(scenes.parse(prompt), rng)) for prompt in SCENES]
    pictures = [picture.repeat(scale, 0).repeat(scale, 1) for picture in pictures]
    return [Pair(prompt, pictures[i], pictures[i - 1]) for i, prompt in enumerate(SCENES)]


def _written(words: str) -> np.ndarray:
    picture = Image.new("RGB", (SIDE, SIDE // 2), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=SIDE / 7)
    pen.text((SIDE // 2, SIDE // 4), words, "black", font, anchor="mm")
    return np.asarray(picture)


def _landscape(seed: int) -> np.ndarray:
    """A sky that grows lighter towards the horizon, a sun, and two ranges of hills."""
    rng = np.random.default_rng(seed)
    down = np.linspace(0, 1, SIDE)[:, None, None]
    sky = (1 - down) * np.array([40, 80, 160]) + down * np.array([250, 190, 130])
    picture = Image.fromarray(np.broadcast_to(sky, (SIDE, SIDE, 3)).astype(np.uint8))
    pen, x, left = ImageDraw.Draw(picture), np.arange(SIDE), int(rng.integers(60, 180))
    pen.ellipse((left, 90, left + 36, 126), (255, 235, 190))
    for height, colour in ((150, (70, 80, 120)), (195, (35, 45, 70))):
        waves = [rng.uniform(5, 14) * np.sin(x * rng.uniform(0.01, 0.06) + rng.uniform(0, 6)) for _ in range(3)]
        ridge = height + np.sum(waves, axis=0)
        pen.polygon([(0, SIDE), *zip(x.tolist(), ridge.tolist(), strict=True), (SIDE, SIDE)], colour)
    return np.asarray(picture)


def _noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
