"""Make TensorRT 8.6.0 small enough to carry: kernels for other GPUs become zeros, the rest is packed in pieces.

    python benchmarks/hopper/prune_tensorrt_8.py tensorrt-8.6.0-*.whl FOLDER [--capability 90] [--lean FILE]

FOLDER gets tensorrt-8.6.0-sm90.tar.xz in pieces of 60 MB: libnvinfer, its builder resource with the kernels of one
compute capability only, plugins, parser, the bindings for Python 3.10, and stubs of the three CUDA libraries that only
the plugins want. --lean adds libnvinfer_lean.so.8, which that wheel lacks. The builder resource holds fat binaries
(magic 0xBA55ED50). Each of their entries has a kind, the sizes of its header and payload and, at byte 28, the compute
capability. Only payloads are zeroed, so no offset moves. Needs gcc.
"""

import argparse
import mmap
import pathlib
import shutil
import struct
import subprocess
import tarfile
import zipfile

MAGIC = b"\x50\xed\x55\xba"
RESOURCE = "tensorrt/libnvinfer_builder_resource.so.8.6.0"
LEAN = "tensorrt/libnvinfer_lean.so.8"
STUBS = ("libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.8")
PIECE = 60_000_000


def foreign_payloads(data: mmap.mmap, keep: int) -> list[tuple[int, int]]:
    """Find (offset, size) of every payload that is for another GPU than ``keep``."""
    spans, position = [], data.find(MAGIC)
    while position >= 0:
        _version, header, size = struct.unpack_from("<HHQ", data, position + 4)
        entry, end = position + header, position + header + size
        while entry < end and entry + 64 < len(data):
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            capability = struct.unpack_from("<I", data, entry + 28)[0]
            if kind not in (1, 2) or not 32 <= entry_header <= 512 or payload > end - entry:
                break
            if capability != keep:
                spans.append((entry + entry_header, payload))
            entry += entry_header + payload
        position = data.find(MAGIC, max(position + 4, min(entry, end)))
    return spans


def make_stubs(folder: pathlib.Path) -> None:
    """Compile libraries without content, so that what links them can be loaded."""
    folder.mkdir(exist_ok=True)
    source = folder / "empty.c"
    source.write_text("void trtower_stub(void) {}\n")
    for name in STUBS:
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True)


def main() -> None:
    """Unpack, prune, pack."""
    parser = argparse.ArgumentParser()
    parser.add_argument("wheel", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--lean", type=pathlib.Path, help="libnvinfer_lean.so.8 of TensorRT 8.6")
    given = parser.parse_args()
    work = given.folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(given.wheel) as archive:
        archive.extractall(work, [name for name in archive.namelist() if name.startswith("tensorrt/")])
    with (work / RESOURCE).open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as data:
        spans = foreign_payloads(data, given.capability)
        for offset, size in spans:
            data[offset : offset + size] = bytes(size)
        print(f"{sum(size for _, size in spans) / 1e6:.0f} of {len(data) / 1e6:.0f} MB zeroed, {len(spans)} kernels")
    if given.lean:
        shutil.copyfile(given.lean, work / LEAN)
    make_stubs(work / "stubs")
    packed = given.folder / f"tensorrt-8.6.0-sm{given.capability}.tar.xz"
    with tarfile.open(packed, "w:xz", preset=1) as tar:
        tar.add(work, arcname=".")
    shutil.rmtree(work)
    size = packed.stat().st_size
    starts = range(0, size, PIECE)
    with packed.open("rb") as stream:
        for index in range(len(starts)):
            packed.with_name(f"{packed.name}.{index:02}").write_bytes(stream.read(PIECE))
    packed.unlink()
    print(f"{size / 1e6:.0f} MB in {len(starts)} pieces")


if __name__ == "__main__":
    main()
