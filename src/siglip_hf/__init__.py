"""SigLIP for transformers."""
