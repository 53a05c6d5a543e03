"""The colour of every pixel of the person: skin, face, hair and clothes by the canonical point, then light."""

from __future__ import annotations

import numpy as np

from bolid.synth.body import AnnyBody
from bolid.synth.camera import Camera
from bolid.synth.clothes import hair_level
from bolid.synth.people import COLORS, PhotoPlan, SyntheticPerson

BODY, SKIRT, HAIR = 0, 1, 2  # parts of the mesh


def shade(
    body: AnnyBody, who: SyntheticPerson, plan: PhotoPlan, camera: Camera, pixel: np.ndarray, part: np.ndarray
) -> np.ndarray:
    """Lit colours f32 [P, 3], 0..1, of P pixels.

    `pixel` [P, 11]: normal (3), canonical point (3), arm, along_arm, head, eye, part. `part` [P]: BODY, SKIRT or HAIR.
    """
    color = albedo(body, who, plan, pixel, part)
    normal = pixel[:, :3] / np.maximum(np.linalg.norm(pixel[:, :3], axis=1, keepdims=True), 1e-9)
    light = camera.light(plan)
    facing = normal @ light
    facing = np.where(part != BODY, np.abs(facing), facing)  # skirts and long hair have two visible sides
    sky = 0.5 + 0.5 * normal[:, 2]
    shade = 0.46 + 0.14 * sky + plan.light_strength * np.clip(facing * 0.82 + 0.18, 0, 1)
    return np.clip(color * shade[:, None], 0, 1).astype(np.float32)


def albedo(body: AnnyBody, who: SyntheticPerson, plan: PhotoPlan, pixel: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Colours without light f32 [P, 3], 0..1, of P pixels as `shade` has them."""
    color = np.repeat(np.array(who.skin, np.float32)[None], len(pixel), 0)
    _color_face(color, body, who, pixel)
    _color_clothes(color, body, plan, pixel)
    color[part == SKIRT] = COLORS[plan.bottom_color]
    color[part == HAIR] = np.array(who.hair_color, np.float32)
    return color


def _color_face(color: np.ndarray, body: AnnyBody, who: SyntheticPerson, pixel: np.ndarray) -> None:
    """Lips, eyebrows, eyes and hair on the head, into `color` [P, 3]."""
    x, y, z = pixel[:, 3], pixel[:, 4], pixel[:, 5]
    head, eye = pixel[:, 8], pixel[:, 9]
    skin, hair = np.array(who.skin, np.float32), np.array(who.hair_color, np.float32)
    points = body.face_points
    front = (head > 0.5) & (y < points["ear"][1] - 0.02)
    ex, ez = points["eye"][0], points["eye"][2]
    eye_x, eye_z = np.abs(x) - ex, z - ez
    mouth = body.canonical[body.mouth_corner]
    lips = front & ((x / (mouth[0] * 1.15)) ** 2 + ((z - mouth[2] + 0.001) / 0.0062) ** 2 < 1)
    color[lips] = skin * [0.86, 0.58, 0.56]
    brow = (
        front & (np.abs(eye_x) < 0.0125) & (np.abs(eye_z - 0.0155 + 0.10 * np.abs(eye_x - 0.002)) < 0.0023 * who.brow)
    )
    color[brow] = hair * 0.75
    white = eye > 0.5
    color[white] = (0.93, 0.93, 0.92)
    color[white & (eye_x**2 + eye_z**2 < 0.0042**2)] = who.eye_color
    color[white & (eye_x**2 + eye_z**2 < 0.0020**2)] = (0.03, 0.03, 0.03)
    if who.hair_style != "bald":
        color[(head > 0.5) & (hair_level(pixel[:, 3:6], points) > 0)] = hair


def _color_clothes(color: np.ndarray, body: AnnyBody, plan: PhotoPlan, pixel: np.ndarray) -> None:
    """Top, trousers or shorts and shoes, into `color` [P, 3]."""
    x, y, z = pixel[:, 3], pixel[:, 4], pixel[:, 5]
    arm, along, head = pixel[:, 6], pixel[:, 7], pixel[:, 8]
    levels, trunk = body.levels, arm < 0.5
    sleeve = 0.93 if plan.sleeves == "long" else 0.40
    neck = levels["neck"] - 0.012 * np.clip(-y / 0.05, -1, 2.5) + 0.06 * np.maximum(np.abs(x) - 0.07, 0)
    top = np.where(trunk, (z > levels["waist"]) & (z < neck) & (head < 0.5), along < sleeve)
    hem = {"trousers": levels["ankle"] + 0.012, "shorts": levels["knee"] + 0.045, "skirt": levels["crotch"] - 0.01}[
        plan.bottom
    ]
    low = trunk & (z <= levels["waist"]) & (z > hem)
    color[top] = COLORS[plan.top_color]
    color[low] = COLORS[plan.bottom_color]
    color[trunk & (z < levels["ankle"] + 0.002)] = plan.shoe
