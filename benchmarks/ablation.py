"""Where should the budget go? Every exploration rule and every allocation rule, at equal cost, on the embedded world.

python benchmarks/ablation.py [--json FILE] [--only WORD ...] [--seeds 0 1 2] [--workers N] [--figure FILE]

Each cell trains the embedded model until its training has cost the last of MARKS network evaluations (the probe's and
the base's among them; a backward counts as two) and judges it on the held-out prompts at the end of the step in which
it passes each mark. Cells that stand in the JSON file already are not run again, so a stopped run goes on; each says of
which commit it is.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from demo import git
from rich.console import Console
from rich.table import Table
from trial import train_to

MARKS = (12_000, 24_000)  # network evaluations x samples spent on training when it is judged
PROMPTS = 32  # of the world's training prompts, so that each is visited again and again

COMMON: dict[str, Any] = {
    "sampler": {"kind": "cps", "eta": 0.6},
    "probe": {"queries": "image", "keys": "all"},
    "model": {"lora": {"rank": 32, "alpha": 64}},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.99], "max_grad_norm": 1e-3, "updates": 2, "micro_batch": 96},
    "loss": {"clip_low": 1e-4, "clip_high": 1e-4},
    "steps": 100_000,
    "eval_every": 0,
    "eval_images": 2,
    "save_every": 100_000,
}
PLAIN = {"rule": "entropy_peaks", "k": 4, "reading": "plain"}
EXPLORATION: dict[str, dict[str, Any]] = {  # with cps, policy noise is the window: its noise falls step by step
    "all": {"exploration": {"rule": "all"}},
    "window, first 4": {"exploration": {"rule": "window", "k": 4}},
    "random 4": {"exploration": {"rule": "random", "k": 4}},
    "H(t), image to all": {"exploration": PLAIN},
    "H(t), image to text": {"exploration": PLAIN, "probe": {"keys": "text"}},
    "H(t) above the batch": {"exploration": PLAIN | {"reading": "above_batch"}},
    "H(t) x noise": {"exploration": PLAIN | {"reading": "times_noise"}},
    "H(t), local maxima": {"exploration": PLAIN | {"local_maxima": True, "min_distance": 2}},
    "|dH(t)|": {"exploration": {"rule": "delta_entropy_peaks", "k": 4}},
    "reward spread": {"exploration": {"rule": "reward_spread", "k": 4}},
}
ALLOCATION: dict[str, dict[str, Any]] = {
    name: {"allocation": {"rule": name}} for name in ("uniform", "median_split", "proportional", "reward_variance")
}


def cells(seeds: list[int]) -> Iterator[tuple[str, str, int]]:
    """Exploration, allocation and seed: all crossed, but for local maxima, which only the uniform allocation has."""
    for seed in seeds:
        for allocation in ALLOCATION:
            for exploration in EXPLORATION:
                if allocation == "uniform" or exploration != "H(t), local maxima":
                    yield exploration, allocation, seed


def train_cell(exploration: str, allocation: str, seed: int) -> dict[str, Any]:
    """One training; held-out reward and pass rate before it and at each mark."""
    found = train_to(MARKS, PROMPTS, seed, COMMON, EXPLORATION[exploration], ALLOCATION[allocation])
    return {"exploration": exploration, "allocation": allocation, "commit": git("rev-parse", "HEAD")} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="cells whose name holds one of these words")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="draw the curves into this file")
    asked = parser.parse_args()
    results: list[dict[str, Any]] = []
    if asked.json and asked.json.exists():
        results = json.loads(asked.json.read_text())["results"]["cells"]
    done = {(row["exploration"], row["allocation"], row["seed"]) for row in results}
    wanted = [
        cell
        for cell in cells(asked.seeds)
        if cell not in done and (not asked.only or any(word in " / ".join(cell[:2]) for word in asked.only))
    ]
    about = {
        "commit": git("rev-parse", "HEAD"),
        "changed": git("status", "--porcelain", "."),
        "versions": {name: version(name) for name in ("aegpo", "torch", "diffusers", "peft")},
        "settings": {
            "marks": MARKS,
            "prompts": PROMPTS,
            "common": COMMON,
            "exploration": EXPLORATION,
            "allocation": ALLOCATION,
        },
    }
    with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train_cell, *cell) for cell in wanted]):
            row = future.result()
            results.append(row)
            first, last = row["curve"][0], row["curve"][-1]
            print(
                f"{row['exploration']:<22}{row['allocation']:<16} seed {row['seed']}: "
                f"{first['reward']:.3f} -> {last['reward']:.3f}, {first['pass']:.1%} -> {last['pass']:.1%} "
                f"({last['forwards']:,} forwards, {row['seconds']:.0f} s)",
                flush=True,
            )
            if asked.json:
                aside = asked.json.with_suffix(".partial")
                aside.write_text(json.dumps(about | {"results": {"cells": results}}, indent=1) + "\n")
                aside.replace(asked.json)
    Console(width=150).print(table(results))
    if asked.figure:
        draw(results, asked.figure)


def gains(results: list[dict[str, Any]], **where: str) -> np.ndarray:
    """Gain in held-out reward at each mark, (seeds, marks): each seed's mean over its runs that are so.

    Runs of one seed share their first weights and the noise they are judged with, so seeds are what is independent.
    """
    rows = [row for row in results if all(row[name] == value for name, value in where.items())]
    by_seed = {seed: [row for row in rows if row["seed"] == seed] for seed in dict.fromkeys(r["seed"] for r in rows)}
    return np.array([np.mean([gain(row) for row in same], axis=0) for same in by_seed.values()])


def gain(row: dict[str, Any]) -> list[float]:
    return [point["reward"] - row["curve"][0]["reward"] for point in row["curve"][1:]]


def written(gain: np.ndarray) -> str:
    """Mean over seeds at the last mark and its standard error, in hundredths."""
    if len(gain) < 2:
        return ""
    last = 100 * gain[:, -1]
    return f"{last.mean():+.1f} ± {last.std(ddof=1) / len(last) ** 0.5:.1f}"


def table(results: list[dict[str, Any]]) -> Table:
    """Gain in hundredths at the last mark, for each pair of rules, and over a whole row or column."""
    shown = Table("exploration", *ALLOCATION, "all", "evaluations", "explored steps, %")
    for exploration in EXPLORATION:
        rows = [row for row in results if row["exploration"] == exploration]
        if rows:
            cells = (written(gains(rows, allocation=name)) for name in ALLOCATION)
            spent = np.mean([row["curve"][-1]["forwards"] for row in rows])
            shares = " ".join(f"{share:.0f}" for share in 100 * np.mean([row["explored"] for row in rows], axis=0))
            shown.add_row(exploration, *cells, written(gains(rows)), f"{spent:,.0f}", shares)
    for label, among in (("all that are crossed", crossed(results)), ("those that learn", learning(results))):
        totals = (written(gains(among, allocation=name)) for name in ALLOCATION)
        shown.add_row(label, *totals, written(gains(among)), "", "")
    return shown


def crossed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the exploration that one allocation alone has."""
    return [row for row in rows if row["exploration"] != "H(t), local maxima"]


def learning(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the explorations that gain two hundredths or more: where nothing is learned, no allocation can show."""
    learn = {
        name for name in EXPLORATION if (found := gains(rows, exploration=name)).size and found[:, -1].mean() > 0.02
    }
    return [row for row in rows if row["exploration"] in learn]


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Reward against network evaluations, with the seeds' standard error: by exploration, and by allocation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    rows = crossed(results)
    panels = (
        (axes[0], "exploration", rows, "by exploration, over all allocations"),
        (axes[1], "allocation", learning(rows), "by allocation, over the explorations that learn"),
    )
    for axis, kind, among, title in panels:
        for name in dict.fromkeys(row[kind] for row in among):
            gained = np.insert(gains(among, **{kind: name}), 0, 0.0, axis=1)
            mean, error = gained.mean(0), gained.std(0, ddof=1) / len(gained) ** 0.5
            spent = np.mean([[p["forwards"] for p in row["curve"]] for row in among if row[kind] == name], axis=0)
            (line,) = axis.plot(spent, mean, marker="o", markersize=3, label=name)
            axis.fill_between(spent, mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="network evaluations spent on training")
        axis.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("gain in held-out reward")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
