"""Tensors that are spread over processes: checkpoints do not tell how, and go on in any number of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bolid.formats.checkpoint import load_checkpoint, save_checkpoint, spread, whole
from bolid.run import run_record

SCRIPT = """
import os
import sys
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, {tests!r})
from test_fsdp import RECORD, new_network, tensors_of, train
from bolid.formats.checkpoint import load_checkpoint, save_checkpoint

distributed.init_process_group("gloo")
rank = distributed.get_rank()
def sharded(seed):
    network = new_network(seed)
    for layer in network:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    return network, torch.optim.AdamW(network.parameters(), lr=0.1)
network, optimizer = sharded(0)
train(network, optimizer, 3)
save_checkpoint({path!r} + ".3", 3, RECORD, tensors_of(network), optimizer, write=rank == 0)
train(network, optimizer, 2)
save_checkpoint({path!r} + ".5", 5, RECORD, tensors_of(network), optimizer, write=rank == 0)
distributed.barrier()
network, optimizer = sharded(1)
assert load_checkpoint({path!r} + ".3", RECORD, tensors_of(network), optimizer) == 3
train(network, optimizer, 2)
save_checkpoint({path!r} + ".resumed", 5, RECORD, tensors_of(network), optimizer, write=rank == 0)
distributed.barrier()
distributed.destroy_process_group()
os._exit(0)  # torch's threads may abort a process that ends in the usual way: the files are what is tested
"""

RECORD = run_record("adapter", family="tiny")


def new_network(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))


def tensors_of(network):
    return dict(network.named_parameters())


def train(network, optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_two_and_in_one(tmp_path):
    import pathlib

    path = tmp_path / "checkpoint.safetensors"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(pathlib.Path(__file__).parent), path=str(path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(launch, check=True, timeout=240)

    whole_run, resumed = (path.with_name(path.name + end).read_bytes() for end in (".5", ".resumed"))
    assert resumed == whole_run
    network = new_network(2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    assert load_checkpoint(path.with_name(path.name + ".3"), RECORD, tensors_of(network), optimizer) == 3
    train(network, optimizer, 2)
    save_checkpoint(path.with_name("alone"), 5, RECORD, tensors_of(network), optimizer)
    expected = new_network(3)
    load_checkpoint(
        path.with_name(path.name + ".5"), RECORD, tensors_of(expected), torch.optim.AdamW(expected.parameters())
    )
    for one, two in zip(network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_what_is_not_spread_stays_as_it_is():
    tensor = torch.arange(3.0)
    assert whole(tensor) is tensor and spread(tensor, like=torch.zeros(3)) is tensor
