"""How good a model is on text, and how far it is from the dense model."""
