"""Training: batches larger than memory, the Trainer, locked-image tuning.

Names are resolved on first use, since the Trainer imports much.
"""

from siglip_hf._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__)
