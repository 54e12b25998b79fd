"""Measures what the trainers write: metrics, evaluation of checkpoints, baselines and benchmarks.

    python eval.py --ckpt runs/han/NAME/best.pt --data DIR                    one fold, validation part
    python eval.py --ckpt fold0/best.pt ... fold3/best.pt --data DIR          each on its own fold, then mean and std over folds
    python eval.py --ckpt ... --data DIR --part test --csv predictions.csv    test part; unlabelled items are predicted only
    python eval.py --ckpt ... --data DIR --save-results full                  results/han_full_<split>.json and .csv, both parts
    python eval.py floor --task han --data DIR --fold all                     scikit-learn forest on the same parts
    python eval.py --ckpt runs/ast/NAME/best.pt --data DIR                    ratings from audio; a pre-training: its losses
    python eval.py floor --task ast --data DIR                                ridge regression on log-mel statistics
    python eval.py compare --a A.csv --b B.csv --data DIR                     paired test of two results or lists of checkpoints
    python eval.py ceiling --data DIR                                         what the raters' disagreement leaves to reach
    python eval.py --ckpt runs/decoder/NAME/best.pt --data DIR --part test    phoneme error rate of a decoder
    python eval.py --attention out.png --audio FILE.wav --ckpt runs/ast/NAME/best.pt    what an AST looks at; or --midi FILE.mid
    python eval.py bench --task han|decoder|ast                               step time against the plain rendition

Several checkpoints of one fold (seeds) are averaged. Every figure stands with and without the score renderings
(players `Score`, `Score2`), with a 95 % bootstrap interval over segments. Of several decoders the probabilities are averaged;
their interval is over trials, and --save-results writes results/decoder_ROW_<part>. Without --data the synthetic corpus is used.
"""

import argparse
import contextlib
import copy
import csv
import functools
import gzip
import hashlib
import io
import json
import math
import os
import platform
import random
import re
import resource
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
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

from data import (
    FBANK_MEAN,
    FBANK_STD,
    FEATURE_SETS,
    FEATURES,
    FRAME,
    HOP,
    LABELS,
    MELS,
    PHONEMES,
    SAMPLE_RATE,
    SILENCE,
    SPLITS,
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
    fbank,
    fbank_frames,
    frames_needed,
    load_percepiano,
    map_days,
    normalise_fbank,
    number,
    open_speech,
    percepiano_audio,
    percepiano_parts,
    phonemize,
    player_of,
    pooled_statistics,
    prepare_ast,
    prepare_han,
    read_labels,
    read_midi,
    read_ratings,
    read_wav,
    render,
    run_script,
    segment_of,
    speech_item,
    speech_parts,
    speech_rules,
    synthetic_percepiano,
    synthetic_speech,
    time_mask,
    write_atomic,
)
from models import (
    AST,
    AST_PRESETS,
    HAN,
    PATCH,
    BiLSTM,
    Block,
    ContextAttention,
    GRUDecoder,
    cluster_mask,
    load_checkpoint,
    output_frames,
    patches,
)

VIEWS = {"all": "all", "no_renderings": "without score renderings"}
AUDIO_TASKS = ("ast", "cnn", "mlp")  # what pretrain_ast.py writes
TRIAL_BINS, BINS_SPREAD = 500, 0.25  # bins per speech trial of the bench: median, sd of the log
MEDIAN_NOTES, NOTES_SPREAD, MAX_NOTES = 113, 0.67, 420  # notes per PercePiano performance: median, sd of the log, longest

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


def mean_r2(y: np.ndarray, p: np.ndarray) -> float:
    """Uniform average of `r2` over the dimensions: the figure of HAN.md's tables."""
    return float(r2(y, p).mean())


def cluster_bootstrap(y: np.ndarray, p: np.ndarray, groups: Iterable[str], statistic: Callable = mean_r2, n: int = 1000,
                      seed: int = 7, folds: np.ndarray | None = None) -> tuple[float, float]:
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
    return {"items": len(y), "segments": len(set(groups)), **{key: float(v.mean()) for key, v in per_dimension.items()},
            "r2_interval": list(cluster_bootstrap(y, p, groups)),
            "per_dimension": {key: v.tolist() for key, v in per_dimension.items()}}


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
                chosen = [i for i, name in enumerate(record["names"])
                          if name in truth and not (view == "no_renderings" and is_rendering(name))]
                if chosen:
                    names = [record["names"][i] for i in chosen]
                    row = (np.stack([truth[name] for name in names]), np.asarray(record["p"])[chosen],
                           [segment_of(name) for name in names])
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
    mean["per_dimension"] = {key: np.mean([fold["per_dimension"][key] for fold in each], axis=0).tolist()
                             for key in ("r2", "mse", "pearson")}
    return mean


# -----------------------------------------------------------------------------------------------------------------
# Results: predictions as CSV, metrics and circumstances as JSON, both printed
# -----------------------------------------------------------------------------------------------------------------


def write_predictions(path: Path, records: list[dict]) -> None:
    """CSV of columns name, part, fold and the 19 labels; one line per item, part and fold; four decimals."""
    lines = [",".join(["name", "part", "fold", *LABELS])]
    for record in records:
        order = sorted(range(len(record["names"])), key=lambda i: record["names"][i])
        lines += [",".join([record["names"][i].strip(), record["part"], str(record["fold"]),
                            *(f"{value:.4f}" for value in record["p"][i])]) for i in order]
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
                groups.setdefault((row[1], int(row[2])), []).append((row[0], [float(value) for value in row[3:]]))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; expected columns name,part,fold and the 19 labels, as --save-results writes") from error
    return [{"part": part, "fold": fold, "names": [name for name, _ in items], "p": np.array([p for _, p in items])}
            for (part, fold), items in groups.items()]


def check_results(path: Path, truth: dict[str, np.ndarray], tolerance: float = 2e-6) -> int:
    """Recomputes the metrics of a results JSON from the CSV beside it and truth (name -> (19,)), and returns how many
    figures were compared. DataError names the first that differs by more than tolerance, or has no counterpart."""
    path = Path(path)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no results ({error!r}); expected a JSON written by --save-results") from error
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


