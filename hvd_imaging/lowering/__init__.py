"""Trained networks in the form that devices run best: 3D layers as equal 2D ones."""
