"""Measures what the trainers write: metrics, evaluation of checkpoints, baselines and benchmarks.

    python eval.py --ckpt runs/han/NAME/best.pt --data DIR                    one fold, validation part
    python eval.py --ckpt fold0/best.pt ... fold3/best.pt --data DIR          each on its own fold, then mean and std over folds
    python eval.py --ckpt ... --data DIR --part test --csv predictions.csv    test part; unlabelled items are predicted only
    python eval.py --ckpt ... --data DIR --save-results full                  results/han_full_<split>.json and .csv, both parts
    python eval.py floor --task han --data DIR --fold all                     scikit-learn forest on the same parts
    python eval.py bench --task han                                           step time against the plain rendition

Several checkpoints of one fold (seeds) are averaged. Every figure stands with and without the score renderings
(players `Score`, `Score2`), with a 95 % bootstrap interval over segments. Without --data the synthetic corpus is used.
"""

import argparse
import copy
import csv
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from data import (
    FEATURE_SETS,
    FEATURES,
    LABELS,
    SPLITS,
    Corpus,
    DataError,
    collate_han,
    column_names,
    load_percepiano,
    number,
    percepiano_parts,
    player_of,
    pooled_statistics,
    prepare_han,
    run_script,
    segment_of,
    synthetic_percepiano,
    write_atomic,
)
from models import HAN, BiLSTM, ContextAttention, load_checkpoint

VIEWS = {"all": "all", "no_renderings": "without score renderings"}
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
    keys, inverse = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(inverse == k) for k in range(len(keys))]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(n):
        drawn = rng.integers(len(keys), size=len(keys))
        if (drawn == drawn[0]).all():
            continue
        rows = np.concatenate([members[k] for k in drawn])
        in_fold = [rows[folds[rows] == fold] for fold in np.unique(folds)]
        values.append(np.mean([statistic(y[r], p[r]) if len(r) else np.nan for r in in_fold]))
    values = np.array(values)[np.isfinite(values)]
    if 2 * len(values) < n:
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


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
            default_csv: Path | None = None) -> dict:
    """Measures, prints and writes predictions (to default_csv when some have no label); returns the metrics."""
    truth = {name: item["y"] for name, item in corpus.items.items() if item.get("y") is not None}
    if args.save_results:
        for record in records:  # rounded first, so that the JSON is exactly what the CSV gives
            record["p"] = np.array([[float(f"{value:.4f}") for value in row] for row in record["p"]])
    metrics = measure(records, truth)
    print(f"split {split}, " + ("SYNTHETIC corpus: figures say nothing about real performances" if corpus.synthetic
                                else f"real data in {corpus.root}"))
    _print_metrics(metrics)
    unlabelled = sorted({name for record in records for name in record["names"] if name not in truth})
    path = args.csv or (default_csv if unlabelled and not args.save_results else None)
    if path:
        write_predictions(path, records)
        print(f"{len(unlabelled)} unlabelled items predicted; all predictions in {path}")
    if args.save_results:
        stem = Path(args.results_dir) / f"han_{args.save_results}_{split}"
        saved = {"task": "han", "row": args.save_results, "split": split, "command": args.command, **git_state(),
                 "hardware": hardware(args.device), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                 "synthetic": corpus.synthetic, **about, "labels": list(LABELS), "metrics": metrics}
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


def _load_fold_models(paths: list[str]) -> tuple[dict[int, list[tuple]], dict]:
    """{fold: [(model, what of the checkpoint is needed), ...]} and the data settings that all must share."""
    folds: dict[int, list[tuple]] = {}
    first = None
    for path in paths:
        model, ckpt = load_checkpoint(path)
        if ckpt["task"] != "han":
            raise DataError(f"{path}: a checkpoint of task {ckpt['task']!r}; expected han; give one written by train_han.py")
        data = ckpt.get("data")
        if not isinstance(data, dict) or not isinstance(ckpt.get("args"), dict) or len(data.get("columns", ())) != model.model_args["input_size"]:
            raise DataError(f"{path}: without args, or without data that describe its {model.model_args['input_size']} columns; expected best.pt of train_han.py; train it again")
        first = first or data
        for key in ("split", "keep_overlap", "synthetic", "labels"):
            if data[key] != first[key]:
                raise DataError(f"{path}: {key} is {data[key]!r}; {paths[0]} has {first[key]!r}; evaluate them in separate runs")
        if list(data["labels"]) != list(LABELS):
            raise DataError(f"{path}: labels {str(data['labels'])[:60]}; expected the 19 of PercePiano in their order; train it again")
        kept = {key: ckpt.get(key) for key in ("data", "step", "epoch", "git_sha")}
        kept["args"] = {key: value for key, value in ckpt["args"].items() if key not in ("data", "cache", "out", "resume", "name", "device")}
        folds.setdefault(data["fold"], []).append((model, {"path": str(path), **kept}))
    return dict(sorted(folds.items())), first


