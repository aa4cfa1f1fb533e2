"""Pictures and texts to the inputs of a SigLIP 2 NaFlex model: SigLIP's processor with patches instead of pictures.

The budget and the size of patches are those of the saved image processor; a call may choose another budget.
"""

from __future__ import annotations

from typing import Any

from siglip_hf.preprocessing.processing_siglip import SiglipProcessor


class Siglip2Processor(SiglipProcessor):
    """An image processor of NaFlex and the tokenizer of SigLIP 2 behind one call, with `SiglipProcessor`'s arguments.

    Pictures become `pixel_values` (B, N, P), `pixel_attention_mask` (B, N) and `spatial_shapes` (B, 2), and
    `max_num_patches` sets the budget N; see `Siglip2ImageProcessor.preprocess`.

    Args:
        image_processor: A `Siglip2ImageProcessor` or `Siglip2ImageProcessorFast`.
        tokenizer: A `Siglip2Tokenizer`.

    Examples:
        >>> from siglip_hf import Siglip2Processor, naflex_checkpoint
        >>> processor = Siglip2Processor.from_pretrained(naflex_checkpoint())
        >>> inputs = processor(images="drawings/cat.png", text=["a cat", "a dog"], return_tensors="pt")
        >>> inputs["pixel_values"].shape, inputs["spatial_shapes"].tolist(), inputs["input_ids"].shape
        (torch.Size([1, 64, 768]), [[8, 8]], torch.Size([2, 64]))
    """

    def check_fits(self, model_or_config: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Makes sure that this processor and a NaFlex model belong together.

        Args:
            model_or_config: A NaFlex model or its configuration: joint, text only or vision only.
            **kwargs: As in `SiglipProcessor.check_fits`; they say nothing about NaFlex.

        Raises:
            ValueError: Naming the two values, if the tokenizer's vocabulary or length, or the patch size, is not the
                model's, or if the model has a fixed resolution.
        """
        config = getattr(model_or_config, "config", model_or_config)
        vision = getattr(config, "vision_config", config)
        if getattr(vision, "image_size", None) is not None:
            raise ValueError(
                f"The model takes pictures of image_size={vision.image_size}, but this processor makes NaFlex patches. "
                "Load the processor from the model's own checkpoint: AutoProcessor.from_pretrained."
            )
        super().check_fits(model_or_config, **kwargs)
        patch_size = getattr(vision, "patch_size", None)
        if patch_size is not None and patch_size != self.image_processor.patch_size:
            raise ValueError(
                f"The image processor's patch_size is {self.image_processor.patch_size}, but the model's is "
                f"{patch_size}. Set processor.image_processor.patch_size = {patch_size}."
            )


__all__ = ["Siglip2Processor"]
