"""Views without colour: masks, the networks that find them, and body encoders of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_base import make_family, make_training_shards

from bolid.backends import mask_rcnn
from bolid.backends.body import BodyEncoder
from bolid.backends.segmentation import NETWORK, load_segmenter, write_segmenter
from bolid.errors import BolidError
from bolid.formats.images import encode_jpeg, read_photo
from bolid.formats.shards import Sample, ShardWriter, sample_key
from bolid.formats.tensors import load_tensors
from bolid.method.body_views import augment, make_views
from bolid.method.mask_views import MASK_SIZE, MaskView
from bolid.models.convert import convert
from bolid.models.families import get_family
from bolid.run import run_record
from bolid.synth.people import sample_person, sample_plan
from bolid.synth.render import Renderer
from bolid.train_vae import TrainVaeConfig, train_vae
from bolid.train_vae.data import read_views

CONFIG = TrainVaeConfig(view="mask", steps=30, people=4, photos_per_person=3, body_dim=6, width=4)


def standing(width: float, height: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """(mask bool [240, 180], keypoints [17, 3]) of a figure of ellipses; `width` of its trunk over its height."""
    y, x = np.mgrid[:240, :180]
    top, half = 20, width * height / 2
    head = ((x - 90) / 12) ** 2 + ((y - top - 14) / 14) ** 2 < 1
    trunk = (abs(x - 90) < half) & (y > top + 30) & (y < top + 105)
    legs = (abs(abs(x - 90) - half / 2) < half / 2.5) & (y >= top + 105) & (y < top + height)
    arms = (abs(abs(x - 90) - half - 8) < 5) & (y > top + 32) & (y < top + 110)
    side = half - 4
    spots = [(0, 14), (3, 11), (-3, 11), (8, 13), (-8, 13), (side, 35), (-side, 35), (half + 8, 70), (-half - 8, 70),
             (half + 8, 105), (-half - 8, 105), (half / 2, 105), (-half / 2, 105), (half / 2, 150), (-half / 2, 150),
             (half / 2, 195), (-half / 2, 195)]  # fmt: skip
    points = np.array([(90 + dx, top + dy, 0.9) for dx, dy in spots], np.float32)
    return head | trunk | legs | arms, points


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Training shards of six people, five views each, with the ratio that the figures have."""
    root = tmp_path_factory.mktemp("masks")
    writer = ShardWriter(root, run_record("shards", family="tiny", config={}))
    for number in range(6):
        rng, group = np.random.default_rng(number), []
        for index in range(5):
            mask, points = standing(0.2 + 0.05 * number)
            points[:, :2] += rng.normal(0, 0.7, (17, 2))
            tensors = {**MaskView.cut(mask, points).tensors(), "ratios": np.array([0.2 + 0.05 * number], np.float32)}
            picture = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, 2)
            person = f"p{number}"
            group.append(
                Sample(sample_key(person, f"{index:016d}"), encode_jpeg(picture), {"person": person}, "", tensors)
            )
        writer.write_group(group)
    writer.close()
    return root


def test_a_mask_in_its_window():
    mask, points = standing(0.3)
    view = MaskView.cut(mask, points)
    assert view.mask.shape == MASK_SIZE and view.mask.dtype == bool
    # The window is that of the keypoints, whatever the picture's size.
    twice = MaskView.cut(mask.repeat(2, 0).repeat(2, 1), points * [2, 2, 1])
    assert (view.mask == twice.mask).mean() > 0.99 and np.allclose(view.keypoints, twice.keypoints, atol=1e-5)
    again = MaskView.of_tensors(view.tensors())
    assert np.array_equal(again.mask, view.mask) and np.array_equal(again.keypoints, view.keypoints)
    assert MaskView.of_tensors({"keypoints": points}) is None
    for detail in (1.0, 2.0):
        assert view.crop(detail).mean() / 255 == pytest.approx(view.mask.mean(), abs=0.01)


def test_a_body_encoder_of_masks(shards, tmp_path):
    table = read_views(shards, masks=True)
    assert table.views.torso.shape[1:] == (1, 2, 24, 20) and table.ratios.shape == (30, 1)
    result = train_vae(
        shards, tmp_path / "e.safetensors", config=dataclasses.replace(CONFIG, ratio_weight=5.0), device="cpu"
    )
    assert result.metrics["ratios"] < 0.5  # of a variance of 1
    encoder = BodyEncoder(result.path)
    assert encoder.needs_masks and not encoder.needs_features and not encoder.differentiable
    views = [MaskView.cut(*standing(width)) for width in (0.2, 0.45)]
    mean, logvar, confidence = encoder.encode_masks(views)
    assert mean.shape == logvar.shape == (2, 6) and confidence == pytest.approx(0.9)
    assert not torch.allclose(mean[0], mean[1], atol=0.1)
    brighter = MaskView(views[0].mask, views[0].keypoints)
    assert torch.equal(encoder.encode_masks([brighter])[0][0], encoder.encode_masks(views[:1])[0][0])


