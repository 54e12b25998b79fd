"""The corpus as the trainer sees it: reading and caching, parts, normalisation, augmentation, batches."""

import hashlib
import json
import runpy
import shutil
import tracemalloc

import numpy as np
import pytest
from conftest import SHARED, needs_shared, performance, refused
from scipy.stats import norm, rankdata
from test_perf import toy_score

import data

REAL = SHARED / "percepiano"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "data"
    data.synth_percepiano(folder, segments=8, players=4)
    return folder


@pytest.fixture(scope="module")
def corpus(root, tmp_path_factory):
    return data.load_percepiano(root, tmp_path_factory.mktemp("cache"), quiet=True)


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root, tmp_path / "data")


@pytest.fixture
def few(copy):
    """Three performances, which are read in no time."""
    for path in sorted((copy / data.MIDI_FOLDER).iterdir())[3:]:
        path.unlink()
    return copy


def test_other_features_have_another_version(corpus):
    item = corpus.items[corpus.names[0]]
    key = hashlib.sha1()
    for array in (item["x"], item["stats"], item["voice"], item["beat"], item["measure"], item["matched"]):
        key.update((np.round(array.astype(np.float64), 3) + 0.0).tobytes())
    found = (data.FEATURES_VERSION, data.SYNTHETIC_VERSION, key.hexdigest()[:12])
    assert found == (5, 2, "1e45d3725839"), "count FEATURES_VERSION up and write both here"


def test_the_cache_is_read_until_a_file_or_the_version_changes(few, tmp_path, monkeypatch):
    made, extract = [], data._extract_all
    monkeypatch.setattr(data, "_extract_all", lambda *a: made.append(a) or extract(*a))

    def load():
        corpus = data.load_percepiano(few, tmp_path / "cache", quiet=True)
        (store,) = (tmp_path / "cache").iterdir()  # what is stale goes
        return corpus, store

    first, store = load()
    second, _ = load()
    assert len(made) == 1
    assert first.shared == second.shared
    for name, item in first.items.items():
        np.testing.assert_array_equal(item["x"], second.items[name]["x"])
    whole = store.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + b"other" + whole[middle + 5 :]):
        store.write_bytes(damaged)
        load()
        assert store.read_bytes() == whole
    midi = sorted((few / data.MIDI_FOLDER).iterdir())
    midi[0].write_bytes(midi[1].read_bytes())
    load()
    monkeypatch.setattr(data, "FEATURES_VERSION", -1)
    load()
    assert len(made) == 5


@pytest.mark.slow
def test_bad_files_are_reported_left_out_and_do_not_move_the_split(copy, corpus, tmp_path, capsys):
    midi = sorted((copy / data.MIDI_FOLDER).iterdir())
    midi[0].write_bytes(b"garbage")
    midi[3].write_bytes(midi[3].read_bytes() + b"XFIH\0\0\0\1x")
    midi[2].rename(midi[2].with_name(f" {midi[2].stem}.MID"))  # a space, as in one public file's name
    midi[1].with_name("Thumbs.db").write_bytes(b"")
    foreign = shutil.copy(midi[1], midi[1].with_name("my own recording.mid"))
    score = copy / data.SCORE_FOLDER / f"{data.score_of(midi[-1].stem)}.musicxml"
    score.write_text("<html>404</html>")
    labels = json.loads((copy / data.MEAN_FILE).read_text())
    labels[midi[1].stem] = [0.5] * 7
    (copy / data.MEAN_FILE).write_text(json.dumps(labels))
    got = data.load_percepiano(copy, tmp_path / "cache", quiet=True)
    assert got.repaired == [f"{midi[3]}: chunks of another kind left out (1)"]
    data.report_percepiano(got)
    assert f"read with repairs: 1\n  {midi[3]}" in capsys.readouterr().out
    lines = "\n".join(got.left_out)
    for path in (midi[0], foreign, midi[1].stem, "1 .db"):
        assert str(path) in lines
    assert lines.count(str(score)) == 5
    assert len({*got.left_out}) == len(got.left_out) == 2 + 5 + 1 + 1
    assert "y" not in got.items[midi[1].stem]
    assert "y" in got.items[midi[2].stem]
    whole, parts = (data.percepiano_parts(c, "segment", 0) for c in (corpus, got))
    for part in whole:
        assert set(parts[part]) <= set(whole[part])
    refused(lambda: data.load_percepiano(copy, tmp_path / "new", strict=True, quiet=True), capsys, copy)


