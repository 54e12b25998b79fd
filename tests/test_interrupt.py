"""Ctrl-C, SIGTERM, SIGHUP and kill -9 of commands: what is said, what stays on the disk, what comes after.

PYTHONPATH=. python tests/test_interrupt.py 60    kills a run at random: how many files cannot be read
"""

import ast
import dis
import functools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import LONG, Forked, two_ranks, until
from test_train import CASES, TRAINERS, command, last, records, resume, write_corpus

import data
import eval as evaluation
import models

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("eval.py", "train_han.py", "train_decoder.py", "pretrain_ast.py")
STOPS = {"train_han": signal.SIGINT, "train_decoder": signal.SIGTERM, "pretrain_ast": signal.SIGHUP}
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12: torch's threads
corpus = pytest.fixture(scope="module")(write_corpus)


def trainer(name, argv):
    return lambda: TRAINERS[name].main(TRAINERS[name].parse_args(argv))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world"), [("train_han", 1), ("train_han", 2), ("train_decoder", 1), ("pretrain_ast", 2)]
)
def test_a_trainer_ends_its_step_and_saves(name, world, corpus, tmp_path):
    job = trainer(name, command(name, corpus, tmp_path, "--name stopped", CASES[name].endless))
    logs = tmp_path / "logs"
    logs.mkdir()
    script = f"{name}.py"
    started = two_ranks(logs, script, job) if world == 2 else [Forked(logs / "rank0", script, job)]
    assert until((tmp_path / "stopped/last.pt").exists)
    for process in started:  # as a terminal or a batch system does: the workers get it too
        os.killpg(process.pid, STOPS[name])
    assert [process.wait() for process in started] == [130] * world
    said = started[0].said("stderr").replace("\r", "\n").split("\n")
    assert (said[-2], "Traceback" in str(said)) == (f"{script}: interrupted", False)
    assert all(process.said("stderr") == "" for process in started[1:])
    assert f"python {script} --resume {tmp_path}/stopped/last.pt" in started[0].said("stdout")
    saved = last(tmp_path / "stopped")
    assert saved["step"] > 0
    assert len(saved["rng"]["others"]) == world - 1


@pytest.mark.slow
def test_a_kill_during_a_save_leaves_a_run_that_goes_on(corpus, tmp_path):
    """The third file that the run saves, in its second evaluation, is cut in the middle."""
    options = command("train_han", corpus, tmp_path, "--name killed")

    def killed():
        whole, saved = torch.save, []

        def save(value, file):
            saved.append(file)
            if len(saved) == 3:
                file.write(b"half a checkpoint")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            whole(value, file)

        torch.save = save
        trainer("train_han", options)()

    assert Forked(tmp_path / "logs", "train_han.py", killed).wait() == -signal.SIGKILL
    folder = tmp_path / "killed"
    assert last(folder)["step"] == models.load_checkpoint(folder / "best.pt")[1]["step"] > 0
    assert len([*folder.glob(".*.pt.*")]) == 1
    assert trainer("train_han", [*options, *resume(folder).split()])()["folder"] == str(folder)
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.jsonl", "last.pt", "best.pt"}


def random_kills(count: int, corpus, folder: Path, seed: int = 7) -> tuple[int, int, list[str]]:
    """Kills a run that saves at every step, and again: unreadable files, bytes of log cut off, problems."""
    rng = random.Random(seed)
    often = "--name run --save-every 1 --log-every 1"
    options = command("train_han", corpus, folder, often, CASES["train_han"].endless)
    run = folder / "run"
    trainer("train_han", [*options, "--max-steps", "1", "--name", "first"])()  # what torch imports late
    unreadable, cut, problems = 0, 0, []
    for k in range(count):
        argv = [*options, *(resume(run).split() if (run / "last.pt").exists() else [])]
        process = Forked(folder / "logs", "train_han.py", trainer("train_han", argv))
        until(lambda job=process: "steps planned" in job.said("stdout") or job.ended())
        time.sleep(2 * rng.random())
        if process.ended():
            problems.append(f"kill {k}: {process.said('stderr')[-200:]}")
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for path in run.glob("*.pt"):
            try:
                models.load_checkpoint(path)
            except data.DataError as error:
                unreadable += 1
                problems.append(f"kill {k}: {error}")
        cut += sum(int(line.split()[1]) for line in process.said("stdout").splitlines() if "cut off" in line)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_bytes().splitlines()[:-1]]
    if steps != sorted(steps):
        problems.append("metrics.jsonl does not ascend")
    return unreadable, cut, problems


