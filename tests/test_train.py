"""The trainers on small synthetic corpora: what every one of them must do (parametrised over the scripts)."""

import inspect
import itertools
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import torch
from conftest import refused, two_ranks

import data
import eval as evaluation
import models
import pretrain_ast
import train_decoder
import train_han
from models import AST, GRUDecoder, load_checkpoint, save_checkpoint

WRONG = ("--batch 0", "--dropout 3", "--ema 1", "--lr nan", "--seed -1", "--max-steps 0")
ENCODER = Path(__file__).parents[1] / "results/ast_encoder.pt"
LOG_KEYS = {"step", "epoch", "time", "loss", "lr", "norm", "skipped"}


def quick_percepiano(folder):
    """A small corpus played eight times as fast, two seconds an item, rendered beside its MIDI."""
    data.synth_percepiano(folder, segments=8, players=4)
    for path in folder.glob("virtuoso/data/all_2rounds/*.mid"):
        midi = mido.MidiFile(path)
        midi.ticks_per_beat *= 8
        midi.save(path)
        data.write_wav(path.with_suffix(".wav"), data.render(data.read_midi(path)))


# Of each trainer: `corpus` writes one, `parts` of data.py deals it out; `small`: seconds, two evaluations;
# `plain`: nothing random in a step; `overfit`: 40 steps or more on a batch of four; `exact`: options of the
# resume test; `refused`, and `found` of the data, must not change on resume, `kept` is the checkpoint's;
# `switches`: a step each; `score`: its key, and where eval.main returns it; `main_job`: README's first
# command, its key, its bound.
# fmt: off
CASES = {
    "train_han": SimpleNamespace(
        module=train_han,
        corpus=lambda folder: data.synth_percepiano(folder, segments=8, players=4),
        parts="percepiano_parts",
        small="--size 16 --heads 4 --batch 4 --epochs 2 --lr 1e-3 --dropout 0.2 --log-every 2",
        plain="--dropout 0",
        overfit="--epochs 60 --patience 0 --lr 5e-3",
        exact=("", "--ema 0.9 --optimizer adamw --schedule cosine --warmup 2 --augment --pooled --mixup 0.4"),
        refused=("--size 32", "--fold all", "--lr 3"),
        found="works",
        kept=("--fold 1 --lr 5e-4", {"fold": "1", "lr": 5e-4, "size": 16, "epochs": 2}),
        switches=("--preset tuned", "--preset tuned --model han --mixup 0.4", "--model bilstm",
                  "--model bilstm_sa --level note",
                  "--features score --pooled", "--features perf --level beat", "--level measure --amp bf16"),
        endless="--epochs 10000 --patience 0",
        score=("valid_r2", lambda figures: figures["valid"]["all"]["mean"]["r2"]),
        main_job=("--lr 2.5e-5 --fold 0", "valid_r2", lambda score: score > 0.15),
    ),
    "train_decoder": SimpleNamespace(
        module=train_decoder,
        corpus=lambda folder: data.synth_speech(folder, days=2, trials=9, bins=5.0),
        parts="speech_parts",
        small="--hidden 16 --layers 2 --batch 4 --steps 8 --eval-every 4 --warmup 2 --log-every 2"
              " --workers 0 --amp off",
        plain="--dropout 0 --input-dropout 0 --white-noise 0 --offset-noise 0 --time-mask-prob 0"
              " --adam-eps 1e-4",  # 1e-8 blows rounding up
        overfit="--steps 40 --eval-every 40 --hidden 64 --lr 1e-2 --ema 0",
        exact=("", "--ema 0 --lr-schedule step --reduce-on-nan 0.5 --bidirectional",
               "--amp bf16 --preset log --save-every 1"),
        refused=("--hidden 32", "--valid test", "--no-layer-norm"),
        found="days",
        kept=("--preset log --lr 5e-4",
              {"lr": 5e-4, "hidden": 16, "steps": 8, "lr_schedule": "constant", "time_mask_max": 2}),
        switches=("--preset baseline --adam-eps 1e-8 --hidden 8",
                  "--preset baseline25 --hidden 8 --select wer",
                  "--random-walk 0.1 --static-gain 0.1 --channel-mask 0.1 --feature-mask 0.1 --aux-layer 1",
                  "--valid test --amp auto",
                  "--lr-schedule linear --optimizer adam --decay-all",
                  "--kernel 14 --stride 3 --smooth-width 0 --layers 1", "--optimizer adam"),
        endless="--steps 1000000 --workers 1",
        score=("valid_per", lambda figures: figures["per"]),
        main_job=("--lr 0.0012", "valid_per", lambda score: score < 0.6),
    ),
    "pretrain_ast": SimpleNamespace(  # fine-tuning, unless the options say otherwise
        module=pretrain_ast,
        corpus=quick_percepiano,
        parts="percepiano_parts",
        small="--task finetune --width 16 --depth 1 --heads 2 --frames 64 --batch 4 --epochs 2 --lr 1e-3"
              " --warmup 0 --workers 0 --amp off --log-every 2",
        plain="--dropout 0 --frames 512",
        overfit="--epochs 200 --eval-every 200 --patience 0 --lr 1e-2 --lr-schedule constant --width 32",
        exact=("",
               "--ema 0.9 --variants 1 --noise 0.1 --spec-augment 8 8 --mixup 0.4 --balance dwa"
               " --eval-every 2 --batch 8",
               f"--init {ENCODER} --freeze 1 --epochs 2 --dropout 0.1 --crops 2",
               "--task pretrain --visible-only --micro-batch 3",
               "--task pretrain --ssast-compat --save-every 1 --eval-every 2"),
        refused=("--width 32", "--fold all", "--task pretrain"),
        found="recordings",
        kept=("--fold 1 --lr 5e-4",
              {"fold": "1", "lr": 5e-4, "width": 16, "epochs": 2, "task": "finetune", "pooling": "meanstd"}),
        switches=("--model cnn", "--model mlp --standardise none",
                  "--balance uncertainty --pooling mean --standardise group",
                  "--ssast-compat --pooling cls",
                  "--variants 2 --augment-groups tempo=timbre pitch=timing,expression",
                  "--task pretrain --online", "--task pretrain --checkpointing --amp bf16"),
        endless="--epochs 10000 --patience 0",
        score=("valid_r2", lambda figures: figures["valid"]["all"]["mean"]["r2"]),
        main_job=("", "valid_accuracy", lambda score: score > 0.06),
    ),
}
# fmt: on
TRAINERS = {name: case.module for name, case in CASES.items()}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("train_han", "pretrain_ast")]
each_trainer = pytest.mark.parametrize("name", TRAINERS)
one_trainer = pytest.mark.parametrize("name", ["train_decoder", *SLOW])  # the others in CI


