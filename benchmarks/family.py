"""Which algorithm learns fastest on the embedded world? Every one by name, at equal cost, each at its own best rate.

python benchmarks/family.py [--json FILE] [--only NAME ...] [--workers N] [--figure FILE]

First every algorithm trains all weights of the embedded model at each of the learning RATES, with the seed SWEEP, until
that has cost the last of SHORT network evaluations (the probe's and the base's among them; a backward counts as two);
the rate with the highest held-out reward then is its own. With that it trains until the last of LONG, with each of
SEEDS, none of which had a part in the choice. Runs that stand in the JSON file already are not run again, so a stopped
one goes on; each says of which commit it is.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from demo import git
from rich.console import Console
from rich.table import Table
from trial import train_to

from aegpo.algorithms import ALGORITHMS

SHORT, LONG = (24_000,), (12_000, 24_000, 36_000, 48_000)
PROMPTS = 32  # of the world's training prompts
RATES = (1e-4, 3e-4, 1e-3)
SWEEP, SEEDS = 0, (1, 2)
COMMON: dict[str, Any] = {
    "model": {"train": "full"},
    "optimizer": {"betas": [0.9, 0.99], "micro_batch": 96},
    "steps": 100_000,
    "eval_every": 0,
    "eval_images": 2,
    "save_every": 100_000,
}


def train_one(algorithm: str, rate: float, seed: int) -> dict[str, Any]:
    marks = SHORT if seed == SWEEP else LONG
    found = train_to(marks, PROMPTS, seed, {"algorithm": algorithm}, COMMON, {"optimizer": {"lr": rate}})
    return {"algorithm": algorithm, "rate": rate, "commit": git("rev-parse", "HEAD")} | found


def best_rates(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of each algorithm that was swept at every rate, the one with the highest reward at the sweep's end."""
    swept = [run for run in runs if run["seed"] == SWEEP]
    found = {}
    for name in ALGORITHMS:
        last = {run["rate"]: run["curve"][-1]["reward"] for run in swept if run["algorithm"] == name}
        if set(last) == set(RATES):
            found[name] = max(last, key=last.__getitem__)
    return found


def gains(run: dict[str, Any]) -> np.ndarray:
    """Gain in held-out reward at each mark."""
    return np.array([point["reward"] - run["curve"][0]["reward"] for point in run["curve"][1:]])


def finals(runs: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [run for run in runs if run["algorithm"] == name and run["seed"] != SWEEP]


def table(runs: list[dict[str, Any]]) -> Table:
    """Gains in hundredths of graded reward, mean over the seeds and their standard error at the end."""
    heads = (f"{mark // 1000}k" for mark in LONG)
    shown = Table("algorithm", "rate", *heads, "pass, points", "training steps", "evaluations", "seconds", "sweep")
    rates = best_rates(runs)

    def at_the_end(name: str) -> float:
        return float(np.mean([gains(run)[-1] for run in finals(runs, name)] or [-1]))

    for name in sorted(rates, key=at_the_end, reverse=True):
        own = finals(runs, name)
        swept = (r for rate in RATES for r in runs if (r["algorithm"], r["rate"], r["seed"]) == (name, rate, SWEEP))
        sweep = " ".join(f"{100 * gains(run)[-1]:+.1f}" for run in swept)
        if not own:
            shown.add_row(name, f"{rates[name]:g}", *[""] * (len(LONG) + 4), sweep)
            continue
        curve = 100 * np.array([gains(run) for run in own])
        error = curve[:, -1].std(ddof=1) / len(own) ** 0.5 if len(own) > 1 else float("nan")
        cells = [f"{value:+.1f}" for value in curve.mean(0)]
        cells[-1] += f" ± {error:.1f}"
        ends = [run["curve"][-1] for run in own]
        passes = 100 * np.mean([end["pass"] - run["curve"][0]["pass"] for end, run in zip(ends, own, strict=True)])
        about = (f"{np.mean([end[what] for end in ends]):,.0f}" for what in ("steps", "forwards", "seconds"))
        shown.add_row(name, f"{rates[name]:g}", *cells, f"{passes:+.1f}", *about, sweep)
    return shown


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Gain in reward against network evaluations and against seconds, a line for each algorithm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    names = [name for name in ALGORITHMS if finals(runs, name)]
    names.sort(key=lambda name: -np.mean([gains(run)[-1] for run in finals(runs, name)]))
    for i, name in enumerate(names):
        own = finals(runs, name)
        mean = np.insert(np.mean([gains(run) for run in own], axis=0), 0, 0.0)
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--")[i // 10], "marker": "o", "markersize": 3}
        for axis, what in zip(axes, ("forwards", "seconds"), strict=True):
            spent = np.mean([[point[what] for point in run["curve"]] for run in own], axis=0)
            axis.plot(spent, mean, label=name, **style)
    axes[0].set(xlabel="network evaluations spent on training", ylabel="gain in held-out reward")
    axes[1].set(xlabel="seconds of training, one thread")
    axes[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS), metavar="NAME")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="draw the curves into this file")
    asked = parser.parse_args()
    runs: list[dict[str, Any]] = []
    if asked.json and asked.json.exists():
        runs = json.loads(asked.json.read_text())["results"]["runs"]
    about = {
        "commit": git("rev-parse", "HEAD"),
        "changed": git("status", "--porcelain", "."),
        "versions": {name: version(name) for name in ("aegpo", "torch", "diffusers", "peft")},
        "settings": {
            "common": COMMON,
            "short": SHORT,
            "long": LONG,
            "rates": RATES,
            "seeds": SEEDS,
            "prompts": PROMPTS,
            "algorithms": {name: algorithm.choices for name, algorithm in ALGORITHMS.items()},
        },
    }

    def run_all(wanted: Iterable[tuple[str, float, int]]) -> None:
        done = {(run["algorithm"], run["rate"], run["seed"]) for run in runs}
        with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(train_one, *one) for one in wanted if one not in done]):
                run = future.result()
                runs.append(run)
                first, last = run["curve"][0], run["curve"][-1]
                print(
                    f"{run['algorithm']:<15} rate {run['rate']:g}, seed {run['seed']}: {first['reward']:.3f} -> "
                    f"{last['reward']:.3f} in {last['steps']} steps ({last['forwards']:,} evaluations, "
                    f"{last['seconds']:.0f} s)",
                    flush=True,
                )
                if asked.json:
                    aside = asked.json.with_suffix(".partial")
                    aside.write_text(json.dumps(about | {"results": {"runs": runs}}, indent=1) + "\n")
                    aside.replace(asked.json)

    run_all((name, rate, SWEEP) for name in asked.only for rate in RATES)
    run_all((name, rate, seed) for seed in SEEDS for name, rate in best_rates(runs).items() if name in asked.only)
    Console(width=160).print(table(runs))
    if asked.figure:
        draw(runs, asked.figure)


if __name__ == "__main__":
    main()
