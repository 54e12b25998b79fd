"""Intracortical speech: three public formats into one converted corpus, its parts, batches and augmentation."""

import json
import math
import os
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

import data

SESSIONS = ["t12.2022.04.28", "t12.2022.05.05", "t12.2022.05.17"]
SENTENCES = [
    "the boy can find the table",
    "my sister took the small boat",
    "why did her teacher sell the guitar",
    "they will choose another coin",
    "i believe the thief lost the treasure",
    "please give this judge the cheese",
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
    features = [
        np.concatenate([a[:, :128], b[:, :128]], 1).astype(float)
        for a, b in zip(day["tx1"][0], day["spikePow"][0], strict=True)
    ]
    blocks = day["blockIdx"].ravel()
    for block in np.unique(blocks):
        whole = np.concatenate([x for x, b in zip(features, blocks, strict=True) if b == block])
        features = [
            (x - whole.mean(0)) / (whole.std(0) + 1e-8) if b == block else x
            for x, b in zip(features, blocks, strict=True)
        ]
    return [x.astype(np.float32) for x in features]


def pickle_day(day, labelled=True):
    x, labels = (
        standardised(day),
        [ids_of(text) for text in day["sentenceText"]] if labelled else [[]] * len(day["blockIdx"]),
    )
    return {
        "sentenceDat": x,
        "transcriptions": [str(t).ljust(60) for t in day["sentenceText"]],
        "phonemes": [np.array(p + [0] * (500 - len(p)), np.int32) for p in labels],
        "timeSeriesLens": np.array([len(a) for a in x]),
        "phoneLens": np.array([len(p) for p in labels]),
        "phonePerTime": np.array([len(p) / len(a) for p, a in zip(labels, x, strict=True)], np.float32),
    }


def write_pickle(path, content, protocol=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        ForkingPickler.dumps(content, protocol)
    )  # the standard library's pickler, to write what the public baseline wrote
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


def one_day(tmp_path, day, folder="train", session=SESSIONS[0], **options):
    """Converts one .mat file beside a sound one."""
    write_mat(tmp_path / "in", {(folder, session): day, ("train", SESSIONS[2]): raw_day(5, 4)})
    return convert(tmp_path / "in", tmp_path / "out", **options)


# ---------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------
def test_mat_files_convert_to_the_written_out_formula(corpus, days):
    order = [
        key for folder in ("train", "test", "competitionHoldOut") for key in sorted(days) if key[0] == folder
    ]
    expected = [x for key in order for x in standardised(days[key])]
    assert corpus.lengths.tolist() == [len(x) for x in expected]
    np.testing.assert_array_equal(corpus.features, np.concatenate(expected))
    assert isinstance(corpus.features, np.memmap)
    assert corpus.features.dtype == np.float32
    texts = [
        str(t) if key[0] != "competitionHoldOut" else "" for key in order for t in days[key]["sentenceText"]
    ]
    assert corpus.text == texts
    assert [x.tolist() for x in corpus.labels] == [ids_of(t) for t in texts]
    assert corpus.labelled.tolist() == [t != "" for t in texts]
    assert corpus.days == SESSIONS
    assert [corpus.days[d] for d in corpus.day] == [
        key[1] for key in order for _ in days[key]["sentenceText"]
    ]
    assert corpus.block.tolist() == [int(b) for key in order for b in days[key]["blockIdx"].ravel()]
    assert corpus.part.tolist() == ["train"] * 24 + ["test"] * 24 + ["competition"] * 8
    assert corpus.ids[9] == f"train/{SESSIONS[1]}/0001"
    assert (corpus.channels, corpus.synthetic, corpus.left_out) == (256, False, [])
    totals = corpus.report["totals"]
    assert (
        totals["found"],
        totals["trials"],
        totals["bins"],
        totals["blocks"],
        totals["standardised"],
        totals["labelled"],
    ) == (56, 56, len(corpus.features), 14, 0, 48)


@pytest.mark.parametrize(
    "kind", ["pickle", pytest.param("hdf5 by session", marks=pytest.mark.slow), "hdf5 by part"]
)
def test_all_formats_give_identical_arrays(kind, corpus, days, tmp_path):
    if kind == "pickle":
        parts = {"train": "train", "test": "test", "competition": "competitionHoldOut"}
        content = {
            part: [
                pickle_day(days[folder, s], part != "competition") for s in SESSIONS if (folder, s) in days
            ]
            for part, folder in parts.items()
        }
        source = write_pickle(tmp_path / "in" / "ptDecoder_ctc", content)
        names = tmp_path / "names.json"
        names.write_text(json.dumps({"train": SESSIONS, "competition": SESSIONS[1:]}))
        got, report = convert(source.parent, tmp_path / "out", sessions=names)
    else:
        got, report = convert(
            write_hdf5(tmp_path / "in", days, kind.endswith("session")), tmp_path / "out", channels=256
        )
        np.testing.assert_array_equal(got.block, corpus.block)
    np.testing.assert_array_equal(
        got.features, corpus.features
    )  # standardised when they came: not a bit moves
    assert report["totals"]["standardised"] == report["totals"]["blocks"] > 0
    np.testing.assert_array_equal(got.offsets, corpus.offsets)
    np.testing.assert_array_equal(got.day, corpus.day)
    np.testing.assert_array_equal(got.part, corpus.part)
    np.testing.assert_array_equal(got.labelled, corpus.labelled)
    assert [x.tolist() for x in got.labels] == [x.tolist() for x in corpus.labels]
    assert (got.text, got.ids, got.days, got.left_out) == (corpus.text, corpus.ids, corpus.days, [])


def test_float16_halves_the_space_and_rounds(mat, corpus, tmp_path):
    got, _ = convert(mat, tmp_path / "out", dtype="float16")
    np.testing.assert_array_equal(got.features, corpus.features.astype(np.float16))
    assert (tmp_path / "out" / "features.npy").stat().st_size == 128 + 2 * corpus.features.size
    assert data.speech_item(got, 3)["x"].dtype == np.float32


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickle_protocols_and_scalars(protocol, days, tmp_path):
    day = pickle_day(days["train", SESSIONS[0]])
    day |= {
        "transcriptions": [np.str_(t) for t in day["transcriptions"]],
        "phoneLens": [np.int64(n) for n in day["phoneLens"]],
        "sentenceDat": cells(day["sentenceDat"])[0],
    }
    day["sentenceDat"][1] = np.asfortranarray(day["sentenceDat"][1])
    got, report = convert(
        write_pickle(tmp_path / "ptDecoder_ctc", {"train": [day], "test": [day]}, protocol), tmp_path / "out"
    )
    np.testing.assert_array_equal(
        got.features[: len(got.features) // 2], np.concatenate(standardised(days["train", SESSIONS[0]]))
    )
    assert got.days == ["day00"]
    assert got.text[0] == days["train", SESSIONS[0]]["sentenceText"][0]
    assert report["totals"]["mismatch"] == 0


def test_raw_features_of_a_pickle_are_standardised_and_foreign_labels_count(days, tmp_path):
    raw = days["train", SESSIONS[0]] | {"blockIdx": np.ones((8, 1))}
    day = pickle_day(raw)
    day["sentenceDat"] = [3 * x + 5 for x in day["sentenceDat"]]
    day["phonemes"][2][0] += 1
    got, report = convert(write_pickle(tmp_path / "ptDecoder_ctc", {"train": [day]}), tmp_path / "out")
    np.testing.assert_allclose(got.features, np.concatenate(standardised(raw)), atol=1e-5)
    assert (report["totals"]["blocks"], report["totals"]["standardised"], report["totals"]["mismatch"]) == (
        1,
        0,
        1,
    )
    assert got.labels[2][0] == ids_of(raw["sentenceText"][2])[0] + 1  # the file's labels are what counts
    assert "without a block index" in " ".join(report["notes"])


HOSTILE = {  # each would write a file if it were obeyed, or names what no data set needs
    "os.system": b"cos\nsystem\n(S'touch {}'\ntR.",
    "posix.system": b"cposix\nsystem\n(S'touch {}'\ntR.",
    "builtins.eval": b'cbuiltins\neval\n(S\'open("{}", "w")\'\ntR.',
    "subprocess.Popen": b"\x80\x04\x8c\nsubprocess\x8c\x05Popen\x93(S'touch {}'\ntR.",
    "numpy.load": b"cnumpy\nload\n(S'{}'\ntR.",
    "builtins.getattr": b"cbuiltins\ngetattr\n(cnumpy\ndtype\nS'type'\ntR.",
    "collections.OrderedDict": b"ccollections\nOrderedDict\n(tR.",
    "numpy.core.multiarray.fromfile": b"cnumpy.core.multiarray\nfromfile\n(S'{}'\ntR.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name(name, tmp_path):
    touched = tmp_path / "touched"
    path = tmp_path / "ptDecoder_ctc"
    path.write_bytes(HOSTILE[name].replace(b"{}", str(touched).encode()))
    with pytest.raises(
        data.DataError, match=rf"ptDecoder_ctc: refused.*names {name}.*expected[^\n]*"
    ) as caught:
        data.convert_speech(path, tmp_path / "out", quiet=True)
    assert "\n" not in str(caught.value)
    assert not touched.exists()
    assert not (tmp_path / "out").exists()


def test_an_allowed_name_is_no_way_round(tmp_path):
    """numpy.ndarray can be rebuilt, not called: a call could lay an array over foreign memory."""
    path = tmp_path / "ptDecoder_ctc"
    path.write_bytes(b"cnumpy\nndarray\n((I4\ntS'O'\ntR.")
    with pytest.raises(data.DataError, match="refused or unreadable"):
        data.convert_speech(path, tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x80\x04", b"\x80\x04]\x94.", b"I5\n.", b"}S'train'\nI3\ns."]
)
def test_a_file_that_is_no_data_set_is_refused(content, tmp_path):
    path = tmp_path / "ptDecoder_ctc"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=r"ptDecoder_ctc: [^\n]*expected[^\n]*$"):
        data.convert_speech(path, tmp_path / "out", quiet=True)


