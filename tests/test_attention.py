"""eval.py: attention weights and their roll-out against plain arithmetic, the picture, and the bench of the AST."""

import random
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import torch
from conftest import refusal
from scipy.io import wavfile
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as evaluation
from models import AST, GRUDecoder, cluster_mask, save_checkpoint

CPU = torch.device("cpu")
SMALL = {"frames": 96, "mel": 48, "width": 16, "depth": 2, "heads": 2}
ROWS, COLUMNS = 3, 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small_ast(**args) -> AST:
    """Weights larger than at the start, so that attention is far from even."""
    model = AST(**(SMALL | args)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def checkpoint(path, task="ast", statistics=("mean", "std"), **args) -> str:
    model = (
        small_ast(mel=128, **args) if task == "ast" else GRUDecoder(channels=4, days=1, hidden=4, layers=1)
    )
    given = {"mean": data.FBANK_MEAN, "std": data.FBANK_STD, "synthetic": True}
    given = {key: value for key, value in given.items() if key in (*statistics, "synthetic")}
    save_checkpoint(
        path,
        {
            "task": task,
            "model_args": model.model_args,
            "model": model.state_dict(),
            "args": {},
            "data": given,
        },
    )
    return str(path)


def wav(path, seconds: float) -> str:
    """Half silence, half a tone."""
    t = np.arange(int(seconds * 16000)) / 16000
    data.write_wav(path, (0.3 * np.sin(2 * np.pi * 440 * t) * (t > seconds / 2)).astype(np.float32))
    return str(path)


def size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_weights_give_the_blocks_own_output(padded):
    block, x = small_ast().blocks[0], torch.randn(3, 10, 16)
    attend = torch.arange(10) < torch.tensor([[10], [4], [1]]) if padded else None
    with torch.no_grad():
        out, weights = evaluation.explicit_block(block, x, attend)
        assert torch.allclose(out, block(x, attend), atol=1e-5)
    assert weights.shape == (3, 2, 10, 10)
    assert torch.allclose(weights.sum(3), torch.ones(3, 2, 10), atol=1e-6)
    assert weights.std() > 0.03
    if padded:
        assert weights.masked_select(~attend.view(3, 1, 1, 10)).abs().max() == 0
        assert torch.allclose(weights[2, :, :, 0], torch.ones(2, 10))


# --- roll-out --------------------------------------------------------------------------------------------------------


def by_hand(model: AST, clips: Tensor, lengths: list[int] | None = None) -> np.ndarray:
    """Roll-out clip by clip, without padding, token by token."""
    out = np.zeros((len(clips), model.rows, model.count(clips.shape[1])))
    for b, clip in enumerate(clips):
        clip = clip[: None if lengths is None else lengths[b]]
        tokens, _ = model.tokens(clip[None], None)
        x, extra = tokens + model.position(model.grid(clip[None])), 0
        if model.extra is not None:
            x, extra = torch.cat([model.extra.sum(0)[None], x], dim=1), 2
        T, rolled = x.shape[1], np.eye(x.shape[1])
        for block in model.blocks:
            q, k, _ = block.qkv(block.norm1(x))[0].view(T, 3, block.heads, -1).permute(1, 2, 0, 3).double()
            step = np.zeros((T, T))
            for h in range(block.heads):
                for i in range(T):
                    score = np.exp((k[h] @ q[h, i]).numpy() / np.sqrt(q.shape[2]))
                    step[i] += score / score.sum() / block.heads
            rolled = (step + np.eye(T)) / 2 @ rolled
            x = block(x)
        share = rolled[:2].mean(0) if model.pooling == "cls" else rolled[extra:].mean(0)
        share = share[extra:] / share[extra:].mean()
        out[b, :, : len(share) // model.rows] = share.reshape(model.rows, -1)
    return out


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"num_outputs": 4},
        {"num_outputs": 4, "pooling": "meanstd", "stride": 10},
        {"ssast_compat": True},
        {"num_outputs": 4, "ssast_compat": True, "pooling": "cls"},
    ],
)
@torch.no_grad()
def test_roll_out_equals_plain_arithmetic(args):
    model, clips, lengths = small_ast(**args), torch.randn(2, 96, 48), [96, 55]
    share = evaluation.roll_out(model, clips, torch.tensor(lengths))
    assert np.abs(share.numpy() - by_hand(model, clips, lengths)).max() < 1e-4
    assert share[1, :, model.count(55) :].abs().max() == 0
    assert share[1, :, : model.count(55)].mean().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(evaluation.roll_out(model, clips[:1]), share[:1], atol=1e-4)
    assert share[0].std() > 0.02
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_roll_out_of_one_uniform_layer_is_even():
    model = small_ast(depth=1)
    with torch.no_grad():
        model.blocks[0].qkv.weight.zero_()
    assert torch.allclose(
        evaluation.roll_out(model, torch.randn(1, 96, 48)), torch.ones(1, ROWS, COLUMNS), atol=1e-5
    )


