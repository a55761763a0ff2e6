"""Rules of other papers, as readers know them by name, simulated: see `input_mask`."""
