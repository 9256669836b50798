"""Act with OpenVLA, with its two towers and its projector compiled into one engine. OpenVLA pins transformers 4.40.1.

trtower export openvla/openvla-7b --head projector
python examples/act_openvla.py openvla/openvla-7b engines/openvla-7b-projector frame.png "pick up the cup" bridge_orig
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForVision2Seq, AutoProcessor  # type: ignore[attr-defined] # not in 5

import trtower

parser = argparse.ArgumentParser()
for name in ("policy", "bundle", "frame", "instruction", "dataset"):
    parser.add_argument(name)
args = parser.parse_args()

processor = AutoProcessor.from_pretrained(args.policy, trust_remote_code=True)
policy = AutoModelForVision2Seq.from_pretrained(args.policy, torch_dtype="auto", trust_remote_code=True)
policy = policy.to("cuda" if torch.cuda.is_available() else "cpu").eval()

print(trtower.install(policy, args.bundle))

prompt = f"In: What action should the robot take to {args.instruction.lower()}?\nOut:"
inputs = processor(prompt, Image.open(args.frame)).to(policy.device, policy.dtype)
action = policy.predict_action(**inputs, unnorm_key=args.dataset, do_sample=False)
print(*(f"{joint:.4f}" for joint in action))
