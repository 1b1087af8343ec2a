"""Images and a network for them, without torchvision: a folder of classes, and ResNet-50."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

MEAN = numpy.array([0.485, 0.456, 0.406], numpy.float32)  # of ImageNet
DEVIATION = numpy.array([0.229, 0.224, 0.225], numpy.float32)
SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """`folder/<class>/<image>`, with the augmentation of the ResNet paper for training."""

    def __init__(self, folder: Path, size: int, training: bool):
        names = sorted(child.name for child in folder.iterdir() if child.is_dir())
        self.files = [
            (file, label)
            for label, name in enumerate(names)
            for file in sorted((folder / name).rglob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise SystemExit(f"{folder} has no images in class folders")
        self.classes, self.size, self.training = len(names), size, training

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        file, label = self.files[index]
        with Image.open(file) as image:
            image = image.convert("RGB")
            width, height = image.size
            if self.training:
                # A crop of 8 to 100 % of the area, 3:4 to 4:3.
                area = width * height * random.uniform(0.08, 1.0)
                aspect = random.uniform(3 / 4, 4 / 3)
                w = min(width, round((area * aspect) ** 0.5))
                h = min(height, round((area / aspect) ** 0.5))
                left, top = random.randint(0, width - w), random.randint(0, height - h)
            else:
                # The central square of 87.5 % of the shorter side.
                w = h = round(0.875 * min(width, height))
                left, top = (width - w) // 2, (height - h) // 2
            box = (left, top, left + w, top + h)
            pixels = numpy.asarray(
                image.resize((self.size, self.size), Image.Resampling.BILINEAR, box)
            )
        if self.training and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        values = (pixels.astype(numpy.float32) / 255.0 - MEAN) / DEVIATION
        return torch.from_numpy(values.transpose(2, 0, 1).copy()), label


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the stride is in the 3x3 one."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU(True)),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        nn.init.zeros_(self.body[-1].weight)  # a block starts as the identity
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50(classes: int) -> nn.Sequential:
    """He et al., "Deep Residual Learning for Image Recognition", 2015; 25.6M parameters."""
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(True)),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            width = 64 << stage
            layers.append(Bottleneck(inputs, width, 2 if stage > 0 and block == 0 else 1))
            inputs = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)
