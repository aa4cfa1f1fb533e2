"""Search: pictures and texts become embeddings on disk (`embed`, `store`), which are indexed and queried.

Names are resolved on first use; most of these modules need the extra `search`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module that defines it.
_MODULES = {
    "EmbeddingStore": "store",
    "Hit": "query",
    "Query": "query",
    "SearchIndex": "query",
    "SiglipEmbedder": "embedder",
    "embed_source": "embed",
    "add_embeddings": "datasets_bridge",
    "find_clusters": "clusters",
    "find_duplicates": "duplicates",
    "index_source": "index_source",
}

__all__ = list(_MODULES)

if TYPE_CHECKING:
    from siglip_hf.search.clusters import find_clusters as find_clusters
    from siglip_hf.search.datasets_bridge import add_embeddings as add_embeddings
    from siglip_hf.search.duplicates import find_duplicates as find_duplicates
    from siglip_hf.search.embed import embed_source as embed_source
    from siglip_hf.search.embedder import SiglipEmbedder as SiglipEmbedder
    from siglip_hf.search.index_source import index_source as index_source
    from siglip_hf.search.query import Hit as Hit
    from siglip_hf.search.query import Query as Query
    from siglip_hf.search.query import SearchIndex as SearchIndex
    from siglip_hf.search.store import EmbeddingStore as EmbeddingStore


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
