"""eval.py on audio: prediction, significance, comparison, rater ceiling, floor and probe, on small fakes."""

import argparse
import functools
import itertools
import json

import numpy as np
import pytest
import torch
from conftest import check_results
from scipy.stats import pearsonr, permutation_test

import eval as evaluation
from data import FBANK_FORMAT, LABELS, SILENCE, DataError, FbankStore, normalise_fbank
from models import AST, CNN, ClipKernel, save_checkpoint

CPU = torch.device("cpu")
INFO = {"mean": -4.0, "std": 3.0, "frames": 64, "target_mean": [0.5] * 19, "target_std": [0.1] * 19}
INFO |= {"fbank": FBANK_FORMAT}
approx = pytest.approx


def network(frames: int = 64, seed: int = 0, **kw) -> AST:
    torch.manual_seed(seed)
    model = AST(frames=frames, width=16, depth=1, heads=2, num_outputs=19, **kw).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # outputs far enough apart to tell items from each other
    return model


def clips(*frames: int) -> list[dict]:
    rng, items = np.random.default_rng(1), []
    for n in frames:
        fbank = rng.normal(rng.uniform(-8, 0), 3, (n, 128)).astype(np.float16)
        items.append({"name": str(n), "frames": n, "fbank": fbank})
    return items


def crops_of(x: np.ndarray, *starts: int) -> list[torch.Tensor]:
    """(1, 64, 128) each, normalised."""
    x = normalise_fbank(torch.from_numpy(x.astype(np.float32)), INFO["mean"], INFO["std"])
    return [x[None, start : start + 64] for start in starts]


def test_crops_cover_an_item_evenly():
    for frames, expected in ((50, [0]), (64, [0]), (65, [0, 1]), (200, [0, 45, 91, 136])):
        assert evaluation.crop_starts(frames, 64) == expected


@pytest.mark.parametrize("model", [network(), CNN(width=4).eval()], ids=["ast", "cnn"])
def test_predictions_are_of_all_crops_and_do_not_depend_on_the_batch(model):
    items = clips(64, 40, 5, 150, 63, 65, 17)
    together = evaluation.predict_ast(model, items, INFO, CPU, batch=4)
    alone = np.concatenate([evaluation.predict_ast(model, [item], INFO, CPU, batch=1) for item in items])
    assert together == approx(alone, abs=1e-6)
    assert np.ptp(together, axis=0).min() > 1e-4
    with torch.no_grad():
        crops = crops_of(items[3]["fbank"], 0, 43, 86)
        if isinstance(model, AST):  # tokens of all, then one head
            rated = model.head(model.tokens_of(torch.cat(crops), None)[0][-1].mean((0, 1))[None])
        else:
            rated = torch.cat([model(x) for x in crops])
    assert together[3] == approx((0.5 + 0.1 * rated.double().mean(0).numpy()).clip(0, 1), abs=1e-6)


def test_heads_see_the_statistics_of_the_whole_item():
    model = network(statistics=True)
    [item] = clips(150)
    x = normalise_fbank(torch.from_numpy(item["fbank"].astype(np.float32)), INFO["mean"], INFO["std"])[None]
    model.statistics.fit(torch.cat([model.statistics.values(x), model.statistics.values(x.flip(1) / 2)]))
    described = evaluation.describe_clip(model, item, INFO)
    z = (model.statistics.values(x) - model.statistics.mean) / model.statistics.std
    assert (described[:, 16:] - z).abs().max() < 1e-5
    found = evaluation.predict_ast(model, [item], INFO, CPU)
    with torch.no_grad():
        rated = model(described=described)
    assert found == approx((0.5 + 0.1 * rated.double().numpy()).clip(0, 1), abs=1e-6)


def test_a_short_item_is_filled_with_silence_before_normalisation():
    seen = []

    class Spy(torch.nn.Module):
        model_args = {"frames": 64}

        def forward(self, x):
            seen.append(x)
            return x.new_full((len(x), 19), 7.0)

    found = evaluation.predict_ast(Spy(), clips(64, 5, 150), INFO, CPU, batch=2)
    assert found.tolist() == [[1.0] * 19] * 3  # 0.5 + 0.1 * 7, clipped
    assert [tuple(x.shape) for x in seen] == [(1, 64, 128), (1, 16, 128), (2, 64, 128), (1, 64, 128)]
    assert seen[1][0, 5:].unique().tolist() == approx([(SILENCE + 4) / 6], abs=1e-5)


