"""The wire: request and response bodies, and nothing else."""
