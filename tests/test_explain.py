"""eval.explain: attention weights against the modules' own output, tempo and dynamics, emissions."""

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

    def note(k: int, octave: int, duration: int, voice: int) -> str:
        pitch = f"<pitch><step>{'CDEFGAB'[k % 7]}</step><octave>{octave}</octave></pitch>"
        return (
            f"<note>{pitch}<duration>{duration}</duration><voice>{voice}</voice><staff>{voice}</staff></note>"
        )

    head = "<attributes><divisions>1</divisions><time><beats>4</beats><beat-type>4</beat-type></time>"
    bars = ""
    for m in range(measures):
        sign = "" if m else f"{head}<staves>2</staves></attributes>"
        melody = "".join(note(4 * m + k, 5, 1, 1) for k in range(4))
        bass = f"<backup><duration>4</duration></backup>{note(m, 3, 4, 2)}"
        bars += f'<measure number="{m + 1}">{sign}{melody}{bass}</measure>'
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
    onset, pedal = onset[order], np.zeros((0, 2))
    performance = Performance("take.mid", pitch[order], velocity[order], onset, onset + 0.4, pedal, pedal)
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


@pytest.fixture
def figures(monkeypatch) -> list:
    """Figures that would be written."""
    drawn = []
    monkeypatch.setattr(evaluation, "save_figure", lambda figure, out: drawn.append(figure))
    return drawn


