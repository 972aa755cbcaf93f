"""Small random-weight pipelines of each family, built from diffusers' and transformers' own classes: no network hub.

Sixteen pixels a side are eight latents a side, and four tokens a side where the family packs latents in 2 x 2 patches.
"""

import json
import string
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from aegpo import world

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
NORMALISE = {"latents_mean": [-0.8, 0.1, 0.5, 1.0], "latents_std": [2.8, 1.5, 0.6, 2.0]}

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<think>", "</think>"]

# Qwen-Image cuts 34 tokens off the head of its template: its words are one token each here too, as in Qwen's own.
WORDS = "system user assistant Describe the image by detailing color shape size texture quantity text spatial"
WORDS += " relationships of objects and background"

CHAT = (  # Qwen3's template, of a conversation without tools
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)


@contextmanager
def seeded():
    """The same random numbers every time, without disturbing those outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def drawn(network):
    """The network with weights large enough for attention to be far from uniform, and for every input to matter."""
    queries = (".to_q", "add_q", "norm_q", "norm_added_q", "q_proj")
    with torch.no_grad():
        for name, weight in network.named_parameters():
            sharp = 3.0 if any(query in name for query in queries) else 1.0
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * sharp / weight[0].numel() ** 0.5)
            elif name.endswith(".weight"):  # of a norm
                weight.copy_(sharp * (1 + 0.1 * torch.randn_like(weight)))
    return network.eval()


def clip_tokenizer(**more):
    """The embedded pipeline's tokenizer, of 20 tokens at most."""
    return CLIPTokenizer.from_pretrained(world.path() / "tokenizer", **more)


def clip(tokenizer, width, projected=False, act="quick_gelu"):
    """A CLIP text encoder, with a projection of its pooled output or without."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return drawn((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def clips(width, width_2, projected):
    """Two CLIP tokenizers and encoders, as SDXL and SD3 have: the second pads with "!", and is projected."""
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(pad_token="!")
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": clip(tokenizer, width, projected),
        "text_encoder_2": clip(tokenizer_2, width_2, projected=True, act="gelu"),
    }


def t5_tokenizer():
    """T5's tokenizer, of single characters."""
    letters = string.ascii_letters + string.digits + string.punctuation
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -4.0) for letter in letters)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def t5(tokenizer, width, config=T5Config, encoder=T5EncoderModel):
    """A T5 encoder, of T5 v1.1's form or of UMT5's."""
    return drawn(
        encoder(
            config(
                vocab_size=len(tokenizer),
                d_model=width,
                d_kv=8,
                d_ff=2 * width,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        )
    )


def qwen_tokenizer(**more):
    """Qwen's byte-level tokenizer, with merges for the words of its templates only."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([form for word in WORDS.split() for form in (word, " " + word)], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges, extra_special_tokens=SPECIAL, **more)


def qwen(tokenizer, layers):
    """What Qwen's language models of either kind are made with: 8 wide, and so many layers."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }


def kl(latent_channels, quant=True, **more):
    """A Stable Diffusion or Flux autoencoder, which halves each side."""
    return drawn(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=16,
            use_quant_conv=quant,
            use_post_quant_conv=quant,
            **more,
        )
    )


def causal(autoencoder, **more):
    """A Wan or Qwen-Image autoencoder, which halves each side and the frames after the first."""
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
    return drawn(autoencoder(**sizes, **NORMALISE, **more))


def unet(text, types=("CrossAttnDownBlock2D", "DownBlock2D"), **more):
    """A U-Net for latents of 8 x 8; the blocks upwards mirror those downwards."""
    return drawn(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=types,
            up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(types)),
            cross_attention_dim=text,
            norm_num_groups=4,
            **more,
        )
    )


