"""eval.py, section Audio: prediction from spectrograms, significance tests, rater ceiling, and their commands on small fakes."""

import functools
import itertools
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, permutation_test

import eval as evaluation
from data import LABELS, SILENCE, DataError, FbankStore, normalise_fbank, segment_of
from models import AST, CNN, save_checkpoint

CPU = torch.device("cpu")
INFO = {"mean": -4.0, "std": 3.0, "frames": 64, "target_mean": [0.5] * 19, "target_std": [0.1] * 19}


def network(frames: int = 64, seed: int = 0, **kw) -> AST:
    torch.manual_seed(seed)
    model = AST(frames=frames, width=16, depth=1, heads=2, num_outputs=19, **kw).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # outputs far enough apart to tell items from each other
    return model


def clips(*frames: int) -> list[dict]:
    rng = np.random.default_rng(1)
    return [
        {"name": str(i), "frames": n, "fbank": rng.normal(rng.uniform(-8, 0), 3, (n, 128)).astype(np.float16)}
        for i, n in enumerate(frames)
    ]


# --- prediction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "length", "crops", "expected"),
    [
        (50, 64, None, [0]),
        (64, 64, 3, [0]),
        (65, 64, None, [0, 1]),
        (200, 64, None, [0, 45, 91, 136]),
        (200, 64, 2, [0, 136]),
        (200, 64, 1, [68]),
    ],
)
def test_crops_cover_an_item_evenly(frames, length, crops, expected):
    assert evaluation.crop_starts(frames, length, crops) == expected


@pytest.mark.parametrize("model", [network(), CNN(width=4).eval()], ids=["ast", "cnn"])
def test_predictions_do_not_depend_on_the_batch(model):
    items = clips(64, 40, 5, 150, 63, 65, 17)
    together = evaluation.predict_ast(model, items, INFO, CPU, batch=4)
    alone = np.concatenate([evaluation.predict_ast(model, [item], INFO, CPU, batch=1) for item in items])
    assert together.shape == (7, 19)
    assert together == pytest.approx(alone, abs=1e-6)
    assert np.ptp(together, axis=0).min() > 1e-4


def test_a_long_item_is_the_mean_of_its_crops():
    model, (item,) = network(), clips(150)
    x = normalise_fbank(torch.from_numpy(item["fbank"].astype(np.float32)), -4.0, 3.0)
    with torch.no_grad():
        parts = [model(x[None, start : start + 64])[0].double().numpy() for start in (0, 43, 86)]
    expected = (0.5 + 0.1 * np.mean(parts, axis=0)).clip(0, 1)
    assert evaluation.predict_ast(model, [item], INFO, CPU)[0] == pytest.approx(expected, abs=1e-6)


def test_padding_is_silence_before_normalisation():
    class Spy(torch.nn.Module):
        model_args = {"frames": 64}

        def forward(self, x, lengths):
            self.x, self.lengths = x, lengths
            return x.new_full((len(x), 19), 7.0)

    spy = Spy()
    assert (
        evaluation.predict_ast(spy, clips(64, 30), INFO, CPU).tolist() == [[1.0] * 19] * 2
    )  # 0.5 + 0.1 * 7, clipped
    assert spy.lengths.tolist() == [30, 64]
    assert spy.x[0, 30:].unique().tolist() == pytest.approx([(SILENCE + 4) / 6], abs=1e-5)
    assert spy.training
    raw = {key: value for key, value in INFO.items() if "target" not in key}
    spy.forward = lambda x, lengths: x.new_full((len(x), 19), 0.25)
    assert evaluation.predict_ast(spy, clips(20), raw, CPU).tolist() == [[0.25] * 19]


# --- permutation -----------------------------------------------------------------------------------------------------


def test_permutation_equals_scipys_enumeration():
    rng = np.random.default_rng(2)
    y = rng.normal(size=(6, 2))
    p = y + rng.normal(size=(6, 2))
    for d in range(2):
        exact = permutation_test(
            (p[:, d],),
            lambda p, d=d: np.corrcoef(y[:, d], p)[0, 1],
            permutation_type="pairings",
            alternative="greater",
            n_resamples=np.inf,
        ).pvalue
        assert evaluation.permutation_p(y[:, [d]], p[:, [d]], list("abcdef"), n=2000)[0] == pytest.approx(
            exact, abs=0.03
        )


