"""Small random-weight networks of each family, built from diffusers' own classes, with something to run them on."""

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)

IMAGE, TEXT = 16, 5  # tokens


def sd3():
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return network, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([700.0, 300.0]),
    }


def flux():
    network = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    places = torch.zeros(IMAGE, 3)
    places[:, 1:] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return network, {
        "hidden_states": torch.randn(2, IMAGE, 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.7, 0.3]),
        "img_ids": places,
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.full((2,), 3.5),
    }


def unet(**more):
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    )


def unet_inputs():
    return {
        "sample": torch.randn(2, 4, 4, 4),
        "timestep": torch.tensor([700, 300]),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
    }


def sd15():
    return unet(), unet_inputs()


def sdxl():
    network = unet(
        use_linear_projection=True,
        transformer_layers_per_block=(2, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
    )
    added = {"text_embeds": torch.randn(2, 10), "time_ids": torch.randn(2, 6)}
    return network, unet_inputs() | {"added_cond_kwargs": added}


def qwen_image():
    network = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 8),
    )
    seen = torch.ones(2, TEXT, dtype=torch.bool)
    seen[1, 3:] = False  # the second prompt is shorter
    return network, {
        "hidden_states": torch.randn(2, IMAGE, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "encoder_hidden_states_mask": seen,
        "timestep": torch.tensor([0.7, 0.3]),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


def wan():
    network = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )
    return network, {
        "hidden_states": torch.randn(2, 4, 2, 4, 8),  # two frames of 2 x 4 tokens
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "timestep": torch.tensor([700, 300]),
    }


FAMILIES = {"sd3": sd3, "flux": flux, "sd15": sd15, "sdxl": sdxl, "qwen-image": qwen_image, "wan": wan}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def network(family):
    """A network with weights large enough for attention to be far from uniform, and its inputs for two prompts."""
    torch.manual_seed(0)
    network, inputs = FAMILIES[family]()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.copy_(
                    torch.randn_like(weight)
                    * (3.0 if ".to_q" in name or "add_q" in name else 1.0)
                    / weight[0].numel() ** 0.5
                )
    return network.eval(), inputs
