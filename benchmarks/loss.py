"""Speed and memory of the margin-calibration loss on the CPU, beside cross entropy and other losses.

python benchmarks/loss.py                      # 2 x 19 x 512 x 1024, writes benchmarks/results/loss-cpu.md
python benchmarks/loss.py --size 256 256 --repeats 3 --output ""
"""

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import LovaszLoss
from torch import Tensor

from mcseg.losses import DiceLoss, MarginCalibrationLoss, margin_calibration_loss
from mcseg.margins import MarginOffsets, margin_offsets

IGNORE_INDEX = 255
Loss = Callable[[Tensor, Tensor], Tensor]


def plain_autograd_loss(logits: Tensor, target: Tensor, offsets: MarginOffsets) -> Tensor:
    """Write the same loss the usual way: pixels as rows, void rows dropped, one-hot labels, autograd for the rest."""
    num_classes = logits.shape[1]
    pixels = logits.movedim(1, -1).reshape(-1, num_classes)  # (N H W, C)
    labels = target.reshape(-1)
    valid = labels != IGNORE_INDEX
    pixels, labels = pixels[valid], labels[valid]  # (P, C), (P,)
    positive = F.one_hot(labels, num_classes).bool()
    top, winner = pixels.max(dim=1, keepdim=True)
    is_top = F.one_hot(winner.squeeze(1), num_classes).bool()
    runner_up = pixels.masked_fill(is_top, -torch.inf).max(dim=1, keepdim=True).values
    margin = torch.where(is_top, pixels - runner_up, pixels - top)
    foreground, background = offsets.foreground.to(logits.dtype), offsets.background.to(logits.dtype)
    terms = torch.where(positive, num_classes * F.softplus(foreground - margin), F.softplus(background + margin))  # (P, C)
    return terms.mean()


def contestants(num_classes: int) -> dict[str, Loss]:
    """Return every loss by the name that the table shows."""
    offsets = margin_offsets([10.0 ** (8 - 4 * i / num_classes) for i in range(num_classes)], "miou")
    lovasz = LovaszLoss(mode="multiclass", ignore_index=IGNORE_INDEX)
    return {
        "cross entropy (`F.cross_entropy`)": lambda z, y: F.cross_entropy(z, y, ignore_index=IGNORE_INDEX),
        "margin calibration, `fused`": lambda z, y: margin_calibration_loss(z, y, offsets, backend="fused"),
        "margin calibration, `reference`": lambda z, y: margin_calibration_loss(z, y, offsets, backend="reference"),
        "margin calibration, plain autograd": lambda z, y: plain_autograd_loss(z, y, offsets),
        "soft Dice": DiceLoss(classes="all"),
        "power Dice": MarginCalibrationLoss(
            num_classes, "none", margin="soft", surrogate="sigmoid", aggregation="dice", classes="all", power=0.5
        ).calibrate([1] * num_classes),
        "Lovász softmax (SMP)": lovasz,
    }


def inputs(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Draw logits and labels; one pixel in ten is void."""
    torch.manual_seed(0)
    batch, num_classes, height, width = shape
    logits = torch.randn(shape).mul_(3).requires_grad_()
    target = torch.randint(num_classes, (batch, height, width))
    return logits, target.masked_fill_(torch.rand(batch, height, width) < 0.1, IGNORE_INDEX)


def step(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """Run forward and backward once and drop the gradient."""
    loss(logits, target).backward()  # type: ignore[no-untyped-call]
    logits.grad = None


def time_all(shape: tuple[int, int, int, int], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of a step; rounds are interleaved, so that a slow minute slows all."""
    logits, target = inputs(shape)
    losses = contestants(shape[1])
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for loss in losses.values():
        step(loss, logits, target)  # warm-up
    for _ in range(repeats):
        for name, loss in losses.items():
            start = time.perf_counter()
            step(loss, logits, target)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def peak_in_this_process(name: str, shape: tuple[int, int, int, int]) -> float:
    """Return how far one step raises the resident memory, in multiples of the logits' bytes."""
    loss = contestants(shape[1])[name]
    small = inputs((1, shape[1], 8, 8))
    step(loss, *small)  # code and thread pools are loaded before measuring
    logits, target = inputs(shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(loss, logits, target)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) * 1024 / (logits.numel() * logits.element_size())


def peak(name: str, arguments: argparse.Namespace) -> float:
    """Measure `peak_in_this_process` in a fresh one: the high-water mark of a process never falls.

    A child starts with the mark of its parent, so this comes before the parent allocates anything large.
    """
    command = [sys.executable, __file__, "--peak-of", name, "--size", *map(str, arguments.size)]
    command += ["--batch", str(arguments.batch), "--classes", str(arguments.classes)]
    command += ["--threads", str(arguments.threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def machine(arguments: argparse.Namespace) -> str:
    """Describe what the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("mcseg", "torch", "segmentation-models-pytorch"))
    return (
        f"CPU: {models[0] if models else platform.machine()}, {arguments.threads} threads. Python "
        f"{platform.python_version()}, {packages}. Commit {commit}."
    )


def report(arguments: argparse.Namespace) -> str:
    """Measure everything and return the report in Markdown."""
    shape = (arguments.batch, arguments.classes, *arguments.size)
    extra = {name: peak(name, arguments) for name in contestants(arguments.classes)}
    milliseconds = time_all(shape, arguments.repeats)
    base = next(iter(milliseconds.values()))
    rows = [
        f"| {name} | {ms:.0f} | {ms / base:.2f} | {extra[name]:.1f} | {extra[name] + 1:.1f} |"
        for name, ms in milliseconds.items()
    ]
    sizes = " x ".join(map(str, shape))
    return "\n".join(
        [
            "# Loss on the CPU: forward and backward",
            "",
            f"Logits {sizes} float32, one pixel in ten void; median of {arguments.repeats} interleaved repeats.",
            "Peak memory in multiples of the logits' bytes: `extra` is what one forward and backward adds to the",
            "resident set, gradient of the logits included; `total` counts the logits too. Each in a fresh process.",
            "",
            "| loss | ms | x cross entropy | extra | total |",
            "|---|---:|---:|---:|---:|",
            *rows,
            "",
            machine(arguments),
            "",
        ]
    )


def main() -> None:
    """Print the table, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "loss-cpu.md"), help='"" for none')
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print(peak_in_this_process(arguments.peak_of, (arguments.batch, arguments.classes, *arguments.size)))
        return
    text = report(arguments)
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text)


if __name__ == "__main__":
    main()
