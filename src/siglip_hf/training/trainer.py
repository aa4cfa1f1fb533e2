"""transformers' Trainer for SigLIP: the loss of the whole batch, over processes and micro-batches.

What it changes: where batches come from, one step, evaluation, the groups of the optimizer, and that a checkpoint
appears whole or not at all. All else is the Trainer's own.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from siglip_hf.data.sources import Source
from siglip_hf.data.streams import is_streamed
from siglip_hf.files import check_folder, seal_folder
from siglip_hf.losses.ring import control_group
from siglip_hf.losses.sigmoid import sigmoid_loss
from siglip_hf.models.layers import SiglipEncoderLayer
from siglip_hf.parallel import PIXELS
from siglip_hf.training.cached import cached_backward, embed_pairs, on_device, owner_of_scale, whole_parameter
from siglip_hf.training.collator import PairCollator, PictureCollator
from siglip_hf.training.locked import ImageStore
from siglip_hf.training.measuring import EvaluatedPictures, mean_cosines, measure_pairs
from siglip_hf.training.pairs import (
    Draw,
    PairSampler,
    check_templates,
    positive_groups,
    training_pairs,
)
from siglip_hf.training.streams import StreamDraws, StreamedPairs

# Checkpoints are written in here, inside the output folder, and moved out when they are whole.
_UNFINISHED = ".unfinished"
_SCALARS = ("logit_scale", "logit_bias")
_BROKEN_FILE = "broken.json"
_STREAM_FILE = "stream.json"
_SCALARS_FILE = "scale_and_bias.safetensors"


@dataclass
class SiglipTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what SigLIP adds.

    `gradient_accumulation_steps` splits one batch into micro-batches, and the loss stays that of the whole: the batch
    of the loss holds `per_device_train_batch_size` x `gradient_accumulation_steps` x processes pairs.

    Attributes:
        scale_learning_rate: Learning rate of `logit_scale` and `logit_bias`; that of all others by default.
        augment: Any of "crop", "flip", "color"; see `PairCollator`.
        captions: "random" or "first"; see `PairCollator`.
        templates: Texts with `{}`, for the labels of pictures that have no captions.
        loss_chunk_size: See `sigmoid_loss`.
        keep_graphs: See `cached_backward`.
        shuffle_buffer: Pairs of a stream among which each reader shuffles.
    """

    scale_learning_rate: float | None = None
    augment: list[str] = field(default_factory=list)
    captions: str = "random"
    templates: list[str] = field(default_factory=list)
    loss_chunk_size: int | None = None
    keep_graphs: int = 1
    shuffle_buffer: int = 2000
    # The collator reads records, of which none is a column of the model.
    remove_unused_columns: bool = False
    # Every parameter that is trained takes part in every step.
    ddp_find_unused_parameters: bool | None = False
    # It would wait for the accelerator at every step, to hide a loss that is not a number from the logs.
    logging_nan_inf_filter: bool = False


