"""The pairwise sigmoid loss, in tiles and across processes."""
