"""The real tritonserver answers as the tower in this process, bit for bit, and says what is wrong."""

import io
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.conftest import BATCH, CHOSEN_ON_A_CPU
from tests.pictures import encoded
from trtower import VisionTower
from trtower.serving.triton.config import TritonOptions
from trtower.serving.triton.repository import write_repository

pytest.importorskip("pytriton", reason="tritonserver has an environment of its own: make test-serving")

import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.serving.towers import KINDS, expect, is_answer, pixels
from tests.serving.triton_server import Server, serving

Array = Any
PROTOCOLS = {"grpc": over_grpc, "http": over_http}


@pytest.fixture(scope="module")
def server(by_kind: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton")
    write_repository(
        by_kind.values(), folder / "models", TritonOptions(allow_uncertified=True, backend=CHOSEN_ON_A_CPU)
    )
    with serving(folder / "models", folder) as server:
        yield server


def ask(
    server: Server, model: str, array: Array, protocol: str = "grpc", name: str = "pixel_values", **options: Any
) -> Array:
    library: Any = PROTOCOLS[protocol]
    with library.InferenceServerClient(getattr(server, protocol)) as client:
        tensor = library.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        return client.infer(model, [tensor], **options).as_numpy("hidden_states")


@pytest.mark.parametrize("batch", range(1, BATCH.max + 1))
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_tower(
    server: Server, towers: dict[str, VisionTower], kind: str, protocol: str, batch: int
) -> None:
    array = pixels(towers[kind], batch)
    answer = ask(server, kind, array, protocol)
    expected = expect(towers[kind], array)
    assert answer.dtype == expected.dtype
    np.testing.assert_array_equal(answer, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_clients_at_once(server: Server, towers: dict[str, VisionTower], kind: str) -> None:
    tower = towers[kind]
    arrays = [pixels(tower, 1 + seed % 3, seed) for seed in range(48)]
    with ThreadPoolExecutor(8) as clients:
        answers = [*clients.map(lambda array: ask(server, kind, array), arrays)]
    for array, answer in zip(arrays, answers, strict=True):
        assert is_answer(tower, array, answer)


@pytest.mark.parametrize("kind", ["uint8", "uint8-nchw"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_encoded_pictures(server: Server, towers: dict[str, VisionTower], kind: str, protocol: str) -> None:
    contents = [encoded(seed) for seed in range(3)]
    array = np.array([[content] for content in contents], dtype=object)
    answer = ask(server, f"{kind}-encoded", array, protocol, "image")
    pictures = [Image.open(io.BytesIO(content)) for content in contents]
    expected = expect(towers[kind], towers[kind].image_processor(pictures, return_tensors="pt")["pixel_values"].numpy())
    np.testing.assert_array_equal(answer, expected)


# What clients do wrong


def wrong(change: Callable[[Array], Array]) -> Callable[[VisionTower], Array]:
    return lambda tower: change(pixels(tower, 1))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wrong(lambda array: array[..., :-1].copy()), r"unexpected shape for input 'pixel_values'"),
        (wrong(lambda array: array.astype(np.float32)), "data-type is 'FP32', but model 'fp16' expects 'FP16'"),
        (wrong(lambda array: array * np.float16(np.nan)), "pixel_values holds NaN or infinity"),
        (lambda tower: pixels(tower, BATCH.max + 1), "batch-size must be <= 4 for 'fp16'"),
        (lambda tower: np.zeros((10_000, 3, 1, 1), np.float16), "batch-size must be <= 4"),
    ],
)
def test_wrong_input_is_an_error_of_the_client(
    server: Server, towers: dict[str, VisionTower], make: Callable[[VisionTower], Array], message: str, protocol: str
) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        ask(server, "fp16", make(towers["fp16"]), protocol)
    assert "/" not in str(caught.value.message())
    array = pixels(towers["fp16"], 1)
    np.testing.assert_array_equal(ask(server, "fp16", array, protocol), expect(towers["fp16"], array))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no picture", r"image\[1\]: Pillow finds no picture in it"),
        (encoded(1)[:200], r"image\[1\]: Pillow cannot decode it"),
        (b"", r"image\[1\]: its file is empty"),
    ],
)
def test_broken_picture_is_an_error_of_the_client(server: Server, content: bytes, message: str) -> None:
    array = np.array([[encoded(0)], [content]], dtype=object)
    with pytest.raises(InferenceServerException, match=message):
        ask(server, "uint8-encoded", array, name="image")


