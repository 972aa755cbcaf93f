"""One process and two gloo processes are the same run, for groups of any size; and what goes wrong in one ends all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from aegpo import checkpoint, world
from aegpo.distributed import ALONE
from tests.distributed.worker import run

WORKER = Path(__file__).with_name("worker.py")
SMALL = {
    "steps": 2,
    "prompts_per_step": 3,
    "rollouts_per_step": 12,
    "allocation": {"low": 2, "high": 6},
    "sampler": {"steps": 4, "solver": "euler", "compress": 1.0},
    "optimizer": {"micro_batch": 4, "updates": 2},
    "model": {"lora": {"rank": 4}},
    "eval_every": 0,
    "eval_images": 1,
    "save_every": 9,
}
RULES = {"rule": "entropy_peaks", "k": 2}
RUNS = {
    "uneven": {"algorithm": "aegpo", "exploration": RULES, "sampler": {"guidance": 2.0}},
    "uneven-full": {"algorithm": "aegpo", "exploration": RULES, "model": {"train": "full"}, "optimizer": {"ema": 0.5}},
    "uniform": {"algorithm": "flow-grpo"},
    "uniform-full": {"algorithm": "flow-grpo", "steps": 1, "model": {"train": "full"}},
    "behaviour": {
        "algorithm": "diffusion-nft",
        "exploration": {"k": 2},
        "model": {"train": "full"},
        "optimizer": {"behaviour": 0.9, "behaviour_ramp": 0.9, "lr": 1e-4, "ema": 0.5, "ema_every": 1},
    },
    "tree": {"algorithm": "branch-grpo", "steps": 1, "exploration": {"k": 2}},
    "spread": {
        "algorithm": "aegpo",
        "allocation": {"rule": "reward_variance"},
        "exploration": {"rule": "reward_spread", "k": 2},
        "sampler": {"kind": "cps", "shared_noise": True},
    },
    "kept": {"algorithm": "aegpo-fast", "exploration": {"k": 2}, "optimizer": {"updates": 1}},
    "groups": {"algorithm": "dgpo", "steps": 1, "exploration": {"k": 2}, "prompts": "one"},
    "ranked": {"algorithm": "flow-grpo", "steps": 1, "reward": "ranked", "reward_checks": {"failed": "drop"}},
    "trunk": {
        "algorithm": "flow-grpo",
        "steps": 1,
        "rollouts_per_step": 6,
        "sampler": {"steps": 3, "shared_noise": True},
        "optimizer": {"micro_batch": 1},
    },
    "poisoned": {"algorithm": "flow-grpo", "save_every": 1},
}
RANKED = """
import numpy as np
from aegpo.rewards.own import groupwise

@groupwise
def score(images, prompts):
    if "ring" in prompts[0]:
        raise ValueError("no rings")
    light = images.mean((1, 2, 3))
    return light.argsort().argsort() / len(light)
"""
DRAWN = """
import os, random
def score(images, prompts):
    drawn = [random.random() for _ in images]
    with open(__file__ + os.environ["RANK"], "a") as file:
        file.write("".join(f"{one}\\n" for one in drawn))
    return drawn
"""


def together(folder, jobs):
    """Run jobs in two processes that torchrun starts."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    torchrun = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(WORKER), str(folder / "jobs.json")], env=alone, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def settings(folder, name, changes):
    from aegpo.algorithms import merge

    held_out = "one.jsonl" if changes.get("prompts") else "eval.jsonl"
    own = {"prompts": {"train": str(folder / "train.txt"), "eval": str(folder / held_out)}}
    own |= {"reward": f"{folder / 'rewards.py'}:score" if changes.get("reward") else "world"}
    changes = {key: value for key, value in changes.items() if key != "prompts"}
    laid = merge({"algorithm": changes["algorithm"]}, SMALL, changes, own, {"output_dir": str(folder / name)})
    return laid


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "train.txt").write_text("a red circle\ntwo squares\na ring below a cross\n")
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.held_out()[::48]))
    (folder / "one.jsonl").write_text(json.dumps(world.held_out()[0]) + "\n")  # fewer than there are processes
    (folder / "rewards.py").write_text(RANKED)
    (folder / "drawn.py").write_text(DRAWN)
    return folder


SHARDED = {
    "sharded": "uneven",
    "sharded-groups": "groups",
    "sharded-full": "behaviour",
    "sharded-trunk": "trunk",
    "sharded-resumed": "uneven-full",
}
RESUMED = ("resumed", "sharded-resumed")


@pytest.fixture(scope="module")
def runs(folder):
    """Every run by one process, and by two."""
    for name, changes in RUNS.items():
        run(settings(folder, f"{name}-1", changes), ALONE, poisoned=name == "poisoned")
    run(settings(folder, "resumed-2", RUNS["uneven"]) | {"steps": 1}, ALONE)
    jobs = []
    for name, plain in ({name: name for name in RUNS} | SHARDED | {"resumed": "uneven"}).items():
        own = settings(folder, f"{name}-2", RUNS[plain])
        if name in SHARDED:
            own["model"] = own["model"] | {"shard": True}
        if name == "sharded-resumed":
            jobs.append({"settings": own | {"steps": 1}})
        jobs.append({"settings": own, "resume": name in RESUMED, "poisoned": name == "poisoned"})
    own = settings(folder, "", {"algorithm": "aegpo", "exploration": RULES})
    own["optimizer"] = own["optimizer"] | {"recompute": True}  # as a sharded run does
    for name, shard in (("bfloat16", False), ("bfloat16-sharded", True)):
        changed = {"output_dir": str(folder / name), "model": own["model"] | {"dtype": "bfloat16", "shard": shard}}
        jobs.append({"settings": own | changed})
    own = {"reward": f"{folder / 'drawn.py'}:score", "steps": 1}
    jobs.append({"settings": settings(folder, "drawn", RUNS["uniform"]) | own})
    together(folder, jobs)
    return folder


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def saved(folder, place=-1):
    """The weights of the last checkpoint, or of one before."""
    return load_file(checkpoint.checkpoints(folder)[place] / "weights.safetensors")


