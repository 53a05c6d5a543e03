"""`bolid train-adapter`: training shards, a body encoder and a frozen base in; adapter/{face,body}.safetensors out.

Both branches are trained together, leave-one-out (BoLID section 3): the photo to be denoised is never part of its own
condition. The body comes from some *other* photos of the person, fused by the frozen body encoder; the face is the
mean over the other photos. So a condition can only say what stays the same from photo to photo: who it is.

Everything random about a photo comes from its place in the run, not from the batch it is in: the same command gives
the same training after a kill, and the same up to rounding when a batch is shared by processes or taken in parts.

Shapes: B batch, N photos in the table, M photos of one person, D body dimension, (C, h, w) latents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path

from bolid.errors import BolidError
from bolid.models.families import Family, match_family
from bolid.run import Progress, derive_seed, pick_device, run_record, sha256_file
from bolid.train_adapter.config import TrainAdapterConfig, check_kv_rank
from bolid.train_adapter.data import TextStates, draw_batch, draw_rows, photo_generators, read_table
from bolid.train_adapter.optim import learning_rate, swapped
from bolid.train_adapter.reports import Log, sample_sheet


@dataclass(frozen=True)
class TrainAdapterResult:
    face: Path
    body: Path
    steps: int
    seconds: float
    people: int
    photos: int
    loss: float
    learning_rate: float  # of the last step


def train_adapter(
    train: str | Path = "train",
    out: str | Path = "adapter",
    *,
    config: TrainAdapterConfig | None = None,
    body_encoder: str | Path | None = None,
    family: str | None = None,
    device: str = "auto",
    seed: int = 0,
    stop_after: int | None = None,
    progress: Progress | None = None,
) -> TrainAdapterResult:
    """Train both branches, or one, on `train`'s shards and write both to `out`. The same call after a kill goes on.

    `stop_after`: write them as they are after so many of the steps (their records have that as "steps_done") and stop;
    a call without it goes on from there. Also in `out`: log.jsonl and loss.png (the losses), samples/ (sheets of
    pictures), and while it runs a checkpoint.
    Several processes that `accelerate launch` starts share the work; the main one writes.
    Raises BolidError when shards, body encoder and family do not belong together, and where `out` holds another
    training's adapter.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from bolid.backends.body import BodyEncoder
    from bolid.backends.diffusion import load_base, quiet_diffusers
    from bolid.formats.adapter import adapter_kind, load_adapter, nested_state_dict, save_adapter
    from bolid.formats.checkpoint import STEPS_DONE, check_result, load_checkpoint, save_checkpoint, whole
    from bolid.formats.shards import directory_sha256, read_index
    from bolid.method.body_condition import (
        BRANCHES,
        FACE_DIM,
        branch_parameters,
        factorise_kv,
        initial_state,
        install,
        merge_kv,
    )
    from bolid.train_adapter.fsdp import shard_branches
    from bolid.train_adapter.objective import Objective
    from bolid.train_adapter.pixel_losses import PixelLosses
    from bolid.train_adapter.precision import LossScaler, attention_kernel, choose_precision, computing, store_frozen

    config, out = config or TrainAdapterConfig(), Path(out)
    if stop_after is not None and stop_after < 1:
        raise BolidError(f"--stop-after is {stop_after}", "give at least 1")
    chosen = match_family(family, read_index(train)["record"]["family"], train)
    encoder = BodyEncoder(body_encoder or chosen.require("body_encoder"))
    match_family(chosen.name, encoder.record["family"], encoder.path)

    device = pick_device(device)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")  # autocast is ours: precision.py
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise BolidError(
            f"train-adapter does not run under accelerate's {accelerator.distributed_type.value}",
            "run accelerate launch with --multi_gpu, and train-adapter with --shard-branches",
        )
    to, processes, main = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    config = dataclasses.replace(config, precision=choose_precision(config.precision, str(to)))
    set_seed(derive_seed(seed, "train-adapter") % 2**32)
    encoder.to(str(to))
    pipe = load_base(chosen, str(to))
    pixels = None
    if config.pixels:
        pixels = PixelLosses(
            chosen, pipe.vae, id_loss=config.id_loss if config.id_weight else "",
            clip_target=config.clip_target if config.clip_weight else "", decoder=config.decoder, device=str(to),
            body_encoder=encoder, sliders=config.sliders, readers=config.readers,
            spare_heads=config.spare_heads, face=bool(config.face_weight), found=bool(config.found_weight),
        )  # fmt: skip
    inputs = {"train": directory_sha256(train), **encoder.inputs, "base": base_sha256(chosen)}
    if pixels is not None:
        inputs |= pixels.inputs
    if config.init:
        inputs |= {f"init_{branch}": sha256_file(Path(config.init) / f"{branch}.safetensors") for branch in BRANCHES}
    settings = {**dataclasses.asdict(config), "processes": processes}
    # The vectors of one face recogniser mean nothing to an adapter that was trained with another's.
    inputs_of = {"face": inputs | face_model_sha256(chosen), "body": inputs}
    records = {
        b: run_record(adapter_kind(b), family=chosen, config=settings, seed=seed, inputs=inputs_of[b]) for b in BRANCHES
    }
    for branch in BRANCHES:
        check_result(out / f"{branch}.safetensors", records[branch])
    table = read_table(train, encoder, progress if main else None)
    channels, expected = table.latents.shape[2], pipe.unet.config.in_channels
    if channels != expected:
        raise BolidError(
            f"the shards' latents have {channels} channels, the base takes {expected}",
            "run shard again with this family",
        )
    if round(config.close_ups * config.batch_size) and not len(table.close_ups):
        raise BolidError(
            f"--close-ups {config.close_ups}: no photo in {train} shows a face and little of a body",
            "collect portraits too, or leave it out",
        )
    check_kv_rank(pipe.unet, config, chosen)
    text_states = TextStates(pipe, table.captions, limit=config.text_cache * 2**30, precision=config.precision)
    objective = Objective(pipe, pipe.unet, table, text_states, chosen, config, to, pixels)
    if text_states.cached:
        for name in ("text_encoder", "text_encoder_2"):
            if hasattr(pipe, name):
                setattr(pipe, name, None)
    with quiet_diffusers():
        unet = pipe.unet.to(memory_format=torch.channels_last)

    if config.init:
        states = [nested_state_dict(load_adapter(Path(config.init) / f"{b}.safetensors", b)[0]) for b in BRANCHES]
        states = [{part: {k: v.float() for k, v in values.items()} for part, values in s.items()} for s in states]
        if config.kv_rank:
            learns = map(config.learns, BRANCHES)
            states = [factorise_kv(s, config.kv_rank) if learn else s for s, learn in zip(states, learns, strict=True)]
    else:
        start = functools.partial(initial_state, unet, kv_rank=config.kv_rank)
        states = [
            start("face", FACE_DIM, tokens=config.face_tokens, seed=derive_seed(seed, "face")),
            start("body", encoder.body_dim, seed=derive_seed(seed, "body")),
        ]
    with quiet_diffusers():
        branches = dict(zip(BRANCHES, install(unet, states), strict=True))
    for of_branch in branches.values():
        for parameter in of_branch.values():
            parameter.requires_grad_(True)
    store_frozen(unet, config.precision)  # the base alone: a branch that does not learn is saved as exactly as it came
    sharded = config.shard_branches and processes > 1
    if sharded:
        shard_branches(unet, to.type)
        branches = dict(zip(BRANCHES, branch_parameters(unet, len(BRANCHES)), strict=True))
    parameters = {f"{branch}.{name}": p for branch, ps in branches.items() for name, p in ps.items()}
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    for name, parameter in parameters.items():
        parameter.requires_grad_(config.learns(name.partition(".")[0]))
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
    )
    scaler = LossScaler(to.type, config.precision)
    checkpoint, record = out / ".checkpoint.safetensors", {**records["face"], "kind": "adapter"}
    tensors = {**parameters, **{f"average.{name}": value for name, value in average.items()}, "scaler": scaler.state}
    step = load_checkpoint(checkpoint, record, tensors, optimizer)
    last = config.steps if stop_after is None else min(stop_after, config.steps)
    if step > last:
        raise BolidError(f"--stop-after is {stop_after}, and {out} is at step {step}", "give more, or leave it out")
    scaler.restore()
    network = unet if sharded else accelerator.prepare(unet)
    objective.network = torch.compile(network) if config.compile else network

    started = saved = time.monotonic()
    recent = float("nan")
    log = Log(out, step, config.tensorboard) if main else None
    while step < last:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.zero_grad(set_to_none=True)
        terms: dict[str, torch.Tensor] = {}
        parts = config.gradient_accumulation_steps
        for part in range(parts):
            number = (step * parts + part) * processes + accelerator.process_index  # of this batch, in the whole run
            rows = draw_rows(table, config, number, seed)
            generators = photo_generators(seed, number * config.batch_size, config.batch_size)
            batch = draw_batch(table, rows, config, generators)
            with contextlib.ExitStack() as stack:
                if part < parts - 1:
                    stack.enter_context(accelerator.no_sync(network))
                values = objective(batch, with_pixels=config.pixels and step % config.pixel_every == 0)
                stack.enter_context(attention_kernel(to, config.precision, objective.positions))
                scaler.backward(values["loss"] / parts)
            for name, value in values.items():
                terms[name] = terms.get(name, 0) + value.detach() / parts
        scaler.step(optimizer, trained, config.max_grad_norm)
        step += 1
        decay = min(config.ema, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)

        # The main process says when a checkpoint is due; branches that are spread over all are put together by all.
        due = main and time.monotonic() - saved > 60 * config.checkpoint_minutes
        told = torch.stack([*terms.values(), torch.tensor(float(due), device=to)])
        *means, due = accelerator.reduce(told, "mean").tolist()
        if not math.isfinite(means[0]):
            raise BolidError(f"the training diverged at step {step}", "lower --learning-rate")
        recent = means[0] if math.isnan(recent) else 0.99 * recent + 0.01 * means[0]
        if log is not None:
            log.write(step, dict(zip(terms, means, strict=True)))
            if progress is not None:
                progress(step, config.steps, f"loss {recent:.4f}")
        if log is None and not sharded:
            continue
        if config.sample_every and (step % config.sample_every == 0 or step == last):
            sheet = out / "samples" / f"step-{step:06d}.png" if log is not None else None
            with computing(to, config.precision, objective.positions), swapped(parameters, average):
                sample_sheet(pipe, chosen, table, text_states, sheet, seed)
            if log is not None:
                log.draw()
        if due:
            if log is not None:
                log.flush()
            scaler.remember()
            save_checkpoint(checkpoint, step, record, tensors, optimizer, write=main)
            saved = time.monotonic()

    if step < config.steps:
        scaler.remember()
        save_checkpoint(checkpoint, step, record, tensors, optimizer, write=main)
        records = {b: {**r, "config": {**r["config"], STEPS_DONE: step}} for b, r in records.items()}
    paths = {branch: out / f"{branch}.safetensors" for branch in BRANCHES}
    average = {name: whole(tensor) for name, tensor in average.items()}
    if log is not None:
        log.close()
        for branch in BRANCHES:
            flat = merge_kv({name: average[f"{branch}.{name}"] for name in branches[branch]})
            save_adapter(paths[branch], {name: tensor.half() for name, tensor in flat.items()}, records[branch])
        if step == config.steps:
            checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return TrainAdapterResult(
        paths["face"], paths["body"], step, time.monotonic() - started, len(table.people),
        len(table.captions), recent, learning_rate(step - 1, config),
    )  # fmt: skip


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
    from bolid.backends.face import FaceModel

    return {"face_model": FaceModel(family.face).sha256}
