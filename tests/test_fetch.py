"""Fetching a dataset, against a server on this machine."""

import http.server
import io
import json
import random
import threading
import urllib.request
import zipfile
from pathlib import Path

import pytest

import data
from data import DataError

NAMES = [
    f"{work}_8bars_{player}_{segment}"
    for work in ("Schubert_D960_mv2", "Beethoven_WoO80_var1")
    for player in (1, 2, "Score")
    for segment in ("01", "02")
]
ETAG = '"version one"'


def content():
    """A small repository in the public layout, with the odd file name and files that are not needed."""
    rng = random.Random(0)
    data_folder = "virtuoso/data"
    files = {
        f"{data_folder}/all_2rounds/{' ' if i == 0 else ''}{name}.mid": b"MThd" + rng.randbytes(3000)
        for i, name in enumerate(NAMES)
    }
    for name in NAMES:
        if "_Score_" in name:
            files[f"{data_folder}/score_xml/{name}.musicxml"] = b"<score-partwise/>"
            files[f"{data_folder}/score_midi/{name}.mid"] = b"MThd"
    files[data.MEAN_FILE] = json.dumps({name: [0.5] * 19 + [3] for name in NAMES}).encode()
    files[data.STD_FILE] = json.dumps({name: [0.1] * 19 for name in NAMES}).encode()
    files["labels/total_2rounds.csv"] = (
        "user,dataID,filename,"
        + ",".join(f"q{i}" for i in range(20))
        + ",message\n"
        + "".join(f"1,1,{name}.wav," + "3.0," * 19 + ",\n" for name in NAMES)
    ).encode()
    files |= {"LICENSE": b"MIT", "README.md": b"PercePiano"}
    return files


UNNEEDED = {
    "virtuoso/model.py": b"print()",
    f"labels/{data.MEAN_FILE}": b"{}",
    "virtuoso/data/other/x.mid": b"MThd",
}


