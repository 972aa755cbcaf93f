"""The estimate of memory, against real networks, the published sizes of well-known models, and numbers by hand."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from aegpo import build, models
from aegpo.config import Config, Model, explored_steps, resolve
from aegpo.models import memory
from aegpo.types import Conditions
from tests.models.pipelines import build as build_pipeline

CONFIGS = Path(__file__).with_name("configs")
SMALL = ("sd3", "flux", "sd15", "sdxl", "qwen-image", "wan", "flux2-klein")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where small pipelines are saved."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: str(build_pipeline(name, root / name)) for name in SMALL} | {"world": "world"}


def settings(folders, name, **more):
    small = {} if name == "world" else {"resolution": 16, "frames": 5 if name == "wan" else 0}
    return Model(path=folders[name], **small, **{"dtype": "float32"} | more)


outline_of = functools.cache(memory.sizes)  # of folders that stay as they are


def fake_kept(chosen, samples):
    outline = outline_of(chosen)
    return memory.kept(outline, memory.trainable(outline, chosen), chosen, samples)


def really_kept(chosen, samples):
    """The bytes that autograd saves of the real policy's forward on the longest prompts, but for the weights."""
    model, found = models.load(chosen), {}
    rows = {name: torch.randn(samples, *shape, dtype=model._dtype) for name, shape in model.family.text_shapes.items()}
    conditions = Conditions(rows, {name: row[:1] for name, row in rows.items()})

    def pack(tensor):
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.randn(samples, *model.latent_shape)
        velocity = model.predict(x, torch.tensor(0.6), conditions, torch.arange(samples), 1.0)
    assert velocity.requires_grad
    weights = {parameter.untyped_storage()._cdata for parameter in model.network.parameters()}
    return sum(storage.nbytes() for number, storage in found.items() if number not in weights)


@pytest.mark.parametrize("how", [{}, {"dtype": "bfloat16"}, {"train": "full"}], ids=["lora", "half", "full"])
@pytest.mark.parametrize("name", ["world", *SMALL])
def test_what_training_keeps_is_what_a_real_forward_keeps(name, how, folders):
    chosen = settings(folders, name, **how)
    assert fake_kept(chosen, 2).kept == pytest.approx(really_kept(chosen, 2), rel=0.01)


@pytest.mark.parametrize("name", ["world", "sd3", "flux", "sd15", "wan"])
def test_under_checkpointing_each_sample_keeps_what_it_really_keeps(name, folders):
    """What is alike for all samples, as the places of tokens are, stays in memory unseen by the hooks."""
    chosen = settings(folders, name, gradient_checkpointing=True)
    one, two, three = (fake_kept(chosen, samples) for samples in (1, 2, 3))
    real = really_kept(chosen, 3) - really_kept(chosen, 2)
    assert three.kept - two.kept == two.kept - one.kept == pytest.approx(real, rel=0.05)
    plain = fake_kept(replace(chosen, gradient_checkpointing=False), 2)
    assert two.kept + two.block < plain.kept and two.block == plain.block


@pytest.mark.parametrize("name", ["world", *SMALL])
def test_parameters_are_counted_as_they_are(name, folders):
    chosen = settings(folders, name)
    outline, model = outline_of(chosen), models.load(chosen)
    assert memory.count(memory.trainable(outline, chosen)) == memory.count(model.network)
    assert memory.count(outline.pipe.vae) == memory.count(model.pipe.vae)
    real = [part for key, part in model.pipe.components.items() if key.startswith("text_encoder") and part]
    assert [memory.count(part) for part in outline.encoders] == [memory.count(part) for part in real]
    trained = sum(weight.numel() for weight in model.trainable.values())
    parts = memory.estimate(resolve_for(chosen), outline)
    assert (parts["trained"], parts["optimizer"]) == (4 * trained, 12 * trained)


def resolve_for(chosen: Model, **more) -> Config:
    return replace(resolve(more), model=chosen)


@pytest.mark.parametrize("name", ["world", *SMALL])
def test_the_longest_prompt_has_the_shapes_that_are_told(name, folders):
    family = models.load(settings(folders, name)).family
    given = family.encode("a ring " * 200 if name not in ("world",) else "a ring")
    assert {key: tuple(row.shape) for key, row in given.items() if key != "seen"} == family.text_shapes


# ---------------------------------------------------------------- real sizes

