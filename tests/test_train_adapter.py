from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_base import make_body_encoder, make_family, make_training_shards

from bolid.backends.body import BodyEncoder, fuse_views
from bolid.backends.face import DifferentiableFaces
from bolid.errors import BolidError
from bolid.formats.adapter import load_adapter
from bolid.formats.sliders import Sliders, save_sliders
from bolid.formats.tensors import read_record
from bolid.method.body_condition import BRANCHES, null_condition
from bolid.run import run_record
from bolid.train_adapter.command import train_adapter
from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.data import (
    TextStates,
    batch_rows,
    draw_batch,
    draw_rows,
    fuse_context,
    fused_bodies,
    photo_generators,
    read_table,
    without_build,
)
from bolid.train_adapter.objective import (
    SWAPPED_ALPHA_BAR,
    Objective,
    few_step_sampler,
    person_bodies,
    photos_of_bodies,
)
from bolid.train_adapter.pixel_losses import PixelLosses, heads, through_windows
from bolid.train_adapter.plan import plan_training
from bolid.train_adapter.precision import choose_precision, computing, store_frozen

CONFIG = TrainAdapterConfig(
    steps=4, batch_size=3, face_tokens=2, sample_every=0, checkpoint_minutes=0.0, learning_rate=0.05
)


class Killed(Exception):
    pass


@dataclasses.dataclass
class World:
    family: str
    train: object
    encoder: object


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapter")
    family = make_family(root)
    return World(
        family, make_training_shards(root / "train", family), make_body_encoder(root / "enc.safetensors", family)
    )


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """The same with the tiny family's pose, image-text and face models beside the random base."""
    from bolid.models.families import get_family

    root, tiny = tmp_path_factory.mktemp("seeing"), get_family("tiny")
    family = make_family(root)
    with open(family, "a") as file:
        file.write("".join(f"{part} = '{getattr(tiny, part)}'\n" for part in ("pose", "image_text", "face")))
    return World(
        family, make_training_shards(root / "train", family), make_body_encoder(root / "enc.safetensors", family)
    )


@pytest.fixture(scope="module")
def table(world):
    return read_table(world.train, BodyEncoder(world.encoder))


def run(world, out, config=CONFIG, **more):
    return train_adapter(world.train, out, config=config, body_encoder=world.encoder, device="cpu", seed=5, **more)


def command(world, out, *more: str) -> list[str]:
    """Arguments of `bolid train-adapter` that say the same as `run`."""
    options = {**dataclasses.asdict(CONFIG), "body_encoder": world.encoder, "out": out, "device": "cpu", "seed": 5}
    words = ["train-adapter", str(world.train), "--json", *more]
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def adapters(out) -> torch.Tensor:
    """All trained numbers of a folder, in one vector."""
    parts = [load_adapter(out / f"{branch}.safetensors", branch)[0] for branch in BRANCHES]
    return torch.cat([value.float().flatten() for part in parts for _, value in sorted(part.items())])


def apart(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor) -> float:
    """The distance of two trainings' results, relative to how far they have moved."""
    return float((a - b).norm() / (a - start).norm())


def kill_at(step: int):
    def progress(done, total, text):
        if text.startswith("loss") and done == step:
            raise Killed

    return progress


# ---- what a photo is conditioned on -------------------------------------------------------------------------------


def test_a_photo_is_never_in_its_own_context(table):
    owner = {row: person for person, rows in enumerate(table.people) for row in rows}
    sizes = set()
    for step in range(30):
        rows = np.random.default_rng(step).permutation(len(table.captions))[:6]
        batch = draw_batch(table, rows, CONFIG, photo_generators(0, step * 6, 6))
        for row, context, present in zip(batch.rows, batch.context, batch.present, strict=True):
            used = context[present].tolist()
            assert used and row not in used and len(set(used)) == len(used)
            assert {owner[other] for other in used} == {owner[row]}
            sizes.add(len(used))
    assert sizes == {1, 2, 3}


def test_a_photos_own_face_and_body_do_not_reach_its_condition(table):
    """Changing everything that is known of the target changes nothing in its embeds."""
    rows = np.array([0])
    before = draw_batch(table, rows, CONFIG, photo_generators(1, 0, 1))
    mean, face = table.body_mean.clone(), table.face.clone()
    mean[0], face[0] = 100.0, 100.0
    other = dataclasses.replace(table, body_mean=mean, face=face)
    after = draw_batch(other, rows, CONFIG, photo_generators(1, 0, 1))
    assert torch.equal(before.body_embeds, after.body_embeds) and torch.equal(before.face_embeds, after.face_embeds)


def test_conditions_are_dropped_each_alone_and_all_together(table):
    def batch(**dropout):
        none = {"text_dropout": 0.0, "face_dropout": 0.0, "body_dropout": 0.0, "all_dropout": 0.0} | dropout
        return draw_batch(table, np.arange(4), dataclasses.replace(CONFIG, **none), photo_generators(0, 0, 4))

    kept = batch()
    assert all(kept.captions) and kept.face_embeds.any() and kept.body_embeds.any()
    assert batch(text_dropout=1.0).captions == [""] * 4
    assert torch.equal(batch(face_dropout=1.0).face_embeds, null_condition(kept.face_embeds))
    assert torch.equal(batch(body_dropout=1.0).body_embeds, null_condition(kept.body_embeds))
    nothing = batch(all_dropout=1.0)
    assert nothing.captions == [""] * 4 and not nothing.face_embeds.any() and not nothing.body_embeds.any()


def test_no_face_in_the_others_is_the_null_condition(table):
    blind = dataclasses.replace(table, face=torch.zeros_like(table.face))
    batch = draw_batch(blind, np.arange(4), CONFIG, photo_generators(0, 0, 4))
    assert torch.equal(batch.face_embeds, null_condition(batch.face_embeds))


def test_what_is_random_about_a_photo_does_not_depend_on_its_batch(table):
    rows = np.array([0, 5, 7, 2])
    whole = draw_batch(table, rows, CONFIG, photo_generators(3, 8, 4))
    half = draw_batch(table, rows[2:], CONFIG, photo_generators(3, 10, 2))
    assert torch.equal(whole.body_embeds[2:], half.body_embeds) and whole.captions[2:] == half.captions
    assert torch.equal(whole.context[2:], half.context)


def test_build_words_leave_the_caption():
    assert without_build("a photo of a tall slim woman waving") == "a photo of a woman waving"
    assert without_build("a man, in a short-sleeved top") == "a man, in a short-sleeved top"
    assert without_build("a woman with short hair") == "a woman with short hair"


def test_every_photo_comes_once_an_epoch():
    rows = np.concatenate([batch_rows(10, 4, step, seed=0) for step in range(5)])
    assert sorted(rows[:10]) == list(range(10)) == sorted(rows[10:])


def test_part_of_each_batch_is_close_ups(table):
    confidence, face = table.confidence.clone(), torch.zeros_like(table.face)
    confidence[:] = 0.9
    confidence[2:8] = 0.3
    face[3:] = 1.0
    table = dataclasses.replace(table, confidence=confidence, face=face)
    assert table.close_ups.tolist() == [3, 4, 5, 6, 7]
    config = dataclasses.replace(CONFIG, batch_size=10)
    few = [draw_rows(table, dataclasses.replace(config, close_ups=0.5), number, seed=0) for number in range(2)]
    assert all(sorted(rows[:5]) == [3, 4, 5, 6, 7] for rows in few), "each once an epoch"
    assert few[0][:5].tolist() != few[1][:5].tolist()
    for number, rows in enumerate(few):
        plain = draw_rows(table, config, number, seed=0)
        assert rows[5:].tolist() == plain[5:].tolist() and rows[:5].tolist() != plain[:5].tolist()


