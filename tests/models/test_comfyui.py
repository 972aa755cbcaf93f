"""What is exported for ComfyUI, by ComfyUI's own rule and by diffusers' readers of the same layouts."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from aegpo import models, use
from aegpo.config import Config, Lora, Model, dump_yaml
from aegpo.models.comfyui import for_comfyui, layer_name
from tests.models.pipelines import PIPELINES
from tests.models.pipelines import build as build_pipeline
from tests.models.test_families import EULER, called, noise_like, plain

FEED_FORWARD = {"wan": ("ffn.net.0.proj", "ffn.net.2"), "sdxl": ("ff.net.0.proj", "ff.net.2"), "sd3": ("ff.net.2",)}
U_NETS = ("sd15", "sd21-v", "sdxl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {name: str(build_pipeline(name, root / name)) for name in PIPELINES}


def adapted(folders, name, run, targets=()):
    """A run's folder, with random weights of a small adapter whose scale is 3 in it; and the model."""
    lora = Lora(rank=4, alpha=12, targets=targets)
    settings = Model(path=folders[name], resolution=16, frames=5 if name == "wan" else 0, dtype="float32", lora=lora)
    model = models.load(settings)
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable.values()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(Config(model=settings)))
    model.save(run)
    return model


def deltas(file):
    """What ComfyUI adds to a weight, by the name in the file: alpha / rank, or 1, times up @ down."""
    weights = load_file(file)
    ends = [(".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")]
    found = {}
    for up, down in ends:
        for name in [key.removesuffix(up) for key in weights if key.endswith(up)]:
            a, b = weights.pop(name + down), weights.pop(name + up)
            alpha = weights.pop(f"{name}.alpha", None)
            found[name] = (1.0 if alpha is None else alpha.item() / a.shape[0]) * b @ a
    assert not weights
    return found


def in_comfyui(name, layer):
    """The name by which ComfyUI looks for a layer, as written down from its tables."""
    if name in U_NETS:
        return "lora_unet_" + layer.replace(".", "_")
    if name not in ("wan", "qwen-image"):
        return f"transformer.{layer}"
    for theirs, native in [
        ("attn1.to_out.0", "self_attn.o"),
        ("attn1.to_", "self_attn."),
        ("attn2.to_out.0", "cross_attn.o"),
        ("attn2.to_", "cross_attn."),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
    ]:
        layer = layer.replace(theirs, native) if name == "wan" else layer
    return f"diffusion_model.{layer}"


@pytest.mark.parametrize("name", PIPELINES)
def test_comfyui_adds_to_every_adapted_weight_what_peft_adds(name, folders, tmp_path):
    targets = FEED_FORWARD.get(name, ())
    if targets:
        targets = (*targets, "to_q", "to_k", "to_v", "to_out.0")
    model = adapted(folders, name, tmp_path / "run", targets)
    use.export(tmp_path / "run", tmp_path / "there" / "x.safetensors")
    found = deltas(tmp_path / "there" / "x.safetensors")
    layers = {n: layer for n, layer in model.network.named_modules() if isinstance(layer, LoraLayer)}
    assert found.keys() == {in_comfyui(name, layer) for layer in layers}
    for n, layer in layers.items():
        delta = layer.get_delta_weight("default")
        assert delta.abs().max() > 1e-2
        torch.testing.assert_close(found[in_comfyui(name, n)], delta, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings(EULER)
@pytest.mark.parametrize("name", ["flux", "flux-schnell", "sd15", "sd21-v", "sdxl", "qwen-image", "wan"])
def test_diffusers_draws_the_same_from_the_exported_file(name, folders, tmp_path):
    """Of those layouts whose alpha diffusers reads: it refuses it in SD3's and FLUX.2's."""
    model = adapted(folders, name, tmp_path / "run")
    use.export(tmp_path / "run", tmp_path / "x.safetensors")
    drawn = []
    for file in (None, tmp_path / "run" / "pytorch_lora_weights.safetensors", tmp_path / "x.safetensors"):
        pipe = plain(folders[name], name)
        if file:
            pipe.load_lora_weights(str(file))
        drawn.append(torch.from_numpy(called(pipe, name, noise_like(model, 2), 2.0)))
    base, own, exported = drawn
    assert (own - base).abs().max() > 1e-2
    assert (exported - own).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["sd3", "flux2-klein"])
def test_diffusers_does_not_read_alpha_beside_the_names_of_the_others(name, folders, tmp_path):
    """So the test above leaves them out; once this fails it need not."""
    adapted(folders, name, tmp_path / "run")
    use.export(tmp_path / "run", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"Invalid (LoRA|adapter) checkpoint"):
        plain(folders[name], name).load_lora_weights(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("family", "layer", "name"),
    [  # by ComfyUI's unet_to_diffusers, mmdit_to_diffusers and flux_to_diffusers, and its Qwen-Image and Wan networks
        ("sd3", "transformer_blocks.0.attn2.to_q", "transformer.transformer_blocks.0.attn2.to_q"),
        ("flux", "single_transformer_blocks.3.proj_mlp", "transformer.single_transformer_blocks.3.proj_mlp"),
        (
            "flux2_klein",
            "single_transformer_blocks.3.attn.to_qkv_mlp_proj",
            "transformer.single_transformer_blocks.3.attn.to_qkv_mlp_proj",
        ),
        (
            "unet",
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
        ),
        ("qwen_image", "transformer_blocks.0.attn.to_q", "diffusion_model.transformer_blocks.0.attn.to_q"),
        ("wan", "blocks.12.attn2.to_out.0", "diffusion_model.blocks.12.cross_attn.o"),
        ("wan", "blocks.12.ffn.net.0.proj", "diffusion_model.blocks.12.ffn.0"),
    ],
)
def test_names_of_layers(family, layer, name):
    assert layer_name(family, layer) == name


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("flux2_klein", "double_stream_modulation_img.linear"),
        ("flux2_klein", "time_guidance_embed.timestep_embedder.linear_1"),
        ("wan", "condition_embedder.time_proj"),
        ("wan", "blocks.0.attn2.add_k_proj"),
    ],
)
def test_a_layer_that_comfyui_has_no_known_name_for_is_refused(family, layer):
    weights = {f"transformer.{layer}.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}
    with pytest.raises(ValueError, match=f"ComfyUI has for the adapted layer {layer} of {family}"):
        for_comfyui(weights, family, 1)


def test_a_run_of_all_weights_and_one_without_weights_are_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(Config()))
    with pytest.raises(ValueError, match=r"has no weights yet: pytorch_lora_weights\.safetensors is missing"):
        use.export(tmp_path, tmp_path / "x.safetensors")
    (tmp_path / "config.yaml").write_text(dump_yaml(Config(model=Model(train="full"))))
    with pytest.raises(ValueError, match="trained all weights, and export is of a LoRA adapter"):
        use.export(tmp_path, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
