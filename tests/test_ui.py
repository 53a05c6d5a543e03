"""The page's work without the page: people, photos, bodies, pictures and who may use it. No gradio is needed."""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import trimesh
from generate_world import make_world, read_picture, same
from PIL import Image
from typer.testing import CliRunner

from bolid.errors import BolidError
from bolid.generate import generate
from bolid.generate.models import Models
from bolid.models.families import get_family
from bolid.ui import body_sliders
from bolid.ui.access import Access
from bolid.ui.people import People
from bolid.ui.photos import MAX_BYTES, MAX_PHOTOS, enlarged, uploaded
from bolid.ui.pictures import (
    Cancelled,
    GeneratedPicture,
    Job,
    PictureGenerator,
    PictureRequest,
    SamplingProgress,
    Subject,
)
from bolid.ui.workspace import Workspace
from bolid_cli.main import app

PROMPT = "a photo of a woman, 'quoted' & more"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    adapters = [f"{branch}_adapter = '{root / 'adapter' / branch}.safetensors'\n" for branch in ("face", "body")]
    return make_world(root, settings="".join(adapters))


@pytest.fixture
def generator(world, tmp_path):
    return PictureGenerator(get_family(world.family), world.family, "cpu", Models(), tmp_path / "pictures")


def pictures(generator, request, *subjects, job=None):
    """The pictures of a request, and the progress in between."""
    events = list(generator.generate(job or Job(), request, list(subjects) or [Subject()]))
    return [e for e in events if isinstance(e, GeneratedPicture)], [
        e for e in events if isinstance(e, SamplingProgress)
    ]


def pixels(made):
    return [np.asarray(Image.open(one.path)) for one in made]


# ---- people and photos


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\0b", "x" * 41, "a..b", "a\nb", None]
)
def test_names_are_never_paths(tmp_path, name):
    people = People(tmp_path)
    for use in (people.path, lambda name: people.add(name, tmp_path), people.delete, people.seed_file):
        with pytest.raises(BolidError, match="is no name for a person"):
            use(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["people", "pictures"]


def test_people_are_numbered_and_deleted_with_their_pictures(world, tmp_path):
    people = People(tmp_path)
    for name, profile in (("Zoë A.", world.me), (" Zoë A.", world.me), ("other", world.faceless)):
        people.add(name, Path(shutil.copy(profile, tmp_path / "new")))
        (tmp_path / "new").unlink(missing_ok=True)
    assert people.names() == ["other", "Zoë A.", "Zoë A. 2"]
    with pytest.raises(BolidError, match="there is no person 'Anna'") as caught:
        people.path("Anna")
    assert "other, Zoë A." in caught.value.hint
    for who in ("other", "Zoë A."):
        generate([PROMPT], people.pictures / who, profile=people.path(who), family=world.family, device="cpu", steps=1)
    assert people.delete("other") == 1 and people.names() == ["Zoë A.", "Zoë A. 2"]
    assert [path.parent.name for path in tmp_path.rglob("*.png")] == ["Zoë A."]


def test_two_servers_share_a_folder(tmp_path):
    killed = tmp_path / "uploads" / "of one that was killed"
    killed.mkdir(parents=True)
    (killed / "photo.jpg").touch()
    first, second = (Workspace(tmp_path, device="cpu") for _ in range(2))
    assert not killed.exists() and first.uploads.is_dir() and first.uploads != second.uploads
    for workspace in (first, second):
        workspace.create_profile("Ida", [], {"height": "172"})
    assert first.people.names() == second.people.names() == ["Ida", "Ida 2"]
    first.close()
    assert second.uploads.is_dir() and not first.uploads.exists()
    second.close()
    assert list((tmp_path / "uploads").iterdir()) == []


def test_only_uploaded_files_are_read(tmp_path):
    (tmp_path / "uploads").mkdir()
    inside, outside = tmp_path / "uploads" / "a.jpg", tmp_path / "secret.jpg"
    for file in (inside, outside):
        file.write_bytes(b"x")
    (tmp_path / "uploads" / "link.jpg").symlink_to(outside)
    assert uploaded([str(inside)], tmp_path / "uploads") == [inside]
    for wrong in (
        outside,
        tmp_path / "uploads" / "link.jpg",
        tmp_path / "uploads" / ".." / "secret.jpg",
        "/etc/passwd",
    ):
        with pytest.raises(BolidError, match="was not uploaded"):
            uploaded([wrong], tmp_path / "uploads")
    with pytest.raises(BolidError, match="41 photos are too many"):
        uploaded([inside] * (MAX_PHOTOS + 1), tmp_path / "uploads")
    with open(inside, "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(BolidError, match=r"a.jpg is larger than 32 MB"):
        uploaded([inside], tmp_path / "uploads")


def test_small_pictures_are_enlarged_sharply():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8))
    large, factor = enlarged(picture, 300)
    assert factor == 4 and large.size == (192, 256)
    assert np.array_equal(np.asarray(large)[2::4, 2::4], np.asarray(picture))
    assert enlarged(large, 128)[0].size == (96, 128)


