from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_base import make_body_encoder, make_family, make_training_shards

import bolid.generate.command
import bolid.generate.pose_map
import bolid.views
from bolid.backends.diffusion import guidance_during, load_base, remembered_conditions, set_sampler
from bolid.errors import BolidError
from bolid.formats.adapter import load_adapter, save_adapter
from bolid.formats.profile import load_profile, save_profile
from bolid.generate.command import _load_adapters, _people, generate, read_prompts, save_picture
from bolid.method.body_condition import build_ip_adapter_image_embeds
from bolid.models.families import get_family
from bolid.person import PersonReader
from bolid.profile import make_profile
from bolid.run import derive_seed, run_record, sha256_file
from bolid.scales import parse_guidance
from bolid.train_adapter.command import train_adapter
from bolid.train_adapter.config import TrainAdapterConfig

PROMPTS = ["a photo of a woman", "a man on a beach"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(family, adapter folder, profile with a face, profile without)"""
    root = tmp_path_factory.mktemp("generate")
    family = make_family(root)
    with open(family, "a") as file:
        file.write(
            f"body_encoder = '{root / 'enc.safetensors'}'\ncontrolnet = '{root / 'controlnet'}'\n"
            f"few_steps_lora = '{root / 'few.safetensors'}'\n"
            "[few_steps]\nsteps = 4\nguidance = 0.0\nbody_scale = 1.5\nscheduler = 'LCMScheduler'\n"
        )
    encoder = make_body_encoder(root / "enc.safetensors", family)
    shards = make_training_shards(root / "train", family)
    config = TrainAdapterConfig(steps=3, batch_size=4, face_tokens=2, sample_every=0, learning_rate=0.5)
    train_adapter(shards, root / "adapter", config=config, body_encoder=encoder, device="cpu")
    face = torch.nn.functional.normalize(torch.randn(512, generator=torch.Generator().manual_seed(0)), dim=0)
    inputs = {"body_encoder": sha256_file(encoder), "photo_000": "ab" * 32}
    record = run_record("profile", family=family, inputs=inputs)
    for name, own in (("me", face), ("faceless", None)):
        save_profile(root / f"{name}.safetensors", torch.ones(8), torch.zeros(8), own, torch.ones(1), record)
    return family, root / "adapter", root / "me.safetensors", root / "faceless.safetensors"


def paint(world, out, **options):
    options = {"adapter": world[1], "family": world[0], "device": "cpu", "seed": 4} | options
    return [np.asarray(Image.open(path)) for path in generate(PROMPTS, out, **options)]


def read_picture(path) -> dict:
    """The run record of a PNG."""
    with Image.open(path) as picture:
        return json.loads(picture.text["bolid"])


def same(a, b) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_scale_0_is_the_bare_base_bit_for_bit(world, tmp_path):
    nobody = paint(world, tmp_path / "a")
    assert same(nobody, paint(world, tmp_path / "b", profile=world[2], face_scale=0.0, body_scale=0.0))
    pipe = load_base(get_family(world[0]))
    bare = pipe(
        PROMPTS, height=64, width=48, num_inference_steps=2, guidance_scale=3.0, negative_prompt=["", ""],
        generator=[torch.Generator().manual_seed(derive_seed(4, "generate", i, 0)) for i in (0, 1)], output_type="pil",
    ).images  # fmt: skip
    assert same(nobody, [np.asarray(image) for image in bare])


def test_scale_0_equals_the_base_with_the_adapter_loaded_too(world, tmp_path):
    """Not only because nothing is loaded: diffusers' own processors add nothing at scale 0."""
    pipe = load_base(get_family(world[0]))
    arguments = {"height": 64, "width": 48, "num_inference_steps": 2, "output_type": "np"}
    bare = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(1), **arguments).images
    pipe.load_ip_adapter([str(world[1])], subfolder=[""], weight_name=["body.safetensors"], image_encoder_folder=None)
    embeds = [torch.stack([torch.zeros(8), torch.ones(8)])[:, None]]
    for scale, equal in ((0.0, True), (1.0, False)):
        pipe.set_ip_adapter_scale([scale])
        picture = pipe(
            PROMPTS[0], generator=torch.Generator().manual_seed(1), ip_adapter_image_embeds=embeds, **arguments
        ).images
        assert np.array_equal(picture, bare) == equal


