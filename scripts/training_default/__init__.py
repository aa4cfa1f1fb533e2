"""The parts of scripts/train_default.py: pictures and their augmentation, captions and the vocabulary, the stages."""
