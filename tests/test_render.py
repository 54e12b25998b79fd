"""The built-in piano by its physics, and the command that writes WAV files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import performance, refused
from scipy.io import wavfile

import data
from data import Performance, render, transform_performance

SOUNDFONTS = sorted(Path("/usr/share/sounds/sf2").glob("*.sf2"), key=lambda p: p.stat().st_size)
RATE = 16000


@pytest.fixture(autouse=True)
def still_room(monkeypatch):
    monkeypatch.setattr(data, "NOISE_FLOOR", -1e6)


def play(*notes, sustain=(), soft=()) -> Performance:
    """Notes are (onset, offset, pitch, velocity); pedals (second, value)."""
    onset, offset, pitch, velocity = np.array(sorted(notes), float).reshape(-1, 4).T
    return performance(pitch.astype(np.int64), velocity.astype(np.int64), onset, offset, sustain, soft)


def level(waveform, start, end) -> float:
    """dB of full scale between two times, silence after the end."""
    first, last = int(start * RATE), int(end * RATE)
    return 10 * np.log10((waveform[first:last].astype(float) ** 2).sum() / (last - first) + 1e-14)


def spectrum(waveform, seconds=0.5, rate=RATE):
    part = waveform[: int(seconds * rate)].astype(float)
    return np.abs(np.fft.rfft(part * np.hanning(len(part))))


def centroid(waveform) -> float:
    power = spectrum(waveform) ** 2
    return float((power * np.linspace(0, RATE / 2, len(power))).sum() / power.sum())


def test_onsets_are_sample_exact_and_rise_within_a_millisecond():
    for key in range(21, 109, 6):
        sound = render(play((0.123456, 0.6, key, 64)))
        strike = round(0.123456 * RATE)
        assert not sound[:strike].any()
        assert sound[strike] != 0
        assert 0 <= np.argmax(np.abs(sound) > 0.01 * np.abs(sound).max()) - strike <= RATE // 1000


def test_louder_is_louder_and_brighter_at_every_step():
    for key in (28, 45, 60, 76, 92):
        sounds = [render(play((0, 2, key, velocity))) for velocity in (1, 10, 30, 50, 64, 80, 105, 127)]
        assert np.all(np.diff([level(s, 0, 0.5) for s in sounds]) > 1.5), key
        assert np.all(np.diff([centroid(s) for s in sounds]) > 0), key
        assert level(sounds[6], 0, 0.5) - level(sounds[2], 0, 0.5) > 20, key  # ff over pp


def test_low_notes_last_longer_and_decay_in_two_stages():
    last = []
    for key in (24, 48, 72, 96):
        sound = render(play((0, 19, key, 70)))
        frames = sound[: len(sound) // 800 * 800].reshape(-1, 800)
        power = 10 * np.log10((frames.astype(float) ** 2).mean(1) + 1e-14)
        last.append(np.flatnonzero(power > power.max() - 40)[-1] * 0.05)
    assert np.all(np.diff(last) < -0.3), last
    assert last[0] > 4
    assert last[-1] < 1.5
    sound = render(play((0, 19, 57, 80)))
    early = level(sound, 0, 0.2) - level(sound, 1.0, 1.2)
    assert early > 1.5 * (level(sound, 4, 4.2) - level(sound, 5, 5.2)) > 3


def test_sustain_pedal_lengthens_and_half_pedal_lies_between():
    left = {}
    for value in (0, 30, 50, 64, 127):
        left[value] = level(render(play((0, 0.3, 60, 80), sustain=[(0, value), (2, 0)])), 0.8, 1.0)
    assert left[127] == left[64] > left[50] + 3 > left[30] + 6
    assert left[127] - left[0] > 60
    falls = render(play((0, 0.3, 60, 80), sustain=[(0, 127), (1, 0)]))
    assert level(falls, 0.9, 1.0) - level(falls, 1.2, 1.3) > 40
    assert np.array_equal(falls[:RATE], render(play((0, 1.0, 60, 80)))[:RATE])
    damped, free = (render(play((0, 0.1, key, 90))) for key in (data.UNDAMPED - 1, data.UNDAMPED))
    assert level(damped, 0.4, 0.5) < level(free, 0.4, 0.5) - 30


def test_soft_pedal_softens_and_darkens():
    loud, half, soft = (render(play((0, 1, 60, 80), soft=[(0, value)])) for value in (0, 64, 127))
    assert level(loud, 0, 0.5) > level(half, 0, 0.5) + 1 > level(soft, 0, 0.5) + 2
    assert centroid(loud) > centroid(half) > centroid(soft)
    assert np.array_equal(render(play((0, 1, 60, 80), soft=[(0, 127), (0, 0)])), loud)


def test_notes_add_up_without_normalisation():
    notes = (0, 0.8, 40, 50), (0.1, 0.9, 64, 60), (0.35, 0.6, 88, 40), (0.35, 1.2, 52, 55)
    together = render(play(*notes))
    alone = [render(play(note)) for note in notes]
    total = np.zeros(max(map(len, alone)))
    for sound in alone:
        total[: len(sound)] += sound
    assert np.abs(together).max() < data.KNEE
    np.testing.assert_allclose(together, total, atol=1e-6)


def test_a_cluster_does_not_clip():
    sound = render(play(*((0.1, 3, key, 127) for key in range(36, 46)), sustain=[(0, 127)]))
    assert data.KNEE < np.abs(sound).max() < 0.999


def test_partials_are_where_stiff_strings_put_them():
    for key in (33, 69, 93):
        found = spectrum(render(play((0, 4, key, 100))), 3)
        bins = np.linspace(0, RATE / 2, len(found))
        stiffness = np.exp(0.0926 * key - 13.64) + np.exp(-0.0847 * key - 5.82)
        for n in range(1, 6):
            expected = 440 * 2 ** ((key - 69) / 12) * n * np.sqrt((1 + stiffness * n**2) / (1 + stiffness))
            near = np.abs(bins - expected) < 0.02 * expected
            if expected < 0.45 * RATE:
                assert abs(bins[near][found[near].argmax()] - expected) < 2, (key, n)


def test_noise_between_notes_and_level_of_soundfonts(monkeypatch):
    monkeypatch.undo()
    sound = render(play((0.5, 1, 60, 64), (3, 3.5, 60, 64)))
    assert level(sound, 0, 0.4) == pytest.approx(-75, abs=0.3)
    assert level(sound, 2, 2.9) == pytest.approx(-75, abs=0.3)
    assert -38 < level(sound, 0.5, 0.6) < -30


def test_edges(capsys):
    assert render(play()).shape == render(play((0, 1, 60, 0))).shape == (0,)
    with_silent = render(play((0, 1, 60, 64), (0.5, 1, 60, 0)))
    assert with_silent.dtype == np.float32
    assert np.array_equal(with_silent, render(play((0, 1, 60, 64))))
    for key in (0, 127):  # no piano has them; a file may
        assert 0 < np.abs(render(play((0, 1, key, 127)))).max() < 1
    assert len(render(play((0, 1, 60, 64)), 44100)) > 44100
    for bad in ((-1, 1, 60, 64), (0, 1, 128, 64)):
        refused(lambda bad=bad: render(play(bad)), capsys, "take.mid: notes")


def test_transformed_performances():
    piece = play((0.4, 1, 60, 64), (1, 2, 64, 70), sustain=[(0.5, 127), (3, 0)], soft=[(1, 30)])
    fast = transform_performance(piece, tempo=1.25, semitones=2)
    np.testing.assert_allclose(fast.onset, piece.onset / 1.25)
    np.testing.assert_allclose(fast.offset, piece.offset / 1.25)
    np.testing.assert_allclose(fast.sustain, [[0.4, 127], [2.4, 0]])
    np.testing.assert_allclose(fast.soft, [[0.8, 30]])
    assert (fast.pitch.tolist(), fast.velocity.tolist()) == ([62, 66], [64, 70])
    for keys, semitones, expected in ((22, 60), -5, [21, 59]), ((15, 120), 3, [15, 120]):  # to the last key
        moved = transform_performance(play(*((0, 1, key, 64) for key in keys)), semitones=semitones)
        assert moved.pitch.tolist() == expected


def write_midi(path, notes=((0, 0.4, 60, 70), (0.5, 0.9, 64, 50))):
    path.parent.mkdir(parents=True, exist_ok=True)
    data._save_midi(path, list(notes), [(0.1, 64, 127), (0.7, 64, 0)])
    return path


def run(*arguments, capsys):
    data.main(["render", "--workers", "1", "--midi-root", *map(str, arguments)])
    return capsys.readouterr().out


def test_writes_what_is_missing_and_keeps_the_rest(tmp_path, capsys):
    paths = [write_midi(tmp_path / "2004/a.b.midi"), write_midi(tmp_path / "2006/deep/c.mid")]
    (tmp_path / "2006/._c.mid").write_bytes(b"not MIDI, but hidden")
    assert "rendered 2 files" in run(tmp_path, capsys=capsys)
    wavs = [path.with_suffix(".wav") for path in paths]
    rate, samples = wavfile.read(wavs[0])
    assert (rate, samples.dtype, samples.ndim) == (16000, np.int16, 1)
    assert np.array_equal(samples, np.rint(render(data.read_midi(paths[0])) * 32767))
    assert sorted(tmp_path.rglob("*.wav*")) == sorted(wavs)
    kept = wavs[1].stat().st_mtime_ns
    wavs[0].unlink()
    report = data.render_folder(tmp_path, workers=1, quiet=True)
    assert (report["rendered"], report["present"], report["failed"]) == (1, 1, [])
    assert wavs[1].stat().st_mtime_ns == kept
    out = tmp_path / "out"
    assert "rendered 1 files" in run(tmp_path / "2004", "--out", out, capsys=capsys)
    assert (out / "a.b.wav").read_bytes() == wavs[0].read_bytes()


def test_reports_failures_and_goes_on(tmp_path, capsys):
    (tmp_path / "bad.midi").write_bytes(b"MThd")
    refused(lambda: data.render_folder(tmp_path, workers=1, quiet=True), capsys, "bad.midi")
    write_midi(tmp_path / "good.midi")
    write_midi(tmp_path / "good.mid")
    out = run(tmp_path, capsys=capsys)
    for said in ("rendered 1 files", "failed: 2\n", "bad.midi: ", "good.midi: good.wav "):
        assert said in out
    refused(lambda: run(tmp_path, "--strict", capsys=capsys), capsys, "bad.midi")


def test_a_soundfont_needs_the_program_and_a_file(tmp_path, monkeypatch, capsys):
    write_midi(tmp_path / "a.midi")
    for program in (None, "/bin/false"):
        monkeypatch.setattr(shutil, "which", lambda name, program=program: program)
        missing = lambda: data.render_folder(tmp_path, soundfont=tmp_path / "x.sf2")  # noqa: E731
        refused(missing, capsys, "x.sf2: ", "`fluidsynth`")
    (tmp_path / "y").mkdir()
    fonts = [tmp_path / "x.sf2", tmp_path / "y" / "x.sf3"]
    for font in fonts:
        font.touch()
    both = lambda: data.render_all(tmp_path, tmp_path / "out", fonts)  # noqa: E731
    refused(both, capsys, "x.sf2: another")  # their folders would be one
    assert not list(tmp_path.rglob("*.wav"))


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("fluidsynth") and SOUNDFONTS), reason="fluidsynth or a soundfont is not installed"
)
def test_fluidsynth_plays_what_the_piano_plays(tmp_path, capsys):
    midi = write_midi(tmp_path / "a.midi", [(0.5, 1.5, 60, 80), (2.0, 2.2, 69, 30)])
    report = data.render_folder(tmp_path, soundfont=SOUNDFONTS[0], workers=1, quiet=True)
    assert report["rendered"] == 1
    rate, sound = wavfile.read(tmp_path / "a.wav")
    assert (rate, sound.dtype, sound.ndim) == (16000, np.int16, 1)
    sound = sound / 32768
    assert level(sound, 0.1, 0.45) < -80 < -45 < level(sound, 0.6, 1.0) < -10
    assert abs(np.argmax(np.abs(sound) > 0.02 * np.abs(sound).max()) / RATE - 0.5) < 0.02
    (tmp_path / "none.mid").write_bytes(b"MThd")
    refused(lambda: data._fluidsynth(tmp_path / "none.mid", SOUNDFONTS[0]), capsys, "none.mid")
    (tmp_path / "empty.sf2").write_bytes(b"RIFF\x04\x00\x00\x00sfbk")
    refused(lambda: data._fluidsynth(midi, tmp_path / "empty.sf2"), capsys, "a.midi: ", "empty.sf2")
