"""MAESTRO's table and folders, splits that are not known, and what PercePiano shares with it."""

import csv
from collections import Counter
from pathlib import Path

import mido
import numpy as np
import pytest
from conftest import SHARED, needs_shared, refused
from test_fbank import write_wav

import data
from data import maestro_overlaps, read_maestro

REAL, PERCEPIANO = SHARED / "maestro_midi", SHARED / "percepiano"


def play(
    path: Path, seed: int, notes: int = 60, jitter: int = 0, part: slice = slice(None), division: int = 480
) -> Path:
    """A melody drawn from `seed`; `jitter` draws another performance of it, of which `part` is written."""
    rng = np.random.default_rng(seed)
    pitches, onsets = rng.integers(40, 90, notes), np.cumsum(rng.uniform(0.08, 0.4, notes))
    if jitter:
        onsets = onsets + np.random.default_rng(jitter).normal(0, 0.03, notes)
    chosen = sorted(zip(onsets.tolist(), pitches.tolist(), strict=True))[part]
    track, last = mido.MidiTrack(), 0
    for onset, pitch in chosen:
        tick = round((onset - chosen[0][0]) * 2 * division)
        for kind, time in (("note_on", tick - last), ("note_off", 1)):
            track.append(mido.Message(kind, note=pitch, velocity=64, time=time))
        last = tick + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    mido.MidiFile(ticks_per_beat=division, tracks=[track]).save(path)
    return path


def row(number: int, split: str = "train", **fields) -> dict:
    return {
        "canonical_composer": "Frédéric Chopin",
        "canonical_title": f"Étude, No. {number}",
        "split": split,
        "year": "2018",
        "midi_filename": f"2018/take_{number}.midi",
        "audio_filename": f"2018/take_{number}.wav",
        "duration": "90.5",
    } | fields


def write_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_maestro(root: Path, rows: list[dict]) -> Path:
    write_table(root / "maestro-v3.0.0.csv", rows)
    for number, entry in enumerate(rows):
        play(root / entry["midi_filename"], number)
    return root


def test_rows_become_recordings(tmp_path):
    root = write_maestro(tmp_path, [row(0), row(1, "validation"), row(2, "test", duration="12")])
    (root / "2018/take_1.midi").unlink()
    write_wav(root / "2018/take_1.wav")
    maestro = read_maestro(root)
    assert [(r.name, r.part, r.duration) for r in maestro.recordings] == [
        ("2018/take_0", "train", 90.5),
        ("2018/take_1", "validation", 90.5),
        ("2018/take_2", "test", 12.0),
    ]
    first, second, _ = maestro.recordings
    assert (first.composer, first.title) == ("Frédéric Chopin", "Étude, No. 0")
    assert (first.midi, second.audio) == (root / "2018/take_0.midi", root / "2018/take_1.wav")
    assert maestro.left_out == []


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"split": "dev"}, "'dev'"),
        ({"midi_filename": "2018/take_0.midi"}, "take_0.midi"),
        ({"midi_filename": "2018/gone.midi", "audio_filename": "2018/gone.wav"}, "gone.midi"),
        ({"midi_filename": "../up.midi"}, "up.midi"),
        ({"duration": "nan"}, "nan"),
    ],
)
def test_a_bad_row_is_left_out_and_told(tmp_path, fields, found, capsys):
    root = write_maestro(tmp_path, [row(0), row(1), row(2)])
    write_table(root / "maestro-v3.0.0.csv", [row(0), row(1) | fields, row(2)])
    with (root / "maestro-v3.0.0.csv").open("a") as file:
        file.write("only,three,fields\n")
    maestro = read_maestro(root)
    assert [r.name for r in maestro.recordings] == ["2018/take_0", "2018/take_2"]
    assert "maestro-v3.0.0.csv: line 3: " in maestro.left_out[0]
    assert found in maestro.left_out[0]
    assert ": line 5: " in maestro.left_out[1]
    refused(lambda: read_maestro(root, strict=True), capsys, "line 3: ")


@pytest.mark.parametrize(
    "content", [None, b"canonical_title,split\na,train\n", b"canonical_composer\n\xff\xfe\n"]
)
def test_tables_that_cannot_be_read_are_refused(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "maestro-v3.0.0.csv").write_bytes(content)
    refused(lambda: read_maestro(tmp_path), capsys, tmp_path)


def test_unknown_splits_train_unless_their_piece_is_held_out(tmp_path, capsys):
    root = write_maestro(tmp_path, [row(0), row(1, "test"), row(2), row(3), row(4)])
    pieces = "Chopin/Scherzo_1 Chopin/Etude_2 Chopin/Etude_2_repeat Chopin/Etude_2 Liszt/Etude_2".split()
    rows = []
    for i, (piece, known) in enumerate(zip(pieces, "01010", strict=True)):
        title = piece.split("/")[1]
        rows.append({"midi_filename": f"2018/take_{i}.midi", "asap_path": f"{piece}/X.mid"})
        rows[-1] |= {"asap_title": title, "split_known": known}
    write_table(root / "asap_sources.csv", rows)
    maestro = read_maestro(root)
    assert [r.part for r in maestro.recordings] == ["train", "test", "unknown", "train", "train"]
    for broken in ("midi_filename", "midi_filename,asap_path,asap_title,split_known"):
        (root / "asap_sources.csv").write_text(f"{broken}\n2018/take_0.midi\n")
        refused(lambda: read_maestro(root), capsys, root / "asap_sources.csv", "line 2")


