"""Whether a detector sees the objects that a prompt asks for: after GenEval (arXiv 2310.11513), and not GenEval."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator, BaseModel, Field, PositiveInt, ValidationError
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from transformers.utils import logging

from aegpo.config import did_you_mean
from aegpo.rewards import Metadata, Reward
from aegpo.rewards.clip import Clip, load_clip
from aegpo.rewards.weights import Source, device
from aegpo.types import Judgement

DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
AT_ONCE = 4  # pictures that go through the detector at once: at 800 x 800 pixels, each takes 0.9 GB there
SHORT, LONG, STRIDE = 800, 1333, 32  # the edges of what the detector sees, at most, and what they are multiples of
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
IDLE = (
    r"swin\.layernorm\.|relative_position_index$|^criterion\."  # weights that files may lack: nothing depends on them
)

CERTAIN, CERTAIN_COUNTING = 0.3, 0.9  # a detection counts as there if it scores more; the second where the tag says so
MOST = 16  # detections of a class that count, at most
NEAR = 0.1  # of two objects' widths or heights: by how much less their centres are taken to be apart

Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
Relation = Literal["left of", "right of", "above", "below"]
TEMPLATES = "a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object"  # a colour and a class
AROUND = 0x99  # the grey that an object is cut out onto
CLASSES = (  # COCO's, in the detector's order and by GenEval's names
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)


def load(folder: str | None = None, clip_folder: str | None = None) -> Reward:
    """The reward: the share of the checks that hold, in [0, 1]; it passes where all do.

    What is checked stands in the metadata as in GenEval's `evaluation_metadata.jsonl`: `include` and `exclude`, and
    `tag`, which is `counting` where only what is very certain counts. Whether a picture passes follows GenEval's rules.
    The share is this library's: each object that is due is a check, and so are its colour and its position, and each
    entry of `exclude`. It is the share that teaches; a verdict alone seldom tells two pictures of a prompt apart.

    The numbers are not GenEval's and must not be compared with those that papers report. The detector is of the same
    design as GenEval's, a Mask2Former (arXiv 2112.01527) with a Swin-S, so that GenEval's thresholds make sense, but
    its weights are those of Mask2Former's authors, not mmdet's, and it sees pictures resized by Pillow and stretched
    to multiples of 32 pixels. Colours are told by the same CLIP ViT-L/14, which is read once a prompt asks for one.

    Args:
        folder: that holds the files of `facebook/mask2former-swin-small-coco-instance`, or of another Mask2Former of
            COCO's 80 classes; by default the Hub's.
        clip_folder: that holds the files of `openai/clip-vit-large-patch14`; by default the Hub's.

    Raises:
        ValueError: the files cannot be had or do not fit. When it judges: the metadata is not of that form, or names
            a class, a colour or a relation that there is not.
    """
    detector = Detector(Source("object_checks", DETECTOR, DETECTOR, folder))

    @cache
    def colors() -> "Colors":
        return Colors(load_clip(Source("object_checks: clip_folder", CLIP, CLIP, clip_folder)))

    def held(images: np.ndarray, requests: list[Request]) -> list[list[bool]]:
        found = detector(images)
        asked = [(i, place) for i in range(len(images)) for place in colored(requests[i], found[i])]
        named: list[dict[int, str]] = [{} for _ in images]
        if asked:
            cuts = [found[i].cut(images[i], place) for i, place in asked]
            said = colors()(cuts, [found[i].names[place] for i, place in asked])
            for (i, place), color in zip(asked, said, strict=True):
                named[i][place] = color
        return [checks(*each) for each in zip(requests, found, named, strict=True)]

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        requests = [read(prompt, about) for prompt, about in zip(prompts, metadata, strict=True)]
        starts = range(0, len(images), AT_ONCE)
        said = [one for at in starts for one in held(images[at : at + AT_ONCE], requests[at : at + AT_ONCE])]
        return Judgement(np.array([np.mean(one) for one in said], np.float32), np.array([*map(all, said)], bool))

    return Reward("object_checks", judge, (0.0, 1.0), read=read)


# ---------------------------------------------------------------- what a prompt asks for


def _known(name: str) -> str:
    if name not in CLASSES:
        raise ValueError(
            f"should be one of COCO's 80 classes, by GenEval's names ({', '.join(CLASSES[:3])}, ..., {CLASSES[-1]})"
            f"{did_you_mean(name, [known for known in CLASSES if name in known] or CLASSES)}"
        )
    return name


Name = Annotated[str, AfterValidator(_known), Field(alias="class")]


class Wanted(BaseModel):
    """An entry of `include`: so many objects of a class, all of that colour, and all in that relation to all of those
    of an entry before, which is named by its place."""

    name: Name
    count: int = Field(ge=1, le=MOST)
    color: Color | None = None
    position: tuple[Relation, int] | None = None


class Unwanted(BaseModel):
    """An entry of `exclude`: not so many objects of a class, or more."""

    name: Name
    count: PositiveInt


class Request(BaseModel):
    """What the metadata asks for."""

    tag: str | None = None
    include: list[Wanted] = Field(min_length=1)
    exclude: list[Unwanted] | None = None


def read(prompt: str, metadata: Metadata) -> Request:
    """What the metadata of that prompt asks for.

    Raises:
        ValueError: it is not of that form, or names what there is not.
    """
    where = f"reward: object_checks: prompt {prompt!r}"
    if "include" not in metadata:
        raise ValueError(f"{where}: its metadata should have include, as in include: [{{class: bench, count: 1}}]")
    try:
        request = Request.model_validate(metadata)
    except ValidationError as error:
        wrong = error.errors()[0]
        what = wrong["msg"].removeprefix("Value error, ")
        at = ".".join(map(str, wrong["loc"]))
        raise ValueError(f"{where}: {at}: {what[0].lower()}{what[1:]}, got {wrong['input']!r:.80}") from None
    for place, wanted in enumerate(request.include):
        if wanted.position and not 0 <= wanted.position[1] < place:
            raise ValueError(
                f"{where}: include.{place}.position.1: should be the place of an entry before its own, the first being "
                f"0, got {wanted.position[1]}"
            )
    return request


# ---------------------------------------------------------------- what is there


@dataclass(frozen=True)
class Found:
    """What was detected in a picture.

    Attributes:
        boxes: float (k, 4), left, top, right and bottom, in pixels, the last two exclusive.
        classes: int (k,), of CLASSES.
        scores: float (k,), in [0, 1].
        masks: bool (k, H, W).
    """

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    masks: np.ndarray

    @property
    def names(self) -> list[str]:
        """The names of their classes."""
        return [CLASSES[number] for number in self.classes]

    def cut(self, image: np.ndarray, place: int) -> np.ndarray:
        """One of them, cut out of the image uint8 (H, W, 3) and laid onto grey, uint8 (h, w, 3)."""
        left, top, right, bottom = self.boxes[place].astype(int)
        alone = np.where(self.masks[place, ..., None], image, np.uint8(AROUND))
        return alone[top:bottom, left:right]


def checks(request: Request, found: Found, colors: Mapping[int, str]) -> list[bool]:
    """Which checks hold; the picture passes where all do, as by GenEval's rules.

    Of an entry of `include` with count n, it is the n most certain objects that are looked at: n checks whether they
    are there, n of their colours, n of their positions. More objects than n do no harm but by `exclude`.

    Args:
        request: what the prompt asks for.
        found: what was detected. Of detections that overlap, all count.
        colors: by the place in `found`, of all that `colored` names.
    """
    there = _certain(request, found)
    chosen = [there.get(wanted.name, [])[: wanted.count] for wanted in request.include]
    held: list[bool] = []
    for wanted, places in zip(request.include, chosen, strict=True):
        missing = [False] * (wanted.count - len(places))
        held += [True for _ in places] + missing
        if wanted.color:
            held += [colors[place] == wanted.color for place in places] + missing
        if wanted.position:
            relation, entry = wanted.position
            others = found.boxes[chosen[entry]]
            whole = len(others) == request.include[entry].count
            held += [
                whole and all(relation in relations(found.boxes[place], other) for other in others) for place in places
            ]
            held += missing
    return held + [len(there.get(unwanted.name, [])) < unwanted.count for unwanted in request.exclude or []]


def colored(request: Request, found: Found) -> list[int]:
    """The places in `found` of what has a colour that matters."""
    there = _certain(request, found)
    return sorted({p for wanted in request.include if wanted.color for p in there.get(wanted.name, [])[: wanted.count]})


def relations(box: np.ndarray, other: np.ndarray) -> set[str]:
    """In which relations a box stands to another one.

    The offset of their centres, along each axis NEAR of their two widths or heights shorter, must be more than half the
    centres' distance: so it is one relation, two on a diagonal, or none where they are too close.
    """
    offset = (box[:2] + box[2:] - other[:2] - other[2:]) / 2
    sizes = box[2:] - box[:2] + other[2:] - other[:2]
    apart = np.maximum(np.abs(offset) - NEAR * sizes, 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    right, down = apart / np.linalg.norm(offset)
    said = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {relation for relation, holds in said.items() if holds}


def _certain(request: Request, found: Found) -> dict[str, list[int]]:
    """The places in `found` of what counts as there, by class, the most certain first."""
    least = CERTAIN_COUNTING if request.tag == "counting" else CERTAIN
    there: dict[str, list[int]] = {}
    for place in np.argsort(-found.scores, kind="stable").tolist():
        if found.scores[place] > least:
            there.setdefault(found.names[place], []).append(place)
    return {name: places[:MOST] for name, places in there.items()}


# ---------------------------------------------------------------- networks


class Detector:
    """A Mask2Former of COCO's classes.

    Raises:
        ValueError: the files cannot be had or do not fit.
    """

    def __init__(self, source: Source):
        self.model = _mask2former(source)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> list[Found]:
        """What is in images, uint8 (n, H, W, 3): of each, what scores more than CERTAIN."""
        output = self.model(pixel_values=resized(images).to(device()))
        each = zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        return [_found(classes, masks, images.shape[1:3]) for classes, masks in each]


class Colors:
    """Tells colours, by a CLIP: which of ten, each put into three sentences, a picture is most like."""

    def __init__(self, clip: Clip):
        self.clip = clip
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, pictures: list[np.ndarray], names: list[str]) -> list[str]:
        """The colours of n objects, uint8 (h, w, 3) each, of classes of those names."""
        seen = self.clip.seen(pictures)
        alike = (torch.stack([self._read(name) for name in names]) @ seen.unsqueeze(2)).squeeze(2)
        return [get_args(Color)[best] for best in alike.argmax(1).tolist()]

    def _read(self, name: str) -> Tensor:
        if name not in self.known:
            sentences = [template.format(color, name) for color in get_args(Color) for template in TEMPLATES]
            read = self.clip.read(sentences).unflatten(0, (-1, len(TEMPLATES)))
            self.known[name] = normalize(read.mean(1))
        return self.known[name]


def resized(images: np.ndarray) -> Tensor:
    """What the detector sees of uint8 images (n, H, W, 3): float32 (n, 3, h, w), normalised.

    The shorter edge is brought to SHORT, or to less where the longer one would exceed LONG; then each is stretched to a
    multiple of STRIDE.
    """
    shape = images.shape[1:3]
    short = min(SHORT, LONG * min(shape) / max(shape))
    height, width = (round(short) if edge == min(shape) else int(short * edge / min(shape)) for edge in shape)
    size = STRIDE * ceil(width / STRIDE), STRIDE * ceil(height / STRIDE)
    fitted = [Image.fromarray(image).resize(size, Image.Resampling.BILINEAR) for image in images]
    values = torch.from_numpy(np.stack([*map(np.asarray, fitted)])).permute(0, 3, 1, 2) / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _found(classes: Tensor, masks: Tensor, size: tuple[int, ...]) -> Found:
    """What one picture's queries found, from logits (queries, 81) and (queries, h, w), at the picture's own size.

    A score is the class's probability times the mean of the mask's, where that is more than half.
    """
    scores = classes.softmax(-1)[:, :-1]
    best, places = scores.flatten().topk(len(scores))
    best, places = best[best > CERTAIN], places[best > CERTAIN]
    queries = torch.div(places, scores.shape[1], rounding_mode="floor")
    logits = interpolate(masks[queries].unsqueeze(1), size=size, mode="bilinear")[:, 0]
    inside = logits > 0
    area = inside.flatten(1).sum(1)
    best = best * (logits.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
    kept = best > CERTAIN
    inside = inside[kept].cpu().numpy()
    return Found(
        np.array([*map(_box, inside)], float).reshape(-1, 4),
        (places % scores.shape[1])[kept].cpu().numpy(),
        best[kept].cpu().numpy(),
        inside,
    )


def _box(mask: np.ndarray) -> list[int]:
    """Left, top, right and bottom of a mask that is not empty, bool (H, W)."""
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def _mask2former(source: Source) -> Any:
    """The model, in float32, on a GPU if there is one. Transformers knows the names that older files have for it."""
    tensors, config = source.tensors(), source.config(Mask2FormerConfig)
    if config.num_labels != len(CLASSES):
        raise ValueError(
            f"reward: {source.reward}: the detector of {source.folder or source.rest} knows {config.num_labels} "
            f"classes, and COCO has {len(CLASSES)}"
        )
    with _quietly(), source.reading(source.weights):
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, told = loaded
    names = {*told["missing_keys"], *told["unexpected_keys"], *(name for name, *_ in told["mismatched_keys"])}
    if wrong := sorted(name for name in names if not re.search(IDLE, name)):
        raise ValueError(
            f"reward: {source.reward}: the weights of {source.folder or source.weights} do not fit: {len(wrong)} of "
            f"them are missing, too many or of another shape, the first {wrong[0]}"
        )
    return model.eval().requires_grad_(False).to(device())


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' report on weights, which tells of the idle ones too, and its progress bar in a file."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
