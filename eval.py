"""Measures and uses what the trainers write: evaluation, prediction, reports, comparisons, baselines, benchmarks.

    python eval.py --ckpt runs/han/NAME/best.pt --data DIR                    one fold, validation part
    python eval.py --ckpt fold0/best.pt ... fold3/best.pt --data DIR          each on its own fold, then mean and std over folds
    python eval.py --ckpt ... --data DIR --part test --csv predictions.csv    test part; unlabelled items are predicted only
    python eval.py --ckpt ... --data DIR --save-results full                  results/han_full_<split>.json and .csv, both parts
    python eval.py --ckpt runs/ast/NAME/best.pt --data DIR                    ratings from audio; a pre-training: its losses
    python eval.py --ckpt runs/decoder/NAME/best.pt --data DIR --part test    phoneme error rate of a decoder
    python eval.py predict --ckpt FILE ... --score FILE --midi FILE           ratings of your own files; or --audio, or --speech: phonemes
    python eval.py report --run runs/han/NAME ... --data DIR --out report.html    one HTML page: curves, scores, worst items, configuration
    python eval.py compare --a A.csv --b B.csv --data DIR                     paired test of two results, or of best.pt files
    python eval.py ceiling --data DIR                                         what the raters' disagreement leaves to reach
    python eval.py floor --task han --data DIR                                scikit-learn forest on the same parts; ast: ridge regression
    python eval.py curves --run runs/han/NAME --out curves.png                score, loss, gradient norm and skipped updates by step
    python eval.py --attention out.png --audio FILE.wav --ckpt runs/ast/NAME/best.pt    what an AST looks at; or --midi FILE.mid
    python eval.py bench --task han|decoder|ast                               step time against the plain rendition

Several checkpoints of one fold (seeds) are averaged. Every figure stands with and without the score renderings
(players `Score`, `Score2`), with a 95 % bootstrap interval over segments. Of several decoders the probabilities are averaged;
their interval is over trials, and --save-results writes results/decoder_ROW_<part>. Without --data the synthetic corpus is used.
"""

import os
import signal

if (
    __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):  # Ctrl-C while torch loads, which takes seconds
    signal.signal(signal.SIGINT, lambda *_: os._exit(130 if os.write(2, b"eval.py: interrupted\n") else 1))

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import platform
import random
import re
import resource
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from html import escape
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    BIN,
    FBANK_MEAN,
    FBANK_STD,
    FEATURE_SETS,
    FEATURES,
    FRAME,
    HOP,
    LABELS,
    MELS,
    MISALIGNED,
    PHONEMES,
    SAMPLE_RATE,
    SPLITS,
    ConversionReport,
    Corpus,
    DataError,
    FbankStore,
    SpeechCorpus,
    SpeechTrials,
    add_noise,
    clean_sentence,
    collate_han,
    collate_speech,
    column_names,
    convert_speech,
    extract_performances,
    fbank,
    fbank_frames,
    frames_needed,
    load_percepiano,
    map_days,
    normalise_fbank,
    note_features,
    number,
    open_speech,
    pad_fbank,
    percepiano_audio,
    percepiano_parts,
    phonemize,
    player_of,
    pooled_statistics,
    prepare_ast,
    prepare_han,
    read_labels,
    read_midi,
    read_musicxml,
    read_ratings,
    read_wav,
    render,
    run_script,
    segment_of,
    speech_item,
    speech_parts,
    speech_rules,
    standardise_blocks,
    synthetic_percepiano,
    synthetic_speech,
    time_mask,
    unusable_bins,
    write_atomic,
)
from models import (
    AST,
    AST_PRESETS,
    HAN,
    PATCH,
    BiLSTM,
    Block,
    ClipStatistics,
    ContextAttention,
    GRUDecoder,
    cluster_mask,
    git_state,
    group_softmax,
    json_ready,
    load_checkpoint,
    output_frames,
    patches,
)

VIEWS = {"all": "all", "no_renderings": "without score renderings"}
AUDIO_TASKS = ("ast", "cnn", "mlp")  # what pretrain_ast.py writes
TRIAL_BINS, BINS_SPREAD = 500, 0.25  # bins per speech trial of the bench: median, sd of the log
MEDIAN_NOTES, NOTES_SPREAD, MAX_NOTES = (
    113,
    0.67,
    420,
)  # notes per PercePiano performance: median, sd of the log, longest

# ------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------


def r2(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Coefficient of determination per dimension, (D,), of truth y and prediction p, both (n, D):
    scikit-learn's `r2_score` in a tenth of its time, since every draw of a bootstrap needs it. A constant
    truth gives 1 when met exactly, else 0; one item NaN."""
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    if len(y) < 2:
        return np.full(y.shape[1], np.nan)
    residual = ((y - p) ** 2).sum(0)
    total = ((y - y.mean(0)) ** 2).sum(0)
    varies = total > 1e-20  # a constant's total is only rounding
    return np.where(varies, 1 - residual / np.where(varies, total, 1), residual == 0)


def mse(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Mean squared error per dimension, (D,), of (n, D) arrays."""
    return ((np.asarray(y, np.float64) - np.asarray(p, np.float64)) ** 2).mean(0)


def pearson(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Pearson correlation per dimension, (D,), of (n, D) arrays; 0 where either side is constant, which has
    told nothing."""
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    a, b = y - y.mean(0), p - p.mean(0)
    scale = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(scale > 1e-15, (a * b).sum(0) / np.maximum(scale, 1e-15), 0.0)


METRICS = {"r2": r2, "mse": mse, "pearson": pearson}  # name -> function of (y, p) -> a figure per dimension


def validation_metrics(y: np.ndarray, p: np.ndarray) -> dict:
    """What a trainer logs of ratings y and predictions p, (n, 19); spread: deviation of p over y's."""
    metrics = {"valid_loss": float(mse(y, p).mean())}
    for name, metric in METRICS.items():
        metrics[f"valid_{name}"] = float(metric(y, p).mean())
        metrics[f"valid_{name}_per_dimension"] = metric(y, p).tolist()
    spread = float((p.std(0) / y.std(0)).mean())
    return metrics | {"prediction_mean": float(p.mean()), "prediction_std": float(p.std()), "spread": spread}


def by_fold(statistic: Callable, folds: np.ndarray, *arrays) -> np.ndarray:
    """Mean over folds (n,) of statistic(*arrays), of the rows of that fold."""
    return np.mean([statistic(*(a[folds == fold] for a in arrays)) for fold in np.unique(folds)], axis=0)


def resample(statistic: Callable, groups: Iterable, folds, *arrays, n=1000, seed=7) -> np.ndarray:
    """(draws, ...) values of `by_fold` when whole groups (rows,) are drawn with replacement n times, all
    folds (rows,; None: one) on one draw, since folds may share segments.

    Draws of a single distinct group, without some fold or of a non-finite value tell nothing and are left out
    (otherwise scipy.stats.bootstrap draws the same); none is given where fewer than half of n remain."""
    keys, inverse = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(inverse == k) for k in range(len(keys))]
    folds = np.zeros(len(inverse), int) if folds is None else folds
    values = []
    for drawn in np.random.default_rng(seed).integers(len(keys), size=(n, len(keys))):
        rows = np.concatenate([members[k] for k in drawn])
        if np.ptp(drawn) > 0 and set(folds[rows]) == set(folds):
            values.append(by_fold(statistic, folds[rows], *(a[rows] for a in arrays)))
    values = [value for value in values if np.isfinite(value).all()]
    return np.array(values if 2 * len(values) >= n else [])


def percentile_interval(draws: np.ndarray) -> list[float]:
    """95 % interval [low, high] of drawn scalars; NaN of none."""
    return np.percentile(draws, [2.5, 97.5]).tolist() if len(draws) else [math.nan, math.nan]


def cluster_bootstrap(y, p, groups, statistic: Callable = r2, n=1000, seed=7, folds=None) -> list[float]:
    """95 % interval of the mean of statistic(y, p), y and p (n, D), when whole groups (n,) (segments) are
    drawn with replacement; with folds (n,) of its mean over folds. NaN where too few draws tell anything."""
    return percentile_interval(
        resample(lambda y, p: np.mean(statistic(y, p)), groups, folds, y, p, n=n, seed=seed)
    )


def is_rendering(name: str) -> bool:
    """True for a rendering of the score (player `Score` or `Score2`) instead of a human performance."""
    return str(player_of(name)).startswith("Score")


def _stacked(records, truth, part, view):
    """(names, truth (n, D), predictions (n, D), folds (n,)) of the rated items of a part and view, fold after
    fold."""
    rows = []
    for record in records:
        for name, p in zip(record["names"], record["p"], strict=True):
            shown = view == "all" or not is_rendering(name)
            if record["part"] == part and name in truth and shown:
                rows.append((name, truth[name], p, record["fold"]))
    names, y, p, folds = zip(*rows, strict=True) if rows else ((), (), (), ())
    return list(names), np.array(y, np.float64), np.array(p, np.float64), np.array(folds)


def of_views(function: Callable, records: list[dict], truth: dict[str, np.ndarray]) -> dict:
    """{part: {view: function(*_stacked), or None where nothing is rated}}."""
    result: dict = {}
    for part in dict.fromkeys(record["part"] for record in records):
        result[part] = {}
        for view in VIEWS:
            names, *arrays = _stacked(records, truth, part, view)
            result[part][view] = function(names, *arrays) if names else None
    return result


def measure(records: list[dict], truth: dict[str, np.ndarray]) -> dict:
    """Metrics of predictions: {part: {view: {"folds": {fold: scores}, "mean": ...} or None}}, view of VIEWS.

    records: dicts of part, fold, names and p (n, D). truth: name -> (D,); names without truth are left out,
    and a view without any is None. "mean" holds mean and (population) std over folds, and the interval of the
    mean."""
    return of_views(_measure_folds, records, truth)


def _measure_folds(names, y, p, folds):
    groups = np.array([segment_of(name) for name in names])
    each = {}
    for fold in dict.fromkeys(folds.tolist()):
        rows = folds == fold
        each[str(fold)] = scores(y[rows], p[rows], groups[rows])
    mean: dict = {"folds": len(each), "per_dimension": {}}
    for key in METRICS:
        values = [fold[key] for fold in each.values()]
        mean |= {key: float(np.mean(values)), f"{key}_std": float(np.std(values))}
        of_folds = [fold["per_dimension"][key] for fold in each.values()]
        mean["per_dimension"][key] = np.mean(of_folds, axis=0).tolist()
    mean["r2_interval"] = cluster_bootstrap(y, p, groups, folds=folds)
    return {"folds": each, "mean": mean}


def scores(y, p, groups) -> dict:
    """All metrics of one part and fold: counts, each metric's mean, R² with its interval, and each per
    dimension."""
    each = {key: metric(y, p) for key, metric in METRICS.items()}
    return {
        "items": len(y),
        "segments": len(set(groups)),
        **{key: float(values.mean()) for key, values in each.items()},
        "r2_interval": cluster_bootstrap(y, p, groups),
        "per_dimension": {key: values.tolist() for key, values in each.items()},
    }


# ------------------------------------------------------------------------------------------------------------
# Results: predictions as CSV, metrics and circumstances as JSON, both printed
# ------------------------------------------------------------------------------------------------------------


def write_csv(path: str | Path, rows: Iterable[Iterable]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomic(Path(path), lambda file: file.write(text.getvalue().encode()))


def write_predictions(path: str | Path, records: list[dict]) -> None:
    """CSV of columns name, part, fold and the 19 labels; one line per item, part and fold; four decimals."""
    rows: list = [["name", "part", "fold", *LABELS]]
    for record in records:
        for i in np.argsort(record["names"], kind="stable"):
            ratings = [f"{value:.4f}" for value in record["p"][i]]
            rows.append([record["names"][i].strip(), record["part"], record["fold"], *ratings])
    write_csv(path, rows)


def read_predictions(path: str | Path) -> list[dict]:
    """Reads what `write_predictions` wrote: a list of dicts of part, fold, names and p (n, 19). DataError
    otherwise."""
    groups: dict[tuple, list] = {}
    line = 1
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for line, row in enumerate(csv.DictReader(file, strict=True), 2):  # noqa: B007
                ratings = [float(row[label]) for label in LABELS]
                groups.setdefault((row["part"], int(row["fold"])), []).append((row["name"], ratings))
        if not groups:
            raise ValueError("no predictions")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{path}: line {line}: {error!r}; expected ratings of --save-results") from error
    records = []
    for (part, fold), items in groups.items():
        names, p = zip(*items, strict=True)
        records.append({"part": part, "fold": fold, "names": list(names), "p": np.array(p)})
    return records


def hardware(device: torch.device) -> dict:
    """What the figures were computed on: CPU model and cores, GPU if used, threads, torch version."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def save_results(stem: str, args, about: dict, figures: dict) -> None:
    """Writes figures, what they are about and how they were made to stem.json; a list of numbers is one
    line."""
    made = {
        "row": args.save_results,
        "command": args.command,
        **git_state(),
        "hardware": hardware(args.device),
    }
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    saved = json_ready({**made, "date": date, **about, **figures})
    text = re.sub(
        r"\[\s+([^][{}]*?)\s+]",
        lambda found: f"[{' '.join(found[1].split())}]",
        json.dumps(saved, indent=1, allow_nan=False),
    )
    write_atomic(Path(f"{stem}.json"), lambda file: file.write(f"{text}\n".encode()))
    print(f"saved {stem}.json and .csv")


def corpus_line(synthetic: bool, root: object) -> str:
    return "SYNTHETIC corpus: figures say nothing about real data" if synthetic else f"real data in {root}"


def print_table(head: list[str], rows: Iterable[Iterable]) -> None:
    """Aligned columns; fractions to four digits."""
    cells = [
        [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in [head, *rows]
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def brackets(interval: Iterable[float]) -> str:
    return "[{:.4f}, {:.4f}]".format(*interval)


def _print_metrics(metrics):
    for part, views in metrics.items():
        rows, columns = [], {}
        for view, figures in views.items():
            if not figures:
                print(f"{part}, {VIEWS[view]}: no label: predicted only, no metric")
                continue
            mean = figures["mean"]
            for fold, s in figures["folds"].items():
                title = f"{part} fold {fold}, {VIEWS[view]}: {s['items']} items, {s['segments']} segments"
                rows.append([title, *(s[key] for key in METRICS), brackets(s["r2_interval"])])
            if mean["folds"] > 1:
                title = f"{part} mean of {mean['folds']} folds, {VIEWS[view]}"
                rows.append([title, *(mean[key] for key in METRICS), brackets(mean["r2_interval"])])
                rows.append(["standard deviation", *(mean[f"{key}_std"] for key in METRICS), ""])
            for key, values in mean["per_dimension"].items():
                columns[f"{key}, {VIEWS[view]}"] = values
        if columns:
            print_table([part, *METRICS, "95 % of r2"], rows)
            print_table([f"{part} per dimension", *columns], zip(LABELS, *columns.values(), strict=True))


def _load_corpus(args):
    if not args.data:
        print("no --data: the built-in SYNTHETIC corpus; python data.py fetch percepiano gets the real one")
    corpus = load_percepiano(args.data or synthetic_percepiano(args.cache), args.cache)
    for line in corpus.left_out:
        print(f"left out: {line}")
    return corpus


def _finish(records, corpus, args, about):
    """Measures, prints and writes predictions; returns the metrics. Task ast is tested for significance
    too."""
    truth = {name: item["y"] for name, item in corpus.items.items() if "y" in item}
    if args.save_results:
        for record in records:  # rounded first, so that the JSON is exactly what the CSV gives
            record["p"] = np.round(record["p"], 4)
    figures = {"metrics": measure(records, truth)}
    print(f"split {about['split']}, {corpus_line(corpus.synthetic, corpus.root)}")
    _print_metrics(figures["metrics"])
    if about["task"] == "ast":
        figures["significance"] = significance(records, truth)
        _print_significance(figures["significance"])
    unrated = {name for record in records for name in record["names"]} - truth.keys()
    print(
        f"{len(unrated)} unlabelled items predicted; --csv FILE or --save-results ROW writes all predictions"
    )
    if args.csv:
        write_predictions(args.csv, records)
    if args.save_results:
        stem = Path(args.results_dir) / f"{about['task']}_{args.save_results}_{about['split']}"
        write_predictions(f"{stem}.csv", records)
        save_results(stem, args, {**about, "synthetic": corpus.synthetic, "labels": list(LABELS)}, figures)
    return figures["metrics"]


# ------------------------------------------------------------------------------------------------------------
# Evaluation of checkpoints
# ------------------------------------------------------------------------------------------------------------


def to_device(batch: dict, device: torch.device) -> dict:
    return {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}


def predict_han(model: nn.Module, items: list[dict], device: torch.device, batch: int = 16) -> np.ndarray:
    """Ratings in [0, 1] of prepared items, (n, 19) float64 in the order given. Batches hold items of similar
    length."""
    order = np.argsort([len(item["x"]) for item in items], kind="stable")
    p = np.zeros((len(items), len(LABELS)))
    model = model.to(device).eval()
    with torch.no_grad():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            logits = model(to_device(collate_han([items[i] for i in chosen]), device))
            p[chosen] = torch.sigmoid(logits.float()).double().cpu().numpy()
    return p


def _load_models(paths):
    """[(path, model, what of the checkpoint is needed), ...], all of one task."""
    loaded = []
    for path in paths:
        model, ckpt = load_checkpoint(path)
        kept = {key: ckpt.get(key) for key in ("task", "args", "data", "step", "epoch", "git_sha")}
        loaded.append((path, model, kept))
        first = loaded[0][2]["task"]
        if kept["task"] != first:
            raise DataError(f"{path}: of task {kept['task']!r}; {paths[0]} is of {first!r}; split them")
    return loaded


def _check_alike(loaded, keys, fixed):
    """The data settings of checkpoints that are evaluated together. DataError names the first that lacks one
    of the keys (of its data or its model), has another value there than the first, or than the fixed one."""
    expected: dict = {}
    for path, model, ckpt in loaded:
        try:
            found = {key: (ckpt["data"] | model.model_args)[key] for key in keys}
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}: {error} is not in its data; expected a best.pt that predicts"
            ) from error
        expected = expected or found | fixed
        for key in keys:
            if found[key] != expected[key]:
                raise DataError(
                    f"{path}: {key} is {found[key]!r:.60}; expected {expected[key]!r:.60}, as in "
                    f"{loaded[0][0]} or this version; evaluate them apart, or train again"
                )
    return loaded[0][2]["data"]


def _load_fold_models(loaded):
    """{fold: [(model, what of the checkpoint is needed), ...]} and the data settings that all must share."""
    task = loaded[0][2]["task"]
    of_task = {"han": ["features"], **dict.fromkeys(AUDIO_TASKS, ["audio"])}
    if task not in of_task:
        raise DataError(f"{loaded[0][0]}: of task {task!r}; expected {', '.join(of_task)} or decoder")
    alike = ["split", "keep_overlap", "synthetic", "labels", *of_task[task]]
    data = _check_alike(loaded, alike, {"labels": list(LABELS)})
    folds: dict[int, list[tuple]] = {}
    for path, model, ckpt in loaded:
        kept = {**ckpt, "path": str(path), "args": _own_options(ckpt)}
        folds.setdefault(ckpt["data"]["fold"], []).append((model, kept))
    return dict(sorted(folds.items())), data


def _own_options(ckpt):
    """The options that a checkpoint was trained with, without those of one machine."""
    local = ("data", "cache", "out", "resume", "name", "device")
    return {key: value for key, value in ckpt["args"].items() if key not in local}


def _checkpoints(used):
    """What a results JSON says of the checkpoints, (path, ckpt) each."""
    rows = []
    for path, ckpt in used:
        kept = {key: ckpt[key] for key in ("epoch", "step", "git_sha")}
        rows.append({"path": str(path), "fold": ckpt["data"].get("fold"), **kept, "args": _own_options(ckpt)})
    return {"seeds": [row["args"].get("seed") for row in rows], "checkpoints": rows}


def evaluate(argv: list[str]) -> dict:
    """`python eval.py --ckpt ...`: metrics of checkpoints, those that rate each on its own fold and split;
    returns them (see `measure`; for decoders `evaluate_decoder`, for a pre-training
    `evaluate_pretraining`)."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py evaluate",
        usage="python eval.py [evaluate] --ckpt FILE ... [--data DIR] [options]",
        description="""\
Scores checkpoints on data that they did not learn from. What they are they know themselves.

    python eval.py --ckpt runs/han/NAME/best.pt --data data/percepiano        one fold
    python eval.py --ckpt runs/han/*_f?_s7/best.pt --data data/percepiano     four folds, each on its own part
    python eval.py --ckpt runs/decoder/NAME/best.pt --data DIR --words --tune  phonemes and words

Checkpoints of one fold (seeds) are averaged, and so are decoders.
Intervals: 95 %, bootstrap over segments or trials.""",
    )
    parts = ["valid", "test", "competition"]
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="FILE", help="best.pt of folds or seeds (required)")
    add("--part", choices=parts, default="valid", help="part to score (%(default)s)")
    add("--batch", type=number(int, 1), help="items per forward pass (16; audio 8; decoder 64)")
    of_audio = audio_options(parser)
    of_decoder = [add("--day", choices=["nearest", "mean"], help=DAY_HELP), *word_options(parser)]
    args = _parse(parser, argv)
    loaded = _load_models(args.ckpt)
    task = loaded[0][2]["task"]
    if task not in AUDIO_TASKS:
        _refuse_given(args, of_audio, "pretrain_ast.py", task)
    if task == "decoder":
        return evaluate_decoder(args, loaded)
    _refuse_given(args, of_decoder, "train_decoder.py", task)
    if args.part == "competition":
        raise DataError(f"--part competition: of decoders; {args.ckpt[0]} is of task {task!r}")
    if task == "ast" and loaded[0][1].model_args["num_outputs"] is None:
        return evaluate_pretraining(args, loaded)
    folds, data = _load_fold_models(loaded)
    corpus = _corpus_of(data, args)
    records = fold_records(folds, corpus, args, ("valid", "test") if args.save_results else (args.part,))
    about = {"task": "han" if task == "han" else "ast", "model": task}
    about |= {key: data[key] for key in ("split", "features", "audio", "keep_overlap") if key in data}
    about |= _checkpoints([(ckpt["path"], ckpt) for members in folds.values() for _, ckpt in members])
    return _finish(records, corpus, args, about)


def _refuse_given(args, options, trainer, task):
    """Refuses options that were given though they mean nothing for checkpoints of this task."""
    given = [o.option_strings[0] for o in options if getattr(args, o.dest) != o.default]
    if given:
        names = ", ".join(given)
        raise DataError(f"{names}: only for {trainer}; {args.ckpt[0]} is of task {task!r}; leave it out")


def _refuse_synthetic(data, args):
    if args.data is None and not data["synthetic"]:
        raise DataError(f"{args.ckpt[0]}: trained on real data, not the synthetic; give --data DIR")


def _say_other_corpus(data, synthetic):
    if synthetic != data["synthetic"]:
        print(f"evaluated on {'synthetic' if synthetic else 'real'} data, trained on the other kind")


def _corpus_of(data, args):
    """The corpus of --data for checkpoints of data settings `data`."""
    _refuse_synthetic(data, args)
    corpus = _load_corpus(args)
    _say_other_corpus(data, corpus.synthetic)
    return corpus


def fold_records(folds: dict[int, list[tuple]], corpus: Corpus, args, parts: Iterable[str]) -> list[dict]:
    """Predictions of the checkpoints of `_load_fold_models`, averaged within a fold, as `measure` takes
    them."""
    records: list[dict] = []
    first = next(iter(folds.values()))[0][1]
    store = audio_store(corpus, args, first["data"]["audio"]) if first["task"] in AUDIO_TASKS else None
    for fold, members in folds.items():
        data, options = members[0][1]["data"], members[0][1]["args"]
        names_of = percepiano_parts(
            corpus,
            data["split"],
            fold,
            keep_overlap=data["keep_overlap"],
            keep_misaligned=options.get("keep_misaligned", False),
        )
        seeds = [ckpt["args"].get("seed") for _, ckpt in members]
        print(f"fold {fold}: predictions of {len(members)} checkpoints averaged, seeds {seeds}")
        for part in parts:
            names, p = names_of[part], []
            if store:
                names = [name for name in names if name in store.names]
            for model, ckpt in members:
                if store:
                    items = prepare_ast(corpus, store, names, ckpt["data"])
                    batch = args.batch or 8
                    p.append(predict_ast(model, items, ckpt["data"], args.device, batch, args.crops))
                else:
                    items = prepare_han(corpus, names, ckpt["data"])
                    p.append(predict_han(model, items, args.device, args.batch or 16))
            records.append({"part": part, "fold": fold, "names": names, "p": np.mean(p, axis=0)})
    return records


# ------------------------------------------------------------------------------------------------------------
# Floor: a forest or a ridge regression on pooled statistics of the notes or of the spectrogram
# ------------------------------------------------------------------------------------------------------------


def floor(argv: list[str]) -> dict:
    """`python eval.py floor`: scikit-learn on the parts that the trainers use, HAN.md's ExtraTrees on note
    statistics or a ridge regression on log-mel statistics unless asked otherwise; returns metrics (see
    `measure`)."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py floor",
        usage="python eval.py floor [--task han|ast] [--data DIR] [options]",
        description="""\
The floor that a network has to beat: scikit-learn on statistics of each performance's notes (han)
or spectrogram (ast), trained and scored on the same parts as the trainers use. A minute.

    python eval.py floor --data data/percepiano                       forest on note statistics, four folds
    python eval.py floor --task ast --data data/percepiano --fold 0   ridge on log-mel statistics, one fold
    python eval.py floor --task ast --data DIR --probe best.pt        and on a pre-trained AST's tokens""",
    )
    add = parser.add_argument
    add("--task", choices=["han", "ast"], default="han", help="han: score and MIDI, ast: audio (%(default)s)")
    add(
        "--model",
        choices=["ridge", "forest"],
        help="ridge regression, or 150 trees (han: forest, ast: ridge)",
    )
    add("--split", choices=SPLITS, default="segment", help="what parts never share (%(default)s)")
    add("--fold", choices=[*"0123", "all"], default="all", help="fold that validates (%(default)s)")
    add("--features", choices=FEATURE_SETS, default="full", help="han: statistics of what (%(default)s)")
    add("--audio", metavar="DIR", help="ast: folder of recordings NAME.wav (off: rendered from the MIDI)")
    add("--probe", metavar="FILE", help="ast: best.pt of a pre-training, whose frozen tokens join in (off)")
    add("--keep-overlap", action="store_true", help="train also on notes that validation or test holds (off)")
    add("--keep-misaligned", action="store_true", help="train also on match rates under .6 (off)")
    add("--seed", type=number(int, 0), default=7, help="of the forest (%(default)s)")
    args = _parse(parser, argv)
    foreign = args.audio or args.probe if args.task == "han" else args.features != "full"
    if foreign:
        raise DataError("--features is of --task han, --audio and --probe of ast; leave them out")
    args.model = args.model or {"han": "forest", "ast": "ridge"}[args.task]
    corpus = _load_corpus(args)
    statistics = _note_statistics(corpus, args) if args.task == "han" else _clip_statistics(corpus, args)
    records = []
    for fold in range(4) if args.fold == "all" else [int(args.fold)]:
        names_of = percepiano_parts(
            corpus, args.split, fold, keep_overlap=args.keep_overlap, keep_misaligned=args.keep_misaligned
        )
        train = [name for name in names_of["train"] if name in statistics]
        model = _regression(args.model, args.seed, [segment_of(name) for name in train])
        model.fit([statistics[name] for name in train], [corpus.items[name]["y"] for name in train])
        for part in ("valid", "test"):
            names = [name for name in names_of[part] if name in statistics]
            p = np.zeros((0, len(LABELS)))
            if names:
                p = model.predict([statistics[name] for name in names]).clip(0, 1)
            records.append({"part": part, "fold": fold, "names": names, "p": p})
    about = {"task": args.task, "model": args.model, "seeds": [args.seed]}
    about |= {"split": args.split, "keep_overlap": args.keep_overlap}
    if args.task == "han":
        about["features"] = args.features
    else:
        about |= {"audio": "wav" if args.audio else "rendered", "probe": args.probe}
    return _finish(records, corpus, args, about)


def _note_statistics(corpus, args):
    columns = [corpus.columns.index(name) for name in column_names(FEATURE_SETS[args.features])]
    return {name: pooled_statistics(item, columns, args.features) for name, item in corpus.items.items()}


def _clip_statistics(corpus, args):
    """Of each recording's log-mel energies; with --probe also those of a pre-trained AST's tokens."""
    store = audio_store(corpus, args)
    tokens = frozen_tokens(args.probe, store, args.device) if args.probe else {}
    of_clip, statistics = ClipStatistics(), {}
    for i, name in enumerate(store.names):
        energies = torch.as_tensor(np.asarray(store.get(i), np.float32))
        row = of_clip.values(energies[None])[0].double().numpy()
        statistics[name] = np.append(row, tokens.get(name, []))
    return statistics


def _regression(kind, seed, groups):
    """A forest, or ridge regression on standardised columns, its strength chosen by cross-validation over
    whole groups."""
    from sklearn.ensemble import ExtraTreesRegressor  # takes a second to import, and only the floor needs it
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind == "forest":
        return ExtraTreesRegressor(
            150, min_samples_leaf=3, max_features=0.3, random_state=seed, n_jobs=os.cpu_count()
        )
    folds = GroupKFold(min(5, len(set(groups)))).split(groups, groups=groups)
    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 5, 13), cv=list(folds)))


