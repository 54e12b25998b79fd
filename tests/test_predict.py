"""eval.py predict: evaluate's predictions of a corpus from files alone; averages, outputs, refusals."""

import csv
import io
import json
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import torch
from conftest import refusal

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
    ckpt = dict.fromkeys(("optimizer", "scheduler", "scaler", "ema", "rng", "git_sha", "best", "skipped"))
    ckpt |= {"task": task, "model_args": model.model_args, "model": model.state_dict(), "step": 3, "epoch": 1}
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
    known = {"mean": -7.0, "std": 4.0, "frames": 64, "audio": "rendered"}
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
    folds, _ = evaluation._load_fold_models(evaluation._load_models(paths))
    args = SimpleNamespace(device=torch.device("cpu"), batch=None, crops=None, cache=piano.cache, audio=None)
    records = evaluation.fold_records(folds, piano.corpus, args, ("valid", "test"))
    return {name: p for record in records for name, p in zip(record["names"], record["p"], strict=True)}


# --- parity with evaluate ---


@pytest.mark.parametrize("features", ["full", "score", "perf"])
def test_ratings_from_files_are_those_of_evaluate(features, piano, tmp_path):
    path = han(tmp_path / "a.pt", piano, features)
    expected = fold_predictions([path], piano)
    chosen = sorted(expected)[:6]
    files = "--score", *map(piano.score, chosen), "--midi", *map(piano.midi, chosen)
    records = predict("--ckpt", path, *files)
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
    for record, name in zip(records, chosen, strict=True):
        assert record["ratings"] == pytest.approx(expected[name], abs=1e-6)
    wav = tmp_path / "wav" / f"{chosen[0]}.WAV"
    wav.parent.mkdir()
    data.write_wav(wav, data.render(data.read_midi(piano.midi(chosen[0]))))
    (heard,) = predict("--ckpt", *paths, "--audio", wav.parent)
    assert (heard["name"], heard["path"]) == (chosen[0], str(wav))
    assert heard["ratings"] == pytest.approx(records[0]["ratings"], abs=0.02)  # 16 bits


def transcripts(paths: list[str], speech, out) -> dict[str, dict]:
    """trial -> the row that evaluate writes."""
    argv = ["--data", str(speech.converted), "--part", "test", "--csv", str(out), "--device", "cpu"]
    evaluation.main(["--ckpt", *paths, *argv])
    return {row["trial"]: row for row in csv.DictReader(io.StringIO(out.read_text()))}


@pytest.mark.parametrize("count", [1, 2])
def test_phonemes_from_files_are_those_of_evaluate(count, speech, tmp_path, capsys):
    paths = [decoder(tmp_path / f"{seed}.pt", seed) for seed in range(count)]
    expected = transcripts(paths, speech, tmp_path / "t.csv")
    capsys.readouterr()
    shown = {record["id"]: record for record in predict("--ckpt", *paths, "--speech", speech.converted)}
    assert len(shown) == len(speech.corpus.ids)
    for trial, row in expected.items():
        assert evaluation.spell(shown[trial]["phonemes"]) == row["hypothesis"] != ""
        assert evaluation.spell(shown[trial]["reference"]) == row["reference"]
        assert [str(n) for n in shown[trial]["errors"]] == [row[key] for key in ("sub", "del", "ins")]
    said = capsys.readouterr().out
    assert f"PER of {speech.corpus.labelled.sum()} labelled trials" in said
    assert "no result" in said
    (mat,) = speech.root.glob(f"competitionData/test/{DAYS[0]}.mat")
    alone = {f"test/{record['id']}": record for record in predict("--ckpt", *paths, "--speech", mat)}
    assert list(alone) == [trial for trial in expected if DAYS[0] in trial]
    for trial, record in alone.items():
        assert evaluation.spell(record["phonemes"]) == expected[trial]["hypothesis"]
    assert "SYNTHETIC" in capsys.readouterr().out


# --- decoder: .npy files and day layers ---


