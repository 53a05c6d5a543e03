from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from bolid.method import losses
from bolid.models.families import get_family

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@pytest.fixture
def noised():
    """(scheduler, clean latents, noise, timesteps, noisy latents) for a prediction type."""

    def make(prediction_type: str):
        torch.manual_seed(0)
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        latents, noise = torch.randn(2, 5, 4, 6, 5).unbind()
        timesteps = torch.tensor([0, 10, 300, 700, 999])
        return scheduler, latents, noise, timesteps, scheduler.add_noise(latents, noise, timesteps)

    return make


def body(seed: int = 0, batch: int = 4) -> torch.Tensor:
    """Random keypoints [batch, 17, 3] of some 100 pixels, surely seen."""
    generator = torch.Generator().manual_seed(seed)
    keypoints = torch.rand(batch, 17, 3, generator=generator, dtype=torch.float64) * 100
    keypoints[..., 2] = 0.5 + keypoints[..., 2] / 200
    return keypoints


# ---- x_gen --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_amounts_to_the_clean_latents(noised, prediction_type):
    scheduler, latents, noise, timesteps, noisy = noised(prediction_type)
    target = losses.diffusion_target(scheduler, latents, noise, timesteps)
    alphas = losses.alpha_bar(scheduler, timesteps)
    x0 = losses.x0_from_prediction(target, noisy, alphas, prediction_type)
    assert torch.allclose(x0, latents, atol=1e-4)
    assert torch.allclose(losses.noise_from_x0(latents, noisy, alphas)[1:], noise[1:], atol=1e-4)
    back = losses.prediction_from_x0(latents, noisy, alphas, prediction_type)
    assert torch.allclose(back[1:], target[1:], atol=1e-4)
    assert torch.allclose(losses.noise_level(latents, noise, alphas), noisy, atol=1e-6)


@pytest.mark.parametrize("function", [losses.x0_from_prediction, losses.prediction_from_x0])
def test_an_unknown_prediction_type_is_refused(noised, function):
    scheduler, _, noise, timesteps, noisy = noised("epsilon")
    with pytest.raises(ValueError, match="flow"):
        function(noise, noisy, losses.alpha_bar(scheduler, timesteps), "flow")
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="flow"):
        losses.diffusion_target(scheduler, noisy, noise, timesteps)


# ---- L_diff -------------------------------------------------------------------------------------------------------


def test_min_snr_weighs_the_same_error_of_x0_alike_in_every_parametrisation():
    alphas = torch.linspace(0.01, 0.99, 50)
    snr = alphas / (1 - alphas)
    of_x0 = losses.min_snr_weight(alphas, "sample", 5.0)
    assert torch.allclose(of_x0, snr.clamp_max(5.0))
    # An error e of x0 is an error e * sqrt(SNR) of the noise, and e * sqrt(SNR + 1) of the velocity.
    assert torch.allclose(losses.min_snr_weight(alphas, "epsilon", 5.0) * snr, of_x0, rtol=1e-4)
    assert torch.allclose(losses.min_snr_weight(alphas, "v_prediction", 5.0) * (snr + 1), of_x0, rtol=1e-4)
    assert torch.equal(losses.min_snr_weight(alphas, "epsilon", 0.0), torch.ones(50))


# ---- L_id ---------------------------------------------------------------------------------------------------------


def test_keypoint_loss_is_the_squared_distance_in_heights():
    target, height = body(), torch.full((4,), 50.0, dtype=torch.float64)
    assert not losses.loss_keypoints(target, target, height).any()
    shifted = target.clone()
    shifted[..., 0] += 5
    assert torch.allclose(losses.loss_keypoints(shifted, target, height), torch.tensor(0.01, dtype=torch.float64))
    twice = target * torch.tensor([2.0, 2.0, 1.0])
    both = losses.loss_keypoints(shifted * torch.tensor([2.0, 2.0, 1.0]), twice, 2 * height)
    assert torch.allclose(both, torch.tensor(0.01, dtype=torch.float64)), "twice the size, the same loss"


