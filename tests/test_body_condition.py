from __future__ import annotations

import pytest
import torch
from small_base import LATENT_CHANNELS, make_base

from bolid.method import losses
from bolid.method.body_condition import (
    BRANCHES,
    build_ip_adapter_image_embeds,
    drop_condition,
    factorise_kv,
    initial_state,
    install,
    largest_kv_rank,
    merge_kv,
    null_condition,
)

BODY_DIM = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def unet(base):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(base, subfolder="unet").eval()


def states(unet, seed: int = 0):
    return [initial_state(unet, "face", 512, tokens=3, seed=seed), initial_state(unet, "body", BODY_DIM, seed=seed)]


def inputs():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, LATENT_CHANNELS, 16, 12, generator=generator),
        torch.tensor([10, 700]),
        torch.randn(2, 5, 24, generator=generator),
        [torch.randn(2, 1, dim, generator=generator) for dim in (512, BODY_DIM)],
    )


def predict(unet, latents, timesteps, text, embeds=None):
    added = {"image_embeds": embeds} if embeds is not None else None
    return unet(latents, timesteps, encoder_hidden_states=text, added_cond_kwargs=added).sample


def test_untrained_branches_change_nothing(unet):
    latents, timesteps, text, embeds = inputs()
    with torch.no_grad():
        bare = predict(unet, latents, timesteps, text)
        install(unet, states(unet))
        assert torch.equal(predict(unet, latents, timesteps, text, embeds), bare)


def test_training_reaches_every_parameter_and_nothing_else(unet):
    latents, timesteps, text, embeds = inputs()
    unet.requires_grad_(False)
    branches = install(unet, states(unet))
    parameters = {f"{b}.{name}": p for b, ps in zip(BRANCHES, branches, strict=True) for name, p in ps.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    for _ in range(2):  # in the first step only to_v_ip has a gradient, since it starts at zero
        optimizer.zero_grad()
        predict(unet, latents, timesteps, text, embeds).square().mean().backward()
        optimizer.step()
    assert {name for name, p in unet.named_parameters() if p.grad is not None} == {
        name for name, p in unet.named_parameters() if any(p is mine for mine in parameters.values())
    }
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())


def test_keys_and_values_of_low_rank_are_trained_as_two_matrices_and_saved_as_one(base, unet):
    """The thin matrices' prediction is that of a stock UNet which loads their product from the stock layout."""
    from diffusers import UNet2DConditionModel

    latents, timesteps, text, embeds = inputs()
    unet.requires_grad_(False)
    bare = predict(unet, latents, timesteps, text)
    thin = [
        initial_state(unet, "face", 512, tokens=3, kv_rank=5), initial_state(unet, "body", BODY_DIM, kv_rank=5),
    ]  # fmt: skip
    branches = install(unet, thin)
    parameters = [p for branch in branches for p in branch.values()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    assert torch.equal(predict(unet, latents, timesteps, text, embeds), bare)
    full = install(UNet2DConditionModel.from_pretrained(base, subfolder="unet"), states(unet))
    assert sum(p.numel() for p in parameters) < sum(p.numel() for branch in full for p in branch.values())
    optimizer = torch.optim.SGD(parameters, lr=50.0)
    for _ in range(3):
        optimizer.zero_grad()
        predict(unet, latents, timesteps, text, embeds).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in parameters)
    trained = predict(unet, latents, timesteps, text, embeds).detach()
    assert not torch.allclose(trained, bare, rtol=0.01)

    merged = [{name: p.detach() for name, p in merge_kv(branch).items()} for branch in branches]
    assert [set(m) for m in merged] == [set(branch) for branch in install(unet, states(unet))]
    stock = UNet2DConditionModel.from_pretrained(base, subfolder="unet").eval()
    nested = [
        {part: {n.removeprefix(f"{part}."): t for n, t in m.items() if n.startswith(part)} for part in states(unet)[0]}
        for m in merged
    ]
    stock._load_ip_adapter_weights(nested, low_cpu_mem_usage=False)
    with torch.no_grad():
        assert torch.allclose(predict(stock, latents, timesteps, text, embeds), trained, atol=1e-5)


