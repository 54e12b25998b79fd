"""Pre-train an Audio Spectrogram Transformer (AST) on piano recordings by masked patches, then fine-tune it on PercePiano's 19 ratings.

Gong et al., "AST: Audio Spectrogram Transformer", Interspeech 2021 (arXiv 2104.01778); "SSAST: Self-Supervised Audio Spectrogram
Transformer", AAAI 2022 (arXiv 2110.09784).

    python pretrain_ast.py                                               # synthetic corpus, CPU, a few minutes
    python pretrain_ast.py --data MAESTRO                                # recipe of this repository: base, batch 128, 100 epochs, bf16
    python pretrain_ast.py --data MAESTRO --visible-only                 # the same, a third of the time: the encoder skips masked patches
    python pretrain_ast.py --data MAESTRO --ssast-compat                 # network, objective and recipe of the original
    python pretrain_ast.py --data MAESTRO --checkpointing --micro-batch 8        # for cards of 12 GB
    python pretrain_ast.py --task finetune --data PERCEPIANO --init runs/ast/NAME/best.pt --fold all
    python pretrain_ast.py --task finetune --data PERCEPIANO --model cnn # baselines: cnn, mlp; AST without --init: from scratch
    torchrun --nproc_per_node 8 pretrain_ast.py --data MAESTRO --batch 16        # data parallel; --batch is per process
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 pretrain_ast.py --data MAESTRO --batch 8
    python pretrain_ast.py --data MAESTRO --resume runs/ast/NAME/last.pt # goes on where it stopped, bit for bit on CPU

MAESTRO is the data set's folder (table, MIDI, audio; `python data.py render` makes the audio from the MIDI), any folder of WAV files, or
what `python data.py fbank` wrote; an epoch is one pass: of every recording as many random crops as it has lengths of --frames.
PERCEPIANO is a clone of its repository; its MIDI is rendered into the cache. Scores and times: README, "Results".
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
from eval import git_state, json_ready, mse, pearson, predict_ast, r2
from models import (
    AST,
    AST_PRESETS,
    CHECKPOINT_FORMAT,
    CNN,
    POOLINGS,
    Block,
    PooledMLP,
    adapt_ast,
    ast_from_ssast,
    cluster_mask,
    load_checkpoint,
    save_checkpoint,
)

# Defaults by task; those of the options themselves are the pre-training's.
TASKS = {
    "pretrain": {},
    "finetune": {
        "batch": 32,
        "lr": 2e-4,
        "epochs": 50,
        "patience": 10,
        "layer_decay": 0.8,
        "pooling": "meanstd",
    },
}

# Defaults without --data, for minutes on two cores instead of hours on a GPU.
BUILT_IN = {
    "pretrain": {"preset": "tiny", "frames": 128, "batch": 16, "epochs": 1, "lr": 1e-3},
    "finetune": {"preset": "tiny", "frames": 256, "batch": 16, "epochs": 6},
}

# --ssast-compat: the original's recipe (its run scripts and traintest_mask.py), and its head in fine-tuning.
COMPAT = {
    "pretrain": {
        "two_pass": True,
        "optimizer": "adam",
        "beta1": 0.95,
        "weight_decay": 5e-7,
        "batch": 24,
        "lr": 1e-4,
        "lr_schedule": "plateau",
        "warmup": 1000,
        "epochs": 10,
        "eval_every": 4000,
        "amp": "off",
    },
    "finetune": {"pooling": "mean", "grouped": False},
}

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
AUGMENTATIONS = ("tempo", "pitch", "noise", "spec", "mixup")
GROUPS = {
    name.split()[0].lower(): group for name, group in zip(data.LABEL_GROUPS, data.label_groups(), strict=True)
}

# What a resumed run may do otherwise; every other option comes from its checkpoint.
FREE_ON_RESUME = {
    "data",
    "audio",
    "cache",
    "out",
    "name",
    "resume",
    "init",
    "device",
    "max_steps",
    "patience",
    "log_every",
    "save_every",
    "save_minutes",
    "max_skips",
    "strict",
    "workers",
    "compile",
    "checkpointing",
    "tensorboard",
    "debug",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python %(prog)s [--data DIR] [options]",
        description=f"{__doc__}\nIn brackets: the defaults together with the other options given, such as --data DIR or --task finetune.",
    )
    p.add_argument(
        "--task",
        choices=TASKS,
        default="pretrain",
        help="pretrain: guess masked patches of any recordings; finetune: learn PercePiano's ratings (%(default)s)",
    )
    p.add_argument(
        "--ssast-compat",
        action="store_true",
        help="tokens, positions and objective of SSAST's code, and its recipe as defaults (off)",
    )
    g = p.add_argument_group("data")
    g.add_argument(
        "--data",
        metavar="DIR",
        help="pretrain: MAESTRO's folder, WAV files or filter banks; finetune: PercePiano (absent: the built-in synthetic corpus)",
    )
    g.add_argument(
        "--audio",
        metavar="DIR",
        help="folder of the WAV files (pretrain: beside the MIDI; finetune: rendered into the cache)",
    )
    g.add_argument(
        "--frames",
        type=data.number(int, 16),
        default=1024,
        help="longest input, frames of 10 ms; what is longer is cropped at random (%(default)s)",
    )
    g.add_argument(
        "--audioset-norm",
        action="store_true",
        help="normalise by AudioSet's mean and deviation instead of these recordings' (off)",
    )
    g.add_argument(
        "--workers",
        type=data.number(int, 0),
        default=4,
        help="processes that read crops, one a core at most (%(default)s; 0: none)",
    )
    g.add_argument(
        "--cache",
        metavar="DIR",
        default="cache",
        help="folder of filter banks, rendered audio, extracted features (%(default)s)",
    )
    g.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first unreadable file instead of leaving it out (off)",
    )
    g = p.add_argument_group("data of --task pretrain")
    g.add_argument(
        "--online",
        action="store_true",
        help="filter banks from the recordings at every step, after a change of the waveform (off: computed once)",
    )
    g.add_argument(
        "--gain",
        type=data.number(float, 0, 60),
        default=6.0,
        help="online: largest change of level, dB (%(default)s; 0: off)",
    )
    g.add_argument(
        "--hiss",
        type=data.number(float, 0, 1),
        default=0.002,
        help="online: largest SD of white noise, of full scale (%(default)s; 0: off)",
    )
    g.add_argument(
        "--exclude-overlap",
        metavar="PERCEPIANO",
        help="leave out recordings of music that this folder's performances play (off)",
    )
    g.add_argument(
        "--valid-crops",
        type=data.number(int, 1),
        default=256,
        help="fixed crops, with fixed masks, that validate (%(default)s)",
    )
    g = p.add_argument_group("data of --task finetune")
    g.add_argument(
        "--split",
        choices=data.SPLITS,
        default="segment",
        help="what a part never shares with another (%(default)s)",
    )
    g.add_argument(
        "--fold",
        choices=[*"0123", "all"],
        default="0",
        help="fold that validates; all: one run a fold, then mean and deviation (%(default)s)",
    )
    g.add_argument(
        "--keep-overlap",
        action="store_true",
        help="keep training items that share played notes with validation or test (off)",
    )
    g.add_argument(
        "--standardise",
        choices=["dimension", "group", "none"],
        default="dimension",
        help="ratings: each by its own deviation, its group's, or not (%(default)s)",
    )
    g.add_argument(
        "--variants",
        type=data.number(int, 0),
        default=0,
        help="further renderings of each item, of other tempo and pitch; a step shows one (0: off)",
    )
    g.add_argument(
        "--tempo",
        type=data.number(float, 0, 0.2),
        default=0.05,
        help="variants: largest change of tempo, as a share (%(default)s; 0: off)",
    )
    g.add_argument(
        "--pitch",
        type=data.number(int, 0, 12),
        default=2,
        help="variants: largest shift, semitones (%(default)s; 0: off)",
    )
    g.add_argument(
        "--noise",
        type=data.number(float, 0),
        default=0.0,
        help="SD of white noise on half of the items, normalised (0: off)",
    )
    g.add_argument(
        "--spec-augment",
        type=data.number(int, 0),
        nargs=2,
        default=[0, 0],
        metavar=("BANDS", "FRAMES"),
        help="widest masks on half of the items (0 0: off)",
    )
    g.add_argument("--mixup", type=data.number(float, 0), default=0.0, help="alpha of mixed pairs (0: off)")
    g.add_argument(
        "--augment-groups",
        nargs="+",
        default=[],
        metavar="KIND=GROUPS",
        help=f"items changed by {', '.join(AUGMENTATIONS)} count for these groups of "
        f"ratings only, e.g. tempo=timbre,expression; groups: {', '.join(GROUPS)} (default: all)",
    )
    g = p.add_argument_group("model")
    g.add_argument(
        "--model",
        choices=["ast", "cnn", "mlp"],
        default="ast",
        help="finetune: network; cnn and mlp are baselines (%(default)s)",
    )
    g.add_argument(
        "--preset", choices=AST_PRESETS, default="base", help="width, depth and heads (%(default)s)"
    )
    for name in ("width", "depth", "heads"):
        g.add_argument(f"--{name}", type=data.number(int, 1), help=argparse.SUPPRESS)
    g.add_argument(
        "--dropout",
        type=data.number(float, 0, 0.99),
        default=0.1,
        help="dropout after the patches and in every block (%(default)s; 0: off)",
    )
    g.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute activations again for the gradient: less memory, a third more time (off)",
    )
    g.add_argument(
        "--mask",
        type=data.number(int, 1, 512),
        default=400,
        help="pretrain: patches of 512 that are masked (%(default)s)",
    )
    g.add_argument(
        "--visible-only",
        action="store_true",
        help="pretrain: the encoder sees the visible patches alone (off)",
    )
    g.add_argument(
        "--two-pass",
        action="store_true",
        help="pretrain: a mask and a pass of its own for each objective, as the original (off)",
    )
    g.add_argument(
        "--init",
        metavar="FILE",
        help="finetune: checkpoint of this script's pre-training, or of SSAST (default: from scratch)",
    )
    g.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="mean",
        help="finetune: over patches, or of the cls tokens (%(default)s; finetune: meanstd)",
    )
    g.add_argument(
        "--statistics",
        action="store_true",
        help="finetune: the heads see the clip's mel statistics too, as --model mlp (off)",
    )
    g.add_argument(
        "--grouped",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="finetune: one head a group of ratings (on)",
    )
    g.add_argument("--cross-groups", action="store_true", help="finetune: heads attend to each other (off)")
    g.add_argument(
        "--balance",
        choices=["none", "uncertainty", "dwa"],
        default="none",
        help="finetune: weights of the groups: learned, or by how fast each improves (%(default)s)",
    )
    g = p.add_argument_group("optimiser")
    g.add_argument(
        "--optimizer",
        choices=["adam", "adamw"],
        default="adamw",
        help="adam couples the decay to the gradient (%(default)s)",
    )
    g.add_argument(
        "--lr",
        type=data.number(float, 0),
        default=1e-4,
        help="peak learning rate (%(default)s; finetune: 2e-4)",
    )
    g.add_argument(
        "--beta1",
        type=data.number(float, 0, 0.9999),
        default=0.9,
        help="decay of the mean gradient (%(default)s)",
    )
    g.add_argument(
        "--weight-decay",
        type=data.number(float, 0),
        default=0.01,
        help="pull of weight matrices towards 0 (%(default)s; 0: off)",
    )
    g.add_argument(
        "--layer-decay",
        type=data.number(float, 0.01, 1),
        default=1.0,
        help="factor on the rate from each layer to the one below (%(default)s; finetune: 0.8; 1: off)",
    )
    g.add_argument(
        "--batch",
        type=data.number(int, 1),
        default=128,
        help="clips a step and process (%(default)s; finetune: 32)",
    )
    g.add_argument(
        "--micro-batch",
        type=data.number(int, 1),
        default=16,
        help="of these so many at a time, their gradients added up (%(default)s)",
    )
    g.add_argument(
        "--clip",
        type=data.number(float, 0),
        default=1.0,
        help="largest gradient norm; a longer gradient is cut to it (%(default)s; inf: off)",
    )
    g.add_argument(
        "--ema",
        type=data.number(float, 0, 0.99999),
        default=0.0,
        help="decay of the averaged weights that are evaluated and saved (0: off)",
    )
    g = p.add_argument_group("schedule")
    g.add_argument(
        "--lr-schedule",
        choices=["cosine", "constant", "plateau"],
        default="cosine",
        help="course of the rate after the warm-up; plateau: halved after two evaluations "
        "without a better one (%(default)s)",
    )
    g.add_argument(
        "--warmup",
        type=data.number(float, 0),
        default=0.1,
        help="linear warm-up, steps, or under 1 a share of all (%(default)s; 0: off)",
    )
    g.add_argument(
        "--epochs",
        type=data.number(int, 1),
        default=100,
        help="passes over the training part (%(default)s; finetune: 50)",
    )
    g.add_argument("--max-steps", type=data.number(int, 1), help="stop after so many steps (off)")
    g.add_argument(
        "--patience",
        type=data.number(int, 0),
        default=0,
        help="stop after so many evaluations without a lower validation loss (0: off; finetune: 10)",
    )
    g = p.add_argument_group("run")
    g.add_argument(
        "--name",
        metavar="NAME",
        help="run folder below --out (default: made of task, preset or model, split, fold and seed)",
    )
    g.add_argument("--out", metavar="DIR", default="runs/ast", help="folder of runs (%(default)s)")
    g.add_argument(
        "--resume", metavar="FILE", help="last.pt of a stopped run: go on there, with its options (off)"
    )
    g.add_argument(
        "--seed",
        type=data.number(int, 0),
        default=7,
        help="of weights, order and noise; same seed, same run on CPU (%(default)s)",
    )
    g.add_argument(
        "--device",
        metavar="NAME",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute: cpu or cuda, a GPU (%(default)s here)",
    )
    g.add_argument(
        "--amp",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="mixed precision; auto tries what works on this device (%(default)s)",
    )
    g.add_argument("--compile", action="store_true", help="torch.compile (off)")
    g.add_argument(
        "--max-skips",
        type=data.number(int, 1),
        default=20,
        help="non-finite updates in a row that stop the run (%(default)s)",
    )
    g.add_argument(
        "--log-every", type=data.number(int, 1), default=20, help="steps between log lines (%(default)s)"
    )
    g.add_argument(
        "--eval-every", type=data.number(int, 0), default=0, help="steps between evaluations (0: each epoch)"
    )
    g.add_argument(
        "--save-every",
        type=data.number(int, 0),
        default=0,
        help="steps between extra saves of last.pt (0: each evaluation only)",
    )
    g.add_argument(
        "--save-minutes",
        type=data.number(float, 0),
        default=15.0,
        help="minutes between extra saves of last.pt (%(default)s; 0: off)",
    )
    g.add_argument(
        "--tensorboard", action="store_true", help="mirror the metrics where that package is installed (off)"
    )
    g.add_argument("--debug", action="store_true", help="show the traceback of an error (off)")
    argv = sys.argv[1:] if argv is None else argv
    known = p.parse_known_args(plain := [a for a in argv if a not in ("-h", "--help")])[0]
    p.set_defaults(
        **TASKS[known.task]
        | ({} if known.data else BUILT_IN[known.task])
        | (COMPAT[known.task] if known.ssast_compat else {})
    )
    p.set_defaults(**AST_PRESETS[p.parse_known_args(plain)[0].preset])
    saved = (
        {k: v for k, v in load_training(known.resume)["args"].items() if k not in FREE_ON_RESUME}
        if known.resume
        else {}
    )
    p.set_defaults(**saved)
    args = p.parse_args(argv)
    if changed := [
        f"--{k.replace('_', '-')} {getattr(args, k)} (was {v})"
        for k, v in saved.items()
        if getattr(args, k) != v and k != "epochs" and (k, getattr(args, k)) != ("amp", "auto")
    ]:
        raise data.DataError(
            f"{args.resume}: {', '.join(changed)}; expected the options it was trained with; leave them out, or start a new run"
        )
    args.amp = saved.get("amp", args.amp)
    if args.device not in ("cpu", "cuda") or args.device == "cuda" and not torch.cuda.is_available():
        raise data.DataError(
            f"--device {args.device}: not available here; expected cpu{', cuda' * torch.cuda.is_available()}"
        )
    augmentation_limits(args)
    return args


def lr_at(step: int, args: argparse.Namespace, total: int) -> float:
    """Learning rate of the update that follows `step` earlier ones, of `total` planned."""
    warmup = round(args.warmup * total) if args.warmup < 1 else int(args.warmup)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.lr_schedule == "cosine":
        return args.lr * 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, total - warmup))))
    return args.lr


def run_folder(args: argparse.Namespace) -> Path:
    """The folder of a resumed run, or a new one: a taken name gets a number, no run overwrites another."""
    if args.resume:
        return Path(args.resume).parent
    network = args.preset if args.model == "ast" else args.model
    name = args.name or (
        f"pretrain_{network}_s{args.seed}"
        if args.task == "pretrain"
        else f"finetune_{network}_{args.split}_f{args.fold}_s{args.seed}"
    )
    names = (name if k == 1 else f"{name}_{k}" for k in itertools.count(1))
    return next(folder for n in names if not (folder := Path(args.out) / n).exists())


def load_training(path: str) -> dict:
    """The checkpoint to resume from, refused unless it is a whole one of this trainer."""
    _, ckpt = load_checkpoint(path)
    parts = {
        "args": dict,
        "data": dict,
        "optimizer": dict,
        "scheduler": dict,
        "rng": dict,
        "best": dict,
        "skipped": dict,
        "step": int,
    }
    missing = [k for k, kind in parts.items() if not isinstance(ckpt.get(k), kind)]
    if ckpt["task"] not in ("ast", "cnn", "mlp") or missing:
        raise data.DataError(
            f"{path}: task {ckpt['task']!r}, without {', '.join(missing) or 'nothing'}; expected a last.pt of pretrain_ast.py; name that file"
        )
    return ckpt


class Crops(Dataset):
    """Random crops of recordings: of each as many an epoch as it has lengths of --frames. Asked for by (epoch, number), which make
    a crop the same after a resume; `stretch` False leaves the waveform alone."""

    def __init__(
        self,
        store: data.FbankStore | data.AudioStore,
        recordings: list[int],
        args: argparse.Namespace,
        stretch: bool = True,
    ):
        counts = np.maximum(np.rint(store.frames[recordings] / args.frames).astype(int), 1)
        self.store, self.args, self.stretch, self.recordings = (
            store,
            args,
            stretch,
            np.repeat(recordings, counts),
        )
        self.lengths = np.minimum(store.frames[self.recordings], args.frames).tolist()

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, k = key
        i, args = int(self.recordings[k]), self.args
        x = data.random_crop(self.store, i, args.frames, args.seed, epoch, k)
        if x.dtype == np.int16:  # --online
            rng = np.random.default_rng((args.seed, epoch, k, 1))
            loud, hiss = (
                (10 ** (rng.uniform(-args.gain, args.gain) / 20), rng.uniform(0, args.hiss))
                if self.stretch
                else (1, 0)
            )
            wave = x / np.float32(32768) * np.float32(loud) + rng.standard_normal(
                len(x), np.float32
            ) * np.float32(hiss)
            x = data.fbank(torch.from_numpy(wave.clip(-1, 1))).numpy()
        start = data.crop_start(int(self.store.frames[i]), args.frames, args.seed, epoch, k)
        return {"name": f"{self.store.names[i]}@{start / 100:.2f}s", "fbank": x}


class Clips(Dataset):
    """Performances with their ratings, by (epoch, number): one of the versions of each (as played, other tempo and pitch), cropped."""

    def __init__(
        self, versions: list[list[dict]], variants: list[tuple[float, int]], args: argparse.Namespace
    ):
        self.versions, self.variants, self.args, self.limits = (
            versions,
            [(1.0, 0), *variants],
            args,
            augmentation_limits(args),
        )
        self.lengths = [min(items[0]["frames"], args.frames) for items in versions]

    def __len__(self) -> int:
        return len(self.versions)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        rng = np.random.default_rng((self.args.seed, *key))
        item = self.versions[key[1]][version := int(rng.integers(len(self.versions[key[1]])))]
        start = int(rng.integers(max(0, item["frames"] - self.args.frames) + 1))
        weight = np.ones(len(data.LABELS), np.float32)
        for kind, changed in zip(
            ("tempo", "pitch"), np.not_equal(self.variants[version], (1, 0)), strict=True
        ):
            weight = weight * self.limits[kind] if changed else weight
        return {
            "name": item["name"],
            "fbank": np.asarray(item["fbank"][start : start + self.args.frames], np.float32),
            "y": item["y"],
            "weight": weight,
        }


def augmentation_limits(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """For each augmentation the weights (19,) of the ratings of an item that it changed: --augment-groups."""
    limits = {kind: np.ones(len(data.LABELS), np.float32) for kind in AUGMENTATIONS}
    for option in args.augment_groups:
        kind, _, names = option.partition("=")
        groups = names.split(",")
        if kind not in limits or not GROUPS.keys() >= set(groups):
            raise data.DataError(
                f"--augment-groups {option}: unknown; expected KIND=GROUP,... of {', '.join(AUGMENTATIONS)} and {', '.join(GROUPS)}"
            )
        limits[kind] = np.isin(
            np.arange(len(data.LABELS)), [i for name in groups for i in GROUPS[name]]
        ).astype(np.float32)
    return limits


def quiet_worker(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; what follows is for the main one to decide."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def augment(batch: dict, args: argparse.Namespace) -> dict:
    """The batch as this step shows it; noise, masks and pairs are drawn on its device from torch's generator, which a resume restores.
    Pre-training needs none: crops and masks are random enough (AST.md)."""
    if args.task == "pretrain" or not (args.noise or any(args.spec_augment) or args.mixup):
        return batch
    x, y, weight, (B, T, M) = batch["x"], batch["y"], batch["weight"], batch["x"].shape
    lengths, limits = (
        batch["lengths"].to(x.device),
        {k: torch.as_tensor(v, device=x.device) for k, v in augmentation_limits(args).items()},
    )
    if args.noise:
        hit = torch.rand(B, 1, device=x.device) < 0.5
        x, weight = (
            x + args.noise * hit[:, :, None] * torch.randn_like(x),
            torch.where(hit, weight * limits["noise"], weight),
        )
    if any(args.spec_augment):
        hit, (bands, frames) = torch.rand(B, 1, device=x.device) < 0.5, args.spec_augment
        hide = span(M, bands, torch.full_like(lengths, M))[:, None] | span(T, frames, lengths)[:, :, None]
        x, weight = (
            x.masked_fill(hide & hit[:, :, None], 0.0),
            torch.where(hit, weight * limits["spec"], weight),
        )
    if args.mixup:
        other, share = (
            torch.randperm(B, device=x.device),
            torch.distributions.Beta(args.mixup, args.mixup).sample((B, 1)).to(x.device),
        )
        x, y = torch.lerp(x[other], x, share[:, :, None]), torch.lerp(y[other], y, share)
        weight, lengths = weight * weight[other] * limits["mixup"], torch.maximum(lengths, lengths[other])
    return batch | {"x": x, "y": y, "weight": weight, "lengths": lengths.cpu()}


def span(size: int, widest: int, lengths: torch.Tensor) -> torch.Tensor:
    """(B, size) True in one span for each row: up to `widest` long, anywhere in the first `lengths` places."""
    width = (torch.rand(len(lengths), device=lengths.device) * (widest + 1)).long().minimum(lengths)
    start = (torch.rand(len(lengths), device=lengths.device) * (lengths - width + 1)).long()
    place = torch.arange(size, device=lengths.device)
    return (place >= start[:, None]) & (place < (start + width)[:, None])


def with_masks(batch: dict, args: argparse.Namespace, generator: torch.Generator | None = None) -> dict:
    """pretrain: the ids of the patches to mask, --mask of 512 at 1024 frames and as large a share of fewer, one set a clip or two."""
    if args.task == "finetune":
        return batch
    T, whole = batch["x"].shape[1] // 16, bool((batch["lengths"] == batch["x"].shape[1]).all())
    columns = None if whole else (batch["lengths"] // 16).clip(min=1).to(batch["x"].device)
    draw = lambda: cluster_mask(
        len(batch["x"]),
        8,
        T,
        max(1, round(args.mask / 512 * 8 * T)),
        batch["x"].device,
        generator,
        columns=columns,
    )
    return batch | {"mask": draw()} | ({"second": draw()} if args.two_pass else {})


def micro_batches(
    batch: dict, size: int, model: torch.nn.Module
) -> Iterator[tuple[dict, float, contextlib.AbstractContextManager]]:
    """Parts of at most `size` clips, the share of each in the batch, and what its pass runs in: processes exchange gradients at the last."""
    count = len(batch["names"])
    for first in range(0, count, size):
        part = {k: v[first : first + size] for k, v in batch.items()}
        wait = isinstance(model, DistributedDataParallel) and first + size < count
        yield part, len(part["names"]) / count, model.no_sync() if wait else contextlib.nullcontext()


def pretrain_loss(
    model: torch.nn.Module, batch: dict, args: argparse.Namespace, balance: dict
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """NCE + 10 MSE over the masked patches (SSAST, eq. 3); by clip, NaN where the clip itself is not finite; and their figures."""
    x, lengths = (
        batch["x"],
        None if bool((batch["lengths"] == batch["x"].shape[1]).all()) else batch["lengths"],
    )
    out = model(x, lengths, mask=batch["mask"], compat=args.ssast_compat)
    loss, sound = out["nce"] + 10 * out["mse"], x.isfinite().flatten(1).all(1)
    return (
        loss,
        torch.where(sound, loss.detach().nan_to_num(), torch.nan),
        {k: v.detach() for k, v in out.items()},
    )


def finetune_loss(
    model: torch.nn.Module, batch: dict, args: argparse.Namespace, balance: dict
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Squared error of the standardised ratings, by clip, and by group of ratings. balance uncertainty: exp(-s) error + s, s learned
    (Kendall et al., 2018, eq. 7, up to a factor); dwa: weights by the groups' rates of descent (Liu et al., 2019, section 3.3)."""
    error = (model(batch["x"], batch["lengths"]) - batch["y"]).square() * batch["weight"]  # (B, 19)
    groups = torch.stack([error[:, members].mean(1) for members in data.label_groups()], dim=1)  # (B, G)
    losses = error.mean(1)
    if args.balance == "uncertainty":
        s = getattr(model, "module", model).log_variance
        losses = (torch.exp(-s) * groups + s).mean(1)
    elif args.balance == "dwa":
        losses = (groups * torch.tensor(balance["weights"], device=groups.device)).mean(1)
    return losses.mean(), losses.detach(), {"groups": groups.detach().mean(0)}


