"""What the example uses of github.com/haotian-liu/LLaVA."""
