"""The settings of a run of the embedded model that takes seconds: two groups of unequal size, two updates a step."""

SMALL = {
    "algorithm": "aegpo",
    "steps": 3,
    "prompts_per_step": 2,
    "rollouts_per_step": 10,
    "allocation": {"low": 3, "high": 7},
    "sampler": {"steps": 4, "solver": "euler", "compress": 1.0},
    "exploration": {"rule": "entropy_peaks", "k": 2},
    "optimizer": {"micro_batch": 8, "updates": 2},
    "model": {"lora": {"rank": 4}},
    "eval_every": 2,
    "eval_images": 1,
}
