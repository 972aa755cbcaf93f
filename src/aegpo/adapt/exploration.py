"""At which denoising steps each prompt explores: only there is noise injected, and only those steps are trained."""

import math
from itertools import accumulate, groupby
from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["all", "window", "random", "entropy_peaks", "delta_entropy_peaks", "policy_noise", "reward_spread"]
Per = Literal["prompt", "batch"]
Moves = Literal["none", "random", "progressive", "linear", "exponential"]

FLOOR = 0.2  # of the probability of a noise level's draw is shared equally: no weight is above 1 / FLOOR


def explore(
    entropy: Tensor,
    rule: Rule,
    k: int = 4,
    min_distance: int = 1,
    last: bool = False,
    *,
    local_maxima: bool = False,
    per: Per = "prompt",
    start: int = 0,
    until: int = 0,
    seed: int = 0,
) -> Tensor:
    """The explored steps of each of P prompts, out of N.

    * `all`: every step.
    * `window`: k steps from `start` on, `min_distance` apart (Flow-GRPO-Fast, arXiv 2505.05470; MixGRPO, arXiv
      2507.21802).
    * `random`: k steps drawn anew for each prompt.
    * `entropy_peaks`: the k steps of highest entropy (AEGPO, arXiv 2602.06825).
    * `delta_entropy_peaks`: the k steps where the change of entropy since the base policy is largest in size; the
      caller passes that change, signed or not, as `entropy`. Before the first update it is 0 everywhere, and the k
      first steps are taken, from which exploring spreads rollouts most.
    * `policy_noise`: the k steps at which the sampler's own noise is largest (E-GRPO, whose entropy of a Gaussian step,
      `ln(2 pi e std^2) / 2`, ranks them alike). The caller passes the standard deviations as `entropy`.
    * `reward_spread`: the k steps from which exploring, alone, spreads the rewards of a group most. The caller passes
      that measured spread as `entropy`.

    The last four are the peaks of a curve. Steps are taken highest first, equal ones by index. With `local_maxima`
    those that no neighbour tops come first (of a plateau, its first step; the last step, if it may not be chosen, is no
    neighbour), and others only where there are fewer than k. With `min_distance` above 1 a step too near to one already
    taken is passed over, and so is one that would leave no room for k of them.

    Args:
        entropy: (P, N), float: one row a prompt, one column a denoising step, first step first. The rules `all`,
            `window` and `random` use its shape only.
        rule: how the steps are chosen.
        k: how many steps a prompt explores; `all` ignores it.
        min_distance: smallest difference between two explored steps of a prompt; `all` ignores it.
        local_maxima: whether true local maxima come before steps that are merely high; for the peaks of a curve.
        per: whether each `prompt` follows its own curve, or all follow the mean curve of the `batch`; likewise.
        last: whether the last step, the one onto sigma = 0, may be chosen. Every sampler's is deterministic.
        start: the first step that may be chosen, which is where the `window` begins.
        until: steps from this one on may not be chosen; 0: all may, but for `last`.
        seed: what `random` draws from; the same seed gives the same steps on every process.

    Returns:
        (P, N), bool, on the CPU.

    Raises:
        ValueError: for an unknown `rule`, for more steps than there are to choose from (with their distance), and for a
            signal that is not finite, naming its position.
    """
    not_finite = (~entropy.isfinite()).nonzero().tolist()
    if not_finite:
        prompt, step = not_finite[0]
        raise ValueError(f"entropy[{prompt}, {step}] is {entropy[prompt, step].item()}; entropies must be finite")
    prompts, steps = entropy.shape
    available = range(start, until or (steps if last else steps - 1))
    curves = entropy.abs() if rule == "delta_entropy_peaks" else entropy
    if per == "batch":
        curves = curves.mean(0, keepdim=True).expand_as(curves)
    curves = curves[:, available.start : available.stop]
    match rule:
        case "all":
            chosen = [range(len(available))] * prompts
        case "window":
            if start < 0 or (k - 1) * min_distance >= len(available):
                apart = f", {min_distance} apart," * (min_distance > 1)
                raise ValueError(
                    f"a window of {k} steps{apart} from step {start} on does not fit into {available.stop} steps"
                )
            chosen = [range(0, k * min_distance, min_distance)] * prompts
        case "random":
            noise = torch.rand(prompts, len(available), generator=torch.Generator().manual_seed(seed))
            chosen = [_highest(row, k, min_distance) for row in noise.tolist()]
        case "entropy_peaks" | "delta_entropy_peaks" | "policy_noise" | "reward_spread":
            chosen = [_highest(row, k, min_distance, local_maxima) for row in curves.tolist()]
        case _:
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, not {rule!r}")
    return torch.tensor([[step - start in row for step in range(steps)] for row in chosen], dtype=torch.bool)


