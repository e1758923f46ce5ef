"""`trm-bench`, and the benchmarks of a running server; what decoding costs is measured in `trm.bench`."""