def test_long_pieces_are_joined_crop_by_crop():
    model, piece = small_ast(), torch.randn(96 + 40, 48)
    share, starts = evaluation.roll_out_file(model, piece, CPU)
    assert starts == [0, 2]  # 8 columns in crops of 6
    crops = [evaluation.roll_out(model, piece[None, 16 * s : 16 * s + 96])[0].numpy() for s in starts]
    assert share.shape == (3, 8)
    assert np.allclose(share[:, :2], crops[0][:, :2])
    assert np.allclose(share[:, 2:6], (crops[0][:, 2:] + crops[1][:, :4]) / 2)
    assert np.allclose(share[:, 6:], crops[1][:, 4:])
    short, starts = evaluation.roll_out_file(model, piece[:40], CPU)
    assert (short.shape, starts) == ((3, 2), [0])


# --- picture ---------------------------------------------------------------------------------------------------------


def test_hertz_lie_where_the_filters_are():
    _, mel = data._fbank_tables(CPU)
    bins = evaluation.hertz_to_band(np.arange(257) * 31.25)
    for band in range(40, 128):  # narrow filters at the bottom miss the FFT's grid
        weight = mel[:, band].numpy()
        assert (weight @ bins) / weight.sum() == pytest.approx(band, abs=0.3)
    assert list(evaluation.hertz_to_band([0, 20, 8000])) == [-0.5, -0.5, 127.5]


def test_colours_and_ticks_stand_where_the_patches_are(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, file, format: (self.draw_without_rendering(), figures.append(self))
    )
    energies, share = np.random.default_rng(0).normal(-4, 4, (134, 128)), np.full((12, 12), 0.5)
    share[3, 4] = 6.0
    evaluation.draw_attention(tmp_path / "a.png", energies, share, [0, 6], 10, "cost $5 _{")
    axes, bar = figures[0].axes
    grey, colour = axes.images
    assert colour.get_extent() == pytest.approx(
        [0.0375, 1.2375, 2.5, 122.5]
    )  # patches of 16 every 10: cells around their middles
    assert grey.get_extent() == pytest.approx([0.0075, 1.3475, -0.5, 127.5])
    assert np.asarray(colour.get_array()).argmax() == 3 * 12 + 4
    assert colour.norm.vcenter == 1
    assert (grey.get_array().max(), grey.norm.vmin, grey.norm.vmax) == (0, -80, 0)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["50", "100", "200", "500", "1 k", "2 k", "4 k", "8 k"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("time (s)", "frequency (Hz), mel scale")
    assert axes.lines[0].get_xdata()[0] == pytest.approx(0.0375 + 0.6)
    assert "1 = the same from every patch" in bar.get_ylabel()
    assert axes.get_title() == "cost $5 _{"
    assert (figures[0].get_size_inches() * figures[0].dpi).tolist() == [1600, 600]


@pytest.mark.parametrize("args", [{}, {"num_outputs": 19, "pooling": "meanstd"}])
def test_a_wav_file_is_drawn(args, tmp_path, capsys):
    out, ckpt = tmp_path / "new" / "a.png", checkpoint(tmp_path / "best.pt", **args)
    result = evaluation.main(
        ["--attention", str(out), "--audio", wav(tmp_path / "a.wav", 1.5), "--ckpt", ckpt, "--device", "cpu"]
    )
    assert size(out) == (1600, 600)
    assert (result["frames"], result["share"].shape, result["starts"]) == (148, (8, 9), [0, 3])
    assert result["share"].mean() == pytest.approx(1, abs=0.2)
    assert "9 x 8 patches in 2 crops" in capsys.readouterr().out


def test_a_midi_file_is_rendered_and_drawn(tmp_path):
    file, track = mido.MidiFile(ticks_per_beat=480), mido.MidiTrack()
    track += [mido.Message("note_on", note=69, velocity=80), mido.Message("note_off", note=69, time=240)]
    file.tracks.append(track)
    file.save(tmp_path / "a.mid")
    argv = [
        f"--attention={tmp_path / 'a.svg'}",
        "--midi",
        str(tmp_path / "a.mid"),
        "--ckpt",
        checkpoint(tmp_path / "best.pt"),
        "--device",
        "cpu",
    ]
    result = evaluation.main(argv)
    waveform = data.render(data.read_midi(tmp_path / "a.mid"))
    assert result["frames"] == data.fbank_frames(len(waveform))
    assert (tmp_path / "a.svg").read_bytes()[:5] == b"<?xml"


def test_what_cannot_be_drawn_is_refused(tmp_path, capsys):
    sound, best, out = wav(tmp_path / "a.wav", 0.5), checkpoint(tmp_path / "best.pt"), str(tmp_path / "a.png")

    def call(attention=out, audio=sound, ckpt=best):
        return refusal(
            ["--attention", attention, "--audio", audio, "--ckpt", ckpt, "--device", "cpu"], capsys
        )

    assert "task 'decoder'; expected 'ast'" in call(ckpt=checkpoint(tmp_path / "d.pt", task="decoder"))
    assert "none.pt: no such file" in call(ckpt=str(tmp_path / "none.pt"))
    assert "expected 128, mean and std" in call(ckpt=checkpoint(tmp_path / "s.pt", statistics=("mean",)))
    assert "none.wav: No such file" in call(audio=str(tmp_path / "none.wav"))
    assert "0.170 s of sound; expected at least 0.175 s" in call(audio=wav(tmp_path / "short.wav", 0.17))
    assert "a file in a writable folder" in call(attention=str(tmp_path / "a.wav" / "a.png"))
    assert "kind '.txt'; expected .png" in call(attention=str(tmp_path / "a.txt"))
    (tmp_path / "b.png").mkdir()
    assert "b.png: a folder" in call(attention=str(tmp_path / "b.png"))
    assert "none.mid" in refusal(
        ["--attention", out, "--midi", str(tmp_path / "none.mid"), "--ckpt", best], capsys
    )
    assert not (tmp_path / "a.png").exists()


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.os, "access", lambda *_: False)
    with pytest.raises(data.DataError, match=f"no file can be written in {tmp_path}"):
        evaluation.check_picture(tmp_path / "new" / "a.png")


