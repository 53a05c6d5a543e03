"""What a training of the adapters starts from: frozen models, run records, the photos, and the two branches.

Shapes: N photos in the table, D body dimension.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.formats.adapter import BRANCHES
from bolid.models.families import Family, match_family
from bolid.run import Progress, derive_seed, run_record, sha256_file
from bolid.train_adapter.config import TrainAdapterConfig, check_kv_rank
from bolid.train_adapter.data import AdapterTable, TextStates, read_table
from bolid.train_adapter.decoder import LatentDecoder
from bolid.train_adapter.denoiser import Denoiser
from bolid.train_adapter.objective import Objective
from bolid.train_adapter.pixel_losses import PixelLoss, pixel_losses
from bolid.train_adapter.rollouts import make_rollout

if TYPE_CHECKING:
    import torch

    from bolid.backends.body import BodyEncoder

BranchParameters = dict[str, dict[str, "torch.nn.Parameter"]]
"""branch -> name in the IP-Adapter layout -> parameter."""


@dataclass(frozen=True)
class FrozenModels:
    """What is not trained."""

    family: Family
    body_encoder: BodyEncoder
    pipe: Any  # the base
    pixel_losses: dict[str, PixelLoss]
    decode: LatentDecoder | None  # for the pixel losses

    @property
    def inputs(self) -> dict[str, str]:
        """name -> sha256 of the models that the trained weights depend on, for the record."""
        found = {**self.body_encoder.inputs, "base": base_sha256(self.family)}
        for loss in self.pixel_losses.values():
            found |= loss.inputs
        return found | (self.decode.inputs if self.decode is not None else {})


def load_models(
    train: str | Path, config: TrainAdapterConfig, body_encoder: str | Path | None, family: str | None, device: str
) -> FrozenModels:
    """Everything that is not trained.

    Raises BolidError when shards, body encoder and family do not belong together, when a model is missing, and for a
    --kv-rank that saves nothing.
    """
    from bolid.backends.body import BodyEncoder
    from bolid.backends.diffusion import load_base
    from bolid.formats.shards import read_index

    chosen = match_family(family, read_index(train)["record"]["family"], train)
    encoder = BodyEncoder(body_encoder or chosen.require("body_encoder"))
    if not encoder.needs_masks:  # which are the same in every family
        match_family(chosen.name, encoder.record["family"], encoder.path)
    encoder.to(device)
    pipe = load_base(chosen, device)
    check_kv_rank(pipe.unet, config, chosen)
    losses = pixel_losses(config, chosen, encoder, device)
    decode = LatentDecoder(chosen, pipe.vae, config.decoder, device) if losses else None
    return FrozenModels(chosen, encoder, pipe, losses, decode)


def make_records(
    train: str | Path, models: FrozenModels, config: TrainAdapterConfig, processes: int, seed: int
) -> dict[str, dict[str, Any]]:
    """The run record of each branch's file."""
    from bolid.formats.adapter import adapter_kind
    from bolid.formats.shards import directory_sha256

    inputs = {"train": directory_sha256(train), **models.inputs}
    if config.init:
        inputs |= {f"init_{branch}": sha256_file(Path(config.init) / f"{branch}.safetensors") for branch in BRANCHES}
    settings = {**dataclasses.asdict(config), "processes": processes}
    # The vectors of one face recogniser mean nothing to an adapter that was trained with another's.
    inputs_of = {"face": inputs | face_model_sha256(models.family), "body": inputs}
    return {
        branch: run_record(
            adapter_kind(branch), family=models.family, config=settings, seed=seed, inputs=inputs_of[branch]
        )
        for branch in BRANCHES
    }


