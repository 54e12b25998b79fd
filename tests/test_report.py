"""eval.py report and curves: a page that needs nothing from outside, whose numbers are those of evaluate."""

import json
import re
from functools import partial
from html import escape, unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal

import eval as evaluation
from data import LABELS, PHONEMES, SpeechCorpus, column_names, speech_rules
from models import AST, HAN, GRUDecoder, save_checkpoint

COLUMNS = column_names(evaluation.FEATURES)
DAYS = ["t12.2022.05.01", "t12.2022.05.03"]
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


def run(name: str, records: list[dict], **options) -> str:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"data": None, "seed": 7, "git_sha": "abcdef", **options}))
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
    model = GRUDecoder(channels=4, days=2, hidden=6, layers=1, kernel=6, stride=2, smooth_taps=5)
    torch.nn.init.normal_(model.fc_decoder_out.weight)
    about = {"days": DAYS, "channels": 4, "phonemes": list(PHONEMES), "rules": speech_rules()}
    about |= {"valid": "blocks", "synthetic": True}
    return save(run(name, DECODED, kernel=6, seed=seed), "decoder", model, about, seed)


@pytest.fixture(autouse=True)
def _quick(monkeypatch, request):
    """Pixels take seconds: they are drawn for the page of a decoder alone."""
    if "decoder" not in request.node.name:
        monkeypatch.setattr(evaluation, "inline_figure", lambda figure, alt: f'<img alt="{alt}">')
    monkeypatch.setattr(evaluation, "cluster_bootstrap", partial(evaluation.cluster_bootstrap, n=20))


