"""Which algorithm learns fastest on the embedded world? Every one by name, at equal cost, each at its own best rate.

python benchmarks/family.py [--json FILE] [--only NAME ...] [--explain] [--workers N] [--figure FILE]

First every algorithm trains all weights of the embedded model at each of the learning RATES, with the seed SWEEP, until
that has cost the last of SHORT network evaluations (the probe's and the base's among them; a backward counts as two);
the rate with the highest held-out reward then is its own. With that it trains until the last of LONG, with each of
SEEDS, none of which had a part in the choice. Runs that stand in the JSON file already are not run again, so a stopped
one goes on; each says of which commit it is.

With --explain, those that do not learn train under the changes of EXPLAINED instead, each at its own rate: what keeps
them from it.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterable
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
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
SWEEP, SEEDS = 0, (1, 2, 3)
COMMON: dict[str, Any] = {
    "model": {"train": "full"},
    "optimizer": {"betas": [0.9, 0.99], "micro_batch": 96},
    "steps": 100_000,
    "eval_every": 0,
    "eval_images": 2,
    "save_every": 100_000,
}


EXPLAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "dance-grpo as it is": ("dance-grpo", {}),
    "dance-grpo, noise before sigma .6 only": ("dance-grpo", {"exploration": {"until": 6}}),
    "dance-grpo, noise in the first 4 steps": ("dance-grpo", {"exploration": {"rule": "window", "k": 4}}),
    "dance-grpo, the same, eta .9": (
        "dance-grpo",
        {"exploration": {"rule": "window", "k": 4}, "sampler": {"eta": 0.9}},
    ),
    "dance-grpo, the same, eta 2": (
        "dance-grpo",
        {"exploration": {"rule": "window", "k": 4}, "sampler": {"eta": 2.0}},
    ),
    "ddpo as it is": ("ddpo", {}),
    "ddpo, the last but one step too": ("ddpo", {"exploration": {"until": 0}}),
}


def train_one(algorithm: str, rate: float, seed: int) -> dict[str, Any]:
    marks = SHORT if seed == SWEEP else LONG
    found = train_to(marks, PROMPTS, seed, {"algorithm": algorithm}, COMMON, {"optimizer": {"lr": rate}})
    return {"algorithm": algorithm, "rate": rate, "commit": git("rev-parse", "HEAD")} | found


def explain_one(name: str, rate: float, seed: int) -> dict[str, Any]:
    algorithm, change = EXPLAINED[name]
    found = train_to(SHORT, PROMPTS, seed, {"algorithm": algorithm}, COMMON, change, {"optimizer": {"lr": rate}})
    return {"variant": name, "rate": rate, "commit": git("rev-parse", "HEAD")} | found


def explanation(explained: list[dict[str, Any]]) -> Table:
    """Beside the gain, what the rollouts of the first and of the last three training steps scored."""
    shown = Table("variant", "rate", "gain, noiseless", "rollouts at first", "rollouts at last", "training steps")
    for name in EXPLAINED:
        own = [run for run in explained if run["variant"] == name]
        if own:
            gain = 100 * np.mean([gains(run)[-1] for run in own])
            first, last = (np.mean([run["drawn"][part] for run in own]) for part in (slice(0, 3), slice(-3, None)))
            steps = np.mean([len(run["drawn"]) for run in own])
            shown.add_row(name, f"{own[0]['rate']:g}", f"{gain:+.1f}", f"{first:.3f}", f"{last:.3f}", f"{steps:.0f}")
    return shown


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
    """An algorithm's long runs at its own rate."""
    chosen = (name, best_rates(runs).get(name))
    return [run for run in runs if (run["algorithm"], run["rate"]) == chosen and run["seed"] != SWEEP]


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
    parser.add_argument("--explain", action="store_true", help="train those that do not learn under changes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="draw the curves into this file")
    asked = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {"runs": [], "explained": []}
    if asked.json and asked.json.exists():
        results |= json.loads(asked.json.read_text())["results"]
    runs, explained = results["runs"], results["explained"]
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

    def run_all(train: Callable[..., dict[str, Any]], into: list[dict[str, Any]], wanted: Iterable[Any]) -> None:
        done = {(run.get("algorithm", run.get("variant")), run["rate"], run["seed"]) for run in into}
        with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(train, *one) for one in wanted if one not in done]):
                run = future.result()
                into.append(run)
                first, last = run["curve"][0], run["curve"][-1]
                print(
                    f"{run.get('algorithm', run.get('variant'))}, rate {run['rate']:g}, seed {run['seed']}: "
                    f"{first['reward']:.3f} -> {last['reward']:.3f} in {last['steps']} steps "
                    f"({last['forwards']:,} evaluations, {last['seconds']:.0f} s)",
                    flush=True,
                )
                if asked.json:
                    aside = asked.json.with_suffix(".partial")
                    aside.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
                    aside.replace(asked.json)

    if asked.explain:
        rates = best_rates(runs)
        missing = {algorithm for algorithm, _ in EXPLAINED.values()} - set(rates)
        if missing:
            parser.error(f"no rate is chosen yet for {', '.join(sorted(missing))}; run without --explain first")
        wanted = [(name, rates[algorithm], seed) for seed in SEEDS for name, (algorithm, _) in EXPLAINED.items()]
        run_all(explain_one, explained, wanted)
        Console(width=160).print(explanation(explained))
        return
    run_all(train_one, runs, ((name, rate, SWEEP) for name in asked.only for rate in RATES))
    best = best_rates(runs)
    run_all(train_one, runs, ((name, best[name], seed) for seed in SEEDS for name in asked.only))
    Console(width=160).print(table(runs))
    if asked.figure:
        draw(runs, asked.figure)


if __name__ == "__main__":
    main()
