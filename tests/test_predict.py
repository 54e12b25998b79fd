"""eval.py predict: evaluate's predictions of a corpus from files alone; averages, outputs, refusals."""

import csv
import io
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import torch
from conftest import refusal
from sklearn.gaussian_process.kernels import Matern
from test_score import document, quarters
from test_whole import ONCE, piece  # noqa: F401

import data
import eval as evaluation
from data import LABELS, PHONEMES
from models import AST, CNN, HAN, GRUDecoder, KernelRidge, json_ready, save_checkpoint, save_ensemble

SHARED = Path(__file__).resolve().parents[2] / "shared" / "percepiano"
DAYS = ["t12.2001.01.02", "t12.2001.01.09"]


@pytest.fixture(scope="session")
def piano(tmp_path_factory):
    """A small PercePiano of short pieces: its files, and the corpus that is read from them."""
    root = tmp_path_factory.mktemp("piano") / "corpus"
    data.synth_percepiano(root, segments=8, players=4)
    seen = Counter()
    for path in sorted(root.glob("virtuoso/data/all_2rounds/*.mid")):
        seen[data.score_of(path.stem)] += 1
        if seen[data.score_of(path.stem)] > 2:
            path.unlink()  # two of a segment are enough
            continue
        midi = mido.MidiFile(path)
        midi.ticks_per_beat *= 8
        midi.save(path)
    corpus = data.load_percepiano(root, root.parent / "cache", workers=1, quiet=True)
    files = root / "virtuoso/data"
    return SimpleNamespace(
        root=root,
        cache=root.parent / "cache",
        corpus=corpus,
        names=sorted(corpus.items),
        midi=lambda name: str(files / f"all_2rounds/{name}.mid"),
        score=lambda name: str(files / f"score_xml/{data.score_of(name)}.musicxml"),
    )


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """Two days of synthetic speech, and the same converted."""
    root = tmp_path_factory.mktemp("speech")
    data.synth_speech(root / "public", days=2, trials=12)
    data.convert_speech(root / "public", root / "converted", quiet=True)
    known = {"root": root / "public", "converted": root / "converted"}
    return SimpleNamespace(**known, corpus=data.open_speech(root / "converted"))


def save(path, task: str, model, info: dict, seed: int = 7, **args) -> str:
    ckpt = {"task": task, "model_args": model.model_args, "model": model.state_dict(), "step": 3, "epoch": 1}
    ckpt |= {"git_sha": None, "best": {"valid_mse_per_dimension": [0.01] * 19}}
    save_checkpoint(path, ckpt | {"args": {"seed": seed, **args}, "data": info})
    return str(path)


ABOUT = {"labels": list(LABELS), "split": "random", "fold": 0, "keep_overlap": True, "synthetic": True}


def han(path, piano, features: str = "full", seed: int = 7, **info) -> str:
    torch.manual_seed(seed)
    fitted = data.fit_normalisation(piano.corpus, piano.names[::2], features, pooled=True)
    model = HAN(len(fitted["columns"]), size=8, heads=2, stats_size=len(fitted["quantiles"][0]))
    with torch.no_grad():
        model.head[-1].weight.mul_(20)  # ratings far apart
    return save(path, "han", model, fitted | ABOUT | info, seed)


def audio(path, task: str = "cnn", seed: int = 7, standardise: str = "dimension", outputs=19) -> str:
    torch.manual_seed(seed)
    ast = AST(frames=64, width=16, depth=1, heads=2, num_outputs=outputs)
    model = CNN(width=4) if task == "cnn" else ast
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    known = {"mean": -7.0, "std": 4.0, "frames": 64, "audio": "rendered", "fbank": data.FBANK_FORMAT}
    known |= {"target_mean": np.linspace(0.3, 0.6, 19).tolist(), "target_std": [0.1] * 19}
    return save(path, task, model, ABOUT | known, seed, standardise=standardise)


def decoder(path, seed: int = 7, channels: int = 256) -> str:
    torch.manual_seed(seed)
    model = GRUDecoder(channels=channels, days=2, hidden=8, layers=1, kernel=8, stride=4)
    torch.nn.init.normal_(model.fc_decoder_out.weight)
    torch.nn.init.normal_(model.dayBias)  # days that differ
    known = {"days": DAYS, "channels": channels, "phonemes": list(PHONEMES), "rules": data.speech_rules()}
    return save(path, "decoder", model, known | {"valid": "blocks", "synthetic": True}, seed)


