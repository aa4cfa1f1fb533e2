"""`siglip_hf.optimize`: encoder blocks made faster for inference."""