def write_corpus(tmp_path_factory):
    """Options that name a trainer's small corpus, written on first use."""
    root = tmp_path_factory.mktemp("corpora")

    def options(name):
        if not (root / name).exists():
            CASES[name].corpus(root / name)
        return ["--data", str(root / name), "--cache", str(root / f"{name}_cache")]

    return options


corpus = pytest.fixture(scope="module")(write_corpus)


def command(name, corpus, out, *options):
    """The command line of a small run."""
    fixed = [*corpus(name), "--out", str(out), "--device", "cpu"]
    return [*fixed, *CASES[name].small.split(), *" ".join(options).split()]


@pytest.fixture
def run(corpus, tmp_path):
    """Call a trainer with small settings and further options (one string each); returns its final metrics."""

    def call(name, *options):
        argv = command(name, corpus, tmp_path / "runs", *options)
        return TRAINERS[name].main(TRAINERS[name].parse_args(argv))

    return call


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def last(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def resume(folder):
    return f"--resume {Path(folder) / 'last.pt'}"


def train_on(monkeypatch, name, count):
    """Only the first `count` items of the training part."""
    whole = getattr(data, CASES[name].parts)

    def parts(*a):
        dealt = whole(*a)
        return dealt | {"train": dealt["train"][:count]}

    monkeypatch.setattr(data, CASES[name].parts, parts)


def spoil_steps(monkeypatch, name):
    monkeypatch.setattr(TRAINERS[name], "augment", lambda item, *_: item | {"x": item["x"] * np.nan})


@pytest.mark.slow
@each_trainer
def test_overfits_one_batch(name, run, monkeypatch):
    train_on(monkeypatch, name, 4)
    out = run(name, CASES[name].plain, CASES[name].overfit, "--name overfit --log-every 1")
    losses = [r["loss"] for r in records(out["folder"]) if "loss" in r and "valid_loss" not in r]
    assert len(losses) in (40, 60, 200)
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            name, options, marks=[] if (name, options) == ("train_decoder", "") else [pytest.mark.slow]
        )
        for name, case in CASES.items()
        for options in case.exact
    ],
)
def test_six_steps_equal_three_and_three(name, run, options):
    whole = run(name, options, "--max-steps 6 --name six")
    half = run(name, options, "--max-steps 3 --name three")
    rest = run(name, options, "--max-steps 6", resume(half["folder"]))
    assert rest["folder"] == half["folder"]
    a, b = last(whole["folder"]), last(rest["folder"])
    assert a["step"] == b["step"] == 6
    for part in ("model", "ema"):
        for key in a[part] or ():
            assert torch.equal(a[part][key], b[part][key]), key
    for i, state in a["optimizer"]["state"].items():
        for key, value in state.items():
            other = b["optimizer"]["state"][i][key]
            assert value is other or torch.equal(value, other)
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])


