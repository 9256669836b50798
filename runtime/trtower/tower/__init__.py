"""What model code touches: a vision tower, LLaVA's classes for it, and the image processor."""
