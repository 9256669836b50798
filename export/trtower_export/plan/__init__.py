"""An ONNX graph, turned into a TensorRT plan."""
