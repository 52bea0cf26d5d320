"""How a model acts: the log-probabilities of its actions, one policy a modality."""
