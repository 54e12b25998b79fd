"""Names, splits, shared passages, labels and ratings of PercePiano."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SHARED, needs_shared, refused

import data

ROOT = SHARED / "percepiano"

# fmt: off
WHOLE = {  # sizes of the parts of the public performances, by fold
    "segment": [(765, 255, 182)] * 4,
    "performer": [(834, 175, 193), (834, 175, 193), (847, 162, 193), (834, 175, 193)],
    "piece": [(809, 155, 238), (912, 173, 117), (768, 146, 288), (539, 104, 559)],
    "random": [(765, 256, 181), (766, 255, 181), (766, 255, 181), (766, 255, 181)],
}
KEPT = {  # and with shared notes left out
    "segment": [(628, 250, 182), (641, 235, 182), (651, 225, 182), (640, 238, 182)],
    "performer": WHOLE["performer"],
    "piece": [(739, 155, 238), (840, 173, 117), (727, 146, 288), (489, 104, 559)],
    "random": [(611, 241, 181), (618, 236, 181), (627, 231, 181), (626, 232, 181)],
}
# fmt: on
GROUP_OF = {  # written out a second time on purpose, with plain string handling
    "segment": lambda name: (name.split("bars_")[0], name.split("_")[-1]),
    "performer": lambda name: ("Beethoven" in name, name.split("_")[-2]),
    "random": lambda name: name,
}
# two composers, five works, players 0 to 11 and the score
WORKS = ("Beethoven_WoO80_var1", "Beethoven_WoO80_thema", *data.PIECES[1:])
PLAYERS = *range(12), "Score"
SMALL = [f"{work}_8bars_{p}_{segment}" for work in WORKS for p in PLAYERS for segment in ("01", "2", "13")]


@pytest.fixture(scope="module")
def names():
    return sorted(path.stem.strip() for path in (ROOT / data.MIDI_FOLDER).glob("*.mid"))


def lengths(parts):
    return tuple(len(parts[part]) for part in ("train", "valid", "test"))


def test_names_are_taken_apart():
    name = " Schubert_D935_no.3_4bars_Score2_07"
    assert data.parse_name(name) == ("Schubert_D935_no.3", "4", "Score2", "07")
    assert data.player_of("Beethoven_WoO80_var25_8bars_19_14.mid") == "19"
    assert data.segment_of(name) == "Schubert_D935_no.3_4bars_07"
    assert data.score_of(name) == "Schubert_D935_no.3_4bars_Score_07"


@needs_shared
def test_labels_are_those_of_the_public_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(set(data.LABELS)) == 19
    assert all(f"{index}. `{label}`" in text for index, label in enumerate(data.LABELS))


def test_player_indices():
    players = (1, 2, 3, 4, 7, 11, 14, 18, 19, 22, 24, 26, 5, "Score", "Score2")
    indices = [data.player_index(f"Beethoven_WoO80_var3_8bars_{player}_2") for player in players]
    assert indices == [*range(12), None, 0, None]
    indices = [data.player_index(f"Schubert_D935_no.3_4bars_{p}_2") for p in (1, 13, "Score", "Score2")]
    assert indices == [1, 13, 0, None]


@pytest.mark.parametrize("fold", range(data.FOLDS))
@pytest.mark.parametrize("split", data.SPLITS)
def test_parts_hold_every_name_once_whatever_their_order_and_spaces(split, fold):
    parts = data.split_percepiano(SMALL, split, fold)
    assert list(parts) == ["train", "valid", "test"]
    assert sorted(sum(parts.values(), [])) == sorted(SMALL)
    assert all(part == sorted(part) for part in parts.values())
    shuffled = random.Random(fold).sample(SMALL, len(SMALL))
    assert data.split_percepiano(shuffled, split, fold) == parts
    spaced = data.split_percepiano([f" {name}" for name in SMALL], split, fold)
    assert {part: [name.strip() for name in kept] for part, kept in spaced.items()} == parts


@pytest.mark.parametrize("split", ["segment", "performer", "random"])
def test_folds_validate_on_disjoint_items_and_share_one_test_part(split):
    folds = [data.split_percepiano(SMALL, split, fold) for fold in range(4)]
    assert all(fold["test"] == folds[0]["test"] for fold in folds)
    valid = [name for fold in folds for name in fold["valid"]]
    assert len(valid) == len(set(valid))
    if split != "performer":
        assert sorted(valid + folds[0]["test"]) == sorted(SMALL)


def test_piece_uses_a_foreign_corpus_own_works():
    names = [f"Etude_{work}_8bars_{p}_{s}" for work in "dbca" for p in range(5) for s in range(1, 6)]
    tests = [data.split_percepiano(names, "piece", fold)["test"] for fold in range(4)]
    assert [{data.parse_name(name)[0] for name in test} for test in tests] == [{f"Etude_{w}"} for w in "abcd"]


UNSPLIT = [  # names, split, fold, what the line names
    (SMALL, "paper", 0, "paper"),
    (SMALL, "segment", 4, "fold 4"),
    ([], "random", 0, "0 performances"),
    ([name for name in SMALL if "D935" not in name], "piece", 1, "test"),
    ([*SMALL, " Schubert_D960_mv2_8bars_1_01"], "segment", 0, "Schubert_D960_mv2_8bars_1_01"),
    ([*SMALL, "A_8bars_Me_06"], "segment", 0, "'A_8bars_Me_06'"),
]


@pytest.mark.parametrize(("names", "split", "fold", "named"), UNSPLIT)
def test_what_cannot_be_split_is_refused(names, split, fold, named, capsys):
    refused(lambda: data.split_percepiano(names, split, fold), capsys, named)


@needs_shared
@pytest.mark.parametrize("fold", range(4))
@pytest.mark.parametrize("split", WHOLE)
def test_sizes_and_groups_of_the_public_names(names, split, fold):
    parts = data.split_percepiano(names, split, fold)
    assert lengths(parts) == WHOLE[split][fold]
    key = GROUP_OF["segment" if split == "piece" else split]
    train, valid, test = ({key(name) for name in parts[part]} for part in ("train", "valid", "test"))
    assert not train & valid
    assert not (train | valid) & test
    if split == "piece":
        assert parts["test"] == [name for name in names if name.startswith(data.PIECES[fold])]


@needs_shared
def test_segment_test_part_is_the_withheld_list(names):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    withheld = {line.split("`")[1] for line in lines if line.startswith("- `")}
    test = data.split_percepiano(names, "segment", 0)["test"]
    assert (len(withheld), len(test)) == (15, 182)
    assert {data.segment_of(name) for name in test} == withheld
    assert set(names) - set(data.read_labels(ROOT)) == set(test)


def notes(numbers, onset=None):
    numbers = np.asarray(numbers)
    onset = np.arange(len(numbers)) if onset is None else onset
    return SimpleNamespace(pitch=numbers // 100, velocity=numbers % 100, onset=onset)


def test_overlaps_need_16_notes_in_a_row_with_their_velocities():
    line, other = np.random.default_rng(0).integers(2000, 9000, size=(2, 60))
    found = data.overlaps(
        {
            "whole": notes(line),
            "sixteen": notes([*other[:20], *line[30:46], *other[20:30]]),
            "fifteen": notes([*other[30:40], *line[10:25], *other[40:60]]),
            "softer": notes(line - 1),
            "short": notes(line[:15]),
        }
    )
    assert found == {"whole": {"sixteen"}, "sixteen": {"whole"}}


def test_overlaps_ignore_the_order_within_a_chord():
    line, onset = np.random.default_rng(0).integers(2000, 9000, size=32), np.repeat(np.arange(8), 4)
    reversed_chords = line.reshape(8, 4)[:, ::-1].reshape(-1)
    found = data.overlaps({"a": notes(line, onset), "b": notes(reversed_chords, onset + 5)})
    assert found == {"a": {"b"}, "b": {"a"}}


def test_drop_overlaps_by_hand(capsys):
    parts = {"train": ["a", "b", "c", "d"], "valid": ["e", "f"], "test": ["g"]}
    linked = {"a": {"b"}, "b": {"a", "e"}, "e": {"b"}, "c": {"g"}, "f": {"g"}, "g": {"c", "f"}}
    assert data.drop_overlaps(parts, linked) == {"train": ["a", "d"], "valid": ["e"], "test": ["g"]}
    assert data.drop_overlaps(parts, {}) == parts
    refused(lambda: data.drop_overlaps(parts | {"valid": ["f"]}, linked), capsys, "valid", "--keep-overlap")


@pytest.mark.slow
@needs_shared
def test_no_run_of_16_survives_between_parts():
    """A brute-force second opinion: every run as text, looked for in the other parts' runs."""
    files = (ROOT / data.MIDI_FOLDER).glob("*.mid")
    performances = {path.stem.strip(): data.read_midi(path) for path in files}
    shared = data.overlaps(performances)
    assert (len(shared), sum(map(len, shared.values()))) == (493, 2 * 345)
    runs = {}
    for name, played in performances.items():
        rows = sorted(zip(played.onset, played.pitch, played.velocity, strict=True))
        line = [f"{pitch}:{velocity}" for _, pitch, velocity in rows]
        runs[name] = {" ".join(line[i : i + 16]) for i in range(len(line) - 15)}
    for split in WHOLE:
        for fold in range(4):
            parts = data.drop_overlaps(data.split_percepiano(performances, split, fold), shared)
            assert lengths(parts) == KEPT[split][fold]
            seen = {part: set().union(*map(runs.get, kept)) for part, kept in parts.items()}
            assert not seen["train"] & seen["valid"]
            assert not (seen["train"] | seen["valid"]) & seen["test"]
            assert performances.keys() - set(sum(parts.values(), [])) <= shared.keys()