# ---- bodies


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A workspace with somebody of whom only measurements are known."""
    workspace = Workspace(tmp_path_factory.mktemp("work"), device="cpu")
    workspace.create_profile("Ida", [], {"height": "172", "waist": "70", "weight": ""})
    return workspace


def test_sliders_move_the_mannequin_and_save_a_profile(measured):
    shape, rows = measured.shape("Ida", {})
    value = {row.name: row.value for row in rows}
    assert abs(value["height"] - 172) < 1 and abs(value["waist"] - 70) < 1
    names = [slider.name for slider in body_sliders.sliders()]
    assert names == list(value) and all(s.low <= value[s.name] <= s.high for s in body_sliders.sliders())
    moved, rows = measured.shape("Ida", {"waist": 76.0})
    after = {row.name: row.value for row in rows}
    assert abs(after["waist"] - 76) < 1 and abs(after["hip"] - value["hip"]) < 1
    files = [measured.mannequin(one) for one in (shape, moved)]
    before, changed = (trimesh.load(file, force="mesh") for file in files)
    assert before.vertices.shape == changed.vertices.shape
    shift = np.linalg.norm(before.vertices - changed.vertices, axis=1)
    assert 0.005 < shift.max() < 0.05
    assert all(b"COLOR_0" in file.read_bytes() for file in files)
    name = measured.edit("Ida", {"waist": 76.0}, True, "Ida")
    assert name == "Ida 2"
    assert abs(dict((r.name, r.value) for r in measured.shape(name, {})[1])["waist"] - 76) < 1
    with pytest.raises(BolidError, match="no measurement is changed"):
        measured.edit("Ida", {}, True, "x")
    with pytest.raises(BolidError, match="there is no measurement 'nose'"):
        measured.shape("Ida", {"nose": 3})


def test_a_profile_is_opened_under_a_name_of_its_own(measured):
    file = measured.uploads / "it's me; rm -rf.safetensors"
    file.write_bytes(measured.people.path("Ida").read_bytes())
    assert measured.open_profile(file) == "it s me  rm -rf"
    file.write_bytes(b"nonsense")
    with pytest.raises(BolidError, match="rm -rf.safetensors"):
        measured.open_profile(file)


def test_somebody_invented_is_the_same_for_the_same_seed(measured):
    first, second, other = (measured.create_invented("Nora", seed).result for seed in (4, 4, 5))
    assert first.measurements == second.measurements != other.measurements and not first.has_face
    with pytest.raises(BolidError, match="the seed is 600000"):
        measured.create_synthetic("x", 600_000)


def test_the_body_says_what_a_prompt_calls_somebody(measured):
    for sex in ("woman", "man"):
        name = measured.create_profile(sex, [], {"height": "172"}, sex).name
        assert measured.people.is_woman(name) == (sex == "woman")


# ---- pictures


@pytest.mark.slow
def test_a_picture_is_made_again_by_its_command(world, generator, tmp_path, monkeypatch):
    request = PictureRequest(PROMPT, body_scale=0.4, number=2, seed=7, steps=2, guidance=1.5, negative="blue")
    me = Subject("me", world.me, frozenset({"face", "body"}))
    made, steps = pictures(generator, request, me, Subject())
    assert [one.who for one in made] == ["me", "me", "nobody", "nobody"]
    assert [(e.done, e.step) for e in steps] == [(d, s) for d in range(4) for s in (1, 2)]
    assert any(e.preview is not None and e.preview.shape == pixels(made)[0].shape for e in steps)
    assert len({one.path for one in made}) == 4 and all(one.path.is_relative_to(tmp_path) for one in made)
    monkeypatch.chdir(tmp_path)
    for one in made:
        words = shlex.split(one.command)
        assert (words[0] == "bolid" and "--body-scale" in words) or one.who == "nobody"
        result = CliRunner().invoke(app, [*words[1:], "--device", "cpu", "--out", "again", "--quiet"])
        assert result.exit_code == 0, result.output
        again = Path(result.stdout.strip().splitlines()[-1])
        assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(one.path)))
        assert read_picture(again)["config"] == read_picture(one.path)["config"]
    # Its own request is that very picture too.
    alone, _ = pictures(generator, made[1].request, me)
    assert same(pixels(alone), pixels(made[1:2]))


def test_what_is_not_asked_for_is_no_option_of_the_command():
    family = get_family("tiny")
    assert PictureRequest("x", face_scale=1.0).options(family, {"face", "body"}) == {}
    request = PictureRequest("x", 0.5, 0.5, pose="waving", upscale=2, refine_face=True)
    more = {"upscale": 2, "refine_face": True}
    assert request.options(family, {"body"}) == {"body_scale": 0.5, "pose": "waving", **more}
    assert request.options(family, set()) == more  # nobody has no body to be posed


def test_models_are_loaded_once(world, generator):
    request = PictureRequest(PROMPT, steps=1)
    first, _ = pictures(generator, request)
    pipe = generator.models.current
    second, _ = pictures(generator, request)
    assert generator.models.current is pipe and same(pixels(first), pixels(second))
    (alone,) = generate([PROMPT], generator.pictures / "alone", family=world.family, device="cpu", steps=1)
    assert np.array_equal(np.asarray(Image.open(alone)), pixels(first)[0])
    pictures(generator, PictureRequest(PROMPT, steps=1), Subject("me", world.faceless, frozenset({"body"})))
    assert generator.models.current is not pipe  # of one pipeline that is kept


def test_a_job_stops_within_a_step_and_the_next_one_goes_on(generator):
    job, seen = Job(), []
    with pytest.raises(Cancelled):
        for event in generator.generate(job, PictureRequest(PROMPT, number=16, steps=200), [Subject()]):
            seen.append(event)
            job.stop()
    assert len(seen) <= 4 and not list(generator.pictures.rglob("*.png"))
    events = generator.generate(Job(), PictureRequest(PROMPT, number=16, steps=20), [Subject()])
    next(events)
    events.close()  # nobody listens any more
    assert len(pictures(generator, PictureRequest(PROMPT, steps=1))[0]) == 1
    assert len(list(generator.pictures.rglob("*.png"))) == 1


def test_a_job_can_be_stopped_before_it_begins(measured):
    assert measured.stop("later") is False
    with pytest.raises(Cancelled):
        list(measured.pictures("later", PictureRequest(PROMPT, steps=1), []))
    assert measured.stop("page", until=5.0) is False
    for requested_at in (4.0, 5.0):
        with pytest.raises(Cancelled):
            list(measured.pictures("page", PictureRequest(PROMPT, steps=1), [], requested_at))
    with measured.job("page", requested_at=6.0) as job:
        assert measured.stop("page", until=5.5) is False  # a click that arrives late
        job.check()
        assert measured.stop("page", until=6.0) is True
        with pytest.raises(Cancelled):
            job.check()
    assert not list(measured.people.pictures.rglob("*.png"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (PictureRequest(" - "), "no prompt given"),
        (PictureRequest("x" * 3000), "longer than 2000 characters"),
        (PictureRequest("x", number=17), "17 pictures are asked for"),
        (PictureRequest("x", steps=0), "0 steps are asked for"),
        (PictureRequest("x", seed=-1), "the seed is -1"),
        (PictureRequest("x", face_scale=9.0), "the face strength is 9.0"),
        (PictureRequest("x", upscale=3), "upscale is 3"),
        (PictureRequest("x", pose="flying"), "there is no pose 'flying'"),
        (PictureRequest("x", pose="waving", pose_from=Path("x")), "a pose and a photo of a pose"),
    ],
)
def test_wrong_requests_are_refused(generator, wrong, message):
    with pytest.raises(BolidError, match=message):
        pictures(generator, wrong)


def test_a_grid_is_one_contact_sheet(world, generator):
    job, grid = Job(), ["steps=1,2", "seed=1,2"]
    events = list(generator.grid(job, PictureRequest(PROMPT), [Subject()], grid, 4))
    assert Image.open(events[-1]).width > 100 and [e.done for e in events[:-1]] == [0, 1, 2, 2, 3, 3]


# ---- access


def ask(application, path="/", method="GET", **headers):
    """(status, headers, body) of a request."""
    sent = []

    async def send(message):
        sent.append(message)

    where, _, query = path.partition("?")
    scope = {
        "type": "http", "method": method, "path": where, "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    asyncio.run(application(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(scope["path"]).encode()})


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:7860", 200), ("localhost:7860", 200), ("[::1]:7860", 200), ("localhost", 200), ("evil.example", 403),
     ("127.0.0.1.evil.example:7860", 403), ("", 403)],
)  # fmt: skip
def test_without_a_token_this_machine_alone_may_use_it(host, status):
    assert ask(Access(hello, None), host=host)[0] == status


def test_another_web_page_may_not_use_it():
    for token in (None, "secret"):
        access = Access(hello, token)
        assert ask(access, host="localhost:1", origin="http://evil.example", authorization="Bearer secret")[0] == 403
        assert ask(access, host="localhost:1", origin="http://localhost:1", authorization="Bearer secret")[0] == 200


def test_with_a_token_others_may():
    access = Access(hello, "secret")
    assert ask(access, host="x")[0] == ask(access, "/?token=wrong", host="x")[0] == 401
    assert (
        ask(access, host="x", authorization="Bearer wrong")[0] == ask(access, host="x", cookie="bolid_token=")[0] == 401
    )
    status, headers, _ = ask(access, "/a?token=secret&b=1", host="x")
    assert status == 303 and headers[b"location"] == b"/a?b=1" and b"HttpOnly" in headers[b"set-cookie"]
    assert ask(access, host="x", cookie=headers[b"set-cookie"].decode().partition(";")[0])[0] == 200
    assert ask(access, host="x", authorization="Bearer secret")[0] == 200


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["ui", "--no-browser"])
    assert result.exit_code == 1 and "pip install 'bolid[ui]'" in result.stderr


def test_a_port_that_is_taken(monkeypatch, tmp_path, server):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    result = CliRunner().invoke(app, ["ui", "--port", server.url.rpartition(":")[2], "--folder", str(tmp_path)])
    assert result.exit_code == 1 and "cannot be used" in result.stderr and "--port" in result.stderr
