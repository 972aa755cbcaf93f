"""The report's figures: numbers in, one inline SVG out.

No figure holds a word of the user's, and none has colours of its own: they are names of CSS variables, so one figure
serves a light and a dark page.
"""

import io
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Stand-ins that matplotlib takes for colours; `_inlined` puts the page's CSS variables in their place.
MUTED, RULE, ACCENT = "#010101", "#020202", "#030303"
PHASES = ("#040404", "#050505", "#060606", "#070707")
VARIABLES = {MUTED: "--muted", RULE: "--rule", ACCENT: "--accent"}
VARIABLES |= {phase: f"--phase-{number}" for number, phase in enumerate(PHASES, start=1)}

HEAT = ("#1d2a4d", "#2c5f8a", "#3a9a9c", "#8fc98a", "#f2e2a0")  # low to high; the page draws its scale from the same
CHANGE = ("#2c5f8a", "#8db6c9", "#f1ede4", "#e0a27d", "#a8492f")  # less, as much, more
HEAT_COLUMNS = 120
DENOISING = "Denoising step (1 is the noisiest)"
ROUND = [1, 2, 5, 10]  # what ticks are multiples of
WIDE, NARROW = (4.9, 2.7), (3.0, 1.3)  # inches; small enough for their letters to stay readable on a phone

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aegpo",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": MUTED,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.labelpad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


T = TypeVar("T")
styled = matplotlib.rc_context(STYLE)


@styled
def reward_curve(
    training: tuple[Sequence[int], Sequence[float]], held_out: tuple[Sequence[int], Sequence[float]]
) -> Markup:
    """Mean training reward of each step, its moving average, and the held-out reward wherever it was measured."""
    figure, axes = _figure(WIDE)
    steps, rewards = training
    axes.plot(steps, rewards, color=MUTED, linewidth=0.9, alpha=0.45)
    axes.plot(steps, moving_average(rewards), color=MUTED, linewidth=1.5)
    axes.plot(*held_out, color=ACCENT, marker="o", markersize=4.5)
    _label(axes, "Training step", "Reward")
    return _inlined(figure, "Reward over training")


@styled
def pass_rate_curve(steps: Sequence[int], shares: Sequence[float]) -> Markup:
    """The share of all held-out prompts passed, wherever it was measured."""
    figure, axes = _figure(WIDE)
    axes.plot(steps, shares, color=ACCENT, marker="o", markersize=4.5, clip_on=False)
    _label(axes, "Training step", "Pass rate")
    _as_share(axes)
    return _inlined(figure, "Pass rate over training")


@styled
def entropy_curves(first: Sequence[float], last: Sequence[float]) -> Markup:
    """Entropy over denoising steps, at the first and at the last training step that was probed."""
    figure, axes = _figure(WIDE)
    axes.plot(_from_one(first), first, color=MUTED, marker="o", markersize=3.5)
    axes.plot(_from_one(last), last, color=ACCENT, marker="o", markersize=3.5)
    _label(axes, DENOISING, "Entropy (nats)")
    return _inlined(figure, "Entropy over denoising steps")


@styled
def entropy_heat_map(steps: Sequence[int], entropy: Sequence[Sequence[float]]) -> Markup:
    """Entropy by training step (across) and denoising step (down). Long runs are averaged into at most 120 columns."""
    rows = list(zip(*(_mean_columns(chunk) for chunk in chunked(entropy, HEAT_COLUMNS)), strict=True))
    figure, axes = _figure(WIDE)
    _heat(axes, rows, HEAT, (steps[0], steps[-1]))
    _label(axes, "Training step", "Denoising step")
    axes.yaxis.set_major_locator(MaxNLocator(11, integer=True, steps=ROUND, min_n_ticks=1))
    return _inlined(figure, "Entropy by training step and denoising step")


@styled
def layer_map(name: str, layers: Sequence[Sequence[float]], change: bool = False) -> Markup:
    """Entropy, or its change, by denoising step (across) and attention layer (down).

    Args:
        name: What is mapped, in plain letters.
        layers: A row a layer, a number a denoising step.
        change: Whether the numbers have a sign; 0 is the middle of the colours then.
    """
    figure, axes = _figure(WIDE)
    most = max(abs(value) for row in layers for value in row) or 1.0
    _heat(axes, layers, CHANGE if change else HEAT, (1, len(layers[0])), (-most, most) if change else (None, None))
    _label(axes, DENOISING, "Attention layer")
    axes.yaxis.set_major_locator(MaxNLocator(11, integer=True, steps=ROUND, min_n_ticks=1))
    return _inlined(figure, f"{name} by attention layer and denoising step")


@styled
def scatter(label: str, across: str, up: str, x: Sequence[float], y: Sequence[float]) -> Markup:
    """One point a prompt, and a line where neither gain nor loss is."""
    figure, axes = _figure(WIDE)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.scatter(x, y, s=14, color=ACCENT, alpha=0.6, linewidths=0)
    _label(axes, across, up)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    return _inlined(figure, label)


