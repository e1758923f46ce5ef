"""What research and `make model` need: controls, costs, benchmarks, and the recipe of the bundled model."""
