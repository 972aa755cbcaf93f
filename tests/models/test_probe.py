"""What the probe reads of six families of networks, against a float64 softmax of what they hand to attention."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch.utils.checkpoint import checkpoint

from aegpo.models.probe import AttentionProbe

IMAGE, TEXT = 16, 5
KINDS = (Attention, AttentionModuleMixin)


def entropy64(q, k, scale=None, mask=None):
    logits = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def run(network, inputs, dtype=None):
    if dtype is not None:
        network = network.to(dtype)
        inputs = {
            name: x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
            for name, x in inputs.items()
        }
        if added := inputs.get("added_cond_kwargs"):
            inputs["added_cond_kwargs"] = {name: x.to(dtype) for name, x in added.items()}
    with torch.no_grad():
        return network(**inputs)[0]


def calls_of_attention(monkeypatch):
    """Queries, keys and masks as torch is given them."""
    calls, attention = [], F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, *args, **options):
        calls.append((query, key, attn_mask))
        return attention(query, key, value, attn_mask, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_every_layer_of_every_family_is_exact_and_the_output_the_same_to_the_bit(
    family, network, dtype, tolerance, monkeypatch
):
    network, inputs = network
    plain = run(network, inputs, dtype)
    with AttentionProbe(network, queries="all") as probe:
        probed = run(network, inputs, dtype)
    assert torch.equal(plain, probed) and plain.isfinite().all()

    calls = calls_of_attention(monkeypatch)
    run(network, inputs, dtype)
    expected = torch.stack([entropy64(q, k, mask=mask).mean((1, 2)) for q, k, mask in calls])
    torch.testing.assert_close(probe.entropy().double(), expected, atol=tolerance, rtol=0)
    assert expected.std() > 0.01
    assert any(mask is not None for *_, mask in calls) == (family == "qwen-image")


def test_layers_are_told_apart(family, network):
    network, inputs = network
    with AttentionProbe(network) as probe:
        run(network, inputs)
    probe.entropy()
    expected = {
        "sd3": [
            "transformer_blocks.0.attn joint",
            "transformer_blocks.0.attn2 self",
            "transformer_blocks.1.attn joint",
        ],
        "flux": ["transformer_blocks.0.attn joint"] + [f"single_transformer_blocks.{i}.attn joint" for i in (0, 1)],
        "qwen-image": ["transformer_blocks.0.attn joint", "transformer_blocks.1.attn joint"],
        "wan": [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn1 self", "attn2 cross")],
    }
    depth = {"sd15": 1, "sdxl": 2}.get(family, 0)
    places = (
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    )
    unet = [
        f"{place}.transformer_blocks.{i}.{name}"
        for place in places
        for i in range(depth)
        for name in ("attn1 self", "attn2 cross")
    ]
    assert [f"{layer.name} {layer.kind}" for layer in probe.layers] == expected.get(family, unet)


def test_queries_of_zero_look_at_all_their_keys_alike(family, network):
    """So a layer's entropy is the logarithm of how many keys it has. Only the image's queries are made zero."""
    network, inputs = network
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if ".to_q." in name:
                weight.zero_()
    texts = torch.tensor([TEXT, 3 if family == "qwen-image" else TEXT])  # the second prompt's last two are masked there
    everything = {}
    for keys in ("all", "image", "text"):
        with AttentionProbe(network, keys=keys) as probe:
            run(network, inputs)
        for value, layer in zip(probe.entropy(), probe.layers, strict=True):
            images = IMAGE // 4 if layer.name.startswith("mid_block") else IMAGE
            in_all = {"joint": images + texts, "self": images, "cross": texts}[layer.kind]
            expected = torch.as_tensor({"all": in_all, "image": images, "text": texts}[keys])
            torch.testing.assert_close(value, expected.log().expand(2), atol=1e-5, rtol=0)
            everything.setdefault(layer.kind, set()).add(keys)
    assert everything == {
        kind: {"all", *of}
        for kind, of in {"joint": ("image", "text"), "self": ("image",), "cross": ("text",)}.items()
        if kind in everything
    }
    with AttentionProbe(network, keys="all", normalise=True) as probe:
        run(network, inputs)
    torch.testing.assert_close(probe.entropy(), torch.ones(len(probe.layers), 2), atol=1e-5, rtol=0)


TEXT_FIRST = {"sd3": False, "flux": True, "qwen-image": True}


@pytest.mark.parametrize("queries", ["image", "text"])
@pytest.mark.parametrize("keys", ["image", "text", "all"])
def test_tokens_of_joint_layers_are_those_the_network_put_there(family, network, queries, keys, monkeypatch):
    network, inputs = network
    if family not in TEXT_FIRST:
        with AttentionProbe(network, queries="text", keys=keys) as probe:
            run(network, inputs)
        with pytest.raises(ValueError, match=f"no attention layer has run that has text queries and {keys} keys"):
            probe.entropy()
        return
    with AttentionProbe(network, queries=queries, keys=keys) as probe:
        run(network, inputs)
    values = [v for v, layer in zip(probe.entropy(), probe.layers, strict=True) if layer.kind == "joint"]
    texts = slice(TEXT) if TEXT_FIRST[family] else slice(IMAGE, None)
    images = slice(TEXT, None) if TEXT_FIRST[family] else slice(IMAGE)
    where = {"image": images, "text": texts, "all": slice(None)}
    calls = calls_of_attention(monkeypatch)
    run(network, inputs)
    expected = [
        entropy64(
            q[:, :, where[queries]], k[:, :, where[keys]], mask=mask if mask is None else mask[..., where[keys]]
        ).mean((1, 2))
        for q, k, mask in calls
        if q.shape[2] == IMAGE + TEXT
    ]
    torch.testing.assert_close(torch.stack(values).double(), torch.stack(expected), atol=1e-5, rtol=0)


def test_rows_are_evenly_spaced_from_the_first_to_the_last(family, network, monkeypatch):
    network, inputs = network
    values = {}
    for rows in (1, 4, 64):
        with AttentionProbe(network, queries="image", rows=rows) as probe:
            run(network, inputs)
        values[rows] = probe.entropy()
    calls = calls_of_attention(monkeypatch)
    run(network, inputs)
    for rows, places in ((1, [0]), (4, [0, 5, 10, 15]), (64, list(range(16)))):
        for value, layer, (q, k, mask) in zip(values[rows], probe.layers, calls, strict=True):
            if layer.name.startswith("mid_block"):
                continue
            first = TEXT if TEXT_FIRST.get(family) else 0
            expected = entropy64(q[:, :, [first + i for i in places]], k, mask=mask).mean((1, 2))
            torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=0)


def test_some_layers_can_be_watched_and_each_half_of_a_doubled_batch(family, network):
    network, inputs = network
    with AttentionProbe(network) as probe:
        run(network, inputs)
    both = probe.entropy()
    names = [layer.name for layer in probe.layers]
    assert len(set(names)) == len(names)
    with AttentionProbe(network, layers=(names[-1],)) as probe:  # for FLUX, one whose tokens only others tell apart
        run(network, inputs)
    torch.testing.assert_close(probe.entropy(), both[-1:], atol=0, rtol=0)
    assert [layer.name for layer in probe.layers] == names[-1:]
    for which, half in enumerate(("unconditional", "conditional")):
        with AttentionProbe(network, half=half) as probe:
            run(network, inputs)
        torch.testing.assert_close(probe.entropy(), both[:, which : which + 1], atol=1e-6, rtol=0)


def test_two_forwards_are_read_one_after_the_other(family, network):
    network, inputs = network
    other = inputs | {"timestep": inputs["timestep"].flip(0)}
    with AttentionProbe(network) as probe:
        run(network, inputs)
        first = probe.entropy()
        run(network, other)
        second = probe.entropy()
        run(network, inputs)
        run(network, other)
    both = probe.entropy()
    assert torch.equal(both, torch.cat([first, second]))
    assert not torch.equal(first, second)
    run(network, inputs)  # outside, nothing is read
    with pytest.raises(ValueError, match="no attention layer has run"):
        probe.entropy()


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_is_not_read_again_and_gradients_stay(family, network, reentrant):
    network, inputs = network
    weights = {name: weight for name, weight in network.named_parameters() if "attn" in name and weight.ndim > 1}

    def gradients(probed):
        network.train()
        network.zero_grad()
        for name in ("hidden_states", "sample", "encoder_hidden_states"):  # or a reentrant checkpoint has no gradient
            if name in inputs:
                inputs[name].requires_grad_()
        with AttentionProbe(network) if probed else nullcontext() as probe:
            network(**inputs)[0].square().mean().backward()
        found = {name: w.grad.clone() for name, w in weights.items() if w.grad is not None and w.grad.any()}
        return probe and probe.entropy(), found

    once, plain = gradients(probed=True)
    assert once is not None and not once.requires_grad
    network.enable_gradient_checkpointing(lambda *args: checkpoint(*args, use_reentrant=reentrant))
    again, checkpointed = gradients(probed=True)
    assert torch.equal(once, again)
    _, unprobed = gradients(probed=False)
    assert plain.keys() == unprobed.keys() == checkpointed.keys() and plain
    for name, gradient in unprobed.items():
        assert torch.equal(checkpointed[name], gradient)
        torch.testing.assert_close(plain[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_compiled_network_is_read_and_stays_compiled(family, network):
    network, inputs = network
    with AttentionProbe(network) as probe:
        plain = run(network, inputs)
    expected, compiled = probe.entropy(), []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    for block in blocks(network):
        block.compile(backend=backend)
    torch.testing.assert_close(run(network, inputs), plain, atol=1e-5, rtol=1e-5)
    count = len(compiled)
    with AttentionProbe(network) as probe:
        probed = run(network, inputs)
    assert torch.equal(probed, plain) and torch.equal(probe.entropy(), expected)
    assert count == len(compiled) > 0
    run(network, inputs)
    assert count == len(compiled)  # as it was compiled, so it runs afterwards

    whole = torch.compile(network, backend=backend)
    with AttentionProbe(whole) as probe:
        run(whole, inputs)
    assert torch.equal(probe.entropy(), expected)
    assert not any("_orig_mod" in layer.name for layer in probe.layers)


def blocks(network):
    """What a user compiles one by one: the modules that hold an attention layer themselves."""
    return [part for part in network.modules() if any(isinstance(child, KINDS) for child in part.children())]


@pytest.mark.parametrize("family", ["flux", "qwen-image", "wan"])
@pytest.mark.parametrize("backend", ["flex", "_native_math"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # which is faster, and not for tests
def test_what_bypasses_torchs_attention_is_read_at_the_dispatcher(network, backend, monkeypatch):
    """Flex attention never calls `scaled_dot_product_attention`, and the native ones are not read twice."""
    network, inputs = network
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    inputs.pop("encoder_hidden_states_mask", None)
    with AttentionProbe(network, queries="all") as probe:
        run(network, inputs)
    native = probe.entropy()
    network.set_attention_backend(backend)
    plain = run(network, inputs)
    with AttentionProbe(network, queries="all") as probe:
        assert torch.equal(run(network, inputs), plain)
    torch.testing.assert_close(probe.entropy(), native, atol=1e-4, rtol=0)


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)])
@pytest.mark.parametrize("family", ["sd15"])
def test_attention_that_hides_its_keys_is_named_with_a_remedy_that_works(network, processor):
    network, inputs = network
    network.set_attn_processor(processor)
    with (
        pytest.raises(
            ValueError, match=rf"attn1 computes its attention by {type(processor).__name__}, .*\(AttnProcessor2_0\(\)\)"
        ),
        AttentionProbe(network),
    ):
        run(network, inputs)
    run(network, inputs)  # nothing of the probe is left
    with AttentionProbe(network, layers=("*.attn2",)) as probe, pytest.raises(ValueError, match="attn2 computes"):
        run(network, inputs)
    network.set_attn_processor(AttnProcessor2_0())
    with AttentionProbe(network) as probe:
        run(network, inputs)
    assert probe.entropy().isfinite().all()


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_an_error_may_be_caught_and_the_forward_tried_again(network):
    network, inputs = network
    attention = network.transformer_blocks[0].attn

    def fail(*_):
        hook.remove()
        raise MemoryError

    hook = attention.to_out[0].register_forward_hook(fail)
    with AttentionProbe(network) as probe:
        with pytest.raises(MemoryError):
            run(network, inputs)
        probe.entropy()  # what the layer was read before it failed
        run(network, inputs)
        again = probe.entropy()
    assert torch._C._len_torch_function_stack() == 0  # nothing watches torch any more
    with AttentionProbe(network) as probe:
        run(network, inputs)
    assert torch.equal(again, probe.entropy())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"queries": "images"}, "queries must be one of image, text, all, not 'images'"),
        ({"keys": "latent"}, "keys must be one of image, text, all, not 'latent'"),
        ({"half": "first"}, "half must be one of both, unconditional, conditional, not 'first'"),
        ({"rows": 0}, "rows must be a whole number of at least 1, not 0"),
        ({"rows": 1.5}, "rows must be a whole number of at least 1, not 1.5"),
        ({"layers": "blocks.*"}, r"layers must be a sequence of names, such as \('blocks.\*',\), not 'blocks.\*'"),
        ({"layers": 3}, r"layers must be a sequence of names, such as \('trans.*',\), not 3"),
        ({"network": object()}, "network must be a module, such as pipe.transformer, not object"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        AttentionProbe(**{"network": torch.nn.Linear(2, 2)} | options)


@pytest.mark.parametrize("family", ["sd3"])
def test_what_cannot_be_read_is_said(network):
    network, inputs = network
    with (
        pytest.raises(ValueError, match=r"is named 'blocks\.\*'; 'transformer_blocks.0.attn' is one"),
        AttentionProbe(network, layers=("transformer_blocks.0.*", "blocks.*")),
    ):
        pass
    with pytest.raises(ValueError, match="Linear has no attention layer"), AttentionProbe(torch.nn.Linear(2, 2)):
        pass
    with torch.no_grad():
        for layer in (network.transformer_blocks[0].attn.to_v, network.transformer_blocks[0].attn.add_v_proj):
            layer.weight.zero_()
            layer.bias.zero_()
    with (
        pytest.raises(ValueError, match=r"blocks\.0\.attn does not show where its image and its text tokens stand"),
        AttentionProbe(network),
    ):
        run(network, inputs)


class Layers(torch.nn.Module):
    """Attention layers one after the other, given what `told` says: a network of a kind of its own."""

    def __init__(self, told, **options):
        super().__init__()
        self.told, self.attn = told, Attention(8, heads=2, dim_head=4, **options)

    def forward(self, hidden_states, encoder_hidden_states):
        return self.told(self.attn, hidden_states, encoder_hidden_states)


GIVEN = {"hidden_states": torch.randn(1, 16, 8), "encoder_hidden_states": torch.randn(1, 5, 8)}


def joined_outside(attn, image, text):  # as Z-Image does it
    return attn(torch.cat([image, text], 1))


def joined_and_given_twice(attn, image, text):  # as Lumina does it
    both = torch.cat([image, text], 1)
    return attn(both, encoder_hidden_states=both)


def refined_first(attn, image, text):  # as HunyuanVideo does it: the text looks at itself
    return attn(image, encoder_hidden_states=text) + attn(text).mean()


@pytest.mark.parametrize("told", [joined_outside, joined_and_given_twice, refined_first])
def test_tokens_that_nothing_shows_to_be_the_images_are_not_taken_for_them(told, monkeypatch):
    network = Layers(told)
    with torch.no_grad(), AttentionProbe(network) as probe:
        network(**GIVEN)
    with pytest.raises(
        ValueError, match=r"nothing in Layers shows that the \d+ tokens of attn are the image's; .* all"
    ):
        probe.entropy()
    assert_all_is_read(network, monkeypatch)


def assert_all_is_read(network, monkeypatch):
    """Every call of attention, in order and exactly; returns the layers."""
    with torch.no_grad(), AttentionProbe(network, queries="all") as probe:
        network(**GIVEN)
    calls = calls_of_attention(monkeypatch)
    network(**GIVEN)
    expected = torch.stack([entropy64(q, k).mean((1, 2)) for q, k, _ in calls])
    torch.testing.assert_close(probe.entropy().double(), expected, atol=1e-5, rtol=0)
    return probe.layers


class Twice(AttnProcessor2_0):
    """As for an image prompt beside the text."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, **_):
        return super().__call__(attn, hidden_states, encoder_hidden_states) + super().__call__(attn, hidden_states)