def test_keypoint_loss_looks_at_the_twelve_of_the_body_that_are_seen():
    target, height = body(), torch.full((4,), 50.0, dtype=torch.float64)
    other = target.clone()
    other[:, :5, :2] += 40  # the head
    other[:, 7, :2] += 40
    other[:, 7, 2] = 0  # an elbow that is not seen
    assert not losses.loss_keypoints(other, target, height).any()
    other[:, 9, 0] += 40
    surely = losses.loss_keypoints(other, target, height)
    other[:, 9, 2] *= 0.1
    unsure = losses.loss_keypoints(other, target, height)
    assert (unsure > 0).all() and (unsure < 0.2 * surely).all()


def test_bone_ratios_do_not_change_with_place_size_or_pose():
    target = body()
    assert not losses.loss_bone_ratios(target, target).any()
    moved = target * torch.tensor([1.7, 1.7, 1.0]) + torch.tensor([30.0, -8.0, 0.0])
    assert (losses.loss_bone_ratios(moved, target) < 1e-20).all()
    bent = target.clone()  # both forearms turned about the elbows
    for elbow, wrist in ((7, 9), (8, 10)):
        across, down = (target[:, wrist, :2] - target[:, elbow, :2]).unbind(-1)
        bent[:, wrist, :2] = target[:, elbow, :2] + torch.stack([-down, across], -1)
    assert (losses.loss_bone_ratios(bent, target) < 1e-20).all()
    assert (losses.loss_keypoints(bent, target, torch.full((4,), 50.0)) > 1e-3).all()
    longer = target.clone()
    longer[:, 15:, :2] += 0.5 * (target[:, 15:, :2] - target[:, 13:15, :2])  # both shins half as long again
    assert (losses.loss_bone_ratios(longer, target) > 1e-4).all()


def test_bone_ratios_of_what_is_not_seen_are_no_reason_to_change():
    """A picture without legs has no yardstick: loss and gradient are 0, not nan."""
    target, predicted = body(), body(1)
    target[:, 13:, 2] = 0
    predicted.requires_grad_(True)
    loss = losses.loss_bone_ratios(predicted, target)
    loss.sum().backward()
    assert not loss.any() and not predicted.grad.any()


@pytest.mark.parametrize("loss", [losses.loss_bone_ratios, lambda a, b: losses.loss_keypoints(a, b, torch.ones(4))])
def test_being_unsure_does_not_pay(loss):
    predicted = body(1).requires_grad_(True)
    loss(predicted, body()).sum().backward()
    assert torch.isfinite(predicted.grad).all() and predicted.grad[..., :2].any()
    assert not predicted.grad[..., 2].any()


# ---- L_CLIP -------------------------------------------------------------------------------------------------------


def test_clip_loss_is_one_minus_the_cosine():
    embeds = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    assert losses.loss_clip(embeds, 5 * embeds) == pytest.approx([0.0] * 3, abs=1e-6)
    assert losses.loss_clip(embeds, -embeds) == pytest.approx([2.0] * 3, abs=1e-6)


# ---- with the real networks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(rendered_people):
    """A full-length photo, uint8 [H,W,3]."""
    import json

    from bolid.formats.images import read_photo

    for truth in sorted(rendered_people.rglob("*.json")):
        if json.loads(truth.read_text())["attributes"]["framing"] == "full body":
            return read_photo(truth.with_suffix(".jpg"))
    raise LookupError("no full-length photo was rendered")


