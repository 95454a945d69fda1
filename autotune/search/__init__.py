"""Which learning rate next: space, surrogate, acquisition, ask/tell."""
