"""Run a transformers model with a compiled vision tower.

trtower export llava-hf/llava-1.5-7b-hf
python examples/serve_hugging_face.py llava-hf/llava-1.5-7b-hf engines/llava-1.5-7b-hf photo.jpg "What is this?"
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import trtower

parser = argparse.ArgumentParser()
for name in ("checkpoint", "bundle", "image", "question"):
    parser.add_argument(name)
args = parser.parse_args()

processor = AutoProcessor.from_pretrained(args.checkpoint)
model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype="auto")
model = model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type] # mypy misreads transformers' decorated `to`

print(trtower.install(model, args.bundle))

content = [{"type": "image"}, {"type": "text", "text": args.question}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=Image.open(args.image).convert("RGB"), text=prompt, return_tensors="pt").to(model.device)
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
