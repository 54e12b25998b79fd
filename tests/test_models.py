"""models.HAN against the original and the plain network, its batches, checkpoints, runs."""

import argparse
import json
import math
import re
from pathlib import Path

import numpy as np
import plain_networks
import pytest
import torch
from conftest import SHARED
from torch import Tensor

import eval as evaluation
import models
from data import DataError, _sequence_grid, collate_han
from models import HAN, BiLSTM, han_from_percepiano, load_checkpoint, save_checkpoint

ORACLE = SHARED / "reference" / "percepiano_han.npz"
VARIANTS = {"total_note_cat": "", "measure": "measure/", "note": "note/", "bilstm": "bilstm/"}
CPU = torch.device("cpu")
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
    model = han_from_percepiano(original_weights(oracle, variant))
    assert model.level == ("note" if variant == "bilstm" else variant)
    layers = {"bilstm": [7, 0, 0, 0], "note": [2, 0, 0, 0]}.get(variant, [2, 2, 2, 1])
    assert model.model_args["layers"] == layers
    items = [original_item(oracle, f"seq{i}") for i in range(3)]
    alone = torch.cat([model(collate_han([item])) for item in items])
    expected = np.stack([oracle[f"{VARIANTS[variant]}seq{i}/logits"] for i in range(3)])
    assert largest(alone, expected) < 2e-5
    assert largest(model(collate_han(items)), alone) < 1e-5


def test_first_beat_of_one_note_is_spanned_in_full(oracle):
    model = han_from_percepiano(original_weights(oracle, "total_note_cat"))
    logits = model(collate_han([original_item(oracle, "quirk")]))[0]
    assert largest(logits, oracle["quirk/logits_full_span"]) < 2e-5
    assert largest(logits, oracle["quirk/logits"]) > 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_original_weights_with_prefix_and_dead_ones_and_what_is_refused(oracle, variant):
    weights = original_weights(oracle, variant)
    expected = han_from_percepiano(weights).state_dict()
    dead = {"performance_encoder.lstm.bias_ih_l0": np.zeros(3, np.float16)}
    if variant == "note":
        dead["score_encoder.beat_rnn.bias_hh_l1"] = np.zeros(3, np.float16)
    tensors = {f"module.{name}": torch.from_numpy(value) for name, value in (weights | dead).items()}
    found = han_from_percepiano(tensors, dropout=0.5)
    assert found.model_args["dropout"] == 0.5
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    refused = {"note_embedder.bias": {"note_embedder.bias": np.zeros(3)}}
    refused["out_fc.4.bias"] = {"out_fc.4.bias": None}
    refused["size mismatch"] = {"note_embedder.fc.bias": np.zeros(3)}
    for named, change in refused.items():
        changed = {name: value for name, value in (weights | change).items() if value is not None}
        with pytest.raises(DataError, match=rf"^[^\n]*{re.escape(named)}[^\n]*$"):
            han_from_percepiano(changed)


@torch.no_grad()
def test_odd_pieces_equal_the_plain_network():
    """One note, no voices, gaps in every numbering."""
    items = [*make_items(23, 1, 60), make_item(20, voice=np.zeros(20, np.int64))]
    model, batch = small_han(), collate_han(items)
    assert largest(model(batch), plain_networks.PlainHAN(model).eval()(batch)) < 1e-6
    assert not model.stages(batch)["voice"][~batch["voiced"]].any()


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 3])
def test_bilstm_equals_torch_on_each_sequence_and_drops_between_layers(layers):
    lengths = [1, 70, 2, 33, 13, 13, 90]
    part = BiLSTM(5, 6, layers, dropout=1.0)
    key = np.random.default_rng(0).permutation(np.repeat(np.arange(len(lengths)), lengths))
    x = torch.randn(len(key), 5)
    batch = {name: torch.from_numpy(array) for name, array in _sequence_grid(key, "note").items()}
    silenced = part(x, batch, "note")
    found = part.eval()(x, batch, "note")
    joined = plain_networks.joined_lstm(part, 0.0)
    for sequence in range(len(lengths)):
        assert largest(found[key == sequence], joined(x[key == sequence])[0]) < 1e-6
    assert torch.equal(silenced, found) == (layers == 1)
    assert torch.equal(silenced, part.train()(-x, batch, "note")) == (layers > 1)


STAGES = {"note": ["embedding", "note"], "beat": ["embedding", "note", "voice", "beat"]}
STAGES["measure"] = [*STAGES["beat"], "measure"]
STAGES["total_note_cat"] = [*STAGES["measure"], "total_note_cat"]
FORMS = [{"level": level} for level in STAGES] + [{"model": "bilstm"}, {"stats_size": 3, "head_size": 5}]


