"""Body sliders: directions in c_body along which one body ratio changes and the others do not.

A linear (ridge) read-out says where a body is on each ratio, in standard deviations of what it says of the population;
a direction is the most probable change of c_body for which its own reading moves by 1 and those of the others by 0.
What pictures then change in other ratios all the same can be taken out of it in part (`unmixed`).

Why not in standard deviations of the ratios themselves: an encoder that knows a ratio badly sees people closer together
than they are, and a whole one of the true ones would lead to where it has never seen anybody.

Shapes: P people, D body dimension, R ratios.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Readout(NamedTuple):
    """`weight @ (body - center)` is the reading of each ratio; 0 is the population's mean."""

    weight: torch.Tensor  # f64 [R, D]
    center: torch.Tensor  # f64 [D]

    def __call__(self, bodies: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., R]"""
        return (bodies.to(self.weight) - self.center) @ self.weight.T


def fit_readout(bodies: torch.Tensor, ratios: torch.Tensor, penalty: float = 1.0) -> Readout:
    """Ridge regression from `bodies` [P, D] to the standardised `ratios` [P, R]."""
    bodies, ratios = bodies.double(), ratios.double()
    center = bodies.mean(0)
    x, y = bodies - center, (ratios - ratios.mean(0)) / ratios.std(0)
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return Readout(torch.linalg.solve(gram, x.T @ y).T.contiguous(), center)


def standardised(readout: Readout, bodies: torch.Tensor) -> Readout:
    """The same read-out, its unit the standard deviation of its own readings of `bodies` [P, D]."""
    return Readout(readout.weight / readout(bodies).std(0)[:, None], readout.center)


class Expectation(NamedTuple):
    """What a reader is expected to say of a picture of somebody who reads x: x + change @ (x - center) + shift."""

    change: torch.Tensor  # [R, R]
    center: torch.Tensor  # [R]
    shift: torch.Tensor  # [R]

    def __call__(self, readings: torch.Tensor) -> torch.Tensor:
        """[..., R] -> [..., R]"""
        return readings + (readings - self.center) @ self.change.T + self.shift


def expect(readings: torch.Tensor, said: torch.Tensor, confidence: torch.Tensor, penalty: float = 10.0) -> Expectation:
    """From what a reader `said` of a photo of each of P people, and these people's `readings`, both [P, R].

    Weighted ridge regression of the difference: without people enough nothing but the mean difference is believed.
    """
    weight = (confidence / confidence.mean().clamp_min(1e-12))[:, None]
    center, middle = ((weight * part).mean(0) for part in (readings, said))
    x = readings - center
    y = said - middle - x
    gram = x.T @ (weight * x) + penalty * torch.eye(x.shape[1]).to(x)
    return Expectation(torch.linalg.solve(gram, x.T @ (weight * y)).T, center, middle - center)


def reading_distance(
    said: torch.Tensor, readings: torch.Tensor, expectation: Expectation | None = None
) -> torch.Tensor:
    """The mean squared difference of what is `said` of a picture and the person's `readings`, both [B, R] in standard
    deviations of the readings, [B]: L_id by the sliders. With an `expectation`, of what is expected of those."""
    return (said - (readings if expectation is None else expectation(readings))).square().mean(-1)


def slider_directions(readout: Readout, bodies: torch.Tensor) -> torch.Tensor:
    """Directions [R, D] with `readout.weight @ directions.T` the identity.

    Of all such changes d the one of least d' S^-1 d, S the covariance of `bodies` [P, D]: the most probable one, if
    people are distributed normally. It is S W' (W S W')^-1, so everything that no slider names follows as it does in
    the population. Raises ValueError when there are more ratios than dimensions to move in.
    """
    weight = readout.weight
    if weight.shape[0] > weight.shape[1]:
        raise ValueError(f"{weight.shape[0]} sliders need as many body dimensions, there are {weight.shape[1]}")
    covariance = torch.cov(bodies.to(weight).T)
    spread = covariance @ weight.T  # [D, R]
    return torch.linalg.solve(weight @ spread, spread.T)


def unmixed(directions: torch.Tensor, response: torch.Tensor, part: float) -> torch.Tensor:
    """`directions` [R, D], each with so much of the others' that *pictures* change less in the others' ratios.

    `response` [R, R]: by how much the reading of ratio j of generated pictures changes along direction i. Row i of its
    inverse is the mixture along which ratio i alone would change, were pictures linear in the body; of what it adds to
    direction i, which stays whole, a `part` (0..1) is taken: the rest leads further out than it helps.
    The readings of the *body* along a direction are then no longer the identity. Raises ValueError where some ratio
    does not grow along its own direction: there is nothing to mix then.
    """
    own = response.diagonal()
    if not bool((own > 0).all()):
        raise ValueError(f"pictures do not follow slider {int((own <= 0).nonzero()[0])}")
    mixture = torch.linalg.inv(response)
    mixture = mixture / mixture.diagonal()[:, None]
    return directions + part * (mixture - torch.eye(len(mixture)).to(mixture)) @ directions


def cross_validated_r2(bodies: torch.Tensor, ratios: torch.Tensor, penalty: float, folds: int = 5) -> torch.Tensor:
    """R2 [R] of the read-out on people that it was not fitted to."""
    fold = torch.arange(len(bodies)) % folds
    y = (ratios.double() - ratios.double().mean(0)) / ratios.double().std(0)
    read = torch.empty_like(y)
    for k in range(folds):
        inside, outside = fold != k, fold == k
        spread, middle = y[inside].std(0), y[inside].mean(0)
        read[outside] = fit_readout(bodies[inside], y[inside], penalty)(bodies[outside]) * spread + middle
    return 1 - (y - read).square().sum(0) / (y - y.mean(0)).square().sum(0)
