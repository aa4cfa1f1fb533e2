"""SigLIP and SigLIP 2 for transformers: import it, and AutoModel, AutoProcessor and pipeline use its classes."""

import sys

from siglip_hf._lazy import lazy_names
from siglip_hf._moved import keep_old_paths
from siglip_hf.registration import register

__all__, __getattr__, __dir__ = lazy_names(__name__)

keep_old_paths(__name__)
# The command line parses its arguments before anything costly is imported, and registers when it loads a model.
if not getattr(sys.modules.get("siglip_hf_command"), "is_parsing", False):
    register()
