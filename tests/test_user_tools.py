"""What a user meets: help texts, slips, and every tool of eval.py on runs that the trainers wrote."""

import argparse
import re
from pathlib import Path

import pytest
from test_report import Page
from test_train import TRAINERS, command, write_corpus

import data
import eval as evaluation
import models
import pretrain_ast

TOOLS = {f"{name}.py": trainer.parse_args for name, trainer in TRAINERS.items()}
COMMANDS = [(evaluation.main, "eval.py", name) for name in [*evaluation.COMMANDS, "--attention a.png"]]
COMMANDS += [(data.main, "data.py", name) for name in data.COMMANDS]
for main, script, name in COMMANDS:
    TOOLS[f"{script} {name}"] = lambda argv, main=main, name=name: main([*name.split(), *argv])


@pytest.mark.parametrize("tool", TOOLS)
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
    assert len(first) == 5 if tool.removesuffix(".py") in TRAINERS else len(first) <= 7
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


MORE = dict.fromkeys(("train_han", "pretrain_ast"), "--split random --keep-overlap")  # items enough to draw


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """As of test_train; of speech more trials, so that a comparison has some to draw from."""
    root, others = tmp_path_factory.mktemp("speech"), write_corpus(tmp_path_factory)
    data.synth_speech(root / "in", days=2, trials=20, bins=5.0)
    speech = ["--data", str(root / "in"), "--cache", str(root)]
    return lambda name: speech if name == "train_decoder" else others(name)


@pytest.fixture(scope="module")
def best(corpus, tmp_path_factory):
    """{(trainer, seed): best.pt} of two short runs of each."""
    out, found = tmp_path_factory.mktemp("runs"), {}
    for name, trainer in TRAINERS.items():
        for seed in (7, 8):
            argv = command(name, corpus, out, f"--seed {seed} --name {name}{seed}", MORE.get(name, ""))
            folder = trainer.main(trainer.parse_args(argv))["folder"]
            found[name, seed] = str(Path(folder) / "best.pt")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_han", "pretrain_ast"])
def test_report_stands_alone(name, corpus, best, tmp_path, monkeypatch):
    if name != "train_han":  # one page with pixels is enough
        monkeypatch.setattr(evaluation, "inline_figure", lambda figure, alt: alt)
    out, run = tmp_path / "report.html", str(Path(best[name, 7]).parent)
    result = evaluation.main(["report", "--run", run, "--out", str(out), *corpus(name)[2:]])
    page = Page(out)  # tags balanced, nothing from outside
    assert result["verdict"] in page.text
    assert "SYNTHETIC" in page.text
    assert page.row("loss")[1] == TRAINERS[name].LOSS.__name__
    assert str(tmp_path) not in page.text


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_two_runs_are_compared(name, corpus, best, capsys):
    compare = ["compare", *corpus(name), "--device", "cpu", "--draws", "200", "--a", best[name, 7], "--b"]
    result = evaluation.main([*compare, best[name, 8]])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == result["verdict"]
    assert re.match("A (is better than|is worse than|cannot be told from) B: ", result["verdict"])
    assert result["difference"] == pytest.approx(result["a"] - result["b"])
    assert result["interval"][0] <= result["difference"] <= result["interval"][1]
    assert any("SYNTHETIC" in line for line in said)
    assert result["items"] > 2
    assert len(result["per_dimension"]["p_holm"]) == (0 if name == "train_decoder" else 19)
    assert evaluation.main([*compare, best[name, 7]])["difference"] == 0
