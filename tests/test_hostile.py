"""Hostile inputs: whoever reads a stranger's file says in one line what is wrong with it, and ends with 2.

PYTHONPATH=. python tests/test_hostile.py    the table of what is tried: how each ended, in how many seconds
"""

import argparse
import contextlib
import io
import itertools
import os
import runpy
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from conftest import refused

import data
import eval as evaluation
import models


def stop(problem):
    raise data.DataError(problem)


READERS = {  # name of a file of the kind, and what reads it
    "score": ("x.musicxml", data.read_musicxml),
    "midi": ("x.mid", data.read_midi),
    "sound": ("x.wav", data.read_sound),
    "labels": (data.MEAN_FILE, lambda path: data.read_labels(path.parent)),
    "run": ("metrics.jsonl", lambda path: evaluation.read_run(path.parent)),
    "trial": ("x.npy", lambda path: evaluation._npy_corpus([path], 2, False, stop)),
    "mat": ("t12.2022.01.01.mat", lambda path: [*data._read_mat(path, 2, {}, [])]),
    "pickle": ("ptDecoder_ctc", data._load_pickle),
    "predictions": ("x.csv", evaluation.read_predictions),
    "checkpoint": ("x.pt", models.load_checkpoint),
}
SHAPES = {  # of no file that any reader wants
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "missing": lambda path: None,
    "empty": Path.touch,
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 16),
    "8 GB of zeros": lambda path: (path.touch(), os.truncate(path, 2**33)),
}


