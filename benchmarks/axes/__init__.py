"""What `benchmarks.flagship` trains, counts and times."""
