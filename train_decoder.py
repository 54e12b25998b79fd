"""Train the phoneme decoder: 20 ms bins of intracortical activity to phonemes, by GRU and CTC.

Willett et al., "A high-performance speech neuroprosthesis", Nature 620 (2023); Brain-to-Text Benchmark '24 (arXiv 2412.17227).

    python train_decoder.py --lr 0.0012                                    # synthetic corpus, CPU, about three minutes
    python train_decoder.py --data DIR                                     # AdamW, warm-up, cosine, averaged weights, bf16
    python train_decoder.py --data DIR --preset baseline                   # the public PyTorch baseline's settings
    python train_decoder.py --data DIR --preset baseline --adam-eps 1e-8   # the same with Adam's usual eps
    torchrun --nproc_per_node 2 train_decoder.py --data DIR                # data parallel, one process a GPU (gloo on CPU)
    python train_decoder.py --data DIR --resume runs/decoder/NAME/last.pt  # goes on where it stopped, bit for bit on CPU

DIR is the competition's folder, the public baseline's pickle, the '25 HDF5 files or what `python data.py decoder-convert` made
of one of them. Scores and times: README, "Results".
"""

import argparse
import itertools
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from eval import ctc_greedy, decoder_scores, git_state, json_ready, speech_logits, spell
from models import CHECKPOINT_FORMAT, GRUDecoder, load_checkpoint, output_frames, save_checkpoint

# Defaults by preset. baseline: the public PyTorch baseline. log: the AdamW re-tune of the change log, which plateaus at a PER of
# .49 to .51 and meets NaN gradients from step 4200 on (its mask hides 1.6 bins a trial, its noise arrives at .075).
# With eps .1 Adam behaves like momentum SGD at an effective rate of lr / eps * g: that is why .02 is stable in the baseline. With
# eps 1e-8 .02 explodes, or saturates the GRU (synthetic, hidden 256, 5 layers: loss 3.5 at step 80, not falling, against 3.1 and
# falling), and the best rate is near 1e-3. Under eps .1 the coupled decay of 1e-5 shrinks weights about 17 times as much per step
# as AdamW's 1e-4 does at .0012.
# default: white noise .8 and dropout .4 against .2 and .3, all else equal, on the synthetic corpus of README: validation PER .233 at
# step 1200 and falling against .299 and rising from .270 at step 800.
PRESETS = {
    "default": {},
    "baseline": {
        "optimizer": "adam",
        "adam_eps": 0.1,
        "lr": 0.02,
        "lr_schedule": "constant",
        "warmup": 0,
        "weight_decay": 1e-5,
        "decay_all": True,
        "clip": math.inf,
        "ema": 0.0,
        "dropout": 0.4,
        "input_dropout": 0.0,
        "layer_norm": False,
        "smooth_taps": 20,
        "white_noise": 0.8,
        "offset_noise": 0.2,
        "time_mask_prob": 0.0,
        "amp": "off",
    },
    "log": {
        "optimizer": "adamw",
        "adam_eps": 1e-8,
        "lr": 1.5e-3,
        "lr_schedule": "constant",
        "warmup": 0,
        "weight_decay": 1e-4,
        "decay_all": True,
        "clip": 1.0,
        "ema": 0.0,
        "dropout": 0.3,
        "input_dropout": 0.1,
        "layer_norm": True,
        "white_noise": 0.2,
        "offset_noise": 0.2,
        "time_mask_prob": 0.1,
        "time_mask_width": 15.0,
        "time_mask_max": 2,
    },
}

# Defaults without --data, where the preset does not say otherwise: minutes on two cores instead of hours on a GPU.
BUILT_IN = {"hidden": 128, "layers": 2, "batch": 16, "warmup": 50, "steps": 400, "eval_every": 50}

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLES = 3  # transcripts logged by each evaluation

