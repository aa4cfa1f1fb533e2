"""What all SigLIP models share: loading, saving, initial values, and which outputs are asked for."""

# Without postponed annotations: transformers reads the class from that of `config`.
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from siglip_hf.models.adapters import add_lora_targets
from siglip_hf.models.checkpoint_kind import refuse_other_kind
from siglip_hf.models.configuration_siglip import SiglipConfig
from siglip_hf.models.layers import SiglipAttention, SiglipEncoderLayer
from siglip_hf.models.quantization import drop_undotted_names, is_reversible, keep_4bit_layout
from siglip_hf.preprocessing.identity import KnownAsStock, is_ours, reference_in, repository_class, warn_of_own_code

logger = logging.get_logger(__name__)


class SiglipPreTrainedModel(KnownAsStock, PreTrainedModel):
    """Loading, saving and initial values; the base of all SigLIP models."""

    config: SiglipConfig
    base_model_prefix = "siglip"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = [  # noqa: RUF012
        "SiglipTextEmbeddings",
        "SiglipVisionEmbeddings",
        "SiglipEncoderLayer",
        "SiglipAttentionPoolingHead",
    ]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SiglipEncoderLayer,
        "attentions": SiglipAttention,
    }

    # The Auto classes that give this class.
    _auto_classes: tuple[str, ...] = ("AutoModel",)

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any):
        add_lora_targets()
        config = self._own_config(config)
        config.check()
        super().__init__(config, *inputs, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Loads weights and configuration; arguments and errors as of every model of transformers.

        Called by an Auto class with `trust_remote_code=True`, it gives the model that the repository brings.
        """
        name = pretrained_model_name_or_path
        if kwargs.get("trust_remote_code") and (found := cls._own_code(config)):  # only Auto classes pass both
            kind, reference = found
            own = repository_class(reference, name, kind, kwargs)
            return own.from_pretrained(name, *model_args, config=_config_for(own, config), **kwargs)
        return super().from_pretrained(name, *model_args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if found := cls._own_code(config):
            kind, reference = found
            warn_of_own_code(reference, config.name_or_path, f"{kind}.from_config", cls)
        return super()._from_config(config, **kwargs)

    @classmethod
    def _own_code(cls, config: Any) -> tuple[str, str] | None:
        """(Auto class, "module.Class") of the code that a repository's configuration names in place of this class."""
        auto_map = getattr(config, "auto_map", None)
        found = ((kind, reference_in(auto_map, kind)) for kind in cls._auto_classes if is_ours(cls))
        return next(((kind, reference) for kind, reference in found if reference), None)

    @classmethod
    def _own_config(cls, config: Any) -> Any:
        """This package's form of a configuration, such as transformers' own object; refuses that of another part.

        Raises:
            ValueError: If it describes another part or family.
        """
        for config_class in cls._config_classes():
            own = config_class.of(config)
            if isinstance(own, config_class):
                return own
        wanted = " or ".join(config_class.__name__ for config_class in cls._config_classes())
        raise ValueError(
            f"{cls.__name__} takes a {wanted}, and this is a {type(config).__name__} (model_type "
            f"{getattr(config, 'model_type', None)!r}); use the class of that part, or AutoModel"
        )

    @classmethod
    def _config_classes(cls) -> tuple[Any, ...]:
        return (cls.config_class,)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside of transformers the base class skips modules that own no parameter directly, such as the
        # attention layers. That guards against code that overwrites loaded tensors; `init` below never does.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fills new parameters as the original code does; `init` leaves alone what a checkpoint has filled."""
        fill: Any = getattr(module, "fill_new_parameters", None)
        if fill is not None:
            fill()
        elif isinstance(module, nn.Embedding):
            init.default_flax_embed_init_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            init.lecun_normal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """As in transformers, but NaFlex weights are refused, and quantized models can be loaded and saved again."""
        refuse_other_kind(model, state_dict, checkpoint_files)
        drop_undotted_names(getattr(load_config.hf_quantizer, "metadata", {}))
        result = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [entry for entry in conversions if is_reversible(entry)]
        keep_4bit_layout(model)
        return result

    def _pass_on_output_flags(self, kwargs: dict[str, Any]) -> None:
        """Makes what the joint configuration asks for reach the towers, which have configurations of their own."""
        for flag in ("output_hidden_states", "output_attentions"):
            if kwargs.get(flag) is None and getattr(self.config, flag):
                kwargs[flag] = True

    def _resolve_attentions(self, kwargs: dict[str, Any]) -> bool:
        """Whether attention weights are wanted; if so, makes sure the blocks run an implementation that has them."""
        wanted = kwargs.get("output_attentions")
        wanted = self.config.output_attentions if wanted is None else wanted
        if wanted and self.config._attn_implementation != "eager":
            logger.warning_once(
                f"attn_implementation={self.config._attn_implementation!r} does not return attention weights; with "
                "output_attentions=True this model computes attention with 'eager' instead"
            )
            kwargs["attn_implementation"] = "eager"
        return bool(wanted)


def _config_for(model_class: Any, config: Any) -> Any:
    """A configuration in the form that a repository's model class takes."""
    config_class = getattr(model_class, "config_class", None)
    if config_class is None or isinstance(config, config_class):
        return config
    own = config_class.from_dict(config.to_dict())
    # What loading has noted on the object, such as its name, the attention implementation and the commit.
    vars(own).update({key: value for key, value in vars(config).items() if key.startswith("_")})
    return own