def test_permutation_of_groups_equals_enumeration():
    rng = np.random.default_rng(3)
    y, p, values = rng.normal(size=6), rng.normal(size=6), []
    for groups in itertools.permutations([(0, 1), (2, 3), (4, 5)]):
        for orders in itertools.product((1, -1), repeat=3):
            values.append(
                np.corrcoef(
                    y, p[[i for group, order in zip(groups, orders, strict=True) for i in group[::order]]]
                )[0, 1]
            )
    exact = np.mean(np.array(values) >= np.corrcoef(y, p)[0, 1] - 1e-12)
    assert evaluation.permutation_p(y[:, None], p[:, None], list("aabbcc"), n=2000)[0] == pytest.approx(
        exact, abs=0.03
    )


def test_permutation_holds_its_level_where_items_of_a_group_are_alike():
    rng, groups = np.random.default_rng(4), np.repeat(np.arange(12), [8, 5, 9, 8, 8, 3, 8, 8, 12, 8, 8, 8])
    y, p = (
        rng.normal(size=(12, 150))[groups] + 0.5 * rng.normal(size=(len(groups), 150)) for _ in range(2)
    )  # 150 dimensions without a relation
    assert (evaluation.permutation_p(y, p, groups, n=200) < 0.05).mean() == pytest.approx(0.05, abs=0.05)
    assert (evaluation.permutation_p(y, p, np.arange(len(groups)), n=200) < 0.05).mean() > 0.25


def test_folds_of_the_same_groups_are_permuted_alike():
    rng = np.random.default_rng(5)
    y, groups = rng.normal(size=(12, 3)), np.repeat(list("abcd"), 3)
    p = 0.5 * y + rng.normal(size=(12, 3))
    twice = [np.concatenate([a, a]) for a in (y, p, groups)]
    assert (
        evaluation.permutation_p(*twice, n=200, folds=np.repeat([0, 1], 12)).tolist()
        == evaluation.permutation_p(y, p, groups, n=200).tolist()
    )


def test_holm_by_hand():
    assert evaluation.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluation.holm([0.5, 0.9, np.nan]) == pytest.approx([1, 1, np.nan], nan_ok=True)


# --- paired bootstrap ------------------------------------------------------------------------------------------------


def test_paired_bootstrap_equals_a_plain_loop():
    rng = np.random.default_rng(6)
    y = rng.normal(size=(12, 2))
    pa, pb = y + 0.5 * rng.normal(size=y.shape), y + rng.normal(size=y.shape)
    groups, folds = np.array(list("aabbccddeeff")), np.array([0, 1] * 6)
    difference, (low, high), p = evaluation.paired_bootstrap(
        y, pa, pb, groups, evaluation.pearson, folds, n=200, seed=3
    )
    gain = lambda rows: np.mean(
        [
            [np.corrcoef(y[r, d], pa[r, d])[0, 1] - np.corrcoef(y[r, d], pb[r, d])[0, 1] for d in range(2)]
            for r in (rows[folds[rows] == f] for f in (0, 1))
        ],
        axis=0,
    )
    rng, draws = np.random.default_rng(3), []
    for _ in range(200):
        drawn = rng.integers(6, size=6)
        draws.append(gain(np.concatenate([[2 * k, 2 * k + 1] for k in drawn])))
    assert difference == pytest.approx(gain(np.arange(12)))
    assert [low, high] == pytest.approx(np.percentile(draws, [2.5, 97.5], axis=0), abs=1e-9)
    assert p == pytest.approx(
        [
            min(
                1,
                2
                * min((np.array(draws)[:, d] < 1e-9).sum() + 1, (np.array(draws)[:, d] > -1e-9).sum() + 1)
                / 201,
            )
            for d in range(2)
        ]
    )


def test_paired_bootstrap_of_equal_and_of_unequal_predictions():
    rng = np.random.default_rng(7)
    y = rng.normal(size=(60, 1))
    near, far, groups = (
        y + 0.1 * rng.normal(size=y.shape),
        y + rng.normal(size=y.shape),
        np.repeat(np.arange(20), 3),
    )
    assert evaluation.paired_bootstrap(y, far, far, groups, n=200) == (0, (0, 0), 1)
    difference, (low, _), p = evaluation.paired_bootstrap(y, near, far, groups, n=200)
    assert 0 < low < difference
    assert p == pytest.approx(2 / 201)
    assert np.isnan(evaluation.paired_bootstrap(y, near, far, ["one"] * 60, n=50)[2])


