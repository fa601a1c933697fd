"""Compare time, memory and bandwidth of losses, forward and backward, on a GPU if there is one.

python benchmarks/kernels.py --quick             # ten cases, three losses, each kernel; under three minutes on a GPU
python benchmarks/kernels.py                     # every case and loss; writes benchmarks/results/kernels-<device>.md
python benchmarks/kernels.py --classes 19 --strides 1 --dtypes float32 --repeats 3 --output ""

Needs torch and mcseg; segmentation-models-pytorch is optional, for its Lovasz and Dice. A case is a number of classes, a
size, a stride, a dtype and a memory format. Networks return logits at 1/stride of the size; for losses that do not upsample,
the time includes a bilinear interpolation. Labels are maps with regions of some 32 pixels, one in ten of which is void. Each
loss of mcseg is first compared with the reference in float64 on a small input. `limit` is the time to read the logits twice
and write the gradient once at the speed of a copy on the device. A second table is about metrics: predictions and confusion
counts, which must be equal up to ties of interpolated logits. On the CPU each memory peak is measured in a new process,
since the peak of a process never decreases; cases with more than 4e7 logits at full size are left out.

On the CPU the ratio to cross entropy depends on the process: cross entropy allocates more memory, which is fast if earlier
calls have freed some. 2x19x512x1024 on two cores of an Intel Xeon: 77 and 180 ms here, 125 and 190 ms in a new process.
Inductor, given forward and gradient as two functions that read the logits once each, takes 149 ms there, and the fused loss
186 ms. It needs 11 s to compile and parallelises over images only, so it is not used.

Theoretical traffic of the kernels in `mcseg.kernels.gpu`, for b bytes per logit, C classes and P pixels: up to 24 classes
forward reads b C P bytes and 8 P of labels; backward reads the same and writes b C P. With more classes the passes after the
first read from the cache; forward writes 16 P (10 P for soft counts), and backward reads them. With channels-last logits of
more than 16 bytes per pixel, copies to and from contiguous memory add 4 b C P. With upsampling, a class of a pixel is
evaluated twice forward, and twice (soft counts: three times) backward; margin losses keep 16 P bytes, soft counts 22 P.
"""

import argparse
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels import Upsampling, confusion_counts, predicted_classes
from mcseg.losses import DiceLoss, margin_calibration_loss
from mcseg.margins import MarginOffsets, margin_offsets

Loss = Callable[[Tensor, Tensor], Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"cuda": [(16, 512, 512), (4, 1024, 2048)], "cpu": [(2, 512, 1024), (1, 256, 256)]}
LARGEST = {"cuda": float("inf"), "cpu": 4e7}
IGNORE_INDEX = 255


@dataclass(frozen=True)
class Case:
    """Case to measure: logits (batch, classes, height / stride, width / stride) of one dtype."""

    classes: int
    size: tuple[int, int, int]
    stride: int
    dtype: torch.dtype
    channels_last: bool = False

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Draw logits and labels; one in ten pixels is void."""
        batch, height, width = self.size
        generator = torch.Generator(DEVICE).manual_seed(0)
        shape = (batch, self.classes, height // self.stride, width // self.stride)
        logits = torch.randn(shape, generator=generator, device=DEVICE).mul_(3).to(self.dtype)
        if self.channels_last:
            logits = logits.to(memory_format=torch.channels_last)
        return logits.requires_grad_(), self._labels(generator)

    def _labels(self, generator: torch.Generator) -> Tensor:
        """Draw regions with curved borders: the cells of a grid, seen through a smooth displacement."""
        batch, height, width = self.size
        cell = 32
        cells = (batch, height // cell + 2, width // cell + 2)
        labels = torch.randint(self.classes, cells, generator=generator, device=DEVICE)
        labels = labels.masked_fill(torch.rand(cells, generator=generator, device=DEVICE) < 0.1, self.ignore_index)
        waves = torch.randn(batch, 2, height // 16 + 1, width // 16 + 1, generator=generator, device=DEVICE)
        shift = F.interpolate(waves, (height, width), mode="bilinear").mul_(cell / 4)
        rows = torch.arange(height, device=DEVICE).view(1, -1, 1) + shift[:, 0]
        columns = torch.arange(width, device=DEVICE) + shift[:, 1]
        rows, columns = ((at / cell).long().clamp_(0, count - 1) for at, count in ((rows, cells[1]), (columns, cells[2])))
        return labels[torch.arange(batch, device=DEVICE).view(-1, 1, 1), rows, columns]

    @property
    def ignore_index(self) -> int:
        """Label of void pixels; -1 if 255 is a class."""
        return -1 if self.classes > IGNORE_INDEX else IGNORE_INDEX

    def __str__(self) -> str:
        size = " x ".join(map(str, self.size))
        layout = ", channels last" if self.channels_last else ""
        return f"{self.classes} classes, {size}, stride {self.stride}, {str(self.dtype).removeprefix('torch.')}{layout}"


def plain_autograd_loss(logits: Tensor, target: Tensor, offsets: MarginOffsets) -> Tensor:
    """Compute the paper's loss in the usual way: pixels as rows, void rows dropped, one-hot labels, gradient by autograd."""
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


