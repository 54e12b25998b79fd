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
import gzip
import hashlib
import io
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
from dataclasses import replace
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

# -----------------------------------------------------------------------------------------------------------------
# Metrics
# -----------------------------------------------------------------------------------------------------------------


def r2(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Coefficient of determination per dimension, (D,), of truth y and prediction p, both (n, D); their mean is
    scikit-learn's `r2_score`. A constant truth gives 1 when met exactly, else 0; fewer than two items give NaN."""
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    if len(y) < 2:
        return np.full(y.shape[1], np.nan)
    residual = ((y - p) ** 2).sum(0)
    total = np.where(np.ptp(y, axis=0) == 0, 0.0, ((y - y.mean(0)) ** 2).sum(0))
    return np.where(total > 0, 1 - residual / np.where(total > 0, total, 1), residual == 0)


def mse(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Mean squared error per dimension, (D,), of (n, D) arrays."""
    return ((np.asarray(y, np.float64) - np.asarray(p, np.float64)) ** 2).mean(0)


def pearson(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Pearson correlation per dimension, (D,), of (n, D) arrays; 0 where either side is constant, which has told nothing."""
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    varies = (np.ptp(y, axis=0) > 0) & (np.ptp(p, axis=0) > 0)
    a, b = y - y.mean(0), p - p.mean(0)
    scale = np.where(varies, np.sqrt((a**2).sum(0)) * np.sqrt((b**2).sum(0)), 1)
    return np.where(varies, (a * b).sum(0) / scale, 0.0).clip(-1, 1)


METRICS = {"r2": r2, "mse": mse, "pearson": pearson}  # name -> function of (y, p) -> a figure per dimension


def validation_metrics(y: np.ndarray, p: np.ndarray) -> dict:
    """What a trainer logs of its validation ratings y and predictions p, (n, 19); spread: deviation of p over that of y."""
    metrics = {"valid_loss": float(mse(y, p).mean())}
    for name, metric in METRICS.items():
        metrics[f"valid_{name}"] = float(metric(y, p).mean())
        metrics[f"valid_{name}_per_dimension"] = metric(y, p).tolist()
    spread = float((p.std(0) / y.std(0)).mean())
    return metrics | {"prediction_mean": float(p.mean()), "prediction_std": float(p.std()), "spread": spread}


def mean_r2(y: np.ndarray, p: np.ndarray) -> float:
    """Uniform average of `r2` over the dimensions: the figure of HAN.md's tables."""
    return float(r2(y, p).mean())


def cluster_bootstrap(
    y: np.ndarray,
    p: np.ndarray,
    groups: Iterable[str],
    statistic: Callable = mean_r2,
    n: int = 1000,
    seed: int = 7,
    folds: np.ndarray | None = None,
) -> tuple[float, float]:
    """95 % interval of statistic(y, p) when whole groups (segments) are drawn with replacement.

    y, p (n, D); groups (n,). With folds (n,) the statistic is computed per fold and averaged, all folds on one draw of
    groups, since folds may share segments. Draws of a single distinct group or of a non-finite statistic tell nothing and
    are left out; (NaN, NaN) when fewer than half of the draws remain."""
    y, p = np.asarray(y), np.asarray(p)
    folds = np.zeros(len(y), int) if folds is None else np.asarray(folds)
    values = []
    for rows in _cluster_draws(groups, n, seed):
        in_fold = [rows[folds[rows] == fold] for fold in np.unique(folds)]
        values.append(np.mean([statistic(y[r], p[r]) if len(r) else np.nan for r in in_fold]))
    values = np.array(values)[np.isfinite(values)]
    if 2 * len(values) < n:
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _cluster_draws(groups: Iterable[str], n: int, seed: int) -> Iterable[np.ndarray]:
    """Row numbers of whole groups drawn with replacement, n times, less the draws of a single distinct group."""
    keys, inverse = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(inverse == k) for k in range(len(keys))]
    rng = np.random.default_rng(seed)
    for _ in range(n):
        drawn = rng.integers(len(keys), size=len(keys))
        if not (drawn == drawn[0]).all():
            yield np.concatenate([members[k] for k in drawn])


def scores(y: np.ndarray, p: np.ndarray, groups: list[str]) -> dict:
    """All metrics of one part and fold: counts, R² with its interval, MSE, Pearson, and the same per dimension."""
    per_dimension = {"r2": r2(y, p), "mse": mse(y, p), "pearson": pearson(y, p)}
    return {
        "items": len(y),
        "segments": len(set(groups)),
        **{key: float(v.mean()) for key, v in per_dimension.items()},
        "r2_interval": list(cluster_bootstrap(y, p, groups)),
        "per_dimension": {key: v.tolist() for key, v in per_dimension.items()},
    }


def is_rendering(name: str) -> bool:
    """True for a rendering of the score (player `Score` or `Score2`) instead of a human performance."""
    return str(player_of(name)).startswith("Score")


def measure(records: list[dict], truth: dict[str, np.ndarray]) -> dict:
    """Metrics of predictions: {part: {view: {"folds": {fold: scores}, "mean": ...} or None}}, view of VIEWS.

    records: dicts of part, fold, names and p (n, D). truth: name -> (D,); names without truth are left out, and a view
    without any is None. "mean" holds mean and (population) std over folds, and the interval of the mean."""
    result = {}
    for part in dict.fromkeys(record["part"] for record in records):
        result[part] = {}
        for view in VIEWS:
            folds, rows = {}, []
            for record in (r for r in records if r["part"] == part):
                chosen = [
                    i
                    for i, name in enumerate(record["names"])
                    if name in truth and not (view == "no_renderings" and is_rendering(name))
                ]
                if chosen:
                    names = [record["names"][i] for i in chosen]
                    row = (
                        np.stack([truth[name] for name in names]),
                        np.asarray(record["p"])[chosen],
                        [segment_of(name) for name in names],
                    )
                    folds[str(record["fold"])] = scores(*row)
                    rows.append(row)
            result[part][view] = {"folds": folds, "mean": _fold_mean(folds, rows)} if folds else None
    return result


def _fold_mean(folds: dict[str, dict], rows: list[tuple]) -> dict:
    """Mean and std over folds of each figure. With one fold the interval is that fold's own."""
    each = list(folds.values())
    mean: dict = {"folds": len(each)}
    for key in ("r2", "mse", "pearson"):
        values = [fold[key] for fold in each]
        mean[key], mean[f"{key}_std"] = float(np.mean(values)), float(np.std(values))
    if len(each) == 1:
        mean["r2_interval"] = each[0]["r2_interval"]
    else:
        index = np.repeat(np.arange(len(rows)), [len(y) for y, _, _ in rows])
        y, p = (np.concatenate([row[k] for row in rows]) for k in (0, 1))
        mean["r2_interval"] = list(cluster_bootstrap(y, p, [g for row in rows for g in row[2]], folds=index))
    mean["per_dimension"] = {
        key: np.mean([fold["per_dimension"][key] for fold in each], axis=0).tolist()
        for key in ("r2", "mse", "pearson")
    }
    return mean


# -----------------------------------------------------------------------------------------------------------------
# Results: predictions as CSV, metrics and circumstances as JSON, both printed
# -----------------------------------------------------------------------------------------------------------------


def write_predictions(path: Path, records: list[dict]) -> None:
    """CSV of columns name, part, fold and the 19 labels; one line per item, part and fold; four decimals."""
    lines = [",".join(["name", "part", "fold", *LABELS])]
    for record in records:
        order = sorted(range(len(record["names"])), key=lambda i: record["names"][i])
        lines += [
            ",".join(
                [
                    record["names"][i].strip(),
                    record["part"],
                    str(record["fold"]),
                    *(f"{value:.4f}" for value in record["p"][i]),
                ]
            )
            for i in order
        ]
    write_atomic(Path(path), lambda file: file.write(("\n".join(lines) + "\n").encode()))


def read_predictions(path: Path) -> list[dict]:
    """Reads what `write_predictions` wrote: a list of dicts of part, fold, names and p (n, 19). DataError otherwise."""
    groups: dict[tuple, list] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if header != ["name", "part", "fold", *LABELS]:
                raise ValueError(f"columns {','.join(header)[:60]!r}")
            for row in rows:
                if len(row) != len(header):
                    raise ValueError(f"line {rows.line_num} has {len(row)} fields")
                groups.setdefault((row[1], int(row[2])), []).append(
                    (row[0], [float(value) for value in row[3:]])
                )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: {error}; expected columns name,part,fold and the 19 labels, as --save-results writes"
        ) from error
    return [
        {
            "part": part,
            "fold": fold,
            "names": [name for name, _ in items],
            "p": np.array([p for _, p in items]),
        }
        for (part, fold), items in groups.items()
    ]


def check_results(path: Path, truth: dict[str, np.ndarray], tolerance: float = 2e-6) -> int:
    """Recomputes the metrics of a results JSON from the CSV beside it and truth (name -> (19,)), and returns how many
    figures were compared. DataError names the first that differs by more than tolerance, or has no counterpart."""
    path = Path(path)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: no results ({error!r}); expected a JSON written by --save-results"
        ) from error
    computed = json_ready(measure(read_predictions(path.with_suffix(".csv")), truth))
    saved, computed = dict(_leaves(saved)), dict(_leaves(computed))
    for key in sorted(saved.keys() | computed.keys()):
        a, b = saved.get(key), computed.get(key)
        if a != b and (None in (a, b) or abs(a - b) > tolerance):
            raise DataError(f"{path}: {key} is {a}; the CSV beside it and the labels give {b}")
    return len(saved)


def _leaves(tree: object, key: str = "") -> Iterable[tuple[str, object]]:
    if isinstance(tree, dict | list):
        for name, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(branch, f"{key}/{name}")
    else:
        yield key, tree


