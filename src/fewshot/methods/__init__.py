"""The few-shot methods. Each module follows its paper."""
