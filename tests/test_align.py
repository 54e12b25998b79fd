"""The aligner: performances with known truth (perturbed scores), real performances, degenerate input."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SHARED, needs_shared, performance
from test_score import document, quarters, repeat

import data

REFERENCE = SHARED / "reference/percepiano_features"


def make_score(notes):
    """Score of (onset, pitch, grace_order) triples in the order of Score."""
    notes = np.reshape(sorted(notes, key=lambda note: (note[0], note[2], -note[1])), (-1, 3))
    onset, pitch, grace_order = notes.T
    return SimpleNamespace(
        pitch=pitch.astype(np.int64),
        onset=onset.astype(float),
        grace_order=grace_order.astype(np.int64),
        arpeggiate=np.zeros(len(pitch), bool),
    )


def make_performance(pitch, onset):
    order = np.argsort(onset, kind="stable")
    return SimpleNamespace(pitch=np.array(pitch, np.int64)[order], onset=np.array(onset, float)[order])


def written_score(seed):
    """Melody with graces and unisons over repeated chords and a bass, 8 bars of 4/4."""
    rng, notes, melody = np.random.default_rng(seed), [], 72
    for step in range(64):
        melody = int(np.clip(melody + rng.integers(-4, 5), 60, 88))
        if rng.random() < 0.85:
            notes.append((step / 2, melody, 0))
            if rng.random() < 0.15:
                notes.append((step / 2, melody, 0))
            if rng.random() < 0.1:
                notes += [(step / 2, melody + 2, -1), (step / 2, melody + 1, -2)]
        if step % 2 == 0:
            triad = ((0, 4, 7), (0, 5, 9), (2, 5, 11))[step // 8 % 3]
            notes += [(step / 2, 48 + interval, 0) for interval in triad]
        if step % 8 == 0:
            notes.append((step / 2, 36, 0))
    return make_score(notes)


QUIET = "ritardando left_early roll wrong missing extra restrike silence pause".split()
STYLE = dict.fromkeys(QUIET, 0.0) | dict(pace=0.6, rubato=0.1, jitter=0.01, cut=(0.0, 0.0), grace=0.08)
STYLE |= dict(skip=(0.0, 0.0), cadenza=0)


def perform(score, seed, **changes):
    """A performance of the score and, per score note, the true index of its played note (-1: not played)."""
    style = SimpleNamespace(**STYLE | changes)
    rng = np.random.default_rng(seed)
    position, chord = np.unique(score.onset, return_inverse=True)
    t = np.linspace(0, 1, len(position))
    wave = np.sin(2 * np.pi * (t * rng.uniform(1, 5) + rng.uniform())) + 0.4 * rng.normal(size=len(t))
    tempo = style.pace * np.exp(style.rubato * wave)
    tempo *= 1 + style.ritardando * np.clip((t - 0.85) / 0.15, 0, 1)
    clock = np.append(0, np.cumsum(np.diff(position) * tempo[:-1]))
    clock[rng.integers(2, len(clock) - 1) :] += style.pause
    left_out = np.digitize(position / position[-1], style.skip) == 1
    if left_out.any():
        clock[position > position[left_out][-1]] -= np.ptp(clock[left_out])
    middle = clock[len(clock) // 2]
    clock[len(clock) // 2 :] += 0.15 * style.cadenza
    rolled = rng.random(len(position)) < style.roll

    owners, notes = {}, []
    for k in range(style.cadenza):
        notes.append((middle + 0.15 * k - 0.08, int(rng.integers(60, 90)), -1))
    for row, (where, key, order) in enumerate(zip(chord, score.pitch, score.grace_order, strict=True)):
        owner = owners.setdefault((where, key, order), row)
        if owner < row:
            continue
        onset = (
            clock[where] + rng.normal(0, style.jitter) + style.grace * order - style.left_early * (key < 60)
        )
        if rolled[where]:
            onset += 0.045 * np.sum(np.unique(score.pitch[chord == where]) < key)
        inside = style.cut[0] * clock[-1] <= onset <= (1 - style.cut[1]) * clock[-1] + 0.2
        if not inside or left_out[where] or rng.random() < style.missing:
            continue
        slip = rng.random() < style.wrong
        notes.append((onset, key + rng.choice([-2, -1, 1, 2]) if slip else key, -1 if slip else row))
        if rng.random() < style.extra:
            later, other = rng.uniform(-0.15, 0.3), rng.choice([-12, -5, -2, -1, 1, 2, 5, 12])
            notes.append((onset + later, key + other, -1))
        if rng.random() < style.restrike:
            notes.append((onset + rng.uniform(0.12, 0.2), key, -1))
    notes.sort()
    index = {row: played for played, (_, _, row) in enumerate(notes) if row >= 0}
    keys = zip(chord, score.pitch, score.grace_order, strict=True)
    truth = np.array([index.get(owners[key], -1) for key in keys])
    onset = np.array([note[0] for note in notes])
    return make_performance([note[1] for note in notes], onset - onset[0] + style.silence), truth


def f1(pairs):
    """F1 of all (match, truth) pairs together."""
    match, truth = (np.concatenate(part) for part in zip(*pairs, strict=True))
    right = np.sum((match == truth) & (truth >= 0))
    return 2 * right / (np.sum(match >= 0) + np.sum(truth >= 0))


PERTURBATIONS = {
    "plain": {},
    "tempo": {"rubato": 0.3, "ritardando": 1.5, "pause": 1.5, "silence": 5.0},
    "notes": {"wrong": 0.02, "missing": 0.03, "extra": 0.04, "restrike": 0.02},
    "chords": {"roll": 0.3, "left_early": 0.05, "grace": -0.05},
    "late start": {"cut": (0.5, 0.0), "silence": 4.0},
    "early end": {"cut": (0.0, 0.15)},
    "slow": {"pace": 1.6},
    "middle left out": {"skip": (0.3, 0.6)},
    "cadenza": {"cadenza": 40},
    "free tempo": {"rubato": 0.6, "ritardando": 2.0, "pause": 3.0},
    "everything": dict(rubato=0.2, ritardando=1.0, jitter=0.02, left_early=0.04, roll=0.1, wrong=0.02)
    | dict(missing=0.03, extra=0.04, restrike=0.02, silence=1.0, pause=0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PERTURBATIONS)
def test_written_scores_with_known_truth(name):
    pairs = []
    for seed in range(6):
        score = written_score(seed)
        performance, truth = perform(score, seed, **PERTURBATIONS[name])
        pairs.append((data.align(score, performance), truth))
    assert f1(pairs) >= 0.995


def test_the_way_back_is_the_same_from_blocks(monkeypatch):
    score = written_score(1)
    performance, _ = perform(score, 1, **PERTURBATIONS["everything"])
    whole = data.align(score, performance)
    monkeypatch.setattr(data, "LATTICE_BLOCK", 37)
    assert data.align(score, performance).tolist() == whole.tolist()


def test_unisons_share_one_note_and_never_cross():
    keys = [(60, 60), (62, 62, 60), (60, 62), (60, 60)]
    score = make_score([(beat, key, 0) for beat, chord in enumerate(keys) for key in chord])
    performance = make_performance([60, 62, 60, 62, 60, 60], [0.0, 0.5, 0.51, 1.0, 1.01, 1.5])
    assert data.align(score, performance).tolist() == [0, 0, 1, 1, 2, 3, 4, 5, 5]


def test_a_long_pair_without_a_passage_in_common_is_not_searched(monkeypatch):
    score = written_score(1)
    performance, _ = perform(score, 1, cut=(0.3, 0.0), silence=3.0)
    match = data.align(score, performance)
    monkeypatch.setattr(data, "LONG", 0)
    monkeypatch.setattr(data, "PROBED", 60)
    assert data.align(score, performance).tolist() == match.tolist()
    assert (match >= 0).sum() > 0.6 * len(match)
    performance.pitch = np.random.default_rng(2).integers(40, 90, len(performance.pitch))
    monkeypatch.delattr(data, "_viterbi")
    assert set(data.align(score, performance)) == {-1}


# fmt: off
@pytest.mark.parametrize(("written", "played", "expected"), [
    ([], [60], []), ([60, 62], [], [-1, -1]), ([60], [60], [0]),
    ([60], [61], [-1]), ([60, 62, 64], [61, 63, 65], [-1, -1, -1]), ([60], [60, 62, 64], [0]),
    ([60, 62, 64], [62], [-1, 0, -1]),
])
# fmt: on
def test_degenerate_input(written, played, expected):
    score = make_score([(beat, key, 0) for beat, key in enumerate(written)])
    match = data.align(score, make_performance(played, np.arange(len(played)) * 0.5))
    assert match.dtype == np.int64
    assert match.tolist() == expected


@pytest.mark.slow
@needs_shared
def test_agrees_with_the_original_where_that_matched():
    same = total = 0
    for path in sorted(REFERENCE.glob("*.npz")):
        original = np.load(path)
        score = SimpleNamespace(
            pitch=original["note_midi_pitch"].astype(int),
            onset=original["note_onset_quarter"],
            grace_order=original["score_grace_order"].astype(int),
            arpeggiate=original["note_is_arpeggiate"] > 0,
        )
        performance = make_performance(original["perfnote_midi_pitch"], original["perfnote_onset_sec"])
        match, other = data.align(score, performance), original["match"]
        known = (other >= 0) & (performance.pitch[other] == score.pitch)
        same, total = same + np.sum(match[known] == other[known]), total + np.sum(known)
    assert same / total > 0.99


@pytest.mark.parametrize("left_out", [(), (1, 3), (2,), (1, 2, 3)])
def test_repeats_of_sections_that_are_numbered_anew_are_told_apart(left_out, tmp_path):
    rng, bars = np.random.default_rng(3), []
    for _ in range(3):
        first, *others = (quarters(*rng.integers(55, 80, 4).tolist()) for _ in range(6))
        bars += [repeat("forward") + first, *others[:-1], others[-1] + repeat("backward")]
    text = document(bars)
    for number in range(7, 19):
        text = text.replace(f'number="{number}"', f'number="{(number - 1) % 6 + 1}"')
    (tmp_path / "x.musicxml").write_text(text)
    score = data.read_musicxml(tmp_path / "x.musicxml")
    played = data.cut_score(score, ~np.isin(score.repeat, left_out))
    notes = performance(played.pitch, [64] * len(played.pitch), played.onset / 2, played.onset / 2 + 0.4)
    reading = data.follow(score, notes)
    assert reading.score.repeat.tolist() == played.repeat.tolist()
    assert (reading.match_rate, len(reading.said)) == (1, len(left_out))
