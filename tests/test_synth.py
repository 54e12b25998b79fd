"""The synthetic PercePiano corpus: layout, determinism, and ratings that can be learnt from the notes."""

import csv
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

import data


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "corpus"
    data.synth_percepiano(out)
    return out


@pytest.fixture(scope="module")
def performances(corpus):
    return {path.stem: data.read_midi(path) for path in sorted((corpus / data.MIDI_FOLDER).iterdir())}


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        data.synth_percepiano(tmp_path / folder, seed=seed, segments=8, players=4)
    a, b, c = (contents(tmp_path / folder) for folder in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a)
    data.synth_percepiano(tmp_path / "d", segments=8, players=4)
    everything = b"".join(name.encode() + body for name, body in contents(tmp_path / "d").items())
    found = (data.SYNTHETIC_VERSION, hashlib.sha1(everything).hexdigest()[:12])
    assert found == (2, "9ad90b3fa98a"), "count SYNTHETIC_VERSION up and write both here"


@pytest.mark.slow
def test_the_built_in_corpus_is_written_once_and_old_ones_go(tmp_path, monkeypatch):
    (tmp_path / "synthetic-percepiano-1").mkdir()
    root = data.synthetic_percepiano(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {root.name, ".lock"}
    monkeypatch.setattr(data, "synth_percepiano", None)
    assert data.synthetic_percepiano(tmp_path) == root


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


def test_refuses_full_folder_and_odd_sizes(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(data.DataError, match="not empty"):
        data.synth_percepiano(tmp_path)
    with pytest.raises(data.DataError, match="new"):
        data.synth_percepiano(tmp_path / "new", players=13)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_label_files_follow_from_the_votes_as_in_the_public_readme(corpus, performances):
    mean, std = (json.loads((corpus / file).read_text()) for file in (data.MEAN_FILE, data.STD_FILE))
    assert len(mean) == 20 * 13
    assert list(mean) == list(std)
    assert mean.keys() == performances.keys()
    with (corpus / data.RATINGS_FILE).open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    votes = {name: [] for name in mean}
    for row in rows:
        votes[row[2].removesuffix(".wav")].append([float(vote) for vote in row[3:]])
    for name, table in votes.items():
        table = np.array(table)
        np.testing.assert_allclose(mean[name][:19], [c[c > 0].mean() / 7 for c in table.T], atol=1e-12)
        np.testing.assert_allclose(std[name], table.std(0) / 7, atol=1e-12)
    assert len(data.read_ratings(corpus)[0]) == len(rows) == 20 * 13 * 12
    assert len(data.read_labels(corpus)) == len(mean)
