"""Measures and uses what the trainers write: evaluation, prediction, pictures, reports, comparisons, floors.

    python eval.py --ckpt FILE ... [--data DIR]                  scores of checkpoints; folds: mean and std
    python eval.py --ckpt ... --part test --csv predictions.csv  test part; unlabelled: predicted only
    python eval.py --ckpt ... --data DIR --save-results full     results/han_full_<split>.json and .csv
    python eval.py predict --score S --midi M                    your own files; or --audio, or --speech
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

from data import (  # first: while torch loads, Ctrl-C is one line
    AS_PLAYED,
    BIN,
    FBANK_FORMAT,
    FBANK_MEAN,
    FBANK_STD,
    FEATURE_SETS,
    FEATURES,
    HOP,
    LABELS,
    LEAD,
    MELS,
    MIDI_KINDS,
    MISALIGNED,
    NOTE_ARRAYS,
    PHONEMES,
    RECORDED,
    SAMPLE_RATE,
    SOUND_KINDS,
    SPLITS,
    Corpus,
    DataError,
    FbankStore,
    Reading,
    SpeechCorpus,
    Version,
    all_statistics,
    bars_in_words,
    bars_named,
    clean_sentence,
    collate_han,
    collate_speech,
    column_names,
    cut_bars,
    describe_performance,
    files_below,
    fit_normalisation,
    fit_targets,
    follow,
    frames_needed,
    from_first_note,
    han_info,
    heard_energies,
    heard_versions,
    load_percepiano,
    map_days,
    normalise_fbank,
    number,
    open_speech,
    ordinary,
    other_kinds,
    pad_fbank,
    parse_name,
    passages,
    percepiano_audio,
    percepiano_parts,
    phonemize,
    player_of,
    prepare_ast,
    prepare_han,
    pretrain_data,
    printable,
    read_file,
    read_json,
    read_labels,
    read_midi,
    read_musicxml,
    read_ratings,
    read_sound,
    render,
    repair_lines,
    run_script,
    salad_trials,
    say_left_out,
    segment_of,
    short_hash,
    shown,
    sound_remarks,
    speech_parts,
    speech_rules,
    speech_trial,
    standardise_blocks,
    synthetic_percepiano,
    synthetic_speech,
    write_atomic,
    write_text,
)

# isort: split
import argparse
import base64
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from html import escape
from pathlib import Path

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from models import (
    AMP_TYPES,
    AST,
    AST_PRESETS,
    DEVICES,
    HAN,
    PATCH,
    Block,
    ClipKernel,
    ContextAttention,
    GRUDecoder,
    KernelRidge,
    cluster_mask,
    crop_starts,
    git_state,
    group_softmax,
    load_checkpoint,
    peak_memory,
    save_ensemble,
    save_half,
    whole_crops,
    write_json,
)

VIEWS = {"all": "all", "no_renderings": "without score renderings"}
AUDIO_TASKS = ("ast", "cnn", "mlp", "clip_kernel")  # that rate sound
MAX_NOTES = 420  # of a PercePiano performance
NORMAL_80 = 1.2816  # standard deviations on either side that hold 80 % of a normal distribution

# ------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------


def r2(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Coefficient of determination per dimension, (D,), of truth y and prediction p, (n, D): scikit-learn's
    in a tenth of its time, which bootstraps need. NaN, undefined, of constant truth."""
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    residual = ((y - p) ** 2).sum(0)
    total = ((y - y.mean(0)) ** 2).sum(0)
    return 1 - residual / np.where(total > 1e-20, total, np.nan)  # a constant's total is only rounding


def mse(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Mean squared error per dimension, (D,), of (n, D) arrays."""
    return ((np.asarray(y, np.float64) - np.asarray(p, np.float64)) ** 2).mean(0)


def pearson(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Pearson correlation per dimension, (D,), of (n, D) arrays; NaN where either side is constant."""
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    a, b = y - y.mean(0), p - p.mean(0)
    scale = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return (a * b).sum(0) / np.where(scale > 1e-15, scale, np.nan)


METRICS = {"r2": r2, "mse": mse, "pearson": pearson}  # name -> function of (y, p) -> a figure per dimension


def validation_metrics(y: np.ndarray, p: np.ndarray) -> dict:
    """What a trainer logs of ratings y and predictions p, (n, 19); spread: deviation of p over y's."""
    metrics = {"valid_loss": float(mse(y, p).mean())}
    for name, metric in METRICS.items():
        each = metric(y, p)
        metrics |= {f"valid_{name}": float(each.mean()), f"valid_{name}_per_dimension": each.tolist()}
    deviation = y.std(0)
    spread = float((p.std(0) / np.where(deviation > 1e-10, deviation, np.nan)).mean())
    return metrics | {"prediction_mean": float(p.mean()), "prediction_std": float(p.std()), "spread": spread}


def rating_summary(metrics: dict) -> str:
    """`validation_metrics` in a line."""
    figures = [f"{name} {shown(metrics[f'valid_{name}'])}" for name in METRICS]
    if math.isnan(metrics["spread"]):
        return "  ".join([*figures, "the ratings do not differ"])
    warning = " (nearly constant)" if metrics["spread"] < 0.1 else ""
    return "  ".join([*figures, f"SD {metrics['spread']:.0%} of the ratings'{warning}"])


def by_fold(statistic: Callable, folds: np.ndarray, *arrays) -> np.ndarray:
    """Mean over folds (n,) of statistic(*arrays), of the rows of that fold."""
    return np.mean([statistic(*(a[folds == fold] for a in arrays)) for fold in np.unique(folds)], axis=0)


def resample(statistic: Callable, groups: Iterable, folds, *arrays, n=1000, seed=7) -> np.ndarray:
    """(draws, ...) values of `by_fold` when whole groups (rows,) are drawn with replacement n times, all
    folds (rows,; None: one) on one draw, since folds may share segments; as scipy.stats.bootstrap, but draws
    that tell nothing (one distinct group, a fold missing, not finite) are left out, all if they are most."""
    keys, inverse = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(inverse == k) for k in range(len(keys))]
    folds = np.zeros(len(inverse), int) if folds is None else folds
    values = []
    for drawn in np.random.default_rng(seed).integers(len(keys), size=(n, len(keys))):
        rows = np.concatenate([members[k] for k in drawn])
        if np.ptp(drawn) > 0 and set(folds[rows]) == set(folds):
            value = by_fold(statistic, folds[rows], *(a[rows] for a in arrays))
            if np.isfinite(value).all():
                values.append(value)
    return np.array(values if 2 * len(values) >= n else [])


def cluster_bootstrap(y, p, groups, statistic: Callable = r2, n=1000, seed=7, folds=None) -> list[float]:
    """95 % interval of the mean of statistic(y, p), (n, D) each, when whole groups (n,) are drawn with
    replacement; with folds (n,) of its mean over folds. NaN where too few draws tell anything."""
    draws = resample(lambda y, p: np.mean(statistic(y, p)), groups, folds, y, p, n=n, seed=seed)
    return np.percentile(draws, [2.5, 97.5]).tolist() if len(draws) else [math.nan, math.nan]


def is_rendering(name: str) -> bool:
    """True for a rendering of the score (player `Score` or `Score2`), no human performance."""
    return player_of(name).startswith("Score")


def _stacked(predictions, truth, part, view):
    """(names, truth (n, D), predictions (n, D), folds (n,)) of the rated items of a part and view."""
    names, y, p, folds = [], [], [], []
    for (its_part, fold, name), predicted in predictions.items():
        if its_part == part and name in truth and (view == "all" or not is_rendering(name)):
            names.append(name)
            y.append(truth[name])
            p.append(predicted)
            folds.append(fold)
    return names, np.array(y, np.float64), np.array(p, np.float64), np.array(folds)


def of_views(function: Callable, predictions: dict, truth: dict, parts: Iterable[str]) -> dict:
    """{part: {view: function(*_stacked), or None where nothing is rated}}, of parts, else of all."""
    result: dict = {part: {} for part in parts or [part for part, *_ in predictions]}
    for part, view in itertools.product(result, VIEWS):
        names, *arrays = _stacked(predictions, truth, part, view)
        result[part][view] = function(names, *arrays) if names else None
    return result


def measure(predictions: dict, truth: dict, parts: Iterable[str] = ()) -> dict:
    """Metrics of predictions by part and view of VIEWS: {"folds": {fold: scores}, "mean": ...}, or None where
    nothing is rated. parts: those wanted (none: all of the predictions).

    predictions: (part, fold, name) -> (D,), whose order is that of sums; truth: name -> (D,). "mean": mean
    and (population) standard deviation over folds, and the interval of the mean."""
    return of_views(_measure_folds, predictions, truth, parts)


def _measure_folds(names, y, p, folds):
    groups = np.array([segment_of(name) for name in names])
    each = {}
    for fold in dict.fromkeys(folds.tolist()):
        rows = folds == fold
        each[str(fold)] = _measure_fold(y[rows], p[rows], groups[rows])
    mean: dict = {"folds": len(each), "r2_interval": cluster_bootstrap(y, p, groups, folds=folds)}
    mean["per_dimension"] = {key: by_fold(METRICS[key], folds, y, p).tolist() for key in METRICS}
    for key in METRICS:
        values = [fold[key] for fold in each.values()]
        mean |= {key: float(np.mean(values)), f"{key}_std": float(np.std(values))}
    return {"folds": each, "mean": mean}


def _measure_fold(y, p, groups):
    """Of one part and fold: counts, each metric's mean and values per dimension, and the interval of R²."""
    figures = {"items": len(y), "segments": len(set(groups)), "r2_interval": cluster_bootstrap(y, p, groups)}
    each = {key: metric(y, p) for key, metric in METRICS.items()}
    figures |= {key: float(values.mean()) for key, values in each.items()}
    return figures | {"per_dimension": {key: values.tolist() for key, values in each.items()}}


def _measure_humans(predictions, spread, truth, root, parts):
    """`human_figures` by part, printed, with what the raters' noise allows."""
    humans: dict = dict.fromkeys(parts)
    ceiling = within_ceiling(root)
    for part in parts:
        figures = human_figures(predictions, truth, part, spread)
        if figures:
            humans[part] = figures | {"ceiling": ceiling}
            allowed = f", raters' noise allows {brackets(ceiling)}" if ceiling else ""
            print(f"{part}, human players within a segment: Pearson {shown(figures['within'])}{allowed}")
    return humans


def within_segments(values: np.ndarray, groups: Iterable) -> np.ndarray:
    """Rows (n, D) less the mean of their group (n,)."""
    group = np.unique(groups, return_inverse=True)[1]
    return values - group_means(values, group)[group]


def human_figures(predictions: dict, truth: dict, part: str, spread: dict | None = None) -> dict | None:
    """Of human players in a part: Pearson correlation within segments (players of the same bars; mean over
    folds), and error80 (19,): the half-width of an interval that holds 80 % of the errors once that of the
    spread over models (SD by the keys of predictions; None: 0) is in it; None where nothing is rated."""
    names, y, p, folds = _stacked(predictions, truth, part, "no_renderings")
    if not names:
        return None
    segments = np.array([segment_of(name) for name in names])

    def within(y, p, segments):
        return pearson(within_segments(y, segments), within_segments(p, segments))

    each = by_fold(within, folds, y, p, segments)
    over_models = _stacked(spread, truth, part, "no_renderings")[2] if spread else 0
    rest = ((y - p) ** 2 - (NORMAL_80 * over_models) ** 2).clip(0)
    error = np.sqrt(np.quantile(rest, 0.8, axis=0))
    return {"within": float(each.mean()), "within_per_dimension": each.tolist(), "error80": error.tolist()}


# ------------------------------------------------------------------------------------------------------------
# Results: predictions as CSV, metrics and circumstances as JSON, both printed
# ------------------------------------------------------------------------------------------------------------


def write_csv(path: str | Path, rows: Iterable[Iterable]) -> None:
    """Text that a spreadsheet would run as a formula starts with an apostrophe, which makes it text there."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(map(_quoted, row)) for row in rows])
    write_text(path, text.getvalue())


def _quoted(cell):
    formula = isinstance(cell, str) and re.match(r"[=+@\t\r−-]", cell) and not re.match(r"-?[\d.]+$", cell)
    return f"'{cell}" if formula else cell


def read_predictions(path: str | Path) -> dict:
    """{item: prediction} of a CSV of --csv or --save-results: (part, fold, name): ratings (19,), or trial:
    (reference, hypothesis), phoneme ids, and words where there are any. DataError names the line."""
    items: dict = {}
    try:
        with ordinary(path, 2**28).open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, strict=True):
                if "trial" in row:
                    spelt = row["reference"].split(), row["hypothesis"].split()
                    items[row["trial"]] = tuple([PHONEMES.index(p) for p in side] for side in spelt)
                    if "words_hypothesis" in row:
                        said = row["words_reference"].split(), row["words_hypothesis"].split()
                        items[row["trial"]] += said
                else:
                    ratings = np.array([float(row[label]) for label in LABELS])
                    items[row["part"], int(row["fold"]), row["name"]] = ratings
        if not items:
            raise ValueError("no prediction")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"{path}: line {len(items) + 2}: {error!r}; expected one CSV of eval.py") from error
    return items


def write_predictions(path: str | Path, predictions: dict) -> None:
    """CSV of columns name, part, fold and the 19 labels, four decimals; a line of each (part, fold, name), by
    fold, validation first."""
    rows: list = [["name", "part", "fold", *LABELS]]
    for part, fold, name in sorted(predictions, key=lambda key: (key[1], key[0] == "test", key[2])):
        ratings = [f"{value:.4f}" for value in predictions[part, fold, name]]
        rows.append([name.strip(), part, fold, *ratings])
    write_csv(path, rows)


def hardware(device: torch.device) -> dict:
    """What the figures were computed on: CPU model and cores, GPU if used, threads, torch version."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    made = {"cpu": model[1] if model else platform.processor(), "cores": os.cpu_count(), "gpu": gpu}
    return made | {"threads": torch.get_num_threads(), "torch": torch.__version__}


