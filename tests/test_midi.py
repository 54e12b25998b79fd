"""The MIDI reader: pairing, tempo map, pedals, refusals."""

import os
import random
from pathlib import Path

import mido
import numpy as np
import pytest

import data
from data import DataError

SHARED = Path(os.environ.get("SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
PERFORMANCES = SHARED / "percepiano/virtuoso/data/all_2rounds"


def write(path, *tracks, division=480, kind=1):
    """Tracks are lists of (tick, message); ticks are absolute."""
    file = mido.MidiFile(type=kind, ticks_per_beat=division)
    for events in tracks:
        track, last = mido.MidiTrack(), 0
        for tick, message in events:
            track.append(message.copy(time=tick - last))
            last = tick
        file.tracks.append(track)
    file.save(path)
    return path


def on(note, velocity=64, channel=0):
    return mido.Message("note_on", note=note, velocity=velocity, channel=channel)


def off(note, channel=0):
    return mido.Message("note_off", note=note, channel=channel)


def control(number, value):
    return mido.Message("control_change", control=number, value=value)


def tempo(microseconds):
    return mido.MetaMessage("set_tempo", tempo=microseconds)


def test_tempo_map_of_one_track_governs_all(tmp_path):
    path = write(
        tmp_path / "a.mid",
        [(480, tempo(1_000_000)), (960, tempo(250_000))],
        [(0, on(60)), (480, on(62)), (720, off(60)), (960, on(64)), (1440, off(62)), (1920, off(64))],
    )
    played = data.read_midi(path)
    assert played.pitch.tolist() == [60, 62, 64]
    np.testing.assert_allclose(played.onset, [0, 0.5, 1.5])
    np.testing.assert_allclose(played.offset, [1.0, 1.75, 2.0])
    assert played.pitch.dtype == played.velocity.dtype == np.int64


def test_note_offs_close_the_oldest_note_of_their_key_and_channel(tmp_path):
    path = write(
        tmp_path / "a.mid",
        [
            (0, on(60, 10)),
            (0, on(60, 30, channel=1)),
            (480, on(60, 20)),
            (960, on(60, 0)),
            (1440, off(60)),
            (1920, off(60, channel=1)),
            (1920, off(61)),
        ],
    )
    played = data.read_midi(path)
    assert played.velocity.tolist() == [10, 30, 20]
    np.testing.assert_allclose(played.offset, [1.0, 2.0, 1.5])


def test_hanging_notes_end_with_the_file_and_zero_lengths_are_guarded(tmp_path):
    path = write(
        tmp_path / "a.mid",
        [(0, on(60)), (480, on(62)), (480, off(62)), (960, on(64)), (960, mido.MetaMessage("end_of_track"))],
    )
    played = data.read_midi(path)
    np.testing.assert_allclose(played.offset, [1.0, 0.5 + data.SHORTEST, 1.0 + data.SHORTEST])


def test_pedals_of_all_tracks_in_time_order_with_releases(tmp_path):
    path = write(
        tmp_path / "a.mid",
        [(0, on(60)), (480, control(64, 127)), (960, control(64, 0)), (960, off(60))],
        [(240, control(64, 50)), (240, control(67, 1)), (300, control(66, 9))],
    )
    played = data.read_midi(path)
    np.testing.assert_allclose(played.sustain, [[0.25, 50], [0.5, 127], [1.0, 0]])
    np.testing.assert_allclose(played.soft, [[0.25, 1]])
    empty = data.read_midi(write(tmp_path / "b.mid", [(0, on(60)), (480, off(60))]))
    assert empty.sustain.shape == empty.soft.shape == (0, 2)


@pytest.mark.parametrize(("frames", "rate"), [(24, 24), (25, 25), (29, 30 / 1.001), (30, 30)])
def test_smpte_division_counts_frames_whatever_the_tempo(tmp_path, frames, rate):
    path = write(tmp_path / "a.mid", [(0, tempo(250_000)), (0, on(60)), (400, off(60))])
    content = bytearray(path.read_bytes())
    content[12:14] = bytes([256 - frames, 40])
    path.write_bytes(content)
    np.testing.assert_allclose(data.read_midi(path).offset, [400 / (40 * rate)])


def _header(kind=0, tracks=1, division=480):
    return b"MThd\0\0\0\6" + b"".join(n.to_bytes(2, "big") for n in (kind, tracks, division))


def _track(events):
    return b"MTrk" + len(events).to_bytes(4, "big") + events


NOTE = b"\x00\x90\x3c\x40"
END = b"\x00\xff\x2f\x00"
BAD = {
    "empty": (b"", "an empty file"),
    "html": (b"<!DOCTYPE html><html></html>", "not b'MThd'"),
    "riff": (b"RIFF\x10\0\0\0RMIDdata", "not b'MThd'"),
    "binary": (bytes(range(256)), "not b'MThd'"),
    "header only": (_header(), "ends too early"),
    "no notes": (_header() + _track(END), "no notes"),
    "silent notes": (_header() + _track(b"\x00\x90\x3c\x00" + END), "no notes"),
    "type 2": (_header(kind=2) + _track(NOTE + END), "type 2"),
    "type 9": (_header(kind=9) + _track(NOTE + END), "type 9"),
    "no division": (_header(division=0) + _track(NOTE + END), "0 ticks"),
    "bad smpte": (_header(division=0xFF28) + _track(NOTE + END), "SMPTE"),
    "cut": (_header() + _track(NOTE + END)[:-2], "ends too early"),
    "data byte": (_header() + _track(b"\x00\x90\xbc\x40" + END), "corrupt"),
    "years": (_header() + _track(NOTE + b"\xff\xff\xff\x7f\x80\x3c\x00" + END), "more than a day"),
    "overlong number": (_header() + _track(NOTE + b"\xff" * 1000 + b"\x7f\x80\x3c\x00" + END), "delta time"),
    "endless number": (_header() + _track(b"\xff" * 1_000_000), "above 127"),
    "huge text": (_header() + _track(b"\x00\xff\x01\x8f\xff\xff\x7f"), "corrupt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line_with_their_path(tmp_path, name):
    content, found = BAD[name]
    path = tmp_path / "bad.mid"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        data.read_midi(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert found in message
    assert "expected" in message
    assert "\n" not in message


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        data.read_midi(tmp_path / "none.mid")
    with pytest.raises(DataError, match="a directory"):
        data.read_midi(tmp_path)


def _example(path):
    rng = random.Random(1)
    events = [(0, tempo(500_000)), (0, mido.MetaMessage("key_signature", key="C")), (0, control(64, 100))]
    for step in range(30):
        note = rng.randrange(40, 90)
        events += [(step * 120, on(note)), (step * 120 + 100, off(note))]
    return write(path, events)


@pytest.mark.parametrize("damage", ["cut", "head", "body"])
def test_damaged_files_read_or_raise_data_errors_only(tmp_path, damage):
    rng = random.Random(damage)
    sources = [_example(tmp_path / "a.mid")]
    if PERFORMANCES.is_dir():
        sources += rng.sample(sorted(PERFORMANCES.glob("*.mid")), 5)
    contents, bad, refused = [path.read_bytes() for path in sources], tmp_path / "bad.mid", 0
    for _ in range(300):
        content = bytearray(rng.choice(contents))
        if damage == "cut":
            content = content[: rng.randrange(len(content))]
        for _ in range(0 if damage == "cut" else rng.choice([1, 2, 5])):
            content[rng.randrange(60 if damage == "head" else len(content))] = rng.randrange(256)
        bad.write_bytes(content)
        try:
            played = data.read_midi(bad)
        except DataError:
            refused += 1
            continue
        assert np.all(played.offset > played.onset)
        assert np.all(np.diff(played.onset) >= 0)
        assert all(
            np.isfinite(part).all() for part in (played.onset, played.offset, played.sustain, played.soft)
        )
    assert refused == 300 if damage == "cut" else refused > 0


@pytest.mark.skipif(not PERFORMANCES.is_dir(), reason="needs ../shared")
def test_real_onsets_equal_the_reference():
    reference = SHARED / "reference/percepiano_features"
    for path in sorted(reference.glob("*.npz")):
        original = np.load(path)
        played = data.read_midi(PERFORMANCES / f"{path.stem}.mid")
        keyboard = (
            (played.pitch >= 21)
            & (played.pitch <= 108)
            & (played.offset > played.onset + data.SHORTEST + 1e-9)
        )
        assert abs(keyboard.sum() - len(original["perfnote_onset_sec"])) <= 1
        if keyboard.sum() == len(original["perfnote_onset_sec"]):
            np.testing.assert_allclose(played.onset[keyboard], original["perfnote_onset_sec"], atol=1e-9)