def json_ready(tree: object) -> object:
    """The same tree for JSON, which has no NaN (None instead); floats to seven digits."""
    if isinstance(tree, dict):
        return {key: json_ready(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [json_ready(value) for value in tree]
    if isinstance(tree, float):
        return float(f"{tree:.7g}") if np.isfinite(tree) else None
    return tree


def git_state() -> dict:
    """{"git_sha", "git_dirty"} of this file's repository, results/ apart; None outside one."""
    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return {"git_sha": git("rev-parse", "HEAD"), "git_dirty": None if changes is None else bool(changes)}


def hardware(device: torch.device) -> dict:
    """What the figures were computed on: CPU model and cores, GPU if used, threads, torch version."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {"cpu": model[1] if model else platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "threads": torch.get_num_threads(), "torch": torch.__version__}


def _print_metrics(metrics: dict) -> None:
    def line(title: str, counts: str, s: dict, std: bool) -> None:
        low, high = s["r2_interval"]
        spread = f" ± {s['r2_std']:.3f}" if std else ""
        interval = f"95 % [{low:.3f}, {high:.3f}]" if np.isfinite(low) else "(too few segments for an interval)"
        print(f"{title:<44}{counts:>15}  R2 {s['r2']:.4f}{spread} {interval}  MSE {s['mse']:.5f}  Pearson {s['pearson']:.3f}")

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
                line(f"{part} mean ± std, {VIEWS[view]}", f"{figures['mean']['folds']} folds", figures["mean"], True)
        print(f"{part + ' per dimension':<52}" + "   ".join(f"{VIEWS[view]:<30}" for view in shown).rstrip())
        for d, label in enumerate(LABELS):
            cells = [figures["mean"]["per_dimension"] for figures in shown.values()]
            print(f"  {label:<50}" + "   ".join(f"R2 {c['r2'][d]:6.3f} MSE {c['mse'][d]:.4f} r {c['pearson'][d]:6.3f}"
                                              for c in cells))


def _load_corpus(args: argparse.Namespace) -> Corpus:
    if not args.data:
        print("no --data: evaluating on the built-in SYNTHETIC corpus; the real one: python data.py fetch percepiano, then --data DIR")
    corpus = load_percepiano(args.data or synthetic_percepiano(args.cache), args.cache)
    for line in corpus.left_out:
        print(f"left out: {line}")
    return corpus


def _finish(records: list[dict], corpus: Corpus, args: argparse.Namespace, split: str, about: dict,
            default_csv: Path | None = None, task: str = "han") -> dict:
    """Measures, prints and writes predictions (to default_csv when some have no label); returns the metrics. Task ast is
    tested for significance too."""
    truth = {name: item["y"] for name, item in corpus.items.items() if item.get("y") is not None}
    if args.save_results:
        for record in records:  # rounded first, so that the JSON is exactly what the CSV gives
            record["p"] = np.array([[float(f"{value:.4f}") for value in row] for row in record["p"]])
    metrics = measure(records, truth)
    print(f"split {split}, " + ("SYNTHETIC corpus: figures say nothing about real performances" if corpus.synthetic
                                else f"real data in {corpus.root}"))
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
        saved = {"task": task, "row": args.save_results, "split": split, "command": args.command, **git_state(),
                 "hardware": hardware(args.device), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                 "synthetic": corpus.synthetic, **about, "labels": list(LABELS), "metrics": metrics, **tests}
        write_predictions(stem.with_name(stem.name + ".csv"), records)
        text = json.dumps(json_ready(saved), indent=1, allow_nan=False)
        flat = re.sub(r"\[\s+([^][{}]*?)\s+]", lambda found: f"[{' '.join(found[1].split())}]", text)  # a list of figures is one line
        write_atomic(stem.with_name(stem.name + ".json"), lambda file: file.write((flat + "\n").encode()))
        print(f"saved {stem}.json and .csv ({len(unlabelled)} unlabelled items among the predictions)")
    return metrics


# -----------------------------------------------------------------------------------------------------------------
# Evaluation of checkpoints
# -----------------------------------------------------------------------------------------------------------------


def to_device(batch: dict, device: torch.device) -> dict:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def predict_han(model: torch.nn.Module, items: list[dict], device: torch.device, batch: int = 16) -> np.ndarray:
    """Ratings in [0, 1] of prepared items, (n, 19) float64 in the order given. Batches hold items of similar length."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]["x"]))
    p = np.zeros((len(items), len(LABELS)))
    model = model.to(device).eval()
    with torch.no_grad():
        for start in range(0, len(order), batch):
            chosen = order[start:start + batch]
            logits = model(to_device(collate_han([items[i] for i in chosen]), device))
            p[chosen] = torch.sigmoid(logits.float()).double().cpu().numpy()
    return p


def _load_models(paths: list[str]) -> list[tuple]:
    """[(path, model, what of the checkpoint is needed), ...], all of one task."""
    loaded = []
    for path in paths:
        model, ckpt = load_checkpoint(path)
        loaded.append((path, model, {key: ckpt.get(key) for key in ("task", "args", "data", "step", "epoch", "git_sha")}))
        if ckpt["task"] != loaded[0][2]["task"]:
            raise DataError(f"{path}: a checkpoint of task {ckpt['task']!r}; {paths[0]} is of {loaded[0][2]['task']!r}; evaluate them in separate runs")
    return loaded


def _load_fold_models(loaded: list[tuple]) -> tuple[dict[int, list[tuple]], dict]:
    """{fold: [(model, what of the checkpoint is needed), ...]} and the data settings that all must share."""
    folds: dict[int, list[tuple]] = {}
    first, shared = None, ("split", "keep_overlap", "synthetic", "labels")
    for path, model, ckpt in loaded:
        if ckpt["task"] not in ("han", *AUDIO_TASKS):
            raise DataError(f"{path}: a checkpoint of task {ckpt['task']!r}; expected han, {', '.join(AUDIO_TASKS)} or decoder; give one written by a trainer of this repository")
        data = ckpt["data"]
        if ckpt["task"] in AUDIO_TASKS:
            shared = (*shared, "audio")
            if not isinstance(data, dict) or not isinstance(ckpt["args"], dict) or not {*shared, "fold", "mean", "std", "frames"} <= data.keys():
                raise DataError(f"{path}: without args, or without data of a fine-tuning; expected best.pt of pretrain_ast.py --task finetune, all of one kind; train it again")
        elif not isinstance(data, dict) or not isinstance(ckpt["args"], dict) or len(data.get("columns", ())) != model.model_args["input_size"]:
            raise DataError(f"{path}: without args, or without data that describe its {model.model_args['input_size']} columns; expected best.pt of train_han.py; train it again")
        first = first or data
        for key in shared:
            if data[key] != first[key]:
                raise DataError(f"{path}: {key} is {data[key]!r}; {loaded[0][0]} has {first[key]!r}; evaluate them in separate runs")
        if list(data["labels"]) != list(LABELS):
            raise DataError(f"{path}: labels {str(data['labels'])[:60]}; expected the 19 of PercePiano in their order; train it again")
        folds.setdefault(data["fold"], []).append((model, {"path": str(path), **ckpt, "args": _own_options(ckpt)}))
    return dict(sorted(folds.items())), first


def _own_options(ckpt: dict) -> dict:
    """The options that a checkpoint was trained with, without those of one machine."""
    return {key: value for key, value in ckpt["args"].items() if key not in ("data", "cache", "out", "resume", "name", "device")}


def evaluate(argv: list[str]) -> dict:
    """`python eval.py --ckpt ...`: metrics of checkpoints, those that rate each on its own fold and split; returns them (see
    `measure`; for decoders `evaluate_decoder`, for a pre-training `evaluate_pretraining`)."""
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="+", required=True, metavar="FILE", help="best.pt of one or more folds or seeds")
    parser.add_argument("--part", choices=["valid", "test", "competition"], default="valid",
                        help="part to score, competition: decoder only (%(default)s); --save-results of ratings takes valid and test")
    parser.add_argument("--batch", type=number(int, 1), help="items per forward pass (16; audio 8; decoder 64)")
    only_audio = audio_options(parser)
    only_decoder = [parser.add_argument("--day", choices=["nearest", "mean"], help="decoder: day layer of sessions unknown to the model (off: refused)"),
                    *word_options(parser)]
    args = _parse(parser, argv)
    loaded = _load_models(args.ckpt)
    task = loaded[0][2]["task"]
    _refuse_given(args, only_audio if task not in AUDIO_TASKS else [], "pretrain_ast.py", task)
    if task == "decoder":
        args.batch = args.batch or 64
        return evaluate_decoder(args, loaded)
    _refuse_given(args, only_decoder, "train_decoder.py", task, ["--part competition"] * (args.part == "competition"))
    if task == "ast" and loaded[0][1].model_args["num_outputs"] is None:
        return evaluate_pretraining(args, loaded)
    folds, data = _load_fold_models(loaded)
    corpus = _corpus_of(data, args)
    records = fold_records(folds, corpus, args, ("valid", "test") if args.save_results else (args.part,))
    used = [kept for members in folds.values() for _, kept in members]
    inputs = {"features": data["features"]} if task == "han" else {"model": task, "audio": data["audio"]}
    about = {"seeds": [kept["args"].get("seed") for kept in used], **inputs,
             "keep_overlap": data["keep_overlap"],
             "checkpoints": [{"path": kept["path"], "fold": kept["data"]["fold"], "epoch": kept["epoch"], "step": kept["step"],
                              "git_sha": kept["git_sha"], "args": kept["args"]} for kept in used]}
    return _finish(records, corpus, args, data["split"], about, Path(args.ckpt[0]).with_name(f"predictions_{args.part}.csv"), "han" if task == "han" else "ast")


def _refuse_given(args: argparse.Namespace, options: list[argparse.Action], trainer: str, task: str, more: Iterable[str] = ()) -> None:
    given = [option.option_strings[0] for option in options if getattr(args, option.dest) != option.default] + list(more)
    if given:
        raise DataError(f"{', '.join(given)}: only for checkpoints of {trainer}; {args.ckpt[0]} is of task {task!r}; leave it out")


def _corpus_of(data: dict, args: argparse.Namespace) -> Corpus:
    """The corpus of --data, and a line where checkpoints (of data settings `data`) were trained on another kind."""
    if args.data is None and not data["synthetic"]:
        raise DataError(f"{args.ckpt[0]}: trained on real data; its scores on the synthetic corpus mean nothing; give --data DIR")
    corpus = _load_corpus(args)
    if corpus.synthetic != data["synthetic"]:
        print(f"trained on {'synthetic' if data['synthetic'] else 'real'} data, evaluated on {'synthetic' if corpus.synthetic else 'real'}")
    return corpus


def fold_records(folds: dict[int, list[tuple]], corpus: Corpus, args: argparse.Namespace, parts: Iterable[str]) -> list[dict]:
    """Predictions of the checkpoints of `_load_fold_models`, averaged within a fold, as `measure` takes them."""
    records, kind = [], next(iter(folds.values()))[0][1]
    store = audio_store(corpus, args, kind["data"]["audio"]) if kind["task"] in AUDIO_TASKS else None
    for fold, members in folds.items():
        data, keep_misaligned = members[0][1]["data"], members[0][1]["args"].get("keep_misaligned", False)
        names = percepiano_parts(corpus, data["split"], fold, keep_overlap=data["keep_overlap"], keep_misaligned=keep_misaligned)
        seeds = [kept["args"].get("seed") for _, kept in members]
        print(f"fold {fold}: " + (f"predictions of {len(members)} checkpoints averaged, seeds {seeds}" if len(members) > 1
                                  else f"{members[0][1]['path']}, seed {seeds[0]}"))
        for part in parts:
            if store is None:
                p = [predict_han(model, prepare_han(corpus, names[part], kept["data"]), args.device, args.batch or 16) for model, kept in members]
            else:
                names[part] = [name for name in names[part] if name in store.names]
                p = [predict_ast(model, prepare_ast(corpus, store, names[part], kept["data"]), kept["data"], args.device, args.batch or 8, args.crops)
                     for model, kept in members]
            records.append({"part": part, "fold": fold, "names": names[part], "p": np.mean(p, axis=0)})
    return records


# -----------------------------------------------------------------------------------------------------------------
# Floor: a forest or a ridge regression on pooled statistics of the notes or of the spectrogram
# -----------------------------------------------------------------------------------------------------------------


def floor(argv: list[str]) -> dict:
    """`python eval.py floor`: scikit-learn on the parts that the trainers use, HAN.md's ExtraTrees on note statistics or a
    ridge regression on log-mel statistics unless asked otherwise; returns metrics (see `measure`)."""
    parser = argparse.ArgumentParser(prog="eval.py floor", description="Scikit-learn on pooled statistics of the notes (han) or of the spectrogram (ast).")
    parser.add_argument("--task", choices=["han", "ast"], default="han")
    parser.add_argument("--model", choices=["ridge", "forest"], help="(forest for han, ridge for ast)")
    parser.add_argument("--split", choices=SPLITS, default="segment")
    parser.add_argument("--fold", choices=["0", "1", "2", "3", "all"], default="all")
    parser.add_argument("--features", choices=["full", "score", "perf"], default="full", help="note features, han only (%(default)s)")
    parser.add_argument("--audio", metavar="DIR", help="ast: recordings NAME.wav (off: rendered from the MIDI)")
    parser.add_argument("--keep-overlap", action="store_true", help="train on notes shared with validation and test too")
    parser.add_argument("--keep-misaligned", action="store_true", help="train on items that do not match their score")
    parser.add_argument("--seed", type=number(int, 0), default=7)
    args = _parse(parser, argv)
    if (args.task == "ast" and args.features != "full") or (args.task == "han" and args.audio):
        raise DataError(f"--features {args.features}, --audio {args.audio} with --task {args.task}: features are of han, audio is of ast; leave it out")
    args.model = args.model or {"han": "forest", "ast": "ridge"}[args.task]
    corpus = _load_corpus(args)
    if args.task == "ast":
        store = audio_store(corpus, args)
        statistics = {name: audio_statistics(store.get(i)) for i, name in enumerate(store.names)}
    else:
        columns = [corpus.columns.index(name) for name in column_names(FEATURE_SETS[args.features])]
        statistics = {name: pooled_statistics(item, columns, args.features) for name, item in corpus.items.items()}
    records = []
    for fold in range(4) if args.fold == "all" else [int(args.fold)]:
        parts = percepiano_parts(corpus, args.split, fold, keep_overlap=args.keep_overlap, keep_misaligned=args.keep_misaligned)
        parts = {part: [name for name in names if name in statistics] for part, names in parts.items()}
        x, y = (np.stack([table[name] for name in parts["train"]]) for table in (statistics, {name: item.get("y") for name, item in corpus.items.items()}))
        fitted = _fit_forest(x, y, args.seed) if args.model == "forest" else _fit_ridge(x, y, [segment_of(name) for name in parts["train"]])
        for part in ("valid", "test"):
            p = fitted.predict(np.stack([statistics[name] for name in parts[part]])).clip(0, 1) if parts[part] else np.zeros((0, len(LABELS)))
            records.append({"part": part, "fold": fold, "names": parts[part], "p": p})
    inputs = {"features": args.features} if args.task == "han" else {"audio": "wav" if args.audio else "rendered"}
    about = {"seeds": [args.seed], "model": args.model, **inputs, "keep_overlap": args.keep_overlap}
    return _finish(records, corpus, args, args.split, about, task=args.task)


def _fit_forest(x: np.ndarray, y: np.ndarray, seed: int):
    from sklearn.ensemble import ExtraTreesRegressor  # takes a second to import, and only the floor needs it

    return ExtraTreesRegressor(150, min_samples_leaf=3, max_features=0.3, random_state=seed, n_jobs=os.cpu_count()).fit(x, y)


def _fit_ridge(x: np.ndarray, y: np.ndarray, groups: list[str]):
    """Ridge regression on standardised columns, its strength chosen by cross-validation over whole groups of the training items."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = list(GroupKFold(min(5, len(set(groups)))).split(x, y, groups))
    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 5, 13), cv=folds)).fit(x, y)


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
    for notes in np.exp(rng.normal(np.log(MEDIAN_NOTES), NOTES_SPREAD, count)).clip(30, MAX_NOTES).astype(int):
        beat = np.sort(rng.integers(notes // 3, size=notes))
        items.append({"x": rng.standard_normal((notes, sum(FEATURES.values()))).astype(np.float32),
                      "voice": rng.choice([0, 1, 2, 5, 6], notes, p=[0.02, 0.4, 0.1, 0.38, 0.1]).astype(np.int64),
                      "beat": beat.astype(np.int64), "measure": (beat // 3).astype(np.int64),
                      "y": rng.random(len(LABELS)).astype(np.float32)})
    return items


def _timed_step(model: torch.nn.Module, batch: dict, amp: torch.dtype | None, device: torch.device) -> tuple[float, float]:
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
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) / 2**20 if cuda else float("nan")


def bench(argv: list[str]) -> dict:
    """`python eval.py bench`: a network against the same one written plainly, alternating step by step in one run."""
    parser = argparse.ArgumentParser(prog="eval.py bench", description="Step time of a network against its plain rendition.")
    parser.add_argument("--task", choices=["han", "decoder", "ast"], default="han")
    parser.add_argument("--width", type=number(int, 1), help="size of the model (256; decoder: hidden 512)")
    parser.add_argument("--batch", type=number(int, 1), help="items per step (8; decoder 64; ast 2)")
    parser.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="autocast type, of the plain decoder and AST always off; off = float32")
    parser.add_argument("--steps", type=number(int, 1), help="timed steps of each, after 3 of warm-up (20; decoder and ast 5, after 1)")
    parser.add_argument("--preset", choices=[*AST_PRESETS], help="ast: size of the model (small)")
    parser.add_argument("--frames", type=number(int, PATCH), help="ast: 10 ms frames of a clip (1024)")
    parser.add_argument("--visible-only", action="store_true", help="ast: time the encoding of visible patches only as well")
    parser.add_argument("--threads", type=number(int, 0), default=0, help="CPU threads; 0 = torch's default")
    args = _parse(parser, argv)

    own = {"han": {"width": 256, "batch": 8, "steps": 20}, "decoder": {"width": 512, "batch": 64, "steps": 5},
           "ast": {"preset": "small", "frames": 1024, "visible_only": False, "batch": 2, "steps": 5}}[args.task]
    if foreign := [f"--{key.replace('_', '-')}" for key in ("width", "preset", "frames", "visible_only") if getattr(args, key) and key not in own]:
        raise DataError(f"bench --task {args.task}: {', '.join(foreign)} given; expected {', '.join(f'--{key}' for key in own)}; leave it out".replace("_", "-"))
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
    model = HAN(input_size=sum(FEATURES.values()), size=args.width).to(device)
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
    print(f"{about['gpu'] or about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}, "
          f"device {device.type}, dtype {'float32' if amp is None else args.amp}, {datetime.now(timezone.utc):%Y-%m-%d}")
    print(f"batch {args.batch}: {int(batch['lengths'].sum())} notes, longest {int(batch['lengths'].max())}; width {args.width}, "
          f"{sum(w.numel() for w in model.parameters()) / 1e6:.1f} M parameters; median of {args.steps} steps")
    for name, (seconds, memory) in median.items():
        peak = f", peak {memory:.0f} MiB" if device.type == "cuda" else ""
        print(f"{name:<6} {1000 * seconds:8.1f} ms/step {args.batch / seconds:8.1f} items/s{peak}")
    ratio = float(median["plain"][0] / median["HAN"][0])
    if device.type == "cpu":
        print(f"peak memory of the process, both networks: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    print(f"ratio plain / HAN {ratio:.2f}; outputs differ by at most {difference:.1e} (float32, eval)")
    return {"ratio": ratio, "difference": difference, **{f"{name}_seconds": float(m[0]) for name, m in median.items()}}


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
        return {"per": error_rate(counts), "sub": sub, "del": dele, "ins": ins, "labels": labels, "trials": len(counts)}

    counts, days = per_counts(refs, hyps), np.asarray(days)
    speech = [[[int(k) for k in sequence if k != SIL] for sequence in side] for side in (refs, hyps)]
    return {**figures(counts), "per_without_sil": error_rate(per_counts(*speech)),
            "by_day": {day_names[day]: figures(counts[days == day]) for day in np.unique(days)}}


def speech_logits(model: nn.Module, corpus: SpeechCorpus, indices: Iterable[int], days: np.ndarray, device: torch.device,
                  batch: int = 64) -> list[np.ndarray]:
    """Log-probabilities (F, 41) float32 of each trial, in the order given; (0, 41) where it is shorter than one window.

    indices: trial numbers; days (corpus days,): the model's index of each day of the corpus, from data.map_days. Batches
    hold trials of similar length; the model is evaluated without dropout and left in the mode it came in."""
    indices, training = np.asarray(indices, np.int64), model.training
    order = np.argsort(corpus.lengths[indices], kind="stable")
    result: list = [None] * len(indices)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch):
            chosen = order[start:start + batch]
            items = collate_speech([speech_item(corpus, i) for i in indices[chosen]])
            logits, frames = model(items["x"].to(device), items["lengths"], torch.as_tensor(np.asarray(days))[items["day"]].to(device))
            log_probs = logits.float().log_softmax(-1).cpu().numpy()
            for i, row, n in zip(chosen, log_probs, frames.tolist(), strict=True):
                result[i] = row[:n].copy()
    model.train(training)
    return result


def evaluate_decoder(args: argparse.Namespace, loaded: list[tuple]) -> dict:
    """Phoneme error rate of one decoder, or of the mean probabilities of several, on args.part: the figures of
    `decoder_scores`, their 95 % interval over trials and the most frequent substitutions; "words" where these were asked for."""
    data = _shared_settings(loaded)
    if args.data is None and not data["synthetic"]:
        raise DataError(f"{args.ckpt[0]}: trained on real data; its scores on the synthetic corpus mean nothing; give --data DIR")
    if not args.data:
        print("no --data: evaluating on the built-in SYNTHETIC corpus; the real one: Dryad, doi 10.5061/dryad.x69p8czpq, then --data with its folder")
    corpus = open_speech(args.data or synthetic_speech(args.cache), args.cache)
    for line in corpus.left_out:
        print(f"left out: {line}")
    if corpus.channels != data["channels"]:
        raise DataError(f"{corpus.root}: {corpus.channels} channels; {args.ckpt[0]} expects {data['channels']}; convert with --channels or give its corpus")
    parts = speech_parts(corpus, data["valid"])
    trials = parts[args.part]
    scored = np.flatnonzero(corpus.labelled[trials] & (args.part != "competition"))
    if not len(scored) and (not args.submission or args.csv or args.save_results or not len(trials)):
        raise DataError(f"--part {args.part}: {len(trials)} trials without labels; a phoneme error rate needs them; give --part valid or test, or --submission FILE alone")
    _say_circumstances(args, loaded, corpus, trials)
    log_probs, figures, records = mean_logits(loaded, corpus, trials, args), {}, []
    if len(scored):
        for k in scored:
            i, row = trials[k], log_probs[k]
            records.append({"trial": corpus.ids[i], "day": corpus.days[corpus.day[i]], "reference": corpus.labels[i].tolist(),
                            "hypothesis": ctc_greedy(row[None], [len(row)])[0], "frames": len(row)})
        refs, hyps = ([record[side] for record in records] for side in ("reference", "hypothesis"))
        figures = {**decoder_scores(refs, hyps, corpus.day[trials[scored]], corpus.days), "interval": list(trial_bootstrap(per_counts(refs, hyps))),
                   "unlabelled": len(trials) - len(scored), "too_short": sum(r["frames"] < frames_needed(r["reference"]) for r in records),
                   "substitutions": substitutions(refs, hyps)}
        decoder_report(figures, records, args.part)
    if args.words or args.tune or args.submission:
        valid = None if not args.tune else (log_probs, trials) if args.part == "valid" else (mean_logits(loaded, corpus, parts["valid"], args), parts["valid"])
        figures["words"] = words(log_probs, corpus, trials, args, valid, parts["train"])
    _write_decoder(figures, records, corpus, args, loaded)
    return figures


def _shared_settings(loaded: list[tuple]) -> dict:
    """The data settings of checkpoints whose probabilities can be averaged; DataError names the first that differs."""
    needed = ("days", "channels", "phonemes", "rules", "valid", "synthetic")
    for path, model, ckpt in loaded:
        data = ckpt["data"]
        if not isinstance(ckpt["args"], dict) or not isinstance(data, dict) or not all(key in data for key in needed):
            raise DataError(f"{path}: without args, or without data that name {', '.join(needed)}, but of task 'decoder'; expected han, or best.pt of train_decoder.py; train it again")
        if list(data["phonemes"]) != list(PHONEMES) or data["rules"] != speech_rules():
            raise DataError(f"{path}: phonemes or label rules {data['rules']!r}; expected the 41 of data.PHONEMES and rules {speech_rules()!r}; train it again")
        first = {**loaded[0][2]["data"], **loaded[0][1].model_args}
        for key in ("kernel", "stride", "channels", "valid", "synthetic"):
            if (found := {**data, **model.model_args}[key]) != first[key]:
                raise DataError(f"{path}: {key} is {found!r}; {loaded[0][0]} has {first[key]!r}; evaluate them in separate runs")
    return loaded[0][2]["data"]


def _say_circumstances(args: argparse.Namespace, loaded: list[tuple], corpus: SpeechCorpus, trials: np.ndarray) -> None:
    """Which checkpoints, which trials, and what a reader must know before believing the figures."""
    seeds, data = [ckpt["args"].get("seed") for _, _, ckpt in loaded], loaded[0][2]["data"]
    print(f"{len(loaded)} checkpoints, probabilities averaged, seeds {seeds}" if len(loaded) > 1
          else f"{args.ckpt[0]}, seed {seeds[0]}, step {loaded[0][2]['step']}")
    print("SYNTHETIC corpus: figures say nothing about real speech" if corpus.synthetic else f"real data in {corpus.root}")
    if corpus.synthetic != data["synthetic"]:
        print(f"trained on {'synthetic' if data['synthetic'] else 'real'} data, evaluated on {'synthetic' if corpus.synthetic else 'real'}")
    if data["valid"] == "test" and args.part in ("valid", "test"):
        print("the checkpoint was chosen on the test part (--valid test, the baseline's habit): its score there is no result")
    for path, _, ckpt in loaded:
        known = ckpt["data"]["days"]
        for d in np.unique(corpus.day[trials]):
            if args.day and corpus.days[d] not in known:
                layer = map_days([corpus.days[d]], known, args.day)[0]
                print(f"session {corpus.days[d]}: unknown to {path}; " + ("the mean of all day layers" if layer < 0 else f"day layer of {known[layer]}"))


def mean_logits(loaded: list[tuple], corpus: SpeechCorpus, trials: np.ndarray, args: argparse.Namespace) -> list[np.ndarray]:
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
    pairs = Counter((ref[i], hyp[j]) for ref, hyp in zip(refs, hyps, strict=True)
                    for tag, i, j in Levenshtein.editops(ref, hyp).as_list() if tag == "replace")
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [[PHONEMES[a], PHONEMES[b], times] for (a, b), times in ranked[:most]]


def spell(ids: Iterable[int]) -> str:
    """Phoneme names of class ids, separated by blanks."""
    return " ".join(PHONEMES[k] for k in ids)


def decoder_report(figures: dict, records: list[dict], part: str, samples: int = 5) -> None:
    """Prints figures of `evaluate_decoder`: totals, a line a day, substitutions, and sample transcripts."""
    low, high = figures["interval"]
    interval = f"95 % [{low:.4f}, {high:.4f}]" if np.isfinite(low) else "(too few trials for an interval)"
    print(f"{part}: {figures['trials']} trials, {figures['labels']} phonemes; PER {figures['per']:.4f} {interval}; sub {figures['sub']} del {figures['del']} "
          f"ins {figures['ins']}; PER without SIL {figures['per_without_sil']:.4f}")
    if figures["unlabelled"]:
        print(f"{figures['unlabelled']} more trials have no label")
    if figures["too_short"]:
        print(f"{figures['too_short']} trials have fewer frames than their labels need: they cannot be decoded without error")
    print(f"{'session':<24}{'trials':>8}{'phonemes':>10}{'PER':>8}{'sub':>7}{'del':>7}{'ins':>7}")
    for day, f in figures["by_day"].items():
        print(f"{day:<24}{f['trials']:>8}{f['labels']:>10}{f['per']:>8.4f}{f['sub']:>7}{f['del']:>7}{f['ins']:>7}")
    print("substitutions, reference > decoded: " + (", ".join(f"{a} > {b} {n}" for a, b, n in figures["substitutions"]) or "none"))
    for record in (records[i] for i in np.linspace(0, len(records) - 1, min(samples, len(records))).astype(int)):
        print(f"{record['trial']}\n  reference  {spell(record['reference'])}\n  decoded    {spell(record['hypothesis'])}")


def _write_decoder(figures: dict, records: list[dict], corpus: SpeechCorpus, args: argparse.Namespace, loaded: list[tuple]) -> None:
    """--csv and --save-results: a line a trial with its transcripts and counts, and the figures with their circumstances."""
    lines = ["trial,day,reference,hypothesis,sub,del,ins,labels"]
    for record in records:
        ref, hyp = record["reference"], record["hypothesis"]
        lines.append(",".join([record["trial"], record["day"], spell(ref), spell(hyp), *map(str, (*edit_counts(ref, hyp), len(ref)))]))
    stem = Path(args.results_dir) / f"decoder_{args.save_results}_{args.part}"
    for path in [args.csv, args.save_results and stem.with_name(stem.name + ".csv")]:
        if path:
            write_atomic(Path(path), lambda file: file.write(("\n".join(lines) + "\n").encode()))
            print(f"transcripts of {len(records)} trials in {path}")
    if args.save_results:
        used = [{"path": str(path), "epoch": ckpt["epoch"], "step": ckpt["step"], "git_sha": ckpt["git_sha"], "args": _own_options(ckpt)} for path, _, ckpt in loaded]
        saved = {"task": "decoder", "row": args.save_results, "part": args.part, "command": args.command, **git_state(), "hardware": hardware(args.device),
                 "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "synthetic": corpus.synthetic, "valid": loaded[0][2]["data"]["valid"],
                 "day_rule": args.day, "seeds": [ckpt["args"].get("seed") for _, _, ckpt in loaded], "checkpoints": used, "metrics": figures}
        text = json.dumps(json_ready(saved), indent=1, allow_nan=False)
        write_atomic(stem.with_name(stem.name + ".json"), lambda file: file.write((text + "\n").encode()))
        print(f"saved {stem}.json")


# -----------------------------------------------------------------------------------------------------------------
# Words
# -----------------------------------------------------------------------------------------------------------------

# Search settings to start from: acoustic scale and blank penalty of the public decoders ('24: 256 channels, '25: 512). LM scores
# are log10: a weight of ln 10 would set them beside the network's natural logarithms as they are. With the transcripts' trigram that
# deletes words: validation WER .058 against .018 at 1 for a PER of .027, .85 against .62 for one of .51 (synthetic corpus).
WORD_SETTINGS = {256: {"acoustic_scale": 0.5, "blank_penalty": math.log(7)}, 512: {"acoustic_scale": 0.325, "blank_penalty": math.log(90)}}
WORD_GRID = {"lm_weight": (0.25, 0.5, 1.0, 1.6, 2.3, 3.5, 5.0), "blank_penalty": tuple(math.log(k) for k in (1, 2, 7, 25, 90)),
             "acoustic_scale": (0.2, 0.325, 0.5, 0.8, 1.2), "word_score": (-3.0, -1.5, 0.0, 1.5, 3.0)}
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
            found = f"phoneme {unknown[0]!r}" if unknown else "a language model's own mark" if names else "no phoneme"
            raise DataError(f"{path}: line {n}, word {word!r}: {found}; expected words and some of {' '.join(ids)}; correct the line")
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
        counts.update(padded[i:i + n] for n in range(1, order + 1) for i in range(len(padded) - n + 1))
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
        lines += ["\t".join([f"{math.log10(p):.7f}", " ".join(gram), *([f"{math.log10(b):.7f}"] if n < orders[-1] else [])])
                  for gram, (p, b) in sorted(model.items()) if len(gram) == n]
    write_atomic(Path(path), lambda file: file.write("\n".join([*lines, "", "\\end\\", ""]).encode()))


def load_lm(path: str | Path, vocabulary: list[str]) -> tuple:
    """KenLM of an ARPA or binary file for these words: (lm, log10 unigram scores, how many the LM knows). A word's id is its place.

    Where it knows less than half of them they are tried in capitals, as public LMs are written. DataError on a file that is no LM or knows none."""
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            head = file.read(1024)
        if not head.lstrip().startswith(b"\\data\\") and not head.startswith(b"mmap lm http://kheafield.com/code"):
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
        raise DataError(f"{path}: {found}; expected an n-gram language model, ARPA or KenLM's binary, of at least two orders") from error
    if not best[2]:
        raise DataError(f"{path}: knows none of the lexicon's {len(vocabulary)} words, such as {vocabulary[0]!r}; expected a language model of the same language")
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
            raise DataError(f"--words: {error}; expected the package ufal-flashlight-text; run `pip install ufal-flashlight-text`") from error
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
            raise DataError("--words: log-probabilities that are not finite; expected those of a trained model; look at its weights")
        options = self.library.LexiconDecoderOptions(settings["beam"], settings["token_beam"], 25.0, settings["lm_weight"], settings["word_score"],
                                                     -math.inf, 0.0, False, self.library.CriterionType.CTC)  # fmt: skip
        decoder = self.library.LexiconDecoder(options, self.trie, self.lm, SIL, 0, len(self.words), [], False)
        return [self.words[i] for i in decoder.decode(emissions.ctypes.data, *emissions.shape)[0].words if i >= 0]


@contextlib.contextmanager
def word_decoder(lexicon: list[tuple[str, tuple[int, ...]]], lm: str | Path, processes: int = 1):
    """Gives decode(list of log_probs, settings) -> list of sentences, and the WordSearch, for the length of a with block.

    The library holds Python's lock, so threads gain nothing; with processes > 1 each builds a search of its own."""
    search = WordSearch(lexicon, lm)
    if processes == 1:
        yield lambda trials, settings: [search.decode(trial, settings) for trial in trials], search
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_decoding, (lexicon, lm)) as pool:
        yield lambda trials, settings: list(pool.map(_decode, trials, [settings] * len(trials), chunksize=4)), search