# --- rater ceiling ---------------------------------------------------------------------------------------------------


def simulated(items: int, raters: int, between: float, error: float, again: float, seed: int = 8) -> tuple:
    """Ratings of known variances: true ratings of variance 1; some raters rate an item several times."""
    rng, truth, rows = np.random.default_rng(seed), {}, []
    for i in range(items):
        truth[f"{i:05d}"] = rng.normal()
        for rater in rng.choice(50, size=rng.integers(2, raters), replace=False):
            view = truth[f"{i:05d}"] + rng.normal(0, np.sqrt(between))
            rows += [
                (rater, f"{i:05d}", view + rng.normal(0, np.sqrt(error)))
                for _ in range(1 + rng.poisson(again))
            ]
    return tuple(np.array(column) for column in zip(*rows, strict=True)), truth


@pytest.mark.parametrize(("between", "error", "again"), [(1.5, 1.0, 0.6), (2.0, 0.0, 0.0), (0.0, 2.0, 0.8)])
def test_ceiling_is_the_score_of_the_truth(between, error, again):
    (raters, names, ratings), truth = simulated(2500, 10, between, error, again)
    c = evaluation.rater_ceiling(raters, names, ratings[:, None])
    means = np.bincount(names.astype(int), ratings) / np.bincount(names.astype(int))
    known = np.array([*truth.values()])
    assert c["r2"][0] == pytest.approx(1 - ((means - known) ** 2).mean() / means.var(), abs=0.02)
    assert c["pearson"][0] == pytest.approx(pearsonr(means, known)[0], abs=0.015)
    assert c["between"][0] + c["error"][0] == pytest.approx(between + error, abs=0.12)
    assert c["items"] == 2500
    if between and again:
        assert c["error"][0] == pytest.approx(error, abs=0.06)
        assert c["independent"][0] > c["r2"][0] + 0.03  # repeats taken for other raters promise too much


def test_ceiling_by_hand():
    # means 2 and 6, variance 4; within items 2 and 2, of 2 ratings each: noise 1; R2 = 1 - 1/4
    c = evaluation.rater_ceiling(
        np.array([1, 2, 1, 2, 3]),
        np.array(list("aabbb")),
        np.array([[1, 1], [3, 3], [5, 5], [7, 7], [np.nan, 6]]),
    )
    assert c["r2"][0] == pytest.approx(0.75)
    assert c["pearson"][0] == pytest.approx(np.sqrt(0.75))
    assert c["independent"][0] == pytest.approx(0.75)
    # second column: within 2 + 2 on 3 degrees, 4/3 a rating; noise 4/3 (1/2 + 1/3) / 2 = 5/9; R2 = 1 - 5/36
    assert c["r2"][1] == pytest.approx(1 - 5 / 36)


def test_ceiling_command(monkeypatch, capsys, tmp_path):
    (raters, names, ratings), _ = simulated(40, 6, 1.0, 0.5, 0.5)
    names = np.char.add(
        np.where(names < "00010", "Schubert_D960_mv2_8bars_Score_", "Schubert_D960_mv2_8bars_1_"), names
    )
    monkeypatch.setattr(
        evaluation, "read_ratings", lambda root: (raters, names, np.repeat(ratings[:, None], 19, axis=1))
    )
    views = evaluation.main(["ceiling", "--data", str(tmp_path)])
    assert (views["all"]["items"], views["no_renderings"]["items"]) == (40, 30)
    out = capsys.readouterr().out
    assert f"R2 {views['all']['r2'][0]:.3f} r {views['all']['pearson'][0]:.3f}" in out
    assert len(out.splitlines()) == 1 + 2 + 1 + 19


# --- a small corpus: loudness is the rating --------------------------------------------------------------------------


