"""What the stages of `tests/gpu.sh` left, in a JSON each and a table; imports nothing that takes seconds.

python tests/gpu_table.py summary FOLDER OUT.json exit=CODE start=TIME seconds=N limit=N
python tests/gpu_table.py table OUT
"""

import json
import re
import statistics
import sys
from datetime import datetime
from pathlib import Path

SAMPLE = re.compile(r"\d{4}/\d\d/\d\d [\d:.]+, \d+, \d+")  # no torn line
FIGURES = ("loss", "valid_loss", "valid_r2", "valid_accuracy", "valid_chance", "valid_per")


def summary(folder: str, out: str, *pairs: str) -> int:
    """Of FOLDER's results/*.json, runs/*/metrics.jsonl and ../gpu.csv (nvidia-smi's time, %, MiB)."""
    about = {name: float(value) for name, value in (pair.split("=") for pair in pairs)}
    results = {path.stem: result_of(path) for path in Path(folder).glob("results/*.json")}
    runs = {path.parent.name: run_summary(path) for path in sorted(Path(folder).glob("runs/*/metrics.jsonl"))}
    about |= {"ok": about["exit"] == 0, "results": results, "runs": runs, "gpu": None}
    samples = Path(folder, "..", "gpu.csv")
    if samples.exists():
        rows = [line.split(", ") for line in samples.read_text().splitlines() if SAMPLE.fullmatch(line)]
        inside = [
            row for row in rows if about["start"] <= sample_time(row[0]) <= about["start"] + about["seconds"]
        ]
        if inside:
            busy = statistics.mean(float(row[1]) for row in inside)
            about["gpu"] = {"busy_percent": busy, "most_mib": max(float(row[2]) for row in inside)}
    Path(out).write_text(json.dumps(about, indent=1))
    return 0


def result_of(path: Path) -> dict:
    """A result; what a stage that was killed left half written says so."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        return {"failed": [f"{path.name}: {error}"]}


def sample_time(text: str) -> float:
    return datetime.strptime(text, "%Y/%m/%d %H:%M:%S.%f").timestamp()


def run_summary(path: Path) -> dict:
    """Of a metrics.jsonl, whose last line may be torn."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    records = [record for record in records if "loss" in record]
    last = records[-1] if records else {"step": 0, "time": 0.0, "epoch": 0, "skipped": {}}
    found = {name: last[name] for name in ("step", "epoch", "time", "skipped")}
    found["steps_per_second"] = last["step"] / max(last["time"], 0.01)  # evaluations included
    found["curve"] = [[record["step"], record["loss"], record["norm"]] for record in records]
    found["evaluations"] = []
    for record in records:
        numbers = {key: value for key, value in record.items() if isinstance(value, float | int)}
        if "valid_loss" in record:
            found["evaluations"].append(numbers)
    return found


def table(out: str) -> int:
    """Prints a line a stage, and its figures below; exit code: stages that failed."""
    failed = 0
    for path in sorted(Path(out).glob("*.json"), key=lambda path: json.loads(path.read_text())["start"]):
        stage = json.loads(path.read_text())
        gpu = f"  GPU busy {stage['gpu']['busy_percent']:.0f} %" if stage["gpu"] else ""
        state = "ok" if stage["ok"] else f"FAILED, exit code {stage['exit']:.0f}"
        failed += not stage["ok"]
        print(f"{path.stem:12} {stage['seconds']:4.0f} of {stage['limit']:.0f} s{gpu}  {state}")
        for line in stage_lines(stage):
            print(f"    {line}")
    return failed


def stage_lines(stage: dict) -> list[str]:
    lines = []
    for name, result in stage["results"].items():
        if "tests" in result:
            outcomes = list(result["tests"].values())
            counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in sorted(set(outcomes)))
            lines.append(
                f"{result['gpu']}, torch {result['torch']}; tests: {counts}; missing {result['missing']}; "
                f"an LSTM under bf16 gives {result.get('lstm_under_bf16')}"
            )
            lines += [f"failed: {test}" for test, kind in result["tests"].items() if kind == "failed"]
        for row in result.get("plain", []):
            ran = f"{row['task']} batch {row['batch']} {row['amp']} {row['sizes']}"
            times = f"{1000 * row['plain']:.1f} ms / {1000 * row['ours']:.1f} ms"
            lines.append(f"{ran}: plain / ours {times} = {row['ratio']:.1f}")
        for row in result.get("cases", []):
            lines.append(
                f"{row['task']} batch {row['batch']} {row['amp']} {row['sizes']}: "
                f"{1000 * row['seconds']:.1f} ms, {row['items_per_second']:.0f} items/s, "
                f"{row['peak']:.0f} MiB, {row['tflops']:.1f} TFLOP/s, "
                f"{row['share_of_matrix_peak']:.1%} of peak, GPU waits {row['gpu_waits']:.0%}"
            )
        for what in ("failed", "not_reached"):
            lines += [f"{what}: {line}" for line in result.get(what, [])]
        if "hours" in result:
            lines.append(f"{result['files']} files, {result['hours']:.1f} h")
        if "metrics" in result:
            parts = {part: views["all"] for part, views in result["metrics"].items()}  # None without a label
            shown = {part: view["mean"]["r2"] for part, view in parts.items() if view}
            lines.append(f"{name}: R2 {shown}{' SYNTHETIC' if result['synthetic'] else ''}")
    for name, run in stage["runs"].items():
        last = run["evaluations"][-1] if run["evaluations"] else {}
        shown = [f"{key} {last[key]:.4f}" for key in FIGURES if key in last]
        lines.append(f"{name}: {run['step']} steps, {run['steps_per_second']:.1f} /s, {' '.join(shown)}")
    return lines


def main(argv: list[str]) -> int:
    return {"summary": summary, "table": table}[argv[0]](*argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