@pytest.mark.slow
def test_permutation_equals_enumeration():
    rng = np.random.default_rng(2)
    y = rng.normal(size=(6, 1))
    p = y + rng.normal(size=(6, 1))
    statistic = lambda p: np.corrcoef(y[:, 0], p)[0, 1]  # noqa: E731
    kind = {"permutation_type": "pairings", "alternative": "greater", "n_resamples": np.inf}
    exact = permutation_test((p[:, 0],), statistic, **kind).pvalue
    assert evaluation.permutation_p(y, p, list("abcdef"), n=2000)[0] == approx(exact, abs=0.03)
    values = []
    for groups in itertools.permutations([(0, 1), (2, 3), (4, 5)]):
        for orders in itertools.product((1, -1), repeat=3):
            moved = [i for group, order in zip(groups, orders, strict=True) for i in group[::order]]
            values.append(statistic(p[moved, 0]))
    exact = np.mean(np.array(values) >= statistic(p[:, 0]) - 1e-12)
    assert evaluation.permutation_p(y, p, list("aabbcc"), n=2000)[0] == approx(exact, abs=0.03)


def test_holm_by_hand():
    assert evaluation.holm([0.01, 0.04, 0.03, 0.005]) == approx([0.03, 0.06, 0.06, 0.02])
    assert evaluation.holm([0.5, 0.9, np.nan]) == approx([1, 1, np.nan], nan_ok=True)


def test_paired_bootstrap_equals_a_plain_loop():
    rng = np.random.default_rng(6)
    y = rng.normal(size=(12, 2))
    pa, pb = y + 0.5 * rng.normal(size=y.shape), y + rng.normal(size=y.shape)
    groups, folds = np.array(list("aabbccddeeff")), np.array([0, 1] * 6)

    def gain(rows):
        """Mean over the folds of what A's correlation is above B's, (2,)."""
        found = []
        for f in (0, 1):
            r = rows[folds[rows] == f]
            of = lambda p, d, r=r: np.corrcoef(y[r, d], p[r, d])[0, 1]  # noqa: E731
            found.append([of(pa, d) - of(pb, d) for d in range(2)])
        return np.mean(found, axis=0)

    options = {"folds": folds, "n": 200, "seed": 3}
    found, (low, high), p = evaluation.paired_bootstrap(y, pa, pb, groups, evaluation.pearson, **options)
    rng, draws = np.random.default_rng(3), []
    for _ in range(200):
        draws.append(gain(np.concatenate([[2 * k, 2 * k + 1] for k in rng.integers(6, size=6)])))
    assert found == approx(gain(np.arange(12)))
    assert [low, high] == approx(np.percentile(draws, [2.5, 97.5], axis=0), abs=1e-9)
    below, above = (np.array(draws) < 1e-9).sum(0), (np.array(draws) > -1e-9).sum(0)
    assert p == approx(np.minimum(1, 2 * (np.minimum(below, above) + 1) / 201))


def simulated(items: int, raters: int, between: float, error: float, again: float) -> tuple:
    """Ratings of known variances: true ratings of variance 1; some raters rate an item several times."""
    rng, truth, rows = np.random.default_rng(8), {}, []
    for i in range(items):
        truth[f"{i:05d}"] = rng.normal()
        for rater in rng.choice(50, size=rng.integers(2, raters), replace=False):
            view = truth[f"{i:05d}"] + rng.normal(0, np.sqrt(between))
            for _ in range(1 + rng.poisson(again)):
                rows.append((rater, f"{i:05d}", view + rng.normal(0, np.sqrt(error))))
    return tuple(np.array(column) for column in zip(*rows, strict=True)), truth


