"""`bolid train-adapter`: training shards, a body encoder and a frozen base in; adapter/{face,body}.safetensors out.

Both branches are trained together, leave-one-out (BoLID section 3): the photo to be denoised is never part of its own
condition. The body comes from some *other* photos of the person, fused by the frozen body encoder; the face is the
mean over the other photos. So a condition holds only what stays the same from photo to photo: who it is.

Everything random about a photo comes from its place in the run, not from the batch it is in. So the same command gives
the same training after a kill. It gives the same up to rounding when a batch is shared by processes or taken in parts.

Where things are: config.py the settings, setup.py models and branches, data.py the batches, denoiser.py the UNet,
objective.py Eq. 14, pixel_losses.py L_id and L_CLIP, rollouts.py x_gen, learner.py the optimizer, training.py the
parts of a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bolid.errors import BolidError
from bolid.run import Progress, only_writer, pick_device
from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.training import Training, start_processes


@dataclass(frozen=True)
class TrainAdapterResult:
    """What a training wrote, and how it ended."""

    face: Path
    body: Path
    steps: int
    seconds: float
    people: int
    photos: int
    loss: float  # moving average over the last steps
    learning_rate: float  # of the last step
    already_done: bool = False  # nothing was trained: `out` holds this very training's result


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
    say: Callable[[str], None] | None = None,
) -> TrainAdapterResult:
    """Train both branches, or one, on `train`'s shards and write both to `out`.

    The same call after a kill goes on; after the end it returns at once, `already_done`. With `config.schedule`
    "constant", a call with more steps goes on after the end, to the bytes of one training of that length.
    `stop_after`: write them as they are after so many of the steps (their records have that as "steps_done") and stop;
    a call without it goes on from there. Also in `out`: log.jsonl and loss.png (the losses), samples/ (contact sheets),
    and while it runs a checkpoint.
    Several processes that `accelerate launch` starts share the work; the main one writes. `say`: called with lines
    about what each branch has to learn from, before the first step.
    Raises BolidError when shards, body encoder and family do not belong together, and where `out` holds another
    training's adapter.
    """
    if stop_after is not None and stop_after < 1:
        raise BolidError(f"--stop-after is {stop_after}", "give at least 1")
    accelerator, config = start_processes(pick_device(device)), config or TrainAdapterConfig()
    with only_writer(out, folder=True) if accelerator.is_main_process else contextlib.nullcontext():
        training = Training(
            accelerator, train, Path(out), config, body_encoder, family, seed, stop_after, progress, say
        )
        return _run(training)


def _run(training: Training) -> TrainAdapterResult:
    """Take the steps that are left, and write what has been learnt."""
    if training.already_done:
        return TrainAdapterResult(**training.earlier_result(), already_done=True)

    learner = training.learner
    while learner.step < training.last:
        # Learning rate of this step.
        learner.start_step()

        # Gradient of L = L_diff + id_weight L_id + clip_weight L_CLIP (Eq. 14).
        terms = training.accumulate_gradients()

        # Update the weights and their moving average.
        learner.finish_step()

        # Log; sample; checkpoint.
        checkpoint_due = training.report(terms)
        training.sample()
        if checkpoint_due:
            training.save_checkpoint()

    return TrainAdapterResult(**training.save())
