"""Run the compiled vision tower in an actor of Ray, here or on another node, and the language model in this process.

Needs transformers 5.23 and the extra `ray`.

trtower export llava-hf/llava-1.5-7b-hf
python examples/two_processes.py llava-hf/llava-1.5-7b-hf engines/llava-1.5-7b-hf photo.jpg "What is this?"
"""

import argparse
import io
from pathlib import Path
from typing import Any

import ray
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

import trtower

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPUS = 0.5 if DEVICE == "cuda" else 0
"""The vision actor's share of a GPU: Ray hides GPUs from an actor that asks for none."""


class Vision:
    """The tower and projector of a model, without its language model."""

    def __init__(self, checkpoint: str, bundle: str) -> None:
        config = AutoConfig.from_pretrained(checkpoint)
        config.text_config.num_hidden_layers = 0  # load no language layers; transformers warns of unexpected weights
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, config=config, dtype="auto")
        model.lm_head = model.model.language_model = None
        self.model = model.to(DEVICE)  # type: ignore[arg-type] # mypy misreads transformers' decorated `to`
        trtower.install(self.model, bundle)

    def encode(self, images: dict[str, torch.Tensor]) -> bytes:
        """Turn pixels into features, as bytes that can go over a network, not GPU memory."""
        encoded = trtower.encode_for(self.model, {name: each.to(DEVICE) for name, each in images.items()})
        features = io.BytesIO()
        torch.save({name: each.pooler_output for name, each in encoded.items()}, features)
        return features.getvalue()


def main() -> None:
    """Ask one question."""
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "bundle", "image", "question"):
        parser.add_argument(name)
    args = parser.parse_args()

    ray.init()
    bundle = str(Path(args.bundle).absolute())  # an actor has a working folder of its own
    vision: Any = ray.remote(num_gpus=GPUS)(Vision).remote(args.checkpoint, bundle)

    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype="auto")
    model.model.vision_tower = None
    model = model.to(DEVICE)  # type: ignore[arg-type]
    content = [{"type": "image"}, {"type": "text", "text": args.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(args.image).convert("RGB"), text=prompt, return_tensors="pt")
    text = {name: inputs.pop(name).to(DEVICE) for name in ("input_ids", "attention_mask")}
    received = io.BytesIO(ray.get(vision.encode.remote(dict(inputs))))
    features = torch.load(received, map_location=DEVICE, weights_only=True)
    encoded = {name: BaseModelOutputWithPooling(pooler_output=each) for name, each in features.items()}
    answer = model.generate(**text, mm_encoder_outputs=encoded, max_new_tokens=64, do_sample=False)
    print(processor.decode(answer[0, text["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
