"""What accelerators can do, and what a compiled program computes, moves and sends. Plain facts and text, no jax."""
