"""Networks and trainers on a CUDA card. GPU_TESTS_ON=cpu: the same code without one (tests/gpu.sh --toy)."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_train import CASES, TRAINERS, command, last, resume, spoil_steps, write_corpus
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
from models import from_main

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # what CUDA's libraries warn of differs from card to card
]
DECODER = {"hidden": 32, "layers": 2, "dropout": 0, "input_dropout": 0}
AST = {"width": 64, "depth": 2, "heads": 2, "frames": 128, "dropout": 0}
NETWORKS = {
    "han": ("han", {"size": 16, "heads": 4, "dropout": 0}),
    "decoder": ("decoder", DECODER),
    "decoder both ways": ("decoder", DECODER | {"bidirectional": True, "layer_norm": True}),
    "ast": ("ast", AST),
    "ast visible only": ("ast", AST | {"visible_only": True}),
}
each_network = pytest.mark.parametrize("name", NETWORKS)
JOBS = [(name, "") for name in TRAINERS] + [("pretrain_ast", "--task pretrain --visible-only")]
each_job = pytest.mark.parametrize(("name", "job"), JOBS)


def moved(tree: object, device: str) -> object:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: moved(value, device) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(moved(value, device) for value in tree)
    return tree


def gradient(name: str, device: str, dtype=torch.float32, wrap=lambda model: model) -> Tensor:
    """All gradients of a step on made-up data, the same on every device; the loss is computed on the CPU."""
    torch.manual_seed(7)
    task, sizes = NETWORKS[name]
    model, inputs, loss = evaluation.BENCHES[task][0](sizes, 3, torch.device("cpu"))
    wrapped = wrap(model.to(device).train())
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        output = wrapped(*moved(inputs, device))
    loss(moved(output, "cpu")).backward()
    parts = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    return torch.cat(parts)


def apart(a: Tensor, b: Tensor, unit: Tensor | None = None) -> float:
    """Distance of two vectors over the length of a third, or of the second."""
    return float((a - b).norm() / (b if unit is None else unit).norm())


def weights(folder: str) -> Tensor:
    return torch.cat([value.flatten().double().cpu() for value in last(folder)["model"].values()])


@pytest.fixture(autouse=True)
def _float32():
    """A trainer turns TF32 on for its process; the tests after it, in other files too, want none."""
    yield
    torch.set_float32_matmul_precision("highest")


corpus = pytest.fixture(scope="module")(write_corpus)


@pytest.fixture
def run(corpus, tmp_path):
    """Call a trainer on the device with small settings and further options; returns its final metrics."""

    def call(name, *options):
        argv = command(name, corpus, tmp_path / "runs", *options, f"--device {DEVICE}")
        return TRAINERS[name].main(TRAINERS[name].parse_args(argv))

    return call


# ---------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------
@each_network
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.1)]
)
def test_gradients_agree_with_the_cpu(name, dtype, close, monkeypatch):
    """Packed windows of the decoder and packed voices of HAN in cuDNN, too."""
    if DEVICE == "cpu" and dtype == torch.float16 and name.startswith("decoder"):
        pytest.skip("no float16 GRU on a CPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert apart(gradient(name, DEVICE, dtype), gradient(name, "cpu")) < close


@each_network
def test_one_process_of_ddp_has_the_same_gradients(name, tmp_path):
    expected = gradient(name, DEVICE)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        found = gradient(name, DEVICE, wrap=DistributedDataParallel)
        assert from_main({"valid_loss": 0.5}) == {"valid_loss": 0.5}
    finally:
        dist.destroy_process_group()
    assert apart(found, expected) < 1e-4


# ---------------------------------------------------------------------------------------------------------
# Trainers
# ---------------------------------------------------------------------------------------------------------
@each_job
def test_six_steps_equal_three_and_three(name, job, run):
    """Up to the order of sums in atomic additions; the random states are equal to the bit."""
    if name == "train_decoder":  # cuDNN's dropout between GRU layers has a state that cannot be saved
        job += " --dropout 0 --adam-eps 1e-4"  # 1e-8 blows rounding up
    whole = run(name, job, "--max-steps 6 --name six")["folder"]
    half = run(name, job, "--max-steps 3 --name three")["folder"]
    at_three = weights(half)
    run(name, job, "--max-steps 6", resume(half))
    assert apart(weights(whole), weights(half), weights(whole) - at_three) < 0.05
    for kind in ("cpu", "cuda"):
        a, b = last(whole)["rng"][kind], last(half)["rng"][kind]
        assert (a is None and DEVICE == "cpu") or torch.equal(a, b)


@each_job
def test_nan_steps_leave_the_weights_untouched(name, job, run, monkeypatch):
    folder = run(name, job, "--max-steps 1 --name nan")["folder"]
    before = weights(folder)
    spoil_steps(monkeypatch, name)
    run(name, job, "--max-steps 3", resume(folder))
    assert last(folder)["skipped"] == {"bad": 2, "overflow": 0}
    assert torch.equal(weights(folder), before)


@each_job
def test_fp16_goes_on_after_an_overflow(name, job, run, monkeypatch):
    if (DEVICE, name) == ("cpu", "train_decoder"):
        pytest.skip("no float16 GRU on a CPU")
    scale = partial(torch.amp.GradScaler, init_scale=2.0**60, backoff_factor=2.0**-50)
    monkeypatch.setattr(torch.amp, "GradScaler", scale)
    start = run(name, job, "--amp fp16 --max-steps 1 --name start")["folder"]
    out = run(name, job, "--amp fp16 --max-steps 4 --name fp16")
    assert out["skipped"] == {"bad": 0, "overflow": 1}
    assert last(out["folder"])["scaler"]["scale"] == 2.0**10
    assert weights(out["folder"]).isfinite().all()
    assert apart(weights(out["folder"]), weights(start)) > 1e-5


@pytest.mark.parametrize("name", TRAINERS)
def test_auto_takes_half_precision_and_the_cpu_scores_alike(name, run, corpus):
    out = run(name, "--amp auto --name auto")
    expected = ["bf16", "off"]
    if DEVICE == "cuda":
        expected = ["bf16"] if torch.cuda.get_device_capability() >= (8, 0) else ["fp16"]
        if name != "pretrain_ast":  # recurrent networks, for which cuDNN's autocast may know float16 alone
            expected = ["bf16", "fp16"]
    amp = last(out["folder"])["args"]["amp"]
    assert amp in expected
    scaled = amp == "fp16" or (amp == "bf16" and DEVICE == "cuda" and name != "pretrain_ast")
    assert bool(last(out["folder"])["scaler"]) == scaled
    key, figure = CASES[name].score
    argv = ["--ckpt", str(Path(out["folder"]) / "best.pt"), *corpus(name), "--device", "cpu"]
    assert figure(evaluation.main(argv)) == pytest.approx(out[key], abs=0.02)
