"""Segmentation over HTTP: an image in, its masks out."""
