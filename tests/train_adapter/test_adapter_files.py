"""The files of a training: what is recorded, low rank, other files to start from, stock diffusers, plan and log."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from adapter_world import CONFIG, Killed, adapters, kill_at, run
from small_base import make_body_encoder, make_training_shards

from bolid.backends.body import BodyEncoder
from bolid.errors import BolidError
from bolid.formats.adapter import load_adapter
from bolid.method.body_condition import BRANCHES
from bolid.train_adapter import plan_training, train_adapter


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


def test_a_changed_face_recogniser_can_be_noticed(with_models, world, tmp_path):
    """The face adapter records which recogniser's vectors it understands; the body adapter does not need one."""
    from bolid.models.families import get_family
    from bolid.run import sha256_file

    one_step = dataclasses.replace(CONFIG, steps=1)
    result = run(with_models, tmp_path / "a", one_step)
    pack = get_family(with_models.family).face
    assert load_adapter(result.face, "face")[1]["inputs"]["face_model"] in {sha256_file(f) for f in pack.glob("*.onnx")}
    assert "face_model" not in load_adapter(result.body, "body")[1]["inputs"]
    assert "face_model" not in load_adapter(run(world, tmp_path / "b", one_step).face, "face")[1]["inputs"]


@pytest.mark.slow
def test_the_file_holds_the_product_of_the_thin_matrices(world, trained, tmp_path):
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

    full, thin = trained, run(world, tmp_path / "thin", config)
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


def test_what_the_branches_have_to_learn_from_is_said(world, tmp_path):
    messages = []
    train_adapter(
        world.train, tmp_path / "a", config=dataclasses.replace(CONFIG, steps=1), body_encoder=world.encoder,
        device="cpu", say=messages.append,
    )  # fmt: skip
    assert messages[0].startswith("12 photos of 3 people") and messages[3] == "text: 12 photos have a caption"
    assert any(line.startswith("face branch: ") for line in messages)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_losses_are_drawn_and_logged(with_models, tmp_path):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    from PIL import Image

    config = dataclasses.replace(CONFIG, id_weight=1.0, pixel_every=2, tensorboard=True)
    with pytest.raises(Killed):
        run(with_models, tmp_path / "a", config, progress=kill_at(3))
    run(with_models, tmp_path / "a", config)
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


def test_a_damaged_line_of_the_log_does_not_stop_a_training(world, tmp_path):
    out = tmp_path / "a"
    run(world, out, stop_after=2)
    lines = (out / "log.jsonl").read_text().splitlines()
    (out / "log.jsonl").write_text(lines[0] + "\n" + lines[1][:9] + "\n")
    run(world, out)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 3, 4] and (out / "loss.png").exists()


def test_tensorboard_is_asked_for_and_not_there(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BolidError, match="needs the package tensorboard") as error:
        run(world, tmp_path / "a", dataclasses.replace(CONFIG, tensorboard=True))
    assert "pip install 'bolid[tensorboard]'" in error.value.hint and not (tmp_path / "a").exists()


def test_training_can_start_from_other_adapters(world, trained, tmp_path):
    frozen = dataclasses.replace(CONFIG, steps=1, learning_rate=0.0, init=str(trained.face.parent))
    second = run(world, tmp_path / "second", frozen)
    for branch, a, b in (("face", trained.face, second.face), ("body", trained.body, second.body)):
        ours, theirs = load_adapter(a, branch)[0], load_adapter(b, branch)[0]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("kv_rank", [0, 4])
def test_one_branch_learns_and_the_other_stays(world, trained, tmp_path, branch, kv_rank):
    alone = dataclasses.replace(CONFIG, init=str(trained.face.parent), branches=branch, kv_rank=kv_rank)
    second = run(world, tmp_path / "second", alone)
    for name in BRANCHES:
        before, after = (load_adapter(getattr(result, name), name)[0] for result in (trained, second))
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


@pytest.mark.slow
def test_a_contact_sheet_has_the_familys_guidance(world, tmp_path, monkeypatch):
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


@pytest.mark.slow
def test_plain_diffusers_loads_both_files_and_samples_the_same(world, tmp_path):
    """In a process that knows nothing of bolid, and bit for bit what `generate` makes."""
    from PIL import Image
    from safetensors.torch import save_file

    from bolid.formats.profile import save_profile
    from bolid.generate.command import generate
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