@pytest.fixture
def corpus(monkeypatch, tmp_path):
    """Ten segments of four players (one a score rendering): 0-3 train, 4-5 and 6-7 validate in fold 0 and 1, 8-9 test, 9 unrated."""
    rng = np.random.default_rng(1)
    items, shards = {}, []
    for segment in range(10):
        for player in ("1", "2", "4", "Score"):
            level = rng.random()
            shards.append(
                (rng.normal(-8, 1, (int(rng.integers(30, 100)), 128)) + 4 * level).astype(np.float16)
            )
            item = items[f"Schubert_D960_mv2_8bars_{player}_{segment:02d}"] = {"match_rate": 1.0}
            if segment != 9:
                item["y"] = (
                    (np.linspace(0.2, 1, 19) * level + 0.02 * rng.normal(size=19))
                    .clip(0, 1)
                    .astype(np.float32)
                )
    made = SimpleNamespace(root="fake", synthetic=True, items=items, names=[*items], left_out=[])
    store = FbankStore(
        "fake",
        True,
        [*items],
        np.array([len(x) for x in shards]),
        [""] * 40,
        ["a line"],
        shards,
        np.array([(i, 0) for i in range(40)]),
    )

    def parts(corpus, split, fold, keep_overlap=False, keep_misaligned=False):
        where = {"train": range(4), "valid": range(4 + 2 * fold, 6 + 2 * fold), "test": (8, 9)}
        return {part: [n for n in items if int(n[-2:]) in segments] for part, segments in where.items()}

    monkeypatch.setattr(evaluation, "load_percepiano", lambda *a, **k: made)
    monkeypatch.setattr(evaluation, "synthetic_percepiano", lambda cache: "synthetic")
    monkeypatch.setattr(evaluation, "percepiano_parts", parts)
    monkeypatch.setattr(evaluation, "percepiano_audio", lambda *a, **k: store)
    monkeypatch.setattr(
        evaluation, "read_labels", lambda *a: ({n: i["y"] for n, i in items.items() if "y" in i}, {}, {})
    )
    monkeypatch.setattr(evaluation, "significance", functools.partial(evaluation.significance, n=100))
    monkeypatch.chdir(tmp_path)
    return made


def checkpoint(
    path, fold: int = 0, seed: int = 7, task: str = "ast", num_outputs: int | None = 19, **data
) -> str:
    torch.manual_seed(seed)
    model = (
        CNN(width=4)
        if task == "cnn"
        else network(seed=seed)
        if num_outputs
        else AST(frames=64, width=16, depth=1, heads=2)
    )
    rest = dict.fromkeys(("optimizer", "scheduler", "scaler", "ema", "rng", "git_sha", "best", "skipped"))
    info = {
        **INFO,
        "labels": list(LABELS),
        "split": "segment",
        "fold": fold,
        "keep_overlap": False,
        "synthetic": True,
        "audio": "rendered",
        **data,
    }
    save_checkpoint(
        path,
        {
            "task": task,
            "model_args": model.model_args,
            "model": model.state_dict(),
            **rest,
            "step": 3,
            "epoch": 1,
            "args": {"seed": seed},
            "data": info,
        },
    )
    return str(path)


def test_checkpoints_are_scored_saved_and_tested(corpus, tmp_path, capsys):
    paths = [checkpoint(tmp_path / f"{fold}{seed}.pt", fold, seed) for fold in (0, 1) for seed in (7, 8)]
    metrics = evaluation.main(["--ckpt", *paths, "--device", "cpu", "--save-results", "scratch"])
    out = capsys.readouterr().out
    assert "predictions of 2 checkpoints averaged, seeds [7, 8]" in out
    assert "left out: a line" in out
    saved = json.loads((tmp_path / "results/ast_scratch_segment.json").read_text())
    assert (saved["task"], saved["model"], saved["audio"], saved["seeds"]) == (
        "ast",
        "ast",
        "rendered",
        [7, 8, 7, 8],
    )
    truth = {name: item["y"] for name, item in corpus.items.items() if "y" in item}
    assert evaluation.check_results("results/ast_scratch_segment.json", truth) > 500
    tests = saved["significance"]["valid"]["no_renderings"]
    assert np.shape(tests["pearson_interval"]) == np.shape(tests["r2_interval"]) == (19, 2)
    assert tests["p_holm"] == pytest.approx(evaluation.holm(tests["p"]))
    assert saved["significance"]["test"]["all"] is None  # one rated segment
    record = next(
        r
        for r in evaluation.read_predictions("results/ast_scratch_segment.csv")
        if (r["part"], r["fold"]) == ("valid", 1)
    )
    store = evaluation.percepiano_audio()
    items = [
        {
            "name": n,
            "fbank": store.get(store.names.index(n)),
            "frames": int(store.frames[store.names.index(n)]),
        }
        for n in record["names"]
    ]
    expected = np.mean(
        [evaluation.predict_ast(network(seed=seed), items, INFO, CPU) for seed in (7, 8)], axis=0
    )
    assert record["p"] == pytest.approx(expected, abs=6e-5)
    assert metrics["valid"]["all"]["folds"]["1"]["items"] == 8