def test_every_way_of_naming_a_person_changes_the_picture(world, tmp_path):
    nobody = paint(world, tmp_path / "0")
    me = paint(world, tmp_path / "1", profile=world[2])
    faceless = paint(world, tmp_path / "2", profile=world[3])
    invented = [paint(world, tmp_path / f"3{i}", new_person=i) for i in (1, 1, 2)]
    assert not same(me, nobody) and not same(faceless, nobody) and not same(me, faceless)
    assert same(invented[0], invented[1]) and not same(invented[0], invented[2])
    assert same(faceless, paint(world, tmp_path / "4", profile=world[2], face_scale=0.0))


class Reader:
    """Stands in for the family's models: the same view of every photo."""

    def __init__(self, family, device="cpu", person="main"):
        self.faces = SimpleNamespace(sha256="f" * 64)

    def read(self, images):
        rng = np.random.default_rng(0)
        face = rng.normal(size=512).astype(np.float32)
        return [
            bolid.views.View(
                image=image, box=np.array([4, 4, 56, 76], np.float32), score=0.9, face=face / np.linalg.norm(face),
                keypoints=(rng.uniform(0.1, 0.9, (17, 3)) * [60, 80, 1]).astype(np.float32), face_box=None,
                image_embed=np.zeros(4, np.float32), view_features=np.zeros((17, 4), np.float16),
            )
            for image in images
        ]  # fmt: skip


def test_a_reference_photo_is_a_profile_of_one_photo(world, tmp_path, monkeypatch):
    monkeypatch.setattr(bolid.views, "ViewReader", Reader)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    make_profile([tmp_path / "photo.png"], tmp_path / "one.safetensors", family=world[0], device="cpu")
    seen = paint(world, tmp_path / "1", reference=tmp_path / "photo.png")
    assert same(seen, paint(world, tmp_path / "2", profile=tmp_path / "one.safetensors"))
    assert not same(seen, paint(world, tmp_path / "3"))
    record = read_picture(tmp_path / "1" / "000-a-photo-of-a-woman.png")
    assert record["inputs"]["reference"] == sha256_file(tmp_path / "photo.png")
    tensors, record = load_adapter(world[1] / "face.safetensors", "face")
    record["inputs"]["face_model"] = "0" * 64
    save_adapter(tmp_path / "adapter" / "face.safetensors", tensors, record)
    with pytest.raises(BolidError, match="the photo photo.png and the face adapter .* different face models"):
        paint(world, tmp_path / "4", reference=tmp_path / "photo.png", adapter=tmp_path / "adapter")


