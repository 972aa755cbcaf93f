"""The embedded default: a tiny text-to-image pipeline of the real SD3 architecture, its prompts and its verifier."""

import json
from pathlib import Path
from typing import Any

from aegpo.world.scenes import words
from aegpo.world.verifier import requested, verify

__all__ = ["MAX_WORDS", "held_out", "path", "requested", "training", "unknown_words", "verify", "words"]


def path() -> Path:
    """The folder of the embedded diffusers pipeline; `StableDiffusion3Pipeline.from_pretrained` loads it.

    It has no T5: pass `text_encoder_3=None, tokenizer_3=None` when loading and `max_sequence_length=0` when drawing.
    """
    return Path(__file__).parent / "pipeline"


def training() -> list[dict[str, Any]]:
    """The training prompts: `prompt`, `task`, `objects` ([shape, colour or None] each), `relation`."""
    return _prompts("train")


def held_out() -> list[dict[str, Any]]:
    """The held-out prompts, none of which is among the training prompts; as `training()`."""
    return _prompts("eval")


MAX_WORDS = 18  # the embedded tokenizer's 20 tokens, less the two that begin and end a prompt


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that the embedded model was never shown."""
    return [word for word in prompt.lower().split() if word not in words()]


def _prompts(split: str) -> list[dict[str, Any]]:
    text = (Path(__file__).parent / "prompts" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
