"""The published UNets of SD 1.5 and SDXL with both branches, on the meta device: shapes and names, no memory.

The configs are those of unet/config.json in stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from small_base import make_base

from bolid.backends.diffusion import load_base
from bolid.errors import BolidError
from bolid.formats.adapter import adapter_kind, save_adapter
from bolid.method.body_condition import BRANCHES, FACE_DIM, initial_state, install
from bolid.models.families import get_family
from bolid.run import run_record

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
import cost

BODY_DIM, FACE_TOKENS, BODY_TOKENS = 64, 16, 4
SD15 = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
SDXL = SD15 | cost.SDXL
# name: (config, parameters, cross-attention layers, key and value parameters of a branch)
PUBLISHED = {"sd15": (SD15, 859_520_964, 16, 19_169_280), "sdxl": (SDXL, 2_567_463_684, 70, 340_787_200)}


@pytest.fixture(scope="module", params=PUBLISHED)
def branches(request):
    """(UNet, states, their parameters, number of cross-attentions, branch size)"""
    config, size, layers, branch = PUBLISHED[request.param]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        assert sum(p.numel() for p in unet.parameters()) == size  # the published one, and nothing else
        states = [
            initial_state(unet, "face", FACE_DIM, tokens=FACE_TOKENS),
            initial_state(unet, "body", BODY_DIM),
        ]
        return unet, states, install(unet, states), layers, branch


def test_keys_are_numbered_as_the_ip_adapter_layout_has_them(branches):
    """1..31 for SD 1.5 and 1..139 for SDXL: the places of the cross-attentions in `list(unet.attn_processors)`."""
    unet, states, parameters, layers, size = branches
    names = list(unet.attn_processors)
    for state, mine in zip(states, parameters, strict=True):
        numbers = sorted({int(key.split(".")[0]) for key in state["ip_adapter"]})
        assert numbers == list(range(1, 2 * layers, 2)) and numbers[-1] in (31, 139)
        assert len(state["ip_adapter"]) == 2 * layers
        assert sum(t.numel() for t in state["ip_adapter"].values()) == size
        assert {key: p.shape for key, p in mine.items()} == {
            f"{part}.{key}": t.shape for part, tensors in state.items() for key, t in tensors.items()
        }
        assert all(p.is_meta for p in mine.values())
        for number in numbers:
            # Where the layer stands in the network, not only how many there are.
            assert names[number].endswith("attn2.processor")
            layer = unet.get_submodule(names[number].removesuffix(".processor"))
            expected = (layer.to_k.out_features, layer.to_k.in_features)
            assert state["ip_adapter"][f"{number}.to_k_ip.weight"].shape == expected
            assert state["ip_adapter"][f"{number}.to_v_ip.weight"].shape == expected
    assert list(dict.fromkeys(name.split("_")[0] for name in names)) == ["down", "up", "mid"]


@pytest.mark.slow
def test_a_training_step_reaches_every_parameter(branches):
    unet, _, parameters, _, _ = branches
    context, side, batch = unet.config.cross_attention_dim, unet.config.sample_size, 1
    mine = {id(p) for branch in parameters for p in branch.values()}
    for parameter in unet.parameters():
        parameter.requires_grad_(id(parameter) in mine)
    added = {"image_embeds": [torch.empty(batch, 1, dim, device="meta") for dim in (FACE_DIM, BODY_DIM)]}
    if unet.config.addition_embed_type == "text_time":
        added |= {
            "text_embeds": torch.empty(batch, 1280, device="meta"),
            "time_ids": torch.empty(batch, 6, device="meta"),
        }
    with torch.device("meta"):
        predicted = unet(
            torch.empty(batch, 4, side, side), torch.zeros(batch, dtype=torch.long),
            encoder_hidden_states=torch.empty(batch, 77, context), added_cond_kwargs=added,
        ).sample  # fmt: skip
        assert predicted.shape == (batch, 4, side, side)
        predicted.square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for branch in parameters for p in branch.values())
    assert all(p.grad is None for p in unet.parameters() if id(p) not in mine)


def test_the_bodys_and_the_faces_tokens(branches):
    unet, states, _, _, _ = branches
    context = unet.config.cross_attention_dim
    face, body = (state["image_proj"] for state in states)
    assert face["proj.2.weight"].shape[0] == FACE_TOKENS * context
    assert body["proj.weight"].shape == (BODY_TOKENS * context, BODY_DIM)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_trained_branches_are_reloaded_by_stock_diffusers(name, tmp_path):
    """Every layer of the published networks, an eighth as wide, in bf16 with random weights: one step, saved, loaded by
    `load_ip_adapter`. (Of the full width only shapes could go wrong, and those the tests above compare.)"""
    small = StableDiffusionPipeline.from_pretrained(make_base(tmp_path), safety_checker=None)
    config = PUBLISHED[name][0]
    thin = {"block_out_channels": [width // 8 for width in config["block_out_channels"]], "norm_num_groups": 8}
    unet = UNet2DConditionModel.from_config(config | thin | {"cross_attention_dim": 96}).to(torch.bfloat16)
    unet.requires_grad_(False).eval()
    branches = install(
        unet, [initial_state(unet, "face", FACE_DIM, tokens=FACE_TOKENS), initial_state(unet, "body", BODY_DIM)]
    )
    assert len(branches[1]) == 2 * PUBLISHED[name][2] + 4  # keys and values of every layer, and image_proj
    trained = [p for branch in branches for p in branch.values()]
    random = [torch.randn(shape).bfloat16() for shape in ((1, 4, 16, 16), (1, 77, 96), (1, 1280))]
    embeds = [torch.randn(1, 1, dim).bfloat16() for dim in (FACE_DIM, BODY_DIM)]

    def predict():
        added = {"image_embeds": embeds, "text_embeds": random[2], "time_ids": torch.ones(1, 6).bfloat16()}
        return unet(random[0], torch.tensor([500]), encoder_hidden_states=random[1], added_cond_kwargs=added).sample

    for parameter in trained:
        parameter.requires_grad_(True)
    untrained = predict()
    untrained.float().square().mean().backward()
    assert any(p.grad.abs().sum() > 0 for p in trained)
    torch.optim.SGD(trained, lr=1e4).step()
    for parameter in trained:
        parameter.requires_grad_(False).grad = None
    after = predict()
    assert not torch.equal(after, untrained) and torch.isfinite(after).all()
    for branch, parameters in zip(BRANCHES, branches, strict=True):
        save_adapter(tmp_path / f"{branch}.safetensors", parameters, run_record(adapter_kind(branch), family=name))
    pipe = StableDiffusionPipeline(
        vae=small.vae, text_encoder=small.text_encoder, tokenizer=small.tokenizer, unet=unet,
        scheduler=small.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for processor in unet.attn_processors.values():  # so that what is loaded can only come from the files
        for layer in (*getattr(processor, "to_k_ip", ()), *getattr(processor, "to_v_ip", ())):
            layer.weight.zero_()
    assert not torch.equal(predict(), after)
    pipe.load_ip_adapter(
        [str(tmp_path)] * 2, subfolder=["", ""], weight_name=["face.safetensors", "body.safetensors"],
        image_encoder_folder=None,
    )  # fmt: skip
    assert torch.equal(predict(), after)


@pytest.mark.parametrize(("family", "other"), [("sd15", SDXL), ("sdxl", SD15)])
def test_a_unet_of_the_other_family_is_refused_by_its_header(family, other, tmp_path, monkeypatch):
    """The real names and shapes in a file's header; not a single weight is read or written."""
    import json

    from bolid.backends import diffusion as base

    with torch.device("meta"):
        theirs = {n: list(t.shape) for n, t in UNet2DConditionModel.from_config(other).state_dict().items()}
    chosen = get_family(family)
    chosen.base.mkdir(parents=True)
    (chosen.base / "model_index.json").write_text("{}")
    (chosen.base / "unet").mkdir()
    own = {"sd15": SD15, "sdxl": SDXL}[family] | {"_class_name": "UNet2DConditionModel"}
    (chosen.base / "unet" / "config.json").write_text(json.dumps(own))
    chosen.unet.write_bytes(b"stands for several gigabytes")
    monkeypatch.setattr(base, "_header", lambda path: theirs)
    with pytest.raises(BolidError, match=f"does not fit the base of family '{family}'") as caught:
        load_base(chosen)
    assert "trained from this kind of base" in caught.value.hint