@seeded()
def sd3():
    """Stable Diffusion 3.5 medium's form: second attention in the first layers, and T5."""
    tokenizer_3 = t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=drawn(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl(4, quant=False, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder_3=t5(tokenizer_3, 48),
        tokenizer_3=tokenizer_3,
        **clips(16, 24, projected=True),
    )


def flux_of(guidance, **schedule):
    """FLUX.1's form, with or without guidance as an input."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=drawn(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
        vae=kl(4, quant=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2, 32),
        tokenizer_2=tokenizer_2,
    )


@seeded()
def flux():
    """FLUX.1-dev's form."""
    return flux_of(
        guidance=True,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


@seeded()
def flux_schnell():
    """FLUX.1-schnell's form."""
    return flux_of(guidance=False, shift=1.0, use_dynamic_shifting=False)


def sd_of(scheduler, tokenizer, act="quick_gelu", **more):
    """Stable Diffusion 1's and 2's form."""
    return StableDiffusionPipeline(
        vae=kl(4, scaling_factor=0.18215),
        text_encoder=clip(tokenizer, 16, act=act),
        tokenizer=tokenizer,
        unet=unet(16, **more),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@seeded()
def sd15():
    """Stable Diffusion 1.5's form."""
    rest = {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = PNDMScheduler.from_config(BETAS | rest | {"clip_sample": False})
    return sd_of(scheduler, clip_tokenizer(), attention_head_dim=2)


@seeded()
def sd21_v():
    """Stable Diffusion 2.1's form, which predicts velocities."""
    rest = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "prediction_type": "v_prediction"}
    scheduler = DDIMScheduler(**BETAS, **rest)
    tokenizer = clip_tokenizer(pad_token="!")
    return sd_of(scheduler, tokenizer, act="gelu", attention_head_dim=(2, 4), use_linear_projection=True)


@seeded()
def sdxl():
    """Stable Diffusion XL base's form."""
    network = unet(
        16 + 24,
        types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    return StableDiffusionXLPipeline(
        vae=kl(4, scaling_factor=0.13025),
        unet=network,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        **clips(16, 24, projected=False),
    )


@seeded()
def qwen_image():
    """Qwen-Image's form."""
    tokenizer = qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config=qwen(tokenizer, layers=2) | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1]}},
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "out_hidden_size": 8,
            "fullatt_block_indexes": [0],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift=1.0,
        shift_terminal=0.02,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    )
    return QwenImagePipeline(
        scheduler=scheduler,
        vae=causal(AutoencoderKLQwenImage),
        text_encoder=drawn(Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=tokenizer,
        transformer=drawn(transformer),
    )


@seeded()
def wan():
    """Wan 2.1's form; of 5 frames it makes 3 latent ones."""
    tokenizer = t5_tokenizer()
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer, 16, UMT5Config, UMT5EncoderModel),
        vae=causal(AutoencoderKLWan, scale_factor_temporal=2, scale_factor_spatial=2),
        scheduler=scheduler,
        transformer=drawn(transformer),
    )


@seeded()
def flux2_klein():
    """FLUX.2-klein-base's form, not distilled: the text is read off the layers 9, 18 and 27."""
    tokenizer = qwen_tokenizer(chat_template=CHAT)
    encoder = Qwen3ForCausalLM(Qwen3Config(**qwen(tokenizer, layers=28), head_dim=4, tie_word_embeddings=True))
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 8,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=drawn(vae),
        text_encoder=drawn(encoder),
        tokenizer=tokenizer,
        transformer=drawn(transformer),
        is_distilled=False,
    )


PIPELINES = {
    "sd3": sd3,
    "flux": flux,
    "flux-schnell": flux_schnell,
    "sd15": sd15,
    "sd21-v": sd21_v,
    "sdxl": sdxl,
    "qwen-image": qwen_image,
    "wan": wan,
    "flux2-klein": flux2_klein,
}


def build(name: str, folder: Path) -> Path:
    """The folder, with the pipeline of that name saved in it."""
    PIPELINES[name]().save_pretrained(folder)
    return folder