def test_close_ups_are_asked_for_in_vain(world, tmp_path):
    with pytest.raises(BolidError, match="--close-ups 0.5: no photo in .* shows a face and little of a body"):
        run(world, tmp_path / "out", dataclasses.replace(CONFIG, close_ups=0.5))
    assert not (tmp_path / "out").exists()


# ---- training -----------------------------------------------------------------------------------------------------


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
    "swapped": {"id_weight": 1.0, "id_loss": "body", "x_gen": "swapped", "pixel_every": 1},
    "face": {"face_weight": 1.0, "found_weight": 0.2, "x_gen": "sampled", "pixel_every": 2},
    "low rank": {"precision": "bf16", "kv_rank": 4, "text_cache": 0.0},
    "compiled": {"precision": "bf16", "compile": True},
}  # fmt: skip


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] if v == "compiled" else []) for v in VARIANTS]
)
def test_a_killed_training_goes_on_to_the_same_bytes(seeing, tmp_path, variant):
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    whole = run(seeing, tmp_path / "whole", config)
    with pytest.raises(Killed):
        run(seeing, tmp_path / "killed", config, progress=kill_at(3))
    assert not (tmp_path / "killed" / "body.safetensors").exists()
    seen = []
    run(seeing, tmp_path / "killed", config, progress=lambda d, t, x: seen.append(d) if x.startswith("loss") else None)
    assert seen == [3, 4]
    for branch in BRANCHES:
        name = f"{branch}.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "killed" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    looked = [line["step"] for line in lines if "id" in line]
    assert looked == {
        "all three losses": [1, 3],
        "few steps": [1, 2, 3, 4],
        "sampled": [1, 2, 3, 4],
        "swapped": [1, 2, 3, 4],
        "face": [1, 3],
    }.get(variant, [])
    assert not list((tmp_path / "killed").glob(".*")) and whole.steps == 4