def reweigh(balance: dict) -> dict:
    """Dynamic weight averaging, temperature 2: groups whose error fell least from the epoch before the last to the last weigh most."""
    mean = np.array(balance["sums"]) / max(balance["count"], 1)
    before, weights = balance["before"], np.ones(len(mean))
    if before:
        weights = np.exp(mean / np.maximum(before, 1e-12) / 2)
    return {
        "weights": (weights / weights.mean()).tolist(),
        "sums": [0.0] * len(mean),
        "count": 0,
        "before": mean.tolist(),
    }


def probe_amp(kind: str, device: torch.device, width: int, heads: int) -> float:
    """Processor seconds of a forward and backward pass of a transformer block under autocast, the fastest of three; inf where that
    raises or yields anything not finite. What a device claims to support is no evidence. On one thread: threads that wait for each
    other on a busy machine would decide the comparison."""
    taken, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            block, x = Block(width, heads, 0.0).to(device), torch.randn(4, 128, width, device=device)
            for _ in range(3):
                start = time.process_time()
                with torch.autocast(device.type, AMP_TYPES.get(kind), enabled=kind != "off"):
                    out = block(x)
                out.float().square().mean().backward()
                finite = all(bool(t.isfinite().all()) for t in (out, *(p.grad for p in block.parameters())))
                taken.append(time.process_time() - start if finite else math.inf)
        except RuntimeError:  # a kernel that this device or this build of torch lacks
            taken = [math.inf]
        finally:
            torch.set_num_threads(threads)
    return math.inf if math.inf in taken else min(taken)


