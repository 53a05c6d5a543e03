"""The joint objective (Eq. 14): each loss on its own, and the ways to make x_gen."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import numpy as np
import pytest
import torch
from adapter_world import CONFIG

from bolid.backends.body import BodyEncoder
from bolid.backends.diffusion import load_base
from bolid.backends.face import DifferentiableFaces
from bolid.errors import BolidError
from bolid.models.families import get_family
from bolid.train_adapter.data import draw_batch, photo_generators, read_table
from bolid.train_adapter.decoder import LatentDecoder
from bolid.train_adapter.pixel_losses import pixel_losses, random_affine
from bolid.train_adapter.rollouts import FewStepRollout
from bolid.train_adapter.setup import FrozenModels, install_branches, make_objective

LANDMARKS = torch.tensor([[20.0, 20], [30, 20], [25, 26], [21, 31], [29, 31]])  # eyes, nose, mouth
LCM = {"scheduler": "LCMScheduler", "original_inference_steps": 1000}  # consistency sampling


@contextlib.contextmanager
def joint(world, defaults=None, of_family=None, **settings):
    """(objective, a batch of four photos, the branches' parameters by name) with branches that do something.

    `defaults`: those of the family beside its own; `of_family`: other fields of it.
    """
    config = dataclasses.replace(CONFIG, precision="fp32", pixel_alpha_bar=0.0, **settings)
    family = get_family(world.family)
    family = dataclasses.replace(family, defaults={**family.defaults, **(defaults or {})}, **(of_family or {}))
    encoder, pipe = BodyEncoder(world.encoder), load_base(family)
    losses = pixel_losses(config, family, encoder)
    models = FrozenModels(family, encoder, pipe, losses, LatentDecoder(family, pipe.vae))
    table = read_table(world.train, encoder)
    objective = make_objective(models, table, config, torch.device("cpu"))
    branches = install_branches(models, config, seed=0)
    parameters = {f"{branch}.{name}": p for branch, ps in branches.items() for name, p in ps.items()}
    torch.manual_seed(0)
    for name, parameter in parameters.items():
        if "to_v_ip" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    none = {"text_dropout": 0.0, "face_dropout": 0.0, "body_dropout": 0.0, "all_dropout": 0.0}
    batch = draw_batch(table, np.arange(4), dataclasses.replace(config, **none), photo_generators(0, 0, 4))
    yield objective, batch, parameters


def again(batch, **changes):
    """The same photos with fresh generators."""
    return dataclasses.replace(batch, generators=photo_generators(0, 0, 4), **changes)


def scores(loss, of_row):
    """Let the photos have these scores of the face detector: those of random numbers show no faces."""
    loss.photo_scores = lambda x_gen: [torch.tensor([float(of_row(row)) for row in x_gen.rows])]


def all_alphas(batch):
    return torch.ones(len(batch.rows))


@pytest.mark.parametrize(
    ("term", "settings"),
    [
        ("id", {"id_weight": 1.0}),
        ("id", {"id_weight": 1.0, "id_loss": "bone-ratios"}),
        ("clip", {"clip_weight": 1.0, "clip_target": "both"}),
        ("id", {"id_weight": 1.0, "x_gen": "few-step", "x_gen_grad_steps": 2}),
        ("id", {"id_weight": 1.0, "id_loss": "body"}),
        ("id", {"id_weight": 1.0, "id_loss": "body", "x_gen": "sampled"}),
        ("clip", {"clip_weight": 1.0, "x_gen": "sampled", "x_gen_grad_steps": 4}),
        ("id", {"id_weight": 1.0, "id_loss": "body", "x_gen": "sampled", "defaults": LCM}),
        ("face", {"face_weight": 2.0}),
        ("face", {"face_weight": 2.0, "x_gen": "sampled"}),
        ("face_detection", {"face_detection_weight": 2.0}),
        ("face_detection", {"face_detection_weight": 2.0, "x_gen": "sampled"}),
    ],
)
def test_each_loss_reaches_every_key_and_value_of_both_branches(with_models, term, settings, monkeypatch):
    score_of, found = DifferentiableFaces._surest, LANDMARKS.expand(4, -1, -1)
    monkeypatch.setattr(DifferentiableFaces, "_surest", lambda self, pixels: (score_of(self, pixels)[0], found))
    with joint(with_models, **settings) as (objective, batch, parameters):
        if "face" in term:
            scores(objective.pixel_losses[term], lambda row: 1)
        values = objective(batch, with_pixels=True)
        assert set(values) == {"loss", "diffusion", term}
        weighted = settings[f"{term}_weight"] * values[term]
        assert float(values["loss"].detach()) == pytest.approx(float((values["diffusion"] + weighted).detach()))
        values[term].backward()
        for name, parameter in parameters.items():
            assert torch.isfinite(parameter.grad).all(), name
            if "to_k_ip" in name or "to_v_ip" in name:
                assert parameter.grad.any(), name


def test_without_pixels_the_loss_is_l_diff(with_models):
    with joint(with_models, id_weight=1.0) as (objective, batch, _):
        alone = objective(batch)
        assert set(alone) == {"loss"}
        batch = again(batch)
        before = objective(dataclasses.replace(batch, generators=photo_generators(9, 0, 4)))["loss"]
        after = objective(dataclasses.replace(batch, generators=photo_generators(9, 0, 4)), with_pixels=True)
        assert float(after["diffusion"].detach()) == pytest.approx(float(before.detach()))


def test_the_face_loss_counts_where_the_photo_shows_one_and_the_person_is_known(with_models):
    with joint(with_models, face_weight=1.0, x_gen="sampled") as (objective, batch, _):
        table = objective.table
        assert torch.allclose(table.person_faces.norm(dim=1), torch.ones(len(table.people)))
        table.confidence[:] = 0.0  # no photo shows a body; the faces are worth a picture
        assert objective.rollout.select(batch, all_alphas(batch)).tolist() == [0, 1, 2, 3]
        assert float(objective(batch, with_pixels=True)["face"].detach()) == 0, "no photo shows one"
        scores(objective.pixel_losses["face"], lambda row: 1)
        every = float(objective(again(batch), with_pixels=True)["face"].detach())
        faceless = batch.face_embeds.clone()
        faceless[:2] = 0
        batch = again(batch, face_embeds=faceless)
        assert objective.rollout.select(batch, all_alphas(batch)).tolist() == [2, 3]
        assert 0 < float(objective(batch, with_pixels=True)["face"].detach()) < every


@pytest.mark.slow
def test_the_face_detection_loss_counts_where_the_photo_shows_a_face_and_one_is_known(with_models, monkeypatch):
    with joint(with_models, face_detection_weight=1.0, x_gen="sampled") as (objective, batch, _):

        def loss(batch):
            return float(objective(batch, with_pixels=True)["face_detection"])

        assert loss(batch) == 0, "no photo shows one"
        scores(objective.pixel_losses["face_detection"], dict(zip(batch.rows, [1.0, 0.6, 0.4, 0.0], strict=True)).get)
        monkeypatch.setattr(DifferentiableFaces, "certainty", lambda self, pixels: torch.full((len(pixels),), 0.1))
        assert loss(again(batch)) == pytest.approx((math.log(7.5) + math.log(6)) / 4)
        faceless = batch.face_embeds.clone()
        faceless[0] = 0
        assert loss(again(batch, face_embeds=faceless)) == pytest.approx(math.log(6) / 4)


def test_photos_under_too_much_noise_are_left_out(with_models):
    with joint(with_models, clip_weight=1.0, clip_target="image") as (objective, batch, _):
        every = objective(batch, with_pixels=True)["clip"]
        objective.rollout.min_alpha_bar = 0.9999
        none = objective(again(batch), with_pixels=True)
        assert float(every.detach()) > 0 and float(none["clip"]) == 0
        none["loss"].backward()


@pytest.mark.parametrize("defaults", [{}, LCM, LCM | {"guidance": "3@0.5..1"}])
def test_sampled_pictures_are_those_that_generate_makes(with_models, defaults):
    """A stock pipeline with the same noise, captions and people ends at the same latents, by DDIM and by LCM."""
    from bolid.backends.diffusion import encode_prompts
    from bolid.backends.sampling import Guidance, sample

    with joint(with_models, defaults, id_weight=1.0, id_loss="body", x_gen="sampled") as (objective, batch, _):
        with torch.no_grad():
            ours = objective.rollout.sample(objective.denoiser.conditions(batch), photo_generators(0, 0, 4))
        pipe = load_base(get_family(with_models.family), sampler=defaults)
        pipe.unet = objective.denoiser.unet
        generator = photo_generators(0, 0, 1)[0]
        noise = torch.randn(1, *objective.table.latents.shape[2:], generator=generator)
        theirs = sample(
            pipe, encode_prompts(pipe, batch.captions[:1]), size=(64, 48), steps=4, generators=[generator],
            guidance=Guidance(objective.rollout.guidance), latents=noise,
            vectors=[batch.face_embeds[0, 0], batch.body_embeds[0, 0]],
        )  # fmt: skip
    assert objective.rollout.guidance.up > 1 and objective.rollout.consistency == bool(defaults)
    assert torch.allclose(ours[:1], theirs, atol=1e-3 * float(theirs.std()))


def test_only_photos_of_a_body_with_a_caption_and_a_condition_are_sampled(with_models):
    with joint(with_models, id_weight=1.0, id_loss="body", x_gen="sampled") as (objective, batch, _):
        objective.table.confidence[:] = torch.ones(len(objective.table.confidence))
        objective.table.confidence[batch.rows[0]] = 0.3
        body = batch.body_embeds.clone()
        body[1] = 0
        batch = dataclasses.replace(batch, captions=[*batch.captions[:2], "", batch.captions[3]], body_embeds=body)
        assert objective.rollout.select(batch, all_alphas(batch)).tolist() == [3]
        objective.table.confidence[:] = 0.0
        nothing = objective(batch, with_pixels=True)
    assert float(nothing["id"]) == 0 and float(nothing["loss"].detach()) == float(nothing["diffusion"].detach())


@pytest.mark.parametrize("defaults", [{}, LCM])
def test_gradient_goes_through_the_steps_asked_for(with_models, defaults):
    """Through the last step alone it is what one step from there gives; through more it is another."""
    gradients = []
    for count in (1, 4):
        settings = {"id_weight": 1.0, "id_loss": "body", "x_gen": "sampled", "x_gen_grad_steps": count}
        with joint(with_models, defaults, **settings) as (objective, batch, parameters):
            calls, denoiser = [], objective.denoiser
            predict = denoiser.predict

            def counted(*args, predict=predict, calls=calls):
                calls.append(torch.is_grad_enabled())
                return predict(*args)

            denoiser.predict = counted
            x0 = objective.rollout.sample(denoiser.conditions(batch), photo_generators(0, 0, 4))
            x0.square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in parameters.values()]))
            assert sum(calls) == count and len(calls) == 8, "every step once with and once without the conditions"
    assert float((gradients[0] - gradients[1]).norm()) > 0.1 * float(gradients[1].norm())


def test_l_id_by_the_body_encoder_is_nothing_for_nobody(with_models):
    with joint(with_models, id_weight=1.0, id_loss="body") as (objective, batch, _):
        with torch.no_grad():
            noised = objective.denoiser.add_noise(batch)
            x_gen = objective.generate(batch, noised, objective.denoiser(noised))
            loss = objective.pixel_losses["id"]
            assert loss(x_gen).any()
            x_gen.bodies = torch.zeros_like(x_gen.bodies)
            assert not loss(x_gen).any()


def test_the_augmentation_moves_and_shrinks_a_picture_and_keeps_its_proportions():
    picture = torch.full((1, 1, 96, 64), -1.0)
    picture[..., 40:60, 20:30] = 1.0  # twice as high as wide, left of the middle
    sides, heights = set(), []
    for seed in range(20):
        seen = random_affine(picture, photo_generators(seed, 0, 1))
        again = random_affine(picture.repeat(2, 1, 1, 1), photo_generators(seed, 0, 2))
        assert torch.allclose(seen[0], again[0], atol=1e-6), "whatever shares the batch"
        mass = (seen[0, 0] + 1) / 2
        high, wide = mass.sum(0).max(), mass.sum(1).max()
        assert float(high / wide) == pytest.approx(2, rel=0.1)
        heights.append(float(high))
        sides.add(float(mass.sum(0).argmax()) < 32)
    assert sides == {True, False} and 14 < min(heights) < 16.5 and 18.5 < max(heights) <= 20.1
    flat = torch.full_like(picture, 0.5)
    assert torch.allclose(random_affine(flat, photo_generators(0, 0, 1)), flat, atol=1e-6)


def test_many_step_bases_have_no_few_step_picture(world):
    slow = dataclasses.replace(get_family(world.family), defaults={"steps": 25})
    config = dataclasses.replace(CONFIG, id_weight=1.0, x_gen="few-step")
    with pytest.raises(BolidError, match="takes 25 steps and has no few-step LoRA") as error:
        FewStepRollout(None, None, slow, config)
    assert "sdxl-lightning" in error.value.hint


@pytest.mark.slow
def test_the_few_step_lora_is_on_for_x_gen_alone(with_models, tmp_path):
    """A LoRA that lets the base take few steps changes x_gen, and neither L_diff nor what is trained."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = load_base(get_family(with_models.family))
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    file = "few-steps.safetensors"
    StableDiffusionPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.unet), weight_name=file)
    settings = {"id_weight": 1.0, "x_gen": "few-step"}
    with joint(with_models, **settings) as (objective, batch, _):
        plain = objective(batch, with_pixels=True)
        assert not objective.rollout.has_lora
    lora = {"few_steps": {"steps": 2, "scheduler": "LCMScheduler"}, "few_steps_lora": tmp_path / file}
    with joint(with_models, of_family=lora, **settings) as (objective, batch, parameters):
        assert objective.rollout.has_lora and objective.rollout.consistency
        trained = sum(p.requires_grad for p in objective.denoiser.unet.parameters())
        assert trained == len(parameters)
        other = objective(batch, with_pixels=True)
    assert float(other["diffusion"].detach()) == pytest.approx(float(plain["diffusion"].detach()), rel=1e-5)
    # Next to nothing on noise, where the pose model finds nobody: compared by ratio, without pytest's absolute slack.
    assert float(other["id"].detach()) != pytest.approx(float(plain["id"].detach()), rel=1e-3, abs=0.0)