def _start_decoding(lexicon: list[tuple[str, tuple[int, ...]]], lm: str | Path) -> None:
    _decode.search = WordSearch(lexicon, lm)


def _decode(log_probs: np.ndarray, settings: dict) -> list[str]:
    return _decode.search.decode(log_probs, settings)


def nearest_words(sequences: Iterable[list[int]], lexicon: list[tuple[str, tuple[int, ...]]]) -> list[list[str]]:
    """The yardstick without LM and search: greedy phoneme ids cut at SIL, for each piece the lexicon's word at the fewest edits,
    the earlier one of equals (the more frequent, of `training_lexicon`)."""
    spoken = [bytes(sounds) for _, sounds in lexicon]

    @functools.cache
    def nearest(piece: bytes) -> str:
        return lexicon[process.extractOne(piece, spoken, scorer=Levenshtein.distance)[2]][0]

    return [[nearest(piece) for piece in bytes(sequence).split(bytes([SIL])) if piece] for sequence in sequences]


def tune_words(decode: Callable, log_probs: list[np.ndarray], references: list[list[str]], settings: dict) -> tuple[dict, dict]:
    """Coordinate search over WORD_GRID from the settings given, by word errors: (settings, {before, after: WER, searches, sentences}).

    One setting after the other takes the value with the fewest errors, what it had among equals, until a round changes none."""
    tried: dict[tuple, float] = {}

    def wer(candidate: dict) -> float:
        key = tuple(candidate.values())
        if key not in tried:
            tried[key] = error_rate(per_counts(references, decode(log_probs, candidate)))
        return tried[key]

    if not sum(map(len, references)):
        raise DataError("--tune: no labelled validation trial; expected some; leave it out or give the settings")
    before, changed = wer(settings), True
    while changed:
        changed = False
        for name, values in WORD_GRID.items():
            value = min((settings[name], *values), key=lambda value: wer(settings | {name: value}))
            changed |= value != settings[name]
            settings = settings | {name: value}
    return settings, {"before": before, "after": wer(settings), "searches": len(tried), "sentences": len(references)}


