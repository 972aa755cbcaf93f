"""The loop: prompts -> probe -> plan -> rollouts -> rewards -> advantages -> transitions -> update.

It knows no algorithm by name. A variant is a choice of sampler, allocation, exploration, advantage and loss
(`aegpo.algorithms`), and arrives here as settings.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from aegpo import checkpoint, logbook
from aegpo.adapt.memory import Memory
from aegpo.adapt.plan import make_plan
from aegpo.config import SPREAD_EVERY, Config, needs_probe
from aegpo.data import draw
from aegpo.evaluation import averaged, evaluate
from aegpo.math.advantages import group_advantages
from aegpo.math.losses import clipped_surrogate
from aegpo.math.transitions import gaussian_kl, log_prob, transition
from aegpo.models.base import Denoiser
from aegpo.rewards import Reward
from aegpo.rollout import collect, probe, reward_spread, walk_trunk
from aegpo.types import Conditions, LossOutput, Prompt, Transitions

SHUFFLE = 3  # what a random choice is for: the first number of its key


class Display(Protocol):
    """Shows how far the work is."""

    def begin(self, what: str, total: int) -> None:
        """A phase begins: so many pieces of this work lie ahead."""
        ...

    def advance(self, count: int) -> None:
        """So many of them are done."""
        ...

    def step(self, metrics: dict[str, Any]) -> None:
        """A training step, or an evaluation, is over."""
        ...


def train(
    config: Config,
    model: Denoiser,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    reward: Reward,
    run: Path,
    display: Display,
    resume: Path | None = None,
) -> None:
    """Train the policy, writing metrics, samples, checkpoints and weights into the run's folder.

    Args:
        config: a resolved config.
        model: the policy, fresh from `aegpo.models.load`.
        prompts: to learn on.
        held_out: for evaluations.
        reward: judges images.
        run: the run's folder, which exists.
        display: shows progress.
        resume: a checkpoint of this run to go on from.

    Raises:
        ValueError: the reward or a checkpoint is not what it should be.
    """
    optimizer = torch.optim.AdamW(
        model.trainable.values(),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )
    average = EMAModel(model.trainable.values(), decay=config.optimizer.ema) if config.optimizer.ema else None
    memory = Memory()
    remembers = logbook.fingerprint(
        *(config.model, config.seed, config.sampler, config.probe, config.allocation, config.reward),
        *(prompt.text for prompt in prompts),
    )
    done, began = 0, time.monotonic()

    def record(step: int, metrics: dict[str, Any]) -> None:
        if step in (0, config.steps) or (config.eval_every and step % config.eval_every == 0):
            with averaged(model, average):
                metrics |= evaluate(config, model, held_out, reward, run / "samples" / f"step-{step:06d}.png")
                logbook.put(run, model.save)
        metrics = {"step": step, "seconds": time.monotonic() - began, "forwards": model.forwards, **metrics}
        logbook.write(run, metrics)
        display.step(metrics)

    def save(step: int) -> None:
        state = {"forwards": model.forwards, "seconds": time.monotonic() - began, "remembers": remembers}
        limit = config.checkpoints_total_limit
        checkpoint.save(run, step, model.trainable, optimizer, average, memory.tensors(), state, limit)

    if resume:
        state, remembered = checkpoint.load(resume, model.trainable, optimizer, average)
        done, model.forwards, began = state["step"], state["forwards"], began - state["seconds"]
        if state["remembers"] == remembers:
            memory = Memory.of(remembered)
        checkpoint.drop_after(run, done)
        logbook.cut(run, done)
    else:
        record(0, {})
        save(0)

    for step in range(done, config.steps):
        batch = draw(prompts, config.prompts_per_step, config.seed, step)
        texts = [prompt.text for prompt in batch]
        conditions = model.encode(texts)

        visit = step // (len(prompts) // config.prompts_per_step)

        signals, trunk = None, None
        if needs_probe(config):
            signals, trunk = probe(model, batch, conditions, config, visit, memory)
        due = step % SPREAD_EVERY == 0 or memory.reward_spread is None
        if config.exploration.rule == "reward_spread" and due:
            memory.reward_spread = reward_spread(model, batch, conditions, reward, config, step, visit, trunk)
        plan = make_plan(config, batch, signals, memory, model.sigmas(config.sampler.steps), step)
        if config.sampler.shared_noise and trunk is None:
            trunk = walk_trunk(model, batch, conditions, plan, config, visit)

        display.begin("rollouts", int(plan.rollouts.sum()) * config.sampler.steps)
        rollouts = collect(model, batch, conditions, plan, config, step, trunk, display.advance)
        asked = [batch[i] for i in rollouts.group.tolist()]
        judged = reward(rollouts.images, [prompt.text for prompt in asked], [prompt.metadata for prompt in asked])
        scores, how = torch.from_numpy(judged.score), config.advantage
        advantage = group_advantages(scores, rollouts.group, std=how.std, eps=how.eps, clip=how.clip)
        if config.allocation.rule == "reward_variance":
            spread = torch.stack(
                [scores[rollouts.group == i].std() for i in range(len(batch))]
            )  # groups differ in size
            memory.visit([prompt.id for prompt in batch], spread, config.allocation.smoothing)
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(config, step)
        rows = rollouts.transitions.with_advantages(advantage.to(model.device))
        learned = update(config, model, optimizer, rows, conditions, step, display)
        taken = config.optimizer.updates * (step + 1)
        if average and taken % config.optimizer.ema_every < config.optimizer.updates:
            average.optimization_step = taken  # from which diffusers takes the decay, min((1 + n) / (10 + n), decay)
            average.step(model.trainable.values())

        about = {"prompts": texts, "rollouts": len(scores)}
        record(step + 1, about | logbook.describe(plan, signals, scores, advantage) | learned)
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save(step + 1)


# ---------------------------------------------------------------- update


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of a step."""
    return config.optimizer.lr * (1 - step / config.steps if config.optimizer.decay == "linear" else 1)


