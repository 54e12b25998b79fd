"""eval.py: metrics against scikit-learn, SciPy and hand-worked cases; evaluation, saved results, floor on fakes."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal
from scipy.stats import pearsonr
from sklearn.metrics import mean_squared_error, r2_score

import eval as evaluation
from data import LABELS, DataError, column_names
from models import HAN, save_checkpoint

COLUMNS = column_names(evaluation.FEATURES)
DATA = {
    "features": "full",
    "columns": COLUMNS,
    "labels": list(LABELS),
    "split": "segment",
    "keep_overlap": False,
    "synthetic": True,
}


def ratings(n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.random((n, 19))
    return y, (y + rng.normal(0, 0.2, y.shape)).clip(0, 1)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_match_sklearn_and_scipy():
    y, p = ratings()
    assert evaluation.r2(y, p) == pytest.approx(r2_score(y, p, multioutput="raw_values"), abs=1e-12)
    assert evaluation.mean_r2(y, p) == pytest.approx(r2_score(y, p), abs=1e-12)
    assert evaluation.mse(y, p) == pytest.approx(
        mean_squared_error(y, p, multioutput="raw_values"), abs=1e-12
    )
    assert evaluation.pearson(y, p) == pytest.approx(
        [pearsonr(y[:, d], p[:, d])[0] for d in range(19)], abs=1e-12
    )


def test_metrics_by_hand():
    y, p = np.array([[0.0], [1.0], [2.0]]), np.array([[0.0], [1.0], [1.0]])
    assert evaluation.r2(y, p) == pytest.approx([0.5])
    assert evaluation.mse(y, p) == pytest.approx([1 / 3])
    assert evaluation.pearson(y, p) == pytest.approx([np.sqrt(3) / 2])


@pytest.mark.parametrize(("truth", "prediction"), [(0.3, 0.3), (0.3, 0.4)])
def test_constant_columns(truth, prediction):
    y, p = np.full((7, 2), truth), np.full((7, 2), prediction)
    y[:, 1] = np.linspace(0, 1, 7)
    assert evaluation.r2(y, p) == pytest.approx(r2_score(y, p, multioutput="raw_values"))
    assert evaluation.pearson(y, p).tolist() == [0, 0]


def test_r2_of_one_item_is_undefined():
    assert np.isnan(evaluation.r2(np.ones((1, 19)), np.ones((1, 19)))).all()


# --- bootstrap -------------------------------------------------------------------------------------------------------


def test_bootstrap_equals_a_plain_loop():
    y, p = ratings(12)
    groups = np.array(list("aabbbbccddde"))
    rng, values = np.random.default_rng(3), []
    for _ in range(200):
        drawn = rng.integers(5, size=5)
        if len(set(drawn)) > 1:
            rows = [i for d in drawn for i in range(12) if groups[i] == "abcde"[d]]
            values.append(r2_score(y[rows], p[rows]))
    low, high = evaluation.cluster_bootstrap(y, p, groups, evaluation.mean_r2, n=200, seed=3)
    assert (low, high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=1e-9)


def test_bootstrap_resamples_whole_segments():
    error = np.repeat([0.0, 1.0], 50)  # two segments: the draws that hold both all give 1/2
    interval = evaluation.cluster_bootstrap(
        np.zeros((100, 1)), error[:, None], error, lambda y, p: float(evaluation.mse(y, p).mean()), n=500
    )
    assert interval == (0.5, 0.5)


def test_bootstrap_without_information_is_nan():
    y, p = ratings(6)
    assert np.isnan(evaluation.cluster_bootstrap(y, p, ["one"] * 6)).all()
    assert np.isnan(evaluation.cluster_bootstrap(y, p, list("abcdef"), lambda y, p: float("nan"))).all()


def test_bootstrap_averages_folds_on_one_draw():
    y = np.zeros((4, 1))
    p = np.array(
        [[0.0], [1.0], [1.0], [0.0]]
    )  # fold 1 mirrors fold 0: their mean never moves while each fold does
    folds, groups = np.array([0, 0, 1, 1]), np.array(["a", "b", "a", "b"])
    kept = evaluation.cluster_bootstrap(y, p, groups, lambda y, p: float(p.mean()), folds=folds, n=300)
    assert kept == (0.5, 0.5)


# --- a small corpus --------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(monkeypatch, tmp_path):
    """Ten segments of four players each (one a score rendering): segments 0-3 train, 4-5 and 6-7 validate in fold 0 and 1,
    8-9 test, of which 9 has no labels. Ratings follow the column `velocity`."""
    rng = np.random.default_rng(1)
    items = {}
    for segment in range(10):
        for player in ("1", "2", "4", "Score"):
            name = f"Schubert_D960_mv2_8bars_{player}_{segment:02d}"
            notes = int(rng.integers(12, 30))
            x = rng.normal(0, 0.1, (notes, len(COLUMNS))).astype(np.float32)
            x[:, COLUMNS.index("velocity")] = level = rng.random()
            items[name] = {
                "name": name,
                "x": x,
                "voice": np.ones(notes, int),
                "beat": np.arange(notes) // 3,
                "measure": np.arange(notes) // 9,
                "matched": np.ones(notes, bool),
                "match_rate": 1.0,
                "stats": np.zeros(2, np.float32),
            }
            if segment != 9:
                items[name]["y"] = np.linspace(0.2 * level, level, 19).astype(np.float32)
    made = SimpleNamespace(root="fake", synthetic=True, items=items, columns=COLUMNS, left_out=[])

    def parts(corpus, split, fold, keep_overlap=False, keep_misaligned=False):
        where = {"train": range(4), "valid": range(4 + 2 * fold, 6 + 2 * fold), "test": (8, 9)}
        return {part: [n for n in items if int(n[-2:]) in segments] for part, segments in where.items()}

    monkeypatch.setattr(evaluation, "load_percepiano", lambda *a, **k: made)
    monkeypatch.setattr(evaluation, "synthetic_percepiano", lambda cache: "synthetic")
    monkeypatch.setattr(evaluation, "percepiano_parts", parts)
    monkeypatch.setattr(
        evaluation, "prepare_han", lambda corpus, names, data: [corpus.items[n] for n in names]
    )
    monkeypatch.chdir(tmp_path)
    return made


def checkpoint(path, fold: int = 0, seed: int = 7, task: str = "han", **data) -> str:
    torch.manual_seed(seed)
    model = HAN(input_size=len(COLUMNS), size=8, heads=2)
    rest = dict.fromkeys(("optimizer", "scheduler", "scaler", "ema", "rng", "git_sha", "best", "skipped"))
    save_checkpoint(
        path,
        {
            "format": 1,
            "task": task,
            "model_args": model.model_args,
            "model": model.state_dict(),
            **rest,
            "step": 3,
            "epoch": 1,
            "args": {"seed": seed},
            "data": {**DATA, "fold": fold, **data},
        },
    )
    return str(path)


def predicted(path: str, corpus, names: list[str]) -> np.ndarray:
    model, _ = evaluation.load_checkpoint(path)
    with torch.no_grad():
        return np.stack(
            [torch.sigmoid(model(evaluation.collate_han([corpus.items[n]])))[0].numpy() for n in names]
        )


def of_part(corpus, segments: tuple, renderings: bool = True) -> list[str]:
    return [n for n in corpus.items if int(n[-2:]) in segments and (renderings or "Score" not in n)]


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_checkpoints_are_scored_on_their_own_folds(corpus, tmp_path, capsys):
    paths = [checkpoint(tmp_path / "a.pt", 0, 7), checkpoint(tmp_path / "b.pt", 1, 8)]
    result = evaluation.main(["--ckpt", *paths, "--device", "cpu"])["valid"]
    expected = {"all": [], "no_renderings": []}
    for path, segments in zip(paths, [(4, 5), (6, 7)], strict=True):
        for view in expected:
            names = of_part(corpus, segments, view == "all")
            expected[view].append(
                r2_score([corpus.items[n]["y"] for n in names], predicted(path, corpus, names))
            )
    for view, values in expected.items():
        assert [fold["r2"] for fold in result[view]["folds"].values()] == pytest.approx(values, abs=1e-5)
        assert result[view]["mean"]["r2"] == pytest.approx(np.mean(values), abs=1e-5)
        assert result[view]["mean"]["r2_std"] == pytest.approx(np.std(values), abs=1e-5)
    assert [fold["items"] for fold in result["all"]["folds"].values()] == [8, 8]
    assert [fold["items"] for fold in result["no_renderings"]["folds"].values()] == [6, 6]
    assert "SYNTHETIC" in capsys.readouterr().out


def test_seeds_of_one_fold_are_averaged(corpus, tmp_path, capsys):
    paths = [checkpoint(tmp_path / "a.pt", 0, 7), checkpoint(tmp_path / "b.pt", 0, 8)]
    result = evaluation.main(["--ckpt", *paths, "--device", "cpu"])["valid"]["all"]
    names = of_part(corpus, (4, 5))
    p = np.mean([predicted(path, corpus, names) for path in paths], axis=0)
    assert list(result["folds"]) == ["0"]
    assert result["folds"]["0"]["mse"] == pytest.approx(
        mean_squared_error([corpus.items[n]["y"] for n in names], p), abs=1e-6
    )
    assert "2 checkpoints averaged, seeds [7, 8]" in capsys.readouterr().out


def test_unlabelled_test_items_are_predicted_only(corpus, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt")
    result = evaluation.main(["--ckpt", path, "--part", "test", "--device", "cpu", "--csv", "p.csv"])["test"]
    assert result["all"]["folds"]["0"]["items"] == 4
    record = evaluation.read_predictions("p.csv")[0]
    assert sorted(record["names"]) == sorted(of_part(corpus, (8, 9)))
    assert record["p"] == pytest.approx(predicted(path, corpus, record["names"]), abs=6e-5)
    for name in of_part(corpus, (8,)):
        del corpus.items[name]["y"]
    capsys.readouterr()
    assert evaluation.main(["--ckpt", path, "--part", "test", "--device", "cpu"])["test"]["all"] is None
    assert "no label in this part" in capsys.readouterr().out
    assert len(evaluation.read_predictions(tmp_path / "predictions_test.csv")[0]["names"]) == 8


def test_saved_results(corpus, tmp_path):
    first = "Schubert_D960_mv2_8bars_1_08"
    paths = [checkpoint(tmp_path / "a.pt", 0), checkpoint(tmp_path / "b.pt", 1)]
    evaluation.main(["--ckpt", *paths, "--save-results", "full", "--results-dir", "out", "--device", "cpu"])
    with open("out/han_full_segment.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "part", "fold", *LABELS]
    assert len(rows) == 1 + 2 * 8 + 2 * 8
    assert [row[1:3] for row in rows if row[0] == first] == [["test", "0"], ["test", "1"]]
    assert all(len(value.split(".")[1]) == 4 for value in rows[1][3:])
    saved = json.loads((tmp_path / "out/han_full_segment.json").read_text())
    assert {
        "command",
        "git_sha",
        "git_dirty",
        "hardware",
        "date",
        "seeds",
        "synthetic",
        "metrics",
    } <= saved.keys()
    assert saved["synthetic"] is True
    assert saved["seeds"] == [7, 7]
    assert saved["command"].startswith("python eval.py evaluate --ckpt")
    truth = {name: item["y"] for name, item in corpus.items.items() if "y" in item}
    assert evaluation.check_results("out/han_full_segment.json", truth) > 500
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "han_full_segment.csv",
        "han_full_segment.json",
    ]
    saved["metrics"]["valid"]["all"]["mean"]["r2"] += 1e-3
    (tmp_path / "out/han_full_segment.json").write_text(json.dumps(saved))
    with pytest.raises(DataError, match="/valid/all/mean/r2 is"):
        evaluation.check_results("out/han_full_segment.json", truth)


def test_a_leading_space_leaves_the_name(tmp_path):
    evaluation.write_predictions(
        tmp_path / "p.csv",
        [{"part": "valid", "fold": 0, "names": [" b", "a"], "p": np.full((2, 19), 0.12345)}],
    )
    record = evaluation.read_predictions(tmp_path / "p.csv")[0]
    assert sorted(record["names"]) == ["a", "b"]
    assert record["p"][0, 0] == pytest.approx(0.1235, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "columns ''"),
        ("a,b\n", "columns 'a,b'"),
        ("{head}\nx,valid,0,1\n", "line 2 has 4 fields"),
        ("{head}\nx,valid,zero" + ",1" * 19, "'zero'"),
    ],
)
def test_bad_predictions_are_refused(tmp_path, text, found):
    path = tmp_path / "p.csv"
    path.write_text(text.format(head=",".join(["name", "part", "fold", *LABELS])))
    with pytest.raises(DataError, match=found) as error:
        evaluation.read_predictions(path)
    assert str(path) in str(error.value)


def test_results_that_are_no_results_are_refused(tmp_path):
    (tmp_path / "r.json").write_text("[1]")
    with pytest.raises(DataError, match="no results"):
        evaluation.check_results(tmp_path / "r.json", {})


# --- floor and bench -------------------------------------------------------------------------------------------------


def test_floor_learns_what_the_notes_say(corpus, tmp_path):
    result = evaluation.main(["floor", "--fold", "1", "--features", "perf", "--save-results", "floor"])
    assert list(result["valid"]["all"]["folds"]) == ["1"]
    assert result["valid"]["all"]["mean"]["r2"] > 0.5
    assert result["test"]["no_renderings"]["folds"]["1"]["items"] == 3
    assert (
        evaluation.main(["floor", "--fold", "1", "--features", "score"])["valid"]["all"]["mean"]["r2"] < 0.2
    )
    assert (tmp_path / "results/han_floor_segment.csv").is_file()


def test_pooled_statistics_of_matched_notes():
    x = np.array([[0, 9], [1, 9], [2, 9], [50, 9]], np.float32)
    item = {"x": x, "matched": np.array([1, 1, 1, 0], bool), "voice": np.array([1, 1, 1, 1])}
    assert evaluation.pooled_statistics(item, [0]) == pytest.approx([1, np.sqrt(2 / 3), 0.2, 1, 1.8])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_bad_command_lines_are_refused(corpus, tmp_path, capsys):
    path, other = checkpoint(tmp_path / "a.pt"), checkpoint(tmp_path / "b.pt", split="piece")
    real = checkpoint(tmp_path / "c.pt", synthetic=False)
    assert "ceiling, floor, curves, bench" in refusal(["florr"], capsys)
    assert "split is 'piece'" in refusal(["--ckpt", path, other], capsys)
    assert "give --data DIR" in refusal(["--ckpt", real], capsys)
    assert "row name" in refusal(["--ckpt", path, "--save-results", "../x"], capsys)
    assert "no such file" in refusal(["--ckpt", str(tmp_path / "none.pt")], capsys)
    assert "expected auto, cpu" in refusal(["--ckpt", path, "--device", "tpu"], capsys)
    with pytest.raises(DataError):
        evaluation.main(["florr", "--debug"])


def test_a_checkpoint_of_another_task_is_refused(corpus, tmp_path, capsys, monkeypatch):
    path = checkpoint(tmp_path / "a.pt", task="decoder")
    assert "decoder" in refusal(["--ckpt", path], capsys)
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda path: (None, {"task": "decoder"}))
    assert "'decoder'; expected han" in refusal(["--ckpt", path], capsys)
