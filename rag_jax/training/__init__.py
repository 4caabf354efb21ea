"""Training: set-up, the loop, what its steps read, the jitted step, the optimizer, mining, and what a run records.

May import anything but the commands.
"""
