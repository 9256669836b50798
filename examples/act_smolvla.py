"""Act with LeRobot's SmolVLA, with its tower and connector compiled.

trtower export lerobot/smolvla_base --head projector
python examples/act_smolvla.py lerobot/smolvla_base engines/smolvla_base-projector observations.safetensors
"""

import argparse

from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file

import trtower

parser = argparse.ArgumentParser()
for name in ("policy", "bundle", "observations"):
    parser.add_argument(name)
args = parser.parse_args()

policy = SmolVLAPolicy.from_pretrained(args.policy).eval()

print(trtower.install(policy, args.bundle))

# What the policy's preprocessor returned. Here it is read from a file, one observation.
batch = {name: value[:1].to(policy.config.device) for name, value in load_file(args.observations).items()}
for step in policy.predict_action_chunk(batch)[0].tolist():
    print(*(f"{joint:.4f}" for joint in step))
