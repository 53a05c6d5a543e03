"""`generate`: who is shown, what is written, and which settings make no sense."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from generate_world import PROMPTS, make_pictures, make_world, read_picture, same
from PIL import Image

import bolid.generate.saving
import bolid.views
from bolid.backends.body import BodyEncoder, read_body_encoder, save_body_encoder
from bolid.backends.diffusion import load_base
from bolid.errors import BolidError
from bolid.formats.adapter import load_adapter, save_adapter
from bolid.formats.profile import load_profile, save_profile
from bolid.generate import generate, read_prompts, save_picture
from bolid.generate.identity import find_people
from bolid.generate.saving import save_beside
from bolid.method.body_vae import BodyPrior, BodyVAE, draw_body
from bolid.models.families import get_family
from bolid.person import PersonReader
from bolid.profile import make_profile
from bolid.run import derive_seed, run_record, sha256_file


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("generate"))


def test_scale_0_is_the_bare_base_bit_for_bit(world, tmp_path):
    nobody = make_pictures(world, tmp_path / "a")
    assert same(nobody, make_pictures(world, tmp_path / "b", profile=world.me, face_scale=0.0, body_scale=0.0))
    pipe = load_base(get_family(world.family))
    bare = pipe(
        PROMPTS, height=64, width=48, num_inference_steps=2, guidance_scale=3.0, negative_prompt=["", ""],
        generator=[torch.Generator().manual_seed(derive_seed(4, "generate", i, 0)) for i in (0, 1)], output_type="pil",
    ).images  # fmt: skip
    assert same(nobody, [np.asarray(image) for image in bare])


@pytest.mark.slow
def test_every_way_of_naming_a_person_changes_the_picture(world, tmp_path):
    nobody = make_pictures(world, tmp_path / "0")
    me = make_pictures(world, tmp_path / "1", profile=world.me)
    faceless = make_pictures(world, tmp_path / "2", profile=world.faceless)
    invented = [make_pictures(world, tmp_path / f"3{i}", new_person=i) for i in (1, 1, 2)]
    assert not same(me, nobody) and not same(faceless, nobody) and not same(me, faceless)
    assert same(invented[0], invented[1]) and not same(invented[0], invented[2])
    assert same(faceless, make_pictures(world, tmp_path / "4", profile=world.me, face_scale=0.0))


def test_an_invented_person_comes_from_the_population_of_the_encoder(tmp_path):
    def bodies(world):
        request = SimpleNamespace(
            family=get_family(world.family), profiles=(), photo=None, new_person=3,
            require_adapter=lambda branch: world.adapter / f"{branch}.safetensors",
        )  # fmt: skip
        return find_people(request, reader=None)[0]

    plain = make_world(tmp_path / "plain")
    normal = bodies(plain)
    assert normal.inputs == {}  # that encoder has no population
    file = get_family(plain.family).body_encoder
    tensors, _, record = read_body_encoder(file)
    model = BodyVAE(8, 4)
    model.load_state_dict(tensors)
    people = BodyPrior(torch.full((8,), 5.0), torch.diag(torch.full((8,), 0.25)))
    before = sha256_file(file)
    save_body_encoder(file, model, {**record, "space": before}, people)
    found = bodies(plain)
    assert torch.allclose(found.vectors["body"], 5 + 0.5 * normal.vectors["body"])
    assert found.inputs == {"population": sha256_file(file)} and found.body_encoder == before
    [picture] = generate(
        PROMPTS[:1], tmp_path / "out", adapter=plain.adapter, family=plain.family, device="cpu", new_person=3
    )
    assert read_picture(picture)["inputs"]["population"] == sha256_file(file)
    save_body_encoder(file, model, record, people)  # now of another space than the adapter
    assert torch.equal(bodies(plain).vectors["body"], normal.vectors["body"])


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


def test_a_photo_is_a_profile_of_one_photo(world, tmp_path, monkeypatch):
    monkeypatch.setattr(bolid.views, "ViewReader", Reader)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    make_profile([tmp_path / "photo.png"], tmp_path / "one.safetensors", family=world.family, device="cpu")
    seen = make_pictures(world, tmp_path / "1", photo=tmp_path / "photo.png")
    assert same(seen, make_pictures(world, tmp_path / "2", profile=tmp_path / "one.safetensors"))
    assert not same(seen, make_pictures(world, tmp_path / "3"))
    record = read_picture(tmp_path / "1" / "000-a-photo-of-a-woman.png")
    assert record["inputs"]["photo"] == sha256_file(tmp_path / "photo.png")
    tensors, record = load_adapter(world.adapter / "face.safetensors", "face")
    record["inputs"]["face_model"] = "0" * 64
    save_adapter(tmp_path / "adapter" / "face.safetensors", tensors, record)
    with pytest.raises(BolidError, match="the photo photo.png and the face adapter .* different face models"):
        make_pictures(world, tmp_path / "4", photo=tmp_path / "photo.png", adapter=tmp_path / "adapter")


def test_several_people_are_made_one_after_the_other(world, tmp_path):
    """Each to the bit as alone, whatever branches the others have."""
    together = generate(
        PROMPTS, tmp_path / "both", profile=[world.me, world.faceless], adapter=world.adapter, device="cpu", seed=4
    )
    names = [str(path.relative_to(tmp_path / "both")) for path in together]
    assert names[0] == "me/000-a-photo-of-a-woman.png" and names[2] == "faceless/000-a-photo-of-a-woman.png"
    pictures = [np.asarray(Image.open(path)) for path in together]
    assert same(pictures[:2], make_pictures(world, tmp_path / "1", profile=[world.me]))
    assert same(pictures[2:], make_pictures(world, tmp_path / "2", profile=world.faceless))
    assert read_picture(together[3])["config"]["person"] == "the profile faceless.safetensors"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "me.safetensors").write_bytes(world.me.read_bytes())
    with pytest.raises(BolidError, match="two profiles are called me"):
        make_pictures(world, tmp_path / "3", profile=[world.me, tmp_path / "other" / "me.safetensors"])


def test_a_picture_depends_on_its_place_and_not_on_the_batch(world, tmp_path):
    """The same noise in every batch; the pictures agree up to the last bit of rounding."""
    one = make_pictures(world, tmp_path / "a", profile=world.me, n=2, batch_size=1)
    many = make_pictures(world, tmp_path / "b", profile=world.me, n=2, batch_size=3)
    assert len(one) == 4
    for a, b in zip(one, many, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_each_png_carries_its_run(world, tmp_path):
    paths = generate(PROMPTS, tmp_path, profile=world.me, adapter=world.adapter, device="cpu", n=2, steps=1, seed=9)
    assert [path.name for path in paths[:2]] == ["000-a-photo-of-a-woman-0.png", "000-a-photo-of-a-woman-1.png"]
    with Image.open(paths[3]) as picture:
        record = json.loads(picture.text["bolid"])
    assert record["kind"] == "picture" and record["family"] == world.family and record["config"]["steps"] == 1
    assert record["config"]["prompt"] == PROMPTS[1] and record["config"]["scales"] == {"face": 1.0, "body": 1.0}
    assert record["seed"] == derive_seed(9, "generate", 1, 1)
    assert record["inputs"]["profile"] == sha256_file(world.me)
    assert record["inputs"]["photo_000"] == "ab" * 32  # for evaluate, which must not score against that photo
    assert record["inputs"]["body_adapter"] == sha256_file(world.adapter / "body.safetensors")


@pytest.mark.slow
def test_a_picture_of_another_command_is_kept(world, tmp_path, monkeypatch):
    def names(**options):
        made = generate(
            PROMPTS[:1], tmp_path, adapter=world.adapter, family=world.family, device="cpu", steps=1, **options
        )
        return [path.relative_to(tmp_path).as_posix() for path in made]

    name = "000-a-photo-of-a-woman"
    assert names(seed=1) == [f"{name}.png"]
    first = (tmp_path / f"{name}.png").read_bytes()
    assert names(seed=2) == [f"{name}_2.png"]
    (tmp_path / f"{name}_3.png").write_bytes(b"somebody's notes")
    assert names(seed=1, profile=world.me) == [f"{name}_4.png"]
    # The same commands again: the same files, left as they are, also those by other versions of the packages.
    record = read_picture(tmp_path / f"{name}_2.png")
    with Image.open(tmp_path / f"{name}_2.png") as picture:
        save_picture(tmp_path / f"{name}_2.png", picture, record | {"packages": {"torch": "1.0"}})
    assert names(seed=1) == [f"{name}.png"] and names(seed=2) == [f"{name}_2.png"]
    assert read_picture(tmp_path / f"{name}_2.png") == record | {"packages": {"torch": "1.0"}}
    assert (tmp_path / f"{name}.png").read_bytes() == first
    assert (tmp_path / f"{name}_3.png").read_bytes() == b"somebody's notes"
    assert len(list(tmp_path.iterdir())) == 4

    def full(*_):
        raise OSError(28, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr("bolid.formats.pictures.write_picture", full)
        with pytest.raises(BolidError, match="no space left"):
            names(seed=3)
    assert len(list(tmp_path.iterdir())) == 4, "nothing half-written"

    sheets = [names(seed=1, grid=[f"steps={steps}"])[-1] for steps in (1, 2, 1)]
    assert sheets == ["grid.png", "grid_2.png", "grid.png"]


def test_commands_at_the_same_time_take_no_name_twice(tmp_path):
    paths = []

    def save(seed):
        picture, record = Image.new("RGB", (8, 8)), run_record("picture", family="tiny", seed=seed)
        paths.append(save_beside(tmp_path / "a.png", picture, record))

    threads = [threading.Thread(target=save, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 16 and {read_picture(path)["seed"] for path in paths} == set(range(16))


@pytest.mark.slow
def test_the_best_of_several_is_the_nearest_body(tmp_path):
    """With the tiny family's own models, which can see a person."""
    prompt = "a full body photo of a man walking, in a red short-sleeved top and black trousers, in a room"
    options = {"family": "tiny", "device": "cpu", "new_person": 5, "seed": 3, "steps": 6}
    [best] = generate([prompt], tmp_path / "best", best_of=3, **options)
    [first] = generate([prompt], tmp_path / "first", **options)
    normal = torch.randn(64, generator=torch.Generator().manual_seed(derive_seed(5, "new-person")))
    body = draw_body(BodyEncoder(get_family("tiny").body_encoder).prior, normal)
    seeds = [derive_seed(3, "generate", 0, 0, *more) for more in ((), ("candidate", 1), ("candidate", 2))]
    candidates = []
    for seed in seeds:  # each candidate by its own seed
        [path] = generate([prompt], tmp_path / str(seed), **options | {"seed": seed})
        candidates.append(np.asarray(Image.open(path)))
    family = get_family("tiny")
    distances = PersonReader(family).distances(candidates, body)
    nearest = int(np.argmin(distances))
    assert len(set(distances)) == 3 and read_picture(best)["seed"] == seeds[nearest]
    assert same([np.asarray(Image.open(path)) for path in (best, first)], [candidates[nearest], candidates[0]])
    assert read_picture(best)["config"]["best_of"] == 3
    assert PersonReader(family).distances([np.zeros((128, 96, 3), np.uint8)], body) == [np.inf]