@styled
def step_bars(values: Sequence[float], marked: Sequence[int]) -> Markup:
    """A bar a denoising step; the marked ones, counted from 0, stand out."""
    figure, axes = _figure(WIDE)
    colours = [ACCENT if step in marked else PHASES[1] for step in range(len(values))]
    axes.bar(_from_one(values), values, color=colours, width=0.72)
    _label(axes, DENOISING, "Spread of reward (std)")
    return _inlined(figure, "Spread of reward from exploring each denoising step alone")


@styled
def step_curve(name: str, values: Sequence[float], marked: Sequence[int]) -> Markup:
    """A small curve over denoising steps, to stand beside others, with a dot on the marked steps, counted from 0."""
    figure, axes = _figure(NARROW)
    axes.plot(_from_one(values), values, color=MUTED, linewidth=1.4)
    axes.plot([step + 1 for step in marked], [values[step] for step in marked], "o", color=ACCENT, markersize=5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=ROUND))
    axes.ticklabel_format(axis="y", useOffset=False)
    return _inlined(figure, f"Curve {name} over denoising steps")


@styled
def explored_histogram(phases: Sequence[Sequence[int]]) -> Markup:
    """How many rollouts explored each denoising step, stacked over successive parts of training (at most four)."""
    figure, axes = _figure(WIDE)
    below = [0] * len(phases[0])
    for counts, colour in zip(phases, PHASES, strict=False):
        axes.bar(_from_one(counts), counts, bottom=below, color=colour, width=0.72)
        below = [sum(pair) for pair in zip(below, counts, strict=True)]
    _label(axes, DENOISING, "Rollouts")
    return _inlined(figure, "Rollouts that explored each denoising step")


@styled
def rollouts_histogram(prompts_with: dict[int, int]) -> Markup:
    """How many prompts were given each number of rollouts."""
    figure, axes = _figure(WIDE)
    axes.bar(list(prompts_with), list(prompts_with.values()), color=ACCENT, width=0.72)
    axes.set_xlim(min(prompts_with) - 1.5, max(prompts_with) + 1.5)
    _label(axes, "Rollouts given to a prompt", "Prompts")
    return _inlined(figure, "How many prompts were given each number of rollouts")


@styled
def small_curve(name: str, steps: Sequence[int], values: Sequence[float], share: bool = False) -> Markup:
    """A small curve over training steps, to stand beside others; a `share` is drawn from 0 to 100 %.

    Args:
        name: Tells this curve from the page's others, in plain letters and digits; it is not shown.
        steps: Training steps.
        values: One value a step.
        share: Whether the values are shares of one.
    """
    figure, axes = _figure(NARROW)
    axes.plot(
        steps,
        values,
        color=ACCENT,
        marker="o" if len(values) < 30 else "",
        markersize=2.5,
        linewidth=1.4,
        clip_on=False,
    )
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=ROUND, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=ROUND))
    axes.ticklabel_format(axis="y", useOffset=False)
    if share:
        _as_share(axes)
    return _inlined(figure, f"Curve {name} over training")


def moving_average(values: Sequence[float]) -> list[float]:
    """The mean over a window of about a tenth of the values around each, as much of it as there is at the ends."""
    reach = len(values) // 20 + 1
    return [_mean(values[max(0, index - reach) : index + reach + 1]) for index in range(len(values))]


def chunked(values: Sequence[T], most: int) -> list[Sequence[T]]:
    """Cuts a sequence into at most `most` successive parts whose lengths differ by one at most."""
    parts = min(most, len(values))
    edges = [len(values) * part // parts for part in range(parts + 1)]
    return [values[start:end] for start, end in pairwise(edges)]


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _heat(
    axes: Axes,
    rows: Sequence[Sequence[float]],
    colours: Sequence[str],
    across: tuple[int, int],
    limits: tuple[float | None, float | None] = (None, None),
) -> None:
    """Numbers as colours, a row a line from 1 down, a column a number from the first to the last of `across`."""
    axes.imshow(
        rows,
        cmap=LinearSegmentedColormap.from_list("heat", colours),
        aspect="auto",
        interpolation="none",
        extent=(across[0] - 0.5, across[1] + 0.5, len(rows) + 0.5, 0.5),
        vmin=limits[0],
        vmax=limits[1],
    )
    axes.grid(False)


def _label(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.xaxis.set_major_locator(MaxNLocator(11, integer=True, steps=ROUND, min_n_ticks=1))


def _as_share(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def _inlined(figure: Figure, label: str) -> Markup:
    """The figure as an `<svg>` element: nothing but the drawing, in the page's colours, with ids of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)
    svg = _with_own_ids(svg, prefix=re.sub(r"\W+", "-", label.lower()))
    return Markup(re.sub("|".join(VARIABLES), lambda colour: f"var({VARIABLES[colour[0]]})", svg).strip())


def _with_own_ids(svg: str, prefix: str) -> str:
    """Drops the ids that nothing refers to, and makes the others differ from those of the page's other figures."""
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)


def _from_one(values: Sequence[float]) -> range:
    return range(1, len(values) + 1)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _mean_columns(rows: Sequence[Sequence[float]]) -> list[float]:
    return [_mean(column) for column in zip(*rows, strict=True)]
