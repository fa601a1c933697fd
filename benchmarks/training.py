"""Compare a training step of mcseg with a bare PyTorch loop: images per second, memory, and where the time goes.

python benchmarks/training.py        # two networks; writes benchmarks/results/training-<device>.md
python benchmarks/training.py --networks unet/resnet34 --batch 4 --size 256 256 --blocks 8 --output ""

All contestants train the same network from the same weights on the same batch, which is on the device from the start, in the
same precision and with the same optimiser:

* PyTorch: forward, `F.cross_entropy`, backward, step;
* Lightning: the same as a LightningModule of five lines, with a Trainer without callbacks, logger and progress bar;
* mcseg: what `mcseg fit` runs, with its callbacks, logger and progress bar; with PyTorch's cross entropy, with the default
  objective, and with the default objective and `--model.compile true`.

Each contestant runs in a process of its own. The processes take turns, a block of steps each, so that a change of the
machine's speed meets all of them. `ratio` is the median over the blocks of a contestant's time divided by that of PyTorch in
the same round; the numbers in brackets are the quartiles. `first` is the time of the first step, in which code is compiled.
Peak memory is that of the allocator on a GPU, and otherwise the resident size of the process. On the CPU, freed memory stays
with the process (glibc): returning it to the system and asking for it again took up to 10 % of a step, by chance.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from kernels import machine, peak_resident
from torch import Tensor, nn

from mcseg.data import SegmentationData
from mcseg.data.classlist import table_from_names
from mcseg.networks import SegmentationNetwork
from mcseg.run.cli import SegmentationCLI

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASSES = 19
Settings = dict[str, Any]  # the command's options, and the network's architecture and encoder


class Turns:
    """A batch, again and again; runs a block of steps, reports its time, and waits for the next turn.

    Iterating over it is the loader of a training loop. The other end of the connection sends the number of steps of a block
    and receives its seconds; 0 steps end the iteration.
    """

    def __init__(self, batch: dict[str, Any], connection: Connection) -> None:
        self.batch, self.connection = batch, connection

    def __len__(self) -> int:
        return 10**6  # the loop ends earlier, and a known length keeps Lightning from fetching ahead

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while steps := self.connection.recv():
            start = _now()
            for _ in range(steps):
                yield dict(self.batch)
            self.connection.send(_now() - start)
        self.connection.send(_peak())


def _now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak() -> int:
    """Return the peak memory in bytes: of the allocator on a GPU, otherwise the resident size."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_resident()