def test_an_interrupt_is_noted_within_its_block_only():
    before = {number: signal.signal(number, signal.default_int_handler) for number in data.STOPS}
    try:
        with data.Interrupt() as stop:
            assert not stop
            for number in data.STOPS:
                signal.raise_signal(number)
            assert len(stop) == len(data.STOPS)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_while_worker_processes_start(monkeypatch):
    """Between a pool's first process and its thread, such a stop left what could not be shut down."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    start = threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start", lambda self: (signal.raise_signal(signal.SIGINT), start(self))
    )
    with pytest.raises(KeyboardInterrupt):
        [*data._run_parallel(str, [1, 2], 2, quiet=True)]
    signal.signal(signal.SIGINT, before)
    assert multiprocessing.active_children() == []


def test_ctrl_c_while_worker_processes_work(monkeypatch):
    """Where a condition that was waited for takes its lock again, a stop broke that lock."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    take, armed = threading.Condition._acquire_restore, []

    def interrupted(self, state):
        if armed and threading.current_thread() is threading.main_thread():
            armed.clear()
            signal.raise_signal(signal.SIGINT)
        take(self, state)

    def stop_soon():
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
        armed.append(True)

    monkeypatch.setattr(threading.Condition, "_acquire_restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        [stop_soon() for _ in data._run_parallel(time.sleep, [0.1, 1.0], 2, quiet=True)]
    signal.signal(signal.SIGINT, before)
    assert multiprocessing.active_children() == []


def _square(task):
    """Ends its process: of "damaged" always, of "short of memory" the first time."""
    name, number, folder = task
    if name == "damaged" or (name == "short of memory" and not (folder / "seen").exists()):
        (folder / "seen").touch()
        os._exit(1)
    return number**2


@pytest.mark.parametrize("bad", ["damaged", "short of memory"])
@pytest.mark.parametrize("count", [1, 30])
def test_a_task_that_ends_its_process_costs_itself_alone(bad, count, tmp_path, capfd):
    tasks = [(bad, 0, tmp_path), *(("good", k, tmp_path) for k in range(1, count))]
    results, errors = data._run_all(_square, tasks, 2, "x", quiet=True, apart=True)
    bad_alone = bad == "damaged" or count == 1
    assert sorted(results.values()) == [k**2 for k in range(bad_alone, count)]
    assert [line.split(":")[0] for line in errors.values()] == [bad] * bad_alone
    assert ("one by one" in capfd.readouterr().err) == (count > 1)
    if bad_alone and count > 1:  # what a cache would keep
        with pytest.raises(data.DataError, match="damaged"):
            data._run_all(_square, tasks, 2, "x", quiet=True)
        assert "--workers" in capfd.readouterr().err


def test_a_pool_of_another_thread_than_the_main_one(capfd):
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(lambda: sorted(data._run_parallel(str, [1, 2], 2, quiet=True))).result()
    assert found == [(1, "1"), (2, "2")]
    assert [*data._run_parallel(str, [], apart=True)] == []


def test_ctrl_c_before_a_file_is_in_its_place(tmp_path, monkeypatch):
    """Every output and every cache goes through write_atomic: the earlier file stays, nothing else does."""
    (tmp_path / "x.csv").write_bytes(b"earlier")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    monkeypatch.setattr(os, "replace", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        data.write_atomic(tmp_path / "x.csv", lambda file: file.write(b"later"))
    signal.signal(signal.SIGINT, before)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]


def test_a_full_disk_is_one_line_and_what_was_saved_stays(tmp_path):
    resource = pytest.importorskip("resource")
    models.save_checkpoint(tmp_path / "last.pt", {"step": 1})

    def on_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        models.save_checkpoint(tmp_path / "last.pt", {"step": 2, "model": {"w": torch.zeros(10**5)}})

    process = Forked(tmp_path / "logs", "x.py", on_a_full_disk)
    assert process.wait() == 2
    lines = process.said("stderr").splitlines()
    assert len(lines) == 1
    assert f"{tmp_path}/last.pt" in lines[0]
    assert last(tmp_path)["step"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "logs"}


@pytest.mark.slow
def test_a_disk_that_fills_within_a_line_of_the_log(corpus, tmp_path, capsys):
    """One line, exit 2; what is whole is read; a resume cuts the torn line and what is beyond last.pt."""
    resource = pytest.importorskip("resource")
    options = command("train_han", corpus, tmp_path, "--name full --save-every 3 --log-every 1")
    whole = models.Run.log

    def log(self, step, epoch, **values):
        if step == 5:  # twenty bytes fit
            size = os.path.getsize(self.metrics.name) + 20
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        whole(self, step, epoch, **values)

    def on_a_full_disk():
        models.Run.log = log
        trainer("train_han", options)()

    process = Forked(tmp_path / "logs", "train_han.py", on_a_full_disk)
    assert process.wait() == 2
    folder = tmp_path / "full"
    (line,) = process.said("stderr").splitlines()
    assert f"{folder}/metrics.jsonl" in line
    assert f"--resume {folder}/last.pt" in line
    torn = (folder / "metrics.jsonl").read_bytes().splitlines()[-1]
    assert (len(torn), last(folder)["step"]) == (20, 3)
    assert evaluation.read_run(folder)[1][-1]["step"] == 4
    assert "1 of 5 lines" in capsys.readouterr().out
    assert evaluation.draw_curves({"full": evaluation.read_run(folder)}).axes
    trainer("train_han", [*options, *resume(folder).split(), "--max-steps", "6"])()
    assert [record["step"] for record in records(folder) if "valid_loss" not in record] == [*range(1, 7)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unwell", "where"), [(0, "load_percepiano"), (1, "load_percepiano"), (1, "collate_han")]
)
def test_an_error_of_one_process_is_one_line_and_ends_all(unwell, where, corpus, tmp_path):
    """While the other waits for the cache or for a gradient; a second TERM is torchrun's to the other."""
    options = command("train_han", corpus, tmp_path, "--name two --batch 2")

    def fails(*args, **kwargs):
        raise data.DataError("x.mid: torn; expected a file")

    def job():
        is_unwell = os.environ["RANK"] == str(unwell)
        data.TORCHRUN_TAKES = 0.1 if is_unwell else LONG
        if is_unwell:
            for module in (data, evaluation):  # either may hold the name that a trainer goes by
                setattr(module, where, fails)
        trainer("train_han", options)()

    started = two_ranks(tmp_path, "train_han.py", job)
    assert started[unwell].wait() == 2
    assert started[unwell].said("stderr") == "train_han.py: x.mid: torn; expected a file\n"
    other = started[1 - unwell]
    time.sleep(0.5)  # the connection breaks first, as far as a busy machine lets it
    os.kill(other.pid, signal.SIGTERM)
    assert other.wait() in (2, 130)
    assert other.said("stderr") in ("", "train_han.py: interrupted\n"[: 27 * unwell])


JOBS = {  # inputs, command, what shows that it is in the middle, what it makes, what a kill may leave
    "percepiano": (
        lambda folder: data.synth_percepiano(folder, segments=8, players=8),
        "percepiano --data {0}/in --cache {0}/out --workers 2",
        lambda process, _: len(process.workers()) >= 2,
        "out/*.npz",
        "out/.x.npz.{}",
    ),
    "render": (
        lambda folder: data.synth_percepiano(folder, segments=8, players=4),
        "render --midi-root {0}/in --out {0}/out --workers 2",
        lambda process, folder: [*folder.rglob("out/**/*.wav")],
        "out/**/*.wav",
        "out/virtuoso/.x.wav.{}",
    ),
    "decoder-convert": (
        lambda folder: data.synth_speech(folder, days=2, trials=40, bins=5.0),
        "decoder-convert --in {0}/in --out {0}/out",
        # both workers are there: a Ctrl-C that Python meets while it forks may be lost
        lambda _, folder: len([*folder.glob(".out.*/*")]) >= 2,
        "out/*",
        ".out.{}",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "number"),
    [
        ("percepiano", signal.SIGINT),
        ("percepiano", signal.SIGKILL),
        ("decoder-convert", signal.SIGHUP),
        ("decoder-convert", signal.SIGKILL),
        ("render", signal.SIGTERM),
        ("render", signal.SIGKILL),
    ],
)
def test_a_stopped_command_is_one_line_leaves_nothing_half_and_goes_on(job, number, tmp_path):
    make, line, begun, outputs, left = JOBS[job]
    make(tmp_path / "in")
    argv = line.format(tmp_path).split()
    process = Forked(tmp_path / "logs", "data.py", lambda: data.main(argv))
    assert until(lambda: begun(process, tmp_path) or process.ended())
    if number in (signal.SIGKILL, signal.SIGTERM):  # of `kill`: the workers do not get it
        os.kill(process.pid, number)
    else:
        os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    assert process.wait() == (-number if number == signal.SIGKILL else 130), process.said("stderr")
    assert until(lambda: not process.workers())
    made = {path: path.read_bytes() for path in tmp_path.glob(outputs)}
    assert bool(made) == (job == "render")  # whose files count one by one
    if number != signal.SIGKILL:
        assert process.said("stderr") == "data.py: interrupted\n"
        assert not [*tmp_path.rglob(".*")]
    else:
        half = tmp_path / left.format(process.pid)
        half.parent.mkdir(parents=True, exist_ok=True)
        half.exists() or half.touch()
    again = Forked(tmp_path / "logs", "data.py", lambda: data.main(argv))
    assert again.wait() == 0, again.said("stderr")
    assert len([*tmp_path.glob(outputs)]) > len(made)
    assert all(path.read_bytes() == content for path, content in made.items())
    assert not [*tmp_path.rglob(".*")]  # what the killed one left is gone


@pytest.mark.slow
def test_two_first_runs_share_an_empty_cache(tmp_path, monkeypatch):
    whole = data.synth_speech
    monkeypatch.setattr(data, "synth_speech", lambda out, **_: whole(out, days=1, trials=6, bins=4.0))

    def first_run():
        data.open_speech(data.synthetic_speech(tmp_path), tmp_path)

    jobs = [Forked(tmp_path / f"log{k}", "x.py", first_run) for k in (0, 1)]
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].said("stderr") + jobs[1].said("stderr")
    assert len([*tmp_path.glob("speech-*")]) == len([*tmp_path.glob("synthetic-speech-*")]) == 1


