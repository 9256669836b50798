"""Make pictures, and the parts of small random checkpoints with the client's own transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import sentencepiece
import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

ModelT = TypeVar("ModelT", bound=torch.nn.Module)

WIDTH = 64
"""D: the width of a tower's features and of the language model."""

SPREAD = 0.2
"""Standard deviation of random weights: wide enough that logits depend on the picture and one token clearly leads."""

LM_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": SPREAD,
}
TOWER_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}

CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
WORDS = "a an the red green blue square on of is what in this picture and there one two three four USER ASSISTANT"


def write_tokenizer(folder: Path, **config: Any) -> transformers.LlamaTokenizer:
    """Train a SentencePiece model on a few words, and save it as a Llama tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = WORDS.split()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choice(words, 8)) for _ in range(400)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = transformers.LlamaTokenizer(str(folder / "tokenizer.model"), legacy=False, **config)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_language_model(folder: Path, config_class: Any, model_class: Any) -> Path:
    """Save a language model and a tokenizer with a chat template, in the separate folder that VILA expects."""
    tokenizer = write_tokenizer(folder, model_max_length=4096)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    config = config_class(vocab_size=len(tokenizer) + 16, **LM_SHAPE)  # VILA adds media tokens when it loads
    randomised(model_class(config)).half().save_pretrained(folder)
    return folder


def write_clip(folder: Path, image_size: int, patch_size: int, **shape: int) -> Path:
    """Save a CLIP tower and its image processor, as on the hub."""
    config = transformers.CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=WIDTH,
        hidden_act="quick_gelu",
        **TOWER_SHAPE | shape,
    )
    _save(randomised(transformers.CLIPVisionModel(config)), folder)
    size, crop = {"shortest_edge": image_size}, {"height": image_size, "width": image_size}
    transformers.CLIPImageProcessor(size=size, crop_size=crop).save_pretrained(folder)
    return folder


def write_siglip(
    folder: Path, image_size: int, patch_size: int, model_class: Any = None, processor: Any = None
) -> Path:
    """Save a SigLIP tower and its image processor, of the client's own classes if it has them."""
    model_class = model_class or transformers.SiglipVisionModel
    processor = processor or transformers.SiglipImageProcessor
    config = model_class.config_class(
        image_size=image_size, patch_size=patch_size, hidden_act="gelu_pytorch_tanh", **TOWER_SHAPE
    )
    _save(randomised(model_class(config)), folder)
    processor(size={"height": image_size, "width": image_size}).save_pretrained(folder)
    return folder


def write_in_hub_cache(repository: str, write: Callable[[Path], Path]) -> str:
    """Write a folder where a download from the hub would be, for clients that identify a tower by its hub id."""
    folder = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    write(folder / "snapshots" / "made-up")
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text("made-up")
    return repository


def _save(model: transformers.PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, safe_serialization=True)


def randomised(model: ModelT) -> ModelT:
    """Replace every weight, whatever its initialisation, by a random one of `SPREAD`; those of norms lie around 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * SPREAD
        norm = "norm" in name and name.endswith("weight")
        parameter.data = (drawn + 1 if norm else drawn).to(parameter.dtype)
    return model


def pictures(scale: int = 1) -> list[Image.Image]:
    """Make four pictures: wide, tall, square and small. Their sides are ``scale`` times 33 to 160 pixels."""
    rng = np.random.default_rng(1)
    images = []
    for width, height in ((160, 90), (70, 130), (112, 112), (33, 40)):
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        images.append(Image.fromarray(coarse).resize((width * scale, height * scale), Image.Resampling.BICUBIC))
    return images