def zipped(files, top="PercePiano-main"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, body in files.items():
            archive.writestr(f"{top}/{path}" if top else path, body)
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves `body`; `cuts` holds the number of bytes after which each coming answer is cut off."""

    def __init__(self, body):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.cuts, self.status, self.ranges, self.length, self.etag = (
            body,
            [],
            200,
            True,
            True,
            ETAG,
        )
        self.requests, self.sent = [], 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/main.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers["Range"]
        server.requests.append(wanted)
        if server.status != 200:
            return self.send_error(server.status)
        start = 0
        if wanted and server.ranges and self.headers["If-Range"] == server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.body)}")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        else:
            self.send_response(200)
        if server.length:
            self.send_header("Content-Length", str(len(server.body) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        end = server.cuts.pop(0) if server.cuts else len(server.body)
        self.wfile.write(server.body[start:end])
        server.sent += max(0, end - start)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(data, "FETCH_BACKOFF", 0.0)


@pytest.fixture
def server():
    with Server(zipped(content() | UNNEEDED)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def tree(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def beside(out):
    """What lies in the folder of `out`."""
    return sorted(path.name for path in out.parent.iterdir())


def test_fetch_keeps_what_is_needed(server, tmp_path, capsys):
    out = tmp_path / "data" / "percepiano"
    assert data.fetch("percepiano", out, server.url) == out
    assert tree(out) == content()
    assert beside(out) == ["percepiano"]
    assert server.requests == [None]
    assert f"{out}: 12 performances from {server.url}" in capsys.readouterr().out


def test_a_complete_folder_is_left_alone(server, tmp_path, capsys):
    out = data.fetch("percepiano", tmp_path / "percepiano", server.url)
    (out / "notes.txt").write_text("mine")
    data.fetch("percepiano", out, server.url)
    assert "already complete, 12 performances" in capsys.readouterr().out
    assert len(server.requests) == 1
    assert (out / "notes.txt").read_text() == "mine"


def test_an_incomplete_folder_is_refused_and_kept(server, tmp_path):
    out = data.fetch("percepiano", tmp_path / "percepiano", server.url)
    (out / data.STD_FILE).unlink()
    with pytest.raises(DataError, match="exists but is not complete .*std_reg.*no such file.*; move it away"):
        data.fetch("percepiano", out, server.url)
    assert len(server.requests) == 1
    assert len(tree(out)) == len(content()) - 1


def test_a_cut_connection_is_resumed(server, tmp_path):
    size = len(server.body)
    server.cuts = [size // 3, size // 2]
    out = data.fetch("percepiano", tmp_path / "percepiano", server.url)
    assert server.requests == [None, f"bytes={size // 3}-", f"bytes={size // 2}-"]
    assert server.sent == size
    assert tree(out) == content()


def test_a_later_call_resumes(server, tmp_path, monkeypatch):
    size = len(server.body)
    server.cuts = [1000, 1000, 1000, 1000, 5000]
    out = tmp_path / "percepiano"
    with pytest.raises(DataError, match=f"connection cut after 5000 of {size} bytes.*--data"):
        data.fetch("percepiano", out, server.url)
    assert beside(out) == ["percepiano.part", "percepiano.part.etag"]
    assert (tmp_path / "percepiano.part").read_bytes() == server.body[:5000]
    data.fetch("percepiano", out, server.url)
    assert server.requests[-1] == "bytes=5000-"
    assert server.sent == size
    assert tree(out) == content()
    assert beside(out) == ["percepiano"]


def test_ctrl_c_leaves_a_part_to_resume(server, tmp_path, monkeypatch):
    size = len(server.body)
    read = data._read_response
    monkeypatch.setattr(data, "_read_response", lambda response: response.read(7000))
    chunks = []

    def interrupted(response):
        if len(chunks) == 2:
            raise KeyboardInterrupt
        chunks.append(response.read(7000))
        return chunks[-1]

    monkeypatch.setattr(data, "_read_response", interrupted)
    out = tmp_path / "percepiano"
    with pytest.raises(KeyboardInterrupt):
        data.fetch("percepiano", out, server.url)
    assert (tmp_path / "percepiano.part").stat().st_size == 14000 < size
    monkeypatch.setattr(data, "_read_response", read)
    data.fetch("percepiano", out, server.url)
    assert server.requests == [None, "bytes=14000-"]
    assert tree(out) == content()


def test_a_whole_part_is_not_fetched_again(server, tmp_path):
    (tmp_path / "percepiano.part").write_bytes(server.body)
    (tmp_path / "percepiano.part.etag").write_text(ETAG)
    out = data.fetch("percepiano", tmp_path / "percepiano", server.url)
    assert server.sent == 0
    assert tree(out) == content()


@pytest.mark.parametrize("setting", [{"ranges": False}, {"etag": None}, {"etag": '"version two"'}])
def test_a_part_that_cannot_be_resumed_is_fetched_again(server, tmp_path, setting):
    (tmp_path / "percepiano.part").write_bytes(b"of an older archive")
    (tmp_path / "percepiano.part.etag").write_text(ETAG)
    vars(server).update(setting)
    server.cuts = [9000]
    out = data.fetch("percepiano", tmp_path / "percepiano", server.url)
    assert tree(out) == content()
    assert server.requests[0] == "bytes=19-"
    assert len(server.requests) == 2
    assert beside(out) == ["percepiano"]


def test_a_part_longer_than_the_archive_is_fetched_again(server, tmp_path):
    (tmp_path / "percepiano.part").write_bytes(server.body + b"more")
    (tmp_path / "percepiano.part.etag").write_text(ETAG)
    out = data.fetch("percepiano", tmp_path / "percepiano", server.url)
    assert tree(out) == content()
    assert server.sent == len(server.body)


def without(path):
    return lambda: zipped({name: body for name, body in content().items() if name != path})


FIRST_SCORE = "virtuoso/data/score_xml/Schubert_D960_mv2_8bars_Score_01.musicxml"
MIDI = "virtuoso/data/all_2rounds/Schubert_D960_mv2_8bars_2_01.mid"
WRONG = {
    "html": (
        lambda: b"<!DOCTYPE html><html><body>Sign in</body></html>",
        "not a zip file, begins with b'<!DOCTYPE html>",
    ),
    "empty": (lambda: b"", "begins with b''"),
    "other zip": (lambda: zipped({"readme.txt": b"hello"}, "other"), "mean_reg.*no such file"),
    "no top folder": (lambda: zipped(content(), ""), "mean_reg.*no such file"),
    "truncated zip": (lambda: zipped(content())[:-200], "damaged zip file"),
    "flipped bytes": (
        lambda: zipped(content())[:5000] + bytes(500) + zipped(content())[5500:],
        "damaged zip file",
    ),
    "no mean": (without(data.MEAN_FILE), "mean_reg.*no such file"),
    "no std": (without(data.STD_FILE), "std_reg.*no such file"),
    "no score": (without(FIRST_SCORE), "D960_mv2_8bars_Score_01.musicxml: missing"),
    "no performance": (without(MIDI), "D960_mv2_8bars_2_01.mid: missing, though labelled"),
    "link instead of MIDI": (
        lambda: zipped(content() | {MIDI: b"version https://git-lfs"}),
        "2_01.mid: not a MIDI file",
    ),
    "no labels": (
        lambda: zipped(content() | {data.MEAN_FILE: b"{}", data.STD_FILE: b"{}"}),
        "no labelled performance",
    ),
    "bad labels": (lambda: zipped(content() | {data.MEAN_FILE: b"{"}), "not readable as JSON"),
    "bad ratings": (
        lambda: zipped(content() | {"labels/total_2rounds.csv": b"a,b\n"}),
        "total_2rounds.csv: starts with",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_archive_is_named_and_deleted(server, tmp_path, case):
    body, message = WRONG[case]
    server.body, server.length = body(), case != "truncated zip"
    out = tmp_path / "percepiano"
    with pytest.raises(
        DataError, match=f"not the percepiano archive: .*{message}.*deleted it.*--data"
    ) as error:
        data.fetch("percepiano", out, server.url)
    assert str(error.value).startswith(f"{server.url}: ")
    assert "\n" not in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert beside(out) == []


def test_damage_of_any_kind_is_refused_or_harmless(server, tmp_path):
    """Whatever 100 random bytes do to the archive, nothing else than a DataError comes out of it."""
    whole = server.body
    refused = 0
    for seed in range(60):
        rng = random.Random(seed)
        body = bytearray(whole)
        for position in rng.sample(
            range(4, len(body)) if seed % 2 else range(len(body) - 4000, len(body)), 100
        ):
            body[position] = rng.randrange(256)
        (tmp_path / "archive").write_bytes(body)
        try:
            data._unpack(tmp_path / "archive", tmp_path / f"{seed}")
        except DataError:
            refused += 1
    assert refused > 30


def test_no_entry_leaves_the_folder(server, tmp_path):
    bad = {
        f"{top}/{path}": b"MThd"
        for top in ("..", "x/..", "/tmp", "x")
        for path in (
            "../evil.mid",
            "virtuoso/data/all_2rounds/../../../../evil.mid",
            "virtuoso/data/all_2rounds/..\\evil.mid",
        )
    }
    bad["/evil.mid"] = b"MThd"
    (tmp_path / "archive").write_bytes(zipped(bad, top=""))
    data._unpack(tmp_path / "archive", tmp_path / "deep" / "root")
    assert [path.name for path in tmp_path.rglob("*")] == ["archive"]


def test_a_zip_bomb_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_UNPACKED_LIMIT", 10_000)
    with pytest.raises(DataError, match=r"would unpack to \d+ bytes, more than 10000"):
        data.fetch("percepiano", tmp_path / "percepiano", server.url)


def test_not_found_is_final_and_server_trouble_is_not(server, tmp_path):
    server.status = 404
    with pytest.raises(DataError, match="HTTP 404 Not Found; .*unzip it and give that folder with --data"):
        data.fetch("percepiano", tmp_path / "percepiano", server.url)
    assert len(server.requests) == 1
    server.status = 503
    with pytest.raises(DataError, match="HTTP 503"):
        data.fetch("percepiano", tmp_path / "percepiano", server.url)
    assert len(server.requests) == 1 + data.FETCH_ATTEMPTS


def test_no_network_names_the_manual_way(server, tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_address[1]}/main.zip"
    with pytest.raises(DataError, match="refused.*browser.*10.5281/zenodo.13269612.*--data") as error:
        data.fetch("percepiano", tmp_path / "percepiano", url)
    assert "\n" not in str(error.value)
    assert beside(tmp_path / "percepiano") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named_and_tried_once(server, tmp_path):
    (tmp_path / "percepiano.part").symlink_to("/dev/full")
    with pytest.raises(
        DataError, match="No space left on device; .*make room and run the same command again"
    ):
        data.fetch("percepiano", tmp_path / "percepiano", server.url)
    assert len(server.requests) == 1


def test_unknown_dataset_bad_url_and_bad_folders(server, tmp_path):
    with pytest.raises(DataError, match="'maestro': unknown; expected one of percepiano"):
        data.fetch("maestro", tmp_path / "percepiano", server.url)
    with pytest.raises(DataError, match="unknown url type"):
        data.fetch("percepiano", tmp_path / "percepiano", "main.zip")
    with pytest.raises(DataError, match="no folder name"):
        data.fetch("percepiano", ".", server.url)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "percepiano"):
        with pytest.raises(DataError, match=str(tmp_path)):
            data.fetch("percepiano", out, server.url)
    assert server.requests == []


def test_the_default_source_is_the_public_repository(monkeypatch, tmp_path):
    asked = []

    def refuse(request, timeout):
        asked.append(request.full_url)
        raise ConnectionRefusedError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(DataError, match="no network in tests"):
        data.fetch("percepiano", tmp_path / "percepiano")
    assert set(asked) == {"https://github.com/JonghoKimSNU/PercePiano/archive/refs/heads/main.zip"}
