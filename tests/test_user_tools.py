"""What a user meets: help texts, slips, and every tool of eval.py on runs that the trainers wrote."""

import argparse
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
import models
import pretrain_ast
import train_decoder
import train_han

TRAINERS = {"train_han.py": train_han, "train_decoder.py": train_decoder, "pretrain_ast.py": pretrain_ast}
TOOLS = {name: trainer.parse_args for name, trainer in TRAINERS.items()}
COMMANDS = [(evaluation.main, "eval.py", name) for name in [*evaluation.COMMANDS, "--attention a.png"]]
COMMANDS += [(data.main, "data.py", name) for name in data.COMMANDS]
for main, script, command in COMMANDS:
    run = lambda main, command, argv: main([*command.split(), *argv])  # noqa: E731
    TOOLS[f"{script} {command}"] = functools.partial(run, main, command)
every_tool = pytest.mark.parametrize("tool", TOOLS)


@every_tool
def test_help_explains_every_option(tool, monkeypatch):
    caught = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self, *_: caught.append(self))
    with pytest.raises(SystemExit) as stop:
        TOOLS[tool](["--help"])
    assert stop.value.code == 0
    (parser,) = caught
    text = parser.format_help()
    assert "python " in text
    first = re.findall("^  --", text.partition("\noptions:\n")[2].partition("\n\n")[0], re.M)
    assert len(first) == 5 if tool in TRAINERS else len(first) <= 7
    assert [action.dest for action in parser._actions if not action.help] == []


@pytest.mark.parametrize(
    ("script", "argv", "named"),
    [
        ("eval.py", [], "evaluate, predict"),
        ("eval.py", ["florr"], "florr"),
        ("eval.py", ["floor", "--task", "hann"], "hann"),
        ("data.py", ["fbank"], "--data"),
        ("eval.py", ["ceiling", "--qqqq=3"], "--qqqq"),
    ],
)
def test_slips_are_refused_in_a_line_after_the_usage(script, argv, named, capsys):
    main = {"eval.py": evaluation.main, "data.py": data.main}[script]
    with pytest.raises(SystemExit) as stop:
        data.run_script(script, lambda: main(argv))
    assert stop.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert len(usage) <= 1
    assert named in line


def test_a_run_ends_with_the_next_command(capsys):
    args = argparse.Namespace(data="my data")
    models.launch(lambda _: {"folds": [{"folder": "runs/a"}, {"folder": "b"}]}, args)
    assert (
        capsys.readouterr().out == "next: python eval.py --ckpt runs/a/best.pt b/best.pt --data 'my data'\n"
    )
    models.launch(lambda _: {"folder": "runs/a"}, args, pretrain_ast.AFTER["pretrain"])
    words = capsys.readouterr().out.split()
    assert words[-4:] == ["--data", "PERCEPIANO", "--init", "runs/a/best.pt"]


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
    data.synth_speech(root / "speech", days=2, trials=20, bins=5.0)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["han", "ast"])
def test_report_stands_alone(kind, made, tmp_path, monkeypatch):
    if kind != "han":  # one page with pixels is enough
        monkeypatch.setattr(evaluation, "inline_figure", lambda figure, alt: alt)
    out = tmp_path / "report.html"
    result = evaluation.main(["report", "--run", made.runs[kind, "a"], "--out", str(out), *made.common])
    page = Page(out)  # tags balanced, nothing from outside
    assert result["verdict"] in page.text
    assert "SYNTHETIC" in page.text
    assert page.row("loss")[1] == SETTINGS[kind][0].LOSS.__name__
    assert str(tmp_path) not in page.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_two_runs_are_compared(kind, made, capsys):
    compare = ["compare", *made.data(kind), *made.common, "--draws", "200", "--a", made.best(kind), "--b"]
    result = evaluation.main([*compare, made.best(kind, "b")])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == result["verdict"]
    assert re.match("A (is better than|is worse than|cannot be told from) B: ", result["verdict"])
    assert result["difference"] == pytest.approx(result["a"] - result["b"])
    assert result["interval"][0] <= result["difference"] <= result["interval"][1]
    assert any("SYNTHETIC" in line for line in said)
    assert result["items"] > 2
    assert len(result["per_dimension"]["p_holm"]) == (0 if kind == "decoder" else 19)
    assert evaluation.main([*compare, made.best(kind)])["difference"] == 0
