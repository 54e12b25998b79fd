"""The first two stages of `tests/gpu.sh`:

python tests/gpu_bench.py environment DEVICE OUT.json     versions, the card, every test marked gpu
python tests/gpu_bench.py bench DEVICE OUT.json [toy]     the networks, and the plain ones beside them
"""

import contextlib
import importlib.metadata
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
from models import AMP_TYPES, peak_memory, write_json

TESTS = Path(__file__).parent

PACKAGES = "numpy scipy scikit-learn tqdm g2p_en mido soundfile rapidfuzz ufal-flashlight-text matplotlib"
AST = {"width": 768, "depth": 12, "heads": 12, "frames": 1024, "dropout": 0}
VISIBLE = AST | {"visible_only": True}
# kind, task, batches of which the first that fits into memory is taken, precision, sizes; what matters most
# comes first, since the time is limited. "case": ours alone; "plain": beside the plain network, one batch.
# compile: the blocks of an AST; graph: the decoder's GRU as CUDA graphs, which wait for no host. fp16: what
# cuDNN's recurrent networks compute in under bf16 too, and what its persistent kernels need.
ROWS = [
    ("case", "ast", [1024, 512, 256, 128], "bf16", VISIBLE),
    ("plain", "han", [8], "fp16", {}),
    ("plain", "decoder", [64], "fp16", {"hidden": 1024}),
    ("case", "ast", [512, 256, 128, 64], "bf16", AST),
    ("case", "han", [8], "fp16", {}),
    ("case", "han", [8], "off", {}),
    ("plain", "han", [8], "off", {}),
    ("case", "decoder", [64], "fp16", {"hidden": 1024}),
    ("plain", "decoder", [64], "off", {}),
    ("case", "han", [32], "fp16", {}),  # its voices: 128 sequences, the most that a persistent kernel takes
    ("case", "han", [64], "fp16", {}),
    ("case", "ast", [512, 256, 128, 64], "bf16", AST | {"compile": True}),
    ("case", "ast", [1024, 512, 256, 128], "bf16", VISIBLE | {"compile": True}),
    ("plain", "ast", [16], "bf16", {}),
    ("case", "decoder", [64], "bf16", {"hidden": 1024}),
    ("plain", "han", [64], "fp16", {}),
    ("case", "han", [8], "bf16", {}),
    ("case", "decoder", [64], "off", {}),
    ("case", "decoder", [64], "fp16", {"hidden": 1024, "bidirectional": True}),
    ("case", "decoder", [64], "fp16", {"hidden": 1024, "graph": True}),  # last: a capture that fails may
    ("case", "decoder", [64], "fp16", {"graph": True}),  # leave the card unusable to this process
]
TOY_SIZES = {
    "han": {"size": 16, "heads": 4},
    "decoder": {"hidden": 16, "layers": 2},
    "ast": {"width": 32, "depth": 1, "heads": 2, "frames": 128},
}
TOY_ROWS = [("case", task, [4, 2], "off", sizes) for task, sizes in TOY_SIZES.items()]
TOY_ROWS += [("plain", task, [2], "off", sizes) for task, sizes in TOY_SIZES.items()]
OURS = ("compile", "graph")  # sizes that are no network's own


# ---------------------------------------------------------------------------------------------------------
# Environment
# ---------------------------------------------------------------------------------------------------------
class Outcomes:
    """A pytest plugin: writes `about` and the outcome by test after each, so that a stop loses none."""

    def __init__(self, out: str, about: dict):
        self.out, self.about = out, about | {"tests": {}}
        write_json(out, self.about)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or not report.passed:
            self.about["tests"][report.nodeid] = report.outcome
            write_json(self.out, self.about)


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
        with torch.autocast(device, torch.bfloat16), torch.no_grad():  # AutocastRNN.cpp knows float16 alone
            output, _ = torch.nn.LSTM(16, 16, device=device)(torch.randn(2, 2, 16, device=device))
        about["lstm_under_bf16"] = str(output.dtype)
    marked = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in path.read_text()]
    if device == "cpu":  # the toy run: the other files' tests need a card
        os.environ["GPU_TESTS_ON"] = "cpu"
        marked = [str(TESTS / "test_gpu.py")]
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=10"]
    code = pytest.main([*options, *marked], plugins=[Outcomes(out, about)])
    return int(code) or len(about["missing"])