def draw_batch(settings: Settings) -> dict[str, Any]:
    """Draw images ``(N, 3, H, W)`` uint8 and masks ``(N, H, W)`` int64 in squares of 32 pixels, one in ten of them void."""
    generator = torch.Generator().manual_seed(0)
    number, (height, width) = settings["batch"], settings["size"]
    image = torch.randint(0, 256, (number, 3, height, width), generator=generator, dtype=torch.uint8)
    cells = torch.randint(0, CLASSES, (number, height // 32 + 1, width // 32 + 1), generator=generator)
    cells = cells.masked_fill(torch.rand(cells.shape, generator=generator) < 0.1, 255)
    mask = cells.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :height, :width].contiguous()
    return {"image": image.to(DEVICE), "mask": mask.to(DEVICE), "name": [str(index) for index in range(number)]}


class PlainModule(pl.LightningModule):
    """The least that Lightning needs to train a network with cross entropy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Compute the loss."""
        return F.cross_entropy(self.network(batch["image"]), batch["mask"], ignore_index=255)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimiser."""
        return torch.optim.AdamW(self.network.parameters())


class OneBatch(SegmentationData):
    """Data of one batch for mcseg's command, whose loader is `Turns`."""

    turns: Turns  # set before the command creates the data

    def __init__(self) -> None:
        super().__init__(table_from_names([f"class {index}" for index in range(CLASSES)]))

    def setup(self, stage: str = "fit") -> None:
        """List nothing: there are no files."""

    def class_pixels(self) -> Tensor:
        """Count the labels of the batch."""
        return torch.bincount(self.turns.batch["mask"].flatten().cpu(), minlength=256)[:CLASSES]

    def train_dataloader(self) -> Any:
        """Return the batch in turns."""
        return self.turns


def train_with_pytorch(settings: Settings, turns: Turns) -> None:
    """Train with a bare loop."""
    network = SegmentationNetwork(settings["arch"], settings["encoder"], CLASSES).to(DEVICE).train()
    optimizer = torch.optim.AdamW(network.parameters())
    for batch in turns:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=settings["precision"] == "bf16-mixed"):
            loss = F.cross_entropy(network(batch["image"]), batch["mask"], ignore_index=255)
        optimizer.zero_grad()  # here, as in Lightning; before the forward pass, the same step was 8 % slower on a CPU
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def train_with_lightning(settings: Settings, turns: Turns) -> None:
    """Train with a plain module and Trainer."""
    trainer = pl.Trainer(
        accelerator=DEVICE,
        devices=1,
        max_epochs=1,
        precision=settings["precision"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(PlainModule(SegmentationNetwork(settings["arch"], settings["encoder"], CLASSES)), turns)


def train_with_mcseg(settings: Settings, turns: Turns) -> None:
    """Train with the command ``mcseg fit``."""
    OneBatch.turns = turns
    with tempfile.TemporaryDirectory() as folder:
        words = (
            f"--model.arch {settings['arch']} --model.encoder {settings['encoder']} --data {__name__}.OneBatch "
            f"--trainer.accelerator {DEVICE} --trainer.devices 1 --trainer.precision {settings['precision']} "
            f"--trainer.max_epochs 1 --trainer.limit_val_batches 0 --trainer.default_root_dir {folder} {settings['words']}"
        )
        SegmentationCLI("benchmark", ["fit", *words.split()])


CROSS_ENTROPY = "--model.objective torch.nn.CrossEntropyLoss --model.objective.init_args.ignore_index 255"
CONTESTANTS = {
    "PyTorch, cross entropy": (train_with_pytorch, ""),
    "Lightning, cross entropy": (train_with_lightning, ""),
    "mcseg, cross entropy": (train_with_mcseg, CROSS_ENTROPY),
    "mcseg, default objective": (train_with_mcseg, ""),
    "mcseg, default objective, compiled": (train_with_mcseg, "--model.compile true"),
}


def contestant(name: str, settings: Settings, connection: Connection) -> None:
    """Train in this process, in turns."""
    torch.manual_seed(0)
    torch.set_num_threads(settings["threads"])
    train, words = CONTESTANTS[name]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # the progress bars
        train({**settings, "words": words}, Turns(draw_batch(settings), connection))


def measure(settings: Settings, blocks: int, steps: int) -> Iterator[str]:
    """Yield the table of one network."""
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with contextlib.ExitStack() as stack:
        for name in CONTESTANTS:
            ends[name], other = context.Pipe()
            process = context.Process(target=contestant, args=(name, settings, other), daemon=True)
            process.start()
            stack.callback(process.kill)  # Lightning would handle SIGTERM
            other.close()  # so that the end of the process ends the connection
            first[name] = _turn(ends[name], 1)
            _turn(ends[name], 3)  # warm-up
        for block in range(blocks):
            for name in reversed(CONTESTANTS) if block % 2 else CONTESTANTS:
                times[name].append(_turn(ends[name], steps) / steps)
        memory = {name: _turn(end, 0) for name, end in ends.items()}
    base = times["PyTorch, cross entropy"]
    yield "| training step | ms | images / s | ratio | peak MiB | first s |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, own in times.items():
        ratios = [one / other for one, other in zip(own, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        median = statistics.median(own)
        yield (
            f"| {name} | {1000 * median:.4g} | {settings['batch'] / median:.3g} | {middle:.3f} [{low:.3f}, {high:.3f}] | "
            f"{memory[name] / 2**20:.0f} | {first[name]:.1f} |"
        )

    def cost(name: str, other: str) -> str:
        return f"{statistics.median(a / b - 1 for a, b in zip(times[name], times[other], strict=True)):+.1%}"

    yield ""
    yield (
        f"Lightning alone {cost('Lightning, cross entropy', 'PyTorch, cross entropy')}, with mcseg's module and callbacks "
        f"{cost('mcseg, cross entropy', 'PyTorch, cross entropy')} beyond the bare loop; the default objective "
        f"{cost('mcseg, default objective', 'mcseg, cross entropy')} beyond cross entropy; compilation "
        f"{cost('mcseg, default objective, compiled', 'mcseg, default objective')}."
    )


def _turn(end: Connection, steps: int) -> float:
    """Let a process run a block of steps; return its seconds, or for 0 steps the peak memory."""
    end.send(steps)
    try:
        return float(end.recv())
    except EOFError:
        raise SystemExit("a process has ended; its error is above") from None


def main() -> None:
    """Measure all networks, print the tables and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = DEVICE == "cuda"
    parser.add_argument("--networks", nargs="+", default=["unet/resnet34", "deeplabv3plus/resnet50"])
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 4)
    parser.add_argument("--size", type=int, nargs=2, default=[512, 512] if on_gpu else [256, 256])
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed")
    parser.add_argument("--blocks", type=int, default=20 if on_gpu else 10)
    parser.add_argument("--steps", type=int, default=10 if on_gpu else 2, help="steps of a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--output", default=str(Path(__file__).parent / "results" / f"training-{DEVICE}.md"), help='"" for none'
    )
    options = parser.parse_args()
    # of the contestants: keep freed memory, and compile anew
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    lines = ["# A training step", "", machine(), ""]
    lines += [
        f"Batch {options.batch}, {options.size[0]} x {options.size[1]} pixels, {CLASSES} classes, {options.precision}, "
        f"{options.blocks} blocks of {options.steps} steps. Columns: see `benchmarks/training.py`."
    ]
    print("\n".join(lines), flush=True)
    for network in options.networks:
        arch, encoder = network.split("/")
        settings = {"arch": arch, "encoder": encoder, **vars(options)}
        lines += ["", f"## {network}", ""]
        print(f"\n## {network}\n", flush=True)
        for line in measure(settings, options.blocks, options.steps):
            print(line, flush=True)
            lines.append(line)
    if options.output:
        Path(options.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
