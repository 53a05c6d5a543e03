"""RTMPose behind YOLOX and AuraFace behind YuNet: decoding, checks of the files, and --commercial, which takes them.

Networks of those architectures' inputs and outputs: planted answers where the decoding is tested, random weights else.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from bolid.backends.face import FaceModel
from bolid.backends.people import face_detector, pose_detector
from bolid.backends.pose import PoseModel
from bolid.backends.rtmpose import RTMPose
from bolid.backends.yunet import YuNetFaces
from bolid.errors import BolidError
from bolid.formats.images import read_photo
from bolid.models import pull as models
from bolid.models.families import get_family
from bolid.models.manifest import verify
from bolid.models.sources import published
from bolid.views import View, ViewReader
from bolid_cli.main import app

RUN = CliRunner().invoke
TINY = get_family("tiny")
SIDE = 128  # of the small detector
CELLS = sum((SIDE // stride) ** 2 for stride in (8, 16, 32))


def planted(path: Path, shape: list, answers: dict[str, np.ndarray]) -> Path:
    """A network that gives these answers whatever it sees; they are of one picture, and repeated for a batch."""
    nodes = [helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2, 3], keepdims=0),
             helper.make_node("Mul", ["mean", "zero"], ["nothing"])]  # fmt: skip
    weights = [numpy_helper.from_array(np.zeros(1, np.float32), "zero")]
    outputs = []
    for name, answer in answers.items():
        dims = np.array([-1] + [1] * answer.ndim, np.int64)
        weights += [numpy_helper.from_array(dims, f"{name}-dims"), numpy_helper.from_array(answer[None], f"{name}-is")]
        nodes += [helper.make_node("Reshape", ["nothing", f"{name}-dims"], [f"{name}-0"]),
                  helper.make_node("Add", [f"{name}-0", f"{name}-is"], [name])]  # fmt: skip
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], *answer.shape]))
    seen = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
    model = helper.make_model(
        helper.make_graph(nodes, "planted", [seen], outputs, weights), opset_imports=[helper.make_opsetid("", 13)]
    )
    model.ir_version = 8
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def yolox(path: Path, people: dict[tuple[int, int], tuple[float, float, float, float, float]]) -> Path:
    """`people`: cell of stride 32 -> (offset x, offset y, log width, log height, score)."""
    rows = np.zeros((CELLS, 85), np.float32)
    first = CELLS - (SIDE // 32) ** 2
    for (x, y), (dx, dy, w, h, score) in people.items():
        rows[first + y * (SIDE // 32) + x, :6] = (dx, dy, w, h, 1.0, score)
        rows[first + y * (SIDE // 32) + x, 6:] = 0.99  # other classes do not count
    return planted(path, [1, 3, SIDE, SIDE], {"output": rows})


def simcc(path: Path, places: np.ndarray, sure: float = 0.8, size: tuple[int, int] = (64, 48)) -> Path:
    """`places` [17, 2]: x, y in pixels of the pose network's input, whose `size` is (H, W)."""
    along = [np.zeros((17, 2 * side), np.float32) for side in reversed(size)]
    for axis in (0, 1):
        along[axis][np.arange(17), np.round(2 * places[:, axis]).astype(int)] = sure if axis else 0.9
    return planted(path, ["N", 3, *size], {"simcc_x": along[0], "simcc_y": along[1]})


PLACES = np.stack([np.linspace(4, 44, 17), np.linspace(60, 3, 17)], 1)


@pytest.fixture
def pose(tmp_path) -> Path:
    folder = tmp_path / "pose"
    yolox(folder / "detector.onnx", {
        (1, 1): (0.5, 0.5, np.log(1.5), np.log(2.5), 0.9),
        (2, 1): (-0.45, 0.5, np.log(1.5), np.log(2.5), 0.8),  # the same person again
        (3, 3): (0.0, 0.0, np.log(0.5), np.log(0.5), 0.4),
        (0, 3): (0.0, 0.0, 0.0, 0.0, 0.1),  # below the confidence
    })  # fmt: skip
    simcc(folder / "pose.onnx", PLACES)
    return folder


