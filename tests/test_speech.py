"""Intracortical speech: three public formats into one converted corpus, parts, batches and augmentation."""

import io
import json
import math
import os
import sys
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused
from scipy.io import savemat

import data

SESSIONS = ["t12.2022.04.28", "t12.2022.05.05", "t12.2022.05.17"]
SENTENCES = [
    "the boy can find the table",
    "my sister took the small boat",
    "why did her teacher sell the guitar",
    "we joined both girls near the church",
]


def cells(arrays):
    out = np.empty((1, len(arrays)), object)
    out[0, :] = arrays
    return out


def ids_of(text):
    """Labels by hand: the words' phonemes, SIL after each."""
    return [
        data.PHONEMES.index(p) for word in text.split() for p in [*data.SPEECH_WORDS[word].split(), "SIL"]
    ]


def raw_day(seed, trials=8, blocks=2):
    rng = np.random.default_rng(seed)
    bins = rng.integers(170, 190, trials)
    return {
        "sentenceText": np.array([SENTENCES[i] for i in rng.integers(len(SENTENCES), size=trials)]),
        "tx1": cells([rng.poisson(1.5, (t, 256)).astype(np.uint8) for t in bins]),
        "spikePow": cells([rng.lognormal(2, 0.5, (t, 256)).astype(np.float32) for t in bins]),
        "blockIdx": np.sort(np.arange(trials) % blocks)[:, None] + 3.0,
    }


def write_mat(root, days):
    """days: (folder, session) -> raw day."""
    for (folder, session), day in days.items():
        path = root / "competitionData" / folder / f"{session}.mat"
        path.parent.mkdir(parents=True, exist_ok=True)
        savemat(path, day)
    return root


def standardised(day):
    """z-scores by block, the formula written out; float32 (T, 256) of each trial."""
    pairs = zip(day["tx1"][0], day["spikePow"][0], strict=True)
    features = [np.concatenate([a[:, :128], b[:, :128]], 1).astype(float) for a, b in pairs]
    blocks = day["blockIdx"].ravel()
    for block in np.unique(blocks):
        members = np.flatnonzero(blocks == block)
        whole = np.concatenate([features[i] for i in members])
        for i in members:
            features[i] = (features[i] - whole.mean(0)) / (whole.std(0) + 1e-8)
    return [x.astype(np.float32) for x in features]


def pickle_day(day, labelled=True):
    x = standardised(day)
    labels = [ids_of(text) if labelled else [] for text in day["sentenceText"]]
    return {
        "sentenceDat": x,
        "transcriptions": [str(t).ljust(60) for t in day["sentenceText"]],
        "phonemes": [np.array(p + [0] * (500 - len(p)), np.int32) for p in labels],
        "timeSeriesLens": np.array([len(a) for a in x]),
        "phoneLens": np.array([len(p) for p in labels]),
        "phonePerTime": np.array([len(p) / len(a) for p, a in zip(labels, x, strict=True)], np.float32),
    }


