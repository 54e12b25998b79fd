"""pretrain_ast.py beyond what test_train.py asks of every trainer; audio of PercePiano; baselines on filter banks."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

import data
import pretrain_ast
from models import AST, CNN, ClipStatistics, PooledMLP, adapt_ast, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = "--device cpu --width 16 --depth 1 --heads 2 --frames 64 --batch 4 --epochs 1 --workers 0 --amp off --log-every 1 --dropout 0".split()


@pytest.fixture(scope="session")
def maestro(tmp_path_factory):
    """Eight recordings of noise and tones in MAESTRO's layout: 2, 3, 4, ... s; the last two validate."""
    root, rng = tmp_path_factory.mktemp("maestro"), np.random.default_rng(7)
    (root / "2004").mkdir()
    with (root / "maestro-v3.0.0.csv").open("w", newline="") as f:
        table = csv.writer(f)
        table.writerow(data.MAESTRO_COLUMNS)
        for k in range(8):
            seconds = k + 2
            t = np.arange(16000 * seconds) / 16000
            x = 0.2 * np.sin(2 * np.pi * 110 * (k + 1) * t) * np.exp(-3 * (t % 0.5)) + rng.normal(
                0, 0.002, len(t)
            )
            wavfile.write(root / f"2004/r{k}.wav", 16000, np.rint(32767 * x).astype(np.int16))
            table.writerow(
                [
                    "C",
                    f"T{k}",
                    "train" if k < 6 else "validation",
                    2004,
                    f"2004/r{k}.midi",
                    f"2004/r{k}.wav",
                    seconds,
                ]
            )
    return root


@pytest.fixture
def run(maestro, tmp_path, tmp_path_factory):
    def call(*options):
        argv = [
            "--data",
            str(maestro),
            "--cache",
            str(tmp_path_factory.getbasetemp() / "pretrain_cache"),
            "--out",
            str(tmp_path / "runs"),
            *TINY,
            *" ".join(options).split(),
        ]
        return pretrain_ast.main(pretrain_ast.parse_args(argv))

    return call


def records(out):
    return [json.loads(line) for line in (Path(out["folder"]) / "metrics.jsonl").read_text().splitlines()]


def gradients(model, batch, args, size, loss_of):
    model.zero_grad()
    for part, share, _ in pretrain_ast.micro_batches(batch, size, model):
        (loss_of(model, part, args, {"weights": [1.5, 0.5, 1.2, 0.8]})[0] * share).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", ["", "--two-pass", "--visible-only"])
@pytest.mark.parametrize("lengths", [[64] * 5, [64, 48, 64, 32, 40]])
def test_accumulated_gradients_equal_one_batch_of_pretraining(options, lengths):
    torch.manual_seed(1)
    args = pretrain_ast.parse_args(["--data", "X", *TINY, *options.split()])
    model = AST(64, width=16, depth=1, heads=2, dropout=0, visible_only=args.visible_only)
    batch = {"x": torch.randn(5, 64, 128), "lengths": torch.tensor(lengths), "names": [*"abcde"]}
    batch = pretrain_ast.with_masks(batch, args)
    whole = gradients(model, batch, args, 5, pretrain_ast.pretrain_loss)
    parts = gradients(model, batch, args, 2, pretrain_ast.pretrain_loss)
    assert max(float((whole[k] - parts[k]).abs().max()) for k in whole) < 1e-5 * max(
        float(v.abs().max()) for v in whole.values()
    )


@pytest.mark.parametrize("balance", ["none", "uncertainty", "dwa"])
def test_accumulated_gradients_equal_one_batch_of_finetuning(balance):
    torch.manual_seed(1)
    args = pretrain_ast.parse_args(["--data", "X", "--task", "finetune", *TINY, "--balance", balance])
    model = pretrain_ast.build_model(args)
    batch = {
        "x": torch.randn(5, 64, 128),
        "lengths": torch.tensor([64, 48, 64, 32, 40]),
        "names": [*"abcde"],
        "y": torch.randn(5, 19),
        "weight": (torch.rand(5, 19) < 0.7).float(),
    }
    whole, parts = (gradients(model, batch, args, size, pretrain_ast.finetune_loss) for size in (5, 2))
    assert max(float((whole[k] - parts[k]).abs().max()) for k in whole) < 1e-5 * max(
        float(v.abs().max()) for v in whole.values()
    )


