"""eval.py predict: the same predictions as evaluate's on items of a corpus, from files alone; averages, outputs, refusals."""

import csv
import io
import json
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import torch

import data
import eval as evaluation
import train_han
from data import LABELS, PHONEMES
from models import AST, CNN, HAN, GRUDecoder, save_checkpoint

CPU = torch.device("cpu")
DAYS = ["t12.2001.01.02", "t12.2001.01.09"]


@pytest.fixture(scope="session")
def piano(tmp_path_factory):
    """A small PercePiano of short pieces: its files, and the corpus that is read from them."""
    root = tmp_path_factory.mktemp("piano") / "corpus"
    data.synth_percepiano(root, segments=8, players=4)
    performances = sorted(
        root.glob("virtuoso/data/all_2rounds/*.mid"), key=lambda path: (data.segment_of(path.stem), path.stem)
    )
    for k, path in enumerate(performances):
        if k and data.segment_of(path.stem) == data.segment_of(performances[k - 2].stem):
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
        folder=str(files / "all_2rounds"),
    )


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """Two days of synthetic speech, and the same converted."""
    root = tmp_path_factory.mktemp("speech")
    data.synth_speech(root / "public", days=2, trials=12)
    data.convert_speech(root / "public", root / "converted", quiet=True)
    return SimpleNamespace(
        root=root / "public", converted=root / "converted", corpus=data.open_speech(root / "converted")
    )


def save(path, task: str, model, info: dict, seed: int = 7, **args) -> str:
    rest = dict.fromkeys(("optimizer", "scheduler", "scaler", "ema", "rng", "git_sha", "best", "skipped"))
    save_checkpoint(
        path,
        {
            "task": task,
            "model_args": model.model_args,
            "model": model.state_dict(),
            **rest,
            "step": 3,
            "epoch": 1,
            "args": {"seed": seed, **args},
            "data": info,
        },
    )
    return str(path)


def han(path, piano, features: str = "full", seed: int = 7, **info) -> str:
    torch.manual_seed(seed)
    fitted = data.fit_normalisation(piano.corpus, piano.names[::2], features, pooled=True)
    info = fitted | {
        "labels": list(LABELS),
        "split": "random",
        "fold": 0,
        "keep_overlap": True,
        "synthetic": True,
        **info,
    }
    stats = len(fitted["quantiles"][0])
    model = HAN(
        input_size=len(fitted["columns"]), size=8, heads=2, stats_size=stats, head_gain=20
    )  # ratings far apart
    return save(path, "han", model, info, seed)


