"""eval.py report and curves: a page that needs nothing from outside, whose numbers are those of evaluate."""

import csv
import json
import re
from functools import partial
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLUMNS, DAYS, refusal

import eval as evaluation
from data import LABELS, PHONEMES, speech_rules
from eval import RATINGS
from models import AST, HAN, GRUDecoder, save_checkpoint

STEPS = [
    {"step": 10, "loss": 0.5, "norm": 2.0, "lr": 1e-3, "skipped": {"bad": 0, "overflow": 0}},
    {"step": 15, "skip": "bad", "names": ["item <b>"], "skipped": {"bad": 1, "overflow": 0}},
]
RATED = [
    *STEPS,
    {"step": 20, "loss": 0.4, "valid_loss": 0.02, "valid_r2": 0.25, "valid_pearson": 0.5, "spread": 0.7},
    {"step": 40, "loss": 0.4, "valid_loss": 0.03, "valid_r2": 0.35, "valid_pearson": 0.5, "spread": 0.7},
]
MASKED = [*STEPS, {"step": 20, "valid_loss": 5.0, "valid_accuracy": 0.125, "valid_mse": 0.1}]
DECODED = [*STEPS, {"step": 20, "valid_loss": 2.0, "valid_per": 0.625, "valid_blank_fraction": 0.5}]


class Page:
    """Headings, rows of cells and text of a page, in which nothing could reach outside."""

    def __init__(self, path: str | Path = "r.html"):
        text = Path(path).read_text(encoding="utf-8")
        assert not re.search(
            r"https?://|@import|url\(|<script|javascript:|<link|<iframe|<object|\son\w+=", text
        )
        assert set(re.findall(r'src="([^,"]*)', text)) <= {"data:image/png;base64"}
        for tag in ("table", "tr", "td", "div", "p", "h2"):
            assert len(re.findall(rf"<{tag}\b", text)) == text.count(f"</{tag}>")
        self.headings, self.text = re.findall("<h2>(.*?)</h2>", text), unescape(re.sub("<[^>]*>", " ", text))
        self.rows = []
        for row in re.findall("<tr>(.*?)</tr>", text):
            self.rows.append([unescape(cell) for cell in re.findall("<td>(.*?)</td>", row)])

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row[0] == name)


def run(name: str, records: list[dict], data: str | None = None, **options) -> str:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"data": data, "seed": 7, "git_sha": "abcdef", **options}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def save(folder: str, task: str, model: torch.nn.Module, about: dict, seed: int = 7) -> str:
    ckpt = dict.fromkeys(("optimizer", "scheduler", "scaler", "ema", "rng", "git_sha", "best", "skipped"))
    ckpt |= {"task": task, "model_args": model.model_args, "model": model.state_dict(), "step": 3, "epoch": 1}
    save_checkpoint(Path(folder) / "best.pt", ckpt | {"args": {"seed": seed}, "data": about})
    return folder


def rating_run(name: str, fold: int = 0, seed: int = 7, synthetic: bool = True, **options) -> str:
    torch.manual_seed(seed)
    folder = run(name, RATED, pooled=False, model="han", fold=str(fold), seed=seed, **options)
    known = {"features": "full", "columns": COLUMNS, "labels": list(LABELS), "split": "segment", "fold": fold}
    known |= {"keep_overlap": False, "synthetic": synthetic}
    return save(folder, "han", HAN(input_size=len(COLUMNS), size=8, heads=2), known, seed)


def decoder_run(name: str, seed: int = 7) -> str:
    torch.manual_seed(seed)
    model = GRUDecoder(channels=4, days=3, hidden=6, layers=1, kernel=6, stride=2, smooth_taps=5)
    torch.nn.init.normal_(model.fc_decoder_out.weight)
    about = {"days": DAYS, "channels": 4, "phonemes": list(PHONEMES), "rules": speech_rules()}
    about |= {"valid": "blocks", "synthetic": True}
    return save(run(name, DECODED, kernel=6, seed=seed), "decoder", model, about, seed)


@pytest.fixture(autouse=True)
def _quick(monkeypatch, request):
    """Pixels take seconds: test_user_tools draws them."""
    monkeypatch.setattr(evaluation, "inline_figure", lambda figure, alt: f'<img alt="{alt}">')
    monkeypatch.setattr(evaluation, "draw_ratings", lambda *_: None)
    if "curves" not in request.node.name:
        monkeypatch.setattr(evaluation, "draw_curves", lambda *_: None)
    monkeypatch.setattr(evaluation, "cluster_bootstrap", partial(evaluation.cluster_bootstrap, n=20))


