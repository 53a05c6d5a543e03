"""Between a body vector and a shape: p(shape | c_body), and c_body of a shape. Linear and Gaussian, both ways.

The body encoder's vector c of a person is modelled as c = A s + b + e, with the shape's state s (`shape.py`) and e
from N(0, E): what the vector holds besides the shape. Photos show c with noise from N(0, q F). F is one matrix for
all: the noise of one photo. q is read off the profile's `body_logvar`: about 1 for one photo, 1/8 for eight. A, b, E
and F are learnt from people whose shape is known (examples/tiny_family/fit_body_shape.py), and lie in a file beside
the encoder, with its hash.

Stature has no part in it: photos do not show size. Shapes: D body dimension, P parameters, S state, N people.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bolid.body.measurements import NAMES
from bolid.body.mesh import PARAMETERS
from bolid.body.shape import Shape, most_probable, names_of, population, residuals, state_of
from bolid.errors import BolidError

if TYPE_CHECKING:
    import torch

    from bolid.method.shape_head import ShapeHead

KIND = "body-shape"
FREE = ("inseam", "arm", "shoulders", "head", "weight")
"""Measurements that vary freely beside each other; girths follow the weight (their correlation with it is 0.8 to 0.9).
"""
FEW_VIEWS = 2
"""Up to so many views a profile's `body_mean` is within the encoder's population (`backends.body.fuse_views`)."""


@dataclass(frozen=True)
class BodyVectors:
    """The linear-Gaussian model. `weight` f64 [D, S] (A), `bias` [D], `noise` [D, D] (E), `photo_noise` [D, D] (F).

    `one_view` [D]: log of the variance of one photo's vector, mean. `logvar` [D]: `body_logvar` of eight photos, mean.
    """

    weight: np.ndarray
    bias: np.ndarray
    noise: np.ndarray
    photo_noise: np.ndarray
    one_view: np.ndarray
    logvar: np.ndarray
    record: dict[str, Any]

    def shape_of(
        self,
        prior: Shape,
        body_mean: np.ndarray,
        body_logvar: np.ndarray,
        population: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Shape:
        """p(shape | c_body): the prior updated by what photos show of c_body, `body_mean` and `body_logvar` [D].

        `population`: mean [D] and covariance [D, D] within which `body_mean` is, for up to FEW_VIEWS photos.
        """
        state, covariance = self.posterior(prior, body_mean, body_logvar, population)
        return replace(prior, mean=most_probable(state, covariance, {}), covariance=covariance)

    def posterior(
        self,
        prior: Shape,
        body_mean: np.ndarray,
        body_logvar: np.ndarray,
        population: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean [S] and covariance [S, S] of the state, before the mesh ties residuals to parameters."""
        shown, log_variance = _shown(body_mean, body_logvar, population)
        noise = self.noise + np.exp(np.mean(log_variance - self.one_view)) * self.photo_noise
        start = np.concatenate([prior.mean, np.zeros(len(prior.covariance) - len(PARAMETERS))])
        cross = prior.covariance @ self.weight.T  # [S, D]
        gain = np.linalg.solve(self.weight @ cross + noise, cross.T).T
        covariance = prior.covariance - gain @ cross.T
        return start + gain @ (shown - self.weight @ start - self.bias), (covariance + covariance.T) / 2

    def readout(self, prior: Shape, names: Sequence[str] = FREE) -> np.ndarray:
        """f64 [R, D]: how c_body changes the measurements `names`, each over the stature and in standard deviations of
        its own readings over the population: what the encoder knows badly counts as much.
        """
        cross = prior.covariance @ self.weight.T  # [S, D]
        spread = self.weight @ cross + self.noise + np.exp(np.mean(self.logvar - self.one_view)) * self.photo_noise
        gain = np.linalg.solve(spread, cross.T).T
        people = population()
        rows = np.concatenate([people.slope, np.eye(len(NAMES))], 1)[names_of(names)] @ gain
        return rows / np.sqrt(np.einsum("rd,de,re->r", rows, spread, rows))[:, None]

    def vector_of(self, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """body_mean, body_logvar [D] of a shape: as photos of such a person would be encoded."""
        spread = np.diag(self.weight @ shape.covariance @ self.weight.T + self.noise)
        kept = 1 - np.exp(self.logvar)  # a fused mean is drawn to 0 by the encoder's prior
        mean = kept * (self.weight @ state_of(shape.mean) + self.bias)
        return mean, np.log(np.clip(spread, np.exp(self.logvar), 1.0))

    def moved(self, body_mean: np.ndarray, before: Shape, after: Shape) -> np.ndarray:
        """`body_mean` [D] of the person whose shape has become another one."""
        kept = 1 - np.exp(self.logvar)
        return body_mean + kept * (self.weight @ (state_of(after.mean) - state_of(before.mean)))


@dataclass(frozen=True)
class ShapeReadings:
    """A head that reads R numbers of the shape off what the body encoder sees, and what they say of the shape.

    The model is that of c_body, of R numbers in place of D.
    """

    head: ShapeHead
    vectors: BodyVectors

    def read(self, evidence: torch.Tensor, confidence: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """mean, logvar [R] of one person's M views, within N(0, I): what `vectors.shape_of` takes.

        `evidence` [M, E], `confidence` [M].
        """
        from bolid.method.body_vae import fuse

        mean, logvar = self.head(evidence.float())
        fused, uncertain = fuse(mean[None], logvar[None], confidence[None].float())
        return fused[0].double().numpy(), uncertain[0].double().numpy()


def _shown(
    body_mean: np.ndarray, body_logvar: np.ndarray, population: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What the photos alone show of c, [..., D], and the log of its variance: without the prior N(0, I) of the encoder,
    or the population that stands in its place.
    """
    mean, precision = np.asarray(body_mean, np.float64), np.exp(-np.asarray(body_logvar, np.float64))
    shown = np.maximum(precision - 1, 0.02)
    if population is None:
        return precision * mean / shown, -np.log(shown)
    middle, covariance = population
    return (np.linalg.solve(covariance, mean - middle) + shown * mean) / shown, -np.log(shown)


def fit(
    parameters: np.ndarray, sizes: np.ndarray, fused: Mapping[int, tuple[np.ndarray, np.ndarray]], prior: Shape
) -> tuple[np.ndarray, ...]:
    """weight, bias, noise, photo_noise, one_view, logvar of `BodyVectors` from people whose bodies are known.

    `parameters` [N, P], `sizes` [N, K]: measurements. `fused`: number of views -> (body_mean, body_logvar) [N, D] of so
    many views of each, N(0, I) their prior; the largest number gives the weights. Singular values of the slope that
    noise alone would reach are taken out, the others shrunk (Gavish and Donoho 2017, arXiv:1405.7511). The noises are
    those of people left out of the fit (ten folds), so that a fit on few people claims no more than it knows.
    """
    few, most = min(fused), max(fused)
    scale = np.sqrt(np.diag(prior.covariance)) + 1e-9
    states = np.concatenate([parameters, residuals(parameters, sizes)], 1)
    x = (states - states.mean(0)) / scale
    x[:, [0, len(PARAMETERS)]] = 0  # the stature and its residual
    shown = {n: _shown(*fused[n]) for n in fused}
    values, axes = np.linalg.eigh(x.T @ x / len(x))
    axes, values = axes[:, values > 1e-3], values[values > 1e-3]
    white = x @ axes / np.sqrt(values)  # [N, R], uncorrelated
    middle, slope = _line(white, shown[most][0])
    left = _left_out(white, {n: vectors for n, (vectors, _) in shown.items()}, most)
    spread = {n: left[n].T @ left[n] / len(x) for n in fused}
    one_view = shown[few][1].mean(0)
    share = {n: float(np.exp((shown[n][1] - one_view).mean(1)).mean()) for n in fused}
    photo_noise = _photo_noise(spread, share)
    root = np.linalg.cholesky(spread[most])
    whole = np.linalg.solve(root, np.linalg.solve(root, share[most] * photo_noise).T)
    kept, vectors = np.linalg.eigh(np.eye(len(root)) - (whole + whole.T) / 2)
    noise = root @ (vectors * kept.clip(_NOT_PHOTOS)) @ vectors.T @ root.T
    weight = slope @ (axes / np.sqrt(values)).T / scale
    return weight, middle - weight @ states.mean(0), noise, photo_noise, one_view, fused[most][1].mean(0)


def _line(white: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intercept [D] and slope [D, R] of vectors [N, D] on uncorrelated states [N, R], singular values shrunk."""
    center, middle = white.mean(0), vectors.mean(0)
    slope = np.linalg.lstsq(white - center, vectors - middle, rcond=None)[0].T
    left = vectors - middle - (white - center) @ slope.T
    root = np.linalg.cholesky(left.T @ left / (len(white) - white.shape[1]))
    slope = root @ _shrunk(np.linalg.solve(root, slope), len(white))
    return middle - slope @ center, slope


def _left_out(white: np.ndarray, vectors: Mapping[int, np.ndarray], most: int) -> dict[int, np.ndarray]:
    """What lines leave of the vectors [N, D] of people whom they are not fitted on: the line's own error counts too."""
    left = {n: np.empty_like(v) for n, v in vectors.items()}
    fold = np.arange(len(white)) % _FOLDS
    for k in range(_FOLDS):
        middle, slope = _line(white[fold != k], vectors[most][fold != k])
        for n, rows in vectors.items():
            left[n][fold == k] = rows[fold == k] - middle - white[fold == k] @ slope.T
    return left


_FOLDS = 10
_NOT_PHOTOS = 0.3
"""At least so much of the residual variance of many photos is no noise of photos: more of them do not lower it."""


def _photo_noise(spread: Mapping[int, np.ndarray], share: Mapping[int, float]) -> np.ndarray:
    """F: the slope [D, D] of the residual covariance over the photos' share of noise. Positive semidefinite."""
    middle = np.mean(list(share.values()))
    above = sum((share[n] - middle) ** 2 for n in spread)
    slope = sum((share[n] - middle) * spread[n] for n in spread) / max(above, 1e-12)
    values, vectors = np.linalg.eigh((slope + slope.T) / 2)
    return (vectors * values.clip(1e-6)) @ vectors.T


def _shrunk(matrix: np.ndarray, people: int) -> np.ndarray:
    """The matrix [D, R], each entry with noise of variance 1 / people, its singular values shrunk optimally."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    small, large = sorted(matrix.shape)
    y, ratio = s * np.sqrt(people / large), small / large
    inside = np.maximum((y**2 - ratio - 1) ** 2 - 4 * ratio, 0)
    kept = np.where(y > 1 + np.sqrt(ratio), np.sqrt(inside) / np.maximum(y, 1e-12), 0) * np.sqrt(large / people)
    return (u * kept) @ vt


_TENSORS = ("weight", "bias", "noise", "photo_noise", "one_view", "logvar")
_READINGS_PREFIX, _HEAD_PREFIX = "readings.", "head."


def _with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under it, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def save_body_vectors(path: str | os.PathLike[str], model: BodyVectors, readings: ShapeReadings | None = None) -> None:
    """Write the model, and a head with that of its readings. The record, of kind "body-shape", names the encoder."""
    import torch

    from bolid.formats.tensors import save_tensors

    config = {**model.record["config"], "parameters": list(PARAMETERS), "measurements": list(NAMES)}
    tensors = {name: torch.from_numpy(getattr(model, name)).float() for name in _TENSORS}
    if readings is not None:
        tensors |= {
            _READINGS_PREFIX + name: torch.from_numpy(getattr(readings.vectors, name)).float() for name in _TENSORS
        }
        tensors |= {_HEAD_PREFIX + name: value.half() for name, value in readings.head.state_dict().items()}
    save_tensors(path, tensors, {**model.record, "config": config})


def load_body_vectors(path: str | os.PathLike[str], body_encoder: str) -> BodyVectors:
    """Read the model for the body encoder of that sha256. Raises BolidError for another encoder or body model."""
    from bolid.formats.tensors import load_tensors

    return _model(path, *load_tensors(path, KIND), body_encoder)


def load_readings(path: str | os.PathLike[str], body_encoder: str) -> ShapeReadings | None:
    """The head and the model of its readings, where the file has them. Raises BolidError as `load_body_vectors`."""
    from bolid.formats.tensors import load_tensors
    from bolid.method.shape_head import ShapeHead

    tensors, record = load_tensors(path, KIND)
    state = _with_prefix(_HEAD_PREFIX, tensors)
    if not state:
        return None
    vectors = _model(path, _with_prefix(_READINGS_PREFIX, tensors), record, body_encoder)
    try:
        return ShapeReadings(ShapeHead.of_state(state), vectors)
    except (KeyError, RuntimeError) as error:
        raise BolidError(f"{path} holds a damaged shape head", "fit it again: fit_body_shape.py") from error


def _model(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], record: dict[str, Any], body_encoder: str
) -> BodyVectors:
    again = "fit it again: fit_body_shape.py"
    try:
        model = BodyVectors(**{name: tensors[name].double().numpy() for name in _TENSORS}, record=record)
        theirs, config = record["inputs"]["body_encoder"], record["config"]
        known = config["parameters"] == list(PARAMETERS) and config["measurements"] == list(NAMES)
    except (KeyError, TypeError) as error:
        raise BolidError(f"{path} lacks parts of a body-shape file: it has {sorted(tensors)}", again) from error
    if theirs != body_encoder:
        raise BolidError(f"{path} is for another body encoder", "fit it again for this one: fit_body_shape.py")
    size = len(model.bias)
    if not known or model.weight.shape != (size, len(PARAMETERS) + len(NAMES)) or model.noise.shape != (size, size):
        raise BolidError(f"{path} is for another body model", again)
    return model
