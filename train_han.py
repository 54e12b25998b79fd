"""Train the hierarchical attention network (HAN) of PercePiano: 19 perceptual ratings of a piano performance from its score and MIDI.

Park et al., "Piano performance evaluation dataset with multilevel perceptual features", Scientific Reports 14, 23002 (2024).

    python train_han.py                                            # synthetic corpus, CPU, a few minutes
    python train_han.py --data DIR --lr 2.5e-5 --fold 0            # the published recipe on one fold
    python train_han.py --data DIR --preset tuned --fold all       # best recipe found here, four folds
    torchrun --nproc_per_node 2 train_han.py --data DIR            # data parallel, one process a GPU (gloo on CPU)
    python train_han.py --data DIR --resume runs/han/NAME/last.pt  # goes on where it stopped, bit for bit on CPU
    python train_han.py --data DIR --diagnose                      # reports of the first batches

DIR is a clone of the PercePiano repository (`python data.py fetch percepiano`).
"""

import argparse
import json
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from eval import METRICS, predict_han, to_device, validation_metrics
from models import (
    AMP_TYPES,
    FORMS,
    HAN,
    LEVELS,
    Interrupt,
    Run,
    all_folds,
    averaged,
    from_main,
    load_training,
    main_first,
    parse_options,
    restore,
    run_folder,
    set_up,
    suspects,
    update_ema,
)

# Defaults by preset. paper: what the original trains with. tuned: chosen on the validation parts of folds 0 and 2.
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python %(prog)s [--data DIR] [options]",
        description=f"{__doc__}\nIn brackets: defaults, as the other options given make them (--preset, --resume).",
    )
    whole, share = data.number(int, 1), data.number(float, 0, 1)
    positive, count = data.number(float, 0), data.number(int, 0)
    p.add_argument("--preset", choices=PRESETS, default="paper", help="defaults of all options below (paper)")
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="DIR", help="PercePiano folder (absent: the built-in synthetic corpus)")
    g.add_argument("--features", choices=data.FEATURE_SETS, default="full", help="what it sees (%(default)s)")
    g.add_argument(
        "--split", choices=data.SPLITS, default="segment", help="what parts never share (%(default)s)"
    )
    g.add_argument("--fold", choices=[*"0123", "all"], default="0", help="fold that validates (%(default)s)")
    g.add_argument("--keep-overlap", action="store_true", help="train on notes of held-out items too (off)")
    g.add_argument("--keep-misaligned", action="store_true", help="train on items matched under .6 too (off)")
    g.add_argument("--augment", action="store_true", help="shift the key by -5..+7 semitones (off)")
    g.add_argument("--cache", metavar="DIR", default="cache", help="extracted features (%(default)s)")
    g.add_argument(
        "--strict", action="store_true", help="stop at the first unreadable file (off: leave it out)"
    )
    g = p.add_argument_group("model")
    g.add_argument(
        "--model", choices=FORMS, default="han", help="bilstm: raw MIDI columns only (%(default)s)"
    )
    g.add_argument("--level", choices=LEVELS, default="total_note_cat", help="what is pooled (%(default)s)")
    g.add_argument("--size", type=whole, default=256, help="width of every layer (%(default)s)")
    g.add_argument("--heads", type=whole, default=8, help="attention heads (%(default)s)")
    g.add_argument("--dropout", type=data.number(float, 0, 0.99), default=0.2, help="(%(default)s; 0: off)")
    g.add_argument(
        "--pooled",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="statistics of notes and MIDI join the pooled vector (off)",
    )
    g.add_argument("--head-size", type=whole, help="hidden width of the head (default: twice --size)")
    g = p.add_argument_group("optimiser")
    g.add_argument(
        "--optimizer",
        choices=["adam", "adamw"],
        default="adam",
        help="adam couples the decay to the gradient (%(default)s)",
    )
    g.add_argument("--lr", type=positive, default=2.5e-5, help="peak learning rate (%(default)s)")
    g.add_argument("--weight-decay", type=positive, default=1e-5, help="(%(default)s; 0: off)")
    g.add_argument("--batch", type=whole, default=8, help="performances a step and process (%(default)s)")
    g.add_argument("--clip", type=positive, default=2.0, help="largest gradient norm (%(default)s; inf: off)")
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
    g.add_argument("--warmup", type=count, default=0, help="steps of linear warm-up (0: off)")
    g.add_argument(
        "--step-size", type=whole, default=3000, help="step: steps between reductions (%(default)s)"
    )
    g.add_argument("--gamma", type=share, default=0.98, help="step: factor of a reduction (%(default)s)")
    g.add_argument("--epochs", type=whole, help="passes over the training part (100; synthetic: 12)")
    g.add_argument("--max-steps", type=whole, help="stop after so many steps (off)")
    g.add_argument(
        "--patience", type=count, default=20, help="epochs without a lower loss (%(default)s; 0: off)"
    )
    g = p.add_argument_group("run")
    g.add_argument("--name", metavar="NAME", help="run folder below --out (made of the options)")
    g.add_argument("--out", metavar="DIR", default="runs/han", help="folder of runs (%(default)s)")
    g.add_argument("--resume", metavar="FILE", help="last.pt of a stopped run: go on with its options (off)")
    g.add_argument("--seed", type=count, default=7, help="same seed, same run on CPU (%(default)s)")
    g.add_argument(
        "--device",
        metavar="NAME",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (%(default)s here)",
    )
    g.add_argument("--amp", choices=["off", *AMP_TYPES], default="off", help="mixed precision (%(default)s)")
    g.add_argument(
        "--max-skips", type=whole, default=20, help="non-finite updates that stop it (%(default)s)"
    )
    g.add_argument("--log-every", type=whole, default=100, help="steps between log lines (%(default)s)")
    g.add_argument("--save-every", type=count, default=0, help="steps between saves (0: each epoch only)")
    g.add_argument(
        "--diagnose", action="store_true", help="print the reports of the first batches, stop (off)"
    )
    g.add_argument("--tensorboard", action="store_true", help="mirror the metrics (off)")
    g.add_argument("--debug", action="store_true", help="show the traceback of an error (off)")
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