# --- HAN: weights ---


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ({}, ["beat_attention", "measure_attention", "attention"]),
        ({"level": "measure"}, ["beat_attention", "measure_attention", "attention"]),
        ({"level": "beat"}, ["beat_attention", "attention"]),
        ({"level": "note"}, ["attention"]),
        ({"model": "bilstm"}, ["attention"]),
    ],
)
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
    stages, (last, _) = model.stages(batch), weights["attention"]
    by_hand = (stages["contracted"].view(len(last), 2, -1) * last.unsqueeze(2)).sum(0).flatten()
    assert torch.allclose(by_hand, stages["pooled"][0], atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


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


@pytest.mark.parametrize(
    ("args", "absent"),
    [
        ({"level": "measure"}, {"note", "beat"}),
        ({"level": "beat"}, {"note", "beat in measure"}),
        ({"model": "bilstm_sa"}, {"note in beat", "beat in measure"}),
    ],
)
def test_levels_that_a_network_lacks_are_absent(args, absent, work):
    levels = evaluation.han_attention([small_han(**args)], {"name": "take", **work["item"]})
    assert {"note", "note in beat", "beat", "beat in measure", "measure"} - levels.keys() == absent
    assert len(levels["measure"]) == 4


# --- HAN: tempo and dynamics ---


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


def test_over_a_beat_that_was_not_found_stands_the_mean_tempo(tmp_path):
    score = read_score(tmp_path / "a.musicxml")
    lost = np.flatnonzero(score.onset == 5)
    begin, qpm, smooth = curve(score, *played(score, score.onset, left_out=lost))
    assert begin.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert qpm == pytest.approx(np.full(14, 60))
    assert smooth == pytest.approx(np.full(14, 60))


def test_a_chord_counts_at_its_mean_and_seconds_go_on_beyond_the_ends(tmp_path):
    score = read_score(tmp_path / "a.musicxml", 2)
    seconds = score.onset + np.where(score.pitch < 60, 0.04, 0)
    lost = np.flatnonzero(score.onset > 5)
    quarter, second, beat = evaluation.time_map(score, *played(score, seconds, left_out=lost))
    assert (quarter.tolist(), beat.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    assert second == pytest.approx([0.02, 1, 2, 3, 4.02, 5])
    found = evaluation.seconds_at(quarter, second, np.array([-1, 0.5, 7]), 90)
    assert found == pytest.approx([0.02 - 0.996, 0.51, 5 + 2 * 0.996])
    found = evaluation.seconds_at(quarter[:1], second[:1], np.array([0, 3]), 90)
    assert found == pytest.approx([0.02, 2.02])
    assert [len(part) for part in evaluation.tempo_curve(quarter[:1], second[:1], beat[:1])] == [1, 0, 0]


def test_dynamics_by_hand():
    notes = np.array([[60, 40, 0, 1], [64, 60, 0, 1], [60, 90, 1, 2], [60, 0, 2, 3], [60, 70, 3, 4]], float)
    sounded = np.array([True, True, True, False, True])
    found = evaluation.beat_dynamics(notes, sounded, np.array([0, 0, 1, 2, 3]))
    assert found[[0, 1, 3]].tolist() == [[50, 10], [90, 0], [70, 0]]
    assert np.isnan(found[2]).all()


# --- HAN: picture ---


def test_a_performance_is_drawn(work, tmp_path):
    out = tmp_path / "new" / "a.png"
    drawn = evaluation.explain("han", out, [small_han()], work)
    assert out.read_bytes()[16:24] == (1600).to_bytes(4, "big") + (1200).to_bytes(4, "big")
    assert drawn["measures"] == pytest.approx([1, 3, 5, 7, 9])
    assert drawn["beats"] == pytest.approx(1 + 0.5 * np.arange(17))
    assert drawn["bars"].tolist() == [1, 2, 3, 4]
    lost = np.flatnonzero(~drawn["sounded"])
    assert drawn["notes"][lost] == pytest.approx(np.array([[work["score"].pitch[6], 0, 3, 5]]))
    onsets = np.sort(work["performance"].onset)
    assert drawn["notes"][drawn["sounded"], 2] == pytest.approx(onsets, abs=1e-6)


@pytest.mark.parametrize("args", [{"pooled": True}, {"model": "bilstm"}])
def test_the_picture_shows_those_numbers(args, work, tmp_path, figures):
    drawn = evaluation.explain("han", tmp_path / "a.png", [small_han(**args)] * 2, work)
    (figure,) = figures
    roll, weights, tempo, dynamics = figure.axes[:4]
    assert "2 checkpoints" in figure.get_suptitle()
    assert ("--pooled" in figure.get_supxlabel()) == ("pooled" in args)
    steps = {patch.get_label(): patch.get_data().values for patch in weights.patches}
    assert ("beats in their measure" in steps) == ("pooled" in args)
    assert steps["measures in the piece"] == pytest.approx(drawn["levels"]["measure"] - 1)
    assert steps["beats in the piece"] == pytest.approx(drawn["levels"]["beat"] - 1)
    key = "note in beat" if "pooled" in args else "note"
    expected = drawn["levels"][key][drawn["sounded"]] - 1
    assert np.asarray(roll.collections[0].get_array()) == pytest.approx(expected)
    assert len(roll.collections[1].get_paths()) == 1
    assert tempo.lines[0].get_ydata() == pytest.approx(np.full(15, 120), abs=1e-6)
    assert tempo.get_ylim()[1] - tempo.get_ylim()[0] > 10
    numbers = roll.child_axes[0]
    assert [label.get_text() for label in numbers.get_xticklabels()] == ["1", "2", "3", "4"]
    assert dynamics.get_xlabel() == "time in the performance (s)"


def test_a_piece_of_one_beat_is_drawn_without_tempo(tmp_path, figures):
    score = read_score(tmp_path / "a.musicxml", 1)
    performance, match = played(score, score.onset, left_out=np.flatnonzero(score.onset > 0))
    work = work_of(score, performance, match)
    drawn = evaluation.explain("han", tmp_path / "a.png", [small_han()], work)
    assert (len(drawn["qpm"]), drawn["levels"]["measure"].tolist()) == (0, pytest.approx([1]))
    assert figures[0].axes[1].get_ylim()[1] >= 0.005
    assert np.isnan(drawn["dynamics"][1:]).all()


def test_what_cannot_be_explained_is_refused(work, tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name in ("a.txt", "a.musicxml/a.png", "folder.png"):
        for kind in ("han", "ast", "decoder"):
            with pytest.raises(DataError, match=name):
                evaluation.explain(kind, tmp_path / name, [], {})
    nothing = work | {"match": np.full_like(work["match"], -1)}
    with pytest.raises(DataError, match=r"take.mid: .*a.musicxml"):
        evaluation.explain("han", tmp_path / "a.png", [small_han()], nothing)
    work["item"]["x"][3, :] = np.nan
    with pytest.raises(DataError, match="take: "):
        evaluation.explain("han", tmp_path / "a.png", [small_han()], work)
    mlp = PooledMLP(), {"path": "runs/m/best.pt", "task": "mlp", "data": {}}
    silent = {"name": "take", "energies": np.full((150, 128), np.nan, np.float32)}
    for members, name in (
        ([mlp], "runs/m/best.pt"),
        ([small_ast(), small_ast(stride=10)], "runs/a/best.pt"),
        ([small_ast()], "take: "),
    ):
        with pytest.raises(DataError, match=name):
            evaluation.explain("ast", tmp_path / "a.png", members, silent)
    for log_probs in (np.zeros((0, 41)), np.full((2, 41), np.nan)):
        with pytest.raises(DataError, match="trial"):
            evaluation.explain("decoder", tmp_path / "a.png", DECODER, trial(log_probs, None))
    assert not (tmp_path / "a.png").exists()


# --- AST ---


def small_ast(**args) -> tuple:
    model = uneven(AST(**{"frames": 96, "width": 16, "depth": 1, "heads": 2, "num_outputs": 19, **args}))
    about = {"mean": data.FBANK_MEAN, "std": data.FBANK_STD, "synthetic": True}
    return model, {"path": "runs/a/best.pt", "task": "ast", "data": about}


def test_asts_are_averaged_and_drawn(tmp_path, figures):
    members = [small_ast(), small_ast(frames=64)]
    energies = np.random.default_rng(0).normal(-4, 4, (150, 128)).astype(np.float32)
    drawn = evaluation.explain("ast", tmp_path / "a.png", members, {"name": "take", "energies": energies})
    x = torch.from_numpy(data.normalise_fbank(energies, data.FBANK_MEAN, data.FBANK_STD)).float()
    each = [evaluation.roll_out_file(model, x, torch.device("cpu"))[0] for model, _ in members]
    assert drawn["share"] == pytest.approx((each[0] + each[1]) / 2)
    assert drawn["share"].shape == (8, 9)
    assert drawn["starts"] == [0, 2, 5]
    for word in ("take", "2 checkpoints", "SYNTHETIC"):
        assert word in figures[0].axes[0].get_title(loc="left")


# --- decoder ---

DECODER = [(GRUDecoder(channels=2, days=1, hidden=4, layers=1, kernel=32, stride=4), {})]


def posteriors(path: list[int], sure=None) -> np.ndarray:
    """(F, 41) log-probabilities whose best class follows the path, with the given probability."""
    sure = np.full(len(path), 0.9) if sure is None else np.array(sure)
    probs = np.repeat((1 - sure)[:, None] / 40, 41, 1)
    probs[np.arange(len(path)), path] = sure
    return np.log(probs).astype(np.float32)


def trial(log_probs: np.ndarray, labels: list | None) -> dict:
    return {"name": "trial/0001", "log_probs": log_probs, "labels": labels, "seconds per frame": 0.08}


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
    at, right, found = evaluation.place_labels([5, 9, 8, 3, 4], [5, 6, 9, 4], times, 0, 10)
    assert at == pytest.approx([1, 3, 4, 5, 6])  # 6 inserted; 8 and 3 left out
    assert (right.tolist(), found.tolist()) == ([True, True, False, False, True], [True, False, True, True])
    at, right, found = evaluation.place_labels([1, 2], [3, 2], times[:2], 0, 10)
    assert (at.tolist(), right.tolist(), found.tolist()) == ([1, 2], [False, True], [False, True])
    assert evaluation.place_labels([1, 2, 3], [], times[:0], 0, 4)[0] == pytest.approx([1, 2, 3])
    assert [len(part) for part in evaluation.place_labels([], [3], times[:1], 0, 4)] == [0, 0, 1]


@pytest.mark.parametrize("labels", [[5, 6, 40, 12], None])
def test_the_picture_shows_classes_strings_and_errors(labels, tmp_path, figures):
    log_probs = posteriors([0, 5, 5, 0, 40])
    drawn = evaluation.explain("decoder", tmp_path / "a.png", DECODER * 2, trial(log_probs, labels))
    # Frame 0 is bins 0..31 of 20 ms: its middle is at 0.32 s.
    assert drawn["times"] == pytest.approx([0.32 + 0.08, 0.32 + 4 * 0.08])
    heat = figures[0].axes[0]
    assert [label.get_text() for label in heat.get_yticklabels()] == [data.PHONEMES[5], "SIL", "blank"]
    assert np.asarray(heat.images[0].get_array()) == pytest.approx(np.exp(log_probs)[:, [5, 40, 0]].T)
    assert heat.images[0].get_extent()[:2] == pytest.approx([0.28, 0.28 + 5 * 0.08])
    names = [text.get_text() for text in heat.texts]
    assert names == [data.PHONEMES[k] for k in [5, 40, *(labels or [])]]
    wrong = [text.get_color() == evaluation.ORANGE for text in heat.texts]
    assert wrong == [False, False, *([False, True, False, True] if labels else [])]


@pytest.mark.parametrize("path", [[5], [0] * 4, [5, 0] * 100])
def test_odd_trials_are_drawn(path, tmp_path):
    drawn = evaluation.explain("decoder", tmp_path / "a.png", DECODER, trial(posteriors(path), []))
    assert drawn["ids"].tolist() == [k for k in path if k]
    assert not drawn["found"].any()
    assert (tmp_path / "a.png").read_bytes()[16:24] == (1600).to_bytes(4, "big") + (900).to_bytes(4, "big")
