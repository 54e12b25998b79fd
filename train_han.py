"""Train the hierarchical attention network (HAN) of PercePiano: 19 perceptual ratings of a piano performance from its score and MIDI.

Park et al., "Piano performance evaluation dataset with multilevel perceptual features", Scientific Reports 14, 23002 (2024).

    python train_han.py                                            # synthetic corpus, CPU, a few minutes
    python train_han.py --data DIR --lr 2.5e-5 --fold 0            # the published recipe on one fold
    python train_han.py --data DIR --preset tuned --fold all       # best recipe found here, four folds, mean and deviation
    torchrun --nproc_per_node 2 train_han.py --data DIR            # data parallel, one process a GPU (gloo on CPU)
    python train_han.py --data DIR --resume runs/han/NAME/last.pt  # goes on where it stopped, bit for bit on CPU
    python train_han.py --data DIR --diagnose                      # activation and gradient report of the first batches

DIR is a clone of the PercePiano repository (`python data.py fetch percepiano`). Scores and times: README, "Results".
"""

import argparse
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from eval import git_state, json_ready, mse, pearson, predict_han, r2, to_device
from models import CHECKPOINT_FORMAT, HAN, load_checkpoint, save_checkpoint

# Defaults by preset. paper: what the original trains with. tuned: chosen on the validation parts of folds 0 and 2 (README).
PRESETS = {
    "paper": {},
    "tuned": {
        "pooled": True,
        "size": 16,
        "heads": 4,
        "head_size": 512,
        "dropout": 0.4,
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 1.0,
        "schedule": "cosine",
        "ema": 0.99,
        "batch": 32,
        "epochs": 40,
        "patience": 0,
    },
}