def hardware(device: torch.device) -> dict:
    """What the figures were computed on: CPU model and cores, GPU if used, threads, torch version."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _print_metrics(metrics: dict) -> None:
    def line(title: str, counts: str, s: dict, std: bool) -> None:
        low, high = s["r2_interval"]
        spread = f" ± {s['r2_std']:.3f}" if std else ""
        interval = (
            f"95 % [{low:.3f}, {high:.3f}]" if np.isfinite(low) else "(too few segments for an interval)"
        )
        print(
            f"{title:<44}{counts:>15}  R2 {s['r2']:.4f}{spread} {interval}  MSE {s['mse']:.5f}  Pearson {s['pearson']:.3f}"
        )

    for part, views in metrics.items():
        if views["all"] is None:
            print(f"{part}: no label in this part: predicted only, no metric")
            continue
        shown = {view: figures for view, figures in views.items() if figures is not None}
        for view, figures in shown.items():
            for fold, s in figures["folds"].items():
                line(f"{part} fold {fold}, {VIEWS[view]}", f"{s['items']} in {s['segments']} seg.", s, False)
        for view, figures in shown.items():
            if figures["mean"]["folds"] > 1:
                line(
                    f"{part} mean ± std, {VIEWS[view]}",
                    f"{figures['mean']['folds']} folds",
                    figures["mean"],
                    True,
                )
        print(f"{part + ' per dimension':<52}" + "   ".join(f"{VIEWS[view]:<30}" for view in shown).rstrip())
        for d, label in enumerate(LABELS):
            cells = [figures["mean"]["per_dimension"] for figures in shown.values()]
            print(
                f"  {label:<50}"
                + "   ".join(
                    f"R2 {c['r2'][d]:6.3f} MSE {c['mse'][d]:.4f} r {c['pearson'][d]:6.3f}" for c in cells
                )
            )


def _load_corpus(args: argparse.Namespace) -> Corpus:
    if not args.data:
        print(
            "no --data: evaluating on the built-in SYNTHETIC corpus; the real one: python data.py fetch percepiano, then --data DIR"
        )
    corpus = load_percepiano(args.data or synthetic_percepiano(args.cache), args.cache)
    for line in corpus.left_out:
        print(f"left out: {line}")
    return corpus


def _finish(
    records: list[dict],
    corpus: Corpus,
    args: argparse.Namespace,
    split: str,
    about: dict,
    default_csv: Path | None = None,
    task: str = "han",
) -> dict:
    """Measures, prints and writes predictions (to default_csv when some have no label); returns the metrics. Task ast is
    tested for significance too."""
    truth = {name: item["y"] for name, item in corpus.items.items() if item.get("y") is not None}
    if args.save_results:
        for record in records:  # rounded first, so that the JSON is exactly what the CSV gives
            record["p"] = np.array([[float(f"{value:.4f}") for value in row] for row in record["p"]])
    metrics = measure(records, truth)
    print(
        f"split {split}, "
        + (
            "SYNTHETIC corpus: figures say nothing about real performances"
            if corpus.synthetic
            else f"real data in {corpus.root}"
        )
    )
    _print_metrics(metrics)
    tests = {}
    if task == "ast":
        tests["significance"] = significance(records, truth)
        _print_significance(tests["significance"])
    unlabelled = sorted({name for record in records for name in record["names"] if name not in truth})
    path = args.csv or (default_csv if unlabelled and not args.save_results else None)
    if path:
        write_predictions(path, records)
        print(f"{len(unlabelled)} unlabelled items predicted; all predictions in {path}")
    if args.save_results:
        stem = Path(args.results_dir) / f"{task}_{args.save_results}_{split}"
        saved = {
            "task": task,
            "row": args.save_results,
            "split": split,
            "command": args.command,
            **git_state(),
            "hardware": hardware(args.device),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "synthetic": corpus.synthetic,
            **about,
            "labels": list(LABELS),
            "metrics": metrics,
            **tests,
        }
        write_predictions(stem.with_name(stem.name + ".csv"), records)
        text = json.dumps(json_ready(saved), indent=1, allow_nan=False)
        flat = re.sub(
            r"\[\s+([^][{}]*?)\s+]", lambda found: f"[{' '.join(found[1].split())}]", text
        )  # a list of figures is one line
        write_atomic(stem.with_name(stem.name + ".json"), lambda file: file.write((flat + "\n").encode()))
        print(f"saved {stem}.json and .csv ({len(unlabelled)} unlabelled items among the predictions)")
    return metrics


# -----------------------------------------------------------------------------------------------------------------
# Evaluation of checkpoints
# -----------------------------------------------------------------------------------------------------------------


def to_device(batch: dict, device: torch.device) -> dict:
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
    }


def predict_han(
    model: torch.nn.Module, items: list[dict], device: torch.device, batch: int = 16
) -> np.ndarray:
    """Ratings in [0, 1] of prepared items, (n, 19) float64 in the order given. Batches hold items of similar length."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]["x"]))
    p = np.zeros((len(items), len(LABELS)))
    model = model.to(device).eval()
    with torch.no_grad():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            logits = model(to_device(collate_han([items[i] for i in chosen]), device))
            p[chosen] = torch.sigmoid(logits.float()).double().cpu().numpy()
    return p


def _load_models(paths: list[str]) -> list[tuple]:
    """[(path, model, what of the checkpoint is needed), ...], all of one task."""
    loaded = []
    for path in paths:
        model, ckpt = load_checkpoint(path)
        loaded.append(
            (
                path,
                model,
                {key: ckpt.get(key) for key in ("task", "args", "data", "step", "epoch", "git_sha")},
            )
        )
        if ckpt["task"] != loaded[0][2]["task"]:
            raise DataError(
                f"{path}: a checkpoint of task {ckpt['task']!r}; {paths[0]} is of {loaded[0][2]['task']!r}; evaluate them in separate runs"
            )
    return loaded


def _load_fold_models(loaded: list[tuple]) -> tuple[dict[int, list[tuple]], dict]:
    """{fold: [(model, what of the checkpoint is needed), ...]} and the data settings that all must share."""
    folds: dict[int, list[tuple]] = {}
    first, shared = None, ("split", "keep_overlap", "synthetic", "labels")
    for path, model, ckpt in loaded:
        if ckpt["task"] not in ("han", *AUDIO_TASKS):
            raise DataError(
                f"{path}: a checkpoint of task {ckpt['task']!r}; expected han, {', '.join(AUDIO_TASKS)} or decoder; give one written by a trainer of this repository"
            )
        data = ckpt["data"]
        if ckpt["task"] in AUDIO_TASKS:
            shared = (*shared, "audio")
            if (
                not isinstance(data, dict)
                or not isinstance(ckpt["args"], dict)
                or not {*shared, "fold", "mean", "std", "frames"} <= data.keys()
            ):
                raise DataError(
                    f"{path}: without args, or without data of a fine-tuning; expected best.pt of pretrain_ast.py --task finetune, all of one kind; train it again"
                )
        elif (
            not isinstance(data, dict)
            or not isinstance(ckpt["args"], dict)
            or len(data.get("columns", ())) != model.model_args["input_size"]
        ):
            raise DataError(
                f"{path}: without args, or without data that describe its {model.model_args['input_size']} columns; expected best.pt of train_han.py; train it again"
            )
        first = first or data
        for key in shared:
            if data[key] != first[key]:
                raise DataError(
                    f"{path}: {key} is {data[key]!r}; {loaded[0][0]} has {first[key]!r}; evaluate them in separate runs"
                )
        if list(data["labels"]) != list(LABELS):
            raise DataError(
                f"{path}: labels {str(data['labels'])[:60]}; expected the 19 of PercePiano in their order; train it again"
            )
        folds.setdefault(data["fold"], []).append(
            (model, {"path": str(path), **ckpt, "args": _own_options(ckpt)})
        )
    return dict(sorted(folds.items())), first


def _own_options(ckpt: dict) -> dict:
    """The options that a checkpoint was trained with, without those of one machine."""
    return {
        key: value
        for key, value in ckpt["args"].items()
        if key not in ("data", "cache", "out", "resume", "name", "device")
    }


def evaluate(argv: list[str]) -> dict:
    """`python eval.py --ckpt ...`: metrics of checkpoints, those that rate each on its own fold and split; returns them (see
    `measure`; for decoders `evaluate_decoder`, for a pre-training `evaluate_pretraining`)."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py evaluate",
        usage="python eval.py [evaluate] --ckpt FILE ... [--data DIR] [options]",
        description="""\
