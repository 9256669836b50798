"""Vision in a process of its own: it sees with a compiled tower, and this one only speaks. Needs transformers 5.23.

trtower export llava-hf/llava-1.5-7b-hf
python examples/two_processes.py llava-hf/llava-1.5-7b-hf engines/llava-1.5-7b-hf photo.jpg "What is this?"
"""

import argparse
import multiprocessing
from multiprocessing.connection import Connection

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import trtower


def see(checkpoint: str, bundle: str, asked: Connection) -> None:
    """Answer pixels with features until there are no more; the language model is never run here."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto")
    model.lm_head = model.model.language_model = None
    with trtower.install(model, bundle):
        while (images := asked.recv()) is not None:
            asked.send(trtower.encode_for(model, images))


def main() -> None:
    """Ask one question."""
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "bundle", "image", "question"):
        parser.add_argument(name)
    args = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")  # towers do not outlive a fork
    here, there = spawn.Pipe()
    eyes = spawn.Process(target=see, args=(args.checkpoint, args.bundle, there), daemon=True)
    eyes.start()
    there.close()  # so that its end is noticed here

    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype="auto")
    model.model.vision_tower = None
    content = [{"type": "image"}, {"type": "text", "text": args.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(args.image).convert("RGB"), text=prompt, return_tensors="pt")
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    here.send(dict(inputs))
    answer = model.generate(**text, mm_encoder_outputs=here.recv(), max_new_tokens=64, do_sample=False)
    print(processor.decode(answer[0, text["input_ids"].shape[1] :], skip_special_tokens=True))
    here.send(None)
    eyes.join()


if __name__ == "__main__":
    main()
