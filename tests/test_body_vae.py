from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from bolid.method import body_vae as bv
from bolid.method import body_views as bw

STANDING = np.array(
    [[48, 20], [51, 17], [45, 17], [54, 19], [42, 19], [60, 36], [36, 36], [66, 52], [30, 52], [68, 66], [28, 66],
     [55, 66], [41, 66], [55, 90], [41, 90], [55, 114], [41, 114]], np.float32,
)  # fmt: skip


def keypoints(confidence: float = 0.9) -> np.ndarray:
    return np.concatenate([STANDING, np.full((17, 1), confidence, np.float32)], axis=1)


def views(n: int = 6, seed: int = 0) -> bw.Views:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (128, 96, 3), dtype=np.uint8)
    cut = [
        bw.view_crop(image, keypoints() + rng.normal(0, 1, (17, 3)).astype(np.float32) * [1, 1, 0]) for _ in range(n)
    ]
    return bw.make_views(
        torch.from_numpy(np.stack([c for c, _ in cut])), torch.from_numpy(np.stack([k for _, k in cut]))
    )


def gaussians(people: int = 3, photos: int = 5, dim: int = 4):
    generator = torch.Generator().manual_seed(0)
    mean, logvar = (torch.randn(people, photos, dim, generator=generator) for _ in range(2))
    return mean, logvar, torch.rand(people, photos, generator=generator)


def test_keypoint_weight_is_the_papers_formula():
    points = torch.tensor([[[0.0, 0.0, 0.5], [0.5, -0.5, 1.0]]])
    weight = bw.gaussian_keypoint_weight(points, (48, 36), sigma=0.1)[0]
    y, x = torch.meshgrid((torch.arange(48) + 0.5) / 48, (torch.arange(36) + 0.5) / 48, indexing="ij")
    expected = torch.zeros(48, 36)
    for px, py, confidence in points[0]:
        distance = (x - (px + 1) / 2 * 0.75) ** 2 + (y - (py + 1) / 2) ** 2
        expected = torch.maximum(expected, confidence * torch.exp(-distance / 0.02))
    assert torch.allclose(weight, expected / expected.max(), atol=1e-5)
    assert weight.max() == 1


def test_crop_keeps_proportions_and_does_not_depend_on_scale():
    image = np.zeros((128, 96, 3), np.uint8)
    large = np.zeros((256, 192, 3), np.uint8)
    _, inside = bw.view_crop(image, keypoints())
    _, inside_large = bw.view_crop(large, keypoints() * [2, 2, 1])
    np.testing.assert_allclose(inside, inside_large, atol=1e-5)
    pixels = inside[:, :2] * [36, 48]
    spans = (pixels[16] - pixels[5]) / (STANDING[16] - STANDING[5])
    assert spans[0] == pytest.approx(spans[1], rel=1e-5)


