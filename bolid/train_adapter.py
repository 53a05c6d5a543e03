"""`bolid train-adapter`: training shards, a body encoder and a frozen base in; adapter/{face,body}.safetensors out.

Both branches are trained together, leave-one-out (BoLID section 3): the photo to be denoised is never part of its own
condition. The body comes from some *other* photos of the person, fused by the frozen body encoder; the face is the
mean over the other photos. So a condition can only say what stays the same from photo to photo: who it is.

Shapes: B batch, N photos in the table, M photos of one person, D body dimension, (C, h, w) latents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.families import Family, match_family
from bolid.run import derive_seed, pick_device, run_record, sha256_file

if TYPE_CHECKING:
    import numpy as np
    import torch

Progress = Callable[[int, int, str], None]
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# Words that name the build. Left out of most captions in training, so that the body is asked of the profile.
BUILD_WORDS = (
    "tall", "short", "small", "petite", "slim", "slender", "thin", "skinny", "lean", "average", "medium", "heavy",
    "heavyset", "stocky", "chubby", "plump", "curvy", "fat", "large", "big", "muscular", "athletic", "broad",
)  # fmt: skip


@dataclass(frozen=True)
class TrainAdapterConfig:
    """Settings of the face and the body branch and their training."""

    steps: int = field(default=4000, metadata={"help": "training steps"})
    batch_size: int = field(default=48, metadata={"help": "photos in a step, for each process"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay of AdamW"})
    face_tokens: int = field(default=4, metadata={"help": "tokens of the face branch (the body has 4)"})
    # None by default: min-SNR all but mutes the noisiest steps, and those settle a body's outline.
    min_snr_gamma: float = field(default=0.0, metadata={"help": "gamma of the min-SNR weighting, say 5; 0: none"})
    text_dropout: float = field(default=0.1, metadata={"help": "part of the photos trained without their caption"})
    face_dropout: float = field(default=0.3, metadata={"help": "part trained without the face"})
    body_dropout: float = field(default=0.1, metadata={"help": "part trained without the body"})
    all_dropout: float = field(default=0.05, metadata={"help": "part trained without any condition"})
    build_word_dropout: float = field(
        default=0.8, metadata={"help": "part whose caption loses words like tall or slim"}
    )
    max_context: int = field(default=8, metadata={"help": "most other photos that a body is made of"})
    body_sampling: float = field(
        default=0.5, metadata={"help": "part that draws the body from its Gaussian, not its mean"}
    )
    ema: float = field(default=0.999, metadata={"help": "decay of the moving average that is saved; 0: none"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    precision: str = field(
        default="auto",
        metadata={"help": "what the network computes in: fp32, bf16, fp16, or auto: bf16 where the hardware has it"},
    )
    compile: bool = field(default=False, metadata={"help": "compile the network first: a slow start, faster steps"})
    checkpoint_minutes: float = field(default=3.0, metadata={"help": "minutes between checkpoints"})
    sample_every: int = field(default=1000, metadata={"help": "steps between sample sheets; 0: none"})
    init: str = field(default="", metadata={"help": "start from the adapters in this directory"})

    def __post_init__(self) -> None:
        for name in ("text", "face", "body", "all", "build_word"):
            value = getattr(self, f"{name}_dropout")
            if not 0 <= value <= 1:
                raise BolidError(f"--{name.replace('_', '-')}-dropout is {value}", "it is a part: give 0 to 1")
        for name in ("steps", "batch_size", "face_tokens", "max_context"):
            if getattr(self, name) < 1:
                raise BolidError(f"--{name.replace('_', '-')} is {getattr(self, name)}", "give at least 1")
        if self.precision not in PRECISIONS:
            raise BolidError(f"--precision is {self.precision!r}", f"choose one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class AdapterTable:
    """All that training needs of every photo, in memory."""

    latents: torch.Tensor  # f16 [N, 2, C, h, w], the posterior's mean and std
    captions: list[str]  # N
    body_mean: torch.Tensor  # f32 [N, D], of this one photo
    body_logvar: torch.Tensor  # f32 [N, D]
    confidence: torch.Tensor  # f32 [N]
    face: torch.Tensor  # f32 [N, 512], zeros where none is seen
    people: list[np.ndarray]  # rows of each person, two or more
    names: list[str]  # of the people

    @functools.cached_property
    def owner(self) -> np.ndarray:
        """The person of each row, [N]."""
        import numpy as np

        owner = np.empty(len(self.captions), np.int64)
        for person, rows in enumerate(self.people):
            owner[rows] = person
        return owner


@dataclass(frozen=True)
class TrainAdapterResult:
    face: Path
    body: Path
    steps: int
    seconds: float
    people: int
    photos: int
    loss: float


# ---- data ---------------------------------------------------------------------------------------------------------


def read_table(train: str | Path, body_encoder: Any, progress: Progress | None = None) -> AdapterTable:
    """Training shards -> latents, captions, each photo's body Gaussian (encoded here, once) and face."""
    import numpy as np
    import torch

    from bolid.formats.shards import decode_image, group_by_person, read_index, read_shards

    total = read_index(train)["samples"]
    latents, faces, people = [], [], []
    captions: list[str] = []
    names: list[str] = []
    bodies: list[tuple[torch.Tensor, ...]] = []
    for name, group in group_by_person(read_shards(train)):
        if len(group) < 2:
            continue  # nothing to leave one out of
        for sample in group:
            if "latents" not in sample.tensors:
                raise BolidError(f"{train} holds no latents", "give the directory that `bolid shard` writes")
        people.append(np.arange(len(captions), len(captions) + len(group)))
        names.append(name)
        latents += [torch.from_numpy(sample.tensors["latents"]) for sample in group]
        captions += [sample.caption for sample in group]
        faces += [sample.tensors.get("face", np.zeros(512, np.float32)) for sample in group]
        features = [sample.tensors.get("view_features") for sample in group] if body_encoder.needs_features else None
        images = [decode_image(sample.image) for sample in group]
        bodies.append(body_encoder.encode(images, [sample.tensors["keypoints"] for sample in group], features))
        if progress is not None:
            progress(len(captions), total, "encoding bodies")
    if not people:
        raise BolidError(
            f"nobody in {train} has two photos",
            "the adapters learn a person's photo from their other photos: collect at least two each",
        )
    mean, logvar, confidence = (torch.cat(parts) for parts in zip(*bodies, strict=True))
    return AdapterTable(
        torch.stack(latents), captions, mean, logvar, confidence, torch.from_numpy(np.stack(faces)), people, names
    )