def zipped(entries: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def mat(kind: int, content: bytes) -> bytes:
    return b"MATLAB 5.0".ljust(124) + b"\0\1IM" + struct.pack("<II", kind, len(content)) + content


def flac(samples: int) -> bytes:
    """A file whose head says that it holds so many samples."""
    file = io.BytesIO()
    soundfile.write(file, [0.0] * 9000, 44100, format="FLAC")
    return file.getvalue()[:22] + struct.pack(">I", samples) + file.getvalue()[26:]


SCORE = b"<score-partwise>%s</score-partwise>"
# fmt: off
CONTENTS = {
    ("score", "entities"): b'<!DOCTYPE x [<!ENTITY a "aaaa">]>' + SCORE % b"&a;",
    ("score", "200,000 elements nested"): SCORE % (b"<a>" * 200_000 + b"</a>" * 200_000),
    ("score", "zip bomb"): zipped({"x.musicxml": bytes(2**27)}),
    ("score", "divisions of 10**9"): SCORE % b"<part><divisions>1000000000</divisions><measure/></part>",
    ("midi", "10**9 bytes of track"): b"MThd\0\0\0\6\0\1\0\1\1\xe0MTrk\x3b\x9a\xca\0",
    ("labels", "10**6 lists nested"): b"[" * 10**6,
    ("labels", "a key twice"): b'{"Schubert_D960_mv2_8bars_1_1": %b, "Schubert_D960_mv2_8bars_1_1": %b}'
                               % ((str([0.5] * 20).encode(),) * 2),
    ("labels", "escapes"): b'{"\\u001b[2J\\n": [1]}',
    ("run", "torn lines alone"): b'{"step": 1, "lo\n{"step"',
    ("mat", "zlib bomb"): mat(15, zlib.compress(struct.pack("<II", 14, 2**27) + bytes(2**27))),
    ("mat", "10**5 elements of no kind"): mat(0, b"") + bytes(8 * 10**5),
    ("sound", "2 * 10**9 samples"): flac(2 * 10**9),
    ("checkpoint", "zip bomb"): zipped({"x/data.pkl": bytes(2**28)}),
    ("predictions", "a line of 10**6 columns"): b"trial," * 10**6,
}
TYPES = "O8", "V8", "M8", "c16", "f16", "i2,i2", "(200,256)i2", "U99999999", "a", ""
STATES = {"sub-array": b"(N(I200\nI256\nttNN", "fields": b"N(S'a'\nt}S'a'\nN", "order": b"}}}"}
NAMES = ("os system", "posix system", "builtins eval", "builtins getattr", "subprocess Popen", "numpy load",
         "torch load", "numpy.core.multiarray fromfile", "operator attrgetter", "numpy dtype.__init__")
PICKLES = {
    "memo of 2**32": b"\x80\x02Nr\xff\xff\xff\xff.",
    "text of 2**40": b"\x80\x04\x8d\0\0\0\0\0\1\0\0.",
    "bytearray of 2**45": b"\x80\x05\x96\0\0\0\0\0\x20\0\0.",
    "frame of 2**50": b"\x80\x04\x95\0\0\0\0\0\0\4\0N.",
    "persistent name": b"Ps\n.",
    "extension": b"\x82\1.",
    "state of a function": b"c_codecs\nencode\nN}S'__code__'\nNs\x86b.",
    "a class called": b"cnumpy\nndarray\n((I4\ntS'O'\ntR.",
    "10**5 lists nested": b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "empty stack": b".",
    "negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "number of 5,000 digits": b"I" + b"9" * 5000 + b"\n.",
    "no dictionary": b"I5\n.",
    "a set of lists": b"\x80\x04\x8f(]]\x90.",
    "bytes from nothing": b"\x80\x04(X\x00\x10\x00\x00" + b"a" * 4096 + b"S'latin1'\nt\x940]("
                          + b"c_codecs\nencode\nh\0R" * 9000 + b"e.",
}
DECODER_SIZES = "channels", "days", "hidden", "layers", "classes", "kernel", "stride", "smooth_taps"
ODD_SIZES = [{"bidirectional": 7}, {"dropout": 1e300}, {"smooth_width": "wide"}, {"hidden": [8] * 9}]
HAN_SIZES = {"heads": 0}, {"layers": [10**9] * 4}, {"size": 10**6}, {"stats_size": 10**8}, {"head_size": -5}
AST_SIZES = {"depth": 10**7}, {"frames": 10**9}, {"mel": 10**8}, {"stride": 0}, {"heads": 0}
# fmt: on


def nested_key(depth: int) -> bytes:
    """A dictionary whose key takes 2**depth steps to hash."""
    return b"\x80\x02}" + b")" + b"2\x86" * depth + b"Ns."


def hostile_pickles() -> dict[str, bytes]:
    scalar = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'%b'\nI0\nI1\ntR%bS'AAAAAAAA'\ntR."
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I9\nt"
    array += b"cnumpy\ndtype\n(S'%b'\nI0\nI1\ntRI00\nS'AAAAAAAA'\ntb."
    found = {f"scalar of {name}": scalar % (name.encode(), b"") for name in TYPES}
    found |= {f"array of {name}": array % name.encode() for name in TYPES}
    for name, state in STATES.items():
        found[f"i2 with {name}"] = scalar % (b"i2", b"(I3\nS'<'\n" + state + b"tb")
    found |= {name: "c{}\n{}\n(S'touch x'\ntR.".format(*name.split()).encode() for name in NAMES}
    return PICKLES | found | {f"key {depth} deep": nested_key(depth) for depth in (30, 48, 60, 10_000)}


def checkpoint(task: str, network: torch.nn.Module, /, **changes) -> bytes:
    file = io.BytesIO()
    content = {"task": task, "format": 1, "model": network.state_dict()}
    content["model_args"] = network.model_args
    torch.save(content | changes, file)
    return file.getvalue()


def small_decoder() -> models.GRUDecoder:
    return models.GRUDecoder(channels=4, days=2, hidden=8, layers=1)


def hostile_checkpoints() -> dict[str, bytes]:
    sizes = ODD_SIZES + [{name: n} for name, n in itertools.product(DECODER_SIZES, (0, -1, 10**5, 10**9))]
    networks = ("decoder", small_decoder(), sizes), ("han", models.HAN(3, size=8, heads=2), HAN_SIZES)
    networks += (("ast", models.AST(width=16, depth=1, heads=2, frames=64), AST_SIZES),)
    found = {}
    for task, model, changes in networks:
        for change in changes:
            found[f"{task}, {change}"] = checkpoint(task, model, model_args=model.model_args | change)
    for change in (
        {"task": "chess"},
        {"task": "han"},
        {"format": 99},
        {"model": None},
        {"model_args": {"depth": 3}},
    ):
        found[str(change)] = checkpoint("decoder", small_decoder(), **change)
    found["a Namespace"] = checkpoint("decoder", small_decoder(), args=SimpleNamespace())
    long = torch.zeros(1).expand(10**9)
    found["weights of 4 GB in 4 bytes"] = checkpoint("decoder", small_decoder(), model={"w": long})
    found["no weights"] = checkpoint("decoder", small_decoder(), model={})
    with zipfile.ZipFile(io.BytesIO(found["no weights"])) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    entries |= {name: nested_key(60) for name in entries if name.endswith("data.pkl")}
    return found | {"key 60 deep": zipped(entries)}


def all_inputs() -> dict[tuple[str, str], object]:
    """(kind of reader, what): what makes the file at a path."""
    made = {(kind, shape): make for kind in READERS for shape, make in SHAPES.items()}
    contents = dict(CONTENTS)
    contents |= {("pickle", name): content for name, content in hostile_pickles().items()}
    contents |= {("checkpoint", name): content for name, content in hostile_checkpoints().items()}
    for key, content in contents.items():
        made[key] = lambda path, content=content: path.write_bytes(content)
    return made


INPUTS = all_inputs()


@pytest.mark.parametrize(("kind", "what"), INPUTS)
def test_a_hostile_input_is_refused_in_one_line(kind, what, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, read = READERS[kind]
    Path("args.json").write_text("{}")
    INPUTS[kind, what](tmp_path / name)
    assert refused(lambda: read(tmp_path / name), capsys, tmp_path).isprintable()
    assert {path.name for path in tmp_path.iterdir()} <= {"args.json", name}


def flips(count: int, folder: Path) -> tuple[int, int]:
    """Of checkpoints with one bit flipped: how many are refused, and how many read with changed weights."""
    whole = checkpoint("decoder", small_decoder())
    (folder / "x.pt").write_bytes(whole)
    before = models.load_checkpoint(folder / "x.pt")[0]
    refusals = changed = 0
    for k in range(count):
        flipped = bytearray(whole)
        flipped[(k * 7919 + 64) % len(whole)] ^= 1 << k % 8
        (folder / "x.pt").write_bytes(flipped)
        try:
            model, _ = models.load_checkpoint(folder / "x.pt")
        except data.DataError:
            refusals += 1
            continue
        same = [torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True)]
        changed += not (all(same) and model.model_args == before.model_args)
    return refusals, changed


def test_no_flipped_bit_changes_weights_unseen(tmp_path):
    refusals, changed = flips(40, tmp_path)
    assert changed == 0
    assert refusals > 20


def test_what_no_terminal_should_get():
    assert data.printable("a\x1b[2J\r\nb\udcff é – \u202e") == r"a\x1b[2J\r\nb\udcff é – \u202e"
    assert data.printable("é–", "ascii") == r"\xe9\u2013"
    assert str(data.DataError("x\n\x07")) == r"x\n\x07"
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(data.PlainOutput(terminal)):
        print("é\x1b[2J", "b", sep="\n")
    assert terminal.buffer.getvalue() == b"\\xe9\\x1b[2J\nb\n"


def test_no_cell_of_a_csv_is_a_formula(tmp_path):
    evaluation.write_csv(tmp_path / "x.csv", [["=1+1", "@a", "-a", "+b", "−c", "-0.5", -0.5, "plain"]])
    assert (tmp_path / "x.csv").read_text() == "'=1+1,'@a,'-a,'+b,'−c,-0.5,-0.5,plain\n"
    evaluation.write_csv(tmp_path / "x.csv", [["a file \udcff", "é"]])  # what a name of no encoding holds
    assert (tmp_path / "x.csv").read_text() == "a file \\udcff,é\n"


def test_without_what_other_systems_lack(tmp_path, monkeypatch):
    """Windows: no fcntl, no os.register_at_fork, no module resource, no os.kill(pid, 0)."""
    lock = SimpleNamespace(locking=lambda *a: calls.append(a), LK_LOCK=1, LK_NBLCK=2)
    calls = []
    monkeypatch.setattr(data, "fcntl", None)
    monkeypatch.setattr(data, "msvcrt", lock, raising=False)
    monkeypatch.delattr(os, "register_at_fork", raising=False)
    with data.locked(tmp_path / "x", wait=False):
        assert [call[1:] for call in calls] == [(2, 1)]
    monkeypatch.setitem(sys.modules, "resource", None)
    assert str(models.peak_memory(torch.device("cpu"))) == "nan"
    (tmp_path / ".x.999999999").touch()
    data.remove_leftovers([*tmp_path.glob(".*")])
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_where_torch_has_apples_gpu(monkeypatch):
    """Simulated: the option takes it, by name alone (the CPU stays the default), and a run starts there."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    apple = runpy.run_path(models.__file__)
    parser = argparse.ArgumentParser()
    apple["run_options"](parser)
    assert [parser.parse_args(line.split()).device for line in ("", "--device mps")] == [
        models.DEVICES[-1],
        "mps",
    ]
    assert apple["set_up"]("mps", 7, exact=False) == (torch.device("mps"), 0, 1)


WINDOWS = """
import os, signal, subprocess, sys, time, torch, torch.distributed, scipy.io, soundfile, sklearn.metrics
sys.modules.update(fcntl=None, resource=None, msvcrt=type(sys)("msvcrt"))
for module, names in {os: "sched_getaffinity fork register_at_fork mkfifo getuid", time: "tzset",
                      signal: "SIGHUP SIGKILL SIGUSR1 pthread_sigmask setitimer"}.items():
    for name in names.split():
        hasattr(module, name) and delattr(module, name)
sys.argv = ["train_han.py"]
import data, eval, models, train_han, train_decoder, pretrain_ast
data.on_stop(signal.default_int_handler)
with data.Interrupt() as stop:
    signal.raise_signal(signal.SIGTERM)
print(len(data.STOPS), len(stop), models.peak_memory(models.torch.device("cpu")))
"""


@pytest.mark.slow
def test_every_script_loads_without_what_windows_lacks():
    ran = subprocess.run(
        [sys.executable, "-c", WINDOWS],
        cwd=Path(models.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert (ran.stdout, ran.stderr) == ("2 1 nan\n", "")


def main() -> None:
    ends = []
    for (kind, what), make in INPUTS.items():
        with tempfile.TemporaryDirectory() as place:
            Path(place, "args.json").write_text("{}")
            make(Path(place, READERS[kind][0]))
            start, said = time.perf_counter(), "READ"
            try:
                READERS[kind][1](Path(place, READERS[kind][0]))
            except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
                said = ("" if isinstance(error, data.DataError) else "TRACEBACK ") + str(error).replace(
                    place, ""
                )
            ends.append((time.perf_counter() - start, said))
            print(f"{kind:12}{what[:40]:42}{ends[-1][0]:6.2f} s  {said[:150]}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        refusals, changed = flips(400, Path(place))
    faults = sum(said.startswith(("READ", "TRACEBACK")) for _, said in ends)
    print(f"{len(ends)} inputs: {faults} not refused in a line, longest {max(ends)[0]:.1f} s")
    print(f"400 bit flips: {refusals} refused, {changed} read with changed weights")


if __name__ == "__main__":
    main()
