"""How clear is the policy gradient, for what it costs? By the denoising steps that are explored.

python benchmarks/signal_to_noise.py [--json FILE] [--batches 32] [--workers 2] [--only PLAN ...]

Before any training, the embedded model takes the gradient of many training steps of Flow-GRPO's objective, each of 8 of
the 32 prompts, drawn anew for each, and 96 rollouts with noise of their own. With m the mean of those gradients and V
the sum of their variances, |m|^2 / V is the signal to noise of one step: from products of *different* steps' gradients,
whose mean is |m|^2, with errors by leaving out one step at a time. How clear a plan's gradient is for what it costs is
this for each evaluation, since n steps' mean has n times the signal to noise of one. A backward counts as two
evaluations. Every plan's m is its own sampler's, so this does not say how much of the evaluated policy it improves.

Plans explore all steps, one alone, or several in a row; the others are Euler's, or `few`: half as many, rounded down,
by the solver of second order. The pull to the base is off, so that the gradient is the reward's alone, graphs are kept,
and no signal is measured.
"""

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convergence import COMMON, PROMPTS
from demo import git
from overhead import Silent
from rich.console import Console
from rich.table import Table
from trial import training_prompts

from aegpo import models
from aegpo.adapt.memory import Memory
from aegpo.adapt.plan import make_plan
from aegpo.algorithms import merge
from aegpo.config import resolve
from aegpo.data import draw
from aegpo.rewards.panel import load_panel
from aegpo.rollout import collect, shared_trunk
from aegpo.train import credit, update

FRAME = merge(
    {"algorithm": "flow-grpo"},
    COMMON,
    {"loss": {"kl": 0.0}, "optimizer": {"ema": 0.0, "updates": 1, "keep_graphs": True, "max_grad_norm": 1e9}},
)
FEW = {"solver": "dpm2m", "compress": 0.5}


def in_a_row(k: int, start: int = 0, **sampler: Any) -> dict[str, Any]:
    """A plan that explores k steps from `start` on."""
    return {"exploration": {"rule": "window", "k": k, "start": start}, "sampler": sampler}


PLANS: dict[str, dict[str, Any]] = {
    "all steps": {},
    **{f"step {step}": in_a_row(1, step) for step in range(9)},
    "steps 0 to 3": in_a_row(4),
    "steps 4 to 7": in_a_row(4, 4),
    "steps 0 to 3, few": in_a_row(4, **FEW),
    "step 0, few": in_a_row(1, **FEW),
    "steps 0 to 3, few, one first noise a prompt": in_a_row(4, shared_noise=True, **FEW),
}


def measure(name: str, batches: int) -> dict[str, float]:
    """One plan's signal to noise, its error, and evaluations, of a training step."""
    torch.set_num_threads(1)
    config = resolve(FRAME, PLANS[name])
    model, prompts, reward = models.load(config.model), training_prompts(PROMPTS), load_panel(config)
    still = torch.optim.SGD(model.trainable.values(), lr=0.0)
    gradients, spent = [], model.forwards
    for step in range(batches):
        batch = draw(prompts, config.prompts_per_step, config.seed, step * (len(prompts) // config.prompts_per_step))
        texts = [prompt.text for prompt in batch]
        conditions = model.encode(texts)
        plan = make_plan(config, batch, None, Memory(), model.sigmas(config.sampler.steps), step)
        trunk = (
            shared_trunk(model, batch, conditions, plan, config, step, step) if config.sampler.shared_noise else None
        )
        drawn = collect(model, batch, conditions, plan, config, step, trunk)
        asked = [batch[i] for i in drawn.group.tolist()]
        judged = reward.judge(drawn.images, asked)
        advantage, taught = credit(config, torch.from_numpy(judged.score), drawn.group, drawn.courses)
        rows = drawn.transitions.judged(advantage, taught)
        for parameter in model.trainable.values():  # a step without a difference in reward has none of its own
            parameter.grad = torch.zeros_like(parameter)
        update(config, model, still, rows, conditions, step, Silent(), drawn.kept)
        gradients.append(torch.cat([p.grad.flatten() for p in model.trainable.values() if p.grad is not None]).double())
    spent = (model.forwards - spent) / batches
    together = torch.stack(gradients)
    ratio, error = signal_to_noise((together @ together.T).numpy())
    return {"signal_to_noise": ratio, "error": error, "evaluations": spent}


def signal_to_noise(products: np.ndarray) -> tuple[float, float]:
    """|m|^2 / V from the inner products, (n, n), of n independent gradients, and its error by the jackknife.

    E g_i.g_j = |m|^2 and E |g|^2 = |m|^2 + V.
    """

    def ratio(products: np.ndarray) -> float:
        n = len(products)
        signal = (products.sum() - np.trace(products)) / (n * (n - 1))
        return float(signal / (np.trace(products) / n - signal))

    n = len(products)
    left_out = [ratio(np.delete(np.delete(products, i, 0), i, 1)) for i in range(n)]
    return ratio(products), float((np.var(left_out) * (n - 1)) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="PLAN", default=list(PLANS), choices=list(PLANS))
    asked = parser.parse_args()
    code = {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", ".")}
    with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as pool:
        found = dict(zip(asked.only, pool.map(measure, asked.only, [asked.batches] * len(asked.only)), strict=True))
    table = Table("explored", "signal to noise of a step", "evaluations", "signal to noise of 10,000 evaluations")
    for name, row in found.items():
        each = 10_000 / row["evaluations"]
        ratio, error = row["signal_to_noise"], row["error"]
        cells = (f"{ratio:.4f} ± {error:.4f}", f"{row['evaluations']:,.0f}", f"{each * ratio:.3f} ± {each * error:.3f}")
        table.add_row(name, *cells)
    Console(width=130).print(table)
    if asked.json:
        versions = {name: version(name) for name in ("aegpo", "torch", "diffusers", "peft")}
        about = code | {"versions": versions, "settings": {"frame": FRAME, "plans": PLANS, "batches": asked.batches}}
        asked.json.write_text(json.dumps(about | {"results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
