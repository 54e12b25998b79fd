"""Train the phoneme decoder: 20 ms bins of intracortical activity to phonemes, by GRU and CTC.

Willett et al., "A high-performance speech neuroprosthesis", Nature 620 (2023); Brain-to-Text Benchmark '24
(arXiv 2412.17227).

    python train_decoder.py --lr 0.0012                                    # synthetic corpus, CPU, minutes
    python train_decoder.py --data DIR                                     # the best recipe found here
    python train_decoder.py --data DIR --preset baseline                   # the public baseline's settings
    python train_decoder.py --data DIR --preset baseline --adam-eps 1e-8   # the same with Adam's usual eps
    torchrun --nproc_per_node 2 train_decoder.py --data DIR                # data parallel, one process a GPU
    python train_decoder.py --data DIR --resume runs/decoder/NAME/last.pt  # goes on where it stopped

DIR is the competition's folder, the public baseline's pickle, the '25 HDF5 files or what
`python data.py decoder-convert` made of one of them. Scores and times: results/README.md.
"""

import data  # first: while torch loads, Ctrl-C is one line

# isort: split
import argparse
import copy
import math
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import BELOW_ONE, COUNT, POSITIVE, SHARE, WHOLE
from eval import ctc_greedy, decoder_scores, speech_logits, spell
from models import (
    AMP_TYPES,
    GRUDecoder,
    Interrupt,
    Run,
    averaged,
    data_loader,
    from_main,
    launch,
    load_training,
    main_first,
    on_any,
    output_frames,
    parse_options,
    peak_memory,
    restore,
    run_options,
    same_data,
    set_up,
    suspects,
    update_ema,
    worker_processes,
    working_amp,
)

# Defaults by preset. baseline: the public PyTorch baseline. log: the AdamW re-tune of its change log.
# With eps .1 Adam behaves like momentum SGD: that is why a rate of .02 is stable in the baseline.
# fmt: off
PRESETS = {
    "default": {},
    "baseline": {
        "optimizer": "adam", "adam_eps": 0.1, "lr": 0.02, "lr_schedule": "constant", "warmup": 0,
        "weight_decay": 1e-5, "decay_all": True, "clip": math.inf, "ema": 0.0, "dropout": 0.4,
        "input_dropout": 0.0, "layer_norm": False, "smooth_taps": 20, "white_noise": 0.8, "offset_noise": 0.2,
        "time_mask_prob": 0.0, "amp": "off",
    },
    "log": {
        "optimizer": "adamw", "adam_eps": 1e-8, "lr": 1.5e-3, "lr_schedule": "constant", "warmup": 0,
        "weight_decay": 1e-4, "decay_all": True, "clip": 1.0, "ema": 0.0, "dropout": 0.3,
        "input_dropout": 0.1, "layer_norm": True, "white_noise": 0.2, "offset_noise": 0.2,
        "time_mask_prob": 0.1, "time_mask_width": 15.0, "time_mask_max": 2,
    },
}
# fmt: on
# Defaults without --data, where the preset does not say otherwise: minutes on two cores, not hours on a GPU.
BUILT_IN = {"hidden": 128, "layers": 2, "batch": 16, "warmup": 50, "steps": 400, "eval_every": 50}
NETWORK = (
    "hidden layers kernel stride dropout input_dropout bidirectional layer_norm smooth_width smooth_taps"
).split()

