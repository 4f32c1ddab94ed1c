"""Images for pretraining: sources, multi-crop augmentation, masking, and the data loader."""

from dinov3_mm.datasets.classification import ClassificationFolder
from dinov3_mm.datasets.collate import MultiCropCollate
from dinov3_mm.datasets.loader import PretrainDataLoader, build_pretrain_dataloader
from dinov3_mm.datasets.loading import LoadLabelMap, LoadMissingImage
from dinov3_mm.datasets.masking import MaskPlanner, block_mask
from dinov3_mm.datasets.multi_crop_dataset import MultiCropDataset
from dinov3_mm.datasets.randomness import Permutation, sample_generator, torch_seed
from dinov3_mm.datasets.samplers import BatchLayout, PositionBatchSampler
from dinov3_mm.datasets.scene_tasks import SyntheticScenesTask
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
