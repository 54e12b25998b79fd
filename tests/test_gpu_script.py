"""tests/gpu.sh at its toy size: every stage runs to its end on a CPU, so that a first card meets no slip. And
what a card alone meets: parts without labels, half-written files, rows that the time did not reach."""

import json
import os
import subprocess
from pathlib import Path

import gpu_bench
import gpu_table
import pytest
import torch

STAGES = ["environment", "bench", "han", "render", "pretrain", "finetune", "decoder"]
SMALL = {
    "ast": {"width": 32, "depth": 2, "heads": 2, "frames": 64},
    "han": {"size": 8, "heads": 2},
    "decoder": {"hidden": 8, "layers": 2, "days": 1, "channels": 8},
}


@pytest.mark.slow
def test_every_stage_ends_well_at_toy_size(tmp_path):
    script = Path(__file__).with_name("gpu.sh")
    ran = subprocess.run(
        ["bash", script, "--toy"],
        env=os.environ | {"OUT": str(tmp_path), "TMPDIR": str(tmp_path.parent)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"{s}.json" for s in STAGES} | {"results.tar.gz"}
    for stage in STAGES:
        assert json.loads((tmp_path / f"{stage}.json").read_text())["exit"] == 0


def test_table_of_what_a_card_may_leave(tmp_path, capsys):
    stage, out = tmp_path / "stage", tmp_path / "out"
    for folder in (stage / "results", stage / "runs/f0", out):
        folder.mkdir(parents=True)
    unlabelled = {"valid": {"all": {"mean": {"r2": 0.25}}}, "test": {"all": None}}
    results = {
        "recipe": {"metrics": unlabelled, "synthetic": False},
        "bench": {"failed": ["a row"], "not_reached": ["another"]},
    }
    for name, result in results.items():
        (stage / f"results/{name}.json").write_text(json.dumps(result))
    (stage / "results/torn.json").write_text('{"a": 1')
    record = {"step": 3, "epoch": 0, "time": 2.0, "loss": 0.5, "norm": 1.0, "skipped": {}, "valid_r2": None}
    lines = [json.dumps(record), json.dumps(record | {"valid_loss": 0.75}), '{"step": 4, "a": {}']
    (stage / "runs/f0/metrics.jsonl").write_text("\n".join(lines))
    pairs = ["exit=1", "start=1", "seconds=2", "limit=3"]
    gpu_table.main(["summary", str(stage), str(out / "stage.json"), *pairs])
    assert gpu_table.main(["table", str(out)]) == 1
    told = capsys.readouterr().out
    for part in (
        "FAILED, exit code 1",
        "recipe: R2 {'valid': 0.25}",
        "failed: a row",
        "not_reached: another",
        "failed: torn.json",
        "f0: 3 steps, 1.5 /s, loss 0.5000 valid_loss 0.7500",
    ):
        assert part in told


def test_rows_of_the_bench_are_networks():
    for kind, task, batches, amp, sizes in gpu_bench.ROWS:
        assert kind in ("case", "plain")
        assert amp in ("off", *gpu_bench.AMP_TYPES)
        assert batches == sorted(batches, reverse=True)
        model, *_ = gpu_bench.prepared(task, 2, sizes | SMALL[task], torch.device("cpu"))
        assert "compile" not in sizes or model.blocks
        assert "graph" not in sizes or not model.gru_decoder.bidirectional


def test_a_bench_that_is_stopped_names_what_it_did_not_reach(tmp_path, monkeypatch):
    def stopped(task, *_):
        if task == "ast":
            raise KeyboardInterrupt
        raise ValueError(task)

    monkeypatch.setattr(gpu_bench, "measure", stopped)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # afterwards as it was
    out = tmp_path / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        gpu_bench.bench("cpu", str(out), "toy")
    found = json.loads(out.read_text())
    assert [line.split(",")[1] for line in found["not_reached"]] == [
        " 'ast'",
        *[" 'han'", " 'decoder'", " 'ast'"],
    ]
    assert len(found["failed"]) == 2
