"""Measurements of a body mesh at rest: lengths and girths in metres, weight in kilograms.

The names are those of ISO 8559-1 where it has one. Landmarks are vertices of the mesh, chosen by where they lie on the
neutral adult (`LANDMARKS`), so they move smoothly with the shape. A girth is the length of a tape round the body: the
convex hull of the plane's cut through that part. docs/concepts/body-measurements.md has the table of definitions.

Shapes: B bodies, V vertices, F triangles, K = len(MEASUREMENTS).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from bolid.body.mesh import BodyModel, body_model, volume
from bolid.body.rest_mesh import WAIST_LOOP
from bolid.errors import BolidError

DENSITY = 985.0
"""Of a human body, kg/m3, lungs half full."""


@dataclass(frozen=True)
class Measurement:
    """One row of the table of definitions. `unit`: what people say it in, `scale` of them to 1 metre or kilogram."""

    name: str
    title: str
    definition: str
    unit: str = "cm"
    scale: float = 100.0


MEASUREMENTS = (
    Measurement("height", "stature", "floor to the highest point of the head"),
    Measurement("inseam", "inside leg height", "floor to the crotch, the lowest point between the legs"),
    Measurement("arm", "arm length", "acromion to the middle of the elbow to the middle of the wrist, straight lines"),
    Measurement("shoulders", "shoulder breadth", "left acromion to right acromion, straight"),
    Measurement("chest", "bust girth", "horizontal, at the foremost points of the breast, without the arms"),
    Measurement("waist", "waist girth", "horizontal, at the mean height of Anny's waist line"),
    Measurement("hip", "hip girth", "horizontal, at the rearmost point of the buttocks"),
    Measurement("thigh", "thigh girth", "horizontal, left leg, 3 % of the inside leg height below the crotch"),
    Measurement("upper-arm", "upper arm girth", "across the left upper arm, midway from shoulder to elbow"),
    Measurement("neck", "neck girth", "across the neck's axis, below the larynx"),
    Measurement("head", "head height", "chin to the highest point of the head, vertical"),
    Measurement("weight", "body mass", f"volume of the mesh x {DENSITY:.0f} kg/m3", "kg", 1.0),
)
NAMES = tuple(measurement.name for measurement in MEASUREMENTS)

LANDMARKS = {
    "crotch": (0.0, -0.033, 0.482),
    "acromion": (0.0945, 0.004, 0.833),
    "breast": (0.047, -0.089, 0.731),
    "buttock": (0.0375, 0.055, 0.528),
    "chin": (0.0, -0.079, 0.873),
    "lower neck, front": (0.0, -0.044, 0.842),
    "lower neck, back": (0.0, 0.020, 0.8385),
    "larynx": (0.0, -0.0485, 0.856),
    "upper neck, front": (0.0, -0.0506, 0.862),
    "upper neck, back": (0.0, 0.008, 0.875),
}
"""Canonical coordinates (over stature, floor at 0, neutral adult, the left side) of landmarks: the nearest vertex."""

_BAND = 0.10  # of the stature: a plane cuts only triangles so near to where it lies on the neutral adult


def section(vertices: np.ndarray, edges: np.ndarray, origin: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """The points [n, 3] where the edges [E, 2] of a mesh [V, 3] cross the plane through `origin` across `normal`."""
    height = (vertices - origin) @ normal
    a, b = edges[:, 0], edges[:, 1]
    crossing = (height[a] < 0) != (height[b] < 0)
    a, b = a[crossing], b[crossing]
    part = height[a] / (height[a] - height[b])
    return vertices[a] + part[:, None] * (vertices[b] - vertices[a])


def tape(points: np.ndarray, normal: np.ndarray) -> float:
    """Length of a tape round points [n, 3] of a plane: the perimeter of their convex hull.

    Raises BolidError where fewer than three points are given: the plane misses the body.
    """
    from scipy.spatial import ConvexHull

    if len(points) < 3:
        raise BolidError("a measuring plane misses the body", "measure a whole body at rest")
    along, across = plane_axes(normal)
    return float(ConvexHull(np.stack([points @ along, points @ across], 1)).area)  # in the plane, its perimeter


def plane_axes(normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors in the plane across `normal`, at right angles."""
    aside = np.array([1.0, 0, 0]) if abs(normal[0]) < 0.9 else np.array([0, 1.0, 0])
    along = np.cross(normal, aside)
    along /= np.linalg.norm(along)
    return along, np.cross(normal, along) / np.linalg.norm(normal)


def edges_of(faces: np.ndarray) -> np.ndarray:
    """Each edge of triangles [F, 3] once, [E, 2]."""
    pairs = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    return np.unique(pairs, axis=0)


@dataclass(frozen=True)
class Plane:
    """A measuring plane on one body, and the edges of the part of the body that it cuts."""

    origin: np.ndarray  # [3]
    normal: np.ndarray  # [3], unit
    edges: np.ndarray  # [E, 2]


