"""Criteria beyond the paper's: which neurons are skipped, what makes up for them, and the search for the best."""