# What a resumed run may do otherwise; every other option comes from its checkpoint.
FREE_ON_RESUME = {
    "data",
    "cache",
    "out",
    "name",
    "resume",
    "device",
    "max_steps",
    "patience",
    "log_every",
    "save_every",
    "max_skips",
    "strict",
    "diagnose",
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
        default="paper",
        help="defaults of all options below: the published recipe or the best found here (paper)",
    )
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="DIR", help="PercePiano folder (absent: the built-in synthetic corpus)")
    g.add_argument(
        "--features",
        choices=data.FEATURE_SETS,
        default="full",
        help="what it sees: score only, performance only, both (full); midi: as --model bilstm (%(default)s)",
    )
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
        "--keep-misaligned",
        action="store_true",
        help="keep training items whose match rate is under .6 (off)",
    )
    g.add_argument("--augment", action="store_true", help="shift the key by -5..+7 semitones (off)")
    g.add_argument(
        "--score-dropout",
        type=data.number(float, 0, 1),
        default=0.0,
        help="probability of hiding all score columns of an item (0: off)",
    )
    g.add_argument(
        "--noise",
        type=data.number(float, 0),
        default=0.0,
        help="SD of white noise on the z-scored columns, in SD (0: off)",
    )
    g.add_argument(
        "--cache", metavar="DIR", default="cache", help="folder of extracted features (%(default)s)"
    )
    g.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first unreadable file instead of leaving it out (off)",
    )
    g = p.add_argument_group("model")
    g.add_argument(
        "--model",
        choices=["han", "bilstm", "bilstm_sa"],
        default="han",
        help="network; bilstm sees raw MIDI columns only (%(default)s)",
    )
    g.add_argument(
        "--level",
        choices=["note", "beat", "measure", "total_note_cat"],
        default="total_note_cat",
        help="what the final attention pools (%(default)s)",
    )
    g.add_argument("--size", type=data.number(int, 1), default=256, help="width of every layer (%(default)s)")
    g.add_argument("--heads", type=data.number(int, 1), default=8, help="attention heads (%(default)s)")
    g.add_argument(
        "--dropout",
        type=data.number(float, 0, 0.99),
        default=0.2,
        help="dropout between LSTM layers and in the head (%(default)s; 0: off)",
    )
    g.add_argument(
        "--pooled",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="pooled statistics of notes and MIDI join the pooled vector before the head (off)",
    )
    g.add_argument(
        "--layernorm", action="store_true", help="LayerNorm after total_note_cat and before the head (off)"
    )
    g.add_argument(
        "--head-size", type=data.number(int, 1), help="hidden width of the head (default: twice --size)"
    )
    g.add_argument(
        "--head-gain",
        type=data.number(float, 0),
        default=1.0,
        help="factor on the initial weights of the last layer (%(default)s; 1: off)",
    )
    g = p.add_argument_group("optimiser")
    g.add_argument(
        "--optimizer",
        choices=["adam", "adamw"],
        default="adam",
        help="adam couples the decay to the gradient (%(default)s)",
    )
    g.add_argument(
        "--lr", type=data.number(float, 0), default=2.5e-5, help="peak learning rate (%(default)s)"
    )
    g.add_argument(
        "--weight-decay",
        type=data.number(float, 0),
        default=1e-5,
        help="pull of all weights towards 0 (%(default)s; 0: off)",
    )
    g.add_argument(
        "--batch", type=data.number(int, 1), default=8, help="performances a step and process (%(default)s)"
    )
    g.add_argument(
        "--clip",
        type=data.number(float, 0),
        default=2.0,
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
        "--schedule",
        choices=["step", "cosine", "constant"],
        default="step",
        help="course of the rate: stepwise down, half a cosine, or none (%(default)s)",
    )
    g.add_argument("--warmup", type=data.number(int, 0), default=0, help="steps of linear warm-up (0: off)")
    g.add_argument(
        "--step-size",
        type=data.number(int, 1),
        default=3000,
        help="step: steps between reductions (%(default)s)",
    )
    g.add_argument(
        "--gamma",
        type=data.number(float, 0, 1),
        default=0.98,
        help="step: factor of a reduction (%(default)s)",
    )
    g.add_argument(
        "--epochs",
        type=data.number(int, 1),
        help="passes over the training part (default: 100; 12 on a synthetic corpus)",
    )
    g.add_argument("--max-steps", type=data.number(int, 1), help="stop after so many steps (off)")
    g.add_argument(
        "--patience",
        type=data.number(int, 0),
        default=20,
        help="stop after so many epochs without a lower validation loss (%(default)s; 0: off)",
    )
    g = p.add_argument_group("run")
    g.add_argument(
        "--name",
        metavar="NAME",
        help="run folder below --out (default: made of preset, features, split, fold and seed)",
    )
    g.add_argument("--out", metavar="DIR", default="runs/han", help="folder of runs (%(default)s)")
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
        "--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision (%(default)s)"
    )
    g.add_argument(
        "--max-skips",
        type=data.number(int, 1),
        default=20,
        help="non-finite updates in a row that stop the run (%(default)s)",
    )
    g.add_argument(
        "--log-every",
        type=data.number(int, 1),
        default=100,
        help="steps between log lines and gradient reports (%(default)s)",
    )
    g.add_argument(
        "--save-every",
        type=data.number(int, 0),
        default=0,
        help="steps between extra saves of last.pt (0: each epoch only)",
    )
    g.add_argument(
        "--diagnose",
        action="store_true",
        help="print activation and gradient reports, stop after the first batches (off)",
    )
    g.add_argument(
        "--tensorboard", action="store_true", help="mirror the metrics where that package is installed (off)"
    )
    g.add_argument("--debug", action="store_true", help="show the traceback of an error (off)")
    argv = sys.argv[1:] if argv is None else argv
    known = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    p.set_defaults(**PRESETS[known.preset])
    saved = (
        {k: v for k, v in load_training(known.resume)["args"].items() if k not in FREE_ON_RESUME}
        if known.resume
        else {}
    )
    p.set_defaults(**saved)
    args = p.parse_args(argv)
    args.features = "midi" if args.model == "bilstm" else args.features
    if changed := [
        f"--{k.replace('_', '-')} {getattr(args, k)} (was {v})"
        for k, v in saved.items()
        if getattr(args, k) != v and k != "epochs"
    ]:
        raise data.DataError(
            f"{args.resume}: {', '.join(changed)}; expected the options it was trained with; leave them out, or start a new run"
        )
    if args.device not in ("cpu", "cuda") or args.device == "cuda" and not torch.cuda.is_available():
        raise data.DataError(
            f"--device {args.device}: not available here; expected cpu{', cuda' * torch.cuda.is_available()}"
        )
    return args


