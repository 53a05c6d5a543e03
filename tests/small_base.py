"""A whole small world for the tests of the method: a random base, body encoder, training shards and family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

IMAGE_SIZE = (64, 48)
LATENT_CHANNELS = 4


def make_base(path: Path, prediction_type: str = "v_prediction", levels: int = 2) -> Path:
    """A random StableDiffusionPipeline directory for 64x48 pictures: latents of 4 channels at 16x12.

    `levels` of the UNet: 2, or 1 without a middle, which has the fewest kernels to compile.
    """
    import torch
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=(16, 12), in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, layers_per_block=1,
        block_out_channels=(16, 32)[:levels], norm_num_groups=8, cross_attention_dim=24, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[:levels],
        mid_block_type="UNetMidBlock2DCrossAttn" if levels > 1 else None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[:levels],
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), latent_channels=LATENT_CHANNELS,
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=24)
    start, end = len(words) - 2, len(words) - 1
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=24,
            projection_dim=24,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    scheduler = DDIMScheduler(
        prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing", steps_offset=1
    )
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(path / "pipeline")  # fmt: skip
    return path / "pipeline"


def make_sdxl_base(path: Path) -> Path:
    """A random StableDiffusionXLPipeline directory with the VAE, tokenizer and text encoder of the base above."""
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    small = StableDiffusionPipeline.from_pretrained(make_base(path), safety_checker=None)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=(16, 12), in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(16, 32),
        norm_num_groups=8, cross_attention_dim=48, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8,
        use_linear_projection=True,
    )  # fmt: skip
    second = CLIPTextModelWithProjection(CLIPTextConfig(**small.text_encoder.config.to_dict()))
    StableDiffusionXLPipeline(
        vae=small.vae, text_encoder=small.text_encoder, text_encoder_2=second, tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer, unet=unet, scheduler=small.scheduler,
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    ).save_pretrained(path / "xl")  # fmt: skip
    return path / "xl"


def make_family(root: Path, sdxl: bool = False, levels: int = 2) -> str:
    """A family of a base above; its other models are added by whoever needs them. Returns its --family name."""
    base = make_sdxl_base(root) if sdxl else make_base(root, levels=levels)
    file = root / "small.toml"
    file.write_text(
        f"image_size = [{IMAGE_SIZE[0]}, {IMAGE_SIZE[1]}]\n[defaults]\nsteps = 2\nguidance = 3.0\n"
        f"[paths]\nbase = '{base}'\n"
    )
    return str(file)


def make_body_encoder(path: Path, family: str, body_dim: int = 8, seed: int = 1) -> Path:
    """A random body encoder."""
    import torch

    from bolid.backends.body import save_body_encoder
    from bolid.method.body_vae import BodyVAE
    from bolid.run import run_record
    from bolid.train_vae import TrainVaeConfig

    torch.manual_seed(seed)
    config = TrainVaeConfig(body_dim=body_dim, width=4)
    model = BodyVAE(body_dim, config.width).eval()
    save_body_encoder(path, model, run_record("body-encoder", family=family, config=config, seed=0))
    return path


def make_training_shards(path: Path, family: str, people: int = 3, photos: int = 4) -> Path:
    """Training shards of noise."""
    from bolid.formats.images import encode_jpeg
    from bolid.formats.shards import Sample, ShardWriter, sample_key
    from bolid.run import run_record

    rng = np.random.default_rng(0)
    height, width = IMAGE_SIZE
    writer = ShardWriter(path, run_record("training-shards", family=family, seed=0))
    for person in range(people):
        samples = []
        for number in range(photos):
            keypoints = rng.uniform(0.1, 0.9, (17, 3)).astype(np.float32) * np.array([width, height, 1], np.float32)
            keypoints[:, 2] = rng.uniform(0.5, 1, 17)
            samples.append(
                Sample(
                    key=sample_key(f"p{person}", f"{person:08x}{number:08x}"),
                    image=encode_jpeg(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
                    meta={"person": f"p{person}", "width": width, "height": height, "box": [2.0, 2.0, 40.0, 60.0]},
                    caption=f"a photo of a tall slim woman, {number}",
                    tensors={
                        "keypoints": keypoints,
                        "image_embed": np.eye(16, dtype=np.float32)[(person + number) % 16],
                        "face": (v := rng.normal(size=512)).astype(np.float32) / np.float32(np.linalg.norm(v)),
                        "latents": np.stack([rng.normal(size=(4, 16, 12)), np.zeros((4, 16, 12))]).astype(np.float16),
                    },
                )
            )
        writer.write_group(samples)
    writer.close()
    return path
