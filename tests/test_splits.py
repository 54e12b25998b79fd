"""Names, splits, shared passages, labels and ratings of PercePiano."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data
from data import DataError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "percepiano"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="PercePiano is not beside the repository")

SIZES = {  # (split, fold): sizes of train, valid, test of the 1202 public performances, and with shared notes left out
    ("segment", 0): ((765, 255, 182), (628, 250, 182)),
    ("segment", 1): ((765, 255, 182), (641, 235, 182)),
    ("segment", 2): ((765, 255, 182), (651, 225, 182)),
    ("segment", 3): ((765, 255, 182), (640, 238, 182)),
    ("performer", 0): ((834, 175, 193), (834, 175, 193)),
    ("performer", 1): ((834, 175, 193), (834, 175, 193)),
    ("performer", 2): ((847, 162, 193), (847, 162, 193)),
    ("performer", 3): ((834, 175, 193), (834, 175, 193)),
    ("piece", 0): ((809, 155, 238), (739, 155, 238)),
    ("piece", 1): ((912, 173, 117), (840, 173, 117)),
    ("piece", 2): ((768, 146, 288), (727, 146, 288)),
    ("piece", 3): ((539, 104, 559), (489, 104, 559)),
    ("random", 0): ((765, 256, 181), (611, 241, 181)),
    ("random", 1): ((766, 255, 181), (618, 236, 181)),
    ("random", 2): ((766, 255, 181), (627, 231, 181)),
    ("random", 3): ((766, 255, 181), (626, 232, 181)),
}
GROUP_OF = {  # written out a second time on purpose, with plain string handling
    "segment": lambda name: (name.split("bars_")[0], name.split("_")[-1]),
    "performer": lambda name: ("Beethoven" in name, name.split("_")[-2]),
    "random": lambda name: name,
}
CASES = pytest.mark.parametrize(("split", "fold"), SIZES)


@pytest.fixture(scope="module")
def names():
    return sorted(path.stem.strip() for path in (SHARED / "virtuoso" / "data" / "all_2rounds").glob("*.mid"))


@pytest.fixture(scope="module")
def performances():
    files = sorted((SHARED / "virtuoso" / "data" / "all_2rounds").glob("*.mid"))
    return {path.stem.strip(): data.read_midi(path) for path in files}


@pytest.fixture(scope="module")
def shared(performances):
    return data.overlaps(performances)


def small_corpus():
    """Two composers, six works, players 1..11 and the score."""
    works = (
        "Beethoven_WoO80_var1",
        "Beethoven_WoO80_thema",
        "Schubert_D935_no.3",
        "Schubert_D960_mv2",
        "Schubert_D960_mv3",
    )
    players = (*range(12), "Score")
    return [
        f"{work}_8bars_{player}_{segment}"
        for work in works
        for player in players
        for segment in ("01", "2", "13")
    ]


def lengths(parts):
    return tuple(len(parts[part]) for part in ("train", "valid", "test"))


# names


def test_names_are_taken_apart():
    name = " Schubert_D935_no.3_4bars_Score2_07"
    assert data.parse_name(name) == ("Schubert_D935_no.3", "4", "Score2", "07")
    assert data.work_of(name) == "Schubert_D935_no.3"
    assert data.player_of("Beethoven_WoO80_var25_8bars_19_14.mid") == "19"
    assert data.segment_of(name) == "Schubert_D935_no.3_4bars_07"
    assert data.score_of(name) == "Schubert_D935_no.3_4bars_Score_07"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Schubert",
        "Schubert_D960_mv2_8bars_06",
        "Schubert_D960_mv2_8bars_Me_06",
        "Schubert_D960_mv2_bars_1_06",
        "Schubert_D960_mv2_8bars_1_06.wav",
        "a b_8bars_1_06",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(DataError, match="expected <work>_<N>bars_<player>_<segment>") as error:
        data.split_percepiano([*small_corpus(), name], "segment", 0)
    assert repr(name) in str(error.value)


def test_there_are_19_different_labels():
    assert len(set(data.LABELS)) == 19
    if SHARED.exists():
        text = (SHARED / "README.md").read_text(encoding="utf-8")
        assert all(f"{index}. `{label}`" in text for index, label in enumerate(data.LABELS))


def test_player_indices():
    beethoven = [
        data.player_index(f"Beethoven_WoO80_var3_8bars_{p}_2")
        for p in (1, 2, 3, 4, 7, 11, 14, 18, 19, 22, 24, 26, 5, "Score", "Score2")
    ]
    assert beethoven == [*range(12), None, 0, None]
    assert [data.player_index(f"Schubert_D935_no.3_4bars_{p}_2") for p in (1, 12, 13, "Score", "Score2")] == [
        1,
        12,
        13,
        0,
        None,
    ]


# splits


@CASES
def test_parts_hold_every_name_once_in_order(split, fold):
    names = small_corpus()
    parts = data.split_percepiano(names, split, fold)
    assert list(parts) == ["train", "valid", "test"]
    assert sorted(parts["train"] + parts["valid"] + parts["test"]) == sorted(names)
    assert all(part == sorted(part) for part in parts.values())


@CASES
def test_order_of_the_names_does_not_matter(split, fold):
    names = small_corpus()
    shuffled = random.Random(fold).sample(names, len(names))
    assert data.split_percepiano(shuffled, split, fold) == data.split_percepiano(names, split, fold)


@CASES
def test_surrounding_spaces_change_no_part(split, fold):
    names = small_corpus()
    spaced = data.split_percepiano([f" {name}" for name in names], split, fold)
    assert {part: [name.strip() for name in kept] for part, kept in spaced.items()} == data.split_percepiano(
        names, split, fold
    )


@pytest.mark.parametrize("split", ["segment", "performer", "random"])
def test_folds_validate_on_disjoint_items_and_share_one_test_part(split):
    folds = [data.split_percepiano(small_corpus(), split, fold) for fold in range(4)]
    assert all(fold["test"] == folds[0]["test"] for fold in folds)
    valid = [name for fold in folds for name in fold["valid"]]
    assert len(valid) == len(set(valid))
    if split != "performer":
        assert sorted(valid + folds[0]["test"]) == sorted(small_corpus())


@pytest.mark.parametrize("fold", range(4))
def test_piece_leaves_one_work_out(fold):
    piece = ("Beethoven_WoO80", "Schubert_D935_no.3", "Schubert_D960_mv2", "Schubert_D960_mv3")[fold]
    parts = data.split_percepiano(small_corpus(), "piece", fold)
    assert parts["test"] == sorted(name for name in small_corpus() if name.startswith(piece))
    assert not {data.segment_of(name) for name in parts["train"]} & {
        data.segment_of(name) for name in parts["valid"]
    }
    rest = len(parts["train"]) + len(parts["valid"])
    assert 0.15 * rest <= len(parts["valid"]) < 0.15 * rest + 13


def test_piece_uses_a_foreign_corpus_own_works():
    names = [
        f"Etude_{work}_8bars_{player}_{segment}"
        for work in "dbca"
        for player in range(5)
        for segment in range(1, 6)
    ]
    tests = [data.split_percepiano(names, "piece", fold)["test"] for fold in range(4)]
    assert [{data.work_of(name) for name in test} for test in tests] == [
        {"Etude_a"},
        {"Etude_b"},
        {"Etude_c"},
        {"Etude_d"},
    ]


def test_unknown_split_and_fold_name_the_valid_ones():
    with pytest.raises(DataError, match="'paper'.*segment, performer, piece, random"):
        data.split_percepiano(small_corpus(), "paper", 0)
    for fold in (4, -1, "all", None):
        with pytest.raises(DataError, match="fold.*0, 1, 2, 3"):
            data.split_percepiano(small_corpus(), "segment", fold)


def test_empty_parts_and_copies_are_refused():
    with pytest.raises(DataError, match="'segment', fold 0, of 2 performances: nothing left for train"):
        data.split_percepiano(["A_8bars_1_1", "B_8bars_1_1"], "segment", 0)
    with pytest.raises(DataError, match="of 0 performances"):
        data.split_percepiano([], "random", 0)
    with pytest.raises(DataError, match="nothing left for test"):
        data.split_percepiano([name for name in small_corpus() if "D935" not in name], "piece", 1)
    with pytest.raises(DataError, match="'Schubert_D960_mv2_8bars_1_01': given 2 times"):
        data.split_percepiano([*small_corpus(), " Schubert_D960_mv2_8bars_1_01"], "segment", 0)


@pytest.mark.slow
@needs_shared
@CASES
def test_fixed_sizes_on_the_public_names(performances, shared, split, fold):
    parts = data.split_percepiano(performances, split, fold)
    assert (lengths(parts), lengths(data.drop_overlaps(parts, shared))) == SIZES[split, fold]


@needs_shared
@CASES
def test_no_group_crosses_parts(names, split, fold):
    parts = data.split_percepiano(names, split, fold)
    assert lengths(parts) == SIZES[split, fold][0]
    if split == "piece":
        assert not {name.split("bars_")[0].split("_var")[0] for name in parts["test"]} & {
            name.split("bars_")[0].split("_var")[0] for name in parts["train"] + parts["valid"]
        }
    key = GROUP_OF["segment" if split == "piece" else split]
    groups = [{key(name) for name in parts[part]} for part in parts]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


@needs_shared
def test_segment_test_part_is_the_withheld_list(names):
    text = (SHARED / "README.md").read_text(encoding="utf-8")
    withheld = {line.split("`")[1] for line in text.splitlines() if line.startswith("- `")}
    test = data.split_percepiano(names, "segment", 0)["test"]
    assert len(withheld) == 15
    assert len(test) == 182
    assert {data.segment_of(name) for name in test} == withheld
    assert set(names) - set(data.read_labels(SHARED)[0]) == set(test)


@needs_shared
def test_performer_parts_by_hand(names):
    parts = data.split_percepiano(names, "performer", 0)
    players = {
        part: {(name.split("_")[0], name.split("_")[-2]) for name in names} for part, names in parts.items()
    }
    assert players["test"] == {("Beethoven", "2"), ("Beethoven", "3"), ("Schubert", "1"), ("Schubert", "2")}
    assert players["valid"] == {("Beethoven", "4"), ("Beethoven", "7"), ("Schubert", "3"), ("Schubert", "4")}
    assert {
        ("Beethoven", "1"),
        ("Beethoven", "Score"),
        ("Beethoven", "Score2"),
        ("Schubert", "0"),
    } <= players["train"]


# shared passages


def notes(numbers, seed=None):
    """A performance of one note per 0.1 s; with a seed, at random times but in the same order."""
    numbers = np.asarray(numbers)
    onset = (
        np.arange(len(numbers)) * 0.1
        if seed is None
        else np.sort(np.random.default_rng(seed).random(len(numbers)))
    )
    return SimpleNamespace(pitch=numbers // 100, velocity=numbers % 100, onset=onset)


def test_overlaps_need_16_notes_in_a_row_with_their_velocities():
    line = np.random.default_rng(0).integers(2000, 9000, size=60)
    other = np.random.default_rng(1).integers(2000, 9000, size=60)
    found = data.overlaps(
        {
            "whole": notes(line),
            "sixteen": notes([*other[:20], *line[30:46], *other[20:30]], seed=3),
            "fifteen": notes([*other[30:40], *line[10:25], *other[40:60]]),
            "softer": notes(line - 1),
            "short": notes(line[:15]),
        }
    )
    assert found == {"whole": {"sixteen"}, "sixteen": {"whole"}}


def test_overlaps_ignore_the_order_within_a_chord():
    line = np.random.default_rng(0).integers(2000, 9000, size=32)
    onset = np.repeat(np.arange(8.0), 4)
    shuffled = np.concatenate(
        [chord + np.random.default_rng(i).permutation(4) for i, chord in enumerate(range(0, 32, 4))]
    )
    first = SimpleNamespace(pitch=line // 100, velocity=line % 100, onset=onset)
    second = SimpleNamespace(pitch=first.pitch[shuffled], velocity=first.velocity[shuffled], onset=onset + 5)
    assert data.overlaps({"a": first, "b": second}) == {"a": {"b"}, "b": {"a"}}


def test_drop_overlaps_by_hand():
    parts = {"train": ["a", "b", "c", "d"], "valid": ["e", "f"], "test": ["g"]}
    pairs = [("a", "b"), ("b", "e"), ("c", "g"), ("f", "g")]
    linked = {name: {x for pair in pairs if name in pair for x in pair} - {name} for name in "abcdefg"}
    assert data.drop_overlaps(parts, linked) == {"train": ["a", "d"], "valid": ["e"], "test": ["g"]}
    assert data.drop_overlaps(parts, {}) == parts
    with pytest.raises(DataError, match="overlap rule.*nothing left for valid"):
        data.drop_overlaps(parts | {"valid": ["f"]}, linked)


@pytest.mark.slow
@needs_shared
def test_overlap_counts_of_the_public_performances(performances, shared):
    test = set(data.split_percepiano(performances, "segment", 0)["test"])
    assert len(performances) == 1202
    assert len(shared) == 493
    assert sum(len(others) for others in shared.values()) == 2 * 345
    assert sum(1 for name in test if shared.get(name, set()) - test) == 77


@pytest.mark.slow
@needs_shared
@CASES
def test_no_run_of_16_survives_between_parts(performances, shared, split, fold):
    """A brute-force second opinion: every run as text, searched for in the other parts' notes as one long text."""
    parts = data.drop_overlaps(data.split_percepiano(performances, split, fold), shared)

    def text(name):
        played = performances[name]
        order = sorted(
            range(len(played.pitch)), key=lambda i: (played.onset[i], played.pitch[i], played.velocity[i])
        )
        return [f"{played.pitch[i]}:{played.velocity[i]}" for i in order]

    texts = {part: [text(name) for name in names] for part, names in parts.items()}
    seen = {
        part: {" ".join(line[i : i + 16]) for line in lines for i in range(len(line) - 15)}
        for part, lines in texts.items()
    }
    assert all(len(runs) > 1000 for runs in seen.values())
    assert not seen["train"] & seen["valid"]
    assert not seen["train"] & seen["test"]
    assert not seen["valid"] & seen["test"]
    dropped = performances.keys() - {name for names in parts.values() for name in names}
    assert dropped <= shared.keys()


