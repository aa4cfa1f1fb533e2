"""A checkpoint as mteb (github.com/embeddings-benchmark/mteb) evaluates models, for its tasks with pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.extras import missing

if TYPE_CHECKING:
    from mteb.models.abs_encoder import AbsEncoder


def mteb_model(model: str | os.PathLike[str] | None = None, *, device: str | None = None) -> AbsEncoder:
    """A checkpoint for `mteb.evaluate(mteb_model(FOLDER), mteb.get_tasks([...]))`.

    It is mteb's own wrapper of SigLIP, which alone takes only names that mteb knows; the numbers are comparable with
    those that mteb has for published checkpoints. mteb keeps results under a model's name and revision; the revision
    here is the SHA-256 of the weights, so that a folder that was trained further is measured anew.

    Args:
        model: folder or name of a SigLIP or SigLIP 2 checkpoint, NaFlex included; the embedded one by default.
        device: where it computes, in float32; the first accelerator by default.

    Raises:
        ValueError: if there is no such checkpoint or device, or the checkpoint is no SigLIP.
        ImportError: if mteb is not installed.
    """
    try:
        from mteb.models import ModelMeta
        from mteb.models.model_implementations.siglip_models import SiglipModelWrapper
        from mteb.similarity_functions import ScoringFunction
    except ImportError as error:
        raise missing("mteb's tasks need mteb", "mteb") from error
    embedder = SiglipEmbedder(model, device=device, dtype="float32")

    class Wrapper(SiglipModelWrapper):
        def __init__(self) -> None:  # in place of one that loads the model again, without checks
            self.model_name, self.device = embedder.name, str(embedder.device)
            self.model, self.processor = embedder.model, embedder.processor

    wrapper = Wrapper()
    path = Path(embedder.name)
    wrapper.mteb_model_meta = ModelMeta.create_empty(
        {
            "name": f"siglip-hf/{path.resolve().name}" if path.exists() else embedder.name,
            "revision": embedder.model_sha256,
            "n_parameters": embedder.model.num_parameters(),
            "max_tokens": embedder.processor.tokenizer.model_max_length,
            "embed_dim": embedder.dimension,
            "similarity_fn_name": ScoringFunction.COSINE,
            "modalities": ["image", "text"],
            "framework": ["PyTorch"],
        }
    )
    return wrapper