T5, CLIP_L, CLIP_G, QWEN, UMT5 = 4.762e9, 123.1e6, 694.7e6, 8.292e9, 5.681e9
PUBLISHED = {
    "sd35-medium": (2.243e9, 83.8e6, [CLIP_L, CLIP_G, T5]),  # diffusers' class holds no positions: a table, unlearned
    "flux1-dev": (11.90e9, 83.8e6, [CLIP_L, T5]),
    "sdxl": (2.567e9, 83.7e6, [CLIP_L, CLIP_G]),
    "sd15": (859.5e6, 83.7e6, [CLIP_L]),
    "qwen-image": (20.43e9, 126.9e6, [QWEN]),
    "wan21-1.3b": (1.419e9, 126.9e6, [UMT5]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_well_known_models_have_their_published_sizes(name):
    outline = outline_of(Model(path=str(CONFIGS / name)))
    network, vae, encoders = PUBLISHED[name]
    assert memory.count(outline.network) == pytest.approx(network, rel=0.02)
    assert memory.count(outline.pipe.vae) == pytest.approx(vae, rel=0.02)
    assert [memory.count(encoder) for encoder in outline.encoders] == pytest.approx(encoders, rel=0.02)


@pytest.mark.parametrize(("how", "size"), [("none", 2.0), ("int8", 1.0), ("nf4", 0.516)])
def test_weights_in_few_bits(how, size):
    """Of FLUX.1-dev all but a few in a hundred stand in linear layers inside blocks."""
    chosen = Model(path=str(CONFIGS / "flux1-dev"), quantize=how)
    weights = memory._frozen(outline_of(chosen), chosen) - 2 * 83_819_683
    assert weights == pytest.approx(size * 11_901_408_320, rel=0.06)


@pytest.fixture
def estimated(folders):
    def of(name, model=(), **more):
        plain = {"algorithm": "flow-grpo", "sampler": {"guidance": 1.0}}
        chosen = settings(folders, name, **dict(model))
        how = {"optimizer": {"micro_batch": 8, "updates": 1, "ema": 0.0} | more.pop("optimizer", {})}
        return memory.estimate(resolve_for(chosen, **plain | more | how), outline_of(chosen))

    return of


def test_each_setting_does_to_the_estimate_what_it_does_to_memory(estimated):
    plain = estimated("sd15")
    double = estimated("sd15", optimizer={"micro_batch": 16})
    guided = estimated("sd15", sampler={"guidance": 4.0})
    assert double["activations"] == guided["activations"] == 2 * plain["activations"]
    assert estimated("sd15", {"gradient_checkpointing": True})["activations"] < plain["activations"] / 2
    kept = estimated("sd15", optimizer={"keep_graphs": True})["activations"]
    rows = 96 * explored_steps(resolve({"algorithm": "flow-grpo"}))
    assert rows * plain["activations"] / 8 > kept > 0.8 * rows * plain["activations"] / 8  # one block, once
    averaged = estimated("sd15", optimizer={"ema": 0.9, "behaviour": 0.5})
    assert averaged["optimizer"] == plain["optimizer"] * 24 / 12
    assert estimated("sd15", optimizer={"kind": "adamw_8bit"})["optimizer"] == plain["optimizer"] / 2
    assert plain["latents"] == 4 * (4 * 8 * 8) * (6 * rows + 8 * 21 + 5 * 96)


def test_the_base_stands_beside_weights_that_are_all_trained(estimated, folders):
    outline = outline_of(settings(folders, "sd15"))
    network, vae = memory.count(outline.network), memory.count(outline.pipe.vae)
    full = estimated("sd15", {"train": "full"})
    assert (full["trained"], full["optimizer"]) == (4 * network, 12 * network)
    assert full["weights"] == 4 * network + 4 * vae
    assert estimated("sd15")["weights"] == 4 * network + 4 * vae
    assert estimated("sd15", {"dtype": "auto"})["weights"] == 2 * network + 2 * vae  # as on a GPU


def test_the_rewards_network_stands_beside(estimated):
    assert estimated("sd15")["reward"] == 0
    for name in ("pickscore", "pickscore=somewhere"):
        assert estimated("sd15", reward=name)["reward"] == 4 * 986e6  # of CLIP ViT-H/14


def test_guidance_as_an_input_costs_no_second_evaluation(estimated):
    assert estimated("flux") == estimated("flux", sampler={"guidance": 3.5})


def test_the_total_is_that_of_the_phase_that_takes_most():
    parts = {"weights": 4, "reward": 1, "trained": 1, "optimizer": 3, "activations": 4, "latents": 2, "decoding": 3}
    assert memory.total(parts | {"text encoders": 10}) == ("encoding", 16)
    assert memory.total(parts | {"text encoders": 8}) == ("training", 15)
    assert memory.total(parts | {"text encoders": 8, "decoding": 9}) == ("rollouts", 20)


def test_the_peak_is_what_is_alive_at_once():
    with memory.Peak() as alive:
        a = torch.zeros(100, dtype=torch.uint8)
        b = a + 1  # 200
        b = b.view(10, 10)  # a view is nothing new
        b += 1  # neither is this
        c = torch.cat([a, a])  # 400
        del a, c  # 100
        d = torch.zeros(250, dtype=torch.uint8)  # 350
    assert (alive.most, alive.now) == (400, 350)
    assert len(b) == 10 and len(d) == 250


# ---------------------------------------------------------------- what cannot be read, and what is too large


def test_a_pipeline_that_cannot_be_read_has_no_outline(tmp_path):
    assert memory.sizes(Model(path="nobody/nothing")) is None
    for path in (tmp_path, tmp_path / "nowhere"):  # but a folder is one that its user meant
        with pytest.raises(ValueError, match=r"model\.path: "):
            memory.sizes(Model(path=str(path)))


PARTS = {"weights": 4, "trained": 1, "optimizer": 0, "reward": 0}
PARTS |= {"activations": 30, "latents": 1, "decoding": 3, "text encoders": 9}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 24 GiB, as far as one can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 * memory.GIB))


