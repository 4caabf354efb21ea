"""Training: set-up, the loop, the jitted step, the optimizer, mining, and what a run records of itself.

May import anything but the commands; only `setup` and `loop` read the whole config.
"""
