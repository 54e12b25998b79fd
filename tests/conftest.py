"""One thread: the tests' networks are small, and threads that wait for each other on a busy machine cost minutes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import data
import eval as evaluation


def refusal(argv: list[str], capsys) -> str:
    """The one line with which eval.py refuses this command line, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        data.run_script("eval.py", lambda: evaluation.main(argv))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]
