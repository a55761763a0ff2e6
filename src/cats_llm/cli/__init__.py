"""The command `cats`."""
