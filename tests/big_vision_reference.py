"""The forward pass of the original SigLIP in numpy, on a flat dict of its parameters.

Written from the paper (https://arxiv.org/abs/2303.15343), the ViT and MAP head it builds on and the parameter names.
Shapes: B batch, S tokens, L text tokens, D width, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Params = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tower:
    """Sizes of one tower."""

    width: int = 24
    inner: int = 40
    depth: int = 3
    heads: int = 3


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model."""

    image: Tower = Tower()
    text: Tower = Tower(width=16, inner=36, depth=2, heads=2)
    patch: int = 4
    grid: int = 3
    vocabulary: int = 30
    length: int = 7
    naflex: bool = False


def random_params(sizes: Sizes, seed: int = 0) -> Params:
    """Parameters named as in the original, every one random: biases of 0 and scales of 1 would hide mistakes."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"t": (1,), "b": (1,)}

    def dense(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        shapes[f"{name}/kernel"], shapes[f"{name}/bias"] = (*inputs, *outputs), outputs

    def norm(name: str, width: int) -> None:
        shapes[f"{name}/scale"], shapes[f"{name}/bias"] = (width,), (width,)

    def attention(name: str, tower: Tower) -> None:
        by_head = (tower.heads, tower.width // tower.heads)
        for part in ("query", "key", "value"):
            dense(f"{name}/MultiHeadDotProductAttention_0/{part}", (tower.width,), by_head)
        dense(f"{name}/MultiHeadDotProductAttention_0/out", by_head, (tower.width,))

    def mlp(name: str, tower: Tower) -> None:
        dense(f"{name}/MlpBlock_0/Dense_0", (tower.width,), (tower.inner,))
        dense(f"{name}/MlpBlock_0/Dense_1", (tower.inner,), (tower.width,))

    for encoder, tower in (("img/Transformer", sizes.image), ("txt/Encoder_0", sizes.text)):
        for i in range(tower.depth):
            block = f"{encoder}/encoderblock_{i}"
            norm(f"{block}/LayerNorm_0", tower.width)
            attention(block, tower)
            norm(f"{block}/LayerNorm_1", tower.width)
            mlp(block, tower)
        norm(f"{encoder}/encoder_norm", tower.width)

    width = sizes.image.width
    if sizes.naflex:
        dense("img/embedding", (sizes.patch * sizes.patch * 3,), (width,))
        shapes["img/pos_embedding"] = (sizes.grid, sizes.grid, width)
    else:
        dense("img/embedding", (sizes.patch, sizes.patch, 3), (width,))
        shapes["img/pos_embedding"] = (1, sizes.grid**2, width)
    shapes["img/MAPHead_0/probe"] = (1, 1, width)
    attention("img/MAPHead_0", sizes.image)
    norm("img/MAPHead_0/LayerNorm_0", width)
    mlp("img/MAPHead_0", sizes.image)

    shapes["txt/Embed_0/embedding"] = (sizes.vocabulary, sizes.text.width)
    shapes["txt/pos_embedding"] = (1, sizes.length, sizes.text.width)
    dense("txt/head", (sizes.text.width,), (width,))
    return {name: (rng.standard_normal(shape) * 0.4).astype(np.float32) for name, shape in sorted(shapes.items())}


def scanned(params: Params) -> Params:
    """The same parameters with the blocks of each encoder stacked along the first axis, as `scan=True` saves them."""
    result, stacks = {}, {}
    for name, value in params.items():
        before, _, after = name.partition("/encoderblock_")
        if after:
            number, _, rest = after.partition("/")
            stacks.setdefault(f"{before}/encoderblock/{rest}", {})[int(number)] = value
        else:
            result[name] = value
    return result | {name: np.stack([blocks[i] for i in sorted(blocks)]) for name, blocks in stacks.items()}


def save(path, params: Params) -> None:
    """Writes parameters as the original does: under `params/`, names with slashes."""
    np.savez(path, **{f"params/{name}": value for name, value in params.items()})


def encode_image(params: Params, pictures: np.ndarray, patch: int) -> np.ndarray:
    """(B, height, width, 3) to (B, D), normalized; the positions are those of the pictures' own grid."""
    batch, height, width, channels = pictures.shape
    rows, columns = height // patch, width // patch
    patches = pictures[:, : rows * patch, : columns * patch].reshape(batch, rows, patch, columns, patch, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)  # (B, S, patch * patch * 3)
    kernel = params["img/embedding/kernel"]
    tokens = patches @ kernel.reshape(-1, kernel.shape[-1]) + params["img/embedding/bias"]
    positions = params["img/pos_embedding"]
    if kernel.ndim == 2:
        positions = resize(positions, rows, columns).reshape(1, rows * columns, -1)
    states = encoder(params, "img/Transformer", tokens + positions)

    head = "img/MAPHead_0"
    probe = np.repeat(params[f"{head}/probe"], batch, axis=0)  # (B, 1, D)
    pooled = attend(params, head, probe, states)
    pooled = pooled + mlp(params, head, layer_norm(params, f"{head}/LayerNorm_0", pooled))
    return normalize(pooled[:, 0])