# What a resumed run may do otherwise; every other option comes from its checkpoint.
FREE_ON_RESUME = {
    "data",
    "cache",
    "out",
    "name",
    "resume",
    "device",
    "max_steps",
    "log_every",
    "save_every",
    "eval_every",
    "max_skips",
    "strict",
    "workers",
    "tensorboard",
    "debug",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python %(prog)s [--data DIR] [options]",
        description=f"{__doc__}\nIn brackets: the defaults together with the other options given, such as --data DIR or --preset NAME.",
    )
    p.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="defaults of all options below: the best found here, the public baseline's, or the re-tune's of its change log (%(default)s)",
    )
    g = p.add_argument_group("data")
    g.add_argument(
        "--data",
        metavar="DIR",
        help="speech corpus (absent: the built-in synthetic corpus, with a smaller network and fewer steps)",
    )
    g.add_argument(
        "--valid",
        choices=["blocks", "test"],
        default="blocks",
        help="validate on whole blocks taken from train, or on the test part as the baseline does (%(default)s)",
    )
    g.add_argument(
        "--white-noise",
        type=data.number(float, 0),
        default=0.8,
        help="SD of noise per bin and channel, in SD; smoothing leaves .376 of it (%(default)s; 0: off)",
    )
    g.add_argument(
        "--offset-noise",
        type=data.number(float, 0),
        default=0.2,
        help="SD of a constant per trial and channel, in SD (%(default)s; 0: off)",
    )
    g.add_argument(
        "--time-mask-prob",
        type=data.number(float, 0, 1),
        default=1.0,
        help="probability of each span of zeros (%(default)s; 0: off)",
    )
    g.add_argument(
        "--time-mask-width",
        type=data.number(float, 0),
        default=0.075,
        help="longest span, in bins, or under 1 as a share of the trial (%(default)s)",
    )
    g.add_argument(
        "--time-mask-max", type=data.number(int, 0), default=20, help="spans a trial (%(default)s; 0: off)"
    )
    g.add_argument(
        "--workers",
        type=data.number(int, 0),
        default=4,
        help="processes that read trials, one a core at most (%(default)s; 0: none)",
    )
    g.add_argument(
        "--cache", metavar="DIR", default="cache", help="folder of converted corpora (%(default)s)"
    )
    g.add_argument(
        "--strict",
        action="store_true",
        help="stop where a trial cannot be read instead of leaving it out (off)",
    )
    g = p.add_argument_group("model")
    g.add_argument(
        "--hidden", type=data.number(int, 1), default=1024, help="width of each GRU direction (%(default)s)"
    )
    g.add_argument("--layers", type=data.number(int, 1), default=5, help="GRU layers (%(default)s)")
    g.add_argument(
        "--bidirectional",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read each trial backwards as well (off)",
    )
    g.add_argument(
        "--dropout",
        type=data.number(float, 0, 0.99),
        default=0.4,
        help="dropout between GRU layers (%(default)s; 0: off)",
    )
    g.add_argument(
        "--input-dropout",
        type=data.number(float, 0, 0.99),
        default=0.1,
        help="dropout after the day layer (%(default)s; 0: off)",
    )
    g.add_argument(
        "--layer-norm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="LayerNorm before the last layer (on)",
    )
    g.add_argument("--kernel", type=data.number(int, 1), default=32, help="bins of a window (%(default)s)")
    g.add_argument(
        "--stride", type=data.number(int, 1), default=4, help="bins from window to window (%(default)s)"
    )
    g.add_argument(
        "--smooth-width",
        type=data.number(float, 0),
        default=2.0,
        help="SD of the Gaussian smoothing, bins (%(default)s; 0: off)",
    )
    g.add_argument(
        "--smooth-taps",
        type=data.number(int, 1),
        default=21,
        help="length of its kernel, bins; an even one shifts by half a bin (%(default)s)",
    )
    g = p.add_argument_group("optimiser")
    g.add_argument(
        "--optimizer",
        choices=["adam", "adamw", "sgd"],
        default="adamw",
        help="adam and sgd couple the decay to the gradient (%(default)s)",
    )
    g.add_argument(
        "--lr", type=data.number(float, 0), default=1.2e-3, help="peak learning rate (%(default)s)"
    )
    g.add_argument(
        "--adam-eps",
        type=data.number(float, 0),
        default=1e-8,
        help="adam, adamw: added to the root of the second moment (%(default)s)",
    )
    g.add_argument(
        "--momentum",
        type=data.number(float, 0, 1),
        default=0.9,
        help="sgd: Nesterov momentum (%(default)s; 0: off)",
    )
    g.add_argument(
        "--weight-decay",
        type=data.number(float, 0),
        default=1e-4,
        help="pull of weight matrices towards 0 (%(default)s; 0: off)",
    )
    g.add_argument(
        "--decay-all",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="decay biases, norms and day layers as well (off)",
    )
    g.add_argument(
        "--batch", type=data.number(int, 1), default=64, help="trials a step and process (%(default)s)"
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
        default=0.9995,
        help="decay of the averaged weights that are evaluated beside the raw ones, and used (%(default)s; 0: off)",
    )
    g = p.add_argument_group("schedule")
    g.add_argument(
        "--lr-schedule",
        choices=["constant", "linear", "cosine", "step"],
        default="cosine",
        help="course of the rate after the warm-up (%(default)s)",
    )
    g.add_argument(
        "--lr-end",
        type=data.number(float, 0),
        default=1e-5,
        help="linear, cosine: rate of the last step (%(default)s)",
    )
    g.add_argument(
        "--warmup",
        type=data.number(int, 0),
        default=500,
        help="steps of linear warm-up (%(default)s; 0: off)",
    )
    g.add_argument(
        "--step-size",
        type=data.number(int, 1),
        default=3000,
        help="step: steps between reductions (%(default)s)",
    )
    g.add_argument(
        "--gamma",
        type=data.number(float, 0, 1),
        default=0.5,
        help="step: factor of a reduction (%(default)s)",
    )
    g.add_argument(
        "--reduce-on-nan",
        type=data.number(float, 0.01, 1),
        default=1.0,
        metavar="FACTOR",
        help="factor on the rate from each non-finite update on (%(default)s; 1: off)",
    )
    g.add_argument("--steps", type=data.number(int, 1), default=10_000, help="updates planned (%(default)s)")
    g.add_argument("--max-steps", type=data.number(int, 1), help="stop after so many steps (off)")
    g = p.add_argument_group("run")
    g.add_argument(
        "--name",
        metavar="NAME",
        help="run folder below --out (default: made of preset, hidden width and seed)",
    )
    g.add_argument("--out", metavar="DIR", default="runs/decoder", help="folder of runs (%(default)s)")
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
    g.add_argument(
        "--max-skips",
        type=data.number(int, 1),
        default=20,
        help="non-finite updates in a row that stop the run (%(default)s)",
    )
    g.add_argument(
        "--log-every", type=data.number(int, 1), default=100, help="steps between log lines (%(default)s)"
    )
    g.add_argument(
        "--eval-every", type=data.number(int, 1), default=500, help="steps between evaluations (%(default)s)"
    )
    g.add_argument(
        "--save-every",
        type=data.number(int, 0),
        default=0,
        help="steps between extra saves of last.pt (0: each evaluation only)",
    )
    g.add_argument(
        "--tensorboard", action="store_true", help="mirror the metrics where that package is installed (off)"
    )
    g.add_argument("--debug", action="store_true", help="show the traceback of an error (off)")
    argv = sys.argv[1:] if argv is None else argv
    known = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    p.set_defaults(**({} if known.data else BUILT_IN) | PRESETS[known.preset])
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
        if getattr(args, k) != v and k != "steps" and (k, getattr(args, k)) != ("amp", "auto")
    ]:
        raise data.DataError(
            f"{args.resume}: {', '.join(changed)}; expected the options it was trained with; leave them out, or start a new run"
        )
    args.amp = saved.get("amp", args.amp)
    if args.device not in ("cpu", "cuda") or args.device == "cuda" and not torch.cuda.is_available():
        raise data.DataError(
            f"--device {args.device}: not available here; expected cpu{', cuda' * torch.cuda.is_available()}"
        )
    return args


