"""`trm-bench`: measurements as ratios within one run, each with its control beside it."""