def write_submission(path: str | Path, sentences: list[str], corpus, indices: Iterable[int], style: str) -> None:
    """Writes the sentences of one whole part in the competitions' order: by session name, then by trial number.

    style "24": a sentence a line; "25": columns id (row number from 0) and text. Any part may be written, the '24 test part too,
    but all of it: DataError where a trial is missing or doubled, or where the '24 competition part is not 1200 rows of 15 days."""
    indices = np.asarray(indices, np.int64)
    parts = sorted({corpus.part[i] for i in indices})
    expected = np.flatnonzero(np.isin(corpus.part, parts))
    if len(parts) != 1 or len(indices) != len(sentences) or sorted(indices) != expected.tolist():
        raise DataError(f"{path}: {len(sentences)} sentences for {len(set(indices.tolist()))} of the {len(expected)} trials of part "
                        f"{' + '.join(map(str, parts)) or 'none'}; expected each trial of one part once; give --part competition or --part test")
    days = sorted({corpus.days[corpus.day[i]] for i in indices})
    public = corpus.channels == 256 and not corpus.synthetic and all(day.startswith("t12.") for day in days)
    if parts == ["competition"] and public and (len(indices), len(days)) != COMPETITION_SIZE:
        raise DataError(f"{path}: {len(indices)} rows of {len(days)} days; the competition takes {COMPETITION_SIZE[0]} of {COMPETITION_SIZE[1]}; see what the conversion left out")
    found = sum(row["found"] for row in corpus.report.get("days", ()) if row["part"] == parts[0])
    if found > len(indices):
        raise DataError(f"{path}: {len(indices)} rows; the files hold {found} trials of part {parts[0]}, and a row for each is expected; see what the conversion left out")
    order = sorted(range(len(indices)), key=lambda k: (corpus.days[corpus.day[indices[k]]], indices[k]))
    rows = [sentences[k] for k in order]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("id", "text"), *enumerate(rows)] if style == "25" else [])
    text.writelines(f"{row}\n" for row in rows if style != "25")
    write_atomic(Path(path), lambda file: file.write(text.getvalue().encode()))
    print(f"{path}: {len(rows)} sentences of part {parts[0]}, {len(days)} days {days[0]} to {days[-1]}, {rows.count('')} of them empty"
          + (f"; the conversion left out {len(corpus.left_out)} items: a trial of this part among them moves the rows after it" if corpus.left_out else ""))


