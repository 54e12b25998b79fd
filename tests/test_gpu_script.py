"""tests/gpu.sh at its toy size: every stage runs to its end on a CPU, so that the first card meets no slip."""

import json
import os
import subprocess
from pathlib import Path

import pytest

STAGES = ["environment", "bench", "han", "render", "pretrain", "finetune", "decoder"]


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