def test_a_picture_depends_on_its_place_and_not_on_the_batch(world, tmp_path):
    """The same noise in every batch; the pictures agree up to the last bit of rounding."""
    one = paint(world, tmp_path / "a", profile=world[2], n=2, batch_size=1)
    many = paint(world, tmp_path / "b", profile=world[2], n=2, batch_size=3)
    assert len(one) == 4
    for a, b in zip(one, many, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_without_guidance_there_are_no_negative_rows(world, tmp_path):
    """Guidance 1 and below: diffusers takes the embeds as they are, so null rows would be a second person."""
    pipe = load_base(get_family(world[0]))
    pipe.load_ip_adapter([str(world[1])], subfolder=[""], weight_name=["body.safetensors"], image_encoder_folder=None)
    expected = pipe(
        PROMPTS[0], height=64, width=48, num_inference_steps=2, guidance_scale=0.0,
        generator=torch.Generator().manual_seed(derive_seed(4, "generate", 0, 0)),
        ip_adapter_image_embeds=[torch.ones(1, 1, 8)],
    ).images[0]  # fmt: skip
    got = paint(world, tmp_path / "a", profile=world[3], guidance=0.0)
    assert np.abs(got[0].astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_each_png_carries_its_run(world, tmp_path):
    paths = generate(PROMPTS, tmp_path, profile=world[2], adapter=world[1], device="cpu", n=2, steps=1, seed=9)
    assert [path.name for path in paths[:2]] == ["000-a-photo-of-a-woman-0.png", "000-a-photo-of-a-woman-1.png"]
    with Image.open(paths[3]) as picture:
        record = json.loads(picture.text["bolid"])
    assert record["kind"] == "picture" and record["family"] == world[0] and record["config"]["steps"] == 1
    assert record["config"]["prompt"] == PROMPTS[1] and record["config"]["scales"] == {"face": 1.0, "body": 1.0}
    assert record["seed"] == derive_seed(9, "generate", 1, 1)
    assert record["inputs"]["profile"] == sha256_file(world[2])
    assert record["inputs"]["photo_000"] == "ab" * 32  # for evaluate, which must not score against that photo
    assert record["inputs"]["body_adapter"] == sha256_file(world[1] / "body.safetensors")


def test_a_picture_of_another_command_is_kept(world, tmp_path, monkeypatch):
    def names(**options):
        made = generate(PROMPTS[:1], tmp_path, adapter=world[1], family=world[0], device="cpu", steps=1, **options)
        return [path.relative_to(tmp_path).as_posix() for path in made]

    name = "000-a-photo-of-a-woman"
    assert names(seed=1) == [f"{name}.png"]
    first = (tmp_path / f"{name}.png").read_bytes()
    assert names(seed=2) == [f"{name}_2.png"]
    (tmp_path / f"{name}_3.png").write_bytes(b"somebody's notes")
    assert names(seed=1, profile=world[2]) == [f"{name}_4.png"]
    # The same commands again, by other versions of the packages too: the same files.
    record = read_picture(tmp_path / f"{name}_2.png")
    with Image.open(tmp_path / f"{name}_2.png") as picture:
        save_picture(tmp_path / f"{name}_2.png", picture, record | {"packages": {"torch": "1.0"}})
    assert names(seed=1) == [f"{name}.png"] and names(seed=2) == [f"{name}_2.png"]
    assert read_picture(tmp_path / f"{name}_2.png") == record
    assert (tmp_path / f"{name}.png").read_bytes() == first
    assert (tmp_path / f"{name}_3.png").read_bytes() == b"somebody's notes"
    assert len(list(tmp_path.iterdir())) == 4

    def full(*_):
        raise OSError(28, "no space left")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(bolid.generate, "save_picture", full)
        names(seed=3)
    assert len(list(tmp_path.iterdir())) == 4, "nothing half-written"

    sheets = [names(seed=1, grid=[f"steps={steps}"])[-1] for steps in (1, 2, 1)]
    assert sheets == ["grid.png", "grid_2.png", "grid.png"]


def test_commands_at_the_same_time_take_no_name_twice(tmp_path):
    paths = []

    def save(seed):
        picture, record = Image.new("RGB", (8, 8)), run_record("picture", family="tiny", seed=seed)
        paths.append(bolid.generate.command._save(tmp_path / "a.png", picture, record))

    threads = [threading.Thread(target=save, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 16 and {read_picture(path)["seed"] for path in paths} == set(range(16))


def test_the_best_of_several_is_the_nearest_body(tmp_path):
    """With the tiny family's own models, which can see a person."""
    prompt = "a full body photo of a man walking, in a red short-sleeved top and black trousers, in a room"
    options = {"family": "tiny", "device": "cpu", "new_person": 5, "seed": 3, "steps": 6}
    [best] = generate([prompt], tmp_path / "best", best_of=3, **options)
    [first] = generate([prompt], tmp_path / "first", **options)
    family = get_family("tiny")
    pipe = load_base(family)
    set_sampler(pipe, family.defaults)
    person = _people(family, {"body": family.body_adapter}, [], None, 5, None, None)
    _load_adapters(pipe, family, {"body": family.body_adapter}, ["body"], person)
    seeds = [derive_seed(3, "generate", 0, 0, *more) for more in ((), ("candidate", 1), ("candidate", 2))]
    embeds = build_ip_adapter_image_embeds([person[0].vectors["body"]], guidance=True)
    painted = []
    for seed in seeds:
        with guidance_during(pipe, family.guidance):
            picture = pipe(
                prompt, height=128, width=96, num_inference_steps=6, guidance_scale=family.guidance.up,
                generator=torch.Generator().manual_seed(seed), ip_adapter_image_embeds=embeds,
            ).images[0]  # fmt: skip
        painted.append(np.asarray(picture))
    distances = PersonReader(family).distances(painted, person[0].vectors["body"])
    nearest = int(np.argmin(distances))
    assert len(set(distances)) == 3 and read_picture(best)["seed"] == seeds[nearest]
    for path, picture in ((best, painted[nearest]), (first, painted[0])):
        assert np.abs(np.asarray(Image.open(path)).astype(int) - picture).max() <= 1
    assert read_picture(best)["config"]["best_of"] == 3
    assert PersonReader(family).distances([np.zeros((128, 96, 3), np.uint8)], person[0].vectors["body"]) == [np.inf]


def test_what_the_family_adds_to_a_prompt_is_recorded(world, tmp_path):
    own = tmp_path / "family.toml"
    top, _, tables = Path(world[0]).read_text().partition("\n[")
    own.write_text(f"{top}\n[[wardrobe]]\nwords = ['coat']\ndefault = 'a coat'\n[{tables}")
    bare, coated = generate(["a man", "a man in a coat"], tmp_path / "out", family=str(own), device="cpu", steps=1)
    assert read_picture(bare)["config"]["painted"] == "a man, in a coat"
    assert read_picture(bare)["config"]["prompt"] == "a man" and "painted" not in read_picture(coated)["config"]
    [same_words] = generate(["a man, in a coat"], tmp_path / "again", family=world[0], device="cpu", steps=1)
    assert same([np.asarray(Image.open(bare))], [np.asarray(Image.open(same_words))])


def test_the_best_of_several_needs_a_body_of_the_familys_encoder(world, tmp_path):
    with pytest.raises(BolidError, match="--best-of compares bodies"):
        generate(PROMPTS, tmp_path / "out", family="tiny", device="cpu", best_of=2)
    assert not (tmp_path / "out").exists()


def test_prompt_files_may_have_comments():
    assert read_prompts(["a photo", "", "  # not this", "two "]) == ["a photo", "two"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"n": 0}, "^-n is 0"),
        ({"best_of": 0}, "--best-of is 0"),
        ({"body_scale": float("nan")}, "--body-scale is nan"),
        ({"guidance": -1.0}, "--guidance is -1"),
        ({"guidance": float("nan")}, "--guidance is nan"),
        ({"guidance": "0.2..0.8"}, "--guidance is 0.2..0.8"),
        ({"guidance": "2@0.8..0.2"}, "--guidance is 2@0.8..0.2: the stretch"),
        ({"guidance": "down=2"}, "--guidance is down=2"),
        ({"guidance": "2@0.1..0.2", "steps": 2}, "--guidance 2@0.1..0.2 covers none of the 2 steps"),
        ({"body_scale": "down=1,side=2"}, "--body-scale is down=1,side=2"),
        ({"body_scale": "0.8..0.2"}, "--body-scale is 0.8..0.2: the stretch 0.8..0.2 is none"),
        ({"new_person": 1, "body_scale": "0.6..0.9"}, "--body-scale 1@0.6..0.9 covers none of the 2 steps"),
        ({"body_scale": 1.0}, "--body-scale is 1.0, but nobody is to be shown"),
        ({"face_scale": "0.5@0..0.5"}, "--face-scale is 0.5@0..0.5, but nobody is to be shown"),
        ({"negative": "a hat", "guidance": 1.0}, "--negative has no effect at guidance 1"),
        ({"grid": ["height=1,2"]}, "'height' is no axis"),
        ({"grid": ["steps=1,x"]}, "--grid steps has the value 'x'"),
        ({"grid": ["steps=1,0"]}, "--steps is 0"),
        ({"grid": ["guidance=1,nan"]}, "--grid guidance is nan"),
        ({"grid": ["body-scale=1,inf"]}, "--grid body-scale is inf"),
        ({"grid": ["seed=1", "seed=2"]}, "--grid seed is given twice"),
        ({"lora": ["absent.safetensors:2"]}, "there is no LoRA absent.safetensors"),
        ({"profile": "a", "new_person": 1}, "more than one person"),
        ({"device": "warp9"}, "warp9"),
    ],
)
def test_settings_that_make_no_sense(world, tmp_path, options, message):
    with pytest.raises(BolidError, match=message):
        generate(PROMPTS, tmp_path / "out", family=world[0], **{"device": "cpu", **options})
    assert not (tmp_path / "out").exists()


# ---- controls -----------------------------------------------------------------------------------------------------


def with_adapters(world):
    pipe = load_base(get_family(world[0]))
    pipe.load_ip_adapter(
        [str(world[1])] * 2, subfolder=["", ""], weight_name=["face.safetensors", "body.safetensors"],
        image_encoder_folder=None,
    )  # fmt: skip
    return pipe


def plain_picture(pipe, prompt, **options):
    """Through diffusers alone, with both branches, of somebody whose vectors are all ones."""
    embeds = [torch.cat([torch.zeros(1, 1, d), torch.ones(1, 1, d)]) for d in (512, 8)]
    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": 5, "guidance_scale": 3.0} | options
    return pipe(
        prompt, height=64, width=48, output_type="np", generator=generator, ip_adapter_image_embeds=embeds, **options
    ).images  # fmt: skip


def test_remembering_the_conditions_changes_nothing_and_computes_them_once(world):
    """To the bit what diffusers' own path paints, with one projection a picture instead of one a step."""
    pipe = with_adapters(world)
    name, processor = next(item for item in pipe.unet.attn_processors.items() if "attn2" in item[0])
    layers = [processor.to_k_ip[0], pipe.unet.get_submodule(name.removesuffix(".processor")).to_k]
    counts = [0, 0]

    def counting(place, forward):
        def count(x):
            counts[place] += 1
            return forward(x)

        return count

    for place, layer in enumerate(layers):
        layer.forward = counting(place, layer.forward)
    plain = [plain_picture(pipe, prompt) for prompt in PROMPTS]
    assert counts == [10, 10]
    with remembered_conditions(pipe):
        remembered = [plain_picture(pipe, prompt) for prompt in PROMPTS]
    assert counts == [12, 12]  # once for each prompt
    assert all(np.array_equal(a, b) for a, b in zip(plain, remembered, strict=True))
    assert not np.array_equal(plain[0], plain[1])
    assert np.array_equal(plain_picture(pipe, PROMPTS[0]), plain[0]) and counts == [17, 17]  # as before, outside


def test_a_scale_for_a_stretch_of_the_denoising(world, tmp_path):
    """As diffusers alone does it, with a callback that turns the branches off after the third of five steps."""
    pipe = with_adapters(world)

    def callback(pipe, step, timestep, arguments):
        pipe.set_ip_adapter_scale([1.0, 0.0 if step >= 2 else 1.0])
        return arguments

    pipe.set_ip_adapter_scale([1.0, 1.0])
    face, body = torch.ones(512), torch.ones(8)
    record = run_record(
        "profile", family=world[0], inputs={"body_encoder": load_profile(world[2]).record["inputs"]["body_encoder"]}
    )
    save_profile(tmp_path / "ones.safetensors", body, torch.zeros(8), face, torch.ones(1), record)
    generator = torch.Generator().manual_seed(derive_seed(4, "generate", 0, 0))
    expected = pipe(
        PROMPTS[0], height=64, width=48, num_inference_steps=5, guidance_scale=3.0, generator=generator,
        negative_prompt="", callback_on_step_end=callback, output_type="pil",
        ip_adapter_image_embeds=[torch.cat([torch.zeros(1, 1, d), torch.ones(1, 1, d)]) for d in (512, 8)],
    ).images[0]  # fmt: skip

    def painted(body_scale):
        return paint(
            world, tmp_path / str(body_scale), profile=tmp_path / "ones.safetensors", steps=5, body_scale=body_scale,
            batch_size=1,
        )  # fmt: skip

    assert np.array_equal(painted("0..0.6")[0], np.asarray(expected))
    assert not same(painted("0..0.6"), painted("1")) and not same(painted("0..0.6"), painted("0.6..1"))
    assert same(painted("1@0..1"), painted(1.0))


@pytest.mark.parametrize("pose", [False, True])
def test_guidance_for_a_stretch_of_the_denoising(world, pose):
    """As diffusers alone does it with a callback that sets the scale to 1, but for half the rows in those steps."""
    pipe, extra = with_adapters(world), {}
    if pose:
        unet = load_base(get_family(world[0])).unet
        controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in controlnet.named_parameters():
            if "controlnet_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        pipe = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=controlnet)
        extra["image"] = Image.fromarray(np.full((64, 48, 3), 90, np.uint8))
    rows = []
    hook = pipe.unet.conv_in.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))

    def callback(pipe, step, timestep, arguments):
        pipe._guidance_scale = 3.0 if step < 2 else 1 + 1e-9
        return arguments

    whole = plain_picture(pipe, PROMPTS[0], **extra)
    expected = plain_picture(pipe, PROMPTS[0], callback_on_step_end=callback, **extra)
    assert not np.allclose(whole, expected, atol=0.01)
    rows.clear()
    with remembered_conditions(pipe), guidance_during(pipe, parse_guidance("3@0..0.6")):
        got = plain_picture(pipe, PROMPTS[0], **extra)
    assert rows == [2, 2, 2, 1, 1] and np.allclose(got, expected, atol=1e-4)
    rows.clear()
    with guidance_during(pipe, parse_guidance("3@0.2..0.6")):
        other = plain_picture(pipe, PROMPTS[0], **extra)
    assert rows == [1, 2, 2, 1, 1] and not np.allclose(other, expected, atol=1e-3)
    with guidance_during(pipe, parse_guidance(3)):
        assert np.array_equal(plain_picture(pipe, PROMPTS[0], **extra), whole)
    hook.remove()


