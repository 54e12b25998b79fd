"""One thread: the networks are small, and threads that wait for each other on a busy machine cost minutes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as data.py, which comes after torch here

import io
import itertools
import json
import signal
import socket
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

import data
import eval as evaluation
import models

SHARED = Path(os.environ.get("SHARED", Path(__file__).resolve().parents[2] / "shared"))  # real data, oracles
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared: real data, oracles")
tqdm.monitor_interval = 0  # its thread and forks do not go together
COLUMNS = data.column_names(data.FEATURES)
DAYS = ["t12.2022.05.01", "t12.2022.05.03", "t12.2022.06.01"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def refused(function: Callable, capsys, *names: object, script: str = "x.py") -> str:
    """The one line with which a script refuses: exit code 2, nothing else on stderr, all `names` in it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        data.run_script(script, function)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    for name in names:
        assert str(name) in lines[0]
    return lines[0]


def refusal(argv: list[str], capsys) -> str:
    """The one line with which eval.py refuses this command line."""
    return refused(lambda: evaluation.main(argv), capsys, script="eval.py")


def oracle_tensors(name: str) -> dict[str, torch.Tensor]:
    """The numbers of a file of reference/; the test is skipped where it is not here."""
    path = SHARED / "reference" / name
    if not path.is_file():
        pytest.skip(f"{name} is not here")
    with np.load(path, allow_pickle=False) as file:
        return {key: torch.as_tensor(value) for key, value in file.items()}


def zipped(entries: dict[str, bytes | str]) -> bytes:
    """A ZIP archive of these {name: content}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def performance(pitch, velocity, onset, offset, sustain=(), soft=()) -> data.Performance:
    """Of played notes, a value each, and of pedals as (second, value)."""
    notes = (np.array(values) for values in (pitch, velocity, onset, offset))
    pedals = (np.array(events, float).reshape(-1, 2) for events in (sustain, soft))
    return data.Performance("take.mid", *notes, *pedals)


def leaves(tree: object, key: str = "") -> dict[str, object]:
    """{path of keys: value} of a nested tree of dicts and lists."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {key: tree}
    return {
        path: leaf for name, branch in tree.items() for path, leaf in leaves(branch, f"{key}/{name}").items()
    }


def check_results(path: str | Path, truth: dict[str, np.ndarray]) -> int:
    """Recomputes a results JSON from the CSV beside it and truth; gives how many figures were compared."""
    saved = leaves(json.loads(Path(path).read_text())["metrics"])
    predictions = evaluation.read_predictions(Path(path).with_suffix(".csv"))
    computed = leaves(models.json_ready(evaluation.measure(predictions, truth)))
    assert saved.keys() == computed.keys()
    for key, value in computed.items():
        assert saved[key] == pytest.approx(value, abs=2e-6), key
    return len(saved)


LONG = 300  # seconds that a busy machine may take for what takes five


def until(condition: Callable[[], object]) -> bool:
    end = time.time() + LONG
    while not condition() and time.time() < end:
        time.sleep(0.02)
    return bool(condition())


class Forked:
    """A script's function in a process and session of its own, all imported already; its output in files."""

    def __init__(self, logs: Path, script: str, function: Callable, **environment: object):
        logs.mkdir(exist_ok=True)
        self.logs, self.code = logs, None
        for stream in ("stdout", "stderr"):
            (logs / stream).write_text("")
        self.pid = os.fork()
        if self.pid == 0:
            self._be_the_child(script, function, environment)

    def _be_the_child(self, script, function, environment):
        code = 1
        try:
            os.setsid()
            os.environ.update({name: str(value) for name, value in environment.items()})
            for stream, number in (("stdout", 1), ("stderr", 2)):
                os.dup2(os.open(self.logs / stream, os.O_WRONLY), number)
                setattr(sys, stream, os.fdopen(number, "w", buffering=1))
            for number in data.STOPS:  # heeded, even where these tests run under nohup
                signal.signal(number, signal.SIG_DFL)
            data.run_script(script, function)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except Exception:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            os._exit(code)

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self) -> int:
        assert until(self.ended)
        return self.code

    def said(self, stream: str) -> str:
        return (self.logs / stream).read_text()

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


