"""Outlines of people against the renderer's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bolid.backends.silhouette import HEIGHT, silhouette
from bolid.method.metrics import width_profile


@pytest.fixture(scope="module")
def person():
    """(picture, keypoints, box, true mask): what stays the same when only the place behind the person changes."""
    from bolid.synth.people import sample_person, sample_plan
    from bolid.synth.render import Renderer

    person = sample_person(100_004)
    renderer = Renderer(person, (256, 192))
    plan = sample_plan(person, 1, framing="full body", pose="arms spread", scene="beach", yaw=0.0)
    photos = [renderer.render(dataclasses.replace(plan, scene=scene)) for scene in ("beach", "meadow", "snow")]
    first, *others = (photo.image.astype(int) for photo in photos)
    mask = np.all([np.abs(first - other).max(-1) <= 12 for other in others], axis=0)
    keypoints = np.asarray(photos[0].truth["keypoints"], np.float32)
    keypoints[:, 2] = keypoints[:, 2] > 0
    rows, columns = np.nonzero(mask)
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
    return photos[0].image, keypoints, box, mask


def test_the_outline_is_the_persons(person):
    image, keypoints, box, truth = person
    mask, points = silhouette(image, box, keypoints)
    assert mask.shape == (HEIGHT, HEIGHT * 192 // 256) and np.allclose(points[:, :2] / HEIGHT, keypoints[:, :2] / 256)
    import cv2

    small = cv2.resize(truth.astype(np.float32), mask.shape[::-1], interpolation=cv2.INTER_AREA) > 0.5
    assert (mask & small).sum() / (mask | small).sum() > 0.75
    found, wanted = (width_profile(torch.from_numpy(m), torch.from_numpy(points)) for m in (mask, small))
    assert float((found - wanted).abs().mean()) < 0.2 * float(wanted.mean())
    again, _ = silhouette(image, box, keypoints)
    assert (again == mask).all()


def test_nobody_seen_gives_an_empty_outline(person):
    image, keypoints, box, _ = person
    unseen = keypoints * [1, 1, 0]
    assert not silhouette(image, box, unseen)[0].any()


def test_small_pictures_are_not_enlarged(person):
    image, keypoints, box, _ = person
    small = np.ascontiguousarray(image[::4, ::4])
    mask, points = silhouette(small, box / 4, keypoints / [4, 4, 1])
    assert mask.shape == (64, 48) and mask.any() and np.allclose(points[:, :2], keypoints[:, :2] / 4)
