"""Drawing images: the rollouts that explore, the noiseless trunks they leave, and the pictures of an evaluation.

Noise is keyed by what it is for, never by where it stands in a batch: a rollout gets the same noise in any batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from aegpo.adapt.courses import lay_out
from aegpo.config import (
    GROUP_LOSSES,
    RIDERS,
    Config,
    Sampler,
    eval_steps,
    needs_velocity,
)
from aegpo.distributed import ALONE, Team, shares
from aegpo.math.solvers import dpmpp_2m
from aegpo.math.transitions import transition
from aegpo.models.base import Denoiser
from aegpo.types import Conditions, Courses, Plan, Prompt, Rollouts, Transitions, Trunk

ROLLOUT, TRUNK, EVALUATION, SPREAD = 0, 1, 2, 6  # what noise is for: the first number of its key


def noise(shape: tuple[int, ...], *key: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, float32, that depends on the key alone, and on the kind of device that it is drawn on."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.random.default_rng(key).standard_normal(shape, dtype=np.float32))
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed))


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
    parts: int = 1,
    finished: Callable[[np.ndarray, Tensor], None] = lambda images, places: None,
    team: Team = ALONE,
    whole_groups: bool = False,
) -> Rollouts:
    """Draw this process's share of the rollouts that the plan asks for, and keep what they explored.

    A rollout that starts from its prompt's own noise is the trunk until it explores, so it begins there, with the
    velocity that the trunk had there. With a trunk, a quarter of each group does so (RIDERS), and under
    `sampler.shared_noise` all; the others start from noises of their own, since a group that shares one does not show
    how much first noises differ in reward. Where rollouts are ODE, only the first is on it: two would be one image.
    Rollouts that are one node of a tree are computed once, together with all nodes of all prompts at that step.
    Under `optimizer.keep_graphs` what is to be trained is computed with its graph, also where the trunk has it already.

    Args:
        model: the policy.
        prompts: of the step.
        conditions: the encoded prompts.
        plan: how many rollouts, and which steps they explore.
        config: a resolved config.
        step: of the training, a part of every noise's key.
        trunk: the prompts' noiseless trajectories, at least to where rollouts leave them; of each process its own.
        progress: told how many more of the n N denoising steps are done.
        purpose: what the rollouts are for, a part of every noise's key too.
        parts: in how many parts the prompts are drawn, at most, one after another; each fills a batch.
        finished: told the images of a part, uint8 (k, H, W, 3), and their rollouts, int64 (k,), as soon as it is drawn.
        team: the processes that share the rollouts: each takes some that stand together in `plan.group`.
        whole_groups: whether all rollouts of a prompt have to be of one process.

    Returns:
        The images, in the order of `plan.group`, their ways, and what was explored.
    """
    sampler, most = config.sampler, config.optimizer.micro_batch
    sigmas = model.sigmas(sampler.steps, sampler.shift)
    every = lay_out(plan, config, prompts, sigmas, step)
    names = [(p, i) for p, count in enumerate(plan.rollouts.tolist()) for i in range(count)]
    leaves = torch.full_like(plan.group, -1)  # the step at which a rollout leaves its trunk: most were never on one
    if trunk is not None:
        riders = [1 if sampler.kind == "ode" else max(1, count // RIDERS) for count in plan.rollouts.tolist()]
        on_trunk = torch.tensor([sampler.shared_noise or i < riders[p] for p, i in names])
        leaves[on_trunk] = every.leaves[on_trunk]
    whole_groups = whole_groups or config.exploration.branch == "tree"  # whose rollouts are computed together
    cost = _cost(every, leaves, config).tolist()
    mine = shares(cost, team.size, plan.group.tolist() if whole_groups else None)[team.rank]

    own = slice(mine.start, mine.stop)
    courses, prompt, leaves = every[own], plan.group[own], leaves[own]
    everyone = torch.arange(len(prompt))
    keys = [(purpose, config.seed, step, prompts[p].id, i) for p, i in names]
    fresh = partial(_noise_of_step, model, keys)

    x = _first_latents(model, [(*keys[mine[i]], 0) for i in courses.node[:, 0].tolist()], sigmas)
    on_it = torch.zeros(0, *x.shape[1:]).to(x)
    if trunk is not None:
        x[leaves >= 0], on_it = _left(trunk, prompt[leaves >= 0], leaves[leaves >= 0], team)

    rows, kept, images = [], [], []
    last_noise = (courses.noisy * torch.arange(1, sampler.steps + 1)).amax(1)  # the point after the last noisy step
    clean, sigma_before = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.float64)  # what a solver remembers
    for places in model.even(_parts(prompt, parts, most)):
        members = torch.zeros(len(prompt), dtype=torch.bool).index_fill_(0, places, True)
        for at in range(sampler.steps):
            lands = courses.lands[:, at]
            walks = members & (leaves <= at) & (lands > 0)
            to_train = walks & courses.trained[:, at] & (courses.node[everyone, lands] == everyone)
            keeps = torch.zeros_like(walks)
            if config.optimizer.keep_graphs and sampler.kind != "ode":
                keeps[courses.node[to_train, at]] = True
            on_its_own = (leaves < at) | keeps | ((leaves == at) & model.is_compiled)  # a probe runs no compiled code
            computed = walks & on_its_own & (courses.node[:, at] == everyone)
            velocity, graph = torch.zeros_like(x), torch.full_like(prompt, -1)
            velocity[leaves == at] = on_it[leaves[leaves >= 0] == at]
            for part in model.even([*_batches(computed & ~keeps, most), *_batches(computed & keeps, most)]):
                keep = bool(keeps[part].any())
                with torch.set_grad_enabled(keep):
                    predicted = model.predict(x[part], sigmas[at], conditions, prompt[part], sampler.guidance)
                velocity[part] = predicted.detach()
                if keep:
                    graph[part] = sum(map(len, kept)) + torch.arange(len(part))
                    kept.append(predicted)
                progress(len(part))
            progress(int(members.sum()) - int(computed.sum()))
            velocity, graph = velocity[courses.node[:, at]], graph[courses.node[:, at]]

            x_next = x.clone()
            for which in _some(walks & ~courses.noisy[:, at]):
                x_next[which], _ = transition(
                    x[which], velocity[which], sigmas[at], sigmas[lands[which]], "ode", eta=0.0
                )
            for which in _some(walks & (at >= last_noise)) if sampler.solver == "dpm2m" else ():
                x_next[which], clean[which] = dpmpp_2m(
                    x[which], velocity[which], sigmas[at], sigmas[lands[which]], clean[which], sigma_before[which]
                )
                sigma_before[which] = sigmas[at]
            for which in _some(walks & courses.noisy[:, at]):
                mean, std = transition(
                    x[which], velocity[which], sigmas[at], sigmas[lands[which]], sampler.kind, sampler.eta, sigmas[1]
                )
                child = courses.node[which, lands[which]]
                x_next[which] = mean + std * torch.stack([fresh(mine[i], at) for i in child.tolist()])
                new, weight = to_train.nonzero().flatten(), plan.weight[prompt[to_train], at]
                step_of = torch.full_like(new, at)
                rows.append(
                    _rows(x[new], x_next[new], velocity[new], step_of, lands[new], prompt, new, weight, graph[new])
                )
            x = x_next
        if len(places):
            images.append(np.concatenate([model.decode(part) for part in x[places].split(most)]))
            finished(images[-1], places + mine.start)
    if sampler.kind == "ode":
        rows, kept = revisit(model, x, conditions, mine, plan, config, courses, fresh)
    nothing = everyone[:0]
    rows.append(_rows(x[:0], x[:0], x[:0], nothing, nothing, prompt, nothing, plan.weight[:0, 0], nothing))
    transitions = Transitions(**{name: torch.cat([getattr(row, name) for row in rows]) for name in vars(rows[0])})
    if len(images) > 1 and sampler.kind != "ode":
        transitions = transitions[transitions.step.argsort(stable=True)]  # as if all had been drawn in one part
    at, rollout = transitions.step, transitions.rollout + mine.start
    if config.loss.kind in GROUP_LOSSES:
        unit = transitions.prompt * sampler.steps + at
    else:
        unit = rollout * sampler.steps + at if sampler.kind == "ode" else at * len(names) + rollout
    transitions = replace(transitions, rollout=rollout, unit=unit)
    drawn = np.concatenate(images) if images else np.zeros((0, 1, 1, 3), np.uint8)
    return Rollouts(drawn, plan.group, every, transitions, tuple(kept))


def _cost(courses: Courses, leaves: Tensor, config: Config) -> Tensor:
    """What each rollout costs, int64 (n,), in evaluations: those it takes, one for its picture, and its rows' way back.

    Where graphs are kept, rows are trained by the process that drew them; others are dealt anew once rewards are known.
    """
    steps = torch.arange(config.sampler.steps)
    first = courses.node[:, :-1] == torch.arange(len(leaves)).unsqueeze(1)  # a node is computed once
    evaluations = ((courses.lands > 0) & first & (steps > leaves.unsqueeze(1))).sum(1)
    return evaluations + 1 + (2 * courses.trained.sum(1) if config.optimizer.keep_graphs else 0)


def _left(trunk: Trunk, prompt: Tensor, step: Tensor, team: Team) -> tuple[Tensor, Tensor]:
    """The trunk's latents and velocities, (k, ...) each, where rollouts of those prompts leave it, both int64 (k,)."""
    steps = trunk.velocities.shape[1]
    points = trunk.prompt.unsqueeze(1) * (steps + 1) + torch.arange(steps + 1)  # N, the end, has a latent alone

    def take(places: Tensor) -> list[Tensor]:
        row, at = places // (steps + 1), places % (steps + 1)
        return [trunk.latents[row, at], trunk.velocities[row, at.clamp(max=steps - 1)]]

    wanted, where = (prompt * (steps + 1) + step).unique(return_inverse=True)
    latents, velocities = team.fetch(take, points.flatten(), wanted)
    return latents[where], velocities[where]