def test_without_h5py_hdf5_names_the_package(monkeypatch, tmp_path):
    (tmp_path / "data_train.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(data.DataError, match="data_train.hdf5.*h5py.*pip install h5py"):
        data.convert_speech(tmp_path, tmp_path / "out", quiet=True)


def test_hdf5_expects_512_channels_and_counts_doubles(days, tmp_path):
    h5py = pytest.importorskip("h5py")
    wide = {("train", SESSIONS[0]): days["train", SESSIONS[0]]}
    root = write_hdf5(tmp_path / "in", wide)
    path = root / SESSIONS[0] / "data_train.hdf5"
    with pytest.raises(
        data.DataError, match=r"data_train.hdf5.*input_features: shape \(bins, 256\); expected \(bins, 512\)"
    ):
        data.convert_speech(root, tmp_path / "out", quiet=True)
    with h5py.File(path, "a") as file:
        file.copy("trial_0003", "trial_0008")
        del file["trial_0004"].attrs["block_num"]
        del file["trial_0005"].attrs["session"]
        file["trial_0006"].attrs["n_time_steps"] = 5
        file["trial_0007/seq_class_ids"][0] = 41
        file["notes"] = 1
    (root / "data_val.hdf5").write_bytes(path.read_bytes()[:3000])
    got, report = convert(root, tmp_path / "out", channels=256)
    assert [i[-4:] for i in got.ids] == ["0000", "0001", "0002", "0003", "0004"]
    assert got.block.tolist() == [3, 3, 3, 3, -1]
    lines = "\n".join(got.left_out)
    for found in (
        "data_val.hdf5: unreadable",
        "trial 0008: a second trial of session",
        "trial_0005: no trial of a session",
        "n_time_steps: 5; expected 1",
        "class 41; expected 1..40",
        "notes: no trial",
    ):
        assert lines.count(found) == 1
    assert len(got.left_out) == 6
    assert "block_num: missing in 1 of 8 trials" in "\n".join(report["notes"])


# ---------------------------------------------------------------------------------------------------------------
# Text, labels, layouts
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["padded", "column of cells", "row of cells", "nested cells"])
@pytest.mark.parametrize("shape", [(-1, 1), (1, -1)])
def test_layouts_of_text_and_blocks(text, shape, tmp_path):
    day = raw_day(1, 4)
    expected = [str(t) for t in day["sentenceText"]]
    day["blockIdx"] = day["blockIdx"].reshape(shape)
    day["sentenceText"] = {
        "padded": np.array([t.ljust(50) for t in expected]),
        "column of cells": cells(expected).T,
        "row of cells": cells(expected),
        "nested cells": cells([cells([t]) for t in expected]),
    }[text]
    day["tx1"] = day["tx1"].T
    got, _ = one_day(tmp_path, day)
    assert got.text[:4] == expected
    assert got.block[:4].tolist() == [3, 3, 4, 4]


