"""Pre-train an Audio Spectrogram Transformer (AST) on piano recordings by masked patches; fine-tune it on the
19 ratings of PercePiano.

Gong et al., "AST: Audio Spectrogram Transformer", Interspeech 2021 (arXiv 2104.01778); "SSAST:
Self-Supervised Audio Spectrogram Transformer", AAAI 2022 (arXiv 2110.09784).

    python pretrain_ast.py                                               # synthetic corpus, CPU, minutes
    python pretrain_ast.py --data MAESTRO                                # base, batch 128, 100 epochs, bf16
    python pretrain_ast.py --data MAESTRO --visible-only                 # the same in a third of the time
    python pretrain_ast.py --data MAESTRO --ssast-compat                 # network and recipe of the original
    python pretrain_ast.py --data MAESTRO --checkpointing --micro-batch 8        # for cards of 12 GB
    python pretrain_ast.py --task finetune --data PERCEPIANO --init runs/ast/NAME/best.pt --fold all
    python pretrain_ast.py --task finetune --data PERCEPIANO --model cnn # or mlp, or ast from scratch
    torchrun --nproc_per_node 8 pretrain_ast.py --data MAESTRO --batch 16        # --batch is per process
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 pretrain_ast.py ...
    python pretrain_ast.py --data MAESTRO --resume runs/ast/NAME/last.pt # goes on where it stopped

MAESTRO is the data set's folder (table, MIDI, audio; `python data.py render` makes the audio from the MIDI),
any folder of WAV files, or what `python data.py fbank` wrote; an epoch is one pass: of every recording as
many random crops as it has lengths of --frames. PERCEPIANO is a clone of its repository; its MIDI is rendered
into the cache. Scores and times: results/README.md.
"""

import data  # first: while torch loads, Ctrl-C is one line

# isort: split
import argparse
import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from data import BELOW_ONE, COUNT, POSITIVE, SHARE, WHOLE, Interrupt
from eval import (
    clip_info,
    describe_clip,
    lengths_if_unlike,
    load_corpus,
    predict_ast,
    pretrain_figures,
    pretrain_summary,
    rating_summary,
    validate_pretraining,
    validation_metrics,
    whole_clip,
    with_masks,
)
from models import (
    AMP_TYPES,
    AST,
    AST_PRESETS,
    MODELS,
    OPTIMIZERS,
    POOLINGS,
    Block,
    ClipStatistics,
    Run,
    adapt_ast,
    all_folds,
    ast_from_ssast,
    averaged,
    data_loader,
    from_main,
    launch,
    load_checkpoint,
    load_training,
    main_first,
    on_any,
    option_parser,
    parse_options,
    restore,
    run_options,
    same_data,
    say,
    set_up,
    suspects,
    update_ema,
    worker_processes,
    working_amp,
)

# fmt: off
# Defaults by task; those of the options themselves are the pre-training's.
TASKS = {
    "pretrain": {},
    "finetune": {
        "batch": 32, "lr": 2e-4, "epochs": 50, "patience": 10, "layer_decay": 0.8, "pooling": "meanstd",
        "crops": 4, "depths": 4, "ema": 0.99, "statistics": True,
    },
}
# Fine-tuning from --init: the heads alone, which rate best (results/README.md); --freeze 10: then all of it.
FROM_INIT = {"batch": 16, "lr": 1e-3, "weight_decay": 1.0, "dropout": 0.2, "epochs": 40, "freeze": 40}
# Defaults without --data, for minutes on two cores instead of hours on a GPU.
BUILT_IN = {
    "pretrain": {
        "preset": "tiny", "frames": 128, "batch": 16, "epochs": 1, "lr": 1e-3, "visible_only": True,
    },
    "finetune": {"preset": "tiny", "frames": 256, "batch": 16, "epochs": 6},
}
# --ssast-compat: the original's recipe (its run scripts and traintest_mask.py), and its head in fine-tuning.
COMPAT = {
    "pretrain": {
        "optimizer": "adam", "beta1": 0.95, "weight_decay": 5e-7, "batch": 24, "lr": 1e-4,
        "lr_schedule": "plateau", "warmup": 1000, "epochs": 10, "eval_every": 4000, "amp": "off",
        "visible_only": False,
    },
    "finetune": {
        "pooling": "mean", "grouped": False, "crops": 1, "depths": 1, "freeze": 0, "ema": 0.0,
        "statistics": False,
    },
}
# fmt: on
AUGMENTATIONS = ("tempo", "pitch", "noise", "spec", "mixup")
# The command that follows: what a best.pt is for.
AFTER = {"pretrain": "pretrain_ast.py --task finetune --data PERCEPIANO --init", "finetune": "eval.py --ckpt"}
GROUPS = dict(zip((name.split()[0].lower() for name in data.LABEL_GROUPS), data.label_groups(), strict=True))

