"""The named variants: each is a short table of choices, laid under the user's own settings."""

from typing import Any

AEGPO: dict[str, Any] = {
    "sampler": {"kind": "flow_sde", "eta": 0.7},
    "allocation": {"rule": "median_split", "low": 8, "high": 16},
    "advantage": {"std": "global", "eps": 1e-4},
    "loss": {"clip_low": 1e-4, "clip_high": 1e-4, "kl": 0.0},
    "optimizer": {"updates": 2, "ema": 0.0},
}

ALGORITHMS: dict[str, dict[str, Any]] = {
    # Flow-GRPO, arXiv 2505.05470: every prompt alike, noise and training at every step but the last.
    "flow-grpo": {
        "sampler": {"kind": "flow_sde", "eta": 0.7},
        "allocation": {"rule": "uniform"},
        "exploration": {"rule": "all"},
        "advantage": {"std": "global", "eps": 1e-4},
        "loss": {"clip_low": 1e-4, "clip_high": 1e-4, "kl": 0.04},
        "optimizer": {"updates": 2, "ema": 0.9, "ema_every": 8},
    },
    # AEGPO on Flow-GRPO, arXiv 2602.06825: the change of attention entropy says which prompts get more rollouts. All
    # explore where that was measured to spread their rewards most, which in our ablation (docs/aegpo.md) taught more
    # than any peaks of entropy.
    "aegpo": AEGPO | {"exploration": {"rule": "reward_spread", "k": 4}},
    # The same to the letter: each prompt explores at the four highest of its own entropy, wherever they lie.
    "aegpo-paper": AEGPO | {"exploration": {"rule": "entropy_peaks", "k": 4, "reading": "plain"}},
}
