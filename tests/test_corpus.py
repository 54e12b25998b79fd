"""The corpus as the trainer sees it: reading and caching, parts, normalisation, augmentation, batches, pooled statistics."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import norm, rankdata

import data

SHARED = Path(os.environ.get("SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "percepiano").is_dir(), reason="the real dataset is not beside the repository"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "data"
    data.synth_percepiano(folder, segments=8, players=4)
    return folder


@pytest.fixture(scope="module")
def corpus(root, tmp_path_factory):
    return data.load_percepiano(root, tmp_path_factory.mktemp("cache"), quiet=True)


@pytest.fixture
def few(root, tmp_path):
    """A copy of the corpus with two performances of each segment, which reads in half the time."""
    folder, taken = shutil.copytree(root, tmp_path / "data"), Counter()
    for path in sorted((folder / "virtuoso/data/all_2rounds").glob("*.mid")):
        taken[data.segment_of(path.stem)] += 1
        if taken[data.segment_of(path.stem)] > 2:
            path.unlink()
    return folder


def performance(pitch, velocity, onset, offset, sustain=(), soft=()):
    pedals = {k: np.array(v, float).reshape(-1, 2) for k, v in (("sustain", sustain), ("soft", soft))}
    return SimpleNamespace(
        pitch=np.array(pitch),
        velocity=np.array(velocity),
        onset=np.array(onset, float),
        offset=np.array(offset, float),
        **pedals,
    )


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------
def test_synthetic_corpus_reads_whole(corpus):
    assert corpus.synthetic
    assert corpus.left_out == []
    assert len(corpus.items) == len(corpus.names) > 30
    assert corpus.columns == data.column_names(data.FEATURES)
    for item in corpus.items.values():
        T, F = item["x"].shape
        assert F == len(data.column_names(data.FEATURES)) == 98
        assert all(len(item[k]) == T for k in ("voice", "beat", "measure", "matched"))
        assert np.isfinite(item["x"]).all()
        assert (np.diff(item["beat"]) >= 0).all()
        assert item["y"].shape == (19,)


def test_second_reading_comes_from_the_cache_and_a_change_does_not(few, tmp_path):
    copy = few
    first, second = (data.load_percepiano(copy, tmp_path / "cache", quiet=True) for _ in range(2))
    assert (first.cached, second.cached) == (False, True)
    for name, item in first.items.items():
        np.testing.assert_array_equal(item["x"], second.items[name]["x"])
    assert first.shared == second.shared
    store = next((tmp_path / "cache").glob("*.npz"))
    whole = store.read_bytes()
    for damaged in (
        b"",
        b"half a file",
        whole[: len(whole) // 2],
        whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 255]) + whole[len(whole) // 2 + 1 :],
    ):
        store.write_bytes(damaged)
        assert not data.load_percepiano(copy, tmp_path / "cache", quiet=True).cached
        assert store.read_bytes() == whole
    midi = sorted((copy / "virtuoso/data/all_2rounds").glob("*.mid"))
    midi[0].write_bytes(midi[1].read_bytes())
    assert not data.load_percepiano(copy, tmp_path / "cache", quiet=True).cached


def test_bad_files_are_reported_left_out_and_do_not_move_the_split(root, corpus, tmp_path):
    copy = shutil.copytree(root, tmp_path / "data")
    midi = sorted((copy / "virtuoso/data/all_2rounds").glob("*.mid"))
    midi[0].write_bytes(b"garbage")
    score = copy / "virtuoso/data/score_xml" / f"{data.score_of(midi[-1].stem.strip())}.musicxml"
    score.write_text("<html>404</html>")
    labels = json.loads((copy / data.MEAN_FILE).read_text())
    labels[midi[1].stem.strip()] = [0.5] * 7
    (copy / data.MEAN_FILE).write_text(json.dumps(labels))
    got = data.load_percepiano(copy, tmp_path / "cache", quiet=True)
    of_score = [m for m in midi if data.score_of(m.stem.strip()) == score.stem]
    assert len(got.left_out) == 1 + len(of_score) + 1
    assert str(midi[0]) in "".join(got.left_out)
    assert "".join(got.left_out).count(str(score)) == len(of_score)
    assert "7" in got.left_out[-1]
    assert "y" not in got.items[midi[1].stem.strip()]
    a, b = (data.percepiano_parts(c, "segment", 0) for c in (corpus, got))
    for part in a:
        assert set(b[part]) <= set(a[part])
    with pytest.raises(data.DataError, match=r"[^\n]*garbage|[^\n]*\.mid"):
        data.load_percepiano(copy, tmp_path / "cache2", strict=True, quiet=True)
    with pytest.raises(data.DataError):
        data.load_percepiano(copy, tmp_path / "cache", strict=True, quiet=True)


def test_empty_folder_names_the_remedy(tmp_path):
    with pytest.raises(data.DataError, match=r"fetch percepiano"):
        data.load_percepiano(tmp_path, tmp_path)


def test_unrated_items_are_predicted_not_refused(few, tmp_path):
    copy = few
    names = [p.stem.strip() for p in (copy / "virtuoso/data/all_2rounds").glob("*.mid")]
    parts = data.split_percepiano(names, "segment", 0)
    for file in (data.MEAN_FILE, data.STD_FILE):
        labels = json.loads((copy / file).read_text())
        (copy / file).write_text(
            json.dumps(
                {
                    k: v
                    for k, v in labels.items()
                    if k not in parts["test"] + parts["valid"][:1] + parts["train"][:1]
                }
            )
        )
    corpus = data.load_percepiano(copy, tmp_path / "cache", quiet=True)
    got = data.percepiano_parts(corpus, "segment", 0)
    assert got["test"] == parts["test"]
    assert parts["valid"][0] in got["valid"]
    assert parts["train"][0] not in got["train"]


def test_validation_without_a_rating_takes_training_segments(corpus):
    unrated = data.Corpus(**{**vars(corpus), "items": {n: dict(i) for n, i in corpus.items.items()}})
    whole = data.percepiano_parts(corpus, "segment", 1)
    for name in whole["valid"]:
        del unrated.items[name]["y"]
    got = data.percepiano_parts(unrated, "segment", 1)
    moved = set(got["valid"]) - set(whole["valid"])
    assert moved
    assert not moved & set(got["train"])
    assert {data.segment_of(n) for n in moved}.isdisjoint({data.segment_of(n) for n in got["train"]})
    assert got["test"] == whole["test"]


@needs_shared
@pytest.mark.slow
def test_the_real_corpus(tmp_path):
    corpus = data.load_percepiano(SHARED / "percepiano", tmp_path, quiet=True)
    assert len(corpus.items) == 1202
    assert corpus.left_out == []
    assert "Schubert_D935_no.3_4bars_2_1" in corpus.items
    assert sum("y" in i for i in corpus.items.values()) == 1020
    rate = np.array([i["match_rate"] for i in corpus.items.values()])
    assert rate.mean() >= 0.975
    assert [n for n, i in corpus.items.items() if i["match_rate"] < 0.6] == [
        "Beethoven_WoO80_var25_8bars_19_14"
    ]
    sizes = [[len(p) for p in data.percepiano_parts(corpus, "segment", f).values()] for f in range(4)]
    assert sizes == [[628, 250, 182], [641, 235, 182], [651, 225, 182], [640, 238, 182]]
    x = np.concatenate([i["x"] for i in corpus.items.values()])
    assert np.isfinite(x).all()
    tempo = x[:, corpus.columns.index("beat_tempo")]
    assert 1 < tempo[tempo != 0].min() < tempo.max() < 3.1


# ---------------------------------------------------------------------------------------------------------------
# Normalisation, augmentation, batches
# ---------------------------------------------------------------------------------------------------------------
def test_normalisation_is_fitted_on_training_names_only(corpus):
    parts = data.percepiano_parts(corpus, "segment", 0)
    info = data.fit_normalisation(corpus, parts["train"], "full", pooled=True)
    k = info["columns"].index("velocity")
    rows = np.concatenate(
        [corpus.items[n]["x"][corpus.items[n]["voice"] > 0, k] for n in parts["train"]]
    ).astype(float)
    assert info["mean"][k] == pytest.approx(rows.mean(), rel=1e-6)
    assert info["std"][k] == pytest.approx(rows.std(), rel=1e-6)
    items = data.prepare_han(corpus, parts["train"], info)
    z = np.concatenate([i["x"][i["voice"] > 0, k] for i in items])
    assert abs(z.mean()) < 1e-3
    assert z.std() == pytest.approx(1, abs=1e-3)
    assert max(np.abs(i["x"]).max() for i in items) <= data.CLIP
    assert (
        info["mean"][info["columns"].index("pitch:3")],
        info["std"][info["columns"].index("pitch:3")],
    ) == (0, 1)
    stats = np.stack([i["stats"] for i in items])
    assert np.abs(stats).max() < 2.6
    assert np.abs(np.median(stats, 0)).max() < 0.1 or np.isfinite(stats).all()


def test_score_features_hold_nothing_of_the_performance(corpus):
    names = sorted(n for n in corpus.items if data.segment_of(n) == data.segment_of(corpus.names[0]))
    info = data.fit_normalisation(corpus, names, "score", pooled=True)
    first, *others = data.prepare_han(corpus, names, info)
    assert others
    for other in others:
        for key in ("x", "voice", "beat", "measure", "stats"):
            np.testing.assert_array_equal(first[key], other[key])


def test_quantile_scores_against_scipy():
    rng = np.random.default_rng(0)
    x = rng.gamma(2, size=(101, 3))
    q = np.quantile(x, np.linspace(0, 1, 101), axis=0)
    expected = norm.ppf(((rankdata(x, axis=0) - 1) / 100).clip(0.005, 0.995))
    np.testing.assert_allclose(data.to_normal(x, q), expected, atol=1e-5)
    constant = np.ones((101, 1))
    assert data.to_normal(np.ones((2, 1)), constant) == pytest.approx(0)


def test_key_shift_moves_pitches_and_nothing_else(corpus):
    names = data.percepiano_parts(corpus, "segment", 0)["train"]
    info = data.fit_normalisation(corpus, names, "full")
    item = data.prepare_han(corpus, names[:1], info)[0]
    moved, at = data.shift_key(item, info, 3), info["columns"].index
    written, played = (
        item["voice"] > 0,
        corpus.items[names[0]]["x"][:, corpus.columns.index("raw_velocity")] > 0,
    )
    midi = lambda i, c: i["x"][:, at(c)] * info["std"][at(c)] + info["mean"][at(c)]  # noqa: E731
    np.testing.assert_allclose((midi(moved, "midi_pitch") - midi(item, "midi_pitch"))[written], 3, atol=1e-3)
    np.testing.assert_allclose((midi(moved, "raw_pitch") - midi(item, "raw_pitch"))[played], 3, atol=1e-3)
    pitch = midi(moved, "midi_pitch")[written].round().astype(int)
    np.testing.assert_allclose(moved["x"][written, at("pitch:0")], (pitch // 12 - 1 - 4) / 4)
    np.testing.assert_array_equal(
        moved["x"][written, at("pitch:1") : at("pitch:12") + 1].argmax(1), pitch % 12
    )
    for far, end in ((80, 108), (-80, 21)):
        edge = data.shift_key(item, info, far)
        reached = np.concatenate([midi(edge, "midi_pitch")[written], midi(edge, "raw_pitch")[played]]).round()
        assert (reached.max() if far > 0 else reached.min()) == end
    same = [
        k
        for k, c in enumerate(info["columns"])
        if c not in ("midi_pitch", "raw_pitch") and not c.startswith("pitch:")
    ]
    np.testing.assert_array_equal(moved["x"][:, same], item["x"][:, same])


def test_batches_hold_every_item_once_and_similar_lengths():
    lengths = np.random.default_rng(0).integers(50, 400, 203).tolist()
    batches = data.length_batches(lengths, 8, seed=7, epoch=3)
    assert sorted(i for b in batches for i in b) == list(range(203))
    assert [len(b) for b in batches].count(8) == 25
    spread = np.mean([np.ptp([lengths[i] for i in b]) for b in batches])
    assert spread < 0.3 * np.ptp(lengths)
    assert batches == data.length_batches(lengths, 8, seed=7, epoch=3)
    assert batches != data.length_batches(lengths, 8, seed=7, epoch=4)
    two = data.length_batches(lengths, 4, seed=7, epoch=3, world=2)
    assert all(len(b) == 8 for b in two)
    assert set(range(203)) == {i for b in two for i in b}


# ---------------------------------------------------------------------------------------------------------------
# Statistics of a performance
# ---------------------------------------------------------------------------------------------------------------
def test_statistics_of_a_hand_made_performance():
    # two chords of two notes, then one note; sustain down from .4 to 1.2 s, half-way at .6 s
    p = performance(
        [48, 72, 50, 74, 76],
        [40, 80, 50, 90, 100],
        [0.0, 0.02, 1.0, 1.01, 1.5],
        [0.5, 0.5, 1.4, 1.4, 2.0],
        [(0.4, 127), (0.6, 80), (1.2, 0)],
    )
    s = data.performance_statistics(p)
    assert s["notes"] == pytest.approx(np.log(5))
    assert s["seconds"] == pytest.approx(np.log(2))
    assert s["chord_share"] == pytest.approx(2 / 3)
    assert s["chord_size"] == pytest.approx(5 / 3)
    assert s["interval_mean"] == pytest.approx(np.mean(np.log([1.005 - 0.01, 1.5 - 1.005])))
    assert s["balance_mean"] == pytest.approx(40 / 127)
    assert s["spread_mean"] == pytest.approx((0.02 + 0.01) / 2)
    assert s["lead_mean"] == pytest.approx((-0.02 - 0.01) / 2)
    assert s["velocity_max"] == pytest.approx(100 / 127)
    assert s["sustain_releases_under"] == pytest.approx(2 / 5)
    assert s["sustain_onsets_under"] == pytest.approx(2 / 5)
    np.testing.assert_allclose(data.sounding_offset(p), [1.2, 1.2, 1.4, 1.4, 2.0])
    assert all(np.isfinite(v) for v in s.values())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_statistics_of_almost_nothing_are_finite(n):
    s = data.performance_statistics(performance([60] * n, [64] * n, [1.0] * n, [1.0] * n))
    assert all(np.isfinite(v) for v in s.values())


def test_overlap_by_pedal_raises_ringing_and_rubbing():
    onset = np.arange(8) * 0.5
    dry = performance([60, 61] * 4, [64] * 8, onset, onset + 0.4)
    wet = performance([60, 61] * 4, [64] * 8, onset, onset + 0.4, [(0.0, 127)])
    a, b = data.performance_statistics(dry), data.performance_statistics(wet)
    assert a["ringing"] == a["rubbing"] == 0
    assert b["ringing"] == pytest.approx(3.5)
    assert b["rubbing"] == pytest.approx(2)
    assert b["ring_extra_mean"] > a["ring_extra_mean"]


def test_a_foreign_file_name_is_reported_and_left_out(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "data")
    midi = next((copy / "virtuoso/data/all_2rounds").glob("*.mid"))
    shutil.copy(midi, midi.with_name("my own recording.mid"))
    corpus = data.load_percepiano(copy, tmp_path / "cache", quiet=True)
    assert len(corpus.left_out) == 1
    assert "my own recording.mid" in corpus.left_out[0]


def test_a_full_disk_is_one_line(capsys, monkeypatch, few, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "cache"))

    monkeypatch.setattr(data, "write_atomic", full)
    with pytest.raises(SystemExit) as stop:
        data.run_script("data.py", lambda: data.load_percepiano(few, tmp_path / "cache", quiet=True))
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_batches_refuse_what_does_not_fit():
    item = {"x": [[0.0, 1.0]] * 3, "voice": [1, 1, 2], "beat": [4, 4, 5], "measure": [1, 1, 1]}
    assert data.collate_han([item])["x"].shape == (1, 3, 2)
    for items in ([], [item | {"x": []}], [item | {"voice": [1]}], [{"x": item["x"]}]):
        with pytest.raises(data.DataError, match="as many voices"):
            data.collate_han(items)
