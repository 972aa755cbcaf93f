"""Every setting of a run: frozen dataclasses, validated by pydantic; nothing heavy is imported.

A config is laid in layers, the later over the earlier: the defaults below, a recipe file, the command line. An
algorithm's own choices (`algorithms.ALGORITHMS`) lie just under the layer that names it.
"""

import dataclasses
import difflib
import math
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from aegpo.algorithms import ALGORITHMS, merge
from aegpo.plain import LETTERS, parse_yaml, refuse_boundless


def _no_switch(value: Any) -> Any:
    """Refuse true and false as a number; integers are strict already, but 3e-4 is text to YAML, so floats cannot be."""
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return value


MOST = 10**6  # of whatever is counted: beyond that it is a slip, and some step would run out of memory or of integers
Count = Annotated[int, Field(ge=1, le=MOST, strict=True)]
Size = Annotated[int, Field(ge=0, le=MOST, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Pair = Annotated[int, Field(ge=2, le=MOST, strict=True)]
Number = Annotated[float, BeforeValidator(_no_switch)]
Finite = Annotated[Number, Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
AtLeastOne = Annotated[Number, Field(ge=1, allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Share = Annotated[Number, Field(gt=0, le=1)]

SPREAD_EVERY = 10  # training steps between two measurements of what exploring each denoising step is worth,
SPREAD_PROMPTS, SPREAD_ROLLOUTS = 4, 6  # over so many prompts, and rollouts of each

NOISY_LOSSES = ("guard", "dppo")  # of a noisy step's mean
MATCHING_LOSSES = ("nft", "ram", "dgpo", "dpo")  # of a finished image
GROUP_LOSSES = ("dgpo", "dpo")  # which see all that was drawn of a prompt at one noise level together

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
    family: Literal["auto", "sd3", "flux", "flux2_klein", "unet", "qwen_image", "wan"] = "auto"
    """The adapter between the loop and the pipeline; `auto` reads it off the pipeline's class."""
    train: Literal["lora", "full"] = "lora"
    """Train a low-rank adapter, or all weights of the transformer or U-Net."""
    lora: Lora = Lora()
    resolution: Size | tuple[Count, Count] = 0
    """Image side in pixels, or [height, width]; 0: the pipeline's own."""
    frames: Size = 0
    """Of a video; 0: the pipeline's own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the network is loaded and computed in; `auto`: bfloat16 on a GPU, float32 on a CPU. Trained weights, latents
    and velocities are float32 in any case."""
    text_tokens: Size | None = None
    """Tokens of a prompt, at most, where the pipeline leaves the choice (in Stable Diffusion 3, of its T5 part); null:
    as its own call has it, and none for a Stable Diffusion 3 without T5."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Keep the weights under a low-rank adapter in 8 or 4 bits (arXiv 2208.07339, 2305.14314), by bitsandbytes."""
    gradient_checkpointing: Switch = False
    """Keep only what enters each block, and compute the rest again on the way back: less memory, more time."""
    shard: Switch = False
    """Let each of several processes hold but its part of the weights, their gradients and the optimizer's moments, and
    gather a block's when it is evaluated (FSDP2, arXiv 2304.11277): less memory, more traffic."""
    compile: Switch = False
    """Compile the repeated blocks: some minutes at first, faster afterwards."""


@dataclass(frozen=True, config=_STRICT)
class Prompts:
    """Where prompts come from: a .txt (one a line), a .jsonl (`prompt` and any metadata), `world`, or a data set that
    `datasets` reads: a folder or `user/name` of the Hub, and maybe `:split` (default: `train`; held-out: `test`, else
    `validation`), with its prompts under `prompt`, else `caption`, else `text`."""

    train: str = "world"
    """Prompts to learn on."""
    eval: str = "world"
    """Held-out prompts for the evaluations."""


@dataclass(frozen=True, config=_STRICT)
class Sampler:
    """How an image is drawn (arXiv 2505.05470, 2505.07818, 2509.05952, 2507.21802, 2305.13301)."""

    steps: Pair = 10
    """Denoising steps of rollouts."""
    kind: Literal["flow_sde", "dance_sde", "cps", "ddim", "dpm_sde", "ode"] = "flow_sde"
    """The noisy transition at explored steps; all others are ODE. With `ode` rollouts are ODE throughout, and an
    explored step is a noise level to which the finished image is brought back and trained at, as in advantage-weighted
    matching (arXiv 2509.25050) and its kin; under `loss.kind: clip`, `clip_low` and `clip_high` then belong near 0.1,
    with an anchor, `loss.kl`, as in the algorithm `awm`."""
    eta: Positive = 0.7
    """Noise scale of that transition, at most 1 for `cps` and `ddim`; `dpm_sde` and `ode` have none."""
    guidance: AtLeastOne = 1.0
    """Classifier-free guidance of the policy, in rollouts, training and evaluations; 1 is off and costs half."""
    shared_noise: Switch = False
    """Start all rollouts of a prompt from the same noise (arXiv 2505.07818). Until the first explored step they are one
    trajectory then, and it is computed once."""
    solver: Literal["euler", "dpm2m"] = "euler"
    """Of the steps after a rollout's last noisy one, and of all under `ode`: Euler's, or DPM-Solver++ of second order
    (arXiv 2211.01095). Evaluations are Euler's, as the pipeline's own call is."""
    shift: Positive | None = None
    """Draw rollouts over a uniform grid of noise levels shifted by this (arXiv 2403.03206), as DanceGRPO does by 3;
    null: over the pipeline's own schedule, which evaluations take in any case."""
    compress: Share = 1.0
    """The share of those steps that is taken, so that fewer reach the same end (MixGRPO-Flash, arXiv 2507.21802)."""


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
    """`all` but the last; k in a row (`window`); k drawn for each prompt (`random`); or the k highest of H(t)
    (`entropy_peaks`), of |H(t) - H_base(t)| (`delta_entropy_peaks`), of the sampler's own noise (`policy_noise`), or of
    the spread of reward from exploring a step alone, measured every 10 training steps (`reward_spread`). Where rollouts
    are ODE, those curves are distributions instead, from which k noise levels are drawn for each prompt."""
    k: Count = 4
    """How many steps a prompt explores; ignored by `all`."""
    start: Size = 0
    """The first step that may explore."""
    until: Annotated[int, Field(ge=-MOST, le=MOST, strict=True)] = 0
    """Steps from this one on may not explore, or, if negative, so many at the end; the last never may in any case."""
    min_distance: Count = 1
    """Steps between two peaks, at least, and between the steps of a `window`."""
    moves: Literal["none", "random", "progressive", "linear", "exponential"] = "none"
    """Where the window begins: always at `start`; at random; or one step later every so often, which MixGRPO
    (arXiv 2507.21802) keeps constant (`progressive`) or lets shrink, so that late steps get less training."""
    moves_every: Count = 25
    """Training steps between two moves of the window, at first."""
    local_maxima: Switch = False
    """Prefer true local maxima of the curve to steps that are merely high."""
    per: Literal["prompt", "batch"] = "prompt"
    """Follow each prompt's own curve, or the mean curve of the step's prompts."""
    reading: Literal["plain", "above_batch", "times_noise"] = "plain"
    """What `entropy_peaks` takes for the curve: H(t), what it has above the mean of the step's prompts, or H(t) times
    the sampler's own noise."""
    importance: Switch = True
    """Weigh levels that are drawn from a distribution by the inverse of their probability, which keeps the expected
    loss what it is under equal probabilities."""
    branch: Literal["none", "each", "tree"] = "none"
    """Every rollout explores all of its prompt's steps; or each explores one of them, off the prompt's noiseless trunk
    (TempFlow-GRPO, arXiv 2508.04324); or a prompt's rollouts are the leaves of a tree that parts at them, noisy at
    every step (BranchGRPO, arXiv 2509.06040). The last two need `sampler.shared_noise`."""
    merge: Finite | None = None
    """Merge an explored step whose policy noise has less entropy, ln(2 pi e std^2) / 2 in nats, with those after it
    until it has so much (E-GRPO, arXiv 2601.00423); null: never."""
    share: Share = 1.0
    """Which share of its explored steps a rollout is trained at, drawn at random (DanceGRPO, arXiv 2505.07818)."""
    skip: Size = 0
    """Leave so many steps in a row untrained; they slide by one each training step (BranchGRPO's depth pruning)."""


@dataclass(frozen=True, config=_STRICT)
class Advantage:
    """How rewards become advantages inside each prompt's own group."""

    std: Literal["group", "global", "none"] = "group"
    """Divide by the group's standard deviation, by that of all rewards of the step, or not at all (Dr.GRPO)."""
    ddof: Annotated[int, Field(ge=0, le=1, strict=True)] = 0
    """0 for the population's standard deviation, 1 for the unbiased one."""
    eps: NonNegative = 1e-4
    """Added to the standard deviation."""
    clip: Positive = 5.0
    """Bound on an advantage's size."""
    combine: Literal["rewards", "advantages", "gdpo"] = "rewards"
    """Of several rewards: take advantages of their weighted sum (Flow-GRPO); take the weighted sum of each one's
    advantages (MixGRPO); or divide each by its group's deviation, and that sum once more by its own over the step
    (GDPO, arXiv 2601.05242)."""
    best_of: Size = 0
    """Train on so many rollouts of a group only, the best and the worst (DanceGRPO; on a tree, BranchGRPO's width
    pruning); 0: on all."""


@dataclass(frozen=True, config=_STRICT)
class Checks:
    """What happens where a reward cannot be right: the run stops; the groups concerned teach nothing in that step and
    count in no mean (`drop`); or it goes on (`warn`). Whatever it was, the terminal and the report say it."""

    failed: Literal["stop", "drop"] = "stop"
    """It raised an error, or did not answer with one number an image."""
    not_finite: Literal["stop", "drop"] = "stop"
    """A number is infinite or none at all."""
    out_of_range: Literal["stop", "drop", "warn"] = "warn"
    """A number lies outside of the reward's range."""
    constant: Literal["stop", "warn"] = "warn"
    """It says the same number of every image in 20 groups in a row."""


@dataclass(frozen=True, config=_STRICT)
class Loss:
    """What is minimised, and the pull to the reference policy."""

    kind: Literal["clip", "guard", "dppo", "nft", "ram", "dgpo", "dpo"] = "clip"
    """PPO's clipped ratio; GRPO-Guard's (arXiv 2510.22319) or Flow-DPPO's, for noisy samplers; or, for `ode`,
    DiffusionNFT's loss (arXiv 2509.16117), RAM's (2605.10759), DGPO's (2510.08425) or Diffusion-DPO's (2311.12908)."""
    clip_low: Positive = 1e-4
    """How far below 1 a ratio may fall before it stops to count. Ratios are of mean log-probabilities, so small; those
    of matching move much further in an update than a sampler's."""
    clip_high: Positive = 1e-4
    """How far above 1 it may rise."""
    max_kl: Positive = 1e-5
    """Of `dppo`: divergence from the policy that drew the rollouts, per element, beyond which no row moves on."""
    score: Literal["gaussian", "squared"] = "gaussian"
    """A noisy step's log-probability: the Gaussian's, or FlowCPS's -(x' - mean)^2 (arXiv 2509.05952)."""
    matching: Literal["uniform", "t", "t2", "huber", "ghuber"] = "uniform"
    """How the matching loss at noise level t counts as a log-probability (arXiv 2509.25050), for `clip` under `ode`."""
    weight: Literal["none", "noise", "step"] = "none"
    """Weigh the policy's part of a noisy step's loss by its noise over the mean step's (TempFlow-GRPO), or by one over
    its length in sigma (GRPO-Guard)."""
    beta: Positive = 1.0
    """The loss's own strength: NFT's beta, RAM's w, DGPO's and DPO's beta."""
    kl: NonNegative = 0.0
    """Weight of the pull to the base policy."""
    reference_guidance: AtLeastOne | None = None
    """Guidance of the base policy that the loss compares with or pulls to; null: `sampler.guidance`. Where it is more,
    the policy learns to do without guidance what the base needs it for."""
    kl_of: Literal["mean", "velocity"] = "mean"
    """What is pulled: a noisy step's mean, by its KL divergence, or the velocity, by its mean squared distance; without
    noise, the velocity always."""


@dataclass(frozen=True, config=_STRICT)
class Optimizer:
    """AdamW and how rows are dealt to it."""

    lr: Positive = 3e-4
    """Learning rate."""
    decay: Literal["none", "linear"] = "none"
    """Keep the learning rate, or lower it step by step to 0 at the run's end."""
    kind: Literal["adamw", "adamw_8bit"] = "adamw"
    """torch's, or bitsandbytes', which keeps its moments in 8 bits (arXiv 2110.02861)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 1e-4
    max_grad_norm: Positive = 1.0
    """Longer gradients are shortened to this norm."""
    give_up_after: Count = 3
    """An update whose loss or gradient is not finite is not taken; after so many training steps with one in a row the
    run stops."""
    updates: Count = 1
    """Optimizer steps in a training step; the rows are dealt evenly among them."""
    keep_graphs: Switch = False
    """Draw what is to be trained with its graph and keep that until the reward is known, so that the update needs no
    forward of its own (LeanGRPO, arXiv 2609.03528): exact where there is one update a step. It takes the memory of
    all rows of the step at once. Under `ode` it saves an evaluation a row where the loss looks at the old policy's."""
    recompute: Switch | None = None
    """Take ratios to what the policy predicted in the batches in which it is trained, not in those that drew rollouts,
    so that they begin at exactly 1; null: as soon as a batch of a step's first update shows that they would be off by
    more than a tenth of the clip. It costs nothing in that update, and a forward a row in the others."""
    micro_batch: Count = 48
    """Rows (and rollouts) in one forward; `loss.kind: dgpo` keeps a prompt's whole group at a noise level together,
    even where that is more."""
    ema: Fraction = 0.0
    """Decay of the averaged weights that are evaluated and saved; 0: no averaging."""
    ema_every: Count = 8
    """Optimizer steps between two updates of the average, which happen at the end of a training step."""
    behaviour: Fraction = 0.0
    """Rollouts are drawn by an average of the policy whose decay rises to this (DiffusionNFT, arXiv 2509.16117); 0: by
    the policy itself."""
    behaviour_ramp: Fraction = 0.001
    """How much that decay rises in a training step."""


@dataclass(frozen=True, config=_STRICT)
class Config:
    """One run."""

    model: Model = Model()
    prompts: Prompts = Prompts()
    reward: str | dict[str, Any] = "world"
    """One reward by name: one that is shipped (docs/rewards.md), such as `pickscore` or `remote=http://host:8123`, or a
    function or class of your own, `my_reward.py:score` or `my_package.module:score`. Or several, each with its weight,
    or with `weight` and settings of its own: `{pickscore: 1, ocr: {weight: 0.5}}`. One of weight 0 is asked in
    evaluations alone."""
    reward_checks: Checks = Checks()
    algorithm: str = "aegpo-fast"
    """The named variant: flow-grpo, flow-grpo-fast, dance-grpo, mix-grpo, mix-grpo-flash, branch-grpo, tempflow-grpo,
    grpo-guard, flow-dppo, e-grpo, diffusion-nft, awm, ram, dgpo, online-dpo, ddpo, aegpo, aegpo-fast or aegpo-paper
    (docs/algorithms.md); its choices lie under what is set beside it, over all else."""
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
    eval_steps: Size = 0
    """Denoising steps of evaluations, and of the pictures that `sample` draws; 0: those of rollouts."""
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
    for layer in layers:
        refuse_boundless(layer)
    if not any("algorithm" in layer for layer in layers):
        layers = ({"algorithm": Config.algorithm}, *layers)
    laid: dict[str, Any] = {}
    for layer in layers:
        _refuse_unknown(layer, Config)  # one by one: a group of settings would hide a number that it is laid over
        if "reward" in layer:
            laid.pop("reward", None)  # named anew, rewards are not added to those that were
        laid = merge(laid, _choices(layer["algorithm"]) if "algorithm" in layer else {}, layer)
    try:
        config = TypeAdapter(Config).validate_python(laid)
    except ValidationError as error:
        raise ValueError(_one_line(error)) from None
    _check_budget(config)
    return config


def eval_steps(config: Config) -> int:
    """Denoising steps of what is drawn to be looked at: evaluations, and the pictures of `sample`."""
    return config.eval_steps or config.sampler.steps


def reward_terms(reward: str | dict[str, Any]) -> dict[str, tuple[float, dict[str, Any]]]:
    """The weight and the settings of each reward, by name; raises ValueError where they cannot be read."""
    if isinstance(reward, str):
        return {reward: (1.0, {})}
    terms = {}
    for name, value in reward.items():
        settings = dict(value) if isinstance(value, dict) else {"weight": value}
        weight = settings.pop("weight", 1.0)
        try:
            terms[name] = TypeAdapter(Finite).validate_python(weight), settings
        except ValidationError:
            raise ValueError(
                f"reward: {name}: should be a weight, as in {{{name}: 0.5}}, or settings with a `weight` among them, "
                f"got {weight!r}"
            ) from None
        if odd := [setting for setting in settings if not isinstance(setting, str)]:
            raise ValueError(f"reward: {name}: a setting's name should be text, got {odd[0]!r}")
    if not any(weight for weight, _ in terms.values()):
        raise ValueError("reward: none has a weight other than 0, so nothing would be learned from; give one of them 1")
    return terms


def reward_label(reward: str | dict[str, Any]) -> str:
    """The rewards in a few words, as in `pickscore + 0.5 ocr`; those of evaluations alone are left out."""
    parts = {name: weight for name, (weight, _) in reward_terms(reward).items() if weight}
    label = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in parts.items())
    return label.replace("+ -", "- ")


def needs_probe(config: Config) -> bool:
    """Whether any choice of the plan looks at attention entropy."""
    return config.allocation.rule in ("median_split", "proportional") or config.exploration.rule.endswith(
        "entropy_peaks"
    )


def needs_reference(config: Config) -> bool:
    """Whether the loss looks at the base policy's prediction."""
    return config.loss.kl > 0 or config.loss.kind in ("ram", "dgpo", "dpo")


def needs_velocity(config: Config) -> bool:
    """Whether the loss looks at what the policy that drew a rollout predicted."""
    return config.loss.kind in ("clip", "guard", "dppo", "nft")


def ratio_tolerance(config: Config) -> float:
    """How far the ratios of a step's first update may be off 1 before they are taken anew: 0 always, infinity never.

    They have to be 1 where the policy that is trained is the one that drew the rollouts; under kept graphs they are.
    """
    how = config.optimizer
    if config.loss.kind not in ("clip", *NOISY_LOSSES) or how.keep_graphs or how.behaviour or how.recompute is False:
        return math.inf
    always = how.recompute or config.model.shard  # whose processes take as many evaluations as each other
    return 0.0 if always else min(config.loss.clip_low, config.loss.clip_high) / 10


def needs_spread(config: Config) -> bool:
    """Whether it is measured what exploring each step is worth."""
    return config.exploration.rule == "reward_spread"


def explorable(config: Config) -> range:
    """The denoising steps that may explore."""
    return range(config.sampler.steps - 1)[config.exploration.start : config.exploration.until or None]


def explored_steps(config: Config) -> int:
    """At how many denoising steps a rollout is trained, at most."""
    how, room = config.exploration, len(explorable(config))
    explored = {"none": room if how.rule == "all" else how.k, "each": 1, "tree": room}[how.branch]
    return max(1, min(int(explored * how.share), room - how.skip))


def largest_batch(config: Config) -> int:
    """Rows in a micro-batch of training, at most."""
    shared = config.allocation.high
    if config.allocation.rule != "median_split":
        shared = math.ceil(config.rollouts_per_step / config.prompts_per_step)
    most = config.optimizer.micro_batch
    return max(most, shared) if config.loss.kind == "dgpo" else most  # a group at a noise level is never split


def with_noise(config: Config) -> Config:
    """The config, but with CPS (arXiv 2509.05952) for a sampler that has no noise to explore a single step with."""
    if config.sampler.kind != "ode":
        return config
    return dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, kind="cps", eta=0.6))


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe (or a run's `config.yaml`); raises ValueError with one plain line when it cannot be one."""
    try:
        with path.open(encoding="utf-8") as file:
            content = parse_yaml(file.read(LETTERS + 1))
    except FileNotFoundError:
        raise ValueError(f"recipe {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path} cannot be read: it is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"recipe {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} must hold settings such as 'steps: 100', not a {type(content).__name__}")
    return content


def dump_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_yaml` and `resolve` read back to an equal one."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)  # type: ignore[call-overload]


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
    return ALGORITHMS[algorithm].choices


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
    reward_terms(config.reward)
    _check_sampler(config)
    _check_exploration(config)
    _check_reference(config)
    if config.model.shard and (config.model.quantize != "none" or config.optimizer.kind == "adamw_8bit"):
        raise ValueError(
            "model.shard: weights or moments in few bits cannot be shared among processes; leave model.quantize none "
            "and optimizer.kind adamw, or this false"
        )
    if config.model.shard and config.optimizer.keep_graphs:
        raise ValueError(
            "model.shard: weights are gathered for each evaluation, so its graph cannot be kept; set "
            "optimizer.keep_graphs false"
        )
    if config.optimizer.updates > (rows := rollouts * explored_steps(config)):
        raise ValueError(f"optimizer.updates: {config.optimizer.updates} of a step with {rows} rows; lower it")
    if config.model.quantize != "none" and config.model.train == "full":
        raise ValueError("model.quantize: weights in few bits cannot be trained; set model.train lora, or this none")
    if config.optimizer.keep_graphs and (config.optimizer.updates > 1 or config.optimizer.behaviour):
        raise ValueError(
            "optimizer.keep_graphs: the graphs are of the weights that draw the rollouts, so they serve one update of "
            "those; set optimizer.updates 1 and optimizer.behaviour 0"
        )
    if config.optimizer.recompute and config.optimizer.behaviour:
        raise ValueError(
            "optimizer.recompute: under optimizer.behaviour rollouts are drawn by another policy than is trained, so "
            "their ratios do not begin at 1; leave it null"
        )
    if config.optimizer.keep_graphs and config.advantage.best_of:
        raise ValueError(
            "optimizer.keep_graphs: advantage.best_of leaves most rollouts out of the update once their rewards are "
            "known, but their graphs would be kept till then; set advantage.best_of 0, or leave this false"
        )


def _check_reference(config: Config) -> None:
    guidance, loss = config.loss.reference_guidance, config.loss
    if guidance is None:
        return
    if guidance < config.sampler.guidance:
        raise ValueError(
            f"loss.reference_guidance: {guidance}, up to which {config.algorithm} learns to do without guidance, is "
            f"below sampler.guidance, {config.sampler.guidance}; leave sampler.guidance 1, or choose an algorithm that "
            "keeps it, such as aegpo"
        )
    if loss.kind != "ram" and not loss.kl:
        raise ValueError(
            f"loss.reference_guidance: {loss.kind} without loss.kl does not pull to the base policy, so its guidance "
            "would not be learned; set loss.kl, or leave this null"
        )


def _check_sampler(config: Config) -> None:
    sampler, loss = config.sampler, config.loss.kind
    if sampler.kind in ("cps", "ddim") and sampler.eta > 1:
        raise ValueError(
            f"sampler.eta: {sampler.eta} is above 1, the most noise that {sampler.kind} can take; lower it"
        )
    if loss in NOISY_LOSSES and config.loss.score != "gaussian":
        raise ValueError(f"loss.score: {loss} needs the density itself, not {config.loss.score}; leave it gaussian")
    if sampler.kind != "ode":
        if loss in MATCHING_LOSSES:
            raise ValueError(
                f"loss.kind: {loss} is of finished images, for rollouts without noise; choose sampler.kind ode, or "
                "clip, guard or dppo"
            )
        return
    needs_noise = {
        "sampler.shared_noise": (sampler.shared_noise, "false"),
        "sampler.compress": (sampler.compress < 1, "1"),
        "exploration.branch": (config.exploration.branch != "none", "none"),
        "exploration.merge": (config.exploration.merge is not None, "null"),
        "loss.weight": (config.loss.weight != "none", "none"),
        "loss.kind": (loss in NOISY_LOSSES, "clip, nft, ram, dgpo or dpo"),
    }
    for name, (wrong, right) in needs_noise.items():
        if wrong:
            raise ValueError(
                f"{name}: rollouts of sampler.kind ode take no noise on their way, which this is about; leave it "
                f"{right}, or choose flow_sde, dance_sde, cps, ddim or dpm_sde"
            )


def _check_exploration(config: Config) -> None:
    how, steps = config.exploration, config.sampler.steps
    if (how.rule, how.reading, how.per) == ("entropy_peaks", "above_batch", "batch"):
        raise ValueError(
            "exploration.reading: above_batch compares a prompt with the step's others; exploration.per must be prompt"
        )
    if how.branch != "none" and not config.sampler.shared_noise:
        raise ValueError(
            f"exploration.branch: {how.branch} lets a prompt's rollouts begin as one; set sampler.shared_noise true"
        )
    if how.merge is not None and config.sampler.kind not in ("flow_sde", "dance_sde"):
        raise ValueError(
            f"exploration.merge: a longer step of {config.sampler.kind} need not take more noise, so none is merged; "
            "leave it null, or choose flow_sde or dance_sde"
        )
    if how.branch == "tree" and how.merge is not None:
        raise ValueError("exploration.merge: a tree is noisy at every step, so none is merged; leave it null")
    if config.advantage.best_of == 1:
        raise ValueError("advantage.best_of: one rollout alone is not better than any; give 0 for all, or 2 or more")
    if config.loss.kind in GROUP_LOSSES and how.share < 1:
        raise ValueError(
            f"exploration.share: {config.loss.kind} compares a group's rollouts at the same noise levels, so none may "
            "leave any out; it must be 1"
        )
    if config.loss.kind == "dpo" and config.advantage.best_of != 2:
        raise ValueError("advantage.best_of: dpo compares the best with the worst of a group; it must be 2")
    room = explorable(config)
    if not room:
        raise ValueError(
            f"exploration.start: of steps 0 to {steps - 2}, none from {how.start} on may explore under "
            f"exploration.until {how.until}; lower the one or raise the other"
        )
    if how.rule != "all" and how.k > len(room):
        raise ValueError(
            f"exploration.k: {how.k} steps to explore, but of steps 0 to {steps - 1} only {room[0]} to {room[-1]} "
            "may be; lower it, or raise sampler.steps"
        )
    if how.rule != "all" and (how.k - 1) * how.min_distance >= len(room):
        raise ValueError(
            f"exploration.min_distance: {how.k} steps to explore do not fit {how.min_distance} apart into steps "
            f"{room[0]} to {room[-1]}; lower it or exploration.k, or raise sampler.steps"
        )
    if how.skip >= len(room):
        raise ValueError(f"exploration.skip: {how.skip} steps left out leave none of {len(room)} to train; lower it")


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"] if not re.search("[^a-z_0-9]", str(part)))
    if name == "reward" or name.startswith("reward."):
        return f"reward: should be a name, or weights by name, as in {{pickscore: 1, ocr: 0.5}}, got {first['input']!r}"
    if name.startswith("model.resolution"):
        return f"model.resolution: should be a whole number of pixels, or [height, width], got {first['input']!r}"
    if first["type"] == "tuple_type":
        return f"{name}: should be a list, such as [a, b], got {first['input']!r}"
    return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
