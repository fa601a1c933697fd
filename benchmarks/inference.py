"""Measure time and memory of whole-image inference on large images.

python benchmarks/inference.py                      # 6000x4000, 19 classes, windows of 768x768, three scales and mirroring
python benchmarks/inference.py --size 4000 6000 --window 512 512 --scales 1 --no-flip

Memory is the growth of the process's peak resident size since before the image was created. It includes the image, the
labels, and code that the libraries load at the first call. CPU only.
"""

import argparse
import time

import torch
from kernels import peak_resident

from mcseg.evaluation.inference import Inference
from mcseg.networks import SegmentationNetwork


def main() -> None:
    """Label one image of random pixels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[4000, 6000], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--window", type=int, nargs=2, default=[768, 768], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--overlap", type=float, default=0.0)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 1.0, 1.5])
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--arch", default="deeplabv3plus")
    parser.add_argument("--encoder", default="resnet18")
    options = parser.parse_args()

    network = SegmentationNetwork(options.arch, options.encoder, options.classes).eval()
    window = (options.window[0], options.window[1])
    inference = Inference(window, overlap=options.overlap, scales=tuple(options.scales), flip=options.flip)
    memory_before, start = peak_resident(), time.perf_counter()
    image = torch.randint(0, 256, (1, 3, *options.size), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        labels = inference(network, image, (options.size[0], options.size[1]))
    memory = (peak_resident() - memory_before) / 2**20
    print(
        f"{options.size[1]}x{options.size[0]}, {options.classes} classes, {options.arch} {options.encoder}, {inference}: "
        f"{memory:.0f} MiB, {time.perf_counter() - start:.0f} s, labels of {tuple(labels.shape)}"
    )


if __name__ == "__main__":
    main()
