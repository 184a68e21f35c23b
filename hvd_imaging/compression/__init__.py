"""Smaller and faster networks: pruning, clustering, quantization, and the gate that decides what is released."""
