"""What PyTorch compiles serves the batches of the profiles, and reaches the next process.

A fake compiler writes one file where the real one would, and takes no minute. The slow test at the end is the real one.
"""

import errno
import inspect
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from trtower import Bundle, EngineOptions, VisionTower
from trtower.bundle.manifest import FUSED_GRAPH, MANIFEST
from trtower.errors import BackendError
from trtower.graph import compiling
from trtower.runners import kept
from trtower.runners.choose import choose
from trtower.runners.processor import multiplies_bf16
from trtower.spec import BatchProfile
from trtower_export.bench import cold
from trtower_export.bench.entrants import Arena, enter
from trtower_export.checkpoint.checkpoint import open_checkpoint

SAME = 1e-6
"""Relative difference of two orders of summing in FP32."""

ROUNDED = 5e-4
"""The same after rounding to FP16."""


@dataclass
class FakeCompiler:
    """Compiles for the first images that arrive, and answers with the module's own code.

    It writes a file for each batch, unless it finds it. ``compiled`` lists the batches that it compiled, ``ran`` those
    that it ran.
    """

    compiled: list[int] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)
    fails: str = ""

    def __call__(self, module: Any, *, dynamic: bool, mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
        assert (dynamic, mode) == (False, "default")
        expected: list[tuple[object, ...]] = []

        def run(images: torch.Tensor) -> torch.Tensor:
            state = (images.shape, images.is_inference(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
            if not expected:
                if self.fails:
                    raise RuntimeError(self.fails)
                expected.append(state)
                path = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / f"{len(images)}.so"
                if not path.exists():
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(b"kernels")
                    self.compiled.append(len(images))
            assert state == expected[0], "the real one would compile again"
            self.ran.append(len(images))
            features: torch.Tensor = module.forward(images)
            return features

        return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    monkeypatch.setattr(torch, "compile", fake)
    return fake


def load(bundle: Path, backend: str = "torch-cpu", **options: Any) -> VisionTower:
    return VisionTower.load(bundle, backend, engine=EngineOptions(compile=True, **options))


def draw(tower: VisionTower, batch: int) -> torch.Tensor:
    size = (batch, 3, tower.image_size, tower.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(batch))


def is_close(found: Any, expected: Any) -> bool:
    """Compare FP16 answers with those of an uncompiled tower, whose weights are laid out for oneDNN."""
    return bool((found - expected).norm() <= ROUNDED * expected.norm())


def files(bundle: Path) -> list[Path]:
    return sorted((bundle.parent / f".{bundle.name}.compiled").glob("*"))


def test_batches_of_the_profile_are_compiled_at_load_and_others_run_as_they_are(
    spoilt: Path, compiler: FakeCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    """In every mode of the caller, on ordinary tensors without gradients."""
    tower, plain = load(spoilt), VisionTower.load(spoilt, "torch-cpu")
    assert compiler.compiled == compiler.ran == [1, 2, 4]
    assert tower.backend.endswith(", CPU, FP32, compiled")
    assert "for batch 2 (2 of 3) with torch.compile, which may take minutes" in caplog.text
    compiler.ran.clear()
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        for batch in (1, 2, 3, 4):
            with mode:
                images = draw(tower, batch)
                assert is_close(tower(images), plain(images))
    assert compiler.ran == [1, 2, 4] * 3


def test_what_was_compiled_reaches_the_next_process(
    spoilt: Path, compiler: FakeCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: os.environ.get(name) for name in compiling.CACHES}
    load(spoilt)
    (path,) = files(spoilt)
    caplog.clear()
    load(spoilt)
    assert compiler.compiled == [1, 2, 4]
    assert files(spoilt) == [path]
    assert not caplog.text
    assert {name: os.environ.get(name) for name in compiling.CACHES} == before


def test_nothing_is_kept_if_that_is_not_wanted(spoilt: Path, compiler: FakeCompiler) -> None:
    for _ in range(2):
        load(spoilt, runtime_cache=False)
    assert compiler.compiled == [1, 2, 4] * 2
    assert not files(spoilt)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("truncated", "it is incomplete or was altered"),
        ("altered", "it is incomplete or was altered"),
        ("another version", "another version of PyTorch wrote it"),
        ("another export", "it was compiled from another export of the bundle"),
        ("no archive", "it cannot be unpacked (File is not a zip file)"),
    ],
)
def test_what_cannot_be_used_is_removed_with_a_warning_and_compiled_again(
    spoilt: Path, compiler: FakeCompiler, caplog: pytest.LogCaptureFixture, fault: str, said: str
) -> None:
    load(spoilt)
    (path,) = files(spoilt)
    content = path.read_bytes()
    if fault == "truncated":
        path.write_bytes(content[:-3])
    elif fault == "altered":
        path.write_bytes(content[:50] + b"!" + content[51:])
    elif fault == "another version":
        path.rename(path.with_name(path.name.replace(torch.__version__, "2.0.0")))
    elif fault == "another export":
        path.rename(path.with_name("0123456789abcdef" + path.name[kept.DIGITS :]))
    else:
        path.unlink()
        bundle = Bundle.open(spoilt)
        runner: Any = choose(bundle, "torch-cpu")
        inspect.unwrap(runner._compute).__self__._kept().write(b"no archive")
    caplog.clear()
    load(spoilt)
    assert f"is discarded, and the tower is compiled again: {said}" in caplog.text
    assert compiler.compiled == [1, 2, 4] * 2
    (now,) = files(spoilt)
    assert now.name.startswith(Bundle.open(spoilt).manifest.files[FUSED_GRAPH].sha256[: kept.DIGITS])


def test_other_processors_and_numbers_of_threads_keep_their_own(
    spoilt: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    del one_thread
    load(spoilt)
    torch.set_num_threads(2)
    load(spoilt)
    monkeypatch.setattr("trtower.runners.processor.processor_fields", lambda: {"flags": "avx2"})
    load(spoilt)
    assert compiler.compiled == [1, 2, 4] * 3
    assert len(files(spoilt)) == 3


@pytest.mark.skipif(not multiplies_bf16(), reason="this processor has no BF16 arithmetic")
def test_other_arithmetics_and_profiles_keep_their_own(
    export: Callable[..., Path], tmp_path: Path, compiler: FakeCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    """What is found then holds every batch, so that nothing is compiled without a warning."""
    bundle = Path(shutil.copytree(export("clip", precision="bf16", flavour="none"), tmp_path / "bundle"))
    load(bundle, "torch-cpu")
    load(bundle, "torch-bf16")
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["profiles"][0]["max"] = 3
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    caplog.clear()
    load(bundle, "torch-bf16")
    assert "for batch 3 (3 of 3)" in caplog.text
    assert compiler.compiled == [1, 2, 4, 1, 2, 4, 1, 2, 3]
    assert len(files(bundle)) == 3


def test_full_disk_costs_the_next_process_only(
    export: Callable[..., Path],
    small_disk: Path,
    compiler: FakeCompiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = Path(shutil.copytree(export("clip", precision="fp16", flavour="none"), small_disk / "bundle"))
    (small_disk / "filler").write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 8192))
    monkeypatch.setattr(compiling, "pack", lambda _: b"\0" * 100_000)
    tower = load(bundle)
    expected = VisionTower.load(bundle, "torch-cpu")(draw(tower, 2))
    assert is_close(tower(draw(tower, 2)), expected)
    assert "what was compiled is not saved for the next process: " in caplog.text
    assert (
        "No space left on device. Make the folder writable, with room in it, or pass EngineOptions(runtime_cache=False)"
        in caplog.text
    )
    assert compiler.compiled == [1, 2, 4]
    assert not files(bundle)


def test_disk_that_is_too_full_to_unpack_does_not_cost_the_archive(
    spoilt: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(spoilt)
    before = files(spoilt)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in ((compiling, "unpack"), (tempfile, "TemporaryDirectory")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(
                BackendError, match=r"could not compile .*without compile=True: .*No space left on device"
            ):
                load(spoilt)
    assert files(spoilt) == before
    assert compiler.compiled == [1, 2, 4]


def test_failure_of_the_compiler_is_an_error_on_one_line(spoilt: Path, compiler: FakeCompiler) -> None:
    compiler.fails = "InductorError: CppCompileError: C++ compile error\n\nCommand:\ng++ ..."
    with pytest.raises(
        BackendError, match=r"could not compile .*, so load it without compile=True: Inductor"
    ) as caught:
        load(spoilt)
    assert "\n" not in str(caught.value)
    assert not files(spoilt)


def test_missing_compiler_is_said_before_anything_is_compiled(
    spoilt: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        BackendError, match=r"compile=True needs a C\+\+ compiler, and no-such-compiler is not installed"
    ):
        load(spoilt)
    monkeypatch.setenv("CXX", "")
    assert compiling.why_not(torch.device("cpu")) is None
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert "TORCHDYNAMO_DISABLE is 1" in str(compiling.why_not(torch.device("cpu")))
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setattr(compiling, "find_spec", lambda _: None)
    assert "needs the package triton" in str(compiling.why_not(torch.device("cuda", 0)))
    assert not compiler.compiled


def test_other_backends_ignore_it(spoilt: Path, compiler: FakeCompiler) -> None:
    assert load(spoilt, "onnxruntime-cpu").backend.startswith("onnxruntime")
    assert not compiler.compiled


def test_it_races_as_a_competitor_of_its_own(
    spoilt: Path, checkpoints: dict[str, Path], compiler: FakeCompiler
) -> None:
    arena = Arena.open(Bundle.open(spoilt), open_checkpoint(str(checkpoints["clip"])), "torch-cpu")
    entrant = enter(arena, "torch-compile")
    assert entrant.call(entrant.prepare(arena.draw(2))).shape == (2, 9, 64)
    assert compiler.ran == [1, 2, 4, 2]


def test_its_cold_start_compiles_too(spoilt: Path, compiler: FakeCompiler, capsys: pytest.CaptureFixture[str]) -> None:
    for name, ran in (("torch", []), ("torch-compile", [1, 2, 4, 1])):
        cold.main(str(spoilt), name, "torch-cpu", "cpu", 1, "", {}, random_weights=False)
        assert compiler.ran == ran
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["load_s"] > 0


def test_backend_that_does_not_compile_says_so(export: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    bundle = export("clip", precision="fp32", flavour="none")
    VisionTower.load(bundle, "onnxruntime-cpu", engine=EngineOptions(compile=True))
    (line,) = (each.getMessage() for each in caplog.records if "compile=True" in each.getMessage())
    assert line.startswith("compile=True does nothing on onnxruntime ")
    assert line.endswith(": name a backend that compiles, torch-cuda, torch-bf16, torch-cpu")


@pytest.mark.slow
def test_real_compiler_computes_the_same_and_never_compiles_again(
    export: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the second load everything is found; "fail_on_recompile" makes torch raise instead of compiling."""
    profile = BatchProfile(min=1, opt=1, max=2)
    for precision, backend in (("fp32", "torch-cpu"), ("bf16", "torch-bf16")):
        exported = export("clip", precision=precision, flavour="none", profiles=(profile,))
        bundle = Path(shutil.copytree(exported, tmp_path / precision))
        for _ in range(2):
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="trtower"):
                tower, plain = load(bundle, backend), VisionTower.load(bundle, backend)
        assert not caplog.text
        assert len(files(bundle)) == 1
        images = draw(tower, 2)
        with warnings.catch_warnings():  # torch warns of what it cannot trace, such as our check for a fork
            warnings.simplefilter("ignore")
            inside: Any = torch.compile(lambda pixels, tower=tower: tower(pixels))(images)
        assert torch.equal(inside, tower(images)), "a caller may compile what is around the tower"
        with torch.compiler.set_stance("fail_on_recompile"):
            for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
                for batch in (1, 2, 3):
                    with mode:
                        images = draw(tower, batch)
                        expected: Any = plain(images)
                        error = float((tower(images) - expected).norm() / expected.norm())
                        assert error <= (SAME if precision == "fp32" else 2e-2)
