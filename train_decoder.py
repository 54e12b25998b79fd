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

import argparse
import math
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from eval import ctc_greedy, decoder_scores, speech_logits, spell
from models import (
    AMP_TYPES,
    FREE_ON_RESUME,
    GRUDecoder,
    Interrupt,
    Run,
    averaged,
    data_loader,
    from_main,
    load_training,
    main_first,
    output_frames,
    parse_options,
    peak_memory,
    restore,
    run_folder,
    run_options,
    same_data,
    set_up,
    suspects,
    update_ema,
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
)
SAMPLES = 3  # transcripts logged by each evaluation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python %(prog)s [--data DIR] [options]",
        description=f"{__doc__}\nIn brackets: defaults, as the other options given make them.",
    )
    whole, count = data.number(int, 1), data.number(int, 0)
    positive, share = data.number(float, 0), data.number(float, 0, 1)
    below_one, switch = data.number(float, 0, 0.99999), argparse.BooleanOptionalAction
    p.add_argument("--preset", choices=PRESETS, default="default", help="defaults of all below (%(default)s)")
    g = p.add_argument_group("data")
    g.add_argument(
        "--data", metavar="DIR", help="speech corpus (absent: built-in, synthetic; a smaller network)"
    )
    g.add_argument(
        "--valid", choices=["blocks", "test"], default="blocks", help="blocks of train, or test (blocks)"
    )
    g.add_argument(
        "--white-noise", type=positive, default=0.8, help="SD a bin and channel (%(default)s; 0: off)"
    )
    g.add_argument(
        "--offset-noise", type=positive, default=0.2, help="SD a trial and channel (%(default)s; 0: off)"
    )
    g.add_argument(
        "--time-mask-prob", type=share, default=1.0, help="of each span of zeros (%(default)s; 0: off)"
    )
    g.add_argument(
        "--time-mask-width", type=positive, default=0.075, help="bins; under 1: share (%(default)s)"
    )
    g.add_argument("--time-mask-max", type=count, default=20, help="spans a trial (%(default)s; 0: off)")
    g.add_argument(
        "--workers", type=count, default=4, help="processes that read trials (%(default)s; 0: none)"
    )
    g.add_argument("--cache", metavar="DIR", default="cache", help="converted corpora (%(default)s)")
    g.add_argument(
        "--strict", action="store_true", help="stop at the first unreadable trial (off: leave it out)"
    )
    g = p.add_argument_group("model")
    g.add_argument("--hidden", type=whole, default=1024, help="width of each GRU direction (%(default)s)")
    g.add_argument("--layers", type=whole, default=5, help="GRU layers (%(default)s)")
    g.add_argument(
        "--bidirectional", action=switch, default=False, help="read trials backwards as well (off)"
    )
    g.add_argument("--dropout", type=below_one, default=0.4, help="between GRU layers (%(default)s; 0: off)")
    g.add_argument(
        "--input-dropout", type=below_one, default=0.1, help="after the day layer (%(default)s; 0: off)"
    )
    g.add_argument("--layer-norm", action=switch, default=True, help="LayerNorm before the last layer (on)")
    g.add_argument("--kernel", type=whole, default=32, help="bins of a window (%(default)s)")
    g.add_argument("--stride", type=whole, default=4, help="bins from window to window (%(default)s)")
    g.add_argument(
        "--smooth-width", type=positive, default=2.0, help="SD of smoothing, bins (%(default)s; 0: off)"
    )
    g.add_argument(
        "--smooth-taps", type=whole, default=21, help="bins; even: shifts by half a bin (%(default)s)"
    )
    g = p.add_argument_group("optimiser")
    kinds = ["adam", "adamw", "sgd"]
    g.add_argument(
        "--optimizer", choices=kinds, default="adamw", help="adam, sgd: coupled decay (%(default)s)"
    )
    g.add_argument("--lr", type=positive, default=1.2e-3, help="peak learning rate (%(default)s)")
    g.add_argument(
        "--adam-eps", type=positive, default=1e-8, help="beside the second moment's root (%(default)s)"
    )
    g.add_argument("--momentum", type=share, default=0.9, help="sgd: Nesterov momentum (%(default)s; 0: off)")
    g.add_argument(
        "--weight-decay", type=positive, default=1e-4, help="of weight matrices (%(default)s; 0: off)"
    )
    g.add_argument("--decay-all", action=switch, default=False, help="of biases, norms, day layers too (off)")
    g.add_argument("--batch", type=whole, default=64, help="trials a step and process (%(default)s)")
    g.add_argument("--clip", type=positive, default=1.0, help="largest gradient norm (%(default)s; inf: off)")
    g.add_argument(
        "--ema", type=below_one, default=0.9995, help="decay of averaged weights (%(default)s; 0: off)"
    )
    g = p.add_argument_group("schedule")
    courses = ["constant", "linear", "cosine", "step"]
    g.add_argument("--lr-schedule", choices=courses, default="cosine", help="after the warm-up (%(default)s)")
    g.add_argument("--lr-end", type=positive, default=1e-5, help="linear, cosine: last rate (%(default)s)")
    g.add_argument("--warmup", type=count, default=500, help="steps of linear warm-up (%(default)s; 0: off)")
    g.add_argument(
        "--step-size", type=whole, default=3000, help="step: steps between reductions (%(default)s)"
    )
    g.add_argument("--gamma", type=share, default=0.5, help="step: factor of a reduction (%(default)s)")
    factor = data.number(float, 0.01, 1)
    g.add_argument(
        "--reduce-on-nan", type=factor, default=1.0, help="of the rate, from each bad update on (1: off)"
    )
    g.add_argument("--steps", type=whole, default=10_000, help="updates planned (%(default)s)")
    g.add_argument("--max-steps", type=whole, help="stop after so many steps (off)")
    g = run_options(p, out="runs/decoder")
    g.add_argument("--eval-every", type=whole, default=500, help="steps between evaluations (%(default)s)")

    def preset(known: argparse.Namespace) -> dict:
        return ({} if known.data else BUILT_IN) | PRESETS[known.preset]

    return parse_options(p, argv, ("decoder",), preset, free=FREE_ON_RESUME | {"eval_every"})


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
    frames = output_frames(corpus.lengths[trials], args.kernel, args.stride)
    needed = [max(1, data.frames_needed(corpus.labels[i])) for i in trials]
    return frames >= np.array(needed, np.int64)


