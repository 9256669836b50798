"""Run tinychat, AWQ's runtime for VILA: a 4-bit language model with a compiled vision tower.

hf download Efficient-Large-Model/VILA1.5-3b-AWQ --local-dir VILA1.5-3b-AWQ
trtower export VILA1.5-3b-AWQ
python examples/serve_tinychat.py VILA1.5-3b-AWQ VILA1.5-3b-AWQ/llm/vila-1.5-3b-w4-g128-awq-v2.pt \
    engines/VILA1.5-3b-AWQ photo.jpg

This loads the model as tinychat's `vila15_demo.py` does and encodes one picture. The rest of that demo stays the same.
"""

import argparse

import torch
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat.utils.llava_image_processing import load_images, process_images
from tinychat.utils.load_quant import load_awq_model
from transformers import AutoConfig

import trtower

parser = argparse.ArgumentParser()
for name in ("checkpoint", "quantised", "bundle", "image"):
    parser.add_argument(name)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

model = VilaLlamaForCausalLM(AutoConfig.from_pretrained(args.checkpoint, trust_remote_code=True)).half()
model.llm = load_awq_model(model.llm, args.quantised, 4, 128, device)
model = model.to(device).eval()

print(trtower.install(model, args.bundle))

images = process_images(load_images([args.image]), model.get_vision_tower().image_processor, model.config)
features = model.encode_images(images.to(device, dtype=torch.float16))
print(f"features for the language model: {tuple(features.shape)} in {features.dtype}")
