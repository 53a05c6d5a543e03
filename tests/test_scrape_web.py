"""scrape --urls and politeness: what goes wrong on the way, pauses, robots.txt, reserved rights."""

from __future__ import annotations

import gzip
import ipaddress
import socket
import time
import zlib
from collections import Counter
from email.utils import formatdate

import pytest
from gallery import WEB, Server, current_markup, files, jpeg, records, table, theplace, whole

from bolid.errors import BolidError
from bolid.scrape import TooManyFailed, rules, scrape
from bolid.scrape.politeness import is_private


def test_lists(server, tmp_path, listed):
    for n in range(4):
        server.pages[f"/{n}.jpg"] = jpeg(n)
    expected = {"Anna": 2, "Ben Ali": 1, "list": 1}
    (tmp_path / "list.txt").write_text(
        f"# mine\nAnna {server.url}/0.jpg\nAnna\t{server.url}/1.jpg\n\nBen Ali {server.url}/2.jpg\n{server.url}/3.jpg\n"
    )
    assert files(scrape(urls=tmp_path / "list.txt", out=tmp_path / "a", **WEB).out) == expected
    people = {"Anna": ["/0.jpg", "/1.jpg"], "Ben Ali": ["/2.jpg"], "": ["/3.jpg"]}
    assert files(scrape(urls=listed(people), out=tmp_path / "b", **WEB).out) == expected
    import polars

    polars.read_csv(tmp_path / "list.csv").write_parquet(tmp_path / "list.parquet")
    assert files(scrape(urls=tmp_path / "list.parquet", out=tmp_path / "c", **WEB).out) == expected
    polars.read_csv(tmp_path / "list.csv").write_csv(tmp_path / "list.tsv", separator="\t")
    assert files(scrape(urls=tmp_path / "list.tsv", out=tmp_path / "d", **WEB).out) == expected


