"""The named variants: each is a short table of choices, laid under the user's own settings.

What a choice means stands beside its setting in `aegpo.config`; each variant's formula, and what we do differently, in
docs/algorithms.md. A variant says only where it departs from PLAIN, so naming one always settles every choice.
"""

from dataclasses import dataclass
from typing import Any

PAPERS = {
    "2211.01095": "{DPM-Solver++}: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    "2305.13301": "Training Diffusion Models with Reinforcement Learning",
    "2311.12908": "Diffusion Model Alignment Using Direct Preference Optimization",
    "2505.05470": "{Flow-GRPO}: Training Flow Matching Models via Online {RL}",
    "2505.07818": "{DanceGRPO}: Unleashing {GRPO} on Visual Generation",
    "2507.21802": "{MixGRPO}: Unlocking Flow-based {GRPO} Efficiency with Mixed {ODE-SDE}",
    "2508.04324": "{TempFlow-GRPO}: When Timing Matters for {GRPO} in Flow Models",
    "2509.05952": "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching",
    "2509.06040": "{BranchGRPO}: Stable and Efficient {GRPO} with Structured Branching in Diffusion Models",
    "2509.16117": "{DiffusionNFT}: Online Diffusion Reinforcement with Forward Process",
    "2509.25050": "Advantage Weighted Matching: Aligning {RL} with Pretraining in Diffusion Models",
    "2510.08425": "Reinforcing Diffusion Models by Direct Group Preference Optimization",
    "2510.22319": "{GRPO-Guard}: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
    "2601.00423": "{E-GRPO}: High Entropy Steps Drive Effective Reinforcement Learning for Flow Models",
    "2602.06825": "{AEGPO}: Adaptive Entropy-Guided Policy Optimization for Diffusion Models",
    "2605.10759": "Reinforce Adjoint Matching: Scaling {RL} Post-Training of Diffusion and Flow-Matching Models",
    "2606.11025": "{Flow-DPPO}: Divergence Proximal Policy Optimization for Flow Matching Models",
}


@dataclass(frozen=True)
class Algorithm:
    """A named variant.

    Attributes:
        paper: arXiv id, one of PAPERS.
        choices: nested settings.
    """

    paper: str
    choices: dict[str, Any]


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another, the later winning; none is changed."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


PLAIN: dict[str, Any] = {
    "sampler": {"kind": "flow_sde", "eta": 0.7, "shared_noise": False, "solver": "euler", "compress": 1.0},
    "probe": {"keys": "all"},
    "allocation": {"rule": "uniform", "low": 8, "high": 16},
    "exploration": {
        "rule": "all",
        "k": 4,
        "reading": "plain",
        "min_distance": 1,
        "start": 0,
        "until": 0,
        "moves": "none",
        "branch": "none",
        "merge": None,
        "share": 1.0,
        "skip": 0,
    },
    "advantage": {"std": "global", "ddof": 0, "eps": 1e-4, "best_of": 0},
    "loss": {
        "kind": "clip",
        "clip_low": 1e-4,
        "clip_high": 1e-4,
        "score": "gaussian",
        "matching": "uniform",
        "weight": "none",
        "beta": 1.0,
        "kl": 0.0,
        "kl_of": "mean",
        "reference_guidance": None,
    },
    "optimizer": {"updates": 2, "keep_graphs": False, "ema": 0.0, "behaviour": 0.0},
}

# DanceGRPO's own frame, which MixGRPO and BranchGRPO share.
DANCE = merge(
    PLAIN,
    {
        "sampler": {"kind": "dance_sde", "eta": 0.3, "shared_noise": True},
        "advantage": {"std": "group", "ddof": 1, "eps": 1e-8},
    },
)
MIX = merge(
    DANCE,
    {
        "sampler": {"kind": "flow_sde", "eta": 0.7},
        "exploration": {"rule": "window", "k": 4, "moves": "progressive"},
    },
)

# Rollouts without noise; what is trained is the prediction of finished images from noise levels they are put back to.
MATCHING = merge(PLAIN, {"sampler": {"kind": "ode"}, "exploration": {"rule": "random", "k": 4}})

AEGPO = merge(PLAIN, {"allocation": {"rule": "median_split"}})


def _on(frame: dict[str, Any], paper: str, **choices: dict[str, Any]) -> Algorithm:
    return Algorithm(paper, merge(frame, choices))


