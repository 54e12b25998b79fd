"""Measures and uses what the trainers write: evaluation, prediction, pictures, reports, comparisons, floors.

    python eval.py --ckpt FILE ... [--data DIR]                  scores of checkpoints; folds: mean and std
    python eval.py --ckpt ... --part test --csv predictions.csv  test part; unlabelled: predicted only
    python eval.py --ckpt ... --data DIR --save-results full     results/han_full_<split>.json and .csv
    python eval.py predict --ckpt FILE ... --score S --midi M    your own files; or --audio, or --speech
    python eval.py report --run DIR ... --out report.html        curves, scores, worst items, configuration
    python eval.py compare --a A.csv --b B.csv --data DIR        paired test of two results or models
    python eval.py ceiling --data DIR                            what the raters' disagreement leaves to reach
    python eval.py floor --task han|ast --data DIR               scikit-learn on the same parts
    python eval.py curves --run DIR ... --out curves.png         what runs logged, by step
    python eval.py --attention OUT.png --audio W --ckpt FILE     what an AST looks at; or --midi
    python eval.py bench --task han|decoder|ast                  step time

Checkpoints of one fold (seeds) are averaged, and so are decoders. Figures stand with and without the score
renderings (players `Score`, `Score2`). Without --data the built-in synthetic corpus is used.
"""

import os
import signal

# Ctrl-C while torch loads, which takes seconds
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130 if os.write(2, b"eval.py: interrupted\n") else 1))

import argparse
import base64
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import platform
import re
import shlex
import shutil
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
from tqdm import tqdm

from data import (
    BIN,
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
    pretrain_data,
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
    unusable_bins,
    write_atomic,
)
from models import (
    AMP_TYPES,
    AST,
    AST_PRESETS,
    HAN,
    PATCH,
    Block,
    ClipStatistics,
    ContextAttention,
    GRUDecoder,
    cluster_mask,
    git_state,
    group_softmax,
    json_ready,
    load_checkpoint,
    peak_memory,
)

with contextlib.suppress(ImportError):  # Windows has none
    pass

VIEWS = {"all": "all", "no_renderings": "without score renderings"}
AUDIO_TASKS = ("ast", "cnn", "mlp")  # what pretrain_ast.py writes
TRIAL_BINS, BINS_SPREAD = 500, 0.25  # bins per speech trial of the bench: median, sd of the log
# Notes per PercePiano performance: median, sd of the log, longest.
MEDIAN_NOTES, NOTES_SPREAD, MAX_NOTES = 113, 0.67, 420

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
    args = _parse(parser, argv, data_options, result_options)
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
    args = _parse(parser, argv, data_options, result_options)
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


