"""Build tower17.onnx with TensorRT 8.6.0 into one of two version-compatible FP16 plans, for the GPU that is here.

    python3.10 build_version_compatible.py FOLDER with-lean|without-lean

FOLDER is graph17.py's. It gets with-lean.plan, which contains a lean runtime, or without-lean.plan
(EXCLUDE_LEAN_RUNTIME). Both share a timing cache, so the second build is quicker. A plan can contain a lean runtime
only if libnvinfer_lean.so.8 is found, which the wheel of 8.6.0 does not bring. run.py sets the environment.
"""

import os
import pathlib
import sys
import time

sys.setdlopenflags(os.RTLD_LAZY)  # the plugins want cuBLAS and cuDNN, and nobody wants the plugins
import tensorrt as trt  # noqa: E402

BATCHES = (1, 8, 32)
FLAGS = {"with-lean": ("VERSION_COMPATIBLE",), "without-lean": ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")}


def main() -> None:
    """Build the plan; stop with TensorRT's reason if there is none."""
    folder, name, start = pathlib.Path(sys.argv[1]), sys.argv[2], time.time()
    logger = trt.Logger(trt.Logger.INFO)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / "tower17.onnx")):
        sys.exit("; ".join(str(parser.get_error(index)) for index in range(parser.num_errors)))
    config = builder.create_builder_config()
    for flag in ("FP16", *FLAGS[name]):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    # Neither cuBLAS nor cuDNN: those that are here are stubs.
    sources = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
    config.set_tactic_sources(sum(1 << int(source) for source in sources))
    timings = folder / "timing.cache"
    cache = config.create_timing_cache(timings.read_bytes() if timings.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    images = network.get_input(0)
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, *((batch, *tuple(images.shape)[1:]) for batch in BATCHES))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    seconds = time.time() - start
    if plan is not None:
        (folder / f"{name}.plan").write_bytes(bytes(plan))
    timings.write_bytes(bytes(config.get_timing_cache().serialize()))
    if plan is None:
        sys.exit(f"TensorRT {trt.__version__} made no {name}.plan in {seconds:.0f} s; its reason stands above")
    print(
        f"TensorRT {trt.__version__}: {name}.plan, {plan.nbytes / 1e6:.0f} MB in {seconds:.0f} s; input {images.dtype}"
    )


if __name__ == "__main__":
    main()
