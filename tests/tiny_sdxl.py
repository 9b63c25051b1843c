"""A random StableDiffusionXLPipeline of a few hundred kilobytes, of a family that the engine does not have."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny import tiny_clip_config, tiny_tokenizer, tiny_vae


def save_tiny_sdxl(folder: Path) -> Path:
    """Save the pipeline, float32, images of 32 pixels by default; returns `folder`."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = tiny_clip_config(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=16 + 6 * 8,
        cross_attention_dim=32,
    )
    StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.13025, shift_factor=0.0),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)
    return folder


def save_unet_lora(pipeline: Path, folder: Path, seed: int) -> Path:
    """Save a random LoRA of the pipeline's attention, as diffusers saves one; returns `folder`."""
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    own = StableDiffusionXLPipeline.from_pretrained(pipeline)
    own.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(own.unet)
    state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=state)
    return folder