def word_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Adds the options of `words`, which runs when --words, --tune or --submission is given, and returns them."""
    group = parser.add_argument_group("words", "beam search over a lexicon with an n-gram LM (task decoder)")
    add = group.add_argument
    return [
        add("--words", action="store_true", help="report the word error rate beside PER (off)"),
        add("--tune", action="store_true", help="choose the four settings on the validation part first, and print them (off)"),
        add("--submission", metavar="FILE", help="write the sentences of the part: FILE.csv as id,text ('25), any other one a line ('24)"),
        add("--lexicon", metavar="FILE", help="lines of a word and its phonemes (default: the training transcripts' words)"),
        add("--lm", metavar="FILE", help="ARPA file or KenLM binary (default: Witten-Bell trigram of the training transcripts)"),
        add("--acoustic-scale", type=number(float, 0, 100), help="factor of the log-probabilities (default: 0.5 with 256 channels, 0.325 with 512)"),
        add("--blank-penalty", type=number(float, -100, 100), help="taken off blank's log-probability, in nats (default: log 7 with 256 channels, log 90 with 512)"),
        add("--lm-weight", type=number(float, 0, 100), default=1.0, help="factor of the LM's log10 probability (%(default)s)"),
        add("--word-score", type=number(float, -100, 100), default=0.0, help="added for every word (%(default)s)"),
        add("--beam", type=number(int, 1), default=100, help="hypotheses kept a frame (%(default)s)"),
        add("--token-beam", type=number(int, 1, 41), default=41, help="phonemes tried a frame (%(default)s: all)"),
        add("--processes", type=number(int, 1), default=1, help="processes that search (%(default)s)"),
    ]


def word_model(corpus, train: Iterable[int], args: argparse.Namespace) -> tuple[list, Path, str]:
    """(lexicon, LM file, where they are from): the files given, else made from the transcripts of the trials `train`."""
    texts = [corpus.text[i] for i in train]
    lexicon = read_lexicon(args.lexicon) if args.lexicon else training_lexicon(texts, [corpus.labels[i] for i in train])
    if not lexicon:
        raise DataError(f"{corpus.root}: no word in the {len(texts)} training transcripts; expected some; give --lexicon FILE and --lm FILE")
    source = f"{len({word for word, _ in lexicon})} words with {len(lexicon)} pronunciations from {args.lexicon or f'{len(texts)} training transcripts'}"
    if args.lm:
        return lexicon, Path(args.lm), f"{source}; LM {args.lm}"
    sentences = [sentence for sentence in map(spoken_words, texts) if sentence]
    path = Path(args.cache) / f"trigram-{hashlib.sha1(repr(sentences).encode()).hexdigest()[:12]}.arpa"
    write_arpa(path, witten_bell(sentences))
    return lexicon, path, f"{source}; LM Witten-Bell trigram of {len(sentences)} training transcripts, {path}"


def words(log_probs: list[np.ndarray], corpus, indices: Iterable[int], args: argparse.Namespace, valid: tuple | None = None,
          train: Iterable[int] | None = None) -> dict:
    """Decodes trials into words, prints and returns WER (0 to 1) and what it was got with; writes --submission.

    log_probs: (F, 41) of each trial of indices. valid: (log_probs, indices) of the validation part, for --tune. train: trials whose
    transcripts make the lexicon and the LM (default: the labelled ones of part "train" in neither indices nor valid). Without any
    labelled trial there is no WER, and never for the competition part. DataError on unreadable files, on --tune without labels, on an incomplete submission."""
    indices = np.asarray(indices, np.int64)
    held_out = {*indices.tolist(), *(np.asarray(valid[1]).tolist() if valid else ())}
    if train is None:
        train = [i for i in np.flatnonzero(np.asarray(corpus.part) == "train") if corpus.labelled[i] and i not in held_out]
    settings = {name: getattr(args, name) for name in (*WORD_GRID, "beam", "token_beam")}
    settings = {name: WORD_SETTINGS.get(corpus.channels, WORD_SETTINGS[256])[name] if value is None else value for name, value in settings.items()}
    lexicon, lm, source = word_model(corpus, train, args)
    figures: dict = {"lexicon": args.lexicon or "training transcripts", "lm": args.lm or "training transcripts"}
    with word_decoder(lexicon, lm, args.processes) as (decode, search):
        print(f"words: {source}; it knows {search.known} of the words" + (f"; {search.dropped} homophones left out" if search.dropped else ""))
        if args.tune:
            if valid is None:
                raise DataError("--tune: no validation part here; expected one; leave it out or give the settings")
            chosen = [k for k, i in enumerate(valid[1]) if corpus.labelled[i]]
            settings, figures["tuned"] = tune_words(decode, [valid[0][k] for k in chosen], [spoken_words(corpus.text[valid[1][k]]) for k in chosen], settings)
            _report_tuning(figures["tuned"], settings)
        start = time.perf_counter()
        sentences = decode(log_probs, settings)
        figures |= {"settings": settings, "sentences": len(sentences), "ms_per_sentence": 1000 * (time.perf_counter() - start) / max(1, len(sentences))}
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
            print(f"{corpus.ids[indices[labelled[k]]]}\n  reference  {' '.join(references[k])}\n  decoded    {' '.join(sentences[labelled[k]])}")
    else:
        print(f"words: {len(sentences)} sentences decoded, none labelled: no WER")
    if args.submission:
        write_submission(args.submission, [" ".join(sentence) for sentence in sentences], corpus, indices,
                         "25" if str(args.submission).endswith(".csv") else "24")
    return figures


def _word_figures(name: str, references: list[list[str]], hypotheses: list[list[str]]) -> dict:
    counts = per_counts(references, hypotheses)
    return {name: error_rate(counts), f"{name}_interval": list(trial_bootstrap(counts)),
            f"{name}_counts": dict(zip(("sub", "del", "ins", "words"), counts.sum(0).tolist(), strict=True))}


def _report_words(figures: dict, remark: str, processes: int) -> None:
    for name, title in (("wer", "WER, lexicon and LM"), ("nearest", "WER, greedy phonemes to the nearest words")):
        (low, high), counts = figures[f"{name}_interval"], figures[f"{name}_counts"]
        print(f"{title:<42} {figures[name]:.4f} 95 % [{low:.4f}, {high:.4f}]  sub {counts['sub']} del {counts['del']} ins {counts['ins']} of {counts['words']} words"
              + remark * (name == "wer"))
    print(f"{figures['outside_lexicon']} of the words scored are not in the lexicon; {figures['ms_per_sentence']:.1f} ms a sentence"
          + f" in {processes} processes, their start included" * (processes > 1))


def _report_tuning(tuned: dict, settings: dict) -> None:
    flags = " ".join(f"--{name.replace('_', '-')} {settings[name]:.4g}" for name in WORD_GRID)
    print(f"tuned on {tuned['sentences']} validation sentences, {tuned['searches']} searches: WER {tuned['before']:.4f} -> {tuned['after']:.4f} there with {flags}")


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
        self.day_weight, self.day_bias = (nn.Parameter(value.detach().clone()) for value in (model.day_weight, model.day_bias))
        self.dropout = nn.Dropout(sizes["input_dropout"])
        self.unfold = nn.Unfold((model.kernel, 1), stride=model.stride)
        self.gru = nn.GRU(sizes["channels"] * model.kernel, sizes["hidden"], sizes["layers"], batch_first=True, dropout=sizes["dropout"])
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
        x = torch.einsum("btc,bcd->btd", x, self.day_weight.index_select(0, day)) + self.day_bias.index_select(0, day).unsqueeze(1)
        windows = self.unfold(self.dropout(functional.softsign(x)).transpose(1, 2).unsqueeze(3))  # (B, C * kernel, F)
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
    return next(iter(DataLoader(dataset, batch, shuffle=True, generator=torch.Generator().manual_seed(step), **options)))


def _without_lengths(batch: dict, device: torch.device) -> dict:
    """The batch on the device, but for the lengths: the model and the CTC loss read them on the CPU."""
    return batch | {key: batch[key].to(device, non_blocking=True) for key in ("x", "day", "labels")}


def _decoder_loss(model: nn.Module, batch: dict, x: Tensor, amp: torch.dtype | None, device: torch.device) -> Tensor:
    with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
        logits, frames = model(x, batch["lengths"], batch["day"])
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    return functional.ctc_loss(log_probs, batch["labels"], frames, batch["label_lengths"])


def _decoder_step(model: nn.Module, optimizer: torch.optim.Optimizer, draw: Callable, amp: torch.dtype | None, device: torch.device) -> tuple:
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
    return time.perf_counter() - start, loaded - start, torch.cuda.max_memory_allocated(device) / 2**20 if cuda else float("nan")


def bench_decoder(args: argparse.Namespace, amp: torch.dtype | None) -> dict:
    """Training steps of GRUDecoder (the trainer's way: one lasting loader, exact lengths) and of PlainGRUDecoder (a fresh
    iterator per step, windows, padding, float32), in turn, on the same trials, with the same noise, mask and optimiser."""
    device, warm_up = args.device, 1
    corpus, model = random_speech(4 * args.batch), GRUDecoder(hidden=args.width).to(device)
    dataset = SpeechTrials(corpus, np.arange(len(corpus.ids)), np.arange(len(corpus.days)))
    rivals = {"GRUDecoder": model, "plain": PlainGRUDecoder(model).to(device)}
    draws = [_fresh_batch(range(len(dataset)), args.batch, step).tolist() for step in range(warm_up + args.steps)]
    workers = 4 if device.type == "cuda" else 0
    lasting = iter(DataLoader(dataset, batch_sampler=draws, collate_fn=collate_speech, num_workers=workers, pin_memory=device.type == "cuda"))
    first = _without_lengths(collate_speech([dataset[i] for i in draws[0]]), device)
    with torch.no_grad():
        losses = [float(_decoder_loss(rival.eval(), first, first["x"], None, device)) for rival in rivals.values()]
    optimizers = {name: torch.optim.AdamW(rival.train().parameters(), lr=1e-3) for name, rival in rivals.items()}
    taken: dict[str, list] = {name: [] for name in rivals}
    for step in range(warm_up + args.steps):
        sources = {"GRUDecoder": lambda: next(lasting), "plain": lambda k=step: _fresh_batch(dataset, args.batch, k, collate_fn=collate_speech)}
        for name, rival in rivals.items():
            taken[name].append(_decoder_step(rival, optimizers[name], sources[name], amp if rival is model else None, device))
    median = {name: np.median(values[warm_up:], axis=0) for name, values in taken.items()}
    lengths = [dataset.corpus.lengths[draw] for draw in draws[warm_up:]]
    about = hardware(device)
    print(f"{about['gpu'] or about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}, "
          f"device {device.type}, dtype {'float32' if amp is None else args.amp}, plain float32, {datetime.now(timezone.utc):%Y-%m-%d}")
    print(f"batch {args.batch} trials of {np.mean(lengths):.0f} bins on average, longest {np.max(lengths)}; {1 - np.mean(lengths) / np.mean([n.max() for n in lengths]):.0%} "
          f"of a padded batch is padding; hidden {args.width}, {sum(w.numel() for w in model.parameters()) / 1e6:.1f} M parameters; median of {args.steps} steps")
    for name, (seconds, data, memory) in median.items():
        peak = f", peak {memory:.0f} MiB" if device.type == "cuda" else ""
        print(f"{name:<10} {1000 * seconds:8.1f} ms/step, of which the batch took {1000 * data:.1f}; {args.batch / seconds:8.1f} trials/s{peak}")
    ratio, difference = float(median["plain"][0] / median["GRUDecoder"][0]), abs(losses[0] - losses[1])
    if device.type == "cpu":
        print(f"peak memory of the process, both networks: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    print(f"ratio plain / GRUDecoder {ratio:.2f}; losses {losses[0]:.6f} and {losses[1]:.6f} differ by {difference:.1e} (float32, eval)")
    return {"ratio": ratio, "difference": difference, "losses": losses, **{f"{name}_seconds": float(m[0]) for name, m in median.items()}}


# -----------------------------------------------------------------------------------------------------------------
# Audio
# -----------------------------------------------------------------------------------------------------------------


def crop_starts(frames: int, length: int, crops: int | None = None) -> list[int]:
    """First frames of evenly spaced crops of `length` that reach both ends of `frames`; as many as cover them unless
    given. One, at 0, where a single crop holds all."""
    if frames <= length:
        return [0]
    count = crops or math.ceil(frames / length)
    return np.linspace(0, frames - length, count).round().astype(int).tolist() if count > 1 else [(frames - length) // 2]


def predict_ast(model: nn.Module, items: list[dict], info: dict, device: torch.device, batch: int = 8, crops: int | None = None) -> np.ndarray:
    """Ratings in [0, 1] of prepared items (data.prepare_ast), (n, 19) float64 in the order given.

    An item longer than the model's frames is the mean over evenly spaced crops (`crop_starts`); crops of a batch are of
    similar length, padded with silence and their lengths given. info: the checkpoint's data (mean, std, frames, and
    target_mean, target_std where the ratings were standardised)."""
    longest = model.model_args.get("frames") or info["frames"]
    jobs = [(min(int(item["frames"]), longest), i, start) for i, item in enumerate(items) for start in crop_starts(int(item["frames"]), longest, crops)]
    jobs.sort()
    total, count = np.zeros((len(items), len(LABELS))), np.zeros((len(items), 1))
    training, model = model.training, model.to(device).eval()
    with torch.no_grad():
        for first in range(0, len(jobs), batch):
            chosen = jobs[first:first + batch]
            x = torch.full((len(chosen), max(chosen[-1][0], PATCH), MELS), SILENCE)
            for row, (length, i, start) in zip(x, chosen, strict=True):
                row[:length] = torch.as_tensor(np.asarray(items[i]["fbank"][start:start + length], np.float32))
            lengths = torch.tensor([length for length, _, _ in chosen])
            out = model(normalise_fbank(x, info["mean"], info["std"]).to(device), lengths.to(device))
            index = [i for _, i, _ in chosen]
            np.add.at(total, index, out.double().cpu().numpy())
            np.add.at(count, index, 1)
    model.train(training)
    mean, std = (np.asarray(info.get(key) if info.get(key) is not None else default, np.float64) for key, default in (("target_mean", 0.0), ("target_std", 1.0)))
    return (total / np.maximum(count, 1) * std + mean).clip(0, 1)


def audio_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [parser.add_argument("--audio", metavar="DIR", help="audio: recordings NAME.wav; of a pre-training, where MAESTRO's are (off: rendered from the MIDI)"),
            parser.add_argument("--crops", type=number(int, 1), metavar="N", help="audio: crops of an item that is longer than the model's frames (as many as cover it)")]


def audio_store(corpus: Corpus, args: argparse.Namespace, trained_on: str | None = None) -> FbankStore:
    """Log-mel energies of the corpus, of --audio or rendered; says where a model was trained on the other (`trained_on`)."""
    store = percepiano_audio(corpus, args.cache, args.audio)
    for line in store.left_out:
        print(f"left out: {line}")
    kind = "wav" if args.audio else "rendered"
    if trained_on not in (None, kind):
        print(f"trained on audio of kind {trained_on}, evaluated on {kind}" + "; recordings: --audio DIR" * (kind == "rendered"))
    return store


def audio_statistics(x: np.ndarray) -> np.ndarray:
    """Mean, deviation and 10 / 50 / 90 % quantiles over time of every band of x (frames, 128), and seconds: (641,) float64."""
    x = np.asarray(x, np.float64)
    return np.concatenate([x.mean(0), x.std(0), *np.quantile(x, (0.1, 0.5, 0.9), axis=0), [len(x) / 100]])


def evaluate_pretraining(args: argparse.Namespace, loaded: list[tuple]) -> dict:
    """The trainer's own validation figures of one pre-training: its crops and masks, of --data, normalised as the model knows it."""
    import pretrain_ast  # which imports this module

    (path, model, ckpt), data = loaded[0], loaded[0][2]["data"]
    if len(loaded) > 1 or args.csv or args.save_results or args.crops:
        raise DataError(f"{path}: a pre-training, which rates nothing; expected it alone, without --csv, --save-results, --crops; give a fine-tuned best.pt")
    if args.data is None and not data["synthetic"]:
        raise DataError(f"{path}: trained on real data; its scores on the synthetic corpus mean nothing; give --data DIR")
    own = {"data": args.data, "audio": args.audio, "cache": args.cache, "device": str(args.device)}
    settings = argparse.Namespace(**{**vars(pretrain_ast.parse_args([])), **ckpt["args"], **own})
    _, batches, now = pretrain_ast.pretrain_data(settings, False, print)
    if now["recordings"] != data["recordings"]:
        print("other recordings than the model was trained with: some that validate here may have trained it")
    for batch in batches:
        batch["x"] = normalise_fbank(batch["x"] * 2 * now["std"] + now["mean"], data["mean"], data["std"])
    figures = pretrain_ast.validate(model.to(args.device), batches, data, args.device, settings)
    print("SYNTHETIC corpus: figures say nothing about real recordings" if now["synthetic"] else f"real data in {args.data}")
    print(f"{path}, step {ckpt['step']}, {sum(len(batch['names']) for batch in batches)} fixed crops that validate")
    print(f"NCE {figures['valid_nce']:.4f}, accuracy {figures['valid_accuracy']:.4f} (chance {figures['valid_chance']:.4f})")
    print(f"MSE {figures['valid_mse']:.5f} (of the mean patch {figures['valid_mse_mean']:.5f})")
    return figures


