"""The MIDI reader: pairing, tempo map, pedals, refusals."""

import mido
import numpy as np
import pytest
from conftest import SHARED, needs_shared, refused

import data

PERFORMANCES = SHARED / "percepiano/virtuoso/data/all_2rounds"


def write(path, *tracks):
    """Tracks are lists of (tick, message); ticks are absolute, 480 to the quarter."""
    file = mido.MidiFile(type=1, ticks_per_beat=480)
    for events in tracks:
        ticks = [tick for tick, _ in events]
        times = np.diff(ticks, prepend=0).tolist()
        messages = [m.copy(time=time) for (_, m), time in zip(events, times, strict=True)]
        file.tracks.append(mido.MidiTrack(messages))
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
    notes = [(0, on(60)), (480, on(62)), (720, off(60)), (960, on(64)), (1440, off(62)), (1920, off(64))]
    played = data.read_midi(
        write(tmp_path / "a.mid", [(480, tempo(1_000_000)), (960, tempo(250_000))], notes)
    )
    assert played.pitch.tolist() == [60, 62, 64]
    np.testing.assert_allclose(played.onset, [0, 0.5, 1.5])
    np.testing.assert_allclose(played.offset, [1.0, 1.75, 2.0])
    assert played.pitch.dtype == played.velocity.dtype == np.int64


def test_note_offs_close_the_oldest_note_of_their_key_and_channel(tmp_path):
    begun = [(0, on(60, 10)), (0, on(60, 30, channel=1)), (480, on(60, 20)), (960, on(60, 0))]
    ended = [(1440, off(60)), (1920, off(60, channel=1)), (1920, off(61))]
    played = data.read_midi(write(tmp_path / "a.mid", begun + ended))
    assert played.velocity.tolist() == [10, 30, 20]
    np.testing.assert_allclose(played.offset, [1.0, 2.0, 1.5])


def test_hanging_notes_end_with_the_file_and_zero_lengths_are_guarded(tmp_path):
    notes = [(0, on(60)), (480, on(62)), (480, off(62)), (960, on(64))]
    played = data.read_midi(write(tmp_path / "a.mid", [*notes, (960, mido.MetaMessage("end_of_track"))]))
    np.testing.assert_allclose(played.offset, [1.0, 0.5 + data.SHORTEST, 1.0 + data.SHORTEST])


def test_pedals_of_all_tracks_in_time_order_with_releases(tmp_path):
    first = [(0, on(60)), (480, control(64, 127)), (960, control(64, 0)), (960, off(60))]
    second = [(240, control(64, 50)), (240, control(67, 1)), (300, control(66, 9))]
    played = data.read_midi(write(tmp_path / "a.mid", first, second))
    np.testing.assert_allclose(played.sustain, [[0.25, 50], [0.5, 127], [1.0, 0]])
    np.testing.assert_allclose(played.soft, [[0.25, 1]])
    empty = data.read_midi(write(tmp_path / "b.mid", [(0, on(60)), (480, off(60))]))
    assert empty.sustain.shape == empty.soft.shape == (0, 2)


def header(kind=0, tracks=1, division=480):
    return b"MThd\0\0\0\6" + b"".join(n.to_bytes(2, "big") for n in (kind, tracks, division))


def track(*events):
    content = b"".join(events)
    return b"MTrk" + len(content).to_bytes(4, "big") + content


NOTE, END = b"\x00\x90\x3c\x40", b"\x00\xff\x2f\x00"
RELEASE = b"\x83\x60\x80\x3c\x00"  # after half a second
WHOLE = NOTE + RELEASE


def midi(*events, **head):
    return header(**head) + track(*events, END)