def test_a_training_that_is_stopped_early_gives_what_there_is_and_goes_on(world, tmp_path):
    whole, out = run(world, tmp_path / "whole"), tmp_path / "out"
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
        run(world, tmp_path / "whole", dataclasses.replace(CONFIG, learning_rate=0.25))
    on = run(world, out)
    assert on.steps == whole.steps == 4 and on.learning_rate == whole.learning_rate
    for name in ("face.safetensors", "body.safetensors", "log.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (out / name).read_bytes()
    assert not torch.equal(adapters(out), early) and not list(out.glob(".*"))


@pytest.mark.slow
def test_kill_9_and_the_same_command_go_on_to_the_same_bytes(world, tmp_path):
    """Real processes, with the same number of threads; one is killed at some moment after its first checkpoint."""

    def command_to(out: Path) -> list[str]:
        words = [sys.executable, "-m", "bolid_cli.main", *command(world, out, "--quiet")]
        words[words.index("--steps") + 1] = "40"
        return words

    subprocess.run(command_to(tmp_path / "whole"), check=True)
    words = command_to(tmp_path / "killed")
    process = subprocess.Popen(words)
    checkpoint = tmp_path / "killed" / ".checkpoint.safetensors"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and checkpoint.exists()
    subprocess.run(words, check=True)
    for name in ("face.safetensors", "body.safetensors", "log.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_a_batch_taken_in_parts_is_the_whole_batch(seeing, tmp_path):
    """Up to rounding; and another seed is far off, so that the measure means something."""
    config = dataclasses.replace(
        CONFIG, precision="fp32", learning_rate=0.01, id_weight=1.0, pixel_every=1, pixel_alpha_bar=0.2
    )
    run(seeing, tmp_path / "start", dataclasses.replace(config, learning_rate=0.0, batch_size=1))
    whole = run(seeing, tmp_path / "whole", dataclasses.replace(config, batch_size=6))
    parts = run(seeing, tmp_path / "parts", dataclasses.replace(config, gradient_accumulation_steps=2))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    start, one, two = (adapters(tmp_path / name) for name in ("start", "whole", "parts"))
    assert apart(one, two, start) < 0.01
    train_adapter(
        seeing.train, tmp_path / "other", config=dataclasses.replace(config, batch_size=6),
        body_encoder=seeing.encoder, device="cpu", seed=6,
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


def test_only_the_branches_are_trained(world, tmp_path):
    from bolid.models.families import get_family

    base = get_family(world.family).base
    before = {path: path.read_bytes() for path in base.rglob("*.safetensors")}
    result = run(world, tmp_path / "a")
    assert all(path.read_bytes() == content for path, content in before.items())
    for branch, path in (("face", result.face), ("body", result.body)):
        tensors, record = load_adapter(path, branch)
        assert all(value.dtype == torch.float16 for value in tensors.values())
        assert any(value.any() for name, value in tensors.items() if "to_v_ip" in name)
        assert record["inputs"]["body_encoder"] == BodyEncoder(world.encoder).sha256


def test_a_changed_face_recogniser_can_be_noticed(seeing, world, tmp_path):
    """The face adapter records which recogniser's vectors it understands; the body adapter does not need one."""
    from bolid.models.families import get_family
    from bolid.run import sha256_file

    one_step = dataclasses.replace(CONFIG, steps=1)
    result = run(seeing, tmp_path / "a", one_step)
    pack = get_family(seeing.family).face
    assert load_adapter(result.face, "face")[1]["inputs"]["face_model"] in {sha256_file(f) for f in pack.glob("*.onnx")}
    assert "face_model" not in load_adapter(result.body, "body")[1]["inputs"]
    assert "face_model" not in load_adapter(run(world, tmp_path / "b", one_step).face, "face")[1]["inputs"]


# ---- keys and values of low rank ----------------------------------------------------------------------------------


def test_the_file_holds_the_product_of_the_thin_matrices(world, tmp_path):
    from bolid.backends.diffusion import load_base
    from bolid.method.body_condition import initial_state, merge_kv
    from bolid.models.families import get_family
    from bolid.run import derive_seed

    config = dataclasses.replace(CONFIG, kv_rank=4)
    still = run(world, tmp_path / "still", dataclasses.replace(config, steps=1, learning_rate=0.0))
    unet = load_base(get_family(world.family)).unet
    start = initial_state(unet, "body", 8, seed=derive_seed(5, "body"), kv_rank=4)
    product = merge_kv({f"ip_adapter.{name}": tensor for name, tensor in start["ip_adapter"].items()})
    assert any("to_k_ip" in name for name in product)
    stored = load_adapter(still.body, "body")[0]
    assert all(torch.equal(stored[name], tensor.half()) for name, tensor in product.items())

    full, thin = run(world, tmp_path / "full"), run(world, tmp_path / "thin", config)
    for branch in BRANCHES:
        ours, stock = (load_adapter(getattr(r, branch), branch)[0] for r in (thin, full))
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in stock.items()}
        for name in (n for n in ours if n.startswith("ip_adapter.")):
            values = torch.linalg.svdvals(ours[name].float())
            assert values[3] > 2 * values[4] and values[4] < 2e-3 * values[0], "of rank 4 up to half precision"
    frozen = dataclasses.replace(config, steps=1, learning_rate=0.0, init=str(tmp_path / "thin"))
    run(world, tmp_path / "again", frozen)
    one, two = adapters(tmp_path / "thin"), adapters(tmp_path / "again")
    assert (one - two).norm() < 1e-3 * one.norm()


def test_a_rank_that_saves_nothing_is_refused(world, tmp_path):
    config = dataclasses.replace(CONFIG, kv_rank=24)
    for attempt in (
        lambda: run(world, tmp_path / "a", config),
        lambda: plan_training(world.train, config=config, body_encoder=world.encoder, device="cpu"),
    ):
        with pytest.raises(BolidError, match="--kv-rank is 24") as error:
            attempt()
        assert "give at most 13" in error.value.hint


# ---- what the captions say ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The same world on a small SDXL base."""
    root = tmp_path_factory.mktemp("large")
    family = make_family(root, sdxl=True)
    return World(
        family, make_training_shards(root / "train", family), make_body_encoder(root / "enc.safetensors", family)
    )


@pytest.mark.parametrize("kind", ["world", "large"])
def test_text_states_are_those_of_the_encoders_cached_or_not(kind, request):
    from bolid.backends.diffusion import encode_prompts, load_base
    from bolid.models.families import get_family

    pipe = load_base(get_family(request.getfixturevalue(kind).family))
    captions = [f"a tall woman, {i}" for i in range(70)]
    texts = ["", captions[69], without_build(captions[1]), captions[69]]
    expected = encode_prompts(pipe, texts)
    assert (expected[1] is None) == (kind == "world")
    kept, computed = TextStates(pipe, captions), TextStates(pipe, captions, limit=0)
    half = TextStates(pipe, captions, precision="bf16")
    assert (kept.cached, computed.cached, half.cached) == (True, False, True)
    size = sum(part[0].numel() for part in expected if part is not None)
    assert not TextStates(pipe, captions, limit=141 * size * 4 - 1).cached, "70 captions, 70 without the build, none"
    for part, cached, anew, short in zip(expected, kept(texts), computed(texts), half(texts), strict=True):
        if part is not None:
            assert torch.allclose(cached, part, atol=1e-5) and torch.allclose(anew, part, atol=1e-5)
            assert short.dtype == torch.bfloat16 and torch.equal(short, cached.bfloat16())


@pytest.mark.parametrize("kind", ["world", "large"])
def test_training_is_the_same_with_cached_texts(kind, request, tmp_path):
    """Up to rounding, and not a bit further in bf16, which is what the network makes of the states anyway."""
    chosen = request.getfixturevalue(kind)
    config = dataclasses.replace(CONFIG, precision="bf16", steps=2, learning_rate=0.01, sample_every=2)
    kept = run(chosen, tmp_path / "kept", config)
    anew = run(chosen, tmp_path / "anew", dataclasses.replace(config, text_cache=0.0))
    assert kept.loss == pytest.approx(anew.loss, rel=1e-3)
    sheets = [(tmp_path / name / "samples" / "step-000002.png").stat().st_size for name in ("kept", "anew")]
    assert min(sheets) > 1000


# ---- the joint objective ------------------------------------------------------------------------------------------


def make_sliders(encoder: Path) -> Path:
    """Two sliders of a random body encoder: its first two numbers."""
    path, body_encoder = encoder.with_name("sliders.safetensors"), BodyEncoder(encoder)
    readout = torch.eye(2, body_encoder.body_dim)
    record = run_record("body-sliders", family="tiny", inputs=body_encoder.inputs)
    nothing = torch.zeros(body_encoder.body_dim)
    save_sliders(path, Sliders(("legs", "build"), readout.clone(), readout, nothing, (0.9, 0.9), record))
    return path


LANDMARKS = torch.tensor([[20.0, 20], [30, 20], [25, 26], [21, 31], [29, 31]])  # eyes, nose, mouth
LCM = {"scheduler": "LCMScheduler", "original_inference_steps": 1000}  # consistency sampling


@contextlib.contextmanager
def joint(world, defaults=None, **settings):
    """(objective, a batch of four photos, the branches' parameters by name) with branches that do something.

    `defaults`: those of the family beside its own.
    """
    from bolid.backends.diffusion import load_base
    from bolid.method.body_condition import initial_state, install
    from bolid.models.families import get_family

    config = dataclasses.replace(CONFIG, precision="fp32", pixel_alpha_bar=0.0, **settings)
    family = get_family(world.family)
    family = dataclasses.replace(family, defaults={**family.defaults, **(defaults or {})})
    pipe, table = load_base(family), read_table(world.train, BodyEncoder(world.encoder))
    pixels = PixelLosses(
        family, pipe.vae, id_loss=config.id_loss if config.id_weight else "",
        clip_target=config.clip_target if config.clip_weight else "", body_encoder=BodyEncoder(world.encoder),
        sliders=str(make_sliders(world.encoder)), readers=config.readers, spare_heads=config.spare_heads,
        face=bool(config.face_weight), found=bool(config.found_weight),
    )  # fmt: skip
    objective = Objective(
        pipe, pipe.unet, table, TextStates(pipe, table.captions), family, config, torch.device("cpu"), pixels
    )
    branches = install(
        pipe.unet, [initial_state(pipe.unet, "face", 512, tokens=2), initial_state(pipe.unet, "body", 8)]
    )
    torch.manual_seed(0)
    parameters = {f"{b}.{name}": p for b, ps in zip(BRANCHES, branches, strict=True) for name, p in ps.items()}
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        if "to_v_ip" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    none = {"text_dropout": 0.0, "face_dropout": 0.0, "body_dropout": 0.0, "all_dropout": 0.0}
    batch = draw_batch(table, np.arange(4), dataclasses.replace(config, **none), photo_generators(0, 0, 4))
    yield objective, batch, parameters


@pytest.mark.parametrize(
    ("term", "settings"),
    [
        ("id", {"id_weight": 1.0}),
        ("id", {"id_weight": 1.0, "id_loss": "bone-ratios"}),
        ("clip", {"clip_weight": 1.0, "clip_target": "both"}),
        ("id", {"id_weight": 1.0, "x_gen": "few-step", "x_gen_grad_steps": 2}),
        ("id", {"id_weight": 1.0, "id_loss": "body"}),
        ("id", {"id_weight": 1.0, "id_loss": "body", "x_gen": "sampled"}),
        ("clip", {"clip_weight": 1.0, "x_gen": "sampled", "x_gen_grad_steps": 4}),
        ("id", {"id_weight": 1.0, "id_loss": "body", "x_gen": "sampled", "defaults": LCM}),
        ("id", {"id_weight": 1.0, "id_loss": "body", "x_gen": "swapped"}),
        ("id", {"id_weight": 1.0, "id_loss": "sliders", "x_gen": "swapped"}),
        ("face", {"face_weight": 2.0}),
        ("face", {"face_weight": 2.0, "x_gen": "sampled"}),
        ("found", {"found_weight": 2.0}),
        ("found", {"found_weight": 2.0, "x_gen": "sampled"}),
    ],
)
def test_each_loss_reaches_every_key_and_value_of_both_branches(seeing, term, settings, monkeypatch):
    # Photos that an autoencoder of random numbers rebuilds show no faces, and pictures of a random base neither.
    monkeypatch.setattr(PixelLosses, "_certainty", lambda self, row, *_: torch.ones(()))
    score_of = DifferentiableFaces._surest
    found = LANDMARKS.expand(4, -1, -1)
    monkeypatch.setattr(DifferentiableFaces, "_surest", lambda self, pixels: (score_of(self, pixels)[0], found))
    with joint(seeing, **settings) as (objective, batch, parameters):
        values = objective(batch, with_pixels=True)
        weighted = settings[f"{term}_weight"] * values[term]
        assert float(values["loss"].detach()) == pytest.approx(float((values["diffusion"] + weighted).detach()))
        values[term].backward()
        for name, parameter in parameters.items():
            assert torch.isfinite(parameter.grad).all(), name
            if "to_k_ip" in name or "to_v_ip" in name:
                assert parameter.grad.any(), name


def test_the_face_is_to_be_the_persons_and_only_where_one_is_known(seeing, monkeypatch):
    with joint(seeing, face_weight=1.0, x_gen="sampled") as (objective, batch, _):
        assert torch.allclose(objective.faces.norm(dim=1), torch.ones(len(objective.faces)))
        objective.table.confidence[:] = 0.0  # no body is to be seen; the faces are what is worth a picture
        assert objective._worth_sampling(batch).tolist() == [0, 1, 2, 3]
        assert float(objective(batch, with_pixels=True)["face"].detach()) == 0, "no photo shows one"
        batch = dataclasses.replace(batch, generators=photo_generators(0, 0, 4))
        monkeypatch.setattr(PixelLosses, "_certainty", lambda self, row, *_: torch.ones(()))
        every = float(objective(batch, with_pixels=True)["face"].detach())
        faceless = batch.face_embeds.clone()
        faceless[:2] = 0
        batch = dataclasses.replace(batch, face_embeds=faceless, generators=photo_generators(0, 0, 4))
        assert objective._worth_sampling(batch).tolist() == [2, 3]
        assert 0 < float(objective(batch, with_pixels=True)["face"].detach()) < every


def test_a_face_is_asked_for_where_the_photo_shows_one_and_one_is_told(seeing, monkeypatch):
    with joint(seeing, found_weight=1.0, x_gen="sampled") as (objective, batch, _):
        assert float(objective(batch, with_pixels=True)["found"]) == 0, "no photo shows one"
        shows = dict(zip(batch.rows.tolist(), [1.0, 0.6, 0.4, 0.0], strict=True))
        monkeypatch.setattr(PixelLosses, "_certainty", lambda self, row, *_: torch.tensor(shows[row]))
        monkeypatch.setattr(DifferentiableFaces, "certainty", lambda self, pixels: torch.full((len(pixels),), 0.1))
        batch = dataclasses.replace(batch, generators=photo_generators(0, 0, 4))
        both = math.log(7.5) + math.log(6)
        assert float(objective(batch, with_pixels=True)["found"]) == pytest.approx(both / 4)
        faceless = batch.face_embeds.clone()
        faceless[0] = 0
        batch = dataclasses.replace(batch, face_embeds=faceless, generators=photo_generators(0, 0, 4))
        assert float(objective(batch, with_pixels=True)["found"]) == pytest.approx(math.log(6) / 4)


def test_photos_under_too_much_noise_are_left_out(seeing):
    with joint(seeing, clip_weight=1.0, clip_target="image") as (objective, batch, _):
        every = objective(batch, with_pixels=True)["clip"]
        objective.config = dataclasses.replace(objective.config, pixel_alpha_bar=0.9999)
        batch = dataclasses.replace(batch, generators=photo_generators(0, 0, 4))
        none = objective(batch, with_pixels=True)
        assert float(every.detach()) > 0 and float(none["clip"]) == 0
        none["loss"].backward()


@pytest.mark.parametrize("defaults", [{}, LCM, LCM | {"guidance": "3@0.5..1"}])
def test_sampled_pictures_are_those_that_generate_makes(seeing, defaults):
    """A stock pipeline with the same noise, captions and people ends at the same latents, by DDIM and by LCM."""
    from bolid.backends.diffusion import encode_prompts, load_base
    from bolid.backends.sampling import sample
    from bolid.models.families import get_family

    with joint(seeing, defaults, id_weight=1.0, id_loss="body", x_gen="sampled") as (objective, batch, _):
        with torch.no_grad():
            ours = objective._sample(objective._conditions(batch), photo_generators(0, 0, 4))
        pipe = load_base(get_family(seeing.family), sampler=defaults)
        pipe.unet = objective.unet
        generator = photo_generators(0, 0, 1)[0]
        noise = torch.randn(1, *objective.table.latents.shape[2:], generator=generator)
        theirs = sample(
            pipe, encode_prompts(pipe, batch.captions[:1]), size=(64, 48), steps=4, guidance=objective.guidance,
            generators=[generator], vectors=[batch.face_embeds[0, 0], batch.body_embeds[0, 0]], latents=noise,
        )  # fmt: skip
    assert objective.guidance.up > 1 and objective.consistency == bool(defaults)
    assert torch.allclose(ours[:1], theirs, atol=1e-3 * float(theirs.std()))


def test_only_photos_of_a_body_with_a_caption_and_a_condition_are_sampled(seeing):
    with joint(seeing, id_weight=1.0, id_loss="body", x_gen="sampled") as (objective, batch, _):
        objective.table.confidence[:] = torch.ones(len(objective.table.confidence))
        objective.table.confidence[batch.rows[0]] = 0.3
        body = batch.body_embeds.clone()
        body[1] = 0
        batch = dataclasses.replace(batch, captions=[*batch.captions[:2], "", batch.captions[3]], body_embeds=body)
        assert objective._worth_sampling(batch).tolist() == [3]
        objective.table.confidence[:] = 0.0
        nothing = objective(batch, with_pixels=True)
    assert float(nothing["id"]) == 0 and float(nothing["loss"].detach()) == float(nothing["diffusion"].detach())


@pytest.mark.parametrize("defaults", [{}, LCM])
def test_gradient_goes_through_the_steps_asked_for(seeing, defaults):
    """Through the last step alone it is what one step from there gives; through more it is another."""
    gradients = []
    for carried in (1, 2, 4):
        with joint(
            seeing, defaults, id_weight=1.0, id_loss="body", x_gen="sampled", x_gen_grad_steps=carried
        ) as (objective, batch, parameters):  # fmt: skip
            shown = []
            predict = objective._predict
            objective._predict = lambda *args, predict=predict, shown=shown: (
                shown.append(torch.is_grad_enabled()), predict(*args)
            )[1]  # fmt: skip
            x0 = objective._sample(objective._conditions(batch), photo_generators(0, 0, 4))
            x0.square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in parameters.values()]))
            assert sum(shown) == carried and len(shown) == 8, "every step once with and once without the conditions"
    assert float((gradients[0] - gradients[2]).norm()) > 0.1 * float(gradients[2].norm())


