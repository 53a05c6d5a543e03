"""What is done to pictures after they are sampled: they are enlarged, and their faces sampled again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bolid.generate.models import Models
from bolid.generate.request import Request
from bolid.run import sha256_file

if TYPE_CHECKING:
    import numpy as np

    from bolid.backends.upscale import Upscaler
    from bolid.generate.refine import FaceRefiner, Resample


class Finishing:
    """The networks of --upscale and --refine-face, where the request has these. `inputs`: their files' hashes."""

    def __init__(self, request: Request, models: Models) -> None:
        self.request, self.models = request, models
        self.inputs: dict[str, str] = {}
        self.upscaler = self._upscaler() if request.upscale != 1 else None
        self.refiner = self._refiner() if request.refine_face else None

    def __call__(
        self, pictures: list[np.ndarray], prompts: list[str], seeds: list[int], resample: Resample
    ) -> list[np.ndarray]:
        """The finished pictures, uint8 [H,W,3]. `resample`: see `bolid.generate.refine`."""
        if self.upscaler is not None:
            pictures = self.upscaler(pictures, self.request.upscale)
        if self.refiner is not None:
            pictures = self.refiner(pictures, prompts, seeds, resample)
        return pictures

    def _upscaler(self) -> Upscaler:
        from bolid.backends.upscale import Upscaler

        path, device = self.request.family.require("upscaler"), self.request.device
        self.inputs["upscaler"] = sha = sha256_file(path)
        return self.models.keep(("upscaler", sha, device), lambda: Upscaler(path, device))

    def _refiner(self) -> FaceRefiner:
        from bolid.backends.people import face_detector, pose_detector
        from bolid.generate.refine import FaceRefiner

        family, device = self.request.family, self.request.device

        def load() -> FaceRefiner:
            faces, pose = face_detector(family.require("face"), device), pose_detector(family.require("pose"), device)
            return FaceRefiner(faces, pose, family.image_size)

        refiner = self.models.keep(("refiner", family.name, family.root, device), load)
        self.inputs["refine_face"] = refiner.faces.sha256
        return refiner
