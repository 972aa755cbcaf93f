"""The README's claim: what `make demo` gains, in each of three seeds.

python benchmarks/demo.py [--json FILE] [--seeds 0 1 2]
"""

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from aegpo.build import run
from aegpo.config import load_yaml, resolve

RECIPE = Path(__file__).parents[1] / "src" / "aegpo" / "recipes" / "world.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    code = {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", ".")}  # as it is when it begins
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in asked.seeds:
            config = resolve(load_yaml(RECIPE), {"seed": seed, "output_dir": f"{folder}/{seed}"})
            began = time.monotonic()
            run(config)
            lines = [json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()]
            first, last = lines[0], lines[-1]
            seeds.append(
                {
                    "seed": seed,
                    "reward_before": first["eval/reward_mean"],
                    "reward_after": last["eval/reward_mean"],
                    "pass_before": first["eval/pass_rate"],
                    "pass_after": last["eval/pass_rate"],
                    "forwards": last["forwards"],
                    "seconds": last["seconds"],
                    "seconds_with_loading_and_report": time.monotonic() - began,
                }
            )
    table = Table("seed", "reward before", "after", "pass before", "after", "forwards", "seconds")
    for row in seeds:
        reward = (f"{row['reward_before']:.3f}", f"{row['reward_after']:.3f}")
        passed = (f"{row['pass_before']:.1%}", f"{row['pass_after']:.1%}")
        table.add_row(str(row["seed"]), *reward, *passed, f"{row['forwards']:,}", f"{row['seconds']:.0f}")
    Console().print(table)
    if asked.json:
        asked.json.write_text(
            json.dumps(
                code
                | {
                    "versions": {name: version(name) for name in ("aegpo", "torch", "diffusers", "peft")},
                    "settings": asdict(resolve(load_yaml(RECIPE))),
                    "results": {"seeds": seeds},
                },
                indent=1,
            )
            + "\n"
        )


def git(*words: str) -> str:
    """What git says of the package's source."""
    answer = subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=RECIPE.parents[1])
    return answer.stdout.strip()


if __name__ == "__main__":
    main()
