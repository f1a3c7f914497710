"""Everything Ray: sampling, engines, workers, the coordinator, and how weights travel from trainer to workers."""
