"""A bundle's ONNX graph as a PyTorch module, without transformers."""
