"""A loaded model in use: embeddings, zero-shot labels, and the speed of both."""
