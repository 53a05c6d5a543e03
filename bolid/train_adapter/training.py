"""A training of the adapters, step by step: `command.py` calls these methods in a loop that reads like the paper."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.run import Progress, derive_seed
from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.data import draw_batch, draw_rows, photo_generators, save_bodies, what_is_learnt
from bolid.train_adapter.reports import Log, sample_sheet
from bolid.train_adapter.setup import (
    BRANCHES,
    BranchParameters,
    drop_text_encoders,
    install_branches,
    load_models,
    make_objective,
    make_records,
    read_photos,
)


class Training:
    """Everything that a training needs between two of its steps."""

    def __init__(
        self, accelerator: Any, train: str | Path, out: Path, config: TrainAdapterConfig,
        body_encoder: str | Path | None, family: str | None, seed: int, stop_after: int | None,
        progress: Progress | None, say: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        from accelerate.utils import set_seed

        from bolid.train_adapter.precision import choose_precision

        self.out, self.seed, self.progress, self.say = out, seed, progress, say
        self.accelerator, self.device = accelerator, accelerator.device
        self.processes, self.main = self.accelerator.num_processes, self.accelerator.is_main_process
        self.config = dataclasses.replace(config, precision=choose_precision(config.precision, str(self.device)))
        set_seed(derive_seed(seed, "train-adapter") % 2**32)

        # The frozen models, and what the files are to record of them.
        self.models = load_models(train, self.config, body_encoder, family, str(self.device))
        self.records = make_records(train, self.models, self.config, self.processes, seed)
        self.record = {**self.records["face"], "kind": "adapter"}  # of the checkpoint
        self.checkpoint, self.bodies = out / ".checkpoint.safetensors", out / ".bodies.safetensors"
        self.paths = {branch: out / f"{branch}.safetensors" for branch in BRANCHES}
        self.already_done = results_are_there(self.paths, self.records, self.checkpoint)
        if not self.already_done:
            self._prepare(train, stop_after)
        elif self.main and config.schedule != "constant":
            self._remove_checkpoint()

    def _prepare(self, train: str | Path, stop_after: int | None) -> None:
        """The photos, the objective, the branches and what trains them."""
        from bolid.train_adapter.learner import Learner

        config, unet = self.config, self.models.pipe.unet
        self.table = read_photos(train, self.models, config, self.progress if self.main else None, self.bodies)
        if self.main and self.say is not None:
            for line in what_is_learnt(self.table):
                self.say(line)
        self.objective = make_objective(self.models, self.table, config, self.device)
        drop_text_encoders(self.models.pipe, self.objective.denoiser.text_states)
        self.branches = install_branches(self.models, config, self.seed)
        self.sharded = config.shard_branches and self.processes > 1
        if self.sharded:
            self.branches = shard(unet, self.device.type)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        parameters = {f"{branch}.{name}": p for branch, ps in self.branches.items() for name, p in ps.items()}
        for name, parameter in parameters.items():
            parameter.requires_grad_(config.learns(name.partition(".")[0]))
        self.learner = Learner(parameters, config, self.device.type)
        self.learner.load(self.checkpoint, self.record)
        self.last = config.steps if stop_after is None else min(stop_after, config.steps)
        if self.learner.step > self.last:
            raise BolidError(
                f"--stop-after is {stop_after}, and {self.out} is at step {self.learner.step}",
                "give more, or leave it out",
            )
        self.network = unet if self.sharded else self.accelerator.prepare(unet)
        self.objective.denoiser.network = compiled(self.network) if config.compile else self.network
        self.log = Log(self.out, self.learner.step, config.tensorboard) if self.main else None
        if self.main:
            save_bodies(self.bodies, self.table, train, self.models.body_encoder)
        self.started = self.saved = time.monotonic()

    # ---- one step -------------------------------------------------------------------------------------------------

    def accumulate_gradients(self) -> dict[str, Any]:
        """Eq. 14 and its gradient over the batches of a step; the terms' means."""
        from bolid.train_adapter.precision import attention_kernel

        config, step, count = self.config, self.learner.step, self.config.gradient_accumulation_steps
        terms: dict[str, Any] = {}
        for part in range(count):
            number = (step * count + part) * self.processes + self.accelerator.process_index  # in the whole run
            rows = draw_rows(self.table, config, number, self.seed)
            generators = photo_generators(self.seed, number * config.batch_size, config.batch_size)
            batch = draw_batch(self.table, rows, config, generators)
            with contextlib.ExitStack() as stack:
                if part < count - 1:
                    stack.enter_context(self.accelerator.no_sync(self.network))
                values = self.objective(batch, with_pixels=config.pixels and step % config.pixel_every == 0)
                stack.enter_context(attention_kernel(self.device, config.precision, self.objective.denoiser.positions))
                self.learner.scaler.backward(values["loss"] / count)
            for name, value in values.items():
                terms[name] = terms.get(name, 0) + value.detach() / count
        return terms

    def report(self, terms: dict[str, Any]) -> bool:
        """Log the terms, averaged over the processes; whether a checkpoint is due (the main process's clock says).

        Raises BolidError when the loss is not finite.
        """
        import torch

        step, due = self.learner.step, time.monotonic() - self.saved > 60 * self.config.checkpoint_minutes
        values = torch.stack([*terms.values(), torch.tensor(float(self.main and due), device=self.device)])
        *means, due = self.accelerator.reduce(values, "mean").tolist()
        if not math.isfinite(means[0]):
            raise BolidError(f"the training diverged at step {step}", "lower --learning-rate")
        recent = self.learner.note_loss(means[0])
        if self.log is not None:
            self.log.write(step, dict(zip(terms, means, strict=True)))
            if self.progress is not None:
                self.progress(step, self.config.steps, f"loss {recent:.4f}")
        return bool(due)

    def sample(self) -> None:
        """A contact sheet of samples, made with the moving average, where one is due."""
        from bolid.method.optim import ema_weights
        from bolid.train_adapter.precision import computing

        step, every = self.learner.step, self.config.sample_every
        if not every or (step % every and step != self.last) or not (self.main or self.sharded):
            return
        path = self.out / "samples" / f"step-{step:06d}.png" if self.main else None
        denoiser, learner = self.objective.denoiser, self.learner
        with (
            computing(self.device, self.config.precision, denoiser.positions),
            ema_weights(learner.parameters, learner.average),
        ):
            sample_sheet(self.models.pipe, self.models.family, self.table, denoiser.text_states, path, self.seed)
        if self.log is not None:
            self.log.draw()

    def save_checkpoint(self) -> None:
        """Branches that are spread over all processes are put together by all."""
        if not (self.main or self.sharded):
            return
        if self.log is not None:
            self.log.flush()
        self.learner.save(self.checkpoint, self.record, write=self.main)
        self.saved = time.monotonic()

    # ---- the end --------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Write both adapters from the moving average, and a checkpoint if it can go on; the result's fields."""
        from bolid.formats.adapter import save_adapter
        from bolid.formats.checkpoint import STEPS_DONE, whole
        from bolid.method.body_condition import merge_kv

        step, learner = self.learner.step, self.learner
        goes_on = step < self.config.steps or self.config.schedule == "constant"
        if goes_on:
            self.save_checkpoint()
        metrics = {
            "people": len(self.table.people), "photos": len(self.table.captions), "loss": float(learner.recent_loss),
        }  # fmt: skip
        average = {name: whole(tensor) for name, tensor in learner.average.items()}
        if self.log is not None:
            self.log.close()
            for branch in BRANCHES:
                record = {**self.records[branch], "metrics": metrics}
                if step < self.config.steps:
                    record["config"] = {**record["config"], STEPS_DONE: step}
                flat = merge_kv({name: average[f"{branch}.{name}"] for name in self.branches[branch]})
                save_adapter(self.paths[branch], {name: tensor.half() for name, tensor in flat.items()}, record)
            if not goes_on:
                self._remove_checkpoint()
        self.accelerator.wait_for_everyone()
        return self._result(metrics, step, time.monotonic() - self.started)

    def _remove_checkpoint(self) -> None:
        for path in (self.checkpoint, self.bodies):
            path.unlink(missing_ok=True)

    def earlier_result(self) -> dict[str, Any]:
        """The result's fields, of the training that has been finished before."""
        from bolid.formats.tensors import read_record

        return self._result(read_record(self.paths["face"])["metrics"], self.config.steps, 0.0)

    def _result(self, metrics: dict[str, Any], step: int, seconds: float) -> dict[str, Any]:
        from bolid.method.optim import adapter_schedule

        rate = self.config.learning_rate * adapter_schedule(step - 1, self.config.steps, self.config.schedule)
        return {**self.paths, **metrics, "steps": step, "seconds": seconds, "learning_rate": rate}


def start_processes(device: str) -> Any:
    """The Accelerator of this process. Raises BolidError for a way to share work that the loop does not know."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")  # autocast is ours: precision.py
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise BolidError(
            f"train-adapter does not run under accelerate's {accelerator.distributed_type.value}",
            "run accelerate launch with --multi_gpu, and train-adapter with --shard-branches",
        )
    return accelerator


def results_are_there(paths: dict[str, Path], records: dict[str, dict[str, Any]], checkpoint: Path) -> bool:
    """Whether this very training has been finished. Raises BolidError where another one's adapter lies."""
    from bolid.formats.checkpoint import check_result

    return all([check_result(path, records[branch], checkpoint, init=path.parent) for branch, path in paths.items()])


def shard(unet: Any, device: str) -> BranchParameters:
    """Spread the branches over all processes (FSDP); their parameters are new ones then."""
    from bolid.method.body_condition import branch_parameters
    from bolid.train_adapter.fsdp import shard_branches

    shard_branches(unet, device)
    return dict(zip(BRANCHES, branch_parameters(unet, len(BRANCHES)), strict=True))


def compiled(network: Any) -> Any:
    """The network behind torch.compile."""
    import torch

    return torch.compile(network)
