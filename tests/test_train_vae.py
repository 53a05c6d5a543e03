from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_base import make_family, make_training_shards

from bolid.backends.body import BodyEncoder, read_body_encoder
from bolid.errors import BolidError
from bolid.formats.tensors import read_record
from bolid.method import body_vae as bv
from bolid.method.body_views import view_confidence
from bolid.run import sha256_file
from bolid.train_vae import TrainVaeConfig, train_vae
from bolid.train_vae.command import checkpoint_path
from bolid.train_vae.data import draw_halves, read_views, unpack, unused_photos
from bolid.train_vae.distillation import Teacher

CONFIG = TrainVaeConfig(steps=5, people=3, photos_per_person=3, body_dim=6, width=4, checkpoint_minutes=0.0)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("vae")
    family = make_family(root)
    return family, make_training_shards(root / "train", family)


def kill_at(step: int):
    def progress(done, total, text):
        if done == step:
            raise Killed

    return progress


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bytes(world, tmp_path):
    _, train = world
    whole = train_vae(train, tmp_path / "whole.safetensors", config=CONFIG, device="cpu", seed=3)
    for step in range(2, 6):
        out, steps = tmp_path / f"killed-{step}.safetensors", []
        with pytest.raises(Killed):
            # The progress call of a step comes before its checkpoint, so this keeps the steps before it.
            train_vae(train, out, config=CONFIG, device="cpu", seed=3, progress=kill_at(step))
        assert checkpoint_path(out).exists() and not out.exists()
        resumed = train_vae(
            train, out, config=CONFIG, device="cpu", seed=3, progress=lambda done, *_, steps=steps: steps.append(done)
        )
        assert steps == list(range(step, 6)) and not checkpoint_path(out).exists()
        assert resumed.metrics == whole.metrics and out.read_bytes() == whole.path.read_bytes()


def test_the_encoder_knows_its_people(world, tmp_path):
    """Fused by hand, from the file's own network; a training goes on from such a file. Where the people are fewer than
    the dimensions, it says nothing of them."""
    _, train = world
    config = dataclasses.replace(CONFIG, body_dim=2)
    result = train_vae(train, tmp_path / "a.safetensors", config=config, device="cpu")
    encoder, table = BodyEncoder(result.path), read_views(train)
    mean, logvar = encoder.model.encode(unpack(table.views, torch.arange(result.views)))
    confidence = view_confidence(table.views.keypoints)
    fused = [bv.fuse(mean[None, rows], logvar[None, rows], confidence[None, rows]) for rows in table.people]
    expected = bv.aggregated_posterior(
        torch.cat([mean for mean, _ in fused]), torch.cat([logvar for _, logvar in fused])
    )
    assert len(fused) == result.people and encoder.prior.covariance.shape == (2, 2)
    for got, wanted in zip(encoder.prior, expected, strict=True):
        assert torch.allclose(got, wanted, atol=0.02)  # the file's network is in half precision
    going_on = dataclasses.replace(config, init=str(result.path), steps=1)
    again = BodyEncoder(train_vae(train, tmp_path / "b.safetensors", config=going_on, device="cpu").path)
    assert not torch.equal(again.prior.covariance, encoder.prior.covariance)
    few = train_vae(train, tmp_path / "few.safetensors", config=CONFIG, device="cpu")
    assert few.people < CONFIG.body_dim and BodyEncoder(few.path).prior is None


def test_a_checkpoint_of_other_settings_is_refused(world, tmp_path):
    _, train = world
    out = tmp_path / "b.safetensors"
    with pytest.raises(Killed):
        train_vae(train, out, config=CONFIG, device="cpu", progress=kill_at(3))
    with pytest.raises(BolidError, match="checkpoint of another run: different learning_rate") as error:
        train_vae(train, out, config=dataclasses.replace(CONFIG, learning_rate=1.0), device="cpu")
    assert "--out" in error.value.hint


