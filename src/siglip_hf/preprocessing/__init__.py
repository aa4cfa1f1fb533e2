"""Texts to token ids and pictures to pixels, as the published checkpoints were trained."""
