"""SigLIP models: text tower, vision tower, both joined by one sigmoid, and an image classifier.

Source: "Sigmoid Loss for Language Image Pre-Training", https://arxiv.org/abs/2303.15343; initial values follow the
original Flax code (google-research/big_vision). Module names are those of the published checkpoints.

Shapes: B batch, N patches, L text tokens, D width, H heads, E embedding (E = D of the vision tower).
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from siglip_hf.losses.sigmoid import sigmoid_loss
from siglip_hf.models.base import SiglipPreTrainedModel
from siglip_hf.models.configuration_siglip import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from siglip_hf.models.embeddings import SiglipTextEmbeddings, SiglipVisionEmbeddings
from siglip_hf.models.layers import SiglipEncoder, SiglipMLP, SiglipPoolingAttention
from siglip_hf.models.learned_head import LearnedHead
from siglip_hf.models.outputs import SiglipOutput, SiglipPoolingOutput

logger = logging.get_logger(__name__)


def l2_normalize(embeds: torch.Tensor) -> torch.Tensor:
    """Scales each row of (B, E) to length 1."""
    return embeds / embeds.norm(p=2, dim=-1, keepdim=True)


def _check_tensor(value: Any, name: str, source: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{name} must be a tensor and is a {type(value).__name__}: pass "
            f'processor({source}=..., return_tensors="pt")["{name}"], or let SiglipEmbedder do both'
        )


class SiglipAttentionPoolingHead(SiglipPreTrainedModel):
    """Pools image tokens into one vector: a learned probe attends to them, then an MLP (MAP head).

    A model of its own in transformers' eyes, so that the conversion of its checkpoint tensors (`in_proj_weight` into
    three projections) applies to this package's class only.
    """

    config: SiglipVisionConfig  # type: ignore[assignment]
    supports_gradient_checkpointing = False  # it has no blocks to recompute; the tower has

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        config = self.config
        self.num_heads = config.num_attention_heads
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = SiglipPoolingAttention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)
        self.post_init()

    def fill_new_parameters(self) -> None:
        """Gives what no checkpoint has filled its initial values."""
        # Flax's Xavier bound for a (1, 1, D) tensor; torch would count its axes differently.
        bound = math.sqrt(6 / (1 + self.probe.shape[-1]))
        init.uniform_(self.probe, -bound, bound)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attn_implementation: str | None = None,
        mask: Any = None,
        lengths: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps image tokens (B, N, D) to (B, D) and the attention weights (B, H, 1, N), which only "eager" has.

        The mask is in the form that the attention implementation takes. With `lengths`, as flash attention takes them,
        the tokens of all pictures stand in one row (1, T, D).
        """
        if lengths is None:
            probe = self.probe.expand(hidden_states.shape[0], -1, -1)  # (B, 1, D)
        else:
            probe = self.probe.expand(-1, len(lengths["cu_seq_lens_q"]) - 1, -1)  # (1, B, D)
        pooled, weights = self.attention(probe, hidden_states, mask, attn_implementation, lengths)
        pooled = pooled.flatten(0, 1)  # (B, D)
        return pooled + self.mlp(self.layernorm(pooled)), weights


