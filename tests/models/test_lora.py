"""The merged product is peft's own adapted layer, forth and back."""

import pytest
import torch
from peft.tuners.lora import Linear

from aegpo import models
from aegpo.config import Lora, Model
from aegpo.models.lora import MergedProduct


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_and_its_gradients_are_those_of_autograd(shape, bias):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, a, b = normal(*shape), normal(4, 6).detach(), normal(2, 6), normal(4, 2)
    offset = normal(4).detach() if bias else None
    assert torch.autograd.gradcheck(lambda x, a, b: MergedProduct.apply(x, weight, offset, a, b, 1.7), (x, a, b))
    plain = x @ (weight + 1.7 * b @ a).T + (0 if offset is None else offset)
    assert torch.allclose(MergedProduct.apply(x, weight, offset, a, b, 1.7), plain, rtol=1e-12)


@pytest.mark.parametrize("targets", [(), ("attn.to_q", "ff.net.2")])
def test_the_network_is_the_one_that_peft_computes(targets):
    model = models.load(Model(dtype="float32", lora=Lora(rank=4, alpha=12, targets=targets)))
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable.values()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    conditions = model.encode(["a ring", "a red cross"])
    x = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(7))
    given = (x, torch.tensor([1.0, 0.8, 0.4, 0.1]), conditions, torch.tensor([0, 1, 1, 0]), 1.0)

    def found():
        v = model.predict(*given)
        slopes = torch.autograd.grad(v.square().sum(), list(model.trainable.values()))
        with torch.no_grad(), model.reference():
            return v.detach(), torch.cat([s.flatten() for s in slopes]), model.predict(*given)

    merged = found()
    adapted = [module for module in model.network.modules() if isinstance(module, Linear)]
    assert adapted
    for module in adapted:
        del module.forward  # from here on peft's own
    plain = found()
    assert (plain[0] - plain[2]).abs().max() > 0.05  # the adapter does something
    assert torch.equal(merged[2], plain[2])  # and nothing when it is off
    for ours, theirs in zip(merged[:2], plain[:2], strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_in_half_precision_the_adapter_is_beside_the_weights():
    """A change of 1e-3 of a weight is below what bfloat16 keeps of their sum; peft computes it in float32."""
    model = models.load(Model(dtype="bfloat16"))
    assert {p.dtype for p in model.trainable.values()} == {torch.float32}
    layer = next(module for module in model.network.modules() if isinstance(module, Linear))
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable.values()):
            parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(7)).bfloat16()
        ours, base, theirs = layer(x), layer.base_layer(x), Linear.forward(layer, x)
    assert ours.dtype == base.dtype == torch.bfloat16
    assert not torch.equal(ours, base)
    torch.testing.assert_close(ours.float(), theirs.float(), atol=2**-8, rtol=2**-7)
    with torch.no_grad(), model.reference():
        assert torch.equal(layer(x), base)

    conditions = model.encode(["a ring"])
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(7))
    full = models.load(Model(dtype="float32"))
    with torch.no_grad():
        v = model.predict(x, torch.tensor(0.5), conditions, torch.tensor([0]), 1.0)
        exact = full.predict(x, torch.tensor(0.5), full.encode(["a ring"]), torch.tensor([0]), 1.0)
    assert v.dtype == torch.float32 and 0 < (v - exact).abs().max() < 0.05 * exact.abs().max()


def test_under_autocast_it_is_not_merged_either():
    """Merged, weights that are float32 would be cast whole, and a small change of them rounded away."""
    model = models.load(Model(dtype="float32"))
    layer = next(module for module in model.network.modules() if isinstance(module, Linear))
    with torch.no_grad():
        for parameter in model.trainable.values():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(7))
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = layer(x), Linear.forward(layer, x)
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs.float(), atol=2**-8, rtol=2**-7)
        assert not torch.equal(ours, layer(x).bfloat16())


def test_all_weights_are_trained_in_float32_also_where_the_network_computes_in_half():
    model = models.load(Model(dtype="bfloat16", train="full"))
    assert {p.dtype for p in model.trainable.values()} == {torch.float32}
    conditions = model.encode(["a ring"])
    given = (torch.ones(1, *model.latent_shape), torch.tensor(0.5), conditions, torch.tensor([0]), 1.0)
    with torch.no_grad():
        before = model.predict(*given)
        for parameter in model.trainable.values():  # by less than bfloat16 keeps of a weight
            parameter.mul_(1 + 2**-10)
        now = model.predict(*given)
        with model.reference():
            assert torch.equal(model.predict(*given), before)
    for parameter in model.trainable.values():
        parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        assert not torch.equal(now, model.predict(*given))