def update(
    config: Config,
    model: Denoiser,
    optimizer: torch.optim.Optimizer,
    rows: Transitions,
    conditions: Conditions,
    step: int,
    display: Display,
) -> dict[str, Any]:
    """Shuffle the rows of all prompts and timesteps, deal them to the optimizer steps, and take those.

    Rows without an advantage, such as all of a group whose rewards are equal, teach nothing and are left out before the
    forward. The loss is summed over the others and divided by the number of all, so a step with few of them is a small
    one; what is logged are means over the others.
    """
    share = len(rows) / config.optimizer.updates
    rows = rows[rows.advantage.nonzero().flatten().cpu()]
    order = torch.from_numpy(np.random.default_rng([SHUFFLE, config.seed, step]).permutation(len(rows)))
    display.begin("update", len(rows))
    totals: dict[str, float] = {}
    grad_norms = []
    first_error = 0.0
    for number, dealt in enumerate(order.tensor_split(config.optimizer.updates)):
        if len(dealt) == 0:
            continue
        optimizer.zero_grad()
        for micro in dealt.split(config.optimizer.micro_batch):
            loss = objective(config, model, rows[micro], conditions)
            (loss.value / share).backward()
            for name, value in loss.metrics.items():
                totals[name] = totals.get(name, 0.0) + value.item()
            if number == 0:
                first_error = max(first_error, loss.metrics["ratio/first_error"].item())
            display.advance(len(micro))
        norm = nn.utils.clip_grad_norm_(model.trainable.values(), config.optimizer.max_grad_norm)
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient of step {step + 1} is not finite; lower optimizer.lr and resume")
        grad_norms.append(norm.item())
        optimizer.step()
    means = {name: total / len(rows) for name, total in totals.items()}
    return means | {
        "rows": len(rows),
        "grad_norm": float(np.mean(grad_norms)) if grad_norms else 0.0,
        "ratio/first_error": first_error,
        "lr": optimizer.param_groups[0]["lr"],
    }


def objective(config: Config, model: Denoiser, rows: Transitions, conditions: Conditions) -> LossOutput:
    """The clipped surrogate of explored transitions, and the KL to the base policy, summed over the rows.

    One forward serves rows of any prompts and denoising steps.
    """
    sampler = config.sampler
    sigmas = model.sigmas(sampler.steps)
    sigma, sigma_next = sigmas[rows.step].to(rows.x), sigmas[rows.step + 1].to(rows.x)

    def transition_mean() -> tuple[Tensor, Tensor]:
        velocity = model.predict(rows.x, sigma, conditions, rows.prompt, sampler.guidance)
        return transition(rows.x, velocity, sigma, sigma_next, sampler.kind, sampler.eta, sigmas[1].item())

    mean, std = transition_mean()
    current = log_prob(rows.x_next, mean, std)
    loss = clipped_surrogate(current, rows.log_prob, rows.advantage, config.loss.clip_low, config.loss.clip_high)
    log_ratio = (current - rows.log_prob).detach()
    ratio = log_ratio.exp()
    metrics = {
        "ratio/mean": ratio.sum(),
        "ratio/first_error": (ratio - 1).abs().max(),
        "clip_fraction": ((ratio < 1 - config.loss.clip_low) | (ratio > 1 + config.loss.clip_high)).float().sum(),
        "approx_kl": log_ratio.square().sum() / 2,
    }
    if config.loss.kl:
        with torch.no_grad(), model.reference():
            base_mean, _ = transition_mean()
        # Flow-GRPO divides by 2 g^2, not by an SDE's true variance g^2 h: its weight belongs to h times the divergence.
        factor = sigma - sigma_next if sampler.kind in ("flow_sde", "dance_sde") else 1.0
        divergence = gaussian_kl(mean, base_mean, std) * factor
        loss = loss + config.loss.kl * divergence
        metrics["kl"] = divergence.detach().sum()
    metrics["loss"] = loss.detach().sum()
    return LossOutput(loss.sum(), metrics)