@one_trainer
def test_resume_refuses_missing_foreign_and_other_runs(name, run, tmp_path):
    (tmp_path / "foreign.pt").write_bytes(b"not a checkpoint")
    folder = run(name, "--max-steps 1 --name one")["folder"]
    refused = [("", tmp_path / "nothing.pt", "nothing.pt"), ("", tmp_path / "foreign.pt", "foreign.pt")]
    refused += [(option, f"{folder}/last.pt", option.split()[0]) for option in CASES[name].refused]
    ckpt = last(folder)
    for key in ("optimizer", "rng", "args", "data"):
        torch.save(ckpt | {key: None}, tmp_path / f"{key}.pt")
        refused.append(("", tmp_path / f"{key}.pt", key))
    for key in ("synthetic", CASES[name].found):
        torch.save(ckpt | {"data": ckpt["data"] | {key: "other"}}, tmp_path / f"{key}.pt")
        refused.append(("", tmp_path / f"{key}.pt", f"another {key}"))
    for option, path, named in refused:
        with pytest.raises(data.DataError, match=named.replace("--no-", "--")):
            run(name, option, f"--resume {path}")


@one_trainer
def test_a_last_pt_that_another_process_writes_meanwhile_is_refused(name, run, monkeypatch):
    folder = Path(run(name, "--max-steps 1 --name one")["folder"])
    log, whole = (folder / "metrics.jsonl").read_bytes(), models.run_folder

    def run_folder(*a):
        os.utime(folder / "last.pt", (1, 1))
        return whole(*a)

    monkeypatch.setattr(models, "run_folder", run_folder)
    with pytest.raises(data.DataError, match="last.pt"):
        run(name, "--max-steps 2", resume(folder))
    assert (folder / "metrics.jsonl").read_bytes() == log
    assert last(folder)["step"] == 1


@one_trainer
def test_resume_takes_its_options_from_the_checkpoint(name, run):
    options, kept = CASES[name].kept
    folder = run(name, options, "--max-steps 2 --name kept --max-skips 3")["folder"]
    length = next(k for k in ("epochs", "steps") if k in kept)
    argv = f"{resume(folder)} --data elsewhere --max-steps 5 --{length} 9".split()
    args = vars(TRAINERS[name].parse_args(argv))
    expected = kept | {"data": "elsewhere", "max_steps": 5, length: 9}
    assert {k: args[k] for k in expected} == expected
    saved, taken = last(folder)["args"], vars(TRAINERS[name].parse_args(resume(folder).split()))
    changed = {"resume": f"{folder}/last.pt", "max_steps": None}  # the run ended at its --max-steps
    assert taken == saved | changed
    assert (taken["max_skips"], taken["log_every"], taken["device"]) == (3, 2, "cpu")


@one_trainer
def test_nan_steps_leave_the_weights_advance_and_stop_in_a_row(name, run, monkeypatch):
    folder = run(name, "--max-steps 1 --name start")["folder"]
    before = last(folder)
    spoil_steps(monkeypatch, name)
    run(name, "--max-steps 3", resume(folder))
    after = last(folder)
    assert (after["step"], after["skipped"]) == (3, {"bad": 2, "overflow": 0})
    assert [len(r["names"]) for r in records(folder) if "skip" in r] == [4, 4]
    assert all(torch.equal(v, after["model"][k]) for k, v in before["model"].items())
    with pytest.raises(data.DataError, match=r"step 3: 3 non-finite updates .* \w\S+, \w"):
        run(name, "--max-skips 3")