def test_a_swapped_photo_is_told_to_be_of_somebody_else_whom_the_caption_fits(seeing):
    with joint(seeing, id_weight=1.0, id_loss="body", face_weight=1.0, x_gen="swapped") as (objective, batch, _):
        table, owners = objective.table, objective.table.owner[batch.rows]
        told = objective._conditions(batch)
        chosen, conditions = objective._swap(owners, told, photo_generators(0, 0, 4))
        again, _ = objective._swap(owners[2:], {k: v[2:] for k, v in told.items()}, photo_generators(0, 2, 2))
        assert (chosen != owners).all() and (again == chosen[2:]).all(), "whatever shares the batch"
        for other, owner, body in zip(chosen, owners, conditions["body_embeds"], strict=True):
            assert other in table.lookalikes[owner]
            theirs = table.people[other]
            fused = [fuse_context(table, torch.tensor([[row]]), torch.tensor([[True]]))[0] for row in theirs]
            reach = max(float(vector.norm()) for vector in fused) + 1e-4
            assert 0 < float(body.norm()) < 3 * reach
        assert not torch.allclose(conditions["body_embeds"], told["body_embeds"])
        assert torch.equal(conditions["prompt_embeds"], told["prompt_embeds"])
        faceless = {**told, "face_embeds": torch.zeros_like(told["face_embeds"])}
        assert not objective._swap(owners, faceless, photo_generators(0, 0, 4))[1]["face_embeds"].any()

        asked = {}
        objective.pixels = lambda x0, photos, rows, captions, bodies, faces, generators: (
            asked.update(bodies=bodies, faces=faces), (x0.mean((1, 2, 3)),) * 4
        )[1]  # fmt: skip
        objective.table.confidence[:] = 1.0
        objective(batch, with_pixels=True)
        whose = [(objective.bodies - body).norm(dim=1).argmin().item() for body in asked["bodies"]]
        assert len(whose) == 4 and all(a != b for a, b in zip(whose, owners, strict=True)), "and is to look like them"


