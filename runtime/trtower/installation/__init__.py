"""Put a bundle into a loaded model: find the tower, compare it with the bundle, replace it, and bring it back."""
