"""models.HAN against the original and per-note loops, its batches, the plain networks, checkpoints, runs."""

import argparse
import json
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import plain_networks
import pytest
import torch
from torch import Tensor, nn

import eval as evaluation
import models
from data import DataError, _sequence_grid, collate_han
from models import HAN, BiLSTM, han_from_percepiano, load_checkpoint, save_checkpoint

SHARED = Path(os.environ.get("SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
ORACLE = SHARED / "reference" / "percepiano_han.npz"
VARIANTS = {"total_note_cat": "", "measure": "measure/", "note": "note/", "bilstm": "bilstm/"}
DEAD_ENCODER = ["performance_encoder.lstm.bias_ih_l0", "performance_encoder.beat_rnn.weight_hh_l0_reverse"]
DEAD_IN_NOTE = ["voice_net.weight_ih_l0", "beat_attention.context_vector", "beat_rnn.bias_hh_l1"]
DEAD_IN_NOTE += ["measure_attention.attention_net.bias", "measure_rnn.weight_ih_l0"]
INPUT, SIZE = 7, 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_item(notes: int, seed: int = 0, **fixed) -> dict:
    """A piece with gaps in voice, beat and measure numbers, beats of one note and notes without a voice."""
    rng = np.random.default_rng([seed, notes])
    beat = 4 + np.cumsum(rng.random(notes) < 0.4) * 2
    item = {"x": rng.normal(size=(notes, INPUT)).astype(np.float32), "voice": rng.choice([0, 1, 2, 5], notes)}
    return item | {"beat": beat, "measure": 1 + beat // 6, "name": f"piece {notes}"} | fixed


def make_items(*lengths: int) -> list[dict]:
    return [make_item(notes, seed) for seed, notes in enumerate(lengths)]


def small_han(**args) -> HAN:
    return HAN(**({"input_size": INPUT, "size": SIZE, "heads": 2} | args)).eval()


def largest(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    """Largest difference of two arrays of the same shape."""
    a, b = (torch.as_tensor(v).detach().double() for v in (a, b))
    assert a.shape == b.shape
    return float((a - b).abs().max())


# ------------------------------------------------------------------------------------------------------------
# Numbers of the original
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def oracle() -> dict[str, np.ndarray]:
    if not ORACLE.is_file():
        pytest.skip(f"{ORACLE.name} is not here")
    with np.load(ORACLE, allow_pickle=False) as file:
        return dict(file)


def original_weights(oracle: dict, variant: str) -> dict[str, np.ndarray]:
    prefix = f"{VARIANTS[variant]}w/"
    return {key.removeprefix(prefix): value for key, value in oracle.items() if key.startswith(prefix)}


def original_item(oracle: dict, name: str) -> dict:
    return {key: oracle[f"{name}/{key}"] for key in ("x", "voice", "beat", "measure")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_originals_alone_and_in_a_batch(oracle, variant):
    model = han_from_percepiano(original_weights(oracle, variant)).eval()
    assert model.model_args["model"] == ("bilstm" if variant == "bilstm" else "han")
    assert model.level == ("note" if variant == "bilstm" else variant)
    assert model.model_args["layers"] == {"bilstm": [7, 0, 0, 0], "note": [2, 0, 0, 0]}.get(
        variant, [2, 2, 2, 1]
    )
    items = [original_item(oracle, f"seq{i}") for i in range(3)]
    alone = torch.cat([model(collate_han([item])) for item in items])
    expected = np.stack([oracle[f"{VARIANTS[variant]}seq{i}/logits"] for i in range(3)])
    assert largest(alone, expected) < 2e-5
    assert largest(model(collate_han(items)), alone) < 1e-5


@pytest.mark.parametrize("sequence", ["seq0", "seq1", "seq2"])
def test_every_stage_equals_the_originals(oracle, sequence):
    batch = collate_han([original_item(oracle, sequence)])
    stages = han_from_percepiano(original_weights(oracle, "total_note_cat")).eval().stages(batch)
    found = {
        "out_note": stages["note"],
        "out_voice": torch.cat([stages["note"], stages["voice"]], dim=1),
        "out_beat": stages["beat"],
        "out_measure": stages["measure"],
        "out_beat_spanned": stages["total_note_cat"][:, 64:96],
        "out_measure_spanned": stages["total_note_cat"][:, 96:],
        "total_note_cat": stages["total_note_cat"],
        "contracted": stages["contracted"],
        "pooled": stages["pooled"][0],
    }
    assert max(largest(value, oracle[f"{sequence}/{name}"]) for name, value in found.items()) < 2e-5


def test_first_beat_of_one_note_is_spanned_in_full(oracle):
    model = han_from_percepiano(original_weights(oracle, "total_note_cat")).eval()
    logits = model(collate_han([original_item(oracle, "quirk")]))[0]
    assert largest(logits, oracle["quirk/logits_full_span"]) < 2e-5
    assert largest(logits, oracle["quirk/logits"]) > 0.05


def test_original_weights_as_tensors_or_with_module_prefix(oracle):
    arrays = original_weights(oracle, "total_note_cat")
    tensors = {f"module.{name}": torch.from_numpy(value) for name, value in arrays.items()}
    expected = han_from_percepiano(arrays).state_dict()
    found = han_from_percepiano(tensors, dropout=0.5)
    assert found.model_args["dropout"] == 0.5
    assert {value.dtype for value in expected.values()} == {torch.float32}
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


DEAD = {"total_note_cat": DEAD_ENCODER, "measure": DEAD_ENCODER, "bilstm": []}
DEAD["note"] = DEAD_ENCODER + [f"score_encoder.{name}" for name in DEAD_IN_NOTE]


@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_the_dead_parameters_are_ignored(oracle, variant):
    weights = original_weights(oracle, variant)
    expected = han_from_percepiano(weights).state_dict()
    dead = {name: np.zeros(3, np.float16) for name in DEAD[variant]}
    assert all(
        torch.equal(v, expected[k]) for k, v in han_from_percepiano(weights | dead).state_dict().items()
    )
    for name in {*DEAD["note"]} - dead.keys() - weights.keys() | {
        "performance_encoders.bias",
        "note_embedder.bias",
    }:
        with pytest.raises(DataError, match=re.escape(name)):
            han_from_percepiano(weights | {name: np.zeros(3, np.float16)})


@pytest.mark.parametrize("variant", VARIANTS)
def test_missing_or_misshapen_original_weights_are_named(oracle, variant):
    weights = original_weights(oracle, variant)
    last_layer = max(name for name in weights if "lstm.weight_ih" in name and "reverse" not in name)
    for name in ("note_embedder.fc.weight", "out_fc.4.weight", "out_fc.4.bias", last_layer):
        named = "out_fc" if name == "out_fc.4.weight" else name.removesuffix(".weight")
        with pytest.raises(DataError, match=re.escape(named)) as caught:
            han_from_percepiano({key: value for key, value in weights.items() if key != name})
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="out_fc"):
        han_from_percepiano({})
    for more in ({last_layer: weights[last_layer].T[:3]}, {}):
        with pytest.raises(DataError, match="size mismatch"):
            han_from_percepiano(weights | more, **({} if more else {"input_size": 21}))


# ------------------------------------------------------------------------------------------------------------
# The same network as loops over single notes
# ------------------------------------------------------------------------------------------------------------
def joined(part: BiLSTM) -> nn.LSTM:
    """torch's own bidirectional LSTM with the weights of a BiLSTM."""
    first = part.forward_lstm[0]
    lstm = nn.LSTM(first.input_size, first.hidden_size, len(part.forward_lstm), bidirectional=True)
    for i, pair in enumerate(zip(part.forward_lstm, part.backward_lstm, strict=True)):
        for suffix, direction in zip(("", "_reverse"), pair, strict=True):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(lstm, f"{name}_l{i}{suffix}").data = getattr(direction, f"{name}_l0").data
    return lstm


def pooled_by_loop(attention: models.ContextAttention, members: list[Tensor]) -> Tensor:
    """One group's attention-weighted sum, head by head, member by member."""
    heads, width = attention.context_vector.shape
    out = torch.zeros(heads * width)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        score = [
            float(torch.tanh(attention.linear(v))[part] @ attention.context_vector[head]) for v in members
        ]
        weight = np.exp(score) / np.sum(np.exp(score))
        for value, share in zip(members, weight, strict=True):
            out[part] += float(share) * value[part]
    return out


def stages_by_loop(model: HAN, item: dict) -> dict[str, Tensor]:
    """The stages of models.HAN for one piece, one note, voice, beat and measure at a time."""
    notes = range(len(item["x"]))
    embedded = [model.embedding(torch.from_numpy(row)) for row in item["x"]]
    out = {"embedding": torch.stack(embedded)}
    out["note"] = joined(model.note)(out["embedding"])[0]
    out["voice"] = torch.zeros_like(out["note"])
    for voice in {*item["voice"].tolist()} - {0}:
        members = [n for n in notes if item["voice"][n] == voice]
        result = joined(model.voice)(torch.stack([embedded[n] for n in members]))[0]
        for n, row in zip(members, result, strict=True):
            out["voice"][n] = row
    hidden = [torch.cat([out["note"][n], out["voice"][n]]) for n in notes]

    beats, measures = sorted({*item["beat"].tolist()}), sorted({*item["measure"].tolist()})
    rows = [
        pooled_by_loop(model.beat_attention, [hidden[n] for n in notes if item["beat"][n] == b])
        for b in beats
    ]
    out["beat"] = joined(model.beat)(torch.stack(rows))[0]
    rows = []
    for measure in measures:
        inside = {item["beat"][n] for n in notes if item["measure"][n] == measure}
        rows.append(
            pooled_by_loop(model.measure_attention, [out["beat"][beats.index(b)] for b in sorted(inside)])
        )
    out["measure"] = joined(model.measure)(torch.stack(rows))[0]

    spanned = []
    for n in notes:
        beat, measure = beats.index(item["beat"][n]), measures.index(item["measure"][n])
        spanned.append(torch.cat([hidden[n], out["beat"][beat], out["measure"][measure]]))
    out["total_note_cat"] = torch.stack(spanned)
    out["contracted"] = model.contractor(out["total_note_cat"])
    out["pooled"] = pooled_by_loop(model.attention, [*out["contracted"]]).unsqueeze(0)
    out["logits"] = model.head(out["pooled"])
    return out


@torch.no_grad()
def test_every_stage_equals_plain_loops_over_notes():
    model, items = small_han(), make_items(23, 1, 60, 17)
    expected = [stages_by_loop(model, item) for item in items]
    found = model.stages(collate_han(items))
    for name in expected[0]:
        assert largest(found[name], torch.cat([stages[name] for stages in expected])) < 1e-6, name
    silent = torch.from_numpy(np.concatenate([item["voice"] for item in items]) == 0)
    assert silent.any()
    assert torch.equal(found["voice"][silent], torch.zeros(int(silent.sum()), 2 * SIZE))


@torch.no_grad()
def test_attention_pooling_equals_loop_for_large_scores_and_empty_groups():
    attention = models.ContextAttention(12, 3)
    attention.context_vector *= 100
    x, group = torch.randn(9, 12), torch.tensor([0, 2, 2, 5, 0, 2, 5, 5, 3])
    found = attention(x, group, 7)
    for g in range(7):
        members = [*x[group == g]]
        assert largest(found[g], pooled_by_loop(attention, members) if members else torch.zeros(12)) < 1e-6


@torch.no_grad()
def test_bilstm_equals_torch_on_each_sequence():
    lengths = [1, 70, 2, 33, 13, 13, 90]
    part = BiLSTM(5, 6, 3, dropout=0.0)
    key = np.random.default_rng(0).permutation(np.repeat(np.arange(len(lengths)), lengths))
    x = torch.randn(len(key), 5)
    batch = {name: torch.from_numpy(array) for name, array in _sequence_grid(key, "note").items()}
    found = part(x, batch, "note")
    for sequence in range(len(lengths)):
        assert largest(found[key == sequence], joined(part)(x[key == sequence])[0]) < 1e-6


@torch.no_grad()
def test_dropout_acts_between_lstm_layers_only():
    x, key = torch.randn(6, 5), np.zeros(6, np.int64)
    batch = {name: torch.from_numpy(array) for name, array in _sequence_grid(key, "note").items()}
    one, two = BiLSTM(5, 4, 1, dropout=1.0), BiLSTM(5, 4, 2, dropout=1.0)
    assert largest(one(x, batch, "note"), joined(one)(x)[0]) < 1e-6
    silenced = two(x, batch, "note")
    assert torch.equal(silenced, two(-x, batch, "note"))
    assert largest(silenced, two.eval()(x, batch, "note")) > 1e-3


# ------------------------------------------------------------------------------------------------------------
# Shapes, independence, gradients, switches
# ------------------------------------------------------------------------------------------------------------
STAGES = {"note": ["embedding", "note"]}
STAGES["beat"] = [*STAGES["note"], "voice", "beat"]
STAGES["measure"] = [*STAGES["beat"], "measure"]
STAGES["total_note_cat"] = [*STAGES["measure"], "total_note_cat"]


@pytest.mark.parametrize("level", STAGES)
@pytest.mark.parametrize("form", ["han", "bilstm", "bilstm_sa"])
def test_shapes(form, level):
    batch = collate_han(make_items(11, 30, 1))
    stages = small_han(model=form, level=level, num_label=4).stages(batch)
    assert stages["logits"].shape == (3, 4)
    assert stages["pooled"].shape == (3, 2 * SIZE)
    level = level if form == "han" else "note"
    rows = {"beat": len(batch["beat_piece"]), "measure": len(batch["measure_piece"])}.get(level, 42)
    assert stages["contracted"].shape == (rows, 2 * SIZE)
    assert stages["level"].shape == (rows, (8 if level == "total_note_cat" else 2) * SIZE)
    assert [*stages] == [*STAGES[level], "level", "contracted", "pooled", "logits"]


@pytest.mark.parametrize("args", [{"level": "bar"}, {"model": "gru"}, {"size": 9}])
def test_bad_arguments_are_refused(args):
    with pytest.raises(ValueError, match=str([*args.values()][0])):
        small_han(**args)


def test_parameter_count_and_arguments():
    assert sum(p.numel() for p in HAN(input_size=101).parameters()) == 13_963_283
    assert HAN(input_size=101, layers=(1, 1, 1, 1)).model_args == {
        "input_size": 101, "size": 256, "heads": 8, "layers": [1, 1, 1, 1], "num_label": 19, "dropout": 0.2,
        "level": "total_note_cat", "model": "han", "head_size": None, "stats_size": 0,
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("args", [{}, {"level": "beat"}, {"level": "measure"}, {"model": "bilstm"}])
def test_logits_do_not_depend_on_padding_batch_mates_or_order(args):
    model, items = small_han(**args), make_items(9, 75, 1, 40, 9)
    alone = torch.cat([model(collate_han([item])) for item in items])
    batch = collate_han(items)
    together = model(batch)
    assert largest(together, alone) < 1e-5
    order = [3, 0, 4, 2, 1]
    assert largest(model(collate_han([items[i] for i in order])), alone[order]) < 1e-5
    wider = torch.full((5, 90, INPUT), torch.nan)
    wider[:, :75][batch["mask"]] = batch["x"][batch["mask"]]
    assert torch.equal(model(batch | {"x": wider}), together)


@torch.no_grad()
def test_piece_without_voices_and_piece_of_one_note():
    model = small_han()
    silent, single = make_item(20, voice=np.zeros(20, np.int64)), make_item(1, voice=np.array([3]))
    together = model(collate_han([silent, make_item(50), single]))
    for row, item in zip(together[[0, 2]], (silent, single), strict=True):
        assert largest(row, stages_by_loop(model, item)["logits"][0]) < 1e-5
        assert largest(row, model(collate_han([item]))[0]) < 1e-5


FULL = [{"level": level} for level in STAGES] + [
    {"model": "bilstm"},
    {"stats_size": 3, "head_size": 5},
]


@pytest.mark.parametrize("args", FULL)
def test_every_parameter_receives_a_gradient(args):
    model = small_han(**args).train()
    items = [item | {"stats": np.arange(3.0) - 1} for item in make_items(12, 31)]
    model(collate_han(items)).square().sum().backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


SMALL = {
    "han": {"size": 8, "heads": 2, "dropout": 0.0},
    "decoder": {"channels": 6, "days": 3, "hidden": 8, "layers": 2, "kernel": 8, "dropout": 0.0},
    "ast": {"width": 16, "depth": 2, "heads": 2, "frames": 96, "dropout": 0.0},
}
REFUSED = {
    "han": ({"stats_size": 2}, {"level": "beat"}),
    "decoder": ({"bidirectional": 1}, {"layer_norm": 1}, {"smooth_width": 0}),
}
REFUSED["ast"] = ({"visible_only": 1}, {"ssast_compat": 1}, {"num_outputs": 2})


@pytest.mark.parametrize("task", SMALL)
def test_equals_the_plain_network(task):
    """Output and gradients of all three networks against those of the public code's manner."""
    model, inputs, loss = evaluation.BENCHES[task][0](SMALL[task], 3, torch.device("cpu"))
    plain = plain_networks.PLAIN[task](model)
    assert plain_networks.largest_difference(model, plain, inputs) < 1e-5
    losses = [loss(network(*inputs)) for network in (model, plain)]
    sum(losses).backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    slow = {name.removeprefix("network."): p.grad for name, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        name = re.sub(r"forward_lstm\.(\d)\.(\w+)_l0", r"\2_l\1", name)
        name = re.sub(r"backward_lstm\.(\d)\.(\w+)_l0", r"\2_l\1_reverse", name)
        assert torch.allclose(parameter.grad, slow.pop(name), rtol=1e-3, atol=1e-5), name
    assert slow == {}
    for sizes in REFUSED[task]:
        with pytest.raises(ValueError, match="plain"):
            plain_networks.PLAIN[task](
                evaluation.BENCHES[task][0](SMALL[task] | sizes, 1, torch.device("cpu"))[0]
            )


@pytest.mark.parametrize("task", SMALL)
def test_bench_times_a_step(task, monkeypatch, capsys):
    make, batch = evaluation.BENCHES[task]
    small = (lambda sizes, *args: make(SMALL[task] | sizes, *args), batch)
    monkeypatch.setitem(evaluation.BENCHES, task, small)
    argv = f"bench --task {task} --batch 2 --steps 1 --device cpu --amp bf16".split()
    result = evaluation.main(argv)
    assert result["items_per_second"] == pytest.approx(2 / result["seconds"])
    said = capsys.readouterr().out
    assert f"{1000 * result['seconds']:.1f} ms/step" in said
    assert "bf16" in said


def test_plain_masks_hold_as_many_patches_as_asked():
    mask = plain_networks.plain_mask(20, 8, 64, 400, random.Random(0))
    assert mask.shape == (20, 400)
    assert all(len(set(ids)) == 400 and 0 <= min(ids) and max(ids) < 512 for ids in mask.tolist())


def test_head_size():
    assert [small_han(head_size=size).head[1].out_features for size in (None, 5)] == [2 * SIZE, 5]


@torch.no_grad()
def test_stats_reach_the_head_of_their_own_piece():
    model, items = small_han(stats_size=2), make_items(10, 20)
    zero, one = ([item | {"stats": [0.0, value]} for item in items] for value in (0.0, 1.0))
    logits = [model(collate_han(chosen)) for chosen in (zero, [zero[0], one[1]])]
    assert model.head[1].in_features == 2 * SIZE + 2
    assert largest(logits[0][0], logits[1][0]) < 1e-6
    pooled = model.stages(collate_han(one))["pooled"]
    by_hand = model.head(torch.cat([pooled, torch.tensor([[0.0, 1.0]] * 2)], dim=1))
    assert largest(logits[1][1], by_hand[1]) < 1e-6
    assert largest(logits[0][1], by_hand[1]) > 1e-3


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_autocast_on_cpu_stays_near_float32(dtype, close):
    model, batch = small_han(), collate_han(make_items(25, 60, 8))
    expected = model(batch)
    with torch.autocast("cpu", dtype):
        found = model(batch)
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype == dtype
    assert 0 < largest(found, expected) < close
    found.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_host_synchronisation_on_cuda(dtype):
    batch = {
        k: v.cuda() if isinstance(v, Tensor) else v for k, v in collate_han(make_items(35, 1, 80, 22)).items()
    }
    model = small_han().cuda().train()
    for mode in ("default", "error"):  # the first step lets libraries set themselves up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = model(batch).float().square().sum()
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    reference = small_han().train()
    reference.load_state_dict(model.state_dict())
    expected = reference.eval()(collate_han(make_items(35, 1, 80, 22)))
    assert largest(model.eval()(batch).cpu(), expected) < 2e-3  # cuDNN may use TF32


# ------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------
def test_batch_holds_the_pieces():
    items = make_items(4, 9)
    batch = collate_han([item | {"y": np.full(19, i), "stats": [i]} for i, item in enumerate(items)])
    assert batch["names"] == ["piece 4", "piece 9"]
    assert batch["lengths"].tolist() == batch["mask"].sum(1).tolist() == [4, 9]
    assert batch["y"].tolist() == [[0.0] * 19, [1.0] * 19]
    assert batch["stats"].tolist() == [[0.0], [1.0]]
    for i, item in enumerate(items):
        T = len(item["x"])
        assert np.array_equal(batch["x"][i, :T], item["x"])
        assert np.array_equal(batch["voice"][i, :T], item["voice"])
        for name in ("beat", "measure"):
            assert batch[name][i, :T].tolist() == np.unique(item[name], return_inverse=True)[1].tolist()
        assert all(not batch[name][i, T:].any() for name in ("x", "voice", "beat", "measure", "mask"))
    assert (
        not {"y", "stats"} & collate_han([items[0] | {"y": np.zeros(19)}, items[1] | {"stats": [0]}]).keys()
    )


def random_keys() -> list[np.ndarray]:
    """Sequence number of each member, -1 for none, over random counts and lengths."""
    rng = np.random.default_rng(3)
    keys = [np.full(4, -1), np.zeros(1, np.int64), np.array([-1, 2, -1])]
    for count in rng.integers(1, 40, 60):
        lengths = np.exp(rng.normal(2.5, 1.2, count)).clip(1, 300).astype(int)
        key = np.repeat(rng.permutation(count) - (rng.random() < 0.5), lengths)
        keys.append(rng.permutation(key) if rng.random() < 0.5 else key)
    return keys


def test_sequence_grid_holds_each_member_exactly_once_in_order():
    for key in random_keys():
        arrays = _sequence_grid(key, "p")
        grid, slot = arrays["p_grid"], arrays["p_slot"]
        members = np.flatnonzero(key >= 0)
        names, counts = np.unique(key[members], return_counts=True)
        assert grid.shape == (2, max(counts, default=1), max(len(names), 1))
        for direction in range(2):
            assert len(set(slot[direction, members].tolist())) == len(members)
            step, column = np.divmod(slot[direction], grid.shape[2])
            for name in names:
                own = np.flatnonzero(key == name)[:: -1 if direction else 1]
                assert step[own].tolist() == list(range(len(own)))  # from step 0 on, without gaps, in order
                assert len(set(column[own].tolist())) == 1
                assert grid[direction, : len(own), column[own[0]]].tolist() == own.tolist()


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------
def make_ckpt(model: HAN, **more) -> dict:
    return {"task": "han", "model_args": model.model_args, "model": model.state_dict(), "ema": None} | more


def test_checkpoint_rebuilds_the_model(tmp_path):
    model, batch = small_han(layers=(1, 1, 2, 1), level="measure"), collate_han(make_items(6, 20))
    optimizer = torch.optim.Adam(model.parameters())
    model(batch).sum().backward()
    optimizer.step()
    data = {"columns": ["a", "b"], "mean": [0.5, None], "fold": 0, "keep_overlap": True, "sizes": (1, 2)}
    ckpt = make_ckpt(model.train(), optimizer=optimizer.state_dict(), data=data, step=1, best=-0.25)
    save_checkpoint(tmp_path / "new" / "run" / "last.pt", ckpt)
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["last.pt"]

    raw = torch.load(tmp_path / "new" / "run" / "last.pt", weights_only=True)
    loaded, again = load_checkpoint(tmp_path / "new" / "run" / "last.pt")
    assert raw.keys() == again.keys() == ckpt.keys() | {"format"}
    assert raw["format"] == models.CHECKPOINT_FORMAT
    assert again["data"] == data | {"sizes": [1, 2]}
    assert (again["step"], again["best"], again["model_args"]["layers"]) == (1, -0.25, [1, 1, 2, 1])
    assert not loaded.training
    assert torch.equal(loaded(batch), model.eval()(batch))
    other = torch.optim.Adam(loaded.parameters())
    other.load_state_dict(again["optimizer"])
    assert torch.equal(
        other.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"]
    )


def test_averaged_weights_are_used_where_there_are_any(tmp_path):
    model, batch = small_han(), collate_han(make_items(6, 20))
    averaged = {name: 0.5 * value for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "best.pt", make_ckpt(model, ema=averaged))
    loaded, ckpt = load_checkpoint(tmp_path / "best.pt")
    raw = model(batch)
    model.load_state_dict(averaged)
    assert torch.equal(loaded(batch), model(batch))
    assert largest(loaded(batch), raw) > 1e-3
    assert largest(ckpt["model"]["head.4.bias"], 2 * averaged["head.4.bias"]) == 0


@pytest.mark.parametrize(
    ("value", "where", "kind"),
    [
        ({"best": np.float64(0.5)}, "ckpt['x']['best']", "numpy.float64"),
        ([1, {"mean": np.zeros(2)}], "ckpt['x'][1]['mean']", "numpy.ndarray"),
        (argparse.Namespace(lr=1.0), "ckpt['x']", "argparse.Namespace"),
        ({"out": Path("a")}, "ckpt['x']['out']", "pathlib."),
        ({"f": {(1, 2): 3}}, "ckpt['x']['f']", "builtins.dict"),
    ],
)
def test_other_types_are_refused_before_anything_is_written(tmp_path, value, where, kind):
    save_checkpoint(tmp_path / "last.pt", make_ckpt(small_han()))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(TypeError, match=re.escape(f"{where}: {kind}")):
        save_checkpoint(tmp_path / "last.pt", {"task": "han", "x": value})
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == before


def write_bad(path: Path, kind: str) -> None:
    """One unreadable or foreign file of each kind."""
    good = make_ckpt(small_han())
    if kind == "garbage":
        path.write_bytes(bytes(range(256)) * 20)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "truncated":
        save_checkpoint(path, good)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "pickle":
        path.write_bytes(b"cposix\nsystem\n(S'true'\ntR.")  # a pickle that would call os.system
    elif kind == "torch file with foreign objects":
        torch.save({"format": 1, "args": argparse.Namespace(lr=1)}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "state dict":
        torch.save(good["model"], path)
    elif kind == "other task":
        save_checkpoint(path, good | {"task": "chess"})
    elif kind == "other format":
        torch.save(good | {"format": 99}, path)
    elif kind == "no model_args":
        save_checkpoint(path, {"task": "han", "model": good["model"]})
    elif kind == "unknown argument":
        save_checkpoint(path, good | {"model_args": good["model_args"] | {"depth": 3}})
    elif kind == "other weights":
        save_checkpoint(path, good | {"model": small_han(size=16).state_dict()})


REASONS = {
    "missing": "no such file", "garbage": "unreadable", "empty": "unreadable", "text": "unreadable",
    "truncated": "unreadable", "pickle": "unreadable", "torch file with foreign objects": "unreadable",
    "list": "does not fit", "state dict": "'format'",
    "other task": "'chess'", "other format": "format 99 instead of 1", "no model_args": "'model_args'",
    "unknown argument": "unexpected keyword argument 'depth'",
    "other weights": "size mismatch for embedding.weight",
}  # fmt: skip


@pytest.mark.parametrize("kind", REASONS)
def test_bad_checkpoint_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "run.pt"
    write_bad(path, kind)
    with pytest.raises(DataError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert REASONS[kind] in message
    assert "\n" not in message


def test_checkpoint_with_switches_of_older_versions(tmp_path):
    """Options that are gone stand in model_args of older files: switched off they mean nothing."""
    model = small_han()
    ckpt = make_ckpt(model, model_args=model.model_args | {"layernorm": False, "head_gain": 1.0})
    save_checkpoint(tmp_path / "old.pt", ckpt)
    assert load_checkpoint(tmp_path / "old.pt")[0].model_args == model.model_args


# ---------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "device", "seconds", "chosen"),
    [
        ("auto", "cpu", {"off": 1.0, "bf16": 0.5}, "bf16"),
        ("auto", "cpu", {"off": 1.0, "bf16": 0.95, "fp16": 0.1}, "off"),
        ("auto", "cpu", {"off": 1.0}, "off"),
        ("auto", "cuda", {"off": 1.0, "bf16": 2.0, "fp16": 0.5}, "bf16"),
        ("auto", "cuda", {"off": 1.0, "fp16": 2.0}, "fp16"),
        ("auto", "cuda", {"off": 1.0}, "off"),
        ("off", "cpu", {}, "off"),
        ("bf16", "cpu", {"bf16": 1.0}, "bf16"),
    ],
)
def test_amp_takes_what_works(kind, device, seconds, chosen, monkeypatch):
    monkeypatch.setattr(models, "probe_amp", lambda kind, *_: seconds.get(kind, math.inf))
    assert models.working_amp(kind, torch.device(device), None) == chosen
    monkeypatch.setattr(models, "probe_amp", lambda *_: math.inf)
    with pytest.raises(DataError, match="--amp fp16"):
        models.working_amp("fp16", torch.device(device), None)


class Broken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("no kernel")


def test_amp_probe_runs_and_leaves_the_generator_alone():
    def make(network: nn.Module = nn.GRU, factor: float = 1.0):
        return lambda: (network(16, 8), (factor * torch.randn(4, 16),))

    state, threads, cpu = torch.get_rng_state(), torch.get_num_threads(), torch.device("cpu")
    assert 0 < models.probe_amp("off", cpu, make()) < 60
    assert models.probe_amp("bf16", cpu, make(nn.Linear, math.inf)) == math.inf
    assert models.probe_amp("bf16", cpu, make(Broken)) == math.inf
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_averaged_weights_are_lent_and_given_back():
    model = small_han().train()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    ema = {name: torch.zeros_like(value) for name, value in own.items()}
    models.update_ema(ema, model, 0.75)
    with models.averaged(model, ema):
        assert all(largest(v, 0.25 * own[k]) < 1e-7 for k, v in model.state_dict().items())
        model.eval()
    assert model.training
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())
    models.update_ema(None, model, 0.75)
    with models.averaged(model, None):
        assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())


def test_suspects_are_the_items_without_a_finite_loss_or_all():
    losses = torch.tensor([1.0, math.nan, math.inf])
    assert models.suspects(["a", "b", "c"], losses, 1) == (["b", "c"], True)
    assert models.suspects(["a", "b", "c"], torch.ones(3), 1) == (["a", "b", "c"], False)


def test_a_log_without_nan_and_a_board(tmp_path, monkeypatch):
    written = []
    board = argparse.Namespace(add_scalar=lambda *a: written.append(a), flush=lambda: None)
    monkeypatch.setattr(models, "tensorboard", lambda folder: board)
    run = models.Run(tmp_path / "run", argparse.Namespace(tensorboard=True), 0)
    run.log(3, 1, loss=math.nan, norms={"a": 1.23456789}, lr=0.5)
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert record.keys() == {"step", "epoch", "time", "loss", "norms", "lr"}
    assert (record["step"], record["loss"], record["norms"], record["lr"]) == (3, None, {"a": 1.234568}, 0.5)
    assert [(name, step) for name, _, step in written] == [("loss", 3), ("lr", 3)]
    models.Run(tmp_path / "other", argparse.Namespace(tensorboard=True), 1).log(3, 1, loss=1.0)
    assert not (tmp_path / "other").exists()