def test_strict_stops_at_the_first_bad_file(few, tmp_path, monkeypatch):
    read = []

    def unreadable(path):
        read.append(path)
        raise data.DataError(f"{path}: torn")

    monkeypatch.setattr(data, "read_midi", unreadable)
    for strict, count in ((True, 1), (False, len([*(few / data.MIDI_FOLDER).iterdir()]))):
        read.clear()
        with pytest.raises(data.DataError, match=": torn"):
            data.load_percepiano(few, tmp_path / "cache", strict, workers=1, quiet=True)
        assert len(read) == count


def unrated(corpus, names):
    items = {name: dict(item) for name, item in corpus.items.items()}
    for name in names:
        del items[name]["y"]
    return data.Corpus(**{**vars(corpus), "items": items})


def test_unrated_items_are_predicted_not_refused(corpus):
    whole = data.percepiano_parts(corpus, "segment", 0)
    without = unrated(corpus, [*whole["test"], whole["valid"][0], whole["train"][0]])
    assert data.percepiano_parts(without, "segment", 0) == whole | {"train": whole["train"][1:]}


def test_misaligned_items_train_on_request_only(corpus):
    whole = data.percepiano_parts(corpus, "segment", 0)
    items = corpus.items | {whole["train"][0]: corpus.items[whole["train"][0]] | {"match_rate": 0.5}}
    bad = data.Corpus(**{**vars(corpus), "items": items})
    assert data.percepiano_parts(bad, "segment", 0)["train"] == whole["train"][1:]
    assert data.percepiano_parts(bad, "segment", 0, keep_misaligned=True) == whole


@needs_shared
@pytest.mark.slow
def test_the_real_corpus(tmp_path):
    corpus = data.load_percepiano(REAL, tmp_path, quiet=True)
    assert (len(corpus.items), corpus.left_out) == (1202, [])
    assert "Schubert_D935_no.3_4bars_2_1" in corpus.items
    assert sum("y" in item for item in corpus.items.values()) == 1020
    rates = {name: item["match_rate"] for name, item in corpus.items.items()}
    assert np.mean(list(rates.values())) >= 0.975
    assert [name for name in rates if rates[name] < 0.6] == ["Beethoven_WoO80_var25_8bars_19_14"]
    sizes = [[len(p) for p in data.percepiano_parts(corpus, "segment", f).values()] for f in range(4)]
    assert sizes == [[628, 250, 182], [641, 235, 182], [651, 225, 182], [640, 238, 182]]
    assert all(np.isfinite(item["x"]).all() for item in corpus.items.values())


def test_copies_in_subfolders_do_not_take_the_place_of_performances(few):
    folder = few / data.MIDI_FOLDER
    path = min(folder.glob("*.mid"))
    older = folder / "Backup" / path.name
    older.parent.mkdir()
    shutil.copy(path, older)
    files, left_out = data._performance_files(few)
    assert files[path.stem] == path
    assert [line.partition(": ")[0] for line in left_out] == [str(older)]


def test_normalisation_is_fitted_on_training_names_only(corpus):
    train = data.percepiano_parts(corpus, "segment", 0)["train"]
    info = data.fit_normalisation(corpus, train, "full", pooled=True)
    k, flag = info["columns"].index("velocity"), info["columns"].index("pitch:3")
    rows = [corpus.items[name]["x"][corpus.items[name]["voice"] > 0, k] for name in train]
    rows = np.concatenate(rows).astype(float)
    assert (info["mean"][k], info["std"][k]) == pytest.approx((rows.mean(), rows.std()), rel=1e-6)
    assert (info["mean"][flag], info["std"][flag]) == (0, 1)
    items = data.prepare_han(corpus, train, info)
    z = np.concatenate([item["x"][item["voice"] > 0, k] for item in items])
    assert (z.mean(), z.std()) == pytest.approx((0, 1), abs=1e-3)
    assert max(np.abs(item["x"]).max() for item in items) <= data.CLIP