def test_losses_by_hand():
    class Fixed(torch.nn.Module):
        log_variance = torch.tensor([0.0, math.log(2), 0.0, 0.0])

        def forward(self, x, lengths):
            return torch.zeros(2, 19)

    y, args = torch.zeros(2, 19), pretrain_ast.parse_args(["--data", "X", "--task", "finetune"])
    y[0, data.label_groups()[0]] = 2.0  # group 0: error 4 on two ratings
    y[1, data.label_groups()[1]] = 1.0  # group 1: error 1 on seven
    batch = {"x": None, "lengths": None, "y": y, "weight": torch.ones(2, 19)}
    loss, losses, figures = pretrain_ast.finetune_loss(Fixed(), batch, args, {})
    assert losses.tolist() == pytest.approx([8 / 19, 7 / 19])
    assert figures["groups"].tolist() == pytest.approx([2, 0.5, 0, 0])
    args.balance = "uncertainty"
    assert pretrain_ast.finetune_loss(Fixed(), batch, args, {})[1].tolist() == pytest.approx(
        [(4 + math.log(2)) / 4, (0.5 + math.log(2)) / 4]
    )
    args.balance = "dwa"
    assert pretrain_ast.finetune_loss(Fixed(), batch, args, {"weights": [0.5, 2, 1, 1]})[
        1
    ].tolist() == pytest.approx([0.5, 0.5])


def test_dynamic_weights_by_hand():
    first = pretrain_ast.reweigh({"weights": [1] * 4, "sums": [4.0, 2.0, 2.0, 2.0], "count": 2, "before": []})
    assert first == {"weights": [1, 1, 1, 1], "sums": [0] * 4, "count": 0, "before": [2, 1, 1, 1]}
    second = pretrain_ast.reweigh(first | {"sums": [2.0, 1.0, 1.0, 2.0], "count": 1})["weights"]
    share = np.exp(np.array([1, 1, 1, 2]) / 2)
    assert second == pytest.approx(4 * share / share.sum())


def test_an_epoch_holds_crops_in_proportion_to_length(maestro, run, monkeypatch):
    seen, whole = [], pretrain_ast.Crops.__getitem__
    monkeypatch.setattr(
        pretrain_ast.Crops,
        "__getitem__",
        lambda self, key: seen.append((self.stretch, *key, whole(self, key)["name"])) or whole(self, key),
    )
    run("--name crops --epochs 2 --valid-crops 3")
    train = [[name for stretch, e, k, name in seen[-200:] if stretch and e == epoch] for epoch in (0, 1)]
    frames = [data.fbank_frames(16000 * (k + 2)) for k in range(6)]
    expected = [round(n / 64) for n in frames]
    assert [sum(name.startswith(f"2004/r{k}@") for name in train[1]) for k in range(6)] == expected
    assert set(train[0]) != set(train[1])
    assert not [name for stretch, *_, name in seen if stretch and name.startswith(("2004/r6", "2004/r7"))]


def test_pretraining_reports_against_chance_and_the_mean_patch(run):
    out = run("--name report --lr 3e-3 --epochs 4")
    valid = [r for r in records(out) if "valid_loss" in r]
    assert all(r["valid_chance"] == pytest.approx(1 / 25) for r in valid)  # 400 of 512 are 25 of 32
    assert len({r["valid_mse_mean"] for r in valid}) == 1  # the same crops and masks at each evaluation
    assert all(
        r["valid_loss"] == pytest.approx(r["valid_nce"] + 10 * r["valid_mse"], rel=1e-5) for r in valid
    )
    assert out["valid_loss"] == pytest.approx(min(r["valid_loss"] for r in valid), rel=1e-5)
    assert valid[-1]["valid_nce"] < math.log(25)
    model, ckpt = load_checkpoint(Path(out["folder"]) / "best.pt")
    assert (ckpt["task"], ckpt["data"]["task"], ckpt["data"]["frames"], model.model_args["num_outputs"]) == (
        "ast",
        "pretrain",
        64,
        None,
    )