# By group: name; a type, the choices, the name of a value, or bool for a switch; default; help.
OPTIONS = {
    "options": [  # those that matter first
        ("--data", "DIR", None, "speech corpus; absent: built-in, synthetic, a smaller network (off)"),
        ("--preset", PRESETS, "default", "defaults of all options below (%(default)s)"),
        ("--lr", POSITIVE, 1.2e-3, "peak learning rate (%(default)s)"),
        ("--batch", WHOLE, 64, "trials a step and process (%(default)s)"),
        ("--steps", WHOLE, 10_000, "updates planned (%(default)s)"),
    ],
    "data": [
        ("--valid", ["blocks", "test"], "blocks", "validates: blocks of train, or test (%(default)s)"),
        ("--white-noise", POSITIVE, 0.8, "SD a bin and channel, 0: off (%(default)s)"),
        ("--offset-noise", POSITIVE, 0.2, "SD a trial and channel, 0: off (%(default)s)"),
        ("--time-mask-prob", SHARE, 1.0, "of each span of zeros, 0: off (%(default)s)"),
        ("--time-mask-width", POSITIVE, 0.075, "bins; under 1: share of the trial (%(default)s)"),
        ("--time-mask-max", COUNT, 20, "spans a trial, 0: off (%(default)s)"),
        ("--workers", COUNT, 4, "processes that read trials, 0: none (%(default)s)"),
        ("--cache", "DIR", "cache", "folder of converted corpora (%(default)s)"),
        ("--strict", bool, False, "stop at the first unreadable trial instead of leaving it out (off)"),
    ],
    "model": [
        ("--hidden", WHOLE, 1024, "width of each GRU direction (%(default)s)"),
        ("--layers", WHOLE, 5, "GRU layers (%(default)s)"),
        ("--bidirectional", bool, False, "read trials backwards as well (off)"),
        ("--dropout", BELOW_ONE, 0.4, "between GRU layers, 0: off (%(default)s)"),
        ("--input-dropout", BELOW_ONE, 0.1, "after the day layer, 0: off (%(default)s)"),
        ("--layer-norm", bool, True, "LayerNorm before the last layer (on)"),
        ("--kernel", WHOLE, 32, "bins of a window (%(default)s)"),
        ("--stride", WHOLE, 4, "bins from window to window (%(default)s)"),
        ("--smooth-width", POSITIVE, 2.0, "SD of the smoothing, bins, 0: off (%(default)s)"),
        ("--smooth-taps", WHOLE, 21, "bins; even: shifts by half a bin (%(default)s)"),
    ],
    "optimiser": [
        ("--optimizer", ["adam", "adamw", "sgd"], "adamw", "adam, sgd: coupled decay (%(default)s)"),
        ("--adam-eps", POSITIVE, 1e-8, "beside the root of the second moment (%(default)s)"),
        ("--momentum", SHARE, 0.9, "sgd: Nesterov momentum, 0: off (%(default)s)"),
        ("--weight-decay", POSITIVE, 1e-4, "of weight matrices, 0: off (%(default)s)"),
        ("--decay-all", bool, False, "of biases, norms and day layers too (off)"),
        ("--clip", POSITIVE, 1.0, "largest gradient norm, inf: off (%(default)s)"),
        ("--ema", BELOW_ONE, 0.9995, "decay of averaged weights, 0: off (%(default)s)"),
    ],
    "schedule": [
        ("--lr-schedule", ["constant", "linear", "cosine", "step"], "cosine", "after warm-up (%(default)s)"),
        ("--lr-end", POSITIVE, 1e-5, "linear, cosine: last rate (%(default)s)"),
        ("--warmup", COUNT, 500, "steps of linear warm-up, 0: off (%(default)s)"),
        ("--step-size", WHOLE, 3000, "step: steps between reductions (%(default)s)"),
        ("--gamma", SHARE, 0.5, "step: factor of a reduction (%(default)s)"),
        ("--reduce-on-nan", data.number(float, 0.01, 1), 1.0, "of the rate, 1: off"),
        ("--max-steps", WHOLE, None, "stop after so many steps (off)"),
        ("--eval-every", WHOLE, 500, "steps between evaluations (%(default)s)"),
    ],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python %(prog)s [--data DIR] [options]",
        description=f"{__doc__}\nIn brackets: defaults, as the other options given make them.",
    )
    data.add_options(p, OPTIONS)
    run_options(p, out="runs/decoder")

    def preset(known: argparse.Namespace) -> dict:
        return ({} if known.data else BUILT_IN) | PRESETS[known.preset]

    return parse_options(p, argv, ("decoder",), preset)


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


def augment(batch: dict, args: argparse.Namespace) -> dict:
    """The batch as this step shows it; noise and masks from torch's generator, which a resume restores."""
    x = data.add_noise(batch["x"], batch["lengths"], args.white_noise, args.offset_noise)
    spans = args.time_mask_prob, args.time_mask_width, args.time_mask_max
    return batch | {"x": data.time_mask(x, batch["lengths"], *spans)}