def working_amp(args: argparse.Namespace, device: torch.device) -> str:
    """The precision to train in. auto: on a GPU bf16 where it works, else fp16, else off; on a CPU bf16 where it is faster than
    float32 by a fifth or more."""
    sizes = (device, args.width, args.heads)
    if args.amp in AMP_TYPES and probe_amp(args.amp, *sizes) == math.inf:
        raise data.DataError(
            f"--amp {args.amp}: a transformer block under autocast raises or is not finite on {device}; expected a type that works here; use --amp auto"
        )
    if args.amp != "auto":
        return args.amp
    if device.type == "cuda":
        return next((kind for kind in AMP_TYPES if probe_amp(kind, *sizes) < math.inf), "off")
    return "bf16" if 1.2 * probe_amp("bf16", *sizes) < probe_amp("off", *sizes) else "off"


def pretrain_data(args: argparse.Namespace, quiet: bool, say: Callable) -> tuple[Crops, list[dict], dict]:
    """Training crops, batches of the fixed validation crops with their masks, and what goes into the checkpoint."""
    root = Path(args.data or data.synthetic_percepiano(args.cache))
    if not args.data:
        root, midi = root.with_name(f"{root.name}-audio"), root / "virtuoso/data/all_2rounds"
        data.render_folder(midi, root, quiet=quiet)
        (root / "SYNTHETIC").touch()
    if args.online:
        store = data.open_audio(root, args.strict, args.audio)
    elif (root / "index.json").is_file():
        store = data.open_fbank(root)
    else:
        key = hashlib.sha1(
            f"{root.resolve()} {args.audio and Path(args.audio).resolve()}".encode()
        ).hexdigest()[:16]
        store = data.build_fbank(
            root, Path(args.cache) / f"fbank-{key}", None, args.strict, quiet, args.audio
        )
    parts, excluded = data.pretrain_parts(store), {}
    if args.exclude_overlap:
        maestro = data.read_maestro(root, args.strict, args.audio)
        excluded = data.maestro_overlaps(
            maestro, args.exclude_overlap, pieces=True, cache=args.cache, quiet=quiet
        )
        for line in maestro.unchecked:
            say(f"not compared: {line}")
        parts = {
            part: [i for i in members if store.names[i] not in excluded] for part, members in parts.items()
        }
        say(f"{len(excluded)} recordings of PercePiano's music left out: {', '.join(sorted(excluded))}")
        if not all(parts.values()):
            raise data.DataError(
                f"{root}: nothing left to train or validate with; expected other music too; leave --exclude-overlap out"
            )
    for line in store.left_out:
        say(f"left out: {line}")
    train, valid = Crops(store, parts["train"], args), Crops(store, parts["valid"], args, stretch=False)
    info = {
        "task": "pretrain",
        "synthetic": store.synthetic,
        "frames": args.frames,
        "audio": "wav",
        "exclude_overlap": bool(args.exclude_overlap),
        "recordings": fingerprint(store.names, store.frames),
    } | normalisation(train, args)
    fixed, generator = (
        np.linspace(0, len(valid) - 1, min(args.valid_crops, len(valid))).round().astype(int),
        torch.Generator().manual_seed(args.seed),
    )
    batches = [
        data.collate_ast([valid[0, int(k)] for k in fixed[i : i + args.micro_batch]], info)
        for i in range(0, len(fixed), args.micro_batch)
    ]
    say(
        f"{store.root}{' (SYNTHETIC)' * store.synthetic}: {len(parts['train'])} train, {len(parts['valid'])} valid recordings, {store.frames.sum() / 360_000:.2f} h; "
        f"{len(train)} crops an epoch; {len(fixed)} fixed ones validate"
    )
    return train, [with_masks(batch, args, generator) for batch in batches], info


