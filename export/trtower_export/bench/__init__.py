"""Race a bundle against what else could run its tower. `benchmark.py` tells the story."""
