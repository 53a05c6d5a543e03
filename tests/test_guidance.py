from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from PIL import Image

from bolid.backends.face import DifferentiableFaces
from bolid.errors import BolidError
from bolid.formats.profile import load_profile
from bolid.formats.sliders import load_sliders
from bolid.generate.command import generate
from bolid.generate.guidance import FaceGuide, _noise_kept, guided_by, heads
from bolid.method import losses
from bolid.models.families import get_family
from bolid.person import PersonReader
from bolid.profile import make_profile
from bolid.scales import parse_person_guidance
from bolid.views import View

SCHEDULERS = {
    "ddim, noise": lambda: DDIMScheduler(),
    "ddim, velocity": lambda: DDIMScheduler(prediction_type="v_prediction"),
    "ddim, latents": lambda: DDIMScheduler(prediction_type="sample"),
    "euler, noise": lambda: EulerDiscreteScheduler(timestep_spacing="trailing"),
    "lcm, noise": lambda: LCMScheduler(original_inference_steps=100),
}


class Brightness:
    """Sees a face's embedding in the two halves of a picture, and is always sure."""

    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        halves = [half.mean((1, 2, 3)) for half in pixels.chunk(2, dim=3)]
        landmarks = torch.tensor([[1.0, 1], [1, 3], [3, 1], [3, 3], [2, 2]])
        return torch.stack(halves, 1), pixels.new_ones(len(pixels)), landmarks.expand(len(pixels), 5, 2)


def small_pipe(scheduler):
    """What the guidance needs of a pipeline. The UNet mixes its input's channels, more or less by what the prompt says,
    so that what x0-hat shows goes with z_t."""
    kernel = 0.3 * torch.eye(4) + 0.05 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    kernel *= 1 if scheduler.config.prediction_type == "sample" else -1

    def forward(sample, timestep, encoder_hidden_states, added_cond_kwargs=None):
        mixed = torch.einsum("ij,njhw->nihw", kernel.to(sample), sample)
        return (mixed * (encoder_hidden_states + added_cond_kwargs["image_embeds"][0])[:, None, None, None],)

    vae = SimpleNamespace(
        config=SimpleNamespace(scaling_factor=2.0),
        dtype=torch.float32,
        decode=lambda latents: SimpleNamespace(sample=latents[:, :3] / 4),
    )
    return SimpleNamespace(unet=SimpleNamespace(forward=forward), vae=vae, scheduler=scheduler, num_timesteps=4)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guided", [False, True])
