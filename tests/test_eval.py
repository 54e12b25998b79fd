"""eval.py: metrics against scikit-learn, SciPy and by hand; evaluation, saved results, floor on fakes."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import COLUMNS, check_results, refusal, refused
from scipy.stats import bootstrap, pearsonr
from sklearn.metrics import mean_squared_error, r2_score

import data
import eval as evaluation
from data import LABELS
from models import HAN, save_checkpoint

DATA = {"features": "full", "columns": COLUMNS, "labels": list(LABELS), "split": "segment"}
DATA |= {"keep_overlap": False, "synthetic": True}


def ratings(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.random((n, 19))
    return y, (y + rng.normal(0, 0.2, y.shape)).clip(0, 1)


def test_metrics_match_sklearn_and_scipy():
    y, p = ratings()
    close = {"abs": 1e-12}
    assert evaluation.r2(y, p) == pytest.approx(r2_score(y, p, multioutput="raw_values"), **close)
    assert evaluation.mse(y, p) == pytest.approx(mean_squared_error(y, p, multioutput="raw_values"), **close)
    expected = [pearsonr(y[:, d], p[:, d])[0] for d in range(19)]
    assert evaluation.pearson(y, p) == pytest.approx(expected, **close)


@pytest.mark.parametrize("prediction", [0.3, 0.4])
def test_figures_of_constant_columns_are_undefined(prediction, capsys):
    y, p = np.full((7, 2), 0.3), np.full((7, 2), prediction)
    y[:, 1] = np.linspace(0, 1, 7)
    assert np.isnan(evaluation.r2(y, p)).tolist() == [True, False]
    assert evaluation.r2(y, p)[1] == pytest.approx(r2_score(y[:, 1], p[:, 1]))
    assert np.isnan(evaluation.pearson(y, p)).all()
    evaluation.print_table(["r2", "interval"], [[math.nan, [math.nan, 0.5]]])
    assert capsys.readouterr().out.split()[2:] == ["–", "[–,", "0.5000]"]
    assert np.isnan(evaluation.r2(y[:1], p[:1])).all()


def test_bootstrap_is_scipys_where_every_item_is_a_group():
    y, p = ratings(12)
    how = {"vectorized": False, "method": "percentile", "n_resamples": 200}
    how["random_state"] = np.random.default_rng(3)
    expected = bootstrap((np.arange(12),), lambda rows: r2_score(y[rows], p[rows]), **how)
    found = evaluation.cluster_bootstrap(y, p, range(12), n=200, seed=3)
    assert found == pytest.approx([*expected.confidence_interval], abs=1e-9)


def test_bootstrap_averages_folds_on_one_draw():
    """Fold 1 mirrors fold 0: their mean stays while each fold moves."""
    p = np.array([[0.0], [1.0], [1.0], [0.0]])
    folds, groups = np.array([0, 0, 1, 1]), list("abab")
    assert evaluation.cluster_bootstrap(p, p, groups, lambda y, p: p.mean(), folds=folds, n=300) == [0.5, 0.5]


def checkpoint(path, fold: int = 0, seed: int = 7, task: str = "han", **data) -> str:
    torch.manual_seed(seed)
    model = HAN(input_size=len(COLUMNS), size=8, heads=2)
    kept = {"task": task, "args": {"seed": seed}, "data": {**DATA, "fold": fold, **data}}
    save_checkpoint(path, kept | {"model_args": model.model_args, "model": model.state_dict()})
    return str(path)


def predicted(path: str, corpus, names: list[str]) -> np.ndarray:
    model, _ = evaluation.load_checkpoint(path)
    with torch.no_grad():
        each = [torch.sigmoid(model(evaluation.collate_han([corpus.items[n]])))[0].numpy() for n in names]
    return np.stack(each)


def of_part(corpus, segments: tuple, renderings: bool = True) -> list[str]:
    return [n for n in corpus.items if int(n[-2:]) in segments and (renderings or "Score" not in n)]


def truth_of(corpus) -> dict:
    return {name: item["y"] for name, item in corpus.items.items() if "y" in item}


@pytest.mark.slow
def test_checkpoints_are_scored_on_their_own_folds(corpus, tmp_path, capsys):
    paths = [checkpoint(tmp_path / "a.pt", 0, 7), checkpoint(tmp_path / "b.pt", 1, 8)]
    result = evaluation.main(["--ckpt", *paths, "--device", "cpu"])["valid"]
    for view in ("all", "no_renderings"):
        expected = []
        for path, segments in zip(paths, [(4, 5), (6, 7)], strict=True):
            names = of_part(corpus, segments, view == "all")
            expected.append(r2_score([corpus.items[n]["y"] for n in names], predicted(path, corpus, names)))
        folds, mean = result[view]["folds"].values(), result[view]["mean"]
        assert [fold["r2"] for fold in folds] == pytest.approx(expected, abs=1e-5)
        assert [fold["items"] for fold in folds] == [8 if view == "all" else 6] * 2
        assert (mean["r2"], mean["r2_std"]) == pytest.approx((np.mean(expected), np.std(expected)), abs=1e-5)
    assert "SYNTHETIC" in capsys.readouterr().out


def test_unlabelled_test_items_are_predicted_only(corpus, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt")
    argv = ["--ckpt", path, "--part", "test", "--device", "cpu", "--csv", "p.csv"]
    assert evaluation.main(argv)["test"]["all"]["folds"]["0"]["items"] == 4
    saved = evaluation.read_predictions("p.csv")
    names = [name for *_, name in saved]
    assert sorted(names) == sorted(of_part(corpus, (8, 9)))
    table = tmp_path / "p.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())  # as Excel saves it
    assert list(evaluation.read_predictions("p.csv")) == list(saved) == [("test", 0, name) for name in names]
    assert np.stack([*saved.values()]) == pytest.approx(predicted(path, corpus, names), abs=6e-5)
    for name in of_part(corpus, (8,)):
        del corpus.items[name]["y"]
    assert evaluation.main(argv)["test"]["all"] is None
    assert "8 unlabelled items" in capsys.readouterr().out


@pytest.mark.slow
def test_saved_results(corpus, tmp_path):
    paths = [checkpoint(tmp_path / "a.pt", 0), checkpoint(tmp_path / "b.pt", 1)]
    evaluation.main(["--ckpt", *paths, "--save-results", "full", "--results-dir", "out", "--device", "cpu"])
    with open("out/han_full_segment.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "part", "fold", *LABELS]
    assert len(rows) == 1 + 2 * 8 + 2 * 8
    assert all(len(value.split(".")[1]) == 4 for value in rows[1][3:])
    saved = json.loads((tmp_path / "out/han_full_segment.json").read_text())
    assert {"git_sha", "git_dirty", "hardware", "date", "features"} <= saved.keys()
    about = [saved[key] for key in ("task", "split", "synthetic", "seeds")]
    assert about == ["han", "segment", True, [7, 7]]
    assert saved["command"].startswith("python eval.py evaluate --ckpt")
    assert check_results("out/han_full_segment.json", truth_of(corpus)) > 500


@pytest.mark.parametrize("text", ["a,b\n", "{head}\nx,valid,0,1\n", "{head}\nx,valid,zero" + ",1" * 19])
def test_bad_predictions_are_refused(tmp_path, capsys, text):
    path = tmp_path / "p.csv"
    path.write_text(text.format(head=",".join(["name", "part", "fold", *LABELS])))
    refused(lambda: evaluation.read_predictions(path), capsys, path)


@pytest.mark.slow
def test_floor_learns_what_the_notes_say(corpus, tmp_path):
    result = evaluation.main(["floor", "--fold", "1", "--features", "perf", "--save-results", "floor"])
    assert list(result["valid"]["all"]["folds"]) == ["1"]
    assert result["valid"]["all"]["mean"]["r2"] > 0.5
    assert result["test"]["no_renderings"]["folds"]["1"]["items"] == 3
    blind = evaluation.main(["floor", "--fold", "1", "--features", "score"])
    assert blind["valid"]["all"]["mean"]["r2"] < 0.2
    assert check_results("results/han_floor_segment.json", truth_of(corpus)) > 200


def test_pooled_statistics_of_matched_notes():
    x = np.array([[0, 9], [1, 9], [2, 9], [50, 9]], np.float32)
    item = {"x": x, "matched": np.array([1, 1, 1, 0], bool), "voice": np.array([1, 1, 1, 1])}
    assert data.pooled_statistics(item, [0]) == pytest.approx([1, np.sqrt(2 / 3), 0.2, 1, 1.8])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--ckpt", "good.pt", "piece.pt"], "piece.pt: split"),
        (["--ckpt", "good.pt", "labels.pt"], "labels.pt: labels"),
        (["--ckpt", "real.pt"], "--data DIR"),
        (["--ckpt", "good.pt", "--save-results", "../x"], "--save-results"),
        (["--ckpt", "good.pt", "--part", "competition"], "--part competition"),
        (["--ckpt", "good.pt", "--day", "mean"], "--day"),
        (["floor", "--task", "ast", "--features", "perf"], "--features"),
        (["--ckpt", "decoder.pt"], "decoder.pt"),
    ],
)
def test_refusals(corpus, tmp_path, capsys, argv, named):
    checkpoint(tmp_path / "good.pt")
    checkpoint(tmp_path / "piece.pt", split="piece")
    checkpoint(tmp_path / "labels.pt", labels=LABELS[::-1])
    checkpoint(tmp_path / "real.pt", synthetic=False)
    assert named in refusal(argv, capsys)
