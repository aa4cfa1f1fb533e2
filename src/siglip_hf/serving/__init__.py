"""`siglip-hf serve`: embeddings, labels and search over HTTP, batched and bounded; and a client for it."""
