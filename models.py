"""All networks, and the checkpoints that rebuild them.

    model = HAN(input_size=101); logits = model(data.collate_han(items))     # PercePiano, HAN.md
    save_checkpoint("last.pt", ckpt); model, ckpt = load_checkpoint("best.pt")

Shape legend: B batch (pieces) · T time or notes · C channels · H heads · D head width · S sequences (segments)
N notes of all pieces · M members and G groups of an attention (notes in beats, beats in measures, ...)
Masks: True = valid. Index tensors come from data.collate_han.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from data import DataError

CHECKPOINT_FORMAT = 1
LEVELS = ("note", "beat", "measure", "total_note_cat")
FORMS = ("han", "bilstm", "bilstm_sa")


# -----------------------------------------------------------------------------------------------------------------
# Layers of HAN
# -----------------------------------------------------------------------------------------------------------------
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

    def forward(self, x: Tensor, batch: dict, name: str) -> Tensor:
        """x (M, C) all notes (name "note", "voice"), beats or measures of a collate_han batch -> (M, 2 * hidden)."""
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16:
            with torch.autocast("cpu", enabled=False):  # oneDNN has no float16 LSTM
                return self.forward(x.float(), batch, name)
        grids = [batch[key] for k in range(len(batch)) if (key := f"{name}_grid{k}") in batch]
        slots = batch[f"{name}_slot"]
        for i, pair in enumerate(zip(self.forward_lstm, self.backward_lstm, strict=True)):
            x = self.dropout(x) if i else x
            x = torch.cat([self.run(pair[d], x, [g[d] for g in grids], slots[d]) for d in range(2)], dim=1)
        return x

    def run(self, lstm: nn.LSTM, x: Tensor, grids: list[Tensor], slot: Tensor) -> Tensor:
        """One direction of one layer: x (M, C), grids (T, S) in turn, ever fewer S, slot (M,) -> (M, hidden)."""
        outputs, state = [], None
        for grid in grids:
            T, S = grid.shape
            state = state and tuple(part[:, :S] for part in state)
            output, state = lstm(x.index_select(0, grid.flatten()).view(T, S, -1), state)
            outputs.append(output.flatten(0, 1))
        return torch.cat(outputs).index_select(0, slot)


class ContextAttention(nn.Module):
    """Attention pooling with one learned context vector per head (HAN.md, "Context attention").

    Linear, tanh, split in heads, dot with the context vectors, softmax over the members of each group, weighted
    sum of the input itself, split in the same heads.
    """

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.context_vector = nn.Parameter(torch.empty(heads, size // heads).uniform_(-1, 1))

    def forward(self, x: Tensor, group: Tensor, groups: int) -> Tensor:
        """x (M, C), group (M,) group of each member, groups G -> (G, C) float32; an empty group gives zeros."""
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


# -----------------------------------------------------------------------------------------------------------------
# HAN (Park et al., Scientific Reports 14, 23002, 2024)
# -----------------------------------------------------------------------------------------------------------------
class HAN(nn.Module):
    """Hierarchical attention network over the notes of a performance: 19 ratings, before the sigmoid.

    input_size    features per note
    size          width of the embedding and of each LSTM direction
    layers        LSTM layers of note, voice, beat, measure
    level         what feeds the final pooling: note | beat | measure | total_note_cat
    model         han | bilstm | bilstm_sa: the last two are the same network, one BiLSTM of sum(layers) layers and
                  no hierarchy (level is not used); they differ in the features that they are given
    layernorm     LayerNorm on the vectors of the chosen level and on the pooled vector (experimental)
    head_size     width inside the head; None = 2 * size
    head_gain     factor on the initial weights (not the bias) of the last linear layer; 1 = PyTorch default
    stats_size    > 0: batch["stats"] (B, stats_size) is concatenated with the pooled vector before the head
    """

    def __init__(self, input_size: int, size: int = 256, heads: int = 8, layers: tuple[int, ...] = (2, 2, 2, 1),
                 num_label: int = 19, dropout: float = 0.2, level: str = "total_note_cat", model: str = "han",
                 layernorm: bool = False, head_size: int | None = None, head_gain: float = 1.0,
                 stats_size: int = 0):  # fmt: skip
        super().__init__()
        layers = list(layers)  # as a checkpoint holds it
        self.model_args = {k: v for k, v in dict(locals()).items() if k not in ("self", "__class__")}
        if model not in FORMS or level not in LEVELS:
            raise DataError(f"HAN: model {model!r}, level {level!r}; expected one of {FORMS}, one of {LEVELS}")
        if size % heads:
            raise DataError(f"HAN: size {size} is not a multiple of heads {heads}")
        self.level = "note" if model != "han" else level
        note_layers, voice_layers, beat_layers, measure_layers = layers if model == "han" else (sum(layers), 0, 0, 0)
        width = 2 * size  # both directions of an LSTM

        self.embedding = nn.Linear(input_size, size)
        self.note = BiLSTM(size, size, note_layers, dropout)
        if self.level != "note":
            self.voice = BiLSTM(size, size, voice_layers, dropout)
            self.beat_attention = ContextAttention(2 * width, heads)
            self.beat = BiLSTM(2 * width, size, beat_layers, dropout)
        if self.level in ("measure", "total_note_cat"):
            self.measure_attention = ContextAttention(width, heads)
            self.measure = BiLSTM(width, size, measure_layers, dropout)
        level_width = 4 * width if self.level == "total_note_cat" else width
        self.level_norm = nn.LayerNorm(level_width) if layernorm else nn.Identity()
        self.contractor = nn.Identity() if self.level in ("beat", "measure") else nn.Linear(level_width, width)
        self.attention = ContextAttention(width, heads)
        self.pooled_norm = nn.LayerNorm(width) if layernorm else nn.Identity()
        first, last = nn.Linear(width + stats_size, head_size or width), nn.Linear(head_size or width, num_label)
        self.head = nn.Sequential(nn.Dropout(dropout), first, nn.GELU(), nn.Dropout(dropout), last)
        with torch.no_grad():
            last.weight *= head_gain

    def forward(self, batch: dict) -> Tensor:
        """batch of data.collate_han -> logits (B, 19)."""
        return self.stages(batch)["logits"]

    def stages(self, batch: dict) -> dict[str, Tensor]:
        """Every intermediate result, in order; the last is "logits" (B, 19). For diagnostics and tests.

        embedding (N, size) · note, voice (N, 2s), zeros for voice 0 · beat (NB, 2s) · measure (NM, 2s) · total_note_cat
        (N, 8s) · level: the one of these that is pooled · contracted, 2s wide · pooled (B, 2s); s = size; N, NB, NM
        notes, beats, measures of all pieces. Stages beyond the level are absent.
        """
        out = {}
        # indexing by piece and time, not by position in the flattened batch: any further padding is harmless
        out["embedding"] = self.embedding(batch["x"][batch["piece"], batch["time"]])
        out["note"] = self.note(out["embedding"], batch, "note")
        if self.level != "note":
            self.encode_beats(out, batch)
        if self.level in ("measure", "total_note_cat"):
            self.encode_measures(out, batch)
        if self.level == "total_note_cat":
            out["total_note_cat"] = self.span(out, batch)
        out["level"] = self.level_norm(out[self.level])
        out["contracted"] = self.contractor(out["level"])
        piece = batch[f"{self.level}_piece" if self.level in ("beat", "measure") else "piece"]
        out["pooled"] = self.pooled_norm(self.attention(out["contracted"], piece, len(batch["x"])))
        seen = [out["pooled"]] + ([batch["stats"]] if self.model_args["stats_size"] else [])
        out["logits"] = self.head(torch.cat(seen, dim=1))
        return out

    def encode_beats(self, out: dict[str, Tensor], batch: dict) -> None:
        """Voices beside notes; both pooled to beats, an LSTM over the beats."""
        voice = self.voice(out["embedding"], batch, "voice")
        out["voice"] = voice.masked_fill(~batch["voiced"].unsqueeze(1), 0.0)
        hidden = torch.cat([out["note"], out["voice"]], dim=1)
        beats = self.beat_attention(hidden, batch["note_beat"], len(batch["beat_piece"]))
        out["beat"] = self.beat(beats, batch, "beat")

    def encode_measures(self, out: dict[str, Tensor], batch: dict) -> None:
        """Beats pooled to measures, an LSTM over the measures."""
        measures = self.measure_attention(out["beat"], batch["beat_measure"], len(batch["measure_piece"]))
        out["measure"] = self.measure(measures, batch, "measure")

    def span(self, out: dict[str, Tensor], batch: dict) -> Tensor:
        """total_note_cat (N, 8s): every note with its voice, beat and measure."""
        beat = out["beat"].index_select(0, batch["note_beat"])
        measure = out["measure"].index_select(0, batch["note_measure"])
        return torch.cat([out["note"], out["voice"], beat, measure], dim=1)


# names of the original PercePiano network (keys of reference/percepiano_han.npz)
_FINAL_ATTENTION = {
    "performance_final_attention": "total_note_cat",
    "measure_attention": "measure",
    "beat_attention": "beat",
    "note_attention": "note",
}
_PARTS = {
    "embedding": "note_embedder.fc",
    "voice": "score_encoder.voice_net",
    "beat_attention": "score_encoder.beat_attention",
    "beat": "score_encoder.beat_rnn",
    "measure_attention": "score_encoder.measure_attention",
    "measure": "score_encoder.measure_rnn",
    "head": "out_fc",
}
# built by the original, but without influence on the logits (reference/README.md)
_DEAD = {"total_note_cat": ["performance_encoder"], "measure": ["performance_encoder"]}
_DEAD["beat"] = [*_DEAD["measure"], _PARTS["measure_attention"], _PARTS["measure"]]
_DEAD["note"] = [*_DEAD["beat"], _PARTS["beat_attention"], _PARTS["beat"], _PARTS["voice"]]


def han_from_percepiano(state_dict: Mapping, **kw) -> HAN:
    """Original PercePiano weights (arrays or tensors by the original's names) as a HAN; sizes come from the shapes.

    kw: model_args that the weights do not tell (dropout) or that must agree with them. Parameters that never
    reach the logits (reference/README.md) are left out; any other unknown or missing name raises DataError.
    """
    weights = {name.removeprefix("module."): torch.as_tensor(value) for name, value in state_dict.items()}
    final = [name for name in _FINAL_ATTENTION if f"{name}.context_vector" in weights]
    needed = ("note_embedder.fc.weight", "out_fc.1.weight", "out_fc.4.weight")
    missing = [name for name in needed if name not in weights]
    if len(final) != 1 or missing:
        raise DataError(f"HAN weights: found {final}, missing {missing}; expected one of {[*_FINAL_ATTENTION]}")
    form, level = "bilstm" if "lstm.weight_ih_l0" in weights else "han", _FINAL_ATTENTION[final[0]]
    parts = _PARTS | {
        "note": "lstm" if form == "bilstm" else "score_encoder.lstm",
        "contractor": "note_contractor" if level == "note" else "performance_contractor",
        "attention": final[0],
    }
    size, input_size = weights[needed[0]].shape
    args = {"input_size": input_size, "size": size, "level": level, "model": form}
    args["heads"] = len(weights[f"{final[0]}.context_vector"])
    args["layers"] = [_layer_count(weights, parts[name]) for name in ("note", "voice", "beat", "measure")]
    args["head_size"], args["num_label"] = len(weights[needed[1]]), len(weights[needed[2]])
    model = HAN(**(args | kw))
    wanted = {name: _percepiano_name(name, parts) for name in model.state_dict()}
    dead = tuple(f"{name}." for name in _DEAD[level]) if form == "han" else ()
    unknown = sorted(name for name in weights.keys() - set(wanted.values()) if not name.startswith(dead))
    missing = sorted(set(wanted.values()) - weights.keys())
    if unknown or missing:
        raise DataError(f"HAN weights: unknown {unknown}, missing {missing}; expected a {form} network, level {level}")
    for name, parameter in model.state_dict().items():
        value = weights[wanted[name]]
        value = value.squeeze(-1) if name.endswith("context_vector") else value
        if value.shape != parameter.shape:
            shapes = f"{tuple(value.shape)}; expected {tuple(parameter.shape)}"
            raise DataError(f"HAN weights: {wanted[name]} has shape {shapes} from the other weights")
        parameter.copy_(value)
    return model.eval()


def _layer_count(weights: dict[str, Tensor], part: str) -> int:
    found = [re.fullmatch(rf"{re.escape(part)}\.\w+_[ih]h_l(\d+)", name) for name in weights]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _percepiano_name(name: str, parts: dict[str, str]) -> str:
    part, _, rest = name.partition(".")
    rest = re.sub(r"forward_lstm\.(\d+)\.(\w+)_l0", r"\2_l\1", rest)
    rest = re.sub(r"backward_lstm\.(\d+)\.(\w+)_l0", r"\2_l\1_reverse", rest)
    return f"{parts.get(part, part)}.{rest.replace('linear.', 'attention_net.')}"


# -----------------------------------------------------------------------------------------------------------------
# Phoneme decoder
# -----------------------------------------------------------------------------------------------------------------


# -----------------------------------------------------------------------------------------------------------------
# AST
# -----------------------------------------------------------------------------------------------------------------


# -----------------------------------------------------------------------------------------------------------------
# Checkpoints (DESIGN.md, "Checkpoints")
# -----------------------------------------------------------------------------------------------------------------
MODELS = {"han": HAN}


def save_checkpoint(path: str | Path, ckpt: dict) -> None:
    """Writes a checkpoint so that a crash at any moment leaves the previous file whole.

    ckpt: task, model_args, model, ... as in DESIGN.md; "format" is filled in. Tensors, numbers, strings, None, lists
    and dicts only (a tuple is stored as a list); anything else raises TypeError naming where it stands.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    plain = _plain({"format": CHECKPOINT_FORMAT, **ckpt}, "ckpt")
    try:
        with temporary.open("wb") as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    raise TypeError(f"{where}: {kind} in a checkpoint; expected tensors, numbers, strings, None, lists, dicts")


def load_checkpoint(path: str | Path) -> tuple[nn.Module, dict]:
    """A model rebuilt from its checkpoint alone, on CPU, in eval mode, and the checkpoint itself.

    Averaged weights (ckpt["ema"]) are used where there are any. Raises DataError for a file that is missing, cut
    short or no checkpoint of ours.
    """
    advice = "expected a checkpoint of this repository; give the last.pt or best.pt of a run"
    if not Path(path).is_file():
        raise DataError(f"{path}: {'a folder' if Path(path).is_dir() else 'no such file'}; {advice}")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own text suggests unsafe loading
        raise DataError(f"{path}: unreadable as a checkpoint ({type(error).__name__}): cut short, or another kind of file; {advice}") from error
    if not isinstance(ckpt, dict) or ckpt.get("format") != CHECKPOINT_FORMAT or ckpt.get("task") not in [*MODELS]:
        found = [ckpt.get("format"), ckpt.get("task")] if isinstance(ckpt, dict) else type(ckpt).__name__
        known = f"format {CHECKPOINT_FORMAT}, task {' or '.join(MODELS)}"
        raise DataError(f"{path}: {found} instead of {known}; {advice}")
    try:
        model = MODELS[ckpt["task"]](**ckpt["model_args"])
        model.load_state_dict(ckpt["model"] if ckpt.get("ema") is None else ckpt["ema"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path}: model_args and weights disagree ({_one_line(error)}); {advice}") from error
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise DataError(f"{path}: weights that are not finite; expected numbers; give an earlier checkpoint")
    return model.eval(), ckpt


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
