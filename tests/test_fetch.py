"""Fetching a dataset, against a server on this machine."""

import functools
import http.server
import json
import threading

import numpy as np
import pytest
from conftest import refused, zipped

import data

NAMES = [
    f"{work}_8bars_{player}_{segment}"
    for work in ("Schubert_D960_mv2", "Beethoven_WoO80_var1")
    for player in (1, 2, "Score")
    for segment in ("01", "02")
]
MIDI = f"{data.MIDI_FOLDER}/{NAMES[2]}.mid"
SCORE = f"{data.SCORE_FOLDER}/{data.score_of(NAMES[0])}.musicxml"


def content():
    """A small repository in the public layout, with the odd file name."""
    noise = np.random.default_rng(0)
    files = {f"{data.MIDI_FOLDER}/{name}.mid": b"MThd" + noise.bytes(3000) for name in NAMES[1:]}
    files[f"{data.MIDI_FOLDER}/ {NAMES[0]}.mid"] = b"MThd"
    for name in NAMES:
        files[f"{data.SCORE_FOLDER}/{data.score_of(name)}.musicxml"] = b"<score-partwise/>"
    files[data.MEAN_FILE] = json.dumps({name: [0.5] * 20 for name in NAMES}).encode()
    files[data.STD_FILE] = json.dumps({name: [0.1] * 19 for name in NAMES}).encode()
    return files | {"LICENSE": b"MIT", "README.md": b"PercePiano"}


UNNEEDED = {"virtuoso/model.py": b"print()", "virtuoso/data/other/x.mid": b"MThd"}


def archive(files):
    return zipped({f"PercePiano-main/{path}": body for path, body in files.items()})


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends `server.body`, of which it announces `server.length` bytes."""

    def do_GET(self):
        self.server.requests += 1
        self.send_response(self.server.status)
        if self.server.length is not None:
            self.send_header("Content-Length", str(self.server.length))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.body, running.length = archive(content() | UNNEEDED), None
        running.status, running.requests = 200, 0
        running.url = f"http://127.0.0.1:{running.server_address[1]}/main.zip"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "data" / "percepiano"


def test_fetch_keeps_what_is_needed_and_does_it_once(server, out):
    server.length = len(server.body)
    assert data.fetch("percepiano", out, server.url) == out
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found == content()
    (out / "notes.txt").write_text("mine")
    data.fetch("percepiano", out, server.url)
    assert server.requests == 1
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in out.parent.iterdir()] == ["percepiano"]


def test_an_incomplete_folder_is_refused_and_kept(server, out, capsys):
    data.fetch("percepiano", out, server.url)
    (out / data.MEAN_FILE).unlink()
    refused(lambda: data.fetch("percepiano", out, server.url), capsys, out / data.MEAN_FILE)
    assert server.requests == 1
    assert len([path for path in out.rglob("*") if path.is_file()]) == len(content()) - 1


def without(path):
    return archive({name: body for name, body in content().items() if name != path})


WHOLE = archive(content())
OUTSIDE = {f"../{MIDI}": b"MThd"}
for top in ("..", "x/..", "/tmp", "x"):
    for place in ("../evil.mid", f"{data.MIDI_FOLDER}/../../evil.mid", f"{data.MIDI_FOLDER}/..\\evil.mid"):
        OUTSIDE[f"{top}/{place}"] = b"MThd"
TROUBLE = {  # what the server does, and what the line names besides the address
    "html": ({"body": b"<!DOCTYPE html><html><body>Sign in</body></html>"}, "zip"),
    "flipped bytes": ({"body": WHOLE[:5000] + bytes(500) + WHOLE[5500:]}, "zip"),
    "no score": ({"body": without(SCORE)}, SCORE),
    "link instead of MIDI": ({"body": archive(content() | {MIDI: b"version https://git-lfs"})}, MIDI),
    "bad labels": ({"body": archive(content() | {data.MEAN_FILE: b"{"})}, data.MEAN_FILE),
    "status": ({"status": 404}, "404"),
    "cut": ({"body": WHOLE[:-500], "length": len(WHOLE)}, "zip"),
    "entries outside the folder": ({"body": zipped(OUTSIDE)}, ""),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_trouble_names_the_manual_way_and_leaves_nothing(server, out, case, capsys):
    setting, name = TROUBLE[case]
    vars(server).update(setting)
    refused(lambda: data.fetch("percepiano", out, server.url), capsys, server.url, name, "--data")
    assert [*out.parent.parent.rglob("*")] == [out.parent]


def test_a_zip_bomb_is_refused(server, out, monkeypatch, capsys):
    monkeypatch.setattr(data, "_UNPACKED_LIMIT", 10_000)
    refused(lambda: data.fetch("percepiano", out, server.url), capsys, server.url, "10000 bytes")
    assert list(out.parent.iterdir()) == []


def test_what_cannot_be_fetched_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    url = "http://127.0.0.1:9/main.zip"  # nobody listens there
    for out, source, named in (("new", url, url), ("file", url, tmp_path / "file")):
        refused(functools.partial(data.fetch, "percepiano", tmp_path / out, source), capsys, named)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
