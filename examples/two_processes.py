"""Run the compiled vision tower in one process and the language model in another. Needs transformers 5.23.

trtower export llava-hf/llava-1.5-7b-hf
python examples/two_processes.py llava-hf/llava-1.5-7b-hf engines/llava-1.5-7b-hf photo.jpg "What is this?"
"""

import argparse
import io
import multiprocessing
from multiprocessing.connection import Connection

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

import trtower

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def serve_vision(checkpoint: str, bundle: str, requests: Connection) -> None:
    """Receive pixels and send back their features, until None arrives."""
    config = AutoConfig.from_pretrained(checkpoint)
    config.text_config.num_hidden_layers = 0  # load no language layers; transformers warns of unexpected weights
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, config=config, dtype="auto")
    model.lm_head = model.model.language_model = None
    model = model.to(DEVICE)  # type: ignore[arg-type] # mypy misreads transformers' decorated `to`
    with trtower.install(model, bundle):
        while (images := requests.recv()) is not None:
            encoded = trtower.encode_for(model, {name: each.to(DEVICE) for name, each in images.items()})
            features = io.BytesIO()  # bytes that could go over a network, not GPU memory
            torch.save({name: each.pooler_output for name, each in encoded.items()}, features)
            requests.send_bytes(features.getvalue())


def main() -> None:
    """Ask one question."""
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "bundle", "image", "question"):
        parser.add_argument(name)
    args = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")  # towers do not survive a fork
    here, there = spawn.Pipe()
    vision = spawn.Process(target=serve_vision, args=(args.checkpoint, args.bundle, there), daemon=True)
    vision.start()
    there.close()  # so that this process notices if the other ends

    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype="auto")
    model.model.vision_tower = None
    model = model.to(DEVICE)  # type: ignore[arg-type]
    content = [{"type": "image"}, {"type": "text", "text": args.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(args.image).convert("RGB"), text=prompt, return_tensors="pt")
    text = {name: inputs.pop(name).to(DEVICE) for name in ("input_ids", "attention_mask")}
    try:
        here.send(dict(inputs))
        received = io.BytesIO(here.recv_bytes())
    except (EOFError, OSError):
        raise SystemExit("The vision process has ended; its error is printed above.") from None
    features = torch.load(received, map_location=DEVICE, weights_only=True)
    encoded = {name: BaseModelOutputWithPooling(pooler_output=each) for name, each in features.items()}
    answer = model.generate(**text, mm_encoder_outputs=encoded, max_new_tokens=64, do_sample=False)
    print(processor.decode(answer[0, text["input_ids"].shape[1] :], skip_special_tokens=True))
    here.send(None)
    vision.join()


if __name__ == "__main__":
    main()