def test_guidance_with_a_stretch_is_asked_for_and_recorded(world, tmp_path):
    whole = paint(world, tmp_path / "a", profile=world[2], guidance="3")
    part = paint(world, tmp_path / "b", profile=world[2], guidance="3@0..0.5")
    assert not same(whole, part) and same(whole, paint(world, tmp_path / "c", profile=world[2]))
    records = [read_picture(next((tmp_path / name).glob("*.png")))["config"]["guidance"] for name in ("a", "b")]
    assert records == [3.0, "3@0..0.5"]
    grid = paint(world, tmp_path / "g", profile=world[2], grid=["guidance=1,3@0..0.5"])
    assert same(grid[2:4], part)


def test_a_scale_for_each_part_of_the_network(world, tmp_path):
    whole = paint(world, tmp_path / "a", profile=world[3])
    parts = paint(world, tmp_path / "b", profile=world[3], body_scale="down=1,mid=1,up=1")
    one = [paint(world, tmp_path / part, profile=world[3], body_scale=f"{part}=1") for part in ("down", "mid", "up")]
    assert same(whole, parts)
    assert not any(same(picture, other) for picture in one for other in (whole, paint(world, tmp_path / "0")))
    record = read_picture(tmp_path / "mid" / "000-a-photo-of-a-woman.png")
    assert record["config"]["scales"] == {"body": "down=0,mid=1,up=0"}


