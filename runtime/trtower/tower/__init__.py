"""What model code uses: a vision tower, LLaVA's classes for it, and the image processor."""
