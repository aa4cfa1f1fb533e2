# The public names and where each is defined; `__init__.py` reads this file.

from siglip_hf.data.embed import embed_source as embed_source
from siglip_hf.data.embedder import SiglipEmbedder as SiglipEmbedder
from siglip_hf.data.store import EmbeddingStore as EmbeddingStore
from siglip_hf.search.clusters import find_clusters as find_clusters
from siglip_hf.search.datasets_bridge import add_embeddings as add_embeddings
from siglip_hf.search.duplicates import find_duplicates as find_duplicates
from siglip_hf.search.query import Hit as Hit
from siglip_hf.search.query import Query as Query
from siglip_hf.search.query import SearchIndex as SearchIndex
from siglip_hf.search.sources_to_index import index_source as index_source