def test_without_noise_to_remove_a_swapped_photo_stays_as_it_is(seeing):
    """x0-hat comes from the photo itself: with hardly any noise it is that photo, whoever it is said to be."""
    with joint(seeing, id_weight=1.0, id_loss="body", x_gen="swapped") as (objective, batch, _):
        low, high = SWAPPED_ALPHA_BAR
        alphas = objective.schedule.alphas_cumprod[objective.swapped_timesteps]
        assert low <= float(alphas.min()) and float(alphas.max()) <= high and len(alphas) > 100
        latents = objective.table.latents[batch.rows, 0].float()
        errors = []
        for timestep in (0, 600):
            objective.swapped_timesteps = torch.tensor([timestep])
            with torch.no_grad():
                x0 = objective._swapped(latents, objective._conditions(batch), photo_generators(0, 0, 4))
            errors.append(float((x0 - latents).norm() / latents.norm()))
        assert errors[0] < 0.1 * errors[1]


def test_lookalikes_are_those_whom_the_captions_words_fit(table):
    captions = ["a photo of a woman"] * len(table.captions)
    for row in table.people[0]:
        captions[row] = "a tall man"
    named = dataclasses.replace(table, captions=captions)
    assert named.lookalikes[0].tolist() == [0]
    assert named.lookalikes[1].tolist() == list(range(1, len(table.people)))
    unnamed = dataclasses.replace(table, captions=["a photo"] * len(captions))
    assert unnamed.lookalikes[0].tolist() == list(range(len(table.people)))


def test_l_id_by_the_sliders_counts_what_they_read_and_nothing_else(seeing):
    with joint(seeing, id_weight=1.0, id_loss="sliders", x_gen="swapped") as (objective, batch, _):
        pixels, shown = objective.pixels, objective.table.latents[batch.rows, 0].float()
        told = objective.bodies[objective.table.owner[batch.rows]]

        def l_id(bodies):
            with torch.no_grad():
                return pixels(shown, shown, batch.rows.tolist(), batch.captions, bodies)[0]

        assert l_id(told).any() and not l_id(torch.zeros_like(told)).any(), "nobody is nothing to be like"
        elsewhere = told.clone()
        elsewhere[:, 2:] += 3
        assert torch.allclose(l_id(elsewhere), l_id(told))
        assert not torch.allclose(l_id(told + 1), l_id(told))
        assert "body_sliders" in pixels.inputs


def two_readers(seeing, tmp_path, shift):
    """Folders of two readers, as --readers takes them; the second says `shift` more of the first slider."""
    from bolid.backends.body import save_body_encoder

    encoder, folders = BodyEncoder(seeing.encoder), [tmp_path / "0", tmp_path / "1"]
    for i, folder in enumerate(folders):
        folder.mkdir()
        with torch.no_grad():
            encoder.model.mean[1].bias[0] += shift * i
        save_body_encoder(
            folder / "body-encoder.safetensors", encoder.model, {**encoder.record, "space": encoder.space}
        )
    return ",".join(map(str, folders))


def test_l_id_is_the_mean_of_what_all_readers_say(seeing, tmp_path):
    readers = two_readers(seeing, tmp_path, shift=2.0)
    with joint(seeing, id_weight=1.0, id_loss="sliders", x_gen="swapped", readers=readers) as (objective, batch, _):
        pixels = objective.pixels
    for reader in pixels.readers:
        reader.expectation = None
    shown = objective.table.latents[batch.rows, 0].float()
    told = objective.bodies[objective.table.owner[batch.rows]]

    def l_id(readers):
        pixels.readers = readers
        with torch.no_grad():
            return pixels(shown, shown, batch.rows.tolist(), batch.captions, told)[0]

    one, two = pixels.readers
    assert torch.allclose(l_id([one, two]), (l_id([one]) + l_id([two])) / 2)
    assert not torch.allclose(l_id([one]), l_id([two]))
    assert {"reader_1_body_encoder", "reader_2_body_encoder"} <= set(pixels.inputs)
    assert "reader_1_pose" not in pixels.inputs


def test_a_head_is_above_the_shoulders_and_around_the_nose():
    keypoints = torch.zeros(2, 17, 3)
    keypoints[:, 0, :2] = torch.tensor([[24.0, 10.0], [60.0, 30.0]])
    keypoints[:, 5, :2] = torch.tensor([[34.0, 20.0], [66.0, 40.0]])
    keypoints[:, 6, :2] = torch.tensor([[14.0, 22.0], [54.0, 40.0]])
    mask = heads(keypoints, (96, 80))[:, 0]
    for of, nose, shoulder in zip(mask, [(10, 24), (30, 60)], [(20, 34), (40, 66)], strict=True):
        assert of[nose] and of[0, nose[1]] and not of[shoulder] and not of[nose[0], nose[1] - 20]
        assert not of[shoulder[0] + 1 :].any() and 0.02 < float(of.float().mean()) < 0.25


