"""`siglip-hf convert` and `siglip-hf export`: checkpoints in and out of other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="Weights of open_clip, timm, big_vision (.npz) or an image tower: a file, or a folder."
        ),
    ],
    output: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write; big_vision: the .npz.")] = None,
    to: Annotated[
        str | None, typer.Option(help="open_clip, timm (the image tower) or big_vision; IN is a checkpoint then.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="What the model is, such as ViT-B-16-SigLIP2-256; inferred from files and shapes by default."
        ),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The SentencePiece file that belongs to it.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; as in IN by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Turn weights of another library into a folder that transformers loads, or back."""
    from siglip_hf.integrations.convert import convert_weights

    folder = _folder(out, output)
    result = convert_weights(
        checkpoint, folder, to=to, preset=preset, tokenizer=tokenizer, dtype=dtype, overwrite=overwrite
    )
    print(f"{folder}: {result.source} to {to or 'transformers'}, {result.parameters / 1e6:.1f} million parameters")
    for note in result.notes:
        print(f"  {note}")


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint: a folder or a name.")],
    output: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    opset: Annotated[int, typer.Option(help="ONNX operator set, 18 to 23.")] = 20,
    layout: Annotated[
        str | None, typer.Option(help="Files as another program looks for them: transformers.js or immich.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="With --layout: fp32, fp16, q8; may be given several times.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
) -> None:
    """Write both towers as ONNX files; refused if their embeddings are not PyTorch's."""
    from siglip_hf.integrations.onnx import export_onnx
    from siglip_hf.integrations.onnx_layouts import export_layout

    folder = _folder(out, output)
    if layout is not None:
        if dtype != "float32":
            raise ValueError(f"--dtype {dtype} goes with no --layout; give --precision fp16.")
        made = export_layout(model, folder, layout=layout, precisions=precision, opset=opset, overwrite=overwrite)
        print(f"{folder}: for {layout}; lowest cosine to PyTorch:")
        for file, cosine in made.cosines.items():
            print(f"  {file} {cosine:.7f}")
        return
    if precision:
        raise ValueError("--precision goes with --layout; give --dtype float16 for half the size.")
    result = export_onnx(model, folder, dtype=dtype, opset=opset, overwrite=overwrite)
    cosines = ", ".join(f"{tower}.onnx {cosine:.7f}" for tower, cosine in result.cosines.items())
    print(f"{folder}: lowest cosine to PyTorch: {cosines}")


def _folder(out: Path | None, output: Path | None) -> Path:
    """The folder to write, of `--out` or, as in version 0.1, the second argument."""
    if (out is None) == (output is None):
        raise ValueError("give the folder to write once, as --out FOLDER.")
    return out or output  # type: ignore[return-value]
