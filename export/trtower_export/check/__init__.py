"""Compare a bundle with PyTorch, and write its certificate."""