Scores checkpoints on data that they did not learn from. What they are (HAN, AST, phoneme decoder) they know themselves.

    python eval.py --ckpt runs/han/NAME/best.pt --data data/percepiano             one fold: R2, MSE, Pearson of its validation part
    python eval.py --ckpt runs/han/*_f?_s7/best.pt --data data/percepiano          four folds, each on its own part, then mean and deviation
    python eval.py --ckpt runs/decoder/NAME/best.pt --data DIR --part test         phoneme error rate, in all and by session
    python eval.py --ckpt runs/decoder/NAME/best.pt --data DIR --words --tune      word error rate as well

Checkpoints of one fold (seeds) are averaged, and so are decoders. Intervals: 95 %, bootstrap over segments or trials.""",
    )
    parser.add_argument(
        "--ckpt",
        nargs="+",
        required=True,
        metavar="FILE",
        help="best.pt of one or more folds or seeds (required)",
    )
    parser.add_argument(
        "--part",
        choices=["valid", "test", "competition"],
        default="valid",
        help="part to score (%(default)s); competition: decoder only; --save-results of ratings takes valid and test",
    )
    parser.add_argument(
        "--batch", type=number(int, 1), help="items per forward pass (16; audio 8; decoder 64)"
    )
    only_audio = audio_options(parser)
    only_decoder = [
        parser.add_argument(
            "--day",
            choices=["nearest", "mean"],
            help="decoder: day layer of sessions unknown to the model (off: they are refused)",
        ),
        *word_options(parser),
    ]
    args = _parse(parser, argv, data_options, result_options)
    loaded = _load_models(args.ckpt)
    task = loaded[0][2]["task"]
    _refuse_given(args, only_audio if task not in AUDIO_TASKS else [], "pretrain_ast.py", task)
    if task == "decoder":
        args.batch = args.batch or 64
        return evaluate_decoder(args, loaded)
    _refuse_given(
        args, only_decoder, "train_decoder.py", task, ["--part competition"] * (args.part == "competition")
    )
    if task == "ast" and loaded[0][1].model_args["num_outputs"] is None:
        return evaluate_pretraining(args, loaded)
    folds, data = _load_fold_models(loaded)
    corpus = _corpus_of(data, args)
    records = fold_records(folds, corpus, args, ("valid", "test") if args.save_results else (args.part,))
    used = [kept for members in folds.values() for _, kept in members]
    inputs = {"features": data["features"]} if task == "han" else {"model": task, "audio": data["audio"]}
    about = {
        "seeds": [kept["args"].get("seed") for kept in used],
        **inputs,
        "keep_overlap": data["keep_overlap"],
        "checkpoints": [
            {
                "path": kept["path"],
                "fold": kept["data"]["fold"],
                "epoch": kept["epoch"],
                "step": kept["step"],
                "git_sha": kept["git_sha"],
                "args": kept["args"],
            }
            for kept in used
        ],
    }
    return _finish(
        records,
        corpus,
        args,
        data["split"],
        about,
        Path(args.ckpt[0]).with_name(f"predictions_{args.part}.csv"),
        "han" if task == "han" else "ast",
    )


def _refuse_given(
    args: argparse.Namespace,
    options: list[argparse.Action],
    trainer: str,
    task: str,
    more: Iterable[str] = (),
) -> None:
    given = [
        option.option_strings[0] for option in options if getattr(args, option.dest) != option.default
    ] + list(more)
    if given:
        raise DataError(
            f"{', '.join(given)}: only for checkpoints of {trainer}; {args.ckpt[0]} is of task {task!r}; leave it out"
        )


def _corpus_of(data: dict, args: argparse.Namespace) -> Corpus:
    """The corpus of --data, and a line where checkpoints (of data settings `data`) were trained on another kind."""
    if args.data is None and not data["synthetic"]:
        raise DataError(
            f"{args.ckpt[0]}: trained on real data; its scores on the synthetic corpus mean nothing; give --data DIR"
        )
    corpus = _load_corpus(args)
    if corpus.synthetic != data["synthetic"]:
        print(
            f"trained on {'synthetic' if data['synthetic'] else 'real'} data, evaluated on {'synthetic' if corpus.synthetic else 'real'}"
        )
    return corpus


def fold_records(
    folds: dict[int, list[tuple]], corpus: Corpus, args: argparse.Namespace, parts: Iterable[str]
) -> list[dict]:
    """Predictions of the checkpoints of `_load_fold_models`, averaged within a fold, as `measure` takes them."""
    records, kind = [], next(iter(folds.values()))[0][1]
    store = audio_store(corpus, args, kind["data"]["audio"]) if kind["task"] in AUDIO_TASKS else None
    for fold, members in folds.items():
        data, keep_misaligned = members[0][1]["data"], members[0][1]["args"].get("keep_misaligned", False)
        names = percepiano_parts(
            corpus, data["split"], fold, keep_overlap=data["keep_overlap"], keep_misaligned=keep_misaligned
        )
        seeds = [kept["args"].get("seed") for _, kept in members]
        print(
            f"fold {fold}: "
            + (
                f"predictions of {len(members)} checkpoints averaged, seeds {seeds}"
                if len(members) > 1
                else f"{members[0][1]['path']}, seed {seeds[0]}"
            )
        )
        for part in parts:
            if store is None:
                p = [
                    predict_han(
                        model, prepare_han(corpus, names[part], kept["data"]), args.device, args.batch or 16
                    )
                    for model, kept in members
                ]
            else:
                names[part] = [name for name in names[part] if name in store.names]
                p = [
                    predict_ast(
                        model,
                        prepare_ast(corpus, store, names[part], kept["data"]),
                        kept["data"],
                        args.device,
                        args.batch or 8,
                        args.crops,
                    )
                    for model, kept in members
                ]
            records.append({"part": part, "fold": fold, "names": names[part], "p": np.mean(p, axis=0)})
    return records


# -----------------------------------------------------------------------------------------------------------------
# Floor: a forest or a ridge regression on pooled statistics of the notes or of the spectrogram
# -----------------------------------------------------------------------------------------------------------------


def floor(argv: list[str]) -> dict:
    """`python eval.py floor`: scikit-learn on the parts that the trainers use, HAN.md's ExtraTrees on note statistics or a
    ridge regression on log-mel statistics unless asked otherwise; returns metrics (see `measure`)."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py floor",
        usage="python eval.py floor [--task han|ast] [--data DIR] [options]",
        description="""\
The floor that a network has to beat: scikit-learn on statistics of each performance's notes (han) or spectrogram (ast), trained and
scored on the same parts as the trainers use. A minute.

    python eval.py floor --data data/percepiano                       forest on note statistics, four folds
    python eval.py floor --task ast --data data/percepiano --fold 0   ridge regression on log-mel statistics, one fold
    python eval.py floor --task ast --data data/percepiano --probe best.pt    and on a pre-trained AST's tokens""",
    )
    parser.add_argument(
        "--task",
        choices=["han", "ast"],
        default="han",
        help="han: from score and MIDI, ast: from audio (%(default)s)",
    )
    parser.add_argument(
        "--model",
        choices=["ridge", "forest"],
        help="ridge regression or forest of 150 trees (forest for han, ridge for ast)",
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="segment",
        help="what a part never shares with another (%(default)s)",
    )
    parser.add_argument(
        "--fold",
        choices=["0", "1", "2", "3", "all"],
        default="all",
        help="fold that validates (%(default)s: each once, then their mean)",
    )
    parser.add_argument(
        "--features",
        choices=["full", "score", "perf"],
        default="full",
        help="han: statistics of score, performance or both (%(default)s)",
    )
    parser.add_argument(
        "--audio", metavar="DIR", help="ast: folder of recordings NAME.wav (off: rendered from the MIDI)"
    )
    parser.add_argument(
        "--probe",
        metavar="FILE",
        help="ast: best.pt of a pre-training, whose frozen tokens join the statistics: linear probing (off)",
    )
    parser.add_argument(
        "--keep-overlap",
        action="store_true",
        help="keep training items that share played notes with validation or test (off)",
    )
    parser.add_argument(
        "--keep-misaligned",
        action="store_true",
        help="keep training items whose match rate is under .6 (off)",
    )
    parser.add_argument(
        "--seed", type=number(int, 0), default=7, help="of the forest; same seed, same figures (%(default)s)"
    )
    args = _parse(parser, argv, data_options, result_options)
    if (args.task == "ast" and args.features != "full") or (
        args.task == "han" and (args.audio or args.probe)
    ):
        raise DataError(
            f"--features {args.features}, --audio {args.audio}, --probe {args.probe} with --task {args.task}: features are of han, audio and probe of ast; leave it out"
        )
    args.model = args.model or {"han": "forest", "ast": "ridge"}[args.task]
    corpus = _load_corpus(args)
    if args.task == "ast":
        store = audio_store(corpus, args)
        table = ClipStatistics()
        statistics = {
            name: table.values(torch.as_tensor(np.asarray(store.get(i), np.float32))[None])[0]
            .double()
            .numpy()
            for i, name in enumerate(store.names)
        }
        if args.probe:
            tokens = frozen_tokens(args.probe, store, args.device)
            statistics = {name: np.concatenate([row, tokens[name]]) for name, row in statistics.items()}
    else:
        columns = [corpus.columns.index(name) for name in column_names(FEATURE_SETS[args.features])]
        statistics = {
            name: pooled_statistics(item, columns, args.features) for name, item in corpus.items.items()
        }
    records = []
    for fold in range(4) if args.fold == "all" else [int(args.fold)]:
        parts = percepiano_parts(
            corpus, args.split, fold, keep_overlap=args.keep_overlap, keep_misaligned=args.keep_misaligned
        )
        parts = {part: [name for name in names if name in statistics] for part, names in parts.items()}
        x, y = (
            np.stack([table[name] for name in parts["train"]])
            for table in (statistics, {name: item.get("y") for name, item in corpus.items.items()})
        )
        fitted = (
            _fit_forest(x, y, args.seed)
            if args.model == "forest"
            else _fit_ridge(x, y, [segment_of(name) for name in parts["train"]])
        )
        for part in ("valid", "test"):
            p = (
                fitted.predict(np.stack([statistics[name] for name in parts[part]])).clip(0, 1)
                if parts[part]
                else np.zeros((0, len(LABELS)))
            )
            records.append({"part": part, "fold": fold, "names": parts[part], "p": p})
    inputs = (
        {"features": args.features} if args.task == "han" else {"audio": "wav" if args.audio else "rendered"}
    )
    about = {"seeds": [args.seed], "model": args.model, **inputs, "keep_overlap": args.keep_overlap} | (
        {"probe": args.probe} if args.probe else {}
    )
    return _finish(records, corpus, args, args.split, about, task=args.task)


def _fit_forest(x: np.ndarray, y: np.ndarray, seed: int):
    from sklearn.ensemble import ExtraTreesRegressor  # takes a second to import, and only the floor needs it

    return ExtraTreesRegressor(
        150, min_samples_leaf=3, max_features=0.3, random_state=seed, n_jobs=os.cpu_count()
    ).fit(x, y)


def _fit_ridge(x: np.ndarray, y: np.ndarray, groups: list[str]):
    """Ridge regression on standardised columns, its strength chosen by cross-validation over whole groups of the training items."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = list(GroupKFold(min(5, len(set(groups)))).split(x, y, groups))
    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 5, 13), cv=folds)).fit(x, y)


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
    print(f"{type(model).__name__}, {parameters:.1f} M parameters, batch {batch}, {args.steps} steps, median:")
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


# -----------------------------------------------------------------------------------------------------------------
# Phoneme error rate
# -----------------------------------------------------------------------------------------------------------------

SIL = PHONEMES.index("SIL")


def ctc_greedy(logits: Tensor | np.ndarray, frames: Tensor | np.ndarray) -> list[list[int]]:
    """Most probable class of each frame, equal neighbours merged, then blank 0 dropped: one list of ids a trial.

    logits (B, F, 41), of any monotonous scale; frames (B,): valid frames, the rest is padding."""
    best = torch.as_tensor(logits).argmax(-1).cpu().numpy()
    decoded = []
    for row, n in zip(best, torch.as_tensor(frames).tolist(), strict=True):
        row = row[:n]
        changes = np.append(True, row[1:] != row[:-1])[:n]
        decoded.append(row[changes & (row != 0)].tolist())
    return decoded


def edit_counts(reference: Iterable, hypothesis: Iterable) -> tuple[int, int, int]:
    """(substitutions, deletions, insertions) of a minimal script that turns the reference into the hypothesis."""
    tags = [tag for tag, _, _ in Levenshtein.editops(list(reference), list(hypothesis)).as_list()]
    return tags.count("replace"), tags.count("delete"), tags.count("insert")


def per_counts(refs: Iterable, hyps: Iterable) -> np.ndarray:
    """(n, 4) int64 of n trials: substitutions, deletions, insertions, reference length."""
    rows = [(*edit_counts(ref, hyp), len(ref)) for ref, hyp in zip(refs, hyps, strict=True)]
    return np.array(rows, np.int64).reshape(-1, 4)


def error_rate(counts: np.ndarray) -> float:
    """Errors of all trials over their labels (micro average) of `per_counts`; NaN where there is no label at all."""
    total = np.asarray(counts).sum(0)
    return float(total[:3].sum() / total[3]) if total[3] else float("nan")


def trial_bootstrap(counts: np.ndarray, n: int = 1000, seed: int = 7) -> tuple[float, float]:
    """95 % interval of `error_rate` when trials are drawn with replacement; NaN with fewer than two trials."""
    counts = np.asarray(counts)
    if len(counts) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(counts), size=(n, len(counts)))
    errors, labels = counts[:, :3].sum(1)[drawn].sum(1), counts[:, 3][drawn].sum(1)
    rates = errors[labels > 0] / labels[labels > 0]
    if 2 * len(rates) < n:  # as in cluster_bootstrap
        return float("nan"), float("nan")
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def decoder_scores(refs: list, hyps: list, days: Iterable[int], day_names: list[str]) -> dict:
    """Phoneme error rate of trials: per, sub, del, ins, labels, trials, per_without_sil (SIL left out on both sides) and
    by_day {day name: per, sub, del, ins, labels, trials}, all micro-averaged. The trainer logs the same figures.

    refs, hyps: phoneme ids of each trial; days: index of each trial's day in day_names."""

    def figures(counts: np.ndarray) -> dict:
        sub, dele, ins, labels = counts.sum(0).tolist()
        return {
            "per": error_rate(counts),
            "sub": sub,
            "del": dele,
            "ins": ins,
            "labels": labels,
            "trials": len(counts),
        }

    counts, days = per_counts(refs, hyps), np.asarray(days)
    speech = [[[int(k) for k in sequence if k != SIL] for sequence in side] for side in (refs, hyps)]
    return {
        **figures(counts),
        "per_without_sil": error_rate(per_counts(*speech)),
        "by_day": {day_names[day]: figures(counts[days == day]) for day in np.unique(days)},
    }


def speech_logits(
    model: nn.Module,
    corpus: SpeechCorpus,
    indices: Iterable[int],
    days: np.ndarray,
    device: torch.device,
    batch: int = 64,
) -> list[np.ndarray]:
    """Log-probabilities (F, 41) float32 of each trial, in the order given; (0, 41) where it is shorter than one window.

    indices: trial numbers; days (corpus days,): the model's index of each day of the corpus, from data.map_days. Batches
    hold trials of similar length; the model is evaluated without dropout and left in the mode it came in."""
    indices, training = np.asarray(indices, np.int64), model.training
    order = np.argsort(corpus.lengths[indices], kind="stable")
    result: list = [None] * len(indices)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            items = collate_speech([speech_item(corpus, i) for i in indices[chosen]])
            logits, frames = model(
                items["x"].to(device),
                items["lengths"],
                torch.as_tensor(np.asarray(days))[items["day"]].to(device),
            )
            log_probs = logits.float().log_softmax(-1).cpu().numpy()
            for i, row, n in zip(chosen, log_probs, frames.tolist(), strict=True):
                result[i] = row[:n].copy()
    model.train(training)
    return result


def evaluate_decoder(args: argparse.Namespace, loaded: list[tuple]) -> dict:
    """Phoneme error rate of one decoder, or of the mean probabilities of several, on args.part: the figures of
    `decoder_scores`, their 95 % interval over trials and the most frequent substitutions; "words" where these were asked for."""
    corpus = _speech_corpus(args, loaded)
    parts = speech_parts(corpus, loaded[0][2]["data"]["valid"])
    trials = parts[args.part]
    scored = np.flatnonzero(corpus.labelled[trials] & (args.part != "competition"))
    if not len(scored) and (not args.submission or args.csv or args.save_results or not len(trials)):
        raise DataError(
            f"--part {args.part}: {len(trials)} trials without labels; a phoneme error rate needs them; give --part valid or test, or --submission FILE alone"
        )
    _say_circumstances(args, loaded, corpus, trials)
    log_probs, figures, records = mean_logits(loaded, corpus, trials, args), {}, []
    if len(scored):
        records = transcripts([log_probs[k] for k in scored], corpus, trials[scored])
        refs, hyps = ([record[side] for record in records] for side in ("reference", "hypothesis"))
        figures = {
            **decoder_scores(refs, hyps, corpus.day[trials[scored]], corpus.days),
            "interval": list(trial_bootstrap(per_counts(refs, hyps))),
            "unlabelled": len(trials) - len(scored),
            "too_short": sum(r["frames"] < frames_needed(r["reference"]) for r in records),
            "substitutions": substitutions(refs, hyps),
        }
        decoder_report(figures, records, args.part)
    if args.words or args.tune or args.submission:
        valid = (
            None
            if not args.tune
            else (log_probs, trials)
            if args.part == "valid"
            else (mean_logits(loaded, corpus, parts["valid"], args), parts["valid"])
        )
        figures["words"] = words(log_probs, corpus, trials, args, valid, parts["train"])
    _write_decoder(figures, records, corpus, args, loaded)
    return figures


def _speech_corpus(args: argparse.Namespace, loaded: list[tuple]) -> SpeechCorpus:
    """The corpus of --data, which must be given where the decoders learned from real data, and fit them."""
    data = _shared_settings(loaded)
    if args.data is None and not data["synthetic"]:
        raise DataError(
            f"{args.ckpt[0]}: trained on real data; its scores on the synthetic corpus mean nothing; give --data DIR"
        )
    if not args.data:
        print(
            "no --data: evaluating on the built-in SYNTHETIC corpus; the real one: Dryad, doi 10.5061/dryad.x69p8czpq, then --data with its folder"
        )
    corpus = open_speech(args.data or synthetic_speech(args.cache), args.cache)
    for line in corpus.left_out:
        print(f"left out: {line}")
    if corpus.channels != data["channels"]:
        raise DataError(
            f"{corpus.root}: {corpus.channels} channels; {args.ckpt[0]} expects {data['channels']}; convert with --channels or give its corpus"
        )
    return corpus


def transcripts(log_probs: list[np.ndarray], corpus: SpeechCorpus, trials: Iterable[int]) -> list[dict]:
    """Of labelled trials: {"trial", "day" (names), "reference", "hypothesis" (phoneme ids, greedy), "frames"}; log_probs (F, 41) each."""
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


def _shared_settings(loaded: list[tuple]) -> dict:
    """The data settings of checkpoints whose probabilities can be averaged; DataError names the first that differs."""
    needed = ("days", "channels", "phonemes", "rules", "valid", "synthetic")
    for path, model, ckpt in loaded:
        data = ckpt["data"]
        if (
            not isinstance(ckpt["args"], dict)
            or not isinstance(data, dict)
            or not all(key in data for key in needed)
        ):
            raise DataError(
                f"{path}: without args, or without data that name {', '.join(needed)}, but of task 'decoder'; expected han, or best.pt of train_decoder.py; train it again"
            )
        if list(data["phonemes"]) != list(PHONEMES) or data["rules"] != speech_rules():
            raise DataError(
                f"{path}: phonemes or label rules {data['rules']!r}; expected the 41 of data.PHONEMES and rules {speech_rules()!r}; train it again"
            )
        first = {**loaded[0][2]["data"], **loaded[0][1].model_args}
        for key in ("kernel", "stride", "channels", "valid", "synthetic"):
            if (found := {**data, **model.model_args}[key]) != first[key]:
                raise DataError(
                    f"{path}: {key} is {found!r}; {loaded[0][0]} has {first[key]!r}; evaluate them in separate runs"
                )
    return loaded[0][2]["data"]


def _say_circumstances(
    args: argparse.Namespace, loaded: list[tuple], corpus: SpeechCorpus, trials: np.ndarray
) -> None:
    """Which checkpoints, which trials, and what a reader must know before believing the figures."""
    seeds, data = [ckpt["args"].get("seed") for _, _, ckpt in loaded], loaded[0][2]["data"]
    print(
        f"{len(loaded)} checkpoints, probabilities averaged, seeds {seeds}"
        if len(loaded) > 1
        else f"{args.ckpt[0]}, seed {seeds[0]}, step {loaded[0][2]['step']}"
    )
    print(
        "SYNTHETIC corpus: figures say nothing about real speech"
        if corpus.synthetic
        else f"real data in {corpus.root}"
    )
    if corpus.synthetic != data["synthetic"]:
        print(
            f"trained on {'synthetic' if data['synthetic'] else 'real'} data, evaluated on {'synthetic' if corpus.synthetic else 'real'}"
        )
    if data["valid"] == "test" and args.part in ("valid", "test"):
        print(
            "the checkpoint was chosen on the test part (--valid test, the baseline's habit): its score there is no result"
        )
    for path, _, ckpt in loaded:
        known = ckpt["data"]["days"]
        for d in np.unique(corpus.day[trials]):
            if args.day and corpus.days[d] not in known:
                layer = map_days([corpus.days[d]], known, args.day)[0]
                print(
                    f"session {corpus.days[d]}: unknown to {path}; "
                    + ("the mean of all day layers" if layer < 0 else f"day layer of {known[layer]}")
                )


def mean_logits(
    loaded: list[tuple], corpus: SpeechCorpus, trials: np.ndarray, args: argparse.Namespace
) -> list[np.ndarray]:
    """`speech_logits` of one checkpoint, or of several the logarithm of their mean probability. args: day, device, batch."""
    total: list = []
    for _, model, ckpt in loaded:
        used, days = np.unique(corpus.day[trials]), np.full(len(corpus.days), -1)
        days[used] = map_days([corpus.days[d] for d in used], ckpt["data"]["days"], args.day)
        each = speech_logits(model.to(args.device), corpus, trials, days, args.device, args.batch)
        total = [np.logaddexp(a, b) for a, b in zip(total, each, strict=True)] if total else each
    return [row - np.float32(np.log(len(loaded))) for row in total]


def substitutions(refs: list, hyps: list, most: int = 10) -> list[list]:
    """The most frequent [reference phoneme, decoded phoneme, times]."""
    pairs = Counter(
        (ref[i], hyp[j])
        for ref, hyp in zip(refs, hyps, strict=True)
        for tag, i, j in Levenshtein.editops(ref, hyp).as_list()
        if tag == "replace"
    )
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [[PHONEMES[a], PHONEMES[b], times] for (a, b), times in ranked[:most]]


def spell(ids: Iterable[int]) -> str:
    """Phoneme names of class ids, separated by blanks."""
    return " ".join(PHONEMES[k] for k in ids)


def decoder_report(figures: dict, records: list[dict], part: str, samples: int = 5) -> None:
    """Prints figures of `evaluate_decoder`: totals, a line a day, substitutions, and sample transcripts."""
    low, high = figures["interval"]
    interval = f"95 % [{low:.4f}, {high:.4f}]" if np.isfinite(low) else "(too few trials for an interval)"
    print(
        f"{part}: {figures['trials']} trials, {figures['labels']} phonemes; PER {figures['per']:.4f} {interval}; sub {figures['sub']} del {figures['del']} "
        f"ins {figures['ins']}; PER without SIL {figures['per_without_sil']:.4f}"
    )
    if figures["unlabelled"]:
        print(f"{figures['unlabelled']} more trials have no label")
    if figures["too_short"]:
        print(
            f"{figures['too_short']} trials have fewer frames than their labels need: they cannot be decoded without error"
        )
    print(f"{'session':<24}{'trials':>8}{'phonemes':>10}{'PER':>8}{'sub':>7}{'del':>7}{'ins':>7}")
    for day, f in figures["by_day"].items():
        print(
            f"{day:<24}{f['trials']:>8}{f['labels']:>10}{f['per']:>8.4f}{f['sub']:>7}{f['del']:>7}{f['ins']:>7}"
        )
    print(
        "substitutions, reference > decoded: "
        + (", ".join(f"{a} > {b} {n}" for a, b, n in figures["substitutions"]) or "none")
    )
    for record in (
        records[i] for i in np.linspace(0, len(records) - 1, min(samples, len(records))).astype(int)
    ):
        print(
            f"{record['trial']}\n  reference  {spell(record['reference'])}\n  decoded    {spell(record['hypothesis'])}"
        )


def _write_decoder(
    figures: dict, records: list[dict], corpus: SpeechCorpus, args: argparse.Namespace, loaded: list[tuple]
) -> None:
    """--csv and --save-results: a line a trial with its transcripts and counts, and the figures with their circumstances."""
    lines = ["trial,day,reference,hypothesis,sub,del,ins,labels"]
    for record in records:
        ref, hyp = record["reference"], record["hypothesis"]
        lines.append(
            ",".join(
                [
                    record["trial"],
                    record["day"],
                    spell(ref),
                    spell(hyp),
                    *map(str, (*edit_counts(ref, hyp), len(ref))),
                ]
            )
        )
    stem = Path(args.results_dir) / f"decoder_{args.save_results}_{args.part}"
    for path in [args.csv, args.save_results and stem.with_name(stem.name + ".csv")]:
        if path:
            write_atomic(Path(path), lambda file: file.write(("\n".join(lines) + "\n").encode()))
            print(f"transcripts of {len(records)} trials in {path}")
    if args.save_results:
        used = [
            {
                "path": str(path),
                "epoch": ckpt["epoch"],
                "step": ckpt["step"],
                "git_sha": ckpt["git_sha"],
                "args": _own_options(ckpt),
            }
            for path, _, ckpt in loaded
        ]
        saved = {
            "task": "decoder",
            "row": args.save_results,
            "part": args.part,
            "command": args.command,
            **git_state(),
            "hardware": hardware(args.device),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "synthetic": corpus.synthetic,
            "valid": loaded[0][2]["data"]["valid"],
            "day_rule": args.day,
            "seeds": [ckpt["args"].get("seed") for _, _, ckpt in loaded],
            "checkpoints": used,
            "metrics": figures,
        }
        text = json.dumps(json_ready(saved), indent=1, allow_nan=False)
        write_atomic(stem.with_name(stem.name + ".json"), lambda file: file.write((text + "\n").encode()))
        print(f"saved {stem}.json")


# -----------------------------------------------------------------------------------------------------------------
# Words
# -----------------------------------------------------------------------------------------------------------------

# Search settings to start from: acoustic scale and blank penalty of the public decoders ('24: 256 channels, '25: 512). LM scores
# are log10: a weight of ln 10 would set them beside the network's natural logarithms as they are. With the transcripts' trigram that
# deletes words: validation WER .058 against .018 at 1 for a PER of .027, .85 against .62 for one of .51 (synthetic corpus).
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
LM_MARKS = ("<s>", "</s>", "<unk>")
MOST_HOMOPHONES = 6  # of one pronunciation; the library's trie drops any further one
COMPETITION_SIZE = 1200, 15  # rows and days of the '24 competition part


def spoken_words(text: str) -> list[str]:
    """Words of a transcript as they are trained on and scored: cleaned as `data.phonemize` does, those without a letter left out."""
    return [word for word in clean_sentence(text).split() if re.search("[a-z]", word)]


def read_lexicon(path: str | Path) -> list[tuple[str, tuple[int, ...]]]:
    """(word, phoneme ids) of lines "word PH PH ...", blanks or a tab between, in the file's order; several lines a word are fine.

    Of the CMU dictionary's habits are understood: stress digits, variants "word(2)", comments after ";;;"; and a SIL at the
    end. Repeated lines count once and are reported. DataError names the line of a phoneme that is none, or of a word without any."""
    entries, repeated, ids = {}, [], {name: i for i, name in enumerate(PHONEMES) if name}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}; expected a lexicon, lines of a word and its phonemes") from error
    for n, line in enumerate(lines, 1):
        word, *names = line.split() or [";;;"]
        if word.startswith(";;;"):
            continue
        names = [name.rstrip("012") for name in names]
        names = names[:-1] if names[-1:] == ["SIL"] else names
        unknown = [name for name in names if name not in ids]
        if unknown or not names or word.lower() in LM_MARKS:
            found = (
                f"phoneme {unknown[0]!r}"
                if unknown
                else "a language model's own mark"
                if names
                else "no phoneme"
            )
            raise DataError(
                f"{path}: line {n}, word {word!r}: {found}; expected words and some of {' '.join(ids)}; correct the line"
            )
        entry = re.sub(r"\(\d+\)$", "", word).lower(), tuple(ids[name] for name in names)
        if entry in entries:
            repeated.append(n)
        entries[entry] = None
    if not entries:
        raise DataError(f"{path}: no word in it; expected a lexicon, lines of a word and its phonemes")
    if repeated:
        print(f"{path}: {len(repeated)} repeated lines (the first: {repeated[0]}) count once")
    return list(entries)


def training_lexicon(texts: Iterable[str], labels: Iterable) -> list[tuple[str, tuple[int, ...]]]:
    """(word, phoneme ids) of every word of the transcripts, most frequent first.

    labels: phoneme ids of each transcript. Where they have as many pieces between SILs as there are words, the pieces are the
    words' pronunciations, so that a homograph keeps all that it was trained with; words only met elsewhere go to `data.phonemize`."""
    seen, words_seen = Counter(), Counter()
    for text, ids in zip(texts, labels, strict=True):
        sentence = spoken_words(text)
        pieces = [tuple(piece) for piece in bytes(np.asarray(ids).tolist()).split(bytes([SIL])) if piece]
        words_seen.update(sentence)
        seen.update(zip(sentence, pieces, strict=True) if len(pieces) == len(sentence) else ())
    for word in words_seen.keys() - {word for word, _ in seen}:
        sounds = tuple(k for k in phonemize(word) if k != SIL)
        seen.update([(word, sounds)] if sounds else [])
    return sorted(seen, key=lambda entry: (-words_seen[entry[0]], entry[0], -seen[entry], entry[1]))


def witten_bell(sentences: Iterable[list[str]], order: int = 3) -> dict[tuple[str, ...], list]:
    """{n-gram: [probability, back-off weight]} of an interpolated Witten-Bell model (Witten & Bell 1991; Chen & Goodman 1999).

    P(w | h) = (c(h w) + t(h) P(w | h')) / (c(h) + t(h)), t(h) the number of different words after h, h' without h's first word,
    and 1 / V below the unigrams, V the words with </s> and <unk>. An unseen w gets t(h) / (c(h) + t(h)) P(w | h'): the back-off form."""
    counts: Counter = Counter()
    for sentence in sentences:
        padded = ("<s>", *sentence, "</s>")
        counts.update(padded[i : i + n] for n in range(1, order + 1) for i in range(len(padded) - n + 1))
    if not counts:
        raise DataError("language model: no training transcript; expected at least one; give --lm FILE")
    del counts[("<s>",)]  # given, never predicted
    tokens, types = Counter(), Counter()
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


def write_arpa(path: Path, model: dict[tuple[str, ...], list]) -> None:
    """Writes the model of `witten_bell` as an ARPA file: log10 probability, words, log10 back-off weight."""
    orders = range(1, max(map(len, model)) + 1)
    lines = ["\\data\\", *(f"ngram {n}={sum(len(gram) == n for gram in model)}" for n in orders)]
    for n in orders:
        lines += ["", f"\\{n}-grams:"]
        lines += [
            "\t".join(
                [
                    f"{math.log10(p):.7f}",
                    " ".join(gram),
                    *([f"{math.log10(b):.7f}"] if n < orders[-1] else []),
                ]
            )
            for gram, (p, b) in sorted(model.items())
            if len(gram) == n
        ]
    write_atomic(Path(path), lambda file: file.write("\n".join([*lines, "", "\\end\\", ""]).encode()))


def load_lm(path: str | Path, vocabulary: list[str]) -> tuple:
    """KenLM of an ARPA or binary file for these words: (lm, log10 unigram scores, how many the LM knows). A word's id is its place.

    Where it knows less than half of them they are tried in capitals, as public LMs are written. DataError on a file that is no LM or knows none."""
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            head = file.read(1024)
        if not head.lstrip().startswith(b"\\data\\") and not head.startswith(
            b"mmap lm http://kheafield.com/code"
        ):
            raise ValueError(f"begins with {head[:20]!r}")
        best: tuple = (None, [], 0)
        for form in (str.lower, str.upper):
            with _silent_stderr():
                lm = KenLM(str(path), Dictionary([*map(form, vocabulary), "<unk>"]))
            start = lm.start(True)  # of no sentence: the score is the unigram's
            *scores, unknown = (lm.score(start, i)[1] for i in range(len(vocabulary) + 1))
            known = sum(score != unknown for score in scores)
            best = (lm, scores, known) if known > best[2] else best
            if 2 * known >= len(vocabulary):
                break
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        found = " ".join((str(error).splitlines() or [""])[-1].split())
        raise DataError(
            f"{path}: {found}; expected an n-gram language model, ARPA or KenLM's binary, of at least two orders"
        ) from error
    if not best[2]:
        raise DataError(
            f"{path}: knows none of the lexicon's {len(vocabulary)} words, such as {vocabulary[0]!r}; expected a language model of the same language"
        )
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

    lexicon: (word, phoneme ids without the last SIL), lm: ARPA file. `known`: words that the LM knows, the rest score as <unk>;
    `dropped`: homophones beyond MOST_HOMOPHONES, the least frequent by the LM."""

    def __init__(self, lexicon: list[tuple[str, tuple[int, ...]]], lm: str | Path):
        try:
            from flashlight.lib.text import decoder as flashlight
            from flashlight.lib.text.decoder import kenlm  # noqa: F401
        except ImportError as error:
            raise DataError(
                f"--words: {error}; expected the package ufal-flashlight-text; run `pip install ufal-flashlight-text`"
            ) from error
        self.library, self.words = flashlight, list(dict.fromkeys(word for word, _ in lexicon))
        self.lm, scores, self.known = load_lm(lm, self.words)
        number_of = {word: i for i, word in enumerate(self.words)}
        spoken: dict[tuple[int, ...], list[int]] = {}
        for word, sounds in lexicon:
            spoken.setdefault(sounds, []).append(number_of[word])
        self.dropped = sum(max(0, len(members) - MOST_HOMOPHONES) for members in spoken.values())
        self.trie = flashlight.Trie(len(PHONEMES), SIL)
        for sounds, members in spoken.items():
            for i in sorted(members, key=lambda i: -scores[i])[:MOST_HOMOPHONES]:
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
            raise DataError(
                "--words: log-probabilities that are not finite; expected those of a trained model; look at its weights"
            )
        options = self.library.LexiconDecoderOptions(settings["beam"], settings["token_beam"], 25.0, settings["lm_weight"], settings["word_score"],
                                                     -math.inf, 0.0, False, self.library.CriterionType.CTC)  # fmt: skip
        decoder = self.library.LexiconDecoder(options, self.trie, self.lm, SIL, 0, len(self.words), [], False)
        return [
            self.words[i] for i in decoder.decode(emissions.ctypes.data, *emissions.shape)[0].words if i >= 0
        ]


@contextlib.contextmanager
def word_decoder(lexicon: list[tuple[str, tuple[int, ...]]], lm: str | Path, processes: int = 1):
    """Gives decode(list of log_probs, settings) -> list of sentences, and the WordSearch, for the length of a with block.

    The library holds Python's lock, so threads gain nothing; with processes > 1 each builds a search of its own."""
    search = WordSearch(lexicon, lm)
    if processes == 1:
        yield lambda trials, settings: [search.decode(trial, settings) for trial in trials], search
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_decoding, (lexicon, lm)) as pool:
        before = signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGINT}
        )  # workers inherit this: Ctrl-C is answered here alone
        for _ in range(processes):  # a task starts a worker as long as none is ready
            pool.submit(int)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield (
            lambda trials, settings: list(
                pool.map(_decode_words, trials, [settings] * len(trials), chunksize=4)
            ),
            search,
        )


def _start_decoding(lexicon: list[tuple[str, tuple[int, ...]]], lm: str | Path) -> None:
    _decode_words.search = WordSearch(lexicon, lm)


def _decode_words(log_probs: np.ndarray, settings: dict) -> list[str]:
    return _decode_words.search.decode(log_probs, settings)


def nearest_words(
    sequences: Iterable[list[int]], lexicon: list[tuple[str, tuple[int, ...]]]
) -> list[list[str]]:
    """The yardstick without LM and search: greedy phoneme ids cut at SIL, for each piece the lexicon's word at the fewest edits,
    the earlier one of equals (the more frequent, of `training_lexicon`)."""
    spoken = [bytes(sounds) for _, sounds in lexicon]

    @functools.cache
    def nearest(piece: bytes) -> str:
        return lexicon[process.extractOne(piece, spoken, scorer=Levenshtein.distance)[2]][0]

    return [
        [nearest(piece) for piece in bytes(sequence).split(bytes([SIL])) if piece] for sequence in sequences
    ]


def tune_words(
    decode: Callable, log_probs: list[np.ndarray], references: list[list[str]], settings: dict
) -> tuple[dict, dict]:
    """Coordinate search over WORD_GRID from the settings given, by word errors: (settings, {before, after: WER, searches, sentences}).

    One setting after the other takes the value with the fewest errors, what it had among equals, until a round changes none."""
    tried: dict[tuple, float] = {}

    def wer(candidate: dict) -> float:
        key = tuple(candidate.values())
        if key not in tried:
            tried[key] = error_rate(per_counts(references, decode(log_probs, candidate)))
        return tried[key]

    if not sum(map(len, references)):
        raise DataError(
            "--tune: no labelled validation trial; expected some; leave it out or give the settings"
        )
    before, changed = wer(settings), True
    while changed:
        changed = False
        for name, values in WORD_GRID.items():
            value = min((settings[name], *values), key=lambda value: wer(settings | {name: value}))
            changed |= value != settings[name]
            settings = settings | {name: value}
    return settings, {
        "before": before,
        "after": wer(settings),
        "searches": len(tried),
        "sentences": len(references),
    }


def write_submission(
    path: str | Path, sentences: list[str], corpus, indices: Iterable[int], style: str
) -> None:
    """Writes the sentences of one whole part in the competitions' order: by session name, then by trial number.

    style "24": a sentence a line; "25": columns id (row number from 0) and text. Any part may be written, the '24 test part too,
    but all of it: DataError where a trial is missing or doubled, or where the '24 competition part is not 1200 rows of 15 days."""
    indices = np.asarray(indices, np.int64)
    parts = sorted({corpus.part[i] for i in indices})
    expected = np.flatnonzero(np.isin(corpus.part, parts))
    if len(parts) != 1 or len(indices) != len(sentences) or sorted(indices) != expected.tolist():
        raise DataError(
            f"{path}: {len(sentences)} sentences for {len(set(indices.tolist()))} of the {len(expected)} trials of part "
            f"{' + '.join(map(str, parts)) or 'none'}; expected each trial of one part once; give --part competition or --part test"
        )
    days = sorted({corpus.days[corpus.day[i]] for i in indices})
    public = corpus.channels == 256 and not corpus.synthetic and all(day.startswith("t12.") for day in days)
    if parts == ["competition"] and public and (len(indices), len(days)) != COMPETITION_SIZE:
        raise DataError(
            f"{path}: {len(indices)} rows of {len(days)} days; the competition takes {COMPETITION_SIZE[0]} of {COMPETITION_SIZE[1]}; see what the conversion left out"
        )
    found = sum(row["found"] for row in corpus.report.get("days", ()) if row["part"] == parts[0])
    if found > len(indices):
        raise DataError(
            f"{path}: {len(indices)} rows; the files hold {found} trials of part {parts[0]}, and a row for each is expected; see what the conversion left out"
        )
    order = sorted(range(len(indices)), key=lambda k: (corpus.days[corpus.day[indices[k]]], indices[k]))
    rows = [sentences[k] for k in order]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [("id", "text"), *enumerate(rows)] if style == "25" else []
    )
    text.writelines(f"{row}\n" for row in rows if style != "25")
    write_atomic(Path(path), lambda file: file.write(text.getvalue().encode()))
    print(
        f"{path}: {len(rows)} sentences of part {parts[0]}, {len(days)} days {days[0]} to {days[-1]}, {rows.count('')} of them empty"
        + (
            f"; the conversion left out {len(corpus.left_out)} items: a trial of this part among them moves the rows after it"
            if corpus.left_out
            else ""
        )
    )


def word_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Adds the options of `words`, which runs when --words, --tune or --submission is given, and returns them."""
    group = parser.add_argument_group("words", "beam search over a lexicon with an n-gram LM (task decoder)")
    add = group.add_argument
    return [
        add("--words", action="store_true", help="report the word error rate beside PER (off)"),
        add(
            "--tune",
            action="store_true",
            help="choose the four settings on the validation part first, and print them (off)",
        ),
        add(
            "--submission",
            metavar="FILE",
            help="write the sentences of the part: FILE.csv as id,text ('25), any other one a line ('24)",
        ),
        add(
            "--lexicon",
            metavar="FILE",
            help="lines of a word and its phonemes (default: the training transcripts' words)",
        ),
        add(
            "--lm",
            metavar="FILE",
            help="n-gram model, ARPA file or KenLM binary (default: Witten-Bell trigram of the training transcripts)",
        ),
        add(
            "--acoustic-scale",
            type=number(float, 0, 100),
            help="factor of the log-probabilities (default: 0.5 with 256 channels, 0.325 with 512)",
        ),
        add(
            "--blank-penalty",
            type=number(float, -100, 100),
            help="taken off blank's log-probability, in nats (default: log 7 with 256 channels, log 90 with 512)",
        ),
        add(
            "--lm-weight",
            type=number(float, 0, 100),
            default=1.0,
            help="factor of the LM's log10 probability (%(default)s)",
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


def word_model(corpus, train: Iterable[int], args: argparse.Namespace) -> tuple[list, Path, str]:
    """(lexicon, LM file, where they are from): the files given, else made from the transcripts of the trials `train`."""
    texts = [corpus.text[i] for i in train]
    lexicon = (
        read_lexicon(args.lexicon)
        if args.lexicon
        else training_lexicon(texts, [corpus.labels[i] for i in train])
    )
    if not lexicon:
        raise DataError(
            f"{corpus.root}: no word in the {len(texts)} training transcripts; expected some; give --lexicon FILE and --lm FILE"
        )
    source = f"{len({word for word, _ in lexicon})} words with {len(lexicon)} pronunciations from {args.lexicon or f'{len(texts)} training transcripts'}"
    if args.lm:
        return lexicon, Path(args.lm), f"{source}; LM {args.lm}"
    sentences = [sentence for sentence in map(spoken_words, texts) if sentence]
    path = Path(args.cache) / f"trigram-{hashlib.sha1(repr(sentences).encode()).hexdigest()[:12]}.arpa"
    write_arpa(path, witten_bell(sentences))
    return lexicon, path, f"{source}; LM Witten-Bell trigram of {len(sentences)} training transcripts, {path}"


def words(
    log_probs: list[np.ndarray],
    corpus,
    indices: Iterable[int],
    args: argparse.Namespace,
    valid: tuple | None = None,
    train: Iterable[int] | None = None,
) -> dict:
    """Decodes trials into words, prints and returns WER (0 to 1) and what it was got with; writes --submission.

    log_probs: (F, 41) of each trial of indices. valid: (log_probs, indices) of the validation part, for --tune. train: trials whose
    transcripts make the lexicon and the LM (default: the labelled ones of part "train" in neither indices nor valid). Without any
    labelled trial there is no WER, and never for the competition part. DataError on unreadable files, on --tune without labels, on an incomplete submission."""
    indices = np.asarray(indices, np.int64)
    held_out = {*indices.tolist(), *(np.asarray(valid[1]).tolist() if valid else ())}
    if train is None:
        train = [
            i
            for i in np.flatnonzero(np.asarray(corpus.part) == "train")
            if corpus.labelled[i] and i not in held_out
        ]
    settings = {name: getattr(args, name) for name in (*WORD_GRID, "beam", "token_beam")}
    settings = {
        name: WORD_SETTINGS.get(corpus.channels, WORD_SETTINGS[256])[name] if value is None else value
        for name, value in settings.items()
    }
    lexicon, lm, source = word_model(corpus, train, args)
    figures: dict = {
        "lexicon": args.lexicon or "training transcripts",
        "lm": args.lm or "training transcripts",
    }
    with word_decoder(lexicon, lm, args.processes) as (decode, search):
        print(
            f"words: {source}; it knows {search.known} of the words"
            + (f"; {search.dropped} homophones left out" if search.dropped else "")
        )
        if args.tune:
            if valid is None:
                raise DataError(
                    "--tune: no validation part here; expected one; leave it out or give the settings"
                )
            chosen = [k for k, i in enumerate(valid[1]) if corpus.labelled[i]]
            settings, figures["tuned"] = tune_words(
                decode,
                [valid[0][k] for k in chosen],
                [spoken_words(corpus.text[valid[1][k]]) for k in chosen],
                settings,
            )
            _report_tuning(figures["tuned"], settings)
        start = time.perf_counter()
        sentences = decode(log_probs, settings)
        figures |= {
            "settings": settings,
            "sentences": len(sentences),
            "ms_per_sentence": 1000 * (time.perf_counter() - start) / max(1, len(sentences)),
        }
    labelled = [k for k, i in enumerate(indices) if corpus.labelled[i] and corpus.part[i] != "competition"]
    if labelled:
        references = [spoken_words(corpus.text[indices[k]]) for k in labelled]
        greedy = [ctc_greedy(log_probs[k][None], [len(log_probs[k])])[0] for k in labelled]
        known = {word for word, _ in lexicon}
        figures["outside_lexicon"] = sum(word not in known for sentence in references for word in sentence)
        figures |= _word_figures("wer", references, [sentences[k] for k in labelled])
        figures |= _word_figures("nearest", references, nearest_words(greedy, lexicon))
        tuned_here = args.tune and {*np.asarray(valid[1]).tolist()} & {*indices.tolist()}
        _report_words(figures, "; tuned on these very sentences" if tuned_here else "", args.processes)
        for k in np.unique(np.linspace(0, len(labelled) - 1, 5).astype(int)):
            print(
                f"{corpus.ids[indices[labelled[k]]]}\n  reference  {' '.join(references[k])}\n  decoded    {' '.join(sentences[labelled[k]])}"
            )
    else:
        print(f"words: {len(sentences)} sentences decoded, none labelled: no WER")
    if args.submission:
        write_submission(
            args.submission,
            [" ".join(sentence) for sentence in sentences],
            corpus,
            indices,
            "25" if str(args.submission).endswith(".csv") else "24",
        )
    return figures


def _word_figures(name: str, references: list[list[str]], hypotheses: list[list[str]]) -> dict:
    counts = per_counts(references, hypotheses)
    return {
        name: error_rate(counts),
        f"{name}_interval": list(trial_bootstrap(counts)),
        f"{name}_counts": dict(zip(("sub", "del", "ins", "words"), counts.sum(0).tolist(), strict=True)),
    }


def _report_words(figures: dict, remark: str, processes: int) -> None:
    for name, title in (
        ("wer", "WER, lexicon and LM"),
        ("nearest", "WER, greedy phonemes to the nearest words"),
    ):
        (low, high), counts = figures[f"{name}_interval"], figures[f"{name}_counts"]
        print(
            f"{title:<42} {figures[name]:.4f} 95 % [{low:.4f}, {high:.4f}]  sub {counts['sub']} del {counts['del']} ins {counts['ins']} of {counts['words']} words"
            + remark * (name == "wer")
        )
    print(
        f"{figures['outside_lexicon']} of the words scored are not in the lexicon; {figures['ms_per_sentence']:.1f} ms a sentence"
        + f" in {processes} processes, their start included" * (processes > 1)
    )


def _report_tuning(tuned: dict, settings: dict) -> None:
    flags = " ".join(f"--{name.replace('_', '-')} {settings[name]:.4g}" for name in WORD_GRID)
    print(
        f"tuned on {tuned['sentences']} validation sentences, {tuned['searches']} searches: WER {tuned['before']:.4f} -> {tuned['after']:.4f} there with {flags}"
    )


# -----------------------------------------------------------------------------------------------------------------
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


# -----------------------------------------------------------------------------------------------------------------
# Significance and comparison
# -----------------------------------------------------------------------------------------------------------------


def _by_fold(statistic: Callable, rows: np.ndarray, folds: np.ndarray, *arrays: np.ndarray) -> np.ndarray:
    """Mean over all folds of statistic(arrays at the rows of that fold); NaN where a fold has no row."""
    in_fold = [rows[folds[rows] == fold] for fold in np.unique(folds)]
    if not all(len(r) for r in in_fold):
        return np.float64(np.nan)
    return np.mean([statistic(*(array[r] for array in arrays)) for r in in_fold], axis=0)


def _percentiles(draws: Iterable, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The finite ones of drawn statistics (scalars or arrays of one shape), and their 2.5 and 97.5 % points; a ValueError
    where fewer than half of n remain."""
    draws = np.array([draw for draw in draws if np.isfinite(draw).all()], np.float64)
    if 2 * len(draws) < n:
        raise ValueError(f"{len(draws)} of {n} draws tell something; expected at least half: more groups")
    return draws, np.percentile(draws, [2.5, 97.5], axis=0)


def permutation_p(
    y: np.ndarray,
    p: np.ndarray,
    groups: Iterable[str],
    n: int = 1000,
    seed: int = 7,
    folds: np.ndarray | None = None,
) -> np.ndarray:
    """One-sided p-value per dimension, (D,), of the Pearson correlation (mean over folds) if predictions knew nothing.

    y, p (n, D); groups (n,). Items of a group are alike on both sides, so items alone must not be exchanged: every group
    receives the predictions of a whole group of its fold, in random order (cut or repeated where that one is larger or
    smaller). Folds that hold the same groups are permuted alike. p = (1 + draws as good as the observed) / (1 + n)
    (Phipson & Smyth, 2010)."""
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    folds = np.zeros(len(y), int) if folds is None else np.asarray(folds)
    keys, inverse = np.unique(np.asarray(groups), return_inverse=True)
    members = [
        [rows for k in range(len(keys)) if len(rows := np.flatnonzero((inverse == k) & (folds == fold)))]
        for fold in np.unique(folds)
    ]
    present = [[inverse[rows[0]] for rows in fold] for fold in members]
    everything = np.arange(len(y))
    observed, as_good = _by_fold(pearson, everything, folds, y, p), np.zeros(y.shape[1], int)
    rng = np.random.default_rng(seed)
    largest = max(len(rows) for fold in members for rows in fold)
    for _ in range(n):
        order, within = rng.random(len(keys)), rng.random((len(keys), largest))
        source = np.empty(len(y), int)
        for rows, groups_here in zip(members, present, strict=True):
            for k, donor in enumerate(np.argsort(order[groups_here])):
                shuffled = rows[donor][np.argsort(within[groups_here[donor], : len(rows[donor])])]
                source[rows[k]] = np.resize(shuffled, len(rows[k]))
        as_good += _by_fold(pearson, everything, folds, y, p[source]) >= observed - 1e-12
    return (1 + as_good) / (1 + n)


def holm(p: Iterable[float]) -> np.ndarray:
    """p-values adjusted for their number (Holm, 1979), in the order given: times m, m - 1, ... from the smallest on, never
    falling, at most 1. NaN stays NaN and does not count."""
    p = np.asarray(p, np.float64)
    adjusted, order = np.full(p.shape, np.nan), np.argsort(p)[: np.isfinite(p).sum()]
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted


def paired_bootstrap(
    y: np.ndarray,
    pa: np.ndarray,
    pb: np.ndarray,
    groups: Iterable[str],
    statistic: Callable = mean_r2,
    folds: np.ndarray | None = None,
    n: int = 5000,
    seed: int = 7,
) -> tuple:
    """statistic(y, pa) - statistic(y, pb), its 95 % interval (low, high) and two-sided p-value, when whole groups are drawn
    with replacement, the same for both; of the statistic's shape. Folds as in `cluster_bootstrap`. p is twice the smaller
    share of draws on either side of 0, counting the observed one; all NaN but the difference when too few groups remain."""
    y, pa, pb = (np.asarray(a, np.float64) for a in (y, pa, pb))
    folds = np.zeros(len(y), int) if folds is None else np.asarray(folds)

    def difference(rows: np.ndarray) -> np.ndarray:
        return _by_fold(lambda y, a, b: np.asarray(statistic(y, a)) - statistic(y, b), rows, folds, y, pa, pb)

    observed = difference(np.arange(len(y)))
    try:
        draws, interval = _percentiles((difference(rows) for rows in _cluster_draws(groups, n, seed)), n)
    except ValueError:
        nothing = np.full_like(observed, np.nan)
        return observed, (nothing, nothing), nothing
    share = np.minimum((draws < 1e-12).sum(0) + 1, (draws > -1e-12).sum(0) + 1) / (
        len(draws) + 1
    )  # a tie but for rounding is one
    return observed, (interval[0], interval[1]), np.minimum(2 * share, 1)


def _stacked(
    records: list[dict], truth: dict[str, np.ndarray], part: str, view: str
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Names, truth, predictions and folds of all rated items of a part and view, fold after fold."""
    rows = [
        (name, truth[name], p, record["fold"])
        for record in records
        if record["part"] == part
        for name, p in zip(record["names"], record["p"], strict=True)
        if name in truth and not (view == "no_renderings" and is_rendering(name))
    ]
    names, y, p, folds = zip(*rows, strict=True) if rows else ((), (), (), ())
    return list(names), np.array(y, np.float64), np.array(p, np.float64), np.array(folds)


def significance(records: list[dict], truth: dict[str, np.ndarray], n: int = 1000) -> dict:
    """Per dimension, means over the folds: {part: {view: {"pearson_interval", "r2_interval" (19 pairs, cluster bootstrap over
    segments), "p", "p_holm" (19, `permutation_p`)} or None where nothing is rated or the segments are too few}}."""
    result: dict = {}
    for part in dict.fromkeys(record["part"] for record in records):
        result[part] = dict.fromkeys(VIEWS)
        for view in VIEWS:
            names, y, p, folds = _stacked(records, truth, part, view)
            groups = [segment_of(name) for name in names]
            if len(set(groups)) < 2:
                continue
            try:
                draws = (
                    _by_fold(lambda y, p: np.stack([pearson(y, p), r2(y, p)]), rows, folds, y, p)
                    for rows in _cluster_draws(groups, n, 7)
                )
                intervals = _percentiles(draws, n)[1]
            except ValueError:
                continue
            chance = permutation_p(y, p, groups, n, folds=folds)
            result[part][view] = {
                "pearson_interval": intervals[:, 0].T.tolist(),
                "r2_interval": intervals[:, 1].T.tolist(),
                "p": chance.tolist(),
                "p_holm": holm(chance).tolist(),
            }
    return result


def _print_significance(tests: dict) -> None:
    for part, views in tests.items():
        shown = {view: figures for view, figures in views.items() if figures}
        if not shown:
            continue
        print(
            f"{part + ': 95 % interval of r, p by permutation (Holm)':<52}"
            + "   ".join(f"{VIEWS[view]:<32}" for view in shown).rstrip()
        )
        for d, label in enumerate(LABELS):
            cells = [
                (*figures["pearson_interval"][d], figures["p"][d], figures["p_holm"][d])
                for figures in shown.values()
            ]
            print(
                f"  {label:<50}"
                + "   ".join(
                    f"r [{low:6.3f}, {high:6.3f}] {chance:.3f} ({corrected:.3f})"
                    for low, high, chance, corrected in cells
                )
            )


# With fewer independent items a bootstrap promises too much: that five all differ one way has a chance of 2 / 2**5 > .05 (sign test).
FEWEST = 6


def compare(argv: list[str]) -> dict:
    """`python eval.py compare`: paired test of two sets of predictions on the items that both rate; returns its figures."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py compare",
        usage="python eval.py compare --a FILE ... --b FILE ... [--data DIR] [options]",
        description="""\
Is A better than B, or is it chance? Both predict the same items; the last line says it in a sentence. Of ratings: the difference of
the mean correlation and of each of the 19, with Holm's correction for their number. Of phoneme decoders: of the phoneme error rate.

    python eval.py compare --a runs/han/ONE/best.pt --b runs/han/OTHER/best.pt --data data/percepiano
    python eval.py compare --a results/han_full_segment.csv --b results/han_floor_segment.csv --data data/percepiano
    python eval.py compare --a runs/decoder/ONE/best.pt --b runs/decoder/OTHER/best.pt --data DIR --part test

Intervals (95 %) and p-values: paired bootstrap; whole segments (of decoders: trials) are drawn with replacement, the same for both.""",
    )
    for side in "ab":
        parser.add_argument(
            f"--{side}",
            nargs="+",
            required=True,
            metavar="FILE",
            help="CSV of --save-results, or best.pt of one or more folds or seeds (required)",
        )
    parser.add_argument(
        "--part",
        choices=["valid", "test"],
        default="valid",
        help="part to compare on; of decoders' CSVs the one they hold (%(default)s)",
    )
    parser.add_argument(
        "--draws",
        type=number(int, 100),
        default=5000,
        help="times that the items are drawn; the least p-value is 2 / draws (%(default)s)",
    )
    parser.add_argument(
        "--batch", type=number(int, 1), help="items per forward pass of checkpoints (16; audio 8; decoder 64)"
    )
    only_decoder = [
        parser.add_argument(
            "--day",
            choices=["nearest", "mean"],
            help="decoder: day layer of sessions unknown to the model (off: they are refused)",
        )
    ]
    only_ratings = [
        parser.add_argument(
            "--metric",
            choices=["pearson", "r2"],
            default="pearson",
            help="ratings: correlation, or R2 (%(default)s)",
        ),
        parser.add_argument(
            "--cluster",
            choices=["segment", "performer"],
            default="segment",
            help="ratings: what is drawn as a whole (%(default)s)",
        ),
        parser.add_argument(
            "--no-renderings", action="store_true", help="ratings: without the score renderings (off)"
        ),
        *audio_options(parser),
    ]
    args = _parse(parser, argv, data_options)
    sides = [_side(paths) for paths in (args.a, args.b)]
    if sides[0][0] != sides[1][0]:
        raise DataError(
            f"{args.a[0]}, {args.b[0]}: one is a decoder's, the other rates performances; expected two of a kind"
        )
    args.ckpt = args.a
    _refuse_given(
        args,
        *(
            (only_ratings, "train_han.py and pretrain_ast.py", "decoder")
            if sides[0][0]
            else (only_decoder, "train_decoder.py", "ratings")
        ),
    )
    if sides[0][0]:
        return compare_decoders(args, [loaded for _, loaded in sides])
    (records_a, split_a), (records_b, split_b) = (
        _compared_records(paths, loaded, args)
        for paths, (_, loaded) in zip((args.a, args.b), sides, strict=True)
    )
    if split_a and split_b and split_a != split_b:
        raise DataError(
            f"{args.a[0]} is of split {split_a}, {args.b[0]} of {split_b}; expected one split; compare rows of the same"
        )
    root = Path(args.data or synthetic_percepiano(args.cache))
    for path in (*args.a, *args.b):  # the synthetic corpus has performances of the same names
        if _saved_beside(path, "synthetic") not in (None, (root / "SYNTHETIC").is_file()):
            raise DataError(
                f"{path}: predictions of another corpus than {root}, as the JSON beside it says; expected the ratings that they predict; give --data DIR"
            )
    truth = read_labels(root, [])[0]
    names, y, pa, pb, folds, apart = _paired(records_a, records_b, truth, args)
    groups = [segment_of(name) if args.cluster == "segment" else str(player_of(name)) for name in names]
    metric = {"pearson": pearson, "r2": r2}[args.metric]
    everything = np.arange(len(y))
    a, b = (_by_fold(metric, everything, folds, y, p) for p in (pa, pb))
    difference, (low, high), chance = paired_bootstrap(
        y, pa, pb, groups, lambda y, p: np.append(v := metric(y, p), v.mean()), folds, args.draws
    )
    chance = chance if len(set(groups)) >= FEWEST else np.full_like(chance, np.nan)
    corrected = holm(chance[:-1])
    print(
        f"A {' '.join(args.a)}\nB {' '.join(args.b)}\n{args.part}, {len(set(names))} items in {len(np.unique(folds))} folds, {len(set(groups))} clusters ({args.cluster}s), "
        f"{args.draws} draws, so that no p is under {2 / args.draws:.2g}, and {2 * len(LABELS) / args.draws:.2g} after Holm"
        + f"; {apart} items that only one side predicts left out" * bool(apart)
        + "; SYNTHETIC corpus: figures say nothing about real performances" * (root / "SYNTHETIC").is_file()
    )
    print(f"{args.metric:<52}     A      B    A - B  95 % interval       p      p (Holm)")
    for d, label in enumerate([*LABELS, "mean"]):
        ends = (a[d], b[d]) if d < len(LABELS) else (a.mean(), b.mean())
        print(
            f"  {label:<50}{ends[0]:6.3f} {ends[1]:6.3f}  {difference[d]:6.3f} [{low[d]:6.3f}, {high[d]:6.3f}]  {chance[d]:.4f}"
            + (f"  {corrected[d]:.4f}" if d < len(LABELS) else "")
        )
    verdict = (
        _verdict(args.metric, difference, (low, high), chance, corrected)
        if np.isfinite(chance[-1])
        else _no_verdict(f"mean {args.metric}", difference[-1], len(set(groups)), f"{args.cluster}s")
    )
    print(verdict)
    return {
        "items": len(set(names)),
        "clusters": len(set(groups)),
        "a": float(a.mean()),
        "b": float(b.mean()),
        "difference": float(difference[-1]),
        "interval": [float(low[-1]), float(high[-1])],
        "p": float(chance[-1]),
        "verdict": verdict,
        "per_dimension": {
            "difference": difference[:-1].tolist(),
            "interval": np.stack([low, high], 1)[:-1].tolist(),
            "p": chance[:-1].tolist(),
            "p_holm": corrected.tolist(),
        },
    }


def _no_verdict(metric: str, difference: float, count: int, what: str) -> str:
    return f"A cannot be told from B: {metric} {difference:+.4f}, but {count} {what} are too few for a test."


def _verdict(
    metric: str, difference: np.ndarray, interval: tuple, chance: np.ndarray, corrected: np.ndarray
) -> str:
    clear = [
        [
            label
            for label, d, c in zip(LABELS, difference, corrected, strict=False)
            if c < 0.05 and sign * d > 0
        ]
        for sign in (1, -1)
    ]
    says = (
        "cannot be told from B"
        if not chance[-1] < 0.05
        else "is better than B"
        if difference[-1] > 0
        else "is worse than B"
    )
    dimensions = "; ".join(
        f"{word} in {len(names)} of {len(LABELS)} dimensions" + f" ({', '.join(names)})" * bool(names)
        for word, names in zip(("better", "worse"), clear, strict=True)
    )
    return (
        f"A {says}: mean {metric} {difference[-1]:+.4f} [{interval[0][-1]:.4f}, {interval[1][-1]:.4f}], p = {chance[-1]:.4f}; "
        f"after Holm's correction {dimensions}."
    )


def _side(paths: list[str]) -> tuple[bool, list[tuple]]:
    """Of one side of a comparison: whether it is a decoder's, and its checkpoints as `_load_models` gives them, [] where it is a CSV."""
    if not paths[0].endswith(".csv"):
        loaded = _load_models(paths)
        return loaded[0][2]["task"] == "decoder", loaded
    if len(paths) > 1:
        raise DataError(
            f"{paths[1]}: a second file beside {paths[0]}; expected one CSV, which holds all folds or trials; leave it out"
        )
    try:
        with open(paths[0], encoding="utf-8", errors="replace") as file:
            return file.readline(100).startswith("trial,"), []
    except OSError as error:
        raise DataError(
            f"{paths[0]}: {error.strerror}; expected a CSV of --save-results; give an existing file"
        ) from error


def _saved_beside(path: str, key: str) -> object:
    """An entry of the JSON that --save-results wrote beside a CSV; None where there is none."""
    try:
        return json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _compared_records(
    paths: list[str], loaded: list[tuple], args: argparse.Namespace
) -> tuple[list[dict], str | None]:
    """Predictions of one side, and their split where it is known: of checkpoints, or of a CSV from the JSON beside it."""
    if not loaded:
        return read_predictions(Path(paths[0])), _saved_beside(paths[0], "split")
    folds, data = _load_fold_models(loaded)
    return fold_records(
        folds, _corpus_of(data, argparse.Namespace(**{**vars(args), "ckpt": paths})), args, (args.part,)
    ), data["split"]


def _paired(
    records_a: list[dict], records_b: list[dict], truth: dict[str, np.ndarray], args: argparse.Namespace
) -> tuple:
    """Names, truth, predictions of A and of B and folds of the rated items that both predict in the same fold; and how many one lacks."""
    view = "no_renderings" if args.no_renderings else "all"
    sides = []
    for records in (records_a, records_b):
        names, y, p, folds = _stacked(records, truth, args.part, view)
        sides.append(
            {
                (int(fold), name): (truth, row)
                for fold, name, truth, row in zip(folds, names, y, p, strict=True)
            }
        )
    both = sorted(sides[0].keys() & sides[1].keys())
    if len({segment_of(name) for _, name in both}) < 2:
        raise DataError(
            f"{args.a[0]}, {args.b[0]}: {len(both)} rated items of part {args.part} that both predict in the same fold; expected items of at least "
            "two segments; give rows of one split, and the --data that they were made with"
        )
    y, pa, pb = (
        np.array(column)
        for column in zip(*((sides[0][k][0], sides[0][k][1], sides[1][k][1]) for k in both), strict=True)
    )
    return (
        [name for _, name in both],
        y,
        pa,
        pb,
        np.array([fold for fold, _ in both]),
        len(sides[0].keys() ^ sides[1].keys()),
    )


def read_transcripts(path: str | Path) -> list[dict]:
    """Reads a decoder's CSV of --save-results: a list of dicts of trial, day, reference and hypothesis (phoneme ids). DataError otherwise."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file, strict=True)
            return [
                {
                    "trial": row["trial"],
                    "day": row["day"],
                    **{
                        side: [PHONEMES.index(p) for p in row[side].split()]
                        for side in ("reference", "hypothesis")
                    },
                }
                for row in rows
            ]
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise DataError(
            f"{path}: {error}; expected columns trial,day,reference,hypothesis of phoneme names, as --save-results writes"
        ) from error


def _compared_transcripts(
    paths: list[str], loaded: list[tuple], args: argparse.Namespace
) -> tuple[dict[str, dict], bool]:
    """What one side of decoders made of each labelled trial, by the trial's name, and whether that is a synthetic one."""
    if not loaded:
        return {record["trial"]: record for record in read_transcripts(paths[0])}, bool(
            _saved_beside(paths[0], "synthetic")
        )
    own = argparse.Namespace(**{**vars(args), "ckpt": paths, "batch": args.batch or 64})
    corpus = _speech_corpus(own, loaded)
    trials = speech_parts(corpus, loaded[0][2]["data"]["valid"])[args.part]
    trials = trials[corpus.labelled[trials]]
    _say_circumstances(own, loaded, corpus, trials)
    return {
        record["trial"]: record
        for record in transcripts(mean_logits(loaded, corpus, trials, own), corpus, trials)
    }, corpus.synthetic


def compare_decoders(args: argparse.Namespace, loaded: list[list[tuple]]) -> dict:
    """Paired test of the phoneme error rates of two decoders on the trials that both decoded; trials are what is drawn."""
    (a, synthetic), (b, _) = (
        _compared_transcripts(paths, models, args)
        for paths, models in zip((args.a, args.b), loaded, strict=True)
    )
    both = [trial for trial in a if trial in b]
    if len(both) < 2:
        raise DataError(
            f"{args.a[0]}, {args.b[0]}: {len(both)} labelled trials that both decoded; expected at least 2; give results of one part of one corpus"
        )
    if changed := [trial for trial in both if a[trial]["reference"] != b[trial]["reference"]]:
        raise DataError(
            f"{args.b[0]}: the phonemes of {len(changed)} trials, such as {changed[0]}, are not those of {args.a[0]}; expected results of one corpus and one way to phonemes"
        )
    counts = [
        per_counts(
            [side[trial]["reference"] for trial in both], [side[trial]["hypothesis"] for trial in both]
        )
        for side in (a, b)
    ]
    difference, (low, high), chance = (
        np.asarray(v).tolist()
        for v in paired_bootstrap(
            counts[0], *counts, np.arange(len(both)), lambda _, side: error_rate(side), n=args.draws
        )
    )
    chance = chance if len(both) >= FEWEST else math.nan
    days = np.array([a[trial]["day"] for trial in both])
    print(
        f"A {' '.join(args.a)}\nB {' '.join(args.b)}\n{len(both)} trials, {counts[0][:, 3].sum()} phonemes, {args.draws} draws"
        + f"; {len(a.keys() ^ b.keys())} trials that only one side decoded left out" * (a.keys() != b.keys())
        + "; SYNTHETIC corpus: figures say nothing about real speech" * synthetic
    )
    print(f"{'phoneme error rate':<24}{'trials':>8}{'A':>9}{'B':>9}{'A - B':>9}")
    for title, rows in (*((day, days == day) for day in np.unique(days)), ("all", days == days)):
        each = [error_rate(side[rows]) for side in counts]
        print(f"{title:<24}{rows.sum():>8}{each[0]:>9.4f}{each[1]:>9.4f}{each[0] - each[1]:>+9.4f}")
    says = (
        "cannot be told from B"
        if not chance < 0.05
        else "is better than B"
        if difference < 0
        else "is worse than B"
    )
    verdict = (
        _no_verdict("phoneme error rate", difference, len(both), "trials")
        if not np.isfinite(chance)
        else f"A {says}: phoneme error rate {each[0]:.4f} against {each[1]:.4f}, difference {difference:+.4f} [{low:.4f}, {high:.4f}], p = {chance:.4f}."
    )
    print(verdict)
    return {
        "trials": len(both),
        "a": each[0],
        "b": each[1],
        "difference": difference,
        "interval": [low, high],
        "p": chance,
        "verdict": verdict,
    }


# -----------------------------------------------------------------------------------------------------------------
# Audio: rater ceiling
# -----------------------------------------------------------------------------------------------------------------


def rater_ceiling(raters: np.ndarray, names: np.ndarray, ratings: np.ndarray) -> dict:
    """What perfect knowledge of every item's true rating would score against the means of the raters there are.

    raters (n,), names (n,), ratings (n, D), NaN = none; as data.read_ratings. Model: rating = true + rater's own view of the
    item (variance b) + error of the moment (variance e, from raters who rated an item twice). Both come from the sums of
    squares within raters and within items (analysis of variance, unbiased for unequal counts). The mean of item i, of which
    rater j gave m_ij of N_i ratings, then errs by noise_i = b sum_j(m_ij²) / N_i² + e / N_i, and
    R² = 1 - mean(noise_i) / Var(item means), Pearson = sqrt(R²): the reliability of the means and its root.
    "independent" is R² if every rating were another rater's: noise_i = within-item variance / N_i (HAN.md's ≈ .79).
    Returns arrays (D,) "r2", "pearson", "independent", "between" (b), "error" (e), "spread" (Var), and "items", "per_item"."""
    _, item = np.unique(names, return_inverse=True)
    _, pair = np.unique(
        np.stack([item, np.unique(raters, return_inverse=True)[1]], 1), axis=0, return_inverse=True
    )
    columns = [
        _ceiling_column(item[there], pair.ravel()[there], column[there])
        for column, there in zip(ratings.T, np.isfinite(ratings).T, strict=True)
    ]
    figures = {key: np.array([column[key] for column in columns]) for key in columns[0]}
    return {
        **figures,
        "pearson": np.sqrt(figures["r2"].clip(min=0)),
        "items": int(item.max()) + 1,
        "per_item": len(names) / (int(item.max()) + 1),
    }


def _ceiling_column(item: np.ndarray, pair: np.ndarray, x: np.ndarray) -> dict[str, float]:
    """`rater_ceiling` of one dimension: item and (item, rater) pair of every rating x."""
    item, (pair, m) = (
        np.unique(item, return_inverse=True)[1],
        np.unique(pair, return_inverse=True, return_counts=True)[1:],
    )
    N, mean = np.bincount(item), np.bincount(item, x) / np.bincount(item)
    of_pair = np.zeros(len(m), int)
    of_pair[pair] = item
    concentration = np.bincount(of_pair, m**2, len(N)) / N  # sum_j(m_ij²) / N_i, 1 if nobody rated twice
    within_pair, within_item = (
        ((x - (np.bincount(pair, x) / m)[pair]) ** 2).sum(),
        ((x - mean[item]) ** 2).sum(),
    )
    repeats, free = len(x) - len(m), len(x) - len(N)
    error = within_pair / repeats if repeats else 0.0
    between = (
        max(0.0, (within_item - error * free) / max((N - concentration).sum(), 1e-12)) if free else np.nan
    )
    noise, spread = (between * concentration / N + error / N).mean(), mean.var()
    several = N > 1
    variance = np.bincount(item, (x - mean[item]) ** 2)[several] / (N[several] - 1)
    return {
        "r2": 1 - noise / spread if spread > 0 else np.nan,
        "independent": 1 - (variance / N[several]).mean() / spread
        if spread > 0 and several.any()
        else np.nan,
        "between": between,
        "error": error,
        "spread": spread,
    }


def ceiling(argv: list[str]) -> dict:
    """`python eval.py ceiling`: prints `rater_ceiling` of all rated performances, with and without score renderings; returns both."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="eval.py ceiling",
        usage="python eval.py ceiling [--data DIR] [options]",
        description="""\
The most that any model can score: raters disagree, so even somebody who knew every performance's true rating would not predict
their mean exactly. R2 and Pearson of that somebody, in all and for each of the 19 ratings, from the individual ratings.

    python eval.py ceiling --data data/percepiano
    python eval.py ceiling                            on the synthetic corpus, as an example""",
    )
    args = _parse(parser, argv, data_options)
    root = Path(args.data or synthetic_percepiano(args.cache))
    raters, names, ratings = read_ratings(root)
    print(f"{root}" + " (SYNTHETIC: figures say nothing about real raters)" * (root / "SYNTHETIC").is_file())
    human = np.array([not is_rendering(name) for name in names])
    views = {
        view: rater_ceiling(raters[chosen], names[chosen], ratings[chosen] / 7)
        for view, chosen in zip(VIEWS, (human | True, human), strict=True)
    }
    for view, c in views.items():
        print(
            f"{VIEWS[view]}: {c['items']} items, {c['per_item']:.1f} ratings each; mean R2 {c['r2'].mean():.3f}, Pearson {c['pearson'].mean():.3f}; "
            f"R2 {c['independent'].mean():.3f} if every rating were another rater's"
        )
    print(f"{'':<52}" + "   ".join(f"{VIEWS[view]:<34}" for view in views).rstrip())
    for d, label in enumerate(LABELS):
        print(
            f"  {label:<50}"
            + "   ".join(
                f"R2 {c['r2'][d]:.3f} r {c['pearson'][d]:.3f} (independent {c['independent'][d]:.3f})"
                for c in views.values()
            )
        )
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


# -----------------------------------------------------------------------------------------------------------------
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
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # which a shell's background job has
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_script("eval.py", main)
