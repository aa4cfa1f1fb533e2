"""The parts of scripts/train_naflex.py: how the model starts, pictures on canvases of any shape, the stages."""
