"""How far features are from PyTorch, and whether that is near enough; proved with the runtime alone."""
