"""The forms in which bases come: folders, half precision, single checkpoints, a UNet of their own; and bad files."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from small_base import make_base

from bolid.backends.diffusion import LatentEncoder, choose_dtype, load_base
from bolid.errors import BolidError
from bolid.generate import generate
from bolid.models.families import get_family

SIZE = (64, 48)
PROMPT = "a photo of a woman"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def small_unet(context: int = 24) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=(32, 24), in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(16, 32),
        norm_num_groups=8, cross_attention_dim=context, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A family with a random StableDiffusionPipeline whose VAE is the published bases' kind, AutoencoderKL."""
    root = tmp_path_factory.mktemp("base")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(make_base(root / "parts"), safety_checker=None)
    torch.manual_seed(1)
    pipe.unet = small_unet()
    pipe.vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=pipe.unet,
        scheduler=pipe.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(root / "base")  # fmt: skip
    # The published model_index.json names a safety checker and its preprocessor, which `pull` does not fetch.
    index = json.loads((root / "base" / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index.pop("requires_safety_checker")
    (root / "base" / "model_index.json").write_text(json.dumps(index))
    (root / "mine.toml").write_text(
        f"image_size = [{SIZE[0]}, {SIZE[1]}]\nsizes = [[64, 48], [48, 64]]\n[defaults]\nsteps = 2\nguidance = 3.0\n"
    )
    return root


@pytest.fixture
def family(world):
    return get_family(str(world / "mine.toml"))


def make(family, out, **options) -> np.ndarray:
    return np.asarray(Image.open(generate([PROMPT], out, family=family.name, device="cpu", **options)[0]))


# ---- precision and sizes


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_keeps_the_vae_in_float32(family, tmp_path, dtype):
    pipe = load_base(family, dtype=choose_dtype(dtype, "cpu"))
    assert {p.dtype for p in pipe.unet.parameters()} == {choose_dtype(dtype, "cpu")}
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
    whole, half = make(family, tmp_path / "1"), make(family, tmp_path / "2", dtype=dtype)
    assert half.std() > 0 and 0 < np.abs(whole.astype(float) - half).mean() < 3


def test_choice_of_precision():
    assert choose_dtype("auto", "cpu") == torch.float32 and choose_dtype("auto", "cuda:0") == torch.float16
    with pytest.raises(BolidError, match="--dtype is 'int8'"):
        choose_dtype("int8", "cpu")


def test_size_buckets(family, tmp_path):
    assert make(family, tmp_path / "1", size="64x48").shape == (48, 64, 3)
    for size in ("48x65", "64", "x", "48x48"):
        with pytest.raises(BolidError, match=f"--size is '{size}'") as caught:
            make(family, tmp_path / "2", size=size)
        assert "48x64, 64x48" in caught.value.hint
    for name in ("sd15", "sdxl", "sdxl-lightning"):
        full = get_family(name)
        assert full.image_size in full.sizes and any(h > w for h, w in full.sizes)
        assert all(side % 64 == 0 for size in full.sizes for side in size)
    assert get_family("sdxl").with_size("832x1216").image_size == (1216, 832)


def test_offload_needs_an_accelerator(family, tmp_path):
    with pytest.raises(BolidError, match="--offload spares the memory of an accelerator"):
        make(family, tmp_path / "1", offload=True)


def test_attention_is_not_sliced(family):
    names = {type(p).__name__ for p in load_base(family).unet.attn_processors.values()}
    assert names == {"AttnProcessor2_0"}


def write_half(base: Path, folder: Path) -> None:
    diffusers.StableDiffusionPipeline.from_pretrained(
        base, safety_checker=None, feature_extractor=None, torch_dtype=torch.float16
    ).save_pretrained(folder, variant="fp16")


@pytest.mark.slow
def test_a_folder_of_half_precision_files(world, family, tmp_path):
    """As `bolid models pull` fetches them: *.fp16.safetensors alone."""
    write_half(world / "base", tmp_path / "half")
    assert not (tmp_path / "half" / "unet" / WEIGHTS).exists()
    half = replace(family, base=tmp_path / "half")
    assert load_base(half).unet.dtype == torch.float32
    latents = LatentEncoder(half).encode([np.zeros((*SIZE, 3), np.uint8)])
    np.testing.assert_allclose(latents, LatentEncoder(family).encode([np.zeros((*SIZE, 3), np.uint8)]), atol=0.02)


# ---- single files


def original_layout(base: Path, first_text_encoder: str = "cond_stage_model") -> dict[str, torch.Tensor]:
    """The pipeline's tensors under the names of the original Stable Diffusion code, as single checkpoints have them."""
    tensors = {}
    for name, value in load_file(base / "unet" / WEIGHTS).items():
        tensors["model.diffusion_model." + original_unet(name)] = value
    for name, value in load_file(base / "vae" / WEIGHTS).items():
        name, attention = original_vae(name)
        tensors["first_stage_model." + name] = value[..., None, None] if attention and value.ndim == 2 else value
    for name, value in load_file(base / "text_encoder" / "model.safetensors").items():
        tensors[f"{first_text_encoder}.transformer.text_model." + name.removeprefix("text_model.")] = value
    return {name: value.contiguous() for name, value in tensors.items()}


def original_open_clip(folder: Path) -> dict[str, torch.Tensor]:
    """SDXL's second text encoder, under open_clip's names."""
    theirs = load_file(folder / "model.safetensors")
    tensors = {"text_projection": theirs.pop("text_projection.weight").T}
    for name, value in theirs.items():
        name = name.removeprefix("text_model.")
        for a, b in (("embeddings.token_embedding", "token_embedding"), ("final_layer_norm", "ln_final"),
                     ("embeddings.position_embedding.weight", "positional_embedding"), ("layer_norm", "ln_"),
                     ("encoder.layers", "transformer.resblocks"), ("fc1", "c_fc"), ("fc2", "c_proj"),
                     ("self_attn", "attn")):  # fmt: skip
            name = name.replace(a, b)
        if "_proj." in name and "attn." in name and "out_proj" not in name:
            continue
        tensors[name] = value
    for layer in {name.split("self_attn")[0] for name in theirs if "self_attn" in name}:
        block = layer.removeprefix("text_model.").replace("encoder.layers", "transformer.resblocks")
        for kind in ("weight", "bias"):
            parts = [theirs[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
    return {f"conditioner.embedders.1.model.{name}": value.contiguous() for name, value in tensors.items()}


def original_unet(name: str) -> str:
    whole = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    whole |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    whole |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    whole |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    whole |= {"mid_block.resnets.1": "middle_block.2"}
    for i in range(2):
        for j in range(2):
            whole[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{3 * i + j + 1}.0"
            whole[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{3 * i + j + 1}.1"
        whole[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * (i + 1)}.0.op"
        for j in range(3):
            whole[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{3 * i + j}.0"
            whole[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{3 * i + j}.1"
        whole[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{3 * i + 2}.{2 if i == 0 else 1}"
    for theirs, original in sorted(whole.items(), key=lambda pair: -len(pair[0])):
        if name.startswith(theirs + "."):
            rest = name.removeprefix(theirs)
            if ".resnets." in name:
                for a, b in (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"),
                             ("conv2", "out_layers.3"), ("time_emb_proj", "emb_layers.1"),
                             ("conv_shortcut", "skip_connection")):  # fmt: skip
                    rest = rest.replace(f".{a}.", f".{b}.")
            return original + rest
    raise KeyError(name)


def original_vae(name: str) -> tuple[str, bool]:
    for a, b in (("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
                 ("mid_block.attentions.0", "mid.attn_1"), ("conv_norm_out", "norm_out"),
                 ("conv_shortcut", "nin_shortcut"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
                 ("down_blocks.0", "down.0"), ("down_blocks.1", "down.1"), ("up_blocks.0", "up.1"),
                 ("up_blocks.1", "up.0"), ("resnets", "block")):  # fmt: skip
        name = name.replace(a, b)
    attention = "attn_1" in name
    if attention:
        for a, b in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            name = name.replace(f".{a}.", f".{b}.")
    return name, attention


@pytest.fixture(scope="module")
def single(world):
    save_file(original_layout(world / "base"), world / "community.safetensors")
    return world / "community.safetensors"


@pytest.mark.slow
def test_a_single_checkpoint_generates_what_its_folder_generates(family, single, tmp_path):
    whole = make(family, tmp_path / "1")
    assert np.array_equal(make(family, tmp_path / "2", base=single), whole)
    assert np.array_equal(make(family, tmp_path / "3", base=family.base), whole)
    picture = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    latents = LatentEncoder(family.with_base(single)).encode([picture])
    assert np.array_equal(latents, LatentEncoder(family).encode([picture]))


@pytest.mark.slow
def test_a_single_sdxl_checkpoint_generates_what_its_folder_generates(world, family, tmp_path):
    small = load_base(family)
    torch.manual_seed(2)
    config = small.text_encoder.config.to_dict() | {"hidden_size": 32, "intermediate_size": 32, "projection_dim": 32}
    second = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    unet = diffusers.UNet2DConditionModel(
        sample_size=(32, 24), in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(16, 32),
        norm_num_groups=8, cross_attention_dim=24 + 32, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
        use_linear_projection=True,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=small.vae, text_encoder=small.text_encoder, text_encoder_2=second, tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer, unet=unet, scheduler=small.scheduler,
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    ).save_pretrained(tmp_path / "xl")  # fmt: skip
    tensors = original_layout(tmp_path / "xl", "conditioner.embedders.0")
    save_file(tensors | original_open_clip(tmp_path / "xl" / "text_encoder_2"), tmp_path / "xl.safetensors")
    (tmp_path / "xl.toml").write_text(
        "image_size = [64, 48]\n[defaults]\nsteps = 2\nguidance = 3.0\n[paths]\nbase = 'xl'\n"
    )
    chosen = get_family(str(tmp_path / "xl.toml"))
    whole = make(chosen, tmp_path / "1")
    assert np.array_equal(make(chosen, tmp_path / "2", base=tmp_path / "xl.safetensors"), whole)
    half = make(chosen, tmp_path / "3", base=tmp_path / "xl.safetensors", dtype="bf16")
    assert 0 < np.abs(whole.astype(float) - half).mean() < 3
    with pytest.raises(BolidError, match="another kind of base than family .*: .* have 56 channels, not 24"):
        load_base(family.with_base(tmp_path / "xl.safetensors"))
    save_file(tensors, tmp_path / "half.safetensors")  # without the second text encoder
    with pytest.raises(BolidError, match="half.safetensors does not load"):
        load_base(chosen.with_base(tmp_path / "half.safetensors"))
    fewer = {name: value for name, value in tensors.items() if "middle_block" not in name}
    save_file(fewer | original_open_clip(tmp_path / "xl" / "text_encoder_2"), tmp_path / "fewer.safetensors")
    with pytest.raises(BolidError, match="fewer.safetensors") as caught:
        load_base(chosen.with_base(tmp_path / "fewer.safetensors"))
    assert caught.value.hint


def test_a_single_checkpoint_needs_configs(family, single, tmp_path):
    lone = replace(family, base=single, base_config=tmp_path / "nowhere")
    with pytest.raises(BolidError, match="has no base configs: looked for .*nowhere"):
        load_base(lone)
    sdxl = replace(get_family("sdxl"), base=single)
    with pytest.raises(BolidError) as caught:
        load_base(sdxl)
    assert "bolid models pull sdxl --only base_config" in caught.value.hint


# ---- a UNet of the family's own: SDXL-Lightning


def test_a_unet_checkpoint_takes_the_place_of_the_bases_own(world, family, tmp_path):
    other = {name: value + 0.01 for name, value in load_file(world / "base" / "unet" / WEIGHTS).items()}
    save_file({name: value.half() for name, value in other.items()}, tmp_path / "unet.safetensors")
    write_half(world / "base", base := tmp_path / "base")
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()  # `pull` leaves the base's own out
    lightning = replace(family, unet=tmp_path / "unet.safetensors", base=base, needs=("unet",))
    loaded = load_base(lightning).unet
    assert loaded.dtype == torch.float32 and not any(p.is_meta for p in loaded.parameters())
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, other[name], atol=2e-3, rtol=1e-3)
    with pytest.raises(BolidError, match="has no UNet: looked for"):
        load_base(replace(lightning, unet=tmp_path / "absent.safetensors"))


def test_a_lora_is_merged_into_the_bases_own(world, family, tmp_path):
    bare = load_base(family)
    generator = torch.Generator().manual_seed(0)
    tensors, name = {}, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v"
    layer = bare.unet.get_submodule(name)
    a = torch.randn(2, layer.in_features, generator=generator)
    b = torch.randn(layer.out_features, 2, generator=generator)
    tensors = {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b}
    save_file(tensors, tmp_path / "unet.safetensors")
    merged = load_base(replace(family, unet=tmp_path / "unet.safetensors")).unet
    assert set(merged.state_dict()) == set(bare.unet.state_dict())
    torch.testing.assert_close(merged.get_submodule(name).weight, layer.weight + b @ a)


# ---- bad files


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def bad(path: Path, kind: str, trace: Path) -> None:
    """Make the safetensors file at `path` bad."""
    data, tensors = path.read_bytes(), load_file(path)
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "malicious":
        torch.save({"state_dict": Malicious(trace)}, path)
    elif kind == "wrong shape":
        name = next(name for name in tensors if name.endswith("attn2.to_out.0.weight") or name.endswith("conv1.weight"))
        save_file(tensors | {name: torch.zeros(3, 3)}, path)
    else:
        save_file({name: torch.zeros(*v.shape[:-1], 40) if "attn2.to_k" in name else v for name, v in tensors.items()},
                  path)  # fmt: skip


@pytest.mark.parametrize("kind", ["truncated", "malicious", "wrong shape", "wrong family"])
@pytest.mark.parametrize("form", ["folder", "single", "unet"])
def test_bad_files_are_refused(world, family, single, tmp_path, form, kind):
    trace = tmp_path / "it-ran"
    if form == "folder":
        shutil.copytree(world / "base", tmp_path / "base")
        file, chosen = tmp_path / "base" / "unet" / WEIGHTS, replace(family, base=tmp_path / "base")
    elif form == "single":
        file = Path(shutil.copy(single, tmp_path / "community.safetensors"))
        chosen = family.with_base(file)
    else:
        file = Path(shutil.copy(world / "base" / "unet" / WEIGHTS, tmp_path / "unet.safetensors"))
        chosen = replace(family, unet=file)
    bad(file, kind, trace)
    with pytest.raises(BolidError) as caught:
        load_base(chosen)
    named = family.base if form == "folder" else file
    assert named.name in caught.value.message and caught.value.hint and not trace.exists()
    if (form, kind) == ("single", "wrong family"):
        assert "text states have 40 channels, not 24" in caught.value.message


@pytest.mark.parametrize("kind", ["truncated", "malicious", "wrong shape", "wrong family"])
def test_bad_controlnets_decoders_and_vaes_are_refused(world, family, tmp_path, kind):
    from bolid.backends.diffusion import load_controlnet
    from bolid.train_adapter.decoder import load_decoder

    trace, pipe = tmp_path / "it-ran", load_base(family)
    network = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 16))
    network.save_pretrained(tmp_path / "controlnet")
    shutil.copytree(world / "parts" / "pipeline" / "vae", tmp_path / "decoder")
    shutil.copytree(world / "base", tmp_path / "base")
    for folder, load in (
        ("controlnet", lambda: load_controlnet(pipe, replace(family, controlnet=tmp_path / "controlnet"))),
        ("decoder", lambda: load_decoder(tmp_path / "decoder", pipe.vae, "cpu")),
        ("base/vae", lambda: LatentEncoder(replace(family, base=tmp_path / "base"))),
    ):
        file = tmp_path / folder / WEIGHTS
        tensors = load_file(file)
        if kind == "wrong family":
            save_file({"another": torch.zeros(3)}, file)
        elif kind == "wrong shape":
            name = next(name for name, value in tensors.items() if value.ndim == 4)
            save_file(tensors | {name: torch.zeros(3, 3)}, file)
        else:
            bad(file, kind, trace)
        with pytest.raises(BolidError) as caught:
            load()
        assert folder.split("/")[0] in caught.value.message and caught.value.hint and not trace.exists()


@pytest.mark.parametrize("form", ["folder", "single"])
def test_pickles_are_not_even_opened(world, family, tmp_path, form):
    trace = tmp_path / "it-ran"
    if form == "folder":
        shutil.copytree(world / "base", tmp_path / "base")
        (tmp_path / "base" / "unet" / WEIGHTS).unlink()
        torch.save(Malicious(trace), tmp_path / "base" / "unet" / "diffusion_pytorch_model.bin")
        chosen = replace(family, base=tmp_path / "base")
    else:
        torch.save(Malicious(trace), tmp_path / "model.ckpt")
        chosen = family.with_base(tmp_path / "model.ckpt")
    with pytest.raises(BolidError) as caught:
        load_base(chosen)
    assert not trace.exists() and (form == "folder" or "is a pickle" in caught.value.message)
