"""What a user meets: help texts, slips, and every tool of eval.py on runs that the trainers wrote."""

import argparse
import csv
import functools
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mido
import pytest
from test_report import Page

import data
import eval as evaluation
import pretrain_ast
import train_decoder
import train_han
from data import LABELS

TRAINERS = {"train_han.py": train_han, "train_decoder.py": train_decoder, "pretrain_ast.py": pretrain_ast}
TOOLS = {name: trainer.parse_args for name, trainer in TRAINERS.items()}
COMMANDS = [(evaluation.main, "eval.py", name) for name in [*evaluation.COMMANDS, "--attention a.png"]]
COMMANDS += [(data.main, "data.py", name) for name in data.COMMANDS]
for main, script, command in COMMANDS:
    run = lambda main, command, argv: main([*command.split(), *argv])  # noqa: E731
    TOOLS[f"{script} {command}"] = functools.partial(run, main, command)
every_tool = pytest.mark.parametrize("tool", TOOLS)


# --- help and slips ---


@every_tool
def test_help_explains_every_option(tool, monkeypatch):
    caught = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self, *_: caught.append(self))
    with pytest.raises(SystemExit) as stop:
        TOOLS[tool](["--help"])
    assert stop.value.code == 0
    (parser,) = caught
    assert "python " in parser.format_help()
    assert [action.dest for action in parser._actions if not action.help] == []


SLIPS = [
    ("eval.py", [], "evaluate, predict"),
    ("eval.py", ["florr"], "florr"),
    ("eval.py", ["floor", "--task", "hann"], "hann"),
    ("eval.py", ["curves"], "--run"),
    ("data.py", ["percepinao"], "percepinao"),
    ("data.py", ["fbank"], "--data"),
    ("eval.py", ["ceiling", "--qqqq=3"], "--qqqq"),
]


@pytest.mark.parametrize(("script", "argv", "named"), SLIPS)
def test_slips_are_refused_in_a_line_after_the_usage(script, argv, named, capsys):
    main = {"eval.py": evaluation.main, "data.py": data.main}[script]
    with pytest.raises(SystemExit) as stop:
        data.run_script(script, lambda: main(argv))
    assert stop.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert len(usage) <= 1
    assert named in line


# --- every tool on runs of every trainer ---

HAN = "--split random --keep-overlap --size 8 --heads 2 --batch 8 --epochs 2 --lr 3e-3 --pooled"
AST = "--task finetune --split random --keep-overlap --width 16 --depth 1 --heads 2 --frames 64 --batch 8"
GRU = "--hidden 24 --layers 1 --batch 8 --steps 12 --eval-every 6 --warmup 2 --lr 0.01 --workers 0 --amp off"
SETTINGS = {
    "han": (train_han, HAN, {"a": "", "b": "--seed 8 --dropout 0.5"}),
    "ast": (pretrain_ast, f"{AST} --epochs 1 --lr 1e-3 --workers 0 --amp off", {"a": "", "b": "--seed 8"}),
    "decoder": (train_decoder, GRU, {"a": "", "b": "--seed 8 --kernel 14"}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Small corpora in their public layouts (piano pieces of two seconds) and two short runs a trainer."""
    root = tmp_path_factory.mktemp("tools")
    data.synth_percepiano(root / "piano", segments=8, players=4)
    taken = Counter()
    for path in sorted(root.glob("piano/virtuoso/data/all_2rounds/*.mid")):
        taken[data.segment_of(path.stem)] += 1
        if taken[data.segment_of(path.stem)] > 3:  # three of a segment are enough
            path.unlink()
            continue
        midi = mido.MidiFile(path)
        midi.ticks_per_beat *= 8
        midi.save(path)
    data.synth_speech(root / "speech", days=2, trials=10, bins=5.0)
    runs = {}
    for kind, (trainer, options, runs_of_kind) in SETTINGS.items():
        folder = root / ("speech" if kind == "decoder" else "piano")
        for name, more in runs_of_kind.items():
            where = f"--data {folder} --cache {root / 'cache'} --out {root / 'runs' / kind} --name {name}"
            argv = f"{where} --log-every 2 {options} {more}".split()
            runs[kind, name] = trainer.main(trainer.parse_args(argv))["folder"]
    return SimpleNamespace(
        root=root,
        runs=runs,
        common=["--cache", str(root / "cache"), "--device", "cpu"],
        data=lambda kind: ["--data", str(root / ("speech" if kind == "decoder" else "piano"))],
        best=lambda kind, name="a": str(Path(runs[kind, name]) / "best.pt"),
    )


@pytest.fixture
def rows(made, tmp_path):
    """What `evaluate --csv` says of a run: one dict a line."""

    def read(kind):
        where = [*made.data(kind), *made.common, "--csv", str(tmp_path / "rows.csv")]
        evaluation.main(["evaluate", "--ckpt", made.best(kind), *where])
        with open(tmp_path / "rows.csv", newline="") as file:
            return list(csv.DictReader(file))

    return read


@pytest.mark.parametrize("kind", ["han", "ast"])
def test_files_are_rated_as_the_corpus_is(kind, made, rows, tmp_path, capsys):
    expected = {row["name"]: [float(row[label]) for label in LABELS] for row in rows(kind)}
    name = next(iter(expected))
    files = made.root / "piano/virtuoso/data"
    inputs = ["--midi", str(files / f"all_2rounds/{name}.mid")] + [
        "--score",
        str(files / f"score_xml/{data.score_of(name)}.musicxml"),
    ] * (kind == "han")
    why = ["--explain", str(tmp_path), "--device", "cpu"]
    (record,) = evaluation.main(["predict", "--ckpt", made.best(kind), *inputs, *why])
    assert record["name"] == name
    assert list(record["ratings"].values()) == pytest.approx(expected[name], abs=6e-5)
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_trials_are_decoded_as_the_corpus_is(made, rows):
    expected = {row["trial"]: row["hypothesis"] for row in rows("decoder")}
    records = evaluation.main(
        ["predict", "--ckpt", made.best("decoder"), "--speech", str(made.root / "speech"), *made.common]
    )
    spelt = {record["id"]: record["phonemes"] for record in records}
    assert len(expected) > 2
    assert {trial: spelt[trial] for trial in expected} == expected


@pytest.mark.parametrize("kind", SETTINGS)
def test_report_stands_alone(kind, made, tmp_path):
    out = tmp_path / "report.html"
    run = made.runs[kind, "a"]
    result = evaluation.main(["report", "--run", run, "--out", str(out), *made.common])
    page = Page(out)  # tags balanced, nothing from outside
    assert result["verdict"] in page.text
    assert "SYNTHETIC" in page.text


@pytest.mark.parametrize("kind", SETTINGS)
def test_two_runs_are_compared(kind, made, rows, capsys):
    """The figures are evaluate's, and the last line is the verdict."""
    compare = ["compare", *made.data(kind), *made.common, "--draws", "200", "--a", made.best(kind), "--b"]
    result = evaluation.main([*compare, made.best(kind, "b")])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == result["verdict"]
    assert re.match("A (is better than|is worse than|cannot be told from) B: ", result["verdict"])
    assert result["difference"] == pytest.approx(result["a"] - result["b"])
    assert result["interval"][0] <= result["difference"] <= result["interval"][1]
    assert any("SYNTHETIC" in line for line in said)
    table = rows(kind)
    assert result["items"] == len(table)
    assert len(result["per_dimension"]["p_holm"]) == (0 if kind == "decoder" else 19)
    assert evaluation.main([*compare, made.best(kind)])["difference"] == 0
