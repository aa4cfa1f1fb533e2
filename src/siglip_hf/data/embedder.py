"""Pictures and texts to arrays of embeddings: a checkpoint with its processor, batches, and threads that decode."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from siglip_hf.data.sources import Record, Source, open_source
from siglip_hf.files import parse_json, sha256_of_files
from siglip_hf.inference.label_bank import check_characters
from siglip_hf.inference.optimize import optimization
from siglip_hf.loading import default_checkpoint, load_checkpoint, pick_device
from siglip_hf.parallel import PIXELS, copies_by_itself, one_torch_thread, prefetch, send, usable_cores
from siglip_hf.preprocessing.image_intake import load_picture

if TYPE_CHECKING:
    from datasets import Dataset

#: Pictures that a thread decodes before it hands them on.
CHUNK_SIZE = 8

# Decoded pixels that a thread may hold before it resizes: many small pictures in one call are faster, large ones would
# fill the memory.
_HELD_PIXELS = 4_000_000

# Inputs that the NaFlex tower reads on the host.
_ON_HOST = frozenset({"pixel_attention_mask", "spatial_shapes"})

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_IMAGE_SETTINGS = (
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "patch_size",
    "max_num_patches",
)


class SiglipEmbedder:
    """Embeds pictures and texts with a SigLIP or SigLIP 2 checkpoint, NaFlex included.

    Attributes:
        name: the checkpoint, as it was given.
        model: the model, in evaluation mode on `device`.
        processor: its processor; pictures are resized by torch.
        device: where the towers compute.
        dtype: what they compute in.
        batch_size: pictures or texts in one forward.
        workers: threads that read and decode.

    Examples:
        >>> from siglip_hf import SiglipEmbedder
        >>> embedder = SiglipEmbedder()  # or SiglipEmbedder("google/siglip2-base-patch16-224")
        >>> pictures = embedder.embed_images("drawings")  # (24, D)
        >>> texts = embedder.embed_texts(["a cat", "a dog"])  # (2, D)
        >>> (pictures @ texts.T).shape  # cosines
        (24, 2)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 64,
        fast: bool = True,
        workers: int | None = None,
        optimize: bool | None = None,
    ) -> None:
        """Loads a checkpoint.

        Args:
            model: folder or name of a checkpoint; the embedded one by default.
            device: "cpu", "cuda", "cuda:1", ...; the first accelerator by default.
            dtype: "float32", "bfloat16" or "float16"; bfloat16 by default where the device computes in it.
            batch_size: pictures or texts in one forward.
            fast: use `siglip_hf.optimize` on a CPU; the embeddings differ by rounding.
            workers: threads that read and decode; one per core by default.
            optimize: the same as `fast`, by the name that the pipeline has for it.

        Raises:
            ValueError: if there is no such checkpoint, device or dtype, or the checkpoint is no SigLIP.
        """
        if batch_size < 1 or (workers is not None and workers < 1):
            raise ValueError(f"batch_size={batch_size} and workers={workers} must be at least 1.")
        self.name = os.fspath(model) if model is not None else default_checkpoint()
        self.device = pick_device(device)
        self.dtype = _dtype(dtype, self.device)
        self.batch_size, self.fast = batch_size, fast if optimize is None else optimize
        self.workers = workers or usable_cores()
        self.model, self.processor = load_checkpoint(self.name, dtype=self.dtype, fast_pictures=True)
        self.model.to(self.device)
        if self.fast and self.device.type == "cpu" and self.dtype != torch.float16:
            optimization.optimize(self.model, self.dtype)
            self.dtype = self.model.dtype

    @classmethod
    def of(cls, model: Any, processor: Any, *, weights: str, batch_size: int = 64) -> SiglipEmbedder:
        """An embedder of a model that is loaded already, as it is.

        Args:
            model: the model; the caller puts it into evaluation mode.
            processor: its processor.
            weights: what tells its weights from others, for `model_sha256`.
            batch_size: pictures or texts in one forward.
        """
        embedder = cls.__new__(cls)
        embedder.name, embedder.model, embedder.processor = model.name_or_path or "a model", model, processor
        embedder.device, embedder.dtype = model.device, model.dtype
        embedder.batch_size, embedder.fast, embedder.workers = batch_size, False, usable_cores()
        embedder.__dict__["model_sha256"] = weights
        return embedder

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return self.model.config.vision_config.hidden_size

    @property
    def draft_to(self) -> int | None:
        """Longest side of what pictures are resized to, for `load_picture`."""
        return draft_side(self.processor.image_processor)

    @functools.cached_property
    def model_sha256(self) -> str:
        """SHA-256 of the checkpoint's weight files: tells one model from another wherever it lies."""
        return _weights_sha256(self.name)

    def preprocessing(self, kind: str) -> dict[str, Any]:
        """Settings that the embeddings depend on, as JSON has them.

        Args:
            kind: "image" or "text".
        """
        if kind == "text":
            tokenizer = self.processor.tokenizer
            return {"tokenizer": type(tokenizer).__name__, "max_length": tokenizer.model_max_length}
        settings = self.processor.image_processor.to_dict()
        return json.loads(json.dumps({name: settings[name] for name in _IMAGE_SETTINGS if name in settings}))

    def probability(self, cosines: np.ndarray) -> np.ndarray:
        """The model's probability that a picture and a text belong together.

        Args:
            cosines: of embeddings of pictures and texts; any shape.

        Returns:
            float32, the same shape.
        """
        scale, bias = (value.detach().float().cpu() for value in (self.model.logit_scale, self.model.logit_bias))
        return torch.sigmoid(torch.as_tensor(cosines, dtype=torch.float32) * scale.exp() + bias).numpy()

    def embed_images(self, pictures: str | os.PathLike[str] | Source | Dataset | Iterable[Any]) -> np.ndarray:
        """Embeddings of pictures.

        Args:
            pictures: what `open_source` takes (a folder, a table, tar shards, a dataset, ...), or pictures in a list:
                paths, URLs, bytes, PIL images, arrays or tensors; see `load_picture`.

        Returns:
            float32 (N, D), each row of length 1, in the order of the source.

        Raises:
            PictureError: naming the first picture that cannot be used. `embed_source` goes on past it.
            ValueError: if there is none.
        """
        readers = list(_as_pictures(pictures))

        def prepare(chunk: Sequence[Any]) -> tuple[int, dict[str, torch.Tensor] | None]:
            return len(chunk), self.prepare_images(map(self._load, chunk))

        results = [embeds for _, embeds in self.encode_ahead(readers, prepare)]
        return np.concatenate(results) if results else self.no_embeddings()

    def embed_texts(self, texts: str | Iterable[str]) -> np.ndarray:
        """Embeddings of texts.

        Args:
            texts: N texts, or a single one.

        Returns:
            float32 (N, D), each row of length 1.

        Raises:
            ValueError: if one is no string, or blank; with its place and type.
        """
        texts = [texts] if isinstance(texts, (str, bytes)) else list(texts)
        for index, text in enumerate(texts):
            check_text(text, f"texts[{index}]: ")
        batches = [texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)]
        results = [embeds for _, embeds in self.encode_texts_ahead((None, batch) for batch in batches)]
        return np.concatenate(results) if results else self.no_embeddings()

    def no_embeddings(self) -> np.ndarray:
        """Float32 (0, D): the embeddings of nothing."""
        return np.empty((0, self.dimension), np.float32)

    def _load(self, picture: Any) -> Image.Image:
        if isinstance(picture, Record):
            return picture.load_picture(self.draft_to)
        return load_picture(picture, draft_to=self.draft_to)

    def prepare_images(self, pictures: Iterable[Image.Image]) -> dict[str, torch.Tensor] | None:
        """Inputs of the image tower, on the CPU in its dtype; few pictures are held decoded at once.

        Args:
            pictures: N pictures, as `load_picture` gives them.

        Returns:
            `pixel_values` (N, C, height, width), for NaFlex (N, patches, P) with mask and shapes; None if N is 0.
        """
        inputs = prepare_pictures(self.processor.image_processor, pictures)
        if inputs is None:
            return None
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    def encode_images(self, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        """Embeddings of prepared pictures, in one forward.

        Args:
            inputs: what `prepare_images` gives for N pictures.

        Returns:
            float32 (N, D), each row of length 1.
        """
        return self._start(self.model.encode_image, inputs)()

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, in one forward.

        Args:
            texts: N texts.

        Returns:
            float32 (N, D), each row of length 1.
        """
        return self.encode_ids(self.prepare_texts(texts))

    def prepare_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids (N, L) of N texts on the CPU, padded to the length that the model was trained on."""
        return self.processor(text=list(texts), return_tensors="pt")["input_ids"]

    def encode_ids(self, input_ids: torch.Tensor) -> np.ndarray:
        """Embeddings of what `prepare_texts` gives for N texts: float32 (N, D), each row of length 1."""
        return self._start_text(input_ids)()

    def _start_text(self, input_ids: torch.Tensor) -> Callable[[], np.ndarray]:
        return self._start(self.model.encode_text, {"input_ids": input_ids})

    @torch.inference_mode()
    def _start(
        self, encode: Callable[..., torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> Callable[[], np.ndarray]:
        """Starts a forward; what it returns waits for the embeddings: float32 (N, D), each row of length 1.

        Where the device copies by itself, the host does not wait before that, and inputs travel on a stream of their
        own beside the forward before. Masks and shapes of NaFlex stay on the CPU: the tower reads them there.
        """
        if not copies_by_itself(self.device):
            embeds = _unit(encode(**{name: value.to(self.device) for name, value in inputs.items()}))
            return lambda: embeds.cpu().numpy()
        computing = torch.accelerator.current_stream(self.device)
        with self._copies:
            sent = {name: value if name in _ON_HOST else send(value, self.device) for name, value in inputs.items()}
            computing.wait_event(self._copies.record_event())
        for name in sent.keys() - _ON_HOST:
            sent[name].record_stream(computing)  # or its memory would be free for the copy after the next
        embeds = _unit(encode(**sent))
        fetched = torch.empty(embeds.shape, dtype=embeds.dtype, pin_memory=True)
        fetched.copy_(embeds, non_blocking=True)
        arrival = computing.record_event()

        def result() -> np.ndarray:
            arrival.synchronize()
            return fetched.numpy().copy()  # what is pinned is scarce

        return result

    @functools.cached_property
    def _copies(self) -> torch.Stream:
        return torch.Stream(device=self.device)

    def _fetch(self, started: Iterable[tuple[Any, Callable[[], np.ndarray]]]) -> Iterator[tuple[Any, np.ndarray]]:
        """The results of forwards in order, each fetched when the next one is started where the host need not wait.

        An error of `started` comes after the results of what was started before.
        """
        if not copies_by_itself(self.device):
            yield from ((item, result()) for item, result in started)
            return
        before: tuple[Any, Callable[[], np.ndarray]] | None = None
        following, error = iter(started), None
        while error is None:
            try:
                entry = next(following, None)
            except Exception as raised:
                entry, error = None, raised
            if before is not None:
                yield before[0], before[1]()
            if entry is None:
                break
            before = entry
        if error is not None:
            raise error

    def encode_texts_ahead(self, batches: Iterable[tuple[Any, Sequence[str]]]) -> Iterator[tuple[Any, np.ndarray]]:
        """Embeds texts in batches: an accelerator computes one while the next is tokenized.

        Args:
            batches: pairs of anything and the texts of one forward, of which there may be none.

        Yields:
            For each batch, in order, what came with its texts, and their embeddings (n, D).
        """
        return self._fetch(
            (item, self._start_text(self.prepare_texts(texts)) if texts else self.no_embeddings)
            for item, texts in batches
        )

    def encode_ahead(self, items: Sequence[Any], prepare: Any) -> Iterator[tuple[list[Any], np.ndarray]]:
        """Embeds pictures in batches that are prepared in threads: ahead of an accelerator, in turns with a CPU.

        Args:
            items: anything; `batch_size` of them make a batch.
            prepare: function of up to `CHUNK_SIZE` items that gives a result and inputs of the image tower (or None if
                none of the items has a picture). It is called in threads.

        Yields:
            For each batch, in order, the results of its chunks, and the embeddings (n, D) of their inputs.
        """
        size = self.batch_size
        batches = [
            [range(start, min(start + CHUNK_SIZE, end)) for start in range(begin, end, CHUNK_SIZE)]
            for begin, end in ((begin, min(begin + size, len(items))) for begin in range(0, len(items), size))
        ]
        depth = self.workers + 2 * -(-size // CHUNK_SIZE)

        def prepare_chunk(chunk: range) -> Any:
            if torch.get_num_threads() != 1:  # those beside it are the parallelism
                one_torch_thread()
            return prepare([items[i] for i in chunk])

        def prepared_batches() -> Iterator[list[Any]]:
            # A tower on the CPU uses all cores. Threads beside it would make each of its products wait for the slowest
            # core: taking turns is faster (920 against 780 pictures/s with the embedded checkpoint on 2 cores).
            if self.device.type == "cpu":
                for batch in batches:
                    yield list(prefetch(batch, prepare_chunk, workers=self.workers, depth=depth))
            else:
                ahead = prefetch(itertools.chain(*batches), prepare_chunk, workers=self.workers, depth=depth)
                for batch in batches:
                    yield list(itertools.islice(ahead, len(batch)))

        def start(done: list[Any]) -> Callable[[], np.ndarray]:
            inputs = [prepared for _, prepared in done if prepared is not None]
            if not inputs:
                return self.no_embeddings
            return self._start(
                self.model.encode_image, {name: self._join([one[name] for one in inputs]) for name in inputs[0]}
            )

        return self._fetch(([result for result, _ in done], start(done)) for done in prepared_batches())

    def _join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Parts of a batch in one tensor, from which the device can copy by itself if it can at all."""
        if not copies_by_itself(self.device):
            return torch.cat(parts)
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        return torch.cat(parts, out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=True))


def draft_side(image_processor: Any) -> int | None:
    """Longest side of what an image processor resizes pictures to, for `load_picture`."""
    if patches := getattr(image_processor, "max_num_patches", None):
        return image_processor.patch_size * int(np.ceil(np.sqrt(patches)))
    return max((side for side in dict(image_processor.size).values() if side), default=None)


def prepare_pictures(image_processor: Any, pictures: Iterable[Image.Image]) -> dict[str, torch.Tensor] | None:
    """Inputs of the image tower, on the CPU; few pictures are held decoded at once.

    Args:
        image_processor: one of this package.
        pictures: N pictures, decoded while they are taken.

    Returns:
        `pixel_values` (N, C, height, width), for NaFlex (N, patches, P) with mask and shapes; None if N is 0.
    """
    parts: list[Mapping[str, torch.Tensor]] = []
    held: list[Image.Image] = []

    def resize() -> None:
        if held:
            parts.append(image_processor(images=held, return_tensors="pt"))
            held.clear()

    with PIXELS.bounded():
        for picture in pictures:
            held.append(picture)
            if PIXELS.is_held or sum(one.width * one.height for one in held) >= _HELD_PIXELS:
                resize()
                del picture
                PIXELS.release()
        resize()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else None


def check_text(text: Any, place: str = "") -> None:
    """Refuses what cannot be embedded as a text.

    Args:
        text: the candidate.
        place: where it stands, such as "texts[3]: ", to begin the error with.

    Raises:
        ValueError: if it is no string, blank, or not Unicode.
    """
    if not isinstance(text, str) or not text.strip():
        kind = type(text).__name__
        raise ValueError(f"{place}{text!r} of type {kind} is not a text; pass strings with words in them.")
    check_characters(text, f"a text ({place.rstrip(': ')})" if place else "a text")


def _as_pictures(pictures: Any) -> Iterable[Any]:
    if isinstance(pictures, Source):
        return pictures.require("image", keep_broken=True)
    if isinstance(pictures, str | os.PathLike) or hasattr(pictures, "column_names"):
        return open_source(pictures).require("image", keep_broken=True)
    if isinstance(pictures, bytes | Image.Image | np.ndarray | torch.Tensor) and getattr(pictures, "ndim", 3) < 4:
        return [pictures]
    return pictures


def _unit(embeds: torch.Tensor) -> torch.Tensor:
    """Length 1 in float32; in 16 bits the model's own are off by up to 1 %."""
    return torch.nn.functional.normalize(embeds.float(), dim=-1)


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if _computes_in_bfloat16(device) else torch.float32
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype!r} must be float32, bfloat16 or float16.")
    return chosen


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies in bfloat16 itself, rather than by way of float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and optimization.multiplies_bfloat16()


def _weights_sha256(name: str) -> str:
    from transformers.utils import cached_file

    def find(file: str) -> str | None:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, local_files_only=True)

    found = next((path for path in map(find, _WEIGHT_FILES) if path), None)
    assert found is not None, f"{name} has been loaded, so it has weights"
    files = [found]
    if found.endswith(".json"):
        shards = set(parse_json(Path(found).read_bytes())["weight_map"].values())
        files = [path for shard in sorted(shards) if (path := find(shard))]
    return sha256_of_files(files)
