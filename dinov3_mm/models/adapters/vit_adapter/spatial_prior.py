"""The convolutions of the ViT adapter: a pyramid of the image itself."""

from torch import Tensor, nn


class SpatialPrior(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from pixels (arXiv 2205.08534, section 3.3).

    Args:
        in_channels: image channels.
        channels: channels of the stem.
        embed_dims: channels of the outputs.
    """

    def __init__(self, in_channels: int, channels: int, embed_dims: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_norm_relu(in_channels, channels, stride=2),
            *_conv_norm_relu(channels, channels),
            *_conv_norm_relu(channels, channels),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv_norm_relu(channels, 2 * channels, stride=2))
        self.conv3 = nn.Sequential(*_conv_norm_relu(2 * channels, 4 * channels, stride=2))
        self.conv4 = nn.Sequential(*_conv_norm_relu(4 * channels, 4 * channels, stride=2))
        self.fc1 = nn.Conv2d(channels, embed_dims, kernel_size=1)
        self.fc2 = nn.Conv2d(2 * channels, embed_dims, kernel_size=1)
        self.fc3 = nn.Conv2d(4 * channels, embed_dims, kernel_size=1)
        self.fc4 = nn.Conv2d(4 * channels, embed_dims, kernel_size=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps (B, C, H / stride, W / stride) of images (B, 3, H, W), the finest first."""
        c1 = self.stem(images)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


def _conv_norm_relu(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
