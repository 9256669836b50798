"""vLLM's and Dynamo's own code takes what trtower gives it: the real wheels, of which no engine is started."""

import asyncio
import base64
import importlib
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.conftest import CHOSEN_ON_A_CPU
from tests.pictures import encoded, picture
from tests.runtime.serving.conftest import Projected, projected  # noqa: F401 - a fixture
from trtower import ConfigError, VisionTower
from trtower.serving.vllm import content_parts, image_embeds

pytestmark = pytest.mark.filterwarnings("ignore")  # their code warns of itself, in many places

parse = pytest.importorskip("vllm.multimodal.parse", reason="their code has an environment: make test-serving")
media = pytest.importorskip("vllm.multimodal.media.image")
dynamo = Path(pytest.importorskip("dynamo.common").__file__).parents[1]

# What these packages import by themselves starts engines, and needs a hundred packages more.
ENCODERS = "dynamo.vllm.multimodal_utils.custom_encoder"
for package in ("dynamo.vllm", "dynamo.vllm.multimodal_utils", ENCODERS, f"{ENCODERS}.adapter"):
    module = ModuleType(package)
    module.__path__ = [str(dynamo.joinpath(*package.split(".")[1:]))]
    sys.modules[package] = module

encoder = importlib.import_module(f"{ENCODERS}.async_encoder")
linear = importlib.import_module(f"{ENCODERS}.adapter.linear")
if TYPE_CHECKING:
    from trtower.serving.dynamo import TowerBackend
else:
    TowerBackend = importlib.import_module("trtower.serving.dynamo").TowerBackend


@pytest.fixture(scope="module")
def llava(projected: Projected) -> Path:  # noqa: F811
    return projected("llava", precision="fp16")


@pytest.fixture(scope="module")
def tower(llava: Path) -> VisionTower:
    return VisionTower.load(llava, CHOSEN_ON_A_CPU)


# vLLM


def test_vllm_takes_the_features(tower: VisionTower) -> None:
    embeds = image_embeds(tower, [picture(seed) for seed in range(3)])
    parser = parse.MultiModalDataParser(expected_hidden_size=tower.hidden_size)
    items = parser.parse_mm_data({"image": embeds})["image"]
    assert isinstance(items, parse.ImageEmbeddingItems)
    assert items.get_count() == 3
    assert [items.get_feature_size(index) for index in range(3)] == [tower.num_tokens] * 3
    assert torch.equal(items.get(1), embeds[1])


def test_server_of_vllm_reads_the_parts(tower: VisionTower) -> None:
    embeds = image_embeds(tower, [picture(0), picture(1)])
    reader = media.ImageEmbeddingMediaIO()
    read = [reader.load_base64("", part["image_embeds"]) for part in content_parts(embeds)]
    assert torch.equal(torch.stack(read), embeds)
    items = parse.MultiModalDataParser(expected_hidden_size=tower.hidden_size).parse_mm_data({"image": read})["image"]
    assert items.get_count() == 2


def test_vllm_refuses_features_of_another_model(tower: VisionTower) -> None:
    embeds = image_embeds(tower, picture(0))
    with pytest.raises(ValueError, match="hidden dimension mismatch"):
        parse.MultiModalDataParser(expected_hidden_size=tower.hidden_size + 1).parse_mm_data({"image": embeds})


# Dynamo


def as_url(seed: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(encoded(seed)).decode()}"


class Driven:
    """A backend as Dynamo's worker drives it: a loop for requests, and a thread for the engine."""

    def __init__(self, backend: Any) -> None:
        self.encoder = encoder.AsyncVisionEncoder(backend)
        self.encoder.load("llava-hf/llava-1.5-7b-hf")

    def encode(self, *requests: list[str]) -> list[Any]:
        """Send requests at once; return the features, or the error, of each."""

        async def send() -> list[Any]:
            return await asyncio.gather(*map(self.encoder.encode, requests), return_exceptions=True)

        return asyncio.run(send())


@pytest.fixture
def driven(llava: Path) -> Iterator[Driven]:
    class Encoder(TowerBackend):
        bundle = str(llava)
        image_token_id = 7
        backend = CHOSEN_ON_A_CPU
        allow_uncertified = True

    driven = Driven(Encoder())
    yield driven
    driven.encoder.shutdown()


