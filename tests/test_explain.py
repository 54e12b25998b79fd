"""eval.explain: attention weights against the modules' own output, tempo and dynamics, emissions."""

import numpy as np
import pytest
import torch
from conftest import performance, refused
from test_score import back, document, note, quarters

import data
import eval as evaluation
from data import Performance
from models import HAN, ContextAttention, GRUDecoder, PooledMLP

COLUMNS = {features: data.column_names(data.FEATURE_SETS[features]) for features in ("full", "score")}
STATS = 158
STAT_NAMES = [str(k) for k in range(STATS)]


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
        "statistics": STAT_NAMES,
        "quantiles": None,
    }
    if pooled:
        stats = STATS + 5 * len(columns)
        info["quantiles"] = torch.linspace(0, 1, 101).unsqueeze(1).expand(101, stats)
    args = {"size": 4, "heads": 2, "layers": (1, 1, 1, 1), "stats_size": stats, **args}
    return uneven(HAN(len(columns), **args)), {"path": "runs/a/best.pt", "task": "han", "data": info}


def read_score(path) -> data.Score:
    """Four bars of 4/4: a melody of quarters over whole notes."""
    scale, bars = [0, 2, 4, 5, 7, 9, 11], []
    for m in range(4):
        melody = quarters(*(72 + scale[(4 * m + k) % 7] for k in range(4)))
        bars.append(melody + back(16) + note(48 + scale[m], 16, 2, 2))
    path.write_text(document(bars))
    return data.read_musicxml(path)


def played(score, seconds, extra=(), left_out=()) -> tuple[Performance, np.ndarray]:
    """The score's notes at `seconds` (of each), some left out, and extra (pitch, second); and the match."""
    kept = np.setdiff1d(np.arange(len(score.pitch)), left_out)
    onset = np.concatenate([np.asarray(seconds, float)[kept], [second for _, second in extra]])
    pitch = np.concatenate([score.pitch[kept], [p for p, _ in extra]]).astype(np.int64)
    order = np.argsort(onset, kind="stable")
    velocity = (40 + np.arange(len(onset)) % 30).astype(np.int64)
    match = np.full(len(score.pitch), -1)
    match[kept] = np.argsort(order)[: len(kept)]
    return performance(pitch[order], velocity[order], onset[order], onset[order] + 0.4), match


def work_of(score, played, match) -> dict:
    stats = data.performance_statistics(played)
    item = data.note_table(score, played, match) | {
        "stats": np.array([*stats.values()], np.float32),
        "stat_names": STAT_NAMES,
        "match_rate": float((match >= 0).mean()),
    }
    return {"name": "take", "score": score, "performance": played, "match": match, "item": item}


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


