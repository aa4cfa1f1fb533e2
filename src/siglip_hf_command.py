"""The console script `siglip-hf`: parses the command line before torch and transformers are imported.

It stands beside the package because importing any module of the package registers its classes with transformers first,
which takes seconds: too long for `--help` or a misspelt option.
"""

is_parsing = False


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (that of the process if None) and returns its exit code."""
    global is_parsing
    is_parsing = True  # read by `siglip_hf/__init__.py`; a worker process that imports this module leaves it False
    from siglip_hf.cli.main import main as run

    return run(arguments)