def test_a_spoiled_crop_spoils_its_whole_step_and_is_named(run, monkeypatch):
    whole = data.random_crop

    def spoil(store, i, *a):
        return whole(store, i, *a) * (np.nan if store.names[i] == "2004/r0" else 1)

    monkeypatch.setattr(data, "random_crop", spoil)
    out = run("--name nan --micro-batch 1")
    skips = [r for r in records(out) if "skip" in r]
    assert sum(len(r["names"]) for r in skips) == 3  # 2 s are three crops of 64 frames
    assert all(name.startswith("2004/r0@") for r in skips for name in r["names"])
    assert out["skipped"]["bad"] == len(skips)
    assert math.isfinite(out["valid_loss"])


def test_normalisation_is_the_recordings_own(run, maestro):
    info = load_checkpoint(Path(run("--max-steps 1 --name own --frames 1024")["folder"]) / "last.pt")[1][
        "data"
    ]
    x = np.concatenate(
        [
            data.fbank(torch.from_numpy(data.read_wav(maestro / f"2004/r{k}.wav"))).half().float().numpy()
            for k in range(6)
        ]
    )
    assert (info["mean"], info["std"]) == (
        pytest.approx(x.mean(), abs=1e-3),
        pytest.approx(x.std(), abs=1e-3),
    )
    info = load_checkpoint(Path(run("--max-steps 1 --name audioset --audioset-norm")["folder"]) / "last.pt")[
        1
    ]["data"]
    assert (info["mean"], info["std"]) == (data.FBANK_MEAN, data.FBANK_STD)


def test_online_changes_the_waveform_of_training_crops_only(maestro):
    args = pretrain_ast.parse_args(["--data", "X", *TINY, "--online"])
    store = data.open_audio(maestro)
    plain, loud = (
        pretrain_ast.Crops(store, [0, 1], args, stretch)[1, 0]["fbank"] for stretch in (False, True)
    )
    again = pretrain_ast.Crops(store, [0, 1], args)[1, 0]["fbank"]
    assert plain.shape == loud.shape == (64, 128)
    assert np.array_equal(loud, again)
    assert np.abs(loud - plain).max() > 0.1
    args.gain = args.hiss = 0.0
    assert np.array_equal(pretrain_ast.Crops(store, [0, 1], args)[1, 0]["fbank"], plain)


def test_saves_by_the_clock(run, monkeypatch):
    saved = []
    monkeypatch.setattr(
        pretrain_ast, "save_checkpoint", lambda path, ckpt: saved.append((path.name, ckpt["step"]))
    )
    run("--name clock --save-minutes 1e-9 --max-steps 3")
    assert saved == [("last.pt", 1), ("last.pt", 2), ("best.pt", 3), ("last.pt", 3)]


