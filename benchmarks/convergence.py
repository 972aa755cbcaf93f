"""Network evaluations, rollouts and seconds to a better model: published methods, alone and with AEGPO, and ours.

python benchmarks/convergence.py [--json FILE] [--part hosts|composition ...] [--only METHOD ...] [--figure FILE]
    [--workers N] [--seconds S] [--micro-batch M]

Every method trains all weights of the embedded model on the same 32 prompts. First its learning rate is chosen: with
the seed SWEEP, at each of RATES, until SHORT network evaluations (the probe's and the base's among them; a backward
counts as two) are spent; the one with the highest held-out reward then (AEGPO on a method of finished images, and on
MixGRPO, takes its host's, and three seeds). With that it trains for each of SEEDS, and is judged at the marks: the same
144 held-out prompts, four images each, from the same noise for all. Flow-GRPO trains LONG, in its sweep too. What is
judged is its published average of the weights, which lags far behind in so few steps; so it trains again, with an
average as short as AEGPO's has here. The highest point of the two mean curves is the target that all are measured by.
AEGPO trains a sixth of LONG, in its sweep too.

A run's evaluations to the target are those of the first mark at which it is reached. Beside the median of the seeds
stands what 2,000 bootstrap samples of the seeds leave in the middle 90 %. At the last mark 96 prompts are drawn too
whose kinds no prompt of the training has (a colour beside a place or a number), and the held-out ones are judged once
more by a stricter verifier: a policy that had learned to please the judge would fall behind there.

The part `composition` takes ours apart, one choice at a time; `pace` trains some with nothing beside them, for the
seconds that an evaluation takes. Runs that stand in the JSON file already are not run again, so a stopped one goes on;
each says of which commit and on what device it is.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo import git
from rich.console import Console
from rich.table import Table
from trial import base_under, train_to

from aegpo.algorithms import merge

RATES, SWEEP, SEEDS = (1e-4, 2e-4, 4e-4), 0, (1, 2, 3, 4, 5)  # within what family.py's wider sweep found best
SHORT, LONG = 24_000, 384_000
SWEPT = {"flow-grpo": LONG, "aegpo": LONG // 6, "aegpo-fast": 12_000}  # those whose sweep is not SHORT
EARLY = (1_000, 2_000, 3_000, 4_000, 5_000, 6_000, 7_000, 8_000, 10_000, 12_000)
BRIEFER = (2_000, 4_000, 8_000)
SPARSE = (4_000, 8_000, 12_000, 16_000, 20_000, 24_000)
MARKS = (*EARLY[1::2], 12_000, 16_000, 20_000, 24_000, 28_000, 32_000, 36_000, 40_000, 44_000, 48_000)
FAR = (*(i * LONG // 64 for i in range(1, 9)), *(i * LONG // 32 for i in range(5, 33)))
PROMPTS = 32  # of the world's training prompts
COMMON: dict[str, Any] = {
    "model": {"train": "full", "dtype": "float32"},
    "optimizer": {"betas": [0.9, 0.99], "micro_batch": 96},
    "steps": 100_000,
    "eval_every": 0,
    "eval_images": 4,
    "eval_steps": 10,
    "save_every": 100_000,
}
NOISY = ("flow-grpo", "tempflow-grpo", "branch-grpo", "dance-grpo", "mix-grpo")  # the longest runs first
MATCHING = ("diffusion-nft", "awm", "dgpo", "ram")
OURS: dict[str, Any] = {
    "algorithm": "aegpo-fast",
    "prompts_per_step": 8,
    "rollouts_per_step": 32,
    "allocation": {"low": 2, "high": 6},
    "sampler": {"steps": 6},
}


def with_aegpo(host: str) -> dict[str, Any]:
    """A host's own choices, but AEGPO's allocation and four steps: those that spread rewards most, or random levels."""
    explored = {"rule": "reward_spread", "k": 4} if host in NOISY else {"rule": "random"}
    return {"algorithm": host, "allocation": {"rule": "median_split"}, "exploration": explored}


METHODS: dict[str, dict[str, Any]] = {}
for host in (*NOISY, *MATCHING):
    METHODS |= {host: {"algorithm": host}, f"aegpo on {host}": with_aegpo(host)}
GUIDED = "aegpo on flow-grpo, guided reference"
METHODS[GUIDED] = merge(
    with_aegpo("flow-grpo"),
    {"loss": {"kl": 1.0, "kl_of": "velocity", "reference_guidance": 3.0}, "optimizer": {"ema": 0.0}},
)
ALONE = "flow-grpo, guided reference"
METHODS[ALONE] = {"algorithm": "flow-grpo", "loss": METHODS[GUIDED]["loss"], "optimizer": {"ema": 0.0}}
AVERAGED = "flow-grpo, averaged at every step"
METHODS[AVERAGED] = {"algorithm": "flow-grpo", "optimizer": {"ema_every": 1}}
FIRST = {name: METHODS.pop(name) for name in ("flow-grpo", AVERAGED, "aegpo on flow-grpo")}
AEGPO = {"algorithm": "aegpo", "optimizer": {"keep_graphs": True, "ema": 0.9, "ema_every": 1}}
METHODS = FIRST | {"aegpo": AEGPO, "aegpo-fast": OURS} | METHODS

COMPOSITION: dict[str, dict[str, Any]] = {
    "aegpo-fast": {},
    "uniform allocation": {"allocation": {"rule": "uniform"}},
    "entropy over all keys": {"probe": {"keys": "all"}},
    "allocation by reward variance": {"allocation": {"rule": "reward_variance"}},
    "levels by the change of entropy": {"exploration": {"rule": "delta_entropy_peaks"}},
    "reference without guidance": {"loss": {"reference_guidance": None}},
    "no reward: guidance distilled alone": {"loss": {"beta": 1e-6}},
    "no reward, to the end": {"loss": {"beta": 1e-6}},
    "ten Euler steps": {"sampler": {"steps": 10, "solver": "euler"}},
    "four levels a rollout": {"exploration": {"k": 4}},
    "96 rollouts a step": {"rollouts_per_step": 96, "allocation": {"low": 8, "high": 16}},
}


def marks_of(name: str) -> tuple[int, ...]:
    if name == "flow-grpo":
        return FAR
    if name == AVERAGED:
        return tuple(range(LONG // 16, LONG * 3 // 4 + 1, LONG // 16))
    if name == "aegpo on flow-grpo":
        return tuple(mark for mark in FAR if mark <= LONG // 4)
    if name == "aegpo":
        return tuple(range(4_000, LONG // 6 + 1, 4_000))
    if name == "aegpo-fast":
        return (*EARLY, 16_000, 24_000)
    return SPARSE if is_brief(name) else MARKS


def is_brief(name: str) -> bool:
    """Whether a method's runs end at SHORT and are not judged in other ways: those that learn fast."""
    return name in (GUIDED, ALONE, "aegpo on mix-grpo") or any(name.startswith((h, f"aegpo on {h}")) for h in MATCHING)