ALGORITHMS: dict[str, Algorithm] = {
    # Every prompt alike, noise and training at every step but the last, and a pull to the base.
    "flow-grpo": _on(PLAIN, "2505.05470", loss={"kl": 0.04}, optimizer={"ema": 0.9}),
    # Three noisy steps in a row, anywhere in the first half.
    "flow-grpo-fast": _on(
        PLAIN,
        "2505.05470",
        sampler={"kind": "cps", "eta": 0.8},
        exploration={"rule": "window", "k": 3, "until": 5, "moves": "random"},
        loss={"clip_low": 1e-5, "clip_high": 1e-5, "score": "squared"},
    ),
    # One first noise a prompt; 60 % of the steps are trained, and the best and worst rollouts.
    "dance-grpo": _on(DANCE, "2505.07818", exploration={"share": 0.6}, advantage={"best_of": 8}),
    # Noise in a window that moves through the trajectory.
    "mix-grpo": _on(MIX, "2507.21802"),
    # The same, and few second-order steps after the window.
    "mix-grpo-flash": _on(MIX, "2507.21802", sampler={"solver": "dpm2m", "compress": 0.4}),
    # A tree: noise at every step, two ways on at some.
    "branch-grpo": _on(
        DANCE,
        "2509.06040",
        exploration={"rule": "window", "k": 4, "min_distance": 2, "branch": "tree"},
        loss={"clip_low": 1e-3, "clip_high": 1e-3},
    ),
    # Each rollout leaves its prompt's noiseless trunk at one step.
    "tempflow-grpo": _on(
        PLAIN,
        "2508.04324",
        sampler={"shared_noise": True},
        exploration={"rule": "random", "k": 2, "branch": "each"},
        advantage={"std": "group"},
        loss={"weight": "noise"},
    ),
    # A ratio without bias, and steps that weigh alike.
    "grpo-guard": _on(
        PLAIN, "2510.22319", loss={"kind": "guard", "clip_low": 2e-6, "clip_high": 2e-6, "weight": "step"}
    ),
    # A bound on the divergence in place of the clip.
    "flow-dppo": _on(PLAIN, "2606.11025", loss={"kind": "dppo", "max_kl": 1e-5}),
    # One noisy step a rollout; where its noise is small, it is merged with those after it.
    "e-grpo": _on(
        PLAIN,
        "2601.00423",
        sampler={"shared_noise": True},
        exploration={"rule": "random", "k": 2, "until": 5, "branch": "each", "merge": 0.7},
        advantage={"std": "group"},
    ),
    # Towards good images and away from bad ones, along the line through the policy that drew them.
    "diffusion-nft": _on(
        MATCHING,
        "2509.16117",
        exploration={"rule": "all"},
        loss={"kind": "nft", "kl": 1e-4},
        optimizer={"updates": 1, "behaviour": 0.5},
    ),
    # The loss of pretraining with its sign from the advantage, as the log-probability of a clipped ratio.
    "awm": _on(MATCHING, "2509.25050", loss={"clip_low": 0.1, "clip_high": 0.1, "kl": 0.08}),
    # The same as a regression, anchored at the base's velocity and without a clip.
    "ram": _on(MATCHING, "2605.10759", loss={"kind": "ram", "beta": 10.0}),
    # A whole group against itself.
    "dgpo": _on(MATCHING, "2510.08425", advantage={"std": "group"}, loss={"kind": "dgpo", "beta": 100.0}),
    # The best of a group against its worst.
    "online-dpo": _on(
        MATCHING, "2311.12908", advantage={"std": "group", "best_of": 2}, loss={"kind": "dpo", "beta": 100.0}
    ),
    # The posterior of DDPM as the policy. Its noise is no larger than the level it lands on: so small at the last but
    # one step of SD3's schedule that the network's rounding would show as a ratio, so that step is left out.
    "ddpo": _on(
        PLAIN,
        "2305.13301",
        sampler={"kind": "ddim", "eta": 1.0},
        exploration={"until": -1},
        advantage={"std": "group"},
    ),
    # The change of attention entropy says which prompts get more rollouts. All explore where that was measured to
    # spread their rewards most, which in our ablation (docs/aegpo.md) taught more than any peaks of entropy, and
    # half of the steps after the last of those are left out, for a solver of second order.
    "aegpo": _on(
        AEGPO,
        "2602.06825",
        sampler={"solver": "dpm2m", "compress": 0.5},
        exploration={"rule": "reward_spread"},
        optimizer={"updates": 1},
    ),
    # The shortest way to a better policy that we know: rollouts of few second-order steps, each trained at one noise
    # level, by RAM's regression onto what the base does under guidance.
    "aegpo-fast": _on(
        MATCHING,
        "2602.06825",
        probe={"keys": "text"},
        allocation={"rule": "median_split"},
        sampler={"solver": "dpm2m"},
        exploration={"k": 1},
        loss={"kind": "ram", "beta": 1.0, "reference_guidance": 3.0},
        optimizer={"updates": 1},
    ),
    # AEGPO to the letter: each prompt explores at the four highest of its own entropy, wherever they lie.
    "aegpo-paper": _on(AEGPO, "2602.06825", exploration={"rule": "entropy_peaks"}),
}
