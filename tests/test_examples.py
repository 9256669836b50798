"""Every example runs on a small random model, and gives the same answer as the model without a bundle."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.conftest import Bundles
from tests.runtime.installation.hugging_face import IMAGE_TOKEN, IS_OLD, TAKES_FEATURES, VOCABULARY, make
from tests.runtime.installation.original import IMAGE_TOKEN_INDEX, Letters, draw_llava, draw_vila

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
QUESTION = "what is it"
SIZES = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def run(example: str, *arguments: object, package: str | None = None) -> list[str]:
    """Run an example as a user would, with a stand-in for the package that it imports."""
    path = [ROOT, *([ROOT / "tests" / "packages" / package] if package else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command: list[str | Path] = [sys.executable, EXAMPLES / example, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    noise = np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def pil_image_processor() -> Any:
    """Return a PIL processor: transformers 5 has it in a module of its own, 4.57 under the plain name."""
    module = f"transformers.models.clip.image_processing{'' if IS_OLD else '_pil'}_clip"
    processors = importlib.import_module(module)
    return processors.CLIPImageProcessor if IS_OLD else processors.CLIPImageProcessorPil


def save_with_processor(model: Any, folder: Path) -> Any:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE_TOKEN}
    words |= {word: 10 + index for index, word in enumerate(QUESTION.split())}
    words |= {f"w{index}": index for index in set(range(VOCABULARY)) - set(words.values())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "extra_special_tokens": {"image_token": "<image>"}}
    processor = transformers.LlavaProcessor(
        image_processor=pil_image_processor()(**SIZES),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory, picture: Path) -> tuple[Path, str]:
    """Return a checkpoint with its processor, and its answer about the picture."""
    folder = tmp_path_factory.mktemp("hugging-face") / "llava"
    model = make("llava")
    processor = save_with_processor(model, folder)
    inputs = processor(images=Image.open(picture), text=f"<image> {QUESTION}", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return folder, processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_hugging_face(llava: tuple[Path, str], picture: Path, bundles: Bundles) -> None:
    checkpoint, expected = llava
    output = run("serve_hugging_face.py", checkpoint, bundles(), picture, QUESTION)
    assert output[-1] == expected
    assert "freed" in output[-2]


@pytest.mark.skipif(not TAKES_FEATURES, reason="generate of this transformers version does not accept features")
def test_two_processes(llava: tuple[Path, str], picture: Path, bundles: Bundles) -> None:
    pytest.importorskip("ray", reason="Ray has an environment of its own: make test-serving")
    checkpoint, expected = llava
    assert run("two_processes.py", checkpoint, bundles(), picture, QUESTION)[-1] == expected
    with pytest.raises(AssertionError, match=r"nowhere is not a bundle: "):
        run("two_processes.py", checkpoint, "nowhere", picture, QUESTION)


def test_llava(checkpoints: dict[str, Path], picture: Path, bundles: Bundles) -> None:
    output = run("serve_llava.py", checkpoints["clip"], bundles(), picture, QUESTION, package="llava")
    model, letters = draw_llava(str(checkpoints["clip"])), Letters()
    image = Image.open(picture).convert("RGB")
    pixels = model.get_vision_tower().image_processor.preprocess(image, return_tensors="pt")["pixel_values"]
    ids = [*letters.encode("USER: "), IMAGE_TOKEN_INDEX, *letters.encode(f"\n{QUESTION} ASSISTANT:")]
    answer = model.generate(torch.tensor([ids]), images=pixels, max_new_tokens=64, do_sample=False)
    assert output[-1] == letters.batch_decode(answer)[0].strip()
    assert output[-2].startswith(f"<{bundles()} in Llava.model.vision_tower.vision_tower, on ")


def test_vila(checkpoints: dict[str, Path], picture: Path, bundles: Bundles) -> None:
    class Media:
        picture: Image.Image

    Media.picture = Image.open(picture).convert("RGB")
    output = run("serve_vila.py", checkpoints["clip"], bundles(), picture, QUESTION, package="vila")
    assert output[-1] == draw_vila(str(checkpoints["clip"])).generate_content([Media, QUESTION])
    assert output[-2].startswith(f"<{bundles()} in Vila.vision_tower.vision_tower, on ")


def test_tinychat(checkpoints: dict[str, Path], picture: Path, bundles: Bundles) -> None:
    """This example prints only the shape and dtype of its features, so no answer is compared."""
    bundle = bundles(precision="fp16")
    output = run("serve_tinychat.py", checkpoints["clip"], "awq.pt", bundle, picture, package="tinychat")
    assert output[-1] == "features for the language model: (1, 9, 64) in torch.float16"
    assert "freed" in output[-2]


def test_every_example_is_tested() -> None:
    tests = (
        Path(__file__),
        *(ROOT / "tests" / each for each in ("policies/test_examples.py", "clients/run_openvla.py")),
    )
    text = "".join(path.read_text() for path in tests)
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))
