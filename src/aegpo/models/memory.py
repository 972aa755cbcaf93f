"""How much memory a run takes on a GPU, by part, from the pipeline's config files alone: no weight is read or made.

Networks are made of fake tensors, which have shapes and no numbers, and are run as the real ones are: what autograd
keeps of a forward, and what is alive at once while the VAE decodes, is measured and not guessed.
"""

import inspect
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aegpo.config import Config, Model, explored_steps, largest_batch, reward_terms
from aegpo.models import UNUSED, _family, _index, family_name, lora
from aegpo.models.base import PIXELS, Family
from aegpo.models.blocks import repeated

GIB = 2**30
QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / 64 / 256}  # bytes a weight; of nf4 with its two layers of scales
GPUS = (8, 12, 16, 24, 40, 48, 80, 141)  # GB
FREE = 0.06  # the share of a GPU that is better left to the driver, and to gaps between tensors

PHASES = {  # the parts that are on the GPU at once
    "encoding": ("weights", "trained", "reward", "text encoders"),
    "rollouts": ("weights", "trained", "reward", "optimizer", "latents", "decoding"),
    "training": ("weights", "trained", "reward", "optimizer", "latents", "activations"),
}
JUDGES = {  # weights, in float32
    **{"clipscore": 428e6, "aesthetic": 428e6, "pickscore": 986e6, "hpsv21": 986e6},
    **{"imagereward": 447e6, "object_checks": 497e6},
}


@dataclass(frozen=True)
class Outline:
    """A pipeline without numbers.

    Attributes:
        pipe: of its own class, with its scheduler; the network and the text encoders are on meta, the VAE is fake.
        family: its adapter.
        dtype: what the network computes in on a GPU.
        mode: what fake tensors belong to.
    """

    pipe: Any
    family: Family
    dtype: torch.dtype
    mode: FakeTensorMode

    @property
    def network(self) -> Any:
        """The part that is trained."""
        return getattr(self.pipe, self.family.part)

    @property
    def encoders(self) -> list[nn.Module]:
        """Those of text."""
        return [part for name, part in self.pipe.components.items() if name.startswith("text_encoder") and part]


def sizes(settings: Model) -> Outline | None:
    """The outline of the pipeline that the settings name, or None if its config files cannot be read here.

    Raises:
        ValueError: it belongs to no family that we know, or cannot do what the settings ask.
    """
    try:
        path, index = _index(settings)
    except ValueError:
        if Path(settings.path).exists() or settings.path.startswith(("/", ".", "~")):
            raise
        return None  # of the hub, and out of reach
    name, kind = family_name(settings), getattr(diffusers, index["_class_name"])
    dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a scheduler's tables stay real
    given: dict[str, Any] = {}
    try:
        for part, wanted in inspect.signature(kind).parameters.items():
            saved = index.get(part)
            if isinstance(saved, list):
                given[part] = _part(path, part, *saved)
            elif part in index or wanted.default is inspect.Parameter.empty:
                given[part] = saved
    except (OSError, ValueError) as error:
        if Path(path).is_dir():
            said = " ".join(str(error).split())
            raise ValueError(f"model.path: {path} cannot be read ({type(error).__name__}: {said})") from None
        return None
    nn.Module.to(given["vae"], dtype)  # diffusers' own remarks on what is better left in float32
    with mode:
        given["vae"].to_empty(device="cpu")
    pipe = kind(**given)
    return Outline(pipe, _family(name, pipe, settings), dtype, mode)


def _part(path: str, name: str, library: str | None, kind: str | None) -> Any:
    """One component; None for those that need more than a config, and are not needed here."""
    if kind is None or name in UNUSED or name.startswith("tokenizer"):
        return None
    if library == "transformers":
        config = transformers.AutoConfig.from_pretrained(path, subfolder=name)
        with torch.device("meta"):
            return getattr(transformers, kind)(config)
    made = getattr(diffusers, kind)
    config = made.load_config(path, subfolder=name)
    if name == "scheduler":
        return made.from_config(config)
    with torch.device("meta"):
        return made.from_config(config).eval()


def count(module: nn.Module, where: Callable[[nn.Parameter], bool] = lambda _: True) -> int:
    """How many parameters a module has, or those of a kind."""
    return sum(parameter.numel() for parameter in module.parameters() if where(parameter))