NAME, BAD = "Schubert_D960_mv2_8bars_3_06", "Schubert_D960_mv2_8bars_5_06"
HEADER = ["user", "dataID", "filename", *range(20), "message"]


def write_labels(root, mean=(), rows=None):
    row = [i / 20 for i in range(19)]
    (root / data.MEAN_FILE).write_text(json.dumps({f" {NAME}": [*row, 7]} | dict(mean)))
    if rows is not None:
        (root / "labels").mkdir(exist_ok=True)
        lines = [",".join(map(str, row)) for row in [HEADER, *rows]]
        (root / data.RATINGS_FILE).write_text("\n".join(lines))


def test_labels_and_ratings_by_hand(tmp_path):
    plain = [3.0] * 18
    rows = [
        [7, 1, f"{NAME}.wav", 1.0, *plain, "", ""],
        [7, 1, f"{NAME}.wav", "", *plain, 6.0, "message"],
        [8, 1, f" {NAME}.wav", 0.0, *plain, 6.0, ""],
        [9, 1, f"{NAME}.wav", 8.0, *plain, "", ""],
        [],
        [""] * 24,
    ]
    write_labels(tmp_path, rows=rows)
    mean = data.read_labels(tmp_path)
    assert list(mean) == [NAME]
    np.testing.assert_array_equal(mean[NAME], np.arange(19) / 20)
    raters, names, ratings = data.read_ratings(tmp_path)
    assert (raters.tolist(), names.tolist()) == ([7, 7, 8], [NAME] * 3)
    np.testing.assert_array_equal(ratings[:, 0], [1, np.nan, np.nan])
    np.testing.assert_array_equal(ratings[:, 1:], np.full((3, 18), 3.0))