def test_what_another_training_has_made_is_kept(world, tmp_path):
    out = tmp_path / "b.safetensors"
    train_vae(world[1], out, config=CONFIG, device="cpu")
    made = out.read_bytes()
    with pytest.raises(BolidError, match="b.safetensors is of another training: different learning_rate$") as error:
        train_vae(world[1], out, config=dataclasses.replace(CONFIG, learning_rate=1.0), device="cpu")
    assert out.read_bytes() == made and "another --out" in error.value.hint
    with pytest.raises(BolidError, match="is of another training: different steps$") as error:
        train_vae(world[1], out, config=dataclasses.replace(CONFIG, steps=9), device="cpu")
    assert f"--init {out}" in error.value.hint and "--schedule constant" in error.value.hint


def test_a_finished_training_goes_on_with_more_steps(world, tmp_path):
    """As one training of that length, to the byte; killed on the way too. Fewer steps than done are refused."""
    constant = dataclasses.replace(CONFIG, schedule="constant")
    whole = train_vae(world[1], tmp_path / "whole.safetensors", config=constant, device="cpu")
    out, steps = tmp_path / "b.safetensors", []
    train_vae(world[1], out, config=dataclasses.replace(constant, steps=2), device="cpu")
    with pytest.raises(Killed):
        train_vae(world[1], out, config=constant, device="cpu", progress=kill_at(4))
    train_vae(world[1], out, config=constant, device="cpu", progress=lambda done, *_: steps.append(done))
    assert steps == [4, 5] and out.read_bytes() == whole.path.read_bytes()
    with pytest.raises(BolidError, match="different steps$") as error:
        train_vae(world[1], out, config=dataclasses.replace(constant, steps=2), device="cpu")
    assert "--init" in error.value.hint
    out.unlink()
    with pytest.raises(BolidError, match="has done 5 steps, more than 2$") as error:
        train_vae(world[1], out, config=dataclasses.replace(constant, steps=2), device="cpu")
    assert error.value.hint == "give more --steps"


def test_a_finished_training_is_not_repeated(world, tmp_path):
    first = train_vae(world[1], tmp_path / "b.safetensors", config=CONFIG, device="cpu")
    made = first.path.read_bytes()
    again = train_vae(
        world[1], first.path, config=CONFIG, device="cpu", progress=lambda *_: pytest.fail("it trains again")
    )
    assert again == dataclasses.replace(first, seconds=0.0, already_done=True) and not first.already_done
    assert first.path.read_bytes() == made


def test_record_says_how_to_build_the_network_again(world, tmp_path):
    family, train = world
    result = train_vae(train, tmp_path / "b.safetensors", config=CONFIG, device="cpu")
    assert read_record(result.path)["family"] == family
    encoder = BodyEncoder(result.path)
    assert encoder.body_dim == 6 and not encoder.needs_features


