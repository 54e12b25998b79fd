"""The trainers, in-process on a small synthetic corpus: what every one of them must do (parametrised over the scripts)."""

import ast
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import train_han
from models import HAN, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = {"train_han": train_han}
SMALL = {"train_han": ["--size", "16", "--heads", "4", "--batch", "4", "--epochs", "2", "--lr", "1e-3", "--dropout", "0.2", "--log-every", "2"]}
LOG_KEYS = {"step", "epoch", "time", "loss", "lr", "norm", "skipped"}


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    data.synth_percepiano(folder / "data", segments=8, players=4)
    return folder


@pytest.fixture
def run(corpus_folder, tmp_path):
    """Call a trainer with small settings and further options; returns its final metrics."""
    def call(name, *options):
        argv = ["--data", str(corpus_folder / "data"), "--cache", str(corpus_folder / "cache"), "--out", str(tmp_path / "runs"), "--device", "cpu"]
        return TRAINERS[name].main(TRAINERS[name].parse_args([*argv, *SMALL[name], *options]))
    return call


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def last(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


@pytest.mark.parametrize("name", TRAINERS)
def test_overfits_one_batch(name, run, monkeypatch):
    whole = data.percepiano_parts
    monkeypatch.setattr(data, "percepiano_parts", lambda *a: {k: (v[:4] if k == "train" else v) for k, v in whole(*a).items()})
    out = run(name, "--epochs", "80", "--patience", "0", "--dropout", "0", "--lr", "5e-3", "--name", "overfit", "--log-every", "1")
    losses = [r["loss"] for r in records(out["folder"]) if "gradients" in r]
    assert len(losses) == 80
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("options", [[], ["--ema", "0.9", "--optimizer", "adamw", "--schedule", "cosine", "--warmup", "2", "--noise", "0.1", "--augment", "--score-dropout", "0.5", "--pooled"]])
def test_six_steps_equal_three_and_three(name, run, options):
    whole = run(name, *options, "--max-steps", "6", "--name", "six")
    half = run(name, *options, "--max-steps", "3", "--name", "three")
    rest = run(name, *options, "--max-steps", "6", "--resume", str(Path(half["folder"]) / "last.pt"))
    assert rest["folder"] == half["folder"]
    a, b = last(whole["folder"]), last(rest["folder"])
    assert a["step"] == b["step"] == 6
    for part in ("model", "ema"):
        for key in a[part] or ():
            assert torch.equal(a[part][key], b[part][key]), key
    for i, state in a["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, b["optimizer"]["state"][i][key])
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])


@pytest.mark.parametrize("name", TRAINERS)
def test_resume_refuses_missing_foreign_and_other_models(name, run, tmp_path):
    with pytest.raises(data.DataError, match="nothing.pt"):
        run(name, "--resume", str(tmp_path / "nothing.pt"))
    (tmp_path / "foreign.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(data.DataError, match="foreign.pt"):
        run(name, "--resume", str(tmp_path / "foreign.pt"))
    out = run(name, "--max-steps", "1", "--name", "one")
    for option, value in (("--size", "32"), ("--fold", "1"), ("--fold", "all"), ("--split", "random"), ("--lr", "3")):
        with pytest.raises(data.DataError, match=rf"{option} {value}.*was"):
            run(name, option, value, "--resume", str(Path(out["folder"]) / "last.pt"))
    ckpt = last(out["folder"])
    for key in ("optimizer", "rng", "args", "data"):
        torch.save({**ckpt, key: None}, tmp_path / "part.pt")
        with pytest.raises(data.DataError, match=key):
            run(name, "--resume", str(tmp_path / "part.pt"))


@pytest.mark.parametrize("name", TRAINERS)
def test_resume_takes_its_options_from_the_checkpoint(name, run, corpus_folder):
    out = run(name, "--max-steps", "2", "--fold", "1", "--lr", "5e-4", "--name", "fold1")
    path = str(Path(out["folder"]) / "last.pt")
    args = TRAINERS[name].parse_args(["--resume", path, "--data", "elsewhere", "--max-steps", "5"])
    assert (args.fold, args.lr, args.size, args.epochs, args.data, args.max_steps) == ("1", 5e-4, 16, 2, "elsewhere", 5)
    assert TRAINERS[name].parse_args(["--resume", path, "--epochs", "9"]).epochs == 9


@pytest.mark.parametrize("name", TRAINERS)
def test_nan_sample_is_skipped_counted_and_named(name, run, monkeypatch):
    spoiled, whole = [], data.prepare_han

    def spoil(corpus, names, info):
        items = whole(corpus, names, info)
        if not spoiled:
            items[0]["x"] = items[0]["x"] * np.nan
            spoiled.append(names[0])
        return items

    monkeypatch.setattr(data, "prepare_han", spoil)
    out = run(name, "--epochs", "1", "--name", "nan")
    skips = [r for r in records(out["folder"]) if "skip" in r]
    assert [r["names"] for r in skips] == [spoiled]
    assert out["skipped"] == {"bad": 1, "overflow": 0}
    assert all(torch.isfinite(v).all() for v in last(out["folder"])["model"].values())


@pytest.mark.parametrize("name", TRAINERS)
def test_nan_step_leaves_weights_untouched_and_advances(name, run, monkeypatch):
    start = run(name, "--max-steps", "1", "--name", "start")
    before = last(start["folder"])
    monkeypatch.setattr(TRAINERS[name], "augment", lambda item, *_: item | {"x": item["x"] * np.nan})
    run(name, "--max-steps", "3", "--resume", str(Path(start["folder"]) / "last.pt"))
    after = last(start["folder"])
    assert after["step"] == 3
    assert after["skipped"] == {"bad": 2, "overflow": 0}
    assert all(torch.equal(v, after["model"][k]) for k, v in before["model"].items())


@pytest.mark.parametrize("name", TRAINERS)
def test_nan_in_a_row_stops_with_step_and_names(name, run, monkeypatch):
    monkeypatch.setattr(TRAINERS[name], "augment", lambda item, *_: item | {"x": item["x"] * np.nan})
    with pytest.raises(data.DataError, match=r"step 4: 4 non-finite updates in a row, the last with \w+_\d+bars"):
        run(name, "--max-skips", "4")


@pytest.mark.parametrize("name", TRAINERS)
def test_fp16_overflow_is_counted_apart_from_bad_data(name, run, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0**60))
    first = run(name, "--amp", "fp16", "--max-steps", "1", "--name", "first")
    out = run(name, "--amp", "fp16", "--max-skips", "2", "--max-steps", "6", "--name", "fp16")
    assert out["skipped"] == {"bad": 0, "overflow": 6}
    a, b = last(first["folder"]), last(out["folder"])
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    assert b["scaler"]["scale"] == 2.0**54
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0**10))
    assert run(name, "--amp", "fp16", "--max-steps", "3", "--name", "calm")["skipped"] == {"bad": 0, "overflow": 0}


