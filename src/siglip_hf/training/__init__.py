"""Training: batches larger than memory."""

from siglip_hf.training.cached import CachedLoss, cached_backward

__all__ = ["CachedLoss", "cached_backward"]
