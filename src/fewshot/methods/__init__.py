"""The few-shot methods, each to be read beside its paper."""