@pytest.mark.parametrize("level", ["total_note_cat", "measure", "beat", "note"])
@torch.no_grad()
def test_weights_of_all_levels_give_the_networks_own_stages(level, work):
    """The attention modules' output, from their weights by hand."""
    model, kept = small_han(level=level)
    item = {"name": "take", **work["item"]}
    corpus = data.Corpus("", False, {"take": item}, ["take"], COLUMNS["full"], [], {})
    batch = data.collate_han(data.prepare_han(corpus, ["take"], kept["data"]))
    found = evaluation.module_inputs(model, ContextAttention, batch)
    assert len(found) == {"note": 1, "beat": 2}.get(level, 3)
    for module, (x, group, groups) in found.items():
        heads = len(module.context_vector)
        module.context_vector[1:] = module.context_vector[0]
        module.linear.weight.copy_(module.linear.weight[: len(x[0]) // heads].repeat(heads, 1))
        module.linear.bias.copy_(module.linear.bias[: len(x[0]) // heads].repeat(heads))
        shares = torch.from_numpy(evaluation.even_shares(module, x, group, groups)).float()
        by_hand = torch.zeros(groups, x.shape[1]).index_add(0, group, x * shares[:, None])
        by_hand = by_hand / torch.bincount(group)[:, None]
        assert torch.allclose(by_hand, module(x, group, groups), atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_shares_are_even_on_average_and_count_members_alike(work):
    item, members = {"name": "take", **work["item"]}, [small_han(), small_han()]
    levels = evaluation.han_attention(members, item)
    sizes = {"note in beat": 21, "note": 21, "beat in measure": 16, "beat": 16, "measure": 4}
    assert {level: len(values) for level, values in levels.items()} == sizes
    beat, measure = (np.unique(item[key], return_inverse=True)[1] for key in ("beat", "measure"))
    within = np.bincount(beat, levels["note in beat"]) / np.bincount(beat)
    assert within == pytest.approx(np.ones(16), abs=1e-6)
    assert levels["beat in measure"].reshape(4, 4).mean(1) == pytest.approx(np.ones(4), abs=1e-6)
    assert levels["note"].mean() == pytest.approx(1, abs=1e-6)
    assert levels["beat"] == pytest.approx(np.bincount(beat, levels["note"]) / np.bincount(beat))
    assert levels["measure"] == pytest.approx(np.bincount(measure, levels["note"]) / np.bincount(measure))
    assert levels["measure"].std() > 1e-3
    alone = [evaluation.han_attention([member], item) for member in members]
    for level in levels:
        assert levels[level] == pytest.approx((alone[0][level] + alone[1][level]) / 2)


FORMS = {"han": {"pooled": True}, "measure": {"level": "measure"}, "score": {"features": "score"}}


@pytest.mark.parametrize("form", FORMS)
def test_a_performance_is_drawn_with_its_numbers(form, work, tmp_path, figures):
    drawn = evaluation.explain("han", tmp_path / "a.png", [small_han(**FORMS[form])] * 2, work)
    (figure,) = figures
    roll, weights, tempo, dynamics = figure.axes[:4]
    assert "2 checkpoints" in figure.get_suptitle()
    assert ("--pooled" in figure.get_suptitle()) == (form == "han")
    assert "one for all ratings" in figure.get_suptitle()
    (found,) = roll.collections
    assert found.get_clim() == (-0.25, 0.25)  # whatever the weights
    assert drawn["measures"] == pytest.approx([1, 3, 5, 7, 8.9])
    assert drawn["beats"] == pytest.approx([*(1 + 0.5 * np.arange(16)), 8.9])
    steps = {patch.get_label(): patch.get_data().values for patch in weights.patches}
    assert steps["measure in the piece"] == pytest.approx(drawn["levels"]["measure"] - 1)
    assert steps["beat in the piece"] == pytest.approx(drawn["levels"]["beat"] - 1)
    assert ("beat in its measure" in steps) == (form in ("han", "measure", "score"))
    onsets = np.sort(work["performance"].onset)
    if form == "score":  # which does not read the note beside the score
        onsets = onsets[onsets != 3.1]
    assert [line[0][0] for line in found.get_segments()] == pytest.approx(onsets)
    assert len(found.get_array()) == len(onsets)
    assert tempo.patches[0].get_data().values == pytest.approx(np.full(16, 120))
    assert [label.get_text() for label in roll.child_axes[0].get_xticklabels()] == ["1", "2", "3", "4"]
    assert dynamics.lines[0].get_ydata() == pytest.approx(
        work["performance"].velocity[np.isin(work["performance"].onset, onsets)]
    )


def test_a_ritardando_and_a_beat_that_was_not_found(tmp_path, figures):
    score = read_score(tmp_path / "a.musicxml")
    qpm = np.linspace(120, 60, 16)
    second = np.append(0, np.cumsum(60 / qpm))[score.onset.astype(int)]
    lost = np.flatnonzero(score.onset == 5)
    evaluation.explain(
        "han", tmp_path / "a.png", [small_han()], work_of(score, *played(score, second, left_out=lost))
    )
    tempo = figures[0].axes[2].patches[0].get_data().values
    over = 2 / (1 / qpm[4] + 1 / qpm[5])
    assert tempo[:15] == pytest.approx([*qpm[:4], over, over, *qpm[6:15]], rel=1e-4)


def test_what_cannot_be_explained_is_refused(work, tmp_path, capsys):
    mlp = PooledMLP(), {"path": "runs/m/best.pt", "task": "mlp", "data": {}}
    item = work["item"] | {"matched": np.zeros_like(work["item"]["matched"])}
    for kind, members, what, name in (
        ("han", [small_han()], work | {"item": item}, "take: "),
        ("han", [mlp], work, "take: "),
        ("han", [small_han(), small_han("score")], work, "take: "),
        ("ast", [mlp], {"name": "take", "energies": np.zeros((150, 128), np.float32)}, "runs/m/best.pt"),
        ("decoder", DECODER, trial(np.zeros((0, 41)), None), "trial"),
    ):
        asked = kind, tmp_path / "a.png", members, what
        refused(lambda asked=asked: evaluation.explain(*asked), capsys, name)
    assert not (tmp_path / "a.png").exists()


DECODER = [(GRUDecoder(channels=2, days=1, hidden=4, layers=1, kernel=32, stride=4), {"data": {}})]


def posteriors(path: list[int]) -> np.ndarray:
    """(F, 41) log-probabilities whose best class follows the path."""
    probs = np.full((len(path), 41), 0.1 / 40)
    probs[np.arange(len(path)), path] = 0.9
    return np.log(probs).astype(np.float32)


def trial(log_probs: np.ndarray, labels: list | None) -> dict:
    return {"name": "trial/0001", "log_probs": log_probs, "labels": labels, "seconds per frame": 0.08}


@pytest.mark.parametrize("labels", [[5, 6, 40, 12], None])
def test_the_picture_shows_probabilities_what_is_decoded_and_errors(labels, tmp_path, figures):
    log_probs = posteriors([0, 5, 5, 0, 7, 40])
    drawn = evaluation.explain("decoder", tmp_path / "a.png", DECODER * 2, trial(log_probs, labels))
    # Frame 0 is bins 0..31 of 20 ms: its middle is at 0.32 s.
    assert drawn["times"] == pytest.approx([0.32 + 0.08, 0.32 + 4 * 0.08, 0.32 + 5 * 0.08])
    heat = figures[0].axes[0]
    assert np.asarray(heat.images[0].get_array()) == pytest.approx(np.exp(log_probs).T)
    assert heat.images[0].get_extent()[:2] == pytest.approx([0.28, 0.28 + 6 * 0.08])
    assert [text.get_text() for text in heat.texts] == [data.PHONEMES[k] for k in (5, 7, 40)]
    wrong = [text.get_color() == evaluation.ORANGE for text in heat.texts]
    assert wrong == [False, labels is not None, False]
    assert (evaluation.spell([5, 6, 40, 12]) in heat.get_xlabel()) == (labels is not None)
