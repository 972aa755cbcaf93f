"""`analysis.json` and `analysis.html`: what `aegpo.analysis` measured, as numbers and as one page without a network."""

import json
from pathlib import Path
from typing import Any

from aegpo import disk
from aegpo.config import Config, reward_label
from aegpo.report.html import rendered

SHOWN = 8  # prompts at either end of the ranking
SIGNALS = {"delta_entropy": "Change of entropy", "reward": "Mean reward", "reward_std": "Spread of reward"}
READINGS = {
    "entropy": "H(t)",
    "entropy_to_text": "H(t), image to text",
    "entropy_times_noise": "H(t) × policy noise",
    "delta_entropy": "|ΔH(t)|",
    "policy_noise": "Policy noise",
}


def write_analysis(folder: Path, config: Config, name: str, measured: dict[str, Any]) -> Path:
    """Write both files, and return the page's path. The same numbers give the same bytes.

    Args:
        folder: where to, which exists.
        config: what it was measured with.
        name: of the run or the model.
        measured: what `aegpo.analysis.analyze` returned.
    """
    about = {
        "name": name,
        "model": config.model.path,
        "reward": reward_label(config.reward),
        "prompt_file": config.prompts.eval,
        "seed": config.seed,
        "steps": config.sampler.steps,
        "sampler": config.sampler.kind,
        "guidance": config.sampler.guidance,
        "probe": {key: getattr(config.probe, key) for key in ("queries", "keys", "layers", "rows", "normalise")},
    }
    numbers = about | measured
    disk.write(folder / "analysis.json", (json.dumps(numbers, indent=1, ensure_ascii=False) + "\n").encode())
    disk.write(folder / "analysis.html", _page(numbers).encode())
    return folder / "analysis.html"


def from_one(steps: list[int]) -> str:
    """Denoising steps as people count them, the noisiest being 1."""
    return ", ".join(str(step + 1) for step in steps)


def _page(numbers: dict[str, Any]) -> str:
    return rendered(
        "analysis",
        numbers=numbers,
        facts=_facts(numbers),
        signals=SIGNALS,
        gains=_gains(numbers),
        ranking=_ranking(numbers),
        curves=_curves(numbers["checkpoints"]),
        steps=_steps(numbers),
        layers=_layers(numbers["entropy"]),
    )


def _facts(numbers: dict[str, Any]) -> dict[str, Any]:
    probe = numbers["probe"]
    return {
        "Model": numbers["model"],
        "Reward": numbers["reward"],
        "Prompts": f"{len(numbers['prompts'])} ({numbers['prompt_file']})",
        "Images a prompt": numbers["images"],
        "Sampler": numbers["sampler"],
        "Denoising steps": numbers["steps"],
        "Guidance": numbers["guidance"],
        "Attention": f"{probe['queries']} to {probe['keys']}",
        "Seed": numbers["seed"],
    }


def _gains(numbers: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The correlations by what was gained: until the next checkpoint, and until the last."""
    return {
        title: [row for row in numbers["correlations"] if row["gain"] == gain]
        for title, gain in {"Gain to the next": "gain_to_next", "Gain to the last": "gain_to_last"}.items()
    }


def _ranking(numbers: dict[str, Any]) -> dict[str, Any] | None:
    """The prompts whose entropy changed most and least, and all of them as points."""
    from aegpo.report import plots

    if numbers["ranking"] is None:
        return None
    step, order = numbers["ranking"]["step"], numbers["ranking"]["order"]
    columns = ("delta_entropy", "reward", "gain_to_next")
    at = [row["step"] for row in numbers["checkpoints"]].index(step)
    row = numbers["checkpoints"][at]
    lines = [{"prompt": numbers["prompts"][i]} | {name: row[name][i] for name in columns} for i in order]
    ends = [lines] if len(lines) <= 2 * SHOWN else [lines[:SHOWN], lines[-SHOWN:]]
    points = [
        plots.scatter(f"Gain of each prompt by its {label.lower()}", label, "Gain", row[signal], row["gain_to_next"])
        for signal, label in SIGNALS.items()
        if signal != "reward_std"
    ]
    return {
        "step": step,
        "next": numbers["checkpoints"][at + 1]["step"],
        "ends": ends,
        "left_out": len(lines) - sum(map(len, ends)),
        "points": points,
    }


def _curves(checkpoints: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How the policy moved and what it gained, mean over the prompts; nothing where there is one policy only."""
    from aegpo.report import plots

    if len(checkpoints) < 2:
        return []
    steps, drawn = [row["step"] for row in checkpoints], []
    for signal, label in SIGNALS.items():
        means = [sum(row[signal]) / len(row[signal]) for row in checkpoints]
        drawn.append({"label": label, "last": means[-1], "svg": plots.small_curve(signal, steps, means)})
    return drawn


def _steps(numbers: dict[str, Any]) -> dict[str, Any]:
    from aegpo.report import plots

    readings = [
        reading
        | {
            "label": READINGS[name],
            "steps": from_one(reading["chosen"]),
            "svg": plots.step_curve(name, reading["curve"], reading["chosen"]),
        }
        for name, reading in numbers["readings"].items()
    ]
    return {
        "svg": plots.step_bars(numbers["spread"], numbers["best"]),
        "best": from_one(numbers["best"]),
        "readings": readings,
    }


def _layers(entropy: dict[str, Any]) -> list[dict[str, Any]]:
    """Maps of the entropy of the newest policy, and of its change since the base where it moved."""
    from aegpo.report import plots

    base, policy = entropy["base"], entropy["policy"]
    values = [value for row in policy or base for value in row]
    title, low, high = f"At step {entropy['step']}" if policy else "Base policy", min(values), max(values)
    svg = plots.layer_map("Entropy", policy or base)
    maps = [{"title": title, "svg": svg, "colours": plots.HEAT, "low": f"{low:.3f}", "high": f"{high:.3f}"}]
    if policy:
        change = [[p - b for p, b in zip(*rows, strict=True)] for rows in zip(policy, base, strict=True)]
        most = max(abs(value) for row in change for value in row)
        svg = plots.layer_map("Change of entropy", change, change=True)
        ends = {"low": f"\N{MINUS SIGN}{most:.3f}", "high": f"+{most:.3f}"}
        maps.append({"title": "Change since the base policy", "svg": svg, "colours": plots.CHANGE, **ends})
    return maps
