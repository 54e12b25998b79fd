"""The three networks as the public code computes them: yardsticks of speed, and oracles of the tests.

    python tests/plain_networks.py [--task han|decoder|ast]    step times of both, their ratio
    python tests/plain_networks.py --epoch       an epoch of the decoder, trials of 200-800 bins

HAN: packed bidirectional LSTMs, a Python loop over voices, dense one-hot matrices between levels.
GRU decoder: a depthwise filter per channel, windows by nn.Unfold, a GRU over the padding too.
AST: attention weights written out, a pass of the encoder for either objective, loops over the clips.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import length_batches
from eval import BENCHES, timed_step
from models import AST, HAN, BiLSTM, ContextAttention, GRUDecoder, output_frames

# --- HAN --------------------------------------------------------------------------------------------------


class PlainHAN(nn.Module):
    """`models.HAN` (form han, level total_note_cat, no pooled statistics) with copies of its weights."""

    def __init__(self, model: HAN):
        super().__init__()
        dropout = model.model_args["dropout"]
        self.embedding = copy.deepcopy(model.embedding)
        self.contractor = copy.deepcopy(model.contractor)
        self.head = copy.deepcopy(model.head)
        self.note = joined_lstm(model.note, dropout)
        self.voice = joined_lstm(model.voice, dropout)
        self.beat = joined_lstm(model.beat, dropout)
        self.measure = joined_lstm(model.measure, dropout)
        self.beat_attention = PlainAttention(model.beat_attention)
        self.measure_attention = PlainAttention(model.measure_attention)
        self.attention = PlainAttention(model.attention)

    def forward(self, batch: dict) -> Tensor:
        """batch of data.collate_han (x, lengths, mask, voice, beat, measure) -> logits (B, 19)."""
        lengths, mask = batch["lengths"], batch["mask"]
        embedded = self.embedding(batch["x"])
        note = run_packed(self.note, embedded, lengths)
        hidden = torch.cat([note, self.run_voices(embedded, batch["voice"])], dim=2)
        note_to_beat = one_hot(batch["beat"], mask)
        note_to_measure = one_hot(batch["measure"], mask)
        beats = self.beat_attention(hidden, note_to_beat)
        beats = run_packed(self.beat, beats, batch["beat"].amax(1) + 1)
        beat_to_measure = (note_to_beat.transpose(1, 2) @ note_to_measure).clamp(max=1)
        measures = self.measure_attention(beats, beat_to_measure)
        measures = run_packed(self.measure, measures, batch["measure"].amax(1) + 1)
        total = torch.cat([hidden, note_to_beat @ beats, note_to_measure @ measures], dim=2)
        pooled = self.attention(self.contractor(total), mask.unsqueeze(2).to(total.dtype))
        return self.head(pooled.squeeze(1))

    def run_voices(self, embedded: Tensor, voice: Tensor) -> Tensor:
        """embedded (B, T, C), voice (B, T), 0 = none -> (B, T, 2 * size), zeros for voice 0."""
        B, T, _ = embedded.shape
        out = embedded.new_zeros(B, T, 2 * self.voice.hidden_size)
        for v in range(1, int(voice.max()) + 1):
            member = voice == v
            rows = member.any(1).nonzero().squeeze(1)
            if not len(rows):
                continue
            notes = pad_sequence([embedded[row, member[row]] for row in rows], batch_first=True)
            result = run_packed(self.voice, notes, member[rows].sum(1))
            place = embedded.new_zeros(len(rows), T, notes.shape[1])
            for i, row in enumerate(rows):
                positions = member[row].nonzero().squeeze(1)
                place[i, positions, torch.arange(len(positions))] = 1
            out = out.index_add(0, rows, place @ result)
        return out


class PlainAttention(nn.Module):
    """`models.ContextAttention` on padded sequences."""

    def __init__(self, attention: ContextAttention):
        super().__init__()
        self.linear = copy.deepcopy(attention.linear)
        self.context_vector = nn.Parameter(attention.context_vector.detach().clone())

    def forward(self, x: Tensor, membership: Tensor) -> Tensor:
        """x (B, M, C), membership (B, M, G) one-hot, zero rows at padding -> (B, G, C)."""
        B, M, C = x.shape
        H, D = self.context_vector.shape
        score = (torch.tanh(self.linear(x)).view(B, M, H, D) * self.context_vector).sum(-1)
        member = membership.transpose(1, 2).bool().unsqueeze(1)  # (B, 1, G, M)
        score = score.transpose(1, 2).unsqueeze(2).masked_fill(~member, torch.finfo(x.dtype).min)
        weight = score.softmax(-1) * member  # (B, H, G, M)
        pooled = weight @ x.view(B, M, H, D).transpose(1, 2)
        return pooled.transpose(1, 2).reshape(B, -1, C)


def run_packed(lstm: nn.LSTM, x: Tensor, lengths: Tensor) -> Tensor:
    """x (B, T, C), lengths (B,) -> (B, T, 2 * hidden), zeros beyond the lengths."""
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=x.shape[1])[0]


def one_hot(group: Tensor, mask: Tensor) -> Tensor:
    """group, mask (B, M) -> (B, M, G) float32, zero rows where the mask is False."""
    return functional.one_hot(group).float() * mask.unsqueeze(2)


def joined_lstm(part: BiLSTM, dropout: float) -> nn.LSTM:
    """A BiLSTM's weights in one bidirectional nn.LSTM."""
    first, layers = part.forward_lstm[0], len(part.forward_lstm)
    options = {"batch_first": True, "bidirectional": True, "dropout": dropout if layers > 1 else 0.0}
    lstm = nn.LSTM(first.input_size, first.hidden_size, layers, **options)
    with torch.no_grad():
        for suffix, directions in (("", part.forward_lstm), ("_reverse", part.backward_lstm)):
            for i, direction in enumerate(directions):
                for name, parameter in direction.named_parameters():
                    getattr(lstm, name.replace("_l0", f"_l{i}{suffix}")).copy_(parameter)
    return lstm