def report(*runs: str, more: tuple = ()) -> dict:
    return evaluation.main(["report", "--run", *runs, "--out", "r.html", "--device", "cpu", *more])


def test_page_of_ratings_holds_the_figures_of_evaluate(corpus):
    runs = [rating_run("f0"), rating_run("f0_s8", 0, 8), rating_run("f1", 1)]
    expected = evaluation.main(["--ckpt", *(f"{path}/best.pt" for path in runs), "--device", "cpu"])["valid"]
    made = report(*runs)
    assert made["figures"] == expected
    page, mean = Page(), expected["all"]["mean"]
    for heading in ("Training curves", "By rating", "calibration", "Worst and best items", "Configuration"):
        assert any(heading in title for title in page.headings)
    heads = [row for row in page.rows if row[0].endswith(": fold")]
    assert [head[0] for head in heads] == ["all: fold", "without score renderings: fold"]
    figures = dict(zip(heads[0], page.row("mean"), strict=True))
    assert [figures[metric] for metric in evaluation.METRICS] == [
        f"{mean[metric]:.4f}" for metric in evaluation.METRICS
    ]
    for d, label in enumerate(LABELS):
        values = [mean["per_dimension"][metric][d] for metric in evaluation.METRICS]
        assert page.row(RATINGS[label])[1:] == [f"{value:.4f}" for value in values]
    assert f"r2 {mean['r2']:.4f}" in made["verdict"]
    assert page.text.count(made["verdict"]) == page.text.count("SYNTHETIC") == 1
    assert page.row("seed")[1:] == ["7", "8", "7"]


@pytest.mark.slow
def test_a_metric_added_to_the_table_is_on_the_page(corpus, monkeypatch):
    monkeypatch.setitem(evaluation.METRICS, "bias", lambda y, p: (p - y).mean(0))
    path = rating_run("f0")
    made = report(path)
    bias = made["figures"]["all"]["mean"]["bias"]
    assert f"bias {bias:.4f}" in made["verdict"]
    assert dict(zip(Page().row("all: fold"), Page().row("mean"), strict=True))["bias"] == f"{bias:.4f}"
    names = [n for n in corpus.items if int(n[-2:]) in (4, 5)]
    y, items = np.stack([corpus.items[n]["y"] for n in names]), [corpus.items[n] for n in names]
    p = evaluation.predict_han(evaluation.load_checkpoint(f"{path}/best.pt")[0], items, torch.device("cpu"))
    error = ((p - y.astype(float)) ** 2).mean(1)
    listed = [row for row in Page().rows if row[0] in names]
    assert listed[0] == [names[error.argmax()], "0", f"{error.max():.4f}"]
    assert listed[-1] == [names[error.argmin()], "0", f"{error.min():.4f}"]
    monkeypatch.setattr(evaluation, "RESULTS", Path("results"))
    evaluation.main(["--ckpt", f"{path}/best.pt", "--save-results", "full", "--device", "cpu"])
    results = evaluation.main(["report", "--out", "r.html"])["figures"]["han_full_segment"]
    mean = results["valid"]["all"]["mean"]
    assert "PercePiano from score and MIDI, SYNTHETIC, segment" in Page().headings
    last = len(evaluation.METRICS)
    assert Page().row("full")[1 : last + 1] == [f"{mean[key]:.4f}" for key in evaluation.METRICS]
    assert Page().row(RATINGS[LABELS[1]])[last] == f"{mean['per_dimension']['bias'][1]:.4f}"


def test_page_of_the_results_that_come_with_the_repository(tmp_path):
    made = evaluation.main(["report", "--out", str(tmp_path / "new" / "r.html")])
    page = Page(tmp_path / "new" / "r.html")
    mean = made["figures"]["han_floor_segment"]["valid"]["all"]["mean"]
    assert page.headings[0] == "PercePiano from score and MIDI, segment"
    assert {"PercePiano from sound, RENDERED, segment", "Speech, SYNTHETIC, test"} <= set(page.headings)
    row, known = page.row("floor"), mean["per_dimension"]
    assert row[1 : len(known) + 1] == [f"{mean[key]:.4f}" for key in known]
    assert evaluation.brackets(mean["r2_interval"]) in row
    assert len(page.row("published")) == len(row)
    assert page.row("raters' limit")[1] == "0.7198"
    of_rating = page.row(RATINGS["Articulation_Long_Short"])
    assert of_rating[0] == "Articulation: Short … Long"
    assert of_rating[-1] == "0.7118"
    assert str(tmp_path) not in page.text


