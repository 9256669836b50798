"""Towers on real Ray Serve: right answers over gRPC and to handles, also while nodes die and bundles change."""

import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.conftest import BATCH, CHOSEN_ON_A_CPU, Bundles
from tests.pictures import encoded
from tests.serving.towers import KINDS, Array, expect, is_answer, pixels
from tests.serving.triton_server import free_port
from trtower import BundleError, ConfigError, InputError, VisionTower
from trtower.bundle.bundle import Bundle

ray = pytest.importorskip("ray", reason="Ray has an environment of its own: make test-serving")
cluster_utils = pytest.importorskip("ray.cluster_utils")
over_grpc = pytest.importorskip("tritonclient.grpc")

with warnings.catch_warnings():  # of Ray's code about itself
    warnings.simplefilter("ignore")
    from ray import cloudpickle, serve
    from ray.serve.schema import ServeDeploySchema
    from tritonclient.utils import InferenceServerException, np_to_triton_dtype

    from trtower.serving.ray import RayOptions, add_open_inference, application, bind_tower
    from trtower.serving.ray.open_inference import OpenInference

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's code warns of itself, in many places

ROOT = Path(__file__).parents[2]
WITHIN_S = 60.0
FINAL = ("StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")
"""Of these errors the request is the cause. After others it may be sent again, as docs/ray.md says."""


class Nodes:
    """Three nodes on this machine: a head that runs no replica, and two workers of two processors each."""

    def __init__(self) -> None:
        self.cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.workers = [self.cluster.add_node(num_cpus=2) for _ in range(2)]
        self.cluster.wait_for_nodes()

    def kill_one(self) -> None:
        self.cluster.remove_node(self.workers.pop(), allow_graceful=False)

    def add_one(self) -> None:
        self.workers.append(self.cluster.add_node(num_cpus=2))
        self.cluster.wait_for_nodes()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    ray.init(address=nodes.cluster.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def address(nodes: Nodes) -> Iterator[str]:
    """Where Ray Serve answers gRPC."""
    port = free_port()
    servicer = f"{add_open_inference.__module__}.{add_open_inference.__name__}"
    serve.start(
        proxy_location="HeadOnly",
        http_options={"port": free_port()},
        grpc_options={"port": port, "grpc_servicer_functions": [servicer]},
    )
    yield f"127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(autouse=True)
def _nothing_is_left(nodes: Nodes) -> Iterator[None]:
    yield
    for name in serve.status().applications:
        serve.delete(name)


def deploy(bundle: Path, app: str = "app", options: dict[str, Any] | None = None, **args: Any) -> Any:
    """Deploy a bundle, with Ray's options and ours."""
    ours: dict[str, Any] = {"backend": CHOSEN_ON_A_CPU, "allow_uncertified": True} | args
    return serve.run(bind_tower(bundle, RayOptions(**ours), **options or {}), name=app, route_prefix=f"/{app}")


def ask(address: str, model: str, array: Array, name: str = "pixel_values", app: str = "app", attempts: int = 1) -> Any:
    """Ask as tritonclient's users do, again if it is worth it; return the whole answer."""
    tensor = over_grpc.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    with over_grpc.InferenceServerClient(address) as client:
        for attempt in range(attempts):
            try:
                return client.infer(model, [tensor], headers={"application": app})
            except InferenceServerException as err:
                if err.status() in FINAL or attempt == attempts - 1:
                    raise
                time.sleep(2**attempt / 4)
    raise AssertionError


def features(answer: Any) -> Array:
    return answer.as_numpy("hidden_states")


def until(true: Callable[[], bool], within_s: float = WITHIN_S) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.2)


def replicas(name: str = "app") -> int:
    app = serve.status().applications.get(name)
    deployment = app and app.deployments.get("TowerDeployment")
    return deployment.replica_states.get("RUNNING", 0) if deployment else 0


