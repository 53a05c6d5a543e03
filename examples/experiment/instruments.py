"""The instruments of the tables: two readers of bodies, a detector and a recogniser of faces, the image-text model.

Shapes: N pictures, P people, R body ratios, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fisher_faces import FILE as FACES_FILE
from fisher_faces import FisherFaces
from judge.network import FILE as JUDGE_FILE
from judge.network import Judge
from mask_reader import FILE as MASKS_FILE
from mask_reader import MaskReader

from bolid.backends.face import FaceModel
from bolid.backends.image_text import ImageTextModel
from bolid.models.families import Family
from bolid.run import home, sha256_file

OUTSIDER, OWN = "an outsider", "the family's own"  # recognisers; the second has a part in training
REFERENCES = 2  # portraits of each person that faces are compared with


def sha(file: Path) -> str:
    return f"SHA-256 {sha256_file(file)[:12]}"


class ByJudge:
    """Body ratios, named `ratio_names`, by the judge."""

    def __init__(self, file: Path) -> None:
        self.judge = Judge(file)
        self.ratio_names = self.judge.ratio_names

    def read(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """[N, R]."""
        return self.judge.predict(pictures)

    def ratios(self, read: np.ndarray) -> np.ndarray:
        """[P, R] of readings [P, N, R] of N pictures each: their mean."""
        return read.mean(1)


class Readers:
    """The instruments. `bodies`: "judge", where its file is there, and "masks". `instruments`: figures -> what measures
    them."""

    def __init__(self, family: Family, judge: Path = JUDGE_FILE) -> None:
        self.size = family.image_size
        self.bodies: dict[str, ByJudge | MaskReader] = {"judge": ByJudge(judge)} if judge.is_file() else {}
        self.bodies["masks"] = MaskReader(family)
        self.tower = ImageTextModel(family.require("image_text"))
        self.faces = FaceModel(family.require("face"))
        self.outsider = FisherFaces() if FACES_FILE.is_file() else None
        self.dino = Dino(home() / "dinov2") if (home() / "dinov2").is_dir() else None
        nothing, dinov2 = "nothing: its file is not there", home() / "dinov2"
        self.instruments = {
            "body by judge": f"judge/, no part in any training, {sha(judge)}" if "judge" in self.bodies else nothing,
            "body by masks": f"mask_reader.py, by the family's pose and segmentation networks, {sha(MASKS_FILE)}",
            "face found": "the family's face detector at its usual threshold",
            "likeness": f"mean cosine with each of {REFERENCES} real portraits, 0 where no face is found",
            f"likeness by {OUTSIDER}": f"fisher_faces.py, {sha(FACES_FILE)}" if self.outsider else nothing,
            f"likeness by {OWN}": f"the recogniser that the face branch learns from, SHA-256 {self.faces.sha256[:12]}",
            "as asked": "the family's image-text model, zero-shot",
            "FID, KID, diversity": "the family's image tower; diversity is LPIPS without its learned weights",
            "FD on DINOv2": f"the class token of {dinov2}" if self.dino else f"nothing: there is no {dinov2}",
            "edges": "mean squared difference of neighbouring pixels",
        }

    def face(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Recogniser -> vector of the most certain face, unit length; empty without one."""
        found = self.faces.detect(image)
        if not found:
            return {}
        outside = {} if self.outsider is None else {OUTSIDER: self.outsider.embed(image, found[0])}
        return {**outside, OWN: found[0].embedding}


class Dino:
    """DINOv2's class token (Oquab et al., arXiv:2304.07193), from a folder as transformers has it.

    Pictures are squeezed to SIDE x SIDE, as for the Fréchet distance of Stein et al. (arXiv:2306.04675): nothing of a
    body is cropped."""

    SIDE = 224
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        self.network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()

    @torch.no_grad()
    def encode(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """f32 [N, D]."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.MEAN, self.STD))
        found = []
        for picture in pictures:
            x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
            x = F.interpolate(x, (self.SIDE, self.SIDE), mode="bicubic", antialias=True).clamp(0, 1)
            found.append(self.network(pixel_values=(x - mean) / std).last_hidden_state[:, 0])
        return torch.cat(found)