def test_l_id_leaves_heads_alone_where_it_is_asked_to(seeing):
    settings = {"id_weight": 1.0, "id_loss": "sliders", "x_gen": "swapped", "spare_heads": True}
    with joint(seeing, **settings) as (objective, batch, _):
        losses, [reader] = objective.pixels, objective.pixels.readers
    told = objective.bodies[objective.table.owner[batch.rows]]
    shown = losses._decode(objective.table.latents[batch.rows, 0].float()).detach().requires_grad_()
    standing = torch.full((len(shown), 17, 3), 30.0)
    standing[..., 2] = 0.9
    for point, at in ((0, (24.0, 12.0)), (5, (32.0, 20.0)), (6, (16.0, 20.0))):
        standing[:, point, :2] = torch.tensor(at)
    pose = reader.pose.best_person

    def stand(pixels):
        keypoints, box, score = pose(pixels)
        return keypoints - (keypoints - standing).detach(), box, score

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader.pose, "best_person", stand)
        spared = losses._unlike(reader, shown, told, ())
        losses.spare_heads = False
        asked = losses._unlike(reader, shown, told, ())
    assert torch.allclose(spared, asked), "what is seen is the same"
    of_spared, of_asked = (torch.autograd.grad(value.sum(), shown)[0].abs().amax(1) for value in (spared, asked))
    head = heads(standing, shown.shape[2:])[:, 0]
    assert head.any() and not of_spared[head].any() and of_asked[head].any()
    assert of_spared[~head].any()


def test_a_readers_own_bias_is_not_asked_of_the_picture(seeing, tmp_path):
    """Two readers, one of which sees everybody 2 larger, expect what they see in photos, and so they agree."""
    readers = two_readers(seeing, tmp_path, shift=2.0)
    with joint(seeing, id_weight=1.0, id_loss="sliders", x_gen="swapped", readers=readers) as (objective, _, _):
        pixels = objective.pixels
    rows = photos_of_bodies(objective.table, 600)
    shown, told = objective.table.latents[rows, 0].float(), objective.bodies[objective.table.owner[rows]]
    one, two = (reader.expectation for reader in pixels.readers)
    assert torch.allclose(two.shift - one.shift, torch.tensor([2.0, 0.0]), atol=0.02)
    with torch.no_grad():
        first, second = (pixels._unlike(reader, pixels._decode(shown), told, ()) for reader in pixels.readers)
    assert torch.allclose(first, second, atol=0.05 * float(first.max())) and float(first.max()) > 0


