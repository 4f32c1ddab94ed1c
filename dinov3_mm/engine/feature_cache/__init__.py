"""Features of a frozen backbone, computed once, for heads that train many times."""

from .training import CachedFeatures, CachedFeaturesHook, use_feature_cache

__all__ = ["CachedFeatures", "CachedFeaturesHook", "use_feature_cache"]
