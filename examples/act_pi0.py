"""Act with LeRobot's π0, with its tower and projector compiled.

trtower export lerobot/pi0_base --head projector
python examples/act_pi0.py lerobot/pi0_base engines/pi0_base-projector observations.safetensors
"""

import argparse

from lerobot.policies.pi0.modeling_pi0 import PI0Policy  # or PI05Policy of pi05.modeling_pi05
from safetensors.torch import load_file

import trtower

parser = argparse.ArgumentParser()
for name in ("policy", "bundle", "observations"):
    parser.add_argument(name)
args = parser.parse_args()

policy = PI0Policy.from_pretrained(args.policy).eval()

print(trtower.install(policy, args.bundle))

# What the policy's preprocessor returned. Here it is read from a file, one observation.
batch = {name: value[:1].to(policy.config.device) for name, value in load_file(args.observations).items()}
for step in policy.predict_action_chunk(batch)[0].tolist():
    print(*(f"{joint:.4f}" for joint in step))