def test_page_of_a_decoder_holds_the_figures_of_evaluate(speech):
    paths = [decoder_run("a"), decoder_run("b", 8)]
    expected = evaluation.main(
        ["--ckpt", *(f"{path}/best.pt" for path in paths), "--csv", "t.csv", "--device", "cpu"]
    )
    figures = report(*paths)["figures"]
    assert figures == {key: expected[key] for key in figures}
    page = Page()
    for day, f in figures["by_day"].items():
        counts = [str(f[key]) for key in ("sub", "del", "ins", "labels", "trials")]
        assert page.row(day)[1:] == [f"{f['per']:.4f}", *counts]
    with open("t.csv", newline="") as file:
        decoded = {row["trial"]: row for row in csv.DictReader(file)}
    sides = ("reference", "hypothesis")
    spoken = [[[*map(PHONEMES.index, row[side].split())] for row in decoded.values()] for side in sides]
    for substitution in evaluation.substitutions(*spoken):
        assert list(map(str, substitution)) in page.rows
    errors = {t: sum(int(r[key]) for key in evaluation.EDITS) for t, r in decoded.items()}
    worst = max(errors.values())  # every trial has six labels
    row = next(row for row in reversed(page.rows) if row[0] in decoded)
    assert errors[row[0]] == worst
    assert row[1:] == [decoded[row[0]][side] for side in sides]


def test_pages_of_a_pretraining_without_scores_and_of_another_part(corpus):
    path = run("p", MASKED, task="pretrain", model="ast", data="gone")
    model = AST(frames=64, width=16, depth=1, heads=2)
    assert report(save(path, "ast", model, {"synthetic": False}))["figures"] is None
    assert "SYNTHETIC" not in Page().text
    bare = run("bare", RATED, pooled=False, model="bilstm")
    with Path(bare, "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')
    assert report(bare, more=("--no-data",))["figures"] is None
    assert Page().row("model") == ["model", "bilstm"]
    assert "part test" in report(rating_run("f0"), more=("--part", "test"))["verdict"]


def test_names_are_escaped(corpus):
    path = rating_run(
        '<script>&"$_\udcff', **{"<b>": ["</table>"], "cache": "/home/me/all mine/c", "lr": 2.5e-5}
    )
    assert report(path, more=("--no-data", "--cache=/home/me/all mine/c"))["figures"] is None
    assert (Page().row("<b>")[1], Page().row("cache")[1]) == ("['</table>']", "c")
    assert Page().row("lr")[1] == "2.5e-05"
    assert "/me/" not in Page().text
    assert escape("<script>") in Path("r.html").read_text()


def test_curves_of_runs_in_one_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = []
    monkeypatch.setattr(evaluation, "save_figure", lambda figure, out: figures.append(figure))
    again = [{"step": 41, "loss": 9.0}, {"step": 41, "loss": 3.0}]  # a resumed run's step
    paths = run("a", RATED + again), run("b", DECODED, data="real")
    assert evaluation.main(["curves", "--run", *paths, "--out", "c.svg"]).keys() == set(paths)
    lines = {axes.get_title(loc="left"): axes.lines for axes in figures[0].axes}
    assert lines["valid_r2"][0].get_xydata().tolist() == [[20, 0.25], [40, 0.35]]
    assert lines["loss"][0].get_xydata().tolist() == [[10, 0.5], [20, 0.4], [40, 0.4], [41, 3]]
    assert lines["skipped"][0].get_xydata().tolist() == [[10, 0], [15, 1]]
    assert [line.get_label() for line in lines["loss"]] == ["runs/a, SYNTHETIC data", "runs/b"]
    assert figures[0].axes[-1].get_ylim()[1] > 0.5  # whole steps are skipped


@pytest.mark.parametrize(
    ("runs", "more", "name"),
    [
        ("f0", "--out r.pdf", "r.pdf"),
        ("none", "", "runs/none"),
        ("real", "", "--data"),
        ("f0 d", "", "best.pt"),
        ("d", "--part test", "--part test"),
        ("empty", "", "runs/empty"),
    ],
)
def test_bad_command_lines_are_refused(runs, more, name, corpus, speech, capsys):
    rating_run("f0")
    rating_run("real", synthetic=False)
    decoder_run("d")
    run("empty", [], model="han")
    speech.labelled[:] = False
    paths = [f"runs/{run}" for run in runs.split()]
    assert name in refusal(["report", "--run", *paths, "--out", "r.html", *more.split()], capsys)
    assert not Path("r.html").exists()