def briefer(name: str) -> tuple[int, ...]:
    """Marks of a part of ours: where the reward begins to count shows late."""
    return (*BRIEFER, 16_000, 24_000) if name == "no reward, to the end" else BRIEFER


def whose_rate(name: str) -> str:
    """The method whose sweep chooses a method's rate: its own, or another's, and then it has fewer seeds."""
    others = {GUIDED: GUIDED, ALONE: GUIDED, AVERAGED: "flow-grpo"}
    return others.get(name) or (name.removeprefix("aegpo on ") if is_brief(name) else name)


def train_one(part: str, name: str, rate: float, seed: int, micro_batch: int) -> dict[str, Any]:
    """One run; of the sweep, it is judged at its end alone."""
    layers = [OURS, COMPOSITION[name]] if part == "composition" else [METHODS[name]]
    short = (SWEPT.get(name, SHORT),)
    marks = short if seed == SWEEP else marks_of(name) if part == "hosts" else briefer(name)
    marks = (SHORT // 2,) if part == "pace" else marks
    rest = {"optimizer": {"lr": rate, "micro_batch": micro_batch}}
    guard = part == "hosts" and seed != SWEEP and not is_brief(name)
    found = train_to(marks, PROMPTS, seed, COMMON, *layers, rest, guard=guard)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"part": part, "method": name, "rate": rate, "commit": os.environ["AEGPO_COMMIT"], "device": device}
    return about | found


