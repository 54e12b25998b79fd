"""eval.py --attention: the roll-out against plain arithmetic, the picture."""

import numpy as np
import pytest
import torch
from conftest import refusal
from test_ast import small_ast
from torch import Tensor

import data
import eval as evaluation
from models import AST, GRUDecoder, PooledMLP, save_checkpoint

FORMS = [
    {},
    {"num_outputs": 4, "pooling": "meanstd", "stride": 10},
    {"ssast_compat": True},
    {"num_outputs": 4, "ssast_compat": True, "pooling": "cls"},
]


def checkpoint(path, model) -> str:
    known = {"mean": data.FBANK_MEAN, "std": data.FBANK_STD, "synthetic": True}
    ckpt = {"task": "ast" if isinstance(model, AST) else "decoder", "args": {}, "data": known}
    save_checkpoint(path, ckpt | {"model_args": model.model_args, "model": model.state_dict()})
    return str(path)


def wav(path, seconds: float) -> str:
    """Half silence, half a tone."""
    t = np.arange(int(seconds * 16000)) / 16000
    data.write_wav(path, (0.3 * np.sin(2 * np.pi * 440 * t) * (t > seconds / 2)).astype(np.float32))
    return str(path)


def by_hand(model: AST, clip: Tensor) -> np.ndarray:
    """Roll-out of one clip, token by token."""
    tokens, _ = model.tokens(clip[None], None)
    x, extra = tokens + model.position(len(tokens[0]) // model.rows), 0
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
    return (share[extra:] / share[extra:].mean()).reshape(model.rows, -1)


@pytest.mark.parametrize("args", FORMS)
@torch.no_grad()
def test_roll_out_equals_plain_arithmetic(args):
    model = small_ast(**args)
    for frames in (96, 55):
        clip = torch.randn(frames, 48)
        share = evaluation.roll_out(model, clip)
        assert np.abs(share.numpy() - by_hand(model, clip)).max() < 1e-4
        assert share.mean().item() == pytest.approx(1, abs=1e-5)
        assert share.std() > 0.02
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_long_pieces_are_joined_crop_by_crop():
    model, piece = small_ast(), torch.randn(96 + 40, 48)
    share = evaluation.roll_out_file(model, piece)
    # 8 columns in crops of 6, at 0 and 2
    crops = [evaluation.roll_out(model, piece[16 * s : 16 * s + 96]).numpy() for s in (0, 2)]
    assert share.shape == (3, 8)
    assert np.allclose(share[:, :2], crops[0][:, :2])
    assert np.allclose(share[:, 2:6], (crops[0][:, 2:] + crops[1][:, :4]) / 2)
    assert np.allclose(share[:, 6:], crops[1][:, 4:])
    assert evaluation.roll_out_file(model, piece[:40]).shape == (3, 2)


@pytest.mark.slow
def test_the_picture_shows_the_mean_of_asts_where_the_patches_are(tmp_path, monkeypatch):
    figures, members = [], []
    monkeypatch.setattr(evaluation, "save_figure", lambda figure, out: figures.append(figure))
    info = {"mean": data.FBANK_MEAN, "std": data.FBANK_STD, "synthetic": True}
    for frames in (96, 64):
        model = small_ast(mel=128, frames=frames, stride=10, num_outputs=19)
        members.append((model, {"path": "best.pt", "task": "ast", "data": info}))
    energies = np.random.default_rng(0).normal(-4, 4, (134, 128)).astype(np.float32)
    mlp = PooledMLP(), {"path": "mlp.pt", "task": "mlp", "data": info}  # rates with them, has no attention
    work = {"name": "$a_{", "energies": energies}
    drawn = evaluation.explain("ast", tmp_path / "a.png", [mlp, *members], work)
    x = torch.from_numpy(data.normalise_fbank(energies, data.FBANK_MEAN, data.FBANK_STD)).float()
    each = [evaluation.roll_out_file(model, x) for model, _ in members]
    assert drawn["share"] == pytest.approx((each[0] + each[1]) / 2)
    loudness, axes = figures[0].axes[:2]
    assert loudness.images[0].get_extent() == pytest.approx([0, 1.34, -0.5, 127.5])
    # Patches of 16 every 10: cells around their middles.
    corners = np.asarray(axes.collections[0].get_coordinates())
    assert corners[0, 0] == pytest.approx([0.03, 2.5])
    assert corners[-1, -1] == pytest.approx([1.23, 122.5])
    assert np.asarray(axes.collections[0].get_array()) == pytest.approx(drawn["share"])
    assert axes.collections[0].get_clim() == (1 / 8, 8)  # whatever the weights
    assert "SYNTHETIC" in figures[0].get_suptitle()


@pytest.mark.slow
def test_a_sound_or_a_midi_file_is_drawn(tmp_path, monkeypatch):
    same = ["--ckpt", checkpoint(tmp_path / "best.pt", small_ast(mel=128)), "--device", "cpu"]
    out, sound = tmp_path / "new" / "a.png", wav(tmp_path / "$a_{.wav", 1.5)
    result = evaluation.main(["--attention", str(out), "--audio", sound, *same])
    assert out.read_bytes()[16:24] == (1600).to_bytes(4, "big") + (1200).to_bytes(4, "big")
    assert result["share"].shape == (8, 4)  # the silent half is cut off
    drawn = []
    monkeypatch.setattr(evaluation, "save_figure", lambda figure, out: drawn.append(out))
    data._save_midi(tmp_path / "a.mid", [(0, 0.25, 69, 80)], [])
    result = evaluation.main([f"--attention={tmp_path / 'a.svg'}", "--midi", str(tmp_path / "a.mid"), *same])
    waveform = data.render(data.read_midi(tmp_path / "a.mid"))
    assert result["share"].shape == (8, data.fbank_frames(len(waveform)) // 16)
    assert drawn == [tmp_path / "a.svg"]


@pytest.mark.slow
def test_what_cannot_be_drawn_is_refused(tmp_path, capsys):
    wav(tmp_path / "a.wav", 0.5)
    wav(tmp_path / "short.wav", 0.17)
    data.write_wav(tmp_path / "zero.wav", np.zeros(16000, np.float32))
    checkpoint(tmp_path / "best.pt", small_ast(mel=128))
    checkpoint(tmp_path / "d.pt", GRUDecoder(channels=4, days=1, hidden=4, layers=1))
    good = {"--attention": "a.png", "--audio": "a.wav", "--ckpt": "best.pt"}
    bad = "--ckpt d.pt", "--audio short.wav", "--audio zero.wav", "--attention a.txt"
    for option, name in map(str.split, bad):
        given = good | {option: name}
        argv = [word for key, value in given.items() for word in (key, str(tmp_path / value))]
        assert name in refusal([*argv, "--device", "cpu"], capsys)
    assert not (tmp_path / "a.png").exists()