def test_the_best_of_several_needs_a_body_of_the_familys_encoder(world, tmp_path):
    with pytest.raises(BolidError, match="--best-of compares bodies"):
        generate(PROMPTS, tmp_path / "out", family="tiny", device="cpu", best_of=2)
    assert not (tmp_path / "out").exists()


def test_what_the_family_adds_to_a_prompt_is_recorded(world, tmp_path):
    own = tmp_path / "family.toml"
    top, _, tables = Path(world.family).read_text().partition("\n[")
    own.write_text(f"{top}\n[[wardrobe]]\nwords = ['coat']\ndefault = 'a coat'\n[{tables}")
    bare, coated = generate(["a man", "a man in a coat"], tmp_path / "out", family=str(own), device="cpu", steps=1)
    assert read_picture(bare)["config"]["encoded_prompt"] == "a man, in a coat"
    assert read_picture(bare)["config"]["prompt"] == "a man" and "encoded_prompt" not in read_picture(coated)["config"]
    [same_words] = generate(["a man, in a coat"], tmp_path / "again", family=world.family, device="cpu", steps=1)
    assert same([np.asarray(Image.open(bare))], [np.asarray(Image.open(same_words))])


def test_a_grid_is_one_sheet_of_pictures_that_are_the_same_alone(world, tmp_path):
    grid = ["body-scale=0,1,0..0.5", "guidance=2,4"]
    *pictures, sheet = generate(
        PROMPTS, tmp_path / "g", profile=world.faceless, adapter=world.adapter, device="cpu", seed=4, grid=grid
    )
    assert sheet == tmp_path / "g" / "grid.png" and len(pictures) == 12
    cell = tmp_path / "g" / "body-scale=0..0.5" / "guidance=4"
    alone = make_pictures(world, tmp_path / "a", profile=world.faceless, body_scale="0..0.5", guidance=4.0)
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