def test_dynamo_gets_the_features_of_each_picture(driven: Driven, tower: VisionTower) -> None:
    requests = [[as_url(0)], [as_url(1), as_url(2)], *([as_url(seed)] for seed in range(3, 12))]
    answers = driven.encode(*requests)
    assert [len(answer) for answer in answers] == [1, 2, *[1] * 9]
    for seed, found in enumerate(each for answer in answers for each in answer):
        assert found.shape == tower.feature_shape
        assert found.device.type == "cpu"
        assert (found - tower.encode(picture(seed))[0]).abs().max() < 1e-3 * found.abs().max()


def test_dynamo_builds_a_prompt_of_them(driven: Driven, llava: Path) -> None:
    features = driven.encode([as_url(0)])[0]
    embeds, ids, is_token = linear.build_mixed_embeds([1, 7, 2], features, 7)
    assert torch.equal(embeds[1 : 1 + len(features[0])], features[0])
    assert is_token.count(False) == len(features[0]) == len(ids) - 2


def test_features_have_the_dtype_of_the_language_model(llava: Path) -> None:
    class Encoder(TowerBackend):
        bundle = str(llava)
        dtype = torch.bfloat16
        backend = CHOSEN_ON_A_CPU
        allow_uncertified = True

    driven = Driven(Encoder())
    assert driven.encode([as_url(0)])[0][0].dtype == torch.bfloat16
    driven.encoder.shutdown()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,bm8gcGljdHVyZQ==", "Pillow finds no picture in it"),
        ("data:image/png;base64,?", "a data: URL holds no base64"),
        ("data:image/png,text", "must be in base64"),
        ("/etc/passwd", "must be an https: or a data: URL"),
        ("file:///etc/passwd", "must be an https: or a data: URL"),
        ("http://localhost/picture.png", ""),
        ("https://127.0.0.1/picture.png", ""),
        ("https://nowhere.invalid/picture.png", ""),
    ],
)
def test_picture_that_is_wrong_fails_its_request_alone(
    driven: Driven, tower: VisionTower, llava: Path, url: str, message: str
) -> None:
    right, wrong = driven.encode([as_url(0)], [as_url(1), url])
    assert isinstance(wrong, ValueError)  # whose words Dynamo sends to the client
    assert message in str(wrong)
    assert str(llava) not in str(wrong)
    assert (right[0] - tower.encode(picture(0))[0]).abs().max() < 1e-3 * right[0].abs().max()


def test_engine_that_fails_says_nothing_of_itself(driven: Driven, llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ConfigError(f"something about {llava}")  # which is a ValueError

    monkeypatch.setattr(VisionTower, "run_prepared", fail)
    (error,) = driven.encode([as_url(0)])
    assert type(error) is RuntimeError
    assert str(error) == "the vision tower failed"


def test_features_that_the_language_models_dtype_cannot_hold_are_no_infinities(
    driven: Driven, tower: VisionTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisionTower, "run_prepared", lambda *_: torch.full((1, *tower.feature_shape), 1e6))
    assert torch.isfinite(driven.encode([as_url(0)])[0][0]).all()
    driven.encoder._backend.dtype = torch.float16
    (error,) = driven.encode([as_url(0)])
    assert type(error) is RuntimeError


def test_picture_is_fetched_by_dynamos_rules(
    driven: Driven, tower: VisionTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "picture.png").write_bytes(encoded(0))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/picture.png"
        (refused,) = driven.encode([url])
        monkeypatch.setenv("DYN_MM_ALLOW_INTERNAL", "1")
        (answer,) = driven.encode([url])
        server.shutdown()
    assert isinstance(refused, ValueError)
    assert (answer[0] - tower.encode(picture(0))[0]).abs().max() < 1e-3 * answer[0].abs().max()


def test_bundle_that_does_not_fit_is_refused_at_the_start(projected: Projected, llava: Path) -> None:  # noqa: F811
    class Nothing(TowerBackend):
        pass

    class Plain(TowerBackend):
        bundle = str(projected("llava", head="none"))

    class Uncertified(TowerBackend):
        bundle = str(llava)

    class TooMany(Uncertified):
        max_batch_cost = 5

    with pytest.raises(ConfigError, match="max_batch_cost=5; expected 1 to 4"):
        TooMany()
    with pytest.raises(ConfigError, match=r"Nothing.bundle is not set"):
        Nothing()
    with pytest.raises(ConfigError, match="without a head, but Dynamo wants features after the model's projector"):
        Plain()
    with pytest.raises(Exception, match="is not certified"):
        Driven(Uncertified())
