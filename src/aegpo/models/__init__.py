"""The models that can be trained: the only room that knows diffusers and peft."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar

from aegpo import world
from aegpo.config import Model, did_you_mean
from aegpo.models.base import Denoiser, Family
from aegpo.models.flux import Flux
from aegpo.models.flux2_klein import Flux2Klein
from aegpo.models.qwen_image import QwenImage
from aegpo.models.sd3 import SD3
from aegpo.models.unet import UNet
from aegpo.models.wan import Wan

__all__ = ["Denoiser", "Family", "load", "load_pipeline"]

FAMILIES = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux2_klein",
    "StableDiffusionPipeline": "unet",
    "StableDiffusionXLPipeline": "unet",
    "QwenImagePipeline": "qwen_image",
    "WanPipeline": "wan",
}
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that a pipeline does without


def load(settings: Model, seed: int = 0) -> Denoiser:
    """Load a pipeline and make it trainable: on a GPU if there is one.

    Args:
        settings: the `model` part of a config.
        seed: of a fresh adapter's weights.

    Raises:
        ValueError: there is no such pipeline, or it belongs to no family that we know.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # its way back is not finite for some shapes (pytorch issue 196678)
    pipe, family = load_pipeline(settings)
    return Denoiser(pipe, family, settings, compute_dtype(settings), seed)


def load_pipeline(settings: Model) -> tuple[Any, Family]:
    """The diffusers pipeline that the settings name, on the CPU, and its adapter; raises ValueError as `load` does.

    Its scheduler is replaced where its own call would not draw as we do (`Family.scheduler`); nothing else is touched.
    """
    path, index = _index(settings)
    name = family_name(settings)
    if not sys.stderr.isatty():
        disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    if settings.frames and name != "wan":
        raise ValueError(f"model.frames: {path} draws images, not videos; leave it 0")
    for part, saved in index.items():
        needed = isinstance(saved, list) and saved[0] is not None and part not in UNUSED
        if needed and Path(path).is_dir() and not (Path(path) / part).is_dir():
            raise ValueError(f"model.path: {path} has no folder {part}, which its model_index.json names")
    left_out = dict.fromkeys([*absent(settings), *(part for part in UNUSED if index.get(part, [None])[0] is not None)])
    try:
        pipe = DiffusionPipeline.from_pretrained(path, use_safetensors=True, dtype=compute_dtype(settings), **left_out)
    except Exception as error:  # whatever the libraries have against one of its many files
        said = " ".join(str(error).split())
        raise ValueError(f"model.path: {path} cannot be loaded ({type(error).__name__}: {said})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe, _family(name, pipe, settings)


def _family(name: str, pipe: Any, settings: Model) -> Family:
    match name:
        case "sd3":
            return SD3(pipe, settings)
        case "flux":
            return Flux(pipe, settings)
        case "flux2_klein":
            return Flux2Klein(pipe, settings)
        case "unet":
            return UNet(pipe, settings)
        case "qwen_image":
            return QwenImage(pipe, settings)
        case _:
            return Wan(pipe, settings)


def family_name(settings: Model) -> str:
    """The family that the pipeline belongs to, by its class; raises ValueError for one that we do not know."""
    path, index = _index(settings)
    family = FAMILIES.get(index["_class_name"])
    if family is None or settings.family not in ("auto", family):
        if family is not None:
            raise ValueError(f"model.family: {path} is of {family}, not {settings.family}; set that, or auto")
        raise ValueError(f"model.family: {path} is a {index['_class_name']}; known are {', '.join(FAMILIES)}")
    return family


def compute_dtype(settings: Model) -> torch.dtype:
    """What the network computes in here."""
    if settings.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, settings.dtype)


def absent(settings: Model) -> list[str]:
    """The parts that the pipeline was saved without, and that diffusers wants to be named as absent: such as T5."""
    _, index = _index(settings)
    return [part for part in ("text_encoder_3", "tokenizer_3") if index.get(part, ["there"])[0] is None]


def _index(settings: Model) -> tuple[str, Any]:
    """Where the pipeline is, and its `model_index.json`."""
    path = str(world.path()) if settings.path == "world" else settings.path
    try:
        index: Any = DiffusionPipeline.load_config(path)
    except (OSError, ValueError):
        if Path(path).exists():
            raise ValueError(f"model.path: {path} holds no diffusers pipeline (no readable model_index.json)") from None
        hint = did_you_mean(path, ["world"])
        raise ValueError(f"model.path: {path} is neither a folder nor a pipeline that the hub gives us{hint}") from None
    if index["_class_name"] in FAMILIES and index.get("vae", ["there"])[0] is None:
        raise ValueError(f"model.path: the model_index.json of {path} names no vae")
    return path, index