# -----------------------------------------------------------------------------------------------------------------
# Audio: significance
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


def permutation_p(y: np.ndarray, p: np.ndarray, groups: Iterable[str], n: int = 1000, seed: int = 7, folds: np.ndarray | None = None) -> np.ndarray:
    """One-sided p-value per dimension, (D,), of the Pearson correlation (mean over folds) if predictions knew nothing.

    y, p (n, D); groups (n,). Items of a group are alike on both sides, so items alone must not be exchanged: every group
    receives the predictions of a whole group of its fold, in random order (cut or repeated where that one is larger or
    smaller). Folds that hold the same groups are permuted alike. p = (1 + draws as good as the observed) / (1 + n)
    (Phipson & Smyth, 2010)."""
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    folds = np.zeros(len(y), int) if folds is None else np.asarray(folds)
    keys, inverse = np.unique(np.asarray(groups), return_inverse=True)
    members = [[rows for k in range(len(keys)) if len(rows := np.flatnonzero((inverse == k) & (folds == fold)))] for fold in np.unique(folds)]
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
                shuffled = rows[donor][np.argsort(within[groups_here[donor], :len(rows[donor])])]
                source[rows[k]] = np.resize(shuffled, len(rows[k]))
        as_good += _by_fold(pearson, everything, folds, y, p[source]) >= observed - 1e-12
    return (1 + as_good) / (1 + n)


def holm(p: Iterable[float]) -> np.ndarray:
    """p-values adjusted for their number (Holm, 1979), in the order given: times m, m - 1, ... from the smallest on, never
    falling, at most 1. NaN stays NaN and does not count."""
    p = np.asarray(p, np.float64)
    adjusted, order = np.full(p.shape, np.nan), np.argsort(p)[:np.isfinite(p).sum()]
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted


def paired_bootstrap(y: np.ndarray, pa: np.ndarray, pb: np.ndarray, groups: Iterable[str], statistic: Callable = mean_r2,
                     folds: np.ndarray | None = None, n: int = 5000, seed: int = 7) -> tuple:
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
    share = np.minimum((draws < 1e-12).sum(0) + 1, (draws > -1e-12).sum(0) + 1) / (len(draws) + 1)  # a tie but for rounding is one
    return observed, (interval[0], interval[1]), np.minimum(2 * share, 1)


