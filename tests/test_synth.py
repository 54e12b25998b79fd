"""The synthetic PercePiano corpus: layout, determinism, and ratings that can be learnt from the notes."""

import csv
import hashlib
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "corpus"
    data.synth_percepiano(out)
    return out


@pytest.fixture(scope="module")
def performances(corpus):
    return {path.stem: data.read_midi(path) for path in sorted((corpus / data.MIDI_FOLDER).iterdir())}


@pytest.fixture(scope="module")
def scores(corpus):
    return {path.stem: data.read_musicxml(path) for path in sorted((corpus / data.SCORE_FOLDER).iterdir())}


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        data.synth_percepiano(tmp_path / folder, seed=seed, segments=8, players=4)
    a, b, c = (contents(tmp_path / folder) for folder in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_other_bytes_have_another_version(tmp_path):
    data.synth_percepiano(tmp_path / "a", segments=8, players=4)
    everything = b"".join(name.encode() + body for name, body in contents(tmp_path / "a").items())
    found = (data.SYNTHETIC_VERSION, hashlib.sha1(everything).hexdigest()[:12])
    assert found == (2, "9ad90b3fa98a"), "count SYNTHETIC_VERSION up and write both here"


def test_the_built_in_corpus_is_written_once_and_old_ones_go(tmp_path, monkeypatch):
    (tmp_path / "synthetic-percepiano-1").mkdir()
    root = data.synthetic_percepiano(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [root.name]
    monkeypatch.setattr(data, "synth_percepiano", None)
    assert data.synthetic_percepiano(tmp_path) == root


def test_refuses_full_folder_and_odd_sizes(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(data.DataError, match="not empty"):
        data.synth_percepiano(tmp_path)
    for sizes in ({"segments": 7}, {"players": 3}, {"players": 13}):
        with pytest.raises(data.DataError, match="new"):
            data.synth_percepiano(tmp_path / "new", **sizes)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_label_files_follow_from_the_votes_as_in_the_public_readme(corpus, performances, scores):
    mean, std = (json.loads((corpus / file).read_text()) for file in (data.MEAN_FILE, data.STD_FILE))
    assert len(mean) == 20 * 13
    assert list(mean) == list(std)
    assert mean.keys() == performances.keys()
    assert {data.score_of(name) for name in mean} == scores.keys()
    with (corpus / data.RATINGS_FILE).open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    votes = {name: [] for name in mean}
    for row in rows:
        votes[row[2].removesuffix(".wav")].append([float(vote) for vote in row[3:]])
    assert any(0 in row for table in votes.values() for row in table)
    for name, table in votes.items():
        table = np.array(table)
        np.testing.assert_allclose(mean[name][:19], [c[c > 0].mean() / 7 for c in table.T], atol=1e-12)
        np.testing.assert_allclose(std[name], table.std(0) / 7, atol=1e-12)
    assert {len(raters) for raters in (data.read_ratings(corpus)[0], rows)} == {20 * 13 * 12}
    assert len(data.read_labels(corpus)) == len(mean)
    assert tuple(data.RATING_RULES) == data.LABELS


@pytest.mark.parametrize(("segments", "players"), [(8, 4), (20, 12)])
def test_every_split_and_fold_has_three_parts(tmp_path, monkeypatch, segments, players):
    monkeypatch.setattr(data, "_save_midi", lambda path, *_: path.write_bytes(b""))
    data.synth_percepiano(tmp_path / "c", segments=segments, players=players)
    names = [path.stem for path in (tmp_path / "c" / data.MIDI_FOLDER).iterdir()]
    for split in data.SPLITS:
        for fold in range(data.FOLDS):
            assert len(data.split_percepiano(names, split, fold)["train"]) > 0.4 * len(names)


def test_scores_read_as_written(corpus, scores):
    levels = {"p": -0.4, "mp": -0.2, "mf": 0.2, "f": 0.4}
    for name, score in scores.items():
        root = ET.parse(corpus / data.SCORE_FOLDER / f"{name}.musicxml").getroot()
        assert len(score.pitch) == len(list(root.iter("note")))
        assert set(score.voice) == {1, 5}
        assert score.tempo_qpm == float(root.find(".//sound").get("tempo"))
        level = levels[root.find(".//dynamics/*").tag]
        np.testing.assert_allclose(score.features["dynamic"][0, 0], level, atol=1e-6)


def statistics(performance):
    pitch, velocity, onset = performance.pitch, performance.velocity, performance.onset
    top = pitch >= np.median(pitch)
    return [
        velocity.mean(),
        velocity.std(),
        len(onset) / (onset[-1] - onset[0]),
        np.log(performance.offset - onset).mean(),
        velocity[top].mean() - velocity[~top].mean(),
        performance.sustain[:, 1].mean(),
        performance.soft[:, 1].mean(),
    ]


def test_ratings_are_learnable_and_shuffled_ones_are_not(corpus, performances):
    labels = data.read_labels(corpus)
    names = [name for name in performances if data.player_of(name) != "Score"]
    x = np.array([statistics(performances[name]) for name in names])
    y = np.array([labels[name] for name in names])
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 3, 9)))

    def held_out_r2(y):
        predicted = np.zeros_like(y)
        for train, test in GroupKFold(5).split(x, y, [data.segment_of(name) for name in names]):
            predicted[test] = model.fit(x[train], y[train]).predict(x[test])
        return r2_score(y, predicted)

    assert held_out_r2(y) > 0.3
    assert held_out_r2(np.random.default_rng(0).permutation(y)) < 0.05