class SampleBySample(AttnProcessor2_0):
    """As Mochi does it, to leave padding out."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, **_):
        pairs = zip(hidden_states.split(1), encoder_hidden_states.split(1), strict=True)
        return torch.cat([AttnProcessor2_0()(attn, *pair) for pair in pairs])


@pytest.mark.parametrize("processor", [Twice(), SampleBySample()])
def test_a_layer_that_attends_more_than_once_is_refused(processor):
    network = Layers(lambda attn, image, text: attn(image, encoder_hidden_states=text), processor=processor)
    given = {name: tokens.expand(2, -1, -1) for name, tokens in GIVEN.items()}
    with pytest.raises(ValueError, match="attn attends more than once, or sample by sample"), AttentionProbe(network):
        network(**given)


class Within(AttnProcessor2_0):
    """A layer that calls another one, which is a part of it, before it attends itself."""

    def __call__(self, attn, hidden_states, **_):
        return super().__call__(attn, attn.inner(hidden_states))


def test_a_layer_inside_another_is_read_and_so_is_the_other(monkeypatch):
    network = Layers(lambda attn, image, text: attn(image), processor=Within())
    network.attn.inner = Attention(8, heads=2, dim_head=4)
    assert [layer.name for layer in assert_all_is_read(network, monkeypatch)] == ["attn.inner", "attn"]


def test_a_network_that_is_itself_a_layer_and_holds_another_is_read():
    network = Attention(8, heads=2, dim_head=4, processor=Within())
    network.inner = Attention(8, heads=2, dim_head=4)
    with torch.no_grad(), AttentionProbe(network, queries="all") as probe:
        network(GIVEN["hidden_states"])
    assert len(probe.entropy()) == 2
    assert [layer.name for layer in probe.layers] == ["inner", ""]


def test_a_layer_may_leave_all_attending_to_one_inside_it():
    network = Layers(lambda attn, image, text: attn(image), processor=lambda attn, hidden, **_: attn.inner(hidden))
    network.attn.inner = Attention(8, heads=2, dim_head=4)
    with torch.no_grad(), AttentionProbe(network, queries="all") as probe:
        network(**GIVEN)
    probe.entropy()
    assert [layer.name for layer in probe.layers] == ["attn.inner"]


def test_attention_that_is_no_layers_is_not_read_after_a_layer_has_failed():
    network = Layers(lambda attn, image, text: attn(image, encoder_hidden_states=text))
    failing = network.attn.to_q.register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad(), AttentionProbe(network) as probe:
        with pytest.raises(ZeroDivisionError):
            network(**GIVEN)
        failing.remove()
        F.scaled_dot_product_attention(*[torch.randn(1, 2, 7, 4)] * 3)
        network(**GIVEN)
    assert len(probe.entropy()) == 1
    assert [layer.queries for layer in probe.layers] == [16]


def test_nothing_of_a_probe_is_left_when_it_ends_or_fails():
    network = Layers(lambda attn, image, text: attn(image, encoder_hidden_states=text))
    backends = dict(_AttentionBackendRegistry._backends)
    with AttentionProbe(network) as probe:
        network(**GIVEN)
        assert _AttentionBackendRegistry._backends != backends
        assert network.attn._forward_pre_hooks and network.attn._forward_hooks
    for error in (None, ZeroDivisionError):
        if error:
            with pytest.raises(error), AttentionProbe(network) as probe:
                network.attn.register_forward_pre_hook(lambda *_: 1 / 0)
                network(**GIVEN)
            network.attn._forward_pre_hooks.clear()
        assert _AttentionBackendRegistry._backends == backends
        assert not network.attn._forward_pre_hooks and not network.attn._forward_hooks
        F.scaled_dot_product_attention(*[torch.randn(1, 2, 5, 4)] * 3)
        assert len(probe._read) == (error is None)


@pytest.mark.parametrize("backend", ["native", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_mask_of_keys_at_the_dispatcher_is_each_samples_own(backend):
    """(B, keys), as some backends take it, is not (queries, keys), though both are two numbers."""

    class Dispatched:
        _attention_backend = None

        def __call__(self, attn, hidden_states, **_):
            q, k, v = (
                x.unflatten(2, (2, 4)) for x in (attn.to_q(hidden_states), attn.to_k(hidden_states), hidden_states)
            )
            return dispatch_attention_fn(q, k, v, attn_mask=seen, backend=backend).flatten(2)

    seen = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    network = torch.nn.Sequential(Attention(8, heads=2, dim_head=4, processor=Dispatched()))
    hidden = torch.randn(2, 6, 8)
    with torch.no_grad(), AttentionProbe(network, queries="all") as probe:
        network(hidden)
        q, k = (f(hidden).unflatten(2, (2, 4)).transpose(1, 2) for f in (network[0].to_q, network[0].to_k))
    expected = entropy64(q, k, mask=seen[:, None, None]).mean((1, 2))
    torch.testing.assert_close(probe.entropy()[0].double(), expected, atol=1e-5, rtol=0)


def test_scale_causal_masks_and_grouped_heads_are_read_as_torch_takes_them():
    """An attention layer whose processor hands over whatever it is told to."""
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    options = {}

    class Processor:
        def __call__(self, attn, hidden_states, **_):
            F.scaled_dot_product_attention(q, k, k, **options)
            return hidden_states

    network = torch.nn.Sequential(Attention(8, heads=2, dim_head=4, processor=Processor()))
    wide = k.repeat_interleave(2, 1)
    bias = torch.randn(1, 4, 6, 6)
    for given, expected in (
        ({"enable_gqa": True}, entropy64(q, wide)),
        ({"enable_gqa": True, "scale": 0.9}, entropy64(q, wide, 0.9)),
        ({"enable_gqa": True, "is_causal": True}, entropy64(q, wide, mask=torch.ones(6, 6).tril().bool())),
        ({"enable_gqa": True, "attn_mask": bias}, entropy_of(q.double() @ wide.double().mT * 8**-0.5 + bias)),
    ):
        options = given
        with AttentionProbe(network, queries="all") as probe:
            network(torch.zeros(1, 6, 8))
        torch.testing.assert_close(probe.entropy()[0].double(), expected.mean((1, 2)), atol=1e-5, rtol=0)


def entropy_of(logits):
    return torch.special.entr(logits.softmax(-1)).sum(-1)