def audio(path, task: str = "cnn", seed: int = 7, standardise: str = "dimension", **info) -> str:
    torch.manual_seed(seed)
    model = (
        CNN(width=4)
        if task == "cnn"
        else AST(
            frames=64, width=16, depth=1, heads=2, num_outputs=None if info.get("kind") == "pretrain" else 19
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    known = {
        "mean": -7.0,
        "std": 4.0,
        "frames": 64,
        "labels": list(LABELS),
        "split": "random",
        "fold": 0,
        "keep_overlap": True,
        "synthetic": True,
        "audio": "rendered",
        "target_mean": np.linspace(0.3, 0.6, 19).tolist(),
        "target_std": [0.1] * 19,
        **info,
    }
    return save(path, task, model, known, seed, standardise=standardise)


def decoder(path, seed: int = 7, channels: int = 256, **info) -> str:
    torch.manual_seed(seed)
    model = GRUDecoder(channels=channels, days=2, hidden=8, layers=1, kernel=8, stride=4)
    torch.nn.init.normal_(model.fc_decoder_out.weight)
    torch.nn.init.normal_(model.dayBias)  # days that differ
    known = {
        "days": DAYS,
        "channels": channels,
        "phonemes": list(PHONEMES),
        "rules": data.speech_rules(),
        "valid": "blocks",
        "synthetic": True,
        **info,
    }
    return save(path, "decoder", model, known, seed)


def predict(*argv) -> list[dict]:
    return evaluation.main(["predict", "--device", "cpu", *map(str, argv)])


def refusal(capsys, *argv) -> str:
    """The line on standard error of a command that fails."""
    with pytest.raises(SystemExit) as stop:
        data.run_script("eval.py", lambda: predict(*argv))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def fold_predictions(paths: list[str], piano) -> dict[str, np.ndarray]:
    """name -> what evaluate writes for that item."""
    folds, _ = evaluation._load_fold_models(evaluation._load_models(paths))
    args = SimpleNamespace(device=CPU, batch=None, crops=None, cache=piano.cache, audio=None)
    records = evaluation.fold_records(folds, piano.corpus, args, ("valid", "test"))
    return {name: p for record in records for name, p in zip(record["names"], record["p"], strict=True)}


# --- parity with evaluate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["full", "score", "perf"])
def test_ratings_from_files_are_those_of_evaluate(features, piano, tmp_path):
    path = han(tmp_path / "a.pt", piano, features)
    expected = fold_predictions([path], piano)
    chosen = sorted(expected)[:6]
    records = predict(
        "--ckpt", path, "--score", *map(piano.score, chosen), "--midi", *map(piano.midi, chosen)
    )
    assert [record["name"] for record in records] == chosen
    for record in records:
        assert record["ratings"] == pytest.approx(expected[record["name"]], abs=1e-6)
        assert record["match_rate"] == piano.corpus.items[record["name"]]["match_rate"] >= 0.6
    assert np.ptp([record["ratings"] for record in records], axis=0).max() > 0.05


def test_ratings_from_audio_are_those_of_evaluate(piano, tmp_path):
    paths = [audio(tmp_path / "a.pt", "ast"), audio(tmp_path / "b.pt", "ast", 8)]
    expected = fold_predictions(paths, piano)
    chosen = sorted(expected)[:3]
    records = predict("--ckpt", *paths, "--midi", *map(piano.midi, chosen))
    assert np.array([r["ratings"] for r in records]) == pytest.approx(
        np.array([expected[name] for name in chosen]), abs=1e-6
    )
    wav = tmp_path / "wav" / f"{chosen[0]}.WAV"
    wav.parent.mkdir()
    data.write_wav(wav, data.render(data.read_midi(piano.midi(chosen[0]))))
    (heard,) = predict("--ckpt", *paths, "--audio", wav.parent)
    assert (heard["name"], heard["path"]) == (chosen[0], str(wav))
    assert heard["ratings"] == pytest.approx(records[0]["ratings"], abs=0.02)  # 16 bits


def transcripts(paths: list[str], speech, out) -> dict[str, str]:
    evaluation.main(
        [
            "--ckpt",
            *paths,
            "--data",
            str(speech.converted),
            "--part",
            "test",
            "--csv",
            str(out),
            "--device",
            "cpu",
        ]
    )
    return {row["trial"]: row for row in csv.DictReader(io.StringIO(out.read_text()))}


@pytest.mark.parametrize("count", [1, 2])
def test_phonemes_from_files_are_those_of_evaluate(count, speech, tmp_path, capsys):
    paths = [decoder(tmp_path / f"{seed}.pt", seed) for seed in range(count)]
    expected = transcripts(paths, speech, tmp_path / "t.csv")
    capsys.readouterr()
    records = predict("--ckpt", *paths, "--speech", speech.converted)
    shown = {record["id"]: record for record in records}
    assert len(shown) == len(speech.corpus.ids)
    for trial, row in expected.items():
        assert evaluation.spell(shown[trial]["phonemes"]) == row["hypothesis"] != ""
        assert evaluation.spell(shown[trial]["reference"]) == row["reference"]
        assert [str(n) for n in shown[trial]["errors"]] == [row[key] for key in ("sub", "del", "ins")]
    said = capsys.readouterr().out
    assert f"PER of {speech.corpus.labelled.sum()} labelled trials" in said
    assert "may have been trained: no result" in said
    (mat,) = speech.root.glob(f"competitionData/test/{DAYS[0]}.mat")
    alone = predict("--ckpt", *paths, "--speech", mat)
    assert [record["id"] for record in alone] == [
        trial.removeprefix("test/") for trial in expected if DAYS[0] in trial
    ]
    assert [evaluation.spell(record["phonemes"]) for record in alone] == [
        row["hypothesis"] for trial, row in expected.items() if DAYS[0] in trial
    ]
    assert "SYNTHETIC corpus" in capsys.readouterr().out


# --- decoder: .npy files and day layers ------------------------------------------------------------------------------


def write_block(folder, corpus, scale: float = 1.0) -> list[int]:
    """One test block, a file a trial; returns the trials' numbers."""
    folder.mkdir(exist_ok=True)
    trials = np.flatnonzero((corpus.part == "test") & (corpus.day == 0))
    assert len(set(corpus.block[trials])) == 1
    for i in trials:
        np.save(
            folder / f"{i:03d}.npy",
            scale * corpus.features[corpus.offsets[i] : corpus.offsets[i + 1]] + scale - 1,
        )
    return trials.tolist()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_block_of_npy_files_is_standardised_as_in_training(scale, speech, tmp_path, capsys):
    path, trials = decoder(tmp_path / "a.pt"), write_block(tmp_path / "npy", speech.corpus, scale)
    expected = transcripts([path], speech, tmp_path / "t.csv")
    capsys.readouterr()
    records = predict("--ckpt", path, "--speech", tmp_path / "npy", "--day", DAYS[0])
    assert [evaluation.spell(record["phonemes"]) for record in records] == [
        expected[speech.corpus.ids[i]]["hypothesis"] for i in trials
    ]
    assert [record["seconds"] for record in records] == [0.02 * speech.corpus.lengths[i] for i in trials]
    assert (
        "standardised when they came" if scale == 1 else "z-scored together, as one block"
    ) in capsys.readouterr().out
    one_by_one = predict("--ckpt", path, "--speech", *sorted((tmp_path / "npy").iterdir()), "--day", DAYS[0])
    assert [r["phonemes"] for r in one_by_one] == [r["phonemes"] for r in records]


def test_day_layers_and_raw_features(speech, tmp_path, capsys):
    path, x = decoder(tmp_path / "a.pt"), np.random.default_rng(0).normal(3, 2, (80, 256))
    for name in ("t12.2001.01.07", "t12.2001.01.02"):
        np.save(tmp_path / f"{name}.npy", x)
    (model, _), z = evaluation.load_checkpoint(path), (x - x.mean(0)) / x.std(0)

    def decoded(x, day: int) -> list[int]:
        with torch.no_grad():
            logits, frames = model(
                torch.tensor(x, dtype=torch.float32)[None], torch.tensor([80]), torch.tensor([day])
            )
        return evaluation.ctc_greedy(logits, frames)[0]

    source = tmp_path / "t12.2001.01.07.npy"
    options = {
        (): decoded(z, -1),
        ("--raw",): decoded(x, -1),
        ("--day", "mean"): decoded(z, -1),
        ("--day", "nearest"): decoded(z, 1),
        ("--day", DAYS[0]): decoded(z, 0),
    }
    assert len({str(ids) for ids in options.values()}) == 4
    for option, ids in options.items():
        assert predict("--ckpt", path, "--speech", source, *option)[0]["phonemes"] == ids
    said = capsys.readouterr().out
    for line in (
        "session of .npy files: unknown to",
        "the mean of all day layers",
        f"session t12.2001.01.07: unknown to {path}; day layer of {DAYS[1]}",
        f"day layer of {DAYS[0]} for every trial",
        "taken as they are (--raw)",
    ):
        assert line in said
    assert "session t12.1999.01.01: unknown to the model, which knows t12" in refusal(
        capsys, "--ckpt", path, "--speech", source, "--day", "t12.1999.01.01"
    )
    short = tmp_path / "short.npy"
    np.save(short, x[:5])
    (record,) = predict("--ckpt", path, "--speech", short)
    assert record["phonemes"] == []


def test_a_mat_file_without_sentences_is_decoded_without_labels(speech, tmp_path, capsys):
    path = decoder(tmp_path / "a.pt")
    source, mine = speech.root / f"competitionData/test/{DAYS[1]}.mat", tmp_path / f"{DAYS[1]}.mat"
    data.savemat(
        mine,
        {key: value for key, value in data.loadmat(source).items() if key in ("tx1", "spikePow", "blockIdx")},
    )
    records = predict("--ckpt", path, "--speech", mine)
    assert len(records) == (speech.corpus.part[speech.corpus.day == 1] == "test").sum() > 0
    assert all(record["reference"] is None for record in records)
    assert f"no labels: {mine}: field sentenceText: missing" in capsys.readouterr().out


# --- averages and outputs --------------------------------------------------------------------------------------------


def test_ratings_of_checkpoints_are_averaged(piano, tmp_path, capsys):
    known = {"rating_mean": [0.4] * 19, "rating_std": [0.125] * 19}
    paths = [
        han(tmp_path / "a.pt", piano, **known),
        han(tmp_path / "b.pt", piano, "perf", 8, fold=1, rating_mean=[0.6] * 19, rating_std=[0.125] * 19),
    ]
    name = piano.names[0]
    pair = ("--score", piano.score(name), "--midi", piano.midi(name))
    each = [predict("--ckpt", path, *pair)[0]["ratings"] for path in paths]
    assert np.abs(each[0] - each[1]).max() > 0.01
    capsys.readouterr()
    assert predict("--ckpt", *paths, *pair)[0]["ratings"] == pytest.approx((each[0] + each[1]) / 2, abs=1e-12)
    said = capsys.readouterr().out
    assert "predictions of 2 checkpoints averaged" in said
    table = [line for line in said.splitlines() if line.endswith("0.50 0.12")]
    assert len(table) == 19
    assert max(map(len, table)) <= 100
    assert "SYNTHETIC" in said


def test_json_and_csv_hold_all_predictions(piano, tmp_path, capsys):
    path, name = (
        han(tmp_path / "a.pt", piano, rating_mean=[0.4] * 19, rating_std=[0.125] * 19),
        piano.names[0],
    )
    other = next(n for n in piano.names if data.score_of(n) != data.score_of(name))
    records = predict(
        "--ckpt",
        path,
        "--score",
        piano.score(name),
        "--midi",
        piano.midi(name),
        piano.midi(other),
        "--json",
        tmp_path / "new" / "a.json",
        "--csv",
        tmp_path / "a.csv",
    )
    saved = json.loads((tmp_path / "new" / "a.json").read_text())
    (shown,) = saved["predictions"]
    assert (shown["name"], shown["path"], shown["score"]) == (name, piano.midi(name), piano.score(name))
    assert shown["match_rate"] == pytest.approx(records[0]["match_rate"])
    assert list(shown["ratings"]) == list(LABELS)
    assert list(shown["ratings"].values()) == pytest.approx(records[0]["ratings"], rel=1e-6)
    assert saved["training"][LABELS[0]] == {"mean": 0.4, "sd": 0.125}
    assert saved["poles"]["Timing_Stable_Unstable"] == ["Stable", "Unstable"]
    assert [(used["path"], used["seed"], used["step"]) for used in saved["checkpoints"]] == [(path, 7, 3)]
    assert saved["trained_on_synthetic"] is True
    assert len(saved["refused"]) == 1
    assert piano.midi(other) in saved["refused"][0]
    (row,) = csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text()))
    assert row["path"] == piano.midi(name)
    assert [float(row[label]) for label in LABELS] == pytest.approx(records[0]["ratings"], abs=1e-6)
    capsys.readouterr()
    predict("--ckpt", path, "--score", piano.score(name), "--midi", piano.midi(name), "--json", "-")
    printed = capsys.readouterr()
    assert json.loads(printed.out)["predictions"] == saved["predictions"]
    assert "1 predicted" in printed.err


