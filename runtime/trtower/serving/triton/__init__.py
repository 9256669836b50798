"""A bundle on NVIDIA Triton: a model repository, and the code that the server runs. Start at repository.py."""
