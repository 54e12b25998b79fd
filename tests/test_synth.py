"""The synthetic PercePiano corpus: layout, determinism, readability, and that its ratings can be learnt from the notes."""

import csv
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from data import (
    LABELS,
    RATING_WEIGHTS,
    DataError,
    align,
    read_labels,
    read_midi,
    read_musicxml,
    split_percepiano,
    synth_percepiano,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "corpus"
    synth_percepiano(out)
    return out


@pytest.fixture(scope="module")
def performances(corpus) -> dict:
    return {
        p.stem.strip(): read_midi(p) for p in sorted((corpus / "virtuoso/data/all_2rounds").glob("*.mid"))
    }


@pytest.fixture(scope="module")
def scores(corpus) -> dict:
    return {p.stem: read_musicxml(p) for p in sorted((corpus / "virtuoso/data/score_xml").glob("*.musicxml"))}


def score_name(name: str) -> str:
    work, _, segment = name.rsplit("_", 2)
    return f"{work}_Score_{segment}"


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        synth_percepiano(tmp_path / folder, seed=seed, segments=8, players=4)
    a, b, c = (snapshot(tmp_path / folder) for folder in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a if name.endswith((".mid", ".csv", ".json", ".musicxml")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # nothing temporary stays behind


def test_refuses_full_folder_and_odd_sizes(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match=r"not empty; .*--out"):
        synth_percepiano(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    for sizes in ({"segments": 7}, {"segments": 79}, {"players": 3}, {"players": 13}):
        with pytest.raises(DataError, match=r"expected 8\.\.78 and 4\.\.12"):
            synth_percepiano(tmp_path / "new", **sizes)
    assert not (tmp_path / "new").exists()


def test_a_broken_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("data._save_midi", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        synth_percepiano(tmp_path / "new", segments=8, players=4)
    assert list(tmp_path.iterdir()) == []


def test_layout_is_the_public_one(corpus):
    assert (corpus / "SYNTHETIC").read_text().count("\n") == 1
    midi = {p.name for p in (corpus / "virtuoso/data/all_2rounds").iterdir()}
    assert [n for n in midi if n != n.strip()] == [" Schubert_D935_no.3_4bars_2_1.mid"]
    mean = json.loads((corpus / "label_2round_mean_reg_19_with0_rm_highstd0.json").read_text())
    std = json.loads((corpus / "label_2round_std_reg_19_with0_rm_highstd0.json").read_text())
    assert {n.strip() for n in midi} == {f"{k}.mid" for k in mean}
    assert list(mean) == list(std)
    assert len(mean) == 5 * 14 + 5 * 9 + 10 * 13
    assert {p.stem for p in (corpus / "virtuoso/data/score_xml").iterdir()} == {score_name(k) for k in mean}
    assert {p.stem for p in (corpus / "virtuoso/data/score_midi").iterdir()} == {score_name(k) for k in mean}
    assert {(len(mean[k]), len(std[k])) for k in mean} == {(20, 19)}
    index = {(k.rsplit("_", 2)[1], v[19]) for k, v in mean.items()}
    assert len(index) == len({i for _, i in index}) == len({p for p, _ in index})


def test_json_follows_from_the_csv_as_in_the_public_readme(corpus):
    mean = json.loads((corpus / "label_2round_mean_reg_19_with0_rm_highstd0.json").read_text())
    std = json.loads((corpus / "label_2round_std_reg_19_with0_rm_highstd0.json").read_text())
    with (corpus / "labels/total_2rounds.csv").open(newline="", encoding="utf-8") as f:
        header, *rows = csv.reader(f)
    assert (header[2], header[3], header[21], len(header)) == (
        "filename",
        "Question_1_1_1",
        "Question_9_1_1",
        24,
    )
    votes: dict[str, list] = {}
    for row in rows:
        values = [float(v or 0) for v in row[3:22]]
        if max(values) <= 7:
            votes.setdefault(row[2].removesuffix(".wav"), []).append(values)
    assert len(rows) > sum(map(len, votes.values()))  # some rows hold a value above 7
    assert any(0 in v for rows in votes.values() for v in rows)
    assert votes.keys() == mean.keys()
    for name, table in votes.items():
        table = np.array(table)
        assert 10 <= len(table) <= 14
        expected = [column[column > 0].mean() / 7 for column in table.T]
        np.testing.assert_allclose(mean[name][:19], expected, atol=1e-12)
        np.testing.assert_allclose(std[name], table.std(0) / 7, atol=1e-12)


def test_the_label_reader_reads_it(corpus):
    mean, std, raters = read_labels(corpus)
    assert len(mean) == len(std) == len(raters) == 245
    assert all(0.1 < v.min() and v.max() <= 1 for v in mean.values())
    assert tuple(RATING_WEIGHTS) == tuple(LABELS)


@pytest.mark.parametrize(("segments", "players"), [pytest.param(20, 12, marks=pytest.mark.slow), (8, 4)])
def test_every_split_and_fold_has_three_parts(tmp_path, segments, players):
    synth_percepiano(tmp_path / "c", segments=segments, players=players)
    names = [p.stem.strip() for p in (tmp_path / "c/virtuoso/data/all_2rounds").glob("*.mid")]
    for split in ("segment", "performer", "piece", "random"):
        for fold in range(4):
            parts = split_percepiano(names, split, fold)
            assert min(len(parts[part]) for part in ("train", "valid", "test")) >= 1, (split, fold)
            assert len(parts["train"]) > 0.4 * len(names)


def test_scores_read_as_written(corpus, scores):
    assert len(scores) == 20
    for name, score in scores.items():
        root = ET.parse(corpus / f"virtuoso/data/score_xml/{name}.musicxml").getroot()
        notes = [n for n in root.iter("note") if n.find("pitch") is not None]
        tied = sum(n.find("tie[@type='stop']") is not None for n in notes)
        assert len(score.pitch) == len(notes) - tied
        assert score.grace.sum() == sum(n.find("grace") is not None for n in notes)
        assert set(score.voice) <= {1, 2, 5}
        assert {1, 5} <= set(score.voice)
        assert score.onset.min() == 0  # hidden pickup padding is trimmed
        assert score.tempo_qpm == float(root.find(".//sound[@tempo]").get("tempo"))
    kinds = {
        tag
        for p in (corpus / "virtuoso/data/score_xml").iterdir()
        for tag in re.findall(r"<([a-z]+)[ />]", p.read_text())
    }
    assert {
        "grace",
        "chord",
        "slur",
        "beam",
        "staccato",
        "accent",
        "wedge",
        "fermata",
        "arpeggiate",
        "tied",
        "backup",
    } <= kinds


@pytest.mark.parametrize(("mark", "level"), [("p", -0.4), ("mp", -0.2), ("mf", 0.2), ("f", 0.4)])
def test_the_first_dynamic_mark_is_the_first_notes_level(corpus, scores, mark, level):
    first = {
        n: ET.parse(corpus / f"virtuoso/data/score_xml/{n}.musicxml").getroot().find(".//dynamics/*").tag
        for n in scores
    }
    marked = [n for n in scores if first[n] == mark]
    assert marked
    for name in marked:
        np.testing.assert_allclose(scores[name].features["dynamic"][0, 0], level, atol=1e-6)


def test_all_metres_and_both_kinds_of_pickup(corpus):
    texts = [p.read_text() for p in sorted((corpus / "virtuoso/data/score_xml").iterdir())]
    metres = {re.search(r"<beats>(\d)</beats><beat-type>(\d)", t).groups() for t in texts}
    assert metres == {("3", "4"), ("2", "2"), ("4", "4"), ("6", "8")}
    assert sum('print-object="no"' in t for t in texts) >= 2
    assert sum('implicit="yes"' in t for t in texts) >= 2


@pytest.mark.slow
def test_performances_align_with_their_scores(performances, scores):
    rates = {n: float((align(scores[score_name(n)], p) >= 0).mean()) for n, p in performances.items()}
    assert np.mean(list(rates.values())) > 0.96
    assert min(rates.values()) > 0.8
    assert np.mean([r for n, r in rates.items() if "_Score_" in n]) > 0.99


def statistics(performance) -> list[float]:
    p, seconds = performance, performance.onset[-1] - performance.onset[0]
    top, gaps = p.pitch >= np.median(p.pitch), np.diff(p.onset)
    pedal = np.array(
        [
            p.sustain[np.searchsorted(p.sustain[:, 0], t, "right") - 1, 1] if len(p.sustain) else 0
            for t in p.onset
        ]
    )
    return [
        p.velocity.mean(),
        p.velocity.std(),
        len(p.pitch) / seconds,
        np.log(p.offset - p.onset).mean(),
        p.velocity[top].mean() - p.velocity[~top].mean(),
        pedal.mean(),
        p.soft[:, 1].mean() if len(p.soft) else 0,
        np.log(1e-3 + gaps[gaps < 0.06]).mean() if (gaps < 0.06).any() else -7,
        np.mean(p.sustain[:, 1] if len(p.sustain) else 0),
    ]


def test_ratings_are_learnable_and_shuffled_ones_are_not(corpus, performances):
    labels = read_labels(corpus)[0]
    names = [n for n in sorted(performances) if n.rsplit("_", 2)[1] not in ("Score", "Score2")]
    x, y = np.array([statistics(performances[n]) for n in names]), np.array([labels[n] for n in names])
    groups = [score_name(n) for n in names]

    def held_out_r2(y: np.ndarray) -> float:
        predicted = np.zeros_like(y)
        for train, test in GroupKFold(5).split(x, y, groups):
            scaler = StandardScaler().fit(x[train])
            model = RidgeCV(np.logspace(-1, 3, 9)).fit(scaler.transform(x[train]), y[train])
            predicted[test] = model.predict(scaler.transform(x[test]))
        return r2_score(y, predicted)

    assert held_out_r2(y) > 0.3
    assert held_out_r2(np.random.default_rng(0).permutation(y)) < 0.05