def _stacked(records: list[dict], truth: dict[str, np.ndarray], part: str, view: str) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Names, truth, predictions and folds of all rated items of a part and view, fold after fold."""
    rows = [(name, truth[name], p, record["fold"]) for record in records if record["part"] == part
            for name, p in zip(record["names"], record["p"], strict=True)
            if name in truth and not (view == "no_renderings" and is_rendering(name))]
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
                draws = (_by_fold(lambda y, p: np.stack([pearson(y, p), r2(y, p)]), rows, folds, y, p) for rows in _cluster_draws(groups, n, 7))
                intervals = _percentiles(draws, n)[1]
            except ValueError:
                continue
            chance = permutation_p(y, p, groups, n, folds=folds)
            result[part][view] = {"pearson_interval": intervals[:, 0].T.tolist(), "r2_interval": intervals[:, 1].T.tolist(),
                                  "p": chance.tolist(), "p_holm": holm(chance).tolist()}
    return result


def _print_significance(tests: dict) -> None:
    for part, views in tests.items():
        shown = {view: figures for view, figures in views.items() if figures}
        if not shown:
            continue
        print(f"{part + ': 95 % interval of r, p by permutation (Holm)':<52}" + "   ".join(f"{VIEWS[view]:<32}" for view in shown).rstrip())
        for d, label in enumerate(LABELS):
            cells = [(*figures["pearson_interval"][d], figures["p"][d], figures["p_holm"][d]) for figures in shown.values()]
            print(f"  {label:<50}" + "   ".join(f"r [{low:6.3f}, {high:6.3f}] {chance:.3f} ({corrected:.3f})" for low, high, chance, corrected in cells))


def compare(argv: list[str]) -> dict:
    """`python eval.py compare`: paired test of two sets of predictions on the items that both rate; returns its figures."""
    parser = argparse.ArgumentParser(prog="eval.py compare", description="Is A better than B? Paired cluster bootstrap, Holm over the 19 dimensions.")
    for side in "ab":
        parser.add_argument(f"--{side}", nargs="+", required=True, metavar="FILE", help="CSV of --save-results, or best.pt of one or more folds or seeds")
    parser.add_argument("--part", choices=["valid", "test"], default="valid")
    parser.add_argument("--metric", choices=["pearson", "r2"], default="pearson")
    parser.add_argument("--cluster", choices=["segment", "performer"], default="segment", help="what is drawn as a whole (%(default)s)")
    parser.add_argument("--no-renderings", action="store_true", help="without the score renderings")
    parser.add_argument("--draws", type=number(int, 100), default=5000, help="(%(default)s)")
    parser.add_argument("--batch", type=number(int, 1), help="items per forward pass of checkpoints (16; audio 8)")
    audio_options(parser)
    args = _parse(parser, argv)
    (records_a, split_a), (records_b, split_b) = (_compared_records(paths, args) for paths in (args.a, args.b))
    if split_a and split_b and split_a != split_b:
        raise DataError(f"{args.a[0]} is of split {split_a}, {args.b[0]} of {split_b}; expected one split; compare rows of the same")
    truth = read_labels(args.data or synthetic_percepiano(args.cache), [])[0]
    names, y, pa, pb, folds, apart = _paired(records_a, records_b, truth, args)
    groups = [segment_of(name) if args.cluster == "segment" else str(player_of(name)) for name in names]
    metric = {"pearson": pearson, "r2": r2}[args.metric]
    everything = np.arange(len(y))
    a, b = (_by_fold(metric, everything, folds, y, p) for p in (pa, pb))
    difference, (low, high), chance = paired_bootstrap(y, pa, pb, groups, lambda y, p: np.append(v := metric(y, p), v.mean()), folds, args.draws)
    corrected = holm(chance[:-1])
    print(f"A {' '.join(args.a)}\nB {' '.join(args.b)}\n{args.part}, {len(set(names))} items in {len(np.unique(folds))} folds, {len(set(groups))} clusters ({args.cluster}s), "
          f"{args.draws} draws" + f"; {apart} items that only one side predicts left out" * bool(apart)
          + ("" if args.data else "; SYNTHETIC corpus: figures say nothing about real performances"))
    print(f"{args.metric:<52}     A      B    A - B  95 % interval       p      p (Holm)")
    for d, label in enumerate([*LABELS, "mean"]):
        ends = (a[d], b[d]) if d < len(LABELS) else (a.mean(), b.mean())
        print(f"  {label:<50}{ends[0]:6.3f} {ends[1]:6.3f}  {difference[d]:6.3f} [{low[d]:6.3f}, {high[d]:6.3f}]  {chance[d]:.4f}" + (f"  {corrected[d]:.4f}" if d < len(LABELS) else ""))
    verdict = _verdict(args.metric, difference, (low, high), chance, corrected)
    print(verdict)
    return {"items": len(set(names)), "clusters": len(set(groups)), "a": float(a.mean()), "b": float(b.mean()), "difference": float(difference[-1]),
            "interval": [float(low[-1]), float(high[-1])], "p": float(chance[-1]), "verdict": verdict,
            "per_dimension": {"difference": difference[:-1].tolist(), "interval": np.stack([low, high], 1)[:-1].tolist(), "p": chance[:-1].tolist(), "p_holm": corrected.tolist()}}


def _verdict(metric: str, difference: np.ndarray, interval: tuple, chance: np.ndarray, corrected: np.ndarray) -> str:
    clear = [[label for label, d, c in zip(LABELS, difference, corrected, strict=False) if c < 0.05 and sign * d > 0] for sign in (1, -1)]
    says = "cannot be told from B" if not chance[-1] < 0.05 else "is better than B" if difference[-1] > 0 else "is worse than B"
    dimensions = "; ".join(f"{word} in {len(names)} of {len(LABELS)} dimensions" + f" ({', '.join(names)})" * bool(names) for word, names in zip(("better", "worse"), clear, strict=True))
    return (f"A {says}: mean {metric} {difference[-1]:+.4f} [{interval[0][-1]:.4f}, {interval[1][-1]:.4f}], p = {chance[-1]:.4f}; "
            f"after Holm's correction {dimensions}.")


def _compared_records(paths: list[str], args: argparse.Namespace) -> tuple[list[dict], str | None]:
    """Predictions of one side, and their split where it is known: of checkpoints, or of a CSV from the JSON beside it."""
    if paths[0].endswith(".csv"):
        if len(paths) > 1:
            raise DataError(f"{paths[1]}: a second file beside {paths[0]}; expected one CSV, which holds all folds; leave it out")
        try:
            split = json.loads(Path(paths[0]).with_suffix(".json").read_text(encoding="utf-8"))["split"]
        except (OSError, ValueError, KeyError, TypeError):
            split = None
        return read_predictions(Path(paths[0])), split
    folds, data = _load_fold_models(_load_models(paths))
    return fold_records(folds, _corpus_of(data, argparse.Namespace(**vars(args), ckpt=paths)), args, (args.part,)), data["split"]


def _paired(records_a: list[dict], records_b: list[dict], truth: dict[str, np.ndarray], args: argparse.Namespace) -> tuple:
    """Names, truth, predictions of A and of B and folds of the rated items that both predict in the same fold; and how many one lacks."""
    view = "no_renderings" if args.no_renderings else "all"
    sides = []
    for records in (records_a, records_b):
        names, y, p, folds = _stacked(records, truth, args.part, view)
        sides.append({(int(fold), name): (truth, row) for fold, name, truth, row in zip(folds, names, y, p, strict=True)})
    both = sorted(sides[0].keys() & sides[1].keys())
    if len({segment_of(name) for _, name in both}) < 2:
        raise DataError(f"{args.a[0]}, {args.b[0]}: {len(both)} rated items of part {args.part} that both predict in the same fold; expected items of at least "
                        "two segments; give rows of one split, and the --data that they were made with")
    y, pa, pb = (np.array(column) for column in zip(*((sides[0][k][0], sides[0][k][1], sides[1][k][1]) for k in both), strict=True))
    return [name for _, name in both], y, pa, pb, np.array([fold for fold, _ in both]), len(sides[0].keys() ^ sides[1].keys())


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
    _, pair = np.unique(np.stack([item, np.unique(raters, return_inverse=True)[1]], 1), axis=0, return_inverse=True)
    columns = [_ceiling_column(item[there], pair.ravel()[there], column[there]) for column, there in zip(ratings.T, np.isfinite(ratings).T, strict=True)]
    figures = {key: np.array([column[key] for column in columns]) for key in columns[0]}
    return {**figures, "pearson": np.sqrt(figures["r2"].clip(min=0)), "items": int(item.max()) + 1, "per_item": len(names) / (int(item.max()) + 1)}


def _ceiling_column(item: np.ndarray, pair: np.ndarray, x: np.ndarray) -> dict[str, float]:
    """`rater_ceiling` of one dimension: item and (item, rater) pair of every rating x."""
    item, (pair, m) = np.unique(item, return_inverse=True)[1], np.unique(pair, return_inverse=True, return_counts=True)[1:]
    N, mean = np.bincount(item), np.bincount(item, x) / np.bincount(item)
    of_pair = np.zeros(len(m), int)
    of_pair[pair] = item
    concentration = np.bincount(of_pair, m**2, len(N)) / N  # sum_j(m_ij²) / N_i, 1 if nobody rated twice
    within_pair, within_item = ((x - (np.bincount(pair, x) / m)[pair]) ** 2).sum(), ((x - mean[item]) ** 2).sum()
    repeats, free = len(x) - len(m), len(x) - len(N)
    error = within_pair / repeats if repeats else 0.0
    between = max(0.0, (within_item - error * free) / max((N - concentration).sum(), 1e-12)) if free else np.nan
    noise, spread = (between * concentration / N + error / N).mean(), mean.var()
    several = N > 1
    variance = np.bincount(item, (x - mean[item]) ** 2)[several] / (N[several] - 1)
    return {"r2": 1 - noise / spread if spread > 0 else np.nan, "independent": 1 - (variance / N[several]).mean() / spread if spread > 0 and several.any() else np.nan,
            "between": between, "error": error, "spread": spread}


def ceiling(argv: list[str]) -> dict:
    """`python eval.py ceiling`: prints `rater_ceiling` of all rated performances, with and without score renderings; returns both."""
    parser = argparse.ArgumentParser(prog="eval.py ceiling", description="What the raters' disagreement leaves to reach: R² and Pearson of perfect knowledge of the true ratings.")
    args = _parse(parser, argv)
    root = Path(args.data or synthetic_percepiano(args.cache))
    raters, names, ratings = read_ratings(root)
    print(f"{root}" + " (SYNTHETIC: figures say nothing about real raters)" * (root / "SYNTHETIC").is_file())
    human = np.array([not is_rendering(name) for name in names])
    views = {view: rater_ceiling(raters[chosen], names[chosen], ratings[chosen] / 7) for view, chosen in zip(VIEWS, (human | True, human), strict=True)}
    for view, c in views.items():
        print(f"{VIEWS[view]}: {c['items']} items, {c['per_item']:.1f} ratings each; mean R2 {c['r2'].mean():.3f}, Pearson {c['pearson'].mean():.3f}; "
              f"R2 {c['independent'].mean():.3f} if every rating were another rater's")
    print(f"{'':<52}" + "   ".join(f"{VIEWS[view]:<34}" for view in views).rstrip())
    for d, label in enumerate(LABELS):
        print(f"  {label:<50}" + "   ".join(f"R2 {c['r2'][d]:.3f} r {c['pearson'][d]:.3f} (independent {c['independent'][d]:.3f})" for c in views.values()))
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
        crop = energies[first:first + (span - 1) * model.stride + PATCH]
        share[:, start:start + span] += roll_out(model, crop[None].to(device))[0].double().cpu().numpy()
        crops[start:start + span] += 1
    return share / crops, starts


def hertz_to_band(hertz: Iterable[float]) -> np.ndarray:
    """Where frequencies lie on the axis of data.fbank's 128 bands, 0 = the middle of the first; within the bands' edges."""
    low, high, mel = (1127 * np.log1p(np.asarray(f, float) / 700) for f in (20, SAMPLE_RATE / 2, hertz))
    return ((mel - low) / (high - low) * (MELS + 1) - 1).clip(-0.5, MELS - 0.5)


def draw_attention(out: Path, energies: np.ndarray, share: np.ndarray, starts: list[int], stride: int, title: str) -> None:
    """Shares (rows, columns) in colour over the spectrogram (frames, 128), natural logarithms of energy, in grey; ticks at
    the crops' borders. Written as out's suffix says, 1600 x 600 pixels."""
    # Here, because it takes half a second; without pyplot it asks for no display.
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    figure = Figure(PICTURE, dpi=100, layout="constrained")
    axes = figure.subplots()
    level = 10 / math.log(10) * (energies.T - energies.max())  # dB
    second = FRAME / SAMPLE_RATE / 2, HOP / SAMPLE_RATE  # middle of frame 0, and the step from frame to frame
    seconds = [second[0] + second[1] * (np.array(edges) - 0.5) for edges in ((0, len(energies)), stride * np.array([0, share.shape[1]]) + (PATCH - stride) / 2)]
    bands = [stride * edge + (PATCH - stride) / 2 - 0.5 for edge in (0, len(share))]
    axes.imshow(level, cmap="gray_r", vmin=QUIETEST, vmax=0, origin="lower", aspect="auto", extent=(*seconds[0], -0.5, MELS - 0.5))
    low, high = np.percentile(share, [1, 99])
    scale = TwoSlopeNorm(1, min(low, 0.999), max(high, 1.001))
    shades = axes.imshow(share, cmap="coolwarm", norm=scale, alpha=0.6, origin="lower", aspect="auto", interpolation="nearest",
                         extent=(*seconds[1], *bands))
    axes.set(xlim=(0, seconds[0][1]), ylim=(-0.5, MELS - 0.5), xlabel="time (s)", ylabel="frequency (Hz), mel scale")
    axes.set_yticks(hertz_to_band(HERTZ), [str(f) if f < 1000 else f"{f // 1000} k" for f in HERTZ])
    for start in starts[1:]:
        axes.axvline(seconds[1][0] + start * stride * second[1], color="black", linewidth=1.5, linestyle=":")
    axes.set_title(title, parse_math=False)
    bar = figure.colorbar(shades, ax=axes, extend="both", pad=0.01)
    bar.set_label("attention that reaches the output\n(1 = the same from every patch)")
    write_atomic(out, lambda file: figure.savefig(file, format=out.suffix[1:]))


def read_piece(args: argparse.Namespace) -> tuple[str, np.ndarray]:
    """Path and log-mel energies (frames, 128) of --audio, or of --midi as the built-in piano plays it."""
    path, waveform = (args.audio, read_wav(args.audio)) if args.audio else (args.midi, render(read_midi(args.midi)))
    if fbank_frames(len(waveform)) < PATCH:
        shortest = (FRAME + (PATCH - 1) * HOP) / SAMPLE_RATE
        raise DataError(f"{path}: {len(waveform) / SAMPLE_RATE:.3f} s of sound; expected at least {shortest} s, one patch of {PATCH} frames; give a longer piece")
    return path, fbank(torch.from_numpy(waveform)).numpy()


def check_picture(out: Path) -> None:
    """Refuses, before anything is computed, a picture that could not be written."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise DataError(f"{out}: a picture of kind {out.suffix!r}; expected .png, .pdf or .svg; name it so")
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"{out}: {'a folder' if out.is_dir() else f'no file can be written in {folder}'}; expected a file in a writable folder; name another")


def attention(argv: list[str]) -> dict:
    """`python eval.py --attention OUT`: the roll-out of one AST checkpoint on one file, drawn; returns shares and crops."""
    parser = argparse.ArgumentParser(prog="eval.py --attention", usage="eval.py --attention OUT.png --audio FILE.wav | --midi FILE.mid --ckpt FILE",
                                     description="Which parts of a piece reach an AST's output, over its spectrogram (1600 x 600).")
    parser.add_argument("--attention", required=True, metavar="OUT", help="picture to write: .png, .pdf or .svg")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--audio", metavar="FILE", help="WAV file of any length")
    source.add_argument("--midi", metavar="FILE", help="MIDI file, played by the built-in piano")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="best.pt of pretrain_ast.py, pre-trained or fine-tuned")
    args = _parse(parser, argv)
    out = Path(args.attention)
    check_picture(out)
    model, ckpt = load_checkpoint(args.ckpt)
    data = ckpt.get("data") or {}
    if not isinstance(model, AST):
        raise DataError(f"{args.ckpt}: a checkpoint of task {ckpt['task']!r}; expected 'ast', which has attention; give one of pretrain_ast.py")
    if model.model_args["mel"] != MELS or not {"mean", "std"} <= data.keys():
        raise DataError(f"{args.ckpt}: for {model.model_args['mel']} mel bands, data with {sorted(data)}; expected {MELS}, mean and std; train it again")
    path, energies = read_piece(args)
    share, starts = roll_out_file(model, torch.from_numpy(normalise_fbank(energies, data["mean"], data["std"])).float(), args.device)
    sizes, kind = model.model_args, "pre-trained" if model.model_args["num_outputs"] is None else "fine-tuned"
    about = f"{kind} AST {sizes['width']} x {sizes['depth']} x {sizes['heads']}{', synthetic data' * bool(data.get('synthetic'))}"
    title = f"Attention roll-out of {args.ckpt} ({about})\n{Path(path).name}{', rendered' * bool(args.midi)}: " \
            f"{len(energies) * HOP / SAMPLE_RATE:.1f} s in {len(starts)} crop{'s, borders dotted' * (len(starts) > 1)}; darkness: level, {-QUIETEST} dB from white to black"
    draw_attention(out, energies, share, starts, model.stride, title)
    print(f"{out}: {share.shape[1]} x {share.shape[0]} patches in {len(starts)} crops, shares {share.min():.3g} to {share.max():.3g} of an even one")
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
        if model.decoder is not None or model.extra is not None or model.model_args["num_outputs"] is not None:
            raise ValueError(f"plain AST: only pre-training with all patches, without tokens of their own; got {model.model_args}")
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
        both = blocks(seen, width, len(model.blocks)) + 2 * seen * width * narrow + blocks(tokens, narrow, len(model.decoder))
        width = narrow
    both += 2 * 2 * masked * width * (width + pixels)  # two heads
    one = passes * 2 * tokens * pixels * model.model_args["width"] + 2 * masked**2 * pixels  # projection of the patches; scores
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
    return time.perf_counter() - start, time.process_time() - busy, torch.cuda.max_memory_allocated(device) / 2**20 if cuda else math.nan