def two_ranks(logs: Path, script: str, function: Callable) -> list[Forked]:
    """The function in two processes of a gloo group, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Forked(logs / f"rank{rank}", script, function, RANK=rank, LOCAL_RANK=rank, **group) for rank in (0, 1)
    ]


@pytest.fixture
def corpus(monkeypatch, tmp_path):
    """PercePiano of ten segments of four players (one a score rendering): 0-3 train, 4-5 and 6-7 validate in
    fold 0 and 1, 8-9 test, of which 9 has no labels. Ratings follow the column `velocity`."""
    rng, items = np.random.default_rng(1), {}
    for segment, player in itertools.product(range(10), ("1", "2", "4", "Score")):
        name = f"Schubert_D960_mv2_8bars_{player}_{segment:02d}"
        notes = int(rng.integers(12, 30))
        x = rng.normal(0, 0.1, (notes, len(COLUMNS))).astype(np.float32)
        x[:, COLUMNS.index("velocity")] = level = rng.random()
        item = {"name": name, "x": x, "voice": np.ones(notes, int), "matched": np.ones(notes, bool)}
        item |= {"beat": np.arange(notes) // 3, "measure": np.arange(notes) // 9}
        items[name] = item | {"match_rate": 1.0, "stats": np.zeros(2, np.float32)}
        if segment != 9:
            items[name]["y"] = np.linspace(0.2 * level, level, 19).astype(np.float32)
    made = SimpleNamespace(root="fake", synthetic=True, items=items, columns=COLUMNS, left_out=[])
    made.stat_names = ["midi:a", "harmony:b"]

    def parts(corpus, split, fold, keep_overlap=False, keep_misaligned=False):
        where = {"train": range(4), "valid": range(4 + 2 * fold, 6 + 2 * fold), "test": (8, 9)}
        return {part: [n for n in items if int(n[-2:]) in segments] for part, segments in where.items()}

    monkeypatch.setattr(evaluation, "load_percepiano", lambda *a, **k: made)
    monkeypatch.setattr(evaluation, "synthetic_percepiano", lambda cache: "synthetic")
    monkeypatch.setattr(evaluation, "percepiano_parts", parts)
    monkeypatch.setattr(evaluation, "prepare_han", lambda corpus, names, data: [items[n] for n in names])
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def speech(monkeypatch, tmp_path):
    """Three days of two blocks of four trials, one more in test and competition. Trial 2 is too short."""
    rng = np.random.default_rng(3)
    blocks = [(1, "train")] * 4 + [(2, "train")] * 4 + [(3, "test"), (4, "competition")]
    day, block, part = zip(*((day, *rest) for day in range(3) for rest in blocks), strict=True)
    lengths = rng.integers(40, 90, len(day))
    lengths[2] = 5
    labels = [rng.integers(1, 41, 6)[: 0 if p == "competition" else 6] for p in part]
    about = {"days": list(DAYS), "channels": 4, "root": Path("memory"), "synthetic": True, "left_out": []}
    arrays = {"day": np.array(day), "block": np.array(block), "part": np.array(part)}
    arrays |= {"features": rng.standard_normal((lengths.sum(), 4), np.float32)}
    arrays |= {"offsets": np.append(0, lengths.cumsum())}
    ids = [f"trial{i:02d}" for i in range(len(day))]
    made = data.SpeechCorpus(labels=labels, text=["the voice"] * len(day), ids=ids, **arrays, **about)
    monkeypatch.setattr(evaluation, "open_speech", lambda *a, **k: made)
    monkeypatch.setattr(evaluation, "synthetic_speech", lambda cache: "synthetic")
    monkeypatch.chdir(tmp_path)
    return made