def circumstances(args) -> dict:
    """How figures were made: command, hardware, date and state of the repository."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"command": args.command, "hardware": hardware(args.device), "date": date, **git_state()}


def save_results(write: Callable, args, about: dict, figures: dict) -> None:
    """--csv and --save-results: write(path) makes a CSV; beside it stand the figures, what they are about and
    how they were made, as JSON."""
    if args.csv:
        write(args.csv)
    if args.save_results:
        stem = f"{args.results_dir}/{about['task']}_{args.save_results}_{about.get('split') or about['part']}"
        write(f"{stem}.csv")
        write_json(f"{stem}.json", {"row": args.save_results, **circumstances(args), **about, **figures})
        print(f"saved {stem}.json and .csv")


def corpus_line(synthetic: bool, root: object) -> str:
    return "SYNTHETIC corpus: figures say nothing about real data" if synthetic else f"real data in {root}"


def print_table(head: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Aligned columns; fractions to four digits, intervals in brackets."""
    cells = [list(map(_cell, row)) for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def _cell(value):
    if isinstance(value, float):
        return shown(value)
    return str(value) if isinstance(value, str | int) else brackets(value)


def brackets(interval: Iterable[float]) -> str:
    return f"[{', '.join(map(shown, interval))}]"


def fold_table(title: str, figures: dict) -> tuple[list, list]:
    """Head and rows of a view of `measure`: metrics of each fold, their mean and deviation."""
    mean = figures["mean"]
    rows = []
    for fold, scores in (figures["folds"] | {"mean": mean}).items():
        values = (scores[key] for key in METRICS)
        rows.append([fold, *values, scores["r2_interval"], scores.get("items", "")])
    rows.append(["std", *(mean[f"{key}_std"] for key in METRICS), "", ""])
    return [f"{title}: fold", *METRICS, "95 % of r2", "items"], rows


def _print_figures(title, figures, tests):
    if not figures:
        print(f"{title}: no label: predicted only, no metric")
        return
    print_table(*fold_table(title, figures))
    each = figures["mean"]["per_dimension"] | (tests or {})
    print_table(["mean of folds", *each], zip(RATINGS.values(), *each.values(), strict=True))


def _ratings_of(corpus):
    """{name: ratings (19,)} of the rated items."""
    return {name: item["y"] for name, item in corpus.items.items() if "y" in item}


def _finish(predictions, corpus, args, parts, about, models=(), spread=None):
    """Measures and prints predictions, keyed as `measure` takes them; writes --csv, --save-results and, of
    models [(network, checkpoint), ...], --out. Significance, which takes a minute, is tested of sound and of
    what is saved. about: facts for the JSON; spread: as of `human_figures`. Returns the metrics."""
    truth = _ratings_of(corpus)
    if args.save_results:  # rounded first, so that the JSON is exactly what the CSV gives
        predictions = {key: np.round(p, 4) for key, p in predictions.items()}
    figures = {"metrics": measure(predictions, truth, parts)}
    print(f"split {about['split']}, {corpus_line(corpus.synthetic, corpus.root)}")
    if about["task"] == "ast" or args.save_results:
        figures["significance"] = significance(predictions, truth, parts)
    for part, view in itertools.product(figures["metrics"], VIEWS):
        tests = figures["significance"][part][view] if "significance" in figures else {}
        _print_figures(f"{part}, {VIEWS[view]}", figures["metrics"][part][view], tests)
    if about["task"] == "han":
        figures["humans"] = _measure_humans(predictions, spread, truth, corpus.root, parts)
    if args.out:
        rated = figures["metrics"]["valid"]["all"]
        players = figures["humans"]["valid"] if about["task"] == "han" else {}
        if rated is None or players is None:
            told = "keeps figures of human players of part valid, of whom none is rated; leave out --out"
            raise DataError(f"{args.out}: {told}")
        known = {"valid_r2": rated["mean"]["r2"]}
        if players:
            known["error80"] = players["error80"]
        save_ensemble(args.out, models, known)
    unrated = {name for *_, name in predictions} - truth.keys()
    print(f"{len(unrated)} unlabelled items predicted; --csv FILE writes all predictions")
    about["synthetic"] = corpus.synthetic
    save_results(lambda path: write_predictions(path, predictions), args, about, figures)
    return figures["metrics"]


# ------------------------------------------------------------------------------------------------------------
# Evaluation of checkpoints
# ------------------------------------------------------------------------------------------------------------


def to_device(batch: dict, device: torch.device) -> dict:
    """Without waiting for what is copied from pinned memory."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


@torch.no_grad()
def predict_han(model: nn.Module, items: list, device: torch.device, batch: int = 16) -> np.ndarray:
    """Ratings in [0, 1] of prepared items, (n, 19) float64 in the order given."""
    order = np.argsort([len(item["x"]) for item in items], kind="stable")
    p = np.zeros((len(items), len(LABELS)))
    model = model.to(device).eval()
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        logits = model(to_device(collate_han([items[i] for i in chosen]), device))
        p[chosen] = torch.sigmoid(logits.float()).cpu().double().numpy()
    return p


def _load_models(paths):
    """[(model, checkpoint with its path), ...]; a file of several models gives each. Its data also names the
    copies and soundfonts that trained a model of sound, where its options alone do."""
    loaded = []
    for path in paths:
        model, ckpt = load_checkpoint(path)
        members = [(model, {})]
        if ckpt["task"] == "ensemble":
            members = zip(model.members, ckpt["members"], strict=True)
        for member, about in members:
            about = ckpt | about | {"path": path}
            heard, options = {}, about["args"]
            if "copies" in options:
                fonts = list(map(last_part, options.get("soundfonts", [])))
                heard = {"copies": options["copies"], "soundfonts": fonts}
            loaded.append((member, about | {"data": heard | (about["data"] or {})}))
    return loaded


def kind_of(task: str) -> str:
    """The task whose files a model reads: a kernel those of a HAN, all that rate sound those of an AST."""
    return "ast" if task in AUDIO_TASKS else {"kernel": "han"}.get(task, task)


def _check_alike(loaded):
    """The data settings of checkpoints that are evaluated together. DataError names the first that lacks one
    or differs there from the first or from this version."""
    first = loaded[0][1]
    task = kind_of(first["task"])
    expected = {"task": task, "labels": list(LABELS)}
    keys = ["task", "synthetic"]
    if task == "decoder":
        keys += ["kernel", "stride", "channels", "valid", "phonemes", "rules"]
        expected |= {"phonemes": list(PHONEMES), "rules": speech_rules()}
    else:
        keys += ["split", "keep_overlap", "labels"]
    if task == "ast":
        keys += ["audio", "fbank"]
        expected["fbank"] = FBANK_FORMAT
    for model, ckpt in loaded:
        known = {**(ckpt["data"] or {}), **model.model_args, "task": kind_of(ckpt["task"])}
        for key in keys:
            value = known.get(key)
            if key not in known:
                raise DataError(f"{ckpt['path']}: holds no {key}; expected a model that rates or decodes")
            if value != expected.setdefault(key, value):
                wanted = f"{expected[key]!r:.60}, as in {first['path']} or this version"
                found = f"{ckpt['path']}: {key} is {value!r:.60}"
                raise DataError(f"{found}; expected {wanted}; evaluate them apart")
    return first["data"]


def seeds_of(loaded):
    return [ckpt["args"].get("seed") for _, ckpt in loaded]


ONLY_FOR = {  # tasks of models -> options that they alone take
    (*AUDIO_TASKS, "pretraining"): "audio",
    AUDIO_TASKS: "rate copies soundfonts probe heads",
    ("han", "kernel"): "features bars transpose",
    ("decoder",): "day raw logits words tune submission nbest",
}


def refuse_foreign(args: argparse.Namespace, task: str, who: str, beside: Iterable[str] = ()) -> None:
    """DataError where an option is given that no model of this task takes, nor of those compared with it."""
    for tasks, names in ONLY_FOR.items():
        for name in names.split():
            if not {task, *beside} & {*tasks} and getattr(args, name, None):
                raise DataError(f"{who}: of task {task}, which takes no --{name}; leave it out")


def evaluate(argv: list[str]) -> dict:
    """`python eval.py --ckpt ...`: metrics of checkpoints, those that rate each on its own fold and split."""
    about = """\
Scores checkpoints on data that they did not learn from. Seeds of a fold are averaged, and so are decoders.

    python eval.py --ckpt runs/han/*_f?_s7/best.pt --data data/percepiano     four folds, each on its own part
    python eval.py --ckpt runs/decoder/NAME/best.pt --data DIR --words --tune  phonemes and words"""
    parser = _parser("evaluate", "--ckpt FILE ... [--data DIR] [options]", about)
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="FILE", help="best.pt of folds or seeds (required)")
    add("--logits", metavar="DIR", help="decoder: write log-probabilities, a trial a file (off)")
    args = _parse(parser, argv, part_options, word_options, data_options, result_options)
    loaded = _load_models(args.ckpt)
    model, ckpt = loaded[0]
    task = ckpt["task"]
    pretraining = task == "ast" and model.model_args["num_outputs"] is None
    refuse_foreign(args, "pretraining" if pretraining else task, args.ckpt[0])
    if args.out and not pretraining and (task == "decoder" or args.part != "valid"):
        found = f"{args.ckpt[0]}: {task}, part {args.part}"
        raise DataError(f"{found}; --out: of models that rate, on part valid, or a pre-training")
    if task == "decoder":
        return evaluate_decoder(args, loaded)
    if pretraining:
        return evaluate_pretraining(args, loaded)
    parts = ["valid", "test"] if args.save_results else [args.part]
    predictions, spread, corpus, data = _rate_parts(args, loaded, parts)
    about = {"task": kind_of(task), "model": task, "seeds": seeds_of(loaded)}
    about |= {key: data[key] for key in ("split", "features", "audio", "keep_overlap") if key in data}
    about |= {"rate": last_part(args.rate)} if args.rate else {}
    return _finish(predictions, corpus, args, parts, about, loaded, spread)


def load_corpus(args, speech: bool = False, quiet: bool = False, say: Callable = print):
    """PercePiano or a corpus of speech trials: --data, or the synthetic one; says what it left out."""
    read, made, source = load_percepiano, synthetic_percepiano, "python data.py fetch percepiano"
    if speech:
        read, made, source = open_speech, synthetic_speech, "doi 10.5061/dryad.x69p8czpq"
    if not args.data:
        say(f"no --data: the built-in SYNTHETIC corpus; the real one: {source}")
    strict = getattr(args, "strict", False)
    corpus = read(args.data or made(args.cache), args.cache, strict, quiet=quiet)
    say_left_out(corpus.left_out, say)
    return corpus


def _corpus_of(data, args):
    """The corpus of --data, which must be given for checkpoints (of data settings `data`) of real data."""
    if args.data is None and not data["synthetic"]:
        raise DataError(f"{args.ckpt[0]}: trained on real data, not the synthetic; give --data DIR")
    corpus = load_corpus(args, "phonemes" in data)
    if corpus.synthetic != data["synthetic"]:
        print("trained on the other kind of data")
    return corpus


def _rate_parts(args, loaded, parts):
    """Of checkpoints that rate: the two of `fold_predictions`, their corpus and their data settings."""
    data = _check_alike(loaded)
    if "competition" in parts:
        raise DataError(f"--part competition: of decoders; {args.ckpt[0]} rates")
    corpus = _corpus_of(data, args)
    return *fold_predictions(loaded, corpus, args, parts), corpus, data


def fold_predictions(loaded: list, corpus: Corpus, args, parts: Iterable[str]) -> tuple[dict, dict]:
    """Of models of `_load_models`: predictions averaged within a fold, as `measure` takes them, and their
    standard deviation over models."""
    predictions: dict[tuple, np.ndarray] = {}
    spread: dict[tuple, np.ndarray] = {}
    first = loaded[0][1]
    store = rated_store(corpus, args, first["data"]["audio"]) if kind_of(first["task"]) == "ast" else None
    for fold in sorted({ckpt["data"]["fold"] for _, ckpt in loaded}):
        members = [(model, ckpt) for model, ckpt in loaded if ckpt["data"]["fold"] == fold]
        data, options = members[0][1]["data"], members[0][1]["args"]
        misaligned = options.get("keep_misaligned", False)
        names_of = percepiano_parts(corpus, data["split"], fold, data["keep_overlap"], misaligned)
        print(f"fold {fold}: {counted(members)}, seeds {seeds_of(members)}")
        for part in parts:
            names = [name for name in names_of[part] if store is None or name in store.names]
            each = []
            for model, ckpt in members:
                info = ckpt["data"]
                if store is None:
                    each.append(predict_han(model, prepare_han(corpus, names, info), args.device))
                else:
                    items = prepare_ast(corpus, store, names, info)
                    each.append(predict_ast(model, items, info, args.device))
            keys = [(part, fold, name) for name in names]
            predictions |= zip(keys, average(each, members), strict=True)
            spread |= zip(keys, np.std(each, axis=0), strict=True)
    return predictions, spread


def average(each: list[np.ndarray], loaded: list) -> np.ndarray:
    """Mean of predictions, every task (networks, kernels) with the same weight however many models it has."""
    tasks = np.array([ckpt["task"] for _, ckpt in loaded])
    return np.mean([np.mean(np.array(each)[tasks == task], axis=0) for task in np.unique(tasks)], axis=0)


# ------------------------------------------------------------------------------------------------------------
# Floor: a forest or a ridge regression on pooled statistics of the notes or of the spectrogram
# ------------------------------------------------------------------------------------------------------------


def floor(argv: list[str]) -> dict:
    """`python eval.py floor`: regressions on the trainers' parts; returns metrics (see `measure`)."""
    about = """\
What a network has to beat: a forest or ridge on statistics of the notes (han), of log-mels (ast). The kernel
ridge of han, on all statistics that --pooled takes, is a model like the networks:

    python eval.py floor --model kernel --data DIR --out kernel.pt     seconds; rates like a best.pt"""
    parser = _parser("floor", "[--task han|ast] [--data DIR] [options]", about)
    add = parser.add_argument
    add("--task", choices=["han", "ast"], default="han", help="han: score and MIDI, ast: audio (%(default)s)")
    add("--model", choices=REGRESSIONS, help="regression (han: forest, ast: ridge)")
    add("--split", choices=SPLITS, default="segment", help="what parts never share (%(default)s)")
    add("--fold", choices=[*"0123", "all"], default="all", help="fold that validates (%(default)s)")
    add("--features", choices=FEATURE_SETS, help="han: statistics of what (full)")
    add = parser.more.add_argument
    add("--audio", nargs="+", metavar="DIR", help=AUDIO_HELP)
    add("--rate", metavar="HOW", help=RATE_HELP)
    add("--copies", type=number(int, 0), default=0, help="ast: training copies, as recorded elsewhere (0)")
    add("--soundfonts", nargs="+", default=[], metavar="FILE", help="ast: pianos that train too (off)")
    add("--probe", metavar="FILE", help="ast: best.pt of a pre-training, whose frozen tokens join in (off)")
    add("--heads", type=number(int, 0), default=0, help="ast kernel: networks averaged with it (0)")
    add("--keep-overlap", action="store_true", help="train also on notes that validation or test holds (off)")
    args = _parse(parser, argv, data_options, result_options)
    refuse_foreign(args, args.task, "floor")
    if (args.out or args.heads) and args.model != "kernel":
        raise DataError("--out, --heads of kernel; leave them out")
    args.features = args.features or "full"
    corpus = load_corpus(args)
    kind = args.model or ("forest" if args.task == "han" else "ridge")
    about = {key: getattr(args, key) for key in ("task", "split", "keep_overlap")}
    about |= {"seeds": list(range(7, 7 + (args.heads or 1))), "model": kind}
    fit, rated = functools.partial(_fit_notes, corpus, args), corpus.items
    if args.task == "han":
        about["features"] = args.features
    else:
        about |= {"audio": "wav" if args.audio else "rendered", "copies": args.copies, "heads": args.heads}
        about["soundfonts"] = list(map(last_part, args.soundfonts))
        about |= {key: path and last_part(path) for key, path in (("rate", args.rate), ("probe", args.probe))}
        clips = Clips(corpus, args)
        fit, rated = clips.fit, clips.rated
    parts = ("valid", "test")
    predictions, kernels = {}, []
    for fold in range(4) if args.fold == "all" else [int(args.fold)]:
        names_of = percepiano_parts(corpus, args.split, fold, args.keep_overlap)
        rate, fitted = fit(kind, names_of["train"], fold)
        kernels += fitted
        for part in parts:
            names = [name for name in names_of[part] if name in rated]
            if names:
                keys = [(part, fold, name) for name in names]
                predictions |= zip(keys, rate(names), strict=True)
    return _finish(predictions, corpus, args, parts, about, kernels)


REGRESSIONS = ("kernel", "forest", "ridge")


def _regression(kind, x, y, names):
    """A function of statistics (n, S) -> ratings, fitted to x and y of these names: a forest, or ridge on
    standardised columns, its strength cross-validated over whole segments."""
    from sklearn.ensemble import ExtraTreesRegressor  # takes a second to import, and only the floor needs it
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = ExtraTreesRegressor(150, min_samples_leaf=3, max_features=0.3, random_state=7, n_jobs=-1)
    if kind == "ridge":
        groups = [segment_of(name) for name in names]
        folds = GroupKFold(min(5, len(set(groups)))).split(groups, groups=groups)
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 5, 13), cv=list(folds)))
    model.fit(x, y)
    return lambda x: model.predict(x).clip(0, 1)


def _kernel_checkpoint(task, info):
    return {"task": task, "data": info, "args": {"seed": None}, "step": None, **git_state()}


def _fit_notes(corpus, args, kind, names, fold):
    """As `Clips.fit`, on pooled statistics of the notes; a kernel also on those of whole performances."""
    if kind == "kernel":
        info = han_info(corpus, names, args.features, True, args.split, fold, args.keep_overlap)
        items = prepare_han(corpus, names, info)
        stats, y = (torch.from_numpy(np.stack([item[key] for item in items])) for key in ("stats", "y"))
        model = KernelRidge.fit(stats, y)
        fitted = [(model, _kernel_checkpoint("kernel", info))]
        return lambda names: predict_han(model, prepare_han(corpus, names, info), args.device), fitted
    info = fit_normalisation(corpus, names, args.features) | {"statistics": []}
    y = [corpus.items[name]["y"] for name in names]
    rate = _regression(kind, all_statistics(corpus, names, info), y, names)
    return lambda names: rate(all_statistics(corpus, names, info)), []


def clip_info(corpus: Corpus, args, fold: int) -> dict:
    """What a checkpoint that rates sound holds of its data, but for frames and fitted values."""
    return {
        "labels": list(LABELS),
        "split": args.split,
        "fold": fold,
        "keep_overlap": args.keep_overlap,
        "synthetic": corpus.synthetic,
        "fbank": FBANK_FORMAT,
        "audio": "wav" if args.audio else "rendered",
    }


class Clips:
    """Descriptions (`ClipKernel.describe`) of all versions that train, and of what is rated: rows by name."""

    def __init__(self, corpus: Corpus, args):
        self.corpus, self.args = corpus, args
        self.info = {"mean": FBANK_MEAN, "std": FBANK_STD}
        self.model = ClipKernel(1)
        if args.probe:
            encoder, ckpt = load_checkpoint(args.probe)
            if not isinstance(encoder, AST) or encoder.model_args["num_outputs"] is not None:
                found = f"{args.probe}: of task {ckpt['task']!r}"
                raise DataError(f"{found}; expected a pre-training, which knows no rating")
            self.model = ClipKernel(1, encoder=encoder.model_args)
            self.model.encoder = encoder
            self.info = {key: ckpt["data"][key] for key in ("mean", "std")}
        self.model = self.model.to(args.device).eval()
        self.train = self.rated = self._rows(audio_store(corpus, args))
        if args.rate:
            self.rated = self._rows(rated_store(corpus, args))

    def _rows(self, store):
        rows = {}
        for i, name in enumerate(tqdm(store.names, desc="statistics", unit="file", disable=None)):
            clip = whole_clip(store.item(i), self.info)
            rows[name] = self.model.describe(clip.to(self.args.device))[0].cpu()
        return rows

    def fit(self, kind: str, names: list[str], fold: int) -> tuple:
        """A function names -> ratings, of a regression on all versions of these names; and a kernel with its
        checkpoint, in a list."""
        known = set(names)
        heard = [version for version in self.train if version.partition("@")[0] in known]
        items = [version.partition("@")[0] for version in heard]
        if len(set(map(segment_of, items))) < 2:
            found = f"{self.corpus.root}: fold {fold}, {len(items)} recordings to train with"
            raise DataError(f"{found}; expected some of two segments or more; add recordings")
        described = torch.stack([self.train[version] for version in heard])
        y = np.stack([self.corpus.items[item]["y"] for item in items])

        def describe(names: list[str]) -> Tensor:
            return torch.stack([self.rated[name] for name in names])

        if kind != "kernel":
            rate = _regression(kind, described.double().numpy(), y, items)
            return lambda names: rate(describe(names).double().numpy()), []
        encoder = self.model.model_args["encoder"]
        model = ClipKernel(len(heard), encoder=encoder, heads=self.args.heads)
        model.encoder = self.model.encoder
        number_of = {item: i for i, item in enumerate(dict.fromkeys(items))}
        model.fit(described, torch.from_numpy(y), torch.tensor([number_of[item] for item in items]))
        targets = fit_targets(self.corpus, number_of)
        info = self.info | clip_info(self.corpus, self.args, fold)
        info |= {"copies": self.args.copies, "soundfonts": list(map(last_part, self.args.soundfonts))}
        info |= {"rating_mean": targets["target_mean"], "rating_std": targets["target_std"]}
        info["frames"] = WHOLE_CLIP
        fitted = [(model, _kernel_checkpoint("clip_kernel", info))]
        return lambda names: model.rate(describe(names)).double().numpy(), fitted


# ---------------------------------------------------------------------------------------------------------
# Bench
# ---------------------------------------------------------------------------------------------------------
def bench_han(sizes: dict, batch: int, device: torch.device) -> tuple:
    """HAN, its arguments, loss of its output: PercePiano's lengths, voices 0 (extra notes) to 4. sizes: as of
    all benches, arguments of the network that differ from the trainer's."""
    model = HAN(**{"input_size": len(column_names(FEATURES))} | sizes).to(device)
    rng = np.random.default_rng(7)
    items = []
    for notes in np.geomspace(30, MAX_NOTES, batch).astype(int):
        beat = np.arange(notes) // 3
        x = rng.standard_normal((notes, model.model_args["input_size"]), np.float32)
        items.append({"x": x, "voice": rng.integers(5, size=notes), "beat": beat, "measure": beat // 3})
    batch = to_device(collate_han(items), device)
    return model, (batch,), lambda logits: (logits.float().sigmoid() - 0.5).square().mean()


def bench_decoder(sizes: dict, batch: int, device: torch.device) -> tuple:
    """GRUDecoder, its arguments, loss of its output. Trials of about 500 bins, a label every third frame."""
    model = GRUDecoder(**{"hidden": 512} | sizes).to(device)
    lengths = torch.linspace(250, 750, batch).long()
    trials = [torch.randn(length, model.model_args["channels"]) for length in lengths]
    x = nn.utils.rnn.pad_sequence(trials, batch_first=True)
    labels = torch.randint(1, len(PHONEMES), (batch, x.shape[1] // 12), device=device)
    day = torch.arange(batch, device=device) % model.model_args["days"]

    def loss(output: tuple) -> Tensor:
        log_probs = output[0].float().log_softmax(-1).transpose(0, 1)
        return functional.ctc_loss(log_probs, labels, output[1], lengths // 12)

    return model, (x.to(device), lengths, day), loss  # lengths are read on the CPU


def bench_ast(sizes: dict, batch: int, device: torch.device) -> tuple:
    """AST in pre-training, its arguments, loss of its output; masked: 400 of 512 patches or such a share."""
    model = AST(**AST_PRESETS["small"] | sizes).to(device)
    clips = torch.randn(batch, model.model_args["frames"], MELS, device=device) / 2
    mask = cluster_mask(batch, model.rows, model.columns, model.rows * model.columns * 400 // 512, device)
    return model, (clips, None, mask), lambda output: output["nce"] + 10 * output["mse"]


BENCHES = {"han": (bench_han, 8), "decoder": (bench_decoder, 64), "ast": (bench_ast, 2)}  # and items a step


def bench(argv: list[str]) -> dict:
    """`python eval.py bench`: time of a training step on made-up data of real size; needs no data set."""
    about = "Time of a training step on made-up data. Plain networks: tests/plain_networks.py"
    parser = _parser("bench", "[--task han|decoder|ast] [options]", about)
    add = parser.add_argument
    add("--task", choices=BENCHES, default="han", help="network (%(default)s)")
    add("--batch", type=number(int, 1), help="items a step (8; decoder 64; ast 2)")
    add("--amp", choices=["off", *AMP_TYPES], default="off", help="mixed precision (%(default)s)")
    add("--steps", type=number(int, 1), default=10, help="steps after 3 of warm-up (%(default)s)")
    args = _parse(parser, argv)
    make, batch = BENCHES[args.task]
    batch = args.batch or batch
    torch.manual_seed(7)
    model, inputs, loss = make({}, batch, args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    taken = [timed_step(model, inputs, loss, optimizer, args.amp) for _ in range(3 + args.steps)]
    seconds = float(np.median(taken[3:]))
    peak = peak_memory(args.device)
    print(f"{args.task}, batch {batch}, {args.device}, amp {args.amp}: {hardware(args.device)}")
    print(f"{1000 * seconds:.1f} ms/step, {batch / seconds:.1f} items/s, peak {peak:.0f} MiB")
    return {"seconds": seconds, "items_per_second": batch / seconds, "peak": peak}


def timed_step(model: nn.Module, inputs: tuple, loss: Callable, optimizer, amp: str = "off") -> float:
    """Seconds of one training step."""
    device = next(model.parameters()).device
    synchronize = getattr(torch, device.type).synchronize
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
EDITS = ("sub", "del", "ins")  # substitutions, deletions, insertions
AUDIO_HELP = "audio: folder of recordings NAME.wav; of a pre-training: MAESTRO's (off: rendered)"
RATE_HELP = f"audio: rate {RECORDED} (copies: -6 dB, hiss, a room), SOUNDFONT or DIR (off: as --audio)"


def ctc_greedy(logits: Tensor | np.ndarray, frames: Tensor | np.ndarray) -> list:
    """Most probable class of each frame, equal neighbours merged, then blank 0 dropped: a list of ids a
    trial. logits (B, F, 41), of any monotonous scale; frames (B,): valid ones, the rest is padding."""
    best = torch.as_tensor(logits).argmax(-1)
    merged = [torch.unique_consecutive(row[:n]).tolist() for row, n in zip(best, frames, strict=True)]
    return [[k for k in row if k != 0] for row in merged]


def edit_counts(reference: Iterable, hypothesis: Iterable) -> tuple[int, int, int]:
    """(substitutions, deletions, insertions) of a minimal script from the reference to the hypothesis."""
    tags = [edit.tag for edit in Levenshtein.editops(list(reference), list(hypothesis))]
    return tags.count("replace"), tags.count("delete"), tags.count("insert")


def per_counts(refs: Iterable, hyps: Iterable) -> np.ndarray:
    """(n, 4) int64 of n trials: substitutions, deletions, insertions, reference length."""
    rows = [(*edit_counts(ref, hyp), len(ref)) for ref, hyp in zip(refs, hyps, strict=True)]
    return np.array(rows, np.int64).reshape(-1, 4)


def error_rate(counts: np.ndarray) -> float:
    """Errors of all trials over their labels (micro average) of `per_counts`; NaN without any label."""
    *errors, labels = np.sum(counts, axis=0)
    return float(sum(errors) / labels) if labels else math.nan


def trial_bootstrap(counts: np.ndarray) -> list[float]:
    """95 % interval of `error_rate` when trials are drawn with replacement; NaN of fewer than two."""
    return cluster_bootstrap(counts, counts, range(len(counts)), lambda _, drawn: error_rate(drawn))


def decoder_scores(refs: list, hyps: list, days: Iterable[int], day_names: list[str]) -> dict:
    """Phoneme error rate of trials: per, sub, del, ins, labels, trials, per_without_sil (SIL left out on both
    sides) and by_day {day name: the same}, micro-averaged. The trainer logs these figures.
    refs, hyps: phoneme ids of each trial; days: index of each trial's day in day_names."""
    counts, days = per_counts(refs, hyps), np.asarray(days)
    speech = [[[k for k in sequence if k != SIL] for sequence in side] for side in (refs, hyps)]
    by_day = {day_names[day]: _error_figures(counts[days == day]) for day in np.unique(days)}
    without_sil = error_rate(per_counts(*speech))
    return _error_figures(counts) | {"per_without_sil": without_sil, "by_day": by_day}


def _error_figures(counts):
    totals = dict(zip((*EDITS, "labels"), counts.sum(0).tolist(), strict=True))
    return {"per": error_rate(counts), **totals, "trials": len(counts)}


def greedy_strings(log_probs: dict, corpus: SpeechCorpus, trials: np.ndarray) -> tuple[list, list]:
    """Phoneme ids of trials, as labelled and as decoded from log_probs (F, 41) by trial."""
    decoded = [ctc_greedy(log_probs[i][None], [len(log_probs[i])])[0] for i in trials]
    return [corpus.labels[i].tolist() for i in trials], decoded


def part_scores(log_probs: dict, corpus: SpeechCorpus, trials: np.ndarray) -> tuple[dict, list, list]:
    """Of labelled trials: `decoder_scores` with too_short and, of sentences of random words, per_salad and
    trials_salad; and their `greedy_strings`."""
    refs, hyps = greedy_strings(log_probs, corpus, trials)
    scores = decoder_scores(refs, hyps, corpus.day[trials], corpus.days)
    scores["too_short"] = sum(len(log_probs[i]) < frames_needed(corpus.labels[i]) for i in trials)
    salad = salad_trials(corpus)[trials]
    if salad.any():
        scores |= {"per_salad": error_rate(per_counts(refs, hyps)[salad]), "trials_salad": int(salad.sum())}
    return scores, refs, hyps


@torch.no_grad()
def speech_logits(model, corpus: SpeechCorpus, trials: np.ndarray, days, batch: int = 64) -> dict:
    """Log-probabilities (F, 41) float32 by trial; (0, 41) where shorter than a window. days (corpus days,):
    the model's index of each, from data.map_days. Batches by length."""
    training = model.training
    order = trials[np.argsort(corpus.lengths[trials], kind="stable")]
    days, device = torch.as_tensor(days), next(model.parameters()).device
    result = {}
    model.eval()
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        items = collate_speech([corpus[i] for i in chosen])
        logits, frames = model(items["x"].to(device), items["lengths"], days[items["day"]].to(device))
        log_probs = logits.float().log_softmax(-1).cpu().numpy()
        for i, row, n in zip(chosen, log_probs, frames.tolist(), strict=True):
            result[i] = row[:n].copy()
    model.train(training)
    return result


def mean_logits(loaded: list, corpus: SpeechCorpus, trials: np.ndarray, args) -> dict:
    """`speech_logits`; of several checkpoints the logarithm of their mean probability. args: day, device.
    Says which day layer stands in for a session that a checkpoint does not know."""
    each = []
    used = np.unique(corpus.day[trials])
    sessions = [corpus.days[day] for day in used]
    for model, ckpt in loaded:
        known = ckpt["data"]["days"]
        days = np.full(len(corpus.days), -1)
        days[used] = map_days(sessions, known, args.day)
        layers = [*known, "mean"]
        unknown = {s: layers[k] for s, k in zip(sessions, days[used], strict=True) if s not in known}
        if unknown:
            told = "sessions that it does not know, and whose day layer they get"
            print(f"{ckpt['path']}: {told}: {unknown}")
        each.append(speech_logits(model.to(args.device), corpus, trials, days))
    count = np.float32(np.log(len(each)))
    return {i: np.logaddexp.reduce([rows[i] for rows in each]) - count for i in trials}


def ctc_losses(log_probs: Tensor, frames, labels, label_lengths, reduction="mean") -> Tensor:
    """Loss of each trial, (B,), of log_probs (B, F, 41); "mean", as torch's: over its number of labels."""
    losses = functional.ctc_loss(log_probs.transpose(0, 1), labels, frames, label_lengths, reduction="none")
    return losses if reduction == "sum" else losses / label_lengths.clamp(min=1).to(log_probs.device)


def validate_decoder(model, corpus: SpeechCorpus, trials: np.ndarray, days, batch: int, search=None) -> dict:
    """Metrics of the present weights; days: the model's index of each day of the corpus. Trials too short for
    their labels count in every error rate, not in the loss. search: a WordSearch, for word errors as well."""
    log_probs = speech_logits(model, corpus, trials, days, batch)
    scores, refs, hyps = part_scores(log_probs, corpus, trials)
    metrics = {f"valid_{name}": value for name, value in scores.items()}
    losses = []
    for i, labels in zip(trials, refs, strict=True):
        frames = len(log_probs[i])
        counts = torch.tensor([frames]), torch.tensor([labels]), torch.tensor([len(labels)])
        if frames >= frames_needed(labels):
            losses.append(float(ctc_losses(torch.as_tensor(log_probs[i])[None], *counts)))
    if search:
        settings = word_settings(corpus.channels)
        sentences = [search.decode(log_probs[i], settings) for i in trials]
        metrics["valid_wer"] = error_rate(per_counts(said_in(corpus, trials), sentences))
    metrics["valid_loss"] = float(np.mean(losses)) if losses else math.nan
    metrics["valid_blank_fraction"] = float((np.concatenate([*log_probs.values()]).argmax(1) == 0).mean())
    metrics["samples"] = [
        {"id": corpus.ids[trials[k]], "reference": spell(refs[k]), "hypothesis": spell(hyps[k])}
        for k in sorted({0, len(trials) // 2, len(trials) - 1})
    ]
    return metrics


def evaluate_decoder(args, loaded: list) -> dict:
    """Phoneme error rate of the mean probabilities of decoders on args.part: `part_scores`, their 95 %
    interval over trials; "words" where these were asked for."""
    unlabelled = bool(args.submission or args.logits or args.nbest)
    corpus, parts, log_probs = _heard_part(args, loaded, unlabelled)
    trials = parts[args.part]
    scored = trials[corpus.labelled[trials]]
    figures, refs, hyps = {}, [], []
    if len(scored):
        figures, refs, hyps = part_scores(log_probs, corpus, scored)
        figures["interval"] = trial_bootstrap(per_counts(refs, hyps))
        _print_scores(args.part, figures)
    if args.logits:
        write_logits(args.logits, [(corpus.ids[i], log_probs[i]) for i in trials])
    rows: list = [["trial", "day", "reference", "hypothesis", *EDITS, "labels"]]
    for i, ref, hyp, counts in zip(scored, refs, hyps, per_counts(refs, hyps).tolist(), strict=True):
        rows.append([corpus.ids[i], corpus.days[corpus.day[i]], spell(ref), spell(hyp), *counts])
    if wants_words(args):
        figures["words"] = words_of_part(args, loaded, corpus, parts, log_probs)
        sentences = figures["words"].pop("sentences")
        rows[0] += ["words_reference", "words_hypothesis"]
        for row, i, said in zip(rows[1:], scored, said_in(corpus, scored), strict=True):
            row += [" ".join(said), " ".join(sentences[i])]
    about = {"task": "decoder", "part": args.part, "synthetic": corpus.synthetic, "seeds": seeds_of(loaded)}
    about["valid"] = loaded[0][1]["data"]["valid"]
    save_results(lambda path: write_csv(path, rows), args, about, {"metrics": figures})
    return figures


def _print_scores(part, figures):
    print(f"{part}: PER {figures['per']:.4f} 95 % {brackets(figures['interval'])}")
    print(f"PER without SIL {figures['per_without_sil']:.4f}")
    if "per_salad" in figures:
        told = f"{figures['trials_salad']} sentences of random words"
        print(f"PER of {told} {figures['per_salad']:.4f}")
    print(f"{figures['too_short']} trials are too short for their labels: counted, never right")
    print_table(*day_table(figures))


def day_table(figures: dict) -> tuple[list, list]:
    """Head and rows of `decoder_scores` by session."""
    keys = ("per", *EDITS, "labels", "trials")
    days = figures["by_day"] | {"all": figures}
    return ["session", *keys], [[day, *(scores[key] for key in keys)] for day, scores in days.items()]


def words_of_part(args, loaded: list, corpus: SpeechCorpus, parts: dict, log_probs: dict) -> dict:
    """`words` of the trials of args.part, --tune on those that validate."""
    if args.tune and args.part != "valid":
        log_probs = log_probs | mean_logits(loaded, corpus, parts["valid"], args)
    return words(log_probs, corpus, parts[args.part], args, parts["valid"], parts["train"])


def _heard_part(args, loaded, unlabelled=False):
    """The corpus of --data, which must fit the decoders; its trials by part, of args.part without labels only
    where asked for; and the log-probabilities of that part."""
    data = _check_alike(loaded)
    corpus = _corpus_of(data, args)
    if corpus.channels != data["channels"]:
        raise DataError(f"{corpus.root}: {corpus.channels} channels; {args.ckpt[0]} has {data['channels']}")
    _say_circumstances(args, loaded, corpus)
    parts = speech_parts(corpus, data["valid"])
    if not unlabelled:
        parts[args.part] = parts[args.part][corpus.labelled[parts[args.part]]]
    if not len(parts[args.part]):
        found = f"--part {args.part}: no labelled trial in {corpus.root}"
        raise DataError(f"{found}; give another, or evaluate --submission")
    return corpus, parts, mean_logits(loaded, corpus, parts[args.part], args)


def _say_circumstances(args, loaded, corpus):
    """Which checkpoints, and what a reader must know before believing the figures."""
    tqdm.write(f"{args.ckpt[0]}: {counted(loaded)}, seeds {seeds_of(loaded)}")
    tqdm.write(corpus_line(corpus.synthetic, corpus.root))
    if loaded[0][1]["data"]["valid"] == "test" and args.part in ("valid", "test"):
        tqdm.write("the checkpoint was chosen on the test part (--valid test): its score there is no result")


def substitutions(refs: list, hyps: list) -> list[list]:
    """The thirty most frequent [reference phoneme, decoded phoneme, times]."""
    pairs: Counter = Counter()
    for ref, hyp in zip(refs, hyps, strict=True):
        edits = Levenshtein.editops(ref, hyp)
        pairs.update((ref[e.src_pos], hyp[e.dest_pos]) for e in edits if e.tag == "replace")
    return [[PHONEMES[a], PHONEMES[b], times] for (a, b), times in pairs.most_common(30)]


def spell(ids: Iterable[int]) -> str:
    """Phoneme names of class ids, separated by blanks."""
    return " ".join(PHONEMES[k] for k in ids)


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
WORD_DEFAULTS = {"lm_weight": 1.0, "word_score": 0.0, "beam": 100}
# What --tune tries. Acoustic scale, LM weight and word score share a factor, so that the scale stays fixed.
WORD_GRID = {"lm_weight": (0.25, 0.5, 1.0, 1.6, 2.3, 3.5, 5.0), "word_score": (-3.0, -1.5, 0.0, 1.5, 3.0)}
MOST_HOMOPHONES = 6  # of one pronunciation; the library's trie drops any further one
COMPETITION_SIZE = 1200, 15  # rows and days of the '24 competition part
Lexicon = list[tuple[str, tuple[int, ...]]]  # (word, phoneme ids without the last SIL), several a word


def spoken_words(text: str) -> list[str]:
    """Words of a transcript as trained on and scored: cleaned, those without a letter left out."""
    return [word for word in clean_sentence(text).split() if re.search("[a-z]", word)]


def read_lexicon(path: str | Path) -> Lexicon:
    """Lines "word PH PH ...", in order, each once; of the CMU dictionary's habits stress digits, variants
    "word(2)" and comments after ";;;" or "# " are understood, and a SIL at the end."""
    entries: dict[tuple, None] = {}
    try:
        lines = read_file(path).decode("utf-8-sig", "replace").splitlines()  # transcripts are ASCII
        for place, line in enumerate(lines, 1):
            line = re.split(r";;;|(?:^|\s)#\s", line)[0].strip().removesuffix(" SIL")
            if line:
                word, *names = line.split()
                names = [name.rstrip("012") for name in names]
                if not names or not set(PHONEMES[1:]).issuperset(names):
                    raise ValueError(f"line {place}: {line:.80}")
                entries[re.sub(r"\(\d+\)$", "", word).lower(), tuple(map(PHONEMES.index, names))] = None
        if not entries:
            raise ValueError("no word")
    except (OSError, ValueError) as error:
        expected = "expected lines of a word and its phonemes, as THE DH AH0"
        raise DataError(f"{path}: {error}; {expected}") from error
    return list(entries)


def training_lexicon(texts: Iterable[str], labels: Iterable) -> Lexicon:
    """Every word of the transcripts, most frequent first. labels: phoneme ids of each transcript, whose
    pieces between SILs are the pronunciations, all of a homograph, where they are as many as the words;
    words only met elsewhere go to `data.phonemize`."""
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


def split_at_silence(ids: Iterable[int]) -> list:
    return [tuple(piece) for silent, piece in itertools.groupby(map(int, ids), SIL.__eq__) if not silent]


def witten_bell(sentences: Iterable[list[str]]) -> dict:
    """{n-gram: [probability, back-off weight]} of an interpolated Witten-Bell model (Witten & Bell 1991; Chen
    & Goodman 1999): P(w | h) = (c(h w) + t(h) P(w | h')) / (c(h) + t(h)), t(h) the number of different words
    after h, h' without h's first word, and 1 / V below the unigrams, V the words with </s> and <unk>."""
    after: dict[tuple[str, ...], Counter] = {}  # what followed each history, how often
    for sentence in sentences:
        padded = ("<s>", *sentence, "</s>")
        for i in range(1, len(padded)):
            for first in range(max(0, i - 2), i + 1):
                after.setdefault(padded[first:i], Counter())[padded[i]] += 1
    if not after:
        raise DataError("language model: no training transcript; expected at least one; give --lm FILE")
    model: dict = {("<s>",): [1e-99, 1.0]}  # given, never predicted
    for history in sorted(after, key=len):
        followers = after[history]
        types = len(followers)
        total = sum(followers.values()) + types
        if history:
            model[history][1] = types / total
        else:
            followers["<unk>"] = 0
        for word, count in followers.items():
            below = model[(*history[1:], word)][0] if history else 1 / (types + 1)
            model[(*history, word)] = [(count + types * below) / total, 1.0]
    return model


def write_arpa(path: str | Path, model: dict) -> None:
    """Writes the model of `witten_bell` as ARPA: log10 probability, words, log10 back-off weight."""
    sections: dict[int, list[str]] = {1: [], 2: [], 3: []}
    for gram, (p, backoff) in sorted(model.items()):
        weight = f"\t{math.log10(backoff):.7f}" if len(gram) < 3 else ""
        sections[len(gram)].append(f"{math.log10(p):.7f}\t{' '.join(gram)}{weight}")
    lines = ["\\data\\", *(f"ngram {n}={len(section)}" for n, section in sections.items())]
    for n, section in sections.items():
        lines += ["", f"\\{n}-grams:", *section]
    write_text(path, "\n".join([*lines, "", "\\end\\", ""]))


def load_lm(path: str | Path, vocabulary: list[str]) -> tuple:
    """KenLM of an ARPA or binary file for these words: (lm, log10 unigram scores, how many it
    knows). A word's id is its place."""
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    try:
        with _silent_stderr():
            lm = KenLM(str(path), Dictionary([*vocabulary, "<unk>"]))
    except (RuntimeError, ValueError) as error:
        found = str(error).strip().splitlines()[-1:]
        raise DataError(f"{path}: {found}; expected an n-gram model, ARPA or KenLM's binary") from error
    start = lm.start(True)  # of no sentence: the score is the unigram's
    *scores, unknown = [lm.score(start, i)[1] for i in range(len(vocabulary) + 1)]
    known = len(scores) - scores.count(unknown)
    if not known:
        told = f"knows none of {len(vocabulary)} words, such as {vocabulary[:1]}"
        raise DataError(f"{path}: {told}; expected an n-gram model of words in lower case")
    return lm, scores, known


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
    `known`: words of the LM, the rest score as <unk>; `dropped`: homophones too many, rarest by the LM."""

    def __init__(self, lexicon: Lexicon, lm: str | Path):
        from flashlight.lib.text import decoder as flashlight

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
        """The best words of one trial: log_probs (F, 41), settings by WORD_OPTIONS. No frame, no word."""
        return self.hypotheses(log_probs, settings)[0]["words"]

    def hypotheses(self, log_probs: np.ndarray, settings: dict) -> list[dict]:
        """The beam's word strings, best first: words, acoustic (scaled), lm (log10) and total score."""
        if not len(log_probs):
            return [{"words": [], "acoustic": 0.0, "lm": 0.0, "total": 0.0}]
        scale = settings["acoustic_scale"]
        emissions = scale * np.ascontiguousarray(log_probs, np.float32)  # its address goes to the library
        emissions[:, 0] -= scale * settings["blank_penalty"]
        weights = settings["lm_weight"], settings["word_score"]
        ctc = self.library.CriterionType.CTC
        # beam, beam of tokens, threshold, LM weight, word, unknown and SIL score, no sum of paths
        options = self.library.LexiconDecoderOptions(
            settings["beam"], len(PHONEMES), 25.0, *weights, -math.inf, 0.0, False, ctc
        )
        decoder = self.library.LexiconDecoder(options, self.trie, self.lm, SIL, 0, len(self.words), [], False)
        found: dict[tuple, dict] = {}
        for one in decoder.decode(emissions.ctypes.data, *emissions.shape):
            words = [self.words[i] for i in one.words if i >= 0]
            scores = {"acoustic": one.emittingModelScore, "lm": one.lmScore, "total": one.score}
            found.setdefault(tuple(words), {"words": words, **scores})
        return list(found.values())


def tune_words(decode: Callable, log_probs: list, references: list, settings: dict) -> tuple[dict, dict]:
    """The settings given, with the LM weight and word score, of WORD_GRID or their own, of the fewest errors;
    WER before and after. decode(one trial's log_probs, settings) gives its words."""
    if not any(references):
        raise DataError("--tune: no labelled validation trial; leave it out or give the settings")

    tried = []
    grid = (dict(zip(WORD_GRID, values, strict=True)) for values in itertools.product(*WORD_GRID.values()))
    for candidate in ({}, *grid):
        decoded = [decode(trial, settings | candidate) for trial in log_probs]
        tried.append((error_rate(per_counts(references, decoded)), settings | candidate))
    after, best = min(tried, key=lambda pair: pair[0])  # the first of equals: what was given, if it is one
    flags = " ".join(f"--{name.replace('_', '-')} {best[name]:.4g}" for name in WORD_GRID)
    print(f"tuned on {len(references)} validation sentences, WER {tried[0][0]:.4f} -> {after:.4f}: {flags}")
    return best, {"before": tried[0][0], "after": after}


def write_submission(path: str | Path, sentences: list[str], corpus: SpeechCorpus, indices) -> None:
    """Writes the sentences of one whole part by session name, then trial number: FILE.csv of id (row from 0)
    and text ('25), else a sentence a line ('24). DataError where a trial is missing, also one that the
    conversion left out, or the '24 competition part is not 1200 rows of 15 days."""
    part = corpus.part[indices[0]]
    left_out = [row["left_out"] for row in corpus.report.get("days", ()) if row["part"] == part]
    rows = sorted(zip((corpus.days[corpus.day[i]] for i in indices), indices, sentences, strict=True))
    size = len(rows), len({day for day, *_ in rows})  # rows, days
    expected = int((corpus.part == part).sum()) + sum(left_out), size[1]  # any number of days
    if part == "competition" and not corpus.synthetic and rows[0][0].startswith("t12."):
        expected = COMPETITION_SIZE
    if size != expected:
        raise DataError(f"{path}: {size} rows and days of part {part}; expected {expected}; give --part")
    texts = [text for *_, text in rows]
    if str(path).endswith(".csv"):
        write_csv(path, [("id", "text"), *enumerate(texts)])
    else:
        write_text(path, "".join(f"{text}\n" for text in texts))
    print(f"{path}: {size} sentences and days, {texts.count('')} sentences empty")


def word_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `words`, which runs when --words, --tune, --nbest or --submission is given."""
    add = parser.more.add_argument
    scale, ratio = number(float, 0, 100), number(float, -100, 100)
    add("--words", action="store_true", help="decoder: report the word error rate beside PER (off)")
    add("--tune", action="store_true", help="words: LM weight and word score by validation (off)")
    add("--submission", metavar="FILE", help="words: write .csv of id,text ('25), else lines ('24) (off)")
    add("--nbest", type=number(int, 1), help="words: write so many hypotheses a trial, with scores (off)")
    add("--nbest-file", default="nbest.jsonl", metavar="FILE", help="where, an object a line (%(default)s)")
    add("--lexicon", metavar="FILE", help="word and phonemes a line (default: training words)")
    add("--lm", metavar="FILE", help="n-gram ARPA or KenLM file (default: training trigram)")
    add("--acoustic-scale", type=scale, help="of log-probabilities (0.5; 512 channels: 0.325)")
    add("--blank-penalty", type=ratio, help="off blank, in nats (log 7; 512 channels: log 90)")
    add("--lm-weight", type=scale, help="factor of the LM's log10 (1)")
    add("--word-score", type=ratio, help="added for every word (0)")
    add("--beam", type=number(int, 1), help="hypotheses kept a frame (100)")


def wants_words(args) -> bool:
    return bool(args.words or args.tune or args.nbest or args.submission)


def word_model(corpus: SpeechCorpus, train: Iterable[int], cache, lexicon=None, lm=None) -> tuple:
    """(lexicon, LM file): the files given, else made from the transcripts of the trials `train`."""
    texts = [corpus.text[i] for i in train]
    if lm is None:
        sentences = list(filter(None, map(spoken_words, texts)))
        lm = f"{cache}/trigram-{short_hash(sentences, 12)}.arpa"
        write_arpa(lm, witten_bell(sentences))
    if lexicon:
        return read_lexicon(lexicon), lm
    return training_lexicon(texts, [corpus.labels[i] for i in train]), lm


def word_settings(channels: int, args=None) -> dict:
    """Settings of the search: those of the options where given, else the public ones for so many channels."""
    settings = WORD_DEFAULTS | WORD_SETTINGS.get(channels, WORD_SETTINGS[256])
    given = {name: getattr(args, name, None) for name in settings}
    return settings | {name: value for name, value in given.items() if value is not None}


def said_in(corpus: SpeechCorpus, trials: Iterable[int]) -> list[list[str]]:
    """Words of the transcripts of trials."""
    return [spoken_words(corpus.text[i]) for i in trials]


def words(
    log_probs: dict, corpus: SpeechCorpus, trials: np.ndarray, args, valid: np.ndarray, train: Iterable[int]
) -> dict:
    """Decodes trials into words, prints and returns "sentences" (by trial), settings and, of labelled trials,
    WER (0 to 1), that of the settings before --tune and of the beam's best string; writes --submission and
    --nbest. log_probs: (F, 41) by trial; valid: trials for --tune; train: trials whose transcripts make the
    lexicon and the LM."""
    settings, figures = word_settings(corpus.channels, args), {}
    lexicon, lm = word_model(corpus, train, args.cache, args.lexicon, args.lm)
    search = WordSearch(lexicon, lm)
    scored = trials[corpus.labelled[trials]]
    said = said_in(corpus, scored)
    print(f"{len(search.words)} words, {search.known} known to {lm}; {search.dropped} homophones left out")
    if args.tune:
        known = valid[corpus.labelled[valid]]
        untuned = [search.decode(log_probs[i], settings) for i in scored]
        heard, references = [log_probs[i] for i in known], said_in(corpus, known)
        settings, figures["tuned"] = tune_words(search.decode, heard, references, settings)
        if said:
            figures["wer_untuned"] = error_rate(per_counts(said, untuned))
            print(f"WER without it {figures['wer_untuned']:.4f}")
    beams = {i: search.hypotheses(log_probs[i], settings) for i in trials}
    sentences = {i: beam[0]["words"] for i, beam in beams.items()}
    if said:
        figures |= _word_scores(said, [beams[i] for i in scored], salad_trials(corpus)[scored])
    if args.nbest:
        write_nbest(args.nbest_file, [(corpus.ids[i], beam) for i, beam in beams.items()], args.nbest)
    if args.submission:
        texts = [" ".join(sentence) for sentence in sentences.values()]
        write_submission(args.submission, texts, corpus, trials)
    return figures | {"settings": settings, "sentences": sentences}


def _word_scores(said, beams, salad):
    """Figures of `words`, printed, of trials: what was said, its beam, whether random words."""
    counts = per_counts(said, [beam[0]["words"] for beam in beams])
    nearest = []  # of each beam to what was said
    for words, beam in zip(said, beams, strict=True):
        distance = functools.partial(Levenshtein.distance, words)
        nearest.append(min((one["words"] for one in beam), key=distance))
    figures = {"wer": error_rate(counts), "wer_interval": trial_bootstrap(counts)}
    figures["wer_counts"] = dict(zip((*EDITS, "words"), counts.sum(0).tolist(), strict=True))
    figures["oracle_wer"] = error_rate(per_counts(said, nearest))
    print(f"WER {figures['wer']:.4f} 95 % {brackets(figures['wer_interval'])} {figures['wer_counts']}")
    if salad.any():
        figures["wer_salad"] = error_rate(counts[salad])
        print(f"WER of {salad.sum()} sentences of random words {figures['wer_salad']:.4f}")
    print(f"best string of the beam: WER {figures['oracle_wer']:.4f}")
    return figures


def write_nbest(path: str | Path, beams: list[tuple[str, list[dict]]], most: int) -> None:
    """An object a line: trial, rank from 1, text, acoustic score (scaled, blank penalty in it), LM score
    (log10) and total, of a trial's `most` best hypotheses."""
    lines = []
    for name, beam in beams:
        for rank, one in enumerate(beam[:most], 1):
            about = {"trial": name, "rank": rank, "text": " ".join(one["words"])}
            lines.append(json.dumps(about | {key: one[key] for key in ("acoustic", "lm", "total")}) + "\n")
    write_text(path, "".join(lines))
    print(f"{path}: {len(lines)} hypotheses of {len(beams)} trials")


def write_logits(folder: str | Path, log_probs: list[tuple[str, np.ndarray]]) -> None:
    """A float16 array (frames, 41) a trial, natural logarithms of probabilities, for a search elsewhere."""
    for name, row in log_probs:
        path = Path(folder, f"{name.replace('/', '_')}.npy")
        write_atomic(path, lambda file, row=row: np.save(file, np.float16(row)))
    print(f"{folder}: {len(log_probs)} arrays, columns blank {spell(range(1, len(PHONEMES)))}")


# ------------------------------------------------------------------------------------------------------------
# Audio
# ------------------------------------------------------------------------------------------------------------


def whole_clip(item: dict, info: dict) -> Tensor:
    """An item's fbank (frames, 128), normalised by info's mean and std: (1, T, 128), at least a patch."""
    return normalise_fbank(pad_fbank([item["fbank"][:]], PATCH)[0], info["mean"], info["std"])


@torch.no_grad()
def describe_clip(model: AST, item: dict, info: dict) -> Tensor:
    """What the heads of an AST see of a whole item, in crops that cover it: (1, size)."""
    clip = whole_clip(item, info).to(next(model.parameters()).device)
    of_clip = None
    if model.statistics is not None:
        known = item.get("statistics")  # of an item that trains
        of_clip = model.statistics.values(clip) if known is None else torch.tensor(known[None]).to(clip)
    return model.describe(whole_crops(clip, model.model_args["frames"]), statistics=of_clip)


@torch.no_grad()
def predict_ast(model: nn.Module, items: list, info: dict, device: torch.device, batch=8) -> np.ndarray:
    """Ratings in [0, 1] of prepared items (data.prepare_ast), (n, 19) float64 in the order given. Of an item
    longer than the model's frames an AST pools the tokens of all crops; of other models it is the mean. info:
    the checkpoint's data (mean, std, frames; target_mean, target_std where ratings were standardised). batch:
    crops at once, not of an AST; they are equally long, so none needs a mask."""
    longest = model.model_args.get("frames") or info["frames"]
    training = model.training
    model = model.to(device).eval()
    rows = []
    for item in items:
        if isinstance(model, AST):
            rated = model(described=describe_clip(model, item, info))
        else:
            crops = whole_crops(whole_clip(item, info).to(device), longest)
            rated = torch.cat([model(x) for x in crops[0].split(batch)])
        rows.append(rated.cpu().double().mean(0).numpy())
    model.train(training)
    p = np.array(rows).reshape(-1, len(LABELS))
    if info.get("target_mean") is not None:
        p = p * np.asarray(info["target_std"]) + np.asarray(info["target_mean"])
    return p.clip(0, 1)


@torch.no_grad()
def unlike_training(model: nn.Module, energies: np.ndarray, info: dict) -> float:
    """Share of a clip's statistics beyond 4 SD of the training clips'; 0 for models without them. It does not
    know another piano for what it is."""
    table = getattr(model, "statistics", None)
    if table is None:
        return 0.0
    x = torch.from_numpy(energies.astype(np.float16))[None].to(table.mean)  # its type and device
    seen = table.values(normalise_fbank(x, info["mean"], info["std"]))[0]
    mean, std = table.mean, table.std
    if isinstance(model, ClipKernel):
        known = model.quantiles[:, : table.size]
        mean, std = known.mean(0), known.std(0).clip(1e-3)
    return float(((seen - mean).abs() > 4 * std).float().mean())


WHOLE_CLIP = 10**9  # frames: more than any recording has


def audio_store(corpus: Corpus, args) -> FbankStore:
    """Log-mel energies of the corpus, of --audio or rendered, and the versions of --copies, --soundfonts."""
    versions = heard_versions(args.copies, args.soundfonts)
    store = percepiano_audio(corpus.root, args.cache, args.audio, versions)
    say_left_out(store.left_out)
    return store


def rated_store(corpus: Corpus, args, trained_on: str | None = None) -> FbankStore:
    """Log-mel energies of what is rated: of --audio or rendered, or as --rate says; says where a model was
    trained on the other kind."""
    audio, heard = args.audio, AS_PLAYED
    if args.rate == RECORDED:
        heard = Version(copy=RECORDED)
    elif args.rate and Path(args.rate).is_dir():
        audio = args.rate
    elif args.rate:
        audio, heard = None, Version(soundfont=args.rate)
    store = percepiano_audio(corpus.root, args.cache, audio, base=heard)
    say_left_out(store.left_out)
    kind = "wav" if audio else "rendered"
    if trained_on not in (None, kind):
        print(f"trained on audio of kind {trained_on}, evaluated on {kind}; recordings: --audio DIR")
    return store


def with_masks(batch: dict, masked: int, generator: torch.Generator | None = None) -> dict:
    """The batch and `mask`, ids of patches to hide: `masked` of 512 at 1024 frames, a like share of fewer."""
    x, lengths = batch["x"], lengths_if_unlike(batch)
    columns = None if lengths is None else (lengths // PATCH).clip(min=1).to(x.device)
    T = x.shape[1] // PATCH  # columns of 8 patches
    count = max(1, round(masked / 512 * 8 * T))
    where = "cpu" if x.is_mps else x.device  # MPS has no float64
    mask = cluster_mask(len(x), 8, T, count, where, generator, columns=columns)
    return batch | {"mask": mask.to(x.device)}


def lengths_if_unlike(batch):
    """None where all clips fill their rows: attention needs no mask then, and is faster without."""
    whole = bool((batch["lengths"] == batch["x"].shape[-2]).all())
    return None if whole else batch["lengths"]


def pretrain_figures(model: nn.Module, batch: dict, compat: bool) -> dict:
    """nce, accuracy, chance, mse, mse_mean of the masked patches, and loss: nce + 10 mse (SSAST, eq. 3)."""
    figures = model(batch["x"], lengths_if_unlike(batch), mask=batch["mask"], compat=compat)
    return figures | {"loss": figures["nce"] + 10 * figures["mse"]}


@torch.no_grad()
def validate_pretraining(model: nn.Module, batches: list, device: torch.device, args) -> dict:
    """Mean figures over fixed crops: valid_loss, valid_nce, ... args: the trainer's; its seed fixes masks."""
    generator = torch.Generator().manual_seed(args.seed)
    sums: Counter[str] = Counter()
    model.eval()
    for batch in batches:
        batch = to_device(with_masks(batch, args.mask, generator), device)
        for name, value in pretrain_figures(model, batch, args.ssast_compat).items():
            sums[f"valid_{name}"] += float(value) * len(batch["names"])
    count = sum(len(batch["names"]) for batch in batches)
    return {name: total / count for name, total in sums.items()}


def evaluate_pretraining(args, loaded: list) -> dict:
    """The trainer's own figures of a pre-training: its crops and masks, of --data, normalised as it knows."""
    model, ckpt = loaded[0]
    path, data = ckpt.pop("path"), ckpt["data"]
    if len(loaded) > 1 or args.csv or args.save_results or (args.data is None and not data["synthetic"]):
        raise DataError(f"{path}: a pre-training; give it alone, with its --data, without result files")
    given = {key: getattr(args, key) for key in ("data", "audio", "cache")}
    settings = argparse.Namespace(**ckpt["args"] | given)
    _, batches, now = pretrain_data(settings, False, print, {key: data[key] for key in ("mean", "std")})
    if now["recordings"] != data["recordings"]:
        print("other recordings than the model was trained with: some that validate here may have trained it")
    if data.get("exclude_overlap") and not settings.exclude_overlap:
        print("PercePiano's music was left out in the training, not here")
    figures = validate_pretraining(model.to(args.device), batches, args.device, settings)
    print(corpus_line(now["synthetic"], args.data))
    print(f"{path}, step {ckpt['step']}: {pretrain_summary(figures)}")
    if args.out:
        save_half(args.out, ckpt)
    return figures


def pretrain_summary(figures: dict) -> str:
    """Validation figures in a line, each beside what guessing reaches."""
    told = "loss {valid_loss:.4f}  NCE {valid_nce:.4f}  accuracy {valid_accuracy:.4f} "
    told += "(chance {valid_chance:.4f})  MSE {valid_mse:.4f} (mean patch {valid_mse_mean:.4f})"
    return told.format(**figures)


# ------------------------------------------------------------------------------------------------------------
# Significance and comparison
# ------------------------------------------------------------------------------------------------------------


def permutation_p(y, p, groups, n: int = 1000, folds: np.ndarray | None = None) -> np.ndarray:
    """One-sided p-value per dimension, (D,), of the Pearson correlation (mean over folds) if predictions knew
    nothing. Items of one of groups (n,) are alike, so each receives the predictions of a whole group of its
    fold, in random order, cut or repeated to its size; folds of the same groups are permuted alike.
    p = (1 + draws as good) / (1 + n) (Phipson & Smyth, 2010)."""
    folds = np.zeros(len(y), int) if folds is None else folds
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    groups_of, rows_of = {}, {}
    for fold in np.unique(folds):
        groups_of[fold] = np.unique(group[folds == fold])
        for k in groups_of[fold]:
            rows_of[fold, k] = np.flatnonzero((folds == fold) & (group == k))
    largest = max(map(len, rows_of.values()))
    observed = by_fold(pearson, folds, y, p)
    as_good = 0
    rng = np.random.default_rng(7)
    for _ in range(n):
        order, within = rng.random(len(names)), rng.random((len(names), largest))
        source = np.empty(len(y), int)
        for fold, takers in groups_of.items():
            for taker, donor in zip(takers, takers[order[takers].argsort()], strict=True):
                rows, given = rows_of[fold, taker], rows_of[fold, donor]
                shuffled = given[within[donor, : len(given)].argsort()]
                source[rows] = np.resize(shuffled, len(rows))
        as_good += by_fold(pearson, folds, y, p[source]) >= observed - 1e-12
    return (1 + as_good) / (1 + n)


def holm(p: Iterable[float]) -> np.ndarray:
    """p-values adjusted for their number (Holm, 1979), in the order given. NaN stays and does not count."""
    p = np.asarray(p, np.float64)
    adjusted, order = np.full(p.shape, np.nan), np.argsort(p)[: np.isfinite(p).sum()]
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted


def paired_bootstrap(y, pa, pb, groups, statistic: Callable, folds, n: int = 5000, seed: int = 7) -> tuple:
    """statistic(y, pa) - statistic(y, pb), its 95 % interval (low, high) and two-sided p-value, of the
    statistic's shape, when whole groups are drawn with replacement, the same for both; folds as in
    `cluster_bootstrap`. p is twice the smaller share of draws on either side of 0, counting the observed one.
    Interval NaN and p 1 when too few groups remain."""

    def gain(y, a, b):
        return statistic(y, a) - statistic(y, b)

    difference = by_fold(gain, folds, y, pa, pb)
    draws = resample(gain, groups, folds, y, pa, pb, n=n, seed=seed)
    if not len(draws):
        draws = np.full((1, *difference.shape), np.nan)
    tie = 1e-12  # a difference of 0 but for rounding counts on either side
    fewer = np.minimum((draws < tie).sum(0), (draws > -tie).sum(0))
    p = np.minimum(2 * (fewer + 1) / (len(draws) + 1), 1)
    return difference, np.percentile(draws, [2.5, 97.5], axis=0), p


def significance(predictions: dict, truth: dict, parts: Iterable[str] = (), n: int = 1000) -> dict:
    """{part: {view: {"pearson_interval", "r2_interval" (19 pairs, cluster bootstrap over segments), "p",
    "p_holm" (19, `permutation_p`)}, means over folds, or None where too few segments are rated}}."""

    def test(names, y, p, folds):
        groups = [segment_of(name) for name in names]
        draws = resample(lambda y, p: np.stack([pearson(y, p), r2(y, p)]), groups, folds, y, p, n=n)
        if not len(draws):
            return None
        of_pearson, of_r2 = np.percentile(draws, [2.5, 97.5], axis=0).transpose(1, 2, 0).tolist()
        chance = permutation_p(y, p, groups, n, folds=folds)
        tests = {"pearson_interval": of_pearson, "r2_interval": of_r2}
        return tests | {"p": chance.tolist(), "p_holm": holm(chance).tolist()}

    return of_views(test, predictions, truth, parts)


# With fewer independent items a bootstrap promises too much: that five all differ one way has a chance of
# 2 / 2**5 > .05 (sign test).
FEWEST = 6
CLUSTERS = {"segment": segment_of, "performer": player_of}


def compare(argv: list[str]) -> dict:
    """`python eval.py compare`: paired test of two sets of predictions; returns its figures."""
    about = """\
Is A better than B, or is it chance? Both predict the same items; the last line says it in a sentence.
Paired bootstrap over segments, or a decoder's trials; of the 19 ratings with Holm's correction."""
    parser = _parser("compare", "--a FILE ... --b FILE ... [--data DIR] [options]", about)
    add = parser.add_argument
    for side in ("--a", "--b"):
        add(side, nargs="+", required=True, metavar="FILE", help="CSV, or best.pt files (required)")
    add("--metric", choices=METRICS, default="pearson", help="ratings: what is compared (%(default)s)")
    add("--cluster", choices=CLUSTERS, default="segment", help="ratings: drawn as a whole (%(default)s)")
    add = parser.more.add_argument
    add("--draws", type=number(int, 100), default=5000, help="of the bootstrap (%(default)s)")
    args = _parse(parser, argv, part_options, word_options, data_options)
    if args.nbest or args.submission:
        raise DataError("compare: takes no --nbest, --submission, files of one side; leave them out")
    models = [[] if paths[0].endswith(".csv") else _load_models(paths) for paths in (args.a, args.b)]
    sides = list(zip((args.a, args.b), models, strict=True))
    tasks = {paths[0]: loaded[0][1]["task"] for paths, loaded in sides if loaded}
    for path, task in tasks.items():
        refuse_foreign(args, task, path, tasks.values())
    (a, about), (b, other) = (_side(args, *side) for side in sides)
    print(f"A {' '.join(args.a)}\nB {' '.join(args.b)}")
    if any(about[key] != other[key] for key in about.keys() & other.keys()):
        raise DataError(f"{args.a[0]}, {args.b[0]}: {about} and {other}; expected predictions of one kind")
    synthetic = (about | other).get("synthetic")
    if about["decoder"]:
        if synthetic is not None:
            print(corpus_line(synthetic, "the files named"))
        pairs = _paired_trials(a, b)
        name, labels, metric = "phoneme error rate", (), lambda _, counts: np.array([error_rate(counts)])
    else:
        pairs = _paired_ratings(a, b, args, synthetic)
        name, labels, metric = f"mean {args.metric}", RATINGS.values(), METRICS[args.metric]
    *_, groups, _ = pairs
    if len(set(groups)) < 2:
        found = f"{len(groups)} rated items or trials that both predict"
        raise DataError(f"{args.a[0]}, {args.b[0]}: {found} in part {args.part}; expected more; give --data")
    print(f"{len(a.keys() ^ b.keys())} items that only one side predicts left out")
    told = {}
    if about["decoder"] and all(len(item) == 4 for item in (*a.values(), *b.values())):
        told["words"] = _answer("word error rate", labels, metric, *_paired_trials(a, b, 2), args.draws)
    return _answer(name, labels, metric, *pairs, args.draws) | told


def _side(args, paths, loaded):
    """Items as of `read_predictions`, of a CSV or models; what is known: decoder, synthetic, split."""
    args.ckpt = paths
    if not loaded:
        if len(paths) > 1:
            raise DataError(f"{paths[1]}: beside {paths[0]}; expected one CSV, which holds all folds")
        items = read_predictions(paths[0])
        beside = Path(paths[0]).with_suffix(".json")
        try:
            saved = dict(read_json(beside)) if beside.exists() else {}
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{beside}: {error}; expected what --save-results wrote; remove it") from error
        about = {key: saved[key] for key in ("split", "synthetic") if key in saved}
        return items, about | {"decoder": isinstance(next(iter(items)), str)}
    items = {}
    if loaded[0][1]["task"] == "decoder":
        corpus, parts, log_probs = _heard_part(args, loaded)
        trials = parts[args.part]
        columns = greedy_strings(log_probs, corpus, trials)
        if wants_words(args):
            found = words_of_part(args, loaded, corpus, parts, log_probs)
            columns += said_in(corpus, trials), found["sentences"].values()
        items = {corpus.ids[i]: strings for i, *strings in zip(trials, *columns, strict=True)}
        return items, {"decoder": True, "synthetic": corpus.synthetic}
    predictions, _, _, data = _rate_parts(args, loaded, [args.part])
    return predictions, {"decoder": False, "split": data["split"]}


def _paired_ratings(a, b, args, synthetic):
    """Truth, predictions of A and B (n, 19), groups and folds of the rated items that both predict."""
    root = Path(args.data or synthetic_percepiano(args.cache))
    here = (root / "SYNTHETIC").is_file()
    if synthetic not in (None, here):  # the names would be the same
        raise DataError(f"{args.a[0]}, {args.b[0]}: of another corpus than {root}; give --data DIR")
    print(corpus_line(here, root))
    truth = read_labels(root, [])
    both = sorted(item for item in a.keys() & b.keys() if item[0] == args.part and item[2] in truth)
    y = np.array([truth[name] for *_, name in both])
    pa, pb = (np.array([side[item] for item in both]) for side in (a, b))
    groups = [str(CLUSTERS[args.cluster](name)) for *_, name in both]
    return y, pa, pb, groups, np.array([fold for _, fold, _ in both])


def _paired_trials(a, b, first=0):
    """As `_paired_ratings`, of trials with one reference on both sides: `per_counts` (n, 4), of the truth
    without errors. first: where in an item the reference stands, 0 of phonemes, 2 of words."""
    both = [trial for trial in a if trial in b and a[trial][0] == b[trial][0]]
    refs = [a[trial][first] for trial in both]
    of_a, of_b = (per_counts(refs, [side[trial][first + 1] for trial in both]) for side in (a, b))
    return per_counts(refs, refs), of_a, of_b, list(range(len(both))), np.zeros(len(both), int)


def _answer(name, labels, metric, y, pa, pb, groups, folds, draws):
    """Tests whether the sides differ in metric(y, p), whose figures belong to labels, and in its mean; prints
    and returns table and verdict. Better is what is nearer to the truth's own figure."""

    def statistic(y, p):
        each = metric(y, p)
        return np.append(each[: len(labels)], each.mean())

    a, b, perfect = (by_fold(statistic, folds, y, side) for side in (pa, pb, y))
    difference, interval, p = paired_bootstrap(y, pa, pb, groups, statistic, folds, draws)
    clusters = len(set(groups))
    if clusters < FEWEST:
        p = np.full_like(p, np.nan)
    corrected = np.append(holm(p[:-1]), p[-1])
    print(f"{len(y)} items in {clusters} groups (a test needs {FEWEST}), drawn {draws} times")
    columns = {"A": a, "B": b, "A - B": difference, "95 %": interval.T, "p": p, "p (Holm)": corrected}
    print_table([name, *columns], zip([*labels, "all"], *columns.values(), strict=True))
    verdict = "A cannot be told from B"
    if p[-1] < 0.05:
        verdict = f"A is {'better' if abs(a - perfect)[-1] < abs(b - perfect)[-1] else 'worse'} than B"
    verdict += f": {name} {difference[-1]:+.4f} {brackets(interval[:, -1])}, p = {shown(p[-1])}"
    print(verdict)
    figures = {"items": len(y), "clusters": clusters, "a": a[-1], "b": b[-1], "difference": difference[-1]}
    figures |= {"interval": interval[:, -1].tolist(), "p": p[-1], "verdict": verdict}
    return figures | {"per_dimension": {"p": p[:-1].tolist(), "p_holm": corrected[:-1].tolist()}}


# ------------------------------------------------------------------------------------------------------------
# Rater ceiling
# ------------------------------------------------------------------------------------------------------------


def rater_ceiling(raters: np.ndarray, names: np.ndarray, ratings: np.ndarray) -> dict:
    """What perfect knowledge of every item's true rating would score against the means of the raters there
    are. raters (n,), names (n,), ratings (n, D), NaN = none; as data.read_ratings. Returns arrays (D,) "r2",
    "pearson" (its root), "between", "error", "noise" (see `_ceiling_column`), and "items", "per_item"."""
    columns = []
    for x in ratings.T:
        rated = np.isfinite(x)
        columns.append(_ceiling_column(names[rated], raters[rated], x[rated]))
    figures = {key: np.array([column[key] for column in columns]) for key in columns[0]}
    items = len(np.unique(names))
    pearson = np.sqrt(figures["r2"].clip(min=0))
    return {**figures, "pearson": pearson, "items": items, "per_item": len(names) / items}


def _ceiling_column(names, raters, x):
    """`rater_ceiling` of one dimension: item, rater and value of every rating, (n,) each. Rating = true +
    rater's own view of the item (variance b) + error of the moment (variance e, from raters who rated twice).
    The mean of item i, of which rater j gave m_ij of N_i ratings, errs by
    noise_i = b sum_j(m_ij²) / N_i² + e / N_i; R² = 1 - mean(noise_i) / Var(item means)."""
    _, item, N = np.unique(names, return_inverse=True, return_counts=True)
    _, rater = np.unique(raters, return_inverse=True)
    key, pair, m = np.unique(item * len(x) + rater, return_inverse=True, return_counts=True)
    mean = np.bincount(item, x) / N
    within_item = ((x - mean[item]) ** 2).sum()
    within_pair = ((x - (np.bincount(pair, x) / m)[pair]) ** 2).sum()
    concentration = np.bincount(key // len(x), m**2) / N  # sum_j(m_ij²) / N_i, 1 if nobody rated twice
    error = within_pair / max(len(x) - len(m), 1)
    excess = within_item - error * (len(x) - len(N))
    between = max(0.0, excess / max((N - concentration).sum(), 1e-12))
    noise = (between * concentration / N + error / N).mean()
    return {"r2": 1 - noise / mean.var(), "between": between, "error": error, "noise": noise}


def within_ceiling(root: str | Path) -> list[float] | None:
    """Pearson correlation within segments of somebody who knew every human performance's true ratings, from
    if raters' severity stays in the means of a segment to if it cancels; None without individual ratings."""
    try:
        raters, names, ratings = read_ratings(root)
    except DataError:
        return None
    human = np.array([not is_rendering(name) for name in names])
    raters, names, ratings = raters[human], names[human], ratings[human] / 7
    segments = [segment_of(name) for name in np.unique(names)]
    means = group_means(ratings, names)
    freedom = max(len(segments) - len(set(segments)), 1)
    variance = (within_segments(means, segments) ** 2).sum(0).clip(1e-12) / freedom
    rater = np.unique(raters, return_inverse=True)[1]
    bounds = []
    for severity in (0, group_means(ratings, rater)[rater]):
        noise = rater_ceiling(raters, names, ratings - severity)["noise"]
        bounds.append(float(np.sqrt((1 - noise / variance).clip(0)).mean()))
    return bounds


def group_means(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Means (groups, ...) of values (n, ...) by ascending group; NaN is no value."""
    _, index, count = np.unique(group, return_inverse=True, return_counts=True)
    parts = np.split(values[index.argsort()], count.cumsum()[:-1])
    return np.stack([np.nanmean(part, axis=0) for part in parts])


def ceiling(argv: list[str]) -> dict:
    """`python eval.py ceiling`: prints and returns `rater_ceiling`, with and without score renderings."""
    about = """\
The most that any model can score, since raters disagree: r2 and Pearson of somebody who knew every
performance's true rating."""
    args = _parse(_parser("ceiling", "[--data DIR] [options]", about), argv, data_options)
    root = Path(args.data or synthetic_percepiano(args.cache))
    raters, names, ratings = read_ratings(root)
    print(corpus_line((root / "SYNTHETIC").is_file(), root))
    human = np.array([not is_rendering(name) for name in names])
    views = {}
    for view, chosen in (("all", human | True), ("no_renderings", human)):
        figures = views[view] = rater_ceiling(raters[chosen], names[chosen], ratings[chosen] / 7)
        print(f"{VIEWS[view]}: {figures['items']} items, {figures['per_item']:.1f} ratings each")
        columns = [np.append(figures[key], figures[key].mean()) for key in ("r2", "pearson")]
        print_table(["ceiling", "r2", "pearson"], zip([*RATINGS.values(), "mean"], *columns, strict=True))
    print(f"human players within a segment: Pearson {brackets(within_ceiling(root))}")
    return views


# ------------------------------------------------------------------------------------------------------------
# Attention: pictures, and the roll-out of an AST
# ------------------------------------------------------------------------------------------------------------
ORANGE = "tab:orange"
HOUSE_STYLE = {  # of every picture; no TeX in names
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "font.size": 12,
    "text.parse_math": False,
}
PICTURES = (".png", ".pdf", ".svg")
# Attention over an even share, less 1. One scale, so that a network that prefers nothing looks pale.
SHARES = {"cmap": "coolwarm", "clim": (-0.25, 0.25)}
SHARES_BAR = {"extend": "both", "format": "{x:+.0%}", "pad": 0.01, "label": "against an even share"}
ONE_FOR_ALL = "Attention, one for all ratings: where the network looks, not why a rating is high"


def new_figure(width: float, height: float):
    """A matplotlib figure of so many inches of 100 pixels, in the style of all."""
    from matplotlib import rcParams  # here: it takes half a second
    from matplotlib.figure import Figure

    rcParams.update(HOUSE_STYLE)
    return Figure((width, height))


def save_figure(figure, out: Path) -> None:
    write_atomic(out, lambda file: figure.savefig(file, format=out.suffix[1:].lower()))


def inline_figure(figure, alt: str) -> str:
    """The figure as an <img> that holds its own pixels."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    pixels = base64.b64encode(file.getvalue()).decode()
    return f'<div class="scroll"><img alt="{alt}" src="data:image/png;base64,{pixels}"></div>'


def picture_title(figure, what: str, members: list[tuple], work: dict) -> None:
    synthetic = ", SYNTHETIC training data" if members[0][1]["data"].get("synthetic") else ""
    figure.suptitle(f"{work['name']} ({counted(members)}{synthetic}): {what}")


def counted(members: list) -> str:
    return f"mean of {len(members)} checkpoints" if len(members) > 1 else "one checkpoint"


def check_output(path: Path, *suffixes: str) -> None:
    """Refuses, before anything is computed, what cannot be written or is of another kind."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    known = not suffixes or path.suffix.lower() in suffixes
    if path.is_dir() or not (known and folder.is_dir() and os.access(folder, os.W_OK)):
        raise DataError(
            f"{path}: expected a {' or '.join(suffixes) or 'file'} in a folder that can be written"
        )


@torch.no_grad()
def module_inputs(model: nn.Module, kind: type, *inputs) -> dict[nn.Module, tuple]:
    """{module: what it is called with} of all modules of a kind, in the order of their calls."""
    found = {}
    with contextlib.ExitStack() as hooks:
        for module in model.eval().modules():
            if isinstance(module, kind):
                hooks.enter_context(module.register_forward_pre_hook(found.__setitem__))
        model(*inputs)
    return found


@torch.no_grad()
def roll_out(model: AST, clip: Tensor) -> Tensor:
    """Attention roll-out (Abnar & Zuidema, ACL 2020) of an AST: what reaches its output from each patch.

    clip (frames, mel), normalised -> (rows, columns), mean 1. Weights are averaged over heads and with the
    identity (the residual path), multiplied through the layers, averaged over what the model pools."""
    rolled = None
    for block, (x, _) in module_inputs(model, Block, clip[None]).items():
        q, k, _ = block.qkv(block.norm1(x))[0].unflatten(1, (3, block.heads, -1)).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(2).mean(0)  # (T, T), rows: queries
        step = (weights + torch.eye(len(weights), device=x.device)) / 2
        rolled = step if rolled is None else step @ rolled
    extra = 0 if model.extra is None else 2
    share = model.pool(rolled[None], None)[0, extra : len(rolled)]
    return (share / share.mean()).unflatten(0, (model.rows, -1))


def roll_out_file(model: AST, energies: Tensor) -> np.ndarray:
    """energies (frames, mel), normalised -> shares (rows, columns). Crops are as long as the model takes,
    spaced as in `crop_starts`, and averaged where they overlap."""
    total = model.count(len(energies))
    span = min(total, model.columns)
    share, crops = np.zeros((model.rows, total)), np.zeros(total)
    for start in crop_starts(total, span):
        first = start * model.stride
        crop = energies[first : first + (span - 1) * model.stride + PATCH]
        share[:, start : start + span] += roll_out(model, crop).cpu().double().numpy()
        crops[start : start + span] += 1
    return share / crops


def explain_ast(figure, members: list[tuple], work: dict) -> dict:
    """The spectrogram, and below it the mean roll-out of ASTs; work: name, energies (frames, 128)."""
    asts = [(model, kept) for model, kept in members if isinstance(model, AST)]
    if len({model.stride for model, _ in asts}) != 1:
        found = f"{members[0][1]['path']}: no AST, or of several strides"
        raise DataError(f"{found}; expected one; give best.pt of pretrain_ast.py")
    energies, stride, shares = work["energies"], asts[0][0].stride, []
    for model, kept in asts:
        x = torch.from_numpy(normalise_fbank(energies, kept["data"]["mean"], kept["data"]["std"])).float()
        shares.append(roll_out_file(model, x.to(next(model.parameters()).device)))
    share = np.mean(shares, axis=0)
    row, column = (PATCH / 2 + stride * np.arange(count) for count in share.shape)
    frame = HOP / SAMPLE_RATE
    picture_title(figure, f"AST\n{ONE_FOR_ALL}", asts, work)
    loudness, attention = figure.subplots(2, sharex=True, sharey=True)
    extent = (0, frame * len(energies), -0.5, MELS - 0.5)
    dark = loudness.imshow(energies.T, cmap="gray_r", origin="lower", aspect="auto", extent=extent)
    loudness.set(title="What sounds", ylabel="mel band")
    figure.colorbar(dark, ax=loudness, label="log energy", pad=0.01)
    # fixed, so that an undecided network looks undecided; pre-trained ones give single patches many shares
    scale = {"cmap": SHARES["cmap"], "norm": "log", "vmin": 1 / 8, "vmax": 8}
    shades = attention.pcolormesh(frame * column, row - 0.5, share, **scale)
    attention.set(title="What of it reaches the output (attention roll-out)", ylabel="mel band")
    attention.set_xlabel("time (s)")
    bar = SHARES_BAR | {"format": "{x:g}", "label": "in even shares"}
    figure.colorbar(shades, ax=attention, ticks=2.0 ** np.arange(-3, 4), **bar).minorticks_off()
    return {"share": share}


def read_piece(path: str | Path, rendered: bool) -> tuple[np.ndarray, list[str], dict]:
    """Log-mel energies (frames, 128) of a sound file, or of a MIDI file as the built-in piano plays it, as
    networks see them; remarks on the sound; repairs of the MIDI file, as `say_repairs` takes them."""
    if rendered:
        performance = read_midi(path)
        return heard_energies(render(performance), path).numpy(), [], {str(path): performance.repairs}
    waveform, remarks = read_sound(path)
    return heard_energies(waveform, path).numpy(), remarks + sound_remarks(waveform), {}


def attention(argv: list[str]) -> dict:
    """`python eval.py --attention OUT`: the roll-out of one AST on one file."""
    about = "Draws over a piece's spectrogram which parts of it reach an AST's output."
    parser = _parser("--attention", "OUT.png --audio FILE.wav | --midi FILE.mid --ckpt FILE", about)
    add = parser.add_argument
    add("--attention", required=True, help="picture to write: .png, .pdf or .svg (required)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--audio", help="sound file of any length")
    source.add_argument("--midi", help="MIDI file, played by the built-in piano")
    add("--ckpt", required=True, help="best.pt of pretrain_ast.py, of either task (required)")
    args = _parse(parser, argv)
    path = args.audio or args.midi
    loaded = _load_models([args.ckpt])
    loaded[0][0].to(args.device)
    energies, remarks, _ = read_piece(path, rendered=not args.audio)
    for remark in remarks:
        print(remark)
    work = {"name": printable(Path(path).name), "energies": energies}
    drawn = explain("ast", args.attention, loaded, work)
    print(f"saved {args.attention}")
    return drawn


# ------------------------------------------------------------------------------------------------------------
# Training curves
# ------------------------------------------------------------------------------------------------------------
RATED = [f"valid_{metric}" for metric in METRICS]
CURVES = ("valid_per", *RATED, "valid_accuracy", "loss", "valid_loss", "spread", "norm", "lr", "skipped")
CURVE_TITLES = {"spread": "spread: SD of predictions / of ratings", "norm": "norm of gradient"}


def read_run(run: str) -> tuple[dict, list[dict]]:
    """Options and log of a run's folder; says how many lines a crash has cut short and left unread."""
    try:
        options = dict(read_json(Path(run, "args.json")))
        lines = read_file(Path(run, "metrics.jsonl"), 2**28).splitlines()
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{run}: no args.json and metrics.jsonl of a run ({error})") from error
    records = []
    for line in lines:
        try:
            record = dict(json.loads(line))
            records.append(record | {"step": int(record["step"])})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    if not records:
        raise DataError(f"{run}/metrics.jsonl: none of its {len(lines)} lines is whole; train again")
    if len(records) < len(lines):
        print(f"{run}/metrics.jsonl: {len(lines) - len(records)} of {len(lines)} lines are torn, left out")
    return options, records


def history(records: list[dict], key: str) -> np.ndarray:
    """(n, 2) steps and logged values of one key; of a step that a resumed run took again, the later."""
    values = {record["step"]: record[key] for record in records if record.get(key) is not None}
    if key == "skipped":  # by kind
        values = {step: sum(kinds.values()) for step, kinds in values.items()}
    return np.array(sorted(values.items()), float).reshape(-1, 2)


def is_synthetic(options: dict) -> bool:
    """Whether a run of these options learned from made-up data."""
    return options.get("synthetic", not options.get("data"))


def draw_curves(runs: dict[str, tuple]):
    """Figure of everything of CURVES that the runs (folder -> `read_run`) logged, by step, a colour a run."""
    figure = new_figure(16, 13)
    shown = [key for key in CURVES if any(len(history(records, key)) for _, records in runs.values())]
    for n, key in enumerate(shown):
        axes = figure.add_subplot(math.ceil(len(shown) / 3), 3, n + 1)
        for run, (options, records) in runs.items():
            kind = ", SYNTHETIC data" if is_synthetic(options) else ""
            axes.plot(*history(records, key).T, ".-", label=last_part(run) + kind)
        axes.set(title=CURVE_TITLES.get(key, key), xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if key == "norm":
            axes.set_yscale("log", subs=[2, 5])
            axes.yaxis.set_major_formatter("{x:g}")  # the scale's own writes TeX
            axes.yaxis.set_minor_formatter("{x:g}")
        elif not np.any(axes.dataLim.intervaly):  # all 0
            axes.set_ylim(0, 1)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left")
    return figure


def curves(argv: list[str]) -> dict:
    """`python eval.py curves`: what runs logged, in one picture; returns it by run."""
    parser = _parser("curves", "--run DIR ... --out FILE", "What runs logged, in one picture, by step.")
    add = parser.add_argument
    add("--run", nargs="+", required=True, help="run folders, runs/TASK/NAME (required)")
    add("--out", required=True, type=Path, help="picture to write: .png, .svg or .pdf (required)")
    args = _parse(parser, argv)
    check_output(args.out, *PICTURES)
    runs = {run: read_run(run) for run in args.run}
    save_figure(draw_curves(runs), args.out)
    print(f"saved {args.out}")
    return runs


# ------------------------------------------------------------------------------------------------------------
# Prediction
# ------------------------------------------------------------------------------------------------------------

INPUTS = {"han": ["--score --midi"], "ast": ["--audio", "--midi"], "decoder": ["--speech"]}
_GROUP = re.compile("Music_Making|Emotion_&_Mood|[^_]+")


def _poles(label: str) -> tuple[str, str]:
    """The two halves of what follows the group in a label's name: either pole has as many words."""
    words = label[_GROUP.match(label).end() + 1 :].split("_")
    left, right = words[: len(words) // 2], words[len(words) // 2 :]
    return " ".join(left).capitalize(), " ".join(right).capitalize()


# What a rating of 0 and a rating of 1 say. Against the name for the first articulation: its ratings rise with
# sounding length (r .71) and pedal (.74), and the dataset's README calls it Short_Long.
LABEL_POLES = {label: _poles(label) for label in LABELS} | {
    "Articulation_Long_Short": ("Short", "Long"),
    "Articulation_Soft_cushioned_Hard_solid": ("Soft/cushioned", "Hard/solid"),
}


def _in_words(label: str) -> str:
    """Timing_Stable_Unstable: "Timing: Stable … Unstable"."""
    return f"{_GROUP.match(label)[0].replace('_', ' ')}: {' … '.join(LABEL_POLES[label])}"


RATINGS = {label: _in_words(label) for label in LABELS}  # for readers
RESULTS = Path(__file__).parent / "results"
SHIPPED = [str(RESULTS / "han_network.pt"), str(RESULTS / "han_kernel.pt")]
SHIPPED_FOR_SOUND = [str(RESULTS / "ast_network.pt"), str(RESULTS / "ast_kernel.pt")]


def predict(argv: list[str]) -> list[dict]:
    """`python eval.py predict`: ratings or phonemes of your own files, as --json holds them.

    name, path, repairs (of files), ratings by label; han also score, bars, start and end (s), match_rate,
    extra (share of played notes not in the score), notes, warnings, passages; ast seconds. decoder: id, path,
    session, seconds, phonemes, reference, errors by kind.
    """
    parser = _parser(
        "predict",
        "[--ckpt FILE ...] INPUT [options]",
        """\
Ratings (19, from 0 to 1) of piano performances, or phonemes of speech trials, of your own. By checkpoint:

    HAN              --score FILE and --midi PATH      long pieces in passages of 4 to 16 bars
    sound            --audio PATH or --midi PATH       MIDI is played by the built-in piano
    decoder          --speech PATH                     bins of 20 ms

    python eval.py predict --score piece.mxl --midi takes/ --csv out.csv         # weights of results/
    python eval.py predict --ckpt runs/han/full_s7_f?/best.pt --score piece.mxl --midi take.mid
    python eval.py predict --ckpt runs/decoder/NAME/best.pt --speech trials/ --day nearest --json out.json""",
    )
    add = parser.add_argument
    add("--ckpt", nargs="+", help="best.pt of one task, averaged (of --score and --audio: those in results/)")
    add("--score", help="MusicXML of what all --midi play")
    add("--midi", nargs="+", help="MIDI files, or folders of them")
    add("--audio", nargs="+", help="sound files of any rate and length, or folders of them")
    add("--speech", nargs="+", help="corpus, .mat of '24, .npy (bins, channels) or folder")
    add = parser.more.add_argument
    add("--day", help="day layer: a session's name; for unknown ones nearest (date) or mean (.npy: mean)")
    add("--raw", action="store_true", help="take .npy as it is (off: a folder z-scored together, as a block)")
    add("--json", help="write predictions and circumstances (off)")
    add("--csv", help="write a line a prediction (off)")
    add("--bars", help="rate these bars of the score alone, by their printed numbers, as 5-12 (all)")
    add("--transpose", action="store_true", help="rate what is played in another key, too (off)")
    add("--explain", help="draw what each prediction rests on, into this folder (off)")
    add("--strict", action="store_true", help="stop at the first refused input (off: reported, counted)")
    add("--cache", default="cache", help="folder of converted speech corpora (%(default)s)")
    args = _parse(parser, argv, word_options)
    for path in filter(None, (args.json, args.csv)):
        check_output(Path(path))
    args.ckpt = args.ckpt or (SHIPPED_FOR_SOUND if args.audio else SHIPPED)
    loaded = _load_models(args.ckpt)
    kind, about = kind_of(loaded[0][1]["task"]), _check_alike(loaded)
    given = " ".join(f"--{name}" for name in ("score", "midi", "audio", "speech") if getattr(args, name))
    if given not in INPUTS[kind]:
        raise DataError(f"{args.ckpt[0]}: takes {' or '.join(INPUTS[kind])}; given {given or 'nothing'}")
    refuse_foreign(args, kind, args.ckpt[0])
    print(provenance(loaded))
    if about["synthetic"]:
        print("trained on the SYNTHETIC corpus: says nothing about real performances and speech")
    if kind == "ast" and (about["audio"] == "rendered") == bool(args.audio):
        print(say_other_sound(loaded))
    args.written = read_musicxml(args.score) if args.score else None
    args.heard = not args.score or about["synthetic"] or heard_in_training(loaded, args.score)
    if not args.heard:
        print(say_unheard())
    predict_file = {"han": rate_performance, "ast": rate_audio, "decoder": decode}[kind]
    records, refused, drawn = [], [], set()

    def refuse(problem: object) -> None:
        if args.strict:
            raise DataError(problem)
        refused.append(printable(problem))
        tqdm.write(f"refused: {refused[-1]}")

    kinds = MIDI_KINDS if args.midi else SOUND_KINDS if args.audio else (".npy",)
    inputs = _expand(args.midi or args.audio or args.speech, kinds)
    if len(inputs) > 1 and (args.nbest or args.submission):
        raise DataError(f"--nbest, --submission: given {len(inputs)} inputs; expected one, whose file it is")
    for files in tqdm(inputs, desc="predict", unit="file", leave=False, disable=None):
        try:
            if files[0].is_dir() and not args.speech:
                raise DataError(f"{files[0]}: a folder without {', '.join(kinds)}; give the takes or theirs")
            for record, work in predict_file(loaded, args, files, refuse):
                records.append(record)
                if args.explain:
                    _draw(kind, loaded, args, work, drawn)
        except DataError as error:
            refuse(error)
    print(f"{len(records)} predicted, {len(refused)} refused")
    if not records:
        raise DataError(f"all {len(refused)} inputs were refused: {refused[0]}")
    if args.score and len(records) > 1:
        compare_takes(records)
    if args.csv:
        write_csv(args.csv, predictions_table(records))
    if args.json:
        saved = circumstances(args) | predictions_summary(records, loaded)
        write_json(args.json, saved | {"refused": refused})
    return records


def _expand(paths: list[str], kinds: tuple[str, ...]) -> list[list[Path]]:
    """Files, and those of these kinds below folders, of which it says what is of other kinds: each alone, but
    .npy files of one folder together. A corpus of speech stays one folder."""
    blocks: dict[Path, list[Path]] = {}
    for path in map(Path, paths):
        found = files_below(path, kinds)
        inside = [file for file in found if file.parent == path or file.suffix.lower() != ".npy"]
        if (path / "trials.json").exists():
            inside = []
        if path.is_dir() and (inside or ".npy" not in kinds):
            say_left_out(other_kinds(path, kinds))
        for file in inside or [path]:
            is_npy = file.suffix.lower() == ".npy"
            blocks.setdefault(file.parent if is_npy else file, []).append(file)
    return list(blocks.values())


def _draw(kind: str, loaded: list[tuple], args: argparse.Namespace, work: dict, drawn: set) -> None:
    """Draws a picture named by the input, under another name than those `drawn`, to which it adds its own."""
    name = re.sub(r"[^\w.@+-]", "_", work["name"])
    while name in drawn:
        name += "_"
    drawn.add(name)
    picture = Path(args.explain, f"{name}.png")
    try:
        explain(kind, picture, loaded, work)
    except DataError as error:
        if args.strict:
            raise
        tqdm.write(f"no picture: {error}")


def provenance(loaded: list[tuple]) -> str:
    """In a line: the files, what they hold, on what it was trained and how it scored there."""
    files = []
    counts = Counter(ckpt["path"] for _, ckpt in loaded)
    for path, (model, ckpt) in {member[1]["path"]: member for member in loaded}.items():
        score = ckpt.get("valid_r2") or (ckpt.get("best") or {}).get("valid_r2")
        scored = f", validation R² {score:.3f}" if score else ""
        files.append(f"{path} ({counts[path]} × {model.model_args.get('model', ckpt['task'])}{scored})")
    about = loaded[0][1]["data"]
    trained = f", split {about['split']}" if "split" in about else ""
    states = dict.fromkeys(str(ckpt["git_sha"])[:7] for _, ckpt in loaded)
    return f"{' + '.join(files)}: {counted(loaded)}{trained}, git {' and '.join(states)}"


def _training_ratings(loaded: list[tuple]) -> dict[str, dict]:
    """{label: mean and sd of the ratings that trained the models}, empty where they are unknown."""
    rows = []
    for _, ckpt in loaded:
        kind = "target" if ckpt["args"].get("standardise") == "dimension" else "rating"
        if f"{kind}_mean" in ckpt["data"]:
            rows.append([ckpt["data"][f"{kind}_mean"], ckpt["data"][f"{kind}_std"]])
    if not rows:
        return {}
    pairs = zip(LABELS, *np.mean(rows, axis=0).tolist(), strict=True)
    return {label: {"mean": mean, "sd": spread} for label, mean, spread in pairs}


def rate_performance(loaded: list[tuple], args, files: list[Path], _) -> Iterator[tuple[dict, dict]]:
    """One performance of the score, passage by passage where it is long: its record, and what explains it."""
    path, name = printable(files[0]), printable(files[0].stem.strip())
    reading = follow(args.written, read_midi(files[0]), args.transpose)
    parts = rated_parts(reading, args.bars)
    if len(parts) == 1:
        reading = replace(parts[0], said=reading.said)
    items = {}
    for part in parts:
        item = describe_performance(part.score, part.performance, part.match)
        items[f"{name} {len(items)}"] = item | {"name": name}
    corpus = described(items)
    each = []
    for model, ckpt in loaded:
        each.append(predict_han(model, prepare_han(corpus, list(items), ckpt["data"]), args.device))
    unwritten = 1 - reading.played_rate
    title = f"{name}: {reading.match_rate:.1%} of the notes of bars {reading.bars} of {args.score}; "
    title += f"{unwritten:.1%} of the played are not in it"
    if len(parts) > 1:
        title += f"\nlonger than what it was trained on: mean of {len(parts)} passages"
    rated = show_ratings(title, each, loaded, args.heard)
    warnings = reading.warnings()
    for line in warnings:
        tqdm.write(f"warning: {line}")
    if not args.heard:  # printed once, above all takes
        warnings.append(say_unheard())
    record = {
        "name": name,
        "path": path,
        "score": args.score,
        **_whereabouts(reading),
        "extra": unwritten,
        "notes": sum(len(item["x"]) for item in items.values()),
        "repairs": say_repairs(item["repairs"]),
        **rated,
        "warnings": printable("; ".join(warnings)),
        "passages": passage_ratings(parts, average(each, loaded)) if len(parts) > 1 else [],
    }
    yield record, item | {"name": name, "item": item, "score": reading.score, "passages": record["passages"]}


def described(items: dict[str, dict]) -> Corpus:
    """Items of `describe_performance` as `prepare_han` takes them."""
    names = list(items)
    known = {"columns": column_names(FEATURES), "stat_names": items[names[0]]["stat_names"], "shared": {}}
    return Corpus("", synthetic=False, items=items, names=names, **known)


def _whereabouts(reading: Reading) -> dict:
    end = reading.start + float(reading.performance.offset.max())
    return {"bars": reading.bars, "start": reading.start, "end": end, "match_rate": reading.match_rate}


def rated_parts(reading: Reading, bars: str | None) -> list[Reading]:
    """Passages of a reading to rate: bars "A-B", or all of it; adds to `said` what is left out or twice."""
    score = reading.score
    masks = passages(score) if bars is None else [bars_named(score, bars)]
    if masks[0].all():
        late = reading.performance.onset[0] > LEAD
        return [from_first_note(reading) if late else reading]
    parts, times = [], np.zeros(len(score.numbers))
    for mask in masks:
        part = cut_bars(reading, mask)
        if part and part.match_rate >= MISALIGNED:
            parts.append(part)
            times += mask
        else:
            reading.said.append(f"bars {bars_in_words(score.numbers[mask])} hardly played, not rated")
    if not parts:
        raise DataError(f"{reading.performance.path}: {reading.said[-1]}; expected bars that it plays")
    if times.max() > 1:
        twice = bars_in_words(score.numbers[times > 1])
        reading.said.append(f"bars {twice} stand in the last two passages and count twice in the mean")
    return parts


def passage_ratings(parts: list[Reading], p: np.ndarray) -> list[dict]:
    """Prints where each rating is lowest and highest; a record of each passage, of ratings (passages, 19)."""
    places = [f"in bars {part.bars} at {part.start:.0f} s" for part in parts]
    width = max(map(len, places)) + 7
    tqdm.write(f"\n{'':45} {'lowest':{width}} highest")
    for label, values in zip(LABELS, p.T, strict=True):
        low, high = (f"{values[i]:5.2f} {places[i]:{width}}" for i in (values.argmin(), values.argmax()))
        tqdm.write(f"{' / '.join(LABEL_POLES[label]):>44.44} {low}{high}".rstrip())
    ratings = [dict(zip(LABELS, values, strict=True)) for values in p.tolist()]
    return [_whereabouts(part) | {"ratings": x} for part, x in zip(parts, ratings, strict=True)]


def say_repairs(repairs: dict[str, dict[str, int]]) -> str:
    """Prints and gives what was wrong in files (file -> kind -> number) and read all the same."""
    said = printable("; ".join(repair_lines([repairs])))
    if said:
        tqdm.write(f"repaired: {said}")
    return said


def rate_audio(loaded: list[tuple], args, files: list[Path], _) -> Iterator[tuple[dict, dict]]:
    """One recording, or MIDI file as it sounds: its record, and what explains it."""
    energies, remarks, repairs = read_piece(files[0], rendered=not args.audio)
    name = printable(files[0].stem)
    # Rounded as those that trained the model.
    item = {"name": name, "frames": len(energies), "fbank": energies.astype(np.float16)}
    each = [predict_ast(model, [item], ckpt["data"], args.device) for model, ckpt in loaded]
    unlike = max(unlike_training(model, energies, ckpt["data"]) for model, ckpt in loaded)
    if unlike > 0.02:
        remarks.append(f"{unlike:.0%} of its statistics lie far outside the training's")
    for remark in remarks:
        tqdm.write(f"{name}: {remark}")
    seconds = len(energies) * HOP / SAMPLE_RATE
    record = {"name": name, "path": printable(files[0]), "seconds": seconds}
    record |= {"repairs": say_repairs(repairs), "sound": "; ".join(remarks)}
    record |= show_ratings(f"{name}, {seconds:.1f} s", each, loaded)
    yield record, {"name": name, "energies": energies}


@functools.cache
def saved_row(stem: str) -> dict:
    """What --save-results wrote of a row in results/; {} where that row is missing."""
    path = RESULTS / f"{stem}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def measured_unheard() -> dict:
    """What the row `kernel` reached on works that it had not heard, human players: r2, and of
    `_measure_humans`; {} where that row is missing."""
    saved = saved_row("han_kernel_piece")
    if not saved:
        return {}
    return saved["humans"]["test"] | {"r2": saved["metrics"]["test"]["no_renderings"]["mean"]["r2"]}


def say_other_sound(loaded: list[tuple]) -> str:
    """What ratings of recordings are worth by models of rendered sound, as measured on such as trained on
    copies and pianos like theirs; or, not measured, the other way round."""
    if loaded[0][1]["data"]["audio"] == "wav":
        return "trained on recordings, given the built-in piano: not measured how well it rates that"
    copies = all(ckpt["data"].get("copies") for _, ckpt in loaded)
    pianos = all(ckpt["data"].get("soundfonts") for _, ckpt in loaded)
    said = "trained on rendered sound"
    said += " and copies of it in rooms, with hiss" if copies else ", by its record on no copies in rooms"
    said += ", of several pianos" if pianos else ", of one piano"
    measured = {(True, True): "ensemble", (True, False): "ensemble_copies", (False, False): "kernel"}
    row = measured.get((copies, pianos))
    rows = [saved_row(f"ast_{row}{sound}_segment") for sound in ("", "_recorded", "_unheard")]
    if all(rows):
        reached = (row["metrics"]["valid"]["all"]["mean"]["r2"] for row in rows)
        told = "{:.2f} as rendered, {:.2f} as if recorded, {:.2f} on another piano".format(*reached)
        said += f"; such models: validation R² {told}"
    return said


def uncertainty(each: list[np.ndarray], loaded: list[tuple], heard: bool) -> dict[str, float]:
    """{label: half-width of an 80 % interval} of the mean of ratings `each` (19,): the spread over models and
    the errors on validation (`error80`), or for a work not heard in training those of the row `kernel` on
    such works; {} where neither is known."""
    errors = []
    for _, ckpt in loaded:
        squares = (ckpt.get("best") or {}).get("valid_mse_per_dimension", [])
        errors.append(ckpt.get("error80") or (NORMAL_80 * np.sqrt(squares)).tolist())
    if not heard and measured_unheard():
        errors = [measured_unheard()["error80"]]
    if not all(map(len, errors)):
        return {}
    half = np.hypot(np.mean(errors, axis=0), NORMAL_80 * np.std(each, axis=0))
    return dict(zip(LABELS, half.tolist(), strict=True))


def heard_in_training(loaded: list[tuple], score: str) -> bool:
    """Whether a score's name says that most models were trained on its work; each fold holds some out."""
    try:
        work = parse_name(Path(score).stem)[0]
    except DataError:
        return False
    return sum(work in ckpt["data"].get("works", []) for _, ckpt in loaded) > len(loaded) / 2


def say_unheard() -> str:
    """What ratings of a work never heard in training are worth, as measured."""
    said = "by its name not heard in training: trust the order of several takes, not the ratings themselves"
    known = measured_unheard()
    if known:
        low, high = known["ceiling"]
        said += f" (such works: R² {known['r2']:.2f}; takes of one passage: Pearson {known['within']:.2f}, "
        said += f"where raters' noise allows {low:.2f} to {high:.2f})"
    return said


def show_ratings(title: str, each: list[np.ndarray], loaded: list[tuple], heard: bool = True) -> dict:
    """Prints the mean of each model's ratings (passages, 19) between their poles; gives it and its
    `uncertainty` by label."""
    each = [p.mean(0) for p in each]
    ratings = dict(zip(LABELS, average(each, loaded).tolist(), strict=True))
    errors = uncertainty(each, loaded, heard)
    known = _training_ratings(loaded)
    tqdm.write(f"\n{title}")
    head = "value  ± 80 %" if errors else "value"
    tqdm.write(f"{'0':>26} {head} {'1':<24}{'  training ratings: mean, SD' if known else ''}")
    for label, value in ratings.items():
        low, high = LABEL_POLES[label]
        error = f"  ± {errors[label]:4.2f}" if errors else ""
        trained = f"   {known[label]['mean']:5.2f} {known[label]['sd']:4.2f}" if known else ""
        tqdm.write(f"{low:>26} {value:5.2f}{error} {high:<24}{trained}")
    return {"ratings": ratings, "uncertainty": errors}


def compare_takes(records: list[dict]) -> None:
    """Prints takes of one score side by side, and adds to each record which ratings differ: above or below
    the mean of the others by more than 80 % of the errors of such a difference."""
    others = len(records) - 1
    known = bool(records[0]["uncertainty"])
    print("\nTakes side by side; + or -: above or below the mean of the others by more than the ± allows")
    for count, record in enumerate(records, 1):
        print(f"{count:>4} {record['path']}, bars {record['bars']}")
        record["differs"] = {}
    rows = []
    for label, title in RATINGS.items():
        p = np.array([record["ratings"][label] for record in records])
        error = np.array([record["uncertainty"].get(label, np.inf) for record in records])
        gap = p - (p.sum() - p) / others
        beyond = np.sign(gap) * (np.abs(gap) > error * math.sqrt(1 + 1 / others))
        cells = [title]
        for record, value, side in zip(records, p, beyond, strict=True):
            word, mark = {1: ("above", "+"), -1: ("below", "-"), 0: ("", "")}[side]
            record["differs"][label] = word
            cells.append(f"{value:.2f}{mark}")
        rows.append([*cells, f"± {error.mean():.2f}" if known else ""])
    print_table(["0 … 1", *map(str, range(1, len(records) + 1)), "± 80 %" if known else ""], rows)


def decode(loaded: list[tuple], args, files: list[Path], refuse: Callable) -> Iterator[tuple[dict, dict]]:
    """All trials of a corpus, of a .mat file, or of .npy files: records, and what explains them."""
    model, ckpt = loaded[0]
    channels, is_npy = ckpt["data"]["channels"], files[0].suffix.lower() == ".npy"
    if is_npy:
        corpus = _npy_corpus(files, channels, args.raw, refuse)
    else:
        corpus = open_speech(files[0], args.cache, args.strict)
    if corpus.channels != channels:
        raise DataError(f"{files[0]}: {corpus.channels} channels; {args.ckpt[0]} expects {channels}")
    for line in corpus.left_out:
        refuse(line)
    rule = args.day or ("mean" if is_npy else None)
    layers = corpus
    if rule not in (None, "nearest", "mean"):  # the day layer of that session for every trial
        layers = replace(corpus, days=[rule] * len(corpus.days))
        rule = None
    settings = argparse.Namespace(**vars(args) | {"day": rule, "part": None})
    trials = np.arange(len(corpus.ids))
    _say_circumstances(settings, loaded, layers)
    log_probs = mean_logits(loaded, layers, trials, settings)
    said = {}
    if wants_words(args):
        given = args.lexicon and args.lm
        parts = {"train": trials[:0], "valid": trials[:0]}
        if args.tune or not given:
            parts = speech_parts(corpus, ckpt["data"]["valid"])
        if not (len(parts["train"]) or given):
            raise DataError(f"{files[0]}: no training sentences; --words needs --lexicon FILE and --lm FILE")
        said = words(log_probs, corpus, trials, args, parts["valid"], parts["train"])["sentences"]
    refs, hyps = greedy_strings(log_probs, corpus, trials)
    counts = per_counts(refs, hyps)
    for i, (name, ref, hyp) in enumerate(zip(corpus.ids, refs, hyps, strict=True)):
        record = {
            "id": name,
            "path": corpus.text[i] if is_npy else printable(files[0]),
            "session": corpus.days[corpus.day[i]],
            "seconds": float(corpus.lengths[i] * BIN),
            "phonemes": spell(hyp),
            "reference": spell(ref) if ref else None,
            "errors": dict(zip(EDITS, counts[i].tolist(), strict=False)) if ref else None,
        }
        tqdm.write(f"{name}: {record['seconds']:.2f} s\n  decoded    {record['phonemes'] or '(nothing)'}")
        if said:
            record["words"] = " ".join(said[i])
            tqdm.write(f"  words      {record['words'] or '(none)'}")
        if ref:
            tqdm.write(f"  reference  {record['reference']}\n  errors     {record['errors']}")
        work = {"name": name, "log_probs": log_probs[i], "labels": ref or None}
        yield record, work | {"seconds per frame": model.stride * BIN}
    if corpus.labelled.any():
        rate, count = error_rate(counts[corpus.labelled]), corpus.labelled.sum()
        tqdm.write(f"PER of {count} labelled trials {rate:.4f}: no result where they trained the model")


def _npy_corpus(files: list[Path], channels: int, raw: bool, refuse: Callable) -> SpeechCorpus:
    """A trial and day a file; `text` holds their paths. Unless raw, all are z-scored together, as a block."""
    trials = []
    for path in files:
        try:
            x = np.lib.format.open_memmap(ordinary(path), mode="r")
            trials.append(speech_trial(channels, [x], text=printable(path)))
        except (OSError, ValueError, EOFError, ArithmeticError, MemoryError) as error:
            refuse(f"{path}: {error!s:.150}; expected bins × {channels} numbers")
    if not raw:
        standardise_blocks(trials)
    features = [np.zeros((0, channels)), *(trial["x"] for trial in trials)]
    paths = [trial["text"] for trial in trials]
    names, count = [Path(path).stem for path in paths], len(paths)
    return SpeechCorpus(
        features=np.concatenate(features).astype(np.float32),
        offsets=np.cumsum([len(x) for x in features]),
        day=np.arange(count),
        block=np.zeros(count, np.int64),
        part=np.full(count, ""),
        labels=[np.zeros(0, np.int64)] * count,
        text=paths,
        ids=names,
        days=names,
        channels=channels,
        root=files[0].parent,
        synthetic=False,
        left_out=[],
    )


def predictions_summary(records: list[dict], loaded: list[tuple]) -> dict:
    """What --json writes beside the `circumstances`."""
    used = []
    for _, ckpt in loaded:
        about = {"path": ckpt["path"], "fold": ckpt["data"].get("fold"), "seed": ckpt["args"].get("seed")}
        used.append(about | {key: ckpt[key] for key in ("task", "step", "git_sha")})
    synthetic = loaded[0][1]["data"]["synthetic"]
    saved = {"trained_on_synthetic": synthetic, "checkpoints": used, "predictions": records}
    if "ratings" in records[0]:
        saved |= {"poles": LABEL_POLES, "training": _training_ratings(loaded) or None}
    return saved


def predictions_table(records: list[dict]) -> list[list]:
    """Head and rows of what --csv writes: a line a prediction, and a line a passage of it."""
    rows = []
    for record in records:
        apart = ("ratings", "uncertainty", "errors", "differs", "passages")
        passages = [{"name": record["name"], **passage} for passage in record.get("passages", [])]
        for part in [record, *passages]:
            row = {key: part.get(key, "") for key in record if key not in apart}
            if "errors" in record:
                row |= record["errors"] or dict.fromkeys(EDITS)
            for label, value in part.get("ratings", {}).items():
                row["{}: {} ... {}".format(label, *LABEL_POLES[label])] = value
            for key, title in (("uncertainty", "± 80 %"), ("differs", "differs")):
                row |= {f"{label} {title}": part.get(key, {}).get(label, "") for label in record.get(key, {})}
            rows.append(row)
    return [list(rows[0]), *(list(row.values()) for row in rows)]


# ------------------------------------------------------------------------------------------------------------
# Explanation
# ------------------------------------------------------------------------------------------------------------
IN_GROUP = {"beat_attention": "note in beat", "measure_attention": "beat in measure"}


def explain(kind: str, out: str | Path, members: list[tuple], work: dict) -> dict:
    """Draws what one prediction rests on; returns the figures in the picture.

    kind: han, ast or decoder; members: [(model, its checkpoint), ...], averaged; work: what `predict` knows
    of the file. DataError, before anything is written, where nothing can be drawn."""
    check_output(Path(out), *PICTURES)
    figure = new_figure(16, 12)
    drawn = {"han": explain_han, "ast": explain_ast, "decoder": explain_decoder}[kind](figure, members, work)
    save_figure(figure, Path(out))
    return drawn


@torch.no_grad()
def even_shares(attention: ContextAttention, x: Tensor, group: Tensor, groups: int) -> np.ndarray:
    """Weights (M,) within `attention(x, group, groups)`: mean of the heads, in units of an even share."""
    hidden = torch.tanh(attention.linear(x)).view(len(x), *attention.context_vector.shape)
    weights = group_softmax((hidden * attention.context_vector).sum(2).float(), group, groups)
    return (weights.cpu().double().mean(1) * torch.bincount(group)[group].cpu()).numpy()


def han_attention(members: list[tuple], item: dict) -> dict[str, np.ndarray]:
    """What HANs weigh in one un-normalised item: `even_shares` of "note in beat" and "beat in measure" where
    they have such, and of "note", "beat" and "measure" in the piece; averaged over members."""
    corpus = described({item["name"]: item})
    levels: dict[str, list] = {}
    for model, kept in members:
        batch = collate_han(prepare_han(corpus, [item["name"]], kept["data"]))
        found = module_inputs(model, ContextAttention, to_device(batch, next(model.parameters()).device))
        shares = {name: even_shares(m, *found[m]) for name, m in model.named_children() if m in found}
        piece = shares.pop("attention")
        if model.level in ("beat", "measure"):
            piece = piece[np.unique(item[model.level], return_inverse=True)[1]]
        shares |= {"note": piece, **{key: group_means(piece, item[key]) for key in ("beat", "measure")}}
        for level, values in shares.items():
            levels.setdefault(IN_GROUP.get(level, level), []).append(values)
    return {level: np.mean(values, axis=0) for level, values in levels.items()}


def seconds_of(score, item: dict, onset: np.ndarray) -> Callable:
    """The function from quarters of the score to seconds, between the chords that were found. onset: seconds
    of the item's rows, of which those with a voice are the score's notes in their order."""
    written = item["voice"] > 0
    found = item["matched"][written] & ~score.grace  # of the score's notes
    if not found.any():
        raise DataError(f"{item['name']}: no note of {score.path} in it; give a take of it")
    quarters = score.onset[found]
    seconds = group_means(onset[written][found], quarters)
    return functools.partial(np.interp, xp=np.unique(quarters), fp=seconds)


def explain_han(figure, members: list[tuple], work: dict) -> dict:
    """What HANs weigh in a performance, its tempo, dynamics; work: name, score, item. Returns levels
    (`han_attention`), beats and measures (seconds of their first notes, and the end)."""
    if work.get("passages"):
        return draw_passages(figure, members, work)
    members = [member for member in members if hasattr(member[0], "attention")]
    if not members:
        raise DataError(f"{work['name']}: rated from statistics; give --ckpt of `train_han.py --model han`")
    features = sorted({ckpt["data"]["features"] for _, ckpt in members})
    if len(features) > 1:
        raise DataError(f"{work['name']}: networks of --features {features}; give --ckpt of one kind")
    score, item = work["score"], work["item"] | {"name": work["name"]}
    if features == ["score"]:  # reads no row without a voice
        rows = item["voice"] > 0
        item |= {key: item[key][rows] for key in NOTE_ARRAYS}
    levels = han_attention(members, item)
    x = dict(zip(column_names(FEATURES), item["x"].T.astype(float), strict=True))
    seconds = seconds_of(score, item, x["raw_onset"])
    sounded = item["matched"] | (item["voice"] == 0)
    of_beat, of_measure = (np.unique(group, return_index=True)[1] for group in (score.beat, score.measure))
    end = x["raw_offset"].max()
    beats, measures = (np.append(seconds(score.onset[first]), end) for first in (of_beat, of_measure))
    numbers = score.numbers[np.searchsorted(score.measures, score.onset[of_measure] + 1e-6).clip(1) - 1]
    pooled = any(model.model_args["stats_size"] for model, _ in members)
    also = "; ratings also rest on statistics of the piece (--pooled)" if pooled else ""
    found = f"{item['match_rate']:.0%} of the written notes found"
    picture_title(figure, f"HAN, {found}\n{ONE_FOR_ALL}{also}", members, work)
    panels = figure.subplots(4, sharex=True, height_ratios=[5, 4, 3, 3])
    roll, weights, tempo, dynamics = panels
    _draw_roll(roll, x, sounded, levels)
    _draw_levels(weights, levels, beats, measures)
    rows = np.flatnonzero(item["voice"])[of_beat]
    tempo.stairs(10 ** x["beat_tempo"][rows], beats, baseline=None)
    tempo.set_title("Tempo of each beat (quarters per minute)")
    dynamics.plot(x["raw_onset"][sounded], x["raw_velocity"][sounded], ".", color="0.6")
    dynamics.stairs(x["beat_dynamics"][rows], beats, baseline=None)
    dynamics.set_title("Dynamics (MIDI velocity; of a beat: mean of average and loudest)")
    dynamics.set_xlabel("time in the performance (s); lines: measures")
    every = math.ceil(len(numbers) / 20)
    roll.secondary_xaxis("top").set_xticks(measures[:-1:every], numbers[::every])
    for axes in panels:
        axes.set_xticks(measures[:-1:every], minor=True)
        axes.grid(axis="x", which="minor")
    return {"levels": levels, "beats": beats, "measures": measures}


def draw_passages(figure, members: list[tuple], work: dict) -> dict:
    """The ratings of a long piece, passage by passage over time, and their means; returns them by label."""
    rows = work["passages"]
    picture_title(figure, "ratings over time, by bars (line: mean)", members, work)
    middles = [(row["start"] + row["end"]) / 2 for row in rows]
    curves = {label: [row["ratings"][label] for row in rows] for label in LABELS}
    *grid, empty = figure.subplots(5, 4, sharex=True, sharey=True).flat
    empty.axis("off")
    for axes, (label, values) in zip(grid, curves.items(), strict=True):
        axes.plot(middles, values, ".-")
        axes.axhline(np.mean(values), color="0.6")
        axes.set_title("0: {}, 1: {}".format(*LABEL_POLES[label]), fontsize=9)
        axes.tick_params("x", rotation=90, labelsize=8)
    every = math.ceil(len(rows) / 12)
    axes.set(ylim=(0, 1), xticks=middles[::every], xticklabels=[row["bars"] for row in rows[::every]])
    return {"curves": curves}


def _draw_roll(axes, x: dict[str, np.ndarray], sounded: np.ndarray, levels: dict) -> None:
    """The notes that sounded as bars in the colour of their weight."""
    within = "note in beat" if "note in beat" in levels else "note"
    notes = np.stack([x["raw_pitch"], x["raw_onset"], x["raw_offset"]])[:, sounded]
    axes.set_facecolor("0.25")
    bars = axes.hlines(*notes, array=levels[within][sounded] - 1, linewidth=5, **SHARES)
    axes.set_yticks(range(24, 120, 12), [f"C{octave}" for octave in range(1, 9)])
    axes.set(title=f"Attention to each {within}", ylim=(notes[0].min() - 2, notes[0].max() + 2))
    axes.figure.colorbar(bars, ax=axes, **SHARES_BAR)


def _draw_levels(axes, levels: dict, beats: np.ndarray, measures: np.ndarray) -> None:
    axes.stairs(levels["measure"] - 1, measures, fill=True, color="0.8", label="measure in the piece")
    for level, label in (("beat", "beat in the piece"), ("beat in measure", "beat in its measure")):
        if level in levels:
            axes.stairs(levels[level] - 1, beats, baseline=None, linewidth=2, label=label)
    reach = max(*SHARES["clim"], *np.abs(axes.get_ylim()))
    axes.set(title="Attention to measures and beats, against an even share", ylim=(-reach, reach))
    axes.yaxis.set_major_formatter("{x:+.0%}")
    axes.legend(ncols=3)


def explain_decoder(figure, members: list[tuple], work: dict) -> dict:
    """Probability of each phoneme over time; above it what is decoded, wrong ones in colour, below the truth.

    work: name, log_probs (F, 41), labels or None, "seconds per frame" (at a window's middle)."""
    log_probs, labels, step = work["log_probs"], work["labels"], work["seconds per frame"]
    if not len(log_probs):
        raise DataError(f"{work['name']}: no frames; expected a longer trial")
    best = log_probs.argmax(1)
    frames = np.flatnonzero((best > 0) & (best != np.append(0, best[:-1])))
    decoded = best[frames].tolist()
    wrong = np.zeros(len(decoded), bool)
    for tag, _, _, first, last in Levenshtein.opcodes(decoded if labels is None else labels, decoded):
        wrong[first:last] = tag != "equal"
    model = members[0][0]
    start = step * (model.kernel / model.stride - 1) / 2
    times = start + step * (frames + 0.5)
    picture_title(figure, "probability of each phoneme", members, work)
    axes = figure.subplots()
    extent = (start, start + step * len(log_probs), len(PHONEMES) - 0.5, -0.5)
    image = axes.imshow(np.exp(log_probs.T), vmin=0, vmax=1, aspect="auto", extent=extent)
    figure.colorbar(image, label="probability", pad=0.01)
    axes.set_yticks(range(len(PHONEMES)), ["blank", *PHONEMES[1:]], fontsize=9)
    for phoneme, second, off in zip(decoded, times, wrong, strict=True):
        axes.text(second, -1, PHONEMES[phoneme], rotation=90, ha="center", color=ORANGE if off else "black")
    truth = "" if labels is None else f"\ntrue: {spell(labels)}"
    axes.set_xlabel(f"time (s), middle of each frame's window{truth}", wrap=True)
    return {"decoded": decoded, "times": times, "wrong": wrong}


# ------------------------------------------------------------------------------------------------------------
# Report
# ------------------------------------------------------------------------------------------------------------
CHOSEN = {
    "valid": "The weights were chosen on this validation part: its figures are slightly optimistic.",
    "test": "Test part: for a final figure; choose between models on the validation part.",
}
FAKE = "SYNTHETIC data: says that the code works, nothing about real performances or speech"
STYLE = """
:root { color-scheme: light dark; } body { margin: auto; max-width: 76rem; padding: 1rem; }
body { font: 1rem/1.5 sans-serif; overflow-wrap: anywhere; }
h2 { margin-top: 3rem; border-top: 3px solid #0072b2; }
.said { background: #e6770022; border-left: 4px solid; padding: .2rem .6rem; } .scroll { overflow-x: auto; }
img { width: 100%; min-width: 44rem; } table { border-collapse: collapse; font-size: .875rem; }
td { padding: .2rem .6rem; white-space: nowrap; } td:first-child { white-space: normal; min-width: 11rem; }
tr { border-bottom: 1px solid #8886; } tr:first-child { font-weight: bold; }
@media (prefers-color-scheme: dark) { img { filter: invert(1) hue-rotate(180deg); } }
"""


def report(argv: list[str]) -> dict:
    """`python eval.py report`: an HTML page about runs of one configuration; returns its verdict and figures,
    None where nothing was scored. Without runs: about the predictions in results/."""
    parser = _parser(
        "report",
        "[--run DIR ...] --out FILE.html [--data DIR] [options]",
        """\
One HTML page about the training of a model: curves, scores, calibration, worst items, confusions, options.
Several runs are folds and seeds of one configuration, and are evaluated together, on their own parts.
Without --run: the results that come with this repository, which needs neither a run nor data.

    python eval.py report --out results.html
    python eval.py report --run runs/han/full_f? --data data/percepiano --out report.html
    python eval.py report --run runs/decoder/NAME --no-data --out report.html""",
    )
    add = parser.add_argument
    add("--run", nargs="+", help="run folders of one configuration (off: the shipped results)")
    add("--out", required=True, type=Path, help="page to write, .html (required)")
    add("--part", choices=["valid", "test"], default="valid", help="part to score (%(default)s)")
    add("--no-data", action="store_true", help="score nothing: curves and configuration only (off)")
    args = _parse(parser, argv, word_options, data_options)
    check_output(args.out, ".html")
    title, lines, parts, figures = about_runs(args) if args.run else about_results(RESULTS)
    page = _page(title, lines, parts, args.command)
    write_text(args.out, page)
    print(*lines, f"saved {args.out}", sep="\n")
    return {"verdict": lines[0], "figures": figures}


def about_runs(args: argparse.Namespace) -> tuple[str, list[str], dict, dict]:
    """Of --run: title, sentences and parts of the page, figures."""
    runs = {run: read_run(run) for run in args.run}
    own = runs[args.run[0]][0]
    args.data = args.data or own.get("data")
    args.audio, args.rate = own.get("audio"), None
    args.ckpt, args.day = args.run, None
    verdict, figures, scored = "nothing was scored: see the curves of validation", None, {}
    synthetic = is_synthetic(own)
    if own.get("task") != "pretrain" and not args.no_data:
        loaded = _load_models([f"{run}/best.pt" for run in args.run])
        score = decoder_section if loaded[0][1]["task"] == "decoder" else rating_section
        corpus, verdict, figures, scored = score(loaded, args)
        synthetic = synthetic or corpus.synthetic
    names = [last_part(run) for run in runs]
    rows = [[key, *(last_part(options.get(key)) for options, _ in runs.values())] for key in own]
    parts = {
        "Training curves": inline_figure(draw_curves(runs), "Training curves"),
        **scored,
        "Configuration": _table(["option", *names], rows),
    }
    lines = [verdict, FAKE] if synthetic else [verdict]
    return ", ".join(names), lines, parts, figures


KINDS = {"han": "PercePiano from score and MIDI", "ast": "PercePiano from sound", "decoder": "Speech"}
PUBLISHED = {("han", "segment"): "0.397", ("han", "performer"): "0.285"}  # Park et al. (2024), overlaps kept
VALIDATED = (
    "Validation figures, which chose the models: slightly optimistic. Test: R2 of 182 withheld items, scored "
    "once by the holder of their labels (within: players of one segment); published: on its own test part. "
    "What the rows are: results/README.md."
)


def about_results(folder: Path) -> tuple[str, list[str], dict, dict]:
    """As `about_runs`, of the rows in a folder of --save-results: figures as they were saved."""
    tables: dict[str, list] = {}
    for task, title in KINDS.items():
        for path in sorted(folder.glob(f"{task}_*.json")):
            row = json.loads(path.read_text(encoding="utf-8")) | {"stem": path.stem}
            kind = "SYNTHETIC, " if row["synthetic"] else ""
            kind += "RENDERED, " if row.get("audio") == "rendered" else ""
            tables.setdefault(f"{title}, {kind}{row.get('split') or row['part']}", []).append(row)
    known = [_read_tsv(folder / name) for name in ("withheld_test.tsv", "rater_ceiling.tsv")]
    parts, figures = {}, {}
    for heading, rows in tables.items():
        parts[heading] = decoder_rows(rows) if "part" in rows[0] else rating_rows(rows, *known)
        figures |= {row["stem"]: row["metrics"] for row in rows}
    return "Results", [VALIDATED], parts, figures


def _read_tsv(path: Path) -> dict[str, list[str]]:
    """{first cell of a line: the others}; nothing where there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {key: cells for key, *cells in csv.reader(lines, delimiter="\t")}


def rating_rows(rows: list[dict], test: dict, ceiling: dict) -> str:
    """A table of rows that rate, best validation first, and of each its 19 ratings."""
    table, details = [], ""
    for row in sorted(rows, key=lambda row: -row["metrics"]["valid"]["all"]["mean"]["r2"]):
        mean = row["metrics"]["valid"]["all"]["mean"]
        each = mean["per_dimension"]
        withheld = [*test.get(row["stem"], []), "", ""][:2]
        figures = [mean[key] for key in each]
        table.append([row["row"], *figures, mean["r2_interval"], mean["folds"], *withheld])
        tests = row.get("significance", {}).get("valid", {}).get("all") or {}
        columns = dict(each)
        for key in METRICS:
            if f"{key}_interval" in tests:
                columns[f"95 % of {key}"] = tests[f"{key}_interval"]
        columns["raters' limit of r2"] = [ceiling.get(label, [""])[0] for label in LABELS]
        by_rating = _table(["rating", *columns], zip(RATINGS.values(), *columns.values(), strict=True))
        details += f"<details><summary>{_text(row['row'])}: 19 ratings</summary>{by_rating}</details>"
    published = PUBLISHED.get((row["task"], row["split"]), "")
    if published:
        table.append(["published", *["" for _ in table[0][3:]], published, ""])
    table.append(["raters' limit", *ceiling.get("mean", [])[:1]])
    return _table(["row", *each, "95 % of r2", "folds", "test r2", "within"], table) + details


def decoder_rows(rows: list[dict]) -> str:
    """A table of the error rates of rows, best first."""
    table = []
    for row in rows:
        figures = row["metrics"] | row["metrics"].get("words", {})
        keys = ("per", "interval", "wer", "wer_interval", "trials")
        table.append([row["row"], *(figures.get(key, "") for key in keys)])
    table.sort(key=lambda cells: cells[1])
    return _table(["row", "PER", "95 %", "WER", "95 %", "trials"], table)


def rating_section(loaded: list[tuple], args: argparse.Namespace) -> tuple[Corpus, str, dict, dict]:
    """Runs that rate, measured as `evaluate` does: corpus, verdict, figures, parts of the page."""
    predictions, _, corpus, data = _rate_parts(args, loaded, [args.part])
    truth = _ratings_of(corpus)
    views = measure(predictions, truth, [args.part])[args.part]
    if views["all"] is None:
        return corpus, f"no item of part {args.part} has ratings here", views, {}
    mean = views["all"]["mean"]
    shown = ", ".join(f"{metric} {mean[metric]:.4f}" for metric in METRICS)
    interval = f"95 % interval of r2 {brackets(mean['r2_interval'])}"
    tables = [_table(*fold_table(VIEWS[view], figures)) for view, figures in views.items() if figures]
    each = mean["per_dimension"]
    about = f"part {args.part}, {data['split']}, folds {sorted({fold for _, fold, _ in predictions})}"
    names, y, p, fold_of = _stacked(predictions, truth, args.part, "all")
    error = ((p - y) ** 2).mean(1)
    ranked = [[names[i], str(fold_of[i]), error[i]] for i in error.argsort()[::-1]]
    parts = {
        "Results": "".join(tables) + CHOSEN[args.part],
        "By rating": _table(["rating", *each], zip(RATINGS.values(), *each.values(), strict=True)),
        "Prediction over rating, calibration": inline_figure(draw_ratings(y, p), "Prediction over rating"),
        "Worst and best items": _table(["item", "fold", "mse"], [*ranked[:10], *ranked[10:][-5:]]),
    }
    return corpus, f"{shown}; {interval}; {about}", views, parts


def draw_ratings(y: np.ndarray, p: np.ndarray):
    """Figure: prediction over rating, of all 19, and the means of twelfths of the predictions."""
    figure = new_figure(9, 9)
    axes = figure.subplots()
    axes.plot(y.ravel(), p.ravel(), ".", alpha=0.1)
    axes.axline((0, 0), slope=1, color="0.5")
    order = p.argsort(axis=None)
    twelfths = [[part.mean() for part in np.array_split(x.ravel()[order], 12)] for x in (y, p)]
    axes.plot(*twelfths, "o-", label="means of twelfths of the predictions")
    axes.set(xlabel="rating (all 19)", ylabel="prediction", aspect="equal")
    axes.legend()
    return figure


def decoder_section(loaded: list[tuple], args: argparse.Namespace) -> tuple[SpeechCorpus, str, dict, dict]:
    """Decoders, probabilities averaged: corpus, verdict, figures, parts of the page."""
    corpus, split, log_probs = _heard_part(args, loaded)
    trials = split[args.part]
    figures, refs, hyps = part_scores(log_probs, corpus, trials)
    counts = per_counts(refs, hyps)
    figures["interval"] = trial_bootstrap(counts)
    order = np.argsort(counts[:, :3].sum(1) / counts[:, 3])
    samples = []
    for i in order[[0, len(order) // 2, -1]]:
        samples.append([corpus.ids[trials[i]], spell(refs[i]), spell(hyps[i])])
    chosen = "valid" if loaded[0][1]["data"]["valid"] == "test" else args.part
    parts = {
        "Error rate by day": _table(*day_table(figures)) + CHOSEN[chosen],
        "Confusions": _table(["reference", "decoded", "times"], substitutions(refs, hyps)),
        "Transcripts: best, median, worst": _table(["trial", "reference", "decoded"], samples),
    }
    rate = f"phoneme error rate {figures['per']:.4f} {brackets(figures['interval'])}"
    if wants_words(args):
        found = words_of_part(args, loaded, corpus, split, log_probs)
        sentences, said, rows = found.pop("sentences"), said_in(corpus, trials), []
        for i in order:
            rows.append([corpus.ids[trials[i]], " ".join(said[i]), " ".join(sentences[trials[i]])])
        parts["Words, fewest phoneme errors first"] = _table(["trial", "said", "decoded"], rows)
        figures["words"] = found
        rate += f", word error rate {found['wer']:.4f} {brackets(found['wer_interval'])}"
    return corpus, f"{rate} of {len(trials)} trials, part {args.part}", figures, parts


def last_part(text: object) -> str:
    """Of an absolute path the last part, --data=/a/b: --data=b; else the text: results name no machine."""
    return re.sub(r"^(--[\w-]+=)?(?:/|~|[A-Za-z]:[\\/])(?:.*[\\/])?(?=.)", lambda m: m[1] or "", str(text))


def _text(value: object) -> str:
    """HTML of a value: fractions to four digits, the rest escaped."""
    return escape(_cell(value))


def _table(head: Iterable, rows: Iterable[Iterable]) -> str:
    lines = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in (head, *rows))
    return f'<div class="scroll"><table>{lines}</table></div>'


def _page(title: str, lines: list[str], parts: dict[str, str], command: str) -> str:
    """The whole document. Its policy forbids the browser to load anything."""
    made = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {git_state()['git_sha']}: {command}"
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    said = "".join(f'<p class="said">{_text(line)}</p>' for line in lines)
    body = "".join(f"<h2>{_text(heading)}</h2>{part}" for heading, part in parts.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width"><title>{_text(title)}</title><style>{STYLE}</style></head>
<body><h1>{_text(title)}</h1>{said}<p>{_text(made)}</p>{body}</body></html>
"""


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------

COMMANDS = {f.__name__: f for f in (evaluate, predict, report, compare, ceiling, floor, curves, bench)}


def _parser(command: str, usage: str, about: str) -> argparse.ArgumentParser:
    """Its `more`: the group of the options that matter less, below the others."""
    parser = argparse.ArgumentParser(
        prog=f"eval.py {command}",
        usage=f"python eval.py {command} {usage}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.more = parser.add_argument_group("more options")
    return parser


def data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", help="data set in its public layout (absent: the built-in synthetic corpus)")
    parser.more.add_argument("--cache", default="cache", help="folder of extracted features (%(default)s)")


def part_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parts = ["valid", "test", "competition"]
    named = functools.partial(re.sub, "^val$", "valid")  # as '25 calls it
    add("--part", type=named, choices=parts, default="valid", help="scored (%(default)s)")
    add = parser.more.add_argument
    add("--audio", metavar="DIR", help=AUDIO_HELP)
    add("--rate", metavar="HOW", help=RATE_HELP)
    add("--day", choices=["nearest", "mean"], help="decoder: day layer of unknown sessions (off: refused)")


def result_options(parser: argparse.ArgumentParser) -> None:
    add = parser.more.add_argument
    add("--csv", help="write the predictions here (off)")
    add("--save-results", help="write TASK_ROW_<split>.json, .csv into --results-dir (off)")
    add("--results-dir", default="results", help="their folder (%(default)s)")
    add("--out", metavar="FILE", help="write models that rate, or a pre-training, in one small file (off)")


def _parse(parser: argparse.ArgumentParser, argv: list[str], *shared: Callable) -> argparse.Namespace:
    """The parsed options: the command's own, those that `shared` functions add, --device and --debug."""
    for add_options in shared:
        add_options(parser)
    text = "where to compute (%(default)s here)"
    parser.more.add_argument("--device", default=DEVICES[-1], choices=DEVICES, help=text)
    parser.more.add_argument("--debug", action="store_true", help="show the traceback of an error (off)")
    args = parser.parse_args(argv)
    row = getattr(args, "save_results", None)
    if row and not re.fullmatch(r"[a-z0-9_]+", row):
        raise DataError(f"--save-results {row!r}: expected a row name of a-z, 0-9 and _, such as full")
    args.device = torch.device(args.device)
    args.command = "python " + shlex.join(map(last_part, [*parser.prog.split(), *argv]))
    return args


def main(argv: list[str] | None = None) -> dict:
    """Runs one command and returns its figures."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else "no command given"
    if command in ("-h", "--help"):
        print(f"{__doc__}\nCommands: {', '.join(COMMANDS)}. `python eval.py COMMAND --help` explains each.")
        return {}
    if command.startswith("--attention"):
        return attention(argv)
    if command.startswith("-"):
        return evaluate(argv)
    if command not in COMMANDS:
        raise DataError(f"{command}: expected {', '.join(COMMANDS)}, or --ckpt FILE ... to evaluate")
    return COMMANDS[command](argv[1:])


if __name__ == "__main__":
    run_script("eval.py", main)