# -----------------------------------------------------------------------------------------------------------------
# Plain HAN: the yardstick of the speed claim. Packed bidirectional LSTMs, a Python loop over voices and dense
# one-hot matrices between levels, as in the original; masks as in models.HAN, so that the results are the same.
# -----------------------------------------------------------------------------------------------------------------
class PlainHAN(nn.Module):
    """The network of `models.HAN` (form han, level total_note_cat, no switches) with the same weights."""

    def __init__(self, model: HAN):
        super().__init__()
        if model.level != "total_note_cat" or model.model_args["layernorm"] or model.model_args["stats_size"]:
            raise ValueError(f"plain HAN: only level total_note_cat without switches; got {model.model_args}")
        dropout = model.model_args["dropout"]
        self.embedding, self.contractor, self.head = (
            copy.deepcopy(part) for part in (model.embedding, model.contractor, model.head)
        )
        self.note, self.voice, self.beat, self.measure = (
            _joined_lstm(part, dropout) for part in (model.note, model.voice, model.beat, model.measure)
        )
        self.beat_attention, self.measure_attention, self.attention = (
            _PlainAttention(part) for part in (model.beat_attention, model.measure_attention, model.attention)
        )

    def forward(self, batch: dict) -> Tensor:
        """batch of data.collate_han (only x, lengths, mask, voice, beat, measure are read) -> logits (B, 19)."""
        lengths, mask = batch["lengths"], batch["mask"]
        embedded = self.embedding(batch["x"])
        note = _run(self.note, embedded, lengths)
        hidden = torch.cat([note, self.run_voices(embedded, batch["voice"])], dim=2)
        note_to_beat = _one_hot(batch["beat"], mask)
        note_to_measure = _one_hot(batch["measure"], mask)
        beats = _run(self.beat, self.beat_attention(hidden, note_to_beat), batch["beat"].amax(1) + 1)
        beat_to_measure = (note_to_beat.transpose(1, 2) @ note_to_measure).clamp(max=1)
        measures = self.measure_attention(beats, beat_to_measure)
        measures = _run(self.measure, measures, batch["measure"].amax(1) + 1)
        total = torch.cat([hidden, note_to_beat @ beats, note_to_measure @ measures], dim=2)
        pooled = self.attention(self.contractor(total), mask.unsqueeze(2).to(total.dtype))
        return self.head(pooled.squeeze(1))

    def run_voices(self, embedded: Tensor, voice: Tensor) -> Tensor:
        """embedded (B, T, C), voice (B, T), 0 = none -> (B, T, 2 * size), zeros for voice 0."""
        B, T, _ = embedded.shape
        out = embedded.new_zeros(B, T, 2 * self.voice.hidden_size)
        for v in range(1, int(voice.max()) + 1):
            member = voice == v
            rows = member.any(1).nonzero().squeeze(1)
            if not len(rows):
                continue
            notes = pad_sequence([embedded[row, member[row]] for row in rows], batch_first=True)
            result = _run(self.voice, notes, member[rows].sum(1))
            place = embedded.new_zeros(len(rows), T, notes.shape[1])
            for i, row in enumerate(rows):
                positions = member[row].nonzero().squeeze(1)
                place[i, positions, torch.arange(len(positions))] = 1
            out = out.index_add(0, rows, place @ result)
        return out


class _PlainAttention(nn.Module):
    def __init__(self, attention: ContextAttention):
        super().__init__()
        self.linear = copy.deepcopy(attention.linear)
        self.context_vector = nn.Parameter(attention.context_vector.detach().clone())

    def forward(self, x: Tensor, membership: Tensor) -> Tensor:
        """x (B, M, C), membership (B, M, G) one-hot, zero rows at padding -> (B, G, C)."""
        B, M, C = x.shape
        H, D = self.context_vector.shape
        score = (torch.tanh(self.linear(x)).view(B, M, H, D) * self.context_vector).sum(-1)
        member = membership.transpose(1, 2).bool().unsqueeze(1)  # (B, 1, G, M)
        score = score.transpose(1, 2).unsqueeze(2).masked_fill(~member, torch.finfo(x.dtype).min)
        weight = score.softmax(-1) * member  # (B, H, G, M)
        pooled = weight @ x.view(B, M, H, D).transpose(1, 2)
        return pooled.transpose(1, 2).reshape(B, -1, C)


def plain_from_han(model: HAN) -> PlainHAN:
    """The plain network with copies of a HAN's weights, in the same mode (train or eval)."""
    return PlainHAN(model).train(model.training)


def _run(lstm: nn.LSTM, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    out, _ = pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=x.shape[1])
    return out