class SiglipTrainer(Trainer):
    """Trains a `SiglipModel` or `Siglip2Model` on pictures with captions or labels.

    Its logs add `scale` (the temperature, exp of `logit_scale`), `bias`, `positive_logit` and `negative_logit` (means
    over the pairs of a process, averaged over processes) and `pairs_per_second`. Its evaluation gives the `loss` of all
    pairs of the set as one batch, so that it grows with the set, and recall of retrieval both ways.

    Args:
        model: The model, possibly with LoRA adapters from `peft` or frozen parts (`freeze`).
        args: Most options; plain `TrainingArguments` will not do.
        train_dataset: A `datasets.Dataset` with pictures and one or many captions each, a `Source`, or what
            `open_source` takes; or a `datasets.IterableDataset` or what `open_stream` returns, which is never listed.
        eval_dataset: Likewise, or several of them in a dict.
        processing_class: The model's processor.
        image_store: Embeddings of the training pictures, from `store_images`. Then the image tower, which must be
            frozen, is not run.
        **kwargs: As for `Trainer`: `callbacks`, `optimizers`, `model_init`.

    Raises:
        ValueError: For data without pairs, a processor that is not the model's, a stale store.

    Examples:
        >>> from siglip_hf import SiglipModel, SiglipProcessor, default_checkpoint
        >>> from siglip_hf.training import SiglipTrainer, SiglipTrainingArguments
        >>> model = SiglipModel.from_pretrained(default_checkpoint())
        >>> trainer = SiglipTrainer(
        ...     model,
        ...     SiglipTrainingArguments("run", max_steps=1, per_device_train_batch_size=4),
        ...     train_dataset="classes",  # a folder for each class; folders with captions and tables work too
        ...     processing_class=SiglipProcessor.from_pretrained(default_checkpoint()),
        ... )
        >>> result = trainer.train()
    """

    args: SiglipTrainingArguments
    # What the Trainer allows to be many things is one here.
    model: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: SiglipTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        image_store: ImageStore | None = None,
        **kwargs: Any,
    ):
        args = SiglipTrainingArguments() if args is None else args
        if not isinstance(args, SiglipTrainingArguments):
            raise ValueError("args must be SiglipTrainingArguments, which take all that TrainingArguments do.")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process. Start with torchrun or accelerate launch, or choose "
                "one: CUDA_VISIBLE_DEVICES=0."
            )
        if processing_class is None or not hasattr(processing_class, "image_processor"):
            raise ValueError("processing_class must be the model's processor: SiglipProcessor.from_pretrained(...).")
        if hasattr(processing_class, "check_fits") and hasattr(model, "config"):
            processing_class.check_fits(model)
        self.templates = check_templates(args.templates)
        train_source: Source | StreamedPairs | None = None
        self._stream: StreamDraws | None = None
        if is_streamed(train_dataset) or isinstance(train_dataset, StreamedPairs):
            train_source = train_dataset if isinstance(train_dataset, StreamedPairs) else StreamedPairs(train_dataset)
            if args.max_steps < 1 or image_store is not None:
                raise ValueError("A stream has no length and no store: give max_steps, and no image_store.")
        elif train_dataset is not None:
            train_source = training_pairs(train_dataset)
        collator = None
        if train_source is not None:
            if image_store is not None:
                _check_locked(model, image_store)
                image_store.check(model, processing_class, train_source)  # type: ignore[arg-type]
            collator = PairCollator(
                processing_class,
                train_source,
                seed=args.seed if args.data_seed is None else args.data_seed,
                augment=args.augment,
                captions=args.captions,
                templates=args.templates,
                store=image_store,
            )
            if isinstance(train_source, StreamedPairs):
                readers = max(1, args.world_size) * max(1, args.dataloader_num_workers)
                chunk = args.per_device_train_batch_size
                self._stream = StreamDraws(train_source, collator.seed, args.shuffle_buffer, readers, chunk)
        if isinstance(eval_dataset, Mapping) and not hasattr(eval_dataset, "column_names"):
            eval_dataset = {name: training_pairs(value) for name, value in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = training_pairs(eval_dataset)
        super().__init__(
            model,
            args,
            data_collator=collator,
            train_dataset=train_source,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.broken: dict[str, str] = {}
        """Of each picture that could not be read, by the id of its record, the reason; of this process's share."""
        # The loss of a step is that of its whole batch, not a sum of parts to be divided.
        self.loss_is_scaled_for_ga = True
        self._micro_batches: list[dict[str, Any]] = []
        self._latest: tuple[Tensor, Tensor, Tensor | None] | None = None  # what the last step had, for the logs
        self._timer: tuple[float, int] | None = None
        self._writes_checkpoint = False

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; FSDP2 also on CPUs, and of the blocks, whatever the launcher."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate shards on accelerators only, although FSDP2 does it on CPUs as well.
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if state.mixed_precision != "no":
                plugin.set_mixed_precision(state.mixed_precision)
            state.fsdp_plugin = plugin
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled and not state.fsdp_plugin.transformer_cls_names_to_wrap:
            # Only the blocks: accelerate shards the token embedding by itself, and what lies in a module that it has
            # sharded before, as `_no_split_modules` would have it, cannot be sharded again.
            state.fsdp_plugin.transformer_cls_names_to_wrap = [SiglipEncoderLayer.__name__]

    # Data

    @property
    def batch_size(self) -> int:
        """Pairs in the loss of one step, over micro-batches and processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches of this process.

        Raises:
            ValueError: Without a training set.
        """
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        source, seed = self.train_dataset, self.data_collator.seed

        def epoch() -> int | None:
            finished = 0 < self.state.max_steps <= self.state.global_step
            return None if finished else self.state.global_step // sampler.steps

        if self._stream is None:
            sampler = PairSampler(len(source), self.batch_size, seed, epoch)
            loader = self._loader(_Draws(source), self.args.train_batch_size, self.data_collator, sampler)
        else:  # the whole run is one epoch, of which the Trainer skips what was taken, by number
            numbers = range(self.args.max_steps * self.batch_size)
            loader = self._loader(self._stream, self.args.train_batch_size, self.data_collator, numbers)
        # A batch larger than memory waits on the CPU, and each micro-batch is moved when its turn comes. The keys of a
        # batch stay there: read from an accelerator, they would have to wait for all that it has to do.
        loader.device = None  # type: ignore[attr-defined]
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Pictures of the evaluation set, each once; its dataset also holds the texts.

        Raises:
            ValueError: Without an evaluation set.
        """
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
            if eval_dataset is None:
                raise ValueError("evaluation needs an eval_dataset")
        pictures = EvaluatedPictures(training_pairs(eval_dataset), self.templates)
        return self._loader(pictures, self.args.eval_batch_size, PictureCollator(self.processing_class))

    def _loader(self, dataset: Dataset, batch_size: int, collate: Any, sampler: Any = None) -> DataLoader:
        args = self.args
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=functools.partial(_limit_pictures, PIXELS.largest),
        )
        return self.accelerator.prepare(loader)

    # One step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Collects micro-batches; the last one of a step sends the loss of all of them back.

        Returns:
            The loss of the whole batch, over processes too, with the last micro-batch; zero before it.
        """
        if self._timer is None:
            self._timer = (time.perf_counter(), self.state.global_step)
        self.broken.update(inputs.pop("broken"))
        if self._stream is not None:
            self._stream.places |= inputs.pop("lanes")
        self._micro_batches.append(inputs)
        if len(self._micro_batches) < self.current_gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        batches, self._micro_batches = self._micro_batches, []
        positives = self._positives(batches)
        if len(batches) == 1:
            inputs = {**on_device(batches[0], self.args.device), "positives": positives}
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        with self.accelerator.autocast():
            result = cached_backward(
                model,
                batches,
                group=self._group(),
                chunk_size=self.args.loss_chunk_size,
                positives=positives,
                keep_graphs=self.args.keep_graphs,
                scaler=self.accelerator.scaler,
            )
        self._latest = (result.image_embeds, result.text_embeds, positives)
        return result.loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch of each process as one batch.

        Its gradients are such that their mean over processes, which DDP and FSDP take, is exact.
        """
        inputs = dict(inputs)
        for name in ("broken", "lanes"):
            inputs.pop(name, None)
        positives = inputs.pop("positives") if "positives" in inputs else self._positives([inputs])
        images, texts = embed_pairs(model, inputs)
        owner = owner_of_scale(model)
        # accelerate has turned the embeddings back to float32; the products of the loss are mixed precision as well.
        with self.accelerator.autocast():
            loss = sigmoid_loss(
                images,
                texts,
                *(whole_parameter(getattr(owner, name)) for name in _SCALARS),
                positives=positives,
                chunk_size=self.args.loss_chunk_size,
                group=self._group(),
            )
        self._latest = (images.detach(), texts.detach(), positives)
        return (loss, {"image_embeds": images, "text_embeds": texts}) if return_outputs else loss

    def _group(self) -> Any:
        return dist.group.WORLD if self.args.world_size > 1 else None

    def _positives(self, batches: Sequence[dict[str, Any]]) -> Tensor | None:
        """Groups of pairs that share a picture or a text, over all processes; takes the keys out of the batches."""
        keys = [torch.cat([batch.pop(name) for batch in batches]) for name in ("picture_keys", "text_keys")]
        own = torch.stack(keys, dim=1).cpu()  # (B, 2)
        everyone = [own]
        if self.args.world_size > 1:
            everyone = [torch.empty_like(own) for _ in range(self.args.world_size)]
            dist.all_gather(everyone, own, group=control_group(dist.group.WORLD))
        groups = positive_groups(*torch.cat(everyone).unbind(dim=1))
        if groups is None:
            return None
        return groups.chunk(len(everyone))[self.args.process_index].to(self.args.device, non_blocking=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what is worth watching to the logs of training."""
        if "loss" in logs and self._latest is not None and self._timer is not None:
            owner = owner_of_scale(self.model_wrapped)
            scale, bias = (whole_parameter(getattr(owner, name)).detach().float().item() for name in _SCALARS)
            means = mean_cosines(*self._latest)
            if self.args.world_size > 1:
                means = self.accelerator.reduce(means, reduction="mean")
            now, steps = time.perf_counter(), self.state.global_step - self._timer[1]
            logs["scale"], logs["bias"] = float(np.exp(scale)), bias
            logs["positive_logit"], logs["negative_logit"] = (logs["scale"] * mean + bias for mean in means.tolist())
            logs["pairs_per_second"] = steps * self.batch_size / max(now - self._timer[0], 1e-9)
            self._timer = (now, self.state.global_step)
        super().log(logs, start_time)

    # Optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The kernels of linear and convolutional layers, as in the original code.

        Not biases, norms, scale, bias, token and position embeddings, and the probe of the pooling head.
        """
        kinds = (nn.Linear, nn.Conv2d)
        return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Also gives scale and bias a group of their own, if they have their own learning rate."""
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made_here and self.args.scale_learning_rate is not None:
            owner = owner_of_scale(self.model if model is None else model)
            scalars = [value for value in (getattr(owner, name) for name in _SCALARS) if value.requires_grad]
            if scalars:
                for group in optimizer.param_groups:
                    group["params"] = [value for value in group["params"] if all(value is not each for each in scalars)]
                own = {"params": scalars, "lr": self.args.scale_learning_rate, "weight_decay": 0.0}
                optimizer.add_param_group(own)
        return optimizer

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Embeds all pictures and texts, spread over the processes. The first measures the set and tells the others.

        Raises:
            ValueError: If no picture of the set can be read.
        """
        model: Any = self.model
        if not self.accelerator._models:  # evaluated without training
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        dataset: EvaluatedPictures = dataloader.dataset  # type: ignore[assignment]
        images: dict[int, Tensor] = {}
        for batch in dataloader:
            self.broken.update(batch.pop("broken"))
            places = torch.where(batch.pop("readable"), batch.pop("places"), -1)
            images |= self._embed(model, batch, "image_embeds", places)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        texts = self._embed_texts(model, [text for text, _ in dataset.texts])
        owner = owner_of_scale(model)
        scalars = [whole_parameter(getattr(owner, name)).detach().float().cpu() for name in _SCALARS]

        outcome: list[Any] = [None]
        if self.args.process_index == 0:
            try:
                outcome = [measure_pairs(dataset, images, texts, scalars)]
            except ValueError as error:  # it stops all processes, not the first alone
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], ValueError):
            raise outcome[0]
        count, measures = outcome[0]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measures.items()}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=count)

    @torch.no_grad()
    def _embed(self, model: nn.Module, inputs: dict[str, Any], name: str, places: Tensor) -> dict[int, Tensor]:
        """The embedding (E,) by place of all processes' inputs, as many on each; on the CPU of the first process alone.

        Args:
            model: As prepared for evaluation.
            inputs: Of one tower.
            name: Which output is wanted.
            places: (B,) integers; -1 for what is left out.
        """
        with self.compute_loss_context_manager():
            rows = model(**self._prepare_inputs(inputs), return_dict=True)[name].float()  # (B, E)
        places, rows = (self._to_first(value) for value in (places.to(rows.device), rows))
        return {place: row for place, row in zip(places.tolist(), rows, strict=True) if place >= 0}

    def _to_first(self, own: Tensor) -> Tensor:
        """The rows of all processes' tensors, on the CPU of the first process; none elsewhere."""
        if self.args.world_size <= 1:
            return own.cpu()
        first = self.args.process_index == 0
        parts = [torch.empty_like(own) for _ in range(self.args.world_size)] if first else None
        dist.gather(own.contiguous(), parts)
        return own[:0].cpu() if parts is None else torch.cat(parts).cpu()

    def _embed_texts(self, model: nn.Module, texts: list[str]) -> dict[int, Tensor]:
        """As `_embed`, all texts by place. Each process embeds as many batches, since sharded towers run in step."""
        size, world, rank = self.args.eval_batch_size, max(1, self.args.world_size), self.args.process_index
        found: dict[int, Tensor] = {}
        for first in range(0, len(texts), size * world):
            start = first + rank * size
            stop = start + size if world > 1 else min(start + size, len(texts))
            places = [place % len(texts) for place in range(start, stop)]
            inputs = self.processing_class(text=[texts[place] for place in places], return_tensors="pt")
            found |= self._embed(model, dict(inputs), "text_embeds", torch.tensor(places))
        return found

    def broken_everywhere(self) -> dict[str, str]:
        """`broken` of all processes; each of them must call."""
        return self._everywhere(self.broken)

    def _everywhere(self, own: dict[Any, Any]) -> dict[Any, Any]:
        everyone: list[Any] = [own]
        if self.args.world_size > 1:
            everyone *= self.args.world_size
            dist.all_gather_object(everyone, own)
        return {key: value for part in everyone for key, value in part.items()}

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Beside adapters, also scale and bias if they are trained, which adapter files have no place for."""
        super()._save(output_dir, state_dict)
        scalars = self._scalars_beside_adapters()
        if scalars and self.args.should_save:
            values = {name: value.detach().cpu() for name, value in scalars.items()}
            save_file(values, os.path.join(output_dir or str(self.args.output_dir), _SCALARS_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_folder(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        counted, streamed = (Path(resume_from_checkpoint, name) for name in (_BROKEN_FILE, _STREAM_FILE))
        if counted.exists():
            self.broken.update(json.loads(counted.read_text()))
        if self._stream is not None and streamed.exists():
            self._stream.load_state_dict(json.loads(streamed.read_text()))
        path = os.path.join(resume_from_checkpoint, _SCALARS_FILE)
        if os.path.exists(path):
            values = load_file(path)
            with torch.no_grad():
                for name, value in self._scalars_beside_adapters().items():
                    value.copy_(values[name])

    def _scalars_beside_adapters(self) -> dict[str, Tensor]:
        if not hasattr(self.model, "peft_config"):
            return {}
        owner = owner_of_scale(self.model)
        return {name: getattr(owner, name) for name in _SCALARS if getattr(owner, name).requires_grad}

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _UNFINISHED) if self._writes_checkpoint else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint beside its place and moves it there when it is whole: no kill leaves half of one."""
        folder = self._get_output_dir(trial)
        unfinished, name = os.path.join(folder, _UNFINISHED), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writes_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writes_checkpoint = False
        broken = self.broken_everywhere()
        if self._stream is not None:  # what another process has read may be read by this one when the run goes on
            self._stream.places = self._everywhere(self._stream.places)
        self.accelerator.wait_for_everyone()
        whole = os.path.join(folder, name)
        if self.state.best_model_checkpoint == os.path.join(unfinished, name):
            self.state.best_model_checkpoint = whole
        if self.args.should_save:
            self.state.save_to_json(os.path.join(unfinished, name, "trainer_state.json"))
            Path(unfinished, name, _BROKEN_FILE).write_text(json.dumps(broken, ensure_ascii=False))
            if self._stream is not None:
                Path(unfinished, name, _STREAM_FILE).write_text(json.dumps(self._stream.state_dict()))
            seal_folder(os.path.join(unfinished, name))
            shutil.rmtree(whole, ignore_errors=True)
            os.replace(os.path.join(unfinished, name), whole)
            shutil.rmtree(unfinished, ignore_errors=True)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(folder, save_total_limit=self.args.save_total_limit, best_model_checkpoint=best)
        self.accelerator.wait_for_everyone()


class _Draws(Dataset):
    """The training pairs, by place and number of the draw."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, drawn: tuple[int, int]) -> Draw:
        return Draw(self.source[drawn[0]], drawn[1])


def _limit_pictures(largest: int | None, worker: int) -> None:
    """Sets the largest picture in a process that reads for this one; a new process does not inherit it."""
    PIXELS.largest = largest


def _check_locked(model: Any, store: ImageStore) -> None:
    trained = [name for name, value in model.named_parameters() if "vision_model" in name and value.requires_grad]
    if trained:
        raise ValueError(
            f"{store.folder} holds embeddings of a locked image tower, but {trained[0]} would be trained; call "
            'freeze(model, "image") first.'
        )
