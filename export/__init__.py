"""From weights to a bundle: the ONNX graph, and the proof that engines run the same model."""