def test_a_list_of_addresses_and_captions(server, tmp_path):
    """As LAION's: columns URL and TEXT, and no person."""
    server.pages["/1.jpg"] = jpeg(1)
    (tmp_path / "anna.csv").write_text(f'URL,TEXT\n{server.url}/1.jpg,"a woman, in red"\n')
    result = scrape(urls=tmp_path / "anna.csv", out=tmp_path / "photos", **WEB)
    (caption,) = (tmp_path / "photos" / "anna").glob("*.txt")
    assert caption.read_text().strip() == "a woman, in red"
    assert any("names no person for 1 of its photos: they count as anna's" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.csv", b"name,link\nx,http://a/\n", "has the columns link, name", "needs the column url"),
        ("a.csv", b"person,url\n", "there are no addresses in", "one a line"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text", "save it as UTF-8"),
        ("a.parquet", b"PAR1nonsense", "cannot read", "write it again"),
        ("a.json", b"[]", "is not a .txt, .csv, .tsv or .parquet file", "one of these formats"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, name, content, message, hint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BolidError, match=message) as error:
        scrape(urls=tmp_path / name, out=tmp_path / "photos", **WEB)
    assert hint in error.value.hint and not (tmp_path / "photos").exists()


@pytest.mark.slow
def test_what_goes_wrong(server, tmp_path, listed, monkeypatch):
    """Every kind of failure in one run: each has its reason, and none costs another photo."""
    monkeypatch.setattr(rules, "TIMEOUT", 2)
    monkeypatch.setattr(rules, "RETRIES", 1)
    good = jpeg(1)

    def slow(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(good)))
        handler.end_headers()
        for byte in good[:40]:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.1)

    def cut_off(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(good)))
        handler.end_headers()
        handler.wfile.write(good[: len(good) // 2])
        handler.close_connection = True

    def endless(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        block = b"100000\r\n" + bytes(2**20) + b"\r\n"
        for _ in range(64):
            handler.wfile.write(block)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (20_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/x.jpg"
    server.pages |= {
        "/good.jpg": good,
        "/500.jpg": (500, {}, b"oh"),
        "/slow.jpg": slow,
        "/cut.jpg": cut_off,
        "/truncated.jpg": jpeg(2)[:-900],
        "/moved.jpg": (302, {"Location": "/moved/here.jpg"}, b""),
        "/moved/here.jpg": jpeg(3),
        "/round.jpg": (302, {"Location": "/round.jpg?2"}, b""),
        "/round.jpg?2": (302, {"Location": "/round.jpg"}, b""),
        "/huge.jpg": (200, {"Content-Length": str(10**12)}, b"x"),
        "/endless.jpg": endless,
        "/bomb.jpg": (200, {"Content-Encoding": "gzip"}, gzip.compress(bytes(40 * 2**20))),
        "/page.jpg": "<html>you are not logged in</html>",
        "/bomb.png": (200, {}, bomb),
        "/file.jpg": (302, {"Location": "file:///etc/passwd"}, b""),
        "/private/a.jpg": jpeg(4),
        "/noai.jpg": (200, {"X-Robots-Tag": "otherbot: noindex, NoImageAI"}, jpeg(5)),
        "/tdm.jpg": (200, {"TDM-Reservation": "1"}, jpeg(6)),
        "/open.jpg": (200, {"TDM-Reservation": "0", "X-Robots-Tag": "noindex"}, jpeg(7)),
    }  # fmt: skip
    paths = [path for path in server.pages if path not in ("/robots.txt", "/moved/here.jpg", "/round.jpg?2")]
    odd = [nobody, "file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "/missing.jpg"]
    people = {"Anna": [path for path in paths if path != "/file.jpg"] + odd, "Ben": ["/file.jpg"]}
    result = scrape(urls=listed(people), out=tmp_path / "photos", max_bad=1, connections=4, **WEB)
    assert {r["url"].removeprefix(server.url) for r in records(result.out)} == {"/good.jpg", "/moved.jpg", "/open.jpg"}
    reasons = {row["source"].removeprefix(server.url): row["reason"] for row in table(result.out / "dropped.csv")}
    redirected = reasons.pop("/file.jpg")
    assert redirected.startswith(("HTTP status 302", "cannot be fetched", rules.LOOP))
    assert reasons == {
        "/500.jpg": "HTTP status 500",
        "/missing.jpg": "HTTP status 404",
        "/slow.jpg": "no answer within 2 s",
        "/cut.jpg": "the connection broke off",
        "/truncated.jpg": "the file is damaged",
        "/round.jpg": rules.LOOP,
        "/huge.jpg": rules.TOO_LARGE,
        "/endless.jpg": rules.TOO_LARGE,
        "/bomb.jpg": rules.TOO_LARGE,
        "/page.jpg": "the file is not a picture",
        "/bomb.png": "the file is too large a picture (more than 100 megapixels; as JPEG, 400)",
        "/private/a.jpg": rules.ROBOTS,
        "/noai.jpg": rules.RESERVED,
        "/tdm.jpg": rules.RESERVED,
        nobody: rules.ROBOTS_UNREACHABLE,
        "file:///etc/passwd": rules.NO_ADDRESS,
        "ftp://127.0.0.1/x": rules.NO_ADDRESS,
        "http://": reasons["http://"],
    }
    assert server.count("/500.jpg") == server.count("/cut.jpg") == 2 and server.count("/page.jpg") == 1
    assert server.count("/private/a.jpg") == 0
    assert result.dropped == {rules.RESERVED: 2, rules.ROBOTS: 1}
    whole(result.out)

    # What may work later is tried again; what is settled is not.
    server.pages["/500.jpg"], server.pages["/slow.jpg"] = jpeg(8), jpeg(9)
    before = Counter(server.hits)
    with pytest.raises(
        TooManyFailed, match=r"of \d+ photos could not be fetched or read, more than --max-bad 0.05"
    ) as error:
        scrape(urls=listed(people), out=tmp_path / "photos", connections=4, **WEB)
    assert "dropped.csv" in error.value.hint and error.value.result.new == 2 and error.value.result.photos == 5
    tried = {path for path, number in Counter(server.hits).items() if number > before[path]}
    assert (
        {"/500.jpg", "/slow.jpg", "/cut.jpg"}
        <= tried
        <= {"/500.jpg", "/slow.jpg", "/cut.jpg", "/robots.txt", "/file.jpg"}
    )


@pytest.mark.slow
def test_a_server_that_asks_for_pauses(server, tmp_path, listed):
    answers = iter(
        [(429, {"Retry-After": "1"}, b""), (503, {"Retry-After": formatdate(time.time() + 3, usegmt=True)}, b"")]
    )
    server.pages |= {"/0.jpg": lambda handler: next(answers, jpeg(0)), "/1.jpg": jpeg(1)}
    messages = []
    result = scrape(
        urls=listed({"Anna": ["/0.jpg", "/1.jpg"]}),
        out=tmp_path / "photos",
        **WEB,
        progress=lambda d, t, text: messages.append(text),
    )
    assert result.photos == 2 and server.count("/0.jpg") == 3
    first, second, _ = server.times["/0.jpg"]
    assert second - first >= 1 and all(not first < t < first + 1 for t in server.times["/1.jpg"]), (
        "the whole host waits"
    )

    server.pages["/2.jpg"] = (429, {"Retry-After": "86400"}, b"")
    with pytest.raises(TooManyFailed) as error:
        scrape(urls=listed({"Ben": ["/2.jpg"]}), out=tmp_path / "other", **WEB)
    assert error.value.result.failed == {rules.BUSY: 1} and server.count("/2.jpg") == 1


@pytest.mark.parametrize(
    ("robots", "reason"),
    [
        ("User-agent: *\nDisallow: /\n", rules.ROBOTS),
        ("User-agent: bolid\nDisallow: /*.jpg$\n\nUser-agent: *\nAllow: /\n", rules.ROBOTS),
        ((500, {}, b""), rules.ROBOTS_UNREACHABLE),
        ((403, {}, b"User-agent: *\nDisallow: /\n"), ""),
        ((404, {}, b"none"), ""),
        (b"\x00\xff not a robots.txt \n\xfe", ""),
    ],
)
def test_robots(server, tmp_path, listed, robots, reason):
    server.pages |= {"/robots.txt": robots, "/0.jpg": jpeg(0)}
    urls = listed({"Anna": ["/0.jpg"]})
    if not reason:
        assert scrape(urls=urls, out=tmp_path / "photos", **WEB).photos == 1
        return
    with pytest.raises(TooManyFailed, match="no photos could be kept") as error:
        scrape(urls=urls, out=tmp_path / "photos", **WEB)
    assert reason in error.value.message and server.count("/0.jpg") == 0
    asks = reason == rules.ROBOTS
    assert error.value.hint.startswith("the owner does not allow it" if asks else "check the addresses")
    result = scrape(urls=urls, out=tmp_path / "photos", ignore_robots=True, **WEB)
    assert result.photos == 1 and records(result.out)[0]["ignored_robots"] == "yes"


@pytest.fixture
def intranet():
    """A second server, of another origin."""
    other = Server()
    yield other
    other.close()


def test_nothing_leads_to_private_networks(server, intranet, tmp_path, listed):
    """Not a redirect, not a link, not robots.txt; what the user names may lie there, and --allow-private allows all."""
    intranet.pages |= {"/0.jpg": jpeg(0), "/1.jpg": jpeg(1), "/robots.txt": ""}
    server.pages |= {"/go.jpg": (302, {"Location": f"{intranet.url}/0.jpg"}, b""), "/2.jpg": jpeg(2)}
    urls = listed({"Anna": ["/go.jpg", "/2.jpg"]})
    result = scrape(urls=urls, out=tmp_path / "a", **WEB)
    assert result.dropped == {rules.PRIVATE: 1} and result.photos == 1 and intranet.hits == []
    result = scrape(urls=urls, out=tmp_path / "a", allow_private=True, **WEB)
    assert result.photos == 2 and intranet.count("/0.jpg") == 1
    by_url = {record["url"]: record for record in records(result.out)}
    assert by_url[f"{server.url}/go.jpg"]["final_url"] == f"{intranet.url}/0.jpg"
    assert "final_url" not in by_url[f"{server.url}/2.jpg"]
    named = listed({"Anna": ["/go.jpg"], "Ben": [f"{intranet.url}/1.jpg"]}, "named.csv")
    assert scrape(urls=named, out=tmp_path / "b", **WEB).photos == 2

    intranet.hits.clear()
    current_markup(server, {"Anna Ivanova": 2})
    base = f'<base href="{intranet.url}/">'
    for path, page in list(server.pages.items()):
        if path.endswith("Ivanova/0.html"):
            server.pages[path] = base + page
    result = scrape(site=theplace(server, tmp_path), out=tmp_path / "c", min_photos=1, **WEB)
    assert result.photos == 1 and result.dropped == {rules.PRIVATE: 1} and intranet.hits == []
    server.pages["/robots.txt"] = (301, {"Location": f"{intranet.url}/robots.txt"}, b"")
    with pytest.raises(TooManyFailed, match=rules.ROBOTS_UNREACHABLE):
        scrape(urls=listed({"Anna": ["/2.jpg"]}, "robots.csv"), out=tmp_path / "d", **WEB)
    assert intranet.hits == []


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("127.0.0.1", True), ("10.1.2.3", True), ("192.168.0.1", True), ("169.254.169.254", True), ("0.0.0.0", True),
        ("100.64.0.1", True), ("::1", True), ("fe80::1", True), ("fd00::1", True), ("::ffff:127.0.0.1", True),
        ("2002:7f00:1::", True), ("224.0.0.1", True), ("93.184.216.34", False), ("2606:2800:220:1::1", False),
    ],
)  # fmt: skip
def test_private_addresses(address, private):
    assert is_private(ipaddress.ip_address(address)) == private


@pytest.mark.slow
def test_crawl_delay_and_least_delay(server, tmp_path, listed):
    for n in range(3):
        server.pages[f"/{n}.jpg"] = jpeg(n)
    server.pages["/robots.txt"] = "User-agent: *\nCrawl-delay: 0.8\n"
    urls = listed({"Anna": [f"/{n}.jpg" for n in range(3)]})
    assert scrape(urls=urls, out=tmp_path / "a", connections=3, **WEB).photos == 3
    times = sorted(t for path, when in server.times.items() if path.endswith("jpg") for t in when)
    # Half of it: requests leave in time, but a busy machine's server notes the first one late.
    assert times[2] - times[0] >= 2 * 0.8 * 0.5, "as robots.txt asks"
    server.pages["/robots.txt"] = ""
    server.times.clear()
    assert scrape(urls=urls, out=tmp_path / "b", **{**WEB, "delay": 0.6}).photos == 3
    times = sorted(t for path, when in server.times.items() if path.endswith("jpg") for t in when)
    assert times[2] - times[0] >= 2 * 0.6 * 0.5 * 0.5, "AutoThrottle varies the delay by half"


def test_pages_that_reserve_their_rights(server, tmp_path):
    current_markup(server, {"Anna Ivanova": 2, "Boris Petrov": 2})
    for path, page in list(server.pages.items()):
        if path.endswith("Ivanova/0.html"):
            server.pages[path] = '<meta name="robots" content="index, noai">' + page
        if path.endswith("Petrov/"):
            server.pages[path] = '<meta name="tdm-reservation" content="1">' + page
    result = scrape(site=theplace(server, tmp_path), out=tmp_path / "photos", min_photos=1, **WEB)
    assert files(result.out) == {"Anna Ivanova": 1} and result.dropped == {f"page: {rules.RESERVED}": 2}


def test_a_site_that_is_not_there(server, tmp_path):
    with pytest.raises(TooManyFailed, match="page: HTTP status 404: 1") as error:
        scrape(site=theplace(server, tmp_path), out=tmp_path / "photos", **WEB)
    assert "check the addresses" in error.value.hint
