"""Search: pictures and texts become embeddings on disk (`embed`, `store`), which are indexed and queried.

Names are resolved on first use; most of these modules need the extra `search`.
"""

from siglip_hf._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__)