@pytest.mark.parametrize(("between", "error", "again"), [(1.5, 1.0, 0.6), (2.0, 0.0, 0.0), (0.0, 2.0, 0.8)])
def test_ceiling_is_the_score_of_the_truth(between, error, again):
    (raters, names, ratings), truth = simulated(2500, 10, between, error, again)
    c = evaluation.rater_ceiling(raters, names, ratings[:, None])
    means = np.bincount(names.astype(int), ratings) / np.bincount(names.astype(int))
    known = np.array([*truth.values()])
    assert c["r2"][0] == approx(1 - ((means - known) ** 2).mean() / means.var(), abs=0.02)
    assert c["pearson"][0] == approx(pearsonr(means, known)[0], abs=0.015)
    assert c["between"][0] + c["error"][0] == approx(between + error, abs=0.12)
    assert c["items"] == 2500
    if between and again:
        assert c["error"][0] == approx(error, abs=0.06)


def test_ceiling_by_hand():
    # means 2 and 6, variance 4; within items 2 and 2, of 2 ratings each: noise 1; R2 = 1 - 1/4
    ratings = np.array([[1, 1], [3, 3], [5, 5], [7, 7], [np.nan, 6]])
    c = evaluation.rater_ceiling(np.array([1, 2, 1, 2, 3]), np.array(list("aabbb")), ratings)
    assert [c[key][0] for key in ("r2", "pearson")] == approx([0.75, np.sqrt(0.75)])
    # second column: within 2 + 2 on 3 degrees, 4/3 a rating; noise 4/3 (1/2 + 1/3) / 2 = 5/9; R2 = 1 - 5/36
    assert c["r2"][1] == approx(1 - 5 / 36)


def test_ceiling_command(monkeypatch, capsys, tmp_path):
    (raters, names, ratings), _ = simulated(40, 6, 1.0, 0.5, 0.5)
    players = np.where(names < "00010", "Score_", "1_")
    names = np.char.add(np.char.add("Schubert_D960_mv2_8bars_", players), names)
    rated = raters, names, np.repeat(ratings[:, None], 19, axis=1)
    monkeypatch.setattr(evaluation, "read_ratings", lambda root: rated)
    views = evaluation.main(["ceiling", "--data", str(tmp_path)])
    assert (views["all"]["items"], views["no_renderings"]["items"]) == (40, 30)
    out = capsys.readouterr().out
    assert f"{views['all']['r2'][0]:.4f}" in out
    assert f"{views['no_renderings']['pearson'].mean():.4f}" in out


@pytest.fixture
def corpus(corpus, monkeypatch, tmp_path):
    """The common corpus with sound: loudness is the rating."""
    rng, files, frames = np.random.default_rng(1), [], np.random.default_rng(2).integers(30, 100, 40)
    for (name, item), count in zip(corpus.items.items(), frames, strict=True):
        level = item["y"][-1] if "y" in item else 0.5
        files.append(tmp_path / f"{name}.npy")
        np.save(files[-1], (rng.normal(-8, 1, (count, 128)) + 4 * level).astype(np.float16))
    corpus.names = [*corpus.items]
    store = FbankStore("fake", True, corpus.names, frames, [""] * 40, ["a line"], files)
    corpus.rated = {name: item["y"] for name, item in corpus.items.items() if "y" in item}
    monkeypatch.setattr(evaluation, "percepiano_audio", lambda *a, **k: store)
    monkeypatch.setattr(evaluation, "read_labels", lambda *a: corpus.rated)
    monkeypatch.setattr(evaluation, "significance", functools.partial(evaluation.significance, n=100))
    return corpus


def checkpoint(path, fold: int = 0, seed: int = 7, task: str = "ast", bare: bool = False, **data) -> str:
    """A fine-tuned AST, a CNN, or the AST of a pre-training (`bare`)."""
    torch.manual_seed(seed)
    model = CNN(width=4) if task == "cnn" else network(seed=seed)
    if bare:
        model = AST(frames=64, width=16, depth=1, heads=2)
    kept = {"task": task, "model_args": model.model_args, "model": model.state_dict()}
    kept |= {"args": {"seed": seed}}
    kept["data"] = {**INFO, "labels": list(LABELS), "split": "segment", "fold": fold, "keep_overlap": False}
    kept["data"] |= {"synthetic": True, "audio": "rendered", **data}
    save_checkpoint(path, kept)
    return str(path)


