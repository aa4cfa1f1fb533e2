"""SigLIP configurations: text tower, vision tower, and both, with the shapes of the published checkpoints.

Field names and defaults are those of the published `config.json` files, so every hub configuration loads unchanged.
Source of the shapes: https://arxiv.org/abs/2303.15343 (SigLIP), https://arxiv.org/abs/2502.14786 (SigLIP 2) and the
configurations in google-research/big_vision.
"""

from __future__ import annotations

import difflib
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from siglip_hf.preprocessing.identity import is_ours, reference_in, warn_of_own_code

logger = logging.get_logger(__name__)


def as_pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """Returns `(height, width)` of a size given as one number (square) or as two.

    Raises:
        ValueError: If a sequence does not hold exactly two numbers.
    """
    if isinstance(size, int):
        return size, size
    if len(size) != 2:
        raise ValueError(f"a size is one number or (height, width); got {list(size)}")
    return size[0], size[1]


class _SiglipConfigMixin:
    """What the three configurations share: keys that look like misspelt fields are named, since nothing reads them."""

    @classmethod
    def of(cls, config: Any) -> Any:
        """This class's form of transformers' configuration of the same part; any other one as it is."""
        if isinstance(config, cls) or cls.__name__ not in (parent.__name__ for parent in type(config).__mro__):
            return config
        parts = {name: getattr(config, name) for name in getattr(cls, "sub_configs", ())}
        own = cls.from_dict(config.to_dict() | parts)
        # What loading has noted on the object, such as the attention implementation and the commit.
        vars(own).update({key: value for key, value in vars(config).items() if key.startswith("_")})
        return own

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a file's fields; that of a tower alone, if the file is that of another part.

        Filled up with defaults it would be a model of other shapes, into which a part of the weights fits in silence.
        """
        family, model_type = cls.model_type.split("_")[0], config_dict.get("model_type")  # type: ignore[attr-defined]
        if model_type in (f"{family}_text_model", f"{family}_vision_model") and model_type != cls.model_type:  # type: ignore[attr-defined]
            return CONFIG_MAPPING[model_type].from_dict(config_dict, **kwargs)
        if (reference := reference_in(config_dict.get("auto_map"), "AutoConfig")) and is_ours(cls):
            name = kwargs.get("name_or_path") or config_dict.get("_name_or_path") or ""
            warn_of_own_code(reference, name, "AutoConfig", cls)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def _warn_of_misspelt_keys(self, extra: dict[str, Any]) -> None:
        # A warning, because files of vision-language models, of older versions of transformers and of other programs
        # hold keys of their own. Compared with the fields of SigLIP only: transformers' come and go with its versions.
        fields = set(self.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)  # type: ignore[attr-defined]
        for key in extra:
            if hasattr(type(self), key):  # class attributes such as model_type stand in the files too
                continue
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.9)
            if near:
                logger.warning_once(f"{type(self).__name__} has no field {key!r}; did you mean {near[0]!r}?")


class _SiglipTowerConfig(_SiglipConfigMixin, PreTrainedConfig):
    """Fields of both towers (a Transformer encoder each)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0

    # What `siglip_hf.learn` found out about the classifier on a vision tower, which then takes the embedding:
    # `unknown_below`, the cosine with the nearest class below which a picture is of none, and the measures. Only in
    # files that it wrote: no field, so that all others stay stock's.
    learned_head: ClassVar[dict[str, Any] | None] = None

    def __post_init__(self, **kwargs):
        self._warn_of_misspelt_keys(kwargs)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Makes sure that a model can be built. A model calls it, not `__init__`: configurations also hold each other.

        Raises:
            ValueError: If the values cannot make a model; the message names them.
        """
        for name, least in (
            ("hidden_size", 1),
            ("intermediate_size", 1),
            ("num_attention_heads", 1),
            ("num_hidden_layers", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        if self.hidden_act not in ACT2FN:
            near = difflib.get_close_matches(self.hidden_act, ACT2FN, n=3, cutoff=0.4)
            raise ValueError(f"there is no hidden_act {self.hidden_act!r}; the nearest are {near}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )


@strict
class SiglipTextConfig(_SiglipTowerConfig):
    """Configuration of the SigLIP text tower.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width D of the Transformer.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Number of Transformer blocks.
        num_attention_heads: Number of heads H; D must be a multiple of it.
        max_position_embeddings: Text length L. The model was trained on texts padded to exactly this length.
        hidden_act: Activation of the MLP.
        layer_norm_eps: Epsilon of the layer norms.
        attention_dropout: Dropout probability of the attention weights, in training only.
        pad_token_id: Padding token. Must lie in the vocabulary, since every text is padded with it.
        bos_token_id: Unused by the model; published configurations carry an id outside the vocabulary.
        eos_token_id: Unused by the model, likewise.
        projection_size: Width E of the embedding. Defaults to `hidden_size`.

    Examples:
        >>> from siglip_hf import SiglipTextConfig
        >>> SiglipTextConfig(num_hidden_layers=2).max_position_embeddings
        64
    """

    model_type = "siglip_text_model"
    base_config_key = "text_config"

    vocab_size: int = 32000
    max_position_embeddings: int = 64
    pad_token_id: int | None = 1
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
    projection_size: int | None = None

    def __post_init__(self, **kwargs):
        if self.projection_size is None:
            self.projection_size = self.hidden_size
        super().__post_init__(**kwargs)

    def validate_token_ids(self):
        """Replaces the base check, which warns about the bos and eos ids of every published configuration."""

    def check(self) -> None:
        """As of the base class; `pad_token_id` too.

        Raises:
            ValueError: If the values cannot make a model; the message names them.
        """
        super().check()
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id ({self.pad_token_id}) lies outside the vocabulary of {self.vocab_size} ids; texts are "
                "padded with it, so it must be one of them"
            )


@strict
class SiglipVisionConfig(_SiglipTowerConfig):
    """Configuration of the SigLIP vision tower.

    Args:
        hidden_size: Width D of the Transformer, and of the image embedding.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Number of Transformer blocks.
        num_attention_heads: Number of heads H; D must be a multiple of it.
        num_channels: Channels of the picture.
        image_size: Height and width in pixels: one number, or `(height, width)`.
        patch_size: Height and width of a patch in pixels: one number, or `(height, width)`.
        hidden_act: Activation of the MLP.
        layer_norm_eps: Epsilon of the layer norms.
        attention_dropout: Dropout probability of the attention weights, in training only.
        vision_use_head: Whether the tower ends in the attention-pooling head.

    Examples:
        >>> from siglip_hf import SiglipVisionConfig
        >>> config = SiglipVisionConfig(image_size=384)
        >>> (config.image_size // config.patch_size) ** 2  # patches
        576
    """

    model_type = "siglip_vision_model"
    base_config_key = "vision_config"

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    vision_use_head: bool = True

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches. Pixels that do not fill a patch at the lower and right edge are not seen."""
        (height, width), (patch_height, patch_width) = as_pair(self.image_size), as_pair(self.patch_size)
        return height // patch_height, width // patch_width

    def check(self) -> None:
        """As of the base class; the sizes of picture and patch too.

        Raises:
            ValueError: If the values cannot make a model; the message names them.
        """
        super().check()
        if self.num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, got {self.num_channels}")
        if min(as_pair(self.patch_size)) < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}")
        if min(self.patch_grid) < 1:
            raise ValueError(f"patch_size ({self.patch_size}) is larger than image_size ({self.image_size})")