def finetune_data(args: argparse.Namespace, quiet: bool, say: Callable) -> tuple[Clips, list[dict], dict]:
    """Training clips, validation items, and what goes into the checkpoint."""
    if not args.data:
        say(
            "no --data: training on the built-in SYNTHETIC corpus; the real one: python data.py fetch percepiano, then --data data/percepiano"
        )
    corpus = data.load_percepiano(
        args.data or data.synthetic_percepiano(args.cache), args.cache, args.strict, quiet=quiet
    )
    rng = np.random.default_rng(args.seed)
    variants = [
        (
            round(1 + float(rng.uniform(-args.tempo, args.tempo)), 3),
            int(rng.integers(-args.pitch, args.pitch + 1)),
        )
        for _ in range(args.variants)
    ]
    store = data.percepiano_audio(
        corpus, args.cache, args.audio, dict.fromkeys(v for v in variants if v != (1, 0)), quiet=quiet
    )
    for line in corpus.left_out + store.left_out:
        say(f"left out: {line}")
    parts = data.percepiano_parts(corpus, args.split, int(args.fold), args.keep_overlap)
    info = {
        "task": "finetune",
        "labels": list(data.LABELS),
        "split": args.split,
        "fold": int(args.fold),
        "keep_overlap": args.keep_overlap,
        "synthetic": corpus.synthetic,
        "frames": args.frames,
        "audio": "wav" if args.audio else "rendered",
        "recordings": fingerprint(corpus.names, [len(corpus.items)]),
    }
    info |= data.fit_targets(corpus, parts["train"], args.standardise)
    items = data.prepare_ast(corpus, store, parts["train"], info)
    versions = [
        [
            item,
            *data.prepare_ast(corpus, store, [data.variant_name(item["name"], *v) for v in variants], info),
        ]
        for item in items
    ]
    valid = data.prepare_ast(
        corpus, store, [name for name in parts["valid"] if "y" in corpus.items[name]], info
    )
    if not items or not valid:
        raise data.DataError(
            f"{corpus.root}: {len(items)} training and {len(valid)} validation items with audio; expected some; add their files to --audio"
        )
    train = Clips(versions, variants, args)
    info |= normalisation(train, args)
    say(
        f"{'SYNTHETIC corpus' if corpus.synthetic else 'PercePiano'}, {info['audio']} audio, split {args.split}, fold {args.fold}: {len(train)} train, {len(valid)} valid, "
        f"{len(parts['test'])} test items"
        + "; variants (tempo, semitones): " * bool(variants)
        + ", ".join(f"{t:g} {s:+d}" for t, s in variants)
    )
    return train, valid, info