@torch.no_grad()
def revisit(
    model: Denoiser,
    x0: Tensor,
    conditions: Conditions,
    mine: range,
    plan: Plan,
    config: Config,
    courses: Courses,
    fresh: Callable[[int, int], Tensor],
) -> tuple[list[Transitions], list[Tensor]]:
    """Clean latents brought back to their explored noise levels, as transitions from there to what they were.

    This is how forward-process methods (arXiv 2509.16117, 2509.25050) explore: rollouts differ by their first noise
    alone, and what is trained is the prediction of a good image, and against that of a bad one, from any noise level.
    Where a loss compares a whole group, it is brought back by one noise, that of its first rollout (2510.08425).

    Args:
        model: the policy that drew the latents.
        x0: clean latents, float32 (n, ...).
        conditions: the encoded prompts.
        mine: n, the rollout of each latent.
        plan: the prompt of each rollout, and how much each noise level counts.
        config: a resolved config.
        courses: the noise levels of each latent.
        fresh: noise for (rollout, denoising step).

    Returns:
        The transitions, `rollout` counting the latents, and the predictions whose graphs are kept.
    """
    sampler = config.sampler
    sigmas = model.sigmas(sampler.steps, sampler.shift)
    prompt = plan.group[mine.start : mine.stop]
    first = plan.rollouts.cumsum(0) - plan.rollouts  # of each prompt's rollouts
    whose = first[prompt] if config.loss.kind in GROUP_LOSSES else torch.arange(mine.start, mine.stop)
    rows, kept, keep = [], [], config.optimizer.keep_graphs
    for part in model.even(courses.trained.nonzero().split(config.optimizer.micro_batch)):
        which, step = part.unbind(1)
        clean, sigma = x0[which], sigmas[step].to(x0)
        noises = [fresh(i, t) for i, t in zip(whose[which].tolist(), step.tolist(), strict=True)]
        e = torch.stack(noises) if noises else torch.zeros_like(clean)
        x = torch.lerp(clean, e, sigma.reshape(-1, *[1] * (x0.ndim - 1)))
        velocity, graph = torch.zeros_like(x), torch.full_like(which, -1)
        if keep or needs_velocity(config):
            with torch.set_grad_enabled(keep):
                velocity = model.predict(x, sigma, conditions, prompt[which], sampler.guidance)
        if keep:
            graph = sum(map(len, kept)) + torch.arange(len(which))
            kept.append(velocity)
        end, weight = torch.full_like(step, sampler.steps), plan.weight[prompt[which], step]
        rows.append(_rows(x, clean, velocity.detach(), step, end, prompt, which, weight, graph))
    return rows, kept


