"""Pictures of a person, sampled with the person's vectors, maps and losses; of several candidates the nearest."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.generate.finishing import Finishing
from bolid.generate.identity import Identity
from bolid.generate.networks import Networks
from bolid.generate.request import Cell, Request, picture_seed
from bolid.person import PersonReader
from bolid.scales import Scale, parse_scale

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bolid.backends.sampling import Control, OnStep
    from bolid.generate.guidance import MakeLoss

_NONE = Scale(0, 0, 0)


@dataclass(frozen=True)
class PictureSampler:
    """Samples pictures of `people`.

    `ranker`: measures how far a candidate is from the person, with --best-of; `guidance`: "face", "body" -> its loss;
    `maps`: what the ControlNet follows, of each person; `on_step`: called after each step.
    """

    request: Request
    people: Sequence[Identity]
    networks: Networks
    finishing: Finishing
    ranker: PersonReader | None
    guidance: Mapping[str, MakeLoss]
    maps: Sequence[np.ndarray]
    on_step: OnStep | None

    def __call__(self, who: int, cell: Cell, jobs: Sequence[tuple[int, int]]) -> list[tuple[np.ndarray, int]]:
        """(the finished picture, its seed) of each job of person number `who`."""
        found = self._best(who, cell, jobs)
        pictures, seeds = [picture for picture, _ in found], [seed for _, seed in found]
        resample = functools.partial(self._resample, who, cell)
        return list(zip(self.finishing(pictures, self._prompts(jobs), seeds, resample), seeds, strict=True))

    def scales(self, person: Identity, cell: Cell) -> dict[str, Scale]:
        """Branch -> lambda, of those that the person has and that are not at 0."""
        branches, defaults = self.networks.branches, self.request.sampler
        scales = {b: cell.scales.get(b, parse_scale(defaults.get(f"{b}_scale", 1.0), f"{b}_scale")) for b in branches}
        return {b: scale for b, scale in scales.items() if b in person.vectors and not scale.is_zero}

    def _best(self, who: int, cell: Cell, jobs: Sequence[tuple[int, int]]) -> list[tuple[np.ndarray, int]]:
        """(the picture, its seed) of each job: of `best_of` candidates the nearest to the person."""
        person, ranker = self.people[who], self.ranker
        face = None  # what candidates are compared by beside the body
        shows_face = "face" in self.scales(person, cell)
        if ranker and shows_face and person.face_model == ranker.view_reader.faces.sha256:
            face = person.vectors["face"]
        best: list[tuple[float, np.ndarray, int]] = []
        for candidate in range(self.request.best_of):
            seeds = [picture_seed(cell.seed, *job, candidate) for job in jobs]
            pictures = self._sample(who, cell, self._prompts(jobs), seeds)
            distances = (
                [0.0] * len(jobs) if ranker is None else ranker.distances(pictures, person.vectors["body"], face)
            )
            found = list(zip(distances, pictures, seeds, strict=True))
            best = [min(pair, key=lambda each: each[0]) for pair in zip(best or found, found, strict=True)]
        return [(picture, seed) for _, picture, seed in best]

    def _prompts(self, jobs: Sequence[tuple[int, int]]) -> list[str]:
        """The prompt of each job as it is encoded."""
        return [self.request.family.dressed(self.request.prompts[index]) for index, _ in jobs]

    def _sample(self, who: int, cell: Cell, prompts: list[str], seeds: list[int]) -> list[np.ndarray]:
        """One picture a prompt, uint8 [H,W,3]."""
        person = self.people[who]
        losses = [
            self.guidance[part](person.vectors[part].to(self.request.device), weight)
            for part, weight in cell.person_guidance.items()
            if not weight.is_zero
        ]
        scales = self.scales(person, cell)
        return self._pictures(person, cell, prompts, seeds, scales, controls=self._controls(who), losses=losses)

    def _resample(
        self, who: int, cell: Cell, crops: list[np.ndarray], prompts: list[str], seeds: list[int], strength: float
    ) -> list[np.ndarray]:
        """Portraits of the person, sampled again from `crops`; there is no body in them."""
        from bolid.backends.diffusion import encode_latents
        from bolid.backends.sampling import Start

        person = self.people[who]
        scales = {branch: scale for branch, scale in self.scales(person, cell).items() if branch == "face"}
        start = Start(encode_latents(self.networks.pipe, crops)[:, 0], strength)
        return self._pictures(person, cell, prompts, seeds, scales, latents=start)

    def _pictures(
        self, person: Identity, cell: Cell, prompts: Sequence[str], seeds: Sequence[int], scales: Mapping[str, Scale],
        **options: Any,
    ) -> list[np.ndarray]:  # fmt: skip
        """Pictures, uint8 [H,W,3], of `person` by `sample` with these `options`."""
        import torch

        from bolid.backends.diffusion import decode_latents
        from bolid.backends.sampling import Guidance, sample

        pipe, branches = self.networks.pipe, self.networks.branches
        latents = sample(
            pipe, prompts, size=self.request.family.image_size, steps=cell.timesteps or cell.steps,
            guidance=Guidance(cell.guidance, self.request.negative),
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],  # on the CPU: the same on every device
            vectors=[self._vector(person, branch) for branch in branches],
            scales=[scales.get(branch, _NONE) for branch in branches], on_step=self.on_step, **options,
        )  # fmt: skip
        finite = latents.isfinite().flatten(1).all(1).tolist()
        pictures = decode_latents(pipe, latents)
        pipe.maybe_free_model_hooks()  # with --offload: the last network leaves the accelerator too
        for prompt, picture, fine in zip(prompts, pictures, finite, strict=True):
            if not fine or picture.std() == 0:
                raise BolidError(
                    f"sampling {prompt!r} of {person.name} gave no picture: "
                    + ("its pixels are all the same" if fine else "its numbers are not finite"),
                    "check the base (bolid models verify), --lora and --adapter; in half precision try --dtype fp32",
                )
        return pictures

    def _vector(self, person: Identity, branch: str) -> torch.Tensor:
        """The person's, or zeros: a branch is loaded because some person has a vector for it."""
        import torch

        known = next(other.vectors[branch] for other in self.people if branch in other.vectors)
        return person.vectors.get(branch, torch.zeros_like(known))

    def _controls(self, who: int) -> list[Control]:
        """The ControlNet with the person's map."""
        if self.networks.controlnet is None:
            return []
        from PIL import Image

        from bolid.backends.sampling import Control

        return [Control(self.networks.controlnet, Image.fromarray(self.maps[who]), self.request.control_weight)]