def normalisation(train: Dataset, args: argparse.Namespace, most: int = 256) -> dict[str, float]:
    """mean and std of the training part's values, of `most` crops. Of renderings they are far from AudioSet's: -7.8 and 5.4."""
    if args.audioset_norm:
        return {"mean": data.FBANK_MEAN, "std": data.FBANK_STD}
    x = [train[0, int(k)]["fbank"] for k in np.linspace(0, len(train) - 1, min(most, len(train))).round()]
    x = np.concatenate([crop.ravel() for crop in x if np.isfinite(crop).all()] or [np.zeros(1, np.float32)])
    return {"mean": float(x.mean(dtype=np.float64)), "std": max(float(x.std(dtype=np.float64)), 1e-3)}


def fingerprint(names: list[str], frames) -> str:
    """A short hash of which recordings these are."""
    return hashlib.sha1(json.dumps([names, [int(n) for n in frames]]).encode()).hexdigest()[:16]


def build_model(args: argparse.Namespace) -> torch.nn.Module:
    """The network to train: new, or with the encoder of --init, whose sizes it takes."""
    if args.model != "ast":
        if args.task == "pretrain" or args.init or args.balance == "uncertainty":
            raise data.DataError(
                f"--model {args.model}: a baseline; expected --task finetune without --init and --balance uncertainty; leave them out"
            )
        return {"cnn": CNN, "mlp": PooledMLP}[args.model](num_outputs=len(data.LABELS))
    sizes = {"width": args.width, "depth": args.depth, "heads": args.heads, "ssast_compat": args.ssast_compat}
    shared = {"dropout": args.dropout, "checkpointing": args.checkpointing}
    if args.task == "pretrain":
        if args.init:
            raise data.DataError(
                f"--init {args.init}: for --task finetune; expected --resume to go on with a pre-training"
            )
        return AST(args.frames, visible_only=args.visible_only, **sizes, **shared)
    shared |= {
        "num_outputs": len(data.LABELS),
        "pooling": args.pooling,
        "statistics": args.statistics,
        "groups": data.label_groups() if args.grouped else None,
        "cross": args.cross_groups,
        "balance": "uncertainty" if args.balance == "uncertainty" else None,
    }
    if not args.init:
        return AST(args.frames, **sizes, **shared)
    try:
        saved = torch.load(args.init, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own text suggests unsafe loading
        raise data.DataError(
            f"{args.init}: unreadable as a checkpoint ({type(error).__name__}); expected best.pt of a pre-training or an SSAST checkpoint"
        ) from error
    if isinstance(saved, dict) and "format" not in saved and any("patch_embed" in str(key) for key in saved):
        return ast_from_ssast(saved, args.frames, **shared)
    model, ckpt = load_checkpoint(args.init)
    if ckpt["task"] != "ast":
        raise data.DataError(
            f"{args.init}: task {ckpt['task']!r}; expected a pre-training of pretrain_ast.py or an SSAST checkpoint; name that file"
        )
    return adapt_ast(model, frames=args.frames, visible_only=False, **shared)


def parameter_groups(model: torch.nn.Module, args: argparse.Namespace) -> list[dict]:
    """Weight matrices decay, the rest does not; `scale` on the rate falls by --layer-decay from the head down to the patch embedding."""
    depth, groups = len(getattr(model, "blocks", ())), {}
    for name, p in model.named_parameters():
        part = name.split(".")
        level = (
            int(part[1]) + 1
            if part[0] == "blocks"
            else 0
            if part[0] in ("embed", "position", "extra")
            else depth + 1
        )
        decays = p.ndim > 1 and part[0] not in ("position", "decoder_position", "extra")
        groups.setdefault((level, decays), []).append(p)
    return [
        {
            "params": params,
            "weight_decay": args.weight_decay * decays,
            "scale": args.layer_decay ** (depth + 1 - level),
        }
        for (level, decays), params in groups.items()
    ]


def validate(
    model: torch.nn.Module, valid: list[dict], info: dict, device: torch.device, args: argparse.Namespace
) -> dict:
    """Validation metrics of the model's present weights: pretrain on fixed crops and masks, finetune on whole items."""
    if args.task == "finetune":
        prediction, target = (
            predict_ast(model, valid, info, device, args.micro_batch),
            np.stack([item["y"] for item in valid]),
        )
        return {
            "valid_loss": float(mse(target, prediction).mean()),
            "valid_r2": float(r2(target, prediction).mean()),
            "valid_pearson": float(pearson(target, prediction).mean()),
            "valid_r2_per_dimension": r2(target, prediction).tolist(),
            "valid_pearson_per_dimension": pearson(target, prediction).tolist(),
            "spread": float((prediction.std(0) / target.std(0)).mean()),
        }
    sums: dict[str, float] = {}
    with torch.no_grad():
        for batch in valid:
            on_device = {
                k: v.to(device) if isinstance(v, torch.Tensor) and k != "lengths" else v
                for k, v in batch.items()
            }
            loss, _, figures = pretrain_loss(model.eval(), on_device, args, {})
            for k, v in {"loss": loss, **figures}.items():
                sums[f"valid_{k}"] = sums.get(f"valid_{k}", 0.0) + float(v) * len(batch["names"])
    return {k: v / sum(len(batch["names"]) for batch in valid) for k, v in sums.items()}


def evaluate(
    model: torch.nn.Module,
    ema: dict | None,
    valid: list[dict],
    info: dict,
    device: torch.device,
    args: argparse.Namespace,
) -> dict:
    """Validation metrics of the averaged weights where there are some, else of the model's own."""
    raw = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(ema or raw)
    metrics = validate(model, valid, info, device, args)
    model.load_state_dict(raw)
    model.train()
    return metrics


def summary(metrics: dict) -> str:
    """The validation metrics in a line."""
    if "valid_r2" in metrics:
        return f"loss {metrics['valid_loss']:.4f}  R2 {metrics['valid_r2']:7.4f}  r {metrics['valid_pearson']:.3f}  spread {metrics['spread']:.2f}"
    return (
        f"loss {metrics['valid_loss']:.4f}  NCE {metrics['valid_nce']:.3f}  accuracy {metrics['valid_accuracy']:.3f} (chance {metrics['valid_chance']:.4f})  "
        f"MSE {metrics['valid_mse']:.4f} (mean patch {metrics['valid_mse_mean']:.4f})"
    )


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ckpt: dict, path: str) -> None:
    """Weights and optimizer state as saved."""
    try:
        model.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise data.DataError(
            f"{path}: weights or optimizer state do not fit ({' '.join(str(error).split())[:150]}); expected those of this model; start a new run"
        ) from error


