"""Model surgery: find the gated MLPs of a model, make them sparse, make them dense again."""
