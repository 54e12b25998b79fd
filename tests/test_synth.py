"""The synthetic corpora: determinism, refusals; of PercePiano also its label files."""

import csv
import hashlib
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import refused

import data

MAKERS = {"percepiano": data.synth_percepiano, "speech": data.synth_speech}
SMALL = {"percepiano": {"segments": 8, "players": 4}, "speech": {"days": 1, "trials": 6}}


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", [pytest.param("percepiano", marks=pytest.mark.slow), "speech"])
def test_same_seed_same_bytes_other_seed_other_bytes(kind, tmp_path, monkeypatch):
    MAKERS[kind](tmp_path / "a", seed=3, **SMALL[kind])
    monkeypatch.setattr(time, "asctime", lambda *args: "at another time")  # what SciPy writes into the header
    for folder, seed in (("b", 3), ("c", 4)):
        MAKERS[kind](tmp_path / folder, seed=seed, **SMALL[kind])
    a, b, c = (contents(tmp_path / folder) for folder in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a)


@pytest.mark.slow
def test_a_changed_percepiano_needs_another_version(tmp_path):
    data.synth_percepiano(tmp_path / "d", segments=8, players=4)
    everything = b"".join(name.encode() + body for name, body in contents(tmp_path / "d").items())
    found = (data.SYNTHETIC_VERSION, hashlib.sha1(everything).hexdigest()[:12])
    assert found == (2, "9ad90b3fa98a"), "count SYNTHETIC_VERSION up and write both here"


def recordings(cache):
    args = SimpleNamespace(data=None, cache=cache, online=True, audio=None, strict=False)
    return data.open_recordings(args, quiet=True)


CALLS = {  # what gives the folder of a built-in corpus; what writes it
    "synthetic-percepiano": (data.synthetic_percepiano, "synth_percepiano"),
    "synthetic-speech": (data.synthetic_speech, "synth_speech"),
    "synthetic-audio": (recordings, "render_folder"),
}


@pytest.mark.parametrize("kind", CALLS)
def test_built_in_corpora_stay_and_those_of_other_versions_go(kind, tmp_path, monkeypatch):
    """All corpora share one cache: what one of them calls stale must be its own."""
    made = []

    def write(name, folder):
        folder.mkdir(exist_ok=True)
        (folder / "SYNTHETIC").touch()
        made.append(name)

    for name in ("synth_percepiano", "synth_speech"):
        monkeypatch.setattr(data, name, lambda folder, name=name, **_: write(name, folder))
    monkeypatch.setattr(data, "render_folder", lambda midi, folder, **_: write("render_folder", folder))
    monkeypatch.setattr(data, "open_audio", lambda root, *_: root)
    (tmp_path / f"{kind}-0").mkdir()
    roots = [[call(tmp_path) for call, _ in CALLS.values()] for _ in (1, 2)]
    assert roots[0] == roots[1]
    assert made == [name for _, name in CALLS.values()]
    assert {path.name for path in tmp_path.iterdir()} == {".lock", *(root.name for root in roots[0])}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("percepiano", {"players": 13}), ("speech", {"days": 0}), ("speech", {"bins": np.nan})],
)
def test_full_folders_and_odd_sizes_are_refused(kind, sizes, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.txt").write_text("keep")
    refused(lambda: MAKERS[kind](tmp_path), capsys, tmp_path, "--out")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")  # which cannot be replaced while one is in it
    refused(lambda: MAKERS[kind]("."), capsys, "--out")
    refused(lambda: MAKERS[kind](tmp_path / "new", **sizes), capsys, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine.txt"]


@pytest.mark.slow
def test_label_files_follow_from_the_votes_as_in_the_public_readme(tmp_path):
    corpus = tmp_path / "corpus"
    data.synth_percepiano(corpus, segments=8, players=4)
    mean, std = (json.loads((corpus / file).read_text()) for file in (data.MEAN_FILE, data.STD_FILE))
    assert list(mean) == list(std)
    assert mean.keys() == {path.stem for path in (corpus / data.MIDI_FOLDER).iterdir()}
    with (corpus / data.RATINGS_FILE).open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    votes = {name: [] for name in mean}
    for row in rows:
        votes[row[2].removesuffix(".wav")].append([float(vote) for vote in row[3:]])
    for name, table in votes.items():
        table = np.array(table)
        np.testing.assert_allclose(mean[name][:19], [c[c > 0].mean() / 7 for c in table.T], atol=1e-12)
        np.testing.assert_allclose(std[name], table.std(0) / 7, atol=1e-12)
    assert len(data.read_ratings(corpus)[0]) == len(rows) == 8 * 5 * 12
    assert len(data.read_labels(corpus)) == len(mean) == 8 * 5