@strict
class SiglipConfig(_SiglipConfigMixin, PreTrainedConfig):
    """Configuration of the two-tower SigLIP model.

    Args:
        text_config: Configuration of the text tower, or its fields as a dict.
        vision_config: Configuration of the vision tower, or its fields as a dict.
        initializer_factor: Factor on the initial scale of a new classification layer.

    Examples:
        >>> from siglip_hf import SiglipConfig
        >>> config = SiglipConfig.from_preset("siglip-so400m-patch14-384")
        >>> config.vision_config.image_size, config.text_config.max_position_embeddings
        (384, 64)
    """

    model_type = "siglip"
    # Newer versions of transformers have a richer table, and make configurations of dicts by it; ours works in all.
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": SiglipTextConfig, "vision_config": SiglipVisionConfig}

    # A dict, a configuration or None on the way in, a configuration afterwards.
    text_config: Any = None
    vision_config: Any = None
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs):
        self._warn_of_misspelt_keys(kwargs)
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if value is None or isinstance(value, dict):
                setattr(self, name, config_class(**(value or {})))
            else:
                setattr(self, name, config_class.of(value))
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Makes sure that a model can be built; the model calls it.

        Raises:
            ValueError: If a tower cannot be built, or the two embeddings differ in width; the message names the values.
        """
        self.text_config.check()
        self.vision_config.check()
        embedding, width = self.text_config.projection_size, self.vision_config.hidden_size
        if embedding != width:
            raise ValueError(
                f"text_config.projection_size ({embedding}) must equal vision_config.hidden_size ({width}): images and "
                "texts are compared in one space"
            )

    def validate_token_ids(self):
        """The text configuration checks its own ids."""

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: in the towers' parts too, only what a reader needs to know."""
        fields = super().to_diff_dict()
        for name in self.sub_configs:
            tower = getattr(self, name).to_diff_dict()
            fields[name] = {key: value for key, value in tower.items() if key != "transformers_version"}
        return fields

    @classmethod
    def from_text_vision_configs(
        cls, text_config: SiglipTextConfig, vision_config: SiglipVisionConfig, **kwargs
    ) -> SiglipConfig:
        """Makes the joint configuration of two towers."""
        return cls(text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), **kwargs)

    @classmethod
    def from_preset(cls, name: str, **kwargs) -> SiglipConfig:
        """Makes the configuration of a published checkpoint, e.g. `"siglip-base-patch16-224"`, without the network.

        Args:
            name: A key of `PRESETS`; a leading `"google/"` is ignored.
            **kwargs: Further fields of `SiglipConfig`.

        Raises:
            ValueError: If there is no such preset; the message names the nearest ones.
        """
        key = name.removeprefix("google/")
        if key not in PRESETS:
            near = difflib.get_close_matches(key, PRESETS, n=3, cutoff=0.3)
            raise ValueError(f"no preset {name!r}; the nearest are {near}, all are in siglip_hf.PRESETS")
        text, vision = PRESETS[key]
        return cls(text_config=dict(text), vision_config=dict(vision), **kwargs)