def test_prompt_files_may_have_comments():
    assert read_prompts(["a photo", "", "  # not this", "two "]) == ["a photo", "two"]


def test_no_prompt(world, tmp_path):
    with pytest.raises(BolidError, match="no prompt"):
        generate(["  "], tmp_path, family=world.family)


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
        ({"guidance": "2@0.8..0.2"}, "--guidance is 2@0.8..0.2: the interval"),
        ({"guidance": "down=2"}, "--guidance is down=2"),
        ({"guidance": "2@0.1..0.2", "steps": 2}, "--guidance 2@0.1..0.2 covers none of the 2 steps"),
        ({"body_scale": "down=1,side=2"}, "--body-scale is down=1,side=2"),
        ({"body_scale": "0.8..0.2"}, "--body-scale is 0.8..0.2: the interval 0.8..0.2 is empty"),
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
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**63}, "--seed is 9223372036854775808"),
        ({"profile": "a", "new_person": 1}, "more than one person"),
        ({"device": "warp9"}, "warp9"),
    ],
)
def test_settings_that_make_no_sense(world, tmp_path, options, message):
    with pytest.raises(BolidError, match=message):
        generate(PROMPTS, tmp_path / "out", family=world.family, **{"device": "cpu", **options})
    assert not (tmp_path / "out").exists()


