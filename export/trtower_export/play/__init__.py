"""A page in the browser that shows what a tower sees, from PyTorch and from a bundle. Start at page.py."""