def lr_at(step: int, args: argparse.Namespace, total: int) -> float:
    """Learning rate of the update that follows `step` earlier ones, of `total` planned."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = min(1, (step - args.warmup) / max(1, total - args.warmup))
    if args.lr_schedule == "step":
        return args.lr * args.gamma ** (step // args.step_size)
    if args.lr_schedule == "cosine":
        return args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * done))
    if args.lr_schedule == "linear":
        return args.lr + (args.lr_end - args.lr) * done
    return args.lr


def run_folder(args: argparse.Namespace) -> Path:
    """The folder of a resumed run, or a new one: a taken name gets a number, no run overwrites another."""
    if args.resume:
        return Path(args.resume).parent
    name = args.name or f"{args.preset}_h{args.hidden}_s{args.seed}"
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
    if ckpt["task"] != "decoder" or missing:
        raise data.DataError(
            f"{path}: task {ckpt['task']!r}, without {', '.join(missing) or 'nothing'}; expected a last.pt of train_decoder.py; name that file"
        )
    return ckpt


def quiet_worker(_: int) -> None:
    """Ctrl-C and SIGTERM reach every process of a group; the main one decides what follows, and may need a worker for one more
    step. The second SIGTERM ends a worker: PyTorch sends that to those which outlive the loader."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def augment(batch: dict, args: argparse.Namespace) -> dict:
    """The batch as this step shows it, noise and masks drawn on its device from torch's generator, which a resume restores."""
    x = data.add_noise(batch["x"], batch["lengths"], args.white_noise, args.offset_noise)
    return batch | {
        "x": data.time_mask(
            x, batch["lengths"], args.time_mask_prob, args.time_mask_width, args.time_mask_max
        )
    }


