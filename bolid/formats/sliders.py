"""``body-sliders.safetensors``: the sliders of one body encoder (see ``bolid.method.sliders``)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.formats.tensors import check_finite, load_tensors, save_tensors

if TYPE_CHECKING:
    import torch

KIND = "body-sliders"


@dataclass(frozen=True)
class Sliders:
    """R sliders in D body dimensions. 1 on a slider is one standard deviation of the population, as encoded."""

    names: tuple[str, ...]  # R
    directions: torch.Tensor  # f32 [R, D], to add to body_mean
    readout: torch.Tensor  # f32 [R, D]; readout @ (body_mean - center) is a body's position on each slider
    center: torch.Tensor  # f32 [D]
    r2: tuple[float, ...]  # of the readout, on people it was not fitted to
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def body_encoder(self) -> str:
        """sha256 of their body encoder."""
        return str(self.record["inputs"]["body_encoder"])

    def read(self, body_mean: torch.Tensor) -> dict[str, float]:
        """Slider name -> position of a body [D] on it."""
        values = self.readout @ (body_mean - self.center)
        return dict(zip(self.names, values.tolist(), strict=True))


def save_sliders(path: str | os.PathLike[str], sliders: Sliders) -> None:
    """Write sliders. Their ``record`` must be of kind "body-sliders" and name the body encoder among its inputs."""
    config = {**sliders.record["config"], "names": list(sliders.names), "r2": list(sliders.r2)}
    tensors = {"directions": sliders.directions, "readout": sliders.readout, "center": sliders.center}
    save_tensors(path, {name: tensor.float() for name, tensor in tensors.items()}, {**sliders.record, "config": config})


def load_sliders(path: str | os.PathLike[str], body_encoder: str) -> Sliders:
    """Read sliders for the body encoder of that sha256. Raises BolidError for those of another one."""
    tensors, record = load_tensors(path, KIND)
    try:
        names, r2 = tuple(record["config"]["names"]), tuple(record["config"]["r2"])
        sliders = Sliders(names, tensors["directions"], tensors["readout"], tensors["center"], r2, record)
        measured_for = sliders.body_encoder
        whole = sliders.directions.shape == sliders.readout.shape == (len(names), len(sliders.center))
    except (KeyError, TypeError) as error:
        raise BolidError(f"{path} lacks parts of sliders: it has {sorted(tensors)}", "measure them again") from error
    if not whole:
        raise BolidError(f"{path}: the sliders' tensors do not fit each other", "measure them again")
    check_finite(path, tensors)
    if measured_for != body_encoder:
        raise BolidError(
            f"the sliders {path} were measured for another body encoder",
            "give --sliders measured for this one, or make the profile again with this family",
        )
    return sliders