def test_a_file_of_one_trial_squeezed(tmp_path):
    day = raw_day(1, 1)
    got, report = one_day(
        tmp_path,
        {
            "sentenceText": str(day["sentenceText"][0]),
            "tx1": day["tx1"][0, 0],
            "spikePow": day["spikePow"][0, 0],
            "blockIdx": 3,
        },
    )
    assert got.text[0] == day["sentenceText"][0]
    np.testing.assert_array_equal(got.features[: got.offsets[1]], standardised(day)[0])
    assert report["left_out"] == []


def test_label_quirks_are_counted_by_day(monkeypatch, tmp_path):
    monkeypatch.setattr(
        data, "phonemize", lambda text: [3, 40]
    )  # what g2p_en makes of them is tested elsewhere
    day = raw_day(1, 6)
    day["sentenceText"] = np.array(
        ["the boy - the girl", "the girls' boat's oil", "my 2 boys", "well-known -- yes", "don't", "a - b' 3"]
    )
    got, report = one_day(tmp_path, day)
    row = report["days"][0]
    assert (row["hyphen"], row["quote"], row["digit"]) == (2, 2, 2)
    assert row["labelled"] == 6


def test_a_sentence_without_words_is_kept_unlabelled(tmp_path):
    day = raw_day(1, 4)
    day["sentenceText"] = np.array(["the boy", "", "123", "my sister"])
    got, report = one_day(tmp_path, day)
    assert got.labelled[:4].tolist() == [True, False, False, True]
    assert any("trials 1, 2: no labels" in line for line in report["notes"])
    assert not set(data.speech_parts(got)["train"]) & {1, 2}


