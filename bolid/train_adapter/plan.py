"""What a training would do and need, counted without loading a weight (`bolid train-adapter --dry-run`)."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from bolid.errors import BolidError
from bolid.models.families import Family, match_family
from bolid.run import pick_device
from bolid.train_adapter.config import TrainAdapterConfig, check_kv_rank
from bolid.train_adapter.data import caption_texts, nobody_has_two


@dataclass(frozen=True)
class TrainAdapterPlan:
    """What a training would do and need. Memory in bytes."""

    people: int  # with two photos or more
    photos: int  # of theirs: an epoch
    steps: int
    photos_per_step: int
    steps_per_epoch: float
    epochs: float
    parameters: int  # trained, of the branches that learn
    precision: str
    device: str
    memory: dict[str, int]  # what -> bytes on the device; "total" last
    main_memory: dict[str, int]  # what -> bytes beside a device of its own memory
    memory_available: int | None  # on the device, None where it cannot be asked


def plan_training(
    train: str | Path = "train",
    *,
    config: TrainAdapterConfig | None = None,
    body_encoder: str | Path | None = None,
    family: str | None = None,
    device: str = "auto",
) -> TrainAdapterPlan:
    """What `train_adapter` would do with the same arguments, without loading a weight or training anything.

    The activations are counted on a network without data (`step_cost`); they, and so the total, are an estimate, and
    without the networks of L_id and L_CLIP. Raises BolidError like the training.
    """
    import os

    from bolid.backends.body import KIND
    from bolid.formats.shards import read_index
    from bolid.formats.tensors import load_tensors
    from bolid.train_adapter.precision import choose_precision

    config, device = config or TrainAdapterConfig(), pick_device(device)
    config = dataclasses.replace(config, precision=choose_precision(config.precision, device))
    chosen = match_family(family, read_index(train)["record"]["family"], train)
    encoder_path = body_encoder or chosen.require("body_encoder")
    record = load_tensors(encoder_path, KIND)[1]
    match_family(chosen.name, record["family"], encoder_path)
    photos = _count_photos(train)
    parameters, memory, main_memory = _count_memory(config, chosen, photos, record["config"]["body_dim"], device)
    per_step = config.batch_size * config.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
    return TrainAdapterPlan(
        photos.people, photos.photos, config.steps, per_step, photos.photos / per_step,
        config.steps * per_step / photos.photos, parameters, config.precision, device, memory, main_memory,
        _free_memory(device),
    )  # fmt: skip


@dataclass(frozen=True)
class _Photos:
    people: int  # with two photos or more
    photos: int  # of theirs
    captions: set[str]
    latents: tuple[int, ...]  # shape of a photo's latents, mean and deviation


def _count_photos(train: str | Path) -> _Photos:
    """Raises BolidError for shards without latents, and when nobody has two photos."""
    from bolid.formats.shards import group_by_person, read_shards

    people = photos = 0
    captions: set[str] = set()
    shape: tuple[int, ...] = ()
    for _person, group in group_by_person(read_shards(train)):
        if len(group) > 1:
            people, photos = people + 1, photos + len(group)
            captions.update(sample.caption for sample in group)
            if "latents" not in group[0].tensors:
                raise BolidError(f"{train} holds no latents", "give the directory that `bolid shard` writes")
            shape = group[0].tensors["latents"].shape
    if not people:
        raise nobody_has_two(train)
    return _Photos(people, photos, captions, shape)


def _count_memory(
    config: TrainAdapterConfig, family: Family, photos: _Photos, body_dim: int, device: str
) -> tuple[int, dict[str, int], dict[str, int]]:
    """(parameters that are trained, bytes on the device, bytes of main memory beside it)."""
    from diffusers import UNet2DConditionModel

    from bolid.backends.diffusion import DTYPES
    from bolid.train_adapter.step_cost import adapted_network, step_cost, text_state_width

    base, size = family.require("base"), lambda parameters: sum(p.numel() * p.element_size() for p in parameters)
    settings, length = UNet2DConditionModel.load_config(str(base), subfolder="unet"), _text_length(base)
    unet, branches = adapted_network(
        settings, body_dim, face_tokens=config.face_tokens, kv_rank=config.kv_rank, precision=config.precision,
        gradient_checkpointing=config.gradient_checkpointing, learns=config.learns,
    )  # fmt: skip
    check_kv_rank(unet, config, family)
    cost = step_cost(unet, photos.latents[1:], length, config.batch_size, config.precision, device)
    states = len(caption_texts(photos.captions)) * text_state_width(unet.config, length)
    states *= DTYPES[config.precision].itemsize
    cached = states <= config.text_cache * 2**30
    memory = {
        "base network": size(unet.parameters()) - size(branches),
        "VAE": _stored_parameters(base, "vae") * 4,
        "text encoders": 0 if cached else _stored_parameters(base, "text_encoder", "text_encoder_2") * 4,
        "adapters: weights, two moments, average": 4 * size(branches),
        "activations and gradients of a batch": cost.peak,
    }
    main_memory = {
        "latents": photos.photos * math.prod(photos.latents) * 2, "text states": states if cached else 0
    }  # fmt: skip
    if device == "cpu":
        memory, main_memory = memory | main_memory, {}
    memory["total"] = sum(memory.values())
    return sum(parameter.numel() for parameter in branches), memory, main_memory


def _free_memory(device: str) -> int | None:
    """Bytes on the device, None where it cannot be asked."""
    import os

    import torch

    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    if device == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _text_length(base: Path) -> int:
    """The text encoder's largest number of tokens."""
    file = base / "tokenizer" / "tokenizer_config.json"
    return int(json.loads(file.read_text(encoding="utf-8")).get("model_max_length", 77)) if file.is_file() else 77


def _stored_parameters(base: Path, *parts: str) -> int:
    """Parameters of some parts of a pipeline directory, from the files' headers."""
    from bolid.formats.tensors import read_header

    return sum(
        math.prod(entry["shape"])
        for part in parts
        for file in sorted((base / part).glob("*.safetensors"))[:1]
        for name, entry in read_header(file).items()
        if name != "__metadata__"
    )
