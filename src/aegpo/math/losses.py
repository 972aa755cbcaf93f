"""Policy losses, one value a row: the caller weighs and averages them."""

import torch
from torch import Tensor


def clipped_surrogate(
    log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """PPO's clipped surrogate `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))` (arXiv 1707.06347).

    Here `A` is the advantage and `r = exp(l - l_old)` the ratio of the two policies' densities. The gradient flows
    through `log_prob` only. At the first update of a rollout r is exactly 1 and the gradient is that of REINFORCE,
    `-A grad l`; once r has passed the clip in the direction that A asked for, it is 0.

    Args:
        log_prob: (n,), nats, under the weights being trained.
        log_prob_old: (n,), nats, under the weights that drew the rollout, reduced the same way.
        advantage: (n,).
        clip_low: how far below 1 the ratio still counts; 1e-4 is usual for log-probs averaged over the latent.
        clip_high: how far above 1.

    Returns:
        The loss of each row, (n,), to be minimised.
    """
    assert log_prob.shape == log_prob_old.shape == advantage.shape
    advantage = advantage.detach()
    ratio = (log_prob - log_prob_old.detach()).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