def fitting(corpus: data.SpeechCorpus, trials: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """(n,) bool: True where the frames of a trial can spell its labels; CTC has no finite loss elsewhere."""
    frames = output_frames(corpus.lengths[trials], args.kernel, args.stride)
    return frames >= np.array([max(1, data.frames_needed(corpus.labels[i])) for i in trials], np.int64)


def ctc_losses(
    log_probs: torch.Tensor, frames: torch.Tensor, labels: torch.Tensor, label_lengths: torch.Tensor
) -> torch.Tensor:
    """Loss of each trial over its number of labels, (B,), of log_probs (B, F, 41): their mean is torch's reduction "mean"."""
    return F.ctc_loss(
        log_probs.transpose(0, 1), labels, frames, label_lengths, reduction="none"
    ) / label_lengths.clamp(min=1).to(log_probs.device)


def blank_fraction(logits: torch.Tensor, frames: torch.Tensor) -> float:
    """Share of the frames whose best class is the blank."""
    best = logits.detach().argmax(2).cpu()
    return float((best[torch.arange(best.shape[1]) < frames.cpu()[:, None]] == 0).float().mean())


def probe_amp(kind: str, device: torch.device, inputs: int, hidden: int) -> float:
    """Processor seconds of a forward and backward pass of a GRU layer and a linear layer under autocast, the fastest of three;
    inf where that raises or yields anything not finite. What a device claims to support is no evidence. On one thread: threads
    that wait for each other on a busy machine would decide the comparison."""
    taken, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            gru, linear = (
                torch.nn.GRU(inputs, hidden).to(device),
                torch.nn.Linear(hidden, len(data.PHONEMES)).to(device),
            )
            x = torch.randn(32, 16, inputs, device=device)
            for _ in range(3):
                start = time.process_time()
                with torch.autocast(device.type, AMP_TYPES.get(kind), enabled=kind != "off"):
                    logits = linear(gru(x)[0])
                logits.float().square().mean().backward()
                finite = all(
                    bool(t.isfinite().all())
                    for t in (logits, *(p.grad for p in gru.parameters()), linear.weight.grad)
                )
                taken.append(time.process_time() - start if finite else math.inf)
        except RuntimeError:  # a kernel that this device or this build of torch lacks
            taken = [math.inf]
        finally:
            torch.set_num_threads(threads)
    return math.inf if math.inf in taken else min(taken)


def working_amp(args: argparse.Namespace, device: torch.device, channels: int) -> str:
    """The precision to train in. auto: on a GPU bf16 where it works, else fp16, else off; on a CPU bf16 where it is faster than
    float32 by a fifth or more. Measured on an EPYC with avx512_bf16, one thread, 5 layers: 1.5 times at --hidden 256, 1.7 at 512."""
    sizes = (device, channels * args.kernel, min(args.hidden, 256))
    if args.amp in AMP_TYPES and probe_amp(args.amp, *sizes) == math.inf:
        raise data.DataError(
            f"--amp {args.amp}: a GRU under autocast raises or is not finite on {device}; expected a type that works here; use --amp auto"
        )
    if args.amp != "auto":
        return args.amp
    if device.type == "cuda":
        return next((kind for kind in AMP_TYPES if probe_amp(kind, *sizes) < math.inf), "off")
    return "bf16" if 1.2 * probe_amp("bf16", *sizes) < probe_amp("off", *sizes) else "off"


def parameter_groups(model: GRUDecoder, args: argparse.Namespace) -> list[dict]:
    """Weight matrices decay; biases, norms and day layers, whose start is the identity, do not unless --decay-all."""
    decays = {
        name: args.decay_all or p.ndim > 1 and not name.startswith("day")
        for name, p in model.named_parameters()
    }
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if decays[name] == d],
            "weight_decay": args.weight_decay * d,
        }
        for d in (True, False)
    ]
    return [group for group in groups if group["params"]]