def write_block(folder, corpus, scale: float = 1.0) -> list[int]:
    """One test block, a file a trial; returns the trials' numbers."""
    folder.mkdir(exist_ok=True)
    trials = np.flatnonzero((corpus.part == "test") & (corpus.day == 0))
    assert len(set(corpus.block[trials])) == 1
    for i in trials:
        features = corpus.features[corpus.offsets[i] : corpus.offsets[i + 1]]
        np.save(folder / f"{i:03d}.npy", scale * features + scale - 1)
    return trials.tolist()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_block_of_npy_files_is_standardised_as_in_training(scale, speech, tmp_path):
    path, trials = decoder(tmp_path / "a.pt"), write_block(tmp_path / "npy", speech.corpus, scale)
    expected = transcripts([path], speech, tmp_path / "t.csv")
    records = predict("--ckpt", path, "--speech", tmp_path / "npy", "--day", DAYS[0])
    for record, i in zip(records, trials, strict=True):
        assert evaluation.spell(record["phonemes"]) == expected[speech.corpus.ids[i]]["hypothesis"]
        assert record["seconds"] == 0.02 * speech.corpus.lengths[i]
    files = sorted((tmp_path / "npy").iterdir())
    one_by_one = predict("--ckpt", path, "--speech", *files, "--day", DAYS[0])
    assert [r["phonemes"] for r in one_by_one] == [r["phonemes"] for r in records]


def test_day_layers_and_raw_features(tmp_path, capsys):
    path, x = decoder(tmp_path / "a.pt"), np.random.default_rng(0).normal(3, 2, (80, 256))
    source, short = tmp_path / "t12.2001.01.07.npy", tmp_path / "short.npy"
    np.save(source, x)
    np.save(short, x[:5])
    model, z = evaluation.load_checkpoint(path)[0], (x - x.mean(0)) / x.std(0)

    def decoded(x, day: int) -> list[int]:
        with torch.no_grad():
            batch = torch.tensor(x, dtype=torch.float32)[None], torch.tensor([80]), torch.tensor([day])
            return evaluation.ctc_greedy(*model(*batch))[0]

    options = {
        "": decoded(z, -1),
        "--raw": decoded(x, -1),
        "--day mean": decoded(z, -1),
        "--day nearest": decoded(z, 1),
        f"--day {DAYS[0]}": decoded(z, 0),
    }
    assert len({str(ids) for ids in options.values()}) == 4
    for option, ids in options.items():
        assert predict("--ckpt", path, "--speech", source, *option.split())[0]["phonemes"] == ids
    assert f"session t12.2001.01.07: unknown to {path}; day layer of {DAYS[1]}" in capsys.readouterr().out
    unknown = "t12.1999.01.01"
    assert unknown in refuse(capsys, "--ckpt", path, "--speech", source, "--day", unknown)
    assert predict("--ckpt", path, "--speech", short)[0]["phonemes"] == []


def test_a_mat_file_without_sentences_is_decoded_without_labels(speech, tmp_path, capsys):
    source, mine = speech.root / f"competitionData/test/{DAYS[1]}.mat", tmp_path / f"{DAYS[1]}.mat"
    fields = data.loadmat(source)
    data.savemat(mine, {key: fields[key] for key in ("tx1", "spikePow", "blockIdx")})
    records = predict("--ckpt", decoder(tmp_path / "a.pt"), "--speech", mine)
    assert len(records) == (speech.corpus.part[speech.corpus.day == 1] == "test").sum() > 0
    assert all(record["reference"] is None for record in records)
    assert f"no labels: {mine}" in capsys.readouterr().out


# --- averages and outputs ---


def test_ratings_of_checkpoints_are_averaged(piano, tmp_path, capsys):
    paths = [
        han(tmp_path / "a.pt", piano, rating_mean=[0.4] * 19, rating_std=[0.125] * 19),
        han(tmp_path / "b.pt", piano, "perf", 8, fold=1, rating_mean=[0.6] * 19, rating_std=[0.125] * 19),
    ]
    pair = ("--score", piano.score(piano.names[0]), "--midi", piano.midi(piano.names[0]))
    each = [predict("--ckpt", path, *pair)[0]["ratings"] for path in paths]
    assert np.abs(each[0] - each[1]).max() > 0.01
    capsys.readouterr()
    assert predict("--ckpt", *paths, *pair)[0]["ratings"] == pytest.approx((each[0] + each[1]) / 2, abs=1e-12)
    said = capsys.readouterr().out
    table = [line for line in said.splitlines() if line.endswith("0.50 0.12")]
    assert len(table) == 19
    assert max(map(len, table)) <= 100
    assert "2 checkpoints" in said
    assert "SYNTHETIC" in said