# ---------------------------------------------------------------------------------------------------------------
# Bad input: one line each, counted, nothing else lost
# ---------------------------------------------------------------------------------------------------------------
def test_bad_trials_are_reported_and_the_others_kept(tmp_path):
    day = raw_day(1, 10, 1)
    day["tx1"][0, 0] = day["tx1"][0, 0].astype(np.float32)
    day["tx1"][0, 0][3, 5] = np.nan
    day["spikePow"][0, 1][7:9, 100] = np.inf
    day["spikePow"][0, 2][0, 200] = np.nan  # not of area 6v
    day["tx1"][0, 3] = day["tx1"][0, 3][:, :255]
    day["spikePow"][0, 4] = day["spikePow"][0, 4][1:]
    day["tx1"][0, 5] = day["spikePow"][0, 5] = np.zeros((0, 256), np.float32)
    day["tx1"][0, 6] = np.array("text")
    day["spikePow"][0, 7][2, 2] = 1e38
    day["tx1"][0, 8], day["spikePow"][0, 8] = (
        day["tx1"][0, 8][:20],
        day["spikePow"][0, 8][:20],
    )  # no window fits
    day["tx1"][0, 9], day["spikePow"][0, 9] = (
        day["tx1"][0, 9][:90],
        day["spikePow"][0, 9][:90],
    )  # 15 frames, more labels
    got, report = one_day(tmp_path, day)
    path = tmp_path / "in/competitionData/train" / f"{SESSIONS[0]}.mat"
    assert all(
        line.startswith(f"{path}: trial")
        and "\n" not in line
        and "expected" in line
        and line.endswith("left out")
        for line in got.left_out
    )
    lines = "\n".join(got.left_out)
    for found in (
        "trials 0, 7: 1 bin of NaN",
        "trial 1: 2 bins of NaN",
        "trial 3: tx1: shape (bins, 255); expected (bins, 256)",
        "trial 4: spikePow: ",
        "trial 5: tx1: no bins",
        "trial 6: tx1: type <U4; expected numbers (bins, 256)",
    ):
        assert lines.count(found) == 1, found
    row = report["days"][0]
    assert (row["found"], row["trials"], row["left_out"], row["too_short"]) == (10, 3, 7, 2)
    assert [i[-4:] for i in got.ids[:3]] == ["0002", "0008", "0009"]
    assert any("trials 8, 9: too short" in line for line in report["notes"])
    assert len(got.ids) == 3 + 4
    kept = got.features[: got.offsets[3]]
    np.testing.assert_allclose(kept.mean(0), 0, atol=1e-5)  # the bad trials do not enter the statistics
    with pytest.raises(data.DataError, match="trials 0, 7: 1 bin of NaN"):
        data.convert_speech(tmp_path / "in", tmp_path / "strict", strict=True, quiet=True)
    assert not (tmp_path / "strict").exists()
    with pytest.raises(data.DataError, match="trials 0, 7: 1 bin of NaN"):
        data.open_speech(tmp_path / "out", strict=True)


def test_a_constant_channel_becomes_zeros_and_is_reported(tmp_path):
    day = raw_day(1, 4)
    for x, p in zip(day["tx1"][0], day["spikePow"][0], strict=True):
        x[:, 17] = 0
        p[:, 3] = 0.1
    got, report = one_day(tmp_path, day)
    assert (got.features[: got.offsets[4]][:, [17, 131]] == 0).all()
    assert np.isfinite(got.features).all()
    assert any("channels 17, 131: constant" in line for line in report["notes"])
    assert report["left_out"] == []


@pytest.mark.parametrize("block", [None, np.ones((3, 1)), np.full((8, 1), np.nan), np.full((8, 1), 1.5)])
def test_a_missing_block_index_makes_one_block(block, tmp_path):
    day = raw_day(1)
    del day["blockIdx"]
    got, report = one_day(tmp_path, day if block is None else day | {"blockIdx": block})
    assert (got.block[:8] == -1).all()
    np.testing.assert_array_equal(
        got.features[: got.offsets[8]], np.concatenate(standardised(day | {"blockIdx": np.ones((8, 1))}))
    )
    assert any(line.startswith(str(tmp_path)) and "blockIdx" in line for line in report["notes"])
    assert (report["days"][0]["blocks"], report["left_out"]) == (1, [])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda day: day.pop("tx1"),
            r"field tx1: missing; expected tx1, spikePow, sentenceText, blockIdx, found .*spikePow",
        ),
        (lambda day: day.pop("sentenceText"), "field sentenceText: missing"),
        (
            lambda day: day.update(sentenceText=day["sentenceText"][:5]),
            r"field sentenceText: 5 trials in shape \(5,\); expected 8, as in tx1 of shape \(1, 8\)",
        ),
        (
            lambda day: day.update(spikePow=day["spikePow"][:, :7]),
            r"field spikePow: 7 trials in shape \(1, 7\); expected 8",
        ),
    ],
)
def test_a_file_of_another_schema_costs_that_file_alone(change, match, tmp_path):
    day = raw_day(1)
    change(day)
    got, report = one_day(tmp_path, day)
    assert len(got.ids) == 4
    (line,) = got.left_out
    assert line.startswith(str(tmp_path / "in/competitionData/train" / SESSIONS[0]))
    with pytest.raises(data.DataError, match=match):
        raise data.DataError(line)


