"""`bash tests/gpu.sh --toy`: every stage at a tiny size on a CPU, so that a run on a card has no typo."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = "environment bench han render pretrain finetune decoder".split()


@pytest.mark.slow
def test_toy_run_fills_every_stages_json(tmp_path):
    command = ["bash", str(ROOT / "tests/gpu.sh"), "--toy"]
    environment = os.environ | {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500
    )
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {f"{name}.json" for name in STAGES} | {"results.tar.gz"}, done.stderr
    assert max(files.values()) < 2**24
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in STAGES}
    assert {name: stage["exit"] for name, stage in found.items()} == dict.fromkeys(STAGES, 0), done.stdout
    assert done.returncode == 0
    assert all(f"\n{name:12} " in f"\n{done.stdout}" for name in STAGES)

    outcomes = list(found["environment"]["results"]["environment"]["tests"].values())
    assert outcomes.count("passed") >= 30
    assert set(outcomes) == {"passed", "skipped"}

    bench = found["bench"]["results"]["bench"]
    assert [row["task"] for row in bench["cases"]] == [row["task"] for row in bench["plain"]]
    assert [row["batch"] for row in bench["cases"]] == [4, 4, 4]
    assert all(0 < row["tflops"] < 10 and row["seconds"] > 0 for row in bench["cases"])
    assert all(row["difference"] < 1e-4 for row in bench["plain"])

    results = {name: found[name]["results"] for name in STAGES}
    scored = [results["han"]["han_recipe_keepoverlap_segment"], results["render"]["ast_floor_segment"]]
    scored += [results["finetune"][f"ast_{row}_segment"] for row in ("probe", "pretrained")]
    for result in scored:
        assert result["synthetic"]
        assert -5 < result["metrics"]["valid"]["all"]["mean"]["r2"] < 1
        assert result["metrics"]["valid"]["all"]["mean"]["folds"] == 4
    assert results["render"]["sound"]["files"] == 40
    assert results["render"]["sound"]["hours"] > 0.1

    steps = {name: {run: of["step"] for run, of in found[name]["runs"].items()} for name in STAGES}
    assert steps["han"].keys() == steps["finetune"].keys() == {"f0", "f1", "f2", "f3"}
    assert steps["pretrain"] == {"pretrain": 4}
    assert steps["decoder"] == {"baseline": 6, "default": 6, "log": 6}
    curve = found["decoder"]["runs"]["baseline"]["curve"]
    assert sorted({step for step, _, _ in curve}) == [1, 2, 3, 4, 5, 6]
