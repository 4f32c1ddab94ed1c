"""Features on disk: shards, one merged file, and their reading."""

from .load import FeatureSet, load_features
from .merge import FILE_SUFFIXES, merge_shards
from .plan import ExtractionPlan
from .shards import ShardBuffer, read_shard_header, write_shard

__all__ = [
    "FILE_SUFFIXES",
    "ExtractionPlan",
    "FeatureSet",
    "ShardBuffer",
    "load_features",
    "merge_shards",
    "read_shard_header",
    "write_shard",
]
