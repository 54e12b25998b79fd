"""What a user meets: help texts, slips of the keyboard, Ctrl-C, and every tool of eval.py on runs that the trainers wrote."""

import argparse
import csv
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mido
import numpy as np
import pytest
from test_report import Page

import data
import eval as evaluation
import pretrain_ast
import train_decoder
import train_han
from data import LABELS

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = {"train_han.py": train_han, "train_decoder.py": train_decoder, "pretrain_ast.py": pretrain_ast}
TOOLS = {
    **{name: trainer.parse_args for name, trainer in TRAINERS.items()},
    **{
        f"eval.py {name}": functools.partial(lambda name, argv: evaluation.main([name, *argv]), name)
        for name in evaluation.COMMANDS
    },
}
TOOLS |= {
    f"data.py {name}": functools.partial(lambda name, argv: data.main([name, *argv]), name)
    for name in (
        "percepiano",
        "fetch",
        "synth-percepiano",
        "synth-speech",
        "decoder-convert",
        "maestro",
        "render",
        "fbank",
    )
}
TOOLS["eval.py --attention"] = lambda argv: evaluation.main(["--attention", "a.png", *argv])
ALTERNATIVES = {
    "eval.py predict": ("--score", "--midi", "--audio", "--speech"),
    "eval.py --attention": ("--audio", "--midi"),
}  # one of them is required
every_tool = pytest.mark.parametrize("tool", TOOLS)


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parser_of(monkeypatch):
    """The parser whose help a tool prints, in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    caught = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self, *_: caught.append(self))

    def parser(tool):
        with pytest.raises(SystemExit) as stop:
            TOOLS[tool](["--help"])
        assert stop.value.code == 0
        return caught.pop()

    return parser


@every_tool
def test_help_has_examples_and_fits_a_screen(tool, parser_of):
    text = parser_of(tool).format_help()
    script = tool.removesuffix(" evaluate")
    assert len(re.findall(rf"^    (?:python|torchrun .*) ?{re.escape(script)}\b", text, re.MULTILINE)) >= 2
    blocks = re.split(
        r"\n\n(?=[\w ,*-]+:\n)", text
    )  # the description with its examples, then a block a group
    assert all(len(block.splitlines()) <= 50 for block in blocks)
    assert all(len(line) <= 140 for line in text.splitlines())


@every_tool
def test_every_option_says_what_it_does_and_its_default(tool, parser_of):
    for action in parser_of(tool)._actions:
        if action.help in (argparse.SUPPRESS, "show this help message and exit") or not action.option_strings:
            continue
        assert re.match(r"[\w'.<-]", action.help), action.option_strings
        if action.option_strings[0] in ALTERNATIVES.get(tool, ()):
            continue
        assert re.search(r"\w.*\(.+\)", action.help), action.option_strings  # what it is when not given
        if isinstance(action, argparse._StoreTrueAction):
            assert "(off" in action.help, action.option_strings
        if action.required:
            assert "(required)" in action.help, action.option_strings
        elif action.default not in (None, False, True) and "off)" not in action.help:
            assert re.search(
                rf"%\(default\)s|\(.*({re.escape(str(action.default))}|default|absent)", action.help
            ), action.option_strings


def test_overview_names_every_command(capsys):
    assert evaluation.main(["--help"]) == {}
    said = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", said) for name in evaluation.COMMANDS)
    assert len(said.splitlines()) <= 50


# --- slips -----------------------------------------------------------------------------------------------------------


def refusal(script: str, function, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        data.run_script(script, function)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert not said.out
    return said.err


@every_tool
def test_a_mistyped_option_meets_its_neighbour(tool, capsys):
    said = refusal(tool, lambda: TOOLS[tool](["--debgu"]), capsys)
    assert "unknown option '--debgu'; did you mean --debug?" in said
    assert "--help` explains" in said
    assert "--debug" in (said := refusal(tool, lambda: TOOLS[tool](["--qqqq=3"]), capsys))
    assert "unknown option '--qqqq'; expected --help, " in said


@pytest.mark.parametrize(("argv", "found"), [
    ([], "no command; expected evaluate, predict, "), (["florr"], "unknown command 'florr'; did you mean floor? expected evaluate, predict, "),
    (["xyz"], "unknown command 'xyz'; expected evaluate, predict, "), (["floor", "--task", "hann"], "argument --task: unknown choice 'hann'; did you mean han? expected han, ast"),
    (["floor", "--seed", "x"], "argument --seed: invalid int value: 'x'"), (["curves"], "the following arguments are required: --run, --out"),
    (["bench", "han"], "unrecognized arguments: han"), (["--chkpt", "x"], "did you mean --ckpt?"), (["floor", "--keep-"], "ambiguous option: --keep- could match --keep-overlap, --keep-misaligned"),
])  # fmt: skip
def test_slips_are_refused_in_one_line(argv, found, capsys):
    assert found in refusal("eval.py", lambda: evaluation.main(argv), capsys)


@pytest.mark.parametrize(("argv", "found"), [
    ([], "data.py: no command; expected percepiano, fetch, synth-percepiano, "), (["percepinao"], "unknown choice 'percepinao'; did you mean percepiano? expected percepiano, "),
    (["render", "--midi_root", "x"], "data.py render: unknown option '--midi_root'; did you mean --midi-root?"), (["fbank"], "data.py fbank: the following arguments are required: --data, --out"),
])  # fmt: skip
def test_slips_of_data_are_refused_in_one_line(argv, found, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py"])
    assert found in refusal("data.py", lambda: data.main(argv), capsys)


def test_beginnings_of_options_are_understood():
    assert train_han.parse_args(["--drop", "0.3"]).dropout == 0.3
    assert (
        pretrain_ast.parse_args(["--task", "finetune", "--width", "64"]).width == 64
    )  # one that --help does not list


# --- every tool on runs of every trainer -----------------------------------------------------------------------------

SETTINGS = {
    "han": (
        train_han,
        "--split random --keep-overlap --size 8 --heads 2 --batch 8 --epochs 2 --lr 3e-3 --pooled",
        {"a": "", "b": "--seed 8 --dropout 0.5"},
    ),
    "ast": (
        pretrain_ast,
        "--task finetune --split random --keep-overlap --width 16 --depth 1 --heads 2 --frames 64 --batch 8 --epochs 1 --lr 1e-3 --workers 0 --amp off",
        {"a": "", "b": "--seed 8"},
    ),
    "decoder": (
        train_decoder,
        "--hidden 24 --layers 1 --batch 8 --steps 12 --eval-every 6 --warmup 2 --lr 0.01 --workers 0 --amp off",
        {"a": "", "b": "--seed 8 --kernel 14"},
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Small corpora in their public layouts (piano pieces of two seconds, with their audio) and two short runs a trainer."""
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
            argv = [
                "--data",
                str(folder),
                "--cache",
                str(root / "cache"),
                "--out",
                str(root / "runs" / kind),
                "--name",
                name,
                "--log-every",
                "2",
                *options.split(),
                *more.split(),
            ]
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
        evaluation.main(
            [
                "evaluate",
                "--ckpt",
                made.best(kind),
                *made.data(kind),
                *made.common,
                "--csv",
                str(tmp_path / "rows.csv"),
            ]
        )
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
    (record,) = evaluation.main(
        [
            "predict",
            "--ckpt",
            made.best(kind),
            *inputs,
            "--explain",
            str(tmp_path / "why.png"),
            "--device",
            "cpu",
        ]
    )
    assert record["name"] == name
    assert record["ratings"] == pytest.approx(expected[name], abs=6e-5)
    assert (tmp_path / "why.png").read_bytes()[:4] == b"\x89PNG"


