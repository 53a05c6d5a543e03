"""JSON and TOML of anybody: limits before parsing."""

from __future__ import annotations

import time

import pytest

from bolid.errors import BolidError
from bolid.formats.parsing import parse_assignments, parse_json, parse_toml
from bolid.formats.sites import read_site


def test_what_is_plain_is_parsed():
    assert parse_json('{"a": [1, 2]}') == {"a": [1, 2]}
    assert parse_toml(b'a.b = "1.2.3"\n[c.d]\ne = 1.5') == {"a": {"b": "1.2.3"}, "c": {"d": {"e": 1.5}}}
    assert parse_toml(f'text = "{"." * 1000}"'.encode())["text"] == "." * 1000  # dots in a value nest nothing


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_deep_json(text):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(text)


def test_half_a_character():
    """A lone surrogate: JSON can spell it, and no file or terminal can take it."""
    for text in ('["\\ud800"]', b'{"\\uDC00": 1}'):
        with pytest.raises(ValueError, match="half a character"):
            parse_json(text)
    assert parse_json('["\\ud83d\\ude00", "\\u00e9"]') == ["\U0001f600", "\u00e9"]


def test_long_text():
    with pytest.raises(ValueError, match="more than 10 bytes"):
        parse_json("[1,2,3,4,5,6]", limit=10)
    with pytest.raises(ValueError, match="more than 262,144 bytes"):
        parse_toml(b"#" * 2_000_000)


@pytest.mark.parametrize(
    "text", ["a" + ".a" * 100_000 + " = 1", "[a" + ".a" * 100_000 + "]", "a = " + "[" * 100_000, "a = " + "{b=" * 9_999]
)
def test_deep_toml_is_refused_at_once(text, tmp_path):
    start = time.monotonic()
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_toml(text.encode())
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(BolidError, match="is not valid TOML: .*nested too deeply"):
        read_site(str(tmp_path / "site.toml"))
    assert time.monotonic() - start < 20


def test_assignments():
    assert parse_assignments(["inseam=+1sd", "waist = 80cm"], "--set", "") == {"inseam": "+1sd", "waist": "80cm"}
    for texts, message in ((["legs"], "--set legs sets nothing"), (["a=1", "a=2"], "--set a is given twice")):
        with pytest.raises(BolidError, match=message):
            parse_assignments(texts, "--set", "waist=-4cm")