# --- GRU decoder ------------------------------------------------------------------------------------------


class PlainGRUDecoder(nn.Module):
    """`models.GRUDecoder` (one direction, no LayerNorm, with smoothing) with copies of its weights, which
    have the public baseline's names."""

    def __init__(self, model: GRUDecoder):
        super().__init__()
        sizes = model.model_args
        channels, hidden, layers = sizes["channels"], sizes["hidden"], sizes["layers"]
        self.kernel, self.stride = sizes["kernel"], sizes["stride"]
        self.dayWeights = nn.Parameter(torch.empty(sizes["days"], channels, channels))
        self.dayBias = nn.Parameter(torch.empty(sizes["days"], 1, channels))
        self.dropout = nn.Dropout(sizes["input_dropout"])
        self.unfolder = nn.Unfold((self.kernel, 1), stride=self.stride)
        between = sizes["dropout"] if layers > 1 else 0.0
        self.gru_decoder = nn.GRU(channels * self.kernel, hidden, layers, batch_first=True, dropout=between)
        self.fc_decoder_out = nn.Linear(hidden, sizes["classes"])
        weights = {name: value for name, value in model.state_dict().items() if name != "smoothing"}
        self.load_state_dict(weights)
        self.register_buffer("smoothing", model.smoothing.detach().flatten().expand(channels, 1, -1))

    def forward(self, x: Tensor, lengths: Tensor, day: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, C) zero-padded, lengths (B,), day (B,) -> logits (B, F, 41), frames (B,)."""
        B, T, C = x.shape
        taps = self.smoothing.shape[2]
        x = functional.pad(x.transpose(1, 2), ((taps - 1) // 2, taps // 2))
        x = functional.conv1d(x, self.smoothing, groups=C).transpose(1, 2)
        x = torch.einsum("btc,bcd->btd", x, self.dayWeights[day]) + self.dayBias[day]
        x = self.dropout(functional.softsign(x))
        windows = self.unfolder(x.transpose(1, 2).unsqueeze(3))  # (B, C * kernel, F)
        hidden, _ = self.gru_decoder(windows.transpose(1, 2))
        return self.fc_decoder_out(hidden), output_frames(lengths, self.kernel, self.stride)


# --- AST, pre-training ------------------------------------------------------------------------------------


class PlainAST(nn.Module):
    """Pre-training of `models.AST` (all patches encoded, no tokens of its own) with copies of its weights."""

    def __init__(self, model: AST):
        super().__init__()
        self.network = copy.deepcopy(model)

    def forward(self, clips: Tensor, lengths: None, mask: Tensor) -> dict[str, Tensor]:
        """clips (B, frames, mel), mask (B, N) patch ids -> nce, mse."""
        nce, mse = [], []
        pixels = torch.stack([cut_patches(clip) for clip in clips])
        hidden = self.encode(clips, mask)
        for i, ids in enumerate(mask):
            score = pixels[i, ids] @ self.network.discriminate(hidden[i, ids]).T  # patch, prediction
            nce.append(-score.log_softmax(0).diagonal().mean())
        hidden = self.encode(clips, mask)
        for i, ids in enumerate(mask):
            mse.append((self.network.generate(hidden[i, ids]) - pixels[i, ids]).square().mean())
        return {"nce": torch.stack(nce).mean(), "mse": torch.stack(mse).mean()}

    def encode(self, clips: Tensor, mask: Tensor) -> Tensor:
        """Final tokens (B, T, width) of the clips with these patches hidden."""
        network = self.network
        x = network.embed(clips.transpose(1, 2).unsqueeze(1)).flatten(2).transpose(1, 2)
        shown = torch.ones_like(x[..., :1])
        for i, ids in enumerate(mask):
            shown[i, ids] = 0
        columns = clips.shape[1] // 16
        position = (network.position.freq + network.position.time)[:, :columns].flatten(0, 1)
        x = network.dropout(x * shown + network.hidden * (1 - shown) + position)
        for block in network.blocks:
            x = plain_block(block, x)
        return network.norm(x)


def cut_patches(clip: Tensor) -> Tensor:
    """clip (frames, mel) -> pixels (rows * columns, 256) of its 16 x 16 patches, frequency-major."""
    rows, columns = clip.shape[1] // 16, clip.shape[0] // 16
    cut = [clip.T[16 * f : 16 * f + 16, 16 * t : 16 * t + 16] for f in range(rows) for t in range(columns)]
    return torch.stack(cut).flatten(1)


def plain_block(block: nn.Module, x: Tensor) -> Tensor:
    """A transformer block with its attention weights written out, x (B, T, C)."""
    B, T, C = x.shape
    q, k, v = block.qkv(block.norm1(x)).view(B, T, 3, block.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
    weights = (q @ k.transpose(2, 3) / (C // block.heads) ** 0.5).softmax(3)
    x = x + block.dropout(block.proj((weights @ v).transpose(1, 2).reshape(B, T, C)))
    hidden = block.dropout(functional.gelu(block.fc1(block.norm2(x))))
    return x + block.dropout(block.fc2(hidden))


# --- Comparison -------------------------------------------------------------------------------------------


PLAIN = {"han": PlainHAN, "decoder": PlainGRUDecoder, "ast": PlainAST}


def largest_difference(ours: nn.Module, plain: nn.Module, inputs: tuple) -> float:
    """Between the outputs of both, in eval mode; of a decoder's only the frames that its trials have."""
    with torch.no_grad():
        a, b = ours.eval()(*inputs), plain.eval()(*inputs)
    ours.train()
    plain.train()
    if isinstance(a, dict):
        return max(float((a[name] - b[name]).abs()) for name in b)
    if isinstance(a, tuple):
        there = torch.arange(a[0].shape[1], device=a[1].device) < a[1].unsqueeze(1)
        a, b = a[0][there], b[0][there]
    return float((a - b).abs().max())


