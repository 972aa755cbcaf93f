"""One denoising step of a rectified flow as a Gaussian: its mean, its standard deviation and its log-probability.

The path is `x_s = (1 - s) x0 + s e` and the network predicts the velocity `v = e - x0`, so a latent `x` at noise
level `s` holds an estimate of the image, `x0_hat = x - s v`, and one of the noise, `e_hat = x + (1 - s) v`. With
`s' = sigma_next` every sampler here is one form, in which only `k` and `std` differ:

    x' = mean + std z,    mean = (1 - s') x0_hat + k e_hat,    z ~ N(0, I)

A sampler that takes less than `s'` of the predicted noise (`k < s'`) replaces it by fresh noise of size `std`.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["ode", "flow_sde", "dance_sde", "cps", "ddim", "dpm_sde"]
Prediction = Literal["epsilon", "v_prediction"]
Reduction = Literal["mean", "sum"]


def transition(
    x: Tensor,
    v: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    kind: Kind,
    eta: float,
    sigma_first: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latent at `sigma_next`, given the latent and the velocity at `sigma`.

    With `s = sigma`, `s' = sigma_next` and `h = s - s'`:

    | kind | k | std | source |
    |---|---|---|---|
    | `ode` | `s'` | 0 | Euler's step, `mean = x - h v` |
    | `flow_sde` | `s' - g^2 h / (2 s)` | `g sqrt(h)`, `g = eta sqrt(s / (1 - s))` | Flow-GRPO, arXiv 2505.05470 |
    | `dance_sde` | the same | the same, with `g = eta` | DanceGRPO, arXiv 2505.07818 |
    | `cps` | `s' cos(eta pi / 2)` | `s' sin(eta pi / 2)` | FlowCPS, arXiv 2509.05952 |
    | `ddim` | `sqrt(s'^2 - std^2)` | `eta s' sqrt(1 - e^(-2H))` | DDIM, arXiv 2010.02502; DDPO, arXiv 2305.13301 |
    | `dpm_sde` | `s' e^(-H)` | `s' sqrt(1 - e^(-2H))` | SDE-DPM++ of order 1; MixGRPO, arXiv 2507.21802 |

    Flow-SDE's `g` is infinite at `s = 1`; there, and only there, `1 - s` becomes `1 - sigma_first`.
    A sampler's step onto `sigma_next = 0` is deterministic by convention: ask for it as `ode`.

    `H` is how far the logarithm of the signal-to-noise ratio, `ln((1 - s) / s)`, rises, so that
    `e^(-H) = (1 - s) s' / (s (1 - s'))`; it is 0 from `s = 1` and onto `s' = 0`. `ddim` is the textbook step of
    `ddim_transition` after `x` has been scaled to unit total variance. `dpm_sde` is `ddim` at eta 1, and takes no
    eta. In the limit of short steps `ddim` at eta is Flow-SDE at `sqrt(2) eta`.

    Args:
        x: latents, (B, ...). Half precision is widened to fp32 before the arithmetic, fp64 stays fp64.
        v: velocities after guidance, the shape of `x`; the gradient reaches them through the mean.
        sigma: noise level of `x` in (0, 1], one number or one per row, (B,): the rows may stand at different steps.
        sigma_next: noise level after the step in [0, sigma), one number or (B,).
        kind: the sampler.
        eta: noise strength; at 0 every sampler is the ODE. `ddim` takes it up to 1; `ode` and `dpm_sde`
            ignore it.
        sigma_first: the schedule's own `sigma[1]`, needed by `flow_sde` wherever `sigma` is 1.

    Returns:
        mean: (B, ...), fp32 or fp64.
        std: the standard deviation that the noise is multiplied by, (B, 1, ...) or (1, 1, ...), the dtype of `mean`.

    Raises:
        ValueError: for an unknown `kind`, for `ddim` with eta above 1, and for a `flow_sde` step from `sigma` = 1
            without `sigma_first`.
    """
    x, v = at_least_fp32(x, v)
    s, s_next = per_row(sigma, x), per_row(sigma_next, x)
    h = s - s_next
    match kind:
        case "ode":
            k, std = s_next, torch.zeros_like(h)
        case "flow_sde":
            g_squared = eta**2 * s / (1 - _below_one(s, sigma_first))
            k, std = s_next - g_squared * h / (2 * s), (g_squared * h).sqrt()
        case "dance_sde":
            k, std = s_next - eta**2 * h / (2 * s), eta * h.sqrt()
        case "cps":
            phi = eta * math.pi / 2
            k, std = s_next * math.cos(phi), s_next * math.sin(phi)
        case "ddim":
            k, std = _ddim(s_next, *_forgotten(s, s_next), eta)
        case "dpm_sde":
            k, std = _ddim(s_next, *_forgotten(s, s_next), 1.0)
        case _:
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, not {kind!r}")
    x0_hat = x - s * v
    e_hat = x + (1 - s) * v
    return (1 - s_next) * x0_hat + k * e_hat, std


