"""Ctrl-C, SIGTERM and kill -9 of every command: what is said, what stays on the disk, what comes after."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mido
import pytest
from test_train import CASES, TRAINERS, command, last, resume

import data
import models

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
each_trainer = pytest.mark.parametrize("name", TRAINERS)


def start(folder: Path, *argv: object) -> subprocess.Popen:
    """python with these arguments, in a session of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def until(condition: Callable[[], object], seconds: float = 120) -> bool:
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.02)
    return bool(condition())


def workers_of(process: subprocess.Popen) -> list[int]:
    """Processes of the same session, this one apart."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[3]) == process.pid != int(folder.name) and fields[0] != "Z":
            found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Options that name a trainer's small corpus, written on first use."""
    root = tmp_path_factory.mktemp("corpora")

    def options(name):
        if not (root / name).exists():
            CASES[name].corpus(root / name)
        return ["--data", str(root / name), "--cache", str(root / f"{name}_cache")]

    return options


# ---------------------------------------------------------------------------------------------------------
# Trainers
# ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@each_trainer
def test_a_trainer_ends_its_step_and_saves(name, number, corpus, tmp_path):
    options = command(name, corpus, tmp_path, "--name stopped", CASES[name].endless)
    process = start(tmp_path, ROOT / f"{name}.py", *options)
    assert until((tmp_path / "stopped/last.pt").exists)
    os.killpg(process.pid, number)  # as a terminal or a batch system does: the workers get it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert f"--resume {tmp_path}/stopped/last.pt" in out
    assert last(tmp_path / "stopped")["step"] > 0


KILLED_RUN = """import os, signal, sys, torch, {name} as t
whole, saved = torch.save, []
def save(value, file):
    saved.append(file)
    if len(saved) == 3:
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    whole(value, file)
torch.save = save
t.main(t.parse_args(sys.argv[1:]))"""


@pytest.mark.slow
@each_trainer
def test_a_kill_during_a_save_leaves_a_run_that_goes_on(name, corpus, tmp_path):
    """The third file that the run saves, in its second evaluation, is cut in the middle."""
    options = command(name, corpus, tmp_path, "--name killed")
    process = start(tmp_path, "-c", KILLED_RUN.format(name=name), *options)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    folder = tmp_path / "killed"
    assert last(folder)["step"] == models.load_checkpoint(folder / "best.pt")[1]["step"] > 0
    again = TRAINERS[name].parse_args([*options, *resume(folder).split()])
    assert TRAINERS[name].main(again)["folder"] == str(folder)