def load_data(args: argparse.Namespace, info: dict | None, rank: int, world: int, say: Callable) -> tuple:
    """Training items, validation items, and what inference needs to know of the data (info; a resumed run's own)."""
    if not args.data:
        say(
            "no --data: built-in SYNTHETIC corpus; the real one: python data.py fetch percepiano, --data data/percepiano"
        )
    with main_first(rank, world):
        root = args.data or data.synthetic_percepiano(args.cache)
        corpus = data.load_percepiano(root, args.cache, args.strict, quiet=rank > 0)
    for line in corpus.left_out:
        say(f"left out: {line}")
    if info and info["synthetic"] != corpus.synthetic:
        raise data.DataError(
            f"{args.resume}: not trained on {corpus.root}; expected the same data; give them with --data"
        )
    parts = data.percepiano_parts(corpus, args.split, int(args.fold), args.keep_overlap, args.keep_misaligned)
    info = info or data.fit_normalisation(corpus, parts["train"], args.features, args.pooled)
    for key, value in data.fit_targets(corpus, parts["train"]).items():
        info[key.replace("target", "rating")] = value
    info |= {"split": args.split, "fold": int(args.fold), "keep_overlap": args.keep_overlap}
    info |= {"synthetic": corpus.synthetic, "labels": list(data.LABELS)}
    train = data.prepare_han(corpus, parts["train"], info)
    valid = data.prepare_han(corpus, [name for name in parts["valid"] if "y" in corpus.items[name]], info)
    say(
        f"{'SYNTHETIC corpus' if corpus.synthetic else 'PercePiano'}, split {args.split}, fold {args.fold}: "
        f"{len(train)} train, {len(valid)} valid, {len(parts['test'])} test items; {len(info['columns'])} columns"
    )
    return train, valid, info


def augment(item: dict, info: dict, args: argparse.Namespace, key: tuple[int, ...]) -> dict:
    """One training item as this epoch shows it; `key` (seed, epoch, index) makes it the same after a resume."""
    if not args.augment:
        return item
    lowest, highest = data.KEY_SHIFTS
    return data.shift_key(item, info, int(np.random.default_rng(key).integers(lowest, highest + 1)))


