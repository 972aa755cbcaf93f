"""What makes a large model fit, and compiled code: each trains, and computes what it did without."""

import functools
import json
from dataclasses import replace

import bitsandbytes
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from aegpo import build, models
from aegpo.config import Config, Lora, Model, resolve
from aegpo.models import base
from aegpo.models.lora import BesideProduct
from aegpo.models.probe import AttentionProbe
from aegpo.optimizer import make_optimizer
from aegpo.rollout import collect, walk_trunk
from aegpo.types import Plan, Prompt
from tests.models.pipelines import PIPELINES
from tests.models.pipelines import build as build_pipeline

PROMPTS = ["a red circle", "two blue squares"]
compiling = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own doings


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {name: str(build_pipeline(name, root / name)) for name in PIPELINES} | {"world": "world"}


def loaded(folders, name, **settings):
    """A policy whose adapter does something."""
    about = {"path": folders[name], "resolution": 16, "frames": 5 if name == "wan" else 0, "dtype": "float32"}
    about |= {"path": "world", "resolution": 32} if name == "world" else {}
    model = models.load(Model(**(about | settings), lora=Lora(rank=4, alpha=8)))
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable.values()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return model


def predicted(model, count=3):
    """A prediction, and the gradients of its square."""
    conditions = model.encode(PROMPTS)
    x = torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    v = model.predict(x, torch.linspace(0.2, 0.9, count), conditions, torch.arange(count) % 2, 2.0)
    weights = list(model.trainable.values())
    return v.detach(), torch.autograd.grad(v.square().mean(), weights, allow_unused=True, materialize_grads=True)


def assert_same(ours, theirs, tolerance=1e-5):
    assert (ours[0] - theirs[0]).abs().max() <= tolerance * theirs[0].abs().max()
    largest = max(gradient.abs().max() for gradient in theirs[1])
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert (one - other).abs().max() <= tolerance * largest


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("name", PIPELINES)
def test_gradients_are_the_same_with_checkpoints_and_the_probe_reads_no_layer_twice(name, train, folders):
    plain, checkpointed = (
        loaded(folders, name, train=train, gradient_checkpointing=wanted) for wanted in (False, True)
    )
    assert checkpointed.network.is_gradient_checkpointing and not plain.network.is_gradient_checkpointing
    assert_same(predicted(checkpointed), predicted(plain))
    read = []
    for model in (plain, checkpointed):
        with AttentionProbe(model.network, queries="all") as probe:
            predicted(model)
        probe.entropy()
        read.append([layer.name for layer in probe.layers])
    assert read[0] == read[1]


@compiling
@pytest.mark.parametrize("name", ["wan"])
def test_compiled_blocks_compute_the_same_in_a_few_graphs_with_the_adapter_and_without(name, folders, monkeypatch):
    """The blocks go through the compiler's front and autograd's, and are then run as they are: no code is generated."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (loaded(folders, name, compile=wanted) for wanted in (False, True))
    graphs = []
    for count in (3, 4, 5):
        assert_same(predicted(compiled, count), predicted(plain, count))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[2] == graphs[1]  # any batch, once that it varies is known
    x, conditions = torch.randn(2, *plain.latent_shape), plain.encode(PROMPTS)
    with torch.no_grad():
        for model in (plain, compiled):
            assert not model.predict(x, torch.tensor(0.5), conditions, torch.arange(2), 1.0).requires_grad
    found = []
    for model in (plain, compiled):
        with torch.no_grad(), model.reference():
            found.append(model.predict(x, torch.tensor(0.5), conditions, torch.arange(2), 1.0))
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()
    torch._dynamo.reset()


@compiling
def test_the_same_code_draws_and_trains_where_it_is_compiled(folders, monkeypatch):
    """Code for a forward alone rounds otherwise: ratios of half precision would not begin at 1."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model = loaded(folders, "sd3", compile=True, dtype="bfloat16")
    conditions, x = model.encode(PROMPTS), torch.randn(2, *model.latent_shape)
    given = (x, torch.tensor([0.3, 0.8]), conditions, torch.arange(2), 1.0)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        drawn = model.predict(*given)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(drawn, model.predict(*given))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["world", *PIPELINES])
