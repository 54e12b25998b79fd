"""Performance features: hand-worked cases, plain slow renditions, the original's values."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SHARED

import data
from data import Performance, read_midi

ORACLE = sorted((SHARED / "reference/percepiano_features").glob("*.npz"))
MIDI = SHARED / "percepiano/virtuoso/data/all_2rounds"
# fmt: off
PEDAL = ("pedal_refresh_time", "pedal_cut_time", "pedal_at_start", "pedal_at_end", "soft_pedal",
         "pedal_refresh", "pedal_cut")
# fmt: on
needs_shared = pytest.mark.skipif(not ORACLE, reason="the reference data are not beside the repository")


def toy_score(onset, duration=None, bar=4.0, tempo_qpm=120.0, **flags):
    """One voice, beats of a quarter; score features count up from 1, so that copies can be told apart."""
    onset = np.array(onset, float)
    n = len(onset)
    beats, measures = np.arange(0.0, onset.max() + 1), np.arange(0.0, onset.max() + 1, bar)
    features = {}
    for name, (width, *_) in data.SCORE_FEATURES.items():
        features[name] = 1.0 + np.arange(n * width).reshape((n, width) if width > 1 else n)
    for name in ("qpm_primo", "composer_vec", "tempo_primo"):
        features[name] = np.full_like(features[name], 2.0)
    for name in ("grace", "overlapped", "trill", "arpeggiate"):
        flags[name] = np.array(flags.get(name, np.zeros(n)), bool)
    return SimpleNamespace(
        pitch=np.arange(60, 60 + n),
        onset=onset,
        duration=np.array(np.ones(n) if duration is None else duration),
        voice=np.ones(n, np.int64),
        beat=np.searchsorted(beats, onset, "right") - 1,
        measure=np.searchsorted(measures, onset, "right") - 1,
        beats=beats,
        measures=measures,
        sections=np.array([0.0, onset.max() + 0.025]),
        qpm=np.full(n, tempo_qpm),
        features=features,
        **flags,
    )


def toy_performance(onset, offset=None, velocity=None, sustain=(), soft=()):
    onset = np.array(onset, float)
    offset = onset + 0.4 if offset is None else np.array(offset, float)
    velocity = np.full(len(onset), 64) if velocity is None else np.array(velocity)
    pedals = [np.array(curve, float).reshape(-1, 2) for curve in (sustain, soft)]
    return Performance("toy", np.arange(60, 60 + len(onset)), velocity, onset, offset, *pedals)


def oracle_inputs(path):
    """The original's own notes and grids, in the form of a Score and a Performance."""
    with np.load(path, allow_pickle=False) as file:
        ref = dict(file)
    notes = {name: ref[f"note_is_{name}"] for name in ("grace", "trill", "overlapped")}
    notes |= {name: ref[f"loc_{name}"] for name in ("voice", "beat", "measure")}
    n = len(ref["note_onset_quarter"])
    score = SimpleNamespace(
        **notes,
        onset=ref["note_onset_quarter"],
        duration=ref["note_duration_quarter"],
        arpeggiate=ref["note_is_arpeggiate"],
        beats=ref["grid_beats_quarter"],
        measures=ref["grid_measures_quarter"],
        sections=ref["grid_sections_quarter"],
        qpm=np.full(n, 10 ** float(ref["score_qpm_primo"])),
        features={name: np.zeros((n, width)) for name, (width, *_) in data.SCORE_FEATURES.items()},
    )
    played = [ref[f"perfnote_{name}"] for name in ("midi_pitch", "velocity", "onset_sec", "offset_sec")]
    return ref, score, Performance(path.stem, *played, *np.zeros((2, 0, 2)))


# (onsets in quarters, flags, onsets in seconds, rows dropped, anchors)
# fmt: off
CHORDS = {
    "mean onsets of chords, the last one included": (
        [0, 0, 1, 2, 2], {}, [1.0, 1.1, 2.0, 3.0, 3.2], [], [(0, 1.05), (1, 2.0), (2, 3.1)]),
    "graces keep their match and move no anchor": (
        [0, 1, 1, 2], {"grace": [0, 1, 0, 0]}, [0.0, 0.2, 1.0, 2.0], [], [(0, 0.0), (1, 1.0), (2, 2.0)]),
    "an outlier is dropped: mean .2, farthest .6; the mean of the rest is 0": (
        [0, 0, 0, 1], {}, [0.0, 0.0, 0.6, 1.0], [2], [(0, 0.0), (1, 1.0)]),
    "of a pair .5 apart both are .25 from their mean, which stays the anchor": (
        [0, 0, 1], {}, [0.0, 0.5, 1.0], [0, 1], [(0, 0.25), (1, 1.0)]),
    "an arpeggio widens the chord": (
        [0, 0, 0, 1], {"arpeggiate": [1, 0, 0, 0]}, [0.0, 0.3, 0.6, 1.0], [], [(0, 0.3), (1, 1.0)]),
    "from .5 s at quarter 1, quarter 2 may come after .56 s; the chord at 1 stays open": (
        [0, 1, 2, 3], {}, [0.0, 0.5, 0.55, 1.5], [1, 2], [(0, 0.0), (1, 0.5), (3, 1.5)]),
    "quarter 1 has mean .5 from (.4, .6); quarter 2 opens at .55 > .4 + .06, but .55 < .5 + .06": (
        [0, 1, 1, 2, 3], {}, [0.0, 0.4, 0.6, 0.55, 1.0], [3], [(0, 0.0), (1, 0.5), (3, 1.0)]),
}
# fmt: on


