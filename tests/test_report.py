"""eval.py report: a page that needs nothing from outside, whose numbers are those of evaluate; runs, corpora and checkpoints made here."""

import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal

import eval as evaluation
from data import LABELS, PHONEMES, DataError, SpeechCorpus, column_names, speech_rules
from models import AST, HAN, GRUDecoder, save_checkpoint

COLUMNS = column_names(evaluation.FEATURES)
DATA = {
    "features": "full",
    "columns": COLUMNS,
    "labels": list(LABELS),
    "split": "segment",
    "keep_overlap": False,
    "synthetic": True,
}
DAYS = ["t12.2022.05.01", "t12.2022.05.03"]
STEPS = [
    {"step": 0, "epoch": 0, "activations": {"std_ratio": 0.4}},
    {
        "step": 10,
        "loss": 0.5,
        "norm": 2.0,
        "lr": 1e-3,
        "skipped": {"bad": 0, "overflow": 0},
        "flags": ["head and encoder unbalanced"],
    },
    {"step": 15, "skip": "bad", "names": ["item <b>"], "skipped": {"bad": 1, "overflow": 0}},
]
RATED = [
    *STEPS,
    *(
        {
            "step": step,
            "loss": 0.4,
            "lr": 1e-3,
            "norm": 1.0,
            "skipped": {"bad": 1, "overflow": 0},
            "valid_loss": loss,
            "valid_r2": 0.25,
            "valid_pearson": 0.5,
            "spread": 0.7,
        }
        for step, loss in ((20, 0.02), (40, 0.03))
    ),
]
MASKED = [
    *STEPS,
    {
        "step": 20,
        "valid_loss": 5.0,
        "valid_nce": 4.0,
        "valid_accuracy": 0.125,
        "valid_chance": 0.005,
        "valid_mse": 0.1,
        "valid_mse_mean": 0.2,
    },
]
DECODED = [*STEPS, {"step": 20, "valid_loss": 2.0, "valid_per": 0.625, "valid_blank_fraction": 0.5}]
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags balanced, text and headings collected, everything that could reach outside refused."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.raw, self.headings = [], [], "", text, []
        self.feed(text)
        self.close()
        assert self.open == []
        assert not re.search(r"https?://|@import|url\(|<script|javascript:|<link|<iframe|<object", text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        assert not any(name in ("src", "srcset", "action") or name.startswith("on") for name, _ in attributes)
        assert (dict(attributes).get("href") or "#").startswith("#")
        self.open += [tag] if tag not in VOID else []
        self.headings += [""] if tag in ("h1", "h2", "h3") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text if self.open[-1:] != ["style"] else ""
        if {"h1", "h2", "h3"} & set(self.open):
            self.headings[-1] += text

    def row(self, name: str, n: int = 0) -> list[str]:
        """The cells of the n-th row that a name begins."""
        found = [
            row
            for row in re.findall(r"<tr[^>]*>(.*?)</tr>", self.raw)
            if re.sub(r"<[^>]*>", "", row.split("</th>")[0]) == name
        ][n]
        return [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", found)]


def page(path: str = "r.html") -> Page:
    return Page(Path(path).read_text(encoding="utf-8"))


def run(folder, records: list[dict], **options) -> str:
    folder = Path("runs") / folder
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(
        json.dumps({"data": None, "seed": 7, "git_sha": "abcdef0123456", "git_dirty": True, **options})
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def save(folder: str, task: str, model: torch.nn.Module, about: dict, seed: int = 7) -> str:
    rest = dict.fromkeys(("optimizer", "scheduler", "scaler", "ema", "rng", "git_sha", "best", "skipped"))
    save_checkpoint(
        Path(folder) / "best.pt",
        {
            "format": 1,
            "task": task,
            "model_args": model.model_args,
            "model": model.state_dict(),
            **rest,
            "step": 3,
            "epoch": 1,
            "args": {"seed": seed},
            "data": about,
        },
    )
    return folder


def rating_run(name: str, fold: int = 0, seed: int = 7, **about) -> str:
    torch.manual_seed(seed)
    return save(
        run(name, RATED, pooled=False, model="han", fold=str(fold), seed=seed),
        "han",
        HAN(input_size=len(COLUMNS), size=8, heads=2),
        {**DATA, "fold": fold, **about},
        seed,
    )


def decoder_run(name: str, seed: int = 7, **about) -> str:
    torch.manual_seed(seed)
    model = GRUDecoder(channels=4, days=2, hidden=6, layers=1, kernel=6, stride=2, smooth_taps=5)
    torch.nn.init.normal_(model.fc_decoder_out.weight)
    about = {
        "days": DAYS,
        "channels": 4,
        "phonemes": list(PHONEMES),
        "rules": speech_rules(),
        "valid": "blocks",
        "synthetic": True,
        **about,
    }
    return save(run(name, DECODED, kernel=6, seed=seed), "decoder", model, about, seed)


@pytest.fixture
def corpus(monkeypatch, tmp_path):
    """Eight segments of four players (one a score rendering): 0-1 train, 2-3 and 4-5 validate in fold 0 and 1, 6-7 test, of which none is rated; names look like HTML."""
    rng, items = np.random.default_rng(1), {}
    for segment in range(8):
        for player in ("1", "2", "3", "Score"):
            notes, level = int(rng.integers(12, 30)), rng.random()
            x = rng.normal(0, 0.1, (notes, len(COLUMNS))).astype(np.float32)
            x[:, COLUMNS.index("velocity")] = level
            item = items[f"A<script>&amp;_8bars_{player}_{segment:02d}"] = {
                "x": x,
                "voice": np.ones(notes, int),
                "beat": np.arange(notes) // 3,
                "measure": np.arange(notes) // 9,
                "matched": np.ones(notes, bool),
                "match_rate": 1.0,
            }
            if segment < 6:
                item["y"] = np.linspace(0.2 * level, level, 19).astype(np.float32)
    made = SimpleNamespace(root="fake", synthetic=True, items=items, columns=COLUMNS, left_out=[])

    def parts(corpus, split, fold, keep_overlap=False, keep_misaligned=False):
        where = {"train": range(2), "valid": range(2 + 2 * fold, 4 + 2 * fold), "test": (6, 7)}
        return {part: [n for n in items if int(n[-2:]) in segments] for part, segments in where.items()}

    significance = evaluation.significance
    monkeypatch.setattr(evaluation, "significance", lambda *a: significance(*a, n=50))
    monkeypatch.setattr(evaluation, "load_percepiano", lambda *a, **k: made)
    monkeypatch.setattr(evaluation, "synthetic_percepiano", lambda cache: "synthetic")
    monkeypatch.setattr(evaluation, "percepiano_parts", parts)
    monkeypatch.setattr(
        evaluation, "prepare_han", lambda corpus, names, data: [corpus.items[n] for n in names]
    )
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def speech(monkeypatch, tmp_path):
    """Two days of two blocks of four trials, and a test trial each."""
    rng = np.random.default_rng(3)
    rows = [
        (day, block, part)
        for day in range(2)
        for block, part in [(1, "train")] * 4 + [(2, "train")] * 4 + [(3, "test")]
    ]
    lengths, labels = rng.integers(40, 90, len(rows)), [rng.integers(1, 41, 6) for _ in rows]
    made = SpeechCorpus(
        features=rng.standard_normal((lengths.sum(), 4), np.float32), offsets=np.append(0, lengths.cumsum()), day=np.array([d for d, _, _ in rows]),
        block=np.array([b for _, b, _ in rows]), part=np.array([p for _, _, p in rows]), labels=labels, text=["the <voice>"] * len(rows),
        ids=[f"trial{i:02d}" for i in range(len(rows))], days=list(DAYS), channels=4, root=Path("memory"), synthetic=True, left_out=[], labelled=np.ones(len(rows), bool))  # fmt: skip
    monkeypatch.setattr(evaluation, "open_speech", lambda *a, **k: made)
    monkeypatch.setattr(evaluation, "synthetic_speech", lambda cache: "synthetic")
    monkeypatch.chdir(tmp_path)
    return made


def report(*runs: str, out: str = "r.html", more: tuple = ()) -> dict:
    return evaluation.main(["report", "--run", *runs, "--out", out, "--device", "cpu", *more])


# --- pages -----------------------------------------------------------------------------------------------------------


def test_page_of_ratings_holds_the_figures_of_evaluate(corpus, capsys):
    runs = [rating_run("f0"), rating_run("f0_s8", 0, 8), rating_run("f1", 1)]
    metrics = evaluation.main(["--ckpt", *(f"{path}/best.pt" for path in runs), "--device", "cpu"])
    made = report(*runs)
    assert made["figures"] == [metrics["valid"]]
    shown, mean = page(), metrics["valid"]["all"]["mean"]
    assert [*filter(None, shown.headings[1:])] == [
        "HAN: 19 ratings from score and MIDI (SYNTHETIC)",
        "Training curves",
        "Results",
        "By dimension",
        "Prediction over rating",
        "Calibration",
        "Worst and best items",
        "Diagnostics",
        "Configuration",
    ]
    assert shown.row("mean of the folds, all")[3:5] == [
        f"{mean['r2']:.3f}",
        "[{:.3f}, {:.3f}]".format(*mean["r2_interval"]),
    ]
    for d, label in enumerate(LABELS):
        cells = shown.row(escape(label))
        assert [cells[1], cells[4]] == [f"{mean['per_dimension'][key][d]:.3f}" for key in ("r2", "pearson")]
    assert f"R² {mean['r2']:.3f}" in made["verdicts"][0]
    assert "published" not in made["verdicts"][0]  # synthetic
    assert shown.text.count("SYNTHETIC") > 4
    assert "predictions of 2 checkpoints averaged, seeds [7, 8]" in capsys.readouterr().out
    assert shown.row("f0")[3:] == ["0", "7", "40", "R² 0.250 at step 20", "abcdef0123, uncommitted changes"]
    assert (
        sum(tag == "svg" and attributes.get("role") == "img" for tag, attributes in shown.tags)
        == 4 + 19 + 2 + 4
    )
    assert all(
        attributes.get("aria-label") or attributes.get("aria-hidden")
        for tag, attributes in shown.tags
        if tag == "svg"
    )
    assert dict(shown.tags)["html"] == {"lang": "en"}


def test_worst_items_slopes_and_calibration(corpus):
    path = rating_run("f0")
    report(path)
    shown, names = page(), [n for n in corpus.items if int(n[-2:]) in (2, 3)]
    model, y = (
        evaluation.load_checkpoint(f"{path}/best.pt")[0],
        np.stack([corpus.items[n]["y"] for n in names]).astype(float),
    )
    p = evaluation.predict_han(model, [corpus.items[n] for n in names], torch.device("cpu"))
    error = (p - y) ** 2
    worst = int(error.mean(1).argmax())
    d = int(error[worst].argmax())
    assert shown.row(escape(names[worst])) == [
        escape(text)
        for text in (
            names[worst],
            "0",
            f"{error[worst].mean():.4f}",
            LABELS[d],
            f"{p[worst, d]:.3f}",
            f"{y[worst, d]:.3f}",
        )
    ]
    assert names[worst] in shown.text
    for d, label in enumerate(LABELS[:3]):
        assert shown.row(label)[-2:] == [
            f"{np.polyfit(p[:, d], y[:, d], 1)[0]:.3f}",
            f"{p[:, d].std() / y[:, d].std():.3f}",
        ]
    counts = [int(row[1]) for row in re.findall(r"(0\.\d\d to \d\.\d\d)</th><td>(\d+)<", shown.raw)]
    assert sum(counts) == p.size


def test_page_of_a_decoder_holds_the_figures_of_evaluate(speech):
    paths = [decoder_run("a"), decoder_run("b", 8)]
    expected = evaluation.main(["--ckpt", *(f"{path}/best.pt" for path in paths), "--device", "cpu"])
    figures = report(*paths)["figures"][0]
    assert figures == {key: expected[key] for key in figures}
    shown = page()
    assert shown.headings[1:] == [
        "Phoneme decoder: neural activity to phonemes (SYNTHETIC)",
        "Training curves",
        "Error rate by day",
        "Confusions",
        "Transcripts",
        "Diagnostics",
        "Configuration",
    ]
    for day, f in figures["by_day"].items():
        assert [shown.row(day)[k] for k in (1, 4, 5, 6, 7, 8)] == [
            f"{f['per']:.3f}",
            *(str(f[key]) for key in ("trials", "labels", "sub", "del", "ins")),
        ]
    cells = [int(n) for n in re.findall(r": (\d+) times", shown.raw)]
    assert sum(cells) == figures["sub"] + figures["del"] + figures["ins"]
    a, b, n = expected["substitutions"][0]
    assert f"<title>{a} decoded as {b}: {n} times" in shown.raw
    assert [
        text in shown.text for text in ("Best: trial", "Median: trial", "Worst: trial", "the <voice>")
    ] == [True] * 4
    assert shown.row("a", 1) == ["a", "15", "bad", "item &lt;b&gt;"]  # the skipped update


def test_page_of_a_pretraining_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    path = save(
        run("p", MASKED, task="pretrain", model="ast", data="gone"),
        "ast",
        AST(frames=64, width=16, depth=1, heads=2),
        {"synthetic": False},
    )
    assert report(path)["verdicts"] == [
        "AST pre-training: best validation as logged in training: p NCE accuracy 0.125 at step 20 (chance 0.005), MSE 0.100 (mean patch 0.200)."
    ]
    shown = page()
    assert shown.headings[1:] == [
        "AST pre-training: masked patches",
        "Training curves",
        "Results",
        "Diagnostics",
        "Configuration",
    ]
    assert "SYNTHETIC" not in shown.text
    assert "head and encoder unbalanced in 1 of 1 gradient reports" in shown.text


def test_configurations_get_sections_of_their_own(corpus, speech):
    other = rating_run("other")
    options = json.loads(Path(other, "args.json").read_text())
    Path(other, "args.json").write_text(json.dumps({**options, "lr": 0.5}))
    made = report(rating_run("x"), decoder_run("d"), rating_run("y", 1), other, more=("--no-data",))
    assert made["figures"] == [None] * 3
    assert [text.split(":")[0] for text in made["verdicts"]] == [
        "HAN (SYNTHETIC)",
        "Phoneme decoder (SYNTHETIC)",
        "HAN (SYNTHETIC)",
    ]
    assert "x R² 0.250 at step 20, y R² 0.250 at step 20" in made["verdicts"][0]
    assert page().text.count("Training curves") == 3


def test_what_is_missing_gets_a_line(corpus):
    bare, cut = (
        run("bare", RATED, pooled=False, model="bilstm"),
        run("cut", RATED, pooled=False, model="han", lr=3),
    )
    Path(cut, "best.pt").write_bytes(b"PK\3\4 half")
    with Path(cut, "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')
    empty = run("empty", [], pooled=False, model="han", lr=4)
    report(bare, cut, empty)
    shown = page()
    assert shown.headings[1] == "Bi-LSTM: 19 ratings from score and MIDI (SYNTHETIC)"
    assert "runs/bare/best.pt: no such file" in shown.text
    assert "runs/cut/best.pt: unreadable as a checkpoint" in shown.text
    assert "its last line is cut short" in shown.text
    assert "runs/empty/metrics.jsonl: no log record" in shown.text
    assert "best validation as logged in training: none" in shown.text


def test_a_part_without_ratings_is_said(corpus):
    assert (
        "no item of part test has ratings" in report(rating_run("f0"), more=("--part", "test"))["verdicts"][0]
    )
    assert page().headings[-1] == "Configuration"


def test_names_are_escaped(corpus):
    name = '<script>&"_\udcff'
    path = rating_run(name)
    options = json.loads(Path(path, "args.json").read_text())
    Path(path, "args.json").write_text(
        json.dumps({**options, "name": "<img onerror=1>", "<b>": ["</table>"]})
    )
    report(path, more=("--no-data",))
    shown = page()
    assert '<script>&"_?' in shown.headings[0]
    assert shown.row(escape("<b>"))[1] == escape("['</table>']")


# --- floor and verdict -----------------------------------------------------------------------------------------------


def test_floor_of_the_same_folds_stands_beside(corpus):
    corpus.synthetic = False
    paths = [rating_run("f0", synthetic=False), rating_run("f1", 1, synthetic=False)]
    for path in paths:
        options = json.loads(Path(path, "args.json").read_text())
        Path(path, "args.json").write_text(json.dumps({**options, "data": "."}))
    folds = {str(k): {"r2": 0.1 * k - 99, "per_dimension": {"r2": [k / 4] * 19}} for k in range(4)}
    saved = {"synthetic": False, "labels": list(LABELS), "metrics": {"valid": {"all": {"folds": folds}}}}
    Path("results").mkdir()
    Path("results/han_floor_segment.json").write_text(json.dumps(saved))
    made = report(*paths)
    assert "better than the floor (R² -98.95)" in made["verdicts"][0]
    assert "than the published HAN (Park et al. 2024, their piece split) (R² 0.397)" in made["verdicts"][0]
    assert "SYNTHETIC" not in page().text
    assert page().row(LABELS[0])[4] == "0.125"
    Path("results/han_floor_segment.json").write_text("{")
    with pytest.raises(DataError, match="han_floor_segment.json: no results"):
        report(*paths)
    args, about = SimpleNamespace(results_dir="results", part="valid"), {**DATA, "synthetic": False}
    for changed in ({}, {"synthetic": True}, {"metrics": {"valid": {"all": None}}}, {"labels": []}):
        Path("results/han_floor_segment.json").write_text(json.dumps({**saved, **changed}))
        found = evaluation._floor_of("han", about, args, [1, 2])
        assert (found and found["r2"]) == (None if changed else pytest.approx(-98.85))
    assert evaluation._floor_of("han", {**about, "features": "perf"}, args, [1]) is None
    assert evaluation._floor_of("cnn", about, args, [1]) is None


@pytest.mark.parametrize(("metric", "interval", "words"), [
    ("R²", (0.4, 0.6), "better"), ("R²", (0.1, 0.2), "worse"), ("R²", (0.2, 0.4), "not clearly better or worse"),
    ("PER", (0.4, 0.6), "worse"), ("PER", (0.1, 0.2), "better"), ("R²", (np.nan, np.nan), "not clearly better or worse"),
])  # fmt: skip
def test_verdicts_by_hand(metric, interval, words):
    assert evaluation._against(interval, "it", metric, 0.3) == f"{words} than it ({metric} 0.3)"


# --- metrics of a run ------------------------------------------------------------------------------------------------


def test_history_of_a_resumed_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = run(
        "r",
        [
            {"step": 2, "loss": 9.0},
            {"step": 1, "loss": None},
            {"step": 2, "loss": 3, "skipped": {"bad": 2, "overflow": 1}},
        ],
        pooled=False,
    )
    records = evaluation.read_run(path)["records"]
    np.testing.assert_array_equal(evaluation._history(records, "loss"), [[1, np.nan], [2, 3]])
    assert evaluation._history(records, "skipped").tolist() == [[2, 3]]
    assert evaluation._history(records, "norm").shape == (0, 2)


def test_another_programs_metrics_are_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = [None, "<b>", [], {"bad": "x"}, 10**400, float("nan"), -1e308, True, 0.5]
    keys = (
        "loss",
        "norm",
        "skipped",
        "skip",
        "names",
        "flags",
        "activations",
        "valid_loss",
        "valid_accuracy",
        "valid_mse",
        "lr",
    )
    records = [
        {"step": step, **{key: values[(step + k) % len(values)] for k, key in enumerate(keys)}}
        for step in range(18)
    ]
    report(run("r", [*records, {"step": 10**400}], task="pretrain", seed=[]))
    assert page().row("r")[4:6] == ["[]", "17"]


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high", "log", "expected"), [
    (0.0, 1.0, False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]), (-3.0, 7.0, False, ["-2", "0", "2", "4", "6"]), (0.31, 0.37, False, ["0.32", "0.34", "0.36"]),
    (-1.2, 6.3, True, ["0.1", "10", "1000", "100000"]), (0.0, 0.5, True, ["1", "1.5", "2", "2.5", "3"]),
])  # fmt: skip
def test_ticks_are_round(low, high, log, expected):
    assert [label for _, label in evaluation._ticks(low, high, log)] == expected


def test_a_long_line_keeps_its_peaks():
    points = np.column_stack([np.arange(10_000), np.sin(np.arange(10_000))])
    points[[1234, 8765], 1] = 1e6, np.nan
    kept = evaluation._thin(points)
    assert len(kept) <= 500
    assert 1e6 in kept[:, 1]
    assert (np.diff(kept[:, 0]) > 0).all()


def test_lines_break_where_nothing_is_finite():
    svg = evaluation._chart(
        "t", [("line s0", np.array([[0, 1.0], [1, np.nan], [2, np.inf], [3, 2], [4, 3]]))]
    )
    assert (
        re.findall(r'class="line s0" d="([^"]*)"', svg)[0].translate(str.maketrans("", "", "0123456789. "))
        == "MML"
    )
    assert evaluation._chart("t", [("line", np.array([[0, np.nan]]))]) == ""
    assert evaluation._chart("t", [("line", np.array([[0, -1.0]]))], log=True) == ""
    assert "nan" not in evaluation._chart("t", [("dots", np.array([[5, 0.0]]))])


# --- writing and refusals --------------------------------------------------------------------------------------------


def test_an_interrupted_report_leaves_the_old_one(corpus, monkeypatch):
    path = rating_run("f0")
    Path("r.html").write_text("old")

    def stop(*_):
        raise KeyboardInterrupt

    for name in ("fold_records", "_page"):
        with monkeypatch.context() as patched:
            patched.setattr(evaluation, name, stop)
            with pytest.raises(KeyboardInterrupt):
                report(path)
        assert Path("r.html").read_text() == "old"
    assert sorted(p.name for p in Path().iterdir()) == ["r.html", "runs"]


def test_bad_command_lines_are_refused(corpus, speech, capsys):
    path, real = rating_run("f0"), rating_run("real", synthetic=False)

    def refused(*runs: str, out: str = "r.html", more: tuple = ()) -> str:
        return refusal(["report", "--run", *runs, "--out", out, "--device", "cpu", *more], capsys)

    assert "a file of kind .pdf; expected .html" in refused(path, out="r.pdf")
    assert "--out .: " in refused(path, out=".")
    assert "no options of a run (No such file or directory)" in refused("runs/none")
    assert "give --data DIR" in refused(real)
    options = json.loads(Path(real, "args.json").read_text())
    Path(real, "args.json").write_text(json.dumps({**options, "data": "/gone"}))
    assert (
        "trained on /gone, which is not here; expected its data set; give --data DIR, or --no-data"
        in refused(real)
    )
    assert "one data set for runs of ratings, speech" in refused(path, decoder_run("d"), more=("--data", "."))
    speech.labelled[:] = False
    assert "no labelled trial" in refused("runs/d")
    for text in (
        "",
        "[]",
        "3",
        '{"pooled": 1, "data": 5}',
        '{"task": "finetune", "model": []}',
        '{"task": "finetune", "model": "resnet"}',
        '{"seed": 1}',
    ):
        Path(path, "args.json").write_text(text)
        assert "runs/f0: no options of a run" in refused(path)
    Path("folder.html").mkdir()
    assert "expected a file in a writable folder" in refused(path, out="folder.html")
    assert "expected a file in a writable folder" in refused(path, out="runs/f0/args.json/r.html")
    assert not Path("r.html").exists()
