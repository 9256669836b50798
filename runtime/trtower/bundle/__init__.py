"""A bundle on disk: the folder that holds everything deployment needs. Does not import torch."""
