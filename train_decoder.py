"""Train the phoneme decoder: 20 ms bins of intracortical activity to phonemes, by GRU and CTC.

Willett et al., "A high-performance speech neuroprosthesis", Nature 620 (2023); Brain-to-Text Benchmark '24
(arXiv 2412.17227).

    python train_decoder.py --lr 0.0012                                    # synthetic corpus, CPU, minutes
    python train_decoder.py --data DIR                                     # the best recipe found here
    python train_decoder.py --data DIR --preset baseline                   # the '24 baseline; baseline25: '25
    python train_decoder.py --data NEW --init best.pt --new-day            # a few trials of a new session
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
from functools import partial

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import BELOW_ONE, COUNT, POSITIVE, SHARE, WHOLE, Interrupt
from eval import WordSearch, ctc_losses, load_corpus, validate_decoder, word_model
from models import (
    AMP_TYPES,
    OPTIMIZERS,
    GRUDecoder,
    Run,
    averaged,
    data_loader,
    decoder_info,
    from_main,
    launch,
    load_decoder,
    load_training,
    main_first,
    main_process,
    on_any,
    option_parser,
    output_frames,
    parse_options,
    peak_memory,
    restore,
    run_options,
    same_data,
    say,
    scales_loss,
    set_up,
    suspects,
    update_ema,
    worker_processes,
    working_amp,
)

# Defaults by preset. baseline, baseline25: the public baselines of '24 and '25. log: the AdamW re-tune of the
# first one's change log. With eps .1 Adam behaves like momentum SGD: hence a stable rate of .02.
# fmt: off
PRESETS = {
    "default": {},
    "baseline": {
        "optimizer": "adam", "adam_eps": 0.1, "lr": 0.02, "lr_schedule": "constant", "warmup": 0,
        "weight_decay": 1e-5, "decay_all": True, "clip": math.inf, "ema": 0.0, "dropout": 0.4,
        "input_dropout": 0.0, "layer_norm": False, "smooth_taps": 20, "white_noise": 0.8, "offset_noise": 0.2,
        "time_mask_prob": 0.0, "amp": "off", "bidirectional": True, "whole_start": True, "short_frames": True,
    },
    "baseline25": {
        "optimizer": "adamw", "adam_eps": 0.1, "lr": 5e-3, "lr_end": 1e-4, "warmup": 1000, "steps": 120_000,
        "eval_every": 2000, "weight_decay": 1e-3, "still_days": True, "clip": 10.0, "ema": 0.0,
        "hidden": 768, "kernel": 14, "dropout": 0.4, "input_dropout": 0.2, "layer_norm": False,
        "smooth_taps": 9, "h0": True, "whole_start": True, "white_noise": 1.0, "offset_noise": 0.2,
        "random_cut": 2, "time_mask_prob": 0.0, "days_per_batch": 4, "ctc_reduction": "sum",
    },
    "log": {
        "optimizer": "adamw", "adam_eps": 1e-8, "lr": 1.5e-3, "lr_schedule": "constant", "warmup": 0,
        "weight_decay": 1e-4, "decay_all": True, "clip": 1.0, "ema": 0.0, "dropout": 0.3,
        "input_dropout": 0.1, "layer_norm": True, "white_noise": 0.2, "offset_noise": 0.2,
        "time_mask_prob": 0.1, "time_mask_width": 15.0, "time_mask_max": 2,
    },
}
# fmt: on
# Defaults without --data, whatever the preset: minutes on two cores, not hours on a GPU.
BUILT_IN = {"hidden": 128, "layers": 2, "batch": 16, "steps": 200, "eval_every": 50}
# Of --new-day. 20 trials of a day far off, synthetic: validation PER .603 before, .319 after 60 steps (128
# wide, 2 layers); .390 with the mask and noise of `default`.
NEW_DAY = {"lr": 3e-3, "warmup": 0, "batch": 16, "steps": 100, "eval_every": 20, "ema": 0.0}
NEW_DAY |= {"time_mask_prob": 0.0, "white_noise": 0.4}
LOSS = ctc_losses  # of each trial; named in the log
NETWORK = (
    "hidden layers kernel stride dropout input_dropout bidirectional layer_norm smooth_width smooth_taps h0 "
    "whole_start aux_layer"
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
        ("--valid", ["blocks", "test"], "blocks", "blocks of train, or '25: its part; or test (%(default)s)"),
        ("--init", "FILE", None, "start from this checkpoint, or a public baseline's file (off)"),
        ("--new-day", bool, False, "--init: train the day layers of unknown sessions alone (off)"),
        ("--days-per-batch", COUNT, 0, "days drawn for a batch, 0: batches by length (%(default)s)"),
        ("--white-noise", POSITIVE, 0.8, "SD a bin and channel, 0: off (%(default)s)"),
        ("--offset-noise", POSITIVE, 0.2, "SD a trial and channel, 0: off (%(default)s)"),
        ("--random-walk", POSITIVE, 0.0, "SD of a bin's step of a channel, 0: off (%(default)s)"),
        ("--static-gain", POSITIVE, 0.0, "SD of a channel's gain in a trial, 0: off (%(default)s)"),
        ("--random-cut", COUNT, 0, "first bins cut from a batch, at most, 0: off (%(default)s)"),
        ("--channel-mask", SHARE, 0.0, "of electrodes hidden in a trial, 0: off (%(default)s)"),
        ("--feature-mask", SHARE, 0.0, "of features hidden in a trial, 0: off (%(default)s)"),
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
        ("--h0", bool, False, "learn the first state (off)"),
        ("--whole-start", bool, False, "recurrent start orthogonal over all gates at once (off)"),
        ("--aux-layer", COUNT, 0, "a second CTC head after this layer, 0: off (%(default)s)"),
        ("--aux-weight", POSITIVE, 0.3, "of its loss (%(default)s)"),
    ],
    "optimiser": [
        ("--optimizer", OPTIMIZERS, "adamw", "adam: coupled decay (%(default)s)"),
        ("--adam-eps", POSITIVE, 1e-8, "beside the root of the second moment (%(default)s)"),
        ("--weight-decay", POSITIVE, 1e-4, "of weight matrices, 0: off (%(default)s)"),
        ("--decay-all", bool, False, "of biases, norms and day layers too (off)"),
        ("--still-days", bool, False, "absent from a batch a day keeps its layer and moments (off)"),
        ("--ctc-reduction", ["mean", "sum"], "mean", "of a trial's loss over its labels (%(default)s)"),
        ("--short-frames", bool, False, "the loss counts a frame less, as '24's (off)"),
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
        ("--select", ["per", "loss", "wer"], "per", "best.pt has the lowest in validation (%(default)s)"),
    ],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = option_parser(__doc__, OPTIONS)
    run_options(p, out="runs/decoder")

    def preset(known: argparse.Namespace) -> dict:
        chosen = PRESETS[known.preset]
        if known.new_day:
            chosen = chosen | NEW_DAY
        elif not known.data:
            chosen = chosen | BUILT_IN | {"warmup": min(50, chosen.get("warmup", 50))}
        return chosen

    return parse_options(p, argv, ("decoder",), preset)


def lr_at(step: int, args: argparse.Namespace, total: int) -> float:
    """Learning rate of the update that follows `step` earlier ones, of `total` planned."""
    if step < args.warmup:
        return args.lr * step / args.warmup
    done = min(1, (step - args.warmup) / max(1, total - args.warmup))
    if args.lr_schedule == "step":
        return args.lr * args.gamma ** (step // args.step_size)
    if args.lr_schedule == "cosine":
        return args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * done))
    if args.lr_schedule == "linear":
        return args.lr + (args.lr_end - args.lr) * done
    return args.lr


def fitting(corpus: data.SpeechCorpus, trials: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """(n,) bool: True where the frames of a trial can spell its labels; CTC has no finite loss elsewhere."""
    needed = np.array([data.frames_needed(corpus.labels[i]) for i in trials])
    frames = output_frames(corpus.lengths[trials] - args.random_cut, args.kernel, args.stride)
    return frames - args.short_frames >= needed


def load_data(args: argparse.Namespace, known: list) -> tuple:
    """The corpus, the trials that train and validate, and what inference needs to know of the data. known:
    sessions of --init, beside which --new-day trains others."""
    with main_first():
        corpus = load_corpus(args, speech=True, quiet=not main_process(), say=say)
    parts = data.speech_parts(corpus, args.valid)
    names = [corpus.days[day] for day in np.unique(corpus.day[parts["train"]])]  # others would stay identity
    if args.new_day:
        new = np.array([day not in known for day in corpus.days])
        parts = {part: trials[new[corpus.day[trials]]] for part, trials in parts.items()}
        if not len(parts["valid"]):  # all the blocks held out are of known sessions
            parts["valid"] = data.last_tenth(parts["train"])
            parts["train"] = np.setdiff1d(parts["train"], parts["valid"])
        names = [*known, *(name for name in names if name not in known)]
    for part in ("valid", "train"):
        fits = fitting(corpus, parts[part], args)
        short = [corpus.ids[i] for i in parts[part][~fits]]
        say(f"{part}: {len(fits)} trials, {len(short)} too short for their labels: no loss {short[:10]}")
    train = parts["train"][fits]
    if not (len(train) and len(parts["valid"])):
        told = "of a session that --init does not know" if args.new_day else "of part train"
        sizes = f"--stride {args.stride}, --kernel {args.kernel}; give other data or sizes"
        raise data.DataError(f"{corpus.root}: no labelled trial {told} fits {sizes}")
    info = decoder_info(names, corpus.channels, args.valid, corpus.synthetic)
    kind = "SYNTHETIC corpus" if corpus.synthetic else corpus.root
    say(f"{kind} of {len(corpus.days)} days, {len(names)} day layers")
    if args.valid == "test":
        say("validation IS the test part: its score is no result")
    return corpus, train, parts["valid"], info


def augment(batch: dict, args: argparse.Namespace) -> dict:
    """The batch as this step shows it; noise and masks from torch's generator, which a resume restores."""
    x, lengths = data.random_gain(batch["x"], args.static_gain), batch["lengths"]
    x = data.add_noise(x, lengths, args.white_noise, args.offset_noise, walk=args.random_walk)
    x = data.mask_channels(x, args.channel_mask, args.feature_mask)
    x = data.time_mask(x, lengths, args.time_mask_prob, args.time_mask_width, args.time_mask_max)
    cut = int(torch.randint(args.random_cut + 1, ())) if args.random_cut else 0
    return batch | {"x": x[:, cut:], "lengths": lengths - cut}


