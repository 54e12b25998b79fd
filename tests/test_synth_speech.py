"""The synthetic speech corpus: layout, its sentences, its version."""

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat

import data
from data import SPEECH_WORDS, convert_speech, frames_needed, open_speech, phonemize, synth_speech
from models import output_frames

PARTS = ("train", "test", "competitionHoldOut")
VERSION_3 = 3, [169, 263, 164, 228, 255, 189, 271, 203], "f05de8dc"
WEIGHTED_3 = 0.00048278


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "speech"
    synth_speech(out, days=3, trials=12)
    return out


@pytest.fixture(scope="module")
def files(root) -> dict[str, list[dict]]:
    return {part: [loadmat(p) for p in sorted((root / "competitionData" / part).iterdir())] for part in PARTS}


def sentences(files: dict, part: str) -> list[str]:
    return [str(text).strip() for file in files[part] for text in file["sentenceText"]]


def test_a_broken_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_mat_bytes", lambda table: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        synth_speech(tmp_path / "new", days=1, trials=6)
    assert list(tmp_path.iterdir()) == []


def test_layout_is_the_public_one(root, files):
    assert (root / "SYNTHETIC").read_text().count("\n") == 1
    names = {part: sorted(p.name for p in (root / "competitionData" / part).iterdir()) for part in PARTS}
    assert len(names["train"]) == 3
    assert names["test"] == names["train"]
    assert names["competitionHoldOut"] == names["train"][1:]  # without the first, 15 of 24 in the public data
    assert all(re.fullmatch(r"t12\.20\d\d\.\d\d\.\d\d\.mat", name) for name in names["train"])
    kinds = dict.fromkeys(("tx1", "tx2", "tx3", "tx4"), np.uint8) | {"spikePow": np.float32}
    for part, count in zip(PARTS, (12, 2, 2), strict=True):
        for file in files[part]:
            assert file["sentenceText"].shape == (count,)
            assert file["blockIdx"].shape == (count, 1)
            for name, kind in kinds.items():
                assert file[name].shape == (1, count)
                assert [x.shape for x in file[name][0]] == [(len(x), 256) for x in file["tx1"][0]]
                assert {x.dtype for x in file[name][0]} == {np.dtype(kind)}


def test_salad_takes_the_place_of_held_out_sentences_alone(tmp_path):
    made = {}
    for share in (0, 1):
        synth_speech(tmp_path / str(share), days=1, trials=6, bins=4.0, salad=share)
        convert_speech(tmp_path / str(share), tmp_path / f"c{share}", standardise="off", quiet=True)
        made[share] = open_speech(tmp_path / f"c{share}")
    plain, salad = made[0], made[1]
    parts = data.speech_parts(salad)
    assert not data.salad_trials(plain).any()
    assert np.flatnonzero(data.salad_trials(salad)).tolist() == sorted([*parts["valid"], *parts["test"]])
    for i, (before, after) in enumerate(zip(plain.text, salad.text, strict=True)):
        assert (before == after) == (i in parts["train"] or not before)
        assert len(before.split()) == len(after.split())
        if before == after:  # whatever trains is as it was, to the bit
            np.testing.assert_array_equal(plain[i]["x"], salad[i]["x"])


def test_sentences_are_new_in_every_part_and_made_of_the_word_list(files):
    spoken = sentences(files, "train") + sentences(files, "test")
    assert len(set(spoken)) == len(spoken) == 3 * 14
    assert set(sentences(files, "competitionHoldOut")) == {""}
    rng, used = np.random.default_rng(1), set()
    texts = [data._sentence(rng, used) for _ in range(800)]
    words = Counter(" ".join(texts).split())
    assert words.keys() == SPEECH_WORDS.keys()  # every word has a place in the templates
    assert {len(text.split()) for text in texts} <= {5, 6, 7, 8}
    labels = Counter(i for text in texts for i in phonemize(text))
    assert len(labels) == 40
    assert min(labels.values()) > 50  # of 24 000: the rarest phoneme can be learnt too


@pytest.mark.parametrize(("bins", "low", "high"), [(7.0, 220, 290), (16.0, 450, 650)])
def test_trials_are_as_long_as_asked_and_long_enough_for_their_labels(bins, low, high):
    rng, used, lengths = np.random.default_rng(2), set(), []
    for _ in range(60):
        labels = phonemize(data._sentence(rng, used))
        lengths.append(len(data._trajectory(labels, 7, bins, rng)))
        assert output_frames(np.array(lengths[-1]), 32, 4) >= frames_needed(labels)
    assert low < np.mean(lengths) < high


def test_a_changed_corpus_needs_another_version(tmp_path):
    """Seed 7 as it is converted: whoever changes it raises data.SPEECH_VERSION with these numbers."""
    options = "--days 1 --trials 6 --seed 7 --bins-per-phoneme 5 --salad 1".split()
    data.main(["synth-speech", "--out", str(tmp_path / "in"), *options])
    convert_speech(tmp_path / "in", tmp_path / "out", quiet=True)
    corpus = open_speech(tmp_path / "out")
    labels = hashlib.sha1(str([ids.tolist() for ids in corpus.labels]).encode()).hexdigest()[:8]
    weights = np.sin(np.arange(corpus.features.size)).reshape(corpus.features.shape)
    found = data.SPEECH_VERSION, corpus.lengths.tolist(), labels
    assert found == VERSION_3
    assert float((corpus.features * weights).mean()) == pytest.approx(WEIGHTED_3, abs=1e-6)