def test_json_and_csv_hold_all_predictions(piano, tmp_path, capsys):
    path = han(tmp_path / "a.pt", piano, rating_mean=[0.4] * 19, rating_std=[0.125] * 19)
    name = piano.names[0]
    other = next(n for n in piano.names if data.score_of(n) != data.score_of(name))
    pair = "--ckpt", path, "--score", piano.score(name), "--midi", piano.midi(name)
    records = predict(
        *pair, piano.midi(other), "--json", tmp_path / "new/a.json", "--csv", tmp_path / "a.csv"
    )
    saved = json.loads((tmp_path / "new/a.json").read_text())
    (shown,) = saved["predictions"]
    assert (shown["name"], shown["path"], shown["score"]) == (name, piano.midi(name), piano.score(name))
    assert list(shown["ratings"]) == list(LABELS)
    assert list(shown["ratings"].values()) == pytest.approx(records[0]["ratings"], rel=1e-6)
    assert saved["training"][LABELS[0]] == {"mean": 0.4, "sd": 0.125}
    assert saved["poles"]["Timing_Stable_Unstable"] == ["Stable", "Unstable"]
    assert [(used["path"], used["seed"], used["step"]) for used in saved["checkpoints"]] == [(path, 7, 3)]
    assert saved["trained_on_synthetic"] is True
    assert [piano.midi(other) in line for line in saved["refused"]] == [True]
    (row,) = csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text()))
    assert list(row) == ["name", "path", "score", "match_rate", "extra", "notes", *LABELS]
    assert [float(row[label]) for label in LABELS] == pytest.approx(records[0]["ratings"], abs=1e-6)
    capsys.readouterr()
    predict(*pair, "--json", "-")
    printed = capsys.readouterr()
    assert json.loads(printed.out)["predictions"] == saved["predictions"]
    assert "1 predicted" in printed.err


def test_transcripts_are_written(speech, tmp_path, capsys):
    path, trials = decoder(tmp_path / "a.pt"), write_block(tmp_path / "npy", speech.corpus)
    (mat,) = speech.root.glob(f"competitionData/test/{DAYS[0]}.mat")
    outputs = "--json", tmp_path / "a.json", "--csv", "-"
    records = predict("--ckpt", path, "--speech", tmp_path / "npy", mat, *outputs)
    saved = json.loads((tmp_path / "a.json").read_text())["predictions"]
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["id", "path", "session", "seconds", "phonemes", "reference", "sub", "del", "ins"]
    assert len(records) == len(rows) == len(saved) == 2 * len(trials)
    for record, row, entry in zip(records, rows, saved, strict=True):
        assert row["phonemes"] == entry["phonemes"] == evaluation.spell(record["phonemes"])
        assert row["path"] == entry["path"] == record["path"]
        errors = entry["errors"] or {}
        assert record["errors"] == (tuple(errors.values()) or None)
        assert [row[key] for key in ("sub", "del", "ins")] == [
            str(errors.get(key, "")) for key in ("sub", "del", "ins")
        ]
    assert rows[0]["sub"] == "" != rows[-1]["sub"]


def test_poles_are_the_halves_of_the_names():
    poles = evaluation.LABEL_POLES
    assert list(poles) == list(LABELS)
    assert poles["Articulation_Long_Short"] == ("Short", "Long")  # rated the other way round
    assert poles["Articulation_Soft_cushioned_Hard_solid"] == ("Soft/cushioned", "Hard/solid")
    assert poles["Emotion_&_Mood_Low_Energy_High_Energy"] == ("Low energy", "High energy")
    wide = poles["Dynamic_Little_dynamic_range_Large_dynamic_range"]
    assert wide == ("Little dynamic range", "Large dynamic range")


@pytest.mark.parametrize(
    ("value", "mean", "expected"),
    [
        (0, None, "o" + "." * 24),
        (1, 0.5, "." * 12 + "|" + "=" * 11 + "o"),
        (0.25, 0.5, "." * 6 + "o" + "=" * 5 + "|" + "." * 12),
        (0.5, 0.5, "." * 12 + "o" + "." * 12),
    ],
)
def test_scale_by_hand(value, mean, expected):
    assert evaluation._scale(value, mean) == expected


