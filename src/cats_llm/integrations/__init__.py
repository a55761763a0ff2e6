"""One file for each project that CATS plugs into."""
