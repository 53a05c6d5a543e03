"""A training's reports: log.jsonl, the loss curve and contact sheets of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.formats.parsing import parse_json
from bolid.models.families import Family
from bolid.run import derive_seed, write_atomic
from bolid.train_adapter.data import AdapterTable, TextStates, without_build

if TYPE_CHECKING:
    import torch


class Log:
    """log.jsonl, one line a step: {"step", "loss", ...}; loss.png, its curve; and TensorBoard's files if wanted.

    On resuming, what is past the checkpoint is dropped, and a damaged line with all after it.
    Raises BolidError when the package tensorboard is missing.
    """

    def __init__(self, out: Path, step: int, tensorboard: bool) -> None:
        self.path, self.lines = out / "log.jsonl", list[str]()
        self.writer = _tensorboard_writer(out / "tensorboard", step) if tensorboard else None
        kept = _whole_lines(self.path)[:step] if self.path.exists() and step else []
        write_atomic(self.path, "".join(line + "\n" for line in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a step's line."""
        self.lines.append(json.dumps({"step": step, **{name: round(value, 6) for name, value in values.items()}}))
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"train/{name}", value, step)
        if len(self.lines) >= 100:
            self.flush()

    def flush(self) -> None:
        """Write the lines to the file."""
        with self.path.open("a") as file:
            file.write("".join(line + "\n" for line in self.lines))
        self.lines = []

    def draw(self) -> None:
        """Draw loss.png anew."""
        self.flush()
        loss_curve(self.path, self.path.with_name("loss.png"))

    def close(self) -> None:
        """Write and draw all that is left."""
        self.draw()
        if self.writer is not None:
            self.writer.close()


def _whole_lines(path: Path) -> list[str]:
    """The lines before the first that is damaged."""
    lines, last = list[str](), 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = parse_json(line)
        except ValueError:
            break
        numbers = isinstance(entry, dict) and all(isinstance(value, int | float) for value in entry.values())
        if not numbers or entry.get("step", 0) <= last:
            break
        lines.append(line)
        last = entry["step"]
    return lines


def _tensorboard_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BolidError(
            "--tensorboard needs the package tensorboard, which is not installed",
            "pip install 'bolid[tensorboard]', or leave it out: log.jsonl and loss.png hold the same numbers",
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)


def loss_curve(log: Path, path: Path) -> None:
    """A picture of log.jsonl's losses over the steps: each as measured, faint, and averaged over 2 % of the run."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bolid.run import atomic_path

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    figure = Figure(figsize=(8, 2.5 * max(1, len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(max(1, len(names)), 1, squeeze=False)[:, 0], names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        steps, values = np.array([s for s, _ in points]), np.array([v for _, v in points])
        window = max(1, len(values) // 50)
        axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.6)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1 :], smooth, color="tab:blue", linewidth=1.4)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": None})


def sample_sheet(
    pipe: Any,
    family: Family,
    table: AdapterTable,
    text_states: TextStates,
    path: Path | None,
    seed: int,
    steps: int = 12,
) -> None:
    """A contact sheet: three captions down; across: no profile, then three people (their first photo in front). With
    the family's sampler and guidance, as `generate` makes pictures, but in no more than `steps` steps.

    Without a path it is made and not kept: where branches are spread over processes, all of them have to compute.
    """
    import numpy as np
    import torch
    from PIL import Image

    from bolid.backends.diffusion import decode_latents, set_sampler
    from bolid.backends.sampling import Guidance, sample
    from bolid.run import atomic_path

    trained_with = pipe.scheduler
    set_sampler(pipe, family.defaults)
    schedule: int | tuple[int, ...] = family.timesteps if family.timesteps else min(steps, family.steps)
    picks = np.random.default_rng(derive_seed(seed, "sheet")).permutation(len(table.people))[:3]
    captions = [without_build(table.captions[table.people[p][-1]]) for p in picks]
    # Given the states of the texts, sampling needs no text encoder, which training may have dropped.
    prompts, negative = text_states(captions), text_states([""] * len(captions))
    height, width = family.image_size
    pipe.vae.enable_slicing()  # decodes one picture at a time: a large one takes gigabytes
    columns = []
    for person in (None, *picks):
        front = np.zeros((height, width, 3), np.uint8)
        if person is not None:
            front = decode_latents(pipe, table.latents[table.people[person][:1], 0].float())[0]
        pipe.set_ip_adapter_scale([float(person is not None)] * 2)
        generators = [torch.Generator().manual_seed(derive_seed(seed, "sheet", i)) for i in range(len(captions))]
        noise = torch.stack([torch.randn(table.latents.shape[2:], generator=generator) for generator in generators])
        latents = sample(
            pipe, prompts, size=family.image_size, steps=schedule, guidance=Guidance(family.guidance, negative),
            generators=generators, vectors=_vectors(table, person), latents=noise,
        )  # fmt: skip
        columns.append(np.concatenate([front, *decode_latents(pipe, latents)], axis=0))
    pipe.set_ip_adapter_scale([1.0, 1.0])
    pipe.scheduler = trained_with
    if path is not None:
        with atomic_path(path) as temporary:
            Image.fromarray(np.concatenate(columns, axis=1)).save(temporary, "PNG")


def _vectors(table: AdapterTable, person: int | None) -> list[torch.Tensor]:
    """(face [512], body [D]) from all photos of a person; None: the null condition."""
    import torch

    from bolid.train_adapter.data import fuse_context

    if person is None:
        return [torch.zeros_like(table.face[0]), torch.zeros_like(table.body_mean[0])]
    rows = torch.from_numpy(table.people[person])[None]
    body, _logvar, face = fuse_context(table, rows, torch.ones_like(rows))
    return [face[0], body[0]]
