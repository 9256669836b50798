"""Run LLaVA or LLaVA-NeXT from its own repository, with a compiled vision tower.

trtower export liuhaotian/llava-v1.5-7b
python examples/serve_llava.py liuhaotian/llava-v1.5-7b engines/llava-v1.5-7b photo.jpg "What is this?"
"""

import argparse

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from PIL import Image

import trtower

parser = argparse.ArgumentParser()
for name in ("checkpoint", "bundle", "image", "question"):
    parser.add_argument(name)
args = parser.parse_args()

tokenizer, model, image_processor, _ = load_pretrained_model(
    args.checkpoint, None, get_model_name_from_path(args.checkpoint)
)

print(trtower.install(model, args.bundle))

image = Image.open(args.image).convert("RGB")
images = process_images([image], image_processor, model.config).to(model.device, dtype=model.dtype)
prompt = f"USER: {DEFAULT_IMAGE_TOKEN}\n{args.question} ASSISTANT:"
input_ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
answer = model.generate(
    input_ids.unsqueeze(0).to(model.device),
    images=images,
    image_sizes=[image.size],
    max_new_tokens=64,
    do_sample=False,
)
print(tokenizer.batch_decode(answer, skip_special_tokens=True)[0].strip())
