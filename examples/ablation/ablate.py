"""What each part of the method is worth, on held-out synthetic people: one table, one script.

    python examples/ablation/ablate.py --train runs/body/train --body-encoder runs/body/body-encoder.safetensors \
        --val photos/val --minutes 20 --out runs/ablation

Four questions, one section of the table each:

- losses: nothing, + body, + face, + L_id (keypoints, or bone ratios), + L_CLIP, all of them, and L_id by the body
  encoder on pictures sampled from pure noise;
- photos: 1, 2, 4 or 8 photos in the profile;
- fusion: product of experts, plain mean of the views' means, best single view;
- bad photos: half of them cut off, blurred or half hidden, with and without the confidence weights.

Every row of the first section is a training by `bolid train-adapter`'s own code with the same number of steps: as many
as the plain one does in `--minutes` (measured once, kept in plan.json), or `--steps`; from nothing, or from the trained
adapters of `--init`, where a loss is to say what it adds to them. The weights of L_id and L_CLIP are chosen so that at
the end of the plain training each one's gradient is `--share` of L_diff's; all other settings are the defaults, but
for the last row's (SAMPLED). The other sections use the adapters of `--adapter`, or of the
row with the best body R2.

"gain" is the body R2 beyond that of the section's row named in BESIDE, with the standard error of that difference over
the choice of people: the same people, prompts and noise are in both rows, so it is smaller than the R2's own.

Run it again after an interruption: rows that are in ablation.json are not done again, and an unfinished training goes
on. Expected: `--minutes` for each of the trainings (those with pixel losses up to a quarter more; sampled pictures, ten
times as long), then two minutes a row on one core for 60 people. Writes ablation.json and
ablation.md into `--results`, and what was read off the pictures into `--out`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F

import bolid.synth.people as world
from bolid.backends.body import BodyEncoder
from bolid.backends.diffusion import decode_latents, load_base, quiet_diffusers
from bolid.backends.image_text import ImageTextModel
from bolid.backends.probe import BodyProbe
from bolid.backends.sampling import Guidance, sample
from bolid.formats.images import read_photo
from bolid.method.body_condition import BRANCHES
from bolid.method.body_vae import fuse
from bolid.method.metrics import r2_scores
from bolid.models.families import Family, match_family
from bolid.run import derive_seed, sha256_file, write_atomic
from bolid.train_adapter.command import train_adapter
from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.data import TextStates, batch_rows, draw_batch, photo_generators, read_table
from bolid.train_adapter.decoder import LatentDecoder
from bolid.train_adapter.pixel_losses import pixel_losses
from bolid.train_adapter.setup import install_branches, load_models, make_objective
from bolid.views import ViewReader, person_crop

SECTIONS = ("losses", "photos", "fusion", "bad photos")
PIXELS = {"keypoints": "id", "bone-ratios": "id", "clip": "clip"}  # what is weighted -> the objective's term
BESIDE = {
    "losses": "+ body", "photos": "8 photos", "fusion": "product of experts",
    "bad photos": "4 good photos, confidence weights",
}  # fmt: skip
ON_PICTURES = {"pixel_every": 1, "face_dropout": 0.6, "build_word_dropout": 1.0, "learning_rate": 0.001}
SAMPLED = ON_PICTURES | {
    "id_loss": "body", "id_weight": 0.3, "x_gen": "sampled", "x_gen_steps": 6, "x_gen_grad_steps": 6,
}  # fmt: skip
SHOWN = (
    "body R2", "body R2, standard error", "gain", "gain, standard error", "body correlation",
    "right person of all, percentile", "face, own", "face, another's", "image-text cosine", "uncertainty",
    "photos used",
)  # fmt: skip


# ---- held-out people ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Person:
    """A held-out person as the pipeline sees them: M views, D body dimensions."""

    seed: int
    ratios: np.ndarray  # [R], the truth
    gender: str
    mean: torch.Tensor  # [M, D]
    logvar: torch.Tensor  # [M, D]
    confidence: torch.Tensor  # [M]
    faces: list[torch.Tensor | None]  # M of [512]


def degrade(image: np.ndarray, how: str, rng: np.random.Generator) -> np.ndarray:
    """A bad photo: "cut" to its upper or lower half, "blurred", or its left or right half "hidden" behind grey."""
    import cv2

    height, width = image.shape[:2]
    if how == "cut":
        top = int(rng.integers(2)) * (height // 2)
        return np.ascontiguousarray(image[top : top + height // 2])
    if how == "blurred":
        return cv2.GaussianBlur(image, (0, 0), height / 40)
    hidden = image.copy()
    left = int(rng.integers(2)) * (width // 2)
    hidden[:, left : left + width // 2] = 128
    return hidden


def read_person(
    folder: Path, reader: ViewReader, encoder: BodyEncoder, family: Family, photos: int, bad: bool
) -> tuple[Person, int]:
    """(the person from their first `photos` photos, how many of those could not be used). `bad`: every other one is
    degraded. Portraits come last: they show no body."""
    rows = sorted(
        ((path, json.loads(path.with_suffix(".json").read_text())) for path in folder.glob("*.jpg")),
        key=lambda row: (row[1]["attributes"]["framing"] == "portrait", row[0].name),
    )[:photos]
    truth = rows[0][1]
    rng = np.random.default_rng(derive_seed(truth["seed"], "spoil"))
    parts, faces, unusable = [], [], 0
    for number, (path, _) in enumerate(rows):
        image = read_photo(path)
        if bad and number % 2 == 0:
            image = degrade(image, ("cut", "blurred", "hidden")[(number // 2 + truth["seed"]) % 3], rng)
        view = reader.read([image])[0]
        if isinstance(view, str):
            unusable += 1
            continue
        cut, _, points = person_crop(view.image, view.box, view.keypoints, family.view_size)
        parts.append(encoder.encode([cut], [points], [view.view_features] if encoder.needs_features else None))
        faces.append(None if view.face is None else torch.from_numpy(view.face))
    if not parts:
        raise LookupError(f"no photo of {folder} can be used")
    mean, logvar, confidence = (torch.cat(part) for part in zip(*parts, strict=True))
    ratios = np.array([truth["ratios"][name] for name in world.RATIO_NAMES])
    gender = world.build_words(world.sample_person(truth["seed"]))["gender_word"]
    return Person(truth["seed"], ratios, gender, mean, logvar, confidence, faces), unusable


def body_of(person: Person, photos: int, fusion: str = "product of experts", confidence: bool = True) -> torch.Tensor:
    """[2, D], the body vector and its log variance, from the first `photos` views."""
    mean, logvar = person.mean[:photos], person.logvar[:photos]
    weight = person.confidence[:photos] if confidence else torch.ones(len(mean))
    if fusion == "plain mean":
        return torch.stack([mean.mean(0), logvar.mean(0)])
    if fusion == "best single view":
        best = int((torch.exp(-logvar) * weight[:, None]).sum(-1).argmax())
        mean, logvar, weight = mean[best : best + 1], logvar[best : best + 1], weight[best : best + 1]
    return torch.stack([part[0] for part in fuse(mean[None], logvar[None], weight[None])])


def face_of(person: Person, views: slice) -> torch.Tensor:
    """[512], the mean direction of the faces that are seen in these views; zeros without any."""
    faces = [face for face in person.faces[views] if face is not None]
    return F.normalize(torch.stack(faces).mean(0), dim=0) if faces else torch.zeros(512)


# ---- measuring a row ----------------------------------------------------------------------------------------------


class Evaluator:
    """Generates pictures of every person with an adapter and reads their bodies and faces."""

    def __init__(self, family: Family, reader: ViewReader, each: int) -> None:
        self.family, self.reader, self.each = family, reader, each
        self.probe = BodyProbe(family.require("probe"))
        self.order = [self.probe.ratio_names.index(name) for name in world.RATIO_NAMES]
        self.image_text = ImageTextModel(family.require("image_text"))

    def measure(
        self, people: list[Person], bodies: Sequence[torch.Tensor], adapter: Path | None,
        branches: Sequence[str], faces: bool,
    ) -> tuple[dict[str, float], np.ndarray]:  # fmt: skip
        """(figures, the ratios [P, R] read off) of `bodies` [D] (and the people's faces) through an adapter folder;
        None: the base alone."""
        pipe = load_base(self.family, sampler=self.family.defaults)
        if adapter is not None:
            with quiet_diffusers():
                pipe.load_ip_adapter(
                    [str(adapter)] * 2, subfolder=["", ""], weight_name=[f"{b}.safetensors" for b in BRANCHES],
                    image_encoder_folder=None,
                )  # fmt: skip
            pipe.set_ip_adapter_scale([float(branch in branches) for branch in BRANCHES])
        readings, agreements, own, others = [], [], [], []
        references = [face_of(person, slice(4, None)) for person in people]
        for i, (person, body) in enumerate(zip(people, bodies, strict=True)):
            face = face_of(person, slice(0, 4))
            prompts = self._prompts(person, "full body")
            made = self._generate(pipe, prompts, person, "body", face, body, adapter)
            readings.append(self.probe.predict(made)[:, self.order].mean(0))
            image_embeds, text_embeds = self.image_text.encode_images(made), self.image_text.encode_text(prompts)
            agreements += (image_embeds * text_embeds).sum(-1).tolist()
            if not faces:
                continue
            other = references[(i + 1) % len(people)]
            for picture in self._generate(pipe, self._prompts(person, "portrait"), person, "face", face, body, adapter):
                found = self.reader.faces.detect(picture)
                if found and references[i].any() and other.any():
                    vector = torch.from_numpy(found[0].embedding)
                    own.append(float(vector @ references[i]))
                    others.append(float(vector @ other))
        truth, reading = np.stack([person.ratios for person in people]), np.stack(readings)
        deviation = truth.std(0).clip(1e-9)
        distance = (((reading[:, None] - truth[None]) / deviation) ** 2).sum(-1)
        wrong = (distance < np.diag(distance)[:, None]).sum(1)
        figures = {
            "body R2": mean_r2(truth, reading),
            "body R2, standard error": bootstrap_error(lambda rows: mean_r2(truth[rows], reading[rows]), len(truth)),
            "body correlation": float(
                np.mean([np.corrcoef(truth[:, r], reading[:, r])[0, 1] for r in range(truth.shape[1])])
            ),
            "right person of all, percentile": float(1 - wrong.mean() / max(1, len(truth) - 1)),
            "image-text cosine": float(np.mean(agreements)),
        }
        if own:
            figures |= {"face, own": float(np.mean(own)), "face, another's": float(np.mean(others))}
        return figures, reading

    def _prompts(self, person: Person, framing: str) -> list[str]:
        """Captions of people who were never rendered, without words for the build, with this person's gender."""
        prompts = []
        for i in range(self.each):
            identity = world.sample_person(150_000 + derive_seed(person.seed, "prompt", framing, i) % 20_000)
            plan = world.sample_plan(identity, 0, name_build=False, framing=framing)
            prompts.append(re.sub(r"\b(?:wo)?man\b", person.gender, world.caption(identity, plan)))
        return prompts

    def _generate(
        self, pipe: Any, prompts: list[str], person: Person, purpose: str, face: torch.Tensor, body: torch.Tensor,
        adapter: Path | None,
    ) -> list[np.ndarray]:  # fmt: skip
        """The same prompts and noise of a person in every row."""
        generators = [
            torch.Generator().manual_seed(derive_seed(person.seed, "ablation", purpose, i)) for i in range(len(prompts))
        ]
        latents = sample(
            pipe, prompts, size=self.family.image_size, steps=self.family.schedule,
            guidance=Guidance(self.family.guidance), generators=generators,
            vectors=[] if adapter is None else [face, body],
        )  # fmt: skip
        return decode_latents(pipe, latents)


def mean_r2(truth: np.ndarray, reading: np.ndarray) -> float:
    return float(r2_scores(torch.from_numpy(truth), torch.from_numpy(reading).double()).mean())


def bootstrap_error(figure: Callable[[np.ndarray], float], people: int, draws: int = 200) -> float:
    """Standard error of `figure` (of chosen people's numbers) over the choice of people."""
    rng = np.random.default_rng(0)
    chosen = [rng.integers(people, size=people) for _ in range(draws)]
    return float(np.std([figure(rows) for rows in chosen if len(set(rows)) > 1]))


# ---- training a row -----------------------------------------------------------------------------------------------


class Rows:
    """The trainings, their common settings, and plan.json: the steps and the weights that were measured."""

    def __init__(self, args: argparse.Namespace, family: Family) -> None:
        self.args, self.family, self.plan_file = args, family, args.out / "plan.json"
        self.plan: dict[str, Any] = json.loads(self.plan_file.read_text()) if self.plan_file.exists() else {}
        self.base = TrainAdapterConfig(sample_every=0)
        if args.init:
            self.base = dataclasses.replace(self.base, init=str(args.init))
        if args.batch_size:
            self.base = dataclasses.replace(self.base, batch_size=args.batch_size)

    def _remember(self, **facts: Any) -> None:
        self.plan |= facts
        write_atomic(self.plan_file, json.dumps(self.plan, indent=1) + "\n")

    def steps(self) -> int:
        """`--steps`, or as many as the plain training does in `--minutes`."""
        if self.args.steps:
            return self.args.steps
        if "steps" not in self.plan:
            marks: list[float] = []
            probe = dataclasses.replace(self.base, steps=12, checkpoint_minutes=1e9)
            with tempfile.TemporaryDirectory() as scratch:
                self._train(Path(scratch), probe, lambda done, total, text: marks.append(time.monotonic()))
            seconds = float(np.median(np.diff(marks[-10:])))
            self._remember(seconds_a_step=seconds, steps=max(1, int(60 * self.args.minutes / seconds)))
        return int(self.plan["steps"])

    def train(self, name: str, **changes: Any) -> Path:
        """The folder of a row's adapters."""
        folder = self.args.out / name
        if not (folder / "done.json").exists():
            started = time.monotonic()
            config = dataclasses.replace(self.base, steps=self.steps(), **changes)
            result = self._train(folder, config, say_progress(name))
            facts = {"seconds": time.monotonic() - started, "loss": result.loss, "changes": changes}
            write_atomic(folder / "done.json", json.dumps(facts))
        return folder

    def _train(self, folder: Path, config: TrainAdapterConfig, progress: Any) -> Any:
        return train_adapter(
            self.args.train, folder, config=config, body_encoder=self.args.body_encoder, family=self.family.name,
            device="cpu", seed=self.args.seed, progress=progress,
        )  # fmt: skip

    def weight(self, name: str, plain: Path) -> float:
        """The weight of "keypoints", "bone-ratios" or "clip" that gives its gradient its share of L_diff's."""
        if "weights" not in self.plan:
            self._remember(weights=self._balance(plain))
        return float(self.plan["weights"][name])

    def _balance(self, plain: Path, batches: int = 8) -> dict[str, float]:
        """Root mean square of each loss's gradient on the plain row's adapters, over some batches."""
        settings = dataclasses.replace(self.base, precision="fp32", init=str(plain))
        models = load_models(self.args.train, settings, self.args.body_encoder, self.family.name, "cpu")
        table = read_table(self.args.train, models.body_encoder)
        branches = install_branches(models, settings, self.args.seed)
        parameters = [parameter for branch in branches.values() for parameter in branch.values()]
        decode = LatentDecoder(self.family, models.pipe.vae)
        text_states = TextStates(models.pipe, table.captions)
        norms: dict[str, list[float]] = {}
        for name, term in PIXELS.items():
            config = dataclasses.replace(settings, **on(name, 1.0))
            with_losses = dataclasses.replace(models, pixel_losses=pixel_losses(config, self.family), decode=decode)
            objective = make_objective(with_losses, table, config, torch.device("cpu"), text_states)
            for number in range(batches):
                size = config.batch_size
                rows = batch_rows(len(table.captions), size, number, self.args.seed)
                batch = draw_batch(table, rows, config, photo_generators(self.args.seed, number * size, size))
                values = objective(batch, with_pixels=True)
                for key in (term, "diffusion"):
                    if not values[key].requires_grad:
                        continue  # no photo of the batch was clear enough
                    gradient = torch.autograd.grad(values[key], parameters, retain_graph=True)
                    norms.setdefault(name if key == term else "diffusion", []).append(
                        float(torch.stack([g.square().sum() for g in gradient]).sum())
                    )
        size = {name: float(np.sqrt(np.mean(squares))) for name, squares in norms.items()}
        return {name: self.args.share * size["diffusion"] / max(size.get(name, 0.0), 1e-12) for name in PIXELS}


def on(name: str, weight: float) -> dict[str, Any]:
    """The settings that switch a loss on."""
    return {"clip_weight": weight} if name == "clip" else {"id_weight": weight, "id_loss": name}


def say_progress(name: str) -> Any:
    last = [0.0]

    def progress(done: int, total: int, text: str) -> None:
        if time.monotonic() - last[0] > 60 or done == total:
            last[0] = time.monotonic()
            print(f"  {name}: {done}/{total} {text}", flush=True)

    return progress


# ---- the table ----------------------------------------------------------------------------------------------------


class Table:
    """ablation.json and ablation.md: {section: {row: figures}}; what was read off the pictures lies in `work`."""

    def __init__(self, folder: Path, work: Path, facts: dict[str, Any]) -> None:
        self.json, self.markdown, self.work = folder / "ablation.json", folder / "ablation.md", work
        self.data: dict[str, Any] = json.loads(self.json.read_text()) if self.json.exists() else {"run": facts}
        if self.data["run"] != facts:
            changed = sorted(k for k in facts if self.data["run"].get(k) != facts[k])
            raise SystemExit(f"{self.json} is of another run (different {', '.join(changed)}): give other --results")
        self.rows: dict[str, dict[str, dict[str, Any]]] = self.data.setdefault("rows", {})

    def has(self, section: str, row: str) -> bool:
        return row in self.rows.get(section, {})

    def add(
        self, section: str, row: str, figures: dict[str, Any], reading: np.ndarray, people: Sequence[Person]
    ) -> None:
        """A row, and its gain over the section's row in BESIDE when that one is there."""
        np.save(self._reading(section, row), reading)
        truth = np.stack([person.ratios for person in people])
        if self.has(section, BESIDE[section]) and row != BESIDE[section]:
            other = np.load(self._reading(section, BESIDE[section]))

            def gain(rows: np.ndarray) -> float:
                return mean_r2(truth[rows], reading[rows]) - mean_r2(truth[rows], other[rows])

            everybody = np.arange(len(truth))
            figures |= {"gain": gain(everybody), "gain, standard error": bootstrap_error(gain, len(truth))}
        figures = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
        self.rows.setdefault(section, {})[row] = figures
        print(f"{section} | {row} | {figures}", flush=True)
        write_atomic(self.json, json.dumps(self.data, indent=1) + "\n")
        write_atomic(self.markdown, self._text())

    def _reading(self, section: str, row: str) -> Path:
        return self.work / f"{section}, {row}.npy"

    def _text(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.data["run"].items() if "sha256" not in name)
        lines = [
            "# What each part is worth", "",
            "Made by `examples/ablation/ablate.py`; nothing in it is typed by hand. Held-out synthetic people, the "
            "same prompts and noise in every row. Gain: body R2 beyond that of the row "
            + ", ".join(f"“{row}” ({section})" for section, row in BESIDE.items()) + ".", "", facts,
        ]  # fmt: skip
        for section, rows in self.rows.items():
            shown = [name for name in SHOWN if any(name in figures for figures in rows.values())]
            lines += [
                "",
                f"## {section.capitalize()}",
                "",
                f"| | {' | '.join(shown)} |",
                "|---" * (len(shown) + 1) + "|",
            ]
            for row, figures in rows.items():
                cells = [f"{figures[name]:.3f}" if name in figures else "" for name in shown]
                lines.append(f"| {row} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=Path("train"), help="training shards")
    parser.add_argument("--body-encoder", type=Path, required=True)
    parser.add_argument(
        "--val", type=Path, default=Path("photos/val"), help="rendered people that nothing was trained on"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="for adapters and checkpoints")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, help="for ablation.md and ablation.json")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the plain training; all have its steps")
    parser.add_argument("--steps", type=int, default=0, help="of every training, in place of --minutes")
    parser.add_argument("--init", type=Path, help="adapters that every training goes on from; default: from nothing")
    parser.add_argument("--adapter", type=Path, help="adapters for the other sections, in place of the best row's")
    parser.add_argument("--batch-size", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.1, help="of a pixel loss's gradient, beside L_diff's")
    parser.add_argument("--people", type=int, default=60, help="held-out people")
    parser.add_argument("--each", type=int, default=2, help="pictures of each of them, and as many portraits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="a section; losses first")
    args = parser.parse_args()
    torch.set_num_threads(1)

    encoder = BodyEncoder(args.body_encoder)
    family = match_family(None, encoder.record["family"], args.body_encoder)
    base = next((family.require("base") / "unet").glob("*.safetensors"))
    rows = Rows(args, family)
    facts = {
        "family": family.name, "steps": rows.steps(), "batch size": rows.base.batch_size, "share": args.share,
        "people": args.people, "pictures of each": args.each, "seed": args.seed,
        "body encoder sha256": encoder.sha256, "base sha256": sha256_file(base),
    }  # fmt: skip
    if args.init:
        facts |= {"each goes on from": str(args.init)}
        facts |= {f"{branch} init sha256": sha256_file(args.init / f"{branch}.safetensors") for branch in BRANCHES}
    if args.adapter:
        facts |= {"the other sections use": str(args.adapter)}
        facts |= {f"{branch} sha256": sha256_file(args.adapter / f"{branch}.safetensors") for branch in BRANCHES}
    args.results.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table(args.results, args.out, facts)
    reader = ViewReader(family)
    evaluator = Evaluator(family, reader, args.each)
    folders = sorted(path for path in args.val.iterdir() if path.is_dir())[: args.people]
    print(f"reading {len(folders)} people", flush=True)
    people = [read_person(folder, reader, encoder, family, 8, bad=False)[0] for folder in folders]

    sections = args.only or SECTIONS
    if "losses" in sections:
        losses_section(rows, table, evaluator, people)
    adapter, branches = args.adapter, BRANCHES
    if adapter is None:
        done = {row: figures for row, figures in table.rows.get("losses", {}).items() if "folder" in figures}
        if not done:
            raise SystemExit("no adapter is trained yet: run the section losses first, or give --adapter")
        best = max(done, key=lambda row: done[row]["body R2"])
        adapter = args.out / done[best]["folder"]
        branches = ("body",) if best == "+ body" else BRANCHES
    print(f"the other sections use {adapter}", flush=True)

    def measure(section: str, row: str, seen: list[Person], **how: Any) -> None:
        if section in sections and not table.has(section, row):
            vectors = [body_of(person, **how) for person in seen]
            figures, reading = evaluator.measure(seen, [v[0] for v in vectors], adapter, branches, faces=False)
            if how.get("fusion") != "plain mean":  # which has none
                figures["uncertainty"] = float(np.mean([(0.5 * v[1]).exp().mean() for v in vectors]))
            figures["photos used"] = float(np.mean([min(how["photos"], len(person.mean)) for person in seen]))
            table.add(section, row, figures, reading, seen)

    for count in (8, 4, 2, 1):
        measure("photos", f"{count} photo{'s' * (count > 1)}", people, photos=count)
    for fusion in ("product of experts", "plain mean", "best single view"):
        measure("fusion", fusion, people, photos=4, fusion=fusion)
    if "bad photos" in sections:
        bad = [read_person(folder, reader, encoder, family, 4, bad=True)[0] for folder in folders]
        measure("bad photos", "4 good photos, confidence weights", people, photos=4)
        measure("bad photos", "4 good photos, no confidence weights", people, photos=4, confidence=False)
        measure("bad photos", "2 of 4 bad, confidence weights", bad, photos=4)
        measure("bad photos", "2 of 4 bad, no confidence weights", bad, photos=4, confidence=False)
        measure("bad photos", "2 of 4 bad, plain mean", bad, photos=4, fusion="plain mean")


def losses_section(rows: Rows, table: Table, evaluator: Evaluator, people: list[Person]) -> None:
    """Trains and measures the rows of the first section."""
    bodies = [body_of(person, 4)[0] for person in people]

    def row(name: str, folder: str | None, branches: Sequence[str], **changes: Any) -> None:
        if not table.has("losses", name):
            adapter = rows.train(folder, **changes) if folder is not None else None
            figures, reading = evaluator.measure(people, bodies, adapter, branches, faces=True)
            if adapter is not None:
                facts = json.loads((adapter / "done.json").read_text())
                figures |= {"folder": folder, "changes": changes, "training seconds": facts["seconds"]}
            table.add("losses", name, figures, reading, people)

    row("+ body", "body", ("body",), face_dropout=1.0)  # first: the others' gain is beyond it
    row("none (the base alone)", None, ())
    row("+ face", "face", BRANCHES)
    plain = rows.args.out / "face"
    weights = {name: rows.weight(name, plain) for name in PIXELS}
    row("+ face + L_id keypoints", "keypoints", BRANCHES, **on("keypoints", weights["keypoints"]))
    row("+ face + L_id bone ratios", "bone-ratios", BRANCHES, **on("bone-ratios", weights["bone-ratios"]))
    row("+ face + L_CLIP", "clip", BRANCHES, **on("clip", weights["clip"]))
    figures = table.rows["losses"]
    name = max(
        ("keypoints", "bone-ratios"), key=lambda name: figures[f"+ face + L_id {name.replace('-', ' ')}"]["body R2"]
    )
    row(
        f"all, with L_id {name.replace('-', ' ')}, the better one", "all", BRANCHES,
        **on(name, weights[name]), **on("clip", weights["clip"]),
    )  # fmt: skip
    row("+ face + L_id body, sampled pictures", "sampled", BRANCHES, **SAMPLED)


if __name__ == "__main__":
    main()