def read_photos(
    train: str | Path, models: FrozenModels, config: TrainAdapterConfig, progress: Progress | None, cache: Path
) -> AdapterTable:
    """The photos; `cache` keeps what the body encoder says of them.

    Raises BolidError for shards whose latents the base cannot take, and without the close-ups that are wanted.
    """
    table = read_table(train, models.body_encoder, progress, cache)
    channels, expected = table.latents.shape[2], models.pipe.unet.config.in_channels
    if channels != expected:
        raise BolidError(
            f"the shards' latents have {channels} channels, the base takes {expected}",
            "run shard again with this family",
        )
    if round(config.close_up_fraction * config.batch_size) and not len(table.close_ups):
        raise BolidError(
            f"--close-up-fraction {config.close_up_fraction}: no photo in {train} shows a face and little of a body",
            "collect portraits too, or leave it out",
        )
    return table


def make_objective(
    models: FrozenModels, table: AdapterTable, config: TrainAdapterConfig, device: torch.device,
    text_states: TextStates | None = None,
) -> Objective:  # fmt: skip
    """Eq. 14 for these models and photos."""
    pipe = models.pipe
    if text_states is None:
        text_states = TextStates(pipe, table.captions, limit=config.text_cache * 2**30, precision=config.precision)
    denoiser = Denoiser(pipe, table, text_states, models.family, config, device)
    if not models.pixel_losses:
        return Objective(denoiser, table, config)
    rollout = make_rollout(pipe, denoiser, table, models.family, config)
    return Objective(denoiser, table, config, models.pixel_losses, rollout, models.decode)


def drop_text_encoders(pipe: Any, text_states: TextStates) -> None:
    """Free the text encoders' memory once every caption's states are known."""
    if text_states.cached:
        for name in ("text_encoder", "text_encoder_2"):
            if hasattr(pipe, name):
                setattr(pipe, name, None)


# ---- the branches -------------------------------------------------------------------------------------------------


def install_branches(models: FrozenModels, config: TrainAdapterConfig, seed: int) -> BranchParameters:
    """Put both branches into the UNet, new or from `config.init`, ready to train; the UNet is frozen around them."""
    import torch

    from bolid.backends.diffusion import quiet_diffusers
    from bolid.method.body_condition import install
    from bolid.train_adapter.precision import store_frozen

    with quiet_diffusers():
        unet = models.pipe.unet.to(memory_format=torch.channels_last)
    states = _stored_states(config) if config.init else _new_states(unet, models.body_encoder.body_dim, config, seed)
    with quiet_diffusers():
        branches = dict(zip(BRANCHES, install(unet, states), strict=True))
    for branch in branches.values():
        for parameter in branch.values():
            parameter.requires_grad_(True)
    store_frozen(unet, config.precision)  # the base alone: a branch that does not learn is saved as exactly as it came
    return branches


def _stored_states(config: TrainAdapterConfig) -> list[Any]:
    from bolid.formats.adapter import load_adapter, nested_state_dict
    from bolid.method.body_condition import factorise_kv

    states = []
    for branch in BRANCHES:
        tensors, _record = load_adapter(Path(config.init) / f"{branch}.safetensors", branch)
        state = nested_state_dict({name: value.float() for name, value in tensors.items()})
        states.append(factorise_kv(state, config.kv_rank) if config.kv_rank and config.learns(branch) else state)
    return states


def _new_states(unet: Any, body_dim: int, config: TrainAdapterConfig, seed: int) -> list[Any]:
    from bolid.method.body_condition import FACE_DIM, initial_state

    start = functools.partial(initial_state, unet, kv_rank=config.kv_rank)
    return [
        start("face", FACE_DIM, tokens=config.face_tokens, seed=derive_seed(seed, "face")),
        start("body", body_dim, seed=derive_seed(seed, "body")),
    ]


# ---- hashes for the records ---------------------------------------------------------------------------------------


def base_sha256(family: Family) -> str:
    """The hash of the base's UNet weights, for the record."""
    base = family.require("base")
    files = [family.unet] if family.has("unet") else [base] if base.is_file() else []
    files = files or sorted((base / "unet").glob("*.safetensors"))
    return sha256_file(files[0]) if files else ""


def face_model_sha256(family: Family) -> dict[str, str]:
    """{"face_model": hash of the family's face recogniser}, or nothing for a family without one."""
    if "face" in family.missing():
        return {}
    from bolid.backends.people import face_detector

    return {"face_model": face_detector(family.face).sha256}
