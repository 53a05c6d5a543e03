"""The training loop: resuming, stopping, parts of batches, processes, precision."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from adapter_world import CONFIG, Killed, adapters, apart, command, kill_at, run
from typer.testing import CliRunner

from bolid.errors import BolidError
from bolid.formats.adapter import load_adapter
from bolid.formats.tensors import read_record
from bolid.method.body_condition import BRANCHES
from bolid.train_adapter import train_adapter
from bolid.train_adapter.precision import choose_precision, computing, store_frozen
from bolid_cli.main import app

VARIANTS = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16, in parts, checkpointed": {
        "precision": "bf16", "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "min_snr_gamma": 5.0,
    },
    "all three losses": {
        "id_weight": 1.0, "clip_weight": 0.1, "clip_target": "both", "pixel_every": 2, "pixel_alpha_bar": 0.0,
    },
    "few steps": {"id_weight": 1.0, "id_loss": "bone-ratios", "x_gen": "few-step", "pixel_every": 1},
    "sampled": {
        "id_weight": 1.0, "id_loss": "body", "clip_weight": 0.1, "x_gen": "sampled", "x_gen_grad_steps": 2,
        "pixel_every": 1,
    },
    "face": {"face_weight": 1.0, "face_detection_weight": 0.2, "x_gen": "sampled", "pixel_every": 2},
    "low rank": {"precision": "bf16", "kv_rank": 4, "text_cache": 0.0},
    "compiled": {"precision": "bf16", "compile": True},
}  # fmt: skip


QUICK = ("bf16",)


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in VARIANTS]
)
def test_a_killed_training_goes_on_to_the_same_bytes(request, tmp_path, variant):
    world = request.getfixturevalue("shallow" if variant == "compiled" else "with_models")
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    whole = run(world, tmp_path / "whole", config)
    with pytest.raises(Killed):
        run(world, tmp_path / "killed", config, progress=kill_at(3))
    assert not (tmp_path / "killed" / "body.safetensors").exists()
    steps = []
    run(world, tmp_path / "killed", config, progress=lambda d, t, x: steps.append((d, x)))
    assert [step for step, text in steps if text.startswith("loss")] == [3, 4]
    for branch in BRANCHES:
        name = f"{branch}.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "killed" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    with_pixels = [line["step"] for line in lines if "diffusion" in line]
    assert with_pixels == {
        "all three losses": [1, 3],
        "few steps": [1, 2, 3, 4],
        "sampled": [1, 2, 3, 4],
        "face": [1, 3],
    }.get(variant, [])
    assert not list((tmp_path / "killed").glob(".*")) and whole.steps == 4


@pytest.mark.slow
def test_a_training_that_is_stopped_early_gives_what_there_is_and_goes_on(world, trained, tmp_path):
    whole, out = trained, tmp_path / "out"
    stopped = run(world, out, stop_after=2)
    assert stopped.steps == 2 and whole.learning_rate < stopped.learning_rate <= CONFIG.learning_rate
    early = adapters(out)
    assert read_record(out / "body.safetensors")["config"]["steps_done"] == 2
    assert len((out / "log.jsonl").read_text().splitlines()) == 2 and (out / "loss.png").exists()
    assert run(world, out, stop_after=2).steps == 2 and torch.equal(adapters(out), early)
    with pytest.raises(BolidError, match="--stop-after is 1, and .*out is at step 2"):
        run(world, out, stop_after=1)
    with pytest.raises(BolidError, match="--stop-after is 0"):
        run(world, out, stop_after=0)
    with pytest.raises(BolidError, match="face.safetensors is of another training: different learning_rate$"):
        run(world, whole.face.parent, dataclasses.replace(CONFIG, learning_rate=0.25))
    on = run(world, out)
    assert on.steps == whole.steps == 4 and on.learning_rate == whole.learning_rate
    for name in ("face.safetensors", "body.safetensors", "log.jsonl"):
        assert (whole.face.parent / name).read_bytes() == (out / name).read_bytes()
    assert not torch.equal(adapters(out), early) and not list(out.glob(".*"))


def test_a_finished_training_is_not_repeated(world, trained):
    out = trained.face.parent
    made = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = run(world, out, progress=lambda *_: pytest.fail("it trains again"))
    assert again == dataclasses.replace(trained, seconds=0.0, already_done=True) and not trained.already_done
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == made
    with pytest.raises(BolidError, match="is of another training: different steps$") as error:
        run(world, out, dataclasses.replace(CONFIG, steps=6))
    assert f"--init {out}" in error.value.hint and "--schedule constant" in error.value.hint


def test_a_kill_at_the_very_end_leaves_no_checkpoint(world, trained, tmp_path):
    """Between the last adapter and the checkpoint's removal: the next run removes it."""
    shutil.copytree(trained.face.parent, tmp_path / "out")
    for name in (".checkpoint.safetensors", ".bodies.safetensors"):
        (tmp_path / "out" / name).touch()
    assert run(world, tmp_path / "out").already_done and not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