def test_several_people_are_made_one_after_the_other(world, tmp_path):
    """Each to the bit as alone, whatever branches the others have."""
    together = generate(
        PROMPTS, tmp_path / "both", profile=[world[2], world[3]], adapter=world[1], device="cpu", seed=4
    )
    names = [str(path.relative_to(tmp_path / "both")) for path in together]
    assert names[0] == "me/000-a-photo-of-a-woman.png" and names[2] == "faceless/000-a-photo-of-a-woman.png"
    pictures = [np.asarray(Image.open(path)) for path in together]
    assert same(pictures[:2], paint(world, tmp_path / "1", profile=[world[2]]))
    assert same(pictures[2:], paint(world, tmp_path / "2", profile=world[3]))
    assert read_picture(together[3])["config"]["person"] == "the profile faceless.safetensors"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "me.safetensors").write_bytes(world[2].read_bytes())
    with pytest.raises(BolidError, match="two profiles are called me"):
        paint(world, tmp_path / "3", profile=[world[2], tmp_path / "other" / "me.safetensors"])


def test_a_grid_is_one_sheet_of_pictures_that_are_the_same_alone(world, tmp_path):
    grid = ["body-scale=0,1,0..0.5", "guidance=2,4"]
    *pictures, sheet = generate(
        PROMPTS, tmp_path / "g", profile=world[3], adapter=world[1], device="cpu", seed=4, grid=grid
    )
    assert sheet == tmp_path / "g" / "grid.png" and len(pictures) == 12
    cell = tmp_path / "g" / "body-scale=0..0.5" / "guidance=4"
    alone = paint(world, tmp_path / "a", profile=world[3], body_scale="0..0.5", guidance=4.0)
    assert same([np.asarray(Image.open(path)) for path in sorted(cell.glob("*.png"))], alone)
    record = read_picture(sheet)
    assert record["kind"] == "grid" and record["config"]["grid"] == grid
    with Image.open(sheet) as image:
        shown = np.asarray(image.convert("RGB"))
    assert 6 + 3 * 150 < shown.shape[1] <= 206 + 3 * 150
    # Three columns, and for each prompt a row a guidance: every picture is there, enlarged to 192 pixels.
    for row, (guidance, index) in enumerate(((2, 0), (4, 0), (2, 1), (4, 1))):
        for column, scale in enumerate(("0", "1", "0..0.5")):
            folder = tmp_path / "g" / f"body-scale={scale}" / f"guidance={guidance}"
            with Image.open(sorted(folder.glob("*.png"))[index]) as picture:
                large = np.asarray(picture.resize((144, 192), Image.Resampling.BICUBIC))
            top, left = 26 + 6 + row * 198, shown.shape[1] - (3 - column) * 150  # the labels are as wide as they need
            assert np.array_equal(shown[top : top + 192, left : left + 144], large)


