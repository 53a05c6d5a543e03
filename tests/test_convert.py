"""`bolid models convert`: YOLO's pose weights, published, malicious and damaged ones. Offline throughout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bolid.backends.pose import PoseModel, read_checkpoint
from bolid.errors import BolidError
from bolid.models import pull as models
from bolid.models.convert import convert
from bolid.models.families import get_family
from bolid.models.manifest import read_manifest
from bolid.models.sources import SOURCES
from bolid.run import home
from bolid_cli.main import app

run = CliRunner().invoke
ROOT = Path(__file__).parent.parent


def checkpoint(path: Path, scale: str = "n", **more) -> Path:
    """What ultralytics 8.3 publishes: the whole network pickled in half precision, with notes about its training."""
    from ultralytics.nn.modules.head import Detect
    from ultralytics.nn.tasks import PoseModel as Network

    torch.manual_seed(0)
    network = Network(f"yolo11{scale}-pose.yaml", ch=3, nc=1, data_kpt_shape=(17, 3), verbose=False).half()
    network.names, network.args = {0: "person"}, {"imgsz": 640, "task": "pose"}
    network.model[-1].detect = Detect.forward
    content = {
        "date": "2024-09-28", "version": "8.3.0", "epoch": -1, "model": network, "ema": None, "optimizer": None,
        "train_args": {"project": Path("runs")}, "train_metrics": {"fitness": np.float64(0.5)}, **more,
    }  # fmt: skip
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("published") / "yolo11n-pose.pt")


def test_published_pose_weights_are_converted(published, tmp_path):
    result = run(app, ["models", "convert", str(published), "--out", str(tmp_path / "pose")])
    assert result.exit_code == 0 and result.stdout.split() == [str(tmp_path / "pose")]
    assert json.loads((tmp_path / "pose" / "config.json").read_text()) == {"yaml": "yolo11n-pose.yaml", "imgsz": 640}
    from ultralytics.nn.tasks import PoseModel as Network

    torch.manual_seed(0)
    theirs = Network("yolo11n-pose.yaml", ch=3, nc=1, data_kpt_shape=(17, 3), verbose=False).half().float().eval()
    ours = PoseModel(tmp_path / "pose")
    pixels = torch.rand(1, 3, 64, 32)
    torch.testing.assert_close(ours.raw(pixels), theirs(pixels)[0], atol=1e-3, rtol=1e-3)
    with pytest.raises(BolidError, match="is already there"):
        convert(published, tmp_path / "pose")


def test_pull_converts_what_another_machine_downloaded(monkeypatch, published):
    monkeypatch.setattr(models, "reachable", lambda url: False)
    url = next(source.url for source in SOURCES["sdxl"] if source.part == "pose")
    assert url.endswith("/yolo11x-pose.pt")
    (renamed := published.with_name("yolo11x-pose.pt")).write_bytes(published.read_bytes())
    models.pull("sdxl", only=["pose"], from_dir=renamed.parent)
    assert PoseModel(get_family("sdxl").require("pose")).image_size == 640
    assert set(read_manifest(home() / "sdxl")["pose"]["files"]) == {"config.json", "model.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["s", "m", "l", "x"])
def test_every_scale_is_recognised(tmp_path, scale):
    yaml, tensors = read_checkpoint(checkpoint(tmp_path / "a.pt", scale))
    assert yaml == f"yolo11{scale}-pose.yaml"


class Malicious:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_a_malicious_checkpoint_is_refused_and_not_run(published, tmp_path):
    trace = tmp_path / "it-ran"
    for number, call in enumerate(
        [
            (os.system, (f"touch {trace}",)),
            (eval, (f"open({str(trace)!r}, 'w')",)),
            (getattr, (dict, "fromkeys")),
            (getattr, (torch.nn.Module, "register_module_forward_hook")),
            (Path.touch, (trace,)),
            (torch.hub.load_state_dict_from_url, ("http://127.0.0.1:9/x",)),
        ]
    ):
        for content in ({"model": Malicious(*call)}, {"model": None, "train_args": Malicious(*call)}):
            torch.save(content, tmp_path / f"{number}.pt")
            with pytest.raises(BolidError, match="is refused: it holds .* that is no part of pose weights") as caught:
                convert(tmp_path / f"{number}.pt", tmp_path / "out")
            assert "nothing of it was run" in caught.value.hint
            assert not trace.exists() and not (tmp_path / "out").exists()


def test_what_is_no_pose_checkpoint(published, tmp_path):
    whole = published.read_bytes()
    wrong = tmp_path / "x.pt"
    from ultralytics.nn.tasks import PoseModel as Network

    other = Network("yolo11n-pose.yaml", ch=3, nc=2, data_kpt_shape=(5, 3), verbose=False)
    for write, message in (
        (lambda: wrong.write_bytes(whole[: len(whole) // 2]), "is damaged or no torch file"),
        (lambda: wrong.write_bytes(b"text"), "is damaged or no torch file"),
        (lambda: torch.save({"model": {"a": torch.ones(2)}}, wrong), "holds no ultralytics pose network"),
        (lambda: torch.save({"model": other}, wrong), "is no YOLO11 pose network for people with 17 keypoints"),
    ):
        write()
        with pytest.raises(BolidError, match=message):
            convert(wrong, tmp_path / "out")
    with pytest.raises(BolidError, match="is no .pt, .pth, .onnx or .bin file"):
        convert(tmp_path / "a.ckpt")
    with pytest.raises(BolidError, match="there is no"):
        convert(tmp_path / "absent.pt")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ultralytics_is_silent_and_writes_into_our_folder_only(tmp_path):
    """No network either, and no folder for temporary files; also where the user's configuration differs."""
    code = (
        "import bolid.backends.pose as pose\nfrom bolid.models.families import get_family\n"
        "pose.PoseModel(get_family('tiny').pose)\nfrom ultralytics.utils import ONLINE\n"
        "from ultralytics.utils.events import events\nassert not ONLINE and not events.enabled\n"
    )
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("YOLO_", "BOLID_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={**keep, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
    written = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert written == ["home/.cache/bolid/Ultralytics/settings.json"]