def test_the_best_person_is_whom_detect_finds(photo):
    from bolid.backends.diffusion import to_pixel_values
    from bolid.backends.pose import PoseModel

    model = PoseModel(get_family("tiny").pose)
    small = photo[: photo.shape[0] // 2 * 2, : photo.shape[1] - 20]  # sides that are no multiples of the stride
    for picture in (photo, small):
        found = model.detect([picture])[0][0]
        pixels = to_pixel_values([picture], "cpu", torch.float32).requires_grad_(True)
        keypoints, box, score = model.best_person(pixels)
        height = found.box[3] - found.box[1]
        assert np.abs(keypoints[0, :, :2].detach().numpy() - found.keypoints[:, :2]).max() < 0.03 * height
        assert float(score.detach()) == pytest.approx(found.score, abs=0.05) and found.score > 0.5
        assert np.abs(box[0].detach().numpy() - found.box).max() < 0.05 * height
        keypoints[..., :2].sum().backward()
        assert torch.isfinite(pixels.grad).all() and pixels.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("id_loss", "clip_target"), [("keypoints", "both"), ("bone-ratios", "image"), ("", "text"), ("keypoints", "")]
)
def test_a_picture_against_itself_costs_nothing_and_the_gradient_reaches_the_latents(photo, id_loss, clip_target):
    from PIL import Image

    from bolid.backends.diffusion import LatentEncoder
    from bolid.train_adapter import TrainAdapterConfig
    from bolid.train_adapter.decoder import LatentDecoder
    from bolid.train_adapter.pixel_losses import GeneratedPictures, pixel_losses

    family = get_family("tiny")
    encoder = LatentEncoder(family)
    height, width = family.image_size
    picture = np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS))
    latents = torch.from_numpy(encoder.encode([picture]))[:, 0].float().repeat(2, 1, 1, 1)
    config = TrainAdapterConfig(
        id_weight=float(bool(id_loss)), id_loss=id_loss or "keypoints", clip_weight=float(bool(clip_target)),
        clip_target=clip_target or "text",
    )  # fmt: skip
    terms, decode = pixel_losses(config, family), LatentDecoder(family, encoder.vae)
    assert set(terms) == ({"id"} if id_loss else set()) | ({"clip"} if clip_target else set())
    assert {name for term in terms.values() for name in term.inputs} == (
        ({"pose"} if id_loss else set()) | ({"image_text"} if clip_target else set())
    )

    def compute(x_gen: torch.Tensor) -> dict[str, torch.Tensor]:
        captions = ["a full body photo of a woman", ""]
        pictures = GeneratedPictures(decode, x_gen, latents, [3, 3], captions, torch.zeros(2, 8), torch.zeros(2, 512))
        return {name: term(pictures) for name, term in terms.items()}

    same = compute(latents)
    if id_loss:
        assert same["id"] == pytest.approx([0.0, 0.0], abs=1e-9)
    if clip_target == "image":
        assert same["clip"] == pytest.approx([0.0, 0.0], abs=1e-5)
    elif clip_target:
        assert float(same["clip"][0]) > 0.01
        assert float(same["clip"][1]) == pytest.approx(0.0, abs=1e-5), "no caption, no text loss"

    torch.manual_seed(0)
    changed = (latents + 0.3 * latents.std() * torch.randn_like(latents)).requires_grad_(True)
    other = compute(changed)
    assert all(bool(value.sum() > 0) for value in other.values())
    sum(value.sum() for value in other.values()).backward()
    assert torch.isfinite(changed.grad).all() and changed.grad[0].any()


def test_a_tiny_decoder_of_the_family_takes_the_place_of_the_vae(tmp_path):
    from diffusers import AutoencoderTiny

    from bolid.errors import BolidError
    from bolid.train_adapter.decoder import LatentDecoder, find_decoder

    def decoder(name: str, channels: int):
        network = AutoencoderTiny(
            encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), latent_channels=channels,
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        )  # fmt: skip
        network.save_pretrained(tmp_path / name)
        return network

    family = dataclasses.replace(get_family("tiny"), root=tmp_path)
    vae = decoder("vae", 4)
    assert find_decoder(family, "") is None and not LatentDecoder(family, vae).inputs
    decoder("tiny-decoder", 4)
    decode = LatentDecoder(family, vae)
    assert decode.vae is not vae and "decoder" in decode.inputs
    with pytest.raises(BolidError, match="holds no AutoencoderTiny"):
        find_decoder(family, str(tmp_path / "nowhere"))
    decoder("foreign", 8)
    with pytest.raises(BolidError, match="takes 8 latent channels, the base has 4"):
        LatentDecoder(family, vae, str(tmp_path / "foreign"))


def test_loss_face():
    a, b = torch.eye(4)[:3], torch.eye(4)[[0, 3, 2]] * torch.tensor([[2.0], [1.0], [-1.0]])
    assert losses.loss_face(a, b).tolist() == [0, 1, 2]


def test_the_face_detection_loss_stops_at_the_photos_score():
    photo_score = torch.tensor([0.99, 0.99, 0.6, 0.6])
    score = torch.tensor([0.75, 0.25, 0.75, 0.3]).requires_grad_(True)
    loss = losses.loss_face_detection(score, photo_score)
    assert loss.tolist() == pytest.approx([0, math.log(3), 0, math.log(2)])
    loss.sum().backward()
    assert score.grad.tolist() == pytest.approx([0, -4, 0, -1 / 0.3])
    assert math.isfinite(losses.loss_face_detection(torch.zeros(1), torch.ones(1)))
