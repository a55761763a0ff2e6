"""The sparse MLP as an operator: its definition in plain PyTorch, and its implementations. No transformers here."""
