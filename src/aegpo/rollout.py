"""Drawing images: the probe's noiseless ones, the rollouts that explore, and those of an evaluation.

Noise is keyed by what it is for, never by where it stands in a batch: a rollout gets the same noise in any batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from aegpo.adapt.memory import Memory
from aegpo.config import RIDERS, SPREAD_PROMPTS, SPREAD_ROLLOUTS, Config, Sampler
from aegpo.math.transitions import log_prob, transition
from aegpo.models.base import Denoiser
from aegpo.models.probe import AttentionProbe
from aegpo.rewards import Reward
from aegpo.types import Conditions, Plan, Prompt, Rollouts, Signals, Transitions, Trunk

ROLLOUT, TRUNK, EVALUATION, SPREAD = 0, 1, 2, 6  # what noise is for: the first number of its key


def noise(shape: tuple[int, ...], *key: int) -> Tensor:
    """Standard normal noise that depends on the key alone; float32, on the CPU."""
    return torch.from_numpy(np.random.default_rng(key).standard_normal(shape, dtype=np.float32))


def _noise_of_step(shape: tuple[int, ...], keys: Sequence[tuple[int, ...]], i: int, step: int) -> Tensor:
    """The noise of a rollout's denoising step; number 0 is that of its first latent."""
    return noise(shape, *keys[i], step + 1)