def _one_hot(group: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.one_hot(group).float() * mask.unsqueeze(2)


def _joined_lstm(part: BiLSTM, dropout: float) -> nn.LSTM:
    first, layers = part.forward_lstm[0], len(part.forward_lstm)
    lstm = nn.LSTM(
        first.input_size, first.hidden_size, layers, batch_first=True, bidirectional=True,
        dropout=dropout if layers > 1 else 0.0,
    )  # fmt: skip
    with torch.no_grad():
        for suffix, directions in (("", part.forward_lstm), ("_reverse", part.backward_lstm)):
            for i, direction in enumerate(directions):
                for name, parameter in direction.named_parameters():
                    getattr(lstm, name.replace("_l0", f"_l{i}{suffix}")).copy_(parameter)
    return lstm


# -----------------------------------------------------------------------------------------------------------------
# Bench
# -----------------------------------------------------------------------------------------------------------------


def random_items(count: int, seed: int = 7) -> list[dict]:
    """Made-up items with the lengths, voices, beats and measures that PercePiano has: about 113 notes, up to 420, in
    four voices (0 for extra notes), three notes a beat, three beats a measure."""
    rng = np.random.default_rng(seed)
    items = []
    for notes in (
        np.exp(rng.normal(np.log(MEDIAN_NOTES), NOTES_SPREAD, count)).clip(30, MAX_NOTES).astype(int)
    ):
        beat = np.sort(rng.integers(notes // 3, size=notes))
        items.append(
            {
                "x": rng.standard_normal((notes, len(column_names(FEATURES)))).astype(np.float32),
                "voice": rng.choice([0, 1, 2, 5, 6], notes, p=[0.02, 0.4, 0.1, 0.38, 0.1]).astype(np.int64),
                "beat": beat.astype(np.int64),
                "measure": (beat // 3).astype(np.int64),
                "y": rng.random(len(LABELS)).astype(np.float32),
            }
        )
    return items


def _timed_step(
    model: torch.nn.Module, batch: dict, amp: torch.dtype | None, device: torch.device
) -> tuple[float, float]:
    """Seconds of one forward and backward pass, and its peak of GPU memory in MiB (NaN on CPU)."""
    model.zero_grad(set_to_none=True)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
        loss = functional.mse_loss(torch.sigmoid(model(batch).float()), batch["y"])
    loss.backward()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) / 2**20 if cuda else float(
        "nan"
    )


def bench(argv: list[str]) -> dict:
    """`python eval.py bench`: a network against the same one written plainly, alternating step by step in one run."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py bench",
        usage="python eval.py bench [--task han|decoder|ast] [options]",
        description="""\
Time of a training step, in ms, against the same network written plainly, on made-up data of real size; needs no data set.

    python eval.py bench --task han                            two minutes on two cores
    python eval.py bench --task decoder --amp bf16 --steps 10""",
    )
    parser.add_argument(
        "--task", choices=["han", "decoder", "ast"], default="han", help="network to time (%(default)s)"
    )
    parser.add_argument("--width", type=number(int, 1), help="size of the model (256; decoder: hidden 512)")
    parser.add_argument("--batch", type=number(int, 1), help="items per step (8; decoder 64; ast 2)")
    parser.add_argument(
        "--amp",
        choices=["off", "bf16", "fp16"],
        default="off",
        help="mixed precision; the plain decoder and AST stay float32 (%(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=number(int, 1),
        help="steps timed of each, after 3 of warm-up (20; decoder and ast 5, after 1); the median counts",
    )
    parser.add_argument("--preset", choices=[*AST_PRESETS], help="ast: size of the model (small)")
    parser.add_argument(
        "--frames", type=number(int, PATCH), help="ast: length of a clip, in frames of 10 ms (1024)"
    )
    parser.add_argument(
        "--visible-only",
        action="store_true",
        help="ast: time the encoding of visible patches only as well (off)",
    )
    parser.add_argument("--threads", type=number(int, 0), default=0, help="CPU threads (0: torch's default)")
    args = _parse(parser, argv)

    own = {
        "han": {"width": 256, "batch": 8, "steps": 20},
        "decoder": {"width": 512, "batch": 64, "steps": 5},
        "ast": {"preset": "small", "frames": 1024, "visible_only": False, "batch": 2, "steps": 5},
    }[args.task]
    if foreign := [
        f"--{key.replace('_', '-')}"
        for key in ("width", "preset", "frames", "visible_only")
        if getattr(args, key) and key not in own
    ]:
        raise DataError(
            f"bench --task {args.task}: {', '.join(foreign)} given; expected {', '.join(f'--{key}' for key in own)}; leave it out".replace(
                "_", "-"
            )
        )
    for key, default in own.items():
        setattr(args, key, getattr(args, key) or default)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, amp = args.device, {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    torch.manual_seed(7)
    if args.task == "decoder":
        return bench_decoder(args, amp)
    if args.task == "ast":
        return bench_ast(args, amp)
    model = HAN(input_size=len(column_names(FEATURES)), size=args.width).to(device)
    rivals = {"HAN": model, "plain": plain_from_han(model).to(device)}
    batch = to_device(collate_han(random_items(args.batch)), device)
    with torch.no_grad():
        logits = [rival.eval()(batch) for rival in rivals.values()]
    difference = float((logits[0] - logits[1]).abs().max())
    taken: dict[str, list] = {name: [] for name in rivals}
    for step in range(3 + args.steps):
        for name, rival in rivals.items():
            figures = _timed_step(rival.train(), batch, amp, device)
            if step >= 3:
                taken[name].append(figures)
    median = {name: np.median(values, axis=0) for name, values in taken.items()}
    about = hardware(device)
    print(
        f"{about['gpu'] or about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}, "
        f"device {device.type}, dtype {'float32' if amp is None else args.amp}, {datetime.now(timezone.utc):%Y-%m-%d}"
    )
    print(
        f"batch {args.batch}: {int(batch['lengths'].sum())} notes, longest {int(batch['lengths'].max())}; width {args.width}, "
        f"{sum(w.numel() for w in model.parameters()) / 1e6:.1f} M parameters; median of {args.steps} steps"
    )
    for name, (seconds, memory) in median.items():
        peak = f", peak {memory:.0f} MiB" if device.type == "cuda" else ""
        print(f"{name:<6} {1000 * seconds:8.1f} ms/step {args.batch / seconds:8.1f} items/s{peak}")
    ratio = float(median["plain"][0] / median["HAN"][0])
    if device.type == "cpu":
        print(
            f"peak memory of the process, both networks: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
        )
    print(f"ratio plain / HAN {ratio:.2f}; outputs differ by at most {difference:.1e} (float32, eval)")
    return {
        "ratio": ratio,
        "difference": difference,
        **{f"{name}_seconds": float(m[0]) for name, m in median.items()},
    }


# ------------------------------------------------------------------------------------------------------------
# Phoneme error rate
# ------------------------------------------------------------------------------------------------------------

SIL = PHONEMES.index("SIL")
DAY_HELP = "decoder: day layer of sessions unknown to the model (off: they are refused)"


def ctc_greedy(logits: Tensor | np.ndarray, frames: Tensor | np.ndarray) -> list[list[int]]:
    """Most probable class of each frame, equal neighbours merged, then blank 0 dropped: one list of ids a
    trial.

    logits (B, F, 41), of any monotonous scale; frames (B,): valid frames, the rest is padding."""
    best = torch.as_tensor(logits).argmax(-1).tolist()
    decoded = []
    for row, n in zip(best, torch.as_tensor(frames).tolist(), strict=True):
        decoded.append([k for k, _ in itertools.groupby(row[:n]) if k != 0])
    return decoded


def edit_counts(reference: Iterable, hypothesis: Iterable) -> tuple[int, int, int]:
    """(substitutions, deletions, insertions) of a minimal script that turns the reference into the
    hypothesis."""
    tags = [edit.tag for edit in Levenshtein.editops(list(reference), list(hypothesis))]
    return tags.count("replace"), tags.count("delete"), tags.count("insert")


def per_counts(refs: Iterable, hyps: Iterable) -> np.ndarray:
    """(n, 4) int64 of n trials: substitutions, deletions, insertions, reference length."""
    rows = [(*edit_counts(ref, hyp), len(ref)) for ref, hyp in zip(refs, hyps, strict=True)]
    return np.array(rows, np.int64).reshape(-1, 4)


def error_rate(counts: np.ndarray) -> float:
    """Errors of all trials over their labels (micro average) of `per_counts`; NaN where there is no label at
    all."""
    *errors, labels = np.sum(counts, axis=0)
    return float(sum(errors) / labels) if labels else math.nan


def trial_bootstrap(counts: np.ndarray, n: int = 1000, seed: int = 7) -> list[float]:
    """95 % interval of `error_rate` when trials are drawn with replacement; NaN with fewer than two
    trials."""
    return percentile_interval(resample(error_rate, range(len(counts)), None, counts, n=n, seed=seed))


def decoder_scores(refs: list, hyps: list, days: Iterable[int], day_names: list[str]) -> dict:
    """Phoneme error rate of trials: per, sub, del, ins, labels, trials, per_without_sil (SIL left out on both
    sides) and by_day {day name: per, sub, del, ins, labels, trials}, all micro-averaged. The trainer logs the
    same figures.

    refs, hyps: phoneme ids of each trial; days: index of each trial's day in day_names."""

    def figures(counts):
        totals = dict(zip(("sub", "del", "ins", "labels"), counts.sum(0).tolist(), strict=True))
        return {"per": error_rate(counts), **totals, "trials": len(counts)}

    counts, days = per_counts(refs, hyps), np.asarray(days)
    speech = [[[k for k in sequence if k != SIL] for sequence in side] for side in (refs, hyps)]
    return {
        **figures(counts),
        "per_without_sil": error_rate(per_counts(*speech)),
        "by_day": {day_names[day]: figures(counts[days == day]) for day in np.unique(days)},
    }


def speech_logits(model, corpus: SpeechCorpus, indices, days, device, batch: int = 64) -> list[np.ndarray]:
    """Log-probabilities (F, 41) float32 of each trial, in the order given; (0, 41) where it is shorter than
    one window.

    indices: trial numbers; days (corpus days,): the model's index of each day of the corpus, from
    data.map_days. Batches hold trials of similar length; the model is evaluated without dropout and left in
    the mode it came in."""
    indices, training = np.asarray(indices, np.int64), model.training
    order = np.argsort(corpus.lengths[indices], kind="stable")
    days = torch.as_tensor(days)
    result: list = [None] * len(indices)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            items = collate_speech([speech_item(corpus, i) for i in indices[chosen]])
            logits, frames = model(items["x"].to(device), items["lengths"], days[items["day"]].to(device))
            log_probs = logits.float().log_softmax(-1).cpu().numpy()
            for i, row, n in zip(chosen, log_probs, frames.tolist(), strict=True):
                result[i] = row[:n].copy()
    model.train(training)
    return result


def mean_logits(loaded: list[tuple], corpus: SpeechCorpus, trials: np.ndarray, args) -> list[np.ndarray]:
    """`speech_logits` of one checkpoint, or of several the logarithm of their mean probability. args: day,
    device, batch."""
    total: list = []
    used = np.unique(corpus.day[trials])
    for _, model, ckpt in loaded:
        days = np.full(len(corpus.days), -1)
        days[used] = map_days([corpus.days[d] for d in used], ckpt["data"]["days"], args.day)
        each = speech_logits(model.to(args.device), corpus, trials, days, args.device, args.batch or 64)
        total = [np.logaddexp(a, b) for a, b in zip(total, each, strict=True)] if total else each
    return [row - np.float32(np.log(len(loaded))) for row in total]


def transcripts(log_probs: list[np.ndarray], corpus: SpeechCorpus, trials: Iterable[int]) -> list[dict]:
    """Of labelled trials: {"trial", "day" (names), "reference", "hypothesis" (phoneme ids, greedy),
    "frames"}; log_probs (F, 41) each."""
    return [
        {
            "trial": corpus.ids[i],
            "day": corpus.days[corpus.day[i]],
            "reference": corpus.labels[i].tolist(),
            "hypothesis": ctc_greedy(row[None], [len(row)])[0],
            "frames": len(row),
        }
        for i, row in zip(trials, log_probs, strict=True)
    ]


def evaluate_decoder(args: argparse.Namespace, loaded: list[tuple]) -> dict:
    """Phoneme error rate of one decoder, or of the mean probabilities of several, on args.part: the figures
    of `decoder_scores`, their 95 % interval over trials and the most frequent substitutions; "words" where
    these were asked for."""
    corpus = _speech_corpus(args, loaded)
    parts = speech_parts(corpus, loaded[0][2]["data"]["valid"])
    trials = parts[args.part]
    labelled = corpus.labelled[trials] & (args.part != "competition")
    if not labelled.any() and (not args.submission or args.csv or args.save_results or not len(trials)):
        raise DataError(f"--part {args.part}: {len(trials)} trials without labels; give --submission alone")
    _say_circumstances(args, loaded, corpus, trials)
    log_probs, figures, records = mean_logits(loaded, corpus, trials, args), {}, []
    if labelled.any():
        scored = trials[labelled]
        records = transcripts(list(itertools.compress(log_probs, labelled)), corpus, scored)
        refs, hyps = ([record[side] for record in records] for side in ("reference", "hypothesis"))
        figures = {
            **decoder_scores(refs, hyps, corpus.day[scored], corpus.days),
            "interval": trial_bootstrap(per_counts(refs, hyps)),
            "unlabelled": len(trials) - len(scored),
            "too_short": sum(record["frames"] < frames_needed(record["reference"]) for record in records),
            "substitutions": substitutions(refs, hyps),
        }
        decoder_report(figures, records, args.part)
    if args.words or args.tune or args.submission:
        valid = (log_probs, trials)
        if args.tune and args.part != "valid":
            valid = (mean_logits(loaded, corpus, parts["valid"], args), parts["valid"])
        figures["words"] = words(log_probs, corpus, trials, args, valid, parts["train"])
    _write_decoder(figures, records, corpus, args, loaded)
    return figures


def _shared_settings(loaded):
    """The data settings of decoders whose probabilities can be averaged; DataError names the first that
    differs."""
    alike = ("kernel", "stride", "channels", "valid", "synthetic", "phonemes", "rules")
    return _check_alike(loaded, alike, {"phonemes": list(PHONEMES), "rules": speech_rules()})


def _speech_corpus(args, loaded):
    """The corpus of --data, which must be given where the decoders learned from real data, and fit them."""
    data = _shared_settings(loaded)
    _refuse_synthetic(data, args)
    if not args.data:
        print("no --data: the built-in SYNTHETIC corpus; the real one: Dryad, doi 10.5061/dryad.x69p8czpq")
    corpus = open_speech(args.data or synthetic_speech(args.cache), args.cache)
    for line in corpus.left_out:
        print(f"left out: {line}")
    if corpus.channels != data["channels"]:
        raise DataError(f"{corpus.root}: {corpus.channels} channels; {args.ckpt[0]} has {data['channels']}")
    return corpus


def _say_circumstances(args, loaded, corpus, trials):
    """Which checkpoints, which trials, and what a reader must know before believing the figures."""
    data = loaded[0][2]["data"]
    seeds = [ckpt["args"].get("seed") for _, _, ckpt in loaded]
    print(f"{args.ckpt[0]}: {len(loaded)} checkpoints, probabilities averaged, seeds {seeds}")
    print(corpus_line(corpus.synthetic, corpus.root))
    _say_other_corpus(data, corpus.synthetic)
    if data["valid"] == "test" and args.part in ("valid", "test"):
        print("the checkpoint was chosen on the test part (--valid test): its score there is no result")
    for path, _, ckpt in loaded:
        known = ckpt["data"]["days"]
        for day in [corpus.days[d] for d in np.unique(corpus.day[trials])]:
            if args.day and day not in known:
                layer = map_days([day], known, args.day)[0]
                used = "the mean of all day layers" if layer < 0 else f"day layer of {known[layer]}"
                print(f"session {day}: unknown to {path}; {used}")


def substitutions(refs: list, hyps: list, most: int = 10) -> list[list]:
    """The most frequent [reference phoneme, decoded phoneme, times]."""
    pairs: Counter = Counter()
    for ref, hyp in zip(refs, hyps, strict=True):
        edits = Levenshtein.editops(ref, hyp)
        pairs.update((ref[e.src_pos], hyp[e.dest_pos]) for e in edits if e.tag == "replace")
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [[PHONEMES[a], PHONEMES[b], times] for (a, b), times in ranked[:most]]


def spell(ids: Iterable[int]) -> str:
    """Phoneme names of class ids, separated by blanks."""
    return " ".join(PHONEMES[k] for k in ids)


def print_samples(names: list[str], references: list[str], decoded: list[str]) -> None:
    """Prints five evenly spaced trials."""
    for k in np.unique(np.linspace(0, len(names) - 1, 5).astype(int)):
        print(f"{names[k]}\n  reference  {references[k]}\n  decoded    {decoded[k]}")


def decoder_report(figures: dict, records: list[dict], part: str) -> None:
    """Prints figures of `evaluate_decoder`: totals, a line a day, substitutions, and sample transcripts."""
    print(f"{part}: PER {figures['per']:.4f} 95 % {brackets(figures['interval'])}")
    print(
        f"PER without SIL {figures['per_without_sil']:.4f}; {figures['unlabelled']} more trials have no label"
    )
    print(
        f"{figures['too_short']} trials have fewer frames than their labels need: never decoded without error"
    )
    columns = ["trials", "labels", "per", "sub", "del", "ins"]
    days = [*figures["by_day"].items(), ("all", figures)]
    print_table(["session", *columns], [[day, *(f[key] for key in columns)] for day, f in days])
    print(
        "substitutions, reference > decoded:",
        ", ".join(f"{a} > {b} {n}" for a, b, n in figures["substitutions"]),
    )
    spelt = [[spell(record[side]) for record in records] for side in ("reference", "hypothesis")]
    print_samples([record["trial"] for record in records], *spelt)


def _write_decoder(figures, records, corpus, args, loaded):
    """--csv and --save-results: a line a trial with its transcripts and counts, and the figures with their
    circumstances."""
    rows: list = [["trial", "day", "reference", "hypothesis", "sub", "del", "ins", "labels"]]
    for record in records:
        ref, hyp = record["reference"], record["hypothesis"]
        rows.append(
            [record["trial"], record["day"], spell(ref), spell(hyp), *edit_counts(ref, hyp), len(ref)]
        )
    if args.csv:
        write_csv(args.csv, rows)
        print(f"transcripts of {len(records)} trials in {args.csv}")
    if args.save_results:
        stem = Path(args.results_dir) / f"decoder_{args.save_results}_{args.part}"
        write_csv(f"{stem}.csv", rows)
        about = {"task": "decoder", "part": args.part, "synthetic": corpus.synthetic, "day_rule": args.day}
        about |= {
            "valid": loaded[0][2]["data"]["valid"],
            **_checkpoints([(path, ckpt) for path, _, ckpt in loaded]),
        }
        save_results(stem, args, about, {"metrics": figures})


# ------------------------------------------------------------------------------------------------------------
# Words
# ------------------------------------------------------------------------------------------------------------

# Search settings to start from: acoustic scale and blank penalty of the public decoders ('24: 256 channels,
# '25: 512). LM scores are log10: a weight of ln 10 would set them beside the network's natural logarithms.
# With the transcripts' trigram that deletes words: validation WER .058 against .018 at 1 (synthetic corpus).
WORD_SETTINGS = {
    256: {"acoustic_scale": 0.5, "blank_penalty": math.log(7)},
    512: {"acoustic_scale": 0.325, "blank_penalty": math.log(90)},
}
WORD_GRID = {
    "lm_weight": (0.25, 0.5, 1.0, 1.6, 2.3, 3.5, 5.0),
    "blank_penalty": tuple(math.log(k) for k in (1, 2, 7, 25, 90)),
    "acoustic_scale": (0.2, 0.325, 0.5, 0.8, 1.2),
    "word_score": (-3.0, -1.5, 0.0, 1.5, 3.0),
}
MOST_HOMOPHONES = 6  # of one pronunciation; the library's trie drops any further one
COMPETITION_SIZE = 1200, 15  # rows and days of the '24 competition part
Lexicon = list[
    tuple[str, tuple[int, ...]]
]  # (word, phoneme ids without the last SIL), several a word are fine


def spoken_words(text: str) -> list[str]:
    """Words of a transcript as they are trained on and scored: cleaned as `data.phonemize` does, those
    without a letter left out."""
    return [word for word in clean_sentence(text).split() if re.search("[a-z]", word)]


def read_lexicon(path: str | Path) -> Lexicon:
    """Lines "word PH PH ...", in the file's order, each once. Of the CMU dictionary's habits are understood:
    stress digits, variants "word(2)", comments after ";;;"; and a SIL at the end. DataError names a line
    without phonemes, or with others."""
    ids = {name: i for i, name in enumerate(PHONEMES)}
    entries: dict[tuple, None] = {}
    try:
        for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            word, *names = line.split() or [";;;"]
            if word.startswith(";;;"):
                continue
            sounds = tuple(ids.get(name.rstrip("012"), 0) for name in names)
            if sounds[-1:] == (SIL,):
                sounds = sounds[:-1]
            if not sounds or 0 in sounds or word.lower() in ("<s>", "</s>", "<unk>"):
                raise ValueError(f"line {n}, {line[:60]!r}")
            entries[re.sub(r"\(\d+\)$", "", word).lower(), sounds] = None
        if not entries:
            raise ValueError("no word in it")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; expected lines of a word and some of{' '.join(ids)}") from error
    return list(entries)


def training_lexicon(texts: Iterable[str], labels: Iterable) -> Lexicon:
    """Every word of the transcripts, most frequent first. labels: phoneme ids of each transcript.

    Where they have as many pieces between SILs as there are words, the pieces are the words' pronunciations,
    so that a homograph keeps all that it was trained with; words only met elsewhere go to
    `data.phonemize`."""
    seen: Counter = Counter()
    frequency: Counter = Counter()
    for text, ids in zip(texts, labels, strict=True):
        sentence, pieces = spoken_words(text), split_at_silence(ids)
        frequency.update(sentence)
        if len(pieces) == len(sentence):
            seen.update(zip(sentence, pieces, strict=True))
    for word in frequency.keys() - {word for word, _ in seen}:
        seen[word, tuple(k for k in phonemize(word) if k != SIL)] += 1
    return sorted(filter(lambda e: e[1], seen), key=lambda e: (-frequency[e[0]], e[0], -seen[e], e[1]))


def split_at_silence(ids: Iterable[int]) -> list[tuple[int, ...]]:
    return [tuple(piece) for silent, piece in itertools.groupby(map(int, ids), SIL.__eq__) if not silent]


def witten_bell(sentences: Iterable[list[str]], order: int = 3) -> dict[tuple[str, ...], list]:
    """{n-gram: [probability, back-off weight]} of an interpolated Witten-Bell model (Witten & Bell 1991; Chen
    & Goodman 1999).

    P(w | h) = (c(h w) + t(h) P(w | h')) / (c(h) + t(h)), t(h) the number of different words after h, h'
    without h's first word, and 1 / V below the unigrams, V the words with </s> and <unk>. An unseen w gets
    t(h) / (c(h) + t(h)) P(w | h'): the back-off form."""
    counts: Counter = Counter()
    for sentence in sentences:
        padded = ("<s>", *sentence, "</s>")
        for n in range(1, order + 1):
            counts.update(padded[i : i + n] for i in range(len(padded) - n + 1))
    if not counts:
        raise DataError("language model: no training transcript; expected at least one; give --lm FILE")
    del counts[("<s>",)]  # given, never predicted
    tokens: Counter = Counter()
    types: Counter = Counter()
    for gram, count in counts.items():
        tokens[gram[:-1]] += count
        types[gram[:-1]] += 1
    counts[("<unk>",)] = 0
    uniform = 1 / sum(len(gram) == 1 for gram in counts)
    model: dict[tuple[str, ...], list] = {}
    for gram in sorted(counts, key=lambda gram: (len(gram), gram)):
        h = gram[:-1]
        below = model[gram[1:]][0] if h else uniform
        model[gram] = [(counts[gram] + types[h] * below) / (tokens[h] + types[h]), 1.0]
    model[("<s>",)] = [1e-99, 1.0]
    for h in types.keys() - {()}:
        model[h][1] = types[h] / (tokens[h] + types[h])
    return model


def write_arpa(path: str | Path, model: dict[tuple[str, ...], list]) -> None:
    """Writes the model of `witten_bell` as an ARPA file: log10 probability, words, log10 back-off weight."""
    sections: dict[int, list[str]] = {}
    for gram, (p, backoff) in sorted(model.items()):
        line = f"{math.log10(p):.7f}\t{' '.join(gram)}\t{math.log10(backoff):.7f}"
        sections.setdefault(len(gram), []).append(line)
    highest = max(sections)
    sections[highest] = [
        line.rpartition("\t")[0] for line in sections[highest]
    ]  # these have no back-off weight
    text = "\\data\\\n"
    for n in sorted(sections):
        text += f"ngram {n}={len(sections[n])}\n"
    for n in sorted(sections):
        text += "\n".join(["", f"\\{n}-grams:", *sections[n], ""])
    write_atomic(Path(path), lambda file: file.write(f"{text}\n\\end\\\n".encode()))


def load_lm(path: str | Path, vocabulary: list[str]) -> tuple:
    """KenLM of an ARPA or binary file for these words: (lm, log10 unigram scores, how many the LM knows). A
    word's id is its place.

    Where it knows less than half of them they are tried in capitals, as public LMs are written. DataError on
    a file that is no LM or knows none."""
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    best: tuple = (None, [], 0)
    for form in (str.lower, str.upper):
        try:
            with _silent_stderr():
                lm = KenLM(str(path), Dictionary([*map(form, vocabulary), "<unk>"]))
        except (RuntimeError, ValueError) as error:
            found = str(error).strip().splitlines()[-1:]
            raise DataError(f"{path}: {found}; expected an n-gram model, ARPA or KenLM's binary") from error
        start = lm.start(True)  # of no sentence: the score is the unigram's
        *scores, unknown = [lm.score(start, i)[1] for i in range(len(vocabulary) + 1)]
        known = len(scores) - scores.count(unknown)
        if known > best[2]:
            best = (lm, scores, known)
        if 2 * known >= len(vocabulary):
            break
    if not best[2]:
        raise DataError(f"{path}: knows none of {len(vocabulary)} words, such as {vocabulary[0]!r}")
    return best


@contextlib.contextmanager
def _silent_stderr():
    """KenLM draws a progress bar on the process's stderr, past Python."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class WordSearch:
    """Beam search over a lexicon's trie with an n-gram LM (flashlight's LexiconDecoder, KenLM inside).

    `known`: words that the LM knows, the rest score as <unk>; `dropped`: homophones beyond MOST_HOMOPHONES,
    the least frequent by the LM."""

    def __init__(self, lexicon: Lexicon, lm: str | Path):
        try:
            from flashlight.lib.text import decoder as flashlight
            from flashlight.lib.text.decoder import kenlm  # noqa: F401
        except ImportError as error:
            raise DataError(f"--words: {error}; run `pip install ufal-flashlight-text`") from error
        self.library = flashlight
        self.words = list(dict.fromkeys(word for word, _ in lexicon))
        self.lm, scores, self.known = load_lm(lm, self.words)
        number_of = {word: i for i, word in enumerate(self.words)}
        spoken: dict[tuple[int, ...], list[int]] = {}
        for word, sounds in lexicon:
            spoken.setdefault(sounds, []).append(number_of[word])
        self.dropped = 0
        self.trie = flashlight.Trie(len(PHONEMES), SIL)
        for sounds, members in spoken.items():
            members.sort(key=lambda i: -scores[i])
            self.dropped += len(members[MOST_HOMOPHONES:])
            for i in members[:MOST_HOMOPHONES]:
                self.trie.insert([*sounds, SIL], i, scores[i])
        self.trie.smear(flashlight.SmearingMode.MAX)

    def decode(self, log_probs: np.ndarray, settings: dict) -> list[str]:
        """Words of one trial: log_probs (F, 41), settings as in `words`. No frame, no word."""
        if not len(log_probs):
            return []
        emissions = settings["acoustic_scale"] * np.asarray(log_probs, np.float32)
        emissions[:, 0] -= settings["acoustic_scale"] * settings["blank_penalty"]
        emissions = np.ascontiguousarray(emissions, np.float32)  # its address goes to the library
        if not np.isfinite(emissions).all():
            raise DataError("--words: log-probabilities that are not finite; look at the model's weights")
        options = self.library.LexiconDecoderOptions(
            beam_size=settings["beam"],
            beam_size_token=settings["token_beam"],
            beam_threshold=25.0,
            lm_weight=settings["lm_weight"],
            word_score=settings["word_score"],
            unk_score=-math.inf,
            sil_score=0.0,
            log_add=False,
            criterion_type=self.library.CriterionType.CTC,
        )
        decoder = self.library.LexiconDecoder(options, self.trie, self.lm, SIL, 0, len(self.words), [], False)
        best = decoder.decode(emissions.ctypes.data, *emissions.shape)[0]
        return [self.words[i] for i in best.words if i >= 0]


@contextlib.contextmanager
def word_decoder(lexicon: Lexicon, lm: str | Path, processes: int = 1):
    """Gives decode(list of log_probs, settings) -> list of sentences, and the WordSearch, for the length of a
    with block.

    The library holds Python's lock, so threads gain nothing; with processes > 1 each builds a search of its
    own."""
    search = WordSearch(lexicon, lm)
    if processes == 1:
        yield lambda trials, settings: [search.decode(trial, settings) for trial in trials], search
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_decoding, (lexicon, lm)) as pool:
        answer = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # workers inherit this: Ctrl-C is answered here alone
        for _ in range(processes):  # a task starts a worker as long as none is ready
            pool.submit(int)
        signal.signal(signal.SIGINT, answer)
        yield (
            lambda trials, settings: list(pool.map(_decode_words, trials, itertools.repeat(settings))),
            search,
        )


def _start_decoding(lexicon, lm):
    _decode_words.search = WordSearch(lexicon, lm)


def _decode_words(log_probs, settings):
    return _decode_words.search.decode(log_probs, settings)


def nearest_words(sequences: Iterable[list[int]], lexicon: Lexicon) -> list[list[str]]:
    """The yardstick without LM and search: greedy phoneme ids cut at SIL, for each piece the lexicon's word
    at the fewest edits, the earlier one of equals (the more frequent, of `training_lexicon`)."""
    spoken = [sounds for _, sounds in lexicon]

    @functools.cache
    def nearest(piece):
        return lexicon[process.extractOne(piece, spoken, scorer=Levenshtein.distance)[2]][0]

    return [[nearest(piece) for piece in split_at_silence(sequence)] for sequence in sequences]


def tune_words(
    decode: Callable, log_probs: list, references: list[list[str]], settings: dict
) -> tuple[dict, dict]:
    """Coordinate search over WORD_GRID from the settings given, by word errors: (settings, {before, after:
    WER, searches, sentences}).

    One setting after the other takes the value with the fewest errors, what it had among equals, until a
    round changes none."""
    if not any(references):
        raise DataError("--tune: no labelled validation trial; leave it out or give the settings")
    tried: dict[tuple, float] = {}

    def wer(candidate):
        key = tuple(candidate.values())
        if key not in tried:
            tried[key] = error_rate(per_counts(references, decode(log_probs, candidate)))
        return tried[key]

    before, last = wer(settings), None
    while settings != last:
        last = settings
        for name, values in WORD_GRID.items():
            settings = min((settings | {name: value} for value in (settings[name], *values)), key=wer)
    after = wer(settings)
    return settings, {"before": before, "after": after, "searches": len(tried), "sentences": len(references)}


def write_submission(
    path: str | Path, sentences: list[str], corpus: SpeechCorpus, indices: np.ndarray
) -> None:
    """Writes the sentences of one whole part in the competitions' order: by session name, then by trial
    number.

    FILE.csv: columns id (row number from 0) and text ('25); any other: a sentence a line ('24). Any part may
    be written, but all of it: DataError where a trial is missing or doubled, or where the '24 competition
    part is not 1200 rows of 15 days."""
    parts = {str(corpus.part[i]) for i in indices}
    whole = np.flatnonzero(np.isin(corpus.part, list(parts)))
    found = sum(row["found"] for row in corpus.report.get("days", ()) if row["part"] in parts)
    rows = sorted(zip((corpus.days[corpus.day[i]] for i in indices), indices, sentences, strict=True))
    size = len(rows), len({day for day, *_ in rows})
    public = parts == {"competition"} and corpus.channels == 256 and not corpus.synthetic
    if public and rows[0][0].startswith("t12.") and size != COMPETITION_SIZE:
        raise DataError(f"{path}: {size} rows and days; expected {COMPETITION_SIZE}; convert anew")
    if len(parts) != 1 or sorted(indices) != whole.tolist() or found > len(rows):
        raise DataError(
            f"{path}: {len(rows)} rows of {sorted(parts)}, of {max(found, len(whole))} trials; expected "
            "each trial of one part once; give --part, or see what the conversion left out"
        )
    texts = [text for *_, text in rows]
    if str(path).endswith(".csv"):
        write_csv(path, [("id", "text"), *enumerate(texts)])
    else:
        write_atomic(Path(path), lambda file: file.write("".join(f"{text}\n" for text in texts).encode()))
    print(f"{path}: {len(rows)} sentences of {size[1]} days, {texts.count('')} of them empty")
    print(f"{len(corpus.left_out)} items of the corpus were left out by its conversion")


def word_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Adds the options of `words`, which runs when --words, --tune or --submission is given, and returns
    them."""
    add = parser.add_argument_group(
        "words", "beam search over a lexicon with an n-gram LM (decoder)"
    ).add_argument
    scale, penalty = "factor of log-probabilities", "taken off blank, in nats"
    return [
        add("--words", action="store_true", help="report the word error rate beside PER (off)"),
        add("--tune", action="store_true", help="first choose settings on the validation part (off)"),
        add("--submission", metavar="FILE", help="write .csv of id,text ('25), else lines ('24) (off)"),
        add("--lexicon", metavar="FILE", help="word and phonemes a line (default: training words)"),
        add(
            "--lm",
            metavar="FILE",
            help="n-gram ARPA or KenLM file (default: training trigram)",
        ),
        add(
            "--acoustic-scale",
            type=number(float, 0, 100),
            help=f"{scale} (default: 0.5; 512 channels: 0.325)",
        ),
        add(
            "--blank-penalty",
            type=number(float, -100, 100),
            help=f"{penalty} (default: log 7; 512 channels: log 90)",
        ),
        add(
            "--lm-weight",
            type=number(float, 0, 100),
            default=1.0,
            help="factor of the LM's log10 (%(default)s)",
        ),
        add(
            "--word-score",
            type=number(float, -100, 100),
            default=0.0,
            help="added for every word (%(default)s)",
        ),
        add("--beam", type=number(int, 1), default=100, help="hypotheses kept a frame (%(default)s)"),
        add(
            "--token-beam",
            type=number(int, 1, 41),
            default=41,
            help="phonemes tried a frame (%(default)s: all)",
        ),
        add("--processes", type=number(int, 1), default=1, help="processes that search (%(default)s)"),
    ]


def word_model(corpus: SpeechCorpus, train: Iterable[int], args: argparse.Namespace) -> tuple[Lexicon, str]:
    """(lexicon, LM file): those given, else made from the transcripts of the trials `train`."""
    texts = [corpus.text[i] for i in train]
    if args.lexicon:
        lexicon = read_lexicon(args.lexicon)
    else:
        lexicon = training_lexicon(texts, [corpus.labels[i] for i in train])
    if not lexicon:
        raise DataError(f"{corpus.root}: no word in its training transcripts; give --lexicon and --lm")
    if args.lm:
        return lexicon, args.lm
    sentences = [spoken_words(text) for text in texts]
    path = f"{args.cache}/trigram-{hashlib.sha1(repr(sentences).encode()).hexdigest()[:12]}.arpa"
    write_arpa(path, witten_bell(filter(None, sentences)))
    return lexicon, path


def words(
    log_probs: list, corpus: SpeechCorpus, indices: np.ndarray, args, valid: tuple, train: Iterable[int]
) -> dict:
    """Decodes trials into words, prints and returns WER (0 to 1) and what it was got with; writes
    --submission.

    log_probs: (F, 41) of each trial of indices. valid: (log_probs, indices) of the validation part, for
    --tune. train: trials whose transcripts make the lexicon and the LM. Without any labelled trial there is
    no WER, and never for the competition part. DataError on unreadable files, on --tune without labels, on an
    incomplete submission."""
    start_at = WORD_SETTINGS.get(corpus.channels, WORD_SETTINGS[256])
    settings = {name: getattr(args, name) for name in (*WORD_GRID, "beam", "token_beam")}
    settings |= {name: value for name, value in start_at.items() if settings[name] is None}
    lexicon, lm = word_model(corpus, train, args)
    figures: dict = {key: getattr(args, key) or "training transcripts" for key in ("lexicon", "lm")}
    with word_decoder(lexicon, lm, args.processes) as (decode, search):
        print(f"{len(search.words)} words, {len(lexicon)} pronunciations from {figures['lexicon']}")
        print(f"LM {lm} knows {search.known} of them; {search.dropped} homophones left out")
        if args.tune:
            settings, figures["tuned"] = _tune(decode, corpus, settings, *valid)
        start = time.perf_counter()
        sentences = decode(log_probs, settings)
        spent = 1000 * (time.perf_counter() - start) / max(1, len(sentences))
    figures |= {"settings": settings, "sentences": len(sentences), "ms_per_sentence": spent}
    scored = corpus.labelled[indices] & (corpus.part[indices] != "competition")
    if scored.any():
        trials = indices[scored]
        references = [spoken_words(corpus.text[i]) for i in trials]
        decoded = list(itertools.compress(sentences, scored))
        greedy = [
            record["hypothesis"]
            for record in transcripts(list(itertools.compress(log_probs, scored)), corpus, trials)
        ]
        known = set(search.words)
        figures["outside_lexicon"] = sum(word not in known for word in itertools.chain(*references))
        figures |= _word_figures("wer", references, decoded)
        figures |= _word_figures("nearest", references, nearest_words(greedy, lexicon))
        if args.tune and set(trials) & set(valid[1]):
            print("the search was tuned on these very sentences")
        print(f"{figures['outside_lexicon']} words are outside the lexicon; {spent:.1f} ms a sentence")
        spelt = [[" ".join(sentence) for sentence in side] for side in (references, decoded)]
        print_samples([corpus.ids[i] for i in trials], *spelt)
    else:
        print(f"words: {len(sentences)} sentences decoded, none labelled: no WER")
    if args.submission:
        write_submission(args.submission, [" ".join(sentence) for sentence in sentences], corpus, indices)
    return figures


def _tune(decode, corpus, settings, log_probs, trials):
    """`tune_words` on the labelled ones of these trials, and what it found printed."""
    labelled = corpus.labelled[trials]
    references = [spoken_words(corpus.text[i]) for i in trials[labelled]]
    settings, tuned = tune_words(decode, list(itertools.compress(log_probs, labelled)), references, settings)
    flags = " ".join(f"--{name.replace('_', '-')} {settings[name]:.4g}" for name in WORD_GRID)
    print(f"tuned on {tuned['sentences']} validation sentences by {tuned['searches']} searches: {flags}")
    print(f"WER there {tuned['before']:.4f} -> {tuned['after']:.4f}")
    return settings, tuned


def _word_figures(name, references, hypotheses):
    """WER, its interval and counts under this name, and a line that says them."""
    counts = per_counts(references, hypotheses)
    figures = {
        name: error_rate(counts),
        f"{name}_interval": trial_bootstrap(counts),
        f"{name}_counts": dict(zip(("sub", "del", "ins", "words"), counts.sum(0).tolist(), strict=True)),
    }
    title = {"wer": "lexicon and LM", "nearest": "greedy phonemes to the nearest words"}[name]
    interval = brackets(figures[f"{name}_interval"])
    print(f"WER, {title}: {figures[name]:.4f} 95 % {interval} {figures[f'{name}_counts']}")
    return figures


# -----------------------------------------------------------------------------------------------------------------
# Bench: decoder
# -----------------------------------------------------------------------------------------------------------------


class PlainGRUDecoder(nn.Module):
    """The network of `models.GRUDecoder` (one direction, no LayerNorm) with the same weights, as the public baseline computes
    it: a depthwise filter per channel, windows materialised by unfold, one multi-layer GRU over the padding too."""

    def __init__(self, model: GRUDecoder):
        super().__init__()
        sizes = model.model_args
        if sizes["bidirectional"] or sizes["layer_norm"] or not sizes["smooth_width"]:
            raise ValueError(f"plain decoder: only one direction, no LayerNorm, with smoothing; got {sizes}")
        self.register_buffer("smoothing", model.smoothing.detach().repeat(sizes["channels"], 1, 1))
        self.day_weight, self.day_bias = (
            nn.Parameter(value.detach().clone()) for value in (model.day_weight, model.day_bias)
        )
        self.dropout = nn.Dropout(sizes["input_dropout"])
        self.unfold = nn.Unfold((model.kernel, 1), stride=model.stride)
        self.gru = nn.GRU(
            sizes["channels"] * model.kernel,
            sizes["hidden"],
            sizes["layers"],
            batch_first=True,
            dropout=sizes["dropout"],
        )
        self.linear = copy.deepcopy(model.linear)
        with torch.no_grad():
            for i, (layer,) in enumerate(model.gru):
                for name, parameter in layer.named_parameters():
                    getattr(self.gru, name.replace("_l0", f"_l{i}")).copy_(parameter)

    def forward(self, x: Tensor, lengths: Tensor, day: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, C) zero-padded, lengths (B,), day (B,) -> logits (B, F, 41), frames (B,)."""
        taps = self.smoothing.shape[-1]
        x = functional.pad(x.transpose(1, 2), ((taps - 1) // 2, taps // 2))
        x = functional.conv1d(x, self.smoothing, groups=x.shape[1]).transpose(1, 2)
        x = torch.einsum(
            "btc,bcd->btd", x, self.day_weight.index_select(0, day)
        ) + self.day_bias.index_select(0, day).unsqueeze(1)
        windows = self.unfold(
            self.dropout(functional.softsign(x)).transpose(1, 2).unsqueeze(3)
        )  # (B, C * kernel, F)
        hidden, _ = self.gru(windows.transpose(1, 2))
        return self.linear(hidden), output_frames(lengths, self.unfold.kernel_size[0], self.unfold.stride)


def random_speech(trials: int, channels: int = 256, days: int = 24, seed: int = 7) -> SpeechCorpus:
    """A made-up corpus in memory: noise of about 500 bins a trial, a label for every third frame."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(np.log(TRIAL_BINS), BINS_SPREAD, trials)).clip(100, 1200).astype(np.int64)
    labels = [rng.integers(1, len(PHONEMES), n // 12) for n in lengths]
    return SpeechCorpus(
        features=rng.standard_normal((lengths.sum(), channels), np.float32), offsets=np.append(0, lengths.cumsum()),
        day=rng.integers(days, size=trials), block=np.zeros(trials, np.int64), part=np.full(trials, "train"), labels=labels,
        text=[""] * trials, ids=[str(i) for i in range(trials)], days=[str(d) for d in range(days)], channels=channels, root=Path("."),
        synthetic=True, left_out=[], labelled=np.ones(trials, bool))  # fmt: skip


def _fresh_batch(dataset: Iterable, batch: int, step: int, **options) -> object:
    """The re-tune scripts' habit: a new iterator over the whole set for each step, of which one batch is used."""
    return next(
        iter(
            DataLoader(dataset, batch, shuffle=True, generator=torch.Generator().manual_seed(step), **options)
        )
    )


def _without_lengths(batch: dict, device: torch.device) -> dict:
    """The batch on the device, but for the lengths: the model and the CTC loss read them on the CPU."""
    return batch | {key: batch[key].to(device, non_blocking=True) for key in ("x", "day", "labels")}


def _decoder_loss(
    model: nn.Module, batch: dict, x: Tensor, amp: torch.dtype | None, device: torch.device
) -> Tensor:
    with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
        logits, frames = model(x, batch["lengths"], batch["day"])
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    return functional.ctc_loss(log_probs, batch["labels"], frames, batch["label_lengths"])


def _decoder_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    draw: Callable,
    amp: torch.dtype | None,
    device: torch.device,
) -> tuple:
    """Seconds of one training step, seconds of it that passed before the batch was there, peak of GPU memory in MiB."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    batch = _without_lengths(draw(), device)
    loaded = time.perf_counter()
    x = time_mask(add_noise(batch["x"], batch["lengths"], 0.2, 0.2), batch["lengths"], 1.0, 0.075, 20)
    _decoder_loss(model, batch, x, amp, device).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize(device)
    return (
        time.perf_counter() - start,
        loaded - start,
        torch.cuda.max_memory_allocated(device) / 2**20 if cuda else float("nan"),
    )


def bench_decoder(args: argparse.Namespace, amp: torch.dtype | None) -> dict:
    """Training steps of GRUDecoder (the trainer's way: one lasting loader, exact lengths) and of PlainGRUDecoder (a fresh
    iterator per step, windows, padding, float32), in turn, on the same trials, with the same noise, mask and optimiser."""
    device, warm_up = args.device, 1
    corpus, model = random_speech(4 * args.batch), GRUDecoder(hidden=args.width).to(device)
    dataset = SpeechTrials(corpus, np.arange(len(corpus.ids)), np.arange(len(corpus.days)))
    rivals = {"GRUDecoder": model, "plain": PlainGRUDecoder(model).to(device)}
    draws = [
        _fresh_batch(range(len(dataset)), args.batch, step).tolist() for step in range(warm_up + args.steps)
    ]
    workers = 4 if device.type == "cuda" else 0
    lasting = iter(
        DataLoader(
            dataset,
            batch_sampler=draws,
            collate_fn=collate_speech,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
    )
    first = _without_lengths(collate_speech([dataset[i] for i in draws[0]]), device)
    with torch.no_grad():
        losses = [
            float(_decoder_loss(rival.eval(), first, first["x"], None, device)) for rival in rivals.values()
        ]
    optimizers = {
        name: torch.optim.AdamW(rival.train().parameters(), lr=1e-3) for name, rival in rivals.items()
    }
    taken: dict[str, list] = {name: [] for name in rivals}
    for step in range(warm_up + args.steps):
        sources = {
            "GRUDecoder": lambda: next(lasting),
            "plain": lambda k=step: _fresh_batch(dataset, args.batch, k, collate_fn=collate_speech),
        }
        for name, rival in rivals.items():
            taken[name].append(
                _decoder_step(rival, optimizers[name], sources[name], amp if rival is model else None, device)
            )
    median = {name: np.median(values[warm_up:], axis=0) for name, values in taken.items()}
    lengths = [dataset.corpus.lengths[draw] for draw in draws[warm_up:]]
    about = hardware(device)
    print(
        f"{about['gpu'] or about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}, "
        f"device {device.type}, dtype {'float32' if amp is None else args.amp}, plain float32, {datetime.now(timezone.utc):%Y-%m-%d}"
    )
    print(
        f"batch {args.batch} trials of {np.mean(lengths):.0f} bins on average, longest {np.max(lengths)}; {1 - np.mean(lengths) / np.mean([n.max() for n in lengths]):.0%} "
        f"of a padded batch is padding; hidden {args.width}, {sum(w.numel() for w in model.parameters()) / 1e6:.1f} M parameters; median of {args.steps} steps"
    )
    for name, (seconds, data, memory) in median.items():
        peak = f", peak {memory:.0f} MiB" if device.type == "cuda" else ""
        print(
            f"{name:<10} {1000 * seconds:8.1f} ms/step, of which the batch took {1000 * data:.1f}; {args.batch / seconds:8.1f} trials/s{peak}"
        )
    ratio, difference = float(median["plain"][0] / median["GRUDecoder"][0]), abs(losses[0] - losses[1])
    if device.type == "cpu":
        print(
            f"peak memory of the process, both networks: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
        )
    print(
        f"ratio plain / GRUDecoder {ratio:.2f}; losses {losses[0]:.6f} and {losses[1]:.6f} differ by {difference:.1e} (float32, eval)"
    )
    return {
        "ratio": ratio,
        "difference": difference,
        "losses": losses,
        **{f"{name}_seconds": float(m[0]) for name, m in median.items()},
    }


# ------------------------------------------------------------------------------------------------------------
# Audio
# ------------------------------------------------------------------------------------------------------------


def crop_starts(frames: int, length: int, crops: int | None = None) -> list[int]:
    """First frames of evenly spaced crops of `length` that reach both ends of `frames`; as many as cover them
    unless given. One, at 0, where a single crop holds all."""
    if frames <= length:
        return [0]
    count = crops or math.ceil(frames / length)
    if count == 1:
        return [(frames - length) // 2]
    return np.linspace(0, frames - length, count).round().astype(int).tolist()


def crop_batches(
    item: dict, info: dict, longest: int, batch: int, crops: int | None = None
) -> Iterator[torch.Tensor]:
    """All crops (`crop_starts`) of one item, at most `batch` at once: (B, T, 128), normalised by info's mean
    and std. Crops of one item are equally long, so no batch needs a mask. item: frames, fbank (frames,
    128)."""
    starts = crop_starts(item["frames"], longest, crops)
    for first in range(0, len(starts), batch):
        parts = [item["fbank"][start : start + longest] for start in starts[first : first + batch]]
        x, _ = pad_fbank(parts, PATCH)
        yield normalise_fbank(x, info["mean"], info["std"])


def predict_ast(
    model: nn.Module, items: list[dict], info: dict, device: torch.device, batch=8, crops=None
) -> np.ndarray:
    """Ratings in [0, 1] of prepared items (data.prepare_ast), (n, 19) float64 in the order given; of an item
    longer than the model's frames the mean over its crops (`crop_batches`). info: the checkpoint's data
    (mean, std, frames, and target_mean, target_std where the ratings were standardised)."""
    longest = model.model_args.get("frames") or info["frames"]
    training = model.training
    model = model.to(device).eval()
    rows = []
    with torch.no_grad():
        for item in items:
            rated = [model(x.to(device)) for x in crop_batches(item, info, longest, batch, crops)]
            rows.append(torch.cat(rated).double().mean(0).cpu().numpy())
    model.train(training)
    p = np.array(rows).reshape(-1, len(LABELS))
    if info.get("target_mean") is not None:
        p = p * np.asarray(info["target_std"]) + np.asarray(info["target_mean"])
    return p.clip(0, 1)


def audio_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        parser.add_argument(
            "--audio",
            metavar="DIR",
            help="audio: folder of recordings NAME.wav; of a pre-training: MAESTRO's (off: rendered)",
        ),
        parser.add_argument(
            "--crops",
            type=number(int, 1),
            metavar="N",
            help="audio: crops averaged of an item longer than the model's frames (as many as cover it)",
        ),
    ]


def frozen_tokens(path: str, store: FbankStore, device: torch.device, batch=32) -> dict[str, np.ndarray]:
    """What a pre-trained AST makes of each recording: mean and deviation over all patches of all crops of the
    tokens after a quarter, half, three quarters and all of its blocks, (8 width,) float64 by name. In the
    precision that it was trained in."""
    model, ckpt = load_checkpoint(path)
    info = ckpt.get("data") or {}
    if not isinstance(model, AST) or model.model_args["num_outputs"] is not None or "std" not in info:
        raise DataError(f"{path}: of task {ckpt['task']!r}; expected a pre-training, which knows no rating")
    model = model.to(device).eval()
    found, depth = [], model.model_args["depth"]
    for level in sorted({max(1, round(depth * share / 4)) for share in (1, 2, 3, 4)}):
        layer = model.norm if level == depth else model.blocks[level - 1]
        layer.register_forward_hook(lambda _, __, out: found.append(out.double()))
    extra = 0 if model.extra is None else 2
    half = torch.autocast(device.type, torch.bfloat16, enabled=(ckpt["args"] or {}).get("amp") == "bf16")
    rows = {}
    for i, name in enumerate(tqdm(store.names, desc="frozen AST", unit="file", disable=None)):
        moments = []
        for x in crop_batches(store.item(i), info, model.model_args["frames"], batch):
            found.clear()
            with torch.no_grad(), half:
                model(x.to(device))
            seen = torch.stack(found, dim=1)[:, :, extra:]  # (B, levels, T, width)
            moments.append(torch.stack([seen.mean(2), seen.square().mean(2)]))
        mean, square = torch.cat(moments, dim=1).mean(1)  # (levels, width)
        deviation = (square - mean**2).clip(1e-6).sqrt()
        rows[name] = torch.cat([mean, deviation], dim=1).flatten().cpu().numpy()
    return rows


def audio_store(corpus: Corpus, args: argparse.Namespace, trained_on: str | None = None) -> FbankStore:
    """Log-mel energies of the corpus, of --audio or rendered; says where a model was trained on the other."""
    store = percepiano_audio(corpus, args.cache, args.audio)
    for line in store.left_out:
        print(f"left out: {line}")
    kind = "wav" if args.audio else "rendered"
    if trained_on not in (None, kind):
        print(f"trained on audio of kind {trained_on}, evaluated on {kind}; recordings: --audio DIR")
    return store


def evaluate_pretraining(args: argparse.Namespace, loaded: list[tuple]) -> dict:
    """The trainer's own validation figures of one pre-training: its crops and masks, of --data, normalised as
    the model knows it."""
    import pretrain_ast  # which imports this module

    (path, model, ckpt), data = loaded[0], loaded[0][2]["data"]
    if len(loaded) > 1 or args.csv or args.save_results or args.crops:
        raise DataError(
            f"{path}: a pre-training, which rates nothing; expected it alone, without --csv, --save-results, --crops; give a fine-tuned best.pt"
        )
    if args.data is None and not data["synthetic"]:
        raise DataError(
            f"{path}: trained on real data; its scores on the synthetic corpus mean nothing; give --data DIR"
        )
    own = {"data": args.data, "audio": args.audio, "cache": args.cache, "device": str(args.device)}
    settings = argparse.Namespace(**{**vars(pretrain_ast.parse_args([])), **ckpt["args"], **own})
    _, batches, now = pretrain_ast.pretrain_data(settings, False, print)
    if now["recordings"] != data["recordings"]:
        print("other recordings than the model was trained with: some that validate here may have trained it")
    for batch in batches:
        batch["x"] = normalise_fbank(batch["x"] * 2 * now["std"] + now["mean"], data["mean"], data["std"])
    figures = pretrain_ast.validate(model.to(args.device), batches, data, args.device, settings)
    print(
        "SYNTHETIC corpus: figures say nothing about real recordings"
        if now["synthetic"]
        else f"real data in {args.data}"
    )
    print(
        f"{path}, step {ckpt['step']}, {sum(len(batch['names']) for batch in batches)} fixed crops that validate"
    )
    print(
        f"NCE {figures['valid_nce']:.4f}, accuracy {figures['valid_accuracy']:.4f} (chance {figures['valid_chance']:.4f})"
    )
    print(f"MSE {figures['valid_mse']:.5f} (of the mean patch {figures['valid_mse_mean']:.5f})")
    return figures


# ------------------------------------------------------------------------------------------------------------
# Significance and comparison
# ------------------------------------------------------------------------------------------------------------


def permutation_p(y, p, groups, n: int = 1000, seed: int = 7, folds: np.ndarray | None = None) -> np.ndarray:
    """One-sided p-value per dimension, (D,), of the Pearson correlation (mean over folds) if predictions knew
    nothing.

    y, p (n, D); groups (n,). Items of a group are alike on both sides, so items alone must not be exchanged
    (which is all that scipy.stats.permutation_test does): every group receives the predictions of a whole
    group of its fold, in random order (cut or repeated where that one is larger or smaller). Folds that hold
    the same groups are permuted alike. p = (1 + draws as good as the observed) / (1 + n) (Phipson & Smyth,
    2010)."""
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    folds = np.zeros(len(y), int) if folds is None else folds
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    rows_of: dict = {}  # fold -> {group: its rows}
    for row, (fold, k) in enumerate(zip(folds, group, strict=True)):
        rows_of.setdefault(fold, {}).setdefault(k, []).append(row)
    largest = max(len(rows) for blocks in rows_of.values() for rows in blocks.values())
    observed, as_good = by_fold(pearson, folds, y, p), 0
    rng = np.random.default_rng(seed)
    for _ in range(n):
        order, within = rng.random(group.max() + 1), rng.random((group.max() + 1, largest))
        source = np.empty(len(y), int)
        for blocks in rows_of.values():
            for k, donor in zip(sorted(blocks), sorted(blocks, key=order.__getitem__), strict=True):
                given = np.array(blocks[donor])
                shuffled = given[np.argsort(within[donor, : len(given)])]
                source[blocks[k]] = np.resize(shuffled, len(blocks[k]))
        as_good += by_fold(pearson, folds, y, p[source]) >= observed - 1e-12
    return (1 + as_good) / (1 + n)


def holm(p: Iterable[float]) -> np.ndarray:
    """p-values adjusted for their number (Holm, 1979), in the order given: times m, m - 1, ... from the
    smallest on, never falling, at most 1. NaN stays NaN and does not count."""
    p = np.asarray(p, np.float64)
    adjusted, order = np.full(p.shape, np.nan), np.argsort(p)[: np.isfinite(p).sum()]
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted


def paired_bootstrap(
    y, pa, pb, groups, statistic: Callable = r2, folds: np.ndarray | None = None, n: int = 5000, seed: int = 7
) -> tuple:
    """statistic(y, pa) - statistic(y, pb), its 95 % interval (low, high) and two-sided p-value, when whole
    groups are drawn with replacement, the same for both; of the statistic's shape. Folds as in
    `cluster_bootstrap`. p is twice the smaller share of draws on either side of 0, counting the observed one;
    all NaN but the difference when too few groups remain."""
    folds = np.zeros(len(y), int) if folds is None else folds

    def gain(y, a, b):
        return statistic(y, a) - statistic(y, b)

    difference = by_fold(gain, folds, y, pa, pb)
    draws = resample(gain, groups, folds, y, pa, pb, n=n, seed=seed)
    if not len(draws):
        nothing = np.full_like(difference, np.nan)
        return difference, (nothing, nothing), nothing
    tie = 1e-12  # a difference of 0 but for rounding counts on either side
    fewer = np.minimum((draws < tie).sum(0), (draws > -tie).sum(0))
    p = np.minimum(2 * (fewer + 1) / (len(draws) + 1), 1)
    return difference, tuple(np.percentile(draws, [2.5, 97.5], axis=0)), p


def significance(records: list[dict], truth: dict[str, np.ndarray], n: int = 1000) -> dict:
    """Per dimension, means over the folds: {part: {view: {"pearson_interval", "r2_interval" (19 pairs,
    cluster bootstrap over segments), "p", "p_holm" (19, `permutation_p`)} or None where nothing is rated or
    the segments are too few}}."""
    return of_views(functools.partial(_significance, n=n), records, truth)


def _significance(names, y, p, folds, n):
    groups = [segment_of(name) for name in names]
    draws = resample(lambda y, p: np.stack([pearson(y, p), r2(y, p)]), groups, folds, y, p, n=n)
    if not len(draws):
        return None
    intervals = np.percentile(draws, [2.5, 97.5], axis=0)
    chance = permutation_p(y, p, groups, n, folds=folds)
    return {
        "pearson_interval": intervals[:, 0].T.tolist(),
        "r2_interval": intervals[:, 1].T.tolist(),
        "p": chance.tolist(),
        "p_holm": holm(chance).tolist(),
    }


def _print_significance(tests):
    for part, views in tests.items():
        for view, figures in views.items():
            if figures:
                rows = zip(
                    LABELS,
                    map(brackets, figures["pearson_interval"]),
                    figures["p"],
                    figures["p_holm"],
                    strict=True,
                )
                print_table([f"{part}, {VIEWS[view]}", "95 % of r", "p by permutation", "p (Holm)"], rows)


# With fewer independent items a bootstrap promises too much: that five all differ one way has a chance of
# 2 / 2**5 > .05 (sign test).
FEWEST = 6


def compare(argv: list[str]) -> dict:
    """`python eval.py compare`: paired test of two sets of predictions on the items that both rate; returns
    its figures."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py compare",
        usage="python eval.py compare --a FILE ... --b FILE ... [--data DIR] [options]",
        description="""\
Is A better than B, or is it chance? Both predict the same items; the last line says it in a sentence.
Of ratings: the mean metric and each of the 19, with Holm's correction for their number.

    python eval.py compare --a runs/han/ONE/best.pt --b runs/han/OTHER/best.pt --data data/percepiano
    python eval.py compare --a results/ONE.csv --b results/OTHER.csv --data data/percepiano
    python eval.py compare --a runs/decoder/ONE/best.pt --b runs/decoder/OTHER/best.pt --part test

Intervals (95 %) and p-values: paired bootstrap over segments, or over a decoder's trials.""",
    )
    add = parser.add_argument
    for side in ("--a", "--b"):
        add(side, nargs="+", required=True, metavar="FILE", help="CSV, or best.pt files (required)")
    add("--part", choices=["valid", "test"], default="valid", help="part to compare (%(default)s)")
    add("--draws", type=number(int, 100), default=5000, help="of the bootstrap (%(default)s)")
    add("--batch", type=number(int, 1), help="items per forward pass (16; audio 8; decoder 64)")
    of_decoder = [add("--day", choices=["nearest", "mean"], help=DAY_HELP)]
    clusters = ["segment", "performer"]
    of_ratings = [
        add("--metric", choices=METRICS, default="pearson", help="ratings: what is compared (%(default)s)"),
        add("--cluster", choices=clusters, default="segment", help="ratings: drawn as a whole (%(default)s)"),
        add("--no-renderings", action="store_true", help="ratings: without the score renderings (off)"),
        *audio_options(parser),
    ]
    args = _parse(parser, argv)
    args.ckpt = args.a
    loaded = [_load_models(paths) if not paths[0].endswith(".csv") else [] for paths in (args.a, args.b)]
    decoders = {_is_decoder(paths, models) for paths, models in zip((args.a, args.b), loaded, strict=True)}
    if len(decoders) > 1:
        raise DataError(f"{args.a[0]}, {args.b[0]}: one is a decoder's, the other rates pieces")
    if decoders == {True}:
        _refuse_given(args, of_ratings, "train_han.py and pretrain_ast.py", "decoder")
        return _test_pairs(_paired_trials(args, loaded), args)
    _refuse_given(args, of_decoder, "train_decoder.py", "ratings")
    return _test_pairs(_paired_ratings(args, loaded), args)


@dataclass
class Pairs:
    """What two sides, a and b (n, D), made of the same items of truth y (n, D).

    groups (n,) are drawn as a whole, folds (n,) averaged. statistic(y, p) -> a figure for each of labels,
    then the whole one, called `name`; sign: 1 where more is better, -1 where less is. about: a line on the
    items."""

    y: np.ndarray
    a: np.ndarray
    b: np.ndarray
    groups: list
    folds: np.ndarray
    unit: str
    statistic: Callable
    labels: tuple[str, ...]
    name: str
    sign: int
    about: str


def _test_pairs(pairs, args):
    """Tests whether the sides differ, prints a table and the verdict, and returns them."""
    a, b = (by_fold(pairs.statistic, pairs.folds, pairs.y, side) for side in (pairs.a, pairs.b))
    difference, interval, p = paired_bootstrap(
        pairs.y, pairs.a, pairs.b, pairs.groups, pairs.statistic, pairs.folds, args.draws
    )
    clusters = len(set(pairs.groups))
    if clusters < FEWEST:
        p = np.full_like(p, np.nan)
    tests = {"difference": difference, "interval": np.stack(interval, 1), "p": p}
    corrected = holm(p[:-1])
    print(f"A {' '.join(args.a)}\nB {' '.join(args.b)}\n{pairs.about}")
    print(f"{clusters} {pairs.unit}, drawn {args.draws} times: no p is under {2 / args.draws:.2g}")
    labels, intervals = [*pairs.labels, "all"], map(brackets, tests["interval"])
    rows = zip(labels, a, b, difference, intervals, p, [*corrected, ""], strict=True)
    print_table([pairs.name, "A", "B", "A - B", "95 %", "p", "p (Holm)"], rows)
    verdict = _verdict(pairs, **tests, corrected=corrected)
    print(verdict)
    return {
        "items": len(pairs.y),
        "clusters": clusters,
        "a": float(a[-1]),
        "b": float(b[-1]),
        **{key: values[-1].tolist() for key, values in tests.items()},
        "verdict": verdict,
        "per_dimension": {
            **{key: values[:-1].tolist() for key, values in tests.items()},
            "p_holm": corrected.tolist(),
        },
    }


def _verdict(pairs, difference, interval, p, corrected):
    """Who is better, in a sentence; the whole figure stands last in each array."""
    told = f"{pairs.name} {difference[-1]:+.4f}"
    count = len(set(pairs.groups))
    if np.isnan(p[-1]):
        return f"A cannot be told from B: {told}, but {count} {pairs.unit} are too few for a test."
    gain = pairs.sign * difference
    says = "cannot be told from"
    if p[-1] < 0.05:
        says = "is better than" if gain[-1] > 0 else "is worse than"
    sentence = f"A {says} B: {told} {brackets(interval[-1])}, p = {p[-1]:.4f}"
    for word, clear in (("better", gain[:-1] > 0), ("worse", gain[:-1] < 0)):
        names = list(itertools.compress(pairs.labels, clear & (corrected < 0.05)))
        if names:
            sentence += f"; {word} after Holm's correction in {', '.join(names)}"
    return f"{sentence}."


def _is_decoder(paths, loaded):
    """Whether one side of a comparison, checkpoints or one CSV, is a decoder's."""
    if loaded:
        return loaded[0][2]["task"] == "decoder"
    if len(paths) > 1:
        raise DataError(f"{paths[1]}: beside {paths[0]}; expected one CSV, which holds all folds")
    try:
        with open(paths[0], encoding="utf-8", errors="replace") as file:
            return file.readline(100).startswith("trial,")
    except OSError as error:
        raise DataError(f"{paths[0]}: {error.strerror}; expected a CSV of --save-results") from error


def _saved_beside(path, key):
    """An entry of the JSON that --save-results wrote beside a CSV; None where there is none."""
    try:
        return json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _paired_ratings(args, loaded):
    """Pairs of the rated items that both sides predict in the same fold."""
    root = Path(args.data or synthetic_percepiano(args.cache))
    synthetic = (root / "SYNTHETIC").is_file()
    truth = read_labels(root, [])[0]
    view = "no_renderings" if args.no_renderings else "all"
    sides, splits = [], set()
    for paths, models in zip((args.a, args.b), loaded, strict=True):
        if models:
            args.ckpt = paths
            folds, data = _load_fold_models(models)
            records = fold_records(folds, _corpus_of(data, args), args, (args.part,))
            splits.add(data["split"])
        else:
            records = read_predictions(paths[0])
            splits.add(_saved_beside(paths[0], "split"))
            if _saved_beside(paths[0], "synthetic") not in (None, synthetic):  # the names would be the same
                raise DataError(f"{paths[0]}: predictions of another corpus than {root}; give --data DIR")
        names, _, p, folds = _stacked(records, truth, args.part, view)
        sides.append(dict(zip(zip(folds.tolist(), names, strict=True), p, strict=True)))
    both = sorted(sides[0].keys() & sides[1].keys())
    names = [name for _, name in both]
    segments = [segment_of(name) for name in names]
    if len(splits - {None}) > 1 or len(set(segments)) < 2:
        raise DataError(
            f"{args.a[0]}, {args.b[0]}: {len(both)} rated items of part {args.part} that both predict in "
            f"one fold, splits {splits}; expected two segments or more of one split; give their --data"
        )
    y = np.array([truth[name] for name in names])
    metric = METRICS[args.metric]
    apart = f"{len(sides[0].keys() ^ sides[1].keys())} items that only one side predicts left out"
    return Pairs(
        y=y,
        a=np.array([sides[0][item] for item in both]),
        b=np.array([sides[1][item] for item in both]),
        groups=segments if args.cluster == "segment" else [str(player_of(name)) for name in names],
        folds=np.array([fold for fold, _ in both]),
        unit=f"{args.cluster}s",
        statistic=lambda y, p: np.append(metric(y, p), metric(y, p).mean()),
        labels=LABELS,
        name=f"mean {args.metric}",
        sign=1
        if metric(y, y).mean() > metric(y, 1 - y).mean()
        else -1,  # an error is least for the truth itself
        about=f"{args.part}, {len(both)} items; {apart}; {corpus_line(synthetic, root)}",
    )


def read_transcripts(path: str | Path) -> list[dict]:
    """Reads a decoder's CSV of --save-results: a list of dicts of trial, day, reference and hypothesis
    (phoneme ids). DataError otherwise."""
    records: list[dict] = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, strict=True):
                ids = {
                    side: [PHONEMES.index(p) for p in row[side].split()]
                    for side in ("reference", "hypothesis")
                }
                records.append({"trial": row["trial"], "day": row["day"], **ids})
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise DataError(f"{path}: line {len(records) + 2}: {error!r}; expected a decoder's CSV") from error
    return records


def _paired_trials(args, loaded):
    """Pairs of the labelled trials that both sides decoded; prints their error rates by session."""
    sides, synthetic = [], False
    for paths, models in zip((args.a, args.b), loaded, strict=True):
        if models:
            args.ckpt = paths
            corpus = _speech_corpus(args, models)
            trials = speech_parts(corpus, models[0][2]["data"]["valid"])[args.part]
            trials = trials[corpus.labelled[trials]]
            _say_circumstances(args, models, corpus, trials)
            rows = transcripts(mean_logits(models, corpus, trials, args), corpus, trials)
            synthetic |= corpus.synthetic
        else:
            rows = read_transcripts(paths[0])
            synthetic |= bool(_saved_beside(paths[0], "synthetic"))
        sides.append({row["trial"]: row for row in rows})
    both = [trial for trial in sides[0] if trial in sides[1]]
    references, others = ([side[trial]["reference"] for trial in both] for side in sides)
    if len(both) < 2 or references != others:
        raise DataError(
            f"{args.a[0]}, {args.b[0]}: {len(both)} labelled trials that both decoded, or of other "
            "phonemes; expected two or more of one corpus"
        )
    a, b = (per_counts(references, [side[trial]["hypothesis"] for trial in both]) for side in sides)
    days = np.array([sides[0][trial]["day"] for trial in both])
    rows = [(day, error_rate(a[days == day]), error_rate(b[days == day])) for day in np.unique(days)]
    print_table(["phoneme error rate", "A", "B"], rows)
    apart = f"{len(sides[0].keys() ^ sides[1].keys())} trials that only one side decoded left out"
    return Pairs(
        y=a,
        a=a,
        b=b,
        groups=list(range(len(both))),
        folds=np.zeros(len(both), int),
        unit="trials",
        statistic=lambda _, counts: np.array([error_rate(counts)]),
        labels=(),
        name="phoneme error rate",
        sign=-1,
        about=f"{len(both)} trials; {apart}; {corpus_line(synthetic, 'the files named')}",
    )


# ------------------------------------------------------------------------------------------------------------
# Audio: rater ceiling
# ------------------------------------------------------------------------------------------------------------


def rater_ceiling(raters: np.ndarray, names: np.ndarray, ratings: np.ndarray) -> dict:
    """What perfect knowledge of every item's true rating would score against the means of the raters there
    are.

    raters (n,), names (n,), ratings (n, D), NaN = none; as data.read_ratings. Returns arrays (D,) "r2",
    "pearson" (its root), "independent" (R² if every rating were another rater's: HAN.md's ≈ .79), "between",
    "error", "spread" (see `_ceiling_column`), and "items", "per_item"."""
    columns = []
    for x in ratings.T:
        rated = np.isfinite(x)
        columns.append(_ceiling_column(names[rated], raters[rated], x[rated]))
    figures = {key: np.array([column[key] for column in columns]) for key in columns[0]}
    items = len(np.unique(names))
    pearson = np.sqrt(figures["r2"].clip(min=0))
    return {**figures, "pearson": pearson, "items": items, "per_item": len(names) / items}


def _ceiling_column(names, raters, x):
    """`rater_ceiling` of one dimension: item, rater and value of every rating, (n,) each.

    Model: rating = true + rater's own view of the item (variance b) + error of the moment (variance e, from
    raters who rated an item twice). Both come from the sums of squares within raters and within items
    (analysis of variance, unbiased for unequal counts). The mean of item i, of which rater j gave m_ij of N_i
    ratings, errs by noise_i = b sum_j(m_ij²) / N_i² + e / N_i; R² = 1 - mean(noise_i) / Var(item means): the
    reliability of the means."""
    _, item, N = np.unique(names, return_inverse=True, return_counts=True)
    _, rater = np.unique(raters, return_inverse=True)
    key, pair, m = np.unique(item * len(x) + rater, return_inverse=True, return_counts=True)
    mean = np.bincount(item, x) / N
    if N.max() == 1 or np.ptp(mean) == 0:
        return dict.fromkeys(("r2", "independent", "between", "error", "spread"), np.nan)
    squares = (x - mean[item]) ** 2
    within_pair = ((x - (np.bincount(pair, x) / m)[pair]) ** 2).sum()
    concentration = np.bincount(key // len(x), m**2) / N  # sum_j(m_ij²) / N_i, 1 if nobody rated twice
    error = within_pair / max(len(x) - len(m), 1)
    excess = squares.sum() - error * (len(x) - len(N))
    between = max(0.0, excess / max((N - concentration).sum(), 1e-12))
    noise = between * concentration / N + error / N
    several = N > 1
    noise_independent = np.bincount(item, squares)[several] / (N[several] - 1) / N[several]
    spread = mean.var()
    return {
        "r2": 1 - noise.mean() / spread,
        "independent": 1 - noise_independent.mean() / spread,
        "between": between,
        "error": error,
        "spread": spread,
    }


def ceiling(argv: list[str]) -> dict:
    """`python eval.py ceiling`: prints `rater_ceiling` of all rated performances, with and without score
    renderings; returns both."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py ceiling",
        usage="python eval.py ceiling [--data DIR] [options]",
        description="""\
The most that any model can score: raters disagree, so even somebody who knew every performance's true
rating would not predict their mean exactly. R2 and Pearson of that somebody, in all and for each rating.

    python eval.py ceiling --data data/percepiano
    python eval.py ceiling                            on the synthetic corpus, as an example""",
    )
    args = _parse(parser, argv)
    root = Path(args.data or synthetic_percepiano(args.cache))
    raters, names, ratings = read_ratings(root)
    print(corpus_line((root / "SYNTHETIC").is_file(), root))
    human = np.array([not is_rendering(name) for name in names])
    views, columns = {}, {}
    for view, chosen in (("all", human | True), ("no_renderings", human)):
        figures = views[view] = rater_ceiling(raters[chosen], names[chosen], ratings[chosen] / 7)
        print(f"{VIEWS[view]}: {figures['items']} items, {figures['per_item']:.1f} ratings each")
        for key in ("r2", "pearson", "independent"):
            columns[f"{key}, {VIEWS[view]}"] = [*figures[key], figures[key].mean()]
    print_table(["ceiling", *columns], zip([*LABELS, "mean"], *columns.values(), strict=True))
    print("independent: r2 if every rating were another rater's")
    return views


# -----------------------------------------------------------------------------------------------------------------
# Attention
# -----------------------------------------------------------------------------------------------------------------

PICTURE = (16, 6)  # inches of 100 pixels
HERTZ = (50, 100, 200, 500, 1000, 2000, 4000, 8000)
QUIETEST = -80  # dB under the loudest value of the spectrogram: white


def explicit_block(block: Block, x: Tensor, attend: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`block(x, attend)`, and the attention weights (B, H, T, T) that its fused kernel keeps to itself: rows are queries."""
    B, T, C = x.shape
    q, k, v = block.qkv(block.norm1(x)).view(B, T, 3, block.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
    score = q @ k.transpose(2, 3) / math.sqrt(C // block.heads)
    if attend is not None:
        score = score.masked_fill(~attend.view(B, 1, 1, T), -torch.inf)
    weights = score.softmax(3)
    x = x + block.dropout(block.proj((weights @ v).transpose(1, 2).reshape(B, T, C)))
    hidden = block.dropout(functional.gelu(block.fc1(block.norm2(x))))
    return x + block.dropout(block.fc2(hidden)), weights


@torch.no_grad()
def roll_out(model: AST, clips: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Attention roll-out (Abnar & Zuidema, ACL 2020) of an AST in eval mode: what reaches the pooled tokens from each patch.

    clips (B, frames, mel) normalised, lengths (B,) -> (B, rows, columns) in units of an even share: mean 1 over the valid
    patches of a clip, 0 at padding. Each layer's weights are averaged over the heads and with the identity, which stands for
    the residual path, then multiplied through the layers; the rows that the model pools are averaged (cls: both tokens;
    otherwise, and in pre-training, all valid patches)."""
    rolled, attend = None, None

    def follow(block: Block, inputs: tuple) -> None:
        nonlocal rolled, attend
        x, attend = inputs
        weights = explicit_block(block, x, attend)[1].mean(1)
        step = (weights + torch.eye(x.shape[1], device=x.device)) / 2
        rolled = step if rolled is None else step @ rolled

    hooks = [block.register_forward_pre_hook(follow) for block in model.blocks]
    try:
        model(clips, lengths)
    finally:
        for hook in hooks:
            hook.remove()
    valid = rolled.new_ones(rolled.shape[:2]) if attend is None else attend.to(rolled.dtype)
    extra = 0 if model.extra is None else 2
    pooled = torch.arange(valid.shape[1], device=valid.device) < extra
    query = valid * (pooled if model.pooling == "cls" else ~pooled)
    share = (query.unsqueeze(1) @ rolled).squeeze(1)[:, extra:]
    share = share / share.sum(1, keepdim=True) * valid[:, extra:].sum(1, keepdim=True)
    return share.unflatten(1, (model.rows, -1))


def roll_out_file(model: AST, energies: Tensor, device: torch.device) -> tuple[np.ndarray, list[int]]:
    """energies (frames, mel), normalised, of any length -> shares (rows, columns) of the whole, and the first column of each crop.

    Crops are as long as the model takes and spaced as in `crop_starts`; where two overlap they are averaged. Shares are
    within crops: 1 is even in each."""
    model, total = model.to(device).eval(), model.count(len(energies))
    span = min(total, model.columns)
    starts = crop_starts(total, span)
    share, crops = np.zeros((model.rows, total)), np.zeros(total)
    for start in starts:
        first = start * model.stride
        crop = energies[first : first + (span - 1) * model.stride + PATCH]
        share[:, start : start + span] += roll_out(model, crop[None].to(device))[0].double().cpu().numpy()
        crops[start : start + span] += 1
    return share / crops, starts


def hertz_to_band(hertz: Iterable[float]) -> np.ndarray:
    """Where frequencies lie on the axis of data.fbank's 128 bands, 0 = the middle of the first; within the bands' edges."""
    low, high, mel = (1127 * np.log1p(np.asarray(f, float) / 700) for f in (20, SAMPLE_RATE / 2, hertz))
    return ((mel - low) / (high - low) * (MELS + 1) - 1).clip(-0.5, MELS - 0.5)


def draw_attention(
    out: Path, energies: np.ndarray, share: np.ndarray, starts: list[int], stride: int, title: str
) -> None:
    """Shares (rows, columns) in colour over the spectrogram (frames, 128), natural logarithms of energy, in grey; ticks at
    the crops' borders. Written as out's suffix says, 1600 x 600 pixels."""
    # Here, because it takes half a second; without pyplot it asks for no display.
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    figure = Figure(PICTURE, dpi=100, layout="constrained")
    axes = figure.subplots()
    level = 10 / math.log(10) * (energies.T - energies.max())  # dB
    second = FRAME / SAMPLE_RATE / 2, HOP / SAMPLE_RATE  # middle of frame 0, and the step from frame to frame
    seconds = [
        second[0] + second[1] * (np.array(edges) - 0.5)
        for edges in ((0, len(energies)), stride * np.array([0, share.shape[1]]) + (PATCH - stride) / 2)
    ]
    bands = [stride * edge + (PATCH - stride) / 2 - 0.5 for edge in (0, len(share))]
    axes.imshow(
        level,
        cmap="gray_r",
        vmin=QUIETEST,
        vmax=0,
        origin="lower",
        aspect="auto",
        extent=(*seconds[0], -0.5, MELS - 0.5),
    )
    low, high = np.percentile(share, [1, 99])
    scale = TwoSlopeNorm(1, min(low, 0.999), max(high, 1.001))
    shades = axes.imshow(
        share,
        cmap="coolwarm",
        norm=scale,
        alpha=0.6,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(*seconds[1], *bands),
    )
    axes.set(
        xlim=(0, seconds[0][1]),
        ylim=(-0.5, MELS - 0.5),
        xlabel="time (s)",
        ylabel="frequency (Hz), mel scale",
    )
    axes.set_yticks(hertz_to_band(HERTZ), [str(f) if f < 1000 else f"{f // 1000} k" for f in HERTZ])
    for start in starts[1:]:
        axes.axvline(seconds[1][0] + start * stride * second[1], color="black", linewidth=1.5, linestyle=":")
    axes.set_title(title, parse_math=False)
    bar = figure.colorbar(shades, ax=axes, extend="both", pad=0.01)
    bar.set_label("attention that reaches the output\n(1 = the same from every patch)")
    write_atomic(out, lambda file: figure.savefig(file, format=out.suffix[1:]))


def read_piece(args: argparse.Namespace) -> tuple[str, np.ndarray]:
    """Path and log-mel energies (frames, 128) of --audio, or of --midi as the built-in piano plays it."""
    path, waveform = (
        (args.audio, read_wav(args.audio)) if args.audio else (args.midi, render(read_midi(args.midi)))
    )
    if len(waveform) and not waveform.any():
        raise DataError(
            f"{path}: {len(waveform) / SAMPLE_RATE:.1f} s of digital silence; expected sound; give another file"
        )
    if fbank_frames(len(waveform)) < PATCH:
        shortest = (FRAME + (PATCH - 1) * HOP) / SAMPLE_RATE
        raise DataError(
            f"{path}: {len(waveform) / SAMPLE_RATE:.3f} s of sound; expected at least {shortest} s, one patch of {PATCH} frames; give a longer piece"
        )
    return path, fbank(torch.from_numpy(waveform)).numpy()


def check_output(path: Path, option: str = "") -> None:
    """Refuses, before anything is computed, a file that could not be written, or that writing would replace though it is no file."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    taken = (
        "a folder, no ordinary file"
        if path.is_dir()
        else "no ordinary file"
        if path.exists() and not path.is_file()
        else None
    )
    if taken or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(
            f"{f'{option} {path}'.strip()}: {taken or f'no file can be written in {folder}'}; expected a file in a writable folder; name another"
        )


def check_picture(out: Path) -> None:
    """The same of a picture."""
    if out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise DataError(f"{out}: a picture of kind {out.suffix!r}; expected .png, .pdf or .svg; name it so")
    check_output(out)


def attention(argv: list[str]) -> dict:
    """`python eval.py --attention OUT`: the roll-out of one AST checkpoint on one file, drawn; returns shares and crops."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py --attention",
        usage="python eval.py --attention OUT.png --audio FILE.wav | --midi FILE.mid --ckpt FILE",
        description="""\
Which parts of a piece reach an AST's output, drawn over its spectrogram (1600 x 600 pixels).

    python eval.py --attention out.png --midi FILE.mid --ckpt runs/ast/NAME/best.pt
    python eval.py --attention out.pdf --audio FILE.wav --ckpt runs/ast/NAME/best.pt""",
    )
    parser.add_argument(
        "--attention", required=True, metavar="OUT", help="picture to write: .png, .pdf or .svg (required)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--audio", metavar="FILE", help="WAV file of any length")
    source.add_argument("--midi", metavar="FILE", help="MIDI file, played by the built-in piano")
    parser.add_argument(
        "--ckpt",
        required=True,
        metavar="FILE",
        help="best.pt of pretrain_ast.py, pre-trained or fine-tuned (required)",
    )
    args = _parse(parser, argv)
    out = Path(args.attention)
    check_picture(out)
    model, ckpt = load_checkpoint(args.ckpt)
    data = ckpt.get("data") or {}
    if not isinstance(model, AST):
        raise DataError(
            f"{args.ckpt}: a checkpoint of task {ckpt['task']!r}; expected 'ast', which has attention; give one of pretrain_ast.py"
        )
    if model.model_args["mel"] != MELS or not {"mean", "std"} <= data.keys():
        raise DataError(
            f"{args.ckpt}: for {model.model_args['mel']} mel bands, data with {sorted(data)}; expected {MELS}, mean and std; train it again"
        )
    path, energies = read_piece(args)
    share, starts = roll_out_file(
        model, torch.from_numpy(normalise_fbank(energies, data["mean"], data["std"])).float(), args.device
    )
    sizes, kind = model.model_args, "pre-trained" if model.model_args["num_outputs"] is None else "fine-tuned"
    about = f"{kind} AST {sizes['width']} x {sizes['depth']} x {sizes['heads']}{', synthetic data' * bool(data.get('synthetic'))}"
    title = (
        f"Attention roll-out of {args.ckpt} ({about})\n{Path(path).name}{', rendered' * bool(args.midi)}: "
        f"{len(energies) * HOP / SAMPLE_RATE:.1f} s in {len(starts)} crop{'s, borders dotted' * (len(starts) > 1)}; darkness: level, {-QUIETEST} dB from white to black"
    )
    draw_attention(out, energies, share, starts, model.stride, title)
    print(
        f"{out}: {share.shape[1]} x {share.shape[0]} patches in {len(starts)} crops, shares {share.min():.3g} to {share.max():.3g} of an even one"
    )
    return {"share": share, "starts": starts, "frames": len(energies)}


# -----------------------------------------------------------------------------------------------------------------
# Bench: AST
# -----------------------------------------------------------------------------------------------------------------

MASKED = 400, 512  # patches that SSAST masks, of those of 1024 frames


class PlainAST(nn.Module):
    """Pre-training of `models.AST` with the same weights, as the original code computes it: a pass of the encoder for either
    objective, attention weights written out, Python loops over the clips."""

    def __init__(self, model: AST):
        super().__init__()
        if (
            model.decoder is not None
            or model.extra is not None
            or model.model_args["num_outputs"] is not None
        ):
            raise ValueError(
                f"plain AST: only pre-training with all patches, without tokens of their own; got {model.model_args}"
            )
        self.network = copy.deepcopy(model)

    def forward(self, clips: Tensor, mask: Tensor, second: Tensor) -> dict[str, Tensor]:
        """mask, second: patches (B, N) that the discriminative and the generative head work on -> nce, mse."""
        nce, mse = [], []
        hidden, pixels = self.encode(clips, mask)
        for i, ids in enumerate(mask):
            score = pixels[i, ids] @ self.network.discriminate(hidden[i, ids]).T  # patch, prediction
            nce.append(-score.log_softmax(0).diagonal().mean())
        hidden, pixels = self.encode(clips, second)
        for i, ids in enumerate(second):
            mse.append((self.network.generate(hidden[i, ids]) - pixels[i, ids]).square().mean())
        return {"nce": torch.stack(nce).mean(), "mse": torch.stack(mse).mean()}

    def encode(self, clips: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Final tokens (B, T, width) of the clips with these patches hidden, and the pixels (B, T, 256)."""
        network = self.network
        x, _ = network.tokens(clips, None)
        shown = torch.ones_like(x[..., :1])
        for i, ids in enumerate(mask):
            shown[i, ids] = 0
        x = network.dropout(x * shown + network.hidden * (1 - shown) + network.position(network.grid(clips)))
        for block in network.blocks:
            x, _ = explicit_block(block, x)
        return network.norm(x), patches(clips)


def plain_mask(batch: int, rows: int, columns: int, count: int, rng: random.Random) -> Tensor:
    """Patches to mask (batch, count), a loop over clips as in the original: clusters at random until enough patches are
    covered, the set of all ids built anew after each; then the surplus is cut off, here at random."""
    masks = []
    for _ in range(batch):
        ids, side = [], rng.randint(3, 5)
        while len(set(ids)) < count:
            start = rng.randrange(rows * columns)
            for i in range(side):
                for j in range(side):
                    if start + columns * i + j < rows * columns:
                        ids.append(start + columns * i + j)
        masks.append(torch.tensor(rng.sample(sorted(set(ids)), count)))
    return torch.stack(masks)


def pretrain_flops(model: AST, masked: int, passes: int = 1) -> int:
    """Floating point operations in the matrix products of a clip's step: backward costs as much again for either factor that
    has a gradient, which pixels have not; what checkpointing or fused kernels compute again is not counted."""

    def blocks(tokens: int, width: int, depth: int) -> int:
        return depth * (24 * tokens * width**2 + 4 * tokens**2 * width)

    pixels, width, tokens = PATCH**2, model.model_args["width"], model.rows * model.columns
    if model.decoder is None:
        both = passes * blocks(tokens, width, len(model.blocks))
    else:
        seen, narrow = tokens - masked, width // 2
        both = (
            blocks(seen, width, len(model.blocks))
            + 2 * seen * width * narrow
            + blocks(tokens, narrow, len(model.decoder))
        )
        width = narrow
    both += 2 * 2 * masked * width * (width + pixels)  # two heads
    one = (
        passes * 2 * tokens * pixels * model.model_args["width"] + 2 * masked**2 * pixels
    )  # projection of the patches; scores
    return 3 * both + 2 * one


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations of a large square matrix product per second, on CPU per second of CPU time, which a busy machine does not
    stretch; the best of 5."""
    n, clock = (8192, 0) if device.type == "cuda" else (2048, 1)
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(_clock(lambda: a @ a, device)[clock] for _ in range(5))


def _clock(work: Callable, device: torch.device) -> tuple[float, float, float]:
    """Seconds, seconds of the process's CPU time, and peak of GPU memory in MiB (NaN on CPU) of one call."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start, busy = time.perf_counter(), time.process_time()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return (
        time.perf_counter() - start,
        time.process_time() - busy,
        torch.cuda.max_memory_allocated(device) / 2**20 if cuda else math.nan,
    )


def _pretrain_loss(model: nn.Module, clips: Tensor, mask: Tensor, **second: Tensor) -> Tensor:
    out = model(clips, mask=mask, **second)
    return out["nce"] + 10 * out["mse"]


def _pretrain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, clips: Tensor, draw: Callable, amp: torch.dtype | None
) -> None:
    with torch.autocast(clips.device.type, dtype=amp, enabled=amp is not None):
        loss = _pretrain_loss(model, clips, **draw())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def bench_masks(device: torch.device, batch: int = 64, rounds: int = 5) -> dict:
    """Milliseconds of SSAST's masks for 64 clips of 1024 frames: cluster_mask and plain_mask, in turn, medians; and the ratio,
    also of CPU time."""
    rng, (rows, columns, count) = random.Random(7), (8, 64, MASKED[0])
    ways = {
        "cluster_mask": lambda: cluster_mask(batch, rows, columns, count, device),
        "loop": lambda: plain_mask(batch, rows, columns, count, rng).to(device),
    }
    taken = [[_clock(way, device)[:2] for way in ways.values()] for _ in range(1 + rounds)][1:]
    (fast, fast_busy), (slow, slow_busy) = (1000 * np.median(taken, axis=0)).tolist()
    busy_ratio = slow_busy / fast_busy
    print(
        f"masks of {batch} clips, {count} of {rows * columns} patches: cluster_mask {fast:.2f} ms, loop {slow:.1f} ms, ratio {slow / fast:.0f} (of CPU time {busy_ratio:.0f})"
    )
    return {"mask_ms": fast, "plain_mask_ms": slow, "mask_ratio": slow / fast, "mask_cpu_ratio": busy_ratio}


def bench_ast(args: argparse.Namespace, amp: torch.dtype | None) -> dict:
    """Pre-training steps of AST (one pass, vectorised masks, fused attention) and of PlainAST (two passes, loops, float32), in
    turn, on the same clips with optimisers of their own; with --visible-only also of an AST that encodes visible patches only."""
    device, warm_up, rng = args.device, 1, random.Random(7)
    model = AST(frames=args.frames, **AST_PRESETS[args.preset]).to(device)
    rows, columns = model.rows, model.columns
    N = max(1, round(rows * columns * MASKED[0] / MASKED[1]))
    clips = normalise_fbank(FBANK_MEAN + FBANK_STD * torch.randn(args.batch, args.frames, MELS)).to(device)
    rivals = {"AST": model, "plain": PlainAST(model).to(device)}
    if args.visible_only:
        rivals["visible"] = AST(frames=args.frames, visible_only=True, **AST_PRESETS[args.preset]).to(device)
    ours, loop = (
        functools.partial(cluster_mask, args.batch, rows, columns, N, device),
        functools.partial(plain_mask, args.batch, rows, columns, N, rng),
    )
    draws = {name: lambda: {"mask": ours()} for name in rivals}
    draws["plain"] = lambda: {"mask": loop().to(device), "second": loop().to(device)}
    same = ours()
    with torch.no_grad():
        losses = [
            [float(out[key]) for key in ("nce", "mse")]
            for out in (model.eval()(clips, mask=same), rivals["plain"].eval()(clips, same, same))
        ]
    work = {
        name: args.batch * pretrain_flops(model if name == "plain" else rival, N, 2 if name == "plain" else 1)
        for name, rival in rivals.items()
    }
    optimizers = {
        name: torch.optim.AdamW(rival.train().parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
        for name, rival in rivals.items()
    }
    taken: dict[str, list] = {name: [] for name in rivals}
    for _ in range(warm_up + args.steps):
        for name, rival in rivals.items():
            dtype = None if name == "plain" else amp
            taken[name].append(
                _clock(
                    functools.partial(_pretrain_step, rival, optimizers[name], clips, draws[name], dtype),
                    device,
                )
            )
    median = {name: np.median(values[warm_up:], axis=0) for name, values in taken.items()}
    peaks = {dtype: matmul_peak(device, dtype) for dtype in {torch.float32, amp or torch.float32}}
    about = hardware(device)
    print(
        f"{about['gpu'] or about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}, "
        f"device {device.type}, dtype {'float32' if amp is None else args.amp}, plain float32, {datetime.now(timezone.utc):%Y-%m-%d}"
    )
    print(
        f"batch {args.batch} clips of {args.frames} frames, {N} of {rows * columns} patches masked; {args.preset}, "
        f"{sum(w.numel() for w in model.parameters()) / 1e6:.1f} M parameters; median of {args.steps} steps"
    )
    for name, (seconds, busy, memory) in median.items():
        dtype = torch.float32 if name == "plain" or amp is None else amp
        rate, kept = (
            (work[name] / seconds, f", peak {memory:.0f} MiB")
            if device.type == "cuda"
            else (work[name] / busy, f", CPU time {1000 * busy:.1f} ms")
        )
        print(
            f"{name:<7} {1000 * seconds:8.1f} ms/step {args.batch / seconds:7.2f} clips/s{kept}; {work[name] / 1e9:.1f} GFLOP, {work[name] / seconds / 1e9:.1f} GFLOP/s; "
            f"{rate / 1e9:.1f}{' by CPU time' * (device.type == 'cpu')}, {rate / peaks[dtype]:.0%} of the {peaks[dtype] / 1e9:.0f} of a large {str(dtype)[6:]} matrix product"
        )
    ratio, busy_ratio, _ = (float(r) for r in median["plain"] / median["AST"])
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    if device.type == "cpu":
        print(
            f"peak memory of the process, all networks: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
        )
    print(
        f"ratio plain / AST {ratio:.2f} (of CPU time {busy_ratio:.2f}); nce {losses[0][0]:.6f}, mse {losses[0][1]:.6f} differ by at most {difference:.1e} (same masks, float32, eval)"
    )
    result = {
        "ratio": ratio,
        "cpu_ratio": busy_ratio,
        "difference": difference,
        "losses": losses,
        "flops": work,
        "peaks": {str(d): p for d, p in peaks.items()},
        **{f"{name}_seconds": float(m[0]) for name, m in median.items()},
    }
    if args.visible_only:
        result["visible_ratio"], result["visible_cpu_ratio"] = (
            float(r) for r in (median["AST"] / median["visible"])[:2]
        )
        print(
            f"ratio AST / visible only {result['visible_ratio']:.2f} (of CPU time {result['visible_cpu_ratio']:.2f})"
        )
    return result | bench_masks(device)


# -----------------------------------------------------------------------------------------------------------------
# Training curves
# -----------------------------------------------------------------------------------------------------------------
SCORE_KEYS = {
    "valid_per": "phoneme error rate, validation",
    "valid_r2": "R2, validation",
    "valid_accuracy": "NCE accuracy, validation",
    "valid_loss": "loss, validation",
}


def read_metrics(run: str | Path) -> list[dict]:
    """The lines of a run folder's metrics.jsonl. A last line that a kill cut short is left out; DataError for anything else."""
    path, records = Path(run) / "metrics.jsonl", []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: {error.strerror if isinstance(error, OSError) else error}; expected the metrics of a run; give a run's folder"
        ) from error
    for n, line in enumerate(lines, 1):
        try:
            records.append({"step": int(json.loads(line)["step"]), **json.loads(line)})
        except (ValueError, KeyError, TypeError) as error:
            if n < len(lines):
                raise DataError(
                    f"{path}: line {n} is no log record ({type(error).__name__}); expected a JSON object with a step; give another run"
                ) from error
    if not records:
        raise DataError(f"{path}: no log record; expected some; let the run reach its first --log-every")
    return records


def curves(argv: list[str]) -> dict:
    """`python eval.py curves`: score, loss, gradient norm and skipped updates of runs in one picture; returns the best score and skips by run."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py curves",
        usage="python eval.py curves --run DIR ... --out FILE",
        description="""\
How runs went, in one picture: validation score, training loss, gradient norm before clipping, skipped updates, by step.

    python eval.py curves --run runs/han/NAME --out curves.png
    python eval.py curves --run runs/decoder/default runs/decoder/baseline --out both.svg""",
    )
    parser.add_argument(
        "--run",
        nargs="+",
        required=True,
        metavar="DIR",
        help="run folders, such as runs/decoder/NAME (required)",
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="picture to write: .png, .svg or .pdf (required)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (off)")
    args = parser.parse_args(argv)
    check_picture(Path(args.out))
    names = [Path(run).name for run in args.run]
    runs = {
        run if names.count(name) > 1 else name: read_metrics(run)
        for run, name in zip(args.run, names, strict=True)
    }
    score = next(
        (key for key in SCORE_KEYS if all(any(key in r for r in records) for records in runs.values())), None
    )
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = {
        key: (figure.add_subplot(2, 2, n), title)
        for n, (key, title) in enumerate(
            {
                score: SCORE_KEYS.get(score, "no evaluation"),
                "loss": "training loss",
                "norm": "gradient norm before clipping",
                "skips": "skipped updates so far",
            }.items(),
            1,
        )
    }
    for name, records in runs.items():
        lines = {
            key: [(r["step"], r[key]) for r in records if r.get(key) is not None]
            for key in (score, "loss", "norm")
        }
        lines["skips"] = [(r["step"], sum(r["skipped"].values())) for r in records if "skipped" in r]
        for key, (axes, _) in panels.items():
            axes.plot(
                *zip(*lines[key], strict=True) if lines[key] else ([], []),
                label=name,
                marker="o" if key == score else None,
                markersize=3,
                linewidth=1,
            )
    for key, (axes, title) in panels.items():
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.set_yscale("log" if key == "norm" else "linear")
    panels[score][0].legend()
    file = io.BytesIO()
    figure.savefig(file, format=Path(args.out).suffix[1:], dpi=110)
    write_atomic(Path(args.out), lambda out: out.write(file.getvalue()))
    better = max if score in ("valid_r2", "valid_accuracy") else min
    best = {
        name: better((r[score] for r in records if r.get(score) is not None), default=None)
        for name, records in runs.items()
    }
    for name, records in runs.items():
        norms = [r["norm"] for r in records if r.get("norm") is not None]
        skipped = next((r["skipped"] for r in reversed(records) if "skipped" in r), {})
        print(
            f"{name:<32} {records[-1]['step']:>7} steps  best {score} {best[name]}  largest logged norm {max(norms, default=math.nan):.3g}  skipped {skipped}"
        )
    print(f"saved {args.out}")
    return best


# -----------------------------------------------------------------------------------------------------------------
# Prediction
# -----------------------------------------------------------------------------------------------------------------

BAR = 25  # characters of the scale from 0 to 1
MOST_BINS = 60_000  # of a trial in an .npy file: 20 minutes
FILE_KINDS = {"midi": (".mid", ".midi"), "audio": (".wav",)}


def _label_group(label: str) -> str:
    return next(
        (group for group in ("Music_Making", "Emotion_&_Mood") if label.startswith(group)),
        label.split("_")[0],
    )


def _poles(label: str) -> tuple[str, str]:
    """The two halves of what follows the group in a label's name: either pole has as many words."""
    words = label.removeprefix(_label_group(label) + "_").split("_")
    left, right = words[: len(words) // 2], words[len(words) // 2 :]
    return " ".join(left).capitalize(), " ".join(right).capitalize()


# What a rating of 0 and a rating of 1 say: the first word of the name, then the second. Not so for the first articulation: its
# ratings rise with sounding length (r .71 over all, .51 within segments) and pedal (.74, .59), and the dataset's README calls it Short_Long.
LABEL_POLES = {label: _poles(label) for label in LABELS}
LABEL_POLES |= {
    "Articulation_Long_Short": ("Short", "Long"),
    "Articulation_Soft_cushioned_Hard_solid": ("Soft/cushioned", "Hard/solid"),
}


def predict(argv: list[str]) -> list[dict]:
    """`python eval.py predict`: ratings or phonemes of files that need not be of any dataset; returns the records of `predict_files`."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py predict",
        usage="python eval.py predict --ckpt FILE ... INPUT [options]",
        description="""\
Ratings (19, from 0 to 1) of piano performances, or phonemes of speech trials, of your own: needs a checkpoint and no data set.
The checkpoint says what is to be given:

    HAN              --score FILE and --midi PATH      both, also where it was trained with --features score or perf
    AST, CNN, MLP    --audio PATH or --midi PATH       MIDI is played by the built-in piano
    decoder          --speech PATH                     bins of 20 ms

    python eval.py predict --ckpt runs/han/full_s7_f?/best.pt --score piece.musicxml --midi takes/ --csv ratings.csv
    python eval.py predict --ckpt runs/decoder/NAME/best.pt --speech trials/ --day nearest --json -

A rating's bar runs from 0 to 1: o is the prediction, | the mean of the ratings that trained the model.""",
    )
    parser.add_argument(
        "--ckpt",
        nargs="+",
        required=True,
        metavar="FILE",
        help="best.pt of one or more runs of a task, averaged (required)",
    )
    add = parser.add_argument_group("input").add_argument
    of_han = [
        add(
            "--score",
            nargs="+",
            metavar="FILE",
            help="MusicXML; one for all --midi, or as many as --midi, in the same order",
        )
    ]
    add("--midi", nargs="+", metavar="PATH", help="MIDI files, or folders of them")
    of_audio = [
        add("--audio", nargs="+", metavar="PATH", help="WAV files of any rate and length, or folders of them")
    ]
    of_decoder = [
        add(
            "--speech",
            nargs="+",
            metavar="PATH",
            help="corpus folder, .mat file of '24, or .npy files (bins, channels) and folders of them",
        ),
        add(
            "--day",
            metavar="DAY",
            help="day layer: a session's name; or, of unknown sessions, nearest (date in the name) or mean "
            "(.npy: mean; else: refused)",
        ),
        add(
            "--raw",
            action="store_true",
            help="take .npy as it is (off: the files of a folder are z-scored together, as blocks in training, "
            "unless they came so)",
        ),
    ]
    add = parser.add_argument_group("output").add_argument
    add(
        "--json",
        metavar="FILE",
        help="write all predictions and their circumstances; -: standard output, the rest to standard error (off)",
    )
    add("--csv", metavar="FILE", help="write a line a prediction; - as above (off)")
    add(
        "--explain",
        metavar="PATH",
        help="draw what predictions rest on: FILE.png of one input, or folder of NAME.png (off)",
    )
    add(
        "--strict",
        action="store_true",
        help="stop at the first input that is refused (off: it is reported and counted)",
    )
    add("--cache", default="cache", metavar="DIR", help="folder of converted speech corpora (%(default)s)")
    args = _parse(parser, argv)
    for option, path in (("--json", args.json), ("--csv", args.csv)):
        if path not in (None, "-"):
            check_output(Path(path), option)
    if args.json == args.csv == "-":
        raise DataError(
            "--json - --csv -: both on standard output; expected one there; name a file for the other"
        )
    loaded = _load_models(args.ckpt)
    task = loaded[0][2]["task"]
    if task != "han":
        _refuse_given(args, of_han, "train_han.py", task)
    if task not in AUDIO_TASKS:
        _refuse_given(args, of_audio, "pretrain_ast.py", task)
    if task != "decoder":
        _refuse_given(args, of_decoder, "train_decoder.py", task)
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if "-" in (args.json, args.csv) else contextlib.nullcontext():
        records, refused = predict_files(loaded, args)
        print(f"{len(records)} predicted" + f", {len(refused)} refused (see above)" * bool(refused))
        if not records:
            raise DataError(
                f"nothing predicted: all {len(refused)} inputs were refused; expected at least one that can be read; see the lines above"
            )
        for path, text in ((args.json, _predictions_json), (args.csv, _predictions_csv)):
            if path == "-":
                out.write(text(records, refused, loaded, args))
            elif path:
                write_atomic(
                    Path(path),
                    lambda file, text=text: file.write(
                        text(records, refused, loaded, args).encode(errors="surrogateescape")
                    ),
                )
                print(f"saved {path}")
    return records


def predict_files(loaded: list[tuple], args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """Predictions of all inputs of args in their order, printed as they come, and the line of each that was refused (--strict: raised).

    han, ast: name, path, ratings (19,) in [0, 1]; han also score, match_rate, extra (share of played notes without a score
    note), notes (of either); ast seconds. decoder: id, path, session, seconds, phonemes (ids), reference (ids; None: unknown), errors (sub, del, ins; None)."""
    kind, members = _predictors(loaded)
    jobs = {"han": _han_jobs, "ast": _ast_jobs, "decoder": _decoder_jobs}[kind](loaded, members, args)
    known, records, refused, taken = _training_ratings(members), [], [], set()

    def refuse(error: DataError) -> None:
        if args.strict:
            raise error
        refused.append(_printable(error))
        tqdm.write(f"refused: {refused[-1]}")

    _one_picture(args, len(jobs))
    if kind != "decoder":
        print(
            f"predictions of {len(members)} checkpoints averaged"
            if len(members) > 1
            else f"{args.ckpt[0]}, step {loaded[0][2]['step']}"
        )
        if members[0][1]["data"]["synthetic"]:
            print("trained on the SYNTHETIC corpus: its ratings say nothing about real performances")
    for job in tqdm(jobs, desc="predict", unit="file", leave=False, disable=None):
        try:
            done = job(refuse)
        except DataError as error:
            if len(jobs) == 1:
                raise
            refuse(error)
            continue
        for record, work in done:
            tqdm.write(_show_trial(record) if kind == "decoder" else _show_ratings(record, known))
            if args.explain:
                picture = _picture_of(args, work["name"], taken)
                try:
                    explain(kind, picture, members, work)
                    tqdm.write(f"drawn: {picture}")
                except DataError as error:
                    if args.strict or len(jobs) == len(done) == 1:
                        raise
                    tqdm.write(f"no picture: {error}")
            records.append(record)
    if labelled := [record for record in records if record.get("errors")]:
        rate = error_rate(np.array([[*record["errors"], len(record["reference"])] for record in labelled]))
        seen = any(
            record["id"].startswith("train/") or Path(record["path"]).parent.name == "train"
            for record in labelled
        )
        print(
            f"PER of {len(labelled)} labelled trials {rate:.4f}"
            + " (some of part train, on which the model may have been trained: no result)" * seen
        )
    return records, refused


def _predictors(loaded: list[tuple]) -> tuple[str, list[tuple]]:
    """han, ast (all audio tasks) or decoder, and [(model, what of the checkpoint is needed), ...]. DataError for a pre-training,
    and for checkpoints whose predictions cannot be averaged."""
    for path, model, ckpt in loaded:
        if ckpt["task"] == "ast" and model.model_args["num_outputs"] is None:
            raise DataError(
                f"{path}: a pre-training, which rates nothing; expected a fine-tuned best.pt; "
                f"run python pretrain_ast.py --task finetune --init {path} --data DIR"
            )
    if loaded[0][2]["task"] == "decoder":
        _shared_settings(loaded)
        return "decoder", [(model, ckpt) for _, model, ckpt in loaded]
    folds, _ = _load_fold_models(loaded)
    return "han" if loaded[0][2]["task"] == "han" else "ast", [
        member for members in folds.values() for member in members
    ]


def _one_picture(args: argparse.Namespace, count: int) -> None:
    """Refuses an --explain that is no picture, cannot be written, or is one picture for several inputs."""
    if args.explain:
        out = Path(args.explain)
        is_folder = out.is_dir() or not out.suffix
        check_picture(out / "name.png" if is_folder else out)
        if count > 1 and not is_folder:
            raise DataError(
                f"--explain {out}: one picture for {count} inputs; expected a folder for them; leave the {out.suffix} out"
            )


def _printable(text: object) -> str:
    """Without the bytes of a file name that are no text."""
    return str(text).encode(errors="replace").decode()


def _picture_of(args: argparse.Namespace, name: str, taken: set[str]) -> Path:
    """The file of one explanation; inputs of one name get numbers."""
    out = Path(args.explain)
    if out.suffix and not out.is_dir():
        return out
    name = re.sub(r"[^\w.@+-]", "_", name)
    name = next(n for k in range(1, len(taken) + 2) if (n := name if k == 1 else f"{name}_{k}") not in taken)
    taken.add(name)
    return out / f"{name}.png"


def _expand(paths: list[str], suffixes: tuple[str, ...]) -> list[Path]:
    """The files named, and in place of a folder those in it of such a suffix. DataError for a folder without any."""
    files: list[Path] = []
    for path in map(Path, paths):
        found = (
            sorted(f for f in path.iterdir() if f.suffix.lower() in suffixes and f.name[0] != ".")
            if path.is_dir()
            else [path]
        )
        if not found:
            raise DataError(
                f"{path}: a folder without a file of kind {' or '.join(suffixes)}; expected some; name another"
            )
        files += found
    return files


def _training_ratings(members: list[tuple]) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and deviation (19,) of the ratings that trained the models, as far as each checkpoint knows them; else None."""
    rows = []
    for _, kept in members:
        info, standardised = kept["data"], kept["args"].get("standardise") == "dimension"
        keys = next(
            (
                keys
                for keys in (("rating_mean", "rating_std"), ("target_mean", "target_std"))
                if keys[0] in info
            ),
            None,
        )
        if keys and (keys[0] == "rating_mean" or standardised):
            rows.append([info[key] for key in keys])
    return tuple(np.mean(rows, axis=0)) if rows else None


def _han_jobs(loaded: list[tuple], members: list[tuple], args: argparse.Namespace) -> list[Callable]:
    if not args.score or not args.midi:
        raise DataError(
            f"{args.ckpt[0]}: of task 'han', which compares a performance with its score; "
            "expected --score FILE.musicxml and --midi FILE.mid; give both"
        )
    if len(args.score) > 1 and len(args.score) != len(args.midi):
        raise DataError(
            f"--score names {len(args.score)} files, --midi {len(args.midi)}; expected one score, or as many of both, in the same order"
        )
    pairs = (
        zip(args.score, [[path] for path in args.midi], strict=True)
        if len(args.score) > 1
        else [(args.score[0], args.midi)]
    )
    return [
        functools.partial(_rate_performance, members, args, score, midi)
        for score, paths in pairs
        for midi in _expand(paths, FILE_KINDS["midi"])
    ]


def _rate_performance(
    members: list[tuple], args: argparse.Namespace, score: str, midi: Path, refuse: Callable
) -> list[tuple[dict, dict]]:
    """One performance of a score: its record, and what explains it. DataError where the two do not belong together."""
    ((_, item),) = extract_performances((score, [str(midi)]))
    if isinstance(item, str):
        raise DataError(item)
    name, rate, extra = (
        _printable(midi.stem.strip()),
        item["match_rate"],
        float((item["voice"] == 0).sum() / len(item["performance"].pitch)),
    )
    if rate < MISALIGNED:
        raise DataError(
            f"{midi}: holds {rate:.0%} of the notes of {score}; expected {MISALIGNED:.0%} or more of the score that was played; "
            "is it the wrong piece, another edition or passage, or are repeats left out? Give the score of what is played"
        )
    item["name"] = name
    corpus = Corpus(score, False, {name: item}, [name], column_names(FEATURES), item["stat_names"], {})
    p = np.mean(
        [
            predict_han(model, prepare_han(corpus, [name], kept["data"]), args.device)
            for model, kept in members
        ],
        axis=0,
    )[0]
    record = {
        "name": name,
        "path": str(midi),
        "score": score,
        "match_rate": rate,
        "extra": extra,
        "notes": len(item["x"]),
        "ratings": p,
    }
    work = {"name": name, "item": item, "ratings": p}
    if args.explain:
        work |= {"score": read_musicxml(score), "performance": item["performance"], "match": item["match"]}
    return [(record, work)]


def _ast_jobs(loaded: list[tuple], members: list[tuple], args: argparse.Namespace) -> list[Callable]:
    if bool(args.audio) == bool(args.midi):
        raise DataError(
            f"{args.ckpt[0]}: of task {loaded[0][2]['task']!r}, which rates sound; "
            "expected --audio FILE.wav, or --midi FILE.mid to be rendered; give one of them"
        )
    if args.explain:
        _need_attention(members)
    source, trained = "audio" if args.audio else "midi", members[0][1]["data"]["audio"]
    if trained != (kind := "wav" if args.audio else "rendered"):
        print(
            f"trained on audio of kind {trained}, given {kind}: other noise and rooms than it knows, so its ratings say little; fine-tune with --audio to rate recordings"
        )
    return [
        functools.partial(_rate_audio, members, args, source, path)
        for path in _expand(getattr(args, source), FILE_KINDS[source])
    ]


def _rate_audio(
    members: list[tuple], args: argparse.Namespace, source: str, path: Path, refuse: Callable
) -> list[tuple[dict, dict]]:
    _, energies = read_piece(argparse.Namespace(**{"audio": None, "midi": None, source: str(path)}))
    name = _printable(path.stem)
    item = {
        "name": name,
        "frames": len(energies),
        "fbank": energies.astype(np.float16),
    }  # rounded as those that trained the model
    p = np.mean([predict_ast(model, [item], kept["data"], args.device) for model, kept in members], axis=0)[0]
    record = {"name": name, "path": str(path), "seconds": len(energies) * HOP / SAMPLE_RATE, "ratings": p}
    return [(record, {"name": name, "path": str(path), "energies": energies, "ratings": p})]


def _decoder_jobs(loaded: list[tuple], members: list[tuple], args: argparse.Namespace) -> list[Callable]:
    """A job for each corpus or file, and one for all .npy files of a folder."""
    if not args.speech or args.midi:
        raise DataError(
            f"{args.ckpt[0]}: of task 'decoder', which reads neural activity; expected --speech FILE_OR_FOLDER alone; give that"
        )
    sources: dict[Path, list[Path]] = {}
    for path in map(Path, args.speech):
        inside = (
            sorted(path.glob("[!.]*.npy"))
            if path.is_dir() and not (path / "trials.json").is_file()
            else [path]
            if path.suffix == ".npy"
            else []
        )
        folder = path if path.is_dir() or not inside else path.parent
        sources[folder] = list(dict.fromkeys(sources.get(folder, []) + inside))
    if args.raw and not any(sources.values()):
        raise DataError(
            f"--raw: for .npy files only; given {', '.join(args.speech)}, which a conversion has standardised; leave it out"
        )
    return [functools.partial(_decode, loaded, args, path, files) for path, files in sources.items()]


def _decode(
    loaded: list[tuple], args: argparse.Namespace, source: Path, files: list[Path], refuse: Callable
) -> list[tuple[dict, dict]]:
    """All trials of a corpus, of a .mat file, or of the .npy files of a folder: records, and what explains them."""
    channels, stride = loaded[0][2]["data"]["channels"], loaded[0][1].stride
    if files:
        corpus = _npy_corpus(source, files, channels, args.raw, refuse)
        if not corpus.ids:
            return []
    else:
        corpus = (
            _mat_corpus(source, channels, args.strict)
            if source.suffix == ".mat"
            else open_speech(source, args.cache, args.strict)
        )
    if corpus.channels != channels:
        raise DataError(
            f"{source}: {corpus.channels} channels; {args.ckpt[0]} expects {channels}; give recordings of those"
        )
    trials, sessions, day, rule = (
        np.arange(len(corpus.ids)),
        corpus.days,
        corpus.day,
        args.day or ("mean" if files else None),
    )
    if files and rule == "mean":
        corpus = replace(corpus, day=np.zeros(len(trials), np.int64), days=["of .npy files"])
    _one_picture(args, len(trials))
    for line in corpus.left_out:
        print(f"left out: {line}")
    if rule not in (None, "nearest", "mean"):
        corpus, rule = replace(corpus, days=[rule] * len(sessions)), None
        print(f"{source}: day layer of {args.day} for every trial")
    settings = argparse.Namespace(ckpt=args.ckpt, device=args.device, day=rule, batch=64, part=None)
    log_probs = mean_logits(loaded, corpus, trials, settings)
    _say_circumstances(settings, loaded, corpus, trials)
    results = []
    for i, row in enumerate(log_probs):
        ids, reference = (
            ctc_greedy(row[None], [len(row)])[0],
            corpus.labels[i].tolist() if corpus.labelled[i] else None,
        )
        record = {
            "id": corpus.ids[i],
            "path": corpus.text[i] if files else str(source),
            "session": sessions[day[i]],
            "seconds": float(corpus.lengths[i] * BIN),
            "phonemes": ids,
            "reference": reference,
            "errors": None if reference is None else edit_counts(reference, ids),
        }
        results.append(
            (
                record,
                {
                    "name": corpus.ids[i],
                    "log_probs": row,
                    "phonemes": ids,
                    "labels": reference,
                    "seconds per frame": stride * BIN,
                },
            )
        )
    return results


def _npy_corpus(folder: Path, files: list[Path], channels: int, raw: bool, refuse: Callable) -> SpeechCorpus:
    """A trial a file; `text` holds the files' paths. Unless raw, the features are z-scored over all of them, as a conversion does
    with the trials of a block: one that came standardised stays as it is."""
    trials = []
    for path in files:
        try:
            trials.append({"path": path, "block": 0, "x": _read_trial(path, channels)})
        except DataError as error:
            if len(files) == 1:
                raise
            refuse(error)
    report, how = ConversionReport(False), "taken as they are (--raw)"
    if trials and not raw:
        came_so = standardise_blocks(trials, str(folder), report)[1]
        how = (
            "standardised when they came"
            if came_so
            else f"z-scored {'together, as one block' if len(files) > 1 else 'alone, as a block of its own'}"
        )
    if trials:
        print("\n".join([f"{folder}: {len(trials)} .npy trials, {how}", *report.notes]))
    lengths, nothing = [len(trial["x"]) for trial in trials], [np.zeros(0, np.int64)] * len(trials)
    names = [_printable(trial["path"].stem) for trial in trials]
    return SpeechCorpus(
        features=np.concatenate([np.zeros((0, channels), np.float32), *(trial["x"].astype(np.float32) for trial in trials)]), offsets=np.cumsum([0, *lengths]),
        day=np.arange(len(trials)), block=np.zeros(len(trials), np.int64), part=np.full(len(trials), ""), labels=nothing, text=[str(t["path"]) for t in trials],
        ids=names, days=names, channels=channels, root=folder, synthetic=False, left_out=[], labelled=np.zeros(len(trials), bool))  # fmt: skip


def _read_trial(path: Path, channels: int) -> np.ndarray:
    """(bins, channels) finite numbers from an .npy file; nothing is unpickled. DataError for all else."""
    wanted = f"expected one trial, numbers (1 to {MOST_BINS} bins of 20 ms, {channels} channels), as np.save writes it; save it so"
    try:
        with path.open("rb") as file:
            start = file.read(6)
        if start != b"\x93NUMPY":
            raise ValueError(
                f"a file that starts with {start!r}, not b'\\x93NUMPY'" if start else "an empty file"
            )
        x = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, ArithmeticError, MemoryError) as error:
        raise DataError(
            f"{path}: {getattr(error, 'strerror', None) or ' '.join(str(error).split())[:150] or type(error).__name__}; {wanted}"
        ) from error
    if x.dtype.kind not in "fiu":
        raise DataError(f"{path}: type {x.dtype}; {wanted}")
    if x.ndim != 2 or x.shape[1] != channels or not 0 < len(x) <= MOST_BINS:
        raise DataError(
            f"{path}: shape {x.shape}{', the other way round' * (x.ndim == 2 and len(x) == channels)}; {wanted}"
        )
    if found := unusable_bins(x):
        raise DataError(f"{path}: {found}; leave the trial out or mend it")
    return np.array(x)


def _mat_corpus(path: Path, channels: int, strict: bool) -> SpeechCorpus:
    """The trials of one .mat file of the '24 layout: with labels where it has sentences (which g2p_en must spell), else without."""
    refusals = []
    for part in ("test", "competitionHoldOut"):
        with (
            tempfile.TemporaryDirectory() as scratch
        ):  # a corpus of this one file; its features stay mapped when the folder goes
            link = Path(scratch) / part / path.name
            link.parent.mkdir()
            link.symlink_to(path.absolute())
            try:
                convert_speech(
                    scratch,
                    Path(scratch) / "converted",
                    channels=None if channels == 256 else channels,
                    strict=strict,
                    quiet=True,
                )
                corpus = open_speech(Path(scratch) / "converted")
            except DataError as error:
                refusals.append(str(error).replace(str(link), str(path)))
                continue
        for line in refusals:
            print(f"no labels: {line}")
        lines = [line.replace(str(link), str(path)) for line in corpus.left_out]
        synthetic = any((parent / "SYNTHETIC").is_file() for parent in path.absolute().parents[:3])
        return replace(
            corpus,
            root=path,
            ids=[trial.partition("/")[2] for trial in corpus.ids],
            left_out=lines,
            synthetic=synthetic,
        )
    raise DataError(refusals[0])


def _scale(value: float, mean: float | None) -> str:
    """`....|===o....`: the value among BAR characters from 0 to 1, and its way from the mean."""
    cells, at = ["."] * BAR, round(value * (BAR - 1))
    if mean is not None:
        middle = round(mean * (BAR - 1))
        cells[min(at, middle) : max(at, middle)] = "=" * abs(at - middle)
        cells[middle] = "|"
    cells[at] = "o"
    return "".join(cells)


def _show_ratings(record: dict, known: tuple[np.ndarray, np.ndarray] | None) -> str:
    """The 19 ratings between their poles, at most 100 columns; known: mean and deviation of the training ratings."""
    if "seconds" in record:
        lines = [f"\n{record['name']}, {record['seconds']:.1f} s"]
    else:
        doubt = ": a longer recording, or another edition?" * (record["extra"] > 0.5)
        lines = [
            f"\n{record['name']} with {Path(record['score']).name}",
            f"{record['match_rate']:.1%} of the score's notes were found; {record['extra']:.1%} of the played notes are not in it{doubt}",
        ]
        if record["notes"] > MAX_NOTES:
            lines.append(
                f"{record['notes']} notes, where PercePiano's passages of 4 to 16 bars have {MAX_NOTES} at most: cut it into passages"
            )
    lines.append(f"{'':<39}0{'':<{BAR - 2}}1{'':<20}value" + "  mean   SD" * (known is not None))
    for d, (label, value) in enumerate(zip(LABELS, record["ratings"], strict=True)):
        group, (left, right) = _label_group(label), LABEL_POLES[label]
        shown = group.replace("_", " ").capitalize() if d == 0 or _label_group(LABELS[d - 1]) != group else ""
        mean, spread = (known[0][d], known[1][d]) if known else (None, None)
        lines.append(
            f"{shown:<14} {left:>23} {_scale(value, mean)} {right:<19}{value:5.2f}"
            + (f" {mean:5.2f} {spread:4.2f}" if known else "")
        )
    return "\n".join(lines)


def _show_trial(record: dict) -> str:
    lines = [f"{record['id']}: {record['seconds']:.2f} s, {len(record['phonemes'])} phonemes"]
    if record["reference"] is not None:
        sub, dele, ins = record["errors"]
        lines[0] += (
            f", PER {(sub + dele + ins) / len(record['reference']):.3f} (sub {sub} del {dele} ins {ins} of {len(record['reference'])})"
        )
        lines.append(f"  reference  {spell(record['reference'])}")
    return "\n".join([*lines, f"  decoded    {spell(record['phonemes']) or '(nothing)'}"])


def _predictions_json(
    records: list[dict], refused: list[str], loaded: list[tuple], args: argparse.Namespace
) -> str:
    """Predictions, refusals and circumstances: what --json writes."""
    used = [
        {
            "path": str(path),
            "fold": ckpt["data"].get("fold"),
            "seed": ckpt["args"].get("seed"),
            **{key: ckpt[key] for key in ("task", "step", "git_sha")},
        }
        for path, _, ckpt in loaded
    ]
    saved = {
        "command": args.command,
        **git_state(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "trained_on_synthetic": loaded[0][2]["data"]["synthetic"],
        "checkpoints": used,
    }
    if "ratings" in records[0]:
        known = _training_ratings([(model, ckpt) for _, model, ckpt in loaded])
        statistics = known and {
            label: {"mean": float(mean), "sd": float(spread)}
            for label, mean, spread in zip(LABELS, *known, strict=True)
        }
        saved |= {
            "poles": {label: list(poles) for label, poles in LABEL_POLES.items()},
            "training": statistics,
        }
        predictions = [
            record | {"ratings": dict(zip(LABELS, record["ratings"].tolist(), strict=True))}
            for record in records
        ]
    else:
        predictions = [
            record
            | {
                "phonemes": spell(record["phonemes"]),
                "reference": record["reference"] and spell(record["reference"]),
                "errors": record["errors"]
                and dict(zip(("sub", "del", "ins"), record["errors"], strict=True)),
            }
            for record in records
        ]
    return (
        json.dumps(
            json_ready(saved | {"predictions": predictions, "refused": refused}), indent=1, allow_nan=False
        )
        + "\n"
    )


def _predictions_csv(
    records: list[dict], refused: list[str], loaded: list[tuple], args: argparse.Namespace
) -> str:
    """A line a prediction, ratings with six decimals: what --csv writes."""
    if "ratings" in records[0]:
        about = [key for key in records[0] if key != "ratings"]
        rows = [
            [*about, *LABELS],
            *(
                [*(record[key] for key in about), *(f"{value:.6f}" for value in record["ratings"])]
                for record in records
            ),
        ]
    else:
        about = ["id", "path", "session", "seconds"]
        rows = [[*about, "phonemes", "reference", "sub", "del", "ins"]]
        for record in records:
            rows.append(
                [
                    *(record[key] for key in about),
                    spell(record["phonemes"]),
                    spell(record["reference"] or ()),
                    *(record["errors"] or ("", "", "")),
                ]
            )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


# -----------------------------------------------------------------------------------------------------------------
# Explanation
# -----------------------------------------------------------------------------------------------------------------

# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = {
    "measure": "#c7c7c7",
    "beat": "#0072b2",
    "beat in measure": "#d55e00",
    "curve": "#0072b2",
    "spread": "#9ecae1",
    "wrong": "#d55e00",
}
ARTICULATION = {
    "vowels": "IY IH EY EH AE AA AO OW UH UW AH ER AY AW OY",
    "stops": "P B T D K G CH JH",
    "fricatives": "F V TH DH S Z SH ZH HH",
    "sonorants": "M N NG L R W Y",
    "": "SIL",
}  # rows of the decoder's picture: what is confused stands together
SMOOTH = 0.7, 0.5  # SD of the tempo curve's smoothing: beats, seconds; the longer one counts
SEEN = 0.05  # classes that never reach this probability are left out
MOST_BEATS = 150  # that are drawn with lines of their own
MOST_IN_ROW = 46  # phoneme names side by side


def explain(kind: str, out: str | Path, members: list[tuple], work: dict) -> dict:
    """Draws what one prediction rests on, 1600 pixels wide, as `predict --explain` asks; returns the figures in the picture.

    kind: task of the checkpoints; members: [(model, what of its checkpoint is needed), ...], averaged; work: what `predict` knows
    of the file. A network without attention, or a piece of which nothing can be drawn, raises DataError before anything is written."""
    out = Path(out)
    check_picture(out)
    if kind == "decoder":
        return explain_decoder(out, members, work)
    return explain_han(out, members, work) if kind == "han" else explain_ast(out, members, work)


def explicit_attention(
    attention: ContextAttention, x: Tensor, group: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """`attention(x, group, groups)`, and the weights (M, H) of the members that it keeps to itself: they sum to 1 in each group."""
    (H, D), M = attention.context_vector.shape, len(x)
    hidden = torch.tanh(attention.linear(x)).view(M, H, D)
    weights = group_softmax(
        torch.einsum("mhd,hd->mh", hidden, attention.context_vector).float(), group, groups
    )
    weighted = torch.einsum("mhd,mh->mhd", x.float().view(M, H, D), weights).flatten(1)
    return weighted.new_zeros(groups, H * D).index_add(0, group, weighted), weights


@torch.no_grad()
def attention_weights(model: HAN, batch: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """{"beat_attention", "measure_attention", "attention": (weights (M, H), group of each member (M,))} of those that a HAN has."""
    found = {}

    def follow(name: str, module: ContextAttention, inputs: tuple, _) -> None:
        found[name] = explicit_attention(module, *inputs)[1], inputs[1]

    hooks = [
        module.register_forward_hook(functools.partial(follow, name))
        for name, module in model.named_modules()
        if isinstance(module, ContextAttention)
    ]
    try:
        model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def han_attention(members: list[tuple], item: dict) -> dict[str, np.ndarray]:
    """What the attention of HANs weighs in one un-normalised item, in units of an even share, averaged over heads and members:
    "note in beat", "note" (rows of the item; NaN where no member reads a row), "beat in measure", "beat" (beats), "measure" (measures).
    note, beat and measure are weights in the whole piece, summed from what the last attention pools; levels that no member has are absent."""
    of_beat, of_measure = (np.unique(item[key], return_inverse=True)[1] for key in ("beat", "measure"))
    measure_of_beat = of_measure[np.unique(of_beat, return_index=True)[1]]
    corpus, levels = (
        Corpus("", False, {item["name"]: item}, [item["name"]], column_names(FEATURES), [], {}),
        {},
    )
    for model, kept in members:
        batch, own = collate_han(prepare_han(corpus, [item["name"]], kept["data"])), {}
        read = item["voice"] > 0 if kept["data"]["features"] == "score" else np.ones(len(of_beat), bool)
        pooled = model.level if model.level in ("beat", "measure") else "note"
        names = {
            "beat_attention": "note in beat",
            "measure_attention": "beat in measure",
            "attention": pooled,
        }
        for name, (weights, group) in attention_weights(
            model.eval(), to_device(batch, next(model.parameters()).device)
        ).items():
            own[names[name]] = (weights.double().mean(1) * torch.bincount(group)[group]).cpu().numpy()
        if pooled == "note":
            own |= {
                "beat": _group_mean(own["note"], of_beat[read]),
                "measure": _group_mean(own["note"], of_measure[read]),
            }
        elif pooled == "beat":
            own["measure"] = _group_mean(own["beat"], measure_of_beat)
        for level in own.keys() & {"note", "note in beat"}:
            rows = np.full(len(read), np.nan)
            rows[read] = own[level]
            own[level] = rows
        for level, values in own.items():
            levels.setdefault(level, []).append(values)
    counts = {level: np.isfinite(values).sum(0) for level, values in levels.items()}
    return {
        level: np.where(counts[level], np.nansum(values, axis=0) / counts[level].clip(1), np.nan)
        for level, values in levels.items()
    }


def _group_mean(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    return np.bincount(group, values) / np.bincount(group)


def time_map(score, performance, match: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quarters, seconds and beat of every chord that was matched, in order of time: mean onsets of the notes whose match
    `note_features` keeps, graces apart. Refuses a performance without any."""
    rows = np.flatnonzero((note_features(score, performance, match)["matched"] > 0) & ~score.grace)
    if not len(rows):
        raise DataError(
            f"{performance.path}: no note of {score.path} was found in it; expected a performance of that score; nothing can be drawn"
        )
    quarter, first, chord = np.unique(score.onset[rows], return_index=True, return_inverse=True)
    second = _group_mean(performance.onset[match[rows]], chord)
    later = np.append(True, second[1:] > np.maximum.accumulate(second)[:-1])
    return quarter[later], second[later], score.beat[rows[first]][later]


def clock(quarter: np.ndarray, second: np.ndarray, at: np.ndarray, qpm: float) -> np.ndarray:
    """Seconds of the positions `at` (quarters) by a time map, prolonged at the mean tempo of the piece; of one chord, at `qpm`."""
    pace = (second[-1] - second[0]) / (quarter[-1] - quarter[0]) if len(quarter) > 1 else 60 / qpm
    return np.interp(at, quarter, second) + pace * (
        np.minimum(at - quarter[0], 0) + np.maximum(at - quarter[-1], 0)
    )


def tempo_curve(
    quarter: np.ndarray, second: np.ndarray, beat: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Local tempo of a time map: (k + 1,) seconds at which beats begin, (k,) quarters per minute from each to the next, and the same
    smoothed (quarters over minutes, both weighted by a Gaussian of SMOOTH within a run). NaN where a beat between was not matched."""
    first = np.unique(beat, return_index=True)[1]
    begin, length, time, step = (
        second[first],
        np.diff(quarter[first]),
        np.diff(second[first]),
        np.diff(beat[first]),
    )
    run, width = np.cumsum(step > 1), max(SMOOTH[0], SMOOTH[1] / np.median(time)) if len(time) else 1
    weight = (
        np.exp(-((np.subtract.outer(beat[first[:-1]], beat[first[:-1]]) / width) ** 2) / 2)
        * (run[:, None] == run)
        * (step == 1)
    )
    known = np.where(step == 1, 60.0, np.nan)
    return begin, known * length / time, known * (weight @ length) / (weight @ time).clip(1e-9)


def played_rows(score, item: dict, seconds: Callable) -> tuple[np.ndarray, np.ndarray]:
    """(rows, 4) pitch, velocity, onset, offset (seconds) of an item's rows, and which of them sounded; the others stand where
    `seconds` (of quarters) expects them."""
    names, written = column_names(FEATURES), item["voice"] > 0
    notes = item["x"][
        :, [names.index(f"raw_{key}") for key in ("pitch", "velocity", "onset", "offset")]
    ].astype(float)
    sounded = item["matched"] | ~written
    expected = np.stack(
        [score.pitch, 0 * score.onset, seconds(score.onset), seconds(score.onset + score.duration)], 1
    )
    notes[~sounded] = expected[~sounded[written]]
    return notes, sounded


def beat_dynamics(notes: np.ndarray, sounded: np.ndarray, of_beat: np.ndarray) -> np.ndarray:
    """(beats, 2) mean and deviation of the velocities played in each beat, NaN where none was. A key that two voices share counts once."""
    rows = np.flatnonzero(sounded)
    rows = rows[np.unique(notes[rows][:, [0, 2]], axis=0, return_index=True)[1]]
    total = np.stack([np.bincount(of_beat[rows], notes[rows, 1] ** k, of_beat.max() + 1) for k in range(3)])
    mean, square = total[1:] / np.where(total[0] > 0, total[0], np.nan)
    return np.stack([mean, np.sqrt((square - mean**2).clip(0))], 1)


def explain_han(out: Path, members: list[tuple], work: dict) -> dict:
    """What HANs weigh in one performance, its tempo and its dynamics, over time: see `explain`. work: name, score, performance, match, item.

    Returns levels (`han_attention`), notes and sounded (`played_rows`), edges (seconds at which "beat"s and "measure"s begin, and the end),
    bars (number of each measure), begin, qpm, smooth (`tempo_curve`), dynamics (`beat_dynamics`)."""
    score, item = work["score"], {**work["item"], "name": work["name"]}
    quarter, second, beat = time_map(score, work["performance"], work["match"])
    seconds = functools.partial(clock, quarter, second, qpm=score.tempo_qpm)
    levels = han_attention(members, item)
    if not np.isfinite(levels["measure"]).all():
        raise DataError(
            f"{work['name']}: attention weights that are not finite; expected numbers; look for NaN in its features"
        )
    notes, sounded = played_rows(score, item, seconds)
    end = max(seconds((score.onset + score.duration).max()), notes[sounded, 2].max())
    first = {
        key: score.onset[np.unique(getattr(score, key), return_index=True)[1]] for key in ("beat", "measure")
    }
    beats, bars = _at_grid(score.beats, first["beat"]), _at_grid(score.measures, first["measure"])
    edges = {
        "beat": np.append(seconds(score.beats[beats]), end),
        "measure": np.append(seconds(score.measures[bars]), end),
    }
    begin, qpm, smooth = tempo_curve(quarter, second, beat)
    dynamics = beat_dynamics(notes, sounded, np.unique(item["beat"], return_inverse=True)[1])
    drawn = {
        "levels": levels,
        "notes": notes,
        "sounded": sounded,
        "edges": edges,
        "bars": bars + 1,
        "begin": begin,
        "qpm": qpm,
        "smooth": smooth,
        "dynamics": dynamics,
    }
    draw_han(out, drawn, *_han_words(members, work, levels))
    return drawn


def _at_grid(grid: np.ndarray, onset: np.ndarray) -> np.ndarray:
    return (np.searchsorted(grid, onset + 1e-6, side="right") - 1).clip(0)


def _han_words(members: list[tuple], work: dict, levels: dict) -> tuple[str, str]:
    """Title, and the remark beneath."""
    every = np.concatenate([values[np.isfinite(values)] for values in levels.values()])
    low, high = np.percentile(every, [2.5, 97.5]) - 1
    many = f"mean of {len(members)} checkpoints, " if len(members) > 1 else ""
    title = f"{_short(work['name'])}: attention of HAN, tempo, dynamics ({many}{100 * np.mean(work['match'] >= 0):.0f} % of the written notes found)"
    remark = (
        f"95 % of the attention's weights differ from an even share by {_percent(low)} to {_percent(high)}"
        + (": it hardly prefers anything here." if max(high, -low) < 0.1 else ".")
    )
    if any(model.model_args["stats_size"] for model, _ in members):
        remark += (
            "\nAttention is only a part of the explanation: the ratings also rest on statistics of the whole piece (--pooled), "
            "which do not pass through it."
        )
    return title, remark


def draw_han(out: Path, drawn: dict, title: str, remark: str) -> None:
    """Piano roll, weights of measures and beats, tempo, dynamics over one axis of seconds, 1600 x 1200 pixels: the figures of `explain_han`."""
    from matplotlib import rc_context  # takes a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with rc_context({"font.size": 12, "axes.titlesize": 13, "axes.titlelocation": "left"}):
        figure = Figure((16, 12), dpi=100, layout="constrained")
        panels = figure.subplots(4, 2, sharex="col", width_ratios=[90, 1], height_ratios=[5, 4, 3, 3])
        for side in panels[1:, 1]:
            side.set_axis_off()
        shades = _draw_roll(panels[0, 0], drawn)
        figure.colorbar(shades, cax=panels[0, 1], extend="both", format=FuncFormatter(_percent)).set_label(
            "weight against an even share"
        )
        _draw_levels(panels[1, 0], drawn)
        _draw_playing(*panels[2:, 0], drawn)
        _finish_han(panels[:, 0], drawn)
        figure.suptitle(title, fontsize=16, parse_math=False)
        figure.supxlabel(remark, fontsize=12, parse_math=False)
        write_atomic(out, lambda file: figure.savefig(file, format=out.suffix[1:]))


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."


def _percent(share: float, _=None) -> str:
    return "even" if abs(share) < 1e-9 else f"{100 * share:+.3g} %".replace("-", "\N{MINUS SIGN}")


def _widen(axes, low: float, high: float) -> None:
    """Shows at least low..high: rounding errors are no curve."""
    axes.set_ylim(min(axes.get_ylim()[0], low), max(axes.get_ylim()[1], high))


def _width(beats: np.ndarray) -> float:
    """Of lines, in points: a long piece asks for thin ones."""
    return 2.5 if len(beats) <= MOST_BEATS else 0.8


def _draw_levels(axes, drawn: dict) -> None:
    levels, edges = drawn["levels"], drawn["edges"]
    axes.stairs(
        levels["measure"] - 1,
        edges["measure"],
        baseline=0,
        fill=True,
        color=COLOURS["measure"],
        label="measures in the piece",
    )
    for level, label in (("beat", "beats in the piece"), ("beat in measure", "beats in their measure")):
        if level in levels:
            axes.stairs(
                levels[level] - 1,
                edges["beat"],
                baseline=None,
                color=COLOURS[level],
                linewidth=_width(edges["beat"]),
                label=label,
            )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.yaxis.set_major_formatter(_percent)
    _widen(axes, -0.005, 0.005)
    axes.set(title="Which measures and beats the attention prefers", ylabel="weight against\nan even share")


def _draw_playing(pace, loud, drawn: dict) -> None:
    begin, edges, played = drawn["begin"], drawn["edges"]["beat"], drawn["notes"][drawn["sounded"]]
    width = _width(edges)
    if len(drawn["qpm"]):
        pace.stairs(
            drawn["qpm"], begin, baseline=None, color="0.6", linewidth=0.6 * width, label="from beat to beat"
        )
    pace.plot(
        (begin[1:] + begin[:-1]) / 2,
        drawn["smooth"],
        color=COLOURS["curve"],
        linewidth=width,
        marker="o",
        markersize=1.6 * width,
        label="smoothed",
    )
    pace.set(title="Tempo", ylabel="quarters per minute")
    if np.isfinite(drawn["qpm"]).any():
        _widen(pace, 0.95 * np.nanmin(drawn["qpm"]), 1.05 * np.nanmax(drawn["qpm"]))
    else:
        pace.text(
            0.5,
            0.5,
            "no two beats in succession were found: no tempo",
            transform=pace.transAxes,
            ha="center",
            va="center",
        )
    mean, spread = drawn["dynamics"].T
    loud.scatter(played[:, 2], played[:, 1], s=2 * width**2, color="0.55", label="played notes")
    loud.stairs(
        mean + spread,
        edges,
        baseline=mean - spread,
        fill=True,
        color=COLOURS["spread"],
        alpha=0.6,
        label="mean ± deviation in a beat",
    )
    loud.stairs(mean, edges, baseline=None, color=COLOURS["curve"], linewidth=width)
    loud.set(title="Dynamics", ylabel="MIDI velocity", xlabel="time in the performance (s)")


def _draw_roll(axes, drawn: dict):
    """Notes as bars in the colour of their weight; written ones that were not found as dashed outlines. Returns the bars."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import CenteredNorm

    key = "note in beat" if "note in beat" in drawn["levels"] else "note"
    notes, sounded, weight = drawn["notes"], drawn["sounded"], drawn["levels"][key] - 1
    corners = np.stack([notes[:, [x, 0]] + [0, y] for x, y in ((2, -0.5), (2, 0.5), (3, 0.5), (3, -0.5))], 1)
    furthest = max(0.01, np.nanpercentile(np.abs(weight), 99))
    bars = PolyCollection(
        corners[sounded],
        array=np.ma.masked_invalid(weight[sounded]),
        cmap="coolwarm",
        norm=CenteredNorm(0, furthest),
        edgecolors="0.3" if len(notes) < 1000 else "face",
        linewidths=0.5,
    )
    axes.add_collection(bars)
    axes.add_collection(
        PolyCollection(
            corners[~sounded], facecolors="none", edgecolors="0.3", linewidths=1, linestyles="dashed"
        )
    )
    octaves = np.arange(12, 121, 12)
    axes.set_yticks(octaves, [f"C{octave // 12 - 1}" for octave in octaves])
    title = f"Which notes of {'each beat' if key != 'note' else 'the piece'} the attention prefers"
    title += " (dashed: written, but not found)" * (not sounded.all())
    axes.set(ylim=(notes[:, 0].min() - 2, notes[:, 0].max() + 2), ylabel="pitch", title=title)
    axes.grid(axis="y", alpha=0.4)
    return bars


def _finish_han(panels: Iterable, drawn: dict) -> None:
    """Lines at the measures and beats through all panels, numbers of measures on top, legends; of a long piece fewer lines."""
    edges, bars, notes = drawn["edges"], drawn["bars"], drawn["notes"]
    every = next((k for k in (1, 2, 5, 10, 20, 50) if len(bars) <= 20 * k), len(bars) // 20)
    for axes in panels:
        if len(edges["beat"]) <= MOST_BEATS:
            axes.vlines(
                edges["beat"],
                0,
                1,
                transform=axes.get_xaxis_transform(),
                color="0.93",
                linewidth=0.8,
                zorder=0,
            )
        axes.vlines(
            edges["measure"][:: 1 if every < 5 else every],
            0,
            1,
            transform=axes.get_xaxis_transform(),
            color="0.7",
            linewidth=1.2,
            zorder=0,
        )
        axes.tick_params(labelbottom=True)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=3, frameon=False)
    panels[0].set_xlim(
        min(edges["measure"][0], notes[:, 2].min()) - 0.1, max(edges["beat"][-1], notes[:, 3].max()) + 0.1
    )
    numbers = panels[0].secondary_xaxis("top")
    numbers.set_xticks(edges["measure"][:-1:every], [str(bar) for bar in bars[::every]])
    panels[0].text(-0.01, 1.03, "measure", transform=panels[0].transAxes, ha="right")


def _need_attention(members: list[tuple]) -> None:
    for model, kept in members:
        if not isinstance(model, AST):
            raise DataError(
                f"{kept['path']}: a checkpoint of task {kept['task']!r}, which has no attention; expected han, ast or decoder; leave --explain out"
            )


def explain_ast(out: Path, members: list[tuple], work: dict) -> dict:
    """The attention roll-out of ASTs on one recording: see `explain`, `roll_out_file`. work: energies (frames, 128). Returns shares and crops."""
    energies, shares = work["energies"], []
    _need_attention(members)
    for model, kept in members:
        if model.stride != members[0][0].stride:
            raise DataError(
                f"{kept['path']}: patches every {model.stride} frames; {members[0][1]['path']} has them every {members[0][0].stride}; "
                "explain one at a time"
            )
        x = torch.from_numpy(normalise_fbank(energies, kept["data"]["mean"], kept["data"]["std"])).float()
        shares.append(roll_out_file(model, x, next(model.parameters()).device))
    share, starts = (
        np.mean([share for share, _ in shares], axis=0),
        max((starts for _, starts in shares), key=len),
    )
    if not np.isfinite(share).all():
        raise DataError(
            f"{work['path']}: attention that is not finite; expected numbers; look for NaN in the recording"
        )
    model, synthetic = (
        members[0][0],
        ", synthetic training data" * bool(members[0][1]["data"].get("synthetic")),
    )
    sizes = " x ".join(str(model.model_args[key]) for key in ("width", "depth", "heads"))
    many = (
        f"mean of {len(members)} checkpoints" if len(members) > 1 else Path(members[0][1]["path"]).parent.name
    )
    title = (
        f"{_short(work['name'])}: which parts of the sound reach the ratings (attention roll-out of AST {sizes}, {many}{synthetic})\n"
        f"{len(energies) * HOP / SAMPLE_RATE:.1f} s in {len(starts)} crop{'s, borders dotted' * (len(starts) > 1)}; "
        f"darkness: level, {-QUIETEST} dB from white to black"
        + "; the ratings also rest on mel statistics (--statistics), which do not pass through it"
        * any(m.statistics is not None for m, _ in members)
    )
    draw_attention(out, energies, share, starts, model.stride, title)
    return {"share": share, "starts": starts}


def emissions(log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes that `ctc_greedy` decodes from (F, 41), and the frame of each: of its run of frames the one where it is most probable."""
    best = log_probs.argmax(1)
    starts = np.flatnonzero(np.append(True, best[1:] != best[:-1])[: len(best)])
    runs = zip(starts, np.append(starts, len(best))[1:], strict=True)
    peaks = [start + log_probs[start:end, best[start]].argmax() for start, end in runs if best[start]]
    return best[peaks], np.array(peaks, np.int64)


def place_labels(
    labels: Iterable, decoded: Iterable, times: np.ndarray, low: float, high: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where n true labels stand on a time axis low..high: at the decoded class (of m, at `times`) that a minimal edit script pairs them
    with, those left out evenly between their neighbours. Returns seconds (n,), and which labels (n,) and decoded classes (m,) are right."""
    labels, decoded = list(labels), list(decoded)
    known, right, found = (
        {-1: low, len(labels): high},
        np.zeros(len(labels), bool),
        np.zeros(len(decoded), bool),
    )
    for tag, a, b, c, d in Levenshtein.opcodes(labels, decoded):
        if tag in ("equal", "replace"):
            known |= zip(range(a, b), times[c:d], strict=True)
            right[a:b] = found[c:d] = tag == "equal"
    return np.interp(np.arange(len(labels)), sorted(known), [known[k] for k in sorted(known)]), right, found


def spread_out(at: np.ndarray, room: float, low: float, high: float) -> np.ndarray:
    """Ascending places moved apart to `room` between neighbours, by the least squares of their shifts, within low..high."""
    from sklearn.isotonic import IsotonicRegression

    if not len(at):
        return at
    room, steps = min(room, (high - low) / len(at)), np.arange(len(at))
    apart = IsotonicRegression(y_min=low, y_max=high - room * (len(at) - 1)).fit_transform(
        steps, at - room * steps
    )
    return apart + room * steps


def explain_decoder(out: Path, members: list[tuple], work: dict) -> dict:
    """Posteriors of the phonemes over time with the decoded and the true string: see `explain`. work: id or name, log_probs (F, 41), labels or
    None, "seconds per frame". A frame stands at the middle of its window. Returns classes, seconds, labels' seconds and which are right."""
    name, log_probs, step = (
        work.get("id", work.get("name")),
        np.asarray(work["log_probs"]),
        work["seconds per frame"],
    )
    labels = None if work.get("labels") is None else list(work["labels"])
    if not len(log_probs) or not np.isfinite(np.exp(log_probs)).all():
        raise DataError(
            f"{name}: {len(log_probs)} frames, {np.isnan(log_probs).sum()} values NaN; expected at least one frame of numbers; "
            "the trial is shorter than a window, or holds NaN"
        )
    start = step * (members[0][0].kernel / members[0][0].stride - 1) / 2
    ids, frames = emissions(log_probs)
    drawn = {
        "ids": ids,
        "times": start + step * (frames + 0.5),
        "found": np.ones(len(ids), bool),
        "labels": labels,
    }
    many = f" (mean of {len(members)} decoders)" if len(members) > 1 else ""
    title = f"{_short(name)}: probability of each phoneme{many}"
    if labels is not None:
        drawn["label_times"], drawn["right"], drawn["found"] = place_labels(
            labels, ids, drawn["times"], start, start + step * len(log_probs)
        )
        title += "; of {} phonemes {} substituted, {} left out, {} inserted".format(
            len(labels), *edit_counts(labels, ids)
        )
    draw_decoder(out, np.exp(log_probs), start, step, drawn, title)
    return drawn


def draw_decoder(out: Path, probs: np.ndarray, start: float, step: float, drawn: dict, title: str) -> None:
    """Probabilities (F, 41) as a heat map whose first frame begins at `start` and lasts `step` seconds, decoded classes above, true ones
    below it: the figures of `explain_decoder`. 1600 x 900 pixels."""
    from matplotlib import rc_context  # takes a second
    from matplotlib.figure import Figure

    with rc_context({"font.size": 12}):
        figure = Figure((16, 9), dpi=100, layout="constrained")
        above, heat, below = figure.subplots(3, 1, sharex=True, height_ratios=[1.2, 9, 1.2])
        figure.get_layout_engine().set(hspace=0, h_pad=0.02)
        figure.colorbar(
            _draw_posteriors(heat, probs, start, step, drawn),
            ax=[above, heat, below],
            pad=0.01,
            fraction=0.03,
        ).set_label("probability")
        _draw_string(above, drawn["ids"], drawn["times"], drawn["found"], (0.45, 0), "decoded")
        if drawn["labels"] is not None:
            _draw_string(below, drawn["labels"], drawn["label_times"], drawn["right"], (0.55, 1), "true")
        paired = "; a true phoneme stands where the decoded one is that it pairs with" * bool(drawn["labels"])
        below.set_xlabel(f"time in the trial (s), middle of each frame's window{paired}")
        for axes, hidden in ((above, ["left", "right", "top", "bottom"]), (below, ["left", "right", "top"])):
            axes.set(ylim=(0, 1), yticks=[])
            axes.spines[hidden].set_visible(False)
        for axes in (above, heat):
            axes.tick_params(bottom=False)
        figure.suptitle(title, fontsize=15, parse_math=False)
        write_atomic(out, lambda file: figure.savefig(file, format=out.suffix[1:]))


def _draw_posteriors(axes, probs: np.ndarray, start: float, step: float, drawn: dict):
    """The heat map, sounds of a kind together and the blank last, a ring at every decoded class; classes that stay under SEEN are left out."""
    seen = probs.max(0) >= SEEN
    seen[drawn["ids"]] = True
    rows = [k for names in ARTICULATION.values() for k in map(PHONEMES.index, names.split()) if seen[k]] + [0]
    end = start + step * len(probs)
    image = axes.imshow(
        probs[:, rows].T,
        vmin=0,
        vmax=1,
        cmap="viridis",
        aspect="auto",
        interpolation="nearest",
        extent=(start, end, len(rows) - 0.5, -0.5),
    )
    axes.set_yticks(
        range(len(rows)), [PHONEMES[k] or "blank" for k in rows], fontsize=min(12, 320 / len(rows))
    )
    axes.set(xlim=(start, end))
    for kind, names in ARTICULATION.items():
        inside = [i for i, k in enumerate(rows) if PHONEMES[k] in names.split()]
        if inside:
            axes.axhline(inside[-1] + 0.5, color="white", linewidth=1)
            axes.text(
                -0.055,
                np.mean(inside),
                kind,
                transform=axes.get_yaxis_transform(),
                rotation=90,
                ha="center",
                va="center",
            )
    colours = np.where(drawn["found"], "white", COLOURS["wrong"])
    axes.scatter(
        drawn["times"],
        [rows.index(k) for k in drawn["ids"]],
        s=60,
        facecolors="none",
        edgecolors=colours,
        linewidths=1.5,
    )
    return image


def _draw_string(
    axes, ids: Iterable, times: np.ndarray, right: np.ndarray, ends: tuple[float, float], what: str
) -> None:
    """Phoneme names beside the heat map, moved apart where they would touch, many in two rows, each with a line to its time; wrong ones
    in colour and bold. ends: heights of the line, at the name and at the map."""
    (low, high), rows = axes.get_xlim(), 1 if len(times) <= MOST_IN_ROW else 2
    room, size = (high - low) / MOST_IN_ROW / rows, min(12, 12 * rows * MOST_IN_ROW / max(len(times), 1))
    for i, at in enumerate(spread_out(times, room, low + room / 2, high - room / 2)):
        colour, away = (
            "black" if right[i] else COLOURS["wrong"],
            (0.2 + 0.25 * (i % rows)) * (1 - 2 * ends[1]),
        )
        axes.plot(
            [at, times[i]], [ends[0] + away - 0.15 * (1 - 2 * ends[1]), ends[1]], color=colour, linewidth=0.8
        )
        axes.text(
            at,
            ends[0] + away,
            PHONEMES[ids[i]],
            color=colour,
            ha="center",
            va="center",
            weight="normal" if right[i] else "bold",
            fontsize=size,
        )
    axes.set_ylabel(what, rotation=0, ha="right", va="center")


# -----------------------------------------------------------------------------------------------------------------
# Report
# -----------------------------------------------------------------------------------------------------------------
REPORTED = {
    "han": "HAN: 19 ratings from score and MIDI",
    "ast": "AST: 19 ratings from audio",
    "cnn": "CNN: 19 ratings from audio",
    "mlp": "MLP on pooled spectra: 19 ratings",
    "pretraining": "AST pre-training: masked patches",
    "decoder": "Phoneme decoder: neural activity to phonemes",
}
# Means that others published, (name, metric, value) by task and split, or a decoder's channels; there are none per dimension.
PUBLISHED = {
    ("han", "segment"): [("the published HAN (Park et al. 2024, their piece split)", "R²", 0.397)],
    ("han", "performer"): [("the published HAN (Park et al. 2024)", "R²", 0.285)],
    **{
        ("ast", split): [
            ("an earlier AST (86 M parameters, another split)", "Pearson", 0.5285),
            ("its forest", "Pearson", 0.5869),
        ]
        for split in SPLITS
    },
    ("decoder", 256): [("the public PyTorch baseline", "PER", 0.205)],
    ("decoder", 512): [("the '25 baseline", "PER", 0.101)],
}
CURVES = {
    "valid_r2": "R², validation",
    "valid_pearson": "Pearson r, validation",
    "valid_per": "phoneme error rate, validation",
    "valid_accuracy": "NCE accuracy, validation; dashed: chance",
    "valid_mse": "MSE of pixels, validation; dashed: of the mean patch",
    "loss": "loss, training",
    "valid_loss": "loss, validation",
}
DIAGNOSTICS = {
    "norm": "gradient norm before clipping",
    "lr": "learning rate",
    "skipped": "skipped updates so far",
    "spread": "spread: deviation of predictions / ratings",
    "valid_blank_fraction": "share of blank frames, validation",
}
DASHED = {"valid_accuracy": "valid_chance", "valid_mse": "valid_mse_mean"}  # drawn beside the key before
CHOSEN = {
    "valid": "The weights that are shown were chosen on this validation part: its figures are slightly optimistic.",
    "test": "Test part: for a final figure; choose between models on the validation part.",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5a6675; --rule: #d5dae1; --paper: #ffffff; --panel: #f4f6f9; --warn: #9a3412; --warnpaper: #fff1e6;
  --c0: #1f6fb2; --c1: #c2571a; --c2: #2c8a57; --c3: #9b4fb0; --c4: #a87b06; --c5: #c23a5e; --c6: #138a94; --c7: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #a2adbb; --rule: #39424f; --paper: #12161c; --panel: #1b212a; --warn: #ffb782; --warnpaper: #3a2414;
  --c0: #6cb2ef; --c1: #f0955a; --c2: #66c795; --c3: #cf92e0; --c4: #d8b04a; --c5: #f0839f; --c6: #5fc6cf; --c7: #a2adbb; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; border-top: 3px solid var(--c0); padding-top: .7rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .4rem; } p, ul { max-width: 48rem; } a { color: var(--c0); }
.verdict { font-size: 1.1rem; font-weight: 600; } .soft, caption, figcaption { color: var(--soft); font-size: .875rem; }
.warn { background: var(--warnpaper); color: var(--warn); border-left: 4px solid; padding: .5rem .8rem; font-weight: 600; max-width: none; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 .3rem; } caption span { position: sticky; left: 0; display: block; max-width: min(48rem, calc(100vw - 3rem)); } th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; } th:first-child, .text { text-align: left; } td.text { white-space: normal; min-width: 6rem; }
tbody th { font-weight: 500; white-space: normal; min-width: 8rem; } tbody tr.sum > * { font-weight: 700; border-top: 2px solid var(--soft); }
.figures { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.small { gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); } figure { margin: 0; } .small figcaption { font-size: .75rem; line-height: 1.25; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; stroke: var(--paper); stroke-width: 3px; paint-order: stroke; } svg .frame, svg .grid { fill: none; stroke: var(--rule); }
svg .line, svg .dash { fill: none; stroke-width: 1.8; stroke-linejoin: round; } svg .dash { stroke-dasharray: 5 4; stroke-width: 1.4; }
svg .dots, svg .fine { fill: none; stroke-linecap: round; stroke-width: 6; } svg .fine { stroke-width: 3; stroke-opacity: .55; } svg .even { stroke: var(--soft); }
svg.bar { width: 10rem; } .heat { min-width: 44rem; max-width: 60rem; } .heat text { font-size: 9px; } .heat .cell { fill: var(--c1); }
.s0 { stroke: var(--c0); color: var(--c0); } .s1 { stroke: var(--c1); color: var(--c1); } .s2 { stroke: var(--c2); color: var(--c2); } .s3 { stroke: var(--c3); color: var(--c3); }
.s4 { stroke: var(--c4); color: var(--c4); } .s5 { stroke: var(--c5); color: var(--c5); } .s6 { stroke: var(--c6); color: var(--c6); } .s7 { stroke: var(--c7); color: var(--c7); }
ul.key { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: .3rem 0; font-size: .875rem; } ul.key li::before { content: "━ "; font-weight: 700; }
ul.key span { color: var(--ink); } details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
.speech { font-family: ui-monospace, monospace; font-size: .875rem; background: var(--panel); padding: .5rem .8rem; margin: .3rem 0; max-width: none; }
.speech mark { background: none; color: var(--c1); font-weight: 700; } .speech del { color: var(--c5); } .speech ins { color: var(--c3); }
"""


def report(argv: list[str]) -> dict:
    """`python eval.py report`: one HTML file, nothing outside it, about runs; returns {"verdicts", "figures"}, one of each for every configuration.

    Runs that differ in fold, seed and machine only are one configuration and are evaluated together, as `evaluate` does."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py report",
        usage="python eval.py report --run DIR ... --out FILE.html [--data DIR] [options]",
        description="""\
One HTML page about training runs, without anything outside it: curves, scores by dimension or day, calibration, worst items,
confusions, transcripts, diagnostics, configuration. Folds and seeds of one configuration are evaluated together, on their own parts.

    python eval.py report --run runs/han/full_f? --data data/percepiano --out report.html
    python eval.py report --run runs/decoder/NAME --no-data --out report.html            curves and configuration only""",
    )
    parser.add_argument(
        "--run", nargs="+", required=True, metavar="DIR", help="run folders of any task (required)"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="page to write, .html (required)")
    parser.add_argument(
        "--data", metavar="DIR", help="data set in its public layout (off: where the runs were trained from)"
    )
    parser.add_argument(
        "--cache", default="cache", metavar="DIR", help="folder of extracted features (%(default)s)"
    )
    parser.add_argument(
        "--part", choices=["valid", "test"], default="valid", help="part to score (%(default)s)"
    )
    parser.add_argument(
        "--audio",
        metavar="DIR",
        help="folder of recordings NAME.wav (off: the run's own, else rendered from the MIDI)",
    )
    parser.add_argument(
        "--day",
        choices=["nearest", "mean"],
        help="decoder: day layer of sessions unknown to the model (off: they are refused)",
    )
    parser.add_argument(
        "--results-dir",
        default="results",
        metavar="DIR",
        help="folder of the floors to compare with (%(default)s)",
    )
    parser.add_argument(
        "--no-data", action="store_true", help="score nothing: curves and configuration only (off)"
    )
    args = _parse(parser, argv)
    out = Path(args.out)
    check_output(Path(args.out), "--out")
    if out.suffix.lower() not in (".html", ".htm"):
        raise DataError(f"--out {out}: a file of kind {out.suffix or 'none'}; expected .html; name it so")
    runs = [read_run(path) for path in dict.fromkeys(args.run)]
    names = [run["path"].name for run in runs]
    for run, name in zip(runs, names, strict=True):  # a file name may hold bytes that are no character
        run["name"] = (
            (name if names.count(name) == 1 else str(run["path"])).encode("utf-8", "replace").decode()
        )
    corpora = {
        "speech" if run["kind"] == "decoder" else "pretraining" if run["kind"] == "pretraining" else "ratings"
        for run in runs
    } - {"pretraining"}
    if args.data and len(corpora) > 1:
        raise DataError(
            f"--data {args.data}: one data set for runs of {', '.join(sorted(corpora))}; expected runs of one data set with it; write a report for each"
        )
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(_configuration(run), []).append(run)
    sections = [
        {"decoder": decoder_section, "pretraining": pretraining_section}.get(
            group[0]["kind"], rating_section
        )(group, args)
        for group in groups.values()
    ]
    page = _page(list(groups.values()), sections, args)
    write_atomic(out, lambda file: file.write(page.encode("utf-8", "replace")))
    for section in sections:
        print(section["verdict"])
    print(f"saved {out}, {len(page) / 2**20:.2f} MiB")
    return {
        "verdicts": [section["verdict"] for section in sections],
        "figures": [section["figures"] for section in sections],
    }


def read_run(path: str | Path) -> dict:
    """A run folder: path, kind (of REPORTED), args, records of metrics.jsonl, loaded (path, model, ckpt) of best.pt or None, notes on what is missing."""
    path = Path(path)
    try:
        options = json.loads((path / "args.json").read_text(encoding="utf-8"))
        kind = (
            "decoder"
            if "kernel" in options
            else "han"
            if "pooled" in options
            else "pretraining"
            if options["task"] == "pretrain"
            else options["model"]
        )
        if kind not in REPORTED or not isinstance(options.get("data"), str | None):
            raise ValueError(f"model {kind!r}, data {options.get('data')!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: no options of a run ({_cause(error)}); expected a folder with args.json, as a trainer leaves it; give a run's folder"
        ) from error
    run = {"path": path, "kind": kind, "args": options, "records": [], "loaded": None, "notes": []}
    for part, read in (
        ("records", read_metrics),
        ("loaded", lambda path: _load_models([str(path / "best.pt")])[0]),
    ):
        try:
            run[part] = read(path)
        except DataError as error:
            run["notes"].append(str(error))
    run["records"] = [_logged(record) for record in run["records"] if abs(int(record["step"])) < 10**15]
    if run["records"] and not (path / "metrics.jsonl").read_bytes().endswith(b"\n"):
        run["notes"].append(f"{path / 'metrics.jsonl'}: its last line is cut short and left out")
    return run


def _logged(record: dict) -> dict:
    """What a trainer logs of a record: numbers, None where one is not finite, and a few keys that hold more; the rest may be another program's."""
    kinds, kept = {"skipped": dict, "activations": dict, "names": list, "flags": list, "skip": str}, {}
    for key, value in record.items():
        if isinstance(value, kinds.get(key, int | float | None)):
            kept[key] = value if key in kinds or value is None or abs(value) < 1e100 else None
    return kept | {"step": int(record["step"])}


def _cause(error: Exception) -> str:
    return (
        error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__} {error}"
    )[:100]


def _title(run: dict) -> str:
    return REPORTED[run["kind"]].replace(
        "HAN",
        {"bilstm": "Bi-LSTM", "bilstm_sa": "Bi-LSTM, score-aligned"}.get(run["args"].get("model"), "HAN"),
    )


def _configuration(run: dict) -> str:
    """What runs have in common that are evaluated together: all options but fold, seed and those of one machine."""
    own = {
        key: value
        for key, value in _own_options(run).items()
        if key not in ("fold", "seed", "git_sha", "git_dirty", "log_every", "save_every", "workers", "debug")
    }
    return json.dumps([run["kind"], bool(run["args"].get("data")), own], sort_keys=True)


def _evaluation(group: list[dict], args: argparse.Namespace) -> tuple[list[tuple], argparse.Namespace | None]:
    """The loaded checkpoints of a configuration and the options to evaluate them with; None where there is nothing to evaluate or --no-data."""
    loaded, trained_on = (
        [run["loaded"] for run in group if run["loaded"]],
        [run["args"].get("data") for run in group],
    )
    if args.no_data or not loaded:
        return loaded, None
    data = args.data or next((path for path in trained_on if path and Path(path).exists()), trained_on[0])
    if data and not Path(data).exists():
        raise DataError(
            f"{group[0]['path']}: trained on {data}, which is not here; expected its data set; give --data DIR, or --no-data for curves and configuration only"
        )
    own = {
        "data": data,
        "audio": args.audio or group[0]["args"].get("audio"),
        "ckpt": [path for path, _, _ in loaded],
        "crops": None,
        "batch": 64 if group[0]["kind"] == "decoder" else None,
    }
    return loaded, argparse.Namespace(**{**vars(args), **own})


# --- pieces of a page: text is escaped here, once ---


class _Markup(str):
    """Text that is HTML already."""


def _text(value: object) -> str:
    """HTML of a value: numbers to three digits, the rest escaped; long names may break after an underline or a slash."""
    if isinstance(value, _Markup):
        return value
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "–"
    return re.sub(r"([_/])", r"\1<wbr>", escape(str(value)))


def _table(caption: str, head: list[str], rows: list[list], last_is_sum: bool = False) -> str:
    """A table that scrolls sideways where it is too wide. Columns that hold words stand to the left, numbers to the right."""
    kinds = [
        ' class="text"' * any(type(row[k]) is str and bool(re.search(r"[^\W\d]{2}", row[k])) for row in rows)
        for k in range(len(head))
    ]
    body = [
        f'<tr{" class=sum" if last_is_sum and row is rows[-1] else ""}><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td{kind}>{_text(value)}</td>" for kind, value in zip(kinds[1:], row[1:], strict=True))
        + "</tr>"
        for row in rows
    ]
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption><span>{_text(caption)}</span></caption><thead><tr>'
        + "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for kind, name in zip(kinds, head, strict=True))
        + f"</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _figures(pictures: Iterable[tuple[str, str]], kind: str = "") -> str:
    """Pictures side by side, (SVG, caption) each; those without anything to show left out."""
    shown = [
        f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>" for svg, caption in pictures if svg
    ]
    return (
        f'<div class="figures {kind}">{"".join(shown)}</div>'
        if shown
        else '<p class="soft">Nothing logged.</p>'
    )


def _interval(low: float, high: float) -> str:
    return f"[{low:.3f}, {high:.3f}]" if np.isfinite(low) else "–"


def _ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """At most six round positions and their labels; log: positions are decimal logarithms."""
    if log and high - low < 1:
        return [(math.log10(float(label)), label) for _, label in _ticks(10.0**low, 10.0**high, False)]
    if log:
        powers = range(math.ceil(low), math.floor(high) + 1)
        return [(k, f"{10.0**k:.6g}") for k in powers[:: math.ceil(len(powers) / 6)]]
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 5)
    return [
        (k * step, f"{k * step:.6g}")
        for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _thin(points: np.ndarray, most: int = 500) -> np.ndarray:
    """At most so many points of a line: the lowest and the highest of each stretch, so that no peak is lost."""
    if len(points) <= most:
        return points
    stretches = np.array_split(np.arange(len(points)), most // 2)
    y = np.where(np.isfinite(points[:, 1]), points[:, 1], np.inf)
    return points[
        sorted({int(rows[k]) for rows in stretches for k in (np.argmin(y[rows]), np.argmax(y[rows]))})
    ]


def _chart(
    title: str,
    series: list[tuple[str, np.ndarray]],
    names: tuple[str, str] = ("step", ""),
    size: tuple[int, int] = (300, 190),
    log: bool = False,
    limits: tuple | None = None,
    numbers: Iterable[tuple] = (),
) -> str:
    """SVG of series (CSS classes, points (n, 2)): `dots` and `fine` are points, all else is a line, broken where it is not finite; "" without any point.

    limits: (left, right, bottom, top); log: of y; numbers: (x, y, text) written beside a point."""
    series = [
        (
            kind,
            np.column_stack([p[:, 0], np.log10(np.where(p[:, 1] > 0, p[:, 1], np.nan)) if log else p[:, 1]]),
        )
        for kind, p in series
        if len(p)
    ]
    finite = np.concatenate([p[np.isfinite(p).all(1)] for _, p in series] or [np.zeros((0, 2))])
    if not len(finite):
        return ""
    (left, bottom), (right, top) = finite.min(0), finite.max(0)
    pad = 0.06 * (top - bottom) or 0.06 * abs(top)
    left, right, bottom, top = limits or (
        left,
        right if right > left else left + 1,
        bottom - pad,
        top + pad or 1,
    )
    (width, height), (x0, y0) = size, (46, 8)
    x1, y1 = width - 8, height - 30

    def place(x: float, y: float) -> tuple[float, float]:
        return x0 + (x - left) / (right - left) * (x1 - x0), y1 - (y - bottom) / (top - bottom) * (y1 - y0)

    parts = [f'<rect class="frame" x="{x0}" y="{y0}" width="{x1 - x0}" height="{y1 - y0}"/>']
    for value, label in _ticks(bottom, top, log):
        y = place(left, value)[1]
        parts.append(
            f'<path class="grid" d="M{x0} {y:.1f}H{x1}"/><text x="{x0 - 5}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for value, label in _ticks(left, right, False):
        x = place(value, bottom)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{y1 + 13}" text-anchor="{"end" if x > x1 - 10 else "middle"}">{label}</text>'
        )
    parts += [
        f'<text x="{x1}" y="{height - 3}" text-anchor="end">{escape(names[0])}</text>',
        f'<text x="{x0 + 4}" y="{y0 + 12}">{escape(names[1])}</text>',
    ]
    for kind, points in series:
        point, steps, pen = not {"dots", "fine"}.isdisjoint(kind.split()), [], False
        for x, y in points if point else _thin(points):
            if np.isfinite(y):
                steps.append(f"{'L' if pen else 'M'}{'{:.1f} {:.1f}'.format(*place(x, y))}{'h0' * point}")
            pen = bool(np.isfinite(y)) and not point
        parts.append(f'<path class="{kind}" d="{"".join(steps)}"/>')
    parts += [
        f'<text x="{x - 4:.1f}" y="{y - 4:.1f}" text-anchor="end">{escape(text)}</text>'
        for x, y, text in ((*place(x, y), text) for x, y, text in numbers)
    ]
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _bar(
    value: float, interval: Iterable[float], limits: tuple[float, float], reference: float | None = None
) -> _Markup:
    """A value with its interval as a small picture for a table's row; the upright stroke is the reference."""

    def place(v: float) -> float:
        return 4 + 152 * (min(max(v, limits[0]), limits[1]) - limits[0]) / (limits[1] - limits[0])

    low, high = interval
    parts = [
        f'<path class="grid" d="M{place(v):.1f} 0V16"/>'
        for v in (limits[0], 0, limits[1])
        if limits[0] <= v <= limits[1]
    ]
    parts += (
        [f'<path class="line s0" d="M{place(low):.1f} 8H{place(high):.1f}"/>'] if np.isfinite(low) else []
    )
    parts += [f'<path class="dots s0" d="M{place(value):.1f} 8h0"/>'] if np.isfinite(value) else []
    parts += (
        [f'<path class="line s1" d="M{place(reference):.1f} 2V14"/>']
        if reference is not None and np.isfinite(reference)
        else []
    )
    return _Markup(f'<svg class="bar" viewBox="0 0 160 16" aria-hidden="true">{"".join(parts)}</svg>')


# --- what every section has ---


def _history(records: list[dict], key: str) -> np.ndarray:
    """(n, 2) steps and logged values of one key; of a step that a resumed run took again, the later."""
    values = {
        r["step"]: sum(v for v in r[key].values() if isinstance(v, int))
        if isinstance(r[key], dict)
        else r[key]
        for r in records
        if key in r
    }
    return np.array(sorted(values.items()), np.float64).reshape(-1, 2)


def _panels(group: list[dict], panels: dict[str, str]) -> str:
    """Pictures of logged keys over the steps, a colour a run, and the key to the colours."""
    key = "".join(
        f'<li class="s{n % 8}"><span>{_text(run["name"])}</span></li>' for n, run in enumerate(group)
    )
    pictures = []
    for name, title in panels.items():
        series = [
            (f"{'dash' if dashed else 'line'} s{n % 8}", _history(run["records"], column))
            for n, run in enumerate(group)
            for dashed, column in enumerate((name, DASHED.get(name)))
            if column
        ]
        lone = [(kind.replace("line", "dots"), points) for kind, points in series if len(points) == 1]
        solid = [points for kind, points in series if kind.startswith("line")]
        pictures.append(
            (
                _chart(title, series + lone, log=name == "norm")
                if any(len(points) for points in solid)
                else "",
                title,
            )
        )
    return f'<ul class="key">{key}</ul>{_figures(pictures)}'


def diagnostics(group: list[dict]) -> str:
    """Gradient norm, learning rate, skipped updates, spread over the steps; what was skipped, by name; the gradient reports' flags."""
    skips = [
        [run["name"], str(r["step"]), str(r["skip"]), ", ".join(map(str, r.get("names", [])[:8]))]
        for run in group
        for r in run["records"]
        if "skip" in r
    ]
    flags = Counter(flag for run in group for r in run["records"] for flag in map(str, r.get("flags", ())))
    reports = sum("flags" in r for run in group for r in run["records"])
    lines = [f"{flag} in {n} of {reports} gradient reports" for flag, n in flags.most_common()] + [
        f"{run['name']}: untrained, predictions spread {r['activations']['std_ratio']:.2f} times as wide as the ratings"
        for run in group
        for r in run["records"][:1]
        if isinstance(r.get("activations", {}).get("std_ratio"), float)
    ]
    return (
        f"<h3>Diagnostics</h3>{_panels(group, DIAGNOSTICS)}"
        + (f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>" if lines else "")
        + (
            _table(
                f"{len(skips)} skipped updates{', the first 30' * (len(skips) > 30)}",
                ["run", "step", "kind", "items of the step"],
                skips[:30],
            )
            if skips
            else "<p>No update was skipped.</p>"
        )
    )


def configuration(group: list[dict]) -> str:
    """Every option of the runs, one value where all agree."""
    rows = []
    for key in dict.fromkeys(key for run in group for key in run["args"]):
        values = [str(run["args"].get(key, "–")) for run in group]
        rows.append([key, _Markup("<br>".join(map(_text, values if len(set(values)) > 1 else values[:1])))])
    return f"<h3>Configuration</h3><details><summary>All {len(rows)} options</summary>{_table('Options; several values: one a run, in order', ['option', 'value'], rows)}</details>"


def _against(interval: Iterable[float], name: str, metric: str, value: float) -> str:
    """How an interval lies to a reference value, in words."""
    (low, high), (above, below) = interval, ("better", "worse") if metric != "PER" else ("worse", "better")
    return f"{above if low > value else below if high < value else 'not clearly better or worse'} than {name} ({metric} {value:.4g})"


def _best(run: dict) -> tuple[str, float, int]:
    """(metric, value, step) of the evaluation that the trainer kept, from the metrics alone; NaN without any."""
    name, better = (
        ("valid_per", "valid_per")
        if run["kind"] == "decoder"
        else ("valid_accuracy" if run["kind"] == "pretraining" else "valid_r2", "valid_loss")
    )
    found = [r for r in run["records"] if r.get(name) is not None and r.get(better) is not None]
    record = min(found, key=lambda r: r[better], default=None)
    return {"valid_per": "PER", "valid_accuracy": "NCE accuracy", "valid_r2": "R²"}[name], *(
        (record[name], record["step"]) if record else (math.nan, 0)
    )


def _logged_verdict(group: list[dict]) -> str:
    """The sentence where nothing was evaluated: what the trainer logged."""
    known = [(run["name"], *_best(run)) for run in group]
    known = [
        f"{name} {metric} {value:.3f} at step {step}"
        for name, metric, value, step in known
        if np.isfinite(value)
    ]
    return f"not evaluated here; best validation as logged in training: {', '.join(known) or 'none'}"


def _section(
    group: list[dict],
    sentence: str,
    synthetic: bool,
    figures: object,
    body: list[str],
    caution: Iterable[str] = (),
) -> dict:
    """A section: its verdict, the notes on what is missing, curves, results, diagnostics, configuration."""
    notes = [
        *(("soft", note) for note in caution),
        *(("warn", note) for run in group for note in run["notes"]),
    ]
    verdict = f"{_title(group[0]).split(':')[0]}{' (SYNTHETIC)' * synthetic}: {sentence}."
    return {
        "verdict": verdict,
        "synthetic": synthetic,
        "figures": figures,
        "html": "".join(
            [
                f'<p class="verdict">{_text(verdict)}</p>',
                "".join(f'<p class="{kind}">{_text(note)}</p>' for kind, note in notes),
                f"<h3>Training curves</h3>{_panels(group, CURVES)}",
                *body,
                diagnostics(group),
                configuration(group),
            ]
        ),
    }


def _is_synthetic(group: list[dict]) -> bool:
    """Whether any run was trained on synthetic data, by its checkpoint, else by an absent --data."""
    return any(
        bool((run["loaded"][2]["data"] or {}).get("synthetic"))
        if run["loaded"]
        else not run["args"].get("data")
        for run in group
    )


def pretraining_section(group: list[dict], args: argparse.Namespace) -> dict:
    """A pre-training: what its metrics hold; it rates nothing."""
    sentence = _logged_verdict(group).removeprefix("not evaluated here; ")
    kept = [
        min(
            (r for r in run["records"] if r.get("valid_loss") is not None),
            key=lambda r: r["valid_loss"],
            default={},
        )
        for run in group
    ]
    rows = [
        [
            run["name"],
            str(r["step"]),
            *(
                float(r.get(f"valid_{key}") or math.nan)
                for key in ("loss", "nce", "accuracy", "chance", "mse", "mse_mean")
            ),
        ]
        for run, r in zip(group, kept, strict=True)
        if r
    ]
    if rows:
        sentence += f" (chance {rows[0][5]:.3f}), MSE {rows[0][6]:.3f} (mean patch {rows[0][7]:.3f})"
    table = _table(
        "Validation on fixed crops and masks, at the lowest loss",
        ["run", "step", "loss", "NCE", "accuracy", "chance", "MSE", "MSE of the mean patch"],
        rows,
    )
    return _section(group, sentence, _is_synthetic(group), kept, ["<h3>Results</h3>", table])


# --- ratings ---


def rating_section(group: list[dict], args: argparse.Namespace) -> dict:
    """Runs that rate: each on its own fold's part, seeds averaged; measured as `evaluate` does."""
    loaded, own = _evaluation(group, args)
    if own is None:
        return _section(group, _logged_verdict(group), _is_synthetic(group), None, [])
    folds, data = _load_fold_models(loaded)
    corpus = _corpus_of(data, own)
    records, truth = (
        fold_records(folds, corpus, own, (own.part,)),
        {name: item["y"] for name, item in corpus.items.items() if item.get("y") is not None},
    )
    views, synthetic = measure(records, truth)[own.part], corpus.synthetic or data["synthetic"]
    caution = [
        f"Trained on {'synthetic' if data['synthetic'] else 'real'} data, evaluated on {'synthetic' if corpus.synthetic else 'real'}."
    ] * (corpus.synthetic != data["synthetic"])
    if views["all"] is None:
        return _section(
            group,
            f"no item of part {own.part} has ratings here: nothing to score",
            synthetic,
            views,
            [],
            caution,
        )
    names, y, p, fold_of = _stacked(records, truth, own.part, "all")
    mean, groups = views["all"]["mean"], [segment_of(name) for name in names]
    intervals = {
        "R²": mean["r2_interval"],
        "Pearson": cluster_bootstrap(y, p, groups, lambda y, p: float(pearson(y, p).mean()), folds=fold_of),
    }
    floor_row = _floor_of(group[0]["kind"], data, own, [*folds])
    references = (
        [] if synthetic else PUBLISHED.get(("han" if group[0]["kind"] == "han" else "ast", data["split"]), [])
    )
    clauses = [
        f"R² {mean['r2']:.3f} {_interval(*intervals['R²'])}, Pearson {mean['pearson']:.3f} {_interval(*intervals['Pearson'])}: mean of 19 ratings, "
        f"{'fold' if len(folds) == 1 else 'folds'} {', '.join(map(str, folds))} of split {data['split']}, {'validation' if own.part == 'valid' else own.part} part"
    ]
    references = ([("the floor", "R²", floor_row["r2"])] if floor_row else []) + references
    clauses += [_against(intervals[reference[1]], *reference) for reference in references]
    if unrated := sum(len(record["names"]) for record in records) - len(names):
        caution.append(f"{unrated} more items have no rating here and are not scored.")
    caution.append(CHOSEN[own.part])
    body = [
        rating_tables(
            views,
            own.part,
            intervals,
            significance(records, truth)[own.part]["all"],
            floor_row,
            references,
            y,
            p,
            fold_of,
        ),
        scatter(y, p, mean),
        calibration(y, p),
        extreme_items(names, y, p, fold_of),
    ]
    return _section(group, "; ".join(clauses), synthetic, views, body, caution)


def _floor_of(kind: str, data: dict, args: argparse.Namespace, folds: list[int]) -> dict | None:
    """The floor of the same inputs, part and folds: {"path", "r2", "per_dimension" (19,)}; None where results hold none."""
    row = (
        "floor"
        + {"score": "_score", "perf": "_perf", "midi": "_midi"}.get(data.get("features"), "")
        + "_keepoverlap" * bool(data["keep_overlap"])
    )
    path = Path(args.results_dir) / f"{'han' if kind == 'han' else 'ast'}_{row}_{data['split']}.json"
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if (
            saved["synthetic"] != data["synthetic"]
            or saved.get("audio") != data.get("audio")
            or saved["labels"] != list(LABELS)
        ):
            return None
        each = [
            (saved["metrics"][args.part]["all"] or {"folds": {}})["folds"].get(str(fold)) for fold in folds
        ]
        return (
            None
            if None in each
            else {
                "path": str(path),
                "r2": float(np.mean([f["r2"] for f in each])),
                "per_dimension": np.mean([f["per_dimension"]["r2"] for f in each], axis=0),
            }
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: no results ({_cause(error)}); expected a floor as --save-results writes it; make it again, or give another --results-dir"
        ) from error


def _slopes(y: np.ndarray, p: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per dimension, about the means of each fold: slope of the ratings over the predictions, and deviation of predictions over that of ratings."""
    a, b = (
        np.concatenate([x[folds == fold] - x[folds == fold].mean(0) for fold in np.unique(folds)])
        for x in (p, y)
    )
    with np.errstate(invalid="ignore", divide="ignore"):  # constant predictions or ratings have none
        return (a * b).sum(0) / (a**2).sum(0), np.sqrt((a**2).sum(0) / (b**2).sum(0))


def rating_tables(
    views: dict,
    part: str,
    intervals: dict,
    tests: dict | None,
    floor_row: dict | None,
    references: list[tuple],
    y: np.ndarray,
    p: np.ndarray,
    folds: np.ndarray,
) -> str:
    """Totals by view and fold, references (name, metric, mean) below them; the 19 dimensions with intervals, the floor beside them."""
    rows = []
    for view, figures in views.items():
        for fold, s in (
            [*figures["folds"].items(), *([("mean", figures["mean"])] if len(figures["folds"]) > 1 else [])]
            if figures
            else []
        ):
            counted = (
                [str(s["items"]), str(s["segments"])]
                if fold != "mean"
                else [str(sum(f[key] for f in figures["folds"].values())) for key in ("items", "segments")]
            )
            rows.append(
                [
                    f"fold {fold}, {VIEWS[view]}" if fold != "mean" else f"mean of the folds, {VIEWS[view]}",
                    *counted,
                    s["r2"],
                    _interval(*s["r2_interval"]),
                    f"{s['mse']:.5f}",
                    s["pearson"],
                ]
            )
    rows += [
        [
            name,
            "",
            "",
            *(["", "", "", f"{value:.4g}"] if metric == "Pearson" else [f"{value:.4g}", "", "", ""]),
        ]
        for name, metric, value in references
    ]
    totals = _table(
        f"Part {part}; 95 % intervals by bootstrap over segments",
        ["", "items", "segments", "R²", "95 %", "MSE", "Pearson"],
        rows,
    )
    mean, nothing = views["all"]["mean"], [(math.nan, math.nan)] * len(LABELS)
    each, r2_intervals, r_intervals = (
        mean["per_dimension"],
        *((tests or {}).get(key, nothing) for key in ("r2_interval", "pearson_interval")),
    )
    floors = floor_row["per_dimension"] if floor_row else [math.nan] * len(LABELS)
    slopes, spreads = _slopes(y, p, folds)
    low = max(-1.0, min([0.0, *(v for v in each["r2"] if np.isfinite(v))]))
    rows = [
        [
            label,
            each["r2"][d],
            _bar(each["r2"][d], r2_intervals[d], (low, 1), floors[d]),
            _interval(*r2_intervals[d]),
            *([floors[d]] if floor_row else []),
            each["pearson"][d],
            _interval(*r_intervals[d]),
            tests["p_holm"][d] if tests else math.nan,
            slopes[d],
            spreads[d],
        ]
        for d, label in enumerate(LABELS)
    ]
    rows.append(
        [
            "mean",
            mean["r2"],
            _bar(mean["r2"], intervals["R²"], (low, 1), floor_row and floor_row["r2"]),
            _interval(*intervals["R²"]),
            *([floor_row["r2"]] if floor_row else []),
            mean["pearson"],
            _interval(*intervals["Pearson"]),
            "",
            slopes.mean(),
            spreads.mean(),
        ]
    )
    head = [
        "dimension",
        "R²",
        f"{low:.1g} to 1",
        "95 %",
        *(["floor R²"] if floor_row else []),
        "Pearson r",
        "95 %",
        "p (Holm)",
        "slope",
        "spread",
    ]
    about = "Blue: R² and its interval" + (
        f"; orange: the floor, {floor_row['path']}, same folds. "
        if floor_row
        else "; no floor of these inputs and folds in the results. "
    )
    about += "Published figures are means only. p: permutation of segments, corrected for 19 tests. Slope: of ratings over predictions, 1 is right, below 1 the predictions are too bold. Spread: deviation of predictions / of ratings."
    return f'<h3>Results</h3>{totals}<h3>By dimension</h3>{_table("Means over the folds", head, rows, last_is_sum=True)}<p class="soft">{_text(about)}</p>'


def scatter(y: np.ndarray, p: np.ndarray, mean: dict) -> str:
    """Prediction over rating, a small picture a dimension, all to one scale."""
    low, high = float(min(y.min(), p.min())) - 0.03, float(max(y.max(), p.max())) + 0.03
    even = ("dash even", np.array([[low, low], [high, high]]))
    pictures = [
        (
            _chart(
                f"{label}: prediction over rating, r {mean['per_dimension']['pearson'][d]:.2f}",
                [even, ("fine s0", np.column_stack([y[:, d], p[:, d]]))],
                ("rating", "prediction"),
                (190, 180),
                limits=(low, high, low, high),
            ),
            f"{label}, r {mean['per_dimension']['pearson'][d]:.2f}",
        )
        for d, label in enumerate(LABELS)
    ]
    return f'<h3>Prediction over rating</h3><p class="soft">{len(y)} items; on the dashed line prediction and rating agree.</p>{_figures(pictures, "small")}'


def calibration(y: np.ndarray, p: np.ndarray, width: float = 0.05) -> str:
    """Mean rating of predictions that lie in one bin, and the deviation of predictions over that of ratings, a point a dimension."""
    bins = np.floor(p / width + 1e-9).astype(int)
    rows = [
        (
            b,
            int((bins == b).sum()),
            float(p[bins == b].mean()),
            float(y[bins == b].mean()),
            float(y[bins == b].std()),
        )
        for b in np.unique(bins)
    ]
    points = np.array([[predicted, rated] for _, _, predicted, rated, _ in rows])
    low, high = points.min() - 0.04, points.max() + 0.06
    widest = 1.15 * max(p.std(0).max(), y.std(0).max(), 0.01)
    table = _table(
        "All dimensions together",
        ["predicted", "count", "mean prediction", "mean rating", "deviation of ratings"],
        [[f"{b * width:.2f} to {(b + 1) * width:.2f}", str(n), *rest] for b, n, *rest in rows],
    )
    slope = float(_slopes(y.reshape(-1, 1), p.reshape(-1, 1), np.zeros(y.size))[0][0])
    return (
        "<h3>Calibration</h3>"
        + _figures(
            [
                (
                    _chart(
                        "Mean rating over mean prediction, by bins of the prediction",
                        [("dash even", np.array([[low, low], [high, high]])), ("dots s0", points)],
                        ("mean prediction", "mean rating"),
                        limits=(low, high, low, high),
                        size=(300, 240),
                        numbers=[(*point, str(row[1])) for point, row in zip(points, rows, strict=True)],
                    ),
                    f"Mean rating by bins of the prediction, all dimensions, with counts; slope of all ratings over predictions {slope:.2f}",
                ),
                (
                    _chart(
                        "Deviation of predictions over deviation of ratings",
                        [
                            ("dash even", np.array([[0, 0], [widest, widest]])),
                            ("dots s0", np.column_stack([y.std(0), p.std(0)])),
                        ],
                        ("deviation of ratings", "deviation of predictions"),
                        limits=(0, widest, 0, widest),
                        size=(300, 240),
                    ),
                    "Spread, a point a dimension: below the line the predictions vary less than the ratings",
                ),
            ]
        )
        + f"<details><summary>Bins</summary>{table}</details>"
    )


def extreme_items(
    names: list[str], y: np.ndarray, p: np.ndarray, folds: np.ndarray, worst: int = 10, best: int = 5
) -> str:
    """The items with the largest and the smallest mean squared error, and the dimension that errs most."""
    error = (p - y) ** 2
    order, rows = np.argsort(-error.mean(1), kind="stable"), []
    for i in [*order[:worst], *order[max(worst, len(order) - best) :][::-1]]:
        d = int(error[i].argmax())
        rows.append([names[i], str(folds[i]), f"{error[i].mean():.4f}", LABELS[d], p[i, d], y[i, d]])
    head = ["item", "fold", "MSE", "errs most in", "predicted", "rated"]
    return f"<h3>Worst and best items</h3>{_table('Worst items first', head, rows[:worst])}{_table('Best items first', head, rows[worst:]) if rows[worst:] else ''}"


# --- decoder ---


def decoder_section(group: list[dict], args: argparse.Namespace) -> dict:
    """Decoders of one configuration, probabilities averaged: error rates by day, confusions, transcripts."""
    loaded, own = _evaluation(group, args)
    if own is None:
        return _section(group, _logged_verdict(group), _is_synthetic(group), None, [])
    corpus, data = _speech_corpus(own, loaded), loaded[0][2]["data"]
    trials = speech_parts(corpus, data["valid"])[own.part]
    trials = trials[corpus.labelled[trials]]
    if not len(trials):
        raise DataError(
            f"--part {own.part}: no labelled trial in {corpus.root}; a phoneme error rate needs some; give another part, or --no-data"
        )
    records = transcripts(mean_logits(loaded, corpus, trials, own), corpus, trials)
    refs, hyps = ([record[side] for record in records] for side in ("reference", "hypothesis"))
    interval, synthetic = trial_bootstrap(per_counts(refs, hyps)), corpus.synthetic or data["synthetic"]
    figures = {**decoder_scores(refs, hyps, corpus.day[trials], corpus.days), "interval": list(interval)}
    sentence = (
        f"phoneme error rate {figures['per']:.3f} {_interval(*interval)} of {figures['trials']} trials, {'validation' if own.part == 'valid' else own.part} part, {len(figures['by_day'])} days; "
        f"without SIL {figures['per_without_sil']:.3f}"
    )
    sentence += "".join(
        f"; {_against(interval, *reference)}"
        for reference in PUBLISHED.get(("decoder", corpus.channels), [])
        if not synthetic
    )
    caution = [
        "The checkpoint was chosen on the test part (--valid test, the baseline's habit): its score there is no result."
    ] * (data["valid"] == "test")
    caution = caution or [CHOSEN[own.part]]
    return _section(
        group,
        sentence,
        synthetic,
        figures,
        [
            day_table(figures, records),
            confusion(records),
            sample_transcripts(records, dict(zip(corpus.ids, corpus.text, strict=True))),
        ],
        caution,
    )


def day_table(figures: dict, records: list[dict]) -> str:
    """Error rates by day with intervals over trials."""
    intervals = {
        day: trial_bootstrap(
            per_counts(
                *([r[side] for r in records if r["day"] == day] for side in ("reference", "hypothesis"))
            )
        )
        for day in figures["by_day"]
    }
    rates = [f["per"] for f in figures["by_day"].values()]
    widest = (
        max(
            (rate for rate in [*rates, *(high for _, high in intervals.values())] if np.isfinite(rate)),
            default=0,
        )
        or 1
    )
    rows = [
        [
            day,
            f["per"],
            _bar(f["per"], low_high, (0, widest), figures["per"]),
            _interval(*low_high),
            *(str(f[key]) for key in ("trials", "labels", "sub", "del", "ins")),
        ]
        for (day, f), low_high in zip(
            [*figures["by_day"].items(), ("all days", figures)],
            [*intervals.values(), figures["interval"]],
            strict=True,
        )
    ]
    head = [
        "day",
        "PER",
        f"0 to {widest:.2g}",
        "95 %",
        "trials",
        "phonemes",
        "substituted",
        "deleted",
        "inserted",
    ]
    return (
        f"<h3>Error rate by day</h3>{_table('Phoneme error rate; 95 % intervals by bootstrap over trials', head, rows, last_is_sum=True)}"
        '<p class="soft">Blue: the rate and its interval; orange: all days together.</p>'
    )


def confusion(records: list[dict]) -> str:
    """Heat map of what reference phonemes became, from minimal edit scripts: substituted, deleted (last column), inserted (last row)."""
    none, times, spoken = len(PHONEMES), Counter(), Counter(k for r in records for k in r["reference"])
    for r in records:
        for tag, i, j in Levenshtein.editops(r["reference"], r["hypothesis"]).as_list():
            times[
                r["reference"][i] if tag != "insert" else none,
                r["hypothesis"][j] if tag != "delete" else none,
            ] += 1
    side, edge, names = 16, 44, [*PHONEMES[1:], "∅"]
    size, most = edge + side * len(names), max(times.values(), default=1)
    parts = [
        f'<rect class="frame" x="{edge}" y="{edge}" width="{side * len(names)}" height="{side * len(names)}"/>'
    ]
    for n, name in enumerate(names):
        at = edge + side * n + side / 2
        parts.append(
            f'<text x="{edge - 5}" y="{at + 3}" text-anchor="end">{name}</text><text transform="translate({at + 3} {edge - 5}) rotate(-90)">{name}</text>'
            f'<path class="grid" d="M{edge} {at}H{size}M{at} {edge}V{size}"/>'
        )
    for (a, b), n in sorted(times.items()):
        rate = f", {n / spoken[a]:.0%} of {spoken[a]}" if spoken[a] else ""
        what = (
            f"{names[a - 1]} {'deleted' if b == none else f'decoded as {names[b - 1]}'}"
            if a != none
            else f"{names[b - 1]} inserted"
        )
        parts.append(
            f'<rect class="cell" x="{edge + side * (b - 1)}" y="{edge + side * (a - 1)}" width="{side}" height="{side}" fill-opacity="{0.12 + 0.88 * n / most:.2f}"><title>{what}: {n} times{rate}</title></rect>'
        )
    frequent = ", ".join(
        f"{a} as {b} {n}"
        for a, b, n in substitutions([r["reference"] for r in records], [r["hypothesis"] for r in records])
    )
    return (
        f'<h3>Confusions</h3><p class="soft">Rows: the reference; columns: what was decoded; ∅: deleted (column) or inserted (row); the darkest cell {most} times. '
        f'Most frequent: {_text(frequent or "none")}.</p><div class="scroll" tabindex="0" role="region" aria-label="confusion of phonemes">'
        f'<svg class="heat" viewBox="0 0 {size + 2} {size + 2}" role="img" aria-label="Heat map of decoded over reference phonemes">{"".join(parts)}</svg></div>'
    )


def sample_transcripts(records: list[dict], texts: dict[str, str]) -> str:
    """The best, the median and the worst trial by error rate, edits marked; texts: the sentence of a trial."""
    rates = [error_rate(per_counts([r["reference"]], [r["hypothesis"]])) for r in records]
    order = sorted((i for i, rate in enumerate(rates) if np.isfinite(rate)), key=lambda i: rates[i])
    parts = []
    for title, k in (("Best", 0), ("Median", len(order) // 2), ("Worst", -1)) if order else ():
        r = records[order[k]]
        sides = {side: [PHONEMES[j] for j in r[side]] for side in ("reference", "hypothesis")}
        for tag, i, j in Levenshtein.editops(r["reference"], r["hypothesis"]).as_list():
            for side, at, mark in (
                ("reference", i, {"replace": "mark", "delete": "del"}.get(tag)),
                ("hypothesis", j, {"replace": "mark", "insert": "ins"}.get(tag)),
            ):
                if mark:
                    sides[side][at] = f"<{mark}>{sides[side][at]}</{mark}>"
        parts.append(
            f"<h4>{title}: {_text(r['trial'])}, PER {rates[order[k]]:.3f}</h4>"
            + (f"<p>“{_text(texts[r['trial']])}”</p>" if texts[r["trial"]] else "")
            + "".join(
                f'<p class="speech">{side}: {" ".join(words) or "(nothing)"}</p>'
                for side, words in sides.items()
            )
        )
    return f'<h3>Transcripts</h3>{"".join(parts)}<p class="soft">Bold: substituted; struck out: deleted; underlined: inserted.</p>'


# --- the page ---


def _page(groups: list[list[dict]], sections: list[dict], args: argparse.Namespace) -> str:
    """The whole document: head with verdicts and runs, a section a configuration. Its policy forbids the browser to load anything."""
    title = f"Report: {', '.join(run['name'] for group in groups for run in group)}"
    title = title if len(title) < 90 else f"Report on {sum(map(len, groups))} runs"
    rows, state = [], git_state()
    for run in (run for group in groups for run in group):
        metric, value, step = _best(run)
        sha = str(run["args"].get("git_sha") or "unknown")[:10] + ", uncommitted changes" * bool(
            run["args"].get("git_dirty")
        )
        rows.append(
            [
                run["name"],
                run["kind"],
                str(run["args"].get("data") or "built-in SYNTHETIC"),
                str(run["args"].get("fold", "–") if run["kind"] != "pretraining" else "–"),
                str(run["args"].get("seed", "–")),
                str(run["records"][-1]["step"]) if run["records"] else "–",
                f"{metric} {value:.3f} at step {step}" if np.isfinite(value) else "–",
                sha,
            ]
        )
    loud = '<p class="warn">SYNTHETIC data: figures marked SYNTHETIC show that the code works; they say nothing about real performances or real speech.</p>'
    links = "".join(
        f'<li><a href="#s{n}">{_text(section["verdict"])}</a></li>' for n, section in enumerate(sections, 1)
    )
    body = "".join(
        f'<section id="s{n}"><h2>{_text(_title(group[0]))}{" (SYNTHETIC)" * section["synthetic"]}</h2><p class="soft">{_text(", ".join(run["name"] for run in group))}</p>{section["html"]}</section>'
        for n, (group, section) in enumerate(zip(groups, sections, strict=True), 1)
    )
    sha = f"{str(state['git_sha'] or 'unknown')[:10]}{', uncommitted changes' * bool(state['git_dirty'])}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"><title>{escape(title)}</title><style>{STYLE}</style></head>
<body><header><h1>{_text(title)}</h1><p class="soft">What training runs learned: curves, scores on the {"validation" if args.part == "valid" else args.part} part, errors, configuration.
{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, code at {escape(sha)}.</p>{loud * any(section["synthetic"] for section in sections)}<ul>{links}</ul>
{_table("Runs; best: the evaluation that the trainer kept", ["run", "task", "data", "fold", "seed", "steps", "best validation", "trained with code"], rows)}</header>
<main>{body}</main><footer><p class="soft">{_text(args.command)}</p></footer></body></html>
"""


# -----------------------------------------------------------------------------------------------------------------
# Command line
# -----------------------------------------------------------------------------------------------------------------

COMMANDS = {
    "evaluate": evaluate,
    "predict": predict,
    "report": report,
    "compare": compare,
    "ceiling": ceiling,
    "floor": floor,
    "curves": curves,
    "bench": bench,
}


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Options that every command shares, then all of them checked."""
    if not parser.prog.endswith(("bench", "--attention", "predict", "report")):
        parser.add_argument(
            "--data",
            metavar="DIR",
            help="data set in its public layout (absent: the built-in synthetic corpus)",
        )
        parser.add_argument(
            "--cache", default="cache", metavar="DIR", help="folder of extracted features (%(default)s)"
        )
    if parser.prog.split()[-1] not in ("bench", "ceiling", "compare", "--attention", "predict", "report"):
        parser.add_argument("--csv", metavar="FILE", help="write the predictions here (off)")
        parser.add_argument(
            "--save-results",
            metavar="ROW",
            help="write figures and predictions, TASK_ROW_<split> or decoder_ROW_<part> .json and .csv, into --results-dir (off)",
        )
        parser.add_argument(
            "--results-dir", default="results", metavar="DIR", help="their folder (%(default)s)"
        )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="where to compute: cpu, cuda, or auto, a GPU where there is one (%(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (off)")
    args = parser.parse_args(argv)
    if getattr(args, "save_results", None) and not re.fullmatch(r"[a-z0-9_]+", args.save_results):
        raise DataError(
            f"--save-results {args.save_results!r}: expected a row name of a-z, 0-9 and _, such as full"
        )
    if args.device not in ("auto", "cpu", "cuda") or args.device == "cuda" and not torch.cuda.is_available():
        raise DataError(
            f"--device {args.device}: not available here; expected auto, cpu"
            + ", cuda" * torch.cuda.is_available()
        )
    args.device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    args.command = "python " + shlex.join([*parser.prog.split(), *argv])
    return args


def main(argv: list[str] | None = None) -> dict:
    """Runs one command and returns its figures."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        raise DataError(
            f"no command; expected {', '.join(COMMANDS)}, or --ckpt FILE ... to evaluate; e.g. python eval.py --ckpt runs/han/NAME/best.pt; --help explains"
        )
    if argv[0] in ("-h", "--help"):
        print(
            f"{__doc__}\nCommands: {', '.join(COMMANDS)} (evaluate is what --ckpt alone does). `python eval.py COMMAND --help` explains each."
        )
        return {}
    if not argv[0].startswith("-"):
        if argv[0] not in COMMANDS:
            raise DataError(
                f"unknown command {argv[0]!r}; expected {', '.join(COMMANDS)}, or --ckpt FILE ... to evaluate"
            )
        return COMMANDS[argv[0]](argv[1:])
    if any(option.split("=")[0] == "--attention" for option in argv):
        return attention(argv)
    return evaluate(argv)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # which a shell's background job has
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_script("eval.py", main)