def contestants(case: Case, quick: bool = False) -> dict[str, tuple[Loss, Loss | None]]:
    """Return each loss by name, with the reference that it should equal; with ``quick`` cross entropy and ours alone."""
    classes = case.classes
    pixels = [10.0 ** (8 - 4 * i / classes) for i in range(classes)]
    offsets = margin_offsets(pixels, "miou")
    offsets = type(offsets)(*(part.to(DEVICE) for part in offsets))

    def up(loss: Loss) -> Loss:
        if case.stride == 1:
            return loss
        return lambda z, y: loss(F.interpolate(z, y.shape[-2:], mode="bilinear", align_corners=True), y)

    def margin(backend: str, upsample: bool = False) -> Loss:
        return lambda z, y: margin_calibration_loss(z, y, offsets, backend=backend, upsample=upsample)

    def power(backend: str, upsample: bool = False) -> Loss:
        loss = DiceLoss(power=0.5, classes="all", backend=backend)
        return lambda z, y: loss(z, y, upsample)

    def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, ignore_index=IGNORE_INDEX)

    def plain(z: Tensor, y: Tensor) -> Tensor:
        return plain_autograd_loss(z.float(), y, offsets)

    fast = "triton" if DEVICE == "cuda" else "fused"
    compiled: Callable[[Loss], Loss] = torch.compile
    losses: dict[str, tuple[Loss, Loss | None]] = {
        "cross entropy": (up(cross_entropy), None),
        "cross entropy, compiled": (compiled(up(cross_entropy)), None),
        "plain formulation of the paper": (up(plain), up(margin("reference"))),
        "plain formulation, compiled": (compiled(up(plain)), up(margin("reference"))),
        "margin calibration, reference": (up(margin("reference")), None),
        f"margin calibration, {fast}": (up(margin(fast)), up(margin("reference"))),
        "soft Dice": (up(DiceLoss(classes="all")), None),
        f"power Dice, {fast}": (up(power(fast)), up(power("reference"))),
    }
    if case.stride > 1:
        losses[f"margin calibration, {fast}, fused upsampling"] = (margin(fast, True), up(margin("reference")))
        losses[f"power Dice, {fast}, fused upsampling"] = (power(fast, True), up(power("reference")))
    if quick:
        ours = fast if case.stride == 1 else "fused upsampling"
        return {name: loss for name, loss in losses.items() if name == "cross entropy" or name.endswith(f", {ours}")}
    try:
        from segmentation_models_pytorch import losses as smp
    except ImportError:
        return losses
    lovasz = smp.LovaszLoss(mode="multiclass", ignore_index=IGNORE_INDEX)
    losses["Lovász softmax (SMP)"] = (up(lambda z, y: lovasz(z.float(), y)), None)  # it refuses bfloat16
    losses["Dice (SMP)"] = (up(smp.DiceLoss(mode="multiclass", ignore_index=IGNORE_INDEX)), None)
    return losses


def difference(case: Case, loss: Loss, reference: Loss) -> float:
    """Return the largest difference of the gradient from the reference's in float64, relative to its largest value."""
    small = replace(case, size=(2, 4 * case.stride, 6 * case.stride))
    gradients = []
    for function, dtype in ((loss, case.dtype), (reference, torch.float64)):
        logits, target = small.inputs()
        logits = logits.detach().to(dtype).requires_grad_()
        function(logits, target).backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        gradients.append(logits.grad.double())
    return float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max())


def seconds(run: Callable[[], object]) -> float:
    """Time one call on the device."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def step(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """Run forward and backward once and discard the gradient."""
    loss(logits, target).backward()  # type: ignore[no-untyped-call]
    logits.grad = None


def peak(run: Callable[[], None]) -> int:
    """Return the bytes by which a call raises the peak memory."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = peak_resident()
    run()
    return peak_resident() - before


