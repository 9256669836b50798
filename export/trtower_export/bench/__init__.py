"""Race a bundle against the alternatives for running its tower. Start reading at `benchmark.py`."""