# --- bench -----------------------------------------------------------------------------------------------------------


def test_plain_ast_has_the_same_losses_and_gradients():
    model = small_ast(dropout=0.0)
    plain, clips, mask = evaluation.PlainAST(model), torch.randn(2, 96, 48), cluster_mask(2, ROWS, COLUMNS, 13)
    losses = [
        evaluation._pretrain_loss(model, clips, mask),
        evaluation._pretrain_loss(plain, clips, mask, second=mask),
    ]
    sum(losses).backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, plain.network.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("args", [{"visible_only": True}, {"ssast_compat": True}, {"num_outputs": 2}])
def test_plain_ast_refuses_what_it_has_not(args):
    with pytest.raises(ValueError, match="plain AST"):
        evaluation.PlainAST(AST(**(SMALL | args)))


@pytest.mark.parametrize("kind", ["AST", "visible", "plain"])
def test_operations_equal_those_that_torch_counts(kind):
    model, clips, mask = (
        AST(**SMALL, visible_only=kind == "visible"),
        torch.randn(2, 96, 48),
        cluster_mask(2, ROWS, COLUMNS, 14),
    )
    second = {"second": mask} if kind == "plain" else {}
    network = evaluation.PlainAST(model) if second else model
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # torch has no count for the fused CPU kernel
        evaluation._pretrain_loss(network, clips, mask, **second).backward()
    assert counter.get_total_flops() == 2 * evaluation.pretrain_flops(model, 14, passes=1 + len(second))


def test_plain_masks_hold_as_many_patches_as_asked():
    mask = evaluation.plain_mask(20, 8, 64, 400, random.Random(0))
    assert mask.shape == (20, 400)
    assert all(len(set(ids)) == 400 and 0 <= min(ids) and max(ids) < 512 for ids in mask.tolist())


def test_bench_compares_equal_networks(capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "AST_PRESETS", {"tiny": {"width": 16, "depth": 2, "heads": 2}})
    monkeypatch.setattr(evaluation, "matmul_peak", lambda device, dtype: 1e12)
    result = evaluation.main(
        [
            "bench",
            "--task",
            "ast",
            "--preset",
            "tiny",
            "--frames",
            "64",
            "--batch",
            "2",
            "--steps",
            "1",
            "--amp",
            "bf16",
            "--visible-only",
            "--device",
            "cpu",
        ]
    )
    assert result["difference"] < 1e-4
    assert result["ratio"] == pytest.approx(result["plain_seconds"] / result["AST_seconds"])
    assert result["mask_ratio"] == pytest.approx(result["plain_mask_ms"] / result["mask_ms"])
    assert result["flops"]["AST"] == 2 * evaluation.pretrain_flops(
        AST(frames=64, width=16, depth=2, heads=2), 25
    )
    out = capsys.readouterr().out
    assert "25 of 32 patches masked" in out
    assert "400 of 512 patches: cluster_mask" in out
    assert "ratio AST / visible only" in out


def test_options_of_another_network_are_refused(capsys):
    assert "--width given; expected --preset, --frames, --visible-only" in refusal(
        ["bench", "--task", "ast", "--width", "8"], capsys
    )
    assert "--frames, --visible-only given" in refusal(["bench", "--frames", "64", "--visible-only"], capsys)


def test_digital_silence_is_no_piece(tmp_path):
    wavfile.write(tmp_path / "zero.wav", 16000, np.zeros(16000, np.int16))
    with pytest.raises(data.DataError, match=r"zero.wav: 1.0 s of digital silence"):
        evaluation.read_piece(SimpleNamespace(audio=str(tmp_path / "zero.wav"), midi=None))
