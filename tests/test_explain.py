"""eval.explain: attention weights of HAN against the modules' own output, tempo and dynamics of constructed performances, emission
times of the decoder, and the pictures."""

import numpy as np
import pytest
import torch

import data
import eval as evaluation
from data import DataError, Performance
from models import AST, HAN, ContextAttention, GRUDecoder, PooledMLP

COLUMNS = {features: data.column_names(data.FEATURE_SETS[features]) for features in ("full", "score")}
STATS = 158


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def uneven(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def small_han(features: str = "full", pooled: bool = False, **args) -> tuple:
    """A model, and what `prepare_han` needs to know of its checkpoint."""
    columns, stats = COLUMNS[features], 0
    info = {
        "features": features,
        "columns": columns,
        "mean": [0.0] * len(columns),
        "std": [10.0] * len(columns),
        "quantiles": None,
    }
    if pooled:
        stats = STATS + 5 * len(columns)
        info["quantiles"] = torch.linspace(0, 1, 101).unsqueeze(1).expand(101, stats)
    args = {"size": 4, "heads": 2, "layers": (1, 1, 1, 1), "stats_size": stats, **args}
    return uneven(HAN(len(columns), **args)), {"path": "runs/a/best.pt", "task": "han", "data": info}


def read_score(path, measures: int = 4) -> data.Score:
    """4/4: a melody of quarters over whole notes."""
    step = "CDEFGAB"

    def note(k, octave, duration, voice):
        return (
            f"<note><pitch><step>{step[k % 7]}</step><octave>{octave}</octave></pitch><duration>{duration}</duration>"
            f"<voice>{voice}</voice><staff>{voice}</staff></note>"
        )

    bars = [
        "".join(note(4 * m + k, 5, 1, 1) for k in range(4))
        + "<backup><duration>4</duration></backup>"
        + note(m, 3, 4, 2)
        for m in range(measures)
    ]
    sign = "<attributes><divisions>1</divisions><time><beats>4</beats><beat-type>4</beat-type></time><staves>2</staves></attributes>"
    bars = "".join(
        f'<measure number="{m + 1}">{sign if not m else ""}{bar}</measure>' for m, bar in enumerate(bars)
    )
    parts = '<part-list><score-part id="P1"><part-name>x</part-name></score-part></part-list>'
    path.write_text(f'<score-partwise>{parts}<part id="P1">{bars}</part></score-partwise>')
    return data.read_musicxml(path)


def played(score, seconds, extra=(), left_out=()) -> tuple[Performance, np.ndarray]:
    """The score's notes at `seconds` (of each), some left out, and extra (pitch, second); and the match."""
    kept = np.setdiff1d(np.arange(len(score.pitch)), left_out)
    onset = np.concatenate([np.asarray(seconds, float)[kept], [second for _, second in extra]])
    pitch = np.concatenate([score.pitch[kept], [p for p, _ in extra]]).astype(np.int64)
    order = np.argsort(onset, kind="stable")
    velocity = (40 + np.arange(len(onset)) % 30).astype(np.int64)
    performance = Performance(
        "take.mid",
        pitch[order],
        velocity[order],
        onset[order],
        onset[order] + 0.4,
        np.zeros((0, 2)),
        np.zeros((0, 2)),
    )
    match = np.full(len(score.pitch), -1)
    match[kept] = np.argsort(order)[: len(kept)]
    return performance, match


def work_of(score, performance, match) -> dict:
    stats = data.performance_statistics(performance)
    item = data.note_table(score, performance, match) | {
        "stats": np.array([*stats.values()], np.float32),
        "match_rate": float((match >= 0).mean()),
    }
    return {"name": "take", "score": score, "performance": performance, "match": match, "item": item}


@pytest.fixture
def work(tmp_path) -> dict:
    """120 quarters per minute from second 1 on; row 6, a whole note, left out, one note extra."""
    score = read_score(tmp_path / "a.musicxml")
    return work_of(score, *played(score, 1 + score.onset / 2, extra=[(61, 3.1)], left_out=[6]))


def captured(monkeypatch) -> list:
    """Figures that would be written."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, format: figures.append(self))
    return figures


def size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


# --- HAN: weights ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_give_the_modules_own_output():
    attention, x = uneven(ContextAttention(12, 3)), torch.randn(9, 12)
    group = torch.tensor([0, 0, 1, 3, 3, 3, 3, 4, 4])
    pooled, weights = evaluation.explicit_attention(attention, x, group, 5)
    assert torch.allclose(pooled, attention(x, group, 5), atol=1e-5)
    total = torch.zeros(5, 3).index_add(0, group, weights)
    assert torch.allclose(total, torch.tensor([1.0, 1, 0, 1, 1]).unsqueeze(1).expand(5, 3), atol=1e-6)
    assert pooled[2].abs().max() == 0
    assert weights[3:7].std() > 0.03


@pytest.mark.parametrize(("args", "names"), [
    ({}, ["beat_attention", "measure_attention", "attention"]), ({"level": "measure"}, ["beat_attention", "measure_attention", "attention"]),
    ({"level": "beat"}, ["beat_attention", "attention"]), ({"level": "note"}, ["attention"]), ({"model": "bilstm"}, ["attention"])])  # fmt: skip
@torch.no_grad()
def test_weights_of_all_levels_give_the_networks_own_stages(args, names, work):
    model, kept = small_han(**args)
    corpus = data.Corpus(
        "", False, {"take": {"name": "take", **work["item"]}}, ["take"], COLUMNS["full"], [], {}
    )
    batch = data.collate_han(data.prepare_han(corpus, ["take"], kept["data"]))
    weights = evaluation.attention_weights(model, batch)
    assert sorted(weights) == sorted(names)
    for values, group in weights.values():
        assert torch.allclose(
            torch.zeros(int(group.max()) + 1, 2).index_add(0, group, values), torch.ones(1, 2), atol=1e-6
        )
    stages = model.stages(batch)
    by_hand = (
        (
            stages["contracted"].view(len(weights["attention"][0]), 2, -1)
            * weights["attention"][0].unsqueeze(2)
        )
        .sum(0)
        .flatten()
    )
    assert torch.allclose(by_hand, stages["pooled"][0], atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_shares_are_even_on_average_and_count_members_alike(work):
    item, members = {"name": "take", **work["item"]}, [small_han(), small_han()]
    levels = evaluation.han_attention(members, item)
    sizes = {"note in beat": 21, "note": 21, "beat in measure": 16, "beat": 16, "measure": 4}
    assert {level: len(values) for level, values in levels.items()} == sizes
    beat, measure = (np.unique(item[key], return_inverse=True)[1] for key in ("beat", "measure"))
    assert np.bincount(beat, levels["note in beat"]) / np.bincount(beat) == pytest.approx(
        np.ones(16), abs=1e-6
    )
    assert levels["beat in measure"].reshape(4, 4).mean(1) == pytest.approx(np.ones(4), abs=1e-6)
    assert levels["note"].mean() == pytest.approx(1, abs=1e-6)
    assert levels["beat"] == pytest.approx(np.bincount(beat, levels["note"]) / np.bincount(beat))
    assert levels["measure"] == pytest.approx(np.bincount(measure, levels["note"]) / np.bincount(measure))
    assert levels["measure"].std() > 1e-3
    alone = [evaluation.han_attention([member], item) for member in members]
    for level in levels:
        assert levels[level] == pytest.approx((alone[0][level] + alone[1][level]) / 2)
    with torch.no_grad():
        for module in members[0][0].modules():
            if isinstance(module, ContextAttention):
                module.context_vector.zero_()
    for values in evaluation.han_attention(members[:1], item).values():
        assert values == pytest.approx(np.ones(len(values)), abs=1e-6)


def test_rows_that_a_score_model_never_reads_have_no_weight(work):
    item, (only_score, full) = {"name": "take", **work["item"]}, (small_han("score"), small_han())
    extra = item["voice"] == 0
    assert extra.sum() == 1
    levels = evaluation.han_attention([only_score], item)
    for level in ("note", "note in beat"):
        assert (np.isnan(levels[level]) == extra).all()
    assert levels["note"][~extra].mean() == pytest.approx(1, abs=1e-6)
    both, alone = evaluation.han_attention([only_score, full], item), evaluation.han_attention([full], item)
    assert both["note"][extra] == pytest.approx(alone["note"][extra])
    assert both["note"][~extra] == pytest.approx((levels["note"] + alone["note"])[~extra] / 2)


@pytest.mark.parametrize(("args", "absent"), [({"level": "measure"}, {"note", "beat"}), ({"level": "beat"}, {"note", "beat in measure"}),
                                              ({"model": "bilstm_sa"}, {"note in beat", "beat in measure"})])  # fmt: skip
def test_levels_that_a_network_lacks_are_absent(args, absent, work):
    levels = evaluation.han_attention([small_han(**args)], {"name": "take", **work["item"]})
    assert {"note", "note in beat", "beat", "beat in measure", "measure"} - levels.keys() == absent
    assert len(levels["measure"]) == 4


# --- HAN: tempo and dynamics -----------------------------------------------------------------------------------------


def curve(score, performance, match):
    return evaluation.tempo_curve(*evaluation.time_map(score, performance, match))


def test_a_constant_tempo_is_a_constant_curve(work):
    begin, qpm, smooth = curve(*(work[key] for key in ("score", "performance", "match")))
    assert begin == pytest.approx(1 + 0.5 * np.arange(16))
    assert qpm == pytest.approx(np.full(15, 120), abs=1e-6)
    assert smooth == pytest.approx(np.full(15, 120), abs=1e-6)


def test_a_ritardando_falls_and_its_numbers_are_those_played(tmp_path):
    score = read_score(tmp_path / "a.musicxml")
    tempo = np.linspace(120, 60, 16)
    second = np.append(0, np.cumsum(60 / tempo))
    begin, qpm, smooth = curve(score, *played(score, second[score.onset.astype(int)]))
    assert qpm == pytest.approx(tempo[:15], abs=1e-6)
    assert (np.diff(smooth) < 0).all()
    assert np.abs(smooth - qpm).max() < 4


def test_a_beat_that_was_not_found_is_a_gap(tmp_path):
    score = read_score(tmp_path / "a.musicxml")
    lost = np.flatnonzero(score.onset == 5)
    begin, qpm, smooth = curve(score, *played(score, score.onset, left_out=lost))
    assert len(begin) == 15
    assert np.flatnonzero(np.isnan(qpm)).tolist() == np.flatnonzero(np.isnan(smooth)).tolist() == [4]
    assert smooth[np.isfinite(smooth)] == pytest.approx(np.full(13, 60))


def test_a_chord_counts_at_its_mean_and_the_clock_goes_on_beyond_the_ends(tmp_path):
    score = read_score(tmp_path / "a.musicxml", 2)
    seconds = score.onset + np.where(score.pitch < 60, 0.04, 0)
    quarter, second, beat = evaluation.time_map(
        score, *played(score, seconds, left_out=np.flatnonzero(score.onset > 5))
    )
    assert (quarter.tolist(), beat.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    assert second == pytest.approx([0.02, 1, 2, 3, 4.02, 5])
    assert evaluation.clock(quarter, second, np.array([-1, 0.5, 7]), 90) == pytest.approx(
        [0.02 - 0.996, 0.51, 5 + 2 * 0.996]
    )
    assert evaluation.clock(quarter[:1], second[:1], np.array([0, 3]), 90) == pytest.approx([0.02, 2.02])
    assert [len(part) for part in evaluation.tempo_curve(quarter[:1], second[:1], beat[:1])] == [1, 0, 0]


def test_a_performance_of_something_else_is_refused(tmp_path):
    score = read_score(tmp_path / "a.musicxml", 1)
    performance, match = played(score, score.onset)
    with pytest.raises(DataError, match=r"take.mid: no note of .*a.musicxml was found in it"):
        evaluation.time_map(score, performance, np.full_like(match, -1))


def test_dynamics_by_hand():
    notes = np.array(
        [[60, 40, 0, 1], [64, 60, 0, 1], [64, 60, 0, 2], [60, 90, 1, 2], [60, 0, 2, 3], [60, 70, 3, 4]], float
    )
    sounded = np.array([True, True, True, True, False, True])
    found = evaluation.beat_dynamics(
        notes, sounded, np.array([0, 0, 0, 1, 2, 3])
    )  # row 2 is row 1 in another voice
    assert found[[0, 1, 3]].tolist() == [[50, 10], [90, 0], [70, 0]]
    assert np.isnan(found[2]).all()


# --- HAN: picture ----------------------------------------------------------------------------------------------------


def test_a_performance_is_drawn(work, tmp_path):
    out = tmp_path / "new" / "a.png"
    drawn = evaluation.explain("han", out, [small_han()], work)
    assert size(out) == (1600, 1200)
    assert drawn["edges"]["measure"] == pytest.approx([1, 3, 5, 7, 9])
    assert drawn["edges"]["beat"] == pytest.approx(1 + 0.5 * np.arange(17))
    assert drawn["bars"].tolist() == [1, 2, 3, 4]
    lost = np.flatnonzero(~drawn["sounded"])
    assert drawn["notes"][lost] == pytest.approx(np.array([[work["score"].pitch[6], 0, 3, 5]]))
    assert drawn["notes"][drawn["sounded"], 2] == pytest.approx(np.sort(work["performance"].onset), abs=1e-6)


@pytest.mark.parametrize("args", [{"pooled": True}, {"model": "bilstm"}])
def test_the_picture_shows_those_numbers(args, work, tmp_path, monkeypatch):
    figures = captured(monkeypatch)
    drawn = evaluation.explain("han", tmp_path / "a.png", [small_han(**args)] * 2, work)
    figure = figures[0]
    roll, weights, pace, loud = figure.axes[0:8:2]
    assert (figure.get_size_inches() * figure.dpi).tolist() == [1600, 1200]
    assert (
        figure.get_suptitle()
        == "take: attention of HAN, tempo, dynamics (mean of 2 checkpoints, 95 % of the written notes found)"
    )
    assert ("--pooled" in figure.get_supxlabel()) == ("pooled" in args)
    steps = {patch.get_label(): patch.get_data() for patch in weights.patches}
    assert list(steps) == ["measures in the piece", "beats in the piece"] + ["beats in their measure"] * (
        "pooled" in args
    )
    assert steps["measures in the piece"].values == pytest.approx(drawn["levels"]["measure"] - 1)
    key = "note in beat" if "pooled" in args else "note"
    assert np.asarray(roll.collections[0].get_array()) == pytest.approx(
        drawn["levels"][key][drawn["sounded"]] - 1
    )
    assert len(roll.collections[1].get_paths()) == 1
    assert (
        "each beat" in roll.get_title(loc="left")
        if "pooled" in args
        else "the piece" in roll.get_title(loc="left")
    )
    assert pace.lines[0].get_ydata() == pytest.approx(np.full(15, 120), abs=1e-6)
    assert pace.get_ylim()[1] - pace.get_ylim()[0] > 10
    numbers = roll.child_axes[0]
    assert [label.get_text() for label in numbers.get_xticklabels()] == ["1", "2", "3", "4"]
    assert loud.get_xlabel() == "time in the performance (s)"


def test_a_piece_of_one_beat_is_drawn_without_tempo(tmp_path, monkeypatch):
    score = read_score(tmp_path / "a.musicxml", 1)
    performance, match = played(score, score.onset, left_out=np.flatnonzero(score.onset > 0))
    kept = work_of(score, performance, match)
    figures = captured(monkeypatch)
    drawn = evaluation.explain("han", tmp_path / "a.png", [small_han()], kept)
    assert (len(drawn["qpm"]), drawn["levels"]["measure"].tolist()) == (0, pytest.approx([1]))
    assert "no tempo" in figures[0].axes[4].texts[0].get_text()
    assert figures[0].axes[2].get_ylim()[1] >= 0.005
    assert np.isnan(drawn["dynamics"][1:]).all()


def test_features_that_are_not_finite_are_refused(work, tmp_path):
    work["item"]["x"][3, :] = np.nan
    with pytest.raises(DataError, match="take: attention weights that are not finite"):
        evaluation.explain("han", tmp_path / "a.png", [small_han()], work)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", "kind '.txt'; expected .png"),
        ("a.musicxml/a.png", "no file can be written in"),
        ("folder.png", "a folder"),
    ],
)
def test_what_cannot_be_written_is_refused_first(name, message, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a.musicxml").touch()
    for kind in ("han", "ast", "decoder"):
        with pytest.raises(DataError, match=message):
            evaluation.explain(kind, tmp_path / name, [], {})


# --- AST -------------------------------------------------------------------------------------------------------------


def small_ast(**args) -> tuple:
    model = uneven(AST(**{"frames": 96, "width": 16, "depth": 1, "heads": 2, "num_outputs": 19, **args}))
    return model, {
        "path": "runs/a/best.pt",
        "task": "ast",
        "data": {"mean": data.FBANK_MEAN, "std": data.FBANK_STD, "synthetic": True},
    }


def test_asts_are_averaged_and_drawn(tmp_path, monkeypatch):
    figures, members = captured(monkeypatch), [small_ast(), small_ast(frames=64)]
    energies = np.random.default_rng(0).normal(-4, 4, (150, 128)).astype(np.float32)
    kept = {"name": "take", "path": "take.wav", "energies": energies}
    drawn = evaluation.explain("ast", tmp_path / "a.png", members, kept)
    x = torch.from_numpy(data.normalise_fbank(energies, data.FBANK_MEAN, data.FBANK_STD)).float()
    each = [evaluation.roll_out_file(model, x, torch.device("cpu"))[0] for model, _ in members]
    assert drawn["share"] == pytest.approx((each[0] + each[1]) / 2)
    assert drawn["share"].shape == (8, 9)
    assert drawn["starts"] == [0, 2, 5]
    title = figures[0].axes[0].get_title()
    assert title.startswith(
        "take: which parts of the sound reach the ratings (attention roll-out of AST 16 x 1 x 2, mean of 2 checkpoints, synthetic"
    )
    with pytest.raises(DataError, match="patches every 10 frames"):
        evaluation.explain("ast", tmp_path / "b.png", [members[0], small_ast(stride=10)], kept)
    with pytest.raises(DataError, match="take.wav: attention that is not finite"):
        evaluation.explain(
            "ast", tmp_path / "b.png", members, kept | {"energies": np.full((150, 128), np.nan, np.float32)}
        )


def test_a_network_without_attention_is_refused(tmp_path):
    members = [(PooledMLP(), {"path": "runs/m/best.pt", "task": "mlp", "data": {}})]
    with pytest.raises(DataError, match="runs/m/best.pt: a checkpoint of task 'mlp', which has no attention"):
        evaluation.explain(
            "ast", tmp_path / "a.png", members, {"name": "a", "energies": np.zeros((64, 128), np.float32)}
        )
    assert not list(tmp_path.iterdir())


# --- decoder ---------------------------------------------------------------------------------------------------------

DECODER = [(GRUDecoder(channels=2, days=1, hidden=4, layers=1, kernel=32, stride=4), {})]


def posteriors(path: list[int], sure=None) -> np.ndarray:
    """(F, 41) log-probabilities whose best class follows the path, with the given probability."""
    sure = np.full(len(path), 0.9) if sure is None else np.array(sure)
    probs = np.repeat((1 - sure)[:, None] / 40, 41, 1)
    probs[np.arange(len(path)), path] = sure
    return np.log(probs).astype(np.float32)


def test_emissions_are_what_greedy_decodes_where_it_is_surest():
    log_probs = posteriors([0, 5, 5, 5, 0, 5, 7, 7, 40], [0.9, 0.5, 0.8, 0.7, 0.9, 0.6, 0.9, 0.6, 0.9])
    ids, frames = evaluation.emissions(log_probs)
    assert (ids.tolist(), frames.tolist()) == ([5, 5, 7, 40], [2, 5, 6, 8])
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 50):
        log_probs = rng.normal(size=(n, 41))
        log_probs[:, 0] += 2
        ids, frames = evaluation.emissions(log_probs)
        assert ids.tolist() == evaluation.ctc_greedy(log_probs[None], [n])[0]
        assert (np.diff(frames) > 0).all()


def test_true_labels_stand_where_their_partners_are():
    times = np.array([1.0, 2.0, 3.0, 6.0])
    at, right, found = evaluation.place_labels(
        [5, 9, 8, 3, 4], [5, 6, 9, 4], times, 0, 10
    )  # 6 inserted; 8 and 3 left out
    assert at == pytest.approx([1, 3, 4, 5, 6])
    assert (right.tolist(), found.tolist()) == ([True, True, False, False, True], [True, False, True, True])
    at, right, found = evaluation.place_labels([1, 2], [3, 2], times[:2], 0, 10)
    assert (at.tolist(), right.tolist(), found.tolist()) == ([1, 2], [False, True], [False, True])
    assert evaluation.place_labels([1, 2, 3], [], times[:0], 0, 4)[0] == pytest.approx([1, 2, 3])
    assert [len(part) for part in evaluation.place_labels([], [3], times[:1], 0, 4)] == [0, 0, 1]


def test_names_are_moved_apart_as_little_as_possible():
    assert evaluation.spread_out(np.array([1.0, 5.0, 5.0, 9.0]), 1, 0, 10) == pytest.approx([1, 4.5, 5.5, 9])
    assert evaluation.spread_out(np.array([0.0, 0.0, 0.0]), 1, 0, 10) == pytest.approx([0, 1, 2])
    assert np.diff(evaluation.spread_out(np.full(100, 3.0), 1, 0, 10)) == pytest.approx(np.full(99, 0.1))
    assert len(evaluation.spread_out(np.zeros(0), 1, 0, 10)) == 0


def test_a_trial_is_drawn(tmp_path):
    kept = {
        "name": "day/0001",
        "log_probs": posteriors([0, 5, 5, 0, 40]),
        "labels": [5, 40],
        "seconds per frame": 0.08,
    }
    drawn = evaluation.explain("decoder", tmp_path / "a.png", DECODER, kept)
    assert size(tmp_path / "a.png") == (1600, 900)
    assert drawn["times"] == pytest.approx(
        [0.32 + 0.08, 0.32 + 4 * 0.08]
    )  # frame 0 is bins 0..31 of 20 ms: its middle is at 0.32 s
    assert drawn["label_times"] == pytest.approx(drawn["times"])
    assert drawn["right"].all()


@pytest.mark.parametrize("labels", [[5, 6, 40, 12], None])
def test_the_picture_shows_classes_strings_and_errors(labels, tmp_path, monkeypatch):
    figures = captured(monkeypatch)
    log_probs = posteriors([0, 5, 5, 0, 40])
    evaluation.explain(
        "decoder",
        tmp_path / "a.png",
        DECODER * 2,
        {"name": "day/0001", "log_probs": log_probs, "labels": labels, "seconds per frame": 0.08},
    )
    above, heat, below, _ = figures[0].axes
    assert [label.get_text() for label in heat.get_yticklabels()] == [data.PHONEMES[5], "SIL", "blank"]
    assert np.asarray(heat.images[0].get_array()) == pytest.approx(np.exp(log_probs)[:, [5, 40, 0]].T)
    assert heat.images[0].get_extent()[:2] == pytest.approx([0.28, 0.28 + 5 * 0.08])
    assert [text.get_text() for text in above.texts] == [data.PHONEMES[5], "SIL"]
    assert [text.get_text() for text in below.texts] == ([data.PHONEMES[k] for k in labels] if labels else [])
    wrong = [text.get_color() == evaluation.COLOURS["wrong"] for text in below.texts]
    assert wrong == ([False, True, False, True] if labels else [])
    title = "day/0001: probability of each phoneme (mean of 2 decoders)"
    assert figures[
        0
    ].get_suptitle() == title + "; of 4 phonemes 0 substituted, 2 left out, 0 inserted" * bool(labels)


@pytest.mark.parametrize(
    "log_probs",
    [posteriors([5]), np.full((3, 41), np.log(1 / 41)), posteriors([0] * 4), posteriors([5, 0] * 100)],
)
def test_odd_trials_are_drawn(log_probs, tmp_path, monkeypatch):
    figures = captured(monkeypatch)
    drawn = evaluation.explain(
        "decoder",
        tmp_path / "a.png",
        DECODER,
        {"name": "x", "log_probs": log_probs, "labels": [], "seconds per frame": 0.08},
    )
    assert drawn["ids"].tolist() == evaluation.ctc_greedy(log_probs[None], [len(log_probs)])[0]
    assert len(figures[0].axes[0].texts) == len(drawn["ids"])
    if len(drawn["ids"]):
        places = np.array([text.get_position()[0] for text in figures[0].axes[0].texts])
        low, high = figures[0].axes[0].get_xlim()
        assert low < places[0] <= places[-1] < high


@pytest.mark.parametrize(
    ("log_probs", "message"),
    [
        (np.zeros((0, 41)), "x: 0 frames, 0 values NaN"),
        (np.full((2, 41), np.nan), "x: 2 frames, 82 values NaN"),
    ],
)
def test_a_trial_without_numbers_is_refused(log_probs, message, tmp_path):
    with pytest.raises(DataError, match=message):
        evaluation.explain(
            "decoder",
            tmp_path / "a.png",
            DECODER,
            {"name": "x", "log_probs": log_probs, "labels": None, "seconds per frame": 0.08},
        )
    assert not list(tmp_path.iterdir())