def test_significance_finds_what_is_there(corpus):
    truth = {name: item["y"] for name, item in corpus.items.items() if "y" in item}
    rng, names = np.random.default_rng(0), [*truth]
    p = np.stack([truth[n] for n in names]) + 0.1 * rng.normal(size=(36, 19))
    p[:, 3] = rng.random(36)
    tests = evaluation.significance([{"part": "valid", "fold": 0, "names": names, "p": p}], truth, n=200)[
        "valid"
    ]["all"]
    assert tests["p"][3] > 0.05
    assert max(tests["p"][4:]) == pytest.approx(1 / 201)
    assert tests["p_holm"][18] == pytest.approx(19 / 201)
    low, high = np.array(tests["pearson_interval"]).T
    assert (
        (low <= evaluation.pearson(np.stack([truth[n] for n in names]), p))
        & (evaluation.pearson(np.stack([truth[n] for n in names]), p) <= high)
    ).all()


@pytest.mark.parametrize("model", ["ridge", "forest"])
def test_floor_hears_the_loudness(corpus, tmp_path, model):
    result = evaluation.main(
        ["floor", "--task", "ast", "--fold", "1", "--model", model, "--save-results", f"floor_{model}"]
    )
    assert result["valid"]["all"]["mean"]["r2"] > 0.5
    assert result["test"]["no_renderings"]["folds"]["1"]["items"] == 3
    saved = json.loads((tmp_path / f"results/ast_floor_{model}_segment.json").read_text())
    assert (saved["model"], saved["audio"]) == (model, "rendered")
    with pytest.raises(DataError, match="features are of han"):
        evaluation.main(["floor", "--task", "ast", "--features", "perf"])


def test_probe_adds_the_tokens_of_a_frozen_encoder(corpus, tmp_path):
    """Of one depth: mean and deviation of the final tokens over all crops, here by one pass a crop."""
    bare, store = checkpoint(tmp_path / "bare.pt", num_outputs=None), evaluation.percepiano_audio()
    tokens, (model, _) = evaluation.frozen_tokens(bare, store, CPU, batch=3), evaluation.load_checkpoint(bare)
    assert tokens.keys() == set(store.names)
    for i in (int(store.frames.argmin()), int(store.frames.argmax())):
        x = normalise_fbank(torch.from_numpy(store.get(i).astype(np.float32)), INFO["mean"], INFO["std"])
        with torch.no_grad():
            seen = [
                model(x[None, start : start + 64])[0].numpy().astype(np.float64)
                for start in evaluation.crop_starts(len(x), 64)
            ]
        mean, square = (
            np.mean([t.mean(0) for t in seen], axis=0),
            np.mean([(t**2).mean(0) for t in seen], axis=0),
        )
        assert tokens[store.names[i]] == pytest.approx(
            np.concatenate([mean, np.sqrt(square - mean**2)]), abs=1e-5
        )
    result = evaluation.main(
        ["floor", "--task", "ast", "--fold", "1", "--probe", bare, "--save-results", "probe"]
    )
    assert result["valid"]["all"]["mean"]["r2"] > 0.5
    assert json.loads((tmp_path / "results/ast_probe_segment.json").read_text())["probe"] == bare
    with pytest.raises(DataError, match="expected a pre-training, which knows no rating"):
        evaluation.main(["floor", "--task", "ast", "--probe", checkpoint(tmp_path / "rates.pt")])


# --- comparison ------------------------------------------------------------------------------------------------------


def results_file(path, corpus, noise: float, split: str = "segment", segments=range(9)) -> str:
    rng = np.random.default_rng(int(1000 * noise))
    names = [n for n in corpus.items if int(n[-2:]) in segments]
    p = np.stack([corpus.items[n]["y"] for n in names]) + noise * rng.normal(size=(len(names), 19))
    evaluation.write_predictions(path, [{"part": "valid", "fold": 0, "names": names, "p": p}])
    path.with_suffix(".json").write_text(json.dumps({"split": split}))
    return str(path)


