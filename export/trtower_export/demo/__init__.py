"""The whole way, offline."""