class Tape:
    """Measures bodies of Anny's topology. Build it once: `measuring_tape()`."""

    def __init__(self, model: BodyModel) -> None:
        self.model = model
        self.landmarks = {
            name: int(np.linalg.norm(model.canonical - point, axis=1).argmin()) for name, point in LANDMARKS.items()
        }
        mirrored = model.canonical[self.landmarks["acromion"]] * [-1, 1, 1]
        self.landmarks["right acromion"] = int(np.linalg.norm(model.canonical - mirrored, axis=1).argmin())
        self.waist_loop = np.array(WAIST_LOOP)
        self._rings()
        trunk, z = model.arm < 0.5, model.canonical[:, 2]
        level = {name: model.canonical[vertex][2] for name, vertex in self.landmarks.items()}
        level["waist"] = float(z[self.waist_loop].mean())
        self._edges = {
            "chest": self._part(trunk & (abs(z - level["breast"]) < _BAND)),
            "waist": self._part(trunk & (abs(z - level["waist"]) < _BAND)),
            "hip": self._part(trunk & (abs(z - level["buttock"]) < _BAND)),
            "thigh": self._part(trunk & (model.canonical[:, 0] > 0) & (z < level["crotch"] + 0.01) & (z > 0.35)),
            "upper-arm": self._part((model.arm > 0.5) & (model.canonical[:, 0] > 0) & (self._along < 1)),
            "neck": self._part(trunk & (abs(z - level["larynx"]) < 0.05) & (abs(model.canonical[:, 0]) < 0.06)),
        }

    def _rings(self) -> None:
        """Rings of vertices round the left arm; their centres stand for the arm's axis, the elbow and the wrist."""
        joints, points = self.model.joints, self.model.canonical
        left = (self.model.arm > 0.5) & (points[:, 0] > 0)
        shoulder, elbow, wrist = joints["upperarm01.L"], joints["lowerarm01.L"], joints["wrist.L"]
        self._along = (points - shoulder) @ (elbow - shoulder) / np.sum((elbow - shoulder) ** 2)
        forearm = (points - elbow) @ (wrist - elbow) / np.sum((wrist - elbow) ** 2)
        near_wrist = np.linalg.norm(points - wrist, axis=1) < 0.03
        self.rings = {
            "upper arm, high": np.flatnonzero(left & (abs(self._along - 0.30) < 0.06)),
            "upper arm, middle": np.flatnonzero(left & (abs(self._along - 0.50) < 0.06)),
            "upper arm, low": np.flatnonzero(left & (abs(self._along - 0.75) < 0.06)),
            "elbow": np.flatnonzero(left & (abs(self._along - 1.0) < 0.05) & (forearm < 0.1)),
            "wrist": np.flatnonzero(left & (abs(forearm - 1.0) < 0.05) & near_wrist),
        }

    def _part(self, mask: np.ndarray) -> np.ndarray:
        faces = self.model.faces
        return edges_of(faces[mask[faces].all(1)])

    def point(self, vertices: np.ndarray, name: str) -> np.ndarray:
        """A landmark, or the centre of a ring, [3], on one body [V, 3]."""
        return vertices[self.rings[name]].mean(0) if name in self.rings else vertices[self.landmarks[name]]

    def plane(self, vertices: np.ndarray, name: str) -> Plane:
        """The plane of a girth on one body [V, 3]."""
        up, edges = np.array([0.0, 0, 1]), self._edges[name]
        if name == "upper-arm":
            axis = self.point(vertices, "upper arm, low") - self.point(vertices, "upper arm, high")
            return Plane(self.point(vertices, "upper arm, middle"), axis / np.linalg.norm(axis), edges)
        if name == "neck":
            low, high = (
                (self.point(vertices, f"{part} neck, front") + self.point(vertices, f"{part} neck, back")) / 2
                for part in ("lower", "upper")
            )
            return Plane(self.point(vertices, "larynx"), (high - low) / np.linalg.norm(high - low), edges)
        if name == "waist":
            return Plane(vertices[self.waist_loop].mean(0), up, edges)
        if name == "thigh":
            crotch = self.point(vertices, "crotch")
            return Plane(crotch - 0.03 * (crotch[2] - vertices[:, 2].min()) * up, up, edges)
        return Plane(self.point(vertices, {"chest": "breast", "hip": "buttock"}[name]), up, edges)

    def girth(self, vertices: np.ndarray, name: str) -> float:
        """A girth of one body [V, 3] in metres: "chest", "waist", "hip", "thigh", "upper-arm" or "neck"."""
        plane = self.plane(vertices, name)
        return tape(section(vertices, plane.edges, plane.origin, plane.normal), plane.normal)

    def measure(self, vertices: np.ndarray) -> np.ndarray:
        """[B, K] of bodies at rest [B, V, 3], in the order of MEASUREMENTS: metres, and kilograms for the weight."""
        weights = DENSITY * volume(vertices, self.model.faces)
        return np.array([[*self._one(body), weight] for body, weight in zip(vertices, weights, strict=True)])

    def _one(self, body: np.ndarray) -> list[float]:
        floor, top = body[:, 2].min(), body[:, 2].max()
        acromion, elbow, wrist = (self.point(body, name) for name in ("acromion", "elbow", "wrist"))
        lengths = {
            "height": top - floor,
            "inseam": self.point(body, "crotch")[2] - floor,
            "arm": np.linalg.norm(acromion - elbow) + np.linalg.norm(elbow - wrist),
            "shoulders": np.linalg.norm(acromion - self.point(body, "right acromion")),
            "head": top - self.point(body, "chin")[2],
        }
        return [float(lengths[name]) if name in lengths else self.girth(body, name) for name in NAMES[:-1]]


@functools.cache
def measuring_tape() -> Tape:
    """The tape for Anny's bodies, built once a process."""
    return Tape(body_model())