@pytest.mark.parametrize("case", CHORDS)
def test_cleaning_by_hand(case):
    quarters, flags, seconds, dropped, expected = CHORDS[case]
    match, anchors = data._clean(
        toy_score(quarters, **flags), toy_performance(seconds), np.arange(len(quarters))
    )
    assert np.flatnonzero(match < 0).tolist() == dropped
    np.testing.assert_allclose(anchors, expected)


def test_fewer_than_two_anchors_fall_back_on_the_score_tempo():
    score = toy_score([2, 3, 4], tempo_qpm=90.0)
    performance = toy_performance([1.0, 2.0, 3.0])
    for match in ([-1, -1, -1], [-1, 1, -1]):
        features = data.note_features(score, performance, np.array(match))
        for name in ("beat_tempo", "measure_tempo", "section_tempo", "performance_qpm_primo"):
            np.testing.assert_allclose(features[name], np.log10(90))
        assert all(np.isfinite(column).all() for column in features.values())
        assert np.isfinite(data.note_table(score, performance, np.array(match))["x"]).all()


def test_tempo_deviation_and_articulation_by_hand():
    # Beats at 60, then 120 qpm; a late half beat; a grace half a quarter early; a rest in the last beat.
    score = toy_score([0, 0.5, 1, 2, 2], [0.5, 0.5, 1, 0, 1], grace=[0, 0, 0, 1, 0])
    performance = toy_performance([0, 0.6, 1, 1.25, 1.5], [0.25, 0.85, 2, 1.4, 2], [10, 30, 50, 70, 90])
    features = data.note_features(score, performance, np.arange(5))
    np.testing.assert_allclose(features["beat_tempo"], np.log10([60, 60, 120, 120, 120]))
    np.testing.assert_allclose(features["performance_qpm_primo"], np.log10([90] * 5))
    np.testing.assert_allclose(features["onset_deviation"], [0, 0.1, 0, -0.5, 0], atol=1e-12)
    np.testing.assert_allclose(features["articulation"], np.log10([0.5, 0.5, 2, 1, 1]), atol=1e-12)
    np.testing.assert_allclose(features["beat_dynamics"], [25, 25, 50, 85, 85])
    np.testing.assert_allclose(features["measure_dynamics"], [70] * 5)
    score = toy_score([0, 1, 2], overlapped=[1, 0, 0], trill=[0, 1, 0])
    flat = data.note_features(score, toy_performance([0, 1, 2], [9, 9, 2.25]), np.arange(3))
    np.testing.assert_allclose(flat["articulation"], [0, 0, np.log10(0.25)])


def test_unmatched_notes_repeat_the_last_matched_one():
    performance = toy_performance([0.5, 1.5], velocity=[40, 80], sustain=[(1.6, 100)])
    features = data.note_features(toy_score([0, 1, 2, 3]), performance, np.array([-1, 0, -1, 1]))
    assert features["velocity"].tolist() == [64, 40, 40, 80]
    assert features["matched"].tolist() == [0, 1, 0, 1]
    assert features["pedal_at_end"].tolist() == [0, 0, 0, data._pedal_depth(np.array(100.0))]
    assert features["raw_pitch"].tolist() == [0, 60, 0, 61]
    assert features["raw_onset"].tolist() == [0, 0.5, 0, 1.5]
    assert features["onset_deviation"][[0, 2]].tolist() == [0, 0]


def test_pedal_by_hand():
    """Lowest while a note sounds and between it and the next, the entry in force at the end left out."""
    sustain = [(0, 100), (0.5, 20), (0.75, 90), (1.5, 40), (2.5, 60), (3.25, 10), (3.5, 70)]
    performance = toy_performance([0, 2, 4], [1, 3, 5], sustain=sustain, soft=[(1, 50)])
    found = data._played_features(performance)
    depths = {
        "pedal_at_start": [100, 40, 70],
        "pedal_at_end": [90, 60, 70],
        "soft_pedal": [0, 50, 50],
        "pedal_refresh": [20, 40, 70],
        "pedal_cut": [0, 10, 70],
    }
    for name, values in depths.items():
        expected = [int(127 / (1 + np.exp(-(value - 64) / 8))) for value in values]
        np.testing.assert_allclose(found[name], expected, err_msg=name)
    np.testing.assert_allclose(found["pedal_refresh_time"], [0.5, 0, 0])
    np.testing.assert_allclose(found["pedal_cut_time"], [0, 0.25, 0])