def gradient_report(model: HAN) -> dict:
    """Gradient norms by part, before clipping, and what they say of explosion, vanishing and imbalance."""
    squares: dict[str, float] = {}
    for name, p in model.named_parameters():
        part = "context_vectors" if name.endswith("context_vector") else name.split(".")[0]
        squares[part] = squares.get(part, 0.0) + float(p.grad.float().square().sum())
    norms = {part: math.sqrt(square) for part, square in squares.items()}
    encoder = math.sqrt(sum(square for part, square in squares.items() if part != "head"))
    ratio = norms["head"] / max(encoder, 1e-12)
    flags = [f"{part} explodes" for part, norm in norms.items() if not norm <= 100]
    flags += [f"{part} vanishes" for part, norm in norms.items() if norm < 1e-6]
    if not 0.1 <= ratio <= 10:
        flags.append("head and encoder unbalanced")
    return {"gradients": norms, "head_to_encoder": ratio, "flags": flags}


def activation_report(model: HAN, batch: dict) -> dict:
    """What the untrained network makes of its first batch: spread of every stage, of the logits and predictions."""
    training = model.training
    with torch.no_grad():
        stages = model.eval().stages(batch)
    model.train(training)
    p = torch.sigmoid(stages["logits"].float())
    x = batch["x"][batch["mask"]]
    ratio = (p.std() / batch["y"].std()).item()
    return {
        "input_mean": x.mean().item(),
        "input_std": x.std().item(),
        "input_largest": x.abs().max().item(),
        "stage_std": {name: value.float().std().item() for name, value in stages.items()},
        "prediction": [p.mean().item(), p.std().item(), p.min().item(), p.max().item()],
        "std_ratio": ratio,
        "std_ratio_ok": 0.8 <= ratio <= 1.5,
        "flat_dimensions": [label for label, s in zip(data.LABELS, p.std(0), strict=True) if s < 0.05],
        "context_vectors": [name for name, _ in model.named_parameters() if name.endswith("context_vector")],
        "head_sizes": [layer.out_features for layer in model.head if isinstance(layer, torch.nn.Linear)],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main(args: argparse.Namespace) -> dict:
    """Train one fold, or all four; returns the metrics of the best weights on the validation part."""
    # ---- device, process group, seed
    device, rank, world = set_up(args.device, args.seed)
    say = tqdm.write if rank == 0 else lambda line: None
    if args.fold == "all":
        return all_folds(main, args)

    # ---- data
    resumed = load_training(args.resume, ("han",)) if args.resume else None
    train, valid, info = load_data(args, resumed and resumed["data"], rank, world, say)
    lengths = [len(item["x"]) for item in train]
    steps_per_epoch = len(data.length_batches(lengths, args.batch, args.seed, 0, world))
    epochs = args.epochs or (12 if info["synthetic"] else 100)
    planned = epochs * steps_per_epoch
    last = min(planned, args.max_steps or planned, 3 if args.diagnose else planned)
    say(f"{steps_per_epoch} steps an epoch, {planned} planned")

    # ---- model
    bare_model = HAN(
        input_size=len(info["columns"]),
        size=args.size,
        heads=args.heads,
        dropout=args.dropout,
        level=args.level,
        model=args.model,
        head_size=args.head_size,
        stats_size=len(train[0]["stats"]) if args.pooled else 0,
    ).to(device)
    model = DistributedDataParallel(bare_model) if world > 1 else bare_model
    parameters = sum(p.numel() for p in bare_model.parameters())
    say(f"HAN ({args.model}, {args.level}): {parameters:,} parameters on {device}")

    # ---- optimiser
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    optimizer = optimizer_class(bare_model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = {k: v.detach().clone() for k, v in bare_model.state_dict().items()} if args.ema else None

    # ---- resume
    step, in_a_row = 0, 0
    best = {"valid_loss": math.inf, "epoch": 0}
    skipped = {"bad": 0, "overflow": 0}
    if resumed:
        ema = restore(args.resume, resumed, bare_model, optimizer, scaler, rank)
        step, best, skipped = resumed["step"], resumed["best"], resumed["skipped"]
        say(f"resumed {args.resume} at step {step}")
    name = f"{args.preset}_{args.model}_{args.features}_{args.split}_f{args.fold}_s{args.seed}"
    run = Run(from_main(run_folder(args, name), world), args, rank)

    def save(file: str) -> None:
        state = {"ema": ema, "step": step, "epoch": epoch, "best": best, "skipped": skipped, "data": info}
        run.save(file, "han", bare_model, optimizer, scaler, scheduler=None, **state)

    # ---- loop
    bar = tqdm(total=last, initial=step, unit="step", leave=False, disable=None if rank == 0 else True)
    with Interrupt(enabled=world == 1) as stop, bar:
        while step < last and not stop:
            epoch = step // steps_per_epoch
            batches = data.length_batches(lengths, args.batch, args.seed, epoch, world)
            for indices in batches[step % steps_per_epoch :]:
                items = [augment(train[i], info, args, (args.seed, epoch, i)) for i in indices[rank::world]]
                batch = to_device(data.collate_han(items), device)
                if step == 0 and rank == 0:
                    run.log(step, epoch, activations=activation_report(bare_model, batch))

                lr = lr_at(step, args, planned)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device.type, AMP_TYPES.get(args.amp), enabled=args.amp != "off"):
                    logits = model(batch)
                    losses = F.mse_loss(torch.sigmoid(logits.float()), batch["y"], reduction="none").mean(1)
                    loss = losses.mean()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                reporting = args.diagnose or (step + 1) % args.log_every == 0
                report = gradient_report(bare_model) if reporting else {}
                norm = torch.nn.utils.clip_grad_norm_(bare_model.parameters(), args.clip).item()
                finite = math.isfinite(norm)
                if finite:
                    scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                bar.update()

                if finite:
                    in_a_row = 0
                    update_ema(ema, bare_model, min(args.ema, step / (10 + step)))
                else:  # the weights stay; the step counter and the learning rate have gone on
                    names, bad_loss = suspects(batch["names"], losses, world)
                    overflow = scaler.is_enabled() and not bad_loss and scaler.get_scale() > 1
                    kind = "overflow" if overflow else "bad"
                    skipped[kind] += 1
                    in_a_row += not overflow
                    run.log(step, epoch, skip=kind, names=names, skipped=skipped)
                    if in_a_row >= args.max_skips:
                        raise data.DataError(
                            f"step {step}: {in_a_row} non-finite updates in a row, the last with {', '.join(names)}; "
                            "expected finite gradients; look at these items, lower --lr, or use --amp off"
                        )
                if reporting:
                    run.log(step, epoch, loss=loss.item(), lr=lr, norm=norm, skipped=skipped, **report)
                    bar.set_postfix(loss=f"{loss.item():.4f}", norm=f"{norm:.2f}")
                if args.save_every and step % args.save_every == 0:
                    save("last.pt")
                if step == last or stop:
                    break

            if stop and step % steps_per_epoch:
                save("last.pt")
                break
            metrics = None
            if rank == 0:
                with averaged(bare_model, ema):
                    prediction = predict_han(bare_model, valid, device)
                metrics = validation_metrics(np.stack([item["y"] for item in valid]), prediction)
            metrics = from_main(metrics, world) | {"epoch": epoch, "step": step}
            is_best = metrics["valid_loss"] < best["valid_loss"]
            best = metrics if is_best else best
            run.log(loss=loss.item(), lr=lr, norm=norm, skipped=skipped, **metrics)
            say(
                f"epoch {epoch:3d}  step {step:6d}  lr {lr:.2e}  loss {loss.item():.4f}  {summary(metrics)}"
                f"{'  *' if is_best else ''}{'  collapsed?' if metrics['spread'] < 0.1 else ''}"
            )
            if is_best:
                save("best.pt")
            save("last.pt")
            if args.patience and epoch - best["epoch"] >= args.patience:
                break

    if stop:
        say(f"interrupted after step {step}; go on with --resume {run.folder / 'last.pt'}")
        raise KeyboardInterrupt
    if "valid_r2" not in best:
        raise data.DataError(
            f"{run.folder}: no epoch had a finite validation loss; lower --lr, see metrics.jsonl"
        )
    if args.diagnose and rank == 0:
        for line in (run.folder / "metrics.jsonl").read_text().splitlines():
            say(json.dumps(json.loads(line), indent=1))
    say(
        f"best{' (SYNTHETIC)' if info['synthetic'] else ''}: epoch {best['epoch']}, validation {summary(best)}; "
        f"{sum(skipped.values())} updates skipped; {run.seconds():.0f} s; {run.folder / 'best.pt'}"
    )
    return best | {"synthetic": info["synthetic"], "folder": str(run.folder), "skipped": skipped}


def summary(metrics: dict) -> str:
    """The validation metrics in a line."""
    figures = [f"{name} {metrics[f'valid_{name}']:.4f}" for name in METRICS]
    return "  ".join([*figures, f"spread {metrics['spread']:.2f}"])


if __name__ == "__main__":
    data.run_script("train_han.py", lambda: main(parse_args()))
