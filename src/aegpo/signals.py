"""What a step's plan goes by, measured: attention entropy, and how far exploring each step spreads the rewards."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aegpo.adapt.memory import Memory
from aegpo.config import SPREAD_PROMPTS, SPREAD_ROLLOUTS, Config, Exploration, with_noise
from aegpo.distributed import ALONE, Team
from aegpo.models.base import Denoiser
from aegpo.models.probe import AttentionProbe
from aegpo.rewards.panel import Inquiry, Panel
from aegpo.rollout import SPREAD, collect, denoise, joined, own_latents, walk_trunk
from aegpo.types import Conditions, Plan, Prompt, Signals, Trunk


def probe(
    model: Denoiser,
    prompts: Sequence[Prompt],
    conditions: Conditions,
    config: Config,
    visit: int,
    memory: Memory,
    team: Team = ALONE,
) -> tuple[Signals, Trunk]:
    """Denoise each prompt once by ODE, under the policy and under the base, and read the attention (arXiv 2602.06825).

    Args:
        model: the policy.
        prompts: of the step.
        conditions: the encoded prompts.
        config: a resolved config.
        visit: how often all prompts were gone through before, which says from which of their own noises these start.
        memory: its `base_entropy` is read, and filled at the first visit of a prompt and its noise.
        team: the processes, each of which looks at its share of the prompts.

    Returns:
        The entropies of all, and the policy's trajectories of this process's share, which `collect` lets rollouts
        branch off.
    """

    def look(places: Sequence[int]) -> tuple[Tensor, Trunk]:
        own = torch.tensor([places[i] for i in team.share(len(places))], dtype=torch.int64)
        curves, trunk = entropy_curves(model, [prompts[i] for i in own.tolist()], conditions[own], config, visit)
        mean = curves.mean(0) if len(own) else torch.zeros(0, config.sampler.steps, dtype=torch.float64)
        return team.gather(mean), replace(trunk, prompt=own)

    number = visit % config.probe.noises
    keys = [(prompt.id, number) for prompt in prompts]
    new, fresh = [i for i, key in enumerate(keys) if key not in memory.base_entropy], {}
    if new:
        with model.reference():
            curves, _ = look(new)
        fresh = dict(zip([keys[i] for i in new], curves, strict=True))
    base = torch.stack([fresh[key] if key in fresh else memory.base_entropy[key] for key in keys])
    memory.add_base_entropy(fresh)
    curves, trunk = look(range(len(prompts)))
    return Signals(curves, base), trunk


def entropy_curves(
    model: Denoiser, prompts: Sequence[Prompt], conditions: Conditions, config: Config, visit: int = 0
) -> tuple[Tensor, Trunk]:
    """Each prompt's noiseless trajectory, and the attention entropy on its way, float64 (layers, P, N), in nats."""
    how, curves, parts = config.probe, [], []
    for part in model.even(torch.arange(len(prompts)).split(config.optimizer.micro_batch)):
        x = own_latents(model, [prompts[i] for i in part.tolist()], config, visit % how.noises)
        with AttentionProbe(
            model.network,
            rows=how.rows,
            queries=how.queries,
            keys=how.keys,
            layers=how.layers,
            half="conditional" if model.doubles(config.sampler.guidance) else "both",
            normalise=how.normalise,
        ) as attention:
            parts.append(denoise(model, x, conditions, part, config.sampler))
        if len(part):
            steps_first = attention.entropy().unflatten(0, (config.sampler.steps, -1))
            curves.append(steps_first.permute(1, 2, 0).double().cpu())
    nothing = torch.zeros(0, 0, config.sampler.steps, dtype=torch.float64)
    return torch.cat(curves, 1) if curves else nothing, joined(parts)


def reward_spread(
    model: Denoiser,
    prompts: Sequence[Prompt],
    conditions: Conditions,
    reward: Panel,
    config: Config,
    step: int,
    visit: int,
    trunk: Trunk | None = None,
    team: Team = ALONE,
) -> Tensor:
    """How far exploring each step alone spreads the rewards of a group: what exploring it is worth.

    A few rollouts of the first few prompts start from their prompt's noise and explore one step alone, for every step
    but the last. Where the sampler has no noise, CPS stands in for it.

    Returns:
        float64 (N,): the standard deviation of reward inside a group, mean over the prompts; 0 for the last step; not a
        number where no group could be judged.
    """
    few, steps = min(SPREAD_PROMPTS, len(prompts)), config.sampler.steps
    sampler = replace(with_noise(config).sampler, shared_noise=True, solver="euler", compress=1.0)
    optimizer = replace(config.optimizer, keep_graphs=False)
    shared = replace(config, sampler=sampler, exploration=Exploration(), optimizer=optimizer)
    each = torch.eye(steps, dtype=torch.bool)[:-1]
    if trunk is None:
        trunk = walk_trunk(model, prompts[:few], conditions, torch.full((few,), steps - 1), shared, visit, team)
    looked_at = trunk.prompt < few  # processes have prompts in turn, so theirs are in order
    latents, velocities = team.gather(trunk.latents[looked_at]), team.gather(trunk.velocities[looked_at])
    owner = torch.arange(few).repeat_interleave(steps - 1)  # every prompt once for each step
    alike = torch.ones(len(owner), steps, dtype=torch.float64)
    plan = Plan(torch.full_like(owner, SPREAD_ROLLOUTS), each.repeat(few, 1), alike)
    asked = [prompts[i] for i in owner.tolist()]
    own = torch.tensor(team.share(len(owner)), dtype=torch.int64)
    trunk = Trunk(latents[owner[own]], velocities[owner[own]], own)
    inquiry = Inquiry(reward, [asked[i] for i in plan.group.tolist()], plan.group.tolist(), team)
    collect(
        *(model, asked, conditions[owner], plan, shared, step, trunk),
        purpose=SPREAD,
        finished=inquiry.ask,
        team=team,
        whole_groups=reward.groupwise,
    )
    spread = (
        torch.from_numpy(inquiry.verdict().score).double().reshape(few, steps - 1, SPREAD_ROLLOUTS).std(2, correction=0)
    )
    mean = spread.nanmean(0)  # over the groups that are kept
    return torch.cat([mean, mean.new_zeros(1)])
