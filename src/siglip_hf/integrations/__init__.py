"""Other libraries and formats: PEFT, the original checkpoints, ONNX."""
