"""Distil the tiny base into a LoRA that paints in four steps without guidance.

    python examples/tiny_family/train_few_steps.py runs/body/train --out runs/few-steps --guidance 2.5
    cp runs/few-steps/few-steps.safetensors bolid/tiny/          # when the sheet is good

Latent consistency distillation (Luo et al., arXiv:2310.04378; as a LoRA: arXiv:2311.05556). The teacher, the frozen
base with classifier-free guidance at the family's own scale, takes one DDIM step from one of SOLVER_STEPS noise levels
to the next; the student, the same network with the LoRA, must see the same clean picture from both ends of that step.
LCMScheduler samples it, with the family's `original_inference_steps` = SOLVER_STEPS.

TRAIN: the shards that `bolid shard` writes. The adapters take part: each photo is conditioned on its person's other
photos as in `train-adapter`, because guidance strengthens the profile as it strengthens the text (Eq. 13), and a
student of the text alone would lose that. In a third of the steps they are off, for the plain base. So run this after
`train-adapter`, and again when adapters or base change. `--adapter none` leaves them out. A part `--own` of what is
noised is no photo but what the student has made so far of the same words and person (backward simulation, Yin et al.,
arXiv:2405.14867): a photo shows the person already, the student's beginning does not yet.

The shipped one had a teacher with `--guidance 2.5` in all steps, more than the family paints with. The mean R2 of the
body ratios in four steps is 0.45. With `--own 0` it was 0.43; then with guidance 1.75, portraits being among the
photos, 0.40.

About 3 seconds a step of 32 on one core, 600 steps. Resumable: the same command goes on from
OUT/.checkpoint.safetensors. At the end OUT/sheet.png: the teacher's pictures above, the student's below.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from course import Course
from diffusers import DDPMScheduler, LCMScheduler
from peft import LoraConfig
from PIL import Image
from train_base import SHEET

from bolid.backends.body import BodyEncoder
from bolid.backends.diffusion import decode_latents, load_base
from bolid.backends.sampling import sample
from bolid.formats.adapter import load_adapter, nested_state_dict
from bolid.formats.shards import directory_sha256
from bolid.formats.tensors import save_tensors
from bolid.method.body_condition import BRANCHES, drop_condition, install
from bolid.method.optim import ema_weights
from bolid.models.families import get_family
from bolid.run import derive_seed, run_record, sha256_file
from bolid.scales import parse_guidance
from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.data import AdapterTable, TextStates, draw_context, fuse_context, read_table, without_build
from bolid.train_adapter.precision import computing

SOLVER_STEPS = 25
LAYERS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
]  # fmt: skip
"""LCM-LoRA's: all but the first and the last convolution."""