def rng_state(device: torch.device) -> dict:
    """State of the generators that dropout, masks and augmentation draw from."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_rng(state: dict, device: torch.device, rank: int) -> None:
    """The saved state on the main process; the others, whose states are not saved, go on from states of their own."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    if rank:
        torch.manual_seed(torch.initial_seed() + rank)


def update_ema(ema: dict | None, model: torch.nn.Module, decay: float) -> None:
    """Move the averaged weights, where there are some, towards the model's."""
    for name, value in model.state_dict().items() if ema else ():
        ema[name].lerp_(value, 1 - decay)


def suspects(names: list[str], losses: torch.Tensor, world: int) -> tuple[list[str], bool]:
    """Items of this step, over all processes, whose loss is not finite (all items where each loss is finite), and whether there are such."""
    gathered = [list(zip(names, losses.isfinite().tolist(), strict=True))]
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, list(zip(names, losses.isfinite().tolist(), strict=True)))
    items = [item for part in gathered for item in part]
    found = [str(name) for name, finite in items if not finite]
    return found or [str(name) for name, _ in items], bool(found)


def from_main(value, world: int):
    """The main process's value on every process: all must take the same decisions."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box)
    return box[0]


def tensorboard(folder: Path):
    """A writer that mirrors the metrics; the package is optional."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise data.DataError(
            "--tensorboard: the package tensorboard is not installed; expected it; pip install tensorboard, or leave the option out"
        ) from error
    return SummaryWriter(folder)