def encode_text(params: Params, token_ids: np.ndarray) -> np.ndarray:
    """(B, L) to (B, D of the image tower), normalized."""
    states = params["txt/Embed_0/embedding"][token_ids] + params["txt/pos_embedding"]
    last = encoder(params, "txt/Encoder_0", states)[:, -1]
    return normalize(last @ params["txt/head/kernel"] + params["txt/head/bias"])


def logits(params: Params, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """(images, D) and (texts, D) to (images, texts)."""
    return images @ texts.T * np.exp(params["t"]) + params["b"]


def encoder(params: Params, name: str, states: np.ndarray) -> np.ndarray:
    """Pre-norm blocks, then a norm: (B, S, D) to (B, S, D)."""
    depth = len({key.split("/")[2] for key in params if key.startswith(f"{name}/encoderblock_")})
    for block in (f"{name}/encoderblock_{i}" for i in range(depth)):
        normed = layer_norm(params, f"{block}/LayerNorm_0", states)
        states = states + attend(params, block, normed, normed)
        states = states + mlp(params, block, layer_norm(params, f"{block}/LayerNorm_1", states))
    return layer_norm(params, f"{name}/encoder_norm", states)


def attend(params: Params, name: str, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(B, Q, D) over (B, S, D) to (B, Q, D)."""
    name = f"{name}/MultiHeadDotProductAttention_0"

    def project(part: str, states: np.ndarray) -> np.ndarray:
        kernel, bias = params[f"{name}/{part}/kernel"], params[f"{name}/{part}/bias"]
        return np.einsum("bsd,dhk->bhsk", states, kernel) + bias[:, None]

    query, key, value = project("query", queries), project("key", keys), project("value", keys)
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])  # (B, H, Q, S)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ value  # (B, H, Q, D / H)
    return np.einsum("bhqk,hkd->bqd", mixed, params[f"{name}/out/kernel"]) + params[f"{name}/out/bias"]


def mlp(params: Params, name: str, states: np.ndarray) -> np.ndarray:
    """Two layers with the tanh form of GELU between them."""
    name = f"{name}/MlpBlock_0"
    hidden = states @ params[f"{name}/Dense_0/kernel"] + params[f"{name}/Dense_0/bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ params[f"{name}/Dense_1/kernel"] + params[f"{name}/Dense_1/bias"]


def layer_norm(params: Params, name: str, states: np.ndarray) -> np.ndarray:
    """Over the last axis, with Flax's epsilon."""
    centred = states - states.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-6) * params[f"{name}/scale"] + params[f"{name}/bias"]


def normalize(embeds: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return embeds / (np.linalg.norm(embeds, axis=-1, keepdims=True) + 1e-8)


def resize(positions: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(R, C, D) to (rows, columns, D): linear along each axis, with a wider triangle where it shrinks."""
    return np.einsum(
        "yr,xc,rcd->yxd",
        triangle_weights(positions.shape[0], rows),
        triangle_weights(positions.shape[1], columns),
        positions,
    )


def triangle_weights(source: int, target: int) -> np.ndarray:
    """Weights (target, source) of linear interpolation between pixel centres, rows of sum 1."""
    scale = source / target
    centres = (np.arange(target)[:, None] + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(centres - np.arange(source)) / max(scale, 1))
    return weights / weights.sum(-1, keepdims=True)
