"""What `import siglip_hf` adds to `import transformers`, in fresh interpreters. Target: under 50 ms."""

import platform
import statistics
import subprocess
import sys

CODE = """
import time
start = time.perf_counter()
import transformers
middle = time.perf_counter()
import siglip_hf
print(middle - start, time.perf_counter() - middle)
"""


def main(runs: int = 7) -> None:
    """Prints the medians in milliseconds."""
    times = []
    for _ in range(runs + 1):  # the first run warms the file cache
        output = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
        times.append([float(value) * 1000 for value in output.split()])
    transformers, ours = (statistics.median(column) for column in zip(*times[1:], strict=True))
    print(f"Python {platform.python_version()}, median of {runs} fresh interpreters")
    print(f"import transformers   {transformers:7.1f} ms")
    print(f"import siglip_hf adds {ours:7.1f} ms")


if __name__ == "__main__":
    main()
