"""Run a bundle on one backend: TensorRT, ONNX Runtime on CUDA or the CPU, or OpenVINO."""