# (content of the file, what must stand in the line); what is no MIDI at all: test_hostile
BAD = {
    "riff": (b"RIFF\x10\0\0\0RMIDdata", ""),
    "cut header": (header()[:-2], ""),
    "header only": (header(), "0 notes"),
    "no notes": (midi(), "0 notes"),
    "type 2": (midi(NOTE, kind=2), "type 2"),
    "no division": (midi(NOTE, division=0), "division 0"),
    "smpte of no ticks": (midi(NOTE, division=0xE700), "division -6400"),
    "no status": (midi(b"\x00\x3c\x40"), "status byte 0"),
    "too many events": (midi(NOTE * 101), "100 events"),
    "years": (midi(NOTE, b"\xff\xff\xff\x7f\x80\x3c\x00"), "within a day"),
    "endless number": (header() + track(b"\xff" * 1_000_000), ""),
    "huge text": (header() + track(b"\x00\xff\x01\x8f\xff\xff\x7f"), ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line_with_their_path(tmp_path, capsys, monkeypatch, name):
    content, found = BAD[name]
    path = tmp_path / "bad.mid"
    path.write_bytes(content)
    monkeypatch.setattr(data, "MOST_EVENTS", 100)
    refused(lambda: data.read_midi(path), capsys, f"{path}: ", found, "expected")


# (content of the file, releases, repair)
# fmt: off
REPAIRED = {
    "byte": (midi(b"\x00\xb0\x07\xff", WHOLE), [0.5], "bytes over 127 clipped"),
    "key signature": (midi(b"\x00\xff\x59\x02\x09\x00", WHOLE), [0.5], "key signatures"),
    "key without data": (midi(b"\x00\xff\x59\x00", WHOLE), [0.5], "key signatures"),
    "messages between devices": (midi(b"\x00\xf2\0\0\x00\xfe", NOTE, b"\x00\xf8", RELEASE), [0.5], None),
    "running status after a meta event": (midi(NOTE, b"\x83\x60\xff\x01\x00\x00\x3c\x00"), [0.5], None),
    "one track said, two there": (midi(kind=1) + track(WHOLE, END), [0.5], "number of tracks"),
    "two said, one there": (midi(WHOLE, kind=1, tracks=2), [0.5], "number of tracks"),
    "cut between events": (header() + track(WHOLE), [0.5], "cut before their end"),
    "cut": (header() + track(WHOLE, NOTE)[:-1], [0.5], "cut before their end"),
    "riff": (b"RIFF\0\0\0\0RMIDdata\0\0\0\0" + midi(WHOLE), [0.5], "RIFF"),
    "other chunk": (header() + b"XFIH\0\0\0\1x" + track(WHOLE, END), [0.5], "another kind"),
    "tempo": (midi(b"\x00\xff\x51\x03\0\0\0", WHOLE), [0.5], "tempi of 0"),
    "tempo without data": (midi(b"\x00\xff\x51\x00", WHOLE), [0.5], "tempi of 0"),
    "all notes off": (midi(NOTE, b"\x83\x60\xb0\x7b\x00", RELEASE), [0.5], "releases of keys"),
    "of another channel": (midi(NOTE, b"\x83\x60\xb1\x7b\x00", RELEASE), [1.0], None),
    "no length": (midi(NOTE, b"\x00\x80\x3c\x00"), [data.SHORTEST], "no length"),
    "frames": (midi(WHOLE, division=0xE728), [0.48], "SMPTE"),
    "dropped frames": (midi(WHOLE, division=0xE350), [480 / 29.97 / 80], "SMPTE"),
    "never released": (header() + track(b"\x00\x90\x30\x40", WHOLE, b"\x8f", END), [0.5, 0.5],
                       "never released"),
}
# fmt: on


@pytest.mark.parametrize("name", REPAIRED)
def test_what_other_readers_accept_is_read_and_said(tmp_path, name):
    content, releases, repair = REPAIRED[name]
    path = tmp_path / "a.mid"
    path.write_bytes(content)
    played = data.read_midi(path)
    np.testing.assert_allclose(played.offset, releases)
    assert list(played.repairs.values()) == ([1] if repair else [])
    assert not repair or repair in next(iter(played.repairs))


@needs_shared
def test_real_onsets_equal_the_reference():
    for path in sorted((SHARED / "reference/percepiano_features").glob("*.npz")):
        expected = np.load(path)["perfnote_onset_sec"]
        played = data.read_midi(PERFORMANCES / f"{path.stem}.mid")
        keyboard = (played.pitch >= 21) & (played.pitch <= 108)
        keyboard &= played.offset > played.onset + data.SHORTEST + 1e-9
        assert abs(keyboard.sum() - len(expected)) <= 1
        if keyboard.sum() == len(expected):
            np.testing.assert_allclose(played.onset[keyboard], expected, atol=1e-9)
