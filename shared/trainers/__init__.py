"""Trainers that join a policy and an objective, on transformers.Trainer."""