def test_an_interrupt_is_noted_within_its_block_only():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with models.Interrupt(enabled=True) as stop:
            assert not stop
            signal.raise_signal(signal.SIGINT)
            assert stop
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt), models.Interrupt(enabled=False):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------------------
# Files that are being written
# ---------------------------------------------------------------------------------------------------------
KILLED_SAVE = """
import io, os, signal, sys
import torch, models

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(obj, file, save=torch.save):
    save(obj, whole := io.BytesIO())
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    die()

if sys.argv[2] == "writing":
    torch.save = half
else:
    os.replace = die
models.save_checkpoint(sys.argv[1], {"task": "han", "step": 2, "weights": torch.zeros(1000)})
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_a_kill_during_a_save_leaves_the_previous_file(tmp_path, moment):
    path = tmp_path / "last.pt"
    model = models.HAN(7, size=8, heads=2)
    ckpt = {"task": "han", "model_args": model.model_args, "model": model.state_dict()}
    models.save_checkpoint(path, ckpt | {"step": 1})
    process = start(tmp_path, "-c", KILLED_SAVE, path, moment)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert len([*tmp_path.iterdir()]) == 2  # the unfinished file is there, under another name
    assert models.load_checkpoint(path)[1]["step"] == 1
    models.save_checkpoint(path, ckpt | {"step": 3})
    assert models.load_checkpoint(path)[1]["step"] == 3


def test_ctrl_c_before_a_file_is_in_its_place(tmp_path, monkeypatch):
    """Every output and every cache goes through write_atomic: the earlier file stays, nothing else does."""
    (tmp_path / "x.csv").write_bytes(b"earlier")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    monkeypatch.setattr(os, "replace", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        data.write_atomic(tmp_path / "x.csv", lambda file: file.write(b"later"))
    signal.signal(signal.SIGINT, before)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]


# ---------------------------------------------------------------------------------------------------------
# Long commands with workers
# ---------------------------------------------------------------------------------------------------------
def many_midi(folder: Path) -> None:
    """Sixteen files of two minutes."""
    track = mido.MidiTrack()
    for i in range(1200):
        track.append(mido.Message("note_on", note=30 + i * 7 % 70, velocity=60, time=0))
        track.append(mido.Message("note_off", note=30 + i * 7 % 70, time=96))
    folder.mkdir()
    mido.MidiFile(tracks=[track]).save(folder / "00.midi")
    for i in range(1, 16):
        shutil.copyfile(folder / "00.midi", folder / f"{i:02}.midi")


JOBS = {  # inputs, command, output, what shows that it is in the middle (None: two workers)
    "percepiano": (
        lambda folder: data.synth_percepiano(folder, segments=16, players=12),
        "percepiano --data in --cache out --workers 2",
        "out/*.npz",
        None,
    ),
    "render": (many_midi, "render --midi-root in --workers 2", "in/*.wav", "in/*.wav"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a job that ran to its end undisturbed."""
    root = tmp_path_factory.mktemp("whole")

    def run(job):
        make, line, _, _ = JOBS[job]
        folder = root / job
        if not folder.exists():
            folder.mkdir()
            make(folder / "in")
            shutil.copytree(folder / "in", root / f"{job}-in")
            process = start(folder, ROOT / "data.py", *line.split())
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
        return folder, root / f"{job}-in"

    return run


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("job", JOBS)
def test_a_stopped_command_leaves_no_worker_and_goes_on(job, number, whole, tmp_path):
    expected, inputs = whole(job)
    _, line, outputs, middle = JOBS[job]
    shutil.copytree(inputs, tmp_path / "in")
    process = start(tmp_path, ROOT / "data.py", *line.split())
    assert until(lambda: list(tmp_path.glob(middle)) if middle else len(workers_of(process)) >= 2)
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    _, err = process.communicate(timeout=120)
    assert process.returncode in (130, -signal.SIGKILL)
    if number == signal.SIGINT:
        assert err.splitlines()[-1] == "data.py: interrupted"
        assert "Traceback" not in err
    assert until(lambda: not workers_of(process), 60)
    made = {path.name: path.read_bytes() for path in tmp_path.glob(outputs) if path.name[0] != "."}
    wanted = {path.name: path.read_bytes() for path in expected.glob(outputs)}
    assert len(made) < len(wanted)
    again = start(tmp_path, ROOT / "data.py", *line.split())
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert {path.name: path.read_bytes() for path in tmp_path.glob(outputs)} == wanted


@pytest.mark.slow
def test_ctrl_c_while_torch_loads_is_one_line(tmp_path):
    process = start(tmp_path, ROOT / "eval.py", "ceiling", "--cache", "cache")
    assert until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), 60)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "eval.py: interrupted\n"
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ctrl_c_during_a_word_search(corpus, tmp_path):
    """Workers that a Ctrl-C met while they started once left the command waiting for them for ever."""
    options = command("train_decoder", corpus, tmp_path, "--name words --steps 2 --eval-every 2")
    best = (
        Path(TRAINERS["train_decoder"].main(TRAINERS["train_decoder"].parse_args(options))["folder"])
        / "best.pt"
    )
    options = "--device cpu --words --tune --processes 2 --csv x.csv".split()
    process = start(tmp_path, ROOT / "eval.py", "--ckpt", best, *corpus("train_decoder"), *options)
    assert until(lambda: len(workers_of(process)) >= 2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "eval.py: interrupted\n")
    assert not (tmp_path / "x.csv").exists()
    assert until(lambda: not workers_of(process), 20)
