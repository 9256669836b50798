"""Make an environment with one version of NVIDIA's own modules, on a machine that needs neither a GPU nor a driver.

    python make_environment.py tensorrt-11.4.0.106 FOLDER

"tensorrt-VERSION" brings TensorRT's bindings over stub libraries, and from 10.15 on the whole lean runtime. So every
class and signature of the full TensorRT can be looked at, but it makes no object: its libraries have gigabytes and are
not on PyPI. "tensorrt-rtx-VERSION" brings the whole of TensorRT-RTX. The environment also sees this checkout, then the
packages of the Python that runs this script: torch, transformers, pytest and so on. It needs Linux and gcc.
"""

import argparse
import subprocess
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

FIRST_LEAN = (10, 15)
"""The first TensorRT whose lean runtime is a whole wheel on PyPI."""

STUBBED = ("libnvinfer.so", "libnvinfer_plugin.so", "libnvonnxparser.so")

FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)
"""All that the bindings of 10.3 to 11.4 import from STUBBED. Each stub returns NULL, as TensorRT does on failure."""


INIT = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
"""The whole module `tensorrt` of NVIDIA's package, in 10.16."""


def make_environment(package: str, version: str, folder: Path) -> None:
    """Make the environment, or make it again."""
    venv.create(folder, clear=True, with_pip=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if package == "tensorrt":
        has_lean = tuple(map(int, version.split(".")[:2])) >= FIRST_LEAN
        cuda = "cu13" if has_lean else "cu12"
        subprocess.run([*install, f"tensorrt-{cuda}-bindings=={version}"], check=True)
        (site / "tensorrt").mkdir()  # from the package `tensorrt`, which would bring gigabytes
        (site / "tensorrt" / "__init__.py").write_text(INIT)
        if has_lean:
            subprocess.run([*install, f"tensorrt-lean-{cuda}=={version}"], check=True)
        make_stubs(site / "tensorrt_bindings", major=version.partition(".")[0])
    else:
        subprocess.run([*install, f"{package}=={version}"], check=True)
    subprocess.run([*install, "--no-deps", "--editable", str(ROOT)], check=True)
    # Written last, because pip takes what it sees there for installed. Python puts it after the folder's own packages.
    packages = sysconfig.get_path("purelib")
    (site / "zz_packages.pth").write_text(f"import site; site.addsitedir({packages!r})\n")


def make_stubs(folder: Path, major: str) -> None:
    """Compile STUBBED beside the bindings, which look there first."""
    with tempfile.TemporaryDirectory() as work:
        source = Path(work, "stub.c")
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
        for library in STUBBED:
            name = f"{library}.{major}"
            command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
            subprocess.run(command, check=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="tensorrt-VERSION or tensorrt-rtx-VERSION")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    package, _, version = given.package.rpartition("-")
    if package not in ("tensorrt", "tensorrt-rtx"):
        parser.error(f"{given.package!r} is neither tensorrt-VERSION nor tensorrt-rtx-VERSION")
    make_environment(package, version, given.folder.absolute())


if __name__ == "__main__":
    main()