def test_transcripts_are_written(speech, tmp_path, capsys):
    path, trials = decoder(tmp_path / "a.pt"), write_block(tmp_path / "npy", speech.corpus)
    (mat,) = speech.root.glob(f"competitionData/test/{DAYS[0]}.mat")
    records = predict(
        "--ckpt", path, "--speech", tmp_path / "npy", mat, "--json", tmp_path / "a.json", "--csv", "-"
    )
    saved, rows = (
        json.loads((tmp_path / "a.json").read_text()),
        list(csv.DictReader(io.StringIO(capsys.readouterr().out))),
    )
    assert len(records) == len(rows) == len(saved["predictions"]) == 2 * len(trials)
    for record, row, entry in zip(records, rows, saved["predictions"], strict=True):
        assert row["phonemes"] == entry["phonemes"] == evaluation.spell(record["phonemes"])
        assert row["path"] == entry["path"] == record["path"]
        assert entry["errors"] == (
            None
            if record["errors"] is None
            else dict(zip(("sub", "del", "ins"), record["errors"], strict=True))
        )
    assert rows[0]["sub"] == "" != rows[-1]["sub"]


def test_poles_are_the_halves_of_the_names():
    assert list(evaluation.LABEL_POLES) == list(LABELS)
    for label, (left, right) in evaluation.LABEL_POLES.items():
        left, right = (
            (right, left) if label == "Articulation_Long_Short" else (left, right)
        )  # rated the other way round
        squeezed = label.lower().replace("_", "").replace("/", "")
        assert squeezed.endswith((left + right).lower().replace(" ", "").replace("/", ""))
    assert evaluation.LABEL_POLES["Dynamic_Little_dynamic_range_Large_dynamic_range"] == (
        "Little dynamic range",
        "Large dynamic range",
    )
    assert evaluation.LABEL_POLES["Emotion_&_Mood_Low_Energy_High_Energy"] == ("Low energy", "High energy")
    assert evaluation.LABEL_POLES["Articulation_Soft_cushioned_Hard_solid"] == (
        "Soft/cushioned",
        "Hard/solid",
    )


