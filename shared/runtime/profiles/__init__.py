"""Launch profiles: one accelerate configuration file each."""
