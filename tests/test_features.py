"""InceptionV3's weights: what is looked for, and that bad files are refused and never run."""

from __future__ import annotations

import os

import pytest
import torch

from bolid.backends.features import InceptionFeatures, inception_path
from bolid.errors import BolidError

pytest.importorskip("torch_fidelity")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_missing_weights_are_named():
    with pytest.raises(BolidError, match="InceptionV3's weights are missing: looked for") as caught:
        InceptionFeatures()
    assert "--features tower" in caught.value.hint and str(inception_path()) in caught.value.message


@pytest.mark.parametrize("kind", ["truncated", "malicious", "wrong shape", "wrong network"])
def test_bad_weights_are_refused(kind, tmp_path):
    path, trace = inception_path(), tmp_path / "it-ran"
    path.parent.mkdir(parents=True)
    content = {
        "truncated": {"fc.weight": torch.ones(9)},
        "malicious": Malicious(trace),
        "wrong shape": {"Conv2d_1a_3x3.conv.weight": torch.ones(3)},
        "wrong network": {"conv_in.weight": torch.ones(3)},
    }[kind]
    torch.save(content, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(
        BolidError, match="does not hold InceptionV3's weights|is damaged or not a weights file"
    ) as caught:
        InceptionFeatures()
    assert caught.value.hint == "fetch it again" and not trace.exists()
