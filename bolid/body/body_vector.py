"""Between a body vector and a shape: p(shape | c_body), and c_body of a shape. Linear and Gaussian, both ways.

The body encoder's vector c of a person is taken to be A x + b + e, x the shape's parameters and e ~ N(0, S): what the
vector holds besides the shape, and where the encoder is not linear. What photos show of c is a Gaussian of its own,
`body_mean` and `body_logvar` of a profile, so that fewer and worse photos leave more of the prior. A, b, S and a factor
on the photos' variance are learnt from people whose shape is known (examples/tiny_family/fit_body_shape.py). They
lie in a file beside the encoder, with its hash.

Stature has no part in it: photos do not show size. Shapes: D body dimension, P parameters, N people.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bolid.body.mesh import PARAMETERS
from bolid.body.shape import Shape
from bolid.errors import BolidError

KIND = "body-shape"
FEW = 2
"""Up to so many views a profile's `body_mean` is within the encoder's population (`backends.body.fuse_views`)."""


@dataclass(frozen=True)
class BodyVectors:
    """The linear-Gaussian model. `weight` f64 [D, P], `bias` [D], `noise` [D, D] (S), `temper`: what the photos'
    variance is multiplied by. `logvar` [D]: of the vectors of eight photos, mean.
    """

    weight: np.ndarray
    bias: np.ndarray
    noise: np.ndarray
    temper: float
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

        `population`: mean [D] and covariance [D, D] within which `body_mean` is, for profiles of FEW photos or fewer.
        """
        evidence, shown = _evidence(body_mean, body_logvar, population)
        evidence, shown = evidence / self.temper, shown / self.temper
        expected = self.weight @ prior.mean + self.bias
        cross = prior.covariance @ self.weight.T  # [P, D]
        spread = self.weight @ cross + self.noise  # of c before the photos
        # P(x | c) without an inverse of what the photos do not show: gain = cross (I + W spread)^-1
        system = np.eye(len(shown)) + shown[:, None] * spread
        mean = prior.mean + cross @ np.linalg.solve(system, evidence - shown * expected)
        covariance = prior.covariance - cross @ np.linalg.solve(system, shown[:, None] * cross.T)
        return replace(prior, mean=mean, covariance=(covariance + covariance.T) / 2)

    def vector_of(self, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """body_mean, body_logvar [D] of a shape: as photos of such a person would be encoded, and how surely."""
        spread = np.diag(self.weight @ shape.covariance @ self.weight.T + self.noise)
        kept = 1 - np.exp(self.logvar)  # a fused mean is drawn to 0 by the encoder's prior
        mean = kept * (self.weight @ shape.mean + self.bias)
        return mean, np.log(np.clip(spread, np.exp(self.logvar), 1.0))

    def moved(self, body_mean: np.ndarray, before: Shape, after: Shape) -> np.ndarray:
        """`body_mean` [D] of the person whose shape has become another one."""
        kept = 1 - np.exp(self.logvar)
        return body_mean + kept * (self.weight @ (after.mean - before.mean))


def _evidence(
    body_mean: np.ndarray, body_logvar: np.ndarray, population: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Precision times mean, and the precision, [D] each, of what the photos alone show."""
    precision = np.exp(-np.asarray(body_logvar, np.float64))
    shown = np.maximum(precision - 1, 0)  # without the N(0, I) of the encoder's prior
    mean = np.asarray(body_mean, np.float64)
    if population is None:
        return precision * mean, shown
    middle, covariance = population
    return np.linalg.solve(covariance, mean - middle) + shown * mean, shown


def fit(
    parameters: np.ndarray,
    fused: dict[int, tuple[np.ndarray, np.ndarray]],
    prior: Shape,
    *,
    penalty: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, np.ndarray]:
    """weight, bias, noise, temper, logvar of `BodyVectors` from people whose parameters [N, P] are known.

    `fused`: number of views -> (body_mean, body_logvar) [N, D] of so many views of each, N(0, I) their prior; the
    largest number gives the weights. `penalty`: of the ridge regression, on standardised parameters.
    """
    most = max(fused)
    x = (parameters - prior.mean) / np.sqrt(np.diag(prior.covariance))
    x[:, 0] = 0  # the stature
    seen = {n: _unshrunk(*fused[n]) for n in fused}
    y, middle = seen[most][0], seen[most][0].mean(0)
    gram = x.T @ x + penalty * np.eye(x.shape[1])
    slope = np.linalg.solve(gram, x.T @ (y - middle)).T  # [D, P]
    freedom = 1 - np.trace(np.linalg.solve(gram, x.T @ x)) / len(x)
    residual = {n: seen[n][0] - middle - x @ slope.T for n in seen}
    covariance = residual[most].T @ residual[most] / len(x) / freedom
    # Residual variance = S + temper * the variance that the encoder claims, over numbers of views.
    few = min(fused)
    claimed = {n: seen[n][1].mean(0) for n in (few, most)}
    excess = (residual[few] ** 2).mean(0) - (residual[most] ** 2).mean(0)
    temper = float(np.clip(np.sum(excess) / np.sum(claimed[few] - claimed[most]), 0.25, 20.0)) if few < most else 1.0
    values, vectors = np.linalg.eigh(covariance - temper * np.diag(claimed[most]))
    noise = (vectors * values.clip(1e-4 * values.max())) @ vectors.T
    weight = slope / np.sqrt(np.diag(prior.covariance))
    return weight, middle - weight @ prior.mean, noise, temper, fused[most][1].mean(0)


def _unshrunk(body_mean: np.ndarray, body_logvar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance [N, D] of what the views alone show."""
    precision = np.exp(-body_logvar)
    shown = np.maximum(precision - 1, 1e-3)
    return precision * body_mean / shown, 1 / shown


def save_body_vectors(path: str | os.PathLike[str], model: BodyVectors) -> None:
    """Write the model. Its record must be of kind "body-shape" and name the body encoder among its inputs."""
    import torch

    from bolid.formats.tensors import save_tensors

    tensors = {name: getattr(model, name) for name in ("weight", "bias", "noise", "logvar")}
    config = {**model.record["config"], "temper": model.temper, "parameters": list(PARAMETERS)}
    save_tensors(path, {name: torch.from_numpy(value).float() for name, value in tensors.items()},
                 {**model.record, "config": config})  # fmt: skip


def load_body_vectors(path: str | os.PathLike[str], body_encoder: str) -> BodyVectors:
    """Read the model for the body encoder of that sha256. Raises BolidError for another encoder or body model."""
    from bolid.formats.tensors import load_tensors

    tensors, record = load_tensors(path, KIND)
    try:
        weight, bias, noise, logvar = (tensors[name].double().numpy() for name in ("weight", "bias", "noise", "logvar"))
        theirs, temper = record["inputs"]["body_encoder"], float(record["config"]["temper"])
        known = record["config"]["parameters"] == list(PARAMETERS)
    except (KeyError, TypeError) as error:
        raise BolidError(
            f"{path} lacks parts of a body-shape file: it has {sorted(tensors)}", "fit it again: fit_body_shape.py"
        ) from error
    if theirs != body_encoder:
        raise BolidError(f"{path} is for another body encoder", "fit it again for this one: fit_body_shape.py")
    if not known or weight.shape != (len(bias), len(PARAMETERS)) or noise.shape != (len(bias), len(bias)):
        raise BolidError(f"{path} is for another body model", "fit it again: fit_body_shape.py")
    return BodyVectors(weight, bias, noise, temper, logvar, record)
