"""The base with words for the person's build, from the true body ratios: the strong cheap baseline.

    a full body photo of a tall slim woman with long legs and a very small head standing, in ...

The words are those of the base's training captions (examples/tiny_family/captions.py) and the base reads them as it was
trained to. They come from the truth, which no photo and no user gives this exactly: the baseline is the most that words
can do, not what a user would reach.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bolid.errors import BolidError
from bolid.synth.body import body_ratios
from bolid.synth.people import RATIO_NAMES, SyntheticPerson, build_words, sample_person

sys.path.append(str(Path(__file__).parents[1] / "tiny_family"))
from captions import SHAPE_WORDS

POPULATION = range(300)  # seeds of training people; their mean is what "long" and "short" are relative to
REMARKABLE, VERY = 0.4, 1.2  # standard deviations, as in the training captions
MOST = 3  # ratios in words; no training caption has more
WHO = re.compile(r"\b(woman|man)\b")


@functools.cache
def population() -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of RATIO_NAMES over POPULATION, [10] each."""
    ratios = [body_ratios(sample_person(seed)) for seed in POPULATION]
    table = np.array([[one[name] for name in RATIO_NAMES] for one in ratios])
    return table.mean(0), table.std(0)


def deviations(person: SyntheticPerson) -> dict[str, float]:
    """Each body ratio's difference from the population's mean, in standard deviations."""
    mean, spread = population()
    ratios = body_ratios(person)
    return {name: (ratios[name] - mean[i]) / spread[i] for i, name in enumerate(RATIO_NAMES)}


def shape_clause(deviation: dict[str, float], most: int = MOST) -> str:
    """The most remarkable ratios in words: "very long legs, wide hips and a small head". "" for an average body."""
    ranked = sorted(SHAPE_WORDS, key=lambda name: -abs(deviation[name]))
    words = []
    for name in ranked[:most]:
        if abs(deviation[name]) <= REMARKABLE:
            continue
        word = SHAPE_WORDS[name][int(deviation[name] > 0)]
        if abs(deviation[name]) > VERY:
            word = f"a very {word[2:]}" if word.startswith("a ") else f"very {word}"
        words.append(word)
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def with_build(
    prompts: Sequence[str],
    person: SyntheticPerson,
    fits: Callable[[str], bool] = lambda prompt: True,
    deviation: dict[str, float] | None = None,
) -> list[str]:
    """The prompts with the person's build in words.

    `fits` says whether a prompt is short enough for the text encoder; the least remarkable ratios are left out until it
    is. Raises BolidError for a prompt without "woman" or "man".
    """
    words = build_words(person)
    who = " ".join(word for word in (words["height_word"], words["weight_word"], words["gender_word"]) if word)
    deviation = deviations(person) if deviation is None else deviation
    changed = []
    for prompt in prompts:
        if not WHO.search(prompt):
            raise BolidError(f"the prompt names nobody: {prompt}", "write {who} where the person is")
        for most in range(MOST, -1, -1):
            clause = shape_clause(deviation, most)
            longer = WHO.sub(f"{who} with {clause}" if clause else who, prompt, count=1)
            if fits(longer):
                break
        changed.append(longer)
    return changed