def without_build(caption: str) -> str:
    """The caption without the words that name the build."""
    # Not "short-sleeved" and not "short hair".
    return re.sub(rf"\b(?:{'|'.join(BUILD_WORDS)})\b(?![- ](?:sleeve|hair))\s*", "", caption)


class TextStates:
    """Text states of the captions [N, L, E]; cached where they fit: the texts repeat every epoch."""

    def __init__(self, pipe: Any, captions: list[str], limit: int = 2 * 2**30) -> None:
        import torch

        from bolid.backends.base import encode_prompts

        self._encode = lambda texts: encode_prompts(pipe, texts)
        texts = sorted({"", *captions, *map(without_build, captions)})
        first, pooled = self._encode([""])
        self._cached: torch.Tensor | None = None
        # SDXL's states are 308 KB a caption: larger than the photo's latents, and cheap next to its step.
        if pooled is None and first.numel() * 4 * len(texts) <= limit:
            self._row = {text: row for row, text in enumerate(texts)}
            self._cached = torch.cat([self._encode(texts[i : i + 64])[0] for i in range(0, len(texts), 64)])

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(text states, pooled states or None)."""
        if self._cached is None:
            return self._encode(texts)
        return self._cached[[self._row[text] for text in texts]], None


# ---- one batch ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    rows: np.ndarray  # [B] the photos to be denoised
    context: torch.Tensor  # [B, M] rows of the table that the body is made of
    present: torch.Tensor  # bool [B, M] which of them count
    captions: list[str]  # [B], "" where the text is dropped
    body_embeds: torch.Tensor  # [B, 1, D], null where dropped
    face_embeds: torch.Tensor  # [B, 1, 512]


def draw_batch(table: AdapterTable, rows: np.ndarray, config: TrainAdapterConfig, generator: torch.Generator) -> Batch:
    """Conditions for the photos `rows`, each from other photos of its person only (leave-one-out)."""
    import torch
    import torch.nn.functional as F

    from bolid.method.body_condition import drop_condition
    from bolid.method.body_vae import fuse

    n, most = len(rows), min(config.max_context, max(map(len, table.people)) - 1)
    context = torch.zeros(n, most, dtype=torch.long)
    present = torch.zeros(n, most, dtype=torch.bool)
    for i, row in enumerate(rows):
        mates = table.people[table.owner[row]]
        others = mates[mates != row]
        count = int(torch.randint(1, min(most, len(others)) + 1, (1,), generator=generator))
        chosen = others[torch.randperm(len(others), generator=generator)[:count].numpy()]
        context[i, :count] = torch.from_numpy(chosen)
        present[i, :count] = True

    mean, logvar = fuse(table.body_mean[context], table.body_logvar[context], table.confidence[context] * present)
    noise = torch.randn(mean.shape, generator=generator)
    sampled = torch.rand(n, 1, generator=generator) < config.body_sampling
    body = torch.where(sampled, mean + (0.5 * logvar).exp() * noise, mean)
    # The mean of unit vectors, unit length again; stays zero, the null condition, where no photo shows the face.
    face = F.normalize((table.face[context] * present[..., None]).sum(1), dim=-1)

    dropped = torch.rand(4, n, generator=generator)
    drop_all = dropped[0] < config.all_dropout
    drop_text = drop_all | (dropped[1] < config.text_dropout)
    drop_face = drop_all | (dropped[2] < config.face_dropout)
    drop_body = drop_all | (dropped[3] < config.body_dropout)
    lose_build = (torch.rand(n, generator=generator) < config.build_word_dropout) & ~drop_body
    captions = []
    for row, no_text, no_build in zip(rows, drop_text.tolist(), lose_build.tolist(), strict=True):
        caption = table.captions[row]
        captions.append("" if no_text else without_build(caption) if no_build else caption)
    return Batch(
        rows, context, present, captions,
        drop_condition(body[:, None], drop_body), drop_condition(face[:, None], drop_face),
    )  # fmt: skip


def batch_rows(total: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Rows of step `step`: consecutive pieces of one seeded permutation an epoch, [batch]."""
    import numpy as np

    position = np.arange(step * batch, (step + 1) * batch)
    rows = np.empty(batch, np.int64)
    for epoch in np.unique(position // total):
        order = np.random.default_rng(derive_seed(seed, "train-adapter", "epoch", int(epoch))).permutation(total)
        here = position // total == epoch
        rows[here] = order[position[here] % total]
    return rows


# ---- what it is computed in ---------------------------------------------------------------------------------------


def choose_precision(name: str, device: str) -> str:
    """fp32, bf16 or fp16 for `device`; "auto" is bf16 where the hardware multiplies it, else fp32.

    Raises BolidError for fp16 elsewhere than on CUDA: its gradients need a range that only loss scaling there gives.
    """
    import torch

    kind = torch.device(device).type
    if name == "fp16" and kind != "cuda":
        raise BolidError(f"--precision fp16 does not train on {kind}", "give --precision bf16 or fp32")
    if name != "auto":
        return name
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if fast else "fp32"


@contextlib.contextmanager
def computing(device: torch.device, precision: str, positions: int) -> Iterator[None]:
    """The network's forward pass runs inside this. `positions`: of the latents, h * w.

    In bf16 on the CPU torch's flash attention has a slow backward pass (measured: 29 % of a small network's step);
    where the attention maps are small enough to be kept, plain matrix products are faster. In fp32 they are not.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, dtype, enabled=precision != "fp32"))
        if device.type == "cpu" and precision == "bf16" and positions <= 1024:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def store_frozen(network: torch.nn.Module, precision: str) -> None:
    """Keep frozen layers in the precision that autocast would convert them to at every step: the same numbers.

    Norms, which autocast leaves alone, and everything that is trained stay float32.
    """
    import torch

    if precision == "fp32":
        return
    for module in network.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.to(torch.bfloat16 if precision == "bf16" else torch.float16)


# ---- training -----------------------------------------------------------------------------------------------------


def train_adapter(
    train: str | Path = "train",
    out: str | Path = "adapter",
    *,
    config: TrainAdapterConfig | None = None,
    body_encoder: str | Path | None = None,
    family: str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainAdapterResult:
    """Train both branches on `train`'s shards and write them to `out`. The same call after a kill goes on.

    Also in `out`: log.jsonl (the loss), samples/ (sheets of pictures), and while it runs a checkpoint.
    Raises BolidError when shards, body encoder and family do not belong together.
    """
    import numpy as np
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from bolid.backends.base import load_base, quiet_diffusers
    from bolid.backends.body import BodyEncoder
    from bolid.formats.adapter import adapter_kind, load_adapter, nested_state_dict, save_adapter
    from bolid.formats.checkpoint import load_checkpoint, save_checkpoint
    from bolid.formats.shards import directory_sha256, read_index
    from bolid.method import losses
    from bolid.method.body_condition import BRANCHES, FACE_DIM, initial_state, install

    config, out = config or TrainAdapterConfig(), Path(out)
    chosen = match_family(family, read_index(train)["record"]["family"], train)
    encoder = BodyEncoder(body_encoder or chosen.require("body_encoder"))
    match_family(chosen.name, encoder.record["family"], encoder.path)

    device = pick_device(device)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")  # autocast is ours: see `computing`
    config = dataclasses.replace(config, precision=choose_precision(config.precision, str(accelerator.device)))
    set_seed(derive_seed(seed, "train-adapter") % 2**32)
    pipe = load_base(chosen, str(accelerator.device))
    with quiet_diffusers():
        unet = pipe.unet.to(memory_format=torch.channels_last)
    table = read_table(train, encoder, progress)
    text_states = TextStates(pipe, table.captions)
    if table.latents.shape[2] != unet.config.in_channels:
        raise BolidError(
            f"the shards' latents have {table.latents.shape[2]} channels, the base takes {unet.config.in_channels}",
            "run shard again with this family",
        )

    inputs = {"train": directory_sha256(train), "body_encoder": encoder.sha256, "base": base_sha256(chosen)}
    if config.init:
        inputs.update(
            {f"init_{branch}": sha256_file(Path(config.init) / f"{branch}.safetensors") for branch in BRANCHES}
        )
    records = {b: run_record(adapter_kind(b), family=chosen, config=config, seed=seed, inputs=inputs) for b in BRANCHES}
    if config.init:
        states = [nested_state_dict(load_adapter(Path(config.init) / f"{b}.safetensors", b)[0]) for b in BRANCHES]
        states = [{part: {k: v.float() for k, v in values.items()} for part, values in s.items()} for s in states]
    else:
        states = [
            initial_state(unet, "face", FACE_DIM, tokens=config.face_tokens, seed=derive_seed(seed, "face")),
            initial_state(unet, "body", encoder.body_dim, seed=derive_seed(seed, "body")),
        ]
    branches = dict(zip(BRANCHES, install(unet, states), strict=True))
    parameters = {f"{branch}.{name}": p for branch, ps in branches.items() for name, p in ps.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    store_frozen(unet, config.precision)
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
    )
    checkpoint = out / ".checkpoint.safetensors"
    tensors = {**parameters, **{f"average.{name}": value for name, value in average.items()}}
    scaler = _Scaler(accelerator.device.type, config.precision)
    tensors["scaler"] = scaler.state
    step = load_checkpoint(checkpoint, {**records["body"], "kind": "adapter"}, tensors, optimizer)
    scaler.restore()
    network = accelerator.prepare(unet)
    if config.compile:
        network = torch.compile(network)
    positions = math.prod(table.latents.shape[-2:])

    noise_schedule = training_schedule(pipe)
    prediction_type = noise_schedule.config.prediction_type
    timesteps_total = noise_schedule.config.num_train_timesteps
    rank, processes = accelerator.process_index, accelerator.num_processes
    usable = np.concatenate(table.people)
    started = saved = time.monotonic()
    recent = float("nan")
    log = _Log(out, step, accelerator.is_main_process)
    while step < config.steps:
        # Everything random in a step comes from here, so that a resumed run repeats it to the bit.
        generator = torch.Generator().manual_seed(derive_seed(seed, "train-adapter", step, rank))
        rows = usable[batch_rows(len(usable), config.batch_size * processes, step, seed)]
        batch = draw_batch(table, rows[rank * config.batch_size : (rank + 1) * config.batch_size], config, generator)
        moments = table.latents[batch.rows].float()
        latents = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 1].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, timesteps_total, (len(rows) // processes,), generator=generator)
        noisy = noise_schedule.add_noise(latents, noise, timesteps)
        target = losses.diffusion_target(noise_schedule, latents, noise, timesteps)

        to = accelerator.device
        prompt_embeds, pooled = text_states(batch.captions)
        added = {
            "image_embeds": [batch.face_embeds.to(to), batch.body_embeds.to(to)],
            **_size_condition(pipe, chosen, pooled),
        }
        with computing(to, config.precision, positions), _compiler_errors():
            noise_pred = network(
                noisy.to(to, memory_format=torch.channels_last), timesteps.to(to), encoder_hidden_states=prompt_embeds,
                added_cond_kwargs=added,
            ).sample.float()  # fmt: skip
        # L = L_diff + id_weight * L_id + clip_weight * L_CLIP (BoLID Eq. 14); the last two are still to come.
        alphas = losses.alpha_bar(noise_schedule, timesteps).to(to)
        loss = losses.loss_diffusion(noise_pred, target.to(to), alphas, prediction_type, config.min_snr_gamma)

        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        optimizer.zero_grad(set_to_none=True)
        scaler.backward(loss)
        scaler.step(optimizer, list(parameters.values()), config.max_grad_norm)
        step += 1
        decay = min(config.ema, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)

        value = float(loss.detach())
        if not math.isfinite(value):
            raise BolidError(f"the training diverged at step {step}", "lower --learning-rate")
        recent = value if math.isnan(recent) else 0.99 * recent + 0.01 * value
        log.write(step, value)
        if progress is not None:
            progress(step, config.steps, f"loss {recent:.4f}")
        if accelerator.is_main_process:
            if config.sample_every and (step % config.sample_every == 0 or step == config.steps):
                with computing(to, config.precision, positions), _swapped(parameters, average):
                    sample_sheet(pipe, chosen, table, out / "samples" / f"step-{step:06d}.png", seed)
            if time.monotonic() - saved > 60 * config.checkpoint_minutes:
                log.flush()
                scaler.remember()
                save_checkpoint(checkpoint, step, {**records["body"], "kind": "adapter"}, tensors, optimizer)
                saved = time.monotonic()

    paths = {branch: out / f"{branch}.safetensors" for branch in BRANCHES}
    if accelerator.is_main_process:
        log.flush()
        for branch in BRANCHES:
            flat = {name: average[f"{branch}.{name}"].half() for name in branches[branch]}
            save_adapter(paths[branch], flat, records[branch])
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return TrainAdapterResult(
        paths["face"], paths["body"], config.steps, time.monotonic() - started, len(table.people),
        len(table.captions), recent,
    )  # fmt: skip


def base_sha256(family: Family) -> str:
    """The hash of the base's UNet weights, for the record."""
    files = sorted((family.require("base") / "unet").glob("*.safetensors"))
    return sha256_file(files[0]) if files else ""


def training_schedule(pipe: Any) -> Any:
    """The base's own noise schedule, as training needs it: add_noise, get_velocity, alphas_cumprod."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe.scheduler.config)


def _size_condition(pipe: Any, family: Family, pooled: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """SDXL's extra conditions: the pooled text state, and original size, crop corner and target size."""
    if pooled is None:
        return {}
    height, width = family.image_size
    ids = pooled.new_tensor([[height, width, 0, 0, height, width]]).repeat(len(pooled), 1)
    return {"text_embeds": pooled, "time_ids": ids}


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first 100 steps (or 5 %), then a cosine down to 2 %."""
    warmup = max(1.0, min(100.0, 0.05 * steps))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


class _Scaler:
    """fp16's loss scaling; in the other precisions a plain backward pass and step. `state` is for the checkpoint."""

    def __init__(self, device: str, precision: str) -> None:
        import torch

        self._scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
        self.state = torch.zeros(2, dtype=torch.float64)
        self.remember()

    def remember(self) -> None:
        if state := self._scaler.state_dict():
            self.state[0], self.state[1] = state["scale"], state["_growth_tracker"]

    def restore(self) -> None:
        if state := self._scaler.state_dict():
            state |= {"scale": float(self.state[0]), "_growth_tracker": int(self.state[1])}
            self._scaler.load_state_dict(state)

    def backward(self, loss: torch.Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], max_grad_norm: float) -> None:
        import torch

        self._scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        self._scaler.step(optimizer)
        self._scaler.update()