@pytest.mark.parametrize("name", TRAINERS)
def test_log_keys_and_run_folder(name, run):
    out = run(name, "--name", "keys")
    lines = records(out["folder"])
    steps = [r for r in lines if "loss" in r]
    assert steps
    assert all(r.keys() >= LOG_KEYS for r in steps)
    assert sum("valid_loss" in r for r in lines) == 2
    assert {p.name for p in Path(out["folder"]).iterdir()} == {"args.json", "metrics.jsonl", "last.pt", "best.pt"}
    assert json.loads((Path(out["folder"]) / "args.json").read_text())["size"] == 16
    again = run(name, "--max-steps", "1", "--name", "keys")
    assert Path(again["folder"]).name == "keys_2"


@pytest.mark.parametrize("name", TRAINERS)
def test_eval_reproduces_the_logged_score(name, run, corpus_folder, capsys):
    out = run(name, "--name", "score", "--ema", "0.9")
    measured = evaluation.main(["--ckpt", str(Path(out["folder"]) / "best.pt"), "--data", str(corpus_folder / "data"), "--cache", str(corpus_folder / "cache")])
    assert measured["valid"]["all"]["mean"]["r2"] == pytest.approx(out["valid_r2"], abs=1e-6)
    assert "SYNTHETIC" in capsys.readouterr().out


@pytest.mark.parametrize("name", TRAINERS)
def test_checkpoint_carries_what_inference_needs(name, run):
    out = run(name, "--max-steps", "1", "--pooled", "--name", "carry")
    model, ckpt = load_checkpoint(Path(out["folder"]) / "best.pt")
    assert isinstance(model, HAN)
    info = ckpt["data"]
    assert info["labels"] == list(data.LABELS)
    assert (info["split"], info["fold"], info["synthetic"], info["features"]) == ("segment", 0, True, "full")
    assert len(info["columns"]) == len(info["mean"]) == len(info["std"]) == model.model_args["input_size"] == sum(data.FEATURES.values())
    assert info["quantiles"].shape == (101, model.model_args["stats_size"])


@pytest.mark.parametrize("name", TRAINERS)
def test_every_preset_and_switch_trains_one_step(name, run):
    for k, options in enumerate((["--preset", "tuned", "--size", "16"], ["--model", "bilstm"], ["--model", "bilstm_sa", "--level", "note"], ["--features", "score", "--pooled"],
                                 ["--features", "perf", "--level", "beat", "--layernorm"], ["--level", "measure", "--amp", "bf16"])):
        out = run(name, *options, "--max-steps", "1", "--name", f"switch{k}")
        assert math.isfinite(out["valid_loss"])


@pytest.mark.parametrize("name", TRAINERS)
def test_learning_rate_is_a_pure_function_of_the_step(name):
    trainer = TRAINERS[name]
    args = trainer.parse_args(["--lr", "1", "--step-size", "10", "--gamma", "0.5"])
    assert [trainer.lr_at(s, args, 100) for s in (0, 9, 10, 25)] == [1, 1, 0.5, 0.25]
    args = trainer.parse_args(["--lr", "1", "--schedule", "cosine", "--warmup", "10"])
    assert [trainer.lr_at(s, args, 110) for s in (0, 9, 10, 60, 110)] == pytest.approx([0.1, 1, 1, 0.5, 0])


