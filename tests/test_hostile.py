"""Hostile inputs: whoever reads a stranger's file says in one line what is wrong with it, and ends with 2.

PYTHONPATH=. python tests/test_hostile.py    the table of what is tried: how each ended, in how many seconds
"""

import contextlib
import io
import itertools
import os
import pickle  # noqa: TID251 writes hostile ones, reads none
import struct
import sys
import tempfile
import time
import wave
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import refused

import data
import eval as evaluation
import models

READERS = {  # name of a file of the kind, and what reads it
    "score": ("x.musicxml", data.read_musicxml),
    "midi": ("x.mid", data.read_midi),
    "sound": ("x.wav", data.read_wav),
    "labels": (data.MEAN_FILE, lambda path: data.read_labels(path.parent)),
    "run": ("metrics.jsonl", lambda path: evaluation.read_run(path.parent)),
    "trial": ("x.npy", lambda path: evaluation._read_trial(path, 2)),
    "mat": ("t12.2022.01.01.mat", lambda path: [*data._read_mat(path, 2, {}, [])]),
    "pickle": ("ptDecoder_ctc", data._load_pickle),
    "predictions": ("x.csv", evaluation.read_csv),
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


def zipped(name: str, size: int) -> bytes:
    """An archive of so many zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as entry:
        for _ in range(size >> 20):
            entry.write(bytes(2**20))
    return file.getvalue()


def mat_bomb() -> bytes:
    packed = zlib.compress(struct.pack("<II", 14, 2**28) + bytes(2**28), 9)
    return b"MATLAB 5.0".ljust(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed


def long_wave(rate: int) -> bytes:
    """A header that says ten hours of it follow."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, rate, 0, "NONE", ""))
    return file.getvalue()[:40] + struct.pack("<I", 2**31 - 1)


SCORE = b"<score-partwise>%s</score-partwise>"
CONTENTS = {  # kind, what: bytes
    ("score", "entities"): b'<!DOCTYPE x [<!ENTITY a "aaaa">]>' + SCORE % b"&a;",
    ("score", "200,000 elements nested"): SCORE % (b"<a>" * 200_000 + b"</a>" * 200_000),
    ("score", "zip bomb"): zipped("x.musicxml", 2**27),
    ("score", "divisions of 10**9"): SCORE % b"<part><divisions>1000000000</divisions><measure/></part>",
    ("midi", "10**9 bytes of track"): b"MThd\0\0\0\6\0\1\0\1\1\xe0MTrk\x3b\x9a\xca\0",
    ("labels", "10**6 lists nested"): b"[" * 10**6,
    ("labels", "a key twice"): b'{"Schubert_D960_mv2_8bars_1_1": [1], "Schubert_D960_mv2_8bars_1_1": [1]}',
    ("labels", "escapes"): b'{"\\u001b[2J\\n": [1]}',
    ("run", "torn lines alone"): b'{"step": 1, "lo\n{"step"',
    ("mat", "zlib bomb"): mat_bomb(),
    ("mat", "10**5 elements of no kind"): b"MATLAB 5.0".ljust(124) + b"\0\1IM" + bytes(8 * 10**5),
    ("sound", "sample rate 1"): long_wave(1),
    ("checkpoint", "zip bomb"): zipped("x/data.pkl", 2**29),
    ("predictions", "a line of 10**6 columns"): b"trial," * 10**6,
}


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def nested_key(depth: int) -> bytes:
    return b"\x80\x02}" + b")" + b"2\x86" * depth + b"Ns."


def numpy_type(name: str, state: bytes = b"") -> bytes:
    """A dtype, and what is set on it."""
    return named("numpy", "dtype") + f"(S'{name}'\nI0\nI1\ntR".encode() + state


def hostile_pickles() -> dict[str, bytes]:
    scalar, array = named("numpy.core.multiarray", "scalar"), named("numpy.core.multiarray", "_reconstruct")
    found = {}
    for name in ("O8", "V8", "M8", "c16", "f16", "i2,i2", "(200,256)i2", "U99999999", "a", ""):
        kind = numpy_type(name)
        found[f"scalar of {name}"] = scalar + b"(" + kind + b"S'AAAAAAAA'\ntR."
        filled = (
            b"(" + named("numpy", "ndarray") + b"(I0\ntS'b'\ntR(I1\n(I9\nt" + kind + b"I00\nS'AAAAAAAA'\ntb."
        )
        found[f"array of {name}"] = array + filled
    parts = {"sub-array": b"(N(I200\nI256\nttNN", "fields": b"N(S'a'\nt}S'a'\nN", "order": b"}}}"}
    for name, part in parts.items():
        found[f"i2 with {name}"] = (
            scalar + b"(" + numpy_type("i2", b"(I3\nS'<'\n" + part + b"tb") + b"S'AAAAAAAA'\ntR."
        )
    found |= {f"key {depth} deep": nested_key(depth) for depth in (30, 48, 60, 10_000)}
    modules = {
        "os": "system",
        "posix": "system",
        "builtins": "eval",
        "subprocess": "Popen",
        "numpy": "load",
        "numpy.core.multiarray": "fromfile",
        "torch": "load",
        "operator": "attrgetter",
    }
    for module, name in modules.items():
        found[f"{module}.{name}"] = named(module, name) + b"(S'x'\ntR."
    text = b"(X\x00\x10\x00\x00" + b"a" * 4096 + b"S'latin1'\nt\x940"
    found["bytes from nothing"] = (
        b"\x80\x04" + text + b"](" + (named("_codecs", "encode") + b"h\0R") * 9000 + b"e."
    )
    found |= {
        "memo of 2**32": b"\x80\x02Nr\xff\xff\xff\xff.",
        "text of 2**40": b"\x80\x04\x8d\0\0\0\0\0\1\0\0.",
        "bytearray of 2**45": b"\x80\x05\x96\0\0\0\0\0\x20\0\0.",
        "frame of 2**50": b"\x80\x04\x95\0\0\0\0\0\0\4\0N.",
        "persistent name": b"Ps\n.",
        "extension": b"\x82\1.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
        "state of a function": named("_codecs", "encode") + b"N}S'__code__'\nNs\x86b.",
        "10**5 lists nested": b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        "empty stack": b".",
        "negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
        "number of 5,000 digits": b"I" + b"9" * 5000 + b"\n.",
        "no dictionary": pickle.dumps([1, 2]),
        "a set of lists": b"\x80\x04\x8f(]]\x90.",
    }
    return found


def small_decoder(**sizes) -> dict:
    model = models.GRUDecoder(channels=4, days=2, hidden=8, layers=1)
    rest = {"task": "decoder", "model": model.state_dict(), "format": 1}
    return rest | {"model_args": model.model_args | sizes}


SIZES = [
    {name: size}
    for name, size in itertools.product(
        ("channels", "days", "hidden", "layers", "classes", "kernel", "stride", "smooth_taps"),
        (0, -1, 10**9, 10**5),
    )
]
SIZES += [
    {"bidirectional": 7},
    {"dropout": 10.0**300},
    {"smooth_width": "wide"},
    {"hidden": [8] * 9},
    {"layers": None},
]


def hostile_checkpoints() -> dict[str, bytes]:
    contents = {str(sizes): small_decoder(**sizes) for sizes in SIZES}
    long = torch.zeros(1).expand(10**9)  # four bytes
    contents["weights of 4 GB in 4 bytes"] = small_decoder() | {"model": {"w": long}}
    contents["no weights"] = small_decoder() | {"model": {}}
    han = models.HAN(input_size=3, size=8, heads=2)
    for sizes in (
        {"heads": 0},
        {"layers": [10**9] * 4},
        {"size": 10**6},
        {"stats_size": 10**8},
        {"head_size": -5},
    ):
        rest = {"task": "han", "model": han.state_dict(), "format": 1}
        contents[f"HAN, {sizes}"] = rest | {"model_args": han.model_args | sizes}
    ast = models.AST(width=16, depth=1, heads=2, frames=64)
    for sizes in (
        {"depth": 10**7},
        {"frames": 10**9},
        {"mel": 10**8},
        {"stride": 0},
        {"heads": 0},
        {"groups": [[10**9]]},
    ):
        rest = {"task": "ast", "model": ast.state_dict(), "format": 1}
        contents[f"AST, {sizes}"] = rest | {"model_args": ast.model_args | sizes}
    found = {}
    for name, content in contents.items():
        file = io.BytesIO()
        torch.save(content, file)
        found[name] = file.getvalue()
    hash_bomb = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(found["no weights"])) as source,
        zipfile.ZipFile(hash_bomb, "w") as target,
    ):
        for entry in source.infolist():
            pickled = entry.filename.endswith("data.pkl")
            target.writestr(entry.filename, nested_key(60) if pickled else source.read(entry))
    return found | {"key 60 deep": hash_bomb.getvalue()}