def _rows(
    x: Tensor,
    x_next: Tensor,
    velocity: Tensor,
    step: Tensor,
    until: Tensor,
    prompt: Tensor,
    rollout: Tensor,
    weight: Tensor,
    graph: Tensor,
) -> Transitions:
    """What was explored; the advantage is not known yet."""
    return Transitions(
        x=x,
        x_next=x_next,
        step=step,
        until=until,
        prompt=prompt[rollout],
        rollout=rollout,
        velocity=velocity,
        weight=weight.to(x),
        advantage=torch.zeros(len(rollout), device=x.device),
        unit=rollout,
        graph=graph,
    )


def _noise_of_step(model: Denoiser, keys: Sequence[tuple[int, ...]], i: int, step: int) -> Tensor:
    """The noise of a rollout's denoising step; number 0 is that of its first latent."""
    return noise(model.latent_shape, *keys[i], step + 1, device=model.device)


def _first_latents(model: Denoiser, keys: Sequence[tuple[int, ...]], sigmas: Tensor) -> Tensor:
    """Noise for a schedule that begins at sigmas[0]: of unit variance as a flow has it only where that is 1.

    A variance-preserving model begins with pure noise a little below, where its latents, with unit variance, are a
    flow's times `1 / sqrt(s^2 + (1 - s)^2)`.
    """
    nothing = torch.zeros(0, *model.latent_shape, device=model.device)
    drawn = torch.stack([noise(model.latent_shape, *key, device=model.device) for key in keys]) if keys else nothing
    return drawn * math.hypot(sigmas[0].item(), 1 - sigmas[0].item())