def ctc_losses(log_probs: torch.Tensor, frames, labels, label_lengths) -> torch.Tensor:
    """Loss of each trial over its number of labels, (B,), of log_probs (B, F, 41); mean: torch's "mean"."""
    losses = F.ctc_loss(log_probs.transpose(0, 1), labels, frames, label_lengths, reduction="none")
    return losses / label_lengths.clamp(min=1).to(log_probs.device)


def blank_fraction(logits: torch.Tensor, frames: torch.Tensor) -> float:
    """Share of the frames whose best class is the blank."""
    best = logits.detach().argmax(2).cpu()
    inside = torch.arange(best.shape[1]) < frames.cpu()[:, None]
    return float((best[inside] == 0).float().mean())


def one_layer(model: GRUDecoder, device: torch.device) -> tuple[torch.nn.Module, tuple]:
    """A GRU layer of the model's sizes, and an input, to try a precision with."""
    inputs = model.model_args["channels"] * model.model_args["kernel"]
    gru = torch.nn.GRU(inputs, min(model.model_args["hidden"], 256)).to(device)
    return gru, (torch.randn(32, 16, inputs, device=device),)


def parameter_groups(model: GRUDecoder, args: argparse.Namespace) -> list[dict]:
    """Weight matrices decay; biases, norms, day layers (whose start is the identity) only by --decay-all."""
    decaying, others = [], []
    for name, parameter in model.named_parameters():
        if args.decay_all or (parameter.ndim > 1 and not name.startswith("day")):
            decaying.append(parameter)
        else:
            others.append(parameter)
    groups = [
        {"params": decaying, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def validate(model: GRUDecoder, corpus: data.SpeechCorpus, trials: np.ndarray, days, batch: int) -> dict:
    """Metrics of the present weights; days: the model's index of each day of the corpus. Trials too short for
    their labels count in every error rate, not in the loss."""
    device = next(model.parameters()).device
    log_probs = [torch.as_tensor(row) for row in speech_logits(model, corpus, trials, days, device, batch)]
    references = [corpus.labels[i].tolist() for i in trials]
    decoded = [ctc_greedy(row[None], [len(row)])[0] for row in log_probs]
    losses = []
    for row, labels in zip(log_probs, references, strict=True):
        if len(row) >= max(1, data.frames_needed(labels)):
            frames, label_length = torch.tensor([len(row)]), torch.tensor([len(labels)])
            losses.append(float(ctc_losses(row[None], frames, torch.tensor([labels]), label_length)))
    scores = decoder_scores(references, decoded, corpus.day[trials], corpus.days)
    metrics = {f"valid_{name}": value for name, value in scores.items()}
    metrics["valid_loss"] = float(np.mean(losses)) if losses else math.nan
    metrics["valid_blank_fraction"] = float((torch.cat(log_probs).argmax(1) == 0).float().mean())
    metrics["samples"] = []
    for k in np.linspace(0, len(trials) - 1, min(SAMPLES, len(trials))).astype(int):
        texts = {"reference": spell(references[k]), "hypothesis": spell(decoded[k])}
        metrics["samples"].append({"id": corpus.ids[trials[k]], **texts})
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
        say("no --data: built-in SYNTHETIC corpus; the real one: doi 10.5061/dryad.x69p8czpq, --data DIR")
    with main_first(rank, world):
        root = args.data or data.synthetic_speech(args.cache)
        corpus = data.open_speech(root, args.cache, args.strict, quiet=rank > 0)
    for line in corpus.left_out:
        say(f"left out: {line}")
    parts = data.speech_parts(corpus, args.valid)
    trained = np.unique(corpus.day[parts["train"]])  # no others: their day layers would stay the identity
    fits = {part: fitting(corpus, parts[part], args) for part in ("train", "valid")}
    for part, fit in fits.items():
        short = [corpus.ids[i] for i in parts[part][~fit]]
        some = ", ".join(short[:10])
        say(
            f"{part}: {len(fit)} trials, {len(short)} too short for their labels, left out of the loss {some}"
        )
    train = parts["train"][fits["train"]]
    if not len(train):
        raise data.DataError(
            f"{corpus.root}: no trial to train on at --stride {args.stride}, --kernel {args.kernel}"
        )
    info = {
        "days": [corpus.days[day] for day in trained],
        "channels": corpus.channels,
        "phonemes": list(data.PHONEMES),
        "rules": data.speech_rules(),
        "valid": args.valid,
        "synthetic": corpus.synthetic,
    }
    say(
        f"{'SYNTHETIC corpus' if corpus.synthetic else corpus.root}, {len(trained)} of {len(corpus.days)} "
        f"days to train on: {len(train)} train, {len(parts['valid'])} valid, {len(parts['test'])} test trials"
    )
    if args.valid == "test":
        say("validation IS the test part: its score is no result")
    return corpus, train, parts["valid"], info


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
    say(f"{steps_per_epoch} steps an epoch, {planned} planned")

    # ---- model
    sizes = {name: getattr(args, name) for name in NETWORK.split()}
    sizes |= {"channels": corpus.channels, "days": len(info["days"]), "classes": len(data.PHONEMES)}
    bare_model = GRUDecoder(**sizes).to(device)
    model = DistributedDataParallel(bare_model) if world > 1 else bare_model
    args.amp = from_main(working_amp(args.amp, device, lambda: one_layer(bare_model, device)), world)
    parameters = sum(p.numel() for p in bare_model.parameters())
    say(f"GRU decoder: {parameters:,} parameters on {device}, amp {args.amp}")

    # ---- optimiser
    groups = parameter_groups(bare_model, args)
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, nesterov=args.momentum > 0)
    else:
        optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
        optimizer = optimizer_class(groups, lr=args.lr, eps=args.adam_eps)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = {k: v.detach().clone() for k, v in bare_model.state_dict().items()} if args.ema else None

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
    run = Run(from_main(run_folder(args, name), world), args, rank)

    def save(file: str) -> None:
        state = {"ema": ema, "step": step, "epoch": epoch, "best": best, "skipped": skipped, "data": info}
        run.save(file, "decoder", bare_model, optimizer, scaler, scheduler={"rate": rate}, **state)

    # ---- loop
    recent: deque[torch.Tensor] = deque(maxlen=200)  # losses, read when they are logged: a GPU need not wait
    bar = tqdm(total=last, initial=step, unit="step", leave=False, disable=None if rank == 0 else True)
    with Interrupt(enabled=world == 1) as stop, bar:
        while step < last and not stop:
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
                    losses = ctc_losses(log_probs, frames, batch["labels"], batch["label_lengths"])
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
                bar.update()

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
                        f"epoch {epoch:3d}  step {step:6d}  lr {lr:.2e}  loss {loss.item():.4f}  valid "
                        f"{summary(metrics)}{'  *' if is_best else ''}"
                    )
                    if is_best:
                        save("best.pt")
                    save("last.pt")
                elif stop or (args.save_every and step % args.save_every == 0):
                    save("last.pt")
                if step == last or stop:
                    break

    if stop:
        say(f"interrupted after step {step}; go on with --resume {run.folder / 'last.pt'}")
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
        f"loss {metrics['valid_loss']:.4f}  PER {metrics['valid_per']:.4f} (without SIL "
        f"{metrics['valid_per_without_sil']:.4f}, raw weights {metrics['valid_per_raw']:.4f})  "
        f"blank {metrics['valid_blank_fraction']:.2f}"
    )


if __name__ == "__main__":
    data.run_script("train_decoder.py", lambda: main(parse_args()))
