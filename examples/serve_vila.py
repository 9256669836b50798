"""Run VILA or NVILA from its own repository, with a compiled vision tower.

trtower export Efficient-Large-Model/VILA1.5-3b
python examples/serve_vila.py Efficient-Large-Model/VILA1.5-3b engines/VILA1.5-3b photo.jpg "What is this?"
"""

import argparse

import llava
from llava.media import Image

import trtower

parser = argparse.ArgumentParser()
for name in ("checkpoint", "bundle", "image", "question"):
    parser.add_argument(name)
args = parser.parse_args()

model = llava.load(args.checkpoint, model_base=None)

print(trtower.install(model, args.bundle))

print(model.generate_content([Image(args.image), args.question]))
