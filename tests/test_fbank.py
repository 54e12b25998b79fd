"""Log-mel energies against Kaldi's numbers, WAV files of all kinds, shards on disk and their resumption."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

import data
from data import DataError, fbank, fbank_frames

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("SHARED", ROOT.parent / "shared"))
ORACLE = SHARED / "reference" / "fbank.npz"
TRAIN_SECONDS = (0.5, 1.2, 0.8, 2.0, 1.5)


def noise(samples: int, seed: int = 0, rows: tuple = ()) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((*rows, samples)) * 0.1).astype(np.float32)


def write_wav(path: Path, samples: int = 8000, seed: int = 0, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, np.rint(noise(samples, seed) * 32767).astype(np.int16))
    return path


def write_folder(root: Path, seconds=TRAIN_SECONDS) -> Path:
    for i, length in enumerate(seconds):
        write_wav(root / f"{i}" / f"take {i}.wav", int(16000 * length), i)
    return root


def plain_fbank(x: np.ndarray) -> np.ndarray:
    """The same in float64, frame by frame, with the filters by a loop over bins."""
    edges = np.linspace(1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + 8000 / 700), 130)
    x = x.astype(np.float64) - x.astype(np.float64).mean()
    out = np.full(((len(x) - 400) // 160 + 1, 128), 1.1920929e-07)
    for t, row in enumerate(out):
        frame = x[160 * t : 160 * t + 400] - x[160 * t : 160 * t + 400].mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)), 512)) ** 2
        for band in range(128):
            low, middle, high = edges[band : band + 3]
            mels = [1127 * np.log(1 + 31.25 * k / 700) for k in range(256)]
            energy = sum(
                power[k] * min((m - low) / (middle - low), (high - m) / (high - middle))
                for k, m in enumerate(mels)
                if low < m < high
            )
            row[band] = max(row[band], energy)
    return np.log(out)


# ------------------------------------------------------------------------------------------------------------
# Energies
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not ORACLE.is_file(), reason="no reference data")
@pytest.mark.parametrize("name", ["noise", "chord", "quiet"])
def test_agrees_with_kaldi(name):
    with np.load(ORACLE) as z:
        samples, expected = z[f"wav/{name}"], torch.from_numpy(z[f"fbank/{name}"])
    found = fbank(torch.from_numpy(samples.astype(np.float32) / 32768))
    difference = (found - expected).abs()
    assert difference.max() < 1.5e-3  # Kaldi's own float32 is 1.1e-3 from float64 here
    assert difference[expected > -10].max() < 3e-4
    assert torch.equal(found, fbank(torch.from_numpy(samples)))  # int16


def test_agrees_with_a_plain_float64_loop():
    x = noise(2000) + 0.3
    assert np.abs(fbank(torch.from_numpy(x)).numpy() - plain_fbank(x)).max() < 3e-4


def test_a_row_does_not_depend_on_its_batch():
    x = torch.from_numpy(noise(16000 * 6, rows=(3,)))
    batch = fbank(x)
    assert batch.shape == (3, 598, 128)
    assert batch.dtype == torch.float32
    for row, alone in zip(batch, x, strict=True):
        assert torch.equal(row, fbank(alone))
    assert torch.equal(fbank(x.repeat(100, 1)[:, :8000])[1], fbank(x[1, :8000]))


def test_autocast_and_other_floats_leave_it_alone():
    x = torch.from_numpy(noise(8000))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fbank(x)
    assert torch.equal(inside, fbank(x))
    assert torch.equal(fbank(x.double()), fbank(x))


@pytest.mark.parametrize(
    ("samples", "frames"), [(0, 0), (1, 0), (399, 0), (400, 1), (559, 1), (560, 2), (163840, 1022)]
)
def test_frames_of_every_length(samples, frames):
    assert fbank_frames(samples) == frames
    assert fbank(torch.zeros(samples)).shape == (frames, 128)
    assert fbank(torch.zeros(2, samples)).shape == (2, frames, 128)


def test_silence_is_the_floor_and_normalises():
    silent = fbank(torch.zeros(1600))
    assert torch.equal(silent, torch.full_like(silent, data.SILENCE))
    assert abs(data.SILENCE - -15.942385) < 1e-5
    assert fbank_frames(np.array([0, 400, 16000])).tolist() == [0, 1, 98]
    assert abs(data.normalise_fbank(data.SILENCE) - (-15.942385 + 4.2677) / 9.138) < 1e-6
    assert data.normalise_fbank(np.array([3.0, 5.0]), 3.0, 1.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.tensor([0.1] * 500 + [float("nan")]), "largest sample of nan"),
        (torch.full((800,), float("inf")), "largest sample of inf"),
        (torch.full((800,), 20000.0), "divide int16 values by 32768"),
        (torch.zeros(800, dtype=torch.int64), "torch.int64"),
        (torch.zeros(800, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(1, 2, 800), r"\(1, 2, 800\)"),
    ],
)
def test_refuses_what_is_no_waveform(waveform, message):
    with pytest.raises(DataError, match=message):
        fbank(waveform)


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    x = torch.from_numpy(noise(163840, rows=(4,)))
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = fbank(x.cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (found.cpu() - fbank(x)).abs().max() < 1e-3
    assert (found[2] - fbank(x[2].cuda())).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------------------
# WAV files
# ------------------------------------------------------------------------------------------------------------
def wav_24(path: Path, values: np.ndarray) -> Path:
    body = b"".join(int(v).to_bytes(3, "little", signed=True) for v in values)
    body += b"\0" * (len(body) % 2)
    path.write_bytes(
        b"RIFF"
        + struct.pack("<I", 36 + len(body))
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 48000, 3, 24)
        + b"data"
        + struct.pack("<I", 3 * len(values))
        + body
    )
    return path


@pytest.mark.parametrize(
    ("kind", "step"),
    [("u1", 2**-7), ("i2", 2**-15), ("i4", 2**-23), ("f4", 1e-7), ("f8", 1e-7), ("24", 2**-23)],
)
def test_every_sample_format(tmp_path, kind, step):
    x = np.clip(noise(1001) * 3, -0.99, 0.99)
    path = tmp_path / "a.wav"
    if kind == "24":
        wav_24(path, np.rint(x * 2**23))
    else:
        stored = {"u1": np.rint(x * 128) + 128, "i2": np.rint(x * 2**15), "i4": np.rint(x * 2.0**31)}.get(
            kind, x
        )
        wavfile.write(path, 16000, stored.astype(kind))
    found = data.read_wav(path)
    assert found.dtype == np.float32
    assert np.abs(found - x).max() <= step
    crop = data.read_wav_crop(path, 100, 333)
    assert crop.dtype == np.int16
    assert np.abs(crop / 32768 - found[100:333]).max() <= 2**-16


def test_stereo_becomes_mono(tmp_path):
    x = np.stack([noise(900, 1), noise(900, 2)], 1)
    wavfile.write(tmp_path / "a.wav", 16000, np.rint(x * 32768).astype(np.int16))
    assert np.abs(data.read_wav(tmp_path / "a.wav") - x.mean(1)).max() <= 2**-15


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000, 11111])
def test_resampling_keeps_a_tone_and_its_phase(tmp_path, rate):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)
    wavfile.write(tmp_path / "a.wav", rate, tone.astype(np.float32))
    found = data.read_wav(tmp_path / "a.wav")
    assert len(found) == -(-(rate // 2) * 16000 // rate)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(found)) / 16000)
    assert np.abs(found - expected)[200:-200].max() < 2e-3


@pytest.mark.parametrize("rate", [16000, 22050, 44100, 48000, 11025])
def test_a_crop_is_a_crop_of_the_whole(tmp_path, rate):
    wavfile.write(tmp_path / "a.wav", rate, np.stack([noise(rate, 1), noise(rate, 2)], 1))
    whole = np.rint(data.read_wav(tmp_path / "a.wav") * 32768)
    for start, stop in ((0, 5000), (4321, 9876), (12000, 16000), (7, 8), (100, 100)):
        found = data.read_wav_crop(tmp_path / "a.wav", start, stop)
        assert len(found) == stop - start
        assert np.abs(found - whole[start:stop]).max(initial=0) <= 1


def broken_wavs(good: bytes) -> dict[str, tuple[bytes, str]]:
    return {
        "truncated": (good[:-700], "truncated"),
        "half a header": (good[:30], "expected an uncompressed WAV"),
        "no data": (good[:44], "truncated|no samples"),
        "no samples": (good[:40] + struct.pack("<I", 0), "no samples|truncated"),
        "empty": (b"", "an empty file"),
        "mp3": (b"ID3\x04" + bytes(600), "ID3"),
        "text": (b"plain text\n" * 60, "plai"),
        "no channels": (good[:22] + struct.pack("<H", 0) + good[24:], "0 channels"),
        "no rate": (good[:24] + struct.pack("<II", 0, 0) + good[32:], "sampling rate of 0 Hz"),
        "compressed": (good[:20] + struct.pack("<H", 0x55) + good[22:], "MPEGLAYER3"),
    }


def test_broken_files_are_refused_in_one_line(tmp_path):
    good = write_wav(tmp_path / "good.wav").read_bytes()
    for name, (content, message) in broken_wavs(good).items():
        path = tmp_path / f"{name}.wav"
        path.write_bytes(content)
        for read in (data.read_wav, lambda path: data.read_wav_crop(path, 0, 400)):
            with pytest.raises(DataError, match=message) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path}: ")
            assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="none.wav: No such file"):
        data.read_wav(tmp_path / "none.wav")


def test_nan_samples_are_refused_and_counted(tmp_path):
    x = noise(800)
    x[[3, 700]] = np.nan, np.inf
    wavfile.write(tmp_path / "a.wav", 16000, x)
    with pytest.raises(DataError, match="a.wav: 2 samples that are NaN"):
        data.read_wav(tmp_path / "a.wav")


# ------------------------------------------------------------------------------------------------------------
# Shards
# ------------------------------------------------------------------------------------------------------------
def test_stored_energies_are_those_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_FRAMES", 150)
    root = write_folder(tmp_path / "wav")
    store = data.build_fbank(root, tmp_path / "out", workers=1, quiet=True)
    assert store.names == [f"{i}/take {i}" for i in range(5)]
    assert store.frames.tolist() == [fbank_frames(int(16000 * s)) for s in TRAIN_SECONDS]
    assert len(store.shards) == 5
    for i in range(5):
        expected = fbank(torch.from_numpy(data.read_wav(root / f"{i}" / f"take {i}.wav"))).numpy()
        assert np.abs(store.get(i) - expected).max() <= 2**-8  # float16 below 16
        assert np.array_equal(store.get(i, 3, 20), store.get(i)[3:20])
    with pytest.raises(DataError, match="frames 0 to 500 of 0/take 0"):
        store.get(0, 0, 500)


def test_processes_write_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_FRAMES", 200)
    root = write_folder(tmp_path / "wav")
    for workers in (1, 2):
        data.build_fbank(root, tmp_path / str(workers), workers=workers, quiet=True)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / str(w)).iterdir()} for w in (1, 2))
    assert one == two


def test_finished_shards_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_FRAMES", 150)
    root, out = write_folder(tmp_path / "wav"), tmp_path / "out"
    whole = data.build_fbank(root, tmp_path / "whole", workers=1, quiet=True)
    write, calls = data._write_shard, []

    def killed(task):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(task[0])
        write(task)

    monkeypatch.setattr(data, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        data.build_fbank(root, out, workers=1, quiet=True)
    with pytest.raises(DataError, match="index.json: No such file.*python data.py fbank"):
        data.open_fbank(out)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.npy")}
    assert len(finished) == 3
    (out / ".shard-0.npy.99").write_bytes(b"half")  # what a killed process leaves
    calls.clear()
    store = data.build_fbank(root, out, workers=1, quiet=True)
    assert len(calls) == 2
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items())
    assert not (out / ".shard-0.npy.99").exists()
    assert all(np.array_equal(store.get(i), whole.get(i)) for i in range(5))


def test_a_changed_recording_is_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_FRAMES", 150)
    root, out = write_folder(tmp_path / "wav"), tmp_path / "out"
    before = data.build_fbank(root, out, workers=1, quiet=True).get(1)
    path = write_wav(root / "1" / "take 1.wav", int(16000 * 1.2), 77)
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))
    after = data.build_fbank(root, out, workers=1, quiet=True).get(1)
    assert before.shape == after.shape
    assert not np.array_equal(before, after)
    assert len(list(out.glob("shard-*.npy"))) == 5  # the old shard is gone


def processes_of(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_killed_build_goes_on(tmp_path):
    """kill -9 of the command in the middle: no index, no half shard, no worker left; the same command again ends the work."""
    root, out = tmp_path / "wav", tmp_path / "out"
    for i in range(8):
        write_wav(root / f"{i:02}.wav", 16000 * 100, i)
    code = f"import data; data.SHARD_FRAMES = 9000; data.build_fbank({str(root)!r}, {str(out)!r}, workers=2, quiet=True)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    while len(list(out.glob("shard-*.npy"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.time() + 60
    while (
        processes_of(process.pid) and time.time() < deadline
    ):  # workers look for their parent every second of their own
        time.sleep(0.1)
    assert not processes_of(process.pid)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.npy")}
    assert 2 <= len(kept) < 8
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert len(data.open_fbank(out).shards) == 8


def test_a_bad_recording_is_left_out_and_listed(tmp_path):
    root = write_folder(tmp_path / "wav")
    (root / "2" / "take 2.wav").write_bytes((root / "2" / "take 2.wav").read_bytes()[:-100])
    broken = noise(8000)
    broken[5] = np.nan
    wavfile.write(root / "nan.wav", 16000, broken)
    write_wav(root / "short.wav", 300)
    store = data.build_fbank(root, tmp_path / "out", workers=1, quiet=True)
    assert store.names == [f"{i}/take {i}" for i in (0, 1, 3, 4)]
    assert [line.split(": ")[0].split("/")[-1] for line in sorted(store.left_out)] == [
        "take 2.wav",
        "nan.wav",
        "short.wav",
    ]
    with pytest.raises(DataError, match="truncated"):
        data.build_fbank(root, tmp_path / "strict", workers=1, strict=True, quiet=True)


def damage(out: Path, how: str) -> None:
    shard, index = sorted(out.glob("shard-*.npy"))[0], json.loads((out / "index.json").read_text())
    if how == "missing":
        shard.unlink()
    elif how == "short":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif how == "shape":
        np.save(shard, np.zeros((7, 128), np.float16))
    elif how == "type":
        np.save(shard, np.zeros(np.load(shard).shape, np.float32))
    elif how == "foreign":
        shard.write_bytes(b"not an array")
    elif how == "half an index":
        (out / "index.json").write_text((out / "index.json").read_text()[:-100])
    elif how == "format":
        (out / "index.json").write_text(json.dumps(index | {"format": 99}))
    elif how == "key":
        (out / "index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "shards"}))
    else:
        index["recordings"][-1]["frames"] += 1
        (out / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"shard-\w+.npy: missing"),
        ("short", "cut short"),
        ("shape", r"float16 of shape \(7, 128\)"),
        ("type", "float32 of shape"),
        ("foreign", "damaged"),
        ("half an index", "not JSON"),
        ("format", "format 99"),
        ("key", "damaged.*shards"),
        ("frames", "outside its shard"),
    ],
)
def test_damage_is_found_on_opening_and_mended(tmp_path, how, message):
    root, out = write_folder(tmp_path / "wav", (0.2, 0.3)), tmp_path / "out"
    expected = data.build_fbank(root, out, workers=1, quiet=True).get(1)
    damage(out, how)
    with pytest.raises(DataError, match=message) as caught:
        data.open_fbank(out)
    assert "\n" not in str(caught.value)
    if how != "type":
        assert np.array_equal(data.build_fbank(root, out, workers=1, quiet=True).get(1), expected)


def test_crops_repeat_and_cover(tmp_path):
    store = data.build_fbank(write_folder(tmp_path / "wav"), tmp_path / "out", workers=1, quiet=True)
    starts = [data.crop_start(100, 91, 7, epoch, 3) for epoch in range(300)]
    assert set(starts) == set(range(10))
    assert starts == [data.crop_start(100, 91, 7, epoch, 3) for epoch in range(300)]
    assert starts != [data.crop_start(100, 91, 8, epoch, 3) for epoch in range(300)]
    assert data.crop_start(50, 91, 7, 0, 0) == data.crop_start(91, 91, 7, 0, 0) == 0
    start = data.crop_start(int(store.frames[3]), 64, 7, 2, 3)
    assert np.array_equal(data.random_crop(store, 3, 64, 7, 2), store.get(3, start, start + 64))
    assert data.random_crop(store, 0, 64, 7, 2).shape == (48, 128)  # shorter than the crop: whole


def test_audio_store_gives_the_samples_of_the_same_crops(tmp_path):
    root = write_folder(tmp_path / "wav")
    stored, audio = data.build_fbank(root, tmp_path / "out", workers=1, quiet=True), data.open_audio(root)
    assert audio.names == stored.names
    assert audio.frames.tolist() == stored.frames.tolist()
    for i in range(5):
        samples = data.random_crop(audio, i, 60, 7, 1)
        assert samples.dtype == np.int16
        expected = data.random_crop(stored, i, 60, 7, 1)
        assert np.abs(fbank(torch.from_numpy(samples)).numpy() - expected).max() < 0.01
    assert len(audio.get(0, 5, 5)) == 0


def test_percepiano_renderings_have_the_corpus_names(tmp_path):
    names = ["Schubert_D935_no.3_4bars_2_1", "Beethoven_WoO80_thema_8bars_1_1"]
    for folder in ("plain", "corpus/virtuoso/data/all_2rounds"):
        write_wav(tmp_path / folder / f" {names[0]}.wav")
        write_wav(tmp_path / folder / f"{names[1]}.wav")
    for name in (names[1], "Beethoven_WoO80_thema_8bars_2_1"):
        (tmp_path / "corpus/virtuoso/data/all_2rounds" / f"{name}.mid").write_bytes(b"MThd")
    for folder in ("plain", "corpus"):
        assert data.open_audio(tmp_path / folder).names == sorted(names)
    left_out = data.open_audio(tmp_path / "corpus").left_out
    assert len(left_out) == 1
    assert "8bars_2_1.wav: missing; render it with `python data.py render" in left_out[0]


def test_folders_without_recordings_are_refused(tmp_path):
    with pytest.raises(DataError, match="no WAV file.*a folder that exists"):
        data.open_audio(tmp_path / "none")
    (tmp_path / "a.mp3").write_bytes(b"ID3")
    with pytest.raises(DataError, match="no WAV file.*render"):
        data.open_audio(tmp_path)
    write_wav(tmp_path / "a.wav", 100)
    with pytest.raises(DataError, match="100 samples, less than one frame"):
        data.open_audio(tmp_path)
    write_wav(tmp_path / "a.WAV")
    with pytest.raises(DataError, match="2 WAV files of the name 'a'"):
        data.open_audio(tmp_path)


def test_command_reports(tmp_path, capsys):
    root = write_folder(tmp_path / "wav")
    (root / "SYNTHETIC").touch()
    data.main(["fbank", "--data", str(root), "--out", str(tmp_path / "out"), "--workers", "1"])
    printed = capsys.readouterr().out
    assert "(SYNTHETIC): 5 recordings, 590 frames" in printed
    assert "left out: 0" in printed
    assert data.open_fbank(tmp_path / "out").synthetic
