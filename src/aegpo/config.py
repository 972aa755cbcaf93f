"""Every setting of a run: frozen dataclasses, validated by pydantic; nothing heavy is imported.

A config is laid in layers, the later over the earlier: the defaults below, a recipe file, the command line. An
algorithm's own choices (`algorithms.ALGORITHMS`) lie just under the layer that names it.
"""

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from aegpo.algorithms import ALGORITHMS


def _no_switch(value: Any) -> Any:
    """Refuse true and false as a number; integers are strict already, but 3e-4 is text to YAML, so floats cannot be."""
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return value


Count = Annotated[int, Field(ge=1, strict=True)]
Size = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Pair = Annotated[int, Field(ge=2, strict=True)]
Number = Annotated[float, BeforeValidator(_no_switch)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
AtLeastOne = Annotated[Number, Field(ge=1, allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]

SPREAD_EVERY = 10  # training steps between two measurements of what exploring each denoising step is worth,
SPREAD_PROMPTS, SPREAD_ROLLOUTS = 4, 6  # over so many prompts, and rollouts of each

RIDERS = 4  # one in so many rollouts of a group begins on its probe's trajectory, one of them in any case

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Lora:
    """The low-rank adapter (arXiv 2106.09685)."""

    rank: Count = 32
    """Rank of the two factors."""
    alpha: Count = 64
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers to adapt; empty: the family's attention projections."""


@dataclass(frozen=True, config=_STRICT)
class Model:
    """What is trained."""

    path: str = "world"
    """A diffusers pipeline: a folder, a hub id, or `world` for the embedded one."""
    family: Literal["auto", "sd3"] = "auto"
    """The adapter between the loop and the pipeline; `auto` reads it off the pipeline's class."""
    train: Literal["lora", "full"] = "lora"
    """Train a low-rank adapter, or all weights of the transformer."""
    lora: Lora = Lora()
    resolution: Size = 0
    """Image side in pixels; 0: the pipeline's own."""
    text_tokens: Size | None = None
    """Length of the T5 part of the prompt; null: 256, or 0 where the pipeline has no T5."""


@dataclass(frozen=True, config=_STRICT)
class Prompts:
    """Where prompts come from: a .txt (one a line), a .jsonl (`prompt` and any metadata), or `world`."""

    train: str = "world"
    """Prompts to learn on."""
    eval: str = "world"
    """Held-out prompts for the evaluations."""


@dataclass(frozen=True, config=_STRICT)
class Sampler:
    """How an image is drawn (arXiv 2505.05470, 2505.07818, 2509.05952, 2509.25050)."""

    steps: Pair = 10
    """Denoising steps of rollouts and evaluations."""
    kind: Literal["flow_sde", "dance_sde", "cps", "awm"] = "flow_sde"
    """The noisy transition at explored steps; all others are ODE. With `awm` (arXiv 2509.25050) rollouts are ODE
    throughout, and an explored step is a noise level to which the finished image is brought back and trained at; give
    it an `exploration.rule` that needs no sampler's noise, `loss.clip_low` and `clip_high` near 0.1 and an anchor,
    `loss.kl`, as the recipe `world` does."""
    eta: Positive = 0.7
    """Noise scale of that transition; `awm` has none."""
    guidance: AtLeastOne = 1.0
    """Classifier-free guidance, the same in rollouts and training; 1 is off and costs half."""
    shared_noise: Switch = False
    """Start all rollouts of a prompt from the same noise (arXiv 2505.07818). Until the first explored step they are one
    trajectory then, and it is computed once."""


@dataclass(frozen=True, config=_STRICT)
class Probe:
    """How attention entropy is read, where a rule asks for it (arXiv 2602.06825)."""

    queries: Literal["image", "text", "all"] = "image"
    """Whose attention is looked at."""
    keys: Literal["all", "image", "text"] = "all"
    """What it is spread over; less than `all` is renormalised."""
    layers: tuple[str, ...] = ()
    """Attention layers to read, as patterns such as `transformer_blocks.1?.attn`; empty: all."""
    rows: Count = 64
    """Query rows to read in a layer, at most, evenly spaced."""
    normalise: Switch = False
    """Divide by the logarithm of the number of keys, so that layers of different length weigh alike."""
    noises: Count = 1
    """First noises that a prompt's visits take in turn, one an epoch: the base policy is probed once for each."""


@dataclass(frozen=True, config=_STRICT)
class Allocation:
    """How many rollouts each prompt gets (arXiv 2602.06825)."""

    rule: Literal["uniform", "median_split", "proportional", "reward_variance"] = "uniform"
    """`median_split`: prompts whose attention entropy moved more than the median get `high`, the others `low`.
    `proportional`: in proportion to how far it moved. `reward_variance`: in proportion to the spread of reward in the
    prompt's group when it was last visited. Under the last two every prompt gets at least 2."""
    low: Pair = 8
    """Rollouts of a prompt in the lower half."""
    high: Pair = 16
    """Rollouts of a prompt in the upper half."""
    relative: Switch = False
    """Take the move of entropy as a share of the base's entropy."""
    smoothing: Fraction = 0.0
    """Weight of a prompt's earlier visits in its signal, an exponential average; 0: only the newest counts."""


@dataclass(frozen=True, config=_STRICT)
class Exploration:
    """At which denoising steps a rollout explores, and is trained (arXiv 2602.06825)."""

    rule: Literal[
        "all", "window", "random", "entropy_peaks", "delta_entropy_peaks", "policy_noise", "reward_spread"
    ] = "all"
    """`all` but the last; the first k (`window`); k drawn for each prompt (`random`); or the k highest of H(t)
    (`entropy_peaks`), of |H(t) - H_base(t)| (`delta_entropy_peaks`), of the sampler's own noise (`policy_noise`), or of
    the spread of reward from exploring a step alone, measured every 10 training steps (`reward_spread`)."""
    k: Count = 4
    """How many steps a prompt explores; ignored by `all`."""
    min_distance: Count = 1
    """Steps between two peaks, at least."""
    local_maxima: Switch = False
    """Prefer true local maxima of the curve to steps that are merely high."""
    per: Literal["prompt", "batch"] = "prompt"
    """Follow each prompt's own curve, or the mean curve of the step's prompts."""
    reading: Literal["plain", "above_batch", "times_noise"] = "plain"
    """What `entropy_peaks` takes for the curve: H(t), what it has above the mean of the step's prompts, or H(t) times
    the sampler's own noise."""


@dataclass(frozen=True, config=_STRICT)
class Advantage:
    """How rewards become advantages inside each prompt's own group."""

    std: Literal["group", "global", "none"] = "group"
    """Divide by the group's standard deviation, by that of all rewards of the step, or not at all (Dr.GRPO)."""
    eps: NonNegative = 1e-4
    """Added to the standard deviation."""
    clip: Positive = 5.0
    """Bound on an advantage's size."""


@dataclass(frozen=True, config=_STRICT)
class Loss:
    """The clipped surrogate and the pull to the reference policy."""

    clip_low: Positive = 1e-4
    """How far below 1 a ratio may fall before it stops to count. Ratios are of mean log-probabilities, so small; those
    of `awm` move much further in an update than a sampler's."""
    clip_high: Positive = 1e-4
    """How far above 1 it may rise."""
    kl: NonNegative = 0.0
    """Weight of the KL to the base policy."""


@dataclass(frozen=True, config=_STRICT)
class Optimizer:
    """AdamW and how rows are dealt to it."""

    lr: Positive = 3e-4
    """Learning rate."""
    decay: Literal["none", "linear"] = "none"
    """Keep the learning rate, or lower it step by step to 0 at the run's end."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 1e-4
    max_grad_norm: Positive = 1.0
    """Longer gradients are shortened to this norm."""
    updates: Count = 1
    """Optimizer steps in a training step; the rows are dealt evenly among them."""
    micro_batch: Count = 48
    """Rows (and rollouts) in one forward."""
    ema: Fraction = 0.0
    """Decay of the averaged weights that are evaluated and saved; 0: no averaging."""
    ema_every: Count = 8
    """Optimizer steps between two updates of the average, which happen at the end of a training step."""


@dataclass(frozen=True, config=_STRICT)
class Config:
    """One run."""

    model: Model = Model()
    prompts: Prompts = Prompts()
    reward: str = "world"
    """`world`, or a function of your own: `my_reward.py:score` or `my_package.module:score`."""
    algorithm: str = "aegpo"
    """The named variant (see `aegpo.algorithms`); its choices lie under what is set beside it, over all else."""
    sampler: Sampler = Sampler()
    probe: Probe = Probe()
    allocation: Allocation = Allocation()
    exploration: Exploration = Exploration()
    advantage: Advantage = Advantage()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    steps: Size = 100
    """Training steps."""
    prompts_per_step: Count = 8
    """Prompts drawn in a step."""
    rollouts_per_step: Pair = 96
    """Images drawn in a step, over all its prompts."""
    eval_every: Size = 50
    """Steps between evaluations; 0: only before the first and after the last step."""
    eval_images: Count = 2
    """Images drawn for each held-out prompt."""
    save_every: Count = 1
    """Steps between checkpoints; a killed run loses at most so many."""
    checkpoints_total_limit: Count = 2
    """How many checkpoints are kept, the newest; `aegpo analyze` compares those it finds."""
    seed: Seed = 0
    """Of everything random."""
    output_dir: Annotated[str, Field(min_length=1)] = "runs/latest"
    """The run's folder."""


def resolve(*layers: dict[str, Any]) -> Config:
    """Lay settings over the defaults, an algorithm's choices just under the layer that names it, and check them all.

    Args:
        layers: nested mappings, the later over the earlier (a recipe, then the command line).

    Raises:
        ValueError: one plain line: which setting is wrong and what would be right.
    """
    if not any("algorithm" in layer for layer in layers):
        layers = ({"algorithm": Config.algorithm}, *layers)
    laid: dict[str, Any] = {}
    for layer in layers:
        _refuse_unknown(layer, Config)  # one by one: a group of settings would hide a number that it is laid over
        laid = merge(laid, _choices(layer["algorithm"]) if "algorithm" in layer else {}, layer)
    try:
        config = TypeAdapter(Config).validate_python(laid)
    except ValidationError as error:
        raise ValueError(_one_line(error)) from None
    _check_budget(config)
    return config


def needs_probe(config: Config) -> bool:
    """Whether any choice of the plan looks at attention entropy."""
    return config.allocation.rule in ("median_split", "proportional") or config.exploration.rule.endswith(
        "entropy_peaks"
    )


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe (or a run's `config.yaml`); raises ValueError with one plain line when it cannot be one."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"recipe {path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} must hold settings such as 'steps: 100', not a {type(content).__name__}")
    return content


def dump_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_yaml` and `resolve` read back to an equal one."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)  # type: ignore[call-overload]


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another, the later winning; none is changed."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def settings(kind: type = Config, prefix: str = "") -> list[str]:
    """The dotted name of every setting."""
    names = []
    for field, annotation in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(annotation):
            names += settings(typing.cast(type, annotation), f"{prefix}{field}.")
        else:
            names.append(prefix + field)
    return names


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """The end of an error message: the known name nearest to a wrong one, if any is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _choices(algorithm: Any) -> dict[str, Any]:
    if algorithm not in list(ALGORITHMS):  # a list compares where a dict hashes, and YAML may hand us a list
        hint = did_you_mean(str(algorithm), ALGORITHMS)
        raise ValueError(f"algorithm: {algorithm!r} is not one of {', '.join(ALGORITHMS)}{hint}")
    return ALGORITHMS[algorithm]


def _refuse_unknown(given: dict[str, Any], kind: type, prefix: str = "") -> None:
    hints = typing.get_type_hints(kind)
    for key, value in given.items():
        if key not in hints:
            elsewhere = [name for name in settings() if name.endswith(f".{key}")]  # the right name in the wrong group
            meant = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else None
            raise ValueError(f"{prefix}{key} is not a setting{meant or did_you_mean(f'{prefix}{key}', settings())}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{prefix}{key} is a group of settings ({', '.join(settings(hints[key]))}), not {value!r}"
                )
            _refuse_unknown(value, hints[key], f"{prefix}{key}.")


def _check_budget(config: Config) -> None:
    prompts, rollouts, low, high = (
        config.prompts_per_step,
        config.rollouts_per_step,
        config.allocation.low,
        config.allocation.high,
    )
    if rollouts < 2 * prompts:
        raise ValueError(
            f"rollouts_per_step: {rollouts} rollouts for {prompts} prompts leave groups of one, without an advantage; "
            f"ask for at least {2 * prompts}"
        )
    if config.allocation.rule == "median_split":
        if low > high:
            raise ValueError(f"allocation.low: {low} is above allocation.high, {high}")
        if not prompts * low <= rollouts <= prompts * high:
            raise ValueError(
                f"rollouts_per_step: {rollouts} rollouts cannot be split into {low} to {high} for each of {prompts} "
                f"prompts; ask for {prompts * low} to {prompts * high}"
            )
    if config.sampler.kind == "awm" and config.sampler.shared_noise:
        raise ValueError(
            "sampler.shared_noise: rollouts of sampler.kind awm differ by their first noise alone, so it cannot be "
            "shared; leave it false, or choose flow_sde, dance_sde or cps"
        )
    by_noise = config.exploration.rule in ("policy_noise", "reward_spread") or (
        config.exploration.rule == "entropy_peaks" and config.exploration.reading == "times_noise"
    )
    if config.sampler.kind == "awm" and by_noise:
        raise ValueError(
            f"exploration.rule: {config.exploration.rule} goes by a sampler's noise here, and sampler.kind awm has "
            "none; choose another rule or reading, or flow_sde, dance_sde or cps"
        )
    if (config.exploration.rule, config.exploration.reading, config.exploration.per) == (
        "entropy_peaks",
        "above_batch",
        "batch",
    ):
        raise ValueError(
            "exploration.reading: above_batch compares a prompt with the step's others; exploration.per must be prompt"
        )
    k, apart = config.exploration.k, config.exploration.min_distance
    if config.exploration.rule != "all" and k >= config.sampler.steps:
        raise ValueError(
            f"exploration.k: {k} steps to explore, but only the first {config.sampler.steps - 1} "
            f"of {config.sampler.steps} can be: the last never is; lower it, or raise sampler.steps"
        )
    if config.exploration.rule not in ("all", "window") and (k - 1) * apart >= config.sampler.steps - 1:
        raise ValueError(
            f"exploration.min_distance: {k} steps to explore do not fit {apart} apart into the first "
            f"{config.sampler.steps - 1} of {config.sampler.steps}; lower it or exploration.k, or raise sampler.steps"
        )


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "tuple_type":
        return f"{name}: should be a list, such as [a, b], got {first['input']!r}"
    return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
