from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from PIL import Image

from bolid.backends.face import DifferentiableFaces
from bolid.backends.loss_guidance import LossGuidance, keep_noise
from bolid.errors import BolidError
from bolid.formats.profile import load_profile
from bolid.generate import generate
from bolid.generate.guidance import FaceGuidanceLoss, head_mask
from bolid.method import losses
from bolid.models.families import get_family
from bolid.profile import make_profile
from bolid.scales import parse_person_guidance

SCHEDULERS = {
    "ddim, noise": lambda: DDIMScheduler(),
    "ddim, velocity": lambda: DDIMScheduler(prediction_type="v_prediction"),
    "ddim, latents": lambda: DDIMScheduler(prediction_type="sample"),
    "euler, noise": lambda: EulerDiscreteScheduler(timestep_spacing="trailing"),
    "lcm, noise": lambda: LCMScheduler(original_inference_steps=100),
}


class Brightness:
    """Detects in every picture a face whose embedding is the brightness of the two halves."""

    def detect_and_embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        halves = [half.mean((1, 2, 3)) for half in pixels.chunk(2, dim=3)]
        landmarks = torch.tensor([[1.0, 1], [1, 3], [3, 1], [3, 3], [2, 2]])
        return torch.stack(halves, 1), pixels.new_ones(len(pixels)), landmarks.expand(len(pixels), 5, 2)


FACE = torch.tensor([0.6, -0.8])
VAE = SimpleNamespace(
    config=SimpleNamespace(scaling_factor=2.0),
    dtype=torch.float32,
    decode=lambda latents: SimpleNamespace(sample=latents[:, :3] / 4),
)