def draw_levels(curves: Tensor, k: int, seed: int, importance: bool = True) -> tuple[Tensor, Tensor]:
    """k noise levels for each prompt, drawn from the distribution that a curve is.

    This is what a signal over denoising steps becomes where no step is noisy and rows are finished images brought back
    to a noise level (DiffusionNFT, arXiv 2509.16117, and its kin): a level is drawn with a probability in proportion
    to how far the curve there lies above its minimum, mixed with equal ones (FLOOR) so that no level is ever left out.
    The draw is systematic (one uniform number a prompt): level t is among the k with exactly the probability pi_t that
    is k times its share, at most 1, and none is drawn twice.

    Args:
        curves: (P, N), float, finite: how much each level is worth; equal ones mean equal probabilities.
        k: levels a prompt, at most N.
        seed: what is drawn from.
        importance: whether to weigh a level by k / (N pi_t), so that the expected sum over the levels drawn is that
            under equal probabilities, k / N times the sum over all.

    Returns:
        The levels, bool (P, N), k in each row, and their weights, float64 (P, N).
    """
    prompts, levels = curves.shape
    above = curves.double() - curves.double().amin(1, keepdim=True)
    total = above.sum(1, keepdim=True)
    share = torch.where(total > 0, above / total.where(total > 0, 1.0), 1 / levels)
    probability = _capped((1 - FLOOR) * share + FLOOR / levels, k)
    start = torch.rand(prompts, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    up_to = probability.cumsum(1)
    up_to[:, -1] = k  # exactly, whatever the sum's rounding
    passed = (up_to - start).ceil()  # how many of start, start + 1, ... lie below
    chosen = passed.diff(dim=1, prepend=torch.zeros(prompts, 1, dtype=torch.float64)) > 0
    weight = k / (levels * probability) if importance else torch.ones_like(probability)
    return chosen, weight


def _capped(share: Tensor, k: int) -> Tensor:
    """k times each share, (P, N), but at most 1: what is above goes to the others in proportion."""
    sure = torch.zeros_like(share, dtype=torch.bool)
    while True:
        left = k - sure.sum(1, keepdim=True)
        free = share.where(~sure, 0.0)
        probability = (left * free / free.sum(1, keepdim=True)).where(~sure, 1.0)
        more = (probability >= 1) & ~sure
        if not more.any():
            return probability
        sure |= more


def window_start(moves: Moves, step: int, first: int, last: int, every: int, seed: int = 0) -> int:
    """Where the window begins at a training step.

    MixGRPO (arXiv 2507.21802) moves it one step later every so many training steps, c being its present place counted
    from `first` and M the number of places: `every` (progressive), `int(every (1 - c/M) + max(1, every // 4) c/M)`
    (linear), or `ceil(every e^{-0.1 max(0, c - 13)})` (exponential). After the last place it begins again at the first.

    Args:
        moves: `none` (it stays at `first`), `random` (anywhere), or one of these.
        step: of the training, from 0.
        first: the first place.
        last: the last place at which the window still fits.
        every: training steps at a place, at first.
        seed: what `random` draws from.
    """
    places = last - first + 1
    match moves:
        case "none":
            return first
        case "random":
            return first + int(torch.randint(places, (), generator=torch.Generator().manual_seed(seed)))
        case "progressive":
            stays = [every] * places
        case "linear":
            fewest = max(1, every // 4)
            stays = [max(1, int(every * (1 - c / places) + fewest * c / places)) for c in range(places)]
        case "exponential":
            stays = [math.ceil(every * math.exp(-0.1 * max(0, c - 13))) for c in range(places)]
        case _:
            raise ValueError(f"moves must be one of {', '.join(get_args(Moves))}, not {moves!r}")
    left = step % sum(stays)
    return first + next(c for c, until in enumerate(accumulate(stays)) if left < until)


def _highest(signal: list[float], k: int, min_distance: int, local_maxima: bool = False) -> list[int]:
    """The steps of the k highest values, at least `min_distance` apart, highest first."""
    if _room([], len(signal), min_distance) < k:
        raise ValueError(f"{k} steps, {min_distance} apart, do not fit into {len(signal)} steps")
    chosen: list[int] = []
    maxima = _local_maxima(signal) if local_maxima else set()
    by_height = sorted(range(len(signal)), key=lambda i: (i not in maxima, -signal[i]))  # stable: ties by step
    for step in by_height:
        apart = all(abs(step - other) >= min_distance for other in chosen)
        if apart and len(chosen) < k <= len(chosen) + 1 + _room([*chosen, step], len(signal), min_distance):
            chosen.append(step)
    return chosen


def _local_maxima(signal: list[float]) -> set[int]:
    """The steps before and after which the signal falls, the ends counted; of a plateau, the first."""
    runs = [(value, len(list(same))) for value, same in groupby(signal)]
    starts = list(accumulate((length for _, length in runs), initial=0))
    values = [-math.inf, *(value for value, _ in runs), -math.inf]
    return {starts[i] for i in range(len(runs)) if values[i] < values[i + 1] > values[i + 2]}


def _room(chosen: list[int], steps: int, min_distance: int) -> int:
    """How many more steps fit beside the chosen ones: fill from the left."""
    room, free_from = 0, 0
    for step in range(steps):
        if step >= free_from and all(abs(step - other) >= min_distance for other in chosen):
            room, free_from = room + 1, step + min_distance
    return room