def predict(*argv) -> list[dict]:
    return evaluation.main(["predict", "--device", "cpu", *map(str, argv)])


def refuse(capsys, *argv) -> str:
    return refusal(["predict", "--device", "cpu", *map(str, argv)], capsys)


def fold_predictions(paths: list[str], piano) -> dict[str, np.ndarray]:
    """name -> what evaluate writes for that item."""
    loaded = evaluation._load_models(paths)
    args = SimpleNamespace(device=torch.device("cpu"), cache=piano.cache, audio=None)
    args.rate = None
    predictions, _ = evaluation.fold_predictions(loaded, piano.corpus, args, ("valid", "test"))
    return {name: p for (*_, name), p in predictions.items()}


def values(record: dict) -> np.ndarray:
    return np.array(list(record["ratings"].values()))


@pytest.mark.slow
@pytest.mark.parametrize("features", ["full", "score", "perf"])
def test_ratings_from_files_are_those_of_evaluate(features, piano, tmp_path):
    path, records = han(tmp_path / "a.pt", piano, features), []
    expected = fold_predictions([path], piano)
    for name in sorted(expected)[:3]:
        records += predict("--ckpt", path, "--score", piano.score(name), "--midi", piano.midi(name))
        assert (records[-1]["name"], records[-1]["path"]) == (name, piano.midi(name))
        assert values(records[-1]) == pytest.approx(expected[name], abs=1e-6)
        assert records[-1]["match_rate"] == piano.corpus.items[name]["match_rate"] >= 0.6
    assert np.ptp([values(record) for record in records], axis=0).max() > 0.05


@pytest.mark.slow
def test_ratings_from_audio_are_those_of_evaluate(piano, tmp_path, capsys):
    paths = [audio(tmp_path / "a.pt", "ast"), audio(tmp_path / "b.pt", "ast", 8)]
    predict("--ckpt", audio(tmp_path / "c.pt", standardise="group"), "--midi", piano.midi(piano.names[0]))
    assert "mean, SD" not in capsys.readouterr().out  # of the ratings in training: by group only
    expected = fold_predictions(paths, piano)
    chosen = sorted(expected)[:2]
    records = predict("--ckpt", *paths, "--midi", *map(piano.midi, chosen))
    for record, name in zip(records, chosen, strict=True):
        assert values(record) == pytest.approx(expected[name], abs=1e-6)
    said = capsys.readouterr().out
    assert ("such models" in said, "mean, SD" in said) == (False, True)
    wav = tmp_path / "wav" / f"{chosen[0]}.WAV"
    wav.parent.mkdir()
    data.write_wav(wav, data.render(data.read_midi(piano.midi(chosen[0]))))
    (heard,) = predict("--ckpt", *paths, "--audio", wav.parent)
    assert (heard["name"], heard["path"]) == (chosen[0], str(wav))
    assert values(heard) == pytest.approx(values(records[0]), abs=0.02)  # 16 bits
    assert "no copies in rooms, of one piano; such models: validation R² 0.41 as" in capsys.readouterr().out
    for beside in ("day 2/b.wav", ".trash/c.wav", "d.mid"):
        (wav.parent / beside).parent.mkdir(exist_ok=True)
        (wav.parent / beside).write_bytes(wav.read_bytes())
    heard = predict("--ckpt", *paths, "--audio", wav.parent)
    assert sorted(record["name"] for record in heard) == sorted([chosen[0], "b"])
    said = capsys.readouterr().out
    assert ("1 .mid" in said, "2 predicted, 0 refused" in said) == (True, True)


def evaluated(paths: list[str], speech, out: Path) -> dict[str, dict]:
    """trial -> the row that evaluate writes."""
    argv = f"--data {speech.converted} --part test --csv {out} --device cpu --words"
    evaluation.main(["--ckpt", *paths, *argv.split()])
    return {row["trial"]: row for row in csv.DictReader(io.StringIO(out.read_text()))}


