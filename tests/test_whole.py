"""Whole pieces: which bars, repeats and key a performance plays of a score; cuts; passages."""

import numpy as np
import pytest
from conftest import refused
from test_score import document, quarters, repeat, words

import data

KEYS = np.random.default_rng(7).integers(55, 80, (48, 4))
ONCE = [*range(1, 49)]
AGAIN = [*range(1, 17), *range(9, 49)]  # bars 9-16 are repeated


@pytest.fixture(scope="session")
def piece(tmp_path_factory):
    """The score of 48 bars and a function that plays some of them."""
    root = tmp_path_factory.mktemp("whole")
    bars = [quarters(*bar) for bar in KEYS.tolist()]
    bars[0] = words("Allegro") + '<sound tempo="90"/>' + bars[0]
    bars[8] = repeat("forward") + words("Andante") + '<sound tempo="60"/>' + bars[8]
    bars[15] += repeat("backward")
    (root / "piece.musicxml").write_text(document(bars))

    def play(bars, semitones=0, more=0, seed=0):
        """The performance of these bars, `more` other notes in their middle."""
        keys = [key + semitones for bar in bars for key in KEYS[bar - 1].tolist()]
        half = len(keys) // 2
        keys[half:half] = np.random.default_rng(seed).integers(84, 100, more).tolist()
        notes = [(k / 2, k / 2 + 0.4, key, 20 + k % 100) for k, key in enumerate(keys)]
        data._save_midi(root / "take.mid", notes, [(0.1, 64, 90)])
        return data.read_midi(root / "take.mid")

    play.score, play.midi = root / "piece.musicxml", root / "take.mid"
    return play


# fmt: off
@pytest.mark.parametrize(("played", "changes", "bars", "count", "said"), [
    (AGAIN, {}, "1-16, 9-48", 56, []),
    (ONCE, {}, "1-48", 48, ["without the repeat of bars 9-16"]),
    (AGAIN, {"semitones": 2}, "1-16, 9-48", 56, ["2 semitones higher"]),
    (ONCE, {"semitones": -3}, "1-48", 48, ["3 semitones lower", "repeat of bars 9-16"]),
    ([*range(20, 41)], {}, "20-40", 21, ["bars 20-40 of the score only"]),
    ([*range(1, 17), *range(9, 13)], {}, "1-16, 9-12", 20, ["bars 1-16, 9-12 of the score only"]),
    ([*range(1, 17), *range(9, 21), *range(35, 49)], {}, "1-16, 9-48", 56, ["25% of the written notes"]),
    (AGAIN, {"more": 80}, "1-16, 9-48", 56, ["26% of the played notes"]),
])
# fmt: on
def test_what_was_played_of_a_score(played, changes, bars, count, said, piece):
    reading = data.follow(data.read_musicxml(piece.score), piece(played, **changes), transpose=True)
    assert (reading.bars, len(reading.score.measures)) == (bars, count)
    assert len(reading.warnings()) == len(said)
    assert all(part in line for part, line in zip(said, reading.warnings(), strict=True))
    assert reading.match_rate > (0.7 if "written" in str(said) else 0.99)


@pytest.mark.slow
def test_what_plays_something_else_is_refused(piece, capsys):
    score, other = data.read_musicxml(piece.score), piece(ONCE)
    other.pitch[:] = np.random.default_rng(3).permutation(other.pitch)
    refused(lambda: data.follow(score, other), capsys, other.path, str(piece.score))
    refused(lambda: data.follow(score, piece(AGAIN, 5)), capsys, "5 semitones higher", "--transpose")


def test_a_cut_score_is_the_score_of_these_bars(piece, tmp_path):
    """Against the file of those bars alone."""
    score = data.read_musicxml(piece.score)
    cut = data.cut_score(score, data.bars_named(score, "13-20"))
    marks = words("Andante") + '<sound tempo="60"/>'
    path = tmp_path / "part.musicxml"
    bars = [quarters(*KEYS[bar].tolist()) for bar in range(12, 20)]
    path.write_text(document([marks + bars[0], *bars[1:]]))
    alone = data.read_musicxml(path)
    for name in ("pitch", "onset", "measure", "beat", "section", "beats", "measures", "sections", "qpm"):
        np.testing.assert_allclose(getattr(cut, name), getattr(alone, name), err_msg=name)
    for name, values in alone.features.items():
        np.testing.assert_allclose(cut.features[name], values, err_msg=name)
    assert cut.numbers.tolist() == [*range(13, 21)]


def test_score_and_performance_are_cut_alike(piece):
    reading = data.follow(data.read_musicxml(piece.score), piece(AGAIN, more=3))
    part = data.cut_bars(reading, data.bars_named(reading.score, "10-11"))
    assert part.performance.pitch.tolist() == KEYS[9:11].ravel().tolist()
    np.testing.assert_allclose(part.performance.onset, np.arange(8) / 2, atol=1e-6)
    assert part.performance.velocity.tolist() == [*range(56, 64)]
    assert part.performance.sustain.tolist() == [[0, 90]]
    assert part.match.tolist() == [*range(8)]
    assert part.start == pytest.approx(18)
    masks = data.passages(reading.score)
    assert [np.flatnonzero(mask)[0] for mask in masks] == [0, 16, 32, 40]
    assert [mask.sum() for mask in masks] == [16] * 4
    parts = [data.cut_bars(reading, mask) for mask in masks]
    whole = sum(len(part.performance.pitch) for part in parts[:3])
    assert (whole, len(parts[3].performance.pitch)) == (48 * 4 + 3, 64)
    assert data.cut_bars(reading, np.zeros(56, bool)) is None


def test_silence_before_the_first_note_changes_no_rating(piece):
    reading = data.follow(data.read_musicxml(piece.score), piece(ONCE[:4]))
    played = reading.performance
    late = data.replace(played, **{name: getattr(played, name) + 9 for name in ("onset", "offset")})
    late.sustain = played.sustain + [9, 0]
    here, there = (data.from_first_note(data.replace(reading, performance=p)) for p in (played, late))
    assert (here.start, there.start) == (0, 9)
    for name in ("onset", "offset", "sustain"):
        np.testing.assert_allclose(*(getattr(r.performance, name) for r in (here, there)), atol=1e-9)