@pytest.mark.slow
def test_checkpoints_are_scored_saved_and_tested(corpus, tmp_path, capsys):
    paths = [checkpoint(tmp_path / f"{fold}{seed}.pt", fold, seed) for fold in (0, 1) for seed in (7, 8)]
    metrics = evaluation.main(["--ckpt", *paths, "--device", "cpu", "--save-results", "scratch"])
    out = capsys.readouterr().out
    assert "fold 0: mean of 2 checkpoints, seeds [7, 8]" in out
    assert "left out: a line" in out
    saved = json.loads((tmp_path / "results/ast_scratch_segment.json").read_text())
    assert str(tmp_path) not in saved["command"]
    assert "--ckpt 07.pt 08.pt" in saved["command"]
    assert [saved[k] for k in ("task", "model", "audio", "seeds")] == ["ast", "ast", "rendered", [7, 8, 7, 8]]
    assert check_results("results/ast_scratch_segment.json", corpus.rated) > 500
    tests = saved["significance"]["valid"]["no_renderings"]
    assert np.shape(tests["pearson_interval"]) == np.shape(tests["r2_interval"]) == (19, 2)
    assert tests["p_holm"] == approx(evaluation.holm(tests["p"]))
    assert saved["significance"]["test"]["all"] is None  # one rated segment
    found = evaluation.read_predictions("results/ast_scratch_segment.csv")
    held = {name: p for (part, fold, name), p in found.items() if (part, fold) == ("valid", 1)}
    store = evaluation.percepiano_audio()
    items = [store.item(store.names.index(name)) for name in held]
    members = [evaluation.predict_ast(network(seed=seed), items, INFO, CPU) for seed in (7, 8)]
    assert np.stack([*held.values()]) == approx(np.mean(members, axis=0), abs=6e-5)
    assert metrics["valid"]["all"]["folds"]["1"]["items"] == 8


@pytest.mark.slow
def test_floor_hears_the_loudness(corpus, tmp_path, monkeypatch):
    kernel = ["floor", "--task", "ast", "--fold", "1", "--model", "kernel"]
    assert evaluation.main(kernel)["valid"]["all"]["mean"]["r2"] > 0.5
    evaluation.main([*kernel, "--heads", "2", "--out", str(tmp_path / "k.pt"), "--save-results", "kernel"])
    evaluation.main(["--ckpt", str(tmp_path / "k.pt"), "--device", "cpu", "--csv", "again.csv"])
    again, before = (evaluation.read_predictions(f) for f in ("again.csv", "results/ast_kernel_segment.csv"))
    assert max(np.abs(p - before[key]).max() for key, p in again.items()) < 0.01  # float16
    result = evaluation.main(["floor", "--task", "ast", "--fold", "1", "--save-results", "floor"])
    assert result["valid"]["all"]["mean"]["r2"] > 0.5
    assert result["test"]["no_renderings"]["folds"]["1"]["items"] == 3
    saved = json.loads((tmp_path / "results/ast_floor_segment.json").read_text())
    assert (saved["model"], saved["audio"]) == ("ridge", "rendered")
    with pytest.raises(DataError, match="--heads of kernel"):
        evaluation.main([*kernel[:-1], "ridge", "--heads", "2"])
    # recordings of what validates alone: the renderings train all the same
    whole, valid = evaluation.percepiano_audio(), evaluation.percepiano_parts(corpus, "segment", 1)["valid"]
    few = FbankStore("few", True, valid, np.zeros(len(valid), int), [], [], [])
    few.item = lambda i: whole.item(whole.names.index(valid[i]))
    monkeypatch.setattr(evaluation, "rated_store", lambda *_: few)
    monkeypatch.setattr(evaluation, "_finish", lambda predictions, *_: predictions)
    again = evaluation.main(["floor", "--task", "ast", "--fold", "1", "--rate", "recorded"])
    before = evaluation.read_predictions("results/ast_floor_segment.csv")
    assert sorted(again) == sorted(key for key in before if key[0] == "valid")
    assert max(np.abs(p - before[key]).max() for key, p in again.items()) < 1e-4
    monkeypatch.setattr(evaluation, "audio_store", lambda *_: few)
    with pytest.raises(DataError, match="fold 1, 0 recordings"):
        evaluation.main(["floor", "--task", "ast", "--fold", "1"])