@pytest.mark.parametrize(("value", "mean", "expected"), [
    (0, None, "o" + "." * 24), (1, 0.5, "." * 12 + "|" + "=" * 11 + "o"), (0.25, 0.5, "." * 6 + "o" + "=" * 5 + "|" + "." * 12), (0.5, 0.5, "." * 12 + "o" + "." * 12),
])  # fmt: skip
def test_scale_by_hand(value, mean, expected):
    assert evaluation._scale(value, mean) == expected


def test_training_keeps_the_ratings_mean_and_deviation(piano, tmp_path):
    options = f"--data {piano.root} --cache {piano.cache} --split random --size 8 --heads 2 --batch 8 --out {tmp_path} --name a --device cpu --epochs 2".split()
    train_han.main(train_han.parse_args([*options, "--max-steps", "1"]))
    last = tmp_path / "a" / "last.pt"
    ckpt = torch.load(last, weights_only=True)
    y = np.stack(
        [piano.corpus.items[n]["y"] for n in data.percepiano_parts(piano.corpus, "random", 0)["train"]]
    ).astype(float)
    assert ckpt["data"]["rating_mean"] == pytest.approx(y.mean(0))
    assert ckpt["data"]["rating_std"] == pytest.approx(y.std(0))
    del ckpt["data"]["rating_mean"], ckpt["data"]["rating_std"]  # a checkpoint of before
    save_checkpoint(last, ckpt)
    assert (
        evaluation._training_ratings(evaluation._predictors(evaluation._load_models([str(last)]))[1]) is None
    )
    train_han.main(
        train_han.parse_args(
            [
                "--resume",
                str(last),
                "--data",
                str(piano.root),
                "--cache",
                str(piano.cache),
                "--max-steps",
                "2",
            ]
        )
    )
    mean, spread = evaluation._training_ratings(
        evaluation._predictors(evaluation._load_models([str(last)]))[1]
    )
    assert mean == pytest.approx(y.mean(0))
    assert spread == pytest.approx(y.std(0))