def test_the_seed_of_a_record_makes_that_picture_again(world, tmp_path):
    """Of any place in the list, alone."""
    made = generate(PROMPTS, tmp_path / "all", profile=world.me, adapter=world.adapter, device="cpu", n=2, batch_size=1)
    seeds = [read_picture(path)["seed"] for path in made]
    assert seeds == [derive_seed(0, "generate", index, number) for index in (0, 1) for number in (0, 1)]
    for number, prompt, path, seed in zip(range(4), np.repeat(PROMPTS, 2), made, seeds, strict=True):
        again = make_pictures(world, tmp_path / str(number), [str(prompt)], profile=world.me, seed=seed)
        assert same(again, [np.asarray(Image.open(path))])
        assert read_picture(next((tmp_path / str(number)).glob("*.png")))["seed"] == seed


def test_what_the_text_encoder_does_not_read_is_said(world, tmp_path):
    """The small tokenizer has a token for each letter and room for 22."""
    warnings: list[str] = []
    options = {"family": world.family, "device": "cpu", "steps": 1, "seed": 1, "warn": warnings.append}
    long, read = "a photo of a woman at sea now here", "a photo of a woman at sea now"
    [path] = generate([long], tmp_path / "long", **options)
    assert warnings == [f"the text encoder reads no more than {read!r}; it does not read 'here'"]
    config = read_picture(path)["config"]
    assert config["prompt"] == long and config["encoded_prompt"] == read
    [cut] = generate([read], tmp_path / "cut", **options)
    assert same([np.asarray(Image.open(path))], [np.asarray(Image.open(cut))]) and len(warnings) == 1
    generate([read], tmp_path / "negative", **options, negative=long)
    assert len(warnings) == 2 and "encoded_negative" in read_picture(next((tmp_path / "negative").iterdir()))["config"]
    generate(["(hat:1.8)", "<lora:x:0.8>", "a (red) hat: 2"], tmp_path / "syntax", **options)
    assert [warning.split(" is read")[0] for warning in warnings[2:]] == ["(hat:1.8)", "<lora:x:0.8>"]


def test_the_familys_guidance_may_cover_no_step(world, tmp_path):
    """Nobody gave it: one step is sampled without."""
    family = tmp_path / "family.toml"
    family.write_text(Path(world.family).read_text().replace("guidance = 3.0", "guidance = '3@0.5..1'"))
    options = {"family": str(family), "device": "cpu", "steps": 1}
    pictures = [
        generate(PROMPTS[:1], tmp_path / str(i), **options | more)[0] for i, more in enumerate([{}, {"guidance": 0}])
    ]
    assert same(*([np.asarray(Image.open(path))] for path in pictures))
    with pytest.raises(BolidError, match="--guidance 3@0.5..1 covers none of the 1 steps"):
        generate(PROMPTS[:1], tmp_path / "2", **options, guidance="3@0.5..1")


def test_numbers_that_are_no_numbers_are_named(world, tmp_path):
    """In a profile, an adapter and the base: never a black picture."""
    record = load_profile(world.me).record
    for value in (float("nan"), float("inf"), 1e38):
        for place in ("body", "face"):
            body, face = torch.ones(8), torch.nn.functional.normalize(torch.ones(512), dim=0)
            {"body": body, "face": face}[place][3] = value
            save_profile(tmp_path / "bad.safetensors", body, torch.zeros(8), face, torch.ones(1), record)
            with pytest.raises(BolidError, match="bad.safetensors") as error:
                make_pictures(world, tmp_path / "out", profile=tmp_path / "bad.safetensors")
            assert error.value.hint
    tensors, record = load_adapter(world.adapter / "body.safetensors", "body")
    tensors["ip_adapter.1.to_v_ip.weight"][0, 0] = float("nan")
    save_adapter(tmp_path / "adapter" / "body.safetensors", tensors, record)
    with pytest.raises(
        BolidError, match="sampling 'a photo of a woman' of the profile faceless.*are not finite"
    ) as error:
        make_pictures(world, tmp_path / "out", profile=world.faceless, adapter=tmp_path / "adapter")
    assert "--adapter" in error.value.hint and not (tmp_path / "out").exists()


def test_a_picture_of_one_colour_is_none(world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "bolid.backends.diffusion.decode_latents",
        lambda pipe, latents: [np.zeros((64, 48, 3), np.uint8)] * len(latents),
    )
    with pytest.raises(BolidError, match="of nobody gave no picture: its pixels are all the same"):
        make_pictures(world, tmp_path / "out")
