"""The camera and the key light of a photo."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bolid.synth.people import PhotoPlan

FOV = 28.0
"""Vertical field of view in degrees: a short telephoto, as portraits are taken."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera in front of the person (at -y), looking along +y, tilted by `pitch`."""

    position: np.ndarray
    rotation: np.ndarray  # rows: right, down, forward
    focal: float  # pixels
    center: tuple[float, float]  # pixels

    @classmethod
    def framing(
        cls, plan: PhotoPlan, mesh: np.ndarray, keypoints: np.ndarray, size: tuple[int, int], fov: float = FOV
    ) -> Camera:
        """The camera that fills the picture (`size` = (height, width)) as the plan's framing and fill demand.

        `fov`: vertical field of view in degrees.
        """
        height, width = size
        focal = 0.5 * height / np.tan(np.radians(fov / 2))
        top, hips, knees = mesh[:, 2].max(), keypoints[11:13, 2].mean(), keypoints[13:15, 2].mean()
        head_top = keypoints[0:5, 2].mean() + 0.09
        shoulders = keypoints[5:7, 2].mean()
        low = {
            "full body": 0.0,
            "three-quarter": 0.35 * hips + 0.65 * knees,
            "portrait": shoulders - 0.42 * (head_top - shoulders),
        }[plan.framing]
        high = top if plan.framing != "portrait" else head_top + 0.03
        inside = mesh[(mesh[:, 2] >= low) & (mesh[:, 2] <= high)]
        middle = np.array([(inside[:, 0].max() + inside[:, 0].min()) / 2, 0.0, (low + high) / 2])
        if plan.framing == "portrait":
            middle[0] = keypoints[0:5, 0].mean()
        pitch = np.radians(plan.pitch)
        # Camera axes in world coordinates: x to the picture's right is the world's +x seen from -y.
        forward = np.array([0, np.cos(pitch), -np.sin(pitch)])
        right = np.array([1.0, 0, 0])
        down = np.cross(forward, right)
        roll = np.radians(plan.roll)
        right, down = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
        axes = np.stack([right, down, forward])
        # Perspective enlarges near hands: start at about the right distance, then correct distance and aim.
        distance = focal * (high - low) / (plan.fill * height)
        if plan.framing != "portrait":
            for _ in range(2):
                placed = cls(middle - forward * distance, axes, focal, (0.0, 0.0)).project(inside)
                low_px, high_px = placed[:, :2].min(0), placed[:, :2].max(0)
                middle = middle + (right * (low_px + high_px)[0] + down * (low_px + high_px)[1]) / 2 * distance / focal
                distance *= max(np.ptp(placed[:, 1]) / (plan.fill * height), np.ptp(placed[:, 0]) / (0.96 * width))
        center = (width / 2 + plan.shift[0] * width, height / 2 + plan.shift[1] * height)
        return cls(middle - forward * distance, axes, focal, center)

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points [N, 3] -> (x px, y px, distance along the view) [N, 3]."""
        local = (points - self.position) @ self.rotation.T
        xy = local[:, :2] / local[:, 2:] * self.focal + self.center
        return np.concatenate([xy, local[:, 2:]], 1)

    def rays(self, size: tuple[int, int]) -> np.ndarray:
        """Unit view directions [H, W, 3] through the pixel centres."""
        y, x = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
        local = np.stack([(x - self.center[0]) / self.focal, (y - self.center[1]) / self.focal, np.ones_like(x)], -1)
        world = local @ self.rotation
        return world / np.linalg.norm(world, axis=-1, keepdims=True)

    def light(self, plan: PhotoPlan) -> np.ndarray:
        """Unit vector towards the key light."""
        azimuth, elevation = np.radians([plan.light_azimuth, plan.light_elevation])
        return np.array([np.sin(azimuth) * np.cos(elevation), -np.cos(azimuth) * np.cos(elevation), np.sin(elevation)])