def test_training_can_start_from_another_encoder(world, tmp_path):
    """With no learning rate the weights stay (only the batch norms' statistics move); another shape is refused."""
    first = train_vae(world[1], tmp_path / "a.safetensors", config=CONFIG, device="cpu")
    still = dataclasses.replace(CONFIG, steps=1, learning_rate=0.0, init=str(first.path))
    second = train_vae(world[1], tmp_path / "b.safetensors", config=still, device="cpu")
    ours, theirs = (read_body_encoder(result.path)[0] for result in (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "running" not in name and "num_" not in name)
    assert ours["direct.weight"].any()  # that the first one learnt
    with pytest.raises(BolidError, match="body encoder of another shape"):
        train_vae(world[1], tmp_path / "c.safetensors", config=dataclasses.replace(still, body_dim=7), device="cpu")


@pytest.mark.slow
def test_distillation_keeps_the_space(world, tmp_path):
    """A new encoder comes near its teacher's body of a person's other photos; left to itself it does not."""
    first = train_vae(world[1], tmp_path / "a.safetensors", config=CONFIG, device="cpu")
    found = {}
    for weight in (0.0, 100.0):
        config = dataclasses.replace(CONFIG, steps=40, distill_weight=weight, degradation=0.3)
        config = dataclasses.replace(config, distill_from=str(first.path))
        found[weight] = train_vae(world[1], tmp_path / f"{weight}.safetensors", config=config, device="cpu", seed=1)
    assert found[100.0].metrics["distillation"] < 0.7 * found[0.0].metrics["distillation"]
    assert set(read_record(found[0.0].path)["inputs"]) == {"train", "distill_from"}
    wider = dataclasses.replace(CONFIG, body_dim=7, distill_from=str(first.path))
    with pytest.raises(BolidError, match="has a space of 6 dimensions"):
        train_vae(world[1], tmp_path / "w.safetensors", config=wider, device="cpu")
    again = dataclasses.replace(CONFIG, steps=1, distill_from=str(found[0.0].path))
    encoder = BodyEncoder(train_vae(world[1], tmp_path / "b.safetensors", config=again, device="cpu").path)
    assert encoder.space == sha256_file(first.path) == BodyEncoder(first.path).space  # the teacher's teacher's
    assert encoder.inputs == {"body_encoder": encoder.space, "body_encoder_file": encoder.sha256}


def test_finer_patches_go_on_from_coarser_ones(world, tmp_path):
    """--detail with an --init and a --distill-from of another one."""
    first = train_vae(world[1], tmp_path / "a.safetensors", config=CONFIG, device="cpu")
    config = dataclasses.replace(CONFIG, detail=1.5, init=str(first.path), distill_from=str(first.path))
    encoder = BodyEncoder(train_vae(world[1], tmp_path / "b.safetensors", config=config, device="cpu").path)
    assert encoder.model.detail == 1.5 and encoder.space == sha256_file(first.path)
    finer, coarser = read_views(world[1], 1.5).views.torso.shape, read_views(world[1]).views.torso.shape
    assert finer[-2:] == (36, 30) and coarser[-2:] == (24, 20)
    with pytest.raises(BolidError, match="--detail is 3"):
        dataclasses.replace(CONFIG, detail=3)


def test_the_target_of_distillation_is_of_the_other_photos(world):
    """The target of a half is the product of experts of the person's views that are not in it, each counted once."""
    from bolid.method.body_vae import BodyVAE, fuse

    table = read_views(world[1])
    torch.manual_seed(0)
    teacher = Teacher(BodyVAE(6, width=4).eval(), table, "cpu")
    own = torch.as_tensor(table.people[1])
    views = unpack(table.views, own)
    with torch.no_grad():
        mean, logvar = teacher.model.encode(views)
    left = torch.ones(len(own), dtype=torch.bool)
    left[[0, 2]] = False
    target, _ = fuse(mean[left][None], logvar[left][None], view_confidence(views.keypoints)[left][None])
    rows = own[[0, 1, 2, 0]]  # one of them twice
    used = torch.tensor([[True, False, True, True]])
    assert float(teacher.loss(target, rows, used)) == pytest.approx(0, abs=1e-8)
    assert float(teacher.loss(target, rows, ~used)) > 1e-4


def test_no_photo_is_in_both_halves(world):
    people = read_views(world[1]).people
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        rows, in_a = draw_halves(people, 3, 6, generator, seed=0, step=step)  # more views than anyone has photos
        for own, half in zip(rows.view(3, 6), in_a, strict=True):
            assert not set(own[half].tolist()) & set(own[~half].tolist())
            assert half.any() and not half.all()


def test_photos_that_no_step_takes_are_counted():
    rows = [np.arange(3), np.array([3]), np.arange(4, 6), np.array([6])]
    assert unused_photos(rows) == {"the only photo of its person": 2} and unused_photos(rows[::2]) == {}


def test_one_person_is_not_enough(world, tmp_path):
    train = make_training_shards(tmp_path / "one", world[0], people=1)
    with pytest.raises(BolidError, match="hold 1 people with two photos"):
        train_vae(train, tmp_path / "b.safetensors", config=CONFIG, device="cpu")


def test_features_are_asked_for(world, tmp_path):
    with pytest.raises(BolidError, match="no image-text features"):
        train_vae(world[1], tmp_path / "b.safetensors", config=dataclasses.replace(CONFIG, view="both"), device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"photos_per_person": 1}, "--photos-per-person is 1"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"kl_weight": -0.1}, "--kl-weight is -0.1"),
        ({"degradation": 1.5}, "--degradation is 1.5"),
        ({"people": 1}, "--people is 1"),
        ({"view": "x"}, "--view is 'x'"),
        ({"steps": 0}, "--steps is 0"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(BolidError, match=message):
        TrainVaeConfig(**change)


def test_a_directory_that_is_no_shard_directory(tmp_path):
    with pytest.raises(BolidError, match="no shard directory"):
        train_vae(tmp_path / "nothing", tmp_path / "b.safetensors")
