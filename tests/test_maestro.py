"""MAESTRO's table and folders, splits that are not known, and the performances that PercePiano shares with it."""

import csv
import os
from collections import Counter
from pathlib import Path

import mido
import numpy as np
import pytest
from scipy.io import wavfile

import data
from data import DataError, maestro_overlaps, read_maestro

SHARED = Path(os.environ.get("SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
REAL, PERCEPIANO = SHARED / "maestro_midi", SHARED / "percepiano"
real_files = pytest.mark.skipif(not REAL.is_dir() or not PERCEPIANO.is_dir(), reason="no real files")


def play(
    path: Path,
    seed: int,
    notes: int = 60,
    jitter: int = 0,
    start: int = 0,
    stop: int | None = None,
    division: int = 480,
    velocity: int = 64,
) -> Path:
    """A melody drawn from `seed`; `jitter` draws another performance of it, start:stop cuts notes out, at another resolution."""
    rng = np.random.default_rng(seed)
    pitches, onsets = rng.integers(40, 90, notes), np.cumsum(rng.uniform(0.08, 0.4, notes))
    onsets = onsets + np.random.default_rng(jitter).normal(0, 0.03, notes) * bool(jitter)
    chosen = sorted(zip(onsets.tolist(), pitches.tolist(), strict=True))[start:stop]
    events = [(t - chosen[0][0], "note_on", p) for t, p in chosen] + [
        (t - chosen[0][0] + 0.05, "note_off", p) for t, p in chosen
    ]
    file, track, last = mido.MidiFile(ticks_per_beat=division), mido.MidiTrack(), 0
    for seconds, kind, pitch in sorted(events):
        tick = round(seconds * 2 * division)
        track.append(mido.Message(kind, note=pitch, velocity=velocity, time=tick - last))
        last = tick
    file.tracks.append(track)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save(path)
    return path


def row(number: int, split: str = "train", **fields) -> dict:
    name = f"2018/take_{number}"
    return {
        "canonical_composer": "Frédéric Chopin",
        "canonical_title": f"Étude, No. {number}",
        "split": split,
        "year": "2018",
        "midi_filename": f"{name}.midi",
        "audio_filename": f"{name}.wav",
        "duration": "90.5",
    } | fields


def write_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_maestro(root: Path, rows: list[dict], midi: bool = True) -> Path:
    write_table(root / "maestro-v3.0.0.csv", rows)
    for number, entry in enumerate(rows):
        if midi:
            play(root / entry["midi_filename"], number)
    return root


def write_wav(path: Path, seconds: float = 0.2) -> None:
    wavfile.write(
        path, 16000, (np.random.default_rng(0).standard_normal(int(16000 * seconds)) * 3000).astype(np.int16)
    )


# ------------------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------------------
def test_rows_become_recordings(tmp_path):
    root = write_maestro(tmp_path, [row(0), row(1, "validation"), row(2, "test", year="2004", duration="12")])
    write_wav(root / "2018/take_1.wav")
    maestro = read_maestro(root)
    assert [(r.name, r.split, r.part, r.year, r.duration) for r in maestro.recordings] == [
        ("2018/take_0", "train", "train", 2018, 90.5),
        ("2018/take_1", "validation", "validation", 2018, 90.5),
        ("2018/take_2", "test", "test", 2004, 12.0),
    ]
    assert (maestro.recordings[0].composer, maestro.recordings[0].title) == (
        "Frédéric Chopin",
        "Étude, No. 0",
    )
    assert maestro.recordings[1].midi == root / "2018/take_1.midi"
    assert maestro.recordings[1].audio == root / "2018/take_1.wav"
    assert maestro.no_audio == ["2018/take_0", "2018/take_2"]
    assert (maestro.no_midi, maestro.left_out, maestro.rows) == ([], [], 3)


BAD_ROWS = [
    ({"split": "dev"}, "split 'dev'; expected train, validation, test"),
    ({"midi_filename": "2018/take_0.midi"}, "2018/take_0.midi stands in an earlier line too"),
    ({"audio_filename": "2018/take_0.wav"}, "2018/take_0.wav stands in an earlier line too"),
    (
        {"midi_filename": "2018/gone.midi", "audio_filename": "2018/gone.wav"},
        "neither 2018/gone.midi nor 2018/gone.wav is here",
    ),
    ({"duration": "long"}, "duration 'long'"),
    ({"duration": "nan"}, "duration 'nan'"),
    ({"year": ""}, "year ''"),
    ({"midi_filename": "../up.midi"}, "inside the folder"),
    ({"midi_filename": ""}, "midi_filename ''"),
    ({"audio_filename": "2018/take_1.mp3"}, "audio_filename '2018/take_1.mp3'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_ROWS)
def test_a_bad_row_is_left_out_and_told(tmp_path, fields, message):
    root = write_maestro(tmp_path, [row(0), row(1), row(2)])
    write_table(root / "maestro-v3.0.0.csv", [row(0), row(1) | fields, row(2)])
    maestro = read_maestro(root)
    assert [r.name for r in maestro.recordings] == ["2018/take_0", "2018/take_2"]
    assert len(maestro.left_out) == 1
    assert "maestro-v3.0.0.csv: line 3: " in maestro.left_out[0]
    assert message in maestro.left_out[0]
    with pytest.raises(DataError, match="line 3: "):
        read_maestro(root, strict=True)


def test_a_row_of_too_few_fields_is_left_out(tmp_path):
    root = write_maestro(tmp_path, [row(0), row(1)])
    table = root / "maestro-v3.0.0.csv"
    table.write_text(
        table.read_text(encoding="utf-8") + "only,three,fields\n" + ",".join("abcdefgh") + "\n",
        encoding="utf-8",
    )
    assert [line.split(": ")[1:3] for line in read_maestro(root).left_out] == [
        [
            f"line {n}",
            "another number of fields than the first line; expected one "
            "for each column; quote fields that hold commas",
        ]
        for n in (4, 5)
    ]


def test_tables_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no maestro-v\*.csv; expected the table"):
        read_maestro(tmp_path)
    table = tmp_path / "maestro-v3.0.0.csv"
    write_table(table, [{"canonical_title": "a", "split": "train"}])
    with pytest.raises(
        DataError, match="no column canonical_composer, year, midi_filename, audio_filename, duration"
    ):
        read_maestro(tmp_path)
    table.write_bytes(b"canonical_composer\n\xff\xfe\n")
    with pytest.raises(DataError, match="maestro-v3.0.0.csv: .*UTF-8"):
        read_maestro(tmp_path)
    table.write_bytes(b"")
    with pytest.raises(DataError, match="no column"):
        read_maestro(tmp_path)
    table.write_text(",".join(data.MAESTRO_COLUMNS) + "\n")
    with pytest.raises(DataError, match="no rows"):
        read_maestro(tmp_path)
    write_table(table, [row(0)])
    with pytest.raises(DataError, match="line 2: neither"):
        read_maestro(tmp_path)
    (tmp_path / "maestro-v2.0.0.csv").touch()
    with pytest.raises(DataError, match="more than one maestro-v"):
        read_maestro(tmp_path)


def test_an_audio_only_recording_stays_and_is_told(tmp_path):
    root = write_maestro(tmp_path, [row(0), row(1)])
    (root / "2018/take_1.midi").unlink()
    write_wav(root / "2018/take_1.wav")
    maestro = read_maestro(root)
    assert len(maestro.recordings) == 2
    assert maestro.no_midi == ["2018/take_1"]


def test_unknown_splits_train_unless_their_piece_is_held_out(tmp_path):
    root = write_maestro(tmp_path, [row(0), row(1, "test"), row(2), row(3), row(4), row(5)])
    sources = [
        ("Chopin", "Scherzo_1", "1"),
        ("Chopin", "Etude_2", "1"),
        ("Chopin", "Etude_2_repeat", "0"),
        ("Chopin", "Etude_2", "1"),
        ("Liszt", "Etude_2", "0"),
        ("Chopin", "Scherzo_1", "0"),
    ]
    write_table(
        root / "asap_sources.csv",
        [
            {
                "midi_filename": f"2018/take_{i}.midi",
                "asap_path": f"{composer}/{title}/X.mid",
                "asap_title": title,
                "split_known": known,
            }
            for i, (composer, title, known) in enumerate(sources)
        ],
    )
    maestro = read_maestro(root)
    assert [r.part for r in maestro.recordings] == ["train", "test", "unknown", "train", "train", "train"]
    assert [r.split for r in maestro.recordings] == ["train", "test", "train", "train", "train", "train"]


# ------------------------------------------------------------------------------------------------------------
# Energies and report
# ------------------------------------------------------------------------------------------------------------
def test_stored_energies_carry_names_and_splits(tmp_path):
    root = write_maestro(tmp_path / "maestro", [row(0), row(1, "validation"), row(2)])
    with pytest.raises(
        DataError,
        match=f"no WAV file; expected recordings; render it with `python data.py render --midi-root {root}`",
    ):
        data.build_fbank(root, tmp_path / "out", workers=1, quiet=True)
    for number in (0, 1):
        write_wav(root / f"2018/take_{number}.wav")
    store = data.build_fbank(root, tmp_path / "out", workers=1, quiet=True)
    apart = read_maestro(root, audio=tmp_path / "elsewhere")
    assert (len(apart.no_audio), apart.recordings[0].audio) == (3, tmp_path / "elsewhere/2018/take_0.wav")
    assert (store.names, store.split, store.frames.tolist()) == (
        ["2018/take_0", "2018/take_1"],
        ["train", "validation"],
        [18, 18],
    )
    assert len(store.left_out) == 1
    assert "take_2.wav: missing; render it with `python data.py render --midi-root" in store.left_out[0]
    with pytest.raises(DataError, match="take_2.wav: missing"):
        data.build_fbank(root, tmp_path / "out", workers=1, strict=True, quiet=True)


def make_overlap(tmp_path: Path) -> tuple[Path, Path]:
    """Five recordings: 0 holds two segments of player 1 at another resolution and loudness, 1 is the same piece by another
    pianist, 2 something else, 3 damaged, 4 without MIDI."""
    root = write_maestro(
        tmp_path / "maestro", [row(number, canonical_composer="Nobody") for number in range(5)]
    )
    play(root / "2018/take_0.midi", 100, 300, division=384, velocity=90)
    play(root / "2018/take_1.midi", 100, 300, jitter=9)
    (root / "2018/take_3.midi").write_bytes(b"MThd")
    (root / "2018/take_4.midi").unlink()
    write_wav(root / "2018/take_4.wav")
    folder = tmp_path / "percepiano/virtuoso/data/all_2rounds"
    play(folder / "Schubert_D960_mv2_8bars_1_09.mid", 100, 300, start=20, stop=60)
    play(folder / " Schubert_D960_mv2_8bars_1_10.mid", 100, 300, start=200, stop=230)
    play(folder / "Schubert_D960_mv2_8bars_2_09.mid", 100, 300, jitter=3, start=20, stop=120)
    play(folder / "Beethoven_WoO80_thema_8bars_1_1.mid", 500, 40)
    return root, tmp_path / "percepiano"


def test_overlap_is_told_by_the_notes(tmp_path, monkeypatch):
    root, percepiano = make_overlap(tmp_path)
    maestro, names = read_maestro(root), ["Schubert_D960_mv2_8bars_1_09", "Schubert_D960_mv2_8bars_1_10"]
    assert maestro_overlaps(maestro, percepiano, cache=tmp_path / "cache", workers=1, quiet=True) == {
        "2018/take_0": names
    }
    assert [line.split("/")[-1].split(":")[0] for line in maestro.unchecked] == ["take_4.midi", "take_3.midi"]
    monkeypatch.setattr(data, "_find_overlaps", None)  # from the cache
    shared = maestro_overlaps(maestro, percepiano, pieces=True, cache=tmp_path / "cache", quiet=True)
    assert sorted(shared) == ["2018/take_0", "2018/take_1"]
    assert shared["2018/take_0"] == names
    assert len(maestro.unchecked) == 2
    play(root / "2018/take_2.midi", 7, 61)
    with pytest.raises(TypeError):  # a changed file is compared again
        maestro_overlaps(maestro, percepiano, cache=tmp_path / "cache", quiet=True)


def test_command_reports_splits_missing_files_and_overlap(tmp_path, capsys):
    root, percepiano = make_overlap(tmp_path)
    data.main(
        [
            "maestro",
            "--data",
            str(root),
            "--percepiano",
            str(percepiano),
            "--cache",
            str(tmp_path / "cache"),
            "--workers",
            "1",
        ]
    )
    printed = capsys.readouterr().out
    for line in (
        f"{root}: 5 recordings of 5 rows, 0.13 h",
        "split train: 5 recordings, 0.13 h",
        "split test: 0 recordings",
        "without MIDI file: 1",
        "left out: 0",
        f"without WAV file: 4; render it with `python data.py render --midi-root {root}`",
        "performances of PercePiano: 1",
        "same music: 1",
        "2018/take_0 (Nobody, Étude, No. 0; train)\n    Schubert_D960_mv2 player 1: segments 09, 10",
        "not compared: 2",
    ):
        assert line in printed


# ------------------------------------------------------------------------------------------------------------
# The real files
# ------------------------------------------------------------------------------------------------------------
@real_files
def test_the_real_table():
    maestro = read_maestro(REAL, strict=True)
    assert Counter(r.split for r in maestro.recordings) == {"train": 433, "validation": 36, "test": 50}
    assert Counter(r.part for r in maestro.recordings) == {
        "train": 408,
        "validation": 36,
        "test": 50,
        "unknown": 25,
    }
    assert abs(sum(r.duration for r in maestro.recordings) / 3600 - 44.36) < 0.01
    assert len(maestro.no_audio) == maestro.rows == 519


@pytest.mark.slow
@real_files
def test_the_real_overlap(tmp_path):
    """As the subset's README lists it: three recordings of D935 no. 3 are PercePiano's players 1, 3 and 6, two more play the piece."""
    folder = tmp_path / "virtuoso/data/all_2rounds"
    folder.mkdir(parents=True)
    for path in (PERCEPIANO / "virtuoso/data/all_2rounds").glob("*D935*_[136]_*.mid"):
        (folder / path.name).symlink_to(path)
    maestro = read_maestro(REAL)
    maestro.recordings = [r for r in maestro.recordings if "142" in r.title]  # No. 1 and 3
    assert len(maestro.recordings) == 8
    shared = maestro_overlaps(maestro, tmp_path, cache=tmp_path, quiet=True)
    players = {name: Counter(data.player_of(s) for s in segments) for name, segments in shared.items()}
    assert {name[:12]: counts for name, counts in players.items()} == {
        "2013/ORIG-MI": {"1": 13},
        "2015/MIDI-Un": {"3": 13},
        "2017/MIDI-Un": {"6": 13},
    }
    assert all(len(segments) == 13 for segments in shared.values())
    both = maestro_overlaps(maestro, tmp_path, pieces=True, cache=tmp_path, quiet=True)
    assert all("142 No. 3" in r.title or "op142 3" in r.title for r in maestro.recordings if r.name in both)