def test_unreadable_files_empty_days_doubles_and_unseen_sessions(days, tmp_path):
    root = write_mat(
        tmp_path / "in",
        {
            ("train", SESSIONS[0]): days["train", SESSIONS[0]],
            ("test", SESSIONS[0]): days["test", SESSIONS[0]],
            ("train", f" {SESSIONS[0]}"): days["train", SESSIONS[1]],
            ("test", SESSIONS[2]): days["test", SESSIONS[2]],
            ("train", SESSIONS[1]): {
                "sentenceText": np.zeros(0, "U5"),
                "tx1": cells([]),
                "spikePow": cells([]),
                "blockIdx": np.zeros((0, 1)),
            },
        },
    )
    folder = root / "competitionData"
    whole = (folder / "test" / f"{SESSIONS[0]}.mat").read_bytes()
    (folder / "train" / "garbage.mat").write_bytes(b"garbage")
    (folder / "train" / "truncated.mat").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "v73.mat").write_bytes(
        b"MATLAB 7.3 MAT-file".ljust(116) + bytes(8) + b"\x00\x02IM" + bytes(400)
    )
    crash = bytearray(whole)
    crash[128] = 0xE7  # an element of an unknown type: SciPy's reader looks beyond its table
    (folder / "test" / "crash.mat").write_bytes(crash)
    got, report = convert(root, tmp_path / "out")
    assert len(got.ids) == 24
    assert got.days == [SESSIONS[0], SESSIONS[2]]
    assert len(got.left_out) == 5
    for name in (
        "garbage.mat: unreadable",
        "truncated.mat: unreadable",
        "v73.mat: unreadable",
        "crash.mat: unreadable",
    ):
        assert sum(name in line for line in got.left_out) == 1, name
    assert sum("a second file of session" in line for line in got.left_out) == 1
    assert any(f"{SESSIONS[1]}.mat: an empty day" in line for line in report["notes"])
    assert any(f"session {SESSIONS[2]}: no training trials" in line for line in report["notes"])


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ({"train": ["a", "b", "b"]}, "train names b twice"),
        ({"train": ["a", "b"]}, "train names 2 sessions; expected 3"),
        ({"valid": ["a"]}, "'valid'"),
        ({"train": [1, 2, 3]}, "expected JSON"),
        (["a"], "expected JSON"),
        ("{", "expected JSON"),
    ],
)
def test_session_files_are_checked(names, match, days, tmp_path):
    source = write_pickle(
        tmp_path / "ptDecoder_ctc", {"train": [pickle_day(days["train", s]) for s in SESSIONS]}
    )
    path = tmp_path / "names.json"
    path.write_text(names if isinstance(names, str) else json.dumps(names))
    with pytest.raises(data.DataError, match=rf"names.json: [^\n]*{match}"):
        data.convert_speech(source, tmp_path / "out", sessions=path, quiet=True)


def test_pickle_days_are_not_mapped_by_position(days, tmp_path):
    content = {
        "train": [pickle_day(days["train", s]) for s in SESSIONS],
        "competition": [pickle_day(days["competitionHoldOut", SESSIONS[1]], False)],
        "notes": [],
    }
    content["train"][1] = {"sentenceDat": []}
    content["train"][2]["timeSeriesLens"][3] += 1
    content["train"][2]["phonemes"][4] = [[1], [2, 3]]
    content["train"][2] |= {"phoneLens": content["train"][2]["phoneLens"]}
    got, report = convert(write_pickle(tmp_path / "ptDecoder_ctc", content), tmp_path / "out")
    assert got.days == ["day00"]
    lines = "\n".join(got.left_out)
    for found in (
        "competition: 1 days without names, where train has 3; expected --sessions",
        "part 'notes': unknown",
        "train[1] (day01): field timeSeriesLens: missing",
        "train[2] (day02): ",
    ):
        assert lines.count(found) == 1, found


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], "no speech corpus; expected competitionData"),
        (["ptDecoder_ctc", "train/a.mat"], "holds mat and pickle files; expected one format"),
        (["competitionData/train/readme.txt"], "no speech corpus"),
    ],
)
def test_folders_of_no_known_format(files, match, tmp_path):
    (tmp_path / "in").mkdir()
    for name in files:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    with pytest.raises(data.DataError, match=match):
        data.convert_speech(tmp_path / "in", tmp_path / "out", quiet=True)
    with pytest.raises(data.DataError, match="no such file or folder"):
        data.open_speech(tmp_path / "absent")