@pytest.mark.parametrize("args", FORMS)
def test_every_form_has_its_stages_and_every_parameter_a_gradient(args):
    model = small_han(**args, num_label=4).train()
    items = [item | {"stats": np.arange(3.0) - 1} for item in make_items(12, 31, 1)]
    batch = collate_han(items)
    stages = model.stages(batch)
    assert [*stages] == [*STAGES[model.level], "contracted", "pooled", "logits"]
    rows = {"beat": len(batch["beat_piece"]), "measure": len(batch["measure_piece"])}.get(model.level, 44)
    assert stages["contracted"].shape == (rows, 2 * SIZE)
    assert stages["logits"].shape == (3, 4)
    stages["logits"].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_parameter_count_arguments_and_refusals():
    assert sum(p.numel() for p in HAN(input_size=101).parameters()) == 13_963_283
    assert small_han(head_size=5).head[1].out_features == 5
    assert HAN(input_size=101, layers=(1, 1, 1, 1)).model_args == {
        "input_size": 101, "size": 256, "heads": 8, "layers": [1, 1, 1, 1], "num_label": 19, "dropout": 0.2,
        "level": "total_note_cat", "model": "han", "head_size": None, "stats_size": 0,
    }  # fmt: skip
    for args in ({"level": "bar"}, {"model": "gru"}, {"size": 9}):
        with pytest.raises(DataError, match=str([*args.values()][0])):
            small_han(**args)


@torch.no_grad()
@pytest.mark.parametrize(
    "args", [{"stats_size": 2}, {"level": "beat"}, {"level": "measure"}, {"model": "bilstm"}]
)
def test_logits_do_not_depend_on_padding_batch_mates_or_order(args):
    model = small_han(**args)
    items = [item | {"stats": [len(item["x"]) / 50, -1.0]} for item in make_items(9, 75, 1, 40, 9)]
    alone = torch.cat([model(collate_han([item])) for item in items])
    batch = collate_han(items)
    together = model(batch)
    assert largest(together, alone) < 1e-5
    order = [3, 0, 4, 2, 1]
    assert largest(model(collate_han([items[i] for i in order])), alone[order]) < 1e-5
    wider = torch.full((5, 90, INPUT), torch.nan)
    wider[:, :75][batch["mask"]] = batch["x"][batch["mask"]]
    assert torch.equal(model(batch | {"x": wider}), together)


SMALL = {
    "han": {"size": 8, "heads": 2, "dropout": 0.0},
    "decoder": {"channels": 6, "days": 3, "hidden": 8, "layers": 2, "kernel": 8, "dropout": 0.0},
    "ast": {"width": 16, "depth": 2, "heads": 2, "frames": 96, "dropout": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("task", SMALL)
def test_equals_the_plain_network(task):
    """Output and gradients of all three networks against those of the public code's manner."""
    model, inputs, loss = evaluation.BENCHES[task][0](SMALL[task], 3, CPU)
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


@pytest.mark.parametrize("task", SMALL)
def test_bench_times_a_step(task, monkeypatch, capsys):
    make, batch = evaluation.BENCHES[task]
    small = (lambda sizes, *args: make(SMALL[task] | sizes, *args), batch)
    monkeypatch.setitem(evaluation.BENCHES, task, small)
    argv = f"bench --task {task} --batch 2 --steps 1 --device cpu --amp bf16".split()
    result = evaluation.main(argv)
    assert result["items_per_second"] == pytest.approx(2 / result["seconds"])
    assert f"{1000 * result['seconds']:.1f} ms/step" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_host_synchronisation_on_cuda(dtype):
    cpu_batch = collate_han(make_items(35, 1, 80, 22))
    batch = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in cpu_batch.items()}
    model = small_han().cuda().train()
    for mode in ("default", "error"):  # the first step lets libraries set themselves up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = model(batch).float().square().sum()
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    reference = small_han()
    reference.load_state_dict(model.state_dict())
    assert largest(model.eval()(batch).cpu(), reference(cpu_batch)) < 2e-3  # cuDNN may use TF32


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
    partly = collate_han([items[0] | {"y": np.zeros(19)}, items[1] | {"stats": [0]}])
    assert not {"y", "stats"} & partly.keys()


# --- Checkpoints ------------------------------------------------------------------------------------------


def make_ckpt(model: HAN, **more) -> dict:
    return {"task": "han", "model_args": model.model_args, "model": model.state_dict(), "ema": None} | more


def test_checkpoint_rebuilds_the_model(tmp_path):
    model, batch = small_han(layers=(1, 1, 2, 1), level="measure"), collate_han(make_items(6, 20))
    path = tmp_path / "new" / "run" / "last.pt"
    data = {"columns": ["a", "b"], "mean": [0.5, None], "fold": 0, "keep_overlap": True, "sizes": (1, 2)}
    save_checkpoint(path, make_ckpt(model.train(), data=data, step=1, best=-0.25))
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]
    loaded, ckpt = load_checkpoint(path)
    assert ckpt["data"] == data | {"sizes": [1, 2]}
    assert (ckpt["step"], ckpt["best"], ckpt["model_args"]["layers"]) == (1, -0.25, [1, 1, 2, 1])
    assert not loaded.training
    raw = model.eval()(batch)
    assert torch.equal(loaded(batch), raw)
    averaged = {name: 0.5 * value for name, value in model.state_dict().items()}
    save_checkpoint(path, make_ckpt(model, ema=averaged))
    model.load_state_dict(averaged)
    assert torch.equal(load_checkpoint(path)[0](batch), model(batch))
    assert largest(model(batch), raw) > 1e-3