def peak_resident() -> int:
    """Return the peak resident memory of this process in bytes (Linux); getrusage() may report the parent's."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(match[1]) if match else 0


def peak_of(name: str, case: Case) -> float:
    """Return the peak memory of a loss beyond the logits, in multiples of their size; on the CPU from a new process."""
    if DEVICE == "cpu":
        command = [sys.executable, __file__, "--peak-of", name, "--threads", str(torch.get_num_threads())]
        command += ["--case", *map(str, (case.classes, *case.size, case.stride, int(case.channels_last)))]
        command += [str(case.dtype).removeprefix("torch.")]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peak_here(name, case)


def peak_here(name: str, case: Case) -> float:
    """Measure ``peak_of`` in this process."""
    loss, _ = contestants(case)[name]
    small = replace(case, size=(1, 8 * case.stride, 8 * case.stride)).inputs()
    step(loss, *small)  # load code and start threads before the measurement
    logits, target = case.inputs()
    return peak(lambda: step(loss, logits, target)) / logits.nbytes


def measure(case: Case, repeats: int, quick: bool) -> Iterator[str]:
    """Yield the table of one case: median of interleaved repeats, peak memory beyond the logits, and each kernel's time."""
    losses = contestants(case, quick)
    times: dict[str, list[float]] = {name: [] for name in losses}
    memory, wrong = dict.fromkeys(losses, "-"), dict.fromkeys(losses, "-")
    failed: dict[str, str] = {}
    for name, (loss, reference) in losses.items():
        try:
            if reference is not None:
                wrong[name] = f"{difference(case, loss, reference):.0e}"
            if "compiled" not in name or DEVICE == "cuda":  # on the CPU this would measure the compiler's memory
                memory[name] = f"{peak_of(name, case):.2f}"
        except Exception as error:  # a missing compiler or too little memory is a result as well
            failed[name] = type(error).__name__
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    logits, target = case.inputs()
    for name, (loss, _) in losses.items():
        if name not in failed:
            step(loss, logits, target)  # warm-up
    source, copy = logits.detach(), torch.empty_like(logits)
    copies = []
    for _ in range(repeats):
        copies.append(seconds(lambda: copy.copy_(source)))
        for name, (loss, _) in losses.items():
            if name not in failed:
                times[name].append(seconds(lambda loss=loss: step(loss, logits, target)))  # type: ignore[misc]
    full = logits.nbytes * case.stride**2
    limit = 3 * full * statistics.median(copies) / (2 * logits.nbytes)
    base = statistics.median(times["cross entropy"])
    yield f"A copy moves {2 * logits.nbytes / statistics.median(copies) / 1e9:.0f} GB/s; limit {1000 * limit:.3g} ms."
    yield ""
    yield "| loss | ms | x cross entropy | extra | limit / ms | difference |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name in losses:
        if name in failed:
            yield f"| {name} | {failed[name]} | - | - | - | - |"
            continue
        median = statistics.median(times[name])
        numbers = f"{1000 * median:.3g} | {median / base:.2f} | {memory[name]} | {limit / median:.0%}"
        yield f"| {name} | {numbers} | {wrong[name]} |"
    if DEVICE == "cuda":
        yield from kernels(losses, logits, target)


def kernels(losses: dict[str, tuple[Loss, Loss | None]], logits: Tensor, target: Tensor) -> Iterator[str]:
    """Yield the time of each kernel that our losses launch, from the profiler."""
    from torch.profiler import ProfilerActivity, profile

    yield from ("", "| loss | kernel | ms |", "|---|---|---:|")
    for name, (loss, _) in losses.items():
        if "triton" not in name:
            continue
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step(loss, logits, target)
        for event in profiler.key_averages():
            if event.self_device_time_total >= 5:
                yield f"| {name} | {event.key[:60].replace('|', ' ')} | {event.self_device_time_total / 1000:.3f} |"


