"""All networks, and the checkpoints that rebuild them.

    model = HAN(input_size=101); logits = model(data.collate_han(items))     # PercePiano, HAN.md
    model = GRUDecoder(days=24); logits, frames = model(x, lengths, day)   # intracortical speech, DECODER.md
    model = AST(num_outputs=19); ratings = model(fbank, lengths)             # piano audio, AST.md
    save_checkpoint("last.pt", ckpt); model, ckpt = load_checkpoint("best.pt")

Shape legend: B batch (pieces) · T time or notes · C channels · H heads · D head width · S sequences
N notes of all pieces · M members and G groups of an attention (notes in beats, beats in measures, ...)
Masks: True = valid. Index tensors come from data.collate_han.
"""

from data import (  # first: while torch loads, Ctrl-C is one line
    COUNT,
    FOLDS,
    PHONEMES,
    SESSIONS_24,
    WHOLE,
    DataError,
    add_options,
    load_plain_pickle,
    locked,
    on_stop,
    one_line,
    ordinary,
    shown,
    speech_rules,
    to_normal,
    write_atomic,
    write_text,
)

# isort: split
import atexit
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

CHECKPOINT_FORMAT = 1


# ---------------------------------------------------------------------------------------------------------
# Layers of HAN
# ---------------------------------------------------------------------------------------------------------
class BiLSTM(nn.Module):
    """Bidirectional LSTM over many sequences of unequal length, exact at their ends.

    Each direction is an LSTM of its own on padded input, the backward one on sequences reversed by their own
    length: padding then always follows the sequence and cannot reach it. On CPU the fused padded kernel is
    several times as fast as a packed sequence (HAN.md, "Speed").
    """

    def __init__(self, input_size: int, hidden_size: int, layers: int, dropout: float):
        super().__init__()
        sizes = [input_size] + [2 * hidden_size] * (layers - 1)
        self.forward_lstm = nn.ModuleList(nn.LSTM(size, hidden_size) for size in sizes)
        self.backward_lstm = nn.ModuleList(nn.LSTM(size, hidden_size) for size in sizes)
        self.dropout = nn.Dropout(dropout)

    @torch.autocast("cpu", enabled=False)  # oneDNN has no float16 LSTM, and on some CPUs no bfloat16 one
    def forward(self, x: Tensor, batch: dict, name: str) -> Tensor:
        """x (M, C) notes (name "note", "voice"), beats or measures of a batch -> (M, 2 * hidden)."""
        x = x.float()
        for i, pair in enumerate(zip(self.forward_lstm, self.backward_lstm, strict=True)):
            x = self.dropout(x) if i else x
            both = []
            for lstm, grid, slot in zip(pair, batch[f"{name}_grid"], batch[f"{name}_slot"], strict=True):
                output, _ = lstm(x.index_select(0, grid.flatten()).view(*grid.shape, -1))  # (T, S, hidden)
                both.append(output.flatten(0, 1).index_select(0, slot))
            x = torch.cat(both, dim=1)
        return x