def test_x0_hat_goes_down_the_gradient_whatever_the_sampler(name, guided):
    """By so much, nearer to the face, of every picture by itself, in the steps of the stretch and not in the last."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(4)
    pipe, faces, face = small_pipe(scheduler), Brightness(), torch.tensor([0.6, -0.8])
    rows = 4 if guided else 2
    sample = torch.randn(rows, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    sample[:2] = sample[-2:]  # as a pipeline repeats its latents
    states, more = torch.linspace(0.5, 1, rows), {"image_embeds": [torch.linspace(0.1, 0.3, rows)]}
    plain, guide = pipe.unet.forward, FaceGuide(faces, face, parse_person_guidance("0.5@0.25..1", "face"))
    other = small_pipe(SCHEDULERS[name]())
    with guided_by(pipe, [guide], 2), guided_by(other, [guide], 1):
        for step, timestep in enumerate(scheduler.timesteps):
            (bare,) = plain(sample, timestep, states, more)
            (answer,) = pipe.unet.forward(sample, timestep, states, added_cond_kwargs=more)
            alone = {"image_embeds": [more["image_embeds"][0][-1:]]}
            (one,) = other.unet.forward(sample[-1:], timestep, states[-1:], added_cond_kwargs=alone)
            assert torch.allclose(one, answer[-1:], atol=1e-5), "whoever else is painted with it"
            if step in (0, 3):
                assert torch.equal(answer, bare)
                continue
            alphas = scheduler.alphas_cumprod[int(timestep)].expand(rows)
            kind = scheduler.config.prediction_type
            before, after = (losses.x0_from_prediction(a, sample, alphas, kind) for a in (bare, answer))
            moved, near = (after - before)[-2:], heads(faces.look(sample[:1, :3])[2], (4, 4), (4, 4))
            lengths = ((moved.square() / near).mean((1, 2, 3)) / near.mean()).sqrt()
            assert torch.allclose(lengths, torch.full((2,), 0.5 * FaceGuide.step), rtol=1e-2), "each by so much"
            cosines = [torch.cosine_similarity(faces.look(x0[-2:, :3] / 8)[0], face[None]) for x0 in (before, after)]
            assert (cosines[1] > cosines[0]).all()
            if guided:  # so that uncond + w (cond - uncond) is moved by the same, whatever w
                assert torch.allclose((after - before)[:2], (after - before)[2:], atol=1e-4)
                assert (bare[:2] - bare[2:]).abs().max() > 0.01
    assert pipe.unet.forward is plain


def test_noise_stays_where_a_guide_has_moved_something():
    """LCM's own step elsewhere, DDIM's in the middle of a face, and as much noise between."""
    lcm = LCMScheduler(original_inference_steps=100)
    sample, answer = torch.randn(2, 1, 4, 64, 48, generator=torch.Generator().manual_seed(0))

    def step(where: float | None) -> torch.Tensor:
        lcm.set_timesteps(4)
        keep = [] if where is None else [torch.full((1, 1, 64, 48), where)]
        with _noise_kept(lcm, keep):
            stepped = lcm.step(
                answer, lcm.timesteps[0], sample, generator=torch.Generator().manual_seed(2), return_dict=False
            )
        assert not keep, "for one step"
        return stepped[0]

    plain = step(None)
    assert torch.allclose(step(0.0), plain, atol=1e-5)
    alpha, after = (lcm.alphas_cumprod[int(t)] for t in lcm.timesteps[:2])
    x0 = losses.x0_from_prediction(answer, sample, alpha[None], "epsilon")
    assert torch.allclose(step(1.0), after.sqrt() * x0 + (1 - after).sqrt() * answer, atol=1e-2), "sigma 0"
    spread = [(step(where) - after.sqrt() * x0).std() for where in (0.0, 0.5, 0.8, 1.0)]
    assert torch.allclose(torch.stack(spread), spread[0], rtol=0.02)
    assert (step(0.5) - plain).abs().mean() > 0.1
    assert "generator" in inspect.signature(lcm.step).parameters


def test_the_more_a_face_is_drawn_the_more_noise_stays_around_it():
    def steps(weight: float, guided: bool = True) -> torch.Tensor:
        scheduler = LCMScheduler(original_inference_steps=100)
        scheduler.set_timesteps(4)
        pipe = small_pipe(scheduler)
        guide = FaceGuide(Brightness(), torch.tensor([0.6, -0.8]), parse_person_guidance(f"{weight}@0..1", "face"))
        sample = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        states, more = torch.ones(1), {"image_embeds": [torch.ones(1)]}
        with guided_by(pipe, [guide] if guided else [], 1):
            (answer,) = pipe.unet.forward(sample, scheduler.timesteps[0], states, added_cond_kwargs=more)
            after = scheduler.step(
                answer, scheduler.timesteps[0], sample, generator=torch.Generator().manual_seed(2), return_dict=False
            )[0]
        assert "step" not in vars(scheduler) or scheduler.step.__func__ is LCMScheduler.step
        return after

    plain = steps(1, guided=False)
    moved = [(steps(weight) - plain).abs().mean() for weight in (1e-4, 0.3, 1)]
    assert moved[0] < 1e-3 < 0.05 < moved[1] < moved[2], "beyond the 0.15 that x0-hat is moved"


def test_what_is_moved_is_around_the_face():
    """A face at the top of a full-body picture, and one that fills a portrait."""
    face = torch.tensor([[-1.0, -1], [1, -1], [0, 0], [-0.7, 1], [0.7, 1]])
    small, large = 3 * face + torch.tensor([48.0, 20]), 14 * face + torch.tensor([48.0, 50])
    near = heads(torch.stack([small, large]), (128, 96), (16, 12))[:, 0]
    assert near.shape == (2, 16, 12)
    rows = near.argmax(dim=1)[:, 6]
    assert rows.tolist() == [2, 6] and near.max() > 0.9
    assert near[0, 6:].max() < 0.01 and near[1, 2:10].min() > 0.3


def test_pictures_come_nearer_to_the_person(rendered_people, tmp_path):
    """By the tiny family's own models, which guide; by others that do not, docs/results/tiny-figures.md."""
    folder = sorted(rendered_people.iterdir())[0]
    make_profile(sorted(folder.glob("*.jpg")), tmp_path / "me.safetensors", device="cpu")
    me, family = load_profile(tmp_path / "me.safetensors"), get_family("tiny")
    faces, reader = DifferentiableFaces(family.require("face")), PersonReader(family)
    readout = load_sliders(family.body_sliders, reader.encoder.space).readout

    def unlike(part: str, pictures: list[np.ndarray]) -> float:
        if part == "face":
            pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
            return -float((faces(pixels) @ me.face).mean())
        views = [view for view in reader.view_reader.read(pictures) if isinstance(view, View)]
        read = torch.cat([reader._encode(view)[0] for view in views])
        return float(((read - me.body_mean) @ readout.T).square().mean())

    prompts = {
        "face": "a portrait of a woman, in a red short-sleeved top, in a studio",
        "body": "a full body photo of a woman standing, in a red short-sleeved top and blue trousers, in a studio",
    }
    for part, prompt in prompts.items():
        seen = {}
        for weight in (0, 1):
            paths = generate(
                [prompt], tmp_path / f"{part}{weight}", profile=tmp_path / "me.safetensors", device="cpu", n=4, steps=8,
                **{f"{part}_guidance": weight},
            )  # fmt: skip
            seen[weight] = unlike(part, [np.asarray(Image.open(path)) for path in paths])
            with Image.open(paths[0]) as picture:
                record = json.loads(picture.text["bolid"])
            config, used = record["config"], {name for name in record["inputs"] if name.startswith("guide_")}
            assert len(used) == {"face": (0, 2), "body": (0, 3)}[part][weight]
            assert config.get(f"{part}_guidance") == (None, {"face": "1@0.3..0.9", "body": "1@0.5..0.9"}[part])[weight]
        assert seen[1] < seen[0] - 0.05, part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_person": 1, "face_guidance": 1}, "--face-guidance needs a face, and new person 1 has none"),
        ({"face_guidance": 1}, "--face-guidance needs a person, but nobody is to be shown"),
        ({"new_person": 1, "face_guidance": "down=1"}, "--face-guidance is down=1"),
        (
            {"new_person": 1, "face_guidance": "1@0.43..0.49"},
            "--face-guidance 1@0.43..0.49 covers none of the 12 steps",
        ),
        ({"new_person": 1, "grid": ["face-guidance=0,nan"]}, "--grid face-guidance is nan"),
        ({"body_guidance": 1}, "--body-guidance needs a person, but nobody is to be shown"),
        ({"new_person": 1, "grid": ["body-guidance=0,1@0.6"]}, "--grid body-guidance is 1@0.6"),
    ],
)
def test_what_cannot_be_guided(tmp_path, options, message):
    with pytest.raises(BolidError, match=message):
        generate(["a portrait of a man"], tmp_path / "out", family="tiny", device="cpu", **options)
    assert not (tmp_path / "out").exists()