def test_other_types_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=re.escape("ckpt['x'][1]['mean']: numpy.ndarray")):
        save_checkpoint(tmp_path / "last.pt", {"task": "han", "x": [1, {"mean": np.zeros(2)}]})
    assert not [*tmp_path.iterdir()]


def test_a_checkpoint_that_is_cut_short_or_of_an_older_version_is_refused(tmp_path):
    model = small_han()
    save_checkpoint(tmp_path / "old.pt", make_ckpt(model, model_args=model.model_args | {"layernorm": False}))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:-1000])
    for name in ("old.pt", "cut.pt"):
        with pytest.raises(DataError, match=name):
            load_checkpoint(tmp_path / name)


# --- Runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "device", "seconds", "chosen"),
    [
        ("auto", "cpu", {"off": 1.0, "bf16": 0.5}, "bf16"),
        ("auto", "cpu", {"off": 1.0, "bf16": 0.95, "fp16": 0.1}, "off"),
        ("auto", "cuda", {"off": 1.0, "bf16": 2.0, "fp16": 0.5}, "bf16"),
        ("auto", "cuda", {"off": 1.0, "fp16": 2.0}, "fp16"),
        ("off", "cpu", {}, "off"),
    ],
)
def test_amp_takes_what_works(kind, device, seconds, chosen, monkeypatch):
    monkeypatch.setattr(models, "probe_amp", lambda kind, *_: seconds.get(kind, math.inf))
    assert models.working_amp(kind, torch.device(device), None) == chosen
    monkeypatch.setattr(models, "probe_amp", lambda *_: math.inf)
    with pytest.raises(DataError, match="--amp fp16"):
        models.working_amp("fp16", torch.device(device), None)


def test_suspects_are_the_items_without_a_finite_loss_or_all():
    losses = torch.tensor([1.0, math.nan, math.inf])
    names, scaler = ["a", "b", "c"], torch.amp.GradScaler("cpu")
    assert models.suspects(names, losses, scaler) == (["b", "c"], False)
    assert models.suspects(names, torch.ones(3), scaler) == (names, True)
    for kind in ({"enabled": False}, {"init_scale": 1.0}):
        assert models.suspects(names, torch.ones(3), torch.amp.GradScaler("cpu", **kind)) == (names, False)


def test_a_log_without_nan_and_a_board(tmp_path, monkeypatch):
    written = []
    board = argparse.Namespace(add_scalar=lambda *a: written.append(a), flush=lambda: None)
    monkeypatch.setattr(models, "tensorboard", lambda folder: board)
    args = argparse.Namespace(tensorboard=True, out=str(tmp_path), name="run", resume=None)
    run = models.Run(args, "", None)
    run.log(3, 1, loss=math.nan, norms={"a": 1.23456789}, lr=0.5)
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert record.keys() == {"step", "epoch", "time", "loss", "norms", "lr"}
    assert (record["step"], record["loss"], record["norms"], record["lr"]) == (3, None, {"a": 1.234568}, 0.5)
    assert [(name, step) for name, _, step in written] == [("loss", 3), ("lr", 3)]
    args.resume = str(tmp_path / "run/last.pt")
    Path(args.resume).touch()
    resumed = {"step": 5, "skipped": {}, "written": Path(args.resume).stat().st_mtime}
    with pytest.raises(DataError, match="metrics.jsonl: another process"):
        models.Run(args, "", {"step": 3, "skipped": {}})
    run.log(6, 1, loss=1.0)
    with run:
        run.metrics.write(b'{"step": 3, "to')  # a crash
    with models.Run(args, "", resumed) as again:
        again.log(6, 1, loss=2.0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 6]