def test_bad_request_does_not_spoil_those_that_it_runs_with(server: Server, towers: dict[str, VisionTower]) -> None:
    tower = towers["fp32"]
    arrays = [pixels(tower, 1, seed) for seed in range(32)]
    for array in arrays[::4]:
        array[0, 0, 0, 0] = np.nan

    def outcome(array: Array) -> Array | str:
        try:
            return ask(server, "fp32", array)
        except InferenceServerException as err:
            return str(err.message())

    with ThreadPoolExecutor(8) as clients:
        answers = [*clients.map(outcome, arrays)]
    for index, (array, answer) in enumerate(zip(arrays, answers, strict=True)):
        if index % 4 == 0:
            assert "NaN or infinity" in answer
        else:
            assert not isinstance(answer, str)
            np.testing.assert_allclose(answer, expect(tower, array), atol=1e-4)


def test_request_that_waits_too_long_is_refused(server: Server, towers: dict[str, VisionTower]) -> None:
    array = pixels(towers["fp32"], BATCH.max)
    outcomes: list[str] = []

    def call() -> None:
        try:
            ask(server, "fp32", array, timeout=1)  # a microsecond in the queue
            outcomes.append("answered")
        except InferenceServerException as err:
            outcomes.append(str(err.message()))

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 16
    assert {outcome for outcome in outcomes if outcome != "answered"} <= {"Request timeout expired"}


def test_metrics_are_the_servers_own(server: Server, towers: dict[str, VisionTower]) -> None:
    import urllib.request

    ask(server, "fp16", pixels(towers["fp16"], 1))
    with urllib.request.urlopen(f"http://{server.metrics}/metrics") as page:
        assert 'nv_inference_request_success{model="fp16",version="1"}' in page.read().decode()


def test_client_learns_whose_features_these_are(server: Server, towers: dict[str, VisionTower]) -> None:
    with over_grpc.InferenceServerClient(server.grpc) as client:
        parameters = client.get_model_config("fp16", as_json=True)["config"]["parameters"]
    assert parameters["tower_sha256"]["string_value"] == towers["fp16"].bundle.manifest.tower_sha256


# What a deployer does wrong


def repository(bundle: Path, folder: Path, **options: Any) -> Path:
    write_repository([bundle], folder / "models", TritonOptions(**{"allow_uncertified": True} | options))
    return folder / "models"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda bundle: shutil.rmtree(bundle), "is not a bundle: it does not exist"),
        (lambda bundle: (bundle / "tower.onnx").unlink(), r"tower.onnx is missing"),
        (lambda bundle: (bundle / "tower.onnx.data").write_bytes(b"x"), r"tower.onnx.data has 1 bytes"),
        (lambda bundle: flip(bundle / "tower.onnx.data"), r"tower.onnx.data was altered"),
    ],
)
def test_damaged_model_never_becomes_ready(
    by_kind: dict[str, Path], tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    models = repository(by_kind["fp32"], tmp_path)
    spoil(models / "fp32" / "1" / "bundle")
    with serving(models, tmp_path, wait=False) as server:
        assert server.process.wait(60) != 0  # the server ends: it is strict about what it was told to serve
        assert message in server.read_log()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt"}, "no requested backend can run"),
        ({"kind": "gpu"}, "has kind KIND_GPU but no GPUs are available"),
    ],
)
def test_what_cannot_run_is_said_at_the_start(
    by_kind: dict[str, Path], tmp_path: Path, options: dict[str, str], message: str
) -> None:
    models = repository(by_kind["fp32"], tmp_path, **options)
    with serving(models, tmp_path, wait=False) as server:
        assert server.process.wait(60) != 0
        assert message in server.read_log()


def test_certificate_is_required_where_it_is_served(certified: Path, tmp_path: Path) -> None:
    write_repository([certified], tmp_path / "models", TritonOptions(backend="openvino"))
    with serving(tmp_path / "models", tmp_path) as server, VisionTower.load(certified, "openvino") as tower:
        array = pixels(tower, 2)
        np.testing.assert_array_equal(ask(server, "tower", array), expect(tower, array))


