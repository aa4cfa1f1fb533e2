"""What 4 bits cost an ONNX export of the embedded checkpoint: cosines to PyTorch, and drawings labelled right.

    python scripts/checks/onnx_four_bits.py

Quantized as transformers.js does for `_q4` (ONNX Runtime's MatMulNBitsQuantizer: blocks of 32, symmetric), and with
other settings.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import siglip_hf
from siglip_hf.inference.classify import read_truth_file
from siglip_hf.integrations.onnx import lowest_cosine, open_session
from siglip_hf.loading import load_checkpoint
from siglip_hf.preprocessing.image_intake import load_picture


def main() -> None:
    model, processor = load_checkpoint(siglip_hf.default_checkpoint(), dtype=torch.float32)
    drawings = Path(siglip_hf.__file__).parent / "apps" / "pictures"
    truth = read_truth_file(drawings / "labels.json")
    texts = [f"This is a photo of {label}." for label in truth.values()]
    inputs = processor(images=[load_picture(drawings / name) for name in truth], text=texts, return_tensors="pt")
    towers = {"vision": inputs["pixel_values"], "text": inputs["input_ids"]}
    with torch.inference_mode():
        full = [model.encode_image(towers["vision"]).numpy(), model.encode_text(towers["text"]).numpy()]

    with tempfile.TemporaryDirectory() as folder:
        siglip_hf.export_onnx(siglip_hf.default_checkpoint(), Path(folder) / "onnx")
        report("float32", full, full)
        for block, symmetric, kinds in itertools.product((32, 16), (True, False), (("MatMul",), ("MatMul", "Gather"))):
            found = []
            for tower, given in towers.items():
                graph = onnx.load(Path(folder) / "onnx" / f"{tower}.onnx")
                del graph.graph.value_info[:]  # the exporter's notes on shapes contradict ONNX's own inference
                quantizer = MatMulNBitsQuantizer(
                    graph, block_size=block, is_symmetric=symmetric, op_types_to_quantize=kinds
                )
                quantizer.process()
                file = Path(folder) / f"{tower}.onnx"
                quantizer.model.save_model_to_file(str(file), False)
                session = open_session(file, ["CPUExecutionProvider"])
                found.append(session.run(None, {session.get_inputs()[0].name: given.numpy()})[0])
            report(f"4 bits, blocks of {block}, {'' if symmetric else 'a'}symmetric, {'+'.join(kinds)}", found, full)


def report(what: str, found: list[np.ndarray], full: list[np.ndarray]) -> None:
    """Prints the lowest cosine of each tower and the number of right labels."""
    images, texts = found
    cosines = [lowest_cosine(a, b) for a, b in zip(found, full, strict=True)]
    right = int(((images @ texts.T).argmax(axis=1) == np.arange(len(images))).sum())
    print(f"{what}: image {cosines[0]:.4f}, text {cosines[1]:.4f}; {right} of {len(images)} right")


if __name__ == "__main__":
    main()