# (mean of BAD, what the line names)
ENTRIES = [
    (0.5, ""),
    ([float("nan")] + [0.5] * 19, "nan"),
    ([1.01] + [0.5] * 19, "1.01"),
    (["x"] * 20, "'x'"),
    ([0.5] * 19, "18 ratings"),
    ([[0.5]] * 20, ""),
]


@pytest.mark.parametrize(("mean", "named"), ENTRIES)
def test_bad_label_entries_are_refused_or_noted(tmp_path, mean, named, capsys):
    write_labels(tmp_path, {BAD: mean})
    line = refused(lambda: data.read_labels(tmp_path), capsys, tmp_path / data.MEAN_FILE, BAD, named)
    problems = []
    assert list(data.read_labels(tmp_path, problems)) == [NAME]
    assert [f"x.py: {problem}" for problem in problems] == [line]


@pytest.mark.parametrize("content", [b"<html>", b"\xff\xfe\x00\x01", b"[1, 2]"])
@pytest.mark.parametrize(("read", "path"), [("labels", data.MEAN_FILE), ("ratings", data.RATINGS_FILE)])
def test_bad_label_files_are_refused(tmp_path, content, read, path, capsys):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_bytes(content)
    refused(lambda: getattr(data, f"read_{read}")(tmp_path), capsys, tmp_path / path)


ROWS = [[7, 1], ["x", 1, NAME, *[3] * 19], *([7, 1, NAME, bad, *[3] * 18] for bad in ("a", "nan", -1))]
ROWS += [[7, 1, NAME, *[3] * 18, "nan"], [10**20, 1, NAME, *[3] * 19]]


@pytest.mark.parametrize("row", ROWS)
def test_bad_rating_rows_are_named(tmp_path, row, capsys):
    write_labels(tmp_path, rows=[[7, 1, NAME, *[3] * 19, "", ""], row])
    refused(lambda: data.read_ratings(tmp_path), capsys, tmp_path / data.RATINGS_FILE, "line 3")


@needs_shared
def test_ratings_explain_the_public_labels():
    mean = data.read_labels(ROOT)
    raters, names, ratings = data.read_ratings(ROOT)
    assert (len(mean), ratings.shape, len(set(raters))) == (1020, (12253, 19), 63)
    for name in mean:
        rows = ratings[names == name]
        np.testing.assert_allclose(np.nanmean(rows, axis=0) / 7, mean[name], atol=1e-6, rtol=0)
