"""Training checkpoints: parameters, optimizer moments and the step, as safetensors, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bolid.errors import BolidError
from bolid.formats.tensors import load_tensors, read_record, save_tensors
from bolid.run import remove_leftovers, run_differences

KIND = "checkpoint"
STEPS_DONE = "steps_done"  # in the config of a result that was written before the last step


def save_checkpoint(
    path: str | os.PathLike[str],
    step: int,
    record: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    write: bool = True,
) -> None:
    """Write a checkpoint. `record`: the run record of the training; `tensors`: all that a step changes, by name.

    The optimizer must have been made from one list of parameters; its state is stored by their position. With tensors
    sharded over processes, every process calls this and one has `write`; the file does not depend on the sharding.
    """
    moments = {
        f"optimizer.{index}.{name}": whole(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    record = {**record, "kind": KIND, "of": record["kind"], "step": step}
    contents = {**{f"tensors.{name}": whole(value) for name, value in tensors.items()}, **moments}
    if write:
        save_tensors(path, contents, record)


def load_checkpoint(
    path: str | os.PathLike[str],
    record: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Load a checkpoint into `tensors` (in place) and `optimizer`; returns the step, 0 without a file.

    Raises BolidError when the checkpoint belongs to another run (other data, family, settings or seed). With the
    constant schedule the number of steps may differ, but not be below what the checkpoint has done.
    """
    path = Path(path)
    remove_leftovers(path)
    if not path.exists():
        return 0
    stored, found = load_tensors(path, KIND)
    changed = run_differences(found, record)
    if _can_go_on(changed, record):
        steps = record["config"]["steps"]
        if found["step"] > steps:
            raise BolidError(f"{path} has done {found['step']} steps, more than {steps}", "give more --steps")
    elif changed:
        raise BolidError(
            f"{path} is the checkpoint of another run: different {', '.join(changed)}",
            "repeat that command as it was to go on with it, choose another --out, or remove the checkpoint",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(spread(stored[f"tensors.{name}"], like=tensor))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in stored.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:
                # Files hold contiguous tensors; fused optimizers need moments in the parameter's memory layout.
                value = torch.empty_like(parameter, requires_grad=False).copy_(spread(value, like=parameter))
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(found["step"])


def _can_go_on(changed: list[str], record: dict[str, Any]) -> bool:
    """Whether a run that differs by this only is a shorter one of the same training, by its schedule."""
    return changed == ["steps"] and record["config"].get("schedule") == "constant"


def check_result(
    path: str | os.PathLike[str], record: dict[str, Any], checkpoint: Path, init: str | os.PathLike[str] = ""
) -> bool:
    """Whether `path`, which this run would write, is its finished result. False where it is that of a shorter run
    whose `checkpoint` this one goes on from.

    Raises BolidError when it is the result of another run. `init`: what to give --init to train on from it.
    """
    path = Path(path)
    remove_leftovers(path)
    if not path.exists():
        return False
    found = read_record(path)
    config = dict(found.get("config", {}))
    finished = config.pop(STEPS_DONE, None) is None
    if changed := run_differences({**found, "config": config}, record):
        hint = "choose another --out, or remove what is there"
        if _can_go_on(changed, record) and checkpoint.exists() and config.get("steps", 0) < record["config"]["steps"]:
            return False
        if changed == ["steps"]:
            why = "its learning rate has fallen to the end; only --schedule constant goes on with more --steps. T"
            why = why if config.get("schedule") != "constant" else "t"
            hint = f"{why}o train on from it give --init {init or path} and another --out; to start anew, remove it"
        raise BolidError(f"{path} is of another training: different {', '.join(changed)}", hint)
    return finished


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that is sharded over processes; all of them must call this together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor`, sharded like `like`: the part of this process."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
