"""`generate`: files that are missing, damaged, or do not belong together."""

from __future__ import annotations

import pytest
import torch
from generate_world import PROMPTS, make_pictures, make_world, same
from safetensors.torch import load_file

from bolid.errors import BolidError
from bolid.formats.adapter import save_adapter
from bolid.formats.profile import load_profile, save_profile
from bolid.generate import generate
from bolid.run import run_record


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("generate"))


def test_an_adapter_folder_may_have_one_branch(world, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "body.safetensors").write_bytes((world.adapter / "body.safetensors").read_bytes())
    body_only = make_pictures(world, tmp_path / "1", profile=world.me, adapter=tmp_path / "adapter")
    assert same(body_only, make_pictures(world, tmp_path / "2", profile=world.faceless))
    with pytest.raises(BolidError, match="--face-scale is 0.5, but there is no face adapter") as error:
        make_pictures(world, tmp_path / "3", profile=world.me, adapter=tmp_path / "adapter", face_scale=0.5)
    assert "leave out --face-scale" in error.value.hint
    (tmp_path / "adapter" / "body.safetensors").rename(tmp_path / "adapter" / "bod.safetensors")
    with pytest.raises(BolidError, match="there is no face adapter .*face.safetensors"):
        make_pictures(world, tmp_path / "4", profile=world.me, adapter=tmp_path / "adapter")


def test_a_face_is_asked_of_a_profile_without_one(world, tmp_path):
    with pytest.raises(BolidError, match="has no face, but --face-scale is 1.0"):
        generate(PROMPTS, tmp_path, profile=world.faceless, adapter=world.adapter, face_scale=1.0, device="cpu")


def test_a_face_of_another_recogniser_is_refused(world, tmp_path):
    """Where both sides say whose it is; older files say nothing and pass."""
    family, adapter, me, _ = world
    tensors = load_file(adapter / "face.safetensors")
    inputs = {"body_encoder": load_profile(me).record["inputs"]["body_encoder"]}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "body.safetensors").write_bytes((adapter / "body.safetensors").read_bytes())
    face = torch.nn.functional.normalize(torch.ones(512), dim=0)
    for theirs, own, fits in (("a", "a", True), ("a", "b", False), ("a", "", True), ("", "b", True)):
        record = run_record("face-adapter", family=family, inputs=inputs | ({"face_model": theirs} if theirs else {}))
        save_adapter(tmp_path / "adapter" / "face.safetensors", tensors, record)
        record = run_record("profile", family=family, inputs=inputs | ({"face_model": own} if own else {}))
        save_profile(tmp_path / "me.safetensors", torch.ones(8), torch.zeros(8), face, torch.ones(1), record)
        arguments = {"profile": tmp_path / "me.safetensors", "adapter": tmp_path / "adapter", "steps": 1}
        if fits:
            make_pictures(world, tmp_path / "out", **arguments)
        else:
            with pytest.raises(BolidError, match="were made with different face models") as error:
                make_pictures(world, tmp_path / "out", **arguments)
            assert "make the profile again with the face model" in error.value.hint
            make_pictures(world, tmp_path / "out", face_scale=0.0, **arguments)


def test_files_that_do_not_belong_together(world, tmp_path):
    family, adapter, me, _ = world
    with pytest.raises(BolidError, match="was made with family"):
        generate(PROMPTS, tmp_path, profile=me, adapter=adapter, family="tiny", device="cpu")
    record = run_record("profile", family=family, inputs={"body_encoder": "0" * 64})
    save_profile(tmp_path / "old.safetensors", torch.ones(8), torch.zeros(8), None, torch.ones(1), record)
    with pytest.raises(BolidError, match="different body encoders") as error:
        generate(PROMPTS, tmp_path, profile=tmp_path / "old.safetensors", adapter=adapter, device="cpu")
    assert "make the profile again" in error.value.hint
    with pytest.raises(BolidError, match="is of kind"):
        generate(PROMPTS, tmp_path, profile=adapter / "body.safetensors", adapter=adapter, device="cpu")
    with pytest.raises(BolidError, match="there is no face adapter"):
        generate(PROMPTS, tmp_path, profile=me, adapter=tmp_path / "none", device="cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(BolidError, match="is a file"):
        generate(PROMPTS, tmp_path / "file", family=family, device="cpu")