def test_compare_results_and_checkpoints(corpus, tmp_path, capsys):
    good, bad = (
        results_file(tmp_path / "good.csv", corpus, 0.02),
        results_file(tmp_path / "bad.csv", corpus, 0.5),
    )
    result = evaluation.main(["compare", "--a", good, "--b", bad, "--draws", "300"])
    assert result["difference"] == pytest.approx(result["a"] - result["b"])
    assert result["interval"][0] > 0
    assert "A is better than B: mean pearson +" in result["verdict"]
    assert result["per_dimension"]["p_holm"] == pytest.approx(evaluation.holm(result["per_dimension"]["p"]))
    assert (result["items"], result["clusters"]) == (36, 9)
    swapped = evaluation.main(
        ["compare", "--a", bad, "--b", good, "--draws", "300", "--metric", "r2", "--no-renderings"]
    )
    assert "A is worse than B" in swapped["verdict"]
    assert (swapped["items"], swapped["clusters"]) == (27, 9)
    by_performer = evaluation.main(
        [
            "compare",
            "--a",
            bad,
            "--b",
            good,
            "--draws",
            "300",
            "--metric",
            "r2",
            "--no-renderings",
            "--cluster",
            "performer",
        ]
    )
    assert by_performer["difference"] == swapped["difference"]
    assert (
        by_performer["verdict"]
        == f"A cannot be told from B: mean r2 {swapped['difference']:+.4f}, but 3 performers are too few for a test."
    )
    assert np.isnan(by_performer["per_dimension"]["p_holm"]).all()
    capsys.readouterr()
    against = evaluation.main(
        ["compare", "--a", good, "--b", checkpoint(tmp_path / "0.pt"), "--draws", "100", "--device", "cpu"]
    )
    assert against["items"] == 8  # fold 0 of the checkpoint
    assert "28 items that only one side predicts left out" in capsys.readouterr().out


def test_comparisons_that_mean_nothing_are_refused(corpus, tmp_path):
    a, other = (
        results_file(tmp_path / "a.csv", corpus, 0.1, segments=range(8)),
        results_file(tmp_path / "b.csv", corpus, 0.2, "piece"),
    )
    apart = results_file(tmp_path / "c.csv", corpus, 0.2, segments=(8,))
    with pytest.raises(DataError, match="of split segment, .* of piece"):
        evaluation.main(["compare", "--a", a, "--b", other])
    with pytest.raises(DataError, match="0 rated items of part valid"):
        evaluation.main(["compare", "--a", a, "--b", apart])
    with pytest.raises(DataError, match="expected one CSV"):
        evaluation.main(["compare", "--a", a, a, "--b", a])
    Path(a).with_suffix(".json").write_text(
        json.dumps({"split": "segment", "synthetic": True})
    )  # of performances of the same names
    with pytest.raises(DataError, match="predictions of another corpus"):
        evaluation.main(["compare", "--a", a, "--b", a])


# --- pre-training and refusals ---------------------------------------------------------------------------------------


def test_foreign_options_and_checkpoints_are_refused(corpus, tmp_path):
    path = checkpoint(tmp_path / "a.pt")
    for argv, found in (
        (["--part", "competition"], "--part competition: only for checkpoints of train_decoder.py"),
        (["--day", "mean"], "--day: only"),
        ([checkpoint(tmp_path / "b.pt", audio="wav")], "audio is 'wav'"),
        ([checkpoint(tmp_path / "c.pt", task="cnn")], "task 'cnn'"),
    ):
        with pytest.raises(DataError, match=found):
            evaluation.main(["--ckpt", path, *argv, "--device", "cpu"])
    bare = checkpoint(tmp_path / "d.pt", std=None)
    kept = evaluation.load_checkpoint(bare)[1]
    del kept["data"]["audio"]
    save_checkpoint(bare, kept)
    with pytest.raises(DataError, match="without data of a fine-tuning"):
        evaluation.main(["--ckpt", bare, "--device", "cpu"])
    with pytest.raises(DataError, match="give --data DIR"):
        evaluation.main(["--ckpt", checkpoint(tmp_path / "e.pt", synthetic=False), "--device", "cpu"])
    decoder = [evaluation.audio_options(evaluation.argparse.ArgumentParser())[0]]
    with pytest.raises(DataError, match="--audio: only for checkpoints of pretrain_ast.py"):
        evaluation._refuse_given(Namespace(audio="x", ckpt=["d.pt"]), decoder, "pretrain_ast.py", "decoder")


def test_one_segment_is_what_a_group_is():
    assert segment_of("Schubert_D960_mv2_8bars_Score_04") == segment_of("Schubert_D960_mv2_8bars_1_04")