# ---------------------------------------------------------------------------------------------------------
# Bench
# ---------------------------------------------------------------------------------------------------------
def bench(device: str, out: str, toy: str = "") -> int:
    """Writes after every row, so that a stop loses nothing else; exit code: rows that failed."""
    device = torch.device(device)
    torch.backends.cudnn.allow_tf32 = False  # "off" is fp32 everywhere, as matrix products are
    size, steps = (128, 2) if toy else (8192, 10)
    peak = {"off": matrix_tflops(torch.float32, size, device)}
    peak["bf16"] = peak["fp16"] = matrix_tflops(torch.bfloat16, size, device)
    rows = TOY_ROWS if toy else ROWS
    found = {"hardware": evaluation.hardware(device), "matrix_tflops": peak, "cases": [], "plain": []}
    found |= {"failed": [], "not_reached": list(map(str, rows))}
    write_json(out, found)
    for kind, task, batches, amp, sizes in rows:
        start = time.perf_counter()
        row = {"task": task, "batch": batches[0], "amp": amp, "sizes": sizes}
        try:
            if kind == "plain":
                row |= plain_networks.compare(task, sizes, batches[0], steps, device, amp)
                found["plain"].append(row)
            else:
                row |= measure(task, batches, amp, sizes, steps, device)
                row["share_of_matrix_peak"] = row["tflops"] / peak[amp]
                found["cases"].append(row)
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            found["failed"].append(f"{kind} {row}: {error!r}")
        row["took"] = time.perf_counter() - start
        print(row, flush=True)
        del found["not_reached"][0]
        write_json(out, found)
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


def measure(task: str, batches: list[int], amp: str, sizes: dict, steps: int, device: torch.device) -> dict:
    """Of the first batch that fits, what `eval.py bench` measures, and more. TFLOP/s: of padding too."""
    for batch in batches:
        model = inputs = loss = optimizer = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            model, inputs, loss, optimizer = prepared(task, batch, sizes, device)
            flops = step_flops(model, inputs, 1 if task == "ast" else batch, batch)
            quicken(model, inputs, sizes, amp)
            taken = [evaluation.timed_step(model, inputs, loss, optimizer, amp) for _ in range(3 + steps)]
        except torch.OutOfMemoryError:
            print(f"{task}: a batch of {batch} does not fit")
            continue
        seconds, peak = statistics.median(taken[3:]), peak_memory(device)
        waits = max(0.0, 1 - busy_seconds(model, inputs, loss, optimizer, amp) / seconds)
        speed = {"seconds": seconds, "items_per_second": batch / seconds, "tflops": flops / seconds / 1e12}
        return {"batch": batch, "peak": peak, "gpu_waits": waits, "first_seconds": taken[0]} | speed
    raise RuntimeError(f"no batch of {batches} fits")


def prepared(task: str, batch: int, sizes: dict, device: torch.device) -> tuple:
    """A network, its inputs, its loss, the trainers' optimizer. An AST is made on its device: there its start
    values take no seconds."""
    torch.manual_seed(7)
    own = {name: size for name, size in sizes.items() if name not in OURS}
    with device if task == "ast" else contextlib.nullcontext():
        model, inputs, loss = evaluation.BENCHES[task][0](own, batch, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    return model, inputs, loss, optimizer


def quicken(model: torch.nn.Module, inputs: tuple, sizes: dict, amp: str) -> None:
    """compile, graph: as ROWS says. A graph holds the passes of a GRU of one direction for one size."""
    if sizes.get("compile"):
        for block in [*model.blocks, *(model.decoder or ())]:  # alike: compiled once
            block.compile(dynamic=False)
    if sizes.get("graph"):
        gru, seen = model.gru_decoder, []
        hook = gru.register_forward_pre_hook(lambda _, given: seen.append(torch.randn_like(given[0])))
        with torch.autocast("cuda", AMP_TYPES.get(amp), enabled=amp != "off", cache_enabled=False):
            model(*inputs)
            hook.remove()
            torch.cuda.make_graphed_callables(gru, (seen[0].requires_grad_(),))
        replay = gru.forward
        gru.forward = lambda x, first: replay(x)


def step_flops(model: torch.nn.Module, inputs: tuple, counted: int, batch: int) -> int:
    """Of a training step on `batch` items, three times a forward pass's, counted on the first `counted`."""
    if counted < batch:
        inputs = tuple(part if part is None else part[:counted] for part in inputs)
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