def make_overlap(tmp_path: Path) -> tuple[Path, Path]:
    """Five recordings: 0 holds two segments of player 1 at another resolution, 1 is the same piece by another
    pianist, 2 something else, 3 damaged, 4 without MIDI."""
    rows = [row(number, canonical_composer="Nobody") for number in range(5)]
    root = write_maestro(tmp_path / "maestro", rows)
    play(root / "2018/take_0.midi", 100, 300, division=384)
    play(root / "2018/take_1.midi", 100, 300, jitter=9)
    (root / "2018/take_3.midi").write_bytes(b"MThd")
    (root / "2018/take_4.midi").unlink()
    write_wav(root / "2018/take_4.wav")
    folder = tmp_path / "percepiano/virtuoso/data/all_2rounds"
    play(folder / "Schubert_D960_mv2_8bars_1_09.mid", 100, 300, part=slice(20, 60))
    play(folder / " Schubert_D960_mv2_8bars_1_10.mid", 100, 300, part=slice(200, 230))
    play(folder / "Schubert_D960_mv2_8bars_2_09.mid", 100, 300, jitter=3, part=slice(20, 120))
    play(folder / "Beethoven_WoO80_thema_8bars_1_1.mid", 500, 40)
    return root, tmp_path / "percepiano"


def test_overlap_is_told_by_the_notes(tmp_path, monkeypatch):
    root, percepiano = make_overlap(tmp_path)
    maestro, names = read_maestro(root), ["Schubert_D960_mv2_8bars_1_09", "Schubert_D960_mv2_8bars_1_10"]
    here = {"cache": tmp_path / "cache", "workers": 1, "quiet": True}
    same, _ = maestro_overlaps(maestro, percepiano, **here)
    assert same == {"2018/take_0": names}
    assert [line.split("/")[-1].split(":")[0] for line in maestro.unchecked] == ["take_4.midi", "take_3.midi"]
    monkeypatch.setattr(data, "_find_overlaps", None)  # from the cache
    same, alike = maestro_overlaps(maestro, percepiano, **here)
    assert sorted(alike | same) == ["2018/take_0", "2018/take_1"]
    assert same["2018/take_0"] == names
    assert len(maestro.unchecked) == 2
    play(root / "2018/take_2.midi", 7, 61)
    with pytest.raises(TypeError):  # a changed file is compared again
        maestro_overlaps(maestro, percepiano, **here)


def test_command_reports_splits_missing_files_and_overlap(tmp_path, capsys):
    root, percepiano = make_overlap(tmp_path)
    folders = ["--data", str(root), "--percepiano", str(percepiano), "--cache", str(tmp_path / "cache")]
    data.main(["maestro", *folders, "--workers", "1"])
    printed = capsys.readouterr().out
    counts = ("train: 5 recordings, 0.13 h", "without MIDI file: 1", "without sound file: 4", "same music: 1")
    for said in (*counts, "performances of PercePiano: 1", "not compared: 2", "2018/take_0 (Nobody"):
        assert said in printed


@needs_shared
def test_the_real_table():
    maestro = read_maestro(REAL, strict=True)
    counts = Counter(r.part for r in maestro.recordings)
    assert counts == {"train": 408, "validation": 36, "test": 50, "unknown": 25}
    assert abs(sum(r.duration for r in maestro.recordings) / 3600 - 44.36) < 0.01


@pytest.mark.slow
@needs_shared
def test_the_real_overlap(tmp_path):
    """As the subset's README lists it: three recordings of D935 no. 3 are PercePiano's players 1, 3, 6; two
    more play the piece."""
    folder = tmp_path / "virtuoso/data/all_2rounds"
    folder.mkdir(parents=True)
    for path in (PERCEPIANO / "virtuoso/data/all_2rounds").glob("*D935*_[136]_*.mid"):
        (folder / path.name).symlink_to(path)
    maestro = read_maestro(REAL)
    maestro.recordings = [r for r in maestro.recordings if "142" in r.title]  # No. 1 and 3
    shared, alike = maestro_overlaps(maestro, tmp_path, cache=tmp_path, quiet=True)
    players = {name[:4]: Counter(data.player_of(s) for s in segments) for name, segments in shared.items()}
    assert players == {"2013": {"1": 13}, "2015": {"3": 13}, "2017": {"6": 13}}
    assert len(alike | shared) == 5