def test_patience_stops_and_plateau_halves(run, monkeypatch):
    figures = iter([3.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    monkeypatch.setattr(pretrain_ast, "evaluate", lambda *a: {"valid_loss": next(figures)})
    monkeypatch.setattr(pretrain_ast, "summary", str)
    out = run("--name early --eval-every 1 --patience 4 --lr-schedule plateau --warmup 0 --lr 1e-3")
    lines = [r for r in records(out) if "valid_loss" in r]
    assert (out["step"], lines[-1]["step"]) == (2, 6)
    assert [r["lr"] for r in lines] == pytest.approx([1e-3] * 5 + [5e-4])


def test_recipes_are_defaults():
    def values(*options):
        args = pretrain_ast.parse_args(["--data", "X", *options])
        return [
            getattr(args, k)
            for k in (
                "width",
                "batch",
                "lr",
                "epochs",
                "lr_schedule",
                "warmup",
                "beta1",
                "weight_decay",
                "two_pass",
                "amp",
                "frames",
                "mask",
            )
        ]

    assert values() == [768, 128, 1e-4, 100, "cosine", 0.1, 0.9, 0.01, False, "auto", 1024, 400]
    assert values("--ssast-compat", "--preset", "small") == [
        384,
        24,
        1e-4,
        10,
        "plateau",
        1000,
        0.95,
        5e-7,
        True,
        "off",
        1024,
        400,
    ]
    args = pretrain_ast.parse_args(["--data", "X", "--task", "finetune"])
    assert (args.batch, args.epochs, args.pooling, args.grouped, args.optimizer) == (
        32,
        50,
        "meanstd",
        True,
        "adamw",
    )
    args = pretrain_ast.parse_args(["--data", "X", "--lr", "1", "--warmup", "0.1"])
    assert [pretrain_ast.lr_at(s, args, 100) for s in (0, 9, 10, 55, 100)] == pytest.approx(
        [0.1, 1, 1, 0.5, 0]
    )


def test_init_takes_the_encoder(run, tmp_path):
    out = run("--name first --max-steps 1")
    args = pretrain_ast.parse_args(
        [
            "--data",
            "X",
            "--task",
            "finetune",
            *TINY,
            "--frames",
            "48",
            "--init",
            str(Path(out["folder"]) / "best.pt"),
        ]
    )
    before, after = load_checkpoint(args.init)[0].state_dict(), pretrain_ast.build_model(args)
    assert after.model_args["num_outputs"] == 19
    for name in ("embed.weight", "blocks.0.qkv.weight", "norm.bias"):
        assert torch.equal(before[name], after.state_dict()[name])
    with pytest.raises(data.DataError, match="expected --resume"):
        pretrain_ast.build_model(pretrain_ast.parse_args(["--data", "X", "--init", args.init]))
    (tmp_path / "bad.pt").write_bytes(b"no")
    args.init = str(tmp_path / "bad.pt")
    with pytest.raises(data.DataError, match=r"bad.pt: unreadable"):
        pretrain_ast.build_model(args)


def test_init_reads_ssast(tmp_path):
    W, state = 64, {}
    shapes = {
        "cls_token": (1, 1, W),
        "dist_token": (1, 1, W),
        "pos_embed": (1, 2 + 8 * 8, W),
        "patch_embed.proj.weight": (W, 1, 16, 16),
        "patch_embed.proj.bias": (W,),
        "norm.weight": (W,),
        "norm.bias": (W,),
    }
    for name, out, into in (
        ("attn.qkv", 3 * W, W),
        ("attn.proj", W, W),
        ("mlp.fc1", 4 * W, W),
        ("mlp.fc2", W, 4 * W),
    ):
        shapes |= {f"blocks.0.{name}.weight": (out, into), f"blocks.0.{name}.bias": (out,)}
    shapes |= {f"blocks.0.norm{k}.{part}": (W,) for k in (1, 2) for part in ("weight", "bias")}
    torch.manual_seed(1)
    state = {f"module.v.{name}": torch.randn(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "ssast.pth")
    model = pretrain_ast.build_model(
        pretrain_ast.parse_args(
            ["--data", "X", "--task", "finetune", "--frames", "64", "--init", str(tmp_path / "ssast.pth")]
        )
    )
    assert torch.equal(model.blocks[0].qkv.weight, state["module.v.blocks.0.attn.qkv.weight"])
    assert (
        model.model_args["ssast_compat"],
        model.model_args["num_outputs"],
        model.model_args["frames"],
        model.model_args["pooling"],
    ) == (True, 19, 64, "meanstd")


def test_layer_decay_scales_from_the_head_down():
    args = pretrain_ast.parse_args(
        [
            "--data",
            "X",
            "--task",
            "finetune",
            *TINY,
            "--depth",
            "2",
            "--layer-decay",
            "0.5",
            "--weight-decay",
            "0.1",
        ]
    )
    model = pretrain_ast.build_model(args)
    names, groups = (
        {id(p): name for name, p in model.named_parameters()},
        pretrain_ast.parameter_groups(model, args),
    )
    scale = {names[id(p)]: (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert scale.keys() == dict(model.named_parameters()).keys()
    assert [
        scale[k]
        for k in (
            "embed.weight",
            "position.freq",
            "blocks.0.qkv.weight",
            "blocks.1.fc1.bias",
            "norm.weight",
            "head.read.0.weight",
        )
    ] == [(0.125, 0.1), (0.125, 0), (0.25, 0.1), (0.5, 0), (1, 0), (1, 0.1)]


def test_augmentation_counts_for_its_groups_only():
    args = pretrain_ast.parse_args(
        ["--data", "X", "--task", "finetune", "--augment-groups", "tempo=timbre,expression", "noise=timing"]
    )
    timing, dynamics, timbre, expression = data.label_groups()
    limits = pretrain_ast.augmentation_limits(args)
    assert sorted(np.flatnonzero(limits["tempo"])) == sorted(timbre + expression)
    assert sorted(np.flatnonzero(limits["noise"])) == sorted(timing)
    assert limits["mixup"].all()
    item = {
        "name": "a",
        "fbank": np.zeros((90, 128), np.float16),
        "frames": 90,
        "y": np.full(19, 0.5, np.float32),
    }
    clips = pretrain_ast.Clips([[item, item | {"name": "a@1.05+0"}]], [(1.05, 0)], args)
    drawn = [clips[epoch, 0] for epoch in range(30)]
    assert {(c["name"], int(c["weight"].sum())) for c in drawn} == {
        ("a", 19),
        ("a@1.05+0", len(timbre + expression)),
    }
    args.noise = 1.0
    torch.manual_seed(1)
    batch = {
        "x": torch.zeros(40, 20, 128),
        "y": torch.zeros(40, 19),
        "weight": torch.ones(40, 19),
        "lengths": torch.full((40,), 20),
    }
    out = pretrain_ast.augment(batch, args)
    changed = out["x"].abs().sum((1, 2)) > 0
    assert 8 < int(changed.sum()) < 32
    assert out["weight"].sum(1).tolist() == [float(len(timing)) if c else 19.0 for c in changed]
    with pytest.raises(data.DataError, match="tempo=nonsense"):
        pretrain_ast.parse_args(["--augment-groups", "tempo=nonsense"])


def test_masks_and_mixed_pairs():
    args = pretrain_ast.parse_args(["--data", "X", "--task", "finetune", "--spec-augment", "10", "5"])
    torch.manual_seed(1)
    batch = {
        "x": torch.ones(60, 20, 128),
        "y": torch.zeros(60, 19),
        "weight": torch.ones(60, 19),
        "lengths": torch.full((60,), 20),
    }
    hidden = pretrain_ast.augment(batch, args)["x"] == 0
    assert 0 < hidden.all(1).sum(1).max() <= 10
    assert 0 < hidden.all(2).sum(1).max() <= 5
    args = pretrain_ast.parse_args(["--data", "X", "--task", "finetune", "--mixup", "1"])
    value = torch.arange(8.0)
    batch = {
        "x": value.view(8, 1, 1).repeat(1, 4, 128),
        "y": value.view(8, 1).repeat(1, 19),
        "weight": torch.ones(8, 19),
        "lengths": torch.tensor([4, 1, 2, 3, 4, 1, 2, 3]),
    }
    out = pretrain_ast.augment(batch, args)
    assert torch.allclose(out["x"][:, 0, 0], out["y"][:, 0])
    assert not torch.equal(out["y"], batch["y"])
    assert (out["lengths"] >= batch["lengths"]).all()


def test_groups_hold_every_rating_once():
    assert sorted(sum(data.LABEL_GROUPS.values(), ())) == sorted(data.LABELS)
    assert [len(group) for group in data.label_groups()] == [2, 7, 4, 6]
    corpus = type(
        "",
        (),
        {
            "items": {
                k: {"y": np.full(19, v, np.float32) * np.arange(1, 20)} for k, v in (("a", 0.0), ("b", 0.05))
            }
        },
    )
    fitted = data.fit_targets(corpus, ["a", "b"])
    assert fitted["target_mean"] == pytest.approx(0.025 * np.arange(1, 20))
    assert fitted["target_std"] == pytest.approx(0.025 * np.arange(1, 20))
    by_group = data.fit_targets(corpus, ["a", "b"], "group")["target_std"]
    assert by_group[0] == by_group[11] == pytest.approx(0.025 * math.sqrt((1 + 144) / 2))
    assert data.fit_targets(corpus, ["a", "b"], "none") == {
        "target_mean": [0.0] * 19,
        "target_std": [1.0] * 19,
    }


@pytest.fixture(scope="session")
def percepiano(tmp_path_factory):
    """Three performances of a few notes in PercePiano's layout; no labels, no scores."""
    import mido

    root = tmp_path_factory.mktemp("percepiano") / "corpus"
    folder = root / "virtuoso/data/all_2rounds"
    folder.mkdir(parents=True)
    for k, player in enumerate((1, 2, 3)):
        track = mido.MidiTrack()
        for pitch in (60, 64, 67, 72):
            track.append(mido.Message("note_on", note=pitch, velocity=50 + 10 * k, time=10))
            track.append(mido.Message("note_off", note=pitch, time=240))
        midi = mido.MidiFile(tracks=[track])
        midi.save(folder / f"Schubert_D960_mv2_8bars_{player}_05.mid")
    return root


def test_audio_of_percepiano_with_variants(percepiano, tmp_path, monkeypatch):
    store = data.percepiano_audio(percepiano, tmp_path, variants=[(0.8, 0), (1, 2)], workers=1, quiet=True)
    names = [f"Schubert_D960_mv2_8bars_{k}_05" for k in (1, 2, 3)]
    assert store.names == names + [f"{n}@0.8+0" for n in names] + [f"{n}@1+2" for n in names]
    waveform = data.render(data.read_midi(percepiano / f"virtuoso/data/all_2rounds/{names[1]}.mid"))
    assert np.array_equal(store.get(1), data.fbank(torch.from_numpy(waveform)).half().float().numpy())
    assert 1.05 < store.frames[4] / store.frames[1] < 1.26
    assert store.get(7).mean(0).argmax() > store.get(1).mean(0).argmax()
    monkeypatch.setattr(data, "render", None)
    again = data.percepiano_audio(percepiano, tmp_path, variants=[(1, 2)], quiet=True)  # from the cache
    assert np.array_equal(again.get(4), store.get(7))
    with pytest.raises(data.DataError, match="variants of recordings"):
        data.percepiano_audio(percepiano, tmp_path, audio=tmp_path, variants=[(1, 2)])


def test_audio_of_percepiano_from_recordings(percepiano, tmp_path):
    x = (np.random.default_rng(7).normal(0, 0.1, 16000)).astype(np.float32)
    data.write_wav(tmp_path / "wav/Schubert_D960_mv2_8bars_2_05.wav", x)
    store = data.percepiano_audio(percepiano, tmp_path, audio=tmp_path / "wav", workers=1, quiet=True)
    assert (store.names, store.frames.tolist(), len(store.left_out)) == (
        ["Schubert_D960_mv2_8bars_2_05"],
        [98],
        2,
    )
    data.write_wav(tmp_path / "other/a.wav", x)
    with pytest.raises(data.DataError, match="no WAV file named as a performance"):
        data.percepiano_audio(percepiano, tmp_path, audio=tmp_path / "other")


def test_parts_of_a_plain_folder_hold_whole_segments(tmp_path):
    names = [
        f"Schubert_D960_mv2_8bars_{player}_{segment:02d}" for segment in range(1, 9) for player in (1, 2, 3)
    ]
    store = data.AudioStore("", True, names, np.full(len(names), 99), [""] * len(names), [], [])
    parts = data.pretrain_parts(store)
    train, valid = ({data.segment_of(names[i]) for i in parts[part]} for part in ("train", "valid"))
    assert (len(train & valid), len(valid), len(parts["train"]) + len(parts["valid"])) == (0, 2, 24)
    store.split = ["train", "validation", "unknown", "test"] * 6
    assert [names[i] for i in data.pretrain_parts(store)["valid"]] == names[1::4]
    with pytest.raises(data.DataError, match="no recording to train with"):
        data.pretrain_parts(data.AudioStore("x", True, ["a"], np.array([99]), [""], [], []))


def test_exclude_overlap_leaves_recordings_out(tmp_path, maestro, monkeypatch, capsys):
    monkeypatch.setattr(
        data,
        "maestro_overlaps",
        lambda m, folder, pieces, **_: (
            {"2004/r5": ["x"], "2004/r7": ["y"]} if pieces and folder == "P" else {}
        ),
    )
    args = pretrain_ast.parse_args(
        ["--data", str(maestro), "--cache", str(tmp_path), *TINY, "--exclude-overlap", "P"]
    )
    train, valid, info = pretrain_ast.pretrain_data(args, True, print)
    assert {train.store.names[i] for i in train.recordings} == {f"2004/r{k}" for k in range(5)}
    assert {name.partition("@")[0] for batch in valid for name in batch["names"]} == {"2004/r6"}
    assert "2 recordings of PercePiano's music left out: 2004/r5, 2004/r7" in capsys.readouterr().out
    assert info["exclude_overlap"]


@pytest.mark.parametrize("network", [CNN, PooledMLP])
def test_baselines_ignore_padding_and_batch_mates(network):
    torch.manual_seed(1)
    model, x = network(width=8).eval(), torch.randn(2, 75, 128)
    alone, whole = model(x[:1, :37]), model(x)
    padded = torch.cat([x[:1, :37], torch.full((1, 38, 128), -9.0)], dim=1)
    joined = model(torch.cat([padded, x[1:]]), torch.tensor([37, 75]))
    assert torch.allclose(joined[:1], alone, atol=1e-5)
    assert torch.allclose(joined[1:], whole[1:], atol=1e-5)
    assert joined.shape == (2, 19)
    model.train()(x).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.parameters())


def test_pooled_statistics_are_numpys():
    model, seen = PooledMLP(width=8), []
    model.head.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    x = np.random.default_rng(7).normal(0, 1, (1, 50, 128)).astype(np.float32)
    model(torch.from_numpy(x), torch.tensor([40]))
    x = x[0, :40]
    expected = np.concatenate(
        [x.mean(0), x.std(0), x.min(0), x.max(0), np.abs(np.diff(x, axis=0)).mean(0), [math.log(0.4)]]
    )
    assert seen[0].shape == (1, 641)
    assert np.allclose(seen[0][0].detach().numpy(), expected, atol=1e-5)


def test_fitted_statistics_have_mean_0_and_deviation_1_and_a_bad_clip_counts_for_nothing():
    table, generator = ClipStatistics(), torch.Generator().manual_seed(3)
    x, lengths = torch.randn(12, 40, 128, generator=generator), torch.arange(17, 41, 2)
    x[5, 3] = torch.nan
    table.fit([(x[:8], lengths[:8]), (x[8:], lengths[8:])])
    z = (table.values(x, lengths) - table.mean)[torch.arange(12) != 5] / table.std
    assert float(z.mean(0).abs().max()) < 1e-3
    assert torch.allclose(z.std(0), torch.ones(641), atol=1e-3)


def test_heads_with_statistics_see_the_clip_beside_the_tokens():
    torch.manual_seed(2)
    model = AST(
        64,
        width=8,
        depth=1,
        heads=1,
        dropout=0.0,
        num_outputs=19,
        pooling="meanstd",
        statistics=True,
        groups=data.label_groups(),
    ).eval()
    x, seen = torch.randn(2, 64, 128), []
    model.head.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    model(x)
    assert torch.equal(seen[0][:, 16:], model.statistics(x))
    plain = adapt_ast(
        AST(64, width=8, depth=1, heads=1, visible_only=True),
        num_outputs=19,
        visible_only=False,
        statistics=True,
    )
    assert plain.head[1].in_features == 8 + 641


def test_amp_probe_runs_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    assert 0 < pretrain_ast.probe_amp("off", torch.device("cpu"), 32, 2) < 60
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_two_processes_pretrain_as_one(maestro, run, tmp_path):
    options = "--batch {} --max-steps 3 --clip inf --warmup 0 --micro-batch 2 --lr 1e-2 --frames 100 --valid-crops 2".split()
    (tmp_path / "entry.py").write_text("""import sys, torch, pretrain_ast as t
torch.set_num_threads(1)
t.cluster_mask = lambda batch, *a, columns=None: (torch.arange(10) * 4)[None].repeat(batch, 1)  # each process draws its own
t.main(t.parse_args(sys.argv[1:]))""")
    shared = ["--data", str(maestro), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path), *TINY]
    for world, batch in ((1, 8), (2, 4)):
        argv = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(world),
            str(tmp_path / "entry.py"),
            *shared,
            *" ".join(options).format(batch).split(),
            "--name",
            f"world{world}",
        ]
        done = subprocess.run(
            argv,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"world{k}/last.pt", weights_only=True)["model"] for k in (1, 2))
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 2e-4