def test_a_base_in_4_bits_is_the_base_with_its_weights_rounded_to_them(name, folders):
    plain, few = (loaded(folders, name, quantize=quantize) for quantize in ("none", "nf4"))
    assert list(few.trainable) == list(plain.trainable)
    assert {p.dtype for p in few.trainable.values()} == {torch.float32}
    before, changed = predicted(plain), 0
    for one, module in few.network.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            own = plain.network.get_submodule(one)
            if own.in_features % 64 == 0:  # narrower, and blocks of 64 reach over rows, of which some builds make more
                assert 0 < (weight - own.weight).norm() < 0.12 * own.weight.norm()
            own.weight.data.copy_(weight)
            changed += 1
    assert changed > 10
    names = [n for n, m in few.network.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert all(
        "blocks." in one or "_block." in one for one in names
    )  # what embeds, and what comes out, is left as it is
    assert (predicted(plain)[0] - before[0]).abs().max() > 1e-2
    assert_same(predicted(few), predicted(plain), tolerance=1e-3)


@pytest.mark.parametrize("name", ["sd3", "flux", "sdxl"])
def test_a_base_in_8_bits_is_near_the_base_and_its_adapter_is_trained(name, folders):
    plain, few = (loaded(folders, name, quantize=quantize) for quantize in ("none", "int8"))
    kinds = {type(m.base_layer).__name__ for m in few.network.modules() if isinstance(m, LoraLayer)}
    assert kinds == {"Linear8bitLt"}
    ours, theirs = predicted(few), predicted(plain)
    assert 0 < (ours[0] - theirs[0]).norm() < 0.06 * theirs[0].norm()
    together = [torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (ours[1], theirs[1])]
    assert nn.functional.cosine_similarity(*together, dim=0) > 0.97


def test_what_cannot_be_quantized_is_said(folders, monkeypatch):
    with pytest.raises(ValueError, match=r"model\.quantize: weights in few bits cannot be trained"):
        resolve({"model": {"quantize": "nf4", "train": "full"}})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("aegpo.models.quantized.find_spec", lambda _: None)
    monkeypatch.setattr("aegpo.optimizer.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"model\.quantize: nf4 needs bitsandbytes; pip install 'aegpo\[8bit\]'"):
        models.load(Model(path=folders["sd3"], quantize="nf4"))
    with pytest.raises(
        ValueError, match=r"optimizer\.kind: adamw_8bit needs bitsandbytes; pip install 'aegpo\[8bit\]'"
    ):
        make_optimizer(resolve({"optimizer": {"kind": "adamw_8bit"}}), models.load(Config().model))


@compiling
def test_moments_in_8_bits_follow_those_in_32_and_survive_a_stop(tmp_path):
    """Weights are large enough for bitsandbytes to quantize their moments; resumed, all is the same to the bit."""
    (tmp_path / "few.txt").write_text("a red circle\na ring\na blue cross\ntwo squares\n")
    settings = {
        "algorithm": "flow-grpo",
        "prompts": {"train": str(tmp_path / "few.txt"), "eval": str(tmp_path / "few.txt")},
        "model": {"train": "full", "dtype": "float32"},
        "sampler": {"steps": 3},
        "prompts_per_step": 2,
        "rollouts_per_step": 8,
        "eval_images": 1,
        "eval_every": 0,
        "steps": 4,
    }

    def run(name, steps=4, kind="adamw_8bit", **more):
        more = {"optimizer": {"kind": kind, "lr": 1e-4}, "output_dir": str(tmp_path / name), "steps": steps}
        build.fit(resolve(settings, more), resume="latest" if (tmp_path / name).exists() else None)
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(row).items() if k not in ("seconds", "forwards")} for row in rows]

    whole, plain = run("whole"), run("plain", kind="adamw")
    run("stopped", steps=2)
    assert run("stopped")[3:] == whole[3:]
    assert whole != plain
    assert whole[-1]["loss"] == pytest.approx(plain[-1]["loss"], abs=1e-3)
    assert whole[-1]["eval/reward_mean"] == pytest.approx(plain[-1]["eval/reward_mean"], abs=0.03)


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_in_half_precision_is_peft_s_sum_and_so_are_its_gradients(bias):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator).bfloat16() for size in ((2, 9, 32), (48, 32)))
    a, b = (0.3 * torch.randn(*size, generator=generator) for size in ((4, 32), (48, 4)))
    offset = torch.randn(48, generator=generator).bfloat16() if bias else None
    slope = torch.randn(2, 9, 48, generator=generator).bfloat16()

    def found(dtype, product):
        given = [t.detach().to(dtype).requires_grad_() for t in (x, a, b)]
        y = product(*given)
        return [y, *torch.autograd.grad(y, given, slope.to(y.dtype))]

    def plain(x, a, b):
        y = x @ weight.double().T + 1.5 * x @ a.T @ b.T
        return y if offset is None else y + offset.double()

    exact = found(torch.float64, plain)
    xb = x.clone().requires_grad_()
    given = [xb, a.clone().requires_grad_(), b.clone().requires_grad_()]
    y = BesideProduct.apply(xb, weight, offset, given[1], given[2], 1.5)
    ours = [y, *torch.autograd.grad(y, given, slope)]
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(ours, exact, strict=True):
        assert (one.double() - other).norm() < 2**-7 * other.norm()
    low = x.flatten(0, 1) @ a.bfloat16().T
    assert (y.flatten(0, 1) - nn.functional.linear(x.flatten(0, 1), weight, offset)).abs().max() > 0.1
    assert low.shape == (18, 4)


@compiling
def test_blocks_are_compiled_once_each_and_none_within_another(folders):
    for name in ("flux", "sdxl"):
        network = loaded(folders, name).network
        base.compile_blocks(network)
        compiled = [n for n, module in network.named_modules() if module._compiled_call_impl is not None]
        assert compiled
        assert not any(one != other and one.startswith(f"{other}.") for one in compiled for other in compiled)


def test_rollouts_that_leave_a_trunk_are_computed_by_the_code_that_trains(folders):
    """A probe runs no compiled code, so where rollouts leave the trunk, its velocities are not taken for theirs."""
    prompts = [Prompt(i, text, {}) for i, text in enumerate(PROMPTS)]
    plan = Plan(torch.tensor([2, 2]), torch.tensor([[False, True, False]] * 2), torch.ones(2, 3, dtype=torch.float64))
    config = resolve(
        {"algorithm": "aegpo-paper", "sampler": {"steps": 3, "shared_noise": True}, "exploration": {"k": 1}}
    )
    evaluations = []
    for wanted in (False, True):
        model = loaded(folders, "sd3")
        model.is_compiled = wanted  # all that is asked here
        conditions = model.encode(PROMPTS)
        trunk = walk_trunk(model, prompts, conditions, torch.tensor([3, 3]), config, 0)
        off = replace(trunk, velocities=trunk.velocities + 7)
        model.forwards = 0
        rows = [collect(model, prompts, conditions, plan, config, 0, one).transitions for one in (trunk, off)]
        evaluations.append(model.forwards // 2)
        assert torch.equal(rows[0].velocity, rows[1].velocity) == wanted
    assert evaluations == [4, 8]  # after they leave, and then where they do, too
