"""Where pictures and texts come from, and their embeddings on disk."""
