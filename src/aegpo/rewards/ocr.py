"""Whether the text that a prompt asks for stands in the picture: Flow-GRPO's OCR accuracy (arXiv 2505.05470)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aegpo.rewards import Metadata, Reward
from aegpo.types import Judgement

MODELS = {"Det.model_path": "PP-OCRv6_det_small.onnx", "Rec.model_path": "PP-OCRv6_rec_small.onnx"}
LONGEST = 960  # of a picture's edges, in pixels, as lines of text are looked for in it
QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def load() -> Reward:
    """The reward: 1 - min(edit distance, length) / length, in [0, 1], and 1 where the text that is due was read.

    The length is that of the text that is due. Upper and lower case are one, spaces do not count, and all lines that
    were read are joined, from the top down. A picture passes with a score of 1. The text that is due is the metadata's
    `text`, and else what first stands in double quotes, straight or curly, in the prompt.

    Flow-GRPO reads with PaddleOCR's English models; here it is PP-OCRv6, small, as RapidOCR has it in its wheel.

    Raises:
        ValueError: the packages of `aegpo[ocr]` are not there; or, when it judges, no text is due.
    """
    try:
        import onnxruntime  # noqa: F401 - RapidOCR imports it only once it reads
        import rapidocr
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise ValueError("reward: ocr needs rapidocr, onnxruntime and rapidfuzz: pip install 'aegpo[ocr]'") from None
    folder = Path(str(rapidocr.__file__)).parent / "models"
    files = {setting: folder / file for setting, file in MODELS.items()}
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise ValueError(f"reward: ocr: the installed rapidocr has no {missing[0]}: pip install -U 'aegpo[ocr]'")
    engine = rapidocr.RapidOCR(
        params={
            **{"Global.log_level": "critical", "Global.use_cls": False},  # no lines that stand on their heads
            **{"Det.limit_type": "max", "Det.limit_side_len": LONGEST},
            **{setting: str(file) for setting, file in files.items()},
        }
    )

    def accuracy(image: np.ndarray, due: str) -> float:
        found: Any = engine(Image.fromarray(image))
        read = _plain("".join(found.txts or ()))
        distance = 0 if due in read else Levenshtein.distance(read, due)
        return 1 - min(distance, len(due)) / len(due)

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        due = [_plain(_due(prompt, about)) for prompt, about in zip(prompts, metadata, strict=True)]
        score = np.array([accuracy(image, text) for image, text in zip(images, due, strict=True)], np.float32)
        return Judgement(score, score == 1)

    return Reward("ocr", judge, (0.0, 1.0), read=_due)


def _due(prompt: str, metadata: Metadata) -> str:
    quoted = (text for pair in QUOTED.findall(prompt) for text in pair if text.strip())
    text = metadata["text"] if "text" in metadata else next(quoted, "")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"reward: ocr: no text is due in {prompt!r}; it should stand there in double quotes, "
            "or as a text under 'text' in the metadata"
        )
    return text


def _plain(text: str) -> str:
    return "".join(text.lower().split())
