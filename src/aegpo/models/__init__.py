"""The models that can be trained: the only room that knows diffusers and peft."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from diffusers.utils.logging import disable_progress_bar

from aegpo import world
from aegpo.config import Model, did_you_mean
from aegpo.models.base import Denoiser
from aegpo.models.sd3 import SD3

__all__ = ["Denoiser", "load", "load_pipeline"]

FAMILIES = {"StableDiffusion3Pipeline": "sd3"}


def load(settings: Model, seed: int = 0) -> Denoiser:
    """Load a pipeline and make it trainable: on a GPU if there is one.

    Args:
        settings: the `model` part of a config.
        seed: of a fresh adapter's weights.

    Raises:
        ValueError: there is no such pipeline, or it belongs to no family that we know.
    """
    pipe = load_pipeline(settings)
    return SD3(pipe, settings, text_tokens(settings, pipe), seed)


def text_tokens(settings: Model, pipe: Any) -> int:
    """Length of the T5 part of a prompt: diffusers' own 256 unless the settings say, and none without a T5."""
    if settings.text_tokens is not None:
        return settings.text_tokens
    return 0 if pipe.text_encoder_3 is None else 256


def load_pipeline(settings: Model) -> Any:
    """The untouched diffusers pipeline that the settings name; raises ValueError as `load` does."""
    path, index = _index(settings)
    family = FAMILIES.get(index["_class_name"])
    if family is None or settings.family not in ("auto", family):
        raise ValueError(f"model.family: {path} is a {index['_class_name']}; known are {', '.join(FAMILIES)}")
    if not sys.stderr.isatty():
        disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    how = loading(settings)
    pipe = StableDiffusion3Pipeline.from_pretrained(
        path, use_safetensors=True, dtype=getattr(torch, how["dtype"]), **dict.fromkeys(how["absent"])
    )
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipe.to("cuda")
    if settings.train == "full":
        pipe.transformer.float()
    return pipe


def loading(settings: Model) -> dict[str, Any]:
    """How the pipeline is loaded here: its `dtype`, and the `absent` parts.

    diffusers wants the T5 that a pipeline was saved without to be named as absent.
    """
    _, index = _index(settings)
    absent = [name for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None]
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return {"dtype": dtype, "absent": absent}


def _index(settings: Model) -> tuple[str, Any]:
    """Where the pipeline is, and its `model_index.json`."""
    path = str(world.path()) if settings.path == "world" else settings.path
    try:
        return path, DiffusionPipeline.load_config(path)
    except (OSError, ValueError):
        if Path(path).exists():
            raise ValueError(f"model.path: {path} holds no diffusers pipeline (no readable model_index.json)") from None
        hint = did_you_mean(path, ["world"])
        raise ValueError(f"model.path: {path} is neither a folder nor a pipeline that the hub gives us{hint}") from None