@pytest.mark.slow
@each_trainer
def test_fp16_overflow_is_counted_apart_from_bad_data(name, run, monkeypatch):
    if name == "train_decoder":  # its network has no float16 path on a CPU: here the losses take one
        losses = train_decoder.ctc_losses
        monkeypatch.setattr(train_decoder, "LOSS", lambda *a: losses(*a).half().float())
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0**60))
    first = run(name, "--amp fp16 --max-steps 1 --name first")
    out = run(name, "--amp fp16 --max-skips 2 --max-steps 6 --name fp16")
    assert out["skipped"] == {"bad": 0, "overflow": 6}
    a, b = last(first["folder"]), last(out["folder"])
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    assert b["scaler"]["scale"] == 2.0**54
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0**10))
    assert run(name, "--amp fp16 --max-steps 3 --name calm")["skipped"] == {"bad": 0, "overflow": 0}


@one_trainer
def test_log_keys_run_folder_and_eval_reproduces_the_score(name, run, corpus, capsys, monkeypatch):
    commits = itertools.count()  # made while it runs
    monkeypatch.setattr(models, "git_state", lambda: {"git_sha": next(commits), "git_dirty": False})
    out = run(name, "--name score --ema 0.9")
    folder = Path(out["folder"])
    assert last(folder)["git_sha"] == json.loads((folder / "args.json").read_text())["git_sha"] == 0
    lines = records(folder)
    steps = [r for r in lines if "loss" in r]
    assert len(steps) > 2
    assert all(r.keys() >= LOG_KEYS for r in steps)
    assert sum("valid_loss" in r for r in lines) == 2
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.jsonl", "last.pt", "best.pt"}
    assert json.loads((folder / "args.json").read_text())["batch"] == 4
    key, figure = CASES[name].score
    measured = evaluation.main(["--ckpt", str(folder / "best.pt"), *corpus(name)])
    assert figure(measured) == pytest.approx(out[key], abs=1e-6)
    assert "SYNTHETIC" in capsys.readouterr().out
    assert Path(run(name, "--max-steps 1 --name score")["folder"]).name == "score_2"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=[pytest.mark.slow] if name == "pretrain_ast" else [])
        for name, case in CASES.items()
        for options in case.switches
    ],
)
def test_every_preset_and_switch_trains_one_step(name, run, options):
    assert math.isfinite(run(name, options, "--max-steps 1 --name switch")["valid_loss"])


RATES = [  # of 110 steps
    ("train_han", "--step-size 10 --gamma 0.5", (0, 9, 10, 25), [1, 1, 0.5, 0.25]),
    ("train_han", "--schedule cosine --warmup 10", (0, 9, 10, 60, 110), [0.1, 1, 1, 0.5, 0]),
    ("train_decoder", "--warmup 10", (0, 9, 10, 60, 110), [0, 0.9, 1, 0.6, 0.2]),
    ("train_decoder", "--warmup 10 --lr-schedule linear", (5, 10, 35, 110, 200), [0.5, 1, 0.8, 0.2, 0.2]),
    ("train_decoder", "--warmup 0 --lr-schedule step --step-size 9 --gamma 0.5", (8, 9, 26), [1, 0.5, 0.25]),
    ("train_decoder", "--warmup 0 --lr-schedule constant", (0, 50, 109), [1, 1, 1]),
]


@pytest.mark.parametrize(("name", "options", "steps", "expected"), RATES)
def test_learning_rate_is_a_pure_function_of_the_step(name, options, steps, expected):
    options = f"--data DIR --lr 1 {'--lr-end 0.2 ' if name == 'train_decoder' else ''}{options}"
    args = TRAINERS[name].parse_args(options.split())
    assert [TRAINERS[name].lr_at(step, args, 110) for step in steps] == pytest.approx(expected)


@pytest.mark.slow
def test_han_diagnoses_and_stops(run, capsys):
    """The reports of HAN.md: activations of the first batch, gradients by part of every step, of three."""
    run("train_han", "--diagnose --name look --fold all")
    said = capsys.readouterr().out
    assert said.count('"activations"') == said.count('"gradients"') / 3 == 4
    for name in ("contractor", "context_vectors", "head_to_encoder", "flat_dimensions", "std_ratio", "input"):
        assert f'"{name}"' in said
    assert "four folds (SYNTHETIC)" in said


@each_trainer
def test_command_line_errors_are_one_line(name, tmp_path, capsys):
    trainer = TRAINERS[name]
    for option in (*WRONG, "--device foo", "--device mps"):
        with pytest.raises(SystemExit):
            trainer.parse_args(option.split())
        assert option.split()[1] in capsys.readouterr().err.splitlines()[-1]
    missing = str(tmp_path)
    refused(lambda: trainer.main(trainer.parse_args(["--data", missing])), capsys, missing)