class Interrupt:
    """True once Ctrl-C or SIGTERM has come: the step in progress ends first, so that no half-made update is saved."""

    def __init__(self, enabled: bool):
        self.came, self.enabled = False, enabled and threading.current_thread() is threading.main_thread()
        self.before = (
            {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)} if self.enabled else {}
        )

    def note(self, *_) -> None:
        self.came = True

    def __bool__(self) -> bool:
        return self.came

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def all_folds(args: argparse.Namespace, started_group: bool) -> dict:
    """One run a fold, in turn; prints mean and deviation of their best validation R2."""
    finals = [
        main(argparse.Namespace(**{**vars(args), "fold": str(k), "name": args.name and f"{args.name}_f{k}"}))
        for k in range(data.FOLDS)
    ]
    scores = np.array([f["valid_r2"] for f in finals])
    if int(os.environ.get("RANK", 0)) == 0:
        print(
            f"four folds{' (SYNTHETIC)' * finals[0]['synthetic']}: validation R2 {scores.mean():.4f} ± {scores.std():.4f} ({', '.join(f'{s:.4f}' for s in scores)})"
        )
    if started_group:
        dist.destroy_process_group()
    return {"valid_r2": float(scores.mean()), "valid_r2_std": float(scores.std()), "folds": finals}


