"""What an exported model says of itself, and its way to the Hugging Face hub.

Texts and files alone: may import what reads folders of models; no jax, no parameters.
"""