def all_inputs() -> dict[tuple[str, str], object]:
    """(kind of reader, what): what makes the file at a path."""
    made = {(kind, shape): make for kind in READERS for shape, make in SHAPES.items()}
    contents = dict(CONTENTS)
    contents |= {("pickle", name): content for name, content in hostile_pickles().items()}
    contents |= {("checkpoint", name): content for name, content in hostile_checkpoints().items()}
    return made | {
        key: lambda path, content=content: path.write_bytes(content) for key, content in contents.items()
    }


INPUTS = all_inputs()


@pytest.mark.parametrize(("kind", "what"), INPUTS)
def test_a_hostile_input_is_refused_in_one_line(kind, what, tmp_path, capsys):
    name, read = READERS[kind]
    (tmp_path / "args.json").write_text("{}")
    INPUTS[kind, what](tmp_path / name)
    assert refused(lambda: read(tmp_path / name), capsys, tmp_path).isprintable()
    assert {path.name for path in tmp_path.iterdir()} <= {"args.json", name}


def flips(count: int, folder: Path) -> tuple[int, int]:
    """Of checkpoints with one bit flipped: how many are refused, and how many read with changed weights."""
    models.save_checkpoint(folder / "x.pt", small_decoder())
    whole, good = (folder / "x.pt").read_bytes(), small_decoder()["model_args"]
    before = models.load_checkpoint(folder / "x.pt")[0].state_dict()
    refusals = changed = 0
    for k in range(count):
        flipped = bytearray(whole)
        flipped[(k * 7919 + 64) % len(whole)] ^= 1 << k % 8
        (folder / "flipped.pt").write_bytes(flipped)
        try:
            model, _ = models.load_checkpoint(folder / "flipped.pt")
        except data.DataError:
            refusals += 1
            continue
        same = model.model_args == good and all(
            torch.equal(v, before[k]) for k, v in model.state_dict().items()
        )
        changed += not same
    return refusals, changed


