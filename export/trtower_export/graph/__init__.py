"""Cut and trace a tower, and turn it into an ONNX graph."""
