"""Turn an ONNX graph into a TensorRT plan."""