def lr_at(step: int, args: argparse.Namespace, total: int) -> float:
    """Learning rate of the update that follows `step` earlier ones, of `total` planned."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.schedule == "step":
        return args.lr * args.gamma ** (step // args.step_size)
    if args.schedule == "cosine":
        return (
            args.lr
            * 0.5
            * (1 + math.cos(math.pi * min(1, (step - args.warmup) / max(1, total - args.warmup))))
        )
    return args.lr


def run_folder(args: argparse.Namespace) -> Path:
    """The folder of a resumed run, or a new one: a taken name gets a number, no run overwrites another."""
    if args.resume:
        return Path(args.resume).parent
    name = args.name or f"{args.preset}_{args.model}_{args.features}_{args.split}_f{args.fold}_s{args.seed}"
    names = (name if k == 1 else f"{name}_{k}" for k in itertools.count(1))
    return next(folder for n in names if not (folder := Path(args.out) / n).exists())


def load_training(path: str) -> dict:
    """The checkpoint to resume from, refused unless it is a whole one of this trainer."""
    _, ckpt = load_checkpoint(path)
    parts = {
        "args": dict,
        "data": dict,
        "optimizer": dict,
        "rng": dict,
        "best": dict,
        "skipped": dict,
        "step": int,
    }
    missing = [k for k, kind in parts.items() if not isinstance(ckpt.get(k), kind)]
    if ckpt["task"] != "han" or missing:
        raise data.DataError(
            f"{path}: task {ckpt['task']!r}, without {', '.join(missing) or 'nothing'}; expected a last.pt of train_han.py; name that file"
        )
    return ckpt


def augment(item: dict, info: dict, args: argparse.Namespace, key: tuple[int, ...]) -> dict:
    """One training item as this epoch shows it; `key` (seed, epoch, index) makes it the same after a resume."""
    rng = np.random.default_rng(key)
    if args.augment:
        item = data.shift_key(item, info, int(rng.integers(data.KEY_SHIFTS[0], data.KEY_SHIFTS[1] + 1)))
    if args.score_dropout and rng.random() < args.score_dropout:
        item = item | {
            "x": item["x"] * ~np.isin([c.split(":")[0] for c in info["columns"]], list(data.SCORE_FEATURES))
        }
    if args.noise:
        item = item | {"x": item["x"] + rng.normal(0, args.noise, item["x"].shape).astype(np.float32)}
    return item


def gradient_report(model: HAN) -> dict:
    """Gradient norms by part, before clipping, and what they say: explosion, vanishing, imbalance of head and encoder."""
    squares: dict[str, float] = {}
    for name, p in model.named_parameters():
        part = "context_vectors" if name.endswith("context_vector") else name.split(".")[0]
        squares[part] = squares.get(part, 0.0) + float(p.grad.float().square().sum())
    norms = {part: math.sqrt(s) for part, s in squares.items()}
    encoder = math.sqrt(sum(s for part, s in squares.items() if part != "head"))
    ratio = norms["head"] / max(encoder, 1e-12)
    flags = [f"{part} explodes" for part, n in norms.items() if not n <= 100] + [
        f"{part} vanishes" for part, n in norms.items() if n < 1e-6
    ]
    flags += ["head and encoder unbalanced"] if not 0.1 <= ratio <= 10 else []
    return {"gradients": norms, "head_to_encoder": ratio, "flags": flags}


def activation_report(model: HAN, batch: dict) -> dict:
    """What the untrained network makes of its first batch: spread of every stage, of the logits and predictions."""
    training = model.training
    with torch.no_grad():
        stages = model.eval().stages(batch)
    model.train(training)
    prediction, x = torch.sigmoid(stages["logits"].float()), batch["x"][batch["mask"]]
    ratio = (prediction.std() / batch["y"].std()).item()
    return {
        "input_mean": x.mean().item(),
        "input_std": x.std().item(),
        "input_largest": x.abs().max().item(),
        "stage_std": {name: value.float().std().item() for name, value in stages.items()},
        "prediction": [
            prediction.mean().item(),
            prediction.std().item(),
            prediction.min().item(),
            prediction.max().item(),
        ],
        "std_ratio": ratio,
        "std_ratio_ok": 0.8 <= ratio <= 1.5,
        "flat_dimensions": [
            label for label, s in zip(data.LABELS, prediction.std(0), strict=True) if s < 0.05
        ],
        "context_vectors": [name for name, _ in model.named_parameters() if name.endswith("context_vector")],
        "head_sizes": [layer.out_features for layer in model.head if isinstance(layer, torch.nn.Linear)],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def evaluate(model: HAN, ema: dict | None, items: list[dict], device: torch.device) -> dict:
    """Validation metrics of the averaged weights where there are some, else of the model's own."""
    raw = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(ema or raw)
    prediction, target = predict_han(model, items, device), np.stack([item["y"] for item in items])
    model.load_state_dict(raw)
    model.train()
    return {
        "valid_loss": float(mse(target, prediction).mean()),
        "valid_r2": float(r2(target, prediction).mean()),
        "valid_pearson": float(pearson(target, prediction).mean()),
        "valid_r2_per_dimension": r2(target, prediction).tolist(),
        "prediction_mean": float(prediction.mean()),
        "prediction_std": float(prediction.std()),
        "spread": float((prediction.std(0) / target.std(0)).mean()),
    }


