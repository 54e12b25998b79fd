"""One thread: the tests' networks are small, and threads that wait for each other on a busy machine cost minutes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable

import pytest

import data
import eval as evaluation


def refused(function: Callable, capsys, *names: object, script: str = "x.py") -> str:
    """The one line with which a script refuses: exit code 2, nothing else on stderr, every one of `names` in it."""
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
