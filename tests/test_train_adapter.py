from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_base import make_body_encoder, make_family, make_training_shards

from bolid.backends.body import BodyEncoder
from bolid.errors import BolidError
from bolid.formats.adapter import load_adapter
from bolid.method.body_condition import BRANCHES, null_condition
from bolid.train_adapter import (
    TrainAdapterConfig,
    batch_rows,
    choose_precision,
    computing,
    draw_batch,
    read_table,
    store_frozen,
    train_adapter,
    without_build,
)

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
def table(world):
    return read_table(world.train, BodyEncoder(world.encoder))


def run(world, out, config=CONFIG, **more):
    return train_adapter(world.train, out, config=config, body_encoder=world.encoder, device="cpu", seed=5, **more)


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
        batch = draw_batch(table, rows, CONFIG, torch.Generator().manual_seed(step))
        for row, context, present in zip(batch.rows, batch.context, batch.present, strict=True):
            used = context[present].tolist()
            assert used and row not in used and len(set(used)) == len(used)
            assert {owner[other] for other in used} == {owner[row]}
            sizes.add(len(used))
    assert sizes == {1, 2, 3}


def test_a_photos_own_face_and_body_do_not_reach_its_condition(table):
    """Changing everything that is known of the target changes nothing in its embeds."""
    rows = np.array([0])
    before = draw_batch(table, rows, CONFIG, torch.Generator().manual_seed(1))
    mean, face = table.body_mean.clone(), table.face.clone()
    mean[0], face[0] = 100.0, 100.0
    after = draw_batch(
        dataclasses.replace(table, body_mean=mean, face=face), rows, CONFIG, torch.Generator().manual_seed(1)
    )
    assert torch.equal(before.body_embeds, after.body_embeds) and torch.equal(before.face_embeds, after.face_embeds)


def test_conditions_are_dropped_each_alone_and_all_together(table):
    def batch(**dropout):
        none = {"text_dropout": 0.0, "face_dropout": 0.0, "body_dropout": 0.0, "all_dropout": 0.0} | dropout
        return draw_batch(table, np.arange(4), dataclasses.replace(CONFIG, **none), torch.Generator().manual_seed(0))

    kept = batch()
    assert all(kept.captions) and kept.face_embeds.any() and kept.body_embeds.any()
    assert batch(text_dropout=1.0).captions == [""] * 4
    assert torch.equal(batch(face_dropout=1.0).face_embeds, null_condition(kept.face_embeds))
    assert torch.equal(batch(body_dropout=1.0).body_embeds, null_condition(kept.body_embeds))
    nothing = batch(all_dropout=1.0)
    assert nothing.captions == [""] * 4 and not nothing.face_embeds.any() and not nothing.body_embeds.any()


def test_no_face_in_the_others_is_the_null_condition(table):
    blind = dataclasses.replace(table, face=torch.zeros_like(table.face))
    batch = draw_batch(blind, np.arange(4), CONFIG, torch.Generator().manual_seed(0))
    assert torch.equal(batch.face_embeds, null_condition(batch.face_embeds))


def test_build_words_leave_the_caption():
    assert without_build("a photo of a tall slim woman waving") == "a photo of a woman waving"
    assert without_build("a man, in a short-sleeved top") == "a man, in a short-sleeved top"
    assert without_build("a woman with short hair") == "a woman with short hair"


def test_every_photo_comes_once_an_epoch():
    rows = np.concatenate([batch_rows(10, 4, step, seed=0) for step in range(5)])
    assert sorted(rows[:10]) == list(range(10)) == sorted(rows[10:])


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "compiled"), [("fp32", False), ("bf16", False), pytest.param("bf16", True, marks=pytest.mark.slow)]
)
def test_a_killed_training_goes_on_to_the_same_bytes(world, tmp_path, precision, compiled):
    config = dataclasses.replace(CONFIG, precision=precision, compile=compiled)
    whole = run(world, tmp_path / "whole", config)
    with pytest.raises(Killed):
        run(world, tmp_path / "killed", config, progress=kill_at(3))
    assert not (tmp_path / "killed" / "body.safetensors").exists()
    seen = []
    run(world, tmp_path / "killed", config, progress=lambda d, t, x: seen.append(d) if x.startswith("loss") else None)
    assert seen == [3, 4]
    for branch in BRANCHES:
        name = f"{branch}.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "killed" / "log.jsonl").read_text()
    assert [json.loads(line)["step"] for line in (tmp_path / "whole" / "log.jsonl").open()] == [1, 2, 3, 4]
    assert not list((tmp_path / "killed").glob(".*")) and whole.steps == 4


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
    from bolid.families import get_family

    base = get_family(world.family).base
    before = {path: path.read_bytes() for path in base.rglob("*.safetensors")}
    result = run(world, tmp_path / "a")
    assert all(path.read_bytes() == content for path, content in before.items())
    for branch, path in (("face", result.face), ("body", result.body)):
        tensors, record = load_adapter(path, branch)
        assert all(value.dtype == torch.float16 for value in tensors.values())
        assert any(value.any() for name, value in tensors.items() if "to_v_ip" in name)
        assert record["inputs"]["body_encoder"] == BodyEncoder(world.encoder).sha256


def test_training_can_start_from_other_adapters(world, tmp_path):
    first = run(world, tmp_path / "first")
    frozen = dataclasses.replace(CONFIG, steps=1, learning_rate=0.0, init=str(tmp_path / "first"))
    second = run(world, tmp_path / "second", frozen)
    for branch, a, b in (("face", first.face, second.face), ("body", first.body, second.body)):
        ours, theirs = load_adapter(a, branch)[0], load_adapter(b, branch)[0]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_sheet_of_samples_is_painted(world, tmp_path):
    from PIL import Image

    run(world, tmp_path / "a", dataclasses.replace(CONFIG, steps=1, sample_every=1))
    with Image.open(tmp_path / "a" / "samples" / "step-000001.png") as sheet:
        assert sheet.size == (4 * 48, 4 * 64)


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

    from bolid.families import get_family
    from bolid.formats.profile import save_profile
    from bolid.generate import generate
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
        capture_output=True, text=True, check=True,
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
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"face_dropout": 1.5}, "--face-dropout is 1.5"),
        ({"max_context": 0}, "--max-context is 0"),
        ({"precision": "bf8"}, "--precision is 'bf8'"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(BolidError, match=message):
        TrainAdapterConfig(**change)
