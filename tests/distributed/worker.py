"""Runs of the loop that the tests compare: alone, or as one of several processes, `python worker.py JOBS.json`."""

import json
import math
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from aegpo import checkpoint, models, train
from aegpo.config import dump_yaml, resolve
from aegpo.data import load_prompts
from aegpo.display import Display
from aegpo.distributed import Team
from aegpo.rewards.panel import load_panel


def run(settings, team, resume=None, poisoned=False):
    """The loop alone: `build.run` without what surrounds it; `poisoned`, with an infinite loss in step 1."""
    config = resolve(settings)
    folder = Path(config.output_dir)
    if team.is_first:
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(dump_yaml(config))
    team.wait()
    prompts, held_out = (load_prompts(getattr(config.prompts, split), split) for split in ("train", "eval"))
    model = models.load(config.model, config.seed)
    if config.model.shard and team.size > 1:
        model.shard()
    display = Display(config.steps, Console(quiet=True))
    start = checkpoint.checkpoints(folder)[-1] if resume else None
    with poison(folder) if poisoned and team.rank == team.size - 1 else nullcontext():
        train.train(config, model, prompts, held_out, load_panel(config), folder, display, start, team=team)
    team.wait()


@contextmanager
def poison(folder):
    """The losses of step 1 are infinite, and their gradients as they would be."""
    plain = train.objective

    def objective(*words, **named):
        loss = plain(*words, **named)
        first = (folder / "metrics.jsonl").read_text().count("\n") == 1
        return replace(loss, rows=loss.rows + math.inf) if first else loss

    train.objective = objective
    yield
    train.objective = plain


if __name__ == "__main__":
    team = Team.join()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job["settings"], team, job.get("resume"), job.get("poisoned"))
