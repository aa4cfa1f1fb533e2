"""The command line, `siglip-hf`: a module for each command."""