def memory(device: torch.device) -> float:
    """Peak so far, MiB: allocated on the GPU, or resident in this process."""
    return (
        torch.cuda.max_memory_allocated(device) / 2**20
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )


def validate(
    model: GRUDecoder,
    corpus: data.SpeechCorpus,
    trials: np.ndarray,
    days: np.ndarray,
    device: torch.device,
    batch: int,
) -> dict:
    """Validation metrics of the model's present weights; days: its index of each day of the corpus. Trials too short for their labels count in every error rate, not in the loss."""
    log_probs = [torch.as_tensor(row) for row in speech_logits(model, corpus, trials, days, device, batch)]
    refs, hyps = (
        [corpus.labels[i].tolist() for i in trials],
        [ctc_greedy(row[None], [len(row)])[0] for row in log_probs],
    )
    losses = [
        float(ctc_losses(row[None], *(torch.tensor([v]) for v in (len(row), ref, len(ref)))))
        for row, ref in zip(log_probs, refs, strict=True)
        if len(row) >= max(1, data.frames_needed(ref))
    ]
    shown = [int(k) for k in np.linspace(0, len(trials) - 1, min(SAMPLES, len(trials)))]
    frames = torch.cat(log_probs).argmax(1)
    return {
        "valid_loss": float(np.mean(losses)) if losses else math.nan,
        "valid_blank_fraction": float((frames == 0).float().mean()),
        **{f"valid_{k}": v for k, v in decoder_scores(refs, hyps, corpus.day[trials], corpus.days).items()},
        "samples": [
            {"id": corpus.ids[trials[k]], "reference": spell(refs[k]), "hypothesis": spell(hyps[k])}
            for k in shown
        ],
    }


def evaluate(
    model: GRUDecoder,
    ema: dict | None,
    corpus: data.SpeechCorpus,
    trials: np.ndarray,
    days: np.ndarray,
    device: torch.device,
    batch: int,
) -> dict:
    """Validation metrics of the weights that will be used, the averaged ones where there are some; `_raw` are the model's own."""
    metrics = own = validate(model, corpus, trials, days, device, batch)
    if ema:
        raw = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(ema)
        metrics = validate(model, corpus, trials, days, device, batch)
        model.load_state_dict(raw)
    model.train()
    return metrics | {"valid_per_raw": own["valid_per"], "valid_loss_raw": own["valid_loss"]}


def restore(model: GRUDecoder, optimizer: torch.optim.Optimizer, ckpt: dict, path: str) -> None:
    """Weights and optimizer state as saved."""
    try:
        model.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise data.DataError(
            f"{path}: weights or optimizer state do not fit ({' '.join(str(error).split())[:150]}); expected those of this model; start a new run"
        ) from error


def rng_state(device: torch.device) -> dict:
    """State of the generators that dropout, noise and masks draw from."""
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


def update_ema(ema: dict | None, model: GRUDecoder, decay: float) -> None:
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