def _parts(prompt: Tensor, parts: int, most: int) -> list[Tensor]:
    """The places of rollouts of prompts, int64 (n,), in at most `parts` parts: whole prompts, and `most` or more."""
    least = max(most, math.ceil(len(prompt) / parts))
    part, held, of_rollout = 0, 0, torch.zeros_like(prompt)
    for p, count in zip(*(each.tolist() for each in prompt.unique(return_counts=True)), strict=True):
        if held >= least:
            part, held = part + 1, 0
        of_rollout[prompt == p] = part
        held += count
    return [(of_rollout == number).nonzero().flatten() for number in range(part + 1)]


def _batches(which: Tensor, most: int) -> Sequence[Tensor]:
    """The places where `which`, bool (n,), holds, in as few parts of at most so many as can be, all about alike."""
    places = which.nonzero().flatten()
    return places.tensor_split(math.ceil(len(places) / most)) if len(places) else ()


def _some(which: Tensor) -> Sequence[Tensor]:
    """The places where `which`, bool (n,), holds, as one part; none where there are none."""
    return (which.nonzero().flatten(),) if which.any() else ()


# ---------------------------------------------------------------- trunks, and pictures without noise


def shared_trunk(
    model: Denoiser,
    prompts: Sequence[Prompt],
    conditions: Conditions,
    plan: Plan,
    config: Config,
    step: int,
    visit: int,
    team: Team = ALONE,
) -> Trunk:
    """The trunk without the probe, to where the last of each prompt's rollouts leaves it."""
    courses = lay_out(plan, config, prompts, model.sigmas(config.sampler.steps, config.sampler.shift), step)
    last = torch.zeros_like(plan.rollouts).scatter_reduce(0, plan.group, courses.leaves, "amax")
    return walk_trunk(model, prompts, conditions, last + 1, config, visit, team)


