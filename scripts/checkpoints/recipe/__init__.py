"""The recipe of the embedded checkpoints: pictures and their augmentation, captions, the stages of both trainings."""