def main(args: argparse.Namespace) -> dict:
    """Train one decoder; returns the metrics of the best weights on the validation part."""
    # ---------------------------------------------------------------------------------------- device, DDP, seed
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device(
        f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" and world > 1 else args.device
    )
    main_process, started_group = rank == 0, world > 1 and not dist.is_initialized()
    if device.index is not None:
        torch.cuda.set_device(device)  # NCCL sends objects from the current device
    if started_group:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed + rank)
    say = print if main_process else lambda *a, **k: None

    # ---------------------------------------------------------------------------------------- data
    if not main_process:
        dist.barrier()  # the main process makes the cache, the others read it
    if not args.data:
        say(
            "no --data: training on the built-in SYNTHETIC corpus; the real one: Dryad, doi 10.5061/dryad.x69p8czpq, then --data with its folder"
        )
    corpus = data.open_speech(
        args.data or data.synthetic_speech(args.cache), args.cache, args.strict, quiet=not main_process
    )
    if main_process and world > 1:
        dist.barrier()
    for line in corpus.left_out:
        say(f"left out: {line}")
    resumed, parts = (
        load_training(args.resume) if args.resume else None,
        data.speech_parts(corpus, args.valid),
    )
    known = [
        corpus.days[d] for d in np.unique(corpus.day[parts["train"]])
    ]  # a day layer that nothing trains would stay the identity
    days = data.map_days(corpus.days, known, "mean")
    info = {
        "days": known,
        "channels": corpus.channels,
        "phonemes": list(data.PHONEMES),
        "rules": data.speech_rules(),
        "valid": args.valid,
        "synthetic": corpus.synthetic,
    }
    if resumed and (other := [k for k in info if resumed["data"].get(k) != info[k]]):
        raise data.DataError(
            f"{args.resume}: trained on data of other {', '.join(other)} than {corpus.root}; expected the same data; give them with --data"
        )
    train, valid = parts["train"], parts["valid"]
    fits = {part: fitting(corpus, parts[part], args) for part in ("train", "valid")}
    for part in fits:
        short = [corpus.ids[i] for i in parts[part][~fits[part]]]
        say(
            f"{part}: {len(fits[part])} trials, {len(short)} too short for their labels, left out of the loss{': ' * bool(short)}{', '.join(short[:10])}"
        )
    train = train[fits["train"]]
    if not len(train):
        raise data.DataError(
            f"{corpus.root}: no trial to train on; expected trials that fit --kernel {args.kernel} --stride {args.stride}; lower them"
        )
    lengths, batches = corpus.lengths[train].tolist(), []
    steps_per_epoch = len(data.length_batches(lengths, args.batch, args.seed, 0, world))
    workers = min(args.workers, len(os.sched_getaffinity(0)))  # more than cores only get in each other's way
    loader = DataLoader(
        data.SpeechTrials(corpus, train, days),
        batch_sampler=batches,
        collate_fn=data.collate_speech,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),
    )  # its own: torch's must not depend on it
    planned, last = args.steps, min(args.steps, args.max_steps or args.steps)
    say(
        f"{'SYNTHETIC corpus' if corpus.synthetic else corpus.root}, {len(known)} of {len(corpus.days)} days to train on: {len(train)} train, {len(valid)} valid, {len(parts['test'])} test trials; "
        f"{steps_per_epoch} steps an epoch, {planned} planned{'; validation IS the test part: its score is no result' * (args.valid == 'test')}"
    )

    # ---------------------------------------------------------------------------------------- model
    model_args = {
        "channels": corpus.channels,
        "days": len(known),
        "hidden": args.hidden,
        "layers": args.layers,
        "classes": len(data.PHONEMES),
        "kernel": args.kernel,
        "stride": args.stride,
        "dropout": args.dropout,
        "input_dropout": args.input_dropout,
        "bidirectional": args.bidirectional,
        "layer_norm": args.layer_norm,
        "smooth_width": args.smooth_width,
        "smooth_taps": args.smooth_taps,
    }
    bare_model = GRUDecoder(**model_args).to(device)
    model = DistributedDataParallel(bare_model) if world > 1 else bare_model
    args.amp = from_main(working_amp(args, device, corpus.channels), world)
    say(
        f"GRU decoder: {sum(p.numel() for p in bare_model.parameters()):,} parameters on {device}, amp {args.amp}"
    )

    # ---------------------------------------------------------------------------------------- optimiser
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[
        args.optimizer
    ]
    optimizer_args = (
        {"momentum": args.momentum, "nesterov": args.momentum > 0}
        if args.optimizer == "sgd"
        else {"eps": args.adam_eps}
    )
    optimizer = optimizer_class(parameter_groups(bare_model, args), lr=args.lr, **optimizer_args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = {k: v.detach().clone() for k, v in bare_model.state_dict().items()} if args.ema else None

    # ---------------------------------------------------------------------------------------- resume
    step, best, skipped, in_a_row, rate = (
        0,
        {"valid_per": math.inf, "step": 0},
        {"bad": 0, "overflow": 0},
        0,
        1.0,
    )
    if resumed:
        restore(bare_model, optimizer, resumed, args.resume)
        scaler.load_state_dict(resumed["scaler"] or {})
        ema = {k: v.to(device) for k, v in resumed["ema"].items()} if resumed["ema"] else ema
        step, best, skipped, rate = (
            resumed["step"],
            resumed["best"],
            resumed["skipped"],
            resumed["scheduler"]["rate"],
        )
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
                    "task": "decoder",
                    "model_args": bare_model.model_args,
                    "model": bare_model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": {"rate": rate},
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
    epoch, start, stop, recent = (
        step // steps_per_epoch,
        time.time(),
        Interrupt(enabled=world == 1),
        deque(maxlen=200),
    )
    try:
        while step < last and not stop:
            epoch = step // steps_per_epoch
            batches[:] = [
                b[rank::world]
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
                    batch | {k: batch[k].to(device, non_blocking=True) for k in ("x", "labels")}, args
                )  # the model wants lengths on the CPU

                lr = lr_at(step, args, planned) * rate
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device.type, AMP_TYPES.get(args.amp), enabled=args.amp != "off"):
                    logits, frames = model(batch["x"], batch["lengths"], batch["day"])
                    losses = ctc_losses(
                        logits.float().log_softmax(-1), frames, batch["labels"], batch["label_lengths"]
                    )
                    loss = losses.mean()
                scaler.scale(loss).backward()
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
                    recent.append(loss.item())
                    update_ema(ema, bare_model, min(args.ema, step / (10 + step)))
                else:  # the weights stay; the step counter and the learning rate have gone on
                    names, bad_loss = suspects(batch["ids"], losses, world)
                    overflow = scaler.is_enabled() and not bad_loss and scaler.get_scale() > 1
                    skipped["overflow" if overflow else "bad"] += 1
                    in_a_row += not overflow
                    rate *= 1 if overflow else args.reduce_on_nan
                    log(skip="overflow" if overflow else "bad", names=names, skipped=skipped, rate=rate)
                    if in_a_row >= args.max_skips:
                        raise data.DataError(
                            f"step {step}: {in_a_row} non-finite updates in a row, the last with {', '.join(names)}; expected finite "
                            "gradients; look at these trials, lower --lr, or use --amp off"
                        )
                bar.set_postfix(loss=f"{loss.item():.4f}", norm=f"{norm:.2f}")
                if step % args.log_every == 0:
                    log(
                        loss=loss.item(),
                        loss_of_200=float(np.mean(recent)) if recent else math.nan,
                        lr=lr,
                        norm=norm,
                        skipped=skipped,
                        blank_fraction=blank_fraction(logits, frames),
                        memory=memory(device),
                    )
                if step % args.eval_every == 0 or step == last:
                    valid_metrics = from_main(
                        evaluate(bare_model, ema, corpus, valid, days, device, args.batch)
                        if main_process
                        else None,
                        world,
                    ) | {"epoch": epoch, "step": step}
                    is_best = valid_metrics["valid_per"] < best["valid_per"]
                    best = valid_metrics if is_best else best
                    log(loss=loss.item(), lr=lr, norm=norm, skipped=skipped, **valid_metrics)
                    say(
                        f"epoch {epoch:3d}  step {step:6d}  lr {lr:.2e}  loss {loss.item():.4f}  valid loss {valid_metrics['valid_loss']:.4f}  "
                        f"PER {valid_metrics['valid_per']:.4f} (raw {valid_metrics['valid_per_raw']:.4f})  blank {valid_metrics['valid_blank_fraction']:.2f}{'  *' * is_best}"
                    )
                    if is_best:
                        save("best.pt")
                    save("last.pt")
                elif stop or (args.save_every and step % args.save_every == 0):
                    save("last.pt")
                if step == last or stop:
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
    if "valid_loss" not in best:
        raise data.DataError(
            f"{folder}: no evaluation had an error rate; expected labelled validation trials; look at metrics.jsonl"
        )
    for sample in best["samples"]:
        say(f"{sample['id']}\n  reference  {sample['reference']}\n  decoded    {sample['hypothesis']}")
    say(
        f"best{' (SYNTHETIC)' * corpus.synthetic}: step {best['step']}, validation PER {best['valid_per']:.4f}, without SIL {best['valid_per_without_sil']:.4f}, "
        f"loss {best['valid_loss']:.4f}; {sum(skipped.values())} updates skipped; {time.time() - start:.0f} s; {folder / 'best.pt'}"
    )
    return best | {"synthetic": corpus.synthetic, "folder": str(folder), "skipped": skipped}


if __name__ == "__main__":
    data.run_script("train_decoder.py", lambda: main(parse_args()))
