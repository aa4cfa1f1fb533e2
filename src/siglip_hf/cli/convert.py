"""`siglip-hf convert` and `siglip-hf export`: checkpoints in and out of other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="IN.npz", help="A checkpoint of the original code.")],
    output: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Published checkpoint that it is; inferred from the shapes by default.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The SentencePiece file that belongs to it.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Turn a checkpoint of the original code into a folder that transformers loads."""
    from siglip_hf.integrations.big_vision import convert_big_vision

    folder = _folder(out, output)
    result = convert_big_vision(
        checkpoint, folder, preset=preset, tokenizer=tokenizer, dtype=dtype, overwrite=overwrite
    )
    name = result.preset or "the shapes are those of no published checkpoint"
    print(f"{folder}: {name}; {result.num_tensors} tensors, {result.num_parameters / 1e6:.1f} million parameters")


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint: a folder or a name.")],
    output: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    opset: Annotated[int, typer.Option(help="ONNX operator set, 18 to 23.")] = 20,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
) -> None:
    """Write both towers as ONNX files; refused if their embeddings are not PyTorch's."""
    from siglip_hf.integrations.onnx import export_onnx

    folder = _folder(out, output)
    result = export_onnx(model, folder, dtype=dtype, opset=opset, overwrite=overwrite)
    cosines = ", ".join(f"{tower}.onnx {cosine:.7f}" for tower, cosine in result.cosines.items())
    print(f"{folder}: lowest cosine to PyTorch: {cosines}")


def _folder(out: Path | None, output: Path | None) -> Path:
    """The folder to write, of `--out` or, as in version 0.1, the second argument."""
    if (out is None) == (output is None):
        raise ValueError("give the folder to write once, as --out FOLDER.")
    return out or output  # type: ignore[return-value]