STEP = "lr_at autocast backward unscale_ clip_grad_norm_ step update zero_grad log from_main save".split()


@each_trainer
def test_the_step_keeps_its_order(name):
    """The step of DESIGN.md, in its order, in every trainer's main: the scripts must diff cleanly."""
    calls = ".*".join(rf"\b{call}\(" for call in STEP)
    assert re.search(rf"\n +while .*{calls}", inspect.getsource(TRAINERS[name].main), re.DOTALL)


# --- The phoneme decoder's own ----------------------------------------------------------------------------


# fmt: off
PUBLISHED = {
    "baseline": "--optimizer adam --adam-eps 0.1 --lr 0.02 --lr-schedule constant --warmup 0 --decay-all"
                " --weight-decay 1e-5 --clip inf --ema 0 --amp off --input-dropout 0 --no-layer-norm"
                " --smooth-taps 20 --time-mask-prob 0 --bidirectional --whole-start --short-frames",
    "baseline25": "--adam-eps 0.1 --lr 5e-3 --lr-end 1e-4 --warmup 1000 --steps 120000 --weight-decay 1e-3"
                  " --clip 10 --ema 0 --hidden 768 --kernel 14 --input-dropout 0.2 --no-layer-norm --h0"
                  " --smooth-taps 9 --whole-start --white-noise 1 --random-cut 2 --time-mask-prob 0"
                  " --days-per-batch 4 --ctc-reduction sum --still-days --eval-every 2000",
    "log": "--lr 1.5e-3 --lr-schedule constant --warmup 0 --decay-all --ema 0 --dropout 0.3 --white-noise 0.2"
           " --time-mask-prob 0.1 --time-mask-width 15 --time-mask-max 2",
}
# fmt: on


@pytest.mark.parametrize("preset", PUBLISHED)
def test_decoder_presets_hold_the_published_values(preset):
    args = vars(train_decoder.parse_args(["--data", "DIR", "--preset", preset]))
    written = vars(train_decoder.parse_args(["--data", "DIR", *PUBLISHED[preset].split()]))
    assert args == written | {"preset": preset}
    assert train_decoder.parse_args(["--preset", preset, "--adam-eps", "1e-3"]).adam_eps == 1e-3