def numbers(value):
    """All numbers of a line in order, and what else it holds."""
    match value:
        case float():
            return [value], []
        case dict():
            parts = [numbers(item) for _, item in sorted(value.items())]
        case list():
            parts = [numbers(item) for item in value]
        case _:
            return [], [value]
    return [x for part in parts for x in part[0]], [x for part in parts for x in part[1]]


@pytest.mark.parametrize(("name", "plain"), [(name, name) for name in RUNS] + [*SHARDED.items(), ("resumed", "uneven")])
def test_two_processes_are_the_same_run_as_one(runs, name, plain):
    one, two = lines(runs / f"{plain}-1"), lines(runs / f"{name}-2")
    if name == "resumed":
        assert two[-1]["forwards"] == one[-1]["forwards"] + one[0]["forwards"]  # the evaluation after its first step
    if name in RESUMED:  # after a first step that was its last, and so was followed by an evaluation
        one, two = ([{key: value for key, value in rows[-1].items() if key != "forwards"}] for rows in (one, two))
    if name in SHARDED:  # which takes ratios anew in any case, a forward a row of later updates
        one, two = ([row | {"forwards": None, "recomputed": None} for row in rows] for rows in (one, two))
    (x, rest), (y, rest_of_two) = numbers(one), numbers(two)
    assert rest == rest_of_two  # whole numbers and texts: allocation, explored steps, rows, forwards, prompts
    assert len(x) > 10
    assert np.abs(np.subtract(x, y)).max() <= 1e-5
    weights = [saved(runs / of) for of in (f"{plain}-1", f"{name}-2")]
    before = saved(runs / f"{name}-2", -2)
    assert weights[0].keys() == weights[1].keys() == before.keys()
    assert all((weights[0][key] - weights[1][key]).abs().max() <= 1e-5 for key in before)
    for file in checkpoint.checkpoints(runs / f"{plain}-1")[-1].glob("*.safetensors"):
        other = load_file(checkpoint.checkpoints(runs / f"{name}-2")[-1] / file.name)
        for key, value in load_file(file).items():
            assert torch.allclose(value.double(), other[key].double(), rtol=1e-2, atol=1e-5), (file.name, key)
    grids = [max((runs / of / "samples").iterdir()) for of in (f"{plain}-1", f"{name}-2")]
    drawn = [np.asarray(Image.open(grid).convert("RGB"), np.int64) for grid in grids]
    assert grids[0].name == grids[1].name and np.abs(drawn[0] - drawn[1]).max() <= 2
    assert any((weights[1][key] - before[key]).abs().max() > 5e-5 for key in before)


def test_what_differs_is_rounding_and_leans_to_no_side(runs):
    """Were a row left out, or counted twice, the differences of all weights together would not have a mean of zero."""
    for name in RUNS:
        one, two = (saved(runs / f"{name}-{of}") for of in (1, 2))
        residual = torch.cat([(two[key] - one[key]).flatten().double() for key in one])
        assert residual.mean().abs() <= 5 * residual.std() / len(residual) ** 0.5 + 1e-12, name


def test_no_process_takes_an_update_whose_loss_is_not_finite_in_one(runs):
    """The last one's is infinite throughout step 1, with a gradient as it would be."""
    for name in ("poisoned-1", "poisoned-2"):
        assert [line["dropped_updates"] for line in lines(runs / name)[1:]] == [2, 0]
        assert not (runs / name / "checkpoint-1").exists()
    aside = [file.stem for file in (runs / "poisoned-2" / "not-finite").iterdir()]
    assert len(aside) == 4 and len({name[-1] for name in aside}) == 2  # two updates, of two processes


def test_a_reward_that_draws_draws_other_numbers_in_each_process(runs):
    first, second = ({*(runs / f"drawn.py{rank}").read_text().split()} for rank in (0, 1))
    assert len(first) > 5 and len(second) > 5 and not first & second


def test_in_bfloat16_a_sharded_run_is_the_plain_one(runs):
    """What is trained and the sums of its gradients are float32 in both. (Under `train: full` the embedders' gradients
    are sums over blocks in bfloat16, whose order sharding changes.)
    """
    plain, sharded, single = (saved(runs / name) for name in ("bfloat16", "bfloat16-sharded", "uneven-1"))
    assert plain.keys() == sharded.keys() == single.keys()
    for key, value in plain.items():
        assert value.dtype == sharded[key].dtype == torch.float32
        assert (value - sharded[key]).abs().max() <= 1e-6
    assert max((value - single[key]).abs().max() for key, value in plain.items()) > 1e-4  # so it was bfloat16


def test_a_plain_process_goes_on_from_what_a_sharded_run_saved(runs):
    """What is saved of a sharded run is whole, so a plain process resumes it."""
    shutil.copytree(runs / "sharded-2", runs / "gone-on")
    run(settings(runs, "gone-on", RUNS["uneven"]) | {"steps": 3}, ALONE, resume=True)
    last = lines(runs / "gone-on")[-1]
    assert last["step"] == 3 and last["rows"] > 0