def save_lora(path, unet, seed=0, name="attn2.to_q", rank=2, prefix="unet."):
    """A LoRA on every layer of that name, as peft writes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, module in unet.named_modules():
        if key.endswith(name):
            out, inside = module.weight.shape[:2]
            tensors[f"{prefix}{key}.lora_A.weight"] = torch.randn(rank, inside, generator=generator)
            tensors[f"{prefix}{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    save_file(tensors, path)
    return path


def test_loras(world, tmp_path):
    pipe = load_base(get_family(world[0]))
    a, b = save_lora(tmp_path / "a.safetensors", pipe.unet), save_lora(tmp_path / "b.safetensors", pipe.unet, 1)
    bare, with_me = paint(world, tmp_path / "0"), paint(world, tmp_path / "1", profile=world[2])
    changed = paint(world, tmp_path / "2", lora=[str(a)])
    assert not same(changed, bare)
    assert same(paint(world, tmp_path / "3", lora=[f"{a}:0"]), bare)
    assert same(paint(world, tmp_path / "4", lora=[f"{a}:1.0", f"{b}:0"]), changed)
    assert not same(paint(world, tmp_path / "5", lora=[f"{a}:0.5", f"{b}:-1"]), changed)
    both = paint(world, tmp_path / "6", profile=world[2], lora=[str(a)])
    assert not same(both, with_me) and not same(both, changed)
    record = read_picture(tmp_path / "5" / "000-a-photo-of-a-woman.png")
    assert record["inputs"]["lora_1"] == sha256_file(b) and record["config"]["lora"] == [f"{a}:0.5", f"{b}:-1"]


def test_a_lora_that_does_not_fit(world, tmp_path):
    pipe = load_base(get_family(world[0]))
    wide = save_lora(tmp_path / "wide.safetensors", pipe.unet)
    save_file({k: torch.cat([v, v], -1) if "lora_A" in k else v for k, v in load_file(wide).items()}, wide)
    some = save_lora(tmp_path / "some.safetensors", pipe.unet)
    save_file({k.replace("down_blocks", "side_blocks"): v for k, v in load_file(some).items()}, some)
    bare = save_lora(tmp_path / "bare.safetensors", pipe.unet, prefix="")
    save_file({"weight": torch.ones(2)}, tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor file at all")
    for path, message in (
        (wide, "does not fit the base of family"),
        (some, "does not fit the base of family"),
        (bare, "does not fit the base of family"),
        (tmp_path / "none.safetensors", "is no LoRA"),
        (tmp_path / "text.safetensors", "is not a safetensors file"),
        (tmp_path / "absent.safetensors", "there is no LoRA"),
    ):
        with pytest.raises(BolidError, match=message) as error:
            paint(world, tmp_path / "out", lora=[f"{path}:0.5"])
        assert error.value.hint and not (tmp_path / "out").exists()


def test_few_steps(world, tmp_path):
    """The family's LoRA, scheduler and body scale, no guidance, no null rows: what diffusers alone paints with them."""
    with pytest.raises(BolidError, match="has no few-step LoRA: looked for .*few.safetensors"):
        paint(world, tmp_path / "none", few_steps=True)
    with pytest.raises(BolidError, match="--guidance is 3 with --few-steps"):
        paint(world, tmp_path / "none", few_steps=True, guidance=3.0)
    with pytest.raises(BolidError, match="--negative has no effect at guidance 0"):
        paint(world, tmp_path / "none", few_steps=True, negative="a hat")
    with pytest.raises(BolidError, match="family 'sdxl-lightning' has no few-step sampler"):
        generate(PROMPTS, tmp_path / "none", few_steps=True, family="sdxl-lightning", device="cpu")
    assert not (tmp_path / "none").exists()
    pipe = load_base(get_family(world[0]))
    lora = save_lora(get_family(world[0]).few_steps_lora, pipe.unet, seed=5)
    try:
        got = paint(world, tmp_path / "a", profile=world[3], few_steps=True, batch_size=1)
        record = read_picture(tmp_path / "a" / "000-a-photo-of-a-woman.png")
        plain = paint(world, tmp_path / "c", profile=world[3], few_steps=True, batch_size=1, body_scale=1)
        with pytest.raises(BolidError, match="--steps 60 does not suit the sampler"):
            paint(world, tmp_path / "b", few_steps=True, steps=60)
    finally:
        lora.unlink()
    assert record["config"]["steps"] == 4 and record["config"]["guidance"] == 0 and "few_steps_lora" in record["inputs"]
    assert record["config"]["scales"] == {"body": 1.5}
    save_lora(tmp_path / "few.safetensors", pipe.unet, seed=5)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(tmp_path, weight_name="few.safetensors")
    pipe.load_ip_adapter([str(world[1])], subfolder=[""], weight_name=["body.safetensors"], image_encoder_folder=None)
    for scale, painted in ((1.5, got), (1.0, plain)):
        pipe.set_ip_adapter_scale(scale)
        expected = pipe(
            PROMPTS[0], height=64, width=48, num_inference_steps=4, guidance_scale=0.0,
            generator=[torch.Generator().manual_seed(derive_seed(4, "generate", 0, 0))],
            ip_adapter_image_embeds=[torch.ones(1, 1, 8)],
        ).images[0]  # fmt: skip
        assert np.array_equal(painted[0], np.asarray(expected))