def evaluate(argv: list[str]) -> dict:
    """`python eval.py --ckpt ...`: metrics of checkpoints, each on its own fold and split; returns them (see `measure`)."""
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="+", required=True, metavar="FILE", help="best.pt of one or more folds or seeds")
    parser.add_argument("--part", choices=["valid", "test"], default="valid", help="part to score; --save-results takes both")
    parser.add_argument("--batch", type=number(int, 1), default=16, help="items per forward pass")
    args = _parse(parser, argv)
    folds, data = _load_fold_models(args.ckpt)
    if args.data is None and not data["synthetic"]:
        raise DataError(f"{args.ckpt[0]}: trained on real data; its scores on the synthetic corpus mean nothing; give --data DIR")
    corpus = _load_corpus(args)
    if corpus.synthetic != data["synthetic"]:
        print(f"trained on {'synthetic' if data['synthetic'] else 'real'} data, evaluated on {'synthetic' if corpus.synthetic else 'real'}")
    records = []
    for fold, members in folds.items():
        keep_misaligned = members[0][1]["args"].get("keep_misaligned", False)
        parts = percepiano_parts(corpus, data["split"], fold, keep_overlap=data["keep_overlap"], keep_misaligned=keep_misaligned)
        seeds = [kept["args"].get("seed") for _, kept in members]
        print(f"fold {fold}: " + (f"predictions of {len(members)} checkpoints averaged, seeds {seeds}" if len(members) > 1
                                  else f"{members[0][1]['path']}, seed {seeds[0]}"))
        for part in ("valid", "test") if args.save_results else (args.part,):
            p = np.mean([predict_han(model, prepare_han(corpus, parts[part], kept["data"]), args.device, args.batch)
                         for model, kept in members], axis=0)
            records.append({"part": part, "fold": fold, "names": parts[part], "p": p})
    used = [kept for members in folds.values() for _, kept in members]
    about = {"seeds": [kept["args"].get("seed") for kept in used], "features": data["features"],
             "keep_overlap": data["keep_overlap"],
             "checkpoints": [{"path": kept["path"], "fold": kept["data"]["fold"], "epoch": kept["epoch"], "step": kept["step"],
                              "git_sha": kept["git_sha"], "args": kept["args"]} for kept in used]}
    return _finish(records, corpus, args, data["split"], about, Path(args.ckpt[0]).with_name(f"predictions_{args.part}.csv"))


# -----------------------------------------------------------------------------------------------------------------
# Floor: a forest on pooled note statistics
# -----------------------------------------------------------------------------------------------------------------


def floor(argv: list[str]) -> dict:
    """`python eval.py floor`: the ExtraTrees of HAN.md on the parts that the trainer uses; returns metrics (see `measure`)."""
    parser = argparse.ArgumentParser(prog="eval.py floor", description="A scikit-learn forest on pooled note statistics.")
    parser.add_argument("--task", choices=["han"], default="han")
    parser.add_argument("--split", choices=SPLITS, default="segment")
    parser.add_argument("--fold", choices=["0", "1", "2", "3", "all"], default="all")
    parser.add_argument("--features", choices=["full", "score", "perf"], default="full")
    parser.add_argument("--keep-overlap", action="store_true", help="train on notes shared with validation and test too")
    parser.add_argument("--keep-misaligned", action="store_true", help="train on items that do not match their score")
    parser.add_argument("--seed", type=number(int, 0), default=7)
    args = _parse(parser, argv)
    # Takes a second to import, and only the floor needs it.
    from sklearn.ensemble import ExtraTreesRegressor

    corpus = _load_corpus(args)
    columns = [corpus.columns.index(name) for name in column_names(FEATURE_SETS[args.features])]
    statistics = {name: pooled_statistics(item, columns, args.features) for name, item in corpus.items.items()}
    records = []
    for fold in range(4) if args.fold == "all" else [int(args.fold)]:
        parts = percepiano_parts(corpus, args.split, fold, keep_overlap=args.keep_overlap, keep_misaligned=args.keep_misaligned)
        forest = ExtraTreesRegressor(150, min_samples_leaf=3, max_features=0.3, random_state=args.seed, n_jobs=os.cpu_count())
        forest.fit(np.stack([statistics[name] for name in parts["train"]]),
                   np.stack([corpus.items[name]["y"] for name in parts["train"]]))
        for part in ("valid", "test"):
            p = forest.predict(np.stack([statistics[name] for name in parts[part]])) if parts[part] else np.zeros((0, len(LABELS)))
            records.append({"part": part, "fold": fold, "names": parts[part], "p": p})
    about = {"seeds": [args.seed], "features": args.features, "keep_overlap": args.keep_overlap}
    return _finish(records, corpus, args, args.split, about)


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
    """`python eval.py bench`: HAN against the same network written plainly, alternating step by step in one run."""
    parser = argparse.ArgumentParser(prog="eval.py bench", description="Step time of HAN against its plain rendition.")
    parser.add_argument("--task", choices=["han"], default="han")
    parser.add_argument("--width", type=number(int, 1), default=256, help="size of the model")
    parser.add_argument("--batch", type=number(int, 1), default=8, help="items per step")
    parser.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="autocast type; off = float32")
    parser.add_argument("--steps", type=number(int, 1), default=20, help="timed steps of each, after 3 of warm-up")
    parser.add_argument("--threads", type=number(int, 0), default=0, help="CPU threads; 0 = torch's default")
    args = _parse(parser, argv)

    if args.threads:
        torch.set_num_threads(args.threads)
    device, amp = args.device, {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    torch.manual_seed(7)
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


# -----------------------------------------------------------------------------------------------------------------
# Words
# -----------------------------------------------------------------------------------------------------------------


# -----------------------------------------------------------------------------------------------------------------
# Bench: decoder
# -----------------------------------------------------------------------------------------------------------------


# -----------------------------------------------------------------------------------------------------------------
# Command line
# -----------------------------------------------------------------------------------------------------------------

COMMANDS = {"floor": floor, "bench": bench}


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Options that every command shares, then all of them checked."""
    if "bench" not in parser.prog:
        parser.add_argument("--data", metavar="DIR", help="PercePiano in its public layout; absent = synthetic corpus")
        parser.add_argument("--cache", default="cache", metavar="DIR", help="extracted features")
        parser.add_argument("--csv", metavar="FILE", help="write the predictions here")
        parser.add_argument("--save-results", metavar="ROW", help="write RESULTS_DIR/han_ROW_<split>.json and .csv of both parts")
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
    return evaluate(argv)


if __name__ == "__main__":
    run_script("eval.py", main)
