"""The loop: prompts -> probe -> plan -> rollouts -> rewards -> advantages -> transitions -> update.

It knows no algorithm by name. A variant is a choice of sampler, allocation, exploration, advantage and loss
(`aegpo.algorithms`), and arrives here as settings.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from aegpo import checkpoint, logbook
from aegpo.adapt.memory import Memory
from aegpo.adapt.plan import make_plan, remember
from aegpo.config import GROUP_LOSSES, SPREAD_EVERY, Config, needs_probe, needs_spread, ratio_tolerance
from aegpo.data import ahead, draw
from aegpo.distributed import ALONE, Team, shares, whole
from aegpo.evaluation import evaluate
from aegpo.math.advantages import best_of, combined_advantages, node_returns, weighted_sum
from aegpo.models.base import Denoiser, acting
from aegpo.objective import objective, predict_again
from aegpo.optimizer import make_optimizer
from aegpo.rewards.panel import Inquiry, Panel
from aegpo.rollout import collect, shared_trunk
from aegpo.signals import probe, reward_spread
from aegpo.types import Conditions, Courses, Prompt, Transitions

PARTS = 16  # in which rollouts are drawn, at most, where rewards elsewhere judge one while the next is drawn
SHUFFLE, OTHERS = 3, 9  # what a random choice is for: the first number of its key


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
    reward: Panel,
    run: Path,
    display: Display,
    resume: Path | None = None,
    team: Team = ALONE,
    stop: Callable[[], bool] = lambda: False,
    saved: Callable[[Path], None] = lambda checkpoint: None,
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
        resume: a checkpoint of this run to go on from, which `checkpoint.verify` has found whole.
        team: the processes that train it together, of which the first writes.
        stop: whether the run is to end after the step, with its checkpoint and weights.
        saved: is told of each checkpoint once it is written, in the first process.

    Raises:
        ValueError: the reward or a checkpoint is not what it should be.
        FloatingPointError: the gradient was not finite in too many steps in a row.
    """
    if not model.is_sharded:
        team.same(model.trainable.values())
    optimizer = make_optimizer(config, model)
    average = EMAModel(model.trainable.values(), decay=config.optimizer.ema) if config.optimizer.ema else None
    behaviour = [p.detach().clone() for p in model.trainable.values()] if config.optimizer.behaviour else None
    memory = Memory()
    model.prepare([prompt.text for prompt in [*held_out, *ahead(prompts, config)]])
    remembers = logbook.fingerprint(
        *(config.model, config.seed, config.sampler, config.probe, config.allocation, config.reward),
        *(prompt.text for prompt in prompts),
    )
    done, began, in_a_row = 0, time.monotonic(), 0

    def averaged() -> Sequence[Tensor] | None:
        return average.shadow_params if average and average.optimization_step else None

    def put_weights() -> None:
        with acting(model, averaged()):
            weights = model.weights()
            with team.agreed():
                if team.is_first:
                    logbook.put(run, partial(model.save, weights=weights))

    def record(step: int, metrics: dict[str, Any]) -> None:
        if step in (0, config.steps) or (config.eval_every and step % config.eval_every == 0):
            with acting(model, averaged()):
                metrics |= evaluate(config, model, held_out, reward, run / "samples" / f"step-{step:06d}.png", team)
            put_weights()
        if met := [trouble for own in team.tell([vars(one) for one in reward.troubles()]) for trouble in own]:
            metrics["reward_troubles"] = added_up(met)
        forwards = team.sum(model.forwards)
        metrics = {"step": step, "seconds": time.monotonic() - began, "forwards": forwards, **metrics}
        with team.agreed():
            if team.is_first:
                logbook.write(run, metrics)
        display.step(metrics)

    def save(step: int) -> None:
        state = {"forwards": team.sum(model.forwards), "seconds": time.monotonic() - began, "remembers": remembers}
        state |= {"average_steps": average.optimization_step if average else 0, "rewards": reward.state()}
        state["not_finite_in_a_row"] = in_a_row
        files = checkpoint.content(model.trainable, optimizer, average, behaviour, memory.tensors())
        with team.agreed():
            if team.is_first:
                saved(checkpoint.save(run, step, files, state, config.checkpoints_total_limit))

    if resume:
        state, remembered = checkpoint.load(resume, model.trainable, optimizer, average, behaviour)
        done, began = state["step"], began - state["seconds"]
        in_a_row = state.get("not_finite_in_a_row", 0)
        model.forwards = state["forwards"] if team.is_first else 0  # they are counted together
        if state["remembers"] == remembers:
            memory = Memory.of(remembered)
            reward.restore(state.get("rewards", {}))
        with team.agreed():
            if team.is_first:
                checkpoint.drop_after(run, done)
                logbook.cut(run, done)
    else:
        seed_others(config.seed, 0, team.rank)
        record(0, {})
        save(0)

    sigmas = model.sigmas(config.sampler.steps, config.sampler.shift)
    for step in range(done, config.steps):
        seed_others(config.seed, step + 1, team.rank)
        batch = draw(prompts, config.prompts_per_step, config.seed, step)
        texts = [prompt.text for prompt in batch]
        conditions = model.encode(texts)

        visit = step // (len(prompts) // config.prompts_per_step)

        with acting(model, behaviour):
            signals, trunk = None, None
            if needs_probe(config):
                signals, trunk = probe(model, batch, conditions, config, visit, memory, team)
            if needs_spread(config) and (step % SPREAD_EVERY == 0 or memory.reward_spread is None):
                fresh = reward_spread(model, batch, conditions, reward, config, step, visit, trunk, team)
                memory.reward_spread = fresh.where(
                    fresh.isfinite(), 0 if memory.reward_spread is None else memory.reward_spread
                )
            plan = make_plan(config, batch, signals, memory, sigmas, step)
            if config.sampler.shared_noise and trunk is None:
                trunk = shared_trunk(model, batch, conditions, plan, config, step, visit, team)
            display.begin("rollouts", int(plan.rollouts.sum()) * config.sampler.steps // team.size)
            inquiry = Inquiry(reward, [batch[i] for i in plan.group.tolist()], plan.group.tolist(), team)
            rollouts = collect(
                *(model, batch, conditions, plan, config, step, trunk, display.advance),
                parts=PARTS if reward.elsewhere else 1,
                finished=inquiry.ask,
                team=team,
                whole_groups=seen_whole(config, reward),
            )

        display.begin("rewards", len(rollouts.images))
        verdict = inquiry.verdict(display.advance)
        remember(config, batch, torch.from_numpy(verdict.score), rollouts.group, memory)
        rewards = torch.from_numpy(verdict.rewards)
        advantage, taught = credit(config, rewards, rollouts.group, rollouts.courses, verdict.weights)
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(config, step)
        rows = rollouts.transitions.judged(advantage, taught)
        aside = partial(logbook.keep_aside, run, step + 1, team.rank, texts)
        learned = update(config, model, optimizer, rows, conditions, step, display, rollouts.kept, team, aside)
        rollouts = replace(rollouts, kept=())  # or the graphs of what taught nothing would stand beside the next ones
        if behaviour is not None:
            follow(behaviour, model, min(config.optimizer.behaviour_ramp * (step + 1), config.optimizer.behaviour))
        if average:
            take_average(average, config, model, step)

        about = {"prompts": texts, "rollouts": len(rollouts.group)}
        record(step + 1, about | logbook.describe(plan, rollouts, signals, verdict, advantage) | learned)
        in_a_row = in_a_row + 1 if learned["dropped_updates"] else 0
        if in_a_row >= config.optimizer.give_up_after:
            raise FloatingPointError(
                f"the gradient was not finite in {in_a_row} steps in a row, whose rows are in {run / logbook.ASIDE}; "
                f"resume with a lower rate, say --optimizer.lr {learned['lr'] / 10:g}"
            )
        stopped = team.any(stop())
        if stopped or step + 1 == config.steps or ((step + 1) % config.save_every == 0 and not in_a_row):
            save(step + 1)  # one that may be followed by more that are not finite is no good place to go back to
        if stopped:
            put_weights()
            break


def seen_whole(config: Config, reward: Panel) -> bool:
    """Whether one process has to draw all rollouts of a prompt: a reward compares them, or the loss in their graphs."""
    return reward.groupwise or (config.optimizer.keep_graphs and config.loss.kind in GROUP_LOSSES)


def added_up(troubles: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Troubles of several calls and processes, one for each reward and kind, of the images of all."""
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for trouble in troubles:
        first = kinds.setdefault((trouble["reward"], trouble["kind"]), trouble | {"images": 0})
        first["images"] += trouble["images"]
    return list(kinds.values())


def seed_others(seed: int, step: int, process: int) -> None:
    """Seed the generators of Python, numpy and torch, of which only a user's reward draws: alike in a resumed run."""
    set_seed(int(np.random.SeedSequence([OTHERS, seed, step, process]).generate_state(1)[0]))


# ---------------------------------------------------------------- credit


def credit(
    config: Config, rewards: Tensor, group: Tensor, courses: Courses, weights: Sequence[float] = (1.0,)
) -> tuple[Tensor, Tensor]:
    """What each rollout's explored steps have to do with its reward.

    A step is judged by where it landed: the mean reward of all rollouts that passed there, beside those of the others
    of the same prompt that explored the same step. Where rollouts part at their first noise, that is their own reward
    beside the group's; on a tree, it is an edge's (arXiv 2509.06040).

    Args:
        config: a resolved config.
        rewards: (n, k), of each rollout by each reward that has a weight, or (n,) by one; not a number throughout a
            group that is to teach nothing.
        group: int64 (n,), the prompt of each rollout.
        courses: their ways.
        weights: k, of the rewards.

    Returns:
        The advantages, float32 (n, N), 0 at steps that were not explored; and which steps are learned from, bool
        (n, N): those of groups that teach that are trained, and lead to a rollout among the best and worst, if only
        these are kept.
    """
    how, rewards = config.advantage, rewards.reshape(len(group), -1)
    kept = rewards.isfinite().all(1)
    advantage, taught = torch.zeros(courses.children.shape), courses.trained & kept[:, None]
    if not kept.any():
        return advantage, taught
    rewards, group, children = rewards[kept], group[kept], courses.children[kept]
    advantage[kept] = combined_advantages(
        rewards, group, children, weights, how.combine, how.std, how.ddof, how.eps, how.clip
    )
    if not how.best_of:
        return advantage, taught
    stays = torch.zeros(len(kept), dtype=torch.bool)
    stays[kept] = best_of(weighted_sum(weights, rewards.double().unbind(1)), group, how.best_of)
    return advantage, taught & (node_returns(stays.double(), courses.children) > 0)


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
    kept: Sequence[Tensor] = (),
    team: Team = ALONE,
    spoilt: Callable[[int, Transitions], None] = lambda number, rows: None,
) -> dict[str, Any]:
    """Shuffle the rows of all prompts and timesteps, deal them to the optimizer steps, and take those.

    Rows without an advantage, such as all of a group whose rewards are equal, say nothing of the reward and are left
    out before the forward, and with them their pull to the base or the old policy. The loss is summed over the others
    and divided by the number of all, so a step with few of them is a small one; what is logged are means over the
    others, and null what the loss does not know or what is not finite. An optimizer step whose loss or gradient is not
    finite is not taken, and `spoilt` is told its number and this process's rows.
    """
    share = team.sum(len(rows)) / config.optimizer.updates
    rows, dealt = share_out(rows, config, [SHUFFLE, config.seed, step], team)
    count = int(team.sum(len(rows)))
    display.begin("update", len(rows))
    totals: dict[str, Tensor] = {}
    grad_norms, dropped, first_error = [], 0, torch.zeros((), device=rows.x.device)
    tolerance = ratio_tolerance(config)
    again, recomputed = tolerance == 0, 0
    for number, micros in enumerate(dealt):
        optimizer.zero_grad()
        slope = torch.zeros(sum(map(len, kept)), *rows.x.shape[1:], device=rows.x.device)
        summed = torch.zeros((), device=rows.x.device)
        for micro in model.even(micros):
            part = rows[micro]
            known = part.velocity.clone().requires_grad_() if kept else None
            loss = objective(config, model, part, conditions, known, on_policy=again and number == 0)
            if number == 0 and not again and len(micro) and "ratio/mean" in loss.metrics:
                first_error = torch.maximum(first_error, (loss.metrics["ratio/mean"] - 1).abs().max())
                if first_error > tolerance:
                    again = True
                    loss = objective(config, model, part, conditions, on_policy=True)
            value = loss.rows.sum() / share
            summed += value.detach()
            if known is None:
                value.backward()
            else:
                slope.index_add_(0, part.graph.to(slope.device), torch.autograd.grad(value, known)[0])
            for name, values in loss.metrics.items():  # kept where they are: reading one would wait for the device
                totals[name] = totals.get(name, 0.0) + values.double().sum()
            display.advance(len(micro))
        pull_back(kept, slope, rows.graph)
        if number == 0 and len(dealt) > 1 and team.any(again):
            recomputed = predict_again(config, model, rows, conditions, [m for later in dealt[1:] for m in later])
        found = gradients(model)
        if not model.is_sharded:  # whose gradients were added up on the way
            team.add_up(found)
        norm = whole(nn.utils.clip_grad_norm_(model.trainable.values(), config.optimizer.max_grad_norm))
        if team.any(not (norm.isfinite() & summed.isfinite())):
            dropped += 1
            with team.agreed():
                spoilt(number, rows[torch.cat([rows.unit.new_zeros(0), *micros])])
            continue
        grad_norms.append(norm.item())
        optimizer.step()
    means: dict[str, float | None] = dict.fromkeys(("loss", "ratio/mean", "clip_fraction", "approx_kl"))
    said = team.tell({name: total.item() for name, total in totals.items()})
    sums = {name: sum(one.get(name, 0.0) for one in said) for one in said for name in one}
    means |= {name: total / count if math.isfinite(total) else None for name, total in sums.items()}
    return means | {
        "rows": count,
        "dropped_updates": dropped,
        "recomputed": int(team.sum(recomputed)),
        "grad_norm": float(np.mean(grad_norms)) if grad_norms else 0.0,
        "ratio/first_error": None if means["ratio/mean"] is None else team.most(first_error.item()),
        "lr": optimizer.param_groups[0]["lr"],
    }


def gradients(model: Denoiser) -> list[Tensor]:
    """The gradient of each trained weight: 0 where no row of this process had any to do with it."""
    found = []
    for parameter in model.trainable.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found


def pull_back(kept: Sequence[Tensor], slope: Tensor, used: Tensor) -> None:
    """The rest of the chain rule, from the loss's slope at each kept prediction to the weights.

    Args:
        kept: predictions (b, ...) with their graphs, which are freed.
        slope: of the loss at each of them, one after another.
        used: int64, the places of those that have one: where a forward has none, there is nothing to go back for.
    """
    at = 0
    for predicted in kept:
        end = at + len(predicted)
        if ((used >= at) & (used < end)).any():
            predicted.backward(slope[at:end])
        at = end


def share_out(rows: Transitions, config: Config, key: list[int], team: Team) -> tuple[Transitions, list[list[Tensor]]]:
    """Deal the rows that teach, of all processes, to the optimizer steps, and each step's to the processes.

    Which rows an optimizer step takes does not depend on how many processes there are. Rows whose graph was kept stay
    with the process that drew them.

    Returns:
        The rows that this process trains, and for each optimizer step its micro-batches, as places of those.
    """
    updates, most = config.optimizer.updates, config.optimizer.micro_batch
    unit, number = team.gather(rows.unit), team.gather(rows.number)
    teaches = torch.isin(unit, unit[team.gather(rows.advantage.cpu() != 0)])
    if config.optimizer.keep_graphs:
        own = torch.isin(rows.number, number[teaches]).nonzero().flatten()
        return rows[own], deal(rows.unit[own], updates, most, key) or [[]] * bool(teaches.any())
    number = number[teaches]
    dealt = deal(unit[teaches], updates, most, key, team)
    mine = [micro for micros in dealt for micro in micros]
    wanted = number[torch.cat(mine)] if mine else number[:0]
    fields = team.fetch(lambda places: list(vars(rows[places]).values()), rows.number, wanted)
    places = iter(torch.arange(len(wanted)).split([len(micro) for micro in mine]))
    return Transitions(**dict(zip(vars(rows), fields, strict=True))), [
        [next(places) for _ in micros] for micros in dealt
    ]


def deal(unit: Tensor, updates: int, most: int, key: list[int], team: Team = ALONE) -> list[list[Tensor]]:
    """Rows in a random order, in as many parts as there are optimizer steps, of each this process's in micro-batches.

    Rows of one unit stay together; a micro-batch holds no more than `most` rows unless a single unit does.

    Args:
        unit: int64 (m,), the unit of each row.
        updates: optimizer steps; any that would have no row in any process is left out.
        most: rows in a micro-batch.
        key: what the order depends on.
        team: the processes that share each step's rows.

    Returns:
        For each optimizer step this process's micro-batches, as places of rows.
    """
    _, place, size = unit.unique(return_inverse=True, return_counts=True)
    members = place.argsort(stable=True).split(size.tolist())
    order = torch.from_numpy(np.random.default_rng(key).permutation(len(size)))
    dealt = []
    for part in order.tensor_split(updates):
        if not len(part):
            continue
        own = shares(size[part].tolist(), team.size)[team.rank]
        micros: list[list[Tensor]] = []
        held = most
        for i in part[own.start : own.stop].tolist():
            if held + len(members[i]) > most:
                micros.append([])
                held = 0
            micros[-1].append(members[i])
            held += len(members[i])
        dealt.append([torch.cat(micro) for micro in micros])
    return dealt


def take_average(average: EMAModel, config: Config, model: Denoiser, step: int) -> None:
    """Average in the weights after a training step, if that is one after which `ema_every` says so."""
    taken = config.optimizer.updates * (step + 1)
    if taken % config.optimizer.ema_every < config.optimizer.updates:
        average.optimization_step = taken  # from which diffusers takes the decay, min((1 + n) / (10 + n), decay)
        average.step(model.trainable.values())


def follow(behaviour: list[Tensor], model: Denoiser, decay: float) -> None:
    """Let the policy that draws the rollouts follow the one that is trained: decay times itself, and else the other."""
    for average, parameter in zip(behaviour, model.trainable.values(), strict=True):
        average.lerp_(parameter.detach(), 1 - decay)
