"""Rewards: what says how good an answer is."""
