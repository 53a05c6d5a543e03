"""The models of perception, with the embedded weights: what the pipeline relies on, and how damage is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from bolid.backends.caption import caption_for
from bolid.backends.face import DifferentiableFaces, FaceModel
from bolid.backends.image_text import ImageTextModel
from bolid.backends.pose import PoseModel
from bolid.backends.probe import BodyProbe
from bolid.errors import BolidError
from bolid.models.convert import convert
from bolid.models.families import get_family
from bolid.train_adapter import TrainAdapterConfig
from bolid.train_adapter.pixel_losses import pixel_losses

TINY = get_family("tiny")
LOADERS = {"pose": PoseModel, "face": FaceModel, "image_text": ImageTextModel, "probe": BodyProbe}


@pytest.fixture(scope="module")
def pose():
    return PoseModel(TINY.require("pose"))


@pytest.fixture(scope="module")
def image_text():
    return ImageTextModel(TINY.require("image_text"))


@pytest.fixture(scope="module")
def photograph():
    """photograph(**plan) -> uint8 [256,192,3]: a validation person, rendered; say pose="standing"."""
    from bolid.synth.people import sample_person, sample_plan
    from bolid.synth.render import Renderer

    person = sample_person(199_001)
    renderer = Renderer(person, (256, 192))
    return lambda **plan: renderer.render(sample_plan(person, 0, yaw=0.0, **plan)).image


@pytest.fixture(scope="module")
def pictures(photograph):
    """Two full bodies in pictures of different shapes, and a picture of nobody; uint8 [H,W,3]."""
    tall = photograph(framing="full body", pose="standing", scene="beach")
    wide = np.pad(photograph(framing="full body", pose="waving", scene="snow"), ((0, 0), (64, 0), (0, 0)), mode="edge")
    return [tall, wide, np.full((200, 260, 3), (90, 140, 190), np.uint8)]


def same_people(a, b):
    assert len(a) == len(b)
    for first, second in zip(a, b, strict=True):
        np.testing.assert_allclose(first.keypoints, second.keypoints, atol=0.05)
        np.testing.assert_allclose(first.box, second.box, atol=0.05)


# ---- faces with a gradient


def in_torch(*images):
    return torch.stack([torch.from_numpy(image.copy()).permute(2, 0, 1) / 127.5 - 1 for image in images])


def test_faces_in_torch_are_those_in_onnx(photograph):
    image = photograph(framing="portrait", pose="standing")
    seen = FaceModel(TINY.face).detect(image)[0]
    network = DifferentiableFaces(TINY.face)
    pixels = torch.cat([in_torch(image), torch.full((1, 3, *image.shape[:2]), 0.3)]).requires_grad_(True)
    embeds, scores = network(pixels), network.certainty(pixels)
    assert (embeds @ torch.from_numpy(seen.embedding))[0].item() > 0.999
    assert scores[0].item() == pytest.approx(seen.score, abs=0.01) and scores[1].item() < 0.1
    for i in range(2):  # as each is alone
        torch.testing.assert_close(network(pixels[i : i + 1]), embeds[i : i + 1], atol=1e-6, rtol=0)
        torch.testing.assert_close(network.certainty(pixels[i : i + 1]), scores[i : i + 1], atol=1e-6, rtol=0)
    for value in (embeds[0] @ torch.from_numpy(seen.embedding).roll(1), scores[0]):
        (gradient,) = torch.autograd.grad(value, pixels, retain_graph=True)
        assert torch.isfinite(gradient).all() and gradient[0].any() and not gradient[1].any()
    _, _, landmarks = network.detect_and_embed(pixels)
    np.testing.assert_allclose(landmarks[0].detach(), seen.landmarks, atol=0.5)


def test_a_face_at_the_edge_in_torch_is_the_one_in_onnx(photograph):
    image = photograph(framing="portrait", pose="standing")
    box = FaceModel(TINY.face).detect(image)[0].box
    cut = image[int(box[1]) + 2 :]
    seen = FaceModel(TINY.face).detect(cut)[0]
    assert (DifferentiableFaces(TINY.face)(in_torch(cut))[0] @ torch.from_numpy(seen.embedding)).item() > 0.999


def test_what_is_hardly_a_face_has_an_embedding_too(photograph):
    """So that a picture may become more like the person before it shows a face."""
    image = photograph(framing="portrait", pose="standing")
    seen = FaceModel(TINY.face).detect(image)[0].embedding
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(image.shape[0] / 20)))
    assert not FaceModel(TINY.face).detect(blurred)
    pixels = in_torch(blurred).requires_grad_(True)
    (embed,) = DifferentiableFaces(TINY.face)(pixels)
    assert embed.norm().item() == pytest.approx(1, abs=1e-4)
    (embed @ torch.from_numpy(seen)).backward()
    assert torch.isfinite(pixels.grad).all() and pixels.grad.any()


def test_a_face_too_small_is_none(photograph, monkeypatch):
    small = np.pad(photograph(framing="portrait", pose="standing")[::4, ::4], ((96, 96), (72, 72), (0, 0)), mode="edge")
    found = FaceModel(TINY.face, confidence=0.2).detect(small)[0]
    assert DifferentiableFaces(TINY.face).certainty(in_torch(small)).item() < 0.2 < found.score
    network = DifferentiableFaces(TINY.face, all_sizes=True)
    assert found.score > network.certainty(in_torch(small)).item() > 0.2, "it counts, but less than a large one"
    assert (network(in_torch(small))[0] @ torch.from_numpy(found.embedding)).item() > 0.999
    monkeypatch.setattr("bolid.backends.face.LARGE", 1.1)
    network = DifferentiableFaces(TINY.face)
    assert not network(in_torch(small)).any() and not network.certainty(in_torch(small)).any()


# ---- pose


def test_pose_finds_people_and_only_them(pose, pictures):
    found = pose.detect(pictures)
    assert [bool(people) for people in found] == [True, True, False]
    person = found[0][0]
    assert person.keypoints.shape == (17, 3) and person.keypoints.dtype == np.float32
    assert person.box[3] - person.box[1] > 150  # a full body in a picture of 256
    assert 0 <= person.keypoints[:, 2].min() and person.keypoints[:, 2].max() <= 1


def test_pose_does_not_depend_on_the_batch(pose, pictures):
    together, apart = pose.detect(pictures), [pose.detect([picture])[0] for picture in pictures]
    backwards = pose.detect(pictures[::-1])[::-1]
    for a, b, c in zip(together, apart, backwards, strict=True):
        same_people(a, b)
        same_people(a, c)


def test_pose_follows_the_size_of_the_picture(pose, pictures):
    large = pictures[0].repeat(2, 0).repeat(2, 1)
    small, twice = pose.detect([pictures[0]])[0][0], pose.detect([large])[0][0]
    assert np.abs(twice.keypoints[:, :2] / 2 - small.keypoints[:, :2]).mean() < 1.5


def test_raw_pose_is_differentiable(pose):
    pixels = torch.rand(2, 3, 96, 64, requires_grad=True)
    output = pose.raw(pixels)
    assert output.shape[:2] == (2, 4 + 1 + 51)
    output[:, 5:].square().mean().backward()
    assert torch.isfinite(pixels.grad).all() and pixels.grad.abs().sum() > 0


def test_raw_pose_refuses_odd_sizes(pose):
    with pytest.raises(BolidError, match="multiples of 32"):
        pose.raw(torch.rand(1, 3, 100, 64))


@pytest.fixture(scope="module", params=["dynamic", "fixed"])
def exported(request, pose, tmp_path_factory):
    """The family's own network as ultralytics' exporter writes it: any size and batch, or one picture of 192x192."""
    network = copy.deepcopy(pose.network)
    network.model[-1].export, network.model[-1].format = True, "onnx"
    network.model[-1].dynamic = dynamic = request.param == "dynamic"
    file = tmp_path_factory.mktemp("exported") / f"{request.param}.onnx"
    pixels = torch.rand(2 if dynamic else 1, 3, 192, 160 if dynamic else 192)
    axes = {"images": {0: "batch", 2: "height", 3: "width"}, "output0": {0: "batch", 2: "anchors"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (pixels,), str(file), dynamo=False, opset_version=17, input_names=["images"],
            output_names=["output0"], dynamic_axes=axes if dynamic else None,
        )  # fmt: skip
    return file


@pytest.mark.slow
def test_pose_in_onnx_finds_the_same(pose, pictures, exported, tmp_path):
    folder = convert(exported, tmp_path / "pose")
    config = json.loads((folder / "config.json").read_text())
    if exported.stem == "dynamic":  # what size it was trained at, an ONNX file does not say
        assert config == {"imgsz": 640}
        (folder / "config.json").write_text(json.dumps({"imgsz": pose.image_size}))
    else:
        assert config == {"imgsz": 192}
    model = PoseModel(folder)
    assert not model.differentiable
    views = [picture[::2, ::2] for picture in pictures]  # 128x96, as small as the network's 192 or smaller
    found = model.detect(views)
    assert [bool(people) for people in found] == [True, True, False]
    for ours, theirs in zip(found, pose.detect(views), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert abs(a.score - b.score) < 0.1
            off = np.abs(a.keypoints[:, :2] - b.keypoints[:, :2])
            # Padded to a square, the network sees another picture than with as little padding as can be.
            assert off.mean() < 0.5 if model.fixed_size else off.max() < 0.05
    with pytest.raises(BolidError, match="no gradient goes through"):
        model.raw(torch.rand(1, 3, 192, 192, requires_grad=True))
    with pytest.raises(BolidError, match="L_id needs a gradient"):
        pixel_losses(TrainAdapterConfig(id_weight=1.0), replace(TINY, pose=folder))


def test_what_is_no_pose_network_in_onnx(tmp_path):
    (tmp_path / "broken.onnx").write_bytes((TINY.face / "det.onnx").read_bytes()[:5000])
    (tmp_path / "text.onnx").write_text("text")
    shutil.copy(TINY.face / "det.onnx", tmp_path / "faces.onnx")
    for name, message in (
        ("broken", "onnxruntime cannot load"), ("text", "onnxruntime cannot load"), ("absent", "onnxruntime cannot"),
        ("faces", "is no YOLO pose network for people"),
    ):  # fmt: skip
        with pytest.raises(BolidError, match=message):
            convert(tmp_path / f"{name}.onnx", tmp_path / "pose")
        assert not (tmp_path / "pose").exists()


def test_pose_keeps_the_thread_count(pose, pictures):
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            pose.detect(pictures[:1])
            PoseModel(TINY.pose)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_pose_refuses_other_arrays(pose):
    with pytest.raises(BolidError, match=r"uint8 \[H,W,3\]"):
        pose.detect([np.zeros((8, 8), np.uint8)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not a pose model's config"),
        ('{"yaml": "yolo11n-pose.yaml", "imgsz": 100}', "multiple of 32"),
        ('{"yaml": "/etc/yolo11n-pose.yaml", "imgsz": 192}', "names '/etc/yolo11n-pose.yaml'"),
        ('{"yaml": "yolo11s-pose.yaml", "imgsz": 192}', "does not hold the weights of yolo11s-pose.yaml"),
    ],
)
def test_pose_config(tmp_path, config, message):
    shutil.copy(TINY.pose / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(BolidError) as caught:
        PoseModel(tmp_path)
    assert message in caught.value.message + caught.value.hint


# ---- face


def test_plain_insightface_loads_the_pack(pictures):
    from insightface.app import FaceAnalysis

    pack = FaceAnalysis(name=str(TINY.face), providers=["CPUExecutionProvider"])
    pack.prepare(ctx_id=-1)
    assert set(pack.models) == {"detection", "recognition"}
    pack.get(pictures[0][..., ::-1])


def test_faces_have_landmarks_and_unit_embeddings(photograph):
    faces = FaceModel(TINY.face).detect(photograph(framing="portrait"))
    assert faces and faces[0].landmarks.shape == (5, 2)
    assert faces[0].embedding.shape == (512,) and abs(np.linalg.norm(faces[0].embedding) - 1) < 1e-5
    left, right, nose = faces[0].landmarks[:3]
    assert left[0] < nose[0] < right[0] and nose[1] > left[1]


# ---- image-text


def test_embeddings_do_not_depend_on_the_batch(image_text, pictures):
    together = image_text.encode_images(pictures)
    assert together.shape == (3, image_text.embedding_size)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    backwards = image_text.encode_images(pictures[::-1]).flip(0)
    apart = torch.cat([image_text.encode_images([picture]) for picture in pictures])
    torch.testing.assert_close(together, backwards, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_texts_do_not_depend_on_the_batch(image_text):
    texts = ["a red top", "a full body photo of a tall woman waving, in a red long-sleeved top, on a beach", ""]
    together, apart = image_text.encode_text(texts), torch.cat([image_text.encode_text([text]) for text in texts])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    assert torch.isfinite(together).all()


def test_pixels_and_pictures_agree_and_pixels_are_differentiable(image_text, pictures):
    pixels = torch.from_numpy(pictures[0]).permute(2, 0, 1)[None].float() / 127.5 - 1
    pixels.requires_grad_()
    embedding = image_text.encode_pixels(pixels)
    torch.testing.assert_close(embedding.detach(), image_text.encode_images(pictures[:1]), atol=1e-6, rtol=0)
    embedding.square().mean(0)[0].backward()
    assert pixels.grad.abs().sum() > 0


def test_our_transform_is_open_clips(image_text, pictures):
    import open_clip
    from PIL import Image

    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{TINY.image_text}")
    theirs = image_text.network.encode_image(transform(Image.fromarray(pictures[0]))[None], normalize=True)
    assert (theirs @ image_text.encode_images(pictures[:1]).T).item() > 0.999


def test_keypoint_features_look_where_the_keypoint_is(image_text):
    picture = np.full((256, 192, 3), 127, np.uint8)
    changed = picture.copy()
    changed[10:30, 150:180] = (255, 0, 0)
    keypoints = np.tile(np.array([30.0, 230.0, 1.0], np.float32), (1, 17, 1))
    keypoints[0, 0] = [165, 20, 1]
    before, after = (image_text.views([image], keypoints)[1][0] for image in (picture, changed))
    difference = (after - before).abs().mean(-1)
    assert difference[0] > 4 * difference[1]
    maps = image_text.patch_features([picture, changed])
    assert before.shape == (17, maps.shape[1]) and len(maps) == 2


def test_one_pass_gives_what_two_give(image_text, pictures):
    keypoints = np.random.default_rng(0).uniform(0, 190, (3, 17, 3)).astype(np.float32)
    embeddings, _ = image_text.views(pictures, keypoints)
    torch.testing.assert_close(embeddings, image_text.encode_images(pictures), atol=1e-5, rtol=0)


def test_the_nearest_text_names_the_scene(image_text, pictures):
    texts = image_text.encode_text(["on a beach", "in the snow", "in a meadow"])
    assert (image_text.encode_images(pictures[:2]) @ texts.T).argmax(-1).tolist() == [0, 1]


# ---- the probe


def test_probe_reads_finite_ratios_and_states_its_error(pictures):
    probe = BodyProbe(TINY.require("probe"))
    ratios = probe.predict(pictures[:2])
    assert ratios.shape == (2, len(probe.ratio_names)) and np.isfinite(ratios).all()
    np.testing.assert_allclose(ratios, probe.predict(pictures[1::-1])[::-1], atol=1e-4)
    assert probe.predict([]).shape == (0, len(probe.ratio_names))
    assert set(probe.held_out_error["r2"]) == set(probe.ratio_names)


# ---- captions


def test_captions(tmp_path):
    photo = tmp_path / "a.jpg"
    assert caption_for(photo) == ""
    (tmp_path / "a.txt").write_text(" a red\n top \n")
    assert caption_for(photo) == "a red top"
    caption = "une femme élégante à la plage, été"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"):
        (tmp_path / "a.txt").write_bytes(caption.encode(encoding))
        assert caption_for(photo) == caption, encoding
    (tmp_path / "b.caption").write_text("a blue top")
    assert caption_for(tmp_path / "b.jpg") == "a blue top"
    (tmp_path / "a.txt").write_bytes(b"\x89PNG\r\n\0\0\0\xff\xfe")
    with pytest.raises(BolidError, match="no text"):
        caption_for(photo)
    (tmp_path / "a.txt").write_bytes(b"a" * 20_000)
    with pytest.raises(BolidError, match="too long"):
        caption_for(photo)


# ---- bad files

WEIGHTS = {
    "pose": "model.safetensors", "image_text": "open_clip_model.safetensors", "probe": "probe.safetensors",
    "face": "rec.onnx",
}  # fmt: skip


def copy_of(part, tmp_path):
    directory = tmp_path / part
    shutil.copytree(TINY.require(part), directory)
    return directory, directory / WEIGHTS[part]


@pytest.mark.parametrize("part", LOADERS)
def test_missing_weights_are_named(part, tmp_path):
    directory, weights = copy_of(part, tmp_path)
    weights.unlink()
    with pytest.raises(BolidError) as caught:
        LOADERS[part](directory)
    assert weights.name in caught.value.message and caught.value.hint


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "pickle"])
def test_damaged_weights_are_refused(part, damage, tmp_path):
    directory, weights = copy_of(part, tmp_path)
    data = bytearray(weights.read_bytes())
    if damage == "cut":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) - len(data) // 4] ^= 16
        weights.write_bytes(data)
    elif part == "face":
        weights.write_text("no network")
        if damage == "pickle":
            torch.save({"weights": Malicious(tmp_path / "it-ran")}, weights)
        (directory / "bolid.json").unlink()  # as in a pack from elsewhere
    elif damage == "pickle":
        torch.save({"weights": Malicious(tmp_path / "it-ran")}, weights)
    else:
        save_file({"a": torch.zeros(3)}, weights)
    with pytest.raises(BolidError) as caught:
        LOADERS[part](directory)
    assert caught.value.hint and not (tmp_path / "it-ran").exists()


def test_an_empty_directory_is_no_model(tmp_path):
    for loader in LOADERS.values():
        with pytest.raises(BolidError):
            loader(tmp_path)


def test_nothing_asks_the_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for part, loader in LOADERS.items():
        loader(TINY.require(part))


@pytest.mark.parametrize("part", LOADERS)
def test_every_model_has_its_card(part):
    card = (TINY.require(part) / "README.md").read_text()
    assert "License" in card and "held-out" in card


def test_config_of_the_pose_model_names_its_network():
    assert json.loads((TINY.pose / "config.json").read_text())["yaml"] == "yolo11n-pose.yaml"