@pytest.mark.parametrize("unseen", [(), (9, 10, 15, 16), tuple(range(17))])
@pytest.mark.parametrize("scale", [1.0, 2.7])
def test_a_batchs_crops_are_those_of_single_photos(unseen, scale):
    """Up to the resampling, which PIL does in whole numbers; and differentiable."""
    rng = np.random.default_rng(0)
    height, width = round(128 * scale), round(96 * scale)
    smooth = torch.nn.functional.interpolate(
        torch.from_numpy(rng.random((1, 3, 12, 9))), (height, width), mode="bicubic"
    )
    image = (smooth[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    points = keypoints() * np.float32([scale, scale, 1]) + np.float32([-12, 3, 0])  # an edge of the window lies outside
    points[list(unseen), 2] = 0.1
    crop, inside = bw.view_crop(image, points)
    pixels = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1).requires_grad_()
    places = torch.from_numpy(points)[None].requires_grad_()
    crops, insides = bw.crop_views(pixels, places)
    np.testing.assert_allclose(insides[0].detach().numpy(), inside, atol=1e-5)
    shown = (crops[0].detach().permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(shown - crop).mean() < 2, "of 255"
    (crops.sum() + insides.sum()).backward()
    assert pixels.grad.any() and (places.grad[..., :2].any() or len(unseen) == 17)


def test_body_distance_is_between_bodies_in_one_pose():
    torch.manual_seed(0)
    model, seen = bv.BodyVAE(body_dim=6, width=4, hidden_dim=16).eval(), views()
    one, two = torch.randn(6, 6), torch.randn(6, 6)
    assert not bv.body_distance(model, one, one, seen).any()
    there, back = bv.body_distance(model, one, two, seen), bv.body_distance(model, two, one, seen)
    assert (there > 0).all() and torch.allclose(there, back, rtol=1e-4)
    with torch.no_grad():  # a number that the decoder does not look at is not of the body
        model.decoder[0].weight[:, 0] = 0
    other = one.clone()
    other[:, 0] += 5
    assert not bv.body_distance(model, one, other, seen).any()
    lengths = bw.skeleton(seen.keypoints)
    hidden = seen._replace(keypoints=seen.keypoints * torch.tensor([1.0, 1.0, 0.0]))
    assert lengths.confidence.any() and (bv.body_distance(model, one, two, hidden) < there).all()


def test_skeleton_ignores_scale_and_unseen_keypoints():
    small = torch.from_numpy(bw.view_crop(np.zeros((128, 96, 3), np.uint8), keypoints())[1])[None]
    bones = bw.skeleton(small)
    shrunk = small * torch.tensor([0.5, 0.5, 1.0])
    assert torch.allclose(bones.log_lengths, bw.skeleton(shrunk).log_lengths, atol=1e-4)
    assert float(bones.scale) == pytest.approx(2 * float(bw.skeleton(shrunk).scale), rel=1e-4)
    half = keypoints()
    half[11:, 2] = 0
    cut = bw.skeleton(torch.from_numpy(bw.view_crop(np.zeros((128, 96, 3), np.uint8), half)[1])[None])
    assert (cut.log_lengths[0, [11, 12, 13, 14]] == 0).all() and (cut.confidence[0, [11, 12, 13, 14]] == 0).all()


def test_finer_patches_show_the_same_parts():
    rng = np.random.default_rng(3)
    noise = torch.from_numpy(rng.normal(size=(1, 3, 16, 12))).float()
    smooth = torch.nn.functional.interpolate(noise, (256, 192), mode="bicubic").clamp(-1, 1)
    points = torch.from_numpy(keypoints() * np.float32([2, 2, 1]))[None]
    coarse, fine = (bw.make_views(*bw.crop_views(smooth, points, detail=detail)) for detail in (1.0, 2.0))
    for name, (h, w) in bw.PATCHES.items():
        few, many = getattr(coarse, name)[0], getattr(fine, name)[0]
        assert many.shape[-2:] == (2 * h, 2 * w) == bw.patch_sizes(2)[name]
        again = torch.nn.functional.interpolate(many, (h, w), mode="bilinear", align_corners=True)
        assert (again - few).abs().mean() < 0.3 * few.std()
    model = bv.BodyVAE(6, width=4, detail=2.0).eval()
    assert model.encode(fine)[0].shape == (1, 6)
    assert [part.shape for part in bv.outline_target(fine)] == [part.shape for part in bv.outline_target(coarse)]


def test_weights_for_finer_patches_read_the_means_of_finer_maps():
    torch.manual_seed(0)
    coarse, fine = bv.CropEncoder(4, 1.0).state_dict(), bv.CropEncoder(4, 1.5)
    state = bv.at_detail({f"crop_encoder.{name}": value for name, value in coarse.items()}, 1.0, 1.5)
    fine.load_state_dict({name.removeprefix("crop_encoder."): value for name, value in state.items()})
    for name, size in bw.patch_sizes(1.5).items():
        before, after = coarse[f"{name}.weight"], state[f"crop_encoder.{name}.weight"]
        h, w = bv._strided(size)
        maps = torch.rand(before.shape[0], after.shape[1] // (h * w), h, w)
        means = torch.nn.functional.adaptive_avg_pool2d(maps, bv._strided(bw.PATCHES[name]))
        read = torch.einsum("pf,pfo->po", means.flatten(1), before)
        torch.testing.assert_close(torch.einsum("pf,pfo->po", maps.flatten(1), after), read)


def test_patches_turn_with_the_body():
    """A picture turned by 90 degrees shows the same torso."""
    rng = np.random.default_rng(1)
    smooth = torch.nn.functional.interpolate(
        torch.from_numpy(rng.normal(size=(1, 3, 12, 9))).float(), (96, 72), mode="bicubic"
    )
    bones = bw.skeleton(torch.tensor(bw.view_crop(np.zeros((128, 96, 3), np.uint8), keypoints())[1])[None])
    straight = bw.body_patches(smooth, bones)["torso"]

    def turn(xy: torch.Tensor) -> torch.Tensor:
        return torch.stack([36 + (xy[..., 1] - 48), 48 - (xy[..., 0] - 36)], dim=-1)

    turned_points = torch.cat([turn(bones.points[..., :2]), bones.points[..., 2:]], dim=-1)
    directions = torch.stack([bones.directions[..., 1], -bones.directions[..., 0]], dim=-1)
    yy, xx = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(72) + 0.5, indexing="ij")
    source = torch.stack([36 - (yy - 48), 48 + (xx - 36)], dim=-1) / torch.tensor([36.0, 48.0]) - 1
    turned = torch.nn.functional.grid_sample(smooth, source[None].float(), align_corners=False, padding_mode="border")
    other = bw.body_patches(turned, bones._replace(points=turned_points, directions=directions))["torso"]
    assert (straight - other).abs().mean() < 0.05 * straight.abs().mean()


def test_fusion_does_not_depend_on_the_order():
    mean, logvar, confidence = gaussians()
    expected = bv.fuse(mean, logvar, confidence)
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
        got = bv.fuse(mean[:, order], logvar[:, order], confidence[:, order])
        assert torch.allclose(got[0], expected[0], atol=1e-6) and torch.allclose(got[1], expected[1], atol=1e-6)


def test_another_photo_never_raises_the_uncertainty():
    mean, logvar, confidence = gaussians()
    spreads = [bv.fuse(mean[:, :m], logvar[:, :m], confidence[:, :m])[1] for m in range(6)]
    assert (spreads[0] == 0).all()  # no photo: the prior
    for fewer, more in itertools.pairwise(spreads):
        assert (more <= fewer).all()


def test_a_photo_without_confidence_counts_for_nothing():
    mean, logvar, confidence = gaussians()
    confidence[:, -1] = 0
    got, expected = bv.fuse(mean, logvar, confidence), bv.fuse(mean[:, :-1], logvar[:, :-1], confidence[:, :-1])
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_a_population_has_the_moments_of_its_people():
    torch.manual_seed(0)
    true = torch.randn(20_000, 3) @ torch.tensor([[1.0, 0.8, 0.0], [0.0, 0.6, 0.0], [0.0, 0.0, 0.5]]) + 2
    logvar = torch.tensor([0.5, 1.0, 2.0]).log().expand(20_000, 3)
    people = bv.aggregated_posterior(true, logvar)
    assert torch.allclose(people.mean, torch.full((3,), 2.0), atol=0.03)
    expected = torch.tensor([[1.5, 0.8, 0.0], [0.8, 2.0, 0.0], [0.0, 0.0, 2.25]])
    assert torch.allclose(people.covariance, expected, atol=0.05)


def test_what_a_view_leaves_open_follows_from_the_population():
    mean, logvar, confidence = (part[0] for part in gaussians())
    fused = [part[0] for part in bv.fuse(mean[None], logvar[None], confidence[None])]
    d = mean.shape[-1]
    standard = bv.BodyPrior(torch.zeros(d), torch.eye(d))
    assert torch.allclose(bv.mean_under_prior(*fused, standard), fused[0], atol=1e-6)
    nothing = [part[0] for part in bv.fuse(mean[None], logvar[None], 0 * confidence[None])]
    people = bv.BodyPrior(torch.arange(d) * 0.1, torch.eye(d) * 0.2)
    assert torch.allclose(bv.mean_under_prior(*nothing, people), people.mean, atol=1e-6)

    # Two dimensions, correlated by 0.9; a view sees 3 in the first, with a variance of 0.5, and nothing of the second.
    people = bv.BodyPrior(torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 1.8], [1.8, 2.0]]))
    body_mean, body_logvar = torch.tensor([3.0 * 2 / 3, 0.0]), torch.tensor([1 / 3, 1.0]).log()
    first = 1 + 2 / 2.5 * (3 - 1)  # Kalman's gain
    expected = torch.tensor([first, -1 + 1.8 / 2.5 * (3 - 1)])
    assert torch.allclose(bv.mean_under_prior(body_mean, body_logvar, people), expected, atol=1e-5)