def small_unet(kind: str):
    """It mixes its input's channels, so that what x0-hat shows goes with z_t."""
    kernel = 0.3 * torch.eye(4) + 0.05 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    kernel *= 1 if kind == "sample" else -1
    return lambda z_t: torch.einsum("ij,njhw->nihw", kernel.to(z_t), z_t)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_x0_hat_goes_down_the_gradient_whatever_the_sampler(name):
    """By so much, nearer to the face, of every picture by itself, in the steps of the interval and not in the last."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(4)
    kind = scheduler.config.prediction_type
    predict, loss = small_unet(kind), FaceGuidanceLoss(Brightness(), FACE, parse_person_guidance("0.5@0.25..1", "face"))
    z_t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    both, alone = LossGuidance([loss], VAE, scheduler), LossGuidance([loss], VAE, scheduler)
    assert [bool(both.active(step, 4)) for step in range(4)] == [False, True, True, False]
    mask = head_mask(Brightness().detect_and_embed(z_t[:1, :3])[2], (4, 4), (4, 4))
    for t in scheduler.timesteps[1:3]:
        plain, moved, kept = both.move(predict, z_t, t, [0])
        assert torch.equal(plain, predict(z_t)) and torch.allclose(kept, 0.5 * mask.expand(2, -1, -1, -1))
        one = alone.move(predict, z_t[:1], t, [0])[1]
        assert torch.allclose(one, moved[:1], atol=1e-5), "whatever else is in the batch"
        alphas = scheduler.alphas_cumprod[int(t)].expand(2)
        before, after = (losses.x0_from_prediction(part, z_t, alphas, kind) for part in (plain, moved))
        lengths = (((after - before).square() / mask).mean((1, 2, 3)) / mask.mean()).sqrt()
        assert torch.allclose(lengths, torch.full((2,), 0.5 * FaceGuidanceLoss.step), rtol=1e-2), "each by so much"
        cosines = [
            torch.cosine_similarity(Brightness().detect_and_embed(x0[:, :3] / 8)[0], FACE[None])
            for x0 in (before, after)
        ]
        assert (cosines[1] > cosines[0]).all()


def test_noise_stays_where_guidance_has_moved_something():
    """LCM's own step elsewhere, DDIM's in the middle of a face, and as much noise between."""
    lcm = LCMScheduler(original_inference_steps=100)
    z_t, prediction = torch.randn(2, 1, 4, 64, 48, generator=torch.Generator().manual_seed(0))

    def step(where: float | None) -> torch.Tensor:
        lcm.set_timesteps(4)
        t, generator = lcm.timesteps[0], torch.Generator().manual_seed(2)
        stepped = lcm.step(prediction, t, z_t, generator=generator, return_dict=False)
        return stepped[0] if where is None else keep_noise(lcm, t, z_t, stepped, torch.full((1, 1, 64, 48), where))

    plain = step(None)
    assert torch.allclose(step(0.0), plain, atol=1e-5)
    alpha, after = (lcm.alphas_cumprod[int(t)] for t in lcm.timesteps[:2])
    x0 = losses.x0_from_prediction(prediction, z_t, alpha[None], "epsilon")
    assert torch.allclose(step(1.0), after.sqrt() * x0 + (1 - after).sqrt() * prediction, atol=1e-2), "sigma 0"
    spread = [(step(where) - after.sqrt() * x0).std() for where in (0.0, 0.5, 0.8, 1.0)]
    assert torch.allclose(torch.stack(spread), spread[0], rtol=0.02)
    assert (step(0.5) - plain).abs().mean() > 0.1
    ddim = DDIMScheduler()
    assert keep_noise(ddim, 1, z_t, (plain, x0), torch.ones(1, 1, 64, 48)) is plain, "it keeps its noise anyway"


def test_what_is_moved_is_around_the_face():
    """A face at the top of a full-body picture, and one that fills a portrait."""
    face = torch.tensor([[-1.0, -1], [1, -1], [0, 0], [-0.7, 1], [0.7, 1]])
    small, large = 3 * face + torch.tensor([48.0, 20]), 14 * face + torch.tensor([48.0, 50])
    near = head_mask(torch.stack([small, large]), (128, 96), (16, 12))[:, 0]
    assert near.shape == (2, 16, 12)
    rows = near.argmax(dim=1)[:, 6]
    assert rows.tolist() == [2, 6] and near.max() > 0.9
    assert near[0, 6:].max() < 0.01 and near[1, 2:10].min() > 0.3


@pytest.fixture(scope="module")
def me(rendered_people, tmp_path_factory):
    """The profile of one of the rendered people."""
    photos = sorted(min(rendered_people.iterdir()).glob("*.jpg"))
    return make_profile(photos, tmp_path_factory.mktemp("profile") / "me.safetensors", device="cpu").path


@pytest.mark.slow
@pytest.mark.parametrize(("part", "models", "interval"), [("face", 2, "1@0.3..0.9"), ("body", 3, "1@0.5..0.9")])
def test_guided_pictures_are_others_and_say_what_guided_them(me, tmp_path, part, models, interval):
    seen = {}
    for weight in (0, 1):
        (path,) = generate(
            ["a full body photo of a woman standing, in a red short-sleeved top and blue trousers, in a studio"],
            tmp_path / str(weight), profile=me, device="cpu", **{f"{part}_guidance": weight},
        )  # fmt: skip
        with Image.open(path) as picture:
            record, seen[weight] = json.loads(picture.text["bolid"]), np.asarray(picture)
        assert record["config"].get(f"{part}_guidance") == (interval if weight else None)
        assert len({name for name in record["inputs"] if name.startswith("guidance_")}) == (models if weight else 0)
    assert (seen[0] != seen[1]).any()


@pytest.mark.slow
def test_faces_come_nearer_to_the_person(me, tmp_path):
    """By the family's own face model, which guides; by others, and bodies: docs/results/guidance.md. Single bodies
    differ by more than what guidance changes."""
    person, faces = load_profile(me), DifferentiableFaces(get_family("tiny").require("face"))
    likeness = []
    for weight in (0, 1):
        paths = generate(
            ["a portrait of a woman, in a red short-sleeved top, in a studio"], tmp_path / str(weight),
            profile=me, device="cpu", n=4, face_guidance=weight,
        )  # fmt: skip
        pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
        found = faces(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
        likeness.append(float((found @ person.face).mean()))
    assert likeness[1] > likeness[0] + 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_person": 1, "face_guidance": 1}, "--face-guidance needs a face, and new person 1 has none"),
        ({"face_guidance": 1}, "--face-guidance needs a person, but nobody is to be shown"),
        ({"new_person": 1, "face_guidance": "down=1"}, "--face-guidance is down=1"),
        (
            {"new_person": 1, "face_guidance": "1@0.43..0.49"},
            "--face-guidance 1@0.43..0.49 covers none of the 6 steps but the last",
        ),
        (
            {"new_person": 1, "body_guidance": 1, "steps": 2},
            "--body-guidance 1@0.5..0.9 covers none of the 2 steps but the last",
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