@pytest.mark.slow
def test_phonemes_from_files_are_those_of_evaluate(speech, tmp_path, capsys):
    paths = [decoder(tmp_path / f"{seed}.pt", seed) for seed in range(2)]
    expected = evaluated(paths, speech, tmp_path / "t.csv")
    (mat,) = speech.root.glob(f"competitionData/test/{DAYS[0]}.mat")
    cache = "--cache", tmp_path / "cache"
    for source in (speech.converted, mat):
        capsys.readouterr()
        asked = ["--words"] if source == speech.converted else []
        found = predict("--ckpt", *paths, "--speech", source, *cache, *asked)
        records = {record["id"]: record for record in found}
        said = capsys.readouterr().out
        assert "SYNTHETIC corpus: figures" in said
        of_test = [trial for trial in expected if source != mat or DAYS[0] in trial]
        assert set(of_test) <= set(records)
        for trial in of_test:
            assert records[trial]["phonemes"] == expected[trial]["hypothesis"] != ""
            assert records[trial]["reference"] == expected[trial]["reference"]
            if asked:
                assert records[trial]["words"] == expected[trial]["words_hypothesis"]
            assert records[trial]["errors"] == {key: int(expected[trial][key]) for key in evaluation.EDITS}
        labelled = sum(record["reference"] is not None for record in records.values())
        assert f"PER of {labelled} labelled trials" in said


def test_a_block_of_npy_files_is_standardised_as_in_training(speech, tmp_path):
    path, corpus, folder = decoder(tmp_path / "a.pt"), speech.corpus, tmp_path / "npy"
    trials = np.flatnonzero((corpus.part == "test") & (corpus.day == 0))
    assert len(set(corpus.block[trials])) == 1
    folder.mkdir()
    for i in trials:
        features = corpus.features[corpus.offsets[i] : corpus.offsets[i + 1]]
        np.save(folder / f"{i:03d}.npy", 3 * features + 2)
    expected = evaluated([path], speech, tmp_path / "t.csv")
    records = predict("--ckpt", path, "--speech", folder, "--day", DAYS[0])
    for record, i in zip(records, trials, strict=True):
        assert record["phonemes"] == expected[corpus.ids[i]]["hypothesis"]
        assert record["seconds"] == 0.02 * corpus.lengths[i]
    one_by_one = predict("--ckpt", path, "--speech", *sorted(folder.iterdir()), "--day", DAYS[0])
    assert one_by_one == records


def test_words_of_other_files_need_a_lexicon_and_a_language_model(speech, tmp_path, capsys):
    (mat,) = speech.root.glob(f"competitionData/test/{DAYS[0]}.mat")
    line = refuse(capsys, "--ckpt", decoder(tmp_path / "a.pt"), "--speech", mat, "--words", "--strict")
    assert "--lexicon" in line


def test_words_of_a_corpus_are_tuned_on_its_validation_part(speech, tmp_path, monkeypatch):
    def words(log_probs, corpus, trials, args, valid, train):
        parts = data.speech_parts(corpus)
        for given, part in ((valid, "valid"), (train, "train")):
            assert given.tolist() == parts[part].tolist()
        assert {*valid} <= log_probs.keys() == set(trials)
        return {"sentences": dict.fromkeys(trials, ["boat"])}

    monkeypatch.setattr(evaluation, "words", words)
    found = predict("--ckpt", decoder(tmp_path / "a.pt"), "--speech", speech.converted, "--tune")
    assert [record["words"] for record in found] == ["boat"] * len(speech.corpus.ids)
    asked: list = []  # with a lexicon and a model of one's own, no part is needed
    monkeypatch.setattr(evaluation, "speech_parts", lambda *a: asked.append(a))
    monkeypatch.setattr(evaluation, "words", lambda *a: {"sentences": dict.fromkeys(a[2], ["boat"])})
    predict("--ckpt", tmp_path / "a.pt", "--speech", speech.converted, *"--words --lexicon l --lm m".split())
    assert not asked


def test_day_layers_and_raw_features(tmp_path, capsys):
    path, x = decoder(tmp_path / "a.pt"), np.random.default_rng(0).normal(3, 2, (80, 256))
    source, short = tmp_path / "t12.2001.01.07.npy", tmp_path / "short.npy"
    np.save(source, x)
    np.save(short, x[:5])
    model, z = evaluation.load_checkpoint(path)[0], (x - x.mean(0)) / x.std(0)

    def decoded(x, day: int) -> str:
        with torch.no_grad():
            batch = torch.tensor(x, dtype=torch.float32)[None], torch.tensor([80]), torch.tensor([day])
            return evaluation.spell(evaluation.ctc_greedy(*model(*batch))[0])

    options = {"": decoded(z, -1), "--raw": decoded(x, -1), "--day mean": decoded(z, -1)}
    options |= {"--day nearest": decoded(z, 1), f"--day {DAYS[0]}": decoded(z, 0)}
    assert len(set(options.values())) == 4
    for option, phonemes in options.items():
        assert predict("--ckpt", path, "--speech", source, *option.split())[0]["phonemes"] == phonemes
    assert f"day layer they get: {{'t12.2001.01.07': '{DAYS[1]}'}}" in capsys.readouterr().out
    assert predict("--ckpt", path, "--speech", short)[0]["phonemes"] == ""


