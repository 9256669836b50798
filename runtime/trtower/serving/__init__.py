"""Bundles on the servers and engines that people run already, each module behind an extra of its own."""