def test_plan_needs_tritons_own_backend(by_kind: dict[str, Path], tmp_path: Path) -> None:
    """The wheel has no TensorRT backend; with the config it gets as far as looking for it."""
    models = repository(by_kind["fp32"], tmp_path)
    config = models / "fp32" / "config.pbtxt"
    config.write_text(
        config.read_text(encoding="utf-8").replace('backend: "python"', 'platform: "tensorrt_plan"'), encoding="utf-8"
    )
    with serving(models, tmp_path, wait=False) as server:
        assert server.process.wait(60) != 0
        assert "unable to find backend library for backend 'tensorrt'" in server.read_log()


# Stopping, and going on


def test_stopped_server_answers_with_an_error_and_hangs_nobody(by_kind: dict[str, Path], tmp_path: Path) -> None:
    models = repository(by_kind["fp32"], tmp_path)
    outcomes: list[str] = []
    with serving(models, tmp_path) as server, VisionTower(by_kind["fp32"]) as tower:
        array = pixels(tower, BATCH.max)
        stop = threading.Event()

        def call() -> None:
            while not stop.is_set():
                try:
                    ask(server, "fp32", array, client_timeout=20)
                    outcomes.append("answered")
                except InferenceServerException as err:
                    outcomes.append(str(err.message()))
                    return

        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        while len(outcomes) < 20:
            time.sleep(0.01)
        stubs = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join(30)
        stop.set()
    assert outcomes.count("answered") < len(outcomes)
    assert not [thread for thread in threads if thread.is_alive()]
    # A server that is killed inside its shared memory leaves a process of its own waiting there, now and then.
    _, alive = psutil.wait_procs(stubs, timeout=30)
    for process in alive:
        process.kill()


def test_second_version_takes_over_without_a_failed_request(by_kind: dict[str, Path], tmp_path: Path) -> None:
    models = repository(by_kind["fp32"], tmp_path)
    newer = Path(shutil.copytree(by_kind["fp32"], tmp_path / "newer" / "fp32"))
    options = ("--model-control-mode=explicit", "--load-model=fp32")
    with serving(models, tmp_path, *options) as server, VisionTower(newer) as tower:
        array, versions = pixels(tower, 1), list[str]()
        failed: list[str] = []
        stop = threading.Event()

        def call() -> None:
            with over_grpc.InferenceServerClient(server.grpc) as client:
                tensor = over_grpc.InferInput("pixel_values", array.shape, "FP32")
                tensor.set_data_from_numpy(array)
                while not stop.is_set():
                    try:
                        versions.append(client.infer("fp32", [tensor]).get_response().model_version)
                    except InferenceServerException as err:
                        failed.append(str(err.message()))

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        while not versions:
            time.sleep(0.01)
        write_repository([newer], models, TritonOptions(allow_uncertified=True), version=2)
        with over_grpc.InferenceServerClient(server.grpc) as client:
            client.load_model("fp32")
        while "2" not in versions:
            time.sleep(0.01)
        stop.set()
        for thread in threads:
            thread.join(30)
    assert failed == []
    assert {*versions} == {"1", "2"}


def test_other_models_are_served_beside_a_damaged_one(
    by_kind: dict[str, Path], towers: dict[str, VisionTower], tmp_path: Path
) -> None:
    models = tmp_path / "models"
    write_repository([by_kind["fp32"], by_kind["fp16"]], models, TritonOptions(allow_uncertified=True))
    flip(models / "fp32" / "1" / "bundle" / "tower.onnx.data")
    with serving(models, tmp_path, "--exit-on-error=false", "--strict-readiness=false") as server:
        array = pixels(towers["fp16"], 1)
        np.testing.assert_array_equal(ask(server, "fp16", array), expect(towers["fp16"], array))
        with pytest.raises(InferenceServerException, match=r"'fp32' .*is not (found|ready)|no available versions"):
            ask(server, "fp32", pixels(towers["fp32"], 1))


def test_uncertified_bundle_is_refused_where_it_is_served(by_kind: dict[str, Path], tmp_path: Path) -> None:
    models = repository(by_kind["fp32"], tmp_path)
    config = models / "fp32" / "config.pbtxt"
    text = config.read_text(encoding="utf-8")
    required = text.replace('string_value: "false"', 'string_value: "true"')
    assert required != text
    config.write_text(required, encoding="utf-8")
    with serving(models, tmp_path, wait=False) as server:
        assert server.process.wait(60) != 0
        assert "is not certified" in server.read_log()