# ---------------------------------------------------------------- what the runs say


def best_rates(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of each method that was swept at every rate, the one with the highest reward at the sweep's end."""
    found = {}
    for name in METHODS:
        ends = {r["rate"]: r["curve"][-1]["reward"] for r in runs if (r["method"], r["seed"]) == (name, SWEEP)}
        if set(ends) == set(RATES):
            found[name] = max(ends, key=ends.__getitem__)
    return found


def finals(runs: list[dict[str, Any]], part: str, name: str) -> list[dict[str, Any]]:
    own = [r for r in runs if (r["part"], r["method"]) == (part, name) and r["seed"] != SWEEP]
    return sorted(own, key=lambda r: r["seed"])


def target(runs: list[dict[str, Any]]) -> float:
    """The highest point of Flow-GRPO's mean curves, with its published average of the weights and with a short one."""
    found = (finals(runs, "hosts", name) for name in ("flow-grpo", AVERAGED))
    curves = [[[point["reward"] for point in run["curve"]] for run in own] for own in found if own]
    return max(float(np.max(np.mean(curve, axis=0))) for curve in curves)


def to_target(run: dict[str, Any], reward: float, what: str) -> float | None:
    """Forwards, rollouts or seconds at the first mark that reaches the reward; none if none does."""
    return next((point[what] for point in run["curve"][1:] if point["reward"] >= reward), None)


def median_of_seeds(values: list[float | None]) -> tuple[float, float, float]:
    """The median, and the middle 90 % of the medians of 2,000 bootstrap samples; what never came is infinite."""
    spent, rng = np.array([np.inf if value is None else value for value in values]), np.random.default_rng(0)
    low, high = np.sort(np.median(rng.choice(spent, (2000, len(spent))), axis=1))[[100, 1899]]
    return float(np.median(spent)), float(low), float(high)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For each method that has runs: its rate, what it takes to the targets, and where it ends."""
    if not finals(runs, "hosts", "flow-grpo"):
        return {}
    reward = target(runs)
    base = finals(runs, "hosts", "flow-grpo")[0]["curve"][0]["reward"]
    half = base + (reward - base) / 2
    methods = {}
    for part, names in (("hosts", METHODS), ("composition", COMPOSITION)):
        for name in names:
            if own := finals(runs, part, name):
                ends = [run["curve"][-1] for run in own]
                methods[name if part == "hosts" else f"{part}: {name}"] = {
                    "rate": own[0]["rate"],
                    "seeds": [run["seed"] for run in own],
                    **{f"{what}_to_target": [to_target(r, reward, what) for r in own] for what in SPENT},
                    **{f"{what}_to_half": [to_target(r, half, what) for r in own] for what in SPENT},
                    "reward_at_end": [end["reward"] for end in ends],
                    "pass_at_end": [end["pass"] for end in ends],
                    **{
                        f"{way}_gain": [after - before for before, after in (r["guard"][way] for r in own)]
                        for way in ("unseen", "strict")
                        if own[0]["guard"][way]
                    },
                }
    paces = {}
    for run in runs:
        if run["part"] == "pace":
            paces[run["method"]] = 1000 * run["curve"][-1]["seconds"] / run["curve"][-1]["forwards"]
    return {"target": reward, "half": half, "base": base, "seconds_per_1000_forwards": paces, "methods": methods}


SPENT = ("forwards", "rollouts", "seconds")
PARTS = ("hosts", "composition", "pace")
PACED = ("flow-grpo", "aegpo", GUIDED, "aegpo-fast")


def written(values: list[float | None]) -> str:
    if values == [None] * len(values):
        return "never"
    found = (f"{value:,.0f}" if np.isfinite(value) else "never" for value in median_of_seeds(values))
    middle, low, high = found
    return f"{middle} ({low}..{high})"


def table(about: dict[str, Any], runs: list[dict[str, Any]]) -> Table:
    """Medians of the seeds and their intervals, and gains at the end in hundredths, mean and standard error."""
    heads = (
        "forwards to half",
        "forwards to target",
        "rollouts",
        "seconds",
        "gain at the end",
        "pass",
        "unseen",
        "strict",
    )
    shown = Table("method", "rate", *heads, "seeds", "after")
    for name, row in about["methods"].items():
        ends = ("reward_at_end", "pass_at_end", "unseen_gain", "strict_gain")
        gains = (100 * np.array(row.get(key, [np.nan])) for key in ends)
        part = "composition" if name.startswith("composition") else "hosts"
        first = finals(runs, part, name.removeprefix("composition: "))[0]
        starts = (100 * first["curve"][0]["reward"], 100 * first["curve"][0]["pass"], 0.0, 0.0)
        cells = [
            f"{(gain - start).mean():+.1f} ± {gain.std(ddof=1) / len(gain) ** 0.5:.1f}" if len(gain) > 1 else ""
            for gain, start in zip(gains, starts, strict=True)
        ]
        spent = [row["forwards_to_half"], *(row[f"{what}_to_target"] for what in SPENT)]
        after = f"{first['curve'][-1]['forwards']:,}"
        shown.add_row(name, f"{row['rate']:g}", *map(written, spent), *cells, str(len(row["seeds"])), after)
    return shown


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Mean held-out reward of the seeds against evaluations, rollouts and seconds, all on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(17, 5), sharey=True, layout="constrained")
    hosts, ours = [name for name in METHODS if finals(runs, "hosts", name)], ("aegpo", "aegpo-fast")
    for name in hosts:
        host = "flow-grpo" if name == "aegpo" else name.removeprefix("aegpo on ").split(",")[0]
        color = "black" if name == "aegpo-fast" else f"C{(*NOISY, *MATCHING).index(host)}"
        color = "C9" if name in (GUIDED, ALONE) else color
        style = ":" if name == AVERAGED else "-" if name.startswith("aegpo") else "--"
        own = finals(runs, "hosts", name)
        timed = any(run["device"] != "cpu" for run in own)  # a CPU's seconds are not set beside a GPU's
        for axis, what in zip(axes if timed else axes[:2], SPENT, strict=False):
            spent = np.mean([[point[what] for point in run["curve"][1:]] for run in own], axis=0)
            gained = np.mean([[point["reward"] for point in run["curve"][1:]] for run in own], axis=0)
            axis.plot(spent, gained, label=name, color=color, linestyle=style, linewidth=2.4 if name in ours else 1.2)
    for axis, what in zip(axes, ("network evaluations", "rollouts", "seconds"), strict=True):
        axis.set(xscale="log", xlabel=f"{what} spent on training")
        axis.axhline(target(runs), color="grey", linewidth=0.8)
    axes[0].set_ylabel("held-out reward")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right center")
    figure.savefig(path, dpi=130)


# ---------------------------------------------------------------- running them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these alone")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--micro-batch", type=int, default=96, help="rows in a forward; results do not depend on it")
    parser.add_argument("--figure", type=Path, help="draw the curves into this file")
    asked = parser.parse_args()
    began, runs, guided = time.monotonic(), [], None
    if asked.json and asked.json.exists():
        before = json.loads(asked.json.read_text())["results"]
        runs, guided = before["runs"], before.get("base_under_guidance")
    commit = os.environ.setdefault("AEGPO_COMMIT", git("rev-parse", "HEAD"))
    about = {
        "commit": commit,
        "changed": git("status", "--porcelain", "."),
        "versions": {name: version(name) for name in ("aegpo", "torch", "diffusers", "peft")},
        "settings": {
            "common": COMMON,
            "methods": METHODS,
            "composition": COMPOSITION,
            "rates": RATES,
            "seeds": SEEDS,
            "prompts": PROMPTS,
        },
    }

    def run_all(wanted: Iterable[Callable[[], tuple[str, str, float, int] | None]]) -> None:
        """Run what is wanted; each is made when its turn comes, or comes again later if it is none yet."""
        waiting, live = list(wanted), set()
        with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as pool:
            while waiting or live:
                started = False
                if time.monotonic() - began > asked.seconds:
                    waiting = []
                for make in list(waiting):
                    if len(live) < asked.workers and (one := make()) is not None:
                        waiting.remove(make)
                        if one not in {(r["part"], r["method"], r["rate"], r["seed"]) for r in runs}:
                            live.add(pool.submit(train_one, *one, asked.micro_batch))
                        started = True
                if not live and not started:
                    break  # what waits is for a sweep that is not asked for
                done, live = wait(live, return_when=FIRST_COMPLETED) if live else (set(), live)
                for future in done:
                    run = future.result()
                    runs.append(run)
                    first, last = run["curve"][0], run["curve"][-1]
                    print(
                        f"{time.monotonic() - began:4.0f} s: {run['method']}, {run['rate']:g}, seed {run['seed']}: "
                        f"{first['reward']:.3f} -> {last['reward']:.3f} in {last['steps']} steps "
                        f"({last['forwards']:,} evaluations, {run['seconds']:.0f} s)",
                        flush=True,
                    )
                    keep()

    def keep() -> None:
        if asked.json:
            aside = asked.json.with_suffix(".partial")
            results = summary(runs) | {"base_under_guidance": guided, "runs": runs}
            aside.write_text(json.dumps(about | {"results": results}) + "\n")
            aside.replace(asked.json)

    def at_best(name: str, seed: int) -> tuple[str, str, float, int] | None:
        rate = best_rates(runs).get(whose_rate(name))
        return None if rate is None else ("hosts", name, rate, seed)

    def ours(name: str, seed: int) -> tuple[str, str, float, int] | None:
        rate = best_rates(runs).get("aegpo-fast")
        return None if rate is None else ("composition", name, rate, seed)

    hosts = [name for name in METHODS if not asked.only or name in asked.only]
    wanted: list[Callable[[], tuple[str, str, float, int] | None]] = []
    if "hosts" in asked.part:
        for name in hosts:
            if own := whose_rate(name) == name:
                wanted += [lambda n=name, r=rate: ("hosts", n, r, SWEEP) for rate in RATES]
            seeds = SEEDS if own else SEEDS[:4] if name == AVERAGED else SEEDS[:3]
            wanted += [lambda n=name, s=seed: at_best(n, s) for seed in seeds]
    if "composition" in asked.part:
        wanted += [lambda n=name, s=seed: ours(n, s) for seed in SEEDS[:3] for name in COMPOSITION]
    run_all(wanted)
    if "pace" in asked.part:  # with nothing beside it
        asked.workers, guided = 1, base_under(3.0, COMMON)
        for name in PACED:
            if name in (rates := best_rates(runs)):
                run_all([lambda n=name, r=rates[name]: ("pace", n, r, SEEDS[0])])
    keep()
    if found := summary(runs):
        print(f"target {found['target']:.4f}, halfway {found['half']:.4f}, base {found['base']:.4f}")
        if guided:
            print(f"the base under guidance 3: {guided:.4f}")
        Console(width=200).print(table(found, runs))
        for name, pace in found["seconds_per_1000_forwards"].items():
            print(f"{name}: {pace:.2f} s for 1,000 evaluations, alone on the machine")
        if asked.figure:
            draw(runs, asked.figure)


if __name__ == "__main__":
    main()