def test_explanations_get_what_they_need(piano, speech, tmp_path, monkeypatch, capsys):
    asked: list = []
    monkeypatch.setattr(evaluation, "explain", lambda *a: asked.append(a))
    name, pictures = piano.names[0], tmp_path / "pictures"
    midi = piano.midi(name)
    rated = "--ckpt", han(tmp_path / "h.pt", piano), "--score", piano.score(name), "--midi", midi, midi
    predict(*rated, "--explain", pictures)
    heard = "--ckpt", audio(tmp_path / "a.pt", "ast"), "--midi", midi
    predict(*heard, "--explain", tmp_path / "a.svg")
    (mat,) = speech.root.glob(f"competitionData/test/{DAYS[0]}.mat")
    records = predict("--ckpt", decoder(tmp_path / "d.pt"), "--speech", mat, "--explain", pictures)
    assert [kind for kind, *_ in asked] == ["han", "han", "ast"] + ["decoder"] * len(records)
    drawn = [out.relative_to(tmp_path).as_posix() for _, out, *_ in asked[:4]]
    shown = f"pictures/{name}.png", f"pictures/{name}_2.png", "a.svg", f"pictures/{DAYS[0]}_0000.png"
    assert drawn == list(shown)
    work = asked[0][3]
    assert (len(work["match"]), work["performance"].path) == (len(work["score"].pitch), midi)
    assert (work["match"] >= 0).mean() == piano.corpus.items[name]["match_rate"]
    assert asked[2][3]["energies"].shape[1] == 128
    work = asked[3][3]
    bins = speech.corpus.lengths[speech.corpus.ids.index(f"test/{records[0]['id']}")]
    assert work["log_probs"].shape == ((bins - 8) // 4 + 1, 41)
    assert (work["labels"], work["seconds per frame"]) == (records[0]["reference"], 0.08)

    def cannot(*_):
        raise data.DataError("nothing to see")

    monkeypatch.setattr(evaluation, "explain", cannot)
    assert "nothing to see" in refuse(capsys, *heard, "--explain", tmp_path / "a.svg")
    assert len(predict(*heard, midi, "--explain", pictures)) == 2
    assert capsys.readouterr().out.count("nothing to see") == 2


def test_the_spread_of_training_is_shown_where_it_is_known(piano, tmp_path, capsys):
    for standardise, shown in (("dimension", True), ("group", False), ("none", False)):
        path = audio(tmp_path / f"{standardise}.pt", standardise=standardise)
        predict("--ckpt", path, "--midi", piano.midi(piano.names[0]))
        assert ("  mean   SD" in capsys.readouterr().out) == shown


def test_training_keeps_the_ratings_mean_and_deviation(piano, tmp_path):
    options = f"--data {piano.root} --cache {piano.cache} --split random --size 8 --heads 2 --batch 8"
    options += f" --out {tmp_path} --name a --device cpu --epochs 2 --max-steps 1"
    train_han.main(train_han.parse_args(options.split()))
    names = data.percepiano_parts(piano.corpus, "random", 0)["train"]
    y = np.stack([piano.corpus.items[name]["y"] for name in names]).astype(float)
    loaded = evaluation._load_models([str(tmp_path / "a/last.pt")])
    mean, spread = evaluation._training_ratings(evaluation._predictors(loaded)[1])
    assert mean == pytest.approx(y.mean(0))
    assert spread == pytest.approx(y.std(0))


# --- refusals ---


def test_a_performance_of_another_score_is_refused(piano, tmp_path, capsys):
    path, name = han(tmp_path / "a.pt", piano), piano.names[0]
    other = next(n for n in piano.names if data.score_of(n) != data.score_of(name))
    bad = tmp_path / "bad.mid"
    bad.write_bytes(b"MThd")
    pair = "--ckpt", path, "--score", piano.score(name), "--midi"
    assert f"{other}.mid: holds " in refuse(capsys, *pair, piano.midi(other))
    records = predict(*pair, bad, piano.midi(other), piano.midi(name))
    assert [record["name"] for record in records] == [name]
    assert "1 predicted, 2 refused" in capsys.readouterr().out
    assert "bad.mid" in refuse(capsys, *pair, bad, piano.midi(name), "--strict")
    assert "all 2" in refuse(capsys, *pair, bad, piano.midi(other), "--json", tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()


def test_pieces_unlike_those_of_training_are_pointed_out():
    record = {"name": "a", "score": "b.musicxml", "match_rate": 0.75, "extra": 0.25, "notes": 420}
    plain = evaluation._show_ratings(record | {"ratings": np.full(19, 0.5)}, None)
    assert "75.0% of the score's notes were found; 25.0% of the played notes are not in it\n" in plain
    assert "420" not in plain
    odd = evaluation._show_ratings(record | {"ratings": np.full(19, 0.5), "extra": 0.6, "notes": 421}, None)
    assert "longer recording" in odd
    assert "421 notes" in odd


def test_a_folder_is_predicted_file_by_file(piano, tmp_path):
    path, name = han(tmp_path / "a.pt", piano), piano.names[0]
    same = {n for n in piano.names if data.score_of(n) == data.score_of(name)}
    records = predict("--ckpt", path, "--score", piano.score(name), "--midi", piano.folder)
    assert same <= {record["name"] for record in records} < set(piano.names)


def test_inputs_that_do_not_fit_the_checkpoint_are_refused(piano, speech, tmp_path, capsys):
    rates, hears, decodes = (
        han(tmp_path / "h.pt", piano),
        audio(tmp_path / "a.pt"),
        decoder(tmp_path / "d.pt"),
    )
    masks = audio(tmp_path / "p.pt", "ast", outputs=None)
    score, midi = piano.score(piano.names[0]), piano.midi(piano.names[0])
    pair = f"--score {score} --midi {midi}"
    for path, argv, name in (
        (rates, f"--midi {midi}", "--score"),
        (rates, f"--audio {midi}", "--audio"),
        (rates, f"--score {score} {score} --midi {midi}", "--score"),
        (rates, f"--score {score} --midi {tmp_path}", tmp_path),
        (rates, f"--score {tmp_path}/no.musicxml --midi {midi}", "no.musicxml"),
        (rates, f"{pair} --raw", "--raw"),
        (hears, "", hears),
        (hears, f"--audio {midi} --midi {midi}", "--audio"),
        (hears, f"--audio {midi}", midi),
        (hears, f"{pair}", "--score"),
        (hears, f"--midi {midi} --explain {tmp_path}", hears),
        (decodes, "", decodes),
        (decodes, f"--speech {tmp_path}/none", "none"),
        (decodes, f"--speech {speech.converted} --raw", "--raw"),
        (decodes, f"--speech {score}", score),
        (f"{rates} {hears}", f"--midi {midi}", hears),
        (masks, f"--midi {midi}", "pre-training"),
        (rates, f"{pair} --json {tmp_path}", tmp_path),
        (rates, f"{pair} --json /dev/null", "/dev/null"),
        (rates, f"{pair} --csv {rates}/a.csv", "a.csv"),
        (rates, f"{pair} --csv - --json -", "--csv -"),
        (rates, f"{pair} --explain {tmp_path}/a.gif", "a.gif"),
        (rates, f"{pair} {midi} --explain {tmp_path}/a.png", "2 inputs"),
    ):
        assert str(name) in refuse(capsys, "--ckpt", *path.split(), *argv.split())


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((40, 3)),
        np.zeros(40),
        np.zeros((0, 4)),
        np.full((40, 4), np.nan),
        np.full((40, 4), "a"),
        np.full((40, 4), 1j),
        np.full((40, 4), None),
        np.zeros((60_001, 4), np.float16),
        b"",
        b"garbage",
        b"PK\x03\x04broken",
        b"\x93NUMPY\x01\x00\x02\x00{}",
    ],
)
def test_npy_files_that_hold_no_trial_are_refused(array, tmp_path, capsys):
    path, bad = decoder(tmp_path / "a.pt", channels=4), tmp_path / "bad.npy"
    if isinstance(array, bytes):
        bad.write_bytes(array)
    else:
        np.save(bad, array)
    assert str(bad) in refuse(capsys, "--ckpt", path, "--speech", bad)
    np.save(tmp_path / "good.npy", np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32))
    assert [record["id"] for record in predict("--ckpt", path, "--speech", tmp_path)] == ["good"]
    assert "1 predicted, 1 refused" in capsys.readouterr().out
