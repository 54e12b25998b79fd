"""Train the hierarchical attention network (HAN) of PercePiano: 19 ratings of a piano performance.

Park et al., "Piano performance evaluation dataset with multilevel perceptual features",
Scientific Reports 14, 23002 (2024).

    python train_han.py                                            # synthetic corpus, CPU, a few minutes
    python train_han.py --data DIR --lr 2.5e-5 --fold 0            # the published recipe on one fold
    python train_han.py --data DIR --preset tuned --fold all       # best recipe found here, four folds
    torchrun --nproc_per_node 2 train_han.py --data DIR            # data parallel (gloo on CPU)
    python train_han.py --data DIR --resume runs/han/NAME/last.pt  # goes on where it stopped
    python train_han.py --data DIR --diagnose                      # reports of the first batches

DIR is a clone of the PercePiano repository (`python data.py fetch percepiano`).
"""

import data  # first: while torch loads, Ctrl-C is one line

# isort: split
import argparse
import copy
import json
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import BELOW_ONE, COUNT, POSITIVE, SHARE, WHOLE, Interrupt
from eval import load_corpus, predict_han, to_device, validation_metrics
from eval import rating_summary as summary
from models import (
    AMP_TYPES,
    FORMS,
    HAN,
    LEVELS,
    OPTIMIZERS,
    Run,
    all_folds,
    averaged,
    from_main,
    launch,
    load_training,
    main_first,
    main_process,
    on_any,
    option_parser,
    parse_options,
    restore,
    run_options,
    same_data,
    say,
    scales_loss,
    set_up,
    suspects,
    update_ema,
    working_amp,
)

# Defaults by preset. paper: the original's; tuned: the head alone, on the pooled statistics. The notes beside
# them (--model han) are kept off: a plain head on the statistics scored as well in the prototype; see
# results/README.md, also for --mixup .4.
# fmt: off
PRESETS = {
    "paper": {},
    "tuned": {
        "model": "head", "pooled": True, "size": 16, "heads": 4, "head_size": 512, "dropout": 0.4,
        "optimizer": "adamw", "lr": 1e-3, "weight_decay": 1.0, "schedule": "cosine", "ema": 0.99,
        "batch": 32, "epochs": 40, "patience": 0,
    },
}
# fmt: on
LOSS = F.mse_loss  # of rating and prediction; named in the log; the best epoch is still that of least MSE
NETWORK = ("size", "heads", "dropout", "level", "model", "head_size")