def compare(task: str, sizes: dict, batch: int, steps: int, device: torch.device, amp: str = "off") -> dict:
    """Median seconds of a training step of either network, in turn; ratio; output difference in fp32."""
    torch.manual_seed(7)
    ours, inputs, loss = BENCHES[task][0](sizes, batch, device)
    networks = {"ours": ours, "plain": PLAIN[task](ours).to(device)}
    difference = largest_difference(*networks.values(), inputs)
    taken = {name: [] for name in networks}
    fused = device.type == "cuda"
    optimizers = {
        name: torch.optim.AdamW(net.parameters(), lr=1e-4, fused=fused) for name, net in networks.items()
    }
    warm_up = 3 if fused else 1
    for _ in range(warm_up + steps):
        for name, network in networks.items():
            taken[name].append(timed_step(network, inputs, loss, optimizers[name], amp))
    seconds = {name: float(np.median(times[warm_up:])) for name, times in taken.items()}
    return seconds | {"ratio": seconds["plain"] / seconds["ours"], "difference": difference}


def compare_epochs(trials: int, batch: int, channels: int, hidden: int, layers: int) -> dict:
    """Processor seconds of an epoch of the decoder: ours in batches by length, the public way in random ones,
    a batch of either in turn."""
    torch.manual_seed(7)
    rng = np.random.default_rng(7)
    lengths = rng.integers(200, 801, trials)
    ours = GRUDecoder(channels, 8, hidden, layers)
    networks = {"ours": ours, "plain": PlainGRUDecoder(ours)}
    order = rng.permutation(trials)
    batches = {
        "ours": length_batches(lengths.tolist(), batch, 7, 0),
        "plain": np.split(order, trials // batch),
    }
    seconds = dict.fromkeys(networks, 0.0)
    for pair in zip(*batches.values(), strict=True):
        for (name, network), chosen in zip(networks.items(), pair, strict=True):
            counts = torch.as_tensor(lengths[chosen])
            x, day = torch.randn(batch, int(counts.max()), channels), torch.randint(8, (batch,))
            labels = torch.randint(1, 41, (batch, 30))
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
            start = time.process_time()
            logits, frames = network(x, counts, day)
            scores = logits.log_softmax(2).transpose(0, 1)
            functional.ctc_loss(scores, labels, frames, torch.full((batch,), 30)).backward()
            optimizer.step()
            seconds[name] += time.process_time() - start
            network.zero_grad()
    return seconds | {"ratio": seconds["plain"] / seconds["ours"]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=PLAIN, nargs="*", default=[*PLAIN], help="networks (all)")
    parser.add_argument("--steps", type=int, default=5, help="steps of each after the first (%(default)s)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--epoch", action="store_true", help="time an epoch of the decoder instead (off)")
    args = parser.parse_args(argv)
    if args.epoch:
        sizes = {"trials": 512, "batch": 64, "channels": 32, "hidden": 256, "layers": 2}
        print(sizes, compare_epochs(**sizes))
        return
    for task in args.task:
        result = compare(task, {}, BENCHES[task][1], args.steps, args.device)
        print(
            f"{task}: ours {1000 * result['ours']:.1f} ms/step, plain {1000 * result['plain']:.1f}, "
            f"ratio {result['ratio']:.2f}; outputs differ by at most {result['difference']:.1e}"
        )


if __name__ == "__main__":
    main()