class SiglipTextModel(SiglipPreTrainedModel):
    """The text tower.

    Examples:
        >>> from siglip_hf import SiglipTextModel, SiglipTokenizer, default_checkpoint
        >>> tower = SiglipTextModel.from_pretrained(default_checkpoint())
        >>> tokenizer = SiglipTokenizer.from_pretrained(default_checkpoint())
        >>> tower(**tokenizer(["a cat", "two dogs"], return_tensors="pt")).pooler_output.shape
        torch.Size([2, 192])
    """

    config: SiglipTextConfig  # type: ignore[assignment]
    input_modalities = ["text"]  # noqa: RUF012
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    _input_embed_layer = "token_embedding"

    def __init__(self, config: SiglipTextConfig):
        super().__init__(config)
        config = self.config
        self.embeddings = SiglipTextEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        assert config.projection_size is not None  # the configuration fills it in
        self.head = nn.Linear(config.hidden_size, config.projection_size)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        last_token_only: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encodes texts.

        Args:
            input_ids: (B, L) token ids, padded to `config.max_position_embeddings` as in training.
            attention_mask: (B, L). SigLIP was trained without one and its tokenizers make none; leave it out.
            position_ids: (B, L), 0..L-1 by default.
            last_token_only: Skip what the pooled output does not need: the last block computes the last position
                only, and `last_hidden_state` is (B, 1, D).
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `last_hidden_state` (B, L, D) after the final layer norm, and `pooler_output` (B, E), not normalized: the
            state of the last position, projected. `hidden_states[-1]` is the last block's output before that norm.

        Raises:
            ValueError: If a text is longer than the model's positions, or a mask comes with `last_token_only`.
        """
        if input_ids is None:
            raise ValueError("the text tower needs input_ids (B, L), got None")
        if last_token_only and attention_mask is not None:
            raise ValueError("last_token_only computes without a mask; leave attention_mask out")
        input_ids = input_ids.view(-1, input_ids.shape[-1])
        self._warn_about_untrained_text(input_ids, attention_mask)
        self._resolve_attentions(kwargs)

        hidden_states = self.embeddings(input_ids, position_ids)  # (B, L, D)
        mask = None
        if attention_mask is not None:
            mask_config = copy.copy(self.config)
            mask_config._attn_implementation = kwargs.get("attn_implementation", self.config._attn_implementation)
            mask = create_bidirectional_mask(mask_config, hidden_states, attention_mask)
        hidden_states = self.encoder(hidden_states, mask, last_token_only=last_token_only, **kwargs)
        hidden_states = self.final_layer_norm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            # The last position, usually padding: it was trained to sum up the text.
            pooler_output=self.head(hidden_states[:, -1]),
        )

    def _warn_about_untrained_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        length, trained = input_ids.shape[-1], self.config.max_position_embeddings
        if length != trained:
            logger.warning_once(
                f"these texts have {length} tokens; SigLIP pools the last of {trained} positions and was trained on "
                f'texts padded to that length, so the embeddings will be poor. Tokenize with padding="max_length", '
                f"max_length={trained}, truncation=True"
            )
        if attention_mask is not None:
            logger.warning_once(
                "SigLIP was trained without an attention mask: padding positions carry the text's embedding, and "
                "masking them makes it poor. Leave attention_mask out"
            )


class SiglipVisionModel(SiglipPreTrainedModel):
    """The vision tower, also for use inside vision-language models.

    Examples:
        >>> from siglip_hf import SiglipImageProcessor, SiglipVisionModel, default_checkpoint
        >>> tower = SiglipVisionModel.from_pretrained(default_checkpoint())
        >>> processor = SiglipImageProcessor.from_pretrained(default_checkpoint())
        >>> outputs = tower(**processor("drawings/cat.png", return_tensors="pt"))
        >>> outputs.pooler_output.shape, outputs.last_hidden_state.shape  # the picture; its 4 x 4 patches
        (torch.Size([1, 192]), torch.Size([1, 16, 192]))
    """

    config: SiglipVisionConfig  # type: ignore[assignment]
    input_modalities = ["image"]  # noqa: RUF012
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    _input_embed_layer = "patch_embedding"

    _embeddings_class: type[nn.Module] = SiglipVisionEmbeddings
    _head_class: type[SiglipAttentionPoolingHead] = SiglipAttentionPoolingHead

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        config = self.config
        self.embeddings = self._embeddings_class(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.use_head = config.vision_use_head
        if self.use_head:
            self.head = self._head_class(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        pool: bool = True,
        **kwargs,
    ) -> SiglipPoolingOutput:
        """Encodes pictures.

        Args:
            pixel_values: (B, C, height, width), normalized as the image processor does.
            interpolate_pos_encoding: Accept another size than `config.image_size` by resizing the positions.
            pool: Run the pooling head, if the model has one.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            See `SiglipPoolingOutput`.

        Raises:
            ValueError: If the pictures have another size and `interpolate_pos_encoding` is off.
        """
        if pixel_values is None:
            raise ValueError("the vision tower needs pixel_values (B, C, height, width), got None")
        wants_attentions = self._resolve_attentions(kwargs)
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)  # (B, N, D)
        hidden_states = self.post_layernorm(self.encoder(hidden_states, **kwargs))
        pooled, weights = None, None
        if self.use_head and pool:
            pooled, weights = self.head(hidden_states, kwargs.get("attn_implementation"))  # (B, D), (B, H, 1, N)
        return SiglipPoolingOutput(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            cross_attentions=(weights,) if wants_attentions and weights is not None else None,
        )


class SiglipModel(SiglipPreTrainedModel):
    """Two towers that meet in one sigmoid: the probability that a text describes an image.

    Examples:
        >>> import torch
        >>> from siglip_hf import SiglipModel, SiglipProcessor, default_checkpoint
        >>> model = SiglipModel.from_pretrained(default_checkpoint(), dtype=torch.float32).eval()
        >>> processor = SiglipProcessor.from_pretrained(default_checkpoint())
        >>> with torch.no_grad():
        ...     pictures = processor(images=["drawings/cat.png", "drawings/key.png"], return_tensors="pt")
        ...     images = model.encode_image(**pictures)
        ...     texts = model.encode_text(**processor(text=["a cat", "a key"], return_tensors="pt"))
        >>> (images @ texts.T).argmax(dim=1)  # cosines (2, 2): the best text of each picture
        tensor([0, 1])
    """

    config: SiglipConfig
    _auto_classes = ("AutoModel", "AutoModelForZeroShotImageClassification")
    _text_class: type[SiglipTextModel] = SiglipTextModel
    _vision_class: type[SiglipVisionModel] = SiglipVisionModel

    def __init__(self, config: SiglipConfig):
        super().__init__(config)
        self.text_model = self._text_class._from_config(self.config.text_config)
        self.vision_model = self._vision_class._from_config(self.config.vision_config)
        self.logit_scale = nn.Parameter(torch.empty(1))  # t' of the paper: the temperature is its exponential
        self.logit_bias = nn.Parameter(torch.empty(1))
        self.post_init()

    def fill_new_parameters(self) -> None:
        """Gives what no checkpoint has filled its initial values."""
        # Section 3.2 of the paper: start at temperature 10 and a bias that makes almost all pairs negative.
        init.constant_(self.logit_scale, math.log(10))
        init.constant_(self.logit_bias, -10.0)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding of the text tower."""
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding of the text tower."""
        self.text_model.embeddings.token_embedding = value

    def encode_image(
        self, pixel_values: torch.Tensor, *, normalize: bool = True, interpolate_pos_encoding: bool = False
    ) -> torch.Tensor:
        """Embeds pictures.

        Args:
            pixel_values: (N, C, height, width), normalized as the image processor does.
            normalize: Scale each embedding to length 1, as needed for cosine similarity.
            interpolate_pos_encoding: Accept another picture size than the configured one.

        Returns:
            (N, E), in the model's dtype, with a graph where gradients are on.

        Raises:
            ValueError: If the model has no pooling head, for a wrong picture size, or for pictures that are no tensor.
        """
        _check_tensor(pixel_values, "pixel_values", "images")
        output = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True)
        return self._embeds(output.pooler_output, normalize)

    def encode_text(self, input_ids: torch.Tensor, *, normalize: bool = True) -> torch.Tensor:
        """Embeds texts.

        Args:
            input_ids: (N, L), padded to the model's length, as the tokenizers of this package do.
            normalize: Scale each embedding to length 1, as needed for cosine similarity.

        Returns:
            (N, E), in the model's dtype, with a graph where gradients are on.

        Raises:
            ValueError: If a text is longer than the model's positions, or for texts that are no tensor of ids.
        """
        _check_tensor(input_ids, "input_ids", "text")
        output = self.text_model(input_ids, last_token_only=True, return_dict=True)
        return self._embeds(output.pooler_output, normalize)

    @staticmethod
    def _embeds(pooled: torch.Tensor | None, normalize: bool = True) -> torch.Tensor:
        if pooled is None:
            raise ValueError(
                "this model has no pooling head (vision_use_head=False), so it has no image embeddings; use "
                "model.vision_model(pixel_values).last_hidden_state"
            )
        return l2_normalize(pooled) if normalize else pooled

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Returns the text tower's output, as the installed transformers does; `encode_text` returns a tensor.

        Args:
            input_ids: (texts, L), padded to the model's length.
            attention_mask: (texts, L); SigLIP was trained without one.
            position_ids: (texts, L) or (1, L); 0 to L - 1 by default.
            **kwargs: Options of the tower, such as `output_hidden_states`.

        Returns:
            `last_hidden_state` (texts, L, D) and `pooler_output` (texts, E), not normalized.
        """
        return self.text_model(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs
    ) -> SiglipPoolingOutput:
        """Returns the vision tower's output, as the installed transformers does; `encode_image` returns a tensor.

        Args:
            pixel_values: (images, C, height, width), normalized as the image processor does.
            interpolate_pos_encoding: Accept another picture size than the configured one.
            **kwargs: Options of the tower, such as `output_hidden_states`.

        Returns:
            `last_hidden_state` (images, N, D) and `pooler_output` (images, E), not normalized.
        """
        return self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> SiglipOutput:
        """Compares every image with every text; with only one of the two inputs, embeds that one.

        Args:
            input_ids: (texts, L) token ids, padded to the model's length.
            pixel_values: (images, C, height, width).
            attention_mask: See `SiglipTextModel.forward`; leave it out.
            position_ids: (texts, L), 0..L-1 by default.
            return_loss: Also return the sigmoid loss; image i and text i are a pair.
            interpolate_pos_encoding: Accept another picture size than the configured one.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            See `SiglipOutput`.

        Raises:
            ValueError: Without any input, and for a loss where images and texts are not as many.
        """
        return self._compare(
            {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding},
            {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids},
            return_loss,
            kwargs,
        )

    def _compare(
        self, images: dict[str, Any], texts: dict[str, Any], return_loss: bool | None, kwargs: dict[str, Any]
    ) -> SiglipOutput:
        """The body of `forward`, given the inputs of each tower, of which NaFlex has others."""
        input_ids, pixel_values = texts["input_ids"], images["pixel_values"]
        if input_ids is None and pixel_values is None:
            raise ValueError(f"{type(self).__name__} needs input_ids, pixel_values or both; got neither")
        if return_loss:
            self._check_pairs(input_ids, pixel_values)
        self._pass_on_output_flags(kwargs)

        vision_output = text_output = image_embeds = text_embeds = logits_per_text = loss = None
        if pixel_values is not None:
            vision_output = self.vision_model(**images, **kwargs)
            if vision_output.pooler_output is not None:
                image_embeds = self._embeds(vision_output.pooler_output)
        if input_ids is not None:
            text_output = self.text_model(**texts, **kwargs)
            text_embeds = self._embeds(text_output.pooler_output)

        if text_embeds is not None and image_embeds is not None:
            # With a device map the towers may lie on different devices.
            image_embeds = image_embeds.to(text_embeds.device)
            logit_scale, logit_bias = self.logit_scale.to(text_embeds.device), self.logit_bias.to(text_embeds.device)
            cosine = text_embeds @ image_embeds.t()  # (texts, images)
            logits_per_text = cosine * logit_scale.exp() + logit_bias
            if return_loss:
                loss = sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias)
        alone = text_output if pixel_values is None else vision_output if input_ids is None else None
        return SiglipOutput(
            loss=loss,
            logits_per_image=None if logits_per_text is None else logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=vision_output,
            pooler_output=None if alone is None else alone.pooler_output,
        )

    def _check_pairs(self, input_ids: torch.Tensor | None, pixel_values: torch.Tensor | None) -> None:
        images = 0 if pixel_values is None else len(pixel_values)
        texts = 0 if input_ids is None else len(input_ids)
        if images != texts or not self.config.vision_config.vision_use_head:
            raise ValueError(
                f"the loss needs image-text pairs, image i with text i: got {images} images and {texts} texts"
                + ("" if self.config.vision_config.vision_use_head else " and a model without pooling head")
            )