def test_fusion_is_the_product_of_gaussians():
    """Against numbers: the normalised product of densities on a grid."""
    mean, logvar, confidence = (
        torch.tensor([[[0.5], [-1.0]]]),
        torch.tensor([[[0.2], [-0.7]]]),
        torch.tensor([[0.9, 0.4]]),
    )
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    log_density = -(z**2) / 2
    for m, v, c in zip(mean[0, :, 0], logvar[0, :, 0], confidence[0], strict=True):
        log_density -= c * (z - m) ** 2 / (2 * v.exp())
    density = log_density.exp() / log_density.exp().sum()
    expected_mean = (density * z).sum()
    expected_var = (density * (z - expected_mean) ** 2).sum()
    body_mean, body_logvar = bv.fuse(mean, logvar, confidence)
    assert float(body_mean) == pytest.approx(float(expected_mean), abs=1e-5)
    assert float(body_logvar.exp()) == pytest.approx(float(expected_var), rel=1e-5)


def test_kl_of_the_prior_is_zero():
    assert bv.kl_divergence(torch.zeros(2, 5), torch.zeros(2, 5)).tolist() == [0, 0]
    assert (bv.kl_divergence(torch.ones(2, 5), torch.zeros(2, 5)) == 2.5).all()


def test_identity_loss_wants_the_halves_of_one_person_together():
    people = torch.eye(4) * 3
    together, found = bv.loss_identity((people, people), (people, people))
    swapped, missed = bv.loss_identity((people, people), (people.roll(1, 0), people))
    assert together < 0.01 < swapped and found == 1 and missed == 0