def test_a_kernel_weighs_what_a_piano_does_not_change():
    rng = np.random.default_rng(3)
    steady, moved = rng.normal(size=(2, 40, 1, 843)).repeat(2, axis=2)
    described = np.where(np.arange(843) < 400, steady, moved + 3 * rng.normal(size=moved.shape)).reshape(
        80, 843
    )
    item, ratings = torch.arange(40).repeat_interleave(2), torch.rand(40, 19, generator=torch.manual_seed(1))
    x = torch.from_numpy(described).float()
    model = ClipKernel(80).fit(x, ratings[item], item)
    assert model.weight[:400].min() > 1 > 0.1 > model.weight[400:].mean()
    assert float(model.weight[model.seen].square().mean()) == approx(1, abs=1e-4)
    assert 400 <= model.seen.sum() == model.model_args["columns"] < 843
    alone = model.rate(x)
    assert float((alone - ratings[item]).square().mean()) < 0.5 * float(ratings.var())
    model = ClipKernel(80, heads=2).fit(x, ratings[item], item)
    with torch.no_grad():
        heads = torch.stack([head(model.ranks(x)).sigmoid() for head in model.heads])
    assert model.rate(x).numpy() == approx((alone + heads.mean(0)).numpy() / 2, abs=1e-5)
    assert float((heads[0] - heads[1]).abs().max()) > 1e-3  # seeds of their own
    assert float((heads[0] - ratings[item]).square().mean()) < 0.8 * float(ratings.var())


def test_a_kernel_is_fitted_on_what_was_heard(corpus):
    """Training performances without a recording change nothing."""
    heard = {"audio": None, "copies": 1, "soundfonts": ["/x/a.sf2"]}
    args = argparse.Namespace(heads=1, split="segment", keep_overlap=False, **heard)
    clips = object.__new__(evaluation.Clips)
    clips.corpus, clips.args, clips.info, clips.model = corpus, args, {}, ClipKernel(1)
    names = evaluation.percepiano_parts(corpus, "segment", 0)["train"]
    clips.train = clips.rated = {name: torch.randn(843) for name in names[1:-2]}
    (whole, [(_, a)]), (heard, [(_, b)]) = (clips.fit("kernel", n, 0) for n in (names, names[1:-2]))
    assert (whole(names[1:4]) == heard(names[1:4])).all()
    assert a["data"]["rating_mean"] == b["data"]["rating_mean"]
    assert (a["data"]["copies"], a["data"]["soundfonts"]) == (1, ["a.sf2"])


@pytest.mark.slow
def test_probe_adds_the_tokens_of_a_frozen_encoder(corpus, tmp_path):
    """Of one depth: mean and deviation of the final tokens over all crops, here by one pass a crop."""
    bare, store = checkpoint(tmp_path / "bare.pt", bare=True), evaluation.percepiano_audio()
    args = argparse.Namespace(
        probe=bare, rate=None, copies=0, soundfonts=[], audio=None, cache=None, device=CPU
    )
    rows, (model, _) = evaluation.Clips(corpus, args).rated, evaluation.load_checkpoint(bare)
    assert rows.keys() == set(store.names)
    for i in (int(store.frames.argmin()), int(store.frames.argmax())):
        starts = evaluation.crop_starts(int(store.frames[i]), 64)
        with torch.no_grad():
            seen = [model(x)[0].double().numpy() for x in crops_of(store.get(i), *starts)]
        mean = np.mean([t.mean(0) for t in seen], axis=0)
        square = np.mean([(t**2).mean(0) for t in seen], axis=0)
        expected = np.concatenate([mean, np.sqrt(square - mean**2)])
        assert rows[store.names[i]].numpy()[-32:] == approx(expected, abs=1e-3)  # float16
    probe = ["floor", "--task", "ast", "--fold", "1", "--probe"]
    result = evaluation.main([*probe, bare, "--save-results", "probe"])
    assert result["valid"]["all"]["mean"]["r2"] > 0.5
    assert json.loads((tmp_path / "results/ast_probe_segment.json").read_text())["probe"] == "bare.pt"
    with pytest.raises(DataError, match="rates.pt: .*a pre-training"):
        evaluation.main([*probe, checkpoint(tmp_path / "rates.pt")])