def write_pickle(path, content, protocol=None):
    """By the standard library's pickler, as the public baseline wrote it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ForkingPickler.dumps(content, protocol))
    return path


def write_hdf5(root, days, folders=True):
    h5py = pytest.importorskip("h5py")
    for (part, session), day in days.items():
        name = {"train": "data_train", "test": "data_val", "competitionHoldOut": "data_test"}[part]
        path = root / session / f"{name}.hdf5" if folders else root / f"{name}.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "a") as file:
            for i, (x, text, block) in enumerate(
                zip(standardised(day), day["sentenceText"], day["blockIdx"].ravel(), strict=True)
            ):
                group = file.create_group(f"trial_{len(file):04d}")
                group["input_features"] = x
                group.attrs.update(session=session, block_num=int(block), trial_num=i, n_time_steps=len(x))
                if part != "competitionHoldOut":
                    labels = ids_of(text)
                    group["seq_class_ids"] = np.array(labels + [0] * (500 - len(labels)), np.int32)
                    group["transcription"] = np.array([*map(ord, text)] + [0] * (500 - len(text)), np.int32)
                    group.attrs.update(seq_len=len(labels), sentence_label=str(text))
    return root


@pytest.fixture(scope="module")
def days():
    days = {
        (folder, session): raw_day(10 * k + i)
        for k, folder in enumerate(("train", "test"))
        for i, session in enumerate(SESSIONS)
    }
    return days | {
        ("competitionHoldOut", session): raw_day(90 + i, 4, 1) for i, session in enumerate(SESSIONS[1:])
    }


@pytest.fixture(scope="module")
def mat(days, tmp_path_factory):
    return write_mat(tmp_path_factory.mktemp("mat"), days)


@pytest.fixture(scope="module")
def corpus(mat, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "mat"
    data.convert_speech(mat, out, quiet=True)
    return data.open_speech(out)


def convert(source, out, **options):
    report = data.convert_speech(source, out, quiet=True, **options)
    return data.open_speech(out), report


def named(corpus, *names):
    """One line of what was left out for each name."""
    for name in names:
        assert sum(name in line for line in corpus.left_out) == 1, name
    assert len(corpus.left_out) == len(names)


def one_day(tmp_path, day, folder="train", session=SESSIONS[0], **options):
    """Converts one .mat file beside a sound one."""
    write_mat(tmp_path / "in", {(folder, session): day, ("train", SESSIONS[2]): raw_day(5, 4)})
    return convert(tmp_path / "in", tmp_path / "out", **options)


def test_mat_files_convert_to_the_written_out_formula(corpus, days):
    folders = ("train", "test", "competitionHoldOut")
    order = [key for folder in folders for key in sorted(days) if key[0] == folder]
    expected = [x for key in order for x in standardised(days[key])]
    assert corpus.lengths.tolist() == [len(x) for x in expected]
    np.testing.assert_array_equal(corpus.features, np.concatenate(expected))
    assert isinstance(corpus.features, np.memmap)
    assert corpus.features.dtype == np.float32
    texts = [str(t) if key[0] != folders[2] else "" for key in order for t in days[key]["sentenceText"]]
    assert corpus.text == texts
    assert [x.tolist() for x in corpus.labels] == [ids_of(t) for t in texts]
    assert corpus.labelled.tolist() == [t != "" for t in texts]
    assert corpus.days == SESSIONS
    sessions = [key[1] for key in order for _ in days[key]["sentenceText"]]
    assert [corpus.days[d] for d in corpus.day] == sessions
    assert corpus.block.tolist() == [int(b) for key in order for b in days[key]["blockIdx"].ravel()]
    assert corpus.part.tolist() == ["train"] * 24 + ["test"] * 24 + ["competition"] * 8
    assert corpus.ids[9] == f"train/{SESSIONS[1]}/0001"
    assert (corpus.channels, corpus.synthetic, corpus.left_out) == (256, False, [])
    counts = [sum(row[name] for row in corpus.report["days"]) for name in ("trials", "bins", "left_out")]
    assert counts == [56, len(corpus.features), 0]
    assert {row["standardised"] for row in corpus.report["days"]} == {"here"}


@pytest.mark.parametrize("kind", ["pickle", "hdf5 by session", "hdf5 by part"])
def test_all_formats_give_identical_arrays(kind, corpus, days, tmp_path):
    if kind == "pickle":
        content = {}
        for part, folder in (("train", "train"), ("test", "test"), ("competition", "competitionHoldOut")):
            recorded = [days[folder, s] for s in SESSIONS if (folder, s) in days]
            content[part] = [pickle_day(day, part != "competition") for day in recorded]
        source = write_pickle(tmp_path / "in" / "ptDecoder_ctc", content)
        names = tmp_path / "names.json"
        names.write_text(json.dumps({"train": SESSIONS, "competition": SESSIONS[1:]}))
        got, report = convert(source.parent, tmp_path / "out", sessions=names)
    else:
        source = write_hdf5(tmp_path / "in", days, kind.endswith("session"))
        got, report = convert(source, tmp_path / "out", channels=256)
        np.testing.assert_array_equal(got.block, corpus.block)
    np.testing.assert_array_equal(got.features, corpus.features)  # standardised when they came
    assert {row["standardised"] for row in report["days"]} == {"as it came"}
    for name in ("offsets", "day", "labelled"):
        np.testing.assert_array_equal(getattr(got, name), getattr(corpus, name))
    called = {} if kind == "pickle" else {"test": "valid", "competition": "test"}  # the '25 data's own names
    assert got.part.tolist() == [called.get(part, part) for part in corpus.part]
    assert [x.tolist() for x in got.labels] == [x.tolist() for x in corpus.labels]
    assert [i.split("/", 1)[1] for i in got.ids] == [i.split("/", 1)[1] for i in corpus.ids]
    assert (got.text, got.days, got.left_out) == (corpus.text, corpus.days, [])


def test_float16_and_fewer_channels(mat, corpus, tmp_path):
    got, _ = convert(mat, tmp_path / "out", dtype="float16")
    np.testing.assert_array_equal(got.features, corpus.features.astype(np.float16))
    assert (tmp_path / "out" / "features.npy").stat().st_size == 128 + 2 * corpus.features.size
    assert got[3]["x"].dtype == np.float32
    got, _ = convert(mat, tmp_path / "few", channels=20)
    np.testing.assert_array_equal(got.features, corpus.features[:, [*range(10), *range(128, 138)]])


@pytest.mark.slow
def test_channels_and_numbers_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys):
    day = raw_day(1, 4)
    day["spikePow"][0, 2] *= np.float32(1e5)
    root = write_mat(tmp_path / "in", {("train", SESSIONS[0]): day})

    def refuses(found, **options):
        refused(lambda: convert(root, tmp_path / "out", **options), capsys, f"{SESSIONS[0]}.mat", found)

    refuses("channels", channels=255)
    refuses("channels", channels=600)
    refuses("float32", dtype="float16", standardise="off")
    monkeypatch.chdir(root / "competitionData")  # a folder named from within; other names
    source = tmp_path / f"in/competitionData/train/{SESSIONS[0]}.mat"
    source.rename(source.with_suffix(".MAT"))
    for name in ("Train/a.mat", "train/b.mat.part"):
        path = source.parents[1] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    for folder, unread in ((".", 2), ("train", 1), (f"train/{SESSIONS[0]}.MAT", 0)):
        got, report = convert(folder, tmp_path / f"out{unread}")
        assert got.part.tolist() == ["train"] * 4
        notes = [note.split(":")[0] for note in report["notes"]]
        assert notes == ([f"{unread} other files not read"] if unread else [])
    (source.with_name("b.mat")).write_bytes(b"MATLAB 7.3 MAT-file".ljust(126) + b"IM" + bytes(600))
    assert "save it with -v7" in convert(".", tmp_path / "new")[1]["left_out"][0]


@pytest.mark.parametrize("protocol", [0, 5])
def test_pickle_protocols_scalars_and_foreign_labels(protocol, days, tmp_path, monkeypatch):
    raw = days["train", SESSIONS[0]] | {"blockIdx": np.ones((8, 1))}
    day = pickle_day(raw)
    day["transcriptions"] = [np.str_(text) for text in day["transcriptions"]]
    day["phoneLens"] = [np.int64(count) for count in day["phoneLens"]]
    day["sentenceDat"] = [3 * x + 5 for x in day["sentenceDat"]]
    day["sentenceDat"][1] = np.asfortranarray(day["sentenceDat"][1])
    day["phonemes"][2][0] += 1
    source = write_pickle(tmp_path / "ptDecoder_ctc", {"train": [day], "test": [day]}, protocol)
    monkeypatch.setattr(data, "phonemize", None)  # nor is g2p_en asked
    got, report = convert(source, tmp_path / "out")
    half = len(got.features) // 2
    np.testing.assert_allclose(got.features[:half], np.concatenate(standardised(raw)), atol=1e-5)
    assert (got.days, got.text[0]) == (["day00"], raw["sentenceText"][0])
    assert {row["standardised"] for row in report["days"]} == {"here"}
    assert got.labels[2][0] == ids_of(raw["sentenceText"][2])[0] + 1  # the file's labels are what counts
    for note in ("without block numbers", "labels not compared with sentences"):
        assert sum(note in line for line in report["notes"]) == 1


def test_hdf5_faults_cost_what_has_them_and_h5py_is_named(days, tmp_path, monkeypatch, capsys):
    h5py = pytest.importorskip("h5py")
    root = write_hdf5(tmp_path / "in", {("train", SESSIONS[0]): days["train", SESSIONS[0]]})
    path = root / SESSIONS[0] / "data_train.hdf5"
    refused(lambda: convert(root, tmp_path / "out"), capsys, "data_train.hdf5", ", 256", "512")
    with h5py.File(path, "a") as file:
        del file["trial_0004"].attrs["block_num"]
        del file["trial_0005"].attrs["session"], file["trial_0003/seq_class_ids"]
        file["trial_0008"] = h5py.SoftLink("/none")
        file["trial_0006"].attrs["n_time_steps"] = 5
        file["trial_0007/seq_class_ids"][0] = 41
        file["notes"] = 1
    whole = path.read_bytes()
    (root / "data_val.hdf5").write_bytes(whole[:3000])
    where = whole.index(b"HEAP", whole.index(b"HEAP") + 1)  # the first trial's, behind the root's
    path.write_bytes(whole[:where] + b"PAEH" + whole[where + 4 :])
    got, report = convert(root, tmp_path / "out", channels=256)
    assert [i[-4:] for i in got.ids] == ["0001", "0002", "0003", "0004"]
    assert got.block.tolist() == [3, 3, 3, -1]
    assert got.labels[2].tolist() == ids_of(got.text[2])  # of its sentence
    named(
        got,
        "data_val.hdf5: unreadable",
        "notes, trial_0005",
        "trial_0008: ",
        "numbers, 5 bins",
        "[41, ",
        "trial_0000: ",
    )
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(lambda: convert(root, tmp_path / "again"), capsys, "hdf5: ", "pip install h5py")


def test_bad_trials_are_reported_and_the_others_kept(tmp_path, capsys):
    day = raw_day(1, 10, 1)
    tx, power = day["tx1"][0], day["spikePow"][0]
    tx[0] = tx[0].astype(np.float32)
    tx[0][3, 5] = np.nan
    power[1][7:9, 100] = np.inf
    power[2][0, 200] = np.nan  # not of area 6v
    tx[3] = tx[3][:, :255]
    power[4] = power[4][1:]
    tx[5] = power[5] = np.zeros((0, 256), np.float32)
    tx[6] = np.array("text")
    tx[8] = np.ascontiguousarray(tx[8].T)
    power[7][2, 2] = 1e38
    got, report = one_day(tmp_path, day)
    path = tmp_path / "in/competitionData/train" / f"{SESSIONS[0]}.mat: {SESSIONS[0]}"
    faults = "0, 7: 1 bins of NaN|1: 2 bins of NaN|3: uint8|4: float32|5: float32|6: |8: channels x bins"
    for found in faults.split("|"):
        assert sum(line.startswith(f"{path}: trial {found}") for line in got.left_out) == 1, found
    assert [report["days"][0][name] for name in ("trials", "left_out")] == [2, 8]
    assert [i[-4:] for i in got.ids] == ["0002", "0009", "0000", "0001", "0002", "0003"]
    kept = got.features[: got.offsets[2]]
    np.testing.assert_allclose(kept.mean(0), 0, atol=1e-5)  # the bad trials do not enter the statistics
    strict = lambda: convert(tmp_path / "in", tmp_path / "strict", strict=True)  # noqa: E731
    refused(strict, capsys, "trial 0, 7: 1 bins of NaN")
    assert not (tmp_path / "strict").exists()


def test_constant_channels_and_sentences_without_words(tmp_path):
    day = raw_day(1, 4)
    day["sentenceText"] = np.array(["the boy", "", "123", "my sister"])
    for x, p in zip(day["tx1"][0], day["spikePow"][0], strict=True):
        x[:, 17] = 0
        p[:, 3] = 0.1
    got, report = one_day(tmp_path, day)
    assert (got.features[: got.offsets[4]][:, [17, 131]] == 0).all()
    assert got.labelled[:4].tolist() == [True, False, False, True]
    assert not set(data.speech_parts(got)["train"]) & {1, 2}
    assert (report["left_out"], report["notes"][0][:24]) == ([], "2 trials without labels ")


def test_files_that_cannot_be_read_cost_themselves_alone(days, tmp_path, monkeypatch):
    good, other = days["train", SESSIONS[0]], days["test", SESSIONS[2]]
    bad = {
        "no_tx1": {name: good[name] for name in good if name != "tx1"},
        "few_texts": good | {"sentenceText": good["sentenceText"][:5]},
        f" {SESSIONS[0]}": good | {"blockIdx": good["blockIdx"] + 1},  # a second file of its session
    }
    files = {("train", SESSIONS[0]): good, ("test", SESSIONS[2]): other}
    root = write_mat(tmp_path / "in", files | {("train", name): day for name, day in bad.items()})
    folder = root / "competitionData"
    whole = (folder / "test" / f"{SESSIONS[2]}.mat").read_bytes()
    (folder / "train" / "truncated.mat").write_bytes(whole[: len(whole) // 2])
    for name in (f"{SESSIONS[2]} (1).mat", f"{SESSIONS[2]} - Kopie.mat"):
        (folder / "test" / name).write_bytes(whole)  # of a browser, of a desktop
    savemat(folder / "test" / "killer.mat", good | {"blockIdx": good["blockIdx"] + 2})
    read = data.loadmat
    monkeypatch.setattr(
        data, "loadmat", lambda path, **kw: os._exit(1) if path.stem == "killer" else read(path, **kw)
    )
    got, report = convert(root, tmp_path / "out")  # SciPy's reader may crash
    assert (len(got.ids), got.days) == (16, [SESSIONS[0], SESSIONS[2]])
    np.testing.assert_array_equal(got.features[: got.offsets[8]], np.concatenate(standardised(good)))
    second = "a second file of its session"
    named(got, "no_tx1.mat", "few_texts.mat", "truncated.mat", "killer.mat", second, "(1).mat", "Kopie.mat")


def test_pickle_days_are_not_mapped_by_position(days, tmp_path, capsys):
    content = {
        "train": [pickle_day(days["train", s]) for s in SESSIONS],
        "competition": [pickle_day(days["competitionHoldOut", SESSIONS[1]], False)],
    }
    content["train"][1] = {"sentenceDat": []}
    content["train"][2]["timeSeriesLens"] = [*content["train"][2]["timeSeriesLens"]]
    content["train"][2]["timeSeriesLens"][3] += 1
    content["train"][2]["timeSeriesLens"][5] = math.inf
    content["train"][2]["phonemes"][4] = [[1], [2, 3]]
    got, _ = convert(write_pickle(tmp_path / "ptDecoder_ctc", content), tmp_path / "out")
    assert (got.days, len(got.ids)) == (["day00", "day02"], 13)
    faults = "day01: 'timeSeriesLens'", "trial 3: float32", "trial 4", "trial 5: cannot convert float inf"
    named(got, "competition: 1 days, names of 0", *faults)
    write_pickle(tmp_path / "ptDecoder_ctc", {"train": [content["train"][0]] * 2})
    path, names = tmp_path / "ptDecoder_ctc", tmp_path / "names.json"
    for content, bad in (('{"train": [1, 2, 3]}', names), ("{", names), ('{"train": ["a", "a"]}', path)):
        names.write_text(content)
        refused(lambda: convert(path, tmp_path / "again", sessions=names), capsys, f"{bad}: ")


@pytest.mark.parametrize(
    ("files", "out", "match"),
    [
        (["competitionData/train/readme.txt"], "out", "files of 0 formats"),
        (["ptDecoder_ctc", "train/a.mat"], "out", "files of 2 formats"),
        (["train/a.mat"], "in", "not empty"),
        (["train/a.mat"], "out", "a.mat: unreadable"),
    ],
)
def test_folders_that_do_not_convert(files, out, match, tmp_path, capsys):
    for name in files:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    before = sorted(tmp_path.rglob("*"))
    refused(lambda: convert(tmp_path / "in", tmp_path / out), capsys, match)
    assert sorted(tmp_path.rglob("*")) == before


def test_public_folders_open_through_the_cache(days, corpus, tmp_path, monkeypatch):
    root = write_mat(tmp_path / "in", {key: days[key] for key in days if key[1] == SESSIONS[0]})
    calls, convert_speech = [], data.convert_speech

    def counted(*args, **kw):
        calls.append(args)
        return convert_speech(*args, **kw)

    monkeypatch.setattr(data, "convert_speech", counted)
    first, second = (data.open_speech(root, tmp_path / "cache", quiet=True) for _ in range(2))
    assert len(calls) == 1
    np.testing.assert_array_equal(first.features, corpus.features[np.repeat(corpus.day == 0, corpus.lengths)])
    np.testing.assert_array_equal(first.features, second.features)
    store = first.root / "features.npy"
    whole = store.read_bytes()
    store.write_bytes(whole[: len(whole) // 2])
    assert len(data.open_speech(root, tmp_path / "cache", quiet=True).ids) == 16
    assert (len(calls), store.read_bytes()) == (2, whole)
    (root / "competitionData/train/gone.mat").symlink_to(tmp_path / "nowhere")
    os.utime(root / "competitionData/train" / f"{SESSIONS[0]}.mat", (1, 1))
    again = data.open_speech(root, tmp_path / "cache", quiet=True)
    assert (again.root != first.root, len(again.ids)) == (True, 16)
    named(again, "gone.mat: unreadable")


def test_a_converted_folder_edited_by_hand_is_refused_by_its_field(corpus, tmp_path, capsys):
    source, out = corpus.root, tmp_path / "edited"
    out.mkdir()
    info = json.loads((source / "trials.json").read_text())
    first, *others = info["trials"]

    def refuses(name, content, *found):
        for file in ("features.npy", "offsets.npy", "trials.json"):
            (out / file).unlink(missing_ok=True)
            os.link(source / file, out / file)
        (out / name).unlink()
        (out / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        refused(lambda: data.open_speech(out), capsys, f"{out / name}: ", "decoder-convert", *found)

    for name, wrong in (("day", 3), ("labels", [41]), ("labels", [True]), ("block", "a"), ("block", 2**70)):
        refuses("trials.json", info | {"trials": [first | {name: wrong}, *others]}, f"trials[0].{name}")
    for name, wrong in (("text", None), ("part", "trian"), ("part", []), ("id", 5), ("labels", 0)):
        refuses("trials.json", info | {"trials": [first | {name: wrong}, *others]}, f"trials[0].{name}")
    for name, wrong in (("rules", "0123456789ab"), ("format", True), ("days", [1]), ("channels", "a")):
        refuses("trials.json", info | {name: wrong}, name)
    for wrong in (None, {}, {"days": [{}], "left_out": [], "notes": []}, info["report"] | {"notes": "x"}):
        refuses("trials.json", info | {"report": wrong}, "report")
    for content in (b"", b"[", b"[]", b"null", b'{"format": 1', b"\xff"):
        refuses("trials.json", content)
    refuses("trials.json", {name: info[name] for name in info if name != "trials"}, "trials: missing")
    for values in (np.array(["a"] * 57), np.arange(57.0), corpus.offsets[1:], corpus.offsets[::-1], [[0]]):
        file = io.BytesIO()
        np.save(file, values)
        refuses("offsets.npy", file.getvalue())
    refuses("features.npy", (source / "offsets.npy").read_bytes(), "int64 of shape (57,)")
    refuses("features.npy", (source / "features.npy").read_bytes()[:5000])


def test_the_command_prints_the_report(mat, capsys, tmp_path):
    data.main(["decoder-convert", "--in", str(mat), "--out", str(tmp_path / "out"), "--dtype", "float16"])
    out = capsys.readouterr().out
    assert "56 trials of 3 days" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:2] == ["competition", SESSIONS[1]])
    assert row[2:] == ["4", "here", row[4], "0"]
    assert "'train': 20, 'valid': 4, 'test': 24, 'competition': 8}; 16.7%" in out


def make_corpus(day, block, part, labelled=None):
    """What `speech_parts` reads of a corpus."""
    arrays = {"day": np.array(day), "block": np.array(block), "part": np.array(part)}
    labelled = np.ones(len(day), bool) if labelled is None else np.array(labelled)
    days = [f"day {i}" for i in range(1 + max(day))]
    return SimpleNamespace(days=days, root="made", labelled=labelled, **arrays)


def test_whole_blocks_validate_a_tenth():
    day, block = np.repeat(np.arange(3), 200), np.tile(np.repeat(np.arange(20), 10), 3)
    corpus = make_corpus(day, block, ["train"] * 600)
    parts = data.speech_parts(corpus)
    assert (len(parts["train"]), len(parts["valid"])) == (540, 60)
    assert np.array_equal(np.union1d(parts["train"], parts["valid"]), np.arange(600))
    key = day * 100 + block
    assert not set(key[parts["train"]]) & set(key[parts["valid"]])
    assert np.unique(day[parts["valid"]]).tolist() == [0, 1, 2]
    day, block = np.repeat(np.arange(24), 300), np.tile(np.repeat(np.arange(6), 50), 24)
    parts = data.speech_parts(make_corpus(day, block, ["train"] * 7200))  # blocks as long as the public ones
    assert 0.1 <= len(parts["valid"]) / 7200 < 0.11
    few = data.speech_parts(make_corpus([0] * 4 + [1] * 4, [1, 1, 2, 2, 5, 5, 5, 5], ["train"] * 8))
    assert len(few["valid"]) == 2
    assert (few["valid"] < 4).all()  # the day of one block gives none


def test_days_without_blocks_and_the_test_part_validate(capsys):
    parts = ["train"] * 39 + ["test"] * 2
    parts = data.speech_parts(make_corpus([0] * 30 + [1] * 9 + [0] * 2, [-1] * 41, parts))
    assert (parts["valid"].tolist(), parts["test"].tolist()) == ([27, 28, 29], [39, 40])
    part, labelled = ["train"] * 3 + ["test"] * 2 + ["competition"], [True, False, True, True, False, False]
    parts = data.speech_parts(make_corpus([0] * 6, [1, 1, 2, 2, 3, 3], part, labelled), "test")
    assert [trials.tolist() for trials in parts.values()] == [[0, 2], [3], [3, 4], [5]]
    alone = data.speech_parts(make_corpus([0] * 20 + [1] * 3, [1] * 20 + [-1] * 3, ["train"] * 23))
    assert alone["valid"].tolist() == [18, 19, 22]  # days of one block, or of a few trials without a number
    none = make_corpus([0, 1], [1, 1], ["train"] * 2)
    refused(lambda: data.speech_parts(none), capsys, "--valid blocks")
    own = data.speech_parts(make_corpus([0] * 6, [1, 1, 2, 2, 3, 3], ["train"] * 4 + ["valid"] * 2))
    assert [trials.tolist() for trials in own.values()] == [[0, 1, 2, 3], [4, 5], [], []]


def test_features_that_came_standardised_stay_and_the_options_say_otherwise():
    x = np.random.default_rng(0).normal(3, 2, (320, 4))
    whole = ((x - x.mean(0)) / x.std(0)).astype(np.float32)

    def after(x, how, blocks=(1, 1)):
        trials = [{"x": part, "block": b} for part, b in zip(np.split(x, 2), blocks, strict=True)]
        return data.standardise_blocks(trials, how), np.concatenate([trial["x"] for trial in trials])

    assert after(whole, "auto", (1, 2))[0] is False  # by the file's mean, whatever its blocks have
    assert np.array_equal(after(whole[:160], "off")[1], whole[:160])
    for how, given in (("auto", whole[:160]), ("blocks", whole), ("auto", x)):
        did, made = after(given, how, (1, 2))
        assert did
        assert np.abs(made[: len(made) // 2].mean(0)).max() < 1e-6


def test_days_of_the_public_pickle_are_known_by_name(tmp_path, monkeypatch):
    day = pickle_day(raw_day(1, 1, 1))
    content = {"train": [day] * 24, "test": [day] * 24, "competition": [day] * 15}
    monkeypatch.setattr(data, "_load_pickle", lambda path: content)
    (tmp_path / "ptDecoder_ctc").touch()
    sessions = list(data._read_pickle(tmp_path / "ptDecoder_ctc", 256, {}, []))
    named = {part: [name for of, name, *_ in sessions if of == part] for part in content}
    assert (len(set(named["train"])), named["train"][0]) == (24, "t12.2022.04.28")
    assert named["test"] == named["train"] == sorted(named["train"])
    assert len(named["competition"]) == 15
    assert set(named["competition"]) < set(named["train"])


def test_a_worker_opens_the_features_itself(corpus):
    sent = ForkingPickler.dumps(corpus)
    assert len(sent) < corpus.features.nbytes / 10
    got = ForkingPickler.loads(sent)
    assert isinstance(got.features, np.memmap)
    np.testing.assert_array_equal(got.features[-5:], corpus.features[-5:])


def test_days_map_by_name(capsys):
    known = SESSIONS
    assert data.map_days(known[::-1], known).tolist() == [2, 1, 0]
    days = ["t12.2022.05.11", known[0], "t12.2022.05.12", "t12.2025.01.01", "t12.2001.01.01"]
    assert data.map_days(days, known, "nearest").tolist() == [1, 0, 2, 2, 0]  # the earlier of two as near
    assert data.map_days(days, known, "mean").tolist() == [-1, 0, -1, -1, -1]
    refused(lambda: data.map_days(days, known, None), capsys, "t12.2022.05.11", "--day mean")
    refused(lambda: data.map_days(["day00"], known, "nearest"), capsys, "session day00")


def test_items_and_batches(corpus):
    trials = [0, 30, 50]
    items = [corpus[i] for i in trials]
    batch = data.collate_speech(items)
    assert batch["lengths"].tolist() == corpus.lengths[trials].tolist()
    assert batch["day"].tolist() == corpus.day[trials].tolist()
    assert batch["label_lengths"].tolist() == [len(corpus.labels[0]), len(corpus.labels[30]), 0]
    assert batch["ids"] == [corpus.ids[i] for i in trials]
    for b, i in enumerate(trials):
        T, own = corpus.lengths[i], corpus.features[corpus.offsets[i] : corpus.offsets[i + 1]]
        np.testing.assert_array_equal(batch["x"][b, :T], own)
        assert (batch["x"][b, T:] == 0).all()
        rest = [0] * (batch["labels"].shape[1] - len(corpus.labels[i]))
        assert batch["labels"][b].tolist() == corpus.labels[i].tolist() + rest


@pytest.mark.parametrize("labels", [[], [4], [4, 4], [1, 2, 2, 2, 3, 40, 40]])
def test_frames_needed_equals_the_shortest_that_ctc_can_spell(labels):
    needed = data.frames_needed(labels)
    assert needed == {0: 0, 1: 1, 2: 3, 7: 10}[len(labels)]
    for frames in range(max(1, needed - 1), needed + 1):
        scores = torch.zeros(frames, 1, 41)
        loss = torch.nn.functional.ctc_loss(scores, torch.tensor([labels]), [frames], [len(labels)])
        assert math.isfinite(loss) == (frames == needed)


LENGTHS = torch.tensor([300, 120, 7, 1])


def seeded(seed, draw, *args):
    torch.manual_seed(seed)
    return draw(*args)


def test_noise_has_its_two_scales_on_valid_bins_only():
    x = torch.zeros(4, 300, 64)
    noise = seeded(1, data.add_noise, x, LENGTHS, 0.8, 0.2)
    assert not x.any()
    for b, T in enumerate(LENGTHS):
        assert not noise[b, T:].any()
    assert (noise[0] - noise[0].mean(0)).std() == pytest.approx(0.8, rel=0.03)
    offset = seeded(1, data.add_noise, x, LENGTHS, 0.0, 0.2)
    assert torch.allclose(offset[0], offset[0, :1].expand(300, -1))
    assert offset[:, 0].std() == pytest.approx(0.2, rel=0.15)
    assert torch.equal(seeded(1, data.add_noise, x, LENGTHS, 0.8, 0.2), noise)


def test_the_mask_hides_what_its_formula_says():
    lengths = torch.tensor([300, 120] * 300)
    x = torch.ones(600, 300, 1)
    hidden = (seeded(3, data.time_mask, x, lengths, 0.1, 15, 2) == 0).sum((1, 2)).float()
    assert hidden.mean() == pytest.approx(1.6, abs=0.25)  # of the public re-tune: next to nothing
    assert hidden.max() <= 30
    share = (seeded(3, data.time_mask, x, lengths, 1.0, 0.075, 20) == 0).sum((1, 2)) / lengths
    for one, T, widest in ((share[::2], 300, 22), (share[1::2], 120, 9)):
        expected = 1 - (1 - (widest + 1) / 2 / T) ** 20  # half of the bins: spans overlap
        assert one.mean() == pytest.approx(expected, abs=0.03)


def test_masks_are_off_at_zero_deterministic_and_fit_short_trials():
    x = torch.ones(4, 300, 3)
    for off in ((0, 15, 2), (0.5, 0, 2), (0.5, 15, 0)):
        assert torch.equal(data.time_mask(x, LENGTHS, *off), x)
    first, second = (seeded(4, data.time_mask, x, LENGTHS, 0.5, 40, 6) for _ in range(2))
    assert torch.equal(first, second)
    assert not data.time_mask(x, LENGTHS, 1.0, 1000, 50)[3, :1].any()