def estimate(config: Config, outline: Outline) -> dict[str, int]:
    """The bytes that a run takes on a GPU, by part; which of them are there at once is told by `PHASES`.

    What rollouts take beside latents is counted as decoding, or where that is more as one block with what it would keep
    for the way back, which is more than a forward without gradient ever holds.

    Args:
        config: a resolved config.
        outline: of its pipeline.

    Raises:
        ValueError: `model.lora.targets` names no layer.
    """
    settings, how, shape = config.model, config.optimizer, outline.family.latent_shape
    policy = trainable(outline, settings)
    trained = count(policy, lambda parameter: parameter.requires_grad)
    copies = bool(how.ema) + bool(how.behaviour) + bool(how.ema or how.behaviour)  # the last while another one acts
    moments = 2 * (1 if how.kind == "adamw_8bit" else 4)

    doubled = 2 if config.sampler.guidance != 1 and not outline.family.is_distilled else 1
    first, second = (kept(outline, policy, settings, samples) for samples in (1, 2))
    row, block = doubled * (second.kept - first.kept), doubled * (second.block - first.block)
    fixed = 2 * first.kept - second.kept  # of any number of rows: casts of weights, and places
    rows, drawn = config.rollouts_per_step * explored_steps(config), min(how.micro_batch, config.rollouts_per_step)
    batch = min(largest_batch(config), math.ceil(rows / how.updates))
    at_once, forwards = (rows, math.ceil(rows / batch)) if how.keep_graphs else (batch, 1)
    trunk = config.prompts_per_step * (2 * config.sampler.steps + 1)
    latents = 2 * 3 * rows + trunk + 5 * config.rollouts_per_step  # rows are picked off those that were drawn
    return {
        "weights": _frozen(outline, settings),
        "trained": trained * 4,
        "optimizer": trained * (4 + moments + 4 * copies),  # the gradients, Adam's moments, averages
        "activations": at_once * row + forwards * fixed + batch * block,
        "latents": 4 * math.prod(shape) * latents,
        "decoding": max(decoding(outline, drawn), drawn * (row if settings.compile else block)),
        "reward": int(4 * sum(JUDGES.get(name, 0) for name in _judges(config))),
        "text encoders": outline.dtype.itemsize * sum(count(encoder) for encoder in outline.encoders),
    }


def total(parts: dict[str, int]) -> tuple[str, int]:
    """The phase that takes most, and its bytes."""
    taken = {phase: sum(parts[part] for part in held) for phase, held in PHASES.items()}
    return max(taken.items(), key=lambda item: item[1])


def refuse_too_small(parts: dict[str, int], config: Config) -> None:
    """Raise ValueError, one line that says what to change, where the GPU here has less memory than the parts take.

    Without a GPU nothing is refused.
    """
    if not torch.cuda.is_available():
        return
    has, (phase, taken) = torch.cuda.get_device_properties(0).total_memory, total(parts)
    if taken <= has:
        return
    largest, *others = sorted(PHASES[phase], key=lambda part: -parts[part])
    changes = list(dict.fromkeys(change for part in (largest, *others) for change in _smaller(part, config)))
    advice = f"; what lowers it: {', '.join(changes[:4])}" if changes else "; it takes a larger one"
    raise ValueError(
        f"the GPU here has {has / GIB:.1f} GiB, but this run would take {taken / GIB:.1f} during {phase}, "
        f"{parts[largest] / GIB:.1f} of them for {largest}{advice}"
    )


def _judges(config: Config) -> list[str]:
    return [name.partition("=")[0] for name in reward_terms(config.reward)]


def _smaller(part: str, config: Config) -> list[str]:
    """The settings that make a part smaller, as one would write them; those that are set so already are left out."""
    model, how = config.model, config.optimizer
    few = (model.quantize != "nf4", "model.quantize nf4")
    adapter = (model.train == "full", "model.train lora")
    rank = (model.train == "lora" and model.lora.rank > 1, "a smaller model.lora.rank")
    rows = (how.micro_batch > 1, f"optimizer.micro_batch {max(1, how.micro_batch // 2)}")
    half = (model.dtype == "float32", "model.dtype bfloat16")
    size = (True, "a smaller model.resolution")
    known = {
        "reward": ((any(name in JUDGES for name in _judges(config)), "another reward"),),
        "weights": (adapter, half, few),
        "trained": (adapter, rank),
        "optimizer": (adapter, (how.kind == "adamw", "optimizer.kind adamw_8bit"), rank),
        "activations": (
            (how.keep_graphs, "optimizer.keep_graphs false"),
            (not model.gradient_checkpointing, "model.gradient_checkpointing true"),
            *(rows, half, size),
        ),
        "latents": ((True, "fewer rollouts_per_step"), size),
        "decoding": (rows, half, size),
        "text encoders": (half,),
    }
    return [change for helps, change in known[part] if helps]


