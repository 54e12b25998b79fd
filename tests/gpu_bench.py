"""The first two stages of `tests/gpu.sh`:

python tests/gpu_bench.py environment DEVICE OUT.json     versions, the card, every test marked gpu
python tests/gpu_bench.py bench DEVICE OUT.json [toy]     the networks, and the plain ones beside them
"""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import plain_networks

import eval as evaluation
from models import peak_memory

TESTS = Path(__file__).parent

PACKAGES = "numpy scipy scikit-learn tqdm g2p_en mido soundfile rapidfuzz ufal-flashlight-text matplotlib"
AST = {"width": 768, "depth": 12, "heads": 12, "frames": 1024, "dropout": 0}
VISIBLE = AST | {"visible_only": True}
CASES = [  # task, batches of which the first that fits into memory is taken, precision, sizes
    ("ast", [1024, 512, 256, 128], "bf16", VISIBLE),
    ("ast", [512, 256, 128, 64], "bf16", AST),
    ("han", [8], "off", {}),
    ("han", [8], "bf16", {}),
    ("han", [8], "fp16", {}),
    ("han", [64], "bf16", {}),
    ("decoder", [64], "off", {}),
    ("decoder", [64], "bf16", {}),
    ("decoder", [64], "bf16", {"hidden": 1024}),
    ("ast", [1024, 512, 256, 128], "bf16", VISIBLE | {"compile": True}),  # last: compiling takes long
]
PLAIN = [  # task, batch, precision, sizes
    ("han", 8, "off", {}),
    ("han", 64, "bf16", {}),
    ("decoder", 64, "off", {}),
    ("decoder", 64, "bf16", {"hidden": 1024}),
    ("ast", 16, "bf16", {}),
]
TOY_SIZES = {
    "han": {"size": 16, "heads": 4},
    "decoder": {"hidden": 16, "layers": 2},
    "ast": {"width": 32, "depth": 1, "heads": 2, "frames": 128},
}
TOY_CASES = [(task, [4, 2], "off", sizes) for task, sizes in TOY_SIZES.items()]
TOY_PLAIN = [(task, 2, "off", sizes) for task, sizes in TOY_SIZES.items()]


# ---------------------------------------------------------------------------------------------------------
# Environment
# ---------------------------------------------------------------------------------------------------------
class Outcomes:
    """A pytest plugin: outcome by test."""

    def __init__(self):
        self.of = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or not report.passed:
            self.of[report.nodeid] = report.outcome