@pytest.mark.parametrize("name", TRAINERS)
def test_command_line_errors_are_one_line(name, tmp_path, capsys):
    for option in (("--batch", "0"), ("--dropout", "3"), ("--epochs", "0"), ("--lr", "nan"), ("--seed", "-1")):
        with pytest.raises(SystemExit):
            TRAINERS[name].parse_args(option)
        assert f"{option[1]} is not between" in capsys.readouterr().err
    with pytest.raises(data.DataError, match="expected cpu"):
        TRAINERS[name].parse_args(["--device", "foo"])
    done = subprocess.run([sys.executable, f"{name}.py", "--data", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", TRAINERS)
def test_ctrl_c_ends_the_step_and_saves(name, corpus_folder, tmp_path):
    command = [sys.executable, f"{name}.py", "--data", str(corpus_folder / "data"), "--cache", str(corpus_folder / "cache"), "--out", str(tmp_path), "--name", "stopped", *SMALL[name], "--epochs", "10000", "--patience", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.time() + 60
    while not (tmp_path / "stopped/last.pt").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "--resume" in out
    assert last(tmp_path / "stopped")["step"] > 0


STEP_ORDER = ["lr_at", "autocast", "backward", "unscale_", "clip_grad_norm_", "step", "update", "zero_grad", "log", "evaluate", "save"]


@pytest.mark.parametrize("name", TRAINERS)
def test_control_flow_keeps_its_order(name):
    """The step of DESIGN.md, in its order, in the main function of every trainer: the scripts must diff cleanly."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"parse_args", "lr_at", "main"} <= functions.keys()
    loop = next(node for node in ast.walk(functions["main"]) if isinstance(node, ast.While))
    calls = sorted((node.lineno, node.col_offset, getattr(node.func, "attr", getattr(node.func, "id", ""))) for node in ast.walk(loop) if isinstance(node, ast.Call))
    names = [call for *_, call in calls]
    at = -1
    for wanted in STEP_ORDER:
        at = names.index(wanted, at + 1)


# ---------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------
def torchrun(name, corpus_folder, out, *options, code=""):
    """Run a trainer in two gloo processes; `code` runs first in each."""
    script = f"import sys, torch, numpy as np; torch.set_num_threads(1); import {name} as t; {code}\nt.main(t.parse_args(sys.argv[1:]))"
    (out / "entry.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(out / "entry.py"),
               "--data", str(corpus_folder / "data"), "--cache", str(corpus_folder / "cache"), "--out", str(out), "--device", "cpu", *SMALL[name], *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_equal_one_on_the_joined_batch(name, run, corpus_folder, tmp_path, monkeypatch):
    options = ["--dropout", "0", "--max-steps", "4", "--clip", "inf"]
    code = """
whole = t.data.percepiano_parts
t.data.percepiano_parts = lambda *a: {k: (v[:20] if k == "train" else v) for k, v in whole(*a).items()}"""  # 20: no batch to fill up
    done = torchrun(name, corpus_folder, tmp_path, *options, "--batch", "2", "--name", "two", code=code)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = data.percepiano_parts
    monkeypatch.setattr(data, "percepiano_parts", lambda *a: {k: (v[:20] if k == "train" else v) for k, v in whole(*a).items()})
    one = last(run(name, *options, "--batch", "4", "--name", "one")["folder"])["model"]
    two = last(tmp_path / "two")["model"]
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_train_all_folds_and_end(name, corpus_folder, tmp_path):
    done = torchrun(name, corpus_folder, tmp_path, "--batch", "2", "--max-steps", "1", "--fold", "all", "--name", "all")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("four folds (SYNTHETIC)") == 1
    assert all((tmp_path / f"all_f{k}/best.pt").is_file() for k in range(4))


@pytest.mark.slow
def test_the_main_job_without_data_learns(tmp_path, capsys):
    """What README's first command does on a fresh machine."""
    out = train_han.main(train_han.parse_args(["--lr", "2.5e-5", "--fold", "0", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "runs")]))
    assert out["synthetic"]
    assert out["valid_r2"] > 0.15
    assert "SYNTHETIC" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_nan_on_one_rank_neither_hangs_nor_diverges(name, corpus_folder, tmp_path):
    code = """
import os
clean = t.augment
t.augment = lambda item, info, args, key: item | {"x": item["x"] * np.nan} if os.environ["RANK"] == "1" and key[1] == 0 else clean(item, info, args, key)"""
    done = torchrun(name, corpus_folder, tmp_path, "--batch", "2", "--name", "nan", "--epochs", "2", code=code)
    assert done.returncode == 0, done.stderr[-2000:]
    ckpt, lines = last(tmp_path / "nan"), records(tmp_path / "nan")
    first_epoch = sum(r["epoch"] == 0 for r in lines if "skip" in r)
    assert ckpt["skipped"]["bad"] == first_epoch > 0
    assert all(len(r["names"]) == 2 for r in lines if "skip" in r)
    assert all(torch.isfinite(v).all() for v in ckpt["model"].values())
