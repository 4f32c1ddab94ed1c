"""The image channels of a run: source, data preprocessor and backbone must agree."""

from torch import nn


def check_channels(model: nn.Module, num_channels: int, source: str) -> None:
    """Raise unless the images have the channels that the model normalises and embeds.

    Args:
        model: The algorithm. What it does not state (``data_preprocessor.statistics``, the
            ``arch_settings`` of its ``teacher_backbone``) is not compared.
        num_channels: Channels of the images.
        source: Name of their source, for the message.

    Raises:
        ValueError: With the numbers that disagree and what to set.
    """
    statistics = getattr(model.data_preprocessor, "statistics", None)
    backbone = getattr(model, "teacher_backbone", None)
    num_values = num_channels if statistics is None else len(statistics[0])
    in_channels = getattr(backbone, "arch_settings", {}).get("in_channels", num_channels)
    if num_channels == num_values == in_channels:
        return
    raise ValueError(
        f"the image channels disagree: {num_channels} in the images of {source}, {num_values} in "
        f"mean and std of the data preprocessor, {in_channels} in in_channels of the backbone. "
        f"To train on {num_channels} channels set model.backbone.in_channels={num_channels} and "
        f"{num_channels} values each of model.data_preprocessor.mean and .std, which "
        "tools/compute_statistics.py prints; or change the images with the source's color "
        "('rgb', 'gray', 'unchanged') and channels=[...]"
    )
