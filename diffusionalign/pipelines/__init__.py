"""Pipelines of diffusers behind one face: what the trainers need of each, and of none in particular."""