def test_a_converted_folder_is_not_converted_again(corpus, tmp_path):
    with pytest.raises(data.DataError, match="converted already"):
        data.convert_speech(corpus.root, tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"channels": 255}, "--channels 255: expected an even number"),
        ({"sessions": {}}, "--sessions: .* with a pickle only"),
        ({"dtype": "float64"}, "--dtype float64"),
        ({"channels": 514}, r"tx1: shape \(bins, 256\); expected \(bins, 257 or more\)"),
    ],
)
def test_options_are_checked(options, match, mat, tmp_path):
    with pytest.raises(data.DataError, match=match):
        data.convert_speech(mat, tmp_path / "out", quiet=True, **options)
    assert list(tmp_path.iterdir()) == []


def test_fewer_channels_are_the_first_of_each_kind(mat, corpus, tmp_path):
    got, _ = convert(mat, tmp_path / "out", channels=20)
    np.testing.assert_array_equal(got.features, corpus.features[:, [*range(10), *range(128, 138)]])


# ---------------------------------------------------------------------------------------------------------------
# The converted folder
# ---------------------------------------------------------------------------------------------------------------
def test_a_killed_conversion_leaves_nothing_that_opens(mat, monkeypatch, tmp_path):
    days, convert_day = [], data._convert_day

    def killed(day, report):
        days.append(day)
        if len(days) == 3:
            raise KeyboardInterrupt
        return convert_day(day, report)

    monkeypatch.setattr(data, "_convert_day", killed)
    with pytest.raises(KeyboardInterrupt):
        data.convert_speech(mat, tmp_path / "out", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(mat, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(data.DataError, match="exists and is not empty"):
        data.convert_speech(mat, tmp_path, quiet=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_public_folders_open_through_the_cache(days, corpus, tmp_path, monkeypatch):
    root = write_mat(tmp_path / "in", {key: days[key] for key in days if key[1] == SESSIONS[0]})
    calls, convert_speech = [], data.convert_speech
    monkeypatch.setattr(
        data, "convert_speech", lambda *args, **kw: calls.append(args) or convert_speech(*args, **kw)
    )
    first, second = (data.open_speech(root, tmp_path / "cache", quiet=True) for _ in range(2))
    assert len(calls) == 1
    np.testing.assert_array_equal(first.features, corpus.features[np.repeat(corpus.day == 0, corpus.lengths)])
    np.testing.assert_array_equal(first.features, second.features)
    store = first.root / "features.npy"
    whole = store.read_bytes()
    store.write_bytes(whole[: len(whole) // 2])
    assert len(data.open_speech(root, tmp_path / "cache", quiet=True).ids) == 16
    assert len(calls) == 2
    assert store.read_bytes() == whole
    path = root / "competitionData/train" / f"{SESSIONS[0]}.mat"
    os.utime(path, (1, 1))
    assert data.open_speech(root, tmp_path / "cache", quiet=True).root != first.root
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda info: info.update(rules="0123456789ab"),
            "label rules 0123456789ab; expected .*convert again",
        ),
        (lambda info: info.update(format=2), "format 2"),
        (lambda info: info.update(channels=255), "convert again"),
        (lambda info: info["trials"].pop(), "55 trials; expected .* 56; convert again"),
        (lambda info: info.pop("days"), "not a converted corpus .*convert again"),
        (lambda info: info["trials"][0].pop("labels"), "not a converted corpus"),
    ],
)
def test_a_converted_folder_of_other_rules_or_damage_is_refused(change, match, mat, corpus, tmp_path):
    for name in ("features.npy", "offsets.npy"):
        os.link(corpus.root / name, tmp_path / name)
    info = json.loads((corpus.root / "trials.json").read_text())
    change(info)
    (tmp_path / "trials.json").write_text(json.dumps(info))
    with pytest.raises(data.DataError, match=match) as caught:
        data.open_speech(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_command_prints_the_report(mat, capsys, tmp_path):
    data.main(["decoder-convert", "--in", str(mat), "--out", str(tmp_path / "out"), "--dtype", "float16"])
    out = capsys.readouterr().out
    assert "56 trials of 3 days" in out
    assert "float16" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:2] == ["competition", SESSIONS[1]])
    assert (row[2], row[5], row[6], row[-1]) == ("4", "1", "0", "0")
    assert "left out: 0" in out
    assert "train 12, valid 12, test 24, competition 8" in out


def test_the_synthetic_corpus_converts_whole(tmp_path):
    data.synth_speech(tmp_path / "in", days=2, trials=6)
    got, report = convert(tmp_path / "in", tmp_path / "out")
    assert got.synthetic
    assert got.left_out == report["notes"] == []
    assert report["totals"]["found"] == len(got.ids)
    assert got.labelled.tolist() == (got.part != "competition").tolist()
    assert (got.lengths >= [4 * data.frames_needed(x) for x in got.labels]).all()
    assert all(ids_of(t) == x.tolist() for t, x in zip(got.text, got.labels, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Parts, days, batches
# ---------------------------------------------------------------------------------------------------------------
def make_corpus(day, block, part, labelled=None, days=3):
    """A corpus without features."""
    n = len(day)
    labelled = np.ones(n, bool) if labelled is None else np.array(labelled)
    return data.SpeechCorpus(
        np.zeros((n, 4), np.float32),
        np.arange(n + 1),
        np.array(day),
        np.array(block),
        np.array(part),
        [np.array([1, 2]) if x else np.zeros(0, int) for x in labelled],
        [""] * n,
        [str(i) for i in range(n)],
        [f"t12.2022.01.{d + 1:02d}" for d in range(days)],
        4,
        Path("made"),
        True,
        [],
        labelled,
    )


def test_whole_blocks_validate_a_tenth_and_every_day_of_two_blocks():
    day, block = np.repeat(np.arange(3), 200), np.tile(np.repeat(np.arange(20), 10), 3)
    corpus = make_corpus(day, block, ["train"] * 600)
    parts = data.speech_parts(corpus)
    assert (len(parts["train"]), len(parts["valid"])) == (540, 60)
    assert np.array_equal(np.union1d(parts["train"], parts["valid"]), np.arange(600))
    key = day * 100 + block
    assert not set(key[parts["train"]]) & set(key[parts["valid"]])
    assert np.unique(day[parts["valid"]]).tolist() == [0, 1, 2]
    assert np.array_equal(data.speech_parts(corpus)["valid"], parts["valid"])
    assert not np.array_equal(data.speech_parts(corpus, seed=8)["valid"], parts["valid"])
    few = data.speech_parts(make_corpus([0] * 4 + [1] * 4, [1, 1, 2, 2, 5, 5, 5, 5], ["train"] * 8))
    assert len(few["valid"]) == 2
    assert (few["valid"] < 4).all()  # the day of one block gives none


def test_days_without_blocks_validate_on_their_last_tenth():
    parts = data.speech_parts(
        make_corpus([0] * 30 + [1] * 9 + [0] * 2, [-1] * 41, ["train"] * 39 + ["test"] * 2)
    )
    assert parts["valid"].tolist() == [27, 28, 29]
    assert parts["test"].tolist() == [39, 40]


def test_the_test_part_validates_where_asked_for():
    corpus = make_corpus(
        [0] * 6,
        [1, 1, 2, 2, 3, 3],
        ["train"] * 3 + ["test"] * 2 + ["competition"],
        [True, False, True, True, False, False],
    )
    parts = data.speech_parts(corpus, "test")
    assert {k: v.tolist() for k, v in parts.items()} == {
        "train": [0, 2],
        "valid": [3],
        "test": [3, 4],
        "competition": [5],
    }
    with pytest.raises(data.DataError, match="--valid dev: unknown"):
        data.speech_parts(corpus, "dev")
    with pytest.raises(data.DataError, match="no labelled trial to validate on.*--valid test"):
        data.speech_parts(make_corpus([0] * 3, [1] * 3, ["train"] * 3))


def test_days_map_by_name():
    known = ["t12.2022.04.28", "t12.2022.05.05", "t12.2022.05.17"]
    assert data.map_days(known[::-1], known).tolist() == [2, 1, 0]
    with pytest.raises(
        data.DataError, match=r"session t12.2022.05.11: unknown .*--day nearest or --day mean"
    ):
        data.map_days(["t12.2022.05.11", known[0]], known)
    days = ["t12.2022.05.11", known[0], "t12.2022.05.12", "t12.2025.01.01", "t12.2001.01.01"]
    assert data.map_days(days, known, "nearest").tolist() == [1, 0, 2, 2, 0]
    assert data.map_days(days, known[::-1], "nearest").tolist() == [
        1,
        2,
        0,
        0,
        2,
    ]  # the earlier of two as near, whatever the order
    assert data.map_days(days, known, "mean").tolist() == [-1, 0, -1, -1, -1]
    with pytest.raises(data.DataError, match="session day00: no date in the name"):
        data.map_days(["day00"], known, "nearest")
    with pytest.raises(data.DataError, match="--day first: unknown"):
        data.map_days(days, known, "first")


def test_items_and_batches(corpus):
    trials = [0, 30, 50]
    items = [data.speech_item(corpus, i) for i in trials]
    batch = data.collate_speech(items)
    assert batch["x"].shape == (3, max(corpus.lengths[trials]), 256)
    assert batch["lengths"].tolist() == corpus.lengths[trials].tolist()
    assert batch["day"].tolist() == corpus.day[trials].tolist()
    assert batch["label_lengths"].tolist() == [len(corpus.labels[0]), len(corpus.labels[30]), 0]
    assert {batch[k].dtype for k in ("lengths", "day", "labels", "label_lengths")} == {torch.int64}
    assert batch["ids"] == [corpus.ids[i] for i in trials]
    for b, i in enumerate(trials):
        T, L = corpus.lengths[i], len(corpus.labels[i])
        np.testing.assert_array_equal(
            batch["x"][b, :T], corpus.features[corpus.offsets[i] : corpus.offsets[i + 1]]
        )
        assert (batch["x"][b, T:] == 0).all()
        assert batch["labels"][b].tolist() == corpus.labels[i].tolist() + [0] * (batch["labels"].shape[1] - L)
    items[0]["x"][:] = 7  # a copy: the file is not written to
    assert (corpus.features[0] != 7).any()


@pytest.mark.parametrize("labels", [[], [4], [4, 4], [1, 2, 2, 2, 3, 40, 40]])
def test_frames_needed_equals_the_shortest_that_ctc_can_spell(labels):
    needed = data.frames_needed(labels)
    for frames in (needed - 1, needed):
        if frames > 0 and labels:
            loss = torch.nn.functional.ctc_loss(
                torch.zeros(frames, 1, 41), torch.tensor([labels]), [frames], [len(labels)]
            )
            assert math.isfinite(loss) == (frames == needed)
    assert needed == {0: 0, 1: 1, 2: 3, 7: 10}[len(labels)]


# ---------------------------------------------------------------------------------------------------------------
# Noise and masks
# ---------------------------------------------------------------------------------------------------------------
LENGTHS = torch.tensor([300, 120, 7, 1])


def batch_of_zeros(channels=64):
    return torch.zeros(4, 300, channels)


def test_noise_has_its_two_scales_on_valid_bins_only():
    x = batch_of_zeros()
    x[0, 0, 0] = 5
    before = x.clone()
    noisy = data.add_noise(x, LENGTHS, 0.8, 0.2, torch.Generator().manual_seed(1)) - x
    assert torch.equal(x, before)
    for b, T in enumerate(LENGTHS):
        assert (noisy[b, T:] == 0).all()
    assert (noisy[0] - noisy[0].mean(0)).std() == pytest.approx(0.8, rel=0.03)
    offset = data.add_noise(x, LENGTHS, 0.0, 0.2, torch.Generator().manual_seed(1)) - x
    assert torch.allclose(offset[0], offset[0, :1].expand(300, -1))
    assert offset[:, 0].std() == pytest.approx(0.2, rel=0.15)
    assert torch.equal(data.add_noise(x, LENGTHS, 0.8, 0.2, torch.Generator().manual_seed(1)) - x, noisy)
    assert torch.equal(data.add_noise(x, LENGTHS, 0.0, 0.0), x)


def test_the_mask_hides_what_its_formula_says():
    lengths = torch.tensor([300, 120] * 300)
    x = torch.ones(600, 300, 1)
    hidden = (
        (data.time_mask(x, lengths, 0.1, 15, 2, torch.Generator().manual_seed(3)) == 0).sum((1, 2)).float()
    )
    assert hidden.mean() == pytest.approx(1.6, abs=0.25)  # of the public re-tune: next to nothing
    assert hidden.max() <= 30
    share = (data.time_mask(x, lengths, 1.0, 0.075, 20, torch.Generator().manual_seed(3)) == 0).sum(
        (1, 2)
    ) / lengths
    for one, T, widest in ((share[::2], 300, 22), (share[1::2], 120, 9)):
        assert one.mean() == pytest.approx(
            1 - (1 - (widest + 1) / 2 / T) ** 20, abs=0.03
        )  # half of the bins: spans overlap


def spans(row):
    """Lengths of the runs of zeros."""
    text = "".join("0" if v == 0 else "1" for v in row.tolist())
    return [len(run) for run in text.split("1") if run]


def test_one_span_is_uniform_in_length_and_place_and_stays_inside():
    lengths = torch.tensor([30] * 4000)
    x = torch.ones(4000, 40, 2)
    masked = data.time_mask(x, lengths, 1.0, 5, 1, torch.Generator().manual_seed(2))
    assert (x == 1).all()
    assert (masked[:, 30:] == 1).all()
    assert torch.equal(masked[..., 0], masked[..., 1])
    runs = [spans(row) for row in masked[:, :30, 0]]
    assert all(len(run) == 1 for run in runs)
    counts = np.bincount([run[0] for run in runs], minlength=6)[1:]
    assert len(counts) == 5
    assert (np.abs(counts - 800) < 110).all()
    starts = np.bincount(
        [
            int((row == 0).float().argmax())
            for row, run in zip(masked[:, :30, 0], runs, strict=True)
            if run == [5]
        ],
        minlength=26,
    )
    assert len(starts) == 26
    assert starts.min() > 10


def test_masks_are_off_at_zero_deterministic_and_fit_short_trials():
    x = torch.ones(4, 300, 3)
    for off in ((0, 15, 2), (0.5, 0, 2), (0.5, 15, 0)):
        assert torch.equal(data.time_mask(x, LENGTHS, *off), x)
    first, second, third = (
        data.time_mask(x, LENGTHS, 0.5, 40, 6, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    for b, T in enumerate(LENGTHS):
        assert (first[b, T:] == 1).all()
    full = data.time_mask(x, LENGTHS, 1.0, 1000, 50)
    assert (full[3, :1] == 0).all()
    assert (full[3, 1:] == 1).all()
    assert torch.equal(data.time_mask(x, torch.zeros(4, dtype=torch.int64), 1.0, 0.5, 3), x)