def test_explanations_get_what_they_need(piano, speech, tmp_path, monkeypatch, capsys):
    asked: list = []
    monkeypatch.setattr(evaluation, "explain", lambda *a: asked.append(a))
    midi = piano.midi(piano.names[0])
    predict(
        "--ckpt",
        han(tmp_path / "h.pt", piano),
        "--score",
        piano.score(piano.names[0]),
        "--midi",
        midi,
        midi,
        "--explain",
        tmp_path / "pictures",
    )
    predict("--ckpt", audio(tmp_path / "a.pt", "ast"), "--midi", midi, "--explain", tmp_path / "a.svg")
    capsys.readouterr()
    assert "which has no attention" in refusal(
        capsys, "--ckpt", audio(tmp_path / "c.pt"), "--midi", midi, midi, "--explain", tmp_path / "pictures"
    )
    (mat,) = speech.root.glob(f"competitionData/test/{DAYS[0]}.mat")
    records = predict(
        "--ckpt", decoder(tmp_path / "d.pt"), "--speech", mat, "--explain", tmp_path / "pictures"
    )
    assert [kind for kind, *_ in asked] == ["han", "han", "ast"] + ["decoder"] * len(records)
    name = piano.names[0]
    drawn = [out.relative_to(tmp_path).as_posix() for _, out, *_ in asked[:4]]
    assert drawn == [
        f"pictures/{name}.png",
        f"pictures/{name}_2.png",
        "a.svg",
        f"pictures/{DAYS[0]}_0000.png",
    ]
    work = asked[0][3]
    assert (len(work["match"]), work["item"]["name"], work["performance"].path) == (
        len(work["score"].pitch),
        name,
        midi,
    )
    assert (work["match"] >= 0).mean() == piano.corpus.items[name]["match_rate"]
    assert asked[2][3]["energies"].shape[1] == 128
    work = asked[3][3]
    assert work["log_probs"].shape == (
        (speech.corpus.lengths[speech.corpus.ids.index(f"test/{records[0]['id']}")] - 8) // 4 + 1,
        41,
    )
    assert (work["phonemes"], work["labels"], work["seconds per frame"]) == (
        records[0]["phonemes"],
        records[0]["reference"],
        0.08,
    )

    def refuse(*_):
        raise data.DataError("nothing to see")

    monkeypatch.setattr(evaluation, "explain", refuse)
    capsys.readouterr()
    assert "nothing to see" in refusal(
        capsys, "--ckpt", tmp_path / "a.pt", "--midi", midi, "--explain", tmp_path / "a.svg"
    )
    assert (
        len(predict("--ckpt", tmp_path / "a.pt", "--midi", midi, midi, "--explain", tmp_path / "pictures"))
        == 2
    )
    assert capsys.readouterr().out.count("no picture: nothing to see") == 2


