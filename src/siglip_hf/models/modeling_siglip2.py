"""SigLIP 2 NaFlex models: pictures in their own aspect ratio, as sequences of patches. All else is SigLIP's.

Source: "SigLIP 2", https://arxiv.org/abs/2502.14786, section 2.4.2. Module names are those of published checkpoints.

Shapes: B batch, N patches, P values in a patch, L text tokens, D width, H heads, E embedding.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from siglip_hf.models.configuration_siglip2 import Siglip2Config, Siglip2TextConfig, Siglip2VisionConfig
from siglip_hf.models.modeling_siglip import (
    SiglipAttentionPoolingHead,
    SiglipForImageClassification,
    SiglipModel,
    SiglipPreTrainedModel,
    SiglipTextModel,
    SiglipVisionModel,
)
from siglip_hf.models.naflex import Packing, Seen, pack, pack_masked, resized_positions
from siglip_hf.models.outputs import SiglipOutput, SiglipPoolingOutput
from siglip_hf.parallel import send

#: Implementations of attention that take the mask of packed rows. Flash attention takes lengths instead of a mask.
MASKED_ATTENTION = ("eager", "sdpa", "flex_attention")

#: Packing is worth its indexing where it saves at least this part of the patches and their padding.
PACKING_GAIN = 0.1


class Siglip2PreTrainedModel(SiglipPreTrainedModel):
    """Loading, saving and initial values; the base of all NaFlex models."""

    config: Siglip2Config
    base_model_prefix = "siglip2"
    _no_split_modules = [  # noqa: RUF012
        "SiglipTextEmbeddings",
        "Siglip2VisionEmbeddings",
        "SiglipEncoderLayer",
        "Siglip2AttentionPoolingHead",
    ]


class Siglip2VisionEmbeddings(nn.Module):
    """Patches as tokens, with positions resized to each picture's grid."""

    def __init__(self, config: Siglip2VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(config.patch_values, config.hidden_size)
        self.num_patches = config.num_patches
        self.embed_dim, self.patch_size = config.hidden_size, config.patch_size
        self.position_embedding_size = config.patch_grid[0]
        self.position_embedding = nn.Embedding(self.num_patches, config.hidden_size)

    def fill_new_parameters(self) -> None:
        """Gives what no checkpoint has filled its initial values."""
        init.normal_(self.position_embedding.weight, std=self.config.hidden_size**-0.5)

    def forward(self, patches: torch.Tensor, shapes: torch.Tensor, patch_ids: torch.Tensor) -> torch.Tensor:
        """Maps patches to tokens.

        Args:
            patches: (..., P) pixel values.
            shapes: (..., 2) rows and columns of the picture that a patch belongs to.
            patch_ids: (...) number of the patch in its picture, row by row.

        Returns:
            (..., D).
        """
        tokens = self.patch_embedding(patches.to(self.patch_embedding.bias.dtype))
        # By a call: the weight of an offloaded or sharded layer is only there while it runs.
        table = self.position_embedding(torch.arange(self.num_patches, device=tokens.device))  # (rows * columns, D)
        shapes, patch_ids = shapes.to(tokens.device), patch_ids.to(tokens.device)
        return tokens + resized_positions(table, self.config.patch_grid, shapes, patch_ids)


class Siglip2AttentionPoolingHead(SiglipAttentionPoolingHead):
    """SigLIP's pooling head, which looks at a picture's own patches and not at its padding."""

    config: Siglip2VisionConfig  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_implementation: str | None = None,
        lengths: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps image tokens (B, N, D) to (B, D) and the attention weights (B, H, 1, N), which only "eager" has.

        Args:
            hidden_states: (B, N, D), or (1, T, D) with `lengths`.
            attention_mask: (B, N), nonzero for patches and 0 for padding; None without padding.
            attn_implementation: Instead of the configured one.
            lengths: `Packing.flash_lengths(1)`, where all pictures stand in one row.
        """
        if lengths is not None:
            return super().forward(hidden_states, attn_implementation, None, lengths)
        mask = create_bidirectional_mask(
            with_attention(self.config, attn_implementation),
            hidden_states[:, :1],  # as many queries as the probe: one
            attention_mask,
            encoder_hidden_states=hidden_states,
            allow_is_bidirectional_skip=attention_mask is None,  # else it asks the mask, which waits for the device
        )
        return super().forward(hidden_states, attn_implementation, mask)


class Siglip2TextModel(SiglipTextModel, Siglip2PreTrainedModel):
    """The text tower: SigLIP's, under the type that NaFlex configurations name.

    Examples:
        >>> from siglip_hf import Siglip2TextModel, Siglip2Tokenizer, naflex_checkpoint
        >>> tower = Siglip2TextModel.from_pretrained(naflex_checkpoint())
        >>> tokenizer = Siglip2Tokenizer.from_pretrained(naflex_checkpoint())
        >>> tower(**tokenizer(["a cat", "two dogs"], return_tensors="pt")).pooler_output.shape
        torch.Size([2, 192])
    """

    config: Siglip2TextConfig  # type: ignore[assignment]


class Siglip2VisionModel(SiglipVisionModel, Siglip2PreTrainedModel):
    """The NaFlex vision tower, also for use inside vision-language models.

    Examples:
        >>> from siglip_hf import Siglip2ImageProcessor, Siglip2VisionModel, naflex_checkpoint
        >>> tower = Siglip2VisionModel.from_pretrained(naflex_checkpoint())
        >>> processor = Siglip2ImageProcessor.from_pretrained(naflex_checkpoint())
        >>> tower(**processor("drawings/cat.png", return_tensors="pt")).pooler_output.shape
        torch.Size([1, 192])
    """

    config: Siglip2VisionConfig  # type: ignore[assignment]

    _embeddings_class = Siglip2VisionEmbeddings
    _head_class = Siglip2AttentionPoolingHead

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        pool: bool = True,
        packed: bool | Packing = False,
        **kwargs,
    ) -> SiglipPoolingOutput:
        """Encodes pictures, which the image processors of NaFlex have cut into patches.

        Args:
            pixel_values: (B, N, P) patches of each picture, row by row, padded at the end.
            pixel_attention_mask: (B, N), 1 for patches and 0 for padding; by default what `spatial_shapes` says.
            spatial_shapes: (B, 2) integers: rows and columns of patches in each picture.
            pool: Run the pooling head, if the model has one.
            packed: Let several pictures share a row of the batch, as many as fit in the length of the largest. Same
                output, at the cost of the patches instead of the padded batch; `output_hidden_states` and
                `output_attentions` then are those of the shared rows. For flash attention all pictures stand in one
                row, and it is told where each ends. Or how to pack them, if that is known already.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            See `SiglipPoolingOutput`. States of padding mean nothing; they are zero with `packed`.

        Raises:
            ValueError: If the shapes do not fit each other or the model; the message names them.
        """
        seen = self._check_inputs(pixel_values, spatial_shapes, pixel_attention_mask)
        assert spatial_shapes is not None
        wants_attentions = self._resolve_attentions(kwargs)
        implementation = kwargs.get("attn_implementation")
        config = with_attention(self.config, implementation)
        length, device = pixel_values.shape[1], pixel_values.device
        spatial_shapes = send(spatial_shapes, device)
        pixel_attention_mask = None if pixel_attention_mask is None else send(pixel_attention_mask, device)
        patch_ids = torch.arange(length, device=device)
        is_patch = patch_ids < spatial_shapes.prod(dim=-1, keepdim=True)  # (B, N)
        patch_ids = torch.where(is_patch, patch_ids, 0)  # padding gets the position of the first patch, as in stock
        shapes = spatial_shapes[:, None].expand(-1, length, -1)  # (B, N, 2)

        mask: Any = None
        padding: torch.Tensor | None = is_patch if pixel_attention_mask is None else pixel_attention_mask
        pool_from: tuple[torch.Tensor, torch.Tensor | None, str | None, Any] | None = None
        if packed and len(pixel_values) > 0:
            packing = packed if isinstance(packed, Packing) else self._pack(config, seen)
            packing = packing.to(device)
            tokens = self.embeddings(*map(packing.take, (pixel_values, shapes, patch_ids)))  # (T, D)
            hidden_states = packing.fill(tokens)  # (R, longest, D)
            by_length = is_flash_attention_requested(config)
            if by_length:
                hidden_states = self.encoder(hidden_states, None, lengths=packing.flash_lengths(), **kwargs)
            else:
                picture_ids = packing.picture_ids().to(tokens.device)
                mask = create_bidirectional_mask(
                    config,
                    hidden_states,
                    None,
                    # Places without a patch see each other: a softmax over nothing would be NaN.
                    and_mask_function=lambda row, head, query, key: picture_ids[row, query] == picture_ids[row, key],
                )
                hidden_states = self.encoder(hidden_states, mask, **kwargs)
            packed_states = self.post_layernorm(hidden_states)
            hidden_states = packing.by_picture(packed_states, length)  # (B, N, D)
            if by_length:
                pool_from = packed_states, None, implementation, packing.flash_lengths(1)
        else:
            if seen is not None and seen.masks_nothing(length):
                padding = None
            hidden_states = self.embeddings(pixel_values, shapes, patch_ids)  # (B, N, D)
            mask = create_bidirectional_mask(
                config, hidden_states, padding, allow_is_bidirectional_skip=padding is None
            )
            hidden_states = self.post_layernorm(self.encoder(hidden_states, mask, **kwargs))

        pooled, weights = None, None
        if self.use_head and pool:
            # (B, D), (B, H, 1, N)
            pooled, weights = self.head(*(pool_from or (hidden_states, padding, implementation)))
        return SiglipPoolingOutput(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            cross_attentions=(weights,) if wants_attentions and weights is not None else None,
        )

    def _check_inputs(
        self,
        pixel_values: torch.Tensor | None,
        spatial_shapes: torch.Tensor | None,
        pixel_attention_mask: torch.Tensor | None,
    ) -> Seen | None:
        """Returns what the host sees of the batch; None while a graph is traced, which knows no numbers."""
        if pixel_values is None or spatial_shapes is None:
            raise ValueError(
                "the NaFlex vision tower needs pixel_values (B, N, P) and spatial_shapes (B, 2), as "
                "Siglip2ImageProcessor makes them"
            )
        values, side = self.config.patch_values, self.config.patch_size
        if pixel_values.ndim != 3 or pixel_values.shape[-1] != values:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, but this model takes patches (B, N, {values}): "
                f"{side}x{side} pixels of {self.config.num_channels} channels. Use Siglip2ImageProcessor with "
                f"patch_size={side}"
            )
        if tuple(spatial_shapes.shape) != (pixel_values.shape[0], 2):
            raise ValueError(
                f"spatial_shapes has shape {tuple(spatial_shapes.shape)}; expected ({pixel_values.shape[0]}, 2), the "
                "rows and columns of each picture"
            )
        if is_tracing(pixel_values):
            return None
        seen = Seen.of(spatial_shapes, pixel_attention_mask)
        counts = seen.counts
        if counts and not 1 <= min(counts) <= max(counts) <= pixel_values.shape[1]:
            raise ValueError(
                f"spatial_shapes asks for {min(counts)} to {max(counts)} patches per picture, and pixel_values has "
                f"room for 1 to {pixel_values.shape[1]}"
            )
        return seen

    @staticmethod
    def _pack(config: Siglip2VisionConfig, seen: Seen | None) -> Packing:
        if seen is None:
            raise ValueError("packed=True needs the numbers of patches, which a graph that is traced does not know")
        by_length = is_flash_attention_requested(config)
        if not by_length and config._attn_implementation not in MASKED_ATTENTION:
            raise ValueError(
                f"packed=True needs one of the attention implementations {', '.join(MASKED_ATTENTION)}, or flash "
                f"attention, not {config._attn_implementation!r}"
            )
        if seen.mask is not None:
            return pack_masked(seen.mask, one_row=by_length)
        return pack(seen.counts, one_row=by_length)


class Siglip2Model(SiglipModel, Siglip2PreTrainedModel):
    """Two towers that meet in one sigmoid, the vision tower being a NaFlex one.

    Examples:
        >>> import torch
        >>> from siglip_hf import Siglip2Model, Siglip2Processor, naflex_checkpoint
        >>> model = Siglip2Model.from_pretrained(naflex_checkpoint(), dtype=torch.float32).eval()
        >>> processor = Siglip2Processor.from_pretrained(naflex_checkpoint())
        >>> with torch.no_grad():
        ...     images = model.encode_image(["drawings/cat.png", "drawings/rocket.png"], max_num_patches=[16, 64])
        ...     texts = model.encode_text(**processor(text=["a cat", "a rocket"], return_tensors="pt"))
        >>> (images @ texts.T).shape  # cosines
        torch.Size([2, 2])
    """

    config: Siglip2Config
    base_model_prefix = "siglip2"

    _text_class = Siglip2TextModel
    _vision_class = Siglip2VisionModel

    def encode_image(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor | Sequence[Any],
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        *,
        normalize: bool = True,
        packed: bool | None = None,
        max_num_patches: int | Sequence[int] | None = None,
        max_tokens: int = 16384,
    ) -> torch.Tensor:
        """Embeds pictures: a batch from an image processor, or a list of pictures of any sizes and kinds.

        Args:
            pixel_values: (M, N, P) patches, with the other two tensors of the processor. Or a list of M pictures
                (paths, PIL images, arrays, ...): these are read and cut into patches with this model's patch size,
                ordered by size, and encoded in steps.
            pixel_attention_mask: (M, N); for patches only.
            spatial_shapes: (M, 2); for patches only.
            normalize: Scale each embedding to length 1, as needed for cosine similarity.
            packed: Let pictures share rows; see `Siglip2VisionModel.forward`. By default where that pays.
            max_num_patches: Budget of patches for a list of pictures, one for all or one each;
                `config.vision_config.num_patches` by default.
            max_tokens: Patches per step, at most, for a list of pictures. It bounds the memory.

        Returns:
            (M, E), in the model's dtype, with a graph where gradients are on.

        Raises:
            ValueError: If the model has no pooling head, or for shapes that do not fit.
        """
        if not isinstance(pixel_values, torch.Tensor):
            return self._encode_pictures(pixel_values, normalize, packed, max_num_patches, max_tokens)
        if max_num_patches is not None:
            raise ValueError("max_num_patches is for a list of pictures; these are patches already")
        packing: Packing | bool | None = packed
        if packed is None and not is_tracing(pixel_values):
            seen = self.vision_model._check_inputs(pixel_values, spatial_shapes, pixel_attention_mask)
            assert seen is not None
            # The tower reads them again, and need not wait for the device then.
            spatial_shapes, pixel_attention_mask = seen.shapes, seen.mask
            packing = self._packing_if_it_pays(pixel_values, seen)
        output = self.vision_model(
            pixel_values, pixel_attention_mask, spatial_shapes, packed=packing or False, return_dict=True
        )
        return self._embeds(output.pooler_output, normalize)

    def _packing_if_it_pays(self, pixel_values: torch.Tensor, seen: Seen) -> Packing | None:
        config = self.vision_model.config
        by_length = is_flash_attention_requested(config)
        if not seen.counts or not (by_length or config._attn_implementation in MASKED_ATTENTION):
            return None
        packing = self.vision_model._pack(config, seen)
        gain = 1 - packing.rows * packing.length / pixel_values.shape[:2].numel()
        # With a mask, flash attention takes the padding out and puts it back in every block.
        return packing if gain >= PACKING_GAIN or (by_length and gain > 0) else None

    def _encode_pictures(
        self,
        pictures: Sequence[Any],
        normalize: bool,
        packed: bool | None,
        max_num_patches: int | Sequence[int] | None,
        max_tokens: int,
    ) -> torch.Tensor:
        from siglip_hf.preprocessing.image_processing_siglip2_fast import Siglip2ImageProcessorFast

        config = self.vision_model.config
        budgets = config.num_patches if max_num_patches is None else max_num_patches
        processor = Siglip2ImageProcessorFast(patch_size=config.patch_size, max_num_patches=budgets)
        inputs = processor.preprocess(pictures, return_tensors="pt")
        counts = inputs["spatial_shapes"].prod(dim=-1)  # (M,)
        order = counts.argsort(descending=True, stable=True)
        weight = self.vision_model.embeddings.patch_embedding.weight
        device = torch.device("cpu") if weight.is_meta else weight.device  # offloaded layers fetch their inputs
        embeds = []
        for step in self._steps(order.tolist(), counts.tolist(), max_tokens):
            longest = int(counts[step[0]])
            patches = send(inputs["pixel_values"][step, :longest], device)
            shapes = inputs["spatial_shapes"][step]
            embeds.append(self.encode_image(patches, None, shapes, normalize=normalize, packed=packed))
        return torch.cat(embeds)[send(order.argsort(), embeds[0].device)]  # back in the order given

    @staticmethod
    def _steps(order: list[int], counts: list[int], max_tokens: int) -> list[list[int]]:
        """Consecutive groups of `order` of at most `max_tokens` patches, or of one picture."""
        steps: list[list[int]] = []
        left = 0
        for picture in order:
            if not steps or counts[picture] > left:
                steps.append([])
                left = max_tokens
            steps[-1].append(picture)
            left -= counts[picture]
        return steps

    @can_return_tuple
    def get_image_features(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs,
    ) -> SiglipPoolingOutput:
        """Returns the vision tower's output, as the installed transformers does; `encode_image` returns a tensor.

        Args:
            pixel_values: (images, N, patch dimension), as the image processor makes them.
            pixel_attention_mask: (images, N), 1 for patches and 0 for padding.
            spatial_shapes: (images, 2), rows and columns of patches.
            **kwargs: Options of the tower, such as `output_hidden_states`.

        Returns:
            `last_hidden_state` (images, N, D) and `pooler_output` (images, E), not normalized.
        """
        return self.vision_model(pixel_values, pixel_attention_mask, spatial_shapes, **kwargs)

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        packed: bool = False,
        **kwargs,
    ) -> SiglipOutput:
        """Compares every image with every text; with only one of the two inputs, embeds that one.

        Args:
            input_ids: (texts, L) token ids, padded to the model's length.
            pixel_values: (images, N, P) patches; see `Siglip2VisionModel.forward`, also for the next two.
            pixel_attention_mask: (images, N).
            spatial_shapes: (images, 2).
            attention_mask: See `SiglipTextModel.forward`; leave it out.
            position_ids: (texts, L), 0..L-1 by default.
            return_loss: Also return the sigmoid loss; image i and text i are a pair.
            packed: Let several pictures share a row; see `Siglip2VisionModel.forward`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            See `SiglipOutput`.

        Raises:
            ValueError: Without any input, and for a loss where images and texts are not as many.
        """
        return self._compare(
            {
                "pixel_values": pixel_values,
                "pixel_attention_mask": pixel_attention_mask,
                "spatial_shapes": spatial_shapes,
                "packed": packed,
            },
            {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids},
            return_loss,
            kwargs,
        )


class Siglip2ForImageClassification(SiglipForImageClassification, Siglip2PreTrainedModel):
    """The NaFlex vision tower with a linear layer on the mean of its tokens, or with a head of `siglip_hf.learn`.

    Examples:
        >>> from siglip_hf import Siglip2ForImageClassification, Siglip2ImageProcessor, naflex_checkpoint
        >>> model = Siglip2ForImageClassification.from_pretrained(naflex_checkpoint(), num_labels=3)  # a new layer
        >>> processor = Siglip2ImageProcessor.from_pretrained(naflex_checkpoint())
        >>> model(**processor("drawings/cat.png", return_tensors="pt")).logits.shape
        torch.Size([1, 3])
    """

    config: Siglip2Config

    _vision_class = Siglip2VisionModel

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        packed: bool = False,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Classifies pictures.

        Args:
            pixel_values: (B, N, P) patches; see `Siglip2VisionModel.forward`, also for the next two.
            pixel_attention_mask: (B, N).
            spatial_shapes: (B, 2).
            labels: As in `SiglipForImageClassification.forward`.
            packed: Let several pictures share a row; see `Siglip2VisionModel.forward`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `loss` (scalar, with labels), `logits` (B, num_labels), `hidden_states`, `attentions`.
        """
        self._pass_on_output_flags(kwargs)
        outputs = self.vision_model(
            pixel_values, pixel_attention_mask, spatial_shapes, pool=self.is_learned, packed=packed, **kwargs
        )
        if self.is_learned:
            return self._classify(outputs.pooler_output, labels, outputs)
        states = outputs.last_hidden_state  # (B, N, D)
        if pixel_attention_mask is None:
            counts = spatial_shapes.prod(dim=-1, keepdim=True)  # type: ignore[union-attr]
            pixel_attention_mask = torch.arange(states.shape[1], device=counts.device) < counts
        mask = send(pixel_attention_mask, states.device).to(states.dtype).unsqueeze(-1)  # (B, N, 1)
        return self._classify((states * mask).sum(dim=1) / mask.sum(dim=1), labels, outputs)


def with_attention(config: Siglip2VisionConfig, implementation: str | None) -> Siglip2VisionConfig:
    """The configuration with another attention implementation, for the functions that make masks by it."""
    if implementation is None or implementation == config._attn_implementation:
        return config
    config = copy.copy(config)
    config._attn_implementation = implementation
    return config


__all__ = [
    "Siglip2ForImageClassification",
    "Siglip2Model",
    "Siglip2PreTrainedModel",
    "Siglip2TextModel",
    "Siglip2VisionModel",
]
