"""The features of many pictures, extracted by this process or shared among several (`bolid.workers`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bolid.errors import BolidError
from bolid.evaluate.evaluators import BATCH, Evaluators, PictureFeatures
from bolid.evaluate.pictures import Picture, PictureFolder
from bolid.workers import Process, Run


@dataclass(frozen=True)
class _Extraction:
    """The work of a process on a batch of (folder, picture): the features, or why a picture cannot be read."""

    arguments: tuple[Any, ...]  # of Evaluators
    device: str
    evaluators: Evaluators | None = None  # in the process that has loaded them
    threads: int | None = None
    round: int = 4

    def load(self) -> Process:
        evaluators = self.evaluators or Evaluators(*self.arguments)
        folders: dict[Any, PictureFolder] = {}

        def extract(batch: list[Any]) -> list[PictureFeatures | str]:
            results: list[Any] = []
            images = []
            for place, picture in batch:
                folder = folders.setdefault(place, PictureFolder(place))
                try:
                    images.append(folder.load(picture))
                    results.append(None)
                except BolidError as error:
                    results.append(error.message)
            found = iter(evaluators.extract(images) if images else [])
            return [next(found) if result is None else result for result in results]

        return extract

    def __reduce__(self) -> tuple[Any, ...]:
        return _Extraction, (self.arguments, self.device)


@dataclass(frozen=True)
class Extractor:
    """Runs `evaluators` on folders of pictures, in fixed batches: the same features for any number of processes."""

    evaluators: Evaluators
    run: Run

    def batches(
        self, folder: PictureFolder, pictures: Sequence[Picture]
    ) -> Iterator[tuple[list[int], list[np.ndarray], list[PictureFeatures]]]:
        """Batches of (places in `pictures`, images, features); pictures that cannot be read are rejected."""
        starts = range(0, len(pictures), BATCH)
        work = _Extraction(self.evaluators.arguments, self.evaluators.device, self.evaluators)
        batches = [[(folder.place, picture) for picture in pictures[start : start + BATCH]] for start in starts]
        for start, results in zip(starts, self.run(work, batches), strict=True):
            places, images, found = [], [], []
            for place, result in enumerate(results, start):
                try:
                    if isinstance(result, str):
                        raise BolidError(result, "")
                    images.append(folder.load(pictures[place]))
                    places.append(place)
                    found.append(result)
                except BolidError as error:
                    folder.reject(pictures[place], error.message)
            if places:
                yield places, images, found
