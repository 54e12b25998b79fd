"""pretrain_ast.py beyond what test_train.py asks of every trainer; audio of PercePiano; baselines."""

import csv
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused

import data
import eval as evaluation
import pretrain_ast
from models import AST, CNN, QUANTILES, ClipStatistics, PooledMLP, load_checkpoint

TINY = (
    "--device cpu --width 16 --depth 1 --heads 2 --frames 64 --batch 4 --epochs 1 --workers 0 --amp off "
    "--log-every 1 --dropout 0"
).split()
KINDS = ("none", "uncertainty", "dwa")


def options(argv):
    """The trainer's options for a tiny network."""
    return pretrain_ast.parse_args(["--data", "X", *TINY, *argv.split()])


def built(argv):
    """The network that the trainer starts from."""
    args = options(argv)
    return pretrain_ast.build_model(args, *pretrain_ast.load_start(args))


def tuning(argv=""):
    return pretrain_ast.parse_args(["--data", "X", "--task", "finetune", *argv.split()])


@pytest.fixture(scope="session")
def maestro(tmp_path_factory):
    """Eight recordings of noise and tones in MAESTRO's layout: 2, 3, 4, ... s; the last two validate."""
    root, rng = tmp_path_factory.mktemp("maestro"), np.random.default_rng(7)
    (root / "2004").mkdir()
    with (root / "maestro-v3.0.0.csv").open("w", newline="") as f:
        table = csv.writer(f)
        names = "canonical_composer canonical_title split year midi_filename audio_filename duration"
        table.writerow(names.split())
        for k in range(8):
            t = np.arange(16000 * (k + 2)) / 16000
            x = 0.2 * np.sin(2 * np.pi * 110 * (k + 1) * t) * np.exp(-3 * (t % 0.5))
            data.write_wav(root / f"2004/r{k}.wav", x + rng.normal(0, 0.02, len(t)))
            part = "train" if k < 6 else "validation"
            table.writerow(["C", f"T{k}", part, 2004, f"2004/r{k}.midi", f"2004/r{k}.wav", k + 2])
    return root