def ddim_transition(
    x: Tensor,
    prediction: Tensor,
    alpha: float | Tensor,
    alpha_next: float | Tensor,
    eta: float,
    prediction_type: Prediction = "epsilon",
) -> tuple[Tensor, Tensor]:
    """DDIM's step of a variance-preserving model, Stable Diffusion 1.5 and XL (arXiv 2010.02502; DDPO, 2305.13301).

    The path is `x = sqrt(a) x0 + sqrt(1 - a) e`. With `a = alpha` and `a' = alpha_next` the step is

        mean = sqrt(a') x0_hat + sqrt(1 - a' - std^2) e_hat,    std^2 = eta^2 (1 - a') / (1 - a) (1 - a / a')

    where the network predicts the noise (`epsilon`: `x0_hat = (x - sqrt(1 - a) e_hat) / sqrt(a)`), or the velocity of
    arXiv 2202.00512 (`v_prediction`: `x0_hat = sqrt(a) x - sqrt(1 - a) v`, `e_hat = sqrt(a) v + sqrt(1 - a) x`). Eta 0
    is noiseless, and eta 1 the posterior of DDPM (arXiv 2006.11239). The prediction is never clipped.

    Args:
        x: latents, (B, ...). Half precision is widened to fp32 before the arithmetic, fp64 stays fp64.
        prediction: the network's output after guidance, the shape of `x`; the gradient reaches it through the mean.
        alpha: the product of the schedule's alphas up to the step `x` stands at, `alphas_cumprod` in diffusers, in
            (0, 1), one number or one per row, (B,); 0 too for `v_prediction`.
        alpha_next: the same after the step, in (alpha, 1], one number or (B,).
        eta: noise strength in [0, 1].
        prediction_type: `epsilon` or `v_prediction`.

    Returns:
        mean: (B, ...), fp32 or fp64.
        std: (B, 1, ...) or (1, 1, ...), the dtype of `mean`; 0 onto `alpha_next` = 1.

    Raises:
        ValueError: for an unknown `prediction_type`, and for eta above 1.
    """
    assert x.shape == prediction.shape
    x, prediction = at_least_fp32(x, prediction)
    a, a_next = per_row(alpha, x), per_row(alpha_next, x)
    match prediction_type:
        case "epsilon":
            x0_hat, e_hat = (x - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
        case "v_prediction":
            x0_hat = a.sqrt() * x - (1 - a).sqrt() * prediction
            e_hat = a.sqrt() * prediction + (1 - a).sqrt() * x
        case _:
            names = ", ".join(get_args(Prediction))
            raise ValueError(f"prediction_type must be one of {names}, not {prediction_type!r}")
    all_of_it = a_next * (1 - a)
    k, std = _ddim((1 - a_next).sqrt(), (a_next - a) / all_of_it, a * (1 - a_next) / all_of_it, eta)
    return a_next.sqrt() * x0_hat + k * e_hat, std


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Log-density in nats of `x_next` under N(mean, std^2), over the elements of each row: their mean, or their sum.

    The mean is what every published implementation trains on (a ratio of sums leaves any clip at once): with D
    elements a row its ratio is the D-th root of the true one, and a clip of 1e-4 stands for a true log-ratio of
    D times that. The gradient flows through `mean` only; `x_next` and `std` are constants. FlowCPS's own score,
    `-(x_next - mean)^2` (arXiv 2509.05952), is the case `std = 1 / sqrt(2)`, up to a constant that cancels in every
    ratio.

    Args:
        x_next: the latents that were drawn, (B, ...). If they are kept in half precision, round them before this call.
        mean: (B, ...), half precision is widened to fp32.
        std: broadcastable to `mean` and positive: an ODE step has no density, so leave its rows out.
        reduction: `mean` or `sum` over all dimensions but the first.

    Returns:
        (B,), fp32 or fp64.

    Raises:
        ValueError: for an unknown `reduction`.
    """
    x_next, mean, std = at_least_fp32(x_next.detach(), mean, std.detach())
    return _reduce(-((x_next - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2, reduction)


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor, reduction: Reduction = "mean") -> Tensor:
    """KL divergence in nats of N(mean, std^2) from N(mean_ref, std^2): `(mean - mean_ref)^2 / (2 std^2)`, per row.

    The gradient flows through `mean` only. The code of Flow-GRPO (arXiv 2505.05470) divides by `2 g^2` instead, so
    its KL weights belong to this divergence times `sigma - sigma_next`.

    Args:
        mean: (B, ...), half precision is widened to fp32.
        mean_ref: (B, ...), the mean under the reference weights.
        std: broadcastable to `mean` and positive.
        reduction: `mean` or `sum` over all dimensions but the first.

    Returns:
        (B,), fp32 or fp64, never negative.

    Raises:
        ValueError: for an unknown `reduction`.
    """
    mean, mean_ref, std = at_least_fp32(mean, mean_ref.detach(), std.detach())
    return _reduce((mean - mean_ref) ** 2 / (2 * std**2), reduction)


def at_least_fp32(*tensors: Tensor) -> list[Tensor]:
    """The tensors in fp32, or all in fp64 if one of them is."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype) for t in tensors]


def per_row(value: float | Tensor, x: Tensor) -> Tensor:
    """A number or a (B,) vector as (1, 1, ...) or (B, 1, ...), ready to multiply `x` (B, ...)."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))


def _forgotten(s: Tensor, s_next: Tensor) -> tuple[Tensor, Tensor]:
    """`1 - e^(-2H)` and `e^(-2H)`, both without cancellation, and finite at s = 1 and s' = 0."""
    whole = s * (1 - s_next)
    kept = (1 - s) * s_next / whole
    return (s - s_next) / whole * (1 + kept), kept.square()


def _ddim(noise: Tensor, forgotten: Tensor, kept: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """What of the noise after the step is predicted and what is fresh; `forgotten` and `kept` are shares, in sum 1."""
    if eta > 1:
        raise ValueError(f"ddim takes eta up to 1, where all the noise it may replace is fresh, not {eta}")
    return noise * (1 - eta**2 + eta**2 * kept).sqrt(), eta * noise * forgotten.sqrt()


def _below_one(s: Tensor, sigma_first: float | Tensor | None) -> Tensor:
    """`s` with the ones, where a flow starts exactly, replaced by `sigma_first`."""
    at_start = s == 1
    if sigma_first is None:
        if at_start.any():
            raise ValueError("flow_sde from sigma = 1 needs sigma_first, the schedule's sigma[1]")
        return s
    return torch.where(at_start, per_row(sigma_first, s), s)


def _reduce(elements: Tensor, reduction: Reduction) -> Tensor:
    """(B, ...) to (B,)."""
    rows = elements.reshape(len(elements), math.prod(elements.shape[1:]))
    match reduction:
        case "mean":
            return rows.mean(dim=1)
        case "sum":
            return rows.sum(dim=1)
        case _:
            raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, not {reduction!r}")
