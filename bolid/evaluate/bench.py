"""`bolid bench`: does a personalised picture keep its person? `evaluate --compare`, beside what real photos reach.

Any method on any base takes part: the benchmark reads pictures, and a table says who they should show. The protocol
(protocol.py) is made from seeds, so that figures can be compared without exchanging photos or weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from bolid.errors import BolidError
from bolid.evaluate.command import PathLike, Scoring, ScoringOptions
from bolid.evaluate.pictures import PictureFolder, read_methods
from bolid.evaluate.protocol import CONDITIONING, REFERENCE, REQUESTS
from bolid.evaluate.results import Comparison

if TYPE_CHECKING:
    from bolid.evaluate.evaluators import BodyReader


def bench(
    pictures: Sequence[PathLike],
    benchmark: PathLike | None = None,
    *,
    reference: PathLike | None = None,
    recognisers: Sequence[PathLike] = (),
    body_reader: tuple[str, BodyReader] | None = None,
    **options: Unpack[ScoringOptions],
) -> Comparison | None:
    """Score methods as `evaluate` does, and half of the held-out photos as if a method had made them.

    Args:
        pictures: folders of pictures, one a method, or manifests (`pictures.read_methods`). The first is compared with.
        benchmark: what `make_benchmark` wrote: photos and requests. Pictures are named as there, or carry their prompt.
        reference: photos of the people, `<person>/*.jpg`, instead of the benchmark's.
        recognisers: InsightFace packs, whose similarities are averaged. Take some that had no part in the methods.
        body_reader: (name, reader) of body ratios instead of the family's probe. Its figures of the reference photos
            are kept between runs under its name: give another version another name.
        options: see `ScoringOptions`. `conditioning`: the photos that the methods were given, instead of the
            benchmark's.

    Returns:
        The metrics of each method, the differences from the first, and what real photos of the person and of others
        reach; None in a rank other than the first.

    Raises:
        BolidError: no picture can be read, or no reference photo remains.
    """
    prompts = None
    if benchmark is not None:
        place = Path(benchmark)
        if not (place / REQUESTS).is_file():
            raise BolidError(f"{place} is no benchmark: it has no {REQUESTS}", f"make one: bolid bench make {place}")
        prompts, reference = place / REQUESTS, reference or place / REFERENCE
        options["conditioning"] = options.get("conditioning") or place / CONDITIONING
    if reference is None:
        raise BolidError("no photos of the people are given", "give --benchmark, or --reference")
    scoring = Scoring(reference, recognisers=recognisers, body_reader=body_reader, bounded=True, **options)
    scores = scoring.score(lambda: _methods(pictures, prompts))
    return None if scores is None else scores.comparison()


def _methods(pictures: Sequence[PathLike], prompts: Path | None) -> dict[str, PictureFolder]:
    """Name -> pictures of every method. Raises BolidError for none, and for one that is given twice."""
    methods: dict[str, PictureFolder] = {}
    for place in map(Path, pictures):
        for name, folder in read_methods(place, prompts).items():
            if name in methods:
                name = os.fspath(place)
            if name in methods:
                raise BolidError(f"the method {name} is given twice", "give different folders, or other names")
            methods[name] = folder
    if not methods:
        raise BolidError("no pictures are given", "give folders of pictures, one a method, or manifests")
    return methods
