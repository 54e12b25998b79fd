"""Log-mel energies against Kaldi's numbers, sound files of all kinds, energies on disk."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import oracle_tensors, performance, refused
from scipy.io import wavfile

import data
from data import fbank, fbank_frames

SECONDS = (0.5, 1.2, 0.8, 2.0, 1.5)


def noise(samples: int, seed: int = 0, rows: tuple = ()) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((*rows, samples)) * 0.1).astype(np.float32)


def write_wav(path: Path, samples: int = 8000, seed: int = 0, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, np.rint(noise(samples, seed) * 32767).astype(np.int16))
    return path


def write_folder(root: Path, seconds=SECONDS) -> Path:
    for i, length in enumerate(seconds):
        write_wav(root / f"{i}" / f"take {i}.wav", int(16000 * length), i)
    return root


@pytest.mark.parametrize("name", ["noise", "chord", "quiet"])
def test_agrees_with_kaldi(name):
    oracle = oracle_tensors("fbank.npz")
    samples, expected = oracle[f"wav/{name}"], oracle[f"fbank/{name}"]
    found = fbank(samples.float() / 32768)
    difference = (found - expected).abs()
    assert difference.max() < 1.5e-3  # Kaldi's own float32 is 1.1e-3 from float64 here
    assert difference[expected > -10].max() < 3e-4
    assert torch.equal(found, fbank(samples))  # int16


def test_a_row_depends_neither_on_its_batch_nor_on_autocast():
    x = torch.from_numpy(noise(16000 * 6, rows=(3,)))
    batch = fbank(x)
    assert (batch.shape, batch.dtype) == ((3, 598, 128), torch.float32)
    for row, alone in zip(batch, x, strict=True):
        assert torch.equal(row, fbank(alone))
    assert torch.equal(fbank(x.repeat(100, 1)[:, :8000])[1], fbank(x[1, :8000]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fbank(x[0].double()), batch[0])


@pytest.mark.parametrize(
    ("samples", "frames"), [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (163840, 1022)]
)
def test_frames_of_every_length_and_silence_is_the_floor(samples, frames):
    assert fbank_frames(samples) == frames
    assert fbank_frames(np.array([samples])).tolist() == [frames]
    silent = fbank(torch.zeros(2, samples))
    assert torch.equal(silent, torch.full((2, frames, 128), data.SILENCE))
    assert data.normalise_fbank(data.SILENCE) == pytest.approx((-15.942385 + 4.2677) / 9.138, abs=1e-6)


@pytest.mark.parametrize(
    ("waveform", "found"),
    [
        (torch.tensor([0.1] * 500 + [float("nan")]), "nan"),
        (torch.full((800,), 20000.0), "20000"),
        (torch.zeros(800, dtype=torch.int64), "torch.int64"),
        (torch.zeros(1, 2, 800), "(1, 2, 800)"),
    ],
)
def test_refuses_what_is_no_waveform(waveform, found, capsys):
    refused(lambda: fbank(waveform), capsys, found)


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    x = torch.from_numpy(noise(163840, rows=(4,)))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = fbank(x.cuda())
    assert (found.cpu() - fbank(x)).abs().max() < 1e-3
    assert (found[2] - fbank(x[2].cuda())).abs().max() < 1e-4


def test_stored_energies_name_their_version():
    """Where this fails and the new values are right: count FBANK_FORMAT up; nobody trains on old energies."""
    pedal = [(0.2, 100), (1.1, 0)]
    played = performance([60, 40, 72], [64, 100, 30], [0.1, 0.3, 0.8], [0.9, 0.5, 1.2], pedal)
    x = data.heard_energies(data.render(played), "x").numpy()
    assert data.FBANK_FORMAT == 3
    assert x.shape == (156, 128)
    assert [x.mean(), x[:100].mean(), x[:, 20].std()] == pytest.approx([-8.108, -7.076, 3.836], abs=0.01)


@pytest.mark.parametrize(
    ("name", "subtype", "step"),
    [
        ("a.wav", "PCM_U8", 2**-7),
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "PCM_32", 2**-23),
        ("a.wav", "FLOAT", 1e-7),
        ("a.flac", "PCM_16", 2**-15),
        ("a.ogg", "VORBIS", 0.1),
        ("a.mp3", "MPEG_LAYER_III", 0.2),
    ],
)
def test_every_kind_of_file(tmp_path, name, subtype, step):
    x = np.convolve(np.clip(noise(8000) * 3, -0.99, 0.99), np.ones(8) / 8, "same")
    soundfile.write(tmp_path / name, x, 16000, subtype)
    found = data.read_sound(tmp_path / name)[0]
    assert found.dtype == np.float32
    assert np.abs(found[:8000] - x).max() <= step


NOTE = b"bext" + (5000).to_bytes(4, "little") + b"the data".ljust(5000, b"\0")  # of a field recorder


@pytest.mark.parametrize("size", [b"\xff" * 4, bytes(4)])
@pytest.mark.parametrize("before", [b"", NOTE])
def test_a_stream_of_unknown_length_is_read_to_its_end(tmp_path, size, before):
    path = write_wav(tmp_path / "a.wav")
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + size + whole[8:36] + before + b"data" + size + whole[44:])
    assert len(data.read_sound(path)[0]) == 8000


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """In its place a program that hands through what follows 9 bytes; a function that takes it away."""
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nwhile [ "$1" != -i ]; do shift; done\ntail -c +10 "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    data._decode.cache_clear()
    yield lambda: monkeypatch.setenv("PATH", "/nowhere")
    data._decode.cache_clear()


@pytest.mark.parametrize("name", ["a.m4a", "renamed.wav", "a.raw", "caf\udce9.wma"])
def test_what_soundfile_cannot_open_is_decoded_by_ffmpeg_or_named(tmp_path, ffmpeg, name, capsys):
    path = tmp_path / name
    path.write_bytes(b"not sound" + write_wav(tmp_path / "x" / "a.wav").read_bytes())
    assert len(data.read_sound(path)[0]) == len(data.read_wav_crop(path, 0, 8000)) == 8000
    ffmpeg()
    refused(lambda: data.read_sound(path), capsys, data.printable(path), "ffmpeg")


def test_an_mp3_that_does_not_say_how_long_it_is(tmp_path, ffmpeg, capsys):
    path = tmp_path / "a.mp3"
    soundfile.write(path, noise(32000), 16000)
    tagged = path.read_bytes()
    assert data._has_length(path)
    path.write_bytes(b"ID3\3\0\0\0\0\2\0" + bytes(256) + tagged)
    assert data._has_length(path)
    bare = tagged.replace(b"Xing", b"None").replace(b"Info", b"None")
    path.write_bytes(b"ID3\3\0\0\0\0\2\0COMM" + b"More Information here".ljust(252, b"\0") + bare)
    assert not data._has_length(path)
    path.write_bytes(bare)
    refused(lambda: data.read_sound(path), capsys, "a.mp3")  # to ffmpeg, here of no help
    ffmpeg()
    found, remarks = data.read_sound(path)
    assert len(found) > 8000
    assert [remark for remark in remarks if "ffmpeg" in remark]


@pytest.mark.parametrize(
    ("name", "share"),  # of an Ogg file also what ends inside its last page
    [("a.wav", 0.49), ("a.aiff", 0.49), ("a.w64", 0.49), ("a.au", 0.49), ("a.flac", 0.4), ("a.mp3", 0.4)]
    + [("a.ogg", 0.41), ("last page.ogg", 0.9), ("a.opus", 0.38)],
)
def test_a_file_that_was_cut_short_is_read_as_far_as_it_goes_and_that_is_said(tmp_path, capfd, name, share):
    path = tmp_path / name
    opus = {"format": "OGG", "subtype": "OPUS"} if path.suffix == ".opus" else {}
    soundfile.write(path, noise(160000), 16000, **opus)
    assert [r for r in data.read_sound(path)[1] if "cut short" in r] == []
    kept = 0.9995 if name == "last page.ogg" else 0.5
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    found, remarks = data.read_sound(path)
    assert 160000 * share <= len(found) <= 160000 * kept
    assert len([r for r in remarks if "cut short" in r]) == 1
    data.main(["fbank", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert f"read with remarks: 1\n  {path}: cut short" in capfd.readouterr().out
    if share == 0.4:  # its header tells of more than is there
        assert data.open_audio(write_folder(tmp_path / "whole")).left_out == []
        refused(lambda: data.open_audio(tmp_path, strict=True), capfd, name)
    assert capfd.readouterr().err == ""  # of mpg123


def test_sounds_under_a_name_in_latin_1(tmp_path):
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write_wav(root / "a.wav").rename(root / f"{root.name}.wav")
    write_wav(root / "b.wav")
    store = data.build_fbank(root, tmp_path / "out", workers=1, quiet=True, copies=1)
    assert store.frames.tolist() == [48] * 4
    assert sorted(map(len, data.pretrain_parts(store).values())) == [1, 1]


def test_what_is_wrong_with_a_sound_is_said(tmp_path):
    tone = 0.3 * np.sin(np.arange(16000) * 0.3) * np.exp(-(np.arange(16000) % 8000) / 1000)
    hiss = noise(16000)
    for name, channels, said in (
        ("clean", [tone + 1e-4 * hiss], []),
        ("out of phase", [tone, -0.9 * tone], ["channels"]),
        ("one of six", [tone, *[0 * tone] * 5], ["channels"]),
        ("clipped", [np.clip(9 * tone, -1, 1)], ["clipped"]),
        ("offset", [tone + 0.1], ["offset"]),
        ("half silent", [tone * (np.arange(16000) < 8000)], ["silence"]),
        ("noisy", [tone + hiss], ["noise"]),
    ):
        soundfile.write(tmp_path / "a.wav", np.stack(channels, 1), 16000, "FLOAT")
        found, remarks = data.read_sound(tmp_path / "a.wav")
        assert np.allclose(found, channels[0], atol=1e-6), name
        remarks += data.sound_remarks(found)
        assert len(remarks) == len(said), (name, remarks)
        assert all(word in remark for word, remark in zip(said, remarks, strict=True)), remarks


@pytest.mark.parametrize(("name", "level"), [("a.wav", 1), ("a.flac", 0.7), ("a.mp3", 1)])
def test_clipping_is_counted_before_resampling(tmp_path, name, level):
    loud = np.clip(np.stack([noise(88200) * 12, noise(88200, 1)], 1), -1, 1)
    soundfile.write(tmp_path / name, loud * level, 44100)
    (said,) = (r for r in data.read_sound(tmp_path / name)[1] if "clipped" in r)
    share = np.mean(np.abs(loud) >= 0.999)
    ways_off = 0.15 if name == "a.mp3" else 5e-5  # its waves swing over and under full scale
    assert float(said.partition("%")[0]) / 100 == pytest.approx(share, abs=ways_off)


def test_copies_sound_as_recorded_elsewhere():
    still = data.change_waveform(np.zeros(16000, np.float32), np.random.default_rng(1), recorded=True)
    assert 20 * np.log10(still.std()) == pytest.approx(-50, abs=0.2)
    wave = np.zeros(16000, np.float32)
    wave[0] = 0.5
    heard = data.change_waveform(wave, np.random.default_rng(1), recorded=True) - still
    expected = 0.5 * 10 ** (-6 / 20) * data.room_response(data.ROOMS)
    assert heard[: len(expected)] == pytest.approx(expected, abs=1e-6)
    for number in range(data.ROOMS + 1):
        room = data.room_response(number)
        assert (room**2).sum() == pytest.approx(1, abs=1e-4)
        halves = np.array_split(room[800:] ** 2, 4)
        assert np.all(np.diff([half.sum() for half in halves]) < 0), number
    copies = [data.change_waveform(wave, np.random.default_rng(k)) for k in (3, 3, 4)]
    assert np.array_equal(copies[0], copies[1])
    assert not np.array_equal(copies[0], copies[2])


def test_the_front_end_hides_digital_silence_and_level():
    x = torch.from_numpy(noise(16000)) * torch.linspace(1, 0, 16000).clip(1e-6)
    quiet = torch.nn.functional.pad(x / 4, (3200, 4800))
    loud, soft = data.front_end(fbank(x)), data.front_end(fbank(quiet))
    assert abs(len(loud) - len(soft)) <= 4
    assert float(loud.min()) > float(fbank(x).amax(1).quantile(0.95)) - 10.4
    assert float((loud.mean() - soft.mean() - 2 * math.log(4)).abs()) < 0.1
    assert len(data.front_end(fbank(quiet), ends=True)) == fbank_frames(24000)


@pytest.mark.parametrize("rate", [16000, 8000, 44100, 11025])
def test_resampling_keeps_a_tone_and_a_crop_is_a_crop_of_the_whole(tmp_path, rate):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(tmp_path / "a.wav", np.stack([tone * 1.5, tone * 0.5], 1), rate, "FLOAT")
    found = data.read_sound(tmp_path / "a.wav")[0]
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(found - expected)[200:-200].max() < 2e-3
    whole = np.rint(found * 32768)
    for start, stop in ((0, 5000), (4321, 9876), (12000, 16000), (7, 8), (100, 100)):
        crop = data.read_wav_crop(tmp_path / "a.wav", start, stop)
        assert len(crop) == stop - start
        assert np.abs(crop - whole[start:stop]).max(initial=0) <= 1


BROKEN = {
    "half a header": lambda path: path.write_bytes(path.read_bytes()[:30]),
    "text": lambda path: path.write_bytes(b"plain text\n" * 60),
    "missing": Path.unlink,
    "nan": lambda path: wavfile.write(path, 16000, np.full(800, np.nan, np.float32)),
    "int16 as float": lambda path: wavfile.write(path, 16000, np.full(800, 2000, np.float32)),
    "1 Hz": lambda path: write_wav(path, rate=1),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_files_are_refused_in_one_line(tmp_path, capsys, broken):
    path = write_wav(tmp_path / "a.wav")
    BROKEN[broken](path)
    refused(lambda: data.read_sound(path), capsys, path)
    refused(lambda: data.read_wav_crop(path, 0, 400), capsys, path)


def test_a_file_that_stands_behind_its_end_is_refused(tmp_path, capsys, monkeypatch):
    path = write_wav(tmp_path / "a.wav")
    monkeypatch.setattr(soundfile.SoundFile, "tell", lambda file: file.frames + 5)  # a damaged MP3's
    refused(lambda: data.read_wav_crop(path, 0, 400), capsys, path)
    refused(lambda: data.open_audio(tmp_path), capsys, path)


def test_stored_energies_are_those_of_the_files_whatever_the_number_of_processes(tmp_path, capsys):
    root = write_folder(tmp_path / "wav")
    (root / "SYNTHETIC").touch()
    made = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        data.main(["fbank", "--data", str(root), "--out", str(out), "--workers", workers])
        printed = capsys.readouterr().out
        assert "(SYNTHETIC): 5 recordings, 590 frames" in printed
        assert "left out: 0" in printed
        made.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*.*")})
    assert made[0] == made[1]
    store = data.open_fbank(out)
    assert store.synthetic
    assert store.names == [f"{i}/take {i}" for i in range(5)]
    assert store.frames.tolist() == [fbank_frames(int(16000 * s)) for s in SECONDS]
    for i, name in enumerate(store.names):
        expected = data.heard_energies(data.read_sound(root / f"{name}.wav")[0], name).numpy()
        assert np.abs(store.get(i) - expected).max() <= 2**-8  # float16 below 16
        item = store.item(i)
        assert np.array_equal(item["fbank"][3:20], store.get(i, 3, 20))
        assert (item["name"], item["frames"]) == (name, len(expected))


def test_what_is_stored_is_kept_and_what_is_newer_or_of_another_version_made_again(
    tmp_path, monkeypatch, capsys
):
    root, out = write_folder(tmp_path / "wav"), tmp_path / "out"
    before = data.build_fbank(root, out, workers=1, quiet=True)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    before_0, first = before.get(0), before.get(1)
    path = write_wav(root / "1" / "take 1.wav", int(16000 * 1.2), 77)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 10))
    (out / "3" / "take 3.v3.npy").unlink()
    after = data.build_fbank(root, out, workers=1, quiet=True)
    assert not np.array_equal(first, after.get(1))
    changed = [path.stem for path, at in kept.items() if path.stat().st_mtime_ns != at]
    assert sorted(changed) == ["take 1.v3", "take 3.v3"]
    os.utime(write_wav(root / "0" / "take 0.wav", 8000, 78), (1e9, 1e9))  # unpacked with an old date
    os.utime(out / "0" / "take 0.v3.npy", (2e9, path.stat().st_ctime - 1))
    assert not np.array_equal(data.build_fbank(root, out, workers=1, quiet=True).get(0), before_0)
    (out / "3" / "take 3.v3.npy").write_bytes(b"half a file")
    refused(lambda: data.open_fbank(out), capsys, "take 3.v3.npy")
    monkeypatch.setattr(data, "FBANK_FORMAT", 4)
    refused(lambda: data.open_fbank(out), capsys, "v4.npy")
    assert np.array_equal(data.build_fbank(root, out, workers=1, quiet=True).get(1), after.get(1))


def test_a_bad_recording_is_left_out_and_listed(tmp_path, capsys):
    root = write_folder(tmp_path / "wav")
    (root / "2" / "take 2.wav").write_bytes(b"RIFF")
    write_wav(root / "short.wav", 300)
    (root / ".hidden.wav").write_bytes(b"RIFF")
    write_wav(root / ".Trash" / "old.wav")
    (root / "2" / "linked").symlink_to(root / "1")
    (root / "notes.pdf").touch()
    os.mkfifo(root / "pipe.wav")
    named = ("1 .pdf, 1 linked folder", "pipe.wav: not an ordinary file", "short.wav", "take 2.wav")
    for store in (data.build_fbank(root, tmp_path / "out", workers=1, quiet=True), data.open_audio(root)):
        assert store.names == [f"{i}/take {i}" for i in (0, 1, 3, 4)]
        assert [word in "\n".join(store.left_out) for word in named] == [True] * 4
        assert len(store.left_out) == 4
    (root / "pipe.wav").unlink()
    for build in (data.open_audio, lambda *a, **k: data.build_fbank(root, tmp_path / "s", 1, **k)):
        refused(lambda build=build: build(root, strict=True), capsys, "take 2.wav")


def test_a_name_that_looks_like_a_copy(tmp_path, capsys):
    root = write_wav(tmp_path / "wav" / "take@copy1.wav").parent
    store = data.build_fbank(root, tmp_path / "out", workers=1, quiet=True, copies=1)
    assert store.names == ["take@copy1", "take@copy1@copy1"]
    out = tmp_path / "out"
    whole = (out / "index.json").read_text()
    for index in ([], {"split": {}}, {"split": {}, "left_out": [5]}, {"split": {}, "left_out": []}):
        (out / "index.json").write_text(json.dumps(index))
        refused(lambda: data.open_fbank(out), capsys, out)
    (out / "index.json").write_text(whole)
    for wrong in (np.zeros(5), np.zeros((50, 127)), np.zeros((50, 128), complex), np.array("x")):
        np.save(out / "take@copy1.v3.npy", wrong)
        refused(lambda: data.open_fbank(out), capsys, "take@copy1.v3.npy", wrong.dtype)


def test_renderings_of_a_corpus_and_of_its_variants_are_stored_once(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "corpus/virtuoso/data/all_2rounds"
    folder.mkdir(parents=True)
    names = [f"Schubert_D960_mv2_8bars_{player}_01" for player in (1, 2)]
    for i, name in enumerate(names):
        data._save_midi(folder / f"{name}.mid", [(0, 0.4, 60 + i, 70)], [])
    arguments = (
        tmp_path / "corpus",
        tmp_path / "cache",
        None,
        [data.Version(1.25, 2), data.Version(copy=1)],
        1,
        True,
    )
    store = data.percepiano_audio(*arguments)
    assert store.names == [f"{name}{how}" for how in ("", "@1.25+2", "@copy1") for name in names]
    changed = data.transform_performance(data.read_midi(folder / f"{names[1]}.mid"), 1.25, 2)
    expected = data.heard_energies(data.render(changed), "x").numpy()
    assert np.abs(store.get(3) - expected).max() <= 2**-8
    monkeypatch.setattr(data, "render", None)  # stored
    assert np.array_equal(data.percepiano_audio(*arguments).get(3), store.get(3))
    for name in (names[1], "another"):
        write_wav(tmp_path / f"wav/{name}.wav")
    recorded = data.percepiano_audio(tmp_path / "corpus", tmp_path / "cache", tmp_path / "wav", quiet=True)
    assert (recorded.names, len(recorded.left_out)) == ([names[1]], 2)
    gone = data.Version(soundfont="gone.sf2")
    refused(lambda: data.percepiano_audio(*arguments[:2], base=gone), capsys, "gone.sf2")