@pytest.mark.slow
def test_decoder_logs_what_an_evaluation_must_say(run):
    out = run("train_decoder", "--name logs --ema 0.5 --lr 0.03")
    lines = records(out["folder"])
    steps = [r for r in lines if "loss_of_200" in r]
    assert all(r["memory"] > 0 for r in steps)
    assert len({r["loss_of_200"] for r in steps}) == 4
    evaluations = [r for r in lines if "valid_per" in r]
    for r in evaluations:
        errors = r["valid_sub"] + r["valid_del"] + r["valid_ins"]
        assert r["valid_per"] == pytest.approx(errors / r["valid_labels"], abs=1e-6)
        assert r["valid_per_without_sil"] > 0
        assert r["valid_loss"] != r["valid_loss_raw"]  # averaged beside raw weights
        assert sum(day["trials"] for day in r["valid_by_day"].values()) == r["valid_trials"]
        assert [s["reference"].split()[-1] for s in r["samples"]] == ["SIL"] * min(3, r["valid_trials"])
    assert out["valid_per"] == pytest.approx(min(r["valid_per"] for r in evaluations), abs=1e-6)
    model, ckpt = load_checkpoint(Path(out["folder"]) / "best.pt")  # slim: the averaged weights alone
    assert not any(ckpt[part] for part in ("ema", "optimizer", "scaler", "rng", "scheduler"))
    _, whole = load_checkpoint(Path(out["folder"]) / "last.pt")
    if whole["step"] == ckpt["step"]:
        assert all(torch.equal(v, whole["ema"][k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_decoder_reduces_its_rate_after_bad_updates_and_a_resume_keeps_it(run, monkeypatch):
    with monkeypatch.context() as patch:
        spoil_steps(patch, "train_decoder")
        folder = run("train_decoder", "--name reduced --reduce-on-nan 0.5 --max-steps 3")["folder"]
    assert [r["rate"] for r in records(folder) if "skip" in r] == [0.5, 0.25, 0.125]
    run("train_decoder", resume(folder))
    args = train_decoder.parse_args(resume(folder).split())
    for r in [r for r in records(folder) if r["step"] > 3 and "loss_of_200" in r]:
        assert r["lr"] == pytest.approx(0.125 * train_decoder.lr_at(r["step"] - 1, args, 8), rel=1e-5)
    assert last(folder)["scheduler"] == {"rate": 0.125}


def test_decoder_reports_trials_that_do_not_fit(run, corpus, capsys):
    with pytest.raises(data.DataError, match="--stride 100"):
        run("train_decoder", "--kernel 100 --stride 100")
    _, folder, _, cache = corpus("train_decoder")
    speech = data.open_speech(folder, cache)
    needed = np.array([data.frames_needed(labels) for labels in speech.labels])
    short = (speech.lengths - 24) // 6 + 1 < needed
    assert short.any()
    capsys.readouterr()
    out = run("train_decoder", "--kernel 24 --stride 6 --name few")
    said = capsys.readouterr().out
    for part, trials in data.speech_parts(speech).items():
        wanted = f"{part}: {len(trials)} trials, {short[trials].sum()} too short"
        assert (wanted in said) == (part in ("train", "valid"))
    assert out["valid_trials"] == len(data.speech_parts(speech)["valid"])


def test_decoder_noise_and_masks_are_the_options():
    """Each option alone: white noise by its SD, an offset constant within a channel, masks to zero."""
    item = {"x": np.ones((60, 256), np.float32), "day": 0, "labels": np.array([1, 2]), "id": "a"}
    batch = data.collate_speech([item] * 3)

    def shown(white, offset, masks, others=""):
        options = f"--white-noise {white} --offset-noise {offset} --time-mask-prob {masks} {others}"
        return train_decoder.augment(batch, train_decoder.parse_args(options.split()))["x"]

    assert torch.equal(shown(0, 0, 0), batch["x"])
    assert shown(0, 0.5, 0).std(1).max() < 1e-6
    assert shown(0.5, 0, 0).std() == pytest.approx(0.5, abs=0.02)
    assert 0.1 < (shown(0, 0, 1) == 0).float().mean() < 0.8
    walk = shown(0, 0, 0, "--random-walk 0.2").diff(dim=1)
    assert (walk.mean().abs() < 0.01, float(walk.std())) == (True, pytest.approx(0.2, abs=0.01))
    gains = shown(0, 0, 0, "--static-gain 0.3")
    assert gains.std(1).max() < 1e-6
    assert gains[:, 0].std() == pytest.approx(0.3, abs=0.05)
    electrodes = shown(0, 0, 0, "--channel-mask 0.25") == 0
    assert torch.equal(electrodes[:, :, :128], electrodes[:, :, 128:])
    features = shown(0, 0, 0, "--feature-mask 0.25") == 0
    for hidden in (electrodes, features):
        assert torch.equal(hidden.all(1), hidden.any(1))  # throughout a trial
        assert hidden.float().mean() == pytest.approx(0.25, abs=0.1)
    assert {shown(0, 0, 0, "--random-cut 2").shape[1] for _ in range(30)} == {58, 59, 60}


def test_decoder_batches_of_a_few_days_hold_as_many_of_each():
    days = np.repeat(np.arange(5), [3, 50, 8, 20, 19])
    batches = data.speech_batches([1] * 100, 8, 7, 3, 2, days, 4)
    assert [len(batch) for batch in batches] == [16] * 7
    for batch in batches:
        assert np.bincount(days[batch], minlength=5).tolist().count(4) == 4
    assert batches == data.speech_batches([1] * 100, 8, 7, 3, 2, days, 4) != batches[::-1]


def test_decoder_decays_matrices_only():
    args = train_decoder.parse_args(["--data", "DIR", "--weight-decay", "0.25"])
    model = GRUDecoder(channels=8, days=3, hidden=4, layers=1, layer_norm=True)
    parameters = dict(model.named_parameters())
    decayed, kept = train_decoder.parameter_groups(model, args)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.25, 0)
    matrices = ["gru_decoder.weight_ih_l0", "gru_decoder.weight_hh_l0", "fc_decoder_out.weight"]
    assert [id(p) for p in decayed["params"]] == [id(parameters[name]) for name in matrices]
    assert len(kept["params"]) == len(parameters) - 3


@pytest.mark.slow
def test_decoder_new_day_trains_its_layer_alone_and_a_resume_finds_its_data(run, tmp_path):
    folder = Path(run("train_decoder", "--name start --max-steps 4 --lr 0.01")["folder"])
    start = torch.load(folder / "best.pt", weights_only=True)
    known, new = start["data"]["days"]
    start["data"]["days"] = ["t12.1999.01.01", known]  # of the second day here it knows nothing
    save_checkpoint(tmp_path / "start.pt", start)
    options = f"--init {tmp_path / 'start.pt'} --new-day --valid test --lr 0.01 --name new --max-steps 4"
    out = run("train_decoder", options)["folder"]
    found = torch.load(Path(out) / "best.pt", weights_only=True)
    assert found["data"]["days"] == [*start["data"]["days"], new]
    layers = ("dayWeights", "dayBias")
    assert all(torch.equal(v, start["model"][k]) for k, v in found["model"].items() if k not in layers)
    for name in layers:
        assert torch.equal(found["model"][name][:2], start["model"][name])
        moved = found["model"][name][2] - start["model"][name].mean(0)
        assert 0 < moved.abs().max() < 1
    args = train_decoder.parse_args(["--resume", str(folder / "last.pt"), "--max-steps", "5"])
    assert train_decoder.main(args)["folder"] == str(folder)
    assert last(folder)["step"] == 5


def test_decoder_new_day_keeps_a_tenth_where_no_block_of_it_is_held_out(corpus):
    _, folder, _, cache = corpus("train_decoder")
    argv = f"--data {folder} --cache {cache} --init x.pt --new-day --kernel 4 --stride 2".split()
    speech = data.open_speech(folder, cache)
    of_new = np.flatnonzero((speech.part == "train") & (speech.day == 1))
    speech.block[of_new] = 1  # all of one block, which is not held out beside another day's two
    args = train_decoder.parse_args(argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "open_speech", lambda *args, **kw: speech)
        _, train, valid, info = train_decoder.load_data(args, speech.days[:1])
        assert (valid.tolist(), train.tolist()) == (of_new[-1:].tolist(), of_new[:-1].tolist())
        assert info["days"] == speech.days
        with pytest.raises(data.DataError, match="--init does not know"):
            train_decoder.load_data(args, speech.days)


def test_decoder_loss_is_torchs_mean():
    torch.manual_seed(1)
    log_probs, labels = torch.randn(3, 30, 41).log_softmax(-1), torch.randint(1, 41, (3, 9))
    frames, counts = torch.tensor([30, 25, 28]), torch.tensor([9, 5, 7])
    mean = torch.nn.functional.ctc_loss(log_probs.transpose(0, 1), labels, frames, counts)
    losses = train_decoder.ctc_losses(log_probs, frames, labels, counts)
    assert losses.mean() == pytest.approx(float(mean), rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12: torch's threads
def test_decoder_epoch_is_one_pass_and_workers_change_nothing(run, corpus, monkeypatch):
    _, folder, _, cache = corpus("train_decoder")
    train = data.speech_parts(data.open_speech(folder, cache))["train"].tolist()
    two = last(run("train_decoder", "--max-steps 8 --name two --workers 2")["folder"])
    read, whole = [], data.SpeechCorpus.__getitem__
    monkeypatch.setattr(data.SpeechCorpus, "__getitem__", lambda self, k: read.append(k) or whole(self, k))
    one = last(run("train_decoder", "--max-steps 8 --name none")["folder"])
    assert all(torch.equal(v, two["model"][k]) for k, v in one["model"].items())
    assert torch.equal(one["rng"]["cpu"], two["rng"]["cpu"])
    read = [k for k in read if k in train]  # validation reads as well
    assert len(train) == 16
    assert read[:16] != read[16:]
    assert sorted(read[:16]) == sorted(read[16:]) == train


def torchrun(name, corpus, out, *options):
    """Run a trainer in two gloo processes, forked from this one."""
    argv = command(name, corpus, out, *options)
    started = two_ranks(out, f"{name}.py", lambda: TRAINERS[name].main(TRAINERS[name].parse_args(argv)))
    assert [process.wait() for process in started] == [0, 0], started[0].said("stderr") + started[1].said(
        "stderr"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@each_trainer
def test_two_processes_equal_one_on_the_joined_batch(name, run, corpus, tmp_path, monkeypatch):
    options = (CASES[name].plain, "--max-steps 4 --clip inf")
    train_on(monkeypatch, name, 12)  # twelve items: no batch to fill up
    torchrun(name, corpus, tmp_path, *options, "--batch 2 --name two")
    one = last(run(name, *options, "--batch 4 --name one")["folder"])["model"]
    two = last(tmp_path / "two")["model"]
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 2e-5


def write_encoder(path, frames, info):
    """A small AST that has learnt nothing; info: what its checkpoint says of the data."""
    model = AST(frames=frames, width=16, depth=1, heads=2)
    known = {"task": "ast", "model_args": model.model_args, "model": model.state_dict()}
    save_checkpoint(path, known | {"args": {}, "data": info})


def test_init_is_read_once_and_no_more_on_resume(run, tmp_path, monkeypatch):
    start, read, load = tmp_path / "start.pt", [], torch.load
    write_encoder(start, 48, {"mean": -5.0, "std": 3.0})
    args = pretrain_ast.parse_args(f"--task finetune --data DIR --init {start}".split())
    pretrain_ast.load_start(args)
    assert args.frames == 48
    monkeypatch.setattr(torch, "load", lambda path, **kw: read.append(path) or load(path, **kw))
    folder = run("pretrain_ast", f"--init {start} --freeze 0 --max-steps 1 --name init")["folder"]
    assert read == [str(start)]
    start.unlink()
    run("pretrain_ast", resume(folder), "--max-steps 2")
    assert (last(folder)["data"]["mean"], last(folder)["model_args"]["width"]) == (-5.0, 16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_at_first_the_heads_learn_alone_also_in_two_processes(run, corpus, tmp_path, monkeypatch):
    name, start = "pretrain_ast", tmp_path / "start.pt"
    write_encoder(start, 512, {})
    options = (CASES[name].plain, f"--init {start} --lr-schedule constant --weight-decay 0.1")
    train_on(monkeypatch, name, 12)
    torchrun(name, corpus, tmp_path, *options, "--freeze 9 --max-steps 4 --batch 2 --name two")
    one = last(run(name, *options, "--freeze 9 --max-steps 4 --batch 4 --name one")["folder"])["model"]
    two = last(tmp_path / "two")["model"]
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 2e-5
    before = load_checkpoint(start)[0].state_dict()

    def moved(weights):
        return {
            k.split(".")[0] for k in before.keys() & weights.keys() if not torch.equal(before[k], weights[k])
        }

    assert moved(one) == set()
    thawed = run(name, *options, "--freeze 1 --max-steps 4 --batch 4 --name thawed")["folder"]
    assert moved(last(thawed)["model"]) == {"embed", "position", "blocks", "norm"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@each_trainer
def test_the_main_job_without_data_learns(name, tmp_path, capsys):
    """What README's first command does on a fresh machine."""
    options, key, good = CASES[name].main_job
    argv = [*options.split(), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "runs")]
    out = TRAINERS[name].main(TRAINERS[name].parse_args(argv))
    assert out["synthetic"]
    assert good(out[key]), out[key]
    assert "SYNTHETIC" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@each_trainer
def test_three_and_three_steps_in_two_processes_equal_six(name, corpus, tmp_path):
    """Dropout and noise are on: every process goes on from a random state of its own."""
    torchrun(name, corpus, tmp_path, "--batch 2 --max-steps 6 --name six")
    torchrun(name, corpus, tmp_path, "--batch 2 --max-steps 3 --name three")
    torchrun(name, corpus, tmp_path, "--batch 2 --max-steps 6", resume(tmp_path / "three"))
    six, three = last(tmp_path / "six"), last(tmp_path / "three")
    assert six["step"] == three["step"] == 6
    assert all(torch.equal(value, three["model"][key]) for key, value in six["model"].items())
    assert torch.equal(six["rng"]["others"][0]["cpu"], three["rng"]["others"][0]["cpu"])
    assert not torch.equal(six["rng"]["others"][0]["cpu"], six["rng"]["cpu"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@each_trainer
def test_nan_on_one_rank_neither_hangs_nor_diverges(name, corpus, tmp_path, monkeypatch):
    clean, called = TRAINERS[name].augment, []

    def augment(item, *a):
        called.append(item)
        spoil = os.environ["RANK"] == "1" and len(called) <= 4
        return item | {"x": item["x"] * np.nan} if spoil else clean(item, *a)

    monkeypatch.setattr(TRAINERS[name], "augment", augment)
    torchrun(name, corpus, tmp_path, "--batch 2 --name nan")
    ckpt, lines = last(tmp_path / "nan"), records(tmp_path / "nan")
    skips = [r for r in lines if "skip" in r]
    assert ckpt["skipped"]["bad"] == len(skips) > 0
    assert ckpt["step"] > len(skips)
    assert all(len(r["names"]) == 2 for r in skips)
    assert all(torch.isfinite(v).all() for v in ckpt["model"].values())