def walk_trunk(
    model: Denoiser,
    prompts: Sequence[Prompt],
    conditions: Conditions,
    length: Tensor,
    config: Config,
    visit: int,
    team: Team = ALONE,
) -> Trunk:
    """The trunk without the probe, from a new noise at each visit, and only so many steps of it as `length`, (P,).

    Each process walks its share of the prompts.
    """
    parts = []
    for part in model.even(torch.tensor(team.share(len(prompts))).long().split(config.optimizer.micro_batch)):
        x = own_latents(model, [prompts[i] for i in part.tolist()], config, visit)
        parts.append(denoise(model, x, conditions, part, config.sampler, length[part]))
    return joined(parts)


def own_latents(model: Denoiser, prompts: Sequence[Prompt], config: Config, number: int) -> Tensor:
    """The noise that each prompt has for a trunk; `number` tells those of one prompt apart."""
    sigmas = model.sigmas(config.sampler.steps, config.sampler.shift)
    return _first_latents(model, [(TRUNK, config.seed, prompt.id, number) for prompt in prompts], sigmas)


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
        The trajectories, one a latent, each said to be of the prompt `prompt`; clean ones are `latents[:, -1]`.
    """
    sigmas = model.sigmas(sampler.steps, sampler.shift)
    latents, velocities, clean = [x], [], torch.zeros_like(x)
    for step in range(sampler.steps):
        sigma, sigma_next = sigmas[step].item(), sigmas[step + 1].item()
        here = torch.arange(len(x)) if length is None else (length > step).nonzero().flatten()
        velocity = torch.zeros_like(x)
        velocity[here] = model.predict(x[here], sigmas[step], conditions, prompt[here], sampler.guidance)
        if sampler.kind == "ode" and sampler.solver == "dpm2m":
            x, clean = dpmpp_2m(x, velocity, sigma, sigma_next, clean, sigmas[max(step - 1, 0)])
        else:
            x, _ = transition(x, velocity, sigma, sigma_next, "ode", eta=0.0)
        latents.append(x)
        velocities.append(velocity)
    return Trunk(torch.stack(latents, 1), torch.stack(velocities, 1), prompt)


def joined(parts: Sequence[Trunk]) -> Trunk:
    """Trunks of other prompts, one after another."""
    return Trunk(*(torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "velocities", "prompt")))


def draw(model: Denoiser, prompts: Sequence[Prompt], config: Config) -> np.ndarray:
    """`eval_images` pictures of each prompt by ODE, always from the same noise; uint8 (prompts x images, H, W, 3)."""
    sampler = replace(config.sampler, steps=eval_steps(config), solver="euler", shift=None)
    pictures = []
    wanted = [(prompt, i) for prompt in prompts for i in range(config.eval_images)]
    for places in model.even(torch.arange(len(wanted)).split(config.optimizer.micro_batch)):
        part = [wanted[i] for i in places.tolist()]
        keys = [(EVALUATION, config.seed, prompt.id, i) for prompt, i in part]
        x = _first_latents(model, keys, model.sigmas(sampler.steps))
        conditions = model.encode([prompt.text for prompt, _ in part])
        walked = denoise(model, x, conditions, torch.arange(len(part)), sampler)
        if part:
            pictures.append(model.decode(walked.latents[:, -1]))
    return np.concatenate(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8)