def test_trials_are_decoded_as_the_corpus_is(made, rows):
    expected = {row["trial"]: row["hypothesis"] for row in rows("decoder")}
    records = evaluation.main(
        ["predict", "--ckpt", made.best("decoder"), "--speech", str(made.root / "speech"), *made.common]
    )
    spelt = {record["id"]: evaluation.spell(record["phonemes"]) for record in records}
    assert len(expected) > 2
    assert {trial: spelt[trial] for trial in expected} == expected


def test_report_of_all_runs_stands_alone(made, tmp_path, capsys):
    out = tmp_path / "report.html"
    result = evaluation.main(["report", "--run", *made.runs.values(), "--out", str(out), *made.common])
    page = Page(out.read_text(encoding="utf-8"))  # tags balanced, nothing from outside
    titles = [title for title in page.headings if title]
    for section, times in (
        ("Training curves", 5),
        ("Results", 3),
        ("By dimension", 3),
        ("Prediction, rating, calibration", 3),
        ("Worst items", 3),
        ("Error rate by day", 2),
        ("Confusions", 2),
        ("Transcripts", 2),
        ("Skipped updates", 5),
        ("Configuration", 5),
    ):
        assert titles.count(section) == times, section
    assert len(result["verdicts"]) == 5  # seeds of one configuration are one
    assert all(verdict[:20] in page.text for verdict in result["verdicts"])
    assert "SYNTHETIC" in page.text


@pytest.mark.parametrize("kind", SETTINGS)
def test_two_runs_are_compared(kind, made, rows, capsys):
    """The figures are evaluate's, and the last line is the verdict."""
    result = evaluation.main(
        [
            "compare",
            "--a",
            made.best(kind),
            "--b",
            made.best(kind, "b"),
            *made.data(kind),
            *made.common,
            "--draws",
            "200",
        ]
    )
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == result["verdict"]
    assert re.match("A (is better than|is worse than|cannot be told from) B: ", result["verdict"])
    assert result["difference"] == pytest.approx(result["a"] - result["b"])
    assert result["interval"][0] <= result["difference"] <= result["interval"][1]
    assert sum("SYNTHETIC" in line for line in said) > 0
    table = rows(kind)
    if kind == "decoder":
        assert result["trials"] == len(table)
        assert result["a"] == pytest.approx(
            sum(int(row[key]) for row in table for key in ("sub", "del", "ins"))
            / sum(int(row["labels"]) for row in table)
        )
    else:
        assert result["items"] == len(table)
        assert len(result["per_dimension"]["p_holm"]) == 19
    same = evaluation.main(
        [
            "compare",
            "--a",
            made.best(kind),
            "--b",
            made.best(kind),
            *made.data(kind),
            *made.common,
            "--draws",
            "100",
        ]
    )
    assert same["difference"] == 0
    assert same["verdict"].startswith("A cannot be told from B: ")


