"""Clothes and hair: how far they stand off the body, and the surfaces that are added to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from bolid.synth.body import AnnyBody
from bolid.synth.geometry import grid_faces, ramp
from bolid.synth.people import PhotoPlan, SyntheticPerson

HAIR_THICKNESS = {"bald": 0.0, "short": 0.006, "full": 0.016, "bun": 0.006, "long": 0.011}  # of the stature
ADDED_HAIR = ("long", "bun")  # styles with a surface of their own


def cloth_thickness(body: AnnyBody, person: SyntheticPerson, plan: PhotoPlan) -> np.ndarray:
    """Distance of cloth and hair from the skin at each vertex, over stature, f32 [V]."""
    levels = body.levels
    z, loose = body.canonical[:, 2], plan.looseness
    trunk = body.arm < 0.5
    sleeve = 0.93 if plan.sleeves == "long" else 0.40
    top = np.where(
        trunk,
        ramp(z, levels["waist"] - 0.01, 0.01) * ramp(-z, -levels["neck"], 0.02),
        ramp(-body.along_arm, -sleeve, 0.05),
    ) * (body.head < 0.5)
    hem = {"trousers": levels["ankle"] + 0.012, "shorts": levels["knee"] + 0.045, "skirt": levels["crotch"]}[
        plan.bottom
    ]
    low = np.where(trunk, ramp(-z, -levels["waist"], 0.01) * ramp(z, hem, 0.01), 0.0)
    shoe = ramp(-z, -levels["ankle"] - 0.002, 0.006) * trunk
    hair = hair_mask(body.canonical, body.head, body.face_points)
    thickness = HAIR_THICKNESS[person.hair_style]
    return (top * (0.003 + 0.004 * loose) + low * (0.003 + 0.005 * loose) + shoe * 0.004 + hair * thickness).astype(
        np.float32
    )


def skirt(
    body: AnnyBody, stature: float, vertices: np.ndarray, transforms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(vertices, triangles) of a flared surface from the waist to above the knee that encloses both legs.

    `vertices` [V, 3]: of the dressed body in its pose; `transforms` [J, 4, 4]: of its bones.
    """
    levels = body.levels
    legs = np.flatnonzero(
        (body.arm < 0.05)
        & (body.canonical[:, 2] < levels["waist"] + 0.02)
        & (body.canonical[:, 2] > levels["knee"] - 0.02)
    )
    frame = transforms[body.skin_bones["root"]][:3, :3]
    local, rows, columns = vertices[legs] @ frame, 12, 64
    angles = np.linspace(0, 2 * np.pi, columns, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)], 1)
    heights = np.linspace(levels["waist"] + 0.004, levels["knee"] + 0.03, rows)
    waist = np.abs(body.canonical[legs, 2] - heights[0]) < 0.012
    center = (local[waist].max(0) + local[waist].min(0)) / 2
    rings, reach = [], np.zeros(columns)
    for row, level in enumerate(heights):
        band = np.abs(body.canonical[legs, 2] - level) < 0.030
        spread = ((local[band][:, :2] - center[:2]) @ directions.T).max(0)
        spread = (np.roll(spread, 1) + spread + np.roll(spread, -1)) / 3
        reach = np.maximum(spread + 0.009 * stature, reach + (0.0045 * stature if row else 0))
        z = center[2] - (heights[0] - level) * stature
        rings.append(np.concatenate([center[:2] + directions * reach[:, None], np.full((columns, 1), z)], 1))
    return (np.concatenate(rings) @ frame.T).astype(np.float32), grid_faces(rows, columns, closed=True)


def hair_surface(
    body: AnnyBody, style: str, rest: np.ndarray, stature: float, transforms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(vertices, triangles) of long hair, a curtain round the back of the head, or of a bun, a sphere behind its top.

    `rest` [V, 3]: the body at rest; `transforms` [J, 4, 4]: of its bones in the pose.
    """
    head = rest[body.head > 0.9]
    eyes, ears = body.keypoints_of(rest[None])[0][[1, 3]]
    top, back, side = head[:, 2].max(), head[:, 1].max(), np.abs(head[:, 0]).max()
    if style == "bun":
        rows, columns, radius = 12, 20, 0.030 * stature
        center = np.array([0, back - 0.2 * radius, top - 0.35 * radius])
        polar, azimuth = np.linspace(0, np.pi, rows), np.linspace(0, 2 * np.pi, columns, endpoint=False)
        shape = np.stack(
            [
                np.outer(np.sin(polar), np.cos(azimuth)),
                np.outer(np.sin(polar), np.sin(azimuth)),
                np.repeat(np.cos(polar)[:, None], columns, 1),
            ],
            -1,
        ).reshape(-1, 3)
        vertices, faces = center + radius * shape, grid_faces(rows, columns, closed=True)
    else:
        rows, columns = 14, 40
        azimuth = np.radians(np.linspace(-28, 208, columns))  # 90 is straight back
        heights = np.linspace(eyes[2] + 0.2 * (top - eyes[2]), top - 0.19 * stature, rows)
        flare = np.linspace(1.02, 1.28, rows)[:, None]
        x = (side + 0.002 * stature) * np.cos(azimuth) * flare
        y = ears[1] + (back - ears[1] + 0.012 * stature) * np.sin(azimuth) * flare
        vertices = np.stack([x, y, np.repeat(heights[:, None], columns, 1)], -1).reshape(-1, 3)
        faces = grid_faces(rows, columns, closed=False)
    moved = np.concatenate([vertices, np.ones((len(vertices), 1))], 1) @ transforms[body.skin_bones["head"]].T
    return moved[:, :3].astype(np.float32), faces


def hair_level(canonical: np.ndarray, points: dict[str, Any]) -> np.ndarray:
    """Height of a canonical point above the hairline (negative: skin)."""
    y, z = canonical[:, 1], canonical[:, 2]
    eye, ear = points["eye"], points["ear"]
    forehead = eye[2] + 0.62 * (1.0 - eye[2])
    line = np.interp(
        y,
        [eye[1], eye[1] + 0.022, ear[1] - 0.012, ear[1] + 0.012, ear[1] + 0.05],
        [forehead, forehead - 0.006, ear[2] + 0.016, ear[2] - 0.004, ear[2] - 0.028],
    )
    return z - line


def hair_mask(canonical: np.ndarray, head: np.ndarray, points: dict[str, Any]) -> np.ndarray:
    """Fraction of the hair's thickness at each vertex, 0..1; 0 on the ears."""
    ear = points["ear"]
    beside = (
        (np.abs(canonical[:, 0]) > abs(ear[0]) - 0.006)
        & (np.abs(canonical[:, 1] - ear[1]) < 0.03)
        & (canonical[:, 2] < ear[2] + 0.02)
    )
    return ramp(hair_level(canonical, points), 0.004, 0.012) * (head > 0.5) * ~beside