def test_a_full_branch_is_factorised_to_the_nearest_of_that_rank(unet):
    state = initial_state(unet, "body", BODY_DIM)
    generator = torch.Generator().manual_seed(0)
    for name, weight in state["ip_adapter"].items():
        if "to_v" in name and not name.startswith("1."):
            state["ip_adapter"][name] = torch.randn(weight.shape, generator=generator)
    for rank in (3, 24):
        factors = factorise_kv(state, rank)
        assert factors["image_proj"] is state["image_proj"]
        for name, product in merge_kv(factors["ip_adapter"]).items():
            full = state["ip_adapter"][name]
            left = torch.linalg.svdvals(full)[rank:].square().sum().sqrt()  # Eckart-Young: what no such matrix reaches
            assert torch.allclose((full - product).norm(), left, atol=1e-4), name
    zeros = [t for name, t in factors["ip_adapter"].items() if name.startswith("1.to_v_ip")]
    assert not zeros[1].any() and zeros[0].any(), "two matrices of zeros would stay zero for ever"


def test_thin_matrices_start_as_wide_as_full_ones_and_are_smaller(unet):
    rank = largest_kv_rank(unet)
    full, thin = initial_state(unet, "body", BODY_DIM), initial_state(unet, "body", BODY_DIM, kv_rank=rank)
    products = merge_kv(thin["ip_adapter"])
    for name, weight in full["ip_adapter"].items():
        stem = name.removesuffix("weight")
        parts = [thin["ip_adapter"][f"{stem}{part}.weight"] for part in ("down", "up")]
        assert sum(part.numel() for part in parts) < weight.numel()
        assert sum(part.numel() + part.numel() // rank for part in parts) >= weight.numel(), "the largest such rank"
        assert products[name].std() == pytest.approx(float(weight.std()), rel=0.2)


def test_layout_is_diffusers_own(unet):
    face, body = states(unet)
    assert set(face["image_proj"]) == {
        f"{layer}.{kind}" for layer in ("proj.0", "proj.2", "norm") for kind in ("weight", "bias")
    }
    assert body["image_proj"]["proj.weight"].shape == (4 * 24, BODY_DIM)
    numbers = sorted({int(name.split(".")[0]) for name in body["ip_adapter"]})
    cross = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    assert numbers == list(range(1, 2 * len(cross), 2))
    flat = [f"{part}.{name}" for part, values in face.items() for name in values]
    assert set(install(unet, [face, body])[0]) == set(flat)


def test_dropping_a_condition_gives_what_guidance_calls_nothing():
    body = torch.randn(3, 1, BODY_DIM)
    dropped = drop_condition(body, torch.tensor([True, False, True]))
    negative = build_ip_adapter_image_embeds([body[0, 0]], guidance=True)[0][:1]
    assert torch.equal(dropped[:1], negative) and torch.equal(dropped[1], body[1])
    assert torch.equal(null_condition(body), torch.zeros_like(body))


def test_embeds_have_null_rows_first_exactly_with_guidance():
    face, body = torch.randn(512), torch.randn(BODY_DIM)
    with_guidance = build_ip_adapter_image_embeds([face, body], guidance=True, batch=3)
    assert [list(e.shape) for e in with_guidance] == [[6, 1, 512], [6, 1, BODY_DIM]]
    assert (with_guidance[0][:3] == 0).all() and (with_guidance[0][3:, 0] == face).all()
    without = build_ip_adapter_image_embeds([face, body], guidance=False)
    assert [list(e.shape) for e in without] == [[1, 1, 512], [1, 1, BODY_DIM]]


@pytest.mark.parametrize("shape", [(2, 1, 512), (2, 512), (1, 512)])
def test_the_silent_corruptions_are_refused(shape):
    """Negative rows handed over by hand, and several people in one call."""
    with pytest.raises(ValueError, match="one vector"):
        build_ip_adapter_image_embeds([torch.zeros(shape)], guidance=False)


# ---- L_diff -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_x0(prediction_type):
    """Whatever the network predicts, the weighted loss is min(SNR, gamma) times the error of the clean picture."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    latents, noise, wrong = (torch.randn(1, 4, 8, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    for t in (50, 400, 950):
        timesteps = torch.tensor([t])
        alphas = losses.alpha_bar(scheduler, timesteps).double()
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        target = losses.diffusion_target(scheduler, latents, noise, timesteps)
        prediction = target + 0.1 * wrong
        x0 = {
            "epsilon": (noisy - (1 - alphas).sqrt() * prediction) / alphas.sqrt(),
            "v_prediction": alphas.sqrt() * noisy - (1 - alphas).sqrt() * prediction,
            "sample": prediction,
        }[prediction_type]
        snr = alphas / (1 - alphas)
        expected = snr.clamp_max(5) * (x0 - latents).square().mean()
        got = losses.loss_diffusion(prediction, target, alphas, prediction_type, gamma=5.0)
        assert float(got) == pytest.approx(float(expected), rel=1e-3)


def test_min_snr_can_be_switched_off():
    assert (losses.min_snr_weight(torch.tensor([0.1, 0.9]), "epsilon", 0) == 1).all()
