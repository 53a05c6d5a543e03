"""Body sliders: directions in c_body along which one body ratio changes and the others stay.

1. A ridge regression reads each ratio off a body (`fit_readout`). Its unit is the standard deviation of its own
   readings over the population (`standardise`), not that of the true ratios: an encoder that knows a ratio badly
   sees people closer together than they are, and a step of the true size would leave the population.
2. A slider's direction is the most probable change of c_body that moves its own reading by 1 and the others by 0
   (`slider_directions`).
3. Pictures may still change in other ratios along it; `remove_crosstalk` takes part of that out.

Shapes: P people, D body dimension, R ratios.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Readout(NamedTuple):
    """A linear read-out: `weight @ (body - center)` are the ratios' readings; 0 is the population's mean."""

    weight: torch.Tensor  # f64 [R, D]
    center: torch.Tensor  # f64 [D]

    def __call__(self, bodies: torch.Tensor) -> torch.Tensor:
        """Bodies [..., D] -> readings [..., R]."""
        return (bodies.to(self.weight) - self.center) @ self.weight.T


def fit_readout(bodies: torch.Tensor, ratios: torch.Tensor, penalty: float = 1.0) -> Readout:
    """Ridge regression from `bodies` [P, D] to the standardised `ratios` [P, R]."""
    bodies, ratios = bodies.double(), ratios.double()
    center = bodies.mean(0)
    x, y = bodies - center, (ratios - ratios.mean(0)) / ratios.std(0)
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return Readout(torch.linalg.solve(gram, x.T @ y).T.contiguous(), center)


def standardise(readout: Readout, bodies: torch.Tensor) -> Readout:
    """The read-out in units of the standard deviation of its own readings of `bodies` [P, D]."""
    return Readout(readout.weight / readout(bodies).std(0)[:, None], readout.center)


def reading_distance(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared difference of slider readings, [B, R] each in standard deviations of the population, [B]."""
    return (predicted - target).square().mean(-1)


def slider_directions(readout: Readout, bodies: torch.Tensor) -> torch.Tensor:
    """Directions [R, D] such that `readout.weight @ directions.T` is the identity.

    Of all such changes d, the one of least d' S^-1 d, with S the covariance of `bodies` [P, D]: the most probable one
    if bodies are normally distributed. It is S W' (W S W')^-1, so whatever no slider names follows as it does in the
    population. Raises ValueError for more ratios than dimensions.
    """
    weight = readout.weight
    if weight.shape[0] > weight.shape[1]:
        raise ValueError(f"{weight.shape[0]} sliders need as many body dimensions, there are {weight.shape[1]}")
    covariance = torch.cov(bodies.to(weight).T)
    spread = covariance @ weight.T  # [D, R]
    return torch.linalg.solve(weight @ spread, spread.T)


def remove_crosstalk(directions: torch.Tensor, response: torch.Tensor, fraction: float) -> torch.Tensor:
    """Mix `directions` [R, D] so that pictures change less in the other sliders' ratios.

    `response` [R, R]: the change of ratio j, read off generated pictures, along direction i. Row i of its inverse is
    the mixture along which ratio i alone would change if pictures were linear in the body. Direction i stays whole; of
    the other directions in the mixture a `fraction` (0..1) is added, because all of it leads further out than it helps.
    The readings of the body along a direction are then no longer the identity. Raises ValueError where a ratio does not
    grow along its own direction.
    """
    own = response.diagonal()
    if not bool((own > 0).all()):
        raise ValueError(f"pictures do not follow slider {int((own <= 0).nonzero()[0])}")
    mixture = torch.linalg.inv(response)
    mixture = mixture / mixture.diagonal()[:, None]
    return directions + fraction * (mixture - torch.eye(len(mixture)).to(mixture)) @ directions


def cross_validated_r2(bodies: torch.Tensor, ratios: torch.Tensor, penalty: float, folds: int = 5) -> torch.Tensor:
    """R2 [R] of the read-out on held-out people, over `folds`."""
    fold = torch.arange(len(bodies)) % folds
    y = (ratios.double() - ratios.double().mean(0)) / ratios.double().std(0)
    read = torch.empty_like(y)
    for k in range(folds):
        inside, outside = fold != k, fold == k
        spread, middle = y[inside].std(0), y[inside].mean(0)
        read[outside] = fit_readout(bodies[inside], y[inside], penalty)(bodies[outside]) * spread + middle
    return 1 - (y - read).square().sum(0) / (y - y.mean(0)).square().sum(0)