def _first_latents(model: Denoiser, keys: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.stack([noise(model.latent_shape, *key) for key in keys]).to(model.device)


def _own_latents(model: Denoiser, prompts: Sequence[Prompt], config: Config, visit: int) -> Tensor:
    """The noise that each prompt keeps for its trunk: the same at every visit, or one of a few that take turns."""
    number = visit % config.probe.noises
    return _first_latents(model, [(TRUNK, config.seed, prompt.id, number) for prompt in prompts])


def probe(
    model: Denoiser, prompts: Sequence[Prompt], conditions: Conditions, config: Config, visit: int, memory: Memory
) -> tuple[Signals, Trunk]:
    """Denoise each prompt once by ODE, under the policy and under the base, and read the attention (arXiv 2602.06825).

    Args:
        model: the policy.
        prompts: of the step.
        conditions: the encoded prompts.
        config: a resolved config.
        visit: how often all prompts were gone through before, which says from which of their own noises these start.
        memory: its `base_entropy` is read, and filled at the first visit of a prompt and its noise.

    Returns:
        The entropies, and the policy's trajectories, which `collect` lets rollouts branch off.
    """
    number = visit % config.probe.noises
    keys = [(prompt.id, number) for prompt in prompts]
    new, fresh = [i for i, key in enumerate(keys) if key not in memory.base_entropy], {}
    if new:
        with model.reference():
            curves, _ = entropy_curves(model, [prompts[i] for i in new], conditions[torch.tensor(new)], config, visit)
        fresh = dict(zip([keys[i] for i in new], curves.mean(0), strict=True))
    base = torch.stack([fresh[key] if key in fresh else memory.base_entropy[key] for key in keys])
    memory.add_base_entropy(fresh)
    curves, trunk = entropy_curves(model, prompts, conditions, config, visit)
    return Signals(curves.mean(0), base), trunk


def entropy_curves(
    model: Denoiser, prompts: Sequence[Prompt], conditions: Conditions, config: Config, visit: int = 0
) -> tuple[Tensor, Trunk]:
    """Each prompt's noiseless trajectory, and the attention entropy on its way, float64 (layers, P, N), in nats."""
    how, curves, parts = config.probe, [], []
    for part in torch.arange(len(prompts)).split(config.optimizer.micro_batch):
        x = _own_latents(model, [prompts[i] for i in part.tolist()], config, visit)
        with AttentionProbe(
            model.network,
            rows=how.rows,
            queries=how.queries,
            keys=how.keys,
            layers=how.layers,
            half="both" if config.sampler.guidance == 1 else "conditional",
            normalise=how.normalise,
        ) as attention:
            parts.append(denoise(model, x, conditions, part, config.sampler))
        steps_first = attention.entropy().unflatten(0, (config.sampler.steps, -1))
        curves.append(steps_first.permute(1, 2, 0).double().cpu())
    return torch.cat(curves, 1), _joined(parts)


def walk_trunk(
    model: Denoiser, prompts: Sequence[Prompt], conditions: Conditions, plan: Plan, config: Config, visit: int
) -> Trunk:
    """The trunk without the probe: each prompt's noiseless trajectory, to where its rollouts leave it."""
    parts = []
    for part in torch.arange(len(prompts)).split(config.optimizer.micro_batch):
        x = _own_latents(model, [prompts[i] for i in part.tolist()], config, visit)
        parts.append(denoise(model, x, conditions, part, config.sampler, plan.leaves[part] + 1))
    return _joined(parts)


@torch.no_grad()
def collect(
    model: Denoiser,
    prompts: Sequence[Prompt],
    conditions: Conditions,
    plan: Plan,
    config: Config,
    step: int,
    trunk: Trunk | None = None,
    progress: Callable[[int], None] = lambda _: None,
    purpose: int = ROLLOUT,
) -> Rollouts:
    """Draw the rollouts that the plan asks for, and keep what they explored.

    A rollout that starts from its prompt's own noise is the trunk until it explores, so it begins there, with the
    velocity that the trunk had there. With a trunk, a quarter of each group does so (RIDERS), and under
    `sampler.shared_noise` all; the others start from noises of their own, since a group that shares one does not show
    how much first noises differ in reward. Where rollouts are ODE, only the first is on it: two would be one image.

    Args:
        model: the policy.
        prompts: of the step.
        conditions: the encoded prompts.
        plan: how many rollouts, and which steps they explore.
        config: a resolved config.
        step: of the training, a part of every noise's key.
        trunk: the prompts' noiseless trajectories, at least to where rollouts leave them.
        progress: told how many more of the n N denoising steps are done.
        purpose: what the rollouts are for, a part of every noise's key too.

    Returns:
        The images, in the order of `plan.group`, and what was explored.
    """
    sampler, most = config.sampler, config.optimizer.micro_batch
    prompt, matching = plan.group, config.sampler.kind == "awm"
    names = [(p, i) for p, count in enumerate(plan.rollouts.tolist()) for i in range(count)]
    keys = [(purpose, config.seed, step, prompts[p].id, i) for p, i in names]
    fresh = partial(_noise_of_step, model.latent_shape, keys)
    explored = plan.explored[prompt]

    x = _first_latents(model, [(*key, 0) for key in keys])
    leaves = torch.full_like(prompt, -1)  # the step at which a rollout leaves its trunk: most were never on one
    if trunk is not None:
        riders = [1 if matching else max(1, count // RIDERS) for count in plan.rollouts.tolist()]
        on_trunk = torch.tensor([sampler.shared_noise or i < riders[p] for p, i in names])
        leaves[on_trunk] = sampler.steps if matching else plan.leaves[prompt[on_trunk]]
        x[on_trunk] = trunk.latents[prompt[on_trunk], leaves[on_trunk]]

    rows = []
    sigmas = model.sigmas(sampler.steps)
    for at in range(sampler.steps):
        sigma, sigma_next = sigmas[at].item(), sigmas[at + 1].item()
        here = (leaves <= at).nonzero().flatten()
        velocity = torch.empty_like(x)
        if trunk is not None:
            velocity[leaves == at] = trunk.velocities[prompt[leaves == at], at]
        for part in _batches(leaves < at, most):
            velocity[part] = model.predict(x[part], sigmas[at], conditions, prompt[part], sampler.guidance)
            progress(len(part))
        progress(int((leaves >= at).sum()))
        x_next = x.clone()
        x_next[here], _ = transition(x[here], velocity[here], sigma, sigma_next, "ode", eta=0.0)
        if not matching and len(which := explored[:, at].nonzero().flatten()):
            mean, std = transition(
                x[which], velocity[which], sigma, sigma_next, sampler.kind, sampler.eta, sigmas[1].item()
            )
            x_next[which] = mean + std * torch.stack([fresh(i, at) for i in which.tolist()]).to(x.device)
            rows.append(_rows(x[which], x_next[which], mean, std, torch.full_like(which, at), which, prompt))
        x = x_next
    if matching:
        rows = revisit(model, x, conditions, prompt, config, explored, fresh)
    transitions = Transitions(**{name: torch.cat([getattr(row, name) for row in rows]) for name in vars(rows[0])})
    images = np.concatenate([model.decode(part) for part in x.split(most)])
    return Rollouts(images, prompt, transitions)


def draw(model: Denoiser, prompts: Sequence[Prompt], config: Config) -> np.ndarray:
    """`eval_images` pictures of each prompt by ODE, always from the same noise; uint8 (prompts x images, H, W, 3)."""
    pictures = []
    wanted = [(prompt, i) for prompt in prompts for i in range(config.eval_images)]
    for at in range(0, len(wanted), config.optimizer.micro_batch):
        part = wanted[at : at + config.optimizer.micro_batch]
        x = _first_latents(model, [(EVALUATION, config.seed, prompt.id, i) for prompt, i in part])
        conditions = model.encode([prompt.text for prompt, _ in part])
        walked = denoise(model, x, conditions, torch.arange(len(part)), config.sampler)
        pictures.append(model.decode(walked.latents[:, -1]))
    return np.concatenate(pictures)


def reward_spread(
    model: Denoiser,
    prompts: Sequence[Prompt],
    conditions: Conditions,
    reward: Reward,
    config: Config,
    step: int,
    visit: int,
    trunk: Trunk | None = None,
) -> Tensor:
    """How far exploring each step alone spreads the rewards of a group: what exploring it is worth.

    A few rollouts of the first few prompts start from their prompt's noise and explore one step alone, for every step
    but the last.

    Returns:
        float64 (N,): the standard deviation of reward inside a group, mean over the prompts; 0 for the last step.
    """
    few, steps = min(SPREAD_PROMPTS, len(prompts)), config.sampler.steps
    shared = replace(config, sampler=replace(config.sampler, shared_noise=True))
    each = torch.eye(steps, dtype=torch.bool)[:-1]
    if trunk is None:
        all_the_way = Plan(torch.ones(few, dtype=torch.int64), each[-1:].expand(few, -1))
        trunk = walk_trunk(model, prompts[:few], conditions, all_the_way, shared, visit)
    owner = torch.arange(few).repeat_interleave(steps - 1)  # every prompt once for each step
    plan = Plan(torch.full_like(owner, SPREAD_ROLLOUTS), each.repeat(few, 1))
    asked = [prompts[i] for i in owner.tolist()]
    drawn = collect(model, asked, conditions[owner], plan, shared, step, trunk[owner], purpose=SPREAD)
    judged = [asked[i] for i in drawn.group.tolist()]
    scores = reward(drawn.images, [prompt.text for prompt in judged], [prompt.metadata for prompt in judged]).score
    spread = torch.from_numpy(scores).double().reshape(few, steps - 1, SPREAD_ROLLOUTS).std(2, correction=0).mean(0)
    return torch.cat([spread, spread.new_zeros(1)])


@torch.no_grad()
def denoise(
    model: Denoiser, x: Tensor, conditions: Conditions, prompt: Tensor, sampler: Sampler, length: Tensor | None = None
) -> Trunk:
    """One batch from noise to clean latents by ODE, or as many steps of it as are asked for.

    Args:
        model: the policy.
        x: first latents, float32 (B, ...).
        conditions: the encoded prompts.
        prompt: int64 (B,), the row of the conditions that each latent belongs to.
        sampler: the settings of the steps.
        length: int64 (B,), how many steps each latent takes; by default all N.

    Returns:
        The trajectories, one a latent; clean ones are `latents[:, -1]`.
    """
    sigmas = model.sigmas(sampler.steps)
    latents, velocities = [x], []
    for step in range(sampler.steps):
        sigma, sigma_next = sigmas[step].item(), sigmas[step + 1].item()
        here = torch.arange(len(x)) if length is None else (length > step).nonzero().flatten()
        velocity = torch.zeros_like(x)
        if len(here):
            velocity[here] = model.predict(x[here], sigmas[step], conditions, prompt[here], sampler.guidance)
        x, _ = transition(x, velocity, sigma, sigma_next, "ode", eta=0.0)
        latents.append(x)
        velocities.append(velocity)
    return Trunk(torch.stack(latents, 1), torch.stack(velocities, 1))


def _batches(which: Tensor, most: int) -> Sequence[Tensor]:
    """The places where `which`, bool (n,), holds, in as few parts of at most so many as can be, all about alike."""
    places = which.nonzero().flatten()
    return places.tensor_split(math.ceil(len(places) / most)) if len(places) else ()


def _joined(parts: Sequence[Trunk]) -> Trunk:
    return Trunk(torch.cat([part.latents for part in parts]), torch.cat([part.velocities for part in parts]))


@torch.no_grad()
def revisit(
    model: Denoiser,
    x0: Tensor,
    conditions: Conditions,
    prompt: Tensor,
    config: Config,
    explored: Tensor,
    fresh: Callable[[int, int], Tensor],
) -> list[Transitions]:
    """Clean latents brought back to their explored steps, as transitions from there to what they were.

    This is how advantage-weighted matching (arXiv 2509.25050) explores: rollouts differ by their first noise alone, and
    what is trained is the prediction of a good image, and against that of a bad one, from any noise level.

    Args:
        model: the policy that drew the latents.
        x0: clean latents, float32 (B, ...).
        conditions: the encoded prompts.
        prompt: int64 (B,), the row of the conditions that each latent belongs to.
        config: a resolved config.
        explored: bool (B, N).
        fresh: noise for (latent, denoising step).

    Returns:
        The transitions, `rollout` counting the latents of this batch.
    """
    sampler = config.sampler
    sigmas = model.sigmas(sampler.steps)
    rows = []
    for part in explored.nonzero().split(config.optimizer.micro_batch):
        which, step = part.unbind(1)
        clean, sigma = x0[which.to(x0.device)], sigmas[step].to(x0)
        e = torch.stack([fresh(i, t) for i, t in part.tolist()]).to(x0.device)
        x = torch.lerp(clean, e, sigma.reshape(-1, *[1] * (x0.ndim - 1)))
        velocity = model.predict(x, sigma, conditions, prompt[which], sampler.guidance)
        mean, std = transition(x, velocity, sigma, 0.0, sampler.kind, sampler.eta)
        rows.append(_rows(x, clean, mean, std, step, which, prompt))
    return rows


def _rows(
    x: Tensor, x_next: Tensor, mean: Tensor, std: Tensor, step: Tensor, rollout: Tensor, prompt: Tensor
) -> Transitions:
    """What was explored, with its log-probability under the policy that explored; the advantage is not known yet."""
    return Transitions(
        x=x,
        x_next=x_next,
        step=step,
        prompt=prompt[rollout],
        rollout=rollout,
        log_prob=log_prob(x_next, mean, std),
        advantage=torch.zeros(len(rollout), device=x.device),
    )