@pytest.mark.slow
def test_an_interrupt_while_a_script_loads_is_one_line(tmp_path):
    script = [sys.executable, ROOT / "pretrain_ast.py"]
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job of `&` ignores it
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            script, cwd=tmp_path, stderr=err, stdout=err, start_new_session=True, preexec_fn=heeds
        )
    maps = Path(f"/proc/{process.pid}/maps")
    assert until(lambda: process.poll() is not None or "libtorch" in maps.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(LONG) == 130
    assert (tmp_path / "err").read_text() == "pretrain_ast.py: interrupted\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_imports_first_what_minds_an_interrupt(script):
    body = ast.parse((ROOT / script).read_text()).body
    first = next(node for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    assert "data" in (getattr(first, "module", None), first.names[0].name)


@pytest.mark.parametrize("script", [*SCRIPTS, "data.py", "models.py"])
def test_what_a_file_names_is_named_once(script):
    """A name set twice at the top level holds for every function of the file as it was set last."""
    text = (ROOT / script).read_text()
    code = dis.get_instructions(compile(text, script, "exec"))
    stored = Counter(step.argval for step in code if step.opname == "STORE_NAME")
    added_to = [node.target for node in ast.walk(ast.parse(text)) if isinstance(node, ast.AugAssign)]
    stored -= Counter(target.id for target in added_to if isinstance(target, ast.Name))
    imports = {"importlib", "urllib", "fcntl"}  # by several lines; or None
    assert {name for name, count in stored.items() if count > 1} <= imports


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:

        def small_corpus(name):
            if not Path(place, "in").exists():
                CASES[name].corpus(Path(place, "in"))
            return ["--data", f"{place}/in", "--cache", f"{place}/cache"]

        kills = int(sys.argv[1])
        unreadable, cut, problems = random_kills(kills, small_corpus, Path(place))
        print(f"{kills} kills at random: {unreadable} unreadable files; {cut} bytes of log cut", *problems)