def main(args: argparse.Namespace) -> dict:
    """Pre-train, or fine-tune one fold or all four; returns the metrics of the best weights on the validation part."""
    # ---------------------------------------------------------------------------------------- device, DDP, seed
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device(
        f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" and world > 1 else args.device
    )
    main_process, started_group = rank == 0, world > 1 and not dist.is_initialized()
    if device.index is not None:
        torch.cuda.set_device(device)  # NCCL sends objects from the current device
    if started_group:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12)
        )  # the others wait while the cache is made
    torch.manual_seed(args.seed + rank)
    say = print if main_process else lambda *a, **k: None
    if args.task == "finetune" and args.fold == "all":
        return all_folds(args, started_group)

    # ---------------------------------------------------------------------------------------- data
    if not main_process:
        dist.barrier()  # the main process makes the cache, the others read it
    if not args.data and args.task == "pretrain":
        say(
            "no --data: training on renderings of the built-in SYNTHETIC corpus; the real one: MAESTRO v3.0.0, then --data with its folder"
        )
    train, valid, info = (pretrain_data if args.task == "pretrain" else finetune_data)(
        args, not main_process, say
    )
    if main_process and world > 1:
        dist.barrier()
    resumed = load_training(args.resume) if args.resume else None
    if resumed and (
        other := [
            k
            for k in info
            if k not in ("mean", "std", "target_mean", "target_std") and resumed["data"].get(k) != info[k]
        ]
    ):
        raise data.DataError(
            f"{args.resume}: trained on data of other {', '.join(other)} than {args.data or 'the built-in corpus'}; expected the same data; give them with --data"
        )
    info = resumed["data"] if resumed else info
    lengths, batches = train.lengths, []
    steps_per_epoch = len(data.length_batches(lengths, args.batch, args.seed, 0, world))
    workers = min(args.workers, len(os.sched_getaffinity(0)))  # more than cores only get in each other's way
    loader = DataLoader(
        train,
        batch_sampler=batches,
        collate_fn=partial(data.collate_ast, info=info),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),
    )  # its own: torch's must not depend on it
    planned, eval_every = args.epochs * steps_per_epoch, args.eval_every or steps_per_epoch
    last = min(planned, args.max_steps or planned)
    say(
        f"fbank mean {info['mean']:.3f}, std {info['std']:.3f}; {steps_per_epoch} steps an epoch, {planned} planned"
    )

    # ---------------------------------------------------------------------------------------- model
    bare_model = build_model(args).to(device).train()
    if getattr(bare_model, "statistics", None) is not None and not resumed:
        crops = (
            data.collate_ast([train[0, k] for k in range(i, min(i + 32, len(train)))], info)
            for i in range(0, len(train), 32)
        )
        bare_model.statistics.fit((batch["x"].to(device), batch["lengths"]) for batch in crops)
    model = torch.compile(bare_model) if args.compile else bare_model
    model = DistributedDataParallel(model) if world > 1 else model
    loss_of = pretrain_loss if args.task == "pretrain" else finetune_loss
    args.amp = from_main(working_amp(args, device), world)
    say(
        f"{args.task} {args.model}: {sum(p.numel() for p in bare_model.parameters()):,} parameters on {device}, amp {args.amp}{f', from {args.init}' if args.init else ''}"
    )

    # ---------------------------------------------------------------------------------------- optimiser
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    optimizer = optimizer_class(parameter_groups(bare_model, args), lr=args.lr, betas=(args.beta1, 0.999))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = {k: v.detach().clone() for k, v in bare_model.state_dict().items()} if args.ema else None

    # ---------------------------------------------------------------------------------------- resume
    step, best, skipped, in_a_row, rate, waited = (
        0,
        {"valid_loss": math.inf, "step": 0},
        {"bad": 0, "overflow": 0},
        0,
        1.0,
        0,
    )
    balance = {"weights": [1.0] * len(GROUPS), "sums": [0.0] * len(GROUPS), "count": 0, "before": []}
    if resumed:
        restore(bare_model, optimizer, resumed, args.resume)
        scaler.load_state_dict(resumed["scaler"] or {})
        ema = {k: v.to(device) for k, v in resumed["ema"].items()} if resumed["ema"] else ema
        step, best, skipped = resumed["step"], resumed["best"], resumed["skipped"]
        rate, waited, balance = (resumed["scheduler"][k] for k in ("rate", "waited", "balance"))
        restore_rng(resumed["rng"], device, rank)
        say(f"resumed {args.resume} at step {step}")
    folder = Path(from_main(str(run_folder(args)), world))
    if main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(vars(args) | git_state(), indent=1))
    metrics_file = (folder / "metrics.jsonl").open("a") if main_process else open(os.devnull, "w")
    board = tensorboard(folder) if args.tensorboard and main_process else None

    def log(**values) -> None:
        metrics_file.write(
            json.dumps(
                json_ready({"step": step, "epoch": epoch, "time": round(time.time() - start, 2), **values})
            )
            + "\n"
        )
        metrics_file.flush()
        for name in values if board else ():
            if isinstance(values[name], (int, float)):
                board.add_scalar(name, values[name], step)

    def save(name: str) -> None:
        if main_process:
            save_checkpoint(
                folder / name,
                {
                    "format": CHECKPOINT_FORMAT,
                    "task": args.model,
                    "model_args": bare_model.model_args,
                    "model": bare_model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": {"rate": rate, "waited": waited, "balance": balance},
                    "scaler": scaler.state_dict() if scaler.is_enabled() else None,
                    "ema": ema,
                    "step": step,
                    "epoch": epoch,
                    "best": best,
                    "skipped": skipped,
                    "rng": rng_state(device),
                    "args": vars(args),
                    "data": info,
                    "git_sha": git_state()["git_sha"],
                },
            )

    # ---------------------------------------------------------------------------------------- loop
    epoch, start, stop = step // steps_per_epoch, time.time(), Interrupt(enabled=world == 1)
    saved_at = start
    try:
        while step < last and not stop:
            epoch = step // steps_per_epoch
            if args.balance == "dwa" and step and step % steps_per_epoch == 0:
                balance = from_main(reweigh(balance), world)
            batches[:] = [
                [(epoch, k) for k in b[rank::world]]
                for b in data.length_batches(lengths, args.batch, args.seed, epoch, world)[
                    step % steps_per_epoch :
                ]
            ]
            for batch in (
                bar := tqdm(
                    loader,
                    desc=f"epoch {epoch}",
                    unit="step",
                    leave=False,
                    disable=None if main_process else True,
                )
            ):
                batch = augment(
                    batch
                    | {k: batch[k].to(device, non_blocking=True) for k in ("x", "y", "weight") if k in batch},
                    args,
                )
                batch, loss, losses, figures = with_masks(batch, args), 0.0, [], {}

                lr = lr_at(step, args, planned) * rate
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["scale"]
                for part, share, exchange in micro_batches(batch, args.micro_batch, model):
                    with exchange:
                        with torch.autocast(device.type, AMP_TYPES.get(args.amp), enabled=args.amp != "off"):
                            part_loss, part_losses, part_figures = loss_of(model, part, args, balance)
                        scaler.scale(part_loss * share).backward()
                    loss, losses = loss + part_loss.detach() * share, [*losses, part_losses]
                    figures = {k: figures.get(k, 0) + v * share for k, v in part_figures.items()}
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(bare_model.parameters(), args.clip).item()
                finite = math.isfinite(norm)
                if finite:
                    scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                step += 1

                if finite:
                    in_a_row = 0
                    update_ema(ema, bare_model, min(args.ema, step / (10 + step)))
                    if args.balance == "dwa":
                        balance = balance | {
                            "sums": [
                                a + float(b) for a, b in zip(balance["sums"], figures["groups"], strict=True)
                            ],
                            "count": balance["count"] + 1,
                        }
                else:  # the weights stay; the step counter and the learning rate have gone on
                    names, bad_loss = suspects(batch["names"], torch.cat(losses), world)
                    overflow = scaler.is_enabled() and not bad_loss and scaler.get_scale() > 1
                    skipped["overflow" if overflow else "bad"] += 1
                    in_a_row += not overflow
                    log(skip="overflow" if overflow else "bad", names=names, skipped=skipped)
                    if in_a_row >= args.max_skips:
                        raise data.DataError(
                            f"step {step}: {in_a_row} non-finite updates in a row, the last with {', '.join(names)}; expected finite "
                            "gradients; look at these items, lower --lr, or use --amp off"
                        )
                bar.set_postfix(loss=f"{loss.item():.4f}", norm=f"{norm:.2f}")
                if step % args.log_every == 0:
                    log(
                        loss=loss.item(),
                        lr=lr,
                        norm=norm,
                        skipped=skipped,
                        **{k: v.tolist() for k, v in figures.items()},
                    )
                if step % eval_every == 0 or step == last:
                    valid_metrics = from_main(
                        evaluate(bare_model, ema, valid, info, device, args) if main_process else None, world
                    ) | {"epoch": epoch, "step": step}
                    is_best = valid_metrics["valid_loss"] < best["valid_loss"]
                    best, waited = (valid_metrics, 0) if is_best else (best, waited + 1)
                    rate *= 0.5 if args.lr_schedule == "plateau" and waited and waited % 3 == 0 else 1
                    log(loss=loss.item(), lr=lr, norm=norm, skipped=skipped, **valid_metrics)
                    say(
                        f"epoch {epoch:3d}  step {step:6d}  lr {lr:.2e}  loss {loss.item():.4f}  valid {summary(valid_metrics)}{'  *' * is_best}"
                    )
                    if is_best:
                        save("best.pt")
                    save("last.pt")
                elif (
                    stop
                    or (args.save_every and step % args.save_every == 0)
                    or (args.save_minutes and time.time() - saved_at > 60 * args.save_minutes)
                ):
                    save("last.pt")
                    saved_at = time.time()
                if step == last or stop or (args.patience and waited >= args.patience):
                    break
            if args.patience and waited >= args.patience:
                break
    finally:
        # ------------------------------------------------------------------------------------ clean-up
        stop.restore()
        metrics_file.close()
        if board:
            board.close()
        if started_group:
            dist.destroy_process_group()
    if stop:
        say(f"interrupted after step {step}; go on with --resume {folder / 'last.pt'}")
        raise KeyboardInterrupt
    if "epoch" not in best:
        raise data.DataError(
            f"{folder}: no evaluation had a finite validation loss; expected one; lower --lr or look at metrics.jsonl"
        )
    say(
        f"best{' (SYNTHETIC)' * info['synthetic']}: step {best['step']}, validation {summary(best)}; {sum(skipped.values())} updates skipped; {time.time() - start:.0f} s; {folder / 'best.pt'}"
    )
    return best | {"synthetic": info["synthetic"], "folder": str(folder), "skipped": skipped}


if __name__ == "__main__":
    data.run_script("pretrain_ast.py", lambda: main(parse_args()))