def test_a_pose_from_a_photo(world, tmp_path, monkeypatch):
    """Through the ControlNet variant of the pipeline, with the person's branches still in place."""
    poses = {"a.png": 60, "b.png": 200}
    for name in poses:
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.setattr(
        bolid.generate.pose_map,
        "read_pose",
        lambda photo, family, device: np.full((*family.image_size, 3), poses[photo.name], np.uint8),
    )
    with pytest.raises(BolidError, match="has no ControlNet: looked for .*controlnet"):
        paint(world, tmp_path / "0", pose_from=tmp_path / "a.png")
    family = get_family(world[0])
    unet = load_base(family).unet
    network = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16))
    network.save_pretrained(family.controlnet)
    me = paint(world, tmp_path / "1", profile=world[2])
    # An untrained one adds zeros.
    assert same(me, paint(world, tmp_path / "2", profile=world[2], pose_from=tmp_path / "a.png"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "controlnet_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(family.controlnet)
    a = paint(world, tmp_path / "3", profile=world[2], pose_from=tmp_path / "a.png")
    b = paint(world, tmp_path / "4", profile=world[2], pose_from=tmp_path / "b.png")
    assert not same(a, me) and not same(a, b)
    assert not same(a, paint(world, tmp_path / "5", pose_from=tmp_path / "a.png"))
    assert same(me, paint(world, tmp_path / "6", profile=world[2], pose_from=tmp_path / "a.png", pose_scale=0.0))
    half = paint(world, tmp_path / "7", profile=world[2], pose_from=tmp_path / "a.png", pose_scale="1@0..0.5")
    assert not same(half, a) and not same(half, me)
    record = read_picture(tmp_path / "7" / "000-a-photo-of-a-woman.png")
    assert record["config"]["pose_scale"] == "1@0..0.5" and record["inputs"]["pose_from"]
    with pytest.raises(BolidError, match="--pose-scale is up=1"):
        paint(world, tmp_path / "8", pose_from=tmp_path / "a.png", pose_scale="up=1")
    other = diffusers.ControlNetModel.from_config({**network.config, "cross_attention_dim": 16})
    other.save_pretrained(family.controlnet)
    with pytest.raises(BolidError, match="was made for another base: its cross_attention_dim is 16"):
        paint(world, tmp_path / "9", pose_from=tmp_path / "a.png")


def test_an_adapter_folder_may_have_one_branch(world, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "body.safetensors").write_bytes((world[1] / "body.safetensors").read_bytes())
    body_only = paint(world, tmp_path / "1", profile=world[2], adapter=tmp_path / "adapter")
    assert same(body_only, paint(world, tmp_path / "2", profile=world[3]))
    with pytest.raises(BolidError, match="--face-scale is 0.5, but there is no face adapter") as error:
        paint(world, tmp_path / "3", profile=world[2], adapter=tmp_path / "adapter", face_scale=0.5)
    assert "leave out --face-scale" in error.value.hint
    (tmp_path / "adapter" / "body.safetensors").rename(tmp_path / "adapter" / "bod.safetensors")
    with pytest.raises(BolidError, match="there is no face adapter .*face.safetensors"):
        paint(world, tmp_path / "4", profile=world[2], adapter=tmp_path / "adapter")


def test_no_prompt(world, tmp_path):
    with pytest.raises(BolidError, match="no prompt"):
        generate(["  "], tmp_path, family=world[0])


def test_a_face_is_asked_of_a_profile_without_one(world, tmp_path):
    with pytest.raises(BolidError, match="has no face, but --face-scale is 1.0"):
        generate(PROMPTS, tmp_path, profile=world[3], adapter=world[1], face_scale=1.0, device="cpu")


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
            paint(world, tmp_path / "out", **arguments)
        else:
            with pytest.raises(BolidError, match="were made with different face models") as error:
                paint(world, tmp_path / "out", **arguments)
            assert "make the profile again with the face model" in error.value.hint
            paint(world, tmp_path / "out", face_scale=0.0, **arguments)


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