SIZES = "of the encoder (%(default)s)"
LOSS = torch.nn.functional.mse_loss  # of the fine-tuning; named in the log
LIMITS = f"for which changes by {', '.join(AUGMENTATIONS)} count; of {', '.join(GROUPS)} (all)"
# fmt: off
# By group: name; a type, the choices, the name of a value, or bool for a switch; default; help.
OPTIONS = {
    "options": [  # those that matter first
        ("--task", TASKS, "pretrain", "guess patches, or rate (%(default)s)"),
        ("--data", "DIR", None, "MAESTRO; finetune: PercePiano (absent: built in, synthetic)"),
        ("--preset", AST_PRESETS, "base", "width, depth and heads (%(default)s)"),
        ("--init", "FILE", None, "finetune: a pre-training, or public weights (SSAST, AST) (none)"),
        ("--fold", [*"0123", "all"], "0", "finetune: fold that validates (%(default)s)"),
    ],
    "data": [
        ("--copies", COUNT, 0, "copies of a recording: room, level, noise; one a step (0: off)"),
        ("--frames", WHOLE, 1024, "longest input, 10 ms frames (%(default)s; --init: its own)"),
        ("--audioset-norm", bool, False, "AudioSet's mean and deviation (off: the data's; those of --init)"),
        ("--workers", COUNT, 4, "processes that read crops (%(default)s; 0: none)"),
        ("--cache", "DIR", "cache", "filter banks, audio, features (%(default)s)"),
        ("--strict", bool, False, "stop at the first unreadable file (off: leave it out)"),
    ],
    "data of --task pretrain": [
        ("--online", bool, False, "filter banks at each step, of a new copy each time (off)"),
        ("--exclude-overlap", "PERCEPIANO", None, "leave out recordings of its music (off)"),
    ],
    "data of --task finetune": [
        ("--split", data.SPLITS, "segment", "what parts never share (%(default)s)"),
        ("--keep-overlap", bool, False, "train on notes of held-out items too (off)"),
        ("--crops", WHOLE, 1, "of --frames of an item, pooled before the heads; baselines: 1 (%(default)s)"),
        ("--standardise", ["dimension", "group", "none"], "dimension", "ratings, by SD of (%(default)s)"),
        ("--variants", COUNT, 0, "more renderings of an item; one a step (0: off)"),
        ("--tempo", SHARE, 0.05, "variants: change of tempo (%(default)s; 0: off)"),
        ("--pitch", COUNT, 2, "variants: shift, semitones (%(default)s; 0: off)"),
        ("--noise", POSITIVE, 0.0, "SD, normalised, on half of the items (0: off)"),
        ("--mixup", POSITIVE, 0.0, "alpha of mixed pairs (0: off)"),
    ],
    "model": [
        ("--model", ["ast", "cnn", "mlp"], "ast", "finetune: or baselines (%(default)s)"),
        ("--ssast-compat", bool, False, "SSAST's network, objective and recipe (off)"),
        *((f"--{size}", WHOLE, None, SIZES) for size in ("width", "depth", "heads")),
        ("--dropout", BELOW_ONE, 0.1, "in every block (%(default)s; 0: off)"),
        ("--checkpointing", bool, False, "less memory, a third more time (off)"),
        ("--mask", WHOLE, 400, "pretrain: masked patches of 512 (%(default)s)"),
        ("--visible-only", bool, False, "pretrain: encode visible patches alone (off)"),
        ("--pooling", POOLINGS, "mean", "finetune: of the tokens (%(default)s)"),
        ("--depths", WHOLE, 1, "finetune: of so many depths (%(default)s)"),
        ("--grouped", bool, True, "finetune: a head a group (on)"),
        ("--statistics", bool, False, "finetune: heads see the whole clip's mel statistics too (on)"),
        ("--balance", ["none", "uncertainty", "dwa"], "none", "finetune: weights of groups (%(default)s)"),
    ],
    "optimiser": [
        ("--optimizer", OPTIMIZERS, "adamw", "adam: coupled decay (%(default)s)"),
        ("--lr", POSITIVE, 1e-4, "peak learning rate (%(default)s)"),
        ("--beta1", BELOW_ONE, 0.9, "decay of the mean gradient (%(default)s)"),
        ("--weight-decay", POSITIVE, 0.01, "of matrices (%(default)s; 0: off)"),
        ("--freeze", COUNT, 0, "finetune --init: first epochs, of heads alone on whole clips (%(default)s)"),
        ("--layer-decay", SHARE, 1.0, "of the rate, by layer (%(default)s; 1: off)"),
        ("--batch", WHOLE, 128, "clips a step and process (%(default)s)"),
        ("--micro-batch", COUNT, 0, "of these, so many at a time (0: as fit a GPU's memory; CPU: 16)"),
        ("--clip", POSITIVE, 1.0, "largest gradient norm (%(default)s; inf: off)"),
        ("--ema", BELOW_ONE, 0.0, "decay of averaged weights (%(default)s; 0: off)"),
    ],
    "schedule": [
        ("--lr-schedule", ["cosine", "constant", "plateau"], "cosine", "after the warm-up (%(default)s)"),
        ("--warmup", POSITIVE, 0.1, "steps; under 1: share of all (%(default)s)"),
        ("--epochs", WHOLE, 100, "passes over the training part (%(default)s)"),
        ("--max-steps", WHOLE, None, "stop after so many steps (off)"),
        ("--patience", COUNT, 0, "evaluations without a lower loss (%(default)s; 0: off)"),
        ("--eval-every", COUNT, 0, "steps between evaluations (0: each epoch)"),
        ("--save-minutes", POSITIVE, 15.0, "between saves (%(default)s; 0: off)"),
        ("--compile", bool, False, "torch.compile (off)"),
    ],
}
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = option_parser(__doc__, OPTIONS)
    add = p.add_argument_group("sound").add_argument
    about = "sound files, several renderings of the same (beside the MIDI; finetune: rendered into --cache)"
    add("--audio", nargs="+", metavar="DIR", help=about)
    about = "finetune: pianos beside the built-in one, through fluidsynth (off)"
    add("--soundfonts", nargs="+", default=[], metavar="FILE", help=about)
    add = p.add_argument_group("augmentation of --task finetune").add_argument
    spans = {"nargs": 2, "type": COUNT, "default": [0, 0], "metavar": ("BANDS", "FRAMES")}
    add("--spec-augment", **spans, help="widest masks, on half of the items (0 0: off)")
    add("--augment-groups", nargs="+", default=[], metavar="KIND=GROUP,...", help=f"groups {LIMITS}")
    run_options(p, out="runs/ast", log_every=20)

    def recipe(known: argparse.Namespace) -> dict:
        built_in = {} if known.data else BUILT_IN[known.task]
        compat = COMPAT[known.task] if known.ssast_compat else {}
        if not known.init or known.task == "pretrain":
            return TASKS[known.task] | built_in | compat
        heads_first = {} if known.ssast_compat else FROM_INIT
        return TASKS[known.task] | heads_first | built_in | {"frames": None} | compat  # load_start sets them

    args = parse_options(p, argv, ("ast", "cnn", "mlp"), recipe, lambda known: AST_PRESETS[known.preset])
    augmentation_limits(args)
    return args