def results_file(path, corpus, noise: float, split: str = "segment", segments=range(9)) -> str:
    rng = np.random.default_rng(int(1000 * noise))
    names = [n for n in corpus.items if int(n[-2:]) in segments]
    p = np.stack([corpus.items[n]["y"] for n in names]) + noise * rng.normal(size=(len(names), 19))
    keys = [("valid", 0, name) for name in names]
    evaluation.write_predictions(path, dict(zip(keys, p, strict=True)))
    path.with_suffix(".json").write_text(json.dumps({"split": split}))
    return str(path)


def compare(a: str, b: str, *options: str) -> dict:
    return evaluation.main(["compare", "--a", a, "--b", b, "--draws", "300", *options])


def test_compare_results_and_checkpoints(corpus, tmp_path, capsys):
    good = results_file(tmp_path / "good.csv", corpus, 0.02)
    bad = results_file(tmp_path / "bad.csv", corpus, 0.5)
    result = compare(good, bad)
    assert result["difference"] == approx(result["a"] - result["b"])
    assert result["interval"][0] > 0
    assert "A is better than B: mean pearson +" in result["verdict"]
    assert result["per_dimension"]["p_holm"] == approx(evaluation.holm(result["per_dimension"]["p"]))
    assert (result["items"], result["clusters"]) == (36, 9)
    swapped = compare(bad, good, "--metric", "r2")
    assert "A is worse than B" in swapped["verdict"]
    assert (swapped["items"], swapped["clusters"]) == (36, 9)
    few = compare(bad, good, "--metric", "r2", "--cluster", "performer")
    assert few["difference"] == swapped["difference"]
    assert "cannot be told" in few["verdict"]
    assert np.isnan(few["per_dimension"]["p_holm"]).all()
    capsys.readouterr()
    assert compare(good, checkpoint(tmp_path / "0.pt"), "--device", "cpu")["items"] == 8  # its fold 0
    assert "28 items" in capsys.readouterr().out


def test_refusals(corpus, tmp_path):
    a = results_file(tmp_path / "a.csv", corpus, 0.1, segments=range(8))
    other = results_file(tmp_path / "b.csv", corpus, 0.2, "piece")
    apart = results_file(tmp_path / "c.csv", corpus, 0.2, segments=(8,))
    synthetic = results_file(tmp_path / "d.csv", corpus, 0.1)
    (tmp_path / "d.json").write_text(json.dumps({"split": "segment", "synthetic": True}))
    path = checkpoint(tmp_path / "a.pt")
    for argv, found in (
        (["compare", "--a", a, "--b", other], "piece"),
        (["compare", "--a", a, "--b", apart], "0 rated items"),
        (["compare", "--a", a, a, "--b", a], "one CSV"),
        (["compare", "--a", synthetic, "--b", synthetic], "corpus"),  # performances of the same names
        (["--ckpt", path, checkpoint(tmp_path / "b.pt", audio="wav")], "'wav'"),
        (["--ckpt", checkpoint(tmp_path / "e.pt", synthetic=False)], "--data"),
        (["compare", "--a", path, "--b", path, "--words"], "no --words"),
        (["compare", "--a", path, "--b", path, "--nbest", "2"], "no --nbest"),  # of both in one file
        (
            ["predict", "--audio", "x.wav", "--ckpt", str(evaluation.RESULTS / "ast_encoder.pt")],
            "holds no split",
        ),
    ):
        with pytest.raises(DataError, match=found):
            evaluation.main(argv)
    sound = argparse.Namespace(audio="dir")
    evaluation.refuse_foreign(sound, "han", path, ["han", "mlp"])  # compared with a model of sound
    with pytest.raises(DataError, match="no --audio"):
        evaluation.refuse_foreign(sound, "han", path, ["han", "kernel"])