def test_a_finished_training_goes_on_with_more_steps(world, tmp_path):
    """As one training of that length, to the byte; a kill between the two files at its end does no harm."""
    constant = dataclasses.replace(CONFIG, schedule="constant")
    whole, parts = run(world, tmp_path / "whole", constant), tmp_path / "parts"
    run(world, parts, dataclasses.replace(constant, steps=2))
    body, steps = (parts / "body.safetensors").read_bytes(), []
    for trained in ([3, 4], []):
        steps.clear()
        result = run(world, parts, constant, progress=lambda d, t, x: steps.append((d, x)))
        assert [step for step, text in steps if text.startswith("loss")] == trained and result.loss == whole.loss
        for name in ("face.safetensors", "body.safetensors", "log.jsonl"):
            assert (parts / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        (parts / "body.safetensors").write_bytes(body)


@pytest.mark.slow
def test_kill_9_and_the_same_command_go_on_to_the_same_bytes(world, tmp_path):
    """A real process, with as many threads as this one, is killed at some moment after its first checkpoint."""

    def command_to(out: Path) -> list[str]:
        words = command(world, out, "--quiet")
        words[words.index("--steps") + 1] = "20"
        return words

    words = command_to(tmp_path / "killed")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-m", "bolid_cli.main", *words], env={**os.environ, **threads})
    checkpoint = tmp_path / "killed" / ".checkpoint.safetensors"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and checkpoint.exists()
    for same in (words, command_to(tmp_path / "whole")):
        assert CliRunner().invoke(app, same, prog_name="bolid").exit_code == 0
    for name in ("face.safetensors", "body.safetensors", "log.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.slow
def test_a_batch_taken_in_parts_is_the_whole_batch(with_models, tmp_path):
    """Up to rounding; and another seed is far off, so that the measure means something."""
    config = dataclasses.replace(
        CONFIG, precision="fp32", learning_rate=0.01, id_weight=1.0, pixel_every=1, pixel_alpha_bar=0.2
    )
    run(with_models, tmp_path / "start", dataclasses.replace(config, learning_rate=0.0, batch_size=1))
    whole = run(with_models, tmp_path / "whole", dataclasses.replace(config, batch_size=6))
    parts = run(with_models, tmp_path / "parts", dataclasses.replace(config, gradient_accumulation_steps=2))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    start, one, two = (adapters(tmp_path / name) for name in ("start", "whole", "parts"))
    assert apart(one, two, start) < 0.01
    train_adapter(
        with_models.train, tmp_path / "other", config=dataclasses.replace(config, batch_size=6),
        body_encoder=with_models.encoder, device="cpu", seed=6,
    )  # fmt: skip
    assert apart(one, adapters(tmp_path / "other"), start) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--shard-branches", "--sample-every", "2"]], ids=["whole", "sharded"])
def test_two_processes_are_one_with_twice_the_batch(world, tmp_path, extra):
    """`accelerate launch --multi_gpu --num_processes 2 ... --device cpu`: over gloo. (Its own --cpu would need MPI.)"""
    config = dataclasses.replace(CONFIG, precision="fp32", learning_rate=0.01)
    run(world, tmp_path / "start", dataclasses.replace(config, learning_rate=0.0, batch_size=1, steps=1))
    one = run(world, tmp_path / "one", dataclasses.replace(config, batch_size=6))
    words = [*command(world, tmp_path / "two", "--quiet"), *extra]
    words[words.index("--precision") + 1] = "fp32"
    words[words.index("--learning-rate") + 1] = "0.01"
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
            "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "bolid_cli.main", *words,
        ],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 4 and result["loss"] == pytest.approx(one.loss, rel=1e-5), "one process speaks"
    settings = load_adapter(tmp_path / "two" / "body.safetensors", "body")[1]["config"]
    assert settings["processes"] == 2 and settings["shard_branches"] == bool(extra)
    start, single, double = (adapters(tmp_path / name) for name in ("start", "one", "two"))
    assert apart(single, double, start) < 0.01


def test_half_precision_computes_only_what_autocast_would():
    """Frozen layers kept in bf16 change no number; norms and trained layers stay float32."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 1)
    ).requires_grad_(False)
    network[3].requires_grad_(True)
    pictures = torch.randn(2, 3, 9, 9)

    def run():
        with computing(torch.device("cpu"), "bf16", 64):
            output = network(pictures)
        network.zero_grad()
        output.float().square().mean().backward()
        return output, network[3].weight.grad.clone()

    before = run()
    store_frozen(network, "bf16")
    after = run()
    assert [layer.weight.dtype for layer in (network[0], network[1], network[3])] == [
        torch.bfloat16, torch.float32, torch.float32,
    ]  # fmt: skip
    assert after[0].dtype == torch.bfloat16 and after[1].dtype == torch.float32
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.slow
def test_half_precision_trains_almost_to_the_same_loss(world, tmp_path):
    full = run(world, tmp_path / "full", dataclasses.replace(CONFIG, precision="fp32"))
    half = run(world, tmp_path / "half", dataclasses.replace(CONFIG, precision="bf16"))
    assert half.loss != full.loss and half.loss == pytest.approx(full.loss, rel=0.02)
    assert load_adapter(half.body, "body")[1]["config"]["precision"] == "bf16"


def test_precision_that_the_device_cannot_train_in():
    assert choose_precision("auto", "cpu") in ("fp32", "bf16") and choose_precision("bf16", "cpu") == "bf16"
    with pytest.raises(BolidError, match="--precision fp16 does not train on cpu") as error:
        choose_precision("fp16", "cpu")
    assert "bf16" in error.value.hint
