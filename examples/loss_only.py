"""Use only a loss of mcseg, in a training loop of plain PyTorch.

    python examples/loss_only.py

Trains the same small network with three losses and prints the IoU of each class.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mcseg import DiceLoss, MarginCalibrationLoss, SyntheticData, score

# Replace by your own data: drawn street scenes as images (N,3,H,W) and class indices (N,H,W), 255 for unlabelled pixels
data = SyntheticData(val_scenes=64, size=(48, 72))
images, masks = (torch.stack(parts) for parts in zip(*map(data.reader.pair, data.samples("val")), strict=True))
images, masks = images / 255, masks.long()
train = TensorDataset(images[:48], masks[:48])
class_pixels = torch.bincount(masks[:48].flatten(), minlength=256)[: data.num_classes]

losses = {
    "cross entropy": nn.CrossEntropyLoss(ignore_index=255),
    "power Dice": DiceLoss(power=0.5, classes="all"),  # the default of mcseg
    "margin calibration": MarginCalibrationLoss(data.num_classes).calibrate(class_pixels),  # the paper's loss
}
print(f"{'':<20}{'mIoU':>6}", *(f"{name[:8]:>8}" for name in data.class_names))
for name, loss in losses.items():
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 32, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(32, 32, 5, padding=4, dilation=2), nn.ReLU()),
        nn.Conv2d(32, data.num_classes, 1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003)
    for _ in range(15):
        for image, target in DataLoader(train, batch_size=8, shuffle=True):
            optimizer.zero_grad()
            loss(network(image), target).backward()  # logits (N,C,H,W), any floating-point type
            optimizer.step()
    with torch.no_grad():
        scores = score(network(images[48:]).argmax(1), masks[48:], data.num_classes)  # one confusion matrix for all images
    print(f"{name:<20}{100 * scores.miou:6.1f}", *(f"{100 * iou:8.1f}" for iou in scores.iou))