def restore(model: HAN, optimizer: torch.optim.Optimizer, ckpt: dict, path: str) -> None:
    """Weights and optimizer state as saved."""
    try:
        model.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise data.DataError(
            f"{path}: weights or optimizer state do not fit ({' '.join(str(error).split())[:150]}); expected those of this model; start a new run"
        ) from error


def rng_state(device: torch.device) -> dict:
    """State of the generators that dropout draws from."""
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


def update_ema(ema: dict | None, model: HAN, decay: float) -> None:
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
    """Train one fold, or all four; returns the metrics of the best weights on the validation part."""
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
    if args.fold == "all":
        return all_folds(args, started_group)

    # ---------------------------------------------------------------------------------------- data
    if not main_process:
        dist.barrier()  # the main process makes the cache, the others read it
    if not args.data:
        say(
            "no --data: training on the built-in SYNTHETIC corpus; the real one: python data.py fetch percepiano, then --data data/percepiano"
        )
    corpus = data.load_percepiano(
        args.data or data.synthetic_percepiano(args.cache), args.cache, args.strict, quiet=not main_process
    )
    if main_process and world > 1:
        dist.barrier()
    for line in corpus.left_out:
        say(f"left out: {line}")
    fold, resumed = int(args.fold), load_training(args.resume) if args.resume else None
    parts = data.percepiano_parts(corpus, args.split, fold, args.keep_overlap, args.keep_misaligned)
    if resumed and resumed["data"]["synthetic"] != corpus.synthetic:
        raise data.DataError(
            f"{args.resume}: trained on {'synthetic' if resumed['data']['synthetic'] else 'real'} data, {corpus.root} is not; expected the same data; give them with --data"
        )
    info = (
        resumed["data"]
        if resumed
        else data.fit_normalisation(corpus, parts["train"], args.features, args.pooled)
    )
    info |= {
        key.replace("target", "rating"): value
        for key, value in data.fit_targets(corpus, parts["train"]).items()
    }
    info |= {
        "split": args.split,
        "fold": fold,
        "keep_overlap": args.keep_overlap,
        "synthetic": corpus.synthetic,
        "labels": list(data.LABELS),
    }
    train = data.prepare_han(corpus, parts["train"], info)
    valid = data.prepare_han(corpus, [name for name in parts["valid"] if "y" in corpus.items[name]], info)
    lengths = [len(item["x"]) for item in train]
    steps_per_epoch = len(data.length_batches(lengths, args.batch, args.seed, 0, world))
    planned = (args.epochs or (12 if corpus.synthetic else 100)) * steps_per_epoch
    last = min(planned, args.max_steps or planned, 3 if args.diagnose else planned)
    say(
        f"{'SYNTHETIC corpus' if corpus.synthetic else 'PercePiano'}, split {args.split}, fold {fold}: {len(train)} train, {len(valid)} valid, "
        f"{len(parts['test'])} test items; {len(info['columns'])} columns; {steps_per_epoch} steps an epoch, {planned} planned"
    )

    # ---------------------------------------------------------------------------------------- model
    model_args = {
        "input_size": len(info["columns"]),
        "size": args.size,
        "heads": args.heads,
        "dropout": args.dropout,
        "level": args.level,
        "model": args.model,
        "layernorm": args.layernorm,
        "head_size": args.head_size,
        "head_gain": args.head_gain,
        "stats_size": len(train[0]["stats"]) if args.pooled else 0,
    }
    bare_model = HAN(**model_args).to(device)
    model = DistributedDataParallel(bare_model) if world > 1 else bare_model
    say(
        f"HAN ({args.model}, {args.level}): {sum(p.numel() for p in bare_model.parameters()):,} parameters on {device}"
    )

    # ---------------------------------------------------------------------------------------- optimiser
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    optimizer = optimizer_class(bare_model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    amp_type = torch.float16 if args.amp == "fp16" else torch.bfloat16
    ema = {k: v.detach().clone() for k, v in bare_model.state_dict().items()} if args.ema else None

    # ---------------------------------------------------------------------------------------- resume
    step, best, skipped, in_a_row = 0, {"valid_loss": math.inf, "epoch": 0}, {"bad": 0, "overflow": 0}, 0
    if resumed:
        restore(bare_model, optimizer, resumed, args.resume)
        scaler.load_state_dict(resumed["scaler"] or {})
        ema = {k: v.to(device) for k, v in resumed["ema"].items()} if resumed["ema"] else ema
        step, best, skipped = resumed["step"], resumed["best"], resumed["skipped"]
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
                    "task": "han",
                    "model_args": bare_model.model_args,
                    "model": bare_model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": None,
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
    try:
        while step < last and not stop:
            epoch = step // steps_per_epoch
            batches = data.length_batches(lengths, args.batch, args.seed, epoch, world)[
                step % steps_per_epoch :
            ]
            for indices in (
                bar := tqdm(
                    batches,
                    desc=f"epoch {epoch}",
                    unit="step",
                    leave=False,
                    disable=None if main_process else True,
                )
            ):
                batch = data.collate_han(
                    [augment(train[i], info, args, (args.seed, epoch, i)) for i in indices[rank::world]]
                )
                batch = to_device(batch, device)
                if step == 0 and main_process:
                    log(activations=activation_report(bare_model, batch))

                lr = lr_at(step, args, planned)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device.type, amp_type, enabled=args.amp != "off"):
                    logits = model(batch)
                    losses = F.mse_loss(torch.sigmoid(logits.float()), batch["y"], reduction="none").mean(1)
                    loss = losses.mean()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                report = (
                    gradient_report(bare_model) if args.diagnose or (step + 1) % args.log_every == 0 else {}
                )
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
                else:  # the weights stay; the step counter and the learning rate have gone on
                    names, bad_loss = suspects(batch["names"], losses, world)
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
                if report:
                    log(loss=loss.item(), lr=lr, norm=norm, skipped=skipped, **report)
                if args.save_every and step % args.save_every == 0:
                    save("last.pt")
                if step == last or stop:
                    break

            if stop and step % steps_per_epoch:
                save("last.pt")
                break
            valid_metrics = from_main(
                evaluate(bare_model, ema, valid, device) if main_process else None, world
            ) | {"epoch": epoch, "step": step}
            is_best = valid_metrics["valid_loss"] < best["valid_loss"]
            best = valid_metrics if is_best else best
            log(loss=loss.item(), lr=lr, norm=norm, skipped=skipped, **valid_metrics)
            say(
                f"epoch {epoch:3d}  step {step:6d}  lr {lr:.2e}  loss {loss.item():.4f}  valid loss {valid_metrics['valid_loss']:.4f}  R2 {valid_metrics['valid_r2']:7.4f}  "
                f"r {valid_metrics['valid_pearson']:.3f}  spread {valid_metrics['spread']:.2f}{'  *' * is_best}{'  collapsed?' * (valid_metrics['spread'] < 0.1)}"
            )
            if is_best:
                save("best.pt")
            save("last.pt")
            if args.patience and epoch - best["epoch"] >= args.patience:
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
    if "valid_r2" not in best:
        raise data.DataError(
            f"{folder}: no epoch had a finite validation loss; expected one; lower --lr or look at metrics.jsonl"
        )
    if args.diagnose and main_process:
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            print(json.dumps(json.loads(line), indent=1))
    say(
        f"best{' (SYNTHETIC)' * corpus.synthetic}: epoch {best['epoch']}, validation R2 {best['valid_r2']:.4f}, loss {best['valid_loss']:.4f}, "
        f"r {best['valid_pearson']:.3f}; {sum(skipped.values())} updates skipped; {time.time() - start:.0f} s; {folder / 'best.pt'}"
    )
    return best | {"synthetic": corpus.synthetic, "folder": str(folder), "skipped": skipped}


if __name__ == "__main__":
    data.run_script("train_han.py", lambda: main(parse_args()))