def test_augmentation_leaves_a_mask_without_colour():
    view = MaskView.cut(*standing(0.3))
    views = make_views(torch.tensor(view.crop(1.0))[None], torch.from_numpy(view.keypoints)[None])
    changed = augment(views, torch.Generator().manual_seed(1), grayscale=1.0)
    assert changed.torso.shape == views.torso.shape
    for same in (views.torso, views.torso.flip(-1)):
        if torch.equal(changed.torso, same):
            return
    pytest.fail("the mask has changed")


def test_shards_without_masks_are_refused(tmp_path):
    train = make_training_shards(tmp_path / "train", make_family(tmp_path))
    with pytest.raises(BolidError, match="holds no masks for --view mask"):
        train_vae(train, tmp_path / "e.safetensors", config=CONFIG, device="cpu")
    with pytest.raises(BolidError, match="--ratio-weight: the training shards do not hold"):
        config = dataclasses.replace(CONFIG, view="crop", ratio_weight=1.0)
        train_vae(train, tmp_path / "e.safetensors", config=config, device="cpu")
    assert not (tmp_path / "e.safetensors").exists()


# ---- segmentation --------------------------------------------------------------------------------------------------


def blocks() -> np.ndarray:
    """A picture of random colours, 640 high and 480 wide."""
    return np.random.default_rng(0).integers(0, 255, (20, 15, 3), np.uint8).repeat(32, 0).repeat(32, 1)


@pytest.fixture(scope="module")
def random_yolo():
    """A YOLO11n-seg of random weights that sees people everywhere."""
    from ultralytics.nn.tasks import SegmentationModel

    torch.manual_seed(0)
    network = SegmentationModel("yolo11n-seg.yaml", ch=3, nc=80, verbose=False)
    for branch in network.model[-1].cv3:
        torch.nn.init.constant_(branch[-1].bias[:1], 2.0)
    for branch in network.model[-1].cv4:
        torch.nn.init.normal_(branch[-1].weight)
        torch.nn.init.normal_(branch[-1].bias)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # its statistics become the picture's, so that masks vary from place to place
    with torch.no_grad():
        network(torch.from_numpy(blocks()).permute(2, 0, 1)[None].float() / 255)
    return network.half().float().eval()


@pytest.mark.slow
def test_yolo_masks_are_those_of_ultralytics(random_yolo, tmp_path):
    from ultralytics.utils.nms import non_max_suppression
    from ultralytics.utils.ops import process_mask

    tmp_path.joinpath("seg").mkdir()
    write_segmenter(tmp_path / "seg", "yolo11n-seg.yaml", random_yolo.state_dict())
    ours = load_segmenter(tmp_path / "seg")
    image = blocks()
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        (raw, prototypes), _ = random_yolo(pixels)
        found = non_max_suppression(raw, 0.25, 0.6, nc=80, classes=[0])[0]
        theirs = process_mask(prototypes[0], found[:, 6:], found[:, :4], (640, 480), upsample=True)
    inside = (found[:, :2] >= 0).all(1) & (found[:, 2:4] <= torch.tensor([480, 640])).all(1)
    share = theirs.sum((1, 2)) / (found[:, 2:4] - found[:, :2]).prod(1)
    best = int((share - 0.5 - 1.0 * ~inside).abs().argmin())  # half of its box is mask
    box = found[best, :4].numpy()
    low, high = box[:2] + 0.1 * (box[2:] - box[:2]), box[2:] - 0.1 * (box[2:] - box[:2])
    rng = np.random.default_rng(1)
    points = np.concatenate([rng.uniform(low, high, (17, 2)), np.full((17, 1), 0.9)], 1).astype(np.float32)
    view = ours.segment(image, box, points)
    expected = MaskView.cut(theirs[best].numpy().astype(bool), points)
    # Theirs ends at the box; inside it the two are one mask, but for the rounding of half precision.
    assert np.array_equal(view.keypoints, expected.keypoints)
    cell = np.zeros((640, 480), bool)
    cell[int(box[1]) + 2 : int(box[3]) - 2, int(box[0]) + 2 : int(box[2]) - 2] = True
    counted = MaskView.cut(cell, points).mask
    assert counted.sum() > 100 and 0.02 < expected.mask[counted].mean() < 0.98
    assert (view.mask == expected.mask)[counted].mean() > 0.97
    assert ours.segment(image, np.array([-90, -90, -80, -80], np.float32), points) is None


def test_published_yolo_seg_weights_are_converted(random_yolo, tmp_path):
    torch.save({"model": random_yolo.half(), "ema": None, "train_args": {}}, tmp_path / "yolo11n-seg.pt")
    random_yolo.float()
    folder = convert(tmp_path / "yolo11n-seg.pt")
    tensors, record = load_tensors(folder / "model.safetensors", NETWORK)
    assert record["config"]["source"] == "yolo11n-seg.pt" and load_segmenter(folder).image_size == 640
    for name, value in random_yolo.state_dict().items():
        assert torch.equal(tensors[name].float(), value.float())


