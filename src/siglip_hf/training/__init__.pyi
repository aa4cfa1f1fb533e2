# The public names and where each is defined; `__init__.py` reads this file.

from siglip_hf.training.cached import CachedLoss as CachedLoss
from siglip_hf.training.cached import cached_backward as cached_backward
from siglip_hf.training.collator import PairCollator as PairCollator
from siglip_hf.training.locked import ImageStore as ImageStore
from siglip_hf.training.locked import freeze as freeze
from siglip_hf.training.locked import store_images as store_images
from siglip_hf.training.trainer import SiglipTrainer as SiglipTrainer
from siglip_hf.training.trainer import SiglipTrainingArguments as SiglipTrainingArguments