@pytest.fixture
def corpus(monkeypatch, tmp_path):
    """Segments 2-3 and 4-5 validate in fold 0, 1; 6-7, test, are unrated."""
    rng, items = np.random.default_rng(1), {}
    for segment in range(8):
        for player in ("1", "2", "3", "Score"):
            notes, level = int(rng.integers(12, 30)), rng.random()
            x = rng.normal(0, 0.1, (notes, len(COLUMNS))).astype(np.float32)
            x[:, COLUMNS.index("velocity")] = level
            item = {"x": x, "voice": np.ones(notes, int)}
            item |= {"beat": np.arange(notes) // 3, "measure": np.arange(notes) // 9}
            items[f"A<script>&amp;_8bars_{player}_{segment:02d}"] = item
            if segment < 6:
                item["y"] = np.linspace(0.2 * level, level, 19).astype(np.float32)
    made = SimpleNamespace(root="fake", synthetic=True, items=items, columns=COLUMNS, left_out=[])

    def parts(corpus, split, fold, keep_overlap=False, keep_misaligned=False):
        where = {"train": range(2), "valid": range(2 + 2 * fold, 4 + 2 * fold), "test": (6, 7)}
        return {part: [n for n in items if int(n[-2:]) in segments] for part, segments in where.items()}

    monkeypatch.setattr(evaluation, "load_percepiano", lambda *a, **k: made)
    monkeypatch.setattr(evaluation, "synthetic_percepiano", lambda cache: "synthetic")
    monkeypatch.setattr(evaluation, "percepiano_parts", parts)
    monkeypatch.setattr(evaluation, "prepare_han", lambda corpus, names, data: [items[n] for n in names])
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def speech(monkeypatch, tmp_path):
    """Two days of two blocks of four trials, and a test trial each."""
    rng = np.random.default_rng(3)
    block = np.array([1, 1, 1, 1, 2, 2, 2, 2, 3] * 2)
    count = len(block)
    lengths = rng.integers(40, 90, count)
    made = SpeechCorpus(
        features=rng.standard_normal((lengths.sum(), 4), np.float32),
        offsets=np.append(0, lengths.cumsum()),
        day=np.repeat([0, 1], count // 2),
        block=block,
        part=np.where(block == 3, "test", "train"),
        labels=[rng.integers(1, 41, 6) for _ in range(count)],
        text=["the <voice>"] * count,
        ids=[f"trial<{i:02d}>" for i in range(count)],
        days=list(DAYS),
        channels=4,
        root=Path("memory"),
        synthetic=True,
        left_out=[],
        labelled=np.ones(count, bool),
    )
    monkeypatch.setattr(evaluation, "open_speech", lambda *a, **k: made)
    monkeypatch.setattr(evaluation, "synthetic_speech", lambda cache: "synthetic")
    monkeypatch.chdir(tmp_path)
    return made


def report(*runs: str, more: tuple = ()) -> dict:
    return evaluation.main(["report", "--run", *runs, "--out", "r.html", "--device", "cpu", *more])


def test_page_of_ratings_holds_the_figures_of_evaluate(corpus):
    runs = [rating_run("f0"), rating_run("f0_s8", 0, 8), rating_run("f1", 1)]
    expected = evaluation.main(["--ckpt", *(f"{path}/best.pt" for path in runs), "--device", "cpu"])["valid"]
    made = report(*runs)
    assert made["figures"] == expected
    page, mean = Page(), expected["all"]["mean"]
    for heading in ("Training curves", "By dimension", "calibration", "Worst items", "Configuration"):
        assert any(heading in title for title in page.headings)
    assert page.row("mean, all")[1:] == [f"{mean[metric]:.4f}" for metric in evaluation.METRICS]
    for d, label in enumerate(LABELS):
        values = [mean["per_dimension"][metric][d] for metric in evaluation.METRICS]
        assert page.row(label)[1:] == [f"{value:.4f}" for value in values]
    assert f"r2 {mean['r2']:.3f}" in made["verdict"]
    assert page.text.count(made["verdict"]) == page.text.count("SYNTHETIC") == 1
    assert page.row("seed")[1:] == ["7", "8", "7"]
    assert page.row("f0") == ["f0", "valid_r2", "0.2500", "20"]
    assert ["f0", "15", "bad", "['item <b>']"] in page.rows


def test_a_metric_added_to_the_table_is_on_the_page(corpus, monkeypatch):
    monkeypatch.setitem(evaluation.METRICS, "bias", lambda y, p: (p - y).mean(0))
    made = report(rating_run("f0"))
    bias = made["figures"]["all"]["mean"]["bias"]
    assert f"bias {bias:.3f}" in made["verdict"]
    assert Page().row("mean, all")[-1] == f"{bias:.4f}"


def test_worst_items(corpus):
    path = rating_run("f0")
    report(path)
    names = [n for n in corpus.items if int(n[-2:]) in (2, 3)]
    model = evaluation.load_checkpoint(f"{path}/best.pt")[0]
    y = np.stack([corpus.items[n]["y"] for n in names]).astype(float)
    error = (evaluation.predict_han(model, [corpus.items[n] for n in names], torch.device("cpu")) - y) ** 2
    i = int(error.mean(1).argmax())
    d = int(error[i].argmax())
    assert Page().row(names[i])[1:4] == ["0", f"{error[i].mean():.4f}", LABELS[d]]
    assert Page().row(names[i])[5] == f"{y[i, d]:.4f}"


def test_page_of_a_decoder_holds_the_figures_of_evaluate(speech):
    paths = [decoder_run("a"), decoder_run("b", 8)]
    expected = evaluation.main(
        ["--ckpt", *(f"{path}/best.pt" for path in paths), "--csv", "t.csv", "--device", "cpu"]
    )
    figures = report(*paths)["figures"]
    assert figures == {key: expected[key] for key in figures}
    page = Page()
    for day, f in figures["by_day"].items():
        counts = [str(f[key]) for key in ("trials", "labels", "sub", "del", "ins")]
        assert page.row(day)[1:] == [f"{f['per']:.4f}", *counts]
    for substitution in expected["substitutions"]:
        assert list(map(str, substitution)) in page.rows
    decoded = {record["trial"]: record for record in evaluation.read_transcripts("t.csv")}
    errors = {t: sum(evaluation.edit_counts(r["reference"], r["hypothesis"])) for t, r in decoded.items()}
    worst = max(errors.values())  # every trial has six labels
    row = next(row for row in reversed(page.rows) if row[0] in decoded)
    assert errors[row[0]] == worst
    assert row[1:] == [evaluation.spell(decoded[row[0]][side]) for side in ("reference", "hypothesis")]


def test_page_of_a_pretraining_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = run("p", MASKED, task="pretrain", model="ast", data="gone")
    model = AST(frames=64, width=16, depth=1, heads=2)
    assert report(save(path, "ast", model, {"synthetic": False}))["figures"] is None
    assert Page().row("p") == ["p", "valid_accuracy", "0.1250", "20"]
    assert "SYNTHETIC" not in Page().text


def test_what_is_missing_gets_a_line(corpus):
    bare, cut = (run(name, RATED, pooled=False, model="bilstm") for name in ("bare", "cut"))
    Path(cut, "best.pt").write_bytes(b"PK\3\4 half")
    with Path(cut, "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')
    assert report(bare, cut)["figures"] is None
    for line in ("runs/bare/best.pt", "runs/cut/best.pt"):
        assert line in Page().text
    assert "part test" in report(rating_run("f0"), more=("--part", "test"))["verdict"]


def test_names_are_escaped(corpus):
    path = rating_run('<script>&"$_\udcff', **{"<b>": ["</table>"]})
    assert report(path, more=("--no-data",))["figures"] is None
    assert Page().row("<b>")[1] == "['</table>']"
    assert escape("<script>") in Path("r.html").read_text()


def test_history_of_a_resumed_run():
    records = [{"step": 2, "loss": 9.0}, {"step": 1, "loss": None}]
    records.append({"step": 2, "loss": 3, "skipped": {"bad": 2, "overflow": 1}})
    assert evaluation.history(records, "loss").tolist() == [[2, 3]]
    assert evaluation.history(records, "skipped").tolist() == [[2, 3]]
    assert evaluation.history(records, "norm").shape == (0, 2)


def test_curves_of_runs_in_one_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = []
    monkeypatch.setattr(evaluation, "save_figure", lambda figure, out: figures.append(figure))
    paths = run("a", RATED), run("b", DECODED)
    assert evaluation.main(["curves", "--run", *paths, "--out", "c.svg"]) == {"a": 0.25, "b": 0.625}
    lines = {axes.get_title(loc="left"): axes.lines for axes in figures[0].axes}
    assert lines["valid_r2"][0].get_xydata().tolist() == [[20, 0.25], [40, 0.35]]
    assert lines["skipped"][0].get_xydata().tolist() == [[10, 0], [15, 1]]
    assert [line.get_label() for line in lines["loss"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("runs", "more", "name"),
    [
        ("f0", "--out r.pdf", "r.pdf"),
        ("f0", "--out folder.html", "folder.html"),
        ("f0", "--out runs/f0/args.json/r.html", "args.json/r.html"),
        ("none", "", "runs/none"),
        ("real", "", "--data"),
        ("f0 d", "", "best.pt"),
        ("d", "--part test", "--part test"),
        ("empty", "", "runs/empty"),
        ("no_options", "", "runs/no_options"),
    ],
)
def test_bad_command_lines_are_refused(runs, more, name, corpus, speech, capsys):
    rating_run("f0")
    rating_run("real", synthetic=False)
    decoder_run("d")
    run("empty", [], model="han")
    Path(run("no_options", RATED), "args.json").write_text("3")
    Path("folder.html").mkdir()
    speech.labelled[:] = False
    paths = [f"runs/{run}" for run in runs.split()]
    assert name in refusal(["report", "--run", *paths, "--out", "r.html", *more.split()], capsys)
    assert not Path("r.html").exists()
