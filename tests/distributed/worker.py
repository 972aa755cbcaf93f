"""Runs of the loop that the tests compare: alone, or as one of several processes, `python worker.py JOBS.json`."""

import json
import sys
from pathlib import Path

from rich.console import Console

from aegpo import checkpoint, models
from aegpo.config import dump_yaml, resolve
from aegpo.data import load_prompts
from aegpo.display import Display
from aegpo.distributed import Team
from aegpo.rewards.panel import load_panel
from aegpo.train import train


def run(settings, team, resume=None):
    """The loop alone: `build.run` without what surrounds it."""
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
    train(config, model, prompts, held_out, load_panel(config), folder, display, start, team=team)
    team.wait()


if __name__ == "__main__":
    team = Team.join()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job["settings"], team, job.get("resume"))
