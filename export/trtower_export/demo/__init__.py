"""From checkpoint to a checked and timed bundle, offline."""