# ---------------------------------------------------------------------------------------------------------
# Bench
# ---------------------------------------------------------------------------------------------------------
def bench_han(sizes: dict, batch: int, device: torch.device) -> tuple[nn.Module, tuple, Callable]:
    """HAN, its arguments, loss of its output. Items have PercePiano's lengths, four voices (0: extra notes),
    three notes a beat, three beats a measure."""
    model = HAN(**{"input_size": len(column_names(FEATURES))} | sizes)
    rng = np.random.default_rng(7)
    items = []
    for notes in rng.lognormal(np.log(113), 0.67, batch).clip(30, MAX_NOTES).astype(int):
        beat = np.sort(rng.integers(notes // 3, size=notes))
        x = rng.standard_normal((notes, model.model_args["input_size"]), np.float32)
        voice = rng.choice([0, 1, 2, 5, 6], notes, p=[0.02, 0.4, 0.1, 0.38, 0.1])
        items.append(
            {"x": x, "voice": voice, "beat": beat, "measure": beat // 3, "y": rng.random(len(LABELS))}
        )
    inputs = to_device(collate_han(items), device)
    return (
        model.to(device),
        (inputs,),
        lambda logits: functional.mse_loss(logits.float().sigmoid(), inputs["y"]),
    )


def bench_decoder(sizes: dict, batch: int, device: torch.device) -> tuple[nn.Module, tuple, Callable]:
    """GRUDecoder, its arguments, loss of its output. Trials of about 500 bins, a label every third frame."""
    model = GRUDecoder(**{"hidden": 512} | sizes).to(device)
    lengths = (500 * (0.25 * torch.randn(batch)).exp()).long().clamp(100, 1200)
    x = torch.randn(batch, int(lengths.max()), model.model_args["channels"])
    x = x * (torch.arange(x.shape[1]) < lengths[:, None])[:, :, None]
    labels = torch.randint(1, len(PHONEMES), (batch, x.shape[1] // 12), device=device)
    day = torch.randint(model.model_args["days"], (batch,), device=device)

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        log_probs = output[0].float().log_softmax(-1).transpose(0, 1)
        return functional.ctc_loss(log_probs, labels, output[1], lengths // 12)

    return model, (x.to(device), lengths, day), loss  # lengths are read on the CPU


def bench_ast(sizes: dict, batch: int, device: torch.device) -> tuple[nn.Module, tuple, Callable]:
    """AST in pre-training, its arguments, loss of its output; masked: 400 of 512 patches or such a share."""
    model = AST(**AST_PRESETS["small"] | sizes).to(device)
    clips = torch.randn(batch, model.model_args["frames"], MELS, device=device) / 2
    count = max(1, model.rows * model.columns * 400 // 512)
    mask = cluster_mask(batch, model.rows, model.columns, count, device)
    return model, (clips, None, mask), lambda output: output["nce"] + 10 * output["mse"]


BENCHES = {"han": (bench_han, 8), "decoder": (bench_decoder, 64), "ast": (bench_ast, 2)}  # and items a step


def bench(argv: list[str]) -> dict:
    """`python eval.py bench`: time of a training step on made-up data of real size; needs no data set."""
    parser = argparse.ArgumentParser(
        prog="eval.py bench",
        usage="python eval.py bench [--task han|decoder|ast] [options]",
        description="Time of a training step on made-up data. Plain networks: tests/plain_networks.py",
    )
    parser.add_argument("--task", choices=BENCHES, default="han", help="network (%(default)s)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=N", help="sizes, as in models.py: size=16"
    )
    parser.add_argument("--batch", type=number(int, 1), help="items a step (8; decoder 64; ast 2)")
    parser.add_argument(
        "--amp", choices=["off", *AMP_TYPES], default="off", help="mixed precision (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=number(int, 1), default=10, help="steps after 3 of warm-up (%(default)s)"
    )
    parser.add_argument("--threads", type=number(int, 0), default=0, help="of the CPU (0: torch's default)")
    args = _parse(parser, argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    make, batch = BENCHES[args.task]
    batch = args.batch or batch
    torch.manual_seed(7)
    try:
        sizes = {name: int(size) for name, size in (pair.split("=") for pair in args.set)}
        model, inputs, loss = make(sizes, batch, args.device)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"bench --set {' '.join(args.set)}: {error}; expected sizes of the network"
        ) from error
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    taken = [timed_step(model, inputs, loss, optimizer, args.amp) for _ in range(3 + args.steps)]
    seconds = float(np.median(taken[3:]))
    about = hardware(args.device)
    dtype = "float32" if args.amp == "off" else args.amp
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    peak = peak_memory(args.device)
    chip = about["gpu"] or about["cpu"]
    print(f"{chip}, {about['threads']} threads, torch {about['torch']}, {args.device}, {dtype}")
    print(
        f"{type(model).__name__}, {parameters:.1f} M parameters, batch {batch}, {args.steps} steps, median:"
    )
    print(f"{1000 * seconds:.1f} ms/step, {batch / seconds:.1f} items/s, peak {peak:.0f} MiB")
    return {"seconds": seconds, "items_per_second": batch / seconds, "peak": peak}


def timed_step(model: nn.Module, inputs: tuple, loss: Callable, optimizer, amp: str = "off") -> float:
    """Seconds of one training step."""
    device = next(model.parameters()).device
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    with torch.autocast(device.type, AMP_TYPES.get(amp), enabled=amp != "off"):
        value = loss(model(*inputs))
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronize()
    return time.perf_counter() - start


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


def with_masks(batch: dict, masked: int, generator: torch.Generator | None = None) -> dict:
    """The batch and `mask`, ids of patches to hide: `masked` of 512 at 1024 frames, the same share of fewer."""
    x, lengths = batch["x"], batch["lengths"]
    B, T = len(x), x.shape[1] // PATCH
    whole = bool((lengths == x.shape[1]).all())
    columns = None if whole else (lengths // PATCH).clip(min=1).to(x.device)
    count = max(1, round(masked / 512 * 8 * T))
    return batch | {"mask": cluster_mask(B, 8, T, count, x.device, generator, columns=columns)}


def pretrain_figures(model: nn.Module, batch: dict, compat: bool) -> dict[str, Tensor]:
    """nce, accuracy, chance, mse, mse_mean of the masked patches, and loss: nce + 10 mse (SSAST, eq. 3)."""
    whole = bool((batch["lengths"] == batch["x"].shape[1]).all())
    lengths = None if whole else batch["lengths"]
    figures = model(batch["x"], lengths, mask=batch["mask"], compat=compat)
    return figures | {"loss": figures["nce"] + 10 * figures["mse"]}


def validate_pretraining(model: nn.Module, batches: list[dict], device: torch.device, args) -> dict:
    """Mean figures over fixed crops: valid_loss, valid_nce, ... args: the trainer's; its seed fixes masks."""
    generator = torch.Generator().manual_seed(args.seed)
    sums: Counter[str] = Counter()
    model.eval()
    with torch.no_grad():
        for batch in batches:
            batch = to_device(with_masks(batch, args.mask, generator), device)
            for name, value in pretrain_figures(model, batch, args.ssast_compat).items():
                sums[name] += float(value) * len(batch["names"])
    count = sum(len(batch["names"]) for batch in batches)
    return {f"valid_{name}": total / count for name, total in sums.items()}


def evaluate_pretraining(args: argparse.Namespace, loaded: list[tuple]) -> dict:
    """The trainer's own figures of a pre-training: its crops and masks, of --data, normalised as it knows."""
    path, model, ckpt = loaded[0]
    data = ckpt["data"]
    if len(loaded) > 1 or args.csv or args.save_results or args.crops:
        raise DataError(
            f"{path}: a pre-training, which rates nothing; give it alone, no --csv, --save-results, --crops"
        )
    if args.data is None and not data["synthetic"]:
        raise DataError(f"{path}: trained on real data; synthetic scores would mean nothing; give --data DIR")
    own = {"data": args.data, "audio": args.audio, "cache": args.cache}
    settings = argparse.Namespace(**{**ckpt["args"], **own})
    norm = {key: data[key] for key in ("mean", "std")}
    _, batches, now = pretrain_data(settings, False, print, norm)
    if now["recordings"] != data["recordings"]:
        print("other recordings than the model was trained with: some that validate here may have trained it")
    figures = validate_pretraining(model.to(args.device), batches, args.device, settings)
    if now["synthetic"]:
        print("SYNTHETIC corpus: figures say nothing about real recordings")
    print(f"{path}, step {ckpt['step']}: {pretrain_summary(figures)}")
    return figures


def pretrain_summary(figures: dict[str, float]) -> str:
    """Validation figures in a line, each beside what guessing reaches."""
    shown = {name: f"{value:.4f}" for name, value in figures.items()}
    return (
        f"loss {shown['valid_loss']}  NCE {shown['valid_nce']}  accuracy {shown['valid_accuracy']} "
        f"(chance {shown['valid_chance']})  MSE {shown['valid_mse']} (mean patch {shown['valid_mse_mean']})"
    )


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
    args = _parse(parser, argv, data_options)
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
    args = _parse(parser, argv, data_options)
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


# ------------------------------------------------------------------------------------------------------------
# Attention: pictures, and the roll-out of an AST
# ------------------------------------------------------------------------------------------------------------

# One style for every picture here; colours are Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
BLUE, ORANGE = COLOURS[:2]
HOUSE_STYLE = {
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "font.size": 12,
    "legend.frameon": False,
}
PICTURES = (".png", ".pdf", ".svg")
HERTZ = (50, 100, 200, 500, 1000, 2000, 4000, 8000)
QUIETEST = -80  # dB under the loudest value of the spectrogram: white


@contextlib.contextmanager
def new_figure(width: float, height: float):
    """A matplotlib figure of so many inches of 100 pixels; within the block everything has one style."""
    from cycler import cycler
    from matplotlib import rc_context  # here: it takes half a second
    from matplotlib.figure import Figure

    with rc_context(HOUSE_STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}):
        yield Figure((width, height))


def save_figure(figure, out: Path) -> None:
    write_atomic(out, lambda file: figure.savefig(file, format=out.suffix[1:].lower()))


def inline_figure(figure, alt: str) -> str:
    """The figure as an <img> that holds its own pixels."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    pixels = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{pixels}">'


def plain(text: object) -> str:
    """At most 60 characters of a name for matplotlib: without bytes that are no text, and no TeX."""
    return _printable(text)[:60].replace("$", r"\$")


def check_output(path: Path) -> None:
    """Refuses, before anything is computed, what cannot be written or is no ordinary file."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    if not writable or (path.exists() and not path.is_file()):
        raise DataError(f"{path}: cannot be written; expected a file in a writable folder; name another")


def check_picture(path: Path) -> None:
    if path.suffix.lower() not in PICTURES:
        raise DataError(f"{path}: no picture; expected {', '.join(PICTURES)}; name it so")
    check_output(path)


def explicit_block(block: Block, x: Tensor, attend: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`block(x, attend)`, and its attention weights (B, H, T, T); rows are queries."""
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
    """Attention roll-out (Abnar & Zuidema, ACL 2020) of an AST: what reaches its output from each patch.

    clips (B, frames, mel) normalised, lengths (B,) -> (B, rows, columns), mean 1 over valid patches, 0 at
    padding. Weights are averaged over heads and with the identity (the residual path), multiplied through the
    layers, and averaged over the rows that the model pools (both tokens, or all valid patches)."""
    rolled, attend = None, None

    def follow(block: Block, inputs: tuple) -> None:
        nonlocal rolled, attend
        x, attend = inputs
        step = (explicit_block(block, x, attend)[1].mean(1) + torch.eye(x.shape[1], device=x.device)) / 2
        rolled = step if rolled is None else step @ rolled

    hooks = [block.register_forward_pre_hook(follow) for block in model.blocks]
    try:
        model(clips, lengths)
    finally:
        for hook in hooks:
            hook.remove()
    valid = torch.ones_like(rolled[:, 0]) if attend is None else attend.to(rolled.dtype)
    extra = 0 if model.extra is None else 2
    is_extra = torch.arange(valid.shape[1], device=valid.device) < extra
    pooled = valid * (is_extra if model.pooling == "cls" else ~is_extra)
    share = (pooled.unsqueeze(1) @ rolled).squeeze(1)[:, extra:]
    share = share / share.sum(1, keepdim=True) * valid[:, extra:].sum(1, keepdim=True)
    return share.unflatten(1, (model.rows, -1))


def roll_out_file(model: AST, energies: Tensor, device: torch.device) -> tuple[np.ndarray, list[int]]:
    """energies (frames, mel), normalised -> shares (rows, columns), and the first column of each crop.

    Crops are as long as the model takes, spaced as in `crop_starts`, and averaged where they overlap."""
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
    """Where frequencies lie on the axis of data.fbank's bands, 0 = the middle of the first."""
    low, high, mel = (1127 * np.log1p(np.asarray(f, float) / 700) for f in (20, SAMPLE_RATE / 2, hertz))
    return ((mel - low) / (high - low) * (MELS + 1) - 1).clip(-0.5, MELS - 0.5)


def draw_attention(
    out: Path, energies: np.ndarray, share: np.ndarray, starts: list[int], stride: int, title: str
) -> None:
    """Shares (rows, columns) over the spectrogram (frames, 128) in grey; dotted lines where crops begin."""
    from matplotlib.colors import TwoSlopeNorm

    decibels = 10 / math.log(10) * (energies.T - energies.max())
    frame = HOP / SAMPLE_RATE
    edge = (PATCH - stride) / 2  # a patch is drawn as wide as a stride, around its middle
    bottom, top = (edge - 0.5 + stride * row for row in (0, len(share)))
    left, right = (frame * (edge + stride * column) for column in (0, share.shape[1]))
    low, high = np.percentile(share, [1, 99])
    shading = {"cmap": "coolwarm", "norm": TwoSlopeNorm(1, min(low, 0.999), max(high, 1.001)), "alpha": 0.6}
    whole = (0, frame * len(energies), -0.5, MELS - 0.5)
    with new_figure(16, 6) as figure:
        axes = figure.subplots()
        image = functools.partial(axes.imshow, origin="lower", aspect="auto", interpolation="nearest")
        image(decibels, extent=whole, cmap="gray_r", vmin=QUIETEST, vmax=0)
        shades = image(share, extent=(left, right, bottom, top), **shading)
        axes.set(xlim=whole[:2], ylim=whole[2:], xlabel="time (s)", ylabel="frequency (Hz), mel scale")
        axes.set_yticks(hertz_to_band(HERTZ), HERTZ)
        axes.vlines([left + frame * stride * start for start in starts[1:]], *whole[2:], "black", ":")
        axes.set_title(title)
        label = "attention that reaches the output\n(1 = the same from every patch)"
        figure.colorbar(shades, ax=axes, extend="both", pad=0.01, label=label)
        save_figure(figure, out)


def explain_ast(out: Path, members: list[tuple], work: dict) -> dict:
    """Mean roll-out of ASTs on one recording; work: name, energies (frames, 128)."""
    check_attention(members)
    energies, shares, starts = work["energies"], [], []
    for model, kept in members:
        x = normalise_fbank(energies, kept["data"]["mean"], kept["data"]["std"])
        share, own = roll_out_file(model, torch.from_numpy(x).float(), next(model.parameters()).device)
        shares.append(share)
        starts = max(starts, own, key=len)
    share = np.mean(shares, axis=0)
    if not np.isfinite(share).all():
        raise DataError(f"{work['name']}: attention is not finite; expected numbers")
    title = f"{plain(work['name'])}: attention roll-out of AST, {len(members)} checkpoints"
    if members[0][1]["data"].get("synthetic"):
        title += ", SYNTHETIC training data"
    title += f"; darkness: level, {-QUIETEST} dB from white to black"
    draw_attention(out, energies, share, starts, members[0][0].stride, title)
    return {"share": share, "starts": starts}


def check_attention(members: list[tuple]) -> None:
    """Refuses networks that have no attention to draw, or other patches than the first."""
    for model, kept in members:
        known = isinstance(model, AST) and {"mean", "std"} <= kept["data"].keys()
        if not known or model.model_args["mel"] != MELS or model.stride != members[0][0].stride:
            raise DataError(
                f"{kept['path']}: task {kept['task']!r}; expected ASTs of {MELS} bands and one stride, "
                "with mean and std in their data; give another"
            )


def read_piece(path: str | Path, rendered: bool) -> np.ndarray:
    """Log-mel energies (frames, 128) of a sound file, or of a MIDI file as the built-in piano plays it."""
    waveform = render(read_midi(path)) if rendered else read_wav(path)
    if fbank_frames(len(waveform)) < PATCH or not waveform.any():
        shortest = (FRAME + (PATCH - 1) * HOP) / SAMPLE_RATE
        what = "digital silence" if len(waveform) and not waveform.any() else "sound"
        seconds = len(waveform) / SAMPLE_RATE
        raise DataError(f"{path}: {seconds:.3f} s of {what}; expected {shortest} s of sound or more")
    return fbank(torch.from_numpy(waveform)).numpy()


def attention(argv: list[str]) -> dict:
    """`python eval.py --attention OUT`: the roll-out of one AST on one file."""
    parser = _parser(
        "--attention",
        "OUT.png --audio FILE.wav | --midi FILE.mid --ckpt FILE",
        """\
Which parts of a piece reach an AST's output, drawn over its spectrogram.

    python eval.py --attention out.png --midi FILE.mid --ckpt runs/ast/NAME/best.pt
    python eval.py --attention out.pdf --audio FILE.wav --ckpt runs/ast/NAME/best.pt""",
    )
    add = parser.add_argument
    add("--attention", required=True, metavar="OUT", help="picture to write: .png, .pdf or .svg (required)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--audio", metavar="FILE", help="sound file of any length")
    source.add_argument("--midi", metavar="FILE", help="MIDI file, played by the built-in piano")
    add("--ckpt", required=True, metavar="FILE", help="best.pt of pretrain_ast.py, of either task (required)")
    args = _parse(parser, argv)
    out = Path(args.attention)
    check_picture(out)
    model, ckpt = load_checkpoint(args.ckpt)
    members = [
        (model.to(args.device), {"path": args.ckpt, "task": ckpt["task"], "data": ckpt.get("data") or {}})
    ]
    check_attention(members)
    path = args.audio or args.midi
    energies = read_piece(path, rendered=not args.audio)
    drawn = explain_ast(out, members, {"name": Path(path).name, "energies": energies})
    rows, columns = drawn["share"].shape
    print(f"{out}: {columns} x {rows} patches in {len(drawn['starts'])} crops")
    return drawn | {"frames": len(energies)}


# ------------------------------------------------------------------------------------------------------------
# Training curves
# ------------------------------------------------------------------------------------------------------------
CURVES = {
    "valid_per": "phoneme error rate, validation",
    **{f"valid_{metric}": f"{metric}, validation" for metric in METRICS},
    "valid_accuracy": "NCE accuracy, validation",
    "loss": "loss, training",
    "valid_loss": "loss, validation",
    "spread": "deviation of predictions / of ratings",
    "valid_blank_fraction": "share of blank frames, validation",
    "norm": "gradient norm before clipping",
    "lr": "learning rate",
    "skipped": "skipped updates so far",
}
# Score shown, and the key by whose least value the trainer chose its best.pt.
CHOSEN_BY = {
    "valid_per": "valid_per",
    "valid_r2": "valid_loss",
    "valid_accuracy": "valid_loss",
    "valid_loss": "valid_loss",
}


def read_metrics(run: str | Path) -> list[dict]:
    """The lines of a run folder's metrics.jsonl, less a last one that a kill cut short."""
    path, records = Path(run) / "metrics.jsonl", []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a run's folder") from error
    for n, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append(record | {"step": int(record["step"])})
        except (ValueError, KeyError, TypeError) as error:
            if n < len(lines):
                raise DataError(f"{path}: line {n}: {error!r}; expected a log record with a step") from error
    if not records:
        raise DataError(f"{path}: no log record; expected some; let the run reach its first --log-every")
    return records


def history(records: list[dict], key: str) -> np.ndarray:
    """(n, 2) steps and logged values of one key; of a step that a resumed run took again, the later."""
    values = {}
    for record in records:
        value = record.get(key)
        if isinstance(value, dict):  # updates skipped, by kind
            value = sum(value.values())
        if value is not None:
            values[record["step"]] = value
    return np.array(sorted(values.items()), float).reshape(-1, 2)


def best_validation(records: list[dict]) -> tuple[str, float, int]:
    """(key, value, step) of the evaluation that the trainer kept; ("", NaN, 0) without any."""
    for key, least in CHOSEN_BY.items():
        found = [r for r in records if r.get(key) is not None and r.get(least) is not None]
        if found:
            kept = min(found, key=lambda r: r[least])
            return key, kept[key], kept["step"]
    return "", math.nan, 0


def draw_curves(figure, runs: dict[str, list[dict]]) -> None:
    """Everything of CURVES that the runs (name -> records) logged, by step, a colour a run."""
    shown = [key for key in CURVES if any(len(history(records, key)) for records in runs.values())]
    panels = figure.subplots(math.ceil(len(shown) / 3) or 1, 3, squeeze=False).flat
    for axes, key in itertools.zip_longest(panels, shown):
        if key is None:
            axes.set_axis_off()
            continue
        for name, records in runs.items():
            points = history(records, key)
            marker = "o" if key.startswith("valid") or len(points) == 1 else None
            axes.plot(points[:, 0], points[:, 1], label=plain(name), marker=marker, markersize=3, linewidth=1)
        axes.set(title=CURVES[key], xlabel="step", yscale="log" if key == "norm" else "linear")
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def curves(argv: list[str]) -> dict:
    """`python eval.py curves`: what runs logged, in one picture; returns their best scores."""
    parser = _parser(
        "curves",
        "--run DIR ... --out FILE",
        """\
What runs logged, in one picture: validation scores, losses, gradient norm, skipped updates, by step.

    python eval.py curves --run runs/han/NAME --out curves.png
    python eval.py curves --run runs/decoder/default runs/decoder/baseline --out both.svg""",
    )
    add = parser.add_argument
    add("--run", nargs="+", required=True, metavar="DIR", help="run folders, runs/TASK/NAME (required)")
    add("--out", required=True, metavar="FILE", help="picture to write: .png, .svg or .pdf (required)")
    args = _parse(parser, argv)
    check_picture(Path(args.out))
    runs = {name: read_metrics(path) for name, path in _run_names(args.run).items()}
    with new_figure(16, 12) as figure:
        draw_curves(figure, runs)
        save_figure(figure, Path(args.out))
    best = {}
    for name, records in runs.items():
        key, best[name], step = best_validation(records)
        skipped = next((record["skipped"] for record in reversed(records) if "skipped" in record), {})
        print(f"{name}: {records[-1]['step']} steps; {key} {best[name]:.4f} at {step}; skipped {skipped}")
    print(f"saved {args.out}")
    return best


def _run_names(paths: list[str]) -> dict[str, str]:
    """{name: folder}: the folder's last part, or the whole where two end alike."""
    paths = list(dict.fromkeys(paths))
    names = [Path(path).name for path in paths]
    return {path if names.count(name) > 1 else name: path for name, path in zip(names, paths, strict=True)}


# ------------------------------------------------------------------------------------------------------------
# Prediction
# ------------------------------------------------------------------------------------------------------------

BAR = 25  # characters of the scale from 0 to 1
MOST_BINS = 60_000  # of a trial in an .npy file: 20 minutes
INPUTS = {
    "han": ("score", "midi"),
    "ast": ("audio", "midi"),
    "decoder": ("speech", "day", "raw"),
}  # options that each takes
EDITS = ("sub", "del", "ins")


def _label_group(label: str) -> str:
    for group in ("Music_Making", "Emotion_&_Mood"):
        if label.startswith(group):
            return group
    return label.split("_")[0]


def _poles(label: str) -> tuple[str, str]:
    """The two halves of what follows the group in a label's name: either pole has as many words."""
    words = label.removeprefix(_label_group(label) + "_").split("_")
    middle = len(words) // 2
    return " ".join(words[:middle]).capitalize(), " ".join(words[middle:]).capitalize()


# What a rating of 0 and a rating of 1 say. Against the name for the first articulation: its ratings rise with
# sounding length (r .71) and pedal (.74), and the dataset's README calls it Short_Long.
LABEL_POLES = {label: _poles(label) for label in LABELS} | {
    "Articulation_Long_Short": ("Short", "Long"),
    "Articulation_Soft_cushioned_Hard_solid": ("Soft/cushioned", "Hard/solid"),
}


def predict(argv: list[str]) -> list[dict]:
    """`python eval.py predict`: ratings or phonemes of your own files: see `predict_files`."""
    parser = _parser(
        "predict",
        "--ckpt FILE ... INPUT [options]",
        """\
Ratings (19, from 0 to 1) of piano performances, or phonemes of speech trials, of your own. By checkpoint:

    HAN              --score FILE and --midi PATH
    AST, CNN, MLP    --audio PATH or --midi PATH       MIDI is played by the built-in piano
    decoder          --speech PATH                     bins of 20 ms

    python eval.py predict --ckpt runs/han/full_s7_f?/best.pt --score piece.mxl --midi takes/ --csv out.csv
    python eval.py predict --ckpt runs/decoder/NAME/best.pt --speech trials/ --day nearest --json -

A rating's bar runs from 0 to 1: o is the prediction, | the mean of the ratings that trained the model.""",
    )
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="FILE", help="best.pt of one task, averaged (required)")
    add("--score", nargs="+", metavar="FILE", help="MusicXML: one for all --midi, or one for each")
    add("--midi", nargs="+", metavar="PATH", help="MIDI files, or folders of them")
    add("--audio", nargs="+", metavar="PATH", help="sound files of any rate and length, or folders of them")
    add("--speech", nargs="+", metavar="PATH", help="corpus, .mat of '24, .npy (bins, channels) or folder")
    add("--day", help="day layer: a session's name; for unknown ones nearest (date) or mean (.npy: mean)")
    add("--raw", action="store_true", help="take .npy as it is (off: z-scored together, as a block)")
    add("--json", metavar="FILE", help="write predictions and circumstances; -: standard output (off)")
    add("--csv", metavar="FILE", help="write a line a prediction; -: standard output (off)")
    add("--explain", metavar="PATH", help="draw what predictions rest on: FILE.png, or a folder (off)")
    add("--strict", action="store_true", help="stop at the first refused input (off: reported, counted)")
    add("--cache", default="cache", metavar="DIR", help="folder of converted speech corpora (%(default)s)")
    args = _parse(parser, argv)
    for path in (args.json, args.csv):
        if path and path != "-":
            check_output(Path(path))
    if args.json == args.csv == "-":
        raise DataError("--json - --csv -: both on standard output; expected one; name a file for the other")
    loaded = _load_models(args.ckpt)
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if "-" in (args.json, args.csv) else stdout):
        records, refused = predict_files(loaded, args)
        print(f"{len(records)} predicted, {len(refused)} refused")
        if not records:
            raise DataError(
                refused[0] if len(refused) == 1 else f"all {len(refused)} inputs were refused: see above"
            )
        texts = {
            args.csv: predictions_csv(records),
            args.json: predictions_json(records, refused, loaded, args),
        }
        for path, text in texts.items():
            if path == "-":
                stdout.write(text)
            elif path:
                content = text.encode(errors="surrogateescape")
                write_atomic(Path(path), lambda file, content=content: file.write(content))
                print(f"saved {path}")
    return records


def predict_files(loaded: list[tuple], args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """Predictions of all inputs, printed as they come, and the line of each refused one (--strict: raised).

    han, ast: name, path, ratings (19,); han also score, match_rate, extra (share of played notes not in the
    score), notes; ast seconds. decoder: id, path, session, seconds, phonemes, reference, errors."""
    kind, members = _predictors(loaded)
    jobs = {"han": han_jobs, "ast": audio_jobs, "decoder": decoder_jobs}[kind](members, args)
    check_explain(args, len(jobs))
    known = _training_ratings(members)
    records, refused, taken = [], [], Counter()

    def refuse(error: DataError) -> None:
        if args.strict:
            raise error
        refused.append(_printable(error))
        tqdm.write(f"refused: {refused[-1]}")

    if kind != "decoder":
        print(
            f"{len(members)} checkpoints averaged"
            if len(members) > 1
            else f"{args.ckpt[0]}, step {loaded[0][2]['step']}"
        )
        if members[0][1]["data"]["synthetic"]:
            print("trained on the SYNTHETIC corpus: its ratings say nothing about real performances")
    for job in tqdm(jobs, desc="predict", unit="file", leave=False, disable=None):
        try:
            done = job(refuse)
        except DataError as error:
            refuse(error)
            continue
        for record, work in done:
            records.append(record)
            tqdm.write(_show_trial(record) if kind == "decoder" else _show_ratings(record, known))
            if args.explain:
                try:
                    picture = _picture_of(args.explain, work["name"], taken)
                    explain(kind, picture, members, work)
                    tqdm.write(f"drawn: {picture}")
                except DataError as error:
                    if args.strict or len(jobs) == len(done) == 1:
                        raise
                    tqdm.write(f"no picture: {error}")
    _print_labelled(records)
    return records, refused


def _predictors(loaded: list[tuple]) -> tuple[str, list[tuple]]:
    """han, ast (all audio tasks) or decoder, and the [(model, its checkpoint), ...] that can be averaged."""
    task = loaded[0][2]["task"]
    if task == "decoder":
        _shared_settings(loaded)
        return task, [(model, {"path": path, **ckpt}) for path, model, ckpt in loaded]
    for path, model, _ in loaded:
        if task == "ast" and model.model_args["num_outputs"] is None:
            raise DataError(f"{path}: a pre-training, which rates nothing; fine-tune it first")
    folds, _ = _load_fold_models(loaded)
    return "han" if task == "han" else "ast", list(itertools.chain.from_iterable(folds.values()))


def _check_inputs(args: argparse.Namespace, kind: str, complete: bool) -> None:
    """Refuses inputs that a kind of checkpoint does not take, and incomplete ones."""
    given = {option for options in INPUTS.values() for option in options if getattr(args, option)}
    if not complete or given - set(INPUTS[kind]):
        shown = ", ".join(f"--{option}" for option in sorted(given)) or "none"
        wanted = {"han": "--score and --midi", "ast": "--audio or --midi", "decoder": "--speech"}[kind]
        raise DataError(f"{args.ckpt[0]}: takes {wanted}; given {shown}; give those alone")


def check_explain(args: argparse.Namespace, count: int) -> None:
    """Refuses an --explain that is no picture, cannot be written, or is one picture for several inputs."""
    if not args.explain:
        return
    out = Path(args.explain)
    is_folder = out.is_dir() or not out.suffix
    check_picture(out / "name.png" if is_folder else out)
    if count > 1 and not is_folder:
        raise DataError(f"--explain {out}: one picture for {count} inputs; name a folder")


def _picture_of(explain_path: str, name: str, taken: Counter) -> Path:
    """The file of one explanation; inputs of one name get numbers."""
    out = Path(explain_path)
    if out.suffix and not out.is_dir():
        return out
    name = re.sub(r"[^\w.@+-]", "_", name)
    taken[name] += 1
    return out / (f"{name}.png" if taken[name] == 1 else f"{name}_{taken[name]}.png")


def _printable(text: object) -> str:
    """Without the bytes of a file name that are no text."""
    return str(text).encode(errors="replace").decode()


def _expand(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The file, or those of a folder with such a suffix; hidden ones left out."""
    if not Path(path).is_dir():
        return [Path(path)]
    found = sorted(f for f in Path(path).iterdir() if f.suffix.lower() in suffixes and f.name[0] != ".")
    if not found:
        raise DataError(f"{path}: a folder without {', '.join(suffixes)}; expected some; name another")
    return found


def _training_ratings(members: list[tuple]) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and deviation (19,) of the ratings that trained the models, where checkpoints know them."""
    rows = []
    for _, kept in members:
        info = kept["data"]
        if "rating_mean" in info:
            rows.append((info["rating_mean"], info["rating_std"]))
        elif "target_mean" in info and kept["args"].get("standardise") == "dimension":
            rows.append((info["target_mean"], info["target_std"]))
    return tuple(np.mean(rows, axis=0)) if rows else None


def han_jobs(members: list[tuple], args: argparse.Namespace) -> list[Callable]:
    _check_inputs(args, "han", args.score and args.midi)
    scores = args.score if len(args.score) > 1 else args.score * len(args.midi)
    if len(scores) != len(args.midi):
        raise DataError(f"--score: {len(scores)} files, --midi: {len(args.midi)}; give one, or one for each")
    jobs = []
    for score, path in zip(scores, args.midi, strict=True):
        for midi in _expand(path, (".mid", ".midi")):
            jobs.append(functools.partial(rate_performance, members, args, score, midi))
    return jobs


def rate_performance(
    members: list, args: argparse.Namespace, score: str, midi: Path, _
) -> list[tuple[dict, dict]]:
    """One performance of a score: its record, and what explains it."""
    ((_, item),) = extract_performances((score, [str(midi)]))
    if isinstance(item, str):
        raise DataError(item)
    if item["match_rate"] < MISALIGNED:
        raise DataError(
            f"{midi}: holds {item['match_rate']:.0%} of the notes of {score}; "
            f"expected {MISALIGNED:.0%}; is it another piece, edition or passage?"
        )
    name, extra = (
        _printable(midi.stem.strip()),
        float((item["voice"] == 0).sum() / len(item["performance"].pitch)),
    )
    item["name"] = name
    corpus = Corpus(score, False, {name: item}, [name], column_names(FEATURES), item["stat_names"], {})
    each = [
        predict_han(model, prepare_han(corpus, [name], kept["data"]), args.device) for model, kept in members
    ]
    record = {
        "name": name,
        "path": str(midi),
        "score": score,
        "match_rate": item["match_rate"],
        "extra": extra,
        "notes": len(item["x"]),
        "ratings": np.mean(each, axis=0)[0],
    }
    work = {"name": name, "item": item}
    if args.explain:
        work |= {"score": read_musicxml(score), "performance": item["performance"], "match": item["match"]}
    return [(record, work)]


def audio_jobs(members: list[tuple], args: argparse.Namespace) -> list[Callable]:
    _check_inputs(args, "ast", bool(args.audio) != bool(args.midi))
    if args.explain:
        check_attention(members)
    paths, suffixes = (args.audio, (".wav",)) if args.audio else (args.midi, (".mid", ".midi"))
    trained, kind = members[0][1]["data"]["audio"], "wav" if args.audio else "rendered"
    if trained != kind:
        print(f"trained on audio of kind {trained}, given {kind}: its ratings say little")
    files = itertools.chain.from_iterable(_expand(path, suffixes) for path in paths)
    return [functools.partial(rate_audio, members, args, path) for path in files]


def rate_audio(members: list[tuple], args: argparse.Namespace, path: Path, _) -> list[tuple[dict, dict]]:
    energies, name = read_piece(path, rendered=not args.audio), _printable(path.stem)
    # Rounded as those that trained the model.
    item = {"name": name, "frames": len(energies), "fbank": energies.astype(np.float16)}
    each = [predict_ast(model, [item], kept["data"], args.device) for model, kept in members]
    seconds = len(energies) * HOP / SAMPLE_RATE
    record = {"name": name, "path": str(path), "seconds": seconds, "ratings": np.mean(each, axis=0)[0]}
    return [(record, {"name": name, "energies": energies})]


def decoder_jobs(members: list[tuple], args: argparse.Namespace) -> list[Callable]:
    """A job for each corpus or .mat file, and one for the .npy files of a folder, standardised together."""
    _check_inputs(args, "decoder", args.speech)
    sources: dict[Path, list[Path]] = {}
    for path in map(Path, args.speech):
        is_corpus = (path / "trials.json").is_file()
        inside = sorted(path.glob("[!.]*.npy")) if path.is_dir() and not is_corpus else []
        if path.suffix == ".npy" and not path.is_dir():
            sources.setdefault(path.parent, []).append(path)
        else:
            sources.setdefault(path, []).extend(inside)
    if args.raw and not any(sources.values()):
        raise DataError(f"--raw: for .npy files only; given {', '.join(args.speech)}; leave it out")
    return [functools.partial(decode, members, args, path, files) for path, files in sources.items()]


def decode(
    members: list, args: argparse.Namespace, source: Path, files: list[Path], refuse: Callable
) -> list[tuple]:
    """All trials of a corpus, of a .mat file, or of .npy files: records, and what explains them."""
    channels, stride = members[0][1]["data"]["channels"], members[0][0].stride
    if files:
        corpus = _npy_corpus(source, files, channels, args.raw, refuse)
    elif source.suffix == ".mat":
        corpus = _mat_corpus(source, channels, args.strict)
    else:
        corpus = open_speech(source, args.cache, args.strict)
    if corpus.channels != channels:
        raise DataError(f"{source}: {corpus.channels} channels; {args.ckpt[0]} expects {channels}")
    check_explain(args, len(corpus.ids))
    for line in corpus.left_out:
        print(f"left out: {line}")
    trials, sessions = np.arange(len(corpus.ids)), [corpus.days[d] for d in corpus.day]
    rule = args.day or ("mean" if files else None)
    if files and rule == "mean":  # one unknown session, said once
        corpus = replace(corpus, day=np.zeros_like(corpus.day), days=["of .npy files"])
    if rule not in (None, "nearest", "mean"):  # the day layer of that session for every trial
        corpus, rule = replace(corpus, days=[rule] * len(corpus.days)), None
        print(f"{source}: day layer of {args.day} for every trial")
    settings = argparse.Namespace(ckpt=args.ckpt, device=args.device, day=rule, batch=64, part=None)
    loaded = [(kept["path"], model, kept) for model, kept in members]
    log_probs = mean_logits(loaded, corpus, trials, settings) if len(trials) else []
    _say_circumstances(settings, loaded, corpus, trials)
    results = []
    for i, row in enumerate(log_probs):
        phonemes = ctc_greedy(row[None], [len(row)])[0]
        reference = corpus.labels[i].tolist() if corpus.labelled[i] else None
        record = {
            "id": corpus.ids[i],
            "path": corpus.text[i] if files else str(source),
            "session": sessions[i],
            "seconds": float(corpus.lengths[i] * BIN),
            "phonemes": phonemes,
            "reference": reference,
            "errors": None if reference is None else edit_counts(reference, phonemes),
        }
        work = {
            "name": corpus.ids[i],
            "log_probs": row,
            "labels": reference,
            "seconds per frame": stride * BIN,
        }
        results.append((record, work))
    return results


def _npy_corpus(folder: Path, files: list[Path], channels: int, raw: bool, refuse: Callable) -> SpeechCorpus:
    """A trial and day a file; `text` holds their paths. Unless raw, all are z-scored together, as a block."""
    trials = []
    for path in files:
        try:
            trials.append({"path": path, "block": 0, "x": _read_trial(path, channels)})
        except DataError as error:
            refuse(error)
    how = "taken as they are (--raw)"
    report = ConversionReport(False)
    if trials and not raw:
        kept = standardise_blocks(trials, str(folder), report)[1]
        how = "standardised when they came" if kept else "z-scored together, as one block"
    print(f"{folder}: {len(trials)} .npy trials, {how}", *report.notes, sep="\n")
    features = [trial["x"].astype(np.float32) for trial in trials]
    names = [_printable(trial["path"].stem) for trial in trials]
    return SpeechCorpus(
        features=np.concatenate([np.zeros((0, channels), np.float32), *features]),
        offsets=np.cumsum([0, *map(len, features)]),
        day=np.arange(len(trials)),
        block=np.zeros(len(trials), np.int64),
        part=np.full(len(trials), ""),
        labels=[np.zeros(0, np.int64)] * len(trials),
        text=[str(trial["path"]) for trial in trials],
        ids=names,
        days=names,
        channels=channels,
        root=folder,
        synthetic=False,
        left_out=[],
        labelled=np.zeros(len(trials), bool),
    )


def _read_trial(path: Path, channels: int) -> np.ndarray:
    """(bins, channels) finite numbers from an .npy file; nothing is unpickled. DataError for all else."""
    wanted = f"expected (1 to {MOST_BINS} bins of 20 ms, {channels} channels), numbers, as np.save writes"
    try:
        x = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, ArithmeticError, MemoryError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())[:150]}; {wanted}") from error
    if x.dtype.kind not in "fiu" or x.ndim != 2 or x.shape[1] != channels or not 0 < len(x) <= MOST_BINS:
        raise DataError(f"{path}: type {x.dtype}, shape {x.shape}; {wanted}")
    unusable = unusable_bins(x)
    if unusable:
        raise DataError(f"{path}: {unusable}; leave the trial out or mend it")
    return np.array(x)


def _mat_corpus(path: Path, channels: int, strict: bool) -> SpeechCorpus:
    """The trials of one .mat file of the '24 layout: with labels where it has sentences, else without."""
    refusals = []
    for part in ("test", "competitionHoldOut"):  # the latter needs no sentences
        with (
            tempfile.TemporaryDirectory() as scratch
        ):  # its converted features stay mapped when the folder goes
            copy = Path(scratch) / part / path.name
            copy.parent.mkdir()
            try:
                shutil.copyfile(path, copy)
                asked = None if channels == 256 else channels
                convert_speech(scratch, f"{scratch}/converted", channels=asked, strict=strict, quiet=True)
                corpus = open_speech(f"{scratch}/converted")
            except (DataError, OSError) as error:
                refusals.append(str(error).replace(str(copy), str(path)))
                continue
        for line in refusals:
            print(f"no labels: {line}")
        left_out = [line.replace(str(copy), str(path)) for line in corpus.left_out]
        ids = [trial.partition("/")[2] for trial in corpus.ids]
        synthetic = any((parent / "SYNTHETIC").is_file() for parent in path.absolute().parents[:3])
        return replace(corpus, root=path, ids=ids, left_out=left_out, synthetic=synthetic)
    raise DataError(refusals[0])


def _scale(value: float, mean: float | None) -> str:
    """`....|===o....`: the value among BAR characters from 0 to 1, and its way from the mean."""
    cells, at = ["."] * BAR, round(value * (BAR - 1))
    if mean is not None:
        middle = round(mean * (BAR - 1))
        low, high = sorted((at, middle))
        cells[low:high] = ["="] * (high - low)
        cells[middle] = "|"
    cells[at] = "o"
    return "".join(cells)


def _show_ratings(record: dict, known: tuple[np.ndarray, np.ndarray] | None) -> str:
    """The ratings between their poles, in 100 columns; known: mean and deviation of the training ratings."""
    if "seconds" in record:
        lines = [f"\n{record['name']}, {record['seconds']:.1f} s"]
    else:
        found = f"{record['match_rate']:.1%} of the score's notes were found; "
        found += f"{record['extra']:.1%} of the played notes are not in it"
        lines = [f"\n{record['name']} with {Path(record['score']).name}", found]
        if record["extra"] > 0.5:
            lines[-1] += ": a longer recording, or another edition?"
        if record["notes"] > MAX_NOTES:
            lines.append(f"{record['notes']} notes, PercePiano's passages have {MAX_NOTES} at most: cut it")
    lines.append(f"{'':<39}0{'':<{BAR - 2}}1{'':<20}value")
    if known:
        lines[-1] += "  mean   SD"
    last = None
    for d, (label, (left, right)) in enumerate(LABEL_POLES.items()):
        group, value = _label_group(label), record["ratings"][d]
        shown = "" if group == last else group.replace("_", " ").capitalize()
        last = group
        mean = known[0][d] if known else None
        line = f"{shown:<14} {left:>23} {_scale(value, mean)} {right:<19}{value:5.2f}"
        lines.append(f"{line} {mean:5.2f} {known[1][d]:4.2f}" if known else line)
    return "\n".join(lines)


def _show_trial(record: dict) -> str:
    lines = [f"{record['id']}: {record['seconds']:.2f} s, {len(record['phonemes'])} phonemes"]
    if record["reference"] is not None:
        sub, dele, ins = record["errors"]
        rate = (sub + dele + ins) / len(record["reference"])
        lines[0] += f", PER {rate:.3f} (sub {sub} del {dele} ins {ins} of {len(record['reference'])})"
        lines.append(f"  reference  {spell(record['reference'])}")
    return "\n".join([*lines, f"  decoded    {spell(record['phonemes']) or '(nothing)'}"])


def _print_labelled(records: list[dict]) -> None:
    """The error rate of those trials that came with their phonemes."""
    labelled = [record for record in records if record.get("errors")]
    if labelled:
        rate = error_rate(np.array([[*record["errors"], len(record["reference"])] for record in labelled]))
        print(f"PER of {len(labelled)} labelled trials {rate:.4f}")
    if any(
        record["id"].startswith("train/") or Path(record["path"]).parent.name == "train"
        for record in labelled
    ):
        print("some are of part train, on which the model may have been trained: no result")


def _readable(record: dict) -> dict:
    """A record as files hold it: ratings by label, phonemes spelt, errors by kind."""
    if "ratings" in record:
        return record | {"ratings": dict(zip(LABELS, record["ratings"].tolist(), strict=True))}
    shown = record | {"phonemes": spell(record["phonemes"])}
    if record["reference"] is not None:
        shown["reference"] = spell(record["reference"])
        shown["errors"] = dict(zip(EDITS, record["errors"], strict=True))
    return shown


def predictions_json(
    records: list[dict], refused: list[str], loaded: list[tuple], args: argparse.Namespace
) -> str:
    """Predictions, refusals and circumstances: what --json writes."""
    used = []
    for path, _, ckpt in loaded:
        about = {"path": str(path), "fold": ckpt["data"].get("fold"), "seed": ckpt["args"].get("seed")}
        used.append(about | {key: ckpt[key] for key in ("task", "step", "git_sha")})
    saved = {
        "command": args.command,
        **git_state(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "trained_on_synthetic": loaded[0][2]["data"]["synthetic"],
        "checkpoints": used,
    }
    if "ratings" in records[0]:
        known = _training_ratings([(model, ckpt) for _, model, ckpt in loaded])
        saved |= {"poles": {label: list(poles) for label, poles in LABEL_POLES.items()}, "training": None}
        if known:
            pairs = zip(LABELS, *np.stack(known).tolist(), strict=True)
            saved["training"] = {label: {"mean": mean, "sd": spread} for label, mean, spread in pairs}
    saved |= {"predictions": list(map(_readable, records)), "refused": refused}
    return json.dumps(json_ready(saved), indent=1, allow_nan=False) + "\n"


def predictions_csv(records: list[dict]) -> str:
    """A line a prediction, ratings with six decimals: what --csv writes."""
    rows = []
    for record in map(_readable, records):
        if "ratings" in record:
            figures = {label: f"{value:.6f}" for label, value in record.pop("ratings").items()}
        else:
            figures = record.pop("errors") or dict.fromkeys(EDITS)
        rows.append(record | figures)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ------------------------------------------------------------------------------------------------------------
# Explanation
# ------------------------------------------------------------------------------------------------------------

# Rows of the decoder's picture: what is confused stands together.
ARTICULATION = """IY IH EY EH AE AA AO OW UH UW AH ER AY AW OY  P B T D K G CH JH
F V TH DH S Z SH ZH HH  M N NG L R W Y  SIL"""
SEEN = 0.05  # phonemes that never reach this probability are left out
SMOOTH = 0.7, 0.5  # SD of the tempo curve's smoothing: beats, seconds; the longer one counts
MOST_BEATS = 150  # that are drawn with lines of their own


def explain(kind: str, out: str | Path, members: list[tuple], work: dict) -> dict:
    """Draws what one prediction rests on, 1600 pixels wide; returns the figures in the picture.

    kind: han, ast or decoder; members: [(model, its checkpoint), ...], averaged; work: what `predict` knows
    of the file. DataError, before anything is written, where nothing can be drawn."""
    out = Path(out)
    check_picture(out)
    return {"han": explain_han, "ast": explain_ast, "decoder": explain_decoder}[kind](out, members, work)


def context_attention(attention: ContextAttention, x: Tensor, group: Tensor, groups: int) -> Tensor:
    """The weights (M, H) within `attention(x, group, groups)`: they sum to 1 in each group."""
    hidden = torch.tanh(attention.linear(x)).view(len(x), *attention.context_vector.shape)
    return group_softmax((hidden * attention.context_vector).sum(2).float(), group, groups)


@torch.no_grad()
def attention_weights(model: HAN, batch: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """By the name of each ContextAttention of a HAN: weights (M, H), group of each member (M,)."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, ContextAttention):

            def follow(module: ContextAttention, inputs: tuple, name: str = name) -> None:
                found[name] = context_attention(module, *inputs), inputs[1]

            hooks.append(module.register_forward_pre_hook(follow))
    try:
        model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def han_attention(members: list[tuple], item: dict) -> dict[str, np.ndarray]:
    """What HANs weigh in one un-normalised item, in units of an even share, averaged over heads and members.

    "note in beat", "note" (rows; NaN where no member reads a row), "beat in measure", "beat", "measure".
    note, beat and measure are weights in the whole piece, summed from what the last attention pools."""
    of_beat, of_measure = (np.unique(item[key], return_inverse=True)[1] for key in ("beat", "measure"))
    measure_of_beat = of_measure[np.unique(of_beat, return_index=True)[1]]
    corpus = Corpus("", False, {item["name"]: item}, [item["name"]], column_names(FEATURES), [], {})
    levels: dict[str, list] = {}
    for model, kept in members:
        batch = collate_han(prepare_han(corpus, [item["name"]], kept["data"]))
        batch = to_device(batch, next(model.parameters()).device)
        pooled = model.level if model.level in ("beat", "measure") else "note"
        names = {
            "beat_attention": "note in beat",
            "measure_attention": "beat in measure",
            "attention": pooled,
        }
        own = {}
        for name, (weights, group) in attention_weights(model.eval(), batch).items():
            own[names[name]] = (weights.double().mean(1) * torch.bincount(group)[group]).cpu().numpy()
        read = item["voice"] > 0 if kept["data"]["features"] == "score" else np.full(len(of_beat), True)
        if pooled == "note":
            own["beat"] = _group_mean(own["note"], of_beat[read])
            own["measure"] = _group_mean(own["note"], of_measure[read])
        elif pooled == "beat":
            own["measure"] = _group_mean(own["beat"], measure_of_beat)
        for level, values in own.items():
            if level.startswith("note"):
                rows = np.full(len(read), np.nan)
                rows[read] = values
                values = rows
            levels.setdefault(level, []).append(values)
    return {level: np.ma.masked_invalid(each).mean(0).filled(np.nan) for level, each in levels.items()}


def _group_mean(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    return np.bincount(group, values) / np.bincount(group)


def time_map(score, performance, match: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quarters, seconds and beat of every chord that was matched, in order of time, graces apart."""
    rows = np.flatnonzero((note_features(score, performance, match)["matched"] > 0) & ~score.grace)
    if not len(rows):
        raise DataError(f"{performance.path}: no note of {score.path} in it; give a take of it")
    quarter, first, chord = np.unique(score.onset[rows], return_index=True, return_inverse=True)
    second = _group_mean(performance.onset[match[rows]], chord)
    later = np.append(True, second[1:] > np.maximum.accumulate(second)[:-1])
    return quarter[later], second[later], score.beat[rows[first]][later]


def seconds_at(quarter: np.ndarray, second: np.ndarray, at: np.ndarray, qpm: float) -> np.ndarray:
    """Seconds of positions (quarters) by a time map, prolonged at its mean tempo; of one chord, at `qpm`."""
    pace = (second[-1] - second[0]) / (quarter[-1] - quarter[0]) if len(quarter) > 1 else 60 / qpm
    inside = np.clip(at, quarter[0], quarter[-1])
    return np.interp(inside, quarter, second) + pace * (at - inside)


def tempo_curve(
    quarter: np.ndarray, second: np.ndarray, beat: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(k + 1,) seconds at which matched beats begin, (k,) quarters per minute between them, and smoothed.

    Smoothed: quarters over minutes, both by a Gaussian of SMOOTH."""
    from scipy.ndimage import gaussian_filter1d

    first = np.unique(beat, return_index=True)[1]
    begin, quarters = second[first], np.diff(quarter[first])
    minutes = np.diff(begin) / 60
    if not len(minutes):
        return begin, minutes, minutes
    width = max(SMOOTH[0], SMOOTH[1] / 60 / np.median(minutes))
    smooth = [gaussian_filter1d(steps, width, mode="nearest") for steps in (quarters, minutes)]
    return begin, quarters / minutes, smooth[0] / smooth[1]


def played_rows(score, item: dict, seconds: Callable) -> tuple[np.ndarray, np.ndarray]:
    """(rows, 4) pitch, velocity, onset, offset (s), which sounded; others stand where expected."""
    names, written = column_names(FEATURES), item["voice"] > 0
    columns = [names.index(f"raw_{key}") for key in ("pitch", "velocity", "onset", "offset")]
    notes, sounded = item["x"][:, columns].astype(float), item["matched"] | ~written
    begin, end = seconds(score.onset), seconds(score.onset + score.duration)
    expected = np.stack([score.pitch, np.zeros(len(begin)), begin, end], 1)
    notes[~sounded] = expected[~sounded[written]]
    return notes, sounded


def beat_dynamics(notes: np.ndarray, sounded: np.ndarray, of_beat: np.ndarray) -> np.ndarray:
    """(beats, 2) mean and deviation of the velocities played in each beat, NaN where none was."""
    dynamics = np.full((of_beat.max() + 1, 2), np.nan)
    for beat in np.unique(of_beat[sounded]):
        velocity = notes[sounded & (of_beat == beat), 1]
        dynamics[beat] = velocity.mean(), velocity.std()
    return dynamics


def _beginnings(score, key: str, end: float, seconds: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Seconds at which the beats or measures that hold notes begin, and the end; and their numbers from 0."""
    grid = getattr(score, f"{key}s")
    first = score.onset[np.unique(getattr(score, key), return_index=True)[1]]
    numbers = (np.searchsorted(grid, first + 1e-6, side="right") - 1).clip(0)
    return np.append(seconds(grid[numbers]), end), numbers


def explain_han(out: Path, members: list[tuple], work: dict) -> dict:
    """What HANs weigh in a performance, its tempo, dynamics; work: name, score, performance, match, item.

    Returns levels (`han_attention`), notes and sounded (`played_rows`), beats and measures (seconds at which they
    begin, and the end), bars (their numbers), begin, qpm, smooth (`tempo_curve`), dynamics."""
    score, item = work["score"], work["item"] | {"name": work["name"]}
    quarter, second, beat = time_map(score, work["performance"], work["match"])
    seconds = functools.partial(seconds_at, quarter, second, qpm=score.tempo_qpm)
    levels = han_attention(members, item)
    if not np.isfinite(levels["measure"]).all():
        raise DataError(f"{work['name']}: attention is not finite; expected numbers")
    notes, sounded = played_rows(score, item, seconds)
    end = max(seconds((score.onset + score.duration).max()), notes[sounded, 2].max())
    drawn = {"levels": levels, "notes": notes, "sounded": sounded}
    drawn["beats"], _ = _beginnings(score, "beat", end, seconds)
    drawn["measures"], bars = _beginnings(score, "measure", end, seconds)
    drawn["bars"] = bars + 1
    drawn["begin"], drawn["qpm"], drawn["smooth"] = tempo_curve(quarter, second, beat)
    drawn["dynamics"] = beat_dynamics(notes, sounded, np.unique(item["beat"], return_inverse=True)[1])
    found = np.mean(work["match"] >= 0)
    drawn["title"] = f"{plain(work['name'])}: attention of HAN ({len(members)} checkpoints), tempo, dynamics"
    drawn["title"] += f"; {found:.0%} of the written notes found"
    low, high = np.nanpercentile(np.concatenate([*levels.values()]), [2.5, 97.5]) - 1
    drawn["remark"] = f"95 % of the weights differ from an even share by {_percent(low)} to {_percent(high)}."
    if any(model.model_args["stats_size"] for model, _ in members):
        drawn["remark"] += " The ratings also rest on statistics of the whole piece (--pooled)."
    draw_han(out, drawn)
    return drawn


def draw_han(out: Path, drawn: dict) -> None:
    """Piano roll, weights of measures and beats, tempo and dynamics over one axis of seconds."""
    with new_figure(16, 12) as figure:
        roll, weights, tempo, dynamics = panels = figure.subplots(4, sharex=True, height_ratios=[5, 4, 3, 3])
        width = 2.5 if len(drawn["beats"]) <= MOST_BEATS else 0.8  # of lines: a long piece asks for thin ones
        bars = _draw_roll(roll, drawn)
        figure.colorbar(bars, ax=roll, extend="both", format=_percent, pad=0.01, label="weight against even")
        _draw_levels(weights, drawn, width)
        _draw_tempo(tempo, drawn, width)
        _draw_dynamics(dynamics, drawn, width)
        every = math.ceil(len(drawn["bars"]) / 20)  # measures from number to number
        for axes in panels:
            lines = {"transform": axes.get_xaxis_transform(), "zorder": 0}
            if len(drawn["beats"]) <= MOST_BEATS:
                axes.vlines(drawn["beats"], 0, 1, color="0.93", linewidth=0.8, **lines)
            axes.vlines(drawn["measures"][::every], 0, 1, color="0.7", linewidth=1.2, **lines)
            axes.tick_params(labelbottom=True)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=3)
        first, last = (
            min(drawn["measures"][0], drawn["notes"][:, 2].min()),
            max(drawn["beats"][-1], drawn["notes"][:, 3].max()),
        )
        roll.set_xlim(first - 0.1, last + 0.1)
        numbers = roll.secondary_xaxis("top")
        numbers.set_xticks(drawn["measures"][:-1:every], drawn["bars"][::every])
        roll.text(-0.01, 1.03, "measure", transform=roll.transAxes, ha="right")
        figure.suptitle(drawn["title"], fontsize=16)
        figure.supxlabel(drawn["remark"], fontsize=12)
        save_figure(figure, out)


def _percent(share: float, _=None) -> str:
    return "even" if abs(share) < 1e-9 else f"{100 * share:+.3g} %"


def _draw_roll(axes, drawn: dict):
    """Notes as bars in the colour of their weight, those not found dashed. Returns the bars."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import CenteredNorm

    within = "note in beat" if "note in beat" in drawn["levels"] else "note"
    notes, sounded, weight = drawn["notes"], drawn["sounded"], drawn["levels"][within] - 1
    pitch, _, begin, end = notes.T
    corners = [(begin, pitch - 0.5), (begin, pitch + 0.5), (end, pitch + 0.5), (end, pitch - 0.5)]
    shapes = np.array(corners).transpose(2, 0, 1)  # (rows, 4, 2)
    scale = CenteredNorm(0, max(0.01, np.nanpercentile(np.abs(weight), 99)))
    shades = np.ma.masked_invalid(weight[sounded])
    bars = PolyCollection(
        shapes[sounded], array=shades, cmap="coolwarm", norm=scale, edgecolors="0.3", linewidths=0.3
    )
    axes.add_collection(bars)
    axes.add_collection(
        PolyCollection(shapes[~sounded], facecolors="none", edgecolors="0.3", linestyles="dashed")
    )
    octaves = np.arange(12, 121, 12)
    axes.set_yticks(octaves, [f"C{octave // 12 - 1}" for octave in octaves])
    of = "the piece" if within == "note" else "each beat"
    title = f"Which notes of {of} the attention prefers (dashed: written, but not found)"
    axes.set(ylim=(pitch.min() - 2, pitch.max() + 2), ylabel="pitch", title=title)
    axes.grid(axis="y", alpha=0.4)
    return bars


def _draw_levels(axes, drawn: dict, width: float) -> None:
    levels = drawn["levels"]
    axes.stairs(
        levels["measure"] - 1,
        drawn["measures"],
        baseline=0,
        fill=True,
        color="0.8",
        label="measures in the piece",
    )
    for level, label, colour in (
        ("beat", "beats in the piece", BLUE),
        ("beat in measure", "beats in their measure", ORANGE),
    ):
        if level in levels:
            axes.stairs(
                levels[level] - 1, drawn["beats"], baseline=None, color=colour, linewidth=width, label=label
            )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.yaxis.set_major_formatter(_percent)
    axes.set(title="Which measures and beats the attention prefers", ylabel="weight against\nan even share")
    reach = max(0.005, 1.1 * max(abs(limit) for limit in axes.get_ylim()))  # rounding errors are no curve
    axes.set_ylim(-reach, reach)


def _draw_tempo(axes, drawn: dict, width: float) -> None:
    begin, qpm = drawn["begin"], drawn["qpm"]
    axes.set(title="Tempo", ylabel="quarters per minute")
    if not len(qpm):
        axes.set_title("Tempo: no two beats were found")
        return
    axes.stairs(qpm, begin, baseline=None, color="0.6", linewidth=0.6 * width, label="from beat to beat")
    axes.plot(
        (begin[1:] + begin[:-1]) / 2,
        drawn["smooth"],
        "o-",
        linewidth=width,
        markersize=1.6 * width,
        label="smoothed",
    )
    axes.set_ylim(0.95 * qpm.min(), 1.05 * qpm.max())


def _draw_dynamics(axes, drawn: dict, width: float) -> None:
    mean, spread = drawn["dynamics"].T
    _, velocity, onset, _ = drawn["notes"][drawn["sounded"]].T
    axes.scatter(onset, velocity, s=2 * width**2, color="0.55", label="played notes")
    band = {"baseline": mean - spread, "fill": True, "alpha": 0.3}
    axes.stairs(mean + spread, drawn["beats"], color=BLUE, label="mean ± deviation in a beat", **band)
    axes.stairs(mean, drawn["beats"], baseline=None, color=BLUE, linewidth=width)
    axes.set(title="Dynamics", ylabel="MIDI velocity", xlabel="time in the performance (s)")


def emissions(log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes that `ctc_greedy` decodes from (F, 41), and the most probable frame of each one's run."""
    ids, frames = [], []
    for phoneme, run in itertools.groupby(range(len(log_probs)), log_probs.argmax(1).__getitem__):
        if phoneme:
            ids.append(phoneme)
            frames.append(max(run, key=lambda frame: log_probs[frame, ids[-1]]))
    return np.array(ids, int), np.array(frames, int)


def place_labels(labels: list, decoded: np.ndarray, times: np.ndarray, low: float, high: float) -> tuple:
    """Seconds (n,) of n true labels: of the decoded ones that a minimal edit script pairs them with, others
    evenly between, within low..high; and which labels (n,) and decoded classes (m,) are right."""
    known = {-1: low, len(labels): high}
    right, found = np.zeros(len(labels), bool), np.zeros(len(decoded), bool)
    for tag, a, b, c, d in Levenshtein.opcodes(list(labels), list(decoded)):
        if tag in ("equal", "replace"):
            known.update(zip(range(a, b), times[c:d], strict=True))
            right[a:b] = found[c:d] = tag == "equal"
    order = sorted(known)
    return np.interp(np.arange(len(labels)), order, [known[k] for k in order]), right, found


def explain_decoder(out: Path, members: list[tuple], work: dict) -> dict:
    """Probability of the phonemes over time, the decoded string above and the true one below.

    work: name, log_probs (F, 41), labels or None, "seconds per frame" (at a window's middle)."""
    log_probs, labels, step = work["log_probs"], work["labels"], work["seconds per frame"]
    if not len(log_probs) or np.isnan(log_probs).any():
        raise DataError(f"{work['name']}: no frames, or NaN; expected numbers; is the trial too short?")
    model = members[0][0]
    start = step * (model.kernel / model.stride - 1) / 2
    end = start + step * len(log_probs)
    ids, frames = emissions(log_probs)
    times = start + step * (frames + 0.5)
    label_times, right, found = place_labels(ids if labels is None else labels, ids, times, start, end)
    probs = np.exp(log_probs)
    rows = [k for k in map(PHONEMES.index, ARTICULATION.split()) if probs[:, k].max() >= SEEN or k in ids] + [
        0
    ]
    with new_figure(16, 9) as figure:
        axes = figure.subplots()
        extent = (start, end, len(rows) - 0.5, -0.5)
        image = axes.imshow(
            probs[:, rows].T, vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent
        )
        figure.colorbar(image, ax=axes, pad=0.01, label="probability")
        axes.set_yticks(range(len(rows)), [PHONEMES[k] or "blank" for k in rows])
        colours = np.where(found, "white", ORANGE)
        axes.scatter(times, [rows.index(k) for k in ids], s=60, facecolors="none", edgecolors=colours)
        _write_phonemes(axes, ids, times, found, 1.01)
        if labels is not None:
            _write_phonemes(axes, labels, label_times, right, -0.11)
        figure.supxlabel("time (s), middle of each frame's window; above: decoded, below: true", fontsize=12)
        figure.suptitle(f"{plain(work['name'])}: probability of each phoneme ({len(members)} checkpoints)")
        save_figure(figure, out)
    return {"ids": ids, "times": times, "label_times": label_times, "right": right, "found": found}


def _write_phonemes(axes, ids: Iterable, times: np.ndarray, right: np.ndarray, height: float) -> None:
    """Names beside the heat map in three rows, which keep neighbours apart; wrong ones in colour."""
    for i, (k, at) in enumerate(zip(ids, times, strict=True)):
        place = {"transform": axes.get_xaxis_transform(), "ha": "center"}
        axes.text(at, height + 0.025 * (i % 3), PHONEMES[k], color="black" if right[i] else ORANGE, **place)


# ------------------------------------------------------------------------------------------------------------
# Report
# ------------------------------------------------------------------------------------------------------------
REPORTED = {
    "han": "HAN: 19 ratings from score and MIDI",
    "ast": "AST: 19 ratings from audio",
    "cnn": "CNN: 19 ratings from audio",
    "mlp": "MLP on pooled spectra: 19 ratings",
    "pretraining": "AST pre-training: masked patches",
    "decoder": "Phoneme decoder: neural activity to phonemes",
}
CHOSEN = {
    "valid": "The weights were chosen on this validation part: its figures are slightly optimistic.",
    "test": "Test part: for a final figure; choose between models on the validation part.",
}
SYNTHETIC = "SYNTHETIC data: figures show that the code works, and nothing about real performances or speech."
STYLE = """
body { margin: auto; max-width: 76rem; padding: 1rem; font: 1rem/1.5 sans-serif; overflow-wrap: anywhere; }
h2 { margin-top: 3rem; border-top: 3px solid #0072b2; } img { max-width: 100%; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; } td, th { padding: .2rem .6rem; text-align: left; }
tr { border-bottom: 1px solid #d5dae1; } .verdict { font-weight: 600; }
.warn { background: #fff1e6; color: #9a3412; border-left: 4px solid; padding: .5rem .8rem; }
"""


def report(argv: list[str]) -> dict:
    """`python eval.py report`: an HTML page about runs; returns {"verdicts", "figures"} by configuration.

    Runs that differ in fold, seed and machine only are one configuration and are evaluated together."""
    parser = _parser(
        "report",
        "--run DIR ... --out FILE.html [--data DIR] [options]",
        """\
One HTML page about training runs: curves, scores, calibration, worst items, confusions, configuration.
Folds and seeds of one configuration are evaluated together, on their own parts.

    python eval.py report --run runs/han/full_f? --data data/percepiano --out report.html
    python eval.py report --run runs/decoder/NAME --no-data --out report.html""",
    )
    add = parser.add_argument
    add("--run", nargs="+", required=True, metavar="DIR", help="run folders of any task (required)")
    add("--out", required=True, metavar="FILE", help="page to write, .html (required)")
    add("--part", choices=["valid", "test"], default="valid", help="part to score (%(default)s)")
    add("--audio", metavar="DIR", help="folder of recordings NAME.wav (off: the run's own, else rendered)")
    add("--day", choices=["nearest", "mean"], help="decoder: day layer of unknown sessions (off: refused)")
    add("--no-data", action="store_true", help="score nothing: curves and configuration only (off)")
    args = _parse(parser, argv, data_options)
    out = Path(args.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise DataError(f"--out {out}: no page; expected .html; name it so")
    check_output(out)
    groups: dict[str, list[dict]] = {}
    for name, path in _run_names(args.run).items():
        run = read_run(path) | {"name": name}
        groups.setdefault(_configuration(run), []).append(run)
    kinds = {group[0]["kind"] == "decoder" for group in groups.values() if group[0]["kind"] != "pretraining"}
    if args.data and len(kinds) > 1:
        raise DataError(f"--data {args.data}: one data set for ratings and speech; write a report for each")
    sections = [_section(group, args) for group in groups.values()]
    page = _page(sections, args)
    write_atomic(out, lambda file: file.write(page.encode("utf-8", "replace")))
    verdicts = [section["verdict"] for section in sections]
    print(*verdicts, f"saved {out}, {len(page) / 2**20:.2f} MiB", sep="\n")
    return {"verdicts": verdicts, "figures": [section["figures"] for section in sections]}


def read_run(path: str) -> dict:
    """A run folder: kind (of REPORTED), title, args, records, loaded (path, model, ckpt) or None, notes."""
    folder = Path(path)
    try:
        options = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        if "kernel" in options:
            kind = "decoder"
        elif "pooled" in options:
            kind = "han"
        else:
            kind = "pretraining" if options["task"] == "pretrain" else options["model"]
        run = {
            "path": path,
            "kind": kind,
            "title": REPORTED[kind],
            "args": options,
            "records": [],
            "loaded": None,
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no options ({error!r}); give a run's folder") from error
    run["notes"] = []
    if options.get("model") in ("bilstm", "bilstm_sa"):
        run["title"] = run["title"].replace("HAN", options["model"])
    for part, read in (
        ("records", read_metrics),
        ("loaded", lambda path: _load_models([f"{path}/best.pt"])[0]),
    ):
        try:
            run[part] = read(path)
        except DataError as error:
            run["notes"].append(str(error))
    return run


def _configuration(run: dict) -> str:
    """What runs evaluated together have in common: all options but fold, seed and those of one machine."""
    apart = ("fold", "seed", "git_sha", "git_dirty", "log_every", "save_every", "workers", "debug")
    own = {key: value for key, value in _own_options(run).items() if key not in apart}
    return json.dumps([run["kind"], bool(run["args"].get("data")), own], sort_keys=True)


def _section(group: list[dict], args: argparse.Namespace) -> dict:
    """One configuration: title, verdict, synthetic, figures (None where nothing was scored), html."""
    kind, loaded = group[0]["kind"], [run["loaded"] for run in group if run["loaded"]]
    known = {run["name"]: best_validation(run["records"]) for run in group}
    logged = [f"{name} {key} {value:.3f} at step {step}" for name, (key, value, step) in known.items() if key]
    scored = {
        "sentence": f"best validation as logged in training: {', '.join(logged) or 'none'}",
        "synthetic": loaded[0][2]["data"].get("synthetic") if loaded else not group[0]["args"].get("data"),
        "figures": None,
        "parts": {},
    }
    if loaded and kind != "pretraining" and not args.no_data:
        score = decoder_section if kind == "decoder" else rating_section
        scored = score(loaded, _evaluation_options(group, loaded, args))
    title = f"{group[0]['title']} (SYNTHETIC)" if scored["synthetic"] else group[0]["title"]
    verdict = f"{title}: {scored['sentence']}."
    with new_figure(16, 13) as figure:
        draw_curves(figure, {run["name"]: run["records"] for run in group})
        parts = {"Training curves": inline_figure(figure, "Training curves")} | scored["parts"]
    parts["Skipped updates"] = _table(["run", "step", "kind", "items"], _skips(group))
    options = dict.fromkeys(key for run in group for key in run["args"])
    rows = [[key, *(run["args"].get(key, "–") for run in group)] for key in options]
    parts["Configuration"] = _table(["option", *known], rows)
    notes = "".join(f'<p class="warn">{_text(note)}</p>' for run in group for note in run["notes"])
    html = "".join(f"<h3>{heading}</h3>{part}" for heading, part in parts.items())
    html = f'<section><h2>{_text(title)}</h2><p class="verdict">{_text(verdict)}</p>{notes}{html}</section>'
    return scored | {"verdict": verdict, "html": html}


def _evaluation_options(
    group: list[dict], loaded: list[tuple], args: argparse.Namespace
) -> argparse.Namespace:
    """The options with which `evaluate` would score these checkpoints."""
    own = group[0]["args"]
    data = args.data or own.get("data")
    if data and not Path(data).exists():
        raise DataError(f"{group[0]['path']}: {data} is not here; give --data DIR, or --no-data")
    paths = [path for path, _, _ in loaded]
    batch = 64 if group[0]["kind"] == "decoder" else None
    more = {
        "data": data,
        "audio": args.audio or own.get("audio"),
        "ckpt": paths,
        "crops": None,
        "batch": batch,
    }
    return argparse.Namespace(**(vars(args) | more))


def _skips(group: list[dict]) -> list[list]:
    """Run, step, kind and items of the first 30 skipped updates."""
    rows = []
    for run in group:
        for record in run["records"]:
            if "skip" in record:
                rows.append(
                    [run["name"], record["step"], record["skip"], ", ".join(record.get("names", [])[:8])]
                )
    return rows[:30]


def rating_section(loaded: list[tuple], args: argparse.Namespace) -> dict:
    """Runs that rate: each on its own fold's part, seeds averaged; measured as `evaluate` does."""
    folds, data = _load_fold_models(loaded)
    corpus = _corpus_of(data, args)
    records = fold_records(folds, corpus, args, (args.part,))
    truth = {name: item["y"] for name, item in corpus.items.items() if item.get("y") is not None}
    views = measure(records, truth)[args.part]
    section = {"figures": views, "synthetic": corpus.synthetic or data["synthetic"], "parts": {}}
    if views["all"] is None:
        return section | {"sentence": f"no item of part {args.part} has ratings here: nothing to score"}
    mean = views["all"]["mean"]
    shown = ", ".join(f"{metric} {mean[metric]:.3f}" for metric in METRICS)
    low, high = mean["r2_interval"]
    section["sentence"] = f"{shown}; 95 % interval of r2 [{low:.3f}, {high:.3f}]; "
    section["sentence"] += f"part {args.part} of split {data['split']}, folds {[*folds]}"
    totals = []
    for view, figures in views.items():
        for fold, s in (figures["folds"] | {"mean": figures["mean"]}).items() if figures else ():
            totals.append([f"{fold}, {VIEWS[view]}", *(s[metric] for metric in METRICS)])
    columns = {metric: mean["per_dimension"][metric] for metric in METRICS}
    tests = significance(records, truth)[args.part]["all"] or {}
    for metric in METRICS:
        if f"{metric}_interval" in tests:
            columns[f"{metric}, 95 %"] = [
                f"[{low:.3f}, {high:.3f}]" for low, high in tests[f"{metric}_interval"]
            ]
    names, y, p, fold_of = _stacked(records, truth, args.part, "all")
    error = (p - y) ** 2
    worst = []
    for i in np.argsort(-error.mean(1), kind="stable")[:10]:
        d = error[i].argmax()
        worst.append([names[i], fold_of[i], error[i].mean(), LABELS[d], p[i, d], y[i, d]])
    section["parts"] = {
        "Results": f"<p>{CHOSEN[args.part]}</p>" + _table(["fold, view", *METRICS], totals),
        "By dimension": _table(["dimension", *columns], zip(LABELS, *columns.values(), strict=True)),
        "Prediction, rating, calibration": draw_ratings(y, p),
        "Worst items": _table(["item", "fold", "mse", "errs most in", "predicted", "rated"], worst),
    }
    return section


def draw_ratings(y: np.ndarray, p: np.ndarray, bins: int = 12) -> str:
    """Prediction over rating by dimension; in the last panel the mean rating by bins of all predictions."""
    low, high = min(y.min(), p.min()) - 0.03, max(y.max(), p.max()) + 0.03
    edges = np.linspace(p.min(), p.max(), bins + 1)[1:-1]
    bin_of = np.digitize(p, edges)
    filled = np.unique(bin_of)
    with new_figure(16, 14) as figure:
        *panels, last = figure.subplots(4, 5, sharex=True, sharey=True).flat
        for d, axes in enumerate(panels):
            axes.plot(y[:, d], p[:, d], ".", alpha=0.5)
            axes.set_title(LABELS[d].replace("_", " "), fontsize=8)
        predicted, rated = ([x[bin_of == b].mean() for b in filled] for x in (p, y))
        last.plot(rated, predicted, "o-", color=ORANGE)
        last.set_title("all: mean rating by bins of the prediction", fontsize=8)
        for axes in (*panels, last):
            axes.plot([low, high], [low, high], "--", color="0.5", linewidth=1)
            axes.set(xlim=(low, high), ylim=(low, high))
        figure.supxlabel("rating")
        figure.supylabel("prediction")
        return inline_figure(figure, "Prediction over rating by dimension, and calibration")


def decoder_section(loaded: list[tuple], args: argparse.Namespace) -> dict:
    """Decoders of one configuration, probabilities averaged: error rates by day, confusions, transcripts."""
    corpus, data = _speech_corpus(args, loaded), loaded[0][2]["data"]
    trials = speech_parts(corpus, data["valid"])[args.part]
    trials = trials[corpus.labelled[trials]]
    if not len(trials):
        raise DataError(f"--part {args.part}: no labelled trial in {corpus.root}; give another, or --no-data")
    records = transcripts(mean_logits(loaded, corpus, trials, args), corpus, trials)
    refs, hyps = ([record[side] for record in records] for side in ("reference", "hypothesis"))
    low, high = trial_bootstrap(per_counts(refs, hyps))
    figures = decoder_scores(refs, hyps, corpus.day[trials], corpus.days) | {"interval": [low, high]}
    rate = f"phoneme error rate {figures['per']:.3f} [{low:.3f}, {high:.3f}]"
    caution = CHOSEN[args.part]
    if data["valid"] == "test":
        caution = "The checkpoint was chosen on the test part (--valid test): its score there is no result."
    keys = ("per", "trials", "labels", *EDITS)
    days = [[day, *(f[key] for key in keys)] for day, f in (figures["by_day"] | {"all": figures}).items()]
    order = sorted(records, key=lambda r: error_rate(per_counts([r["reference"]], [r["hypothesis"]])))
    samples = []
    for what, record in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        samples.append([what, record["trial"], spell(record["reference"]), spell(record["hypothesis"])])
    return {
        "sentence": f"{rate} of {len(trials)} trials, part {args.part}",
        "figures": figures,
        "synthetic": corpus.synthetic or data["synthetic"],
        "parts": {
            "Error rate by day": f"<p>{caution}</p>" + _table(["day", *keys], days),
            "Confusions": draw_confusions(refs, hyps),
            "Transcripts": _table(["", "trial", "reference", "decoded"], samples),
        },
    }


def draw_confusions(refs: list, hyps: list) -> str:
    """Heat map of what reference phonemes became; ∅: deleted (column) or inserted (row)."""
    times = np.zeros((len(PHONEMES), len(PHONEMES)))
    for ref, hyp in zip(refs, hyps, strict=True):
        for tag, i, j in Levenshtein.editops(ref, hyp).as_list():
            times[0 if tag == "insert" else ref[i], 0 if tag == "delete" else hyp[j]] += 1
    with new_figure(12, 11) as figure:
        axes = figure.subplots()
        image = axes.imshow(times, cmap="Blues", norm="symlog")
        names = ["∅", *PHONEMES[1:]]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set(xlabel="decoded", ylabel="reference")
        figure.colorbar(image, ax=axes, label="times")
        return inline_figure(figure, "Confusions of phonemes")


def _text(value: object) -> str:
    """HTML of a value: numbers to four digits, NaN as a dash, the rest escaped."""
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else "–"
    return escape(str(value))


def _table(head: Iterable, rows: Iterable) -> str:
    lines = ["".join(f"<th>{_text(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{_text(value)}</td>" for value in row) for row in rows]
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _page(sections: list[dict], args: argparse.Namespace) -> str:
    """The whole document. Its policy forbids the browser to load anything."""
    loud = f'<p class="warn">{SYNTHETIC}</p>' if any(section["synthetic"] for section in sections) else ""
    made = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {git_state()['git_sha']}: {args.command}"
    body = "".join(section["html"] for section in sections)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Report</title><style>{STYLE}</style></head>
<body><h1>Report</h1><p>{_text(made)}</p>{loud}{body}</body></html>
"""


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------

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


def _parser(command: str, usage: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"eval.py {command}",
        usage=f"python eval.py {command} {usage}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", metavar="DIR", help="data set in its public layout (absent: the built-in synthetic corpus)")
    add("--cache", default="cache", metavar="DIR", help="folder of extracted features (%(default)s)")


def result_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--csv", metavar="FILE", help="write the predictions here (off)")
    add("--save-results", metavar="ROW", help="write TASK_ROW_<split>.json, .csv into --results-dir (off)")
    add("--results-dir", default="results", metavar="DIR", help="their folder (%(default)s)")


def _parse(parser: argparse.ArgumentParser, argv: list[str], *shared: Callable) -> argparse.Namespace:
    """The parsed options: the command's own, those that `shared` functions add, --device and --debug."""
    for add_options in shared:
        add_options(parser)
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="where to compute; auto: a GPU where there is one (%(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (off)")
    args = parser.parse_args(argv)
    row = getattr(args, "save_results", None)
    if row and not re.fullmatch(r"[a-z0-9_]+", row):
        raise DataError(f"--save-results {row!r}: expected a row name of a-z, 0-9 and _, such as full")
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise DataError("--device cuda: not available here; expected auto or cpu")
    args.device = torch.device("cuda" if has_gpu and args.device != "cpu" else "cpu")
    args.command = "python " + shlex.join([*parser.prog.split(), *argv])
    return args


def main(argv: list[str] | None = None) -> dict:
    """Runs one command and returns its figures."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else "no command given"
    if command in ("-h", "--help"):
        print(f"{__doc__}\nCommands: {', '.join(COMMANDS)}. `python eval.py COMMAND --help` explains each.")
        return {}
    if any(option.split("=")[0] == "--attention" for option in argv):
        return attention(argv)
    if command.startswith("-"):
        return evaluate(argv)
    if command not in COMMANDS:
        raise DataError(f"{command}: expected {', '.join(COMMANDS)}, or --ckpt FILE ... to evaluate")
    return COMMANDS[command](argv[1:])


if __name__ == "__main__":
    run_script("eval.py", main)