# labels and ratings


MEAN, STD = data.MEAN_FILE, data.STD_FILE
NAME = "Schubert_D960_mv2_8bars_3_06"
HEADER = ["user", "dataID", "filename", *(f"q{i}" for i in range(20)), "message"]


def write_labels(root, mean=None, std=None, rows=None):
    row = [i / 20 for i in range(19)]
    (root / MEAN).write_text(
        json.dumps({f" {NAME}": [*row, 7], NAME.replace("_3_", "_4_"): [*row, 7]} | (mean or {}))
    )
    (root / STD).write_text(json.dumps({NAME: row, NAME.replace("_3_", "_4_"): row} | (std or {})))
    if rows is not None:
        (root / "labels").mkdir()
        lines = [HEADER, *rows]
        (root / "labels" / "total_2rounds.csv").write_text(
            "".join(",".join(map(str, line)) + "\n" for line in lines)
        )


def test_labels_are_read_without_the_player_index(tmp_path):
    write_labels(tmp_path)
    mean, std, counts = data.read_labels(tmp_path)
    assert list(mean) == list(std) == [NAME, NAME.replace("_3_", "_4_")]
    np.testing.assert_array_equal(mean[NAME], np.arange(19) / 20)
    assert mean[NAME].dtype == np.float64
    assert counts == {}


