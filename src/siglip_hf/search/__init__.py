"""Search: pictures and texts become embeddings on disk (`embed`, `store`), which are indexed and queried.

Names are resolved on first use; most of these modules need the extra `search`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module that defines it.
_MODULES = {
    "EmbeddingStore": "siglip_hf.data.store",
    "Hit": "siglip_hf.search.query",
    "Query": "siglip_hf.search.query",
    "SearchIndex": "siglip_hf.search.query",
    "SiglipEmbedder": "siglip_hf.data.embedder",
    "embed_source": "siglip_hf.data.embed",
    "add_embeddings": "siglip_hf.search.datasets_bridge",
    "find_clusters": "siglip_hf.search.clusters",
    "find_duplicates": "siglip_hf.search.duplicates",
    "index_source": "siglip_hf.search.index_source",
}

__all__ = list(_MODULES)

if TYPE_CHECKING:
    from siglip_hf.data.embed import embed_source as embed_source
    from siglip_hf.data.embedder import SiglipEmbedder as SiglipEmbedder
    from siglip_hf.data.store import EmbeddingStore as EmbeddingStore
    from siglip_hf.search.clusters import find_clusters as find_clusters
    from siglip_hf.search.datasets_bridge import add_embeddings as add_embeddings
    from siglip_hf.search.duplicates import find_duplicates as find_duplicates
    from siglip_hf.search.index_source import index_source as index_source
    from siglip_hf.search.query import Hit as Hit
    from siglip_hf.search.query import Query as Query
    from siglip_hf.search.query import SearchIndex as SearchIndex


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