def test_score_features_hold_nothing_of_the_performance(corpus):
    names = [n for n in corpus.items if data.segment_of(n) == data.segment_of(corpus.names[0])]
    info = data.fit_normalisation(corpus, names, "score", pooled=True)
    first, *others = data.prepare_han(corpus, names, info)
    assert others
    for other in others:
        for key in ("x", "voice", "beat", "measure", "stats"):
            np.testing.assert_array_equal(first[key], other[key])


def test_quantile_scores_against_scipy():
    x = np.random.default_rng(0).gamma(2, size=(101, 3))
    quantiles = np.quantile(x, np.linspace(0, 1, 101), axis=0)
    expected = norm.ppf(((rankdata(x, axis=0) - 1) / 100).clip(0.005, 0.995))
    np.testing.assert_allclose(data.to_normal(x, quantiles), expected, atol=1e-5)
    assert data.to_normal(np.ones((2, 1)), np.ones((101, 1))) == pytest.approx(0)


def test_key_shift_moves_pitches_and_nothing_else(corpus):
    info = data.fit_normalisation(corpus, corpus.names, "full")
    (item,) = data.prepare_han(corpus, corpus.names[:1], info)
    at, written = info["columns"].index, item["voice"] > 0
    played = corpus.items[item["name"]]["x"][:, at("raw_velocity")] > 0

    def midi(item, column):
        pitch = item["x"][:, at(column)] * info["std"][at(column)] + info["mean"][at(column)]
        return pitch[written if column == "midi_pitch" else played].round().astype(int)

    moved = data.shift_key(item, info, 3)
    pitch = midi(moved, "midi_pitch")
    np.testing.assert_array_equal(pitch, midi(item, "midi_pitch") + 3)
    np.testing.assert_array_equal(midi(moved, "raw_pitch"), midi(item, "raw_pitch") + 3)
    np.testing.assert_allclose(moved["x"][written, at("pitch:0")], (pitch // 12 - 1 - 4) / 4)
    classes = slice(at("pitch:1"), at("pitch:12") + 1)
    np.testing.assert_array_equal(moved["x"][written, classes].argmax(1), pitch % 12)
    edge = data.shift_key(item, info, 80)
    assert max([*midi(edge, "midi_pitch"), *midi(edge, "raw_pitch")]) == 108
    moving = [column for column in info["columns"] if "pitch" in column and column != "xml_pitch"]
    same = [k for k, column in enumerate(info["columns"]) if column not in moving]
    np.testing.assert_array_equal(moved["x"][:, same], item["x"][:, same])


def test_batches_hold_every_item_once_and_similar_lengths():
    lengths = np.random.default_rng(0).integers(50, 400, 203).tolist()
    batches = data.length_batches(lengths, 8, seed=7, epoch=3)
    assert sorted(sum(batches, [])) == list(range(203))
    assert [len(batch) for batch in batches].count(8) == 25
    spread = np.mean([np.ptp([lengths[i] for i in batch]) for batch in batches])
    assert spread < 0.3 * np.ptp(lengths)
    assert batches == data.length_batches(lengths, 8, seed=7, epoch=3)
    assert batches != data.length_batches(lengths, 8, seed=7, epoch=4)
    two = data.length_batches(lengths, 4, seed=7, epoch=3, world=2)
    assert {len(batch) for batch in two} == {8}
    assert set(range(203)) == set(sum(two, []))


def test_statistics_of_a_hand_made_performance():
    # two chords of two notes, then one note; sustain down from .4 to 1.2 s, half-way at .6 s
    onset, offset = [0.0, 0.02, 1.0, 1.01, 1.5], [0.5, 0.5, 1.4, 1.4, 2.0]
    pedal = [(0.4, 127), (0.6, 80), (1.2, 0)]
    p = performance([48, 72, 50, 74, 76], [40, 80, 50, 90, 100], onset, offset, pedal)
    expected = {
        "notes": np.log(5),
        "seconds": np.log(2),
        "chord_share": 2 / 3,
        "chord_size": 5 / 3,
        "interval_mean": np.mean(np.log([1.005 - 0.01, 1.5 - 1.005])),
        "balance_mean": 40 / 127,
        "spread_mean": 0.015,
        "lead_mean": -0.015,
        "velocity_max": 100 / 127,
        "sustain_releases_under": 2 / 5,
        "sustain_onsets_under": 2 / 5,
    }
    found = data.performance_statistics(p)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    np.testing.assert_allclose(data.sounding_offset(p), [1.2, 1.2, 1.4, 1.4, 2.0])


def test_statistics_of_a_hand_made_score():
    # a bar of C major, then one of C minor, four quarters each; a grace note that does not count
    pitch, n = [61, 60, 64, 67, 60, 63, 67], 7
    onset, duration = [0, 0, 0, 0, 4, 4, 4], [0, 4, 4, 4, 4, 4, 4]
    grace = [1] + [0] * 6
    score = toy_score(onset, duration, pitch=pitch, grace=grace, beats=range(9), measures=(0, 4, 8))
    found = data.harmony_statistics(score)
    assert len(found) == 35
    halves = ("chord_maj", "chord_min", "minor_of_triads", "bar_minor_share")
    expected = dict.fromkeys(halves, 0.5) | {"chord_dim": 0, "dissonance_mean": 0, "sounding_mean": 3}
    expected |= {f"interval_class_{k}": 1 / 3 for k in (3, 4, 5)}
    expected |= {"pitch_classes_used": 4, "pitch_class_entropy": np.log(6) - np.log(2) * 2 / 3}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["bar_out_of_scale_mean"] == pytest.approx(0)

    # played at .5 s a quarter in the first bar and 1 s in the second, held half as long as written
    second = np.interp(onset, [0, 4, 8], [0, 2, 6])
    held = performance(pitch, [64] * n, second, second + [0.1, 1, 1, 1, 2, 2, 2])
    late = data.timing_statistics(score, held, np.arange(n))
    assert len(late) == 62
    assert late["tempo_bar_mean"] == pytest.approx(np.log(0.5))  # both anchors lie in the first bar
    assert late["held_long_mean"] == pytest.approx((3 * np.log(1 / 2) + 3 * np.log(2 / 2)) / 6)


@needs_shared
@pytest.mark.parametrize("name", ["Schubert_D960_mv2_8bars_4_05", "Beethoven_WoO80_var10_8bars_11_8"])
def test_statistics_equal_the_prototype(name):
    prototype = runpy.run_path(SHARED / "prototypes" / "rating_statistics.py")
    score = data.read_musicxml(REAL / data.SCORE_FOLDER / f"{data.score_of(name)}.musicxml")
    played = data.read_midi(REAL / data.MIDI_FOLDER / f"{name}.mid")
    found = data.align(score, played)
    match, anchors = data._clean(score, played, found)
    assert data.harmony_statistics(score) == pytest.approx(prototype["harmony_statistics"](score), abs=1e-9)
    expected = prototype["tempo_statistics"](score, anchors)
    expected |= prototype["articulation_statistics"](score, played, match, anchors)
    assert data.timing_statistics(score, played, found) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_statistics_of_almost_nothing_are_finite(n):
    played = performance([60] * n, [64] * n, [1.0] * n, [1.0] * n)
    score = toy_score([0] * n, [0] * n, pitch=[60] * n, grace=[1] * n, measures=[0, 4])
    found = data.performance_statistics(played) | data.harmony_statistics(score)
    for match in (np.arange(n), np.full(n, -1)):
        assert np.isfinite([*(found | data.timing_statistics(score, played, match)).values()]).all()


@pytest.mark.slow
def test_memory_of_the_statistics_is_linear():
    n = 4_000
    score = toy_score(np.arange(n) / 4, pitch=40 + np.arange(n) % 40)
    played = performance(score.pitch, [64] * n, score.onset / 2, score.onset / 2 + 0.2)
    tracemalloc.start()
    data.harmony_statistics(score)
    data.performance_statistics(played)
    data.timing_statistics(score, played, np.arange(n))
    assert tracemalloc.get_traced_memory()[1] < 10e6  # n squared bytes are 16e6
    tracemalloc.stop()


def test_ringing_equals_all_pairs():
    rng = np.random.default_rng(7)
    n = 500
    pitch = rng.integers(40, 60, n).astype(float)
    onset = np.sort(rng.uniform(0, 30, n))
    sounding = onset + rng.exponential(0.3, n)
    ringing, rubbing = data._ringing(pitch, onset, sounding)
    for i in range(n):
        rings = (onset < onset[i] - data.CHORD_GAP) & (sounding > onset[i] + 0.05)
        near = np.isin(np.abs(pitch - pitch[i]), (1, 2))
        assert (ringing[i], rubbing[i]) == (rings.sum(), (rings & near).sum())
