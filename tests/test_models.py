"""models.HAN against the original's numbers, plain Python loops and its plain rendition; checkpoints."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from data import DataError, collate_han
from eval import plain_from_han

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("SHARED", ROOT.parent / "shared"))
ORACLE = SHARED / "reference" / "percepiano_han.npz"
needs_oracle = pytest.mark.skipif(not ORACLE.exists(), reason="reference vectors are not here")
SMALL = {"input_size": 7, "size": 8, "heads": 4, "layers": [2, 2, 2, 1], "dropout": 0.0}
VARIANTS = [
    {"level": "note"},
    {"level": "beat"},
    {"level": "measure"},
    {"level": "total_note_cat"},
    {"model": "bilstm"},
    {"model": "bilstm_sa"},
    {"layernorm": True, "head_size": 5, "head_gain": 2.0, "stats_size": 3},
]


def make_item(seed, notes, features=7, **changes):
    rng = np.random.default_rng(seed)
    beat = np.sort(rng.integers(5, 5 + max(notes // 3, 1), notes))
    item = {
        "x": rng.standard_normal((notes, features), dtype=np.float32),
        "voice": rng.integers(0, 4, notes),
        "beat": beat,
        "measure": beat // 3 + 9,
        "y": rng.random(19),
        "stats": rng.standard_normal(3),
        "name": f"piece{seed}",
    }
    return item | changes


def make_items():
    return [
        make_item(0, 30),
        make_item(1, 1),
        make_item(2, 17, voice=np.zeros(17, int)),
        make_item(3, 80),
        make_item(4, 9, voice=np.full(9, 12)),
    ]


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return models.HAN(**(SMALL | changes)).eval()


# ------------------------------------------------------------------------------------------------------------
# Parity with the original
# ------------------------------------------------------------------------------------------------------------
def oracle_item(oracle, name):
    return {key: oracle[f"{name}/{key}"] for key in ("x", "voice", "beat", "measure")}


def oracle_weights(oracle, variant):
    prefix = f"{variant}w/"
    return {key.removeprefix(prefix): oracle[key] for key in oracle.files if key.startswith(prefix)}


@needs_oracle
@pytest.mark.parametrize("variant", ["", "measure/", "note/", "bilstm/"])
def test_logits_equal_the_original(variant):
    oracle = np.load(ORACLE, allow_pickle=False)
    model = models.han_from_percepiano(oracle_weights(oracle, variant)).eval()
    names = ["seq0", "seq1", "seq2"]
    expected = np.stack([oracle[f"{variant}{name}/logits"] for name in names])
    with torch.no_grad():
        alone = [model(collate_han([oracle_item(oracle, name)])) for name in names]
        together = model(collate_han([oracle_item(oracle, name) for name in names]))
    np.testing.assert_allclose(torch.cat(alone), expected, atol=2e-5, rtol=0)
    np.testing.assert_allclose(together, expected, atol=2e-5, rtol=0)


@needs_oracle
def test_stages_equal_the_original():
    oracle = np.load(ORACLE, allow_pickle=False)
    model = models.han_from_percepiano(oracle_weights(oracle, "")).eval()
    ours = {
        "note": "out_note",
        "beat": "out_beat",
        "measure": "out_measure",
        "total_note_cat": "total_note_cat",
        "contracted": "contracted",
    }
    for name in ("seq0", "seq1", "seq2"):
        with torch.no_grad():
            stages = model.stages(collate_han([oracle_item(oracle, name)]))
        for stage, key in ours.items():
            np.testing.assert_allclose(stages[stage], oracle[f"{name}/{key}"], atol=2e-5, rtol=0)
        hidden = torch.cat([stages["note"], stages["voice"]], dim=1)
        np.testing.assert_allclose(hidden, oracle[f"{name}/out_voice"], atol=2e-5, rtol=0)
        np.testing.assert_allclose(stages["pooled"][0], oracle[f"{name}/pooled"], atol=2e-5, rtol=0)


@needs_oracle
def test_every_note_gets_its_beat_where_the_first_beat_has_one_note():
    oracle = np.load(ORACLE, allow_pickle=False)
    model = models.han_from_percepiano(oracle_weights(oracle, "")).eval()
    with torch.no_grad():
        logits = model(collate_han([oracle_item(oracle, "quirk")]))[0]
    np.testing.assert_allclose(logits, oracle["quirk/logits_full_span"], atol=2e-5, rtol=0)


@needs_oracle
def test_conversion_accepts_module_prefix_tensors_and_dead_parameters():
    oracle = np.load(ORACLE, allow_pickle=False)
    note = oracle_weights(oracle, "note/")
    expected = models.han_from_percepiano(note).state_dict()
    wrapped = {f"module.{key}": torch.from_numpy(value) for key, value in note.items()}
    wrapped["module.performance_encoder.fc.weight"] = torch.ones(3)
    wrapped["module.score_encoder.beat_rnn.weight_ih_l0"] = torch.ones(3)
    model = models.han_from_percepiano(wrapped, dropout=0.4)
    assert model.model_args["dropout"] == 0.4
    assert model.model_args["level"] == "note"
    assert model.model_args["layers"][0] == 2
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key])


@needs_oracle
@pytest.mark.parametrize(
    ("variant", "change", "named"),
    [
        ("", {"score_encoder.voice_net.bias_hh_l1": None}, "score_encoder.voice_net.bias_hh_l1"),
        ("", {"out_fc.4.weight": None}, "out_fc.4.weight"),
        ("", {"beat_tempo_forward.weight": np.ones(3)}, "beat_tempo_forward.weight"),
        ("", {"performance_final_attention.context_vector": None}, "performance_final_attention"),
        ("", {"out_fc.1.bias": np.ones(7)}, "out_fc.1.bias"),
        ("measure/", {"score_encoder.beat_rnn.bias_ih_l1_reverse": None}, "beat_rnn.bias_ih_l1_reverse"),
        ("bilstm/", {"score_encoder.beat_rnn.bias_ih_l0": np.ones(3)}, "score_encoder.beat_rnn.bias_ih_l0"),
        ("bilstm/", {"lstm.weight_ih_l6": None}, "lstm.weight_ih_l6"),
    ],
)
def test_conversion_refuses_unknown_missing_and_misshapen_weights(variant, change, named):
    weights = oracle_weights(np.load(ORACLE, allow_pickle=False), variant) | change
    with pytest.raises(DataError, match=named.replace(".", r"\.")) as caught:
        models.han_from_percepiano({key: value for key, value in weights.items() if value is not None})
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# Shapes, independence of batch-mates and padding
# ------------------------------------------------------------------------------------------------------------
def test_parameter_count_and_context_range():
    model = models.HAN(101)
    assert sum(p.numel() for p in model.parameters()) == 13_963_283
    context = model.beat_attention.context_vector
    assert context.shape == (8, 128)
    assert -1 <= context.min() < -0.9
    assert 0.9 < context.max() <= 1


def test_head_gain_scales_the_last_weights_only():
    plain, scaled = make_model(), make_model(head_gain=3.0)
    torch.testing.assert_close(scaled.head[-1].weight, 3 * plain.head[-1].weight)
    assert torch.equal(scaled.head[-1].bias, plain.head[-1].bias)
    assert torch.equal(scaled.head[1].weight, plain.head[1].weight)


@pytest.mark.parametrize("wrong", [{"level": "bar"}, {"model": "lstm"}, {"size": 10}])
def test_han_refuses_bad_arguments(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        models.HAN(**(SMALL | wrong))


def test_collated_batch():
    batch = collate_han([make_item(0, 3, voice=[2, 0, 2], beat=[7, 7, 9], measure=[3, 3, 4]), make_item(1, 2)])
    assert batch["x"].shape == (2, 3, 7)
    assert batch["x"].dtype == torch.float32
    assert batch["x"][1, 2].abs().sum() == 0
    assert batch["lengths"].tolist() == [3, 2]
    assert batch["mask"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["beat"][0].tolist() == [0, 0, 1]
    assert batch["measure"][0].tolist() == [0, 0, 1]
    assert batch["voice"][0].tolist() == [2, 0, 2]
    assert batch["y"].shape == (2, 19)
    assert batch["stats"].shape == (2, 3)
    assert batch["names"] == ["piece0", "piece1"]
    assert "y" not in collate_han([make_item(0, 3), make_item(1, 2) | {"y": None}])


def test_grids_hold_every_member_once_in_either_direction():
    batch = collate_han(make_items())
    sizes = {"note": 137, "voice": 137, "beat": len(batch["beat_piece"]), "measure": len(batch["measure_piece"])}
    for name, size in sizes.items():
        grids = [batch[key] for k in range(99) if (key := f"{name}_grid{k}") in batch]
        members = torch.arange(size)
        if name == "voice":
            members = members[batch["voiced"]]
        for direction in range(2):
            joined = torch.cat([grid[direction].flatten() for grid in grids])
            slots = batch[f"{name}_slot"][direction][members]
            assert torch.equal(joined[slots], members)
            assert len(slots.unique()) == len(members)
        assert all(a.shape[2] > b.shape[2] for a, b in zip(grids, grids[1:], strict=False))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_do_not_depend_on_batch_mates_order_or_padding(variant):
    items, model = make_items(), make_model(**variant)
    with torch.no_grad():
        batch = collate_han(items)
        together = model(batch)
        alone = torch.cat([model(collate_han([item])) for item in items])
        order = [3, 0, 4, 2, 1]
        permuted = model(collate_han([items[i] for i in order]))
        padded_x = torch.full((5, 200, 7), 1e6)
        padded_x[:, : batch["x"].shape[1]] = batch["x"]
        padded = model(batch | {"x": padded_x.masked_fill(padded_x == 0, 1e6)})
    assert together.shape == (5, 19)
    assert together.std(0).min() > 1e-4
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(permuted, together[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded, together, atol=1e-5, rtol=0)


def test_a_nan_piece_leaves_its_mates_alone():
    items, model = make_items(), make_model()
    spoilt = [items[0] | {"x": np.full((30, 7), np.nan, np.float32)}, *items[1:]]
    with torch.no_grad():
        clean, mixed = model(collate_han(items)), model(collate_han(spoilt))
    assert mixed[0].isnan().all()
    torch.testing.assert_close(mixed[1:], clean[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_parameter_gets_a_finite_gradient(variant):
    model, batch = make_model(**variant).train(), collate_han(make_items())
    ((torch.sigmoid(model(batch)) - batch["y"]) ** 2).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_fp32_with_finite_gradients(dtype):
    model, batch = make_model(), collate_han(make_items())
    exact = model(batch)
    try:
        with torch.autocast("cpu", dtype):
            stages = model.stages(batch)
    except RuntimeError as error:
        pytest.skip(f"{dtype} LSTM is not supported by this CPU: {error}")
    assert stages["pooled"].dtype == torch.float32
    torch.testing.assert_close(stages["logits"].float(), exact, atol=0.03, rtol=0)
    stages["logits"].float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------
# Plain Python references
# ------------------------------------------------------------------------------------------------------------
def test_attention_pooling_equals_a_loop():
    torch.manual_seed(0)
    attention = models.ContextAttention(12, 3)
    x, group = torch.randn(20, 12), torch.randint(0, 4, (20,))
    group[group == 2] = 3  # group 2 stays empty
    expected = torch.zeros(5, 12)
    transformed = torch.tanh(x @ attention.linear.weight.T + attention.linear.bias)
    for g in range(5):
        members = [m for m in range(20) if group[m] == g]
        for h in range(3):
            columns = slice(4 * h, 4 * h + 4)
            scores = [float(transformed[m, columns] @ attention.context_vector[h]) for m in members]
            total = sum(np.exp(score) for score in scores)
            for m, score in zip(members, scores, strict=True):
                expected[g, columns] += np.exp(score) / total * x[m, columns]
    torch.testing.assert_close(attention(x, group, 5), expected, atol=1e-6, rtol=0)


def test_softmax_survives_extreme_scores():
    score = torch.tensor([[1e4], [-1e4], [-3e4], [-3e4]])
    weight = models.group_softmax(score, torch.tensor([0, 0, 1, 1]), 2)
    assert weight.flatten().tolist() == [1.0, 0.0, 0.5, 0.5]


def step_by_step_lstm(lstm, sequence):
    """One direction over one sequence (L, C), note by note from the equations."""
    h = c = torch.zeros(lstm.hidden_size)
    outputs = []
    for x in sequence:
        gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs)


def test_voices_and_spans_equal_loops_over_pieces_voices_and_notes():
    items, model = make_items(), make_model()
    with torch.no_grad():
        stages = model.stages(collate_han(items))
        start, total = 0, stages["total_note_cat"]
        beats_before = measures_before = 0
        for item in items:
            T = len(item["x"])
            embedded = model.embedding(torch.from_numpy(item["x"]))
            expected = torch.zeros(T, 16)
            for voice in set(item["voice"]) - {0}:
                notes = [t for t in range(T) if item["voice"][t] == voice]
                sequence = embedded[notes]
                for forward, backward in zip(model.voice.forward_lstm, model.voice.backward_lstm, strict=True):
                    back = step_by_step_lstm(backward, sequence.flip(0)).flip(0)
                    sequence = torch.cat([step_by_step_lstm(forward, sequence), back], dim=1)
                for row, t in enumerate(notes):
                    expected[t] = sequence[row]
            torch.testing.assert_close(stages["voice"][start : start + T], expected, atol=1e-6, rtol=0)
            beats, measures = sorted(set(item["beat"])), sorted(set(item["measure"]))
            for t in range(T):
                beat = stages["beat"][beats_before + beats.index(item["beat"][t])]
                measure = stages["measure"][measures_before + measures.index(item["measure"][t])]
                torch.testing.assert_close(total[start + t, 32:], torch.cat([beat, measure]), atol=0, rtol=0)
            start += T
            beats_before += len(beats)
            measures_before += len(measures)


def test_equals_the_plain_network_in_outputs_and_gradients():
    model, batch = make_model().train(), collate_han(make_items())
    plain = plain_from_han(model)
    logits, slow = model(batch), plain(batch)
    torch.testing.assert_close(logits, slow, atol=1e-6, rtol=0)
    logits.square().sum().backward()
    slow.square().sum().backward()
    pairs = [
        (model.embedding.weight, plain.embedding.weight),
        (model.note.forward_lstm[0].weight_ih_l0, plain.note.weight_ih_l0),
        (model.voice.backward_lstm[1].weight_hh_l0, plain.voice.weight_hh_l1_reverse),
        (model.beat.forward_lstm[1].bias_hh_l0, plain.beat.bias_hh_l1),
        (model.measure.backward_lstm[0].weight_ih_l0, plain.measure.weight_ih_l0_reverse),
        (model.beat_attention.context_vector, plain.beat_attention.context_vector),
        (model.measure_attention.linear.weight, plain.measure_attention.linear.weight),
        (model.attention.context_vector, plain.attention.context_vector),
        (model.contractor.weight, plain.contractor.weight),
        (model.head[1].weight, plain.head[1].weight),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    norms = [sum(p.grad.square().sum() for p in net.parameters()) for net in (model, plain)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_host_synchronisation_on_cuda(dtype):
    cpu = make_model()
    expected, batch = cpu(collate_han(make_items())), collate_han(make_items())
    model = make_model().cuda().train()
    batch = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    for mode in ("default", "error"):  # the first run lets cuDNN and cuBLAS set themselves up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                logits = model(batch)
            logits.float().square().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits.float().cpu(), expected, atol=tolerance, rtol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------
def make_ckpt(model, **changes):
    ckpt = {"task": "han", "model_args": model.model_args, "model": model.state_dict(), "ema": None, "step": 3}
    return ckpt | {"rng": {"torch": torch.get_rng_state()}, "best": 0.25, "git_sha": None} | changes


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_checkpoint_round_trip(tmp_path, variant):
    model, batch = make_model(**variant), collate_han(make_items())
    optimizer = torch.optim.Adam(model.parameters())
    model(batch).sum().backward()
    optimizer.step()
    models.save_checkpoint(tmp_path / "new" / "last.pt", make_ckpt(model, optimizer=optimizer.state_dict()))
    again, ckpt = models.load_checkpoint(tmp_path / "new" / "last.pt")
    assert not again.training
    assert torch.equal(again(batch), model(batch))
    assert ckpt["step"] == 3
    assert ckpt["optimizer"]["param_groups"][0]["betas"] == [0.9, 0.999]
    assert os.listdir(tmp_path / "new") == ["last.pt"]
    torch.optim.Adam(again.parameters()).load_state_dict(ckpt["optimizer"])


def test_averaged_weights_are_used_where_there_are_any(tmp_path):
    model, average = make_model(0), make_model(1)
    models.save_checkpoint(tmp_path / "best.pt", make_ckpt(model, ema=average.state_dict()))
    loaded, _ = models.load_checkpoint(tmp_path / "best.pt")
    assert torch.equal(loaded.embedding.weight, average.embedding.weight)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(0.5), "numpy.float64"),
        (np.ones(2), "numpy.ndarray"),
        (argparse.Namespace(a=1), "argparse.Namespace"),
        (Path("x"), "pathlib"),
        ({1, 2}, "builtins.set"),
    ],
)
def test_other_types_are_refused_with_their_place(tmp_path, value, kind):
    with pytest.raises(TypeError, match=r"ckpt\['data'\]\['mean'\]\[1\]: " + kind):
        models.save_checkpoint(tmp_path / "last.pt", make_ckpt(make_model(), data={"mean": [1.0, value]}))
    assert os.listdir(tmp_path) == []


def test_bad_files_are_refused_in_one_line(tmp_path):
    model = make_model()
    good = tmp_path / "good.pt"
    models.save_checkpoint(good, make_ckpt(model))
    torch.save(argparse.Namespace(a=1), tmp_path / "namespace.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save(make_ckpt(model, format=99), tmp_path / "format.pt")
    models.save_checkpoint(tmp_path / "task.pt", make_ckpt(model, task="decoder2"))
    models.save_checkpoint(tmp_path / "no_args.pt", make_ckpt(model, model_args=None))
    models.save_checkpoint(tmp_path / "other_args.pt", make_ckpt(model, model_args=SMALL | {"size": 16}))
    models.save_checkpoint(tmp_path / "no_weights.pt", make_ckpt(model, model={}))
    (tmp_path / "truncated.pt").write_bytes(good.read_bytes()[:-500])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "html.pt").write_text("<html>404</html>")
    (tmp_path / "folder.pt").mkdir()
    bad = sorted(path for path in tmp_path.iterdir() if path != good)
    for path in [*bad, tmp_path / "missing.pt"]:
        with pytest.raises(DataError, match=path.name.replace(".", r"\.")) as caught:
            models.load_checkpoint(path)
        assert "\n" not in str(caught.value)
    assert len(bad) == 12


SAVE_FOREVER = """
import sys, torch, models
torch.set_num_threads(1)
model = models.HAN(input_size=7, size=64, heads=4)
step = 0
while True:
    step += 1
    ckpt = {"task": "han", "model_args": model.model_args, "model": model.state_dict(), "ema": None, "step": step}
    models.save_checkpoint(sys.argv[1], ckpt)
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.008])
def test_kill_during_save_leaves_a_loadable_file(tmp_path, delay):
    path = tmp_path / "last.pt"
    command = [sys.executable, "-c", SAVE_FOREVER, str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    saved = int(process.stdout.readline()) and int(process.stdout.readline())
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    saved = max([saved, *map(int, process.stdout.read().split())])
    process.wait()
    _, ckpt = models.load_checkpoint(path)
    assert ckpt["step"] in (saved, saved + 1)


def test_a_leftover_of_a_killed_save_does_no_harm(tmp_path):
    (tmp_path / "last.pt.tmp").write_bytes(b"half a file")
    models.save_checkpoint(tmp_path / "last.pt", make_ckpt(make_model()))
    assert models.load_checkpoint(tmp_path / "last.pt")[1]["step"] == 3
    assert os.listdir(tmp_path) == ["last.pt"]