def environment(device: str, out: str) -> int:
    """Exit code: 0 where nothing is missing and every test passed."""
    about = {"python": platform.python_version(), "missing": [], "gpu": None}
    for name in PACKAGES.split():
        try:
            about[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            about["missing"].append(name)
    about |= evaluation.hardware(torch.device(device))
    if device == "cuda":
        about["cuda"], about["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        about["nvidia_smi"] = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    marked = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in path.read_text()]
    if device == "cpu":  # the toy run: the other files' tests need a card
        os.environ["GPU_TESTS_ON"] = "cpu"
        marked = [str(TESTS / "test_gpu.py")]
    outcomes = Outcomes()
    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", *marked], plugins=[outcomes])
    Path(out).write_text(json.dumps(about | {"tests": outcomes.of}, indent=1))
    return int(code) or len(about["missing"])


# ---------------------------------------------------------------------------------------------------------
# Bench
# ---------------------------------------------------------------------------------------------------------
def bench(device: str, out: str, toy: str = "") -> int:
    """Writes after every row, so that what comes later loses nothing; exit code: rows that failed."""
    device = torch.device(device)
    torch.backends.cudnn.allow_tf32 = False  # "off" is fp32 everywhere, as matrix products are
    size, steps = (128, 2) if toy else (8192, 10)
    peak = {"off": matrix_tflops(torch.float32, size, device)}
    peak["bf16"] = peak["fp16"] = matrix_tflops(torch.bfloat16, size, device)
    found = {"hardware": evaluation.hardware(device), "matrix_tflops": peak}
    found |= {"cases": [], "plain": [], "failed": []}
    rows = [("cases", measure, row) for row in (TOY_CASES if toy else CASES)]
    rows[-1:-1] = [("plain", compare, row) for row in (TOY_PLAIN if toy else PLAIN)]
    for kind, function, row in rows:
        try:
            result = function(*row, steps, device)
            if kind == "cases":
                result["share_of_matrix_peak"] = result["tflops"] / peak[result["amp"]]
            found[kind].append(result)
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            found["failed"].append(f"{row}: {error!r}")
        Path(out).write_text(json.dumps(found, indent=1))
    return len(found["failed"])


def matrix_tflops(dtype: torch.dtype, size: int, device: torch.device) -> float:
    """Of a product of two random matrices, median of ten after three."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    taken = []
    for _ in range(13):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(taken[3:]) / 1e12


def compare(task: str, batch: int, amp: str, sizes: dict, steps: int, device: torch.device) -> dict:
    times = plain_networks.compare(task, sizes, batch, steps, device, amp)
    return {"task": task, "batch": batch, "amp": amp, "sizes": sizes} | times


def measure(task: str, batches: list[int], amp: str, sizes: dict, steps: int, device: torch.device) -> dict:
    batch, case = first_that_fits(task, batches, amp, sizes, steps, device)
    case["tflops"] = step_flops(task, batch, sizes, device) / case["seconds"] / 1e12
    return {"task": task, "batch": batch, "amp": amp, "sizes": sizes} | case


def first_that_fits(task, batches, amp, sizes, steps, device) -> tuple[int, dict]:
    """The batch that was taken, and what `eval.py bench` measures, with sizes of one's own."""
    for batch in batches:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            model, inputs, loss, optimizer = prepared(task, batch, sizes, device)
            taken = [evaluation.timed_step(model, inputs, loss, optimizer, amp) for _ in range(3 + steps)]
        except torch.OutOfMemoryError:
            model = inputs = loss = optimizer = None
            print(f"{task}: a batch of {batch} does not fit")
            continue
        seconds, peak = statistics.median(taken[3:]), peak_memory(device)
        waits = max(0.0, 1 - busy_seconds(model, inputs, loss, optimizer, amp) / seconds)
        found = {"seconds": seconds, "items_per_second": batch / seconds, "peak": peak, "gpu_waits": waits}
        return batch, found
    raise RuntimeError(f"no batch of {batches} fits")


def prepared(task: str, batch: int, sizes: dict, device: torch.device) -> tuple:
    """A network, its inputs, its loss, its optimizer; sizes: its own, and whether to compile it."""
    torch.manual_seed(7)
    own = {name: size for name, size in sizes.items() if name != "compile"}
    model, inputs, loss = evaluation.BENCHES[task][0](own, batch, device)
    if sizes.get("compile"):
        model.compile()
    return model, inputs, loss, torch.optim.AdamW(model.parameters(), lr=1e-4)


def step_flops(task: str, batch: int, sizes: dict, device: torch.device) -> int:
    """Of a training step, three times a forward pass's; AST's clips all cost the same."""
    counted = 1 if task == "ast" else batch
    model, inputs, *_ = prepared(task, counted, sizes | {"compile": False}, device)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._cudnn_rnn: cudnn_rnn_flops})
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), counter:
        model(*inputs)
    return 3 * counter.get_total_flops() * batch // counted


def cudnn_rnn_flops(rows: tuple, weights: list, *_, **__) -> int:
    """Of cuDNN's recurrent networks, from shapes: inputs (N, I) packed or (T, B, I), weights and biases."""
    return 2 * math.prod(rows[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


def busy_seconds(model, inputs, loss, optimizer, amp: str) -> float:
    """The GPU's time in the kernels of a step; 0 on a CPU."""
    with torch.profiler.profile() as profile:  # of one step: a recurrent network has 10,000 kernels
        evaluation.timed_step(model, inputs, loss, optimizer, amp)
    kernels = [e for e in profile.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return sum(kernel.self_device_time_total for kernel in kernels) / 1e6


if __name__ == "__main__":
    command = {"environment": environment, "bench": bench}[sys.argv[1]]
    sys.exit(command(*sys.argv[2:]))