def measure_counts(case: Case, repeats: int) -> Iterator[str]:
    """Yield the rows of one case: predictions and confusion counts from logits, and from labels alone."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    logits, target = case.inputs()
    logits = logits.detach()
    classes, void = case.classes, case.ignore_index
    up = Upsampling(*case.size[1:]) if case.stride > 1 else None
    preds = predicted_classes(logits, case.size[1:], up)

    def full(z: Tensor = logits) -> Tensor:
        if case.stride == 1:
            return z
        return F.interpolate(z, case.size[1:], mode="bilinear", align_corners=True)

    def bincount(predicted: Tensor) -> Tensor:
        cell = torch.where(target == void, classes * classes, target * classes + predicted)
        return torch.bincount(cell.flatten(), minlength=classes * classes + 1)[:-1].view(classes, classes)

    ways = {
        "argmax and bincount": lambda: bincount(full().argmax(1)),
        "torchmetrics": lambda: multiclass_confusion_matrix(full(), target, classes, ignore_index=void, validate_args=False),
        "ours": lambda: confusion_counts(predicted_classes(full()), target, classes, void)[0],
    }
    if up is not None:
        ways["ours, from coarse logits"] = lambda: confusion_counts(
            predicted_classes(logits, case.size[1:], up), target, classes, void
        )[0]
    ways["labels alone: bincount"] = lambda: bincount(preds)
    ways["labels alone: ours"] = lambda: confusion_counts(preds, target, classes, void)[0]
    # logits that are interpolated in bfloat16 have ties, which are no errors of the counts
    expected = {False: ways["argmax and bincount"](), True: bincount(full(logits.float()).argmax(1))}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(seconds(way))
    base = statistics.median(times["argmax and bincount"])
    for name, way in ways.items():
        from_coarse = up is not None and ("coarse" in name or "labels" in name)
        moved = int((way() - expected[from_coarse]).abs().sum()) / 2 / target.numel()
        if moved > 1e-5:
            raise AssertionError(f"{name}: {moved:.1e} of the pixels are in another cell, expected at most 1e-5")
        median = statistics.median(times[name])
        yield f"| {name} | {1000 * median:.2f} | {median / base:.2f} |"


def machine() -> str:
    """Describe the device, the versions and the commit."""
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    packages = []
    for package in ("torch", "triton", "segmentation-models-pytorch"):
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            packages.append(f"no {package}")
    return f"{name}. Python {platform.python_version()}, {', '.join(packages)}. Commit {commit}."


# classes, stride, dtype, channels last
QUICK = [
    (2, 1, "bfloat16", False),
    (19, 1, "bfloat16", False),
    (19, 1, "bfloat16", True),
    (19, 1, "float32", False),
    (150, 1, "bfloat16", False),
    (150, 1, "bfloat16", True),
    (19, 4, "bfloat16", True),
    (150, 4, "bfloat16", True),
    (19, 8, "bfloat16", True),
    (150, 8, "bfloat16", True),
]


def main() -> None:
    """Measure all cases, print the tables and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [2, 19, 65, 150, 171] if DEVICE == "cuda" else [2, 19, 150]
    parser.add_argument("--quick", action="store_true", help="ten cases; cross entropy and the losses of mcseg")
    parser.add_argument("--classes", type=int, nargs="+", default=default)
    parser.add_argument("--strides", type=int, nargs="+", default=[1, 4, 8] if DEVICE == "cuda" else [1, 4])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"] if DEVICE == "cuda" else ["float32"])
    parser.add_argument("--repeats", type=int, default=20 if DEVICE == "cuda" else 7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", nargs=7, help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", default=str(Path(__file__).parent / "results" / f"kernels-{DEVICE}.md"), help='"" for none'
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        classes, batch, height, width, stride, last = map(int, arguments.case[:6])
        dtype = getattr(torch, arguments.case[6])
        print(peak_here(arguments.peak_of, Case(classes, (batch, height, width), stride, dtype, bool(last))))
        return
    settings = (
        QUICK
        if arguments.quick
        else [
            (classes, stride, dtype, last)
            for classes in arguments.classes
            for stride in arguments.strides
            for dtype in arguments.dtypes
            for last in (False, True)
        ]
    )
    lines = ["# Losses, forward and backward", "", machine(), ""]
    lines += [
        "Time in ms and relative to cross entropy; *extra*: peak memory beyond the logits, in multiples of their size;",
        "*limit / ms*: share of the speed of a copy; *difference*: largest difference of the gradient from the reference in",
        "float64, relative to the largest gradient.",
    ]
    print("\n".join(lines), flush=True)
    begin = time.perf_counter()
    for size in SIZES[DEVICE][: 1 if arguments.quick else None]:
        for classes, stride, dtype, last in settings:
            case = Case(classes, size, stride, getattr(torch, dtype), last)
            if classes * math.prod(size) > LARGEST[DEVICE]:
                continue
            torch.compiler.reset()
            part = ["", f"## {case}", "", *measure(case, arguments.repeats, arguments.quick)]
            if not last:
                part += ["", "| counts | ms | x argmax and bincount |", "|---|---:|---:|"]
                part += measure_counts(case, arguments.repeats)
            print("\n".join(part), flush=True)
            lines += part
            if arguments.output:  # after each case, to keep the results of a run that is stopped
                Path(arguments.output).write_text("\n".join(lines) + "\n")
    print(f"\n{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