def lr_at(step: int, args: argparse.Namespace, total: int) -> float:
    """Learning rate of the update that follows `step` earlier ones, of `total` planned."""
    warmup = round(args.warmup * total) if args.warmup < 1 else int(args.warmup)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.lr_schedule == "cosine":
        done = min(1, (step - warmup) / max(1, total - warmup))
        return args.lr * 0.5 * (1 + math.cos(math.pi * done))
    return args.lr


def augmentation_limits(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """For each augmentation the weights (19,) of the ratings of an item that it changed: --augment-groups."""
    limits = {kind: torch.ones(len(data.LABELS)) for kind in AUGMENTATIONS}
    for option in args.augment_groups:
        kind, _, names = option.partition("=")
        if kind not in limits or not GROUPS.keys() >= set(names.split(",")):
            raise data.DataError(f"--augment-groups {option}: unknown; see --help for kinds and groups")
        limits[kind].zero_()
        for name in names.split(","):
            limits[kind][GROUPS[name]] = 1
    return limits


class Clips(Dataset):
    """Rated performances by (epoch, number): one version of each (as played, by another piano, in another
    tempo, ...), and of it `crops` pieces of at most `frames`, each at random within its share of the whole;
    in the first `freeze` epochs what `described`, by name, holds of the whole. versions: items of each
    performance."""

    def __init__(self, versions: list[list[dict]], frames: int, seed: int, crops: int = 1, freeze: int = 0):
        self.versions, self.frames, self.seed, self.crops = versions, frames, seed, crops
        self.freeze, self.described = freeze, {}
        self.lengths = [min(items[0]["frames"], frames) for items in versions]

    def __len__(self) -> int:
        return len(self.versions)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, number = key
        versions = self.versions[number]
        rng = np.random.default_rng((self.seed, epoch, number))
        item = versions[int(rng.integers(len(versions)))]
        if epoch < self.freeze and self.described:
            rated = {name: item[name] for name in ("name", "y", "weight")}
            return rated | {"described": self.described[item["name"]]}
        room = max(0, item["frames"] - self.frames)
        starts = (np.arange(self.crops) + rng.random(self.crops)) / self.crops * (room + 1)
        crops = [item["fbank"][start : start + self.frames] for start in starts.astype(int)]
        return item | {"fbank": np.stack(crops) if self.crops > 1 else np.asarray(crops[0])}


def load_start(args: argparse.Namespace) -> tuple[AST | None, dict]:
    """What --init names: a network and its checkpoint, or None and public weights by name; {} without --init.
    Sets --frames, if not given: the network's own, or the usual ones."""
    pretraining, baseline = args.task == "pretrain", args.model != "ast"
    foreign = baseline and (pretraining or args.init or args.balance == "uncertainty")
    if foreign or (pretraining and args.init):
        raise data.DataError(
            f"--model {args.model}, --init {args.init}: only with --task finetune; a baseline takes neither "
            "--init nor --balance uncertainty; to go on with a run: --resume"
        )
    network, start = load_checkpoint(args.init, public=True) if args.init else (None, {})
    if network and start["task"] != "ast":
        raise data.DataError(f"{args.init}: task {start['task']!r}; expected best.pt of a pre-training")
    if args.frames is None:
        usual = 1024 if args.data else BUILT_IN["finetune"]["frames"]
        args.frames = network.model_args["frames"] if network else usual
    return network, start


def finetune_data(args: argparse.Namespace, quiet: bool, say: Callable, norm: dict | None) -> tuple:
    """Training clips, validation items, and what inference needs to know of the data. norm: mean and std to
    normalise by, an encoder's own; None: the clips'."""
    corpus = load_corpus(args, quiet=quiet, say=say)
    rng = np.random.default_rng(args.seed)
    variants = []
    for _ in range(args.variants):
        tempo = round(1 + float(rng.uniform(-args.tempo, args.tempo)), 3)
        variants.append(data.Version(tempo, int(rng.integers(-args.pitch, args.pitch + 1))))
    heard = data.heard_versions(args.copies, args.soundfonts)
    store = data.percepiano_audio(corpus.root, args.cache, args.audio, [*heard, *variants], quiet=quiet)
    data.say_left_out(store.left_out, say)
    parts = data.percepiano_parts(corpus, args.split, int(args.fold), args.keep_overlap)
    info = {
        "task": "finetune",
        "frames": args.frames,
        "recordings": data.fingerprint(corpus.names, [len(corpus.items)]),
        **clip_info(corpus, args, int(args.fold)),
    }
    info |= data.fit_targets(corpus, parts["train"], args.standardise)
    limits = augmentation_limits(args)
    weights = {}
    for version in variants:
        tempo = limits["tempo"] if version.tempo != 1 else 1.0
        pitch = limits["pitch"] if version.semitones else 1.0
        weights[version.name("")] = torch.ones(len(data.LABELS)) * tempo * pitch
    trained = {*parts["train"]}
    versions: dict[str, list[dict]] = {}
    names = [name for name in store.names if name.partition("@")[0] in trained]
    for item in data.prepare_ast(corpus, store, names, info):
        name, at, version = item["name"].partition("@")
        weight = weights.get(at + version, torch.ones(len(data.LABELS)))
        versions.setdefault(name, []).append(item | {"weight": weight.numpy()})
    rated = [name for name in parts["valid"] if "y" in corpus.items[name]]
    valid = data.prepare_ast(corpus, store, rated, info)
    if not versions or not valid:
        raise data.DataError(f"{corpus.root}: no audio of training or validation items; add it to --audio")
    crops = args.crops if args.model == "ast" else 1
    freeze = args.freeze if args.init else 0
    train = Clips([*versions.values()], args.frames, args.seed, crops, freeze)
    info |= norm or data.fit_fbank(train, args.audioset_norm)
    if args.model == "mlp" or (args.statistics and args.model == "ast"):
        values = ClipStatistics().values
        for item in chain(*versions.values()):
            item["statistics"] = values(whole_clip(item, info))[0].numpy()
    kind = " (SYNTHETIC)" if corpus.synthetic else ""
    say(
        f"{corpus.root}{kind}, {info['audio']}, split {args.split}, fold {args.fold}: {len(train)} train, "
        f"{len(valid)} valid items; variants {variants}"
    )
    return train, valid, info


def augment(batch: dict, args: argparse.Namespace) -> dict:
    """The batch as this step shows it; noise, masks, pairs from torch's generator, which a resume restores.
    Pre-training needs none: its crops and masks are random enough (AST.md). Descriptions of frozen epochs
    stay as they are; of the statistics of whole clips only pairs are mixed."""
    if "y" not in batch or "described" in batch or not (args.noise or any(args.spec_augment) or args.mixup):
        return batch
    x, y, weight = batch["x"].flatten(1, -2), batch["y"], batch["weight"]  # crops one behind the other
    B, T, M = x.shape
    move = partial(torch.Tensor.to, device=x.device, non_blocking=True)
    whole = batch["lengths"]  # stay on the CPU, else a GPU must wait for them
    limits = {kind: move(limit) for kind, limit in augmentation_limits(args).items()}
    if args.noise:
        hit = torch.rand(B, 1, device=x.device) < 0.5
        x = x + args.noise * hit[:, :, None] * torch.randn_like(x)
        weight = torch.where(hit, weight * limits["noise"], weight)
    if any(args.spec_augment):
        hit = torch.rand(B, 1, device=x.device) < 0.5
        bands = data.random_span(M, args.spec_augment[0], torch.full((B,), M, device=x.device))
        frames = data.random_span(T, args.spec_augment[1], move(whole.view(B, -1).sum(1)))
        x = x.masked_fill((bands[:, None] | frames[:, :, None]) & hit[:, :, None], 0.0)
        weight = torch.where(hit, weight * limits["spec"], weight)
    if args.mixup:
        other = torch.randperm(B)
        whole = torch.maximum(whole, whole[other])
        other = move(other)
        share = move(torch.distributions.Beta(args.mixup, args.mixup).sample((B, 1)))
        x = torch.lerp(x[other], x, share[:, :, None])
        y = torch.lerp(y[other], y, share)
        if "statistics" in batch:
            values = batch["statistics"]
            batch = batch | {"statistics": torch.lerp(values[other], values, share)}
        weight = weight * weight[other] * limits["mixup"]
    return batch | {"x": x.view_as(batch["x"]), "y": y, "weight": weight, "lengths": whole}


def pretrain_loss(model: torch.nn.Module, batch: dict, args: argparse.Namespace, _) -> tuple:
    """NCE + 10 MSE of the masked patches; the same by clip, NaN where a clip is not finite; the figures."""
    figures = pretrain_figures(model, batch, args.ssast_compat)
    loss = figures.pop("loss")
    sound = batch["x"].isfinite().flatten(1).all(1)
    losses = torch.where(sound, loss.detach().nan_to_num(), torch.nan)
    return loss, losses, {name: value.detach() for name, value in figures.items()}


def finetune_loss(model: torch.nn.Module, batch: dict, args: argparse.Namespace, weights: list) -> tuple:
    """Squared error of the standardised ratings; the same by clip; by group of ratings. Balance uncertainty:
    exp(-s) error + s, s learned (Kendall et al., 2018, eq. 7, times a factor); dwa: `weights` of groups."""
    if "described" in batch:
        rated = model(described=batch["described"])
    else:
        whole = args.model == "ast" and "statistics" in batch
        of_clip = {"statistics": batch["statistics"]} if whole else {}
        rated = model(batch["x"], lengths_if_unlike(batch), **of_clip)
    error = LOSS(rated, batch["y"], reduction="none") * batch["weight"]  # (B, 19)
    groups = torch.stack([error[:, members].mean(1) for members in GROUPS.values()], dim=1)  # (B, G)
    losses = error.mean(1)
    if args.balance == "uncertainty":
        s = getattr(model, "module", model).log_variance
        losses = (torch.exp(-s) * groups + s).mean(1)
    elif args.balance == "dwa":
        losses = (groups * torch.tensor(weights, device=groups.device)).mean(1)
    return losses.mean(), losses.detach(), {"groups": groups.detach().mean(0)}


def reweigh(balance: dict) -> dict:
    """Dynamic weight averaging, temperature 2 (Liu et al., 2019, section 3.3): groups whose error fell least
    from the epoch before the last to the last weigh most."""
    mean = np.array(balance["sums"]) / max(balance["count"], 1)
    weights = np.ones(len(mean))
    if balance["before"]:
        weights = np.exp(mean / np.maximum(balance["before"], 1e-12) / 2)
    weights = (weights / weights.mean()).tolist()
    return {"weights": weights, "sums": [0.0] * len(mean), "count": 0, "before": mean.tolist()}


def build_model(args: argparse.Namespace, network: AST | None, start: dict) -> torch.nn.Module:
    """The network to train: new, or from what `load_start` gave, whose sizes it takes."""
    if args.model != "ast":
        return MODELS[args.model](num_outputs=len(data.LABELS))
    sizes = {name: getattr(args, name) for name in ("frames", "width", "depth", "heads", "ssast_compat")}
    shared = {"dropout": args.dropout, "checkpointing": args.checkpointing}
    if args.task == "pretrain":
        return AST(visible_only=args.visible_only, **sizes, **shared)
    shared |= {
        "num_outputs": len(data.LABELS),
        "pooling": args.pooling,
        "depths": args.depths,
        "statistics": args.statistics,
        "groups": data.label_groups() if args.grouped else None,
        "balance": "uncertainty" if args.balance == "uncertainty" else None,
    }
    if not start:
        return AST(**sizes, **shared)
    if network:
        return adapt_ast(network, frames=args.frames, visible_only=False, **shared)
    try:
        return ast_from_ssast(start, args.frames, **shared)
    except data.DataError as error:
        raise data.DataError(f"{args.init}: {error}") from error


def frozen_descriptions(model: AST, train: Clips, info: dict, quiet: bool) -> dict[str, np.ndarray]:
    """By name, what the heads see of every version of every clip as long as the encoder does not learn."""
    model.eval()
    items = tqdm([*chain(*train.versions)], desc="frozen tokens", unit="clip", disable=quiet or None)
    described = {item["name"]: describe_clip(model, item, info)[0].cpu().numpy() for item in items}
    model.train()
    return described


def parameter_groups(model: torch.nn.Module, args: argparse.Namespace) -> list[dict]:
    """Weight matrices decay, the rest does not; `scale`, on the rate, falls by --layer-decay from the head
    (level depth + 1) through the blocks, the norm with the last, to the patch embedding (level 0)."""
    depth = len(getattr(model, "blocks", ()))
    groups: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        part, *rest = name.split(".")
        level = depth + 1
        if part == "blocks":
            level = int(rest[0]) + 1
        elif part == "norm":
            level = depth
        elif part in ("embed", "position", "extra"):
            level = 0
        decays = parameter.ndim > 1 and part not in ("position", "decoder_position", "extra")
        groups.setdefault((level, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": args.weight_decay if decays else 0.0,
            "scale": args.layer_decay ** (depth + 1 - level),
            "encoder": level <= depth,
        }
        for (level, decays), parameters in groups.items()
    ]


def micro_batches(batch: dict, size: int, model: torch.nn.Module) -> Iterator[tuple[dict, float, object]]:
    """Parts of at most `size` clips, the share of each in the batch, and the context of its pass: processes
    exchange gradients at the last one only."""
    count = len(batch["names"])
    for first in range(0, count, size):
        part = {key: value[first : first + size] for key, value in batch.items()}
        wait = isinstance(model, DistributedDataParallel) and first + size < count
        yield part, len(part["names"]) / count, model.no_sync() if wait else contextlib.nullcontext()


def micro_batch_that_fits(model, train: Dataset, info: dict, loss_of: Callable, args) -> int:
    """--micro-batch; 0: on a GPU the largest half, quarter, ... of the batch whose gradients it can hold with
    a quarter of its memory free, on a CPU 16."""
    device = next(model.parameters()).device
    if args.micro_batch or device.type != "cuda":
        return args.micro_batch or min(16, args.batch)
    size = args.batch
    while size > 1:
        held = torch.empty(torch.cuda.mem_get_info()[0] // 4, dtype=torch.uint8, device=device)
        try:
            numbers = sorted(range(len(train)), key=lambda k: -train.lengths[k])[:size]
            items = [train[getattr(train, "freeze", 0), k] for k in numbers]
            batch = data.on_device(data.collate_ast(items, info), info, device)
            batch = with_masks(batch, args.mask) if args.task == "pretrain" else batch
            with torch.autocast(device.type, AMP_TYPES.get(args.amp), enabled=args.amp != "off"):
                mean, *_ = loss_of(model, batch, args, [1.0] * len(GROUPS))
            mean.backward()
            return size
        except torch.cuda.OutOfMemoryError:
            size = (size + 1) // 2
        finally:
            del held
            batch = mean = None  # of a failed try: its graph would take the next one's room
            model.zero_grad()
            torch.cuda.empty_cache()
    return size


def validate(model: torch.nn.Module, valid: list[dict], info: dict, args: argparse.Namespace) -> dict:
    """Metrics of the present weights: pretrain on fixed crops and masks, finetune on whole items."""
    device = next(model.parameters()).device
    if args.task == "pretrain":
        return validate_pretraining(model, valid, device, args)
    prediction = predict_ast(model, valid, info, device, args.micro_batch)
    return validation_metrics(np.stack([item["y"] for item in valid]), prediction)


def main(args: argparse.Namespace) -> dict:
    """Pre-train, or fine-tune one fold or all; returns the validation metrics of the best weights."""
    # ---- device, process group, seed
    device, rank, world = set_up(args.device, args.seed, args.ssast_compat)
    if args.task == "finetune" and args.fold == "all":
        return all_folds(main, args)

    # ---- data
    pretraining = args.task == "pretrain"
    resumed = load_training(args.resume, ("ast", "cnn", "mlp")) if args.resume else None
    network, start = (None, {}) if resumed else load_start(args)
    known = (resumed or start).get("data")
    norm = known and {key: known[key] for key in ("mean", "std")}
    if pretraining and not args.data:
        say("no --data: built-in SYNTHETIC corpus; the real one: MAESTRO, see README.md")
    load_data = data.pretrain_data if pretraining else finetune_data
    loss_of = pretrain_loss if pretraining else finetune_loss
    with main_first():
        train, valid, info = load_data(args, rank > 0, say, norm)
    if resumed:
        same_data(args.resume, resumed["data"], info)
        info = resumed["data"]
    batches: list[list[tuple]] = []  # of the epoch
    loader = data_loader(train, batches, partial(data.collate_ast, info=info), args.workers, device)
    steps_per_epoch = len(data.length_batches(train.lengths, args.batch, args.seed, 0, world))
    planned = args.epochs * steps_per_epoch
    last = min(planned, args.max_steps or planned)
    say(f"fbank {info['mean']:.3f} ± {info['std']:.3f}; {steps_per_epoch} steps an epoch, {planned} planned")

    # ---- model
    bare_model = MODELS[args.model](**resumed["model_args"]) if resumed else build_model(args, network, start)
    bare_model.checkpointing = args.checkpointing  # a resume may change it
    bare_model = bare_model.to(device).train()
    if getattr(bare_model, "statistics", None) is not None and not resumed:
        values = [item["statistics"] for item in chain(*train.versions)]
        bare_model.statistics.fit(torch.tensor(np.stack(values)))
    model = torch.compile(bare_model) if args.compile else bare_model
    model = DistributedDataParallel(model) if world > 1 else model
    sizes = vars(args) if args.model != "ast" else bare_model.model_args  # of --init: its own
    one_layer = partial(Block, sizes["width"], sizes["heads"], 0.0)
    args.amp = from_main(working_amp(args.amp, device, one_layer, 4, 128, sizes["width"]))
    parameters = sum(p.numel() for p in bare_model.parameters())
    args.loss, args.synthetic = "nce_and_mse" if pretraining else LOSS.__name__, info["synthetic"]
    say(f"{args.task} {args.model}: {parameters:,} parameters on {device}, amp {args.amp}, from {args.init}")

    # ---- optimiser
    options = {"lr": args.lr, "betas": (args.beta1, 0.999), "fused": device.type == "cuda"}
    groups = parameter_groups(bare_model, args)
    encoder = [parameter for group in groups if group["encoder"] for parameter in group["params"]]
    optimizer = OPTIMIZERS[args.optimizer](groups, **options)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # ---- resume
    step = waited = 0
    rate = 1.0
    best = {"valid_loss": math.inf}
    balance = {"weights": [1.0] * len(GROUPS), "sums": [0.0] * len(GROUPS), "count": 0, "before": []}
    if resumed:
        ema = restore(args.resume, resumed, bare_model, optimizer, scaler, rank)
        step, best = resumed["step"], resumed["best"]
        rate, waited, balance = (resumed["scheduler"][key] for key in ("rate", "waited", "balance"))
    freeze = getattr(train, "freeze", 0)
    if step < freeze * steps_per_epoch:
        train.described = frozen_descriptions(bare_model, train, info, quiet=rank > 0)
    if freeze >= args.epochs:
        say("the heads alone learn; with a --freeze under --epochs the encoder does after it")
    if not resumed:
        if freeze:
            bare_model.standardise.fit(torch.tensor(np.stack([*train.described.values()])))
        ema = copy.deepcopy(bare_model.state_dict()) if args.ema else None
    args.micro_batch = from_main(micro_batch_that_fits(bare_model, train, info, loss_of, args))
    part = "" if pretraining else f"_{args.model}_{args.split}_f{args.fold}"
    name = f"{args.task}_{args.preset}{part}_s{args.seed}"
    run = Run(args, name, resumed)

    def save(file: str) -> None:
        state = {"ema": ema, "step": step, "epoch": epoch, "best": best, "data": info}
        state["scheduler"] = {"rate": rate, "waited": waited, "balance": balance}
        run.save(file, args.model, bare_model, optimizer, scaler, **state)

    # ---- loop
    stopped = False
    patient = True
    bar = tqdm(total=last, initial=step, unit="step", leave=False, disable=rank > 0 or None)
    with run, Interrupt() as stop, bar, worker_processes(loader):
        while step < last and not stopped and patient:
            epoch = step // steps_per_epoch
            if args.balance == "dwa" and step and step % steps_per_epoch == 0:
                balance = from_main(reweigh(balance))
            whole = data.length_batches(train.lengths, args.batch, args.seed, epoch, world)
            whole = whole[step % steps_per_epoch :]
            batches[:] = [[(epoch, k) for k in indices[rank::world]] for indices in whole]
            frozen = epoch < freeze
            for parameter in encoder:  # processes wait for each other's gradients of every weight
                parameter.requires_grad = world > 1 or not frozen
            for batch in loader:
                batch = augment(data.on_device(batch, info, device), args)
                if pretraining:
                    batch = with_masks(batch, args.mask)

                lr = lr_at(step, args, planned) * rate
                for group in optimizer.param_groups:
                    group["lr"] = 0.0 if frozen and group["encoder"] else lr * group["scale"]
                loss, losses, figures = 0.0, [], {}
                for part, share, exchange in micro_batches(batch, args.micro_batch, model):
                    with exchange:
                        with torch.autocast(device.type, AMP_TYPES.get(args.amp), enabled=args.amp != "off"):
                            mean, by_clip, by_name = loss_of(model, part, args, balance["weights"])
                        if frozen and world > 1:
                            mean = mean + 0 * sum(parameter.sum() for parameter in encoder)
                        scaler.scale(mean * share).backward()
                    loss = loss + mean.detach() * share
                    losses.append(by_clip)
                    for name, value in by_name.items():
                        figures[name] = figures.get(name, 0) + value * share
                if frozen:  # clip and step by the heads' gradients alone
                    for parameter in encoder:
                        parameter.grad = None
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(bare_model.parameters(), args.clip).item()
                finite = math.isfinite(norm)
                if finite:
                    scaler.step(optimizer)
                scaler.update()
                bare_model.zero_grad()
                step += 1
                bar.update()
                stopped = on_any(bool(stop))

                if finite:
                    run.skips_in_a_row = 0
                    update_ema(ema, bare_model, min(args.ema, step / (10 + step)))
                    if args.balance == "dwa":
                        sums = np.array(balance["sums"]) + figures["groups"].tolist()
                        balance = balance | {"sums": sums.tolist(), "count": balance["count"] + 1}
                else:  # the weights stay; the step counter and the learning rate have gone on
                    names, overflow = suspects(batch["names"], torch.cat(losses), scaler)
                    run.skip(step, epoch, names, overflow)
                if step % args.log_every == 0:
                    report = {key: value.tolist() for key, value in figures.items()}
                    run.log(step, epoch, loss=loss.item(), lr=lr, norm=norm, skipped=run.skipped, **report)
                    bar.set_postfix(loss=f"{loss.item():.4f}", norm=f"{norm:.2f}")
                overdue = on_any(0 < args.save_minutes < run.minutes_unsaved())
                if step % (args.eval_every or steps_per_epoch) == 0 or step == last:
                    metrics = None
                    if rank == 0:
                        with averaged(bare_model, ema):
                            metrics = validate(bare_model, valid, info, args)
                    metrics = from_main(metrics) | {"epoch": epoch, "step": step}
                    is_best = metrics["valid_loss"] < best["valid_loss"]  # NaN is never best
                    best = metrics if is_best else best
                    waited = 0 if is_best or frozen else waited + 1
                    patient = not args.patience or waited < args.patience
                    if args.lr_schedule == "plateau" and waited and waited % 3 == 0:
                        rate *= 0.5
                    run.log(loss=loss.item(), lr=lr, norm=norm, skipped=run.skipped, **metrics)
                    say(
                        f"step {step:6d}  lr {lr:.2e}  {args.loss} {loss.item():.4f}  "
                        f"valid {summary(metrics)}  {run.left(step, last)}"
                        f"{data.mark(summary(metrics), is_best)}"
                    )
                    if is_best:
                        save("best.pt")
                    save("last.pt")
                elif stopped or overdue or (args.save_every and step % args.save_every == 0):
                    save("last.pt")
                if step == last or stopped or not patient:
                    break

    return run.end("pretrain_ast.py", step, stopped, best, summary)


def summary(metrics: dict) -> str:
    """The validation metrics in a line."""
    return pretrain_summary(metrics) if "valid_nce" in metrics else rating_summary(metrics)


def start() -> None:
    """The run of the command line; after a pre-training comes the fine-tuning, on a corpus of ratings."""
    args = parse_args()
    launch(main, args, AFTER[args.task])


if __name__ == "__main__":
    data.run_script("pretrain_ast.py", start)