def test_people_and_keypoints_are_decoded(pose):
    """A picture of twice the detector's side: boxes and keypoints come back in its own pixels."""
    image = np.zeros((2 * SIDE, SIDE, 3), np.uint8)
    found = pose_detector(pose).detect([image, image[:, : SIDE // 2]])
    first, second = found[0]
    scale = 2.0
    centre, size = np.array([48.0, 48.0]) * scale, np.array([48.0, 80.0]) * scale
    expected = np.concatenate([centre - size / 2, centre + size / 2])
    np.testing.assert_allclose(first.box, np.clip(expected, 0, [SIDE, 2 * SIDE] * 2), rtol=1e-5)
    assert first.score == pytest.approx(0.9) and second.score == pytest.approx(0.4)
    # The cut is the box, a quarter larger and of the network's format 48 x 64: here its height decides.
    step = 1.25 * size[1] / 64
    np.testing.assert_allclose(
        first.keypoints[:, :2], centre + (np.round(2 * PLACES) / 2 - [24, 32]) * step, rtol=1e-4, atol=1e-3
    )
    np.testing.assert_allclose(first.keypoints[:, 2], 0.8)  # of both axes the less certain
    assert len(found) == 2 and found[1][0].score == pytest.approx(0.9)


def test_nobody_is_nobody(pose):
    yolox(pose / "detector.onnx", {})
    assert pose_detector(pose).detect([np.zeros((40, 30, 3), np.uint8)]) == [[]]
    with pytest.raises(BolidError, match="must be uint8"):
        pose_detector(pose).detect([np.zeros((40, 30, 3), np.float32)])


def test_a_random_simcc_network_sees_each_person_alone(pose, tmp_path):
    """Two convolutions, a matrix for each axis: RTMPose's heads in small. A crop's result does not depend on others."""
    import torch

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3, 4, 1), torch.nn.SiLU(), torch.nn.Conv2d(8, 17, 3, 4, 1)
            )
            self.x, self.y = torch.nn.Linear(12, 96), torch.nn.Linear(12, 128)

        def forward(self, image):
            features = self.stem(image).flatten(2)
            return self.x(features), self.y(features)

    torch.manual_seed(0)  # the exporter leaves the number of keypoints open, as MMPose's does
    torch.onnx.export(
        Small().eval(), (torch.zeros(1, 3, 64, 48),), str(pose / "pose.onnx"), input_names=["input"],
        output_names=["simcc_x", "simcc_y"], dynamic_axes={name: {0: "n"} for name in ("input", "simcc_x", "simcc_y")},
        dynamo=False,
    )  # fmt: skip
    image = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    both = RTMPose(pose).detect([image])[0]
    assert [person.keypoints.shape for person in both] == [(17, 3)] * 2
    yolox(pose / "detector.onnx", {(3, 3): (0.0, 0.0, np.log(0.5), np.log(0.5), 0.4)})
    (alone,) = RTMPose(pose).detect([image])[0]
    np.testing.assert_allclose(alone.keypoints, both[1].keypoints, atol=1e-4)
    assert ((both[0].keypoints[:, 2] >= 0) & (both[0].keypoints[:, 2] <= 1)).all()


def test_wrong_pose_files_are_refused(pose, tmp_path):
    with pytest.raises(BolidError, match="is RTMPose, through which no gradient goes"):
        PoseModel(pose)
    shutil.copy(pose / "pose.onnx", pose / "detector.onnx")
    with pytest.raises(BolidError, match="is no YOLOX"):
        pose_detector(pose)
    yolox(pose / "detector.onnx", {})
    whole_body = {"simcc_x": np.zeros((133, 96), np.float32), "simcc_y": np.zeros((133, 128), np.float32)}
    planted(pose / "pose.onnx", ["N", 3, 64, 48], whole_body)
    with pytest.raises(BolidError, match="no RTMPose of 17 keypoints"):
        pose_detector(pose)
    (pose / "pose.onnx").write_bytes(b"nonsense")
    with pytest.raises(BolidError, match="onnxruntime cannot load"):
        pose_detector(pose)


def yunet(path: Path, box: np.ndarray, landmarks: np.ndarray, score: float = 0.81) -> Path:
    """A face planted at stride 32, in pixels of the 640 x 640 input, and a fainter copy one cell further."""
    answers = {}
    for stride in (8, 16, 32):
        count = (640 // stride) ** 2
        for name, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            answers[f"{name}_{stride}"] = np.zeros((count, width), np.float32)
    centre, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    cell = (centre // 32).astype(int)
    for step, sure in ((0, score), (1, 0.64)):
        x, y = cell[0] + step, cell[1]
        row = y * 20 + x
        answers["cls_32"][row], answers["obj_32"][row] = sure, sure
        answers["bbox_32"][row] = [*(centre / 32 - [x, y]), *np.log(size / 32)]
        answers["kps_32"][row] = (landmarks / 32 - [x, y]).ravel()
    return planted(path, [1, 3, 640, 640], answers)


@pytest.fixture(scope="module")
def portrait(rendered_people):
    """A photo with a large face, and the face as the tiny family's pack sees it."""
    pack = FaceModel(TINY.face)
    photos = [read_photo(path) for path in sorted(rendered_people.glob("*/*.jpg"))]
    found = [(image, faces[0]) for image in photos if (faces := pack.detect(image))]
    return max(found, key=lambda pair: pair[1].box[3] - pair[1].box[1])


@pytest.fixture
def faces(tmp_path, portrait) -> Path:
    """YuNet with that face planted, before the tiny family's recogniser."""
    image, face = portrait
    scale = 640 / max(image.shape[:2])
    yunet(tmp_path / "face" / "yunet.onnx", face.box * scale, face.landmarks * scale)
    shutil.copy(TINY.face / "rec.onnx", tmp_path / "face" / "auraface.onnx")
    return tmp_path / "face"


def test_faces_are_decoded_and_embedded_as_insightface_does(faces, portrait):
    image, expected = portrait
    (found,) = face_detector(faces).detect(image)
    np.testing.assert_allclose(found.box, expected.box, atol=0.05)
    np.testing.assert_allclose(found.landmarks, expected.landmarks, atol=0.05)
    assert found.score == pytest.approx(0.81) and found.embedding @ expected.embedding > 0.999
    assert face_detector(faces).sha256 == FaceModel(TINY.face).sha256


def test_wrong_face_files_are_refused(faces, tmp_path):
    with pytest.raises(BolidError, match="has YuNet for a detector, through which no gradient goes"):
        FaceModel(faces)
    shutil.copy(TINY.face / "rec.onnx", faces / "second.onnx")
    with pytest.raises(BolidError, match="holds 2 recognisers"):
        YuNetFaces(faces)
    (faces / "second.onnx").unlink()
    shutil.copy(TINY.face / "det.onnx", faces / "auraface.onnx")
    with pytest.raises(BolidError, match="is no ArcFace-shaped recogniser"):
        YuNetFaces(faces)
    shutil.copy(TINY.face / "rec.onnx", faces / "yunet.onnx")
    with pytest.raises(BolidError, match="is no YuNet"):
        YuNetFaces(faces)


def test_views_are_read_with_both(pose, faces, portrait):
    """`extract` and `profile` take what the folders hold."""
    from dataclasses import replace

    image, face = portrait
    side = max(image.shape[:2])
    # A person who fills the detector's whole input, with the head where the face is.
    yolox(pose / "detector.onnx", {(1, 1): (1.0, 1.0, np.log(4), np.log(4), 0.9)})
    centre = (face.box[:2] + face.box[2:]) / 2
    step = 1.25 * side / 48  # the width decides: pixels of the picture per input pixel
    place = (centre - side / 2) / step + [24, 32]
    simcc(pose / "pose.onnx", np.clip(np.concatenate([np.tile(place, (5, 1)), PLACES[5:]]), 0, [47, 63]))
    (view,) = ViewReader(replace(TINY, pose=pose, face=faces)).read([image])
    assert isinstance(view, View) and view.face is not None and view.face @ face.embedding > 0.999


# ---- --commercial has a way that works


@pytest.fixture
def downloads(tmp_path, monkeypatch) -> Path:
    """The published files as they are, downloaded on another machine: small networks under their names."""
    monkeypatch.setattr(models, "reachable", lambda url: False)
    folder = tmp_path / "downloads"
    yolox(folder / "object_detection_yolox_2022nov.onnx", {})
    pose = simcc(tmp_path / "end2end.onnx", PLACES)
    name = "rtmpose-m_simcc-body7_pt-body7_420e-256x192-e48f03d0_20230504.zip"
    with zipfile.ZipFile(folder / name, "w") as packed:
        packed.write(pose, "20230831/rtmpose_onnx/end2end.onnx")
        packed.writestr("20230831/rtmpose_onnx/deploy.json", "{}")
    yunet(folder / "face_detection_yunet_2023mar.onnx", np.array([0, 0, 64, 64.0]), np.full((5, 2), 32.0))
    shutil.copy(TINY.face / "rec.onnx", folder / "glintr100.onnx")
    return folder


def test_commercial_pull_takes_other_models(downloads, monkeypatch, tmp_path):
    arguments = ["models", "pull", "sdxl", "--commercial", "--only", "pose", "--only", "face", "--from", str(downloads)]
    result = RUN(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "RTMPose-m behind YOLOX-S, Apache-2.0" in result.stderr and "nobody has decided" in result.stderr
    monkeypatch.setenv("BOLID_COMMERCIAL", "1")
    family = get_family("sdxl")
    assert isinstance(pose_detector(family.require("pose")), RTMPose)
    assert {file.name for file in family.face.iterdir()} == {"yunet.onnx", "auraface.onnx"}
    assert isinstance(face_detector(family.require("face")), YuNetFaces)
    listed = json.loads(RUN(app, ["models", "list", "sdxl", "--json"]).stdout)["families"][0]["parts"]
    parts = {part["part"]: part for part in listed}
    assert parts["face"]["state"] == "there" and parts["face"]["license"] == "Apache-2.0; YuNet: MIT"
    assert parts["face_portrait"]["state"] == "refused" and parts["caption"]["state"] == "refused"
    assert {row["part"]: row["state"] for row in verify("sdxl")}["face"] == "as fetched"
    monkeypatch.delenv("BOLID_COMMERCIAL")  # what lies there is what it is
    listed = json.loads(RUN(app, ["models", "list", "sdxl", "--json"]).stdout)["families"][0]["parts"]
    assert {part["part"]: part for part in listed}["pose"]["license"] == "Apache-2.0"
    # the family's folder, copied to another machine
    monkeypatch.setenv("BOLID_HOME", str(tmp_path / "other"))
    assert models.pull("sdxl", only=["face"], from_dir=family.root, commercial=True)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sdxl-lightning"])
def test_a_commercial_family_needs_nothing_forbidden(family):
    """Every part that `pull` fetches by itself may be used commercially, and none comes under the AGPL."""
    needed = [source for source in published(family, commercial=True) if not source.optional]
    assert {"base", "pose", "segmentation", "face", "image_text"} <= {source.part for source in needed}
    assert all(source.commercial and "AGPL" not in source.license for source in needed)


def test_a_pack_for_research_is_not_taken_for_the_other(downloads):
    face = get_family("sdxl").face
    face.mkdir(parents=True)
    (face / "w600k_r50.onnx").write_bytes(b"x")
    with pytest.raises(BolidError, match="non-commercial research only, and --commercial is in force") as caught:
        models.pull("sdxl", only=["face"], from_dir=downloads, commercial=True)
    assert "remove that folder" in caught.value.hint and "--only face --commercial" in caught.value.hint