@pytest.mark.slow
def test_averages_and_outputs(piano, tmp_path, capsys):
    known = {"rating_mean": [0.4] * 19, "rating_std": [0.125] * 19}
    other = known | {"rating_mean": [0.6] * 19, "fold": 1}
    paths = [han(tmp_path / "a.pt", piano, **known), han(tmp_path / "b.pt", piano, "full", 8, **other)]
    name = piano.names[0]
    other = piano.midi(next(n for n in piano.names if data.score_of(n) != data.score_of(name)))
    score, midi = piano.score(name), str(tmp_path / f"{name}.mid")
    Path(midi).write_bytes(Path(piano.midi(name)).read_bytes() + b"XFIH\0\0\0\1x")
    each = [values(predict("--ckpt", path, "--score", score, "--midi", midi)[0]) for path in paths]
    assert np.abs(each[0] - each[1]).max() > 0.01
    capsys.readouterr()
    outputs = "--json", tmp_path / "new/a.json", "--csv", tmp_path / "a.csv"
    records = predict("--ckpt", *paths, "--score", score, "--midi", midi, other, *outputs)
    assert values(records[0]) == pytest.approx((each[0] + each[1]) / 2, abs=1e-12)
    said = capsys.readouterr().out
    assert records[0]["repairs"] == f"{midi}: chunks of another kind left out (1)"
    assert f"repaired: {records[0]['repairs']}\n" in said
    table = [line for line in said.splitlines() if line.endswith("0.50 0.12")]
    assert (len(table), max(map(len, table)) <= 100) == (19, True)
    assert "SYNTHETIC" in said
    saved = json.loads((tmp_path / "new/a.json").read_text())
    assert saved["predictions"] == json_ready(records)
    keys = "name path score bars start end match_rate extra notes repairs ratings uncertainty warnings"
    assert list(records[0]) == [*keys.split(), "passages"]
    # of the networks' validation errors and their spread
    half = np.hypot(1.2816 * 0.1, 1.2816 * np.abs(each[0] - each[1]) / 2)
    assert [*records[0]["uncertainty"].values()] == pytest.approx(half)
    assert list(records[0]["ratings"]) == list(LABELS)
    assert saved["training"][LABELS[0]] == {"mean": 0.5, "sd": 0.125}
    assert saved["poles"]["Timing_Stable_Unstable"] == ["Stable", "Unstable"]
    used = [(used["path"], used["seed"], used["step"], used["fold"]) for used in saved["checkpoints"]]
    assert used == [(paths[0], 7, 3, 0), (paths[1], 8, 3, 1)]
    assert saved["trained_on_synthetic"] is True
    assert [other in line for line in saved["refused"]] == [True]
    (row,) = csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text()))
    assert list(row)[:10] == [*list(records[0])[:10]]
    assert float(row["Articulation_Long_Short: Short ... Long"]) == pytest.approx(values(records[0])[1])
    assert float(row[f"{LABELS[18]} ± 80 %"]) == pytest.approx(half[18])


