"""One thread: the networks are small, and threads that wait for each other on a busy machine cost minutes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data
import eval as evaluation


def refused(function: Callable, capsys, *names: object, script: str = "x.py") -> str:
    """The one line with which a script refuses: exit code 2, nothing else on stderr, all `names` in it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        data.run_script(script, function)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    for name in names:
        assert str(name) in lines[0]
    return lines[0]


def refusal(argv: list[str], capsys) -> str:
    """The one line with which eval.py refuses this command line."""
    return refused(lambda: evaluation.main(argv), capsys, script="eval.py")


def leaves(tree: object, key: str = "") -> dict[str, object]:
    """{path of keys: value} of a nested tree of dicts and lists."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {key: tree}
    return {
        path: leaf for name, branch in tree.items() for path, leaf in leaves(branch, f"{key}/{name}").items()
    }


def check_results(path: str | Path, truth: dict[str, np.ndarray]) -> int:
    """Recomputes a results JSON from the CSV beside it and truth; gives how many figures were compared."""
    saved = leaves(json.loads(Path(path).read_text())["metrics"])
    records = evaluation.read_predictions(Path(path).with_suffix(".csv"))
    computed = leaves(evaluation.json_ready(evaluation.measure(records, truth)))
    assert saved.keys() == computed.keys()
    for key, value in computed.items():
        assert saved[key] == pytest.approx(value, abs=2e-6), key
    return len(saved)