class SiglipForImageClassification(SiglipPreTrainedModel):
    """The vision tower with a linear layer on the mean of its tokens, or with the head that `siglip_hf.learn` made.

    Examples:
        >>> from siglip_hf import SiglipForImageClassification, SiglipImageProcessor, default_checkpoint
        >>> model = SiglipForImageClassification.from_pretrained(default_checkpoint(), num_labels=3)  # a new layer
        >>> processor = SiglipImageProcessor.from_pretrained(default_checkpoint())
        >>> model(**processor("drawings/cat.png", return_tensors="pt")).logits.shape
        torch.Size([1, 3])
    """

    config: SiglipConfig
    input_modalities = ["image"]  # noqa: RUF012
    # The weights of a vision-only checkpoint, which has no such prefix, belong below it.
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    _auto_classes = ("AutoModelForImageClassification",)
    _vision_class: type[SiglipVisionModel] = SiglipVisionModel

    @classmethod
    def _config_classes(cls) -> tuple[Any, ...]:
        return cls.config_class, cls._vision_class.config_class

    def __init__(self, config: SiglipConfig | SiglipVisionConfig):
        super().__init__(config)
        config = self.config
        vision_config: Any = config.vision_config if isinstance(config, SiglipConfig) else config
        self.num_labels = config.num_labels or 0
        self.vision_model = self._vision_class._from_config(vision_config)
        self.is_learned = vision_config.learned_head is not None
        if self.vision_model.use_head and not self.is_learned:
            # Kept so that checkpoints stay complete, but not part of this model's function: without a gradient
            # distributed training would wait for it forever.
            self.vision_model.head.requires_grad_(False)
        layer = LearnedHead if self.is_learned else nn.Linear
        self.classifier = layer(vision_config.hidden_size, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    def fill_new_parameters(self) -> None:
        """Gives what no checkpoint has filled its initial values."""
        if isinstance(self.classifier, nn.Linear):
            factor = getattr(self.config, "initializer_factor", 1.0)
            init.normal_(self.classifier.weight, std=self.classifier.in_features**-0.5 * factor)
            init.zeros_(self.classifier.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the patch embedding."""
        return self.vision_model.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the patch embedding."""
        self.vision_model.embeddings.patch_embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Returns the classifier, which transformers and PEFT spare when they quantize or adapt all linear layers."""
        return self.classifier

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Classifies pictures.

        Args:
            pixel_values: (B, C, height, width).
            labels: (B,) class numbers, (B, num_labels) multi-hot (integers will do), or (B,) numbers to regress, as
                `config.problem_type` says; inferred from the labels where it is not set.
            interpolate_pos_encoding: Accept another picture size than the configured one.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `loss` (scalar, with labels), `logits` (B, num_labels), `hidden_states`, `attentions`.
        """
        self._pass_on_output_flags(kwargs)
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, pool=self.is_learned, **kwargs
        )
        features = outputs.pooler_output if self.is_learned else outputs.last_hidden_state.mean(dim=1)
        return self._classify(features, labels, outputs)

    def _classify(
        self, features: torch.Tensor, labels: torch.Tensor | None, outputs: SiglipPoolingOutput
    ) -> ImageClassifierOutput:
        """Logits and, with labels, the loss of features (B, D)."""
        logits = self.classifier(features)  # (B, num_labels)
        loss = None
        if labels is not None:
            problem_type = self.config.problem_type
            try:
                # Stock takes integers for class numbers; a row of them is multi-hot, unless it is one number.
                if labels.ndim == 2 and labels.shape[1] > 1 and self.num_labels > 1 and problem_type is None:
                    self.config.problem_type = "multi_label_classification"
                if self.config.problem_type == "multi_label_classification":
                    labels = labels.to(logits.dtype)
                loss = self.loss_function(labels, logits, self.config)
            except Exception:
                self.config.problem_type = problem_type  # a refused call leaves no trace
                raise
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "SiglipForImageClassification",
    "SiglipModel",
    "SiglipPreTrainedModel",
    "SiglipTextModel",
    "SiglipVisionModel",
]
