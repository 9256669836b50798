"""Turn what the user named into a config and tensors."""