def parts(**more):
    return {part: size * memory.GIB for part, size in (PARTS | more).items()}


@pytest.mark.parametrize(
    ("changed", "model", "optimizer", "said"),
    [
        (
            {},
            {},
            {"micro_batch": 8, "keep_graphs": True, "updates": 1},
            "the GPU here has 24.0 GiB, but this run would take 36.0 during training, 30.0 of them for activations; "
            "what lowers it: optimizer.keep_graphs false, model.gradient_checkpointing true, optimizer.micro_batch 4, "
            "a smaller model.resolution",
        ),
        (
            {"weights": 40},
            {"train": "full"},
            {},
            "72.0 during training, 40.0 of them for weights; what lowers it: model.train lora,",
        ),
        (
            {"activations": 2, "weights": 20},
            {"quantize": "int8", "gradient_checkpointing": True},
            {},
            "30.0 during encoding, 20.0 of them for weights; what lowers it: model.quantize nf4,",
        ),
        ({"weights": 0, "text encoders": 25}, {"quantize": "nf4", "lora": {"rank": 1}}, {}, "; it takes a larger one"),
    ],
)
def test_a_gpu_that_is_too_small_is_refused_in_one_line(changed, model, optimizer, said, gpu):
    config = resolve({"algorithm": "flow-grpo", "model": model, "optimizer": optimizer})
    sizes = parts(**changed) | ({"activations": 0} if changed.get("weights") == 0 else {})
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        memory.refuse_too_small(sizes, config)
    assert "\n" not in str(refusal.value)


def test_nothing_is_refused_that_fits_nor_without_a_gpu(gpu, monkeypatch):
    memory.refuse_too_small(parts(activations=18), resolve({}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memory.refuse_too_small(parts(), resolve({}))


def test_training_is_refused_before_anything_is_written_or_loaded(gpu, tmp_path, monkeypatch):
    reward = tmp_path / "reward.py"
    reward.write_text("def score(images, prompts):\n    return [0.0] * len(images)\n")
    (tmp_path / "prompts.txt").write_text("a ring\na cross\n")
    monkeypatch.setattr(build, "load", lambda *_: pytest.fail("loaded"))
    config = resolve(
        {
            "model": {"path": str(CONFIGS / "flux1-dev")},
            "prompts": {"train": str(tmp_path / "prompts.txt"), "eval": str(tmp_path / "prompts.txt")},
            "reward": f"{reward}:score",
            "prompts_per_step": 2,
            "rollouts_per_step": 16,
            "allocation": {"rule": "uniform"},
            "output_dir": str(tmp_path / "run"),
        }
    )
    with pytest.raises(ValueError, match="the GPU here has 24"):
        build.run(config)
    assert not (tmp_path / "run").exists()
