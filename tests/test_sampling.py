"""`sample` against diffusers' own pipelines: the same latents and pictures, to the bit."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from generate_world import BODY, FACE, PROMPTS, make_world, random_controlnet, save_lora, with_adapters
from PIL import Image

from bolid.backends.attention import cache_conditions
from bolid.backends.diffusion import decode_latents, encode_latents, load_base, load_loras, offload
from bolid.backends.sampling import Control, Guidance, Start, sample
from bolid.errors import BolidError
from bolid.method.body_condition import build_ip_adapter_image_embeds
from bolid.models.families import get_family
from bolid.scales import Scale, parse_guidance, parse_scale

SIZE = (64, 48)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def world(request, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("sampling"), sdxl=request.param == "sdxl")


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("sampling"))


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def by_diffusers(pipe, guidance=3.0, steps=4, branches=("face", "body"), **options):
    """(latents, pictures) of two prompts."""
    vectors = [{"face": FACE, "body": BODY}[branch] for branch in branches]
    if vectors:
        options["ip_adapter_image_embeds"] = build_ip_adapter_image_embeds(vectors, guidance=guidance > 1)
    if guidance > 1:
        options["negative_prompt"] = ["a hat", "a hat"]
    return [
        pipe(
            PROMPTS, height=SIZE[0], width=SIZE[1], num_inference_steps=steps, guidance_scale=guidance,
            generator=generators(), output_type=kind, **options,
        ).images
        for kind in ("latent", "pil")
    ]  # fmt: skip


def by_us(pipe, guidance=3.0, steps=4, branches=("face", "body"), **options):
    vectors = [{"face": FACE, "body": BODY}[branch] for branch in branches]
    latents = sample(
        pipe, PROMPTS, size=SIZE, steps=steps, guidance=Guidance(parse_guidance(guidance), "a hat"),
        generators=generators(), vectors=vectors, **options,
    )  # fmt: skip
    return latents, decode_latents(pipe, latents)


def equal(ours, theirs) -> bool:
    pictures = all(np.array_equal(a, np.asarray(b)) for a, b in zip(ours[1], theirs[1], strict=True))
    return torch.equal(ours[0], theirs[0]) and pictures


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [3.0, 0.0])
@pytest.mark.parametrize("branches", [(), ("body",), ("face", "body")])
def test_what_diffusers_samples(world, branches, guidance):
    pipe = load_base(get_family(world.family), sampler={"scheduler": "LCMScheduler"})
    if branches:
        with_adapters(world, *branches, pipe=pipe)
    theirs = by_diffusers(pipe, guidance, branches=branches)
    assert equal(by_us(pipe, guidance, branches=branches), theirs)
    cache_conditions(pipe.unet)
    assert equal(by_us(pipe, guidance, branches=branches), theirs)
    assert equal(by_diffusers(pipe, guidance, branches=branches), theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_any_sampler(world, scheduler):
    pipe = load_base(get_family(world.family), sampler={"scheduler": scheduler})
    assert equal(by_us(pipe, branches=()), by_diffusers(pipe, branches=()))


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [3.0, 0.0])
def test_controlnets(world, guidance):
    """One as diffusers samples it, and two as it samples two."""
    pipe = load_base(get_family(world.family))
    first, second = random_controlnet(pipe.unet), random_controlnet(pipe.unet)
    second.controlnet_mid_block.weight.data *= -2
    with_adapters(world, pipe=pipe)
    stock = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=first)
    theirs = by_diffusers(stock, guidance, image=IMAGE, controlnet_conditioning_scale=0.7)
    control = Control(first, IMAGE, parse_scale(0.7, ""))
    assert equal(by_us(pipe, guidance, controls=[control]), theirs)
    for network in (pipe.unet, first):
        cache_conditions(network)
    assert equal(by_us(pipe, guidance, controls=[control]), theirs)
    assert not equal(by_us(pipe, guidance), theirs)

    stock = diffusers.AutoPipelineForText2Image.from_pipe(
        pipe, controlnet=diffusers.MultiControlNetModel([first, second])
    )
    theirs = by_diffusers(stock, guidance, image=[IMAGE, IMAGE], controlnet_conditioning_scale=[0.7, 1.0])
    assert equal(by_us(pipe, guidance, controls=[control, Control(second, IMAGE)]), theirs)


def test_loras(world, tmp_path):
    pipe = with_adapters(world)
    plain = by_us(pipe)
    lora = save_lora(tmp_path / "a.safetensors", load_base(get_family(world.family)).unet)
    load_loras(pipe, [(lora, 0.5)], get_family(world.family))
    theirs = by_diffusers(pipe)
    cache_conditions(pipe.unet)
    assert equal(by_us(pipe), theirs) and not equal(by_us(pipe), plain)


def test_the_keys_and_values_of_a_condition_are_computed_once(sd):
    pipe, counts = with_adapters(sd), {}
    cache_conditions(pipe.unet)
    name, processor = next(item for item in pipe.unet.attn_processors.items() if "attn2" in item[0])
    attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
    for place, layer in (("text", attention.to_k), ("face", processor.to_k_ip[0]), ("body", processor.to_v_ip[1])):
        counts[place] = []
        layer.register_forward_hook(lambda layer, inputs, output, place=place: counts[place].append(len(output)))
    by_us(pipe, steps=5)
    assert counts == {"text": [4], "face": [4], "body": [4]}
    by_us(pipe, "3@0.4..1", steps=5)  # and once for the steps without guidance
    assert counts == {"text": [4, 2, 4], "face": [4, 2, 4], "body": [4, 2, 4]}
    by_diffusers(pipe, steps=5)  # two calls, each step
    assert len(counts["text"]) == 3 + 10


def test_a_scale_in_an_interval(sd):
    """As diffusers does it with a callback that turns a branch off after the third of five steps."""
    pipe = with_adapters(sd)

    def callback(pipe, step, timestep, arguments):
        pipe.set_ip_adapter_scale([1.0, 0.0 if step in (2, 3) else 1.0])
        return arguments

    theirs = by_diffusers(pipe, steps=5, callback_on_step_end=callback)
    assert equal(by_us(pipe, steps=5, scales=[Scale(), parse_scale("0..0.6", "")]), theirs)
    whole, late = (
        by_us(pipe, steps=5, scales=[Scale(), Scale()]),
        by_us(pipe, steps=5, scales=[Scale(), Scale(start=0.6)]),
    )
    assert not equal(whole, theirs) and not equal(late, theirs)
    pipe.set_ip_adapter_scale([1.0, 1.0])
    assert equal(whole, by_diffusers(pipe, steps=5))


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.slow
def test_guidance_in_an_interval(sd, control):
    """As diffusers does it with a callback that sets the scale to 1, with half the rows in those steps."""
    pipe = load_base(get_family(sd.family))
    network = random_controlnet(pipe.unet)
    stock = pipe = with_adapters(sd, pipe=pipe)
    options, controls = {}, []
    if control:
        stock, options = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=network), {"image": IMAGE}
        controls = [Control(network, IMAGE)]
    rows = []
    pipe.unet.conv_in.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))

    def callback(pipe, step, timestep, arguments):
        pipe._guidance_scale = 3.0 if step < 2 else 1 + 1e-9
        return arguments

    whole, theirs = (by_diffusers(stock, steps=5, **options, callback_on_step_end=c)[0] for c in (None, callback))
    assert not torch.allclose(whole, theirs, atol=0.01)
    rows.clear()
    cache_conditions(pipe.unet)
    assert torch.allclose(by_us(pipe, "3@0..0.6", steps=5, controls=controls)[0], theirs, atol=1e-4)
    assert rows == [4, 4, 4, 2, 2]
    rows.clear()
    assert not torch.allclose(by_us(pipe, "3@0.2..0.6", steps=5, controls=controls)[0], theirs, atol=1e-3)
    assert rows == [2, 4, 4, 2, 2]


def test_a_controlnet_in_an_interval(sd):
    """It does not run in the other steps. The first of two steps is half of the sampling."""
    pipe = load_base(get_family(sd.family))
    network, calls = random_controlnet(pipe.unet), []
    network.register_forward_hook(lambda *_: calls.append(1))
    stock = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=network)
    theirs = by_diffusers(stock, steps=2, branches=(), image=IMAGE, control_guidance_end=0.5)
    calls.clear()
    assert equal(by_us(pipe, steps=2, branches=(), controls=[Control(network, IMAGE, Scale(end=0.5))]), theirs)
    assert len(calls) == 1
    plain = by_us(pipe, steps=2, branches=())
    assert equal(by_us(pipe, steps=2, branches=(), controls=[Control(network, IMAGE, Scale(0, 0, 0))]), plain)


def test_what_does_not_fit(sd):
    pipe = load_base(get_family(sd.family))
    with pytest.raises(ValueError, match="1 prompts for 2 pictures"):
        sample(pipe, PROMPTS[:1], size=SIZE, steps=1, guidance=Guidance(parse_guidance(0)), generators=generators())
    pipe.unet.register_to_config(time_cond_proj_dim=16)
    with pytest.raises(BolidError, match="takes the guidance scale as an input") as error:
        by_us(pipe, branches=())
    assert error.value.hint


def test_a_branch_at_scale_0_is_the_base_alone(sd):
    plain = by_us(load_base(get_family(sd.family)), branches=())
    pipe = with_adapters(sd)
    for cached in (False, True):
        if cached:
            cache_conditions(pipe.unet)
        assert equal(by_us(pipe, scales=[Scale(0, 0, 0)] * 2), plain)
        assert not equal(by_us(pipe, scales=[Scale(0, 0, 0), Scale()]), plain)


@pytest.mark.slow
def test_networks_that_are_offloaded_sample_the_same(world):
    """Twice: after the first pictures the last network leaves the device too."""
    pictures = []
    for offloaded in (False, True):
        pipe = load_base(get_family(world.family))
        network = random_controlnet(pipe.unet)
        with_adapters(world, pipe=pipe)
        cache_conditions(pipe.unet)
        if offloaded:
            offload(pipe, "cpu")
        for _ in range(2):
            pictures.append(by_us(pipe, steps=1, controls=[Control(network, IMAGE)]))
            pipe.maybe_free_model_hooks()
    assert all(equal(other, pictures[0]) for other in pictures[1:])


def test_pictures_to_change_as_image_to_image_does(sd):
    family = get_family(sd.family)
    pipe = load_base(family)
    pipe.unet.register_to_config(sample_size=64)  # its check of old configs takes no pair
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    start = encode_latents(pipe, [np.asarray(IMAGE)] * 2)[:, 0]
    for steps, strength in ((5, 0.5), (4, 1.0), (3, 0.1)):
        wanted = [
            image_to_image(
                PROMPTS, image=start, strength=max(strength, 1 / steps), num_inference_steps=steps, guidance_scale=0.0,
                generator=generators(), output_type="latent",
            ).images
        ][0]  # fmt: skip
        latents, _ = by_us(pipe, guidance=0, steps=steps, branches=(), latents=Start(start, strength))
        assert torch.equal(latents, wanted), (steps, strength)


def test_timesteps_of_ones_own_as_diffusers_takes_them(sd):
    levels = (999, 700, 250, 40)
    pipe = load_base(get_family(sd.family), sampler={"scheduler": "LCMScheduler", "original_inference_steps": 1000})
    wanted, _ = by_diffusers(pipe, guidance=0, branches=(), timesteps=list(levels))
    latents, _ = by_us(pipe, guidance=0, steps=levels, branches=())
    assert torch.equal(latents, wanted)
    assert not torch.equal(latents, by_us(pipe, guidance=0, steps=4, branches=())[0])