@pytest.mark.parametrize(
    ("file", "entry", "message"),
    [
        (MEAN, [0.5] * 19, "19 values; expected a list of 20"),
        (STD, [0.5] * 20, "20 values; expected a list of 19"),
        (MEAN, 0.5, "float; expected a list of 20"),
        (
            MEAN,
            [0.5] * 3 + [float("nan")] + [0.5] * 16,
            "Pedal_Sparse/dry_Saturated/wet is nan; expected a number from 0 to 1",
        ),
        (MEAN, [float("inf")] + [0.5] * 19, "Timing_Stable_Unstable is inf"),
        (MEAN, [1.01] + [0.5] * 19, "is 1.01"),
        (STD, [-0.1] + [0.5] * 18, "is -0.1"),
        (STD, ["0.5"] + [0.5] * 18, "is '0.5'"),
        (STD, [True] + [0.5] * 18, "is True"),
    ],
)
def test_bad_label_entries_name_file_and_key(tmp_path, file, entry, message):
    bad = NAME.replace("_3_", "_5_")
    write_labels(
        tmp_path,
        **{
            "mean" if file == MEAN else "std": {bad: entry},
            "std" if file == MEAN else "mean": {bad: [0.5] * (19 if file == MEAN else 20)},
        },
    )
    with pytest.raises(DataError) as error:
        data.read_labels(tmp_path)
    assert str(tmp_path / file) in str(error.value)
    assert repr(bad) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    problems = []
    mean, std, _ = data.read_labels(tmp_path, problems)
    assert (len(mean), len(std), problems) == (2, 2, [str(error.value)])