def batch_losses(outputs: tuple, batch: dict, args: argparse.Namespace) -> torch.Tensor:
    """Loss of each trial, (B,), of what the model gave: logits, frames and, with --aux-layer, more logits."""
    logits, frames, *auxiliary = outputs
    frames = (frames - int(args.short_frames)).clamp(min=0)
    labels = batch["labels"], batch["label_lengths"]
    each = []
    for scores in (logits, *auxiliary):
        each.append(LOSS(scores.float().log_softmax(-1), frames, *labels, args.ctc_reduction))
    return each[0] + args.aux_weight * each[1] if auxiliary else each[0]


def start_days(known: list, days: list, rule: str = "nearest") -> np.ndarray:
    """Of each session the day of --init whose layer it starts from: its own, by the rule, or the mean."""
    try:
        return data.map_days(days, known, rule)
    except data.DataError:  # names without dates
        return data.map_days(days, known, "mean")


def start_new_day(model, start, known: list, info: dict, corpus, parts: tuple, *about) -> None:
    """Says what unknown sessions reach with the nearest and the mean day layer, and starts from the better in
    training."""
    reached = {}
    for rule in ("nearest", "mean"):
        model.start_from(start, start_days(known, info["days"], rule))
        reached[rule], held = (validate_decoder(model, corpus, p, *about)["valid_per"] for p in parts)
        say(f"new day, {rule} day layer: PER {reached[rule]:.4f} in training, {held:.4f} in validation")
    model.start_from(start, start_days(known, info["days"], min(reached, key=reached.get)))