def clean_and_noise(
    prediction: torch.Tensor, noisy: torch.Tensor, alphas: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and eps that a prediction means (BoLID Eq. 5 inverted). `alphas`: alpha-bar [B]."""
    a, b = alphas.sqrt().view(-1, 1, 1, 1), (1 - alphas).sqrt().view(-1, 1, 1, 1)
    if prediction_type == "v_prediction":
        return a * noisy - b * prediction, a * prediction + b * noisy
    if prediction_type == "epsilon":
        return (noisy - b * prediction) / a.clamp_min(1e-4), prediction
    raise ValueError(f"cannot distil a base that predicts {prediction_type!r}")


def draw_people(table: AdapterTable, rows: list[int], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(face [B,1,512], body [B,1,D]) of each photo's person, from one to all of their other photos."""
    mates = [table.people[table.owner[row]] for row in rows]
    others = [photos[photos != row] for photos, row in zip(mates, rows, strict=True)]
    context = draw_context(table, others, TrainAdapterConfig(), [generator] * len(rows))
    body, _, face = fuse_context(table, *context)
    return face[:, None], body[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/few-steps"))
    parser.add_argument("--adapter", default="", help="directory of both adapters; by default the family's; or: none")
    parser.add_argument("--body-encoder", type=Path, help="by default the family's")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8, help="8: 1.5 MB, which the package has room for")
    parser.add_argument("--lr", type=float, default=1e-4, help="at 5e-4 the student ran away within 1,500 steps")
    parser.add_argument("--guidance", help="of the teacher, as for bolid generate; by default the family's")
    parser.add_argument("--own", type=float, default=0.5, help="part that begins from the student's own pictures, 0..1")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--family", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoint-minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    family, device = get_family(args.family), torch.device(args.device)
    guidance = parse_guidance(args.guidance) if args.guidance else family.guidance
    encoder = BodyEncoder(args.body_encoder or family.require("body_encoder"), args.device)
    pipe = load_base(family, args.device)
    table = read_table(args.train, encoder)
    usable = torch.from_numpy(np.concatenate(table.people))
    text_states = TextStates(pipe, table.captions)
    null_text = text_states([""])[0]

    unet = pipe.unet
    adapters = {
        branch: Path(args.adapter) / f"{branch}.safetensors" if args.adapter else family.require(f"{branch}_adapter")
        for branch in (BRANCHES if args.adapter != "none" else ())
    }
    if adapters:
        states = [nested_state_dict(load_adapter(path, branch)[0]) for branch, path in adapters.items()]
        install(unet, [{part: {k: v.float() for k, v in s.items()} for part, s in state.items()} for state in states])
    unet.requires_grad_(False)
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=args.rank,
        init_lora_weights="gaussian",
        target_modules=LAYERS,
        exclude_modules=r"encoder_hid_proj\..*",  # the face adapter's own layers
    )
    unet.add_adapter(lora)
    parameters = {
        name.replace(".default.", "."): parameter for name, parameter in unet.named_parameters() if "lora_" in name
    }
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    settings = {name: getattr(args, name) for name in ("steps", "batch", "rank", "lr", "precision", "own")}
    record = run_record(
        "few-steps-lora",
        family=family,
        config={**settings, "guidance": guidance.plain(), "solver_steps": SOLVER_STEPS},
        seed=args.seed,
        inputs={"train": directory_sha256(args.train), **encoder.inputs}
        | {f"{branch}_adapter": sha256_file(path) for branch, path in adapters.items()},
    )
    course = Course(
        parameters, average, record, args.out / ".checkpoint.safetensors",
        steps=args.steps, lr=args.lr, weight_decay=1e-3, warmup=50, ema=0.995,
        checkpoint_minutes=args.checkpoint_minutes,
    )  # fmt: skip

    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    kind = schedule.config.prediction_type
    boundary = LCMScheduler.from_config(pipe.scheduler.config)
    stride = schedule.config.num_train_timesteps // SOLVER_STEPS
    alphas_of = schedule.alphas_cumprod.to(device)

    def predict(noisy: torch.Tensor, t: torch.Tensor, hidden: torch.Tensor, people: list[torch.Tensor]) -> torch.Tensor:
        with computing(device, args.precision):
            added = {"image_embeds": people} if people else None
            return unet(noisy, t, encoder_hidden_states=hidden, added_cond_kwargs=added).sample.float()

    def consistency(noisy: torch.Tensor, t: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """f(z_t, t) = c_skip z_t + c_out x0, the identity at t = 0; c_skip and c_out are those of LCMScheduler."""
        scaled, sigma = t.float() * boundary.config.timestep_scaling, 0.5
        c_skip = (sigma**2 / (scaled**2 + sigma**2)).view(-1, 1, 1, 1)
        c_out = (scaled / (scaled**2 + sigma**2).sqrt()).view(-1, 1, 1, 1)
        return c_skip * noisy + c_out * clean_and_noise(prediction, noisy, alphas_of[t], kind)[0]

    boundary.set_timesteps(int(family.few_steps["steps"]), original_inference_steps=SOLVER_STEPS)
    sampled = boundary.timesteps.to(device)

    @torch.no_grad()
    def own_pictures(
        steps: int, hidden: torch.Tensor, people: list[torch.Tensor], generator: torch.Generator
    ) -> torch.Tensor:
        """What the student makes of pure noise in the first so many of its steps, [B, C, h, w]."""
        shape = (len(hidden), *table.latents.shape[2:])
        x0 = torch.zeros(shape, device=device)
        for timestep in sampled[:steps]:
            noise = torch.randn(shape, generator=generator).to(device)
            now = timestep.expand(len(hidden))
            noisy = noise if timestep == sampled[0] else schedule.add_noise(x0, noise, now)
            x0 = consistency(noisy, now, predict(noisy, now, hidden, people))
        return x0

    while course.step < args.steps:
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "few-steps", course.step))
        rows = usable[torch.randint(0, len(usable), (args.batch,), generator=generator)].tolist()
        moments = table.latents[rows].float()
        clean = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 1].shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        index = torch.randint(1, SOLVER_STEPS + 1, (args.batch,), generator=generator)
        t, t_next = index * stride - 1, ((index - 1) * stride - 1).clamp_min(0)
        face, body = draw_people(table, rows, generator)
        coins = torch.rand(4, args.batch, generator=generator)
        face, body = drop_condition(face, coins[0] < 0.3), drop_condition(body, coins[1] < 0.1)
        plain = coins[2] < 0.8  # captions mostly without the words for the build, as the adapters were trained
        captions = [table.captions[row] for row in rows]
        captions = [without_build(text) if p else text for text, p in zip(captions, plain, strict=True)]
        hidden = text_states(captions)[0].to(device)
        if adapters:
            pipe.set_ip_adapter_scale([0.0 if coins[3, 0] < 1 / 3 else 1.0] * 2)
        people = [face.to(device), body.to(device)] if adapters else []
        t, t_next, clean = t.to(device), t_next.to(device), clean.to(device)
        if own := round(args.own * args.batch):
            steps = int(torch.randint(1, len(sampled), (), generator=generator))
            clean[:own] = own_pictures(steps, hidden[:own], [embeds[:own] for embeds in people], generator)
        noisy = schedule.add_noise(clean, noise.to(device), t)

        with torch.no_grad():
            unet.disable_adapters()
            double = [torch.cat([torch.zeros_like(embeds), embeds]) for embeds in people]
            both = predict(
                torch.cat([noisy] * 2), torch.cat([t] * 2), torch.cat([null_text.expand_as(hidden), hidden]), double
            )
            unet.enable_adapters()
            without, conditioned = both.chunk(2)
            in_stretch = torch.tensor([SOLVER_STEPS - i in guidance.steps(SOLVER_STEPS) for i in index.tolist()])
            w = torch.where(in_stretch, guidance.up, 1.0).to(device).view(-1, 1, 1, 1)
            guided = without + w * (conditioned - without)
            x0, eps = clean_and_noise(guided, noisy, alphas_of[t], kind)
            # At the last level the DDIM step ends in the clean picture itself.
            a = torch.where(index.to(device) == 1, torch.ones_like(alphas_of[t]), alphas_of[t_next]).view(-1, 1, 1, 1)
            nearer = a.sqrt() * x0 + (1 - a).sqrt() * eps
            # By the moving average: by itself, a student may run away from the base without ever meeting an error.
            with ema_weights(parameters, average):
                target = consistency(nearer, t_next, predict(nearer, t_next, hidden, people))
        output = consistency(noisy, t, predict(noisy, t, hidden, people))
        loss = ((output - target).square() + 1e-6).sqrt().sub(1e-3).mean()  # pseudo-Huber, c = 0.001
        course.update(loss)

    # In the names that diffusers' load_lora_weights takes, of the moving average.
    file = args.out / "few-steps.safetensors"
    save_tensors(file, {f"unet.{name}": value.half() for name, value in average.items()}, record)
    sheet(args.out / "sheet.png", family, file, args.device)
    course.finished()
    print(json.dumps({"steps": course.step, "photos": len(usable), "bytes": file.stat().st_size}))


def sheet(path: Path, family, lora: Path, device: str) -> None:
    """The base with its own steps and guidance above, the few-step sampler below: the same prompts and seeds."""
    from bolid.backends.diffusion import load_loras

    rows = []
    for settings in (family.defaults, family.few_steps):
        pipe = load_base(family, device, sampler=settings)
        if settings is family.few_steps:
            load_loras(pipe, [(lora, 1.0)], family)
        latents = sample(
            pipe,
            SHEET,
            size=family.image_size,
            steps=settings["steps"],
            guidance=parse_guidance(settings["guidance"]),
            generators=[torch.Generator().manual_seed(i) for i in range(len(SHEET))],
        )
        rows.append(np.concatenate(decode_latents(pipe, latents), 1))
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    main()