def _pretrain_loss(model: nn.Module, clips: Tensor, mask: Tensor, **second: Tensor) -> Tensor:
    out = model(clips, mask=mask, **second)
    return out["nce"] + 10 * out["mse"]


def _pretrain_step(model: nn.Module, optimizer: torch.optim.Optimizer, clips: Tensor, draw: Callable, amp: torch.dtype | None) -> None:
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
    ways = {"cluster_mask": lambda: cluster_mask(batch, rows, columns, count, device),
            "loop": lambda: plain_mask(batch, rows, columns, count, rng).to(device)}
    taken = [[_clock(way, device)[:2] for way in ways.values()] for _ in range(1 + rounds)][1:]
    (fast, fast_busy), (slow, slow_busy) = (1000 * np.median(taken, axis=0)).tolist()
    busy_ratio = slow_busy / fast_busy
    print(f"masks of {batch} clips, {count} of {rows * columns} patches: cluster_mask {fast:.2f} ms, loop {slow:.1f} ms, ratio {slow / fast:.0f} (of CPU time {busy_ratio:.0f})")
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
    ours, loop = functools.partial(cluster_mask, args.batch, rows, columns, N, device), functools.partial(plain_mask, args.batch, rows, columns, N, rng)
    draws = {name: lambda: {"mask": ours()} for name in rivals}
    draws["plain"] = lambda: {"mask": loop().to(device), "second": loop().to(device)}
    same = ours()
    with torch.no_grad():
        losses = [[float(out[key]) for key in ("nce", "mse")] for out in (model.eval()(clips, mask=same), rivals["plain"].eval()(clips, same, same))]
    work = {name: args.batch * pretrain_flops(model if name == "plain" else rival, N, 2 if name == "plain" else 1) for name, rival in rivals.items()}
    optimizers = {name: torch.optim.AdamW(rival.train().parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01) for name, rival in rivals.items()}
    taken: dict[str, list] = {name: [] for name in rivals}
    for _ in range(warm_up + args.steps):
        for name, rival in rivals.items():
            dtype = None if name == "plain" else amp
            taken[name].append(_clock(functools.partial(_pretrain_step, rival, optimizers[name], clips, draws[name], dtype), device))
    median = {name: np.median(values[warm_up:], axis=0) for name, values in taken.items()}
    peaks = {dtype: matmul_peak(device, dtype) for dtype in {torch.float32, amp or torch.float32}}
    about = hardware(device)
    print(f"{about['gpu'] or about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}, "
          f"device {device.type}, dtype {'float32' if amp is None else args.amp}, plain float32, {datetime.now(timezone.utc):%Y-%m-%d}")
    print(f"batch {args.batch} clips of {args.frames} frames, {N} of {rows * columns} patches masked; {args.preset}, "
          f"{sum(w.numel() for w in model.parameters()) / 1e6:.1f} M parameters; median of {args.steps} steps")
    for name, (seconds, busy, memory) in median.items():
        dtype = torch.float32 if name == "plain" or amp is None else amp
        rate, kept = (work[name] / seconds, f", peak {memory:.0f} MiB") if device.type == "cuda" else (work[name] / busy, f", CPU time {1000 * busy:.1f} ms")
        print(f"{name:<7} {1000 * seconds:8.1f} ms/step {args.batch / seconds:7.2f} clips/s{kept}; {work[name] / 1e9:.1f} GFLOP, {work[name] / seconds / 1e9:.1f} GFLOP/s; "
              f"{rate / 1e9:.1f}{' by CPU time' * (device.type == 'cpu')}, {rate / peaks[dtype]:.0%} of the {peaks[dtype] / 1e9:.0f} of a large {str(dtype)[6:]} matrix product")
    ratio, busy_ratio, _ = (float(r) for r in median["plain"] / median["AST"])
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    if device.type == "cpu":
        print(f"peak memory of the process, all networks: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    print(f"ratio plain / AST {ratio:.2f} (of CPU time {busy_ratio:.2f}); nce {losses[0][0]:.6f}, mse {losses[0][1]:.6f} differ by at most {difference:.1e} (same masks, float32, eval)")
    result = {"ratio": ratio, "cpu_ratio": busy_ratio, "difference": difference, "losses": losses, "flops": work, "peaks": {str(d): p for d, p in peaks.items()},
              **{f"{name}_seconds": float(m[0]) for name, m in median.items()}}
    if args.visible_only:
        result["visible_ratio"], result["visible_cpu_ratio"] = (float(r) for r in (median["AST"] / median["visible"])[:2])
        print(f"ratio AST / visible only {result['visible_ratio']:.2f} (of CPU time {result['visible_cpu_ratio']:.2f})")
    return result | bench_masks(device)


# -----------------------------------------------------------------------------------------------------------------
# Training curves
# -----------------------------------------------------------------------------------------------------------------
SCORE_KEYS = {"valid_per": "phoneme error rate, validation", "valid_r2": "R2, validation", "valid_accuracy": "NCE accuracy, validation", "valid_loss": "loss, validation"}


def read_metrics(run: str | Path) -> list[dict]:
    """The lines of a run folder's metrics.jsonl. A last line that a kill cut short is left out; DataError for anything else."""
    path, records = Path(run) / "metrics.jsonl", []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error.strerror if isinstance(error, OSError) else error}; expected the metrics of a run; give a run's folder") from error
    for n, line in enumerate(lines, 1):
        try:
            records.append({"step": int(json.loads(line)["step"]), **json.loads(line)})
        except (ValueError, KeyError, TypeError) as error:
            if n < len(lines):
                raise DataError(f"{path}: line {n} is no log record ({type(error).__name__}); expected a JSON object with a step; give another run") from error
    if not records:
        raise DataError(f"{path}: no log record; expected some; let the run reach its first --log-every")
    return records


def curves(argv: list[str]) -> dict:
    """`python eval.py curves`: score, loss, gradient norm and skipped updates of runs in one picture; returns the best score and skips by run."""
    parser = argparse.ArgumentParser(prog="eval.py curves", description="Training curves of runs in one picture: score, loss, gradient norm before clipping, skipped updates.")
    parser.add_argument("--run", nargs="+", required=True, metavar="DIR", help="run folders, such as runs/decoder/NAME")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write (.png, .svg, .pdf)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if (kind := Path(args.out).suffix.lower()) not in (".png", ".svg", ".pdf"):
        raise DataError(f"--out {args.out}: a picture of kind {kind or 'none'}; expected .png, .svg or .pdf")
    names = [Path(run).name for run in args.run]
    runs = {run if names.count(name) > 1 else name: read_metrics(run) for run, name in zip(args.run, names, strict=True)}
    score = next((key for key in SCORE_KEYS if all(any(key in r for r in records) for records in runs.values())), None)
    from matplotlib.figure import Figure  # takes a second
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = {key: (figure.add_subplot(2, 2, n), title) for n, (key, title) in enumerate(
        {score: SCORE_KEYS.get(score, "no evaluation"), "loss": "training loss", "norm": "gradient norm before clipping", "skips": "skipped updates so far"}.items(), 1)}
    for name, records in runs.items():
        lines = {key: [(r["step"], r[key]) for r in records if r.get(key) is not None] for key in (score, "loss", "norm")}
        lines["skips"] = [(r["step"], sum(r["skipped"].values())) for r in records if "skipped" in r]
        for key, (axes, _) in panels.items():
            axes.plot(*zip(*lines[key], strict=True) if lines[key] else ([], []), label=name, marker="o" if key == score else None, markersize=3, linewidth=1)
    for key, (axes, title) in panels.items():
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.set_yscale("log" if key == "norm" else "linear")
    panels[score][0].legend()
    file = io.BytesIO()
    figure.savefig(file, format=kind[1:], dpi=110)
    write_atomic(Path(args.out), lambda out: out.write(file.getvalue()))
    better = max if score in ("valid_r2", "valid_accuracy") else min
    best = {name: better((r[score] for r in records if r.get(score) is not None), default=None) for name, records in runs.items()}
    for name, records in runs.items():
        norms = [r["norm"] for r in records if r.get("norm") is not None]
        skipped = next((r["skipped"] for r in reversed(records) if "skipped" in r), {})
        print(f"{name:<32} {records[-1]['step']:>7} steps  best {score} {best[name]}  largest logged norm {max(norms, default=math.nan):.3g}  skipped {skipped}")
    print(f"saved {args.out}")
    return best


# -----------------------------------------------------------------------------------------------------------------
# Prediction
# -----------------------------------------------------------------------------------------------------------------


# -----------------------------------------------------------------------------------------------------------------
# Explanation
# -----------------------------------------------------------------------------------------------------------------


# -----------------------------------------------------------------------------------------------------------------
# Report
# -----------------------------------------------------------------------------------------------------------------


# -----------------------------------------------------------------------------------------------------------------
# Command line
# -----------------------------------------------------------------------------------------------------------------

COMMANDS = {"floor": floor, "bench": bench, "curves": curves, "ceiling": ceiling, "compare": compare}


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Options that every command shares, then all of them checked."""
    if not parser.prog.endswith(("bench", "--attention")):
        parser.add_argument("--data", metavar="DIR", help="the task's dataset in its public layout; absent = synthetic corpus")
        parser.add_argument("--cache", default="cache", metavar="DIR", help="extracted features")
    if parser.prog.split()[-1] not in ("bench", "ceiling", "compare", "--attention"):
        parser.add_argument("--csv", metavar="FILE", help="write the predictions here")
        parser.add_argument("--save-results", metavar="ROW", help="write RESULTS_DIR/han_ROW_<split> (or ast_) .json and .csv of both parts, or decoder_ROW_<part>")
        parser.add_argument("--results-dir", default="results", metavar="DIR")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if getattr(args, "save_results", None) and not re.fullmatch(r"[a-z0-9_]+", args.save_results):
        raise DataError(f"--save-results {args.save_results!r}: expected a row name of a-z, 0-9 and _, such as full")
    if args.device not in ("auto", "cpu", "cuda") or args.device == "cuda" and not torch.cuda.is_available():
        raise DataError(f"--device {args.device}: not available here; expected auto, cpu" + ", cuda" * torch.cuda.is_available())
    args.device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    args.command = "python " + shlex.join([*parser.prog.split(), *argv])
    return args


def main(argv: list[str] | None = None) -> dict:
    """Runs one command and returns its figures."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        if argv[0] not in COMMANDS:
            raise DataError(f"unknown command {argv[0]!r}; expected {', '.join(COMMANDS)}, or --ckpt FILE ... to evaluate")
        return COMMANDS[argv[0]](argv[1:])
    if any(option.split("=")[0] == "--attention" for option in argv):
        return attention(argv)
    return evaluate(argv)


if __name__ == "__main__":
    run_script("eval.py", main)
