"""models.GRUDecoder against the public baseline's numbers and a plain rendition by single operations."""

import numpy as np
import pytest
import torch
from conftest import oracle_tensors, refused
from torch import Tensor, nn

import data
import train_decoder
from models import (
    GRUDecoder,
    gaussian_taps,
    gru_decoder_from_baseline,
    load_checkpoint,
    load_decoder,
    output_frames,
)

DIRECTIONS = {"uni": False, "bi": True}
C = 6


def small_decoder(**args) -> GRUDecoder:
    sizes = {"channels": C, "days": 3, "hidden": 8, "layers": 2, "kernel": 8, "stride": 2, "smooth_taps": 21}
    return GRUDecoder(**(sizes | args)).eval()


def make_batch(*lengths: int, beyond: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """x with `beyond` after the end of each trial, lengths, day."""
    x = torch.full((len(lengths), max(lengths), C), beyond)
    for i, T in enumerate(lengths):
        x[i, :T] = torch.randn(T, C, generator=torch.Generator().manual_seed(T))
    return x, torch.tensor(lengths), torch.arange(len(lengths)) % 3


def largest(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    """Largest difference of two arrays of the same shape."""
    a, b = (torch.as_tensor(v).detach().double() for v in (a, b))
    assert a.shape == b.shape
    return float((a - b).abs().max()) if a.numel() else 0.0


def under(prefix: str, oracle: dict) -> dict[str, Tensor]:
    """The tensors whose names begin so, without the beginning."""
    return {key.removeprefix(prefix): value for key, value in oracle.items() if key.startswith(prefix)}


def original_batch(oracle: dict) -> tuple[Tensor, Tensor, Tensor]:
    x = nn.utils.rnn.pad_sequence([oracle[f"trial{i}/x"][0] for i in range(3)], batch_first=True)
    return x, oracle["batch/x_len"], oracle["batch/day"]


@pytest.mark.parametrize("form", DIRECTIONS)
def test_logits_losses_and_strings_equal_the_baselines(form):
    oracle = oracle_tensors("gru_decoder.npz")
    model = gru_decoder_from_baseline(under(f"{form}/w/", oracle))
    together, counts = model(*original_batch(oracle))
    for i in range(3):
        trial = under(f"{form}/trial{i}/", oracle)
        x, target = oracle[f"trial{i}/x"], oracle[f"trial{i}/target"]
        length = torch.tensor([x.shape[1]])
        alone, frames = model(x, length, oracle[f"trial{i}/day"])
        assert frames.tolist() == [trial["n_frames_exact"]] == [counts[i]]
        assert largest(alone, trial["logits"]) < 1e-5
        assert largest(together[i, : frames[0]], trial["logits"][0]) < 1e-5  # alone or with others
        assert not together[i, frames[0] :].any()
        assert largest(model.smooth(x, length), oracle[f"trial{i}/smoothed"]) < 1e-6
        scores = alone.log_softmax(2)
        assert largest(scores, trial["log_probs"]) < 1e-5
        batch = {"labels": target[None], "label_lengths": torch.tensor([len(target)])}
        for kind, preset in (("exact", "default"), ("original", "baseline")):
            args = train_decoder.parse_args(["--data", "DIR", "--preset", preset])
            loss = train_decoder.batch_losses((alone, frames), batch, args)
            assert loss.item() == pytest.approx(trial[f"ctc_loss_{kind}"].item(), abs=1e-4)


def test_three_steps_of_the_baselines_optimiser():
    oracle = oracle_tensors("gru_decoder.npz")
    model = gru_decoder_from_baseline(under("uni/w/", oracle))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, eps=0.1, weight_decay=1e-5)
    (x, lengths, day), target = original_batch(oracle), oracle["uni/train/target_padded"]
    declared = (lengths - model.kernel) // model.stride  # one short of the frames: the baseline's habit
    losses = []
    for _ in range(4):
        scores = model(x, lengths, day)[0].log_softmax(2).transpose(0, 1)
        loss = nn.functional.ctc_loss(
            scores, target, declared, oracle["batch/target_len"], zero_infinity=True
        )
        losses.append(loss.item())
        if len(losses) < 4:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses == pytest.approx(oracle["uni/train/losses"].tolist(), abs=1e-4)
    trained = under("uni/w/", oracle) | under("uni/train/w_after/", oracle)
    after = gru_decoder_from_baseline(trained)
    assert max(largest(model.state_dict()[k], v) for k, v in after.state_dict().items()) < 1e-5


def baseline_weights() -> dict[str, Tensor]:
    """A small network by the baseline's names, as DataParallel stores it, with its dead parameters."""
    plain = nn.GRU(C * 8, 8, 2)
    weights = {f"gru_decoder.{name}": value for name, value in plain.state_dict().items()}
    weights |= {"dayWeights": torch.eye(C).repeat(3, 1, 1), "dayBias": torch.randn(3, 1, C)}
    weights |= {"gaussianSmoother.weight": gaussian_taps(2.0, 20).repeat(C, 1, 1)}
    weights |= {"fc_decoder_out.weight": torch.randn(41, 8), "fc_decoder_out.bias": torch.randn(41)}
    return {f"module.{name}": value for name, value in weights.items()} | {"inpLayer0.weight": torch.ones(2)}


@pytest.mark.parametrize(
    ("name", "value"),
    [("dayBias", None), ("extra.weight", torch.ones(1)), ("gru_decoder.bias_hh_l1", torch.ones(5))],
)
def test_foreign_baseline_weights_are_refused(name, value, capsys):
    weights = baseline_weights() | {f"module.{name}": value}
    given = {k: v for k, v in weights.items() if v is not None}
    refused(lambda: gru_decoder_from_baseline(given), capsys, "ecoder weights: ", name)


@pytest.mark.parametrize("form", DIRECTIONS)
@pytest.mark.parametrize(("kernel", "stride"), [(14, 4), (8, 8), (3, 5)])
def test_frames_are_exact_for_every_length(kernel, stride, form):
    lengths = torch.arange(201)
    counts = [len(range(0, T - kernel + 1, stride)) for T in range(201)]  # windows that fit
    assert output_frames(lengths, kernel, stride).tolist() == counts
    model = GRUDecoder(1, 1, 2, 1, 3, kernel, stride, smooth_width=0.0, bidirectional=DIRECTIONS[form]).eval()
    x, day = torch.randn(201, 200, 1), torch.zeros(201, dtype=torch.long)
    logits, frames = model(x, lengths, day)
    assert frames.tolist() == counts
    assert logits.any(2).sum(1).tolist() == counts
    for T in (0, 1, kernel - 1, kernel, kernel + 1, kernel + stride, 200):
        alone, count = model(x[T : T + 1, : max(T, 1)], lengths[T : T + 1], day[:1])
        assert count.tolist() == [counts[T]]
        assert largest(alone[0], logits[T, : counts[T]]) < 1e-6


@pytest.mark.parametrize("form", DIRECTIONS)
def test_a_trial_does_not_see_its_batch_mates_or_padding(form):
    model = small_decoder(bidirectional=DIRECTIONS[form], layer_norm=True)
    lengths = (30, 9, 61, 8, 7, 44)
    x, counts, day = make_batch(*lengths)
    logits, frames = model(x, counts, day)
    for beyond in (1e4, torch.nan):
        other = make_batch(*lengths, beyond=beyond)
        assert torch.equal(model(nn.functional.pad(other[0], (0, 0, 0, 5)), *other[1:])[0], logits)
    for i, T in enumerate(lengths):
        alone = model(x[i : i + 1, :T], counts[i : i + 1], day[i : i + 1])[0]
        assert largest(logits[i, : frames[i]], alone[0]) < 1e-6


def test_smoothing_stays_inside_the_trial():
    x, lengths, _ = make_batch(12, 30, beyond=100.0)
    for taps, width in ((20, 2.0), (21, 2.0), (4, 0.5)):
        model = small_decoder(smooth_taps=taps, smooth_width=width)
        smooth, kernel = model.smooth(x, lengths), model.smoothing.double().numpy()
        for i, T in enumerate(lengths):
            for c in range(C):
                whole = np.convolve(x[i, :T, c].double().numpy(), kernel)
                assert largest(smooth[i, :T, c], whole[taps // 2 : taps // 2 + T]) < 1e-5
    assert gaussian_taps(2.0, 21).argmax() == 10
    assert gaussian_taps(2.0, 21).sum().item() == pytest.approx(1.0, abs=1e-6)
    unsmoothed = small_decoder(smooth_width=0.0).smooth(x[:, :12], lengths.clip(max=12))
    assert torch.equal(unsmoothed, x[:, :12])


@pytest.mark.parametrize("form", DIRECTIONS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_autocast_on_cpu_stays_near_float32(dtype, close, form):
    model = small_decoder(bidirectional=DIRECTIONS[form], kernel=16, hidden=16, layer_norm=True)
    batch = make_batch(60, 40, 7)
    expected = model(*batch)[0]
    with torch.autocast("cpu", dtype):
        logits = model(*batch)[0]
    assert logits.dtype == torch.float32
    assert largest(logits, expected) < close
    logits.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("form", DIRECTIONS)
def test_cuda_agrees_with_cpu(form):
    model = small_decoder(bidirectional=DIRECTIONS[form], layer_norm=True)
    x, lengths, day = make_batch(60, 40, 7)
    expected = model(x, lengths, day)[0]
    assert largest(model.cuda()(x.cuda(), lengths, day)[0].cpu(), expected) < 2e-3  # cuDNN may use TF32
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(x.cuda(), lengths.cuda(), day.cuda())[0]
    assert largest(logits.cpu(), expected) < 0.05
    assert model(x[2:].cuda(), lengths[2:], day[2:])[0].shape == (1, 0, 41)


@pytest.mark.parametrize("lengths", [(60, 33, 20), (7, 0)])
def test_every_parameter_receives_a_gradient(lengths):
    model = small_decoder(bidirectional=True, layer_norm=True).train()
    x, counts, _ = make_batch(*lengths)
    logits, frames = model(x, counts, torch.arange(len(lengths)))
    logits.square().sum().backward()
    moved = [bool(p.grad.abs().max() > 0) for p in model.parameters()]
    assert moved == [bool(frames.any())] * len(moved)  # zeros, not None, where no trial has a frame
    assert logits.shape == (len(lengths), max(frames), 41)


def test_start_values():
    model = small_decoder(bidirectional=True)
    assert torch.equal(model.dayWeights, torch.eye(C).expand(3, C, C))
    assert not model.dayBias.any()
    for name, weight in model.gru_decoder.named_parameters():
        if "weight_hh" in name:
            for gate in weight.detach().chunk(3):
                assert largest(gate @ gate.T, torch.eye(8)) < 1e-5
        elif "weight_ih" in name:
            bound = (6 / sum(weight.shape)) ** 0.5
            assert 0.95 * bound < weight.abs().max() <= bound


def test_unknown_day_takes_the_mean_of_the_day_layers():
    model, (x, lengths, _) = small_decoder(), make_batch(40, 40)
    with torch.no_grad():
        model.dayWeights += torch.randn(3, C, C)
        model.dayBias += torch.randn(3, 1, C)
    found = model(x, lengths, torch.tensor([-1, 2]))[0]
    one = small_decoder(days=1)
    mean = {name: getattr(model, name).mean(0, True) for name in ("dayWeights", "dayBias")}
    one.load_state_dict(model.state_dict() | mean)
    assert largest(one(x[:1], lengths[:1], torch.tensor([0]))[0], found[:1]) < 1e-6


# --- The '25 baseline ---


def test_logits_and_strings_equal_the_25_baselines():
    oracle25 = oracle_tensors("gru_baseline25.npz")
    model = gru_decoder_from_baseline(under("w/", oracle25), int(oracle25["cfg/patch_stride"]))
    assert largest(model.smoothing, oracle25["smooth/kernel"]) < 1e-6
    assert (model.model_args["dropout"], model.model_args["input_dropout"]) == (0.4, 0.2)
    for i in range(3):
        trial = under(f"trial{i}/", oracle25)
        logits, frames = model(trial["x"], torch.tensor([trial["x"].shape[1]]), trial["day"])
        assert frames.tolist() == [trial["n_frames"]]
        assert largest(logits, trial["logits"]) < 1e-5
        assert largest(logits, trial["logits_h0_zero"]) > 1


def test_two_updates_of_the_25_baselines_trainer():
    oracle25 = oracle_tensors("gru_baseline25.npz")
    args = train_decoder.parse_args(["--data", "DIR", "--preset", "baseline25"])
    model = gru_decoder_from_baseline(under("w/", oracle25), int(oracle25["cfg/patch_stride"]))
    x = nn.utils.rnn.pad_sequence([oracle25[f"trial{i}/x"][0] for i in range(3)], batch_first=True)
    whole = {name: oracle25[f"batch/{name}"] for name in ("x_len", "target_len", "day", "target_padded")}
    layers = model.separate_days()
    groups = train_decoder.parameter_groups(model, args, layers)
    optimizer = torch.optim.AdamW(groups, lr=float(oracle25["train/rate"]), eps=args.adam_eps)
    losses, norms = [], []
    for update, trials in enumerate((torch.arange(3), oracle25["train/step2_trials"], torch.arange(3))):
        batch = {"labels": whole["target_padded"][trials], "label_lengths": whole["target_len"][trials]}
        outputs = model(x[trials], whole["x_len"][trials], whole["day"][trials])
        loss = train_decoder.batch_losses(outputs, batch, args).mean()
        losses.append(loss.item())
        if update == 2:
            break
        before = model.dayWeights[0].clone()
        loss.backward()
        model.hand_over_days(layers)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), args.clip).item())
        optimizer.step()
        model.zero_grad()
        stride = int(oracle25["cfg/patch_stride"])
        after = gru_decoder_from_baseline(under(f"train/w_after{update + 1}/", oracle25), stride)
        assert max(largest(model.state_dict()[k], v) for k, v in after.state_dict().items()) < 2e-6
    assert torch.equal(model.dayWeights[0], before)  # absent from the second batch
    assert losses == pytest.approx(oracle25["train/losses"].tolist(), rel=1e-5)
    assert norms == pytest.approx(oracle25["train/grad_norms"].tolist(), rel=1e-4)
    for update, rate in zip(
        oracle25["schedule/update"].tolist(), oracle25["schedule/rate"].tolist(), strict=True
    ):
        assert train_decoder.lr_at(update, args, args.steps) == pytest.approx(rate, rel=1e-6)


def weights_of_25() -> dict[str, Tensor]:
    """A small network by the '25 baseline's names, as torch.compile stores it."""
    weights = {f"gru.{name}": value for name, value in nn.GRU(C * 4, 8, 2).state_dict().items()}
    weights |= {f"out.{name}": value for name, value in nn.Linear(8, 41).state_dict().items()}
    weights |= {f"day_weights.{i}": torch.randn(C, C) for i in range(2)} | {"h0": torch.randn(1, 1, 8)}
    weights |= {f"day_biases.{i}": torch.randn(1, C) for i in range(2)}
    return {f"_orig_mod.{name}": value for name, value in weights.items()}


def test_public_files_are_read_as_they_are(tmp_path, capsys):
    sessions = ["t15.2023.08.11", "t15.2023.08.13"]
    path, out = tmp_path / "best_checkpoint", tmp_path / "made.pt"
    torch.save({"model_state_dict": weights_of_25(), "val_loss": np.float64(3.5)}, path)
    line = refused(lambda: load_checkpoint(path), capsys, path)
    assert "decoder-weights" in line
    text = "# caf\xe9\ndataset:\n  sessions:\n" + "".join(f"  - {s}\n" for s in sessions)
    (tmp_path / "args.yaml").write_bytes(text.encode("latin1"))
    data.main(["decoder-weights", "--in", str(path), "--out", str(out)])
    model, ckpt = load_checkpoint(out)
    assert ckpt["data"]["days"] == sessions
    own = load_decoder(path)[0]
    assert all(torch.equal(v, own.state_dict()[k]) for k, v in model.state_dict().items())
    first = torch.load(out, weights_only=True)["model"]["gru_decoder.weight_ih_l0"]
    bins = own.state_dict()["gru_decoder.weight_ih_l0"].unflatten(1, (C, 4))
    assert torch.equal(first.unflatten(1, (C, 4)), bins)
    whole = weights_of_25()
    spoilt = {"day_weights.1": torch.ones(3), "h0": torch.full((1, 1, 8), np.nan), "out.bias": "no tensor"}
    for name, value in spoilt.items():
        torch.save({"model_state_dict": whole | {f"_orig_mod.{name}": value}}, path)
        refused(lambda: load_decoder(path), capsys, path)
    torch.save({"model_state_dict": {"day_weights.0": torch.ones(1)}}, path)
    refused(lambda: load_decoder(path), capsys, path)
    with pytest.raises(OSError, match="nowhere"):
        data.main(["decoder-weights", "--in", str(tmp_path / "nowhere"), "--out", str(out)])


def test_a_second_head_and_a_first_state():
    batch = make_batch(40, 22)
    plain, deep = small_decoder(layers=3), small_decoder(layers=3, aux_layer=2, h0=True)
    logits, frames, lower = deep(*batch, auxiliary=True)
    assert lower.shape == logits.shape
    assert not lower[1, frames[1] :].any()
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            name = name.replace("gru_decoder", "gru_upper") if "_l2" in name else name
            deep.state_dict()[name.replace("_l2", "_l0")].copy_(value)
        deep.h0.zero_()
    assert largest(deep(*batch)[0], plain(*batch)[0]) < 1e-6
    with torch.no_grad():
        deep.h0.fill_(0.5)
    assert largest(deep(*batch)[0], plain(*batch)[0]) > 1e-3