class ContextAttention(nn.Module):
    """Attention pooling with one learned context vector per head (HAN.md).

    Linear, tanh, split in heads, dot with the context vectors, softmax over the members of each group,
    weighted sum of the input itself, split in the same heads.
    """

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.context_vector = nn.Parameter(torch.empty(heads, size // heads).uniform_(-1, 1))

    def forward(self, x: Tensor, group: Tensor, groups: int) -> Tensor:
        """x (M, C), group (M,) of each member, groups G -> (G, C) float32; an empty group gives zeros."""
        (H, D), (M, C) = self.context_vector.shape, x.shape
        hidden = torch.tanh(self.linear(x)).float().view(M, H, D)
        weight = group_softmax((hidden * self.context_vector.float()).sum(-1), group, groups)
        weighted = x.float().view(M, H, D) * weight.unsqueeze(-1)
        return x.new_zeros(groups, C, dtype=torch.float32).index_add(0, group, weighted.view(M, C))


def group_softmax(score: Tensor, group: Tensor, groups: int) -> Tensor:
    """Softmax of score (M, H) float32 over the members of each group (M,), per head -> (M, H)."""
    M, H = score.shape
    index = group.unsqueeze(1).expand(M, H)
    largest = score.new_full((groups, H), -torch.inf).scatter_reduce(0, index, score.detach(), "amax")
    weight = torch.exp(score - largest.index_select(0, group))
    total = weight.new_zeros(groups, H).index_add(0, group, weight)
    return weight / total.index_select(0, group)


# ---------------------------------------------------------------------------------------------------------
# HAN (Park et al., Scientific Reports 14, 23002, 2024)
# ---------------------------------------------------------------------------------------------------------
LEVELS = ("note", "beat", "measure", "total_note_cat")
FORMS = ("han", "bilstm", "bilstm_sa", "head")


def rating_head(size: int, hidden: int, num_label: int, dropout: float) -> nn.Sequential:
    """Two layers, (B, size) -> logits (B, num_label)."""
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(size, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, num_label),
    )


class HAN(nn.Module):
    """Hierarchical attention network over the notes of a performance: 19 ratings, before the sigmoid.

    input_size    features per note
    size          width of the embedding and of each LSTM direction
    layers        LSTM layers of note, voice, beat, measure
    level         what feeds the final pooling: note | beat | measure | total_note_cat
    model         han | bilstm | bilstm_sa | head: the bilstm are the same network, one BiLSTM of sum(layers)
                  layers and no hierarchy (level is not used), and differ in the features that they are given;
                  head: the head alone, on batch["stats"]
    head_size     width inside the head; None = 2 * size
    stats_size    > 0: batch["stats"] (B, stats_size) is concatenated with the pooled vector before the head
    """

    def __init__(
        self,
        input_size: int,
        size: int = 256,
        heads: int = 8,
        layers: tuple[int, ...] = (2, 2, 2, 1),
        num_label: int = 19,
        dropout: float = 0.2,
        level: str = "total_note_cat",
        model: str = "han",
        head_size: int | None = None,
        stats_size: int = 0,
    ):
        super().__init__()
        layers = list(layers)  # as a checkpoint holds it
        self.model_args = _arguments(locals())
        if model not in FORMS or level not in LEVELS or size % heads:
            wanted = f"one of {FORMS}, one of {LEVELS}, a multiple of heads {heads}"
            raise DataError(f"HAN: model {model}, level {level}, size {size}; expected {wanted}")
        if model == "head" and not stats_size:
            raise DataError("HAN: model head without statistics; expected --pooled")
        if model != "han":
            level = "note"
            layers = [sum(layers), 0, 0, 0]
        self.level = level
        width = 2 * size  # both directions of an LSTM
        if model == "head":
            self.head = rating_head(stats_size, head_size or width, num_label, dropout)
            return
        self.embedding = nn.Linear(input_size, size)
        self.note = BiLSTM(size, size, layers[0], dropout)
        if level != "note":
            self.voice = BiLSTM(size, size, layers[1], dropout)
            self.beat_attention = ContextAttention(2 * width, heads)
            self.beat = BiLSTM(2 * width, size, layers[2], dropout)
        if level in ("measure", "total_note_cat"):
            self.measure_attention = ContextAttention(width, heads)
            self.measure = BiLSTM(width, size, layers[3], dropout)
        self.contractor = nn.Identity()
        if level in ("note", "total_note_cat"):
            self.contractor = nn.Linear(4 * width if level == "total_note_cat" else width, width)
        self.attention = ContextAttention(width, heads)
        self.head = rating_head(width + stats_size, head_size or width, num_label, dropout)

    def forward(self, batch: dict) -> Tensor:
        """batch of data.collate_han -> logits (B, 19)."""
        return self.stages(batch)["logits"]

    def stages(self, batch: dict) -> dict[str, Tensor]:
        """Every intermediate result, in order; the last is "logits" (B, 19). For diagnostics and tests.

        embedding (N, size) · note, voice (N, 2s), zeros for voice 0 · beat (NB, 2s) · measure (NM, 2s) ·
        total_note_cat (N, 8s) · contracted: the level that is pooled, 2s wide · pooled (B, 2s); s = size;
        N, NB, NM notes, beats, measures of all pieces. Stages beyond the level are absent.
        """
        out = {} if self.model_args["model"] == "head" else self._encode(batch)
        parts = [out["pooled"]] if out else []
        if self.model_args["stats_size"]:
            parts.append(batch["stats"])
        seen = torch.cat(parts, dim=1)
        if "mix" in batch:  # of train_han.mixup: each piece with another of the batch
            share, partner = batch["mix"]
            seen = share * seen + (1 - share) * seen[partner]
        out["logits"] = self.head(seen)
        return out

    def _encode(self, batch: dict) -> dict[str, Tensor]:
        out = {}
        # indexing by piece and time, not by position in the flattened batch: any further padding is harmless
        out["embedding"] = self.embedding(batch["x"][batch["piece"], batch["time"]])
        out["note"] = self.note(out["embedding"], batch, "note")
        piece = batch["piece"]
        if self.level != "note":  # voices beside notes, both pooled to beats
            voice = self.voice(out["embedding"], batch, "voice")
            out["voice"] = voice.masked_fill(~batch["voiced"].unsqueeze(1), 0.0)
            hidden = torch.cat([out["note"], out["voice"]], dim=1)
            piece = batch["beat_piece"]
            beats = self.beat_attention(hidden, batch["note_beat"], len(piece))
            out["beat"] = self.beat(beats, batch, "beat")
        if self.level in ("measure", "total_note_cat"):
            piece = batch["measure_piece"]
            measures = self.measure_attention(out["beat"], batch["beat_measure"], len(piece))
            out["measure"] = self.measure(measures, batch, "measure")
        if self.level == "total_note_cat":
            piece = batch["piece"]
            beat = out["beat"].index_select(0, batch["note_beat"])
            measure = out["measure"].index_select(0, batch["note_measure"])
            out["total_note_cat"] = torch.cat([hidden, beat, measure], dim=1)
        out["contracted"] = self.contractor(out[self.level])
        out["pooled"] = self.attention(out["contracted"], piece, len(batch["x"]))
        return out


class KernelRidge(nn.Module):
    """Kernel ridge regression on batch["stats"] (B, stats_size) of pooled statistics: 19 ratings, before the
    sigmoid, as HAN's. Matérn-3/2; distances are root mean squares over the statistics."""

    def __init__(self, items: int, stats_size: int, num_label: int = 19):
        super().__init__()
        self.model_args = {"items": items, "stats_size": stats_size, "num_label": num_label}
        self.register_buffer("items", torch.zeros(items, stats_size))  # those it was fitted on
        self.register_buffer("dual", torch.zeros(items, num_label))
        self.register_buffer("mean", torch.zeros(num_label))

    def forward(self, batch: dict) -> Tensor:
        """batch of data.collate_han -> logits (B, 19)."""
        p = self.mean + matern(batch["stats"], self.items) @ self.dual
        return torch.logit(p, eps=1e-4)

    @classmethod
    def fit(cls, stats: Tensor, ratings: Tensor, versions: float = 1.0) -> "KernelRidge":
        """stats (n, S), ratings (n, D) in [0, 1]. The ratings are turned to their principal components, of
        which the later, noisier ones are shrunk more: ridge .1 to .5, times `versions`, rows an item, since
        they share the noise of one rating."""
        model = cls(*stats.shape, ratings.shape[1])
        stats, ratings = stats.double(), ratings.double()
        mean = ratings.mean(0)
        turn = torch.linalg.svd(ratings - mean, full_matrices=False).Vh
        kernel = matern(stats, stats)
        ridges = versions * torch.logspace(math.log10(0.1), math.log10(0.5), len(turn))
        solved = []
        for ridge, component in zip(ridges, turn @ (ratings - mean).T, strict=True):
            solved.append(torch.linalg.solve(kernel + ridge * torch.eye(len(kernel)), component))
        model.load_state_dict({"items": stats, "dual": torch.stack(solved, 1) @ turn, "mean": mean})
        return model.eval()


def matern(a: Tensor, b: Tensor) -> Tensor:
    """Matérn-3/2 kernel of rows (n, S), (m, S) -> (n, m)."""
    distance = torch.cdist(a, b) * math.sqrt(3 / a.shape[1])
    return (1 + distance) * torch.exp(-distance)


# our names of the parts -> the original PercePiano network's (reference/percepiano_han.npz)
PERCEPIANO_PARTS = {
    "embedding": "note_embedder.fc",
    "note": "score_encoder.lstm",
    "voice": "score_encoder.voice_net",
    "beat_attention": "score_encoder.beat_attention",
    "beat": "score_encoder.beat_rnn",
    "measure_attention": "score_encoder.measure_attention",
    "measure": "score_encoder.measure_rnn",
    "contractor": "performance_contractor",
    "head": "out_fc",
}
PERCEPIANO_LEVELS = {  # its last attention -> level
    "note_attention": "note",
    "beat_attention": "beat",
    "measure_attention": "measure",
    "performance_final_attention": "total_note_cat",
}


def han_from_percepiano(state_dict: Mapping, **kw) -> HAN:
    """Original PercePiano weights (arrays or tensors by the original's names) as a HAN; sizes from shapes.

    kw: model_args that the weights do not tell (dropout) or that must agree with them. Parameters that never
    reach the logits (reference/README.md) are left out; any other unknown or missing name raises DataError.
    """
    weights = {name.removeprefix("module."): torch.as_tensor(value) for name, value in state_dict.items()}
    found = [name for name in PERCEPIANO_LEVELS if f"{name}.context_vector" in weights]
    attention = found[0] if found else "performance_final_attention"
    level = PERCEPIANO_LEVELS[attention]
    form = "bilstm" if "lstm.weight_ih_l0" in weights else "han"
    parts = PERCEPIANO_PARTS | {"attention": attention}
    if form == "bilstm":
        parts["note"] = "lstm"
    if level == "note":
        parts["contractor"] = "note_contractor"
    names = ("note_embedder.fc.weight", "out_fc.1.weight", "out_fc.4.weight", f"{attention}.context_vector")
    try:
        embedding, hidden, last, context = (weights[name] for name in names)
    except KeyError as error:
        raise DataError(f"HAN weights: missing {error}; expected those of a PercePiano network") from error
    args = {"input_size": embedding.shape[1], "size": len(embedding), "heads": len(context)}
    args |= {"level": level, "model": form, "head_size": len(hidden), "num_label": len(last)}
    args["layers"] = [_layer_count(weights, parts[name]) for name in ("note", "voice", "beat", "measure")]
    model = HAN(**(args | kw))

    originals = {name: _percepiano_name(name, parts) for name in model.state_dict()}
    unused = ["performance_encoder", *(name for part, name in parts.items() if not hasattr(model, part))]
    dead = tuple(f"{name}." for name in unused)
    odd = [name for name in weights.keys() ^ set(originals.values()) if not name.startswith(dead)]
    if odd:
        raise DataError(f"HAN weights: unknown or missing {sorted(odd)}; expected a {form}, level {level}")
    return _with_weights(model, {name: weights[old].squeeze(-1) for name, old in originals.items()})


def _with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{type(model).__name__} weights: {one_line(error)}; expected others") from error
    return model.eval()


def _layer_count(weights: dict[str, Tensor], part: str) -> int:
    """Of a torch LSTM or GRU."""
    return len([name for name in weights if re.fullmatch(rf"{re.escape(part)}\.weight_ih_l\d+", name)])


def _percepiano_name(name: str, parts: dict[str, str]) -> str:
    part, _, rest = name.partition(".")
    rest = re.sub(r"forward_lstm\.(\d+)\.(\w+)_l0", r"\2_l\1", rest)
    rest = re.sub(r"backward_lstm\.(\d+)\.(\w+)_l0", r"\2_l\1_reverse", rest)
    return f"{parts[part]}.{rest.replace('linear.', 'attention_net.')}"


# ------------------------------------------------------------------------------------------------------------
# Phoneme decoder
# ------------------------------------------------------------------------------------------------------------
def output_frames(lengths, kernel: int, stride: int):
    """CTC frames of trials of `lengths` bins (tensor or array): (T - kernel) // stride + 1, at least 0."""
    return ((lengths - kernel) // stride + 1).clip(0)


class GRUDecoder(nn.Module):
    """Spikes to phoneme logits: smoothing, day layer, overlapping windows, GRU, linear (Willett et al. 2023).

    channels       features per 20 ms bin
    days           day layers; day -1 stands for their mean
    hidden, layers width of each GRU direction; GRU layers
    classes        logits per frame, blank 0 included
    kernel, stride length and step of the windows, bins
    dropout        between GRU layers; 0 = off
    input_dropout  on single values, before they are cut into windows; 0 = off
    layer_norm     LayerNorm on the output of the last GRU layer. Synthetic corpus, 4 layers of 128, 200
                   steps: phoneme error rate .95 without it, .38 with it, .38 with one after every layer
    smooth_width   SD of the Gaussian smoothing, bins; 0 = off
    smooth_taps    length of the smoothing kernel; an even one shifts by half a bin, the '24 baseline's way
    h0             a learned first state, one vector for all layers and trials, the '25 baseline's way
    whole_start    start of the recurrent weights: orthogonal as one (3H, H) matrix, as in both baselines,
                   whose gates are then not (gate 0: singular values .01 to .94); off: gate by gate
    aux_layer      a second head on the output of this GRU layer; 0 = none

    Parameters have the names of the '24 baseline (`neural_seq_decoder`).
    """

    def __init__(
        self,
        channels: int = 256,
        days: int = 24,
        hidden: int = 1024,
        layers: int = 5,
        classes: int = 41,
        kernel: int = 32,
        stride: int = 4,
        dropout: float = 0.3,
        input_dropout: float = 0.0,
        bidirectional: bool = False,
        layer_norm: bool = False,
        smooth_width: float = 2.0,
        smooth_taps: int = 20,
        h0: bool = False,
        whole_start: bool = False,
        aux_layer: int = 0,
    ):
        super().__init__()
        self.model_args = _arguments(locals())
        sizes = channels, days, hidden, layers - aux_layer, classes, kernel, stride, smooth_taps
        if min(sizes) < 1:
            found = f"GRUDecoder: {self.model_args}"
            raise DataError(f"{found}; expected sizes of at least 1, aux_layer < layers")
        self.kernel, self.stride = kernel, stride
        width = hidden * 2 if bidirectional else hidden

        def gru(inputs, count):
            within = dropout if count > 1 else 0.0  # nn.GRU warns of dropout in a single layer
            options = {"dropout": within, "batch_first": True, "bidirectional": bidirectional}
            return nn.GRU(inputs, hidden, count, **options)

        self.register_buffer("smoothing", gaussian_taps(smooth_width, smooth_taps))
        self.dayWeights = nn.Parameter(torch.empty(days, channels, channels))
        for weight in self.dayWeights.data:
            nn.init.eye_(weight)
        self.dayBias = nn.Parameter(torch.zeros(days, 1, channels))
        self.h0 = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, hidden))) if h0 else None
        self.input_dropout = nn.Dropout(input_dropout)
        self.between = nn.Dropout(dropout)
        lower = aux_layer or layers
        self.gru_decoder = gru(channels * kernel, lower)
        if aux_layer:
            self.gru_upper = gru(width, layers - lower)
            self.fc_aux = nn.Linear(width, classes)
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()
        self.fc_decoder_out = nn.Linear(width, classes)
        if h0:
            nn.init.xavier_uniform_(self.fc_decoder_out.weight)
        for name, parameter in self.named_parameters():
            if "weight_hh" in name:
                for gate in [parameter.data] if whole_start else parameter.data.chunk(3):
                    nn.init.orthogonal_(gate)
            elif "weight_ih" in name:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, lengths: Tensor, day: Tensor, auxiliary: bool = False) -> tuple:
        """x (B, T, C), lengths (B,) bins, day (B,) -> logits (B, F, classes) float32, 0 beyond frames (B,);
        if `auxiliary` the logits of the second head as well.

        A trial's logits do not depend on its batch-mates, nor on what stands beyond its length. Lengths are
        read on the CPU: keep them there, or a GPU has to wait.
        """
        frames = output_frames(lengths, self.kernel, self.stride)
        F = int(frames.max())
        x = nn.functional.softsign(self.day_layer(self.smooth(x, lengths), day))
        lower = self.recurrence(self.gru_decoder, self.windows(self.input_dropout(x), max(F, 1)), frames)
        upper = lower
        if self.model_args["aux_layer"]:
            upper = self.recurrence(self.gru_upper, self.between(lower), frames)
        beyond = torch.arange(F) >= frames.cpu().unsqueeze(1)  # (B, F)
        beyond = beyond.to(x.device, non_blocking=True).unsqueeze(2)
        logits = self.fc_decoder_out(self.norm(upper))[:, :F].float().masked_fill(beyond, 0.0)
        if auxiliary:
            return logits, frames, self.fc_aux(lower)[:, :F].float().masked_fill(beyond, 0.0)
        return logits, frames

    def smooth(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (B, T, C) smoothed in time, with zeros beyond each trial's own ends; always float32."""
        B, T, C = x.shape
        beyond = torch.arange(T, device=x.device) >= lengths.to(x.device, non_blocking=True).unsqueeze(1)
        x = x.masked_fill(beyond.unsqueeze(2), 0.0).transpose(1, 2)
        taps = len(self.smoothing)
        x = nn.functional.pad(x, ((taps - 1) // 2, taps // 2))
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.conv1d(x, self.smoothing.expand(C, 1, taps), groups=C).transpose(1, 2)

    def day_layer(self, x: Tensor, day: Tensor) -> Tensor:
        """x W_day + b_day, (B, T, C); day -1 finds the mean, which stands last."""
        day = day.to(x.device, non_blocking=True)
        weight = torch.cat([self.dayWeights, self.dayWeights.mean(0, keepdim=True)])
        bias = torch.cat([self.dayBias, self.dayBias.mean(0, keepdim=True)])
        return torch.baddbmm(bias[day], x, weight[day])

    def separate_days(self) -> list[Tensor]:
        """Every day's matrix, then every day's bias: windows on the parameters that hold all of them."""
        return [*self.dayWeights.data, *self.dayBias.data]

    def hand_over_days(self, layers: list[Tensor]) -> None:
        """Gives `separate_days` of the days that a batch had their gradients, the others none: an optimiser
        leaves those and their moments alone, where a gradient of zero would go on by momentum."""
        present = self.dayBias.grad.flatten(1).any(1).tolist()
        gradients = [*self.dayWeights.grad, *self.dayBias.grad]
        for layer, gradient, here in zip(layers, gradients, present * 2, strict=True):
            layer.grad = gradient if here else None

    def start_from(self, start: "GRUDecoder", rows: Sequence[int]) -> None:
        """Weights of a decoder of these sizes; rows: its day of each day here, -1: the mean of all."""
        weights = start.state_dict()
        for name in ("dayWeights", "dayBias"):
            layers = weights[name]
            weights[name] = torch.cat([layers, layers.mean(0, keepdim=True)])[rows]
        self.load_state_dict(weights)

    def windows(self, x: Tensor, count: int) -> Tensor:
        """x (B, T, C) -> its first `count` windows (B, count, C * kernel), in them channel * kernel + bin."""
        missing = (count - 1) * self.stride + self.kernel - x.shape[1]
        x = nn.functional.pad(x, (0, 0, 0, max(missing, 0)))
        return x.unfold(1, self.kernel, self.stride)[:, :count].flatten(2)

    def recurrence(self, gru: nn.GRU, x: Tensor, frames: Tensor) -> Tensor:
        """The GRU's output (B, F, width). One direction may run into padding: nothing of it comes back to a
        trial. Of two directions the second must start at a trial's own last frame, as packing makes it do."""
        first = None
        if self.h0 is not None:
            states = gru.num_layers * (2 if gru.bidirectional else 1)
            first = self.h0.expand(states, len(x), -1).contiguous().to(x.dtype)
        if not gru.bidirectional:
            return gru(x, first)[0]
        counts = frames.cpu().clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(x, counts, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(gru(packed, first)[0], True)[0]


def gaussian_taps(width: float, taps: int) -> Tensor:
    """(taps,) normalised Gaussian of SD `width` bins; width 0: no smoothing."""
    if not width:
        return torch.ones(1)
    at = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    weight = torch.exp(-((at / width) ** 2) / 2)
    return (weight / weight.sum()).float()


def gru_decoder_from_baseline(state_dict: Mapping, stride: int = 4) -> GRUDecoder:
    """Weights of either public baseline (arrays or tensors by its names) as a GRUDecoder: '24
    (`neural_seq_decoder`) or '25 (`nejm-brain-to-text`, whose names are `day_weights.N`, `gru.*`, `out.*`).

    Sizes from the shapes, dropout as they were trained; the stride is not in the weights. Dead parameters
    (`inpLayer*`) are left out; any other unknown or missing name raises DataError.
    """
    alive = [name for name in state_dict if "inpLayer" not in name]
    weights = {_bare(name): torch.as_tensor(state_dict[name]).float() for name in alive}
    of_25 = "day_weights.0" in weights
    try:
        if of_25:
            weights = _by_names_of_24(weights)
        smoothing = weights.pop("gaussianSmoother.weight").flatten(1)
        days, channels, _ = weights["dayWeights"].shape
        gates, width = weights["gru_decoder.weight_ih_l0"].shape
        classes = len(weights["fc_decoder_out.weight"])
    except KeyError as error:
        raise DataError(f"decoder weights: missing {error}; expected those of a public baseline") from error
    kernel = width // channels
    model = GRUDecoder(
        channels,
        days,
        hidden=gates // 3,
        layers=_layer_count(weights, "gru_decoder"),
        classes=classes,
        kernel=kernel,
        stride=stride if kernel > 1 else 1,
        dropout=0.4,
        input_dropout=0.2 if of_25 else 0.0,
        bidirectional="gru_decoder.weight_ih_l0_reverse" in weights,
        smooth_taps=smoothing.shape[1],
        h0=of_25,
        whole_start=True,
    )
    return _with_weights(model, weights | {"smoothing": smoothing[0]})


def _bare(name):
    """A parameter's name without what DataParallel and torch.compile put before it."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", str(name))


def _by_names_of_24(weights):
    """The '25 baseline's weights by the names of '24: days stacked, windows from bin-major to channel-major,
    the trainer's smoothing (SD 2, 9 taps) among them."""
    days = sum(name.startswith("day_weights.") for name in weights)
    renamed = {
        "dayWeights": torch.stack([weights.pop(f"day_weights.{i}") for i in range(days)]),
        "dayBias": torch.stack([weights.pop(f"day_biases.{i}") for i in range(days)]),
    }
    for name, value in weights.items():
        name = name.replace("gru.", "gru_decoder.")
        renamed[name.replace("out.", "fc_decoder_out.")] = value
    channels = renamed["dayWeights"].shape[1]
    by_bins = renamed["gru_decoder.weight_ih_l0"]
    by_channels = by_bins.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1)
    smoothing = gaussian_taps(2.0, 9).repeat(channels, 1, 1)
    return renamed | {"gru_decoder.weight_ih_l0": by_channels, "gaussianSmoother.weight": smoothing}


class _Scalar:
    """Stands for the NumPy scalar of a '25 checkpoint, which is not needed: NumPy is not called."""

    def __init__(self, *about):
        pass

    def __setstate__(self, state) -> None:
        pass


def read_baseline(path: str | Path) -> tuple[GRUDecoder, list[str]] | None:
    """A file of either public trainer ('24: modelWeights, '25: best_checkpoint) as a decoder and its
    sessions; None where the file is none. Sessions of '25 stand in `args.yaml` beside it, those of '24 are
    known where they are 24; otherwise day00, day01 ... DataError for weights that are incomplete."""
    names = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    stand_ins = [(_Scalar, name) for name in names]
    content = None
    with suppress(Exception), torch.serialization.safe_globals(stand_ins):  # of what a foreign file raises
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or "format" in content:
        return None
    weights = content.get("model_state_dict", content)
    names = set(map(_bare, weights))
    if not names & {"day_weights.0", "dayWeights"}:
        return None
    try:
        model = gru_decoder_from_baseline(weights)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        found = f"{path}: unlike a public baseline's weights ({one_line(error)})"
        raise DataError(f"{found}; expected modelWeights or best_checkpoint, whole") from error
    _check_finite(path, model)
    days, beside = model.model_args["days"], Path(path).with_name("args.yaml")
    sessions = [] if "day_weights.0" in names else SESSIONS_24
    if not sessions and beside.is_file():
        text = beside.read_text(encoding="utf-8", errors="replace")
        sessions = re.findall(r"^[ -]+['\"]?(t\d+\.\d{4}\.\d\d\.\d\d)\b", text, re.MULTILINE)
        sessions = list(dict.fromkeys(sessions))
    return model, sessions if len(sessions) == days else [f"day{i:02d}" for i in range(days)]


def load_decoder(path: str | Path) -> tuple[GRUDecoder, list[str]]:
    """A decoder and its sessions from a checkpoint of ours, or from a file of either public baseline."""
    found = read_baseline(path)
    if found:
        return found
    model, ckpt = load_checkpoint(path)
    if ckpt["task"] != "decoder":
        raise DataError(f"{path}: of task {ckpt['task']}; expected a decoder")
    return model, ckpt["data"]["days"]


def decoder_info(days: list[str], channels: int, valid: str, synthetic: bool) -> dict:
    """What a decoder's checkpoint says of its data."""
    about = {"days": days, "channels": channels, "phonemes": list(PHONEMES), "rules": speech_rules()}
    return about | {"valid": valid, "synthetic": synthetic}


def save_baseline(path: str | Path, out: str | Path) -> None:
    """`python data.py decoder-weights`: a checkpoint of ours of a public baseline's file."""
    found = read_baseline(ordinary(path))
    if found is None:
        raise DataError(f"{path}: no weights of a public baseline; expected modelWeights or best_checkpoint")
    model, sessions = found
    about = decoder_info(sessions, model.model_args["channels"], "blocks", False)
    kept = {"task": "decoder", "model_args": model.model_args, "model": model.state_dict()}
    save_checkpoint(out, kept | {"step": 0, "args": {"seed": None}, "data": about})
    print(f"{out}: {path}, {len(sessions)} day layers: {', '.join(sessions)}")


# ------------------------------------------------------------------------------------------------------------
# AST
# ------------------------------------------------------------------------------------------------------------
AST_PRESETS = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
}
POOLINGS = ("mean", "meanstd", "cls")
PATCH = 16  # frames and mel bins


class Block(nn.Module):
    """Pre-LN transformer block: attention, then an MLP four times as wide (exact GELU). No dropout in the
    attention."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """x (B, T, C), attend (B, T) tokens that may be seen -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        attend = None if attend is None else attend.view(B, 1, 1, T)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attend)
        x = x + self.dropout(self.proj(seen.transpose(1, 2).reshape(B, T, C)))
        hidden = self.dropout(nn.functional.gelu(self.fc1(self.norm2(x))))
        return x + self.dropout(self.fc2(hidden))


class Positions(nn.Module):
    """Learned positions of a grid of patches: one vector per row plus one per column, or one per patch
    (`table`).

    Rows and columns start as sines and cosines, in a half of the width each: from small random numbers the
    masked pre-training of tiny never left what the average level of a row gives."""

    def __init__(self, freq: int, time: int, width: int, table: bool):
        super().__init__()
        self.freq = nn.Parameter(torch.zeros(freq, time if table else 1, width))
        self.time = None if table else nn.Parameter(torch.zeros(1, time, width))
        if table:
            nn.init.trunc_normal_(self.freq, std=0.02)
        else:
            self.freq.data[:, 0, : width // 2] = sinusoids(freq, width // 2)
            self.time.data[0, :, width // 2 :] = sinusoids(time, width - width // 2)

    def forward(self, columns: int) -> Tensor:
        """(freq * columns, width) of the first columns, frequency-major."""
        grid = self.freq if self.time is None else self.freq + self.time
        return grid[:, :columns].flatten(0, 1)


def sinusoids(count: int, width: int) -> Tensor:
    """(count, width): sines, then cosines of the places 0, 1, ... at wavelengths from 2 pi to 20000 pi
    (Vaswani et al., 2017, section 3.5)."""
    angle = torch.arange(count).unsqueeze(1) * 10000 ** (-torch.arange((width + 1) // 2) / max(width / 2, 1))
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]


class GroupedHead(nn.Module):
    """One head per group of outputs: LayerNorm, linear and GELU make the group's query; a linear layer reads
    it."""

    def __init__(self, size: int, width: int, groups: list[list[int]], dropout: float):
        super().__init__()
        self.query = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width), nn.GELU()) for _ in groups
        )
        self.dropout = nn.Dropout(dropout)
        self.read = nn.ModuleList(nn.Linear(width, len(group)) for group in groups)
        self.register_buffer("place", torch.tensor(sum(groups, [])).argsort(), persistent=False)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled (B, size) -> (B, outputs) in the outputs' own order."""
        queries = torch.stack([query(pooled) for query in self.query], dim=1)  # (B, G, width)
        queries = self.dropout(queries)
        rated = torch.cat([read(queries[:, g]) for g, read in enumerate(self.read)], dim=1)
        return rated.index_select(1, self.place)


class AST(nn.Module):
    """Audio Spectrogram Transformer: masked pre-training (num_outputs None) or ratings (Gong et al., 2021 and
    2022).

    Patches are numbered frequency-major: id = row * columns + column, of the columns of the batch at hand.
    """

    def __init__(
        self,
        frames: int = 1024,  # longest input, of 10 ms; a shorter one uses the first columns of the positions
        mel: int = 128,
        width: int = 768,  # of the encoder, as depth and heads: AST_PRESETS
        depth: int = 12,
        heads: int = 12,
        stride: int = 16,  # of the patches on both axes; 10 (overlap) is for fine-tuning only
        dropout: float = 0.1,  # after the positions, the attention and both layers of each MLP
        ssast_compat: bool = False,  # cls and distillation token and one position per patch, as SSAST
        visible_only: bool = False,  # pre-training: encode visible patches, then decode (He et al., 2022)
        decoder_depth: int = 2,  # its blocks, half as wide as the encoder
        checkpointing: bool = False,  # keep no activations inside blocks, compute them again for the gradient
        num_outputs: int | None = None,  # ratings; None: pre-training
        pooling: str = "mean",  # or meanstd (and deviation over the patches), cls (mean of both tokens)
        depths: int = 1,  # tokens after so many evenly spaced blocks, the last included, are pooled
        statistics: bool = False,  # the heads see the whole clip's ClipStatistics too
        groups: list[list[int]] | None = None,  # outputs of each head (GroupedHead); None: one linear layer
        balance: str | None = None,  # "uncertainty": log_variance (G,) of the groups, for the trainer's loss
    ):
        super().__init__()
        self.model_args = _arguments(locals())
        _check_ast(**self.model_args)
        self.stride, self.pooling, self.checkpointing = stride, pooling, checkpointing
        self.rows, self.columns = self.count(mel), self.count(frames)
        self.embed = nn.Conv2d(1, width, PATCH, stride)
        self.position = Positions(self.rows, self.columns, width, table=ssast_compat)
        self.extra = None
        if ssast_compat:  # cls and distillation token, and their positions
            self.extra = nn.Parameter(nn.init.trunc_normal_(torch.empty(2, 2, width), std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder = self.log_variance = self.statistics = None
        shares = 4 if num_outputs is None else depths
        self.levels = sorted({max(1, round(depth * k / shares)) for k in range(1, shares + 1)})
        if num_outputs is None:
            if visible_only:
                width = width // 2
                self.narrow = nn.Linear(2 * width, width)
                self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
                self.decoder = nn.ModuleList(Block(width, heads, dropout) for _ in range(decoder_depth))
                self.decoder_position = Positions(self.rows, self.columns, width, table=False)
            # stands for a masked patch
            self.hidden = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
            self.discriminate = _pixel_head(width)
            self.generate = _pixel_head(width)
        else:
            size = (2 if pooling == "meanstd" else 1) * width * len(self.levels)
            if statistics:
                self.statistics = ClipStatistics(mel)
                size += self.statistics.size
            self.standardise = Standardise(size)
            self.head = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, num_outputs))
            if groups:
                self.head = GroupedHead(size, width, groups, dropout)
            if balance:
                self.log_variance = nn.Parameter(torch.zeros(len(groups)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def count(self, length):
        """Patches along an axis of `length` frames or mel bins (int or tensor): whole ones, at least 1 of a
        tensor."""
        count = (length - PATCH) // self.stride + 1
        return count.clip(min=1) if isinstance(count, Tensor) else count

    def forward(
        self,
        fbank: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        compat: bool = False,
        statistics: Tensor | None = None,
        described: Tensor | None = None,
    ) -> Tensor | dict:
        """fbank (B, frames, mel) normalised, lengths (B,) frames; None: all valid. Or K crops of each item:
        (B, K, frames, mel) and (B, K): their tokens are pooled together before the heads. statistics: of
        each whole clip, `ClipStatistics.values`, where the heads see them; None: mean of the crops' own. Or
        described (B, size) alone, of `describe`, for the heads.

        With a mask: pretrain_losses, so that DDP sees it. Otherwise ratings (B, num_outputs) float32, or
        without num_outputs the tokens (B, extra + patches, width). Padding and batch-mates have no influence.
        """
        if mask is not None:
            return self.pretrain_losses(fbank, mask, compat, lengths)
        if self.model_args["num_outputs"] is None:
            return self.tokens_of(fbank, lengths)[0][-1]
        if described is None:
            described = self.describe(fbank, lengths, statistics)
        return self.head(self.standardise(described)).float()

    def describe(self, fbank, lengths=None, statistics=None):
        """What the heads see of items, (B, size), arguments as `forward`."""
        crops = fbank.shape[1] if fbank.dim() == 4 else 1
        fbank = fbank.flatten(0, -3)  # (B * crops, frames, mel)
        lengths = None if lengths is None else lengths.flatten()
        levels, valid = self.tokens_of(fbank, lengths)
        pooled = [self.pool(tokens, valid, crops) for tokens in levels]
        if self.statistics is not None:
            if statistics is None:
                statistics = self.statistics.values(fbank, lengths).unflatten(0, (-1, crops)).mean(1)
            pooled.append(self.statistics(statistics))
        return torch.cat(pooled, dim=1)

    def token_moments(self, fbank: Tensor) -> Tensor:
        """fbank (B, K, frames, mel) -> mean and deviation of the tokens at each of `levels`: (B, levels * 2 *
        width)."""
        levels, _ = self.tokens_of(fbank.flatten(0, 1), None)
        return torch.cat([self.pool(tokens, None, fbank.shape[1], "meanstd") for tokens in levels], dim=1)

    def tokens_of(self, fbank, lengths):
        """What `encode` makes of them, and which patches are valid."""
        tokens, valid = self.tokens(fbank, lengths)
        return self.encode(tokens + self.position(tokens.shape[1] // self.rows), valid), valid

    def tokens(self, fbank, lengths):
        """Patch projections (B, patches, width) and, of given lengths, which ones lie inside (B, patches)."""
        frames, mel = fbank.shape[1:]
        columns = self.count(frames)
        if self.count(mel) != self.rows or not 1 <= columns <= self.columns:
            expected = f"{PATCH} to {self.model_args['frames']} frames of {self.model_args['mel']} mel bins"
            raise DataError(f"AST: input of {frames} frames, {mel} mel bins; expected {expected}")
        x = self.embed(fbank.transpose(1, 2).unsqueeze(1)).flatten(2).transpose(1, 2)
        if lengths is None:
            return x, None
        return x, _inside(columns, self.count(lengths.to(x.device))).repeat(1, self.rows)

    def encode(self, x, valid):
        """Patches with their positions (B, T, width), valid (B, T) -> tokens (B, extra + T, width) after each
        of the blocks `levels`, the last after the norm."""
        if self.extra is not None:
            x, valid = _behind(self.extra.sum(0).expand(len(x), -1, -1), x, valid)
        x = self.dropout(x)
        found = []
        for number, block in enumerate(self.blocks, 1):
            x = self.through(block, x, valid)
            if number in self.levels:
                found.append(x)
        found[-1] = self.norm(x)
        return found

    def through(self, block, x, valid):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, valid, use_reentrant=False)
        return block(x, valid)

    def pool(self, tokens, valid, crops=1, pooling=None):
        """Tokens (B * crops, extra + T, width) of the encoder, valid (B * crops, T) -> (B, width), or twice
        the width, float32."""
        pooling = pooling or self.pooling
        tokens = tokens.float()
        if pooling == "cls":  # the first two: cls and distillation token
            return tokens[:, :2].unflatten(0, (-1, crops)).mean((1, 2))
        tokens = tokens if self.extra is None else tokens[:, 2:]
        valid = tokens.new_ones(tokens.shape[:2]) if valid is None else valid
        tokens = tokens.unflatten(0, (-1, crops)).flatten(1, 2)  # (B, crops * T, width)
        valid = valid.unflatten(0, (-1, crops)).flatten(1, 2)
        mean, deviation = _mean_and_deviation(tokens, valid)
        return mean if pooling == "mean" else torch.cat([mean, deviation], dim=1)

    def pretrain_losses(
        self, fbank: Tensor, mask: Tensor, compat: bool = False, lengths: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Both objectives of SSAST on masked patches; the total that is minimised is nce + 10 mse.

        mask (B, N) patch ids, -1 for none (cluster_mask); lengths (B,) valid frames. compat=False is the
        paper: softmax over the patches for each prediction, and its accuracy. compat=True is the original
        code: softmax over the predictions for each patch, accuracy by patches of that softmax. Scalars,
        float32: nce, mse, accuracy · chance: accuracy of guessing · mse_mean: of predicting the batch's mean
        patch. Averages over the masked patches of a clip, then over clips.
        """
        hidden, target, there = self.masked(fbank, mask, lengths)
        weight = there.float() / there.sum(1, keepdim=True) / len(fbank)
        error = (self.generate(hidden).float() - target).square().mean(2)
        mean = (target * weight.unsqueeze(2)).sum((0, 1))
        losses = contrast(self.discriminate(hidden).float(), target, there, weight, compat)
        losses["mse"] = (error * weight).sum()
        losses["mse_mean"] = ((target - mean).square().mean(2) * weight).sum()
        return losses

    def masked(self, fbank, mask, lengths):
        """Final tokens (B, N, width) and pixels (B, N, 256) of the masked patches, and which of the N there
        are."""
        x, valid = self.tokens(fbank, lengths)
        B, T, _ = x.shape
        ids = mask.clip(min=0)
        hide = torch.zeros(B, T + 1, dtype=torch.bool, device=x.device)
        hide = hide.scatter(1, mask.remainder(T + 1), True)[:, :T]  # -1 marks the last, which is cut off
        position = self.position(T // self.rows)
        if self.decoder is None:
            x = torch.where(hide.unsqueeze(2), self.hidden.to(x.dtype), x)
            tokens = self.encode(x + position, valid)[-1][:, -T:]
        else:
            tokens = self.fill_in(x + position, hide, valid, T - mask.shape[1])
        return gather_patches(tokens, ids), gather_patches(patches(fbank), ids), mask >= 0

    def fill_in(self, x, hide, valid, visible):
        """Encoder over the visible ones of x (B, T, width), decoder over all -> (B, T, decoder width). hide,
        valid (B, T): masked patches, and those inside their clips (None: all; `visible` are not masked)."""
        seen = ~hide if valid is None else ~hide & valid
        if valid is not None:
            visible = int(seen.sum(1).max())
        if visible < 1:
            raise DataError("AST: every patch is masked; expected some for visible_only; lower --mask")
        order = seen.byte().argsort(dim=1, descending=True, stable=True)  # (B, T): visible ones first
        real = None if valid is None else seen.gather(1, order)[:, :visible]
        encoded = self.encode(gather_patches(x, order[:, :visible]), real)[-1]
        encoded = self.narrow(encoded)  # (B, extra + visible, decoder width)
        extra = encoded.shape[1] - visible
        back = order.argsort(dim=1).clip(max=visible - 1)  # (B, T): where each patch stands in the order
        x = gather_patches(encoded[:, extra:], back)
        x = torch.where(seen.unsqueeze(2), x, self.hidden.to(x.dtype))
        x = x + self.decoder_position(x.shape[1] // self.rows)
        x, valid = _behind(encoded[:, :extra], x, valid)
        for block in self.decoder:
            x = self.through(block, x, valid)
        return self.decoder_norm(x)[:, extra:]


def _behind(extra, x, valid):
    """Tokens that are always valid and behind them x, of which those `valid` are, or all (None)."""
    if valid is not None:
        valid = nn.functional.pad(valid, (extra.shape[1], 0), value=True)
    return torch.cat([extra, x], dim=1), valid


def _pixel_head(width):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PATCH**2))


def _arguments(scope):
    """The arguments of a constructor, of its locals()."""
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}


def _check_ast(frames, mel, width, heads, stride, ssast_compat, num_outputs, pooling, groups, **args):
    narrowest = width // 2 if args["visible_only"] else width
    outputs = sorted(sum(groups or [], []))
    rules = {
        f"{PATCH} or more frames and mel bins": min(frames, mel) >= PATCH,
        "heads that divide the width, with visible_only half of it": narrowest % heads == width % heads == 0,
        f"pooling one of {POOLINGS}": pooling in POOLINGS,
        "pooling cls only with ssast_compat": pooling != "cls" or ssast_compat,
        "each output in one group": not groups or outputs == [*range(num_outputs)],
        "groups, for balance": groups or not args["balance"],
        f"stride {PATCH} in pre-training": num_outputs or stride == PATCH,
    }
    broken = [rule for rule, kept in rules.items() if not kept]
    if broken:
        raise DataError(f"AST: expected {broken[0]}")


def gather_patches(x: Tensor, ids: Tensor) -> Tensor:
    """x (B, T, C), ids (B, N) -> (B, N, C)."""
    return x.gather(1, ids.unsqueeze(2).expand(-1, -1, x.shape[2]))


def patches(fbank: Tensor) -> Tensor:
    """fbank (B, frames, mel) -> (B, patches, 256): patches and their pixels frequency-major, as
    reference/ssast.npz."""
    x = fbank.float().unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # (B, columns, rows, time, frequency)
    return x.permute(0, 2, 1, 4, 3).flatten(3).flatten(1, 2)


def contrast(
    predicted: Tensor, target: Tensor, there: Tensor, weight: Tensor, compat: bool
) -> dict[str, Tensor]:
    """InfoNCE among the masked patches of each clip: predicted, target (B, N, C); which of the N there are,
    and their weight in the averages, (B, N) -> nce, accuracy, chance.

    Scores are plain dot products. compat: see AST.pretrain_losses.
    """
    both = there.unsqueeze(1) & there.unsqueeze(2)
    with torch.autocast(target.device.type, enabled=False):
        score = torch.einsum("bic,bjc->bij", target, predicted)  # patch i, prediction j
    score = score.masked_fill(~both, -1e30)
    own = score.diagonal(dim1=1, dim2=2)
    nce = ((score.logsumexp(2 if compat else 1) - own) * weight).sum()
    best = (score.softmax(2) if compat else score).argmax(1)  # patch chosen for each prediction
    hit = (best == torch.arange(there.shape[1], device=best.device)).float()
    chance = (weight / there.sum(1, keepdim=True)).sum()
    return {"nce": nce, "accuracy": (hit * weight).sum(), "chance": chance}


def cluster_mask(
    batch: int, freq: int, time: int, count: int, device=None, generator=None, side=(3, 5), columns=None
) -> Tensor:
    """(batch, count) ids of patches to mask, in square clusters: id = row * time + column, unique, exactly
    `count`.

    One side per clip, drawn from `side`. Clusters come one by one at places drawn evenly from all that touch
    the grid, cut at its edges, until `count` patches are covered; the last gives patches at random. So all
    patches are equally likely (within 1 % for 400 of 512). A time of arrival for every place, and for each
    patch the first arrival in a window around it, say the same without a loop. columns (batch,): valid time
    columns; round(count * columns / time) patches among them are masked, -1 fills up.
    """
    if not 0 < count <= freq * time:
        raise DataError(f"cluster_mask: {count} patches of {freq} x {time}; expected 1 to {freq * time}")
    rand = partial(torch.rand, dtype=torch.float64, device=device, generator=generator)  # float32 would tie
    sides = [*range(side[0], side[1] + 1)]
    arrival = rand(batch, freq + sides[-1] - 1, time + sides[-1] - 1)
    first = []
    for C in sides:
        within = arrival[:, : freq + C - 1, : time + C - 1]
        first.append(within.unfold(1, C, 1).amin(-1).unfold(2, C, 1).amin(-1))
    drawn = torch.randint(len(sides), (batch,), device=device, generator=generator)
    first = torch.stack(first)[drawn, torch.arange(batch, device=device)].flatten(1)  # (batch, patches)
    first = first + 1e-9 * rand(batch, freq * time)
    if columns is None:
        return first.topk(count, largest=False, sorted=False).indices
    columns = columns.to(first.device)
    inside = _inside(time, columns).repeat(1, freq)
    ids = first.masked_fill(~inside, 2.0).topk(count, largest=False).indices
    counts = (count * columns / time).round().clip(min=1)
    return ids.masked_fill(~_inside(count, counts), -1)


def adapt_ast(model: AST, **changes) -> AST:
    """A network with other model_args (frames, stride, num_outputs, pooling, ...) and the weights of `model`.

    Positions are fitted to the new grid; a new head starts afresh, heads that it lacks are left out, anything
    else must match (DataError). Without ssast_compat positions keep their time: cut, or interpolated where
    frames or stride ask for more columns. With it as the original does: fewer columns are the table's centre.
    """
    new = AST(**(model.model_args | changes))
    old, state = model.state_dict(), new.state_dict()
    head = ("head.", "log_variance", "statistics.", "standardise.")
    sizes = ("width", "depth", "heads", "ssast_compat")
    unlike = [size for size in sizes if model.model_args[size] != new.model_args[size]]
    unlike += [name for name in state if name not in old and not name.startswith(head)]
    if unlike:
        raise DataError(f"AST: cannot become {changes}: {', '.join(unlike)}; expected the same encoder")
    covered = model.columns if model.extra is not None else model.count(new.model_args["frames"])
    for name in old.keys() & state.keys():
        if "position." in name:
            state[name].copy_(fit_grid(old[name][:, :covered], *state[name].shape[:2]))
        elif old[name].shape == state[name].shape:
            state[name].copy_(old[name])
    return new.eval()


def fit_grid(grid: Tensor, rows: int, columns: int) -> Tensor:
    """Positions (F, T, C) cut around the centre, or interpolated, to (rows, columns, C): time first, as
    SSAST."""
    grid = grid.permute(2, 0, 1).unsqueeze(0)  # (1, C, F, T)
    for dim, size in ((3, columns), (2, rows)):
        have = grid.shape[dim]
        if size < have:
            grid = grid.narrow(dim, have // 2 - size // 2, size)
        elif size > have:
            shape = (size, grid.shape[3]) if dim == 2 else (grid.shape[2], size)
            grid = nn.functional.interpolate(grid, shape, mode="bilinear")
    return grid[0].permute(1, 2, 0)


def ast_from_ssast(state_dict: Mapping, frames: int = 1024, num_outputs: int | None = None, **kw) -> AST:
    """A public checkpoint of 16 x 16 patches (arrays or tensors by its names: SSAST, AST, or AST of Hugging
    Face) as an AST for input of `frames`.

    num_outputs None: for pre-training (stride 16); otherwise for ratings, with the checkpoint's head where it
    has so many outputs. kw: other model_args (stride: as in the checkpoint, 16 or 10). Sizes come from the
    shapes, heads are 64 wide. Unknown, missing or misshapen weights raise DataError; ImageNet's heads
    (`v.head*`) are left out.
    """
    kept = [name for name in state_dict if "v.head" not in name]
    weights = {_public_name(name): torch.as_tensor(state_dict[name]).float() for name in kept}
    for query in [name for name in weights if ".query." in name]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        parts = [weights.pop(name, torch.empty(0)) for name in names]
        weights[query.replace("query", "qkv")] = torch.cat(parts)
    head = {name: weights.pop(name) for name in list(weights) if name.startswith("head.")}
    mel = int(weights.pop("p_input_fdim", 128))
    try:
        table = weights.pop("pos_embed")[0]
        tokens = torch.cat([weights.pop("cls_token"), weights.pop("dist_token")], dim=1)[0]
        count = len(table) - 2

        def fits(stride: int) -> tuple[bool, bool]:
            rows = (mel - PATCH) // stride + 1
            return count == rows * ((frames - PATCH) // stride + 1), count % rows == 0

        # SSAST's pre-training has stride 16; else the one that fits the table, of both that of `frames` or 10
        stride = PATCH if "hidden" in weights else max((10, PATCH), key=fits)
        columns = count // ((mel - PATCH) // stride + 1)
        long = int(weights.pop("p_input_tdim", (columns - 1) * stride + PATCH))
        width = len(weights["embed.weight"])
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        outputs = None if stride == PATCH else num_outputs
        model = AST(long, mel, width, depth, width // 64, stride, ssast_compat=True, num_outputs=outputs)
        weights["extra"] = torch.stack([tokens, table[:2]])
        weights["position.freq"] = table[2:].unflatten(0, (model.rows, -1))
        if "hidden" in weights:
            weights["hidden"] = weights["hidden"].flatten()
        if num_outputs is not None:  # what only pre-training needs may be absent
            needed = ("hidden", "discriminate.", "generate.", "head.", "standardise.")
            weights = {k: v for k, v in model.state_dict().items() if k.startswith(needed)} | weights
        model.load_state_dict(weights)
        model = adapt_ast(model, frames=frames, num_outputs=num_outputs, **{"stride": stride} | kw)
        if head and len(head["head.1.bias"]) == num_outputs and not kw.get("groups"):
            model.load_state_dict(model.state_dict() | head)
    except (KeyError, RuntimeError) as error:
        expected = "patches of 16 x 16, stride 16 or 10, public names"
        raise DataError(f"SSAST weights: {one_line(error)}; expected {expected}") from error
    return model


def _public_name(name):
    """Our name of a weight of SSAST or AST, or of Hugging Face's AST."""
    name = re.sub(r"^(module\.)?(v\.)?(audio_spectrogram_transformer\.)?(embeddings\.)?", "", name)
    for original, own in (
        ("attn.", ""),
        ("mlp.", ""),
        ("patch_embed.proj", "embed"),
        ("mask_embed", "hidden"),
        ("cpredlayer", "discriminate"),
        ("gpredlayer", "generate"),
        ("mlp_head", "head"),
        ("position_embeddings", "pos_embed"),  # Hugging Face's from here
        ("distillation_token", "dist_token"),
        ("patch_embeddings.projection", "embed"),
        ("encoder.layer", "blocks"),
        ("attention.attention.", ""),
        ("attention.output.dense", "proj"),
        ("intermediate.dense", "fc1"),
        ("output.dense", "fc2"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("classifier.layernorm", "head.0"),
        ("classifier.dense", "head.1"),
        ("layernorm", "norm"),
    ):
        name = name.replace(original, own)
    return name


# ------------------------------------------------------------------------------------------------------------
# Baselines on filter banks
# ------------------------------------------------------------------------------------------------------------
class CNN(nn.Module):
    """Convolutions over the spectrogram, the baseline of AST: four blocks of 3 x 3 convolution, LayerNorm
    over channels, ReLU and 2 x 2 mean pooling, then mean and standard deviation over time, and one hidden
    layer. Any length from 16 frames on."""

    def __init__(self, mel: int = 128, width: int = 32, num_outputs: int = 19, dropout: float = 0.3):
        super().__init__()
        self.model_args = _arguments(locals())
        sizes = [1, width, 2 * width, 4 * width, 4 * width]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes[1:])
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(2 * sizes[-1] * (mel // 16), 4 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, num_outputs),
        )
        self.to(memory_format=torch.channels_last)  # the norms' axis; 2.4 times as fast on a CPU

    def forward(self, fbank: Tensor, lengths: Tensor | None = None) -> Tensor:
        """fbank (B, frames, mel) normalised, lengths (B,) frames; None: all valid -> (B, num_outputs)
        float32. Padding has no influence: it is zero before every convolution, as what lies beyond the
        edge."""
        inside = _frames_inside(fbank, lengths)
        x = (fbank * inside.unsqueeze(2)).unsqueeze(1)  # (B, C, T, mel)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x).movedim(1, 3)).movedim(3, 1)
            x = nn.functional.avg_pool2d(x.relu(), 2)
            inside = inside[:, 1::2]  # of two frames both
            x = x * inside[:, None, :, None]
        x = x.transpose(1, 2).flatten(2).float()  # (B, T / 16, C * mel / 16)
        return self.head(torch.cat(_mean_and_deviation(x, inside), dim=1)).float()


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CLIP_HEAD = {"hidden": 128, "dropout": 0.1}  # of ClipKernel's heads
SPANS = (3, 8, 20, 50, 125, 312)  # frames: half a period of a modulation of 16 to 0.16 Hz


class Standardise(nn.Module):
    """Columns (B, size) of mean 0 and deviation 1 over what `fit` saw; until then as they are."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def fit(self, values: Tensor) -> None:
        """values (n, size) of the training part; rows that are not finite tell nothing."""
        values = values[values.isfinite().all(1)]
        self.mean.copy_(values.mean(0))
        if len(values) > 1:  # one has no deviation
            self.std.copy_(values.std(0).clip(min=1e-3))

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std


class ClipStatistics(Standardise):
    """Statistics of a whole clip, whatever its order: of every mel band mean, standard deviation, largest
    value, and mean absolute change from frame to frame; of 32 bands mean rise and fall, and quantiles over
    time, as of the level and the spectral centroid; modulation of 16 bands; logarithm of the seconds. 843 of
    128 mel bands, standardised once `fit` has seen the training clips."""

    def __init__(self, mel: int = 128):
        super().__init__(4 * mel + 2 * 32 + len(QUANTILES) * 34 + len(SPANS) * 16 + 1)

    def values(self, fbank, lengths=None):
        """fbank (B, frames, mel) normalised, lengths (B,) frames; None: all valid -> (B, size), not
        standardised."""
        x = fbank.float()
        inside = _frames_inside(x, lengths)
        mean, deviation = _mean_and_deviation(x, inside)
        largest = x.masked_fill(~inside.unsqueeze(2), -torch.inf).amax(1)
        change, _ = _mean_and_deviation(x.diff(dim=1).abs(), inside[:, 1:])
        coarse = x.unflatten(2, (32, -1)).mean(3)
        rise, _ = _mean_and_deviation(coarse.diff(dim=1).clip(min=0), inside[:, 1:])
        fall, _ = _mean_and_deviation(coarse.diff(dim=1).clip(max=0), inside[:, 1:])
        # the factor turns normalised values into log-energies again, about
        level = torch.logsumexp(8 * x, dim=2, keepdim=True) / 8
        centroid = (8 * x).softmax(2) @ torch.linspace(0, 1, x.shape[2], device=x.device).unsqueeze(1)
        spread = _time_quantiles(torch.cat([coarse, level, centroid], dim=2), inside).flatten(1)
        modulation = _modulation(coarse.unflatten(2, (16, -1)).mean(3), inside).flatten(1)
        seconds = (inside.sum(1, keepdim=True) / 100).log()
        return torch.cat([mean, deviation, largest, change, rise, fall, spread, modulation, seconds], dim=1)

    def forward(self, values: Tensor) -> Tensor:
        """`values` as networks see them: standardised, cut at eight deviations."""
        return super().forward(values).clip(-8, 8)


class ClipKernel(nn.Module):
    """KernelRidge on ranks of a whole clip's ClipStatistics and, with `encoder` (arguments of an AST without
    outputs), of the moments of its frozen tokens. Statistics that change with the piano and the recording
    weigh less: see `fit`."""

    def __init__(
        self,
        items: int,
        mel: int = 128,
        num_outputs: int = 19,
        encoder: dict | None = None,
        columns: int | None = None,  # statistics that the kernel sees (None: all)
        heads: int = 0,  # networks on the same ranks; their mean and the kernel's ratings are averaged
    ):
        super().__init__()
        self.model_args = _arguments(locals())
        self.statistics = ClipStatistics(mel)
        self.encoder = AST(**encoder) if encoder else None
        size = self.statistics.size
        if encoder:
            size += 2 * encoder["width"] * len(self.encoder.levels)
        self.register_buffer("quantiles", torch.zeros(101, size))
        self.register_buffer("weight", torch.ones(size))
        self.register_buffer("seen", torch.arange(size) < (columns or size))
        self.ridge = KernelRidge(items, columns or size, num_outputs)
        self.heads = nn.ModuleList(
            rating_head(columns or size, num_label=num_outputs, **CLIP_HEAD) for _ in range(heads)
        )

    @torch.no_grad()
    def describe(self, fbank: Tensor) -> Tensor:
        """fbank (1, frames, mel) of a whole clip, normalised -> (1, S), before the ranks; of float16's
        precision, in which a saved model keeps its quantiles."""
        seen = self.statistics.values(fbank)
        if self.encoder is not None:
            longest = self.encoder.model_args["frames"]
            moments = self.encoder.token_moments(whole_crops(fbank, longest))
            seen = torch.cat([seen, moments], dim=1)
        return seen.half().float()

    def ranks(self, described: Tensor) -> Tensor:
        z = to_normal(described.cpu().double().numpy(), self.quantiles.cpu().double().numpy())
        return (torch.from_numpy(z).to(described.device) * self.weight)[:, self.seen]

    def fit(self, described: Tensor, ratings: Tensor, item: Tensor) -> "ClipKernel":
        """described (n, S), of `describe`; ratings (n, num_outputs) in [0, 1]; item (n,) numbers from 0, the
        same for versions of a performance: ranks weigh by the share of their variance between performances,
        to the power 1.5; those under a twentieth are left out. Heads: seeds 7, 8, ..."""
        quantiles = np.quantile(described.cpu().numpy(), np.linspace(0, 1, 101), axis=0)
        self.quantiles.copy_(torch.from_numpy(quantiles))
        ranks = self.ranks(described)
        items = int(item.max()) + 1
        if len(ranks) > items:
            mean = ranks.new_zeros(items, ranks.shape[1]).index_add(0, item, ranks)
            mean /= item.bincount().unsqueeze(1)  # of each performance's versions
            within = (ranks - mean[item]).square().sum(0) / (len(ranks) - items)
            share = (1 - within / ranks.var(0).clip(min=1e-6)).clip(0, 1)
            self.seen.copy_(share > 0.05)
            self.model_args["columns"] = int(self.seen.sum())
            self.weight.copy_(share**1.5 * self.seen)
            self.weight /= self.weight[self.seen].square().mean().sqrt()
        ranks = self.ranks(described)
        self.ridge = KernelRidge.fit(ranks, ratings, len(ranks) / items)
        for i in range(len(self.heads)):
            self.heads[i] = fit_rating_head(ranks, ratings, item, seed=7 + i)
        return self.eval()

    def forward(self, fbank: Tensor, lengths: Tensor | None = None) -> Tensor:
        """fbank (B, frames, mel) normalised, lengths (B,) -> ratings (B, num_outputs) in [0, 1]."""
        counts = [fbank.shape[1]] * len(fbank) if lengths is None else lengths.tolist()
        rows = [self.describe(x[None, :count]) for x, count in zip(fbank, counts, strict=True)]
        return self.rate(torch.cat(rows))

    @torch.no_grad()
    def rate(self, described: Tensor) -> Tensor:
        """(B, S), of `describe` -> ratings (B, num_outputs) in [0, 1]."""
        ranks = self.ranks(described)
        ratings = self.ridge({"stats": ranks}).sigmoid().float()
        if self.heads:
            of_heads = torch.stack([head(ranks).sigmoid() for head in self.heads])
            ratings = (ratings + of_heads.mean(0)) / 2
        return ratings


def fit_rating_head(ranks: Tensor, ratings: Tensor, item: Tensor, seed: int) -> nn.Module:
    """A `rating_head` trained on ranks (n, S), ratings (n, D) in [0, 1], item (n,) as of `ClipKernel.fit`: an
    epoch shows one version of every performance."""
    epochs = 40
    versions = [torch.nonzero(item == i).flatten() for i in range(int(item.max()) + 1)]
    torch.manual_seed(seed)
    head = rating_head(ranks.shape[1], num_label=ratings.shape[1], **CLIP_HEAD)
    with torch.no_grad():
        head[-1].bias.copy_(torch.logit(ratings.mean(0), eps=1e-4))
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=2.0)
    steps = epochs * math.ceil(len(versions) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(len(versions)).split(64):
            rows = torch.stack([versions[i][torch.randint(len(versions[i]), ())] for i in batch.tolist()])
            loss = nn.functional.mse_loss(head(ranks[rows]).sigmoid(), ratings[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head


def crop_starts(frames: int, length: int) -> list[int]:
    """First frames of the fewest crops of `length` that cover `frames`, evenly spaced from end to end."""
    last = max(0, frames - length)
    count = max(1, math.ceil(frames / length))
    return torch.linspace(0, last, count).round().long().tolist()


def whole_crops(fbank: Tensor, longest: int) -> Tensor:
    """A clip (1, frames, mel) as the crops (1, K, T, mel) of at most `longest` frames that cover it."""
    starts = crop_starts(fbank.shape[1], longest)
    return torch.stack([fbank[:, start : start + longest] for start in starts], dim=1)


class PooledMLP(nn.Module):
    """Two layers on ClipStatistics, the least that a network must beat."""

    def __init__(self, mel: int = 128, width: int = 256, num_outputs: int = 19, dropout: float = 0.3):
        super().__init__()
        self.model_args = _arguments(locals())
        self.statistics = ClipStatistics(mel)
        self.head = rating_head(self.statistics.size, width, num_outputs, dropout)

    def forward(self, fbank: Tensor, lengths: Tensor | None = None) -> Tensor:
        """fbank (B, frames, mel) normalised, lengths (B,) frames; None: all valid -> (B, num_outputs)
        float32."""
        values = self.statistics.values(fbank, lengths)
        return self.head(self.statistics(values)).float()


def _inside(frames, lengths):
    """(B, frames) True where a frame lies before its clip's end."""
    return torch.arange(frames, device=lengths.device) < lengths.unsqueeze(1)


def _frames_inside(fbank, lengths):
    """The same of fbank (B, frames, mel); lengths None: all."""
    B, frames, _ = fbank.shape
    if lengths is None:
        lengths = torch.full((B,), frames, device=fbank.device)
    return _inside(frames, lengths.to(fbank.device))


def _mean_and_deviation(x, inside):
    """Over the frames inside, of x (B, T, C): both (B, C)."""
    weight = (inside / inside.sum(1, keepdim=True).clip(min=1)).unsqueeze(2)
    mean = (x * weight).sum(1)
    return mean, (((x - mean.unsqueeze(1)).square() * weight).sum(1) + 1e-6).sqrt()


def _time_quantiles(x, inside):
    """QUANTILES over the frames inside, nearest ranks, of x (B, T, C): (B, Q, C)."""
    ordered = x.masked_fill(~inside.unsqueeze(2), torch.inf).sort(dim=1).values
    last = inside.sum(1, keepdim=True) - 1
    rank = (last * torch.tensor(QUANTILES, device=x.device)).round().long()
    return gather_patches(ordered, rank)


def _modulation(x, inside):
    """Log mean square of the change from SPANS frames to the next as many, of x (B, T, C): (B, SPANS, C)."""
    total = nn.functional.pad((x if x.is_mps else x.double()).cumsum(1), (0, 0, 1, 0))
    found = []
    for span in SPANS:
        power = x.new_zeros(len(x), x.shape[2])
        if x.shape[1] >= 2 * span:
            change = (total[:, 2 * span :] - 2 * total[:, span:-span] + total[:, : -2 * span]) / span
            power, _ = _mean_and_deviation(change.square().float(), inside[:, 2 * span - 1 :])
        found.append((power + 1e-4).log())
    return torch.stack(found, dim=1)


# ---------------------------------------------------------------------------------------------------------
# Checkpoints (DESIGN.md, "Checkpoints")
# ---------------------------------------------------------------------------------------------------------
class Ensemble(nn.Module):
    """Models in one file: members [task, model_args] each. `eval.py` rates with the members."""

    def __init__(self, members: list):
        super().__init__()
        self.model_args = {"members": members}
        self.members = nn.ModuleList(MODELS[task](**known) for task, known in members)


MODELS = {"han": HAN, "decoder": GRUDecoder, "ast": AST, "cnn": CNN, "mlp": PooledMLP}
MODELS |= {"kernel": KernelRidge, "clip_kernel": ClipKernel, "ensemble": Ensemble}


def save_checkpoint(path: str | Path, ckpt: dict) -> None:
    """Writes a checkpoint so that a crash at any moment leaves the previous file whole.

    ckpt: task, model_args, model, ... as in DESIGN.md; "format" is filled in. Tensors, numbers, strings,
    None, lists and dicts only (a tuple is stored as a list); else TypeError naming where it stands.
    """
    plain = _plain({"format": CHECKPOINT_FORMAT, **ckpt}, "ckpt")

    def write(file: BinaryIO) -> None:
        torch.save(plain, file)
        file.flush()
        os.fsync(file.fileno())

    path = Path(path)
    for half in path.parent.glob(f".{path.name}.*"):  # of a save that was killed: a run has one writer
        half.unlink()
    try:
        write_atomic(path, write)
    except RuntimeError as error:  # torch's of a full disk
        told = "make room; the earlier one is whole"
        raise DataError(f"{path}: not written ({one_line(error)}); {told}") from error


def save_ensemble(path: str | Path, members: list[tuple[nn.Module, dict]], known: dict) -> None:
    """Models that rate and their checkpoints (of `load_checkpoint`) in one small file: weights in float16,
    but a kernel's dual ones, large terms that nearly cancel; every second quantile. known: further keys."""
    once: dict[bytes, Tensor] = {}  # quantiles by their bytes: models of a fold share theirs
    forms, about, weights = [], [], {}
    for i, (model, ckpt) in enumerate(members):
        forms.append([ckpt["task"], model.model_args])
        for name, value in model.state_dict().items():
            weights[f"members.{i}.{name}"] = value if name.endswith("dual") else value.half()
        kept = {key: ckpt.get(key) for key in ("task", "step")}
        kept |= {"data": dict(ckpt["data"]), "args": {"seed": ckpt["args"].get("seed")}}
        if kept["data"].get("quantiles") is not None:
            quantiles = kept["data"]["quantiles"][::2].clone()
            kept["data"]["quantiles"] = once.setdefault(quantiles.numpy().tobytes(), quantiles)
        about.append(kept)
    made = {"task": "ensemble", "model_args": {"members": forms}, "model": weights, "members": about}
    save_checkpoint(path, made | git_state() | known)


def for_inference(ckpt: dict) -> dict:
    """A checkpoint with the averaged weights as its own, without what only goes on training."""
    state = dict.fromkeys(("ema", "optimizer", "scheduler", "scaler", "rng"))
    return ckpt | state | {"model": ckpt.get("ema") or ckpt["model"]}


def save_half(path: str | Path, ckpt: dict) -> None:
    """A checkpoint for others: `for_inference`, weights in float16, none of the paths of its run."""
    small = for_inference(ckpt)
    weights = {name: value.half() for name, value in small["model"].items()}
    paths = "data audio cache out resume init exclude_overlap name".split()
    args = {key: None if key in paths else value for key, value in ckpt["args"].items()}
    save_checkpoint(path, small | {"model": weights, "args": args})


def _plain(value: object, where: str) -> object:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value) in (bool, int, float, str, type(None)):
        return value
    kind = f"{type(value).__module__}.{type(value).__name__}"
    expected = "expected tensors, numbers, strings, None, lists, dicts"
    raise TypeError(f"{where}: {kind} in a checkpoint; {expected}")


def load_checkpoint(path: str | Path, public: bool = False) -> tuple[nn.Module | None, dict]:
    """A model rebuilt from its checkpoint alone, on CPU, in eval mode, and the checkpoint itself.

    Averaged weights (ckpt["ema"]) are used where there are any. public: of a file that holds nothing but
    weights by name, None and these. DataError for a file that is missing, cut short or of another kind.
    """
    try:
        if not public or zipfile.is_zipfile(ordinary(path)):  # torch wrote no archives before 1.6
            _check_archive(path)
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if public and ckpt and all(isinstance(value, Tensor) for value in ckpt.values()):
            return None, dict(ckpt)
        if ckpt["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {ckpt['format']} instead of {CHECKPOINT_FORMAT}")
        weights = ckpt["model"] if ckpt.get("ema") is None else ckpt["ema"]
        ckpt["model_args"].pop("cross", None)  # of ASTs until 2026-11-27: an experiment
        with _Bounded(weights, ckpt["model_args"], Path(path).stat().st_size):
            model = MODELS[ckpt["task"]](**ckpt["model_args"])
        model.load_state_dict(weights)
    except Exception as error:
        advice = "expected a last.pt or best.pt of this repository"
        if public:
            advice += ", or public weights as a .pt, .pth, .bin"
        if read_baseline(path):
            how = f"python data.py decoder-weights --in {path} --out FILE"
            advice = f"a public decoder baseline's weights: convert, {how}"
        found = re.split("This file can|weights_only", one_line(error))[0]  # torch advises unsafe loading
        raise DataError(f"{path}: no checkpoint to read ({found}); {advice}") from error
    _check_finite(path, model)
    return model.eval(), ckpt


def _check_finite(path, model):
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise DataError(f"{path}: weights that are not finite; give an earlier checkpoint")


class _Anything:
    """Stands for every object that a checkpoint's pickle makes, and for the table of those that it may make:
    here its keys alone are looked at; torch itself decides what it may name."""

    def __call__(self, *args):
        return _Anything()

    def __setitem__(self, key, value):
        pass

    def __setstate__(self, state):
        pass

    def __contains__(self, name):
        return True

    def __getitem__(self, name):
        return self


def _check_archive(path: str | Path) -> None:
    """ValueError where a record of a checkpoint differs from its checksum, unpacks to more than the file, or
    has keys that take long to hash."""
    size = ordinary(path).stat().st_size
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > size:
            raise ValueError("it unpacks to more than it is")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} does not match its checksum")
        for record in records:
            if record.filename.endswith("data.pkl"):
                anything = _Anything()
                load_plain_pickle(io.BytesIO(archive.read(record)), anything, anything)


class _Bounded(TorchFunctionMode):
    """Ends the making of a network that outgrows the weights it is for: its sizes may be a stranger's."""

    def __init__(self, weights: dict, model_args: dict, file_size: int):
        super().__init__()
        self.calls = 100 * (len(weights) + 10)  # of torch's functions, left
        held = sum(value.nbytes for value in weights.values())
        longest = max((max(value.shape, default=1) for value in weights.values()), default=1)
        if held > file_size:
            raise ValueError(f"weights of {held} bytes in a file of {file_size}")
        self.room = held + 10**6  # values that it may still allocate

        def check(digits: str) -> None:
            if not 0 <= int(digits) <= 1000 + 16 * longest:
                raise ValueError(f"a size of {digits}, but its {len(weights)} weights are of others")

        json.loads(json.dumps(model_args), parse_int=check)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.calls -= 1
        if function is torch.empty:
            self.room -= made.numel()
        if min(self.calls, self.room) < 0:
            raise ValueError("its sizes make more than its weights")
        return made


# ---------------------------------------------------------------------------------------------------------
# Runs: what every trainer needs beside its control flow
# ---------------------------------------------------------------------------------------------------------
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
# what a resumed run may be given otherwise than its checkpoint says
FREE_ON_RESUME = set(
    "data audio cache out name resume init device max_steps patience log_every eval_every save_every "
    "save_minutes max_skips strict workers compile checkpointing diagnose tensorboard debug".split()
)
DEVICES = ["mps"] if torch.backends.mps.is_available() else []
DEVICES += ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]  # the last is the default
RUN_OPTIONS = [
    ("--name", "NAME", None, "run folder below --out (made of the options)"),
    ("--out", "DIR", None, "folder of runs (%(default)s)"),
    ("--resume", "FILE", None, "last.pt of a stopped run: go on with its options (off)"),
    ("--seed", COUNT, 7, "same seed, same run on CPU (%(default)s)"),
    ("--device", DEVICES, DEVICES[-1], "where to train (%(default)s here)"),
    ("--amp", ["auto", *AMP_TYPES, "off"], "auto", "mixed precision; auto tries (%(default)s)"),
    ("--max-skips", WHOLE, 20, "non-finite updates that stop it (%(default)s)"),
    ("--log-every", WHOLE, 100, "steps between log lines (%(default)s)"),
    ("--save-every", COUNT, 0, "steps between extra saves of last.pt (0: none)"),
    ("--tensorboard", bool, False, "mirror the metrics (off)"),
    ("--debug", bool, False, "show the traceback of an error (off)"),
]


def option_parser(manual: str, options: dict[str, list[tuple]]) -> ArgumentParser:
    """The parser of a trainer's own options, by group as `data.add_options` takes them."""
    parser = ArgumentParser(
        formatter_class=RawDescriptionHelpFormatter,
        usage="python %(prog)s [--data DIR] [options]",
        description=f"{manual}\nIn brackets: defaults, as the other options given make them.",
    )
    add_options(parser, options)
    return parser


def run_options(parser: ArgumentParser, **defaults) -> None:
    """Adds the options of a run, the same in every trainer. defaults: of some."""
    add_options(parser, {"run": RUN_OPTIONS})
    parser.set_defaults(**defaults)


def parse_options(
    parser: ArgumentParser,
    argv: list[str] | None,
    tasks: tuple[str, ...],
    *presets: Callable[[Namespace], dict],
) -> Namespace:
    """Options of a run. presets: functions of the options so far that give defaults of others, in turn.
    With --resume all those of its checkpoint; all but FREE_ON_RESUME and more epochs stay so."""
    argv = sys.argv[1:] if argv is None else argv
    without_help = [arg for arg in argv if arg not in ("-h", "--help")]
    for preset in presets:
        parser.set_defaults(**preset(parser.parse_known_args(without_help)[0]))
    resume = parser.parse_known_args(without_help)[0].resume
    if not resume:
        return parser.parse_args(argv)
    ckpt = load_training(resume, tasks)
    of_a_start = ("resume", "debug", "diagnose")
    saved = {name: value for name, value in ckpt["args"].items() if name not in of_a_start}
    if (saved["max_steps"] or 0) <= ckpt["step"]:  # that was for then
        del saved["max_steps"]
    if saved["device"] not in DEVICES:
        del saved["device"]
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    if args.amp == "auto":
        args.amp = saved["amp"]
    fixed = saved.keys() - FREE_ON_RESUME - {"epochs", "steps"}
    changed = [f"--{name.replace('_', '-')}" for name in fixed if getattr(args, name) != saved[name]]
    if changed:
        raise DataError(f"{resume}: {', '.join(changed)} differ from that run's; leave them out")
    return args


def main_process() -> bool:
    """Whether this is the one process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """A line of the main process, above its progress bar."""
    if main_process():
        tqdm.write(line)


def set_up(device: str, seed: int, exact: bool) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes; seeds torch, joins the process group under torchrun. Unless
    exact, float32 products on a GPU are of TF32."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)  # NCCL sends objects from the current device
    device = torch.device(device)
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo: flags and objects
        dist.init_process_group(backend, timeout=timedelta(hours=12))  # caches are made meanwhile
        atexit.register(dist.destroy_process_group)
    if device.type == "cuda" and not exact:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed + rank)
    return device, rank, world


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block first and makes a cache there; the others then find it made."""
    if not main_process():
        dist.barrier()
    yield
    if main_process() and dist.is_initialized():
        dist.barrier()


def from_main(value: object) -> object:
    """The main process's value on every process: all must take the same decisions."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def from_all(value: object) -> list:
    """The value of every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_any(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    count = torch.tensor(int(flag))
    if dist.is_initialized():
        dist.all_reduce(count)
    return bool(count)


def all_folds(train_fold: Callable[[Namespace], dict], args: Namespace) -> dict:
    """One run a fold, in turn; prints mean and deviation of their best validation figures."""
    finals, start = [], time.time()
    for fold in range(FOLDS):
        name = args.name and f"{args.name}_f{fold}"
        finals.append(train_fold(Namespace(**vars(args) | {"fold": str(fold), "name": name})))
        left = (time.time() - start) / len(finals) * (FOLDS - len(finals))
        say(f"{len(finals)} of {FOLDS} folds done, {tqdm.format_interval(left)} left")
    said = []
    for key, value in finals[0].items():
        if key.startswith("valid_") and isinstance(value, float):
            scores = [final[key] for final in finals]
            said.append(f"{key[6:]} {shown(np.mean(scores))} ± {shown(np.std(scores))}")
    kind = " (SYNTHETIC)" if finals[0]["synthetic"] else ""
    say(f"four folds{kind}: validation {', '.join(said)}")
    return {"folds": finals}


def launch(train: Callable[[Namespace], dict], args: Namespace, then: str = "eval.py --ckpt") -> None:
    """Trains, and says what to type next: `then` with the best.pt of every run."""
    result = train(args)
    files = [f"{final['folder']}/best.pt" for final in result.get("folds", [result])]
    where = ["--data", args.data] if args.data and "--data" not in then else []
    say(f"next: python {shlex.join([*then.split(), *files, *where])}")


def working_amp(kind: str, device: torch.device, make: Callable[[], nn.Module], *shape: int) -> str:
    """The precision to train in. auto: on a GPU bf16 where it works, else fp16, else off; on a CPU bf16 where
    it is faster than float32 by a fifth or more. Tried with make(), a layer, on input of this shape."""
    if kind == "off":
        return kind
    if kind == "auto" and device.type == "cpu":
        faster = 1.2 * probe_amp("bf16", device, make, shape) < probe_amp("off", device, make, shape)
        return "bf16" if faster else "off"
    tried = [*AMP_TYPES] if kind == "auto" else [kind]
    works = [each for each in tried if probe_amp(each, device, make, shape) < math.inf]
    if not works and kind != "auto":
        raise DataError(f"--amp {kind}: fails on {device}; expected a type that works; use auto")
    return works[0] if works else "off"


def probe_amp(kind: str, device: torch.device, make: Callable[[], nn.Module], shape: Sequence[int]) -> float:
    """Processor seconds of a step of the module make() under autocast, the fastest of three; inf where that
    raises or is not finite: what a device claims to support is no evidence. On one thread: threads that wait
    for each other on a busy machine would decide the comparison."""
    taken, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            module = make().to(device)
            x = torch.randn(shape, device=device)
            for _ in range(3):
                start = time.process_time()
                with torch.autocast(device.type, AMP_TYPES.get(kind), enabled=kind != "off"):
                    output = module(x)
                output = output[0] if isinstance(output, tuple) else output
                output.float().square().mean().backward()
                taken.append(time.process_time() - start)
        except RuntimeError:  # a kernel that this device or this build of torch lacks
            return math.inf
        finally:
            torch.set_num_threads(threads)
    return min(taken) if all(p.grad.isfinite().all() for p in module.parameters()) else math.inf


def scales_loss(amp: str, device: torch.device) -> bool:
    """Whether a recurrent network trains in float16, and so with a scaled loss: on CUDA under bf16, too,
    since PyTorch's autocast hands cuDNN's recurrent networks float16."""
    return amp == "fp16" or (amp == "bf16" and device.type == "cuda")


def update_ema(ema: dict | None, model: nn.Module, decay: float) -> None:
    """Move the averaged weights, where there are some, towards the model's."""
    if ema is not None:
        for name, value in model.state_dict().items():
            ema[name].lerp_(value, 1 - decay)


@contextmanager
def averaged(model: nn.Module, ema: dict | None) -> Iterator[None]:
    """The model with its averaged weights, if there are some; afterwards its own again, in training mode."""
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(ema or raw)
    yield
    model.load_state_dict(raw)
    model.train()


def suspects(names: list[str], losses: Tensor, scaler) -> tuple[list[str], bool]:
    """Why a step's gradient is not finite: the items, over all processes, whose loss is not finite, or all
    where every loss is; and whether float16 overflowed, which is no fault of theirs."""
    mine = list(zip(map(str, names), losses.isfinite().tolist(), strict=True))
    items = list(itertools.chain(*from_all(mine)))
    bad = [name for name, finite in items if not finite]
    overflow = scaler.is_enabled() and not bad and scaler.get_scale() > 1
    return bad or [name for name, _ in items], overflow


def quiet_worker(_: int) -> None:
    """For a DataLoader: Ctrl-C and SIGTERM reach every process of a group; the main one decides, and may need
    its workers for one more step. A second SIGTERM, which torch sends to those that outlive it, ends one."""
    on_stop(signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def data_loader(dataset: Dataset, batches: list[list], collate: Callable, workers: int, device) -> DataLoader:
    """Reads the batches that stand in `batches` when an iteration begins, in `workers` processes."""
    workers = min(workers, os.cpu_count())  # more than cores only get in each other's way
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),  # its own: torch's must not depend on it
    )


@contextmanager
def worker_processes(loader: DataLoader) -> Iterator[None]:
    """Ends the loader's processes with the block, however it ends: the interpreter at its own end sends them
    two SIGTERM at once, which `quiet_worker` may take for one, and then waits for them without limit."""
    try:
        yield
    finally:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()


def run_folder(args: Namespace, name: str) -> Path:
    """The folder of a resumed run, or a new one, made here: a taken name gets a number, no run overwrites
    another."""
    if args.resume:
        return Path(args.resume).parent
    first = folder = Path(args.out, args.name or name)
    for taken in itertools.count(2):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder = Path(f"{first}_{taken}")


def load_training(path: str, tasks: tuple[str, ...]) -> dict:
    """The checkpoint to resume from, "written" then; DataError unless a whole one of a trainer of `tasks`."""
    written = os.path.exists(path) and os.path.getmtime(path)
    _, ckpt = load_checkpoint(path)
    whole = all(ckpt.get(part) for part in ("args", "data", "optimizer", "rng", "best"))
    if ckpt["task"] not in tasks or not whole:
        raise DataError(f"{path}: of task {ckpt['task']}; expected the last.pt of a run of {tasks}")
    return ckpt | {"written": written}


def same_data(path: str, saved: dict, found: dict) -> None:
    """DataError unless a resumed run finds the data that it was trained on; fitted features apart."""
    for key in found.keys() - {"mean", "std", "target_mean", "target_std", "quantiles"}:
        if saved.get(key) != found[key]:
            raise DataError(f"{path}: trained on data of another {key}; give the same with --data")


def restore(path: str, ckpt: dict, model: nn.Module, optimizer, scaler, rank: int) -> dict | None:
    """Weights, optimizer, scaler and this process's random state as saved; returns the averaged weights, if
    there are some. A process that was not there goes on from a state of its own. Not restored: on CUDA,
    cuDNN's own random state, which makes the dropout between layers of nn.GRU."""
    device = next(model.parameters()).device
    states = [ckpt["rng"], *ckpt["rng"].get("others", [])]
    try:
        model.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
        if ckpt["scaler"]:  # none of a run that had no scaled loss
            scaler.load_state_dict(ckpt["scaler"])
        if rank < len(states):
            torch.set_rng_state(states[rank]["cpu"])
            if device.type == "cuda" and states[rank]["cuda"] is not None:
                torch.cuda.set_rng_state(states[rank]["cuda"], device)
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path}: does not fit this run ({one_line(error)})") from error
    return ckpt["ema"] and {name: value.to(device) for name, value in ckpt["ema"].items()}


class Run(ExitStack):
    """A run's folder: args.json, metrics.jsonl, checkpoints. Written by the main process alone, which holds a
    lock on metrics.jsonl: one run, one writer. For a `with`."""

    def __init__(self, args: Namespace, name: str, resumed: dict | None):
        super().__init__()
        self.args = args
        self.start = self.saved = time.time()
        self.began = 0  # the step of --resume
        self.skipped = {"bad": 0, "overflow": 0}  # updates left out
        self.skips_in_a_row = 0  # back to 0 with every update
        if resumed:
            self.began, self.skipped = resumed["step"], resumed["skipped"]
            say(f"resumed {args.resume} at step {self.began}")
        self.board = None
        folder = None
        if main_process():
            folder = run_folder(args, name)
            self.metrics = self.enter_context(locked(folder / "metrics.jsonl", wait=False))
        self.folder = from_main(folder)
        if resumed and resumed["written"] != os.path.getmtime(args.resume):
            raise DataError(f"{args.resume}: another process wrote it meanwhile; give the command again")
        if main_process():
            if resumed:
                cut_metrics(self.metrics, resumed["step"])
            self.code = git_state()  # what runs, whatever is committed meanwhile
            write_text(folder / "args.json", json.dumps(vars(args) | self.code, indent=1))
            self.board = tensorboard(folder) if args.tensorboard else None

    def seconds(self) -> float:
        return time.time() - self.start

    def minutes_unsaved(self) -> float:
        return (time.time() - self.saved) / 60

    def left(self, step: int, last: int) -> str:
        """How long the steps up to the last will take, if they go on like those since the start."""
        return f"{tqdm.format_interval(self.seconds() * (last - step) / (step - self.began))} left"

    def log(self, step: int, epoch: int, **values) -> None:
        """One object in metrics.jsonl, on the disk before the next step begins."""
        if not main_process():
            return
        record = {"step": step, "epoch": epoch, "time": round(self.seconds(), 2), **values}
        try:
            self.metrics.write(f"{json.dumps(json_ready(record))}\n".encode())
            self.metrics.flush()
        except OSError as error:
            with suppress(OSError):  # it tries once more
                self.metrics.close()
            told = f"make room, then go on with --resume {self.folder / 'last.pt'}"
            raise DataError(f"{self.metrics.name}: not written ({error.strerror}); {told}") from error
        if self.board:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)
            self.board.flush()

    def skip(self, step: int, epoch: int, names: list[str], overflow: bool, **values) -> None:
        """Counts, and logs, an update that was left out, its `suspects` and values. DataError at
        --max-skips in a row, overflows apart."""
        kind = "overflow" if overflow else "bad"
        self.skipped[kind] += 1
        self.skips_in_a_row += not overflow
        self.log(step, epoch, skip=kind, names=names, skipped=self.skipped, **values)
        if self.skips_in_a_row >= self.args.max_skips:
            found = f"{self.skips_in_a_row} non-finite updates in a row, the last with {', '.join(names)}"
            raise DataError(f"step {step}: {found}; look at these items, lower --lr, or use --amp off")

    def end(self, script: str, step: int, stopped: bool, best: dict, summary: Callable) -> dict:
        """Says how the run ended, and gives the best metrics with its folder; summary(best): them in a line.
        KeyboardInterrupt of a run that was stopped; DataError where no evaluation was ever the best."""
        if stopped:
            resume = f"python {script} --resume {self.folder / 'last.pt'}"
            say(f"interrupted after step {step}; go on: {resume}")
            raise KeyboardInterrupt
        if not {"epoch", "step"} <= best.keys():
            advice = "lower --lr, see metrics.jsonl; validation trials need labels"
            raise DataError(f"{self.folder}: no evaluation had a finite figure to choose by; {advice}")
        kind = "best (SYNTHETIC)" if self.args.synthetic else "best"
        said = f"{kind}: epoch {best['epoch']}, step {best['step']}, valid {summary(best)}"
        left_out = f"{sum(self.skipped.values())} updates skipped"
        say(f"{said}; {left_out}; {self.seconds():.0f} s; {self.folder / 'best.pt'}")
        about = {"synthetic": self.args.synthetic, "folder": str(self.folder), "skipped": self.skipped}
        return best | about

    def save(self, name: str, task: str, model: nn.Module, optimizer, scaler, **state) -> None:
        """A checkpoint; state: the other keys (scheduler, ema, step, epoch, best, data). All
        processes take part: each has a random state."""
        self.saved = time.time()
        device = next(model.parameters()).device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        states = from_all({"cpu": torch.get_rng_state(), "cuda": cuda})
        if not main_process():
            return
        made = {
            "task": task,
            "args": vars(self.args),
            "git_sha": self.code["git_sha"],
            "skipped": self.skipped,
            "rng": states[0] | {"others": states[1:]},
            "model_args": model.model_args,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict() or None,
            "scheduler": None,
            **state,
        }
        save_checkpoint(self.folder / name, for_inference(made) if name == "best.pt" else made)