@pytest.mark.parametrize("file", [MEAN, STD])
def test_a_key_of_one_label_file_only_is_a_problem(tmp_path, file):
    write_labels(
        tmp_path,
        **({"std": {"A_8bars_1_1": [0.5] * 19}} if file == MEAN else {"mean": {"A_8bars_1_1": [0.5] * 20}}),
    )
    with pytest.raises(DataError, match=f"{file}: no key 'A_8bars_1_1'"):
        data.read_labels(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; run `python data.py fetch percepiano`"),
        (b"", "not readable as JSON"),
        (b"<!DOCTYPE html><html></html>", "not readable as JSON"),
        (b"\xff\xfe\x00\x01", "not readable as JSON"),
        (b'{"a": [0.5, ', "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"[1, 2]", "holds a list; expected an object"),
        (b'{"A_8bars_1_1": [], " A_8bars_1_1": []}', "'A_8bars_1_1' occurs twice"),
        (b'{"abc": []}', "'abc': not a performance name"),
    ],
)
@pytest.mark.parametrize("file", [MEAN, STD])
def test_bad_label_files_are_refused(tmp_path, file, content, message):
    write_labels(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    if b"abc" in (content or b""):
        write_labels(tmp_path, mean={"abc": []}, std={"abc": []})
    with pytest.raises(DataError) as error:
        data.read_labels(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ratings_by_hand(tmp_path):
    plain = [3.0] * 18
    write_labels(
        tmp_path,
        rows=[
            [7, 1, f"{NAME}.wav", 1.0, *plain, "", ""],
            [7, 1, f"{NAME}.wav", "", *plain, 6.0, "message"],
            [8, 1, f" {NAME}.wav", 0.0, *plain, 6.0, ""],
            [9, 1, f"{NAME}.wav", 8.0, *plain, "", ""],
        ],
    )
    raters, names, ratings = data.read_ratings(tmp_path)
    assert raters.tolist() == [7, 7, 8]
    assert names.tolist() == [NAME] * 3
    np.testing.assert_array_equal(ratings[:, 0], [1, np.nan, np.nan])
    np.testing.assert_array_equal(ratings[:, 1:], np.full((3, 18), 3.0))
    assert data.read_labels(tmp_path)[2] == {NAME: 3}


@pytest.mark.parametrize(
    "row",
    [
        [7, 1],
        ["x", 1, NAME, *[3] * 19],
        [7, 1, NAME, *[3] * 18],
        [7, 1, NAME, "a", *[3] * 18],
        [7, 1, NAME, "nan", *[3] * 18],
        [7, 1, NAME, -1, *[3] * 18],
    ],
)
def test_bad_rating_rows_are_named(tmp_path, row):
    write_labels(tmp_path, rows=[[7, 1, NAME, *[3] * 19, "", ""], row])
    with pytest.raises(DataError, match=r"total_2rounds\.csv: row 3: .*expected"):
        data.read_ratings(tmp_path)


def test_other_ratings_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="total_2rounds.csv: no such file"):
        data.read_ratings(tmp_path)
    write_labels(tmp_path, rows=[])
    for content, message in (
        (b"<html>", "starts with"),
        (b"\xff\xfe", "not readable as CSV"),
        (b"", "no rating"),
    ):
        (tmp_path / "labels" / "total_2rounds.csv").write_bytes(content)
        with pytest.raises(DataError, match=message):
            data.read_ratings(tmp_path)


@needs_shared
def test_ratings_explain_the_public_labels():
    mean, std, counts = data.read_labels(SHARED)
    raters, names, ratings = data.read_ratings(SHARED)
    assert (len(mean), len(std), len(counts)) == (1020, 1020, 1020)
    assert (ratings.shape, len(set(raters.tolist()))) == ((12253, 19), 63)
    assert (min(counts.values()), float(np.median(list(counts.values()))), max(counts.values())) == (
        4,
        14.0,
        18,
    )
    for name in mean:
        rows = ratings[names == name]
        np.testing.assert_allclose(np.nanmean(rows, axis=0) / 7, mean[name], atol=1e-6, rtol=0)
        np.testing.assert_allclose(np.nan_to_num(rows).std(axis=0) / 7, std[name], atol=1e-6, rtol=0)