def test_readers_that_cannot_read(seeing, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    make_body_encoder(tmp_path / "other" / "body-encoder.safetensors", seeing.family, seed=9)
    sliders, config = str(make_sliders(seeing.encoder)), dataclasses.replace(CONFIG, id_weight=1.0, id_loss="sliders")
    nothing = "holds neither pose/ nor body-encoder.safetensors nor probe/"
    for name, message in (("empty", nothing), ("other", "not comparable")):
        asked = dataclasses.replace(config, sliders=sliders, readers=str(tmp_path / name))
        with pytest.raises(BolidError, match=message):
            run(seeing, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()


def make_probe(folder: Path, names: tuple[str, ...], size: tuple[int, int], seed: int = 3) -> Path:
    """A probe of random weights as --readers takes it."""
    from bolid.backends.probe import FILE, KIND, ProbeNetwork
    from bolid.formats.tensors import save_tensors

    torch.manual_seed(seed)
    (folder / "probe").mkdir(parents=True)
    spread = {"mean": torch.arange(1.0, len(names) + 1), "std": torch.full((len(names),), 0.5)}
    record = run_record(KIND, family="tiny", config={"ratio_names": names, "image_size": size})
    save_tensors(folder / "probe" / FILE, ProbeNetwork(len(names), size).state_dict() | spread, record)
    return folder


def test_a_probe_reads_ratios_with_gradient(seeing, tmp_path):
    from bolid.models.families import get_family

    size = get_family(seeing.family).image_size
    reader = make_probe(tmp_path / "reader", ("build", "waist", "legs"), size)
    asked = {"id_weight": 1.0, "id_loss": "sliders", "x_gen": "swapped", "readers": str(reader)}
    with joint(seeing, **asked) as (objective, batch, parameters):
        pixels = objective.pixels
        values = objective(batch, with_pixels=True)
        gradients = torch.autograd.grad(values["id"], list(parameters.values()), allow_unused=True)
    assert any(g is not None and g.isfinite().all() and g.any() for g in gradients)
    [one] = pixels.readers
    pictures = pixels._decode(objective.table.latents[batch.rows, 0].float())
    shown = [((p.permute(1, 2, 0) + 1) * 127.5).detach().numpy() for p in pictures]
    read = (one.probe.predict(shown) - one.probe.mean) / one.probe.std
    said, weight = pixels._said(one, pictures)  # by the sliders, which are named legs and build
    assert torch.allclose(said, torch.from_numpy(read[:, [2, 0]]), atol=1e-3) and bool((weight == 1).all())
    assert one.expectation.shift.any() and "reader_1_probe" in pixels.inputs


@pytest.mark.parametrize(
    ("names", "id_loss", "message"),
    [
        (("legs", "waist"), "sliders", "does not read the slider 'build'"),
        (("legs", "build"), "body", "reads ratios and no body vector"),
    ],
)
def test_a_probe_that_cannot_teach(seeing, tmp_path, names, id_loss, message):
    folder = make_probe(tmp_path / "reader", names, (64, 48))
    sliders = {"sliders": str(make_sliders(seeing.encoder))} if id_loss == "sliders" else {}
    asked = dataclasses.replace(CONFIG, id_weight=1.0, id_loss=id_loss, readers=str(folder), **sliders)
    with pytest.raises(BolidError, match=message):
        run(seeing, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()


def test_the_probe_that_measures_a_family_does_not_teach_it(seeing, tmp_path):
    from bolid.models.families import get_family

    folder, encoder = make_probe(tmp_path / "reader", ("legs", "build"), (64, 48)), BodyEncoder(seeing.encoder)
    family = dataclasses.replace(get_family(seeing.family), probe=folder / "probe")
    with pytest.raises(BolidError, match="is the probe that measures this family's pictures"):
        PixelLosses(
            family, torch.nn.Identity(), id_loss="sliders", clip_target="", body_encoder=encoder,
            sliders=str(make_sliders(seeing.encoder)), readers=str(folder),
        )  # fmt: skip


def test_photos_of_bodies_show_them(table):
    confidence = torch.zeros(len(table.captions))
    confidence[[table.people[0][1], table.people[2][0], table.people[2][1]]] = 0.8
    seen = dataclasses.replace(table, confidence=confidence)
    assert photos_of_bodies(seen, 9).tolist() == [table.people[0][1], table.people[2][0]]
    assert photos_of_bodies(seen, 1).tolist() == [table.people[0][1]]
    nobody = photos_of_bodies(dataclasses.replace(table, confidence=0 * confidence), 99)
    assert nobody.tolist() == [rows[0] for rows in table.people]


def test_a_window_moves_and_shrinks_a_picture_and_keeps_its_proportions():
    picture = torch.full((1, 1, 96, 64), -1.0)
    picture[..., 40:60, 20:30] = 1.0  # twice as high as wide, left of the middle
    sides, heights = set(), []
    for seed in range(20):
        seen = through_windows(picture, photo_generators(seed, 0, 1))
        again = through_windows(picture.repeat(2, 1, 1, 1), photo_generators(seed, 0, 2))
        assert torch.allclose(seen[0], again[0], atol=1e-6), "whatever shares the batch"
        mass = (seen[0, 0] + 1) / 2
        high, wide = mass.sum(0).max(), mass.sum(1).max()
        assert float(high / wide) == pytest.approx(2, rel=0.1)
        heights.append(float(high))
        sides.add(float(mass.sum(0).argmax()) < 32)
    assert sides == {True, False} and 14 < min(heights) < 16.5 and 18.5 < max(heights) <= 20.1
    flat = torch.full_like(picture, 0.5)
    assert torch.allclose(through_windows(flat, photo_generators(0, 0, 1)), flat, atol=1e-6)


def test_bodies_are_the_mean_of_all_photos_by_confidence(table):
    bodies = person_bodies(dataclasses.replace(table, confidence=torch.ones_like(table.confidence)))
    for rows, body in zip(table.people, bodies, strict=True):
        assert torch.allclose(body, table.body_mean[rows].mean(0), atol=1e-6)
    blind = torch.ones_like(table.confidence)
    blind[table.people[0][1:]] = 0
    bodies = person_bodies(dataclasses.replace(table, confidence=blind))
    assert torch.allclose(bodies[0], table.body_mean[table.people[0][0]], atol=1e-4)


def test_everybodys_vector_is_fused_from_all_their_photos_and_nobody_elses(table):
    uneven = dataclasses.replace(table, people=[table.people[0][:1], *table.people[1:]])
    bodies = fused_bodies(uneven)
    for rows, body in zip(uneven.people, bodies, strict=True):
        mean, _, _ = fuse_views(table.body_mean[rows], table.body_logvar[rows], table.confidence[rows])
        assert torch.allclose(body, mean, atol=1e-6)
    assert not torch.allclose(bodies[0], fused_bodies(table)[0], atol=1e-3)


def test_many_step_bases_have_no_few_step_picture(world):
    from bolid.models.families import get_family

    slow = dataclasses.replace(get_family(world.family), defaults={"steps": 25})
    with pytest.raises(BolidError, match="takes 25 steps and has no few-step LoRA") as error:
        few_step_sampler(None, slow)
    assert "sdxl-lightning" in error.value.hint


def test_the_few_step_lora_is_on_for_x_gen_alone(seeing, tmp_path):
    """A LoRA that lets the base take few steps changes x_gen, and neither L_diff nor what is trained."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from bolid.backends.diffusion import load_base
    from bolid.models.families import get_family

    pipe = load_base(get_family(seeing.family))
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(pipe.unet), weight_name="few-steps.safetensors"
    )
    with joint(seeing, id_weight=1.0, x_gen="few-step") as (objective, batch, _):
        plain = objective(batch, with_pixels=True)
        family = get_family(seeing.family)
        lora = {"few_steps": {"steps": 2, "scheduler": "LCMScheduler"}}
        pipe = load_base(family)
        object.__setattr__(family, "few_steps", lora["few_steps"])
        object.__setattr__(family, "few_steps_lora", tmp_path / "few-steps.safetensors")
        settings = few_step_sampler(pipe, family)
        assert settings == {"lora": True, "fresh_noise": True}
        assert not any(p.requires_grad for p in pipe.unet.parameters())
        pipe.unet.encoder_hid_proj = objective.unet.encoder_hid_proj
        pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
        pipe.unet.set_attn_processor(objective.unet.attn_processors)
        objective.unet = objective.network = pipe.unet
        objective.few_steps = settings
        batch = dataclasses.replace(batch, generators=photo_generators(0, 0, 4))
        draw_batch(objective.table, batch.rows, objective.config, batch.generators)  # the same place in each stream
        other = objective(batch, with_pixels=True)
    assert float(other["diffusion"].detach()) == pytest.approx(float(plain["diffusion"].detach()), rel=1e-5)
    # Next to nothing on noise, in which the pose model sees nobody: compared by ratio, without pytest's absolute slack.
    assert float(other["id"].detach()) != pytest.approx(float(plain["id"].detach()), rel=1e-3, abs=0.0)


# ---- what it says about itself ------------------------------------------------------------------------------------


def test_a_dry_run_says_what_the_training_would_take(world, tmp_path):
    from bolid.backends.diffusion import load_base
    from bolid.models.families import get_family

    config = dataclasses.replace(CONFIG, precision="fp32", gradient_accumulation_steps=2)
    before = sorted(tmp_path.rglob("*"))
    plan = plan_training(world.train, config=config, body_encoder=world.encoder, device="cpu")
    assert sorted(tmp_path.rglob("*")) == before
    assert (plan.people, plan.photos, plan.photos_per_step, plan.steps_per_epoch, plan.epochs) == (3, 12, 6, 2.0, 2.0)
    assert plan.memory["total"] == sum(v for name, v in plan.memory.items() if name != "total")

    result = run(world, tmp_path / "a", dataclasses.replace(config, steps=1))
    trained = sum(v.numel() for b in BRANCHES for v in load_adapter(getattr(result, b), b)[0].values())
    pipe = load_base(get_family(world.family))
    assert plan.parameters == trained
    assert plan.memory["base network"] == 4 * sum(p.numel() for p in pipe.unet.parameters())
    assert plan.memory["VAE"] == 4 * sum(p.numel() for p in pipe.vae.parameters())
    assert plan.memory["text encoders"] == 0
    # four numbers in the captions, each with and without the build, and the empty text; 24 tokens of 24 channels
    assert plan.memory["text states"] == 9 * 24 * 24 * 4

    def other(device="cpu", **changes):
        changed = dataclasses.replace(config, **changes)
        return plan_training(world.train, config=changed, body_encoder=world.encoder, device=device)

    lean, uncached = other(gradient_checkpointing=True, kv_rank=2), other(text_cache=0.0)
    name = "activations and gradients of a batch"
    assert 0 < lean.memory[name] < plan.memory[name] and lean.parameters < plan.parameters
    assert uncached.memory["text encoders"] == 4 * sum(p.numel() for p in pipe.text_encoder.parameters())
    assert uncached.memory["text states"] == 0 and plan.main_memory == {}


def test_the_losses_are_drawn_and_logged(seeing, tmp_path):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    from PIL import Image

    config = dataclasses.replace(CONFIG, id_weight=1.0, pixel_every=2, tensorboard=True)
    with pytest.raises(Killed):
        run(seeing, tmp_path / "a", config, progress=kill_at(3))
    run(seeing, tmp_path / "a", config)
    with Image.open(tmp_path / "a" / "loss.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    logged = {}
    for path in sorted((tmp_path / "a" / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in event_file.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                logged[value.tag, event.step] = value.tensor.float_val[0]
    for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines():
        values = json.loads(line)
        for name in values.keys() - {"step"}:
            assert logged[f"train/{name}", values["step"]] == pytest.approx(values[name], abs=1e-5)


def test_tensorboard_is_asked_for_and_not_there(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BolidError, match="needs the package tensorboard") as error:
        run(world, tmp_path / "a", dataclasses.replace(CONFIG, tensorboard=True))
    assert "pip install 'bolid[tensorboard]'" in error.value.hint and not (tmp_path / "a").exists()


# ---- starting from other files ------------------------------------------------------------------------------------


def test_training_can_start_from_other_adapters(world, tmp_path):
    first = run(world, tmp_path / "first")
    frozen = dataclasses.replace(CONFIG, steps=1, learning_rate=0.0, init=str(tmp_path / "first"))
    second = run(world, tmp_path / "second", frozen)
    for branch, a, b in (("face", first.face, second.face), ("body", first.body, second.body)):
        ours, theirs = load_adapter(a, branch)[0], load_adapter(b, branch)[0]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("kv_rank", [0, 4])
def test_one_branch_learns_and_the_other_stays(world, tmp_path, branch, kv_rank):
    run(world, tmp_path / "first")
    alone = dataclasses.replace(CONFIG, init=str(tmp_path / "first"), branches=branch, kv_rank=kv_rank)
    run(world, tmp_path / "second", alone)
    for name in BRANCHES:
        before, after = (load_adapter(tmp_path / run / f"{name}.safetensors", name)[0] for run in ("first", "second"))
        learnt = [not torch.equal(before[key], after[key]) for key in before]
        assert any(learnt) == (name == branch)
    plans = [
        plan_training(world.train, config=config, body_encoder=world.encoder, device="cpu")
        for config in (alone, dataclasses.replace(alone, branches="both"))
    ]
    assert plans[0].parameters < plans[1].parameters and plans[0].memory["total"] < plans[1].memory["total"]
    with pytest.raises(BolidError, match=f"--branches {branch}") as error:
        dataclasses.replace(alone, init="")
    assert "give --init" in error.value.hint


def test_a_sheet_of_samples_is_painted_with_the_familys_guidance(world, tmp_path, monkeypatch):
    from PIL import Image

    from bolid.models.families import Family
    from bolid.scales import parse_guidance

    config, sheets = dataclasses.replace(CONFIG, steps=1, sample_every=1), []
    for guidance in (3.0, "3@0..0.5"):
        monkeypatch.setattr(Family, "guidance", property(lambda self, text=guidance: parse_guidance(text)))
        run(world, tmp_path / str(guidance), config)
        with Image.open(tmp_path / str(guidance) / "samples" / "step-000001.png") as sheet:
            assert sheet.size == (4 * 48, 4 * 64)
            sheets.append(np.asarray(sheet))
    assert not np.array_equal(*sheets)


# ---- the files are stock diffusers files ---------------------------------------------------------------------------

STOCK = """
import json, sys
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

base, adapter, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
pipe.load_ip_adapter([adapter, adapter], subfolder=["", ""], weight_name=["face.safetensors", "body.safetensors"],
                     image_encoder_folder=None)
pipe.set_ip_adapter_scale([1.0, 1.0])
vectors = load_file(adapter + "/vectors.safetensors")
embeds = [torch.stack([torch.zeros_like(v), v])[:, None] for v in (vectors["face"], vectors["body"])]
image = pipe("a photo", height=64, width=48, num_inference_steps=2, guidance_scale=3.0, negative_prompt="",
             generator=[torch.Generator().manual_seed(7)], ip_adapter_image_embeds=embeds).images[0]
image.save(out)
print(json.dumps([name for name in sys.modules if name.split(".")[0].startswith("bolid")]))
"""


def test_plain_diffusers_loads_both_files_and_paints_the_same(world, tmp_path):
    """In a process that knows nothing of bolid, and bit for bit what `generate` paints."""
    from PIL import Image
    from safetensors.torch import save_file

    from bolid.formats.profile import save_profile
    from bolid.generate import generate
    from bolid.models.families import get_family
    from bolid.run import derive_seed, run_record

    run(world, tmp_path / "a", dataclasses.replace(CONFIG, learning_rate=0.5))
    face, body = torch.nn.functional.normalize(torch.randn(512), dim=0), torch.randn(8)
    save_file({"face": face, "body": body}, tmp_path / "a" / "vectors.safetensors")
    record = run_record("profile", family=world.family, inputs={"body_encoder": BodyEncoder(world.encoder).sha256})
    save_profile(tmp_path / "me.safetensors", body, torch.zeros(8), face, torch.ones(1), record)
    ours = generate(
        ["a photo"], tmp_path / "g", profile=tmp_path / "me.safetensors", adapter=tmp_path / "a", device="cpu", seed=11
    )
    script = STOCK.replace("manual_seed(7)", f"manual_seed({derive_seed(11, 'generate', 0, 0)})")
    base = get_family(world.family).base
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(base), str(tmp_path / "a"), str(tmp_path / "stock.png")],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == []
    with Image.open(ours[0]) as a, Image.open(tmp_path / "stock.png") as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))


# ---- errors -------------------------------------------------------------------------------------------------------


def test_other_familys_shards_are_refused(world, tmp_path):
    with pytest.raises(BolidError, match="was made with family"):
        run(world, tmp_path / "a", family="tiny")


def test_other_familys_body_encoder_is_refused(world, tmp_path):
    foreign = make_body_encoder(tmp_path / "foreign.safetensors", "sd15")
    with pytest.raises(BolidError, match="foreign.safetensors was made with family 'sd15'"):
        train_adapter(world.train, tmp_path / "a", config=CONFIG, body_encoder=foreign, device="cpu")


def test_people_with_one_photo_are_not_enough(world, tmp_path):
    lonely = make_training_shards(tmp_path / "lonely", world.family, photos=1)
    with pytest.raises(BolidError, match="has two photos"):
        train_adapter(lonely, tmp_path / "a", config=CONFIG, body_encoder=world.encoder, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"kv_rank": -1}, "--kv-rank is -1"),
        ({"text_cache": -1.0}, "--text-cache is -1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"face_dropout": 1.5}, "--face-dropout is 1.5"),
        ({"max_context": 0}, "--max-context is 0"),
        ({"precision": "bf8"}, "--precision is 'bf8'"),
        ({"id_loss": "poses"}, "--id-loss is 'poses'"),
        ({"clip_target": "sound"}, "--clip-target is 'sound'"),
        ({"x_gen": "no-step"}, "--x-gen is 'no-step'"),
        ({"x_gen": "sampled", "id_weight": 1.0}, "--x-gen sampled is a new picture"),
        ({"x_gen": "sampled", "clip_weight": 1.0, "clip_target": "both"}, "--x-gen sampled is a new picture"),
        ({"x_gen": "swapped", "id_weight": 1.0}, "--x-gen swapped is a new picture"),
        ({"sliders": "mine.safetensors", "id_weight": 1.0}, "mine.safetensors: nothing reads them"),
        ({"readers": "second", "id_weight": 1.0}, "--readers second: nobody asks them"),
        ({"spare_heads": True, "id_weight": 1.0}, "--spare-heads: no loss looks at whole bodies"),
        ({"x_gen": "few-step", "x_gen_grad_steps": 5}, "--x-gen-grad-steps is 5, of 4 steps"),
        ({"id_weight": float("nan")}, "--id-weight is nan"),
        ({"clip_weight": -1.0}, "--clip-weight is -1.0"),
        ({"pixel_alpha_bar": 1.0}, "--pixel-alpha-bar is 1.0"),
        ({"pixel_every": 0}, "--pixel-every is 0"),
        ({"learning_rate": -0.001}, "--learning-rate is -0.001"),
        ({"weight_decay": float("inf")}, "--weight-decay is inf"),
        ({"ema": 1.0}, "--ema is 1.0"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm is 0.0"),
        ({"face_weight": float("nan")}, "--face-weight is nan"),
        ({"found_weight": -1.0}, "--found-weight is -1"),
        ({"close_ups": 1.5}, "--close-ups is 1.5"),
        ({"gradient_accumulation_steps": 0}, "--gradient-accumulation-steps is 0"),
        ({"x_gen": "few-step", "gradient_checkpointing": True}, "do not go together"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(BolidError, match=message):
        TrainAdapterConfig(**change)