def _frozen(outline: Outline, settings: Model) -> int:
    """Bytes of the VAE, and of what stands under an adapter, or of the base where all weights are trained."""
    network, vae, size = outline.network, outline.pipe.vae, outline.dtype.itemsize
    tables = sum(buffer.numel() for buffer in network.buffers())
    if settings.train == "full":
        return size * count(vae) + 4 * (count(network) + 2 * tables)
    few = 0
    if settings.quantize != "none":
        within = (module for block in repeated(network).values() for module in block.modules())
        few = sum(module.weight.numel() for module in within if isinstance(module, nn.Linear))
    return size * (count(vae) + count(network) + tables - few) + int(QUANTIZED.get(settings.quantize, 0) * few)


# ---------------------------------------------------------------- what training keeps


@dataclass(frozen=True)
class Kept:
    """What a forward leaves behind for the way back, in bytes, and what the largest block leaves when checkpointed."""

    kept: int
    block: int


def trainable(outline: Outline, settings: Model) -> Any:
    """A fake network as `Denoiser` makes a real one: with an adapter, or all of it to be trained."""
    with torch.device("meta"):
        network = type(outline.network).from_config(outline.network.config).eval().requires_grad_(False)
        if settings.train == "lora":
            nn.Module.to(network, outline.dtype)
            lora.add_lora(network, settings.lora, outline.family.targets, seed=0)
        else:
            network.requires_grad_(True)
    with outline.mode:
        return network.to_empty(device="cpu")


def kept(outline: Outline, network: Any, settings: Model, samples: int) -> Kept:
    """What a forward of so many samples keeps; `network` is of `trainable`."""
    family, own = outline.family, outline.dtype if settings.train == "lora" else torch.float32
    with outline.mode, torch.autocast("cpu", torch.bfloat16, enabled=own != outline.dtype):
        given = {name: torch.empty(samples, *shape, dtype=own) for name, shape in family.text_shapes.items()}
        x, sigma = torch.empty(samples, *family.latent_shape), torch.empty(samples)
        return measured(
            network, lambda: family.velocity(network, x, sigma, given, 1.0), settings.gradient_checkpointing
        )


def measured(network: Any, forward: Callable[[], Tensor], checkpointing: bool) -> Kept:
    """What autograd saves of a forward: the distinct storages that are not parameters, each in full.

    Blocks are told apart by standing where the network would checkpoint them. With checkpointing, what enters a block
    is kept instead of what is saved inside, and all of that comes back for one block at a time.
    """
    outside: dict[int, Any] = {}
    inputs: dict[int, Any] = {}
    blocks: list[dict[int, Any]] = []

    def apart(block: Callable[..., Any], *given: Any) -> Any:
        _note(inputs, [each for each in tree_leaves(given) if isinstance(each, Tensor)])
        blocks.append({})
        with _saving(blocks[-1]):
            return block(*given)

    network.enable_gradient_checkpointing(apart)
    try:
        with torch.enable_grad(), _saving(outside):
            forward()
    finally:
        network.disable_gradient_checkpointing()
    weights: dict[int, Any] = {}
    _note(weights, list(network.parameters()))
    held = outside | inputs if checkpointing else outside | {k: v for block in blocks for k, v in block.items()}
    alone = [_bytes(block, weights.keys() | outside.keys() | inputs.keys()) for block in blocks]
    return Kept(_bytes(held, weights.keys()), max(alone))


def _saving(found: dict[int, Any]) -> saved_tensors_hooks:
    def pack(tensor: Tensor) -> Tensor:
        _note(found, [tensor])
        return tensor

    return saved_tensors_hooks(pack, lambda tensor: tensor)


def _note(found: dict[int, Any], tensors: Sequence[Tensor]) -> None:
    for storage in (tensor.untyped_storage() for tensor in tensors):
        found[storage._cdata] = storage  # held, so that its number is not given to another


def _bytes(found: dict[int, Any], without: Any) -> int:
    return sum(storage.nbytes() for number, storage in found.items() if number not in without)


# ---------------------------------------------------------------- what decoding takes


def decoding(outline: Outline, most: int) -> int:
    """The most bytes that are alive at once while the VAE decodes as many latents as `Denoiser.decode` hands it."""
    family = outline.family
    with outline.mode, torch.no_grad():
        pixels = math.prod(family.decode(torch.empty(1, *family.latent_shape)).shape[2:])
        x = torch.empty(max(1, min(most, PIXELS // pixels)), *family.latent_shape)
        with Peak() as alive:
            family.decode(x)
    return alive.most


class Peak(TorchDispatchMode):
    """Within it, the bytes of all tensors that are made and still alive are counted.

    Attributes:
        most: bytes at the highest point.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what an operation makes anew."""
        before = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            storage = each.untyped_storage() if isinstance(each, Tensor) else None
            if storage is not None and storage._cdata not in before:
                self._add(storage)
        return made

    def _add(self, storage: Any) -> None:
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size