@pytest.fixture
def run(maestro, tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "pretrain"
    folders = f"--data {maestro} --cache {cache} --out {tmp_path / 'runs'} "
    return lambda argv: pretrain_ast.main(options(folders + argv))


def records(out):
    return [json.loads(line) for line in (Path(out["folder"]) / "metrics.jsonl").read_text().splitlines()]


def clips(B, T, value=0.0):
    """A batch of fine-tuning."""
    batch = {"x": torch.full((B, T, 128), value), "y": torch.zeros(B, 19), "weight": torch.ones(B, 19)}
    return batch | {"lengths": torch.full((B,), T), "names": [str(k) for k in range(B)]}


@pytest.mark.parametrize("lengths", [[64, 48, 64, 32, 40]])
@pytest.mark.parametrize("argv", ["", "--visible-only", *(f"--task finetune --balance {k}" for k in KINDS)])
def test_accumulated_gradients_equal_one_batch(argv, lengths):
    torch.manual_seed(1)
    args = options(argv)
    model = built(argv)
    batch = {"x": torch.randn(5, 64, 128), "lengths": torch.tensor(lengths), "names": [*"abcde"]}
    batch |= {"y": torch.randn(5, 19), "weight": (torch.rand(5, 19) < 0.7).float()}
    loss_of = pretrain_ast.finetune_loss
    if args.task == "pretrain":
        batch = evaluation.with_masks(batch, args.mask)
        loss_of = pretrain_ast.pretrain_loss
    gradients = []
    for size in (5, 2):
        model.zero_grad()
        for part, share, _ in pretrain_ast.micro_batches(batch, size, model):
            (loss_of(model, part, args, [1.5, 0.5, 1.2, 0.8])[0] * share).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-5 * float(gradients[0].abs().max())


def test_losses_by_hand():
    class Fixed(torch.nn.Module):
        log_variance = torch.tensor([0.0, math.log(2), 0.0, 0.0])

        def forward(self, x, lengths):
            return torch.zeros(2, 19)

    batch, args = clips(2, 16), tuning()
    batch["y"][0, data.label_groups()[0]] = 2.0  # group 0: error 4 on two ratings
    batch["y"][1, data.label_groups()[1]] = 1.0  # group 1: error 1 on seven
    losses, figures = pretrain_ast.finetune_loss(Fixed(), batch, args, [])[1:]
    assert losses.tolist() == pytest.approx([8 / 19, 7 / 19])
    assert figures["groups"].tolist() == pytest.approx([2, 0.5, 0, 0])
    learned = [(4 + math.log(2)) / 4, (0.5 + math.log(2)) / 4]
    for args.balance, expected in (("uncertainty", learned), ("dwa", [0.5, 0.5])):
        losses = pretrain_ast.finetune_loss(Fixed(), batch, args, [0.5, 2, 1, 1])[1]
        assert losses.tolist() == pytest.approx(expected)


def test_dynamic_weights_by_hand():
    first = pretrain_ast.reweigh({"weights": [1] * 4, "sums": [4.0, 2.0, 2.0, 2.0], "count": 2, "before": []})
    assert first == {"weights": [1, 1, 1, 1], "sums": [0] * 4, "count": 0, "before": [2, 1, 1, 1]}
    second = pretrain_ast.reweigh(first | {"sums": [2.0, 1.0, 1.0, 2.0], "count": 1})["weights"]
    share = np.exp(np.array([1, 1, 1, 2]) / 2)
    assert second == pytest.approx(4 * share / share.sum())


@pytest.mark.slow
def test_figures_stand_beside_guessing_and_eval_repeats_them(run, maestro, tmp_path, capsys):
    out = run("--name report --lr 3e-3 --epochs 4")
    valid = [r for r in records(out) if "valid_loss" in r]
    assert all(r["valid_chance"] == pytest.approx(1 / 25) for r in valid)  # 400 of 512 are 25 of 32
    assert len({r["valid_mse_mean"] for r in valid}) == 1  # the same crops and masks at each evaluation
    for r in valid:
        assert r["valid_loss"] == pytest.approx(r["valid_nce"] + 10 * r["valid_mse"], rel=1e-5)
    assert valid[-1]["valid_nce"] < math.log(25)
    best = str(Path(out["folder"]) / "best.pt")
    ckpt = load_checkpoint(best)[1]
    assert [ckpt["data"][key] for key in ("task", "frames", "synthetic")] == ["pretrain", 64, False]

    argv = ["--ckpt", best, "--device", "cpu", "--cache", str(tmp_path / "cache"), "--data"]
    measured = evaluation.main([*argv, str(maestro)])
    for key in ("loss", "nce", "accuracy", "chance", "mse", "mse_mean"):
        assert measured[f"valid_{key}"] == pytest.approx(out[f"valid_{key}"], rel=1e-5)
    refused(lambda: evaluation.main(["--ckpt", best]), capsys, best, "--data")


def test_normalisation_is_the_recordings_own(run, maestro):
    def norm(argv):
        info = load_checkpoint(Path(run(f"--max-steps 1 {argv}")["folder"]) / "last.pt")[1]["data"]
        return info["mean"], info["std"]

    waves = [torch.from_numpy(data.read_sound(maestro / f"2004/r{k}.wav")[0]) for k in range(6)]
    x = np.concatenate([data.front_end(data.fbank(wave)).half().float().numpy() for wave in waves])
    assert norm("--name own --frames 1024") == pytest.approx((x.mean(), x.std()), abs=1e-3)
    assert norm("--name audioset --audioset-norm") == (data.FBANK_MEAN, data.FBANK_STD)


def test_online_changes_the_waveform_of_training_crops_only(maestro):
    store = data.open_audio(maestro)
    plain, loud, again = (data.Crops(store, [0, 1], 64, 7, v)[1, 0]["fbank"] for v in (False, True, True))
    assert plain.shape == loud.shape == (64, 128)
    assert np.array_equal(loud, again)
    assert np.abs(loud - plain).max() > 0.1


def test_patience_stops_and_plateau_halves(run, monkeypatch):
    figures = iter([3.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    monkeypatch.setattr(pretrain_ast, "validate", lambda *a: {"valid_loss": next(figures)})
    monkeypatch.setattr(pretrain_ast, "summary", str)
    out = run("--name early --eval-every 1 --patience 4 --lr-schedule plateau --warmup 0 --lr 1e-3")
    lines = [r for r in records(out) if "valid_loss" in r]
    assert (out["step"], lines[-1]["step"]) == (2, 6)
    assert [r["lr"] for r in lines] == pytest.approx([1e-3] * 5 + [5e-4])


def test_recipes_are_defaults():
    names = "width batch lr epochs lr_schedule warmup beta1 weight_decay amp frames mask".split()
    args = tuning("--task pretrain")
    ours = [768, 128, 1e-4, 100, "cosine", 0.1, 0.9, 0.01, "auto", 1024, 400]
    assert [getattr(args, name) for name in names] == ours
    args = tuning("--task pretrain --ssast-compat --preset small")
    original = [384, 24, 1e-4, 10, "plateau", 1000, 0.95, 5e-7, "off", 1024, 400]
    assert [getattr(args, name) for name in names] == original
    args = tuning("--lr 1 --warmup 0.1")
    rates = [pretrain_ast.lr_at(step, args, 100) for step in (0, 9, 10, 55, 100)]
    assert rates == pytest.approx([0.1, 1, 1, 0.5, 0])


def test_exclude_overlap_leaves_recordings_out(tmp_path, maestro, monkeypatch, capsys):
    def overlaps(maestro, folder, *_, **__):
        return ({"2004/r5": ["x"]}, {"2004/r7": ["y"]}) if folder == "P" else ({}, {})

    monkeypatch.setattr(data, "maestro_overlaps", overlaps)
    args = options(f"--exclude-overlap P --data {maestro} --cache {tmp_path}")
    train, valid, info = data.pretrain_data(args, True, print)
    assert {train.store.names[i] for i in train.recordings} == {f"2004/r{k}" for k in range(5)}
    assert {name.partition("@")[0] for batch in valid for name in batch["names"]} == {"2004/r6"}
    assert "2 recordings of PercePiano's music left out: 2004/r5, 2004/r7" in capsys.readouterr().out
    assert info["exclude_overlap"]


def test_parts_of_a_plain_folder_hold_whole_segments():
    names = [f"Schubert_D960_mv2_8bars_{k % 3 + 1}_{k // 3 + 1:02d}" for k in range(24)]
    store = SimpleNamespace(root="x", names=names, split=[""] * 24)
    parts = data.pretrain_parts(store)
    train, valid = ({data.segment_of(names[i]) for i in parts[part]} for part in ("train", "valid"))
    assert (len(train & valid), len(valid), len(parts["train"]) + len(parts["valid"])) == (0, 2, 24)
    store.split = ["train", "validation", "unknown", "test"] * 6
    assert [names[i] for i in data.pretrain_parts(store)["valid"]] == names[1::4]


@pytest.mark.slow
def test_a_pretraining_in_half_the_size_scores_alike(run, tmp_path):
    folder = Path(run("--name first --max-steps 1 --ema 0.9")["folder"])
    data_of = json.loads((folder / "args.json").read_text())
    argv = ["--data", data_of["data"], "--cache", data_of["cache"], "--device", "cpu"]
    small = str(tmp_path / "small.pt")
    figures = evaluation.main(["--ckpt", str(folder / "best.pt"), *argv, "--out", small])
    again = evaluation.main(["--ckpt", small, *argv])
    assert again["valid_nce"] == pytest.approx(figures["valid_nce"], abs=1e-3)
    assert Path(small).stat().st_size < 0.7 * (folder / "best.pt").stat().st_size
    assert str(tmp_path).encode() not in Path(small).read_bytes()
    assert built(f"--task finetune --init {small}").model_args["frames"] == 64


def test_init_takes_the_encoder(run, tmp_path, capsys):
    best = str(Path(run("--name first --max-steps 1")["folder"]) / "best.pt")
    before = load_checkpoint(best)[0].state_dict()
    after = built(f"--task finetune --frames 48 --init {best}")
    assert after.model_args["num_outputs"] == 19
    for name in ("embed.weight", "blocks.0.qkv.weight", "norm.bias"):
        assert torch.equal(before[name], after.state_dict()[name])
    (tmp_path / "bad.pt").write_bytes(b"no")
    torch.save(torch.tensor(1.0), tmp_path / "one.pth")
    torch.save({"module.v.patch_embed.proj.bias": torch.ones(64)}, tmp_path / "ssast.pth")
    for argv, *names in (
        (f"--init {best}", best, "--resume"),
        (f"--task finetune --init {tmp_path / 'bad.pt'}", "bad.pt"),
        (f"--task finetune --init {tmp_path / 'ssast.pth'}", "ssast.pth: SSAST weights"),
        (f"--task finetune --init {tmp_path / 'one.pth'}", "one.pth"),
        ("--model mlp", "--model mlp"),
        ("--augment-groups tempo=nonsense", "tempo=nonsense"),
    ):
        refused(lambda: built(argv), capsys, *names)  # noqa: B023


def test_frozen_heads_learn_from_whole_clips():
    """While the encoder is frozen, what `describe_clip` made of a version; then its crops."""
    torch.manual_seed(1)
    sizes = {"frames": 64, "width": 16, "depth": 1, "heads": 2}
    model = AST(**sizes, num_outputs=19, statistics=True, dropout=0.5)
    rng, info = np.random.default_rng(1), {"mean": -4.0, "std": 3.0, "target_mean": [0.0] * 19}
    info["target_std"] = [1.0] * 19
    versions = [[{"name": f"{k}{at}", "frames": 150} for at in ("", "@copy1")] for k in range(3)]
    for item in itertools.chain(*versions):
        item["fbank"] = rng.normal(-4, 3, (150, 128)).astype(np.float16)
        item["y"] = item["weight"] = np.ones(19, np.float32)
        clip = evaluation.whole_clip(item, info)
        item["statistics"] = model.statistics.values(clip)[0].numpy()
    train = pretrain_ast.Clips(versions, 64, seed=7, crops=2, freeze=1)
    values = [item["statistics"] for item in itertools.chain(*versions)]
    model.statistics.fit(torch.tensor(np.stack(values)))
    train.described = pretrain_ast.frozen_descriptions(model, train, info, quiet=True)
    assert model.training
    assert len(train.described) == 6
    items = [train[0, k] for k in range(3)]
    batch = data.on_device(data.collate_ast(items, info), info, torch.device("cpu"))
    assert "x" not in batch
    chosen = {item["name"]: item for item in itertools.chain(*versions)}
    model.eval()
    for name, seen in zip(batch["names"], batch["described"], strict=True):
        assert (seen - evaluation.describe_clip(model, chosen[name], info)[0]).abs().max() < 1e-5
    loss, by_clip, _ = pretrain_ast.finetune_loss(model, batch, tuning(), [])
    expected = (model(described=batch["described"]) - 1).square().mean(1)
    assert torch.allclose(by_clip, expected)
    assert loss == by_clip.mean()
    assert train[1, 0]["fbank"].shape == (2, 64, 128)


def test_layer_decay_scales_from_the_head_down():
    argv = "--task finetune --depth 2 --layer-decay 0.5 --weight-decay 0.1"
    args, model = options(argv), built(argv)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = pretrain_ast.parameter_groups(model, args)
    found = {names[id(p)]: (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == set(names.values())
    chosen = "embed.weight position.freq blocks.0.qkv.weight blocks.1.fc1.bias norm.weight head.read.0.weight"
    expected = [(0.125, 0.1), (0.125, 0), (0.25, 0.1), (0.5, 0), (0.5, 0), (1, 0.1)]
    assert [found[name] for name in chosen.split()] == expected
    heads = {names[id(p)] for g in groups for p in g["params"] if not g["encoder"]}
    assert heads == {name for name in names.values() if name.startswith("head.")}


def test_augmentation_counts_for_its_groups_only():
    args = tuning("--augment-groups tempo=timbre,expression noise=timing")
    timing, _, timbre, expression = data.label_groups()
    limits = pretrain_ast.augmentation_limits(args)
    assert sorted(np.flatnonzero(limits["tempo"])) == sorted(timbre + expression)
    assert sorted(np.flatnonzero(limits["noise"])) == sorted(timing)
    assert limits["mixup"].all()
    args.noise = 1.0
    torch.manual_seed(1)
    out = pretrain_ast.augment(clips(40, 20), args)
    changed = out["x"].abs().sum((1, 2)) > 0
    assert out["weight"].sum(1).tolist() == [float(len(timing)) if c else 19.0 for c in changed]


def test_masks_and_mixed_pairs():
    torch.manual_seed(1)
    hidden = pretrain_ast.augment(clips(60, 20, 1.0), tuning("--spec-augment 10 5"))["x"] == 0
    assert 0 < hidden.all(1).sum(1).max() <= 10
    assert 0 < hidden.all(2).sum(1).max() <= 5
    batch, value = clips(8, 4), torch.arange(8.0)
    batch |= {"x": value.view(8, 1, 1).repeat(1, 4, 128), "y": value.view(8, 1).repeat(1, 19)}
    batch["lengths"] = torch.tensor([4, 1, 2, 3, 4, 1, 2, 3])
    out = pretrain_ast.augment(batch, tuning("--mixup 1"))
    assert torch.allclose(out["x"][:, 0, 0], out["y"][:, 0])
    assert not torch.equal(out["y"], batch["y"])
    assert (out["lengths"] >= batch["lengths"]).all()


@pytest.mark.parametrize("network", [CNN, PooledMLP])
def test_baselines_ignore_padding_and_batch_mates(network):
    torch.manual_seed(1)
    model, x = network(width=8).eval(), torch.randn(2, 75, 128)
    alone, whole = model(x[:1, :37]), model(x)
    padded = torch.cat([x[:1, :37], torch.full((1, 38, 128), -9.0)], dim=1)
    joined = model(torch.cat([padded, x[1:]]), torch.tensor([37, 75]))
    assert torch.allclose(joined[:1], alone, atol=1e-5)
    assert torch.allclose(joined[1:], whole[1:], atol=1e-5)
    model.train()(x).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.parameters())


def test_statistics_are_numpys_and_standardised():
    x = np.random.default_rng(7).normal(0, 1, (1, 50, 128)).astype(np.float32)
    found = ClipStatistics().values(torch.from_numpy(x), torch.tensor([41]))
    x = x[0, :41]
    changes = np.abs(np.diff(x, axis=0)).mean(0)
    coarse = x.reshape(41, 32, 4).mean(2)
    steps = np.diff(coarse, axis=0)
    assert np.allclose(found[0, :384], np.concatenate([x.mean(0), x.std(0), x.max(0)]), atol=1e-5)
    expected = np.concatenate([changes, steps.clip(0).mean(0), steps.clip(None, 0).mean(0)])
    assert np.allclose(found[0, 384:576], expected, atol=1e-5)
    spread = found[0, 576:746].reshape(5, 34).numpy()
    expected = np.quantile(coarse, QUANTILES, axis=0, method="nearest")
    assert np.allclose(spread[:, :32], expected, atol=1e-5)
    power = np.exp(8 * x.astype(float))
    centroid = (power * np.linspace(0, 1, 128)).sum(1) / power.sum(1)
    assert spread[2, 33] == pytest.approx(np.sort(centroid)[20], abs=1e-5)
    bands = x.reshape(41, 16, 8).mean(2)
    change = [bands[t + 3 : t + 6].mean(0) - bands[t : t + 3].mean(0) for t in range(36)]
    expected = np.log(np.square(change).mean(0) + 1e-4)
    assert np.allclose(found[0, 746:762], expected, atol=1e-4)
    assert np.allclose(found[0, [-17, -1]], np.log([1e-4, 0.41]))  # too short for the longest; its seconds
    table, lengths = ClipStatistics(), torch.arange(17, 41, 2)
    x = torch.randn(12, 40, 128, generator=torch.manual_seed(3))
    table.fit(table.values(x, lengths))
    z = (table.values(x, lengths) - table.mean) / table.std
    assert float(z.mean(0).abs().max()) < 1e-3
    broken = torch.cat([table.values(x, lengths), torch.full((1, table.size), torch.nan)])
    other = ClipStatistics()
    other.fit(broken)
    assert torch.equal(other.std, table.std)
    other = ClipStatistics()
    other.fit(broken[-2:])  # one clip is left
    assert (other.forward(broken[-2:-1]) == 0).all()
    assert (other.std == 1).all()


def test_batches_go_to_the_device_as_stored():
    """float16, normalised there: as normalised float32; whole crops without a key mask, as with one."""
    rng = np.random.default_rng(1)
    items = [{"name": str(k), "fbank": rng.normal(-8, 3, (2, 64, 128)).astype(np.float16)} for k in range(3)]
    info = {"mean": -8.0, "std": 3.0}
    batch = data.collate_ast(items, info)
    assert (batch["x"].dtype, batch["x"].shape, batch["lengths"].shape) == (
        torch.float16,
        (3, 2, 64, 128),
        (3, 2),
    )
    x = data.on_device(batch, info, torch.device("cpu"))["x"]
    expected = data.normalise_fbank(np.stack([item["fbank"] for item in items]).astype(np.float32), -8.0, 3.0)
    assert np.abs(x.numpy() - expected).max() < 1e-6
    assert evaluation.lengths_if_unlike(batch) is None
    torch.manual_seed(1)
    model = built("--task finetune --pooling meanstd --depths 1 --no-statistics").eval()
    with torch.no_grad():
        assert torch.allclose(model(x), model(x, batch["lengths"]), atol=1e-5)
        tokens = model.tokens_of(x[1], None)[0][-1].flatten(0, 1)
        pooled = torch.cat([tokens.mean(0), (tokens.var(0, correction=0) + 1e-6).sqrt()])
        assert torch.allclose(model(x)[1], model.head(pooled[None])[0], atol=1e-5)


def test_targets_are_standardised_by_rating_or_by_group():
    assert sorted(" ".join(data.LABEL_GROUPS.values()).split()) == sorted(data.LABELS)
    y = np.arange(1, 20, dtype=np.float32)
    corpus = SimpleNamespace(items={"a": {"y": 0 * y}, "b": {"y": np.float32(0.05) * y}})
    fitted = data.fit_targets(corpus, ["a", "b"])
    assert fitted["target_mean"] == pytest.approx(0.025 * y)
    assert fitted["target_std"] == pytest.approx(0.025 * y)
    by_group = data.fit_targets(corpus, ["a", "b"], "group")["target_std"]
    assert by_group[0] == by_group[11] == pytest.approx(0.025 * math.sqrt((1 + 144) / 2))
