"""The checkpoint format: what stands in config.json, and how folders are written without losing data."""