def test_an_interrupted_prediction_writes_nothing(piano, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "read_piece", interrupt)
    with pytest.raises(SystemExit) as stop:
        data.run_script(
            "eval.py",
            lambda: predict(
                "--ckpt", audio(tmp_path / "a.pt"), "--midi", piano.folder, "--json", tmp_path / "a.json"
            ),
        )
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip().endswith("eval.py: interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_the_spread_of_training_is_shown_where_it_is_known(piano, tmp_path, capsys):
    source = ("--midi", piano.midi(piano.names[0]))
    for standardise, shown in (("dimension", True), ("group", False), ("none", False)):
        predict("--ckpt", audio(tmp_path / f"{standardise}.pt", standardise=standardise), *source)
        assert ("  mean   SD" in capsys.readouterr().out) == shown


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_performance_of_another_score_is_refused(piano, tmp_path, capsys):
    path, name = han(tmp_path / "a.pt", piano), piano.names[0]
    other = next(n for n in piano.names if data.score_of(n) != data.score_of(name))
    (tmp_path / "bad.mid").write_bytes(b"MThd")
    line = refusal(capsys, "--ckpt", path, "--score", piano.score(other), "--midi", piano.midi(name))
    assert f"{name}.mid: holds " in line
    assert "expected 60% or more" in line
    assert "wrong piece, another edition or passage, or are repeats left out?" in line
    records = predict(
        "--ckpt",
        path,
        "--score",
        piano.score(name),
        "--midi",
        tmp_path / "bad.mid",
        piano.midi(other),
        piano.midi(name),
    )
    assert [record["name"] for record in records] == [name]
    said = capsys.readouterr().out
    assert said.count("refused: ") == 2
    assert "1 predicted, 2 refused" in said
    pair = ("--score", piano.score(name), "--midi", tmp_path / "bad.mid", piano.midi(name))
    assert "bad.mid: a truncated" in refusal(capsys, "--ckpt", path, *pair, "--strict")
    pair = ("--score", piano.score(name), "--midi", tmp_path / "bad.mid", piano.midi(other))
    line = refusal(capsys, "--ckpt", path, *pair, "--json", tmp_path / "a.json")
    assert "all 2 inputs were refused" in line
    assert not (tmp_path / "a.json").exists()


def test_pieces_unlike_those_of_training_are_pointed_out():
    record = {
        "name": "a",
        "score": "b.musicxml",
        "match_rate": 0.75,
        "extra": 0.25,
        "notes": 420,
        "ratings": np.full(19, 0.5),
    }
    plain = evaluation._show_ratings(record, None)
    assert (
        "a with b.musicxml\n75.0% of the score's notes were found; 25.0% of the played notes are not in it\n"
        in plain
    )
    odd = evaluation._show_ratings(record | {"extra": 0.6, "notes": 421}, None)
    assert (
        "60.0% of the played notes are not in it: a longer recording, or another edition?\n421 notes, where"
        in odd
    )


def test_a_folder_is_predicted_file_by_file(piano, tmp_path):
    path, name = han(tmp_path / "a.pt", piano), piano.names[0]
    same = [n for n in piano.names if data.score_of(n) == data.score_of(name)]
    records = predict("--ckpt", path, "--score", piano.score(name), "--midi", piano.folder)
    assert set(same) <= {record["name"] for record in records} < set(piano.names)


def test_inputs_that_do_not_fit_the_checkpoint_are_refused(piano, speech, tmp_path, capsys):
    rates, hears, decodes = (
        han(tmp_path / "h.pt", piano),
        audio(tmp_path / "a.pt"),
        decoder(tmp_path / "d.pt"),
    )
    score, midi = piano.score(piano.names[0]), piano.midi(piano.names[0])
    for argv, found in (
        (
            (rates, "--midi", midi),
            "compares a performance with its score; expected --score FILE.musicxml and --midi",
        ),
        ((rates, "--audio", midi), "--audio: only for checkpoints of pretrain_ast.py"),
        ((rates, "--score", score, score, "--midi", midi), "--score names 2 files, --midi 1"),
        ((rates, "--score", score, "--midi", tmp_path), "a folder without a file of kind .mid or .midi"),
        ((rates, "--score", tmp_path / "no.musicxml", "--midi", midi), "no.musicxml: cannot be read"),
        (
            (rates, "--score", score, "--midi", midi, "--raw"),
            "--raw: only for checkpoints of train_decoder.py",
        ),
        ((hears,), "expected --audio FILE.wav, or --midi"),
        ((hears, "--audio", midi, "--midi", midi), "give one of them"),
        ((hears, "--audio", midi), "expected an uncompressed WAV file"),
        ((hears, "--score", score, "--midi", midi), "--score: only for checkpoints of train_han.py"),
        ((decodes,), "expected --speech FILE_OR_FOLDER alone"),
        ((decodes, "--speech", tmp_path / "none"), "no such file or folder"),
        ((decodes, "--speech", speech.converted, "--raw"), "--raw: for .npy files only"),
        ((decodes, "--speech", score), "refused or unreadable as a pickle"),
        ((rates, hears, "--midi", midi), "evaluate them in separate runs"),
        (
            (audio(tmp_path / "p.pt", "ast", kind="pretrain"), "--midi", midi),
            "a pre-training, which rates nothing; expected a fine-tuned",
        ),
        ((rates, "--score", score, "--midi", midi, "--json", tmp_path), "no ordinary file"),
        ((rates, "--score", score, "--midi", midi, "--json", "/dev/null"), "no ordinary file"),
        (
            (rates, "--score", score, "--midi", midi, "--csv", tmp_path / "h.pt" / "a.csv"),
            "no file can be written in",
        ),
        ((rates, "--score", score, "--midi", midi, "--csv", "-", "--json", "-"), "both on standard output"),
        (
            (rates, "--score", score, "--midi", midi, "--explain", tmp_path / "a.gif"),
            "a picture of kind '.gif'",
        ),
        (
            (rates, "--score", score, "--midi", midi, midi, "--explain", tmp_path / "a.png"),
            "one picture for 2 inputs",
        ),
    ):
        count = 1 + sum(str(a).endswith(".pt") for a in argv[1:2])
        assert found in refusal(capsys, "--ckpt", *argv[:count], *argv[count:])


OBJECTS = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '|O', 'fortran_order': False, 'shape': (40, 4), }".ljust(117)
    + b"\n"
    + bytes(100)
)


