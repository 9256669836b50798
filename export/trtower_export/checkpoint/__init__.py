"""What the user named, turned into a config and tensors."""
