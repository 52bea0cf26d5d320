"""How a run starts and ends: arguments, launch checks, model loading, checkpoints and the run report."""
