"""Time from process start to the first label, with this package and with stock transformers; and of `siglip-hf --help`.

Fresh interpreters take turns; each loads the embedded checkpoint and classifies one picture through the pipeline.
"""

import platform
import statistics
import subprocess
import sys
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


def seconds(*command: str) -> float:
    """How long a fresh interpreter takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", *command], check=True, capture_output=True)
    return time.perf_counter() - start


def main(runs: int = 5) -> None:
    """Prints the medians in seconds."""
    checkpoint = siglip_hf.default_checkpoint()
    commands = {
        "stock: first label": (LABEL, "stock", checkpoint),
        "siglip_hf: first label": (LABEL, "siglip_hf", checkpoint),
        "siglip-hf --help": (HELP,),
    }
    rounds = [[seconds(*command) for command in commands.values()] for _ in range(runs + 1)]
    print(f"Python {platform.python_version()}, median of {runs} fresh interpreters each")
    for name, times in zip(commands, zip(*rounds[1:], strict=True), strict=True):  # the first round warms the files
        print(f"{name:24} {statistics.median(times):6.2f} s")


if __name__ == "__main__":
    main()