@pytest.mark.slow
def test_one_file_of_networks_and_kernels(piano, tmp_path, capsys):
    """What floor and evaluate --out write, averaged with each other as alone."""
    data_of = ["--data", str(piano.root), "--cache", str(piano.cache), "--device", "cpu"]
    fit = ["floor", "--model", "kernel", "--split", "random", "--keep-overlap", "--fold", "0", *data_of]
    evaluation.main([*fit, "--out", str(tmp_path / "kernel.pt"), "--csv", str(tmp_path / "kernel.csv")])
    networks = [han(tmp_path / f"{seed}.pt", piano, seed=seed) for seed in (7, 8)]
    together = str(tmp_path / "networks.pt")
    evaluation.main(["--ckpt", *networks, *data_of, "--out", together])
    kernel = str(tmp_path / "kernel.pt")
    alone = fold_predictions(networks, piano), fold_predictions([kernel], piano)
    direct = evaluation.read_predictions(tmp_path / "kernel.csv")
    mixed = fold_predictions([together, kernel], piano)
    for name, p in ((name, p) for (part, _, name), p in direct.items() if part == "valid"):
        assert alone[1][name] == pytest.approx(p, abs=0.02)  # rounded
        assert mixed[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2, abs=0.02)
    name = piano.names[0]
    capsys.readouterr()
    given = ["--score", piano.score(name), "--midi", piano.midi(name)]
    first = [predict("--ckpt", *order, *given)[0] for order in ([kernel, together], [kernel])]
    (record,) = predict("--ckpt", together, kernel, *given)
    assert first[0]["ratings"] == pytest.approx(record["ratings"])
    assert max(abs(x - record["ratings"][label]) for label, x in first[1]["ratings"].items()) > 1e-4
    said = capsys.readouterr().out.splitlines()[0]
    assert f"{together} (2 × han, validation R² " in said
    assert f"{kernel} (1 × kernel, validation R² " in said
    ckpts = [evaluation.load_checkpoint(path)[1] for path in (together, kernel)]
    assert min(record["uncertainty"].values()) > 0.5 * np.mean([ckpt["error80"] for ckpt in ckpts], 0).min()


@pytest.mark.parametrize(
    ("task", "items"), [("ast", {}), ("han", {"Op_8bars_Score_01": {"y": np.zeros(19)}})]
)
def test_out_needs_rated_players_of_the_validation_part(task, items):
    corpus = SimpleNamespace(items=items, synthetic=True, root="corpus")
    args = SimpleNamespace(save_results=None, csv=None, out="all.pt")
    predictions = {("valid", 0, "Op_8bars_Score_01"): np.zeros(19)}
    with pytest.raises(data.DataError, match="all.pt"):
        evaluation._finish(predictions, corpus, args, ["valid"], {"split": "x", "task": task})


def test_kernel_is_scikit_learns():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5)), rng.uniform(0.2, 0.8, (30, 1))
    kernel = Matern(length_scale=np.sqrt(5), nu=1.5)
    new = rng.normal(size=(4, 5))
    dual = np.linalg.solve(kernel(x) + 0.1 * np.eye(30), y - y.mean())
    model = KernelRidge.fit(torch.from_numpy(x), torch.from_numpy(y))
    found = torch.sigmoid(model({"stats": torch.from_numpy(new).float()}))
    np.testing.assert_allclose(found, y.mean() + kernel(new, x) @ dual, atol=1e-5)


def test_equal_versions_of_every_item_change_no_rating():
    rng = np.random.default_rng(1)
    x, y, new = (torch.from_numpy(rng.uniform(0.2, 0.8, size)) for size in ((30, 5), (30, 3), (4, 5)))
    once = KernelRidge.fit(x, y)({"stats": new.float()})
    thrice = KernelRidge.fit(x.repeat(3, 1), y.repeat(3, 1), versions=3)({"stats": new.float()})
    torch.testing.assert_close(thrice, once, atol=1e-4, rtol=0)
    assert (KernelRidge.fit(x.repeat(3, 1), y.repeat(3, 1))({"stats": new.float()}) - once).abs().max() > 0.01