def fitting(corpus: data.SpeechCorpus, trials: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """(n,) bool: True where the frames of a trial can spell its labels; CTC has no finite loss elsewhere."""
    needed = np.array([max(1, data.frames_needed(corpus.labels[i])) for i in trials])
    return output_frames(corpus.lengths[trials], args.kernel, args.stride) >= needed


def ctc_losses(log_probs: torch.Tensor, frames, labels, label_lengths) -> torch.Tensor:
    """Loss of each trial over its number of labels, (B,), of log_probs (B, F, 41); mean: torch's "mean"."""
    losses = F.ctc_loss(log_probs.transpose(0, 1), labels, frames, label_lengths, reduction="none")
    return losses / label_lengths.clamp(min=1).to(log_probs.device)


LOSS = ctc_losses  # what is minimised; named in the log


def blank_fraction(logits: torch.Tensor, frames: torch.Tensor) -> float:
    """Share of the frames whose best class is the blank."""
    best = logits.argmax(2).cpu()
    inside = torch.arange(best.shape[1]) < frames.cpu()[:, None]
    return (best[inside] == 0).float().mean().item()


def one_layer(model: GRUDecoder, device: torch.device) -> tuple[torch.nn.Module, tuple]:
    """A GRU layer of the model's sizes, and an input, to try a precision with."""
    inputs, hidden = model.gru_decoder.input_size, model.gru_decoder.hidden_size
    return torch.nn.GRU(inputs, min(hidden, 256)).to(device), (torch.randn(32, 16, inputs, device=device),)


def parameter_groups(model: GRUDecoder, args: argparse.Namespace) -> list[dict]:
    """Weight matrices decay; biases, norms, day layers (whose start is the identity) only by --decay-all."""
    groups = {args.weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        decays = args.decay_all or (parameter.ndim > 1 and not name.startswith("day"))
        groups[args.weight_decay if decays else 0.0].append(parameter)
    return [{"params": found, "weight_decay": decay} for decay, found in groups.items() if found]


def validate(model: GRUDecoder, corpus: data.SpeechCorpus, trials: np.ndarray, days, batch: int) -> dict:
    """Metrics of the present weights; days: the model's index of each day of the corpus. Trials too short for
    their labels count in every error rate, not in the loss."""
    device = next(model.parameters()).device
    log_probs = [torch.as_tensor(row) for row in speech_logits(model, corpus, trials, days, device, batch)]
    references = [corpus.labels[i].tolist() for i in trials]
    decoded = [ctc_greedy(row[None], [len(row)])[0] for row in log_probs]
    losses = []
    for row, labels in zip(log_probs, references, strict=True):
        counts = torch.tensor([len(row)]), torch.tensor([labels]), torch.tensor([len(labels)])
        if len(row) >= max(1, data.frames_needed(labels)):
            losses.append(float(ctc_losses(row[None], *counts)))
    scores = decoder_scores(references, decoded, corpus.day[trials], corpus.days)
    metrics = {f"valid_{name}": value for name, value in scores.items()}
    metrics["valid_loss"] = float(np.mean(losses)) if losses else math.nan
    metrics["valid_blank_fraction"] = float((torch.cat(log_probs).argmax(1) == 0).float().mean())
    shown = np.linspace(0, len(trials) - 1, min(3, len(trials))).astype(int)
    metrics["samples"] = [
        {"id": corpus.ids[trials[k]], "reference": spell(references[k]), "hypothesis": spell(decoded[k])}
        for k in shown
    ]
    return metrics


def evaluate(model: GRUDecoder, ema: dict | None, *about) -> dict:
    """`validate` of the weights that will be used, averaged where there are such; `_raw`: the model's own."""
    own = validate(model, *about)
    with averaged(model, ema):
        metrics = validate(model, *about) if ema else own
    return metrics | {"valid_per_raw": own["valid_per"], "valid_loss_raw": own["valid_loss"]}


def load_data(args: argparse.Namespace, rank: int, world: int, say: Callable) -> tuple:
    """The corpus, the trials that train and validate, and what inference needs to know of the data."""
    if not args.data:
        say("no --data: built-in SYNTHETIC corpus; the real one: doi 10.5061/dryad.x69p8czpq")
    with main_first(rank, world):
        root = args.data or data.synthetic_speech(args.cache)
        corpus = data.open_speech(root, args.cache, args.strict, quiet=rank > 0)
    for line in corpus.left_out:
        say(f"left out: {data.printable(line)}")
    parts = data.speech_parts(corpus, args.valid)
    days = np.unique(corpus.day[parts["train"]])  # no others: their day layers would stay the identity
    kept = {}
    for part in ("train", "valid"):
        fits = fitting(corpus, parts[part], args)
        kept[part] = parts[part][fits]
        short = [corpus.ids[i] for i in parts[part][~fits]]
        say(f"{part}: {len(fits)} trials, {len(short)} too short for their labels: no loss {short[:10]}")
    if not len(kept["train"]):
        raise data.DataError(f"{corpus.root}: no trial fits --stride {args.stride}, --kernel {args.kernel}")
    info = {
        "days": [corpus.days[day] for day in days],
        "channels": corpus.channels,
        "phonemes": list(data.PHONEMES),
        "rules": data.speech_rules(),
        "valid": args.valid,
        "synthetic": corpus.synthetic,
    }
    say(
        f"{'SYNTHETIC corpus' if corpus.synthetic else corpus.root}, {len(days)} of {len(corpus.days)} days "
        f"train; {'validation IS the test part: its score is no result' if args.valid == 'test' else ''}"
    )
    return corpus, kept["train"], parts["valid"], info


def main(args: argparse.Namespace) -> dict:
    """Train one decoder; returns the metrics of the best weights on the validation part."""
    # ---- device, process group, seed
    device, rank, world = set_up(args.device, args.seed)
    say = tqdm.write if rank == 0 else lambda line: None

    # ---- data
    resumed = load_training(args.resume, ("decoder",)) if args.resume else None
    corpus, train, valid, info = load_data(args, rank, world, say)
    if resumed:
        same_data(args.resume, resumed["data"], info)
    days = data.map_days(corpus.days, info["days"], "mean")
    lengths = corpus.lengths[train].tolist()
    batches: list[list[int]] = []  # of the epoch
    trials = data.SpeechTrials(corpus, train, days)
    loader = data_loader(trials, batches, data.collate_speech, args.workers, device)
    steps_per_epoch = len(data.length_batches(lengths, args.batch, args.seed, 0, world))
    planned = args.steps
    last = min(planned, args.max_steps or planned)

    # ---- model
    sizes = {name: getattr(args, name) for name in NETWORK}
    sizes |= {"channels": corpus.channels, "days": len(info["days"]), "classes": len(data.PHONEMES)}
    bare_model = GRUDecoder(**sizes).to(device)
    model = DistributedDataParallel(bare_model) if world > 1 else bare_model
    args.amp = from_main(working_amp(args.amp, device, lambda: one_layer(bare_model, device)), world)
    parameters = sum(p.numel() for p in bare_model.parameters())
    args.loss, args.synthetic = LOSS.__name__, corpus.synthetic
    say(f"GRU decoder: {parameters:,} parameters on {device}, amp {args.amp}; {planned} steps planned")

    # ---- optimiser
    groups = parameter_groups(bare_model, args)
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, nesterov=args.momentum > 0)
    else:
        optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
        optimizer = optimizer_class(groups, lr=args.lr, eps=args.adam_eps)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = copy.deepcopy(bare_model.state_dict()) if args.ema else None

    # ---- resume
    step, in_a_row = 0, 0
    rate = 1.0
    best = {"valid_per": math.inf, "step": 0}
    skipped = {"bad": 0, "overflow": 0}
    if resumed:
        ema = restore(args.resume, resumed, bare_model, optimizer, scaler, rank)
        step, best, skipped = resumed["step"], resumed["best"], resumed["skipped"]
        rate = resumed["scheduler"]["rate"]
        say(f"resumed {args.resume} at step {step}")
    name = f"{args.preset}_h{args.hidden}_s{args.seed}"
    began = step
    run = Run(args, name, rank, world, resumed)

    def save(file: str) -> None:
        state = {"ema": ema, "step": step, "epoch": epoch, "best": best, "skipped": skipped, "data": info}
        run.save(file, "decoder", bare_model, optimizer, scaler, scheduler={"rate": rate}, **state)

    # ---- loop
    stopped = False
    recent: deque[torch.Tensor] = deque(maxlen=200)  # losses, read when they are logged: a GPU need not wait
    bar = tqdm(total=last, initial=step, unit="step", leave=False, disable=rank > 0 or None)
    with run, Interrupt() as stop, bar, worker_processes(loader):
        while step < last and not stopped:
            epoch = step // steps_per_epoch
            whole = data.length_batches(lengths, args.batch, args.seed, epoch, world)
            batches[:] = [indices[rank::world] for indices in whole[step % steps_per_epoch :]]
            for batch in loader:
                moved = {key: batch[key].to(device, non_blocking=True) for key in ("x", "labels")}
                batch = augment(batch | moved, args)  # the model wants lengths on the CPU

                lr = lr_at(step, args, planned) * rate
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device.type, AMP_TYPES.get(args.amp), enabled=args.amp != "off"):
                    logits, frames = model(batch["x"], batch["lengths"], batch["day"])
                    log_probs = logits.float().log_softmax(-1)
                    losses = LOSS(log_probs, frames, batch["labels"], batch["label_lengths"])
                    loss = losses.mean()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(bare_model.parameters(), args.clip).item()
                finite = math.isfinite(norm)
                if finite:
                    scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                step += 1
                bar.update()
                stopped = on_any(bool(stop), world)

                if finite:
                    in_a_row = 0
                    recent.append(loss.detach())
                    update_ema(ema, bare_model, min(args.ema, step / (10 + step)))
                else:  # the weights stay; the step counter and the learning rate have gone on
                    names, bad_loss = suspects(batch["ids"], losses, world)
                    overflow = scaler.is_enabled() and not bad_loss and scaler.get_scale() > 1
                    kind = "overflow" if overflow else "bad"
                    skipped[kind] += 1
                    in_a_row += not overflow
                    rate *= 1 if overflow else args.reduce_on_nan
                    run.log(step, epoch, skip=kind, names=names, skipped=skipped, rate=rate)
                    if in_a_row >= args.max_skips:
                        raise data.DataError(
                            f"step {step}: {in_a_row} non-finite updates in a row, the last with "
                            f"{', '.join(names)}; look at these items, lower --lr, or use --amp off"
                        )
                if step % args.log_every == 0:
                    report = {"blank_fraction": blank_fraction(logits, frames), "memory": peak_memory(device)}
                    report["loss_of_200"] = float(np.mean([x.item() for x in recent])) if recent else math.nan
                    run.log(step, epoch, loss=loss.item(), lr=lr, norm=norm, skipped=skipped, **report)
                    bar.set_postfix(loss=f"{loss.item():.4f}", norm=f"{norm:.2f}")
                if step % args.eval_every == 0 or step == last:
                    metrics = None
                    if rank == 0:
                        metrics = evaluate(bare_model, ema, corpus, valid, days, args.batch)
                    metrics = from_main(metrics, world) | {"epoch": epoch, "step": step}
                    is_best = metrics["valid_per"] < best["valid_per"]
                    best = metrics if is_best else best
                    run.log(loss=loss.item(), lr=lr, norm=norm, skipped=skipped, **metrics)
                    say(
                        f"step {step:6d}  lr {lr:.2e}  {args.loss} {loss.item():.4f}  "
                        f"valid {summary(metrics)}  {run.left(step - began, last - step)}"
                        f"{data.mark(summary(metrics), is_best)}"
                    )
                    if is_best:
                        save("best.pt")
                    save("last.pt")
                elif stopped or (args.save_every and step % args.save_every == 0):
                    save("last.pt")
                if step == last or stopped:
                    break

    if stopped:
        say(
            f"interrupted after step {step}; go on: python train_decoder.py --resume {run.folder / 'last.pt'}"
        )
        raise KeyboardInterrupt
    if "valid_loss" not in best:
        raise data.DataError(f"{run.folder}: no evaluation had an error rate; validation trials need labels")
    for sample in best["samples"]:
        say(f"{sample['id']}\n  reference  {sample['reference']}\n  decoded    {sample['hypothesis']}")
    say(
        f"best{' (SYNTHETIC)' if corpus.synthetic else ''}: step {best['step']}, validation {summary(best)}; "
        f"{sum(skipped.values())} updates skipped; {run.seconds():.0f} s; {run.folder / 'best.pt'}"
    )
    return best | {"synthetic": corpus.synthetic, "folder": str(run.folder), "skipped": skipped}


def summary(metrics: dict) -> str:
    """The validation metrics in a line."""
    return (
        f"loss {data.shown(metrics['valid_loss'])}  PER {metrics['valid_per']:.4f} (without SIL "
        f"{metrics['valid_per_without_sil']:.4f}, raw weights {metrics['valid_per_raw']:.4f})  "
        f"blank in {metrics['valid_blank_fraction']:.0%} of frames"
    )


if __name__ == "__main__":
    data.run_script("train_decoder.py", lambda: launch(main, parse_args()))
