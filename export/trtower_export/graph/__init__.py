"""A tower, cut and traced, turned into an ONNX graph."""