@pytest.fixture(scope="module")
def random_mask_rcnn():
    """torchvision's Mask R-CNN, its weights random, as f16 keeps them. It takes every region for a person."""
    torch.manual_seed(0)
    network = mask_rcnn.build(160)
    torch.nn.init.zeros_(network.roi_heads.box_predictor.cls_score.weight)
    network.roi_heads.box_predictor.cls_score.bias.data[mask_rcnn.PERSON] = 9.0
    network.roi_heads.mask_predictor.mask_fcn_logits.weight.data *= 300
    state = network.state_dict()
    network.load_state_dict({name: v.half().float() if v.is_floating_point() else v for name, v in state.items()})
    return network.eval()


@pytest.mark.slow
def test_masks_are_those_of_torchvisions_mask_rcnn(random_mask_rcnn, tmp_path):
    published = tmp_path / f"{mask_rcnn.NAME}_coco-73cbd019.pth"
    torch.save(random_mask_rcnn.state_dict(), published)
    folder = convert(published)
    published.unlink()  # large
    config = json.loads((folder / "config.json").read_text())
    assert config == {"yaml": mask_rcnn.NAME, "imgsz": 800}
    (folder / "config.json").write_text(json.dumps({**config, "imgsz": 160}))
    ours, image = load_segmenter(folder), blocks()[:224, :160]
    with torch.no_grad():
        found = random_mask_rcnn([torch.from_numpy(image).permute(2, 0, 1).float() / 255])[0]
    boxes, masks = found["boxes"].numpy(), found["masks"][:, 0].numpy()
    best = int(masks.mean((1, 2)).argmax())
    box = boxes[best]
    rng = np.random.default_rng(1)
    points = np.concatenate([rng.uniform(box[:2], box[2:], (17, 2)), np.full((17, 1), 0.9)], 1).astype(np.float32)
    view = ours.segment(image, box, points)
    expected = MaskView.cut((255 * masks[best]).round().astype(np.uint8), points)
    assert np.array_equal(view.keypoints, expected.keypoints) and np.array_equal(view.mask, expected.mask)
    assert 0.02 < view.mask.mean() < 0.98
    twice = ours.segment(image.repeat(2, 0).repeat(2, 1), 2 * box, points * np.array([2, 2, 1], np.float32))
    assert np.array_equal(twice.mask, view.mask)  # a larger photo is made smaller
    assert ours.segment(image, np.array([-90, -90, -80, -80], np.float32), points) is None


def test_a_file_that_is_no_mask_rcnn_is_refused(tmp_path):
    torch.save({"backbone.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(BolidError, match=r"other.pth holds no Mask R-CNN"):
        convert(tmp_path / "other.pth")
    torch.save({"a": Path("/")}, tmp_path / "more.pth")
    with pytest.raises(BolidError, match=r"more.pth is refused"):
        convert(tmp_path / "more.pth")
    assert not (tmp_path / "other").exists() and not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no segmentation model"),
        ("{}", "is not a segmentation model's config"),
        ('{"yaml": "/etc/x-seg.yaml"}', "names '/etc/x-seg.yaml'"),
        ('{"yaml": "yolo11s-seg.yaml"}', "does not hold the weights of yolo11s-seg.yaml"),
        ("[]", "is not a segmentation model's config"),
        ('{"yaml": "yolo11n-seg.yaml", "imgsz": "large"}', "imgsz is 'large'"),
        ('{"yaml": "masknet"}', "does not hold the weights of masknet"),
        ('{"yaml": "maskrcnn_resnet50_fpn_v2"}', "does not hold the weights of maskrcnn"),
    ],
)
def test_bad_segmentation_models(random_yolo, config, message, tmp_path):
    write_segmenter(tmp_path, "yolo11n-seg.yaml", random_yolo.state_dict())
    if config is None:
        (tmp_path / "config.json").unlink()
    else:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(BolidError, match=message):
        load_segmenter(tmp_path)


def test_tinys_own_network_on_renders(rendered_people):
    """Its masks are the renderer's own, and so are those that `Renderer.outline` gives of `render`'s photos."""
    renderer, segmenter = Renderer(sample_person(100_001), (256, 192)), load_segmenter(get_family("tiny").segmentation)
    found = []
    for file in sorted((rendered_people / "p100001").glob("*.jpg")):
        truth = json.loads(file.with_suffix(".json").read_text())
        mask, marks = renderer.outline(sample_plan(renderer.person, truth["photo"]))
        assert np.array_equal(marks, np.array(truth["keypoints"], np.float32))
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        assert np.abs(np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) - truth["box"]).max() <= 2
        points = np.concatenate([marks[:, :2], 0.9 * (marks[:, 2:] > 0)], 1).astype(np.float32)
        view, true = (
            segmenter.segment(read_photo(file), np.array(truth["box"]), points),
            MaskView.cut(mask, points).mask,
        )
        found.append((view.mask & true).sum() / (view.mask | true).sum())
    assert np.mean(found) > 0.9  # 0.94 on 25 people


def test_a_wider_lens_changes_the_outline():
    renderer = Renderer(sample_person(100_001), (128, 96))
    plan = sample_plan(renderer.person, 0, pose="standing", framing="full body")
    (tele, _), (wide, _) = (renderer.outline(plan, fov) for fov in (15.0, 74.0))
    assert 0.5 < (tele & wide).sum() / (tele | wide).sum() < 0.99
