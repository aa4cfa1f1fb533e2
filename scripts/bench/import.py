"""Time from process start to the first label, with this package and with stock transformers; and of `siglip-hf --help`.

Fresh interpreters take turns; each loads a checkpoint of the embedded one's size and classifies one picture through the
pipeline.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import siglip_hf

LABEL = """
import sys
if sys.argv[1] == "siglip_hf":
    import siglip_hf
from transformers import pipeline
from PIL import Image
classify = pipeline("zero-shot-image-classification", model=sys.argv[2])
print(classify(Image.new("RGB", (64, 64)), candidate_labels=["a cat", "a dog"])[0]["label"])
"""
HELP = "import sys; sys.argv[1:] = ['--help']; import siglip_hf_command; siglip_hf_command.main()"


def seconds(*command: str) -> tuple[float, float]:
    """How long a fresh interpreter takes, and its CPU time, which a busy machine changes little."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", *command], check=True, capture_output=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


def main(runs: int = 5) -> None:
    """Prints the medians in seconds."""
    # The embedded checkpoint's shapes with 64 places for tokens: stock's pipeline asks for so many of every SigLIP.
    config = siglip_hf.SiglipConfig.from_pretrained(siglip_hf.default_checkpoint())
    config.text_config.max_position_embeddings = 64
    folder = tempfile.TemporaryDirectory()
    checkpoint = folder.name
    siglip_hf.SiglipModel(config).save_pretrained(checkpoint)
    siglip_hf.SiglipProcessor.from_pretrained(siglip_hf.default_checkpoint()).save_pretrained(checkpoint)
    commands = {
        "stock: first label": (LABEL, "stock", checkpoint),
        "siglip_hf: first label": (LABEL, "siglip_hf", checkpoint),
        "siglip-hf --help": (HELP,),
    }
    rounds = [[seconds(*command) for command in commands.values()] for _ in range(runs + 1)]
    print(f"Python {platform.python_version()}, median of {runs} fresh interpreters each")
    for name, times in zip(commands, zip(*rounds[1:], strict=True), strict=True):  # the first round warms the files
        wall, cpu = (statistics.median(values) for values in zip(*times, strict=True))
        print(f"{name:24} {wall:6.2f} s, {cpu:6.2f} s of CPU time")


if __name__ == "__main__":
    main()