# By group: name; a type, the choices, the name of a value, or bool for a switch; default; help.
OPTIONS = {
    "options": [  # those that matter first
        ("--data", "DIR", None, "PercePiano folder; absent: the built-in synthetic corpus (off)"),
        ("--preset", PRESETS, "paper", "defaults below: original recipe, or the best found (%(default)s)"),
        ("--features", data.FEATURE_SETS, "full", "what the network sees (%(default)s)"),
        ("--split", data.SPLITS, "segment", "what parts never share (%(default)s)"),
        ("--fold", [*"0123", "all"], "0", "fold that validates (%(default)s)"),
    ],
    "data": [
        ("--keep-overlap", bool, False, "train on items that share notes with held-out ones too (off)"),
        ("--keep-misaligned", bool, False, "train on items matched under .6 too (off)"),
        ("--augment", bool, False, "shift the key by -5..+7 semitones (off)"),
        ("--cache", "DIR", "cache", "folder of extracted features (%(default)s)"),
        ("--strict", bool, False, "stop at the first unreadable file instead of leaving it out (off)"),
    ],
    "model": [
        ("--model", FORMS, "han", "bilstm: raw MIDI columns only; head: statistics only (%(default)s)"),
        ("--level", LEVELS, "total_note_cat", "what feeds the final pooling (%(default)s)"),
        ("--size", WHOLE, 256, "width of every layer (%(default)s)"),
        ("--heads", WHOLE, 8, "attention heads (%(default)s)"),
        ("--dropout", BELOW_ONE, 0.2, "of LSTM layers and head, 0: off (%(default)s)"),
        ("--pooled", bool, False, "statistics of notes and MIDI before the head too (off)"),
        ("--head-size", WHOLE, None, "hidden width of the head; absent: twice --size (off)"),
        ("--mixup", POSITIVE, 0.0, "mixes pooled vectors and ratings, Beta(a, a), 0: off (%(default)s)"),
    ],
    "optimiser": [
        ("--optimizer", OPTIMIZERS, "adam", "adam: coupled decay (%(default)s)"),
        ("--lr", POSITIVE, 2.5e-5, "peak learning rate (%(default)s)"),
        ("--weight-decay", POSITIVE, 1e-5, "towards 0, 0: off (%(default)s)"),
        ("--batch", WHOLE, 8, "performances a step and process (%(default)s)"),
        ("--clip", POSITIVE, 2.0, "largest gradient norm, inf: off (%(default)s)"),
        ("--ema", BELOW_ONE, 0.0, "decay of averaged weights, 0: off (%(default)s)"),
    ],
    "schedule": [
        ("--schedule", ["step", "cosine", "constant"], "step", "course of the rate (%(default)s)"),
        ("--warmup", COUNT, 0, "steps of linear warm-up, 0: off (%(default)s)"),
        ("--step-size", WHOLE, 3000, "step: steps between reductions (%(default)s)"),
        ("--gamma", SHARE, 0.98, "step: factor of a reduction (%(default)s)"),
        ("--epochs", WHOLE, None, "passes over the training part; absent: 100, synthetic 12 (off)"),
        ("--max-steps", WHOLE, None, "stop after so many steps (off)"),
        ("--patience", COUNT, 20, "epochs without a lower loss that stop it, 0: off (%(default)s)"),
        ("--diagnose", bool, False, "print the reports of three steps and stop (off)"),
    ],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = option_parser(__doc__, OPTIONS)
    run_options(p, out="runs/han", amp="off")
    args = parse_options(p, argv, ("han",), lambda known: PRESETS[known.preset])
    if args.model == "bilstm":
        args.features = "midi"
    return args


def lr_at(step: int, args: argparse.Namespace, total: int) -> float:
    """Learning rate of the update that follows `step` earlier ones, of `total` planned."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.schedule == "step":
        return args.lr * args.gamma ** (step // args.step_size)
    if args.schedule == "cosine":
        done = min(1, (step - args.warmup) / max(1, total - args.warmup))
        return args.lr * 0.5 * (1 + math.cos(math.pi * done))
    return args.lr


def load_data(args: argparse.Namespace, resumed: dict | None) -> tuple:
    """Training items, validation items, and what inference needs to know: info, a resumed run's own."""
    with main_first():
        corpus = load_corpus(args, quiet=not main_process(), say=say)
    fold = int(args.fold)
    parts = data.percepiano_parts(corpus, args.split, fold, args.keep_overlap, args.keep_misaligned)
    given = args.features, args.pooled, args.split, fold, args.keep_overlap
    info = data.han_info(corpus, parts["train"], *given)
    if resumed:
        same_data(args.resume, resumed["data"], info)
        info = resumed["data"]
    train = data.prepare_han(corpus, parts["train"], info)
    valid = data.prepare_han(corpus, [name for name in parts["valid"] if "y" in corpus.items[name]], info)
    if args.model == "head":  # reads no notes
        for item in train + valid:
            item |= {key: item[key][:1] for key in data.NOTE_ARRAYS}
    say(
        f"{'SYNTHETIC corpus' if corpus.synthetic else 'PercePiano'}, split {args.split}, fold {args.fold}: "
        f"{len(train)} train, {len(valid)} valid, {len(parts['test'])} test; {len(info['columns'])} columns"
    )
    return train, valid, info


def augment(item: dict, info: dict, args: argparse.Namespace, key: tuple[int, ...]) -> dict:
    """One training item as an epoch shows it; `key` (seed, epoch, index): the same after a resume."""
    if not args.augment:
        return item
    shift = np.random.default_rng(key).integers(*data.KEY_SHIFTS, endpoint=True)
    return data.shift_key(item, info, int(shift))


def mixup(batch: dict, alpha: float) -> None:
    """Mixes the ratings of each piece with another's, and tells the network to mix what its head sees:
    one share of Beta(alpha, alpha) a batch, drawn from torch's generator, which checkpoints hold."""
    if alpha:
        share = torch.distributions.Beta(alpha, alpha).sample().item()
        partner = torch.randperm(len(batch["y"])).to(batch["y"].device, non_blocking=True)
        batch["mix"] = share, partner
        batch["y"] = share * batch["y"] + (1 - share) * batch["y"][partner]


def gradient_report(model: HAN) -> dict:
    """Gradient norms by part, before clipping, and what they say of explosion, vanishing and imbalance."""
    parts: dict[str, list] = {}
    for name, p in model.named_parameters():
        part = "context_vectors" if name.endswith("context_vector") else name.split(".")[0]
        parts.setdefault(part, []).append(p.grad)
    norms = {part: torch.nn.utils.get_total_norm(grads).item() for part, grads in parts.items()}
    encoder = [norm for part, norm in norms.items() if part != "head"] or [norms["head"]]
    ratio = norms["head"] / max(math.hypot(*encoder), 1e-12)
    flags = [f"{part} explodes" for part, norm in norms.items() if not norm <= 100]
    flags += [f"{part} vanishes" for part, norm in norms.items() if norm < 1e-6]
    if not 0.1 <= ratio <= 10:
        flags.append("head and encoder unbalanced")
    return {"gradients": norms, "head_to_encoder": ratio, "flags": flags}


@torch.no_grad()
def activation_report(model: HAN, batch: dict) -> dict:
    """What the untrained network makes of its first batch: spread of every stage and of the predictions,
    as [mean, standard deviation, least, largest]."""
    stages = model.eval().stages(batch)
    model.train()
    p = torch.sigmoid(stages["logits"])
    report = {"parameters": sum(value.numel() for value in model.parameters())}
    report["head_sizes"] = [m.out_features for m in model.head if isinstance(m, torch.nn.Linear)]
    report["context_vectors"] = [name for name in model.state_dict() if name.endswith("context_vector")]
    for name, value in {"input": batch["x"][batch["mask"]], **stages, "prediction": p}.items():
        report[name] = [f(value).item() for f in (torch.mean, torch.std, torch.min, torch.max)]
    report["std_ratio"] = (p.std() / batch["y"].std()).item()
    report["std_ratio_ok"] = 0.8 <= report["std_ratio"] <= 1.5
    report["flat_dimensions"] = [data.LABELS[i] for i in (p.std(0) < 0.05).nonzero().flatten()]
    return report


def validate(model: HAN, valid: list[dict], device: torch.device) -> dict:
    """Metrics of the present weights."""
    y = np.stack([item["y"] for item in valid])
    return validation_metrics(y, predict_han(model, valid, device))


def main(args: argparse.Namespace) -> dict:
    """Train one fold, or all four; returns the metrics of the best weights on the validation part."""
    # ---- device, process group, seed
    device, rank, world = set_up(args.device, args.seed, args.preset == "paper")
    if args.fold == "all":
        return all_folds(main, args)

    # ---- data
    resumed = load_training(args.resume, ("han",)) if args.resume else None
    train, valid, info = load_data(args, resumed)
    lengths = [len(item["x"]) for item in train]
    steps_per_epoch = len(data.length_batches(lengths, args.batch, args.seed, 0, world))
    planned = (args.epochs or (12 if info["synthetic"] else 100)) * steps_per_epoch
    last = min(planned, 3 if args.diagnose else args.max_steps or planned)

    # ---- model
    sizes = {name: getattr(args, name) for name in NETWORK}
    sizes |= {"input_size": len(info["columns"]), "stats_size": len(train[0]["stats"]) if args.pooled else 0}
    bare_model = HAN(**sizes).to(device)
    model = DistributedDataParallel(bare_model) if world > 1 else bare_model
    one_layer = partial(torch.nn.Linear, 256, 256)
    args.amp = from_main(working_amp(args.amp, device, one_layer, 1024, 256))
    parameters = sum(p.numel() for p in bare_model.parameters())
    args.loss, args.synthetic = LOSS.__name__, info["synthetic"]
    say(f"HAN {args.model}: {parameters:,} parameters on {device}, amp {args.amp}; {planned} steps planned")

    # ---- optimiser
    optimizer = OPTIMIZERS[args.optimizer](
        bare_model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=scales_loss(args.amp, device))
    ema = copy.deepcopy(bare_model.state_dict()) if args.ema else None

    # ---- resume
    step = 0
    best = {"valid_loss": math.inf, "epoch": 0}
    if resumed:
        ema = restore(args.resume, resumed, bare_model, optimizer, scaler, rank)
        step, best = resumed["step"], resumed["best"]
    name = f"{args.preset}_{args.model}_{args.features}_{args.split}_f{args.fold}_s{args.seed}"
    run = Run(args, name, resumed)

    def save(file: str) -> None:
        state = {"ema": ema, "step": step, "epoch": epoch, "best": best, "data": info}
        run.save(file, "han", bare_model, optimizer, scaler, **state)

    # ---- loop
    stopped = False
    patient = True
    bar = tqdm(total=last, initial=step, unit="step", leave=False, disable=rank > 0 or None)
    with run, Interrupt() as stop, bar:
        while step < last and not stopped and patient:
            epoch = step // steps_per_epoch
            batches = data.length_batches(lengths, args.batch, args.seed, epoch, world)
            for indices in batches[step % steps_per_epoch :]:
                items = [augment(train[i], info, args, (args.seed, epoch, i)) for i in indices[rank::world]]
                batch = to_device(data.collate_han(items), device)
                mixup(batch, args.mixup)

                lr = lr_at(step, args, planned)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device.type, AMP_TYPES.get(args.amp), enabled=args.amp != "off"):
                    logits = model(batch)
                    losses = LOSS(torch.sigmoid(logits.float()), batch["y"], reduction="none").mean(1)
                    loss = losses.mean()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                report = {}
                if step == 0:
                    report["activations"] = activation_report(bare_model, batch)
                if report or args.diagnose or (step + 1) % args.log_every == 0:
                    report |= gradient_report(bare_model)
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
                else:  # the weights stay; the step counter and the learning rate have gone on
                    names, overflow = suspects(batch["names"], losses, scaler)
                    run.skip(step, epoch, names, overflow)
                if report:
                    run.log(step, epoch, loss=loss.item(), lr=lr, norm=norm, skipped=run.skipped, **report)
                    bar.set_postfix(loss=f"{loss.item():.4f}", norm=f"{norm:.2f}")
                if args.diagnose:
                    say(json.dumps(report, indent=1))
                if step % steps_per_epoch == 0 or step == last:
                    metrics = None
                    if rank == 0:
                        with averaged(bare_model, ema):
                            metrics = validate(bare_model, valid, device)
                    metrics = from_main(metrics) | {"epoch": epoch, "step": step}
                    is_best = metrics["valid_loss"] < best["valid_loss"]  # NaN is never best
                    best = metrics if is_best else best
                    patient = not args.patience or epoch - best["epoch"] < args.patience
                    run.log(loss=loss.item(), lr=lr, norm=norm, skipped=run.skipped, **metrics)
                    say(
                        f"epoch {epoch:3d}  lr {lr:.2e}  {args.loss} {loss.item():.4f}  "
                        f"valid {summary(metrics)}  {run.left(step, last)}"
                        f"{data.mark(summary(metrics), is_best)}"
                    )
                    if is_best:
                        save("best.pt")
                    save("last.pt")
                elif stopped or (args.save_every and step % args.save_every == 0):
                    save("last.pt")
                if step == last or stopped:
                    break

    return run.end("train_han.py", step, stopped, best, summary)


if __name__ == "__main__":
    data.run_script("train_han.py", lambda: launch(main, parse_args()))