def test_shipped_models_rate_without_being_named(piano, capsys):
    name = piano.names[0]
    (record,) = predict("--score", piano.score(name), "--midi", piano.midi(name))
    said = capsys.readouterr().out
    for path, megabytes in zip(evaluation.SHIPPED, (4, 6), strict=True):
        assert f"{path} (" in said.splitlines()[0]
        assert Path(path).stat().st_size <= 1e6 * megabytes
    assert len(record["uncertainty"]) == 19
    assert (evaluation.say_unheard() in record["warnings"]) == (evaluation.say_unheard() in said)
    sound = Path(piano.midi(name)).with_suffix(".wav")
    data.write_wav(sound, data.render(data.read_midi(piano.midi(name))))
    (record,) = predict("--audio", str(sound))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{evaluation.SHIPPED_FOR_SOUND[0]} (")
    assert said[1].endswith("R² 0.45 as rendered, 0.38 as if recorded, 0.32 on another piano")
    assert 0 < min(record["ratings"].values()) < max(record["ratings"].values()) < 1


@pytest.mark.parametrize(
    ("copies", "fonts", "told"),
    [
        (None, None, "by its record on no copies in rooms, of one piano; such models: validation R² 0.41"),
        (0, [], "by its record on no copies in rooms, of one piano; such models: validation R² 0.41"),
        (1, [], "with hiss, of one piano; such models: validation R² 0.42 as rendered, 0.37 as if recorded"),
        (2, ["/x/a.sf2"], "with hiss, of several pianos; such models: validation R² 0.45"),
        (0, ["/x/a.sf2"], "no copies in rooms, of several pianos"),  # of which nothing was measured
    ],
)
def test_worth_of_ratings_of_recordings(copies, fonts, told, tmp_path):
    """As training records it: in a trainer's options, which a file of --out does not keep, and in that."""
    options = {} if copies is None else {"copies": copies, "soundfonts": fonts}
    path = save(tmp_path / "a.pt", "cnn", CNN(width=4), ABOUT | {"audio": "rendered"}, **options)
    loaded = evaluation._load_models([path])
    save_ensemble(tmp_path / "b.pt", loaded, {})
    for members in (loaded, evaluation._load_models([tmp_path / "b.pt"])):
        said = evaluation.say_other_sound(members)
        assert told in said
        assert ("R²" in said) == ("R²" in told)
    members[0][1]["data"]["audio"] = "wav"
    assert "not measured" in evaluation.say_other_sound(members)


def test_intervals_hold_80_percent_of_what_they_were_not_fitted_on():
    """On the shipped predictions: half-widths of three folds on the fourth's human players."""
    if not SHARED.is_dir():
        pytest.skip("no labels beside the repository")
    truth = data.read_labels(SHARED, [])
    predictions = evaluation.read_predictions(evaluation.RESULTS / "han_ensemble_segment.csv")
    held = []
    for fold in range(4):
        others = {key: p for key, p in predictions.items() if key[1] != fold}
        half = np.array(evaluation.human_figures(others, truth, "valid")["error80"])
        own = {key: p for key, p in predictions.items() if key[1] == fold}
        _, y, p, _ = evaluation._stacked(own, truth, "valid", "no_renderings")
        held.append((np.abs(y - p) <= half).mean())
    assert len(held) == 4
    assert np.mean(held) == pytest.approx(0.8, abs=0.02)
    assert min(held) > 0.74


def test_a_work_is_heard_where_most_folds_trained_on_it():
    folds = [(0, {"data": {"works": works}}) for works in (["W_1"], ["W_1"], ["W_2"], ["W_1"])]
    scores = [f"there/{work}_8bars_Score_3.mid" for work in ("W_1", "W_2", "W_3")]
    assert [evaluation.heard_in_training(folds, score) for score in [*scores, "x.mxl"]] == [
        True,
        *[False] * 3,
    ]


def test_takes_stand_side_by_side_and_what_differs_is_marked(capsys):
    takes = []
    for name, value in (("a", 0.5), ("b", 0.5), ("c", 0.7)):
        record = {"name": name, "path": f"{name}/take.mid", "bars": "1-8"}
        record["ratings"] = dict.fromkeys(LABELS, value)
        takes.append(record | {"uncertainty": dict.fromkeys(LABELS, 0.1)})
    takes[2]["ratings"] |= {LABELS[1]: 0.62}  # .12 above the others: errors allow .1 * sqrt(1 + 1/2)
    evaluation.compare_takes(takes)
    lines = capsys.readouterr().out.splitlines()
    assert "b/take.mid, bars 1-8" in lines[-22]
    assert lines[-20].split() == ["0", "…", "1", "1", "2", "3", "±", "80", "%"]
    assert lines[-19].split()[-5:] == ["0.50", "0.50", "0.70+", "±", "0.10"]
    assert lines[-18].split()[-5:] == ["0.50", "0.50", "0.62", "±", "0.10"]
    head, *rows = evaluation.predictions_table(takes)
    assert [row[head.index(f"{LABELS[0]} differs")] for row in rows] == ["", "", "above"]
    evaluation.compare_takes([take | {"uncertainty": {}} for take in takes])
    assert "+" not in capsys.readouterr().out.splitlines()[-19]


def test_poles_are_the_halves_of_the_names():
    poles = evaluation.LABEL_POLES
    assert poles["Articulation_Long_Short"] == ("Short", "Long")  # rated the other way round
    assert poles["Emotion_&_Mood_Low_Energy_High_Energy"] == ("Low energy", "High energy")


def test_explanations_get_what_they_need(piano, speech, tmp_path, monkeypatch, capsys):
    asked: list = []
    monkeypatch.setattr(evaluation, "explain", lambda *given: asked.append(given))
    name, midi = piano.names[0], piano.midi(piano.names[0])
    pictures = "--explain", tmp_path
    predict("--ckpt", han(tmp_path / "h.pt", piano), "--score", piano.score(name), "--midi", midi, *pictures)
    heard = "--ckpt", audio(tmp_path / "a.pt", "ast"), "--midi", midi
    predict(*heard, *pictures)
    records = predict("--ckpt", decoder(tmp_path / "d.pt"), "--speech", speech.converted, *pictures)
    assert [kind for kind, *_ in asked] == ["han", "ast"] + ["decoder"] * len(records)
    files = [tmp_path / f"{name}.png"] * 2 + [tmp_path / f"{records[0]['id'].replace('/', '_')}.png"]
    assert [out for _, out, *_ in asked[:3]] == files
    work = asked[0][3]
    assert (len(work["match"]), work["performance"].path) == (len(work["score"].pitch), midi)
    assert (work["match"] >= 0).mean() == piano.corpus.items[name]["match_rate"]
    assert asked[1][3]["energies"].shape[1] == 128
    work = asked[2][3]
    assert work["log_probs"].shape == ((speech.corpus.lengths[0] - 8) // 4 + 1, 41)
    assert (evaluation.spell(work["labels"]), work["seconds per frame"]) == (records[0]["reference"], 0.08)

    def cannot(*_):
        raise data.DataError("nothing to see")

    monkeypatch.setattr(evaluation, "explain", cannot)
    assert len(predict(*heard, *pictures)) == 1
    assert "nothing to see" in capsys.readouterr().out
    assert "nothing to see" in refuse(capsys, *heard, *pictures, "--strict")


@pytest.mark.slow
def test_a_folder_is_rated_file_by_file_and_what_does_not_match_is_refused(
    piano, tmp_path, capsys, monkeypatch
):
    path, name = han(tmp_path / "a.pt", piano), piano.names[0]
    takes = [n for n in piano.names if data.score_of(n) == data.score_of(name)]
    others = [n for n in piano.names if data.score_of(n) != data.score_of(name)][:1]
    folder = tmp_path / "takes"
    folder.mkdir()
    for n in [*takes, *others]:
        (folder / f"{n}.mid").write_bytes(Path(piano.midi(n)).read_bytes())
    (folder / "bad.mid").write_bytes(b"MThd")
    (folder / "day 2").mkdir()
    (folder / "day 2" / f"{takes[0]}.MID").write_bytes(Path(piano.midi(takes[0])).read_bytes())
    pair = "--ckpt", path, "--score", piano.score(name), "--midi"
    drawn = []
    monkeypatch.setattr(evaluation, "explain", lambda kind, picture, *_: drawn.append(picture))
    rated = [record["name"] for record in predict(*pair, folder, "--explain", tmp_path)]
    assert sorted(rated) == sorted([*takes, takes[0]])
    assert len({*drawn}) == len(rated)
    assert f"{len(rated)} predicted, 2 refused" in capsys.readouterr().out
    assert "bad.mid" in refuse(capsys, *pair, folder / "bad.mid", piano.midi(name), "--strict")
    unlike = f"{others[0]}.mid"
    assert unlike in refuse(capsys, *pair, folder / unlike, "--json", tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()
    (tmp_path / "none").mkdir()
    assert f"{tmp_path / 'none'}: a folder without .mid" in refuse(capsys, *pair, tmp_path / "none")


@pytest.mark.slow
def test_long_pieces_are_rated_by_passages(piece, piano, tmp_path, capsys):  # noqa: F811
    pair = "--ckpt", han(tmp_path / "h.pt", piano), "--score", piece.score, "--midi", piece.midi
    piece(ONCE)
    (record,) = predict(*pair, "--csv", tmp_path / "a.csv", "--explain", tmp_path)
    assert [row["bars"] for row in record["passages"]] == ["1-16", "17-32", "33-48"]
    ratings = np.array([list(row["ratings"].values()) for row in record["passages"]])
    np.testing.assert_allclose(list(record["ratings"].values()), ratings.mean(0))
    assert ratings.std(0).max() > 1e-4
    assert "repeat of bars 9-16" in record["warnings"]
    assert (tmp_path / "take.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["bars"] for row in rows] == ["1-48", "1-16", "17-32", "33-48"]
    (part,) = predict(*pair, "--bars", "17-32")
    np.testing.assert_allclose(list(part["ratings"].values()), ratings[1], atol=1e-5)
    assert (part["bars"], part["passages"], part["start"]) == ("17-32", [], 32)
    for bars in ("12-5", "40-60", "x"):
        assert bars in refuse(capsys, *pair, "--bars", bars)
    piece([*range(1, 9)])
    assert "20-27" in refuse(capsys, *pair, "--bars", "20-27")


def test_what_is_left_out_is_said_where_one_passage_remains(piano, tmp_path):
    keys = np.random.default_rng(7).integers(45, 85, (28, 4))
    (tmp_path / "p.musicxml").write_text(document([quarters(*bar) for bar in keys.tolist()]))
    played = [(k / 2, k / 2 + 0.4, key, 60) for k, key in enumerate(keys.ravel().tolist()) if k < 56 or k % 2]
    data._save_midi(tmp_path / "p.mid", played, [(0.1, 64, 90)])
    pair = "--score", tmp_path / "p.musicxml", "--midi", tmp_path / "p.mid"
    (record,) = predict("--ckpt", han(tmp_path / "h.pt", piano), *pair)
    assert (record["bars"], "bars 13-28 hardly played" in record["warnings"]) == ("1-16", True)


@pytest.mark.gpu
def test_shipped_models_of_sound_rate_on_a_gpu(piano, capsys):
    argv = ["predict", "--ckpt", *evaluation.SHIPPED_FOR_SOUND, "--midi", piano.midi(piano.names[0])]
    here, there = (evaluation.main([*argv, "--device", device])[0] for device in ("cpu", "cuda"))
    assert values(there) == pytest.approx(values(here), abs=0.01)
    assert there["sound"] == here["sound"]


def test_inputs_that_do_not_fit_the_checkpoint_are_refused(piano, speech, tmp_path, capsys):
    rates, hears = han(tmp_path / "h.pt", piano), audio(tmp_path / "a.pt")
    decodes = decoder(tmp_path / "d.pt")
    score, midi = piano.score(piano.names[0]), piano.midi(piano.names[0])
    np.save(tmp_path / "x.npy", np.zeros((40, 256)))
    for path, argv, name in (
        (rates, f"--midi {midi}", rates),
        (rates, f"--audio {midi}", "--audio"),
        (rates, f"--score {score} --midi {tmp_path}/none", "none"),
        (hears, f"--audio {midi} --midi {midi}", "--audio"),
        (decodes, f"--speech {score}", score),
        (decodes, f"--speech {tmp_path}/x.npy {score} --nbest 2", "given 2 inputs"),  # of one --nbest-file
        (decodes, f"--speech {tmp_path}/none --csv {tmp_path}", f"{tmp_path}: expected a file"),
        (decodes, f"--speech {tmp_path}/x.npy --day t12.1999.01.01", "t12.1999.01.01"),
        (f"{rates} {hears}", f"--midi {midi}", hears),
        (rates, f"--score {score} --midi {midi} --json {tmp_path}", tmp_path),
    ):
        cache = "--cache", tmp_path / "cache"
        assert str(name) in refuse(capsys, "--ckpt", *path.split(), *argv.split(), *cache)


def test_npy_files_that_hold_no_trial_are_refused(tmp_path, capsys):
    path, bad = decoder(tmp_path / "a.pt", channels=4), tmp_path / "bad.npy"
    for shape, value in ((40, 3), 0), (40, 0), ((0, 4), 0), *(((40, 4), v) for v in (np.nan, "a", None)):
        np.save(bad, np.full(shape, value))
        assert str(bad) in refuse(capsys, "--ckpt", path, "--speech", bad)
    np.save(tmp_path / "good.npy", np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32))
    (tmp_path / "good.npy").rename(tmp_path / "good.NPY")
    assert [record["id"] for record in predict("--ckpt", path, "--speech", tmp_path)] == ["good"]
    out = capsys.readouterr().out
    assert "1 predicted, 1 refused" in out
    assert "other kinds: 1 .pt" in out
