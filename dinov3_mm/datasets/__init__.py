"""Images for pretraining: sources, multi-crop augmentation, masking, and the data loader."""

from dinov3_mm.datasets.collate import MultiCropCollate
from dinov3_mm.datasets.loader import PretrainDataLoader, build_pretrain_dataloader
from dinov3_mm.datasets.sources import (
    BatchMixture,
    BrokenImageError,
    ImageFolder,
    ImageList,
    ImageSource,
    MMDatasetSource,
    ReadableSubset,
    WeightedConcat,
)
from dinov3_mm.datasets.statistics import ChannelStatistics, channel_statistics
from dinov3_mm.datasets.synthetic_scenes import SyntheticScenes
from dinov3_mm.datasets.transforms import MultiCrop, MultiResolutionCrop
from dinov3_mm.datasets.transforms.host_steps import LoadLabelMap, LoadMissingImage

from .collate import MaskPlanner, block_mask
from .labelled import ClassificationFolder, SyntheticScenesTask
from .loader import MultiCropDataset
from .order import BatchLayout, Permutation, PositionBatchSampler, sample_generator, torch_seed

__all__ = [
    "BatchLayout",
    "BatchMixture",
    "BrokenImageError",
    "ChannelStatistics",
    "ClassificationFolder",
    "ImageFolder",
    "ImageList",
    "ImageSource",
    "LoadLabelMap",
    "LoadMissingImage",
    "MMDatasetSource",
    "MaskPlanner",
    "MultiCrop",
    "MultiCropCollate",
    "MultiCropDataset",
    "MultiResolutionCrop",
    "Permutation",
    "PositionBatchSampler",
    "PretrainDataLoader",
    "ReadableSubset",
    "SyntheticScenes",
    "SyntheticScenesTask",
    "WeightedConcat",
    "block_mask",
    "build_pretrain_dataloader",
    "channel_statistics",
    "sample_generator",
    "torch_seed",
]
