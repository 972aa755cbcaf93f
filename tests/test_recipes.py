"""The packaged recipes: each resolves, fits the GPU in its name, and has a twin that differs in AEGPO alone."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from aegpo.algorithms import merge
from aegpo.config import load_yaml, resolve
from aegpo.models import memory
from aegpo.words import RECIPES, recipe_file

CONFIGS = Path(__file__).parent / "models" / "configs"
SHAPES = {"sd35": "sd35-medium", "flux": "flux1-dev", "sdxl": "sdxl", "sd15": "sd15", "qwen": "qwen-image"}
SHAPES |= {"wan21": "wan21-1.3b"}
NAMES = sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("*.yaml"))
SIZED = [name for name in NAMES if name.endswith("gb")]


def test_the_recipes_that_people_look_for_are_there():
    assert set(NAMES) == {
        *("world", "sd35-medium-lora-24gb", "flux-dev-lora-40gb", "flux-dev-lora-24gb", "sdxl-lora-16gb"),
        *("sd15-lora-8gb", "qwen-image-lora-80gb", "wan21-1.3b-lora-24gb"),
        *("paper/flux-hpsv21-aegpo", "paper/flux-hpsv21-dance-grpo"),
        *("paper/sd35-medium-hpsv21-aegpo", "paper/sd35-medium-hpsv21-flow-grpo"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves_and_says_what_it_is(name):
    file = recipe_file(name)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# ")
    config = resolve(load_yaml(file))
    assert config.model.path != "world" or name == "world"
    assert config.output_dir.startswith("runs/")
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", SIZED)
def test_it_fits_the_gpu_in_its_name(name):
    """By the estimate, which tests of its own hold to what real networks keep; the reward's network is in it."""
    config = resolve(load_yaml(recipe_file(name)))
    shape = SHAPES[re.split("[-.]", name)[0]]
    config = replace(config, model=replace(config.model, path=str(CONFIGS / shape)))
    outline = memory.sizes(config.model)
    assert outline is not None
    taken = memory.total(memory.estimate(config, outline))[1] / 1e9
    assert taken < int(name.rsplit("-", 1)[1].removesuffix("gb"))


@pytest.mark.parametrize(
    ("aegpo", "plain", "per_prompt"),
    [
        ("paper/flux-hpsv21-aegpo", "paper/flux-hpsv21-dance-grpo", 12),
        ("paper/sd35-medium-hpsv21-aegpo", "paper/sd35-medium-hpsv21-flow-grpo", 12),
    ],
)
def test_a_paper_recipe_has_a_twin_without_aegpo(aegpo, plain, per_prompt):
    ours, theirs = (load_yaml(recipe_file(name)) for name in (aegpo, plain))
    own = {key: ours.pop(key) for key in ("allocation", "exploration", "output_dir")}
    theirs.pop("output_dir")
    assert ours == theirs
    assert own["allocation"] == {"rule": "median_split", "low": 8, "high": 16}
    assert own["exploration"].items() >= {"rule": "entropy_peaks", "k": 4}.items()
    config = resolve(merge(ours, own))
    assert config.rollouts_per_step == per_prompt * config.prompts_per_step
    assert "allocation" not in theirs and asdict(resolve(theirs).allocation)["rule"] == "uniform"


def test_dance_grpo_has_the_settings_of_its_paper():
    config = resolve(load_yaml(recipe_file("paper/flux-hpsv21-dance-grpo")))
    sampler = config.sampler
    assert (sampler.steps, sampler.kind, sampler.eta, sampler.shift, sampler.guidance) == (16, "dance_sde", 0.3, 3, 3.5)
    assert (config.model.resolution, config.loss.clip_high, config.advantage.best_of) == (720, 1e-4, 0)
    assert sampler.shared_noise and config.exploration.share == 0.6 and config.advantage.ddof == 1
