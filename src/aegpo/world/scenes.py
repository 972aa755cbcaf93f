"""The embedded world's language and its pictures: what a prompt asks for, and how such a scene is drawn.

A `Request` is what a prompt asks for (shapes, perhaps colours, perhaps a relation); a `Scene` is one concrete picture
that grants it. The six tasks are GenEval's (arXiv 2310.11513) in miniature.
"""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

SIZE = 32
BACKGROUND = (236, 234, 228)
COLORS = {
    "red": (214, 48, 49),
    "green": (39, 158, 70),
    "blue": (45, 95, 220),
    "yellow": (247, 200, 30),
    "purple": (150, 60, 180),
    "black": (35, 35, 35),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
RELATIONS = ("above", "below", "left of", "right of")
NUMBERS = {"two": 2, "three": 3, "four": 4}
TASKS = ("one_object", "two_objects", "counting", "colors", "position", "color_attribution")

OPENINGS = (
    *("", "", "", "a picture of ", "a drawing of ", "an image of ", "a sketch of "),
    *("there is ", "here is ", "draw ", "show ", "this shows "),
)
RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
JOINERS = ("and", "with", "next to", "beside")


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: one `(shape, color or None)` per object, and how the first stands to the second."""

    objects: tuple[tuple[str, str | None], ...]
    relation: str | None = None

    @property
    def task(self) -> str:
        """Which of GenEval's six tasks this is."""
        colored = any(color for _, color in self.objects)
        if self.relation:
            return "position"
        if len(self.objects) == 1:
            return "colors" if colored else "one_object"
        if len(set(self.objects)) == 1:
            return "counting"
        return "color_attribution" if colored else "two_objects"


@dataclass(frozen=True)
class Placed:
    """One drawn object: centre `(x, y)` and half-width `radius` in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


Scene = tuple[Placed, ...]


# ---------------------------------------------------------------- language


def write(request: Request, rng: np.random.Generator) -> str:
    """One of the many plain-English wordings of a request."""
    opening = OPENINGS[rng.integers(len(OPENINGS))]
    first, *others = request.objects
    if others and len(set(request.objects)) == 1:
        number = next(word for word, n in NUMBERS.items() if n == len(request.objects))
        return opening.replace(" is ", " are ") + _noun_phrase(first, number, rng)
    phrase = _noun_phrase(first, "one" if rng.random() < 0.15 else "a", rng)
    if not others:
        return opening + phrase
    words = RELATION_WORDS[request.relation] if request.relation else JOINERS[: 2 + 2 * (rng.random() < 0.5)]
    return f"{opening}{phrase} {words[rng.integers(len(words))]} {_noun_phrase(others[0], 'a', rng)}"


def _noun_phrase(item: tuple[str, str | None], determiner: str, rng: np.random.Generator) -> str:
    shape, color = item
    plural = determiner in NUMBERS
    noun = (shape + ("es" if shape == "cross" else "s")) if plural else shape
    if color is None:
        return f"{determiner} {noun}"
    if rng.random() < 0.2:
        return f"{determiner} {noun} that {'are' if plural else 'is'} {color}"
    return f"{determiner} {color} {noun}"


_NOUNS = {s: s for s in SHAPES} | {s + "s": s for s in SHAPES if s != "cross"} | {"crosses": "cross"}
_ITEM = re.compile(
    rf"\b(?:(a|an|one|{'|'.join(NUMBERS)}) )?(?:({'|'.join(COLORS)}) )?({'|'.join(sorted(_NOUNS, key=len)[::-1])})\b"
    rf"(?: that (?:is|are) ({'|'.join(COLORS)})\b)?"
)


def parse(prompt: str) -> Request:
    """Read a prompt back into the request it states; the inverse of `write`.

    Raises:
        ValueError: the prompt names no shape of this world, or more than four objects, or its relation is not between
            two.
    """
    text = " ".join(prompt.lower().split())
    items = list(_ITEM.finditer(text))
    objects: list[tuple[str, str | None]] = []
    for item in items:
        number, before, noun, after = item.groups()
        objects += [(_NOUNS[noun], before or after)] * NUMBERS.get(number or "a", 1)
    if not 1 <= len(objects) <= 4:
        raise ValueError(f"prompt {prompt!r} must ask for one to four of these shapes: {', '.join(SHAPES)}")
    if not (relation := _relation_in(text)):
        return Request(tuple(objects))
    if len(items) != 2 or len(objects) != 2 or relation != _relation_in(text[items[0].end() : items[1].start()]):
        raise ValueError(f"prompt {prompt!r}: a relation must stand between two single objects")
    return Request(tuple(objects), relation)


def _relation_in(text: str) -> str | None:
    for relation, phrases in RELATION_WORDS.items():
        if any(re.search(rf"\b{phrase}\b", text) for phrase in phrases):
            return relation
    return None


@cache
def words() -> frozenset[str]:
    """Every word the world's language uses: the vocabulary of the embedded tokenizer."""
    text = [*OPENINGS, *JOINERS, *COLORS, *_NOUNS, *NUMBERS, "a an one here there are that is are"]
    text += [w for ws in RELATION_WORDS.values() for w in ws]
    return frozenset(" ".join(text).split())


# ---------------------------------------------------------------- pictures


def random_request(rng: np.random.Generator, task: str | None = None) -> Request:
    """A request drawn uniformly from one task; from a random mixture of all when `task` is None.

    The mixture also holds what the six tasks leave out (a position with colours, a number with a colour), so that a
    model trained on it knows the whole language.
    """
    mixed = task is None
    task = task or TASKS[rng.integers(len(TASKS))]
    shapes = [str(s) for s in rng.permutation(SHAPES)]
    colors = [str(c) for c in rng.permutation(list(COLORS))]
    match task:
        case "one_object":
            return Request(((shapes[0], None),))
        case "colors":
            return Request(((shapes[0], colors[0]),))
        case "counting":
            color = colors[0] if mixed and rng.random() < 0.25 else None
            return Request(((shapes[0], color),) * int(rng.integers(2, 5)))
        case "two_objects":
            return Request(((shapes[0], None), (shapes[1], None)))
        case "color_attribution":
            return Request(((shapes[0], colors[0]), (shapes[1], colors[1])))
        case "position":
            tint = colors if mixed and rng.random() < 0.25 else [None, None]
            return Request(((shapes[0], tint[0]), (shapes[1], tint[1])), str(rng.choice(RELATIONS)))
        case _:
            raise ValueError(f"task {task!r} is not one of {', '.join(TASKS)}")


def related(a: tuple[float, float], b: tuple[float, float], relation: str, margin: float = 4.0) -> bool:
    """Whether centre `a` stands to centre `b` (x, y in pixels) as the relation says, by at least `margin`."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    match relation:
        case "above":
            return dy < -margin and abs(dy) > abs(dx)
        case "below":
            return dy > margin and abs(dy) > abs(dx)
        case "left of":
            return dx < -margin and abs(dx) > abs(dy)
        case "right of":
            return dx > margin and abs(dx) > abs(dy)
        case _:
            raise ValueError(f"relation {relation!r} is not one of {', '.join(RELATIONS)}")


def arrange(request: Request, rng: np.random.Generator) -> Scene:
    """Choose a concrete scene that grants the request: free colours, sizes and places are random, nothing overlaps.

    Boxes lie on the pixel grid, 9 to 12 pixels wide, at least 2 apart and 1 from the border.
    """
    count = len(request.objects)
    side, corner = _places(count, request.relation, rng)
    same = str(rng.choice(list(COLORS)))
    counting = count > 1 and len(set(request.objects)) == 1
    return tuple(
        Placed(shape, color or (same if counting else str(rng.choice(list(COLORS)))), x + w / 2, y + w / 2, w / 2)
        for (shape, color), (x, y), w in zip(request.objects, corner.tolist(), side.tolist(), strict=True)
    )


def _places(count: int, relation: str | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sides (count,) and corners (count, 2) of boxes, by rejection, 64 proposals at a time."""
    pairs = np.triu_indices(count, 1)
    while True:
        side = rng.integers(9, 13, (64, count))
        corner = rng.integers(1, SIZE - side[..., None], (64, count, 2))
        centre = corner + side[..., None] / 2
        gap = np.abs(centre[:, :, None] - centre[:, None]).max(-1) - (side[:, :, None] + side[:, None]) / 2
        for i in np.flatnonzero((gap[:, *pairs] >= 2).all(-1)):
            if relation is None or related(tuple(centre[i, 0]), tuple(centre[i, 1]), relation, margin=6.0):
                return side[i], corner[i]


def coverage(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points of the square [-1, 1] x [-1, 1] (y grows downwards) the shape covers; boolean, as `x`."""
    inside = (np.abs(x) <= 1) & (np.abs(y) <= 1)
    match shape:
        case "circle":
            return x**2 + y**2 <= 1
        case "square":
            return inside
        case "triangle":
            return inside & (np.abs(x) <= (1 + y) / 2)
        case "cross":
            return inside & ((np.abs(x) <= 0.35) | (np.abs(y) <= 0.35))
        case "ring":
            return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.25)
        case _:
            raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def draw(scene: Scene, supersample: int = 4) -> np.ndarray:
    """Render a scene with antialiasing; uint8 (32, 32, 3)."""
    fine = (np.arange(SIZE * supersample) + 0.5) / supersample
    image = np.broadcast_to(np.array(BACKGROUND, np.float32), (SIZE, SIZE, 3))
    for item in scene:
        mask = coverage(item.shape, (fine[None] - item.x) / item.radius, (fine[:, None] - item.y) / item.radius)
        alpha = mask.reshape(SIZE, supersample, SIZE, supersample).mean((1, 3), dtype=np.float32)[..., None]
        image = image * (1 - alpha) + alpha * np.array(COLORS[item.color], np.float32)
    return np.rint(image).astype(np.uint8)