# Answers


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_tower(
    address: str, by_kind: dict[str, Path], towers: dict[str, VisionTower], kind: str
) -> None:
    tower = towers[kind]
    handle = deploy(by_kind[kind])
    for batch in range(1, BATCH.max + 1):
        array = pixels(tower, batch)
        answer = features(ask(address, kind, array))
        expected = expect(tower, array)
        assert answer.dtype == expected.dtype
        np.testing.assert_array_equal(answer, expected)
        np.testing.assert_array_equal(handle.remote(array).result(), expected)
        torch.testing.assert_close(
            handle.remote(torch.from_numpy(array)).result(), tower.run_prepared(torch.from_numpy(array)), rtol=0, atol=0
        )

    contents = [encoded(seed) for seed in range(3)]
    array = np.array([[content] for content in contents], dtype=object)
    answer = features(ask(address, f"{kind}-encoded", array, "image"))
    prepared = pixels(tower, 3)
    np.testing.assert_array_equal(answer, expect(tower, prepared))
    encoded_features = handle.encode.remote(contents).result()
    assert torch.equal(encoded_features, tower.run_prepared(torch.from_numpy(prepared)))

    arrays = [pixels(tower, 1 + seed % 3, seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as clients:
        answers = [*clients.map(lambda array: features(ask(address, kind, array)), arrays)]
    assert all(is_answer(tower, *each) for each in zip(arrays, answers, strict=True))


def test_layer_and_tokens_can_be_chosen(address: str, by_kind: dict[str, Path]) -> None:
    tower = VisionTower.load(by_kind["fp32"], CHOSEN_ON_A_CPU, select_feature="cls_patch")
    deploy(by_kind["fp32"], select_feature="cls_patch")
    array = pixels(tower, 1)
    np.testing.assert_array_equal(features(ask(address, "fp32", array)), expect(tower, array))


def test_model_describes_itself(address: str, by_kind: dict[str, Path], towers: dict[str, VisionTower]) -> None:
    deploy(by_kind["fp16"])
    client, headers = over_grpc.InferenceServerClient(address), {"application": "app"}
    assert client.is_server_live(headers)
    assert client.is_server_ready(headers)
    assert client.is_model_ready("fp16", headers=headers)
    assert not client.is_model_ready("other", headers=headers)
    assert "Ray Serve" in client.get_server_metadata(headers).name
    described = client.get_model_metadata("fp16", headers=headers)
    assert [(each.name, each.datatype, [*each.shape]) for each in described.inputs] == [
        ("pixel_values", "FP16", [-1, 3, 42, 42])
    ]
    row = [*towers["fp16"].feature_shape]
    assert [(each.datatype, [*each.shape]) for each in described.outputs] == [("FP16", [-1, *row])]
    encoded = client.get_model_metadata("fp16-encoded", headers=headers)
    assert [(each.name, each.datatype) for each in encoded.inputs] == [("image", "BYTES")]
    answer = ask(address, "fp16", pixels(towers["fp16"], 1)).get_response()
    assert answer.parameters["tower_sha256"].string_param == Bundle.open(by_kind["fp16"]).manifest.tower_sha256


# What clients do wrong


def test_client_is_told_what_is_wrong(address: str, by_kind: dict[str, Path], towers: dict[str, VisionTower]) -> None:
    handle = deploy(by_kind["fp32"])
    sound = pixels(towers["fp32"], 1)
    nan = sound.copy()
    nan[0, 1, 2, 3] = np.nan
    text = np.array([[b"no picture"]], dtype=object)
    for array, model, name, message in (
        (nan, "fp32", "pixel_values", r"INVALID_ARGUMENT\] pixel_values holds NaN or infinity"),
        (sound.astype(np.float16), "fp32", "pixel_values", r"INVALID_ARGUMENT\] pixel_values is FP16; expected FP32"),
        (sound[..., :-1].copy(), "fp32", "pixel_values", r"\(1, 3, 42, 41\); expected \(B, 3, 42, 42\)"),
        (np.repeat(sound, 5, 0), "fp32", "pixel_values", "5 pictures; a request may have 1 to 4: send several"),
        (sound[:0], "fp32", "pixel_values", "pixel_values holds 0 pictures"),
        (sound, "fp32", "pixels", r"INVALID_ARGUMENT\] inputs pixels; expected pixel_values"),
        (sound, "other", "pixel_values", r"NOT_FOUND\] no model other here, only fp32 and fp32-encoded"),
        (np.full_like(sound, 1e39, np.float64), "fp32", "pixel_values", "pixel_values is FP64; expected FP32"),
        (sound, "fp32-encoded", "image", "image is FP32; expected BYTES"),
        (text, "fp32-encoded", "image", r"INVALID_ARGUMENT\] image\[0\]: Pillow finds no picture in it"),
    ):
        with pytest.raises(InferenceServerException, match=message):
            ask(address, model, array, name)
    with over_grpc.InferenceServerClient(address) as client:
        tensor = over_grpc.InferInput("pixel_values", sound.shape, "FP32")
        tensor.set_data_from_numpy(sound)
        with pytest.raises(InferenceServerException, match=r"NOT_FOUND\] no model fp32 7 here"):
            client.infer("fp32", [tensor], "7")
        classes = over_grpc.InferRequestedOutput("hidden_states", class_count=3)
        with pytest.raises(InferenceServerException, match="hidden_states asks for classification, which is not"):
            client.infer("fp32", [tensor], outputs=[classes])
        with pytest.raises(InferenceServerException, match="no output is called other, only hidden_states"):
            client.infer("fp32", [tensor], outputs=[over_grpc.InferRequestedOutput("other")])
        tensor._input.shape[0] = -1
        with pytest.raises(InferenceServerException, match=r"pixel_values has shape \(-1, 3, 42, 42\); expected no -1"):
            client.infer("fp32", [tensor])
        with pytest.raises(InferenceServerException, match=r"UNIMPLEMENTED"):
            client.get_model_config("fp32")
    with pytest.raises(InputError, match="holds NaN"):
        handle.remote(nan).result()
    with pytest.raises(InputError, match="holds NaN or infinity, as float32"):
        handle.remote(np.full_like(sound, 1e39, np.float64)).result()
    with pytest.raises(InputError, match="pixel_values is str; expected an array or a tensor"):
        handle.remote("picture").result()
    np.testing.assert_array_equal(features(ask(address, "fp32", sound)), expect(towers["fp32"], sound))


def test_request_gets_its_own_features_and_no_more(
    address: str, by_kind: dict[str, Path], towers: dict[str, VisionTower]
) -> None:
    handle = deploy(by_kind["uint8"], batch_wait_ms=500)
    tensors = [torch.from_numpy(pixels(towers["uint8"], 1, seed)) for seed in range(3)]
    wrong = [tensors[0].bool(), tensors[0].to(torch.int64)]
    sent = [handle.remote(each) for each in (*tensors, *wrong)]  # which would make one batch
    for tensor, response in zip(tensors, sent, strict=False):
        answer = response.result()
        assert is_answer(towers["uint8"], tensor.numpy(), answer.numpy())
        assert answer.untyped_storage().nbytes() == answer.nbytes
    for response in sent[len(tensors) :]:
        with pytest.raises(InputError, match=r"pixel_values is torch.(bool|int64); expected uint8"):
            response.result()


def test_unsound_request_fails_alone(address: str, by_kind: dict[str, Path], towers: dict[str, VisionTower]) -> None:
    deploy(by_kind["fp32"], batch_wait_ms=200)
    sound = pixels(towers["fp32"], 1)
    nan = np.full_like(sound, np.nan)

    def answer(array: Array) -> Array | None:
        try:
            return features(ask(address, "fp32", array))
        except InferenceServerException:
            return None

    with ThreadPoolExecutor(4) as clients:
        answers = [*clients.map(answer, [sound, nan, sound, nan])]
    assert [each is None for each in answers] == [False, True, False, True]
    assert is_answer(towers["fp32"], sound, answers[0])


# What operators do wrong


def test_argument_that_is_wrong_is_named(certified: Path, tmp_path: Path) -> None:
    for args, error, message in (
        ({}, ConfigError, "no bundle: pass bundle=PATH"),
        ({"bundle": tmp_path / "none"}, BundleError, "none"),
        ({"bundle": certified, "batch": 3}, ConfigError, "argument batch: Unexpected keyword argument"),
        (
            {"bundle": certified, "batch_wait_ms": "soon"},
            ConfigError,
            "argument batch_wait_ms: Input should be",
        ),
        ({"bundle": certified, "select_layer": "-3"}, ConfigError, "select_layer=-3 reads hidden state 2"),
        ({"bundle": certified, "batch_wait_ms": -1}, ConfigError, "batch_wait_ms=-1.0; expected"),
    ):
        with pytest.raises(error, match=message):
            application(args)


def test_bundle_without_certificate_is_refused(by_kind: dict[str, Path]) -> None:
    with pytest.raises(BundleError, match=r"not certified: .* or serve it anyway with allow_uncertified=true"):
        application({"bundle": by_kind["fp32"]})


def test_text_is_read_as_what_it_means() -> None:
    options = RayOptions.read({"batch_wait_ms": "2.5", "allow_uncertified": "true", "select_layer": "-2"})
    assert options == RayOptions(batch_wait_ms=2.5, allow_uncertified=True, select_layer=-2)
    assert RayOptions.read({"select_layer": "-2,-3"}).select_layer == [-2, -3]


def test_certified_bundle_is_served_by_default(address: str, certified: Path) -> None:
    serve.run(application({"bundle": str(certified), "backend": CHOSEN_ON_A_CPU}), name="app")
    tower = VisionTower.load(certified, CHOSEN_ON_A_CPU)
    array = pixels(tower, 2)
    np.testing.assert_array_equal(features(ask(address, "tower", array)), expect(tower, array))


def test_config_file_of_the_page(nodes: Nodes, address: str, certified: Path, tmp_path: Path) -> None:
    """`serve run` takes it, and what is changed here is what a reader changes: the bundle and where it runs."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ray.md").read_text(encoding="utf-8"), re.DOTALL)
    config = yaml.safe_load(text)
    (app,) = config["applications"]
    app["args"] |= {"bundle": str(certified), "backend": CHOSEN_ON_A_CPU}
    app["deployments"][0]["ray_actor_options"] = {"num_cpus": 1}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(file), "--address", nodes.cluster.address]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: replicas("clip") == 2)
            tower = VisionTower.load(certified, CHOSEN_ON_A_CPU)
            array = pixels(tower, 2)
            np.testing.assert_array_equal(features(ask(address, "tower", array, app="clip")), expect(tower, array))
        finally:
            process.kill()  # an interrupt would end Serve, and all that it serves


def test_config_of_the_kubernetes_manifest_is_one() -> None:
    text = (ROOT / "examples" / "kubernetes" / "ray.yaml").read_text(encoding="utf-8")
    manifest = next(yaml.safe_load_all(text))
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (app,) = config.applications
    assert app.import_path == "trtower.serving.ray:application"
    assert RayOptions.read({name: value for name, value in app.args.items() if name != "bundle"})


def why_not_deployed(name: str = "app") -> str:
    deployment = serve.status().applications[name].deployments["TowerDeployment"]
    return str(deployment.message)


def test_another_bundle_at_its_path_is_refused(address: str, by_kind: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(by_kind["fp32"], tmp_path / "tower"))
    app = application({"bundle": copy, "backend": CHOSEN_ON_A_CPU, "allow_uncertified": True})
    shutil.rmtree(copy)
    shutil.copytree(by_kind["fp16"], copy)
    with pytest.raises(RuntimeError):
        serve.run(app, name="app")
    assert "is another bundle than where this was started" in why_not_deployed()


def test_gpu_that_nobody_asked_for_is_not_left_idle(
    nodes: Nodes, address: str, by_kind: dict[str, Path], towers: dict[str, VisionTower]
) -> None:
    node = nodes.cluster.add_node(num_cpus=2, num_gpus=1)  # declared: there is none
    nodes.cluster.wait_for_nodes()
    try:
        with pytest.raises(RuntimeError):
            deploy(by_kind["fp32"], backend="auto")
        assert "the cluster has GPUs, and this replica was given none: set num_gpus" in why_not_deployed()
        deploy(by_kind["fp32"], options={"num_replicas": 2, "ray_actor_options": {"num_gpus": 0.5}})
        assert replicas() == 2
        array = pixels(towers["fp32"], 2)
        assert is_answer(towers["fp32"], array, features(ask(address, "fp32", array)))
    finally:
        serve.delete("app")
        nodes.cluster.remove_node(node)


# What happens meanwhile


class Load:
    """Clients that keep asking; every answer is kept, and every failure."""

    def __init__(self, address: str, model: str, tower: VisionTower, app: str = "app", clients: int = 3) -> None:
        self.arrays = [pixels(tower, 1 + seed % 2, seed) for seed in range(clients)]
        self.answers: list[tuple[int, Any]] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._asked = (address, model, app)
        self._threads = [threading.Thread(target=self._ask, args=[place]) for place in range(clients)]

    def _ask(self, place: int) -> None:
        address, model, app = self._asked
        while not self._stop.is_set():
            try:
                self.answers.append((place, ask(address, model, self.arrays[place], app=app, attempts=6)))
            except InferenceServerException as err:
                self.failures.append(str(err))

    def wait_for_more(self, count: int = 30) -> None:
        goal = len(self.answers) + count
        until(lambda: len(self.answers) >= goal)

    def is_right(self, *towers: VisionTower) -> bool:
        """Whether each answer is that of the tower that it names."""
        by_sha256 = {each.bundle.manifest.tower_sha256: each for each in towers}
        known: dict[tuple[int, str, bytes], bool] = {}
        for place, answer in self.answers:
            sha256 = answer.get_response().parameters["tower_sha256"].string_param
            key = (place, sha256, features(answer).tobytes())
            if key not in known:
                known[key] = is_answer(by_sha256[sha256], self.arrays[place], features(answer))
        return all(known.values())


@contextmanager
def load_on(address: str, model: str, tower: VisionTower, **options: Any) -> Iterator[Load]:
    load = Load(address, model, tower, **options)
    for thread in load._threads:
        thread.start()
    try:
        load.wait_for_more()
        yield load
        load.wait_for_more()
    finally:
        load._stop.set()
        for thread in load._threads:
            thread.join()


def test_killed_node_fails_no_request(
    nodes: Nodes, address: str, by_kind: dict[str, Path], towers: dict[str, VisionTower]
) -> None:
    deploy(by_kind["fp32"], options={"num_replicas": 2, "max_replicas_per_node": 1})
    try:
        with load_on(address, "fp32", towers["fp32"]) as load:
            nodes.kill_one()
            load.wait_for_more(100)
            nodes.add_one()
            until(lambda: replicas() == 2)
        assert load.failures == []
        assert load.is_right(towers["fp32"])
    finally:
        if len(nodes.workers) < 2:
            nodes.add_one()


def test_replicas_come_and_go_without_a_failed_request(
    address: str, by_kind: dict[str, Path], towers: dict[str, VisionTower]
) -> None:
    deploy(by_kind["fp32"])
    with load_on(address, "fp32", towers["fp32"]) as load:
        deploy(by_kind["fp32"], options={"num_replicas": 3})
        until(lambda: replicas() == 3)
        load.wait_for_more()
        deploy(by_kind["fp32"], options={"num_replicas": 1})
        until(lambda: replicas() == 1)
    assert load.failures == []
    assert load.is_right(towers["fp32"])


def test_replicas_follow_the_load(address: str, by_kind: dict[str, Path], towers: dict[str, VisionTower]) -> None:
    autoscaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 1,
        "upscale_delay_s": 1,
        "downscale_delay_s": 1,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 1,
    }
    deploy(by_kind["fp32"], options={"autoscaling_config": autoscaling})
    assert replicas() == 1
    with load_on(address, "fp32", towers["fp32"], clients=8) as load:
        until(lambda: replicas() == 2)
    until(lambda: replicas() == 1)
    assert load.failures == []


def test_two_bundles_side_by_side(address: str, by_kind: dict[str, Path], towers: dict[str, VisionTower]) -> None:
    for kind in ("fp32", "uint8"):
        deploy(by_kind[kind], app=kind)
    for kind in ("fp32", "uint8", "fp32"):
        array = pixels(towers[kind], 2)
        np.testing.assert_array_equal(features(ask(address, kind, array, app=kind)), expect(towers[kind], array))
    with pytest.raises(InferenceServerException, match=r"no model uint8 here, .* name one in the request's metadata"):
        ask(address, "uint8", pixels(towers["uint8"], 1), app="fp32")


def test_bundle_changes_without_a_failed_request(
    address: str, by_kind: dict[str, Path], bundles: Bundles, towers: dict[str, VisionTower]
) -> None:
    other = bundles(layer=-3)
    after = VisionTower.load(other, CHOSEN_ON_A_CPU)
    deploy(by_kind["fp32"], options={"num_replicas": 2})
    with load_on(address, "fp32", towers["fp32"]) as load:
        deploy(other, options={"num_replicas": 2}, name="fp32")
        load.wait_for_more()
        count = len(load.answers)
        load.wait_for_more()
    assert load.failures == []
    assert load.is_right(towers["fp32"], after)
    assert {each.get_response().parameters["tower_sha256"].string_param for _, each in load.answers[count:]} == {
        after.bundle.manifest.tower_sha256
    }


class BreakableWithoutAGpu(OpenInference):
    """A tower whose comparison can be made to fail, as it does if an engine goes wrong."""

    async def break_engine(self, *, broken: bool) -> None:
        self._golden.answers.mul_(1e3 if broken else 1e-3)


def test_wrong_engine_answers_nobody_until_it_is_right(
    address: str, by_kind: dict[str, Path], towers: dict[str, VisionTower]
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    period = {"health_check_period_s": 0.5, "health_check_timeout_s": 5}
    options = RayOptions(backend=CHOSEN_ON_A_CPU, allow_uncertified=True)
    deployment = serve.deployment(name="TowerDeployment", **period)(BreakableWithoutAGpu)
    handle = serve.run(deployment.bind(by_kind["fp32"], options), name="app", route_prefix="/app")
    array = pixels(towers["fp32"], 1)

    def refusal() -> str:
        try:
            assert is_answer(towers["fp32"], array, features(ask(address, "fp32", array)))
        except InferenceServerException as err:
            return str(err)
        return ""

    assert not refusal()
    handle.break_engine.remote(broken=True).result()
    until(lambda: "UNAVAILABLE] fp32 failed its last check, and is being replaced" in refusal())
    until(lambda: not refusal())  # by a new replica
    until(lambda: serve.status().applications["app"].status == "RUNNING")


def test_replica_that_runs_needs_its_folder_no_more(
    address: str, by_kind: dict[str, Path], towers: dict[str, VisionTower], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(by_kind["fp32"], tmp_path / "tower"))
    deploy(copy, options={"health_check_period_s": 0.5, "health_check_timeout_s": 5})
    copy.rename(tmp_path / "elsewhere")
    array = pixels(towers["fp32"], 1)
    end = time.monotonic() + 5
    while time.monotonic() < end:
        assert is_answer(towers["fp32"], array, features(ask(address, "tower", array)))
    assert serve.status().applications["app"].status == "RUNNING"


def test_loss_of_the_head_is_said_at_once(certified: Path) -> None:
    """It ends the service, as docs/ray.md says: nothing hangs, and nothing comes back by itself."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.serving.lose_the_head", str(certified)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    said = [line for line in done.stdout.splitlines() if line.startswith(("answered", "Status", "after"))]
    assert said == ["answered", "StatusCode.UNAVAILABLE", "after 20 s: StatusCode.UNAVAILABLE"], done.stderr