# Shapes of the towers: width, MLP width, blocks, heads. "so400m" is the shape-optimized ViT of
# https://arxiv.org/abs/2305.13035; "g-opt" is the SigLIP 2 giant, whose text tower is a so400m.
_SHAPE_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SHAPES: dict[str, dict[str, int]] = {
    size: dict(zip(_SHAPE_FIELDS, values, strict=True))
    for size, values in {
        "base": (768, 3072, 12, 12),
        "large": (1024, 4096, 24, 16),
        "so400m": (1152, 4304, 27, 16),
        "giant-opt": (1536, 6144, 40, 16),
    }.items()
}

# Vocabulary sizes: SentencePiece on English C4, on multilingual C4, and Gemma's.
_C4_EN, _MC4, _GEMMA = 32_000, 250_000, 256_000


def _preset(size: str, patch_size: int, image_size: int, vocab_size: int, length: int = 64) -> tuple[dict, dict]:
    vision = _SHAPES[size] | {"patch_size": patch_size, "image_size": image_size}
    text = _SHAPES["so400m" if size == "giant-opt" else size]
    text = text | {"vocab_size": vocab_size, "max_position_embeddings": length}
    text["projection_size"] = vision["hidden_size"]
    return text, vision


# Published checkpoint -> (fields of the text configuration, fields of the vision configuration).
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # SigLIP, https://huggingface.co/collections/google/siglip
    "siglip-base-patch16-224": _preset("base", 16, 224, _C4_EN),
    "siglip-base-patch16-256": _preset("base", 16, 256, _C4_EN),
    "siglip-base-patch16-384": _preset("base", 16, 384, _C4_EN),
    "siglip-base-patch16-512": _preset("base", 16, 512, _C4_EN),
    "siglip-base-patch16-256-multilingual": _preset("base", 16, 256, _MC4),
    "siglip-large-patch16-256": _preset("large", 16, 256, _C4_EN),
    "siglip-large-patch16-384": _preset("large", 16, 384, _C4_EN),
    "siglip-so400m-patch14-224": _preset("so400m", 14, 224, _C4_EN, length=16),
    "siglip-so400m-patch14-384": _preset("so400m", 14, 384, _C4_EN),
    "siglip-so400m-patch16-256-i18n": _preset("so400m", 16, 256, _MC4),
    # SigLIP 2 at fixed resolution, https://huggingface.co/collections/google/siglip2
    "siglip2-base-patch32-256": _preset("base", 32, 256, _GEMMA),
    "siglip2-base-patch16-224": _preset("base", 16, 224, _GEMMA),
    "siglip2-base-patch16-256": _preset("base", 16, 256, _GEMMA),
    "siglip2-base-patch16-384": _preset("base", 16, 384, _GEMMA),
    "siglip2-base-patch16-512": _preset("base", 16, 512, _GEMMA),
    "siglip2-large-patch16-256": _preset("large", 16, 256, _GEMMA),
    "siglip2-large-patch16-384": _preset("large", 16, 384, _GEMMA),
    "siglip2-large-patch16-512": _preset("large", 16, 512, _GEMMA),
    "siglip2-giant-opt-patch16-256": _preset("giant-opt", 16, 256, _GEMMA),
    "siglip2-giant-opt-patch16-384": _preset("giant-opt", 16, 384, _GEMMA),
    "siglip2-so400m-patch14-224": _preset("so400m", 14, 224, _GEMMA),
    "siglip2-so400m-patch14-384": _preset("so400m", 14, 384, _GEMMA),
    "siglip2-so400m-patch16-256": _preset("so400m", 16, 256, _GEMMA),
    "siglip2-so400m-patch16-384": _preset("so400m", 16, 384, _GEMMA),
    "siglip2-so400m-patch16-512": _preset("so400m", 16, 512, _GEMMA),
}

__all__ = ["PRESETS", "SiglipConfig", "SiglipTextConfig", "SiglipVisionConfig"]