# --- interruptions ---------------------------------------------------------------------------------------------------


WRITERS = {
    "evaluate": lambda made, out: ["evaluate", "--ckpt", made.best("han"), *made.data("han"), *made.common, "--csv", f"{out}/x.csv"],
    "floor": lambda made, out: ["floor", "--fold", "0", "--model", "ridge", *made.data("han"), *made.common, "--save-results", "x", "--results-dir", str(out)],
    "predict": lambda made, out: ["predict", "--ckpt", made.best("ast"), "--midi", str(next(made.root.glob("piano/virtuoso/data/all_2rounds/*.mid"))), "--device", "cpu", "--csv", f"{out}/x.csv"],
    "report": lambda made, out: ["report", "--run", made.runs["decoder", "a"], "--no-data", "--out", f"{out}/x.html", *made.common],
    "curves": lambda made, out: ["curves", "--run", made.runs["decoder", "a"], "--out", f"{out}/x.png"],
}  # fmt: skip


@pytest.mark.parametrize("command", WRITERS)
def test_ctrl_c_while_writing_leaves_nothing(command, made, tmp_path, monkeypatch, capsys):
    """The signal arrives when the temporary file is whole and not yet in its place."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    monkeypatch.setattr(os, "replace", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        data.run_script("eval.py", lambda: evaluation.main(WRITERS[command](made, tmp_path / "out")))
    signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "eval.py: interrupted"
    assert list((tmp_path / "out").iterdir()) == []


def start(argv: list, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
def test_ctrl_c_while_torch_loads_is_one_line(tmp_path):
    process = start([ROOT / "eval.py", "ceiling", "--cache", "cache"], tmp_path)
    deadline = time.time() + 60
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "eval.py: interrupted\n"
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())


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


def until(condition, seconds: float = 120) -> bool:
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.05)
    return bool(condition())


@pytest.mark.slow
def test_real_ctrl_c_reaches_workers_and_leaves_nothing(tmp_path):
    data.synth_percepiano(tmp_path / "piano", segments=40, players=12)
    process = start(
        [ROOT / "data.py", "percepiano", "--data", "piano", "--cache", "features", "--workers", "2"], tmp_path
    )
    assert until(lambda: len(workers_of(process)) >= 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "data.py: interrupted\n")
    assert not (tmp_path / "features").exists() or not list((tmp_path / "features").iterdir())
    assert until(lambda: not workers_of(process), 20)


@pytest.mark.slow
def test_a_kill_takes_the_workers_along(tmp_path):
    data.synth_percepiano(tmp_path / "piano", segments=40, players=12)
    process = start(
        [ROOT / "data.py", "percepiano", "--data", "piano", "--cache", "features", "--workers", "2"], tmp_path
    )
    assert until(lambda: len(workers_of(process)) >= 2)
    time.sleep(1)  # they start
    process.kill()
    assert until(lambda: not workers_of(process), 60)
    process.communicate(timeout=60)


@pytest.mark.slow
def test_real_ctrl_c_during_a_word_search(made, tmp_path):
    """Workers that a Ctrl-C met while they started once left the command waiting for them for ever."""
    argv = [
        ROOT / "eval.py",
        "--ckpt",
        made.best("decoder"),
        *made.data("decoder"),
        *made.common,
        "--words",
        "--tune",
        "--processes",
        "2",
        "--csv",
        "x.csv",
    ]
    process = start(argv, tmp_path)
    assert until(lambda: len(workers_of(process)) >= 2)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "eval.py: interrupted\n")
    assert not (tmp_path / "x.csv").exists()
    assert until(lambda: not workers_of(process), 20)


@pytest.mark.slow
def test_a_kill_leaves_no_half_output_and_the_same_again_works(made, tmp_path):
    argv = ["curves", "--run", made.runs["han", "a"], "--out", str(tmp_path / "out/x.svg")]
    code = f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport eval\nos.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\neval.main(sys.argv[1:])"
    process = start(["-c", code, *argv], tmp_path)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    (rest,) = (tmp_path / "out").iterdir()
    assert rest.name.startswith(".x.svg.")  # hidden, and never taken for the output
    evaluation.main(argv)
    assert (tmp_path / "out/x.svg").read_bytes().startswith(b"<?xml")
    assert np.isfinite((tmp_path / "out/x.svg").stat().st_size)