def cut_metrics(file: BinaryIO, step: int) -> None:
    """Cuts what a resumed run will log again, and a line that a crash cut short, off the end of the file."""
    file.seek(0)
    end = place = 0
    for line in file:
        place += len(line)
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                end = place
        except (ValueError, LookupError, TypeError):
            continue  # torn
    if end < place:
        file.truncate(end)
        print(f"{file.name}: {place - end} bytes beyond step {step} cut off the end: they are logged again")


def tensorboard(folder: Path):
    """A writer that mirrors the metrics; the package is optional."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DataError("--tensorboard: not installed; pip install tensorboard") from error
    return SummaryWriter(folder)


def json_ready(tree: object) -> object:
    """The same tree for JSON, which has no NaN (None instead); floats to seven digits."""
    text = json.dumps(tree)
    return json.loads(
        text, parse_float=lambda digits: float(f"{float(digits):.7g}"), parse_constant=lambda _: None
    )


def write_json(path: str | Path, tree: object) -> None:
    write_text(path, json.dumps(json_ready(tree), indent=1, allow_nan=False) + "\n")


def git_state() -> dict:
    """{"git_sha", "git_dirty"} of this file's repository, results/ apart; None outside one."""

    def git(command: str) -> str:
        words = ["git", "-C", str(Path(__file__).parent), *command.split()]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status --porcelain --untracked-files=no -- . :!results")
        return {"git_sha": git("rev-parse HEAD"), "git_dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"git_sha": None, "git_dirty": None}


def peak_memory(device: torch.device) -> float:
    """Peak so far, MiB: allocated on the GPU, or resident in this process (NaN where that is not told)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