def column(table, name):
    names = [column.partition(":")[0] for column in data.column_names(data.FEATURES)]
    return table["x"][:, names.index(name)]


def test_columns_are_those_of_the_description():
    assert len(data.column_names(data.SCORE_FEATURES)) == 78
    assert len(data.column_names(data.FEATURES)) == 78 + 16 + 4
    assert list(data.FEATURES)[20:23] == ["tempo_primo", "beat_tempo", "measure_tempo"]


def test_extra_notes_enter_in_time_order():
    # Quarters 0..3 at 1..4 s; the first two are not played. Extra: .2 s (before all), 1.1, 3.4, 3.6, 9 s.
    score = toy_score([0, 1, 2, 3], bar=2.0)
    performance = toy_performance(
        [0.2, 1.1, 3.0, 3.4, 3.6, 4.0, 9.0], velocity=[1, 2, 3, 4, 5, 6, 7], sustain=[(3.5, 127)]
    )
    table = data.note_table(score, performance, np.array([-1, -1, 2, 5]))
    rows = {
        "voice": [0, 1, 0, 1, 1, 0, 0, 1, 0],
        "matched": [0, 0, 0, 0, 1, 0, 0, 1, 0],
        "beat": [0, 0, 0, 1, 2, 2, 3, 3, 3],
        "measure": [0, 0, 0, 0, 1, 1, 1, 1, 1],
        "raw_onset": [0.2, 0, 1.1, 0, 3.0, 3.4, 3.6, 4.0, 9.0],
        "beat_position": [1, 1, 1, 2, 3, 3, 4, 4, 4],
        "measure_length": [1, 1, 1, 2, 3, 3, 4, 4, 4],
        "qpm_primo": [2] * 9,
        "midi_pitch": [0, 1, 0, 2, 3, 0, 0, 4, 0],
    }
    for name, expected in rows.items():
        found = table[name] if name in table else column(table, name)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    inserted = {"beat_tempo": [0] * 5, "velocity": [1, 2, 4, 5, 7], "pedal_at_start": [0, 0, 0, 126, 126]}
    for name, expected in inserted.items():
        assert column(table, name)[table["voice"] == 0].tolist() == expected
    assert table["x"].dtype == np.float32
    assert table["x"].shape == (9, 98)


def last_object(grid, anchors, onset):
    """Rows whose tempo object is the last one: the last onset, an anchor here only, may end it."""
    start = data._tempo_of_notes(grid, anchors)[0]
    return data._index_at_or_before(start, onset) == len(start) - 1


@needs_shared
@pytest.mark.parametrize("path", ORACLE, ids=lambda path: path.stem)
def test_equal_to_the_original_on_its_own_alignment(path):
    ref, score, performance = oracle_inputs(path)
    match, anchors = data._clean(score, performance, ref["match_before_cleaning"])
    np.testing.assert_array_equal(match, ref["match"])
    np.testing.assert_allclose(anchors[:-1], ref["anchors_quarter_sec"])

    features = data.note_features(score, performance, ref["match_before_cleaning"])
    early = (score.beat < score.beat[-1]) & (score.measure < score.measure[-1])
    beat_end = last_object(score.beats, anchors, score.onset)
    same = {
        "velocity": early,
        "beat_dynamics": early,
        "measure_dynamics": early,
        "beat_tempo": ~beat_end,
        "onset_deviation": ~beat_end,
        "articulation": ~beat_end,
        "measure_tempo": ~last_object(score.measures, anchors, score.onset),
        "section_tempo": ~last_object(score.sections, anchors, score.onset),
    }
    for name, rows in same.items():
        np.testing.assert_allclose(features[name][rows], ref[f"perf_{name}"][rows], atol=1e-9, err_msg=name)
    assert np.abs(features["section_tempo"] - ref["perf_section_tempo"]).max() < 0.02


@pytest.mark.slow
@needs_shared
def test_pedal_of_the_original_where_releases_are_left_out():
    equal = []
    for path in ORACLE:
        ref, score, performance = oracle_inputs(path)
        recorded = read_midi(MIDI / f"{path.stem}.mid")
        performance.sustain = recorded.sustain[recorded.sustain[:, 1] > 0]
        performance.soft = recorded.soft[recorded.soft[:, 1] > 0]
        features = data.note_features(score, performance, ref["match_before_cleaning"])
        equal.append([np.abs(features[name] - ref[f"perf_{name}"]) < 1e-3 for name in PEDAL])
    # Not 1: whether an event at the very tick of a note counts hangs on the rounding of two ways to seconds.
    assert np.concatenate(equal, 1).mean(1).min() >= 0.98
