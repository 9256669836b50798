"""What the example uses of tinychat in github.com/mit-han-lab/llm-awq."""