def test_the_decoder_input_holds_no_lengths():
    """Making the limbs longer changes the target, and not what the decoder sees of the view."""
    torch.manual_seed(0)
    model = bv.BodyVAE(8, width=4).eval()
    shape = views(2)
    bones = bw.skeleton(shape.keypoints)
    longer = bones._replace(log_lengths=bones.log_lengths + 0.3)
    z = torch.randn(2, 8)
    assert torch.equal(model.decode(z, bones)[0], model.decode(z, longer)[0])


def test_augmenting_is_seeded_and_keeps_unseen_parts_unseen():
    shape = views(6)
    limb = shape.limb.clone()
    limb[:, 3] = 0
    shape = shape._replace(limb=limb)
    first, second = (bw.augment(shape, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))
    assert ((first.limb == 0).flatten(2).all(-1).sum(1) == 1).all()


def test_degraded_views_are_blurred_or_lack_half_a_person():
    shape = views(60)
    degraded = bw.degrade(shape, torch.Generator().manual_seed(1), 1.0)
    unseen = (degraded.keypoints[..., 2] == 0).sum(1)
    assert set(unseen.tolist()) == {0, 6, 8, 11} and 15 < (unseen == 0).sum() < 45
    blurred = unseen == 0
    assert degraded.limb[blurred].diff(dim=-1).abs().mean() < 0.7 * shape.limb[blurred].diff(dim=-1).abs().mean()
    assert (degraded.torso[~blurred] == 0).all() and not torch.equal(
        degraded.keypoints[blurred], shape.keypoints[blurred]
    )
    for bone, (start, end) in ((i, bw.ENCODER_BONES[bone]) for i, bone in enumerate(bw.LIMBS)):
        gone = (degraded.keypoints[:, [start, end], 2] == 0).any(1)
        assert ((degraded.limb[:, bone] == 0).flatten(1).all(1) == gone).all()
    kept = bw.degrade(shape, torch.Generator().manual_seed(1), 1e-9)
    assert all(torch.equal(a, b) for a, b in zip(kept[:4], shape[:4], strict=True))


@pytest.mark.parametrize("view", ["crop", "pooled", "both"])
def test_every_kind_of_view_trains(view):
    torch.manual_seed(0)
    model = bv.BodyVAE(8, width=4, view=view, feature_dim=10)
    shape = bw.augment(views(8)._replace(features=torch.randn(8, 17, 10)), torch.Generator().manual_seed(0))
    mean, logvar = (part.view(4, 2, -1) for part in model.encode(shape))
    confidence = bw.view_confidence(shape.keypoints).view(4, 2)
    half_a, half_b = (bv.fuse(mean[:, i : i + 1], logvar[:, i : i + 1], confidence[:, i : i + 1]) for i in (0, 1))
    z = torch.stack([half_b[0], half_a[0]], dim=1).flatten(0, 1)
    loss = bv.loss_view_reconstruction(model, z, shape).mean() + bv.loss_identity(half_a, half_b)[0]
    (loss + bv.kl_divergence(*half_a).mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_unknown_view_is_refused():
    with pytest.raises(ValueError, match="crop, mask, pooled, both"):
        bv.BodyVAE(8, view="voxels")