def test_no_flipped_bit_changes_weights_unseen(tmp_path):
    refusals, changed = flips(40, tmp_path)
    assert changed == 0
    assert refusals > 20


def test_what_no_terminal_should_get():
    assert data.printable("a\x1b[2J\r\nb\udcff é – \u202e") == r"a\x1b[2J\r\nb\udcff é – \u202e"
    assert data.printable("é–", "ascii") == r"\xe9\u2013"
    assert data.printable(data.DataError("x\n\x07")) == r"x\n\x07"
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(data.PlainOutput(terminal)):
        print("é\x1b[2J", "b", sep="\n")
    terminal.flush()
    assert terminal.buffer.getvalue() == b"\\xe9\\x1b[2J\nb\n"


def test_no_cell_of_a_csv_is_a_formula(tmp_path):
    evaluation.write_csv(tmp_path / "x.csv", [["=1+1", "@a", "-a", "+b", "−c", "-0.5", -0.5, "plain"]])
    assert (tmp_path / "x.csv").read_text() == "'=1+1,'@a,'-a,'+b,'−c,-0.5,-0.5,plain\n"


def test_without_what_other_systems_lack(tmp_path, monkeypatch):
    """Windows: no fcntl, no os.register_at_fork, no module resource, no os.kill(pid, 0)."""
    calls = []
    lock = SimpleNamespace(locking=lambda *a: calls.append(a), LK_LOCK=1, LK_NBLCK=2)
    monkeypatch.setattr(data, "fcntl", None)
    monkeypatch.setattr(data, "msvcrt", lock, raising=False)
    monkeypatch.delattr(os, "register_at_fork", raising=False)
    with data.locked(tmp_path / "x", wait=False) as file:
        file.write(b"a")
    assert [call[1:] for call in calls] == [(2, 1)]
    monkeypatch.setattr(lock, "locking", lambda *_: (_ for _ in ()).throw(PermissionError()))
    with pytest.raises(data.DataError, match="another process"), data.locked(tmp_path / "x", wait=False):
        pass
    (tmp_path / ".x.999999999").touch()
    with monkeypatch.context() as windows:
        windows.setattr(data.os, "name", "nt")
        assert data._is_running(999999999)
    data.remove_leftovers([*tmp_path.glob(".*")])
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    monkeypatch.setitem(sys.modules, "resource", None)
    assert str(models.peak_memory(torch.device("cpu"))) == "nan"


if __name__ == "__main__":
    ends = []
    for (kind, what), make in INPUTS.items():
        with tempfile.TemporaryDirectory() as place:
            Path(place, "args.json").write_text("{}")
            path = Path(place, READERS[kind][0])
            make(path)
            start, said = time.perf_counter(), "read"
            try:
                READERS[kind][1](path)
            except data.DataError as error:
                said = str(error).replace(place, "")
            except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
                said = f"TRACEBACK {error!r}"
            ends.append((kind, what, time.perf_counter() - start, said))
            print(f"{kind:12}{what[:40]:42}{ends[-1][2]:6.2f} s  {said[:150]}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        refusals, changed = flips(400, Path(place))
    print(f"{len(ends)} inputs: {sum('TRACEBACK' in end[3] for end in ends)} tracebacks, "
          f"{sum(end[3] == 'read' for end in ends)} read, longest {max(end[2] for end in ends):.1f} s; "
          f"400 bit flips: {refusals} refused, {changed} read with changed weights")  # fmt: skip
