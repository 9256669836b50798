"""A bundle held against PyTorch, and the certificate of it."""