def parameter_groups(model: GRUDecoder, args: argparse.Namespace, days: list | None = None) -> list[dict]:
    """Weight matrices decay; biases, norms, day layers (whose start is the identity) only by --decay-all.
    days: of --still-days, `separate_days`, which stand for the day layers in one piece."""
    groups = {args.weight_decay: [], 0.0: list(days or ())}
    for name, parameter in model.named_parameters():
        of_day = name.startswith("day")
        if parameter.requires_grad and not (of_day and days):
            decays = args.decay_all or (parameter.ndim > 1 and not of_day)
            groups[args.weight_decay if decays else 0.0].append(parameter)
    return [{"params": found, "weight_decay": decay} for decay, found in groups.items() if found]


def validate(model: GRUDecoder, ema: dict | None, search: WordSearch | None, *about) -> dict:
    """Metrics of the weights that will be used, averaged where there are such; `_raw`: of the model's own."""
    own = validate_decoder(model, *about, None if ema else search)
    with averaged(model, ema):
        metrics = validate_decoder(model, *about, search) if ema else own
    return metrics | {"valid_per_raw": own["valid_per"], "valid_loss_raw": own["valid_loss"]}


def main(args: argparse.Namespace) -> dict:
    """Train one decoder; returns the metrics of the best weights on the validation part."""
    # ---- device, process group, seed
    device, rank, world = set_up(args.device, args.seed, args.preset.startswith("baseline"))

    # ---- data
    resumed = load_training(args.resume, ("decoder",)) if args.resume else None
    start, known = load_decoder(args.init) if args.init else (None, [])
    if start:
        vars(args).update({name: start.model_args[name] for name in NETWORK if "dropout" not in name})
        say(f"{args.init}: its sizes stay, whatever the options: hidden {args.hidden}, layers {args.layers}")
    elif args.new_day:
        raise data.DataError("--new-day: without --init; give the checkpoint of the other days")
    if resumed:
        args.data = args.data or resumed["args"]["data"]
    corpus, train, valid, info = load_data(args, known)
    if start and start.model_args["channels"] != corpus.channels:
        found = f"{args.init}: {start.model_args['channels']} channels, {corpus.root} {corpus.channels}"
        raise data.DataError(f"{found}; convert it anew with --channels")
    if resumed:
        same_data(args.resume, resumed["data"], info)
    days = data.map_days(corpus.days, info["days"], "mean")
    lengths = corpus.lengths[train].tolist()
    batches: list[list[int]] = []  # of the epoch
    loader = data_loader(corpus, batches, data.collate_speech, args.workers, device)
    drawn = (corpus.day[train], args.days_per_batch) if args.days_per_batch else ()
    steps_per_epoch = len(data.speech_batches(lengths, args.batch, args.seed, 0, world, *drawn))
    planned = args.steps
    last = min(planned, args.max_steps or planned)
    search = None
    if args.select == "wer" and main_process():  # which alone evaluates
        search = WordSearch(*word_model(corpus, train, args.cache))

    # ---- model
    sizes = {name: getattr(args, name) for name in NETWORK}
    sizes |= {"channels": corpus.channels, "days": len(info["days"]), "classes": len(data.PHONEMES)}
    bare_model = GRUDecoder(**sizes).to(device)
    if args.new_day and not resumed:
        parts = train, valid
        start_new_day(bare_model, start, known, info, corpus, parts, days, args.batch)
    elif start:
        bare_model.start_from(start, start_days(known, info["days"]))
    if args.new_day:
        for name, parameter in bare_model.named_parameters():
            parameter.requires_grad = name.startswith("day")
    model = DistributedDataParallel(bare_model) if world > 1 else bare_model
    one_layer = partial(torch.nn.GRU, corpus.channels * args.kernel, min(args.hidden, 256))
    args.amp = from_main(working_amp(args.amp, device, one_layer, 32, 16, corpus.channels * args.kernel))
    parameters = sum(p.numel() for p in bare_model.parameters())
    args.loss, args.synthetic = LOSS.__name__, corpus.synthetic
    say(f"GRU decoder: {parameters:,} parameters on {device}, amp {args.amp}; {planned} steps planned")

    # ---- optimiser
    layers = bare_model.separate_days() if args.still_days else None
    groups = parameter_groups(bare_model, args, layers)
    optimizer = OPTIMIZERS[args.optimizer](groups, lr=args.lr, eps=args.adam_eps, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=scales_loss(args.amp, device))
    ema = copy.deepcopy(bare_model.state_dict()) if args.ema else None

    # ---- resume
    step = 0
    rate = 1.0
    chosen_by = f"valid_{args.select}"
    best = {chosen_by: math.inf}
    if resumed:
        ema = restore(args.resume, resumed, bare_model, optimizer, scaler, rank)
        step, best = resumed["step"], resumed["best"]
        rate = resumed["scheduler"]["rate"]
    name = f"{args.preset}_h{args.hidden}_s{args.seed}"
    run = Run(args, name, resumed)

    def save(file: str) -> None:
        state = {"ema": ema, "step": step, "epoch": epoch, "best": best, "data": info}
        run.save(file, "decoder", bare_model, optimizer, scaler, scheduler={"rate": rate}, **state)

    # ---- loop
    stopped = False
    recent: deque[torch.Tensor] = deque(maxlen=200)  # losses, read when they are logged: a GPU need not wait
    bar = tqdm(total=last, initial=step, unit="step", leave=False, disable=rank > 0 or None)
    with run, Interrupt() as stop, bar, worker_processes(loader):
        while step < last and not stopped:
            epoch = step // steps_per_epoch
            whole = data.speech_batches(lengths, args.batch, args.seed, epoch, world, *drawn)
            batches[:] = [train[indices[rank::world]] for indices in whole[step % steps_per_epoch :]]
            for batch in loader:
                moved = {key: batch[key].to(device, non_blocking=True) for key in ("x", "labels")}
                moved["day"] = torch.as_tensor(days)[batch["day"]]
                batch = augment(batch | moved, args)  # the model wants lengths on the CPU

                lr = lr_at(step, args, planned) * rate
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device.type, AMP_TYPES.get(args.amp), enabled=args.amp != "off"):
                    outputs = model(batch["x"], batch["lengths"], batch["day"], args.aux_layer > 0)
                    losses = batch_losses(outputs, batch, args)
                    loss = losses.mean()
                scaler.scale(loss).backward()
                if args.still_days:
                    bare_model.hand_over_days(layers)
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
                    recent.append(loss.detach())
                    update_ema(ema, bare_model, min(args.ema, step / (10 + step)))
                else:  # the weights stay; the step counter and the learning rate have gone on
                    names, overflow = suspects(batch["ids"], losses, scaler)
                    rate *= 1 if overflow else args.reduce_on_nan
                    run.skip(step, epoch, names, overflow, rate=rate)
                if step % args.log_every == 0:
                    average = float(np.mean([x.item() for x in recent])) if recent else math.nan
                    report = {"loss_of_200": average, "memory": peak_memory(device)}
                    run.log(step, epoch, loss=loss.item(), lr=lr, norm=norm, skipped=run.skipped, **report)
                    bar.set_postfix(loss=f"{loss.item():.4f}", norm=f"{norm:.2f}")
                if step % args.eval_every == 0 or step == last:
                    metrics = None
                    if rank == 0:
                        metrics = validate(bare_model, ema, search, corpus, valid, days, args.batch)
                    metrics = from_main(metrics) | {"epoch": epoch, "step": step}
                    is_best = metrics[chosen_by] < best[chosen_by]  # NaN is never best
                    best = metrics if is_best else best
                    run.log(loss=loss.item(), lr=lr, norm=norm, skipped=run.skipped, **metrics)
                    say(
                        f"step {step:6d}  lr {lr:.2e}  {args.loss} {loss.item():.4f}  "
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

    if not stopped:
        for sample in best.get("samples", []):
            say(f"{sample['id']}\n  reference  {sample['reference']}\n  decoded    {sample['hypothesis']}")
    return run.end("train_decoder.py", step, stopped, best, summary)


def summary(metrics: dict) -> str:
    """The validation metrics in a line."""
    apart = {"of salad": "valid_per_salad", "WER": "valid_wer"}
    shown = ", ".join(f"{what} {metrics[key]:.4f}" for what, key in apart.items() if key in metrics)
    return (
        f"loss {data.shown(metrics['valid_loss'])}  PER {metrics['valid_per']:.4f} (without SIL "
        f"{metrics['valid_per_without_sil']:.4f}, raw weights {metrics['valid_per_raw']:.4f}) {shown}  "
        f"blank in {metrics['valid_blank_fraction']:.0%} of frames"
    )


if __name__ == "__main__":
    data.run_script("train_decoder.py", lambda: launch(main, parse_args()))