@contextlib.contextmanager
def _compiler_errors() -> Iterator[None]:
    """A failure of torch.compile (mostly: no C++ compiler) as an error that says what to do; its warnings silenced."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch._dynamo")
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise BolidError(
            f"torch.compile failed: {str(error).splitlines()[0]}", "install a C++ compiler, or leave out --compile"
        ) from error


class _swapped:
    """`with _swapped(parameters, average):` the network computes with the moving average."""

    def __init__(self, parameters: dict[str, Any], average: dict[str, Any]) -> None:
        self.parameters, self.average = parameters, average

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name].data = self.average[name].data, parameter.data

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()


class _Log:
    """log.jsonl: one line a step, {"step", "loss"}. On resuming, the lines past the checkpoint are dropped."""

    def __init__(self, out: Path, step: int, active: bool) -> None:
        self.path, self.active = out / "log.jsonl", active
        self.lines: list[str] = []
        if active:
            out.mkdir(parents=True, exist_ok=True)
            kept = self.path.read_text().splitlines()[:step] if self.path.exists() and step else []
            self.path.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, loss: float) -> None:
        self.lines.append(json.dumps({"step": step, "loss": round(loss, 6)}))
        if len(self.lines) >= 100:
            self.flush()

    def flush(self) -> None:
        if self.active and self.lines:
            with self.path.open("a") as file:
                file.write("".join(line + "\n" for line in self.lines))
        self.lines = []


def sample_sheet(pipe: Any, family: Family, table: AdapterTable, path: Path, seed: int, steps: int = 12) -> None:
    """A contact sheet: three captions down; across: no profile, then three people (their first photo in front)."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image

    from bolid.backends.base import decode_latents, quiet_diffusers
    from bolid.method.body_condition import build_ip_adapter_image_embeds
    from bolid.method.body_vae import fuse
    from bolid.run import atomic_path

    picks = np.random.default_rng(derive_seed(seed, "sheet")).permutation(len(table.people))[:3]
    captions = [without_build(table.captions[table.people[p][-1]]) for p in picks]
    guidance = float(family.defaults.get("guidance", 5.0))
    height, width = family.image_size
    columns = []
    for person in (None, *picks):
        if person is None:
            body, face, front = torch.zeros_like(table.body_mean[0]), torch.zeros_like(table.face[0]), None
            pipe.set_ip_adapter_scale([0.0, 0.0])
        else:
            rows = torch.from_numpy(table.people[person])
            body = fuse(table.body_mean[rows][None], table.body_logvar[rows][None], table.confidence[rows][None])[0][0]
            face = F.normalize(table.face[rows].sum(0), dim=-1)
            front = decode_latents(pipe, table.latents[rows[:1], 0].float())[0]
            pipe.set_ip_adapter_scale([1.0, 1.0])
        embeds = build_ip_adapter_image_embeds([face, body], guidance=guidance > 1, batch=len(captions))
        generators = [torch.Generator().manual_seed(derive_seed(seed, "sheet", i)) for i in range(len(captions))]
        with quiet_diffusers(), torch.no_grad():
            pictures = pipe(
                captions, height=height, width=width, num_inference_steps=steps, guidance_scale=guidance,
                generator=generators, ip_adapter_image_embeds=[e.to(pipe.device) for e in embeds], output_type="np",
            ).images  # fmt: skip
        column = [np.zeros((height, width, 3), np.uint8) if front is None else front]
        columns.append(np.concatenate([*column, *(pictures * 255).round().astype(np.uint8)], axis=0))
    pipe.set_ip_adapter_scale([1.0, 1.0])
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(columns, axis=1)).save(temporary, "PNG")