@pytest.mark.parametrize(("array", "found"), [
    (np.zeros((40, 3)), "shape (40, 3); expected one trial"), (np.zeros((4, 40)), "shape (4, 40), the other way round"), (np.zeros(40), "shape (40,)"),
    (np.zeros((0, 4)), "expected one trial"), (np.full((40, 4), np.nan), "40 bins of NaN, infinite"), (np.full((40, 4), "a"), "type <U1"),
    (np.full((40, 4), 1j), "type complex128"),
    (OBJECTS, "Python objects"), (np.zeros((60_001, 4), np.float16), "1 to 60000 bins"), (b"", "an empty file"),
    (b"garbage", "starts with b'garbag'"),
    (b"PK\x03\x04broken", "not b"), (b"\x93NUMPY\x01\x00\x02\x00{}", "eader"),
])  # fmt: skip
def test_npy_files_that_hold_no_trial_are_refused(array, found, tmp_path, capsys):
    path, bad = decoder(tmp_path / "a.pt", channels=4), tmp_path / "bad.npy"
    if isinstance(array, bytes):
        bad.write_bytes(array)
    else:
        np.save(bad, array)
    line = refusal(capsys, "--ckpt", path, "--speech", bad)
    assert line.startswith(f"eval.py: {bad}: ")
    assert found in line
    np.save(tmp_path / "good.npy", np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32))
    assert [record["id"] for record in predict("--ckpt", path, "--speech", tmp_path)] == ["good"]
    assert "1 predicted, 1 refused" in capsys.readouterr().out
