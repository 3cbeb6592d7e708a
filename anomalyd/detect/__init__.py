"""From a bundle to verdicts on numpy and onnxruntime alone."""
