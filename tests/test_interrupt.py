"""Ctrl-C, SIGTERM and kill -9 of every command: what is said, what stays on the disk, what comes after."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_train import CASES, TRAINERS, command, last, resume, write_corpus

import data
import models

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
LONG = 300  # seconds that a busy machine may take for what takes five
each_trainer = pytest.mark.parametrize("name", TRAINERS)
corpus = pytest.fixture(scope="module")(write_corpus)


class Process(subprocess.Popen):
    """python with these arguments, in a session of its own, as a terminal starts it; its output in files."""

    def __init__(self, folder: Path, *argv: object):
        self.logs = folder.with_name(f"{folder.name}.logs")
        self.logs.mkdir(exist_ok=True)
        with (self.logs / "out").open("w") as out, (self.logs / "err").open("w") as err:
            super().__init__(
                [sys.executable, *map(str, argv)],
                cwd=folder,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env=ENVIRONMENT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def said(self, stream: str) -> str:
        return (self.logs / stream).read_text()

    def maps(self, library: str) -> bool:
        return library in Path(f"/proc/{self.pid}/maps").read_text()

    def workers(self) -> list[int]:
        """Processes of the same session, this one apart."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            if int(fields[3]) == self.pid != int(folder.name) and fields[0] != "Z":
                found.append(int(folder.name))
        return found


def until(condition: Callable[[], object]) -> bool:
    end = time.time() + LONG
    while not condition() and time.time() < end:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@each_trainer
def test_a_trainer_ends_its_step_and_saves(name, number, corpus, tmp_path):
    options = command(name, corpus, tmp_path, "--name stopped", CASES[name].endless)
    process = Process(tmp_path, ROOT / f"{name}.py", *options)
    assert until((tmp_path / "stopped/last.pt").exists)
    os.killpg(process.pid, number)  # as a terminal or a batch system does: the workers get it too
    assert process.wait(LONG) == 130
    assert process.said("err").splitlines()[-1] == f"{name}.py: interrupted"
    assert "Traceback" not in process.said("err")
    assert f"--resume {tmp_path}/stopped/last.pt" in process.said("out")
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
    process = Process(tmp_path, "-c", KILLED_RUN.format(name=name), *options)
    assert process.wait(LONG) == -signal.SIGKILL
    folder = tmp_path / "killed"
    assert last(folder)["step"] == models.load_checkpoint(folder / "best.pt")[1]["step"] > 0
    assert len([*folder.glob(".*.pt.*")]) == 1
    again = TRAINERS[name].parse_args([*options, *resume(folder).split()])
    assert TRAINERS[name].main(again)["folder"] == str(folder)
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.jsonl", "last.pt", "best.pt"}


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


def test_an_interrupt_is_left_to_the_main_thread():
    def caught() -> list:
        with models.Interrupt(enabled=True) as stop:
            return [signal.getsignal(signal.SIGINT), bool(stop)]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(caught).result() == [signal.getsignal(signal.SIGINT), False]


def test_ctrl_c_before_a_file_is_in_its_place(tmp_path, monkeypatch):
    """Every output and every cache goes through write_atomic: the earlier file stays, nothing else does."""
    (tmp_path / "x.csv").write_bytes(b"earlier")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    monkeypatch.setattr(os, "replace", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        data.write_atomic(tmp_path / "x.csv", lambda file: file.write(b"later"))
    signal.signal(signal.SIGINT, before)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]


JOBS = {  # inputs, command, what shows that it is in the middle, what it makes (None: not run to its end)
    "percepiano": (
        lambda folder, _: data.synth_percepiano(folder / "in", segments=16, players=12),
        "data.py percepiano --data in --cache out --workers 2",
        lambda process, _: len(process.workers()) >= 2,
        "out/*.npz",
    ),
    "decoder-convert": (
        lambda folder, _: data.synth_speech(folder / "in", days=8, trials=40),
        "data.py decoder-convert --in in --out out",
        # both workers are there: a Ctrl-C that Python meets while it forks may be lost
        lambda _, folder: len([*folder.glob(".out.*/*")]) >= 2,
        "out/*",
    ),
}
for script in ("data.py", "eval.py", "train_han.py", "train_decoder.py", "pretrain_ast.py"):
    loads = f"{script} ceiling --cache cache" if script == "eval.py" else f"{script} --data in"
    JOBS[f"{script} loads"] = (lambda *_: None, loads, lambda process, _: process.maps("libtorch"), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "number"),
    [(job, signal.SIGINT) for job in JOBS] + [("percepiano", signal.SIGKILL)],
)
def test_a_stopped_command_is_one_line_leaves_nothing_half_and_goes_on(job, number, corpus, tmp_path):
    make, line, begun, outputs = JOBS[job]
    script, *options = line.split()
    make(tmp_path, corpus)
    before = {path.name for path in tmp_path.iterdir()}
    process = Process(tmp_path, ROOT / script, *options)
    assert until(lambda: begun(process, tmp_path) or process.poll() is not None)
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    assert process.wait(LONG) == (130 if number == signal.SIGINT else -number), process.said("err")
    assert until(lambda: not process.workers())
    if number == signal.SIGINT:
        assert process.said("err") == f"{script}: interrupted\n"
        assert not [*tmp_path.rglob(".*")]
    if not outputs:
        assert {path.name for path in tmp_path.iterdir()} - before <= {"cache"}
        return
    made = {path: path.read_bytes() for path in tmp_path.glob(outputs) if path.name[0] != "."}
    again = Process(tmp_path, ROOT / script, *options)
    assert again.wait(LONG) == 0, again.said("err")
    whole = {path: path.read_bytes() for path in tmp_path.glob(outputs) if path.name[0] != "."}
    assert len(made) < len(whole)
    assert all(whole[path] == content for path, content in made.items())
