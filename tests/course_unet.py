"""A right U-Net in the course's own style: a name for each level, modules between the blocks."""

import torch
from torch import Tensor, nn

from petseg_utils import check_side, conv_plus_conv


class UNet(nn.Module):
    """The course's U-Net: down1, down2, ..., bottleneck, ..., up2, up1, out."""

    def __init__(self, base_channels=32, depth=5, num_classes=3, *, norms=2, skips=True):
        super().__init__()
        self.levels, self.keep = range(1, depth + 1), skips
        width = base_channels
        self.down1 = conv_plus_conv(3, width, norms)
        for level in self.levels[1:]:
            setattr(self, f"down{level}", conv_plus_conv(width, 2 * width, norms))
            width *= 2
        self.bottleneck = conv_plus_conv(width, width, norms)
        for level in reversed(self.levels[1:]):
            setattr(self, f"up{level}", conv_plus_conv(2 * width, width // 2, norms))
            width //= 2
        self.up1 = conv_plus_conv(2 * width, width, norms)
        self.out = nn.Conv2d(width, num_classes, kernel_size=1)
        self.downsample, self.upsample = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        check_side(x.shape[-1], len(self.levels))
        residuals = []
        for level in self.levels:
            x = getattr(self, f"down{level}")(x)
            residuals.append(x if self.keep else torch.zeros_like(x))
            x = self.downsample(x)
        x = self.bottleneck(x)
        for level in reversed(self.levels):
            x = self.upsample(x)
            x = torch.cat((x, residuals[level - 1]), dim=1)
            x = getattr(self, f"up{level}")(x)
        return self.out(x)
