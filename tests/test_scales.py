from __future__ import annotations

import pytest

from bolid.errors import BolidError
from bolid.scales import Scale, parse_grid, parse_lora, parse_scale, parse_size


@pytest.mark.parametrize(
    ("text", "scale", "plain"),
    [
        (0.7, Scale(0.7, 0.7, 0.7), 0.7),
        ("0.7", Scale(0.7, 0.7, 0.7), 0.7),
        ("down=0.5,mid=1,up=2", Scale(0.5, 1, 2), "down=0.5,mid=1,up=2"),
        ("up=1, down=0.5", Scale(0.5, 0, 1), "down=0.5,mid=0,up=1"),
        ("0.2..0.8", Scale(start=0.2, end=0.8), "1@0.2..0.8"),
        ("0.5@0..0.5", Scale(0.5, 0.5, 0.5, 0, 0.5), "0.5@0..0.5"),
        ("up=1@0.5..1", Scale(0, 0, 1, 0.5, 1), "down=0,mid=0,up=1@0.5..1"),
        ("1@0..1", Scale(), 1.0),
    ],
)
def test_scales_as_they_are_written(text, scale, plain):
    assert parse_scale(text, "--body-scale") == scale
    assert scale.plain() == plain and parse_scale(scale.plain(), "") == scale


@pytest.mark.parametrize(
    "text",
    ["", "nan", "inf", "-1", "much", "down", "down=", "side=1", "down=1,down=2", "down=1 up=1", "1@", "1@0.5", "@0..1",
     "0.5..0.5", "0.8..0.2", "0..1.5", "-0.1..1", "0..nan", "..", "down=0.5,up=1..2"],
)  # fmt: skip
def test_scales_that_make_no_sense(text):
    with pytest.raises(BolidError) as error:
        parse_scale(text, "--body-scale")
    assert error.value.message.startswith(f"--body-scale is {text}") and error.value.hint


def test_an_interval_is_of_the_steps_that_begin_in_it():
    assert list(Scale().steps(4)) == [0, 1, 2, 3]
    assert list(Scale(start=0.2, end=0.8).steps(10)) == [2, 3, 4, 5, 6, 7]
    assert list(Scale(start=0.25, end=0.5).steps(4)) == [1]
    # Two intervals that meet share no step and leave none out.
    for total in range(1, 60):
        for cut in (0.1, 0.3, 1 / 3, 0.7):
            steps = [*Scale(end=cut).steps(total), *Scale(start=cut).steps(total)]
            assert steps == list(range(total))
    scale = parse_scale("down=0.5,up=1@0..0.5", "")
    assert scale.at(0, 4) == {"down": 0.5, "mid": 0.0, "up": 1.0} and scale.at(2, 4) == 0.0
    assert Scale(2, 2, 2).at(3, 4) == 2 and Scale(0, 0, 0).is_zero


def test_a_grid_has_a_cell_for_each_combination():
    assert parse_grid([]) == [{}]
    cells = parse_grid(["body-scale=0, 0.5", "guidance=2,4"])
    assert cells == [
        {"body-scale": "0", "guidance": "2"},
        {"body-scale": "0", "guidance": "4"},
        {"body-scale": "0.5", "guidance": "2"},
        {"body-scale": "0.5", "guidance": "4"},
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["height=1"], "'height' is no axis"),
        (["steps"], "--grid steps lacks values"),
        (["steps="], "lacks values"),
        (["steps=1,,2"], "lacks values"),
        (["steps=1,1"], "names a value twice"),
        (["steps=1", "steps=2"], "--grid steps is given twice"),
    ],
)
def test_grids_that_make_no_sense(options, message):
    with pytest.raises(BolidError, match=message) as error:
        parse_grid(options)
    assert error.value.hint


def test_sizes_are_written_width_first_and_kept_height_first():
    assert parse_size("832x1216") == parse_size(" 832X1216 ") == (1216, 832)
    for text in ("", "832", "832x", "x832", "0x8", "-8x8", "8x8x8", "8.5x8", "8 x 8", "1e3x8", "٣x8", "9" * 6 + "x8"):
        with pytest.raises(BolidError, match="--size is ") as error:
            parse_size(text)
        assert "WIDTHxHEIGHT" in error.value.hint


def test_loras_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b:0.5"):
        (tmp_path / name).touch()
    assert [parse_lora(text) for text in ("a.safetensors", "a.safetensors:0.8", "a.safetensors:-1", "b:0.5")] == [
        (type(tmp_path)(name), weight)
        for name, weight in (("a.safetensors", 1.0), ("a.safetensors", 0.8), ("a.safetensors", -1.0), ("b:0.5", 1.0))
    ]
    for text, message in (
        ("absent.safetensors", "there is no LoRA absent.safetensors"),
        ("a.safetensors:much", "there is no LoRA a.safetensors:much"),
        ("a.safetensors:nan", "the weight is nan"),
    ):
        with pytest.raises(BolidError, match=message) as error:
            parse_lora(text)
        assert error.value.hint
